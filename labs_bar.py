# SPDX-License-Identifier: Apache-2.0
"""The progress bar of labs: tqdm's, in one style for labs' own work and for that of libraries.

    with labs_bar.Bar(total=10, desc="Reading", unit="files") as bar: bar.update(1)

labs_progress.py says where it is used. This file needs tqdm and no other file of labs.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import threading
from typing import Any

from tqdm import tqdm

DELAY_S = 0.5  # what takes less is not worth a line
WIDE_COLUMNS = 60
RIGHT = 3  # columns that stay free: a terminal writes ^C there, and may begin a line after the last
ERASE = "\x1b[K"  # the rest of the line
WIDE = "{desc} {percentage:3.0f}% {bar} {n_fmt}/{total_fmt} {unit} {remaining}{postfix}"
NARROW = "{percentage:3.0f}% {desc}"
ENDLESS = "{desc} {n_fmt} {unit} {elapsed}{postfix}"  # of a work whose size is not known
TITLES = {  # what libraries call their work, and our words for it and for what is counted
    "Loading weights": ("Loading the weights", "tensors"),
    "Converting and de-quantizing": ("Converting the GGUF file", "tensors"),
    "Writing model shards": ("Writing the conversion", "files"),
    "Reconstructing": ("Downloading", "B"),
}
HIDDEN = ("Fetching", "Downloading bytes")  # they repeat what the bar of all bytes shows


class Bar(tqdm):  # type: ignore[misc]
    """A bar on a terminal, from half a second on. Libraries make it with their own options.

    reports: whether one line stays of a work that took its time and is done.
    """

    monitor_interval = 0  # no thread
    hides = False

    def __init__(self, *args: Any, reports: bool = True, **given: Any) -> None:
        title, self.reports = str(given.get("desc") or ""), reports
        self.words = words_of(title, str(given.get("unit", "it")))
        options = {name: given[name] for name in given if name in ("total", "initial")}
        options |= {"desc": self.words[0], "unit": self.words[1], "delay": DELAY_S, "leave": False}
        options["unit_scale"] = self.words[1] == "B"
        options["ascii"] = "utf" not in (getattr(sys.stderr, "encoding", None) or "utf-8").lower()
        hidden = self.hides or title.startswith(HIDDEN) or not (sys.stderr and sys.stderr.isatty())
        options["disable"] = bool(given.get("disable") or hidden)
        super().__init__(*args, file=io.StringIO() if is_plain() else sys.stderr, **options)

    @staticmethod
    def format_meter(n: float, total: float | None, *args: Any, **facts: Any) -> str:
        """Return the bar as text, as wide as the terminal is now."""
        facts["ncols"], facts["prefix"] = columns(), facts["prefix"].removesuffix(": ")
        fitting = WIDE if facts["ncols"] >= WIDE_COLUMNS else NARROW
        chosen = fitting if total else ENDLESS
        facts["bar_format"] = chosen.replace(" {unit}", "B") if facts["unit_scale"] else chosen
        return str(tqdm.format_meter(n, total, *args, **facts))

    def set_description(self, *_: Any, **__: Any) -> None:
        """Keep our words for the work."""

    set_description_str = set_postfix_str = set_description

    def refresh(self, *args: Any, **options: Any) -> None:
        """Draw the bar, if its time has come: libraries call this at once."""
        if self.format_dict["elapsed"] >= DELAY_S:
            super().refresh(*args, **options)

    def close(self) -> None:
        took, whole = self.format_dict["elapsed"], not self.total or self.n >= self.total
        was_seen = took >= DELAY_S and not self.disable
        super().close()
        if was_seen and not is_plain():
            print(ERASE, end="", flush=True, file=sys.stderr)
        if was_seen and whole and self.reports:
            title, unit = self.words
            size = f" of {tqdm.format_sizeof(self.n, 'B')}" if unit == "B" else ""
            print(f"{title}{size} took {took:.1f} s", file=sys.stderr)

    @classmethod
    def close_all(cls) -> None:
        """Remove the bars of works that were given up but go on in another thread."""
        for bar in [*getattr(cls, "_instances", ())]:
            bar.reports = False
            bar.close()


class Hidden(Bar):
    """The same for a library that wants a class of bars where nobody has asked for any."""

    hides = True


Bar.set_lock(threading.RLock())  # tqdm's own is one of processes, which starts a process


def is_plain() -> bool:
    """Return whether only whole lines are shown: by a simple terminal, or where no person looks."""
    return os.environ.get("TERM") == "dumb" or os.environ.get("CI", "") not in ("", "0", "false")


def columns() -> int:
    """Return the columns that a bar may take now."""
    with contextlib.suppress(OSError, ValueError):
        return max(1, os.get_terminal_size(2).columns - RIGHT)
    return 80 - RIGHT


def words_of(title: str, unit: str) -> tuple[str, str]:
    """Return words for the work of a library. Names of files lose their control characters."""
    for start in filter(title.startswith, TITLES):
        return TITLES[start]
    name = "".join(each if each.isprintable() else "?" for each in title)
    return f"Downloading {name}" if unit == "B" else name, unit
