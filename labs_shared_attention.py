# SPDX-License-Identifier: Apache-2.0
"""Attention of a step on a CPU to slots of labs_shared.py: to shared columns, then to a row's own.

    function, masks = labs_shared_attention.of_step(512, x, layer, masks)

A row has the bits that labs_attention.py gives it alone: the same columns are summed in the same
order. This file needs labs_attention.py, labs_decode.py and labs_kernels.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

import labs_decode
from labs_attention import Masks, for_heads
from labs_decode import SUMMED, Pair, Tensor, padded
from labs_kernels import FEWEST, queries_multiple

Attention = Callable[..., tuple[Tensor, None]]

LINES, MOST = 24, 48  # a product with shared columns has one of these numbers of lines


def of_step(shared: int, x: Tensor, layer: Any, masks: Masks) -> tuple[Attention, Masks]:
    """Return a function of transformers' kind and its masks, for rows that share first columns."""
    exact, pairs = x.dtype == torch.float32, {}
    for kind, mask in masks.items():
        own = mask[..., shared:] if exact else mask[..., shared // SUMMED * SUMMED :]
        own = for_heads(own, layer.groups, layer.heads // layer.groups) if exact else own
        pairs[kind] = _of_shared(mask[..., :shared], layer.heads // layer.groups), own
    return attend_exactly if exact else attend_in_parts, pairs


def _of_shared(mask: Tensor, queries: int) -> Tensor:
    """Return the mask [B, 1, 1, S] of the shared columns as [1, B * N, S], or zeros [1, 1, S]."""
    if not mask.any():  # no row's window hides them
        return mask.new_zeros((1, 1, mask.shape[-1]))
    return mask.expand(-1, -1, queries, -1).reshape(1, -1, mask.shape[-1])


# ---------------------------------------------------------------- float32


def attend_exactly(
    module: Any, q: Tensor, keys: Pair, values: Pair, masks: Pair, *, scaling: float
) -> tuple[Tensor, None]:
    """Compute attention [B, 1, heads, dim] in float32 for rows that share their first columns.

    keys, values: the shared ones [groups, S, dim] and the rows' own [B, groups, T, dim].
    """
    rows, groups = keys[1].shape[:2]
    queries = q[:rows].reshape(rows, groups, -1, q.shape[-1])
    each, alone = queries.shape[2], at_least(queries.flatten(0, 1))
    together = queries.transpose(0, 1).reshape(groups, rows * each, -1)
    first = _in_pieces(labs_decode.product, together, keys[0].transpose(1, 2))
    first = torch.add(masks[0], first, alpha=scaling).view(groups, rows, each, -1).transpose(0, 1)
    keys_t = keys[1].flatten(0, 1).transpose(1, 2)
    own = torch.add(masks[1], labs_decode.product(alone, keys_t), alpha=scaling)[:, :each]
    weights = torch.cat([first, own.reshape(rows, groups, each, -1)], -1).softmax(-1)
    return of_heads(_weighted(weights, values), q), None


def _weighted(weights: Tensor, values: Pair) -> Tensor:
    """Return weights [B, groups, N, S + T] @ values, in the order of labs_decode.weighted."""
    rows, groups, each, _ = weights.shape
    whole, sums = values[0].shape[1] // SUMMED * SUMMED, list[Tensor]()
    if whole:
        together = weights[..., :whole].transpose(0, 1).reshape(groups, rows * each, whole)
        first = _in_pieces(labs_decode.weighted, together, values[0][:, :whole])
        sums.append(first.view(groups, rows, each, -1).transpose(0, 1))
    parts = [piece for part in _own_parts(values) for piece in torch.split(part, SUMMED, 1)]
    own = at_least(weights[..., whole:].flatten(0, 1))
    pairs = zip(torch.split(own, [part.shape[1] for part in parts], -1), parts, strict=True)
    sums += [labs_decode.product(w, v)[:, :each].reshape(rows, groups, each, -1) for w, v in pairs]
    return functools.reduce(torch.add, sums)


def _in_pieces(
    function: Callable[[Tensor, Tensor], Tensor], lines: Tensor, other: Tensor
) -> Tensor:
    """Return what a function makes of lines [groups, L, ...], for MOST lines at a time.

    Libraries round by the number of lines, so a product has LINES or MOST: labs_shared tries both.
    """
    parts = torch.split(lines, MOST, 1)
    found = [function(padded(part, LINES), other)[:, : part.shape[1]] for part in parts]
    return torch.cat(found, 1)


# ---------------------------------------------------------------- 16 bits


def attend_in_parts(
    module: Any, q: Tensor, keys: Pair, values: Pair, masks: Pair, *, scaling: float
) -> tuple[Tensor, None]:
    """Compute attention of one token a row in 16 bits for rows that share their first columns.

    As labs_decode.attention_invariant does it: SUMMED columns each, weighted by their sums.
    """
    rows, groups = keys[1].shape[:2]
    queries = q[:rows].reshape(rows * groups, -1, q.shape[-1])
    found, at = list[Sequence[Tensor]](), keys[0].shape[1] // SUMMED * SUMMED
    if at:
        found.append(_to_shared(queries, keys[0][:, :at], values[0][:, :at], masks[0], scaling))
    at, mask = 0, masks[1].expand(-1, groups, -1, -1).flatten(0, 1)
    each, queries = queries.shape[1], padded(queries, queries_multiple(q.dtype, q.shape[-1]))
    for k, v in zip(_own_parts(keys), _own_parts(values), strict=True):
        part = mask[..., at : (at := at + k.shape[1])]
        pieces = labs_decode.flash_parts(queries, k, v, part, scaling)
        found.append([piece[:, :, :each] for piece in pieces])
    output = labs_decode.combined(*(torch.cat(pieces, 1) for pieces in zip(*found, strict=True)))
    return of_heads(output.view(rows, groups, *output.shape[1:]), q), None


def _to_shared(queries: Tensor, k: Tensor, v: Tensor, mask: Tensor, scaling: float) -> Pair:
    """Return attention of all queries [B * groups, N, dim] to shared k, v, as flash_parts does."""
    groups, each = len(k), queries.shape[1]
    together = queries.view(-1, groups, *queries.shape[1:]).transpose(0, 1).flatten(1, 2)
    parts, mask = torch.split(together, MOST, 1), mask[..., : k.shape[1]]
    masks = torch.split(mask, MOST, 1) if mask.shape[1] > 1 else [mask] * len(parts)
    found = []
    for part, seen in zip(parts, masks, strict=True):
        seen = (padded(seen, LINES) if seen.shape[1] > 1 else seen).expand(groups, -1, -1)
        pieces = labs_decode.flash_parts(padded(part, LINES), k, v, seen, scaling)
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


# ---------------------------------------------------------------- heads


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
