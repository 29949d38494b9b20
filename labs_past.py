# SPDX-License-Identifier: Apache-2.0
"""Flags of labs-gen that have become subcommands. They work for one more version.

    row, flags = labs_past.renamed(flags)  # of the default command

To end this, delete this file and what names it in labs_commands.py and labs_cli.py.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from typing import Any

import click

import labs_flags
import labs_terminal
import labs_together

# The old flag and the subcommand that it became. The first that is given counts.
MODES = {
    "vendor": "vendor",
    "show_config": "config",
    "input": "batch",
    "replay": "replay",
    "index": "index",
    "explain": "explain",
    "chat": "chat",
}
TARGETS = {"vendor": str, "input": str, "replay": str, "index": tuple[str, ...]}
OPTIONS: labs_flags.Options = (
    *((f"--{name.replace('_', '-')}", TARGETS.get(name, bool), "") for name in MODES),
    ("--output", str, ""),
    *(option for name in ("vendor", "batch") for option in labs_flags.SUBCOMMANDS[name].options),
)
NAMES = [labs_flags.name_of(flag) for flag, *_ in OPTIONS]
# Each option of a subcommand needs the old flag that it became; batch_rows is one of two.
NEEDS = (
    *("output input", "batch_rows input replay", *labs_flags.RAY_NEEDS),
    *(
        f"{name} {mode}"
        for mode, row in (("input", "batch"), ("vendor", "vendor"))
        for flag, *_ in labs_flags.SUBCOMMANDS[row].options
        if (name := labs_flags.name_of(flag)) != "batch_rows"
    ),
)
SETTINGS = {"config", *labs_flags.KEYS}


def hidden(make: Callable[..., click.Option]) -> list[click.Option]:
    """Return the old flags as options that help does not show."""
    found = [make([flag], kind, help) for flag, kind, help in OPTIONS]
    for option in found:
        option.hidden = True
    return found


def renamed(flags: labs_flags.Values) -> tuple[labs_flags.Subcommand, labs_flags.Values]:
    """Return the subcommand that these flags of the default command mean, and its flags."""
    given = [name for name in flags if labs_together.is_given(flags[name])]
    given += [name for name in labs_flags.KEYS if flags[name] is False]  # --no-do-sample
    mode = next((name for name in MODES if name in given), None)
    row = labs_flags.SUBCOMMANDS[MODES.get(mode or "", "prompt")]
    known = {labs_flags.name_of(flag) for flag, *_ in row.options}
    known |= {"prompt" if name == "text" else name for name, *_ in row.arguments}
    if row.settings:
        known |= {each for each in SETTINGS if f"-{each}" not in row.settings.split()}
    unread = [name for name in given if mode and name not in {mode, *known}]
    if unread:
        raise labs_together.rivals(mode or "", unread[0])
    labs_together.check_needs(flags, NEEDS)
    if mode:
        tell(row, mode, flags)
    return row, {name: value for name, value in flags.items() if name in known}


def tell(row: labs_flags.Subcommand, mode: str, flags: labs_flags.Values) -> None:
    """Write the line that names the new way, with the user's own values."""
    names = [mode, *(["output"] if flags["output"] else [])]
    now = ["labs-gen", row.name, *(value for name in names for value in listed(flags[name]))]
    was = [word for name in names for word in spelled(name, flags[name])]
    line = f"labs-gen: {shlex.join(was)} is now: {shlex.join(now)}"
    labs_terminal.tell(line)


def listed(value: Any) -> list[str]:
    """Return the values of a flag; a flag that is only given has none."""
    return [*value] if isinstance(value, tuple) else [value] if isinstance(value, str) else []


def spelled(name: str, value: Any) -> list[str]:
    """Return a flag as the user wrote it."""
    flag = f"--{name.replace('_', '-')}"
    return [word for each in listed(value) for word in (flag, each)] or [flag]
