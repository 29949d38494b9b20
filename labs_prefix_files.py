# SPDX-License-Identifier: Apache-2.0
"""Prefixes of prompts on disk, so that a conversation goes on quickly after a restart.

    store = labs_prefix_files.opened(model, config.server)      # a labs_decode.PrefixStore
    loop = labs_loop.Loop(prefixes=store)
    store.flush()                                               # before the process ends

A file holds the keys and values of one chunk of a prompt, as safetensors. Its name is a hash of all
that determines their bits (model, types, packages, machine), of the owner and of all tokens up to
its end, then a checksum of the file. A file that is torn, or of anybody else, is never read into a
row. Needs labs_prefix_folder.py, labs_cache.py and labs_prefixes.py with what these need;
safetensors.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import safetensors
import safetensors.torch

import labs_cache
import labs_memory
import labs_prefix_folder
import labs_prefixes
from labs_decode import Batch, Decoder, PrefixStore, Row, Tensor
from labs_prefix_folder import MICROSECOND, NAME, Folder

FORMAT = 1
READ_S = 0.5  # the time for reading files between two steps of other rows
REMEMBERED = 256  # rows whose next files are known
log = logging.getLogger("labs.prefixes")


def opened(model: Any, server: Any) -> PrefixStore | None:
    """Return the store of prefixes for a labs.Model by the settings of labs.Server.

    It is in memory only where prefix_disk_bytes is 0, or where nothing tells which weights these
    are (then files could be another model's).
    """
    memory = labs_prefixes.Prefixes(server.prefix_cache_bytes)
    if not server.prefix_disk_bytes:
        return memory
    if why := unusable(model):
        log.warning("prefixes are not kept on disk: %s", why)
        return memory
    place = labs_prefix_folder.place(labs_cache.cache_folder(model.spec.cache_dir))
    return PrefixFiles(memory, Folder(place, server.prefix_disk_bytes), identity(model))


def unusable(model: Any) -> str | None:
    """Return why prefixes of a labs.Model cannot be kept on disk, None if they can."""
    if not model.decoder.can_reuse_prefix:
        return "the model has more than keys and values, so no prompt goes on from those of another"
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
        self._left_s, self._looked_at = READ_S, time.perf_counter()

    def release(self) -> bool:
        return self.memory.release()

    def flush(self, wait_s: float = 10.0) -> None:
        """Wait at most this long until all is written that was stored so far."""
        self.folder.flush(wait_s)

    def load(self, decoder: Decoder, newcomer: Batch) -> None:
        """Write what is stored of a prompt into its slot.

        Files are read for half a second, then a chunk is computed, then more are read: so other
        rows wait no longer than for a prefill. Newcomers share this time, which comes back at the
        rate at which time goes by.
        """
        row, chunk, now = newcomer.rows[0], decoder.chunk, time.perf_counter()
        end = now + min(READ_S, self._left_s + now - self._looked_at)
        if row not in self._next:
            self.memory.load(decoder, newcomer)
            files = self._files(decoder, row.owner, row.ids)
            if len(files) * chunk > row.written:
                row.written = row.cached = row.exact_columns
            self._remember(row, files)
        files = self._next[row]
        while row.written == row.exact_columns < len(files) * chunk and time.perf_counter() < end:
            found = unpacked(self.folder.read(files[row.written // chunk]) or b"")
            if not _is_chunk(newcomer, found, chunk):
                files.clear()
                break
            labs_prefixes.fill(newcomer, [each.to(decoder.device) for each in found])
            row.exact_columns = row.written
            row.cached += chunk
        self._looked_at = time.perf_counter()
        self._left_s = max(0.0, end - self._looked_at)

    def _remember(self, row: Row, files: list[Path]) -> None:
        while len(self._next) >= REMEMBERED:  # rows that were cancelled
            del self._next[next(iter(self._next))]
        self._next[row] = files

    def kept(self, decoder: Decoder, owner: str, ids: Sequence[int]) -> int:
        """Return how many tokens of a prompt are in files, which count as used now."""
        return decoder.chunk * len(self._files(decoder, owner, ids))

    def _files(self, decoder: Decoder, owner: str, ids: Sequence[int]) -> list[Path]:
        """Return the files of a prompt's first chunks. The last token is always computed."""
        return self.folder.find(self._names(decoder, owner, ids[:-1]))

    def _names(self, decoder: Decoder, owner: str, ids: Sequence[int]) -> Iterator[str]:
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
                ends = place * decoder.chunk, (place + 1) * decoder.chunk
                states = (layer.read(index, *ends) for layer in cache.stateful_layers)
                chunk = [each.clone() for pair in states for each in pair]
                size = sum(each.nbytes for each in chunk)
                make = functools.partial(packed, chunk)
                self.folder.write(name, now - MICROSECOND * place, size, make)


def packed(chunk: list[Tensor]) -> bytes:
    return safetensors.torch.save({str(at): each.cpu() for at, each in enumerate(chunk)})


def unpacked(data: bytes) -> list[Tensor]:
    """Return the tensors of a file, [] if it is none."""
    try:
        found = safetensors.torch.load(data)
        return [found[str(place)] for place in range(len(found))]
    except (safetensors.SafetensorError, KeyError):
        return []


def _is_chunk(newcomer: Batch, found: list[Tensor], columns: int) -> bool:
    """Return whether tensors [heads, columns, head_dim] are those of a chunk, layer by layer."""
    whole = len(found) == 2 * len(newcomer.cache.stateful_layers)
    return whole and all(each.dim() == 3 and each.shape[1] == columns for each in found)
