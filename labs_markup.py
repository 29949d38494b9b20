# SPDX-License-Identifier: Apache-2.0
"""The part of the chat page's script that shows texts: Markdown as it streams, and tokens.

Every text becomes a text node, never markup. Each place of a text is read a bounded number of
times, and a text that grows is drawn again from its last block on.
"""

SCRIPT = r"""
function add(parent, name, textContent = "", more = {}) {  // name: tag, or tag.class
  const [tag, className = ""] = name.split(".");
  const made = Object.assign(document.createElement(tag), { className, textContent }, more);
  return parent.appendChild(made);
}
const button = (parent, label, onclick, more) =>
  add(parent, "button", label, { type: "button", onclick, ...more });
async function copy(content, source, shown) {  // without https, only the reader may copy
  try { await navigator.clipboard.writeText(content); source.textContent = "Copied"; }
  catch { getSelection().selectAllChildren(shown); source.textContent = "Press Ctrl+C"; }
}

// ---------------- Markdown
const FENCE = /^ *(```+|~~~+(?!~))([^`]*)$/, HEADING = /^ {0,3}(#{1,6}) +(.*)$/s;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])( +|$)/, DASHES = /^[ |:]*-[ |:-]{0,999}$/;
const COLUMNS = /^[^|]*(\|[^|]*){1,99}$/;  // more are no table that anybody can read
const LINK = /(!?)\[([^[\]]{0,300})\]\(([^()\s]{1,2000}(?:\([^()\s]{0,200}\)[^()\s]{0,200})?)\)/y;
const CITED = /\[(\d{1,3})\]/y, RUN = /([*_~`])\1*/y, SPECIAL = /[\\`*_~![]|https?:\/\//g;
const ADDRESS = /https?:\/\/[^\s<>"'`()[\]{}*]{0,2000}[^\s<>"'`()[\]{}*.,;:!?]/y;
const MARKS = { "**": "strong", __: "strong", "~~": "del", "*": "em", _: "em" };
const match = (pattern, words, place) => { pattern.lastIndex = place; return pattern.exec(words); };
const ruled = (line, bare = line.replaceAll(" ", "")) =>
  bare.length > 2 && "-*_".includes(bare[0]) && bare === bare[0].repeat(bare.length);
const begins = (line) => line[0] === ">" || line[0] === "|" || ruled(line) ||
  [FENCE, HEADING, ITEM].some((each) => each.test(line));

function writer(parent, cite) {  // returns a function that shows a text which only grows
  let done = 0, kept = 0;
  return (words) => {
    const end = settled(words, done);
    while (parent.childNodes.length > kept) parent.lastChild.remove();
    blocks(words.slice(done, end).split("\n"), parent, cite);
    kept = parent.childNodes.length;
    blocks(words.slice(done = end).split("\n"), parent, cite);
  };
}
function sparing(turn, box, update) {  // drawing takes a fifth of the time at most
  let timer = 0, cost = 0;
  return () => {
    timer ||= setTimeout(() => {
      const began = Date.now();
      timer = 0; update(); cost = box.offsetHeight && Date.now() - began;
    }, live.has(turn) ? 16 + 4 * cost : 0);
  };
}
function settled(words, start) {  // where the last block begins: only that one may still change
  // A very long one is cut between its lines, so that it is not drawn as a whole each time.
  let fence = "", blank = false, found = start;
  for (let i = start, end; (end = words.indexOf("\n", i)) >= 0; i = end + 1) {
    const line = words.slice(i, end), [, mark = ""] = FENCE.exec(line) ?? [];
    const ends = i - found > 9999 ? !line.includes("|") : blank && !ITEM.test(line);
    if (ends && !fence && line.trim() && line[0] !== " ") found = i;
    if (!fence) fence = mark;
    else if (mark.startsWith(fence) && line.trim() === mark) fence = "";
    blank = !line.trim();
  }
  return found;
}
function blocks(lines, parent, cite, depth = 0) {
  for (let i = 0, end; i < lines.length; i = end) {
    const line = lines[i], [, mark, language] = FENCE.exec(line) ?? [], head = HEADING.exec(line);
    const take = (stops) => {
      for (end = i + 1; end < lines.length && !stops(lines[end]); end++);
      return lines.slice(i, end);
    };
    end = i + 1;
    if (!line.trim()) continue;
    if (mark) {
      const closes = (each) => each.trim() === FENCE.exec(each)?.[1] && each.includes(mark);
      const inner = take(closes);
      code(parent, language.trim().split(" ")[0].slice(0, 40), inner.slice(1).join("\n"));
      end++;
    } else if (head) inline(add(parent, `h3.level${head[1].length}`), head[2], cite);
    else if (ruled(line)) add(parent, "hr");
    else if (line[0] === ">" && depth < 8) {
      const inner = take((each) => each[0] !== ">").map((each) => each.replace(/^> ?/, ""));
      blocks(inner, add(parent, "blockquote"), cite, depth + 1);
    } else if (ITEM.test(line) && depth < 8) end = items(lines, i, parent, cite, depth);
    else if (COLUMNS.test(line) && lines[i + 1]?.includes("|") && DASHES.test(lines[i + 1]))
      table(parent, take((each) => !each.includes("|")), cite);
    else inline(add(parent, "p"), take((each) => !each.trim() || begins(each)).join("\n"), cite);
  }
}
function items(lines, start, parent, cite, depth) {  // returns the number of the line after them
  const [, indent, sign] = ITEM.exec(lines[start]), number = parseInt(sign, 10);
  const made = add(parent, number >= 0 ? "ol" : "ul"), deep = (line) => line.search(/[^ ]|$/);
  if (number >= 0) made.start = number;
  for (let i = start; ;) {
    const [{ length }] = ITEM.exec(lines[i]), inner = [lines[i].slice(length)];
    let blank = false;
    for (i++; i < lines.length; blank = !lines[i++].trim()) {
      const line = lines[i];
      if (line.trim() && deep(line) <= indent.length && (blank || begins(line))) break;
      inner.push(line.slice(Math.min(length, deep(line))));
    }
    blocks(inner, add(made, "li"), cite, depth + 1);
    const next = ITEM.exec(lines[i] ?? "");
    if (!next || ruled(lines[i]) || parseInt(next[2], 10) >= 0 !== number >= 0) return i;
  }
}
function table(parent, lines, cite) {  // tabIndex: the arrow keys scroll it
  const made = add(add(parent, "div.table", "", { tabIndex: 0 }), "table");
  const rows = lines.map((line) =>
    line.trim().replace(/^\||\|$/g, "").split(/(?<!\\)\|/));
  rows.splice(1, 1);
  rows.forEach((cells, i) => {
    const row = add(made, "tr");
    for (const cell of cells.slice(0, rows[0].length))
      inline(add(row, i ? "td" : "th"), cell.trim().replaceAll("\\|", "|"), cite);
  });
}
function code(parent, language, content) {
  const box = add(parent, "figure"), head = add(box, "figcaption", `${language || "text"} `);
  button(head, "Copy", ({ target }) => copy(content, target, shown), { ariaLabel: "Copy code" });
  const shown = add(box, "pre", "", { tabIndex: 0 }); add(shown, "code", content);
}
function inline(parent, words, cite, inLink) {
  const stack = [], missing = new Set();  // missing: lengths of ` runs that nothing closes
  let start = 0, here = parent, from = 0;
  const put = (end, next) => { here.append(words.slice(start, end)); start = from = next; };
  for (let found; (found = match(SPECIAL, words, from)); ) {
    const i = found.index, [run = ""] = match(RUN, words, i) ?? [], cited = match(CITED, words, i);
    const link = !inLink && (match(LINK, words, i) ?? match(ADDRESS, words, i));
    const url = link && safe(link[3] ?? link[0]);
    from = i + Math.max(run.length, 1);
    if (url) { put(i, i + link[0].length); anchor(here, url, link[2] ?? link[0], link[1]); }
    else if (cited && cite?.(cited[1])) {
      put(i, i + cited[0].length); button(here, cited[0], cite(cited[1]), { className: "cite" });
    } else if (words[i] === "\\" && /[!-/:-@[-`{-~]/.test(words[i + 1] ?? "")) {
      put(i, i + 1); from++;
    } else if (run[0] === "`") {
      const first = from, end = missing.has(run) ? -1 : closing(words, run, first);
      if (end < 0) { missing.add(run); continue; }
      put(i, end + run.length); add(here, "code", words.slice(first, end));
    } else if (run && run.length < 4) emphasis(i, run);
  }
  put(words.length); while (stack.length) unwrap(stack.pop());
  function emphasis(i, { length }) {
    const fits = (each) => each && words.startsWith(each, i), top = stack.at(-1)?.mark;
    const mark = [length > 2 && top, ...Object.keys(MARKS)].find(fits), letter = /[\p{L}\p{N}]/u;
    if (!mark) return;
    const before = words[i - 1] ?? " ", after = words[i + mark.length] ?? " ";
    const inside = mark[0] === "_", open = stack.find((each) => each.mark === mark);
    from = i + mark.length;
    if (!open && /\S/.test(after) && !(inside && letter.test(before))) {
      put(i, from); stack.push({ mark, end: from, node: here = add(here, MARKS[mark]) });
    } else if (open && open.end < i && /\S/.test(before) && !(inside && letter.test(after))) {
      put(i, from); while (stack.at(-1) !== open) unwrap(stack.pop());
      stack.pop(); here = stack.at(-1)?.node ?? parent;
    }
  }
}
function unwrap({ mark, node }) {  // what never closed is text after all
  node.before(mark); while (node.firstChild) node.before(node.firstChild); node.remove();
}
function closing(words, run, from) {
  for (let i = from, end; (i = words.indexOf(run, i)) >= 0; i = end) {
    for (end = i + run.length; words[end] === "`"; end++);
    if (end - i === run.length) return i;
  }
  return -1;
}
function safe(address) {
  const url = URL.canParse(address) && new URL(address);
  return url && ["http:", "https:", "mailto:"].includes(url.protocol) && url;
}
function anchor(parent, url, label, image) {  // an image is not loaded: its server would see it
  const more = { href: url.href, target: "_blank", rel: "noopener noreferrer" };
  const link = add(parent, "a", "", more);
  inline(link, image ? `Image: ${label}` : label || url.href, null, true);
  if (label && safe(label).href !== url.href)
    add(link, "small.host", ` (${url.host || url.pathname})`);
}

// ---------------- tokens with their probabilities
function spell({ bytes, token }) {  // a token may end inside a character
  try { return new TextDecoder("utf-8", { fatal: true }).decode(Uint8Array.from(bytes)) || token; }
  catch { return `<${bytes.map((byte) => byte.toString(16)).join(" ")}>`; }
}
function tokens(parent) {  // returns a function that shows the tokens so far
  const label = "Tokens; the arrow keys tell of each";
  const box = add(parent, "div", "", { tabIndex: 0, role: "group", ariaLabel: label });
  let found = [], here = 0;
  const hide = () => { tip.hidden = true; box.children[here]?.classList.remove("at"); };
  const tell = (next) => {
    hide(); here = Math.max(0, Math.min(next, found.length - 1));
    if (found[here]) rivals(box.children[here], found[here]);
  };
  box.onpointerover = box.onclick = ({ target }) =>
    target !== box && tell([...box.children].indexOf(target));
  box.onfocus = () => tell(here); box.onpointerleave = box.onblur = hide;
  box.onkeydown = (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (step) tell(here + step); else if (event.key === "Escape") hide();
  };
  return (_, turn) => {
    for (const each of (turn.tokens ?? []).slice(found.length)) {
      const level = [.9, .5, .2].filter((share) => Math.exp(each.logprob) < share).length;
      add(box, `span.p${level}`, spell(each));
    }
    found = [...turn.tokens ?? []];
  };
}
function rivals(span, one) {  // what else the model thought of at this place, with bars
  span.classList.add("at"); tip.replaceChildren(); tip.hidden = false;
  for (const each of [one, ...one.top_logprobs.filter(({ token }) => token !== one.token)]) {
    const row = add(tip, "div"), value = Math.exp(each.logprob);
    add(row, each === one ? "strong" : "span", JSON.stringify(spell(each)).slice(1, -1));
    add(row, "meter", "", { value, ariaLabel: "Probability" });
    add(row, "span", `${(100 * value).toFixed(1)} %`);
  }
  const { left, bottom, top } = span.getBoundingClientRect(), { offsetWidth, offsetHeight } = tip;
  tip.style.top = `${bottom + offsetHeight < innerHeight ? bottom : top - offsetHeight}px`;
  tip.style.left = `${Math.max(0, Math.min(left, innerWidth - offsetWidth))}px`;
}
"""
