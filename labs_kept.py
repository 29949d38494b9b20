# SPDX-License-Identifier: Apache-2.0
"""The part of the chat page's script that holds its settings and its conversations."""

SCRIPT = r"""
// ---------------- settings: fields made from /openapi.json
const USUAL = ["max_new_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty",
  "frequency_penalty", "presence_penalty", "stop", "seed", "tools", "documents"];
const SENT = { max_new_tokens: "max_tokens", min_new_tokens: "min_tokens",
  template_options: "chat_template_kwargs" };  // OpenAI's names of some of labs' settings
const HELD = ["model", "messages", "add_generation_prompt", "continue_final_message",
  "tool_choice"];  // not settings of a conversation here
function fields({ GenerateRequest: { properties }, ChatRequest: { properties: taken } }) {
  const names = Object.keys(properties).filter((name) =>
    Object.hasOwn(taken, SENT[name] ?? name) && !HELD.includes(name));
  known.add("logprobs");  // of the switch
  for (const name of [...USUAL.filter((each) => names.includes(each)), ...names])
    if (!known.has(name)) field(USUAL.includes(name) ? at.usual : at.rest, name, properties[name]);
}
function field(parent, name, schema) {
  const kind = schema.anyOf?.find(({ type }) => type !== "null") ?? schema, id = `of-${name}`;
  const most = Math.min(kind.maximum, Number.MAX_SAFE_INTEGER), number = most >= 0;
  const choices = kind.enum ?? (kind.type === "boolean" && [true, false]);
  const standard = JSON.stringify(schema.default ?? null), box = add(parent, "div.field");
  add(box, "label", name, { htmlFor: id });
  const reset = () => { input.value = ""; input.focus(); settings.onchange({}); };
  button(box, "Reset", reset, { ariaLabel: `Reset ${name}` });
  const input = add(box, choices ? "select" : number ? "input" : "textarea", "", { id, name });
  if (choices) input.append(new Option("default", ""), ...choices.map((each) =>
    new Option(each, JSON.stringify(each))));
  else input.placeholder = number ? "default" : "JSON";
  if (number) Object.assign(input, { type: "number", min: kind.minimum, max: most,
    step: kind.type === "integer" ? 1 : "any" });
  const about = [schema.description, number && `From ${kind.minimum} to ${most}.`,
    standard !== "null" && `Default: ${standard}.`].filter(Boolean).join(" ");
  add(add(box, "small", `${about} `, { id: `about-${name}` }), "span.error");
  input.setAttribute("aria-describedby", `about-${name}`);
  known.add(name);
}
function valueOf(name, given) {  // undefined if it cannot be read
  try { return JSON.parse(given); } catch { return name === "stop" ? [given] : undefined; }
}
function fault({ type, name, value, validity, step, min, max }) {  // one sentence, or ""
  const number = step === "1" ? "whole number" : "number";
  if (type === "number") return validity.valid ? "" : `Give a ${number} from ${min} to ${max}.`;
  const wrong = known.has(name) && value && valueOf(name, value) === undefined;
  return wrong ? "This is not JSON." : "";
}
const inputs = () => [...settings.elements].filter(({ name }) => name);
const given = (input) => input.type === "checkbox" && !input.checked ? "" : input.value;
function valid() {  // whether all settings are; else the first bad one is shown
  const bad = inputs().find(fault);
  if (bad) { panel.togglePopover(true); at.more.open ||= at.more.contains(bad); bad.focus(); }
  return !bad;
}
function changed(keep) {  // marks what differs from the default, and what is wrong
  let count = 0;
  for (const input of inputs()) {
    const box = input.closest(".field"), why = fault(input), differs = why || given(input);
    box.classList.toggle("changed", differs); count += differs ? 1 : 0;
    if (keep && !why) chat.settings[input.name] = given(input);
    const told = box.querySelector(".error");
    if (told) told.textContent = why;
  }
  at.gear.textContent = `Settings${count ? ` (${count})` : ""}`;
  at.gear.title = count ? `${count} changed` : "";
}
function fill(values = chat.settings) {  // shows the settings of the conversation
  for (const input of inputs()) {
    const value = Object.hasOwn(values, input.name) ? values[input.name] : "";
    if (input.type === "checkbox") input.checked = value;
    else if (input !== rival || context.has(value)) input.value = value;
    else input.selectedIndex = 0;
  }
  if (context.has(values.model)) model.value = values.model;
  changed();
}
function valuesOf(owner) {  // by labs' own names
  const names = [...known].filter((name) => owner.settings[name]);
  return Object.fromEntries(names.map((name) => [name, valueOf(name, owner.settings[name])]));
}
function bodyOf(owner) {  // by OpenAI's names
  const { logprobs, ...values } = valuesOf(owner), body = { stream: true };
  for (const name of Object.keys(values)) body[SENT[name] ?? name] = values[name];
  if (logprobs) Object.assign(body, { logprobs: true, top_logprobs: logprobs });
  return { ...body, stream_options: { include_usage: true } };
}

// ---------------- conversations: one key of localStorage each
const draw = () => `${Date.now()}${Math.random()}`;
const empty = () => ({ id: draw(), name: "", turns: [], settings: { ...chat?.settings } });
const textsOf = (found) =>  // what else is there may be of any type
  Object.fromEntries(Object.entries(found ?? {}).filter(([, each]) => typeof each === "string"));
function turnOf({ role, content, reasoning_content, tool_calls, tool_call_id, page }) {
  const turn = { role, content: content ?? "", page: { ...page } };  // with nothing unknown
  const { model, figures, problem, thought, notes, documents } = turn.page;
  const texts = [turn.content, reasoning_content, tool_call_id, model, figures, problem, thought];
  const wrong = texts.some((each) => typeof (each ?? "") !== "string");
  if (wrong || !["user", "assistant", "tool"].includes(role)) throw Error("no turn");
  turn.page.results = textsOf(turn.page.results);
  turn.page.notes = notes?.map(String);
  turn.page.documents = documents?.map(({ n, path, heading }) =>
    ({ n: +n, path: `${path}`, heading: heading && `${heading}` }));
  if (page?.other) turn.page.other = turnOf(page.other);
  if (reasoning_content) turn.reasoning_content = reasoning_content;
  if (tool_calls) turn.tool_calls = tool_calls.map(({ id, function: { name, arguments: more } }) =>
    ({ id: `${id}`, type: "function", function: { name: `${name}`, arguments: `${more}` } }));
  if (tool_call_id) turn.tool_call_id = tool_call_id;
  return turn;
}
function session(name, value) {  // kept until the tab is closed, if the browser allows it
  try {
    if (value !== undefined) sessionStorage.setItem(name, value);
    return sessionStorage.getItem(name);
  } catch { return null; }
}
function parsed(written) {  // a conversation, or null if it cannot be read
  try {
    const found = JSON.parse(written), turns = found.turns.map(turnOf);
    return { ...found, name: `${found.name}`, turns, settings: textsOf(found.settings) };
  } catch { return null; }
}
function read(name) {  // a stored conversation, or null
  try { return parsed(localStorage.getItem(name)); } catch { return null; }
}
function stored() {  // all conversations, the newest first; the open one need not be stored
  let names = [];
  try { names = Object.keys(localStorage).filter((name) => name.startsWith(memory)); } catch {}
  const found = names.map(read).filter(Boolean).sort((a, b) => b.at - a.at);
  const all = found.map((each) => each.id === chat.id ? chat : each);
  return !chat.name || all.includes(chat) ? all : [chat, ...all];
}
function save(owner = chat) {
  if (!store(owner))
    say("This browser stores nothing more. Export this conversation, or delete others.");
  showList();
}
function store(owner) {  // whether it is kept
  if (owner.gone) return true;  // it was deleted amid an answer
  owner.name ||= [...(owner.turns[0]?.content ?? "").trim()].slice(0, 60).join("");
  const there = read(memory + owner.id);
  if (there && there.version !== owner.version) {
    Object.assign(owner, { id: draw(), name: `${owner.name} (copy)` });
    if (owner === chat) session("chat", owner.id);
    say("Another tab changed this conversation too. Both versions are kept.");
  }
  const next = { ...owner, after: owner.version, version: draw(), at: Date.now() };
  const written = JSON.stringify(next, (name, value) => name === "tokens" ? undefined : value);
  try {
    if (owner.turns.length) localStorage.setItem(memory + owner.id, written);
    else { owner.name = ""; localStorage.removeItem(memory + owner.id); }
    ours.add(owner.version = next.version);
    return true;
  } catch { return false; }
}
function met(name, written) {  // another tab changed something
  const there = name === memory + chat.id && read(name), mine = chat.version;
  // Tabs see each other's writes late, so two may write at once, and the later write replaces the
  // earlier one. The tab that loses its write is told here, and keeps it as a copy.
  if (there && there.version !== mine)
    if (ours.has(mine) && parsed(written)?.after !== mine) save();
    else if (!request) { chat = there; fill(); show(); }
  showList();
}
function showList() {
  const sought = find.value.toLowerCase();
  list.replaceChildren();
  for (const each of stored()) {
    const texts = [each.name, ...each.turns.map(({ content }) => content)];
    if (!texts.some((text) => text.toLowerCase().includes(sought))) continue;
    const row = add(list, "li"), mine = each === chat;
    const shown = button(row, each.name, () => open(each), { ariaCurrent: mine });
    const more = mine && add(row, "div.actions");
    if (more) for (const [label, action] of [["Rename", () => rename(shown)], ["Delete", remove],
      ["Export", () => download([chat])]]) button(more, label, action);
  }
  if (!list.firstChild) add(list, "li.quiet", sought ? "Nothing found" : "No conversations yet");
}
function rename(shown) {
  const input = add(shown.parentElement, "input", "", { value: chat.name, ariaLabel: "Name" });
  shown.replaceWith(input); input.select();
  input.onkeydown = ({ key: pressed, isComposing }) => {
    if (pressed === "Escape") input.value = chat.name;
    if (["Enter", "Escape"].includes(pressed) && !isComposing) input.blur();
  };
  input.onblur = () => { chat.name = input.value.trim() || chat.name; save(); };
}
function remove() {
  const gone = chat;
  gone.gone = true;
  try { localStorage.removeItem(memory + gone.id); } catch {}  // it was never stored
  open(empty());
  say("The conversation was deleted.", "Undo", () => {
    gone.gone = false; save(gone); open(gone);
  });
}
function open(next) {
  request?.abort(); say(""); [chat, edited] = [next, null]; session("chat", chat.id);
  fill(); show(); showList(); chats.togglePopover(false); text.focus();
}
function messagesOf({ settings: { system: content } }, turns) {
  const first = content ? [{ role: "system", content }] : [];
  return [...first, ...turns.map(({ page, tokens, ...message }) => message)];
}
function download(conversations) {  // lines that labs-gen batch reads
  const lines = conversations.map((each) => JSON.stringify({
    id: `${each.name} #${each.id}`, messages: messagesOf(each, each.turns), ...valuesOf(each) }));
  const href = URL.createObjectURL(new Blob([lines.join("\n"), "\n"]));
  add(document.body, "a", "", { href, download: "conversations.jsonl", hidden: true }).click();
}
async function take(file) {  // reads such lines again
  const wrong = [];
  let count = 0, full = "";
  for (const [i, line] of (await file.text()).split("\n").entries()) if (line.trim())
    try {
      const { id = file.name, messages, ...values } = JSON.parse(line), made = empty();
      const system = messages[0].role === "system" ? messages.shift().content : "";
      if (typeof system !== "string") throw Error("no text");
      Object.assign(made, { name: `${id}`.replace(/ #[\d.]+$/, ""), settings: { system },
        turns: messages.map(({ page, ...each }) => turnOf(each)) });
      for (const name of known)
        if (name in values) made.settings[name] = JSON.stringify(values[name]);
      if (store(made)) count++; else full = " This browser stores nothing more.";
    } catch { wrong.push(i + 1); }
  const lines = `${wrong.slice(0, 9)}${wrong[9] ? " …" : ""}`;
  showList();
  say(`Conversations imported: ${count}.${lines && ` Lines without one: ${lines}.`}${full}`);
}
"""
