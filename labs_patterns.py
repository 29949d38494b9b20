# SPDX-License-Identifier: Apache-2.0
"""Regular expressions over the texts of strangers: operators' own, and of personal data.

    pattern = labs_patterns.Bounded("deny_patterns[0]", r"(?i)\bproject-x\b")
    pattern.search(text)                               # a match, None, or raises TooSlow

Operators' patterns are searched by the package regex, which transformers needs: it reads what
Python's re reads, lets other threads run meanwhile, and stops when it is told to. Needs labs.py.
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
LIMIT_S = 1.0  # of one core, for one search: most take less than a millisecond


class TooSlow(labs.InputError):
    """A search was stopped; `name` is that of the pattern's setting."""

    def __init__(self, name: str) -> None:
        super().__init__(f"{name}: its pattern takes more than {LIMIT_S:g} s on this text")
        self.name, self.code = name, "pattern_too_slow"


class Bounded:
    """An operator's pattern, whose searches end. name: of its setting, told in errors.

    Raises ConfigError for what the package regex cannot read.
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
                    log.warning("labs: %s: stopped after %.1f s of a text", self.name, used)
                    raise TooSlow(self.name) from None
                timeout *= 2  # its clock counts what other threads use, too


@functools.lru_cache(maxsize=1024)
def _of_rule(number: int, pattern: str) -> Bounded:
    return Bounded(f"router_rules[{number}]", pattern)


def check(router: labs.Router) -> None:
    """Raise ConfigError for a pattern of a rule that cannot be searched."""
    for number, rule in enumerate(router.rules):
        _of_rule(number, rule.pattern or "")


def route(router: labs.Router, text: str, count: Callable[[], int]) -> str | None:
    """Return the model of the first rule that a text, of `count()` tokens, fits; or None."""
    for number, rule in enumerate(router.rules):
        if _of_rule(number, rule.pattern or "").search(text) and (
            rule.over_prompt_tokens is None or count() > rule.over_prompt_tokens
        ):
            return rule.model
    return None


# ---------------------------------------------------------------- personal data


EMAIL = re.compile(r"[\w.%+-]{1,64}+@(?:[\w-]{1,63}\.){1,8}[^\W\d_][\w-]{1,62}")
PHONE = re.compile(  # not right after a digit and a mark, as parts of dates and versions are
    r"(?<!\w)(?<!\d[./-])(?:\+\d(?:[ ./()-]{0,2}\d){6,14}"  # +49 30 1234567
    r"|\(?(?=0(?:[ /()-]{0,2}\d){8})(?!\d\d?[/-]\d\d?[/-]\d\d)"  # (030) 123-4567, but no date
    r"0\d{1,4}\)?(?:[ /-]{0,2}\d{2,9}+){1,4}"
    r"|(?:1[ .-])?(?:\(\d{3}\) ?|\d{3}[ .-])\d{3}[ .-]\d{4})(?![./-]?\d)"  # 555-123-4567
)
CARD = re.compile(r"(?<!\d)(?<!\d\.)[2-6](?:[ -]?\d){12,18}(?!\d)")


def card_length(found: str) -> int:
    """Return the length of the most digit groups that end in a card's check digit, or 0."""
    for end in reversed([group.end() for group in re.finditer(r"\d+", found)]):
        digits = [int(each) for each in found[:end] if each.isdecimal()]
        doubled = [2 * each - 9 * (each > 4) for each in digits[-2::-2]]
        if len(digits) > 12 and (sum(doubled) + sum(digits[-1::-2])) % 10 == 0:
            return end
    return 0
