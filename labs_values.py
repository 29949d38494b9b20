# SPDX-License-Identifier: Apache-2.0
"""Schemas of arguments that are not written as JSON: the types they allow, and rules for a grammar.

    tool = labs_values.typed(tool)  # for a splitter: each argument with all types that it may have
    rules = labs_values.xml_arguments("call_0_arguments", schema, json)  # as Qwen writes them
    rules = labs_values.gemma_arguments("call_0_arguments", schema, text, json)  # as Gemma does

json: turns a schema into a symbol of the grammar for JSON. A `$ref` and the branches of `anyOf` are
followed; a branch of free text is any text that would not be read as another branch. Needs labs.py
and labs_schema.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import labs
import labs_schema

# In this order a text is read as one of the types that it may have; "1" is a number before a truth.
TYPES = ("null", "integer", "number", "boolean", "object", "array", "string")
OF = {
    bool: "boolean",
    int: "integer",
    float: "number",
    str: "string",
    list: "array",
    dict: "object",
}
PLAIN = {"type", "description", "title", "default", "examples", "nullable", "deprecated"}
UNIONS = ("anyOf", "oneOf")
# How the texts begin that are read as a type, whatever they are held to.
BEGINS = {
    "object": r"\s*\{(.|\n)*",
    "array": r"\s*\[(.|\n)*",
    "integer": r"\s*[-+]?[.\d](.|\n)*",
    "number": r"\s*[-+]?[.\d](.|\n)*",
    "boolean": r"\s*([Tt][Rr][Uu][Ee]|[Ff][Aa][Ll][Ss][Ee]|[01])\s*",
}
Json = Callable[[dict[str, Any]], str]


# ---------------------------------------------------------------- the types of a schema


def typed(tool: dict[str, Any]) -> dict[str, Any]:
    """Return a tool whose arguments name all types that they may have, for reading their texts."""
    function = tool["function"]
    schema = function.get("parameters") or {}
    found = dict[str, Any]()
    for name, value in _named(schema).items():
        kinds = {kind for leaf in leaves(value, schema) for kind in _types(leaf)}
        found[name] = {"type": [kind for kind in TYPES if kind in kinds]}
    parameters = {"type": "object", "properties": found}
    return {**tool, "function": {**function, "parameters": parameters}}


def leaves(schema: Any, root: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the branches of a schema without its unions and references, in their order."""
    found, waiting, seen = list[dict[str, Any]](), [schema], set[str]()
    while waiting:
        each = waiting.pop()
        if not isinstance(each, dict):
            found.append({})
            continue
        inner = [
            branch for name in UNIONS if isinstance(each.get(name), list) for branch in each[name]
        ]
        inner += _only(each.get("allOf"))
        reference = each.get("$ref")
        if isinstance(reference, str) and reference not in seen:
            seen.add(reference)
            there = labs_schema.target(reference, root)
            inner.append({"$ref to nowhere": reference} if there is None else there)
        waiting += reversed(inner)
        if isinstance(reference, str) or inner:
            bounds = {name: each[name] for name in each.keys() - PLAIN - {*UNIONS, "$ref", "allOf"}}
            found += [bounds] if bounds else []  # of a union, which no branch has
        else:
            kinds = each.get("type")
            found += (
                [{**each, "type": kind} for kind in kinds] if isinstance(kinds, list) else [each]
            )
            found += [{"type": "null"}] if each.get("nullable") is True else []
    return found


def _only(parts: Any) -> list[Any]:
    """Return the schema in an allOf that has one, which older generators put around a $ref."""
    return parts if isinstance(parts, list) and len(parts) == 1 else []


def _types(leaf: dict[str, Any]) -> set[str]:
    """Return the types of a schema without unions and references; of none if it names none."""
    if isinstance(leaf.get("type"), str):
        return {leaf["type"]}
    return {OF.get(type(each), "null") for each in _values(leaf) or ()}


def _values(leaf: dict[str, Any]) -> list[Any] | None:
    """Return the only values that a schema allows, None for any."""
    if "const" in leaf:
        return [leaf["const"]]
    values = leaf.get("enum")
    if not isinstance(values, list):
        return None
    kind = leaf.get("type")
    return [v for v in values if not isinstance(kind, str) or _is(v, kind)]


def _is(value: Any, kind: str) -> bool:
    own = OF.get(type(value), "null")
    return own == kind or (kind, own) == ("number", "integer")


def _named(schema: dict[str, Any]) -> dict[str, Any]:
    named = schema.get("properties")
    return named if isinstance(named, dict) else {}


def _required(schema: dict[str, Any]) -> list[Any]:
    names = schema.get("required")
    return names if isinstance(names, list) else []


def _refuse(schema: Any) -> labs.InputError:
    text = "tools: strict: this model's form of calls cannot hold"
    return labs.InputError(f"{text} {schema!r:.80}")


# ---------------------------------------------------------------- as Qwen writes them


def xml_arguments(rule: str, schema: dict[str, Any], json_of: Json) -> Iterator[str]:
    """Yield rules for <parameter=NAME> elements, in the order of the schema."""
    parts = list[str]()
    roots: tuple[str, ...] = ("$defs", "definitions")
    root = {name: schema[name] for name in roots if name in schema}
    for index, (name, value) in enumerate(_named(schema).items()):
        own = f"{rule}_{index}"
        branches = leaves(value, schema) or [{}]
        if any(_types(each) & {"string"} or not _types(each) for each in branches):
            inner, rules = _mixed(own, branches, lambda s: json_of({**root, **s}))
            yield from rules
        else:
            inner = f'{json_of({**root, **value})} "\\n</parameter>\\n"'
        yield f"{own}: {json.dumps(f'<parameter={name}>' + chr(10))} ({inner})\n"
        parts.append(own + ("" if name in _required(schema) else "?"))
    yield f"{rule}: {' '.join(parts)}\n"


def _mixed(rule: str, branches: list[dict[str, Any]], json_of: Json) -> tuple[str, list[str]]:
    """Return symbols for a value one of whose branches is text, with the end of its element."""
    texts, others = set[str](), list[dict[str, Any]]()
    free = False
    for leaf in branches:
        values = _values(leaf)
        if values and leaf.keys() <= PLAIN | {"enum", "const"}:
            texts |= {v for v in values if isinstance(v, str)}
            rest = [v for v in values if not isinstance(v, str)]
            others += [{"enum": rest}] if rest else []
        elif leaf.get("type", "string") == "string" and leaf.keys() <= PLAIN:
            free = True
        elif leaf.get("type") in TYPES[:-1]:
            others.append(leaf)
        else:
            raise _refuse(leaf)
    held = [BEGINS[kind] for leaf in others for kind in _types(leaf) if _is_held(leaf, kind)]
    if odd := [text for each in held for text in texts if re.fullmatch(each, text)]:
        raise _refuse({"enum": odd})
    parts = [json_of(leaf) for leaf in others] + [json.dumps(text) for text in sorted(texts)]
    found = [f'({" | ".join(parts)}) "\\n</parameter>\\n"'] if parts else []
    if not free:
        return " | ".join(found), []
    but = "".join(f" & ~/{_slashed(each)}<\\/parameter>/" for each in dict.fromkeys(held))
    return " | ".join([*found, f'{rule}_text "\\n"']), [f"{rule}_text[lazy]: {TEXT}{but}\n"]


# A value that holds an end of its element, or of the call, could not be read back.
TEXT = r"/(.|\n)*<\/parameter>/ & ~/(.|\n)*<\/function>(.|\n)*/"


def _slashed(pattern: str) -> str:
    return pattern.replace("/", "\\/")


def _is_held(leaf: dict[str, Any], kind: str) -> bool:
    """Return whether a text that is read as this type may still not be of the schema."""
    free = PLAIN | ({"minimum", "maximum"} if _is_wide(leaf) else set())
    return kind in BEGINS and not leaf.keys() <= free


def _is_wide(leaf: dict[str, Any]) -> bool:
    """Return whether an integer's bounds are only those that labs_keywords.bounded gives to all."""
    most = labs_schema.LARGEST_INTEGER
    return (leaf.get("minimum"), leaf.get("maximum")) == (-most, most)


# ---------------------------------------------------------------- as Gemma writes them


def gemma_arguments(rule: str, schema: dict[str, Any], text: str, json_of: Json) -> Iterator[str]:
    """Yield rules for an object such as {name:<|"|>text<|"|>,other:3}. text: symbols for any."""
    writer = _Gemma(rule, schema, text, json_of)
    yield f"{rule}: {writer.value(schema)}\n"
    yield from writer.references()


class _Gemma:
    """Writes symbols for values; a reference becomes a rule, because it may be recursive."""

    def __init__(self, rule: str, root: dict[str, Any], text: str, json_of: Json) -> None:
        self._rule, self._root, self._text, self._json = rule, root, text, json_of
        self._known = dict[str, str]()

    def references(self) -> Iterator[str]:
        """Yield a rule for each reference, also for those that these rules have."""
        done = 0
        while done < len(self._known):
            reference, name = [*self._known.items()][done]
            yield f"{name}: {self.value(labs_schema.target(reference, self._root))}\n"
            done += 1

    def value(self, schema: Any) -> str:
        """Return symbols for a value of a schema. Raises InputError for what they cannot hold."""
        if not isinstance(schema, dict):
            raise _refuse(schema)
        unions = [schema[name] for name in UNIONS if name in schema]
        unions += [each] if (each := _only(schema.get("allOf"))) else []
        union = unions[0] if unions else None
        reference = isinstance(schema.get("$ref"), str)
        if (unions or reference) and (
            len(unions) + reference > 1
            or not schema.keys() <= PLAIN - {"type"} | {*UNIONS, "allOf", "$ref"}
        ):
            raise _refuse(schema)  # what bounds all branches
        if reference:
            return self._reference(schema["$ref"])
        if isinstance(kinds := schema.get("type"), list):
            union = [{**schema, "type": kind} for kind in kinds]
        if isinstance(union, list) and union:
            return f"({' | '.join(map(self.value, union))})"
        if schema.get("nullable") is True:
            return f'({self.value({**schema, "nullable": False})} | "null")'
        return self._plain(schema)

    def _reference(self, reference: str) -> str:
        return self._known.setdefault(reference, f"{self._rule}_ref_{len(self._known)}")

    def _plain(self, schema: dict[str, Any]) -> str:
        kind, values = schema.get("type"), _values(schema)
        if values is not None:
            if not values or not schema.keys() <= PLAIN | {"enum", "const"}:
                raise _refuse(schema)
            return f"({' | '.join(map(self._constant, values))})"
        if kind == "object" and isinstance(schema.get("properties"), dict):
            return self._object(schema)
        if kind == "array" and schema.keys() <= PLAIN | {"items"}:
            item = self.value(schema.get("items", {}))
            return f'"[" (({item}) ("," ({item})){{0,64}})? "]"'
        if kind in ("boolean", "null"):
            return '"null"' if kind == "null" else '("true" | "false")'
        if kind in ("integer", "number"):
            return self._json(schema)
        if kind == "string" and schema.keys() <= PLAIN:
            return self._text
        raise _refuse(schema)

    def _constant(self, value: Any) -> str:
        quote = self._text.partition(" ")[0]
        if isinstance(value, str):
            return f"{quote} {json.dumps(value)} {quote}" if value else f"{quote} {quote}"
        if isinstance(value, list | dict):
            raise _refuse({"const": value})
        return json.dumps(json.dumps(value))

    def _object(self, schema: dict[str, Any]) -> str:
        named, required = _named(schema), _required(schema)
        if odd := next((name for name in named if not re.fullmatch(r"\w+", name)), ""):
            raise labs.InputError(f"tools: strict: this model writes no argument named {odd!r:.80}")
        pairs = [
            (f"{json.dumps(f'{name}:')} ({self.value(value)})", name in required)
            for name, value in named.items()
        ]
        return f'"{{" {_listed(pairs)} "}}"'


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
