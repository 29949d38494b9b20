# SPDX-License-Identifier: Apache-2.0
"""What a model will need before it is loaded: bytes of weights, its context, and free memory.

    needed = labs_sizes.weight_bytes(spec)      # no weights are read
    free = labs_sizes.system_memory(spec)       # on the device where it would be loaded

Needs labs.py, labs_checkpoints.py and labs_decode.py; torch and transformers.
"""

from __future__ import annotations

from typing import Any

from msgspec.structs import replace

import labs
import labs_checkpoints

AUTO = {  # transformers' class for each kind of a model
    "text": "AutoModelForCausalLM",
    "embedding": "AutoModel",
    "rerank": "AutoModelForSequenceClassification",
}


def weight_bytes(spec: labs.ModelSpec) -> int:
    """Estimate the bytes of a model's weights and its draft's without loading them.

    A GGUF file is converted.
    """
    import torch
    import transformers

    with labs.loading():
        _, device, dtype = labs.device_of(spec)
        config = labs.pretrained("AutoConfig", *labs.locate(spec, dtype)[:2])
        auto: Any = getattr(transformers, AUTO[spec.kind])
        with torch.device("meta"):
            model = auto.from_config(config, trust_remote_code=spec.trust_remote_code)
    wanted = spec.quantization
    whole = spec.kind != "text" and spec.torch_dtype == "auto" and device == "cpu"
    bits = 32 if dtype == "fp32" or whole else 16
    bits = 9 if wanted.load_in_8bit or wanted.quant_method == "int8" else bits  # with scales
    bits = 5 if wanted.load_in_4bit or wanted.quant_method == "int4" else bits
    bits = labs_checkpoints.stored_bits(config) or bits
    own = int(sum(weight.numel() for weight in model.parameters())) * bits // 8
    if spec.draft_model is None:
        return own
    import labs_draft

    return own + weight_bytes(labs_draft.spec_of(spec))


def context_length(spec: labs.ModelSpec) -> int | None:
    """Return a model's context length in tokens; nothing is converted or downloaded for it."""
    spec = replace(spec, local_files_only=True)
    place = labs.locate(spec, labs.device_of(spec)[2], convert=False)
    import labs_decode

    return labs_decode.context_length_of(labs.pretrained("AutoConfig", *place[:2]))


def system_memory(spec: labs.ModelSpec) -> int:
    """Return the free bytes of the device on which a model would be loaded."""
    import torch

    import labs_decode

    kind = labs.device_of(spec)[1]
    device = spec.device_map if spec.device_map.startswith(f"{kind}:") else kind
    return labs_decode.available_bytes(torch.device(device))
