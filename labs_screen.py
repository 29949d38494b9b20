# SPDX-License-Identifier: Apache-2.0
"""Filter conversations and answers whole: reasoning, tools, calls and results beside texts.

    prompt = labs_screen.check_prompt(filters, prompt)  # with masks, or raises labs_guard.Filtered
    take = labs_screen.Screen(filters, inputs, generation)
    shown = [each for part in parts for each in take(part)]

Text, reasoning and the arguments of each call are filtered each for itself, as clients get them.
Of JSON, the strings, names and numbers are, so that no escape hides a word. Needs labs.py,
labs_dialogue.py, labs_guard.py and labs_parts.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import msgspec
from msgspec.structs import replace

import labs
import labs_dialogue
import labs_guard
import labs_parts

Check = Callable[[str], str]


# ---------------------------------------------------------------- what goes in


def check_prompt(filters: labs_guard.Filters, prompt: Any) -> Any:
    """Return a labs_request.Prompt with masks. Raises Filtered when a rule refuses a part of it."""
    check, text, tools = filters.check_text, prompt.prompt, prompt.tools
    turns = tuple(_message(filters, each) for each in prompt.messages or ())
    changes = {"prompt": text and check(text), "messages": turns or None}
    if tools:
        masked = check_json(filters, msgspec.to_builtins(tools), "input")
        changes["tools"] = labs_dialogue.check_tools(masked)
    if prompt.template_options:
        changes["template_options"] = check_json(filters, prompt.template_options, "input")
    return replace(prompt, **changes)


def _message(filters: labs_guard.Filters, message: labs.Message) -> labs.Message:
    check, thoughts = filters.check_text, message.reasoning_content
    changes: dict[str, Any] = {"content": check(message.content or "")}
    changes["name"] = message.name and check(message.name)
    changes["reasoning_content"] = thoughts and check(thoughts)
    calls = message.tool_calls or ()
    changes["tool_calls"] = tuple(_call(filters, each) for each in calls) or None
    return replace(message, **changes)


def _call(filters: labs_guard.Filters, call: labs.ToolCall) -> labs.ToolCall:
    arguments = _arguments(filters, call.function.arguments, "input")
    return replace(call, function=replace(call.function, arguments=arguments))


def check_json(filters: labs_guard.Filters, value: Any, side: str) -> Any:
    """Return a JSON value with masks in its strings, names and numbers. Raises Filtered."""
    if filters.guard.side not in (None, side):
        return value
    texts = list[str]()

    def check(text: str) -> str:
        texts.append(text)
        shown, _, refused = filters.apply(side, text, 0, len(text))
        if refused is not None:
            raise labs_guard.Filtered(refused)
        return shown

    try:
        shown = _walk(value, check)
    except RecursionError:
        raise labs_guard.Filtered("mask", "it is nested too deeply") from None
    if found := filters.classify("\n".join(texts)):
        filters.tell(found.rule, side)
        raise labs_guard.Filtered(found.rule)
    return shown


def _walk(value: Any, check: Check) -> Any:
    if isinstance(value, str):
        return check(value)
    if isinstance(value, dict):
        return {check(name): _walk(each, check) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_walk(each, check) for each in value]
    if value is None or isinstance(value, bool):
        return value
    shown = check(text := str(value))  # a number may be a card's
    return value if shown == text else shown


def _arguments(filters: labs_guard.Filters, text: str, side: str) -> str:
    """Return arguments, a JSON object as text, with masks; unchanged if they need none."""
    try:
        value = json.loads(text or "{}")
        if (shown := check_json(filters, value, side)) == value and _is_plain(text):
            return text
        return json.dumps(shown, ensure_ascii=False, allow_nan=False)
    except ValueError:  # a number beyond floats
        raise labs_guard.Filtered("mask", "it holds a number that is too large") from None


def _is_plain(text: str) -> bool:
    """Return whether no name in a JSON text comes twice, of which all but the last are hidden."""
    twice = False

    def seen(pairs: list[tuple[str, Any]]) -> None:
        nonlocal twice
        twice = twice or len({name for name, _ in pairs}) < len(pairs)

    json.loads(text or "{}", object_pairs_hook=seen)
    return not twice


# ---------------------------------------------------------------- what comes out


class Screen:
    """Filter the parts of an answer; each call returns the parts to show.

    A call is shown when its arguments are known. A rule that refuses any of it ends the answer.
    """

    def __init__(
        self, filters: labs_guard.Filters, inputs: labs.Inputs, generation: labs.Generation
    ) -> None:
        self._filters, self._on, self._over = filters, filters.filters(generation), False
        self._text = labs_guard.Filter(filters, inputs, generation)
        self._thoughts = labs_guard.Filter(filters, inputs, generation)
        self._thinks, self._again = False, ""
        self._call: labs_parts.CallStarted | None = None
        self._pieces, self._changed = 0, False

    def __call__(self, part: labs_parts.Part) -> list[labs_parts.Part]:
        if self._over or not self._on or isinstance(part, labs.Failed):
            return [] if self._over else [part]
        self._pieces += not isinstance(part, labs.Done)
        if isinstance(part, labs_parts.Reasoning):
            shown = self._think(part.text)
        else:
            before = self._end_of_thought()
            shown = before if self._thoughts.over else [*before, *self._shown(part)]
        self._over = bool(shown) and isinstance(shown[-1], labs.Done)
        if self._over and not isinstance(part, labs.Done):  # a rule ended the answer
            usage = replace(shown[-1].usage, completion_tokens=self._pieces)
            shown[-1] = replace(shown[-1], usage=usage)
        elif isinstance(part, labs.Done) and self._thoughts.over:
            shown[-1] = self._thoughts.cut(part)
        return shown

    def _think(self, text: str) -> list[Any]:
        """Filter reasoning. What comes later begins a line, so that no word is made of both."""
        text = text if self._thinks else self._again + text
        self._thinks, self._again = True, "\n"
        return _as_reasoning(self._thoughts(labs.Delta(text)))

    def _end_of_thought(self) -> list[Any]:
        """Return the rest of the reasoning, which was held back, when something else comes."""
        if not self._thinks:
            return []
        self._thinks = False
        return _as_reasoning(self._thoughts(labs.Delta(""), final=True))

    def _shown(self, part: Any) -> list[Any]:
        if isinstance(part, labs_parts.CallStarted):
            self._call = part
            return []
        if isinstance(part, labs_parts.Arguments):
            return self._called(part)
        if isinstance(part, labs.Delta):
            return [*self._text(part)]
        *texts, end = self._text(part)
        if self._changed or self._thoughts.changed:
            end = replace(end, fingerprint=None)
        return [*texts, end]

    def _called(self, part: labs_parts.Arguments) -> list[Any]:
        try:
            arguments = _arguments(self._filters, part.text, "output")
        except labs_guard.Filtered:
            return [*self._text(self._text.cut(labs.Delta("")))]
        self._changed |= arguments != part.text
        return [self._call, replace(part, text=arguments)]


def _as_reasoning(events: list[labs.Event]) -> list[Any]:
    return [
        labs_parts.Reasoning(each.text) if isinstance(each, labs.Delta) else each for each in events
    ]
