# SPDX-License-Identifier: Apache-2.0
"""The table of labs and its neighbours, each in a process of its own; the report of a GPU."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import random
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from subprocess import DEVNULL, PIPE, Popen
from types import SimpleNamespace
from typing import Any

import numpy
import torch
from transformers import AutoConfig, AutoModelForCausalLM, ContinuousBatchingConfig

import labs
import labs_decode
import labs_fast
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


FIELDS = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads")
FIELDS += ("num_key_value_heads", "head_dim", "intermediate_size", "vocab_size")
SHAPES = {  # random weights: nothing is downloaded
    "tiny": ("llama", 64, 2, 4, 2, 16, 128, 512),
    "1B": ("llama", 2048, 16, 32, 8, 64, 8192, 128256),
    "8B": ("llama", 4096, 32, 32, 8, 128, 14336, 128256),
    "0.6B": ("qwen3", 1024, 28, 16, 8, 128, 3072, 151936),
}


def random_model(shape: str, device: str) -> labs.Model:
    options: dict[str, Any] = dict(zip(FIELDS, SHAPES[shape], strict=True))
    options |= {"max_position_embeddings": 8192, "eos_token_id": None, "pad_token_id": 0}
    config = AutoConfig.for_model(**options)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    decoder = labs_decode.prepare(model)
    decoder = labs_fast.speed_up(decoder, None, batch_invariant=True, cuda_graphs=True)
    letters = SimpleNamespace(decode=lambda ids, **_: "a" * len(ids))  # random weights say nothing
    spec, lock = labs.ModelSpec(), threading.Lock()
    return labs.Model(decoder, letters, spec, device, "bf16", 8192, frozenset(), {}, 0.0, lock)


def measure(model: labs.Model, name: str, lengths: list[int], new: list[int], limit: float) -> None:
    """Print both rates, and which share of the memory's bandwidth that of labs reads."""
    inputs = parts.random_inputs(lengths, model.model.config.vocab_size)
    each = [labs.Generation(max_new_tokens=n, temperature=0.0) for n in new]
    run = lambda: parts.stream_batch(model, inputs, len(inputs), generation=each)  # noqa: E731
    ours = max(parts.rate(run) for _ in range(3))
    attention, theirs = model.model.config._attn_implementation, 0.0
    model.model.set_attn_implementation("sdpa")
    try:
        theirs = max(parts.manager_rate(model.model, inputs, new) for _ in range(2))
    except Exception as error:  # a version of it that does not run here
        print(f"  continuous batching: {type(error).__name__}: {error}")
    finally:
        model.model.set_attn_implementation(attention)
    # The bytes that a token has to read: its share of the weights, and its row of the cache.
    columns = numpy.mean(lengths) + numpy.mean(new) / 2
    read = model.decoder.weight_bytes / len(inputs) + columns * model.decoder.column_bytes
    used = f"{ours * read / limit:9.0%} of the bandwidth"
    print(f"{name:44} {ours:9.0f} {theirs:9.0f} {used}", flush=True)


def gpu_report(*shapes: str) -> None:
    """Measure what a GPU does with random weights, in less than 8 minutes."""
    device, size = ("cuda", 2**30) if torch.cuda.is_available() else ("cpu", 2**27)
    source, target = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))

    def copy() -> int:
        target.copy_(source)
        if device == "cuda":
            torch.cuda.synchronize()
        return 2 * size  # bytes read and written

    limit = max(parts.rate(copy) for _ in range(10))
    copies = f"copies {limit / 1e12:.2f} TB/s"
    print(f"{parts.machine()}; {copies}; tokens/s of labs, continuous batching")
    for shape in shapes or ("1B", "8B", "0.6B"):
        model, small, draw = random_model(shape, device), shape == "tiny", random.Random(0)
        for streams in (1, 4) if small else (1, 8, 32, 64, 128):
            name, new = f"{shape}, {streams} x 128 tokens, 128 new", [16 if small else 128]
            measure(model, name, [128] * streams, new * streams, limit)
        if shape in ("0.6B", "tiny"):  # nano-vllm's workload
            count = 8 if small else 256
            lengths = [draw.randint(100, 1024) for _ in range(count)]
            new = [draw.randint(100, 1024) // (100 if small else 1) for _ in range(count)]
            name = f"{shape}, {count} x 100-1,024 tokens, as many new"
            measure(model, name, lengths, new, limit)
        del model
        labs.release_memory()
