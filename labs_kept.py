# SPDX-License-Identifier: Apache-2.0
"""The part of the chat page's script that holds its settings and conversations."""

SCRIPT = r"""
// ------------------------------------------------ settings: fields made from /openapi.json
const USUAL = ["max_new_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty",
  "frequency_penalty", "presence_penalty", "stop", "seed", "thinking_budget", "tools"];
const SENT = { max_new_tokens: "max_tokens", min_new_tokens: "min_tokens",
  template_options: "chat_template_kwargs" };  // OpenAI's names of some of labs' settings
const HELD = ["model", "messages", "logprobs", "add_generation_prompt", "continue_final_message",
  "tool_choice"];  // the page itself sets these
function fields({ GenerateRequest: { properties }, ChatRequest }) {
  const known = Object.keys(properties).filter((name) => !HELD.includes(name));
  const names = known.filter((name) => Object.hasOwn(ChatRequest.properties, SENT[name] ?? name));
  kinds.set("logprobs", { type: "integer" });
  for (const name of USUAL.filter((each) => names.includes(each))) field(at.usual, name, properties[name]);
  for (const name of names) if (!kinds.has(name)) field(at.rest, name, properties[name]);
}
function field(parent, name, schema) {
  const kind = schema.anyOf?.find(({ type }) => type !== "null") ?? schema;
  const choices = kind.enum ?? (kind.type === "boolean" ? [true, false] : null);
  const number = ["number", "integer"].includes(kind.type), box = add(parent, "div", "field");
  const label = Object.assign(add(box, "label", "", name), { htmlFor: `of-${name}` });
  const reset = { "aria-label": `Reset ${name}` };
  button(box, "Reset", () => { input.value = ""; changed(); input.focus(); }, reset);
  const input = add(box, choices ? "select" : number ? "input" : "textarea");
  if (choices) input.append(new Option("default", ""), ...choices.map((each) =>
    new Option(each === true ? "yes" : each === false ? "no" : each, JSON.stringify(each))));
  const most = Math.min(kind.maximum ?? Infinity, Number.MAX_SAFE_INTEGER);
  if (number) Object.assign(input, { type: "number", min: kind.minimum ?? "", max: most,
    step: kind.type === "integer" ? 1 : "any", title: label.textContent });
  const usual = schema.default ?? null, described = add(box, "small", "", schema.description ?? "");
  const shown = usual === null ? "" : JSON.stringify(usual);
  input.placeholder = number ? shown || "default" : kind.type === "array" ? "[ ], a JSON list" : "JSON";
  if (number) described.append(` From ${kind.minimum} to ${most}.`);
  if (shown.length > 2) described.append(` Default: ${shown}.`);
  add(box, "small", "error").id = `why-${name}`; described.id = `about-${name}`;
  input.setAttribute("aria-describedby", `about-${name} why-${name}`);
  kinds.set(name, kind); input.name = name; input.id = `of-${name}`;
}
function valueOf(name, entered) {  // a stop text needs no quotes
  try { return JSON.parse(entered); } catch { if (name === "stop") return [entered]; throw Error(); }
}
function fault(input) {  // one sentence, or ""
  const { type, minimum, maximum } = kinds.get(input.name) ?? {};
  if (!type && !kinds.has(input.name)) return "";
  if (input.type === "number") return input.validity.valid ? "" : `${input.name} has to be a ` +
    `${type === "integer" ? "whole " : ""}number from ${minimum} to ${Math.min(maximum, input.max)}.`;
  try { if (input.value) valueOf(input.name, input.value); return ""; }
  catch { return `${input.name} has to be JSON.`; }
}
const inputs = () => [...settings.elements].filter(({ name }) => name);
const entered = (input) => input.type === "checkbox" && !input.checked ? "" : input.value;
function valid() {  // whether all settings are; else the first bad one is shown
  const bad = inputs().find(fault);
  if (bad) { panel.showPopover(); bad.closest("details")?.setAttribute("open", ""); bad.focus(); }
  return !bad;
}
function changed() {  // marks what differs from the default, and what is wrong
  let count = 0;
  for (const input of inputs()) {
    const box = input.closest(".field"), why = fault(input), differs = entered(input) !== "";
    if (box) { box.classList.toggle("changed", differs || why !== ""); count += differs; }
    if (at[`why-${input.name}`] ??= document.getElementById(`why-${input.name}`))
      at[`why-${input.name}`].textContent = why;
    if (box && !why) chat.settings[input.name] = entered(input);
  }
  at.gear.textContent = count ? `Settings · ${count} changed` : "Settings";
}
function fill() {  // shows the settings of the conversation
  for (const input of inputs()) {
    const value = Object.hasOwn(chat.settings, input.name) ? chat.settings[input.name] : "";
    if (input.type === "checkbox") input.checked = value !== "";
    else if (input !== model || context.has(value)) input.value = value;
    if (input === rival && !context.has(value)) input.value = "";
  }
  changed();
}
function valuesOf({ settings: given }) {  // by labs' own names
  const names = [...kinds.keys()].filter((name) => Object.hasOwn(given, name) && given[name]);
  return Object.fromEntries(names.map((name) => [name, valueOf(name, given[name])]));
}
function bodyOf(owner) {  // by OpenAI's names
  const { logprobs, ...values } = valuesOf(owner), body = { stream: true };
  for (const [name, value] of Object.entries(values)) body[SENT[name] ?? name] = value;
  if (logprobs) Object.assign(body, { logprobs: true, top_logprobs: logprobs });
  return Object.assign(body, { stream_options: { include_usage: true } });
}

// ------------------------------------------------ conversations: one key of localStorage each
const draw = () => Date.now().toString(36) + Math.random().toString(36).slice(2);
const empty = () => ({ id: draw(), name: "", turns: [], settings: { ...chat?.settings } });
const isText = (value) => typeof value === "string";
function turnOf(given) {  // a turn of a file or of the storage, with nothing unknown; or an error
  const { role, content, reasoning_content, tool_calls, tool_call_id, page } = Object(given);
  const calls = tool_calls?.map(({ id, function: { name, arguments: more } }) =>
    ({ id, type: "function", function: { name: `${name}`, arguments: `${more}` } }));
  if (!["user", "assistant", "tool"].includes(role) || !isText(content ?? "")) throw Error("no turn");
  const turn = { role, content: content ?? "", page: page ? { ...page } : {} };
  if (page?.other) turn.page.other = turnOf(page.other);
  if (isText(reasoning_content)) turn.reasoning_content = reasoning_content;
  if (calls?.length) turn.tool_calls = calls;
  return isText(tool_call_id) ? { ...turn, tool_call_id } : turn;
}
function session(name, value) {  // kept until the tab is closed, if the browser allows it
  try {
    if (value !== undefined) sessionStorage.setItem(name, value);
    return sessionStorage.getItem(name);
  } catch { return null; }
}
function read(name) {  // a stored conversation, or null if it cannot be read
  try {
    const { turns, settings: given, ...rest } = JSON.parse(localStorage.getItem(name));
    return { ...rest, id: name.slice(memory.length), turns: turns.map(turnOf), settings: { ...given } };
  } catch { return null; }
}
function save(owner = chat) {
  owner.name ||= [...(owner.turns[0]?.content ?? "").trim()].slice(0, 60).join("");
  if (!owner.turns.length && !owner.name) return;
  try {
    const there = read(memory + owner.id);
    if (there && there.version !== owner.version) {
      Object.assign(owner, { id: draw(), name: `${owner.name} (copy)` });
      say("Another tab changed this conversation too. Both versions are kept.");
    }
    Object.assign(owner, { version: draw(), at: Date.now() });
    const without = (name, value) => name === "tokens" ? undefined : value;  // these are large
    localStorage.setItem(memory + owner.id, JSON.stringify(owner, without));
  } catch { say("This browser stores nothing more: export this conversation, or delete others."); }
  showList();
}
function stored() {
  try {
    const names = Object.keys(localStorage).filter((name) => name.startsWith(memory));
    return names.map(read).filter(Boolean).sort((a, b) => b.at - a.at);
  } catch { return []; }
}
function showList() {
  const sought = find.value.toLowerCase(), all = stored();
  if (!all.some(({ id }) => id === chat.id) && chat.turns.length) all.unshift(chat);
  list.replaceChildren();
  for (const each of all) if (!sought || JSON.stringify([each.name, each.turns.map((turn) =>
    turn.content)]).toLowerCase().includes(sought)) {
    const row = add(list, "li"), open_ = button(row, each.name || "Untitled", () => open(each));
    if (each.id !== chat.id) continue;
    open_.setAttribute("aria-current", "true");
    const more = add(row, "div", "actions");
    button(more, "Rename", () => rename(open_)); button(more, "Delete", remove);
    button(more, "Export", () => download([chat]));
  }
  if (!list.children.length) add(list, "li", "quiet", sought ? "Nothing found" : "No conversations yet");
}
function rename(shown) {
  const input = Object.assign(add(shown.parentElement, "input"), { value: chat.name, maxLength: 200 });
  shown.replaceWith(input); input.setAttribute("aria-label", "Name"); input.select();
  input.onkeydown = ({ key: pressed, isComposing }) => {
    if (pressed === "Escape") input.value = chat.name;
    if (["Enter", "Escape"].includes(pressed) && !isComposing) input.blur();
  };
  input.onblur = () => { chat.name = input.value.trim() || chat.name; save(); };
}
function remove() {
  const gone = chat;
  try { localStorage.removeItem(memory + gone.id); } catch { /* it was never stored */ }
  open(empty());
  say("The conversation was deleted.", "Undo", () => { save(gone); open(gone); });
}
function open(next) {
  request?.abort(); [chat, edited] = [next, null];
  session("chat", chat.id);
  fill(); show(); showList(); text.focus();
  if (chats.matches(":popover-open")) chats.hidePopover();
}
function download(conversations) {  // lines that labs-gen batch reads
  const lines = conversations.map((each) => JSON.stringify({
    id: `${each.name} #${each.id}`, messages: messagesOf(each, each.turns), ...valuesOf(each) }));
  const url = URL.createObjectURL(new Blob([lines.join("\n"), "\n"], { type: "application/jsonl" }));
  Object.assign(document.createElement("a"), { href: url, download: "conversations.jsonl" }).click();
  setTimeout(() => URL.revokeObjectURL(url), 60000);
}
async function take(file) {
  const wrong = [];
  let count = 0;
  for (const [i, line] of (await file.text()).split("\n").entries()) if (line.trim())
    try {
      const { id, messages, ...given } = JSON.parse(line), made = { ...empty(), settings: {} };
      const [first, ...rest] = messages, held = first.role === "system";
      made.name = `${id ?? file.name}`.replace(/ #\w+$/, "");
      for (const name of kinds.keys()) if (Object.hasOwn(given, name) && given[name] !== null)
        made.settings[name] = JSON.stringify(given[name]);
      if (held) made.settings.system = first.content;
      made.turns = (held ? rest : messages).map((each) => turnOf({ ...each, page: null }));
      save(made); count++;
    } catch { wrong.push(i + 1); }
  say(`${count} conversations were imported.${wrong.length ? ` These lines hold none: ${wrong}.` : ""}`);
}
function messagesOf(owner, turns) {
  const first = owner.settings.system ? [{ role: "system", content: owner.settings.system }] : [];
  return [...first, ...turns.map(({ page, tokens, ...message }) => message)];
}
"""
