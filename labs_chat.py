# SPDX-License-Identifier: Apache-2.0
"""Hold a conversation on a terminal.

    labs_chat.chat([], lambda messages: iter(["Hello!"]))     # messages -> pieces of the answer

The function that answers also writes its pieces. This file writes to standard error only. Needs
labs.py and click.
"""

from __future__ import annotations

import functools
import itertools
import os
import sys
from collections.abc import Callable, Iterator

import click
import msgspec

import labs

CHAT_HELP = '''\
A line is a message, and so is a text that is pasted. To type a message of several
lines, put """ before and after it. Ctrl-C stops an answer. When the conversation
is too long for the model's context, its oldest messages are left out.
  /system TEXT  set the system message (without TEXT: remove it)
  /reset        forget the conversation, but not the system message
  /save FILE    write the conversation as JSON, for --messages-file
  /help         show this text
  /exit         end the chat, as Ctrl-D does'''


class Thought(str):
    """A piece of reasoning, which is shown but is not a part of the answer's text."""

    __slots__ = ()


Messages = list[labs.Message]
Answer = Callable[[Messages], Iterator[str]]  # writes the answer and yields its pieces
tell = functools.partial(click.echo, err=True)
NO_PASTE = 'Each line of a pasted text is a message here: put """ before and after the text.'


def chat(history: Messages, answer: Answer) -> None:
    """Talk until Ctrl-D or /exit."""
    on_terminal = is_terminal()
    takes_paste = on_terminal and prepare_terminal()
    tell("Type a message. /help lists the commands, Ctrl-D ends the chat.")
    if on_terminal and not takes_paste:
        tell(NO_PASTE)
    while True:
        try:
            line = read_line("> ")
            if is_command(line):
                history = run_command(line, history)
            elif text := rest_of_message(line):
                history = take_turn(history, text, answer)
        except KeyboardInterrupt:  # at the prompt, Ctrl-C drops the line
            tell("")
        except EOFError:
            if on_terminal and not takes_paste:  # readline ends the line of the prompt
                tell("")
            break


def is_terminal() -> bool:
    """Return whether standard input and output are a terminal."""
    return sys.stdin.isatty() and sys.stdout.isatty()


def prepare_terminal() -> bool:
    """Let input() edit lines. Return whether a pasted text arrives as one message.

    readline asks the terminal to mark the start and end of a paste (bracketed paste); libedit
    cannot.
    """
    try:
        import readline
    except ImportError:  # absent on some platforms
        return False
    if "libedit" in (readline.__doc__ or ""):
        return False
    readline.parse_and_bind("set enable-bracketed-paste on")  # Python turns it off
    return True


def is_command(line: str) -> bool:
    """Return whether it is a command and not a text of several lines that begins with a slash."""
    return line.startswith("/") and ("\n" not in line.strip() or line.startswith("/system "))


def take_turn(history: Messages, text: str, answer: Answer) -> Messages:
    """Answer one message. Return the history with both, or unchanged if there is no answer."""
    messages = [*history, labs.Message(role="user", content=text)]
    parts: list[str] = []
    try:
        for piece in fitting(messages, answer):
            parts.append(piece)  # text that came before Ctrl-C is kept
    except KeyboardInterrupt:
        tell("\n[stopped]")
    except labs.PromptTooLong as exc:
        tell(f"Error: {exc} (--max-new-tokens is the room for the answer)")
    except labs.LabsError as exc:
        tell(f"Error: {exc}")
    text = "".join(part for part in parts if not isinstance(part, Thought))
    thoughts = "".join(part for part in parts if isinstance(part, Thought))
    said = labs.Message(role="assistant", content=text, reasoning_content=thoughts or None)
    return [*messages, said] if text else history


def fitting(messages: Messages, answer: Answer) -> Iterator[str]:
    """Answer `messages`, after removing its oldest turns until the rest fits the context."""
    before = len(messages)
    while True:
        try:
            pieces = answer(messages)
            first = list(itertools.islice(pieces, 1))  # a prompt that is too long fails here
            break
        except labs.PromptTooLong:
            if (shorter := without_oldest(messages)) is None:
                raise
            messages[:] = shorter
    if dropped := before - len(messages):
        tell(f"[the context is too short: the oldest {dropped} messages are left out]")
    yield from itertools.chain(first, pieces)


def without_oldest(messages: Messages) -> Messages | None:
    """Return the messages without the oldest turn, or None if only the last question is left.

    System messages always stay.
    """
    questions = [place for place, message in enumerate(messages) if message.role == "user"]
    rest = [place for place, message in enumerate(messages) if message.role != "system"]
    first = next((place for place in questions if place > rest[0]), None)
    if first is None:
        return None
    return [each for place, each in enumerate(messages) if place >= first or each.role == "system"]


def run_command(line: str, history: Messages) -> Messages:
    """Run a command and return the history after it. Raises EOFError for /exit."""
    name, _, argument = line.strip().partition(" ")
    system = [message for message in history if message.role == "system"]
    if name == "/exit":
        raise EOFError
    if name == "/reset":
        return system
    if name == "/system":
        rest = [message for message in history if message not in system]
        return [labs.Message(role="system", content=argument), *rest] if argument else rest
    if name == "/save" and argument:
        save(history, argument)
    elif name in ("/help", "/save"):
        tell(CHAT_HELP)
    else:
        tell(f"unknown command {name}; /help lists all. (To send it, type a space before it.)")
    return history


def save(history: Messages, name: str) -> None:
    """Write the conversation to a file, completely or not at all."""
    try:
        with open(f"{name}.part", "wb") as file:
            file.write(msgspec.json.format(msgspec.json.encode(history)) + b"\n")
        os.replace(f"{name}.part", name)
        tell(f"[{len(history)} messages written to {name}]")
    except OSError as exc:
        tell(f"Error: {exc.filename}: {exc.strerror}")


def read_line(prompt: str) -> str:
    """Return one line of input. Raises EOFError at its end."""
    if is_terminal():
        return input(prompt)  # readline adds editing and history
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.removesuffix("\n")


def rest_of_message(text: str) -> str:
    """Return the message that begins with this line; after triple quotes, read further lines."""
    if not text.startswith('"""'):
        return text.strip()
    lines = [text[3:]]
    while not lines[-1].rstrip().endswith('"""'):
        lines.append(read_line("... "))
    return "\n".join(lines).rstrip()[:-3].strip()
