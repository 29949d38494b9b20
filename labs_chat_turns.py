# SPDX-License-Identifier: Apache-2.0
"""Hold a conversation: on a terminal, or one answer for each line of a pipe.

    talk = labs_chat_turns.chat(labs_talk.Talk(config=config, model=model), host, keyboard)

host.answer writes the answers; what this file writes goes to standard error. Needs labs.py,
labs_chat_commands.py, labs_chat_input.py, labs_commands.py, labs_talk.py, labs_terminal.py and
click.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import click
from msgspec.structs import replace

import labs
import labs_chat_commands
import labs_chat_input
import labs_commands
from labs_chat_input import Keyboard
from labs_talk import Host, Talk
from labs_terminal import hint, safe, tell

Turn = list[labs.Message]
WORDS = {"exit": "/exit", "quit": "/exit", "help": "/help"}  # that are sent, perhaps by mistake


def chat(talk: Talk, host: Host, keyboard: Keyboard) -> Talk:
    """Talk until Ctrl-D or /exit, and return the conversation."""
    hint(f"{talk.config.model_id} answers. /help lists the commands, Ctrl-D ends the chat.")
    if keyboard.person and not keyboard.pastes:
        tell(labs_chat_input.NO_PASTE)
    while True:
        try:
            talk = step(talk, host, keyboard)
        except KeyboardInterrupt:  # at the prompt, Ctrl-C drops the line
            talk = replace(talk, base=None, fill="", say=None)
        except EOFError:
            return talk


def step(talk: Talk, host: Host, keyboard: Keyboard) -> Talk:
    """Read a message or a command and return the conversation after it."""
    with reporting() as failed:
        line = keyboard.message("> ", talk.fill)
        talk = replace(talk, fill="")
        if is_command(line):
            talk = labs_chat_commands.run(line, replace(talk, base=None), host)
            if talk.fill and not keyboard.edits:
                raise labs.InputError("a prompt cannot be edited here: set VISUAL or EDITOR")
            if talk.say is None:
                return talk
            line = talk.say
            talk = replace(talk, say=None)
        elif line.strip():
            talk = replace(talk, attempt=0)
        else:
            return talk
        talk = take_turn(talk, line.strip(), host, keyboard)
        if (command := WORDS.get(line.strip().lower())) is not None:
            hint(f"[that was a message; the command is {command}]")
        return talk
    return replace(talk, base=None, say=None, fill="", failed=bool(failed))


def is_command(line: str) -> bool:
    """Return whether it is a command and not a text of several lines that begins with a slash."""
    return line.startswith("/") and ("\n" not in line.strip() or line.startswith("/system "))


@contextlib.contextmanager
def reporting() -> Iterator[list[str]]:
    """Report an error in a sentence and go on after the block; what was reported is in the list."""
    failed: list[str] = []
    try:
        yield failed
    except (EOFError, click.ClickException, click.exceptions.Exit):
        raise  # the input has ended, or nobody reads the output
    except Exception as error:
        if os.environ.get("LABS_DEBUG") == "1":
            raise
        failed.append(labs_commands.sentence(error))
        tell(f"Error: {failed[0]}")


# ---------------------------------------------------------------- one message


def take_turn(talk: Talk, text: str, host: Host, keyboard: Keyboard) -> Talk:
    """Answer a message. Return the conversation with both, or without if there is no answer.

    Calls of tools are answered by the person, and then the model goes on.
    """
    before = talk.messages if talk.base is None else talk.base
    messages = [*before, labs.Message(role="user", content=text)]
    talk = replace(talk, base=None)
    lost = replace(talk, unanswered=(text, before))
    while True:
        parts, failed = ask(talk, messages, host)
        talk, lost = (replace(each, failed=each.failed or failed) for each in (talk, lost))
        if (said := message_of(parts)) is None:
            hint("[there is no answer; /retry sends the message again]")
            return lost
        done = next((each for each in parts if isinstance(each, labs.Done)), talk.done)
        talk = replace(talk, done=done)
        if (results := results_of(said, keyboard)) is None:
            tell("[without a result, the call is left out]")
            if not said.content:
                return lost
            said, results = replace(said, tool_calls=None), []
        messages += [said, *results]
        if not results:
            return replace(talk, messages=tuple(messages), unanswered=None)


def ask(talk: Talk, messages: Turn, host: Host) -> tuple[list[Any], bool]:
    """Let the model answer. Return the parts that came before an error or Ctrl-C, and if it failed.

    Messages that do not fit the context are removed from the list.
    """
    parts: list[Any] = []
    with stoppable(), reporting() as failed:
        try:
            for part in fitting(talk, messages, host):
                parts.append(part)
        except KeyboardInterrupt:
            tell("\n[stopped]")
        except labs.PromptTooLong as error:
            room = "/settings max_new_tokens=N changes the room for the answer"
            raise labs.InputError(f"{error} ({room})") from error
    return parts, bool(failed)


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Let only the first Ctrl-C have an effect, so that a second one does not lose the answer."""

    def stop(number: int, frame: Any) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    heeded = before is signal.default_int_handler
    if threading.current_thread() is not threading.main_thread() or not heeded:
        yield
        return
    signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def message_of(parts: list[Any]) -> labs.Message | None:
    """Return what the parts of an answer say, None if it is nothing. Calls are in whole answers."""
    texts: dict[str, list[str]] = {"delta": [], "reasoning": [], "arguments": []}
    begun = []
    for part in parts:
        tag = str(part.__struct_config__.tag)
        if tag in texts:
            texts[tag].append(part.text)
        elif tag == "call":
            begun.append(part)
    whole = bool(parts) and isinstance(parts[-1], labs.Done)
    calls = tuple(
        labs.ToolCall(id=each.id, function=labs.FunctionCall(name=each.name, arguments=arguments))
        for each, arguments in zip(begun, texts["arguments"], strict=False)
        if whole
    )
    text, thoughts = "".join(texts["delta"]), "".join(texts["reasoning"])
    if not (text or calls):
        return None
    return labs.Message(
        role="assistant", content=text, reasoning_content=thoughts or None, tool_calls=calls or None
    )


def results_of(said: labs.Message, keyboard: Keyboard) -> Turn | None:
    """Let the person type the result of each call; None for an empty one."""
    found = []
    for call in said.tool_calls or ():
        try:
            line = keyboard.line(f"result of {safe(call.function.name)}> ")
        except (EOFError, KeyboardInterrupt):
            return None
        if not line.strip():
            return None
        found.append(labs.Message(role="tool", content=line, tool_call_id=call.id))
    return found


def fitting(talk: Talk, messages: Turn, host: Host) -> Iterator[Any]:
    """Answer `messages`, after removing its oldest turns until the rest fits the context."""
    before = len(messages)
    while True:
        try:
            parts = host.answer(talk, messages)
            first = list(itertools.islice(parts, 1))  # a prompt that is too long fails here
            break
        except labs.PromptTooLong:
            if (shorter := without_oldest(messages)) is None:
                raise
            messages[:] = shorter
    if dropped := before - len(messages):
        tell(f"[the context is too short: the oldest {dropped} messages are left out]")
    yield from itertools.chain(first, parts)


def without_oldest(messages: Turn) -> Turn | None:
    """Return the messages without the oldest turn, or None if only the last question is left.

    System messages always stay.
    """
    questions = [place for place, message in enumerate(messages) if message.role == "user"]
    rest = [place for place, message in enumerate(messages) if message.role != "system"]
    first = next((place for place in questions if place > rest[0]), None)
    if first is None:
        return None
    return [each for place, each in enumerate(messages) if place >= first or each.role == "system"]
