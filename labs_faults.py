# SPDX-License-Identifier: Apache-2.0
"""Every fault of a configuration at once, and settings in words that others may see.

    found = labs_faults.examined(None, {})  # ./labs.toml, .env and the environment
    print(found.faults, found.changed)      # without keys, tokens, passwords and texts

labs.load_config reports the first fault; here each faulty setting is left out, until the rest is
in order. Needs labs.py, labs_settings.py and labs_explain.py.
"""

from __future__ import annotations

import logging
import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

import labs
import labs_explain
import labs_settings

MOST = 50  # faults that are told
SECRETS = {"key", "keys", "token", "secret", "password"}  # in names of settings and variables
TOKENS = re.compile(r"\b(hf|sk|pk|ghp|gho|glpat|xox[a-z])[-_][A-Za-z0-9_-]{8,}")
LOGINS = re.compile(r"(\w+://)[^/@\s]+@")  # of a URL
INSTEAD = {"model_name": "-"}  # without it, a [models.NAME] table would be another fault


class Examined(Struct, frozen=True, kw_only=True):
    """A configuration without its faulty settings. changed: other values than the defaults.

    files: those that were read. notes: what is worth a look but not wrong.
    """

    config: labs.Config
    files: tuple[str, ...]
    faults: tuple[str, ...]
    notes: tuple[str, ...]
    changed: dict[str, str]


class Layers(Struct):
    """What settings are read from; faulty ones are taken out."""

    file: str
    tables: dict[str, Any]
    dotenv: dict[str, str]
    env: dict[str, str]
    overrides: dict[str, object]

    def config(self) -> labs.Config:
        """Return the Config as labs.load_config does, but without API keys."""
        upper = {
            **labs_settings.read_variables(self.dotenv, ".env"),
            **labs_settings.read_variables(self.env, "environment"),
            **{key: (each, f"--{key.replace('_', '-')}") for key, each in self.overrides.items()},
        }
        labs_settings.check_sections(self.tables, self.file)
        token = {**self.dotenv, **self.env}.get("HF_TOKEN") or None
        config = labs_settings.configure(self.tables, upper, self.file, token)
        labs_settings.check_routes(config)
        return config

    def fault(self) -> str | None:
        try:
            self.config()
        except labs.LabsError as error:
            return str(error)
        return None

    def places(self) -> Iterator[tuple[dict[str, Any], str]]:
        """Yield each (table, key), single settings before the tables that hold them."""
        yield from (
            (layer, key) for layer in (self.overrides, self.env, self.dotenv) for key in layer
        )
        yield from _places_in(self.tables)


def _places_in(table: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    for value in table.values():
        if isinstance(value, dict):
            yield from _places_in(value)
    yield from ((table, key) for key in table)


# ---------------------------------------------------------------- every fault


def examined(path: str | None, overrides: Mapping[str, object]) -> Examined:
    """Return what labs.load_config would read, and all that is wrong with it."""
    file, notes = Path(path or "labs.toml"), _Notes()
    log = logging.getLogger("labs")
    log.addHandler(notes)
    before, log.propagate = log.propagate, False
    try:
        faults, layers = _read(file, path is not None, overrides)
        faults += _taken_out(layers)
        config = layers.config()
        if not faults:  # what is left to fail: the file of API keys
            try:
                config = labs.load_config(path, overrides=overrides)
            except labs.LabsError as error:
                faults.append(str(error))
    finally:
        log.removeHandler(notes)
        log.propagate = before
    return Examined(
        config=config,
        files=tuple(str(each) for each in (file, Path(".env")) if each.is_file()),
        faults=tuple(map(clean, faults)),
        notes=tuple(clean(note) for note in dict.fromkeys(notes.lines)),
        changed=changed(config),
    )


class _Notes(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def _read(file: Path, named: bool, overrides: Mapping[str, object]) -> tuple[list[str], Layers]:
    """Return the faults of the files themselves, and what they hold."""
    faults, tables, dotenv = [], {}, dict[str, Any]()
    if named or file.exists():
        try:
            tables = tomllib.loads(file.read_text(encoding="utf-8-sig"))
        except (OSError, ValueError) as error:
            why = error.strerror if isinstance(error, OSError) else str(error)
            faults.append(f"{file}: cannot be read: {why}")
    if Path(".env").is_file():
        try:
            from dotenv import dotenv_values

            dotenv = {k: v for k, v in dotenv_values(".env", encoding="utf-8-sig").items() if v}
        except (ImportError, OSError, ValueError) as error:
            faults.append(f".env: cannot be read: {error}")
    return faults, Layers(str(file), tables, dotenv, _variables(), dict(overrides))


def _variables() -> dict[str, str]:
    return {n: v for n, v in os.environ.items() if n.startswith("LABS_") or n == "HF_TOKEN"}


def _taken_out(layers: Layers) -> list[str]:
    """Return the faults, and take the setting that causes each of them out of the layers."""
    faults: list[str] = []
    while (fault := layers.fault()) is not None:
        table, key = _cause(layers, fault)
        value = table.pop(key)
        if key in INSTEAD and value != INSTEAD[key]:
            table[key] = INSTEAD[key]
        faults.append(_without(value, fault) if is_private(key, value) else fault)
        if len(faults) == MOST:  # each takes longer the more there are
            layers.tables, layers.dotenv, layers.env, layers.overrides = {}, {}, {}, {}
    return faults


def _cause(layers: Layers, fault: str) -> tuple[dict[str, Any], str]:
    """Return the place without which the fault is gone, one that it names if there is one."""
    others, last = [], None
    for last in [*layers.places()]:
        table, key = last
        order = [*table.items()]
        del table[key]
        gone = layers.fault() != fault
        table.clear()
        table.update(order)
        if gone and re.search(rf"(?<![A-Za-z0-9.]){re.escape(key)}( =| in |['\[\]:])", fault):
            return last
        others += [last] if gone else []
    return others[0] if others else last  # type: ignore[return-value]


# ---------------------------------------------------------------- words that others may see


def changed(config: labs.Config) -> dict[str, str]:
    """Return each setting with another value than its default, and where it comes from."""
    found = {}
    for setting in labs.settings():
        value = labs_explain.value_of(config, setting)
        if setting.key in config.sources and value != setting.default:
            found[setting.key] = f"{_shown(setting.key, value)} ({config.sources[setting.key]})"
    if config.models:
        found["models"] = ", ".join(config.models)
    return {key: clean(text) for key, text in found.items()}


def _shown(key: str, value: Any) -> str:
    if not is_private(key, value):
        return str(msgspec.to_builtins(value))
    return f"{len(value)} entries" if isinstance(value, (dict, tuple, list)) else "set"


def is_private(key: str, value: Any) -> bool:
    """Return whether a value may be a secret or somebody's text: a list, a table, a key."""
    return isinstance(value, (dict, tuple, list)) or (isinstance(value, str) and _is_secret(key))


def _is_secret(name: str) -> bool:
    return not SECRETS.isdisjoint(name.lower().split("_"))


def _without(value: Any, fault: str) -> str:
    """Return a message without the value that it shows, whole or cut."""
    parts = [value, *(value if isinstance(value, (list, tuple)) else ())]
    for text in (form for part in parts for form in (repr(part), repr(part)[:57])):
        fault = fault.replace(text, "(not shown)") if len(text) > 2 else fault
    return fault


def clean(text: str, *secrets: str | None) -> str:
    """Return a text without secrets, the user's home folder, and control characters."""
    for secret in filter(None, secrets):
        text = text.replace(secret, "***")
    for name, value in os.environ.items():
        for part in value.split(",") if _is_secret(name) else ():
            text = text.replace(part, "***") if len(part) >= 8 else text
    text = TOKENS.sub("***", LOGINS.sub(r"\1***@", text))
    home = str(Path.home())
    text = text.replace(home, "~") if len(home) > 1 else text
    return "".join(each if each.isprintable() else " " for each in text)
