# SPDX-License-Identifier: Apache-2.0
"""Make a decoder faster, by each of the files that change how its model runs.

    decoder = labs_faster.speed_up(labs_decode.prepare(model), spec)

The order counts: labs_probe tries what the calls of labs_calls need, and labs_forward takes over
the weights as labs_fast has packed them. labs_packing_file stores them.
Needs labs_settings.py and these eight files.
"""

from __future__ import annotations

import labs_calls
import labs_fast
import labs_forward
import labs_kv
import labs_packing_file
import labs_probe
import labs_shared
import labs_steady
from labs_decode import Decoder
from labs_settings import ModelError, ModelSpec


def speed_up(decoder: Decoder, spec: ModelSpec) -> Decoder:
    """Return a decoder of the same model. Raises ModelError for weights that cannot be packed."""
    wanted, given = spec.quantization.quant_method, spec.torch_dtype != "auto"
    method = "none" if wanted == "auto" and given else wanted
    flags = {"batch_invariant": spec.batch_invariant, "cuda_graphs": spec.cuda_graphs}
    try:
        decoder = labs_probe.tried(labs_calls.speed_up(decoder), spec.cache_dir)
        with labs_packing_file.opened(decoder.model, method, spec) as make:
            decoder = labs_fast.speed_up(decoder, method, make=make, **flags)
        decoder = labs_forward.speed_up(decoder, spec.cache_dir)
        decoder = labs_kv.in_bytes(decoder) if spec.quantization.kv_dtype == "int8" else decoder
    except ValueError as error:
        raise ModelError(f"{spec.model_name}: {error}") from error
    return labs_shared.speed_up(labs_steady.steady_modules(decoder))
