# SPDX-License-Identifier: Apache-2.0
"""Share a server fairly: decide which job starts next and how much of it one API key may use.

    waiting = Waiting(places=64)
    waiting.add(job)                            # if waiting.has_place(job.owner)
    waiting.begin(jobs, works=False)            # the next job that needs a row

The owner of a job is the API key of its request; without keys all jobs have the same owner. The
next job is one of the owner with the fewest running jobs; of several such owners, the one whose
last start is longest ago. Nothing here is thread-safe: the engine holds a lock. Needs labs.py.
"""

from __future__ import annotations

import atexit
import functools
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any

from msgspec import Struct

import labs

WORTH_COUNTING_S = 1.0  # a shorter wait for a model does not reduce timeout_s
ROWS = 64  # default rows of an engine: labs_decode.MOST_ROWS, without importing torch
Put = Callable[[tuple[int, labs.Event]], Any]  # receives (ticket of the answer, event)
# Pauses, and text to show; it returns a finish reason, None for "stop", or DECODE.
Parts = Generator[labs.Delta | None, None, str | None]
Work = Callable[[Any, Any], Iterator[labs.Delta | None]]  # (labs_decode.Row, PrefixStore) -> Parts
CLOSING = "the server is shutting down"
DECODE = "decode"  # what a work returns whose request is decoded after it


class ClientGone(Exception):
    """The client has closed its connection."""


class Busy(labs.LabsError):
    """The server is full or shutting down; the client may try again later."""


class Job(Struct, eq=False):
    """A running or waiting request. put: called with (ticket, event) while there is a listener.

    work: a computation other than decoding, or before it; parts: the rest of it, once started.
    """

    stream: labs.InFlight
    put: Put
    work: Work | None = None
    parts: Iterator[labs.Delta | None] | None = None
    has_listener: bool = True

    @property
    def owner(self) -> str:
        return self.stream.row.owner

    @property
    def end(self) -> Any:
        """The finish reason of a job that must end now, else None."""
        row = self.stream.row
        return "cancelled" if row.cancelled else "timeout" if row.late else None


class Waiting:
    """The waiting jobs, in the order of their arrival."""

    def __init__(self, places: int) -> None:
        self.places, self._jobs = places, list[Job]()
        self._turns: dict[str, float] = {}  # by owner: when a job last started (perf_counter)

    def __len__(self) -> int:
        return len(self._jobs)

    def __contains__(self, job: Job) -> bool:
        return job in self._jobs

    def has_place(self, owner: str) -> bool:
        """Return whether an owner may wait although all places are taken.

        An owner may wait with fewer jobs than its share: an equal part of the places for each
        waiting owner, at least one. No other job is removed for it: see `places_beyond`.
        """
        waiting = Counter(job.owner for job in self._jobs)
        owners = {*waiting, owner}
        return len(owners) > 1 and waiting[owner] < max(1, self.places // len(owners))

    def add(self, job: Job) -> None:
        self._jobs.append(job)

    def remove(self, job: Job) -> None:
        self._jobs.remove(job)

    def take_ended(self) -> list[Job]:
        """Remove and return the jobs that were cancelled or timed out while waiting."""
        ended = [job for job in self._jobs if job.end]
        for job in ended:
            self._jobs.remove(job)
        return ended

    def begin(self, jobs: Iterable[Job], *, works: bool) -> Job | None:
        """Remove and return the next job that needs a row, or with `works` the next work.

        jobs: all jobs, running and waiting. Returns None if no such job waits.
        """
        wanting = [job for job in self._jobs if (job.work is not None) == works]
        if not wanting:
            return None
        under_way = Counter(job.owner for job in jobs)
        under_way.subtract(job.owner for job in self._jobs)

        def turn(job: Job) -> tuple[int, float]:
            return under_way[job.owner], self._turns.get(job.owner, 0.0)

        first = min(wanting, key=turn)
        self._turns[first.owner] = time.perf_counter()
        self._jobs.remove(first)
        return first


def places_beyond(places: int, owners: int) -> int:
    """Return how many jobs may wait beyond all places if this many owners arrive in turn."""
    return sum(max(1, places // n) for n in range(2, owners + 1)) if places else 0


class Working:
    """The running work: one at a time, because it holds memory; rows get an equal time."""

    def __init__(self) -> None:
        self.job: Job | None = None
        self._resumes = 0.0  # by perf_counter

    def waits(self, *, beside_rows: bool) -> bool:
        """Return whether the work pauses now so that rows get their time."""
        ended = self.job is not None and self.job.end
        return beside_rows and not ended and time.perf_counter() < self._resumes

    def advance(self, prefixes: Any, load_s: float) -> labs.Event | None:
        """Resume the work once; return its event, if any. One that is over is no job any more.

        The job of a work that ends in DECODE has no work any more: it waits for a row.
        """
        began, job = time.perf_counter(), self.job
        event = None if job is None else _part(job, prefixes, load_s)
        ended = time.perf_counter()
        self._resumes = ended + (ended - began)
        over = isinstance(event, labs.Done | labs.Failed) or job is None or job.work is None
        self.job = None if over else job
        return event


def _part(job: Job, prefixes: Any, load_s: float) -> labs.Event | None:
    try:
        if job.end is None and job.work is not None:
            if job.parts is None:
                job.stream.row.entered = time.perf_counter()
                job.parts = job.work(job.stream.row, prefixes)
            return next(job.parts)
    except StopIteration as end:
        if end.value == DECODE:
            job.work = job.parts = None
            return None
        return done(job.stream, end.value or "stop", load_s)
    except Exception as error:  # it fails this request only
        error.__traceback__ = error.__cause__ = error.__context__ = None  # frames hold columns
        reason = error if isinstance(error, labs.LabsError) else labs.GenerationError(str(error))
        return labs.Failed(reason)
    return done(job.stream, job.end, load_s)


def done(stream: labs.InFlight, why: Any, load_s: float) -> labs.Done:
    """Return the last event of a request that has no text. why: its finish reason."""
    now, row = time.perf_counter(), stream.row
    entered = row.entered or now
    timings = labs.Timings(load_s, now - entered, 0.0, 0.0, entered - stream.began)
    return labs.Done(why, labs.Usage(len(stream.inputs.input_ids), 0, row.cached), timings)


# ---------------------------------------------------------------- threads of a server


_LEFT_OPEN: weakref.WeakSet[Any] = weakref.WeakSet()


def close_at_exit(engine: Any) -> None:
    """Close an engine before the interpreter ends, which would abort within its thread's step."""
    _LEFT_OPEN.add(engine)


@atexit.register
def _close_all() -> None:
    for engine in [*_LEFT_OPEN]:
        engine.close()


def most_open(config: labs.Config) -> int:
    """Return how many requests may run or wait at once; each of them occupies a thread."""
    server, models = config.server, len({config.model_id, *config.models})
    rows = (server.max_batch_rows or ROWS) + server.max_waiting
    waiting = server.max_waiting if models > 1 else 0  # for a model
    waiting += 1 + server.max_waiting if config.documents.embedding_model else 0  # for its turns
    return min(server.max_loaded_models, models) * rows + waiting


def most_beyond(config: labs.Config) -> int:
    """Return how many more may wait because each of several keys has its share of places."""
    server, models = config.server, len({config.model_id, *config.models})
    beyond = places_beyond(server.max_waiting, len(config.api_keys))
    return min(beyond * min(server.max_loaded_models, models), server.max_connections)


class Open:
    """Falcon middleware that limits the open requests of each API key, so none takes all threads.

    It runs after the middleware that sets the owner. Without keys there is no limit.
    """

    def __init__(self, config: labs.Config) -> None:
        self.most, self._open = most_open(config), Counter[str]()
        self._lock = threading.Lock()

    def process_resource(self, req: Any, resp: Any, resource: Any, params: Any) -> None:
        owner = req.context.owner if req.method == "POST" else ""
        with self._lock:
            if owner and self._open[owner] >= self.most:
                raise Busy(f"this API key has {self.most} open requests, its limit; try again")
            self._open[owner] += 1
        req.context.leave = functools.partial(self._leave, owner)

    def process_response(self, req: Any, resp: Any, resource: Any, succeeded: bool) -> None:
        if resp.stream is None and hasattr(req.context, "leave"):
            req.context.leave()  # a stream calls it at its end

    def _leave(self, owner: str) -> None:
        with self._lock:
            self._open[owner] -= 1


def in_time_left(generation: labs.Generation, began: float) -> labs.Generation:
    """Subtract the time spent waiting for the model from timeout_s, if it was a second or more."""
    waited = time.perf_counter() - began
    if generation.timeout_s is None or waited < WORTH_COUNTING_S:
        return generation
    return labs.evolve(generation, timeout_s=max(0.001, generation.timeout_s - waited))


def prefixes_of(model: labs.Model, server: labs.Server) -> Any:
    """Return the store of prefixes that an engine's rows share, on disk too if that is set."""
    if not server.prefix_disk_bytes:
        return labs.new_prefixes(server.prefix_cache_bytes)
    labs.require("labs_prefix_files")
    import labs_prefix_files

    return labs_prefix_files.opened(model, server)
