# SPDX-License-Identifier: Apache-2.0
"""A chat at the shell with models of labs: what answers, what is loaded, what is checked.

    labs_chat.chat(context, asked, labs_chat.Ways(load, read, True, False))

Needs labs_chat_turns.py, labs_shell.py and labs_request.py with what those need.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import click
from msgspec.structs import replace

import labs
import labs_chat_commands
import labs_chat_input
import labs_chat_turns
import labs_names
import labs_ready
import labs_request
import labs_shell
from labs_talk import Host, Talk

NO_MODEL: Any = None  # the model is that of the talk


class Ways(NamedTuple):
    """How a chat loads, reads and writes.

    load: returns the model of a configuration and the seconds of imports. read: a JSON file, with
    its type and what is expected of it in words. keep: whether messages are kept for later chats.
    """

    load: Callable[[labs.Config], tuple[labs.Model, float]]
    read: Callable[[str, Any, str], Any]
    stream: bool
    verbose: bool
    keep: bool = True


def chat(context: labs_request.Context, asked: labs_request.Request, ways: Ways) -> None:
    """Talk until the end of the input, beginning with the messages of the request.

    Exits with code 1 if something failed without a person at a terminal who saw it.
    """
    model, imports_s = ways.load(context.config)
    session = labs_shell.Session(
        context, asked, NO_MODEL, ways.stream, ways.verbose, imports_s, True
    )
    host = Host(
        answer=functools.partial(answer, session),
        load=functools.partial(switched, context, ways),
        models=tuple(each for each, c in context.configs.items() if c.model.kind == "text"),
        check=functools.partial(check, context),
        samples=samples,
        read=ways.read,
    )
    complete = functools.partial(labs_chat_commands.completions, host=host)
    history = labs_chat_input.History(labs_chat_input.history_file() if ways.keep else None)
    keyboard = labs_chat_input.Keyboard(history, complete)
    (prompt,) = asked.prompts
    messages, tools = prompt.messages or (), prompt.tools
    first = [Talk(config=context.config, model=model, messages=messages, tools=tools)]
    del model  # only the conversation holds it, so that /model can free it
    talk = labs_chat_turns.chat(first.pop(), host, keyboard)
    getattr(talk.model.prefixes, "flush", bool)()  # files of what prompts began with, if any
    if talk.failed and not keyboard.person:
        raise click.exceptions.Exit(1)


def asked_of(asked: labs_request.Request, talk: Talk) -> labs_request.Request:
    """Return the request of the next answer. A message that is sent again has another seed."""
    options = {**asked.options, **talk.options}
    if talk.attempt:
        options["seed"] = labs_ready.seeded_choice(talk.generation, talk.attempt).seed
    prompt = labs_request.Prompt(messages=talk.messages, tools=talk.tools)
    return replace(asked, prompts=(prompt,), options=options)


def answer(session: labs_shell.Session, talk: Talk, messages: list[labs.Message]) -> Iterator[Any]:
    """Write the answer to the last of these messages and yield its parts."""
    if gc.get_freeze_count() == 0:  # `switched` has loaded a model: free the one before it
        gc.collect()
        gc.freeze()
    context = replace(session.context, config=talk.config)
    session = session._replace(context=context, model=talk.model)
    request = asked_of(session.asked, replace(talk, messages=tuple(messages)))
    return labs_shell.answer(session, labs_request.check(context, request))


def check(context: labs_request.Context, talk: Talk) -> None:
    """Raise LabsError if no message can be answered with these settings and tools."""
    request = labs_request.Request(prompts=(), options=talk.options)
    labs_request.check(replace(context, config=talk.config), request)


def samples(talk: Talk) -> bool:
    """Return whether the next answer is sampled."""
    import labs_loop

    return (
        labs_loop.sampling_of(talk.generation, talk.model.generation_defaults, 0, ()).temperature
        > 0
    )


def switched(
    context: labs_request.Context, ways: Ways, name: str
) -> tuple[labs.Config, labs.Model]:
    """Load a configured model, or one that is named as in settings. Raises LabsError."""
    found = labs_names.find(name, context.configs)
    if found is None:
        spec = labs.evolve(context.config.model, model_name=name)
        name = labs_names.short(name, context.configs)
        config = replace(context.config, model=spec, model_id=name)
    else:
        config = context.configs[found]
    labs_request.check(replace(context, config=config), labs_request.Request(prompts=()))
    model, _ = ways.load(config)
    labs.load_model.cache_clear()  # type: ignore[attr-defined]
    gc.unfreeze()  # so that `answer` can free that one
    return config, model
