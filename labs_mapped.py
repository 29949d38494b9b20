# SPDX-License-Identifier: Apache-2.0
"""Which processes have mapped files of a folder, as those that read a model have.

    labs_mapped.users(labs_mapped.files(), folder)                     # (4711,)

Needs no other file of labs.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def files() -> dict[int, str]:
    """Return the mapped files of each process that this user may look at; on Linux only."""
    found = {}
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):
            found[int(maps.parent.name)] = maps.read_text("utf-8", "replace")
    return found


def users(files: dict[int, str], folder: Path) -> tuple[int, ...]:
    """Return the processes that have mapped files in a folder."""
    inside = f" {folder.resolve()}{os.sep}"
    return tuple(pid for pid, maps in files.items() if inside in maps)
