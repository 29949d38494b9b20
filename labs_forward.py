# SPDX-License-Identifier: Apache-2.0
"""ids → logits, faster: short prompts that share one forward call.

    decoder = labs_forward.speed_up(labs_decode.prepare(model))

Needs labs_decode.py, torch and transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from transformers import DynamicCache, cache_utils
from transformers.cache_utils import CacheLayerMixin

import labs_decode
from labs_decode import Batch, CacheLayer, Decoder, Pair, Slots, Tensor


def speed_up(decoder: Decoder) -> Decoder:
    """Let short prompts share a call if the model keeps keys and values only."""
    if decoder.mode != "joins":
        return decoder
    layers = DynamicCache(config=decoder.config).layers
    plain = bool(layers) and all(type(layer) is cache_utils.DynamicLayer for layer in layers)
    words = {"position_ids", "logits_to_keep"} <= decoder.forward_words
    return replace(decoder, prefill_packed=prefill_packed) if plain and words else decoder


class PackedPrompts(cache_utils.Cache):
    """Several newcomers' slots in one call: their prompts lie one behind the other in one row."""

    def __init__(
        self, newcomers: Sequence[Slots], lengths: list[int], device: torch.device
    ) -> None:
        layers = zip(*(slots.layers for slots in newcomers), strict=True)
        super().__init__(layers=[PackedPromptsLayer(group, lengths) for group in layers])
        prompts = [torch.full((n,), i, device=device) for i, n in enumerate(lengths)]
        positions = [torch.arange(n, device=device) for n in lengths]
        self.places = torch.stack([torch.cat(prompts), torch.cat(positions)])  # [2, T]

    def get_query_offset(self, layer_idx: int = 0) -> Tensor | int:  # type: ignore[override]
        return self.places


class PackedPromptsLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """One layer of several newcomers; each gets its part, attention gets all."""

    is_sliding = False

    def __init__(self, layers: Sequence[CacheLayer], lengths: list[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.layers, self.lengths = layers, lengths

    def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> Pair:
        parts = (torch.split(states, self.lengths, 2) for states in (key_states, value_states))
        for layer, keys, values in zip(self.layers, *parts, strict=True):
            layer.update(keys, values)
        return key_states, value_states

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Each newcomer's layer does so itself."""

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return -1


@torch.inference_mode()
def prefill_packed(decoder: Decoder, newcomers: Sequence[Batch]) -> list[Batch]:
    """Write whole short prompts in one call, as labs_loop.prompts_for_one_call found them."""
    rows = [newcomer.rows[0] for newcomer in newcomers]
    lengths = [row.prompt_length for row in rows]
    for newcomer, length in zip(newcomers, lengths, strict=True):
        at = newcomer.cache.cursor
        at.write_from, at.read_to, at.positions, at.speculative = 0, length, None, False
    ids = torch.tensor([[i for row in rows for i in row.ids]], device=decoder.device)
    cache = PackedPrompts([newcomer.cache for newcomer in newcomers], lengths, ids.device)
    ends = torch.tensor(lengths, device=ids.device).cumsum(0) - 1
    logits = labs_decode.call_model(decoder, ids, cache.places[1:], cache, ends)[0].float()
    if len(logits) != len(rows):  # a model that takes logits_to_keep and keeps all
        logits = logits[ends]
    for row in rows:
        row.written = row.prompt_length
    return [replace(each, logits=logits[i : i + 1]) for i, each in enumerate(newcomers)]
