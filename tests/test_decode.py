# SPDX-License-Identifier: Apache-2.0
"""labs_decode: rows that share calls against transformers' own loop, on tiny random models."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from decoding import (
    FOUR,
    answers_of,
    begin_alike,
    failing_at,
    joined,
    raising,
    reference,
    run_at_random,
)
from kit import (
    ARCHITECTURES,
    BASE,
    DULL,
    PROMPTS,
    newcomer,
    prepare,
    random_model,
    row_of,
)
from transformers import AutoConfig, AutoModelForCausalLM

import labs_attention
import labs_decode as decode
import labs_loop as loop

HEADS = ("gpt2", "opt", "gptj")  # have no num_key_value_heads, and would take BASE's for their own


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_rows_that_join_and_leave_at_random_keep_transformers_tokens(
    kind: str, monkeypatch: Any
) -> None:
    decoder, expected = reference(kind)
    monkeypatch.setattr(decode, "CHUNK", 7)
    assert min(len(set(tokens)) for tokens in expected) >= 8
    assert decoder.mode == ARCHITECTURES[kind][0]
    if decoder.mode == "alone":
        alone = [newcomer(decoder, prompt, key) for key, prompt in enumerate(FOUR)]
        assert answers_of(decoder, alone) == dict(enumerate(expected))
        return

    def see(batch: decode.Batch) -> None:
        assert kind in HEADS or decoder.column_bytes == batch.cache.bytes_per_column

    assert begin_alike(run_at_random(decoder, FOUR, 1, see=see), expected)


@pytest.mark.parametrize("kind", HEADS)
def test_the_bytes_of_a_column_follow_from_the_number_of_heads(kind: str) -> None:
    decoder = prepare(random_model(kind, num_key_value_heads=4))
    if decoder.mode != "alone":
        assert decoder.column_bytes == newcomer(decoder, FOUR[1]).cache.bytes_per_column > 0


@pytest.mark.parametrize("kind", DULL)
def test_models_whose_random_tokens_repeat_run_as_the_table_says(kind: str) -> None:
    with torch.device("meta"):
        config = AutoConfig.for_model(kind, **{**BASE, **DULL[kind][1]})
        model = AutoModelForCausalLM.from_config(config)
    assert decode.mode_of(model)[0] == DULL[kind][0]


@pytest.mark.parametrize("seed", range(4))
def test_rows_of_a_larger_batch_keep_their_tokens_in_any_order(seed: int) -> None:
    decoder, expected = reference("llama")
    found = run_at_random(decoder, FOUR * 4, seed, most=2 + 4 * seed, leave=0.1)
    assert begin_alike(found, expected)


def unknown_layer(model: Any, monkeypatch: Any) -> None:
    monkeypatch.delitem(decode.LAYERS, decode.cache_utils.DynamicLayer)


def unknown_word(model: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(decode, "CACHE_PARAMETERS", ("memory",))


def no_cache(model: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(decode, "DynamicCache", raising(KeyError("layers")))


def own_attention(model: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(type(model), "_can_set_attn_implementation", lambda *_: False)


def rope(kind: str) -> Any:
    def change(model: Any, monkeypatch: Any) -> None:
        model.config.rope_parameters = {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0}

    return change


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (rope("longrope"), "longrope positions"),
        (rope("dynamic"), "dynamic positions"),
        (unknown_layer, "DynamicLayer"),
        (unknown_word, "by a name that labs does not know"),
        (no_cache, "describes no cache (KeyError: 'layers')"),
        (own_attention, "does not take another attention implementation"),
    ],
)
def test_a_model_that_labs_cannot_batch_runs_alone_and_says_why(
    change: Any, reason: str, monkeypatch: Any
) -> None:
    model = random_model("llama")
    assert decode.mode_of(model) == ("joins", "rows join and leave at any step")
    change(model, monkeypatch)
    mode, words = decode.mode_of(model)
    assert (mode, reason in words) == ("alone", True), words


def test_a_configuration_that_raises_gives_no_number_and_no_error() -> None:
    class Moody:
        def __getattr__(self, name: str) -> Any:
            raise RuntimeError(name)

    assert decode._int_of(Moody(), "head_dim") == 0


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


@pytest.mark.parametrize("function", [decode.attention, decode.attention_invariant])
@pytest.mark.parametrize("queries", [1, 3])
def test_attention_takes_the_mask_by_position_and_by_name(function: Any, queries: int) -> None:
    q, k, v = (torch.randn(2, 4, n, 16) for n in (queries, 5, 5))
    mask = torch.zeros(2, 1, queries, 5).masked_fill(torch.rand(2, 1, queries, 5) < 0.3, -9.0)
    module, options = torch.nn.Module(), {"scaling": 0.2, "dropout": 0.0}
    by_place = function(module, q, k, v, mask, **options)[0]
    words = {"query": q, "key": k, "value": v, "attention_mask": mask}
    assert torch.equal(by_place, function(module, **words, **options)[0])
    plain = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=0.2)
    torch.testing.assert_close(by_place, plain.transpose(1, 2))


# ---------------------------------------------------------------- slots


def test_slots_have_few_lengths() -> None:
    lengths = {1: 64, 64: 64, 65: 128, 130: 256, 512: 512, 513: 768, 768: 768, 769: 1024}
    assert {n: decode.Slots(None, n).cursor.columns for n in lengths} == lengths


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("first_row", [0, 2])
def test_a_step_of_one_row_writes_the_column_that_a_step_of_many_does(first_row, dtype) -> None:
    torch.manual_seed(0)
    states = torch.randn(2, 2, 1, 3, 8).to(dtype)  # keys, values; a lone row has a copy beside it
    found, heads = [], SimpleNamespace(heads=6, groups=3, dim=8)
    for write_from, position in ((150, 7), (-1, 150), (None, 150)):  # the first reads no positions
        at = decode.Cursor(4, 256, 192, write_from or 0, first_row)
        at.positions, at.index = torch.tensor([position]), torch.tensor([first_row])
        layer = decode.SlotLayer(at)
        layer.lazy_initialization(*states.transpose(2, 3))
        for buffer in layer.buffers:
            buffer.zero_()
        mask = torch.zeros(1, 1, 1, 192, dtype=dtype)
        if write_from is None:
            read = layer.update(*states.transpose(2, 3))
        else:
            step = labs_attention.step_of(states[0], heads, {"": mask}, at)
            read = step.written(layer, *(states if write_from >= 0 else states[:, :1]))
        found.append([*layer.buffers, *read])
    for each in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], each, strict=True))
    for buffer, (written, _) in zip(found[0], states, strict=False):
        assert torch.equal(buffer[first_row, :, 150], written[0])
        assert buffer.count_nonzero() == written[0].numel()


def test_a_step_reads_where_the_slots_are_now() -> None:
    decoder = prepare(random_model("llama"))
    batch = joined(decoder, [1, 3])
    for columns in (64, 256, 192):
        batch.cache.resize(2, 4, max(columns, batch.cache.cursor.columns))
        assert all(layer.views is None for layer in batch.cache.layers)
        decode.forward(decoder, batch)
        for layer in batch.cache.layers:
            write, read = layer.views[1][0], layer.views[1][2]
            assert write.data_ptr() == read.data_ptr() == layer.keys.data_ptr()
        batch.cache.resize(2, 8, batch.cache.cursor.columns + 64)


def test_rows_that_step_one_by_one_write_what_they_write_together() -> None:
    decoder, batches = prepare(random_model("llama")), []
    for at_once, write_from in ((1, 11), (0, -1)):
        batch = dataclasses.replace(joined(decoder, range(3)), at_once=at_once)
        decode.forward(decoder, batch)
        assert [row.written for row in batch.rows] == [1, 5, 11]
        assert batch.cache.cursor.write_from == write_from
        batches.append(batch)
    for a, b in zip(*(batch.cache.buffers for batch in batches), strict=True):
        torch.testing.assert_close(a[:3], b[:3])
        assert all(a[row, :, written].any() for row, written in enumerate((1, 5, 11)))


WIDTHS = [(72, 24, 64), (32, 32, 16), (64, 16, 80), (32, 8, 128)]  # of queries, keys; their width


def attended(
    row: list[torch.Tensor], columns: int, rows: int, place: int, window: int | None = None
) -> torch.Tensor:
    """Return what a row [1, heads, 1, D], keys and values [1, groups, N, D] gives among others."""
    query, key, value = row
    (groups, own, width), dtype = key.shape[1:], key.dtype
    keys, values = (torch.randn(rows, groups, columns, width).to(dtype) for _ in range(2))
    queries = torch.randn(rows, query.shape[1], 1, width).to(dtype)
    mask = torch.zeros(rows, 1, 1, columns, dtype=dtype)
    queries[place], keys[place, :, :own], values[place, :, :own] = query[0], key[0], value[0]
    mask[place, ..., own:] = -torch.inf
    if window is not None:
        mask[place, ..., : own - window] = -torch.inf
    module = torch.nn.Module()
    module.is_causal, module.num_key_value_groups = True, query.shape[1] // groups
    scaled = {"scaling": width**-0.5}
    return decode.attention_invariant(module, queries, keys, values, mask, **scaled)[0][place]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("heads", WIDTHS)
def test_a_step_attends_with_the_same_bits_whatever_the_columns(heads, dtype) -> None:
    torch.manual_seed(3)
    count, groups, width = heads
    for own in (3, 200, 257, 450, 800):
        key, value = (torch.randn(1, groups, own, width).to(dtype) for _ in range(2))
        row = [torch.randn(1, count, 1, width).to(dtype), key, value]
        least = decode.Slots(None, own).cursor.columns
        alone = attended(row, least, 2, 0)
        plain = [each.float() for each in row]
        exact = torch.nn.functional.scaled_dot_product_attention(*plain, enable_gqa=True)[0]
        torch.testing.assert_close(alone.float(), exact.transpose(0, 1), atol=0.02, rtol=0.02)
        for columns in sorted({least, 512, 768, 2048}):
            if columns >= least:
                assert torch.equal(attended(row, columns, 5, 3), alone), (own, columns)


@pytest.mark.parametrize("columns", [65, 257, 513, 700])
def test_a_chunk_of_one_token_attends_to_any_number_of_columns(columns) -> None:
    torch.manual_seed(5)
    row = [torch.randn(1, 4, n, 64).to(torch.bfloat16) for n in (1, columns, columns)]
    plain = [each.float() for each in row]
    exact = torch.nn.functional.scaled_dot_product_attention(*plain)[0].transpose(0, 1)
    found = attended(row, columns, 1, 0).float()
    torch.testing.assert_close(found, exact, atol=0.02, rtol=0.02)


def test_a_part_of_the_columns_that_a_window_hides_has_no_weight() -> None:
    torch.manual_seed(4)
    row = [torch.randn(1, 4, n, 64).to(torch.bfloat16) for n in (1, 700, 700)]
    seen = [row[0], *(each[:, :, 600:] for each in row[1:])]
    hidden, short = attended(row, 768, 2, 1, window=100), attended(seen, 128, 2, 1)
    torch.testing.assert_close(hidden, short, atol=0.01, rtol=0.01)


def test_a_forward_that_failed_halfway_can_be_repeated_with_the_same_logits(monkeypatch) -> None:
    decoder, _ = reference("llama")
    batch = joined(decoder, [1, 3])
    expected, written = decode.forward(decoder, batch), labs_attention.Step.written

    def broken(step: Any, slots: Any, *states: Any) -> Any:
        if slots is batch.cache.layers[2]:
            raise RuntimeError("broken")
        return written(step, slots, *states)

    with monkeypatch.context() as patch:
        patch.setattr(labs_attention.Step, "written", broken)
        with pytest.raises(RuntimeError, match="broken"):
            loop.step(decoder, batch)
    assert torch.equal(decode.forward(decoder, batch), expected)


def test_dropping_a_batch_frees_its_buffers_at_once() -> None:
    batch = newcomer(reference("llama")[0], FOUR[2])
    gc.disable()
    try:
        buffer = weakref.ref(batch.cache.layers[0].keys)
        del batch
        assert buffer() is None
    finally:
        gc.enable()


def test_a_row_in_a_used_slot_sees_nothing_of_the_row_before() -> None:
    decoder, expected = reference("llama")
    batch = decode.join(newcomer(decoder, FOUR[0], "short"), newcomer(decoder, PROMPTS[5], "long"))
    for _ in range(5):
        batch, _ = loop.step(decoder, batch)
    kept = decode.keep(batch, ["short"])
    assert kept is not None
    batch = decode.join(kept, newcomer(decoder, FOUR[1], "next"))
    assert answers_of(decoder, [batch]) == {"short": expected[0], "next": expected[1]}


@pytest.mark.parametrize(("columns", "again"), [(64, 64), (128, 128), (128, None)])
def test_making_room_that_failed_halfway_can_be_repeated_or_left(
    columns: int, again: int | None, monkeypatch: Any
) -> None:
    decoder, expected = reference("llama")
    batch = joined(decoder, [0, 1])
    failing_at(2, monkeypatch, decode.SlotLayer, "resize")
    with pytest.raises(torch.OutOfMemoryError):
        batch.cache.make_room(2, columns)
    if again:
        batch, _ = loop.step(decoder, batch)
        batch.cache.make_room(2, again)
    for key in (2, 3):
        batch = decode.join(batch, newcomer(decoder, FOUR[key], key))
    batch = decode.join(batch, newcomer(decoder, FOUR[1], "last"))  # doubles the rows once more
    assert answers_of(decoder, [batch]) == {**dict(enumerate(expected)), "last": expected[1]}


def test_memory_that_runs_out_on_a_cpu_is_known_by_its_words() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**55, dtype=torch.uint8)
    assert decode.out_of_memory(caught.value)
    assert not decode.out_of_memory(RuntimeError("shapes cannot be multiplied"))


def test_a_step_of_more_rows_than_keep_their_bits_goes_in_calls_of_fewer(monkeypatch: Any) -> None:
    decoder = prepare(random_model("llama"))
    batch = newcomer(decoder, [5, 7])
    for index in range(1, 9):
        batch = decode.join(batch, newcomer(decoder, [5 + index, 7], index))
    calls: list[int] = []
    call = decode.call_model

    def counted(decoder: Any, ids: torch.Tensor, *rest: Any) -> Any:
        calls.append(len(ids))
        return call(decoder, ids, *rest)

    monkeypatch.setattr(decode, "call_model", counted)
    parts = decode.forward(dataclasses.replace(decoder, steady=4), batch)
    torch.testing.assert_close(parts, decode.forward(decoder, batch), atol=1e-4, rtol=1e-3)
    assert calls == [3, 3, 3, 9]


@torch.inference_mode()
def test_guesses_continue_the_first_slot_and_each_sees_those_before_it() -> None:
    decoder, expected = reference("llama")
    batch, tokens = decode.keep(joined(decoder, [0, 2]), [2]), expected[2]
    assert batch is not None
    written = [batch.rows[0].written + n for n in range(3)]
    logits = decode.forward_slots(decoder, batch, torch.tensor(tokens[:3])[:, None], written)
    assert logits.argmax(-1).tolist() == tokens[1:4]


def test_a_row_is_greedy_and_has_neutral_options_by_default() -> None:
    neutral = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0, "seed": 0}
    neutral |= {"frequency_penalty": 0.0, "presence_penalty": 0.0, "temperature": 0.0}
    assert decode.Sampling() == decode.Sampling(**neutral, logit_bias=(), processors=())
    assert row_of([4, 5, 4]).seen == {4, 5}
