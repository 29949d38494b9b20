# SPDX-License-Identifier: Apache-2.0
"""Compute in a thread that ends, so that the thread that decodes keeps its speed.

    vectors = labs_apart.run(encode, texts)  # encode(texts)

Each thread that has computed with torch on a CPU keeps threads that help it (an OpenMP team), until
it ends. While a process has more of them than CPUs, all of them sleep between two products instead
of spinning for the next one (libgomp, GOMP_SPINCOUNT), and each product waits for them to wake up.
On two cores, a step of the default model then takes 19 ms instead of 13.

GOMP_SPINCOUNT also bounds the spinning, which is 3 ms by default: too long where other programs
want the same CPUs, as two of them may then wait for each other's turns. The commands set 10000,
about 0.1 ms, which is longer than what lies between two products. With 5000, a step beside two busy
programs took 28 ms instead of 70, but on some CPUs 30 instead of 23 without them.
No other file of labs is needed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


def run(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call work in a thread of its own; return its result or raise its error.

    An exception of the caller, for example KeyboardInterrupt, does not wait for the work.
    """
    found: list[T] = []
    errors: list[BaseException] = []

    def work_apart() -> None:
        try:
            found.append(work(*args, **kwargs))
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work_apart, name="labs-apart", daemon=True)
    thread.start()
    thread.join()
    if errors:
        raise errors.pop()
    return found.pop()
