# SPDX-License-Identifier: Apache-2.0
"""Answers with reasoning and calls of tools: labs' events become parts.

    asked = labs_tools.Asked(tools=[...], tool_choice="required")
    inputs = labs.build_inputs(model, messages=messages, tools=asked.tools)
    plan = labs_tools.plan(model, inputs, generation, asked)  # every check is here
    events = engine.submit(plan.inputs, plan.generation, processors=plan.processors())
    take = plan.reader()  # one for each answer
    for part in (part for event in events for part in take(event)): ...

    for part in labs_tools.stream(model, messages, tools=[...]): ...  # the same in one call
    answer = labs_tools.generate(model, messages, tools=[...])  # its fold
    messages += [answer.message, ...]

Parts are Reasoning, labs.Delta, CallStarted and Arguments; labs.Done or labs.Failed is the last. A
call is held back until it is complete, so a stream shows what the whole answer has: one that is
malformed, cut or of an unknown function is text. Needs labs.py, labs_dialogue.py, labs_forms.py,
labs_split.py; anything that is held needs labs_grammar.py, labs_typed.py and llguidance.
"""

from __future__ import annotations

import contextlib
import importlib.util
import secrets
from collections.abc import Generator, Iterable, Iterator, Mapping
from typing import Any, cast

import msgspec
from msgspec import Struct
from msgspec.structs import replace

import labs
import labs_dialogue
import labs_forms
import labs_split

INSTALL = "pip install llguidance"


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


class Answer(Struct, frozen=True, kw_only=True):
    """A whole answer: the fold of its parts."""

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

    @property
    def message(self) -> labs.Message:
        """Return the answer as a message, for the next turn of the conversation."""
        return labs.Message(
            role="assistant",
            content=self.text,
            reasoning_content=self.reasoning or None,
            tool_calls=self.tool_calls or None,
        )


class Asked(Struct, frozen=True, kw_only=True):
    """What an answer is asked to be. tools: as OpenAI describes them.

    tool_choice: none, auto, required or the name of a tool. schema: of text, as a response_format.
    """

    tools: tuple[Any, ...] = ()
    tool_choice: str = "auto"
    parallel_tool_calls: bool = True
    schema: dict[str, Any] | None = None


class Plan(Struct, frozen=True, eq=False):
    """An answer that is ready to run. generation: as labs.generate and an engine take it."""

    model: labs.Model
    inputs: labs.Inputs
    generation: labs.Generation
    given: labs.Generation
    form: labs_split.Form
    tools: tuple[labs_dialogue.Tool, ...]  # that may be called
    grammar: Any = None  # its text, or a schema; None holds nothing
    banned: int | None = None  # the token that begins a call, where none may come

    def processors(self) -> tuple[Any, ...]:
        """Return logits processors for one answer; each answer needs new ones."""
        found: list[Any] = []
        if (budget := self.given.thinking_budget) is not None:
            found.append(Budget(self, budget))
        if self.banned is not None:
            found.append(_Ban(self.banned))
        if self.grammar is not None:
            import labs_typed

            found.append(labs_typed.Constraint(self.model, self.grammar))
        return tuple(found)

    def reader(self) -> Reader:
        """Return what turns the events of one answer into parts."""
        return Reader(self)

    def splitter(self) -> labs_split.Splitter:
        """Return a splitter at the beginning of the answer."""
        return labs_split.Splitter(
            self.form,
            names={tool.function.name for tool in self.tools},
            tools=[msgspec.to_builtins(tool) for tool in self.tools],
            inside=self.form.starts_inside(self.inputs.prompt),
            keep=self.given.reasoning == "keep",
        )


# ---------------------------------------------------------------- preparing an answer


def plan(
    model: labs.Model,
    inputs: labs.Inputs,
    generation: labs.Generation | None = None,
    asked: Asked = Asked(),  # noqa: B008
) -> Plan:
    """Check what is asked of an answer, and prepare it; nothing is refused later.

    Raises InputError for what the model cannot say or no grammar holds.
    """
    given = generation or labs.Generation()
    tools, callable_ = _tools(asked)
    form = labs_forms.form_of(model, calls=bool(tools))
    if given.thinking_budget is not None and form.reasoning is None:
        name = model.spec.model_name
        raise labs.InputError(f"thinking_budget: {name} has no reasoning in its chat template")
    if given.logprobs is not None and (tools or form.reasoning):
        raise labs.InputError("logprobs: not available beside tools and reasoning")
    marked = form.special and bool(tools or form.reasoning)
    own = {"skip_special_tokens": given.skip_special_tokens and not marked}
    own |= dict.fromkeys(("reasoning", "thinking_budget"))
    found = Plan(model, inputs, replace(given, **own), given, form, callable_)
    held = replace(found, grammar=_grammar(found, asked))
    if tools and not callable_:
        held = replace(held, banned=_trigger(found))
    held.processors()  # compiles the grammar
    return held


def _tools(asked: Asked) -> tuple[tuple[labs_dialogue.Tool, ...], tuple[labs_dialogue.Tool, ...]]:
    """Return all tools, and those that the choice lets the model call."""
    tools, choice = labs_dialogue.check_tools(asked.tools), asked.tool_choice
    if choice in ("none", "auto"):
        return tools, tools if choice == "auto" else ()
    if not tools:
        raise labs.InputError(f"tool_choice = {choice!r:.80}: there are no tools")
    chosen = tuple(tool for tool in tools if choice in ("required", tool.function.name))
    if not chosen:
        known = ", ".join(tool.function.name for tool in tools)
        raise labs.InputError(f"tool_choice = {choice!r:.80}: use none, auto, required or {known}")
    return tools, chosen


def _grammar(found: Plan, asked: Asked) -> Any:
    """Return what holds the answer: the text of a grammar, a schema, or None."""
    tools, choice = found.tools, asked.tool_choice
    if not tools and not found.form.reasoning:
        return asked.schema
    if not tools and asked.schema is None:
        return None
    demands = {
        "tool_choice": choice != "auto" and bool(tools),
        "parallel_tool_calls": not asked.parallel_tool_calls,
        "strict": any(tool.function.strict for tool in tools),
        "response_format": asked.schema is not None,
    }
    wanted = next((name for name, value in demands.items() if value), None)
    if importlib.util.find_spec("llguidance") is None:
        if wanted is None:
            return None
        raise labs.InputError(f"{wanted}: needs llguidance: {INSTALL}")
    if tools and found.form.writing is None:
        if wanted is None:
            return None
        raise labs.InputError(f"{wanted}: no grammar is known for the calls of this model")
    labs.require("labs_grammar", "labs_typed")
    import labs_grammar
    import labs_typed

    goal = labs_grammar.Wanted(
        tools=tools,
        required=choice not in ("none", "auto"),
        parallel=asked.parallel_tool_calls,
        schema=asked.schema,
        inside=found.form.starts_inside(found.inputs.prompt),
    )
    return labs_grammar.write(found.form, goal, lambda text: labs_typed.symbols(found.model, text))


def _trigger(found: Plan) -> int | None:
    """Return the token that begins a call, if it is one token."""
    writing = found.form.writing
    with found.model.lock:
        ids = found.model.tokenizer.encode(
            writing.trigger if writing else "", add_special_tokens=False
        )
    return ids[0] if len(ids) == 1 else None


class _Ban(Struct, frozen=True):
    """A logits processor without which a token may come."""

    token: int

    def __call__(self, ids: list[int], logits: Any) -> Any:
        logits[self.token] = float("-inf")
        return logits


class Budget:
    """A logits processor that ends reasoning after so many tokens, by writing its end."""

    def __init__(self, plan: Plan, tokens: int) -> None:
        self._plan, self._tokens, self._start = plan, tokens, -1
        with plan.model.lock:
            closes = cast("tuple[str, str]", plan.form.reasoning)[1]
            self._end = plan.model.tokenizer.encode(closes, add_special_tokens=False)
        self._restart()

    def _restart(self) -> None:
        self._read: list[int] = []
        self._splitter = self._plan.splitter()
        self._text = labs.PartialText(skip_special_tokens=self._plan.generation.skip_special_tokens)
        self._spent = 0  # tokens of reasoning, and of its end while that is not whole

    def __call__(self, ids: list[int], logits: Any) -> Any:
        """Return logits that allow only the next token of the end, once the budget is spent."""
        self._start = len(ids) if self._start < 0 else self._start
        answer = ids[self._start :]
        if answer[: len(self._read)] != self._read:  # guessed tokens were wrong
            self._restart()
        for token in answer[len(self._read) :]:
            self._take(token)
        if not self._splitter.thinking or self._spent < self._tokens:
            return logits
        written = self._spent - self._tokens
        only = logits.new_full(logits.shape, float("-inf"))
        token = self._end[min(written, len(self._end) - 1)]
        only[token] = logits[token].clamp(min=-1e4)
        return only

    def _take(self, token: int) -> None:
        model = self._plan.model
        self._read.append(token)
        before = self._splitter.thinking
        with model.lock:
            piece = labs.decode_next(model.tokenizer, self._text, token)
        self._splitter.feed(piece)
        self._spent += before and self._splitter.thinking


# ---------------------------------------------------------------- events → parts


class Reader:
    """Turn the events of one answer into parts; each call returns those that are certain."""

    def __init__(self, plan: Plan) -> None:
        self._plan, self._splitter = plan, plan.splitter()
        self._plain = not (plan.tools or plan.form.reasoning or plan.form.special)
        self._calls, self._thoughts = 0, list[str]()

    def __call__(self, event: labs.Event) -> list[Part]:
        if isinstance(event, labs.Failed) or self._plain:
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
                if self._plan.given.reasoning != "drop":
                    yield Reasoning(piece.text)
            else:
                yield CallStarted(self._calls, new_id(), piece.name)
                yield Arguments(self._calls, piece.text)
                self._calls += 1

    def _done(self, done: labs.Done) -> labs.Done:
        """Return the end of the answer: calls are its reason, and tokens of reasoning counted."""
        model, thoughts, tokens = self._plan.model, "".join(self._thoughts), 0
        if thoughts:
            with model.lock:
                tokens = len(model.tokenizer.encode(thoughts, add_special_tokens=False))
        reason, mark = done.finish_reason, done.fingerprint
        if mark is not None:
            given = self._plan.given
            names = ("reasoning", "thinking_budget", "skip_special_tokens")
            own = {name: getattr(given, name) for name in names}
            mark = replace(mark, generation=replace(mark.generation, **own))
        return replace(
            done,
            finish_reason="tool_calls" if self._calls and reason == "stop" else reason,
            usage=replace(done.usage, reasoning_tokens=tokens),
            fingerprint=mark,
        )


def new_id() -> str:
    """Return an id for a call: nine characters, the only length that Mistral's templates take."""
    return secrets.token_hex(5)[:9]


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
    return Answer(reasoning=thoughts, tool_calls=calls, **whole)


# ---------------------------------------------------------------- in one call


def stream(
    model: labs.Model,
    messages: Iterable[Mapping[str, object] | labs.Message],
    generation: labs.Generation | None = None,
    **changes: Any,
) -> Iterator[Part]:
    """Generate an answer as parts. Closing the iterator stops computing.

    changes: fields of Asked (tools, tool_choice, …), of labs.Template and of Generation. Raises
    labs' errors at the call, or GenerationError midway.
    """
    asked = msgspec.convert(_taken(changes, Asked), Asked)
    chat = _taken(changes, labs.Template)
    options = labs.evolve(generation or labs.Generation(), **changes)
    inputs = labs.build_inputs(model, messages=messages, tools=asked.tools, **chat)
    return _parts_of(plan(model, inputs, options, asked))


def _taken(changes: dict[str, Any], kind: type[Struct]) -> dict[str, Any]:
    """Take the fields of a struct out of the changes."""
    return {name: changes.pop(name) for name in kind.__struct_fields__ if name in changes}


def _parts_of(plan: Plan) -> Iterator[Part]:
    options = {"processors": plan.processors()}
    events = labs.stream_generate(plan.model, plan.inputs, plan.generation, **options)
    return _follow(cast("Generator[labs.Event]", events), plan.reader())


def _follow(events: Generator[labs.Event], take: Reader) -> Iterator[Part]:
    with contextlib.closing(events):
        for event in events:
            yield from take(event)


def generate(
    model: labs.Model,
    messages: Iterable[Mapping[str, object] | labs.Message],
    generation: labs.Generation | None = None,
    **changes: Any,
) -> Answer:
    """Generate a whole answer; the rest is as for `stream`."""
    return fold(stream(model, messages, generation, **changes))
