# SPDX-License-Identifier: Apache-2.0
"""Tell how a request would run, and where each setting comes from, without running anything.

    plan = labs_explain.explain(model, inputs, config.generation, config.sources)
    print(labs_explain.described(plan))
    print(labs_explain.dump_effective_config(config))

labs-gen explain, POST /explain and labs-gen config show it. Needs labs.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import msgspec
from msgspec import Struct
from msgspec.structs import replace

import labs
import labs_names
import labs_settings

Sources = Mapping[str, str] | None


class SettingValue(Struct, frozen=True):
    """The value of a setting and where it comes from."""

    value: Any
    source: str


class Explanation(Struct, frozen=True):
    """How a request would run. cache_bytes: size of its KV cache. settings: with defaults."""

    model: str
    prompt: str
    prompt_tokens: int
    context_left: int | None
    how: str
    why: str
    forward: str  # "labs" or "transformers", and why
    batch_invariant: bool
    shares_columns: bool  # of keys and values with requests that begin alike
    rows: int
    weight_bytes: int
    cache_bytes: int
    settings: dict[str, SettingValue]
    generation_config: dict[str, str] = {}  # the model's rules, and why some have no effect
    guesses: str = ""  # when and by what tokens are guessed


def explain(
    model: labs.Model, inputs: labs.Inputs, generation: labs.Generation, sources: Sources = None
) -> Explanation:
    """Return how a request would run, without running it. Raises the same errors as a run.

    sources: where settings come from, as in Config; other settings are the model's or defaults.
    """
    decoder = model.decoder
    own = dict.fromkeys(("reasoning", "thinking_budget"))  # of labs_tools, not of the core
    stream = labs.open_request(model, 0, inputs, replace(generation, **own))
    tokens, limit = len(inputs.input_ids), model.context_length
    return Explanation(
        model=labs_names.short(model.spec.model_name),
        prompt=inputs.prompt,
        prompt_tokens=tokens,
        context_left=None if limit is None else limit - tokens,
        how=decoder.mode,
        why=decoder.reason,
        forward=f"{'labs' if decoder.forward else 'transformers'}: {decoder.why_forward}",
        batch_invariant=decoder.invariant,
        shares_columns=decoder.join is not None,
        rows=labs.rows_in_memory(model),
        weight_bytes=decoder.weight_bytes + getattr(decoder.draft, "weight_bytes", 0),
        cache_bytes=(tokens + generation.max_new_tokens) * decoder.column_bytes,
        settings=_sourced(model, stream, sources or {}, generation),
        generation_config=model.defaults.described() if model.defaults else {},
        guesses=_guesses(decoder, generation),
    )


def _guesses(decoder: Any, generation: labs.Generation) -> str:
    ways = ["earlier text"] if generation.prompt_lookup_num_tokens else []
    if decoder.draft is not None:
        ways.append(f"{labs_names.short(decoder.draft.name)} (draft_model)")
    return f"{', then '.join(ways)}; only while it runs alone" if ways else ""


def described(plan: Explanation) -> str:
    """Return an explanation as lines of text, the prompt first."""
    left = plan.context_left
    room = "the context has no limit" if left is None else f"the context has room for {left} more"
    guessed = f"\ntokens guessed by: {plan.guesses}" if plan.guesses else ""
    same = "yes" if plan.batch_invariant else "not promised for this model on this device"
    shared = "one copy for all rows" if plan.shares_columns else "a copy for each row"
    text = f"""{plan.prompt}
---
model: {plan.model}
prompt tokens: {plan.prompt_tokens}; {room}
runs: {plan.how} ({plan.why}); up to {plan.rows} rows at once
forward of {plan.forward}
same text whatever else is in the batch: {same}{guessed}
keys and values of prompts that begin alike: {shared}
memory: weights {plan.weight_bytes / 1e6:.0f} MB, this request {plan.cache_bytes / 1e6:.1f} MB
---
"""
    for name, rule in plan.generation_config.items():
        text += f"# generation_config.json: {name} = {rule}\n"
    for key, each in plan.settings.items():
        value = "unset" if each.value is None else json.dumps(each.value, ensure_ascii=False)
        text += f"{key} = {value}  # {each.source}\n"
    return text


def _sourced(
    model: labs.Model, stream: labs.InFlight, sources: Any, given: labs.Generation
) -> dict[str, SettingValue]:
    found, samples = {}, stream.sampling.temperature > 0
    holders = (model.spec, model.spec.quantization, labs.resolved(stream), model.decoder)
    for setting in (s for s in labs.settings() if s.section in ("generation", "quantization")):
        key, name = setting.key, setting.field
        source = sources.get(key) or ("model" if name in model.generation_defaults else "default")
        for holder in (each for each in holders if hasattr(each, name)):
            found[key] = SettingValue(getattr(holder, name), source)
    for name in ("reasoning", "thinking_budget"):
        found[name] = SettingValue(getattr(given, name), found[name].source)
    found["do_sample"] = SettingValue(samples, found["do_sample"].source)
    if model.spec.torch_dtype == "auto":
        found["torch_dtype"] = SettingValue(model.dtype, "auto")
    if not samples and stream.generation.temperature is None:
        found["temperature"] = SettingValue(0.0, "do_sample")
    if stream.generation.seed is None and samples:
        found["seed"] = SettingValue(None, "drawn")
    return found


def dump_effective_config(config: labs.Config) -> str:
    """Return every setting as TOML, each line with its source. Secrets are left out."""
    lines = []
    for section in labs_settings.SECTIONS:
        lines.append(f"[{section}]")
        for setting in (setting for setting in labs.settings() if setting.section == section):
            value, name = value_of(config, setting), setting.field
            line = f"# {name}: unset" if value is None else f"{name} = {_toml(value)}"
            shown = value == "auto" and name in ("torch_dtype", "quant_method")
            later = "; labs-gen explain shows what it becomes" if shown else ""
            lines.append(f"{line}  # {config.sources.get(setting.key, 'default')}{later}")
    if config.model.token:
        lines.append('# HF_TOKEN = "********"')
    if config.api_keys:
        lines.append(f"# API keys: {len(config.api_keys)}")
    return "\n".join(lines) + "\n"


def value_of(config: labs.Config, setting: labs.Setting) -> Any:
    """Return the value that a setting has in a configuration."""
    split = {"generation": (config.model, config.generation, config)}
    split["quantization"] = (config.model.quantization,)  # type: ignore[assignment]
    holders = split.get(setting.section) or (getattr(config, setting.section),)
    holder = next(each for each in holders if hasattr(each, setting.field))
    return getattr(holder, setting.field)


def _toml(value: Any) -> str:
    if isinstance(value, msgspec.Struct):
        return _toml(
            {key: item for key, item in msgspec.structs.asdict(value).items() if item is not None}
        )
    if isinstance(value, dict):
        return "{" + ", ".join(f'"{key}" = {_toml(item)}' for key, item in value.items()) + "}"
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml, value))}]"
    return msgspec.json.encode(value).decode()
