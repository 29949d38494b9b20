# SPDX-License-Identifier: Apache-2.0
"""The same text, faster: packed and quantised weights, fused norms.

    decoder = labs_decode.prepare(model)
    decoder = labs_fast.speed_up(decoder, "int4", batch_invariant=True, cuda_graphs=True)

labs.load_model calls it if this file is present. This file needs labs_decode.py and labs_graphs.py.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch

import labs_decode
import labs_graphs
from labs_decode import Decoder, Tensor

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
PACKED_ROWS = 16  # rows that oneDNN chooses its blocks for, as fast for 1 row and for 256
INT4_GROUP = 32  # 4-bit weights that share a scale
OFF_GRID = 0.1  # of a step: bfloat16 rounds by less, and numbers of a finer grid are further off


def speed_up(
    decoder: Decoder, method: str = "none", *, batch_invariant: bool, cuda_graphs: bool
) -> Decoder:
    """Replace linear layers and norms of the decoder's model by faster ones with the same text.

    method: fp16, int8 or int4 weights on a CPU, with other text; gguf: the 4 or 8 bits of a GGUF
    file, where that is faster; auto, or gguf for other models: fp16 in place of float32, where that
    is faster. Raises ValueError if a layer cannot be packed as asked.
    """
    model, devices = decoder.model, {each.device for each in decoder.model.parameters()}
    on_one_gpu = len(devices) == 1 and next(iter(devices)).type == "cuda"
    has_fp32 = any(each.dtype == torch.float32 for each in model.parameters())
    on_cpu = {device.type for device in devices} == {"cpu"}
    if (kind := method) in ("auto", "gguf"):
        kind = "fp16" if on_cpu and model.dtype == torch.float32 and has_fp16_kernel() else "none"
    if method == "gguf" and on_cpu and has_few_bits(decoder) and has_quantised_kernels():
        kind = "gguf"
    if decoder.packable:  # other models read `weight` at each step, which would unpack it
        pack(model, kind)
    if decoder.packable and on_one_gpu:
        fuse_norms(model)
    packed = {each.fused for each in model.modules() if isinstance(each, PackedLinear)}
    embedding, rest = model.get_input_embeddings().weight, model.parameters()
    left = sum(each.numel() for each in rest if each is not embedding and each.ndim > 1)
    if method not in ("auto", "gguf", "none") and left > sum(fused.numel for fused in packed):
        raise ValueError(
            f"quant_method = {method}: needs a model with only plain linear layers, all on CPU"
            + (" and in fp32" if method == "fp16" else "")
        )
    weights = [*model.parameters(), *(fused.packed for fused in packed)]
    captures = cuda_graphs and on_one_gpu and decoder.can_reuse_prefix
    exact = batch_invariant and (not has_fp32 or torch.float32 in _packed_types())
    decoder = labs_decode.with_invariance(decoder, exact)
    return replace(
        decoder,
        duplicates_lone_row=decoder.duplicates_lone_row and (kind in ("none", "fp16") or left > 0),
        weight_bytes=sum(each.nbytes for each in weights),
        graphs=labs_graphs.Graphs(devices.pop()) if captures else None,
        quant_method=kind if packed else "none",
    )


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A weight in the form of its product: multiply(x [..., in], bias [out] or None); unpack()."""

    multiply: Callable[[Tensor, Tensor | None], Tensor]
    unpack: Callable[[], Tensor]
    nbytes: int


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
    linear, nbytes = torch.ops.mkldnn._linear_pointwise, weight.nbytes  # the weight itself is freed
    multiply = lambda x, bias: linear(x, packed, bias, "none", [], "")  # noqa: E731
    return PackedWeight(multiply, packed.to_dense, nbytes)


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
    return PackedWeight(_by_rows(product), unpack, 2 * weight.numel())


def has_fp16_kernel() -> bool:
    """Return whether float32 products with weights in 16 bits are faster here than without."""
    with contextlib.suppress(Exception):  # a build of torch without FBGEMM raises any error
        return not labs_decode.has_bf16("cpu") and bool(fp16_weight(torch.eye(2)).unpack().any())
    return False


def has_few_bits(decoder: Decoder) -> bool:
    """Return whether a model was converted from a GGUF file whose products have 8 bits or fewer."""
    stated = getattr(decoder.config, "gguf_types", None)
    types = {str(each) for each in stated} if isinstance(stated, list) else set()
    return bool(types) and not types & {"F16", "BF16", "F64"} and types != {"F32"}


def has_quantised_kernels() -> bool:
    """Return whether torch's kernels for 4 and 8 bits are faster here than those for 16."""
    return "AVX512" in torch.backends.cpu.get_cpu_capability()


def gguf_weight(weight: Tensor) -> PackedWeight:
    """Take over 4-bit numbers with their scales (Q4_0, Q4_1, Q4_K); round others to 8 bits."""
    if weight.shape[1] % INT4_GROUP == 0 and grid_of(_groups(weight[:16])) is not None:
        grid = grid_of(_groups(weight))
        return int4_weight(weight, grid) if grid else int8_weight(weight)
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


def int4_weight(weight: Tensor, grid: tuple[Tensor, Tensor] | None = None) -> PackedWeight:
    """Round to 4-bit numbers with a scale and a zero point for each INT4_GROUP of them, as in Q4_1.

    It is faster for few rows and slower for many, as each row unpacks it. Rows keep their bits.
    """
    groups = _groups(weight)
    low, steps = grid or (groups.amin(-1), (groups.amax(-1) - groups.amin(-1)) / 15)
    steps = steps.clamp_min(torch.finfo(torch.float32).tiny)
    levels = ((groups - low[..., None]) / steps[..., None]).round_().clamp_(0, 15)
    levels = levels.to(torch.int32).flatten(1)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(levels, 1)
    scales = torch.stack([steps, low + 8 * steps], -1)  # the kernel's zero is in the middle
    scales = scales.transpose(0, 1).contiguous().bfloat16()
    (rows, columns), kernel = weight.shape, torch.ops.aten._weight_int4pack_mm_for_cpu
    multiply = _in_bf16(lambda x: kernel(x, packed, INT4_GROUP, scales)[:, :rows])
    unpack = lambda: multiply(torch.eye(columns), None).t().contiguous()  # noqa: E731
    return PackedWeight(multiply, unpack, packed.nbytes + scales.nbytes)


def int8_weight(weight: Tensor) -> PackedWeight:
    """Round to 8-bit numbers with a scale for each output, otherwise as int4_weight."""
    steps = weight.float().abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny) / 127
    packed, weight_type = (weight.float() / steps[:, None]).round_().to(torch.int8), weight.dtype
    scales = steps.bfloat16()
    multiply = _in_bf16(lambda x: torch.ops.aten._weight_int8pack_mm(x, packed, scales))
    unpack = lambda: packed.to(weight_type) * scales[:, None]  # noqa: E731
    return PackedWeight(multiply, unpack, packed.nbytes + scales.nbytes)


def _by_rows(kernel: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor | None], Tensor]:
    """Return a linear layer's product from a kernel that takes rows [N, in] and no bias."""

    def multiply(x: Tensor, bias: Tensor | None) -> Tensor:
        product = kernel(x if x.ndim == 2 else x.reshape(-1, x.shape[-1]))
        product = product if bias is None else product + bias
        return product if x.ndim == 2 else product.view(*x.shape[:-1], -1)

    return multiply


def _in_bf16(kernel: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor | None], Tensor]:
    """Return a product in bfloat16: in other types these kernels are ten times slower."""
    return _by_rows(lambda x: kernel(x.bfloat16()).to(x.dtype))


PACKINGS = {"none": onednn_weight, "fp16": fp16_weight, "int8": int8_weight}
PACKINGS |= {"int4": int4_weight, "gguf": gguf_weight}
FUSED_PROJECTIONS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # share an input


class FusedWeight:
    """The product of layers that read the same input; the first one called computes it for all."""

    def __init__(
        self, linears: Sequence[torch.nn.Linear], packing: Callable[[Tensor], PackedWeight]
    ) -> None:
        self.sizes = [linear.out_features for linear in linears]
        self.numel = sum(linear.weight.numel() for linear in linears)
        self.packed = packing(torch.cat([linear.weight.detach() for linear in linears]))
        biases = [linear.bias.detach() for linear in linears if linear.bias is not None]
        self.bias = torch.cat(biases) if biases else None
        self.last: tuple[Tensor | None, Sequence[Tensor]] = None, ()  # one tuple, set atomically

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
def pack(model: Any, method: str = "none") -> None:
    """Replace plain linear layers by packed ones, freeing their weights one group at a time.

    On a GPU, replace only layers that can be fused. method, on a CPU only: a name of PACKINGS;
    "int4" takes 8 bits for the output layer, whose loss at 4 bits shows.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    types = [torch.float32, torch.bfloat16, torch.float16]
    types = {"none": _packed_types(), "fp16": types[:1]}.get(method, types)
    for parent in [module for module in model.modules() if type(module) is not torch.nn.Linear]:
        children = dict(parent.named_children())
        names = [name for name in children if _can_pack(children[name], types, method)]
        del children  # it holds weights
        for group in _projection_groups(parent, names):
            linears = [getattr(parent, name) for name in group]
            kind = "int8" if method == "int4" and linears == [head] else method
            on_cpu = linears[0].weight.is_cpu
            if len(group) == 1 and not on_cpu:
                continue
            try:
                together = FusedWeight(linears, PACKINGS[kind] if on_cpu else dense_weight)
            except torch.OutOfMemoryError:  # the GPU does not hold these weights twice
                return
            for index, (name, linear) in enumerate(zip(group, linears, strict=True)):
                setattr(parent, name, PackedLinear(linear, together, index))
            del linears, linear
    torch.cuda.empty_cache()  # the memory of the weights that were fused


def _packed_types() -> list[torch.dtype]:
    if not (torch._C._has_mkldnn and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return []
    bf16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return [torch.float32, torch.bfloat16] if bf16 else [torch.float32]


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
    fits = method != "int4" or module.in_features % INT4_GROUP == 0
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
    del options["quant_method"]
    return transformers.BitsAndBytesConfig(**options)  # type: ignore[no-untyped-call]
