# SPDX-License-Identifier: Apache-2.0
"""Rows that wait for memory: more run at once, all end, and each has the tokens it has alone."""

from __future__ import annotations

import copy
import dataclasses
import functools
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from decoding import failing_at, rows_of
from kit import model_around, newcomer, options, prepare, prompt, random_model, read, row_of

import labs
import labs_decode as decode
import labs_engine
import labs_loop as loop
import labs_waiting

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

        begin = decode.Slots.__init__

        def counted(slots: Any, *args: Any, **kwargs: Any) -> None:
            begin(slots, *args, **kwargs)
            memory.slots.add(slots)

        monkeypatch.setattr(decode, "slot_budget", memory.free)
        monkeypatch.setattr(decode.Slots, "__init__", counted)

        def copied(each: Any) -> Any:
            new = copy.copy(each)
            if isinstance(new, decode.Slots):
                memory.slots.add(new)
            return new

        monkeypatch.setattr(labs_waiting, "copy", SimpleNamespace(copy=copied))
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


@functools.cache
def _alone(kind: str, half: bool) -> tuple[decode.Decoder, dict[int, list[Any]]]:
    model = random_model(kind)
    decoder = prepare(model.bfloat16() if half else model)
    return decoder, {k: v for row in rows_of(LENGTHS) for k, v in answered(decoder, [row]).items()}


def alone(kind: str, half: bool = False) -> tuple[decode.Decoder, dict[int, list[Any]]]:
    """Return a decoder, and the outcomes by row id of rows of LENGTHS that each run alone."""
    decoder, expected = _alone(kind, half)
    return decoder, {**expected}


def waits(state: loop.Loop) -> int:
    return sum(row.waits for row in state.rows.values())


@pytest.mark.parametrize(
    ("kind", "half"), [("llama", False), ("llama", True), ("gemma3_text", False)]
)
def test_rows_that_wait_end_with_the_tokens_and_bits_that_they_have_alone(
    kind: str, half: bool, bound: Bound
) -> None:
    (decoder, expected), waited, most = alone(kind, half), [0], [0]
    assert decoder.invariant
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


@pytest.mark.parametrize(
    ("free", "rows", "ends"),
    [
        (0, [(64, 64)], True),
        (-1, [(64, 64)], False),
        (192, [(256, 64), (256, 64)], True),
        (191, [(256, 64), (256, 64)], False),
        (192, [(256, 64), (512, 256)], True),  # the second gets what the first gives back
        (192, [(256, 64), (1024, 64)], False),
        (192, [(1024, 64), (256, 256)], False),  # the oldest never waits
    ],
)
def test_rows_can_end_if_each_gets_its_columns_after_the_older_ones(
    free: int, rows: list[tuple[int, int]], ends: bool
) -> None:
    held = {}
    for age, (promised, has) in enumerate(rows):
        row = row_of([5] * 4, age)
        row.max_new_tokens, row.entered = promised - 4, float(age)
        held[row] = has
    assert labs_waiting.can_end(free, dict(reversed(held.items()))) is ends


def test_sixteen_requests_of_an_engine_all_get_the_text_they_get_alone(bound: Bound) -> None:
    decoder = prepare(random_model("llama", vocab_size=262))
    model = model_around(decoder, "llama", context_length=8192)
    lengths = [40 + 60 * (number % 3) for number in range(16)]
    wanted = [options(max_new_tokens=n, temperature=1.0, seed=n) for n in lengths]
    expected = [labs.generate(model, prompt(n), each).text for n, each in enumerate(wanted)]
    bound(decoder, 1200)  # they may need 2,600
    engine = labs_engine.Engine(model, labs.Server(max_batch_rows=16))
    seen: list[labs_engine.Status] = []
    engine.before_step.append(lambda: seen.append(engine.status()))
    answers = [engine.submit(prompt(n), each) for n, each in enumerate(wanted)]
    ends = [read(each) for each in answers]
    engine.close()
    assert [text for text, _ in ends] == expected
    assert {end.finish_reason for _, end in ends} == {"length"}
    assert max(each.paused for each in seen) > 1
    assert seen[-1].halvings == seen[-1].failures == 0


@pytest.mark.parametrize("reason", ["cancelled", "timeout"])
def test_a_row_that_waits_can_be_cancelled_and_ends_at_its_deadline(
    reason: str, bound: Bound
) -> None:
    (decoder, expected), ended = alone("llama"), list[int]()
    bound(decoder, 700)

    def see(state: loop.Loop) -> None:
        for row in [each for each in state.rows.values() if each.waits and not ended]:
            ended.append(row.id)
            row.cancelled = reason == "cancelled"
            row.deadline = row.deadline if row.cancelled else 0.0

    found = answered(decoder, rows_of(LENGTHS), see)
    *tokens, last = found.pop(ended[0])
    assert last == loop.Ended(reason)  # type: ignore[arg-type]
    assert tokens == expected.pop(ended[0])[: len(tokens)]
    assert found == expected


def test_if_other_programs_take_memory_the_oldest_row_goes_on(bound: Bound) -> None:
    (decoder, expected), most = alone("llama"), [0]
    memory = bound(decoder, 700)

    def see(state: loop.Loop) -> None:
        most.append(waits(state))
        if sum(len(batch.rows) for batch in state.batches) == len(LENGTHS):
            memory.others = 10**6

    assert answered(decoder, rows_of(LENGTHS), see) == expected
    assert max(most) > 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_are_arranged_anew_read_their_new_slots_and_leave_the_old_ones(dtype) -> None:
    decoder = prepare(random_model("llama").to(dtype))

    def logits(arranged: bool) -> list[torch.Tensor]:
        batch = functools.reduce(
            decode.join, [newcomer(decoder, [5 + i, 7, 9], i) for i in range(3)]
        )
        found = []
        for step in range(70):  # beyond 32 columns, and 64
            if step == 3 and arranged:  # from four slots to three, of as many columns
                old = [weakref.ref(buffer) for buffer in batch.cache.buffers]
                columns = dict.fromkeys(batch.rows, batch.cache.cursor.columns)
                before, [batch] = (
                    [batch],
                    labs_waiting._arrange(decoder, [batch], columns, tight=True),
                )
                assert [buffer() for buffer in old] == [None] * len(old)
                del before
            found.append(decode.forward(decoder, batch))
            for row, token in zip(batch.rows, found[-1].argmax(-1).tolist(), strict=True):
                row.take(token)
            decoder.grow(batch)
        return found

    assert all(map(torch.equal, logits(False), logits(True)))


def test_memory_that_runs_out_while_rows_are_arranged_changes_no_token(
    bound: Bound, monkeypatch: Any
) -> None:
    decoder, expected = alone("llama")
    bound(decoder, 700)
    failing_at(0, monkeypatch, labs_waiting, "_move_layer")
    assert answered(decoder, rows_of(LENGTHS)) == expected


def test_prefixes_are_deleted_before_a_row_waits(bound: Bound) -> None:
    decoder = prepare(random_model("llama"))
    memory, waited = bound(decoder, 1100), [0]

    class Stored:
        """Prefixes of 500 columns, which fill memory until they are released."""

        load = store = staticmethod(lambda *_: None)

        def release(self) -> bool:
            held, memory.others = memory.others, 0
            return bool(held)

    def see() -> None:
        waited.append(waits(state))
        if [len(row.ids) for row in state.rows.values()].count(60) == 1:
            memory.others = 500  # all rows run, and need more columns soon

    rows = rows_of(dict.fromkeys(range(4), 130))
    state = loop.Loop(prefixes=Stored(), before_step=see)  # type: ignore[arg-type]
    by_id = {row.id: row for row in rows}
    for key, _ in loop.run(decoder, iter([*rows, None]), 4, state):
        by_id[key].over = sum(by_id[key].generated.values()) >= 130
    assert (max(waited), memory.others) == (0, 0)


def test_slots_that_cuda_graphs_read_are_powers_of_two(bound: Bound) -> None:
    class Graphs:
        """Steps without graphs, which stand for steps that read whole powers of two."""

        forward = staticmethod(decode.forward_slots)
        begin = staticmethod(lambda newcomer: newcomer)
        release = staticmethod(bool)

    (decoder, expected), sizes = alone("llama"), set()
    bound(decoder, 1100)

    def see(state: loop.Loop) -> None:
        sizes.update(batch.cache.cursor.rows for batch in state.batches)

    graphed = dataclasses.replace(decoder, graphs=Graphs())  # type: ignore[arg-type]
    assert answered(graphed, rows_of(LENGTHS), see) == expected
    assert sizes <= {1, 2, 4, 8}


@pytest.mark.parametrize("kind", ["mamba2", "bamba", "lfm2", "bloom"])
def test_rows_with_recurrent_states_and_rows_alone_do_not_wait(kind: str) -> None:
    assert prepare(random_model(kind)).waiting is None
