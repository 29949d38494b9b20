# SPDX-License-Identifier: Apache-2.0
"""labs_shared: rows that begin alike read those columns from one copy, and keep their bits."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from decoding import failing_at
from kit import model_around, prepare, random_model, row_of

import labs
import labs_calls
import labs_decode as decode
import labs_loop as loop
import labs_prefix_files
import labs_prefix_folder
import labs_prefixes
import labs_shared
import labs_shared_attention

BEGINNING = [random.Random(0).randrange(3, 200) for _ in range(1100)]
KINDS = {
    "llama": {"num_attention_heads": 4, "num_key_value_heads": 2},
    "qwen3": {"num_attention_heads": 8, "num_key_value_heads": 1},
    "mistral": {"sliding_window": 300},  # hides some of the shared columns
    "gemma3_text": {"sliding_window": 64},  # all of them, in some layers
    "phi3": {"num_attention_heads": 8, "num_key_value_heads": 4},
}


def decoder_of(kind: str = "llama", dtype: torch.dtype = torch.float32) -> decode.Decoder:
    model = random_model(kind, max_position_embeddings=4096, **KINDS[kind])
    return prepare(model.to(dtype))


def rows_of(ends: Sequence[int], common: int = 520, new: int = 40, **more: Any) -> list[decode.Row]:
    """Return rows that begin alike, followed by so many ids of their own each."""
    found = []
    for number, end in enumerate(ends):
        chance = random.Random(number)
        ids = BEGINNING[:common] + [chance.randrange(3, 200) for _ in range(end)]
        row = row_of(ids, number, logprobs=2, temperature=number % 2 * 1.0, seed=number)
        found.append(dataclasses.replace(row, max_new_tokens=new, exact_prefix=True, **more))
    return found


class Watched(loop.Loop):
    """A loop that remembers (rows, shared columns) of its batches and the bytes of their slots."""

    def __init__(self, **options: Any) -> None:
        super().__init__(before_step=self.see, **options)
        self.seen, self.most, self.kept = set[tuple[int, int]](), 0, set[int]()

    def see(self) -> None:
        self.seen |= {(len(b.rows), b.cache.cursor.shared) for b in self.batches}
        layers = [layer for batch in self.batches for layer in batch.cache.layers]
        held = {t.data_ptr(): t.nbytes for layer in layers for t in layer.buffers}
        held |= {t.data_ptr(): t.nbytes for layer in layers for t in getattr(layer, "shared", ())}
        self.most = max(self.most, sum(held.values()))


def decoded(
    decoder: decode.Decoder, rows: Sequence[decode.Row], state: loop.Loop | None = None
) -> dict[int, Any]:
    """Return all choices by row id, with their logprobs, of rows that run together."""
    found: dict[int, Any] = {row.id: [] for row in rows}
    by_id = {row.id: row for row in rows}
    state = state or loop.Loop(prefixes=labs_prefixes.Prefixes())
    for key, outcome in loop.run(decoder, iter([*rows, None]), len(rows), state):
        found[key].append(outcome)
        row = by_id[key]
        row.over = sum(row.generated.values()) >= row.max_new_tokens
    return found


def alone(decoder: decode.Decoder, rows: Sequence[decode.Row]) -> dict[int, Any]:
    """Return the choices of rows that run one by one, with slots of their own."""
    found = {}
    for row in rows:
        found |= decoded(decoder, [row], loop.Loop())
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_share_columns_have_the_bits_of_rows_alone(kind: str, dtype: Any) -> None:
    decoder, ends = decoder_of(kind, dtype), (9, 70, 200, 1, 9)
    assert decoder.invariant
    if decoder.join is None:
        pytest.skip("products of this CPU, for heads of this size, round by the number of lines")
    together = Watched(prefixes=labs_prefixes.Prefixes())
    found = decoded(decoder, rows_of(ends), together)
    assert {(4, 512)} <= together.seen
    assert found == alone(decoder, rows_of(ends))


@pytest.mark.parametrize("common", [256, 330, 400, 575])
def test_any_number_of_blocks_can_be_shared(common: int) -> None:
    decoder, ends = decoder_of(), [600 - common + n for n in range(3)]
    together = Watched(prefixes=labs_prefixes.Prefixes())
    found = decoded(decoder, rows_of(ends, common, 70), together)
    assert (3, common // 64 * 64) in together.seen
    assert found == alone(decoder, rows_of(ends, common, 70))


def test_memory_and_time_of_shared_columns_count_once() -> None:
    decoder, ends, most = decoder_of(), [8] * 12, {}
    for join in (decoder.join, None):
        state = Watched(prefixes=labs_prefixes.Prefixes())
        used = dataclasses.replace(decoder, join=join)
        decoded(used, rows_of(ends, 1032, 60), state)
        most[join] = state.most
    assert most[decoder.join] < 0.2 * most[None]


def test_rows_of_another_owner_share_nothing() -> None:
    decoder, state = decoder_of(), Watched(prefixes=labs_prefixes.Prefixes())
    decoder = dataclasses.replace(decoder, weight_bytes=512 * decoder.column_bytes)
    rows = rows_of([8] * 4)
    for row in rows:
        row.owner = f"owner {row.id % 2}"
    found = decoded(decoder, rows, state)
    assert max(rows for rows, shared in state.seen if shared) == 2
    assert found == alone(decoder, rows_of([8] * 4))


def batches_of(decoder: decode.Decoder, rows: Sequence[decode.Row]) -> list[decode.Batch]:
    """Return the batches of rows that have made their first step."""
    batches: list[decode.Batch] = []
    for row in rows:
        batch = decode.new_batch(decoder, row)
        while batch.pending:
            batch = decode.prefill(decoder, batch)
        batches = (decoder.join or loop.join_best)(decoder, batches, loop.step(decoder, batch)[0])
    return batches


def shape_of(batches: Sequence[decode.Batch]) -> list[tuple[list[int], int]]:
    """Return the rows' numbers and the shared columns of each batch."""
    return [([row.id for row in b.rows], b.cache.cursor.shared) for b in batches]


def test_rows_share_only_if_that_saves_more_than_the_weights_take() -> None:
    decoder, rows = decoder_of(), rows_of([8, 8, 8, 8])
    per_row = 512 * decoder.column_bytes
    little = dataclasses.replace(decoder, weight_bytes=8 * per_row)
    assert shape_of(batches_of(little, rows[:2])) == [([0, 1], 512)]  # nobody else needs a call
    little = dataclasses.replace(decoder, weight_bytes=8 * per_row + 8)
    assert shape_of(batches_of(little, rows_of([8, 8]))) == [([0, 1], 0)]
    other = dataclasses.replace(rows_of([20], 0)[0], id=9)
    much = dataclasses.replace(decoder, weight_bytes=2 * per_row)
    assert shape_of(batches_of(much, [other, *rows_of([8, 8])])) == [([9, 0, 1], 0)]
    assert shape_of(batches_of(much, [other, *rows_of([8] * 3)])) == [([9], 0), ([0, 1, 2], 512)]


def test_a_batch_whose_sharing_does_not_pay_any_more_joins_the_others() -> None:
    decoder = decoder_of()
    decoder = dataclasses.replace(decoder, weight_bytes=4 * 512 * decoder.column_bytes)
    batches = batches_of(decoder, rows_of([8, 8]))
    assert shape_of(batches) == [([0, 1], 512)]
    expected = alone(decoder, rows_of([8, 8]))
    other = rows_of([30], 0)[0]
    other.id = 9
    new = decode.prefill(decoder, decode.new_batch(decoder, other))
    [batch] = labs_shared.join(decoder, batches, loop.step(decoder, new)[0])
    assert shape_of([batch]) == [([9, 0, 1], 0)]
    for number in range(1, 30):
        batch, choices = loop.step(decoder, batch)
        assert choices[1:] == [expected[key][number] for key in (0, 1)]


@pytest.mark.parametrize("call", [1, 2, 3, 5])
def test_rows_run_on_if_there_is_no_memory_to_share(call: int, monkeypatch: Any) -> None:
    decoder = decoder_of()
    failing_at(call, monkeypatch, labs_shared, "_apart")
    found = decoded(decoder, rows_of([8] * 4))
    assert found == alone(decoder, rows_of([8] * 4))


def test_a_batch_that_shares_is_halved_and_stored_as_any_other(monkeypatch: Any) -> None:
    decoder = decoder_of()
    expected = alone(decoder, rows_of([8, 9, 10, 11]))
    [batch] = batches_of(decoder, rows_of([8, 9, 10, 11]))
    assert batch.cache.cursor.shared == 512
    [batch] = labs_calls.split_after_oom(decoder, batch)
    for number in range(1, 10):
        batch, choices = loop.step(decoder, batch)
        assert choices == [expected[key][number] for key in range(4)]
    kept = decode.keep(batch, [0, 3])
    assert kept is not None
    single = [labs_calls.apart(decoder, kept, index) for index in (0, 1)]
    store = labs_prefixes.Prefixes()
    for index in (0, 1):
        store.add("", kept, index, exact=False)
    for number, (one, prefix) in enumerate(zip(single, store.kept, strict=True)):
        key, columns = one.rows[0].id, one.rows[0].written
        assert prefix.ids == one.rows[0].ids[:columns]
        pairs = zip(prefix.buffers, one.cache.buffers, strict=True)
        assert all(torch.equal(a, b[0, :, :columns]) for a, b in pairs), number
        for at in range(10, 14):
            one, choices = loop.step(decoder, one)
            assert choices == [expected[key][at]]


@pytest.mark.parametrize("limits", [(0, 64), (64, 512), (448, 520), (512, 528), (500, 512)])
def test_any_columns_of_a_row_are_those_that_it_has_alone(limits: tuple[int, int]) -> None:
    decoder = decoder_of()
    [batch] = batches_of(decoder, rows_of([8, 8]))
    whole = labs_calls.apart(decoder, batch, 1)
    for mine, theirs in zip(batch.cache.stateful_layers, whole.cache.stateful_layers, strict=True):
        pairs = zip(mine.read(1, *limits), theirs.read(0, *limits), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_files_of_a_row_that_shares_columns_are_those_of_a_row_alone(tmp_path: Path) -> None:
    decoder = decoder_of()
    [batch] = batches_of(decoder, rows_of([8, 8]))
    memory, names = labs_prefixes.Prefixes(0), list[set[str]]()
    for place, (each, index) in enumerate([(batch, 1), (labs_calls.apart(decoder, batch, 1), 0)]):
        folder = labs_prefix_folder.Folder(tmp_path / str(place), 2**30)
        store = labs_prefix_files.PrefixFiles(memory, folder, b"mark")
        store.store(decoder, each, index)
        store.flush()
        names.append({path.name for path in (tmp_path / str(place)).iterdir()})
    assert names[0] == names[1]  # a name holds a checksum of the contents
    assert len(names[0]) == 2


def test_guesses_of_the_last_row_of_a_batch_read_the_shared_columns() -> None:
    decoder = decoder_of()
    rows = rows_of([8, 8])
    for row in rows:
        row.lookahead, row.sampling = 4, decode.Sampling(logit_bias=((50, 1e6),))
    [batch] = batches_of(decoder, rows)
    batch = decode.keep(batch, [1])
    assert batch is not None
    assert batch.cache.cursor.shared == 512
    taken = 0
    for _ in range(4):
        batch, choices = labs_calls.step_speculative(decoder, batch)
        taken += len(choices)
    assert taken > 4
    assert {*batch.rows[0].ids[-taken:]} == {50}


def test_hooks_of_the_model_see_transformers_modules() -> None:
    decoder = decoder_of()
    hook = decoder.model.register_forward_hook(lambda *_: None)
    assert shape_of(batches_of(decoder, rows_of([8, 8]))) == [([0, 1], 0)]
    hook.remove()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_share_nothing_where_that_would_change_bits(dtype: Any, monkeypatch: Any) -> None:
    assert decoder_of(dtype=dtype).join is labs_shared.join
    own_parts = labs_shared_attention._own_parts
    slightly = lambda states: [part * (1 + 2**-7) for part in own_parts(states)]  # noqa: E731
    monkeypatch.setattr(labs_shared_attention, "_own_parts", slightly)
    assert decoder_of(dtype=dtype).join is None


@pytest.mark.parametrize("kind", ["gemma2", "gpt2", "bamba", "mamba2", "deepseek_v3"])
def test_models_with_other_attention_share_nothing(kind: str) -> None:
    assert prepare(random_model(kind)).join is None


def test_choices_of_one_prompt_share_it_and_have_their_own_texts() -> None:
    model = model_around(decoder_of(), "tiny", 4096)
    inputs = [labs.Inputs(tuple(BEGINNING), "")] * 5
    options = [labs.Generation(max_new_tokens=30, temperature=1.0, seed=n) for n in range(5)]
    texts: dict[int, str] = dict.fromkeys(range(5), "")
    for index, event in labs.stream_batch(model, inputs, options):
        texts[index] += event.text if isinstance(event, labs.Delta) else ""
    alone = [labs.generate(model, inputs[0], each).text for each in options]
    assert [*texts.values()] == alone
    assert len({*alone}) == 5


@pytest.mark.parametrize("others", [0, 2])
def test_rows_that_share_columns_wait_for_memory_as_others_do(
    others: int, monkeypatch: Any
) -> None:
    decoder, seen, columns = decoder_of(), set[bool](), 3200
    expected = alone(decoder, rows_of([8] * 6, new=330))
    state = Watched(prefixes=labs_prefixes.Prefixes(0))

    def free(_: object) -> int:
        held = Watched()
        held.batches = [*state.batches, *state.prefilling]
        held.see()
        return max(columns * decoder.column_bytes - held.most, 0)

    def see() -> None:
        state.see()
        seen.update(row.waits for row in state.rows.values() if row.shared)

    state.before_step = see
    monkeypatch.setattr(decode, "FIRST_COLUMNS", 1)
    monkeypatch.setattr(decode, "slot_budget", free)
    rows = rows_of([8] * 6, new=330)
    more = [dataclasses.replace(row, id=9 + row.id) for row in rows_of([30] * others, 0, new=330)]
    found = decoded(decoder, [*rows, *more], state)
    assert {key: found[key] for key in expected} == expected
    assert seen == {True, False}
    assert max(shared for _, shared in state.seen) == 512


def test_a_row_that_waits_is_not_spread_by_a_newcomer(monkeypatch: Any) -> None:
    decoder = decoder_of()
    decoder = dataclasses.replace(decoder, weight_bytes=4 * 512 * decoder.column_bytes)
    [batch] = batches_of(decoder, rows_of([8, 8]))
    kept = decode.keep(batch, [1])
    assert kept is not None
    kept.rows[0].waits = True
    other = dataclasses.replace(rows_of([30], 0)[0], id=9)
    new = decode.prefill(decoder, decode.new_batch(decoder, other))
    found = labs_shared.join(decoder, [kept], loop.step(decoder, new)[0])
    assert sorted(shape_of(found)) == [([1], 512), ([9], 0)]


@pytest.mark.parametrize("call", [1, 2])
def test_a_row_knows_what_its_slot_leaves_out_when_memory_runs_out(
    call: int, monkeypatch: Any
) -> None:
    decoder = decoder_of()
    batches = batches_of(dataclasses.replace(decoder, join=None), rows_of([8, 8]))
    *_, third = rows_of([8, 8, 8])
    new = decode.new_batch(decoder, third)
    while new.pending:
        new = decode.prefill(decoder, new)
    failing_at(call, monkeypatch, labs_shared, "_apart")
    found = labs_shared.join(decoder, batches, loop.step(decoder, new)[0])
    assert [row.shared for batch in found for row in batch.rows] == [0, 0, 0]


def test_newcomers_with_a_stored_prefix_take_no_slot_without_room(monkeypatch: Any) -> None:
    decoder, store = decoder_of(), labs_prefixes.Prefixes()
    decoded(decoder, rows_of([8], new=2), loop.Loop(prefixes=store))
    state = Watched(prefixes=store)
    held: list[int] = []

    def see() -> None:
        held.append(sum(bool(each.cache.buffers) for each in state.prefilling))

    state.before_step = see
    monkeypatch.setattr(decode, "slot_budget", lambda _: 0)
    monkeypatch.setattr(labs_prefixes.Prefixes, "release", lambda _: False)
    found = decoded(decoder, rows_of([8] * 4, new=5), state)
    assert max(held) <= 1
    assert [len(each) for each in found.values()] == [5] * 4
