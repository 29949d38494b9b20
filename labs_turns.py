# SPDX-License-Identifier: Apache-2.0
"""Whose turn it is: which job begins next, and how much of a server one key may hold.

    waiting = Waiting(places=64)
    waiting.add(job)                            # if waiting.has_place(job.owner)
    waiting.begin(others, works=False)          # the next one that wants a row

A job has an owner, whose key it came with; without keys all have the same. Who owns the fewest of
those under way begins first, and of several with as few the one that has waited longest for a
turn. Nothing here is locked: an engine does that. Needs labs.py.
"""

from __future__ import annotations

import functools
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from msgspec import Struct

import labs

WORTH_COUNTING_S = 1.0  # of waiting for a model
ROWS = 64  # labs_decode.MOST_ROWS, without torch: of an engine, where the settings do not tell
Put = Callable[[tuple[int, labs.Event]], Any]  # takes an event with the ticket of its answer
Work = Callable[[Any, Any], Iterator[None]]  # of a labs_decode.Row and PrefixStore; pauses


class ClientGone(Exception):
    """Nobody reads the answer any more."""


class Busy(labs.LabsError):
    """There is no room, now or any more; who asked may come again later."""


class Job(Struct, eq=False):
    """A request under way. put: is called with (ticket, event), while somebody listens.

    work: computes what is no text; parts: what is left of it, once it has begun.
    """

    stream: labs.InFlight
    put: Put
    work: Work | None = None
    parts: Iterator[None] | None = None
    heard: bool = True

    @property
    def owner(self) -> str:
        return self.stream.row.owner

    @property
    def end(self) -> Any:
        """Why it must not go on; None if it may."""
        row = self.stream.row
        return "cancelled" if row.cancelled else "timeout" if row.late else None


class Waiting:
    """The jobs that wait, in the order in which they came."""

    def __init__(self, places: int) -> None:
        self.places, self._jobs = places, list[Job]()
        self._turns: dict[str, float] = {}  # of owners: when a job of theirs last began

    def __len__(self) -> int:
        return len(self._jobs)

    def __contains__(self, job: Job) -> bool:
        return job in self._jobs

    def has_place(self, owner: str) -> bool:
        """Tell whether an owner may wait though all places are taken: with less than its share.

        That is an equal part of the places for each who waits, one at least. Nobody has to leave
        for it: see `places_beyond`.
        """
        waiting = Counter(job.owner for job in self._jobs)
        owners = {*waiting, owner}
        return len(owners) > 1 and waiting[owner] < max(1, self.places // len(owners))

    def add(self, job: Job) -> None:
        self._jobs.append(job)

    def remove(self, job: Job) -> None:
        self._jobs.remove(job)

    def take_ended(self) -> list[Job]:
        """Remove and return those that must not begin any more."""
        ended = [job for job in self._jobs if job.end]
        for job in ended:
            self._jobs.remove(job)
        return ended

    def begin(self, jobs: Iterable[Job], *, works: bool) -> Job | None:
        """Remove and return the next one that wants a row, or that is a work; None if none does.

        jobs: all there are, those under way and those that wait.
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
    """Return how many may wait beyond all places, where so many owners come one after the other."""
    return sum(max(1, places // n) for n in range(2, owners + 1)) if places else 0


class Working:
    """The work under way: one at a time, as it holds memory; rows get as much time as it does."""

    def __init__(self) -> None:
        self.job: Job | None = None
        self._resumes = 0.0  # by perf_counter

    def waits(self, *, beside_rows: bool) -> bool:
        """Tell whether it is the rows' time now."""
        ended = self.job is not None and self.job.end
        return beside_rows and not ended and time.perf_counter() < self._resumes

    def advance(self, prefixes: Any, load_s: float) -> labs.Event | None:
        """Do a part; return the event that ends the work, None if it goes on."""
        began, job = time.perf_counter(), self.job
        event = None if job is None else _part(job, prefixes, load_s)
        ended = time.perf_counter()
        self._resumes = ended + (ended - began)
        self.job = job if event is None else None
        return event


def _part(job: Job, prefixes: Any, load_s: float) -> labs.Event | None:
    try:
        if job.end is None and job.work is not None:
            if job.parts is None:
                job.stream.row.entered = time.perf_counter()
                job.parts = job.work(job.stream.row, prefixes)
            next(job.parts)
            return None
    except StopIteration:
        return done(job.stream, "stop", load_s)
    except Exception as error:  # of one request, told to who made it
        error.__traceback__ = error.__cause__ = error.__context__ = None  # they hold columns
        told = error if isinstance(error, labs.LabsError) else labs.GenerationError(str(error))
        return labs.Failed(told)
    return done(job.stream, job.end, load_s)


def done(stream: labs.InFlight, why: Any, load_s: float) -> labs.Done:
    """Return the end of a request that has no text."""
    now, row = time.perf_counter(), stream.row
    entered = row.entered or now
    timings = labs.Timings(load_s, now - entered, 0.0, 0.0, entered - stream.began)
    return labs.Done(why, labs.Usage(len(stream.inputs.input_ids), 0, row.cached), timings)


# ---------------------------------------------------------------- threads of a server


def most_open(config: labs.Config) -> int:
    """Return how many requests may run or wait at once, each of which holds a thread."""
    server, models = config.server, len({config.model_id, *config.models})
    rows = (server.max_batch_rows or ROWS) + server.max_waiting
    waiting = server.max_waiting if models > 1 else 0  # for a model
    return min(server.max_loaded_models, models) * rows + waiting


def most_beyond(config: labs.Config) -> int:
    """Return how many more there may be, as each of several keys has a share of the places."""
    server, models = config.server, len({config.model_id, *config.models})
    beyond = places_beyond(server.max_waiting, len(config.api_keys))
    return min(beyond * min(server.max_loaded_models, models), server.max_connections)


class Open:
    """Middleware, after the one that names owners: no key holds the threads kept for the others.

    Without keys there is one owner, who may hold them all.
    """

    def __init__(self, config: labs.Config) -> None:
        self.most, self._open = most_open(config), Counter[str]()
        self._lock = threading.Lock()

    def process_resource(self, req: Any, resp: Any, resource: Any, params: Any) -> None:
        owner = req.context.owner if req.method == "POST" else ""
        with self._lock:
            if owner and self._open[owner] >= self.most:
                raise Busy(f"this key has {self.most} requests open already; come again")
            self._open[owner] += 1
        req.context.leave = functools.partial(self._leave, owner)

    def process_response(self, req: Any, resp: Any, resource: Any, succeeded: bool) -> None:
        if resp.stream is None and hasattr(req.context, "leave"):
            req.context.leave()  # else at the end of the stream

    def _leave(self, owner: str) -> None:
        with self._lock:
            self._open[owner] -= 1


def in_time_left(generation: labs.Generation, began: float) -> labs.Generation:
    """Let the time that a model took to load count, where it was long enough to matter."""
    waited = time.perf_counter() - began
    if generation.timeout_s is None or waited < WORTH_COUNTING_S:
        return generation
    return labs.evolve(generation, timeout_s=max(0.001, generation.timeout_s - waited))
