# SPDX-License-Identifier: Apache-2.0
"""Put a text on the clipboard: by the desktop's program, or by asking the terminal (OSC 52).

    print(labs_clipboard.copy("Hello"))  # how: "copied by wl-copy"

In a session over SSH, the clipboard of the terminal is meant and not that of the other machine.
"""

from __future__ import annotations

import base64
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping

import labs

MAX_BYTES = 74_994  # of OSC 52: what fits the 100,000 bytes that xterm and others read
WAIT_S = 5.0
# The variable or platform with which each program works, and its command.
PROGRAMS = (
    ("WAYLAND_DISPLAY", "wl-copy"),
    ("DISPLAY", "xclip -selection clipboard"),
    ("DISPLAY", "xsel --clipboard --input"),
    ("darwin", "pbcopy"),
    ("win32", "clip"),
    ("WSL_DISTRO_NAME", "clip.exe"),
)


def copy(text: str) -> str:
    """Put the text on the clipboard and return how. Raises LabsError when there is none."""
    failed = []
    for command in programs(os.environ):
        if (why := _given(command, text)) is None:
            return f"copied by {command[0]}"
        failed.append(f"{command[0]}: {why}")
    if not sys.stdout.isatty() or os.environ.get("TERM") in (None, "dumb", "linux"):
        reasons = "; ".join(failed) or "install wl-clipboard, xclip or xsel"
        raise labs.LabsError(f"there is no clipboard here ({reasons})")
    data = text.encode(errors="replace")
    if len(data) > MAX_BYTES:
        sizes = f"{len(data)} bytes; it takes at most {MAX_BYTES}"
        raise labs.LabsError(f"the answer is too long for the terminal's clipboard: {sizes}")
    sys.stdout.write(f"\x1b]52;c;{base64.b64encode(data).decode()}\x07")
    sys.stdout.flush()
    return "sent to the terminal's clipboard by OSC 52, which some terminals ignore or ask about"


def programs(environment: Mapping[str, str]) -> Iterator[list[str]]:
    """Yield the commands that can reach a clipboard on this machine, the best first."""
    if environment.get("SSH_CONNECTION") or environment.get("SSH_TTY"):
        return
    for needs, command in PROGRAMS:
        words = command.split()
        if (environment.get(needs) or needs == sys.platform) and shutil.which(words[0]):
            yield words


def _given(command: list[str], text: str) -> str | None:
    """Give the text to a command. Return why that failed, None if it did not."""
    quiet = subprocess.DEVNULL  # not a pipe, which xclip would keep open
    encoding = "utf-16" if command[0].startswith("clip") else "utf-8"
    data = text.encode(encoding, errors="replace")
    try:
        done = subprocess.run(
            command, input=data, timeout=WAIT_S, check=False, stdout=quiet, stderr=quiet
        )
    except subprocess.TimeoutExpired:
        return f"no answer after {WAIT_S:g} seconds"
    except OSError as error:
        return error.strerror or str(error)
    return f"exit code {done.returncode}" if done.returncode else None
