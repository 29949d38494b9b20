# SPDX-License-Identifier: Apache-2.0
"""Search untrusted texts for regular expressions: the operator's patterns and personal data.

    pattern = labs_patterns.Bounded("deny_patterns[0]", r"(?i)\bproject-x\b")
    pattern.search(text)                               # a match, None, or raises TooSlow

The operator's patterns use the package regex, which transformers depends on: it accepts the syntax
of Python's re, releases the GIL while it searches, and has a time limit. Needs labs.py.
"""

from __future__ import annotations

import functools
import logging
import re
import time
from collections.abc import Callable
from typing import Any

import labs

log = logging.getLogger("labs.patterns")
LIMIT_S = 1.0  # CPU seconds of one search; most searches take less than a millisecond


class TooSlow(labs.InputError):
    """A search exceeded LIMIT_S. name: the setting that holds the pattern."""

    def __init__(self, name: str) -> None:
        super().__init__(f"{name}: searching this text for the pattern takes over {LIMIT_S:g} s")
        self.name, self.code = name, "pattern_too_slow"


class Bounded:
    """A regular expression with a time limit. name: the setting that holds it, shown in errors.

    Raises ConfigError when the package regex cannot compile the pattern.
    """

    def __init__(self, name: str, pattern: str) -> None:
        labs.require("regex")
        import regex

        self.name = name
        try:
            self._regex: Any = regex.compile(pattern, regex.V0)
        except regex.error as error:
            raise labs.ConfigError(f"{name} = {pattern!r}: {error}") from error

    def search(self, text: str, start: int = 0) -> Any:
        """Return the first match from `start` on, or None. Raises TooSlow."""
        began, timeout = time.thread_time(), LIMIT_S
        while True:
            try:
                return self._regex.search(text, start, timeout=timeout)
            except (TimeoutError, MemoryError):
                if (used := time.thread_time() - began) > LIMIT_S * 0.9:
                    log.warning("labs: %s: search stopped after %.1f s of CPU", self.name, used)
                    raise TooSlow(self.name) from None
                timeout *= 2  # regex counts wall time, in which other threads ran too


@functools.lru_cache(maxsize=1024)
def _of_rule(number: int, pattern: str) -> Bounded:
    return Bounded(f"router_rules[{number}]", pattern)


def check(router: labs.Router) -> None:
    """Compile every rule's pattern. Raises ConfigError when one cannot be compiled."""
    for number, rule in enumerate(router.rules):
        _of_rule(number, rule.pattern or "")


def route(router: labs.Router, text: str, count: Callable[[], int]) -> str | None:
    """Return the model of the first rule that matches a text of `count()` tokens, or None."""
    for number, rule in enumerate(router.rules):
        if _of_rule(number, rule.pattern or "").search(text) and (
            rule.over_prompt_tokens is None or count() > rule.over_prompt_tokens
        ):
            return rule.model
    return None


# ---------------------------------------------------------------- personal data


EMAIL = re.compile(r"[\w.%+-]{1,64}+@(?:[\w-]{1,63}\.){1,8}[^\W\d_][\w-]{1,62}")
PHONE = re.compile(  # never after a digit and a mark, to skip parts of dates and versions
    r"(?<!\w)(?<!\d[./-])(?:\+\d(?:[ ./()-]{0,2}\d){6,14}"  # +49 30 1234567
    r"|\(?(?=0(?:[ /()-]{0,2}\d){8})(?!\d\d?[/-]\d\d?[/-]\d\d)"  # (030) 123-4567, but not a date
    r"0\d{1,4}\)?(?:[ /-]{0,2}\d{2,9}+){1,4}"
    r"|(?:1[ .-])?(?:\(\d{3}\) ?|\d{3}[ .-])\d{3}[ .-]\d{4})(?![./-]?\d)"  # 555-123-4567
)
CARD = re.compile(r"(?<!\d)(?<!\d\.)[2-6](?:[ -]?\d){12,18}(?!\d)")


def card_length(found: str) -> int:
    """Return the length of the longest run of digit groups that passes the Luhn check, or 0."""
    for end in reversed([group.end() for group in re.finditer(r"\d+", found)]):
        digits = [int(each) for each in found[:end] if each.isdecimal()]
        doubled = [2 * each - 9 * (each > 4) for each in digits[-2::-2]]
        if len(digits) > 12 and (sum(doubled) + sum(digits[-1::-2])) % 10 == 0:
            return end
    return 0
