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
labs_limits.py, labs_parts.py and labs_split.py; what is held needs labs_grammar.py, labs_typed.py
and llguidance.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Generator, Iterable, Iterator, Mapping
from typing import Any, cast

import msgspec
from msgspec import Struct
from msgspec.structs import replace

import labs
import labs_dialogue
import labs_forms
import labs_limits
import labs_split
from labs_parts import Answer, Part, Reader, fold

__all__ = [  # with the names of labs_parts, of which this is the face
    *("Answer", "Arguments", "Asked", "CallStarted", "Part", "Plan", "Reader", "Reasoning"),
    *("fold", "generate", "plan", "stream"),
]
INSTALL = "pip install llguidance"


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
        return Reader(self.model, self.given, self.splitter() if splits else None)

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
    own: dict[str, Any] = dict.fromkeys(("reasoning", "thinking_budget"))
    own["skip_special_tokens"] = given.skip_special_tokens and not marked
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
