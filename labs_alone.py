# SPDX-License-Identifier: Apache-2.0
"""Models whose rows cannot share forward calls: one row at a time, in transformers' own way.

    decoder = replace(decoder, stepwise=labs_alone.stepwise)   # labs_calls.speed_up does it

The model makes its own cache and inputs, as in its `generate`; labs_loop chooses the tokens. This
file needs labs_decode.py.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, cast

import torch

import labs_decode
from labs_decode import Decoder, Row, Tensor


def stepwise(decoder: Decoder, row: Row) -> Generator[Tensor, int, None]:
    """Yield logits [1, V] and receive tokens; the model makes its own cache and inputs."""
    ids = torch.tensor([row.ids], device=decoder.device)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": row.max_new_tokens}
    options |= {"do_sample": False, "custom_generate": _own_loop}
    return cast("Generator[Tensor, int, None]", decoder.model.generate(ids, **options))


def _own_loop(
    model: labs_decode.PretrainedModel, input_ids: Tensor, **kwargs: Any
) -> Generator[Tensor, int, None]:
    """Decode as transformers' own loop does (GenerationMixin._sample), a token per send()."""
    length = None  # None passes all ids; 1 only the last, once there is a cache
    for name in ("logits_processor", "stopping_criteria", "generation_config"):
        kwargs.pop(name, None)
    while True:
        inputs = model.prepare_inputs_for_generation(
            input_ids, next_sequence_length=length, is_first_iteration=length is None, **kwargs
        )
        outputs = model(**inputs, return_dict=True)
        token = yield outputs.logits[:, -1]
        kwargs = model._update_model_kwargs_for_generation(outputs, kwargs)
        input_ids = torch.cat([input_ids, input_ids.new_tensor([[token]])], -1)
        length = 1 if kwargs.get("use_cache") else None
