# SPDX-License-Identifier: Apache-2.0
"""Tests of labs_checkpoints.py: weights that are stored in few bits, read or refused."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from kit import EOS, SHORT, SIZES, is_one_sentence, load, save_model, sizes_of
from safetensors.torch import load_file, save_file

import labs
import labs_checkpoints
import labs_sizes

IDS = torch.tensor([SHORT.input_ids])
WEIGHTS = "model.safetensors"


def saved(base: Path, folder: Path, tensors: dict[str, Any] | None, stated: Any = None) -> Path:
    """Copy a model with other weights, and with this quantization_config in config.json."""
    shutil.copytree(base, folder)
    if tensors is not None:
        save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    if stated is not None:
        config = json.loads((folder / "config.json").read_text("utf-8"))
        text = json.dumps({**config, "quantization_config": stated})
        (folder / "config.json").write_text(text, "utf-8")
    return folder


def in_fp8(base: Path, folder: Path, block: int = 32) -> tuple[Path, Path]:
    """Store the products of a model in 8 bits with a scale a block; return it and its twin."""
    stored, twin = load_file(base / WEIGHTS), load_file(base / WEIGHTS)
    for name in [name for name in stored if name.endswith("proj.weight")]:
        rows, columns = stored[name].shape
        blocks = stored[name].float().view(rows // block, block, columns // block, block)
        scale = blocks.abs().amax((1, 3), keepdim=True) / 448
        few = (blocks / scale).to(torch.float8_e4m3fn)
        stored[name] = few.view(rows, columns)
        stored[f"{name}_scale_inv"] = scale[:, 0, :, 0].contiguous()
        twin[name] = (few.float() * scale).view(rows, columns)
    stated = {"quant_method": "fp8", "weight_block_size": [block, block]}
    return saved(base, folder / "fp8", stored, stated), saved(base, folder / "twin", twin)


FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
OSS = (
    "intermediate_size=64 num_hidden_layers=2 num_attention_heads=4 num_key_value_heads=2 "
    "head_dim=16 num_local_experts=4 num_experts_per_tok=2 sliding_window=32 "
    "max_position_embeddings=512"
)


def in_mxfp4(folder: Path) -> tuple[Path, Path]:
    """Store the experts of a model in 4 bits with a power of 2 for each 32; return it, its twin."""
    layers = ["sliding_attention", "full_attention"]
    config = transformers.GptOssConfig(**SIZES, **sizes_of(OSS), layer_types=layers)
    base = save_model(folder / "base", config)
    stored, twin = load_file(base / WEIGHTS), load_file(base / WEIGHTS)
    for name in [each for each in twin if each.endswith(("gate_up_proj", "down_proj"))]:
        groups = stored.pop(name).float().transpose(1, 2).unflatten(-1, (-1, 32))
        power = groups.abs().amax(-1, keepdim=True).log2().floor() - 2
        values = groups / 2**power
        codes = (values.abs()[..., None] - FP4).abs().argmin(-1)
        twin[name] = (FP4[codes] * values.sign() * 2**power).flatten(-2).transpose(1, 2)
        codes += 8 * (values < 0)
        stored[f"{name}_blocks"] = (codes[..., 0::2] + 16 * codes[..., 1::2]).to(torch.uint8)
        stored[f"{name}_scales"] = (power[..., 0] + 127).to(torch.uint8)
        twin[name] = twin[name].contiguous()
    return saved(base, folder / "mxfp4", stored, {"quant_method": "mxfp4"}), saved(
        base, folder / "twin", twin
    )


@pytest.mark.parametrize("form", ["fp8", "mxfp4"])
def test_weights_in_few_bits_become_plain_layers_with_the_numbers_that_they_stand_for(
    form, tiny_folder, folder, fresh
):
    few, twin = in_fp8(tiny_folder, folder) if form == "fp8" else in_mxfp4(folder)
    model, wanted = load(few), load(twin)
    torch.testing.assert_close(model.model(IDS).logits, wanted.model(IDS).logits)
    assert model.decoder.weight_bytes == wanted.decoder.weight_bytes
    assert model.decoder.why_forward == wanted.decoder.why_forward
    assert labs.generate(model, SHORT, max_new_tokens=4).usage.completion_tokens > 0


def test_plain_layers_are_packed_in_the_bits_that_are_asked_for(tiny_folder, folder, fresh):
    few, twin = in_fp8(tiny_folder, folder)
    wanted = labs.Quantization(quant_method="int8")
    one, two = load(few, quantization=wanted), load(twin, quantization=wanted)
    assert one.decoder.quant_method == two.decoder.quant_method == "int8"
    torch.testing.assert_close(one.model(IDS).logits, two.model(IDS).logits)


@pytest.mark.parametrize("method", ["load_in_4bit", "load_in_8bit"])
def test_weights_in_few_bits_are_not_quantised_again_by_bitsandbytes(
    method, tiny_folder, folder, fresh, unread
):
    few, _ = in_fp8(tiny_folder, folder)
    refused(few, f"{method}: its weights are quantised already .fp8.", **{method: True})


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a test fail that reads weights."""
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", None)


def refused(folder: Path, named: str, dtype: str = "auto", **wanted: Any) -> None:
    with pytest.raises(labs.ModelError, match=named) as caught:
        load(folder, torch_dtype=dtype, quantization=labs.Quantization(**wanted))
    assert is_one_sentence(caught.value)
    assert str(caught.value).startswith(str(folder))


def test_a_model_that_was_saved_by_bitsandbytes_runs_as_it_was_saved(tiny_folder, folder, fresh):
    bits = transformers.BitsAndBytesConfig(load_in_4bit=True)
    options = {"dtype": torch.bfloat16, "quantization_config": bits}
    own = transformers.AutoModelForCausalLM.from_pretrained(tiny_folder, **options)
    few = Path(shutil.copytree(tiny_folder, folder / "few"))
    own.save_pretrained(few)
    model = load(few, torch_dtype="auto")
    assert (model.dtype, model.fingerprint and model.fingerprint.dtype) == ("bf16", "bf16")
    torch.testing.assert_close(model.model(IDS).logits, own(IDS).logits, atol=0.3, rtol=0.1)
    labs.load_model.cache_clear()
    refused(few, "torch_dtype = fp32: its quantised weights .bitsandbytes. use bf16", "fp32")
    refused(few, "load_in_8bit: its weights are quantised already", load_in_8bit=True)
    refused(few, "quant_method = int8: its weights are quantised", quant_method="int8")


PACKAGES = {name for needs in labs_checkpoints.NEEDS.values() for name, _ in needs.packages}


@pytest.mark.parametrize("method", labs_checkpoints.NEEDS)
def test_what_a_form_of_weights_needs_is_told_before_they_are_read(
    method, tiny_folder, folder, fresh, unread, missing, monkeypatch
):
    for name in PACKAGES:
        missing(name)
    few = saved(tiny_folder, folder / "few", None, {"quant_method": method, "bits": 4})
    needs = labs_checkpoints.NEEDS[method]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    install = re.escape(f"packages are missing: pip install {needs.packages[0][1]}")
    refused(few, "CUDA GPU only" if needs.gpu else install)
    monkeypatch.setattr(labs_checkpoints, "_has_cuda", lambda: True)
    refused(few, install)


# fmt: off
UNKNOWN: list[tuple[Any, str]] = [
    ({"quant_method": "exl2"}, "is quantised as exl2, which transformers does not read"),
    ({"quant_method": "modelopt", "quant_algo": "FP8"}, "modelopt, which transformers does not"),
    ({"quant_method": "x" * 99}, "x{40}, which"),
    ({"bits": 4}, "names no quant_method"),
    ({"quant_method": ["gptq"]}, "names no quant_method"),
    ({}, "names no quant_method"),
]
# fmt: on


@pytest.mark.parametrize(("stated", "named"), UNKNOWN)
def test_a_form_that_nobody_here_reads_is_refused(
    stated, named, tiny_folder, folder, fresh, unread
):
    refused(saved(tiny_folder, folder / "few", None, stated), named)


def test_a_form_that_only_another_file_states_is_refused(tiny_folder, folder, fresh, unread):
    few = saved(tiny_folder, folder / "few", None)
    (few / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "FP8"}}', "utf-8")
    refused(few, "hf_quant_config.json")


def test_weights_of_compressed_tensors_become_plain_layers(monkeypatch):
    monkeypatch.setattr(labs_checkpoints, "_is_installed", lambda name: True)
    stated = {"quant_method": "compressed-tensors", "run_compressed": True}
    config = transformers.LlamaConfig(eos_token_id=EOS, quantization_config=stated)
    labs_checkpoints.options(labs.ModelSpec(), config, "bf16")
    wanted = {"quant_method": "compressed-tensors", "dequantize": True}
    assert config.quantization_config == wanted


@pytest.mark.parametrize(
    ("stated", "bits"),
    [
        ({"quant_method": "gptq", "bits": 4}, 5),
        ({"quant_method": "awq", "bits": "4"}, 16),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, 5),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, 9),
        ({"quant_method": "fp8"}, 16),
        ({"quant_method": "exl2"}, 16),
        (None, 16),
    ],
)
def test_the_memory_of_weights_that_stay_in_few_bits_is_estimated_by_these(
    stated, bits, tiny_folder, folder
):
    few = saved(tiny_folder, folder / "few", None, stated)
    spec = labs.ModelSpec(model_name=str(few), torch_dtype="bf16")
    whole = labs.ModelSpec(model_name=str(tiny_folder), torch_dtype="bf16")
    assert labs_sizes.weight_bytes(spec) == labs_sizes.weight_bytes(whole) * bits // 16
