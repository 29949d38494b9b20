# SPDX-License-Identifier: Apache-2.0
"""A folder of files that processes share: written by a thread, the longest unused ones deleted.

    folder = labs_prefix_folder.Folder(labs_prefix_folder.place("~/.cache/labs"), 20 * 10**9)
    folder.write(name, time.time_ns(), size, lambda: data)      # later, by the thread
    [data] = map(folder.read, folder.find([name]))
    folder.flush(10.0)                                          # before the process ends

A file's name ends in a checksum of its contents. A file that is torn, or whose owner is another
user, is never read. Needs no other file of labs; for labs_prefix_files.py and labs_stock.py.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import logging
import os
import re
import stat
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path

NAME = 40  # characters of a file's name that tell what it holds
SUFFIX, TORN = ".safetensors", ".part"  # of whole files and of files that are being written
OURS = re.compile(rf"[0-9a-f]{{{NAME}}}-[0-9a-f]{{32}}\{SUFFIX}|[0-9a-f]{{32}}\{TORN}")
OLDEST_S = 30 * 86_400.0  # files that nobody used for this long are deleted
TORN_S = 3_600.0  # a file that is still being written after this long has lost its process
SPARE = 0.9  # the share of the bytes that is filled after files are deleted
LISTED_S = 60.0  # the files of other processes are counted as often
MICROSECOND = 1000  # ns
REST_S = 60.0  # without writing, after the disk refused
Make = Callable[[], bytes]
log = logging.getLogger("labs.prefixes")


def place(cache: str | os.PathLike[str]) -> Path:
    """Return the folder of prefixes in labs' cache folder."""
    return Path(cache) / "prefixes"


class Folder:
    """Files that are written once and never changed.

    pending_bytes: what is still to be written. A file's modification time is that of its last use,
    a microsecond earlier for each later one of a series, so that a series loses its end first.
    """

    def __init__(self, place: Path, max_bytes: int) -> None:
        self.place, self.max_bytes, self.pending_bytes = place, max_bytes, 0
        self._known: dict[str, str] = {}  # the files' names by their first characters
        self._todo: dict[str, tuple[int, int, Make]] = {}
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._bytes, self._listed_at, self._rests_until = 0, -LISTED_S, 0.0

    def find(self, names: Iterable[str]) -> list[Path]:
        """Return the files of these names, up to the first that is not there, as used now."""
        found: list[str] = []
        with contextlib.suppress(OSError):
            self._check_owner()
            found = os.listdir(self.place)
        self._known = {each[:NAME]: each for each in found if each.endswith(SUFFIX)}
        there = itertools.takewhile(self._known.__contains__, names)
        paths, now = [self.place / self._known[name] for name in there], time.time_ns()
        for number, path in enumerate(paths):
            _touch(path, now - MICROSECOND * number)
        return paths

    def has(self, name: str) -> bool:
        return name in self._known or name in self._todo

    def read(self, path: Path) -> bytes | None:
        """Return the contents of a file, or None if it is gone or not what was written."""
        name, data = path.name[:NAME], None
        try:
            data = _contents(path, self.max_bytes)
        except FileNotFoundError:
            self._known.pop(name, None)  # so that it is written again
            return None
        except OSError:  # it may be readable later
            return None
        if data is not None and path.name == _title(name, data):
            return data
        if _delete(path):  # no folder, which nothing could be written over
            self._known.pop(name, None)
        return None

    def write(self, name: str, used: int, size: int, make: Make) -> None:
        """Let the thread write a file. used: when it was used, in ns since 1970."""
        with self._changed:
            self.pending_bytes += size
            self._todo[name] = used, size, make
            if self._thread is None:
                self._thread = threading.Thread(target=self._serve, name="labs-prefixes")
                self._thread.daemon = True  # a disk that hangs must not keep the process
                self._thread.start()

    def flush(self, wait_s: float) -> None:
        """Wait at most this long for what is still to be written, then give it up."""
        with self._changed:
            if not self._changed.wait_for(lambda: not self._todo, wait_s):
                log.warning("%d prefixes are not kept: the disk is too slow", len(self._todo))
            self._todo.clear()
            self.pending_bytes = 0

    def _serve(self) -> None:
        """Write what waits, then end: the thread begins again with the next file."""
        while True:
            with self._changed:
                if not self._todo:
                    self._thread = None
                    return
                name, (used, size, make) = next(iter(self._todo.items()))
            try:
                if time.monotonic() >= self._rests_until:
                    self._write(name, used, make())
            except Exception as error:  # whatever the disk does, answers go on
                log.warning("prefixes are not kept on disk for a minute: %s", error)
                self._rests_until = time.monotonic() + REST_S
            with self._changed:
                if self._todo.pop(name, None) is not None:  # it was not given up
                    self.pending_bytes -= size
                self._changed.notify_all()
            del make  # else what it holds stays in memory until the next one

    def _write(self, name: str, used: int, data: bytes) -> None:
        """Write a file completely or not at all, in a folder that only its owner can read."""
        if len(data) > self.max_bytes:
            raise OSError(f"prefix_disk_bytes is {self.max_bytes}, and one file has {len(data)}")
        self.place.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._check_owner()
        new = self.place / f"{uuid.uuid4().hex}{TORN}"
        try:
            with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(data)
            self._make_room(len(data))
            os.replace(new, path := self.place / _title(name, data))
        finally:
            _delete(new)
        _touch(path, used)
        self._known[name] = path.name

    def _check_owner(self) -> None:
        """Raise OSError if others could put files here, which would be read into prompts."""
        if hasattr(os, "geteuid"):
            state = os.stat(self.place)
            if state.st_uid != os.geteuid():
                raise PermissionError(f"{self.place} belongs to another user")
            if state.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                raise PermissionError(f"other users may write into {self.place}: chmod 700 helps")

    def _make_room(self, size: int) -> None:
        """Delete files that are too old and, if all are too large, those unused for longest."""
        self._bytes += size
        if self._bytes <= self.max_bytes and time.monotonic() < self._listed_at + LISTED_S:
            return
        now, files = time.time(), listed(self.place)
        self._bytes, self._listed_at = size, time.monotonic()
        # A time in the future, before the clock was set back, would keep a file for ever.
        used = {path: t if (t := each.st_mtime) < now + TORN_S else 0.0 for path, each in files}
        self._bytes += sum(state.st_size for path, state in files if path.suffix == SUFFIX)
        for path, state in sorted(files, key=lambda each: used[each[0]]):
            if path.suffix == TORN:
                late = now - used[path] > TORN_S
            else:
                late = self._bytes > self.max_bytes * SPARE or now - used[path] > OLDEST_S
                self._bytes -= state.st_size if late else 0
            if late:
                _delete(path)


def listed(folder: Path) -> list[tuple[Path, os.stat_result]]:
    """Return the files of a folder that are whole or being written, and their states."""
    found = list[tuple[Path, os.stat_result]]()
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if OURS.fullmatch(entry.name) and not entry.is_dir(follow_symlinks=False):
                with contextlib.suppress(OSError):  # another process deletes files too
                    found.append((Path(entry.path), entry.stat(follow_symlinks=False)))
    return found


def clear(folder: Path) -> None:
    """Delete these files, and the folder if nothing else is in it. Raises OSError."""
    for path, _ in listed(folder):
        path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # something else is in it, or it is a link
        folder.rmdir()


def _contents(path: Path, most: int) -> bytes | None:
    """Return what a regular file of this user holds, at most so many bytes; None if it is none."""
    state = os.lstat(path)
    mine = not hasattr(os, "geteuid") or state.st_uid == os.geteuid()
    if not mine or not stat.S_ISREG(state.st_mode) or state.st_size > most:
        return None
    with path.open("rb") as file:
        return file.read(state.st_size)


def _title(name: str, data: bytes) -> str:
    return f"{name}-{hashlib.sha256(data).hexdigest()[:32]}{SUFFIX}"


def _touch(path: Path, used: int) -> None:
    with contextlib.suppress(OSError):
        os.utime(path, ns=(used, used))


def _delete(path: Path) -> bool:
    """Delete a file; return whether it is gone."""
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)
        return True
    return False
