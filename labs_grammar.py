# SPDX-License-Identifier: Apache-2.0
"""Write the grammar that holds an answer with reasoning, text and calls, for llguidance.

    grammar = labs_grammar.write(form, wanted, symbols)  # of "%llguidance {} start: …"

symbols: turns a text into symbols of the grammar, see labs_typed.symbols. A grammar covers the
whole answer: reasoning is free, then text is free up to a call, and calls are held and end the
answer. Needs labs.py, labs_dialogue.py, labs_keywords.py, labs_schema.py, labs_split.py,
labs_structured.py and labs_values.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

from msgspec import Struct

import labs
import labs_dialogue
import labs_keywords
import labs_schema
import labs_values
from labs_split import Form, Writing
from labs_structured import HEAD as UNFORCED
from labs_structured import Grammar

# As json.dumps and chat templates write JSON; a small model may write white space endlessly.
GUIDANCE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
# Any object. Its numbers are bounded too: Python cannot read 1e999.
NUMBER = labs_keywords.bounded({"type": "number"})
ITEM = {"$ref": "#/$defs/any"}
PLAINS = [{"type": "string"}, {"type": "boolean"}, {"type": "null"}, NUMBER]
ANY = [*PLAINS, {"type": "array", "items": ITEM}, {"type": "object", "additionalProperties": ITEM}]
FREE = {"type": "object", "additionalProperties": ITEM, "$defs": {"any": {"anyOf": ANY}}}
MOST_CALLS = 16  # in one answer; a small model may call endlessly
HEAD = "%llguidance {}\n"
RULES = """TEXT: /(.|\\n)*/
VISIBLE: /[^\\x01\\x02]*/
SPACE: /[ \\n]{0,4}/
NUMBER: /-?(0|[1-9][0-9]{0,15})(\\.[0-9]{1,16})?/
WORD: "true" | "false" | "null"
"""
Symbols = Callable[[str], list[str]]


class Wanted(Struct, frozen=True, kw_only=True):
    """What an answer has to be. tools: those that may be called. required: it has to be calls.

    schema: of an answer that is text, as JSON, or its grammar; None leaves text free. inside: it
    begins in reasoning. thinks: reasoning may begin before calls that it has to be.
    """

    tools: tuple[labs_dialogue.Tool, ...] = ()
    required: bool = False
    parallel: bool = True
    schema: dict[str, Any] | Grammar | None = None
    inside: bool = False
    thinks: bool = True


def write(form: Form, wanted: Wanted, symbols: Symbols) -> Grammar:
    """Return the grammar of an answer. Raises InputError for a schema that it cannot hold."""
    writing = form.writing if wanted.tools else None
    thinking, rules = _thinking(form, wanted, symbols)
    choices = list[str]()
    before = " ".join(symbols(writing.before)) if writing else ""
    if wanted.schema is not None and not wanted.required:
        choices.append(f"{before} answer")
        rules += f"answer: {_held(wanted.schema)}\n"
    elif not wanted.required:
        choices.append(f"{before} {'OTHER' if writing and writing.anchored else 'TEXT'}")
        rules += _other(writing) if writing and writing.anchored else ""
    if writing:
        free = not (wanted.required or wanted.schema or writing.anchored or before)
        lead, rule = _up_to("lead", writing.trigger, symbols) if free else ("", "")
        choices.append(f"{lead} calls")
        rules += rule + "".join(_calls(writing, wanted, symbols, after_trigger=free))
    head = UNFORCED if isinstance(wanted.schema, Grammar) else HEAD
    text = f"{head}start: {thinking} ({' | '.join(choices)})\n{rules}{RULES}"
    asked = ["tools"] if wanted.tools else []
    if wanted.schema is not None:
        asked.append(wanted.schema.what if isinstance(wanted.schema, Grammar) else "schema")
    return Grammar(text, " and ".join(asked))


def _thinking(form: Form, wanted: Wanted, symbols: Symbols) -> tuple[str, str]:
    """Return the part of the first rule that lets a model think, and the rules for it."""
    silent = wanted.required and not wanted.thinks and not wanted.inside
    if form.reasoning is None or silent:
        return "", ""
    thought, rule = _up_to("thought", form.reasoning[1], symbols)
    thought = " ".join([thought, *symbols(form.after_reasoning), "SPACE"])
    if wanted.inside:
        return thought, rule
    return f"({' '.join(symbols(form.reasoning[0]))} {thought})?", rule


def _up_to(name: str, marker: str, symbols: Symbols) -> tuple[str, str]:
    """Return symbols for any text up to a marker and that marker, and a rule if they need one."""
    first, *rest = symbols(marker)
    if first.startswith("<["):  # a special token, which TEXT cannot hold
        return " ".join(["TEXT", first, *rest]), ""
    return " ".join([name, *rest]), f"{name}[lazy]: /(.|\\n)*{_escaped(json.loads(first))}/\n"


def _escaped(text: str) -> str:
    """Return a text as a regular expression between slashes."""
    return re.sub(r"([][\\.+*?(){}|^$#&~/-])", r"\\\1", text).replace("\n", "\\n")


def _other(writing: Writing) -> str:
    """Return the rule of a text that does not begin like a call, whatever its white space."""
    begin = "\\s*".join(map(_escaped, re.findall(r"\w+|\W", writing.trigger.replace(" ", ""))))
    return f"OTHER: /(.|\\n)*/ & ~/\\s*{begin}(.|\\n)*/\n"


def _calls(
    writing: Writing, wanted: Wanted, symbols: Symbols, *, after_trigger: bool
) -> Iterator[str]:
    """Yield the rules of calls. after_trigger: the text that begins the first was written."""
    begin = f"{writing.head}{writing.begin}"
    first = begin.removeprefix(writing.trigger) if after_trigger else begin
    tail, more = " ".join(symbols(writing.tail)), ""
    if writing.parallel and wanted.parallel:
        following = " ".join(symbols(writing.separator + writing.begin))
        more = f"({following} call){{0,{MOST_CALLS - 1}}}"
    yield f"calls: {' '.join(symbols(first))} call {more} {tail}\n"
    names = " | ".join(f"call_{index}" for index, _ in enumerate(wanted.tools))
    yield f"call: ({names}) {' '.join(symbols(writing.end))}\n"
    write_arguments = {"json": _json_arguments, "xml": _xml_arguments, "gemma": _gemma_arguments}
    for index, tool in enumerate(wanted.tools):
        if (kind := tool.schema.get("type", "object")) != "object":
            name = tool.function.name
            raise labs.InputError(f"tools: the parameters of {name} are of the type {kind!r:.40}")
        head = " ".join(symbols(tool.function.name + writing.between))
        yield f"call_{index}: {head} call_{index}_arguments\n"
        yield from write_arguments[writing.arguments](f"call_{index}_arguments", tool, symbols)


# ---------------------------------------------------------------- arguments


def _schema_of(tool: labs_dialogue.Tool) -> dict[str, Any]:
    """Return the schema that holds the arguments of a tool."""
    _check(tool.schema, f"tools: {tool.function.name}")  # before anything recurses
    return {"type": "object", **labs_keywords.bounded(tool.schema)}


def _check(schema: Any, what: str) -> Any:
    """Return a schema as plain JSON. Raises InputError when it exceeds a bound."""
    try:
        return json.loads(labs_keywords.checked(schema))
    except labs_schema.SchemaError as error:
        raise labs.InputError(f"{what}: {error}") from error


def _held(schema: dict[str, Any] | Grammar) -> str:
    """Return a symbol for an answer that is text."""
    return schema.inner if isinstance(schema, Grammar) else _json(schema, "response_format")


def _json(schema: dict[str, Any], what: str) -> str:
    """Return a symbol for JSON of a schema. Raises InputError when the schema exceeds a bound."""
    return f"%json {json.dumps({**_check(schema, what), 'x-guidance': GUIDANCE})}"


def _json_arguments(rule: str, tool: labs_dialogue.Tool, symbols: Symbols) -> Iterator[str]:
    held = _schema_of(tool) if tool.function.strict else FREE
    yield f"{rule}: {_json(held, f'tools: {tool.function.name}')}\n"


def _xml_arguments(rule: str, tool: labs_dialogue.Tool, symbols: Symbols) -> Iterator[str]:
    """Yield rules for <parameter=NAME> elements, in the order of the schema if it is strict."""
    if not tool.function.strict:
        yield f"{rule}_text[lazy]: {labs_values.TEXT}\n"
        yield f'{rule}: ("<parameter=" /[^>\\n]{{1,64}}/ ">\\n" {rule}_text "\\n"){{0,64}}\n'
        return
    yield from labs_values.xml_arguments(rule, _schema_of(tool), _for(tool))


def _for(tool: labs_dialogue.Tool) -> Callable[[dict[str, Any]], str]:
    return lambda schema: _json(schema, f"tools: {tool.function.name}")


def _gemma_arguments(rule: str, tool: labs_dialogue.Tool, symbols: Symbols) -> Iterator[str]:
    """Yield rules for an object as Gemma writes it: {name:<|"|>text<|"|>,other:3}."""
    quote = '<|"|>'
    text, lazy = _up_to(f"{rule}_end", quote, symbols)
    # transformers' parser keeps two control characters for itself.
    text = " ".join([*symbols(quote), text]).replace("TEXT", "VISIBLE")
    yield lazy
    if tool.function.strict:
        yield from labs_values.gemma_arguments(rule, _schema_of(tool), text, _for(tool))
        return
    yield f"{rule}_value: {text} | NUMBER | WORD | {rule} | {rule}_list\n"
    yield f'{rule}_list: "[" ({rule}_value ("," {rule}_value){{0,64}})? "]"\n'
    yield f"{rule}_pair: /[A-Za-z0-9_]{{1,64}}:/ {rule}_value\n"
    yield f'{rule}: "{{" ({rule}_pair ("," {rule}_pair){{0,64}})? "}}"\n'
