# SPDX-License-Identifier: Apache-2.0
"""What a model's config.json says before its weights are read: whether and how they can be.

    weights |= labs_checkpoints.options(spec, config, "bf16")  # or raises ModelError

Needs labs_settings.py; labs_fast.py for weights that bitsandbytes quantises.
"""

from __future__ import annotations

from typing import Any

from msgspec.structs import asdict

from labs_settings import ModelError, ModelSpec


def options(spec: ModelSpec, config: Any, dtype: str) -> dict[str, Any]:
    """Return what from_pretrained needs besides the settings of `spec`.

    config: transformers' configuration of the model. dtype: of the weights, as in labs.Model.
    Raises ModelError for a model that is not a causal language model.
    """
    if other := other_task(config):
        raise ModelError(f"{spec.model_name}: {other}; labs runs causal language models")
    if not (spec.quantization.load_in_4bit or spec.quantization.load_in_8bit):
        return {}
    import labs_fast

    return {"quantization_config": labs_fast.bitsandbytes(asdict(spec.quantization), dtype)}


def other_task(config: Any) -> str | None:
    """Return a description of a model that is not a causal language model, else None."""
    import transformers

    known = hasattr(config, "auto_map") or type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    if config.is_encoder_decoder:
        return f"{config.model_type} is an encoder-decoder"
    media = [each for each in ("vision", "audio") if hasattr(config, f"{each}_config")]
    kind = f"also a model of {' and '.join(media)}" if media else "not a causal language model"
    return None if known else f"{config.model_type} is {kind}"
