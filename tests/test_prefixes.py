# SPDX-License-Identifier: Apache-2.0
"""labs_prefixes: rows that begin with the stored columns of earlier rows."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from decoding import answers_of
from kit import newcomer, prepare, random_model, row_of

import labs
import labs_decode as decode
import labs_loop as loop
import labs_prefixes as prefixes_room


@pytest.fixture
def chunk(monkeypatch):
    """Let a chunk have eight tokens, so that short prompts are worth storing."""
    monkeypatch.setattr(decode, "CHUNK", 8)


def prefilled(decoder: decode.Decoder, batch: decode.Batch) -> decode.Batch:
    while batch.pending:
        batch = decode.prefill(decoder, batch)
    return batch


def added(decoder: Any, prompts: list[list[int]], **options: Any) -> prefixes_room.Prefixes:
    """Return a store of the columns that rows with these prompts have after one step."""
    prefixes = prefixes_room.Prefixes(**options)
    for ids in prompts:
        prefixes.add("", newcomer(decoder, ids), 0, exact=False)
    return prefixes


def recalled(
    decoder: decode.Decoder, prefixes: prefixes_room.Prefixes, ids: list[int], exact: bool
) -> tuple[decode.Batch, int]:
    """Return a newcomer that began with a stored prefix, and how many columns that has."""
    prefix, columns = prefixes.find("", ids, exact and decode.CHUNK)
    assert prefix is not None
    batch = decode.new_batch(decoder, row_of(ids))
    batch = prefixes_room.recall(decoder, batch, prefix, columns)
    assert batch.pending == len(ids) - columns
    return prefilled(decoder, batch), columns


def whole(decoder: decode.Decoder, ids: list[int]) -> decode.Batch:
    return prefilled(decoder, decode.new_batch(decoder, row_of(ids)))


def has_the_bits(mine: decode.Batch, theirs: decode.Batch) -> bool:
    pairs = zip(mine.cache.buffers, theirs.cache.buffers, strict=True)
    columns = len(mine.rows[0].ids)
    same = all(torch.equal(a[:, :, :columns], b[:, :, :columns]) for a, b in pairs)
    return same and torch.equal(mine.logits, theirs.logits)


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "llama4_text", "deepseek_v3"])
def test_a_row_that_begins_with_stored_columns_goes_on_as_one_that_does_not(kind, chunk):
    decoder = prepare(random_model(kind))
    batch = newcomer(decoder, [random.Random(1).randrange(3, 200) for _ in range(30)])
    for _ in range(5):
        batch, _ = loop.step(decoder, batch)
    prefixes = prefixes_room.Prefixes()
    prefixes.add("", batch, 0, exact=False)
    [kept] = prefixes.kept
    assert (len(kept.ids), kept.exact_columns) == (35, 24)
    ids = [*kept.ids, 7, 8, 9]
    alone = whole(decoder, ids)
    for exact, known in ((False, 35), (True, 24)):
        batch, columns = recalled(decoder, prefixes, ids, exact)
        assert columns == known
        torch.testing.assert_close(batch.logits, alone.logits, atol=2e-3, rtol=1e-3)
        assert not exact or has_the_bits(batch, alone)
    assert answers_of(decoder, [batch]) == answers_of(decoder, [alone])


@pytest.mark.real
@pytest.mark.parametrize("dtype", ["auto", "fp32"])  # auto is bf16, if the processor has it
def test_whole_chunks_of_the_default_model_have_the_bits_of_a_prefill(dtype):
    decoder = labs.load_model(labs.load_config(env={}, overrides={"torch_dtype": dtype})).decoder
    chance = random.Random(2)
    first = [chance.randrange(2000) for _ in range(600)]
    ids = [*first[:590], *(chance.randrange(2000) for _ in range(30))]
    batch, columns = recalled(decoder, added(decoder, [first]), ids, True)
    assert columns == 512
    assert has_the_bits(batch, whole(decoder, ids))


@pytest.mark.parametrize("kind", ["mamba2", "bamba", "mamba", "lfm2", "jamba", "rwkv"])
def test_states_cannot_be_cut_and_are_not_reused(kind):
    assert not decode.prepare(random_model(kind)).can_reuse_prefix


def test_the_longest_common_prefix_is_found_and_the_last_token_is_always_computed(chunk):
    first, second = [*range(3, 30)], [*range(3, 20), *range(100, 120)]
    prefixes = added(prepare(random_model("llama")), [first, second])
    assert [each.ids for each in prefixes.kept] == [first, second]
    for ids, exact, columns in (
        ([*first, 5], False, 27),
        ([*first, 5], True, 24),
        (first, False, 26),
        ([*range(3, 19)], True, 8),  # 16 would leave nothing to compute
        ([*second[:27], 7], False, 27),
        ([*range(3, 10), 9, 9], False, 0),  # less than a chunk
        ([4, *first], False, 0),
        ([3], False, 0),
    ):
        assert prefixes.find("", ids, exact and decode.CHUNK)[1] == columns
    assert prefixes.find("another", [*first, 5], 0) == (None, 0)


def test_the_store_stays_within_its_bytes_and_deletes_the_least_recently_used_first(chunk):
    decoder = prepare(random_model("llama"))
    batches = [newcomer(decoder, [first, *range(3, 34)]) for first in range(3, 7)]
    one = 32 * batches[0].cache.bytes_per_column
    prefixes = prefixes_room.Prefixes(max_bytes=3 * one + 1)
    for batch in batches[:3]:
        prefixes.add("", batch, 0, exact=True)
    assert prefixes.nbytes == 3 * one
    prefixes.find("", batches[0].rows[0].ids, decode.CHUNK)
    for batch in (batches[3], batches[0]):  # the second one is known: nothing changes
        prefixes.add("", batch, 0, exact=True)
        assert [each.ids[0] for each in prefixes.kept] == [5, 3, 6]
    assert prefixes.release()
    assert not prefixes.release()
    for most in (0, one - 1):
        prefixes = prefixes_room.Prefixes(max_bytes=most)
        prefixes.add("", batches[0], 0, exact=True)
        assert prefixes.kept == []


def test_without_a_limit_an_eighth_of_the_free_memory_is_taken(chunk, monkeypatch):
    decoder = prepare(random_model("llama"))
    batches = [newcomer(decoder, [first, *range(3, 34)]) for first in range(3, 7)]
    one = 32 * batches[0].cache.bytes_per_column
    prefixes = prefixes_room.Prefixes()
    cases = ((8 * one - 1, 0), (8 * one, 1), (15 * one, 2), (14 * one - 1, 1))
    for batch, (free, kept) in zip(batches, cases, strict=True):
        monkeypatch.setattr(decode, "available_bytes", lambda device, free=free: free)
        prefixes.add("", batch, 0, exact=False)
        assert len(prefixes.kept) == kept


def test_a_longer_row_replaces_its_own_prefix_but_not_another_owners(chunk):
    decoder = prepare(random_model("llama"))
    prefixes = added(decoder, [[*range(3, 20)]])
    prefixes.add("other", newcomer(decoder, [*range(3, 20)]), 0, exact=False)
    prefixes.add("", newcomer(decoder, [*range(3, 30)]), 0, exact=False)
    assert [(each.owner, len(each.ids)) for each in prefixes.kept] == [("other", 17), ("", 27)]


def test_a_stored_prefix_is_a_copy_that_later_rows_cannot_change(chunk):
    decoder = prepare(random_model("llama"))
    batch, prefixes = newcomer(decoder, [*range(3, 30)]), prefixes_room.Prefixes()
    prefixes.add("", batch, 0, exact=False)
    before = [buffer.clone() for buffer in prefixes.kept[0].buffers]
    with torch.inference_mode():
        for buffer in batch.cache.buffers:
            buffer.fill_(7)
    recalled(decoder, prefixes, [*range(3, 30), 9], False)
    assert all(map(torch.equal, before, prefixes.kept[0].buffers))
