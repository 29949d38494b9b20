# SPDX-License-Identifier: Apache-2.0
"""The table: labs and its neighbours, each in a process of its own, asked in turn."""

from __future__ import annotations

import atexit
import concurrent.futures
import contextlib
import functools
import itertools
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import servers
from common import NEW, load, prompts, stories

import labs

STREAMS = (1, 4, 8, 16, 32, 64)
REPEATS = 5
MEMORY = 0.1  # of the machine for continuous batching's cache: all neighbours live side by side


class Tokens:
    """When each token of each stream came."""

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.times: dict[Any, list[float]] = {}

    def add(self, stream: Any, count: int = 1) -> None:
        self.times.setdefault(stream, []).extend([time.perf_counter()] * count)

    def figures(self) -> dict[str, Any]:
        seconds, times = time.perf_counter() - self.began, self.times.values()
        return {
            "rate": sum(map(len, times)) / seconds,
            "first": [each[0] - self.began for each in times],
            "gaps": [b - a for each in times for a, b in itertools.pairwise(each)],
            "bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }


Ask = Callable[[int, Tokens], Any]  # answers a number of streams and notes their tokens


def in_labs(**overrides: Any) -> Ask:
    model = common.no_end(labs.load_model(labs.load_config(env={}, overrides=overrides)))
    options = labs.Generation(max_new_tokens=NEW, temperature=0.0, logprobs=0)

    def ask(streams: int, found: Tokens) -> None:
        for index, event in labs.stream_batch(model, prompts(model, streams), options):
            if isinstance(event, labs.Delta):
                found.add(index, len(event.logprobs))

    return ask


def in_static() -> Ask:
    """transformers' generate: all prompts padded to one batch, which ends with its longest row."""
    model, other = load()

    def ask(streams: int, found: Tokens) -> None:
        def note(ids: Any, scores: Any, **kwargs: Any) -> Any:
            for stream in range(streams):
                found.add(stream)
            return ids.new_zeros(len(ids)).bool()

        common.generate(other, prompts(model, streams), NEW, [note])

    return ask


def in_batching() -> Ask:
    """transformers' continuous batching."""
    from transformers import ContinuousBatchingConfig

    model, other = load()
    share = ContinuousBatchingConfig(max_memory_percent=MEMORY)
    stack = contextlib.ExitStack()
    manager = stack.enter_context(common.batching(other, continuous_batching_config=share))
    atexit.register(stack.close)

    def ask(streams: int, found: Tokens) -> None:
        ended = 0
        for each in prompts(model, streams):
            manager.add_request(list(each.input_ids), max_new_tokens=NEW, streaming=True)
        while ended < streams:
            if (result := manager.get_result(timeout=60)) is not None:
                found.add(result.request_id)
                ended += result.is_finished()

    return ask


def in_llama_cpp() -> Ask:
    llama, words = common.llama_cpp(), {"max_tokens": NEW, "temperature": 0, "stream": True}

    def ask(streams: int, found: Tokens) -> None:
        llama.reset()
        chat = [{"role": "user", "content": stories(streams)[0]}]
        for piece in llama.create_chat_completion(chat, **words):
            if piece["choices"][0]["delta"].get("content"):
                found.add(0)

    return ask


def over_http(command: list[str], port: int) -> Ask:
    server = common.Served(command, port, servers.model_folder())
    atexit.register(server.process.terminate)

    def ask(streams: int, found: Tokens) -> dict[str, Any]:
        with concurrent.futures.ThreadPoolExecutor(streams) as pool:
            for number, text in enumerate(stories(streams)):
                pool.submit(server.ask, text, heard=functools.partial(found.add, number))
        status = Path(f"/proc/{server.process.pid}/status").read_text().split("VmHWM:")[1]
        return {"bytes": 1024 * int(status.split()[0])}

    return ask


def serve(port: int, *more: str) -> Ask:
    return over_http(common.serve_command(servers.model_folder(), *more), port)


TOGETHER = ("--continuous-batching", "--cb-max-memory-percent", str(MEMORY))
NEIGHBOURS: dict[str, tuple[bool, Callable[[], Ask]]] = {  # whether streams share anything
    "labs": (True, in_labs),
    "labs, int4": (True, lambda: in_labs(quant_method="int4")),
    "generate, static batch": (True, in_static),
    "continuous batching": (True, in_batching),
    "llama-cpp-python, 4 bits": (False, in_llama_cpp),
    "labs-api": (True, lambda: over_http(common.api_command(servers.model_folder()), 8441)),
    "transformers serve": (False, lambda: serve(8442)),
    "serve --continuous-batching": (True, lambda: serve(8443, *TOGETHER)),
}


def worker(name: str) -> None:
    """Load a neighbour, then measure each number of streams that standard input names."""
    out, sys.stdout = sys.stdout, sys.stderr
    try:
        ask = NEIGHBOURS[name][1]()
        ask(1, Tokens())
        print(json.dumps({"loaded": True}), file=out, flush=True)
        for line in sys.stdin:
            more = ask(int(line), found := Tokens())
            print(json.dumps(found.figures() | (more or {})), file=out, flush=True)
    except (Exception, SystemExit) as error:
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}), file=out, flush=True)


class Worker:
    """A neighbour in a process of its own."""

    def __init__(self, name: str) -> None:
        self.name, self.found, began = name, dict[int, list[Any]](), time.perf_counter()
        command = [sys.executable, str(Path(__file__).parent), "--worker", name]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, text=True, **pipes)  # type: ignore[call-overload]
        self.error = self._read().get("error")
        self.start_s = time.perf_counter() - began

    def _read(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        return json.loads(line) if line else {"error": "the process ended"}

    def measure(self, streams: int) -> None:
        if self.error or (streams > 1 and not NEIGHBOURS[self.name][0]):
            return
        self.process.stdin.write(f"{streams}\n")
        self.process.stdin.flush()
        found = self._read()
        self.error = found.get("error")
        if not self.error:
            self.found.setdefault(streams, []).append(found)

    def leave(self) -> None:
        self.process.stdin.close()  # it ends its server, if it has one
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:  # a thread of its library goes on
            self.process.kill()

    def row(self, streams: int) -> dict[str, Any]:
        """Return medians: tokens a second with their range, and milliseconds."""
        runs = self.found[streams]
        rates = sorted(run["rate"] for run in runs)
        row = {"neighbour": self.name, "streams": streams, "start_s": self.start_s}
        row |= {"tokens_per_s": statistics.median(rates), "range": [rates[0], rates[-1]]}
        for name, key in (("first_token", "first"), ("inter_token", "gaps")):
            times = sorted(time for run in runs for time in run[key]) or [0.0]
            row[f"{name}_p50_ms"] = 1000 * times[len(times) // 2]
            row[f"{name}_p95_ms"] = 1000 * times[int(0.95 * len(times))]
        return {**row, "peak_mb": max(run["bytes"] for run in runs) / 1e6}


def table() -> None:
    """Ask all neighbours in turn; print, and write bench.json and docs/bench.svg."""
    print(f"{common.machine()}; {REPEATS} rounds of {NEW} new tokens\n", flush=True)
    workers = []
    for name in NEIGHBOURS:
        workers.append(each := Worker(name))
        state = each.error or f"{each.start_s:.1f} s to load and answer once"
        print(f"{name:28} {state}", flush=True)
    for streams, each in itertools.product(STREAMS * REPEATS, workers):
        each.measure(streams)
    rows = [each.row(streams) for each in workers for streams in each.found]
    show(rows)
    print(*(f"{each.name}: {each.error}" for each in workers if each.error), sep="\n")
    told = {"machine": common.machine(), "new_tokens": NEW, "repeats": REPEATS, "rows": rows}
    Path("bench.json").write_text(json.dumps(told, indent=1))
    plot(rows)
    for each in workers:
        each.leave()


def show(rows: list[dict[str, Any]]) -> None:
    head = "tok/s (range)", "first token p50/p95", "inter-token p50/p95", "peak"
    print(f"\n{'':28} streams {head[0]:>20} {head[1]:>22} {head[2]:>20} {head[3]:>9}")
    for row in rows:
        rates = "{tokens_per_s:.0f} ({range[0]:.0f}-{range[1]:.0f})".format(**row)
        first = "{first_token_p50_ms:.0f} / {first_token_p95_ms:.0f} ms".format(**row)
        gaps = "{inter_token_p50_ms:.0f} / {inter_token_p95_ms:.0f} ms".format(**row)
        start = f"{row['neighbour']:28} {row['streams']:7} {rates:>20} {first:>22} {gaps:>20}"
        print(f"{start} {row['peak_mb']:6.0f} MB")


def plot(rows: list[dict[str, Any]]) -> None:
    """Draw tokens a second over streams."""
    try:
        import matplotlib
    except ImportError:
        print("docs/bench.svg needs matplotlib")
        return
    matplotlib.use("svg")
    from matplotlib import pyplot

    pyplot.rcParams["svg.hashsalt"] = "labs"  # the same file for the same figures
    figure, axes = pyplot.subplots(figsize=(7, 4))
    for name in dict.fromkeys(row["neighbour"] for row in rows):
        mine = [row for row in rows if row["neighbour"] == name]
        x, y = ([row[key] for row in mine] for key in ("streams", "tokens_per_s"))
        axes.plot(x, y, marker="o", label=name, linewidth=2.5 if "labs" in name else 1.2)
    axes.set(xscale="log", xlabel="streams", ylabel="tokens per second", ylim=(0, None))
    axes.set_xticks(STREAMS, map(str, STREAMS))
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig("docs/bench.svg", bbox_inches="tight", metadata={"Date": None})
