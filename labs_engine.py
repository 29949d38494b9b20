# SPDX-License-Identifier: Apache-2.0
"""Serve one loaded model to many threads: one thread runs the decode loop, any thread may submit.

    engine = labs_engine.Engine(model)
    answer = engine.submit(inputs, generation)   # raises Busy at once if the engine is full
    for event in answer: ...                     # labs.Delta, ..., labs.Done or labs.Failed
    answer.close()                               # frees the row within one step
    engine.close(deadline_s=30)

Lock order: the lock of Cached is taken before the lock of Engine. Only the engine's thread puts
events into queues, and it holds no engine lock while it does. Closing an answer takes no lock,
because a destructor may run in any thread at any moment. It only puts the ticket of the answer in a
queue, which the engine empties before each step and whenever a request arrives.
"""

from __future__ import annotations

import itertools
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec import Struct, field
from msgspec.structs import replace

import labs
import labs_memory
import labs_turns
from labs_turns import Busy as Busy
from labs_turns import Job, Put, Work

if TYPE_CHECKING:
    import labs_loop

log = logging.getLogger("labs.engine")
REST_S = 1.0  # an idle engine on a CPU lets its thread end, for the sake of other engines' threads
CLOSE_POLL_S = 0.05  # how often `close` looks for answers that were closed


class Status(Struct, frozen=True):
    """The state of an engine at one moment.

    idle_s: seconds since the last forward call, 0 without requests. halvings: batches split for
    lack of memory. failures: of the forward pass. paused: running rows that wait for memory.
    """

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
    paused: int = 0


class Answer:
    """Iterate over the events of one request. Closing or deleting it cancels the request."""

    def __init__(self, ticket: int, events: Any, leave: Callable[[int], None]) -> None:
        self.ticket, self.queue, self._leave = ticket, events, leave
        self.over = False

    def __iter__(self) -> Iterator[labs.Event]:
        return self

    def __next__(self) -> labs.Event:
        if (event := self.get()) is None:
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


def _submit(
    self: Any,
    inputs: labs.Inputs,
    generation: labs.Generation,
    *,
    owner: str = "",
    processors: tuple[Any, ...] = (),
    events: Any = None,
) -> Answer:
    """Queue a request and return its answer.

    owner: rows are given to owners in turn; cached answers and prompt prefixes are shared within
    one owner only. processors: as in labs_decode.Sampling.
    events: a queue of (ticket, event) that several answers share; by default each has its own.
    Raises InputError for an invalid request and Busy when the engine is full or closing.
    """
    stream = self.open(inputs, generation, owner, processors)
    answer: Answer = self.take_in(stream, queue.SimpleQueue() if events is None else events)
    return answer


class Engine:
    """Run one model in one thread. All methods may be called from any thread."""

    submit = _submit

    def __init__(self, model: labs.Model, server: labs.Server = labs.Server()) -> None:  # noqa: B008
        self.model, self.max_waiting = model, server.max_waiting
        self.max_rows = labs.rows_in_memory(model, server.max_batch_rows)
        if self.max_rows < (most := server.max_batch_rows or 1):
            why = model.decoder.reason if model.decoder.mode == "alone" else "memory is too small"
            log.warning("the engine runs %d rows at once, not %d: %s", self.max_rows, most, why)
        self.before_step: list[Callable[[], None]] = []  # the thread calls them without a lock
        self._tickets = itertools.count()
        self._lock = threading.Condition()
        self._waiting = labs_turns.Waiting(server.max_waiting)
        self._working = labs_turns.Working()
        self._jobs: dict[int, Job] = {}  # by ticket, which is also the id of the row
        self._abandoned: queue.SimpleQueue[int] = queue.SimpleQueue()
        self.leave = self._abandoned.put  # cancels by ticket, without a lock or a reference here
        self._prefixes: Callable[[], Any] = lambda: labs_turns.prefixes_of(model, server)
        self._loop = self._make_loop()
        self._failures, self._closing, self._stopped = 0, False, False
        self._resting, self._rest_s = False, REST_S if model.device == "cpu" else None
        self._start()
        labs_turns.close_at_exit(self)

    def _start(self) -> None:
        self._thread = threading.Thread(target=self._serve, name="labs-engine", daemon=True)
        self._thread.start()

    def open(
        self, inputs: labs.Inputs, generation: labs.Generation, owner: str, processors: Any
    ) -> labs.InFlight:
        """Check a request without queueing it, the first half of `submit`; row.id is the ticket."""
        ticket = next(self._tickets)
        stream = labs.open_request(self.model, ticket, inputs, generation, processors)
        stream.row.owner = owner
        return stream

    def take_in(self, stream: labs.InFlight, events: Any, work: Work | None = None) -> Answer:
        """Queue a request that `open` has checked: the second half of `submit`.

        work: a generator function that runs in the engine's thread instead of decoding. Each
        resume should take about as long as a step, and rows get an equal share of the time. One
        work runs at a time, others wait. When it ends, the answer ends or, after DECODE, begins.
        """
        self.begin(stream, events.put, work)
        return Answer(stream.row.id, events, self.leave)

    def begin(self, stream: labs.InFlight, put: Put, work: Work | None = None) -> None:
        """Queue a checked request or raise Busy; the engine's thread passes its events to `put`."""
        with self._lock:
            self._cancel_abandoned()
            self._check_room(stream.row.owner)
            self._jobs[stream.row.id] = job = Job(stream, put, work)
            self._waiting.add(job)
            self._lock.notify_all()
            if self._resting:
                self._resting = False
                self._start()

    @property
    def busy(self) -> bool:
        """Whether any request is running or waiting."""
        return bool(self._jobs)

    def status(self) -> Status:
        with self._lock:
            return Status(
                running=len(self._jobs) - len(self._waiting),
                waiting=len(self._waiting),
                max_rows=self.max_rows,
                max_waiting=self.max_waiting,
                cache_usage=labs_memory.cache_usage([*self._loop.batches, *self._loop.prefilling]),
                idle_s=time.perf_counter() - self._loop.last_step_at if self._jobs else 0.0,
                steps=self._loop.steps,
                halvings=self._loop.oom_splits,
                failures=self._failures,
                response_cache_hits=0,
                alive=self._resting or self._thread.is_alive(),
                closing=self._closing,
                paused=sum(row.waits for row in [*self._loop.rows.values()]),
            )

    def close(self, deadline_s: float = 0.0) -> bool:
        """Refuse new requests, cancel others at the deadline; return whether all ended before."""
        end = time.monotonic() + deadline_s
        with self._lock:
            self._closing = True
            self._lock.notify_all()
            while self._jobs and self._thread.is_alive() and time.monotonic() < end:
                self._cancel_abandoned()
                self._lock.wait(CLOSE_POLL_S)
            ended = not self._jobs
            for job in self._jobs.values():
                job.stream.row.cancelled = True
        self._thread.join(timeout=10)
        getattr(self._loop.prefixes, "flush", bool)()  # its files, if it has any
        return ended

    def _check_room(self, owner: str) -> None:
        if self._closing:
            raise Busy(labs_turns.CLOSING)
        if self._stopped:
            raise Busy("the engine stopped after an error; the server's log has the reason")
        full = len(self._jobs) >= self.max_rows + self.max_waiting
        if full and not self._waiting.has_place(owner):
            text = f"the server is full: {len(self._jobs)} requests are running or waiting"
            raise Busy(f"{text} (max_batch_rows, max_waiting); try again later")

    def _cancel_abandoned(self) -> None:
        """Cancel the requests whose answers were closed. The caller holds the lock."""
        while not self._abandoned.empty():
            if (job := self._jobs.get(self._abandoned.get())) is None:
                continue
            job.has_listener, job.stream.row.cancelled = False, True
            if job in self._waiting:
                self._waiting.remove(job)
                del self._jobs[job.stream.row.id]

    def _make_loop(self) -> labs_loop.Loop:
        import labs_loop

        return labs_loop.Loop(before_step=self._poll, prefixes=self._prefixes())

    def _serve(self) -> None:
        goes_on: bool | None = False
        try:
            while goes_on := self._wait():
                failed = False
                try:
                    streams, rows = self._take(), self.max_rows
                    for index, event in labs.run(self.model, streams, rows, self._loop):
                        self._deliver(index, event)
                except Exception as error:  # any error of a model: later requests are served
                    log.exception("the forward pass failed")
                    error.__traceback__ = error.__cause__ = error.__context__ = None  # hold slots
                    self._fail(list(self._loop.rows), error)
                    failed = True
                if failed:  # outside the handler, which holds the error
                    self._reset()
        finally:
            if goes_on is not None:
                self._stop()

    def _stop(self) -> None:
        with self._lock:  # no request is accepted from here on
            self._stopped = True
            self._waiting = labs_turns.Waiting(0)
        self._fail(list(self._jobs), labs.GenerationError("the engine stopped after an error"))

    def _wait(self) -> bool | None:
        """Wait for requests; return False once the engine closes and none are left.

        None: there were none for so long that the thread ends until the next one. See labs_apart.
        """
        with self._lock:
            called = self._lock.wait_for(lambda: self._jobs or self._closing, self._rest_s)
            self._resting = not called
            self._loop.last_step_at = time.perf_counter()
            return None if self._resting else bool(self._jobs)

    def _take(self) -> Iterator[labs.InFlight | None]:
        """Yield the next waiting request, or None; labs.run resumes this when a row is free."""
        while True:
            with self._lock:
                self._cancel_abandoned()
                job = self._waiting.begin(self._jobs.values(), works=False)
            yield job.stream if job else None

    def _poll(self) -> None:
        """Cancel, time out, and advance a work; the decode loop calls this before each step."""
        for function in self.before_step:
            function()
        with self._lock:
            self._cancel_abandoned()
            late, now = self._waiting.take_ended(), self._working
            now.job = now.job or self._waiting.begin(self._jobs.values(), works=True)
        for job in late:
            event = labs_turns.done(job.stream, job.end, self.model.load_s)
            self._deliver(job.stream.row.id, event)
        if (begun := now.job) is None or now.waits(beside_rows=bool(self._loop.rows)):
            return
        end = now.advance(self._loop.prefixes, self.model.load_s)
        self._loop.last_step_at = time.perf_counter()
        if begun.work is None:
            with self._lock:
                self._waiting.add(begun)
        if end is not None:
            self._deliver(begun.stream.row.id, end)

    def _deliver(self, index: int, event: labs.Event) -> None:
        """Pass an event to its listener; before the last event the request leaves the table."""
        job = self._jobs[index]
        why = getattr(event, "finish_reason", "") if self._closing else ""
        if why == "cancelled" and not job.stream.row.generated:  # as if it had been refused
            event = labs.Failed(Busy(labs_turns.CLOSING))
        if isinstance(event, labs.Done | labs.Failed):
            with self._lock:
                del self._jobs[index]
                self._lock.notify_all()
        if job.has_listener:
            job.put((index, event))

    def _fail(self, indexes: list[int], error: Exception) -> None:
        reason = error if isinstance(error, labs.LabsError) else labs.GenerationError(str(error))
        self._failures += bool(indexes)
        for index in indexes:
            self._deliver(index, labs.Failed(reason))

    def _reset(self) -> None:
        """Replace the loop by one with empty slots, and free the memory of the failed step."""
        old, self._loop = self._loop, self._make_loop()
        self._loop.steps, self._loop.oom_splits = old.steps, old.oom_splits
        del old
        labs.release_memory()


# ---------------------------------------------------------------- cached answers


class Shared(Struct, eq=False):
    """One computation for several requests. listeners: their queues by ticket. ticket: its own."""

    key: Any
    ticket: int
    listeners: dict[int, Any] = field(default_factory=dict)
    events: list[labs.Event] = field(default_factory=list)
    over: bool = False


class Cached:
    """Wrap an engine, with its interface, so that identical requests of one owner run once.

    Only repeatable requests share an answer: greedy or seeded ones without processors. No request
    joins a running one that has a timeout_s.
    """

    submit = _submit

    def __init__(self, engine: Engine, response_cache: labs.ResponseCache) -> None:
        labs.require("cachetools")
        from cachetools import TTLCache

        self._response_cache: Any = TTLCache(response_cache.max_entries, response_cache.ttl_s)
        self.engine, self.model, self.max_rows = engine, engine.model, engine.max_rows
        self.open, self.close = engine.open, engine.close
        self._shared: dict[Any, Shared] = {}  # by key: running, and open to more listeners
        self._tickets: dict[int, Shared] = {}  # by the ticket of each listener
        self._abandoned: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._hits, self._lock = 0, threading.Lock()
        engine.before_step.append(self._drop_abandoned)

    @property
    def busy(self) -> bool:
        return self.engine.busy

    def status(self) -> Status:
        return replace(self.engine.status(), response_cache_hits=self._hits)

    def take_in(self, stream: labs.InFlight, events: Any, work: Work | None = None) -> Answer:
        """Do as Engine.take_in does; a cached answer is given even by a full engine."""
        key, ticket = None if work else self._key(stream), stream.row.id
        self._drop_abandoned()
        if key is None:
            return self.engine.take_in(stream, events, work)
        with self._lock:
            shared = self._response_cache.get(key) or self._shared.get(key)
            self._hits += shared is not None
            shared = shared or self._begin(key, stream)
            for event in shared.events:
                events.put((ticket, _as_cached(event)))
            if not shared.over:
                shared.listeners[ticket], self._tickets[ticket] = events, shared
        return Answer(ticket, events, self._abandoned.put)

    def _key(self, stream: labs.InFlight) -> Any:
        """Return a key that identical requests share, or None for a request that may differ."""
        options = stream.generation
        repeats = options.seed is not None or stream.sampling.temperature == 0
        if not (repeats and self._response_cache.maxsize) or stream.sampling.processors:
            return None
        return stream.row.owner, stream.inputs.input_ids, msgspec.json.encode(options)

    def _begin(self, key: Any, stream: labs.InFlight) -> Shared:
        """Start a computation. The caller holds the lock, so its first event has to wait."""
        stream.row.exact_prefix = True
        shared = Shared(key, stream.row.id)
        self.engine.begin(stream, lambda numbered: self._broadcast(shared, numbered[1]))
        if stream.generation.timeout_s is None:
            self._shared[key] = shared
        return shared

    def _broadcast(self, shared: Shared, event: labs.Event) -> None:
        """Pass an event to all listeners; the engine's thread calls this."""
        with self._lock:
            if not shared.listeners:  # all left, and an identical request may run by now
                return
            for place, (ticket, events) in enumerate(shared.listeners.items()):
                events.put((ticket, _as_cached(event) if place else event))
            shared.events.append(event)
            if isinstance(event, labs.Delta):
                return
            self._shared.pop(shared.key, None)
            for ticket in shared.listeners:
                del self._tickets[ticket]
            shared.over, shared.listeners = True, {}
            if isinstance(event, labs.Done) and event.finish_reason in ("stop", "length"):
                self._response_cache[shared.key] = shared

    def _drop_abandoned(self) -> None:
        """Cancel computations without listeners; called before each step and each request."""
        with self._lock:
            while not self._abandoned.empty():
                ticket = self._abandoned.get()
                if (shared := self._tickets.pop(ticket, None)) is None:
                    continue
                del shared.listeners[ticket]
                if not shared.listeners:
                    self._shared.pop(shared.key, None)
                    self.engine.leave(shared.ticket)


AnyEngine = Engine | Cached


def _as_cached(event: labs.Event) -> labs.Event:
    if not isinstance(event, labs.Done):
        return event
    timings = replace(event.timings, prefill_s=0.0, decode_s=0.0, tokens_per_s=0.0, queue_s=0.0)
    return replace(event, usage=replace(event.usage, response_cached=True), timings=timings)
