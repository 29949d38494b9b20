# SPDX-License-Identifier: Apache-2.0
"""What only a GPU shows: real CUDA graphs, real memory, the same tokens as transformers there."""

from __future__ import annotations

import dataclasses
import gc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from decoding import FOUR, begin_alike, run_at_random
from kit import (
    PROMPTS,
    asked,
    by_transformers,
    model_around,
    prepare,
    prompt,
    random_model,
    read,
    save_model,
)

import labs
import labs_decode as decode
import labs_engine
import labs_fast as fast
import labs_graphs
import labs_loop as loop
import labs_models

HIDDEN = not torch.cuda.is_available()
pytestmark = pytest.mark.skipif(HIDDEN, reason="needs a GPU, and CUDA_VISIBLE_DEVICES=0")
KINDS = ("llama", "qwen3", "mistral", "mixtral", "phi3", "gpt2", "cohere2", "gemma2", "gemma3_text")
KINDS += ("gpt_oss", "deepseek_v3", *(RECURRENT := ("mamba2", "falcon_h1", "lfm2")))
EXPERTS = ("mixtral", "gpt_oss", "deepseek_v3")
LARGE = {"hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 4}
LARGE |= {"num_attention_heads": 8, "num_key_value_heads": 8, "max_position_embeddings": 8192}


def on_gpu(kind: str, **extra: Any) -> decode.Decoder:
    return prepare(random_model(kind, **extra).cuda())


def captured(batch: decode.Batch) -> list[Any]:
    graphs = batch.cache.captured.values()
    return [each for each in graphs if isinstance(each, labs_graphs.Captured)]


def memory() -> int:
    gc.collect()
    labs.release_memory()
    return torch.cuda.memory_allocated()


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_join_and_leave_on_a_gpu_keep_transformers_tokens(kind: str, caplog: Any) -> None:
    model, graphs = random_model(kind).cuda(), list[Any]()
    expected = [by_transformers(model, each) for each in FOUR]
    decoder = prepare(model)
    found = run_at_random(decoder, FOUR * 3, 2, 3, lambda batch: graphs.extend(captured(batch)))
    assert begin_alike(found, expected)
    if decoder.graphs is None:
        assert kind in RECURRENT
    elif decoder.graphs.failed:  # experts in float32 ask the GPU how many tokens each of them has
        assert kind in EXPERTS, caplog.text
        assert caplog.text.count("steps run without CUDA graphs") == 1
    else:
        assert graphs, "no step was a CUDA graph"


def test_layers_that_read_the_same_input_are_one_product_on_a_gpu() -> None:
    model = random_model("llama").to(torch.bfloat16).cuda()
    ids = torch.tensor([PROMPTS[4]], device="cuda")
    with torch.inference_mode():
        expected = model(ids).logits.float()
        layers = prepare(model).model.model.layers
        assert all(type(each.self_attn.q_proj) is fast.PackedLinear for each in layers)
        assert all(type(each.mlp.down_proj) is torch.nn.Linear for each in layers)
        logits = model(ids).logits.float()
    assert (logits - expected).norm() <= 0.03 * expected.norm()


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("columns", [1, 60, 1500])
def test_attention_of_few_rows_is_sdpas(rows: int, columns: int) -> None:
    torch.manual_seed(rows)
    q = torch.randn(rows, 8, 1, 64, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(rows, 2, 1600, 64, device="cuda", dtype=q.dtype) for _ in "kv")
    k, v = k[:, :, :columns], v[:, :, :columns]
    seen = torch.rand(rows, 1, 1, columns, device="cuda") < 0.7
    seen[..., 0] = True
    mask = decode.additive(seen, q.dtype)
    assert decode._too_few_heads_for_sdpa(q, k)
    found = decode._eager_attention(q, k, v, mask, {"scaling": 0.1}).transpose(1, 2)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    words = {"attn_mask": mask.double(), "scale": 0.1, "enable_gqa": True}
    expected = sdpa(q.double(), k.double(), v.double(), **words)
    assert (found.double() - expected).norm() <= 0.01 * expected.norm()


@pytest.mark.parametrize("seed", range(5))
def test_the_same_logits_give_the_same_draws_on_a_gpu_and_without(seed: int) -> None:
    torch.manual_seed(seed)
    logits = 4 * torch.randn(24, 50_000)
    options = [{"temperature": 0.7, "top_p": 0.9}, {"temperature": 1.5}, {}]
    options += [{"temperature": 1.0, "top_k": 40}, {"temperature": 1.0, "min_p": 0.05}]
    rows = [
        decode.Row(id=i, ids=[1], max_new_tokens=2, sampling=decode.Sampling(seed=i, **each))
        for i, each in enumerate((options * 5)[:24])
    ]
    tokens = [[c.token for c in loop.choose(each, rows)] for each in (logits, logits.cuda())]
    assert tokens[0] == tokens[1]


def test_threads_that_come_and_leave_get_the_text_that_they_get_alone() -> None:
    model = model_around(on_gpu("llama", vocab_size=262), "tiny")
    new, numbers = 40, range(48)
    seeds = [number % 3 or None for number in numbers]
    alone = [
        labs.generate(model, prompt(n, 6 + n), asked(s, new)).text
        for n, s in zip(numbers, seeds, strict=True)
    ]
    engine = labs_engine.Engine(model, labs.Server(max_batch_rows=16, max_waiting=64))

    def ask(number: int) -> str | None:
        answer = engine.submit(prompt(number, 6 + number), asked(seeds[number], new))
        if number % 4 == 3:
            next(answer)
            answer.close()
            return None
        text, end = read(answer)
        assert isinstance(end, labs.Done), end
        return text

    with ThreadPoolExecutor(16) as pool:
        texts = list(pool.map(ask, numbers))
    assert [t for t in texts if t] == [alone[n] for n, t in zip(numbers, texts, strict=True) if t]
    assert engine.status().failures == 0
    assert not model.decoder.graphs.failed
    assert engine.close(deadline_s=5)


def test_a_step_that_runs_out_of_the_gpus_memory_goes_on_with_less() -> None:
    """has_room sees the whole card, so that a limit of torch's own makes real failures."""
    decoder = dataclasses.replace(on_gpu("llama", vocab_size=262, **LARGE), graphs=None)
    model, rows, length = model_around(decoder, "tiny", 8192), 32, 1500
    inputs = [prompt(number, length) for number in range(rows)]
    alone = labs.generate(model, inputs[0], asked(None, 8)).text
    slots = rows * 2048 * decoder.column_bytes
    limit = (memory() + 1.6 * slots) / torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction(limit)
    try:
        running = loop.Loop()
        streams = [
            labs.open_request(model, number, each, asked(None, 8), ())
            for number, each in enumerate(inputs)
        ]
        texts, ended = [""] * rows, 0
        for index, event in labs.run(model, iter(streams), rows, running):
            texts[index] += event.text if isinstance(event, labs.Delta) else ""
            ended += isinstance(event, labs.Done)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert ended == rows
    assert texts[0] == alone


def test_a_model_is_loaded_to_the_gpu_and_its_memory_comes_back(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(vocab_size=262, **LARGE)
    place = save_model(tmp_path / "model", config)
    before = memory()
    spec = labs.ModelSpec(model_name=str(place))
    tables = {"one": labs.Config(model=spec, model_id="one")}
    models = labs_models.Models(labs.msgspec.structs.replace(tables["one"], models=tables))
    engine = models.wait()
    model = engine.model
    assert (model.device, model.dtype) == ("cuda", "bf16")
    assert memory() - before >= model.decoder.weight_bytes
    _, end = read(engine.submit(prompt(1), asked(None, 60)))
    assert isinstance(end, labs.Done), end
    assert not model.decoder.graphs.failed
    del engine, model
    models.close()
    del models
    assert memory() - before < 2**20


@pytest.mark.parametrize("where", ["cuda:0", "cpu", '{"": 0}', "auto"])
def test_a_model_lies_where_device_map_says(where: str, tmp_path: Path) -> None:
    place = save_model(tmp_path / "model", transformers.LlamaConfig(vocab_size=262, **LARGE))
    for dtype in ("auto", "fp16", "fp32"):
        spec = labs.ModelSpec(model_name=str(place), device_map=where, torch_dtype=dtype)
        model = labs.load_model(spec, cached=False)
        devices = {parameter.device.type for parameter in model.model.parameters()}
        assert devices == {"cpu" if where == "cpu" else "cuda"}
        assert labs.generate(model, prompt(2), asked(None, 12)).usage.completion_tokens == 12
