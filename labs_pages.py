# SPDX-License-Identifier: Apache-2.0
"""The chat page: one text without outside requests, which labs_site.py serves.

Needs labs_markup.py and labs_kept.py, which hold parts of its script. What is sent has 40,000 bytes
at most.
"""

import re

import labs_kept
import labs_markup

STYLE = r"""
:root { color-scheme: light dark; --ground: light-dark(#fcfbf9, #15171b);
  --soft: light-dark(#f2f0ec, #1e2127); --line: light-dark(#d9d6cf, #3a3f48);
  --quiet: light-dark(#595e66, #a9afb9); --accent: light-dark(#2457b8, #94b6fa);
  background: var(--ground); color: light-dark(#1c1e21, #e6e8eb); font: 15px/1.55 system-ui }
* { box-sizing: border-box; font: inherit; color: inherit } [hidden] { display: none !important }
body { display: flex; height: 100dvh; margin: 0 } h1 { margin: 0 auto 0 0 }
h1, h3, strong, th { font-weight: 650 } em { font-style: italic }
#page { flex: 1; min-width: 0; display: flex; flex-direction: column }
header, .row { display: flex; align-items: center; gap: .5rem; padding: .6rem 1rem }
header { border-bottom: 1px solid var(--line) } .row { padding: 0 }
main { flex: 1; overflow: auto; display: flex; flex-direction: column-reverse }
#log, footer { width: min(100%, 50rem); margin: 0 auto auto; padding: .5rem 1rem 1rem }
#hint { margin: auto; padding: 1rem; max-width: 30rem; text-align: center }
#log:not(:empty) + #hint, .field:not(.changed) > button { display: none }
button, select, input, textarea { padding: 5px 10px; border: 1px solid var(--line);
  border-radius: 8px; background: var(--ground); flex: none }
button { cursor: pointer; min-height: 24px }
:focus-visible, .at { outline: 2px solid var(--accent) } header select { flex: 0 1 auto;
  min-width: 0; text-overflow: ellipsis }
textarea, .field > :is(input, select) { width: 100%; max-width: none; max-height: 30dvh;
  flex: 1; resize: none; field-sizing: content }
#send { background: #2457b8; border-color: #2457b8; color: #fff; align-self: end }
[popover] { inset: 0 auto 0 0; height: 100%; max-width: 100vw; margin: 0; border: 0;
  background: var(--soft); color: inherit }
nav { width: 17rem; padding: .6rem; flex-direction: column; gap: .5rem }
nav:popover-open { display: flex } #panel { inset: 0 0 0 auto; width: min(25rem, 100vw);
  padding: 1rem; border-left: 1px solid var(--line) }
@media (min-width: 800px) { nav[popover] { position: static; display: flex }
  .narrow { display: none } }
nav ul { flex: 1; overflow: auto; list-style: none; margin: 0; padding: 2px }
nav li > button { width: 100%; text-align: left; border-color: transparent; background: none }
nav li > button, h2 { overflow: hidden; white-space: nowrap; text-overflow: ellipsis }
[aria-current=true] { background: light-dark(#e2dfd8, #2e333b) !important }
article { margin: 1.1rem 0; overflow-wrap: anywhere; min-width: 0 } h2 { margin: 0 }
h2, small, summary, .quiet, figcaption, .actions button { color: var(--quiet); font-size: 13px }
small { display: block } a, .cite, [aria-pressed=true] { color: var(--accent) !important;
  text-decoration: underline }
.user { width: fit-content; max-width: 88%; margin-left: auto; padding: .5rem .9rem;
  border-radius: 14px; background: var(--soft) }
.raw, .tokens, p { white-space: pre-wrap } .actions { display: flex; flex-wrap: wrap }
.actions button, figure button, .cite { padding: 0 8px 0 0; border: 0; background: none }
.cite { min-height: 0 }
.error { color: light-dark(#a81c1c, #ff9f9f) } .pair { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 17rem), 1fr)) }
.card, figure, .pair > *, #tip { border: 1px solid var(--line); border-radius: 10px }
.card, .pair > * { padding: .6rem; margin: .5rem 0 }
p, ul, ol, figure, blockquote, .table { margin: .6rem 0 } h3 { margin: 1rem 0 .4rem }
.text > :first-child, li > * { margin-top: 0 } li > :is(p, ul, ol) { margin-bottom: 0 }
li > p + p { margin-top: .5rem }
[aria-busy=true] > .text:empty::after { content: "…" } .level1, .level2 { font-size: 1.2rem }
del { text-decoration: line-through } code, a { unicode-bidi: isolate }
code, pre { font: 13px/1.5 ui-monospace, monospace } :not(pre) > code { background: var(--soft) }
pre { margin: 0; padding: .6rem .8rem; overflow-wrap: normal } pre, .table { overflow: auto }
figcaption { display: flex; align-items: center; justify-content: space-between;
  padding: 4px 4px 4px 12px; background: var(--soft); border-radius: 10px 10px 0 0 }
hr { border: 0; border-top: 1px solid var(--line) } ul, ol { padding-left: 1.6rem }
blockquote { border-left: 3px solid var(--line); padding-left: .8rem; margin-left: 0 }
table { border-collapse: collapse } .host { display: inline }
td, th { border: 1px solid var(--line); padding: 3px 9px; text-align: left }
.tokens span { border-bottom: 2px solid #0000 } .tokens .p1 { border-bottom: 2px dotted }
.tokens .p2 { background: light-dark(#fdf0c8, #40370f); border-bottom: 2px dashed }
.tokens .p3 { background: light-dark(#fbd9cf, #57241a); border-bottom: 3px double }
meter { width: 100% }
#tip { position: fixed; padding: .5rem; background: var(--ground) }
#tip div { display: grid; grid-template-columns: 7rem 6rem 3.5rem; gap: .5rem }
#tip :is(span, strong) { overflow: hidden; white-space: pre; text-overflow: ellipsis }
.field { margin: .7rem 0 } .changed label { color: var(--accent) }
.field button { float: right; padding: 0 8px }
.skip:not(:focus), .said { position: fixed; right: 100vw }
"""

BODY = r"""
<a class="skip" href="#text">Skip to the message</a>
<nav id="chats" popover aria-label="Conversations"><button id="fresh">New chat</button>
<input id="find" type="search" placeholder="Search">
<ul id="list"></ul><div class="row"><button id="exportAll">Export all</button>
<button id="importer">Import</button><input id="file" type="file" hidden>
<a href="status">Status</a></div></nav>
<div id="page"><header><button class="narrow" popovertarget="chats" aria-label="Conversations">☰
</button><h1>labs</h1><select id="model" aria-label="Model"></select>
<button id="gear" popovertarget="panel">Settings</button></header>
<main tabindex="0"><div id="log" role="log" aria-live="off"></div>
<p id="hint" class="quiet">Ask something. Conversations are kept in this browser only.</p></main>
<footer><div id="notice" role="status"></div><div class="row">
<textarea id="text" aria-label="Message" placeholder="Message"></textarea>
<button id="send">Send</button></div></footer></div>
<section id="panel" popover aria-label="Settings"><form id="settings"><div class="row">
<strong>Settings</strong><button type="button" id="reset">Reset all</button>
<button type="button" popovertarget="panel">Close</button></div>
<div class="field"><label for="system">System message</label>
<textarea id="system" name="system"></textarea></div>
<div class="field"><label><input type="checkbox" name="logprobs" value="5"> Probabilities</label>
<small>Show how likely each token and its rivals were.</small></div>
<div class="field"><label for="rival">Second model, side by side</label>
<select id="rival" name="rival"></select></div><div id="usual"></div>
<details id="more"><summary>More settings</summary><div id="rest"></div></details>
<div class="field"><label for="key">API key</label><input id="key" type="password"
autocomplete="off"><small>Kept until this tab is closed.</small></div></form></section>
<div id="tip" role="status" hidden></div><div class="said" id="said" aria-live="polite"></div>
"""

SCRIPT = r"""
const at = Object.fromEntries([...document.querySelectorAll("[id]")].map((e) => [e.id, e]));
const { chats, find, list, model, rival, log, notice, text, send, panel, settings, key, tip } = at;
const memory = "labs.chat.", views = new WeakMap(), live = new Set();  // answers; those that grow
const ours = new Set();  // versions of conversations that this tab wrote
let chat, request, edited, context = new Map(), known = new Set();

function say(words, label, action) {
  notice.replaceChildren(words, " ");
  if (label) button(notice, label, () => { notice.replaceChildren(); action(); });
}

// ---------------- the server
async function call(path, options) {
  const headers = { Authorization: `Bearer ${key.value}`, "Content-Type": "application/json" };
  const response = await fetch(path, { ...options, headers }).catch((error) => {
    throw error.name === "AbortError" ? error : Error("The server does not answer. Does it run?");
  });
  if (response.ok) return response;
  if (response.status === 401) { panel.togglePopover(true); key.focus(); }
  const { error } = await response.json().catch(() => ({}));
  throw Object.assign(Error(error?.message ?? `HTTP ${response.status}`), { code: error?.code });
}
async function start() {
  try {
    if (!known.size) fields((await (await call("openapi.json")).json()).components.schemas);
    const { data } = await (await call("v1/models")).json();
    const chats = data.filter(({ kind }) => kind === "text");
    context = new Map(chats.map(({ id, context_length }) => [id, context_length]));
    const options = () => chats.map(({ id }) => new Option(id));
    model.replaceChildren(...options());
    rival.replaceChildren(new Option("none", ""), ...options());
    fill(); if (!chats.length) say("This server has no model that writes text.");
  } catch (error) { say(error.message, "Try again", start); }
}
async function* events({ body }) {  // yields each data line; a chunk may end inside a line
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  for (let part, lines = [""]; !(part = await reader.read()).done;) {
    lines = (lines.pop() + part.value).split(/\r\n|\r|\n/);
    for (const line of lines.slice(0, -1)) if (line.startsWith("data:")) yield line.slice(5).trim();
  }
}
async function fitting(sent, signal) {  // drops the oldest turns until the prompt fits
  const { messages } = sent, first = messages[0].role === "system" ? 1 : 0;
  for (;;)
    try {
      const body = JSON.stringify(sent);
      return await call("v1/chat/completions", { method: "POST", signal, body });
    } catch (error) {
      const next = messages.findIndex(({ role }, i) => i > first && role === "user");
      if (error.code !== "context_length_exceeded" || next < 0) throw error;
      messages.splice(first, next - first);
    }
}

// ---------------- what a conversation looks like
function show() { log.replaceChildren(); chat.turns.forEach(showTurn); }
function showTurn(turn) {
  const { role, content, page: { other } } = turn, asked = role === "user";
  if (role === "assistant") {
    const box = other ? add(log, "div.pair") : log;
    showAnswer(box, turn, turn);
    if (other) showAnswer(box, other, turn);
    return;
  }
  const box = add(log, `article.${role}`);
  add(box, asked ? "h2.said" : "h2", asked ? "You" : "Result");
  add(box, "div.raw", content);
  if (asked) button(add(box, "div.actions"), "Edit", () => edit(turn));
}
function showAnswer(parent, turn, held) {  // held: the turn that the conversation goes on from
  const box = add(parent, "article.model"), { page } = turn;
  const title = add(box, "h2");
  const thought = add(box, "details"), summary = add(thought, "summary");
  const reason = add(thought, "div.raw"), body = add(box, "div"), more = add(box, "div");
  const tools = add(box, "div"), figures = add(box, "small"), actions = add(box, "div.actions");
  let mode, write, chosen;  // chosen: how to show it, by the reader
  const set = (next) => {
    mode = body.className = next; body.replaceChildren();
    write = next === "text" ? writer(body, (n) => cited(page, n, more))
      : next === "tokens" ? tokens(body) : (content) => { body.textContent = content; };
    write(turn.content, turn);
  };
  const act = (over) => {  // the buttons under a whole answer
    actions.replaceChildren();
    if (!over) return;
    button(actions, "Copy", ({ target }) => copy(turn.content, target, body));
    for (const [name, label] of [["raw", "Raw text"], ["tokens", "Probabilities"]])
      if (name === "raw" || turn.tokens) button(actions, label, () => {
        chosen = true; set(mode === name ? "text" : name); act(true);
        [...actions.children].find((each) => each.textContent === label).focus();
      }, { ariaPressed: mode === name });
    if (held.page.other) button(actions, "Go on with this", () => choose(held, turn),
      { ariaPressed: turn === held });
    else button(actions, "Retry", () => retry(turn));
    if (page.cut && turn === chat.turns.at(-1))
      button(actions, "Continue", () => request || run([...chat.turns], turn));
  };
  const update = () => {
    const over = !live.has(turn), first = turn.tokens ? "tokens" : "text";
    thought.hidden = !turn.reasoning_content; reason.textContent = turn.reasoning_content ?? "";
    summary.textContent = page.thought ? `Thought for ${page.thought} s` : "Thinking …";
    box.ariaBusy = !over; title.textContent = page.model || "Answer";
    if (!chosen && mode !== first) set(first); else write(turn.content, turn);
    const wrong = over && page.problem, told = [...page.notes ?? [], page.figures, wrong];
    figures.textContent = told.filter(Boolean).join(" · ");
    figures.className = wrong ? "error" : "";
    if (!more.firstChild) sources(more, turn, held);  // later, one may be open
    tools.replaceChildren(); cards(tools, turn, over); act(over);
  };
  views.set(turn, sparing(turn, box, update)); update();
}
function choose(held, turn) {
  const { other, ...page } = held.page;
  if (request || turn === held) return;
  other.page.other = Object.assign(held, { page });
  chat.turns[chat.turns.indexOf(held)] = other;
  save(); show();
}
function cards(parent, turn, over) {  // calls of tools, and fields for their results
  const { tool_calls: calls = [], page } = turn, results = page.results ??= {};
  const last = over && turn === chat.turns.at(-1);
  for (const { id, function: { name, arguments: written } } of calls) {
    const box = add(parent, "section.card", "", { ariaLabel: `Call of ${name}` });
    let pretty = written;
    try { pretty = JSON.stringify(JSON.parse(written), null, 2); } catch {}  // it is not whole
    add(box, "strong", name); add(box, "pre", pretty, { tabIndex: 0 });
    const input = last && add(box, "textarea", "", { placeholder: `Result of ${name}`,
      value: results[id] ?? "", oninput: () => { results[id] = input.value; } });
  }
  if (last && calls.length) button(parent, "Go on with the results", () => {
    const before = [...chat.turns];
    for (const { id } of calls) chat.turns.push(
      { role: "tool", content: results[id] ?? "", tool_call_id: id, page: {} });
    if (!request) { show(); run(before); }
  });
}
function sources(parent, { page }, held) {  // the passages that [n] cites
  for (const { n, path, heading } of page.documents ?? []) {
    const box = add(parent, "details.source"), where = [path, heading].filter(Boolean);
    add(box, "summary", `[${n}] ${where.join(" > ")}`);
    const passage = add(box, "div.raw", "…");
    box.ontoggle = async () => {  // /explain shows the prompt, and in it the passages
      const messages = messagesOf(chat, chat.turns.slice(0, chat.turns.indexOf(held)));
      const body = JSON.stringify({ messages, model: page.model || null, documents: true });
      try {
        const { prompt } = await (await call("explain", { method: "POST", body })).json();
        const lines = prompt.split("\n"), first = lines.lastIndexOf(`[${n}]`) + 2;
        const end = lines.findIndex((line, i) => i >= first && !line.startsWith("> "));
        passage.textContent = lines.slice(first, end).map((line) => line.slice(2)).join("\n");
      } catch (error) { passage.textContent = error.message; }
    };
  }
}
function cited({ documents = [] }, n, parent) {  // what a click on [n] does, if it has a passage
  const place = documents.findIndex((each) => `${each.n}` === n);
  return place >= 0 && (() => {
    const box = parent.querySelectorAll(".source")[place];
    box.open = true; box.firstChild.focus();
  });
}

// ---------------- answers
async function run(before, goesOn) {  // before: the turns to return to if no answer comes
  const owner = chat, mine = request = new AbortController();
  const names = new Set(goesOn ? [goesOn.page.model] : [model.value, rival.value || model.value]);
  const turns = goesOn ? [goesOn] : [...names].map((name) =>
    ({ role: "assistant", content: "", page: { model: name } })), [first, second] = turns;
  const messages = messagesOf(owner, owner.turns.slice(owner.skip));
  for (const each of turns) live.add(each);
  if (second) first.page.other = second;
  if (!goesOn) { owner.turns.push(first); showTurn(first); }
  for (const each of owner.turns) views.get(each)?.();  // only the last one can go on
  log.parentNode.scrollTop = 0;
  send.textContent = "Stop"; text.focus(); save(owner);
  const wrong = await Promise.all(turns.map((turn) =>
    stream(owner, turn, { messages: [...messages], signal: mine.signal, goesOn })));
  if (request === mine) { request = null; send.textContent = "Send"; }
  const place = owner.turns.indexOf(first), said = turns.some((turn, i) =>
    turn.content || turn.tool_calls || turn.reasoning_content || !wrong[i]);
  if (said || place < 0) owner.skip = (owner.skip ?? 0) + (first.page.dropped ?? 0);
  else if (chat === owner) owner.turns = before;  // the question returns to its field
  else owner.turns.splice(place, 1);
  save(owner);
  if (chat !== owner) return true;
  if (!said) show();
  at.said.textContent = first.content.slice(0, 2000);  // read out once, not token by token
  if (!said) say(wrong[0]);
  else if (first.page.full > .8)
    say("The context is nearly full. The oldest messages will be left out.");
  return said;
}
async function stream(owner, turn, { messages, signal, goesOn }) {  // returns what went wrong
  const { page } = turn, whole = messages.length, sent = { messages };
  const clock = { pieces: 0, began: Date.now() };
  if (page.model) sent.model = page.model;  // none until the list of models has arrived
  if (goesOn) Object.assign(sent, { continue_final_message: true, add_generation_prompt: false });
  Object.assign(page, { notes: [], problem: "The connection was lost", cut: false });
  try {
    if (!known.size) await start();
    const response = await fitting({ ...bodyOf(owner), ...sent }, signal);
    page.dropped = whole - messages.length;
    if (page.dropped)
      page.notes.push(`The oldest ${page.dropped} messages did not fit and were left out`);
    for await (const data of events(response)) {
      if (data === "[DONE]") { page.problem = ""; break; }
      gather(turn, JSON.parse(data), clock); views.get(turn)();
    }
  } catch (error) {  // a TypeError: of the network
    if (signal.aborted) page.problem = "Stopped";
    else if (error.name !== "TypeError") page.problem = error.message;
  }
  live.delete(turn); views.get(turn)();
  return page.problem;
}
function gather(turn, { error, model: by, choices: [choice] = [], usage, documents }, clock) {
  const { page } = turn, { content, tool_calls: calls = [], ...delta } = choice?.delta ?? {};
  const thought = delta.reasoning_content ?? delta.reasoning;
  const now = (Date.now() - clock.began) / 1000;
  if (error) throw Error(error.message);
  page.documents = documents ?? page.documents; page.model ||= by;  // it was asked for none
  if (thought) turn.reasoning_content = (turn.reasoning_content ?? "") + thought;
  else if (turn.reasoning_content) page.thought ??= now.toFixed(1);
  turn.content += content ?? "";
  for (const { index = 0, id, function: { name, arguments: more = "" } } of calls) {
    const made = { id, type: "function", function: { name, arguments: "" } };
    ((turn.tool_calls ??= [])[index] ??= made).function.arguments += more;
  }
  if (choice?.logprobs) (turn.tokens ??= []).push(...choice.logprobs.content);
  page.cut ||= choice?.finish_reason === "length";
  if (page.cut && choice?.finish_reason) page.notes.push("The answer reached its token limit");
  if (choice?.finish_reason === "content_filter") page.notes.push("A filter ended the answer");
  if (content || thought || calls.length) { clock.pieces++; clock.first ??= now; }
  page.figures = figures(page, clock, usage, now);
}
function figures(page, { first, pieces }, usage, now) {
  const { completion_tokens: count = pieces, prompt_tokens_details: found } = usage ?? {};
  const speed = ((count - 1) / (now - first)).toFixed(1), limit = context.get(page.model);
  page.full = limit > 0 && usage?.total_tokens / limit;  // unknown before the model is loaded
  return [first && `first token ${first.toFixed(2)} s`, speed > 0 && isFinite(speed) &&
    `${usage ? "" : "about "}${speed} tokens/s`, usage && `${count} tokens`,
    found?.cached_tokens && `${found.cached_tokens} cached`,
    limit && usage && `context ${usage.total_tokens} of ${limit}`].filter(Boolean).join(" · ");
}
async function ask() {
  const content = text.value, before = [...chat.turns], turn = { role: "user", content, page: {} };
  if (request || !content.trim() || !valid()) return;
  say("");
  if (edited) drop(edited);
  chat.turns.push(turn); showTurn(turn); [text.value, edited] = ["", null];
  if (!await run(before)) text.value ||= content;
}
function drop(turn) {  // leaves out a turn and what came after it
  const owner = chat, before = owner.turns;
  owner.turns = before.slice(0, before.indexOf(turn)); owner.skip = 0; show();
  say("What was there before is left out.", "Undo", () => {
    owner.turns = before; open(owner); save(owner);
  });
}
function edit(turn, content = turn.content) {
  edited = turn; text.value = content; text.focus();
  if (turn) say("Sending replaces this message and all that follows it.", "Cancel",
    () => edit(null, ""));
}
function retry(turn) {
  const before = [...chat.turns];
  if (!request && valid()) { drop(turn); run(before); }
}

// ---------------- keys and buttons
text.onkeydown = (event) =>  // false: Enter adds no line break
  event.key !== "Enter" || event.shiftKey || event.isComposing || !ask();
send.onclick = () => { if (request) request.abort(); else ask(); };
document.onkeydown = ({ key: pressed, target }) => {  // a field for a name is gone by now
  const open = document.querySelector(":popover-open");
  if (pressed === "Escape" && target.isConnected && !open) request?.abort();
};
at.fresh.onclick = () => open(empty());
find.oninput = showList; at.exportAll.onclick = () => download(stored());
at.importer.onclick = () => { at.file.value = ""; at.file.click(); };
 at.file.onchange = () => take(at.file.files[0]);
settings.onsubmit = () => false; settings.oninput = changed;
settings.onchange = model.onchange = () => {
  chat.settings.model = model.value; chat.skip = 0; changed(true);
  if (chat.turns.length && !request) save();
};
at.reset.onclick = () => { fill({}); settings.onchange(); };
key.onchange = () => { say(""); session("key", key.value); start(); };
addEventListener("pagehide", () => { if (request) save(); });
addEventListener("storage", ({ key: name, newValue }) => met(name, newValue));
key.value = session("key") ?? ""; chat = empty();
start(); open(read(memory + session("chat")) ?? chat);
"""

# Browsers need neither comments nor indentation, nor most spaces.
RULES = re.sub(r" *([{}]) *|([:;,]) +", r"\1\2", STYLE)
CODE = labs_markup.SCRIPT + labs_kept.SCRIPT + SCRIPT
LEAN = re.sub(r" (=>|[!=]==|&&|=) ", r"\1", CODE)
WHOLE = f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>labs</title>
<meta name="viewport" content="width=device-width"><link rel="icon" href="data:,">
<style>{RULES}</style>{BODY}<script>{LEAN}</script>
"""
PAGE = re.sub(r"(?m)(^|  )// .*|^ +|^\n", "", WHOLE)
