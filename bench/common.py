# SPDX-License-Identifier: Apache-2.0
"""What every part of the benchmark uses: prompts, models, rates, ratios, and servers to ask."""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import httpx

import labs

PAIRS = 11
NEW = 64
WORDS = ("fox", "river", "mountain", "python", "battery", "cloud", "king", "music", "water")
WORDS += ("light",)
API = [sys.executable, "-c", "import labs_cli; labs_cli.main_api()"]


def compare(name: str, ours: Callable[[], float], theirs: Callable[[], float]) -> None:
    """Print the median ratio of two rates measured in turn; the first pair only warms up."""
    report(name, [(ours(), theirs()) for _ in range(PAIRS + 1)][1:])


def report(name: str, pairs: list[tuple[float, float]]) -> None:
    """Print the medians of both sides, and of their ratio with its 90 % bootstrap interval."""
    ratios = [a / b for a, b in pairs]
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(2000))
    a, b = (statistics.median(side) for side in zip(*pairs, strict=True))
    interval = f"[{medians[100]:.2f}, {medians[1899]:.2f}]"
    print(f"{name:58} {a:8.1f} {b:8.1f} {statistics.median(ratios):6.2f} {interval}", flush=True)


def median_p95(name: str, values: list[float]) -> None:
    ordered = sorted(values)
    middle, late = statistics.median(ordered), ordered[int(0.95 * len(ordered))]
    print(f"{name:58} median {middle * 1000:6.1f} ms, p95 {late * 1000:6.1f} ms", flush=True)


def machine() -> str:
    """Name the processor or GPU, and the versions of torch and transformers."""
    import torch
    import transformers

    info = Path("/proc/cpuinfo")
    names = info.read_text().split("model name\t: ")[1:2] if info.exists() else []
    name = names[0].splitlines()[0] if names else platform.processor()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else name
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    return f"{device}, {os.cpu_count()} CPUs, {versions}"


def prompts(model: labs.Model, count: int, length: int | None = None) -> list[labs.Inputs]:
    """Make short chat prompts, or `length` random tokens each."""
    draw = random.Random(1)
    texts = [" and ".join(draw.choices(WORDS, k=draw.randint(1, 8))) for _ in range(count)]
    if length is None:
        return [labs.build_inputs(model, prompt=f"Tell me about {text}.") for text in texts]
    ids = [tuple(draw.randrange(1000, 20000) for _ in range(length)) for _ in range(count)]
    return [labs.Inputs(each, "") for each in ids]


def stories(count: int = 16) -> list[str]:
    draw = random.Random(3)
    topics = [" and ".join(draw.choices(WORDS, k=3)) for _ in range(count)]
    return [f"Tell me a long story about {topic}." for topic in topics]


def no_end(model: labs.Model) -> labs.Model:
    """Return the model without end-of-sequence ids, so that every row has its full length."""
    return labs.msgspec.structs.replace(model, eos_token_ids=frozenset())


def load() -> tuple[labs.Model, Any]:
    """Return the model of labs, and the same weights as transformers loads them."""
    from transformers import AutoModelForCausalLM

    model = labs.load_model(labs.load_config(env={}))
    source = model.model.name_or_path
    other = AutoModelForCausalLM.from_pretrained(source, dtype=model.model.dtype).eval()
    other.generation_config.eos_token_id = None
    return no_end(model), other


def rate_of(run: Callable[[], Any], tokens: int = 0) -> float:
    """Return tokens per second of one call, which returns their number unless it is given."""
    began = time.perf_counter()
    found = run()
    return (tokens or found) / (time.perf_counter() - began)


def batch_rate(model: labs.Model, inputs: list[labs.Inputs], rows: int, **options: Any) -> float:
    """Return tokens per second of stream_batch, prefill included."""
    return rate_of(lambda: tokens_of(labs.stream_batch(model, inputs, batch_rows=rows, **options)))


def tokens_of(events: Iterable[tuple[int, labs.Event]]) -> int:
    return sum(e.usage.completion_tokens for _, e in events if isinstance(e, labs.Done))


def padded(inputs: list[labs.Inputs]) -> dict[str, Any]:
    """Return left-padded ids and their mask, as transformers' generate takes them."""
    import torch

    longest = max(len(each.input_ids) for each in inputs)
    ids = [(0,) * (longest - len(each.input_ids)) + each.input_ids for each in inputs]
    mask = [[int(c >= longest - len(e.input_ids)) for c in range(longest)] for e in inputs]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def generate(other: Any, inputs: list[labs.Inputs], new: int, stopping: Any = ()) -> None:
    """Run transformers' generate on a static batch; `stopping` is called after each step."""
    words = {"max_new_tokens": new, "do_sample": False, "pad_token_id": 0}
    other.generate(**padded(inputs), **words, stopping_criteria=[*stopping])


def generate_rate(other: Any, inputs: list[labs.Inputs], new: int = NEW) -> float:
    """Return tokens per second of transformers' generate on a static, left-padded batch."""
    return rate_of(lambda: generate(other, inputs, new), len(inputs) * new)


@contextlib.contextmanager
def batching(other: Any, **options: Any) -> Iterator[Any]:
    """Run transformers' continuous batching: greedy, without end-of-sequence."""
    from transformers import GenerationConfig

    config = GenerationConfig(do_sample=False, pad_token_id=0, eos_token_id=-1, max_new_tokens=NEW)
    manager = other.init_continuous_batching(generation_config=config, **options)
    manager.start()
    try:
        yield manager
    finally:
        manager.stop(block=True)


def manager_rate(other: Any, inputs: list[labs.Inputs], lengths: list[int]) -> float:
    """Return tokens per second of continuous batching once it has started."""
    with batching(other) as manager:
        began = time.perf_counter()
        for one, length in zip(inputs, lengths, strict=True):
            manager.add_request(list(one.input_ids), max_new_tokens=length)
        found = 0
        while found < len(inputs):
            result = manager.get_result(timeout=60)
            found += result is not None and result.is_finished()
        return sum(lengths) / (time.perf_counter() - began)


def llama_cpp() -> Any:
    """Load the 4-bit file itself with llama-cpp-python."""
    from llama_cpp import Llama

    import labs_sources

    file = str(labs_sources.package_file(labs.DEFAULT_MODEL))
    return Llama(file, n_ctx=2048, n_threads=os.cpu_count(), verbose=False)


class Served:
    """A server in a process of its own, and clients that measure it."""

    def __init__(self, command: list[str], port: int, model: str) -> None:
        self.url, self.model = f"http://127.0.0.1:{port}", model
        quiet = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
        self.process = subprocess.Popen([*command, "--port", str(port)], **quiet)
        self.first: list[float] = []  # seconds to the first text
        for _ in range(240):
            try:
                if self.ask("Hello!", 2):
                    return
            except (httpx.HTTPError, OSError):
                time.sleep(0.5)
        self.process.terminate()
        raise SystemExit(f"{' '.join(command)}: does not answer")

    def ask(self, prompt: str, new: int = NEW, heard: Callable[[], Any] = int) -> int:
        """Stream one chat completion; return the number of pieces, which are tokens."""
        body = {"model": self.model, "messages": [{"role": "user", "content": prompt}]}
        body |= {"max_tokens": new, "temperature": 0, "stream": True}
        began, pieces = time.perf_counter(), 0
        url = f"{self.url}/v1/chat/completions"
        with httpx.stream("POST", url, json=body, timeout=300) as response:
            response.raise_for_status()
            for line in response.iter_lines():
                if '"content":"' in line.replace(": ", ":") and '"content":""' not in line:
                    pieces += 1
                    heard()
                    if pieces == 1:
                        self.first.append(time.perf_counter() - began)
        return pieces

    def whole(self, text: str) -> int:
        """Ask for an answer in one piece; return its number of tokens."""
        body = {"prompt": text, "max_new_tokens": NEW, "temperature": 0}
        answer = httpx.post(f"{self.url}/generate", json=body, timeout=300)
        return int(answer.json()["usage"]["completion_tokens"])

    def rate(self, texts: list[str], ask: Callable[[str], int] | None = None) -> float:
        """Return tokens per second of all clients together, each in a thread of its own."""
        with concurrent.futures.ThreadPoolExecutor(len(texts)) as pool:
            return rate_of(lambda: sum(pool.map(ask or self.ask, texts)))

    def p95(self) -> float:
        return sorted(self.first)[int(0.95 * len(self.first))]


def api_command(folder: str) -> list[str]:
    return [*API, "--model", folder]


def serve_command(folder: str, *more: str) -> list[str]:
    transformers = str(Path(sys.executable).with_name("transformers"))
    return [transformers, "serve", folder, "--log-level", "error", *more]
