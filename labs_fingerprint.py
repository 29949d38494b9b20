# SPDX-License-Identifier: Apache-2.0
"""Tell what determines the answers of a loaded model, as fields of labs.Fingerprint.

labs.load_model calls `read` if this file is present. Needs labs_cache.py and labs_settings.py;
labs_adapter.py for adapters; labs_products.py, if it is there, knows of AMX.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msgspec.structs import asdict, fields

import labs_cache
import labs_settings

if TYPE_CHECKING:
    import labs_decode


def read(
    decoder: labs_decode.Decoder, spec: labs_settings.ModelSpec, origin: Path | None
) -> dict[str, Any]:
    """Return the fields of a Fingerprint that depend on the model. origin: its file or folder."""
    wanted, packages = spec.quantization, ["torch", "transformers"]
    packages += ["bitsandbytes"] if wanted.load_in_4bit or wanted.load_in_8bit else []
    commit = getattr(decoder.model.config, "_commit_hash", None) or spec.revision or "unknown"
    digest = origin and f"sha256:{labs_cache.digest(origin, spec.cache_dir)}"
    revision = digest or str(commit)
    if spec.adapter is not None:
        import labs_adapter

        packages.append("peft")
        revision += f" + adapter {labs_adapter.revision(spec)}"
    used = asdict(wanted) | {"quant_method": decoder.quant_method.replace("none", "auto")}
    return {
        "model": spec.model_name,
        "revision": revision,
        "hardware": hardware(decoder.device, decoder.model.dtype),
        "quantization": {f.name: used[f.name] for f in fields(wanted) if used[f.name] != f.default},
        "batch_invariant": decoder.invariant,
        "versions": versions(packages),
    }


def hardware(device: Any, dtype: Any) -> str:
    """Return a torch device's hardware, as far as it can change the bits of results of a dtype."""
    import torch

    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    parts = [torch.backends.cpu.get_cpu_capability(), f"{torch.get_num_threads()} threads"]
    with contextlib.suppress(ImportError):  # a copied set of files may lack it
        import labs_products

        parts[1:1] = ["AMX"] * labs_products.uses_amx(dtype)
    return ", ".join(parts)


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Return the versions of packages by their names."""
    return {name: str(importlib.import_module(name).__version__) for name in packages}
