# SPDX-License-Identifier: Apache-2.0
"""Attention of a step on a CPU for labs_forward.py: each row to the columns of its own slot.

    step = labs_attention.step_of(x, layer, masks, cache.cursor)
    output = step.attend(slots, step.masks[kind], layer, q, k, v)

A row has the same bits in any company: whatever else is in a batch, its products have the same
number of lines, and its sums go over SUMMED columns each. Needs labs_decode.py and labs_kernels.py.
"""

from __future__ import annotations

from typing import Any

import torch

import labs_decode
from labs_decode import SUMMED, Tensor
from labs_kernels import FEWEST, columns_read, queries_multiple

Masks = dict[str, Any]
Views = tuple[Tensor, Tensor, Tensor, Tensor]  # keys and values to write, and those to read


def step_of(x: Tensor, layer: Any, masks: Masks, cursor: Any) -> Step:
    """Return attention for the next step.

    x: the embedded tokens. layer: has `heads`, and `groups` of them that share keys, each of `dim`
    numbers. masks: by kind of layer, [B, 1, 1, T], to be added to scores.
    """
    return (ExactStep if x.dtype == torch.float32 else Step)(x, layer, masks, cursor)


class Step:
    """What all layers of a model in 16 bits need for one token of each row, made once a step.

    masks: by kind of layer, as of `mask_of`.
    """

    def __init__(self, x: Tensor, layer: Any, masks: Masks, cursor: Any) -> None:
        self.rows, self.column = cursor.queries, cursor.write_from
        self.groups: int = layer.groups
        self.heads: int = layer.heads // layer.groups
        self.places = cursor.index[:, None], cursor.positions[:, None]
        self.read = cursor.first_row, 1 if cursor.speculative else self.rows
        lines = self.padded_heads(x.dtype, layer.dim)
        self.queries = x.new_zeros((self.rows, self.groups, lines, layer.dim))
        self.total = columns_read(cursor, self.queries)
        self.masks = {kind: self.mask_of(mask[..., : self.total]) for kind, mask in masks.items()}
        self.own = self.queries[:, :, : self.heads]

    def padded_heads(self, dtype: torch.dtype, dim: int) -> int:
        """Return how many queries share a product, those of zeros included."""
        return self.heads + -self.heads % queries_multiple(dtype, dim)

    def mask_of(self, mask: Tensor) -> Any:
        """Return a mask [B, 1, 1, T] for each SUMMED columns, and which of these are hidden.

        [B, groups, 1, T] and None if that is one part, else [B * groups, parts, 1, T / parts].
        """
        mask = mask.expand(-1, self.groups, -1, -1)
        if self.total <= SUMMED or self.total % SUMMED:
            return mask, None
        mask = mask.reshape(-1, self.total // SUMMED, 1, SUMMED)
        return mask, mask.amax(3) == -torch.inf

    def attend(self, slots: Any, mask: Any, layer: Any, *states: Tensor) -> Tensor:
        """Write keys and values to the slots; return attention [B, groups, N, dim].

        states: queries, keys and values [B, 1, heads, dim]. The copies of a lone row have no keys
        of their own: they get the row's output.
        """
        q, k, v = states
        return self.read_by(q, *self.written(slots, k, v), mask, layer.options["scaling"])

    def read_by(self, q: Tensor, keys: Tensor, values: Tensor, mask: Any, scaling: float) -> Tensor:
        """Return attention [B, groups, N, dim] of q to keys and values [B, groups, T, dim]."""
        live = q if len(q) == self.rows else q[: self.rows]
        self.own.copy_(live.view(self.own.shape))
        output = self.output(keys, values, mask, scaling)[:, :, : self.heads]
        return output if live is q else output.expand(len(q), -1, -1, -1)

    def output(self, keys: Tensor, values: Tensor, mask: Any, scaling: float) -> Tensor:
        """Return attention [B, groups, N, dim] of the padded queries."""
        seen, hidden = mask
        if hidden is None:
            return labs_decode.flash(self.queries, keys, values, seen, scaling)[0]
        queries = self.queries.flatten(0, 1)[:, None].expand(-1, seen.shape[1], -1, -1)
        keys, values = (each.reshape(*seen.shape[:2], SUMMED, -1) for each in (keys, values))
        output, sums = labs_decode.flash(queries, keys, values, seen, scaling)
        output = labs_decode.combined(output, sums.masked_fill(hidden, -torch.inf))
        return output.view(self.queries.shape)

    def written(self, slots: Any, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k, v [B, 1, groups, dim] to the slots; return what the rows read."""
        to_keys, to_values, keys, values = self.views_of(slots, k, v)
        if self.column < 0:
            to_keys.index_put_(self.places, k)
            to_values.index_put_(self.places, v)
        else:  # a lone row, perhaps with copies
            lone = len(k) == 1
            to_keys.narrow(1, self.column, 1).copy_(k if lone else k[:1])
            to_values.narrow(1, self.column, 1).copy_(v if lone else v[:1])
        return keys, values

    def views_of(self, slots: Any, k: Tensor, v: Tensor) -> Views:
        """Return views of the rows' slots, which serve until other columns or rows are read."""
        known, which = slots.views, (*self.read, self.rows, self.total, self.column < 0)
        if known is None or known[0] != which or known[2] is not slots.keys:
            if not slots.is_initialized:
                slots.lazy_initialization(k.transpose(1, 2), v.transpose(1, 2))
            first, count = self.read
            read = (each[first : first + count, :, : self.total] for each in slots.buffers)
            read = (each.expand(self.rows, -1, -1, -1) for each in read)
            write = (each.transpose(1, 2) for each in slots.buffers)
            write = (each[first : first + 1] if self.column >= 0 else each for each in write)
            slots.views = known = which, (*write, *read), slots.keys
        views: Views = known[1]
        return views


class ExactStep(Step):
    """The same in float32, in four kernels: the N heads that share keys are rows of a product."""

    def padded_heads(self, dtype: torch.dtype, dim: int) -> int:
        return max(FEWEST, self.heads)

    def mask_of(self, mask: Tensor) -> Tensor:
        return for_heads(mask, self.groups, self.heads)

    def output(self, keys: Tensor, values: Tensor, mask: Any, scaling: float) -> Tensor:
        queries, keys, values = (each.flatten(0, 1) for each in (self.queries, keys, values))
        # If it added the mask too, MKL would round by the number of columns on Intel's CPUs.
        scores = mask.add(labs_decode.product(queries, keys.transpose(1, 2)), alpha=scaling)
        return labs_decode.weighted(scores.softmax(-1), values).view(self.queries.shape)


def for_heads(mask: Tensor, groups: int, heads: int) -> Tensor:
    """Return a mask [B, 1, 1, T] as [B * groups, N, T], for the N heads that share keys."""
    return mask.expand(-1, groups, max(FEWEST, heads), -1).flatten(0, 1)
