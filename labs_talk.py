# SPDX-License-Identifier: Apache-2.0
"""A conversation as a value, and what it asks of the program that holds it.

    talk = labs_talk.Talk(config=config, model=model)

labs_chat_turns.py reads messages and commands, each of which makes the next Talk of the last.
Needs labs.py and labs_dialogue.py.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from msgspec import Struct

import labs
import labs_dialogue

Messages = tuple[labs.Message, ...]


class Talk(Struct, frozen=True, kw_only=True):
    """A conversation, and how its next message is answered.

    config: of the model that answers. options: generation settings that /settings changed. done:
    the end of the last answer. attempt: how often the last message was sent again.
    """

    config: labs.Config
    model: labs.Model
    messages: Messages = ()
    options: dict[str, Any] = {}
    tools: tuple[labs_dialogue.Tool, ...] = ()
    done: labs.Done | None = None
    attempt: int = 0
    # Of the next message. base: the messages before it, None for all. say: it is sent without being
    # typed. fill: it is typed, beginning with this. unanswered: the last one if it has no answer,
    # with the messages before it.
    base: Messages | None = None
    say: str | None = None
    fill: str = ""
    unanswered: tuple[str, Messages] | None = None
    failed: bool = False  # whether an answer or a command has failed

    @property
    def generation(self) -> labs.Generation:
        """The settings of the next answer. Raises ConfigError if those of /settings do not fit."""
        return labs.evolve(self.config.generation, **self.options)


class Host(NamedTuple):
    """What a chat asks of the program around it; what cannot be done raises an error."""

    answer: Callable[[Talk, list[labs.Message]], Iterator[Any]]  # writes and yields parts
    load: Callable[[str], tuple[labs.Config, labs.Model]]
    models: tuple[str, ...] = ()  # that are configured
    check: Callable[[Talk], None] = lambda talk: None  # what the next answer is asked with
    samples: Callable[[Talk], bool] = lambda talk: True
    read: Callable[[str, Any, str], Any] = lambda name, kind, expected: None  # a JSON file


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that is most like it, if any is."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)), None)


def instead_of(name: str | None) -> str:
    return f"; did you mean {name}?" if name else ""
