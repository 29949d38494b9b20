# SPDX-License-Identifier: Apache-2.0
"""What prompts begin with in common, kept: keys and values of recent rows, in memory.

    loop = labs_loop.Loop(prefixes=labs_prefixes.Prefixes())

A later prompt of the same owner that begins with the same token ids starts from these columns.
Needs labs_decode.py.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass

import torch

import labs_decode
from labs_decode import Batch, Decoder, Slots, Tensor


@dataclass(frozen=True, slots=True)
class Prefix:
    """The first columns of a row, for rows that begin with the same ids.

    exact_columns: how many have the bits that any other row's prefill gives them. buffers: keys and
    values [heads, columns, head_dim], layer by layer.
    """

    owner: str
    ids: list[int]
    exact_columns: int
    buffers: list[Tensor]

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in self.buffers)


class Prefixes:
    """A labs_decode.PrefixStore: the least recently used prefixes go first.

    Rows find those of their own owner only: otherwise response time would reveal other owners'
    prompts. max_bytes: what they may take, by default a share of the free memory; 0 keeps none.
    """

    def __init__(self, max_bytes: int | None = None) -> None:
        self.max_bytes = max_bytes
        self.kept: list[Prefix] = []

    @property
    def nbytes(self) -> int:
        return sum(prefix.nbytes for prefix in self.kept)

    def release(self) -> bool:
        """Forget all of them; tell whether there were any."""
        held = bool(self.kept)
        self.kept.clear()
        return held

    def load(self, decoder: Decoder, newcomer: Batch) -> None:
        """Write the longest known beginning of a prompt into its slot, if nothing is there yet."""
        row = newcomer.rows[0]
        if row.written:
            return
        border = decoder.chunk if row.exact_prefix else 0
        prefix, row.cached = self.find(row.owner, row.ids, border)
        if prefix is not None:
            recall(decoder, newcomer, prefix, row.cached)

    def store(self, decoder: Decoder, batch: Batch, index: int) -> None:
        """Keep what rows[index] has written; of invariant rows only what every request may use."""
        self.add(batch.rows[index].owner, batch, index, exact=decoder.invariant)

    def add(self, owner: str, batch: Batch, index: int, *, exact: bool) -> None:
        """Copy what rows[index] has written; exact: only what every request may use."""
        row, cache = batch.rows[index], batch.cache
        columns = row.exact_columns if exact else row.written
        size, ids = columns * cache.bytes_per_column, row.ids[:columns]
        mine = [prefix for prefix in self.kept if prefix.owner == owner]
        known = any(p.exact_columns >= row.exact_columns and p.ids[:columns] == ids for p in mine)
        whole = len(cache.buffers) == 2 * len(cache.stateful_layers)
        little = columns < labs_decode.CHUNK
        if known or not whole or little or size > (most := self._most(cache)):
            return
        for prefix in mine:  # what the new one holds too
            if prefix.exact_columns <= row.exact_columns and prefix.ids == ids[: len(prefix.ids)]:
                self.kept.remove(prefix)
        while self.nbytes + size > most:
            del self.kept[0]
        buffers = [buffer[index, :, :columns].clone() for buffer in cache.buffers]
        self.kept.append(Prefix(owner, ids, row.exact_columns, buffers))

    def find(self, owner: str, ids: list[int], border: int) -> tuple[Prefix | None, int]:
        """Return the prefix that spares most of a prompt, and how many columns; (None, 0) if none.

        border: the length of chunks, where only columns that have the bits of a prefill count; 0
        for all of them. The last token is always computed, and little is not worth the copying.
        """
        best, most = None, labs_decode.CHUNK - 1
        for prefix in (each for each in self.kept if each.owner == owner):
            columns = _common(prefix.ids, ids[:-1])
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
        return labs_decode.keepable_bytes(cache, self.nbytes)


def _common(a: list[int], b: list[int]) -> int:
    """Return how many ids two lists begin with in common."""
    shorter = range(min(len(a), len(b)) + 1)
    return bisect.bisect_left(shorter, True, key=lambda n: a[:n] != b[:n]) - 1


@torch.inference_mode()
def recall(decoder: Decoder, newcomer: Batch, prefix: Prefix, columns: int) -> Batch:
    """Fill the slot of a newcomer of whom nothing is computed yet with the first columns."""
    row, buffers = newcomer.rows[0], iter(prefix.buffers)
    for layer in newcomer.cache.stateful_layers:
        states = [next(buffers)[None, :, :columns] for _ in ("keys", "values")]
        layer.lazy_initialization(*states)
        for buffer, first in zip(layer.buffers, states, strict=True):
            buffer[:1, :, :columns] = first
    row.written = columns
    row.exact_columns = min(columns, prefix.exact_columns) // decoder.chunk * decoder.chunk
    return newcomer
