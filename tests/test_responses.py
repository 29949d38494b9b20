# SPDX-License-Identifier: Apache-2.0
"""OpenAI's Responses API: requests, items and events, whole and streamed, over many turns."""

from __future__ import annotations

import base64
import copy
import functools
import itertools
import json
import random
import re
import time
import typing
from collections.abc import Iterator
from typing import Any

import kit
import msgspec
import openai
import pytest
import wire_forms
from kit import A, Live, Site
from openai.types import responses as types
from openai.types.responses import (
    response_create_params,
    response_input_item_param,
    response_stream_event,
    tool_param,
)
from openai.types.shared_params import Reasoning
from pydantic import BaseModel
from test_tools import ADD, Answers, model_of
from test_tools_http import CALLED, GREEDY, THOUGHT, Scripted
from wire_forms import FORMS

import labs
import labs_api
import labs_dialogue
import labs_engine
import labs_forms
import labs_parts
import labs_protocol
import labs_response_input
import labs_response_tools
import labs_responses
import labs_split

PATH = kit.RESPONSES
ENCRYPTED = ["reasoning.encrypted_content"]
LOGPROBS = ["message.output_text.logprobs"]
WEATHER = {
    "type": "function",
    "name": "get_weather",
    "description": "The weather of a city.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
    "strict": True,
}
TOOL = {"type": "function", **ADD}
BRIEF = {"thinking_budget": 3, "max_output_tokens": 1500}


@pytest.fixture(scope="module")
def hermes(tmp_path_factory: Any) -> labs.Model:
    return model_of("hermes", tmp_path_factory.getbasetemp() / "form-hermes")


@pytest.fixture(scope="module")
def engine(hermes: labs.Model) -> Iterator[Any]:
    found = Scripted(labs_engine.Engine(hermes, labs.Server()))
    yield found
    found.engine.close(5)


@pytest.fixture
def tools_site(engine: Any) -> Site:
    engine.text = None
    return Site(engine, kit.configured(generation=GREEDY))


@pytest.fixture(scope="module")
def live(engine: Any) -> Iterator[Live]:
    found = Live(engine, kit.configured(generation=GREEDY))
    yield found
    found.close()


def events_of(answer: Any) -> list[dict[str, Any]]:
    """Return the events of a stream, whose names, types and numbers agree."""
    assert answer.status_code == 200, answer.text
    pairs = kit.events_of(answer.content)
    found = [json.loads(data) for _, data in pairs]
    assert [name for name, _ in pairs] == [each["type"] for each in found]
    assert [each["sequence_number"] for each in found] == [*range(len(found))]
    return found


def bare(response: dict[str, Any]) -> dict[str, Any]:
    """Return a response without its ids and times."""
    text = re.sub(r"\b(resp|msg|rs|fc)_[0-9a-f]{32}", r"\1", json.dumps(response))
    found: dict[str, Any] = json.loads(text)
    return {k: v for k, v in found.items() if k not in ("created_at", "completed_at")}


def said(site: Any, told: str | None, **body: Any) -> dict[str, Any]:
    """Return the response that is this text, after it was the same in a stream."""
    site.engine.text = told
    answer = site.post(PATH, {"input": "hi", **body})
    assert answer.status_code == 200, answer.text
    last = events_of(site.post(PATH, {"input": "hi", **body, "stream": True}))[-1]["response"]
    found: dict[str, Any] = answer.json
    for each in (last, found):
        each["usage"]["input_tokens_details"]["cached_tokens"] = 0
    assert bare(last) == bare(found)
    return found


# ---------------------------------------------------------------- tables of fields, items, events

BODY = labs_responses.ResponsesRequest


def names_of(kind: type[msgspec.Struct]) -> set[str]:
    return {each.encode_name for each in msgspec.structs.fields(kind)}


def kinds_of(union: Any) -> dict[str, Any]:
    """Return the members of a union of TypedDicts or models by their types."""
    found = {}
    for each in typing.get_args(union):
        if issubclass(each, BaseModel):
            hints = {name: field.annotation for name, field in each.model_fields.items()}
        else:
            hints = typing.get_type_hints(each)
        for kind in literals(hints["type"]):
            found.setdefault(kind, set()).update(hints)
    return found


def literals(hint: Any) -> Iterator[str]:
    for each in typing.get_args(hint):
        if isinstance(each, str):
            yield each
        else:
            yield from literals(each)


def test_every_field_of_openais_own_client_is_known_and_in_one_table():
    params = response_create_params.ResponseCreateParamsBase.__annotations__.keys()
    fields = labs_responses.FIELDS
    tables = [names_of(BODY), {*fields.neutral}, names_of(fields.hints)]
    assert params <= set.union(*tables)
    assert sum(map(len, tables)) == len(set.union(*tables))
    for kind, theirs in (
        (labs_responses.TextConfig, types.ResponseTextConfigParam),
        (labs_responses.ReasoningConfig, Reasoning),
        (labs_responses.ResponseStreamOptions, response_create_params.StreamOptions),
        (labs_response_tools.AllowedTools, types.ToolChoiceAllowedParam),
        (labs_response_tools.FunctionChoice, types.ToolChoiceFunctionParam),
        (labs_responses.JsonSchemaFormat, types.ResponseFormatTextJSONSchemaConfigParam),
        (labs_response_input.InputText, types.ResponseInputTextParam),
        (labs_response_input.OutputTextGiven, types.ResponseOutputTextParam),
    ):
        assert typing.get_type_hints(theirs).keys() - {"type"} <= names_of(kind), kind
    include = {*typing.get_args(types.ResponseIncludable)}
    assert include == {*typing.get_args(labs_responses.Include)}


UNKNOWN_ITEMS = {
    "additional_tools", "apply_patch_call", "apply_patch_call_output", "code_interpreter_call",
    "compaction", "compaction_trigger", "computer_call", "computer_call_output",
    "configuration_update", "custom_tool_call", "custom_tool_call_output", "file_search_call",
    "image_generation_call", "item_reference", "local_shell_call", "local_shell_call_output",
    "mcp_approval_request", "mcp_approval_response", "mcp_call", "mcp_list_tools", "program",
    "program_output", "shell_call", "shell_call_output", "tool_search_call",
    "tool_search_output", "web_search_call",
}  # fmt: skip
UNKNOWN_TOOLS = {
    "apply_patch", "code_interpreter", "computer", "computer_use_preview", "custom", "file_search",
    "image_generation", "local_shell", "mcp", "namespace", "programmatic_tool_calling", "shell",
    "tool_search", "web_search", "web_search_2025_08_26", "web_search_preview",
    "web_search_preview_2025_03_11",
}  # fmt: skip


def test_every_item_and_tool_of_openais_own_client_is_read_or_refused_by_its_type(site):
    items = kinds_of(response_input_item_param.ResponseInputItemParam)
    assert items.keys() - labs_response_input.ITEMS == UNKNOWN_ITEMS
    for kind, struct in labs_response_input.ITEMS.items():
        assert items[kind] <= names_of(struct), kind
    for kind in UNKNOWN_ITEMS:
        body = {"input": [{"role": "user", "content": "a"}, {"type": kind, "id": "x", "odd": 1}]}
        error = kit.refused(site.post(PATH, body), 400, code="unsupported", param="input[1]")
        assert kind in error["message"]
    tools = kinds_of(tool_param.ToolParam)
    assert tools.keys() - {"function"} == UNKNOWN_TOOLS
    assert tools["function"] <= names_of(labs_response_tools.FunctionTool)
    for kind in UNKNOWN_TOOLS:
        body = {"input": "a", "tools": [TOOL, {"type": kind, "name": "x", "odd": 1}]}
        error = kit.refused(site.post(PATH, body), 400, code="unsupported", param="tools[1]")
        assert kind in error["message"]
    assert not site.engine.asked


SENT = {
    "error",
    *(f"response.{name}" for name in ("created", "in_progress", "completed", "incomplete")),
    *("response.failed", "response.output_item.added", "response.output_item.done"),
    *("response.content_part.added", "response.content_part.done"),
    *(f"response.{kind}.{end}" for end in ("delta", "done")
      for kind in ("output_text", "reasoning_text", "function_call_arguments")),
}  # fmt: skip
NEVER = re.compile(  # of hosted tools, sounds, summaries, citations, queues; refusals are text
    r"response\.(audio|code_interpreter|compaction|custom_tool|file_search|image_gen|mcp_|queued"
    r"|output_text\.annotation|reasoning_summary|refusal|shell_call|web_search)"
)


def test_every_event_of_openais_own_client_is_sent_or_known_never_to_come():
    union, *_ = typing.get_args(response_stream_event.ResponseStreamEvent)
    theirs = kinds_of(union).keys()
    assert theirs >= SENT
    assert [each for each in theirs - SENT if not NEVER.match(each)] == []


GIVEN_TURN = {"type": "message", "role": "user", "content": "hi"}
CALL = {"type": "function_call", "call_id": "a", "name": "add", "arguments": '{"n": 1}'}
RESULT = {"type": "function_call_output", "call_id": "a", "output": "one"}
REASONED = {"type": "reasoning", "summary": [], "content": []}
FORMAT = {"format": {"type": "json_schema", "name": "a", "schema": {"type": "object"}}}
NO_SCHEMA = {"type": "json_schema", "name": "a", "schema": {"type": "nothing"}}
PLAIN: dict[str, Any] = {"input": [GIVEN_TURN], "stream": False}
ITEM_HINTS = {"id": "x", "status": "incomplete"}
ODD: dict[str, Any] = dict.fromkeys(("namespace", "caller", "async"), "odd")
# (struct, body, place in it, fields with a value that has an effect, hints)
FIELDS: list[tuple[Any, dict[str, Any], tuple[Any, ...], dict[str, Any], dict[str, Any]]] = [
    (BODY, PLAIN, (), {
        "input": "ho", "model": "other", "instructions": "Be.", "tools": [TOOL],
        "tool_choice": "required", "parallel_tool_calls": False, "text": FORMAT,
        "reasoning": {"effort": "high"}, "max_output_tokens": 3, "temperature": 0.25,
        "top_p": 0.5, "top_logprobs": 2, "frequency_penalty": -1.5, "presence_penalty": 1.25,
        "stream": True, "stream_options": {}, "metadata": {"a": "b"}, "max_tool_calls": 3,
        "prompt_cache_key": "k", "safety_identifier": "s", "user": "u", "top_k": 3, "min_p": 0.125,
        "repetition_penalty": 1.5, "logit_bias": {"5": -100.0}, "stop": "a", "seed": 9,
        "skip_special_tokens": False, "documents": True, "chat_template_kwargs": {"zip": 1},
        "thinking_budget": 3, "include": LOGPROBS,
     }, {}),
    (labs_responses.ResponseHints, PLAIN, (), {}, {
        "cache_prompt": True, "client_metadata": {"a": "b"}, "priority": 3, "store": True,
        "prompt_cache_options": {"mode": "explicit"}, "prompt_cache_retention": "24h",
        "request_id": "r", "service_tier": "flex",
     }),
    (labs_responses.TextConfig, {**PLAIN, "text": {}}, ("text",),
     {"format": FORMAT["format"], "verbosity": "low"}, {}),
    (labs_responses.JsonSchemaFormat, {**PLAIN, "text": FORMAT}, ("text", "format"),
     {"schema": {"type": "nothing"}, "name": "b", "description": "b", "strict": False}, {}),
    (labs_responses.ReasoningConfig, {**PLAIN, "reasoning": {}}, ("reasoning",),
     {"effort": "high", "context": "all_turns", "mode": "pro"},
     {"summary": "auto", "generate_summary": "auto"}),
    (labs_responses.ResponseStreamOptions, {**PLAIN, "stream": True, "stream_options": {}},
     ("stream_options",), {}, {"include_obfuscation": True}),
    (labs_response_input.MessageGiven, PLAIN, ("input", 0),
     {"role": "system", "content": "ho", "type": "odd"}, {**ITEM_HINTS, "phase": "commentary"}),
    (labs_response_input.InputText,
     {"input": [{**GIVEN_TURN, "content": [{"type": "input_text", "text": "a"}]}]},
     ("input", 0, "content", 0), {"text": "b"}, {"prompt_cache_breakpoint": {"mode": "explicit"}}),
    (labs_response_input.OutputTextGiven,
     {"input": [{"role": "assistant", "content": [{"type": "output_text", "text": "a"}]}]},
     ("input", 0, "content", 0), {"text": "b"}, {"annotations": [{}], "logprobs": [{}]}),
    (labs_response_input.RefusalGiven,
     {"input": [{"role": "assistant", "content": [{"type": "refusal", "refusal": "a"}]}]},
     ("input", 0, "content", 0), {"refusal": "b"}, {}),
    (labs_response_input.FunctionCallGiven, {"input": [CALL]}, ("input", 0),
     {"call_id": "b", "name": "b", "arguments": "{}", "type": "odd", **ODD}, ITEM_HINTS),
    (labs_response_input.FunctionCallOutput, {"input": [CALL, RESULT]}, ("input", 1),
     {"call_id": "b", "output": "b", "type": "odd", "namespace": "odd", "caller": "odd"},
     {**ITEM_HINTS, "name": "b"}),
    (labs_response_input.ReasoningGiven, {"input": [REASONED, CALL]}, ("input", 0),
     {"summary": [{"type": "summary_text", "text": "b"}], "type": "odd",
      "content": [{"type": "reasoning_text", "text": "c"}],
      "encrypted_content": labs_response_input.seal("d")}, ITEM_HINTS),
    (labs_response_input.SummaryText,
     {"input": [{**REASONED, "summary": [{"type": "summary_text", "text": "a"}]}, CALL]},
     ("input", 0, "summary", 0), {"text": "b", "type": "odd"}, {}),
    (labs_response_input.ReasoningTextGiven,
     {"input": [{**REASONED, "content": [{"type": "reasoning_text", "text": "a"}]}, CALL]},
     ("input", 0, "content", 0), {"text": "b", "type": "odd"}, {}),
    (labs_response_tools.FunctionTool, {**PLAIN, "tools": [{"type": "function", "name": "f"}]},
     ("tools", 0),
     {"type": "odd", "name": "g", "description": "d", "parameters": {"type": "object"},
      "strict": True, "defer_loading": True, "allowed_callers": ["programmatic"],
      "output_schema": {}, "async": True}, {}),
    (labs_response_tools.NamedChoice,
     {**PLAIN, "tools": [TOOL], "tool_choice": {
         "type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "add"}]}},
     ("tool_choice", "tools", 0), {"type": "odd", "name": "odd"}, {}),
    (labs_response_tools.AllowedTools,
     {**PLAIN, "tools": [TOOL], "tool_choice": {
         "type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "add"}]}},
     ("tool_choice",), {"mode": "required", "tools": []}, {}),
    (labs_response_tools.FunctionChoice,
     {**PLAIN, "tools": [TOOL], "tool_choice": {"type": "function", "name": "add"}},
     ("tool_choice",), {"name": "odd"}, {}),
]  # fmt: skip
READING = (  # of all fields of messages and tools, with calls as Hermes writes them
    "{% for m in messages %}{{ m.role ~ m.content ~ (m.tool_call_id or '') "
    "~ (m.reasoning_content or '') }}{% for c in m.tool_calls or [] %}{{ c.id }}<tool_call>\n"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n'
    "</tool_call>{% endfor %};{% endfor %}{% for t in tools or [] %}{{ t | tojson }}{% endfor %}"
    "{{ reasoning_effort }}"
)


@pytest.mark.parametrize(
    ("kind", "body", "place", "effective", "hints"), FIELDS, ids=[x[0].__name__ for x in FIELDS]
)
def test_every_field_of_a_request_has_an_effect_or_is_a_hint(
    hermes, kind, body, place, effective, hints
):
    site = Site(kit.FakeEngine(kit.with_template(hermes, READING)), kit.configured())

    def outcome(**fields: Any) -> Any:
        sent = copy.deepcopy(body)
        functools.reduce(lambda inner, key: inner[key], place, sent).update(fields)
        site.engine.asked = []
        answer = site.post(PATH, sent, X_Request_Id="one")
        text = re.sub(r'"(created|completed)_at":\d+|"[a-z_]+_s":[^,}]+', "", answer.text)
        return answer.status_code, answer.headers["content-type"], text, site.engine.asked

    assert effective.keys() | hints.keys() == names_of(kind)
    assert (plain := outcome())[0] == 200, plain[2]
    for name, value in {**effective, **hints}.items():
        assert (outcome(**{name: value}) == plain) == (name in hints), name


REFUSED_VALUES = {
    "background": True, "truncation": "auto", "context_management": [{"type": "compaction"}],
}  # fmt: skip


@pytest.mark.parametrize("name", labs_responses.FIELDS.neutral)
def test_a_field_that_is_not_implemented_takes_neutral_values_only(site, name):
    body = {"input": "a", name: REFUSED_VALUES.get(name, "odd")}
    kit.refused(site.post(PATH, body), 400, code="unsupported", param=name)
    assert not site.engine.asked
    for value in (None, *labs_responses.FIELDS.neutral[name]):
        assert site.post(PATH, {"input": "a", name: value}).status_code == 200


def test_what_would_need_storage_is_refused_in_words_that_help(site):
    for name in ("previous_response_id", "conversation"):
        error = kit.error_of(site.post(PATH, {"input": "a", name: "resp_1"}), 400)
        assert "use input with all earlier items" in error["message"]
    for store in (True, False, None):
        assert site.post(PATH, {"input": "a", "store": store}).json["store"] is False
    for method, path in (
        *(("GET", "/resp_1"), ("DELETE", "/resp_1"), ("GET", "/resp_1/input_items")),
        *(("POST", "/resp_1/cancel"), ("POST", "/compact"), ("POST", "/input_tokens")),
    ):
        error = kit.refused(site.ask(method, PATH + path), 404, code="not_stored")
        assert "stores no responses" in error["message"]
    error = kit.error_of(site.get(PATH), 405)
    assert (error["code"], "use POST" in error["message"]) == ("method_not_allowed", True)


WRONG: list[tuple[Any, str | None]] = [
    ({}, "input"),
    ({"input": ""}, "input"),
    ({"input": []}, "input"),
    ({"input": 5}, "input"),
    ({"input": [5]}, "input[0]"),
    ({"input": [{"type": 5}]}, "input[0]"),
    ({"input": [{"role": "wizard", "content": "a"}]}, "input[0].role"),
    ({"input": [{"role": "user"}]}, "content"),
    ({"input": [{"role": "user", "content": 5}]}, "input[0].content"),
    ({"input": [{"role": "user", "content": [{"type": "odd"}]}]}, "input[0].content[0].type"),
    ({"input": [{"role": "user", "content": "a", "odd": 1}]}, "odd"),
    ({"input": [{"id": "msg_1"}]}, "input[0]"),
    ({"input": [RESULT]}, "input[0].call_id"),
    ({"input": [{**CALL, "arguments": "[1]"}]}, "input[0].arguments"),
    ({"input": [{**CALL, "arguments": "{"}]}, "input[0].arguments"),
    ({"input": [{**CALL, "arguments": '{"a": NaN}'}]}, "input[0].arguments"),
    ({"input": [{**CALL, "arguments": '{"a": 1e999}'}]}, "input[0].arguments"),
    ({"input": [{**CALL, "arguments": '{"a": "\\ud800"}'}]}, "input[0].arguments"),
    ({"messages": []}, "messages"),
    ({"input": [{**REASONED, "encrypted_content": "gAAAA"}]}, "input[0].encrypted_content"),
    ({"input": "a", "include": ["odd"]}, "include[0]"),
    ({"input": "a", "top_logprobs": 2}, "top_logprobs"),
    ({"input": "a", "top_logprobs": 21, "include": LOGPROBS}, "top_logprobs"),
    ({"input": "a", "stream_options": {}}, "stream_options"),
    ({"input": "a", "max_output_tokens": 0}, "max_output_tokens"),
    ({"input": "a", "n": 2}, "n"),
    ({"input": "a", "max_tokens": 2}, "max_tokens"),
    ({"input": "a", "text": {"format": {"type": "odd"}}}, "text.format.type"),
    ({"input": "a", "text": {"format": {"type": "json_schema"}}}, "schema"),
    ({"input": "a", "tools": [{"type": "function", "function": ADD}]}, None),
    ({"input": "a", "tools": [{"name": "f"}]}, None),
    ({"input": "a", "tools": [5]}, "tools[0]"),
    ({"input": "a", "tools": [TOOL], "tool_choice": "fly"}, "tool_choice"),
    ({"input": "a", "tools": [TOOL], "tool_choice": {"type": "web_search"}}, "tool_choice.type"),
    ({"input": "a", "tools": [TOOL], "tool_choice": {"type": "function", "name": "auto"}},
     "tool_choice"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "param"), WRONG, ids=lambda each: str(each)[:60])
def test_a_wrong_value_is_refused_and_named(site, body, param):
    error = kit.error_of(site.post(PATH, body), 400)
    assert param is None or error["param"] == param, error
    assert not site.engine.asked


@pytest.mark.parametrize("kind", ["input_image", "input_file", "input_audio"])
def test_what_is_not_text_is_refused_in_words_and_by_its_place(site, kind):
    part = {"type": kind, "image_url": "data:image/png;base64,AA", "detail": "auto"}
    text = {"type": "input_text", "text": "a"}
    turns = [{"role": "user", "content": [text, part]}]
    error = kit.refused(
        site.post(PATH, {"input": turns}), 400, code="unsupported", param="input[0].content[1]"
    )
    assert "describe it in an input_text" in error["message"]
    turns = [CALL, {**RESULT, "output": [part]}]
    kit.refused(site.post(PATH, {"input": turns}), 400, param="input[1].output[0]")


def test_a_prompt_that_does_not_fit_is_refused_in_words_that_clients_know(site):
    for stream in (False, True):
        answer = site.post(PATH, {"input": "a" * 4200, "stream": stream})
        kit.refused(answer, 400, code="context_length_exceeded", param="input")


# ---------------------------------------------------------------- items become messages


def messages_of(*items: Any, instructions: str | None = None) -> list[dict[str, Any]]:
    raw = [msgspec.Raw(json.dumps(item).encode()) for item in items]
    found = labs_response_input.messages_of(instructions, raw)
    labs_dialogue.check(found)
    return [msgspec.to_builtins(message) for message in found]


def reasoned(text: str) -> dict[str, Any]:
    return {**REASONED, "content": [{"type": "reasoning_text", "text": text}]}


def texted(text: str, role: str = "assistant") -> dict[str, Any]:
    kind = "output_text" if role == "assistant" else "input_text"
    return {"type": "message", "role": role, "content": [{"type": kind, "text": text}]}


def test_system_and_developer_messages_at_the_beginning_are_one():
    found = messages_of(
        texted("b", "developer"), texted("c", "system"), texted("d", "user"),
        texted("e", "developer"), instructions="a",
    )  # fmt: skip
    assert [(each["role"], each["content"]) for each in found] == [
        ("system", "a\n\nb\n\nc"), ("user", "d"), ("system", "e"),
    ]  # fmt: skip


def test_the_items_of_an_answer_are_one_message_and_its_results_follow():
    other = {**CALL, "call_id": "b"}
    found = messages_of(
        texted("q", "user"), reasoned("hm"), texted("See:"), CALL, other,
        {**RESULT, "call_id": "b"}, RESULT, reasoned("so"), texted("Done"), texted("q", "user"),
    )  # fmt: skip
    assert [each["role"] for each in found] == [
        *("user", "assistant", "tool", "tool", "assistant", "user"),
    ]
    assert (found[1]["reasoning_content"], found[1]["content"]) == ("hm", "See:")
    assert [call["id"] for call in found[1]["tool_calls"]] == ["a", "b"]
    assert (found[4]["reasoning_content"], found[4]["content"]) == ("so", "Done")


def test_texts_beside_calls_stay_in_one_message_and_separate_answers_do_not():
    (found, _) = messages_of(CALL, texted("a"), {**CALL, "call_id": "b"}, RESULT)
    assert (found["content"], len(found["tool_calls"])) == ("a", 2)
    assert [each["content"] for each in messages_of(texted("a"), texted("b"))] == ["a", "b"]
    refusal = {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}
    assert messages_of(refusal)[0]["content"] == "no"
    parts = [{"type": "input_text", "text": text} for text in ("a", "b")]
    assert messages_of(CALL, {**RESULT, "output": parts})[1]["content"] == "ab"


@pytest.mark.parametrize("text", ["", "hm", "é日本😀\n" * 999, "\0"])
def test_reasoning_comes_back_by_its_encrypted_content_alone(text):
    sealed = labs_response_input.seal(text)
    assert labs_response_input.unseal(sealed) == text
    item = {"type": "reasoning", "summary": [], "encrypted_content": sealed}
    assert messages_of(item, CALL)[0].get("reasoning_content", "") == text


def test_encrypted_content_that_is_damaged_or_foreign_is_refused():
    sealed, chance = labs_response_input.seal("hm, so"), random.Random(3)
    wrong = ["gAAAAABo", "", "é", "a", base64.b64encode(b"labs1").decode(), sealed[:-4]]
    for _ in range(300):
        at, letter = chance.randrange(len(sealed)), chance.choice("aZ9+/=")
        wrong.append(sealed[:at] + letter + sealed[at + 1 :])
    for each in {*wrong} - {sealed}:
        item = {"type": "reasoning", "encrypted_content": each or "a"}
        with pytest.raises(labs.InputError, match=r"input\[0\]\.encrypted_content is damaged"):
            messages_of(item, CALL)


# ---------------------------------------------------------------- whole and streamed

ADDED = {"type": "function_call", "name": "add", "arguments": '{"n": 1}', "status": "completed"}
# What the model says, and the kinds of the items that it makes.
SAID: list[tuple[str, list[tuple[str, str]], str]] = [
    ("Hello", [("message", "Hello")], "completed"),
    ("", [("message", "")], "completed"),
    (f"{THOUGHT}Hi", [("reasoning", "hm"), ("message", "Hi")], "completed"),
    (CALLED, [("function_call", '{"n": 1}')], "completed"),
    (f"{THOUGHT}{CALLED}", [("reasoning", "hm"), ("function_call", '{"n": 1}')], "completed"),
    (f"See:\n{CALLED}", [("message", "See:"), ("function_call", '{"n": 1}')], "completed"),
    (f"{CALLED}\n{CALLED}", [("function_call", '{"n": 1}')] * 2, "completed"),
    ("<think>\n" + "hm" * 200, [("reasoning", "hm" * 149)], "incomplete"),
]


def shown(item: dict[str, Any]) -> tuple[str, str]:
    if item["type"] == "function_call":
        return "function_call", item["arguments"]
    return item["type"], "".join(part["text"] for part in item["content"]).rstrip()


@pytest.mark.parametrize(("text", "items", "status"), SAID)
def test_an_answer_is_its_items_in_order_whole_and_streamed(text, items, status, tools_site):
    found = said(tools_site, text, tools=[TOOL], max_output_tokens=300)
    assert [shown(item) for item in found["output"]] == [
        (kind, each.rstrip()) for kind, each in items
    ]
    assert found["status"] == status
    reason = {"reason": "max_output_tokens"} if status == "incomplete" else None
    assert found["incomplete_details"] == reason
    assert {item["status"] for item in found["output"]} == {status}
    assert len({item["id"] for item in found["output"]}) == len(items)
    assert (found["completed_at"] is None) == (status == "incomplete")


def rebuilt(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the items that a client makes of the events, each checked against its done events."""
    output: list[Any] = []
    for event in events:
        name, at = event["type"].removeprefix("response."), event.get("output_index")
        if name == "output_item.added":
            assert at == len(output)
            assert event["item"]["status"] == "in_progress"
            output.append(copy.deepcopy(event["item"]))
            continue
        if at is None:
            continue
        item = output[at]
        assert event.get("item_id", item["id"]) == item["id"]
        if name == "content_part.added":
            item["content"].append(event["part"])
        elif name == "function_call_arguments.delta":
            item["arguments"] += event["delta"]
        elif name.endswith(".delta"):
            item["content"][event["content_index"]]["text"] += event["delta"]
            if "logprobs" in event:
                item["content"][event["content_index"]]["logprobs"] += event["logprobs"]
        elif name == "function_call_arguments.done":
            assert event["arguments"] == item["arguments"]
        elif name == "content_part.done":
            assert event["part"] == item["content"][event["content_index"]]
        elif name == "output_item.done":
            changes = {
                k: event["item"][k] for k in ("status", "encrypted_content") if k in event["item"]
            }
            item.update(changes)
            assert event["item"] == item
        else:
            assert event["text"] == item["content"][event["content_index"]]["text"]
    return output


def test_the_events_of_a_stream_come_in_openais_order_with_numbers(tools_site):
    tools_site.engine.text = f"{THOUGHT}See:\n{CALLED}"
    body = {"input": "hi", "tools": [TOOL], "stream": True, "include": ENCRYPTED}
    events = events_of(tools_site.post(PATH, body))
    names = [each["type"].removeprefix("response.") for each in events]
    assert [name for name, _ in itertools.groupby(names)] == [
        *("created", "in_progress"),
        *("output_item.added", "content_part.added", "reasoning_text.delta"),
        *("reasoning_text.done", "content_part.done", "output_item.done"),
        *("output_item.added", "content_part.added", "output_text.delta"),
        *("output_text.done", "content_part.done", "output_item.done"),
        *("output_item.added", "function_call_arguments.delta", "function_call_arguments.done"),
        *("output_item.done", "completed"),
    ]
    assert {f"response.{name}" for name in names} <= SENT
    assert rebuilt(events) == events[-1]["response"]["output"]
    begun = [events[0]["response"], events[1]["response"]]
    assert begun[0] == begun[1]
    assert (begun[0]["status"], begun[0]["output"], begun[0]["usage"]) == ("in_progress", [], None)


class Told:
    """A model's parts by random cuts of a text, as events that a reader turns into parts."""

    def __init__(self, family: str, model: labs.Model) -> None:
        self.model, self.form = model, labs_forms.form_of(model)
        self.answers = Answers(family, self.form, "responses")

    def parts(self) -> list[Any]:
        text, chance = self.answers.any(), self.answers.chance
        splitter = labs_split.Splitter(self.form, names={"add"})
        take = labs_parts.Reader(self.model, labs.Generation(), splitter)
        cuts = sorted(chance.sample(range(len(text) + 1), min(len(text), chance.randrange(9))))
        pieces = [text[a:b] for a, b in itertools.pairwise([0, *cuts, len(text)])]
        reason: Any = chance.choice(["stop", "stop", "stop", "length", "content_filter"])
        done = labs.Done(reason, labs.Usage(3, len(text)), labs.Timings(0.0, 0.1, 0.2, 5.0))
        return [part for event in [*map(labs.Delta, pieces), done] for part in take(event)]


def compare(family: str, model: labs.Model, count: int) -> None:
    told, body = Told(family, model), msgspec.convert({"input": "a", "include": ENCRYPTED}, BODY)
    opened = labs_protocol.Opened(id="0" * 32, created=1, model="m", loaded=model)
    for _ in range(count):
        parts = told.parts()
        stream = labs_responses.RESPONSES.stream(body)
        data = [*stream.begin(opened), *(d for part in parts for d in stream.take(0, part))]
        data += stream.end([part for part in parts if isinstance(part, labs.Done)])
        events = [json.loads(text) for _, text in kit.events_of(b"".join(data))]
        names = {"id": opened.id, "model": "m", "created": 1}
        found = labs_responses.RESPONSES.answer(body, model, [labs_parts.fold(parts)], **names)
        assert bare(msgspec.to_builtins(found)) == bare(events[-1]["response"]), parts
        assert rebuilt(events) == events[-1]["response"]["output"], parts


@pytest.mark.parametrize("family", FORMS)
def test_the_stream_of_an_answer_ends_with_the_whole_response(family, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / f"form-{family}"
    compare(family, model_of(family, folder), 60)


@pytest.mark.long
@pytest.mark.parametrize("family", FORMS)
def test_ten_thousand_answers_of_a_family_are_the_same_streamed_and_whole(family, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / f"form-{family}"
    compare(family, model_of(family, folder), 10_000)


def test_a_whole_answer_is_unfolded_into_the_runs_of_its_parts(tools_site):
    done = labs.Done("stop", labs.Usage(1, 2), labs.Timings(0.0, 0.0, 0.0, 0.0))
    parts = [
        labs.Delta("a"), labs_parts.CallStarted(0, "x", "f"), labs_parts.Arguments(0, "{}"),
        labs.Delta("b"), labs_parts.Reasoning("c"), labs.Delta("d"), done,
    ]  # fmt: skip
    assert [*labs_parts.unfold(labs_parts.fold(parts))] == parts


def test_logprobs_are_in_the_text_if_they_are_asked_for(site):
    site.engine.pieces = [
        labs.Delta("a", (labs.TokenLogprob(97, -0.5, ((97, -0.5), (98, -1.0))),)), "b",
    ]  # fmt: skip
    found = said(site, None, include=LOGPROBS, top_logprobs=2)
    assert site.engine.generation.logprobs == 2
    (part,) = found["output"][0]["content"]
    (entry,) = part["logprobs"]
    assert (entry["token"], entry["logprob"], entry["bytes"]) == ("a", -0.5, [97])
    assert [each["token"] for each in entry["top_logprobs"]] == ["a", "b"]
    assert types.Response.model_validate(found).top_logprobs == 2


def test_logprobs_beside_reasoning_are_refused_by_name(tools_site):
    answer = tools_site.post(PATH, {"input": "hi", "include": LOGPROBS})
    assert kit.error_of(answer, 400)["param"] == "include"


def test_a_response_repeats_its_request_and_shows_the_settings_used(fake):
    site = Site(fake, kit.configured(generation=labs.Generation(temperature=0.5, seed=3)))
    asked = {
        "instructions": "Be.", "metadata": {"a": "b"}, "user": "u", "safety_identifier": "s",
        "prompt_cache_key": "k", "max_output_tokens": 9, "top_p": 0.25, "max_tool_calls": 2,
        "presence_penalty": 0.5, "parallel_tool_calls": False,
    }  # fmt: skip
    found = said(site, None, **asked)
    assert {name: found[name] for name in asked} == asked
    assert (found["temperature"], found["tool_choice"], found["tools"]) == (0.5, "auto", [])
    assert (found["store"], found["background"], found["truncation"]) == (False, False, "disabled")
    usage = {
        "input_tokens": found["usage"]["input_tokens"], "output_tokens": 2,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": found["usage"]["input_tokens"] + 2, "response_cached": False,
    }  # fmt: skip
    assert found["usage"] == usage
    assert fake.generation.max_new_tokens == 9


def test_usage_counts_the_tokens_of_reasoning(tools_site):
    usage = said(tools_site, f"{THOUGHT}Hi")["usage"]
    assert usage["output_tokens_details"] == {"reasoning_tokens": 2}


@pytest.mark.parametrize("reason", ["length", "timeout", "cancelled", "content_filter"])
def test_an_answer_that_was_cut_is_incomplete(fake, reason):
    fake.reason = reason
    found = said(Site(fake, kit.configured()), None)
    expected = "content_filter" if reason == "content_filter" else "max_output_tokens"
    assert (found["status"], found["incomplete_details"]) == ("incomplete", {"reason": expected})
    assert found["output"][0]["status"] == "incomplete"


def test_a_stream_that_fails_ends_with_response_failed_and_says_so(site, monkeypatch):
    site.engine.error = labs.GenerationError("nan at layer 3")
    *_, done, last = events_of(site.post(PATH, {"input": "a", "stream": True}, X_Request_Id="r-1"))
    assert (done["type"], done["item"]["status"]) == ("response.output_item.done", "incomplete")
    response = last["response"]
    assert (last["type"], response["status"]) == ("response.failed", "failed")
    assert response["error"]["code"] == "server_error"
    assert "r-1" in response["error"]["message"]
    assert "layer" not in json.dumps(last)
    assert response["output"][0]["content"][0]["text"] == "Hello there"


def test_a_stream_that_fails_before_it_began_ends_with_an_error_event():
    data = labs_responses.RESPONSES.failure(503, "lost", "replica_lost", "messages")
    ((name, found),) = kit.events_of(data)
    assert (name, json.loads(found)) == (
        "error",
        {
            "type": "error", "code": "replica_lost", "message": "lost", "param": "input",
            "sequence_number": 0,
        },
    )  # fmt: skip


# ---------------------------------------------------------------- tools and formats


def test_a_choice_holds_the_calls_of_an_answer(tools_site):
    named = {"type": "function", "name": "get_weather"}
    for choice in ("required", named):
        body = {"tools": [WEATHER], "tool_choice": choice, "parallel_tool_calls": False, **BRIEF}
        found = said(tools_site, None, **body)
        assert found["tool_choice"] == choice
        (call,) = [item for item in found["output"] if item["type"] == "function_call"]
        assert json.loads(call["arguments"])["city"] in ("Paris", "Rome")
    found = said(tools_site, CALLED, tools=[TOOL], tool_choice="none")
    assert "function_call" not in {item["type"] for item in found["output"]}


def test_tools_that_are_not_allowed_are_not_shown(tools_site, engine):
    add = {"type": "function", "name": "add"}
    allowed = {"type": "allowed_tools", "mode": "required", "tools": [add]}
    body = {"tools": [WEATHER, {**TOOL, "strict": True}], "tool_choice": allowed, **BRIEF}
    body["parallel_tool_calls"] = False
    found = said(tools_site, None, **body)
    assert {item["name"] for item in found["output"] if item["type"] == "function_call"} == {"add"}
    assert len(found["tools"]) == 2
    none = {**allowed, "mode": "auto", "tools": []}
    found = said(tools_site, CALLED, tools=[TOOL], tool_choice=none)
    assert shown(found["output"][0])[0] == "message"
    wrong = {**allowed, "tools": [{**add, "name": "fly"}]}
    answer = tools_site.post(PATH, {"input": "a", "tools": [TOOL], "tool_choice": wrong})
    assert kit.error_of(answer, 400)["param"] == "tool_choice"


SCHEMA = {"type": "object", "properties": {"a": {"enum": [1]}}, "required": ["a"]}
SCHEMA["additionalProperties"] = False


def test_a_format_holds_the_text_of_an_answer(tools_site):
    form = {"type": "json_schema", "name": "one", "schema": SCHEMA, "strict": True}
    found = said(tools_site, None, text={"format": form}, **BRIEF)
    message = found["output"][-1]
    assert (message["type"], json.loads(message["content"][0]["text"])) == ("message", {"a": 1})
    assert found["text"]["format"] == {**form, "description": None}
    site = said(tools_site, None, text={"format": {"type": "text"}}, max_output_tokens=3)
    assert site["text"]["format"] == {"type": "text"}


# ---------------------------------------------------------------- filters

FILTERED = [  # what the model says, the items that are shown, and the status
    ("<think>it is bad</think>Hi", [("reasoning", "it is")], "incomplete"),
    (f"{THOUGHT}so bad, yes", [("reasoning", "hm"), ("message", "so")], "incomplete"),
    (CALLED.replace("1", '"bad"'), [("message", "")], "incomplete"),
    (CALLED.replace("1", '"x@y.co"'), [("function_call", '{"n": "[email]"}')], "completed"),
]


@pytest.mark.parametrize(("text", "items", "status"), FILTERED)
def test_what_a_rule_refuses_does_not_get_out_in_items_or_events(text, items, status, engine):
    config = kit.configured(generation=GREEDY)
    guard = labs.Guard(deny=("bad",), mask=("email",))
    site = Site(engine, msgspec.structs.replace(config, guard=guard))
    tool = {"type": "function", "name": "add"}
    found = said(site, text, tools=[tool], include=ENCRYPTED)
    assert [shown(item) for item in found["output"]] == items
    assert found["status"] == status
    if status == "incomplete":
        assert found["incomplete_details"] == {"reason": "content_filter"}
    answer = site.post(PATH, {"input": "hi", "tools": [tool], "stream": True})
    for event in events_of(answer):
        said_by_labs = re.sub(r"[0-9a-f]{32}", "", json.dumps(event))  # an id may hold "bad"
        assert not any(word in said_by_labs for word in ("bad", "x@y.co"))


# ---------------------------------------------------------------- cost


def test_an_event_costs_little_more_than_one_of_generate_stream(tiny):
    opened = labs_protocol.Opened(id="0" * 32, created=1, model="m", loaded=tiny)
    body = msgspec.convert({"input": "a"}, BODY)

    def cost(stream: labs_protocol.Stream) -> float:
        [*stream.begin(opened)]
        began = time.process_time()
        for _ in range(5000):
            [*stream.take(0, labs.Delta(" word"))]
        return (time.process_time() - began) / 5000

    plain = min(cost(labs_api.GenerateStream()) for _ in range(3))
    ours = min(cost(labs_responses.RESPONSES.stream(body)) for _ in range(3))
    assert ours - plain <= 30e-6


# ---------------------------------------------------------------- files and replay


def test_lines_of_files_are_answered_and_answered_the_same_again(hermes):
    body = {"input": "hi", "tools": [WEATHER], "tool_choice": "required", "seed": 1, **BRIEF}
    lines = [
        kit.openai_line("a", PATH, **body, temperature=1.2),
        kit.openai_line("b", PATH, input="hi", max_output_tokens=9),
        kit.openai_line("c", PATH, input="hi", previous_response_id="r"),
        kit.openai_line("d", PATH, input="hi", stream=True),
    ]
    rows = kit.answers(hermes, lines, ordered=True)
    first, second, *wrong = rows
    assert "function_call" in {each["type"] for each in first["response"]["body"]["output"]}
    assert second["response"]["body"]["status"] == "incomplete"
    found = [row["response"]["body"]["error"]["param"] for row in wrong]
    assert found == ["previous_response_id", "stream"]
    assert [each.verdict for each in kit.replayed(hermes, rows[:2])] == ["same"] * 2
    changed = json.loads(json.dumps(first))
    for item in changed["response"]["body"]["output"]:
        item |= {"arguments": '{"city": "Oslo"}'} if item["type"] == "function_call" else {}
    assert kit.replayed(hermes, [changed])[0].verdict == "differs"


# ---------------------------------------------------------------- OpenAI's own client


class One(BaseModel):
    a: int


@pytest.fixture
def sdk(live: Live) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(api_key="none", base_url=f"{live.url}/v1", max_retries=0) as client:
        yield client


def test_openais_client_reads_responses_whole_streamed_and_by_its_helper(live, sdk):
    live.engine.text = f"{THOUGHT}See:\n{CALLED}"
    asked: Any = {"model": "tiny", "input": "hi", "tools": [TOOL]}
    whole = sdk.responses.create(**asked)
    types.Response.model_validate(whole.model_dump())
    assert whole.output_text == "See:"
    assert [item.type for item in whole.output] == ["reasoning", "message", "function_call"]
    *_, last = sdk.responses.create(**asked, stream=True)
    assert last.type == "response.completed"
    assert bare(last.response.model_dump()) | {"usage": None} == bare(whole.model_dump()) | {
        "usage": None
    }
    with sdk.responses.stream(**asked) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_response()
    assert kinds <= SENT
    assert final.output_text == "See:"
    turns = [{"role": "user", "content": "hi"}, *whole.output]
    (call,) = [item for item in whole.output if item.type == "function_call"]
    turns.append({"type": "function_call_output", "call_id": call.call_id, "output": "one"})
    live.engine.text = "Done"
    assert sdk.responses.create(**{**asked, "input": turns}).output_text == "Done"


def test_openais_client_parses_a_type(live, sdk):
    live.engine.text = None
    form = {**SCHEMA, "title": "One"}
    asked: Any = {"model": "tiny", "input": "hi", "extra_body": {"thinking_budget": 3}}
    text = {"format": {"type": "json_schema", "name": "One", "schema": form, "strict": True}}
    found = sdk.responses.create(**asked, text=text)
    assert One.model_validate_json(found.output_text).a == 1
    parsed = sdk.responses.parse(**asked, text_format=One, max_output_tokens=1500)
    assert isinstance(parsed.output_parsed, One) or parsed.status == "incomplete"


def test_openais_client_raises_its_own_errors(live, sdk):
    asked: Any = {"model": "tiny", "input": "hi"}
    with pytest.raises(openai.BadRequestError, match="stores nothing"):
        sdk.responses.create(**asked, previous_response_id="resp_1")
    with pytest.raises(openai.NotFoundError, match="stores no responses"):
        sdk.responses.retrieve("resp_1")
    with pytest.raises(openai.NotFoundError, match="unknown model"):
        sdk.responses.create(**{**asked, "model": "other"})


# ---------------------------------------------------------------- Open Responses' compliance cases

ASK_WEATHER = {
    "input": [{"type": "message", "role": "user", "content": "What's the weather in Rome?"}],
    "tools": [WEATHER],
}
COMPLIANCE: dict[str, tuple[dict[str, Any], str, list[str]]] = {
    "basic-response": ({"input": [GIVEN_TURN]}, "Hello there, you.", ["message"]),
    "streaming-response": ({"input": [GIVEN_TURN], "stream": True}, "1 2 3 4 5", ["message"]),
    "system-prompt": (
        {"input": [{**GIVEN_TURN, "role": "system", "content": "A pirate."}, GIVEN_TURN]},
        "Ahoy",
        ["message"],
    ),
    "tool-calling": (
        ASK_WEATHER, CALLED.replace("add", "get_weather"), ["function_call"],
    ),
    "tool-calling-streaming": (
        {**ASK_WEATHER, "stream": True}, CALLED.replace("add", "get_weather"), ["function_call"],
    ),
    "multi-turn": (
        {"input": [GIVEN_TURN, {**GIVEN_TURN, "role": "assistant", "content": "Hi"}, GIVEN_TURN]},
        "Alice",
        ["message"],
    ),
}  # fmt: skip
# The type of each field that their schema requires; null where it says so.
REQUIRED: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("id", "status", "model", "service_tier"), (str,)),
    **dict.fromkeys(("output", "tools"), (list,)),
    **dict.fromkeys(("parallel_tool_calls", "store", "background"), (bool,)),
    **dict.fromkeys(("temperature", "top_p", "presence_penalty"), (int, float)),
    **dict.fromkeys(("frequency_penalty", "top_logprobs"), (int, float)),
    **dict.fromkeys(("instructions", "previous_response_id"), (str, type(None))),
    **dict.fromkeys(("safety_identifier", "prompt_cache_key"), (str, type(None))),
    **dict.fromkeys(("incomplete_details", "error", "reasoning"), (dict, type(None))),
    **dict.fromkeys(("max_output_tokens", "max_tool_calls"), (int, type(None))),
    "completed_at": (int, type(None)), "created_at": (int,), "metadata": (dict,),
    "object": (str,), "text": (dict,), "tool_choice": (str, dict), "truncation": (str,),
    "usage": (dict, type(None)),
}  # fmt: skip


@pytest.mark.parametrize("name", COMPLIANCE)
def test_the_compliance_cases_of_open_responses_pass(name, tools_site, monkeypatch):
    body, text, kinds = COMPLIANCE[name]
    if "tools" in body:
        text = text.replace('{"n": 1}', '{"city": "Rome"}')
    tools_site.engine.text = text
    answer = tools_site.post(PATH, body)
    events = events_of(answer) if body.get("stream") else []
    responses = [event["response"] for event in events if "response" in event] or [answer.json]
    for response in responses:
        for field, allowed in REQUIRED.items():
            assert isinstance(response[field], allowed), (field, response[field])
    assert (responses[-1]["status"], responses[-1]["object"]) == ("completed", "response")
    assert [item["type"] for item in responses[-1]["output"]] == kinds
    assert {event["type"] for event in events} <= SENT
    if name == "tool-calling-streaming":
        names = [event["type"] for event in events]
        assert {"response.function_call_arguments.delta", "response.output_item.done"} < {*names}


def test_the_compliance_case_of_an_image_is_refused_in_words(tools_site):
    part = {"type": "input_image", "image_url": "data:image/png;base64,AA"}
    body = {"input": [{"type": "message", "role": "user", "content": [part]}]}
    kit.refused(tools_site.post(PATH, body), 400, code="unsupported")


# ---------------------------------------------------------------- Codex

SCRIPTS = [f"tool_{number}" for number in range(24)]
DESCRIPTION = "Runs a command in a terminal and returns what it printed. " * 4
CODEX_TOOLS = [
    {
        "type": "function",
        "name": name,
        "description": DESCRIPTION,
        "strict": False,
        "parameters": {
            "type": "object",
            "properties": {"cmd": {"type": "string"}, "workdir": {"type": "string"}},
            "required": ["cmd"],
            "additionalProperties": False,
        },
    }
    for name in SCRIPTS
]


def codex(model: str, turns: list[Any], **more: Any) -> dict[str, Any]:
    """Return a request as Codex 0.171 makes it."""
    return {
        "model": model, "stream": True, "input": turns, "tools": CODEX_TOOLS,
        "tool_choice": "auto", "parallel_tool_calls": True, "reasoning": {"summary": "auto"},
        "store": False, "include": ENCRYPTED, "prompt_cache_key": "01a229da-5cd2",
        "client_metadata": {"x-codex-turn-metadata": "{}", "session_id": "01a2"}, **more,
    }  # fmt: skip


def developer(text: str, role: str = "developer") -> dict[str, Any]:
    part = {"type": "input_text", "text": text}
    return {"type": "message", "id": f"msg_{role}", "role": role, "content": [part]}


def of_client(item: dict[str, Any], keeps: str) -> dict[str, Any]:
    """Return an item as a client gives it back, with only what it keeps of reasoning."""
    if item["type"] == "reasoning" and keeps == "encrypted_content":
        item = {**item, "content": None}
    return {k: v for k, v in item.items() if v is not None and k != "status"}


@pytest.fixture(scope="module")
def long_engine(tmp_path_factory: Any) -> Iterator[Any]:
    """Return an engine whose model writes as Qwen 3 and has a context of 400,000 bytes."""
    tokenizer, config = wire_forms.tokenizer_of("hermes"), kit.llama()
    config.vocab_size, config.max_position_embeddings = len(tokenizer), 400_000
    model = kit.load(kit.save_model(tmp_path_factory.mktemp("long") / "m", config))
    model = msgspec.structs.replace(model, tokenizer=tokenizer)
    found = Scripted(labs_engine.Engine(model, labs.Server()))
    yield found
    found.engine.close(5)


@pytest.mark.parametrize(
    ("keeps", "size", "count"),
    [
        ("encrypted_content", 3000, 4),
        pytest.param("encrypted_content", 3000, 10, marks=pytest.mark.long),
        pytest.param("content", 50_000, 10, marks=pytest.mark.long),
    ],
)
def test_turns_of_codex_reuse_what_they_have_in_common(long_engine, keeps, size, count):
    generation = labs.Generation(max_new_tokens=400, temperature=0)
    site, chunk = Site(long_engine, kit.configured(generation=generation)), 0
    chunk = long_engine.engine.model.decoder.chunk
    turns: list[Any] = [developer("You are a coding agent. " * 840), developer("Skills: none.")]
    turns += [developer("<environment_context/>", "user"), developer("Fix it.", "user")]
    before: tuple[int, ...] = ()
    submit, asked = long_engine.submit, list[tuple[int, ...]]()

    def noting(inputs: Any, *rest: Any, **more: Any) -> Any:
        asked.append(inputs.input_ids)
        return submit(inputs, *rest, **more)

    long_engine.submit = noting
    try:
        for turn in range(count):
            asked_for = [{"cmd": f"ls {turn}"}] * (1 + turn % 2)
            calls = [
                wire_forms.written("hermes", f"tool_{turn + each}", arguments)
                for each, arguments in enumerate(asked_for)
            ]
            long_engine.text = f"<think>\nhm {turn}\n</think>\n\nI look.\n" + "\n".join(calls)
            events = events_of(site.post(PATH, codex("tiny", turns)))
            response = events[-1]["response"]
            assert response["status"] == "completed", response
            kinds = ["reasoning", "message", *["function_call"] * len(calls)]
            assert [item["type"] for item in response["output"]] == kinds
            pairs = zip(before, asked[-1], strict=False)
            common = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
            cached = response["usage"]["input_tokens_details"]["cached_tokens"]
            assert cached >= 0.95 * (common // chunk * chunk), turn
            assert common >= 0.95 * len(before), turn
            before = asked[-1]
            turns += [of_client(item, keeps) for item in response["output"]]
            output = "x" * (size if turn == 4 else 300)
            turns += [
                {"type": "function_call_output", "call_id": item["call_id"], "output": output}
                for item in response["output"]
                if item["type"] == "function_call"
            ]
        long_engine.text = "Fixed."
        whole = site.post(PATH, codex("tiny", turns, stream=False)).json
        assert whole["output"][-1]["content"][0]["text"] == "Fixed."
    finally:
        del long_engine.submit


# ---------------------------------------------------------------- strange requests

STRANGE: list[Any] = [
    *("hi", "<end><bot>", "\0", "[1]", "{", '{"n": 1e999}', "", "function", "message", "auto"),
    *(None, 5, True, -1, 2**70, [], {}, [[]], [{}], {"type": "function"}, 1e308, "é😀\u2028"),
    *({"type": "reasoning", "summary": []}, {"type": "json_schema", "schema": {"type": []}}),
    *({"role": "user", "content": "a"}, {"$ref": "#"}, {"pattern": "(a+)+$"}, ["a", "b"]),
    *(GIVEN_TURN, CALL, RESULT, REASONED, TOOL, {"type": "web_search"}, {"id": "x"}),
]


def mutated(chance: random.Random, value: Any, depth: int = 0) -> Any:
    """Return a value with random parts replaced, added or left out."""
    if chance.random() < 0.12 + 0.02 * depth:
        return copy.deepcopy(chance.choice(STRANGE))
    if isinstance(value, dict):
        found = {
            k: mutated(chance, v, depth + 1) for k, v in value.items() if chance.random() > 0.03
        }
        if chance.random() < 0.05:
            found[chance.choice(["odd", "type", "id", "name", "content"])] = chance.choice(STRANGE)
        return found
    if isinstance(value, list):
        found = [mutated(chance, each, depth + 1) for each in value if chance.random() > 0.05]
        return found * chance.choice([1, 1, 1, 2])
    return value


SEEDS: list[dict[str, Any]] = [
    {"input": "hi"},
    {**codex("tiny", [developer("Be."), developer("a", "user"), reasoned("hm"), texted("b"), CALL,
     RESULT, developer("c", "user")]), "tools": [TOOL, WEATHER]},
    {"input": [GIVEN_TURN], "tools": [TOOL], "tool_choice": {"type": "function", "name": "add"},
     "text": FORMAT, "include": [*LOGPROBS, *ENCRYPTED], "top_logprobs": 2, **A},
    *({**body, name: value} for _, body, place, effective, hints in FIELDS if not place
      for name, value in {**effective, **hints}.items()),
]  # fmt: skip


def fuzz(site: Site, count: int, seed: int) -> set[int]:
    chance, statuses = random.Random(seed), set[int]()
    for _ in range(count):
        body = mutated(chance, copy.deepcopy(chance.choice(SEEDS)))
        if isinstance(body, dict):
            body |= {"max_output_tokens": 4} if chance.random() < 0.9 else {}
        answer = site.post(PATH, json.dumps(body).encode())
        statuses.add(answer.status_code)
        assert answer.status_code < 500, (body, answer.text)
        assert "response.failed" not in answer.text, (body, answer.text)
        assert "event: error" not in answer.text, (body, answer.text)
    return statuses


@pytest.mark.parametrize("count", [300, pytest.param(2000, marks=pytest.mark.long)])
def test_strange_requests_are_answered_or_refused_but_never_fail(tools_site, count):
    assert fuzz(tools_site, count, 11) >= {200, 400}
