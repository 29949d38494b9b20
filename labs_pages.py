# SPDX-License-Identifier: Apache-2.0
"""The chat page: one text without outside requests. labs_site.py serves it."""

PAGE = r"""<!doctype html><html lang="en"><meta charset="utf-8"><title>labs</title>
<meta name="viewport" content="width=device-width"><link rel="icon" href="data:,"><style>
:root { color-scheme: light dark; background: light-dark(#faf9f6, #16181c) }
* { box-sizing: border-box; font: inherit } h1 { flex: 1; margin: 0; font-weight: 650 }
body { display: flex; flex-direction: column; height: 100dvh; margin: 0; font: 16px/1.6 system-ui }
body > :not(main), #log { width: min(100%, 46rem); margin: 0 auto auto; padding: .5rem 1rem }
main { flex: 1; overflow: auto; display: flex; flex-direction: column-reverse } /* stay at end */
header, footer { display: flex; align-items: center; gap: .6rem } select { min-width: 0 }
form { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.6rem, 1fr)); gap: .6rem }
input, select, textarea, button { padding: 6px 11px; border: 1px solid #8886; border-radius: 9px }
input, textarea { width: 100%; max-height: 30dvh; resize: none; field-sizing: content }
article { margin: 1rem 0; white-space: pre-wrap; overflow-wrap: anywhere } button { flex: none }
.user { margin-left: 15%; padding: .5rem .9rem; border-radius: 1rem; background: #4f83e82b }
small { display: block; font-size: 14px; opacity: .8 } .error { color: light-dark(#b22, #f99) }
#send { background: #2b5fc7; color: #fff } .model:empty::after { content: "…" }
</style><header><h1>labs</h1><select id="model" aria-label="Model"></select>
<button id="fresh">New chat</button></header><details id="panel">
<summary>Settings <span id="notice" class="error" role="status"></span></summary>
<form id="settings"><label>System message<textarea name="system"></textarea></label>
<label>max_tokens<input type="number"></label><label>top_p<input type="number" step="any"></label>
<label>temperature<input type="number" step="any"></label><label>seed<input type="number"></label>
<label>API key<input name="key" type="password" autocomplete="off"></label></form></details>
<main><div id="log" role="log"></div></main><footer><textarea id="text" aria-label="Message"
autofocus></textarea><button id="send">Send</button></footer><script>
const [model, fresh, panel, notice, settings, log, text, send] = document.querySelectorAll("[id]");
const { key, system } = settings.elements; let turns = [], request;
const add = (parent, tag, className, textContent) =>  // textContent: markup is shown as text
  parent.appendChild(Object.assign(document.createElement(tag), { className, textContent }));
async function call(path, options) {
  const headers = { Authorization: `Bearer ${key.value}`, "Content-Type": "application/json" };
  const response = await fetch(path, { ...options, headers });
  if (response.ok) return response;
  panel.open ||= response.status === 401;
  const { error } = await response.json().catch(() => 0);
  throw Object.assign(Error(error?.message ?? `HTTP ${response.status}`), { code: error?.code });
}
const list = () => call("v1/models").then((response) => response.json()).then(({ data }) => {
  const chats = data.filter(({ kind }) => kind === "text");
  model.replaceChildren(...chats.map(({ id }) => new Option(id))); notice.textContent = "";
}).catch((error) => { notice.textContent = error.message; });
async function* events({ body }) {  // yields each data line; a chunk may end inside a line
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  for (let part, lines = [""]; !(part = await reader.read()).done;) {
    lines = (lines.pop() + part.value).split(/\r\n|\r|\n/);
    for (const line of lines.slice(0, -1)) if (line.startsWith("data:")) yield line.slice(5).trim();
  }
}
async function fitting(sent, chat, options) {  // drops the oldest turns until the prompt fits
  for (const first = sent.messages.length - chat.length; ; sent.messages.splice(first, 2))
    try { return await call("v1/chat/completions", { ...options, body: JSON.stringify(sent) }); }
    catch (error) {
      if (error.code !== "context_length_exceeded" || sent.messages.length < first + 3) throw error;
    }
}
async function ask() {
  const content = text.value, chat = turns, started = performance.now();
  if (request || !content.trim()) return;
  chat.push({ role: "user", content });
  const sent = { stream: true, stream_options: { include_usage: true } };
  if (model.value) sent.model = model.value;  // empty until the list of models has arrived
  sent.messages = system.value ? [{ role: "system", content: system.value }, ...chat] : [...chat];
  const whole = sent.messages.length;
  for (const { valueAsNumber: value, labels } of settings)
    if (isFinite(value)) sent[labels[0].textContent] = value;
  const question = add(log, "article", "user", content), answer = add(log, "article", "model", "");
  let problem = "The connection was lost", notes = [];
  request = new AbortController(); send.textContent = "Stop"; text.value = "";
  try {
    const response = await fitting(sent, chat, { method: "POST", signal: request.signal });
    const dropped = whole - sent.messages.length;
    if (dropped) notes.push(`The oldest ${dropped} messages did not fit and were left out`);
    chat.splice(0, dropped);
    for await (const data of events(response)) {
      if (data === "[DONE]") { problem = ""; break; }
      const { error, choices: [choice] = [], usage } = JSON.parse(data);
      if (error) throw Error(error.message);
      answer.append(choice?.delta.content ?? "");
      if (choice?.finish_reason === "length") notes.push("The answer reached its token limit");
      const count = usage?.completion_tokens, seconds = (performance.now() - started) / 1000;
      if (usage) notes.push(`${count} tokens, ${(count / seconds).toFixed(1)} tokens/s`);
    }
  } catch (error) { problem = request.signal.aborted ? "Stopped" : error.message; }
  if (answer.textContent || !problem) chat.push({ role: "assistant", content: answer.textContent });
  else { chat.pop(); question.remove(); text.value ||= content; }
  add(answer, "small", problem && "error", [...notes, problem].filter(Boolean).join(" · "));
  request = null; send.textContent = "Send";
}
text.onkeydown = (event) =>  // false: Enter adds no line break
  event.key !== "Enter" || event.shiftKey || event.isComposing || !ask();
send.onclick = () => { if (request) request.abort(); else ask(); };
fresh.onclick = () => { request?.abort(); turns = []; log.replaceChildren(); text.focus(); };
key.onchange = () => { sessionStorage.setItem("key", key.value); list(); };
key.value = sessionStorage.getItem("key") ?? ""; list();
</script>
"""
