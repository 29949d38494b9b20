# SPDX-License-Identifier: Apache-2.0
"""The part of the chat page's script that shows Markdown as it streams.

Every text of a model becomes a text node; each place of a text is read a bounded number of times.
"""

SCRIPT = r"""
// ------------------------------------------------ elements: every text becomes a text node
function add(parent, tag, className = "", textContent = "") {
  return parent.appendChild(Object.assign(document.createElement(tag), { className, textContent }));
}
function button(parent, label, onclick, more) {
  const made = Object.assign(add(parent, "button", "", label), { type: "button", onclick });
  for (const [name, value] of Object.entries(more ?? {})) made.setAttribute(name, value);
  return made;
}
function say(words, label, action) {
  notice.replaceChildren(words);
  if (label) button(notice, label, () => { notice.replaceChildren(); action(); }).before(" ");
}
async function copy(content, source, shown) {  // without https, only the reader may copy
  try { await navigator.clipboard.writeText(content); source.textContent = "Copied"; }
  catch { getSelection().selectAllChildren(shown); source.textContent = "Selected: press Ctrl+C"; }
}

// ------------------------------------------------ Markdown: each place of a text is read once
const FENCE = /^ *(```+|~~~+)([^`]*)$/, HEADING = /^ {0,3}(#{1,6}) +(.*)$/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])( +|$)/, DASHES = /^[ |:-]*-[ |:-]*$/;
const LINK = /(!?)\[([^[\]]{0,300})\]\(([^()\s]{1,2000}(?:\([^()\s]{0,200}\)[^()\s]{0,200})?)\)/y;
const CITED = /\[(\d{1,3})\]/y, RUN = /([*_~`])\1*/y, SPECIAL = /[\\`*_~![]|https?:\/\//g;
const ADDRESS = /https?:\/\/[^\s<>"'`()[\]{}*]{0,2000}[^\s<>"'`()[\]{}*.,;:!?]/y;
const MARKS = { "**": "strong", __: "strong", "~~": "del", "*": "em", _: "em" };
const match = (pattern, words, place) => { pattern.lastIndex = place; return pattern.exec(words); };
const ruled = (line, bare = line.replaceAll(" ", "")) =>
  bare.length > 2 && "-*_".includes(bare[0]) && bare === bare[0].repeat(bare.length);
const begins = (line) => FENCE.test(line) || HEADING.test(line) || ITEM.test(line) || line[0] === ">";

function writer(parent, cite) {  // returns a function that shows a text which only grows
  let done = 0, tail = [];
  return (words) => {
    const end = settled(words, done);
    for (const each of tail) each.remove();
    if (end > done) blocks(words.slice(done, end).split("\n"), parent, cite);
    const first = parent.childNodes.length;
    blocks(words.slice(done = end).split("\n"), parent, cite);
    tail = [...parent.childNodes].slice(first);
  };
}
function settled(words, start) {  // where the last block begins: only that one may still change
  let fence = "", blank = false, found = start;
  for (let i = start, end; (end = words.indexOf("\n", i)) >= 0; i = end + 1) {
    const line = words.slice(i, end), [, mark] = FENCE.exec(line) ?? [];
    if (blank && !fence && line.trim() && line[0] !== " " && !ITEM.test(line)) found = i;
    if (!fence) fence = mark ?? ""; else if (line.trim() === mark && mark.startsWith(fence)) fence = "";
    blank = !line.trim();
  }
  return found;
}
function blocks(lines, parent, cite, depth = 0) {
  for (let i = 0, end; i < lines.length; i = end) {
    const line = lines[i], fence = FENCE.exec(line), heading = HEADING.exec(line);
    const take = (stops) => {
      for (end = i + 1; end < lines.length && !stops(lines[end]); end++);
      return lines.slice(i, end);
    };
    end = i + 1;
    if (!line.trim()) continue;
    if (fence) {
      const [, mark, language] = fence, closes = (each) => each.trim().startsWith(mark) &&
        !each.trim().replaceAll(mark[0], "");
      code(parent, language.trim().split(" ")[0].slice(0, 40), take(closes).slice(1).join("\n"));
      end++;
    } else if (heading) inline(add(parent, "h3", `level${heading[1].length}`), heading[2], cite);
    else if (ruled(line)) add(parent, "hr");
    else if (line[0] === ">" && depth < 8) {
      const inner = take((each) => each[0] !== ">").map((each) => each.replace(/^> ?/, ""));
      blocks(inner, add(parent, "blockquote"), cite, depth + 1);
    } else if (ITEM.test(line) && depth < 8) end = items(lines, i, parent, cite, depth);
    else if (line.includes("|") && lines[i + 1]?.includes("|") && DASHES.test(lines[i + 1]))
      table(parent, take((each) => !each.includes("|")), cite);
    else {
      const inner = take((each) => !each.trim() || begins(each) || ruled(each));
      inline(add(parent, "p"), inner.join("\n"), cite);
    }
  }
}
function items(lines, start, parent, cite, depth) {  // returns the number of the line after the list
  const [, indent, sign] = ITEM.exec(lines[start]), ordered = /\d/.test(sign);
  const made = add(parent, ordered ? "ol" : "ul"), deep = (line) => line.search(/[^ ]|$/);
  if (ordered) made.start = parseInt(sign, 10);
  for (let i = start; ;) {
    const item = ITEM.exec(lines[i]), inner = [lines[i].slice(item[0].length)];
    let blank = false;
    for (i++; i < lines.length; blank = !lines[i++].trim()) {
      const line = lines[i], own = deep(line) > indent.length;
      if (line.trim() && !own && (blank || begins(line))) break;
      inner.push(line.slice(Math.min(item[0].length, deep(line))));
    }
    blocks(inner, add(made, "li"), cite, depth + 1);
    const next = ITEM.exec(lines[i] ?? "");
    if (!next || /\d/.test(next[2]) !== ordered || ruled(lines[i])) return i;
  }
}
function table(parent, lines, cite) {
  const cells = (line) => line.trim().replace(/^\|/, "").replace(/\|$/, "").split(/(?<!\\)\|/);
  const box = add(parent, "div", "table"), made = add(box, "table"), head = cells(lines[0]);
  box.tabIndex = 0;  // so that the arrow keys scroll it
  lines.forEach((line, i) => {
    const row = i !== 1 && add(made, "tr");
    if (row) for (const cell of cells(line).slice(0, head.length))
      inline(add(row, i ? "td" : "th"), cell.trim().replaceAll("\\|", "|"), cite);
  });
}
function code(parent, language, content) {
  const box = add(parent, "figure"), head = add(box, "figcaption");
  add(head, "span", "", language || "text");
  const shown = add(box, "pre");
  button(head, "Copy", ({ target }) => copy(content, target, shown), { "aria-label": "Copy code" });
  add(shown, "code", "", content); shown.tabIndex = 0;
}
function inline(parent, words, cite, inLink) {
  const stack = [], missing = new Set();  // missing: lengths of ` runs that nothing closes any more
  let start = 0, here = parent, from = 0;
  const put = (end, next) => { here.append(words.slice(start, end)); start = from = next; };
  for (let found; (found = match(SPECIAL, words, from)); ) {
    const i = found.index, char = words[i], [run = ""] = match(RUN, words, i) ?? [];
    const link = !inLink && match(LINK, words, i), url = link && safe(link[3]);
    const cited = match(CITED, words, i), address = !inLink && match(ADDRESS, words, i);
    from = i + Math.max(run.length, 1);
    if (char === "\\" && /[!-/:-@[-`{-~]/.test(words[i + 1] ?? "")) { put(i, i + 1); from++; }
    else if (char === "`") {
      const end = missing.has(run) ? -1 : closing(words, run, from);
      if (end < 0) { missing.add(run); continue; }
      const inner = words.slice(from, end);
      put(i, end + run.length); add(here, "code", "", inner);
    } else if (url) { put(i, i + link[0].length); anchor(here, url, link[2], link[1]); }
    else if (cited && cite?.(cited[1])) {
      put(i, i + cited[0].length); button(here, cited[0], cite(cited[1]), { class: "cite" });
    } else if (address && safe(address[0])) {
      put(i, i + address[0].length); anchor(here, safe(address[0]), address[0]);
    } else if (run && run.length < 4) emphasis(i);
  }
  put(words.length); while (stack.length) unwrap(stack.pop());
  function emphasis(i) {
    const top = stack.at(-1)?.mark, fits = (each) => each && words.startsWith(each, i);
    const mark = fits(top) ? top : Object.keys(MARKS).find(fits), letter = /[\p{L}\p{N}]/u;
    if (!mark) return;
    const before = words[i - 1] ?? " ", after = words[i + mark.length] ?? " ";
    const inside = mark[0] === "_", open = stack.find((each) => each.mark === mark);
    from = i + mark.length;
    if (open) {
      if (open.end === i || /\s/.test(before) || (inside && letter.test(after))) return;
      put(i, from); while (stack.at(-1) !== open) unwrap(stack.pop());
      stack.pop(); here = stack.at(-1)?.node ?? parent;
    } else if (!/\s/.test(after) && !(inside && letter.test(before))) {
      put(i, from); stack.push({ mark, node: here = add(here, MARKS[mark]), end: from });
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
  return url && ["http:", "https:", "mailto:"].includes(url.protocol) ? url : null;
}
function anchor(parent, url, label, image) {  // an image is not loaded: its server would see it
  const link = Object.assign(add(parent, "a"), { href: url.href, target: "_blank" });
  link.rel = "noopener noreferrer"; link.referrerPolicy = "no-referrer";
  inline(link, image ? `Image: ${label}` : label, null, true);
  if (label !== url.href && label !== url.href.replace(/\/$/, ""))
    add(link, "small", "host", ` (${url.host || url.pathname})`);
}
"""
