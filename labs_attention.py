# SPDX-License-Identifier: Apache-2.0
"""Attention of a step on a CPU for labs_forward.py: each row to its own slot, or to shared columns.

    found = labs_attention.of_step(cache, x, layer, masks)   # a function and its masks, or None

A row has the same bits either way: a product of four or more rows on MKL gives each row the bits
that it has in any such product, and sums go over the same SUMMED columns in the same order.
This file needs labs_decode.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

import labs_decode
from labs_decode import COLUMNS, SUMMED, Pair, Tensor

FEWEST = 4  # queries of a product: in float32, fewer round otherwise, and take no less time
FLASH = torch._scaled_dot_product_flash_attention_for_cpu
MOST = 128  # queries of a call in 16 bits: with more, the kernel makes larger products of them
Masks = dict[str, Any]
Attention = Callable[..., tuple[Tensor, None]]


def of_step(cache: Any, x: Tensor, layer: Any, masks: Masks) -> tuple[Attention, Masks] | None:
    """Return attention for the next step and its masks; None to take the registered attention.

    x: the embedded tokens. layer: has `heads`, and `groups` of them that share keys. masks: by kind
    of layer, [B, 1, 1, T], to be added to scores.
    """
    shared, exact = cache.cursor.shared, x.dtype == torch.float32
    if not x.is_cpu:
        return None
    if not shared:
        make = _for_heads if exact else _for_parts
        return attend if exact else attend_aligned, {kind: make(masks[kind], layer) for kind in masks}
    pairs = {}
    for kind, mask in masks.items():
        own = mask[..., shared:] if exact else mask[..., shared // SUMMED * SUMMED :]
        own = _for_heads(own, layer) if exact else own
        pairs[kind] = _of_shared(mask[..., :shared], layer.heads // layer.groups), own
    return attend_exactly if exact else attend_in_parts, pairs


def _for_heads(mask: Tensor, layer: Any) -> Tensor:
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


def _of_shared(mask: Tensor, queries: int) -> Tensor:
    """Return the mask [B, 1, 1, S] of the shared columns as [1, B * N, S], or zeros [1, 1, S]."""
    if not mask.any():  # no row's window hides them
        return mask.new_zeros((1, 1, mask.shape[-1]))
    return mask.expand(-1, -1, queries, -1).reshape(1, -1, mask.shape[-1])


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
    queries = _at_least(q[:rows].reshape(rows * groups, -1, q.shape[-1]))
    scores = torch.baddbmm(mask, queries, keys.transpose(1, 2), alpha=scaling)
    output = labs_decode.weighted(scores.softmax(-1), values)
    return _of_heads(output.view(rows, groups, *output.shape[1:]), q), None


def attend_exactly(
    module: Any, q: Tensor, keys: Pair, values: Pair, masks: Pair, *, scaling: float
) -> tuple[Tensor, None]:
    """Compute `attend` for rows that share their first columns.

    keys, values: the shared ones [groups, S, dim] and the rows' own [B, groups, T, dim].
    """
    rows, groups = keys[1].shape[:2]
    queries = q[:rows].reshape(rows, groups, -1, q.shape[-1])
    each, alone = queries.shape[2], _at_least(queries.flatten(0, 1))
    together = _at_least(queries.transpose(0, 1).reshape(groups, rows * each, -1))
    mask = _at_least(masks[0]) if masks[0].shape[1] > 1 else masks[0]
    mask = mask.expand(groups, -1, -1)
    first = torch.baddbmm(mask, together, keys[0].transpose(1, 2), alpha=scaling)
    first = first[:, : rows * each].reshape(groups, rows, each, -1).transpose(0, 1)
    keys_t = keys[1].flatten(0, 1).transpose(1, 2)
    own = torch.baddbmm(masks[1], alone, keys_t, alpha=scaling)[:, :each]
    weights = torch.cat([first, own.reshape(rows, groups, each, -1)], -1).softmax(-1)
    return _of_heads(_weighted(weights, values), q), None


def _weighted(weights: Tensor, values: Pair) -> Tensor:
    """Return weights [B, groups, N, S + T] @ values, in the order of labs_decode.weighted."""
    rows, groups, each, _ = weights.shape
    whole, sums = values[0].shape[1] // SUMMED * SUMMED, list[Tensor]()
    if whole:
        together = weights[..., :whole].transpose(0, 1).reshape(groups, rows * each, whole)
        first = labs_decode.weighted(_at_least(together), values[0][:, :whole])[:, : rows * each]
        sums.append(first.reshape(groups, rows, each, -1).transpose(0, 1))
    parts = [piece for part in _own_parts(values) for piece in torch.split(part, SUMMED, 1)]
    own = _at_least(weights[..., whole:].flatten(0, 1))
    pairs = zip(torch.split(own, [part.shape[1] for part in parts], -1), parts, strict=True)
    sums += [torch.matmul(w, v)[:, :each].reshape(rows, groups, each, -1) for w, v in pairs]
    return functools.reduce(torch.add, sums)


def _at_least(lines: Tensor) -> Tensor:
    """Return [N, L, ...] with zeros for at least FEWEST lines."""
    missing = FEWEST - lines.shape[1]
    return torch.nn.functional.pad(lines, (0, 0, 0, missing)) if missing > 0 else lines


def _of_heads(output: Tensor, q: Tensor) -> Tensor:
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
    if short := -queries.shape[2] % _multiple(q.dtype, dim):
        queries = torch.nn.functional.pad(queries, (0, 0, 0, short))
    if hidden is None:
        return _of_heads(FLASH(queries, keys, values, attn_mask=seen, scale=scaling)[0], q), None
    queries = queries.flatten(0, 1)[:, None].expand(-1, seen.shape[1], -1, -1)
    keys, values = (each.reshape(*seen.shape[:2], SUMMED, -1) for each in (keys, values))
    output, sums = FLASH(queries, keys, values, attn_mask=seen, scale=scaling)
    output = labs_decode.combined(output, sums.masked_fill(hidden, -torch.inf))
    return _of_heads(output.view(rows, groups, *output.shape[1:]), q), None


@functools.cache
def _multiple(dtype: torch.dtype, dim: int) -> int:
    """Return 4 if so many queries give a row the same bits in any company here, else ALIGNED.

    Four take three quarters of the time, but leave the buffers of every second thread unaligned,
    which a library for products may mind.
    """
    rows = 33
    for columns in (COLUMNS, 2 * COLUMNS, SUMMED):
        counts = [rows * dim * FEWEST, *[rows * dim * columns] * 2]
        numbers = torch.arange(sum(counts)).sin().mul(1e4).sin().to(dtype)
        q, k, v = (each.view(rows, 1, -1, dim) for each in torch.split(numbers, counts))
        together = FLASH(q, k, v, scale=1.0)[0]
        for i in (0, 1, rows // 2, rows - 1):
            alone = FLASH(*(each[i : i + 1] for each in (q, k, v)), scale=1.0)[0]
            if not torch.equal(alone[0], together[i]):
                return labs_decode.ALIGNED
    return FEWEST


def attend_in_parts(
    module: Any, q: Tensor, keys: Pair, values: Pair, masks: Pair, *, scaling: float
) -> tuple[Tensor, None]:
    """Compute attention of one token a row in 16 bits for rows that share their first columns.

    As labs_decode.attention_invariant does it: SUMMED columns each, weighted by their sums.
    """
    rows, groups = keys[1].shape[:2]
    queries = q[:rows].reshape(rows * groups, -1, q.shape[-1])
    found, at = [], keys[0].shape[1] // SUMMED * SUMMED
    if at:
        found.append(_to_shared(queries, keys[0][:, :at], values[0][:, :at], masks[0], scaling))
    at, mask = 0, masks[1].expand(-1, groups, -1, -1).flatten(0, 1)
    for k, v in zip(_own_parts(keys), _own_parts(values), strict=True):
        part = mask[..., at : (at := at + k.shape[1])]
        multiple = _multiple(q.dtype, k.shape[2])
        output, sums = labs_decode.flash_parts(queries, k, v, part, scaling, multiple)
        found.append((output[:, :, : queries.shape[1]], sums[:, :, : queries.shape[1]]))
    output = labs_decode.combined(*(torch.cat(each, 1) for each in zip(*found, strict=True)))
    return _of_heads(output.view(rows, groups, *output.shape[1:]), q), None


def _to_shared(queries: Tensor, k: Tensor, v: Tensor, mask: Tensor, scaling: float) -> Pair:
    """Return attention of all queries [B * groups, N, dim] to shared k, v, as flash_parts does."""
    groups, each = len(k), queries.shape[1]
    together = queries.view(-1, groups, *queries.shape[1:]).transpose(0, 1).flatten(1, 2)
    parts, mask = torch.split(together, MOST, 1), mask[..., : k.shape[1]]
    multiple = _multiple(k.dtype, k.shape[2])
    masks = torch.split(mask, MOST, 1) if mask.shape[1] > 1 else [mask] * len(parts)
    found = []
    for part, seen in zip(parts, masks, strict=True):
        seen = seen.expand(groups, -1, -1)
        pieces = labs_decode.flash_parts(part, k, v, seen, scaling, multiple)
        found.append([piece[:, :, : part.shape[1]] for piece in pieces])
    output, sums = (torch.cat(pieces, 2) for pieces in zip(*found, strict=True))
    rows = len(queries) // groups  # [groups, parts, B * N, ...] to [B, groups, parts, N, ...]
    output = output.view(groups, -1, rows, each, k.shape[2]).permute(2, 0, 1, 3, 4)
    sums = sums.view(groups, -1, rows, each).permute(2, 0, 1, 3)
    return output.flatten(0, 1), sums.flatten(0, 1)


# ---------------------------------------------------------------- own columns


def _own_parts(states: Pair) -> list[Tensor]:
    """Return what follows the shared whole SUMMED columns, cut as a row alone is: [N, T, dim] each.

    First the remaining shared columns and own ones, SUMMED together, then whole SUMMED, then less.
    """
    shared, own = states
    rest, parts = shared.shape[1] % SUMMED, list[Tensor]()
    if rest:
        tail = shared[None, :, -rest:].expand(len(own), -1, -1, -1)
        parts, own = [torch.cat([tail, own[:, :, : SUMMED - rest]], 2)], own[:, :, SUMMED - rest :]
    whole = own.shape[2] // SUMMED * SUMMED
    parts += [own[:, :, :whole], own[:, :, whole:]]
    return [part.flatten(0, 1) for part in parts if part.shape[2]]
