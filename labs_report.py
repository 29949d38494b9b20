# SPDX-License-Identifier: Apache-2.0
"""What a run over a file did, as one HTML file: lengths, tokens/s, how answers ended, errors.

    with labs_report.written("report.html", ("in.jsonl", "out.jsonl")) as findings:
        tally = labs_jsonl.Tally(watch=findings.add)     # which counts each line of the run

The file has no script and asks no server; every text in it is escaped. It is written when the run
ends, however it ends. Counts need the same memory for any number of lines. Needs labs.py and
labs_files.py.
"""

from __future__ import annotations

import contextlib
import html
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import labs
import labs_files

BINS = 120  # of the time line; twice as long each whenever they are full
GROUPS, LINES = 50, 12  # kinds of errors, and numbers of lines that are shown of each
LONGEST = 300  # characters of an error
GENERATOR = '<meta name="generator" content="labs-gen batch --report">'


class Findings:
    """Counts of a run. clock: never goes back."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock, self.began = clock, clock()
        self.bin_s, self.tokens = 1.0, [0.0] * BINS
        self.prompts, self.answers = Counter[int](), Counter[int]()  # by bit length
        self.reasons, self.sums = Counter[str](), Counter[str]()
        self.errors: dict[str, tuple[int, list[int | str]]] = {}

    def begin(self) -> None:
        """Let the time begin, for example when the model is loaded."""
        self.began = self._clock()

    @property
    def seconds(self) -> float:
        return self._clock() - self.began

    def add(self, task: Any) -> None:
        """Count a line that has ended. task: a labs_jsonl.Task."""
        self.sums["lines"] += 1
        if task.error is not None:
            self._failed(str(task.error), task.line)
        elif task.made is not None:
            self.sums["vectors"] += 1
        for each in task.found.values():
            usage = each.usage
            self.reasons[each.finish_reason] += 1
            self.prompts[usage.prompt_tokens.bit_length()] += 1
            self.answers[usage.completion_tokens.bit_length()] += 1
            for name in ("prompt_tokens", "cached_tokens", "completion_tokens"):
                self.sums[name] += getattr(usage, name)
            self._made(usage.completion_tokens, each.timings.decode_s)

    def _failed(self, text: str, line: int | str) -> None:
        text = " ".join(text.removeprefix(f"line {line}: ").split())[:LONGEST]
        text = text if text in self.errors or len(self.errors) < GROUPS else "other errors"
        count, lines = self.errors.get(text, (0, []))
        self.errors[text] = count + 1, [*lines, line] if len(lines) < LINES else lines

    def _made(self, tokens: int, decode_s: float) -> None:
        """Spread the tokens of an answer over the time in which they were made."""
        end = self.seconds
        while end >= self.bin_s * BINS:
            pairs = zip(self.tokens[::2], self.tokens[1::2], strict=True)
            self.tokens = [a + b for a, b in pairs] + [0.0] * (BINS // 2)
            self.bin_s *= 2
        first = int(max(0.0, end - decode_s) / self.bin_s)
        last = int(end / self.bin_s)
        for place in range(first, last + 1):
            self.tokens[place] += tokens / (last + 1 - first)


# ---------------------------------------------------------------- the file


@contextlib.contextmanager
def written(target: str, files: tuple[str, str]) -> Iterator[Findings]:
    """Give what to count with, and write the report at the end, also after an exception.

    files: the names of prompts and answers. Raises LabsError when the report cannot be written.
    """
    check(target, files)
    findings, ended = Findings(), False
    try:
        yield findings
        ended = True
    finally:
        if ended or findings.sums["lines"]:  # else nothing ran, and an older report says more
            write(target, page(findings, files[0], ended))


def check(target: str, files: tuple[str, str]) -> None:
    """Raise LabsError when a report may not be written to this file."""
    folder = os.path.dirname(target) or "."
    if target == "-" or os.path.isdir(target):
        raise labs.LabsError(f"--report {target}: give the name of a file")
    if not os.path.isdir(folder) or not os.access(folder, os.W_OK):
        raise labs.LabsError(f"--report {target}: there is no folder {folder} to write in")
    if os.path.abspath(target) in map(os.path.abspath, files):
        raise labs.LabsError(f"--report {target}: the file has the prompts or the answers")
    if not os.path.exists(target):
        return
    with open(target, "rb") as file:
        head = file.read(1000)
    if not os.path.isfile(target) or (head and GENERATOR.encode() not in head):
        raise labs.LabsError(f"--report {target}: the file exists and is no report; move it away")


def write(target: str, text: str) -> None:
    """Write a file whole or not at all. Raises LabsError."""
    try:
        labs_files.write_whole(target, [text.encode()])
    except OSError as error:
        raise labs.LabsError(f"--report {target}: {error.strerror}") from error


def said(text: str) -> str:
    """Return a text from outside as HTML: escaped, without characters that are not printed."""
    return html.escape("".join(each if each.isprintable() else "\ufffd" for each in text))


def page(findings: Findings, source: str, ended: bool = True) -> str:
    """Return the report as HTML. ended: whether the run reached the end of its file."""
    sums, seconds = findings.sums, max(findings.seconds, 1e-9)
    failed = sum(count for count, _ in findings.errors.values())
    facts = {
        "Lines": f"{sums['lines']:,}",
        "Failed": f"{failed:,}",
        "Answers": f"{sum(findings.reasons.values()):,}",
        "Vectors and scores": f"{sums['vectors']:,}" if sums["vectors"] else "",
        "Prompt tokens": f"{sums['prompt_tokens']:,}",
        "of them cached": f"{sums['cached_tokens']:,}",
        "Generated tokens": f"{sums['completion_tokens']:,}",
        "Time": duration(seconds),
        "Tokens/s": f"{sums['completion_tokens'] / seconds:,.1f}",
    }
    pairs = (f"<div><dt>{k}</dt><dd>{v}</dd></div>" for k, v in facts.items() if v)
    cut = "<p class=bad>The run ended early: this is not of the whole file.</p>"
    name = "standard input" if source == "-" else os.path.basename(source)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">{GENERATOR}'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        'style-src \'unsafe-inline\'"><meta name="viewport" content="width=device-width">'
        f"<title>Report on {said(name)}</title><style>{STYLE}</style></head><body><main>"
        f"<h1>Report on <bdi>{said(name)}</bdi></h1>"
        f"<p>{time.strftime('%Y-%m-%d %H:%M:%S %z')}, labs {said(labs.__version__)}. "
        "Lines that an earlier run has answered are not in it.</p>"
        f"{'' if ended else cut}<dl>{''.join(pairs)}</dl>{''.join(_parts(findings))}"
        "</main></body></html>\n"
    )


def _parts(findings: Findings) -> Iterator[str]:
    """Yield the sections of a report."""
    last = int(findings.seconds / findings.bin_s) + 1
    if sum(findings.tokens):
        rates = [tokens / findings.bin_s for tokens in findings.tokens[:last]]
        times = [duration(place * findings.bin_s) for place in range(len(rates))]
        yield chart("Tokens per second", "from", zip(times, rates, strict=True))
    for title, counts in (("Prompts", findings.prompts), ("Answers", findings.answers)):
        if counts:
            sizes = range(min(counts), max(counts) + 1)
            rows = ((span_of(size), float(counts[size])) for size in sizes)
            yield chart(f"{title} by length", "tokens", rows)
    if findings.reasons:
        yield "<section><h2>How answers ended</h2><table><tbody>"
        for name, count in findings.reasons.most_common():
            share = count / sum(findings.reasons.values())
            yield f"<tr><th scope=row>{said(name)}<td>{count:,}<td>{share:.1%}"
        yield "</tbody></table></section>"
    if findings.errors:
        ordered = sorted(findings.errors.items(), key=lambda each: -each[1][0])
        yield "<section><h2>Errors</h2><div class=wide tabindex=0 role=group aria-label=Errors>"
        yield "<table><thead><tr><th>Error<th>Count<th>Lines</thead><tbody>"
        for text, (count, lines) in ordered:
            more = ", …" if count > len(lines) else ""
            numbers = ", ".join(map(str, sorted(lines, key=lambda line: str(line).zfill(12))))
            yield f"<tr><td>{said(text)}<td>{count:,}<td>{numbers}{more}"
        yield "</tbody></table></div></section>"
    if not findings.sums["lines"]:
        yield "<p>No line was answered in this run.</p>"


def chart(title: str, unit: str, rows: Iterable[tuple[str, float]]) -> str:
    """Return rows as a picture of bars with a table. Names of rows are HTML already."""
    pairs = [*rows]
    most, step = max(value for _, value in pairs) or 1.0, 600 / max(len(pairs), 8)
    bars = "".join(
        f'<rect x="{place * step + 1:.1f}" width="{step * 0.85:.1f}" '
        f'y="{100 - 100 * value / most:.1f}" height="{100 * value / most:.1f}"/>'
        for place, (_, value) in enumerate(pairs)
        if value
    )
    named = "".join(f"<span>{name}</span>" for name, _ in pairs) if len(pairs) <= 8 else ""
    named = named or f"<span>{pairs[0][0]}</span><span>{pairs[-1][0]}</span>"
    few = f" few c{len(pairs)}" if len(pairs) <= 8 else ""
    cells = "".join(f"<tr><th scope=row>{name}<td>{number(value)}" for name, value in pairs)
    return (
        f"<section><h2>{title}</h2><p class=soft>at most {number(most)}</p>"
        f'<svg viewBox="0 0 600 100" preserveAspectRatio="none" role="img" aria-label="{title}: '
        f'at most {number(most)}; the table has all numbers">{bars}</svg>'
        f'<div class="scale{few}">{named}</div><details><summary>The same as a table</summary>'
        f"<table><thead><tr><th scope=col>{unit}<th scope=col>{title}</thead>"
        f"<tbody>{cells}</tbody></table></details></section>"
    )


def span_of(bits: int) -> str:
    """Return which numbers have this bit length."""
    low, high = (1 << bits) >> 1, (1 << bits) - 1
    return str(high) if low >= high else f"{low:,} to {high:,}"


def number(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) or value >= 100 else f"{value:,.1f}"


def duration(seconds: float) -> str:
    """Return seconds as 1.5 s, 2:05 min or 1:02:03 h."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(int(seconds), 60)
    hours, left = divmod(minutes, 60)
    return f"{hours}:{left:02}:{rest:02} h" if hours else f"{minutes}:{rest:02} min"


STYLE = """:root{color-scheme:light dark;background:light-dark(#faf9f6,#16181c);
--soft:light-dark(#5c5f66,#a6abb5);--mark:light-dark(#2b5fc7,#7ba6f7)}
body{margin:0;font:16px/1.5 system-ui;font-variant-numeric:tabular-nums}
main{max-width:56rem;margin:auto;padding:1rem}h1{font-size:1.4rem;overflow-wrap:anywhere}
h2{font-size:1.1rem;margin:0}.soft,dt,.scale,main>p{color:var(--soft)}.soft{margin:0}
main>.bad{color:light-dark(#a51d1d,#ff9a9a)}dt,.soft,.scale{font-size:.85rem}dd{margin:0;
font-weight:600}dl{display:grid;grid-template-columns:repeat(auto-fill,minmax(8.5rem,1fr));gap:1rem}
section{margin:1rem 0;padding:1rem;border:1px solid #8884;border-radius:12px;
background:light-dark(#fff,#1d2026)}svg{display:block;width:100%;height:8rem;
border-bottom:1px solid var(--soft)}rect{fill:var(--mark)}.scale{display:flex;
justify-content:space-between}.few{display:grid;grid-template-columns:repeat(8,1fr)}
.few span{overflow-wrap:anywhere;padding-right:.3rem}.wide{overflow-x:auto}
table{border-collapse:collapse;margin-top:.5rem}th,td{padding:.15rem 1.2rem .15rem 0;
text-align:right;vertical-align:top}th{font-weight:500;color:var(--soft)}
.wide :is(td,th){text-align:left}.wide td:first-child{overflow-wrap:anywhere;min-width:9rem}
summary{width:max-content}:focus-visible{outline:2px solid var(--mark)}
"""
