# SPDX-License-Identifier: Apache-2.0
"""Write conversations so that a chat template shows all of their calls, results and reasoning.

    shows = labs_shown.of(tokenizer, template)  # found by trying
    messages = labs_shown.written(messages, shows)

Some templates show only the first call of a message, take no text beside reasoning and a call, or
take only ids of nine characters. There a message becomes several, text becomes part of the
reasoning, and ids are made from those given. Needs labs_settings.py.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import re
from collections.abc import Iterator
from typing import Any, Literal

from msgspec import Struct

from labs_settings import InputError

MARK, OTHER = "zebra", "walrus"  # words that no template contains
REASONING = ("reasoning_content", "reasoning", "thinking")  # the names that templates give it
ID, LONG_ID = "abcdef12", "call_0123456789abcdefghijkl"
SHORT_ID = re.compile(r"[A-Za-z0-9]{9}")  # the only ids that all of Mistral's templates take


class Shows(Struct, frozen=True):
    """What a chat template shows. reasoning: its field for earlier reasoning.

    calls: all of a message, one (a second raises or is lost, but comes in a message of its own), or
    only the first. joined: text beside reasoning and a call belongs in the reasoning. short_ids: it
    takes no others.
    """

    reasoning: str | None = None
    calls: Literal["all", "one", "first"] = "all"
    joined: bool = False
    short_ids: bool = False


# ---------------------------------------------------------------- found by trying


class _Trial(Struct, frozen=True):
    """A chat template, and what it shows of a conversation."""

    tokenizer: Any
    template: str

    def shows(self, *words: str, of: list[dict[str, Any]]) -> bool:
        """Return whether the words are in the prompt, false if the template raises."""
        turns = [{"role": "user", "content": "yes"}, *of]
        with contextlib.suppress(Exception):  # templates raise anything
            prompt = self.tokenizer.apply_chat_template(
                turns, chat_template=self.template, tokenize=False
            )
            return all(word in prompt for word in words)
        return False


def of(tokenizer: Any, template: str) -> Shows:
    """Return what a chat template shows."""
    trial = _Trial(tokenizer, template)
    field = _reasoning_field(trial)
    return Shows(
        reasoning=field,
        calls=_calls(trial),
        joined=field is not None and _is_joined(trial, field),
        short_ids=trial.shows(MARK, of=_turn(MARK))
        and not trial.shows(MARK, of=_turn(MARK, key=LONG_ID)),
    )


def _turn(*values: str, key: str = ID, **more: str) -> list[dict[str, Any]]:
    """Return a message with a call for each value, and their results."""
    calls = [
        {
            "id": f"{key}{index}",
            "type": "function",
            "function": {"name": "yes", "arguments": {"yes": value}},
        }
        for index, value in enumerate(values)
    ]
    results = [{"role": "tool", "tool_call_id": call["id"], "content": "yes"} for call in calls]
    return [{"role": "assistant", "content": "", "tool_calls": calls, **more}, *results]


def _calls(trial: _Trial) -> Literal["all", "one", "first"]:
    both = _turn(MARK, OTHER)
    if trial.shows(MARK, OTHER, of=both):
        return "all"
    if trial.shows(MARK, OTHER, of=[*_turn(MARK), *_turn(OTHER)]):
        return "one"
    return "first" if trial.shows(MARK, of=both) else "all"  # then it raises by itself


def _is_joined(trial: _Trial, field: str) -> bool:
    """Return whether a template shows reasoning or text beside a call, but not both."""
    alone = trial.shows(MARK, of=_turn("yes", **{field: MARK}))
    alone = alone and trial.shows(OTHER, of=_turn("yes", content=OTHER))
    return alone and not trial.shows(
        MARK, OTHER, of=_turn("yes", **{field: MARK, "content": OTHER})
    )


def _reasoning_field(trial: _Trial) -> str | None:
    """Return the field from which a template shows earlier reasoning."""
    for name, called in itertools.product(REASONING, (True, False)):
        (turn, *_) = _turn("yes", **{name: MARK})
        plain = {"role": "assistant", "content": "yes", name: MARK}
        if trial.shows(MARK, of=[turn if called else plain]):
            return name
    return None


# ---------------------------------------------------------------- written accordingly


def written(messages: list[dict[str, Any]], shows: Shows) -> list[dict[str, Any]]:
    """Return messages as the template shows them; results come in the order of their calls.

    Raises InputError for several calls in a message, where the template shows only the first.
    """
    found, calls = list[dict[str, Any]](), dict[str, str]()
    called: dict[str, Any] | None = None
    results = list[dict[str, Any]]()
    for message in [*(_adapted(each, shows) for each in messages), {"role": "end"}]:
        if message["role"] == "tool":
            results.append({"name": calls.get(message["tool_call_id"]), **message})
            continue
        order = [*calls]
        results.sort(key=lambda each: order.index(each["tool_call_id"]))
        found += [*_apart(called, results, shows)] if called else results
        called, results = message if message.get("tool_calls") else None, []
        if called:
            calls = {call["id"]: call["function"]["name"] for call in called["tool_calls"]}
        elif message["role"] != "end":
            found.append(message)
    return found


def _adapted(message: dict[str, Any], shows: Shows) -> dict[str, Any]:
    """Return a message with its reasoning, text and ids where and as the template takes them."""
    found = {name: value for name, value in message.items() if name != "reasoning_content"}
    if shows.reasoning and "reasoning_content" in message:
        found[shows.reasoning] = message["reasoning_content"]
        if shows.joined and message.get("tool_calls") and message.get("content"):
            thought = [message["reasoning_content"], message["content"]]
            found |= {shows.reasoning: "\n\n".join(filter(None, thought)), "content": ""}
    if shows.short_ids and message.get("tool_calls"):
        found["tool_calls"] = [{**each, "id": _short(each["id"])} for each in found["tool_calls"]]
    if shows.short_ids and message["role"] == "tool":
        found["tool_call_id"] = _short(message["tool_call_id"])
    return found


def _short(key: str) -> str:
    """Return an id of nine characters, the same for the same id."""
    return key if SHORT_ID.fullmatch(key) else hashlib.sha256(key.encode()).hexdigest()[:9]


def _apart(
    message: dict[str, Any], results: list[dict[str, Any]], shows: Shows
) -> Iterator[dict[str, Any]]:
    """Yield a message with calls, and its results; several messages where one shows one call."""
    calls = message["tool_calls"]
    if len(calls) == 1 or shows.calls == "all":
        yield message
        yield from results
        return
    if shows.calls == "first":
        text = f"messages: one has {len(calls)} tool_calls"
        raise InputError(f"{text}, and the model's chat template shows only the first")
    waiting = [call["id"] for call in calls]
    for index, call in enumerate(calls):
        more = {"role": "assistant", "content": ""} if index else message
        yield {**more, "tool_calls": [call]}
        waiting.pop(0)
        own = [each for each in results if each["tool_call_id"] == call["id"]]
        own = own[:1] if call["id"] in waiting else own  # the others are of a call with the same id
        yield from own
        results = [each for each in results if not any(each is taken for taken in own)]
