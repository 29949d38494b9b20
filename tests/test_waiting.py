# SPDX-License-Identifier: Apache-2.0
"""Rows that wait for memory: more run at once, all end, and each has the tokens it has alone."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable
from typing import Any

import pytest
from decoding import rows_of
from kit import prepare, random_model

import labs_decode as decode
import labs_loop as loop

LENGTHS = {0: 70, 1: 70, 2: 200, 3: 70, 4: 130, 5: 30, 6: 30, 7: 70}


class Memory:
    """A number of columns for all slots; `lowest` is how few were ever free."""

    def __init__(self, decoder: decode.Decoder, columns: int) -> None:
        self.columns, self.per_column = columns, decoder.column_bytes
        self.slots: Any = weakref.WeakSet()
        self.lowest, self.others = columns, 0

    def free(self, device: Any = None) -> int:
        buffers = {b.data_ptr(): b.nbytes for each in [*self.slots] for b in each.buffers}
        free = self.columns - self.others - sum(buffers.values()) // self.per_column
        self.lowest = min(self.lowest, free)
        return max(free, 0) * self.per_column


Bound = Callable[[decode.Decoder, int], Memory]


@pytest.fixture
def bound(monkeypatch: Any) -> Bound:
    """Return a function that bounds the columns of all slots made from now on."""

    def bound(decoder: decode.Decoder, columns: int) -> Memory:
        memory = Memory(decoder, columns)

        class Counted(decode.Slots):
            def __new__(cls, *args: Any, **kwargs: Any) -> Any:
                slots = super().__new__(cls)
                memory.slots.add(slots)
                return slots

        monkeypatch.setattr(decode, "slot_budget", memory.free)
        monkeypatch.setattr(decode, "Slots", Counted)
        return memory

    return bound


@pytest.fixture(autouse=True)
def short(monkeypatch: Any) -> None:
    """Let slots begin with 64 columns."""
    monkeypatch.setattr(decode, "FIRST_COLUMNS", 1)


def answered(
    decoder: decode.Decoder,
    rows: list[decode.Row],
    see: Callable[[loop.Loop], object] = lambda state: None,
    says: int = 10**6,
) -> dict[int, list[Any]]:
    """Return all outcomes by row id; a row ends after `says` tokens, or as many as it may have."""
    found: dict[int, list[Any]] = {row.id: [] for row in rows}
    state, by_id = loop.Loop(), {row.id: row for row in rows}
    state.before_step = lambda: see(state)
    for key, outcome in loop.run(decoder, iter([*rows, None]), len(rows), state):
        found[key].append(outcome)
        row = by_id[key]
        row.over = sum(row.generated.values()) >= min(says, row.max_new_tokens)
    return found


def alone(decoder: decode.Decoder, lengths: dict[int, int]) -> dict[int, list[Any]]:
    return {k: v for row in rows_of(lengths) for k, v in answered(decoder, [row]).items()}


def waits(state: loop.Loop) -> int:
    return sum(row.waits for row in state.rows.values())


@pytest.mark.parametrize(
    ("kind", "half"), [("llama", False), ("llama", True), ("gemma3_text", False)]
)
def test_rows_that_wait_end_with_the_tokens_and_bits_that_they_have_alone(
    kind: str, half: bool, bound: Bound
) -> None:
    model = random_model(kind)
    decoder, waited, most = prepare(model.bfloat16() if half else model), [0], [0]
    assert decoder.invariant
    expected = alone(decoder, LENGTHS)
    memory = bound(decoder, 700)

    def see(state: loop.Loop) -> None:
        waited.append(waits(state))
        most.append(sum(len(batch.rows) for batch in state.batches))

    assert answered(decoder, rows_of(LENGTHS), see) == expected
    assert max(waited) > 1
    assert max(most) == len(LENGTHS)
    assert memory.lowest >= 0


def test_more_rows_that_may_say_much_run_at_once(bound: Bound, monkeypatch: Any) -> None:
    monkeypatch.undo()  # the real first columns
    decoder, rows = prepare(random_model("llama")), {}
    for used in (decoder, dataclasses.replace(decoder, waiting=None)):
        bound(decoder, 20_000)
        most = [0]
        see = lambda state, most=most: most.append(sum(len(b.rows) for b in state.batches))  # noqa: E731
        answered(used, rows_of(dict.fromkeys(range(16), 8000)), see, says=20)
        rows[used.waiting is not None] = max(most)
    assert rows == {True: 16, False: 1}
