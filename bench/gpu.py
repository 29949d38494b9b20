# SPDX-License-Identifier: Apache-2.0
"""The report of a GPU: random weights in the shapes of known models, so nothing is downloaded."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy
import torch
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import linear, scaled_dot_product_attention
from transformers import AutoConfig, AutoModelForCausalLM

import labs
import labs_decode
import labs_faster
from bench import parts

FIELDS = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads")
FIELDS += ("num_key_value_heads", "head_dim", "intermediate_size", "vocab_size")
SHAPES = {  # random weights: nothing is downloaded
    "tiny": ("llama", 64, 2, 4, 2, 16, 128, 512),
    "1B": ("llama", 2048, 16, 32, 8, 64, 8192, 128256),
    "8B": ("llama", 4096, 32, 32, 8, 128, 14336, 128256),
    "0.6B": ("qwen3", 1024, 28, 16, 8, 128, 3072, 151936),
}


def random_model(
    shape: str,
    device: str,
    spec: labs.ModelSpec = labs.ModelSpec(torch_dtype="bf16"),  # noqa: B008
) -> labs.Model:
    options: dict[str, Any] = dict(zip(FIELDS, SHAPES[shape], strict=True))
    options |= {"max_position_embeddings": 8192, "eos_token_id": None, "pad_token_id": 0}
    config = AutoConfig.for_model(**options)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    lock = threading.Lock()
    decoder = labs_faster.speed_up(labs_decode.prepare(model), spec)
    letters = SimpleNamespace(decode=lambda ids, **_: "a" * len(ids))  # random weights say nothing
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


def seconds(run: Callable[[], Any], device: str, times: int = 10) -> float:
    """Return the median time of a call, with all that it started on the device."""
    wait = torch.cuda.synchronize if device == "cuda" else int
    found = []
    for _ in range(times + 2):  # two warm up
        began = time.perf_counter()
        run()
        wait()
        found.append(time.perf_counter() - began)
    return float(numpy.median(found[2:]))


def first_token(model: labs.Model, name: str, tokens: int) -> None:
    """Print the time to the first token beside that of the products of as many tokens alone."""
    (prompt,) = parts.random_inputs([tokens], model.model.config.vocab_size)
    ours = seconds(lambda: labs.generate(model, prompt, max_new_tokens=1), model.device, 5)
    at = model.model.config
    width, dim = at.hidden_size, at.head_dim
    sizes = [(width, (at.num_attention_heads + 2 * at.num_key_value_heads) * dim)]
    sizes += [(at.num_attention_heads * dim, width), (width, 2 * at.intermediate_size)]
    sizes += [(at.intermediate_size, width)]
    options: Any = {"device": model.device, "dtype": torch.bfloat16}
    pairs = [(torch.randn(tokens, a, **options), torch.randn(b, a, **options)) for a, b in sizes]

    def products() -> None:
        for _ in range(at.num_hidden_layers):
            for x, weight in pairs:
                linear(x, weight)

    alone = seconds(products, model.device, 5)
    print(f"{name:44} {1000 * ours:6.1f} ms, {ours / alone:.2f} x its products alone", flush=True)


def invariance(model: labs.Model, name: str, rows: int, beside: int) -> None:
    """Print how many rows have the same logprobs alone and beside others, greedy and seeded."""
    inputs = parts.random_inputs([100] * (rows + beside), model.model.config.vocab_size)
    for words in ({"temperature": 0.0}, {"temperature": 0.7, "seed": 1}):
        options = labs.Generation(max_new_tokens=32, logprobs=0, **words)
        answers = partial(labs.stream_batch, model, generation=options)
        alone = [logprobs(answers([each]), 1)[0] for each in inputs[:rows]]
        together = logprobs(answers(inputs, batch_rows=len(inputs)), rows)
        same = sum(map(list.__eq__, alone, together))
        print(f"{name}, {words}: {same} of {rows} have the same bits", flush=True)


def logprobs(events: Any, rows: int) -> list[list[float]]:
    """Return the log-probabilities of the tokens of the first rows."""
    found: list[list[float]] = [[] for _ in range(rows)]
    for index, event in events:
        if index < rows:
            found[index] += [each.logprob for each in getattr(event, "logprobs", ())]
    return found


def attention(device: str, limit: float, small: bool) -> None:
    """Print how long ways of attending to long slots take, beside reading keys and values once."""
    for rows, columns in ((1, 64), (4, 64)) if small else ((1, 16384), (32, 2048), (64, 512)):
        options: Any = {"device": device, "dtype": torch.bfloat16}
        q = torch.randn(rows, 32, 1, 128, **options)
        k, v = (torch.randn(rows, 8, columns, 128, **options) for _ in "kv")
        mask = torch.zeros(rows, 1, 1, columns, **options)
        least = 1e6 * (k.nbytes + v.nbytes) / limit
        for way, run in ways_to_attend(q, k, v, mask).items():
            name = f"attention, {rows} x {columns}, {way}"
            try:
                took = f"{1e6 * seconds(run, device):9.0f} us ({least:.0f} to read)"
            except Exception as error:  # a version of it that does not run here
                took = f"{type(error).__name__}: {error!s:.100}"
            print(f"{name:64} {took}", flush=True)


def ways_to_attend(q: Any, k: Any, v: Any, mask: Any) -> dict[str, Callable[[], Any]]:
    """Return functions that attend with q [B, 32, 1, 128] to k, v [B, 8, T, 128]."""
    module, words = SimpleNamespace(num_key_value_groups=4, is_causal=False), {"attn_mask": mask}
    grouped = q.view(len(q), 8, 4, 128)
    flexible: Any = torch.compile(flex_attention, dynamic=False)
    return {
        "labs": lambda: labs_decode.attention(module, q, k, v, mask, scaling=0.1),  # type: ignore[arg-type]
        "sdpa": lambda: scaled_dot_product_attention(q, k, v, enable_gqa=True, **words),
        "sdpa, heads that share keys as queries": lambda: scaled_dot_product_attention(
            grouped, k, v, **words
        ),
        "flex_attention, compiled, without a mask": lambda: flexible(q, k, v, enable_gqa=True),
    }


def gpu_report(*shapes: str) -> None:
    """Measure what a GPU does with random weights; one shape at a time where time is short."""
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
        print(f"{shape}: {model.decoder.why_forward}")
        for streams in (1, 4) if small else (1, 8, 32, 64, 128):
            name, new = f"{shape}, {streams} x 128 tokens, 128 new", [16 if small else 128]
            measure(model, name, [128] * streams, new * streams, limit)
        if shape in ("0.6B", "tiny"):  # nano-vllm's workload
            count = 8 if small else 256
            lengths = [draw.randint(100, 1024) for _ in range(count)]
            new = [draw.randint(100, 1024) // (100 if small else 1) for _ in range(count)]
            name = f"{shape}, {count} x 100-1,024 tokens, as many new"
            measure(model, name, lengths, new, limit)
        first_token(model, f"{shape}, first token", 64 if small else 2048)
        invariance(model, f"{shape}, bits", 4 if small else 48, 3 if small else 15)
        del model
        labs.release_memory()
    attention(device, limit, "tiny" in shapes)
