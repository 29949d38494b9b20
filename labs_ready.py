# SPDX-License-Identifier: Apache-2.0
"""One answer that is ready to run: its inputs, what holds it, and how its events are read.

    take = ready.shown(filters)
    options = {"processors": ready.processors()}
    for event in labs.stream_generate(model, ready.inputs, ready.generation, **options):
        for part in take(event): ...  # labs.Delta, labs.Done, and others of labs_parts

labs_request.py makes them from requests. Needs labs.py, and the files of what an answer uses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from msgspec import Struct
from msgspec.structs import asdict, replace

import labs

if TYPE_CHECKING:
    import labs_guard
    import labs_parts
    import labs_structured
    import labs_typed

    Take = Callable[[labs.Event], list[labs_parts.Part]]
    Found = labs.Completion | labs_parts.Answer
    Schema = dict[str, Any] | labs_structured.Grammar


class Wanted(Struct, frozen=True, kw_only=True):
    """What is asked of an answer in a chat. named: what only a chat has, by the request's names.

    The other fields are those of labs_tools.Asked.
    """

    tools: tuple[Any, ...] = ()
    tool_choice: str = "auto"
    parallel_tool_calls: bool = True
    schema: Schema | None = None
    thinks: bool = True
    named: tuple[str, ...] = ()


class Ready(Struct, frozen=True, eq=False):
    """One answer. plan: of labs_tools; None if its text is left as it is.

    echo: of labs_score; None if the answer does not begin with its prompt.
    """

    model: labs.Model
    inputs: labs.Inputs
    generation: labs.Generation
    schema: Schema | None = None
    plan: Any = None
    echo: Any = None

    @property
    def held(self) -> bool:
        """Whether a schema or a grammar decides where the answer ends."""
        return (self.schema if self.plan is None else self.plan.grammar) is not None

    def processors(self) -> tuple[Any, ...]:
        """Return the logits processors of what is asked. Each answer needs new ones."""
        if self.plan is None:
            return constraints(self.model, self.schema)
        found: tuple[Any, ...] = self.plan.processors()
        return found

    def shown(self, filters: labs_guard.Filters | None) -> Take:
        """Return a function that maps the events of one answer to the parts to show."""
        take: Take = _unchanged if self.plan is None else self.plan.reader()
        take = take if self.echo is None else self.echo.expected(take)
        if filters is None:
            return take
        import labs_screen

        screen = labs_screen.Screen(filters, self.inputs, self.generation)
        return lambda event: [shown for part in take(event) for shown in screen(part)]

    def whole(self, filters: labs_guard.Filters | None, events: Sequence[labs.Event]) -> Found:
        """Return the whole answer of all its events, with the usage and timings of its row.

        The events are those of a loop without an engine: a prompt to show is put before them.
        """
        events = events if self.echo is None else self.echo.before(events)
        take, done = self.shown(filters), events[-1]
        found = self.fold([part for event in events for part in take(event)])
        if isinstance(done, labs.Done):
            usage = replace(done.usage, reasoning_tokens=found.usage.reasoning_tokens)
            found = replace(found, usage=usage, timings=done.timings)
        return found

    def fold(self, parts: Sequence[Any]) -> Found:
        """Join the parts of an answer, of which labs.Done or labs.Failed is the last."""
        if self.plan is None and not isinstance(parts[-1], labs.Failed):
            return labs.fold(parts[:-1], parts[-1])
        labs.require("labs_parts")
        import labs_parts

        return labs_parts.fold(parts)


def _unchanged(event: labs.Event) -> list[labs_parts.Part]:
    return [event]


def plan(
    model: labs.Model, inputs: labs.Inputs, generation: labs.Generation, wanted: Wanted
) -> Any:
    """Return a plan of labs_tools for a chat, or None where that file is not there.

    Raises InputError for what the model cannot say or no grammar holds.
    """
    try:
        labs.require("labs_tools")
    except labs.ConfigError:
        if wanted.named:
            raise
        return raw(model, wanted)
    if wanted.schema is not None:
        labs.require("labs_typed")
    import labs_tools

    names = labs_tools.Asked.__struct_fields__
    asked = labs_tools.Asked(**{name: getattr(wanted, name) for name in names})
    return labs_tools.plan(model, inputs, generation, asked)


def raw(model: labs.Model, wanted: Wanted) -> None:
    """Check what is asked of an answer whose text is left as it is. Raises InputError."""
    constraints(model, wanted.schema)


def constraints(model: labs.Model, schema: Schema | None) -> tuple[labs_typed.Constraint, ...]:
    """Return logits processors for a schema. Raises InputError if none can enforce it."""
    if schema is None:
        return ()
    labs.require("labs_typed")
    import labs_typed

    return (labs_typed.Constraint(model, schema),)


def seeded_choice(generation: labs.Generation, choice: int) -> labs.Generation:
    """Return the settings of a choice. Its number is added to a given seed, so choices differ."""
    if generation.seed is None:
        return generation
    return replace(generation, seed=(generation.seed + choice) % 2**63)


def fields_of(found: Found) -> dict[str, Any]:
    """Return the fields of a whole answer; reasoning and calls only if there are any."""
    fields, rest = asdict(found), ("reasoning", "tool_calls")
    fields.pop("runs", None)  # only labs_parts.unfold reads it
    return {name: value for name, value in fields.items() if value or name not in rest}
