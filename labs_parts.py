# SPDX-License-Identifier: Apache-2.0
"""The parts of an answer with reasoning and calls, read from labs' events.

    take = labs_parts.Reader(model, generation, splitter)  # see labs_tools.Plan.reader
    parts = [part for event in events for part in take(event)]
    answer = labs_parts.fold(parts)

labs_tools.py has these names too. Needs labs.py and labs_split.py.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator
from typing import Any, Literal, cast

import msgspec
from msgspec import Struct
from msgspec.structs import replace

import labs
import labs_split


class Reasoning(Struct, frozen=True, tag="reasoning"):
    """A piece of what the model thinks before it answers."""

    text: str


class CallStarted(Struct, frozen=True, tag="call"):
    """The beginning of a call, the index-th of the answer."""

    index: int
    id: str
    name: str


class Arguments(Struct, frozen=True, tag="arguments"):
    """A piece of a call's arguments, which together are a JSON object."""

    index: int
    text: str


Part = Reasoning | labs.Delta | CallStarted | Arguments | labs.Done | labs.Failed


class Run(Struct, frozen=True):
    """A part of an answer, to its end. length: of its text, in characters."""

    kind: Literal["reasoning", "text", "call"]
    length: int = 0


class Answer(Struct, frozen=True, kw_only=True):
    """A whole answer: the fold of its parts. runs: in which order it has them."""

    text: str
    finish_reason: labs.FinishReason
    usage: labs.Usage
    timings: labs.Timings
    reasoning: str = ""
    tool_calls: tuple[labs.ToolCall, ...] = ()
    matched_stop: str | None = None
    seed: int | None = None
    fingerprint: labs.Fingerprint | None = None
    logprobs: tuple[labs.TokenLogprob, ...] = ()
    runs: tuple[Run, ...] = ()

    @property
    def message(self) -> labs.Message:
        """Return the answer as a message, for the next turn of the conversation."""
        return labs.Message(
            role="assistant",
            content=self.text,
            reasoning_content=self.reasoning or None,
            tool_calls=self.tool_calls or None,
        )


class Reader:
    """Turn the events of one answer into parts; each call returns those that are certain."""

    def __init__(
        self,
        model: labs.Model,
        given: labs.Generation,
        splitter: labs_split.Splitter | None,
        prompt: str = "",
    ) -> None:
        """Read an answer. given: the options as they were asked. splitter: None if all is text."""
        self._model, self._given = model, given
        self._splitter, self._prompt = splitter, prompt
        self._calls, self._thoughts = 0, list[str]()

    def __call__(self, event: labs.Event) -> list[Part]:
        if isinstance(event, labs.Failed) or self._splitter is None:
            return [event]
        if isinstance(event, labs.Delta):
            return [*self._parts(self._splitter.feed(event.text))]
        whole = event.finish_reason == "stop" and event.matched_stop is None
        return [*self._parts(self._splitter.end(whole=whole)), self._done(event)]

    def _parts(self, pieces: Iterable[labs_split.Piece]) -> Iterator[Part]:
        for piece in pieces:
            if piece.kind == "text":
                yield labs.Delta(piece.text)
            elif piece.kind == "reasoning":
                self._thoughts.append(piece.text)
                if self._given.reasoning != "drop":
                    yield Reasoning(piece.text)
            else:
                yield CallStarted(self._calls, id_of(self._prompt, self._calls, piece), piece.name)
                yield Arguments(self._calls, piece.text)
                self._calls += 1

    def _done(self, done: labs.Done) -> labs.Done:
        """Return the end of the answer: calls are its reason, and tokens of reasoning counted."""
        model, thoughts, tokens = self._model, "".join(self._thoughts), 0
        if thoughts:
            with model.lock:
                tokens = len(model.tokenizer.encode(thoughts, add_special_tokens=False))
        tokens = min(tokens, done.usage.completion_tokens)  # an odd text may encode to more
        reason, mark = done.finish_reason, done.fingerprint
        if mark is not None:
            names = ("reasoning", "thinking_budget", "skip_special_tokens")
            own = {name: getattr(self._given, name) for name in names}
            mark = replace(mark, generation=replace(mark.generation, **own))
        return replace(
            done,
            finish_reason="tool_calls" if self._calls and reason == "stop" else reason,
            usage=replace(done.usage, reasoning_tokens=tokens),
            fingerprint=mark,
        )


def id_of(prompt: str, index: int, call: labs_split.Piece) -> str:
    """Return the id of a call, the same if the same prompt gets the same answer again.

    It has nine characters, the only length that all of Mistral's templates take.
    """
    text = "\0".join([prompt, str(index), call.name, call.text])
    return hashlib.sha256(text.encode()).hexdigest()[:9]


def fold(parts: Iterable[Part]) -> Answer:
    """Join the parts of an answer. Raises the error of a Failed."""
    *pieces, done = parts
    if isinstance(done, labs.Failed):
        raise done.error
    started = [part for part in pieces if isinstance(part, CallStarted)]
    arguments = [part for part in pieces if isinstance(part, Arguments)]
    calls = tuple(
        labs.ToolCall(
            id=call.id,
            function=labs.FunctionCall(
                name=call.name,
                arguments="".join(each.text for each in arguments if each.index == call.index),
            ),
        )
        for call in started
    )
    deltas = [part for part in pieces if isinstance(part, labs.Delta)]
    whole = msgspec.structs.asdict(labs.fold(deltas, cast("labs.Done", done)))
    thoughts = "".join(part.text for part in pieces if isinstance(part, Reasoning))
    return Answer(reasoning=thoughts, tool_calls=calls, runs=tuple(_runs(pieces)), **whole)


def _runs(pieces: Iterable[Part]) -> Iterator[Run]:
    kinds: dict[Any, Any] = {Reasoning: "reasoning", labs.Delta: "text", CallStarted: "call"}
    known: list[Any] = [(kinds[type(each)], each) for each in pieces if type(each) in kinds]
    for kind, run in itertools.groupby(known, key=lambda pair: pair[0]):
        if kind == "call":
            yield from (Run("call") for _ in run)
        elif length := sum(len(each.text) for _, each in run):
            yield Run(kind, length)


def unfold(found: labs.Completion | Answer) -> Iterator[Part]:
    """Yield a whole answer's parts, each to its end, in the order in which it had them."""
    calls = enumerate(getattr(found, "tool_calls", ()))
    texts = {"text": found.text, "reasoning": getattr(found, "reasoning", "")}
    logprobs = found.logprobs
    for run in getattr(found, "runs", (Run("text", len(found.text)),)):
        if run.kind == "call":
            index, call = next(calls)
            yield CallStarted(index, call.id, call.function.name)
            yield Arguments(index, call.function.arguments)
            continue
        piece, texts[run.kind] = texts[run.kind][: run.length], texts[run.kind][run.length :]
        yield Reasoning(piece) if run.kind == "reasoning" else labs.Delta(piece, logprobs)
        logprobs = () if run.kind == "text" else logprobs
    names = ("finish_reason", "usage", "timings", "matched_stop", "seed", "fingerprint")
    yield labs.Done(**{name: getattr(found, name) for name in names})
