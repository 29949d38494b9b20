# SPDX-License-Identifier: Apache-2.0
"""Products that give a row the same bits however many rows share a call, on a CPU.

    decoder = labs_products.steadied(decoder, packed)  # packed: each labs_fast.FusedWeight

With which numbers of rows a kernel rounds otherwise depends on the CPU and on torch's number of
threads, so it is tried at load. This file needs labs_decode.py and labs_packing.py.
"""

from __future__ import annotations

import collections
import functools
import math
import os
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch

import labs_decode
from labs_decode import Decoder, Tensor
from labs_packing import STEP_ROWS, Multiply, PackedWeight, Rows

SAMPLE = 16  # lines of a weight whose products are compared
# Numbers of rows of a step, and of longer products: with AMX, only those that round alike are used.
# They are few, as each takes oneDNN up to 2 ms the first time, and fast.
COUNTS = (1, 2, 4, 8, 16, 24, STEP_ROWS)
SIZES = (48, 64, 96, 144, 208, labs_decode.CHUNK)
FREE = (2, 5, 18, 26, 31, STEP_ROWS + 1, 255, labs_decode.CHUNK)  # tried if all may round alike
ANY = (0,)  # in place of sizes: any number of rows
AGAIN = 150  # rows more take as long as reading a weight again

# [n] is the number of rows that n of a step are filled up to, () if none keeps the bits of a row;
# the sizes that longer products are cut into, ANY, or () if none keeps the bits.
Plan = tuple[Sequence[int], Sequence[int]]


@torch.inference_mode()
def steadied(decoder: Decoder, packed: Collection[Any] = ()) -> Decoder:
    """Return an invariant decoder whose calls have no more rows than keep their bits.

    packed: weights as labs_fast.FusedWeight, whose `packed` is changed to call its kernel with
    numbers of rows that round alike. Other linear layers stay as they are: if few rows change their
    bits, or may do so (AMX), the decoder is not invariant; if many do, calls get STEP_ROWS at most.
    """
    if not decoder.invariant:
        return decoder
    head = decoder.model.get_output_embeddings()
    tried = {each for each in packed if each.sample is not None}
    # No more rows than those of a step reach the output layer, but for scores of one request.
    last = tried & {getattr(head, "fused", None)}
    plans = [*_steady(last, ()), *_steady(tried - last, SIZES)]
    others, dtype = _others(decoder, tried), decoder.model.dtype
    fewest = 2 if decoder.duplicates_lone_row else 1
    wrong = any(_rounds_otherwise(each, dtype, (fewest, *FREE[:-3])) for each in others)
    if wrong or not all(fill for fill, _ in plans):
        return labs_decode.with_invariance(decoder, False)
    limited = any(_rounds_otherwise(each, dtype, FREE[-1:]) for each in others)
    limited |= any(sizes != ANY for _, sizes in plans)
    cut = all(sizes for _, sizes in plans) and not others
    return replace(decoder, steady=STEP_ROWS if limited else 0, steady_prompts=cut)


def uses_amx(dtype: torch.dtype) -> bool:
    """Return whether products may run on a CPU's units for matrices, or if this is not known.

    These round in many ways, by the number of rows, the shape of the weight and the threads.
    """
    most = os.environ.get("ONEDNN_MAX_CPU_ISA", "DEFAULT").upper()
    without = most not in ("DEFAULT", "ALL") and "AMX" not in most
    known = getattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    return dtype != torch.float32 and not without and bool(known())


# ---------------------------------------------------------------- packed weights


def sample(weight: Tensor) -> Tensor:
    """Return some lines of a weight [out, in], by whose products `steadied` tries its kernel."""
    return weight[torch.linspace(0, len(weight) - 1, SAMPLE).long()].clone()


def _steady(weights: Iterable[Any], sizes: Sequence[int]) -> list[Plan]:
    """Change weights to keep to their plans, which are returned; the first of a shape is tried."""
    plans: dict[Any, Plan] = {}
    for fused in weights:
        shape = sum(fused.sizes), fused.sample.shape, fused.packed.rows is None
        if shape not in plans:
            plans[shape] = _plan(fused.packed.multiply, _cancelling(fused.sample), sizes)
        if plans[shape] != ((*range(STEP_ROWS + 1),), ANY):
            fused.packed = _planned(fused.packed, *plans[shape])
        fused.sample = None
    return [*plans.values()]


def _plan(multiply: Multiply, x: Tensor, sizes: Sequence[int]) -> Plan:
    """Return how products of x [n, in] keep their bits. sizes: to choose from; () cuts nothing."""

    def alike(count: int, first: Tensor) -> bool:
        parts = torch.split(_lines(x, count * max(1, len(x) // count)), count)
        product = torch.cat([multiply(part.clone(), None) for part in parts])
        return torch.equal(product, _lines(first, len(product)))

    first = multiply(_lines(x, STEP_ROWS), None)[: len(x)].clone()
    if not uses_amx(x.dtype) and all(alike(count, first) for count in FREE):
        lone = 1 if alike(1, first) else labs_decode.LONE_ROW_COPIES
        return (0, lone, *range(2, STEP_ROWS + 1)), ANY
    counts = [count for count in COUNTS if alike(count, first)]
    fill = [0, *(next((c for c in counts if c >= n), 0) for n in range(1, STEP_ROWS + 1))]
    kinds = collections.defaultdict[bytes, list[int]](list)
    for size in sizes:
        product = multiply(_lines(x, size), None)
        first = product[: len(x)].clone()
        if torch.equal(product, _lines(first, size)):  # else a row's place changes its bits
            kinds[first.view(torch.uint8).numpy().tobytes()].append(size)
    chosen = min(kinds.values(), key=_time, default=()) if sizes else ANY
    return fill if fill[-1] else (), chosen


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


def _lines(x: Tensor, count: int) -> Tensor:
    """Return so many rows: those of x, again and again."""
    return x if count == len(x) else torch.cat([x] * math.ceil(count / len(x))).narrow(0, 0, count)


def _time(sizes: Sequence[int]) -> int:
    """Return how long prompts of all lengths take in products of these sizes, in rows."""
    cuts = [_cut(count, sizes) for count in SIZES]
    return sum(pieces * (size + AGAIN) for pieces, size in cuts)


def _cut(count: int, sizes: Sequence[int]) -> tuple[int, int]:
    """Return into how many pieces of which size so many rows are cut."""
    pieces = math.ceil(count / max(sizes))
    return pieces, min(size for size in sizes if size * pieces >= count)


def _planned(packed: PackedWeight, fill: Sequence[int], sizes: Sequence[int]) -> PackedWeight:
    """Return a weight whose kernel gets only numbers of rows that round alike."""
    several, direct = packed.multiply, packed.rows
    cuts = bool(sizes) and sizes != ANY

    def through(product: Rows, x: Tensor) -> Tensor:
        count, pieces = len(x), 1
        size = fill[count] if fill and count <= STEP_ROWS else count
        if cuts and count > STEP_ROWS:
            pieces, size = _cut(count, sizes)
        if pieces == 1:
            return product(x) if size == count else product(_lines(x, size)).narrow(0, 0, count)
        parts = torch.split(_lines(x, pieces * size), size)
        return torch.cat([product(part) for part in parts]).narrow(0, 0, count)

    def multiply(x: Tensor, bias: Tensor | None) -> Tensor:
        lines = through(lambda rows: several(rows, bias), x.reshape(-1, x.shape[-1]))
        return lines.view(*x.shape[:-1], lines.shape[-1])

    return replace(packed, multiply=multiply, rows=direct and functools.partial(through, direct))


# ---------------------------------------------------------------- other layers


def _others(decoder: Decoder, tried: Collection[Any]) -> list[Any]:
    """Return a linear layer of each kind and shape whose weight is not among those tried."""
    head, found = decoder.model.get_output_embeddings(), dict[Any, Any]()
    for layer in decoder.model.modules():
        shape = _width(layer), getattr(layer, "out_features", getattr(layer, "nf", 0))
        if layer is not head and all(shape) and getattr(layer, "fused", None) not in tried:
            found[type(layer), shape] = layer
    return [*found.values()]


def _width(layer: Any) -> int:
    return int(getattr(layer, "in_features", getattr(layer, "nx", 0)))  # nx: of GPT-2's layers


def _rounds_otherwise(layer: Any, dtype: torch.dtype, counts: Sequence[int]) -> bool:
    """Return whether products of so many rows differ from those of STEP_ROWS rows each."""
    width, weight = _width(layer), layer._parameters.get("weight")  # none in a PackedLinear
    if weight is not None and uses_amx(dtype):
        return True
    most = max(*counts, STEP_ROWS)
    x = torch.linspace(-3, 3, most * width).sin().mul(1000).sin().view(-1, STEP_ROWS, width)
    lines = weight.T if hasattr(layer, "nf") else weight
    if lines is not None and lines.shape[1:] == (width,) and lines.is_floating_point():
        x[:, :SAMPLE] = _cancelling(sample(lines))
    x = x.flatten(0, 1).to(dtype)
    parts = [layer(part.clone()) for part in torch.split(x, STEP_ROWS)]
    if not isinstance(parts[0], Tensor):  # of a router of experts
        return False
    return any(not torch.equal(layer(x[:n].clone()), torch.cat(parts)[:n]) for n in counts)
