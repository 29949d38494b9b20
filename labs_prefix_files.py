# SPDX-License-Identifier: Apache-2.0
"""Prefixes of prompts on disk, so that a conversation goes on quickly after a restart.

    store = labs_prefix_files.opened(model, config.server)      # a labs_decode.PrefixStore
    loop = labs_loop.Loop(prefixes=store)
    store.flush()                                               # before the process ends

A file holds the keys and values of one chunk of a prompt, as safetensors. Its name is a hash of all
that determines their bits (model, types, packages, machine), of the owner and of all tokens up to
its end, then a checksum of the file. A file that is torn, or of anybody else, is never read into a
row. Needs labs_cache.py and labs_prefixes.py with what these need; safetensors.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
import os
import queue
import threading
import time
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import safetensors.torch

import labs_cache
import labs_memory
import labs_prefixes
from labs_decode import Batch, Decoder, PrefixStore, Row, Tensor

FORMAT = 1
NAME = 40  # characters of a file's name that tell which chunk it holds
SUFFIX, TORN = ".safetensors", ".part"  # of whole files and of files that are being written
OLDEST_S = 30 * 86_400.0  # files that nobody used for this long are deleted
TORN_S = 3_600.0  # a file that is still being written after this long has lost its process
READ_S = 0.5  # the time for reading files between two steps of other rows
SPARE = 0.9  # the share of the bytes that is filled after files are deleted
MICROSECOND = 1000  # ns
REST_S = 60.0  # without writing, after the disk refused
REMEMBERED = 256  # rows whose next files are known
log = logging.getLogger("labs.prefixes")


def opened(model: Any, server: Any) -> PrefixStore | None:
    """Return the store of prefixes for a labs.Model by the settings of labs.Server.

    It is in memory only where prefix_disk_bytes is 0, or where nothing tells which weights these
    are (then files could be another model's).
    """
    memory = labs_prefixes.Prefixes(server.prefix_cache_bytes)
    if not server.prefix_disk_bytes or not model.decoder.can_reuse_prefix:
        return memory
    if why := unusable(model):
        log.warning("prefixes are not kept on disk: %s", why)
        return memory
    folder = labs_cache.cache_folder(model.spec.cache_dir) / "prefixes"
    return PrefixFiles(memory, Folder(folder, server.prefix_disk_bytes), identity(model))


def unusable(model: Any) -> str | None:
    """Return why prefixes of a labs.Model cannot be kept on disk, None if they can."""
    if model.fingerprint is None or model.fingerprint.revision == "unknown":
        return "the revision of the model is not known"
    devices = {parameter.device for parameter in model.model.parameters()}
    return "the model is on several devices" if len(devices) > 1 else None


def identity(model: Any) -> bytes:
    """Return a hash of what determines the bits of keys and values besides tokens."""
    decoder = model.decoder
    mark = msgspec.to_builtins(msgspec.structs.replace(model.fingerprint, model=""))
    parts = [FORMAT, mark, decoder.chunk, decoder.quant_method, decoder.why_forward]
    parts.append(str(getattr(decoder.config, "_attn_implementation", None)))
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).digest()


class PrefixFiles:
    """A store in memory, and behind it files: of whole chunks with the bits of a prefill."""

    def __init__(self, memory: labs_prefixes.Prefixes, folder: Folder, mark: bytes) -> None:
        self.memory, self.folder, self._mark = memory, folder, mark
        self._next: dict[Row, list[Path]] = {}  # the files that prompts continue in

    def release(self) -> bool:
        return self.memory.release()

    def flush(self, wait_s: float = 10.0) -> None:
        """Wait until all is written that was stored so far, at most this long."""
        self.folder.flush(wait_s)

    def load(self, decoder: Decoder, newcomer: Batch) -> None:
        """Write what is stored of a prompt into its slot.

        Files are read for half a second, then a chunk is computed, then more are read: so other
        rows wait no longer than for a prefill.
        """
        row, chunk, end = newcomer.rows[0], decoder.chunk, time.perf_counter() + READ_S
        if row not in self._next:
            self.memory.load(decoder, newcomer)
            files = self._files(decoder, row)
            if len(files) * chunk > row.written:
                row.written = row.cached = row.exact_columns
            self._remember(row, files)
        files = self._next[row]
        while row.written == row.exact_columns < len(files) * chunk and time.perf_counter() < end:
            found = self.folder.read(files[row.written // chunk])
            if found is None or not _is_chunk(newcomer, found, chunk):
                files.clear()
                return
            labs_prefixes.fill(newcomer, [each.to(decoder.device) for each in found])
            row.exact_columns = row.written
            row.cached += chunk

    def _remember(self, row: Row, files: list[Path]) -> None:
        while len(self._next) >= REMEMBERED:  # rows that were cancelled
            del self._next[next(iter(self._next))]
        self._next[row] = files

    def _files(self, decoder: Decoder, row: Row) -> list[Path]:
        """Return the files of a prompt's first chunks. The last token is always computed."""
        return self.folder.find(self._names(decoder, row.owner, row.ids[:-1]))

    def _names(self, decoder: Decoder, owner: str, ids: list[int]) -> Iterator[str]:
        """Yield a name for each whole chunk of a prompt, which depends on all tokens before."""
        known = hashlib.sha256(self._mark + hashlib.sha256(owner.encode()).digest())
        for end in range(decoder.chunk, len(ids) + 1, decoder.chunk):
            known.update(json.dumps(ids[end - decoder.chunk : end]).encode())
            yield known.hexdigest()[:NAME]

    def store(self, decoder: Decoder, batch: Batch, index: int) -> None:
        """Store the columns that rows[index] has written; its exact ones in files too, later."""
        self.memory.store(decoder, batch, index)
        row, cache = batch.rows[index], batch.cache
        self._next.pop(row, None)
        if len(cache.buffers) != 2 * len(cache.stateful_layers):
            return
        most, now = labs_memory.keepable_bytes(cache, 0), time.time_ns()
        exact = row.ids[: row.exact_columns]
        for place, name in enumerate(self._names(decoder, row.owner, exact)):
            if not self.folder.has(name) and self.folder.pending_bytes < most:
                columns = slice(place * decoder.chunk, (place + 1) * decoder.chunk)
                chunk = [buffer[index, :, columns].clone() for buffer in cache.buffers]
                self.folder.write(name, now - MICROSECOND * place, chunk)


def _is_chunk(newcomer: Batch, found: list[Tensor], columns: int) -> bool:
    """Return whether tensors [heads, columns, head_dim] are those of a chunk, layer by layer."""
    whole = len(found) == 2 * len(newcomer.cache.stateful_layers)
    return whole and all(each.dim() == 3 and each.shape[1] == columns for each in found)


# ---------------------------------------------------------------- files


class Folder:
    """Files of chunks, which processes may share; a thread writes them, the oldest are deleted.

    pending_bytes: what is still to be written. A file is written once and never changed. Its
    modification time is that of its last use, a microsecond earlier for each later chunk of a
    prompt, so that a prompt loses its end first.
    """

    def __init__(self, place: Path, max_bytes: int) -> None:
        self.place, self.max_bytes, self.pending_bytes = place, max_bytes, 0
        self._known: dict[str, Path] = {}
        self._pending: set[str] = set()
        self._todo: queue.SimpleQueue[tuple[str, int, list[Tensor]]] = queue.SimpleQueue()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._bytes, self._rests_until = 0, 0.0

    def find(self, names: Iterable[str]) -> list[Path]:
        """Return the files of these chunks, up to the first that is not there, as used now."""
        self._known = {path.name[:NAME]: path for path, _ in self._listed()}
        there = itertools.takewhile(self._known.__contains__, names)
        found, now = [self._known[name] for name in there], time.time_ns()
        for place, path in enumerate(found):
            _touch(path, now - MICROSECOND * place)
        return found

    def has(self, name: str) -> bool:
        return name in self._known or name in self._pending

    def read(self, path: Path) -> list[Tensor] | None:
        """Return the tensors in a file, or None if it is gone or not what was written."""
        name, data = path.name[:NAME], b""
        with contextlib.suppress(OSError):
            data = path.read_bytes()
        if path.name != f"{name}-{_checksum(data)}{SUFFIX}":
            self._known.pop(name, None)  # so that it is written again
            _delete(path)
            return None
        found = safetensors.torch.load(data)
        return [found[str(place)] for place in range(len(found))]

    def write(self, name: str, used: int, chunk: list[Tensor]) -> None:
        """Let the thread write a chunk. used: when it was used, in ns since 1970."""
        with self._changed:
            self._pending.add(name)
            self.pending_bytes += sum(each.nbytes for each in chunk)
            self._todo.put((name, used, chunk))
            if self._thread is None:
                self._thread = threading.Thread(target=self._serve, name="labs-prefixes")
                self._thread.start()

    def flush(self, wait_s: float) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self._pending, wait_s)

    def _serve(self) -> None:
        """Write what waits, then end: the thread begins again with the next chunk."""
        while True:
            with self._changed:
                if self._todo.empty():
                    self._thread = None
                    return
            name, used, chunk = self._todo.get()
            try:
                if time.monotonic() >= self._rests_until:
                    self._write(name, used, chunk)
            except Exception as error:  # whatever the disk does, answers go on
                log.warning("prefixes are not kept on disk for a minute: %s", error)
                self._rests_until = time.monotonic() + REST_S
            with self._changed:
                self._pending.discard(name)
                self.pending_bytes -= sum(each.nbytes for each in chunk)
                self._changed.notify_all()
            del chunk  # else its tensors stay in memory until the next one

    def _write(self, name: str, used: int, chunk: list[Tensor]) -> None:
        """Write a file completely or not at all, in a folder that only its owner can read."""
        self.place.mkdir(parents=True, exist_ok=True, mode=0o700)
        tensors = {str(at): each.cpu() for at, each in enumerate(chunk)}
        data = safetensors.torch.save(tensors)
        if len(data) > self.max_bytes:
            return
        path = self.place / f"{name}-{_checksum(data)}{SUFFIX}"
        new = self.place / f"{uuid.uuid4().hex}{TORN}"
        try:
            with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(data)
            self._make_room(len(data))
            os.replace(new, path)
        finally:
            _delete(new)
        _touch(path, used)
        self._known[name] = path

    def _make_room(self, size: int) -> None:
        """Delete files that are too old and, if all are too large, those unused for longest."""
        known, self._bytes = self._bytes, self._bytes + size
        if known and self._bytes <= self.max_bytes:
            return  # the sizes of other processes' files are read when the limit seems reached
        now, files = time.time(), sorted(self._listed(), key=lambda each: each[1].st_mtime_ns)
        self._bytes = size + sum(state.st_size for _, state in files)
        for path, state in files:
            if self._bytes > self.max_bytes * SPARE or now - state.st_mtime > OLDEST_S:
                _delete(path)
                self._bytes -= state.st_size

    def _listed(self) -> list[tuple[Path, os.stat_result]]:
        """Return the files of chunks and their states; delete what a dead process left behind."""
        found = list[tuple[Path, os.stat_result]]()
        with contextlib.suppress(OSError), os.scandir(self.place) as entries:
            for entry in entries:
                with contextlib.suppress(OSError):  # another process deletes files too
                    state, path = entry.stat(follow_symlinks=False), Path(entry.path)
                    if entry.name.endswith(SUFFIX):
                        found.append((path, state))
                    elif entry.name.endswith(TORN) and time.time() - state.st_mtime > TORN_S:
                        _delete(path)
        return found


def _checksum(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]


def _touch(path: Path, used: int) -> None:
    with contextlib.suppress(OSError):
        os.utime(path, ns=(used, used))


def _delete(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()
