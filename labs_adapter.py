# SPDX-License-Identifier: Apache-2.0
"""Merge a LoRA adapter into the weights of a model: its layers stay plain, and as large.

    labs_adapter.check(spec)                  # before any weights are read
    model = labs_adapter.merged(model, spec)  # before they are packed

Needs labs_settings.py, labs_sources.py, labs_cache.py, labs_hub.py and peft.
"""

from __future__ import annotations

import importlib.util
import json
import logging
from pathlib import Path
from typing import Any

from msgspec.structs import replace

import labs_cache
import labs_hub
import labs_sources
from labs_settings import ModelError, ModelSpec

log = logging.getLogger("labs")
SETTINGS, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
MOST_BYTES = 2**20  # of adapter_config.json, which has a few hundred
# The kinds of peft whose merged weights were found to give the logits of the adapter itself.
KINDS = ("LORA", "ADALORA", "LOHA", "LOKR", "VERA", "IA3", "OFT")
# Options of LoRA with which merged weights differ from the adapter, or peft refuses to merge, or
# imports the module that the adapter names.
APART = (
    *("layer_replication", "alora_invocation_tokens", "arrow_config", "use_qalora"),
    *("monteclora_config", "megatron_config"),
)


def check(spec: ModelSpec) -> None:
    """Look at the files of spec's adapter, which is downloaded from the hub if it is there.

    Raises ModelError when it is not found, incomplete, or of a kind that cannot be merged.
    """
    if importlib.util.find_spec("peft") is None:
        raise ModelError("the package peft is missing: pip install peft")
    folder = place(spec)
    try:
        stated = _stated(spec, folder)
    except (ValueError, OSError, RecursionError) as error:
        raise ModelError(f"adapter = {spec.adapter}: {labs_hub.reason(error)}") from error
    base = str(stated.get("base_model_name_or_path") or "").rstrip("/").rpartition("/")[2]
    if base.lower() not in spec.model_name.lower():
        log.warning("adapter %s was made for %s, not for %s", spec.adapter, base, spec.model_name)


def merged(model: Any, spec: ModelSpec) -> Any:
    """Return the model with the adapter of `spec` added to its weights, as by merge_and_unload.

    Raises ModelError for an adapter that cannot be read, does not fit or is not of finite numbers.
    """
    name = f"adapter = {spec.adapter}"
    places = {str(each) for each in getattr(model, "hf_device_map", {}).values()}
    if len(places) > 1 and places & {"cpu", "disk"}:
        raise ModelError(f"{name}: needs a device_map that leaves no layer on cpu or disk")
    try:
        return _by_peft(model, place(replace(spec, local_files_only=True)))
    except ModelError:
        raise
    except Exception as error:  # peft, safetensors and torch raise many kinds
        why = labs_hub.reason(error)
        if "size mismatch" in str(error):
            why = "has other sizes than the layers of this model"
        elif isinstance(error, TypeError | AttributeError | LookupError):
            why = f"{SETTINGS} is malformed: {why}"
        raise ModelError(f"{name}: {why}") from error


def revision(spec: ModelSpec) -> str:
    """Return the hub's commit of spec's adapter, or the sha256 of its folder."""
    folder = place(replace(spec, local_files_only=True))  # it was downloaded by `check`
    digest = _is_folder(spec) and labs_cache.digest(folder, spec.cache_dir)
    return f"sha256:{digest}" if digest else folder.name


def place(spec: ModelSpec) -> Path:
    """Return the folder of spec's adapter; owner/name or owner/name@revision is one on the hub."""
    name = str(spec.adapter)
    if _is_folder(spec):
        return Path(name).expanduser()
    if name.startswith((".", "/", "~")):
        raise ModelError(f"adapter = {name}: there is no such folder")
    repository, _, commit = name.partition("@")
    hub = labs_sources.Hub(commit or None, spec.token, spec.local_files_only)
    try:
        found, _ = labs_sources.hub_file(name, repository, SETTINGS, hub)
        try:
            labs_sources.hub_file(name, repository, WEIGHTS, hub)
        except labs_cache.SourceError:
            if spec.use_safetensors:
                raise
            labs_sources.hub_file(name, repository, PICKLE, hub)
    except labs_cache.SourceError as error:
        why = f": {labs_hub.reason(error.__cause__)}" if error.__cause__ else ""
        raise ModelError(f"adapter = {error}{why}") from error
    return Path(found).parent


def _is_folder(spec: ModelSpec) -> bool:
    return Path(str(spec.adapter)).expanduser().is_dir()


def _stated(spec: ModelSpec, folder: Path) -> dict[str, Any]:
    """Return what adapter_config.json says. Raises ValueError unless it can be merged."""
    if not (file := folder / SETTINGS).is_file():
        raise ValueError(f"the folder contains no {SETTINGS}")
    if file.stat().st_size > MOST_BYTES:
        raise ValueError(f"{SETTINGS} has more than {MOST_BYTES} bytes")
    try:
        stated: Any = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{SETTINGS} is not JSON: {error}") from None
    kind = stated.get("peft_type") if isinstance(stated, dict) else None
    if kind not in KINDS:
        raise ValueError(f"its peft_type is {kind!s:.40}; labs merges {', '.join(KINDS)}")
    if other := next((name for name in APART if stated.get(name)), None):
        raise ValueError(f"it uses {other}, which cannot be merged into the weights")
    if (folder / WEIGHTS).is_file():
        labs_sources.check_file(WEIGHTS, folder / WEIGHTS)
    elif not (folder / PICKLE).is_file():
        raise ValueError(f"the folder contains no {WEIGHTS}")
    elif spec.use_safetensors:
        raise ValueError(f"{PICKLE} is a pickle file; use_safetensors = false reads it")
    return dict(stated)


def _by_peft(model: Any, folder: Path) -> Any:
    """Return the merged model. Raises ValueError unless each number of the adapter is used."""
    import peft

    settings = peft.PeftConfig.from_pretrained(str(folder))
    settings.inference_mode = True
    embeddings, output = model.get_input_embeddings(), model.get_output_embeddings()
    tied = output is not None and output.weight is embeddings.weight
    adapted: Any = peft.PeftModel(model, settings)
    # peft merges such a product into both: logits were off by 2 to 19 (peft 0.21).
    ends = (adapted.get_input_embeddings(), adapted.get_output_embeddings())
    product = any(type(each).__module__.startswith("peft.tuners") for each in ends)
    if tied and (product or getattr(settings, "ensure_weight_tying", False)):
        raise ValueError("it changes embeddings that this model also uses as its output layer")
    renamed = getattr(model, "_checkpoint_conversion_mapping", {})
    found = adapted.load_adapter(str(folder), "default", key_mapping=renamed)
    if wrong := sorted(found.unexpected_keys):
        raise ValueError(f"this model has no layer for {wrong[0]}")
    if absent := sorted(found.missing_keys):
        raise ValueError(f"its weights lack {absent[0]}")
    # Without this option, peft asks the hub for the configuration of the base that is named there.
    numbers = peft.get_peft_model_state_dict(adapted, save_embedding_layers=False)
    if wrong := sorted(key for key, each in numbers.items() if not each.isfinite().all()):
        raise ValueError(f"{wrong[0]} contains numbers that are not finite")
    model.config.gguf_types = None  # the few bits of a GGUF file do not hold the new weights
    return adapted.merge_and_unload()  # its safe_merge rounds otherwise
