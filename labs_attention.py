# SPDX-License-Identifier: Apache-2.0
"""Attention of a step on a CPU for labs_forward.py: each row to the columns of its own slot.

    found = labs_attention.of_step(x, layer, masks)   # a function and its masks, or None

A row has the same bits in any company: a product of four or more rows on MKL gives each row the
bits that it has in any such product, and sums go over SUMMED columns each in the same order. This
file needs labs_decode.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

import labs_decode
from labs_decode import COLUMNS, SUMMED, Tensor

FEWEST = 4  # queries of a product: in float32, fewer round otherwise, and take no less time
Masks = dict[str, Any]
Attention = Callable[..., tuple[Tensor, None]]


def of_step(x: Tensor, layer: Any, masks: Masks) -> tuple[Attention, Masks] | None:
    """Return attention for the next step and its masks; None to take the registered attention.

    x: the embedded tokens. layer: has `heads`, and `groups` of them that share keys. masks: by kind
    of layer, [B, 1, 1, T], to be added to scores.
    """
    if not x.is_cpu:
        return None
    exact = x.dtype == torch.float32
    attention, make = (attend, for_heads) if exact else (attend_aligned, _for_parts)
    return attention, {kind: make(mask, layer) for kind, mask in masks.items()}


def for_heads(mask: Tensor, layer: Any) -> Tensor:
    """Return a mask [B, 1, 1, T] as [B * groups, N, T], for the N heads that share keys."""
    queries = max(FEWEST, layer.heads // layer.groups)
    return mask.expand(-1, layer.groups, queries, -1).flatten(0, 1)


def _for_parts(mask: Tensor, layer: Any) -> tuple[Tensor, Tensor | None]:
    """Return a mask [B, 1, 1, T] for each SUMMED columns, and which of these parts are hidden.

    [B, groups, 1, T] and None if that is one part, else [B * groups, parts, 1, T / parts].
    """
    mask, total = mask.expand(-1, layer.groups, -1, -1), mask.shape[-1]
    if total <= SUMMED or total % SUMMED:
        return mask, None
    mask = mask.reshape(-1, total // SUMMED, 1, SUMMED)
    return mask, mask.amax(3) == -torch.inf


# ---------------------------------------------------------------- float32


def attend(
    module: Any, q: Tensor, keys: Tensor, values: Tensor, mask: Tensor, *, scaling: float
) -> tuple[Tensor, None]:
    """Compute attention [B, 1, heads, dim] of one token a row in float32, in three kernels.

    mask [B * groups, N, T], to add: the N heads that share keys are rows of one product. The copies
    of a lone row have no keys of their own: they get the row's output.
    """
    rows, groups = keys.shape[:2]
    keys, values = (each.reshape(-1, *each.shape[2:]) for each in (keys, values))
    queries = at_least(q[:rows].reshape(rows * groups, -1, q.shape[-1]))
    scores = torch.baddbmm(mask, queries, keys.transpose(1, 2), alpha=scaling)
    output = labs_decode.weighted(scores.softmax(-1), values)
    return of_heads(output.view(rows, groups, *output.shape[1:]), q), None


def at_least(lines: Tensor) -> Tensor:
    """Return [N, L, ...] with zeros for at least FEWEST lines."""
    missing = FEWEST - lines.shape[1]
    return torch.nn.functional.pad(lines, (0, 0, 0, missing)) if missing > 0 else lines


def of_heads(output: Tensor, q: Tensor) -> Tensor:
    """Return output [B, groups, N, dim] as [rows of q, 1, heads, dim]."""
    (rows, groups, padded, dim), (copies, heads) = output.shape, q.shape[:2]
    output = output if padded * groups == heads else output[:, :, : heads // groups]
    output = output.reshape(rows, 1, heads, dim)
    return output if rows == copies else output.expand(copies, -1, -1, -1)


# ---------------------------------------------------------------- 16 bits


def attend_aligned(
    module: Any, q: Tensor, keys: Tensor, values: Tensor, mask: Any, *, scaling: float
) -> tuple[Tensor, None]:
    """Compute attention [B, 1, heads, dim] of one token a row in 16 bits. mask: of _for_parts."""
    (rows, groups, _, dim), (seen, hidden) = keys.shape, mask
    queries = q[:rows].reshape(rows, groups, -1, dim)
    queries = labs_decode.padded(queries, queries_multiple(q.dtype, dim))
    if hidden is None:
        return of_heads(labs_decode.flash(queries, keys, values, seen, scaling)[0], q), None
    queries = queries.flatten(0, 1)[:, None].expand(-1, seen.shape[1], -1, -1)
    keys, values = (each.reshape(*seen.shape[:2], SUMMED, -1) for each in (keys, values))
    output, sums = labs_decode.flash(queries, keys, values, seen, scaling)
    output = labs_decode.combined(output, sums.masked_fill(hidden, -torch.inf))
    return of_heads(output.view(rows, groups, *output.shape[1:]), q), None


@functools.cache
def queries_multiple(dtype: torch.dtype, dim: int) -> int:
    """Return 4 if so many queries give a row the same bits in any company here, else ALIGNED.

    Four take three quarters of the time, but leave the buffers of every second thread unaligned,
    which a library for products may mind.
    """
    rows = 33
    for columns in (COLUMNS, 2 * COLUMNS, SUMMED):
        counts = [rows * dim * FEWEST, *[rows * dim * columns] * 2]
        numbers = torch.arange(sum(counts)).sin().mul(1e4).sin().to(dtype)
        q, k, v = (each.view(rows, 1, -1, dim) for each in torch.split(numbers, counts))
        together = labs_decode.flash(q, k, v, None, 1.0)[0]
        for i in range(rows):
            alone = labs_decode.flash(q[i : i + 1], k[i : i + 1], v[i : i + 1], None, 1.0)[0]
            if not torch.equal(alone[0], together[i]):
                return labs_decode.ALIGNED
    return FEWEST
