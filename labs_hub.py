# SPDX-License-Identifier: Apache-2.0
"""What libraries say while they load: errors in one sentence, progress bars, their own warnings.

    labs_hub.reason(error)  # "is gated: accept its terms on the hub and set HF_TOKEN"
    with labs_hub.quiet(): ...  # no progress bars, unless labs_hub.show has asked for them

labs.py calls both if this file is present; it needs no other file of labs.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any

# Words in the names or texts of other libraries' exceptions, and what the error means here.
_NO_FOLDER = "is neither a folder here nor a"
_TOO_LARGE = "does not fit in memory; use a smaller model or load_in_4bit"
_MEMORY_WORDS = ("OutOfMemory", "MemoryError", "can't allocate memory", "not enough memory")
REASONS = {
    "trust_remote_code": "runs code from its folder: read it, then set trust_remote_code = true",
    "no file named model.safetensors": "has no safetensors; use_safetensors = false reads pickles",
    "GatedRepo": "is gated: accept its terms on the hub and set HF_TOKEN",
    "RepositoryNotFound": f"{_NO_FOLDER} model on the hub (if it is private, set HF_TOKEN)",
    "401 Unauthorized": "is private or does not exist: check the name and HF_TOKEN",
    "RevisionNotFound": "has no such revision on the hub",
    "EntryNotFound": "the repository does not contain this file",
    "Invalid credentials": "the hub does not know the token in HF_TOKEN: make a new one there",
    "DisabledRepo": "the hub has disabled this repository",
    "HFValidation": f"{_NO_FOLDER} valid hub id",
    "No space left": "the disk is full",
    **dict.fromkeys(_MEMORY_WORDS, _TOO_LARGE),
}


def reason(error: BaseException) -> str:
    """Return a sentence for the error or its cause: one of REASONS, or its own first line."""
    chain: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in chain:
        chain.append(current)
        current = current.__cause__ or current.__context__
    for marker, sentence in REASONS.items():
        if any(marker in type(link).__name__ or marker in str(link) for link in chain):
            return sentence
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    first, *more = (str(error).strip() or type(error).__name__).splitlines()
    return f"{first} {more[0]}" if first.endswith(":") and more else first.strip()


@contextlib.contextmanager
def _without_advice() -> Iterator[None]:
    """Hide what libraries tell those who write them: deprecations, and packages to install."""
    log = logging.getLogger("bitsandbytes")
    level = log.level
    try:
        with warnings.catch_warnings():
            for library in ("peft", "transformers"):
                warnings.filterwarnings("ignore", module=library)
            log.setLevel(logging.ERROR)
            yield
    finally:
        log.setLevel(level)


Bars = Callable[[], contextlib.AbstractContextManager[None]]
_asked: list[Bars] = []  # how a command shows the progress of libraries


def show(bars: Bars) -> None:
    """Let the progress of libraries be shown while they load; by default it is hidden."""
    _asked[:] = [bars]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hide advice, and progress bars unless `show` has asked for them."""
    with _without_advice(), (_asked[0] if _asked else _without_bars)():
        yield


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    bars: Any = importlib.import_module("transformers.utils.logging")  # also those of the hub
    hides = bars.is_progress_bar_enabled()
    try:
        if hides:
            bars.disable_progress_bar()
        yield
    finally:
        if hides:
            bars.enable_progress_bar()
