# SPDX-License-Identifier: Apache-2.0
"""Try at load, on a few tokens, how a model can run; names and configurations do not say enough.

    decoder = labs_probe.tried(labs_decode.prepare(model))  # its rows join, or run alone

This file needs labs_compare.py, labs_decode.py and labs_cache.py.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

import labs_cache
import labs_compare
import labs_decode
from labs_decode import Decoder, Mode

Found = dict[str, Any]  # mode and reason of a Decoder; cuts, packs: whether prefixes, packing work


@torch.inference_mode()
def tried(decoder: Decoder, cache: str | None = None) -> Decoder:
    """Return the decoder in its mode, or in the fastest slower one that has the model's own logits.

    cache: the folder where results are stored. Raises ValueError if the model attends in both
    directions, or fails even alone.
    """
    file = labs_cache.cache_folder(cache) / f".tried-{_key(decoder)}"
    found = _recall(file)
    try:
        if found is None and (found := _find(decoder)) is None:
            return decoder
    except (RuntimeError, MemoryError) as error:
        if not labs_decode.out_of_memory(error):
            raise
        return decoder
    _store(file, json.dumps(found))
    return _as_found(decoder, found)


def _find(decoder: Decoder) -> Found | None:
    """Return the first mode that gives the model's logits; None if the logits are not numbers."""
    with _own_attention(decoder):
        own = labs_compare.Own.of(decoder.model)
    kind, why = decoder.config.model_type, own.fault
    if any(each.isnan().any() for each in own.logits):
        return None
    # Some models that attend to a whole prompt are made for it; those run alone, as in `generate`.
    fills_gaps = decoder.mode != "alone" or kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if own.looks_both_ways and fills_gaps:
        raise ValueError(f"{kind} attends in both directions, as masked language models do")
    modes: dict[Mode, tuple[Mode, ...]]
    modes = {"joins": ("joins", "whole"), "whole": ("whole",), "alone": ()}
    for mode in () if own.fault else modes[decoder.mode]:
        way, same = replace(decoder, mode=mode), mode == decoder.mode
        if wrong := own.wrong(labs_compare.together(way, own.texts)):
            why = why or wrong
            continue
        cuts, packs = same and way.can_reuse_prefix, same and way.prefill_packed is not None
        cuts = cuts and not own.wrong(labs_compare.guesses(way, own.texts))
        packs = packs and not own.wrong(labs_compare.packed(way, own.texts))
        reason = decoder.reason if same else f"tried at load: with its prompt in chunks, {why}"
        return {"mode": mode, "reason": reason, "cuts": cuts, "packs": packs}
    reason = decoder.reason if decoder.mode == "alone" else f"tried at load: {why}"
    with _own_attention(decoder):
        if fault := labs_compare.wrong_alone(replace(decoder, mode="alone"), own):
            raise ValueError(f"{kind} {fault}")
    return {"mode": "alone", "reason": reason, "cuts": False, "packs": False}


def _as_found(decoder: Decoder, found: Found) -> Decoder:
    decoder = replace(
        decoder,
        mode=found["mode"],
        reason=found["reason"],
        can_reuse_prefix=decoder.can_reuse_prefix and found["cuts"],
        prefill_packed=decoder.prefill_packed if found["packs"] else None,
    )
    if decoder.mode != "alone":
        return decoder
    _choose_attention(decoder.came_with)
    return replace(decoder, packable=False, invariant=False, duplicates_lone_row=False)


@contextlib.contextmanager
def _own_attention(decoder: Decoder) -> Iterator[None]:
    """Give the model the attention that it came with inside a `with` block."""
    chosen = [(config, config._attn_implementation) for config, _ in decoder.came_with]
    _choose_attention(decoder.came_with)
    try:
        yield
    finally:
        _choose_attention(chosen)


def _choose_attention(names: Iterable[tuple[Any, str]]) -> None:
    for config, name in names:
        config._attn_implementation_internal = name  # transformers' setter would check the name


@torch.inference_mode()
def compared(decoder: Decoder, sources: Sequence[str], cache: str | None = None) -> str:
    """Return how a decoder with a forward of its own differs from the model's modules, or "".

    sources: the files of that forward. cache: the folder where results are stored.
    """
    file = labs_cache.cache_folder(cache) / f".compared-{_key(decoder, *sources)}"
    with contextlib.suppress(OSError, ValueError):
        if isinstance(kept := json.loads(file.read_text(encoding="utf-8")), str):
            return kept
    try:
        found, known = _differences(decoder)
    except (RuntimeError, MemoryError) as error:
        if not labs_decode.out_of_memory(error):
            raise
        return "memory ran out while they were compared"
    if known:
        _store(file, json.dumps(found))  # an empty file is an interrupted write, not a result
    return found


def _differences(decoder: Decoder) -> tuple[str, bool]:
    """Return what differs, and whether other weights would give the same result."""
    own, compare = labs_compare.Own.of(decoder.model), labs_compare
    if any(each.isnan().any() for each in own.logits):
        return "the model's logits are not numbers", False
    found = own.fault or own.wrong(compare.together(decoder, own.texts))
    if not found and decoder.prefill_packed is not None:
        found = own.wrong(compare.packed(decoder, own.texts))
    return found, True


def _store(file: Path, text: str) -> None:
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")


def _key(decoder: Decoder, *more: str) -> str:
    """Return a digest of everything that the result depends on, which the weights are not."""
    model = decoder.model
    kinds = (type(model), Decoder, tried, labs_compare.Own)
    sources = [*(inspect.getsourcefile(each) for each in kinds), *more]
    code = [Path(each).read_bytes().hex() for each in sources if each and Path(each).is_file()]
    versions = [str(torch.__version__), transformers.__version__, torch.__config__.show()]
    kind = [str(model.dtype), str(model.device), model.config.to_json_string()]
    kind += [str(decoder.invariant), str(decoder.prefill_packed is None), decoder.quant_method]
    return hashlib.sha256(json.dumps([*kind, *versions, *code]).encode()).hexdigest()[:32]


def _recall(file: Path) -> Found | None:
    kinds = {"mode": str, "reason": str, "cuts": bool, "packs": bool}
    with contextlib.suppress(OSError, ValueError, AttributeError):
        found: Found = json.loads(file.read_text(encoding="utf-8"))
        known = {name: type(value) for name, value in found.items()} == kinds
        return found if known and found["mode"] in ("joins", "whole", "alone") else None
    return None
