# SPDX-License-Identifier: Apache-2.0
"""What the kernels of torch do on this machine, found by trying them.

    labs_kernels.packed_types()                          # dtypes that oneDNN packs weights in
    labs_kernels.queries_multiple(torch.bfloat16, 64)    # 4, or 8

This file needs labs_decode.py.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch

import labs_decode
from labs_decode import COLUMNS, SUMMED, Tensor

FEWEST = 4  # queries of a product: in float32, fewer round otherwise, and take no less time
FINE, FINEST = 2 * COLUMNS, COLUMNS // 2  # a step reads up to FINE columns in multiples of FINEST


def packed_types() -> list[torch.dtype]:
    """Return the dtypes of weights that oneDNN can keep in its own blocks."""
    if not (torch._C._has_mkldnn and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return []
    bf16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return [torch.float32, torch.bfloat16] if bf16 else [torch.float32]


@functools.cache
def queries_multiple(dtype: torch.dtype, dim: int) -> int:
    """Return 4 if so many queries give a row the same bits in any company here, else ALIGNED.

    Four take three quarters of the time, but leave the buffers of every second thread unaligned,
    which a library for products may mind.
    """
    rows = 33
    for columns in (COLUMNS, 2 * COLUMNS, SUMMED):
        q, k, v = _states((rows, 1, FEWEST, dim), columns, dtype)
        together = labs_decode.flash(q, k, v, None, 1.0)[0]
        for i in range(rows):
            alone = labs_decode.flash(q[i : i + 1], k[i : i + 1], v[i : i + 1], None, 1.0)[0]
            if not torch.equal(alone[0], together[i]):
                return labs_decode.ALIGNED
    return FEWEST


def _states(shape: tuple[int, int, int, int], columns: int, dtype: torch.dtype) -> list[Tensor]:
    """Return queries [rows, groups, N, dim] of a shape, and keys and values of so many columns."""
    rows, groups, lines, dim = shape
    counts = [rows * groups * dim * each for each in (lines, columns, columns)]
    numbers = torch.arange(sum(counts)).sin().mul(1e4).sin().to(dtype)
    return [each.view(rows, groups, -1, dim) for each in torch.split(numbers, counts)]


def columns_read(cursor: Any, queries: Tensor) -> int:
    """Return how many columns a step reads: `cursor.read_to`, or fewer if these are few.

    queries: [B, groups, N, dim] of the step.
    """
    total: int = cursor.read_to
    if total > FINE or queries.dtype == torch.float32:
        return total
    if not sums_finely(queries.dtype, *queries.shape[2:]):
        return total
    last = cursor.write_from if cursor.write_from >= 0 else int(cursor.positions.max())
    return min(total, last // FINEST * FINEST + FINEST)


@functools.cache
def sums_finely(dtype: torch.dtype, lines: int, dim: int) -> bool:
    """Return whether attention of so many lines to multiples of FINEST columns sums as to FINE."""
    rows = 9
    q, *states = _states((rows, 1, lines, dim), SUMMED, dtype)
    for seen in range(FINEST // 2 - 1, FINE + 1, FINEST // 2):
        mask = q.new_full((rows, 1, 1, SUMMED), -torch.inf).index_fill(3, torch.arange(seen), 0)
        totals = [*range(math.ceil(seen / FINEST) * FINEST, FINE + 1, FINEST), SUMMED]
        parts = ([each[:, :, :total] for each in (*states, mask.mT)] for total in totals)
        found = [labs_decode.flash(q, k, v, m.mT.contiguous(), 1.0)[0] for k, v, m in parts]
        if not all(torch.equal(found[0], each) for each in found[1:]):
            return False
    return True
