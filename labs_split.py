# SPDX-License-Identifier: Apache-2.0
"""Split an answer into text, reasoning and calls, by a form of transformers' response templates.

    splitter = labs_split.Splitter(form, names={"get_weather"})
    for piece in splitter.feed("<think>Rain?</think>"): ...  # Piece("reasoning", "Rain?")
    for piece in splitter.end(whole=True): ...

transformers' parser reads each whole call. Where a call begins and ends is found here, because that
parser ends a call at a closing marker inside a JSON string, raises when an answer was cut, keeps
only the last of several texts, and does not check shapes. A call is held back until it is complete;
one that is malformed, cut or of an unknown function stays text. Needs labs_scan.py.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Collection, Iterator, Sequence
from typing import Any, Literal

import regex
from msgspec import Struct

import labs_scan

Kind = Literal["json", "xml", "gemma"]


class Writing(Struct, frozen=True, kw_only=True):
    """How a family writes calls: head, (begin NAME between ARGUMENTS end) with separators, tail.

    trigger: the text that begins a call, and nothing else. parallel: whether it writes several.
    anchored: only at the beginning of an answer. before: what precedes a text that is no call.
    """

    trigger: str
    begin: str
    between: str
    head: str = ""
    end: str = ""
    separator: str = ""
    tail: str = ""
    arguments: Kind = "json"
    parallel: bool = True
    anchored: bool = False
    before: str = ""


class Form(Struct, frozen=True, eq=False):
    """How one model writes. calls: a loaded field of a response_template, None if it writes none.

    writing: for a grammar; None if no family writes as the model's own response_template reads.
    special: whether markers are special tokens, so that the text is needed with them.
    after_reasoning: what follows it before text and calls. again: what begins a call right after
    another, if calls begin only the answer.
    """

    template: Any
    calls: Any
    writing: Writing | None
    reasoning: tuple[str, str] | None
    skips: tuple[Any, ...]
    special: bool
    after_reasoning: str = ""
    again: Any = None

    def starts_inside(self, prompt: str) -> bool:
        """Return whether a prompt ends where the model's reasoning has begun."""
        return self.reasoning is not None and prompt.rstrip().endswith(self.reasoning[0].strip())


class Piece(Struct, frozen=True):
    """A piece of text or reasoning, or a whole call, whose text is a JSON object."""

    kind: Literal["text", "reasoning", "call"]
    text: str
    name: str = ""


class Splitter:
    """Split an answer that comes in pieces; however it is cut, the joined pieces are the same.

    names: of the functions that may be called, none of which makes all calls text. tools: for the
    types of arguments. inside: it begins in reasoning. keep: reasoning stays in the text.
    """

    def __init__(
        self,
        form: Form,
        *,
        names: Collection[str] = (),
        tools: Sequence[dict[str, Any]] = (),
        inside: bool = False,
        keep: bool = False,
    ) -> None:
        self._form, self._names, self._tools, self._keep = form, names, tools, keep
        self._buffer, self._at = "", 0
        self._state, self._fresh = ("reasoning" if inside else "text"), inside and not keep
        self._space = ""  # at the end of what was said: it may precede a call
        self._scan = 0  # how far a call was read
        self._called = 0  # where the last call ended, if nothing has been said since
        self._found: list[Piece] = []
        if form.reasoning:
            self._opens, self._closes = (_literal(each.strip()) for each in form.reasoning)
        self._json = labs_scan.Scan(form.calls.content_args if form.calls else {})

    @property
    def thinking(self) -> bool:
        """Return whether the answer is in its reasoning now."""
        return self._state == "reasoning"

    def feed(self, text: str) -> list[Piece]:
        """Return what more text makes certain."""
        self._buffer += text
        return self._advance(last=False, whole=False)

    def end(self, *, whole: bool) -> list[Piece]:
        """Return the rest. whole: the answer ended by itself, so it was not cut."""
        found = self._advance(last=True, whole=whole)
        if self._space and not self._fresh and self._state == "text":
            found.append(Piece("text", self._space))
        return found

    def _advance(self, *, last: bool, whole: bool) -> list[Piece]:
        self._found = []
        while self._take_call(last, whole) if self._state == "call" else self._take_text(last):
            pass
        return self._found

    def _take_text(self, last: bool) -> bool:
        """Say the text up to the next marker and enter what it opens; false: none is certain."""
        kind, match, certain = self._search(last)
        self._say(self._buffer[self._at : certain])
        self._at = certain
        if match is None:
            return False
        if kind == "call":
            self._state, self._scan, self._calls_at = "call", match.end(), match.start()
            self._reads_at = match.end() if self._follows() else match.start()
            self._json.begin()
            return True
        self._at = match.end()
        if kind in ("reasoning", "text"):
            if self._keep:
                self._say(match[0])
            else:
                self._space, self._fresh = "", True
            self._state = kind
        return True

    def _search(self, last: bool) -> tuple[str, Any, int]:
        """Return the next marker's kind and match, and up to where the text is certain."""
        patterns: dict[str, Any] = {}  # of equal matches the first wins
        if self._state == "text" and self._form.calls and self._names:
            patterns["call"] = self._form.calls.open_re
        if self._state == "reasoning":
            patterns["text"] = self._closes
        elif self._form.reasoning:
            patterns["reasoning"] = self._opens
            if self._form.special:
                patterns["skip"] = self._closes
        patterns |= {f"skip{n}": pattern for n, pattern in enumerate(self._form.skips)}
        found = list[tuple[int, bool, int, str, Any]]()
        for kind, pattern in patterns.items():
            if kind == "call" and self._follows():
                match = self._form.again.match(self._buffer, self._called, partial=not last)
            else:
                match = pattern.search(self._buffer, self._at, partial=not last)
            if match and match.start() < len(self._buffer):
                fixed = kind in ("reasoning", "text") or match.end() < len(self._buffer)
                certain = last or (fixed and not match.partial)
                found.append((match.start(), certain, -len(match[0]), kind, match))
        if not found:
            return "", None, len(self._buffer)
        start, certain, _, kind, match = min(found, key=lambda each: each[:3])
        return (kind, match, start) if certain else ("", None, start)

    def _follows(self) -> bool:
        """Return whether a call may only follow the one before."""
        return self._form.again is not None and self._called > 0

    def _say(self, text: str) -> None:
        """Add text or reasoning; white space at its end waits for what follows."""
        if self._fresh:
            text = text.lstrip()
            self._fresh = not text
        text = self._space + text
        said = text if self._keep and self._state == "reasoning" else text.rstrip()
        self._space = text[len(said) :]
        if said:
            thinks = self._state == "reasoning" and not self._keep
            self._found.append(Piece("reasoning" if thinks else "text", said))

    def _take_call(self, last: bool, whole: bool) -> bool:
        """Read the call that has begun, or make its text text; false: it is not complete yet."""
        end, complete = self._end_of_call(last, whole)
        if end is None:
            return False
        end = max(end, self._calls_at + 1)  # an opening pattern may match nothing
        text, self._at, self._state = self._buffer[self._calls_at : end], end, "text"
        read = self._scan if self._form.calls.content == "json" else end  # without its marker
        if complete and (calls := self._read(self._buffer[self._reads_at : read])):
            self._found += calls
            self._space, self._fresh, self._called = "", True, end
        else:
            self._called = len(self._buffer) + 1 if self._follows() else 0  # never again
            self._say(text)
        return True

    def _end_of_call(self, last: bool, whole: bool) -> tuple[int | None, bool]:
        """Return (where the call ends, whether it is complete), or None while that is open."""
        field, length = self._form.calls, len(self._buffer)
        if field.content != "json":
            return self._end_at_close(field.close_re, last, whole)
        if not self._json.begun:
            self._scan = _skip_space(self._buffer, self._scan)
            if self._scan < length and self._buffer[self._scan] not in "{[":
                return self._scan, False
        self._scan, ended = self._json.read(self._buffer, self._scan)
        if not ended:
            return (length, False) if last else (None, False)
        end = self._scan
        if field.close_re is None:
            return end, True
        after = _skip_space(self._buffer, end)
        match = field.close_re.match(self._buffer, after, partial=not last)
        if match is None:
            return (end, whole) if last and after == length else (end, False)
        return (None, False) if match.partial else (match.end(), True)

    def _end_at_close(self, close: Any, last: bool, whole: bool) -> tuple[int | None, bool]:
        match = close.search(self._buffer, self._scan, partial=not last) if close else None
        if match and not match.partial:
            return match.end(), True
        if last:
            return len(self._buffer), whole
        self._scan = match.start() if match else len(self._buffer)
        return None, False

    def _read(self, text: str) -> list[Piece]:
        """Return the calls in a text, none if it is not calls of known functions."""
        parser = importlib.import_module("transformers.utils.chat_parsing")
        tools = self._tools if self._form.calls.content != "json" else ()
        if self._form.calls.content == "xml-inline" and not self._is_all_tags(text):
            return []
        try:
            parsed = parser.parse_response(text, self._form.template, prefix="", tools=tools)
            calls = [*_flat(parsed.get("tool_calls", ()))]
            return [_call(each["function"], self._names) for each in calls]
        except Exception:  # a model may write anything, and parsers of other forms raise anything
            return []

    def _is_all_tags(self, text: str) -> bool:
        """Return whether a call is all tags: the parser leaves out what is between them."""
        field = self._form.calls
        start = field.open_re.match(text).end()
        close = field.close_re.search(text, start, partial=True)
        inside = text[start : close.start() if close else len(text)]
        tag = regex.compile(field.content_args["tag_pattern"], regex.DOTALL)
        return not tag.sub("", inside).strip()


def _call(function: Any, names: Collection[str]) -> Piece:
    """Return a call. Raises ValueError for an unknown function or wrong arguments."""
    name, arguments = function["name"], function["arguments"]
    if name not in names or not isinstance(arguments, dict):
        raise ValueError("no call of a known function")
    text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    text.encode()  # a lone surrogate cannot be sent
    return Piece("call", text, name)


def _literal(text: str) -> Any:
    return regex.compile(regex.escape(text))


def _flat(found: Any) -> Iterator[Any]:
    for each in found:
        yield from each if isinstance(each, list) else [each]


def _skip_space(text: str, at: int) -> int:
    return at + len(text[at:]) - len(text[at:].lstrip())
