# SPDX-License-Identifier: Apache-2.0
"""What a server is doing, for people: /status, a page, and /status.json, from which it is drawn.

    report = labs_status.report(service)     # of labs_service.py; each model with its last minutes

Both show what /metrics does to the same clients: no prompts, no keys. The figures are those of one
process. Needs labs_service.py and labs_site.py with what those need; falcon.
"""

from __future__ import annotations

from typing import Any

import falcon
from msgspec import Struct

import labs
import labs_engine
import labs_history
import labs_meters
import labs_openapi
import labs_protocol
import labs_site
from labs_service import Resource, Service


class ModelStatus(Struct, frozen=True, kw_only=True):
    """One model. The fields with None are known once it is loaded. window: its last ten minutes.

    running: answers that are computed; they fill rows of the batch. paused: those of them that wait
    for memory. cache_usage: from 0 to 1.
    forward: whose code computes the logits, "labs" or "transformers".
    """

    name: str
    kind: str
    loaded: bool
    alive: bool | None = None
    running: int = 0
    paused: int = 0
    waiting: int = 0
    max_rows: int | None = None
    max_waiting: int
    cache_usage: float | None = None
    weight_bytes: int | None = None
    context_length: int | None = None
    device: str | None = None
    dtype: str | None = None
    forward: str | None = None
    window: labs_history.Window


class Report(Struct, frozen=True):
    """The response of /status.json. gpu_memory: bytes by kind, empty without CUDA."""

    version: str
    up_s: float
    models: tuple[ModelStatus, ...]
    gpu_memory: dict[str, int]


def report(service: Service) -> Report:
    """Return what each model of a server does. No model is loaded for it."""
    loaded, history = service.models.loaded(), service.meters.history
    found = []
    for name, kind in service.kinds.kinds().items():
        engine: Any = loaded.get(name)
        own = service.kinds.own(name)
        if own is not None and own.weight_bytes:  # else a look at it would load it
            engine = own
        known = {} if engine is None else _known(engine)
        rest = {"max_waiting": service.config.server.max_waiting, "window": history.window(name)}
        names = {"name": name, "kind": kind, "loaded": engine is not None}
        found.append(ModelStatus(**{**rest, **names, **known}))
    return Report(labs.__version__, history.up_s, tuple(found), labs_meters.gpu_memory())


def _known(engine: Any) -> dict[str, Any]:
    """Return the fields that only an engine or a desk knows."""
    status: labs_engine.Status = engine.status()
    names = ("running", "paused", "waiting", "max_rows", "max_waiting", "alive")
    found = {name: getattr(status, name) for name in names}
    model = engine.model
    found |= {"device": str(model.device), "dtype": str(model.dtype)}
    found["context_length"] = model.context_length
    decoder = getattr(model, "decoder", None)
    if decoder is None:  # of a desk
        return {**found, "weight_bytes": getattr(engine, "weight_bytes", None)}
    forward = "labs" if decoder.forward else "transformers"
    rest = {"weight_bytes": decoder.weight_bytes, "forward": forward}
    return {**found, **rest, "cache_usage": status.cache_usage}


class StatusData(Resource):
    """GET /status.json: the report, for whoever may see /metrics."""

    quiet = True  # a page that asks every few seconds would fill the log

    def __init__(self, service: Service) -> None:
        super().__init__(service)
        self.public = service.config.server.public_metrics

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        resp.data = labs_protocol.dumps(report(self.service))
        resp.set_header("Cache-Control", "no-store")


def routes(service: Service) -> tuple[labs_openapi.Route, ...]:
    """Return the row of the route table."""
    text = "Tell what each model is doing"
    return (labs_openapi.Route("get", "/status.json", StatusData(service), text, Report),)


def pages() -> dict[str, labs_site.StaticPage]:
    """Return the page by its path."""
    html, policy = "text/html; charset=utf-8", labs_site.policy_of(PAGE)
    return {"/status": labs_site.StaticPage(PAGE.encode(), html, policy)}


# ---------------------------------------------------------------- the page


PAGE = r"""<!doctype html><html lang="en"><meta charset="utf-8"><title>labs: status</title>
<meta name="viewport" content="width=device-width"><link rel="icon" href="data:,"><style>
:root { color-scheme: light dark; background: light-dark(#faf9f6, #16181c);
  --soft: light-dark(#5c5f66, #a6abb5); --line: #8884; --mark: light-dark(#2b5fc7, #7ba6f7) }
* { box-sizing: border-box } body { max-width: 60rem; margin: 0 auto; padding: 1rem;
  font: 16px/1.5 system-ui; font-variant-numeric: tabular-nums }
header { display: flex; flex-wrap: wrap; gap: .2rem 1rem; align-items: baseline }
h1 { margin: 0; font-size: 1.4rem } h2 { margin: 0; font-size: 1.1rem; overflow-wrap: anywhere }
header p, .kind, dt, figcaption, .scale { color: var(--soft) } p { margin: .3rem 0 }
header a { margin-left: auto } a { color: var(--mark) }
section { margin: 1rem 0; padding: 1rem; border: 1px solid var(--line); border-radius: 12px;
  background: light-dark(#fff, #1d2026) } .idle { padding-block: .7rem }
.head { display: flex; flex-wrap: wrap; gap: 0 .8rem; align-items: baseline }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(8.5rem, 1fr));
  gap: .7rem 1rem; margin: .8rem 0 } dt { font-size: .85rem } dd { margin: 0; font-weight: 600 }
figure { margin: 1rem 0 .5rem } figcaption, .scale { font-size: .85rem }
svg { display: block; width: 100%; height: 7rem; border-bottom: 1px solid var(--soft) }
rect { fill: var(--mark) } .scale { display: flex; justify-content: space-between }
table { border-collapse: collapse } th, td { padding: .1rem 1.2rem .1rem 0; text-align: right }
th { font-weight: 500; color: var(--soft) } th:first-child { text-align: left }
summary { width: max-content; padding: .2rem 0 } #problem { color: light-dark(#a51d1d, #ff9a9a) }
input, button { font: inherit; padding: 6px 11px; border: 1px solid #888a; border-radius: 9px }
[hidden] { display: none } :focus-visible { outline: 2px solid var(--mark); outline-offset: 2px }
</style><header><h1>Status</h1><p id="about"></p><a href="./">Chat</a></header>
<main><p id="problem" role="status"></p><form id="ask" hidden><label>API key <input id="key"
type="password" autocomplete="off"></label> <button>Show</button></form><div id="models"></div>
</main><script>
const EVERY_MS = 5000, MINUTES = 10;
const [about, problem, ask, key, models] = document.querySelectorAll("[id]");
let timer;
const sections = new Map();  // by the model's name; changed in place, so that focus stays
function make(parent, tag, text = "", attributes = {}) {  // text: markup is shown as text
  const drawn = ["svg", "rect"].includes(tag);
  const made = drawn ? document.createElementNS("http://www.w3.org/2000/svg", tag)
    : document.createElement(tag);
  if (text) made.textContent = text;
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return parent.appendChild(made);
}
const round = (value) => value.toFixed(value < 10 ? 1 : 0);
const size = (bytes) =>
  bytes < 1e9 ? `${round(bytes / 1e6)} MB` : `${round(bytes / 1e9)} GB`;
const seconds = (value) => value < 1 ? `${(value * 1000).toFixed(0)} ms` : `${round(value)} s`;
function span(value) {
  const minutes = Math.floor(value / 60), hours = Math.floor(minutes / 60);
  if (hours >= 48) return `${Math.floor(hours / 24)} days`;
  return hours ? `${hours} h ${minutes % 60} min` : minutes ? `${minutes} min` : seconds(value);
}
function figures(model) {  // what is shown of a loaded model, as [name, text]
  const { window: last, first_token: _, ...rest } = model, first = last.first_token;
  const per = rest.kind === "text";
  return [
    [per ? "Rows in use" : "Computing", `${rest.running} of ${rest.max_rows}`],
    ["Waiting", `${rest.waiting} of ${rest.max_waiting}`],
    per && ["Tokens/s now", round(last.now)],
    ["Answers, 10 min", `${last.answers}`],
    per && ["Tokens, 10 min", last.tokens.toLocaleString("en")],
    per && ["First token, median", first ? seconds(first.median_s) : "no answer yet"],
    per && first && ["First token, 95 %", seconds(first.p95_s)],
    rest.cache_usage !== null && ["KV cache in use", `${(rest.cache_usage * 100).toFixed(0)} %`],
    rest.weight_bytes && ["Weights", size(rest.weight_bytes)],
    rest.context_length && ["Context", `${rest.context_length.toLocaleString("en")} tokens`],
    ["Device", rest.device], ["Dtype", rest.dtype],
    rest.forward && ["Forward of", rest.forward],
  ].filter(Boolean);
}
function minutesOf({ rates, interval_s }) {  // [[minutes ago, tokens/s]], the latest first
  const each = Math.round(60 / interval_s), found = [];
  for (let end = rates.length; end > 0 && found.length < MINUTES; end -= each) {
    const part = rates.slice(Math.max(0, end - each), end);
    found.push([found.length + 1, part.reduce((a, b) => a + b, 0) / part.length]);
  }
  return found;
}
function draw(section, { name, window: last }) {
  const { rates, interval_s } = last, count = MINUTES * 60 / interval_s;
  const most = Math.max(1, ...rates), { chart, top, rows } = section;
  const bars = rates.map((rate, place) => ({ rate, x: (count - rates.length + place) * 10 }));
  chart.replaceChildren();
  for (const { rate, x } of bars.filter(({ rate }) => rate > 0))
    make(chart, "rect", "", { x: x + 1, y: 100 - 100 * rate / most, width: 8, height: 100 });
  const text = `Tokens per second of ${name} in the last ten minutes: now ${round(last.now)}, `;
  chart.setAttribute("aria-label", text + `at most ${round(Math.max(0, ...rates))}`);
  top.textContent = `${round(most)} tokens/s`;
  rows.replaceChildren();
  for (const [ago, rate] of minutesOf(last)) {
    const row = make(rows, "tr");
    make(row, "th", `${ago} min`, { scope: "row" }); make(row, "td", round(rate));
  }
}
function build(model) {
  const root = make(models, "section", "", { "aria-label": model.name });
  const head = make(root, "div", "", { class: "head" });
  make(head, "h2", model.name);
  const kind = make(head, "span", "", { class: "kind" }), list = make(root, "dl");
  const figure = make(root, "figure");
  make(figure, "figcaption", "Tokens per second, last ten minutes");
  const scale = make(figure, "div", "", { class: "scale" }), top = make(scale, "span");
  const box = { viewBox: "0 0 600 100", preserveAspectRatio: "none", role: "img" };
  const chart = make(figure, "svg", "", box), axis = make(figure, "div", "", { class: "scale" });
  make(axis, "span", "10 min ago"); make(axis, "span", "now");
  const details = make(root, "details"); make(details, "summary", "The same as a table");
  const table = make(details, "table"), line = make(make(table, "thead"), "tr");
  make(line, "th", "Ago", { scope: "col" }); make(line, "th", "Tokens/s", { scope: "col" });
  return { root, kind, list, figure, chart, top, details, rows: make(table, "tbody") };
}
function update(model) {
  if (!sections.has(model.name)) sections.set(model.name, build(model));
  const section = sections.get(model.name), { root, kind, list, figure, details } = section;
  const state = !model.loaded ? "not loaded" : model.alive ? "loaded" : "its engine has ended";
  kind.textContent = `${model.kind} · ${state}`;
  root.classList.toggle("idle", !model.loaded);
  list.hidden = !model.loaded;
  figure.hidden = details.hidden = model.kind !== "text" || !model.loaded;
  list.replaceChildren();
  for (const [name, text] of model.loaded ? figures(model) : []) {
    const pair = make(list, "div"); make(pair, "dt", name); make(pair, "dd", text);
  }
  draw(section, model);
}
function show({ version, up_s, models: all, gpu_memory }) {
  const { allocated, free, total } = gpu_memory, parts = [`labs ${version}`, `up ${span(up_s)}`];
  if (total) parts.push(`GPU: ${size(allocated)} used here, ${size(free)} of ${size(total)} free`);
  about.textContent = parts.join(" · ");
  all.forEach(update);
}
async function refresh() {
  let wait = EVERY_MS;
  try {
    const headers = key.value ? { Authorization: `Bearer ${key.value}` } : {};
    const response = await fetch("status.json", { headers });
    const data = await response.json().catch(() => ({}));
    wait = Math.max(wait, 1000 * (response.headers.get("Retry-After") ?? 0));
    if (response.status === 401) ask.hidden = false, wait = 0;  // until a key is given
    if (!response.ok) throw Error(data.error?.message ?? `HTTP ${response.status}`);
    show(data); problem.textContent = ""; ask.hidden = true;
  } catch (error) {
    const lost = error instanceof TypeError;
    problem.textContent = lost ? "The server does not answer; trying again." : error.message;
  }
  clearTimeout(timer);  // of a second call at the same time
  if (wait) timer = setTimeout(() => document.hidden || refresh(), wait);
}
document.onvisibilitychange = () => { if (!document.hidden && ask.hidden) refresh(); };
ask.onsubmit = () => { sessionStorage.setItem("key", key.value); refresh(); return false; };
key.value = sessionStorage.getItem("key") ?? ""; refresh();
</script>
"""
