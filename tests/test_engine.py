# SPDX-License-Identifier: Apache-2.0
"""The engine with real threads and tiny random models; forward calls are counted and held."""

from __future__ import annotations

import ast
import contextlib
import functools
import gc
import itertools
import math
import queue
import random
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import cachetools
import msgspec
import pytest
import torch
from kit import (
    NEW,
    WAIT_S,
    Gate,
    alone,
    asked,
    held,
    imports,
    inner,
    leftovers,
    model_of,
    options,
    prepare,
    prompt,
    quiet,
    random_model,
    read,
    tree,
)

import labs
import labs_choose
import labs_decode
import labs_engine
import labs_forward
import labs_loop
import labs_turns
import labs_typed

KINDS = ("llama", "mamba2", "bamba", "rwkv")
KEPT = labs.ResponseCache(max_entries=4)
OOM = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


# ---------------------------------------------------------------- helpers


Start = Callable[..., tuple[labs_engine.AnyEngine, Gate]]


@pytest.fixture
def start() -> Iterator[Start]:
    """Start engines behind gates; at the end all of their tables have to be empty."""
    with contextlib.ExitStack() as stack:

        def begin(
            kind: str = "llama", cache: labs.ResponseCache | None = None, **server: Any
        ) -> tuple[labs_engine.AnyEngine, Gate]:
            gate = Gate(model_of(kind))
            engine: labs_engine.AnyEngine
            engine = labs_engine.Engine(model_of(kind), labs.Server(**server))
            engine = engine if cache is None else labs_engine.Cached(engine, cache)
            stack.callback(end, engine, gate)
            return engine, gate

        yield begin


def end(engine: labs_engine.AnyEngine, gate: Gate) -> None:
    gate.let(math.inf)
    engine.close()
    for handle in gate.handles:
        handle.remove()
    assert not inner(engine)._thread.is_alive()
    assert leftovers(engine) == {}


def together(
    engine: labs_engine.AnyEngine, gate: Gate, count: int, wanted: labs.Generation | None = None
) -> list[labs_engine.Answer]:
    """Ask for so many answers before the first call goes through."""
    gate.let(0)
    answers = [engine.submit(prompt(n), wanted or asked()) for n in range(count)]
    gate.let(math.inf)
    return answers


def age(engine: labs_engine.AnyEngine) -> None:
    """Make the requests under way look as if they had been asked for long ago."""
    for job in list(inner(engine)._jobs.values()):
        job.stream.row.deadline -= 10_000


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ---------------------------------------------------------------- sharing steps


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", [None, 7])
def test_requests_submitted_together_give_the_texts_they_give_alone(kind, seed, start):
    expected = [alone(kind, n, seed=seed) for n in range(6)]
    engine, _ = start(kind)
    answers = [engine.submit(prompt(n), asked(seed)) for n in range(6)]
    assert [read(answer)[0] for answer in answers] == expected


@pytest.mark.parametrize("kind", ["llama", "mamba2"])
def test_requests_submitted_together_share_steps(kind, start):
    engine, gate = start(kind)
    answers = together(engine, gate, 8)
    for answer in answers:
        read(answer)
    assert engine.status().steps <= 8 + 2 * NEW
    assert max(gate.steps) == 8


def test_requests_are_admitted_in_the_order_of_their_arrival(start):
    engine, gate = start(max_batch_rows=1)
    gate.let(0)
    events: queue.SimpleQueue[Any] = queue.SimpleQueue()
    answers = [engine.submit(prompt(n), options(), events=events) for n in range(5)]
    gate.let(math.inf)
    ended = []
    while len(ended) < 5:
        ticket, event = events.get(timeout=WAIT_S)
        ended += [ticket] if isinstance(event, labs.Done) else []
    assert ended == [answer.ticket for answer in answers]


def test_a_model_that_runs_alone_takes_one_request_at_a_time(start):
    engine, gate = start("rwkv")
    gate.let(0)
    answers = [engine.submit(prompt(n), options()) for n in range(3)]
    gate.until(1)
    status = engine.status()
    assert (status.max_rows, status.running, status.waiting) == (1, 1, 2)
    gate.let(math.inf)
    assert [read(answer)[0] for answer in answers] == [alone("rwkv", n) for n in range(3)]


def test_several_answers_may_share_a_queue(start):
    engine, _ = start()
    events: queue.SimpleQueue[Any] = queue.SimpleQueue()
    answers = [engine.submit(prompt(n), asked(), events=events) for n in range(3)]
    texts, ended = dict.fromkeys((answer.ticket for answer in answers), ""), set()
    while len(ended) < 3:
        ticket, event = events.get(timeout=WAIT_S)
        if isinstance(event, labs.Delta):
            texts[ticket] += event.text
        else:
            ended.add(ticket)
    assert list(texts.values()) == [alone("llama", n) for n in range(3)]


def test_an_answer_is_iterated_to_its_end(start):
    engine, _ = start()
    answer = engine.submit(prompt(0), asked())
    *deltas, done = answer
    assert labs.fold(deltas, done).text == alone("llama", 0)
    assert [*answer] == []


# ---------------------------------------------------------------- admission


def test_a_full_engine_refuses_at_once_and_has_room_again_after_an_end(start):
    engine, gate = start(max_batch_rows=2, max_waiting=1)
    gate.let(0)
    answers = [engine.submit(prompt(n), options()) for n in range(3)]
    with pytest.raises(labs_engine.Busy, match="3 requests"):
        engine.submit(prompt(9), options())
    gate.let(math.inf)
    assert [read(answer)[1].finish_reason for answer in answers] == ["length"] * 3
    assert max(gate.steps) == 2
    assert read(engine.submit(prompt(3), asked()))[0] == alone("llama", 3)


def test_there_is_room_again_at_once_where_a_waiting_request_is_closed(start):
    engine, gate = start(max_batch_rows=1, max_waiting=1)
    gate.let(0)
    first = engine.submit(prompt(0), options())
    engine.submit(prompt(1), options()).close()
    third = engine.submit(prompt(2), options())
    gate.let(math.inf)
    assert [read(answer)[1].finish_reason for answer in (first, third)] == ["length"] * 2


@pytest.mark.parametrize(
    ("inputs", "changes", "error"),
    [
        (prompt(0, 505), {}, labs.PromptTooLong),
        (prompt(0), {"logit_bias": {9999: 1.0}}, labs.InputError),
    ],
)
def test_a_wrong_request_is_refused_in_the_caller_before_it_is_queued(
    inputs, changes, error, start
):
    engine, gate = start()
    with pytest.raises(error):
        engine.submit(inputs, options(**changes))
    assert (quiet(engine), gate.calls) == (True, [])


# ---------------------------------------------------------------- cancellation and deadlines


def leave_by_closing(answers: list[Any]) -> None:
    answers.pop().close()


def leave_by_forgetting(answers: list[Any]) -> None:
    answers.pop()
    gc.collect()


leaving = pytest.mark.parametrize("leave", [leave_by_closing, leave_by_forgetting])


@leaving
@pytest.mark.parametrize("kind", ["llama", "rwkv"])
def test_who_leaves_while_waiting_is_never_computed(kind, leave, start):
    engine, gate = start(kind, max_batch_rows=1)
    first = held(engine, gate, 0)
    waiting = [engine.submit(prompt(1), options())]
    leave(waiting)
    gate.let(math.inf)
    assert read(first)[0] == alone(kind, 0)
    assert quiet(engine)
    assert not gate.has_seen(prompt(1))


@leaving
@pytest.mark.parametrize("kind", ["llama", "mamba2"])
def test_who_leaves_while_its_prompt_is_read_stops_the_reading(kind, leave, start, monkeypatch):
    monkeypatch.setattr(labs_decode, "CHUNK", 16)
    engine, gate = start(kind)
    gate.let(1)
    answers = [engine.submit(prompt(0, 200), options())]
    gate.until(2)
    leave(answers)
    gate.let(math.inf)
    assert quiet(engine)
    assert len(gate.calls) == 2


@leaving
@pytest.mark.parametrize("kind", ["llama", "mamba2"])
def test_who_leaves_while_decoding_frees_its_row_before_the_next_step(kind, leave, start):
    engine, gate = start(kind)
    gate.let(0)
    stay = [engine.submit(prompt(n), options()) for n in range(2)]
    go = [engine.submit(prompt(2), options())]
    gate.let(6)
    gate.until(7)
    assert gate.steps[-1] == 3
    leave(go)
    gate.let(1)
    gate.until(8)
    assert gate.steps[-1] == 2
    assert engine.status().running == 2
    gate.let(math.inf)
    assert [read(answer)[0] for answer in stay] == [alone(kind, n) for n in range(2)]


def test_who_leaves_a_model_that_runs_alone_costs_one_more_step_at_most(start):
    engine, gate = start("rwkv")
    answer = held(engine, gate, 3)
    answer.close()
    gate.let(math.inf)
    assert quiet(engine)
    assert len(gate.calls) <= 5


@pytest.mark.parametrize("kind", ["llama", "rwkv"])
def test_a_request_too_late_while_all_rows_are_busy_ends_without_waiting_for_one(kind, start):
    engine, gate = start(kind, max_batch_rows=1)
    first = held(engine, gate, 2)
    late = engine.submit(prompt(1), options(timeout_s=500))
    age(engine)
    gate.let(1)
    text, done = read(late)
    assert (text, done.finish_reason, done.usage.completion_tokens) == ("", "timeout", 0)
    assert engine.status().running == 1
    gate.let(math.inf)
    assert read(first)[0] == alone(kind, 0)
    assert not gate.has_seen(prompt(1))


def test_a_request_too_late_while_its_prompt_is_read_ends_before_the_next_chunk(start, monkeypatch):
    monkeypatch.setattr(labs_decode, "CHUNK", 16)
    engine, gate = start()
    gate.let(1)
    answer = engine.submit(prompt(0, 200), options(timeout_s=500))
    gate.until(2)
    age(engine)
    gate.let(math.inf)
    text, done = read(answer)
    assert (text, done.finish_reason, len(gate.calls)) == ("", "timeout", 2)


@pytest.mark.parametrize("kind", ["llama", "rwkv"])
def test_a_request_too_late_while_decoding_ends_with_the_text_so_far(kind, start):
    engine, gate = start(kind)
    answer = held(engine, gate, 3, options(timeout_s=500))
    age(engine)
    gate.let(math.inf)
    text, done = read(answer)
    assert (done.finish_reason, len(gate.calls)) == ("timeout", 4)
    assert alone(kind, 0).startswith(text.rstrip("\ufffd"))


def test_two_hundred_abandoned_requests_cost_the_next_one_nothing(start):
    engine, gate = start(max_batch_rows=4, max_waiting=300)
    first = held(engine, gate, 0)
    for answer in [first, *(engine.submit(prompt(n), options()) for n in range(1, 200))]:
        answer.close()
    last = engine.submit(prompt(500, 9), asked())
    gate.let(math.inf)
    assert read(last)[0] == alone("llama", 500, 9)
    assert len(gate.calls) <= 1 + 1 + NEW
    assert quiet(engine)


def test_closing_twice_or_after_the_end_is_fine(start):
    engine, _ = start()
    answer = engine.submit(prompt(0), options())
    read(answer)
    answer.close()
    answer.close()
    assert read(engine.submit(prompt(1), asked()))[0] == alone("llama", 1)


# ---------------------------------------------------------------- faults


@pytest.mark.parametrize("kind", ["llama", "mamba2", "rwkv"])
def test_an_exception_in_the_model_ends_what_is_in_flight_and_the_next_is_served(kind, start):
    engine, gate = start(kind, max_batch_rows=2)
    gate.let(4)
    answers = [engine.submit(prompt(n), options()) for n in range(2)]
    gate.until(5)

    def broken(words: Any) -> None:
        gate.before = lambda words: None
        raise RuntimeError("a shape is wrong")

    gate.before = broken
    gate.let(math.inf)
    running = answers[: engine.max_rows]
    assert all(isinstance(read(answer)[1], labs.Failed) for answer in running)
    assert engine.status().failures == 1
    assert read(engine.submit(prompt(5), asked()))[0] == alone(kind, 5)
    assert engine.status().alive


def test_what_waits_outlives_an_exception_in_the_model(start):
    engine, gate = start(max_batch_rows=1)
    gate.let(2)
    first, second = (engine.submit(prompt(n), asked()) for n in range(2))
    gate.until(3)
    gate.before = lambda words: setattr(gate, "before", lambda words: None) or 1 / 0
    gate.let(math.inf)
    assert isinstance(read(first)[1], labs.Failed)
    assert read(second)[0] == alone("llama", 1)


def test_logits_of_one_row_that_are_no_numbers_end_that_row_only(start):
    engine, gate = start()
    gate.let(0)
    answers = [engine.submit(prompt(n), asked()) for n in range(3)]

    def spoil(words: Any, output: Any) -> None:
        if words["input_ids"].shape == (3, 1) and len(gate.calls) > 5:
            output.logits[1] = math.nan

    gate.after = spoil
    gate.let(math.inf)
    found = [read(answer) for answer in answers]
    assert [text for text, _ in (found[0], found[2])] == [alone("llama", n) for n in (0, 2)]
    text, failed = found[1]
    assert "not finite" in str(failed.error)
    assert alone("llama", 1).startswith(text)


@pytest.mark.parametrize("kind", ["llama", "mamba2", "rwkv"])
def test_logits_that_are_no_numbers_in_all_rows_never_become_text(kind, start):
    engine, gate = start(kind)
    gate.after = lambda words, output: output.logits.fill_(math.nan)
    found = [read(answer) for answer in [engine.submit(prompt(n), options()) for n in range(3)]]
    assert [text for text, _ in found] == [""] * 3
    assert all("not finite" in str(failed.error) for _, failed in found)
    gate.after = lambda words, output: None
    assert read(engine.submit(prompt(5), asked()))[0] == alone(kind, 5)


def test_a_processor_that_raises_ends_its_own_row_only(start):
    def broken(ids: list[int], logits: Any) -> Any:
        if len(ids) > 9:
            raise KeyError("grammar")
        return logits

    engine, gate = start()
    gate.let(0)
    answers = [engine.submit(prompt(n), asked(), processors=(broken,) * (n == 1)) for n in range(3)]
    gate.let(math.inf)
    found = [read(answer) for answer in answers]
    assert "grammar" in str(found[1][1].error)
    assert [found[n][0] for n in (0, 2)] == [alone("llama", n) for n in (0, 2)]


# ---------------------------------------------------------------- memory


@contextlib.contextmanager
def little_memory(model: labs.Model, rows: int) -> Iterator[list[int]]:
    """Let the third layer run out of memory in steps of more than `rows`; yield those."""
    layers = next(m for m in model.model.modules() if isinstance(m, torch.nn.ModuleList))
    failed: list[int] = []

    def check(module: Any, args: Any) -> None:
        live, length = args[0].shape[:2]
        if length == 1 and live > rows:
            failed.append(live)
            raise OOM

    handle = layers[2].register_forward_pre_hook(check)
    try:
        yield failed
    finally:
        handle.remove()


@pytest.mark.parametrize("rows", [2, 3])
@pytest.mark.parametrize("kind", ["llama", "mamba2", "bamba"])
def test_a_batch_that_memory_does_not_hold_is_halved_and_loses_no_text(kind, rows, start):
    expected = [alone(kind, n, new=24) for n in range(8)]
    engine, gate = start(kind)
    with little_memory(engine.model, rows) as failed:
        answers = together(engine, gate, 8, asked(new=24))
        assert [read(answer)[0] for answer in answers] == expected
        assert engine.status().halvings == len(failed) > 0
        assert engine.status().failures == 0


@pytest.mark.parametrize("kind", ["llama", "mamba2"])
def test_a_single_row_that_memory_does_not_hold_fails_with_a_sentence(kind, start):
    engine, _ = start(kind)
    with little_memory(engine.model, 0):
        text, failed = read(engine.submit(prompt(0), options()))
    assert alone(kind, 0).startswith(text)
    assert "out of memory" in str(failed.error)
    assert read(engine.submit(prompt(1), asked()))[0] == alone(kind, 1)


def test_a_row_that_memory_does_not_hold_leaves_other_batches_alone(start, monkeypatch):
    monkeypatch.setattr(labs_loop, "join_best", lambda decoder, batches, new: [*batches, new])
    engine, gate = start()
    gate.let(0)
    answers = [engine.submit(prompt(n), asked()) for n in range(2)]
    gate.let(6)
    gate.until(7)

    def once(words: Any) -> None:
        gate.before = lambda words: None
        raise OOM

    gate.before = once
    gate.let(math.inf)
    found = [read(answer) for answer in answers]
    failed = [n for n, (_, end) in enumerate(found) if isinstance(end, labs.Failed)]
    assert len(failed) == 1
    assert "out of memory" in str(found[failed[0]][1].error)
    assert found[1 - failed[0]][0] == alone("llama", 1 - failed[0])


@pytest.mark.parametrize("kind", ["llama", "mamba2", "bamba"])
@pytest.mark.parametrize("method", ["resize", "write"])
def test_memory_that_runs_out_while_a_newcomer_joins_loses_nobody(kind, method, start, monkeypatch):
    expected = [alone(kind, n) for n in range(3)]
    calls = itertools.count()

    def failing(original: Any) -> Any:
        def once(*args: Any) -> Any:
            if next(calls) == 5:  # the second layer for the third row, when the first is done
                raise OOM
            return original(*args)

        return once

    for layer in (labs_decode.SlotLayer, labs_decode.StateLayer, labs_decode.HybridLayer):
        if method in vars(layer) and layer is not labs_decode.HybridLayer:
            monkeypatch.setattr(layer, method, failing(getattr(layer, method)))
    engine, gate = start(kind)
    answers = together(engine, gate, 3)
    assert [read(answer)[0] for answer in answers] == expected
    assert next(calls) > 5


def test_memory_that_runs_out_in_a_prompt_is_told_and_the_next_is_served(start):
    engine, gate = start()

    def full(words: Any) -> None:
        if words["input_ids"].shape[1] > 50:
            raise OOM

    gate.before = full
    _, failed = read(engine.submit(prompt(0, 100), options()))
    assert "out of memory" in str(failed.error)
    assert read(engine.submit(prompt(1), asked()))[0] == alone("llama", 1)


def test_memory_that_runs_out_in_a_prompt_ends_no_row_that_is_decoded(start):
    engine, gate = start()
    first = held(engine, gate, 3, asked())

    def full(words: Any) -> None:
        if words["input_ids"].shape[1] > 50:
            raise OOM

    gate.before = full
    second = engine.submit(prompt(1, 100), options())
    gate.let(math.inf)
    assert "out of memory" in str(read(second)[1].error)
    assert read(first)[0] == alone("llama", 0)


# ---------------------------------------------------------------- calls


def work(
    engine: labs_engine.AnyEngine,
    parts: Callable[..., Iterator[None]],
    owner: str = "",
    **more: Any,
) -> labs_engine.Answer:
    """Ask for what is no text."""
    stream = engine.open(prompt(9), options(**more), owner, ())
    return engine.take_in(stream, queue.SimpleQueue(), parts)


def chosen(kind: str, number: int, *, taken: Any = None) -> labs_choose.Options:
    return labs_choose.Options(model_of(kind), prompt(number, 40), ["a", "bc", "d" * 9, "efg"])


def choose(engine: labs_engine.AnyEngine, choice: labs_choose.Options, n: int) -> Any:
    stream = engine.open(prompt(n, 40), options(max_new_tokens=choice.columns), "", ())
    return engine.take_in(stream, queue.SimpleQueue(), choice.parts)


@functools.cache
def shares(kind: str, number: int) -> tuple[float, ...]:
    found = labs_typed.choose(model_of(kind), prompt(number, 40), ["a", "bc", "d" * 9, "efg"])
    return tuple(found.values())


@pytest.mark.parametrize("cache", [None, KEPT])
@pytest.mark.parametrize("kind", ["llama", "mamba2", "bamba", "rwkv"])
def test_a_choice_comes_between_the_steps_of_others_and_neither_changes(kind, cache, start):
    engine, _ = start(kind, cache)
    answers = [engine.submit(prompt(n), options()) for n in range(3)]
    choices = [chosen(kind, n) for n in range(3)]
    waiting = [choose(engine, each, n) for n, each in enumerate(choices)]
    assert [read(each)[1].finish_reason for each in waiting] == ["stop"] * 3
    assert [tuple(each.shares) for each in choices] == [shares(kind, n) for n in range(3)]
    assert [read(answer)[0] for answer in answers] == [alone(kind, n) for n in range(3)]


def test_rows_are_stepped_between_the_parts_of_a_work(start):
    engine, gate = start()
    steps: list[int] = []

    def parts(row: Any, prefixes: Any) -> Iterator[None]:
        for _ in range(4):
            steps.append(len(gate.calls))
            time.sleep(0.02)
            yield

    answer = engine.submit(prompt(0), options(max_new_tokens=400))
    gate.until(3)
    assert read(work(engine, parts))[1].finish_reason == "stop"
    assert all(later > earlier for earlier, later in itertools.pairwise(steps))
    answer.close()


def test_works_are_counted_and_bounded_like_rows(start):
    engine, _ = start(max_batch_rows=1, max_waiting=2)
    leave = threading.Event()

    def parts(row: Any, prefixes: Any) -> Iterator[None]:
        assert leave.wait(WAIT_S)
        yield

    answers = [work(engine, parts) for _ in range(3)]
    while engine.status().running == 0:
        time.sleep(0.002)
    assert (engine.status().running, engine.status().waiting) == (1, 2)
    for ask in (lambda: work(engine, parts), lambda: engine.submit(prompt(0), options())):
        with pytest.raises(labs_engine.Busy, match="3 requests"):
            ask()
    leave.set()
    assert [read(answer)[1].finish_reason for answer in answers] == ["stop"] * 3


@pytest.mark.parametrize("begun", [True, False])
def test_a_work_that_was_left_or_is_late_does_no_further_part(begun, start):
    engine, _ = start()
    went, leave, done = threading.Event(), threading.Event(), []

    def first(row: Any, prefixes: Any) -> Iterator[None]:
        went.set()
        assert leave.wait(WAIT_S)
        yield

    def parts(row: Any, prefixes: Any) -> Iterator[None]:
        done.append("begun")
        yield from first(row, prefixes)
        done.append("went on")

    held_up = None if begun else work(engine, first)
    answers = [work(engine, parts)]
    assert went.wait(WAIT_S)
    answers += [work(engine, parts), work(engine, parts, timeout_s=0.001)]
    answers[0].close()
    answers[1].close()
    time.sleep(0.01)  # the third is late now
    leave.set()
    assert read(answers[2])[1].finish_reason == "timeout"
    assert held_up is None or read(held_up)[1].finish_reason == "stop"
    assert quiet(engine)
    assert done == ["begun"] * begun


def test_a_closing_engine_lets_a_work_end_or_cancels_it(start):
    engine, _ = start()
    went = threading.Event()

    def parts(row: Any, prefixes: Any) -> Iterator[None]:
        while True:
            went.set()
            yield

    answer = work(engine, parts)
    assert went.wait(WAIT_S)
    assert not engine.close(0.05)
    assert read(answer)[1].finish_reason == "cancelled"
    with pytest.raises(labs_engine.Busy):
        work(engine, parts)


@pytest.mark.parametrize(
    ("error", "kind"), [(labs.InputError("no"), labs.InputError), (OOM, labs.GenerationError)]
)
def test_a_work_that_fails_is_told_and_harms_no_row(error, kind, start):
    def parts(row: Any, prefixes: Any) -> Iterator[None]:
        yield
        raise error

    engine, _ = start()
    answer = engine.submit(prompt(0), asked())
    event = read(work(engine, parts))[1]
    assert isinstance(event, labs.Failed)
    assert isinstance(event.error, kind)
    assert read(answer)[0] == alone("llama", 0)
    assert engine.status().failures == 0


# ---------------------------------------------------------------- owners


def ends(events: queue.SimpleQueue[Any], count: int) -> list[int]:
    """Return the tickets of so many answers in the order of their ends."""
    ended: list[int] = []
    while len(ended) < count:
        ticket, event = events.get(timeout=WAIT_S)
        ended += [ticket] if isinstance(event, labs.Done) else []
    return ended


@pytest.mark.parametrize("kind", ["llama", "rwkv"])
def test_an_owner_with_one_request_waits_for_one_row_of_another_at_most(kind, start):
    engine, gate = start(kind, max_batch_rows=1, max_waiting=40)
    gate.let(0)
    events: queue.SimpleQueue[Any] = queue.SimpleQueue()
    many = [
        engine.submit(prompt(n), options(max_new_tokens=3), owner="many", events=events)
        for n in range(20)
    ]
    gate.until(1)
    one = engine.submit(prompt(30), options(max_new_tokens=3), owner="one", events=events)
    gate.let(math.inf)
    assert ends(events, 21).index(one.ticket) == 1
    assert len(many) == 20


def test_owners_that_wait_have_as_many_rows_as_each_other(start):
    engine, gate = start(max_batch_rows=4, max_waiting=40)
    gate.let(0)
    events: queue.SimpleQueue[Any] = queue.SimpleQueue()
    few = options(max_new_tokens=2)
    first = [engine.submit(prompt(n), few, owner="a", events=events) for n in range(12)]
    gate.until(1)
    other = [engine.submit(prompt(n), few, owner="b", events=events) for n in range(12)]
    gate.let(math.inf)
    order = ends(events, 24)
    assert sum(ticket in {answer.ticket for answer in other} for ticket in order[4:18]) >= 7
    assert {answer.ticket for answer in (*first, *other)} == {*order}


def test_works_are_begun_in_turn_by_owner(start):
    engine, _ = start()
    go, order = threading.Event(), []

    def parts(name: str) -> Callable[..., Iterator[None]]:
        def run(row: Any, prefixes: Any) -> Iterator[None]:
            assert go.wait(WAIT_S)
            order.append(name)
            yield

        return run

    answers = [work(engine, parts("a"), "a") for _ in range(4)]
    answers += [work(engine, parts("b"), "b")]
    go.set()
    assert [read(answer)[1].finish_reason for answer in answers] == ["stop"] * 5
    assert order.index("b") <= 1


def test_a_full_room_has_a_place_for_an_owner_below_its_share(start):
    engine, gate = start(max_batch_rows=1, max_waiting=4)
    gate.let(0)
    answers = [engine.submit(prompt(n), options(), owner="a") for n in range(5)]
    gate.until(1)
    answers += [engine.submit(prompt(n), options(), owner="b") for n in range(2)]
    for owner in ("a", "b"):
        with pytest.raises(labs_engine.Busy):
            engine.submit(prompt(0), options(), owner=owner)
    answers += [engine.submit(prompt(0), options(), owner="c")]
    with pytest.raises(labs_engine.Busy):
        engine.submit(prompt(0), options(), owner="c")
    gate.let(math.inf)
    assert [read(answer)[1].finish_reason for answer in answers] == ["length"] * 8


@pytest.mark.parametrize(("places", "keys"), [(1, 9), (2, 2), (7, 3), (64, 10), (5, 40)])
def test_a_room_holds_no_more_than_its_places_and_the_shares_of_latecomers(places, keys):
    waiting = labs_turns.Waiting(places)

    def job(owner: int) -> Any:
        stream = labs.open_request(model_of("llama"), 0, prompt(0), options())
        stream.row.owner = str(owner)
        return labs_turns.Job(stream, print)

    for owner in range(keys):
        while len(waiting) < places or waiting.has_place(str(owner)):
            waiting.add(job(owner))
    assert len(waiting) <= places + labs_turns.places_beyond(places, keys)


def test_without_keys_all_wait_in_one_line(start):
    engine, gate = start(max_batch_rows=1, max_waiting=2)
    gate.let(0)
    answers = [engine.submit(prompt(n), options()) for n in range(3)]
    with pytest.raises(labs_engine.Busy):
        engine.submit(prompt(0), options())
    gate.let(math.inf)
    assert [read(answer)[1].finish_reason for answer in answers] == ["length"] * 3


# ---------------------------------------------------------------- a dead thread


@pytest.fixture
def dies(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], Any]:
    monkeypatch.setattr(threading, "excepthook", lambda args: None)

    def leave(words: Any) -> None:
        raise SystemExit

    return leave


def test_as_many_rows_as_are_asked_for_run_where_memory_holds_them(start):
    assert start(max_batch_rows=200)[0].status().max_rows == 200
    assert start()[0].status().max_rows == 64


def test_a_forward_pass_that_failed_leaves_no_slots_behind(start, monkeypatch):
    monkeypatch.setattr(labs_engine.log, "exception", lambda text: None)  # pytest keeps its frames
    engine, gate = start()
    first = held(engine, gate, 3)
    cache = weakref.ref(engine._loop.batches[0].cache)

    def broken(words: Any) -> None:
        raise RuntimeError("broken")

    gate.before = broken
    gate.let(math.inf)
    assert isinstance(read(first)[1], labs.Failed)
    gate.before = lambda words: None
    end = time.monotonic() + WAIT_S
    while cache() is not None and time.monotonic() < end:
        time.sleep(0.01)
    assert cache() is None


def test_a_dead_thread_fails_all_answers_and_is_told(dies, start):
    engine, gate = start(max_batch_rows=1)
    gate.let(2)
    answers = [engine.submit(prompt(n), options()) for n in range(3)]
    gate.until(3)
    gate.before = dies
    gate.let(math.inf)
    assert all(isinstance(read(answer)[1], labs.Failed) for answer in answers)
    engine._thread.join(WAIT_S)
    status = engine.status()
    assert (status.alive, status.running, status.waiting) == (False, 0, 0)
    with pytest.raises(labs_engine.Busy, match="stopped"):
        engine.submit(prompt(0), options())


def test_a_request_that_comes_while_the_thread_dies_does_not_hang(dies, start, monkeypatch):
    engine, gate = start()
    late: list[Any] = []
    fail = engine._fail

    def then_ask(*args: Any) -> None:
        fail(*args)
        with contextlib.suppress(labs_engine.Busy):
            late.append(engine.submit(prompt(1), options()))

    monkeypatch.setattr(engine, "_fail", then_ask)
    gate.before = dies
    read(engine.submit(prompt(0), options()))
    engine._thread.join(WAIT_S)
    assert all(isinstance(read(answer, wait_s=1)[1], labs.Failed) for answer in late)


# ---------------------------------------------------------------- closing


def test_closing_lets_answers_end_until_the_deadline(start):
    engine, _ = start(max_batch_rows=1)
    answers = [engine.submit(prompt(n), asked()) for n in range(3)]
    assert engine.close(WAIT_S)
    assert [read(answer)[0] for answer in answers] == [alone("llama", n) for n in range(3)]
    assert not engine._thread.is_alive()
    assert engine.status().closing


def test_closing_cancels_what_is_late(start):
    engine, gate = start(max_batch_rows=1)
    gate.let(2)
    answers = [engine.submit(prompt(n), options()) for n in range(3)]
    gate.until(3)
    threading.Timer(0.3, gate.let, [math.inf]).start()
    assert not engine.close(0.1)
    assert [read(answer)[1].finish_reason for answer in answers] == ["cancelled"] * 3
    assert not engine._thread.is_alive()


def test_a_closing_engine_refuses_new_requests(start):
    engine, gate = start()
    answer = held(engine, gate, 2, asked())
    closing = threading.Thread(target=engine.close, args=(WAIT_S,))
    closing.start()
    while not engine.status().closing:
        time.sleep(0.002)
    with pytest.raises(labs_engine.Busy, match="shutting down"):
        engine.submit(prompt(1), options())
    gate.let(math.inf)
    closing.join(WAIT_S)
    assert read(answer)[0] == alone("llama", 0)


def test_closing_twice_is_fine(start):
    engine, _ = start()
    assert [engine.close(), engine.close(1)] == [True, True]


def test_an_idle_engine_tells_that_it_is_alive_and_computes_nothing(start):
    engine, gate = start()
    status = engine.status()
    assert (status.alive, status.closing, status.idle_s, status.cache_usage) == (True, False, 0, 0)
    assert (status.steps, gate.calls) == (0, [])


# ---------------------------------------------------------------- what prompts begin with

TURNS = (prompt(7, 30), labs.Inputs((*prompt(7, 30).input_ids, *prompt(8, 9).input_ids), ""))


@pytest.fixture
def chunks_of_eight(monkeypatch):
    monkeypatch.setattr(labs_decode, "CHUNK", 8)


def texts_alone(seed: int | None = None) -> list[str]:
    return [labs.generate(model_of("llama"), turn, asked(seed)).text for turn in TURNS]


def cached(engine: labs_engine.AnyEngine, turn: labs.Inputs, owner: str = "", **more: Any) -> int:
    answer = engine.submit(turn, asked(**more), owner=owner)
    done: labs.Done = read(answer)[1]
    return done.usage.cached_tokens


@pytest.mark.parametrize("seed", [None, 5])
def test_a_second_turn_computes_only_what_is_new_and_gives_the_same_text(
    seed, start, chunks_of_eight
):
    expected = texts_alone(seed)
    engine, gate = start()
    found = [read(engine.submit(turn, asked(seed))) for turn in TURNS]
    assert [text for text, _ in found] == expected
    assert [done.usage.cached_tokens for _, done in found] == [0, 24]
    computed = [len(row) for call in gate.calls for row in call if len(row) > 1]
    assert computed == [8, 8, 8, 6, 8, 7]


def test_another_key_computes_what_this_one_has_computed(start, chunks_of_eight):
    engine, _ = start()
    found = [cached(engine, TURNS[0], owner) for owner in ("one", "two", "one", "two", "")]
    assert found == [0, 0, 24, 24, 0]


def test_a_request_that_comes_while_the_first_is_decoded_begins_with_its_prompt(
    start, chunks_of_eight
):
    engine, gate = start()
    gate.let(6)
    first = engine.submit(TURNS[0], asked())
    gate.until(7)
    second = engine.submit(TURNS[1], asked())
    gate.let(math.inf)
    assert read(second)[1].usage.cached_tokens == 24
    assert read(first)[1].usage.cached_tokens == 0


def test_requests_that_come_together_wait_for_what_the_first_computes(start, chunks_of_eight):
    engine, gate = start()
    gate.let(0)
    answers = [engine.submit(TURNS[0], asked()) for _ in range(4)]
    gate.let(math.inf)
    assert [read(answer)[1].usage.cached_tokens for answer in answers] == [0, 24, 24, 24]


def test_none_are_kept_where_none_are_wanted(start, chunks_of_eight):
    engine, _ = start(prefix_cache_bytes=0)
    assert [cached(engine, turn) for turn in TURNS] == [0, 0]


def test_what_decoding_wrote_serves_requests_whose_bits_need_not_match(chunks_of_eight):
    decoder = prepare(random_model("llama", vocab_size=262), batch_invariant=False)
    model = msgspec.structs.replace(model_of("llama"), decoder=decoder)
    engine = labs_engine.Cached(labs_engine.Engine(model), KEPT)
    try:
        done = read(engine.submit(TURNS[0], options(temperature=1.0)))[1]
        assert done.usage.cached_tokens == 0
        deadline = time.monotonic() + WAIT_S  # it is kept after its end was told
        while not (ids := [p.ids for p in engine.engine._loop.prefixes.kept if len(p.ids) == 41]):
            assert time.monotonic() < deadline
        turn = labs.Inputs((*ids[0], 50, 51), "")
        assert cached_of(engine, turn, temperature=1.0) == 41
        assert cached_of(engine, turn, temperature=1.0, seed=1) == 24  # may be asked for again
        assert cached_of(engine, turn, temperature=0.0) == 40  # what that one prefilled
    finally:
        engine.close()


def cached_of(engine: labs_engine.AnyEngine, turn: labs.Inputs, **changes: Any) -> int:
    done: labs.Done = read(engine.submit(turn, options(**changes)))[1]
    return done.usage.cached_tokens


def test_prefixes_give_way_where_a_row_has_no_room(start, chunks_of_eight, monkeypatch):
    engine, gate = start()
    cached(engine, TURNS[0])
    answer = held(engine, gate, 4, options(max_new_tokens=40))
    kept = engine._loop.prefixes.kept
    assert kept
    free = labs_loop.has_room
    monkeypatch.setattr(labs_loop, "has_room", lambda *a: not kept and free(*a))
    second = engine.submit(prompt(1), asked())
    gate.let(math.inf)
    assert read(second)[0] == alone("llama", 1)
    read(answer)
    assert cached(engine, TURNS[1]) == 0


def test_prefixes_give_way_where_memory_ran_out(start, chunks_of_eight):
    engine, gate = start()
    cached(engine, TURNS[0])
    failed = []

    def fail(words: Any) -> None:
        if not failed:
            failed.append(True)
            raise OOM

    gate.before = fail
    read(engine.submit(prompt(1), asked()))
    assert (failed, engine._loop.prefixes.kept) == ([True], [])


def test_the_bound_of_the_prefixes_survives_a_failed_step(start):
    engine, gate = start(prefix_cache_bytes=77)

    def fail(words: Any) -> None:
        gate.before = lambda words: None
        raise RuntimeError("broken")

    gate.before = fail
    assert isinstance(read(engine.submit(prompt(1), asked()))[1], labs.Failed)
    assert read(engine.submit(prompt(1), asked()))[0] == alone("llama", 1)
    assert engine._loop.prefixes.max_bytes == 77


# ---------------------------------------------------------------- guesses

GUESSING = options(temperature=0.0, prompt_lookup_num_tokens=4, max_new_tokens=40)


def knowing(monkeypatch: pytest.MonkeyPatch, tokens: list[int], begin: int) -> None:
    """Let each guess be right."""

    def look_up(row: Any) -> list[int]:
        done = len(row.ids) - begin
        return tokens[done : done + 4]

    monkeypatch.setattr(labs_forward, "prompt_lookup", look_up)


def tokens_alone(model: labs.Model, inputs: labs.Inputs) -> list[int]:
    wanted = labs.evolve(GUESSING, prompt_lookup_num_tokens=None, logprobs=0)
    return [each.token for each in labs.generate(model, inputs, wanted).logprobs]


def test_right_guesses_save_steps_and_change_nothing(start, monkeypatch):
    plain = labs.generate(model_of("llama"), prompt(0), GUESSING, prompt_lookup_num_tokens=None)
    knowing(monkeypatch, tokens_alone(model_of("llama"), prompt(0)), 6)
    engine, gate = start()
    text, done = read(engine.submit(prompt(0), GUESSING))
    assert (text, done.finish_reason) == (plain.text, plain.finish_reason)
    assert done.usage.completion_tokens == 40
    assert len(gate.calls) <= 1 + 40 / 5 + 1


def test_guesses_wait_while_there_is_company(start, monkeypatch):
    knowing(monkeypatch, tokens_alone(model_of("llama"), prompt(0)), 6)
    engine, gate = start()
    gate.let(0)
    answers = [engine.submit(prompt(0), GUESSING) for _ in range(2)]
    gate.let(math.inf)
    texts = [read(answer)[0] for answer in answers]
    assert len({*texts}) == 1
    assert {*gate.steps} == {2}


def test_nothing_after_the_end_comes_of_guesses(monkeypatch):
    model = model_of("llama")
    tokens = tokens_alone(model, prompt(0))
    end = next(i for i in range(7, 40) if tokens[i] not in tokens[:i])
    ending = msgspec.structs.replace(model, eos_token_ids=frozenset({tokens[end]}))
    knowing(monkeypatch, tokens, 6)
    found = labs.generate(ending, prompt(0), GUESSING)
    assert (found.finish_reason, found.usage.completion_tokens) == ("stop", end + 1)
    text = labs.generate(model, prompt(0), GUESSING).text
    stopped = labs.generate(model, prompt(0), GUESSING, stop=(text[12:15],))
    assert (stopped.text, stopped.matched_stop) == (text[: text.index(text[12:15])], text[12:15])


@pytest.mark.parametrize("kind", ["mamba2", "bamba", "rwkv"])
def test_guesses_are_refused_where_they_cannot_be_taken_back(kind, start):
    engine, gate = start(kind)
    with pytest.raises(labs.InputError, match=f"prompt_lookup_num_tokens: {kind}"):
        engine.submit(prompt(0), GUESSING)
    assert gate.calls == []


# ---------------------------------------------------------------- the cache of answers


def test_answers_are_not_kept_by_default(start):
    engine, gate = start()
    found = [read(engine.submit(prompt(0), asked())) for _ in range(2)]
    assert [done.usage.response_cached for _, done in found] == [False, False]
    assert len(gate.calls) == 2 * NEW


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("kind", ["llama", "rwkv"])
def test_the_same_request_is_answered_without_a_forward_call(kind, seed, start):
    engine, gate = start(kind, KEPT)
    wanted = labs.evolve(asked(seed), logprobs=2)
    first, second = ([*engine.submit(prompt(0), wanted)] for _ in range(2))
    assert len(gate.calls) == NEW
    assert second[:-1] == first[:-1]
    assert labs.fold(second[:-1], second[-1]).text == alone(kind, 0, seed=seed)
    assert [end.usage.response_cached for end in (first[-1], second[-1])] == [False, True]
    assert engine.status().response_cache_hits == 1


def test_an_answer_is_not_shared_between_owners(start):
    engine, gate = start(cache=KEPT)
    for owner in ("one", "two"):
        read(engine.submit(prompt(0), asked(), owner=owner))
    assert len(gate.calls) == 2 * NEW


@pytest.mark.parametrize(
    ("changes", "processors"),
    [({"temperature": 1.0}, ()), ({"temperature": 0.0}, (lambda ids, logits: logits,))],
)
def test_what_may_not_repeat_is_computed_again(changes, processors, start):
    engine, gate = start(cache=KEPT)
    for _ in range(2):
        _, done = read(engine.submit(prompt(0), options(**changes), processors=processors))
        assert not done.usage.response_cached
    assert len(gate.calls) == 2 * NEW


def test_another_option_is_another_answer(start):
    engine, gate = start(cache=KEPT)
    for new in (5, 6):
        read(engine.submit(prompt(0), asked(new=new)))
    assert len(gate.calls) == 11


def test_an_answer_is_forgotten_after_its_time(start, monkeypatch):
    now = [0.0]

    class Cache(cachetools.TTLCache):
        def __init__(self, *limits: Any) -> None:
            super().__init__(*limits, timer=lambda: now[0])

    monkeypatch.setattr(cachetools, "TTLCache", Cache)
    engine, gate = start(cache=labs.ResponseCache(max_entries=4, ttl_s=100))
    for now[0], calls in ((0, NEW), (99, NEW), (101, 2 * NEW)):
        read(engine.submit(prompt(0), asked()))
        assert len(gate.calls) == calls


def test_no_more_answers_are_kept_than_allowed(start):
    engine, gate = start(cache=labs.ResponseCache(max_entries=2))
    for number in (0, 1, 2):
        read(engine.submit(prompt(number), asked()))
    assert len(engine._response_cache) == 2
    read(engine.submit(prompt(2), asked()))
    assert len(gate.calls) == 3 * NEW
    read(engine.submit(prompt(0), asked()))
    assert len(gate.calls) == 4 * NEW


def test_identical_requests_in_flight_are_computed_once(start):
    engine, gate = start(cache=KEPT)
    leader = held(engine, gate, 6, asked())
    follower = engine.submit(prompt(0), asked())
    gate.let(math.inf)
    events = [[*answer] for answer in (leader, follower)]
    assert events[0][:-1] == events[1][:-1]
    assert [each[-1].usage.response_cached for each in events] == [False, True]
    assert len(gate.calls) == NEW


def test_a_leader_that_closes_does_not_stop_its_follower(start):
    engine, gate = start(cache=KEPT)
    leader = held(engine, gate, 6, asked())
    follower = engine.submit(prompt(0), asked())
    leader.close()
    gate.let(math.inf)
    assert read(follower)[0] == alone("llama", 0)
    assert len(gate.calls) == NEW


def test_what_leader_and_follower_both_left_is_cancelled_and_not_kept(start):
    engine, gate = start(cache=KEPT)
    gate.let(3)
    answers = [engine.submit(prompt(0), asked()) for _ in range(2)]
    gate.until(4)
    for answer in answers:
        answer.close()
    gate.let(math.inf)
    assert quiet(engine)
    assert (len(gate.calls), len(engine._response_cache)) == (4, 0)
    _, done = read(engine.submit(prompt(0), asked()))
    assert not done.usage.response_cached


def test_an_answer_that_came_too_late_is_not_kept(start):
    engine, gate = start(cache=KEPT)
    answer = held(engine, gate, 3, options(timeout_s=500))
    age(engine)
    gate.let(math.inf)
    assert read(answer)[1].finish_reason == "timeout"
    assert read(engine.submit(prompt(0), options(timeout_s=500)))[1].finish_reason == "length"


def test_the_end_of_a_cancelled_request_does_not_hide_its_successor(start):
    engine, gate = start(cache=KEPT)
    first = held(engine, gate, 3, asked())
    first.close()
    second = engine.submit(prompt(0), asked())
    gate.let(1)
    gate.until(5)
    third = engine.submit(prompt(0), asked())
    assert engine.status().response_cache_hits == 1
    gate.let(math.inf)
    assert [read(answer)[0] for answer in (second, third)] == [alone("llama", 0)] * 2


def test_a_failure_is_not_kept(start):
    engine, gate = start(cache=KEPT)
    gate.after = lambda words, output: output.logits.fill_(math.nan)
    assert isinstance(read(engine.submit(prompt(0), asked()))[1], labs.Failed)
    gate.after = lambda words, output: None
    assert read(engine.submit(prompt(0), asked()))[0] == alone("llama", 0)


# ---------------------------------------------------------------- many threads


def ask_at_random(engine: labs_engine.AnyEngine, number: int, rounds: int) -> int:
    """Ask as one of many clients would; return how many texts were read to their end."""
    chance, whole = random.Random(number), 0
    for _ in range(rounds):
        which, seed = chance.randrange(6), chance.choice([None, 7])
        wanted = asked(seed)
        kind = chance.choice(["read", "read", "close", "forget", "late"])
        if kind == "late":
            wanted = labs.evolve(wanted, timeout_s=chance.choice([0.001, 0.02, 0.1]))
        try:
            answer = engine.submit(prompt(which), wanted, owner=str(number % 3))
        except labs_engine.Busy:
            continue
        if kind in ("close", "forget"):
            for _ in range(chance.randrange(4)):
                answer.get(WAIT_S)
            if kind == "close":
                answer.close()
            continue
        text, done = read(answer)
        expected = alone("llama", which, seed=seed)
        if done.finish_reason == "timeout":
            assert expected.startswith(text.rstrip("\ufffd"))
        else:
            assert text == expected
            whole += 1
    return whole


@pytest.mark.parametrize(
    ("rounds", "cache"),
    [
        (4, labs.ResponseCache()),
        (4, KEPT),
        pytest.param(80, labs.ResponseCache(), marks=pytest.mark.slow),
        pytest.param(80, KEPT, marks=pytest.mark.slow),
    ],
)
def test_many_threads_get_their_own_texts_and_leave_nothing_behind(rounds, cache, start):
    for which, seed in itertools.product(range(6), (None, 7)):
        alone("llama", which, seed=seed)
    engine, _ = start(cache=cache, max_batch_rows=8, max_waiting=48)
    with ThreadPoolExecutor(64) as pool:
        counts = [*pool.map(lambda n: ask_at_random(engine, n, rounds), range(64))]
    assert sum(counts) > 0
    assert quiet(engine)
    status = engine.status()
    assert (status.alive, status.failures, status.halvings) == (True, 0, 0)


def lead_and_follow(engine: labs_engine.Cached, which: int, chance: random.Random) -> list[str]:
    """Let six ask for one answer at the same moment, of whom some leave; return the texts read."""
    moment, expected = threading.Barrier(6), alone("llama", which, new=5)
    ways = ["read", *chance.choices(["read", "close", "forget", "some"], k=5)]

    def ask(way: str) -> str | None:
        moment.wait(WAIT_S)
        answer = engine.submit(prompt(which), asked(new=5))
        if way == "some":
            answer.get(WAIT_S)
        if way in ("close", "some"):
            answer.close()
        if way != "read":
            return None
        text, done = read(answer)
        assert (text, done.finish_reason) == (expected, "length")
        return text

    with ThreadPoolExecutor(6) as pool:
        return [text for text in pool.map(ask, ways) if text is not None]


def test_leaders_that_leave_while_others_join_leave_nobody_hanging_and_no_row(start):
    engine, _ = start(cache=labs.ResponseCache(max_entries=1), max_batch_rows=4)
    chance = random.Random(0)
    for turn in range(200):
        assert lead_and_follow(engine, turn % 3, chance)
        assert quiet(engine)
    status = engine.status()
    assert (status.failures, status.alive) == (0, True)
    assert status.response_cache_hits > 200


def test_all_who_leave_at_random_leave_no_row(start):
    engine, _ = start(cache=labs.ResponseCache(max_entries=1), max_batch_rows=2, max_waiting=90)
    wanted = asked(new=400)

    def come_and_go(number: int) -> None:
        chance = random.Random(number)
        for _ in range(25):
            answer = engine.submit(prompt(chance.randrange(3)), wanted)
            for _ in range(chance.randrange(3)):
                answer.get(0.01)
            if chance.random() < 0.5:
                answer.close()
            else:
                del answer

    with ThreadPoolExecutor(8) as pool:
        [*pool.map(come_and_go, range(8))]
    assert quiet(engine)
    assert len(engine._response_cache) == 0
    assert read(engine.submit(prompt(0), asked()))[0] == alone("llama", 0)


def test_there_is_room_again_at_once_where_all_who_waited_for_an_answer_have_left(start):
    engine, gate = start(cache=KEPT, max_batch_rows=1, max_waiting=1)
    first = held(engine, gate, 0, asked())
    answers = [engine.submit(prompt(1), asked()) for _ in range(3)]
    with pytest.raises(labs_engine.Busy, match="2 requests"):
        engine.submit(prompt(2), asked())
    for answer in answers:
        answer.close()
    last = engine.submit(prompt(2), options(temperature=1.0))  # never shared
    gate.let(math.inf)
    assert read(first)[0] == alone("llama", 0)
    assert read(last)[1].finish_reason == "length"
    assert not gate.has_seen(prompt(1))


def test_a_request_with_a_deadline_is_not_joined_while_it_is_under_way(start):
    engine, gate = start(cache=KEPT)
    wanted = labs.evolve(asked(), timeout_s=500)
    first = held(engine, gate, 3, wanted)
    second = engine.submit(prompt(0), wanted)
    gate.let(math.inf)
    for answer in (first, second):
        text, done = read(answer)
        assert (text, done.usage.response_cached) == (alone("llama", 0), False)
    assert read(engine.submit(prompt(0), wanted))[1].usage.response_cached


def test_answers_of_a_dead_thread_are_told_to_all_who_share_one(dies, start):
    engine, gate = start(cache=KEPT)
    leader = held(engine, gate, 2, asked())
    follower = engine.submit(prompt(0), asked())
    gate.before = dies
    gate.let(math.inf)
    assert all(isinstance(read(answer)[1], labs.Failed) for answer in (leader, follower))
    inner(engine)._thread.join(WAIT_S)
    with pytest.raises(labs_engine.Busy, match="stopped"):
        engine.submit(prompt(0), asked())


def test_an_answer_that_is_kept_is_given_by_a_full_engine_and_after_its_end(start):
    engine, gate = start(cache=KEPT, max_batch_rows=1, max_waiting=0)
    read(engine.submit(prompt(1), asked()))
    first = held(engine, gate, 1, asked())
    assert read(engine.submit(prompt(1), asked()))[0] == alone("llama", 1)
    gate.let(math.inf)
    read(first)
    engine.close()
    assert read(engine.submit(prompt(1), asked()))[0] == alone("llama", 1)


def test_answers_that_are_shared_and_others_may_share_a_queue(start):
    engine, _ = start(cache=KEPT)
    events: queue.SimpleQueue[Any] = queue.SimpleQueue()
    each = [(0, 0.0), (0, 0.0), (0, 1.0), (1, 0.0)]
    answers = [
        engine.submit(prompt(which), options(temperature=heat), events=events)
        for which, heat in each
    ]
    tickets, ended = [answer.ticket for answer in answers], []
    while len(ended) < len(each):
        ticket, event = events.get(timeout=WAIT_S)
        ended += [ticket] if isinstance(event, labs.Done) else []
    assert len({*tickets}) == len(each)
    assert sorted(ended) == sorted(tickets)


def test_events_are_put_while_the_engine_has_no_lock(start):
    engine, _ = start()
    events: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def put(told: Any) -> None:
        with ThreadPoolExecutor() as pool:
            pool.submit(engine.status).result(WAIT_S)
        events.put(told)

    stream = engine.open(prompt(0), asked(), "", ())
    engine.begin(stream, put)
    answer = labs_engine.Answer(stream.row.id, events, engine.leave)
    assert read(answer)[0] == alone("llama", 0)


# ---------------------------------------------------------------- the room itself


def test_the_engine_uses_labs_and_its_loop_and_nothing_below_them():
    names = imports(ast.walk(tree("labs_engine.py")))
    assert names - {*sys.stdlib_module_names} == {
        "labs",
        "labs_loop",
        "labs_turns",
        "msgspec",
        "cachetools",
    }


def test_cachetools_is_imported_only_where_answers_are_kept():
    names = imports(tree("labs_engine.py").body)
    assert names - {*sys.stdlib_module_names} == {"labs", "labs_turns", "msgspec"}


def test_a_function_of_the_engine_has_forty_lines_at_most():
    functions = [n for n in ast.walk(tree("labs_engine.py")) if isinstance(n, ast.FunctionDef)]
    assert [f.name for f in functions if f.end_lineno - f.lineno >= 40] == []
