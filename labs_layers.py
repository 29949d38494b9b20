# SPDX-License-Identifier: Apache-2.0
"""What the decoder layers of `FAMILIES` compute with, read off transformers' modules.

    weights = labs_layers.weights_of(labs_decode.prepare(model))   # or why there are none, a phrase

What a family does differently is a row of a table, or is read off its modules; labs_forward.py
computes with what is found. This file needs labs_decode.py.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from transformers.activations import SiLUActivation

from labs_decode import Decoder, Tensor

Product = Callable[[Tensor], Tensor]  # x [..., in] to [..., out]
Norm = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Family:
    """In what a family differs from the others, by the names of its layers' attributes.

    norms: before and after attention, before and after the MLP, without "_layernorm". pairs: the
    rotation turns neighbouring numbers of a head (as in GLM), not its two halves (as in llama).
    offset: is added to the weights of norms (gemma stores them minus 1).
    """

    norms: str
    pairs: bool = False
    offset: float = 0.0


BEFORE = Family("input - post_attention -")
AFTER = Family("- post_attention - post_feedforward")
AROUND = Family("input post_attention pre_feedforward post_feedforward", offset=1.0)
GLM4 = Family("input post_self_attn post_attention post_mlp", pairs=True)
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
    transformers' attention, with options for attention functions. kind: of its mask and rotation.
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
    options: dict[str, float]
    kind: str
    rotates: bool
    heads: int
    groups: int
    dim: int


@dataclass(frozen=True, slots=True)
class Weights:
    """A whole model: layers and what is around them, and the multipliers that granite has.

    floor: sqrt(n * eps) of the norms before attention and MLPs, if `residual_norm` computes them.
    steps: whether labs_attention can be used. softcap: logits stay between -softcap and softcap
    (Gemma 2, arXiv 2408.00118, section 2).
    """

    layers: tuple[Layer, ...]
    embed: Product
    norm: Norm | None
    floor: float | None
    head: Product
    rotary: Any
    config: Any
    pairs: bool
    steps: bool
    embedding_scale: float
    residual_scale: float
    logits_scale: float
    softcap: float | None


# ---------------------------------------------------------------- from modules to functions


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
    except Exception as error:  # a configuration may hold any value
        why = f"{type(error).__name__}: {error}"
        return f"its modules are not those of {config.model_type} that labs knows ({why})"


def _weights_of(model: Any, config: Any, family: Family) -> Weights:
    inner = model.base_model
    kind = "sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"
    kinds = getattr(config, "layer_types", None) or [kind] * len(inner.layers)
    layers = zip(inner.layers, kinds, strict=True)
    floor = _floor_of(inner, family)
    exact = functools.partial(_residual_norm_of, inner.embed_tokens.weight.dtype)
    norm_of = _norm_of if floor is None else exact
    return Weights(
        layers=tuple(_layer_of(layer, kind, family, norm_of) for layer, kind in layers),
        embed=inner.embed_tokens,
        norm=norm_of([inner.norm], family.offset),
        floor=floor,
        head=product_of([model.get_output_embeddings()]),
        rotary=inner.rotary_emb,
        config=config,
        pairs=family.pairs,
        steps=getattr(config, "attn_logit_softcapping", None) is None,
        embedding_scale=getattr(config, "embedding_multiplier", 1.0),
        residual_scale=getattr(config, "residual_multiplier", 1.0),
        logits_scale=1 / getattr(config, "logits_scaling", 1.0),
        softcap=getattr(config, "final_logit_softcapping", None),
    )


def _layer_of(layer: Any, kind: str, family: Family, before: Callable[..., Norm | None]) -> Layer:
    attention, config, mlp = layer.self_attn, layer.self_attn.config, layer.mlp
    offset, dim = family.offset, attention.head_dim
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    q_norm, k_norm = (getattr(attention, name, None) for name in ("q_norm", "k_norm"))
    each_head = q_norm is not None and len(q_norm.weight) == dim
    norms = _norms_of(layer, family)
    sizes, cap = [heads, groups], getattr(attention, "attn_logit_softcapping", None)
    activation = _first(mlp, "act_fn", "activation_fn", "act")
    return Layer(
        qkv=product_of(_modules(attention, ("qkv_proj",), ("q_proj", "k_proj", "v_proj"))),
        out=product_of([attention.o_proj]),
        up=product_of(
            _modules(mlp, ("gate_up_proj",), ("gate_proj", "up_proj"), ("up_proj",), ("c_fc",))
        ),
        down=product_of(_modules(mlp, ("down_proj",), ("c_proj",))),
        gated=hasattr(mlp, "gate_proj") or hasattr(mlp, "gate_up_proj"),
        activation=_function_of(activation),
        norms=tuple(
            of([each], offset) for of, each in zip((before, _norm_of) * 2, norms, strict=True)
        ),
        qk_norm=_norm_of([q_norm, k_norm], offset, sizes) if each_head else None,
        q_norm=None if each_head else _norm_of([q_norm], offset),
        k_norm=None if each_head else _norm_of([k_norm], offset),
        module=attention,
        options={"scaling": attention.scaling} | ({"softcap": cap} if cap else {}),
        kind=kind,
        rotates=_rotates(attention),
        heads=heads,
        groups=groups,
        dim=dim,
    )


def _function_of(activation: Any) -> Callable[[Tensor], Tensor]:
    """Return what an activation computes, by as few Python calls as possible."""
    if type(activation) is SiLUActivation:
        activation = torch._C._nn.silu
    function: Callable[[Tensor], Tensor] = getattr(activation, "forward", activation)
    return function


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
        return cast("Product", fused[0].product)
    first, *more = linears
    return (lambda x: torch.cat([each(x) for each in linears], -1)) if more else first.__call__


def _hooked(module: Any) -> bool:
    hooks = module._forward_hooks or module._forward_pre_hooks
    return bool(hooks) or hasattr(module, "_hf_hook")


# ---------------------------------------------------------------- norms


def rms_norm(x: Tensor, weight: Tensor, floor: Tensor) -> Tensor:
    """Return x / rms(x) * weight, computed in float32 (RMSNorm, arXiv 1910.07467).

    weight: the norm's weight times sqrt(n); floor: sqrt(n * eps). So x is divided by
    sqrt(sum(x^2) + n * eps), in three kernels, where torch's own norm takes six on a CPU.
    """
    size = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    product: Tensor = (x / size.hypot_(floor)).mul_(weight)
    return product.to(x.dtype)


def residual_norm(x: Tensor, weight: Tensor, root: float, dtype: torch.dtype) -> Tensor:
    """Return x / rms(x) * weight [N, n] of a residual stream [N, n + 1] in float32 on a CPU.

    The last number of each line is sqrt(n * eps), so that the length of a line is
    sqrt(sum(x^2) + n * eps). One kernel, weight normalisation (arXiv 1602.07868), makes that length
    `root`, which is sqrt(n). dtype: of the result.
    """
    lines: Tensor = torch._weight_norm_interface(x.contiguous(), _roots(len(x), root))[0]
    return (lines.narrow(1, 0, len(weight)) * weight).to(dtype)


@functools.lru_cache(maxsize=256)
def _roots(lines: int, root: float) -> Tensor:
    # The kernel takes no expanded tensor. The default dtype is another while a model is loaded.
    return torch.full((lines, 1), root, dtype=torch.float32, device="cpu")


def _norms_of(layer: Any, family: Family) -> list[Any]:
    return [getattr(layer, f"{name}_layernorm", None) for name in family.norms.split()]


def _floor_of(inner: Any, family: Family) -> float | None:
    """Return sqrt(n * eps) if all norms of the residual stream are RMS norms that have it."""
    norms = [inner.norm, *(n for layer in inner.layers for n in _norms_of(layer, family)[::2])]
    if any(getattr(n, "weight", None) is None or isinstance(n, torch.nn.LayerNorm) for n in norms):
        return None
    floors = {_eps_of(norm) * len(norm.weight) for norm in norms}
    on_cpu = all(norm.weight.is_cpu for norm in norms)
    return math.sqrt(floors.pop()) if len(floors) == 1 and on_cpu else None


def _residual_norm_of(dtype: torch.dtype, modules: Sequence[Any], offset: float) -> Norm:
    weight = modules[0].weight.float() + offset
    root = math.sqrt(len(weight))
    return functools.partial(residual_norm, weight=weight, root=root, dtype=dtype)


def _eps_of(norm: Any) -> float:
    return float(_first(norm, "variance_epsilon", "eps"))


def _norm_of(modules: Sequence[Any], offset: float, sizes: Sequence[int] = (1,)) -> Norm | None:
    """Return a norm as a function; for several modules, of as many heads each as `sizes` says."""
    if modules[0] is None:
        return None
    if isinstance(modules[0], torch.nn.LayerNorm):
        norm: Norm = modules[0]
        return norm
    eps, n = _eps_of(modules[0]), len(modules[0].weight)
    rows = [each.weight.expand(size, n) for each, size in zip(modules, sizes, strict=True)]
    weight = torch.cat(rows) if len(rows) > 1 else modules[0].weight
    if weight.is_cuda and not offset and weight.ndim == 1:
        return functools.partial(torch.rms_norm, normalized_shape=(n,), weight=weight, eps=eps)
    weight = (weight.float() + offset) * math.sqrt(n)
    floor = torch.tensor(math.sqrt(n * eps), dtype=torch.float32, device=weight.device)
    return lambda x: rms_norm(x, weight, floor)
