# SPDX-License-Identifier: Apache-2.0
"""Progress bars of the commands: one style, on a terminal only, on standard error.

    labs_progress.show()  # a command asks for bars; without this call there are none
    for part in labs_progress.over(parts, "Reading", "files"): ...

The bars of transformers and the hub take this style too. A bar appears after half a second and is
gone when its work ends. Needs labs_bar.py with tqdm, labs_hub.py.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any, TypeVar

import labs_hub

T = TypeVar("T")
_asked: list[bool] = []


def show() -> None:
    """Ask for bars in this process. Where standard error is no terminal, there are none still."""
    if importlib.util.find_spec(f"{__name__.removesuffix('progress')}bar") is None:
        return  # a copy of labs without this file shows no bars
    _asked[:] = [True]
    labs_hub.show(of_libraries)


def is_shown() -> bool:
    """Return whether a command has asked for bars, and there is a terminal for them."""
    return bool(_asked and sys.stderr and sys.stderr.isatty())


@contextlib.contextmanager
def of_libraries() -> Iterator[None]:
    """Give transformers and the hub our bars, unless the user has switched all bars off."""
    load: Any = importlib.import_module
    logs, bar = load("transformers.utils.logging"), bar_class()
    hub = {"huggingface_hub.utils.tqdm": "tqdm", "huggingface_hub._snapshot_download": "hf_tqdm"}
    before = []
    for place, name in hub.items():  # not documented, so a later version may not have them
        with contextlib.suppress(ImportError, AttributeError):
            before.append((load(place), name, getattr(load(place), name)))
    if not logs.is_progress_bar_enabled():
        yield
        return
    hook = logs.set_tqdm_hook(lambda _, args, options: bar(*args, **options))
    try:
        for place, name, _ in before:
            setattr(place, name, bar)
        yield
    finally:
        logs.set_tqdm_hook(hook)
        for each in before:
            setattr(*each)
        bar.close_all()


def bar_class() -> Any:
    """Return the class of bars with tqdm's interface, as libraries take it; hidden if unasked."""
    import labs_bar

    return labs_bar.Bar if _asked else labs_bar.Hidden


def over(items: Iterable[T], title: str, unit: str, total: int | None = None) -> Iterator[T]:
    """Yield the items while a bar counts them. total: their number, unless they have a length."""
    total = len(items) if total is None and isinstance(items, Sized) else total
    with counting(title, unit, total) as advance:
        for item in items:
            yield item
            advance(1)


@contextlib.contextmanager
def counting(title: str, unit: str, total: int | None) -> Iterator[Callable[..., None]]:
    """Yield a function that moves a bar by a number, and may set a note beside it: a speed."""
    if not is_shown():
        yield lambda count, note="": None
        return
    bar = bar_class()(total=total, desc=title, unit=unit, reports=False)  # the command has its own

    def advance(count: int, note: str = "") -> None:
        bar.postfix = note
        bar.update(count)

    with contextlib.closing(bar):
        yield advance
