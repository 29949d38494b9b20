# SPDX-License-Identifier: Apache-2.0
"""Rows that wait for memory, so that more rows begin than could all have what they may need.

    decoder = replace(decoder, waiting=labs_waiting.Waiting())

Slots grow with the tokens that come, and most answers are shorter than they may be. So a newcomer
is admitted if, after it, the rows could still end one after another, from the oldest on: each has
the columns that it may need from free memory and from the rows that ended before it (the banker's
algorithm: Dijkstra, EWD 108). Before each step, rows whose slots are full take more columns in the
same order, as long as this stays true. The others wait: no step computes them, and they keep their
columns, so that their tokens have the same bits. The oldest row never waits, hence all rows end.

If other programs take memory meanwhile, and no row can go on, the oldest takes it nevertheless.
labs_calls adds this to a decoder whose cache has only keys and values. This file needs
labs_decode.py and labs_loop.py.
"""

from __future__ import annotations

import copy
import itertools
import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch

import labs_decode
import labs_loop
from labs_decode import Batch, Decoder, Row, Slots

Held = dict[Row, int]  # columns by row, with those that its slot leaves out
Groups = dict[tuple[bool, int, int], list[Row]]  # by whether they wait, columns and shared ones
log = logging.getLogger("labs.waiting")


class Waiting:
    """What labs_loop asks when memory is short; it has no state."""

    def has_room(
        self, decoder: Decoder, batches: Sequence[Batch], newcomers: Sequence[Batch]
    ) -> bool:
        """Return whether the newcomers may begin: their slots fit, and all rows can still end."""
        if not batches:
            return False  # labs_loop decides about the first ones
        new = [each for each in newcomers if not each.cache.buffers]
        wide = max(each.cache.cursor.columns for each in newcomers)
        cost = sum(each.cache.cursor.columns for each in new)
        open_ = [(each.cache.cursor, len(each.rows)) for each in batches if not each.rows[0].waits]
        joins = [
            max(at.rows, rows + len(newcomers)) * (wide - at.shared)
            - at.rows * (at.columns - at.shared)
            for at, rows in open_
            if at.columns <= wide  # wider ones take no row unless they can
        ]
        free = _free_columns(decoder, batches[0].cache) - cost - min(joins, default=0)
        return can_end(free, columns_held([*batches, *newcomers]))

    def join(
        self, decoder: Decoder, batches: Sequence[Batch], newcomer: Batch, others: Any = ()
    ) -> list[Batch]:
        """Join as labs_loop.join_best does, if these rows and those of `others` can still end."""
        held = columns_held([*others, *batches, newcomer])
        rest = [batch for batch in batches if _may_join(decoder, held, batch, newcomer)]
        full = [batch for batch in batches if all(batch is not each for each in rest)]
        return [*full, *labs_loop.join_best(decoder, rest, newcomer)]

    def share(self, decoder: Decoder, loop: labs_loop.Loop) -> list[Batch]:
        """Return the loop's batches so that all rows of a batch can go on, or all of them wait."""
        full = [batch for batch in loop.batches if is_full(batch)]
        if not full or _all_grow(decoder, loop.batches, full):
            return loop.batches
        waited = sum(row.waits for batch in full for row in batch.rows)
        if not waited and labs_loop.release(decoder, loop):
            return self.share(decoder, loop)  # stored prefixes were in the way
        batches = _ration(decoder, loop.batches)
        if waited != (waits := sum(row.waits for batch in batches for row in batch.rows)):
            log.info("%d of %d rows wait for memory", waits, len(loop.rows))
        return batches


def is_full(batch: Batch) -> bool:
    """Return whether a row needs more columns than its slot has for its next token."""
    return max(row.written for row in batch.rows) >= batch.cache.cursor.columns


def wider(batch: Batch, tokens: int = 1) -> int:
    """Return the columns that a batch's slots grow to: twice as many, or as many as may be needed.

    tokens: how many the next step writes.
    """
    needed = max(row.written for row in batch.rows) + tokens
    most, at = max(row.columns for row in batch.rows), batch.cache.cursor
    return labs_decode.blocks(max(needed, min(2 * at.columns - at.shared, most)))


def columns_held(batches: Sequence[Batch]) -> Held:
    """Return the columns of each row's slot."""
    return {row: batch.cache.cursor.columns for batch in batches for row in batch.rows}


def can_end(free: int, held: Held) -> bool:
    """Return whether all rows can get the columns they may need, each after all older ones ended.

    free: columns that slots may still take. held: what each row has and gives back at its end.
    """
    for row in _by_age(held):
        if free < max(labs_decode.blocks(row.columns) - held[row], 0):
            return False
        free += held[row] - row.shared
    return True


def _by_age(rows: Iterable[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: (row.entered, row.id))


def _free_columns(decoder: Decoder, cache: Slots) -> int:
    return labs_decode.slot_budget(decoder.device) // max(cache.bytes_per_column, 1)


def _may_join(decoder: Decoder, held: Held, batch: Batch, newcomer: Batch) -> bool:
    """Return whether a batch's slots may take a newcomer; if doubling is too much, one by one."""
    at, live, cache = batch.cache.cursor, len(batch.rows), batch.cache
    columns = max(at.columns, newcomer.cache.cursor.columns)
    cache.doubles = True
    if batch.rows[0].waits or (live < at.rows and columns == at.columns):
        return not batch.rows[0].waits
    free, own = _free_columns(decoder, cache), columns - at.shared
    free += at.rows * (at.columns - at.shared)
    if can_end(free - (at.rows if live < at.rows else 2 * at.rows) * own, held):
        return True
    cache.doubles = decoder.graphs is not None  # they need powers of two
    return not cache.doubles and can_end(free - max(at.rows, live + 1) * own, held)


def _all_grow(decoder: Decoder, batches: Sequence[Batch], full: Sequence[Batch]) -> bool:
    """Return whether all full batches can grow as they are, and let them do so in their steps."""
    grown, free = columns_held(batches), _free_columns(decoder, full[0].cache)
    for batch in full:
        at, columns = batch.cache.cursor, wider(batch)
        free -= at.rows * (columns - at.columns)
        grown |= dict.fromkeys(batch.rows, columns)
    if fits := can_end(free, grown):
        for row in grown:
            row.waits = False
    return fits


def _ration(decoder: Decoder, batches: Sequence[Batch]) -> list[Batch]:
    """Let rows of full slots grow, the oldest first, while memory lasts; the others wait."""
    held, unused = columns_held(batches), 0
    for batch in batches:
        at = batch.cache.cursor
        unused += (at.rows - len(batch.rows)) * (at.columns - at.shared)
    free = _free_columns(decoder, batches[0].cache)
    left, need = free + unused, [row for row in held if row.written >= held[row]]
    grown: Held = {}
    for row in _by_age(need):
        more = held | grown | {row: _next_columns(row, held[row])}
        if can_end(left - more[row] + held[row], more):
            left, grown[row] = left - more[row] + held[row], more[row]
    if not grown and len(need) == len(held):  # another program took the memory
        oldest = _by_age(held)[0]
        grown[oldest] = _next_columns(oldest, held[oldest])
    waited = {row for row in held if row.waits}
    for row in held:
        row.waits = row in need and row not in grown
    if not grown and waited == {row for row in held if row.waits}:
        return list(batches)
    arranged = _arrange(decoder, batches, held | grown, tight=left < unused)
    if not arranged:  # no memory even for one layer: their next steps fail or find some
        for row in held:
            row.waits = False
    return arranged or list(batches)


def _next_columns(row: Row, held: int) -> int:
    return labs_decode.blocks(max(row.written + 1, min(2 * held - row.shared, row.columns)))


@torch.inference_mode()
def _arrange(decoder: Decoder, batches: Sequence[Batch], held: Held, tight: bool) -> list[Batch]:
    """Return a batch for all rows that wait, and one for all others, of each number of columns.

    held: the columns that each row gets. tight: leave no slots unused. Each layer is copied and
    freed in turn, so that little is held twice.
    """
    groups: Groups = {}
    for first, row in ((_first_columns(batch), row) for batch in batches for row in batch.rows):
        groups.setdefault((row.waits, held[row], first), []).append(row)
    kept = [each for each in batches if _stays(each, groups, tight)]
    old = [batch for batch in batches if not any(batch is each for each in kept)]
    of_row = {row: batch for batch in old for row in batch.rows}
    made = [_empty(decoder, of_row[rows[0]], rows, key[1]) for key, rows in groups.items()]
    layers = enumerate(old[0].cache.layers if made else ())
    slotted = [number for number, layer in layers if isinstance(layer, labs_decode.SlotLayer)]
    for place in itertools.product(slotted, ("keys", "values")):
        try:
            _move_layer(old, made, *place)
        except (RuntimeError, MemoryError) as error:
            if place != (slotted[0], "keys") or not labs_decode.out_of_memory(error):
                raise
            return []  # nothing has changed
    return [*kept, *made]


def _first_columns(batch: Batch) -> int:
    """Return which columns the rows of a batch share, as an id; 0 for none."""
    return id(batch.cache.layers[0].shared) if batch.cache.cursor.shared else 0  # type: ignore


def _stays(batch: Batch, groups: Groups, tight: bool) -> bool:
    """Take a batch's group out of `groups` and return True if its slots are already as they say."""
    at, waits = batch.cache.cursor, batch.rows[0].waits
    key = waits, at.columns, _first_columns(batch)
    stays = groups.get(key) == [*batch.rows] and not (tight and at.rows > len(batch.rows))
    if stays:
        del groups[key]
    return stays


def _move_layer(old: Sequence[Batch], made: Sequence[Batch], number: int, name: str) -> None:
    """Copy the keys or values of one layer to other batches, and free them."""
    layers: list[Any] = [batch.cache.layers[number] for batch in old]
    buffers = zip(old, (getattr(layer, name) for layer in layers), strict=True)
    slots = {row: buffer[i] for batch, buffer in buffers for i, row in enumerate(batch.rows)}
    for batch in made:
        at, like = batch.cache.cursor, getattr(batch.cache.layers[number], name)
        new = like.new_zeros((at.rows, like.shape[1], at.columns - at.shared, like.shape[3]))
        for index, row in enumerate(batch.rows):
            own = slice(row.written - at.shared)
            new[index, :, own] = slots[row][:, own]
        setattr(batch.cache.layers[number], name, new)
    for layer in layers:  # other threads may look at them
        setattr(layer, name, getattr(made[0].cache.layers[number], name))
        layer.views = None


def _empty(decoder: Decoder, like: Batch, rows: Sequence[Row], columns: int) -> Batch:
    """Return a batch of these rows; its layers still refer to those of another batch."""
    cache, slots = copy.copy(like.cache), len(rows)
    if decoder.graphs is not None:
        slots = 1 << (slots - 1).bit_length()  # their steps read as many
    cache.cursor = replace(like.cache.cursor, rows=slots, columns=columns)
    cache.captured, cache.layers = {}, [copy.copy(layer) for layer in cache.layers]
    for layer in cache.stateful_layers:
        layer.cursor, layer.views = cache.cursor, None
    return replace(like, rows=tuple(rows), cache=cache, graphs=None)
