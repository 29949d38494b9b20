# SPDX-License-Identifier: Apache-2.0
"""The chat page: one text without outside requests, which labs_site.py serves.

Needs labs_markup.py and labs_kept.py, which hold parts of its script.
"""

import labs_kept
import labs_markup

STYLE = r"""
:root { color-scheme: light dark; background: var(--ground); color: var(--ink); font: 15px/1.55 system-ui;
  --ground: light-dark(#fcfbf9, #15171b); --soft: light-dark(#f2f0ec, #1e2127);
  --line: light-dark(#d9d6cf, #383d46); --ink: light-dark(#1c1e21, #e6e8eb);
  --quiet: light-dark(#595e66, #a9afb9); --accent: light-dark(#2457b8, #94b6fa);
  --bad: light-dark(#a81c1c, #ff9f9f) }
* { box-sizing: border-box; font: inherit; color: inherit } [hidden] { display: none !important }
body { display: flex; height: 100dvh; margin: 0 } h1 { margin: 0 auto 0 0; font-weight: 650 }
#page { flex: 1; min-width: 0; display: flex; flex-direction: column }
header, footer > div, .row { display: flex; align-items: center; gap: .5rem }
header { padding: .6rem 1rem; border-bottom: 1px solid var(--line) }
main { flex: 1; overflow: auto; display: flex; flex-direction: column-reverse } /* stay at end */
#log, footer { width: min(100%, 50rem); margin: 0 auto auto; padding: .5rem 1rem }
#hint { margin: auto; padding: 1rem; max-width: 30rem; text-align: center; color: var(--quiet) }
#log:not(:empty) + #hint { display: none } footer { margin: 0 auto; padding-bottom: 1rem }
button, select, input, textarea { padding: 5px 10px; border: 1px solid var(--line);
  border-radius: 8px; background: var(--ground) } button { cursor: pointer; flex: none }
button:hover { background: var(--soft) } :focus-visible { outline: 2px solid var(--accent) }
select { min-width: 3rem; max-width: 17rem; text-overflow: ellipsis }
textarea, .field > input, .field > select { width: 100%; max-width: none; max-height: 30dvh;
  resize: none; field-sizing: content }
#send { background: #2457b8; border-color: #2457b8; color: #fff; align-self: end; padding: 5px 16px }
nav { width: 17rem; border-right: 1px solid var(--line); padding: .6rem; gap: .5rem }
[popover] { inset: 0 auto 0 0; height: 100dvh; max-height: none; max-width: 100vw; margin: 0;
  border: 0; background: var(--soft); color: var(--ink); overflow: auto }
#panel { inset: 0 0 0 auto; width: min(25rem, 100vw); padding: 1rem; border-left: 1px solid
  var(--line) } nav:popover-open { display: flex; flex-direction: column }
@media (min-width: 800px) { nav[popover] { position: static; display: flex; flex-direction: column }
  .narrow { display: none } }
nav ul { flex: 1; overflow: auto; list-style: none; margin: 0; padding: 2px }
nav li > button { width: 100%; text-align: left; border-color: transparent; background: none }
nav li > button, h2 { overflow: hidden; white-space: nowrap; text-overflow: ellipsis }
nav li > button[aria-current] { background: light-dark(#e2dfd8, #2b3038); font-weight: 600 }
article { margin: 1.1rem 0; overflow-wrap: anywhere; min-width: 0 } h2 { margin: 0; font-size: 13px }
h2, small, .thought, .quiet, figcaption { color: var(--quiet) } small { display: block }
h2, small, .actions button, .thought, figcaption, figure button { font-size: 13px }
.user { margin-left: 15%; padding: .5rem .9rem; border-radius: 14px; background: var(--soft) }
.user .text, .raw, .tokens, p { white-space: pre-wrap } .actions { display: flex; flex-wrap: wrap }
.actions button, figure button, .plain { padding: 1px 8px; border-color: transparent;
  color: var(--quiet); background: none } .actions [aria-pressed=true] { color: var(--accent);
  border-color: currentColor } .error, .error * { color: var(--bad) }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 17rem), 1fr));
  gap: 1rem } .pair > article { border: 1px solid var(--line); border-radius: 10px; padding: .7rem }
.text > :first-child, li > p, blockquote > p { margin-top: 0 } li > p { margin-bottom: 0 }
p, ul, ol, figure, blockquote, .table { margin: .6rem 0 } h3 { margin: 1rem 0 .4rem; font-weight: 650 }
.level1 { font-size: 1.35rem } .level2 { font-size: 1.2rem } .level3 { font-size: 1.08rem }
em { font-style: italic } strong, th, dt { font-weight: 650 } del { text-decoration: line-through }
code, pre { font: 13px/1.5 ui-monospace, monospace } code, a { unicode-bidi: isolate }
:not(pre) > code { background: var(--soft); padding: 1px 4px; border-radius: 4px }
pre { margin: 0; padding: .6rem .8rem; overflow: auto; overflow-wrap: normal }
figure, .card { border: 1px solid var(--line); border-radius: 10px; overflow: hidden }
figcaption { display: flex; justify-content: space-between; padding: 2px 4px 2px 12px;
  background: var(--soft) } .card { padding: .6rem; margin: .5rem 0 } hr { border: 0;
  border-top: 1px solid var(--line) } blockquote { border-left: 3px solid var(--line);
  padding-left: .8rem } ul, ol { padding-left: 1.6rem } .table { overflow: auto }
table { border-collapse: collapse } td, th { border: 1px solid var(--line); padding: 3px 9px;
  text-align: left; overflow-wrap: normal } a, .cite { color: var(--accent) } .host { display: inline }
.cite { padding: 0 2px; border: 0; background: none } .thought { margin: .3rem 0 }
.tokens span { border-radius: 3px; border-bottom: 2px solid transparent; cursor: help }
.tokens .p1 { border-bottom: 2px dotted var(--quiet) } .tokens .p2 { background: light-dark(
  #fdf0c8, #40370f); border-bottom: 2px dashed var(--quiet) } .tokens .p3 { background: light-dark(
  #fbd9cf, #57241a); border-bottom: 3px double } .tokens .at { outline: 2px solid var(--accent) }
#tip { position: fixed; z-index: 9; padding: .5rem .7rem; border: 1px solid var(--line);
  border-radius: 8px; background: var(--ground); box-shadow: 0 3px 14px #0003; font-size: 13px }
#tip div { display: grid; grid-template-columns: 7rem 6rem 3.5rem; gap: .5rem; align-items: center }
#tip span { overflow: hidden; white-space: pre; text-overflow: ellipsis } meter { width: 100% }
.field { margin: .7rem 0 } .field.changed > label::after { content: " · changed"; color: var(--accent) }
.field > button { float: right } .field:not(.changed) > button { display: none }
.skip:not(:focus) { position: absolute; left: -99rem } .said { position: fixed; left: -99rem }
#notice:empty { display: none } #notice { margin: 0 0 .4rem; font-size: 14px }
@media (prefers-reduced-motion: no-preference) { .busy .text::after { content: "▍";
  animation: blink 1s steps(2) infinite } } @keyframes blink { to { opacity: .2 } }
@media (max-width: 799px) { .user { margin-left: 6% } header { padding: .5rem; gap: .3rem } }
"""

BODY = r"""<a class="skip" href="#text">Skip to the message</a>
<nav id="chats" popover aria-label="Conversations"><button id="fresh">New chat</button>
<input id="find" type="search" placeholder="Search" aria-label="Search conversations">
<ul id="list"></ul><div class="row"><button id="exportAll">Export all</button>
<button id="importer">Import</button></div></nav><div id="page"><header>
<button class="narrow" popovertarget="chats" aria-label="Conversations">☰</button><h1>labs</h1>
<select id="model" name="model" form="settings" aria-label="Model"></select>
<select id="rival" name="rival" form="settings" aria-label="Second model"></select>
<button id="gear" popovertarget="panel">Settings</button></header>
<main tabindex="0" aria-label="Conversation"><div id="log" role="log" aria-live="off"></div>
<p id="hint">Ask something. Everything runs on this server, and conversations stay in this
browser.</p></main><footer><p id="notice" role="status"></p><div><textarea id="text"
aria-label="Message" placeholder="Message" autofocus></textarea><button id="send">Send</button></div>
</footer></div><section id="panel" popover aria-label="Settings"><form id="settings">
<div class="row"><strong>Settings</strong><button type="button" id="reset">Reset all</button>
<button type="button" popovertarget="panel">Close</button></div>
<div class="field"><label for="system">System message</label><textarea id="system" name="system">
</textarea></div><div class="field"><label><input type="checkbox" name="logprobs" value="5">
Probabilities</label><small>Show how likely each token was, and what else was likely.</small></div>
<div id="usual"></div><details><summary>More settings</summary><div id="rest"></div></details>
<div class="field"><label for="key">API key</label><input id="key" type="password"
autocomplete="off"><small>Kept until this tab is closed.</small></div></form></section>
<div id="tip" role="status" hidden></div><div class="said" id="said" aria-live="polite"></div>
"""

SCRIPT = r"""
const at = Object.fromEntries([...document.querySelectorAll("[id]")].map((each) => [each.id, each]));
const { chats, fresh, find, list, model, rival, log, notice, text, send, panel, settings, tip } = at;
const { key, system } = at, memory = "labs.chat.";  // memory: how names in localStorage begin
const views = new WeakMap(), live = new Set();  // how an answer is shown; answers that still grow
let chat, request, edited, context = new Map(), kinds = new Map();

// ------------------------------------------------ the server
async function call(path, options) {
  const headers = { Authorization: `Bearer ${key.value}`, "Content-Type": "application/json" };
  const response = await fetch(path, { ...options, headers }).catch((error) => {
    throw error.name === "AbortError" ? error : Error("The server does not answer; does it run?");
  });
  if (response.ok) return response;
  if (response.status === 401) { panel.showPopover(); key.focus(); }
  const { error } = await response.json().catch(() => ({}));
  throw Object.assign(Error(error?.message ?? `HTTP ${response.status}`), { code: error?.code });
}
async function start() {
  try {
    if (!kinds.size) fields((await (await call("openapi.json")).json()).components.schemas);
    const { data } = await (await call("v1/models")).json();
    context = new Map(data.filter(({ kind }) => kind === "text").map((m) => [m.id, m.context_length]));
    const options = [...context.keys()].map((name) => new Option(name));
    model.replaceChildren(...options);
    rival.replaceChildren(new Option("No second model", ""), ...options.map((o) => o.cloneNode(true)));
    fill(); say(context.size ? "" : "This server has no model that writes text.");
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
  const { messages } = sent, first = messages[0]?.role === "system" ? 1 : 0;
  for (let next = first + 1; ;)
    try {
      const body = JSON.stringify(sent);
      return await call("v1/chat/completions", { method: "POST", signal, body });
    } catch (error) {
      for (next = first + 1; next < messages.length && messages[next].role !== "user"; next++);
      if (error.code !== "context_length_exceeded" || next >= messages.length) throw error;
      messages.splice(first, next - first);
    }
}

// ------------------------------------------------ what a conversation looks like
function show() {
  log.replaceChildren();
  for (const turn of chat.turns) showTurn(turn);
}
function showTurn(turn) {
  const { role, content, page: { other } } = turn, asked = role === "user";
  if (role === "assistant") {
    const box = other ? add(log, "div", "pair") : log;
    for (const each of other ? [turn, other] : [turn]) showAnswer(box, each, turn);
    return;
  }
  const box = add(log, "article", role);
  add(box, "h2", asked ? "said" : "", asked ? "You" : "Result");
  add(box, "div", "raw", content);
  if (asked) button(add(box, "div", "actions"), "Edit", () => edit(turn));
}
function showAnswer(parent, turn, held) {  // held: the turn that the conversation goes on from
  const box = add(parent, "article", "model"), { page } = turn;
  add(box, "h2", "", page.model || "Answer");
  const thought = add(box, "details", "thought"), summary = add(thought, "summary");
  const reason = add(thought, "div", "raw"), body = add(box, "div"), more = add(box, "div");
  const figures = add(box, "small", "figures"), actions = add(box, "div", "actions");
  let mode = "", write, timer = 0, cost = 0;
  const set = (next) => {
    mode = body.className = next; body.replaceChildren();
    write = next === "text" ? writer(body, (n) => cited(turn, n, more))
      : next === "tokens" ? tokens(body) : (content) => { body.textContent = content; };
    write(turn.content, turn);
  };
  const update = () => {
    const over = !live.has(turn), first = turn.tokens ? "tokens" : "text";
    thought.hidden = !turn.reasoning_content; reason.textContent = turn.reasoning_content ?? "";
    summary.textContent = page.thought ? `Thought for ${page.thought} s` : "Thinking …";
    if (mode === "" || (!over && mode !== first)) set(first); else write(turn.content, turn);
    figures.textContent = [...page.notes ?? [], page.figures, page.problem].filter(Boolean).join(" · ");
    figures.classList.toggle("error", Boolean(page.problem)); box.classList.toggle("busy", !over);
    actions.replaceChildren(); more.replaceChildren();
    cards(more, turn, over); sources(more, turn, held);
    if (over) act(actions, turn, held, { body, mode: () => mode, set });
  };
  views.set(turn, (now) => {  // drawing takes a fifth of the time at most, however long the text
    clearTimeout(now && timer);
    if (now) update();
    else timer ||= setTimeout(() => {
      const began = performance.now();
      timer = 0; update(); cost = box.offsetHeight && performance.now() - began;
    }, Math.max(16, 4 * cost));
  });
  update();
}
function act(parent, turn, held, { body, mode, set }) {  // the buttons under a whole answer
  const views = [["Raw text", "raw"], ["Probabilities", "tokens"]];
  button(parent, "Copy", ({ target }) => copy(turn.content, target, body));
  for (const [label, name] of turn.tokens ? views : views.slice(0, 1))
    button(parent, label, () => {
      set(mode() === name ? "text" : name); parent.replaceChildren();
      act(parent, turn, held, { body, mode, set });
      [...parent.children].find((each) => each.textContent === label).focus();
    }, { "aria-pressed": mode() === name });
  if (held.page.other) button(parent, "Go on with this", () => choose(held, turn),
    { "aria-pressed": turn === held });
  else button(parent, "Retry", () => retry(turn), { title: "With the model and settings of now" });
  if (turn.page.cut && turn === chat.turns.at(-1))
    button(parent, "Continue", () => request || run([...chat.turns], turn));
}
function choose(held, turn) {
  const { other, ...page } = held.page;
  if (request || turn === held) return;
  chat.turns[chat.turns.indexOf(held)] = Object.assign(other, { page: { ...other.page,
    other: Object.assign(held, { page }) } });
  save(); show();
}
function cards(parent, turn, over) {  // calls of tools, and fields for their results
  const { tool_calls: calls, page } = turn, last = over && turn === chat.turns.at(-1);
  for (const { id, function: { name, arguments: given } } of calls ?? []) {
    const box = add(parent, "section", "card"), results = page.results ??= {};
    let pretty = given;
    try { pretty = JSON.stringify(JSON.parse(given), null, 2); } catch { /* it is not whole yet */ }
    add(box, "strong", "", `Call of ${name}`); add(box, "pre", "", pretty).tabIndex = 0;
    if (!last) continue;
    const input = add(box, "textarea"); input.value = results[id] ?? "";
    input.setAttribute("aria-label", input.placeholder = `Result of ${name}`);
    input.oninput = () => { results[id] = input.value; };
  }
  if (last && calls) button(parent, "Go on with the results", () => {
    if (request) return;
    const before = [...chat.turns];
    for (const { id } of calls) chat.turns.push(
      { role: "tool", content: page.results[id] ?? "", tool_call_id: id, page: {} });
    show(); run(before);
  });
}
function sources(parent, { page }, held) {  // the passages that [n] cites
  for (const { n, path, heading } of page.documents ?? []) {
    const box = add(parent, "details", "thought"), where = [path, heading].filter(Boolean);
    add(box, "summary", "", `[${n}] ${where.join(" › ")}`);
    const shown = add(box, "div", "raw", "…");
    box.ontoggle = async () => {  // /explain shows the prompt, and in it the passages
      const messages = messagesOf(chat, chat.turns.slice(0, chat.turns.indexOf(held)));
      const body = JSON.stringify({ messages, model: page.model || null, documents: true });
      try {
        const response = await call("explain", { method: "POST", body });
        const lines = (await response.json()).prompt.split("\n"), first = lines.lastIndexOf(`[${n}]`) + 2;
        const end = lines.findIndex((line, i) => i >= first && !line.startsWith("> "));
        shown.textContent = lines.slice(first, end).map((line) => line.slice(2)).join("\n");
      } catch (error) { shown.textContent = error.message; }
    };
  }
}
function cited({ page }, n, parent) {  // what a click on [n] does, if there is such a passage
  const place = (page.documents ?? []).findIndex((each) => `${each.n}` === n);
  return place < 0 ? null : () => {
    const box = parent.querySelectorAll("details")[place];
    box.open = true; box.firstChild.focus(); box.scrollIntoView({ block: "nearest" });
  };
}
function spell({ bytes, token }) {  // a token may end inside a character
  try { return new TextDecoder("utf-8", { fatal: true }).decode(Uint8Array.from(bytes)) || token; }
  catch { return `‹${bytes.map((byte) => byte.toString(16).padStart(2, "0")).join(" ")}›`; }
}
function tokens(parent) {  // returns a function that shows the tokens so far
  const box = add(parent, "div"), index = (node) => [...box.children].indexOf(node);
  let found = [], here = 0;
  const hide = () => { tip.hidden = true; box.children[here]?.classList.remove("at"); };
  const tell = (next) => {
    hide(); here = Math.max(0, Math.min(next, found.length - 1));
    if (found[here]) rivals(box.children[here], found[here]);
  };
  box.tabIndex = 0; box.setAttribute("role", "group");
  box.setAttribute("aria-label", "Tokens of the answer; the arrow keys tell of each");
  box.onpointerover = box.onclick = ({ target }) => target !== box && tell(index(target));
  box.onfocus = () => tell(here); box.onpointerleave = box.onblur = hide;
  box.onkeydown = (event) => {
    const step = { ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1 }[event.key];
    if (step) { event.preventDefault(); tell(here + step); } else if (event.key === "Escape") hide();
  };
  return (_, turn) => {
    for (const each of (turn.tokens ?? []).slice(found.length)) {
      const level = [.9, .5, .2].filter((share) => Math.exp(each.logprob) < share).length;
      add(box, "span", `p${level}`, spell(each));
    }
    found = [...turn.tokens ?? []];
  };
}
function rivals(span, one) {  // what else the model thought of at this place, with bars
  span.classList.add("at"); tip.replaceChildren(); tip.hidden = false;
  for (const each of [one, ...one.top_logprobs.filter(({ token }) => token !== one.token)]) {
    const row = add(tip, "div"), share = Math.exp(each.logprob);
    add(row, each === one ? "strong" : "span", "", JSON.stringify(spell(each)).slice(1, -1));
    Object.assign(add(row, "meter"), { value: share, ariaLabel: "Probability" });
    add(row, "span", "", `${(100 * share).toFixed(1)} %`);
  }
  const { left, bottom, top } = span.getBoundingClientRect(), { offsetWidth, offsetHeight } = tip;
  tip.style.top = `${bottom + offsetHeight < innerHeight ? bottom : top - offsetHeight}px`;
  tip.style.left = `${Math.max(0, Math.min(left, innerWidth - offsetWidth))}px`;
}

// ------------------------------------------------ answers
async function run(before, continued) {  // before: the turns to return to if no answer comes
  const owner = chat, messages = messagesOf(owner, owner.turns.slice(owner.skip));
  const names = new Set(continued ? [continued.page.model] : [model.value, rival.value || model.value]);
  const turns = continued ? [continued] : [...names].map((name) =>
    ({ role: "assistant", content: "", page: { model: name } }));
  const mine = request = new AbortController(), [first, second] = turns;
  for (const each of turns) live.add(each);
  if (second) first.page.other = second;
  if (continued) views.get(first)(true); else { owner.turns.push(first); showTurn(first); }
  send.textContent = "Stop"; save(owner);
  const wrong = await Promise.all(turns.map((turn) =>
    stream(owner, turn, { messages: [...messages], signal: mine.signal, goesOn: continued })));
  if (request === mine) { request = null; send.textContent = "Send"; }
  const said = turns.some(({ content, tool_calls, reasoning_content }, i) =>
    content || tool_calls || reasoning_content || !wrong[i]), place = owner.turns.indexOf(first);
  if (!said && place >= 0)  // the question returns to its field, or stays if that shows another's
    if (chat === owner) owner.turns = before; else owner.turns.splice(place, 1);
  else owner.skip = (owner.skip ?? 0) + (first.page.dropped ?? 0);
  save(owner);
  if (chat !== owner) return true;
  if (second || !said) show(); else views.get(first)(true);
  at.said.textContent = first.content.slice(0, 2000);  // read out once, and not token by token
  if (!said) say(wrong[0]); else warn(first.page);
  return said;
}
async function stream(owner, turn, { messages, signal, goesOn }) {  // returns what went wrong
  const { page } = turn, began = performance.now(), whole = messages.length, sent = { messages };
  const clock = { pieces: 0, seconds: () => (performance.now() - began) / 1000 };
  if (page.model) sent.model = page.model;  // none until the list of models has arrived
  if (goesOn) Object.assign(sent, { continue_final_message: true, add_generation_prompt: false });
  Object.assign(page, { notes: [], problem: "", cut: false });
  let problem = "The connection was lost";
  try {
    if (!kinds.size) await start();
    const response = await fitting(Object.assign(bodyOf(owner), sent), signal);
    page.dropped = whole - messages.length;
    if (page.dropped) page.notes.push(`The oldest ${page.dropped} messages did not fit and were left out`);
    for await (const data of events(response)) {
      if (data === "[DONE]") { problem = ""; break; }
      gather(turn, JSON.parse(data), clock); views.get(turn)();
    }
  } catch (error) { problem = signal.aborted ? "Stopped" : error.message; }
  live.delete(turn);
  return page.problem = problem;
}
function gather(turn, { error, choices: [choice] = [], usage, documents }, clock) {
  const { page } = turn, { content, tool_calls: calls, ...rest } = choice?.delta ?? {};
  const thought = rest.reasoning_content ?? rest.reasoning, now = clock.seconds();
  if (error) throw Error(error.message);
  if (documents) page.documents = documents;
  if (thought) turn.reasoning_content = (turn.reasoning_content ?? "") + thought;
  if ((content || calls) && turn.reasoning_content) page.thought ??= now.toFixed(1);
  if (content) turn.content += content;
  for (const { index = 0, id, function: { name, arguments: more } } of calls ?? []) {
    const call = (turn.tool_calls ??= [])[index] ??= { id, type: "function", function: { name, arguments: "" } };
    call.function.arguments += more ?? "";
  }
  if (choice?.logprobs) (turn.tokens ??= []).push(...choice.logprobs.content);
  if (choice?.finish_reason === "length") {
    page.cut = true; page.notes.push("The answer reached its token limit");
  } else if (choice?.finish_reason === "content_filter") page.notes.push("A filter ended the answer");
  if (content || thought || calls) { clock.pieces++; clock.first ??= now; }
  const count = usage?.completion_tokens ?? clock.pieces, speed = (count - 1) / (now - clock.first);
  const cached = usage?.prompt_tokens_details?.cached_tokens, limit = context.get(page.model);
  if (usage && limit) page.full = usage.total_tokens / limit;
  page.figures = [clock.first && `first token ${clock.first.toFixed(2)} s`,
    speed > 0 && isFinite(speed) && `${usage ? "" : "about "}${speed.toFixed(1)} tokens/s`,
    usage && `${count} tokens`, cached && `${cached} cached`, usage?.response_cached && "stored answer",
    usage && limit && `context ${usage.total_tokens} of ${limit}`].filter(Boolean).join(" · ");
}
function warn({ full }) {
  if (full > .8) say(`This conversation fills ${Math.round(100 * full)} % of the model's context. ` +
    "When it is full, the oldest messages are left out.");
}
async function ask() {
  const content = text.value, before = [...chat.turns];
  if (request || !content.trim() || !valid()) return;
  say("");
  if (edited) drop(edited);
  const turn = { role: "user", content, page: {} };
  chat.turns.push(turn); showTurn(turn); text.value = ""; edited = null;
  if (!await run(before)) text.value ||= content;
}
function drop(turn) {  // leaves out a turn and what came after it
  const owner = chat, before = owner.turns;
  Object.assign(owner, { turns: before.slice(0, before.indexOf(turn)), skip: 0 }); show();
  say("What was there before is left out.", "Undo", () => {
    owner.turns = before; open(owner); save(owner);
  });
}
function edit(turn) {
  [edited, text.value] = [turn, turn.content]; text.focus();
  say("Sending replaces this message and all that follows it.", "Cancel", () => {
    [edited, text.value] = [null, ""]; text.focus();
  });
}
function retry(turn) {
  const before = [...chat.turns];
  if (!request && valid()) { drop(turn); run(before); }
}

// ------------------------------------------------ keys and buttons
text.onkeydown = (event) =>  // false: Enter adds no line break
  event.key !== "Enter" || event.shiftKey || event.isComposing || !ask();
send.onclick = () => { if (request) request.abort(); else ask(); };
document.onkeydown = ({ key: pressed }) => {
  if (pressed === "Escape" && tip.hidden && !document.querySelector(":popover-open")) request?.abort();
};
fresh.onclick = () => { say(""); open(empty()); };
find.oninput = showList; at.exportAll.onclick = () => download(stored());
at.importer.onclick = () => {
  const input = Object.assign(document.createElement("input"), { type: "file", accept: ".jsonl" });
  input.onchange = () => take(input.files[0]); input.click();
};
settings.onsubmit = () => false; settings.oninput = changed;
settings.onchange = model.onchange = rival.onchange = ({ target }) => {
  if (target === model || target === rival) chat.settings[target.name] = target.value;
  chat.skip = 0; if (chat.turns.length && !request) save();
};
at.reset.onclick = () => {
  for (const input of inputs()) if (input.closest(".field"))
    if (input.type === "checkbox") input.checked = false; else input.value = "";
  changed();
};
key.onchange = () => { session("key", key.value); start(); };
addEventListener("pagehide", () => { if (request) save(); });
addEventListener("storage", ({ key: name, newValue }) => {
  const there = name === memory + chat.id && newValue && !request && read(name);
  if (there) { chat = there; fill(); show(); }
  showList();
});
key.value = session("key") ?? "";
chat = empty(); open(read(memory + session("chat")) ?? chat); start();
"""

PAGE = f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>labs</title>
<meta name="viewport" content="width=device-width"><link rel="icon" href="data:,">
<style>{STYLE}</style>{BODY}<script>{labs_markup.SCRIPT}{labs_kept.SCRIPT}{SCRIPT}</script>
"""
