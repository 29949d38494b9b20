# SPDX-License-Identifier: Apache-2.0
"""Tests of labs_api.py: bodies and answers on a fake engine, true clients of a tiny true model."""

from __future__ import annotations

import contextlib
import functools
import gzip
import json
import math
import queue
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import falcon.testing
import httpx
import kit
import msgspec
import openai
import pytest
import schemathesis
import schemathesis.checks
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from kit import (
    ANSWERED,
    BODIES,
    CHAT,
    COMPLETIONS,
    HELLO,
    JSON,
    KEYS,
    ROWS,
    WAIT_S,
    WAITING,
    A,
    Brake,
    FakeEngine,
    Later,
    Live,
    Site,
    chunks_of,
    configured,
    error_of,
    events_of,
    request,
    until,
)
from openai.types import chat
from openai.types import completion_create_params as completion_params
from openai.types.chat import completion_create_params as chat_params
from schemathesis.specs.openapi import checks as openapi_checks

import labs
import labs_api
import labs_engine
import labs_models
import labs_openai
import labs_request
import labs_turns

MESSAGES: dict[str, Any] = {
    "system": chat.ChatCompletionSystemMessageParam,
    "developer": chat.ChatCompletionDeveloperMessageParam,
    "user": chat.ChatCompletionUserMessageParam,
    "assistant": chat.ChatCompletionAssistantMessageParam,
}


# ---------------------------------------------------------------- helpers


# ---------------------------------------------------------------- bodies


DEEP = b"[" * 100_000
BAD_JSON = {
    "empty": b"",
    "truncated": b'{"prompt": "a"',
    "trailing text": b'{"prompt": "a"} x',
    "single quotes": b"{'prompt': 'a'}",
    "invalid UTF-8": b'{"prompt": "\xff"}',
    "UTF-16": '{"prompt": "a"}'.encode("utf-16"),
    "two byte order marks": b'\xef\xbb\xbf\xef\xbb\xbf{"prompt": "a"}',
    "a lone surrogate": b'{"prompt": "\\ud800"}',
    "a control character": b'{"prompt": "a\nb"}',
    "NaN": b'{"prompt": "a", "temperature": NaN}',
    "Infinity": b'{"prompt": "a", "temperature": Infinity}',
    "a deep list": DEEP,
    "a deep field": b'{"prompt": ' + DEEP,
    "a deep refused field": b'{"messages": [{"role": "user", "content": "a"}], "tools": ' + DEEP,
}


@pytest.mark.parametrize("path", [CHAT, "/generate"])
@pytest.mark.parametrize("body", BAD_JSON.values(), ids=BAD_JSON)
def test_what_is_no_json_is_refused(site: Site, path: str, body: bytes) -> None:
    error = error_of(site.post(path, body), 400)
    assert error["type"] == "invalid_request_error"
    assert error["code"] in ("invalid_json", "invalid_value")  # wrong in both ways: either will do
    assert not site.engine.asked


def test_what_is_no_json_has_a_code_of_its_own(site: Site) -> None:
    assert error_of(site.post("/generate", b"{"), 400)["code"] == "invalid_json"


WRONG = [
    ("/generate", '"temperature": 1e999', "temperature"),
    ("/generate", '"temperature": -0.1', "temperature"),
    ("/generate", '"temperature": "0.5"', "temperature"),
    ("/generate", '"max_new_tokens": ' + "9" * 400, "max_new_tokens"),
    ("/generate", '"max_new_tokens": ' + "9" * 5000, "max_new_tokens"),
    ("/generate", '"max_new_tokens": 16.0', "max_new_tokens"),
    ("/generate", '"max_new_tokens": "16"', "max_new_tokens"),
    ("/generate", '"max_new_tokens": true', "max_new_tokens"),
    ("/generate", '"max_new_tokens": null', "max_new_tokens"),
    ("/generate", '"max_new_tokens": 0', "max_new_tokens"),
    ("/generate", '"seed": -1', "seed"),
    ("/generate", '"stop": [""]', "stop[0]"),
    ("/generate", '"stop": ["a", 1]', "stop[1]"),
    ("/generate", '"max_tokens": 5', "max_tokens"),
    ("/generate", '"foo": 5', "foo"),
    ("/generate", '"do_sample": true, "temperature": 0', "do_sample"),
    ("/generate", '"messages": [{"role": "user", "content": 5}]', "messages[0].content"),
    (CHAT, '"messages": []', "messages"),
    (CHAT, '"messages": null', "messages"),
    (CHAT, '"messages": [{"role": "tool", "content": "a"}]', "messages[0].role"),
    (CHAT, '"messages": [{"role": "user"}]', "messages[0].content"),
    (CHAT, '"messages": [{"role": "system", "content": null}]', "messages[0].content"),
    (CHAT, '"messages": [{"role": "user", "content": "a", "name": 5}]', "messages[0].name"),
    (CHAT, '"metadata": "a"', "metadata"),
    (COMPLETIONS, '"user": 5', "user"),
    (CHAT, '"seed": -2', "seed"),
    (COMPLETIONS, '"max_tokens": -2', "max_tokens"),
    (
        CHAT,
        '"messages": [{"role": "user", "content": [{"type": "image_url"}]}]',
        "messages[0].content[0].type",
    ),
    (CHAT, '"n": 0', "n"),
    (CHAT, '"n": 9', "n"),
    (CHAT, '"max_tokens": 0', "max_tokens"),
    (CHAT, '"max_tokens": 5, "max_completion_tokens": 6', "max_tokens"),
    (CHAT, '"top_logprobs": 2', "top_logprobs"),
    (CHAT, '"logprobs": true, "top_logprobs": 21', "top_logprobs"),
    (CHAT, '"stream_options": {"include_usage": true}', "stream_options"),
    (CHAT, '"stream": true, "stream_options": {"foo": 1}', "foo"),
    (CHAT, '"logit_bias": {"5": 101}', "logit_bias[...]"),
    (CHAT, '"stop": ["1", "2"' + ', "3"' * 15 + "]", "stop"),
    (CHAT, '"max_new_tokens": 5', "max_new_tokens"),
    (COMPLETIONS, '"prompt": null', "prompt"),
    (COMPLETIONS, '"prompt": []', "prompt"),
    (COMPLETIONS, '"prompt": [[]]', "prompt"),
    (COMPLETIONS, '"prompt": [-1]', "prompt[0]"),
    (COMPLETIONS, '"prompt": [300]', "prompt"),
    (COMPLETIONS, '"logprobs": true', "logprobs"),
]


@pytest.mark.parametrize(("path", "field", "param"), WRONG, ids=lambda value: str(value)[:60])
def test_a_wrong_value_is_refused_and_named(site: Site, path: str, field: str, param: str) -> None:
    whole = {f'"{name}": {json.dumps(value)}' for name, value in BODIES[path].items()}
    whole = {part for part in whole if part.partition(":")[0] not in field}
    error = error_of(site.post(path, ("{" + ", ".join([*whole, field]) + "}").encode()), 400)
    assert error["param"] == param
    assert not site.engine.asked


def test_a_required_field_that_is_missing_is_named(site: Site) -> None:
    assert "messages" in error_of(site.post(CHAT, {}), 400)["message"]


@pytest.mark.parametrize("body", [{}, {"prompt": "a", "messages": HELLO}, {"prompt": ""}])
def test_generate_takes_either_a_prompt_or_messages(site: Site, body: Any) -> None:
    error_of(site.post("/generate", body), 400)


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("kind", ["application/x-www-form-urlencoded", "text/plain", ""])
def test_a_body_that_is_not_called_json_is_refused(site: Site, path: str, kind: str) -> None:
    assert error_of(site.post(path, BODIES[path], Content_Type=kind), 415)["code"] == "not_json"
    assert not site.engine.asked


def test_a_content_type_may_name_a_charset(site: Site) -> None:
    kind = "Application/JSON; charset=utf-8"
    assert site.post("/generate", {"prompt": "a"}, Content_Type=kind).status_code == 200


def test_a_byte_order_mark_before_the_json_is_passed_over(site: Site) -> None:
    for path, body in BODIES.items():
        data = b"\xef\xbb\xbf" + json.dumps(body).encode()
        assert site.post(path, data).status_code == 200


@pytest.mark.parametrize("coding", ["gzip", "br", "deflate, gzip", "GZIP"])
def test_a_packed_body_is_refused_by_the_name_of_its_packing(site: Site, coding: str) -> None:
    body = gzip.compress(json.dumps({"prompt": "a"}).encode())
    error = error_of(site.post("/generate", body, Content_Encoding=coding), 415)
    assert (error["code"], error["param"]) == ("unsupported_encoding", "Content-Encoding")
    assert f"Content-Encoding: {coding}" in error["message"]
    assert site.post("/generate", {"prompt": "a"}, Content_Encoding="identity").status_code == 200


@pytest.mark.parametrize("path", ["/explain", "/generate", CHAT])
def test_no_path_of_the_server_is_told_to_clients(
    fake: FakeEngine, tmp_path: Any, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = str(tmp_path / "secret")
    spec = labs.evolve(fake.model.spec, model_name=secret, cache_dir=secret)
    fake.model = msgspec.structs.replace(fake.model, spec=spec)
    sources = dict.fromkeys((*GENERATION, "model_name"), f"{secret}/labs.toml [models.tiny]")
    site = Site(fake, msgspec.structs.replace(configured(), sources=sources, model=spec))
    monkeypatch.setattr(fake.model.tokenizer, "chat_template", "{{ raise_exception('odd') }}")
    assert "odd" in error_of(site.post(path, {"messages": HELLO}), 400)["message"]
    answers = [
        site.post(path, BODIES[path] | wrong) for wrong in ({}, {"seed": -7}, {"model": "x"})
    ]
    answers += [site.post("/explain", {"prompt": "a", "use_chat_template": False})]
    assert answers[-1].status_code == 200
    assert not [answer.text for answer in answers if secret in answer.text]


def test_a_body_over_the_limit_is_refused(fake: FakeEngine) -> None:
    site = Site(fake, configured(max_body_bytes=1024))
    body = json.dumps({"prompt": "a"}).encode()
    assert site.post("/generate", body.ljust(1024)).status_code == 200
    assert error_of(site.post("/generate", body.ljust(1025)), 413)["code"] == "body_too_large"


@pytest.mark.parametrize("path", ["/generate", CHAT, COMPLETIONS])
def test_a_prompt_over_the_limit_is_refused(fake: FakeEngine, path: str) -> None:
    body = json.dumps(BODIES[path]).replace("hi", "é" * 5)
    assert Site(fake, configured(max_prompt_bytes=10)).post(path, body.encode()).status_code == 200
    small = Site(fake, configured(max_prompt_bytes=9))
    assert error_of(small.post(path, body.encode()), 400)["code"] == "prompt_too_large"


@pytest.mark.parametrize("path", ["/nothing", "/generate/x", "/v1", "/health/../generate"])
def test_an_unknown_path_is_not_found(site: Site, path: str) -> None:
    error = error_of(site.get(path), 404)
    assert (error["type"], error["code"]) == ("not_found_error", "not_found")


@pytest.mark.parametrize(
    ("method", "path"), [("GET", "/generate"), ("POST", "/health"), ("DELETE", "/v1/models")]
)
def test_a_wrong_method_is_refused(site: Site, method: str, path: str) -> None:
    response = site.ask(method, path)
    assert error_of(response, 405)["code"] == "method_not_allowed"
    assert ("POST" if path == "/generate" else "GET") in response.headers["allow"]


@pytest.mark.parametrize("path", BODIES)
def test_an_unknown_model_is_not_found(site: Site, path: str) -> None:
    error = error_of(site.post(path, {**BODIES[path], "model": "../etc/passwd"}), 404)
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert error_of(site.get("/v1/models/other"), 404)["code"] == "model_not_found"


REFUSALS = [
    (labs_engine.Busy("2 requests are under way"), 503, "overloaded"),
    (labs.PromptTooLong("the prompt has 9 tokens"), 400, "context_length_exceeded"),
    (labs.InputError("logit_bias names token 999"), 400, "invalid_value"),
]


@pytest.mark.parametrize("path", ANSWERED)
@pytest.mark.parametrize(("refusal", "status", "code"), REFUSALS, ids=["busy", "long", "input"])
def test_what_the_engine_refuses_is_told(
    site: Site, path: str, refusal: Any, status: int, code: str
) -> None:
    site.engine.refusal = refusal
    response = site.post(path, BODIES[path])
    error = error_of(response, status)
    assert (error["code"], error["message"]) == (code, str(refusal))
    assert ("retry-after" in response.headers) == (status == 503)


@pytest.mark.parametrize("path", ANSWERED)
def test_an_unforeseen_error_tells_its_request_and_no_more(
    site: Site, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    site.engine.refusal = KeyError("/secret/path")
    response = site.post(path, BODIES[path], X_Request_Id="abc-1")
    error = error_of(response, 500)
    assert "abc-1" in error["message"]
    assert "secret" not in response.text
    assert error["type"] == "server_error"
    assert "/secret/path" in caplog.text


@pytest.mark.parametrize("path", ["/generate", CHAT, COMPLETIONS])
def test_a_row_that_fails_is_a_server_error(site: Site, path: str) -> None:
    site.engine.error = labs.GenerationError("nan at layer 3")
    response = site.post(path, BODIES[path])
    assert "layer" not in error_of(response, 500)["message"]


def test_all_choices_are_let_go_when_one_cannot_be_taken(fake: FakeEngine) -> None:
    submit, site = fake.submit, Site(fake, configured())

    def third_is_too_much(*inputs: Any, **options: Any) -> Any:
        fake.refusal = labs_engine.Busy("full") if len(fake.asked) == 2 else None
        return submit(*inputs, **options)

    fake.submit = third_is_too_much  # type: ignore[method-assign]
    error_of(site.post(CHAT, {"messages": HELLO, "n": 3}), 503)
    assert {1, 2} <= {*fake.left}


# ---------------------------------------------------------------- what is asked reaches the engine


ODD = {"best_of": 2, "min_tokens": 3, "reasoning_effort": "high", "add_generation_prompt": False}
EFFECT = {
    *labs_openai.ChatRequest.__struct_fields__,
    *labs_openai.CompletionRequest.__struct_fields__,
}
HINTS = {
    "cache_prompt": True,
    "metadata": {"a": "b"},
    "parallel_tool_calls": False,
    "priority": 3,
    "prompt_cache_key": "k",
    "prompt_cache_options": {"mode": "explicit"},
    "prompt_cache_retention": "24h",
    "request_id": "r",
    "safety_identifier": "s",
    "service_tier": "flex",
    "store": True,
    "user": "u",
}


@pytest.mark.parametrize(
    ("params", "kind"),
    [
        (chat_params.CompletionCreateParamsBase, labs_openai.ChatRequest),
        (completion_params.CompletionCreateParamsBase, labs_openai.CompletionRequest),
    ],
)
def test_every_field_of_openais_own_client_is_known_here(params: Any, kind: Any) -> None:
    known = {*kind.__struct_fields__, *labs_openai.NEUTRAL, *labs_openai.Hints.__struct_fields__}
    assert params.__annotations__.keys() <= known


def test_every_field_of_openais_messages_is_known_here() -> None:
    roles = ("system", "developer", "user", "assistant")
    fields = {name for role in roles for name in MESSAGES[role].__annotations__}
    assert fields <= {*labs_openai.ChatMessage.__struct_fields__}
    part = chat.ChatCompletionContentPartTextParam.__annotations__
    assert part.keys() <= {*labs_openai.TextPart.__struct_fields__, "type"}


def test_no_field_is_in_two_of_the_tables() -> None:
    tables = [EFFECT, {*labs_openai.NEUTRAL}, {*labs_openai.Hints.__struct_fields__}]
    assert sum(map(len, tables)) == len(set.union(*tables))
    assert tables[2] == {*HINTS}


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("name", HINTS)
def test_a_hint_changes_nothing_whatever_it_says(site: Site, path: str, name: str) -> None:
    plain = site.post(path, BODIES[path]).json
    hinted = site.post(path, {**BODIES[path], name: HINTS[name]}).json
    assert hinted["choices"] == plain["choices"]
    (first, *how), (second, *same) = site.engine.asked
    assert (first, how) == (second, same)


@pytest.mark.parametrize(
    ("path", "sent"),
    [
        (COMPLETIONS, {"best_of": 3, "n": 3}),
        (CHAT, {"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "none"}),
        (CHAT, {"functions": [{"name": "f"}], "function_call": "none"}),
    ],
)
def test_what_another_field_makes_ask_for_nothing_is_taken(
    site: Site, path: str, sent: Any
) -> None:
    assert site.post(path, {**BODIES[path], **sent}).status_code == 200
    for name, rest in ((name, {k: v for k, v in sent.items() if k != name}) for name in sent):
        if rest.keys() & {"best_of", "tools", "functions"}:
            error = error_of(site.post(path, {**BODIES[path], **rest}), 400)
            assert (error["code"], error["param"]) == ("unsupported", next(iter(rest))), name


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("name", ["seed", "max_tokens", "top_k"])
def test_minus_one_is_no_choice_of_its_own(fake: FakeEngine, path: str, name: str) -> None:
    generation = labs.Generation(max_new_tokens=9, seed=5, top_k=7)
    site = Site(fake, configured(generation=generation))
    assert site.post(path, {**BODIES[path], name: -1}).status_code == 200
    assert fake.generation == labs.evolve(generation, **({"top_k": 0} if name == "top_k" else {}))
    error_of(site.post("/generate", {"prompt": "a", name: -1}), 400)


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("name", labs_openai.NEUTRAL)
def test_what_is_not_implemented_is_refused_by_name(site: Site, name: str, path: str) -> None:
    error = error_of(site.post(path, {**BODIES[path], name: ODD.get(name, ["odd"])}), 400)
    assert (error["code"], error["param"]) == ("unsupported", name)
    assert not site.engine.asked


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("name", labs_openai.NEUTRAL)
def test_a_value_that_asks_for_nothing_is_taken(site: Site, name: str, path: str) -> None:
    for value in (None, *labs_openai.NEUTRAL[name]):
        assert site.post(path, {**BODIES[path], name: value}).status_code == 200, value


GENERATION = {
    "max_new_tokens": 7,
    "temperature": 0.25,
    "top_p": 0.5,
    "top_k": 3,
    "min_p": 0.125,
    "do_sample": True,
    "repetition_penalty": 1.5,
    "frequency_penalty": -1.5,
    "presence_penalty": 1.25,
    "logit_bias": {"5": -100.0},
    "logprobs": 2,
    "stop": ["a", "b"],
    "prompt_lookup_num_tokens": 4,
    "seed": 9,
    "timeout_s": 1.5,
}


def test_every_field_of_generation_is_tried() -> None:
    assert GENERATION.keys() == {*labs.Generation.__struct_fields__}


@pytest.mark.parametrize("path", ["/generate", "/generate/stream"])
@pytest.mark.parametrize("name", GENERATION)
def test_generate_takes_every_generation_setting(site: Site, path: str, name: str) -> None:
    response = site.post(path, {"prompt": "hi", name: GENERATION[name]})
    assert response.status_code == 200
    changes = msgspec.convert({name: GENERATION[name]}, labs.Generation, strict=False)
    assert site.engine.generation == changes
    assert changes != labs.Generation()


NO_SCHEMA = {"type": "json_schema", "json_schema": {"schema": {"type": "nothing"}}}
READING = "{% for m in messages %}{{ m.role ~ (m.name or '') ~ m.content }};{% endfor %}"
READING += "{{ add_generation_prompt }}"
BOTH = {
    **{k: v for k, v in GENERATION.items() if k in labs_openai.OpenAIRequest.__struct_fields__},
    **{"model": "other", "max_tokens": 3, "n": 2, "stream": True, "stream_options": {}},
}
SCHEMA = {"schema": {"type": "object"}}
FORMAT = {"type": "json_schema", "json_schema": SCHEMA}
PART = {"type": "text", "text": "hi"}
TURN = {"role": "assistant", "content": ""}


def within(path: str, *keys: Any) -> Callable[[Any], Any]:
    """Return a function that puts fields where `keys` lead to in a body of `path`."""
    body = {
        "format": {"messages": HELLO, "response_format": FORMAT},
        "options": {"messages": HELLO, "stream": True, "stream_options": {}},
        "part": {"messages": [{"role": "user", "content": [PART]}]},
        "refusal": {"messages": [{**TURN, "content": [{"type": "refusal", "refusal": "a"}]}]},
        "turn": {"messages": [TURN]},
        "message": {"messages": HELLO},
    }.get(path, BODIES.get(path))

    def put(fields: dict[str, Any]) -> dict[str, Any]:
        copied: Any = json.loads(json.dumps(body))
        place = functools.reduce(lambda inner, key: inner[key], keys, copied)
        place.update(fields)
        return dict(copied)

    return put


# (struct, endpoint, body, fields with a value that is heard, fields without effect: hints)
HEARD: list[tuple[Any, str, Any, dict[str, Any], dict[str, Any]]] = [
    (
        labs_request.GenerateRequest,
        "/generate",
        within("/generate"),
        {
            **{**GENERATION, "model": "other", "prompt": "ho", "response_format": NO_SCHEMA},
            **{"documents": True, "messages": HELLO, "use_chat_template": False},
            "add_generation_prompt": False,
        },
        {},
    ),
    (
        labs_api.ChooseRequest,
        "/choose",
        within("/choose"),
        {
            **{"model": "other", "prompt": "ho", "options": ["a", "c"], "messages": HELLO},
            **{"use_chat_template": False, "add_generation_prompt": False, "timeout_s": 60.0},
        },
        {},
    ),
    (
        labs_openai.ChatRequest,
        CHAT,
        within(CHAT),
        {
            **{**BOTH, "messages": [TURN], "documents": True, "max_completion_tokens": 3},
            **{"logprobs": True, "top_logprobs": 1, "response_format": NO_SCHEMA},
        },
        {},
    ),
    (
        labs_openai.CompletionRequest,
        COMPLETIONS,
        within(COMPLETIONS),
        {**BOTH, "prompt": "ho", "logprobs": 1},
        {},
    ),
    (
        labs_openai.ChatMessage,
        CHAT,
        within("turn", "messages", 0),
        {
            **{"role": "user", "content": "a", "name": "Ada", "refusal": "no"},
            **{name: ["odd"] for name in labs_openai.NEUTRAL_OF_MESSAGE},
        },
        {"annotations": [{"type": "url_citation"}]},
    ),
    (
        labs_openai.TextPart,
        CHAT,
        within("part", "messages", 0, "content", 0),
        {"text": "ho"},
        {"prompt_cache_breakpoint": {"mode": "explicit"}, "cache_control": {"type": "ephemeral"}},
    ),
    (
        labs_openai.RefusalPart,
        CHAT,
        within("refusal", "messages", 0, "content", 0),
        {"refusal": "b"},
        {},
    ),
    (
        labs_openai.StreamOptions,
        CHAT,
        within("options", "stream_options"),
        {"include_usage": True},
        {"include_obfuscation": True},
    ),
    (
        labs_request.ResponseFormat,
        CHAT,
        within("format", "response_format"),
        {"type": "json_object", "json_schema": NO_SCHEMA["json_schema"]},
        {},
    ),
    (
        labs_request.JsonSchema,
        CHAT,
        within("format", "response_format", "json_schema"),
        {"schema": {"type": "nothing"}},
        {"name": "a", "description": "b", "strict": False},
    ),
    (
        labs.Message,
        "/generate",
        within("message", "messages", 0),
        {"role": "system", "content": "ho", "name": "Ada"},
        {},
    ),
]


@pytest.mark.parametrize(
    ("kind", "path", "put", "heard", "hints"), HEARD, ids=[each[0].__name__ for each in HEARD]
)
def test_every_field_of_a_request_is_heard_or_listed_as_a_hint(
    tiny: labs.Model,
    monkeypatch: pytest.MonkeyPatch,
    kind: Any,
    path: str,
    put: Any,
    heard: dict[str, Any],
    hints: dict[str, Any],
) -> None:
    monkeypatch.setattr(tiny.tokenizer, "chat_template", READING)

    def outcome(fields: dict[str, Any]) -> Any:
        site = Site(fake := FakeEngine(tiny), configured())
        answer = site.post(path, put(fields), X_Request_Id="one")
        text = re.sub(r'"created":\d+|"[a-z_]+_s":[^,}]+', "", answer.text)
        return answer.status_code, answer.headers["content-type"], text, fake.asked

    assert heard.keys() | hints.keys() == {*kind.__struct_fields__}
    plain = outcome({})
    assert plain[0] == 200
    for name, value in heard.items():
        assert outcome({name: value}) != plain, name
    for name, value in hints.items():
        assert outcome({name: value}) == plain, name


SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
SAME = (*SAMPLING, "frequency_penalty", "presence_penalty", "logit_bias", "seed")
OPENAI: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    *((path, {k: GENERATION[k]}, {k: GENERATION[k]}) for k in SAME for path in (CHAT, COMPLETIONS)),
    (CHAT, {"max_tokens": 5}, {"max_new_tokens": 5}),
    (COMPLETIONS, {"max_tokens": 5}, {"max_new_tokens": 5}),
    (CHAT, {"max_completion_tokens": 6}, {"max_new_tokens": 6}),
    (CHAT, {"max_tokens": 6, "max_completion_tokens": 6}, {"max_new_tokens": 6}),
    (CHAT, {"stop": "x"}, {"stop": ["x"]}),
    (COMPLETIONS, {"stop": ["x", "y"]}, {"stop": ["x", "y"]}),
    (CHAT, {"logprobs": True}, {"logprobs": 0}),
    (CHAT, {"logprobs": True, "top_logprobs": 3}, {"logprobs": 3}),
    (CHAT, {"logprobs": False}, {}),
    (COMPLETIONS, {"logprobs": 0}, {"logprobs": 0}),
    (COMPLETIONS, {"logprobs": 4}, {"logprobs": 4}),
    (CHAT, {"user": "someone", "n": 1, "stream": False, "model": "tiny"}, {}),
]


@pytest.mark.parametrize(("path", "sent", "expected"), OPENAI, ids=lambda value: str(value)[:40])
def test_what_openai_clients_ask_for_takes_effect(
    site: Site, path: str, sent: dict[str, Any], expected: dict[str, Any]
) -> None:
    assert site.post(path, {**BODIES[path], **sent}).status_code == 200
    wanted = msgspec.convert(expected, labs.Generation, strict=False)
    assert site.engine.generation == wanted


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_null_leaves_openai_settings_as_configured(fake: FakeEngine, path: str) -> None:
    generation = labs.Generation(max_new_tokens=5, temperature=0.5, stop=("x",), seed=3)
    site = Site(fake, configured(generation=generation))
    kind = {CHAT: labs_openai.ChatRequest, COMPLETIONS: labs_openai.CompletionRequest}[path]
    fields = {*kind.__struct_fields__} - BODIES[path].keys()
    assert site.post(path, {**BODIES[path], **dict.fromkeys(fields)}).status_code == 200
    assert fake.generation == generation


def test_what_is_unset_is_as_configured(fake: FakeEngine) -> None:
    generation = labs.Generation(max_new_tokens=5, temperature=0.5)
    Site(fake, configured(generation=generation)).post("/generate", {"prompt": "a", "top_k": 2})
    assert fake.generation == labs.evolve(generation, top_k=2)


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_each_choice_of_a_seeded_request_has_a_seed_of_its_own(site: Site, path: str) -> None:
    site.post(path, {**BODIES[path], "n": 3, "seed": 2**63 - 2})
    assert [generation.seed for _, generation, _ in site.engine.asked] == [2**63 - 2, 2**63 - 1, 0]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("hi", ["<bos>hi"]),
        (["a", "b"], ["<bos>a", "<bos>b"]),
        ([104, 105], ["hi"]),
        ([[104], [105, 106]], ["h", "ij"]),
    ],
)
def test_completions_take_texts_and_tokens(site: Site, prompt: Any, expected: list[str]) -> None:
    answer = site.post(COMPLETIONS, {"prompt": prompt}).json
    assert [inputs.prompt for inputs, _, _ in site.engine.asked] == expected
    assert [choice["index"] for choice in answer["choices"]] == [*range(len(expected))]


@pytest.mark.parametrize(
    "turn",
    [
        {"content": None},
        {},
        {"content": []},
        {"content": ""},
        {"content": None, "tool_calls": []},
        {"content": None, "function_call": None, "refusal": None, "audio": None},
        {"content": "", "annotations": [{"type": "url_citation"}], "reasoning_content": None},
        {"content": [{"type": "text", "text": "", "cache_control": {"type": "ephemeral"}}]},
    ],
)
def test_an_assistants_turn_may_be_empty_however_that_is_written(site: Site, turn: Any) -> None:
    messages = [*HELLO, {"role": "assistant", **turn}, {"role": "user", "content": "ho"}]
    assert site.post(CHAT, {"messages": messages}).status_code == 200
    expected = "<bos><|user|>hi<end><|assistant|><end><|user|>ho<end><|assistant|>"
    assert site.engine.asked[0][0].prompt == expected


def test_a_refusal_is_what_the_assistant_said(site: Site) -> None:
    for turn in (
        {"content": None, "refusal": "no"},
        {"content": [{"type": "refusal", "refusal": "no"}]},
    ):
        site.post(CHAT, {"messages": [*HELLO, {"role": "assistant", **turn}]})
        assert "<|assistant|>no<end>" in site.engine.asked.pop()[0].prompt


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tool_calls", [{"id": "1", "type": "function"}]),
        ("function_call", {"name": "f", "arguments": "{}"}),
        ("audio", {"id": "1"}),
        ("reasoning_content", "so"),
    ],
)
def test_what_a_message_needs_and_is_not_done_is_refused_by_name(
    site: Site, name: str, value: Any
) -> None:
    messages = [*HELLO, {"role": "assistant", "content": "a", name: value}]
    error = error_of(site.post(CHAT, {"messages": messages}), 400)
    assert (error["code"], error["param"]) == ("unsupported", f"messages[1].{name}")


@pytest.mark.parametrize("path", [CHAT, "/generate"])
def test_a_name_goes_to_templates_that_read_it_and_changes_no_other(
    site: Site, tiny: labs.Model, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = {"messages": [{**HELLO[0], "name": "Ada"}, {"role": "assistant", "content": "a"}]}
    assert site.post(path, named).status_code == 200
    assert "Ada" not in site.engine.asked.pop()[0].prompt
    reading = "{% for m in messages %}{{ m.name ~ ': ' if m.name is defined }}{{ m.content }};"
    reading += "{% endfor %}"
    monkeypatch.setattr(tiny.tokenizer, "chat_template", reading)
    assert site.post(path, named).status_code == 200
    assert site.engine.asked.pop()[0].prompt == "Ada: hi;a;"


@pytest.mark.parametrize("path", [CHAT, "/generate"])
def test_the_context_and_nothing_else_bounds_the_number_of_messages(site: Site, path: str) -> None:
    turns = [{"role": role, "content": ""} for role in ("user", "assistant")] * 600
    assert site.post(path, {"messages": turns[:1000]}).status_code == 200
    parts = [{"type": "text", "text": "a"}] * 700
    assert site.post(CHAT, {"messages": [{"role": "user", "content": parts}]}).status_code == 200
    error = error_of(site.post(path, {"messages": turns * 4}), 400)
    assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")


def test_messages_go_through_the_template(site: Site) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "developer", "content": "s"}, {"role": "user", "content": parts}]
    site.post(CHAT, {"messages": messages})
    expected = "<bos><|system|>s<end><|user|>ab<end><|assistant|>"
    assert site.engine.asked[0][0].prompt == expected


@pytest.mark.parametrize(
    ("toggles", "expected"),
    [
        ({}, "<bos><|user|>hi<end><|assistant|>"),
        ({"use_chat_template": False}, "<bos>hi"),
        ({"add_generation_prompt": False}, "<bos><|user|>hi<end>"),
        ({"use_chat_template": None}, "<bos><|user|>hi<end><|assistant|>"),
    ],
)
def test_generate_can_do_without_the_template(site: Site, toggles: Any, expected: str) -> None:
    site.post("/generate", {"prompt": "hi", **toggles})
    assert site.engine.asked[0][0].prompt == expected


CONTEXT = 4096


@pytest.mark.parametrize(
    ("path", "tokens"), [(CHAT, 4096), (CHAT, 8192), (COMPLETIONS, 4095), (COMPLETIONS, 2**20)]
)
def test_openais_endpoints_answer_with_what_is_left_of_the_context(
    site: Site, path: str, tokens: int
) -> None:
    assert site.post(path, {**BODIES[path], "max_tokens": tokens}).status_code == 200
    inputs, generation, _ = site.engine.asked[0]
    assert generation.max_new_tokens == CONTEXT - len(inputs.input_ids)


def test_each_prompt_has_what_it_leaves_itself(site: Site) -> None:
    site.post(COMPLETIONS, {"prompt": [[97] * 4000, [97] * 10], "max_tokens": 200})
    assert [generation.max_new_tokens for _, generation, _ in site.engine.asked] == [96, 200]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (
            CHAT,
            {"messages": [{"role": "user", "content": "a" * 4200}], "max_tokens": 1},
            "messages",
        ),
        (COMPLETIONS, {"prompt": "a" * 4200}, "prompt"),
        (COMPLETIONS, {"prompt": [97] * 4096}, "prompt"),
        ("/generate", {"messages": [{"role": "user", "content": "a" * 4200}]}, "messages"),
        ("/generate", {"prompt": "a" * 4200}, "prompt"),
        ("/choose", {"prompt": "a" * 4200, "options": ["a", "b"]}, "prompt"),
    ],
)
def test_a_prompt_that_does_not_fit_is_refused_in_the_words_that_clients_know(
    site: Site, path: str, body: Any, param: str
) -> None:
    error = error_of(site.post(path, body), 400)
    assert (error["code"], error["param"]) == ("context_length_exceeded", param)
    assert re.match(
        r"This model's maximum context length is 4096 tokens\. However, the prompt has 4\d\d\d",
        error["message"],
    )
    assert not site.engine.asked


# ---------------------------------------------------------------- answers


def test_generate_answers_with_all_that_is_known(site: Site) -> None:
    response = site.post("/generate", {"prompt": "hi", "seed": 4}, X_Request_Id="one")
    answer = msgspec.json.decode(response.content, type=labs_api.GenerateAnswer)
    assert (answer.id, answer.model, answer.text) == ("one", "tiny", "Hello there")
    assert (answer.finish_reason, answer.seed, answer.usage.completion_tokens) == ("stop", 4, 2)


def test_a_chat_is_answered_in_openais_words(site: Site) -> None:
    answer = site.post(CHAT, {"messages": HELLO, "n": 2}).json
    assert answer["object"] == "chat.completion"
    message = {"role": "assistant", "content": "Hello there"}
    choice = {"message": message, "logprobs": None, "finish_reason": "stop"}
    assert answer["choices"] == [{"index": 0, **choice}, {"index": 1, **choice}]
    prompt = len(site.engine.asked[0][0].input_ids)
    usage = answer["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (prompt, 4)
    assert usage["total_tokens"] == prompt + 4
    assert usage["prompt_tokens_details"] == {"cached_tokens": 5}


@pytest.mark.parametrize("reason", ["stop", "length", "timeout", "cancelled", "content_filter"])
def test_openai_clients_see_finish_reasons_that_they_know(site: Site, reason: str) -> None:
    site.engine.reason = reason
    (choice,) = site.post(CHAT, {"messages": HELLO}).json["choices"]
    known = {"timeout": "length", "cancelled": "length"}
    assert choice["finish_reason"] == known.get(reason, reason)
    assert site.post("/generate", {"prompt": "a"}).json["finish_reason"] == reason


LOGPROBS = labs.Delta("hé", tuple(labs.TokenLogprob(t, -0.5, ((97, -0.1),)) for t in (104, 195)))


def test_a_chat_tells_log_probabilities(site: Site) -> None:
    site.engine.pieces = [LOGPROBS]
    (choice,) = site.post(CHAT, {"messages": HELLO, "logprobs": True}).json["choices"]
    first, broken = choice["logprobs"]["content"]
    rival = {"token": "a", "logprob": -0.1, "bytes": [97]}
    assert first == {"token": "h", "logprob": -0.5, "bytes": [104], "top_logprobs": [rival]}
    assert (broken["token"], broken["bytes"]) == ("bytes:\\xc3", [0xC3])


def test_completions_tell_log_probabilities(site: Site) -> None:
    site.engine.pieces = [LOGPROBS]
    (choice,) = site.post(COMPLETIONS, {"prompt": "a", "logprobs": 1}).json["choices"]
    found = choice["logprobs"]
    assert (found["tokens"][0], found["token_logprobs"]) == ("h", [-0.5, -0.5])
    assert (found["top_logprobs"][0], found["text_offset"]) == ({"a": -0.1}, [0, 1])


def test_the_models_are_listed(site: Site) -> None:
    (card,) = site.get("/v1/models").json["data"]
    assert (card["id"], card["context_length"], card["loaded"]) == ("tiny", 4096, True)
    assert site.get("/v1/models/tiny").json == card


# ---------------------------------------------------------------- server-sent events


@hypothesis_settings(max_examples=60, deadline=None, derandomize=True)
@given(pieces=st.lists(st.text(alphabet="ab:\r\n \u2028\x00é", max_size=4), max_size=6))
def test_text_comes_whole_however_it_is_cut(tiny: labs.Model, pieces: list[str]) -> None:
    fake = FakeEngine(tiny)
    fake.pieces = [*pieces]
    response = Site(fake, configured()).post("/generate/stream", {"prompt": "a"})
    *texts, (last, _) = events_of(response.content)
    assert {kind for kind, _ in texts} <= {"message"}
    expected = "".join(pieces).replace("\r\n", "\n").replace("\r", "\n")
    assert ("".join(data for _, data in texts), last) == (expected, "done")


def test_a_stream_ends_with_what_is_known(site: Site) -> None:
    response = site.post("/generate/stream", {"prompt": "a"}, X_Request_Id="one")
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["cache-control"] == "no-cache"
    kind, data = events_of(response.content)[-1]
    done = json.loads(data)
    assert (kind, done["id"], done["finish_reason"]) == ("done", "one", "stop")
    assert done["usage"]["completion_tokens"] == 2
    assert "timings" in done


@pytest.mark.parametrize("path", ["/generate/stream", CHAT, COMPLETIONS])
def test_a_stream_that_fails_ends_with_an_error(site: Site, path: str) -> None:
    site.engine.error = labs.GenerationError("nan at layer 3")
    sent = BODIES[path] if path == "/generate/stream" else {**BODIES[path], "stream": True}
    response = site.post(path, sent, X_Request_Id="one")
    assert response.status_code == 200
    assert b"Hello" in response.content
    kind, data = events_of(response.content)[-1]
    error = json.loads(data)["error"]
    assert (kind, error["type"], error["code"]) == ("error", "server_error", "failed")
    assert "one" in error["message"]
    assert "layer" not in data
    assert b"[DONE]" not in response.content


def test_a_chat_stream_has_openais_order(site: Site) -> None:
    response = site.post(CHAT, {"messages": HELLO, "stream": True})
    chunks = chunks_of(response)
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    first, *middle, last = (chunk["choices"][0] for chunk in chunks)
    assert first["delta"] == {"role": "assistant", "content": ""}
    assert [choice["delta"] for choice in middle] == [{"content": "Hello"}, {"content": " there"}]
    assert (last["delta"], last["finish_reason"]) == ({}, "stop")
    assert all(choice["finish_reason"] is None for choice in (first, *middle))
    assert not any("usage" in chunk for chunk in chunks)


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_the_usage_comes_last_and_without_choices(site: Site, path: str) -> None:
    sent = {**BODIES[path], "stream": True, "stream_options": {"include_usage": True}, "n": 2}
    *chunks, last = chunks_of(site.post(path, sent))
    assert last["choices"] == []
    assert last["usage"]["prompt_tokens"] == len(site.engine.asked[0][0].input_ids)
    assert last["usage"]["completion_tokens"] == 4
    assert all(chunk["usage"] is None for chunk in chunks)


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_several_choices_share_a_stream(site: Site, path: str) -> None:
    texts, ends = dict.fromkeys(range(3), ""), []
    for chunk in chunks_of(site.post(path, {**BODIES[path], "stream": True, "n": 3})):
        (choice,) = chunk["choices"]
        text = choice["delta"].get("content", "") if path == CHAT else choice["text"]
        texts[choice["index"]] += text
        ends += [choice["index"]] * (choice["finish_reason"] is not None)
    assert texts == dict.fromkeys(range(3), "Hello there")
    assert sorted(ends) == [0, 1, 2]


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_what_some_take_for_line_ends_is_escaped(site: Site, path: str) -> None:
    site.engine.pieces = ["a\u2028b\u2029c\x85d\r\ne"]
    response = site.post(path, {**BODIES[path], "stream": True})
    lines = [line for line in response.text.splitlines() if line.startswith("data: {")]
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines]
    texts = [
        c.get("text") or c.get("delta", {}).get("content") for x in chunks for c in x["choices"]
    ]
    assert "a\u2028b\u2029c\x85d\r\ne" in texts
    assert len(chunks) == len(chunks_of(response))


def test_a_silent_stream_sends_comments(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labs_api, "PING_S", 0.0)
    monkeypatch.setattr(labs_api, "POLL_S", 0.01)
    submit = site.engine.submit

    def later(*inputs: Any, events: Any, **options: Any) -> Any:
        answer = submit(*inputs, events=(held := queue.SimpleQueue()), **options)
        release = [events.put] * held.qsize()
        timer = threading.Timer(0.2, lambda: [put(held.get()) for put in release])
        timer.start()
        return answer

    site.engine.submit = later
    for path in ("/generate/stream", CHAT):
        response = site.post(path, {**BODIES[path], **({"stream": True} if path == CHAT else {})})
        assert b"\n\n: ping\n\n" in response.content
        assert "Hello" in response.text


# ---------------------------------------------------------------- states and pages


@pytest.mark.parametrize("path", ["/", "/docs"])
def test_pages_run_only_their_own_script(site: Site, path: str) -> None:
    policy = site.get(path).headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert site.get(path).headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(
    ("doing", "health"),
    [
        ({}, "ok"),
        ({"closing": True}, "draining"),
        ({"alive": False}, "dead"),
        ({"idle_s": 61.0}, "stalled"),
    ],
)
def test_readiness_tells_the_state_of_the_engine(site: Site, doing: Any, health: str) -> None:
    site.engine.doing = doing
    response = site.get("/readyz")
    assert response.json == {"status": health}
    assert response.status_code == (200 if health == "ok" else 503)
    assert site.get("/health").json == {"status": "ok"}


def test_the_time_until_a_model_is_there_counts_but_is_no_setting(
    fake: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def engine_of(name: str) -> Any:
        time.sleep(0.2)
        return fake

    monkeypatch.setattr(labs_turns, "WORTH_COUNTING_S", 0.1)
    site = Site(fake, configured(generation=labs.Generation(timeout_s=60)))
    app = labs_api.create_app(site.config, Later(engine_of))
    site.client = falcon.testing.TestClient(app)
    told = site.post("/explain", {"prompt": "hi"}).json["settings"]["timeout_s"]
    assert told["value"] == 60
    assert site.post("/generate", {"prompt": "hi"}).status_code == 200
    assert 59 < fake.generation.timeout_s < 60
    metrics = site.get("/metrics").text
    for name in ("time_to_first_token", "e2e_request_latency"):
        (seconds,) = re.findall(rf"^labs_{name}_seconds_sum{{.*}} (.*)$", metrics, re.MULTILINE)
        assert 0.2 < float(seconds) < 20


# ---------------------------------------------------------------- true clients of a true server


@pytest.fixture
def sdk(live: Live) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(api_key="none", base_url=f"{live.url}/v1", max_retries=0) as client:
        yield client


LONG = {"prompt": "hi", "max_new_tokens": 4000, **A}  # minutes, with a pause in each step
SDK: dict[str, Any] = {"model": "tiny", "temperature": 0, "logit_bias": {"97": 100}}


def test_openais_client_chats(sdk: openai.OpenAI) -> None:
    answer = sdk.chat.completions.create(messages=HELLO, max_tokens=3, logprobs=True, **SDK)  # type: ignore[call-overload]
    (choice,) = answer.choices
    assert (choice.message.content, choice.finish_reason) == ("aaa", "length")
    assert [each.token for each in choice.logprobs.content] == ["a"] * 3
    assert answer.usage.completion_tokens == 3


def test_openais_client_streams_a_chat(sdk: openai.OpenAI) -> None:
    options = {"stream": True, "stream_options": {"include_usage": True}, "n": 2, "max_tokens": 3}
    *chunks, last = sdk.chat.completions.create(messages=HELLO, **options, **SDK)  # type: ignore[call-overload]
    texts = ["", ""]
    for choice in (choice for chunk in chunks for choice in chunk.choices):
        texts[choice.index] += choice.delta.content or ""
    assert texts == ["aaa", "aaa"]
    assert last.usage.completion_tokens == 6


def test_openais_client_completes(sdk: openai.OpenAI) -> None:
    answer = sdk.completions.create(prompt=["hi", "ho"], max_tokens=3, stop="aa", **SDK)
    assert [(choice.text, choice.finish_reason) for choice in answer.choices] == [("", "stop")] * 2
    chunks = sdk.completions.create(prompt="hi", max_tokens=3, stream=True, **SDK)
    assert "".join(chunk.choices[0].text for chunk in chunks) == "aaa"
    assert [model.id for model in sdk.models.list()] == ["tiny"]


def test_openais_client_frees_the_row_when_it_closes_a_stream(
    live: Live, sdk: openai.OpenAI, brake: Brake
) -> None:
    brake.pause_s = 0.02
    stream = sdk.completions.create(prompt="hi", max_tokens=4000, stream=True, **SDK)
    assert next(stream).choices[0].text == "a"
    assert live.doing() == (1, 0)
    stream.close()
    until(lambda: live.doing() == (0, 0))


@pytest.mark.parametrize(
    ("kind", "code", "sent"),
    [
        (openai.BadRequestError, "unsupported", {"tools": [{"type": "function"}]}),
        (
            openai.BadRequestError,
            "context_length_exceeded",
            {"messages": [{**HELLO[0], "content": "a" * 5000}]},
        ),
        (openai.BadRequestError, "invalid_value", {"logit_bias": {"4000": 1}}),
        (openai.NotFoundError, "model_not_found", {"model": "other"}),
    ],
)
def test_openais_client_raises_its_own_errors(
    sdk: openai.OpenAI, kind: Any, code: str, sent: Any
) -> None:
    with pytest.raises(kind) as caught:
        sdk.chat.completions.create(**{"messages": HELLO, **SDK, **sent})  # type: ignore[call-overload]
    assert caught.value.code == code


def test_openais_client_knows_the_other_refusals(fake: FakeEngine) -> None:
    site = Site(fake, configured(*KEYS, requests_per_minute=3))
    with pytest.raises(openai.AuthenticationError):
        site.sdk().models.list()
    sdk = site.sdk(key="s3cret")
    fake.error = labs.GenerationError("broken")
    with pytest.raises(openai.APIError, match="failed") as caught:
        list(sdk.completions.create(model="tiny", prompt="a", stream=True))
    assert caught.value.code == "failed"
    fake.refusal = labs_engine.Busy("full")
    with pytest.raises(openai.InternalServerError, match="full"):
        sdk.completions.create(model="tiny", prompt="a")
    sdk.models.list()
    with pytest.raises(openai.RateLimitError):
        sdk.models.list()


def test_headers_come_before_the_first_token_and_then_one_event_at_a_time(
    live: Live, brake: Brake
) -> None:
    brake.held = True
    body = {"prompt": "hi", "max_new_tokens": 3, **A}
    with httpx.stream("POST", f"{live.url}/generate/stream", json=body, timeout=WAIT_S) as response:
        assert response.status_code == 200
        lines = response.iter_lines()
        assert [next(lines), next(lines)] == [": ok", ""]
        brake.let(1)  # the prompt
        for _ in range(2):
            assert [next(lines), next(lines)] == ["data: a", ""]
            brake.let(1)
        assert [next(lines), next(lines)] == ["data: a", ""]
        assert next(lines) == "event: done"


@pytest.mark.parametrize("path", ["/generate/stream", "/generate"])
def test_who_hangs_up_frees_the_row(live: Live, brake: Brake, path: str) -> None:
    brake.pause_s = 0.02
    connection = live.connect(request(path, LONG))
    until(lambda: live.doing() == (1, 0))
    connection.close()
    until(lambda: live.doing() == (0, 0))


def test_who_hangs_up_while_waiting_frees_the_place(live: Live, brake: Brake) -> None:
    brake.pause_s = 0.02
    running = [live.connect(request("/generate/stream", LONG)) for _ in range(ROWS)]
    until(lambda: live.doing() == (ROWS, 0))
    waiting = [live.connect(request(path, LONG)) for path in ("/generate", "/generate/stream")]
    until(lambda: live.doing() == (ROWS, WAITING))
    for connection in waiting:
        connection.close()
    until(lambda: live.doing() == (ROWS, 0))
    for connection in running:
        connection.close()


def test_a_full_server_refuses_and_still_tells_that_it_lives(live: Live, brake: Brake) -> None:
    brake.pause_s = 0.02
    busy = [live.connect(request("/generate", LONG)) for _ in range(ROWS + WAITING)]
    until(lambda: live.doing() == (ROWS, WAITING))
    refused = httpx.post(f"{live.url}/generate", json={"prompt": "hi"}, timeout=WAIT_S)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "overloaded")
    assert int(refused.headers["retry-after"]) >= 1
    for path in ("/health", "/readyz"):
        assert httpx.get(live.url + path, timeout=WAIT_S).json() == {"status": "ok"}
    assert live.doing() == (ROWS, WAITING)
    for connection in busy:
        connection.close()


def test_a_row_that_ends_lets_the_next_one_in(live: Live, brake: Brake) -> None:
    brake.pause_s = 0.005
    body = {"prompt": "hi", "max_new_tokens": 20, **A}
    with ThreadPoolExecutor(ROWS + WAITING) as pool:
        texts = pool.map(
            lambda _: httpx.post(f"{live.url}/generate", json=body, timeout=WAIT_S).json()["text"],
            range(ROWS + WAITING),
        )
        assert [*texts] == ["a" * 20] * (ROWS + WAITING)


def test_half_a_request_asks_for_nothing(live: Live) -> None:
    steps = live.engine.status().steps
    connection = live.connect(request("/generate", {"prompt": "hi"})[:-5])
    assert httpx.get(f"{live.url}/health", timeout=WAIT_S).status_code == 200
    connection.close()
    assert httpx.get(f"{live.url}/health", timeout=WAIT_S).status_code == 200
    assert live.engine.status().steps == steps


def test_old_clients_are_answered_without_chunks(live: Live) -> None:
    body = {"prompt": "hi", "max_new_tokens": 2, **A}
    head, _, data = live.raw(request("/generate", body, version="1.0")).partition(b"\r\n\r\n")
    assert b" 200 OK" in head
    assert json.loads(data)["text"] == "aa"
    head, _, data = live.raw(request("/generate/stream", body, version="1.0")).partition(
        b"\r\n\r\n"
    )
    assert b"chunked" not in head.lower()
    assert [kind for kind, _ in events_of(data)] == ["message", "message", "done"]


def test_requests_in_a_row_on_one_connection_are_all_answered(live: Live) -> None:
    body = {"prompt": "hi", "max_new_tokens": 2, **A}
    last = request("/generate", body, "Connection: close")
    answer = live.raw(request("/generate", body) * 2 + last)
    assert answer.count(b"HTTP/1.1 200 OK") == answer.count(b'"text":"aa"') == 3


def test_a_body_in_chunks_is_read(live: Live) -> None:
    body = json.dumps({"prompt": "hi", "max_new_tokens": 2, **A}).encode()
    pieces = (body[:7], body[7:])
    assert httpx.post(
        f"{live.url}/generate", content=iter(pieces), headers=JSON, timeout=WAIT_S
    ).json()["text"] == "aa"  # fmt: skip


@pytest.mark.parametrize(
    "head",
    [
        "GET /health HTTP/1.1\r\nConnection: close\r\n",
        "GET /health HTTP/1.0\r\nHost: evil.com\r\n",
        "GET /health HTTP/1.0\r\nHost:\r\n",
        "GET /health HTTP/1.1\r\nConnection: close\r\nHost: evil.com\r\n",
        "GET /health HTTP/1.1\r\nConnection: close\r\nHost: localhost\r\nHost: evil.com\r\n",
        "GET http://evil.com/health HTTP/1.1\r\nConnection: close\r\nHost: evil.com\r\n",
    ],
)
def test_a_request_without_one_known_host_is_refused(live: Live, head: str) -> None:
    assert live.raw(f"{head}\r\n".encode()).split()[1] == b"421"


def test_a_client_older_than_hosts_is_answered(live: Live) -> None:
    head, _, data = live.raw(b"GET /health HTTP/1.0\r\n\r\n").partition(b"\r\n\r\n")
    assert (head.split()[1], json.loads(data)) == (b"200", {"status": "ok"})


def test_the_server_does_not_tell_what_it_is(live: Live) -> None:
    assert "server" not in httpx.get(f"{live.url}/health").headers


def test_a_client_that_does_not_read_holds_up_nobody(fake: FakeEngine) -> None:
    fake.pieces = ["x" * 100_000] * 300  # more than the kernel and waitress take in
    live = Live(fake, configured(port=0, max_waiting=0))
    try:
        idle = [live.connect(request("/generate/stream", {"prompt": "hi"})) for _ in range(3)]
        until(lambda: len(fake.asked) == 3)
        fake.pieces = ["short"]
        answer = httpx.post(f"{live.url}/generate", json={"prompt": "hi"}, timeout=WAIT_S)
        assert answer.json()["text"] == "short"
        assert {*fake.left} <= {4}, "an answer that nobody reads is not over"
        for connection in idle:
            connection.close()
        until(lambda: {*fake.left} >= {1, 2, 3})
    finally:
        live.close()


def test_metrics_count_what_was_asked(live: Live) -> None:
    site = Site(live.engine, live.config)
    before = live.engine.status().steps
    for path in ("/generate", "/generate/stream"):
        body = {"prompt": "hi", "use_chat_template": False, "max_new_tokens": 4, **A}
        assert site.post(path, body).status_code == 200
    assert site.post(COMPLETIONS, {"prompt": [97], "n": 2, "stop": "a", **A}).status_code == 200
    error_of(site.post("/generate", {"prompt": "hi", "max_new_tokens": 5000}), 400)
    lines = (line.rpartition(" ") for line in site.get("/metrics").text.splitlines())
    found = {name: value for name, _, value in lines}
    of = 'model_name="tiny"'
    assert found[f'labs_request_success_total{{finished_reason="length",{of}}}'] == "2.0"
    assert found[f'labs_request_success_total{{finished_reason="stop",{of}}}'] == "2.0"
    assert found[f"labs_prompt_tokens_total{{{of}}}"] == "8.0"  # <bos>hi twice, a twice
    assert found[f"labs_generation_tokens_total{{{of}}}"] == "10.0"
    assert found[f"labs_e2e_request_latency_seconds_count{{{of}}}"] == "4.0"
    assert found[f"labs_time_to_first_token_seconds_count{{{of}}}"] == "2.0"
    assert found[f"labs_inter_token_latency_seconds_count{{{of}}}"] == "6.0"
    assert found[f"labs_batch_rows{{{of}}}"] == str(float(ROWS))
    assert float(found[f"labs_steps_total{{{of}}}"]) > before


def test_an_app_whose_model_is_being_loaded_says_so() -> None:
    def loading(name: str) -> Any:
        raise labs_engine.Busy(f"{name} is being loaded")

    app = labs_api.create_app(configured(), Later(loading))
    client = falcon.testing.TestClient(app, headers={"Host": "localhost", **JSON})
    ready = client.simulate_get("/readyz")
    assert (ready.status_code, ready.json) == (503, {"status": "loading"})
    assert client.simulate_get("/health").status_code == 200
    refused = client.simulate_post("/generate", body=b'{"prompt": "a"}')
    assert error_of(refused, 503)["message"] == "tiny is being loaded"
    assert client.simulate_get("/v1/models").json["data"][0]["loaded"] is False
    assert client.simulate_get("/metrics").status_code == 200


def test_an_app_whose_model_cannot_be_loaded_is_not_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_model(config: Any, *, cached: bool) -> Any:
        raise RuntimeError("unforeseen")

    monkeypatch.setattr(labs, "load_model", load_model)
    engines = labs_models.Models(configured())
    with pytest.raises(Exception, match="unforeseen"):
        engines.wait()
    app = labs_api.create_app(configured(), engines)
    client = falcon.testing.TestClient(app, headers={"Host": "localhost"})
    assert client.simulate_get("/readyz").status_code == 503
    assert client.simulate_get("/metrics").status_code == 200


# ---------------------------------------------------------------- a model that takes its time


class Slow(Later):
    """Models whose only one appears some seconds after it was first asked for."""

    def __init__(self, engine: Any, seconds: float) -> None:
        super().__init__(self.get)
        self.engine, self.seconds = engine, seconds
        self.began = math.inf  # of the load
        self.holders = self.given = 0

    def get(self, name: str) -> Any:
        self.began = min(self.began, time.monotonic())
        if time.monotonic() < self.began + self.seconds:
            raise labs_models.Loading(f"{name} is being loaded", lambda s: time.sleep(s))
        return self.engine

    def __call__(self, name: str) -> Any:
        engine = self.get(name)
        self.holders, self.given = self.holders + 1, self.given + 1
        return engine

    def release(self, name: str) -> None:
        self.holders -= 1

    def reader(self, name: str) -> labs.Model:
        return self.get(name).model


@pytest.fixture
def slow(fake: FakeEngine) -> Iterator[Callable[..., tuple[Slow, Live]]]:
    """Serve a fake engine that is not there for some seconds."""
    with contextlib.ExitStack() as stack:

        def start(seconds: float = 3.0, **server: Any) -> tuple[Slow, Live]:
            models = Slow(fake, seconds)
            live = Live(fake, configured(port=0, **server), models)
            stack.callback(live.close)
            return models, live

        yield start


@pytest.mark.parametrize("path", ["/generate/stream", CHAT, COMPLETIONS])
def test_comments_come_in_a_stream_until_its_model_is_there(path: str, slow: Any) -> None:
    models, live = slow()
    body = {**BODIES[path], **({} if path == "/generate/stream" else {"stream": True})}
    began = time.monotonic()
    with httpx.stream("POST", live.url + path, json=body, timeout=WAIT_S) as response:
        assert response.status_code == 200
        comments, seconds = [], 0.0
        for line in response.iter_lines():
            if line.startswith(":"):
                comments.append(line)
            elif line:
                seconds = seconds or time.monotonic() - began
    assert comments[0] == ": ok"
    assert comments[1:] == [f": loading the model for {n} s" for n in range(1, len(comments))]
    assert len(comments) in (3, 4)
    assert 3 <= seconds < 4
    assert (models.holders, models.given) == (0, 1)
    assert len(live.engine.asked) == 1


@pytest.mark.parametrize("path", ["/generate", "/generate/stream"])
def test_the_time_of_a_request_counts_from_its_arrival(path: str, slow: Any) -> None:
    models, live = slow()
    late = {"prompt": "hi", "timeout_s": 1.0}
    began = time.monotonic()
    response = httpx.post(live.url + path, json=late, timeout=WAIT_S)
    assert 1 <= time.monotonic() - began < 2
    assert "tiny is being loaded" in response.text
    assert response.status_code == (503 if path == "/generate" else 200)
    early = {"prompt": "hi", "timeout_s": 10.0}
    assert httpx.post(live.url + path, json=early, timeout=WAIT_S).status_code == 200
    assert 7 < live.engine.generation.timeout_s < 9.1
    assert (models.holders, models.given) == (0, 1)


@pytest.mark.parametrize("path", ["/generate", "/generate/stream"])
def test_who_hangs_up_before_the_model_is_there_asks_for_nothing(path: str, slow: Any) -> None:
    models, live = slow(max_waiting=1)
    connection = live.connect(request(path, {"prompt": "hi"}))
    until(lambda: models.began < math.inf)
    time.sleep(0.2)
    refused = httpx.post(live.url + path, json={"prompt": "hi"}, timeout=WAIT_S)
    assert refused.status_code == 503, "the only place is taken"
    connection.close()
    time.sleep(0.5)
    assert httpx.post(live.url + path, json={"prompt": "hi"}, timeout=WAIT_S).status_code == 200
    assert (models.holders, models.given) == (0, 1)
    assert len(live.engine.asked) == 1


@pytest.mark.parametrize("path", BODIES)
def test_a_lease_is_given_back_whatever_becomes_of_the_request(
    path: str, slow: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def raises(*_: Any, **__: Any) -> Any:
        raise labs_engine.Busy("full")

    models, live = slow(seconds=0.0)
    ask = functools.partial(httpx.post, live.url + path, json=BODIES[path], timeout=WAIT_S)
    assert ask().status_code == 200
    monkeypatch.setattr(live.engine, "submit", raises)
    monkeypatch.setattr(live.engine, "take_in", raises)
    assert ask().status_code == (200 if path == "/explain" else 503)
    monkeypatch.setattr(labs, "build_inputs", raises)  # it fails before it comes to the engine
    assert ask().status_code == 503
    assert (models.holders, models.given) == (0, 3)


# ---------------------------------------------------------------- the described interface


@pytest.fixture(scope="module")
def described(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Return the schema of an app whose model has a tiny context, so that answers are short."""
    config = kit.llama()
    config.max_position_embeddings = 64
    model = kit.load(kit.save_model(tmp_path_factory.mktemp("small") / "m", config))
    engine = labs_engine.Engine(model)
    served = configured(generation=labs.Generation(max_new_tokens=4))
    app = labs_api.create_app(served, labs_models.One(engine, "tiny"))
    yield schemathesis.openapi.from_wsgi("/openapi.json", app)
    engine.close()


CHECKS = [
    schemathesis.checks.not_a_server_error,
    openapi_checks.status_code_conformance,
    openapi_checks.content_type_conformance,
    openapi_checks.response_schema_conformance,
]
OPERATIONS = [
    *(
        ("GET", path)
        for path in ("/health", "/readyz", "/v1/models", "/v1/models/{name}", "/metrics")
    ),
    *(("POST", path) for path in BODIES),
]


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_the_server_keeps_to_what_it_describes(described: Any, method: str, path: str) -> None:
    @hypothesis_settings(max_examples=15, derandomize=True, deadline=None, database=None)
    @given(case=described[path][method].as_strategy())
    def ask(case: Any) -> None:
        case.call_and_validate(checks=CHECKS)

    ask()


def test_all_operations_are_tried(described: Any) -> None:
    found = {(each.ok().method.upper(), each.ok().path) for each in described.get_all_operations()}
    assert found == {*OPERATIONS, ("GET", "/livez")}


# ---------------------------------------------------------------- several prompts, many prompts


def test_usage_counts_each_prompt_once_streamed_and_whole(site):
    body = {"prompt": ["aaa", "bb", "c"], "n": 2, "max_tokens": 2}
    whole = site.post("/v1/completions", body).json["usage"]
    streamed = {**body, "stream": True, "stream_options": {"include_usage": True}}
    lines = site.post("/v1/completions", streamed).text.splitlines()
    last = json.loads([line for line in lines if line.startswith("data: {")][-1][6:])
    assert last["usage"] == whole
    assert whole["prompt_tokens"] == sum(
        len(asked.input_ids) for asked, *_ in site.engine.asked[:6:2]
    )


def test_too_many_prompts_are_refused_before_any_is_tokenised(site, monkeypatch):
    monkeypatch.setattr(labs, "build_inputs", lambda *_, **__: pytest.fail("tokenised"))
    refused = site.post("/v1/completions", {"prompt": ["a"] * 5000})
    assert (refused.status_code, refused.json["error"]["param"]) == (400, "prompt")


def test_more_token_ids_than_the_context_holds_are_refused_before_they_are_decoded(site):
    refused = site.post("/v1/completions", {"prompt": [1] * 100_000})
    assert refused.json["error"]["code"] == "context_length_exceeded"


def test_log_probabilities_can_be_turned_off_by_a_request(fake):
    site = Site(fake, labs.Config(generation=labs.Generation(logprobs=2)))
    messages = [{"role": "user", "content": "Hi"}]
    site.post("/v1/chat/completions", {"messages": messages, "logprobs": False})
    site.post("/v1/chat/completions", {"messages": messages})
    assert [generation.logprobs for _, generation, _ in fake.asked] == [None, 2]


def test_the_example_of_labs_openai_runs(tiny):
    lines = (line.strip() for line in labs_openai.__doc__.splitlines() if line.startswith("    "))
    names = {"labs": labs, "labs_openai": labs_openai, "CHAT": labs_openai.CHAT, "model": tiny}
    names |= {"config": configured(), "data": json.dumps(BODIES[CHAT]).encode()}
    names["completions"] = [labs.generate(tiny, labs.build_inputs(tiny, prompt="a"))]
    exec("\n".join(lines), names)
    assert len(names["request"].prompts) == 1


def test_text_offsets_go_on_over_the_pieces_of_a_stream(site):
    chosen = labs.TokenLogprob(104, -1.0)
    site.engine.pieces = [labs.Delta("h", (chosen,)), labs.Delta("hh", (chosen, chosen))]
    body = {"prompt": "a", "stream": True, "logprobs": 0}
    lines = site.post("/v1/completions", body).text.splitlines()
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    found = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    assert [each["text_offset"] for each in found if each] == [[0], [1, 2]]
    assert len({chunk["created"] for chunk in chunks}) == 1


def test_why_a_model_could_not_be_loaded_is_no_clients_business(monkeypatch):
    def load_model(config: Any, *, cached: bool) -> None:
        raise labs.ConfigError("torch_dtype = float16: /srv/secret refuses")

    monkeypatch.setattr(labs, "load_model", load_model)
    engines = labs_models.Models(configured())
    with pytest.raises(labs.ConfigError, match="secret"):
        engines.wait()
    client = falcon.testing.TestClient(labs_api.create_app(configured(), engines))
    for path in ("/readyz", "/v1/models", "/generate"):
        method = "POST" if path == "/generate" else "GET"
        body = {"json": {"prompt": "a"}} if method == "POST" else {}
        answer = client.simulate_request(method, path, headers={"Host": "localhost"}, **body)
        assert "secret" not in answer.text
        assert answer.status_code in (200, 500, 503)
