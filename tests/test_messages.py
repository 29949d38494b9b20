# SPDX-License-Identifier: Apache-2.0
"""Anthropic's protocol: its requests, answers, events and errors, and its own client."""

from __future__ import annotations

import itertools
import json
import random
import typing
from collections.abc import Iterator
from typing import Any

import anthropic
import kit
import msgspec
import pytest
import typing_extensions
import wire_forms
from anthropic import types
from anthropic.types import beta, message_count_tokens_params, message_create_params
from anthropic.types.beta import message_count_tokens_params as beta_count_params
from anthropic.types.beta import message_create_params as beta_create_params
from kit import KEYS, Live, Site
from test_tools import ASK, Answers
from test_tools_http import GREEDY, Scripted, filtered, model_of

import labs
import labs_engine
import labs_forms
import labs_message_blocks
import labs_message_events
import labs_message_models
import labs_messages
import labs_parts
import labs_protocol

MESSAGES, COUNT = "/v1/messages", "/v1/messages/count_tokens"
ADD = {"name": "add", "input_schema": {"type": "object", "properties": {"n": {"type": "integer"}}}}
WEATHER: dict[str, Any] = {
    "name": "get_weather",
    "description": "The weather of a city.",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
    "strict": True,
}
BODY: dict[str, Any] = {"model": "tiny", "max_tokens": 300, "messages": ASK}
THOUGHT = "<think>\nhm\n</think>\n\n"


def called(arguments: str = '{"n": 1}', name: str = "add") -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


@pytest.fixture(scope="module")
def hermes(tmp_path_factory: Any) -> labs.Model:
    return model_of("hermes", tmp_path_factory.getbasetemp() / "form-hermes-messages")


@pytest.fixture(scope="module")
def engine(hermes: labs.Model) -> Iterator[Any]:
    found = Scripted(labs_engine.Engine(hermes, labs.Server()))
    yield found
    found.engine.close(5)


@pytest.fixture
def site(engine: Any) -> Site:
    engine.text = None
    return Site(engine, kit.configured(generation=GREEDY))


@pytest.fixture(scope="module")
def live(engine: Any) -> Iterator[Live]:
    found = Live(engine, kit.configured(generation=GREEDY))
    yield found
    found.close()


@pytest.fixture
def client(live: Live) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(api_key="none", base_url=live.url, max_retries=0) as found:
        yield found


def said(site: Site, text: str | None, **body: Any) -> dict[str, Any]:
    """Return the message that answers a request and says this text."""
    site.engine.text = text
    answer = site.post(MESSAGES, {**BODY, **body})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json
    return found


def events_of(answer: Any) -> list[dict[str, Any]]:
    """Return the events of a stream, each of which has the name of its type."""
    assert answer.status_code == 200, answer.text
    found = [(name, json.loads(data)) for name, data in kit.events_of(answer.content)]
    assert all(name == event["type"] for name, event in found)
    return [event for _, event in found]


def folded(events: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the message that events make, as clients join them, and check their order."""
    events = [event for event in events if event["type"] != "ping"]
    first, *inner, delta, last = events
    assert (first["type"], last) == ("message_start", {"type": "message_stop"})
    message, pieces = first["message"], list[str]()
    assert (message["content"], message["stop_reason"]) == ([], None)
    for event in inner:
        kind, content = event["type"], message["content"]
        if kind == "content_block_start":
            assert event["index"] == len(content)
            content.append(event["content_block"])
            pieces = []
        elif kind == "content_block_stop":
            assert event["index"] == len(content) - 1
            if content[-1]["type"] == "tool_use":
                content[-1]["input"] = json.loads("".join(pieces))
        else:
            assert (kind, event["index"]) == ("content_block_delta", len(content) - 1)
            given = dict(event["delta"])
            assert given.pop("type") in DELTAS[content[-1]["type"]]
            ((name, text),) = given.items()
            pieces.append(text)
            if name != "partial_json":
                content[-1][name] += text
    assert delta["type"] == "message_delta"
    return {**message, **delta["delta"], "usage": delta["usage"]}


DELTAS = {
    "text": {"text_delta"},
    "thinking": {"thinking_delta", "signature_delta"},
    "tool_use": {"input_json_delta"},
}


def error_of(answer: Any, status: int, kind: str = "invalid_request_error") -> str:
    """Return the message of an error, which has Anthropic's form."""
    assert answer.status_code == status, answer.text
    assert answer.headers["request-id"] == answer.headers["x-request-id"]
    assert answer.json.keys() == {"type", "error", "request_id"}
    assert (answer.json["type"], answer.json["error"]["type"]) == ("error", kind)
    assert answer.json["request_id"] == answer.headers["request-id"]
    message: str = answer.json["error"]["message"]
    assert "\n" not in message
    assert "Traceback" not in message
    return message


# ---------------------------------------------------------------- fields


def fields(kind: Any) -> set[str]:
    return {*kind.__struct_fields__} - {"cache_control"}


def keys(*params: Any) -> set[str]:
    return {name for each in params for name in typing.get_type_hints(each)} - {"cache_control"}


def tags(union: Any) -> set[str]:
    """Return the types that the members of a union of TypedDicts have."""
    members = [m for m in typing.get_args(union) if typing_extensions.is_typeddict(m)]
    hints = [typing.get_type_hints(member)["type"] for member in members]
    flat = [each for hint in hints for each in [hint, *typing.get_args(hint)]]
    return {tag for hint in flat for tag in typing.get_args(hint) if isinstance(tag, str)}


# What the requests of Anthropic's client have and labs refuses: a new one has to be decided on.
REFUSED_BLOCKS = {
    *("image", "document", "search_result", "redacted_thinking", "server_tool_use"),
    *("web_search_tool_result", "web_fetch_tool_result", "code_execution_tool_result"),
    *("bash_code_execution_tool_result", "text_editor_code_execution_tool_result"),
    *("tool_search_tool_result", "container_upload", "mcp_tool_use", "mcp_tool_result"),
    *("advisor_tool_result", "compaction", "mcp_tool_listing", "fallback", "browser_state"),
}
HINTS = {
    "billing_policy": {"a": 1}, "cache_control": {"type": "ephemeral", "ttl": "1h"},
    "diagnostics": {"previous_message_id": None}, "fallback_credit_token": "t",
    "inference_geo": "eu", "metadata": {"user_id": "u"}, "service_tier": "standard_only",
    "speed": "fast", "user_profile_id": "p", "workspace_id": "w",
}  # fmt: skip
PARAMS = {
    labs_message_blocks.TextBlockParam: (types.TextBlockParam, beta.BetaTextBlockParam),
    labs_message_blocks.ThinkingBlockParam: (types.ThinkingBlockParam, beta.BetaThinkingBlockParam),
    labs_message_blocks.ToolUseBlockParam: (types.ToolUseBlockParam, beta.BetaToolUseBlockParam),
    labs_message_blocks.ToolResultBlockParam: (
        types.ToolResultBlockParam,
        beta.BetaToolResultBlockParam,
    ),
    labs_message_blocks.ToolReferenceBlockParam: (types.ToolReferenceBlockParam,),
    labs_message_blocks.ToolParam: (types.ToolParam, beta.BetaToolParam),
    labs_messages.MessageParam: (types.MessageParam, beta.BetaMessageParam),
    labs_messages.ToolChoice: (types.ToolChoiceParam, beta.BetaToolChoiceParam),
    labs_messages.Thinking: (types.ThinkingConfigParam, beta.BetaThinkingConfigParam),
    labs_messages.OutputConfig: (types.OutputConfigParam, beta.BetaOutputConfigParam),
    labs_messages.JsonOutputFormat: (types.JSONOutputFormatParam,),
}


@pytest.mark.parametrize("kind", PARAMS, ids=lambda each: each.__name__)
def test_every_field_of_anthropics_own_client_is_known(kind):
    members = [m for each in PARAMS[kind] for m in typing.get_args(each) or (each,)]
    assert keys(*(m for m in members if typing_extensions.is_typeddict(m))) <= fields(kind) | {
        "type"
    }


def test_every_field_of_a_body_is_in_one_table():
    hints, neutral = fields(labs_messages.Hints), {*labs_messages.NEUTRAL}
    for kind, params in (
        (labs_messages.MessagesRequest, (message_create_params, beta_create_params)),
        (labs_messages.CountRequest, (message_count_tokens_params, beta_count_params)),
    ):
        names = set[str]()
        for module in params:
            for name in ("MessageCreateParamsBase", "MessageCountTokensParams"):
                names |= keys(getattr(module, name)) if hasattr(module, name) else set()
        assert names - {"betas"} <= fields(kind) | hints | neutral
        assert not fields(kind) & (hints | neutral)
    assert not hints & neutral
    assert hints | {"cache_control"} == {*HINTS}


def test_every_type_of_a_block_is_read_or_refused():
    known = {tag for blocks in labs_message_blocks.BLOCKS.values() for tag in blocks}
    unions = (types.ContentBlockParam, beta.BetaContentBlockParam)
    results = (types.tool_result_block_param.Content, beta.beta_tool_result_block_param.Content)
    found = {tag for union in (*unions, *results) for tag in tags(union)}
    assert found - known == REFUSED_BLOCKS
    assert not known & REFUSED_BLOCKS
    assert known <= found


def test_the_events_are_those_of_anthropics_client():
    def kinds(union: Any) -> set[str]:
        (inner, *_) = typing.get_args(union)
        return {m.model_fields["type"].annotation.__args__[0] for m in typing.get_args(inner)}

    emitted = {"message_start", "message_delta", "message_stop", "content_block_start"}
    emitted |= {"content_block_delta", "content_block_stop"}
    assert kinds(types.RawMessageStreamEvent) == emitted
    deltas = {each for kind in DELTAS.values() for each in kind}
    assert kinds(types.RawContentBlockDelta) - deltas == {"citations_delta"}
    for kind, theirs in (
        (labs_message_events.MessagesUsage, types.Usage),
        (labs_message_events.MessagesUsage, types.MessageDeltaUsage),
        (labs_message_events.ThinkingBlock, types.ThinkingBlock),
        (labs_message_events.ToolUseBlock, types.ToolUseBlock),
        (labs_message_events.TextBlock, types.TextBlock),
        (labs_message_models.ModelInfo, types.ModelInfo),
    ):
        assert fields(kind) <= {*theirs.model_fields}


def test_a_hint_changes_nothing(site):
    plain = said(site, "Hi")
    for name, value in HINTS.items():
        assert said(site, "Hi", **{name: value})["content"] == plain["content"]
        assert error_of(site.post(MESSAGES, {**BODY, "metadata": 5}), 400)


def test_a_thread_is_refused_so_that_clients_go_on_without_it(site):
    answer = site.post(MESSAGES, {**BODY, "thread": {"type": "create"}})
    assert error_of(answer, 400) == "thread is not implemented; leave it out"
    details = answer.json["error"]["details"]
    assert details == {"error_code": "thread_unsupported_request", "unsupported": []}


def test_a_field_that_is_not_implemented_takes_neutral_values_only(site):
    for name, neutral in labs_messages.NEUTRAL.items():
        assert name in error_of(site.post(MESSAGES, {**BODY, name: ["odd"]}), 400)
        for value in (None, *neutral):
            assert said(site, "Hi", **{name: value})["content"][0]["text"] == "Hi"


def request_of(path: str = MESSAGES, **body: Any) -> Any:
    """Return the labs_request.Request of a body."""
    endpoint = labs_messages.MESSAGES if path == MESSAGES else labs_messages.COUNT
    data = json.dumps({**(BODY if path == MESSAGES else {"messages": ASK}), **body}).encode()
    return endpoint.request_of(*labs_protocol.read(data, endpoint.body, endpoint.fields))


ANY_TOOL = {"tools": [ADD], "tool_choice": {"type": "any"}}
SCHEMA = {"type": "json_schema", "schema": {"type": "object"}}
EFFECTS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"max_tokens": 7}, {"options": {"max_new_tokens": 7}}),
    ({"stop_sequences": ["a"]}, {"options": {"max_new_tokens": 300, "stop": ("a",)}}),
    ({"temperature": 0.5, "top_p": 0.25, "top_k": 3},
     {"options": {"max_new_tokens": 300, "temperature": 0.5, "top_p": 0.25, "top_k": 3}}),
    ({"temperature": None, "stop_sequences": None}, {"options": {"max_new_tokens": 300}}),
    ({"thinking": {"type": "enabled", "budget_tokens": 9}},
     {"options": {"max_new_tokens": 300, "thinking_budget": 9}}),
    ({"thinking": {"type": "adaptive", "display": "updates"}}, {"effort": None}),
    ({"thinking": {"type": "disabled"}}, {"effort": "none"}),
    ({"output_config": {"effort": "max"}}, {"effort": "max", "usual_effort": "high"}),
    ({"thinking": {"type": "disabled"}, "output_config": {"effort": "low"}}, {"effort": "none"}),
    ({"tools": [ADD]}, {"tool_choice": "auto", "parallel_tool_calls": True}),
    ({"tools": []}, {"tools": ()}),
    (ANY_TOOL, {"tool_choice": "required"}),
    ({"tools": [ADD], "tool_choice": {"type": "tool", "name": "add"}}, {"tool_choice": "add"}),
    ({"tools": [ADD], "tool_choice": {"type": "none"}}, {"tool_choice": "none"}),
    ({"tools": [ADD], "tool_choice": {"type": "auto", "disable_parallel_tool_use": True}},
     {"tool_choice": "auto", "parallel_tool_calls": False}),
    ({"model": "other", "documents": True}, {"model": "other", "documents": True}),
    ({"model": None}, {"model": None, "documents": None, "within_context": True}),
]  # fmt: skip


@pytest.mark.parametrize(("body", "expected"), EFFECTS, ids=lambda each: str(each)[:50])
def test_a_field_becomes_what_labs_calls_it(body, expected):
    request = request_of(**body)
    for name, value in expected.items():
        holder = request if hasattr(request, name) else request.prompts[0]
        assert getattr(holder, name) == value


@pytest.mark.parametrize(
    "field", [{"output_format": SCHEMA}, {"output_config": {"format": SCHEMA}}]
)
def test_a_format_holds_the_answer_to_its_schema(field, site):
    assert request_of(**field).response_format.json_schema.schema == SCHEMA["schema"]
    schema = {"type": "object", "properties": {"a": {"enum": [1]}}, "required": ["a"]}
    schema["additionalProperties"] = False
    held = json.loads(json.dumps(field).replace('{"type": "object"}', json.dumps(schema)))
    thinks = {"thinking": {"type": "enabled", "budget_tokens": 3}, "max_tokens": 1500}
    content = said(site, None, **held, **thinks)["content"]
    assert json.loads(content[-1]["text"])["a"] == 1


# ---------------------------------------------------------------- what a conversation becomes

USE = {"type": "tool_use", "id": "a", "name": "add", "input": {"n": 1}}
RESULT = {"type": "tool_result", "tool_use_id": "a", "content": "4"}
CACHED = {"cache_control": {"type": "ephemeral"}}


def text(of: str, **more: Any) -> dict[str, Any]:
    return {"type": "text", "text": of, **more}


def turn(role: str, *content: Any, **more: Any) -> dict[str, Any]:
    one = len(content) == 1 and isinstance(content[0], str)
    return {"role": role, "content": content[0] if one else [*content], **more}


def thinking(of: str, shown: bool = True) -> dict[str, Any]:
    signature = labs_message_blocks.Signature(of).text(shown)
    return {"type": "thinking", "thinking": of if shown else "", "signature": signature}


def plain(**body: Any) -> list[dict[str, Any]]:
    """Return the messages of a request without empty fields."""
    found = json.loads(msgspec.json.encode(request_of(**body).prompts[0].messages))
    return [{name: value for name, value in each.items() if value} for each in found]


def labs_call(key: str = "a") -> dict[str, Any]:
    function = {"name": "add", "arguments": '{"n": 1}'}
    return {"id": key, "function": function, "type": "function"}


A, USER = turn("assistant", USE), turn("user", "hi")
BILLING = text("x-anthropic-billing-header: cc_version=2; cch=1;")
ADDED = {"type": "tool_addition", "tool": {"type": "tool_reference", "name": "late"}}
TURNS: list[tuple[dict[str, Any], list[dict[str, Any]]]] = [
    ({"system": "s", "messages": [USER]},
     [{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}]),
    ({"system": [BILLING, text("a", **CACHED), text("b")], "messages": [USER]},
     [{"role": "system", "content": "a\n\nb"}, {"role": "user", "content": "hi"}]),
    ({"system": [BILLING], "messages": [USER]}, [{"role": "user", "content": "hi"}]),
    ({"system": "", "messages": [USER]}, [{"role": "user", "content": "hi"}]),
    ({"messages": [USER, turn("assistant", thinking("hm")), A, turn("user", RESULT),
                   turn("user", text("go on"))]},
     [{"role": "user", "content": "hi"},
      {"role": "assistant", "reasoning_content": "hm", "tool_calls": [labs_call()]},
      {"role": "tool", "content": "4", "tool_call_id": "a"}, {"role": "user", "content": "go on"}]),
    ({"messages": [turn("user", text("a"), text("b", citations=[]))]},
     [{"role": "user", "content": "a\n\nb"}]),
    ({"messages": [USER, turn("user", "ho")]}, [{"role": "user", "content": "hi\n\nho"}]),
    ({"messages": [USER, turn("assistant", text("a"), text("b")), USER]},
     [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ab"},
      {"role": "user", "content": "hi"}]),
    ({"messages": [USER, turn("assistant", thinking("hm"), text("x"), USE, text("y")),
                   turn("user", text("go on"), RESULT)]},
     [{"role": "user", "content": "hi"},
      {"role": "assistant", "content": "xy", "reasoning_content": "hm",
       "tool_calls": [labs_call()]},
      {"role": "tool", "content": "4", "tool_call_id": "a"}, {"role": "user", "content": "go on"}]),
    ({"messages": [USER, turn("assistant", thinking("hm\n", shown=False), text("x")), USER]},
     [{"role": "user", "content": "hi"},
      {"role": "assistant", "content": "x", "reasoning_content": "hm\n"},
      {"role": "user", "content": "hi"}]),
    ({"messages": [USER, turn("assistant", USE, {**USE, "id": "b"}),
                   turn("user", {**RESULT, "tool_use_id": "b", "content": [text("2"), text("3")]},
                        {**RESULT, "is_error": True})]},
     [{"role": "user", "content": "hi"},
      {"role": "assistant", "tool_calls": [labs_call(), labs_call("b")]},
      {"role": "tool", "content": "error: 4", "tool_call_id": "a"},
      {"role": "tool", "content": "2\n\n3", "tool_call_id": "b"}]),
    ({"messages": [USER, turn("system", "from now on"), turn("assistant", "ok"), USER]},
     [{"role": "user", "content": "hi"}, {"role": "system", "content": "from now on"},
      {"role": "assistant", "content": "ok"}, {"role": "user", "content": "hi"}]),
    ({"messages": [USER, turn("system", "once", clear_at="next_user_message"), USER]},
     [{"role": "user", "content": "hi\n\nhi"}]),
    ({"messages": [USER, turn("system", "once", clear_at="next_user_message")]},
     [{"role": "user", "content": "hi"}, {"role": "system", "content": "once"}]),
    ({"messages": [USER, A, turn("user", {"type": "tool_result", "tool_use_id": "a"})]},
     [{"role": "user", "content": "hi"}, {"role": "assistant", "tool_calls": [labs_call()]},
      {"role": "tool", "tool_call_id": "a"}]),
]  # fmt: skip


@pytest.mark.parametrize(("body", "expected"), TURNS, ids=range(len(TURNS)))
def test_blocks_become_messages(body, expected):
    assert plain(**body) == expected
    assert plain(path=COUNT, **body) == expected


LATE = {**ADD, "name": "late", "defer_loading": True}
REFERENCE = {"type": "tool_reference", "tool_name": "late"}
REMOVED = {**ADDED, "type": "tool_removal", "tool": {**ADDED["tool"], "name": "add"}}


def test_a_deferred_tool_is_there_once_a_block_loads_it():
    def names(*turns: Any) -> list[str]:
        prompt = request_of(tools=[ADD, LATE], messages=[USER, *turns]).prompts[0]
        return [tool.function.name for tool in prompt.tools]

    assert names() == ["add"]
    assert names(A, turn("user", {**RESULT, "content": [REFERENCE]})) == ["add", "late"]
    assert names(turn("system", ADDED)) == ["add", "late"]
    assert names(turn("system", ADDED, REMOVED)) == ["late"]
    (*_, loaded) = plain(
        messages=[USER, A, turn("user", {**RESULT, "content": [REFERENCE]})], tools=[LATE]
    )
    assert loaded["content"] == "The tool late can be called now."


IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": ""}}
CONTENT: list[tuple[Any, str]] = [
    ([IMAGE], "messages[0].content[0]: a block of the type 'image' is not supported here"),
    ([text("a"), {"type": "document"}], "messages[0].content[1]"),
    ([{"type": "search_result"}], "give the result as text"),
    ([USE], "use text or tool_result"),
    ([{"text": "a"}], "messages[0].content[0]: a block of the type None"),
    ([{"type": ["text"]}], "messages[0].content[0]"),
    ([{"type": "text", "text": 5}], "messages[0].content[0].text: Expected `str`"),
    ([{"type": "text", "text": "a", "odd": 1}], "messages[0].content[0]: Object contains unknown"),
    ([5], "$.messages[0].content[0]"),
    ([RESULT], "messages[0].content[0].tool_use_id = 'a': no tool_use of the last assistant's"),
]
AFTER: list[tuple[list[Any], str]] = [
    ([turn("user", "x", clear_at="next_user_message")], "clear_at belongs to system messages"),
    ([turn("user", "x", clear_at="never"), USER], "clear_at belongs to system messages"),
    ([turn("assistant", {"type": "redacted_thinking", "data": "x"}), USER],
     "messages[1].content[0]: a block of the type 'redacted_thinking'"),
    ([turn("assistant", {**thinking("hm"), "thinking": "ha"}), USER],
     "messages[1].content[0]: this thinking was not written by labs, or was changed"),
    ([turn("assistant", {**thinking("hm"), "signature": "EqQB"}), USER], "messages[1].content[0]"),
    ([turn("assistant", {**thinking("hm", False), "thinking": "ha"}), USER], "this thinking"),
    ([turn("assistant", {**thinking(""), "signature": "labs1..=="}), USER], "this thinking"),
    ([turn("assistant", {**thinking(""), "signature": "labs1.x./w=="}), USER], "this thinking"),
    ([turn("assistant", {**USE, "input": []}), USER], "messages[1].content[0].input: Expected"),
    ([turn("assistant", {**USE, "caller": {"type": "code"}}), USER], "messages[1].content[0].cal"),
    ([A, turn("user", {**RESULT, "content": [IMAGE]})], "messages[2].content[0].content[0]: a"),
    ([A, turn("user", {**RESULT, "tool_use_id": "b"})], "messages[2].content[0].tool_use_id"),
    ([turn("system", USE), USER], "messages[1].content[0]"),
    ([turn("system", "a", output_config={"effort": "low"}), USER], "messages[1].output_config"),
    ([turn("tool", "a")], "$.messages[1].role"),
]  # fmt: skip
FIELD: list[tuple[dict[str, Any], str]] = [
    ({"max_tokens": 0}, "$.max_tokens"),
    ({"max_tokens": None}, "$.max_tokens"),
    ({"messages": []}, "$.messages"),
    ({"prompt": "a"}, "prompt"),
    ({"n": 1}, "`n`"),
    ({"system": [IMAGE]}, "system[0]: a block of the type 'image'"),
    ({"stop_sequences": [""]}, "stop_sequences"),
    ({"stop_sequences": ["a"] * 17}, "stop_sequences"),
    ({"thinking": {"type": "enabled"}}, "thinking.budget_tokens"),
    ({"thinking": {"type": "adaptive", "budget_tokens": 5}}, "thinking.budget_tokens"),
    ({"thinking": {"type": "between_tools"}}, "thinking.type"),
    ({"thinking": {"type": "adaptive", "display": "odd"}}, "thinking.display"),
    ({"thinking": {"type": "adaptive", "block_binding": {"prefix_mismatch_behavior": "error"}}},
     "thinking.block_binding"),
    ({"output_config": {"task_budget": {"total": 5}}}, "output_config.task_budget"),
    ({"output_config": {"effort": "odd"}}, "output_config.effort"),
    ({"output_config": {"effort": "low"}}, "output_config.effort = low"),
    ({"thinking": {"type": "disabled"}}, "thinking = disabled: the chat template"),
    ({"output_config": {"format": SCHEMA}, "output_format": SCHEMA}, "output_format and"),
    ({"tools": [{"type": "web_search_20250305", "name": "web_search", "max_uses": 2}]},
     "tools[0]: a tool of the type 'web_search_20250305' is not supported"),
    ({"tools": [ADD, {"type": "bash_20250124", "name": "bash"}]}, "tools[1]: a tool of the type"),
    ({"tools": [ADD, ADD]}, "tools[1]: an earlier tool is named add too"),
    ({"tools": [{"name": "add"}]}, "tools[0]: Object missing required field `input_schema`"),
    ({"tools": [{**ADD, "name": "a b"}]}, "tools[0].name: "),
    ({"tools": [{**ADD, "input_examples": [{}]}]}, "tools[0].input_examples"),
    ({"tools": [{**ADD, "allowed_callers": ["code_execution_20250825"]}]}, "tools[0].allowed"),
    ({"tool_choice": {"type": "any"}}, "tool_choice = any: there are no tools"),
    ({"tool_choice": {"type": "tool", "name": "add"}}, "tool_choice.name = 'add'"),
    ({"tool_choice": {"type": "tool"}}, "tool_choice.name"),
    ({"tools": [ADD], "tool_choice": {"type": "auto", "name": "add"}}, "tool_choice.name"),
    ({"tools": [{**ADD, "name": "none"}], "tool_choice": {"type": "tool", "name": "none"}},
     "tool_choice.name = 'none'"),
    ({"tools": [LATE], "tool_choice": {"type": "tool", "name": "late"}}, "tool_choice.name"),
]  # fmt: skip
REFUSED = [
    *(({"messages": [{"role": "user", "content": content}]}, named) for content, named in CONTENT),
    *(({"messages": [USER, *turns]}, named) for turns, named in AFTER),
    *FIELD,
]


@pytest.mark.parametrize(("body", "named"), REFUSED, ids=lambda each: str(each)[:60])
def test_what_cannot_be_is_refused_and_named(body, named, site):
    site.engine.text = "Hi"
    assert named in error_of(site.post(MESSAGES, {**BODY, **body}), 400)
    assert named in error_of(site.post(MESSAGES, {**BODY, **body, "stream": True}), 400)


def test_every_hosted_tool_of_anthropics_client_is_refused_by_its_type(site):
    kinds = (tags(types.ToolUnionParam) | tags(beta.BetaToolUnionParam)) - {"custom"}
    assert len(kinds) > 10
    for kind in kinds:
        body = {**BODY, "tools": [ADD, {"type": kind, "name": "x"}]}
        assert f"tools[1]: a tool of the type '{kind}'" in error_of(site.post(MESSAGES, body), 400)


@pytest.mark.parametrize("kind", sorted(REFUSED_BLOCKS))
def test_a_block_that_cannot_be_read_is_refused_by_its_type_and_place(kind, site):
    for role in ("user", "assistant"):
        turns = [USER, turn(role, text("a"), {"type": kind}), USER]
        message = error_of(site.post(MESSAGES, {**BODY, "messages": turns}), 400)
        assert message.startswith(f"messages[1].content[1]: a block of the type '{kind}'")


# ---------------------------------------------------------------- answers

# What the model says; the content without signatures and ids; the stop_reason.
SAID: list[tuple[str, list[dict[str, Any]], str]] = [
    ("Hello", [{"text": "Hello"}], "end_turn"),
    ("", [], "end_turn"),
    (f"{THOUGHT}Hi", [{"thinking": "hm"}, {"text": "Hi"}], "end_turn"),
    (called(), [{"name": "add", "input": {"n": 1}}], "tool_use"),
    (f"{THOUGHT}{called()}", [{"thinking": "hm"}, {"name": "add", "input": {"n": 1}}], "tool_use"),
    (f"See:\n{called()}\n{called('{}')}",
     [{"text": "See:"}, {"name": "add", "input": {"n": 1}}, {"name": "add", "input": {}}],
     "tool_use"),
    ("ab STOP cd", [{"text": "ab "}], "stop_sequence"),
    ("x" * 400, [{"text": "x" * 300}], "max_tokens"),
    ("<think>\n" + "hm" * 200, [{"thinking": "hm" * 149}], "max_tokens"),
]  # fmt: skip


def bare(content: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return blocks without what differs between two answers, and text without its last spaces."""
    names = ("text", "thinking", "name", "input")
    found = [{name: each[name] for name in names if name in each} for each in content]
    return [
        {k: v.rstrip() if isinstance(v, str) and k != "text" else v for k, v in each.items()}
        for each in found
    ]


@pytest.mark.parametrize(("said", "content", "reason"), SAID, ids=range(len(SAID)))
def test_anthropics_client_sees_the_same_message_whole_and_streamed(
    said, content, reason, live, client
):
    live.engine.text = said
    body: Any = {**BODY, "tools": [ADD], "stop_sequences": ["STOP"]}
    whole = client.messages.create(**body)
    with client.messages.stream(**body) as stream:
        assert "".join(stream.text_stream) == "".join(each.get("text", "") for each in content)
        streamed = stream.get_final_message()
    for message in (whole, streamed):
        assert bare([each.model_dump() for each in message.content]) == content
        assert (message.stop_reason, message.type, message.role) == (reason, "message", "assistant")
        assert message.stop_sequence == ("STOP" if reason == "stop_sequence" else None)
        assert message.id.startswith("msg_")
        assert message.usage.output_tokens > 0
    left, right = ([each.model_dump() for each in m.content] for m in (whole, streamed))
    assert left == [{k: v for k, v in each.items() if k != "parsed_output"} for each in right]
    told = [each.usage for each in (whole, streamed)]
    counts = [each.input_tokens + (each.cache_read_input_tokens or 0) for each in told]
    count = client.messages.count_tokens(model="tiny", messages=ASK, tools=[ADD])  # type: ignore[list-item]
    assert counts == [count.input_tokens] * 2


def test_events_come_in_anthropics_order(site):
    site.engine.text = f"{THOUGHT}Hi {called()}"
    events = events_of(site.post(MESSAGES, {**BODY, "tools": [ADD], "stream": True}))
    kinds = [event.get("delta", {}).get("type", event["type"]) for event in events]
    assert [kind for kind, _ in itertools.groupby(kinds)] == [
        *("message_start", "content_block_start", "ping", "thinking_delta", "signature_delta"),
        *("content_block_stop", "content_block_start", "text_delta", "content_block_stop"),
        *("content_block_start", "input_json_delta", "content_block_stop"),
        *("message_delta", "message_stop"),
    ]
    first, delta = events[0]["message"]["usage"], events[-2]["usage"]
    assert (first["output_tokens"], first["cache_read_input_tokens"]) == (0, 0)
    total = delta["input_tokens"] + delta["cache_read_input_tokens"]
    assert total == first["input_tokens"]
    assert delta["output_tokens_details"]["thinking_tokens"] > 0


def test_cached_tokens_are_not_input_tokens(fake):
    fake.pieces, body = ["Hi"], {**BODY, "messages": [turn("user", "hello there")]}
    site = Site(fake, kit.configured())
    count = site.post(COUNT, {"messages": body["messages"]}).json["input_tokens"]
    usage = site.post(MESSAGES, body).json["usage"]
    assert (usage["input_tokens"], usage["cache_read_input_tokens"]) == (count - 5, 5)
    assert events_of(site.post(MESSAGES, {**body, "stream": True}))[-2]["usage"] == usage


@pytest.fixture
def fake(tiny: labs.Model) -> kit.FakeEngine:
    return kit.FakeEngine(tiny)


REASONS = {
    "stop": "end_turn",
    "tool_calls": "tool_use",
    "content_filter": "refusal",
    **dict.fromkeys(("length", "timeout", "cancelled"), "max_tokens"),
}


@pytest.mark.parametrize("reason", REASONS)
def test_clients_see_stop_reasons_that_they_know(fake, reason):
    fake.reason = reason
    site = Site(fake, kit.configured())
    assert site.post(MESSAGES, BODY).json["stop_reason"] == REASONS[reason]
    assert REASONS[reason] in typing.get_args(types.StopReason)
    streamed = folded(events_of(site.post(MESSAGES, {**BODY, "stream": True})))
    assert streamed["stop_reason"] == REASONS[reason]


def test_hidden_thinking_is_signed_and_comes_back(site):
    hidden = {"thinking": {"type": "adaptive", "display": "omitted"}}
    whole = said(site, f"{THOUGHT}Hi", **hidden)
    streamed = folded(events_of(site.post(MESSAGES, {**BODY, **hidden, "stream": True})))
    for message in (whole, streamed):
        assert bare(message["content"]) == [{"thinking": ""}, {"text": "Hi"}]
        turns = [*ASK, {"role": "assistant", "content": message["content"]}, *ASK]
        assert plain(messages=turns)[1]["reasoning_content"].strip() == "hm"


def test_random_answers_streamed_are_the_whole_ones(hermes, tmp_path_factory):
    chance, orders = random.Random(5), set[bool]()
    for family in wire_forms.FORMS:
        form = labs_forms.form_of(model_of(family, tmp_path_factory.mktemp(family) / "m"))
        answers = Answers(family, form, "messages")
        for _ in range(120):
            parts = random_parts(answers.any(), form, chance)
            whole, streamed = both(hermes, parts, shown=chance.random() < 0.7)
            assert joined(streamed["content"]) == joined(whole["content"])
            kinds = [[each["type"] for each in found["content"]] for found in (whole, streamed)]
            orders.add(kinds[0] == kinds[1])
            assert streamed == whole or kinds[0] != kinds[1]
    assert orders == {True, False}  # text that follows a call is a block of its own in a stream


def both(model: labs.Model, parts: list[Any], shown: bool) -> Any:
    """Return an answer as a whole message, and as the message that its events make."""
    display: Any = "summarized" if shown else "omitted"
    thinks = labs_messages.Thinking("adaptive", display=display)
    body = labs_messages.MessagesRequest(messages=(), max_tokens=5, thinking=thinks)
    found = [labs_parts.fold(parts)]
    whole = labs_messages.MESSAGES.answer(body, model, found, id="1", model="m")
    stream = labs_messages.MESSAGES.stream(body)
    opened = labs_protocol.Opened(id="1", created=0, model="m", loaded=model)
    data = b"".join([*stream.begin(opened), *(e for p in parts for e in stream.take(0, p))])
    data += b"".join(stream.end([parts[-1]]))
    streamed = folded([json.loads(each) for _, each in kit.events_of(data)])
    return json.loads(labs_protocol.dumps(whole)), streamed


def joined(content: list[dict[str, Any]]) -> Any:
    """Return the message that blocks become when they come back."""
    turns = [*ASK, {"role": "assistant", "content": content}, *ASK]
    return plain(messages=turns)[1] if content else None


def random_parts(text: str, form: Any, chance: random.Random) -> list[Any]:
    """Return the parts of an answer whose text comes in random pieces."""
    import labs_split

    splitter = labs_split.Splitter(form, names={"add"})
    cuts = sorted(chance.sample(range(len(text) + 1), min(len(text), 5)))
    pieces = [text[a:b] for a, b in itertools.pairwise([0, *cuts, len(text)])]
    take = labs_parts.Reader(None, labs.Generation(), splitter)  # type: ignore[arg-type]
    parts = [part for piece in pieces for part in take(labs.Delta(piece))]
    parts += take._parts(splitter.end(whole=True))
    usage, timings = labs.Usage(9, 4, cached_tokens=3), labs.Timings(0.0, 0.0, 0.0, 0.0)
    return [*parts, labs.Done("stop", usage, timings)]


def test_a_required_call_is_of_its_tool(site):
    thinks = {"thinking": {"type": "enabled", "budget_tokens": 3}, "max_tokens": 1500}
    named = {"type": "tool", "name": "get_weather", "disable_parallel_tool_use": True}
    found = said(site, None, tools=[ADD, WEATHER], tool_choice=named, **thinks)
    (call,) = [each for each in found["content"] if each["type"] == "tool_use"]
    assert (call["name"], call["input"]["city"] in ("Paris", "Rome")) == ("get_weather", True)
    assert found["stop_reason"] == "tool_use"


def test_a_filter_ends_an_answer_as_a_refusal(engine):
    site = filtered(engine, deny=("bad",), mask=("email",))
    assert said(site, f"{THOUGHT}so bad, yes")["stop_reason"] == "refusal"
    asked = {**BODY, "messages": [*ASK, A, turn("user", {**RESULT, "content": "bad"})]}
    assert error_of(site.post(MESSAGES, {**asked, "tools": [ADD]}), 400)


# ---------------------------------------------------------------- errors, keys and headers


def test_errors_before_the_resource_have_anthropics_form(fake):
    fake.pieces = ["Hi"]
    site = Site(fake, kit.configured(*KEYS, max_body_bytes=2000))
    key = {"x_api_key": KEYS[0]}
    error_of(site.post(MESSAGES, BODY), 401, "authentication_error")
    error_of(site.get(MESSAGES, **key), 405)
    error_of(site.post(MESSAGES, BODY, Content_Type="text/plain", **key), 415)
    large = {**BODY, "system": "x" * 3000}
    error_of(site.post(MESSAGES, large, **key), 413, "request_too_large")
    error_of(site.post(MESSAGES, {**BODY, "model": "x"}, **key), 404, "not_found_error")
    error_of(site.post(f"{MESSAGES}/batches", {}, **key), 404, "not_found_error")
    error_of(site.post(MESSAGES, BODY, Host="evil.com", **key), 421)
    assert site.post(f"{MESSAGES}?beta=true", BODY, anthropic_beta="x,y", **key).status_code == 200
    fake.refusal = labs_engine.Busy("full")
    error_of(site.post(MESSAGES, BODY, **key), 503, "overloaded_error")
    fake.refusal = RuntimeError("x")
    assert "server's log" in error_of(site.post(MESSAGES, BODY, **key), 500, "api_error")
    kit.error_of(site.post("/v1/chat/completions", {}, **key), 400)


def test_a_quota_is_a_rate_limit_error(fake):
    site = Site(fake, kit.configured(requests_per_minute=1))
    assert site.post(MESSAGES, BODY).status_code == 200
    answer = site.post(MESSAGES, BODY)
    error_of(answer, 429, "rate_limit_error")
    assert int(answer.headers["retry-after"]) > 0


def test_a_prompt_that_is_too_long_is_refused_in_words_by_which_clients_know_it(fake):
    long = {**BODY, "messages": [turn("user", "x" * 5000)]}
    message = error_of(Site(fake, kit.configured()).post(MESSAGES, long), 400)
    assert message == "prompt is too long: 5004 tokens > 4096 maximum"
    small = Site(fake, kit.configured(max_prompt_bytes=1000))
    message = error_of(small.post(MESSAGES, long), 400)
    assert message.startswith("prompt is too long: the prompt has 5")


def test_an_error_in_a_stream_is_an_event_of_its_form(fake):
    fake.error = labs.GenerationError("out of memory")
    site = Site(fake, kit.configured())
    answer = site.post(MESSAGES, {**BODY, "stream": True})
    *_, (name, data) = kit.events_of(answer.content)
    found = json.loads(data)
    assert (name, found["type"]) == ("error", "error")
    assert found["error"]["type"] == "api_error"
    assert "server's log" in found["error"]["message"]
    assert found["request_id"] == answer.headers["request-id"]
    error_of(site.post(MESSAGES, BODY), 500, "api_error")


def test_a_silent_stream_sends_pings(site, monkeypatch):
    import labs_answers

    monkeypatch.setattr(labs_answers, "PING_S", 0.0)
    monkeypatch.setattr(labs_answers, "DOUBT_S", 0.0)
    monkeypatch.setattr(labs_answers, "POLL_S", 0.0001)
    events = events_of(site.post(MESSAGES, {**BODY, "stream": True}))
    assert sum(event["type"] == "ping" for event in events) > 1


ORIGIN = "https://app.example"
BROWSER = "x-api-key, anthropic-version, anthropic-dangerous-direct-browser-access, content-type"


def test_browsers_may_ask_where_their_origin_is_allowed(fake):
    site = Site(fake, kit.configured(KEYS[0], allow_origins=(ORIGIN,)))
    asks = {"Access_Control_Request_Method": "POST", "Access_Control_Request_Headers": BROWSER}
    answer = site.ask("OPTIONS", MESSAGES, Origin=ORIGIN, **asks)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-headers"] == BROWSER
    answer = site.post(MESSAGES, BODY, Origin=ORIGIN, x_api_key=KEYS[0])
    assert answer.headers["access-control-allow-origin"] == ORIGIN
    assert "request-id" in answer.headers["access-control-expose-headers"]


def test_anthropics_client_raises_its_own_errors(live, client):
    live.engine.text = "Hi"
    cases: list[tuple[dict[str, Any], Any, str]] = [
        ({"model": "claude-haiku"}, anthropic.NotFoundError, "unknown model 'claude-haiku'"),
        ({"messages": [turn("user", IMAGE)]}, anthropic.BadRequestError, "messages[0].content[0]"),
        ({"messages": [turn("user", "x" * 5000)]}, anthropic.BadRequestError, "prompt is too long"),
    ]
    for body, kind, named in cases:
        for stream in (False, True):
            with pytest.raises(kind) as raised:
                client.messages.create(**{**BODY, **body}, stream=stream)
            assert named in str(raised.value)
            assert raised.value.request_id


def test_what_the_server_refuses_by_itself_has_anthropics_form(live):
    sent = f"POST {MESSAGES} HTTP/1.1\r\nHost: localhost\r\nContent-Length: x\r\n\r\n"
    head, _, body = live.raw(sent.encode()).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400")
    assert json.loads(body)["error"]["type"] == "invalid_request_error"


# ---------------------------------------------------------------- counting and models


def test_counting_runs_no_model_and_counts_what_an_answer_uses(fake):
    site = Site(fake, kit.configured())
    turns = [turn("user", "hi"), turn("assistant", "ho"), turn("user", "hi")]
    count = site.post(COUNT, {"messages": turns, "system": "s", "model": "tiny"})
    assert not fake.asked
    usage = site.post(MESSAGES, {**BODY, "messages": turns, "system": "s"}).json["usage"]
    assert count.json == {"input_tokens": usage["input_tokens"] + 5}
    assert "max_tokens" in error_of(site.post(COUNT, BODY), 400)
    error_of(site.post(COUNT, {"messages": turns, "model": "x"}), 404, "not_found_error")
    begun = site.post(COUNT, {"messages": turns[:2], "system": "s"}).json["input_tokens"]
    assert begun < count.json["input_tokens"]


def test_models_are_listed_in_anthropics_form_where_its_header_is_sent(fake):
    others = dict.fromkeys((f"m{number}" for number in range(4)), kit.configured())
    config = msgspec.structs.replace(kit.configured(), models=others)
    site = Site(fake, config)

    def page(query: str = "") -> Any:
        return site.get(f"/v1/models{query}", anthropic_version="2023-06-01")

    names = [each["id"] for each in site.get("/v1/models").json["data"]]
    found = page().json
    assert [each["id"] for each in found["data"]] == names
    assert (found["has_more"], found["first_id"], found["last_id"]) == (False, names[0], names[-1])
    assert types.ModelInfo.model_validate(found["data"][0], strict=False).type == "model"
    for query, wanted, more in (
        ("?limit=2", names[:2], True),
        (f"?limit=2&after_id={names[1]}", names[2:4], len(names) > 4),
        (f"?limit=2&before_id={names[3]}", names[1:3], True),
        (f"?after_id={names[-1]}", [], False),
    ):
        found = page(query).json
        assert ([each["id"] for each in found["data"]], found["has_more"]) == (wanted, more)
    wrong = ["limit=0", "limit=x", "limit=1001", "after_id=zz", "limit=1&limit=2", "odd=1"]
    for query in (*wrong, f"limit={'9' * 9999}", "after_id=tiny&after_id=tiny"):
        assert page(f"?{query}").status_code == 400
    one = site.get("/v1/models/tiny", anthropic_version="x").json
    assert (one["id"], one["type"]) == ("tiny", "model")
    error_of(site.get("/v1/models/zz", anthropic_version="x"), 404, "not_found_error")
    assert site.get("/v1/models/tiny").json["object"] == "model"


def test_anthropics_client_lists_the_models(client):
    (model,) = client.models.list(limit=1)
    assert [each.id for each in client.beta.models.list(lifecycle=["active"])] == ["tiny"]
    assert not [*client.models.list(lifecycle=["retired", "deprecated"])]
    assert (model.id, client.models.retrieve("tiny").display_name) == ("tiny", "tiny")


# ---------------------------------------------------------------- a coding agent

TOOLS = [{**ADD, "name": f"Tool{number}", "description": "Does it."} for number in range(24)]
AGENT: dict[str, Any] = {
    "model": "tiny",
    "max_tokens": 200,
    "system": [BILLING, text("You are an agent.", **CACHED), text("Rules. " * 60, **CACHED)],
    "tools": [*TOOLS, {**LATE, "name": "DeferredToolPlaceholder"}],
    "metadata": {"user_id": '{"device_id": "x"}'},
    "thinking": {"type": "adaptive", "display": "omitted"},
    "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
    "output_config": {"effort": "high"},
}


@pytest.fixture(scope="module")
def roomy(tmp_path_factory: Any) -> Iterator[Any]:
    """Return an engine that remembers prefixes, of a model with room for a long conversation."""
    tokenizer, config = wire_forms.tokenizer_of("hermes"), kit.llama()
    config.vocab_size, config.max_position_embeddings = len(tokenizer), 65_536
    folder = kit.save_model(tmp_path_factory.mktemp("roomy") / "m", config)
    model = msgspec.structs.replace(kit.load(folder), tokenizer=tokenizer)
    found = Scripted(labs_engine.Engine(model, labs.Server(prefix_cache_bytes=2**30)))
    yield found
    found.engine.close(5)


@pytest.mark.parametrize("stream", [False, True])
def test_a_coding_agent_reuses_what_its_last_turn_computed(stream, roomy):
    site = Site(roomy, kit.configured(generation=GREEDY))
    turns: list[Any] = [turn("user", text("<system-reminder>a"), text("Do it."))]
    turns += [turn("system", text("# Environment", **CACHED))]
    before: tuple[int, ...] = ()
    for number in range(10):
        roomy.text = f"<think>\nhm {number}\n</think>\n\nI look.\n"
        roomy.text += f"{called(name='Tool1')}\n{called('{}', name='Tool2')}"
        billing = text(f"{BILLING['text']} cch={number};")
        body = {**AGENT, "system": [billing, *AGENT["system"][1:]], "messages": turns}
        answer = site.post(MESSAGES, {**body, "stream": stream})
        message = folded(events_of(answer)) if stream else answer.json
        assert message["stop_reason"] == "tool_use", message
        ids = labs.build_inputs(roomy.model, **native(body)).input_ids
        pairs = itertools.takewhile(lambda two: two[0] == two[1], zip(before, ids, strict=False))
        chunk, usage = roomy.model.decoder.chunk, message["usage"]
        common = len([*pairs]) // chunk * chunk
        assert usage["cache_read_input_tokens"] >= 0.95 * common
        assert usage["input_tokens"] + usage["cache_read_input_tokens"] == len(ids)
        assert not number or common >= 0.95 * (len(before) // chunk * chunk)
        calls = [each["id"] for each in message["content"] if each["type"] == "tool_use"]
        results = [{**RESULT, "tool_use_id": call, "content": "rain " * 60} for call in calls]
        turns += [{"role": "assistant", "content": message["content"]}, turn("user", *results)]
        before = ids


def native(body: dict[str, Any]) -> dict[str, Any]:
    (prompt,) = request_of(**body).prompts
    return {"messages": prompt.messages, "tools": prompt.tools}


# ---------------------------------------------------------------- strange requests

PIECES: list[Any] = [
    *(None, True, 5, -1, 0.5, 1e308, 2**70, "", "hi", "text", "\0", "<end><bot>", [], {}, [[]]),
    *([{}], {"type": "text"}, USE, RESULT, IMAGE, thinking("hm"), text("a"), ADDED, REFERENCE),
    *({"type": "object"}, {"$ref": "#"}, "a" * 3000, {"type": "adaptive"}, {"type": "any"}, ADD),
]


def mutated(value: Any, chance: random.Random) -> Any:
    """Return a value of which some place is different."""
    if not value or not isinstance(value, dict | list) or chance.random() < 0.25:
        return chance.choice(PIECES)
    places = list(value) if isinstance(value, dict) else list(range(len(value)))
    place, found = chance.choice(places), value.copy()
    if chance.random() < 0.1:
        del found[place]
        return found
    found[place] = mutated(value[place], chance)
    if isinstance(found, dict) and chance.random() < 0.1:
        found[chance.choice(["odd", "type", "cache_control", "name"])] = chance.choice(PIECES)
    return found


SEED: dict[str, Any] = {
    **AGENT, **HINTS, "max_tokens": 4, "temperature": 1, "top_p": 0.5, "top_k": 3,
    "tools": [ADD, WEATHER, LATE], "tool_choice": {"type": "auto"}, "stop_sequences": ["x"],
    "messages": [
        USER, turn("system", text("now"), ADDED),
        turn("assistant", thinking("hm"), text("x"), USE),
        turn("user", {**RESULT, "content": [text("a"), REFERENCE]}, text("go")),
    ],
}  # fmt: skip


def fuzz(site: Site, count: int, seed: int) -> set[int]:
    """Send strange bodies, and return the statuses of their answers."""
    chance, found = random.Random(seed), set[int]()
    for number in range(count):
        body = SEED
        for _ in range(chance.choice([0, 1, 1, 1, 2, 3])):
            body = mutated(body, chance)
        if isinstance(body, dict) and chance.random() < 0.3:
            body = {**body, "stream": chance.random() < 0.5}
        path = MESSAGES if number % 4 else COUNT
        if path == COUNT and isinstance(body, dict):
            names = {"max_tokens", "temperature", "top_p", "top_k", "stop_sequences", "stream"}
            body = {name: value for name, value in body.items() if name not in names}
        answer = site.post(path, json.dumps(body).encode())
        found.add(answer.status_code)
        assert answer.status_code < 500, (body, answer.text)
        assert "event: error" not in answer.text, (body, answer.text)
        if answer.status_code != 200:
            kind = {404: "not_found_error", 413: "request_too_large"}
            error_of(
                answer, answer.status_code, kind.get(answer.status_code, "invalid_request_error")
            )
    return found


@pytest.mark.parametrize("count", [300, pytest.param(2000, marks=pytest.mark.long)])
def test_strange_requests_are_answered_or_refused_but_never_fail(engine, count):
    engine.text = None
    site = Site(engine, kit.configured(generation=GREEDY))
    assert site.post(MESSAGES, SEED).status_code == 200
    assert {200, 400} <= fuzz(site, count, 7) <= {200, 400, 404}
