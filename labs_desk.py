# SPDX-License-Identifier: Apache-2.0
"""Embedding models and cross-encoders for threads: one request computes, a few wait their turn.

    desk = labs_desk.Desk(labs_embed.Encoder(spec), 64)
    with desk.turn(gone, timeout_s=60) as turn:
        rows = turn.model.tokens(texts)         # turn.model: a labs_embed.Encoder or a Scorer
        vectors = turn.model.vectors(rows, stop=turn.stop)

A desk stands where labs_models.py has engines for models that generate text, so it is loaded,
counted and unloaded by the same rules: see labs_kinds.py. It computes in threads that end, beside
the engines' own. Needs labs.py, labs_engine.py and labs_turns.py.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from msgspec import Struct

import labs
import labs_engine
import labs_turns

POLL_S = 0.05  # a waiting request checks this often whether its client is still connected
LAST_CALL_S = 10.0  # for the forward call under way when a desk is closed


class About(Struct, frozen=True):
    """What is known of a loaded model, under the names that labs.Model has for it."""

    device: str
    dtype: str
    load_s: float
    context_length: int


class Turn(Struct, frozen=True, eq=False):
    """A request's turn. stop: raises once the work has to end, to be called now and then."""

    model: Any
    stop: Callable[[], None]
    queue_s: float


class Place(Struct, eq=False):
    """A request at a desk, as labs_turns.Waiting reads jobs. owner: the API key that sent it."""

    owner: str
    work: None = None


class Desk:
    """A model that answers one request at a time, and the requests that wait for it.

    A turn goes to the API key whose last one is longest ago, and each key has its share of places.
    """

    max_rows = 1

    def __init__(self, model: Any, max_waiting: int, *, load_s: float = 0.0) -> None:
        self.maker, self._max_waiting, self._load_s = model, max_waiting, load_s
        self._queue = list[Any]()  # all requests
        self._now: Any = None  # the one that has its turn
        self._waiting: Any = labs_turns.Waiting(max_waiting)
        self._change, self._closed, self._done = threading.Condition(), False, 0

    @property
    def model(self) -> About:
        """What is known of the model, which is loaded for it. Raises ModelError."""
        loaded = self.maker.load()
        names = {long: short for short, long in labs.TORCH_DTYPES.items()}
        dtype = str(loaded.model.dtype).removeprefix("torch.")
        device = loaded.model.device.type
        return About(device, names.get(dtype, dtype), self._load_s, loaded.reader.limit)

    @property
    def context_length(self) -> int | None:
        """How many tokens the model reads; None before it is loaded."""
        return self.model.context_length if self.maker.weight_bytes else None

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights; 0 before they are loaded."""
        return int(self.maker.weight_bytes)

    @property
    def busy(self) -> bool:
        """Whether a request computes or waits."""
        return bool(self._queue)

    @contextlib.contextmanager
    def turn(
        self,
        gone: Callable[[], Any] = lambda: False,
        timeout_s: float | None = None,
        owner: str = "",
    ) -> Iterator[Turn]:
        """Wait for the turn of one request, and hold it.

        gone: returns whether the client has left, which raises ClientGone, also in `stop`.
        timeout_s: of the wait and the work. Raises Busy when too many wait, when it is too late
        and when the desk is closed.
        """
        mine, began = Place(owner), time.perf_counter()

        def stop() -> None:
            if self._closed:
                raise labs_engine.Busy("the server is shutting down")
            if timeout_s is not None and time.perf_counter() > began + timeout_s:
                raise labs_engine.Busy(f"it was not computed within timeout_s = {timeout_s} s")
            if gone():
                raise labs_turns.ClientGone

        self._enter(mine)
        try:
            while self._now is not mine:
                with self._change:
                    self._change.wait(POLL_S)
                stop()
            stop()
            yield Turn(self.maker, stop, time.perf_counter() - began)
        finally:
            with self._change:
                self._queue.remove(mine)
                if self._now is mine:
                    self._now, self._done = None, self._done + 1
                else:
                    self._waiting.remove(mine)
                self._next()

    def _enter(self, mine: Any) -> None:
        with self._change:
            shares = self._max_waiting > 0 and self._waiting.has_place(mine.owner)
            if len(self._queue) > self._max_waiting and not shares:
                text = f"{self._max_waiting} requests wait for this model, its limit; try again"
                raise labs_engine.Busy(text)
            self._queue.append(mine)
            self._waiting.add(mine)
            self._next()

    def _next(self) -> None:
        """Give the turn to a request that waits, if none has it; the caller holds the lock."""
        if self._now is None:
            self._now = self._waiting.begin(self._queue, works=False)
        self._change.notify_all()

    def status(self) -> labs_engine.Status:
        """Return the state as an engine does; a row is a request here."""
        count = len(self._queue)
        return labs_engine.Status(
            running=min(count, 1),
            waiting=max(count - 1, 0),
            max_rows=self.max_rows,
            max_waiting=self._max_waiting,
            cache_usage=0.0,
            idle_s=0.0,
            steps=self._done,
            halvings=0,
            failures=0,
            response_cache_hits=0,
            alive=True,
            closing=self._closed,
        )

    def close(self, deadline_s: float = 0.0) -> None:
        """Give the requests until the deadline to end, then end them at their next call."""
        self._wait_until_idle(deadline_s)
        self._closed = True
        self._wait_until_idle(LAST_CALL_S)

    def _wait_until_idle(self, timeout_s: float) -> None:
        with self._change:
            self._change.wait_for(lambda: not self._queue, timeout_s)
