# SPDX-License-Identifier: Apache-2.0
"""Activations that give a row the same bits however many rows share a call.

    h = labs_steady.steady(torch.nn.functional.gelu, x)

This file needs labs_decode.py.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from transformers.activations import ACT2CLS

from labs_decode import Decoder, Tensor

PIECE, GRAIN = 16_384, 32_768  # numbers that torch computes in one thread: of gelu, of others
VECTOR = 64  # numbers, a multiple of those in a vector of any CPU
# Classes of modules that compute each number by itself; some come with their arguments.
CLASSES = [each[0] if isinstance(each, tuple) else each for each in ACT2CLS.values()]
ACTIVATIONS: Any = tuple(each for each in CLASSES if isinstance(each, type))


def steady(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return a function of each number of x [..., width]; other rows change no bits of a row.

    A CPU rounds what is left behind whole vectors otherwise, so rows are padded to whole vectors.
    It cuts many numbers among its threads, so if cuts are not at whole vectors, a call gets a piece
    of the rows. Some functions (gelu) have another kernel for rows that do not lie side by side,
    and a single row always does.
    """
    if not x.is_cpu or x.ndim < 2:
        return function(x)
    width, count = x.shape[-1], x.numel()
    if short := -width % VECTOR:
        padded = torch.nn.functional.pad(x, (0, short))
        return steady(function, padded)[..., :width].contiguous()
    x = x if function is torch._C._nn.silu else x.contiguous()
    if count <= PIECE or (width <= PIECE and not _cuts_vectors(count)):
        return function(x)
    parts = torch.split(x.flatten(0, -2), max(1, PIECE // width))
    return torch.cat([function(part) for part in parts]).view(x.shape)


def _cuts_vectors(count: int) -> bool:
    """Return whether torch may cut so many numbers elsewhere than between two vectors."""
    threads = torch.get_num_threads()
    counts = threads, min(threads, math.ceil(count / GRAIN))
    return any(number > 1 and math.ceil(count / number) % VECTOR for number in counts)


def steady_modules(decoder: Decoder) -> Decoder:
    """Let the activations of transformers' modules go through `steady`, if these modules run."""
    if decoder.forward is None and decoder.invariant and decoder.device.type == "cpu":
        for module in decoder.model.modules():
            if isinstance(module, ACTIVATIONS):
                module.forward = functools.partial(steady, module.forward)
    return decoder
