# SPDX-License-Identifier: Apache-2.0
"""The same text, faster: packed and quantised weights, fused norms.

    decoder = labs_decode.prepare(model)
    decoder = labs_fast.speed_up(decoder, "int4", batch_invariant=True, cuda_graphs=True)

labs.load_model calls it if this file is present. This file needs labs_decode.py, labs_graphs.py,
labs_kernels.py, labs_packing.py and labs_products.py.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

import labs_decode
import labs_graphs
import labs_kernels
import labs_packing
import labs_products
from labs_decode import Decoder, Tensor
from labs_packing import Make, Packing

# Their kernels unpack the weight for each row, so a row's company changes nothing.
QUANTISED = (labs_packing.int4_weight, labs_packing.int8_weight, labs_packing.gguf_weight)
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def speed_up(
    decoder: Decoder,
    method: str = "none",
    *,
    batch_invariant: bool,
    cuda_graphs: bool,
    make: Make = labs_packing.as_one,
) -> Decoder:
    """Replace linear layers and norms of the decoder's model by faster ones with the same text.

    method: fp16, int8 or int4 weights on a CPU, with other text; gguf: the 4 or 8 bits of a GGUF
    file, where that is faster; auto, or gguf for other models: fp16 in place of float32, where that
    is faster. make: packs weights, or has them packed. Raises ValueError if a layer cannot be
    packed as asked.
    """
    model, devices = decoder.model, {each.device for each in decoder.model.parameters()}
    on_one_gpu = len(devices) == 1 and next(iter(devices)).type == "cuda"
    on_cpu = {device.type for device in devices} == {"cpu"}
    kind = _kind_of(decoder, method, on_cpu)
    if decoder.packable:  # other models read `weight` at each step, which would unpack it
        pack(model, kind, make)
    if decoder.packable and on_one_gpu:
        fuse_norms(model)
    packed = {each.fused for each in model.modules() if isinstance(each, PackedLinear)}
    left = _left(model, method, sum(fused.numel for fused in packed))
    weights = [*model.parameters(), *(fused.packed for fused in packed)]
    captures = cuda_graphs and on_one_gpu and decoder.can_reuse_prefix
    if captures:  # slots that grow would lose their graphs
        decoder = replace(decoder, grow=None)
    decoder = _with_invariance(decoder, batch_invariant, left)
    decoder = labs_products.steadied(decoder, packed)
    return replace(
        decoder,
        weight_bytes=sum(each.nbytes for each in weights),
        graphs=labs_graphs.Graphs(devices.pop()) if captures else None,
        quant_method=kind if packed else "none",
    )


def _with_invariance(decoder: Decoder, wanted: bool, left: int) -> Decoder:
    """Return labs_decode.with_invariance; packed layers see to lone rows themselves.

    left: how many numbers are in layers that are not packed.
    """
    modules = decoder.model.modules()
    tables = {id(each.weight) for each in modules if isinstance(each, torch.nn.Embedding)}
    weights = [each for each in decoder.model.parameters() if id(each) not in tables]
    # Each of the experts, which are not packed, has the rows of a batch that are routed to it.
    routed = any(each.ndim > 2 for each in weights)
    in_fp32 = [each for each in weights if each.dtype == torch.float32]
    packed = torch.float32 in labs_kernels.packed_types() and all(w.ndim == 1 for w in in_fp32)
    exact = wanted and not routed and (packed or not in_fp32)
    decoder = labs_decode.with_invariance(decoder, exact)
    return replace(decoder, duplicates_lone_row=decoder.duplicates_lone_row and left > 0)


def _left(model: Any, method: str, packed: int) -> int:
    """Return how many numbers are in layers that are not packed.

    packed: how many are. Raises ValueError if these are too few for a method.
    """
    embedding, rest = model.get_input_embeddings().weight, model.parameters()
    left: int = sum(each.numel() for each in rest if each is not embedding and each.ndim > 1)
    if method not in ("auto", "gguf", "none") and left > packed:
        raise ValueError(
            f"quant_method = {method}: needs a model with only plain linear layers, all on CPU"
            + (" and in fp32" if method == "fp16" else "")
        )
    return left


def _kind_of(decoder: Decoder, method: str, on_cpu: bool) -> str:
    """Return the name in labs_packing.PACKINGS that a method means for this model and machine."""
    if method not in ("auto", "gguf"):
        return method
    keeps = method == "gguf" and on_cpu and has_few_bits(decoder)
    if keeps and labs_packing.has_quantised_kernels():
        return "gguf"
    in_fp32 = on_cpu and decoder.model.dtype == torch.float32
    return "fp16" if in_fp32 and labs_packing.has_fp16_kernel() else "none"


def has_few_bits(decoder: Decoder) -> bool:
    """Return whether a model was converted from a GGUF file whose products have 8 bits or fewer."""
    stated = getattr(decoder.config, "gguf_types", None)
    types = {str(each) for each in stated} if isinstance(stated, list) else set()
    return bool(types) and not types & {"F16", "BF16", "F64"} and types != {"F32"}


FUSED_PROJECTIONS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # share an input


class FusedWeight:
    """The product of layers that read the same input; the first one called computes it for all."""

    def __init__(
        self,
        linears: Sequence[torch.nn.Linear],
        packing: Packing,
        name: str = "",
        make: Make = labs_packing.as_one,
    ) -> None:
        self.sizes = [linear.out_features for linear in linears]
        self.numel = sum(linear.weight.numel() for linear in linears)
        weights = [linear.weight.detach() for linear in linears]
        self.packed = make(name, packing, weights)
        if packing is labs_packing.gguf_weight:
            self.packed = labs_packing.with_more_bits_for_prompts(self.packed, weights)
        biases = [linear.bias.detach() for linear in linears if linear.bias is not None]
        self.bias = torch.cat(biases) if biases else None
        linear = packing not in QUANTISED and weights[-1].is_cpu
        self.sample = labs_products.sample(weights[-1]) if linear else None
        self.last: tuple[Tensor | None, Sequence[Tensor]] = None, ()  # one tuple, set atomically

    @property
    def product(self) -> labs_packing.Rows:
        """The product of x [N, in], by as few Python calls as possible."""
        multiply, bias = self.packed.multiply, self.bias
        direct = self.packed.rows if bias is None else None
        return direct or (lambda x: multiply(x, bias))

    def part(self, x: Tensor, index: int) -> Tensor:
        known, parts = self.last
        if known is not x:
            parts = torch.split(self.packed.multiply(x, self.bias), self.sizes, -1)
        self.last = (x, parts) if index + 1 < len(parts) else (None, ())
        return parts[index]


class PackedLinear(torch.nn.Module):
    """A linear layer whose weight is packed, alone or with other layers that read its input."""

    def __init__(self, linear: torch.nn.Linear, fused: FusedWeight, index: int) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias, self.fused, self.index = linear.bias, fused, index

    @property
    def weight(self) -> Tensor:
        """The weight, unpacked at each call; from 4 or 8 bits, the dequantised weight."""
        return torch.split(self.fused.packed.unpack(), self.fused.sizes)[self.index]

    def forward(self, x: Tensor) -> Tensor:
        return self.fused.part(x, self.index)


@torch.inference_mode()
def pack(model: Any, method: str = "none", make: Make = labs_packing.as_one) -> None:
    """Replace plain linear layers by packed ones, freeing their weights one group at a time.

    On a GPU, replace only layers that can be fused. method, on a CPU only: a name in
    labs_packing.PACKINGS; "int4" takes 8 bits for the output layer, whose loss at 4 bits shows.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    types = [torch.float32, torch.bfloat16, torch.float16]
    types = {"none": labs_kernels.packed_types(), "fp16": types[:1]}.get(method, types)
    named = model.named_modules()
    for path, parent in [each for each in named if type(each[1]) is not torch.nn.Linear]:
        children = dict(parent.named_children())
        names = [name for name in children if _can_pack(children[name], types, method)]
        del children  # it holds weights
        for group in _projection_groups(parent, names):
            linears = [getattr(parent, name) for name in group]
            kind = "int8" if method == "int4" and linears == [head] else method
            on_cpu = linears[0].weight.is_cpu
            if len(group) == 1 and not on_cpu:
                continue
            packing = labs_packing.PACKINGS[kind] if on_cpu else labs_packing.dense_weight
            try:
                together = FusedWeight(linears, packing, f"{path}.{'+'.join(group)}", make)
            except torch.OutOfMemoryError:  # the GPU does not hold these weights twice
                return
            if on_cpu:
                labs_packing.give_back([linear.weight for linear in linears])
            for index, (name, linear) in enumerate(zip(group, linears, strict=True)):
                setattr(parent, name, PackedLinear(linear, together, index))
            del linears, linear
    torch.cuda.empty_cache()  # the memory of the weights that were fused


def _projection_groups(parent: Any, names: list[str]) -> list[tuple[str, ...]]:
    """Return the groups of layers that can be fused, and each other layer alone."""

    def alike(group: tuple[str, ...]) -> bool:
        linears = [getattr(parent, name) for name in group if name in names]
        kinds = {(x.in_features, x.weight.dtype, x.bias is None) for x in linears}
        return len(linears) == len(group) and len(kinds) == 1

    groups = [group for group in FUSED_PROJECTIONS if alike(group)]
    grouped = {name for group in groups for name in group}
    return [*groups, *((name,) for name in names if name not in grouped)]


def _can_pack(module: Any, types: list[torch.dtype], method: str) -> bool:
    if type(module) is not torch.nn.Linear or _is_hooked(module):
        return False
    if type(module.weight) is not torch.nn.Parameter:  # it is quantised already
        return False
    if module.weight.is_cuda:
        return method == "none"
    # The kernel for 8 bits reads beyond the end of other weights.
    fits = method in ("none", "fp16") or module.in_features % labs_packing.INT4_GROUP == 0
    return fits and module.weight.is_cpu and module.weight.dtype in types


def _is_hooked(module: Any) -> bool:
    hooks = module._forward_hooks or module._forward_pre_hooks
    return bool(hooks) or hasattr(module, "_hf_hook") or "forward" in vars(module)


@torch.inference_mode()
def fuse_norms(model: Any) -> None:
    """Replace norms by torch's rms_norm if their output is the same: one kernel instead of six."""
    for module in model.modules():
        weight, eps = (getattr(module, name, None) for name in ("weight", "variance_epsilon"))
        if eps is None or weight is None or weight.ndim != 1 or _is_hooked(module):
            continue
        if weight.dtype != model.dtype or len(inspect.signature(module.forward).parameters) != 1:
            continue  # some norms take a gate
        options: Any = {"normalized_shape": weight.shape, "weight": weight, "eps": eps}
        norm: Any = functools.partial(torch.nn.functional.rms_norm, **options)
        x = torch.linspace(-2, 3, 2 * len(weight), device=weight.device, dtype=weight.dtype)
        x = x.view(1, 2, -1)
        with contextlib.suppress(Exception):  # code that came with a model may raise anything
            theirs = module(x).float()
            if (norm(x).float() - theirs).norm() <= 0.01 * theirs.norm():
                module.forward = norm


def bitsandbytes(wanted: dict[str, Any], dtype: str) -> Any:
    """Return transformers' configuration of the fields of labs.Quantization. dtype: the model's."""
    import transformers

    compute = wanted["bnb_4bit_compute_dtype"].replace("auto", dtype)
    options = {**wanted, "bnb_4bit_compute_dtype": DTYPES.get(compute, compute)}
    del options["quant_method"], options["kv_dtype"]
    return transformers.BitsAndBytesConfig(**options)  # type: ignore[no-untyped-call]
