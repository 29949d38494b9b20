# SPDX-License-Identifier: Apache-2.0
"""Find where JSON ends in a text that grows, without reading any of it twice.

    scan = labs_scan.Scan({})
    at, ended = scan.read('{"a": "}', 0)  # 8, False
    at, ended = scan.read('{"a": "}"} and more', at)  # 10, True

This file needs no other of labs.
"""

from __future__ import annotations

from typing import Any

import regex


class Scan:
    """Reads one JSON value after another. options: those of transformers' parser of JSON."""

    def __init__(self, options: dict[str, Any]) -> None:
        self._json: Any = _pieces(options)
        self.begin()

    def begin(self) -> None:
        """Expect another value."""
        self.begun = self._ended = False
        self._depth, self._quote = 0, ""  # the mark that opened the string there

    def read(self, text: str, at: int) -> tuple[int, bool]:
        """Return how far a text is read from a place on, and whether the value ended there."""
        while not self._ended and (match := self._json[self._quote].match(text, at)):
            at, self.begun = match.end(), True
            if match.lastgroup == "mark":
                self._quote = "" if self._quote else match[0]
            elif not self._quote:
                self._depth += {"{": 1, "[": 1, "}": -1, "]": -1}.get(match[0], 0)
                self._ended = self._depth == 0 and match[0] in "}]"
        return at, self._ended


def _pieces(options: dict[str, Any]) -> dict[str, Any]:
    """Return patterns of one piece of JSON: outside of strings (""), and inside by opening mark.

    A long string comes in many pieces, none of which is read twice.
    """
    pairs = options.get("string_delims") or [('"', '"')]
    marks = "|".join(regex.escape(opens) for opens, _ in pairs)
    first = "".join({regex.escape(opens[0]) for opens, _ in pairs})
    found = {"": rf"(?P<mark>{marks})|[\[\]{{}}]|[^\[\]{{}}{first}]++"}
    for opens, closes in pairs:
        end, other = regex.escape(closes), regex.escape(closes[0])
        rest = rf"[^{other}]++|(?!{end}).(?=.{{{len(closes) - 1}}})"
        if closes == '"':
            rest = r'(?:[^"\\]++|\\.)++'
        found[opens] = rf"(?P<mark>{end})|{rest}"
    return {opens: regex.compile(each, regex.DOTALL) for opens, each in found.items()}
