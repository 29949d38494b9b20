# SPDX-License-Identifier: Apache-2.0
"""Products that give a row the same bits however many rows share a call, on a CPU.

    tried = labs_products.steady(weights)  # labs_fast.FusedWeight
    decoder = labs_products.steadied(decoder)

What rounds otherwise with another number of rows depends on the CPU, so it is tried at load.
This file needs labs_decode.py and labs_packing.py.
"""

from __future__ import annotations

import collections
import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch

import labs_decode
from labs_decode import Decoder, Tensor
from labs_packing import STEP_ROWS, Multiply, PackedWeight, Rows

SAMPLE = 16  # lines of a weight whose products are compared
# Numbers of rows that longer products are cut to: few, as each takes oneDNN 2 ms the first time,
# and fast ones with AMX. Without it, all numbers of rows round alike, which the others show.
SIZES, OTHERS = (48, 64, 96, 144, 208, labs_decode.CHUNK), (STEP_ROWS, STEP_ROWS + 1, 255)
ANY = (0,)  # any number of rows


# ---------------------------------------------------------------- packed weights


def sample(weight: Tensor) -> Tensor:
    """Return some lines of a weight, which `steady` needs."""
    return weight[torch.linspace(0, len(weight) - 1, SAMPLE).long()].clone()


@torch.inference_mode()
def steady(weights: Iterable[Any], sizes: Sequence[int] = SIZES) -> bool:
    """Make the bits of a row independent of other rows; return whether those of prompts are.

    Changes `packed` of weights whose kernel needs it. One row is computed beside copies of itself,
    where it has other bits alone. More than STEP_ROWS rows are cut and padded to `sizes` with the
    same bits, where their number changes these (oneDNN with AMX); () leaves them as they are. A
    prompt then has the same bits beside others if each has more than STEP_ROWS tokens. The first
    weight of each shape tells it for all of them, but for those that have no sample.
    """
    known: dict[Any, tuple[bool, Sequence[int]]] = {}
    kept = True
    for fused in weights:
        if fused.sample is None:
            kept = False
            continue
        shape = sum(fused.sizes), fused.sample.shape, fused.packed.rows is None
        if shape not in known:
            multiply, x = fused.packed.multiply, _cancelling(fused.sample)
            known[shape] = _rounds_otherwise_alone(multiply, x), _alike(multiply, x, sizes)
        alone, alike = known[shape]
        kept &= bool(alike)
        cuts = alike if alike != ANY else ()
        if alone or cuts:
            fused.packed = _in_sizes(fused.packed, alone, cuts)
        fused.sample = None
    return kept


def _cancelling(lines: Tensor) -> Tensor:
    """Return rows [n, in] whose products show how a kernel rounds. lines: of its weight [n, in].

    Of common numbers, 16 bits would hide most of it. A line of the weight whose numbers are
    exchanged in pairs, one of each negated, times that line is 0, but for what its sum rounds off.
    """
    columns = lines.shape[1]
    pairs = torch.randperm(columns, generator=torch.Generator().manual_seed(0))
    a, b = pairs[: columns // 2], pairs[columns // 2 : columns // 2 * 2]
    x = torch.zeros_like(lines)
    x[:, a], x[:, b] = lines[:, b], -lines[:, a]
    return x


def _rounds_otherwise_alone(multiply: Multiply, x: Tensor) -> bool:
    alone = torch.cat([multiply(row.clone(), None) for row in torch.split(x, 1)])
    return not torch.equal(alone, multiply(x, None))


def _alike(multiply: Multiply, x: Tensor, sizes: Sequence[int]) -> Sequence[int]:
    """Return as many of these sizes as have the same bits; ANY if no number of rows changes any."""
    kinds = collections.defaultdict[bytes, list[int]](list)

    def repeats(first: Tensor, size: int) -> bool:
        return torch.equal(multiply(_lines(x, size), None), _lines(first, size))

    if sizes and all(repeats(multiply(x, None), size) for size in (*OTHERS, sizes[-1])):
        return ANY
    for size in sizes:
        first = multiply(_lines(x, size), None)[: len(x)]
        if repeats(first, size):  # else a row's place among others changes its bits
            kinds[first.contiguous().view(torch.uint8).numpy().tobytes()].append(size)
    return max(kinds.values(), key=len, default=())


def _lines(x: Tensor, count: int) -> Tensor:
    return x.repeat(math.ceil(count / len(x)), 1)[:count]


def _in_sizes(packed: PackedWeight, copies: bool, sizes: Sequence[int]) -> PackedWeight:
    """Return a weight whose kernel gets only steady numbers of rows.

    copies: one row comes beside copies of itself. sizes: to which more than STEP_ROWS are cut.
    """
    several, direct, most = packed.multiply, packed.rows, max(sizes, default=0)

    def through(product: Rows, x: Tensor) -> Tensor:
        count = len(x)
        if count == 1 and copies:
            return product(torch.cat([x] * labs_decode.LONE_ROW_COPIES)).narrow(0, 0, 1)
        if count <= STEP_ROWS or not most:
            return product(x)
        pieces = math.ceil(count / most)
        size = min(each for each in sizes if each * pieces >= count)
        if more := pieces * size - count:
            x = torch.cat([x, x.new_zeros((more, x.shape[-1]))])
        parts = [product(part) for part in torch.split(x, size)] if pieces > 1 else [product(x)]
        return (torch.cat(parts) if pieces > 1 else parts[0]).narrow(0, 0, count)

    def multiply(x: Tensor, bias: Tensor | None) -> Tensor:
        lines = through(lambda rows: several(rows, bias), x.reshape(-1, x.shape[-1]))
        return lines.view(*x.shape[:-1], lines.shape[-1])

    return replace(packed, multiply=multiply, rows=direct and functools.partial(through, direct))


# ---------------------------------------------------------------- whole models


@torch.inference_mode()
def steadied(decoder: Decoder) -> Decoder:
    """Limit the rows per call of an invariant decoder to a number that does not change their bits.

    With AMX, products of more than 32 rows in bf16 round differently. If the number of rows changes
    even smaller products, the decoder is not invariant.
    """
    if not decoder.invariant:
        return decoder
    head, dtype = decoder.model.get_output_embeddings(), decoder.model.dtype
    layers = {
        (type(layer), layer.in_features, layer.out_features): layer
        for layer in decoder.model.modules()
        if layer is not head and hasattr(layer, "in_features") and hasattr(layer, "out_features")
    }
    fewest = 2 if decoder.duplicates_lone_row else 1
    if any(_rounds_otherwise(layer, dtype, (fewest, 4, 17)) for layer in layers.values()):
        return labs_decode.with_invariance(decoder, False)
    large = torch.nn.Linear(1024, 1024, dtype=dtype)  # small products hardly show a difference
    several = [*layers.values(), *([large] if layers and dtype != torch.float32 else [])]
    changes = any(_rounds_otherwise(layer, dtype, (8 * STEP_ROWS,)) for layer in several)
    return replace(decoder, steady=STEP_ROWS if changes else 0)


def _rounds_otherwise(layer: Any, dtype: torch.dtype, sizes: tuple[int, ...]) -> bool:
    """Return whether products of these numbers of rows differ from those of STEP_ROWS rows."""
    x = torch.linspace(-3, 3, max(*sizes, STEP_ROWS) * layer.in_features).sin().mul(1000).sin()
    x = x.view(-1, layer.in_features).to(dtype)
    parts = [layer(part.clone()) for part in torch.split(x, STEP_ROWS)]
    if not isinstance(parts[0], Tensor):  # of a router of experts
        return False
    return any(not torch.equal(layer(x[:n].clone()), torch.cat(parts)[:n]) for n in sizes)
