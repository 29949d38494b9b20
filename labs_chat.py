# SPDX-License-Identifier: Apache-2.0
"""A conversation on a terminal.

    labs_chat.chat([], lambda messages: iter(["Hello!"]))     # messages -> pieces of the answer

Whoever answers also writes the pieces; everything here goes to standard error. Needs labs.py and
click.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Callable, Iterator

import click
import msgspec

import labs

CHAT_HELP = '''\
A line is a message; one of many lines stands between """ and """. Ctrl-C stops
an answer.
  /system TEXT  set the system message (without TEXT: remove it)
  /reset        forget the conversation, keep the system message
  /save FILE    write the conversation as JSON, for --messages-file
  /help         show this
  /exit         end the chat, as Ctrl-D does'''

Messages = list[labs.Message]
Answer = Callable[[Messages], Iterator[str]]  # writes the answer and yields its pieces
tell = functools.partial(click.echo, err=True)


def chat(history: Messages, answer: Answer) -> None:
    """Talk until Ctrl-D or /exit."""
    with contextlib.suppress(ImportError):  # absent on some platforms
        import readline  # noqa: F401  (input() edits lines once it is imported)
    tell("Type a message. /help tells more, Ctrl-D ends the chat.")
    while True:
        try:
            line = read_line("> ")
            if line.startswith("/"):
                history = run_command(line, history)
            elif text := rest_of_message(line):
                history = take_turn(history, text, answer)
        except KeyboardInterrupt:  # at the prompt: give up the line
            tell("")
        except EOFError:
            break


def take_turn(history: Messages, text: str, answer: Answer) -> Messages:
    """Answer one message; return the history with both, or as it was if there is no answer."""
    asked = [*history, labs.Message(role="user", content=text)]
    parts: list[str] = []
    try:
        for piece in answer(asked):
            parts.append(piece)  # what came before an interruption stays
    except KeyboardInterrupt:
        tell("\n[stopped]")
    except labs.LabsError as exc:
        tell(f"Error: {exc}")
    said = labs.Message(role="assistant", content="".join(parts))
    return [*asked, said] if parts else history


def run_command(line: str, history: Messages) -> Messages:
    """Run a line that begins with a slash and return the history after it."""
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
        tell(f"There is no {name}; /help lists what there is. (A space before it sends it.)")
    return history


def save(history: Messages, name: str) -> None:
    """Write the conversation to a file, whole or not at all."""
    try:
        with open(f"{name}.part", "wb") as file:
            file.write(msgspec.json.format(msgspec.json.encode(history)) + b"\n")
        os.replace(f"{name}.part", name)
        tell(f"[{len(history)} messages written to {name}]")
    except OSError as exc:
        tell(f"Error: {exc.filename}: {exc.strerror}")


def read_line(prompt: str) -> str:
    """Return one line of the person; raise EOFError at the end."""
    if sys.stdin.isatty() and sys.stdout.isatty():
        return input(prompt)  # with readline's editing and recall
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.removesuffix("\n")


def rest_of_message(text: str) -> str:
    """Return the message that begins with this line, further lines read if quotes open it."""
    if not text.startswith('"""'):
        return text.strip()
    text = text[3:]
    while not text.rstrip().endswith('"""'):
        text += "\n" + read_line("... ")
    return text.rstrip()[:-3].strip()
