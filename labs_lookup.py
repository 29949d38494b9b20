# SPDX-License-Identifier: Apache-2.0
"""What settings there are: their types, bounds, defaults, flags and variables, in words.

    labs_lookup.describe(labs.Config(), {"word": "temp"})  # labs-gen settings temp

Needs labs.py, labs_flags.py, labs_shell.py, click.
"""

from __future__ import annotations

import difflib
import json
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

import click
import msgspec

import labs
import labs_flags
import labs_shell


def describe(config: labs.Config, flags: labs_flags.Values) -> None:
    """Write the settings that have a word, those first whose name begins with it."""
    word = (flags["word"] or "").lower().replace("-", "_").removeprefix("labs_").strip("_")
    ranked = sorted(labs.settings(), key=lambda each: not each.field.startswith(word))
    named = [each for each in ranked if word in each.key]
    spoken = word.replace("_", " ")
    told = [each for each in ranked if spoken in each.description.lower() and each not in named]
    if not named + told:
        raise click.UsageError(unknown(word))
    labs_shell.write("\n".join(map(described, named + told)))


def unknown(word: str) -> str:
    """Return the error for a word that no setting has, with the names most like it."""
    names = {name: each.key for each in labs.settings() for name in (each.key, each.field)}
    close = dict.fromkeys(names[near] for near in difflib.get_close_matches(word, names, 5, 0.5))
    hint = f"; the nearest names: {', '.join(close)}" if close else ""
    return f"no setting has {word!r} in its name or description{hint}"


def described(setting: labs.Setting) -> str:
    """Return a setting in a few lines: where it is written, what it does, its bounds."""
    kind, limits = bounds(setting.type)
    default = "unset" if setting.default is None else json.dumps(setting.default)
    flags = ", ".join(labs_flags.flags_of(setting))
    only = "" if setting.key in labs_flags.KEYS else " (of labs-gen serve)"
    return f"""{setting.field} in [{setting.section}]
  {setting.description}
  type: {", ".join(filter(None, (kind.replace("`", ""), limits)))}; default: {default}
  flag: {flags}{only}; environment: {setting.environment}
"""


def bounds(kind: Any) -> tuple[str, str]:
    """Return the type of a setting and its bounds, both in words."""
    notes = [note for note in getattr(kind, "__metadata__", ()) if isinstance(note, msgspec.Meta)]
    inner, origin = get_args(kind), get_origin(kind)
    if origin is Annotated:
        name, below = bounds(inner[0])
        item = "items" if get_origin(inner[0]) in (tuple, dict) else "characters"
        limits = [below] if below else []
        for note in notes:
            signs = {"≥": note.ge, ">": note.gt, "≤": note.le, "<": note.lt}
            limits += [f"{sign} {number(end)}" for sign, end in signs.items() if end is not None]
            least, most = note.min_length, note.max_length
            some = item if least != 1 else item[:-1]
            limits += [f"at least {least} {some}"] if most is None and least is not None else []
            limits += [f"{least or 0} to {most:,} {item}"] if most is not None else []
        return name, ", ".join(limits)
    if origin is Literal:
        return "one of " + ", ".join(f"`{each}`" for each in inner), ""
    if NoneType in inner:
        return bounds(inner[0])
    if origin is tuple:
        name, below = bounds(inner[0])
        return f"list of {name}", f"each {below}" if below else ""
    if origin is dict:
        keys, values = (bounds(each)[1] for each in inner)
        return "table", f"keys {keys}; values {values}" if keys or values else ""
    names = {bool: "true or false", int: "integer", float: "number", str: "string"}
    return names.get(kind, "table"), ""


def number(value: float) -> str:
    """Return a number as people write it."""
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"
