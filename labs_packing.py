# SPDX-License-Identifier: Apache-2.0
"""Weights in the form of their products on a CPU: oneDNN's blocks, or 16, 8 and 4 bits.

    packed = labs_packing.PACKINGS["int8"](linear.weight.detach())  # [out, in]
    y = packed.multiply(x, linear.bias)  # x [..., in] to [..., out]

labs_fast.py replaces the linear layers of a model by these. This file needs labs_decode.py.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
import mmap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch

import labs_decode
from labs_decode import Tensor

PACKED_ROWS = 16  # rows that oneDNN chooses its blocks for, as fast for 1 row and for 256
STEP_ROWS = 32  # at most, of a step or of guesses: see labs_products
INT4_GROUP = 32  # 4-bit weights that share a scale
ROWS_AT_ONCE = 512  # of a weight: a copy of an output layer in float32 would be the peak of memory
MADV_PAGEOUT = 21  # Linux; Python's mmap does not name it
OFF_GRID = 0.1  # of a step: bfloat16 rounds by less, and numbers of a finer grid are further off
Rows = Callable[[Tensor], Tensor]  # x [N, in] to [N, out]
Multiply = Callable[[Tensor, Tensor | None], Tensor]


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A weight in the form of its product: multiply(x [..., in], bias [out] or None); unpack().

    tensors: those of int8_product or int4_product, if it is one of these. rows: the product of
    x [N, in] in the weight's dtype, without a bias, if fewer Python calls lead to the kernel so.
    """

    multiply: Multiply
    unpack: Callable[[], Tensor]
    nbytes: int
    tensors: tuple[Tensor, ...] = ()
    rows: Rows | None = None


Packing = Callable[[Tensor], PackedWeight]
Make = Callable[[str, Packing, Sequence[Tensor]], PackedWeight]  # of weights that share an input


def as_one(name: str, packing: Packing, weights: Sequence[Tensor]) -> PackedWeight:
    """Pack the weights [out, in] of layers that share an input as one. name: of these layers."""
    return packing(torch.cat([*weights]) if len(weights) > 1 else weights[0])


def dense_weight(weight: Tensor) -> PackedWeight:
    """Return a weight as it is, for fused layers: a GPU launches one kernel instead of three."""
    linear = torch.nn.functional.linear
    return PackedWeight(lambda x, bias: linear(x, weight, bias), lambda: weight, weight.nbytes)


def onednn_weight(weight: Tensor) -> PackedWeight:
    """Reorder a weight into oneDNN's blocks; otherwise oneDNN does this at every call.

    A step takes 0.6 to 0.8 of the time. Two or more rows have the same bits as any number of rows,
    which MKL's products in float32 do not give.
    """
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, PACKED_ROWS)
    linear = torch.ops.mkldnn._linear_pointwise.default
    multiply = lambda x, bias: linear(x, packed, bias, "none", [], "")  # noqa: E731
    rows = lambda x: linear(x, packed, None, "none", [], "")  # noqa: E731
    return PackedWeight(multiply, packed.to_dense, weight.nbytes, rows=rows)  # weight is freed


def fp16_weight(weight: Tensor) -> PackedWeight:
    """Keep a weight in 16 bits; products and sums stay in float32 (FBGEMM's kernel).

    Without bfloat16, a step takes half the time of float32. Weights of bfloat16 lose less than
    float32 rounds off. The kernel takes six rows at a time, and rounds a rest of one or two rows
    differently: zeros beside them make three.
    """
    if float(weight.abs().max()) > torch.finfo(torch.float16).max:
        return onednn_weight(weight)
    packed = torch.ops.quantized.linear_prepack_fp16(weight.float(), None)
    kernel, pad = torch.ops.quantized.linear_dynamic_fp16, torch.nn.functional.pad

    def product(x: Tensor) -> Tensor:
        if not (more := {1: 2, 2: 1}.get(len(x) % 6, 0)):
            return cast("Tensor", kernel(x, packed))
        return cast("Tensor", kernel(pad(x, (0, 0, 0, more)), packed)[: len(x)])

    unpack = lambda: torch.ops.quantized.linear_unpack_fp16(packed)[0]  # noqa: E731
    return PackedWeight(_by_rows(product, torch.float32), unpack, 2 * weight.numel())


def has_fp16_kernel() -> bool:
    """Return whether float32 products with weights in 16 bits are faster here than without."""
    with contextlib.suppress(Exception):  # a build of torch without FBGEMM raises any error
        return not labs_decode.has_bf16("cpu") and bool(fp16_weight(torch.eye(2)).unpack().any())
    return False


def has_quantised_kernels() -> bool:
    """Return whether torch's kernels for 4 and 8 bits are faster here than those for 16."""
    return "AVX512" in torch.backends.cpu.get_cpu_capability()


def gguf_weight(weight: Tensor) -> PackedWeight:
    """Take over 4-bit numbers with their scales (Q4_0, Q4_1, Q4_K); round others to 8 bits."""
    if weight.shape[1] % INT4_GROUP == 0:
        parts = torch.split(weight, ROWS_AT_ONCE)
        found = (grid_of(_groups(part)) for part in parts)
        grids = [each for each in itertools.takewhile(bool, found) if each]
        if len(grids) == len(parts):
            return int4_weight(weight, grids)
    return int8_weight(weight)


def grid_of(groups: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return (lowest numbers, steps) if each group's numbers are its lowest plus up to 15 steps.

    groups [out, n, INT4_GROUP], of 16 or 32 bits: rounded numbers are near their step.
    """
    low, span = groups.amin(-1), groups.amax(-1) - groups.amin(-1)
    steps, left = span.clone(), span > 0
    for count in range(15, 0, -1):
        step = span[left] / count
        levels = (groups[left] - low[left][:, None]) / step[:, None]
        fits = (levels - levels.round()).abs_().amax(-1) < OFF_GRID
        steps[left] = torch.where(fits, step, steps[left])
        left[left.clone()] = ~fits
        if not left.any():
            break
    return None if left.any() else (low, steps)


def _groups(weight: Tensor) -> Tensor:
    """Return a weight [out, in] as float32 groups, with rows added to a multiple of 16."""
    padded = torch.nn.functional.pad(weight.float(), (0, 0, 0, -len(weight) % 16))
    return padded.view(len(padded), -1, INT4_GROUP)


def int4_weight(weight: Tensor, grids: Sequence[tuple[Tensor, Tensor]] = ()) -> PackedWeight:
    """Round to 4-bit numbers with a scale and a zero point for each INT4_GROUP of them, as in Q4_1.

    It is faster for few rows and slower for many, as each row unpacks it. Rows keep their bits.
    grids: as of grid_of, for each ROWS_AT_ONCE rows.
    """
    parts = itertools.zip_longest(torch.split(weight, ROWS_AT_ONCE), grids)
    levels, scales = _joined(_rounded_to_int4(_groups(part), grid) for part, grid in parts)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(levels.int(), 1)
    scales = scales.transpose(0, 1).contiguous()
    return int4_product(packed, scales, len(weight), weight.dtype)


def int4_product(packed: Tensor, scales: Tensor, lines: int, dtype: torch.dtype) -> PackedWeight:
    """Return the weight of the kernel's tensors [padded, in / 2], [in / INT4_GROUP, padded, 2].

    lines, dtype: those of the weight, whose lines are padded to a multiple of 16.
    """
    kernel, columns = torch._weight_int4pack_mm_for_cpu, len(scales) * INT4_GROUP
    whole = functools.partial(kernel, mat2=packed, qGroupSize=INT4_GROUP, qScaleAndZeros=scales)
    product = (lambda x: whole(x)[:, :lines]) if lines % 16 else whole
    unpack = lambda: _by_rows(product)(torch.eye(columns), None).t().contiguous()  # noqa: E731
    return _in_bf16(product, unpack, (packed, scales), dtype)


def _rounded_to_int4(groups: Tensor, grid: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    """Return levels [out, in] from 0 to 15, and steps and zeros [out, n, 2] as the kernel has."""
    low, steps = grid or (groups.amin(-1), (groups.amax(-1) - groups.amin(-1)) / 15)
    steps = steps.clamp_min(torch.finfo(torch.float32).tiny)
    levels = ((groups - low[..., None]) / steps[..., None]).round_().clamp_(0, 15)
    scales = torch.stack([steps, low + 8 * steps], -1)  # the kernel's zero is in the middle
    return levels.to(torch.uint8).flatten(1), scales.bfloat16()


def int8_weight(weight: Tensor) -> PackedWeight:
    """Round to 8-bit numbers with a scale for each output, otherwise as int4_weight."""
    packed, scales = _joined(map(_rounded_to_int8, torch.split(weight, ROWS_AT_ONCE)))
    return int8_product(packed, scales, weight.dtype)


def int8_product(packed: Tensor, scales: Tensor, dtype: torch.dtype) -> PackedWeight:
    """Return the weight of numbers [out, in] and scales [out]. dtype: that of `unpack`."""
    product = functools.partial(torch._weight_int8pack_mm, mat2=packed, scales=scales)
    unpack = lambda: packed.to(dtype) * scales[:, None]  # noqa: E731
    return _in_bf16(product, unpack, (packed, scales), dtype)


def _rounded_to_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return 8-bit numbers [out, in] and the scale [out] of each row."""
    weight = weight.float()
    steps = weight.abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny) / 127
    return (weight / steps[:, None]).round_().to(torch.int8), steps.bfloat16()


def _joined(parts: Iterable[tuple[Tensor, ...]]) -> list[Tensor]:
    return [torch.cat(each) for each in zip(*parts, strict=True)]


def with_more_bits_for_prompts(packed: PackedWeight, weights: Sequence[Tensor]) -> PackedWeight:
    """Compute more rows than STEP_ROWS with the weights themselves, of which the file stays mapped.

    Numbers of few bits are unpacked for each row, so that a prompt would take three times as long.
    """
    few = packed.rows or (lambda x: packed.multiply(x, None))

    def rows(x: Tensor) -> Tensor:
        if len(x) <= STEP_ROWS:
            return few(x)
        return torch.cat([torch.nn.functional.linear(x, weight) for weight in weights], -1)

    return replace(packed, multiply=_by_rows(rows, weights[0].dtype), rows=rows)


def _by_rows(kernel: Rows, own: torch.dtype = torch.bfloat16) -> Multiply:
    """Return a linear layer's product from a kernel that takes rows [N, in] of a dtype, no bias."""

    def multiply(x: Tensor, bias: Tensor | None) -> Tensor:
        if x.ndim != 2:
            return multiply(x.reshape(-1, x.shape[-1]), bias).view(*x.shape[:-1], -1)
        lines = x.contiguous()  # as some kernels need them
        product = kernel(lines) if x.dtype == own else kernel(lines.to(own)).to(x.dtype)
        return product if bias is None else product + bias

    return multiply


def _in_bf16(kernel: Rows, unpack: Any, tensors: Sequence[Tensor], dtype: Any) -> PackedWeight:
    """Return a weight of a kernel that is ten times slower in other types than bfloat16."""
    rows = kernel if dtype == torch.bfloat16 else None
    size = sum(each.nbytes for each in tensors)
    return PackedWeight(_by_rows(kernel), unpack, size, (*tensors,), rows)


PACKINGS = {"none": onednn_weight, "fp16": fp16_weight, "int8": int8_weight}
PACKINGS |= {"int4": int4_weight, "gguf": gguf_weight}


# ---------------------------------------------------------------- the machine


def give_back(weights: Sequence[Tensor]) -> None:
    """Give the system the memory of weights that are not read again soon, and what packing left.

    A model's file is mapped: until all of it is unmapped, its pages count as this process's memory.
    """
    page = mmap.PAGESIZE
    with contextlib.suppress(OSError, AttributeError):  # other systems have other names
        library = ctypes.CDLL(None)
        for at, size in ((weight.data_ptr(), weight.nbytes) for weight in weights):
            first, end = at + -at % page, (at + size) // page * page
            span = map(ctypes.c_size_t, (first, max(0, end - first)))
            library.madvise(*span, MADV_PAGEOUT)  # weights that are read again come back
        library.malloc_trim(0)
