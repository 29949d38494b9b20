# SPDX-License-Identifier: Apache-2.0
"""Start the installed commands, so that Ctrl-C ends them quietly while Python still imports.

Needs labs_cli.py with what that needs.
"""

from __future__ import annotations

import importlib
import sys


def gen() -> None:
    """Run labs-gen."""
    _run("main")


def api() -> None:
    """Run labs-api."""
    _run("main_api")


def _run(name: str) -> None:
    try:
        getattr(importlib.import_module("labs_cli"), name)()
    except KeyboardInterrupt:
        sys.exit(130)
