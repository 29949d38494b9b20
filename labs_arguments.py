# SPDX-License-Identifier: Apache-2.0
"""What is typed on a command line: a number with a bound, a file, the name of a setting.

    click.Option(["--rows"], type=labs_arguments.Number(int, 1))  # "0 is less than 1" is refused

Each says what is wrong with a value, or how a shell completes it. Needs labs.py and click.
"""

from __future__ import annotations

from typing import Any

import click
from click.shell_completion import CompletionItem

import labs


class FileName(click.types.StringParamType):
    """The name of a file, which a shell can complete. Whoever opens the file checks it."""

    name = "file"

    def shell_complete(self, ctx: Any, param: Any, incomplete: str) -> list[CompletionItem]:
        return [CompletionItem(incomplete, type="file")]


class SettingName(click.types.StringParamType):
    """The name of a setting or a part of it."""

    name = "word"

    def shell_complete(self, ctx: Any, param: Any, incomplete: str) -> list[CompletionItem]:
        found = (each.key for each in labs.settings() if each.key.startswith(incomplete))
        return [CompletionItem(key) for key in found]


class Number(click.ParamType[Any]):
    """An integer, or a number with a fraction, with a bound that errors tell."""

    def __init__(self, kind: type[int] | type[float], least: int | None = None) -> None:
        self._kind, self._least, self.name = kind, least, "integer" if kind is int else "number"

    def convert(self, value: Any, param: Any, ctx: Any) -> int | float:
        try:
            found = self._kind(value)
        except ValueError:
            self.fail(f"{value!r} is no {self.name}", param, ctx)
        if self._least is not None and not found >= self._least:  # NaN is not
            self.fail(f"{value} is less than {self._least}", param, ctx)
        return found
