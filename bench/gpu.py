# SPDX-License-Identifier: Apache-2.0
"""One call for a GPU: models with random weights, against transformers' continuous batching."""

from __future__ import annotations

import random
import statistics
import threading
import time
from typing import Any

import common

import labs

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
    """Return tokens per second of transformers' continuous batching on the same weights."""
    attention = model.model.config._attn_implementation
    model.model.set_attn_implementation("sdpa")
    try:
        return common.manager_rate(model.model, inputs, new)
    finally:
        model.model.set_attn_implementation(attention)


def compare_once(
    model: labs.Model, name: str, inputs: list[labs.Inputs], new: list[int], limit: float
) -> None:
    """Print both rates, and which share of the memory's bandwidth that of labs reads."""
    each = [labs.Generation(max_new_tokens=n, temperature=0.0) for n in new]
    columns = statistics.mean(
        len(one.input_ids) + n / 2 for one, n in zip(inputs, new, strict=True)
    )
    row = model.decoder.weight_bytes / len(inputs)
    row += columns * model.decoder.column_bytes  # bytes that a token has to read
    ours = max(common.batch_rate(model, inputs, len(inputs), generation=each) for _ in range(3))
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
    print(
        f"{common.machine()}; copies {limit / 1e12:.2f} TB/s; tokens/s of labs, continuous batching"
    )
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
