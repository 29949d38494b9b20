# SPDX-License-Identifier: Apache-2.0
"""Several models in one process: each is loaded when it is asked for, and let go for another.

    models = labs_models.Models(config)          # begins to load the configured one
    engine = models("small")                     # raises Loading until it is there
    ...                                          # engine.submit(...)
    models.release("small")                      # it may be let go once nothing is under way

One thread loads and lets go; who waits for a model holds up nobody else. Needs labs_engine.py.
"""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

import labs
import labs_engine

log = logging.getLogger("labs.models")
POLL_S = 0.05  # how often the one who needs room looks whether a model has become idle
PATIENCE_S = 5.0  # so long it waits for that; then the one used longest ago takes no more requests
RETRY_S = 30.0  # a load that failed is not tried again for so long
MEMORY_SHARE = 0.9  # of what is free; the rest is for the rows


class Loading(labs_engine.Busy):
    """The model will be there: `wait(timeout_s)` returns when something has changed."""

    def __init__(self, message: str, wait: Callable[[float], Any]) -> None:
        super().__init__(message)
        self.wait = wait


class Slot(Struct, eq=False):
    """A model that may be loaded. holders: who was given the engine and has not released it.

    asked: when it was last given; used: the same, or when it was last busy; failed: when a load
    failed; awaited: so long it stays for those who waited for it (all monotonic).
    leaving: takes no more requests. reader: the model without its weights, once it was loaded.
    """

    config: labs.Config
    engine: labs_engine.Engine | None = None
    holders: int = 0
    asked: float = 0.0
    used: float = 0.0
    awaited: float = 0.0
    leaving: bool = False
    failure: labs.LabsError | None = None
    failed: float = 0.0
    weight_bytes: int = 0
    reader: labs.Model | None = None
    context_length: int | None = None

    @property
    def idle(self) -> bool:
        if self.engine is None or self.holders or time.monotonic() < self.awaited:
            return False
        return not self.engine.busy


class Models:
    """The engines of the configured models. All methods may be called from any thread."""

    def __init__(self, config: labs.Config, *, start: bool = True) -> None:
        self._server, self._default = config.server, config.model_id
        configs = config.by_name()
        self._slots = {name: Slot(each) for name, each in configs.items()}
        self._wanted = deque([config.model_id])  # the first is being loaded
        self._change = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._serve, name="labs-load", daemon=True)
        if start:
            self.start()

    def start(self) -> None:
        """Begin to load; done already unless `start` was False."""
        self._thread.start()

    # ------------------------------------------------------------ for those who ask

    def __call__(self, name: str) -> labs_engine.Engine:
        """Return the engine of a configured model; it is the caller's until released.

        Raises Loading for a model that is not there yet, ModelError for one that cannot be loaded.
        """
        with self._change:
            slot = self._slots[name]
            if self._closed:
                raise labs_engine.Busy("the server is shutting down")
            if slot.engine is not None and not slot.leaving:
                slot.holders, slot.asked = slot.holders + 1, time.monotonic()
                slot.used, slot.awaited = slot.asked, 0.0
                return slot.engine
            if slot.failure is not None and time.monotonic() < slot.failed + RETRY_S:
                # The reason may name what is nobody's business.
                raise labs.ModelError(f"{name} could not be loaded; the log tells why")
            if name not in self._wanted:
                self._wanted.append(name)
                self._change.notify_all()
            if slot.engine is None:
                slot.awaited = math.inf
            raise Loading(f"{name} is being loaded", self._wait)

    def release(self, name: str) -> None:
        with self._change:
            self._slots[name].holders -= 1
            self._change.notify_all()

    def loaded(self) -> dict[str, labs_engine.Engine]:
        with self._change:
            return {n: slot.engine for n, slot in self._slots.items() if slot.engine is not None}

    def context_length(self, name: str) -> int | None:
        """Return what is known of it without loading the model."""
        slot = self._slots[name]
        return slot.context_length if slot.reader is None else slot.reader.context_length

    def reader(self, name: str) -> labs.Model:
        """Return a model to build inputs with, which has no weights and stays when it is let go.

        Raises as a call does, while the model was never loaded.
        """
        if (reader := self._slots[name].reader) is None:
            self(name)
            self.release(name)
            return self.reader(name)
        return reader

    def account(self, nbytes: Callable[[], int]) -> None:
        """Count what else lies in the models' memory; asked anew each time."""

    @property
    def failed(self) -> bool:
        """Whether the configured model could not be loaded when it was last tried."""
        return self._slots[self._default].failure is not None

    def check(self) -> None:
        """Raise Loading until the configured model was tried, and what made it fail."""
        with self._change:
            slot = self._slots[self._default]
            if slot.failure is not None:
                raise slot.failure.with_traceback(None)
            if not slot.used:
                raise Loading(f"{self._default} is being loaded", self._wait)

    def wait(self) -> labs_engine.Engine:
        """Return the engine of the configured model once it is loaded; raise what made it fail."""
        while True:
            try:
                engine = self(self._default)
            except labs.LabsError as error:
                if self.failed:
                    self.check()
                if not isinstance(error, Loading):
                    raise
                error.wait(POLL_S)
            else:
                self.release(self._default)
                return engine

    def close(self, deadline_s: float = 0.0) -> None:
        """Take no more requests and let those under way end until the deadline."""
        end = time.monotonic() + deadline_s
        with self._change:
            self._closed = True
            self._change.notify_all()
        for engine in self.loaded().values():
            engine.close(max(0.0, end - time.monotonic()))

    def _wait(self, timeout_s: float) -> None:
        with self._change:
            self._change.wait(timeout_s)

    # ------------------------------------------------------------ the loading thread

    def _serve(self) -> None:
        while not self._closed:
            with self._change:
                if not self._wanted and not self._closed:
                    self._change.wait(1.0 if self._server.keep_alive_s else None)
                wanted = self._wanted[0] if self._wanted else None
                late = self._expired()
            for name in late:
                self._let_go(name)
            if wanted is not None:
                self._load(wanted)
                self._look_at_others()

    def _expired(self) -> list[str]:
        """Return the models that nobody has used for keep_alive_s. The lock is held."""
        now, limit = time.monotonic(), self._server.keep_alive_s
        for slot in self._slots.values():
            slot.used = now if slot.engine is not None and not slot.idle else slot.used
        idle = [(name, slot) for name, slot in self._slots.items() if slot.idle]
        return [name for name, slot in idle if limit is not None and now > slot.used + limit]

    def _load(self, name: str) -> None:
        slot, engine, failure = self._slots[name], None, None
        try:
            if slot.engine is None:
                self._make_room(name)
                if self._closed:
                    return
                engine = self._start(slot)
        except labs.LabsError as error:
            log.error("labs-api: cannot load %s", error)
            failure = error
        except Exception as error:
            log.exception("labs-api: cannot load %s", name)
            failure = labs.ModelError(str(error))
        if failure is not None:  # the frames it went through hold what was loaded so far
            failure.__traceback__ = failure.__cause__ = failure.__context__ = None
            labs.release_memory()
        with self._change:
            now = time.monotonic()
            slot.failure, slot.failed = failure, now
            slot.engine, slot.used, slot.leaving = engine or slot.engine, now, False
            slot.awaited = min(slot.awaited, slot.used + PATIENCE_S)
            self._wanted.remove(name)
            self._change.notify_all()
        if engine is not None and self._closed:
            engine.close()

    def _start(self, slot: Slot) -> labs_engine.Engine:
        model = labs.load_model(slot.config, cached=False)
        engine = labs_engine.Engine(model, self._server, slot.config.response_cache)
        slot.reader = replace(model, decoder=None)
        return engine

    def _make_room(self, name: str) -> None:
        """Let idle models go until there is room for one more."""
        patient_until = time.monotonic() + PATIENCE_S
        while not self._closed and not self._has_room(self._slots[name]):
            with self._change:
                there = [n for n, slot in self._slots.items() if slot.engine is not None]
                oldest = sorted(there, key=lambda n: (self._slots[n].used, self._slots[n].asked))
                idle = [n for n in oldest if self._slots[n].idle]
                if oldest and not idle and time.monotonic() > patient_until:
                    self._slots[oldest[0]].leaving = True
                if oldest and not idle:
                    self._change.wait(POLL_S)
            if not oldest:
                return  # nothing more can be done
            if idle:
                self._let_go(idle[0])

    def _has_room(self, slot: Slot) -> bool:
        engines, limit = self.loaded().values(), self._server.model_memory_bytes
        if not engines and limit is None:
            return True
        spec = slot.config.model
        slot.weight_bytes = slot.weight_bytes or labs.weight_bytes(spec)
        if limit is not None and slot.weight_bytes > limit:  # nobody goes for what never fits
            needed = f"{spec.model_name} needs about {slot.weight_bytes / 1e9:.2f} GB"
            raise labs.ModelError(f"{needed}; server.model_memory_bytes is {limit / 1e9:.2f} GB")
        if len(engines) >= self._server.max_loaded_models:
            return False
        if limit is None:
            return slot.weight_bytes <= MEMORY_SHARE * labs.system_memory(spec)
        taken: int = sum(engine.model.decoder.weight_bytes for engine in engines)
        return taken + slot.weight_bytes <= limit

    def _let_go(self, name: str) -> None:
        """Free a model's memory, unless somebody was faster and asked for it."""
        slot = self._slots[name]
        with self._change:
            if not slot.idle:
                return
            engine, slot.engine, slot.leaving = slot.engine, None, False
        if engine is not None:
            engine.close()
            del engine
            labs.release_memory()
            log.info("labs-api: %s was let go", name)

    def _look_at_others(self) -> None:
        """Learn how long the context of models is that were not loaded yet."""
        for slot in self._slots.values():
            if slot.reader is None and slot.context_length is None:
                with contextlib.suppress(Exception):  # a load will tell
                    slot.context_length = labs.context_length(slot.config.model)


class One:
    """One given engine, with the interface of Models. It stays: nothing is loaded or let go."""

    def __init__(self, engine: labs_engine.Engine, name: str | None = None) -> None:
        self._engine = engine
        self._name = engine.model.spec.model_name if name is None else name

    def __call__(self, name: str) -> labs_engine.Engine:
        return self._engine

    def release(self, name: str) -> None:
        """Do nothing: it stays."""

    def reader(self, name: str) -> labs.Model:
        return self._engine.model

    def check(self) -> None:
        """Do nothing: it is there."""

    def loaded(self) -> dict[str, labs_engine.Engine]:
        return {self._name: self._engine}

    def context_length(self, name: str) -> int | None:
        return self._engine.model.context_length if name == self._name else None

    def account(self, nbytes: Callable[[], int]) -> None:
        """Do nothing: no other model needs room."""
