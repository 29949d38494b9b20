# SPDX-License-Identifier: Apache-2.0
"""Serve several models in one process: a model is loaded on first use and unloaded for another.

    models = labs_models.Models(config)          # starts to load the default model
    engine = models("small")                     # raises Loading until the model is loaded
    models.release("small")                      # lets it be unloaded once it is idle

One thread loads and unloads models; meanwhile loaded ones keep answering. `One` wraps an engine.
"""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, cast

from msgspec import Struct
from msgspec.structs import replace

import labs
import labs_engine
import labs_names
from labs_engine import AnyEngine
from labs_patterns import route as route
from labs_sizes import context_length, system_memory, weight_bytes

log = logging.getLogger("labs.models")
POLL_S = 0.05  # seconds between checks for an idle model while another one needs its room
EVICT_BUSY_AFTER_S = 5.0  # after this wait the least recently used model gets no new requests
RETRY_S = 30.0  # seconds before a failed load is tried again
MEMORY_SHARE = 0.9  # of the free memory may be taken by weights; the rest is for KV caches


class Loading(labs_engine.Busy):
    """The model is not loaded yet; `wait(timeout_s)` returns when the state of a model changes."""

    def __init__(self, message: str, wait: Callable[[float], Any]) -> None:
        super().__init__(message)
        self.wait = wait


class NotLoaded(labs.ModelError):
    """The last load failed. Only the log has the reason, because it may contain private paths."""


class Entry(Struct, eq=False):
    """A configured model. holders: how many callers have its engine and did not release it yet.

    Times are those of time.monotonic. last_used: when it was last given out or busy.
    """

    name: str
    config: labs.Config
    engine: AnyEngine | None = None
    holders: int = 0
    last_given: float = 0.0
    last_used: float = 0.0
    reserved_until: float = 0.0  # it stays loaded for the requests that waited for it
    draining: bool = False  # no new requests
    failure: labs.LabsError | None = None
    failed: float = 0.0
    weight_bytes: int = 0
    reader: labs.Model | None = None  # without weights
    context_length: int | None = None

    @property
    def idle(self) -> bool:
        held = self.holders or time.monotonic() < self.reserved_until
        return not (self.engine is None or held or self.engine.busy)


class Models:
    """The engines of the configured models. All methods may be called from any thread."""

    def __init__(self, config: labs.Config, *, start: bool = True) -> None:
        config = labs_names.named(config)
        self._server, self._default = config.server, config.model_id
        self._entries = {name: Entry(name, each) for name, each in config.by_name().items()}
        self._wanted = deque([self._entries[config.model_id]])  # the first one is loading
        self._others: list[Callable[[], int]] = []  # bytes of models outside _entries
        self._change, self._closed = threading.Condition(), False
        self._thread = threading.Thread(target=self._serve, name="labs-load", daemon=True)
        if start:
            self.start()

    def start(self) -> None:
        """Start the loading thread; needed only after Models(..., start=False)."""
        self._thread.start()

    def _entry(self, name: str) -> Entry:
        """Return the entry of a model by any of its names. Raises KeyError for an unknown one."""
        known = {each: entry.config for each, entry in self._entries.items()}
        return self._entries[name if name in known else labs_names.find(name, known) or name]

    def __call__(self, name: str) -> AnyEngine:
        """Return the engine of a configured model; the caller must release it.

        Raises Loading before it is loaded, NotLoaded if that failed, Busy when closing.
        """
        with self._change:
            entry = self._entry(name)
            if self._closed:
                raise labs_engine.Busy("the server is shutting down")
            if entry.engine is not None and not entry.draining:
                entry.holders, entry.last_given = entry.holders + 1, time.monotonic()
                entry.last_used, entry.reserved_until = entry.last_given, 0.0
                return entry.engine
            if entry.failure is not None and time.monotonic() < entry.failed + RETRY_S:
                raise NotLoaded(f"{name} could not be loaded; the server's log has the reason")
            if entry not in self._wanted:
                self._wanted.append(entry)
                self._change.notify_all()
            if entry.engine is None:
                entry.reserved_until = math.inf
            raise Loading(f"{name} is being loaded", self._wait)

    def under(self, old: str, new: str) -> Models:
        """Return itself: it has new names from the start. Only `One` has to change its name."""
        return self

    def release(self, name: str) -> None:
        with self._change:
            self._entry(name).holders -= 1
            self._change.notify_all()

    def loaded(self) -> dict[str, AnyEngine]:
        with self._change:
            return {e.name: e.engine for e in self._entries.values() if e.engine is not None}

    def context_length(self, name: str) -> int | None:
        """Return the context length in tokens without loading the model; None if unknown."""
        entry = self._entry(name)
        return entry.context_length if entry.reader is None else entry.reader.context_length

    def account(self, nbytes: Callable[[], int]) -> None:
        """Count the current bytes of another model, e.g. a filter, towards model_memory_bytes."""
        self._others.append(nbytes)

    def reader(self, name: str) -> labs.Model:
        """Return the model without weights, to build inputs. Raises as a call before the load."""
        if (reader := self._entry(name).reader) is None:
            self(name)
            self.release(name)
            return self.reader(name)
        return reader

    @property
    def failed(self) -> bool:
        """Whether the last load of the default model failed."""
        return self._entries[self._default].failure is not None

    def check(self) -> None:
        """Raise Loading until the default model's first load ends, or the error if it failed."""
        with self._change:
            entry = self._entries[self._default]
            if entry.failure is not None:
                raise entry.failure.with_traceback(None)
            if not entry.last_used:
                raise Loading(f"{self._default} is being loaded", self._wait)

    def wait(self) -> AnyEngine:
        """Wait for the default model and return its engine. Raises the error of a failed load."""
        while True:
            try:
                engine = self(self._default)
                self.release(self._default)
                return engine
            except labs.LabsError as error:
                if self.failed:
                    self.check()
                if not isinstance(error, Loading):
                    raise
                error.wait(POLL_S)

    def close(self, deadline_s: float = 0.0) -> None:
        """Refuse new requests and give current ones until the deadline to end."""
        end = time.monotonic() + deadline_s
        with self._change:
            self._closed = True
            self._change.notify_all()
        for engine in self.loaded().values():
            engine.close(max(0.0, end - time.monotonic()))

    def _wait(self, timeout_s: float) -> None:
        with self._change:
            self._change.wait(timeout_s)

    def _serve(self) -> None:
        while not self._closed:
            try:
                with self._change:
                    if not self._wanted and not self._closed:
                        self._change.wait(1.0 if self._server.keep_alive_s else None)
                    wanted = self._wanted[0] if self._wanted else None
                    late = self._expired()
                for entry in late:
                    self._unload(entry)
                if wanted is not None:
                    self._load(wanted)
                    self._learn_context_lengths()
            except BaseException:  # waiting requests fail; a later load may succeed
                log.exception("labs-api: loading or unloading a model failed")
                for entry in [*self._wanted]:
                    self._settle(entry, None, labs.ModelError(f"{entry.name}: see the log"))

    def _expired(self) -> list[Entry]:
        """Return the models unused for keep_alive_s seconds. The caller holds the lock."""
        now, limit, entries = time.monotonic(), self._server.keep_alive_s, self._entries.values()
        for entry in entries:
            if entry.engine is not None and not entry.idle:
                entry.last_used = now
        return [e for e in entries if limit is not None and e.idle and now > e.last_used + limit]

    def _load(self, entry: Entry) -> None:
        engine, failure = None, None
        try:
            if entry.engine is None:
                self._make_room(entry)
                if self._closed:
                    return
                engine = self._start(entry)
        except labs.LabsError as error:
            log.error("labs-api: cannot load %s", error)
            failure = error
        except BaseException as error:  # a model's own code may even raise SystemExit
            log.exception("labs-api: cannot load %s", entry.name)
            failure = labs.ModelError(str(error))
        if failure is not None:  # the frames of its traceback hold the weights loaded so far
            failure.__traceback__ = failure.__cause__ = failure.__context__ = None
            labs.release_memory()
        self._settle(entry, engine, failure)
        if engine is not None and self._closed:
            engine.close()

    def _settle(self, entry: Entry, engine: AnyEngine | None, failure: Any) -> None:
        with self._change:
            entry.failure, entry.failed = failure, (now := time.monotonic())
            entry.engine, entry.last_used, entry.draining = engine or entry.engine, now, False
            entry.reserved_until = min(entry.reserved_until, now + EVICT_BUSY_AFTER_S)
            self._wanted.remove(entry)
            self._change.notify_all()

    def _start(self, entry: Entry) -> AnyEngine:
        if entry.config.model.kind != "text":
            labs.require("labs_kinds")
            import labs_kinds

            desk: Any = labs_kinds.start(entry.config)
            entry.context_length, entry.weight_bytes = desk.model.context_length, desk.weight_bytes
            return cast("AnyEngine", desk)
        if (cache := entry.config.response_cache).max_entries:
            labs.require("cachetools")  # fails before a thread is started
        model = labs.load_model(entry.config, cached=False)
        engine = labs_engine.Engine(model, self._server)
        entry.reader, entry.weight_bytes = replace(model, decoder=None), model.decoder.weight_bytes
        entry.weight_bytes += getattr(getattr(model.decoder, "draft", None), "weight_bytes", 0)
        return labs_engine.Cached(engine, cache) if cache.max_entries else engine

    def _make_room(self, wanted: Entry) -> None:
        """Unload idle models, least recently used first, until there is room for another."""
        patient_until = time.monotonic() + EVICT_BUSY_AFTER_S
        while not self._closed and not self._has_room(wanted):
            with self._change:
                loaded = [entry for entry in self._entries.values() if entry.engine is not None]
                oldest = sorted(loaded, key=lambda entry: (entry.last_used, entry.last_given))
                idle = [entry for entry in oldest if entry.idle]
                if not oldest:
                    return  # no model is left to unload
                if not idle:
                    oldest[0].draining |= time.monotonic() > patient_until
                    self._change.wait(POLL_S)
            if idle:
                self._unload(idle[0])

    def _has_room(self, entry: Entry) -> bool:
        engines, limit = self.loaded().values(), self._server.model_memory_bytes
        if not engines and limit is None:
            return True
        spec, others = entry.config.model, sum(nbytes() for nbytes in self._others)
        entry.weight_bytes = entry.weight_bytes or weight_bytes(spec)
        if limit is not None and entry.weight_bytes + others > limit:  # unloading cannot help
            text = f"{spec.model_name} needs about {entry.weight_bytes / 1e9:.2f} GB"
            text += f" beside {others / 1e9:.2f} GB of other models" if others else ""
            bound = f"server.model_memory_bytes is {limit / 1e9:.2f} GB"
            raise labs.ModelError(f"{text}; {bound}: raise it or use a smaller model")
        if len(engines) >= self._server.max_loaded_models:
            return False
        if limit is None:
            return entry.weight_bytes <= MEMORY_SHARE * system_memory(spec)
        loaded = [each.weight_bytes for each in self._entries.values() if each.engine is not None]
        return sum(loaded) + others + entry.weight_bytes <= limit

    def _unload(self, entry: Entry) -> None:
        """Close an idle model and free its memory; do nothing if it is in use again."""
        with self._change:
            if not entry.idle or (engine := entry.engine) is None:
                return
            entry.engine, entry.draining = None, False
        engine.close()
        del engine
        labs.release_memory()
        log.info("labs-api: unloaded %s", entry.name)

    def _learn_context_lengths(self) -> None:
        """Read the context lengths of models that were not loaded yet."""
        for entry in self._entries.values():
            unknown = entry.reader is None and entry.context_length is None
            if unknown and entry.config.model.kind == "text":
                with contextlib.suppress(Exception):  # a load reports the error
                    entry.context_length = context_length(entry.config.model)


class One:
    """Wrap one given engine in the interface of Models: always loaded, never unloaded."""

    def __init__(self, engine: AnyEngine, name: str | None = None) -> None:
        self._engine = engine
        self._name = name or labs_names.short(engine.model.spec.model_name)

    def under(self, old: str, new: str) -> One:
        """Return the engine under a new name if it has the old one."""
        return One(self._engine, new) if self._name == old != new else self

    def __call__(self, name: str) -> AnyEngine:
        return self._engine

    def release(self, name: str) -> None: ...

    def account(self, nbytes: Callable[[], int]) -> None: ...

    def check(self) -> None: ...

    def close(self, deadline_s: float = 0.0) -> None:
        self._engine.close(deadline_s)

    def reader(self, name: str) -> labs.Model:
        return self._engine.model

    def loaded(self) -> dict[str, AnyEngine]:
        return {self._name: self._engine}

    def context_length(self, name: str) -> int | None:
        return self._engine.model.context_length if name == self._name else None
