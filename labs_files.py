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

KEPT = 40  # characters, of four bytes each at most: names have 255 bytes on most disks


def write_whole(file: Path | str, parts: Iterable[Any]) -> None:
    """Write bytes-like objects to a file, completely or not at all.

    They are written to a file beside it, which has the first characters of its name, a dot and 32
    digits, and takes its place in the end. Raises OSError, which names `file` as it was given.
    """
    folder, name = os.path.split(file)
    new = os.path.join(folder, f"{name[:KEPT]}.{uuid.uuid4().hex}")
    try:
        with open(new, "xb") as opened:
            opened.writelines(parts)
            opened.flush()
            os.fsync(opened.fileno())
        os.replace(new, file)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(new)
        # Parts that are read from elsewhere raise errors of their own.
        if isinstance(error, OSError) and error.errno and error.filename in (None, new):
            raise OSError(error.errno, error.strerror, str(file)) from error
        raise


def flush_folder(folder: Path) -> None:
    """Flush the names in a folder to disk, if the system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
