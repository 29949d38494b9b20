# SPDX-License-Identifier: Apache-2.0
"""Write a file so that no reader ever sees a part of it.

    labs_files.write_whole("answers.json", [b"[", b"]"])

No other file of labs is needed.
"""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def write_whole(file: Path | str, parts: Iterable[Any]) -> None:
    """Write bytes-like objects to a file, completely or not at all.

    They are written to a file beside it, which is named like it with a dot and 32 digits more and
    takes its place in the end. Raises OSError, which names `file`.
    """
    path = Path(file)
    new = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    try:
        with new.open("xb") as opened:
            for part in parts:
                opened.write(part)
            opened.flush()
            os.fsync(opened.fileno())
        os.replace(new, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            new.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def flush_folder(folder: Path) -> None:
    """Flush the names in a folder to disk, if the system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
