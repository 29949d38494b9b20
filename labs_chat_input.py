# SPDX-License-Identifier: Apache-2.0
"""What a person types in a chat: lines that can be edited, the history of earlier ones, completion.

    history = labs_chat_input.History(labs_chat_input.history_file())
    keyboard = labs_chat_input.Keyboard(history, lambda before, word: ["/help", "/exit"])
    text = keyboard.message("> ")  # raises EOFError at the end

Editing is readline's: it takes a paste of several lines as one text, searches the history with
Ctrl-R, and loads in 1 ms. (prompt_toolkit takes 195 ms.) Without a terminal, lines of standard
input are read and nothing else happens. Needs labs.py and labs_terminal.py.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec

import labs
import labs_terminal

Complete = Callable[[str, str], list[str]]  # (the line before a word, the word) -> what it may be
LINES, BYTES = 1000, 2**20  # of the history that is read, the newest
LONGEST = 2**14  # bytes; a longer message is not kept
WAIT_S = 0.5  # for another chat that writes the file
VARIABLE = "LABS_CHAT_HISTORY"
NO_PASTE = 'Each line of a pasted text is a message here: put """ before and after the text.'


# ---------------------------------------------------------------- history


def history_file() -> Path | None:
    """Return the file of earlier messages, or None if the user wants none or has no home."""
    given = os.environ.get(VARIABLE)
    if given:
        return None if given == "off" else Path(given).expanduser()
    folder = os.environ.get("XDG_STATE_HOME", "")
    try:
        state = Path(folder) if os.path.isabs(folder) else Path.home() / ".local" / "state"
    except RuntimeError:  # no home
        return None
    return state / "labs" / "chat_history"


class History:
    """Messages of this chat and of earlier ones, one JSON text per line of a file.

    Several chats may use the file at once. One that cannot be used is reported once, and the chat
    goes on without it.
    """

    def __init__(self, path: Path | None) -> None:
        self._path, self._last = path, ""

    def read(self) -> list[str]:
        """Return the newest messages, the oldest of them first."""
        lines: list[bytes] = self._reporting(_read) or []
        found = [text for line in lines if (text := _text_of(line))]
        self._last = found[-1] if found else ""
        return found

    def add(self, text: str) -> bool:
        """Keep a message unless it begins with a space or repeats the last. Return whether."""
        if not text.strip() or text[0].isspace() or text == self._last or "\0" in text:
            return False
        try:
            line = msgspec.json.encode(text) + b"\n"
        except UnicodeEncodeError:  # bytes that are not UTF-8 came from the terminal
            return False
        self._last = text
        if len(line) <= LONGEST:
            self._reporting(_append, line)
        return True

    def _reporting(self, work: Callable[..., Any], *values: Any) -> Any:
        try:
            return work(self._path, *values) if self._path else None
        except OSError as error:
            why = error.strerror or error
            labs_terminal.tell(f"[messages are not kept for later chats: {self._path}: {why}]")
            self._path = None


def _text_of(line: bytes) -> str | None:
    with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError):
        text = msgspec.json.decode(line, type=str)
        return None if "\0" in text else text  # which readline does not take
    return None


def _read(path: Path) -> list[bytes]:
    try:
        with _opened(path, os.O_RDONLY) as file:
            return _newest(file)
    except FileNotFoundError:  # of the first chat
        return []


def _append(path: Path, line: bytes) -> None:
    """Write a line at the end of the file. A file that became long keeps its newest lines."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _opened(path, os.O_RDWR | os.O_CREAT | os.O_APPEND) as file:
        _write(file, line)
        if os.fstat(file).st_size > 2 * BYTES:
            lines = _newest(file)
            os.ftruncate(file, 0)
            _write(file, b"".join(each + b"\n" for each in lines))


@contextlib.contextmanager
def _opened(path: Path, how: int) -> Iterator[int]:
    """Open the file for this chat alone. Raises OSError when that is no history."""
    import fcntl  # absent on Windows, as readline is

    file = os.open(path, how | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)  # a named pipe would block
    try:
        if not stat.S_ISREG(os.fstat(file).st_mode):
            raise OSError(errno.EINVAL, "this is no file")
        if os.pread(file, 1, 0) not in (b"", b'"'):
            raise OSError(errno.EINVAL, "this file holds something else")
        _lock(fcntl, file)
        with contextlib.suppress(OSError):  # another user's file
            os.fchmod(file, 0o600)
        yield file
    finally:
        os.close(file)  # which unlocks it


def _lock(fcntl: Any, file: int) -> None:
    until = time.monotonic() + WAIT_S
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > until:
                raise
        time.sleep(0.01)


def _newest(file: int) -> list[bytes]:
    """Return the newest lines of a file within LINES and BYTES."""
    begin = max(0, os.fstat(file).st_size - BYTES)
    data = os.pread(file, BYTES, begin)
    if begin:
        data = data.partition(b"\n")[2]  # the first line is not whole
    return data.splitlines()[-LINES:]


def _write(file: int, data: bytes) -> None:
    while data:
        data = data[os.write(file, data) :]


# ---------------------------------------------------------------- the keyboard


class Keyboard:
    """Reads messages from a terminal or, without one, lines of standard input."""

    def __init__(self, history: History, complete: Complete) -> None:
        self.person = labs_terminal.is_for_person()
        self._history, self._interrupts = history, 0
        self._readline = _readline() if self.person else None
        self.edits = self._readline is not None
        self.pastes = self._readline is not None and _begin(self._readline, complete)
        if self._readline is not None:
            for text in history.read():
                self._readline.add_history(text)

    def message(self, prompt: str, fill: str = "") -> str:
        """Return a message. fill: what stands at the prompt at first, if it `edits`.

        After three quotes, lines belong to it up to the next three; it begins with a space then,
        so that it is no command. Raises EOFError at the end and when Ctrl-C is typed twice at an
        empty prompt, KeyboardInterrupt when it is typed once.
        """
        text = self.line(prompt, fill)
        if not text.startswith('"""'):
            self._remember(text)
            return text
        lines = [text[3:]]
        while not lines[-1].rstrip().endswith('"""'):
            try:
                lines.append(self.line("... "))
            except EOFError as error:
                raise labs.InputError('the message has no """ at its end') from error
        text = "\n".join(lines).rstrip()[:-3].strip()
        self._remember(text)
        return f" {text}"

    def line(self, prompt: str, fill: str = "") -> str:
        """Return a line, or several that are pasted, without the last line end."""
        if not self.person:
            if not (line := sys.stdin.readline()):
                raise EOFError
            return line.removesuffix("\n")
        if self._readline is not None:
            self._readline.set_startup_hook(lambda: self._readline.insert_text(fill))
        try:
            line = input(prompt)
        except EOFError:
            if not self.pastes:  # readline ends the line of the prompt
                labs_terminal.tell()
            raise
        except KeyboardInterrupt:
            self._interrupted()
            raise
        self._interrupts = 0
        return line

    def _remember(self, text: str) -> None:
        if self._readline is not None and self._history.add(text):
            self._readline.add_history(text)

    def _interrupted(self) -> None:
        """Raise EOFError if it is the second time, with nothing typed in between."""
        labs_terminal.tell()
        typed = self._readline.get_line_buffer() if self._readline is not None else ""
        self._interrupts = 0 if typed else self._interrupts + 1
        if self._interrupts == 2:
            raise EOFError
        if self._interrupts:
            labs_terminal.hint("[Ctrl-C again or Ctrl-D ends the chat]")


def _readline() -> ModuleType | None:
    try:
        import readline
    except ImportError:  # absent on some platforms
        return None
    return readline


def _begin(readline: ModuleType, complete: Complete) -> bool:
    """Set up editing. Return whether a pasted text arrives as one message.

    readline asks the terminal to mark the start and end of a paste (bracketed paste); libedit
    cannot.
    """
    readline.set_auto_history(False)  # see History.add
    readline.set_completer_delims(" \t\n")
    readline.set_completer(completer(readline, complete))
    if "libedit" in (readline.__doc__ or ""):
        readline.parse_and_bind("bind ^I rl_complete")
        return False
    readline.parse_and_bind("tab: complete")
    marks = os.environ.get("TERM") not in (None, "dumb")
    how = "on" if marks else "off"  # Python turns it off, and perhaps ~/.inputrc on
    readline.parse_and_bind(f"set enable-bracketed-paste {how}")
    return marks


def completer(readline: Any, complete: Complete) -> Callable[[str, int], str | None]:
    """Return a function that names the completions of a word one by one, as readline asks."""
    found: list[str] = []

    def each(word: str, number: int) -> str | None:
        if number == 0:
            found[:] = complete(readline.get_line_buffer()[: readline.get_begidx()], word)
        return found[number] if number < len(found) else None

    return each
