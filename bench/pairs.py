# SPDX-License-Identifier: Apache-2.0
"""Parts that run labs and a peer in one process, in turn."""

from __future__ import annotations

import functools
import importlib.util
import json
import random
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import msgspec
from common import NEW, PAIRS, compare, load, prompts, rate_of

import labs
import labs_decode
import labs_jsonl
import labs_loop
import labs_prefixes
import labs_request
import labs_typed


def single() -> None:
    """One row alone, streamed and in one piece, against transformers' generate."""
    model, other = load()
    one = prompts(model, 1)
    plain = labs.load_model(labs.load_config(env={}, overrides={"batch_invariant": False}))
    theirs = functools.partial(common.generate_rate, other, one)

    def streamed() -> float:
        return rate_of(lambda: [*labs.stream_generate(model, one[0], max_new_tokens=NEW)], NEW)

    def whole(model: labs.Model = model) -> float:
        return rate_of(lambda: labs.generate(model, one[0], max_new_tokens=NEW), NEW)

    compare("1 row, streamed / generate", streamed, theirs)
    compare("1 row, not streamed / generate", whole, theirs)
    compare("1 row, batch_invariant on / off", whole, lambda: whole(common.no_end(plain)))


def many() -> None:
    """Short rows in one batch, against generate one at a time and on a static batch."""
    model, other = load()
    for rows in (8, 16, 32):
        inputs = prompts(model, rows)
        ours = functools.partial(common.batch_rate, model, inputs, rows, max_new_tokens=NEW)
        for name, part in (("generate one at a time", inputs[:1]), ("static batch", inputs)):
            theirs = functools.partial(common.generate_rate, other, part)
            compare(f"{rows} short rows / {name}", ours, theirs)


class Paced:
    """transformers' generate in a thread that does a few steps at a time: one prefill is paid."""

    def __init__(self, other: Any, inputs: list[labs.Inputs], steps: int) -> None:
        self.go, self.done = threading.Semaphore(0), threading.Semaphore(0)
        run = functools.partial(common.generate, other, inputs, steps, [self._pause])
        threading.Thread(target=run, daemon=True).start()
        self.done.acquire()  # prefill and the first token

    def _pause(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        self.done.release()
        self.go.acquire()
        return input_ids.new_zeros(len(input_ids)).bool()

    def step(self) -> None:
        self.go.release()
        self.done.acquire()


def slots(model: labs.Model, inputs: list[labs.Inputs], new: int, **options: Any) -> Any:
    """Prefill all rows into one batch and return the function that steps it."""
    batches: list[Any] = []
    for index, each in enumerate(inputs):
        sampling, ids = labs_decode.Sampling(**options), list(each.input_ids)
        row = labs_decode.Row(id=index, ids=ids, max_new_tokens=new, sampling=sampling)
        batch = labs_decode.new_batch(model.decoder, row)
        while batch.pending:
            batch = labs_decode.prefill(model.decoder, batch)
        batch, _ = labs_loop.step(model.decoder, batch)
        batches = labs_loop.join_best(model.decoder, batches, batch)
    return lambda: [labs_loop.step(model.decoder, batch) for batch in batches]


def steps_rate(step: Callable[[], Any], count: int, rows: int) -> Callable[[], float]:
    return lambda: rate_of(lambda: [step() for _ in range(count)], rows * count)


def context() -> None:
    """Decoding behind long prompts, against generate."""
    model, other = load()
    for rows, length in ((32, 512), (1, 2048)):
        inputs, block = prompts(model, rows, length), 4
        steps = block * (PAIRS + 2) + 2
        paced, ours = Paced(other, inputs, steps), slots(model, inputs, steps)
        name = f"{rows} rows x {length} tokens of context, decode / generate"
        compare(name, *(steps_rate(step, block, rows) for step in (ours, paced.step)))


def sampling() -> None:
    """32 rows that sample, against 32 greedy ones."""
    model, _ = load()
    inputs, steps = prompts(model, 32), 8 * (PAIRS + 2)
    drawn = slots(model, inputs, steps, temperature=0.7, top_p=0.9, seed=1)
    pair = (steps_rate(each, 8, 32) for each in (drawn, slots(model, inputs, steps)))
    compare("32 rows, temperature 0.7 and top_p 0.9 / greedy", *pair)


def long() -> None:
    """Fifteen short rows with and without one row of 8,000 tokens beside them."""
    model, _ = load()
    short, steps = prompts(model, 15, 100), 4 * (PAIRS + 2)
    both = [*short, *prompts(model, 1, 8000)]
    pair = (steps_rate(slots(model, each, steps), 4, 15) for each in (both, short))
    compare("15 short rows beside one of 8k tokens / without it", *pair)


def arrivals() -> None:
    """40 requests of 8 to 64 new tokens, 16 rows at once, against transformers' own manager."""
    model, other = load()
    inputs, draw = prompts(model, 40), random.Random(2)
    lengths = [draw.randint(8, 64) for _ in inputs]
    each = [labs.Generation(max_new_tokens=length) for length in lengths]
    ours = functools.partial(common.batch_rate, model, inputs, 16, generation=each)
    theirs = functools.partial(common.manager_rate, other, inputs, lengths)
    compare("arrivals and departures, 16 rows / continuous batching", ours, theirs)


PEAK = """
import sys, resource, common, labs
rows, length, new = map(int, sys.argv[1:])
model = common.no_end(labs.load_model(labs.load_config(env={})))
common.batch_rate(model, common.prompts(model, rows, length), rows, max_new_tokens=new)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def memory() -> None:
    """Peak memory of 32 rows of 512 tokens less that of one token, over the bytes of the cache."""
    cache = load()[0].decoder.column_bytes * 32 * 512

    def peak(*arguments: str) -> int:
        command, here = [sys.executable, "-c", PEAK, *arguments], Path(__file__).parent
        paths = {**common.os.environ, "PYTHONPATH": str(here.parent)}
        return int(subprocess.run(command, stdout=-1, check=True, cwd=here, env=paths).stdout)

    found = [(peak("32", "504", "8") - peak("1", "1", "1")) / cache for _ in range(3)]
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
    """How long commands take to start."""
    model, _ = load()
    folder, dtype = model.model.name_or_path, str(model.model.dtype).removeprefix("torch.")
    code = "import sys, labs_cli; sys.exit(labs_cli.main())"

    def starts_per_second(code: str, *arguments: str) -> float:
        command = [sys.executable, "-c", code, *arguments]
        quiet = {"capture_output": True, "check": True, "stdin": subprocess.DEVNULL}
        return rate_of(lambda: subprocess.run(command, **quiet), 1)

    arguments = ("--prompt", "Hello!", "--max-new-tokens", "1")
    ours = functools.partial(starts_per_second, code, *arguments)
    bare = functools.partial(starts_per_second, BARE.format(folder=folder, dtype=dtype))
    compare("starts a second: one token / bare transformers script", ours, bare)
    for name, command in (("--help", (code, "--help")), ("import", ("import labs, labs_cli",))):
        times = [[1000 / starts_per_second(*c) for c in (command, ("",))] for _ in range(PAIRS)]
        whole = statistics.median(a for a, _ in times)
        above = statistics.median(a - b for a, b in times)
        print(f"{name:58} {whole:5.0f} ms, {above:.0f} ms above bare Python", flush=True)


def typed() -> None:
    """16 rows held to a schema beside 16 rows without; its answers are as long."""
    model, _ = load()
    inputs, options = prompts(model, 16), labs.Generation(max_new_tokens=NEW, temperature=0.0)
    fields = {name: {"type": "string", "minLength": 90} for name in ("name", "story", "moral")}
    schema = {"type": "object", "properties": fields, "required": [*fields]}

    def rate(held: bool) -> float:
        streams = (
            labs.open_request(
                model, i, each, options, (labs_typed.Constraint(model, schema),) if held else ()
            )
            for i, each in enumerate(inputs)
        )
        return rate_of(lambda: common.tokens_of(labs.run(model, streams, 16)))

    compare("16 rows, with a schema / without", lambda: rate(True), lambda: rate(False))


Prompts = list[tuple[str, labs.Inputs]]


def lines(model: labs.Model, count: int) -> Prompts:
    """Make prompts of 20 to 400 tokens behind the template's own."""
    draw, found = random.Random(2), Prompts()
    while len(found) < count:
        text = " ".join(draw.choices(common.WORDS, k=draw.randint(1, 375)))
        inputs = labs.build_inputs(model, prompt=text)
        if 20 <= len(inputs.input_ids) <= 400:
            found.append((text, inputs))
    return found


def file_rate(model: labs.Model, part: Prompts) -> float:
    """Return tokens per second from opening a file of prompts to writing the last answer."""
    config, tally = labs.load_config(env={}), labs_jsonl.Tally()
    config = labs.evolve(config, generation=labs.Generation(max_new_tokens=NEW, temperature=0.0))
    with tempfile.TemporaryDirectory() as folder:
        source, target = f"{folder}/prompts.jsonl", f"{folder}/answers.jsonl"
        Path(source).write_text("".join(json.dumps({"prompt": text}) + "\n" for text, _ in part))
        context = labs_request.open_context(config)
        answer = functools.partial(labs_jsonl.answer_lines, model, context, tally=tally)
        labs_jsonl.answer_file(answer, source, target, tally)
    return tally.rate


def static_rate(other: Any, part: Prompts, rows: int) -> float:
    """Return the rate of generate on the same prompts, sorted by length, `rows` a batch."""
    ordered = sorted((each for _, each in part), key=lambda each: len(each.input_ids))
    batches = [ordered[first : first + rows] for first in range(0, len(ordered), rows)]
    run = lambda: [common.generate_rate(other, each) for each in batches]  # noqa: E731
    return rate_of(run, len(ordered) * NEW)


def llama_rate(llama: Any, part: Prompts) -> float:
    words = {"max_tokens": NEW, "temperature": 0}
    chats = [[{"role": "user", "content": text}] for text, _ in part]
    answers = (llama.create_chat_completion(chat, **words) for chat in chats)
    return rate_of(lambda: sum(answer["usage"]["completion_tokens"] for answer in answers))


def batch() -> None:
    """A file of 512 prompts, one part a pair, each part answered by all in turn."""
    model, other = load()
    whole = lines(model, 512)
    parts = [whole[first::PAIRS] for first in range(PAIRS)]
    trials = {rows: static_rate(other, parts[0], rows) for rows in (16, 32, 64)}
    print(f"static batch, tokens/s by rows: {trials}", flush=True)
    best = max(trials, key=lambda rows: trials[rows])
    peers = {f"static batch of {best}": lambda part: static_rate(other, part, best)}
    if importlib.util.find_spec("llama_cpp"):
        rate = functools.partial(llama_rate, common.llama_cpp())
        peers["llama-cpp-python, one stream"] = lambda part: rate(part[:: len(part) // 20])
    found = [(file_rate(model, part), [peer(part) for peer in peers.values()]) for part in parts]
    for place, name in enumerate(peers):
        pairs = [(ours, theirs[place]) for ours, theirs in found]
        common.report(f"512 prompts of 20 to 400 tokens / {name}", pairs)


def prefix() -> None:
    """Time to first token of a conversation's second turn over that of its first."""
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
