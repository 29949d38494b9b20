# SPDX-License-Identifier: Apache-2.0
"""labs_progress and labs_bar: bars on real terminals, and nothing elsewhere."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from typing import Any

import pytest
from kit import ONE_THREAD, ROOT

import labs_bar
import labs_progress

BEGIN = f"""
import sys, time; sys.path.insert(0, {str(ROOT)!r})
import labs_bar, labs_progress
labs_bar.DELAY_S = 0.0
labs_progress.show()
"""
READ = "for _ in labs_progress.over(range(20), 'Reading', 'files'): time.sleep(0.02)\n"


def on_terminal(code: str, columns: int = 80, interrupt: str = "", **names: str) -> str:
    """Run a program on a terminal and return all that it writes there.

    interrupt: the text after which Ctrl-C is pressed.
    """
    ours, its = pty.openpty()
    resize(its, columns)
    env = {**ONE_THREAD, "TERM": "xterm", **names}
    env.pop("CI", None) if "CI" not in names else None
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=its, stdout=its, stderr=its, env=env, preexec_fn=lead
    )
    os.close(its)
    text, end = "", time.monotonic() + 100
    while time.monotonic() < end:
        try:
            data = os.read(ours, 65_536).decode(errors="replace")
        except OSError:  # all programs on the terminal have ended
            break
        text += data
        if interrupt and interrupt in text:
            interrupt = ""
            os.write(ours, b"\x03")
    process.wait(100)
    os.close(ours)
    return text


def lead() -> None:
    """Make the terminal that of this process, so that Ctrl-C reaches it."""
    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def resize(terminal: int, columns: int) -> None:
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))


def screen(text: str) -> str:
    """Return what is left to see on a terminal."""
    lines, column = [""], 0
    for part in re.findall(r"\x1b\[K|.|\n", text, re.DOTALL):
        if part == labs_bar.ERASE:
            lines[-1] = lines[-1][:column]
        elif part == "\r":
            column = 0
        elif part == "\n":
            lines.append("")
        else:
            lines[-1] = lines[-1][:column].ljust(column) + part + lines[-1][column + 1 :]
            column += 1
    return "\n".join(line.rstrip() for line in lines).strip()


def drawn(text: str) -> list[str]:
    parts = text.replace("\n", "\r").split("\r")
    return [each for each in parts if each.strip() and each != labs_bar.ERASE]


@pytest.mark.parametrize(("columns", "shows"), [(80, "% ███"), (20, "% Reading")])
def test_a_bar_fits_the_terminal_and_is_gone_at_the_end(columns, shows):
    text = on_terminal(BEGIN + READ, columns)
    assert any(shows in each for each in drawn(text))
    assert len(drawn(text)) > 2
    assert {len(each) < columns for each in drawn(text)} == {True}
    assert screen(text) == ""


def test_a_bar_follows_a_terminal_that_is_resized():
    code = "import fcntl, struct, termios\ndef narrow():\n"
    code += " fcntl.ioctl(2, termios.TIOCSWINSZ, struct.pack('HHHH', 24, 30, 0, 0))\n"
    code += READ.replace(": time", ": _ == 9 and narrow(); time")
    wide, narrow = (on_terminal(BEGIN + each) for each in (READ, code))
    assert len(drawn(wide)[-2]) == 77
    assert len(drawn(narrow)[0]) == 77
    assert len(drawn(narrow)[-2]) < 30


@pytest.mark.parametrize("names", [{"TERM": "dumb"}, {"CI": "true"}])
def test_a_plain_terminal_gets_one_line_of_a_library_and_none_of_a_command(names):
    code = "with labs_bar.Bar(range(9), desc='Loading weights') as b:\n for _ in b: pass\n"
    assert on_terminal(BEGIN + READ + code, **names) == "Loading the weights took 0.0 s\r\n"


@pytest.mark.parametrize("end", ["", " if _ == 3: break", " if _ == 3: raise SystemExit(1)"])
def test_a_work_that_is_given_up_leaves_no_line(end):
    code = "for _ in labs_bar.Bar(range(9), desc='Loading weights'):\n time.sleep(0.05)\n"
    text = on_terminal(BEGIN + code + end)
    assert "Loading the weights" in text
    assert screen(text) == ("" if end else "Loading the weights took 0.5 s")


@pytest.mark.parametrize("asked", [True, False])
def test_a_program_that_does_not_ask_and_a_pipe_get_nothing(asked):
    code = BEGIN + READ + "labs_bar.Bar(range(9), desc='Loading weights').close()"
    if asked:
        pipes: Any = {"capture_output": True, "env": ONE_THREAD, "timeout": 100}
        done = subprocess.run([sys.executable, "-c", code], check=True, **pipes)
        assert (done.stdout, done.stderr) == (b"", b"")
    else:
        code = code.replace("labs_progress.show()", "").replace("labs_bar.Bar(", "labs_bar.Hidden(")
        assert on_terminal(code) == ""


LOAD = """
import labs, threading
spec = labs.ModelSpec(model_name={place!r})
"""


@pytest.mark.real
def test_a_load_on_a_terminal_has_bars_in_this_style_only(tiny_folder):
    load = "labs.load_model(spec, cached=False)\n"
    code = BEGIN.replace("labs_progress.show()", "") + LOAD.format(place=str(tiny_folder)) + load
    text = on_terminal(f"{code}print('unasked')\nlabs_progress.show()\n{load}")
    assert screen(text) == "unasked\nLoading the weights took 0.0 s"
    assert "it/s" not in text


@pytest.mark.real
def test_ctrl_c_during_a_load_leaves_a_clean_line(tiny_folder):
    slow = "import transformers, threading\nfrom transformers.utils import logging\n"
    slow += "def wait(*_, **__):\n for _ in logging.tqdm(range(500), desc='Loading weights'):\n"
    slow += "  time.sleep(0.02)\ntransformers.AutoModelForCausalLM.from_pretrained = wait\n"
    code = BEGIN + LOAD.format(place=str(tiny_folder)) + slow
    code += "try:\n labs.load_model(spec)\nexcept KeyboardInterrupt:\n time.sleep(0.3)\n"
    code += " print('ended', flush=True)\n import os; os._exit(0)\n"
    text = on_terminal(code, interrupt="%")
    assert "Loading the weights" in text
    assert screen(text) == "ended"


def test_a_library_that_draws_at_once_waits_as_well():
    code = "labs_bar.DELAY_S = 0.5\nbar = labs_bar.Bar(total=0, desc='Reconstructing', unit='B')\n"
    code += "bar.total = 100; bar.refresh(); bar.update(50); bar.refresh(); bar.close_all()"
    assert on_terminal(BEGIN + code) == ""


def test_words_of_libraries_become_ours_and_cannot_steer_the_terminal():
    assert labs_bar.words_of("Loading weights", "it") == ("Loading the weights", "tensors")
    assert labs_bar.words_of("a\x1b[2J.bin", "B") == ("Downloading a?[2J.bin", "B")


def test_a_bar_of_libraries_is_theirs_again_afterwards(monkeypatch):
    import huggingface_hub.utils.tqdm  # noqa: F401
    from transformers.utils import logging

    monkeypatch.setattr(labs_progress, "_asked", [True])
    module = sys.modules["huggingface_hub.utils.tqdm"]
    before = module.tqdm  # type: ignore[attr-defined]
    with labs_progress.of_libraries():
        assert module.tqdm is labs_bar.Bar  # type: ignore[attr-defined]
        assert type(logging.tqdm(range(3), desc="Loading weights")) is labs_bar.Bar
    assert module.tqdm is before  # type: ignore[attr-defined]
    monkeypatch.setattr(logging, "_tqdm_active", False)  # as HF_HUB_DISABLE_PROGRESS_BARS=1 does
    with labs_progress.of_libraries():
        assert module.tqdm is before  # type: ignore[attr-defined]
    assert logging.set_tqdm_hook(None) is None
