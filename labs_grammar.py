# SPDX-License-Identifier: Apache-2.0
"""Write the grammar that holds an answer with reasoning, text and calls, for llguidance.

    text = labs_grammar.write(form, wanted, symbols)  # "%llguidance {} start: …"

symbols: turns a text into symbols of the grammar, see labs_typed.symbols. A grammar covers the
whole answer: reasoning is free, then text is free up to a call, and calls are held and end the
answer. Needs labs.py, labs_dialogue.py, labs_schema.py and labs_split.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

from msgspec import Struct

import labs
import labs_dialogue
import labs_schema
from labs_split import Form, Writing

# As json.dumps and chat templates write JSON; a small model may write white space endlessly.
GUIDANCE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
PLAIN = {"type", "description", "title", "default", "examples", "nullable"}
MOST_CALLS = 16  # in one answer; a small model may call endlessly
HEAD = "%llguidance {}\n"
RULES = """TEXT: /(.|\\n)*/
SPACE: /[ \\n]{0,4}/
NUMBER: /-?(0|[1-9][0-9]{0,15})(\\.[0-9]{1,16})?/
WORD: "true" | "false" | "null"
"""
Symbols = Callable[[str], list[str]]


class Wanted(Struct, frozen=True, kw_only=True):
    """What an answer has to be. tools: those that may be called. required: it has to be calls.

    schema: of an answer that is text, as JSON; None leaves text free. inside: it begins in
    reasoning.
    """

    tools: tuple[labs_dialogue.Tool, ...] = ()
    required: bool = False
    parallel: bool = True
    schema: dict[str, Any] | None = None
    inside: bool = False


def write(form: Form, wanted: Wanted, symbols: Symbols) -> str:
    """Return the grammar of an answer. Raises InputError for a schema that it cannot hold."""
    writing = form.writing if wanted.tools else None
    thinking, rules = _thinking(form, wanted, symbols)
    choices = list[str]()
    before = " ".join(symbols(writing.before)) if writing else ""
    if wanted.schema is not None and not wanted.required:
        choices.append(f"{before} answer")
        rules += f"answer: {_json(wanted.schema, 'response_format')}\n"
    elif not wanted.required:
        choices.append(f"{before} {'OTHER' if writing and writing.anchored else 'TEXT'}")
        rules += _other(writing) if writing and writing.anchored else ""
    if writing:
        free = not (wanted.required or wanted.schema or writing.anchored or before)
        lead, rule = _up_to("lead", writing.trigger, symbols) if free else ("", "")
        choices.append(f"{lead} calls")
        rules += rule + "".join(_calls(writing, wanted, symbols, after_trigger=free))
    return f"{HEAD}start: {thinking} ({' | '.join(choices)})\n{rules}{RULES}"


def _thinking(form: Form, wanted: Wanted, symbols: Symbols) -> tuple[str, str]:
    """Return the part of the first rule that lets a model think, and the rules for it."""
    if form.reasoning is None:
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
        head = " ".join(symbols(tool.function.name + writing.between))
        yield f"call_{index}: {head} call_{index}_arguments\n"
        yield from write_arguments[writing.arguments](f"call_{index}_arguments", tool, symbols)


# ---------------------------------------------------------------- arguments


def _schema_of(tool: labs_dialogue.Tool) -> dict[str, Any]:
    """Return the schema that holds the arguments of a tool."""
    _check(tool.schema, f"tools: {tool.function.name}")  # before anything recurses
    kind = tool.schema.get("type", "object")
    if kind != "object":
        name = tool.function.name
        raise labs.InputError(f"tools: the parameters of {name} are of the type {kind!r:.40}")
    return {"type": "object", **labs_schema.bounded(tool.schema)}


def _check(schema: Any, what: str) -> Any:
    """Return a schema as plain JSON. Raises InputError when it exceeds a bound."""
    try:
        return json.loads(labs_schema.check(schema))
    except labs_schema.SchemaError as error:
        raise labs.InputError(f"{what}: {error}") from error


def _json(schema: dict[str, Any], what: str) -> str:
    """Return a symbol for JSON of a schema. Raises InputError when the schema exceeds a bound."""
    return f"%json {json.dumps({**_check(schema, what), 'x-guidance': GUIDANCE})}"


def _json_arguments(rule: str, tool: labs_dialogue.Tool, symbols: Symbols) -> Iterator[str]:
    schema = _schema_of(tool)
    held = schema if tool.function.strict else {"type": "object"}
    yield f"{rule}: {_json(held, f'tools: {tool.function.name}')}\n"


def _xml_arguments(rule: str, tool: labs_dialogue.Tool, symbols: Symbols) -> Iterator[str]:
    """Yield rules for <parameter=NAME> elements, in the order of the schema if it is strict."""
    ends = f'{rule}_text "\\n"'
    # A value that holds an end of its element, or of the call, could not be read back.
    yield f"{rule}_text[lazy]: /(.|\\n)*<\\/parameter>/ & ~/(.|\\n)*<\\/function>(.|\\n)*/\n"
    if not tool.function.strict:
        yield f'{rule}: ("<parameter=" /[^>\\n]{{1,64}}/ ">\\n" {ends}){{0,64}}\n'
        return
    schema, parts = _schema_of(tool), list[str]()
    for index, (name, value) in enumerate(schema.get("properties", {}).items()):
        text = _plain_text(value)
        inner = ends if text == "any" else f'({text}) "\\n</parameter>\\n"'
        if text is None:
            root: dict[str, Any] = {k: schema[k] for k in ("$defs", "definitions") if k in schema}
            inner = (
                f'{_json({**root, **value}, f"tools: {tool.function.name}")} "\\n</parameter>\\n"'
            )
        yield f"{rule}_{index}: {json.dumps(f'<parameter={name}>' + chr(10))} {inner}\n"
        parts.append(f"{rule}_{index}" + ("" if name in schema.get("required", ()) else "?"))
    yield f"{rule}: {' '.join(parts)}\n"


def _plain_text(schema: Any) -> str | None:
    """Return "any" for a schema of any text, symbols for some texts, None if it holds no texts.

    Raises InputError for texts that are neither.
    """
    kinds = schema.get("type") if isinstance(schema, dict) else None
    texts = schema.get("enum", [schema["const"]] if "const" in schema else None) if kinds else None
    if texts is not None and all(isinstance(each, str) for each in texts):
        return " | ".join(json.dumps(each) for each in texts)
    if kinds == "string" and schema.keys() <= PLAIN:
        return "any"
    if kinds in ("integer", "number", "boolean", "null", "object", "array"):
        return None
    raise labs.InputError(f"tools: strict: this model's form of calls cannot hold {schema!r:.80}")


def _gemma_arguments(rule: str, tool: labs_dialogue.Tool, symbols: Symbols) -> Iterator[str]:
    """Yield rules for an object as Gemma writes it: {name:<|"|>text<|"|>,other:3}."""
    quote = '<|"|>'
    text, lazy = _up_to(f"{rule}_end", quote, symbols)
    text = " ".join([*symbols(quote), text])
    yield lazy
    if tool.function.strict:
        yield f"{rule}: {_gemma(_schema_of(tool), text)}\n"
        return
    yield f"{rule}_value: {text} | NUMBER | WORD | {rule} | {rule}_list\n"
    yield f'{rule}_list: "[" ({rule}_value ("," {rule}_value){{0,64}})? "]"\n'
    yield f"{rule}_pair: /[A-Za-z0-9_]{{1,64}}:/ {rule}_value\n"
    yield f'{rule}: "{{" ({rule}_pair ("," {rule}_pair){{0,64}})? "}}"\n'


def _gemma(schema: Any, text: str) -> str:
    """Return symbols for a value of a schema. Raises InputError for what they cannot hold."""
    kind = schema.get("type") if isinstance(schema, dict) else None
    if kind == "object" and isinstance(schema.get("properties"), dict):
        required = schema.get("required", ())
        if odd := next(
            (name for name in schema["properties"] if not re.fullmatch(r"\w+", name)), ""
        ):
            raise labs.InputError(f"tools: strict: this model writes no argument named {odd!r:.80}")
        pairs = [
            (f"{json.dumps(f'{name}:')} ({_gemma(value, text)})", name in required)
            for name, value in schema["properties"].items()
        ]
        return f'"{{" {_listed(pairs)} "}}"'
    if kind == "array" and schema.keys() <= PLAIN | {"items"}:
        item = _gemma(schema.get("items", {}), text)
        return f'"[" (({item}) ("," ({item})){{0,64}})? "]"'
    if kind in ("boolean", "null"):
        return '"null"' if kind == "null" else '("true" | "false")'
    if kind in ("integer", "number"):
        return _json(schema, "tools")
    found = _plain_text(schema)
    if found is not None:
        quote = text.partition(" ")[0]
        return text if found == "any" else f"{quote} ({found}) {quote}"
    raise labs.InputError(f"tools: strict: this model's form of calls cannot hold {schema!r:.80}")


def _listed(pairs: list[tuple[str, bool]]) -> str:
    """Return symbols for (pair, whether it is required), with commas between those that come."""
    first = next((n for n, (_, required) in enumerate(pairs) if required), None)
    if first is not None:
        parts = [f'({pair} ",")?' for pair, _ in pairs[:first]] + [pairs[first][0]]
        after = pairs[first + 1 :]
        return " ".join([*parts, *(f'("," {p})' + ("" if must else "?") for p, must in after)])
    heads = [
        " ".join([pair, *(f'("," {other})?' for other, _ in pairs[n + 1 :])])
        for n, (pair, _) in enumerate(pairs)
    ]
    return f"({' | '.join(heads)})?" if heads else ""
