# SPDX-License-Identifier: Apache-2.0
"""Keys and values in 8 bits: slots of about half the memory of 16 bits, a quarter of 32.

    decoder = labs_kv.in_bytes(labs_decode.prepare(model))      # kv_dtype = "int8"

Each token's key and value of each head is quantised by itself, when it is written, with a scale of
its own. So a number never changes later, and does not depend on other tokens or rows. Scales lie
behind the numbers in the same buffers, so that all that moves columns moves both. All attention
reads what is stored, prompts too.

On a CPU, a step reads the bytes in place: some rows' keys at a time become float32, in the
cache, and values are summed by the kernel for quantised embeddings (FBGEMM's embedding bag).
Elsewhere, and for prompts, a layer's keys and values are dequantised before attention reads them.
Needs labs_compare.py and labs_decode.py.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any, cast

import torch
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, cache_utils

import labs_compare
import labs_decode
from labs_decode import CacheLayer, Decoder, Pair, SlotLayer, Tensor

NAME = "labs_int8"  # of the attention in transformers
KEY_TAIL, VALUE_TAIL = 4, 8  # bytes: a key's scale; a value's scale and least number, as float32
LARGEST = 127  # keys are -127 to 127 times their scale
OFF = 0.5  # share of the logits' spread; tiny models are 0.01 to 0.3 off, other logits are 1
BLOCK_BYTES = 2**21  # float32 keys at once: more would leave the cores' caches


class ByteLayer(SlotLayer):  # type: ignore[no-untyped-call]
    """Keys as int8 [rows, heads, columns, dim + 4] and values as uint8 [..., dim + 8]."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> Pair:
        keys, values = super().update(packed_keys(key_states), packed_values(value_states))
        if self.cursor.positions is not None and keys.is_cpu:
            return keys, values
        return read_keys(keys, key_states.dtype), read_values(values, value_states.dtype)


class ByteSlots(labs_decode.Slots):
    """Slots whose layers are ByteLayer."""

    attention = NAME

    def _layer(self, old: CacheLayer) -> CacheLayer:
        return ByteLayer(self.cursor)

    @staticmethod
    def head_bytes(dim: int, itemsize: int) -> int:
        return 2 * dim + KEY_TAIL + VALUE_TAIL


# ---------------------------------------------------------------- numbers


def packed_keys(states: Tensor) -> Tensor:
    """Return keys [..., dim] as int8 [..., dim + 4]: the numbers and their scale's four bytes."""
    states = states.float()
    scale = torch.linalg.vector_norm(states, torch.inf, -1, keepdim=True).div_(LARGEST)
    numbers = states.div(scale.clamp_min(torch.finfo(torch.float32).tiny)).round_()
    return torch.cat([numbers.to(torch.int8), scale.view(torch.int8)], -1)


def read_keys(keys: Tensor, dtype: torch.dtype) -> Tensor:
    """Return keys [..., dim] from int8 [..., dim + 4]."""
    return (keys[..., :-KEY_TAIL].to(torch.float32) * scales(keys)).to(dtype)


def scales(keys: Tensor) -> Tensor:
    """Return the scales [..., 1] of keys in 8 bits."""
    return keys[..., -KEY_TAIL:].view(torch.float32)


def packed_values(states: Tensor) -> Tensor:
    """Return values [..., dim] as uint8 [..., dim + 8], in the form of torch's embedding bags.

    A value is number * scale + least; scale and least are float32, behind the numbers.
    """
    states = states.float()
    if states.is_cpu:
        lines = states.reshape(-1, states.shape[-1])
        rows: Tensor = torch.ops.quantized.embedding_bag_byte_prepack(lines)
        return rows.view(*states.shape[:-1], -1)
    return rows_of_values(states)


def rows_of_values(states: Tensor) -> Tensor:
    """Return float32 values [..., dim] as `packed_values` does, by common operations."""
    least, most = torch.aminmax(states, dim=-1, keepdim=True)
    scale = (most - least).div_(255)
    numbers = (states - least).div_(scale.clamp_min(torch.finfo(torch.float32).tiny)).round_()
    return torch.cat([numbers.to(torch.uint8), torch.cat([scale, least], -1).view(torch.uint8)], -1)


def read_values(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return values [..., dim] from uint8 [..., dim + 8]."""
    scale, least = torch.split(values[..., -VALUE_TAIL:].view(torch.float32), 1, -1)
    return torch.addcmul(least, values[..., :-VALUE_TAIL].to(torch.float32), scale).to(dtype)


# ---------------------------------------------------------------- attention


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Compute attention [B, Q, heads, dim] from dequantised keys, or in a CPU's step from bytes."""
    names = ("softcap", "s_aux", "position_bias")
    special = attention_mask is None or any(options.get(name) is not None for name in names)
    if key.dtype == torch.int8 and not special:
        q = query[: len(key)].float() * (options.get("scaling") or query.shape[-1] ** -0.5)
        output = step_attention(q, key, value, cast("Tensor", attention_mask)).to(query.dtype)
        return output.expand(len(query), -1, -1, -1), None  # as labs_decode.attention_invariant
    if key.dtype == torch.int8:
        key, value = read_keys(key, query.dtype), read_values(value, query.dtype)
    function = labs_decode.attention_invariant if query.is_cpu else labs_decode.attention
    return function(module, query, key, value, attention_mask, **options)


def step_attention(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """Return attention [B, 1, heads, dim] of scaled q [B, heads, 1, dim], in float32.

    keys, values: [B, groups, T, ...] in 8 bits. mask [B, 1, 1, T], to add.
    """
    (batch, heads, _, dim), (groups, total) = q.shape, keys.shape[1:3]
    queries = q.reshape(batch * groups, -1, dim)
    keys, values = (each.reshape(batch * groups, total, -1) for each in (keys, values))
    scores = key_products(queries, keys).view(batch, heads, 1, total)
    weights = scores.add_(mask).view(batch * groups, -1, total).softmax(-1)
    return weighted(weights, values).view(batch, 1, heads, dim)


def key_products(queries: Tensor, keys: Tensor) -> Tensor:
    """Return queries [N, G, dim] times keys [N, T, dim + 4] in 8 bits, [N, G, T]."""
    lines, total, width = keys.shape
    size = max(BLOCK_BYTES // (4 * total * width), 1)
    queries = torch.nn.functional.pad(queries, (0, KEY_TAIL))  # whole lines are read faster
    products = queries.new_empty((lines, queries.shape[1], total))
    numbers = queries.new_empty((min(size, lines), total, width))
    parts = (torch.split(each, size) for each in (queries, keys, products))
    for query, block, to in zip(*parts, strict=True):
        block = numbers[: len(block)].copy_(block).transpose(1, 2)
        if len(block) > 1:
            torch.bmm(query, block, out=to)
        else:
            to.copy_(labs_decode.product(query, block))
    return products.mul_(scales(keys).transpose(1, 2))


def weighted(weights: Tensor, values: Tensor) -> Tensor:
    """Return weights [N, G, T] times values [N, T, dim + 8] in 8 bits, [N * G, dim].

    Each sum runs over the columns in order, so that zeros at its end do not change it.
    """
    lines, number, total = weights.shape
    width, line = values.shape[2], values.stride(0) // values.shape[2]
    table = values.as_strided(((lines - 1) * line + total, width), (width, 1))
    places, starts = bags(lines, number, total, line)
    bag = torch.ops.quantized.embedding_bag_byte_rowwise_offsets
    return cast(
        "Tensor", bag(table, places, starts, False, 0, False, weights.flatten(), None, True)
    )


@functools.lru_cache(maxsize=4)
def bags(lines: int, number: int, total: int, line: int) -> Pair:
    """Return where the values of each sum lie in a table, and where each sum begins in that."""
    first = torch.arange(lines, dtype=torch.int32).mul_(line).view(-1, 1, 1)
    places = first + torch.arange(total, dtype=torch.int32)
    starts = torch.arange(0, lines * number * total + 1, total, dtype=torch.int32)
    return places.expand(-1, number, -1).flatten(), starts


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, labs_decode.attention_mask)


# ---------------------------------------------------------------- which models


@torch.inference_mode()
def in_bytes(decoder: Decoder) -> Decoder:
    """Return a decoder whose slots have 8 bits. Raises ValueError if its model cannot have them."""
    if why := unfit(decoder):
        raise ValueError(f"kv_dtype = int8: {why}")
    invariant, copies = decoder.invariant, decoder.duplicates_lone_row
    decoder = labs_decode.with_invariance(replace(decoder, slots=ByteSlots), invariant)
    decoder = replace(decoder, duplicates_lone_row=copies)  # as labs_fast has decided
    own = replace(labs_compare.Own.of(decoder.model), most=OFF)
    if why := own.fault or own.wrong(labs_compare.together(decoder, own.texts)):
        labs_decode.with_invariance(replace(decoder, slots=labs_decode.Slots), invariant)
        raise ValueError(f"kv_dtype = int8: {why}")
    return decoder


def unfit(decoder: Decoder) -> str:
    """Return why the keys and values of a model cannot be held in 8 bits, or an empty text."""
    if decoder.mode != "joins":
        return f"labs does not hold its keys and values ({decoder.reason})"
    known = (cache_utils.DynamicLayer, cache_utils.DynamicSlidingWindowLayer)
    layers = DynamicCache(config=decoder.config).layers
    if other := {type(layer).__name__ for layer in layers if type(layer) not in known}:
        return f"its cache has more than keys and values of each token ({min(other)})"
    if getattr(decoder.config, "kv_lora_rank", None):
        return "its keys and values are compressed already, for all heads together"
    return ""
