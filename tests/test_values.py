# SPDX-License-Identifier: Apache-2.0
"""Arguments that are not JSON may be of several types, also behind references."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest
import wire_forms
from test_tools import ASK, HELD, brief, modelled, said, tools  # noqa: F401 (a fixture)

import labs
import labs_tools
import labs_values

NONE = {"type": "null"}
SMALL = {"type": "integer", "minimum": 10, "maximum": 99}
POINT = {
    "type": "object",
    "properties": {"x": SMALL, "next": {"anyOf": [{"$ref": "#/$defs/point"}, NONE]}},
    "required": ["x", "next"],
}
COLOUR = {"enum": ["red", "blue"], "type": "string"}
DEFS = {"point": POINT, "colour": COLOUR}
KINDS: dict[str, dict[str, Any]] = {
    "an optional number": {"anyOf": [SMALL, NONE], "default": None, "title": "N"},
    "an optional reference": {"anyOf": [{"$ref": "#/$defs/point"}, NONE]},
    "a reference": {"$ref": "#/$defs/point", "description": "A point."},
    "an old reference": {"allOf": [{"$ref": "#/$defs/point"}], "description": "A point."},
    "a reference to texts": {"$ref": "#/$defs/colour"},
    "texts or null": {"anyOf": [{"$ref": "#/$defs/colour"}, NONE]},
    "text or null": {"anyOf": [{"type": "string"}, NONE]},
    "types": {"type": ["integer", "null"], "minimum": 3, "maximum": 5},
    "text or a number": {"anyOf": [{"type": "string"}, SMALL]},
    "text or an object": {"anyOf": [{"type": "string"}, {"$ref": "#/$defs/point"}]},
    "values": {"enum": [1, "two", None, True]},
    "one value": {"const": 5},
}


def taking(kind: dict[str, Any], *, strict: bool = True) -> list[dict[str, Any]]:
    parameters = {"type": "object", "properties": {"v": kind}, "required": ["v"], "$defs": DEFS}
    return tools({"name": "take", "parameters": parameters, "strict": strict})


@pytest.mark.parametrize("family", ["qwen_xml", "gemma4"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_strict_argument_of_several_types_is_held_and_read_back(kind, family, modelled):  # noqa: F811
    model, ended = modelled(family), 0
    given = taking(KINDS[kind])
    for seed in range(2):
        options = {**HELD, "seed": seed, "max_new_tokens": 250, **brief(model)}
        options |= {"tool_choice": "required", "parallel_tool_calls": False}
        answer = labs_tools.generate(model, ASK, tools=given, **options)
        assert answer.tool_calls or answer.finish_reason == "length", answer
        for each in answer.tool_calls:
            ended += 1
            found = json.loads(each.function.arguments)
            jsonschema.validate(found, given[0]["function"]["parameters"])
    free = family == "qwen_xml" and "text or" in kind  # a random model goes on
    assert ended or free


SAID: list[tuple[str, str, Any]] = [
    ("a reference", '{"x": 12, "next": null}', {"x": 12, "next": None}),
    ("an optional reference", "null", None),
    ("an optional number", "12", 12),
    ("texts or null", "red", "red"),
    ("text or null", "null", None),
    ("text or a number", "12", 12),
    ("text or a number", "a dozen", "a dozen"),
    ("text or an object", "{not JSON", "{not JSON"),
    ("values", "two", "two"),
    ("values", "1", 1),
    ("values", "true", True),
]


@pytest.mark.parametrize(("kind", "text", "expected"), SAID)
def test_a_text_is_read_as_a_type_that_its_schema_leads_to(kind, text, expected, modelled):  # noqa: F811
    call = wire_forms.written("qwen_xml", "take", {"v": text})
    for strict in (False, text != "{not JSON"):
        given = taking(KINDS[kind], strict=strict)
        answer = labs_tools.fold(said(modelled("qwen_xml"), f"</think>\n\n{call}", tools=given))
        assert json.loads(answer.tool_calls[0].function.arguments) == {"v": expected}


@pytest.mark.parametrize(("kind", "text"), [("text or an object", "{x"), ("text or a number", "5")])
def test_a_text_that_reads_as_a_branch_is_held_to_it(kind, text, modelled):  # noqa: F811
    call = wire_forms.written("qwen_xml", "take", {"v": text})
    given = taking(KINDS[kind])
    answer = labs_tools.fold(said(modelled("qwen_xml"), f"</think>\n\n{call}", tools=given))
    assert call not in answer.text
    for each in answer.tool_calls:
        jsonschema.validate(json.loads(each.function.arguments), given[0]["function"]["parameters"])


CYCLE: dict[str, Any] = {"anyOf": [{"$ref": "#/$defs/a"}, NONE]}


@pytest.mark.parametrize(
    "schema",
    [
        {"anyOf": [{"type": "string", "pattern": "a+"}, NONE]},
        {"anyOf": [{"type": "string"}, NONE], "minLength": 3},
        {"$ref": "#/$defs/nowhere"},
        {"anyOf": [{"enum": ["12"]}, SMALL]},
    ],
)
def test_what_cannot_be_held_is_refused_by_name(schema, modelled):  # noqa: F811
    with pytest.raises(labs.InputError, match="tools: "):
        labs_tools.stream(modelled("qwen_xml"), ASK, tools=taking(schema), tool_choice="required")


def test_branches_that_lead_to_one_another_end():
    root: dict[str, Any] = {"$defs": {"a": CYCLE}}
    assert labs_values.leaves(CYCLE, root) == [NONE, NONE]
    deep: Any = NONE
    for _ in range(5000):
        deep = {"anyOf": [deep]}
    assert labs_values.leaves(deep, {}) == [NONE]
