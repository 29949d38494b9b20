# SPDX-License-Identifier: Apache-2.0
"""The shared batch of labs behind a door: one thread owns a loaded model, any number may ask.

    engine = labs_engine.Engine(model)
    answer = engine.submit(inputs, generation)   # refused at once where there is no room
    for event in answer: ...                     # labs.Delta, ..., labs.Done or labs.Failed
    answer.close()                               # lets the row go within one step
    engine.close(deadline_s=30)

This is the only room with state. The thread takes waiting requests in order, runs `labs.run` and
routes each event to the queues of those who wait for it; nobody else touches the model.
"""

from __future__ import annotations

import functools
import itertools
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any, TypeVar

import msgspec
from msgspec import Struct, field
from msgspec.structs import replace

import labs

log = logging.getLogger("labs.engine")
R = TypeVar("R")
CLOSE_POLL_S = 0.05  # how often `close` looks for answers that were left


class Busy(labs.LabsError):
    """The engine is full, closing or dead; who asked may come again later."""


class Status(Struct, frozen=True):
    """What an engine is doing. idle_s: since its last forward call; 0 while nothing is asked."""

    running: int
    waiting: int
    max_rows: int
    max_waiting: int
    cache_usage: float
    idle_s: float
    steps: int
    halvings: int
    failures: int
    response_cache_hits: int
    alive: bool
    closing: bool


class Job(Struct, eq=False):
    """One computation. listeners: queues by ticket; events: kept where others may join."""

    stream: labs.InFlight
    listeners: dict[int, queue.SimpleQueue[Any]]
    key: Any = None
    events: list[labs.Event] = field(default_factory=list)


class Answer:
    """The events of one request, as they come. Closing it, or forgetting it, cancels the request.

    ticket: names the answer in a queue of (ticket, event) that several answers share.
    """

    def __init__(
        self, ticket: int, events: queue.SimpleQueue[Any], leave: Callable[[int], None]
    ) -> None:
        self.ticket, self.queue, self._leave = ticket, events, leave
        self.over = False

    def __iter__(self) -> Iterator[labs.Event]:
        return self

    def __next__(self) -> labs.Event:
        event = self.get()
        if event is None:
            raise StopIteration
        return event

    def get(self, timeout_s: float | None = None) -> labs.Event | None:
        """Return the next event; None at the end, or if there is none for timeout_s seconds."""
        if self.over:
            return None
        try:
            event: labs.Event = self.queue.get(timeout=timeout_s)[1]
        except queue.Empty:
            return None
        self.over = isinstance(event, labs.Done | labs.Failed)
        return event

    def close(self) -> None:
        self.over = True
        self._leave(self.ticket)

    __del__ = close


class Engine:
    """A model and the thread that runs it. All methods may be called from any thread."""

    def __init__(
        self,
        model: labs.Model,
        server: labs.Server = labs.Server(),  # noqa: B008  (frozen)
        response_cache: labs.ResponseCache = labs.ResponseCache(),  # noqa: B008
    ) -> None:
        if model.spec.tp_plan:
            raise labs.ModelError("tp_plan: its processes cannot share a queue of requests")
        self.model = model
        self.max_rows = labs.rows_in_memory(model, server.max_batch_rows)
        if self.max_rows < (most := server.max_batch_rows or 1):
            why = model.decoder.why if model.decoder.how == "alone" else "memory holds no more"
            log.warning("%d rows at once, not %d: %s", self.max_rows, most, why)
        self.max_waiting = server.max_waiting
        self._ids = itertools.count()
        self._lock = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._jobs: dict[int, Job] = {}  # by the stream's index: waiting and running
        self._tickets: dict[int, Job] = {}
        self._calls: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._left: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._shared: dict[Any, Job] = {}  # by key: under way, may be joined
        self._done = _make_cache(response_cache)
        self._keeps = response_cache.max_entries > 0
        self._running = labs.Running(poll=self._poll)
        self._running.prefixes.max_bytes = server.prefix_cache_bytes
        self._hits = self._failures = 0
        self._closing = self._stopped = False
        self._thread = threading.Thread(target=self._serve, name="labs-engine", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------ for those who ask

    def submit(
        self,
        inputs: labs.Inputs,
        generation: labs.Generation,
        *,
        owner: str = "",
        processors: tuple[Any, ...] = (),
        events: queue.SimpleQueue[Any] | None = None,
    ) -> Answer:
        """Take a request in; its events come from the answer, or (ticket, event) from `events`.

        owner: answers, and what prompts begin with, are shared within one owner only.
        processors: as in labs_decode.Sampling.
        Raises an InputError for what cannot be done, and Busy where there is no room.
        """
        stream = labs.open_request(self.model, next(self._ids), inputs, generation, processors)
        events = queue.SimpleQueue() if events is None else events
        answer = Answer(next(self._ids), events, self._left.put)
        key = self._key(stream, owner)
        stream.owner, stream.exact = owner, stream.exact or key is not None
        with self._lock:
            self._let_go()
            if (known := self._done.get(key) or self._shared.get(key)) is not None:
                self._join(known, answer)
            else:
                self._check_room()
                self._begin(Job(stream, {answer.ticket: events}, key), answer.ticket)
        return answer

    def score(self, inputs: labs.Inputs, text: str) -> tuple[labs.TokenLogprob, ...]:
        """Do as labs.score does, between two steps of the batch."""
        return self.call(functools.partial(labs.score, self.model, inputs, text))

    def call(self, function: Callable[[], R]) -> R:
        """Return what a function of the model does, called between two steps of the batch."""
        future: Future[R] = Future()
        with self._lock:
            self._check_room()
            self._calls.append((function, future))
            self._lock.notify_all()
        return future.result()

    @property
    def busy(self) -> bool:
        """Whether anything is under way or waiting."""
        return bool(self._jobs)

    def status(self) -> Status:
        with self._lock:
            running = len(self._jobs) - len(self._waiting)
            return Status(
                running=running,
                waiting=len(self._waiting),
                max_rows=self.max_rows,
                max_waiting=self.max_waiting,
                cache_usage=labs.cache_usage(self._running),
                idle_s=time.perf_counter() - self._running.beat if self._jobs else 0.0,
                steps=self._running.steps,
                halvings=self._running.halvings,
                failures=self._failures,
                response_cache_hits=self._hits,
                alive=self._thread.is_alive(),
                closing=self._closing,
            )

    def close(self, deadline_s: float = 0.0) -> bool:
        """Refuse what comes, let what is under way end until the deadline, cancel the rest.

        Returns whether all of it ended by itself.
        """
        end = time.monotonic() + deadline_s
        with self._lock:
            self._closing = True
            self._lock.notify_all()
            while self._jobs and self._thread.is_alive() and time.monotonic() < end:
                self._let_go()
                self._lock.wait(CLOSE_POLL_S)
            ended = not self._jobs
            for job in self._jobs.values():
                job.stream.cancelled = True
        self._thread.join(timeout=10)
        return ended

    def _begin(self, job: Job, ticket: int) -> None:
        self._jobs[job.stream.index] = self._tickets[ticket] = job
        self._waiting.append(job)
        if job.key is not None and job.stream.generation.timeout_s is None:
            self._shared[job.key] = job
        self._lock.notify_all()

    def _check_room(self) -> None:
        if self._closing:
            raise Busy("the server is shutting down")
        if self._stopped:
            raise Busy("the engine has stopped; see its log")
        if len(self._jobs) >= self.max_rows + self.max_waiting:
            raise Busy(f"{len(self._jobs)} requests are under way or waiting; come again")

    # ------------------------------------------------------------ answers that are shared

    def _key(self, stream: labs.InFlight, owner: str) -> Any:
        """Return what identical requests have in common, or None for one that is never shared."""
        options = stream.generation
        repeats = options.seed is not None or stream.sampling.temperature == 0
        if not (self._keeps and repeats) or stream.sampling.processors:
            return None
        return owner, stream.inputs.input_ids, msgspec.json.encode(options)

    def _join(self, job: Job, answer: Answer) -> None:
        self._hits += 1
        for event in job.events:
            answer.queue.put((answer.ticket, _as_cached(event)))
        if job.stream.index in self._jobs:
            job.listeners[answer.ticket] = answer.queue
            self._tickets[answer.ticket] = job

    def _unshare(self, job: Job) -> None:
        if self._shared.get(job.key) is job:  # an identical one may have followed
            del self._shared[job.key]

    # ------------------------------------------------------------ the engine's own thread

    def _serve(self) -> None:
        try:
            while self._wait():
                failed = False
                try:
                    for index, event in labs.run(self.model, self, self.max_rows, self._running):
                        self._route(index, event)
                except Exception as error:  # whatever the model raised: the next ones are served
                    log.exception("the forward pass failed")
                    error.__traceback__ = error.__cause__ = error.__context__ = None  # hold slots
                    self._fail(list(self._running.streams), error)
                    failed = True
                if failed:  # out of the handler, which holds the error
                    self._forget()
        finally:
            with self._lock:  # nobody is taken in any more
                self._stopped = True
                self._waiting.clear()
                for _, future in self._calls:
                    future.set_exception(labs.GenerationError("the engine stopped"))
                self._fail(list(self._jobs), labs.GenerationError("the engine stopped"))

    def _wait(self) -> bool:
        """Wait for requests; return False when there will be none."""
        with self._lock:
            while not self._jobs and not self._calls:
                if self._closing:
                    return False
                self._lock.wait()
            self._running.beat = time.perf_counter()
            return True

    def __iter__(self) -> Iterator[labs.InFlight]:
        return self

    def __next__(self) -> labs.InFlight:
        """Return the next waiting stream; the loop of labs asks whenever it has a free row."""
        with self._lock:
            self._let_go()
            if not self._waiting:
                raise StopIteration
            return self._waiting.popleft().stream

    def _poll(self) -> None:
        """Do what must not wait for a free row; the loop of labs calls it before each step."""
        while self._calls:
            call, future = self._calls.popleft()
            try:
                future.set_result(call())
            except Exception as error:  # of one request, told to who made it
                future.set_exception(error)
        with self._lock:
            self._let_go()
            late = [job for job in self._waiting if job.stream.late or job.stream.cancelled]
            for job in late:
                self._waiting.remove(job)
        for job in late:
            reason = "cancelled" if job.stream.cancelled else "timeout"
            self._route(job.stream.index, _never_begun(job.stream, reason))

    def _let_go(self) -> None:
        """Cancel the streams that nobody listens to any more. The lock is held.

        Who leaves only puts a ticket in a queue: a destructor may run in any thread at any moment.
        """
        while not self._left.empty():
            ticket = self._left.get()
            if (job := self._tickets.pop(ticket, None)) is None:
                continue
            del job.listeners[ticket]
            if not job.listeners:
                job.stream.cancelled = True
                self._unshare(job)
                if job in self._waiting:
                    self._waiting.remove(job)
                    del self._jobs[job.stream.index]

    def _route(self, index: int, event: labs.Event) -> None:
        with self._lock:
            job = self._jobs[index]
            for place, (ticket, events) in enumerate(job.listeners.items()):
                events.put((ticket, _as_cached(event) if place else event))
            if job.key is not None:
                job.events.append(event)
            if isinstance(event, labs.Done | labs.Failed):
                self._end(job, event)

    def _end(self, job: Job, event: labs.Event) -> None:
        del self._jobs[job.stream.index]
        for ticket in job.listeners:
            del self._tickets[ticket]
        self._unshare(job)
        job.listeners.clear()
        whole = isinstance(event, labs.Done) and event.finish_reason in ("stop", "length")
        if job.key is not None and whole:
            self._done[job.key] = job
        self._lock.notify_all()

    def _fail(self, indexes: list[int], error: Exception) -> None:
        told = error if isinstance(error, labs.LabsError) else labs.GenerationError(str(error))
        self._failures += bool(indexes)
        for index in indexes:
            self._route(index, labs.Failed(told))

    def _forget(self) -> None:
        """Start anew with empty slots; what the failed step held is free before the next one."""
        old, self._running = self._running, labs.Running(poll=self._poll)
        self._running.steps, self._running.halvings = old.steps, old.halvings
        self._running.prefixes.max_bytes = old.prefixes.max_bytes
        del old
        labs.release_memory()


def _make_cache(wanted: labs.ResponseCache) -> Any:
    if wanted.max_entries == 0:
        return {}
    labs.require("cachetools")
    from cachetools import TTLCache

    return TTLCache(wanted.max_entries, wanted.ttl_s)


def _as_cached(event: labs.Event) -> labs.Event:
    if not isinstance(event, labs.Done):
        return event
    timings = replace(event.timings, prefill_s=0.0, decode_s=0.0, tokens_per_s=0.0, queue_s=0.0)
    return replace(event, usage=replace(event.usage, response_cached=True), timings=timings)


def _never_begun(stream: labs.InFlight, reason: Any) -> labs.Done:
    waited = time.perf_counter() - stream.began
    usage = labs.Usage(len(stream.inputs.input_ids), 0)
    return labs.Done(reason, usage, labs.Timings(stream.load_s, 0.0, 0.0, 0.0, waited))
