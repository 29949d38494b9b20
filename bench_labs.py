# /// script
# requires-python = ">=3.11"
# dependencies = ["labs-gen", "httpx", "transformers[serving]"]
#
# [tool.uv.sources]
# labs-gen = { path = ".", editable = true }
# ///
# SPDX-License-Identifier: Apache-2.0
"""Measure labs beside transformers in one run: same model, dtype, prompts and number of tokens.

    uv run bench_labs.py [single many context arrivals sampling long memory start]
    uv run bench_labs.py [serving overhead manners]

Each row is the median of interleaved pairs with its 90 % bootstrap interval: machines drift, the
ratios of one run do not. All is greedy and without end-of-sequence: both sides do equal work.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import random
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx

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
    pairs = [(ours(), theirs()) for _ in range(PAIRS + 1)][1:]
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

    batches: list[Any] = []
    for index, each in enumerate(inputs):
        sampling = labs_decode.Sampling(**options)
        row = labs_decode.Row(
            id=index, ids=list(each.input_ids), max_new_tokens=new, sampling=sampling
        )
        batch = labs_decode.enter(model.decoder, row)
        while batch.pending:
            batch = labs_decode.prefill(model.decoder, batch)
        batch, _ = labs_decode.step(model.decoder, batch)
        batches = labs_decode.place(model.decoder, batches, batch)
    return lambda: [labs_decode.step(model.decoder, batch) for batch in batches]


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
        began, found = time.perf_counter(), 0
        manager = other.init_continuous_batching(generation_config=config)
        manager.start()
        try:
            for one, length in zip(inputs, lengths, strict=True):
                manager.add_request(list(one.input_ids), max_new_tokens=length)
            while found < len(inputs):
                result = manager.get_result(timeout=60)
                found += result is not None and result.is_finished()
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
    batch = labs_decode.prefill(model.decoder, labs_decode.enter(model.decoder, row))
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
        raise SystemExit(f"{' '.join(command)}: does not answer")

    def ask(self, prompt: str, new: int = NEW) -> int:
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
                    if pieces == 1:
                        self.first.append(time.perf_counter() - began)
        return pieces

    def rate(self, texts: list[str]) -> float:
        """Tokens per second of all clients together, each in a thread of its own."""
        began = time.perf_counter()
        with concurrent.futures.ThreadPoolExecutor(len(texts)) as pool:
            pieces = sum(pool.map(self.ask, texts))
        return pieces / (time.perf_counter() - began)

    def p95(self) -> float:
        return sorted(self.first)[int(0.95 * len(self.first))]


API = [sys.executable, "-c", "import labs_api; labs_api.main()"]


def stories() -> list[str]:
    draw = random.Random(3)
    topics = [" and ".join(draw.choices(WORDS, k=3)) for _ in range(16)]
    return [f"Tell me a long story about {topic}." for topic in topics]


@contextlib.contextmanager
def servers(folder: str) -> Iterator[dict[str, Served]]:
    """labs-api and `transformers serve` without and with continuous batching, on one model."""
    ours = [*API, "--model", folder, "--port"]
    theirs = [str(Path(sys.executable).with_name("transformers")), "serve", folder]
    theirs += ["--log-level", "error", "--port"]
    commands = {"labs": ours, "serve": theirs, "batching": [*theirs[:3], "--continuous-batching"]}
    commands["batching"] += theirs[3:]
    found: dict[str, Served] = {}
    try:
        for port, (name, command) in enumerate(commands.items(), 8431):
            found[name] = Served([*command, str(port)], port, folder)
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
    names = ("labs_num_requests_running ", "labs_num_requests_waiting ")
    return sum(int(float(x.split()[1])) for x in text.splitlines() if x.startswith(names))


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


PARTS = (single, many, context, arrivals, sampling, long, memory, start, serving, overhead, manners)


def main() -> None:
    wanted = sys.argv[1:] or [part.__name__ for part in PARTS]
    print(f"{'':58} {'labs':>8} {'other':>8} {'ratio':>6} 90 % interval")
    for part in (part for part in PARTS if part.__name__ in wanted):
        part()


if __name__ == "__main__":
    main()
