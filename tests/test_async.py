# SPDX-License-Identifier: Apache-2.0
"""Answers in asyncio, from engines with real threads behind a gate that holds their calls."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import math
import threading
from collections.abc import Callable, Iterator
from typing import Any

import kit
import pytest
from kit import WAIT_S, Gate, alone, asked, model_of, options, prompt, quiet

import labs
import labs_async
import labs_engine

Begin = Callable[..., tuple[labs_engine.AnyEngine, Gate]]
LONG = options(max_new_tokens=60)


@pytest.fixture
def begin() -> Iterator[Begin]:
    """Start engines behind gates; at the end nothing may be left in their tables."""
    with contextlib.ExitStack() as stack:

        def start(cached: int = 0, **server: Any) -> tuple[labs_engine.AnyEngine, Gate]:
            gate = Gate(model_of("llama"))
            for handle in gate.handles:
                stack.callback(handle.remove)
            engine: labs_engine.AnyEngine
            engine = labs_engine.Engine(model_of("llama"), labs.Server(**server))
            if cached:
                engine = labs_engine.Cached(engine, labs.ResponseCache(max_entries=cached))
            stack.callback(lambda: kit.leftovers(engine) == {} or pytest.fail("left over"))
            stack.callback(engine.close)
            stack.callback(gate.let, math.inf)
            return engine, gate

        yield start


async def until_free(engine: labs_engine.AnyEngine) -> None:
    assert await asyncio.to_thread(quiet, engine)


async def next_of(answer: labs_async.Answer) -> labs.Event:
    return await asyncio.wait_for(anext(answer), WAIT_S)


async def text_of(engine: labs_engine.AnyEngine, number: int, wanted: labs.Generation) -> str:
    return (await labs_async.generate(engine, prompt(number), wanted)).text


@pytest.mark.parametrize("cached", [0, 4])
def test_fifty_tasks_on_one_loop_get_the_texts_that_their_requests_give_alone(cached, begin):
    engine, _ = begin(cached, max_batch_rows=16)
    threads: set[int] = set()

    async def ask(number: int) -> str:
        text = await text_of(engine, number % 20, asked(number % 20 if number % 2 else None))
        threads.add(threading.active_count())
        return text

    async def all_of_them() -> list[str]:
        threads.add(threading.active_count())
        return await asyncio.gather(*map(ask, range(50)))

    found = asyncio.run(all_of_them())
    expected = [alone("llama", n % 20, seed=n % 20 if n % 2 else None) for n in range(50)]
    assert found == expected
    assert max(threads) - min(threads) <= 1  # the engine's own may start and rest


def test_the_events_are_those_of_a_thread_and_end_with_done(begin):
    engine, _ = begin()

    async def events() -> list[labs.Event]:
        answer = labs_async.submit(engine, prompt(1), asked(7))
        found = [event async for event in answer]
        assert [event async for event in answer] == []
        return found

    *deltas, done = asyncio.run(events())
    *expected, end = engine.submit(prompt(1), asked(7))
    assert deltas == expected
    assert isinstance(done, labs.Done)
    assert isinstance(end, labs.Done)
    assert (done.finish_reason, done.usage.completion_tokens) == ("length", kit.NEW)


def test_a_cancelled_task_frees_its_row_and_another_one_its_own(begin):
    engine, gate = begin()

    async def work() -> None:
        first, second = (asyncio.create_task(text_of(engine, n, LONG)) for n in (1, 2))
        await asyncio.to_thread(gate.until, 1)
        await asyncio.sleep(0)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        assert await second == alone("llama", 2, new=60)
        await until_free(engine)

    asyncio.run(work())


LEAVE: dict[str, Callable[[labs_async.Answer], Any]] = {
    "close": lambda answer: answer.close(),
    "aclose": lambda answer: asyncio.ensure_future(answer.aclose()),
    "delete": lambda answer: None,
}


@pytest.mark.parametrize("way", LEAVE)
@pytest.mark.parametrize("cached", [0, 4])
def test_an_answer_that_is_left_frees_its_row(way, cached, begin):
    engine, gate = begin(cached)
    gate.let(3)

    async def work() -> None:
        answer = labs_async.submit(engine, prompt(1), asked(new=200))
        assert isinstance(await next_of(answer), labs.Delta)
        LEAVE[way](answer)
        await asyncio.sleep(0)
        if way == "delete":
            del answer
        else:
            with pytest.raises(StopAsyncIteration):
                await next_of(answer)
        gate.let(math.inf)
        await until_free(engine)

    asyncio.run(work())
    gc.collect()
    assert engine.status().steps < 150


def test_closing_an_answer_wakes_the_task_that_waits_for_its_next_event(begin):
    engine, gate = begin()
    gate.let(0)

    async def work() -> None:
        answer = labs_async.submit(engine, prompt(1), LONG)
        waiting = [asyncio.create_task(anext(answer, None)) for _ in range(2)]
        await asyncio.sleep(0)
        answer.close()
        assert await asyncio.wait_for(asyncio.gather(*waiting), WAIT_S) == [None, None]

    asyncio.run(work())
    gate.let(math.inf)
    assert quiet(engine)


@pytest.mark.parametrize("cached", [0, 4])
def test_a_loop_that_is_closed_before_the_end_frees_the_row_and_harms_no_other(cached, begin):
    engine, gate = begin(cached)
    gate.let(1)
    loop = asyncio.new_event_loop()

    async def leave_open() -> labs_async.Answer:
        return labs_async.submit(engine, prompt(1), asked(new=200))

    kept = loop.run_until_complete(leave_open())
    loop.close()
    other = engine.submit(prompt(2), asked())
    gate.let(math.inf)
    assert kit.read(other)[0] == alone("llama", 2)
    assert quiet(engine)
    assert engine.status().steps < 150
    kept.close()


def test_a_full_engine_and_a_wrong_request_are_refused_at_the_call(begin):
    engine, gate = begin(max_batch_rows=1, max_waiting=0)
    gate.let(0)

    async def work() -> None:
        running = labs_async.submit(engine, prompt(1), LONG)
        with pytest.raises(labs_engine.Busy, match="full"):
            labs_async.submit(engine, prompt(2), LONG)
        running.close()
        with pytest.raises(labs.PromptTooLong):
            await labs_async.generate(engine, prompt(2), options(max_new_tokens=4096))

    asyncio.run(work())
    gate.let(math.inf)
    assert quiet(engine)
    with pytest.raises(RuntimeError, match="no running event loop"):
        labs_async.submit(engine, prompt(1))


def test_a_request_that_fails_ends_in_failed_and_generate_raises_its_error(begin):
    engine, _ = begin()

    def broken(ids: list[int], logits: Any) -> Any:
        raise ValueError("broken on purpose")

    async def work() -> None:
        answer = labs_async.submit(engine, prompt(1), processors=(broken,))
        (event,) = [event async for event in answer]
        assert isinstance(event, labs.Failed)
        with pytest.raises(labs.GenerationError, match="broken on purpose"):
            await labs_async.generate(engine, prompt(1), processors=(broken,))

    asyncio.run(work())


def test_an_engine_that_closes_ends_its_answers(begin):
    engine, gate = begin()
    gate.let(2)

    async def work() -> None:
        answer = labs_async.submit(engine, prompt(1), LONG)
        assert isinstance(await next_of(answer), labs.Delta)
        gate.let(math.inf)
        await asyncio.to_thread(engine.close)
        *_, last = [event async for event in answer]
        assert getattr(last, "finish_reason", None) in ("cancelled", "length")

    asyncio.run(work())


def test_identical_requests_share_one_stored_answer(begin):
    engine, _ = begin(4)

    async def work() -> list[labs.Completion]:
        one = [labs_async.generate(engine, prompt(1), asked()) for _ in range(3)]
        found = await asyncio.gather(*one)
        return [*found, await labs_async.generate(engine, prompt(1), asked())]

    found = asyncio.run(work())
    assert {each.text for each in found} == {alone("llama", 1)}
    assert sorted(each.usage.response_cached for each in found) == [False, True, True, True]
