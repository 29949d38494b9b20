# SPDX-License-Identifier: Apache-2.0
"""The commands of a chat, each a function from a conversation to the next.

    talk = labs_chat_commands.run("/undo", talk, host)  # raises EOFError for /exit

COMMANDS is the only list of them: help, completion and hints for wrong names are made from it.
Needs labs.py, labs_chat_settings.py, labs_clipboard.py, labs_dialogue.py, labs_files.py,
labs_talk.py, labs_terminal.py and click.
"""

from __future__ import annotations

import contextlib
import os
import stat
import textwrap
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import click
import msgspec
from msgspec.structs import replace

import labs
import labs_clipboard
import labs_dialogue
import labs_files
from labs_chat_settings import change_settings, generation_settings, show_stats, switch_model
from labs_talk import Host, Messages, Talk, instead_of, nearest
from labs_terminal import hint, is_for_person, tell

MAX_FILE_BYTES = 2**26  # of /load and /tools
MAX_SHOWN = 200  # names that Tab lists
BEGIN = '''\
A line is a message, and so is a text that is pasted. To type a message of
several lines, put """ before and after it. A message that begins with / gets a
space before it. Ctrl-C stops an answer; Ctrl-R searches earlier messages; Tab
completes commands, names and files. When the conversation is too long for the
model's context, its oldest messages are left out.'''


class Command(NamedTuple):
    """A command. takes: what comes after its name, in capitals; optional in brackets."""

    run: Callable[[Talk, str, Host], Talk]
    takes: str
    help: str


def run(line: str, talk: Talk, host: Host) -> Talk:
    """Run a command and return the conversation after it. Raises EOFError for /exit."""
    name, argument = [*line.strip().split(maxsplit=1), ""][:2]
    command = COMMANDS.get(name)
    if command is None:
        like = instead_of(OTHER_WORDS.get(name) or like_command(name))
        text = f"unknown command {name}{like}; /help lists all"
        raise labs.InputError(f"{text}. To send it, type a space before it")
    if argument and not command.takes:
        raise labs.InputError(f"{name} takes nothing after it, but {argument!r:.60} was given")
    if not argument and command.takes and not command.takes.startswith("["):
        raise labs.InputError(f"{name} needs {command.takes}")
    return command.run(talk, argument, host)


def like_command(name: str) -> str | None:
    """Return the command whose name is most like this one. The slashes do not count."""
    found = nearest(name[1:], [each[1:] for each in COMMANDS])
    return found and f"/{found}"


# ---------------------------------------------------------------- the conversation


def set_system(talk: Talk, text: str, host: Host) -> Talk:
    """Set the system message, or remove it."""
    old = [message for message in talk.messages if message.role == "system"]
    if not text:
        hint(f"[removed: {beginning(old[0].content)}]" if old else "[there is no system message]")
    else:
        hint("[it counts from the next message on]")
    new = [labs.Message(role="system", content=text)] if text else []

    def changed(messages: Messages) -> Messages:
        return (*new, *(message for message in messages if message.role != "system"))

    waiting = talk.unanswered and (talk.unanswered[0], changed(talk.unanswered[1]))
    return replace(talk, messages=changed(talk.messages), unanswered=waiting)


def reset(talk: Talk, _: str, host: Host) -> Talk:
    """Forget the conversation, but not the system message."""
    kept = tuple(message for message in talk.messages if message.role == "system")
    return replace(talk, messages=kept, unanswered=None, done=None)


def beginning(text: str | None) -> str:
    """Return the beginning of a message in one line."""
    return textwrap.shorten(text or "", 60, placeholder=" …") or "a message without words"


def last_question(talk: Talk) -> int:
    """Return the place of the last message of the user. Raises InputError if there is none."""
    places = [place for place, message in enumerate(talk.messages) if message.role == "user"]
    if not places:
        raise labs.InputError("there is no message yet")
    return places[-1]


def undo(talk: Talk, _: str, host: Host) -> Talk:
    """Remove the last message and what came after it."""
    if talk.unanswered is not None:
        hint(f"[removed: {beginning(talk.unanswered[0])}]")
        return replace(talk, unanswered=None)
    place = last_question(talk)
    hint(f"[removed: {beginning(talk.messages[place].content)}]")
    rest = (*talk.messages[:place], *(m for m in talk.messages[place:] if m.role == "system"))
    return replace(talk, messages=rest)


def last_sent(talk: Talk) -> tuple[str, Messages]:
    """Return the last message, answered or not, and the messages before it."""
    if talk.unanswered is not None:
        return talk.unanswered
    place = last_question(talk)
    return talk.messages[place].content or "", talk.messages[:place]


def retry(talk: Talk, _: str, host: Host) -> Talk:
    """Send the last message again, with another seed. The old answer stays if no new one comes."""
    text, before = last_sent(talk)
    attempt = talk.attempt + 1
    if not host.samples(talk):
        tell("[nothing is sampled, so the same question gets the same answer; see /settings]")
    elif (seed := talk.generation.seed) is not None:
        hint(f"[seed {(seed + attempt) % 2**63}]")
    return replace(talk, say=text, base=before, attempt=attempt)


def edit(talk: Talk, _: str, host: Host) -> Talk:
    """Change the last message in $VISUAL or $EDITOR, else at the prompt, and send it again."""
    text, before = last_sent(talk)
    if not is_for_person():
        raise labs.InputError("/edit needs a terminal")
    if not (os.environ.get("VISUAL") or os.environ.get("EDITOR")):
        return replace(talk, fill=text, base=before)
    try:
        edited = click.edit(text, extension=".md", require_save=False)
    except UnicodeDecodeError as error:
        raise labs.InputError(f"the edited text is not UTF-8: {error.reason}") from error
    except click.ClickException as error:
        raise labs.LabsError(f"{error.message}; $VISUAL and $EDITOR name the editor") from error
    if not (edited := (edited or "").strip()):
        hint("[the text is empty, so nothing is sent]")
        return talk
    hint(f"> {edited}")
    return replace(talk, say=edited, base=before)


def copy(talk: Talk, _: str, host: Host) -> Talk:
    """Copy the last answer to the clipboard."""
    said = [message.content for message in talk.messages if message.role == "assistant"]
    if not (text := next(filter(None, reversed(said)), None)):
        raise labs.InputError("there is no answer yet")
    tell(f"[{labs_clipboard.copy(text)}]")
    return talk


# ---------------------------------------------------------------- files


def read(host: Host, name: str, kind: Any, expected: str) -> Any:
    """Return what a JSON file holds. Raises an error for one that is not there or too large."""
    name = os.path.expanduser(name)
    found = os.stat(name)
    if not stat.S_ISREG(found.st_mode) or found.st_size > MAX_FILE_BYTES:
        limit = f"at most {MAX_FILE_BYTES >> 20} MiB"
        raise labs.InputError(f"{name}: this is not a file of {limit}")
    return host.read(os.path.abspath(name), kind, expected)


def use_tools(talk: Talk, name: str, host: Host) -> Talk:
    """Let the model call the tools of a file, list them, or take them away."""
    if not name:
        names = ", ".join(tool.function.name for tool in talk.tools)
        tell(f"[tools: {names}; /tools off takes them away]" if names else "[there are no tools]")
        return talk
    if name == "off":
        return replace(talk, tools=())
    labs.require("labs_tools")
    tools = read(host, name, tuple[labs_dialogue.Tool, ...], "a list of tools")
    changed = replace(talk, tools=labs_dialogue.check_tools(tools))
    host.check(changed)
    return use_tools(changed, "", host)


def save(talk: Talk, name: str, host: Host) -> Talk:
    """Write the conversation to a file, completely or not at all."""
    name = os.path.expanduser(name)
    if os.path.exists(name):  # an earlier conversation may be replaced, another file not
        try:
            read(host, name, Messages, "a conversation")
        except labs.InputError as error:
            why = "there is such a file, and it holds no conversation: give another name"
            raise labs.InputError(f"{name}: {why}") from error
    text = msgspec.json.format(msgspec.json.encode(talk.messages))
    labs_files.write_whole(name, [text, b"\n"])
    hint(f"[{len(talk.messages)} messages written to {name}]")
    return talk


def load(talk: Talk, name: str, host: Host) -> Talk:
    """Continue the conversation of a file. A last message without an answer is for /retry."""
    messages = read(host, name, Messages, "a list of {role, content}")
    messages = tuple(labs.check_prompt(None, messages) or ())
    last, waiting = messages[-1], None
    if last.role == "user":
        messages = messages[:-1]
        waiting = (last.content or "", messages)
    hint(f"[{len(messages)} messages read]" + (" [/retry sends the last one]" if waiting else ""))
    return replace(talk, messages=messages, unanswered=waiting, done=None)


def leave(talk: Talk, _: str, host: Host) -> Talk:
    """End the chat."""
    raise EOFError


def show_help(talk: Talk, _: str, host: Host) -> Talk:
    """Show what can be typed."""
    rows = [f"  {f'{name} {each.takes}':<23} {each.help}" for name, each in COMMANDS.items()]
    tell("\n".join([BEGIN, *rows]))
    return talk


COMMANDS = {
    "/system": Command(set_system, "[TEXT]", "set the system message; without TEXT, remove it"),
    "/model": Command(switch_model, "[NAME]", "let another model go on; without NAME, list them"),
    "/settings": Command(change_settings, "[KEY=VALUE …]", "change settings; without, show them"),
    "/tools": Command(use_tools, "[FILE]", "tools the model may call, as JSON; off: none"),
    "/retry": Command(retry, "", "send the last message again"),
    "/edit": Command(edit, "", "change the last message and send it again"),
    "/undo": Command(undo, "", "remove the last message and its answer"),
    "/reset": Command(reset, "", "forget the conversation, but not the system message"),
    "/copy": Command(copy, "", "copy the last answer to the clipboard"),
    "/stats": Command(show_stats, "", "show tokens per second and the context's use"),
    "/save": Command(save, "FILE", "write the conversation as JSON, for --messages-file"),
    "/load": Command(load, "FILE", "go on with a conversation that was saved"),
    "/help": Command(show_help, "", "show this text"),
    "/exit": Command(leave, "", "end the chat, as Ctrl-D does"),
}
OTHER_WORDS = {"/quit": "/exit", "/bye": "/exit", "/q": "/exit", "/clear": "/reset"}
OTHER_WORDS |= {"/new": "/reset", "/set": "/settings", "/regenerate": "/retry", "/?": "/help"}


# ---------------------------------------------------------------- completion


def completions(before: str, word: str, host: Host) -> list[str]:
    """Return what a word may become. before: the line up to it."""
    if not before.strip():
        found: Iterable[str] = COMMANDS if word.startswith("/") else ()
        return [f"{each} " if COMMANDS[each].takes else each for each in found if _is(word, each)]
    name = before.split()[0]
    takes = COMMANDS[name].takes.strip("[]") if name in COMMANDS else ""
    if takes == "FILE":
        return files(word)
    named = {"NAME": host.models, "KEY=VALUE …": [f"{each}=" for each in generation_settings()]}
    return [each for each in named.get(takes, ()) if _is(word, each)][:MAX_SHOWN]


def _is(word: str, whole: str) -> bool:
    return whole.startswith(word)


def files(word: str) -> list[str]:
    """Return the files and folders whose paths begin with this word."""
    folder, name = os.path.split(word)
    with contextlib.suppress(OSError), os.scandir(os.path.expanduser(folder or ".")) as entries:
        found = [each for each in entries if _is(name, each.name)]
        hidden = [each for each in found if each.name[0] != "." or name]
        return sorted(
            os.path.join(folder, each.name) + ("/" if each.is_dir() else "") for each in hidden
        )[:MAX_SHOWN]
    return []
