# SPDX-License-Identifier: Apache-2.0
"""Reusable prefixes of prompts: the keys and values of recent rows, stored in memory.

    loop = labs_loop.Loop(prefixes=labs_prefixes.Prefixes())

A later prompt of the same owner that begins with the same token ids starts from these columns.
This file needs labs_decode.py and labs_memory.py.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass

import torch

import labs_decode
import labs_memory
from labs_decode import Batch, Decoder, Slots, Tensor


@dataclass(frozen=True, slots=True)
class Prefix:
    """The first columns of a row, for later rows that begin with the same ids.

    exact_columns: the number of columns with the bits of a prefill. buffers: keys and values
    [heads, columns, head_dim], layer by layer.
    """

    owner: str
    ids: list[int]
    exact_columns: int
    buffers: list[Tensor]

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in self.buffers)


class Prefixes:
    """A labs_decode.PrefixStore that deletes the least recently used prefixes first.

    A row finds only prefixes of the same owner, as response times would reveal other owners'
    prompts. max_bytes: the limit of all prefixes, 0 for none; by default a share of free memory.
    """

    def __init__(self, max_bytes: int | None = None) -> None:
        self.max_bytes = max_bytes
        self.kept: list[Prefix] = []

    @property
    def nbytes(self) -> int:
        return sum(prefix.nbytes for prefix in self.kept)

    def release(self) -> bool:
        """Delete all prefixes; return whether there were any."""
        held = bool(self.kept)
        self.kept.clear()
        return held

    def load(self, decoder: Decoder, newcomer: Batch) -> None:
        """Write the longest stored prefix of a prompt into its slot, if the slot is empty."""
        row = newcomer.rows[0]
        if row.written:
            return
        border = decoder.chunk if row.exact_prefix else 0
        prefix, row.cached = self.find(row.owner, row.ids, border)
        if prefix is not None:
            recall(decoder, newcomer, prefix, row.cached)

    def store(self, decoder: Decoder, batch: Batch, index: int) -> None:
        """Store the columns that rows[index] has written; if rows are invariant, the exact ones."""
        self.add(batch.rows[index].owner, batch, index, exact=decoder.invariant)

    def add(self, owner: str, batch: Batch, index: int, *, exact: bool) -> None:
        """Store a copy of the columns of rows[index], or with `exact` of its exact columns."""
        row, cache = batch.rows[index], batch.cache
        columns = row.exact_columns if exact else row.written
        size, ids = columns * cache.bytes_per_column, row.ids[:columns]
        mine = [prefix for prefix in self.kept if prefix.owner == owner]
        known = any(p.exact_columns >= row.exact_columns and p.ids[:columns] == ids for p in mine)
        whole = len(cache.buffers) == 2 * len(cache.stateful_layers)
        little = columns < labs_decode.CHUNK
        if known or not whole or little or size > (most := self._most(cache)):
            return
        for prefix in mine:  # the new one contains these
            if prefix.exact_columns <= row.exact_columns and prefix.ids == ids[: len(prefix.ids)]:
                self.kept.remove(prefix)
        while self.nbytes + size > most:
            del self.kept[0]
        layers = cache.stateful_layers
        buffers = [each.clone() for layer in layers for each in layer.read(index, 0, columns)]
        self.kept.append(Prefix(owner, ids, row.exact_columns, buffers))

    def find(self, owner: str, ids: list[int], border: int) -> tuple[Prefix | None, int]:
        """Return the prefix that saves most of a prompt, and how many columns; (None, 0) if none.

        border: the chunk length, to count only whole chunks with the bits of a prefill; 0 to count
        all columns. The last token is always computed. Less than one chunk is not worth copying.
        """
        best, most = None, labs_decode.CHUNK - 1
        for prefix in (each for each in self.kept if each.owner == owner):
            columns = common(prefix.ids, ids[:-1])
            if border:
                columns = min(columns, prefix.exact_columns) // border * border
            if columns > most:
                best, most = prefix, columns
        if best is None:
            return None, 0
        self.kept.append(self.kept.pop(self.kept.index(best)))
        return best, most

    def _most(self, cache: Slots) -> int:
        if self.max_bytes is not None:
            return self.max_bytes
        return labs_memory.keepable_bytes(cache, self.nbytes)


def common(a: list[int], b: list[int]) -> int:
    """Return the length of the common prefix of two lists of ids."""
    shorter = range(min(len(a), len(b)) + 1)
    return bisect.bisect_left(shorter, True, key=lambda n: a[:n] != b[:n]) - 1


@torch.inference_mode()
def recall(decoder: Decoder, newcomer: Batch, prefix: Prefix, columns: int) -> Batch:
    """Fill the empty slot of a newcomer with the first columns of a prefix."""
    row = newcomer.rows[0]
    fill(newcomer, [buffer[:, :columns] for buffer in prefix.buffers])
    row.exact_columns = min(columns, prefix.exact_columns) // decoder.chunk * decoder.chunk
    return newcomer


@torch.inference_mode()
def fill(newcomer: Batch, columns: list[Tensor]) -> None:
    """Write columns behind those of a newcomer: [heads, columns, head_dim], layer by layer."""
    row, tensors = newcomer.rows[0], iter(columns)
    end = row.written + columns[0].shape[1]
    for layer in newcomer.cache.stateful_layers:
        states = [next(tensors)[None] for _ in ("keys", "values")]
        if not layer.is_initialized:
            layer.lazy_initialization(*states)
        for buffer, each in zip(layer.buffers, states, strict=True):
            buffer[:1, :, row.written : end] = each
    row.written = end
