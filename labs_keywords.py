# SPDX-License-Identifier: Apache-2.0
"""Schemas without the keywords that llguidance lacks, and with bounds for small models.

    text = labs_keywords.checked(schema)  # JSON, as labs_schema.check returns it
    schema = labs_keywords.bounded(schema)  # no undeclared fields, no endless numbers

dependencies, not, oneOf, if and others are written with anyOf, allOf, properties and required. What
is written allows nothing that the schema forbids. Where it cannot be written, the keyword stays,
and llguidance refuses it by name. Needs labs_schema.py.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Iterator
from typing import Any

import labs_schema
from labs_schema import LARGEST_INTEGER

WRITTEN = ("dependencies", "dependentRequired", "dependentSchemas", "not", "oneOf", "if")
KEYWORDS = {*WRITTEN, "then", "else", "uniqueItems", "format", "maximum", "minimum"}
KEYWORDS |= {"exclusiveMaximum", "exclusiveMinimum"}
TYPES = {"array", "boolean", "integer", "null", "number", "object", "string"}
NOTES = {"title", "description", "$comment", "default", "examples", "example", "deprecated"}
NOTES |= {"readOnly", "writeOnly", "$schema", "$id", "id", "definitions", "$defs"}
# What may be left out of a negation, which then allows less.
OPTIONAL = {"additionalProperties", "patternProperties", "minProperties", "maxProperties"}
NEGATED = {"type", "required", "properties", "anyOf", "allOf", "not"}
MAX_BRANCHES = 8  # of a oneOf, because each is compared with each
MAX_MERGED = 32  # branches of an anyOf
MAX_INSIDE = 6  # how deep branches are compared
# Formats whose texts are of another one, or match a pattern (RFC 3986, RFC 6901).
NARROWER = {"idn-email": "email", "idn-hostname": "hostname", "iri": "uri"}
_PART = r"([A-Za-z0-9._~!$&'()*+,;=@-]|%[0-9A-F]{2})"
PATTERNS = {
    "uri-reference": rf"^{_PART}*(/({_PART}|[:/])*)?(\?({_PART}|[:/?])*)?(#({_PART}|[:/?])*)?$",
    "json-pointer": r"^(/([^~/\x00-\x1F]|~[01])*)*$",
}
PATTERNS["iri-reference"] = PATTERNS["uri-reference"]
UPPER, LOWER = ("maximum", "exclusiveMaximum"), ("minimum", "exclusiveMinimum")


def checked(schema: Any) -> str:
    """Return a schema as JSON text, with keywords that llguidance has. Raises SchemaError."""
    text = labs_schema.check(schema)
    if not any(f'"{name}"' in text for name in KEYWORDS):
        return text
    written = _Rewriter(schema, merges=True).schema(schema)
    target = labs_schema.target
    lost = [r for r in _references(written) if target(r, written) is None is not target(r, schema)]
    if lost:
        written = _Rewriter(schema, merges=False).schema(schema)  # which leaves all in its place
    if written is False:
        raise labs_schema.SchemaError("# allows no answer")
    return labs_schema.check(written)  # again: it may be larger


def replaced(schema: Any, text: str) -> list[str]:
    """Return the keywords of a schema that its `checked` text does not have."""
    before = json.dumps(schema)
    return [name for name in WRITTEN if f'"{name}"' in before and f'"{name}"' not in text]


def bounded(schema: Any) -> Any:
    """Forbid fields that an object does not declare, and bound all numbers.

    Decoding would drop undeclared fields, and a small model may write digits endlessly.
    """
    if isinstance(schema, list):
        return [bounded(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    bounds: dict[str, Any] = {}
    if isinstance(schema.get("properties"), dict):
        bounds["additionalProperties"] = False
    if schema.get("type") in ("integer", "number"):
        bounds |= {} if "exclusiveMinimum" in schema else {"minimum": -LARGEST_INTEGER}
        bounds |= {} if "exclusiveMaximum" in schema else {"maximum": LARGEST_INTEGER}
    return {**bounds, **{key: _bounded_inside(key, value) for key, value in schema.items()}}


def _bounded_inside(name: str, value: Any) -> Any:
    """Return a keyword's value with bounds, unless it is data or says what another part is not."""
    role = labs_schema.ROLES.get(name)
    if role == "named" and isinstance(value, dict):
        return {key: bounded(each) for key, each in value.items()}
    return value if role or name in (*WRITTEN, "then", "else") else bounded(value)


class _Rewriter:
    """Writes a schema that labs_schema.check has measured, so that recursion is bounded."""

    def __init__(self, root: Any, *, merges: bool) -> None:
        self._root, self._merges = root, merges
        self._inlined = list[str]()

    def schema(self, value: Any) -> Any:
        """Return a schema, or a list of them, without the keywords."""
        if isinstance(value, list | tuple):
            return [self.schema(each) for each in value]
        if not isinstance(value, dict):
            return value
        kept, also = dict[str, Any](), list[Any]()
        for name, each in value.items():
            if name in KEYWORDS:
                also += self._keyword(name, each, value, kept)
            else:
                kept[name] = self._inside(name, each)
        return self._with(kept, also)

    def _with(self, kept: dict[str, Any], also: list[Any]) -> Any:
        """Return a schema and others that hold beside it, as an anyOf if it can be.

        llguidance refuses some schemas that refer to themselves beside another one.
        """
        if not also or False in also:
            return False if also else kept
        merges = self._merges and _is_mergeable(kept)
        simple = [each for each in also if merges and all(map(_is_simple, _branches(each)))]
        if math.prod(len(_branches(each)) for each in simple) > MAX_MERGED:
            simple = []
        rest = [each for each in also if each not in simple]
        notes = {name: each for name, each in kept.items() if name in NOTES}
        found = [{name: each for name, each in kept.items() if name not in NOTES}]
        for each in simple:
            pairs = itertools.product(found, _branches(each))
            found = [both for pair in pairs if (both := _merged(*pair)) is not None]
        if found == [{}] and len(rest) == 1 and isinstance(rest[0], dict):
            found, rest = rest, []
        if rest:
            found = [{**each, "allOf": [*each.get("allOf", ()), *rest]} for each in found]
        if not found:
            return False
        return {**notes, **(found[0] if len(found) == 1 else {"anyOf": found})}

    def _inside(self, name: str, value: Any) -> Any:
        role = labs_schema.ROLES.get(name)
        if role == "named" and isinstance(value, dict):
            return {key: self.schema(each) for key, each in value.items()}
        return value if role in ("data", "note") else self.schema(value)

    def _keyword(
        self, name: str, value: Any, whole: dict[str, Any], kept: dict[str, Any]
    ) -> list[Any]:
        """Return schemas that hold beside the rest; a keyword that stays is put into `kept`."""
        found: list[Any] | None = None
        if name.startswith("depend") and isinstance(value, dict):
            found = [self._dependency(key, each) for key, each in value.items()]
        elif name == "not":
            negated = self.negate(value, 0)
            found = None if negated is None else [self.schema(negated)]
        elif name == "oneOf" and isinstance(value, list | tuple):
            found = self._one_of(list(value))
        elif name == "if":
            found = self._condition(whole)
        elif name in ("then", "else"):
            found = None if "if" in kept else []
        elif name == "uniqueItems":
            alone = isinstance(most := whole.get("maxItems"), int) and most <= 1
            found = [] if value is False or alone else None
        elif name == "format" and isinstance(value, str) and value in PATTERNS:
            found = [{"pattern": PATTERNS[value]}]
        if found is None:
            kept[name] = self._plain(name, value)
        return found or []

    def _plain(self, name: str, value: Any) -> Any:
        """Return a keyword's value as llguidance reads it: a known format, a bound in reach."""
        if name == "format" and isinstance(value, str):
            return NARROWER.get(value, value)
        if name in UPPER and isinstance(value, int | float):
            return min(value, LARGEST_INTEGER)
        if name in LOWER and isinstance(value, int | float):
            return max(value, -LARGEST_INTEGER)
        return self.schema(value) if isinstance(value, dict | list) else value

    def _dependency(self, name: str, needed: Any) -> Any:
        """Return the schema of an object without a name, or with what has to come with it."""
        if isinstance(needed, list | tuple):
            beside: dict[str, Any] = {"required": [name, *needed]}
        else:
            beside = self._with({"required": [name]}, [self.schema(needed)])
        return {"anyOf": [{"properties": {name: False}}, beside]}

    def _condition(self, whole: dict[str, Any]) -> list[Any] | None:
        """Return the schemas of if, then and else, None if `if` cannot be negated."""
        first, then, other = whole["if"], whole.get("then", True), whole.get("else", True)
        negated = self.negate(first, 0)
        if negated is None:
            return None
        pairs = [[first, then], [negated, other]]
        return [{"anyOf": [{"allOf": [self.schema(each) for each in pair]} for pair in pairs]}]

    # ------------------------------------------------------------ oneOf

    def _one_of(self, branches: list[Any]) -> list[Any] | None:
        """Return an anyOf of branches that exclude each other, None if they cannot be written."""
        if len(branches) > MAX_BRANCHES:
            return None
        found = list[Any]()
        for place, branch in enumerate(branches):
            others = [each for at, each in enumerate(branches) if at != place]
            near = [each for each in others if not self._excludes(branch, each, 0)]
            without = [self.negate(each, 0) for each in near]
            if None in without:
                return None
            found.append(self._alone(branch, [self.schema(each) for each in without]))
        return [{"anyOf": [each for each in found if each is not False]}]

    def _alone(self, branch: Any, without: list[Any]) -> Any:
        """Return a branch that excludes others."""
        resolved, name = self._resolved(branch, 0), str(branch)
        if not without or not isinstance(resolved, dict) or name in self._inlined:
            written = self.schema(branch)
            return {"allOf": [written, *without]} if without else written
        self._inlined.append(name)
        written = self.schema(resolved)
        self._inlined.pop()
        return self._with(written, without) if isinstance(written, dict) else written

    def _excludes(self, one: Any, other: Any, depth: int) -> bool:
        """Return whether no value is of both schemas, as far as types and values show."""
        types = self._types(one, depth) & self._types(other, depth)
        if not types:
            return True
        one, other = self._resolved(one, depth), self._resolved(other, depth)
        if not (isinstance(one, dict) and isinstance(other, dict)) or depth > MAX_INSIDE:
            return one is False or other is False
        values = _values(one), _values(other)
        if values[0] is not None and values[1] is not None:
            return not values[0] & values[1]
        if types != {"object"}:
            return False
        named = [each.get("properties", {}) for each in (one, other)]
        if not all(isinstance(each, dict) for each in named):
            return False
        both = _names(one) & _names(other) & named[0].keys() & named[1].keys()
        return any(self._excludes(named[0][key], named[1][key], depth + 1) for key in both)

    def _resolved(self, schema: Any, depth: int) -> Any:
        """Return what a schema refers to, if it is only a reference."""
        for _ in range(MAX_INSIDE):
            if not isinstance(schema, dict) or not isinstance(schema.get("$ref"), str):
                break
            if schema.keys() - NOTES != {"$ref"}:
                break
            target = labs_schema.target(schema["$ref"], self._root)
            schema = {} if target is None else target
        return schema

    def _types(self, schema: Any, depth: int) -> set[str]:
        """Return the types that values of a schema may have."""
        schema = self._resolved(schema, depth)
        if not isinstance(schema, dict) or depth > MAX_INSIDE:
            return set() if schema is False else {*TYPES}
        found = {*TYPES}
        kinds = schema.get("type")
        if isinstance(kinds, str | list | tuple):
            found = {kinds} if isinstance(kinds, str) else {*filter(_is_text, kinds)}
            found |= {"integer"} if "number" in found else set()
        if (values := _values(schema)) is not None:
            found &= {kind for kind, _ in values}
        for name in ("anyOf", "oneOf"):
            if isinstance(each := schema.get(name), list | tuple):
                found &= set().union(*(self._types(branch, depth + 1) for branch in each))
        for each in schema.get("allOf", ()) if isinstance(schema.get("allOf"), list) else ():
            found &= self._types(each, depth + 1)
        return found

    # ------------------------------------------------------------ negations

    def negate(self, schema: Any, depth: int) -> Any:
        """Return a schema of no value that is of the given one, None if it cannot be written."""
        schema = self._resolved(schema, depth)
        if isinstance(schema, bool):
            return not schema
        if not isinstance(schema, dict) or depth > MAX_INSIDE:
            return None
        names = schema.keys() - NOTES
        if not names <= NEGATED | OPTIONAL:
            return None
        parts = [each for name in names & NEGATED for each in self._negations(name, schema, depth)]
        if None in parts or (names and not parts):
            return None
        return {"anyOf": parts} if parts else False

    def _negations(self, name: str, schema: dict[str, Any], depth: int) -> Iterator[Any]:
        """Yield schemas of values that a keyword forbids; None if it cannot be written."""
        value = schema[name]
        if name == "type":
            rest = sorted(TYPES - self._types({"type": value}, depth))
            rest = [kind for kind in rest if not (kind == "number" and "integer" not in rest)]
            yield {"type": rest} if rest else False
        elif name == "required" and isinstance(value, list | tuple):
            yield from ({"type": "object", "properties": {each: False}} for each in value)
        elif name == "properties" and isinstance(value, dict):
            for key, each in value.items():
                if (negated := self.negate(each, depth + 1)) not in (None, False):
                    yield {"type": "object", "required": [key], "properties": {key: negated}}
        elif name == "not":
            yield value
        elif name in ("anyOf", "allOf") and isinstance(value, list | tuple):
            all_ = [self.negate(each, depth + 1) for each in value]
            yield None if None in all_ else {"allOf" if name == "anyOf" else "anyOf": all_}
        else:
            yield None


def _references(schema: Any) -> Iterator[str]:
    """Yield the references in a schema that was written."""
    inner = schema.values() if isinstance(schema, dict) else schema
    for each in inner if isinstance(inner, Iterable) and not isinstance(inner, str) else ():
        yield from _references(each)
    if isinstance(schema, dict) and isinstance(schema.get("$ref"), str):
        yield schema["$ref"]


def _branches(schema: Any) -> list[Any]:
    only = isinstance(schema, dict) and schema.keys() == {"anyOf"}
    return list(schema["anyOf"]) if only else [schema]


def _is_mergeable(schema: dict[str, Any]) -> bool:
    """Return whether the keywords that `_merged` reads are as JSON Schema has them."""
    required, kinds = schema.get("required", []), schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    lists = isinstance(required, list) and isinstance(kinds, list)
    return lists and all(map(_is_text, [*required, *kinds])) and _is_named(schema)


def _is_named(schema: dict[str, Any]) -> bool:
    return isinstance(schema.get("properties", {}), dict)


def _is_simple(schema: Any) -> bool:
    """Return whether a schema has only keywords that `_merged` joins."""
    known = NOTES | {"type", "required", "properties"}
    return isinstance(schema, dict) and schema.keys() <= known and _is_mergeable(schema)


def _merged(base: dict[str, Any], part: dict[str, Any]) -> dict[str, Any] | None:
    """Return a schema that is both, None if none can be. part: a simple one."""
    kinds = _kinds(base.get("type")) & _kinds(part.get("type"))
    required = [*base.get("required", ()), *part.get("required", ())]
    named = dict(base.get("properties", {}))
    for name, each in part.get("properties", {}).items():
        before = named.get(name, base.get("additionalProperties", True))
        named[name] = _both(before, each)
    if not kinds or any(named.get(name) is False for name in required):
        return None
    kinds -= {"integer"} if "number" in kinds else set()
    found = dict(base)
    if "type" in part:
        found["type"] = min(kinds) if len(kinds) == 1 else sorted(kinds)
    found |= {"required": list(dict.fromkeys(required))} if required else {}
    found |= {"properties": named} if named else {}
    return found


def _both(one: Any, other: Any) -> Any:
    if one is False or other is False:
        return False
    return other if one in (True, {}) else {"allOf": [one, other]}


def _kinds(kinds: Any) -> set[str]:
    found = {*TYPES} if kinds is None else {kinds} if isinstance(kinds, str) else {*kinds}
    return found | {"integer"} if "number" in found else found


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _names(schema: dict[str, Any]) -> set[str]:
    """Return the names that an object needs."""
    required = schema.get("required")
    return {*filter(_is_text, required)} if isinstance(required, list | tuple) else set()


def _values(schema: dict[str, Any]) -> set[tuple[str, str]] | None:
    """Return the only values of a schema with their types, None for any."""
    if "const" in schema:
        return {_value(schema["const"])}
    values = schema.get("enum")
    return {_value(each) for each in values} if isinstance(values, list | tuple) else None


def _value(value: Any) -> tuple[str, str]:
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # 1.0 is 1
    kinds = {bool: "boolean", int: "integer", float: "number", str: "string", type(None): "null"}
    kind = kinds.get(type(value), "object" if isinstance(value, dict) else "array")
    return kind, json.dumps(value, sort_keys=True)
