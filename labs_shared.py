# SPDX-License-Identifier: Apache-2.0
"""Rows that begin alike read those columns from one copy: agents with one system prompt, n choices.

    decoder = labs_shared.speed_up(decoder)   # behind labs_forward.speed_up

The rows of such a batch have slots for their own columns only. A step multiplies the queries of all
rows with the shared keys at once, so that their memory and the time to read it count once. A row
has the same bits whether it shares or not, because that depends on what else runs. Only rows of the
same owner share, and only columns that whole chunks of a prompt wrote. This file needs
labs_attention.py, labs_calls.py, labs_decode.py, labs_loop.py, labs_prefixes.py and
labs_shared_attention.py.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch

import labs_attention
import labs_calls
import labs_decode
import labs_loop
import labs_prefixes
import labs_shared_attention
from labs_decode import COLUMNS, SUMMED, Batch, Decoder, Pair, Row, SlotLayer, Slots, Tensor

LEAST = 0.125  # of the weights' bytes: a step has to save as much reading, or rows do not share
STAYS = 0.5  # of the weights' bytes: a batch that saves less is given up when others are there
T = TypeVar("T")
Join = Callable[[Decoder, Sequence[Batch], Batch], list[Batch]]


class SharedLayer(SlotLayer):  # type: ignore[no-untyped-call]
    """Slots that leave out the first columns. shared: their keys and values, [heads, columns, dim].

    `update` returns pairs of the shared and the rows' own ones, which labs_shared_attention takes.
    """

    shared: Pair

    def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> Any:
        own = super().update(key_states, value_states)
        return tuple(zip(self.shared, own, strict=True))

    def read(self, row: int, first: int, end: int) -> list[Tensor]:
        skipped = self.cursor.shared
        own = super().read(row, max(first - skipped, 0), max(end - skipped, 0))
        if first >= skipped:
            return own
        return [torch.cat([a[:, first:end], b], 1) for a, b in zip(self.shared, own, strict=True)]


class SharedSlots(Slots):
    """Slots of rows that begin with the same columns. columns: how many, with the shared ones."""

    def __init__(self, config: Any, row: Row, shared: int, columns: int) -> None:
        self.ids, self.owner = row.ids[:shared], row.owner
        super().__init__(config, columns)
        self.cursor.shared, self.cursor.columns = shared, columns

    def _layer(self, old: Any) -> SharedLayer:
        return SharedLayer(self.cursor)

    def of_step(self, *given: Any) -> Any:
        return labs_shared_attention.of_step(self.cursor.shared, *given)

    def begins(self, row: Row) -> bool:
        """Return whether the shared columns are those of a row, bit for bit."""
        mine = row.owner == self.owner and row.exact_columns >= len(self.ids)
        return mine and row.ids[: len(self.ids)] == self.ids


def is_shared(batch: Batch) -> bool:
    return isinstance(batch.cache, SharedSlots)


# ---------------------------------------------------------------- who shares


def join(decoder: Decoder, batches: Sequence[Batch], newcomer: Batch) -> list[Batch]:
    """Put a newcomer into a batch, beside rows that begin alike if it pays."""
    if decoder.model._forward_hooks:  # transformers' modules run, which know no shared columns
        return _beside(decoder)(decoder, batches, newcomer)
    row, bytes_per_column = newcomer.rows[0], newcomer.cache.bytes_per_column
    alike = [b for b in batches if isinstance(b.cache, SharedSlots) and b.cache.begins(row)]
    if alike:  # those of one copy, the longest
        longest = max(b.cache.cursor.shared for b in alike)
        alike = [b for b in alike if b.cache.cursor.shared == longest]
    others = [batch for batch in batches if all(batch is not each for each in alike)]
    if alike and (alone := _unless_full(lambda: _apart(decoder, newcomer, 0, alike[0].cache))):
        return [*others, *_beside(decoder, others)(decoder, alike, alone)]
    rows = [row for batch in batches if not is_shared(batch) for row in batch.rows]
    plain = [row for row in rows if not row.waits]
    mates, shared = _mates(plain, row)
    joins_all = len(mates) == sum(len(batch.rows) for batch in batches)
    least = decoder.weight_bytes * (LEAST if joins_all else 1)  # a batch more reads them once more
    if shared * len(mates) * bytes_per_column >= max(least, 1):
        started = _unless_full(lambda: _start(decoder, batches, newcomer, (mates, shared)))
        if started:
            return started
        for each in (*plain, row):  # some may have been copied
            each.shared = 0
    return _join_plain(decoder, batches, newcomer)


def _mates(rows: Sequence[Row], newcomer: Row) -> tuple[set[int], int]:
    """Return the rows that should share columns with a newcomer, and how many columns."""
    alike = {row.id: _columns_alike(row, newcomer) for row in rows}
    saved = {size: size * sum(each >= size for each in alike.values()) for size in alike.values()}
    shared = max(saved, key=lambda size: saved[size], default=0)
    return {key for key, size in alike.items() if size >= shared > 0}, shared


def _columns_alike(a: Row, b: Row) -> int:
    """Return how many columns of two rows have the same bits, in whole blocks; 0 for a few."""
    exact = min(a.exact_columns, b.exact_columns) if a.owner == b.owner else 0
    columns = labs_prefixes.common(a.ids[:exact], b.ids[:exact]) // COLUMNS * COLUMNS
    return columns if columns >= labs_decode.CHUNK else 0


def _beside(decoder: Decoder, others: Sequence[Batch] = ()) -> Join:
    """Return what puts a row into the first batch that it does not slow down, none of `others`."""
    if not decoder.waiting:
        return labs_loop.join_best
    return functools.partial(decoder.waiting.join, others=others)


def _unless_full(function: Callable[[], T]) -> T | None:
    """Return the function's result, None if memory ran out."""
    try:
        return function()
    except (RuntimeError, MemoryError) as error:
        if not labs_decode.out_of_memory(error):
            raise
        return None


# ---------------------------------------------------------------- rows change their slots


def _start(
    decoder: Decoder, batches: Sequence[Batch], newcomer: Batch, wanted: tuple[set[int], int]
) -> list[Batch]:
    """Move rows out of their batches to share their first columns with a newcomer."""
    mates, shared = wanted
    places = [(b, i) for b in batches for i, row in enumerate(b.rows) if row.id in mates]
    first, *others = *places, (newcomer, 0)
    sharing, left = [_apart(decoder, *first, shared)], list[Batch]()
    for place in others:
        alone = _apart(decoder, *place, sharing[0].cache)
        sharing = _beside(decoder)(decoder, sharing, alone)
    for batch in batches:  # from here on nothing can fail
        kept = [row.id for row in batch.rows if row.id not in mates]
        rest = labs_decode.keep(batch, kept) if len(kept) < len(batch.rows) else batch
        left += [] if rest is None else [rest]
    return [*left, *sharing]


@torch.inference_mode()
def _apart(decoder: Decoder, batch: Any, index: int, shared: Any) -> Batch:
    """Copy a row into a slot of its own without its first columns.

    shared: slots whose shared columns are the row's too, or how many of its own are shared now.
    """
    row, size = batch.rows[index], shared if isinstance(shared, int) else shared.cursor.shared
    columns = min(row.written + COLUMNS, max(row.columns, row.written + 1))
    slots: Any = SharedSlots(decoder.config, row, size, _blocks(columns))
    for number, (mine, theirs) in enumerate(zip(slots.layers, batch.cache.layers, strict=True)):
        first = theirs.read(index, 0, size) if isinstance(shared, int) else ()
        mine.shared = tuple(s.clone() for s in first) or shared.layers[number].shared
        mine.lazy_initialization(theirs.keys, theirs.values)
        for buffer, states in zip(mine.buffers, theirs.read(index, size, row.written), strict=True):
            buffer[0, :, : row.written - size] = states
    row.shared = size
    return Batch((row,), slots)


def _blocks(columns: int) -> int:
    """Round up so that the last sum has a length that labs_decode.blocks gives as well."""
    rest = columns % SUMMED
    return columns - rest + (labs_decode.blocks(rest) if rest else 0)


def _join_plain(decoder: Decoder, batches: Sequence[Batch], newcomer: Batch) -> list[Batch]:
    """Join a batch that shares nothing. Rows whose sharing does not pay beside it join it too."""
    plain = [batch for batch in batches if not is_shared(batch)]
    sharing, kept = [*filter(is_shared, batches)], list[Batch]()
    plain = _beside(decoder, sharing)(decoder, plain, newcomer)
    short = any(row.waits for batch in batches for row in batch.rows)
    for batch in sharing:
        shared = batch.cache.cursor.shared * batch.cache.bytes_per_column
        pays = (len(batch.rows) - 1) * shared >= STAYS * decoder.weight_bytes
        fits = len(batch.rows) * shared < labs_decode.slot_budget(decoder.device)
        spread = functools.partial(_spread, decoder, batch)
        alone = None if pays or not fits or short else _unless_full(spread)
        for row in () if alone else batch.rows:  # some may have been copied
            row.shared = batch.cache.cursor.shared
        for each in alone or ():
            plain = _beside(decoder, sharing)(decoder, plain, each)
        kept += [] if alone else [batch]
    return [*kept, *plain]


def _spread(decoder: Decoder, batch: Batch) -> list[Batch]:
    return [labs_calls.apart(decoder, batch, index) for index in range(len(batch.rows))]


# ---------------------------------------------------------------- at load


def speed_up(decoder: Decoder) -> Decoder:
    """Let rows share columns on a CPU, where a row has the same bits if it shares them.

    It takes the forward of labs_forward, without soft caps in attention, and slots not in 8 bits.
    """
    weights, plain = getattr(decoder.forward, "args", (None,))[0], decoder.slots is Slots
    usable = plain and decoder.can_reuse_prefix and decoder.grow and decoder.mode == "joins"
    if weights is None or not weights.steps or not usable or decoder.device.type != "cpu":
        return decoder
    alike = not decoder.invariant or _has_same_bits(weights, decoder.model.dtype)
    return replace(decoder, join=join) if alike else decoder


TRIED = (COLUMNS, SUMMED), (SUMMED + COLUMNS, 2 * SUMMED), (3 * SUMMED, 4 * SUMMED)  # shared, all


@torch.inference_mode()
def _has_same_bits(weights: Any, dtype: torch.dtype) -> bool:
    """Return whether attention of rows with shared columns has the bits of rows without them."""
    layer, few, most = weights.layers[0], labs_shared_attention.LINES, labs_shared_attention.MOST
    each, exact = layer.heads // layer.groups, dtype == torch.float32
    fewest = next((n for n in range(1, most) if 0 < n * each % most <= few), 1)  # one short piece
    seeds = (1e4,) if exact else (1e4, 2e4)  # what 16 bits hide of some numbers, others show
    tries = itertools.product((fewest, most // each + 3), TRIED, seeds)
    return (exact or each <= most) and all(_alike(layer, dtype, *values) for values in tries)


def _alike(layer: Any, dtype: torch.dtype, rows: int, columns: Sequence[int], seed: float) -> bool:
    """Return _has_same_bits for a number of rows. columns: the shared ones, and all."""
    shared, total = columns
    sizes = [(rows, layer.heads, 1), (layer.groups, shared), (rows, layer.groups, total - shared)]
    counts = [math.prod(size) * layer.dim for size in sizes]
    numbers = torch.arange(65_521).sin().mul(seed).sin().to(dtype).repeat(sum(counts) // 65_521 + 1)
    parts = zip(torch.split(numbers[: sum(counts)], counts), sizes, strict=True)
    q, first, rest = (part.view(*size, layer.dim) for part, size in parts)
    masks, scaling = {"": q.new_zeros((rows, 1, 1, total))}, layer.dim**-0.5
    attend, pairs = labs_shared_attention.of_step(shared, q, layer, masks)
    together = attend(None, q, (first, rest), (first, rest), pairs[""], scaling=scaling)[0]
    at = labs_decode.Cursor(rows, total, total, -1, positions=torch.full((rows,), total - 1))
    at.index = torch.arange(rows)
    whole = torch.cat([first.expand(rows, -1, -1, -1), rest], 2)
    step = labs_attention.step_of(q, layer, masks, at)
    alone = step.read_by(q.transpose(1, 2), whole, whole, step.masks[""], scaling)
    return torch.equal(alone.flatten(), together.flatten())
