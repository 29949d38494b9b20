# SPDX-License-Identifier: Apache-2.0
"""ids → logits as plain functions over tensors, for the dense families of `FAMILIES`.

    decoder = labs_forward.speed_up(labs_decode.prepare(model))

transformers' modules take as long as the products of a small model. Here a decoder layer is one
function, `layer_forward`, over a struct of the tensors and products that the modules hold. What a
family does differently is a row of a table, or is read off its modules. Both forwards are compared
at load; where they differ, and for other models, transformers' own runs. This file needs
labs_decode.py and labs_probe.py.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import labs_decode
import labs_probe
from labs_decode import Decoder, Tensor

Product = Callable[[Tensor], Tensor]  # x [..., in] to [..., out]
Norm = Callable[[Tensor], Tensor]

MASKS = {
    "full_attention": create_causal_mask,
    "sliding_attention": create_sliding_window_causal_mask,
}


@dataclass(frozen=True, slots=True)
class Family:
    """In what a family differs from the others, by the names of its layers' attributes.

    norms: before and after attention, before and after the MLP; "" where there is none. pairs: the
    rotation turns neighbouring numbers of a head (as in GLM), not its two halves (as in llama).
    offset: is added to the weights of norms (gemma stores them minus 1).
    """

    norms: tuple[str, str, str, str]
    pairs: bool = False
    offset: float = 0.0


BEFORE = Family(("input_layernorm", "", "post_attention_layernorm", ""))
AFTER = Family(("", "post_attention_layernorm", "", "post_feedforward_layernorm"))
AROUND = Family(
    (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
    offset=1.0,
)
GLM4 = Family(
    (
        "input_layernorm",
        "post_self_attn_layernorm",
        "post_attention_layernorm",
        "post_mlp_layernorm",
    ),
    pairs=True,
)
# By model_type; the source of each row is transformers/models/<model_type>/modeling_<...>.py.
FAMILIES = {
    **dict.fromkeys(("llama", "mistral", "ministral", "qwen2", "qwen3", "smollm3"), BEFORE),
    **dict.fromkeys(("granite", "phi3", "starcoder2", "seed_oss", "arcee"), BEFORE),
    **dict.fromkeys(("olmo2", "olmo3", "exaone4"), AFTER),
    "gemma": replace(BEFORE, offset=1.0),
    **dict.fromkeys(("gemma2", "gemma3_text"), AROUND),
    "glm": replace(BEFORE, pairs=True),
    "glm4": GLM4,
}


@dataclass(frozen=True, slots=True)
class Layer:
    """What one decoder layer computes with. dim: numbers of a head; groups: heads of keys.

    qkv: queries, keys and values side by side. gated: up is the MLP's gate and its values side by
    side. qk_norm: of each head of queries and keys; q_norm, k_norm: of all heads together. module:
    transformers' attention, for its scale and options. kind: of its mask and rotation.
    """

    qkv: Product
    out: Product
    up: Product
    down: Product
    gated: bool
    activation: Callable[[Tensor], Tensor]
    norms: tuple[Norm | None, ...]
    qk_norm: Norm | None
    q_norm: Norm | None
    k_norm: Norm | None
    module: Any
    kind: str
    rotates: bool
    heads: int
    groups: int
    dim: int


@dataclass(frozen=True, slots=True)
class Weights:
    """A whole model: layers and what is around them, and the multipliers that granite has.

    softcap: logits stay between -softcap and softcap (Gemma 2, arXiv 2408.00118, section 2).
    """

    layers: tuple[Layer, ...]
    embed: Product
    norm: Norm
    head: Product
    rotary: Any
    config: Any
    pairs: bool
    embedding_scale: float
    residual_scale: float
    logits_scale: float
    softcap: float | None


# ---------------------------------------------------------------- the forward


def forward(weights: Weights, ids: Tensor, positions: Tensor, cache: Cache, wanted: Any) -> Tensor:
    """Return logits [B, N, V] of ids [B, Q] at positions [B, Q], as labs_decode.call_model does."""
    x = weights.embed(ids)
    x = x if weights.embedding_scale == 1 else x * weights.embedding_scale
    kinds = {layer.kind for layer in weights.layers}
    masks = {kind: _mask(weights, kind, x, positions, cache) for kind in kinds}
    turns = {kind: _rotation(weights, kind, x, positions) for kind in kinds}
    attend = ALL_ATTENTION_FUNCTIONS[weights.config._attn_implementation]
    for layer, slots in zip(weights.layers, cache.layers, strict=False):
        seen = attend, slots, masks[layer.kind], turns[layer.kind]
        x = layer_forward(layer, x, seen, weights.residual_scale)
    x = x[:, -wanted:] if isinstance(wanted, int) else x[:, wanted]
    logits = weights.head(weights.norm(x))
    logits = logits if weights.logits_scale == 1 else logits * weights.logits_scale
    cap = weights.softcap
    return logits if cap is None else torch.tanh(logits / cap) * cap


def layer_forward(layer: Layer, x: Tensor, seen: Any, residual_scale: float = 1.0) -> Tensor:
    """Return x [B, Q, hidden] after one decoder layer (Attention is all you need, section 3.1).

    seen: the function of attention, the layer's slots, its mask and its rotation.
    """
    before_attention, after_attention, before_mlp, after_mlp = layer.norms
    h = x if before_attention is None else before_attention(x)
    h = attention(layer, h, *seen)
    h = h if after_attention is None else after_attention(h)
    x = torch.add(x, h, alpha=residual_scale)
    h = x if before_mlp is None else before_mlp(x)
    h = mlp(layer, h)
    h = h if after_mlp is None else after_mlp(h)
    return torch.add(x, h, alpha=residual_scale)


def attention(
    layer: Layer, x: Tensor, attend: Any, slots: Any, mask: Tensor | None, turn: Any
) -> Tensor:
    """Return attention [B, Q, hidden]; writes the keys and values of x to the slots."""
    (batch, queries), both = x.shape[:2], layer.heads + layer.groups
    qkv = layer.qkv(x)
    if layer.q_norm and layer.k_norm:
        widths = [layer.heads * layer.dim, *[layer.groups * layer.dim] * 2]
        q, k, v = torch.split(qkv, widths, -1)
        qkv = torch.cat([layer.q_norm(q), layer.k_norm(k), v], -1)
    qkv = qkv.view(batch, queries, -1, layer.dim)
    qk, v = qkv[:, :, :both], qkv[:, :, both:]
    qk = qk if layer.qk_norm is None else layer.qk_norm(qk)
    qk = (turn(qk) if layer.rotates else qk).transpose(1, 2)
    keys, values = slots.update(qk[:, layer.heads :], v.transpose(1, 2))
    options = {"scaling": layer.module.scaling}
    if (cap := getattr(layer.module, "attn_logit_softcapping", None)) is not None:
        options["softcap"] = cap
    output, _ = attend(layer.module, qk[:, : layer.heads], keys, values, mask, **options)
    return layer.out(output.reshape(batch, queries, -1))


def mlp(layer: Layer, x: Tensor) -> Tensor:
    """Return down(activation(gate(x)) * up(x)) (arXiv 2002.05202), or the same without a gate."""
    h = layer.up(x)
    if not layer.gated:
        return layer.down(layer.activation(h))
    gate, up = h.chunk(2, -1)
    return layer.down(layer.activation(gate).mul_(up))


def rms_norm(x: Tensor, weight: Tensor, floor: Tensor) -> Tensor:
    """Return x / rms(x) * weight, computed in float32 (RMSNorm, arXiv 1910.07467).

    weight: the norm's weight times sqrt(n); floor: sqrt(n * eps). So x is divided by
    sqrt(sum(x^2) + n * eps), in three kernels, where torch's own norm takes six on a CPU.
    """
    size = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    product: Tensor = (x / size.hypot_(floor)).mul_(weight)
    return product.to(x.dtype)


def _rotation(weights: Weights, kind: str, x: Tensor, positions: Tensor) -> Callable[..., Tensor]:
    """Return the function that turns heads [B, Q, heads, dim] by their positions.

    RoPE, arXiv 2104.09864; the angles are those of the model's own rotary module.
    """
    words = {"layer_type": kind} if _takes(weights.rotary, "layer_type") else {}
    cos, sin = (each.unsqueeze(2) for each in weights.rotary(x, positions, **words))
    half = cos.shape[-1] // 2
    if weights.pairs:
        cos, sin = (each[..., :half].repeat_interleave(2, -1) for each in (cos, sin))
        signs = torch.tensor([-1, 1], device=x.device, dtype=sin.dtype).repeat(half)
        return functools.partial(_turned, cos=cos, sin=sin * signs, swap=_swapped_pairs)
    sin = torch.cat([-sin[..., :half], sin[..., half:]], -1)
    return functools.partial(_turned, cos=cos, sin=sin, swap=_swapped_halves)


def _turned(heads: Tensor, cos: Tensor, sin: Tensor, swap: Callable[[Tensor], Tensor]) -> Tensor:
    width = cos.shape[-1]
    part = heads if width == heads.shape[-1] else heads[..., :width]
    turned = torch.addcmul(part * cos, swap(part), sin).to(heads.dtype)
    return turned if part is heads else torch.cat([turned, heads[..., width:]], -1)


def _swapped_halves(part: Tensor) -> Tensor:
    return part.roll(part.shape[-1] // 2, -1)


def _swapped_pairs(part: Tensor) -> Tensor:
    return part.reshape(*part.shape[:-1], -1, 2).flip(-1).flatten(-2)


def _mask(weights: Weights, kind: str, x: Tensor, positions: Tensor, cache: Cache) -> Any:
    words = {"inputs_embeds": x, "attention_mask": None, "position_ids": positions}
    function = MASKS[kind]
    known = next(name for name in labs_decode.CACHE_PARAMETERS if _takes(function, name))
    return function(config=weights.config, **words, **{known: cache})


@functools.cache
def _parameters(function: Any) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


def _takes(function: Any, name: str) -> bool:
    return name in _parameters(getattr(type(function), "forward", function))


# ---------------------------------------------------------------- from modules to functions


def speed_up(decoder: Decoder, cache: str | None = None) -> Decoder:
    """Return a decoder whose calls go through `forward`, if that has the modules' logits.

    cache: the folder where the result of the comparison is stored.
    """
    weights = weights_of(decoder)
    if isinstance(weights, str):
        return replace(decoder, why_forward=weights)
    own = with_forward(decoder, weights)
    found = labs_probe.compared(own, __file__, cache)
    return replace(decoder, why_forward=f"labs' own differs: {found}") if found else own


def with_forward(decoder: Decoder, weights: Weights) -> Decoder:
    """Return a decoder whose calls go through `forward`, unchecked."""
    own, why = functools.partial(forward, weights), "its logits are those of transformers' forward"
    return replace(decoder, forward=own, why_forward=why)


@torch.inference_mode()
def weights_of(decoder: Decoder) -> Weights | str:
    """Return what a model's modules compute with, or why transformers' forward runs, a phrase."""
    model, config = decoder.model, decoder.config
    family = FAMILIES.get(config.model_type)
    if family is None or decoder.mode != "joins" or model.config is not config:
        return f"labs has no forward of its own for {model.config.model_type}"
    if len({parameter.device for parameter in model.parameters()}) > 1:
        return "the model is on several devices"
    if any(_hooked(module) for module in model.modules()):
        return "its modules have hooks"
    try:
        return _weights_of(model, config, family)
    except (AttributeError, KeyError) as error:
        return f"its modules are not those of {config.model_type} ({error})"


def _weights_of(model: Any, config: Any, family: Family) -> Weights:
    inner = model.base_model
    kind = "sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"
    kinds = getattr(config, "layer_types", None) or [kind] * len(inner.layers)
    layers = zip(inner.layers, kinds, strict=True)
    return Weights(
        layers=tuple(_layer_of(layer, kind, family) for layer, kind in layers),
        embed=inner.embed_tokens,
        norm=_norm_of([inner.norm], family.offset),
        head=product_of([model.get_output_embeddings()]),
        rotary=inner.rotary_emb,
        config=config,
        pairs=family.pairs,
        embedding_scale=getattr(config, "embedding_multiplier", 1.0),
        residual_scale=getattr(config, "residual_multiplier", 1.0),
        logits_scale=1 / getattr(config, "logits_scaling", 1.0),
        softcap=getattr(config, "final_logit_softcapping", None),
    )


def _layer_of(layer: Any, kind: str, family: Family) -> Layer:
    attention, config, mlp = layer.self_attn, layer.self_attn.config, layer.mlp
    offset, dim = family.offset, attention.head_dim
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    q_norm, k_norm = (getattr(attention, name, None) for name in ("q_norm", "k_norm"))
    each_head = q_norm is not None and len(q_norm.weight) == dim
    sizes = [heads, groups]
    gate = [name for name in ("gate_proj", "gate_up_proj") if hasattr(mlp, name)]
    return Layer(
        qkv=product_of(_modules(attention, ("qkv_proj",), ("q_proj", "k_proj", "v_proj"))),
        out=product_of([attention.o_proj]),
        up=product_of(
            _modules(mlp, ("gate_up_proj",), ("gate_proj", "up_proj"), ("up_proj",), ("c_fc",))
        ),
        down=product_of(_modules(mlp, ("down_proj",), ("c_proj",))),
        gated=bool(gate),
        activation=_first(mlp, "act_fn", "activation_fn", "act"),
        norms=tuple(
            _norm_of([getattr(layer, name)], offset) if name else None for name in family.norms
        ),
        qk_norm=_norm_of([q_norm, k_norm], offset, sizes) if each_head else None,
        q_norm=_norm_of([q_norm], offset) if q_norm is not None and not each_head else None,
        k_norm=_norm_of([k_norm], offset) if k_norm is not None and not each_head else None,
        module=attention,
        kind=kind,
        rotates=_rotates(attention),
        heads=heads,
        groups=groups,
        dim=dim,
    )


def _rotates(attention: Any) -> bool:
    """Return whether a layer turns its heads: some of smollm3 and exaone4 do not."""
    if hasattr(attention, "use_rope"):
        return bool(attention.use_rope)
    if attention.config.model_type == "exaone4":
        return attention.sliding_window is None or attention.is_sliding
    return True


def _first(module: Any, *names: str) -> Any:
    return getattr(module, next((name for name in names if hasattr(module, name)), names[0]))


def _modules(module: Any, *groups: Sequence[str]) -> list[Any]:
    """Return the modules of the first group of names that are all there."""
    found = next((names for names in groups if all(hasattr(module, n) for n in names)), groups[0])
    return [getattr(module, name) for name in found]


def product_of(linears: Sequence[Any]) -> Product:
    """Return x -> the outputs of layers that read the same input, side by side."""
    fused = [getattr(each, "fused", None) for each in linears]
    if fused[0] is not None and all(each is fused[0] for each in fused):
        packed, bias = fused[0].packed, fused[0].bias
        return lambda x: packed.multiply(x, bias)
    first, *more = linears
    return (lambda x: torch.cat([each(x) for each in linears], -1)) if more else first.__call__


def _norm_of(modules: Sequence[Any], offset: float, sizes: Sequence[int] = (1,)) -> Norm:
    """Return a norm as a function; for several modules, of as many heads each as `sizes` says."""
    if isinstance(modules[0], torch.nn.LayerNorm):
        norm: Norm = modules[0]
        return norm
    eps, n = _first(modules[0], "variance_epsilon", "eps"), len(modules[0].weight)
    rows = [each.weight.expand(size, n) for each, size in zip(modules, sizes, strict=True)]
    weight = torch.cat(rows) if len(rows) > 1 else modules[0].weight
    if weight.is_cuda and not offset and weight.ndim == 1:
        return functools.partial(torch.rms_norm, normalized_shape=(n,), weight=weight, eps=eps)
    weight = (weight.float() + offset) * math.sqrt(n)
    floor = torch.tensor(math.sqrt(n * eps), device=weight.device)
    return lambda x: rms_norm(x, weight, floor)


def _hooked(module: Any) -> bool:
    hooks = module._forward_hooks or module._forward_pre_hooks
    return bool(hooks) or hasattr(module, "_hf_hook")
