# SPDX-License-Identifier: Apache-2.0
"""A conversation on a terminal.

    labs_chat.chat([], lambda messages: iter(["Hello!"]))     # messages -> pieces of the answer

Whoever answers also writes the pieces; everything here goes to standard error. Needs labs.py and
click.
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
A line is a message, and so is what is pasted at once. One of many lines can also
stand between """ and """. Ctrl-C stops an answer. Where the conversation
outgrows the model's context, its oldest messages are left out.
  /system TEXT  set the system message (without TEXT: remove it)
  /reset        forget the conversation, keep the system message
  /save FILE    write the conversation as JSON, for --messages-file
  /help         show this
  /exit         end the chat, as Ctrl-D does'''

Messages = list[labs.Message]
Answer = Callable[[Messages], Iterator[str]]  # writes the answer and yields its pieces
tell = functools.partial(click.echo, err=True)
NO_PASTE = 'Each line of what you paste is a message here: put """ before and after it.'


def chat(history: Messages, answer: Answer) -> None:
    """Talk until Ctrl-D or /exit."""
    on_terminal = is_terminal()
    takes_paste = on_terminal and prepare_terminal()
    tell("Type a message. /help tells more, Ctrl-D ends the chat.")
    if on_terminal and not takes_paste:
        tell(NO_PASTE)
    while True:
        try:
            line = read_line("> ")
            if is_command(line):
                history = run_command(line, history)
            elif text := rest_of_message(line):
                history = take_turn(history, text, answer)
        except KeyboardInterrupt:  # at the prompt: give up the line
            tell("")
        except EOFError:
            if on_terminal and not takes_paste:  # else readline has ended the prompt's line
                tell("")
            break


def is_terminal() -> bool:
    return sys.stdin.isatty() and sys.stdout.isatty()


def prepare_terminal() -> bool:
    """Let input() edit lines; tell whether it takes what is pasted as one message.

    The terminal puts marks around a paste where it is asked to, which libedit does not do.
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
    """Tell whether it is a command, and no text of several lines that begins with a slash."""
    return line.startswith("/") and ("\n" not in line.strip() or line.startswith("/system "))


def take_turn(history: Messages, text: str, answer: Answer) -> Messages:
    """Answer one message; return the history with both, or as it was if there is no answer."""
    asked = [*history, labs.Message(role="user", content=text)]
    parts: list[str] = []
    try:
        for piece in fitting(asked, answer):
            parts.append(piece)  # what came before an interruption stays
    except KeyboardInterrupt:
        tell("\n[stopped]")
    except labs.PromptTooLong as exc:
        tell(f"Error: {exc} (--max-new-tokens is what an answer may have)")
    except labs.LabsError as exc:
        tell(f"Error: {exc}")
    said = labs.Message(role="assistant", content="".join(parts))
    return [*asked, said] if parts else history


def fitting(asked: Messages, answer: Answer) -> Iterator[str]:
    """Answer, with so many of the oldest turns taken out of `asked` that the rest fits."""
    before = len(asked)
    while True:
        try:
            pieces = answer(asked)
            first = list(itertools.islice(pieces, 1))  # what is too long is refused before it
            break
        except labs.PromptTooLong:
            if (shorter := without_oldest(asked)) is None:
                raise
            asked[:] = shorter
    if dropped := before - len(asked):
        tell(f"[the conversation outgrew the context: its oldest {dropped} messages are left out]")
    yield from itertools.chain(first, pieces)


def without_oldest(messages: Messages) -> Messages | None:
    """Leave out the oldest turn, or return None: system messages and the last question stay."""
    asked = [place for place, message in enumerate(messages) if message.role == "user"]
    rest = [place for place, message in enumerate(messages) if message.role != "system"]
    first = next((place for place in asked if place > rest[0]), None)
    if first is None:
        return None
    return [each for place, each in enumerate(messages) if place >= first or each.role == "system"]


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
    if is_terminal():
        return input(prompt)  # with readline's editing and recall
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.removesuffix("\n")


def rest_of_message(text: str) -> str:
    """Return the message that begins with this line, further lines read if quotes open it."""
    if not text.startswith('"""'):
        return text.strip()
    lines = [text[3:]]
    while not lines[-1].rstrip().endswith('"""'):
        lines.append(read_line("... "))
    return "\n".join(lines).rstrip()[:-3].strip()
