# SPDX-License-Identifier: Apache-2.0
"""The last ten minutes of each model: tokens in intervals of ten seconds, and first-token times.

    history = labs_history.History()
    history.add("small", tokens=1)               # as each piece of text goes to its client
    history.window("small").rates                # tokens/s of each whole interval, the oldest first

An interval is cleared when it is written next, so neither a thread nor a timer is needed and idle
time costs nothing. Each process has its own history. Needs msgspec, no other file of labs.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections import deque
from collections.abc import Callable

from msgspec import Struct

BIN_S, BINS = 10.0, 60
KEPT = 1000  # first-token times at most, the last ones


class FirstToken(Struct, frozen=True):
    """Seconds from a request to its first text: of how many answers, half of them, 95 % of them."""

    count: int
    median_s: float
    p95_s: float


class Window(Struct, frozen=True):
    """What one model did. rates: tokens/s of each whole interval, the oldest first.

    There are fewer rates than BINS while the process is younger. now: tokens/s over the current
    interval and the one before. tokens, answers: in all these intervals and the current one.
    """

    rates: tuple[float, ...]
    now: float
    tokens: int
    answers: int
    first_token: FirstToken | None
    interval_s: float = BIN_S


class Ring:
    """The intervals of one model, by their number since the history began."""

    def __init__(self) -> None:
        self.numbers, self.counts = [-1] * (BINS + 1), [(0, 0)] * (BINS + 1)  # tokens, answers
        self.firsts: deque[tuple[int, float]] = deque(maxlen=KEPT)

    def add(self, number: int, tokens: int, answers: int) -> None:
        before = self.at(number)
        place = number % (BINS + 1)
        self.numbers[place] = number
        self.counts[place] = before[0] + tokens, before[1] + answers

    def at(self, number: int) -> tuple[int, int]:
        """Return the tokens and answers of an interval that is not older than BINS."""
        place = number % (BINS + 1)
        return self.counts[place] if self.numbers[place] == number else (0, 0)


class History:
    """The rings of all models. Methods may be called from any thread. clock: never goes back."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._began = clock, clock()
        self._rings: dict[str, Ring] = {}
        self._lock = threading.Lock()

    @property
    def up_s(self) -> float:
        """Return for how many seconds the history has been kept."""
        return self._clock() - self._began

    def add(self, name: str, *, tokens: int = 0, answers: int = 0) -> None:
        """Count tokens and answers. Fewer than 0 tokens correct what was counted too much."""
        number = int(self.up_s // BIN_S)
        with self._lock:
            self._rings.setdefault(name, Ring()).add(number, tokens, answers)

    def first(self, name: str, seconds: float) -> None:
        """Remember the seconds from a request to its first text."""
        number = int(self.up_s // BIN_S)
        with self._lock:
            self._rings.setdefault(name, Ring()).firsts.append((number, seconds))

    def window(self, name: str) -> Window:
        """Return the last ten minutes of a model; one that is unknown did nothing."""
        up_s = self.up_s
        number = int(up_s // BIN_S)
        oldest = max(0, number - BINS)
        with self._lock:
            ring = self._rings.get(name) or Ring()
            counts = [ring.at(each) for each in range(oldest, number + 1)]
            firsts = sorted(seconds for each, seconds in ring.firsts if each >= oldest)
        tokens = [max(0, each) for each, _ in counts]
        last, seconds = tokens[-2:], up_s - max(0, number - 1) * BIN_S
        return Window(
            rates=tuple(each / BIN_S for each in tokens[:-1]),
            now=sum(last) / max(seconds, 1.0),  # a process has no rate in its first moments
            tokens=sum(tokens),
            answers=sum(answers for _, answers in counts),
            first_token=_first_token(firsts),
        )


def _first_token(ordered: list[float]) -> FirstToken | None:
    if not ordered:
        return None
    p95 = ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]
    return FirstToken(len(ordered), statistics.median(ordered), p95)
