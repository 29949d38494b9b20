# SPDX-License-Identifier: Apache-2.0
"""Slots that grow: columns are taken when tokens come, and the tokens stay those of whole slots."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest
import torch
from decoding import NO_MEMORY, failing_at, rows_of
from kit import model_around, options, prepare, prompt, random_model, read, row_of

import labs
import labs_calls
import labs_decode as decode
import labs_engine
import labs_loop as loop

NEW = 150


@pytest.fixture(autouse=True)
def short(monkeypatch: Any) -> None:
    """Let slots begin with 64 columns, so that 150 tokens make them grow twice."""
    monkeypatch.setattr(decode, "FIRST_COLUMNS", 1)


def decoded(decoder: decode.Decoder, rows: list[decode.Row], **watch: Any) -> dict[int, Any]:
    """Return all choices by row id, with their logprobs, of rows that join one after another."""
    found: dict[int, Any] = {row.id: [] for row in rows}
    state, by_id = loop.Loop(**watch), {row.id: row for row in rows}
    for key, outcome in loop.run(decoder, iter([*rows, None]), len(rows), state):
        found[key].append(outcome)
        row = by_id[key]
        row.over = sum(row.generated.values()) >= row.max_new_tokens
    return found


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "gpt_oss", "bamba", "mamba2", "lfm2"])
def test_rows_in_slots_that_grow_have_the_tokens_and_bits_of_whole_slots(kind: str) -> None:
    decoder = prepare(random_model(kind))
    assert decoder.grow is not None
    lengths = {0: NEW, 1: 20, 2: NEW // 2, 3: 90}
    grown = decoded(decoder, rows_of(lengths))
    assert [len(each) for each in grown.values()] == [*lengths.values()]
    assert grown == decoded(dataclasses.replace(decoder, grow=None), rows_of(lengths))


def test_slots_double_up_to_what_their_longest_row_may_need() -> None:
    decoder, sizes = prepare(random_model("llama")), []
    [row] = rows_of({0: 300})

    def watched() -> None:
        sizes.extend(batch.cache.cursor.columns for batch in state.batches)

    state = loop.Loop(before_step=watched)
    for _ in loop.run(decoder, iter([row, None]), 1, state):
        row.over = len(row.ids) >= row.columns
    assert [*dict.fromkeys(sizes)] == [64, 128, 256, 512]
    assert max(sizes) == decode.blocks(row.columns)


def test_short_answers_to_requests_for_many_tokens_take_little_memory(monkeypatch: Any) -> None:
    monkeypatch.undo()  # the real first columns
    decoder = prepare(random_model("llama"))
    held: dict[bool, int] = {}
    for grows in (True, False):
        rows, most = rows_of(dict.fromkeys(range(16), 8000)), [0]

        def watched(state: Any, most: Any = most) -> None:
            caches = [each.cache.cursor for each in (*state.batches, *state.prefilling)]
            most.append(sum(each.rows * each.columns for each in caches))

        state = loop.Loop()
        state.before_step = lambda state=state, watched=watched: watched(state)
        used = decoder if grows else dataclasses.replace(decoder, grow=None)
        by_id = {row.id: row for row in rows}
        for key, _ in loop.run(used, iter([*rows, None]), 16, state):
            by_id[key].over = sum(by_id[key].generated.values()) >= 20
        held[grows] = max(most)
    assert held[True] < 0.1 * held[False]


def test_room_counts_what_slots_may_still_need_if_rows_cannot_wait(monkeypatch: Any) -> None:
    decoder = dataclasses.replace(prepare(random_model("llama")), waiting=None)
    first, second = rows_of({0: 1000, 1: 30})
    batch = decode.new_batch(decoder, first)
    while batch.pending:
        batch = decode.prefill(decoder, batch)
    batch, _ = loop.step(decoder, batch)
    new = decode.new_batch(decoder, second)
    assert (batch.cache.cursor.columns, new.cache.cursor.columns) == (64, 64)
    promised = 2 * decode.blocks(first.columns) - 64 + 64  # both in slots of the longer one
    needed = promised * batch.cache.bytes_per_column / decode.MEMORY_SHARE
    for size, fits in ((needed, False), (needed + 4, True)):
        monkeypatch.setattr(decode, "available_bytes", lambda device, size=size: int(size))
        assert loop.has_room(decoder, [batch], [new]) is fits
    other = decode.new_batch(decoder, dataclasses.replace(first, id=7))
    owed = (decode.blocks(first.columns) - 64) * batch.cache.bytes_per_column
    for more, fits in ((owed - 4, False), (owed + 4, True)):
        size = int(needed + more / decode.MEMORY_SHARE)
        monkeypatch.setattr(decode, "available_bytes", lambda device, size=size: size)
        assert loop.has_room(decoder, [batch, other], [new]) is fits


def test_guesses_across_the_last_column_find_room() -> None:
    decoder = prepare(random_model("llama"))
    chance = random.Random(4)
    again = [chance.randrange(3, 200) for _ in range(9)]
    texts = []
    for grow in (decoder.grow, None):
        row = row_of([*again * 6, *again[:5]])  # 59 tokens, which are guessed to go on
        row.max_new_tokens, row.lookahead = 40, 8
        used, sizes = dataclasses.replace(decoder, grow=grow), []
        batch = decode.new_batch(used, row)
        while batch.pending:
            batch = decode.prefill(used, batch)
        while len(row.ids) < row.columns:
            batch, _ = labs_calls.step_speculative(used, batch)
            sizes.append(batch.cache.cursor.columns)
        texts.append(row.ids[: row.columns])
        assert (sizes[0], sizes[-1]) == ((64, 128) if grow else (128, 128))
    assert texts[0] == texts[1]


def test_memory_that_runs_out_while_slots_grow_changes_no_token(monkeypatch: Any) -> None:
    decoder, lengths = prepare(random_model("llama")), {0: NEW, 1: NEW, 2: 70}
    expected = decoded(decoder, rows_of(lengths))
    calls = len(decoder.model.model.layers) + 1  # within the first growth of all layers
    failing_at(calls, monkeypatch, decode.SlotLayer, "resize")
    state = loop.Loop()
    rows = rows_of(lengths)
    by_id, found = {row.id: row for row in rows}, {row.id: [] for row in rows}
    for key, outcome in loop.run(decoder, iter([*rows, None]), 3, state):
        found[key].append(outcome)
        by_id[key].over = sum(by_id[key].generated.values()) >= by_id[key].max_new_tokens
    assert found == expected


def test_an_engine_answers_requests_that_ask_for_the_whole_context() -> None:
    decoder = prepare(random_model("llama", vocab_size=262))
    model = model_around(decoder, "llama", context_length=8192)
    engine = labs_engine.Engine(model, labs.Server(max_batch_rows=8))
    asked = [options(max_new_tokens=8000, timeout_s=0.5) for _ in range(8)]
    answers = [engine.submit(prompt(n), each) for n, each in enumerate(asked)]
    ends = [read(each)[1] for each in answers]
    engine.close()
    assert {end.finish_reason for end in ends} == {"timeout"}
    assert all(end.usage.completion_tokens > 1 for end in ends)


def test_a_prompt_that_texts_are_compared_after_has_all_columns_at_once() -> None:
    decoder = prepare(random_model("llama"))
    [row] = rows_of({0: 1000})
    whole = decode.new_batch(dataclasses.replace(decoder, grow=None), row)
    assert whole.cache.cursor.columns == decode.blocks(row.columns)


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma3_text", "llama4_text"])
def test_a_prompt_whose_last_chunk_has_one_token_is_answered_in_16_bits(
    kind: str, monkeypatch: Any
) -> None:
    decoder = prepare(random_model(kind).bfloat16())  # with a window shorter than a chunk
    logits = []
    for chunk in (256, 512):
        monkeypatch.setattr(decode, "CHUNK", chunk)
        batch = decode.new_batch(decoder, row_of([5] * 257))
        while batch.pending:
            batch = decode.prefill(decoder, batch)
        assert batch.logits is not None
        logits.append(batch.logits)
    assert torch.allclose(*logits, atol=0.3)


def test_rows_that_need_no_more_columns_go_on_where_slots_cannot_grow(monkeypatch: Any) -> None:
    decoder, lengths = prepare(random_model("llama")), {0: NEW, 1: 20, 2: NEW, 3: 30}
    expected = decoded(decoder, rows_of(lengths))
    resize = decode.Slots.resize

    def bounded(slots: Any, live: int, rows: int, columns: int) -> None:
        if rows * columns > 4 * 64 and columns > slots.cursor.columns:
            raise NO_MEMORY
        resize(slots, live, rows, columns)

    monkeypatch.setattr(decode.Slots, "resize", bounded)
    assert decoded(decoder, rows_of(lengths)) == expected
