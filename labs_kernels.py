# SPDX-License-Identifier: Apache-2.0
"""What the kernels of torch do on this machine, found by trying them.

    labs_kernels.packed_types()                          # dtypes that oneDNN packs weights in
    labs_kernels.queries_multiple(torch.bfloat16, 64)    # 4, or 8

This file needs labs_decode.py.
"""

from __future__ import annotations

import functools

import torch

import labs_decode
from labs_decode import COLUMNS, SUMMED

FEWEST = 4  # queries of a product: in float32, fewer round otherwise, and take no less time


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
        counts = [rows * dim * FEWEST, *[rows * dim * columns] * 2]
        numbers = torch.arange(sum(counts)).sin().mul(1e4).sin().to(dtype)
        q, k, v = (each.view(rows, 1, -1, dim) for each in torch.split(numbers, counts))
        together = labs_decode.flash(q, k, v, None, 1.0)[0]
        for i in range(rows):
            alone = labs_decode.flash(q[i : i + 1], k[i : i + 1], v[i : i + 1], None, 1.0)[0]
            if not torch.equal(alone[0], together[i]):
                return labs_decode.ALIGNED
    return FEWEST
