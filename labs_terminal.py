# SPDX-License-Identifier: Apache-2.0
"""Text for a terminal: what of it is safe, what is dimmed, how code and calls are framed.

    labs_terminal.shown("a\\x1b[2Jb", sys.stdout)  # "a␛[2Jb" on a terminal, unchanged elsewhere
    labs_terminal.tell("[stopped]")              # to standard error
    frames = labs_terminal.Frames()              # frames.feed("```py\\n") is a line above the code

A terminal obeys the control characters that it is sent: they could clear it, write the clipboard,
or make one text look like another. What models, files and servers wrote is therefore shown with
pictures in their place. Nothing is wrapped, so that what is copied has no line ends of ours. Needs
click.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from typing import Any

import click
import msgspec

# All control characters but \t and \n, and those that reorder text: https://trojansource.codes
CONTROLS = re.compile(r"\r(?=\n)|[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
WIDEST = 79  # columns of a line above or below code
LONGEST_FENCE = 200  # characters; a longer line is no beginning of code
MAY_OPEN = re.compile(r"[ \t]*(`{0,2}|~{0,2}|`{3,}[^`]*|~{3,}.*)")  # what is seen of a line
OPENS = re.compile(r"[ \t]*(?P<fence>`{3,}|~{3,})[ \t]*(?P<language>[^\s`]*)[^`]*")
CLOSES = re.compile(r"[ \t]*(?P<fence>`*|~*)[ \t]*")


def safe(text: str) -> str:
    """Return the text with pictures in place of its control characters, except \\t and \\n."""
    return CONTROLS.sub(_picture, text)


def _picture(found: re.Match[str]) -> str:
    code = ord(found[0])
    if code == 0x0D and found.string[found.end() : found.end() + 1] == "\n":
        return ""  # the end of a line as Windows writes it
    return {0x7F: "␡"}.get(code, chr(0x2400 + code) if code < 0x20 else f"<U+{code:04X}>")


def shown(text: str, stream: Any) -> str:
    """Return what to write to a stream: on a terminal the safe text, else the text as it is."""
    return safe(text) if stream.isatty() else text


def with_colours(stream: Any) -> bool:
    """Return whether a stream is a terminal that should show colours. See https://no-color.org"""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return bool(stream.isatty() and not plain)


def tell(message: object = "", nl: bool = True, dim: bool = False) -> None:
    """Write what is not a part of the answer to standard error."""
    text = shown(str(message), sys.stderr)
    dimmed = dim and text and with_colours(sys.stderr)
    click.echo(click.style(text, dim=True) if dimmed else text, nl=nl, err=True)


def is_for_person() -> bool:
    """Return whether standard input and output are a terminal."""
    return sys.stdin.isatty() and sys.stdout.isatty()


def hint(message: str) -> None:
    """Tell a person something that a program which reads the output would not miss."""
    if is_for_person():
        tell(message)


def rule(title: str = "") -> str:
    """Return a line across the terminal, without its line end. title: stands at its beginning."""
    columns = min(WIDEST, _columns() - 1)
    head = f"── {safe(title)[: max(0, columns - 5)]} " if title else ""
    return head + "─" * max(3, columns - len(head))


def _columns() -> int:
    for stream in (sys.stdout, sys.stderr):
        try:
            return os.get_terminal_size(stream.fileno()).columns or WIDEST + 1
        except (OSError, ValueError, AttributeError):  # no terminal, or no descriptor
            continue
    return WIDEST + 1


def card(name: str, arguments: str) -> str:
    """Return a call of a tool as lines of text, without the last line end."""
    with contextlib.suppress(msgspec.DecodeError):  # else it stays as the model wrote it
        arguments = msgspec.json.format(arguments)
    return "\n".join([rule(f"call: {name}"), arguments, rule()])


class Frames:
    """Turns the fences of code in Markdown into lines, piece by piece, and leaves all else.

    A line is held back only while it may still become a fence.
    """

    def __init__(self) -> None:
        self._held = self._fence = ""  # of the line that has begun; that opened the code
        self._begun = False  # whether the line that has begun is no fence and is partly returned

    def feed(self, text: str) -> str:
        """Return what can be written after this piece."""
        return "".join(map(self._take, re.findall(r"[^\n]*\n|[^\n]+", text)))

    def end(self) -> str:
        """Return the rest of the text; code that is still open is closed."""
        held, self._held = self._held, ""
        rest = self._line(held).removesuffix("\n") if held else ""
        if self._fence:
            rest += ("\n" if rest or self._begun else "") + rule()
        self._fence, self._begun = "", False
        return rest

    def _take(self, piece: str) -> str:
        ends = piece.endswith("\n")
        if self._begun:
            self._begun = not ends
            return piece
        self._held += piece
        may = CLOSES if self._fence else MAY_OPEN
        if not ends and len(self._held) < LONGEST_FENCE and may.fullmatch(self._held):
            return ""
        line, self._held, self._begun = self._held, "", not ends
        return self._line(line) if ends else line

    def _line(self, line: str) -> str:
        """Return a whole line, or the rule that it becomes."""
        found = (CLOSES if self._fence else OPENS).fullmatch(line.strip("\r\n"))
        if found is None or not (found["fence"] and found["fence"].startswith(self._fence)):
            return line
        self._fence = "" if self._fence else found["fence"]
        return rule(found["language"] if self._fence else "") + "\n"
