# SPDX-License-Identifier: Apache-2.0
"""labs_kv: keys and values in 8 bits, for rows alone and together."""

from __future__ import annotations

import dataclasses
import random
import statistics
from typing import Any

import msgspec
import pytest
import torch
from decoding import FOUR, answers_of, joined, run_at_random
from kit import PROMPTS, load, newcomer, prepare, random_model, row_of

import labs
import labs_calls
import labs_compare
import labs_decode as decode
import labs_kv
import labs_loop as loop
import labs_prefix_files
import labs_prefixes

KINDS = ["llama", "qwen3", "gemma2", "gemma3_text", "gpt_oss", "gpt_neox", "phi3"]


def in_bytes(kind: str, **options: Any) -> decode.Decoder:
    return labs_kv.in_bytes(prepare(random_model(kind), **options))


def ids_of(seed: int, length: int) -> list[int]:
    chance = random.Random(seed)
    return [chance.randrange(3, 200) for _ in range(length)]


def choices_of(decoder: decode.Decoder, rows: list[decode.Row], most: int = 8) -> dict[int, Any]:
    """Return all choices by row id, with their logprobs, of rows that join one after another."""
    found: dict[int, Any] = {row.id: [] for row in rows}
    by_id = {row.id: row for row in rows}
    for key, outcome in loop.run(decoder, iter([*rows, None]), most, loop.Loop()):
        found[key].append(outcome)
        by_id[key].over = sum(by_id[key].generated.values()) >= by_id[key].max_new_tokens
    return found


# ---------------------------------------------------------------- numbers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_are_off_by_half_a_step_of_their_own_head_and_token(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    states = (torch.randn(2, 3, 5, 16) * torch.logspace(-4, 4, 5)[:, None]).to(dtype)
    states[0, 0, 0] = 0
    keys, values = labs_kv.packed_keys(states), labs_kv.packed_values(states)
    assert (keys.dtype, keys.shape[-1]) == (torch.int8, 16 + 4)
    assert (values.dtype, values.shape[-1]) == (torch.uint8, 16 + 8)
    exact = states.float()
    most = exact.abs().amax(-1, keepdim=True) / 127 / 2
    assert ((labs_kv.read_keys(keys, torch.float32) - exact).abs() <= most * 1.001).all()
    most = (exact.amax(-1, keepdim=True) - exact.amin(-1, keepdim=True)) / 255 / 2
    assert ((labs_kv.read_values(values, torch.float32) - exact).abs() <= most * 1.01 + 1e-9).all()


def test_values_have_the_same_form_where_torch_has_no_kernel_that_makes_it() -> None:
    states = torch.randn(1, 2, 7, 32, generator=torch.Generator().manual_seed(1))
    ours, theirs = labs_kv.rows_of_values(states), labs_kv.packed_values(states)
    found = [labs_kv.read_values(each, torch.float32) for each in (ours, theirs)]
    torch.testing.assert_close(*found, atol=0.03, rtol=0)
    assert ours.shape == theirs.shape


@pytest.mark.parametrize("speculative", [False, True])
def test_a_step_reads_the_bytes_as_dequantised_keys_and_values_are_read(speculative: bool) -> None:
    torch.manual_seed(2)
    rows, groups, heads, total, dim = 3, 2, 6, 512, 16
    q = torch.randn(rows, heads, 1, dim)
    keys, values = (torch.randn(rows, groups, total + 64, dim) for _ in range(2))
    keys, values = labs_kv.packed_keys(keys), labs_kv.packed_values(values)
    keys, values = keys[:, :, :total], values[:, :, :total]
    if speculative:
        keys, values = (each[1:2].expand(rows, -1, -1, -1) for each in (keys, values))
    seen = torch.arange(total) < torch.tensor([[300], [512], [1]])
    mask = decode.additive(seen.view(rows, 1, 1, total), q.dtype)
    found, _ = labs_kv.attention(torch.nn.Module(), q, keys, values, mask, scaling=0.3)
    states = labs_kv.read_keys(keys, q.dtype), labs_kv.read_values(values, q.dtype)
    wanted, _ = decode.attention_invariant(torch.nn.Module(), q, *states, mask, scaling=0.3)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


# ---------------------------------------------------------------- rows


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_logits_are_near_those_of_all_bits(kind: str) -> None:
    plain, decoder = prepare(random_model(kind)), in_bytes(kind)
    most = 0.5 if kind == "gpt_oss" else 0.1  # a token may go to another of its experts
    own = labs_compare.Own.of(plain.model)
    offs = [
        labs_compare.off(logits, own.logits[text][place])
        for text, place, logits in labs_compare.together(decoder, own.texts)
    ]
    assert 0 < statistics.median(offs) < most


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_join_and_leave_have_the_tokens_that_they_have_alone(kind: str) -> None:
    decoder = in_bytes(kind)
    alone = [answers_of(decoder, [newcomer(decoder, ids)])[0] for ids in PROMPTS]
    together = run_at_random(decoder, PROMPTS, 1)
    assert [b[: len(a)] == a[: len(b)] for a, b in zip(alone, together, strict=True)] == [True] * 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_has_the_same_bits_alone_and_beside_others(dtype: torch.dtype) -> None:
    decoder = labs_kv.in_bytes(prepare(random_model("llama").to(dtype)))
    if not decoder.invariant:
        pytest.skip("the products of this dtype are not invariant on this machine")

    def rows() -> list[decode.Row]:
        found = []
        for number, length in enumerate((5, 300, 40, 17, 2)):
            row = row_of(ids_of(number, length), number, logprobs=2, temperature=number % 2)
            row.max_new_tokens, row.lookahead = 30, 3 * (number % 2)
            found.append(row)
        return found

    together = choices_of(decoder, rows())
    assert all(len(each) == 30 for each in together.values())
    for row in rows():
        assert choices_of(decoder, [row])[row.id] == together[row.id]


def test_guessed_tokens_are_those_of_single_steps() -> None:
    decoder = in_bytes("llama")
    found = []
    for lookahead in (0, 4):
        row = row_of([5, 6, 7, 8, 9, 5, 6, 7, 8, 9, 5, 6], 0, logprobs=1)
        row.lookahead = lookahead
        found.append(choices_of(decoder, [row]))
    assert found[0] == found[1]


def test_prompts_that_share_a_call_read_what_is_stored() -> None:
    decoder = in_bytes("llama")
    batches = [decode.new_batch(decoder, row_of(prompt, i)) for i, prompt in enumerate(FOUR[1:])]
    packed = labs_calls.prefill_packed(decoder, batches)
    for batch, prompt in zip(packed, FOUR[1:], strict=True):
        alone = decode.prefill(decoder, decode.new_batch(decoder, row_of(prompt)))
        torch.testing.assert_close(batch.logits, alone.logits, atol=1e-5, rtol=1e-4)


def test_slots_that_grow_and_batches_that_split_keep_their_bits(monkeypatch: Any) -> None:
    monkeypatch.setattr(decode, "FIRST_COLUMNS", 1)
    decoder = in_bytes("llama")
    found = []
    for each in (decoder, dataclasses.replace(decoder, grow=None)):
        row = row_of(ids_of(1, 9), 0, logprobs=1)
        row.max_new_tokens = 150
        found.append(choices_of(each, [row]))
    assert found[0] == found[1]
    expected = answers_of(decoder, [joined(decoder, range(4))])
    batch = joined(decoder, range(4))
    halves = labs_calls.split_after_oom(decoder, batch)
    assert answers_of(decoder, halves) == expected
    apart = [labs_calls.apart(decoder, joined(decoder, range(4)), i) for i in range(4)]
    assert answers_of(decoder, apart) == expected


# ---------------------------------------------------------------- prefixes and memory


def test_stored_prefixes_hold_the_bytes_and_rows_go_on_from_them(monkeypatch: Any) -> None:
    monkeypatch.setattr(decode, "CHUNK", 8)
    decoder, ids = in_bytes("llama"), ids_of(3, 30)
    prefixes = labs_prefixes.Prefixes()
    prefixes.add("", newcomer(decoder, ids), 0, exact=True)
    [kept] = prefixes.kept
    assert {each.dtype for each in kept.buffers} == {torch.int8, torch.uint8}
    chunk = labs_prefix_files.unpacked(labs_prefix_files.packed(kept.buffers))
    assert all(torch.equal(a, b) for a, b in zip(chunk, kept.buffers, strict=True))
    more = [*ids, 7, 8, 9]
    batch = decode.new_batch(decoder, row_of(more))
    labs_prefixes.recall(decoder, batch, kept, 24)
    alone = decode.new_batch(decoder, row_of(more))
    while batch.pending:
        batch = decode.prefill(decoder, batch)
    while alone.pending:
        alone = decode.prefill(decoder, alone)
    assert torch.equal(batch.logits, alone.logits)
    assert answers_of(decoder, [batch]) == answers_of(decoder, [alone])


@pytest.mark.parametrize(("dim", "share"), [(64, 0.55), (128, 0.53)])
def test_slots_take_about_half_the_memory_of_16_bits(dim: int, share: float) -> None:
    model = random_model("llama", head_dim=dim)
    plain = prepare(model)
    assert plain.model.dtype == torch.float32
    whole, one = plain.column_bytes, newcomer(plain, [5, 6, 7]).cache.bytes_per_column
    decoder = labs_kv.in_bytes(plain)
    two = newcomer(decoder, [5, 6, 7]).cache.bytes_per_column
    assert (whole, decoder.column_bytes) == (one, two)
    assert two <= share * one / 2


# ---------------------------------------------------------------- the setting


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("mamba2", "more than keys and values of each token .LinearAttentionLayer"),
        ("bamba", "more than keys and values of each token"),
        ("deepseek_v3", "compressed already"),
        ("bloom", "does not hold its keys and values"),
    ],
)
def test_models_whose_caches_cannot_have_8_bits_are_refused(kind: str, why: str) -> None:
    with pytest.raises(ValueError, match=f"kv_dtype = int8: .*{why}"):
        in_bytes(kind)


def test_a_model_whose_logits_suffer_is_refused_and_runs_without(monkeypatch: Any) -> None:
    monkeypatch.setattr(labs_kv, "LARGEST", 1)
    model = random_model("llama")
    plain = prepare(model)
    name = model.config._attn_implementation
    with pytest.raises(ValueError, match="kv_dtype = int8: rows have other logits"):
        labs_kv.in_bytes(plain)
    assert model.config._attn_implementation == name


def test_the_setting_reaches_the_slots_and_the_fingerprint(tiny_folder: Any) -> None:
    spec = {"torch_dtype": "fp32", "quantization": labs.Quantization(kv_dtype="int8")}
    model = load(tiny_folder, **spec)
    plain = load(tiny_folder, torch_dtype="fp32")
    assert model.decoder.slots is labs_kv.ByteSlots
    assert plain.decoder.slots is decode.Slots
    assert model.decoder.column_bytes < plain.decoder.column_bytes / 2
    inputs = labs.build_inputs(model, prompt="hello")
    done = labs.generate(model, inputs, labs.Generation(max_new_tokens=4))
    assert done.fingerprint is not None
    assert done.fingerprint.quantization == {"kv_dtype": "int8"}
    marks = {labs_prefix_files.identity(each) for each in (model, plain)}
    assert len(marks) == 2


def test_other_kinds_of_numbers_are_refused() -> None:
    for wrong in ("int4", "fp8", ""):
        with pytest.raises(labs.ConfigError, match="kv_dtype"):
            labs.load_config(None, env={}, overrides={"kv_dtype": wrong})
    config = labs.load_config(None, env={"LABS_KV_DTYPE": "int8"})
    assert config.model.quantization == labs.Quantization(kv_dtype="int8")
    assert msgspec.to_builtins(config.model.quantization)["kv_dtype"] == "int8"


@pytest.mark.parametrize("copies", [True, False])
def test_a_lone_row_is_computed_beside_as_many_copies_as_without(copies: bool) -> None:
    decoder = prepare(random_model("llama", intermediate_size=128))
    decoder = dataclasses.replace(decoder, duplicates_lone_row=copies)
    assert labs_kv.in_bytes(decoder).duplicates_lone_row == copies
