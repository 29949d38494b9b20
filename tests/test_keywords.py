# SPDX-License-Identifier: Apache-2.0
"""Keywords that llguidance lacks: what is written for them allows nothing that they forbid."""

from __future__ import annotations

import importlib
import itertools
import json
import os
import random
from typing import Any

import jsonschema
import pytest

import labs
import labs_keywords
import labs_schema
import labs_typed

LLGUIDANCE: Any = importlib.import_module("llguidance")
BYTES = LLGUIDANCE.LLTokenizer(labs_schema._Bytes())
VALUES = [None, True, 1, 2, "x", [], [1]]
NAMES = ["a", "b", "c"]
MANY, SEED = int(os.environ.get("LABS_SCHEMAS", "100")), int(os.environ.get("LABS_FUZZ_SEED", "8"))
OBJECTS = [
    dict(zip(names, values, strict=True))
    for count in range(4)
    for names in itertools.combinations(NAMES, count)
    for values in itertools.product([1, "x"], repeat=count)
]
INSTANCES = [*VALUES, *OBJECTS]
OPEN = {"type": "object", "properties": {name: {} for name in NAMES}}
CLOSED = {**OPEN, "additionalProperties": False}


def is_valid(schema: Any, value: Any) -> bool:
    kind = (
        jsonschema.Draft7Validator if "dependencies" in schema else jsonschema.Draft202012Validator
    )
    return bool(kind(schema).is_valid(value))


def allowed(schema: Any, values: list[Any]) -> list[Any] | str:
    """Return the values that are whole answers, or why the schema is refused."""
    try:
        text = labs_keywords.checked(schema)
    except labs_schema.SchemaError as error:
        return str(error)
    matcher = labs_schema.compiled(LLGUIDANCE, BYTES, text)
    if isinstance(matcher, str):
        return matcher
    found = []
    for value in values:
        ids = [*json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()]
        mine = matcher.deep_copy()
        if (
            mine.validate_tokens(ids) == len(ids)
            and mine.consume_tokens(ids)
            and mine.is_accepting()
        ):
            found.append(value)
    return found


EXACT: list[dict[str, Any]] = [
    {**CLOSED, "dependencies": {"a": ["b"]}},
    {**OPEN, "dependencies": {"a": ["b"], "b": ["a", "c"]}},
    {**CLOSED, "dependencies": {}},
    {**CLOSED, "dependencies": {"a": {"properties": {"b": {"type": "string"}}, "required": ["c"]}}},
    {**CLOSED, "dependentRequired": {"a": ["b"], "c": []}},
    {**CLOSED, "dependentSchemas": {"a": {"required": ["b"]}, "b": False}},
    {
        "dependentRequired": {"a": ["b"]},
        "type": ["object", "integer"],
        "properties": OPEN["properties"],
    },
    {**OPEN, "not": {"required": ["a"]}},
    {**CLOSED, "not": {"required": ["a", "b"]}},
    {**CLOSED, "not": {"allOf": [{"required": ["a"]}, {"required": ["b"]}]}},
    {**CLOSED, "not": {"anyOf": [{"required": ["a"]}, {"required": ["b"]}]}},
    {**CLOSED, "not": {"not": {"required": ["a"]}}},
    {**CLOSED, "properties": {"a": {"not": {}}, "b": {"not": {"type": "string"}}}},
    {"not": {"type": ["object", "array", "number"]}},
    {**CLOSED, "oneOf": [{"required": ["a"]}, {"required": ["b"]}]},
    {**CLOSED, "oneOf": [{"required": ["a"]}, {"required": ["b"]}, {"required": ["c"]}]},
    {"oneOf": [{"const": 1}, {"enum": ["x", 2]}, {"type": "boolean"}]},
    {"oneOf": [{"$ref": "#/$defs/one"}, {"type": "null"}], "$defs": {"one": {"type": "string"}}},
    {
        "oneOf": [
            {**CLOSED, "properties": {"a": {"const": 1}, "b": {}}, "required": ["a"]},
            {**CLOSED, "properties": {"a": {"const": "x"}, "c": {}}, "required": ["a"]},
        ]
    },
    {**CLOSED, "if": {"required": ["a"]}, "then": {"required": ["b"]}},
    {**CLOSED, "if": {"required": ["a"]}, "then": {"required": ["b"]}, "else": {"required": ["c"]}},
    {**CLOSED, "then": {"required": ["a"]}},
    {"type": "array", "items": {"const": 1}, "uniqueItems": False},
    {"type": "array", "items": {"const": 1}, "uniqueItems": True, "maxItems": 1},
    {"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1},
    {"type": "integer", "exclusiveMinimum": 1, "exclusiveMaximum": 10**30},
    {**CLOSED, "default": 10**40, "example": {"a": 1e300}},
]


@pytest.mark.parametrize("schema", EXACT)
def test_a_keyword_that_is_written_anew_allows_what_it_means(schema):
    assert allowed(schema, INSTANCES) == [each for each in INSTANCES if is_valid(schema, each)]


def random_schema(chance: random.Random, depth: int = 0) -> Any:
    kinds = ["object", "integer", "string", "null", ["object", "string"], ["integer", "number"]]
    inner = lambda: random_schema(chance, depth + 1)  # noqa: E731
    some = lambda: chance.sample(NAMES, chance.randint(0, 2))  # noqa: E731
    leaves: list[Any] = [{}, True, {"type": chance.choice(kinds)}, {"required": some()}]
    leaves += [{"const": chance.choice(VALUES)}, {"enum": chance.sample(VALUES, 2)}]
    if depth > 2:
        return chance.choice(leaves)
    made: list[Any] = [
        {"properties": {name: inner() for name in some()}, "required": some()},
        {"not": inner()},
        {"oneOf": [inner(), inner()]},
        {"anyOf": [inner(), inner()]},
        {"allOf": [inner(), inner()]},
        {"if": inner(), "then": inner(), "else": inner()},
        {"dependentRequired": {name: some() for name in some()}},
        {"dependentSchemas": {name: inner() for name in some()}},
        {"additionalProperties": chance.random() < 0.5},
        {"$ref": "#/$defs/d"},
    ]
    return {
        key: each
        for part in chance.choices([*leaves[2:], *made], k=2)
        for key, each in part.items()
    }


def test_no_random_schema_allows_what_it_forbids():
    chance, followed, exact = random.Random(SEED), 0, 0
    for _ in range(MANY):
        schema = random_schema(chance)
        schema["$defs"] = {"d": random_schema(chance, 2)}
        found = allowed(schema, INSTANCES)
        if isinstance(found, str):
            continue
        valid = [each for each in INSTANCES if is_valid(schema, each)]
        assert all(each in valid for each in found), (schema, labs_keywords.checked(schema))
        followed, exact = followed + 1, exact + (len(found) == len(valid))
    assert followed > MANY / 5
    assert exact > 0.6 * followed


KEPT = [
    ({**CLOSED, "required": ["a"], "not": {"required": ["a"]}}, "schema: # allows no answer"),
    (
        {**CLOSED, "allOf": [{"required": ["a"]}], "not": {"required": ["a"]}},
        "not cannot be followed",
    ),
    ({"type": "string", "not": {"pattern": "a"}}, "not"),
    ({"type": "object", "if": {"properties": {"a": {"pattern": "x"}}}, "then": {}}, "if"),
    ({"oneOf": [{"type": "string", "pattern": p} for p in "ab"]}, "oneOf"),
    ({"oneOf": [{"required": [name]} for name in "abcdefghi"]}, "oneOf"),
    ({"type": "array", "uniqueItems": True}, "uniqueItems"),
    ({"minimum": 10**30}, "#/minimum is beyond"),
    ({"const": 10**30}, "#/const is beyond"),
    ({"type": "string", "format": "nope"}, "nope"),
    ({**CLOSED, "not": {}}, "schema: # allows no answer"),
]


@pytest.mark.parametrize(("schema", "named"), KEPT)
def test_a_keyword_that_cannot_be_written_is_refused_by_its_name(tiny, schema, named):
    with pytest.raises(labs.InputError, match=named):
        labs_typed.Constraint(tiny, schema)


TEXTS = [
    (
        "uri-reference",
        ["", "a/b?c#d", "//x.y/z", "../a", "#f", "a%20b"],
        ["a b", "1:2 ", "%zz", "ü"],
    ),
    ("iri-reference", ["a/b"], ["a b"]),
    ("json-pointer", ["", "/a/b~0c", "/é"], ["a", "/~", "/~2"]),
    ("iri", ["https://x.y/z"], ["z z"]),
    ("idn-email", ["a@b.co"], ["a"]),
    ("idn-hostname", ["a.co"], ["a b"]),
]


@pytest.mark.parametrize(("format", "fits", "others"), TEXTS)
def test_a_format_is_followed_by_texts_that_are_of_it(format, fits, others):
    assert allowed({"type": "string", "format": format}, [*fits, *others]) == fits


def test_a_reference_into_what_is_written_anew_still_leads_there():
    schema = {**CLOSED, "dependencies": {"a": ["b"]}}
    schema["properties"] = {"a": {"const": 1}, "b": {"$ref": "#/properties/a"}}
    assert allowed(schema, [{"b": 1}, {"b": 2}, {"a": 1}, {"a": 1, "b": 1}]) == [
        {"b": 1},
        {"a": 1, "b": 1},
    ]


def test_bounds_are_put_where_values_are_and_not_into_data_or_negations():
    number = {"type": "integer"}
    schema = {
        "properties": {"not": number, "a": {"const": number}},
        "not": {"properties": {"b": {}}},
    }
    found = labs_keywords.bounded({**schema, "enum": [number], "items": [number]})
    most = labs_schema.LARGEST_INTEGER
    held = {**number, "minimum": -most, "maximum": most}
    assert found["properties"] == {"not": held, "a": {"const": number}}
    assert (found["not"], found["enum"], found["items"]) == (schema["not"], [number], [held])
    assert found["additionalProperties"] is False
