# SPDX-License-Identifier: Apache-2.0
"""The decode batch against transformers' own loop, on tiny random models of many kinds."""

from __future__ import annotations

import dataclasses
import functools
import gc
import itertools
import math
import random
import sys
import weakref
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kit import (
    ARCHITECTURES,
    BASE,
    DULL,
    NEW_TOKENS,
    PROMPTS,
    by_transformers,
    newcomer,
    prepare,
    random_model,
    row_of,
)
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.generation import logits_process

import labs
import labs_decode as decode
import labs_fast as fast
import labs_forward as forward_room
import labs_loop as loop
import labs_prefixes as prefixes_room


def finish(decoder: decode.Decoder, batch: decode.Batch, steps: int = NEW_TOKENS - 1) -> list[int]:
    for _ in range(steps):
        batch, _ = loop.step(decoder, batch)
    return batch.rows[0].ids[batch.rows[0].prompt_length :]


@pytest.fixture(scope="module")
def reference() -> dict[str, tuple[Any, list[list[int]]]]:
    """Models by kind with transformers' own greedy tokens, made when first asked for."""
    found: dict[str, tuple[Any, list[list[int]]]] = {}

    class Made(dict):  # type: ignore[type-arg]
        def __missing__(self, kind: str) -> Any:
            model = random_model(kind)
            found[kind] = model, [by_transformers(model, prompt) for prompt in PROMPTS]
            self[kind] = found[kind]
            return found[kind]

    return Made()


@pytest.mark.parametrize("kind", [*ARCHITECTURES, *DULL])
def test_the_table_tells_how_each_model_type_runs(kind: str) -> None:
    config = AutoConfig.for_model(kind, **{**BASE, **{**ARCHITECTURES, **DULL}[kind][1]})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert decode.mode_of(model)[0] == {**ARCHITECTURES, **DULL}[kind][0]


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_rows_that_join_and_leave_at_random_keep_transformers_tokens(
    kind: str, reference: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr(decode, "CHUNK", 7)
    model, expected = reference[kind]
    assert min(len(set(tokens)) for tokens in expected) >= 8
    decoder = prepare(model)
    if decoder.mode == "alone":
        found = [finish(decoder, newcomer(decoder, prompt)) for prompt in PROMPTS]
        assert found == expected
        return
    chance = random.Random(1)
    waiting, batch, answers = list(range(len(PROMPTS))), None, {}
    while waiting or batch:
        while waiting and chance.random() < 0.5:
            key = waiting.pop(chance.randrange(len(waiting)))
            new = newcomer(decoder, PROMPTS[key], key)
            batch = decode.join(batch, new) if batch else new
        if batch is None:
            continue
        batch, _ = loop.step(decoder, batch)
        done = [
            r
            for r in batch.rows
            if sum(r.generated.values()) == NEW_TOKENS or chance.random() < 0.02
        ]
        answers |= {row.id: row.ids[row.prompt_length :] for row in done}
        batch = decode.keep(batch, [row.id for row in batch.rows if row.id not in answers])
    assert all(answers[key] == expected[key][: len(answers[key])] for key in range(len(PROMPTS)))


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    plan=st.lists(st.tuples(st.integers(0, 7), st.integers(2, NEW_TOKENS)), min_size=1, max_size=12)
)
def test_any_plan_of_arrivals_and_lengths_keeps_each_rows_tokens(plan: Any, reference: Any) -> None:
    model, expected = reference["llama"]
    decoder = prepare(model)
    answers: dict[int, list[int]] = {}

    def step(batch: decode.Batch) -> decode.Batch | None:
        batch, _ = loop.step(decoder, batch)
        done = [row for row in batch.rows if sum(row.generated.values()) == plan[row.id][1]]
        answers.update({row.id: row.ids[row.prompt_length :] for row in done})
        return decode.keep(batch, [row.id for row in batch.rows if row.id not in answers])

    batch = None
    for key, (prompt, _) in enumerate(plan):
        new = newcomer(decoder, PROMPTS[prompt], key)
        batch = decode.join(batch, new) if batch else new
        for _ in range(3):
            batch = step(batch) if batch else None
    while batch:
        batch = step(batch)
    wanted = {key: expected[prompt][:length] for key, (prompt, length) in enumerate(plan)}
    assert answers == wanted


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "gpt_oss", "mamba2", "bamba"])
def test_a_prompt_in_chunks_gives_the_logits_of_a_whole_one(kind: str, monkeypatch: Any) -> None:
    decoder = prepare(random_model(kind))
    prompt = [random.Random(5).randrange(3, 200) for _ in range(61)]
    whole = decode.forward(decoder, newcomer(decoder, prompt))
    monkeypatch.setattr(decode, "CHUNK", 7)
    chunked = decode.forward(decoder, newcomer(decoder, prompt))
    assert torch.allclose(whole, chunked, atol=2e-3)
    assert whole.argmax() == chunked.argmax()


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3", "opt", "mixtral", "deepseek_v3"])
def test_short_prompts_in_one_row_give_each_the_logits_it_has_alone(kind: str) -> None:
    decoder = prepare(random_model(kind))
    prompts = [prompt for prompt in PROMPTS if len(prompt) > 1]
    entered = [decode.new_batch(decoder, row_of(prompt)) for prompt in prompts]
    together = loop.prompts_for_one_call(decoder, entered)
    assert [each.rows[0].ids for each in together] == prompts
    for batch, prompt in zip(forward_room.prefill_packed(decoder, together), prompts, strict=True):
        alone = decode.prefill(decoder, decode.new_batch(decoder, row_of(prompt)))
        torch.testing.assert_close(batch.logits, alone.logits, atol=1e-4, rtol=1e-3)
        stepped = [loop.step(decoder, each)[0] for each in (batch, alone)]
        logits = [decode.forward(decoder, each) for each in stepped]
        torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("kind", ["gemma3_text", "mistral", "mamba2", "bamba", "gptj"])
def test_prompts_whose_cache_is_more_than_keys_and_values_go_one_at_a_time(kind: str) -> None:
    decoder = prepare(random_model(kind))
    entered = [decode.new_batch(decoder, row_of(prompt)) for prompt in PROMPTS[2:5]]
    shares = kind == "gptj" and decoder.mode == "joins"
    assert len(loop.prompts_for_one_call(decoder, entered)) == (3 if shares else 1)


def test_prompts_share_a_call_up_to_one_chunk_and_never_with_one_of_a_single_token() -> None:
    decoder = prepare(random_model("llama"))
    found = []
    for lengths in ([100, 100, 100], [100, 1, 100], [1, 100], [300, 5], [256], [255, 2]):
        entered = [decode.new_batch(decoder, row_of([5] * length)) for length in lengths]
        found.append(len(loop.prompts_for_one_call(decoder, entered)))
    assert found == [2, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("masked", [True, False])
def test_products_of_many_queries_go_in_blocks(masked: bool, monkeypatch: Any) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 11, 8), torch.randn(2, 2, 11, 8), torch.randn(2, 2, 11, 8)
    mask = torch.rand(2, 1, 11, 11) < 0.5 if masked else None
    if mask is not None:
        mask[..., 0] = True
    whole = decode._eager_attention(q, k, v, mask, {"softcap": 3.0})
    monkeypatch.setattr(decode, "CHUNK", 4)
    torch.testing.assert_close(decode._eager_attention(q, k, v, mask, {"softcap": 3.0}), whole)


def test_memory_that_runs_out_on_a_cpu_is_known_by_its_words() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**55, dtype=torch.uint8)
    assert decode.out_of_memory(caught.value)
    assert not decode.out_of_memory(RuntimeError("shapes cannot be multiplied"))


def test_encoder_decoder_layers_are_no_part_of_the_table() -> None:
    assert not {"t5", "bart"} & set(ARCHITECTURES)


@pytest.mark.parametrize("rope", ["longrope", "dynamic"])
def test_positions_that_look_at_the_whole_call_run_alone(rope: str) -> None:
    model = random_model("llama")
    model.config.rope_parameters = {"rope_type": rope, "rope_theta": 1e4, "factor": 2.0}
    assert decode.mode_of(model)[0] == "alone"


def test_a_model_that_takes_its_cache_by_an_unknown_name_runs_alone(monkeypatch: Any) -> None:
    model = random_model("llama")
    monkeypatch.setattr(decode, "CACHE_PARAMETERS", ("memory",))
    assert decode.mode_of(model)[0] == "alone"


def test_a_cache_layer_of_an_unknown_class_runs_alone(monkeypatch: Any) -> None:
    monkeypatch.delitem(decode._LAYERS, decode.cache_utils.DynamicLayer)
    how, why = decode.mode_of(random_model("llama"))
    assert how == "alone"
    assert "DynamicLayer" in why


def test_a_forward_that_failed_halfway_can_be_repeated_with_the_same_logits(reference: Any) -> None:
    decoder = prepare(reference["llama"][0])
    batch = decode.join(newcomer(decoder, PROMPTS[4], 1), newcomer(decoder, PROMPTS[2], 2))
    expected = decode.forward(decoder, batch)
    layer = decoder.model.model.layers[2]
    hook = layer.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("broken")))
    with pytest.raises(RuntimeError, match="broken"):
        loop.step(decoder, batch)
    hook.remove()
    assert torch.equal(decode.forward(decoder, batch), expected)


def test_letting_a_batch_go_frees_its_buffers_at_once(reference: Any) -> None:
    decoder = prepare(reference["llama"][0])
    batch = newcomer(decoder, PROMPTS[3])
    gc.disable()
    try:
        buffer = weakref.ref(batch.cache.layers[0].keys)
        del batch
        assert buffer() is None
    finally:
        gc.enable()


def test_a_row_in_a_used_slot_sees_nothing_of_the_one_before(reference: Any) -> None:
    model, expected = reference["llama"]
    decoder = prepare(model)
    batch = decode.join(
        newcomer(decoder, PROMPTS[0], "short"), newcomer(decoder, PROMPTS[5], "long")
    )
    for _ in range(5):
        batch, _ = loop.step(decoder, batch)
    kept = decode.keep(batch, ["short"])
    assert kept is not None
    batch = decode.join(kept, newcomer(decoder, PROMPTS[2], "next"))
    for _ in range(NEW_TOKENS - 1):
        batch, _ = loop.step(decoder, batch)
    assert batch.rows[1].ids[len(PROMPTS[2]) :] == expected[2]


def test_one_long_row_goes_to_a_batch_of_its_own_when_its_padding_outweighs_the_weights(
    reference: Any,
) -> None:
    decoder = prepare(reference["llama"][0])
    long = newcomer(decoder, [5] * 300, "long")
    per_column = long.cache.bytes_per_column
    light = decode.replace(decoder, weight_bytes=per_column * 250)
    heavy = decode.replace(decoder, weight_bytes=per_column * 5000)
    short = newcomer(decoder, [5] * 10, "short")
    assert [len(batch.rows) for batch in loop.join_best(light, [short], long)] == [1, 1]
    assert [len(batch.rows) for batch in loop.join_best(heavy, [short], long)] == [2]


# ---------------------------------------------------------------- little memory

NO_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def joined(decoder: decode.Decoder, keys: Sequence[int]) -> decode.Batch:
    batch = newcomer(decoder, PROMPTS[keys[0]], keys[0])
    for key in keys[1:]:
        batch = decode.join(batch, newcomer(decoder, PROMPTS[key], key))
    return batch


def answers_of(decoder: decode.Decoder, batches: Sequence[decode.Batch]) -> dict[int, list[int]]:
    """Step each batch until all of its rows have their tokens."""
    found: dict[int, list[int]] = {}
    for batch in batches:
        while batch:
            batch, _ = loop.step(decoder, batch)
            done = [row for row in batch.rows if sum(row.generated.values()) == NEW_TOKENS]
            found |= {row.id: row.ids[row.prompt_length :] for row in done}
            batch = decode.keep(batch, [row.id for row in batch.rows if row.id not in found])
    return found


def failing_at(call: int, monkeypatch: Any, layer: type, method: str) -> None:
    """Let one call of a layer's method run out of memory; those before and after it work."""
    calls, original = itertools.count(), getattr(layer, method)

    def once(*args: Any) -> Any:
        if next(calls) == call:
            raise NO_MEMORY
        return original(*args)

    monkeypatch.setattr(layer, method, once)


def test_a_halved_batch_of_slots_has_the_logits_that_it_had(reference: Any) -> None:
    decoder = prepare(reference["llama"][0])
    batch = joined(decoder, [2, 3, 4, 5, 6])
    expected = decode.forward(decoder, batch)
    for size in (3, 2, 1):
        (batch,) = forward_room.split_after_oom(decoder, batch)
        assert batch.at_once == size
        assert torch.equal(decode.forward(decoder, batch), expected)
    assert forward_room.split_after_oom(decoder, batch) == []


@pytest.mark.parametrize("kind", ["mamba2", "bamba", "mamba", "lfm2", "falcon_h1"])
def test_a_halved_batch_of_states_goes_on_with_transformers_tokens(
    kind: str, reference: Any, monkeypatch: Any
) -> None:
    model, expected = reference[kind]
    decoder = prepare(model)
    batch = joined(decoder, range(5))
    for _ in range(4):
        batch, _ = loop.step(decoder, batch)
    layers = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))
    handle = layers[2].register_forward_hook(lambda *_: (_ for _ in ()).throw(NO_MEMORY))
    with pytest.raises(torch.OutOfMemoryError):
        loop.step(decoder, batch)
    handle.remove()
    monkeypatch.setattr(decode, "CHUNK", 7)
    halves = forward_room.split_after_oom(decoder, batch)
    assert [len(half.rows) for half in halves] == [3, 2]
    assert answers_of(decoder, halves) == dict(enumerate(expected[:5]))


def test_one_row_with_states_cannot_be_halved(reference: Any) -> None:
    decoder = prepare(reference["mamba2"][0])
    assert forward_room.split_after_oom(decoder, newcomer(decoder, PROMPTS[3])) == []


@pytest.mark.parametrize("columns", [64, 128])
def test_making_room_that_failed_halfway_can_be_repeated(
    columns: int, reference: Any, monkeypatch: Any
) -> None:
    model, expected = reference["llama"]
    decoder = prepare(model)
    batch = joined(decoder, [0, 1])
    failing_at(2, monkeypatch, decode.SlotLayer, "resize")
    with pytest.raises(torch.OutOfMemoryError):
        batch.cache.make_room(2, columns)
    batch, _ = loop.step(decoder, batch)
    batch.cache.make_room(2, columns)
    for key in (2, 3, 4):  # the last one doubles the rows once more
        batch = decode.join(batch, newcomer(decoder, PROMPTS[key], key))
    assert answers_of(decoder, [batch]) == dict(enumerate(expected[:5]))


def test_making_room_for_a_shorter_row_after_a_longer_one_found_none(
    reference: Any, monkeypatch: Any
) -> None:
    model, expected = reference["llama"]
    decoder = prepare(model)
    batch = joined(decoder, [0, 1])
    failing_at(2, monkeypatch, decode.SlotLayer, "resize")
    with pytest.raises(torch.OutOfMemoryError):
        batch.cache.make_room(2, 128)
    for key in (2, 3, 4):
        batch = decode.join(batch, newcomer(decoder, PROMPTS[key], key))
    assert answers_of(decoder, [batch]) == dict(enumerate(expected[:5]))


@pytest.mark.parametrize("method", ["resize", "write"])
@pytest.mark.parametrize("kind", ["llama", "mamba2", "bamba"])
def test_a_newcomer_that_memory_does_not_hold_beside_others_stays_in_its_own_batch(
    kind: str, method: str, reference: Any, monkeypatch: Any
) -> None:
    model, expected = reference[kind]
    decoder = prepare(model)
    batch, new = joined(decoder, [0, 1]), newcomer(decoder, PROMPTS[2], 2)
    layer = decode.SlotLayer if kind == "llama" else decode.StateLayer
    failing_at(1, monkeypatch, layer, method)
    batches = loop.join_best(decoder, [batch], new)
    assert [[row.id for row in each.rows] for each in batches] == [[0, 1], [2]]
    assert answers_of(decoder, batches) == dict(enumerate(expected[:3]))


def test_an_error_that_is_not_about_memory_is_no_reason_for_a_batch_of_its_own(
    reference: Any, monkeypatch: Any
) -> None:
    decoder = prepare(reference["llama"][0])
    batch, new = joined(decoder, [0, 1]), newcomer(decoder, PROMPTS[2], 2)
    monkeypatch.setattr(decode, "join", lambda *_: (_ for _ in ()).throw(RuntimeError("broken")))
    with pytest.raises(RuntimeError, match="broken"):
        loop.join_best(decoder, [batch], new)


@pytest.mark.parametrize(("live", "columns"), [(1, 64), (2, 64 + 2 * 64)])
def test_room_for_a_newcomer_counts_the_rows_that_double_for_it(
    live: int, columns: int, reference: Any, monkeypatch: Any
) -> None:
    decoder = prepare(reference["llama"][0])
    batch = joined(decoder, [0, 1])
    kept = decode.keep(batch, range(live))
    new = decode.new_batch(decoder, row_of(PROMPTS[2]))
    needed = columns * batch.cache.bytes_per_column / decode.MEMORY_SHARE
    for free, fits in ((needed, False), (needed + 4, True)):
        monkeypatch.setattr(decode, "available_bytes", lambda device, free=free: free)
        assert loop.has_room(decoder, [kept], [new]) is fits  # type: ignore[list-item]


def test_room_for_several_newcomers_counts_all_of_them(reference: Any, monkeypatch: Any) -> None:
    decoder = prepare(reference["llama"][0])
    new = [decode.new_batch(decoder, row_of(prompt)) for prompt in PROMPTS[2:6]]
    slots = sum(each.cache.cursor.columns for each in new) * decoder.column_bytes
    for free, fits in ((slots, False), (8 * slots, True)):
        monkeypatch.setattr(decode, "available_bytes", lambda device, free=free: free)
        assert loop.has_room(decoder, [], new) is fits


class Moody:
    """A configuration that raises where its layers differ, as transformers' may."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(name)


def test_a_configuration_that_does_not_tell_gives_no_estimate_and_no_error() -> None:
    assert decode._int_of(Moody(), "head_dim") == 0


def test_packing_keeps_no_plain_weight() -> None:
    model = random_model("llama")
    weights = [
        weakref.ref(module.weight)
        for module in model.modules()
        if isinstance(module, torch.nn.Linear)
    ]
    decoder = prepare(model)
    gc.collect()
    assert [ref for ref in weights if ref() is not None] == []
    assert decoder.weight_bytes > 0


def test_a_layer_with_a_hook_is_not_packed() -> None:
    model = random_model("llama")
    model.lm_head.register_forward_hook(lambda *args: None)
    prepare(model)
    assert type(model.lm_head) is torch.nn.Linear


def test_a_first_newcomer_always_has_room(reference: Any, monkeypatch: Any) -> None:
    decoder = prepare(reference["llama"][0])
    monkeypatch.setattr(decode, "available_bytes", lambda device: 0)
    assert loop.has_room(decoder, [], [decode.new_batch(decoder, row_of(PROMPTS[2]))])


@pytest.mark.parametrize(
    "kind", [kind for kind, (how, _) in ARCHITECTURES.items() if how != "alone"]
)
def test_a_configuration_tells_the_bytes_of_a_column(kind: str, reference: Any) -> None:
    own = kind in ("gpt2", "opt", "gptj")  # has no such word, and would take BASE's for its own
    model = random_model(kind, num_key_value_heads=4) if own else reference[kind][0]
    decoder = prepare(model)
    cache = newcomer(decoder, PROMPTS[3]).cache
    assert decoder.column_bytes == cache.bytes_per_column


def test_as_many_rows_are_run_as_memory_holds_and_one_at_least(
    reference: Any, monkeypatch: Any
) -> None:
    decoder = prepare(reference["llama"][0])
    row = loop.TYPICAL_COLUMNS * decoder.column_bytes / decode.MEMORY_SHARE
    for free, rows in ((0, 1), (5 * row, 5), (1e15, loop.MOST_ROWS)):
        monkeypatch.setattr(decode, "available_bytes", lambda device, free=free: int(free))
        assert loop.rows_in_memory(decoder) == rows


def test_a_model_that_runs_alone_has_one_row_and_one_of_states_has_as_many_as_allowed(
    reference: Any,
) -> None:
    rows = [loop.rows_in_memory(prepare(reference[kind][0])) for kind in ("rwkv", "mamba2")]
    assert rows == [1, loop.MOST_ROWS]


# ---------------------------------------------------------------- packed weights

packs = pytest.mark.skipif(not torch._C._has_mkldnn, reason="torch has no oneDNN here")
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def linear_of(
    dtype: torch.dtype, *, bias: bool = False, wide: int = 96, out: int = 160
) -> torch.nn.Linear:
    torch.manual_seed(4)
    return torch.nn.Linear(wide, out, bias=bias).to(dtype).requires_grad_(False)


def packed(linear: torch.nn.Linear, method: str | None = None) -> fast.PackedLinear:
    return fast.PackedLinear(linear, fast.FusedWeight([linear], fast.PACKINGS[method]), 0)


@packs
@dtypes
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 96), (7, 96), (3, 5, 96), (2, 1, 96)])
def test_a_packed_layer_gives_what_the_plain_one_gives(
    shape: tuple[int, ...], bias: bool, dtype: torch.dtype
) -> None:
    linear = linear_of(dtype, bias=bias)
    x = torch.randn(*shape).to(dtype)
    found = packed(linear)(x)
    expected = torch.nn.functional.linear(x, linear.weight, linear.bias)
    assert (found.shape, found.dtype) == (expected.shape, dtype)
    torch.testing.assert_close(found, expected)


@packs
@dtypes
def test_a_row_of_a_packed_product_has_the_same_bits_beside_any_others(dtype: torch.dtype) -> None:
    layer = packed(linear_of(dtype))
    x = torch.randn(64, 96).to(dtype)
    whole = layer(x)
    for rows in range(2, 65):
        assert torch.equal(layer(x[:rows]), whole[:rows])


@packs
@dtypes
def test_a_packed_layer_gives_its_weight_back_exactly(dtype: torch.dtype) -> None:
    linear = linear_of(dtype, wide=97)
    assert torch.equal(packed(linear).weight, linear.weight)


class Quantised(torch.nn.Linear):
    """Stands for the layers of bitsandbytes, which are linear layers with other weights."""


@packs
def test_packing_leaves_alone_what_is_no_plain_layer_of_a_packed_type() -> None:
    model = torch.nn.ModuleDict(
        {
            "plain": linear_of(torch.float32),
            "short": linear_of(torch.float16),
            "other": Quantised(4, 4),
            "meta": torch.nn.Linear(4, 4, device="meta"),
            "embedding": torch.nn.Embedding(4, 4),
        }
    )
    before = dict(model.items())
    fast.pack(model)
    assert [name for name, child in model.items() if child is not before[name]] == ["plain"]
    assert isinstance(model["plain"], fast.PackedLinear)


@packs
def test_packing_twice_changes_nothing() -> None:
    model = torch.nn.Sequential(linear_of(torch.float32))
    fast.pack(model)
    packed = model[0]
    fast.pack(model)
    assert model[0] is packed


@packs
def test_the_plain_weights_are_freed_by_packing() -> None:
    model = torch.nn.Sequential(
        linear_of(torch.float32), torch.nn.Sequential(linear_of(torch.bfloat16))
    )
    weights = [weakref.ref(model[0].weight), weakref.ref(model[1][0].weight)]
    gc.disable()
    try:
        fast.pack(model)
        assert [weight() for weight in weights] == [None, None]
    finally:
        gc.enable()


class Reads(torch.nn.Module):
    """Three layers that read one input, as attention's."""

    def __init__(self, dtype: torch.dtype = torch.float32, bias: tuple[bool, ...] = (False,) * 3):
        super().__init__()
        for name, out, has in zip(("q_proj", "k_proj", "v_proj"), (32, 16, 16), bias, strict=True):
            setattr(self, name, linear_of(dtype, out=out, bias=has))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [self.q_proj(x), self.k_proj(x), self.v_proj(x)]


@packs
@dtypes
@pytest.mark.parametrize("bias", [(False,) * 3, (True,) * 3])
def test_layers_that_read_the_same_input_are_one_product(
    bias: tuple[bool, ...], dtype: torch.dtype, monkeypatch: Any
) -> None:
    model = Reads(dtype, bias)
    x = torch.randn(5, 96).to(dtype)
    expected = model(x)
    calls: list[Any] = []

    def counted(weight: torch.Tensor) -> fast.PackedWeight:
        product = fast.onednn_weight(weight)
        return dataclasses.replace(
            product, multiply=lambda *a: calls.append(a) or product.multiply(*a)
        )

    monkeypatch.setitem(fast.PACKINGS, None, counted)
    fast.pack(model)
    torch.testing.assert_close(model(x), expected)
    assert len(calls) == 1
    assert model.q_proj.fused.last == (None, ())  # nothing of a request stays


@packs
def test_one_of_several_layers_may_be_asked_alone_in_any_order_and_by_threads() -> None:
    model = Reads()
    inputs = [torch.randn(5, 96) for _ in range(8)]
    expected = [model(x) for x in inputs]
    fast.pack(model)

    def ask(index: int) -> None:
        for _ in range(50):
            for name, part in zip(("v_proj", "q_proj", "k_proj"), (2, 0, 1), strict=True):
                found = getattr(model, name)(inputs[index])
                torch.testing.assert_close(found, expected[index][part])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(ask, range(8)))


@packs
@pytest.mark.parametrize("bias", [(True, False, False), (True, True, False)])
def test_layers_that_differ_are_packed_one_by_one(bias: tuple[bool, ...]) -> None:
    model = Reads(bias=bias)
    fast.pack(model)
    assert len({model.q_proj.fused, model.k_proj.fused, model.v_proj.fused}) == 3


# ---------------------------------------------------------------- weights in fewer bits

METHODS = ("int8", "int4")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("method", "off"), [("int8", 0.01), ("int4", 0.12)])
@pytest.mark.parametrize("out", [48, 50])
def test_a_product_in_fewer_bits_is_near_the_whole_one_and_is_the_one_of_its_weight(
    out: int, method: str, off: float, dtype: torch.dtype
) -> None:
    linear = linear_of(dtype, out=out, bias=True)
    layer = packed(linear, method)
    x = torch.randn(2, 3, 96).to(dtype)
    found, whole = layer(x).float(), torch.nn.functional.linear(x, linear.weight, linear.bias)
    assert (found.shape, layer.weight.shape) == (whole.shape, linear.weight.shape)
    assert (found - whole.float()).norm() <= off * whole.float().norm()
    read = x.float() @ layer.weight.float().t() + linear.bias.float()
    torch.testing.assert_close(found, read, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_of_a_product_in_fewer_bits_has_the_same_bits_alone(
    method: str, dtype: torch.dtype
) -> None:
    layer = packed(linear_of(dtype), method)
    x = torch.randn(64, 96).to(dtype)
    whole = layer(x)
    for rows in range(1, 65):
        assert torch.equal(layer(x[:rows]), whole[:rows])


def test_sixteen_levels_in_groups_of_32_survive_4_bits_as_they_are() -> None:
    levels = torch.randint(0, 16, (64, 96)).float()
    levels[:, ::32], levels[:, 1::32] = 0, 15
    linear = linear_of(torch.float32, out=64)
    with torch.no_grad():
        linear.weight.copy_(levels * 0.25 - 2)
    torch.testing.assert_close(packed(linear, "int4").weight, linear.weight, rtol=1e-6, atol=1e-6)


def test_weights_that_are_all_alike_survive_fewer_bits() -> None:
    for value in (0.0, 0.5):
        linear = linear_of(torch.float32)
        torch.nn.init.constant_(linear.weight, value)
        for method in METHODS:
            torch.testing.assert_close(packed(linear, method).weight, linear.weight)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "qwen2"])
def test_a_model_in_fewer_bits_is_the_one_of_the_weights_that_they_stand_for(
    kind: str, method: str
) -> None:
    decoder = prepare(random_model(kind, intermediate_size=128), method=method)
    plain = random_model(kind, intermediate_size=128)
    for name, module in decoder.model.named_modules():
        if isinstance(module, fast.PackedLinear):
            with torch.no_grad():
                plain.get_submodule(name).weight.copy_(module.weight)
    prompt = PROMPTS[-1]
    mine, theirs = (newcomer(d, prompt) for d in (decoder, prepare(plain)))
    torch.testing.assert_close(
        decode.forward(decoder, mine),
        decode.forward(prepare(plain), theirs),
        atol=2e-3,
        rtol=2e-3,
    )
    assert not decoder.duplicates_lone_row


def test_the_output_layer_keeps_8_bits_of_4() -> None:
    model = prepare(random_model("llama"), method="int4").model
    head, other = model.lm_head.fused, model.model.layers[0].mlp.up_proj.fused
    assert head.packed.nbytes > head.numel > other.packed.nbytes * head.numel / other.numel


def test_fewer_bits_take_less_memory_and_the_weights_tell() -> None:
    sizes = [prepare(random_model("llama"), method=m).weight_bytes for m in (None, *METHODS)]
    assert sizes[0] > sizes[1] > sizes[2]


@pytest.mark.parametrize("kind", ["gpt2", "mamba2", "rwkv", "bloom"])
def test_fewer_bits_of_a_model_that_has_no_plain_layers_or_does_not_join_are_refused(
    kind: str,
) -> None:
    with pytest.raises(ValueError, match="int4: needs a model of plain linear layers"):
        prepare(random_model(kind), method="int4")


# ---------------------------------------------------------------- choosing


def rows_of(options: list[dict[str, Any]], prompt: list[int] | None = None) -> list[decode.Row]:
    return [
        decode.Row(
            id=i, ids=list(prompt or [1]), max_new_tokens=4, sampling=decode.Sampling(**each)
        )
        for i, each in enumerate(options)
    ]


@pytest.mark.parametrize("top_k", [0, 1, 5, 64, 500])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.5, 0.01])
@pytest.mark.parametrize("min_p", [0.0, 0.05])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])
def test_the_kept_set_is_the_one_of_transformers_warpers(
    top_k: int, top_p: float, min_p: float, temperature: float
) -> None:
    torch.manual_seed(3)
    logits = torch.randn(4, 1500) * 3
    warped = logits_process.TemperatureLogitsWarper(temperature)(None, logits)  # type: ignore[arg-type]
    if top_k:
        warped = logits_process.TopKLogitsWarper(top_k)(None, warped)  # type: ignore[arg-type]
    if top_p < 1:
        warped = logits_process.TopPLogitsWarper(top_p)(None, warped)  # type: ignore[arg-type]
    if min_p:
        warped = logits_process.MinPLogitsWarper(min_p)(None, warped)  # type: ignore[arg-type]
    option = decode.Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    top = (logits / temperature).sort(descending=True)
    total = top.values.logsumexp(-1, keepdim=True)
    kept = loop.kept_candidates(top.values, total, [option] * 4)
    for row in range(4):
        ours = set(top.indices[row][kept[row]].tolist())
        assert ours == set(torch.isfinite(warped[row]).nonzero()[:, 0].tolist())


@pytest.mark.parametrize(
    ("option", "count"),
    [({"top_p": 0.5}, 2), ({"min_p": 1.0}, 4), ({"top_k": 1}, 4), ({"top_p": 0.0}, 1)],
)
def test_of_equal_tokens_as_many_are_kept_as_by_transformers(
    option: dict[str, Any], count: int
) -> None:
    top = torch.zeros(1, 4)
    total = top.logsumexp(-1, keepdim=True)
    kept = loop.kept_candidates(top, total, [decode.Sampling(temperature=1.0, **option)])
    assert int(kept.sum()) == count


@pytest.mark.parametrize(
    "option",
    [
        {"temperature": 1.0},
        {"temperature": 1.0, "top_k": 8},
        {"temperature": 0.7, "top_p": 0.9},
        {"temperature": 1.5, "min_p": 0.05},
        {"temperature": 3.0, "top_p": 0.98},
    ],
)
def test_the_draw_has_the_distribution_of_the_kept_set(option: dict[str, Any]) -> None:
    torch.manual_seed(0)
    logits = torch.randn(1, 3000) * 2  # wider than CANDIDATES, so that the lump is used too
    draws = 6000
    rows = rows_of([{**option, "seed": seed} for seed in range(draws)])
    found = Counter()
    for start in range(0, draws, 500):
        part = rows[start : start + 500]
        tokens = loop.choose(logits.expand(500, -1), part)
        found.update(choice.token for choice in tokens)
    s = decode.Sampling(**option)
    top = (logits / s.temperature).sort(descending=True)
    kept = loop.kept_candidates(top.values, top.values.logsumexp(-1, keepdim=True), [s])[0]
    shares = top.values[0].masked_fill(~kept, -torch.inf).double().softmax(-1) * draws
    expected = dict(zip(top.indices[0].tolist(), shares.tolist(), strict=True))
    assert all(expected[token] > 0 for token in found)
    common = [token for token, share in expected.items() if share >= 8]
    rest = draws - sum(expected[token] for token in common)
    chi2 = sum((found[token] - expected[token]) ** 2 / expected[token] for token in common)
    if rest >= 8:
        chi2 += (draws - sum(found[token] for token in common) - rest) ** 2 / rest
    freedom = max(len(common) - 1, 1)
    assert chi2 < freedom + 5 * math.sqrt(2 * freedom) + 5


@pytest.mark.parametrize("top_k", [100, 129, 200, 1000, 2000])
@pytest.mark.parametrize("top_p", [0.6, 0.95])
def test_no_draw_leaves_what_transformers_warpers_keep(top_k: int, top_p: float) -> None:
    logits = -1.1 * torch.arange(1, 4097).log()[None]  # a share of it lies far out
    warped = logits_process.TopKLogitsWarper(top_k)(None, logits)
    warped = logits_process.TopPLogitsWarper(top_p)(None, warped)[0]
    kept = set(warped.isfinite().nonzero()[:, 0].tolist())
    option = {"temperature": 1.0, "top_k": top_k, "top_p": top_p}
    rows = rows_of([{**option, "seed": seed} for seed in range(400)])
    drawn = {choice.token for choice in loop.choose(logits.expand(400, -1), rows)}
    assert drawn <= kept
    assert len(drawn) > 0.5 * min(len(kept), 100)


FEW, MANY = loop.CANDIDATES


@pytest.mark.parametrize(
    ("likely", "width", "option", "sizes"),
    [
        (10, 3000, {"top_p": 0.9}, [FEW]),
        (10, 3000, {"top_k": 5, "top_p": 0.9}, [FEW]),
        (10, 3000, {}, [FEW]),
        (3000, 3000, {}, [FEW]),  # what is no candidate is one lump
        (300, 3000, {"top_p": 0.9}, [FEW, MANY]),
        (3000, 3000, {"top_p": 0.9}, [FEW, MANY, 3000]),
        (3000, 3000, {"top_k": FEW}, [FEW]),
        (3000, 3000, {"top_k": FEW, "top_p": 0.5}, [FEW]),
        (10, 3000, {"top_k": 300, "top_p": 0.5}, [FEW, MANY]),
        (10, 3000, {"top_k": 300, "min_p": 0.5}, [FEW]),
        (FEW - 1, 3000, {"min_p": 0.5}, [FEW]),
        (FEW, 3000, {"min_p": 0.5}, [FEW, MANY]),
        (10, 100, {"top_k": 500, "top_p": 0.5}, [100]),
        (500, 500, {"top_p": 0.9}, [FEW, 500]),
    ],
)
def test_a_draw_looks_at_no_more_than_it_must(
    likely: int, width: int, option: dict[str, Any], sizes: list[int], monkeypatch: Any
) -> None:
    logits, real = torch.zeros(2, width), torch.Tensor.topk
    logits[:, :likely] = 20.0
    looked: list[tuple[int, int]] = []

    def topk(self: torch.Tensor, k: int, **options: Any) -> Any:
        looked.append((len(self), k))
        return real(self, k, **options)

    monkeypatch.setattr(torch.Tensor, "topk", topk)
    loop.choose(logits, rows_of([{"temperature": 1.0, **option}, {}]))
    assert looked == [(1, size) for size in sizes]


def test_top_p_is_a_share_of_what_top_k_kept_where_that_is_all_that_is_looked_at() -> None:
    torch.manual_seed(3)
    logits, size = torch.randn(1, 3000), loop.CANDIDATES[0]
    warped = logits_process.TopKLogitsWarper(size)(None, logits)  # type: ignore[arg-type]
    warped = logits_process.TopPLogitsWarper(0.5)(None, warped)  # type: ignore[arg-type]
    top, total = logits.topk(size), logits.logsumexp(-1, keepdim=True)
    kept = loop.kept_candidates(top.values, total, [decode.Sampling(top_k=size, top_p=0.5)])
    assert int(kept.sum()) == int(warped.isfinite().sum()) < size


def test_a_draw_depends_on_its_own_seed_and_step_and_not_on_its_company() -> None:
    torch.manual_seed(1)
    logits = torch.randn(6, 2000)
    options = [
        {"temperature": 1.0, "seed": 5},
        {"temperature": 0.0},
        {"temperature": 2.0, "top_k": 40, "seed": 5},
        {"temperature": 1.0, "top_p": 0.99, "seed": 7},
        {"temperature": 3.0, "seed": 8},
        {"temperature": 1.0, "min_p": 0.2, "seed": 9},
    ]
    together = [choice.token for choice in loop.choose(logits, rows_of(options))]
    alone = [
        loop.choose(logits[i : i + 1], rows_of([each]))[0].token for i, each in enumerate(options)
    ]
    assert together == alone


def test_draws_from_all_tokens_are_alike_in_any_company() -> None:
    torch.manual_seed(1)
    logits = torch.randn(1, 2000).expand(60, -1)
    options = [{"temperature": 1.0, "seed": seed} for seed in range(60)]
    together = [choice.token for choice in loop.choose(logits, rows_of(options))]
    alone = [loop.choose(logits[:1], rows_of([each]))[0].token for each in options]
    assert together == alone
    candidates = {*logits[0].topk(loop.CANDIDATES[0]).indices.tolist()}
    assert {*together} & candidates
    assert {*together} & ({*range(2000)} - candidates)


def test_tokens_beyond_the_candidates_are_drawn_by_their_shares() -> None:
    likely, size = 0.6, loop.CANDIDATES[0]
    line = torch.full((size + 300,), math.log(1 - likely))
    line[:size], line[size::2] = 3.0, math.log(likely)
    rows = rows_of([{"temperature": 1.0, "seed": seed} for seed in range(9000)])
    tokens = [c.token for c in loop.choose(line.expand(len(rows), -1), rows)]
    beyond = [token - size for token in tokens if token >= size]
    share = sum(place % 2 == 0 for place in beyond) / len(beyond)
    assert share == pytest.approx(likely, abs=3 * math.sqrt(0.24 / len(beyond)))
    inside = size * math.exp(3)
    assert len(beyond) == pytest.approx(9000 * 150 / (150 + inside), rel=0.25)


def test_a_higher_temperature_draws_more_kinds_of_tokens() -> None:
    torch.manual_seed(1)
    logits = torch.randn(1, 2000).expand(200, -1)
    options = [[{"temperature": t, "seed": n} for n in range(200)] for t in (0.1, 0.5, 1.0, 3.0)]
    drawn = [{c.token for c in loop.choose(logits, rows_of(each))} for each in options]
    assert len(drawn[0]) < len(drawn[1]) < len(drawn[2]) < len(drawn[3])


@pytest.mark.parametrize(
    "option",
    [
        {"top_p": 0.999},
        {"top_p": 0.5},
        {"min_p": 0.01},
        {"top_k": 700},
        {"top_k": 1500, "top_p": 0.99},
        {"top_k": 128},
        {"top_k": 20, "top_p": 0.9},
    ],
)
@pytest.mark.parametrize("spread", [0.01, 2.0])
def test_a_draw_that_looks_at_few_candidates_first_gives_the_token_of_all(
    spread: float, option: dict[str, Any]
) -> None:
    torch.manual_seed(2)
    scores = (torch.randn(1, 3000) * spread).expand(60, -1)
    rows = rows_of([{"temperature": 1.0, "seed": seed, **option} for seed in range(60)])
    few = loop.draw(scores, rows, range(60))
    assert few == loop.draw(scores, rows, range(60), ())
    assert len(set(few)) > 1


def finaliser(x: int, bits: int, rounds: Sequence[tuple[int, int]]) -> int:
    for shift, factor in rounds:
        x = (x ^ (x >> shift)) * factor % 2**bits
    return x


MURMUR3 = 32, ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1))
SPLITMIX64 = 64, ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1))


@pytest.mark.parametrize("seed", [0, 5, 2**63 - 1])
@pytest.mark.parametrize("step", [0, 1, 700])
def test_the_noise_is_a_published_hash_of_seed_step_and_token(seed: int, step: int) -> None:
    golden = 0x9E3779B97F4A7C15
    assert finaliser(1, *MURMUR3) == 0x514E28B7  # as its authors print it
    assert finaliser(golden, *SPLITMIX64) == 0xE220A8397B1DCDAF
    row, ids = rows_of([{"seed": seed}], [1, 2])[0], [0, 1, 777, 49_151]
    row.ids += [3] * step
    key = finaliser((seed * golden + (step + 1) * 0xD1342543DE82EF95) % 2**64, *SPLITMIX64)
    low, high = key % 2**32, key >> 32
    hashes = [finaliser((finaliser(i ^ low, *MURMUR3) + high) % 2**32, *MURMUR3) for i in ids]
    expected = [-math.log(-math.log((each + 0.5) / 2**32)) for each in hashes]
    assert loop.gumbel([row], torch.tensor([ids]))[0].tolist() == pytest.approx(expected, rel=1e-12)


def test_rows_that_need_more_candidates_are_drawn_beside_rows_that_do_not() -> None:
    torch.manual_seed(2)
    scores = torch.randn(40, 3000) * torch.tensor([0.01, 5.0]).repeat(20)[:, None]
    options = [{}, {"top_p": 0.999}, {"top_k": 5}, {"min_p": 0.001}, {"top_p": 0.9, "top_k": 900}]
    rows = rows_of([{"temperature": 1.0, "seed": n, **options[n % 5]} for n in range(40)])
    places = list(range(39, -1, -2))
    cut = [n for n in places if n % 5]  # without any option the lump has noise of its own
    tokens = dict(zip(places, loop.draw(scores, rows, places), strict=True))
    assert [tokens[n] for n in cut] == loop.draw(scores, rows, cut, ())


def test_the_global_random_state_is_neither_read_nor_changed() -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first = loop.choose(torch.linspace(0, 1, 2000)[None], rows_of([{"temperature": 1, "seed": 3}]))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(8)
    again = loop.choose(torch.linspace(0, 1, 2000)[None], rows_of([{"temperature": 1, "seed": 3}]))
    assert first == again


@pytest.mark.parametrize("penalty", [0.5, 1.3, 2.0])
def test_the_repetition_penalty_is_transformers_own(penalty: float) -> None:
    logits, prompt = torch.randn(1, 50), [3, 4, 4, 9]
    processor = logits_process.RepetitionPenaltyLogitsProcessor(penalty)
    expected = processor(torch.tensor([prompt]), logits.clone())
    scores = logits.clone()
    loop._penalise(scores, rows_of([{"repetition_penalty": penalty}], prompt))
    assert torch.equal(scores, expected)


@pytest.mark.parametrize(("frequency", "presence"), [(0.5, 0.25), (1.0, 0.0), (0.0, -1.0)])
def test_frequency_and_presence_penalties_follow_openais_formula_over_the_answer_only(
    frequency: float, presence: float
) -> None:
    row = rows_of([{"frequency_penalty": frequency, "presence_penalty": presence}], [3, 4])[0]
    row.generated.update([7, 7, 9])
    scores = torch.zeros(1, 12)
    loop._penalise(scores, [row])
    assert scores[0, [3, 7, 9]].tolist() == [0, -(2 * frequency + presence), -frequency - presence]


def louder(ids: list[int], line: torch.Tensor) -> torch.Tensor:
    return line * 2


@pytest.mark.parametrize(
    "option",
    [
        {"repetition_penalty": 2.0},
        *(
            {name: x}
            for name in ("frequency_penalty", "presence_penalty")
            for x in (-1.0, 0.5, 1.0)
        ),
        {"logit_bias": ((4, 1.0),)},
        {"processors": (louder,)},
    ],
)
@pytest.mark.parametrize("others", [[], [{}]])
def test_choosing_leaves_the_models_logits_as_they_are(
    option: dict[str, Any], others: list[dict[str, Any]]
) -> None:
    rows = rows_of([option, option, *others], [3, 4])
    rows[0].generated.update([7, 7, 9])
    logits = torch.randn(len(rows), 30)
    before = logits.clone()
    assert not any(choice.error for choice in loop.choose(logits, rows))
    assert torch.equal(logits, before)


def test_a_logit_bias_is_added() -> None:
    scores = torch.full((1, 30), 2.0)
    loop._penalise(scores, rows_of([{"logit_bias": ((3, 1.0), (4, -1.5))}]))
    assert scores[0, 2:6].tolist() == [2.0, 3.0, 0.5, 2.0]


def test_a_bias_on_a_token_that_the_model_has_not_ends_its_row_only() -> None:
    rows = rows_of([{"logit_bias": ((30, 1.0),)}, {"logit_bias": ((3, 100.0),)}, {}], [3, 99])
    logits = torch.randn(3, 30)
    choices = loop.choose(logits, rows)
    assert str(choices[0].error) == "logit_bias names a token id that is not below 30"
    assert [choice.token for choice in choices[1:]] == [3, int(logits[2].argmax())]


def test_prompt_tokens_that_the_model_has_no_logits_for_are_not_penalised() -> None:
    scores = torch.ones(1, 30)
    loop._penalise(scores, rows_of([{"repetition_penalty": 2.0}], [3, 99]))
    assert scores[0].nonzero()[:, 0].tolist() == [*range(30)]
    assert (scores != 1).nonzero()[:, 1].tolist() == [3]


def test_a_logit_bias_can_force_and_forbid_a_token() -> None:
    logits = torch.zeros(2, 20)
    logits[:, 5] = 10
    rows = rows_of([{"logit_bias": ((8, 100.0),)}, {"logit_bias": ((5, -100.0), (2, 1.0))}])
    assert [choice.token for choice in loop.choose(logits, rows)] == [8, 2]


def test_log_probabilities_are_the_models_own_with_the_likeliest_rivals() -> None:
    logits = torch.randn(1, 40)
    choice = loop.choose(logits, rows_of([{"logprobs": 3, "logit_bias": ((1, 50.0),)}]))[0]
    expected = logits.log_softmax(-1)[0]
    assert choice.token == 1
    assert choice.logprob == pytest.approx(float(expected[1]))
    assert [i for i, _ in choice.top] == expected.topk(3).indices.tolist()
    assert [value for _, value in choice.top] == pytest.approx(expected.topk(3).values.tolist())


def test_a_row_that_asks_for_nothing_is_greedy_and_has_the_neutral_options() -> None:
    neutral = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0, "seed": 0}
    neutral |= {"frequency_penalty": 0.0, "presence_penalty": 0.0, "temperature": 0.0}
    assert decode.Sampling() == decode.Sampling(**neutral, logit_bias=(), processors=())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_end_their_row_only(bad: float) -> None:
    logits = torch.randn(3, 30)
    logits[1, 4] = bad
    choices = loop.choose(logits, rows_of([{}, {"temperature": 1.0}, {}]))
    assert [choice.error is None for choice in choices] == [True, False, True]


def test_a_processor_that_raises_ends_its_row_only() -> None:
    def broken(ids: list[int], line: torch.Tensor) -> torch.Tensor:
        raise KeyError("grammar")

    choices = loop.choose(torch.randn(2, 30), rows_of([{"processors": (broken,)}, {}]))
    assert isinstance(choices[0].error, KeyError)
    assert choices[1].error is None


def test_a_processor_is_given_the_rows_ids_so_far() -> None:
    told: list[Any] = []

    def listen(ids: list[int], line: torch.Tensor) -> torch.Tensor:
        told.append((list(ids), line.shape))
        return line

    loop.choose(torch.randn(1, 30), rows_of([{"processors": (listen,)}], [3, 4, 5]))
    assert told == [([3, 4, 5], (30,))]


def test_what_ended_a_row_is_told_in_words() -> None:
    [choice] = loop.choose(torch.full((1, 30), math.nan), rows_of([{}]))
    assert (
        str(choice.error) == "the model's logits are not finite; torch_dtype bf16 or fp32 may help"
    )


def test_a_processor_changes_its_own_row_only() -> None:
    def force(ids: list[int], line: torch.Tensor) -> torch.Tensor:
        return torch.full_like(line, -torch.inf).index_fill(0, torch.tensor([11]), 0.0)

    logits = torch.randn(2, 30)
    choices = loop.choose(logits, rows_of([{"processors": (force,), "temperature": 1.0}, {}]))
    assert choices[0].token == 11
    assert choices[1].token == int(logits[1].argmax())


# ---------------------------------------------------------------- prefixes


def reusing(monkeypatch: Any, chunk: int = 8) -> None:
    monkeypatch.setattr(decode, "CHUNK", chunk)


def left_by(decoder: decode.Decoder, prompt: list[int], **options: Any) -> prefixes_room.Prefixes:
    """Return what a row of this prompt and a few tokens leaves for others."""
    prefixes = prefixes_room.Prefixes()
    batch = newcomer(decoder, prompt)
    for _ in range(5):
        batch, _ = loop.step(decoder, batch)
    prefixes.add("", batch, 0, **{"exact": False} | options)
    return prefixes


def recalled(
    decoder: decode.Decoder, prefixes: prefixes_room.Prefixes, ids: list[int], exact: bool
) -> Any:
    prefix, columns = prefixes.find("", ids, exact and decode.CHUNK)
    assert prefix is not None
    batch = prefixes_room.recall(decoder, decode.new_batch(decoder, row_of(ids)), prefix, columns)
    assert batch.pending == len(ids) - columns
    while batch.pending:
        batch = decode.prefill(decoder, batch)
    return batch, columns


REUSING = ["llama", "qwen3", "mistral", "gemma3_text", "gpt_oss", "cohere2", "llama4_text", "gpt2"]
REUSING += ["opt", "deepseek_v3", "mixtral"]


@pytest.mark.parametrize("kind", REUSING)
def test_a_row_that_begins_with_anothers_columns_goes_on_as_one_that_does_not(
    kind: str, monkeypatch: Any
) -> None:
    reusing(monkeypatch)
    decoder = prepare(random_model(kind))
    first = [random.Random(1).randrange(3, 200) for _ in range(30)]
    prefixes = left_by(decoder, first)
    [kept] = prefixes.kept
    assert (len(kept.ids), kept.exact_columns) == (35, 24)
    second = [*kept.ids, 7, 8, 9]
    alone = newcomer(decoder, second)
    for exact, known in ((False, 35), (True, 24)):
        batch, columns = recalled(decoder, prefixes, second, exact)
        assert columns == known
        batch, _ = loop.step(decoder, batch)
        logits = [decode.forward(decoder, each) for each in (batch, alone)]
        torch.testing.assert_close(*logits, atol=2e-3, rtol=1e-3)
    assert finish(decoder, batch) == finish(decoder, alone)


@pytest.mark.parametrize("kind", ["mamba2", "bamba", "mamba", "lfm2", "jamba", "rwkv"])
def test_states_cannot_be_cut_and_are_not_reused(kind: str) -> None:
    assert not prepare(random_model(kind)).can_reuse_prefix


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_columns_up_to_the_border_of_a_chunk_have_the_bits_of_a_prefill(dtype: str) -> None:
    decoder = labs.load_model(labs.load_config(env={}, overrides={"torch_dtype": dtype})).decoder
    chance = random.Random(2)
    first = [chance.randrange(2000) for _ in range(600)]
    prefixes = left_by(decoder, first)
    second = [*first[:590], *(chance.randrange(2000) for _ in range(30))]
    batch, columns = recalled(decoder, prefixes, second, True)
    assert columns == 512
    fresh = decode.new_batch(decoder, row_of(second))
    while fresh.pending:
        fresh = decode.prefill(decoder, fresh)
    assert torch.equal(batch.logits, fresh.logits)
    for mine, theirs in zip(batch.cache.buffers, fresh.cache.buffers, strict=True):
        assert torch.equal(mine[:, :, :620], theirs[:, :, :620])


def test_the_longest_common_beginning_is_found_and_the_last_token_is_always_computed(
    monkeypatch: Any,
) -> None:
    reusing(monkeypatch)
    decoder = prepare(random_model("llama"))
    prefixes = prefixes_room.Prefixes()
    for ids in ([*range(3, 30)], [*range(3, 20), *range(100, 120)]):
        prefixes.add("", newcomer(decoder, ids), 0, exact=False)
    assert [len(each.ids) for each in prefixes.kept] == [27, 37]
    for ids, exact, columns in (
        ([*range(3, 30), 5], False, 27),
        ([*range(3, 30), 5], True, 24),
        ([*range(3, 30)], False, 26),
        ([*range(3, 19)], True, 8),  # 16 would leave nothing to compute
        ([*range(3, 20), *range(100, 110), 7], False, 27),
        ([*range(3, 10), 9, 9], False, 0),  # less than a chunk
        ([4, *range(3, 30)], False, 0),
        ([3], False, 0),
    ):
        assert prefixes.find("", ids, exact and decode.CHUNK)[1] == columns
    assert prefixes.find("another", [*range(3, 30), 5], 0) == (None, 0)


def test_what_is_kept_stays_within_its_bytes_and_the_least_recently_used_goes_first(
    monkeypatch: Any,
) -> None:
    reusing(monkeypatch)
    decoder = prepare(random_model("llama"))
    batches = [newcomer(decoder, [first, *range(3, 34)]) for first in range(3, 8)]
    one = 32 * batches[0].cache.bytes_per_column
    prefixes = prefixes_room.Prefixes(max_bytes=3 * one + 1)
    for batch in batches[:3]:
        prefixes.add("", batch, 0, exact=True)
    assert prefixes.nbytes == 3 * one
    prefixes.find("", batches[0].rows[0].ids, decode.CHUNK)
    prefixes.add("", batches[3], 0, exact=True)
    assert [each.ids[0] for each in prefixes.kept] == [5, 3, 6]
    prefixes.add("", batches[0], 0, exact=True)  # known: nothing changes
    assert [each.ids[0] for each in prefixes.kept] == [5, 3, 6]
    assert prefixes.nbytes <= prefixes.max_bytes
    for most in (0, one - 1):
        prefixes = prefixes_room.Prefixes(max_bytes=most)
        prefixes.add("", batches[0], 0, exact=True)
        assert prefixes.kept == []


def test_a_longer_row_takes_the_place_of_its_own_beginning(monkeypatch: Any) -> None:
    reusing(monkeypatch)
    decoder = prepare(random_model("llama"))
    prefixes, owners = prefixes_room.Prefixes(), ("", "other")
    for owner in owners:
        prefixes.add(owner, newcomer(decoder, [*range(3, 20)]), 0, exact=False)
    prefixes.add("", newcomer(decoder, [*range(3, 30)]), 0, exact=False)
    assert [(each.owner, len(each.ids)) for each in prefixes.kept] == [("other", 17), ("", 27)]


def test_what_is_kept_is_a_copy_that_later_rows_cannot_change(monkeypatch: Any) -> None:
    reusing(monkeypatch)
    decoder = prepare(random_model("llama"))
    batch = newcomer(decoder, [*range(3, 30)])
    prefixes = prefixes_room.Prefixes()
    prefixes.add("", batch, 0, exact=False)
    before = [buffer.clone() for buffer in prefixes.kept[0].buffers]
    with torch.inference_mode():
        for buffer in batch.cache.buffers:
            buffer.fill_(7)
    recalled(decoder, prefixes, [*range(3, 30), 9], False)
    assert all(map(torch.equal, before, prefixes.kept[0].buffers))


def test_without_a_bound_an_eighth_of_the_free_memory_is_taken(monkeypatch: Any) -> None:
    reusing(monkeypatch)
    decoder = prepare(random_model("llama"))
    batches = [newcomer(decoder, [first, *range(3, 34)]) for first in range(3, 7)]
    one = 32 * batches[0].cache.bytes_per_column
    prefixes = prefixes_room.Prefixes()
    cases = ((8 * one - 1, 0), (8 * one, 1), (15 * one, 2), (14 * one - 1, 1))
    for batch, (free, kept) in zip(batches, cases, strict=True):
        monkeypatch.setattr(decode, "available_bytes", lambda device, free=free: free)
        prefixes.add("", batch, 0, exact=False)
        assert len(prefixes.kept) == kept


# ---------------------------------------------------------------- guesses

REPEATING = [5, 9, 11, 7, 5, 9, 11, 7, 5, 9, 11]


def ahead(decoder: decode.Decoder, prompt: list[int], lookahead: int, **sampling: Any) -> Any:
    """Return a row's NEW tokens by step_ahead, and how many calls that took."""
    row = row_of(prompt, **sampling)
    row.lookahead, calls = lookahead, 0
    batch = decode.new_batch(decoder, row)
    while batch.pending:
        batch = decode.prefill(decoder, batch)
    while len(row.ids) < len(prompt) + NEW_TOKENS:
        batch, choices = forward_room.step_speculative(decoder, batch)
        assert choices[-1].error is None
        calls += 1
    return row.ids[len(prompt) :], calls


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 3}])
@pytest.mark.parametrize("kind", REUSING)
def test_guesses_change_no_token(kind: str, sampling: dict[str, Any], monkeypatch: Any) -> None:
    decoder = prepare(random_model(kind))
    for prompt in (REPEATING, PROMPTS[-1]):
        expected, calls = ahead(decoder, prompt, 0, **sampling)
        assert calls == NEW_TOKENS
        tokens, _ = ahead(decoder, prompt, 4, **sampling)
        assert tokens == expected
        guesses = iter([expected[1:4], [8, *expected[5:8]], [expected[5], 8], expected[7:13]])
        monkeypatch.setattr(forward_room, "prompt_lookup", lambda row, g=guesses: next(g, []))
        tokens, calls = ahead(decoder, prompt, 4, **sampling)
        assert tokens == expected
        # 1, then 4, 1 and 2 of the first three, 7 of the last: five calls for 15 tokens.
        assert calls <= 1 + 4 + NEW_TOKENS - 15 + 2
        monkeypatch.undo()


def test_a_row_with_a_penalty_sees_each_token_that_was_guessed() -> None:
    decoder = prepare(random_model("llama"))
    options = {"repetition_penalty": 1.3, "frequency_penalty": 0.5, "logprobs": 2}
    assert ahead(decoder, REPEATING, 5, **options)[0] == ahead(decoder, REPEATING, 0, **options)[0]


@pytest.mark.parametrize(
    ("ids", "most", "expected"),
    [
        ([1, 2, 3, 4, 1, 2, 3], 2, [4, 1]),
        ([1, 2, 3, 4, 1, 2, 3], 9, [4, 1, 2, 3]),
        ([9, 2, 3, 4, 1, 2, 3], 2, [4, 1]),  # two are enough
        ([1, 2, 3, 4, 8, 2, 3, 5, 1, 2, 3], 1, [4]),  # three are better
        ([2, 3, 4, 2, 3, 5, 2, 3], 1, [5]),  # the last place counts
        ([3, 4, 9, 3], 3, []),
        ([7, 7, 7, 7], 3, [7]),
        ([1, 2, 3, 4, 1, 2, 3], 0, []),
        ([1], 3, []),
    ],
)
def test_a_guess_is_what_followed_the_last_tokens_before(
    ids: list[int], most: int, expected: list[int]
) -> None:
    row = row_of(ids)
    row.lookahead = most
    assert forward_room.prompt_lookup(row) == expected


def test_no_more_is_guessed_than_may_be_generated() -> None:
    row = decode.Row(
        id=0, ids=[1, 2, 3, 4, 5, 1, 2, 3], max_new_tokens=3, sampling=decode.Sampling()
    )
    row.lookahead = 9
    assert forward_room.prompt_lookup(row) == [4, 5]
    row.max_new_tokens = 1
    assert forward_room.prompt_lookup(row) == []


# ---------------------------------------------------------------- fewer kernels, for a GPU


def norms_of(model: Any) -> list[Any]:
    return [each for each in model.modules() if hasattr(each, "variance_epsilon")]


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt_oss", "deepseek_v3"])
def test_norms_that_are_torchs_rms_norm_are_computed_by_it(kind: str) -> None:
    model, ids = random_model(kind), torch.tensor([PROMPTS[4]])
    for norm in norms_of(model):
        torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    with torch.inference_mode():
        expected = model(ids).logits
        fast.fuse_norms(model)
        assert all(isinstance(norm.forward, functools.partial) for norm in norms_of(model))
        torch.testing.assert_close(model(ids).logits, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("scale", [1.0, 0.004])
def test_a_norm_that_takes_the_mean_off_is_no_rms_norm_however_small(scale: float) -> None:
    model = random_model("cohere2")
    for norm in norms_of(model):
        torch.nn.init.constant_(norm.weight, scale)
    fast.fuse_norms(model)
    assert not any(isinstance(norm.forward, functools.partial) for norm in norms_of(model))


@pytest.mark.parametrize("kind", ["cohere2", "mamba2"])
def test_norms_that_do_something_else_stay_as_they_are(kind: str) -> None:
    model = random_model(kind)
    kept = [norm for norm in norms_of(model) if type(norm).__name__ != "Mamba2RMSNorm"]
    assert kept
    fast.fuse_norms(model)
    assert not any(isinstance(norm.forward, functools.partial) for norm in kept)


@pytest.mark.parametrize("bias", [True, False])
def test_layers_that_are_one_product_give_each_what_it_gives_alone(bias: bool) -> None:
    linears = [torch.nn.Linear(8, n, bias=bias) for n in (6, 4, 2)]
    together = fast.FusedWeight(linears, fast.dense_weight)
    x = torch.randn(3, 8)
    for index, linear in enumerate(linears):
        packed = fast.PackedLinear(linear, together, index)
        torch.testing.assert_close(packed(x), linear(x))
        assert torch.equal(packed.weight, linear.weight)


# ---------------------------------------------------------------- steps as graphs


class Recorded:
    """Stands for CUDA graphs: what is recorded runs again, on the tensors that it was given."""

    def __init__(self, monkeypatch: Any) -> None:
        self.shapes: list[tuple[int, ...]] = []
        self.replays = 0
        monkeypatch.setattr(fast, "record", self.record)
        monkeypatch.setattr(fast, "CAPTURE_AFTER", 1)

    def record(self, graphs: fast.Graphs, step: Any) -> Any:
        logits = step().clone()
        self.shapes.append(tuple(logits.shape))

        def replay() -> None:
            self.replays += 1
            logits.copy_(step())

        return replay, logits


def graphed(kind: str) -> decode.Decoder:
    decoder = prepare(random_model(kind), batch_invariant=False)
    return dataclasses.replace(decoder, graphs=fast.Graphs(torch.device("cpu")))


@pytest.mark.parametrize("kind", REUSING)
def test_graphs_keep_the_tokens_of_rows_that_join_and_leave(
    kind: str, reference: Any, monkeypatch: Any
) -> None:
    recorded, chance = Recorded(monkeypatch), random.Random(7)
    decoder, (_, expected) = graphed(kind), reference[kind]
    waiting, batch, found = list(range(len(PROMPTS))) * 2, None, []
    while waiting or batch:
        if waiting and (batch is None or (len(batch.rows) < 5 and chance.random() < 0.5)):
            index = waiting.pop(0)
            one = newcomer(decoder, PROMPTS[index], (len(waiting), index))
            batch = decode.join(batch, one) if batch else one
            continue
        batch, _ = loop.step(decoder, batch)
        over = {row.id for row in batch.rows if len(row.ids) >= row.columns}
        over |= {row.id for row in batch.rows if chance.random() < 0.02}
        ended = [row for row in batch.rows if row.id in over]
        found += [(row.id[1], row.ids[row.prompt_length :]) for row in ended]
        if ended:
            batch = decode.keep(batch, [row.id for row in batch.rows if row.id not in over])
    assert len(found) == 2 * len(PROMPTS)
    for index, tokens in found:
        assert tokens == expected[index][: len(tokens)]
    assert recorded.replays >= 40
    assert {rows for rows, _ in recorded.shapes} >= {2, 4, 8}
    assert not decoder.graphs.failed


def test_slots_that_move_are_captured_anew(monkeypatch: Any) -> None:
    recorded = Recorded(monkeypatch)
    decoder = graphed("llama")
    batch = newcomer(decoder, PROMPTS[2])
    for _ in range(3):
        batch, _ = loop.step(decoder, batch)
    assert len(recorded.shapes) == 1
    batch = decode.join(batch, newcomer(decoder, PROMPTS[3], 1))
    assert batch.cache.captured == {}


def test_a_graph_is_worth_it_only_for_a_shape_that_comes_again(monkeypatch: Any) -> None:
    recorded = Recorded(monkeypatch)
    monkeypatch.setattr(fast, "CAPTURE_AFTER", 3)
    decoder = graphed("llama")
    batch = newcomer(decoder, PROMPTS[2])
    for captured in (0, 0, 0, 1, 1):
        batch, _ = loop.step(decoder, batch)
        assert len(recorded.shapes) == captured


@pytest.mark.parametrize("wrong", ["raises", "is off", "is not finite"])
def test_where_capturing_fails_steps_go_on_without(
    wrong: str, reference: Any, monkeypatch: Any, caplog: Any
) -> None:
    recorded = Recorded(monkeypatch)

    def record(graphs: Any, step: Any) -> Any:
        if wrong == "raises":
            raise RuntimeError("operation not permitted when stream is capturing")
        replay, logits = recorded.record(graphs, step)
        change = {"is off": 1.0, "is not finite": math.nan}[wrong]
        return (lambda: (replay(), logits.add_(change * logits.abs().max()))), logits

    monkeypatch.setattr(fast, "record", record)
    decoder, (_, expected) = graphed("llama"), reference["llama"]
    for index in (2, 3):
        assert finish(decoder, newcomer(decoder, PROMPTS[index])) == expected[index]
    assert decoder.graphs.failed
    assert caplog.text.count("steps run without CUDA graphs") == 1


def test_captured_slots_go_with_their_batch(monkeypatch: Any) -> None:
    Recorded(monkeypatch)
    real = fast.record

    def record(graphs: Any, step: Any) -> Any:  # holds what comes out, not what is read
        logits = real(graphs, step)[1].clone()
        return functools.partial(logits.copy_, logits.clone()), logits

    monkeypatch.setattr(fast, "record", record)
    decoder = graphed("llama")
    batch = newcomer(decoder, PROMPTS[2])
    for _ in range(4):
        batch, _ = loop.step(decoder, batch)
    assert any(isinstance(each, fast.Captured) for each in batch.cache.captured.values())
    buffers = [weakref.ref(buffer) for buffer in batch.cache.buffers]
    gc.disable()
    try:
        del batch
        assert [ref() for ref in buffers if ref() is not None] == []
    finally:
        gc.enable()


def begun(decoder: decode.Decoder, prompt: list[int], new: int = NEW_TOKENS) -> decode.Batch:
    row = decode.Row(id=0, ids=list(prompt), max_new_tokens=new, sampling=decode.Sampling())
    batch = decode.prefill(decoder, decode.new_batch(decoder, row))
    return loop.join_best(decoder, [], loop.step(decoder, batch)[0])[0]


def ended(decoder: decode.Decoder, batch: decode.Batch) -> list[int]:
    [row] = batch.rows
    while len(row.ids) < row.columns:
        batch, _ = loop.step(decoder, batch)
    assert decode.keep(batch, []) is None
    return row.ids[row.prompt_length :]


def test_a_batch_begins_in_the_slots_of_the_last_one_whose_steps_are_captured(
    reference: Any, monkeypatch: Any
) -> None:
    recorded = Recorded(monkeypatch)
    decoder, (_, expected) = graphed("llama"), reference["llama"]
    for index in (5, 2, 4):
        assert ended(decoder, begun(decoder, PROMPTS[index])) == expected[index]
    assert recorded.shapes == [(1, 211)]


def test_two_batches_at_once_never_share_slots(reference: Any, monkeypatch: Any) -> None:
    Recorded(monkeypatch)
    decoder, (_, expected) = graphed("llama"), reference["llama"]
    ended(decoder, begun(decoder, PROMPTS[1]))
    batches = [begun(decoder, PROMPTS[index]) for index in (2, 3)]
    assert batches[0].cache is not batches[1].cache
    for _ in range(5):
        batches = [loop.step(decoder, batch)[0] for batch in batches]
    assert [ended(decoder, batch) for batch in batches] == [expected[2], expected[3]]
    assert len(decoder.graphs.spare_slots) == 1


def test_a_row_too_long_for_the_last_slots_gets_larger_ones(monkeypatch: Any) -> None:
    Recorded(monkeypatch)
    monkeypatch.setattr(fast, "MIN_GRAPH_COLUMNS", 64)
    decoder = graphed("llama")
    sizes = []
    for new in (40, 100, 60):
        ended(decoder, begun(decoder, PROMPTS[2], new))
        sizes.append(decoder.graphs.spare_slots[0].cursor.columns)
    assert sizes == [64, 128, 128]


@pytest.mark.parametrize("free", [0, 2**40])
def test_slots_are_kept_for_the_next_batch_where_memory_is_free(
    free: int, monkeypatch: Any
) -> None:
    Recorded(monkeypatch)
    monkeypatch.setattr(decode, "available_bytes", lambda device: free)
    decoder = graphed("llama")
    ended(decoder, begun(decoder, PROMPTS[2]))
    assert len(decoder.graphs.spare_slots) == bool(free)


def test_a_batch_that_finds_no_memory_for_larger_slots_stays_in_its_own(
    reference: Any, monkeypatch: Any
) -> None:
    Recorded(monkeypatch)

    def full(self: decode.Slots, *size: int) -> None:
        raise torch.OutOfMemoryError

    decoder, (_, expected) = graphed("llama"), reference["llama"]
    with monkeypatch.context() as patched:
        patched.setattr(decode.Slots, "resize", full)
        batch = begun(decoder, PROMPTS[2])
    assert batch.graphs is None
    assert ended(decoder, batch) == expected[2]


@pytest.mark.parametrize("free", [2**40, 0])
def test_slots_are_larger_than_they_must_be_only_where_memory_is_free(
    free: int, monkeypatch: Any
) -> None:
    Recorded(monkeypatch)
    monkeypatch.setattr(decode, "available_bytes", lambda device: free)
    batch = begun(graphed("llama"), PROMPTS[2])
    assert batch.cache.cursor.columns == (fast.MIN_GRAPH_COLUMNS if free else 64)
    assert batch.cache.cursor.rows == 1


def test_slots_that_nobody_is_in_give_way_to_a_newcomer(monkeypatch: Any) -> None:
    Recorded(monkeypatch)
    decoder = graphed("llama")
    ended(decoder, begun(decoder, PROMPTS[2]))
    assert decoder.graphs.spare_slots
    monkeypatch.setattr(loop, "has_room", lambda *args: not decoder.graphs.spare_slots)
    waiting = decode.new_batch(decoder, row_of(PROMPTS[1]))
    assert loop._next_prompts(decoder, loop.Loop(prefilling=[waiting])) == [waiting]
    assert decoder.graphs.pool is None


def test_a_replay_of_nothing_is_no_graph(reference: Any, monkeypatch: Any, caplog: Any) -> None:
    Recorded(monkeypatch)
    monkeypatch.setattr(fast, "record", lambda graphs, step: (int, step().clone()))
    decoder, (_, expected) = graphed("llama"), reference["llama"]
    assert finish(decoder, newcomer(decoder, PROMPTS[2])) == expected[2]
    assert decoder.graphs.failed
    assert "off by nan" in caplog.text


def test_threads_that_replay_the_same_memory_get_their_own_logits(
    reference: Any, monkeypatch: Any
) -> None:
    """As the graphs of one pool do: what one puts out lies where the next one does."""
    place: list[torch.Tensor] = []

    def record(graphs: Any, step: Any) -> Any:
        place.append(place[0] if place else torch.zeros_like(step()))

        def replay() -> None:
            place[0].copy_(step())

        return replay, place[0]

    monkeypatch.setattr(fast, "record", record)
    monkeypatch.setattr(fast, "CAPTURE_AFTER", 1)
    decoder, (_, expected) = graphed("llama"), reference["llama"]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda p: ended(decoder, begun(decoder, p)), PROMPTS[1:] * 2))
    finally:
        sys.setswitchinterval(interval)
    assert found == expected[1:] * 2


@torch.inference_mode()
def test_what_a_graph_reads_lives_as_long_as_it(monkeypatch: Any) -> None:
    """The real graph keeps addresses, not tensors: the stand-in's closure would hide that."""
    made: list[weakref.ref[torch.Tensor]] = []
    arange = torch.arange

    def watched(*size: Any, **options: Any) -> torch.Tensor:
        made.append(weakref.ref(tensor := arange(*size, **options)))
        return tensor

    def record(graphs: Any, step: Any) -> Any:
        return int, step().clone()

    decoder = graphed("llama")
    batch = newcomer(decoder, PROMPTS[2])
    row = batch.rows[0]
    ids = torch.tensor([[row.ids[row.written]]])
    monkeypatch.setattr(fast, "record", record)
    monkeypatch.setattr(torch, "arange", watched)
    captured = fast.Captured(decoder, batch.cache, (1, 64), ids, [row.written])
    monkeypatch.setattr(torch, "arange", arange)
    assert made[0]() is captured.index


def test_graphs_are_for_one_gpu_and_are_turned_off_by_a_setting() -> None:
    assert prepare(random_model("llama")).graphs is None
    assert labs.ModelSpec().cuda_graphs


# ---------------------------------------------------------------- the same text in any company


TOPICS = ("fox", "river", "mountain", "python", "battery", "cloud", "king", "music", "water")


@pytest.mark.parametrize(
    ("settings", "count"),
    [({"torch_dtype": "bf16"}, 48), ({"torch_dtype": "fp32"}, 12)]
    + [({"quant_method": method}, 12) for method in METHODS],
)
def test_texts_of_the_real_model_are_the_same_in_any_company(
    settings: dict[str, str], count: int
) -> None:
    config = labs.load_config(env={}, overrides=settings)
    model = labs.load_model(config)
    assert model.decoder.invariant
    chance = random.Random(0)
    words = [
        " and ".join(chance.choices(TOPICS, k=chance.choice([1, 3, 30]))) for _ in range(count)
    ]
    inputs = [labs.build_inputs(model, prompt=f"Tell me about {word}.") for word in words]
    each = [
        labs.Generation(
            max_new_tokens=chance.randint(2, 16),
            temperature=0.8 * (i % 2),
            seed=i,
            top_p=0.95 if i % 4 == 1 else 1,
        )
        for i in range(count)
    ]
    alone = [labs.generate(model, *pair).text for pair in zip(inputs, each, strict=True)]
    texts = [""] * count
    for index, event in labs.stream_batch(model, inputs, each, batch_rows=16):
        if isinstance(event, labs.Delta):
            texts[index] += event.text
    assert texts == alone
    assert len(set(alone)) >= count * 0.8


TEXT = """The river begins in the mountains, where the snow melts in spring, and runs for two
hundred miles through forests and farms before it reaches the sea. For most of the year it is slow
and brown. In April it is neither: the water rises by the height of a man in three days, takes
fences, boats and once a bridge with it, and leaves behind a layer of fine black soil that has fed
the valley since people first settled there. Nobody who lives beside it has ever wanted to move.
They build their houses on stone, keep a rope by the door, and speak of the floods as others speak
of a relative who visits too often: with complaint, and with some pride. When engineers came from
the city to propose a dam, the meeting in the school hall lasted until two in the morning. The plan
was clear, the drawings were good, and the price was fair. In the end the oldest farmer asked who
would bring the soil if the water did not, and the engineers, who were honest people, had no answer.
"""


def perplexity(model: labs.Model) -> float:
    ids = model.tokenizer(TEXT, add_special_tokens=False, return_tensors="pt")["input_ids"][0]
    with torch.inference_mode():
        logits = model.model(input_ids=torch.cat([torch.tensor([1]), ids])[None]).logits[0, :-1]
    logprobs = logits.float().log_softmax(-1).gather(-1, ids[:, None])
    return math.exp(-float(logprobs.mean()))


@pytest.mark.parametrize("settings", [{}, {"torch_dtype": "fp32"}, {"quant_method": "int4"}])
def test_texts_of_the_real_model_are_the_same_with_guesses(settings: dict[str, str]) -> None:
    model = labs.load_model(labs.load_config(env={}, overrides=settings))
    inputs = labs.build_inputs(model, prompt=f"Quote the first two sentences of this:\n\n{TEXT}")
    for seed in (None, 4):
        temperature = 0.5 if seed else 0.0
        options = labs.Generation(max_new_tokens=60, temperature=temperature, seed=seed)
        plain = labs.generate(model, inputs, options)
        guessed = labs.generate(model, inputs, options, prompt_lookup_num_tokens=5)
        assert (guessed.text, guessed.finish_reason) == (plain.text, plain.finish_reason)
        assert guessed.usage == plain.usage


def test_fewer_bits_hardly_surprise_the_real_model_more() -> None:
    """Its file has 4 bits already, so that 4 bits lose nothing but in the output layer."""
    by_method = {
        method: perplexity(labs.load_model(labs.load_config(env={}, overrides=overrides)))
        for method, overrides in (
            ("", {}),
            *((method, {"quant_method": method}) for method in METHODS),
        )
    }
    print(by_method)
    assert by_method["int8"] <= 1.02 * by_method[""]
    assert by_method["int4"] <= 1.02 * by_method[""]


def test_prompts_that_share_a_call_have_the_bits_they_have_alone() -> None:
    decoder = labs.load_model(labs.load_config(env={})).decoder
    chance = random.Random(1)
    prompts = [[chance.randrange(2000) for _ in range(n)] for n in (2, 3, 40, 17, 64, 5, 100, 9)]
    together = forward_room.prefill_packed(
        decoder, [decode.new_batch(decoder, row_of(prompt)) for prompt in prompts]
    )
    alone = [
        decode.prefill(decoder, decode.new_batch(decoder, row_of(prompt))) for prompt in prompts
    ]
    for mine, theirs in zip(together, alone, strict=True):
        assert torch.equal(mine.logits, theirs.logits)
        for a, b in zip(mine.cache.buffers, theirs.cache.buffers, strict=True):
            assert torch.equal(a[:, :, : mine.rows[0].written], b[:, :, : mine.rows[0].written])


def test_the_attention_of_labs_is_registered_by_transformers_public_interface() -> None:
    assert {"labs", "labs_invariant"} <= set(transformers.AttentionInterface().valid_keys())
