# SPDX-License-Identifier: Apache-2.0
"""Parts that hang, crash and fail, for tests/test_doctor.py; other processes import this file."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import labs
import labs_machine


def _sleep(config: labs.Config) -> None:
    time.sleep(100)


def _crash(config: labs.Config) -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def _fail(config: labs.Config) -> None:
    raise ImportError("libcudart.so.99: cannot open shared object file")


def _exit(config: labs.Config) -> None:
    print("noise")
    raise SystemExit(3)


def _fine(config: labs.Config) -> str:
    return config.model_id


def work(connection: Any, config: labs.Config, parts: list[str]) -> None:
    """Run the parts of this file."""
    labs_machine.PARTS.update(PARTS)
    labs_machine._work(connection, config, parts)


PARTS = {
    "hangs": (_sleep, 2),
    "crashes": (_crash, 60),
    "fails": (_fail, 60),
    "exits": (_exit, 60),
    "fine": (_fine, 60),
}
