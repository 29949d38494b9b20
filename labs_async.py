# SPDX-License-Identifier: Apache-2.0
"""Ask an engine from asyncio: the events of labs_engine's answers, for `async for`.

    engine = labs_engine.Engine(model)
    async for event in labs_async.submit(engine, inputs, generation):
        ...                                     # labs.Delta, ..., labs.Done or labs.Failed
    completion = await labs_async.generate(engine, inputs, generation)

The engine's thread hands each event to the event loop, so a request takes no thread of its own and
nothing polls. Needs labs.py and labs_engine.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import weakref
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import labs
import labs_engine

if TYPE_CHECKING:
    from labs_decode import Processor


class Answer(AsyncIterator[labs.Event]):
    """Iterate over the events of one request.

    Cancelling a task that waits for the next event, closing or deleting the answer, and closing the
    event loop cancel the request, which frees its row within one step.
    """

    def __init__(self, answer: labs_engine.Answer, mailbox: _Mailbox) -> None:
        self._answer, self._mailbox, self._over = answer, mailbox, False

    async def __anext__(self) -> labs.Event:
        if self._over:
            raise StopAsyncIteration
        try:
            event = await self._mailbox.events.get()
        except BaseException:  # the task was cancelled, or the loop ends
            self.close()
            raise
        if self._over or event is None:
            self._mailbox.end()
            raise StopAsyncIteration
        self._over = isinstance(event, labs.Done | labs.Failed)
        if self._over:
            self._mailbox.end()
        return event

    def close(self) -> None:
        """Cancel the request; do nothing if it has ended."""
        self._over = True
        self._answer.close()
        self._mailbox.end()

    async def aclose(self) -> None:
        """Do as `close` does, as contextlib.aclosing expects."""
        self.close()


class _Mailbox:
    """Stands for the queue that an engine fills; it keeps no answer alive."""

    def __init__(self) -> None:
        self.events: asyncio.Queue[labs.Event | None] = asyncio.Queue()
        self.answer: Any = lambda: None  # a weak reference, once the request is queued
        self._loop = asyncio.get_running_loop()

    def put(self, numbered: tuple[int, labs.Event]) -> None:
        """Hand an event to the loop, from any thread; cancel the request of a closed loop."""
        try:
            self._loop.call_soon_threadsafe(self.events.put_nowait, numbered[1])
        except RuntimeError:  # the loop is closed
            if (answer := self.answer()) is not None:
                answer.close()

    def end(self) -> None:
        """Wake another task that waits for an event: none will come."""
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self.events.put_nowait, None)


def submit(
    engine: labs_engine.AnyEngine,
    inputs: labs.Inputs,
    generation: labs.Generation | None = None,
    *,
    owner: str = "",
    processors: tuple[Processor, ...] = (),
) -> Answer:
    """Queue a request and return its answer, from a coroutine or callback of a running loop.

    owner, processors: as of labs_engine.Engine.submit. Raises InputError for an invalid request,
    and Busy when the engine is full or closing, both at the call.
    """
    mailbox, options = _Mailbox(), generation or labs.Generation()
    words: dict[str, Any] = {"owner": owner, "processors": processors, "events": mailbox}
    answer = engine.submit(inputs, options, **words)
    mailbox.answer = weakref.ref(answer)
    return Answer(answer, mailbox)


async def generate(
    engine: labs_engine.AnyEngine,
    inputs: labs.Inputs,
    generation: labs.Generation | None = None,
    *,
    owner: str = "",
    processors: tuple[Processor, ...] = (),
) -> labs.Completion:
    """Return a whole answer. Raises what `submit` raises, and the error of a request that failed.

    The parameters are those of `submit`.
    """
    deltas = list[labs.Delta]()
    async for event in submit(engine, inputs, generation, owner=owner, processors=processors):
        if isinstance(event, labs.Delta):
            deltas.append(event)
        elif isinstance(event, labs.Done):
            return labs.fold(deltas, event)
        else:
            raise event.error
    raise labs.GenerationError("the request was closed before its end")
