# SPDX-License-Identifier: Apache-2.0
"""ids → logits as plain functions over tensors, for the dense families of labs_layers.py.

    decoder = labs_forward.speed_up(labs_decode.prepare(model))

transformers' modules take as long as the products of a small model. Here a decoder layer is one
function, `layer_forward`, over a struct of the tensors and products that the modules hold. Both
forwards are compared at load; where they differ, and for other models, transformers' own runs. This
file needs labs_attention.py, labs_decode.py, labs_layers.py, labs_probe.py and labs_steady.py.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import labs_attention
import labs_decode
import labs_layers
import labs_probe
import labs_steady
from labs_decode import Decoder, Tensor
from labs_layers import Layer, Weights

# Batch and queries, the function of attention with the layer's slots and mask, its rotation.
Call = tuple[torch.Size, Callable[..., Tensor], Callable[[Tensor], Tensor]]

MASKS = {
    "full_attention": create_causal_mask,
    "sliding_attention": create_sliding_window_causal_mask,
}
# If one of these files changes, the comparison at load is made anew.
SOURCES = __file__, labs_layers.__file__, labs_attention.__file__, labs_steady.__file__


# ---------------------------------------------------------------- the forward


def forward(weights: Weights, ids: Tensor, positions: Tensor, cache: Any, wanted: Any) -> Tensor:
    """Return logits [B, N, V] of ids [B, Q] at positions [B, Q], as labs_decode.call_model does."""
    x = weights.embed(ids)
    x = x if weights.embedding_scale == 1 else x * weights.embedding_scale
    kinds = {layer.kind for layer in weights.layers}
    masks = {kind: _mask(weights, kind, x, positions, cache) for kind in kinds}
    turns = {kind: _rotation(weights, kind, x, positions) for kind in kinds}
    attend, masks = _attention_of(weights, x, masks, cache)
    batch, x = x.shape[:2], x.flatten(0, 1)
    stream = x
    if (floor := weights.floor) is not None:
        x = torch.nn.functional.pad(x.float(), (0, 1), value=floor)  # for `residual_norm`
        stream = x[:, :-1]
    for layer, slots in zip(weights.layers, cache.layers, strict=False):
        bound = functools.partial(attend, slots, masks[layer.kind], layer)
        layer_forward(layer, x, stream, (batch, bound, turns[layer.kind]), weights.residual_scale)
    x = x.view(*batch, -1)
    x = x[:, -wanted:] if isinstance(wanted, int) else x[:, wanted]
    batch, x = x.shape[:2], x.flatten(0, 1)
    logits = weights.head(x if weights.norm is None else weights.norm(x)).view(*batch, -1)
    logits = logits if weights.logits_scale == 1 else logits * weights.logits_scale
    cap = weights.softcap
    return logits if cap is None else labs_steady.steady(torch.tanh, logits / cap) * cap


def layer_forward(layer: Layer, x: Tensor, stream: Tensor, call: Call, scale: float) -> None:
    """Change x [N, hidden] in place by a decoder layer (Attention is all you need, section 3.1).

    N: all tokens of all rows, because only attention tells rows apart. stream: x, or x without a
    last column, see `labs_layers.residual_norm`. scale: of what is added.
    """
    before_attention, after_attention, before_mlp, after_mlp = layer.norms
    h = stream if before_attention is None else before_attention(x)
    h = attention(layer, h, call)
    stream.add_(h if after_attention is None else after_attention(h), alpha=scale)
    h = stream if before_mlp is None else before_mlp(x)
    h = mlp(layer, h)
    stream.add_(h if after_mlp is None else after_mlp(h), alpha=scale)


def attention(layer: Layer, x: Tensor, call: Call) -> Tensor:
    """Return attention [N, hidden]; writes the keys and values of x to the slots."""
    batch, attend, turn = call
    qkv = layer.qkv(x)
    if layer.q_norm and layer.k_norm:
        widths = [layer.heads * layer.dim, *[layer.groups * layer.dim] * 2]
        q, k, v = torch.split(qkv, widths, -1)
        qkv = torch.cat([layer.q_norm(q), layer.k_norm(k), v], -1)
    heads = qkv.view(*batch, -1, layer.dim)
    qk, v = heads.split_with_sizes([layer.heads + layer.groups, layer.groups], 2)
    qk = qk if layer.qk_norm is None else layer.qk_norm(qk)
    qk = turn(qk) if layer.rotates else qk
    q, k = qk.split_with_sizes([layer.heads, layer.groups], 2)
    return layer.out(attend(q, k, v).reshape(x.shape[0], -1).contiguous())


def mlp(layer: Layer, x: Tensor) -> Tensor:
    """Return down(activation(gate(x)) * up(x)) (arXiv 2002.05202), or the same without a gate."""
    h = layer.up(x)
    if not layer.gated:
        return layer.down(labs_steady.steady(layer.activation, h))
    gate, up = h.chunk(2, -1)
    return layer.down(labs_steady.steady(layer.activation, gate).mul_(up))


def _attention_of(weights: Weights, x: Tensor, masks: Any, cache: Any) -> tuple[Any, Any]:
    """Return a function of slots, mask, layer and q, k, v [B, Q, heads, dim], and its masks."""
    attend = ALL_ATTENTION_FUNCTIONS[weights.config._attn_implementation]
    offset, layer = cache.get_query_offset(), weights.layers[0]
    steps = isinstance(offset, Tensor) and offset.ndim == 1 and weights.steps
    if steps and not cache.attention and x.is_cpu:
        if cache.of_step is None:
            step = labs_attention.step_of(x, layer, masks, cache.cursor)
            return step.attend, step.masks
        attend, masks = cache.of_step(x, layer, masks)
    return functools.partial(_attend, attend), masks


def _attend(function: Any, slots: Any, mask: Any, layer: Layer, *states: Tensor) -> Tensor:
    """Write keys and values to the slots; return attention by a function of transformers' kind."""
    q, k, v = (each.transpose(1, 2) for each in states)
    output: Tensor = function(layer.module, q, *slots.update(k, v), mask, **layer.options)[0]
    return output


def _rotation(weights: Weights, kind: str, x: Tensor, positions: Tensor) -> Callable[..., Tensor]:
    """Return the function that turns heads [B, Q, heads, dim] by their positions.

    RoPE, arXiv 2104.09864; the angles are those of the model's own rotary module.
    """
    words = {"layer_type": kind} if _takes(type(weights.rotary).forward, "layer_type") else {}
    cos, sin = (each.unsqueeze(2) for each in weights.rotary(x, positions, **words))
    width, half, pairs = cos.shape[-1], cos.shape[-1] // 2, weights.pairs
    if pairs:
        cos, sin = (each[..., :half].repeat_interleave(2, -1) for each in (cos, sin))
    split, at = ((half, 2), -1) if pairs else ((2, half), -2)  # where a number's partner is
    cos, sin = (each.view(*each.shape[:-1], *split) for each in (cos, sin))
    sin = torch.cat([-sin.narrow(at, 0, 1), sin.narrow(at, 1, 1)], at)

    def turn(heads: Tensor) -> Tensor:
        shape = heads.shape
        part = heads if width == shape[-1] else heads[..., :width]
        part = part.view(*shape[:-1], *split)
        turned: Tensor = (part * cos).addcmul_(part.flip(at), sin)
        turned = turned if turned.dtype == heads.dtype else turned.to(heads.dtype)
        if width == shape[-1]:
            return turned.view(shape)
        return torch.cat([turned.flatten(-2), heads[..., width:]], -1)

    return turn


def _mask(weights: Weights, kind: str, x: Tensor, positions: Tensor, cache: Cache) -> Any:
    known = next(name for name in labs_decode.CACHE_PARAMETERS if _takes(MASKS[kind], name))
    words = {"config": weights.config, "inputs_embeds": x, "attention_mask": None}
    return MASKS[kind](**words, position_ids=positions, **{known: cache})


@functools.cache
def _takes(function: Any, name: str) -> bool:
    return name in inspect.signature(function).parameters


# ---------------------------------------------------------------- which forward a model takes


def speed_up(decoder: Decoder, cache: str | None = None) -> Decoder:
    """Return a decoder whose calls go through `forward`, if that has the modules' logits.

    cache: the folder where the result of the comparison is stored.
    """
    weights = labs_layers.weights_of(decoder)
    if isinstance(weights, str):
        return replace(decoder, why_forward=weights)
    own = with_forward(decoder, weights)
    found = labs_probe.compared(own, SOURCES, cache)
    return replace(decoder, why_forward=f"labs' own differs: {found}") if found else own


def with_forward(decoder: Decoder, weights: Weights) -> Decoder:
    """Return a decoder whose calls go through `forward`, unchecked."""
    own, why = functools.partial(forward, weights), "its logits are those of transformers' forward"
    return replace(decoder, forward=own, why_forward=why)
