# SPDX-License-Identifier: Apache-2.0
"""labs_fast and labs_calls: packed weights, CUDA graphs, guesses, split steps; the same text."""

from __future__ import annotations

import dataclasses
import functools
import gc
import math
import random
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import gguf
import kit
import numpy
import pytest
import safetensors.torch
import torch
from decoding import (
    FOUR,
    NO_MEMORY,
    answers_of,
    begin_alike,
    joined,
    raising,
    reference,
    run_at_random,
    tokens_of,
)
from kit import NEW_TOKENS, PROMPTS, newcomer, prepare, random_model, row_of

import labs
import labs_attention
import labs_calls
import labs_decode as decode
import labs_fast as fast
import labs_fingerprint
import labs_graphs
import labs_kernels
import labs_loop as loop
import labs_packing
import labs_products
import labs_shell

SOME = ["llama", "gemma3_text", "gpt_oss"]  # plain, with windows, with sinks
METHODS = ("fp16", "int8", "int4")
packs = pytest.mark.skipif(not torch._C._has_mkldnn, reason="torch has no oneDNN here")
FLOAT32, BF16 = labs_kernels.packed_types()[:1], labs_kernels.packed_types()[1:]
no_bf16 = pytest.mark.skipif(not BF16, reason="oneDNN has no bfloat16 on this processor")
dtypes = pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=no_bf16)]
)

# ---------------------------------------------------------------- packed weights


def linear_of(
    dtype: torch.dtype, *, bias: bool = False, wide: int = 96, out: int = 160
) -> torch.nn.Linear:
    torch.manual_seed(4)
    return torch.nn.Linear(wide, out, bias=bias).to(dtype).requires_grad_(False)


def packed(linear: torch.nn.Linear, method: str = "none") -> fast.PackedLinear:
    return fast.PackedLinear(linear, fast.FusedWeight([linear], labs_packing.PACKINGS[method]), 0)


def keeps_bits(layer: Any, dtype: torch.dtype, first: int) -> bool:
    """Return whether rows have the same bits among `first` rows and more, up to 64."""
    x = torch.randn(64, 96).to(dtype)
    whole = layer(x)
    return all(torch.equal(layer(x[:rows]), whole[:rows]) for rows in range(first, 65))


@packs
@dtypes
@pytest.mark.parametrize("bias", [False, True])
def test_a_packed_layer_gives_what_the_plain_layer_gives(bias: bool, dtype: torch.dtype) -> None:
    linear = linear_of(dtype, bias=bias)
    for shape in ((1, 96), (7, 96), (3, 5, 96), (2, 1, 96)):
        x = torch.randn(*shape).to(dtype)
        found, expected = packed(linear)(x), linear(x)
        assert (found.shape, found.dtype) == (expected.shape, dtype)
        torch.testing.assert_close(found, expected)
    assert keeps_bits(packed(linear), dtype, 2)
    odd = linear_of(dtype, wide=97)
    assert torch.equal(packed(odd).weight, odd.weight)


class Quantised(torch.nn.Linear):
    """Stands for the layers of bitsandbytes, which are linear layers with other weights."""


@packs
def test_packing_replaces_plain_layers_of_a_packed_type_once_and_frees_their_weights() -> None:
    layers = {
        "plain": linear_of(torch.float32),
        "short": linear_of(torch.float16),
        "other": Quantised(4, 4),
        "meta": torch.nn.Linear(4, 4, device="meta"),
        "embedding": torch.nn.Embedding(4, 4),
        "hooked": linear_of(torch.float32),
        "inner": torch.nn.Sequential(linear_of(torch.float32)),
    }
    layers["hooked"].register_forward_hook(lambda *args: None)
    model = torch.nn.ModuleDict(layers)
    weights = [weakref.ref(layers.pop("plain").weight), weakref.ref(model["inner"][0].weight)]
    gc.disable()
    try:
        fast.pack(model)
        assert [weight() for weight in weights] == [None, None]
    finally:
        gc.enable()
    changed = [name for name, child in model.items() if layers.get(name) is not child]
    assert changed == ["plain"]
    plain = model["plain"]
    assert isinstance(plain, fast.PackedLinear)
    assert isinstance(model["inner"][0], fast.PackedLinear)
    fast.pack(model)
    assert model["plain"] is plain


class Reads(torch.nn.Module):
    """Three layers that read one input, as attention's."""

    def __init__(self, dtype: torch.dtype = torch.float32, bias: tuple[bool, ...] = (False,) * 3):
        super().__init__()
        for name, out, has in zip(("q_proj", "k_proj", "v_proj"), (32, 16, 16), bias, strict=True):
            setattr(self, name, linear_of(dtype, out=out, bias=has))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [self.q_proj(x), self.k_proj(x), self.v_proj(x)]


@packs
@dtypes
@pytest.mark.parametrize("bias", [(False,) * 3, (True,) * 3])
@pytest.mark.parametrize("packing", [labs_packing.onednn_weight, labs_packing.dense_weight])
def test_layers_that_read_the_same_input_are_one_product(
    packing: Any, bias: tuple[bool, ...], dtype: torch.dtype, monkeypatch: Any
) -> None:
    model, calls = Reads(dtype, bias), list[Any]()
    x, weight = torch.randn(5, 96).to(dtype), model.k_proj.weight
    expected = model(x)

    def counted(weight: torch.Tensor) -> labs_packing.PackedWeight:
        product = packing(weight)
        return dataclasses.replace(
            product, multiply=lambda *a: calls.append(a) or product.multiply(*a)
        )

    monkeypatch.setitem(labs_packing.PACKINGS, "none", counted)
    fast.pack(model)
    torch.testing.assert_close(model(x), expected)
    assert len(calls) == 1
    assert model.q_proj.fused.last == (None, ())  # nothing of a request stays
    assert torch.equal(model.k_proj.weight, weight)


@packs
def test_a_layer_of_a_fused_product_may_be_called_alone_in_any_order_and_by_threads() -> None:
    model = Reads()
    inputs = [torch.randn(5, 96) for _ in range(8)]
    expected = [model(x) for x in inputs]
    fast.pack(model)

    def ask(index: int) -> None:
        for _ in range(20):
            for name, part in zip(("v_proj", "q_proj", "k_proj"), (2, 0, 1), strict=True):
                found = getattr(model, name)(inputs[index])
                torch.testing.assert_close(found, expected[index][part])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(ask, range(8)))


@packs
@pytest.mark.parametrize("bias", [(True, False, False), (True, True, False)])
def test_layers_that_differ_are_packed_one_by_one(bias: tuple[bool, ...]) -> None:
    model = Reads(bias=bias)
    fast.pack(model)
    assert len({model.q_proj.fused, model.k_proj.fused, model.v_proj.fused}) == 3


# ---------------------------------------------------------------- weights in fewer bits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("method", "off"), [("int8", 0.01), ("int4", 0.12)])
def test_a_product_in_fewer_bits_is_near_the_whole_one_and_is_the_one_of_its_weight(
    method: str, off: float, dtype: torch.dtype
) -> None:
    for out in (48, 50):
        linear = linear_of(dtype, out=out, bias=True)
        layer, x = packed(linear, method), torch.randn(2, 3, 96).to(dtype)
        found, whole = layer(x).float(), linear(x)
        assert (found.shape, layer.weight.shape) == (whole.shape, linear.weight.shape)
        assert (found - whole.float()).norm() <= off * whole.float().norm()
        read = x.float() @ layer.weight.float().t() + linear.bias.float()
        torch.testing.assert_close(found, read, atol=2e-2, rtol=2e-2)
    assert dtype == torch.float16 or keeps_bits(packed(linear_of(dtype), method), dtype, 1)


def test_weights_that_fewer_bits_can_express_survive_them() -> None:
    linear = linear_of(torch.float32, out=64)
    levels = torch.randint(0, 16, (64, 96)).float()
    levels[:, ::32], levels[:, 1::32] = 0, 15  # sixteen levels in each group of 32
    linear.weight.copy_(levels * 0.25 - 2)
    torch.testing.assert_close(packed(linear, "int4").weight, linear.weight, rtol=1e-6, atol=1e-6)
    for value in (0.0, 0.5):
        torch.nn.init.constant_(linear.weight, value)
        for method in METHODS:
            torch.testing.assert_close(
                packed(linear, method).weight, linear.weight, rtol=1e-3, atol=0
            )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["qwen2"])
def test_a_model_in_fewer_bits_is_the_one_of_its_rounded_weights(kind: str, method: str) -> None:
    decoder = prepare(random_model(kind, intermediate_size=128), method=method)
    plain = random_model(kind, intermediate_size=128)
    for name, module in decoder.model.named_modules():
        if isinstance(module, fast.PackedLinear):
            with torch.no_grad():
                plain.get_submodule(name).weight.copy_(module.weight)
    logits = [decode.forward(d, newcomer(d, FOUR[2])) for d in (decoder, prepare(plain))]
    found, expected = logits  # int8 and int4 also round each layer's input to bfloat16
    assert (found - expected).norm() < (1e-5 if method == "fp16" else 0.03) * expected.norm()
    assert not decoder.duplicates_lone_row  # the products see to it


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "qwen3"])
def test_experts_keep_no_promise_about_bits(kind: str) -> None:
    assert prepare(random_model(kind)).invariant == (kind == "qwen3" and bool(FLOAT32))
    assert prepare(random_model(kind).bfloat16()).invariant == (kind == "qwen3")


def test_layers_in_float32_that_are_not_packed_keep_no_promise_about_bits() -> None:
    assert not prepare(random_model("gpt2")).invariant
    amx = labs_products.uses_amx(torch.bfloat16)
    assert prepare(random_model("gpt2").bfloat16()).invariant == (not amx)


def test_a_router_is_no_linear_layer() -> None:
    decoder = prepare(random_model("llama4_text").bfloat16())
    assert labs_products.steadied(dataclasses.replace(decoder, invariant=True)).mode == "joins"
    assert labs_products.steadied(decoder) is decoder


@pytest.mark.parametrize("columns", [576, 1024, 1100, 1536, 2048, 2049])
@pytest.mark.parametrize("lines", [16, 64, 576])
@pytest.mark.parametrize("dtype", [torch.float32, *BF16])
@torch.inference_mode()
def test_a_lone_row_has_its_bits_for_every_weight(dtype: Any, lines: int, columns: int) -> None:
    for seed in range(3):
        torch.manual_seed(seed)
        linear = torch.nn.Linear(columns, lines, bias=False).to(dtype)
        fused = fast.FusedWeight([linear], labs_packing.onednn_weight)
        labs_products._steady([fused], ())
        x = torch.randn(max(20_000 // lines, 40), columns).to(dtype)
        parts = torch.split(x, 32)  # with more rows, AMX rounds otherwise
        together = torch.cat([fused.product(part) for part in parts])
        assert torch.equal(torch.cat([fused.product(row) for row in torch.split(x, 1)]), together)


@pytest.mark.parametrize(("columns", "lines"), [(576, 960), (1536, 576), (2560, 960), (4864, 896)])
@pytest.mark.parametrize("dtype", [torch.float32, *BF16])
@torch.inference_mode()
def test_lines_of_prompts_have_their_bits_beside_any_number_of_others(
    dtype: Any, columns: int, lines: int
) -> None:
    torch.manual_seed(columns)
    linear = torch.nn.Linear(columns, lines).to(dtype)
    fused = fast.FusedWeight([linear], labs_packing.onednn_weight)
    [plan] = labs_products._steady([fused], labs_products.SIZES)
    assert all(plan)
    x = torch.randn(32, columns).to(dtype)
    x[:16] = labs_products._cancelling(linear.weight[:16])  # these show each rounding
    whole = x.repeat(11, 1)
    for add in (lambda x: fused.product(x), lambda x: fused.packed.multiply(x[None], None)[0]):
        first = add(whole[:40])[:32]
        for count in (33, 64, 77, 100, 128, 160, 200, 224, 225, 250, 256, 257, 288, 300, 352):
            assert torch.equal(add(whole[:count]), first.repeat(11, 1)[:count]), count
        for count in (2, 3, 17, 31, 32):
            assert torch.equal(add(x[:count]), add(x)[:count]), count


def test_products_of_many_rows_are_cut_into_sizes_that_round_alike() -> None:
    def other(count: int) -> float:  # most sizes from 96 to 208 round alike
        return 1 + 2**-16 * ((count > 32) + (count > 64) + (count > 208))

    called: list[int] = []

    def packing(weight: torch.Tensor) -> labs_packing.PackedWeight:
        def multiply(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
            called.append(len(x))
            y = (x[:, None] * weight).sum(-1) * other(len(x))
            return y if bias is None else y + bias

        return labs_packing.PackedWeight(multiply, lambda: weight, 0)

    fused = fast.FusedWeight([torch.nn.Linear(96, 40)], packing)
    assert labs_products._steady([fused], labs_products.SIZES)[0][1] == [96, 144, 208]
    for count, sizes in (
        (33, [96]),
        (96, [96]),
        (99, [144]),
        (193, [208]),
        (209, [144] * 2),
        (400, [208] * 2),
    ):
        called.clear()
        assert fused.product(torch.ones(count, 96)).shape == (count, 40)
        assert called == sizes
    called.clear()
    assert fused.product(torch.ones(32, 96)).shape == (32, 40)
    assert called == [32]


def test_with_amx_only_numbers_of_rows_that_were_tried_reach_a_kernel(monkeypatch: Any) -> None:
    called: list[int] = []

    def packing(weight: torch.Tensor) -> labs_packing.PackedWeight:
        def multiply(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
            called.append(len(x))
            return (x[:, None] * weight).sum(-1) * (
                1 if len(x) in (4, 16, 32, 64, 208) else 1 + len(x) / 999
            )

        return labs_packing.PackedWeight(
            multiply, lambda: weight, 0, rows=lambda x: multiply(x, None)
        )

    monkeypatch.setattr(labs_products, "uses_amx", lambda dtype: True)
    fused = fast.FusedWeight([torch.nn.Linear(96, 40, bias=False)], packing)
    [(fill, sizes)] = labs_products._steady([fused], labs_products.SIZES)
    assert (sorted({*fill}), sizes) == ([0, 4, 16, 32], [64, 208])
    x = torch.randn(300, 96)
    whole = fused.product(x[:64])
    for count in range(300):
        called.clear()
        product = fused.product(x[:count])
        assert product.shape == (count, 40)
        assert {*called} <= {0, 4, 16, 32, 64, 208}
        assert torch.equal(product[:64], whole[:count])


def test_with_amx_layers_that_are_not_packed_keep_no_promise(monkeypatch: Any) -> None:
    for amx in (False, True):
        monkeypatch.setattr(labs_products, "uses_amx", lambda dtype, amx=amx: amx)
        assert prepare(random_model("gpt2").bfloat16()).invariant == (not amx)
        assert prepare(random_model("llama").bfloat16()).invariant


@pytest.mark.parametrize(
    ("limit", "amx"), [("AVX512_CORE_BF16", False), ("avx2", False), ("AVX512_CORE_AMX", True)]
)
def test_amx_counts_unless_onednn_is_kept_from_it(limit: str, amx: bool, monkeypatch: Any) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert labs_products.uses_amx(torch.bfloat16) == amx
    told = labs_fingerprint.hardware(torch.device("cpu"), torch.bfloat16)
    assert (", AMX, " in told) == amx
    assert not labs_products.uses_amx(torch.float32)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert not labs_products.uses_amx(torch.bfloat16)


def test_no_size_is_taken_if_a_rows_place_changes_its_bits() -> None:
    def packing(weight: torch.Tensor) -> labs_packing.PackedWeight:
        def multiply(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
            return (x[:, None] * weight).sum(-1) + torch.arange(len(x))[:, None]

        return labs_packing.PackedWeight(multiply, lambda: weight, 0)

    fused = fast.FusedWeight([torch.nn.Linear(96, 40)], packing)
    assert labs_products._steady([fused], labs_products.SIZES) == [((), ())]


def have_the_same_bits_alone(decoder: decode.Decoder, prompts: list[list[int]]) -> list[int]:
    """Compare prompts, prefilled as by the loop, with each alone; return how many a call has."""
    waiting, calls = [decode.new_batch(decoder, row_of(ids)) for ids in prompts], list[Any]()
    while waiting:
        group = loop.prompts_for_one_call(decoder, waiting)
        calls.append(loop._prefill(decoder, group))
        waiting = waiting[len(group) :]
    for ids, mine in zip(prompts, [batch for call in calls for batch in call], strict=True):
        alone = decode.prefill(decoder, decode.new_batch(decoder, row_of(ids)))
        assert torch.equal(mine.logits, alone.logits)
        for a, b in zip(mine.cache.buffers, alone.cache.buffers, strict=True):
            assert torch.equal(a[:, :, : len(ids)], b[:, :, : len(ids)])
    return [len(call) for call in calls]


@pytest.mark.parametrize("method", ["none", "int8"])
@torch.inference_mode()
def test_prompts_have_the_same_bits_beside_others(method: str) -> None:
    if method == "none" and not labs_kernels.packed_types():
        pytest.skip("this build of torch packs no weights")
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64}
    decoder = prepare(random_model("llama", **sizes).bfloat16(), method=method)
    draw = random.Random(7)
    prompts = [draw.choices(range(3, 200), k=n) for n in (40, 33, 90, 64, 20, 9, 200, 45, 250, 6)]
    calls = have_the_same_bits_alone(decoder, prompts)
    if decoder.steady and decoder.steady_prompts:
        assert calls == [4, 2, 2, 1, 1]


@pytest.mark.parametrize("method", ["int8", "gguf"])
def test_eight_bits_are_not_for_weights_that_their_kernel_cannot_read(method: str) -> None:
    if method == "gguf" and not labs_packing.has_quantised_kernels():
        pytest.skip("on this CPU, gguf means fp16, which has no such limit")
    model = random_model("llama", intermediate_size=100)
    model.config.gguf_types = ["Q8_0"]
    decoder = prepare(model, method=method)
    assert type(model.model.layers[0].mlp.down_proj) is torch.nn.Linear
    assert decode.forward(decoder, newcomer(decoder, FOUR[2])).isfinite().all()


@pytest.mark.parametrize("method", ["int4", "int8"])
def test_padded_heads_of_one_group_reach_a_kernel_as_it_needs_them(method: str) -> None:
    heads = {"hidden_size": 96, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 32}
    model = random_model("llama", intermediate_size=128, **heads).bfloat16()
    decoder = prepare(model, method=method)
    batch = decode.join(newcomer(decoder, FOUR[1], 0), newcomer(decoder, FOUR[2], 1))
    assert decode.forward(decoder, batch).isfinite().all()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("moody", [False, True])
def test_a_product_of_one_row_has_copies_beside_it_only_where_the_kernel_needs_them(
    moody: bool, bias: bool
) -> None:
    sizes, linears = [], [torch.nn.Linear(96, 40, bias=bias) for _ in range(2)]

    def packing(weight: torch.Tensor) -> labs_packing.PackedWeight:
        def multiply(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
            sizes.append(x[..., 0].numel())
            other = 1 + 2**-20 if moody and sizes[-1] == 1 else 1.0
            y = (x[..., None, :] * weight).sum(-1) * other
            return y if bias is None else y + bias

        return labs_packing.PackedWeight(multiply, lambda: weight, 0)

    fused = fast.FusedWeight(linears, packing)
    labs_products._steady([fused], labs_products.SIZES)
    x = torch.randn(7, 96)
    together = fused.product(x)
    for shape in ((1, 96), (1, 1, 96), (96,)):
        sizes.clear()
        alone = fused.packed.multiply(x[3].view(shape), fused.bias)
        assert torch.equal(alone, together[3].view(*shape[:-1], 80))
        assert sizes == [decode.LONE_ROW_COPIES if moody else 1]
    assert torch.equal(fused.product(x[3:4]), together[3:4])
    assert fused.product(x[:0]).shape == fused.packed.multiply(x[:0], fused.bias).shape == (0, 80)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0", "Q5_0"])
def test_numbers_of_a_gguf_file_keep_their_four_bits_and_others_get_eight(kind, dtype) -> None:
    type_ = gguf.GGMLQuantizationType[kind]
    numbers = numpy.random.default_rng(0).normal(0.02, 0.3, (40, 96)).astype(numpy.float32)
    data = gguf.quants.dequantize(gguf.quants.quantize(numbers, type_), type_)
    weight = torch.from_numpy(data)
    weight[3, 32:64] = 0.25  # a group of equal numbers
    linear = torch.nn.Linear(96, 40, bias=False).to(dtype)
    linear.weight = torch.nn.Parameter(weight.to(dtype), requires_grad=False)
    found = packed(linear, "gguf")
    bits = 8 * found.fused.packed.nbytes / found.fused.numel
    assert (bits > 8) == (kind in ("Q8_0", "Q5_0"))
    # bfloat16 keeps 8 bits of the scales and of the lowest numbers
    assert (found.weight.float() - weight).abs().max() <= 0.006 * weight.abs().max()


def test_numbers_of_a_q4_k_file_keep_their_four_bits() -> None:
    raw = numpy.random.default_rng(0).integers(0, 256, (32, 2, 144), dtype=numpy.uint8)
    raw[:, :, :4] = numpy.array([0.01, 0.02], numpy.float16).view(numpy.uint8)  # scales of scales
    type_ = gguf.GGMLQuantizationType.Q4_K
    data = torch.from_numpy(gguf.quants.dequantize(raw.reshape(32, -1), type_))
    linear = torch.nn.Linear(512, 32, bias=False)
    linear.weight = torch.nn.Parameter(data, requires_grad=False)
    found = packed(linear, "gguf")
    assert 8 * found.fused.packed.nbytes < 6 * found.fused.numel
    assert (found.weight - data).abs().max() <= 0.006 * data.abs().max()


def test_a_prompt_is_computed_with_the_weights_that_few_bits_were_taken_from() -> None:
    weight, bias = torch.randn(48, 64).round_() / 8, torch.randn(48)
    linear = torch.nn.Linear(64, 48)
    linear.load_state_dict({"weight": weight, "bias": bias})
    found, x = packed(linear, "gguf"), torch.randn(3, labs_packing.STEP_ROWS, 64)
    expected = torch.nn.functional.linear(x, weight, bias)
    assert torch.equal(found(x), torch.nn.functional.linear(x, weight) + bias)
    step = found(x[0])  # of no more rows than a step has
    assert not torch.equal(step, expected[0])
    assert (step - expected[0]).norm() < 0.02 * expected[0].norm()


@pytest.mark.parametrize("method", ["int8", "int4", "gguf"])
def test_a_large_weight_is_packed_in_parts_as_one_that_is_small(method) -> None:
    weight = torch.randn(labs_packing.ROWS_AT_ONCE + 16, 64, dtype=torch.bfloat16)
    pack = labs_packing.PACKINGS[method]
    parts = [pack(each).unpack() for each in (weight[:400], weight[400:])]
    assert torch.equal(pack(weight).unpack(), torch.cat(parts))


def test_weights_keep_their_numbers_when_their_memory_is_given_back(tmp_path) -> None:
    kept = torch.randn(1000, 64)
    safetensors.torch.save_file({"weight": kept}, tmp_path / "file")
    mapped = safetensors.torch.load_file(tmp_path / "file")["weight"]
    for weight in (mapped, kept.clone(), kept[1:, 3:], torch.ones(1)):
        expected = weight.clone()
        labs_packing.give_back([weight])
        assert torch.equal(weight, expected)


def test_a_command_for_one_stream_keeps_the_bits_of_a_gguf_file(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(labs_packing, "has_quantised_kernels", lambda: True)
    found = {}
    for kind in ("Q4_1", "Q8_0", "F16", "F32"):
        name = str(kit.save_gguf(tmp_path / f"{kind}.gguf", kind=kind))
        spec = labs.ModelSpec(model_name=name, cache_dir=str(tmp_path))
        config = labs_shell.for_one_stream(labs.Config(model=spec))
        model = labs.load_model(config)
        found[kind] = model.decoder.quant_method
        used = labs.generate(model, kit.SHORT, max_new_tokens=2).fingerprint
        assert used.quantization.get("quant_method", "none") == found[kind]
        assert labs.load_model(spec).decoder.quant_method == AUTO
    assert found == {"Q4_1": "gguf", "Q8_0": "gguf", "F16": AUTO, "F32": AUTO}
    fixed = labs.Config(model=labs.ModelSpec(torch_dtype="fp32"))
    assert labs_shell.for_one_stream(fixed) == fixed  # whoever gives a type gets this type
    monkeypatch.setattr(labs_packing, "has_quantised_kernels", lambda: False)
    labs.load_model.cache_clear()
    assert labs.load_model(config).decoder.quant_method == AUTO


@pytest.mark.parametrize("stated", [None, 7, "Q4_1", {}, [], [{}, "F16"], ["F32"]])
def test_what_a_configuration_says_of_gguf_is_checked(stated) -> None:
    decoder = decode.prepare(random_model("llama"))
    decoder.config.gguf_types = stated
    assert not fast.has_few_bits(decoder)


AUTO = "fp16" if labs_packing.has_fp16_kernel() else "none"


def test_fewer_bits_take_less_memory_and_the_output_layer_keeps_8_of_4() -> None:
    decoders = [prepare(random_model("llama"), method=method) for method in ("none", *METHODS)]
    sizes = [decoder.weight_bytes for decoder in decoders]
    assert sizes == sorted(sizes, reverse=True)
    assert len({*sizes}) == 4
    assert decoders[0].graphs is None  # for GPUs only
    model = decoders[3].model
    head, other = model.lm_head.fused, model.model.layers[0].mlp.up_proj.fused
    assert head.packed.nbytes > head.numel > other.packed.nbytes * head.numel / other.numel


@pytest.mark.parametrize("kind", ["gpt2", "mamba2", "rwkv"])
def test_fewer_bits_are_refused_without_plain_layers_or_for_a_model_that_does_not_join(
    kind: str,
) -> None:
    with pytest.raises(ValueError, match="int4: needs a model with only plain linear layers"):
        prepare(random_model(kind), method="int4")


# ---------------------------------------------------------------- norms


def norms_of(model: Any) -> list[Any]:
    return [each for each in model.modules() if hasattr(each, "variance_epsilon")]


@pytest.mark.parametrize("kind", ["llama", "gpt_oss", "deepseek_v3"])
def test_norms_that_are_torchs_rms_norm_are_computed_by_it(kind: str) -> None:
    model, ids = random_model(kind), torch.tensor([FOUR[3]])
    for norm in norms_of(model):
        torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    with torch.inference_mode():
        expected = model(ids).logits
        fast.fuse_norms(model)
        assert all(isinstance(norm.forward, functools.partial) for norm in norms_of(model))
        torch.testing.assert_close(model(ids).logits, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(("kind", "scale"), [("cohere2", 1.0), ("cohere2", 0.004), ("mamba2", 1.0)])
def test_norms_that_do_something_else_stay_however_small_they_are(kind: str, scale: float) -> None:
    model = random_model(kind)
    kept = [norm for norm in norms_of(model) if type(norm).__name__ != "Mamba2RMSNorm"]
    for norm in kept:
        torch.nn.init.constant_(norm.weight, scale)
    fast.fuse_norms(model)
    assert [isinstance(norm.forward, functools.partial) for norm in kept] == [False] * len(kept)
    assert kept


# ---------------------------------------------------------------- steps as graphs


class Recorded:
    """Stands for CUDA graphs: a recorded step runs again, on the tensors that it was given."""

    def __init__(self, monkeypatch: Any) -> None:
        self.shapes: list[tuple[int, ...]] = []
        self.replays = 0
        monkeypatch.setattr(labs_graphs, "record", self.record)
        monkeypatch.setattr(labs_graphs, "CAPTURE_AFTER", 1)

    def record(self, graphs: labs_graphs.Graphs, step: Any) -> Any:
        logits = step().clone()
        self.shapes.append(tuple(logits.shape))

        def replay() -> None:
            self.replays += 1
            logits.copy_(step())

        return replay, logits


@pytest.fixture
def recorded(monkeypatch: Any) -> Recorded:
    return Recorded(monkeypatch)


def graphed(kind: str = "llama") -> Any:
    decoder = prepare(random_model(kind), batch_invariant=False)
    return dataclasses.replace(decoder, graphs=labs_graphs.Graphs(torch.device("cpu")))


def begun(decoder: decode.Decoder, prompt: list[int], new: int = NEW_TOKENS) -> decode.Batch:
    row = decode.Row(id=0, ids=list(prompt), max_new_tokens=new, sampling=decode.Sampling())
    batch = decode.prefill(decoder, decode.new_batch(decoder, row))
    return loop.join_best(decoder, [], loop.step(decoder, batch)[0])[0]


def ended(decoder: decode.Decoder, batch: decode.Batch) -> list[int]:
    [row] = batch.rows
    while len(row.ids) < row.columns:
        batch, _ = loop.step(decoder, batch)
    assert decode.keep(batch, []) is None
    return tokens_of(row)


@pytest.mark.parametrize("kind", SOME)
def test_graphs_keep_the_tokens_of_rows_that_join_and_leave(kind: str, recorded: Recorded) -> None:
    (_, expected), decoder = reference(kind), graphed(kind)
    assert begin_alike(run_at_random(decoder, FOUR * 3, 7, most=5), expected)
    assert recorded.replays >= 20
    assert len({rows for rows, _ in recorded.shapes}) >= 3
    assert not decoder.graphs.failed


def test_a_graph_of_one_row_has_no_fixed_column(recorded: Recorded, monkeypatch: Any) -> None:
    decoder, seen = graphed(), []
    batch, written = newcomer(decoder, FOUR[1]), labs_attention.Step.written

    def watched(step: labs_attention.Step, *states: Any) -> Any:
        seen.append(step.column)
        return written(step, *states)

    monkeypatch.setattr(labs_attention.Step, "written", watched)
    for replays in (0, 1, 2, 3):  # a step before the graph, its capture, and three replays
        seen.clear()
        [row], column = batch.rows, batch.rows[0].written
        batch, _ = loop.step(decoder, batch)
        assert recorded.replays == replays
        assert (row.written, {*seen[-4:]}) == (column + 1, {-1 if replays else column})
        assert all(buffer[0, :, column].any() for buffer in batch.cache.buffers)
        assert not any(buffer[0, :, row.written :].any() for buffer in batch.cache.buffers)


def test_a_shape_is_captured_after_some_steps_and_anew_if_its_slots_move(
    recorded: Recorded, monkeypatch: Any
) -> None:
    monkeypatch.setattr(labs_graphs, "CAPTURE_AFTER", 3)
    decoder = graphed()
    batch = newcomer(decoder, FOUR[1])
    for captured in (0, 0, 0, 1, 1):
        batch, _ = loop.step(decoder, batch)
        assert len(recorded.shapes) == captured
    batch = decode.join(batch, newcomer(decoder, FOUR[2], 1))
    assert batch.cache.captured == {}


@pytest.mark.parametrize("wrong", ["raises", "is off", "is not finite", "replays nothing"])
def test_steps_go_on_without_graphs_if_capturing_fails(
    wrong: str, recorded: Recorded, monkeypatch: Any, caplog: Any
) -> None:
    def record(graphs: Any, step: Any) -> Any:
        if wrong == "raises":
            raise RuntimeError("operation not permitted when stream is capturing")
        if wrong == "replays nothing":
            return int, step().clone()
        replay, logits = recorded.record(graphs, step)
        change = {"is off": 1.0, "is not finite": math.nan}[wrong]
        return (lambda: (replay(), logits.add_(change * logits.abs().max()))), logits

    monkeypatch.setattr(labs_graphs, "record", record)
    decoder, (_, expected) = graphed(), reference("llama")
    assert ended(decoder, newcomer(decoder, FOUR[1])) == expected[1]
    assert ended(decoder, newcomer(decoder, FOUR[2])) == expected[2]
    assert decoder.graphs.failed
    assert caplog.text.count("steps run without CUDA graphs") == 1
    assert ("off by nan" in caplog.text) == (wrong in ("is not finite", "replays nothing"))


def test_captured_slots_are_freed_with_their_batch(recorded: Recorded, monkeypatch: Any) -> None:
    def record(graphs: Any, step: Any) -> Any:  # holds what comes out, not what is read
        logits = recorded.record(graphs, step)[1].clone()
        return functools.partial(logits.copy_, logits.clone()), logits

    monkeypatch.setattr(labs_graphs, "record", record)
    decoder = graphed()
    batch = newcomer(decoder, FOUR[1])
    for _ in range(4):
        batch, _ = loop.step(decoder, batch)
    assert any(isinstance(each, labs_graphs.Captured) for each in batch.cache.captured.values())
    buffers = [weakref.ref(buffer) for buffer in batch.cache.buffers]
    gc.disable()
    try:
        del batch
        assert [ref() for ref in buffers if ref() is not None] == []
    finally:
        gc.enable()


def test_batches_begin_in_the_slots_of_the_last_one_but_two_never_share_them(
    recorded: Recorded,
) -> None:
    decoder, (_, expected) = graphed(), reference("llama")
    for index in (3, 1, 2):
        assert ended(decoder, begun(decoder, FOUR[index])) == expected[index]
    assert recorded.shapes == [(1, 211)]
    batches = [begun(decoder, FOUR[index]) for index in (1, 2)]
    assert batches[0].cache is not batches[1].cache
    for _ in range(5):
        batches = [loop.step(decoder, batch)[0] for batch in batches]
    assert [ended(decoder, batch) for batch in batches] == expected[1:3]
    assert len(decoder.graphs.spare_slots) == 1


def test_a_row_too_long_for_the_spare_slots_gets_larger_ones(
    recorded: Recorded, monkeypatch: Any
) -> None:
    monkeypatch.setattr(labs_graphs, "MIN_GRAPH_COLUMNS", 64)
    decoder, sizes = graphed(), []
    for new in (40, 100, 60):
        assert decode.keep(begun(decoder, FOUR[1], new), []) is None
        sizes.append(decoder.graphs.spare_slots[0].cursor.columns)
    assert sizes == [64, 128, 128]


@pytest.mark.parametrize("free", [0, 2**40])
def test_slots_are_larger_than_needed_and_kept_only_if_memory_is_free(
    free: int, recorded: Recorded, monkeypatch: Any
) -> None:
    monkeypatch.setattr(decode, "available_bytes", lambda device: free)
    decoder = graphed()
    batch = begun(decoder, FOUR[1])
    assert batch.cache.cursor.columns == (labs_graphs.MIN_GRAPH_COLUMNS if free else 64)
    assert batch.cache.cursor.rows == 1
    ended(decoder, batch)
    assert len(decoder.graphs.spare_slots) == bool(free)


def test_a_batch_that_finds_no_memory_for_larger_slots_stays_in_its_own(
    recorded: Recorded, monkeypatch: Any
) -> None:
    decoder, (_, expected) = graphed(), reference("llama")
    with monkeypatch.context() as patched:
        patched.setattr(decode.Slots, "resize", raising(NO_MEMORY))
        batch = begun(decoder, FOUR[1])
    assert batch.graphs is None
    assert ended(decoder, batch) == expected[1]


def test_spare_slots_are_freed_for_a_newcomer(recorded: Recorded, monkeypatch: Any) -> None:
    decoder = graphed()
    ended(decoder, begun(decoder, FOUR[1]))
    assert decoder.graphs.spare_slots
    monkeypatch.setattr(loop, "has_room", lambda *args: not decoder.graphs.spare_slots)
    waiting = decode.new_batch(decoder, row_of(FOUR[0]))
    assert loop._next_prompts(decoder, loop.Loop(prefilling=[waiting])) == [waiting]
    assert decoder.graphs.pool is None


def test_threads_that_replay_the_same_memory_get_their_own_logits(monkeypatch: Any) -> None:
    """Graphs of one pool do so: the output of one lies where the next one's does."""
    place: list[torch.Tensor] = []

    def record(graphs: Any, step: Any) -> Any:
        place.append(place[0] if place else torch.zeros_like(step()))

        def replay() -> None:
            place[0].copy_(step())

        return replay, place[0]

    monkeypatch.setattr(labs_graphs, "record", record)
    monkeypatch.setattr(labs_graphs, "CAPTURE_AFTER", 1)
    decoder, (_, expected) = graphed(), reference("llama")
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda p: ended(decoder, begun(decoder, p)), FOUR * 2))
    finally:
        sys.setswitchinterval(interval)
    assert found == expected * 2


@torch.inference_mode()
def test_the_tensors_that_a_graph_reads_live_as_long_as_it(monkeypatch: Any) -> None:
    """The real graph keeps addresses, not tensors: the stand-in's closure would hide that."""
    made: list[weakref.ref[torch.Tensor]] = []
    arange = torch.arange

    def watched(*size: Any, **options: Any) -> torch.Tensor:
        made.append(weakref.ref(tensor := arange(*size, **options)))
        return tensor

    decoder = graphed()
    batch = newcomer(decoder, FOUR[1])
    row = batch.rows[0]
    ids = torch.tensor([[row.ids[row.written]]])
    monkeypatch.setattr(labs_graphs, "record", lambda graphs, step: (int, step().clone()))
    with monkeypatch.context() as patched:
        patched.setattr(torch, "arange", watched)
        captured = labs_graphs.Captured(decoder, batch.cache, (1, 64), ids, [row.written])
    assert made[0]() is captured.index


# ---------------------------------------------------------------- packed prompts


@pytest.mark.parametrize("kind", ["llama", "gpt2", "deepseek_v3"])
def test_short_prompts_in_one_row_give_each_the_logits_it_has_alone(kind: str) -> None:
    decoder = prepare(random_model(kind))
    prompts = [prompt for prompt in PROMPTS if len(prompt) > 1]
    together = [decode.new_batch(decoder, row_of(prompt)) for prompt in prompts]
    for batch, prompt in zip(labs_calls.prefill_packed(decoder, together), prompts, strict=True):
        alone = decode.prefill(decoder, decode.new_batch(decoder, row_of(prompt)))
        torch.testing.assert_close(batch.logits, alone.logits, atol=1e-4, rtol=1e-3)
        stepped = [loop.step(decoder, each)[0] for each in (batch, alone)]
        logits = [decode.forward(decoder, each) for each in stepped]
        torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-3)


# ---------------------------------------------------------------- guesses

REPEATING = [5, 9, 11, 7, 5, 9, 11, 7, 5, 9, 11]
PENALISED = {"repetition_penalty": 1.3, "frequency_penalty": 0.5, "logprobs": 2}


def ahead(decoder: decode.Decoder, prompt: list[int], lookahead: int, **sampling: Any) -> Any:
    """Return a row's tokens by step_speculative, and how many calls that took."""
    row = row_of(prompt, **sampling)
    row.lookahead, calls = lookahead, 0
    batch = decode.new_batch(decoder, row)
    while batch.pending:
        batch = decode.prefill(decoder, batch)
    while len(row.ids) < len(prompt) + NEW_TOKENS:
        batch, choices = labs_calls.step_speculative(decoder, batch)
        assert choices[-1].error is None
        calls += 1
    return tokens_of(row), calls


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 3} | PENALISED])
@pytest.mark.parametrize("kind", SOME)
def test_guesses_change_no_token(kind: str, sampling: dict[str, Any], monkeypatch: Any) -> None:
    decoder = prepare(random_model(kind))
    expected, calls = ahead(decoder, REPEATING, 0, **sampling)
    assert calls == NEW_TOKENS
    assert ahead(decoder, REPEATING, 4, **sampling)[0] == expected
    guesses = iter([expected[1:4], [8, *expected[5:8]], [expected[5], 8], expected[7:13]])
    monkeypatch.setattr(labs_calls, "prompt_lookup", lambda row: next(guesses, []))
    tokens, calls = ahead(decoder, REPEATING, 4, **sampling)
    assert tokens == expected
    # 1, then 4, 1 and 2 of the first three, 7 of the last: five calls for 15 tokens.
    assert calls <= 1 + 4 + NEW_TOKENS - 15 + 2


@pytest.mark.parametrize(
    ("ids", "most", "new", "expected"),
    [
        ([1, 2, 3, 4, 1, 2, 3], 2, 20, [4, 1]),
        ([1, 2, 3, 4, 1, 2, 3], 9, 20, [4, 1, 2, 3]),
        ([9, 2, 3, 4, 1, 2, 3], 2, 20, [4, 1]),  # two are enough
        ([1, 2, 3, 4, 8, 2, 3, 5, 1, 2, 3], 1, 20, [4]),  # three are better
        ([2, 3, 4, 2, 3, 5, 2, 3], 1, 20, [5]),  # the last place counts
        ([3, 4, 9, 3], 3, 20, []),
        ([7, 7, 7, 7], 3, 20, [7]),
        ([1, 2, 3, 4, 1, 2, 3], 0, 20, []),
        ([1], 3, 20, []),
        ([1, 2, 3, 4, 5, 1, 2, 3], 9, 3, [4, 5]),  # no more than may be generated
        ([1, 2, 3, 4, 5, 1, 2, 3], 9, 1, []),
    ],
)
def test_a_guess_is_what_followed_the_last_tokens_before(
    ids: list[int], most: int, new: int, expected: list[int]
) -> None:
    row = dataclasses.replace(row_of(ids), max_new_tokens=new, lookahead=most)
    assert labs_calls.prompt_lookup(row) == expected


def test_guesses_stay_within_the_rows_that_keep_their_bits(monkeypatch: Any) -> None:
    decoder = dataclasses.replace(reference("llama")[0], steady=4)
    batch = newcomer(decoder, [5, 6, 7, 8, 9, 10] * 3)
    batch.rows[0].lookahead, batch.rows[0].ids[-1] = 9, 5
    sizes, slots = list[int](), decode.forward_slots

    def watched(decoder: Any, batch: Any, ids: Any, *rest: Any) -> Any:
        sizes.append(len(ids))
        return slots(decoder, batch, ids, *rest)

    monkeypatch.setattr(decode, "forward_slots", watched)
    labs_calls.step_speculative(decoder, batch)
    assert sizes == [4]


# ---------------------------------------------------------------- out of memory


def test_a_halved_batch_of_slots_has_the_logits_that_it_had() -> None:
    decoder, _ = reference("llama")
    batch = decode.join(joined(decoder, range(4)), newcomer(decoder, PROMPTS[6], 4))
    expected = decode.forward(decoder, batch)
    for size in (3, 2, 1):
        (batch,) = labs_calls.split_after_oom(decoder, batch)
        assert batch.at_once == size
        assert torch.equal(decode.forward(decoder, batch), expected)
    assert labs_calls.split_after_oom(decoder, batch) == []


@pytest.mark.parametrize("kind", ["bamba", "mamba"])
def test_a_halved_batch_of_states_goes_on_with_transformers_tokens(
    kind: str, monkeypatch: Any
) -> None:
    decoder, expected = reference(kind)
    assert labs_calls.split_after_oom(decoder, newcomer(decoder, FOUR[1])) == []
    batch = joined(decoder, range(3))
    for _ in range(4):
        batch, _ = loop.step(decoder, batch)
    layers = next(m for m in decoder.model.modules() if isinstance(m, torch.nn.ModuleList))
    handle = layers[2].register_forward_hook(raising(NO_MEMORY))
    with pytest.raises(torch.OutOfMemoryError):
        loop.step(decoder, batch)
    handle.remove()
    monkeypatch.setattr(decode, "CHUNK", 7)
    halves = labs_calls.split_after_oom(decoder, batch)
    assert [len(half.rows) for half in halves] == [2, 1]
    assert answers_of(decoder, halves) == dict(enumerate(expected[:3]))


# ---------------------------------------------------------------- bits of products


class Border(torch.nn.Linear):
    """A linear layer whose products of more rows than `border` have other bits."""

    border = 32

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        product = x @ self.weight.T
        return product + (1e-3 if x.numel() // x.shape[-1] > self.border else 0)


@pytest.mark.parametrize("border", [2, 3, 16, 40])
def test_products_that_change_with_the_number_of_rows_limit_a_call_or_end_invariance(
    border: int,
) -> None:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    decoder = decode.prepare(random_model("llama", **heads).bfloat16())
    assert decoder.invariant
    layer = decoder.model.model.layers[1].mlp
    made = Border(layer.up_proj.in_features, layer.up_proj.out_features, bias=False)
    made.border, made.weight.data = border, torch.ones_like(made.weight).bfloat16()
    layer.up_proj = made
    steady = labs_products.steadied(decoder)
    kept = border == 40 and not labs_products.uses_amx(torch.bfloat16)
    expected = (True, True, 32) if kept else (False, False, 0)
    assert (steady.invariant, steady.duplicates_lone_row, steady.steady) == expected


# ---------------------------------------------------------------- the default model

TOPICS = ("fox", "river", "mountain", "python", "battery", "cloud", "king", "music", "water")


def loaded(**settings: str) -> labs.Model:
    return labs.load_model(labs.load_config(env={}, overrides=settings))


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        # In bf16, if the processor has it: to emulate it would take twenty minutes.
        pytest.param({}, 8, marks=pytest.mark.real),
        pytest.param({}, 48, marks=pytest.mark.real),
        pytest.param({"torch_dtype": "fp32"}, 12, marks=pytest.mark.real),
        pytest.param({"quant_method": "int8"}, 12, marks=pytest.mark.real),
        pytest.param({"quant_method": "int4"}, 12, marks=pytest.mark.real),
    ],
)
def test_texts_of_the_default_model_are_the_same_whatever_else_is_in_the_batch(
    settings: dict[str, str], count: int
) -> None:
    model, chance, longest = loaded(**settings), random.Random(0), 10 if count == 8 else 30
    assert model.decoder.invariant
    words = [
        " and ".join(chance.choices(TOPICS, k=chance.choice([1, 3, longest]))) for _ in range(count)
    ]
    inputs = [labs.build_inputs(model, prompt=f"Tell me about {word}.") for word in words]
    each = [
        labs.Generation(
            max_new_tokens=chance.randint(2, 10),
            temperature=0.8 * (i % 2),
            seed=i,
            top_p=0.95 if i % 4 == 1 else 1,
        )
        for i in range(count)
    ]
    alone = [labs.generate(model, *pair).text for pair in zip(inputs, each, strict=True)]
    texts = [""] * count
    for index, event in labs.stream_batch(model, inputs, each, batch_rows=16):
        if isinstance(event, labs.Delta):
            texts[index] += event.text
    assert texts == alone
    assert len(set(alone)) >= count * 0.8


@pytest.mark.real
def test_prompts_of_the_default_model_that_share_a_call_have_the_bits_they_have_alone() -> None:
    decoder, chance = loaded().decoder, random.Random(1)
    prompts = [[chance.randrange(2000) for _ in range(n)] for n in (2, 3, 40, 17, 64, 5, 100, 9)]
    assert len(have_the_same_bits_alone(decoder, prompts)) < len(prompts)


TEXT = """The river begins in the mountains, where the snow melts in spring, and runs for two
hundred miles through forests and farms before it reaches the sea. In April the water rises by the
height of a man in three days. Nobody who lives beside it has ever wanted to move."""


@pytest.mark.real
@pytest.mark.parametrize("settings", [{}, {"torch_dtype": "fp32"}, {"quant_method": "int4"}])
def test_texts_of_the_default_model_are_the_same_with_guesses(settings: dict[str, str]) -> None:
    model = loaded(**settings)
    inputs = labs.build_inputs(model, prompt=f"Quote the first two sentences of this:\n\n{TEXT}")
    for seed in (None, 4):
        temperature = 0.5 if seed else 0.0
        options = labs.Generation(max_new_tokens=60, temperature=temperature, seed=seed)
        plain = labs.generate(model, inputs, options)
        guessed = labs.generate(model, inputs, options, prompt_lookup_num_tokens=5)
        assert (guessed.text, guessed.finish_reason) == (plain.text, plain.finish_reason)
        assert guessed.usage == plain.usage
