# SPDX-License-Identifier: Apache-2.0
"""The table of labs and its neighbours, each in a process of its own."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from subprocess import DEVNULL, PIPE, Popen
from typing import Any

import numpy
from transformers import ContinuousBatchingConfig

import labs
from bench import parts
from bench.parts import GREEDY, NEW, load, prompts, stories

STREAMS = (1, 4, 8, 16, 32, 64)
REPEATS = 5
MEMORY = 0.1  # of the machine for continuous batching's cache: all neighbours live side by side

# A neighbour loads its model, and answers as many streams as each of its turns says; it notes the
# stream of each token that comes. A turn gets the process that has the model, if it is another.


def in_labs(turns: Any, note: Any, **overrides: Any) -> None:
    model = parts.load_labs(**overrides)
    options = labs.Generation(max_new_tokens=NEW, temperature=0.0, logprobs=0)
    for streams in turns():
        for index, event in labs.stream_batch(model, prompts(model, streams), options):
            note(*[index] * len(getattr(event, "logprobs", ())))


def in_static(turns: Any, note: Any) -> None:
    """transformers' generate: all prompts padded to one batch, which ends with its longest row."""
    model, other = load()
    for streams in turns():
        parts.generate(other, prompts(model, streams), NEW, partial(note, *range(streams)))


def in_batching(turns: Any, note: Any) -> None:
    model, other = load()
    share = {"continuous_batching_config": ContinuousBatchingConfig(max_memory_percent=MEMORY)}
    with other.continuous_batching_context_manager(GREEDY, warmup=False, **share) as manager:
        for streams in turns():
            inputs, new = prompts(model, streams), [NEW] * streams
            for result in parts.answers(manager, inputs, new, streaming=True):
                note(result.request_id)


def in_llama_cpp(turns: Any, note: Any) -> None:
    ask = parts.llama_cpp()
    for _ in turns():
        for _ in ask(stories(1)[0]):
            note(0)


def over_http(turns: Any, note: Any, *command: Any) -> None:
    with parts.Served(*command) as server:
        for streams in turns(server.process.pid):
            with ThreadPoolExecutor(streams) as pool:
                for stream, text in enumerate(stories(streams)):
                    pool.submit(server.ask, text, heard=partial(note, stream))


TOGETHER = ("--continuous-batching", "--cb-max-memory-percent", str(MEMORY))
NEIGHBOURS: dict[str, tuple[Any, ...]] = {
    "labs": (in_labs,),
    "labs, int4": (partial(in_labs, quant_method="int4"),),
    "generate, static batch": (in_static,),
    "continuous batching": (in_batching,),
    "llama-cpp-python, 4 bits": (in_llama_cpp,),
    "labs-api": (over_http, 8441, "labs-api"),
    "transformers serve": (over_http, 8442, "transformers"),
    "serve --continuous-batching": (over_http, 8443, "transformers", *TOGETHER),
}
ALONE = ("llama-cpp-python, 4 bits", "transformers serve")  # whose streams share nothing


def worker(name: str) -> None:
    """Load a neighbour, then measure each number of streams that standard input names."""
    out, sys.stdout = sys.stdout, sys.stderr
    found = defaultdict[Any, list[float]](list)
    report = lambda **values: print(json.dumps(values), file=out, flush=True)  # noqa: E731

    def note(*streams: Any) -> None:
        for stream in streams:
            found[stream].append(time.perf_counter())

    def turns(process: int | str = "self") -> Iterator[int]:
        yield 1  # warms up
        report()
        for line in sys.stdin:
            found.clear()
            began = time.perf_counter()
            yield int(line)
            seconds, times = time.perf_counter() - began, found.values()
            gaps = [gap for each in times for gap in numpy.diff(each)]
            rate, first = sum(map(len, times)) / seconds, [each[0] - began for each in times]
            peak = parts.peak_bytes(process) / 1e6
            report(rate=rate, first_token=first, inter_token=gaps, peak_mb=peak)
        threading.Timer(20, os._exit, [0]).start()  # if a library does not come to an end

    try:
        answer, *more = NEIGHBOURS[name]
        answer(turns, note, *more)
    except (Exception, SystemExit) as error:
        report(error=f"{type(error).__name__}: {error}")
    os._exit(0)  # also if a thread of a library goes on


def table() -> None:
    """Ask all neighbours in turn; print, and write bench.json and docs/bench.svg."""
    about = {"machine": parts.machine(), "new_tokens": NEW, "repeats": REPEATS}
    print(f"{about['machine']}; {REPEATS} rounds of {NEW} new tokens\n", flush=True)
    processes, errors, starts = dict[str, Any](), dict[str, str](), dict[str, float]()
    runs = defaultdict[tuple[str, int], list[dict[str, Any]]](list)

    def read(name: str) -> dict[str, Any]:
        found = json.loads(processes[name].stdout.readline() or '{"error": "the process ended"}')
        errors.update({name: found["error"]} if "error" in found else {})
        return found

    for name in NEIGHBOURS:
        began, command = time.perf_counter(), [sys.executable, "-m", "bench", "--worker", name]
        processes[name] = Popen(command, text=True, stdin=PIPE, stdout=PIPE, stderr=DEVNULL)
        read(name)
        starts[name] = time.perf_counter() - began
        state = errors.get(name, f"{starts[name]:.1f} s to load and answer once")
        print(f"{name:28} {state}", flush=True)
    for streams, name in itertools.product(STREAMS * REPEATS, NEIGHBOURS):
        if name not in errors and (streams == 1 or name not in ALONE):
            print(streams, file=processes[name].stdin, flush=True)
            found = read(name)
            if name not in errors:
                runs[name, streams].append(found)
    head = "tok/s (range)", "first token p50/p95", "inter-token p50/p95", "peak"
    print(f"\n{'':28} streams {head[0]:>20} {head[1]:>22} {head[2]:>20} {head[3]:>9}")
    rows = []
    for name, streams in sorted(runs, key=lambda key: [*NEIGHBOURS].index(key[0])):
        found = runs[name, streams]
        low, rate, high = numpy.percentile([run["rate"] for run in found], (0, 50, 100))
        row = {"neighbour": name, "streams": streams, "start_s": starts[name]}
        row |= {"tokens_per_s": rate, "range": [low, high]}
        cells = [f"{rate:.0f} ({low:.0f}-{high:.0f})"]
        for key in ("first_token", "inter_token"):
            times = [1000 * each for run in found for each in run[key]] or [0.0]
            middle, late = numpy.percentile(times, (50, 95))
            row |= {f"{key}_p50_ms": middle, f"{key}_p95_ms": late}
            cells.append(f"{middle:.0f} / {late:.0f} ms")
        row["peak_mb"] = max(run["peak_mb"] for run in found)
        figures = f"{cells[0]:>20} {cells[1]:>22} {cells[2]:>20} {row['peak_mb']:6.0f} MB"
        print(f"{name:28} {streams:7} {figures}")
        rows.append(row)
    print(*(f"{name}: {error}" for name, error in errors.items()), sep="\n")
    Path("bench.json").write_text(json.dumps(about | {"rows": rows}, indent=1))
    if importlib.util.find_spec("matplotlib"):
        plot(rows)
    else:
        print("docs/bench.svg needs matplotlib")
    for process in processes.values():
        process.stdin.close()  # it ends its server, if it has one
        process.wait()


def plot(rows: list[dict[str, Any]]) -> None:
    """Draw tokens a second over streams."""
    from matplotlib import pyplot

    pyplot.switch_backend("svg")
    pyplot.rcParams["svg.hashsalt"] = "labs"  # the same file for the same figures
    figure, axes = pyplot.subplots(figsize=(7, 4))
    for name, mine in itertools.groupby(rows, lambda row: row["neighbour"]):
        x, y = zip(*((row["streams"], row["tokens_per_s"]) for row in mine), strict=True)
        axes.plot(x, y, marker="o", label=name, linewidth=2.5 if "labs" in name else 1.2)
    axes.set(xscale="log", xlabel="streams", ylabel="tokens per second", ylim=(0, None))
    axes.set_xticks(STREAMS, map(str, STREAMS))
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig("docs/bench.svg", bbox_inches="tight", metadata={"Date": None})
