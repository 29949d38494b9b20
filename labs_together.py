# SPDX-License-Identifier: Apache-2.0
"""Which flags go together: none is accepted that would have no effect.

    labs_together.check_flags(labs_flags.SUBCOMMANDS["batch"], flags)  # raises UsageError

Needs labs_flags.py and click.
"""

from __future__ import annotations

from typing import Any

import click

import labs_flags


def check_flags(row: labs_flags.Subcommand, flags: labs_flags.Values) -> None:
    """Refuse a flag that would have no effect, because of another flag or without another one."""
    for names in row.rivals:
        given = [name for name in names.split() if is_given(flags.get(name))]
        if len(given) > 1:
            raise rivals(*given)
    check_needs(flags, row.needs)


def rivals(*names: str) -> click.UsageError:
    """Return the error for flags that exclude each other."""
    flags = " and ".join(f"--{name.replace('_', '-')}" for name in names)
    return click.UsageError(f"{flags} exclude each other; give one of them")


def is_given(value: Any) -> bool:
    """Return whether a flag with this value was given."""
    return value not in (None, ()) and value is not False  # 0 counts as given, but 0 == False


def check_needs(flags: labs_flags.Values, rows: tuple[str, ...]) -> None:
    """Refuse the first flag of a row if it is given without one of the others in the row."""
    for row in rows:
        name, *modes = row.split()
        if is_given(flags.get(name)) and not any(is_given(flags.get(mode)) for mode in modes):
            flag, needed = name.replace("_", "-"), " or ".join(f"--{mode}" for mode in modes)
            raise click.UsageError(f"--{flag} needs {needed}")
