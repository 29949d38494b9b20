# SPDX-License-Identifier: Apache-2.0
"""What a model's config.json says before its weights are read: whether and how they can be.

    weights |= labs_checkpoints.options(spec, config, "bf16")  # or raises ModelError

Weights that are stored in few bits stay so where a kernel computes with them; others become plain
layers when they are read. Needs labs_settings.py; labs_fast.py for weights that bitsandbytes
quantises; labs_adapter.py for adapters.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
from pathlib import Path
from typing import Any, NamedTuple

from msgspec.structs import asdict

from labs_settings import ModelError, ModelSpec


class Needs(NamedTuple):
    """What a form of stored weights needs. packages: (name to import, name to install)."""

    packages: tuple[tuple[str, str], ...] = ()
    gpu: bool = False


# Forms that were tried on tiny models, or that name what they need; transformers checks others.
NEEDS = {
    "gptq": Needs(
        (
            ("optimum", "optimum"),
            ("gptqmodel", "gptqmodel"),
        )
    ),
    "awq": Needs((("gptqmodel", "gptqmodel"),)),
    "auto-round": Needs((("auto_round", "auto-round"),)),
    "compressed-tensors": Needs((("compressed_tensors", "compressed-tensors"),)),
    "torchao": Needs((("torchao", "torchao"),)),
    "bitsandbytes": Needs((("bitsandbytes", "bitsandbytes"),)),
    "aqlm": Needs((("aqlm", "'aqlm[cpu,gpu]'"),)),
    "vptq": Needs((("vptq", "vptq"),), gpu=True),
    "spqr": Needs((("spqr_quant", "'spqr_quant[gpu]'"),), gpu=True),
    "eetq": Needs((("kernels", "kernels"),), gpu=True),
    "higgs": Needs((("flute", "flute-kernel"),), gpu=True),
    "fbgemm_fp8": Needs((("fbgemm_gpu", "fbgemm-gpu"),), gpu=True),
    "fp_quant": Needs((("fp_quant", "fp_quant"),), gpu=True),
}
# transformers makes plain layers of these: always, or where no kernel computes with them.
ALWAYS_PLAIN = ("compressed-tensors",)
PLAIN_WITHOUT_KERNEL = ("fp8", "mxfp8", "mxfp4")


def options(spec: ModelSpec, config: Any, dtype: str) -> dict[str, Any]:
    """Return what from_pretrained needs besides the settings of `spec`; `config` is adjusted.

    config: transformers' configuration of the model. dtype: of the weights, as in labs.Model.
    Raises ModelError for a model that is not a causal language model, for weights that cannot be
    read or computed with here, and for settings that these weights contradict.
    """
    if other := other_task(config):
        raise ModelError(f"{spec.model_name}: {other}; labs runs causal language models")
    try:
        stays = _settled(spec, config, dtype)
    except ValueError as error:
        raise ModelError(f"{spec.model_name}: {error}") from None
    bits = spec.quantization.load_in_4bit or spec.quantization.load_in_8bit
    if spec.adapter is not None:
        _check_adapter(spec, "bitsandbytes" if bits else stays)
    if not bits:
        return {}
    import labs_fast

    return {"quantization_config": labs_fast.bitsandbytes(asdict(spec.quantization), dtype)}


def _check_adapter(spec: ModelSpec, stays: str | None) -> None:
    if stays is not None:
        raise ModelError(
            f"adapter = {spec.adapter}: cannot be merged into weights that stay quantised "
            f"({stays}); take a model with 16 bits, and on a CPU quant_method = int8 or int4"
        )
    with contextlib.suppress(ImportError):  # if the file is missing, labs.py says how to copy it
        import labs_adapter

        labs_adapter.check(spec)


def method_of(config: Any) -> str | None:
    """Return how the weights of a model are stored, as transformers names it; None if plainly.

    Raises ValueError when config.json does not say it in a form that is known.
    """
    stated = _stated(config)
    if stated is None:
        if Path(str(getattr(config, "_name_or_path", "")), "hf_quant_config.json").is_file():
            raise ValueError("hf_quant_config.json says that the weights are quantised: no reader")
        return None
    method = stated.get("quant_method")
    if stated.get("load_in_4bit") or stated.get("load_in_8bit"):
        return "bitsandbytes"
    if not isinstance(method, str):
        raise ValueError("quantization_config of config.json names no quant_method")
    known: Any = importlib.import_module("transformers.quantizers.auto")
    if method not in known.AUTO_QUANTIZATION_CONFIG_MAPPING and method != "bitsandbytes":
        raise ValueError(f"is quantised as {method:.40}, which transformers does not read")
    return method


def stored_bits(config: Any) -> int | None:
    """Return about how many bits each weight takes, with its scales, if it stays as it is stored.

    None for weights that become plain layers, are plain already, or of which it is not known.
    """
    try:
        method, stated = method_of(config), _stated(config) or {}
    except ValueError:  # the load reports it
        return None
    if method == "bitsandbytes":
        return 5 if stated.get("load_in_4bit") else 9
    if method in ("gptq", "awq", "auto-round"):
        return bits + 1 if isinstance(bits := stated.get("bits"), int) else None
    return {"torchao": 9, "bitnet": 3}.get(method or "")


def _stated(config: Any) -> dict[str, Any] | None:
    """Return the quantization_config in config.json, if there is one."""
    for holder in (config, config.get_text_config(decoder=True)):
        if (found := getattr(holder, "quantization_config", None)) is not None:
            return dict(found if isinstance(found, dict) else found.to_dict())
    return None


def _settled(spec: ModelSpec, config: Any, dtype: str) -> str | None:
    """Return how the weights stay quantised, or None. Raises ValueError if they cannot be used."""
    if (method := method_of(config)) is None:
        return None
    on_gpu = _has_cuda() and spec.device_map != "cpu"
    _check_needs(method, on_gpu)
    kernel = on_gpu and importlib.util.find_spec("kernels") is not None
    if method in ALWAYS_PLAIN or (method in PLAIN_WITHOUT_KERNEL and not kernel):
        stated = {**(_stated(config) or {}), "dequantize": True}
        stated.pop("run_compressed", None)  # the older name of the opposite
        holder = config if hasattr(config, "quantization_config") else config.get_text_config()
        holder.quantization_config = stated
        _refuse(spec, method, ("load_in_4bit", "load_in_8bit"))
        return None
    _refuse(spec, method, ("load_in_4bit", "load_in_8bit", "fp16", "int8", "int4"))
    _check_dtype(spec, config, method, dtype)
    return method


def _check_needs(method: str, on_gpu: bool) -> None:
    needs = NEEDS.get(method, Needs())
    if needs.gpu and not on_gpu:
        raise ValueError(f"is quantised as {method}, which computes on a CUDA GPU only")
    if missing := [pip for name, pip in needs.packages if not _is_installed(name)]:
        install = f"pip install {' '.join(missing)}"
        raise ValueError(f"is quantised as {method}, for which packages are missing: {install}")


def _is_installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def _has_cuda() -> bool:
    import torch

    return bool(torch.cuda.is_available())


def _refuse(spec: ModelSpec, method: str, settings: tuple[str, ...]) -> None:
    """Raise ValueError if [quantization] asks for one of these, which this form cannot take."""
    wanted = spec.quantization
    for name in settings:
        if getattr(wanted, name, False) or wanted.quant_method == name:
            setting = name if hasattr(wanted, name) else f"quant_method = {name}"
            raise ValueError(f"{setting}: its weights are quantised already ({method})")


def _check_dtype(spec: ModelSpec, config: Any, method: str, dtype: str) -> None:
    """Raise ValueError if torch_dtype asks for another dtype than these weights compute in."""
    stored = str(getattr(config, "dtype", None) or "").removeprefix("torch.")
    names = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
    own = names.get(stored, dtype) if method == "bitsandbytes" else dtype
    own = "fp16" if method == "auto-round" and dtype == "fp32" else own
    if spec.torch_dtype != "auto" and own != dtype:
        raise ValueError(f"torch_dtype = {dtype}: its quantised weights ({method}) use {own}")


def other_task(config: Any) -> str | None:
    """Return a description of a model that is not a causal language model, else None."""
    import transformers

    known = hasattr(config, "auto_map") or type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    if config.is_encoder_decoder:
        return f"{config.model_type} is an encoder-decoder"
    media = [each for each in ("vision", "audio") if hasattr(config, f"{each}_config")]
    kind = f"also a model of {' and '.join(media)}" if media else "not a causal language model"
    return None if known else f"{config.model_type} is {kind}"
