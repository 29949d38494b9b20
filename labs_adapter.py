# SPDX-License-Identifier: Apache-2.0
"""Merge a LoRA adapter into the weights of a model.

    model = labs_adapter.merged(model, spec)  # before its weights are packed

Needs labs_settings.py and peft.
"""

from __future__ import annotations

from typing import Any

from labs_settings import ModelError, ModelSpec


def merged(model: Any, spec: ModelSpec) -> Any:
    """Return the model with the adapter of `spec` added to its weights.

    Raises ModelError for an adapter that cannot be read or does not fit.
    """
    import peft

    try:
        return peft.PeftModel.from_pretrained(model, spec.adapter).merge_and_unload()
    except Exception as error:  # peft, torch and the hub raise many kinds
        raise ModelError(f"adapter = {spec.adapter}: {error}") from error
