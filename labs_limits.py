# SPDX-License-Identifier: Apache-2.0
"""Logits processors that need no grammar: no call may begin, and reasoning has to end.

    processors = [labs_limits.Ban(token), labs_limits.Budget(plan, 100)]

Needs labs.py.
"""

from __future__ import annotations

from typing import Any

from msgspec import Struct

import labs

RECENT = 64  # tokens that may have been guessed; at most 32 are at once


class Ban(Struct, frozen=True):
    """A logits processor without which a token may come."""

    token: int

    def __call__(self, ids: list[int], logits: Any) -> Any:
        logits[self.token] = float("-inf")
        return logits


class Budget:
    """A logits processor that ends reasoning after so many tokens, by writing its end."""

    def __init__(self, plan: Any, tokens: int) -> None:
        """Take a labs_tools.Plan, for its model, form, generation and splitter."""
        self._plan, self._tokens, self._start = plan, tokens, -1
        with plan.model.lock:
            closes = plan.form.reasoning[1]
            self._end = plan.model.tokenizer.encode(closes, add_special_tokens=False)
        self._restart()

    def _restart(self) -> None:
        self._read, self._recent = 0, list[int]()  # how many tokens, and the last of them
        self._splitter = self._plan.splitter()
        self._text = labs.PartialText(skip_special_tokens=self._plan.generation.skip_special_tokens)
        self._spent = 0  # tokens of reasoning

    def __call__(self, ids: list[int], logits: Any) -> Any:
        """Return logits that allow only the next token of the end, once the budget is spent."""
        self._start = len(ids) if self._start < 0 else self._start
        seen = self._start + self._read
        if ids[seen - len(self._recent) : seen] != self._recent:  # guessed tokens were wrong
            self._restart()
        for token in ids[self._start + self._read :]:
            self._take(token)
        self._recent = ids[max(self._start, len(ids) - RECENT) :]
        end, token = self._end, self._end[0]
        if not self._splitter.thinking or self._spent < self._tokens:
            return logits
        for written in range(min(len(end) - 1, self._read), 0, -1):
            if ids[-written:] == end[:written]:
                token = end[written]
                break
        if logits[token] == float("-inf"):  # by the grammar, inside a character
            return logits
        only = logits.new_full(logits.shape, float("-inf"))
        only[token] = logits[token]
        return only

    def _take(self, token: int) -> None:
        model = self._plan.model
        self._read += 1
        before = self._splitter.thinking
        with model.lock:
            piece = labs.decode_next(model.tokenizer, self._text, token)
        self._splitter.feed(piece)
        self._spent += before and self._splitter.thinking
