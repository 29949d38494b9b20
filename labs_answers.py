# SPDX-License-Identifier: Apache-2.0
"""The answers to one HTTP request while they are computed, and the bytes of a stream.

    answers = labs_answers.Answers(name, prepared, meters, began, gone)
    answer = engine.submit(ready.inputs, ready.generation, events=answers.events)
    answers.add(answer, ready, filters)
    for item in answers: ...  # (choice, part), or None while nothing comes

Needs labs.py, labs_engine.py, labs_meters.py, labs_request.py and labs_turns.py.
"""

from __future__ import annotations

import queue
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
from msgspec import UNSET

import labs
import labs_engine
import labs_meters
import labs_parts
import labs_protocol
import labs_ready
import labs_request
import labs_turns

POLL_S = 0.05  # how often an answer that waits checks whether its client is still connected
PING_S = 15.0  # a stream sends a comment after this silence, before a proxy closes the connection
DOUBT_S = 0.5  # the same for a client that may have left, which only a write can show


class Answers:
    """The answers to one HTTP request, whose events share one queue; closing it cancels them.

    began: when the request arrived, by perf_counter. gone: returns whether the client has left.
    documents: the passages quoted in the prompts, or UNSET without documents.
    """

    def __init__(
        self,
        name: str,
        prepared: labs_request.Prepared,
        meters: labs_meters.Meters,
        began: float,
        gone: Callable[[], bool | None],
    ) -> None:
        self.name, self._meters, self._began, self._gone = name, meters, began, gone
        self._prompt_tokens = sum(len(each.input_ids) for each in prepared.inputs)
        self.model = msgspec.structs.replace(prepared.model, decoder=None)  # without the weights
        self.documents = UNSET if prepared.sources is None else prepared.sources
        self.shares = prepared.choice and prepared.choice.shares
        self.generation = prepared.generation
        self.events: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._answers: list[labs_engine.Answer] = []
        self._ready: list[labs_ready.Ready] = []
        self._take: dict[int, Any] = {}
        self.dones: list[labs.Done] = []

    def add(self, answer: labs_engine.Answer, ready: labs_ready.Ready, filters: Any) -> None:
        """Add an answer whose events come to `events`. filters: as in labs_request.Context."""
        plan = ready.plan and msgspec.structs.replace(ready.plan, model=self.model)
        ready = msgspec.structs.replace(ready, model=self.model, plan=plan)
        self._take[answer.ticket] = ready.shown(filters)
        self._answers.append(answer)
        self._ready.append(ready)

    def __iter__(self) -> Iterator[tuple[int, Any] | None]:
        """Yield (choice, part), or None to send a comment. Raises the error that ended a row."""
        choices = {answer.ticket: index for index, answer in enumerate(self._answers)}
        last, pieces = dict.fromkeys(choices, 0.0), dict.fromkeys(choices, 0)
        silent = time.perf_counter()
        while len(self.dones) < len(choices):
            ticket, events = self._next()
            if gone := self._gone():
                raise labs_turns.ClientGone
            if not events and time.perf_counter() - silent > (DOUBT_S if gone is None else PING_S):
                silent = time.perf_counter()
                yield None
            for event in events:
                if isinstance(event, labs.Failed):
                    raise event.error
                silent = now = time.perf_counter()
                if isinstance(event, labs.Done):
                    event = self._end(choices[ticket], event, pieces[ticket])
                else:
                    self._meters.piece(self.name, now, last[ticket], self._began)
                    pieces[ticket] += 1
                last[ticket] = now
                yield choices[ticket], event

    def opened(self, identity: str, created: int) -> labs_protocol.Opened:
        """Return what the stream of the request with this id begins with."""
        return labs_protocol.Opened(
            id=identity,
            created=created,
            model=self.name,
            loaded=self.model,
            prompt_tokens=self._prompt_tokens,
            documents=self.documents,
            generation=self.generation,
        )

    def whole(self) -> list[labs_ready.Found]:
        """Wait for all answers and return them whole, in the order of choices."""
        found: dict[int, list[Any]] = {}
        for choice, part in (item for item in self if item is not None):
            found.setdefault(choice, []).append(part)
        return [self._ready[choice].fold(found[choice]) for choice in sorted(found)]

    def _next(self) -> tuple[int, list[labs_parts.Part]]:
        """Wait up to POLL_S for an event; return its ticket and the parts that may be shown."""
        try:
            ticket, event = self.events.get(timeout=POLL_S)
        except queue.Empty:
            return -1, []
        return ticket, self._take[ticket](event)

    def _end(self, choice: int, done: labs.Done, pieces: int) -> labs.Done:
        if done.fingerprint is not None:  # clients see the model's name, not its folder
            shown = msgspec.structs.replace(done.fingerprint, model=self.name)
            done = msgspec.structs.replace(done, fingerprint=shown)
        self.dones.append(done)
        self._meters.done(self.name, done, time.perf_counter() - self._began, pieces)
        if done.finish_reason == "content_filter":  # the row itself may still be generating
            self._answers[choice].close()
        return done

    def record(self) -> dict[str, Any]:
        """Return the fields that the request log shows for these answers."""
        usages = [done.usage for done in self.dones]
        return {
            "model": self.name,
            "prompt_tokens": sum(usage.prompt_tokens for usage in usages),
            "cached_tokens": sum(usage.cached_tokens for usage in usages),
            "completion_tokens": sum(usage.completion_tokens for usage in usages),
            "finish_reason": ",".join(done.finish_reason for done in self.dones) or "cancelled",
            "queue_s": round(max((done.timings.queue_s for done in self.dones), default=0), 4),
            "prefill_s": round(max((done.timings.prefill_s for done in self.dones), default=0), 4),
        }

    def close(self) -> None:
        for answer in self._answers:
            answer.close()


class Frames:
    """A stream of bytes that the WSGI server closes, possibly twice or before the first frame."""

    def __init__(self, frames: Iterator[bytes], close: Callable[[], None]) -> None:
        self._frames = frames
        self._finish = weakref.finalize(self, close)

    def __iter__(self) -> Frames:
        return self

    def __next__(self) -> bytes:
        return next(self._frames)

    def close(self) -> None:
        self._finish()
