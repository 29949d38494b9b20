# SPDX-License-Identifier: Apache-2.0
"""Embedding models and cross-encoders for threads: one request computes, a few wait their turn.

    desk = labs_desk.start(config)              # loads the model, as labs_models does on demand
    with desk.turn(gone, timeout_s=60) as turn:
        rows = turn.model.tokens(texts)         # turn.model: a labs_embed.Encoder or a Scorer
        vectors = turn.model.vectors(rows, stop=turn.stop)

A desk stands where labs_models.py has engines for models that generate text, so it is loaded,
counted and unloaded by the same rules. It computes in threads that end, beside the engines' own.
Needs labs_apart.py, labs_embed.py, labs_rerank.py, labs_engine.py, labs_asked.py and
labs_turns.py.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from msgspec import Struct

import labs
import labs_apart
import labs_asked
import labs_embed
import labs_engine
import labs_rerank
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


class Desk:
    """A model that answers one request at a time, and the requests that wait for it."""

    max_rows = 1

    def __init__(self, model: Any, max_waiting: int, *, load_s: float = 0.0) -> None:
        self.maker, self._max_waiting, self._load_s = model, max_waiting, load_s
        self._queue: deque[object] = deque()  # the first one has its turn
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
        self, gone: Callable[[], Any] = lambda: False, timeout_s: float | None = None
    ) -> Iterator[Turn]:
        """Wait for the turn of one request, and hold it.

        gone: returns whether the client has left, which raises ClientGone, also in `stop`.
        timeout_s: of the wait and the work. Raises Busy when too many wait, when it is too late
        and when the desk is closed.
        """
        mine, began = object(), time.perf_counter()

        def stop() -> None:
            if self._closed:
                raise labs_engine.Busy("the server is shutting down")
            if timeout_s is not None and time.perf_counter() > began + timeout_s:
                raise labs_engine.Busy(f"it was not computed within timeout_s = {timeout_s} s")
            if gone():
                raise labs_turns.ClientGone

        self._enter(mine)
        try:
            while self._queue[0] is not mine:
                with self._change:
                    self._change.wait(POLL_S)
                stop()
            stop()
            yield Turn(self.maker, stop, time.perf_counter() - began)
        finally:
            with self._change:
                self._queue.remove(mine)
                self._done += 1
                self._change.notify_all()

    def _enter(self, mine: object) -> None:
        with self._change:
            if len(self._queue) > self._max_waiting:
                text = f"{self._max_waiting} requests wait for this model, its limit; try again"
                raise labs_engine.Busy(text)
            self._queue.append(mine)

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


KINDS: dict[str, Any] = {"embedding": labs_embed.Encoder, "rerank": labs_rerank.Scorer}


@functools.lru_cache(maxsize=2)
def remembered(spec: labs.ModelSpec) -> Any:
    """Return an Encoder or a Scorer; the two used last stay loaded."""
    return KINDS[spec.kind](spec)


def start(config: labs.Config) -> Desk:
    """Load the embedding model or cross-encoder of a configuration. Raises ModelError."""
    model = KINDS[config.model.kind](config.model)
    began = time.perf_counter()
    labs_apart.run(model.load)
    desk = Desk(model, config.server.max_waiting, load_s=time.perf_counter() - began)
    labs_turns.close_at_exit(desk)
    return desk


class Desks:
    """Which model of a server answers a request for vectors or scores.

    encoder: of the documents, which has a desk of its own, as labs_rag.py uses it too.
    """

    def __init__(self, config: labs.Config, encoder: labs_embed.Encoder | None) -> None:
        self._configs = config.by_name()
        self._default = config
        self._own: dict[str, Desk] = {}
        if encoder is not None and (name := encoder.spec.model_name) not in self._configs:
            self._own[name] = Desk(encoder, config.server.max_waiting)

    def kinds(self) -> dict[str, Any]:
        """Return the kind of each model by its name, also of those that generate text."""
        found: dict[str, Any] = {name: each.model.kind for name, each in self._configs.items()}
        return found | dict.fromkeys(self._own, "embedding")

    def own(self, name: str) -> Desk | None:
        """Return the desk of the documents' embedding model, None for another name."""
        return self._own.get(name)

    def model_of(self, name: str) -> Any:
        """Return a model without a desk, for a program that makes one request at a time."""
        own = self._own.get(name)
        return remembered(self._configs[name].model) if own is None else own.maker

    def timeout_s(self, name: str) -> float | None:
        """Return how long a request to a model may take, None if there is no limit."""
        return self._configs.get(name, self._default).generation.timeout_s

    def name_of(self, asked: str | None, kind: str) -> str:
        """Return the model that a request names, or else the first one of the kind.

        Raises Refusal for an unknown model, and for one of another kind.
        """
        kinds = self.kinds()
        names = [name for name, each in kinds.items() if each == kind]
        if asked in names:
            return str(asked)
        if not names:
            hint = f'kind = "{kind}" in [models.NAME] names one'
            text = f"this server has no model of the kind {kind}; {hint}"
            raise labs_asked.Refusal(text, "model_not_found", "model", 404)
        if asked is None:
            return names[0]
        known = f"models of the kind {kind}: {', '.join(names)}"
        if asked in kinds:
            text = f"model: {asked} is of the kind {kinds[asked]}; {known}"
            raise labs_asked.Refusal(text, "invalid_value", "model")
        text = f"unknown model {asked!r:.80}; {known}"
        raise labs_asked.Refusal(text, "model_not_found", "model", 404)
