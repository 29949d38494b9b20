# SPDX-License-Identifier: Apache-2.0
"""Read the API keys of labs-api, and keep only their digests.

labs.load_config calls `digests` if keys are given. Needs labs_settings.py.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from labs_settings import ConfigError


def digests(text: str, file: str | None) -> tuple[str, ...]:
    """Return the sha256 of each API key. text: keys with commas between. file: one key a line."""
    keys = [key.strip() for key in text.split(",")]
    if text and not any(keys):
        raise ConfigError("LABS_API_KEYS holds no key")
    if file is not None:
        lines = _lines(file)
        keys += [line.strip() for line in lines if not line.lstrip().startswith("#")]
        if not any(keys):
            raise ConfigError(f"server_api_keys_file = {file}: holds no key")
    return tuple(hashlib.sha256(key.encode()).hexdigest() for key in keys if key)


def _lines(file: str) -> list[str]:
    try:
        return Path(file).expanduser().read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        why = f"{error.strerror}: {error.filename}" if error.filename else str(error)
        raise ConfigError(f"server_api_keys_file = {file}: {why}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"server_api_keys_file = {file}: {error}") from error
