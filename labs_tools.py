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
    for event in labs_tools.run(model, messages, [get_weather]): ...  # Python functions as tools

Parts are Reasoning, labs.Delta, CallStarted and Arguments; labs.Done or labs.Failed is the last. A
call is held back until it is complete, so a stream shows what the whole answer has: one that is
malformed, cut or of an unknown function is text. Needs labs.py, labs_dialogue.py, labs_forms.py,
labs_limits.py, labs_parts.py, labs_split.py and labs_values.py; what is held needs
labs_grammar.py, labs_typed.py and llguidance.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib.util
import inspect
import json
import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, TypeVar, cast

import msgspec
from msgspec import Meta, Struct
from msgspec.structs import replace

import labs
import labs_dialogue
import labs_forms
import labs_limits
import labs_split
import labs_values
from labs_parts import Answer, Part, Reader, fold

__all__ = [  # with the names of labs_parts, of which this is the face
    *("Answer", "Arguments", "Asked", "CallStarted", "Conversation", "Limits", "Part", "Plan"),
    *("Reader", "Reasoning", "Result", "fold", "generate", "plan", "run", "stream"),
]
INSTALL = "pip install llguidance"
T = TypeVar("T", bound=Struct)


class Asked(Struct, frozen=True, kw_only=True):
    """What an answer is asked to be. tools: as OpenAI describes them.

    tool_choice: none, auto, required or the name of a tool. schema: of text, as a response_format.
    thinks: false where thinking was turned off; then none comes before calls that have to come.
    """

    tools: tuple[Any, ...] = ()
    tool_choice: str = "auto"
    parallel_tool_calls: bool = True
    schema: Any = None  # a JSON schema, or a labs_structured.Grammar
    thinks: bool = True


class Plan(Struct, frozen=True, eq=False):
    """An answer that is ready to run. generation: as labs.generate and an engine take it."""

    model: labs.Model
    inputs: labs.Inputs
    generation: labs.Generation
    given: labs.Generation
    form: labs_split.Form
    tools: tuple[labs_dialogue.Tool, ...]  # that may be called
    grammar: Any = None  # a labs_structured.Grammar, or a schema; None holds nothing
    banned: int | None = None  # the token that begins a call, where none may come

    def processors(self) -> tuple[Any, ...]:
        """Return logits processors for one answer; each answer needs new ones."""
        found: list[Any] = []
        if self.banned is not None:
            found.append(labs_limits.Ban(self.banned))
        if self.grammar is not None:
            import labs_typed

            found.append(labs_typed.Constraint(self.model, self.grammar))
        if (budget := self.given.thinking_budget) is not None:
            found.append(labs_limits.Budget(self, budget))
        return tuple(found)

    def reader(self) -> Reader:
        """Return what turns the events of one answer into parts."""
        splits = self.tools or self.form.reasoning or self.form.special
        splitter = self.splitter() if splits else None
        return Reader(self.model, self.given, splitter, self.inputs.prompt)

    def splitter(self) -> labs_split.Splitter:
        """Return a splitter at the beginning of the answer."""
        return labs_split.Splitter(
            self.form,
            names={tool.function.name for tool in self.tools},
            tools=[labs_values.typed(msgspec.to_builtins(tool)) for tool in self.tools],
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
    own: dict[str, Any] = dict.fromkeys(("reasoning", "thinking_budget"))
    own["skip_special_tokens"] = given.skip_special_tokens and not marked
    found = Plan(model, inputs, replace(given, **own), given, form, callable_)
    if tools and not callable_:
        found = replace(found, banned=_trigger(found))
    return _held(found, asked)


def _held(found: Plan, asked: Asked) -> Plan:
    """Return a plan with its grammar: a forced call follows its schema, if one can hold it."""
    tools = found.tools
    if asked.tool_choice not in ("none", "auto"):
        with contextlib.suppress(labs.InputError):
            strict = [replace(each, function=replace(each.function, strict=True)) for each in tools]
            return _compiled(found, _grammar(replace(found, tools=tuple(strict)), asked))
    return _compiled(found, _grammar(found, asked))


def _compiled(found: Plan, grammar: Any) -> Plan:
    held = replace(found, grammar=grammar)
    held.processors()
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
    """Return what holds the answer: a grammar, a schema, or None."""
    tools, choice = found.tools, asked.tool_choice
    if not tools and not found.form.reasoning:
        return asked.schema
    if not tools and asked.schema is None:
        return None
    demands = {
        "tool_choice": choice != "auto" and bool(tools),
        "parallel_tool_calls": not asked.parallel_tool_calls,
        "strict": any(tool.function.strict for tool in tools),
        getattr(asked.schema, "what", "response_format"): asked.schema is not None,
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
        parallel=asked.parallel_tool_calls and choice in ("none", "auto", "required"),
        schema=asked.schema,
        inside=found.form.starts_inside(found.inputs.prompt),
        thinks=asked.thinks,
    )
    return labs_grammar.write(found.form, goal, lambda text: labs_typed.symbols(found.model, text))


def _trigger(found: Plan) -> int | None:
    """Return the token that begins a call, if it is one token."""
    trigger = found.form.writing.trigger if found.form.writing else ""
    with found.model.lock:
        ids = found.model.tokenizer.encode(trigger, add_special_tokens=False)
    return ids[0] if len(ids) == 1 else None


# ---------------------------------------------------------------- in one call


def stream(
    model: labs.Model,
    messages: Iterable[Mapping[str, object] | labs.Message],
    generation: labs.Generation | None = None,
    **changes: Any,
) -> Iterator[Part]:
    """Generate an answer as parts. Closing the iterator stops computing.

    changes: fields of Asked (tools, tool_choice, …), of labs.Chat and of Generation. Raises
    labs' errors at the call, or GenerationError midway.
    """
    asked = _converted(changes, Asked)
    chat = _taken(changes, labs.Chat)
    if not labs_dialogue.thinks(chat.get("template_options") or {}):
        asked = replace(asked, thinks=False)
    options = labs.evolve(generation or labs.Generation(), **changes)
    inputs = labs.build_inputs(model, messages=messages, tools=asked.tools, **chat)
    return _parts_of(plan(model, inputs, options, asked))


def _taken(changes: dict[str, Any], kind: type[Struct]) -> dict[str, Any]:
    """Take the fields of a struct out of the changes."""
    return {name: changes.pop(name) for name in kind.__struct_fields__ if name in changes}


def _converted(changes: dict[str, Any], kind: type[T]) -> T:
    """Take the fields of a struct out of the changes. Raises InputError for a wrong type."""
    try:
        return msgspec.convert(_taken(changes, kind), kind)
    except msgspec.ValidationError as error:
        what, _, where = str(error).partition(" - at `$.")
        raise labs.InputError(f"{where.removesuffix('`')}: {what}") from error


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


# ---------------------------------------------------------------- Python functions as tools


class Limits(labs.Strict, frozen=True, kw_only=True):
    """Bounds of `run`. strict: arguments are held to the types of the functions."""

    max_turns: Annotated[int, Meta(ge=1, le=1000)] = 10
    call_timeout_s: labs.Seconds = 60.0
    strict: bool = False


class Result(Struct, frozen=True, tag="result"):
    """What a function returned, as text; failed: it raised an exception or took too long."""

    call: labs.ToolCall
    content: str
    failed: bool = False

    @property
    def message(self) -> labs.Message:
        """Return the result as a message, which follows that of the call."""
        name = self.call.function.name
        return labs.Message(role="tool", tool_call_id=self.call.id, name=name, content=self.content)


class Conversation(Struct, frozen=True, tag="conversation"):
    """The last event of a run: all messages, with those that were given."""

    messages: tuple[labs.Message, ...]


def run(
    model: labs.Model,
    messages: Iterable[Mapping[str, object] | labs.Message],
    tools: Sequence[Callable[..., Any]],
    generation: labs.Generation | None = None,
    **changes: Any,
) -> Iterator[Part | Result | Conversation]:
    """Answer with Python functions as tools: calls and results alternate until an answer has none.

    Each turn's parts come as in `stream`, then a Result for each call. tools: functions with type
    hints and a docstring that describes each argument, as transformers' get_json_schema reads it;
    nothing else is ever called. changes: fields of Limits, or as for `stream`. A tool_choice other
    than auto and none is for the first turn. A function that takes too long is not stopped, but not
    waited for.
    """
    limits = _converted(changes, Limits)
    known = {function.__name__: function for function in tools}
    if len(known) < len(tools):
        raise labs.InputError("tools: two functions have the same name")
    described = [_described(function, limits.strict) for function in tools]
    talk = labs.check_prompt(None, messages) or []
    model = model if model.prefixes else replace(model, prefixes=labs.new_prefixes())
    first = stream(model, talk, generation, tools=described, **changes)
    if changes.get("tool_choice") != "none":
        changes["tool_choice"] = "auto"
    follow = functools.partial(stream, model, generation=generation, tools=described, **changes)
    return _turns(first, follow, talk, functools.partial(_call, known, limits), limits.max_turns)


def _described(function: Callable[..., Any], strict: bool) -> dict[str, Any]:
    """Return a function as a tool in OpenAI's form."""
    from transformers.utils.chat_template_utils import get_json_schema

    try:
        found = get_json_schema(function)["function"]
    except Exception as error:  # it raises several kinds for hints and docstrings
        why = str(error).partition("\n")[0]
        raise labs.InputError(f"tools: {getattr(function, '__name__', function)}: {why}") from error
    names = ("name", "description", "parameters")
    return {"type": "function", "function": {**{n: found[n] for n in names}, "strict": strict}}


def _turns(
    parts: Iterator[Part],
    follow: Callable[..., Iterator[Part]],
    talk: list[labs.Message],
    call: Callable[[labs.ToolCall], Result],
    turns: int,
) -> Iterator[Part | Result | Conversation]:
    for turn in range(turns):
        seen = list[Part]()
        for part in follow(talk) if turn else parts:
            seen.append(part)
            yield part
        answer = fold(seen)
        talk = [*talk, answer.message] if answer.text or answer.tool_calls else talk
        for each in answer.tool_calls:
            yield (result := call(each))
            talk = [*talk, result.message]
        if not answer.tool_calls:
            break
    yield Conversation(tuple(talk))


def _call(known: Mapping[str, Callable[..., Any]], limits: Limits, call: labs.ToolCall) -> Result:
    """Call a function in a thread, with a limit of time; its exception becomes the result."""
    function, arguments = known[call.function.name], json.loads(call.function.arguments)
    done: queue.Queue[Result] = queue.Queue()

    def work() -> None:
        try:
            value = function(**arguments)
            value = asyncio.run(_awaited(value)) if inspect.isawaitable(value) else value
            done.put(Result(call, value if isinstance(value, str) else _as_json(value)))
        except BaseException as error:  # also SystemExit: the model is told what went wrong
            done.put(Result(call, f"error: {type(error).__name__}: {error}", failed=True))

    threading.Thread(target=work, daemon=True, name=f"tool {call.function.name}").start()
    try:
        return done.get(timeout=limits.call_timeout_s)
    except queue.Empty:
        late = f"error: no result within {limits.call_timeout_s:g} s"
        return Result(call, late, failed=True)


async def _awaited(value: Any) -> Any:
    return await value


def _as_json(value: Any) -> str:
    try:
        return msgspec.json.encode(value).decode()
    except TypeError:  # of a type that JSON does not have
        return str(value)
