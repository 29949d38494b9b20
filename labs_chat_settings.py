# SPDX-License-Identifier: Apache-2.0
"""The commands of a chat that change what answers: /model, /settings, and /stats, which shows it.

    talk = labs_chat_settings.change_settings(talk, "temperature=0.2 top_p=", host)

Settings are checked as everywhere else. Needs labs.py, labs_settings.py, labs_talk.py and
labs_terminal.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import msgspec
from msgspec.structs import replace

import labs
import labs_settings
from labs_talk import Host, Talk, instead_of, nearest
from labs_terminal import hint, tell

MAX_SHOWN = 200  # models that are listed
DEFAULTS = labs.Generation()


def switch_model(talk: Talk, name: str, host: Host) -> Talk:
    """Let another model answer, or list the configured ones. A failed load changes nothing."""
    now = talk.config.model_id
    if not name:
        names = dict.fromkeys([now, *host.models])
        tell("\n".join(f"{'*' if each == now else ' '} {each}" for each in [*names][:MAX_SHOWN]))
        hint("[/model NAME takes another: one of these, a folder, a .gguf file or a hub id]")
        return talk
    if name == now:
        hint(f"[{name} answers already]")
        return talk
    hint(f"[loading {name}; Ctrl-C keeps {now}]")
    try:
        config, model = host.load(name)
    except KeyboardInterrupt:
        tell(f"[stopped; {now} still answers]")
        return talk
    except labs.LabsError as error:
        like = None if name in host.models else nearest(name, host.models)
        raise labs.ModelError(f"{error}{instead_of(like)} ({now} still answers)") from error
    changed = replace(talk, config=config, model=model)
    host.check(changed)
    getattr(talk.model.prefixes, "flush", bool)()  # files of what its prompts began with, if any
    hint(f"[{config.model_id} answers from now on]")
    return changed


def change_settings(talk: Talk, text: str, host: Host) -> Talk:
    """Show the settings that are not default, or change some: key=value, key= for the default."""
    if not text:
        lines = described_settings(talk)
        tell("\n".join(lines) if lines else "[each setting has its default]")
        return talk
    options = dict(talk.options)
    for key, value in assignments(text):
        options.pop(key, None)
        if value:
            options[key] = value_of(key, value)
    changed = replace(talk, options=options)
    host.check(changed)
    for key, _ in assignments(text):
        hint(f"{key} = {written(getattr(changed.generation, key))}")
    return changed


def described_settings(talk: Talk) -> list[str]:
    """Return a line for each generation setting that is not default, with where it comes from."""
    given, advised = talk.generation, talk.model.generation_defaults
    found = []
    for setting in generation_settings().values():
        name, value = setting.field, getattr(given, setting.field)
        source = "/settings" if name in talk.options else talk.config.sources.get(setting.key)
        if value is None and name in advised:
            value, source = advised[name], "the model's generation_config.json"
        if value != getattr(DEFAULTS, setting.field):
            found.append(f"{name} = {written(value)}" + (f"  # {source}" if source else ""))
    return found


def written(value: Any) -> str:
    """Return the value of a setting as it is written."""
    return "unset" if value is None else msgspec.json.encode(value).decode()


def generation_settings() -> dict[str, labs.Setting]:
    """Return the settings that /settings knows, by name."""
    names = labs.Generation.__struct_fields__
    return {each.field: each for each in labs.settings() if each.field in names}


def assignments(text: str) -> Iterator[tuple[str, str]]:
    """Yield (key, value) of `key=value key=value`; a value ends where the next key begins."""
    found = re.split(r"(?<!\S)(\w+)\s*=\s*", text)
    if found[0].strip():
        raise labs.InputError(
            f"{found[0]!r:.60} has no =; write key=value, or key= for the default"
        )
    for key, value in zip(found[1::2], found[2::2], strict=True):
        if key not in generation_settings():
            like = instead_of(nearest(key, generation_settings()))
            raise labs.ConfigError(f"unknown setting {key!r:.60}{like}")
        yield key, value.strip()


def value_of(key: str, text: str) -> Any:
    """Return the value of a setting that is written as in the environment."""
    value = labs_settings.from_text(text, generation_settings()[key].type, key)
    return getattr(labs.evolve(labs.Generation(), **{key: value}), key)


def show_stats(talk: Talk, _: str, host: Host) -> Talk:
    """Show how fast the last answer came, and how much of the context is used."""
    if talk.done is None:
        raise labs.InputError("no answer has been finished yet")
    used, times = talk.done.usage, talk.done.timings
    total = used.prompt_tokens + used.completion_tokens
    limit = talk.model.context_length
    room = "of a context without limit" if limit is None else f"of {limit} ({total / limit:.0%})"
    tell(f"""\
answer:      {used.completion_tokens} tokens, {times.tokens_per_s:.3g} tokens/s
first token: after {times.prefill_s:.3g} s
prompt:      {used.prompt_tokens} tokens, {used.cached_tokens} of them from the cache
context:     {total} {room}""")
    return talk
