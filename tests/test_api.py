# SPDX-License-Identifier: Apache-2.0
"""Tests of labs_api.py: requests and responses on a fake engine, real clients of a tiny model."""

from __future__ import annotations

import functools
import json
import queue
import re
import threading
import time
from typing import Any
from unittest import mock

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
from kit import BODIES, CHAT, COMPLETIONS, HELLO, ROWS, WAIT_S, A, Site, error_of, until
from openai.types import chat
from openai.types import completion_create_params as completion_params
from openai.types.chat import completion_create_params as chat_params
from schemathesis.specs.openapi import checks as openapi_checks

import labs
import labs_answers
import labs_api
import labs_engine
import labs_models
import labs_openai
import labs_protocol
import labs_request
import labs_tokenize
import labs_turns
import labs_vectors

OPENAI = [CHAT, COMPLETIONS]


# ---------------------------------------------------------------- bodies


DEEP = b"[" * 100_000
TRUNCATED = b'{"prompt": "a"'
BAD_JSON = [
    b"", TRUNCATED, TRUNCATED + b"} x", b"{'prompt': 'a'}", b'{"prompt": "\xff"}',
    '{"prompt": "a"}'.encode("utf-16"), b"\xef\xbb\xbf\xef\xbb\xbf" + TRUNCATED + b"}",
    b'{"prompt": "\\ud800"}', b'{"prompt": "a\nb"}', b'{"prompt": "a", "temperature": NaN}',
    b'{"prompt": "a", "temperature": Infinity}', DEEP, b'{"prompt": ' + DEEP,
    b'{"messages": [{"role": "user", "content": "a"}], "tools": ' + DEEP,
]  # fmt: skip


@pytest.mark.parametrize("path", [CHAT, "/generate"])
def test_a_body_that_is_not_json_is_refused(site, path):
    for body in BAD_JSON:
        error = kit.refused(site.post(path, body), 400, type="invalid_request_error")
        codes = {"invalid_json"} if body in (b"", TRUNCATED) else {"invalid_json", "invalid_value"}
        assert error["code"] in codes, body[:99]
    assert not site.engine.asked


# By endpoint: fields, and wrong values of each.
WRONG: dict[str, dict[str, list[str]]] = {
    "/generate": {
        "temperature": ["1e999", "-0.1", '"0.5"'], "seed": ["-1"], "max_tokens": ["5"],
        "max_new_tokens": ["9" * 5000, "16.0", '"16"', "true", "null", "0"], "foo": ["5"],
    },
    CHAT: {
        "messages": ["[]", "null"], "metadata": ['"a"'], "seed": ["-2"], "n": ["0", "9"],
        "max_tokens": ["0", '5, "max_completion_tokens": 6'], "max_new_tokens": ["5"],
        "top_logprobs": ["2", '21, "logprobs": true'], "stop": [json.dumps(["1"] * 17)],
        "stream_options": ['{"include_usage": true}'],
    },
    COMPLETIONS: {
        "user": ["5"], "max_tokens": ["-2"], "logprobs": ["true"],
        "prompt": ["null", "[]", "[[]]", "[300]"],
    },
}  # fmt: skip
# Endpoints, fields with a wrong value inside, and the name that the error gives it.
WRONG_INSIDE = [
    ("/generate", '"stop": [""]', "stop[0]"),
    ("/generate", '"stop": ["a", 1]', "stop[1]"),
    ("/generate", '"do_sample": true, "temperature": 0', "do_sample"),
    ("/generate", '"messages": [{"role": "user", "content": 5}]', "messages[0].content"),
    (CHAT, '"messages": [{"role": "tool", "content": "a"}]', "messages[0]"),
    (CHAT, '"messages": [{"role": "wizard", "content": "a"}]', "messages[0].role"),
    (CHAT, '"messages": [{"role": "user"}]', "messages[0].content"),
    (CHAT, '"messages": [{"role": "system", "content": null}]', "messages[0].content"),
    (CHAT, '"messages": [{"role": "user", "content": "a", "name": 5}]', "messages[0].name"),
    (CHAT, '"messages": [{"role": "user", "content": [{"type": "image_url"}]}]',
     "messages[0].content[0].type"),
    (CHAT, '"stream": true, "stream_options": {"foo": 1}', "foo"),
    (CHAT, '"logit_bias": {"5": 101}', "logit_bias[...]"),
    (COMPLETIONS, '"prompt": [-1]', "prompt[0]"),
    *((path, f'"{name}": {value}', name)
      for path, fields in WRONG.items() for name, values in fields.items() for value in values),
]  # fmt: skip


@pytest.mark.parametrize(("path", "field", "param"), WRONG_INSIDE, ids=lambda text: str(text)[:60])
def test_a_wrong_value_is_refused_and_named(site, path, field, param):
    whole = {f'"{name}": {json.dumps(value)}' for name, value in BODIES[path].items()}
    whole = {part for part in whole if part.partition(":")[0] not in field}
    answer = site.post(path, ("{" + ", ".join([*whole, field]) + "}").encode())
    kit.refused(answer, 400, param=param)
    assert not site.engine.asked


def test_a_missing_field_is_named(site):
    assert "messages" in error_of(site.post(CHAT, {}), 400)["message"]


@pytest.mark.parametrize("path", BODIES)
def test_a_body_is_plain_json_of_that_content_type_with_or_without_a_byte_order_mark(site, path):
    data = b"\xef\xbb\xbf" + json.dumps(BODIES[path]).encode()
    for kind in ("application/x-www-form-urlencoded", "text/plain", ""):
        assert error_of(site.post(path, data, Content_Type=kind), 415)["code"] == "not_json"
    for coding in ("gzip", "br", "deflate, gzip", "GZIP"):
        answer = site.post(path, data, Content_Encoding=coding)
        error = kit.refused(answer, 415, code="unsupported_encoding", param="Content-Encoding")
        assert f"Content-Encoding: {coding}" in error["message"]
    assert not site.engine.asked
    right = {"Content_Type": "Application/JSON; charset=utf-8", "Content_Encoding": "identity"}
    assert site.post(path, data, **right).status_code == 200


@pytest.mark.parametrize("path", ["/explain", "/generate", CHAT])
def test_clients_see_no_path_of_the_server(fake, tmp_path, path, monkeypatch):
    secret = str(tmp_path / "secret")
    spec = labs.evolve(fake.model.spec, model_name=secret, cache_dir=secret)
    fake.model = msgspec.structs.replace(fake.model, spec=spec)
    sources = dict.fromkeys((*GENERATION, "model_name"), f"{secret}/labs.toml [models.tiny]")
    site = Site(fake, msgspec.structs.replace(kit.configured(), sources=sources, model=spec))
    monkeypatch.setattr(fake.model.tokenizer, "chat_template", "{{ raise_exception('odd') }}")
    assert "odd" in error_of(site.post(path, {"messages": HELLO}), 400)["message"]
    wrong: Any = ({}, {"seed": -7}, {"model": "x"})
    answers = [site.post(path, BODIES[path] | each) for each in wrong]
    answers += [site.post("/explain", {"prompt": "a", "use_chat_template": False})]
    assert answers[-1].status_code == 200
    assert not [answer.text for answer in answers if secret in answer.text]


def test_a_body_over_its_limit_is_refused(fake):
    site, body = Site(fake, kit.configured(max_body_bytes=1024)), b'{"prompt": "a"}'
    assert site.post("/generate", body.ljust(1024)).status_code == 200
    assert error_of(site.post("/generate", body.ljust(1025)), 413)["code"] == "body_too_large"


def test_a_wrong_method_and_an_unknown_model_are_refused(site):
    for wrong, path, right in (("GET", "/generate", "POST"), ("DELETE", "/v1/models", "GET")):
        response = site.ask(wrong, path)
        assert error_of(response, 405)["code"] == "method_not_allowed"
        assert right in response.headers["allow"]
    answers = [site.post(path, {**body, "model": "../etc/passwd"}) for path, body in BODIES.items()]
    for answer in (*answers, site.get("/v1/models/other")):
        assert error_of(answer, 404)["code"] == "model_not_found"


@pytest.mark.parametrize("path", kit.ANSWERED)
def test_a_refusal_of_the_engine_is_the_response(site, path):
    for refusal, status, code in (
        (labs_engine.Busy("2 requests are under way"), 503, "overloaded"),
        (labs.PromptTooLong("the prompt has 9 tokens"), 400, "context_length_exceeded"),
        (labs.InputError("logit_bias names token 999"), 400, "invalid_value"),
    ):
        site.engine.refusal = refusal
        response = site.post(path, BODIES[path])
        kit.refused(response, status, code=code, message=str(refusal))
        assert ("retry-after" in response.headers) == (status == 503)


@pytest.mark.parametrize("path", kit.ANSWERED)
def test_an_unforeseen_error_shows_its_request_id_and_no_more(site, path, caplog):
    site.engine.refusal = KeyError("/secret/path")
    response = site.post(path, BODIES[path], X_Request_Id="abc-1")
    error = error_of(response, 500)
    assert ("abc-1" in error["message"], error["type"]) == (True, "server_error")
    assert ("secret" in response.text, "/secret/path" in caplog.text) == (False, True)
    site.engine.refusal, site.engine.error = None, labs.GenerationError("nan at layer 3")
    response = site.post(path, BODIES[path])
    assert "layer" not in response.text
    assert response.status_code == (200 if path == "/generate/stream" else 500)


def test_all_choices_are_cancelled_when_one_cannot_be_submitted(fake):
    submit, site = fake.submit, Site(fake, kit.configured())

    def third_is_too_much(*inputs, **options):
        fake.refusal = labs_engine.Busy("full") if len(fake.asked) == 2 else None
        return submit(*inputs, **options)

    fake.submit = third_is_too_much
    error_of(site.post(CHAT, {"messages": HELLO, "n": 3}), 503)
    assert {1, 2} <= {*fake.left}


# ---------------------------------------------------------------- fields and the engine


ODD = {"best_of": 2, "min_tokens": 3, "add_generation_prompt": False}
HINTS = {
    "cache_prompt": True, "metadata": {"a": "b"}, "priority": 3,
    "prompt_cache_key": "k", "prompt_cache_options": {"mode": "explicit"}, "store": True,
    "prompt_cache_retention": "24h", "request_id": "r", "safety_identifier": "s",
    "service_tier": "flex", "user": "u",
}  # fmt: skip
KINDS = {CHAT: labs_openai.ChatRequest, COMPLETIONS: labs_openai.CompletionRequest}


def test_every_field_of_openais_own_client_is_known_and_in_one_table():
    hints = {*labs_openai.Hints.__struct_fields__}
    for params, kind in ((chat_params, KINDS[CHAT]), (completion_params, KINDS[COMPLETIONS])):
        known = {*kind.__struct_fields__, *labs_openai.NEUTRAL, *hints}
        assert params.CompletionCreateParamsBase.__annotations__.keys() <= known
    effect = {name for kind in KINDS.values() for name in kind.__struct_fields__}
    tables = [effect, {*labs_openai.NEUTRAL}, hints]
    assert sum(map(len, tables)) == len(set.union(*tables))
    assert hints == {*HINTS}
    fields = set[str]()
    for role in ("System", "Developer", "User", "Assistant", "Tool"):
        fields |= getattr(chat, f"ChatCompletion{role}MessageParam").__annotations__.keys()
    assert fields <= {*labs_openai.ChatMessage.__struct_fields__}
    part = chat.ChatCompletionContentPartTextParam.__annotations__
    assert part.keys() <= {*labs_openai.TextPart.__struct_fields__, "type"}


@pytest.mark.parametrize("path", OPENAI)
def test_a_hint_changes_nothing_whatever_its_value(site, path):
    plain = site.post(path, BODIES[path]).json
    for name, value in HINTS.items():
        assert site.post(path, {**BODIES[path], name: value}).json["choices"] == plain["choices"]
    assert [each == site.engine.asked[0] for each in site.engine.asked] == [True] * (len(HINTS) + 1)


def test_a_field_that_another_one_makes_neutral_is_accepted(site):
    body = {**BODIES[COMPLETIONS], "best_of": 3}
    assert site.post(COMPLETIONS, {**body, "n": 3}).status_code == 200
    kit.refused(site.post(COMPLETIONS, body), 400, code="unsupported", param="best_of")


@pytest.mark.parametrize("path", OPENAI)
def test_minus_one_means_not_set(fake, path):
    generation = labs.Generation(max_new_tokens=9, seed=5, top_k=7)
    site = Site(fake, kit.configured(generation=generation))
    for name in ("seed", "max_tokens", "top_k"):
        assert site.post(path, {**BODIES[path], name: -1}).status_code == 200
        changes = {"top_k": 0} if name == "top_k" else {}
        assert fake.generation == labs.evolve(generation, **changes)
        error_of(site.post("/generate", {"prompt": "a", name: -1}), 400)


@pytest.mark.parametrize("path", OPENAI)
def test_a_field_that_is_not_implemented_takes_neutral_values_only(site, path):
    for name, neutral in labs_openai.NEUTRAL.items():
        site.engine.asked = []
        answer = site.post(path, {**BODIES[path], name: ODD.get(name, ["odd"])})
        kit.refused(answer, 400, code="unsupported", param=name)
        assert not site.engine.asked
        for value in (None, *neutral):
            assert site.post(path, {**BODIES[path], name: value}).status_code == 200, (name, value)


GENERATION: dict[str, Any] = {
    "max_new_tokens": 7, "temperature": 0.25, "top_p": 0.5, "top_k": 3, "min_p": 0.125,
    "do_sample": True, "repetition_penalty": 1.5, "frequency_penalty": -1.5, "seed": 9,
    "presence_penalty": 1.25, "logit_bias": {"5": -100.0}, "logprobs": 2, "stop": ["a", "b"],
    "prompt_lookup_num_tokens": 4, "timeout_s": 1.5, "skip_special_tokens": False,
    "reasoning": "odd", "thinking_budget": 3, "min_new_tokens": 2, "stop_token_ids": [7],
    "ignore_eos": True,
}  # fmt: skip


NO_SCHEMA = {"type": "json_schema", "json_schema": {"schema": {"type": "nothing"}}}
READING = "{% for m in messages %}{{ m.role ~ (m.name or '') ~ m.content }};{% endfor %}"
READING += "{{ add_generation_prompt }}"
BOTH = {
    **{k: v for k, v in GENERATION.items() if k in labs_openai.OpenAIRequest.__struct_fields__},
    **{"model": "other", "max_tokens": 3, "n": 2, "stream": True, "stream_options": {}},
    "min_tokens": 2,
}
FORMAT = {"type": "json_schema", "json_schema": {"schema": {"type": "object"}}}
PART, TURN = {"type": "text", "text": "hi"}, {"role": "assistant", "content": ""}
NO_TEMPLATE = {"use_chat_template": False, "add_generation_prompt": False}
NO_TEMPLATE["continue_final_message"] = True
WITH_TOOLS: dict[str, Any] = {"template_options": {"zip": 1}}
WITH_TOOLS["tools"] = [{"type": "function", "function": {"name": "f"}}]
CALLS = [{"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
ODD_TURN = {"tool_calls": CALLS, "tool_call_id": "a", "reasoning_content": "a"}
TYPED = {"messages": HELLO, "response_format": FORMAT}
REFUSED = [{"type": "refusal", "refusal": "a"}]
BODY_OF: dict[Any, Any] = {
    labs_openai.ChatMessage: {"messages": [TURN]},
    labs_openai.TextPart: {"messages": [{"role": "user", "content": [PART]}]},
    labs_openai.RefusalPart: {"messages": [{**TURN, "content": REFUSED}]},
    labs_openai.StreamOptions: {"messages": HELLO, "stream": True, "stream_options": {}},
    labs_request.ResponseFormat: TYPED,
    labs_request.JsonSchema: TYPED,
    labs.Message: {"messages": HELLO},
    labs_tokenize.TokenizeRequest: {"prompt": "<end>"},
}
CHAT_FIELDS: dict[str, Any] = {
    "model": "other", "tools": WITH_TOOLS["tools"], "chat_template_kwargs": {"zip": 1},
    "reasoning_effort": "high", "add_generation_prompt": False, "continue_final_message": True,
}  # fmt: skip
# (struct, endpoint, place in its body, fields with a value that has an effect, hints)
FIELDS: list[tuple[Any, str, tuple[Any, ...], dict[str, Any], dict[str, Any]]] = [
    (labs_request.GenerateRequest, "/generate", (),
     {**GENERATION, "model": "other", "prompt": "ho", "response_format": NO_SCHEMA,
      "documents": True, "messages": HELLO, **NO_TEMPLATE, **WITH_TOOLS, "tool_choice": "f",
      "parallel_tool_calls": "odd", "structured_outputs": {"regex": "("}}, {}),
    (labs_api.ChooseRequest, "/choose", (),
     {"model": "other", "prompt": "ho", "options": ["a", "c"], "messages": HELLO,
      "timeout_s": 60.0, **NO_TEMPLATE, "template_options": {"zip": 1}}, {}),
    (labs_openai.ChatRequest, CHAT, (),
     {**BOTH, "messages": [TURN], "documents": True, "max_completion_tokens": 3, "logprobs": True,
      "top_logprobs": 1, "response_format": NO_SCHEMA, "tools": WITH_TOOLS["tools"],
      "tool_choice": "required", "parallel_tool_calls": "odd", "reasoning_effort": "high",
      "chat_template_kwargs": {"zip": 1}, "add_generation_prompt": False,
      "continue_final_message": True, "structured_outputs": {"regex": "("},
      "reasoning": "odd", "thinking_budget": 3}, {}),
    (labs_openai.CompletionRequest, COMPLETIONS, (),
     {**BOTH, "prompt": "ho", "logprobs": 1, "echo": True,
      "structured_outputs": {"regex": "("}}, {}),
    (labs_tokenize.TokenizeRequest, "/tokenize", (),
     {**CHAT_FIELDS, "messages": HELLO, "prompt": "ho", "content": "ho", "parse_special": False,
      "add_special_tokens": False, "add_special": False, "return_token_strs": True,
      "with_pieces": True}, {}),
    (labs_tokenize.TemplateRequest, "/apply-template", (),
     {**CHAT_FIELDS, "messages": [TURN]}, {}),
    (labs_tokenize.DetokenizeRequest, "/detokenize", (), {"model": "other", "tokens": [5]}, {}),
    (labs_openai.ChatMessage, CHAT, ("messages", 0),
     {"role": "user", "content": "a", "name": "Ada", "refusal": "no",
      **{each: ["odd"] for each in labs_openai.NEUTRAL_OF_MESSAGE}, **ODD_TURN,
      "reasoning_content": 5, "reasoning": 5},
     {"annotations": [{"type": "url_citation"}]}),
    (labs_openai.TextPart, CHAT, ("messages", 0, "content", 0), {"text": "ho"},
     {"prompt_cache_breakpoint": {"mode": "explicit"}, "cache_control": {"type": "ephemeral"}}),
    (labs_openai.RefusalPart, CHAT, ("messages", 0, "content", 0), {"refusal": "b"}, {}),
    (labs_openai.StreamOptions, CHAT, ("stream_options",), {"include_usage": True},
     {"include_obfuscation": True}),
    (labs_request.ResponseFormat, CHAT, ("response_format",),
     {"type": "json_object", "json_schema": NO_SCHEMA["json_schema"]}, {}),
    (labs_request.JsonSchema, CHAT, ("response_format", "json_schema"),
     {"schema": {"type": "nothing"}}, {"name": "a", "description": "b", "strict": False}),
    (labs.Message, "/generate", ("messages", 0),
     {"role": "system", "content": "ho", "name": "Ada", **ODD_TURN, "reasoning": "a"}, {}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "path", "place", "effective", "hints"), FIELDS, ids=[x[0].__name__ for x in FIELDS]
)
def test_every_field_of_a_request_has_an_effect_or_is_a_hint(
    site, tiny, monkeypatch, kind, path, place, effective, hints
):
    monkeypatch.setattr(tiny.tokenizer, "chat_template", READING)

    def outcome(**fields):
        body = json.loads(json.dumps(BODY_OF.get(kind, BODIES[path])))
        functools.reduce(lambda inner, key: inner[key], place, body).update(fields)
        site.engine.asked = []
        answer = site.post(path, body, X_Request_Id="one")
        text = re.sub(r'"created":\d+|"[a-z_]+_s":[^,}]+', "", answer.text)
        return answer.status_code, answer.headers["content-type"], text, site.engine.asked

    assert effective.keys() | hints.keys() == {*kind.__struct_fields__}
    assert (plain := outcome())[0] == 200
    for name, value in {**effective, **hints}.items():
        assert (outcome(**{name: value}) == plain) == (name in hints), name


WORDS = {*labs_openai.OpenAIRequest.__struct_fields__} - {"logprobs"}  # some with the same meaning


@pytest.mark.parametrize("path", kit.ANSWERED)
def test_each_generation_setting_reaches_the_engine(site, path):
    assert GENERATION.keys() == {*labs.Generation.__struct_fields__}
    names = GENERATION.keys() & WORDS if path.startswith("/v1") else GENERATION.keys()
    only = {"stop_token_ids", "ignore_eos"} if path == "/v1/responses" else {}  # refused there
    for name in names - {"reasoning", "thinking_budget", *only}:  # see tests/test_tools_http.py
        assert site.post(path, {**BODIES[path], name: GENERATION[name]}).status_code == 200
        changed = msgspec.convert({name: GENERATION[name]}, labs.Generation, strict=False)
        assert site.engine.generation == changed != labs.Generation()


EFFECTS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    *((path, {"max_tokens": 5}, {"max_new_tokens": 5}) for path in OPENAI),
    *((path, {"min_tokens": 4}, {"min_new_tokens": 4}) for path in OPENAI),
    *((path, {"stop": "x"}, {"stop": ["x"]}) for path in OPENAI),
    (COMPLETIONS, {"logprobs": 0}, {"logprobs": 0}),
    (CHAT, {"max_completion_tokens": 6}, {"max_new_tokens": 6}),
    (CHAT, {"max_tokens": 6, "max_completion_tokens": 6}, {"max_new_tokens": 6}),
    (CHAT, {"logprobs": True}, {"logprobs": 0}),
    (CHAT, {"logprobs": True, "top_logprobs": 3}, {"logprobs": 3}),
    (CHAT, {"user": "someone", "n": 1, "stream": False, "model": "tiny", "logprobs": False}, {}),
]


def test_settings_in_openais_words_take_effect(site):
    for path, sent, expected in EFFECTS:
        assert site.post(path, {**BODIES[path], **sent}).status_code == 200
        wanted = msgspec.convert(expected, labs.Generation, strict=False)
        assert site.engine.generation == wanted, sent


@pytest.mark.parametrize("path", OPENAI)
def test_settings_that_are_null_or_missing_are_as_configured(fake, path):
    generation = labs.Generation(
        max_new_tokens=5, temperature=0.5, stop=("x",), seed=3, logprobs=2, top_k=4
    )
    site = Site(fake, kit.configured(generation=generation))
    fields = {*KINDS[path].__struct_fields__} - BODIES[path].keys()
    assert site.post(path, {**BODIES[path], **dict.fromkeys(fields)}).status_code == 200
    site.post("/generate", {"prompt": "a", "top_k": 2})
    site.post(CHAT, {"messages": HELLO, "logprobs": False})
    changes: Any = ({}, {"top_k": 2}, {"logprobs": None})
    assert [each for _, each, _ in fake.asked] == [labs.evolve(generation, **c) for c in changes]


def test_completions_take_texts_and_token_ids(site):
    for prompt, *expected in (
        ("hi", "<bos>hi"),
        (["a", "b"], "<bos>a", "<bos>b"),
        ([104, 105], "hi"),
        ([[104], [105, 106]], "h", "ij"),
    ):
        answer, asked = site.post(COMPLETIONS, {"prompt": prompt}).json, site.engine.asked
        assert [inputs.prompt for inputs, _, _ in asked[-len(expected) :]] == expected
        assert [choice["index"] for choice in answer["choices"]] == [*range(len(expected))]


HI = "<bos><|user|>hi<end><|assistant|>"
USER, REFUSAL = {"role": "user", "content": "ho"}, {"type": "refusal", "refusal": "no"}
DEVELOPER = {"role": "developer", "content": "s"}
EMPTY: list[dict[str, Any]] = [
    *({"content": None}, {}, {"content": []}, {"content": ""}),
    {"content": None, "tool_calls": []},
    {"content": None, "function_call": None, "refusal": None, "audio": None},
    {"content": "", "annotations": [{"type": "url_citation"}], "reasoning_content": None},
    {"content": [{"type": "text", "text": "", "cache_control": {"type": "ephemeral"}}]},
]
PROMPTS: list[tuple[str, dict[str, Any], str]] = [
    *(
        (CHAT, {"messages": [*HELLO, {"role": "assistant", **turn}, USER]}, f"{HI}{rest}")
        for turns, said in ((EMPTY, ""), ([{"refusal": "no"}, {"content": [REFUSAL]}], "no"))
        for turn, rest in ((turn, f"{said}<end><|user|>ho<end><|assistant|>") for turn in turns)
    ),
    (CHAT, {"messages": [DEVELOPER, {"role": "user", "content": [PART, PART]}]},
     "<bos><|system|>s<end><|user|>hihi<end><|assistant|>"),
    ("/generate", {"prompt": "hi"}, HI),
    ("/generate", {"prompt": "hi", "use_chat_template": None}, HI),
    ("/generate", {"prompt": "hi", "use_chat_template": False}, "<bos>hi"),
    ("/generate", {"prompt": "hi", "add_generation_prompt": False}, "<bos><|user|>hi<end>"),
    ("/generate", {"messages": [{**HELLO[0], "name": "Ada"}]}, HI),
]  # fmt: skip


def test_messages_become_a_prompt_by_the_template(site, tiny, monkeypatch):
    for path, body, expected in PROMPTS:
        assert site.post(path, body).status_code == 200, body
        assert site.engine.asked[-1][0].prompt == expected, body
    monkeypatch.setattr(tiny.tokenizer, "chat_template", READING)
    for path in (CHAT, "/generate"):
        assert site.post(path, PROMPTS[-1][1]).status_code == 200
        assert site.engine.asked[-1][0].prompt == "userAdahi;True"


def test_a_field_of_a_message_that_is_not_implemented_is_refused_by_name(site):
    for name in labs_openai.NEUTRAL_OF_MESSAGE:
        for value in ([{"id": "1"}], "so"):
            messages = [*HELLO, {"role": "assistant", "content": "a", name: value}]
            found = error_of(site.post(CHAT, {"messages": messages}), 400)
            assert (found["code"], found["param"]) == ("unsupported", f"messages[1].{name}")


@pytest.mark.parametrize("path", [CHAT, "/generate"])
def test_only_the_context_bounds_the_number_of_messages(site, path):
    turns = [{"role": role, "content": ""} for role in ("user", "assistant")] * 600
    assert site.post(path, {"messages": turns[:1000]}).status_code == 200
    messages = [{"role": "user", "content": [PART] * 700}]
    assert site.post(CHAT, {"messages": messages}).status_code == 200
    answer = site.post(path, {"messages": turns * 4})
    kit.refused(answer, 400, code="context_length_exceeded", param="messages")


CONTEXT = 4096
LONG_TURN = [{"role": "user", "content": "a" * 4200}]


@pytest.mark.parametrize(
    ("path", "tokens"), [(CHAT, 4096), (CHAT, 8192), (COMPLETIONS, 4095), (COMPLETIONS, 2**20)]
)
def test_openais_endpoints_answer_with_the_rest_of_the_context(site, path, tokens):
    assert site.post(path, {**BODIES[path], "max_tokens": tokens}).status_code == 200
    inputs, generation, _ = site.engine.asked[0]
    assert generation.max_new_tokens == CONTEXT - len(inputs.input_ids)
    site.post(COMPLETIONS, {"prompt": [[97] * 4000, [97] * 10], "max_tokens": 200})
    assert [generation.max_new_tokens for _, generation, _ in site.engine.asked[1:]] == [96, 200]


def test_a_prompt_that_does_not_fit_is_refused_in_words_that_clients_know(site):
    words = r"This model's maximum context length is 4096 tokens\. However, the prompt has 4\d\d\d"
    long = {"prompt": "a" * 4200}
    for path, body, param in (
        (CHAT, {"messages": LONG_TURN, "max_tokens": 1}, "messages"),
        (COMPLETIONS, long, "prompt"),
        (COMPLETIONS, {"prompt": [97] * 4096}, "prompt"),
        ("/generate", {"messages": LONG_TURN}, "messages"),
        ("/generate", long, "prompt"),
        ("/choose", {**long, "options": ["a", "b"]}, "prompt"),
    ):
        error = kit.refused(site.post(path, body), 400, code="context_length_exceeded", param=param)
        assert re.match(words, error["message"])
    assert not site.engine.asked


def test_too_many_prompts_or_token_ids_are_refused_before_they_are_read(site, monkeypatch):
    refused = site.post(COMPLETIONS, {"prompt": [1] * 100_000})
    assert error_of(refused, 400)["code"] == "context_length_exceeded"
    monkeypatch.setattr(labs, "build_inputs", lambda *_, **__: pytest.fail("tokenised"))
    assert error_of(site.post(COMPLETIONS, {"prompt": ["a"] * 5000}), 400)["param"] == "prompt"


# ---------------------------------------------------------------- responses


@pytest.mark.parametrize("path", ["/generate", "/generate/stream"])
def test_generate_answers_with_everything_known(site, path):
    response = site.post(path, {"prompt": "hi", "seed": 4}, X_Request_Id="one")
    if path == "/generate":
        answer = response.json
        assert (answer["model"], answer["text"]) == ("tiny", "Hello there")
    else:
        answer = json.loads(kit.events_of(response.content)[-1][1])
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert response.headers["cache-control"] == "no-cache"
    assert (answer["id"], answer["finish_reason"], answer["seed"]) == ("one", "stop", 4)
    assert (answer["usage"]["completion_tokens"], "timings" in answer) == (2, True)


def test_a_chat_is_answered_in_openais_format(site):
    answer = site.post(CHAT, {"messages": HELLO, "n": 2}).json
    assert answer["object"] == "chat.completion"
    message = {"role": "assistant", "content": "Hello there"}
    choice = {"message": message, "logprobs": None, "finish_reason": "stop"}
    assert answer["choices"] == [{"index": 0, **choice}, {"index": 1, **choice}]
    prompt = len(site.engine.asked[0][0].input_ids)
    usage = answer["usage"]
    counts = [usage[f"{name}_tokens"] for name in ("prompt", "completion", "total")]
    assert counts == [prompt, 4, prompt + 4]
    assert usage["prompt_tokens_details"] == {"cached_tokens": 5}


@pytest.mark.parametrize("reason", ["stop", "length", "timeout", "cancelled", "content_filter"])
def test_openais_clients_see_finish_reasons_that_they_know(site, reason):
    site.engine.reason = reason
    (choice,) = site.post(CHAT, {"messages": HELLO}).json["choices"]
    known = {"timeout": "length", "cancelled": "length"}
    assert choice["finish_reason"] == known.get(reason, reason)
    assert site.post("/generate", {"prompt": "a"}).json["finish_reason"] == reason


def test_log_probabilities_have_openais_format(site):
    chosen = tuple(labs.TokenLogprob(token, -0.5, ((97, -0.1),)) for token in (104, 195))
    site.engine.pieces = [labs.Delta("h", chosen[:1]), labs.Delta("é", chosen[1:])]
    (choice,) = site.post(CHAT, {"messages": HELLO, "logprobs": True}).json["choices"]
    first, broken = choice["logprobs"]["content"]
    top = {"token": "a", "logprob": -0.1, "bytes": [97]}
    assert first == {"token": "h", "logprob": -0.5, "bytes": [104], "top_logprobs": [top]}
    assert (broken["token"], broken["bytes"]) == ("bytes:\\xc3", [0xC3])
    body = {"prompt": "a", "logprobs": 1}
    found = site.post(COMPLETIONS, body).json["choices"][0]["logprobs"]
    assert (found["tokens"][0], found["token_logprobs"]) == ("h", [-0.5, -0.5])
    assert (found["top_logprobs"][0], found["text_offset"]) == ({"a": -0.1, "h": -0.5}, [0, 1])
    chunks = kit.chunks_of(site.post(COMPLETIONS, {**body, "stream": True}))
    pieces = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    assert [each["text_offset"] for each in pieces if each] == [[0], [1]]
    assert len({chunk["created"] for chunk in chunks}) == 1


def test_the_example_of_labs_openai_runs(tiny):
    lines = (line.strip() for line in labs_openai.__doc__.splitlines() if line.startswith("    "))
    names = {"labs": labs, "labs_protocol": labs_protocol, "CHAT": labs_openai.CHAT, "model": tiny}
    names |= {"config": kit.configured(), "data": json.dumps(BODIES[CHAT]).encode()}
    names["completions"] = [labs.generate(tiny, kit.SHORT, max_new_tokens=2)]
    exec("\n".join(lines), names)
    assert len(names["request"].prompts) == 1


# ---------------------------------------------------------------- server-sent events


def streamed(path):
    return {**BODIES[path], **({"stream": True} if path in OPENAI else {})}


STREAMS = ["/generate/stream", *OPENAI]


def test_text_arrives_whole_however_it_is_cut(site):
    @hypothesis_settings(max_examples=100, deadline=None, derandomize=True, database=None)
    @given(pieces=st.lists(st.text(alphabet="ab:\r\n \u2028\x00é", max_size=4), max_size=6))
    def check(pieces):
        site.engine.pieces = [*pieces]
        response = site.post("/generate/stream", {"prompt": "a"})
        *texts, (last, _) = kit.events_of(response.content)
        assert {kind for kind, _ in texts} <= {"message"}
        expected = "".join(pieces).replace("\r\n", "\n").replace("\r", "\n")
        assert ("".join(data for _, data in texts), last) == (expected, "done")

    check()


@pytest.mark.parametrize("path", STREAMS)
def test_a_stream_that_fails_ends_with_an_error(site, path):
    site.engine.error = labs.GenerationError("nan at layer 3")
    response = site.post(path, streamed(path), X_Request_Id="one")
    assert response.status_code == 200
    assert b"Hello" in response.content
    kind, data = kit.events_of(response.content)[-1]
    error = json.loads(data)["error"]
    assert (kind, error["type"], error["code"]) == ("error", "server_error", "failed")
    assert ("one" in error["message"], "layer" in data) == (True, False)
    assert b"[DONE]" not in response.content


def test_a_chat_stream_has_openais_order(site):
    chunks = kit.chunks_of(site.post(CHAT, {"messages": HELLO, "stream": True}))
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    first, *middle, last = (chunk["choices"][0] for chunk in chunks)
    assert first["delta"] == {"role": "assistant", "content": ""}
    assert [choice["delta"] for choice in middle] == [{"content": "Hello"}, {"content": " there"}]
    assert (last["delta"], last["finish_reason"]) == ({}, "stop")
    assert all(choice["finish_reason"] is None for choice in (first, *middle))
    assert not any("usage" in chunk for chunk in chunks)


@pytest.mark.parametrize("path", OPENAI)
def test_choices_share_a_stream_whose_usage_comes_last(site, path):
    body = {**BODIES[path], "n": 3, **({"prompt": ["aaa", "b"]} if path == COMPLETIONS else {})}
    whole, asked = site.post(path, body).json["usage"], [*site.engine.asked]
    options = {"stream": True, "stream_options": {"include_usage": True}}
    *chunks, last = kit.chunks_of(site.post(path, {**body, **options}))
    assert all(chunk["usage"] is None for chunk in chunks)
    assert (last["choices"], last["usage"]) == ([], whole)
    assert whole["prompt_tokens"] == sum(len(inputs.input_ids) for inputs, *_ in asked[::3])
    texts, ends = dict.fromkeys(range(len(asked)), ""), []
    for (choice,) in (chunk["choices"] for chunk in chunks):
        text = choice["delta"].get("content", "") if path == CHAT else choice["text"]
        texts[choice["index"]] += text
        ends += [choice["index"]] * (choice["finish_reason"] is not None)
    assert texts == dict.fromkeys(range(len(asked)), "Hello there")
    assert sorted(ends) == [*range(len(asked))]


@pytest.mark.parametrize("path", OPENAI)
def test_characters_that_some_take_for_line_ends_are_escaped(site, path):
    site.engine.pieces = ["a\u2028b\u2029c\x85d\r\ne"]
    response = site.post(path, streamed(path))
    lines = [line for line in response.text.splitlines() if line.startswith("data: {")]
    choices = [json.loads(line.removeprefix("data: "))["choices"][0] for line in lines]
    texts = [choice.get("text") or choice.get("delta", {}).get("content") for choice in choices]
    assert "a\u2028b\u2029c\x85d\r\ne" in texts
    assert len(choices) == len(kit.chunks_of(response))


def test_a_silent_stream_sends_comments(site, monkeypatch):
    monkeypatch.setattr(labs_answers, "PING_S", 0.0)
    monkeypatch.setattr(labs_answers, "POLL_S", 0.01)
    submit = site.engine.submit

    def later(*inputs, events, **options):
        answer = submit(*inputs, events=(held := queue.SimpleQueue()), **options)
        release = [events.put] * held.qsize()
        threading.Timer(0.1, lambda: [put(held.get()) for put in release]).start()
        return answer

    site.engine.submit = later
    for path in ("/generate/stream", CHAT):
        response = site.post(path, streamed(path))
        assert b"\n\n: ping\n\n" in response.content
        assert "Hello" in response.text


# ---------------------------------------------------------------- states and pages


@pytest.mark.parametrize("path", ["/", "/docs"])
def test_pages_run_only_their_own_script(site, path):
    policy = site.get(path).headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert site.get(path).headers["x-content-type-options"] == "nosniff"


def test_readiness_is_the_state_of_the_engine(site):
    states = {"ok": {}, "draining": {"closing": True}, "dead": {"alive": False}}
    for health, doing in {**states, "stalled": {"idle_s": 61.0}}.items():
        site.engine.doing = doing
        response = site.get("/readyz")
        assert response.json == {"status": health}
        assert response.status_code == (200 if health == "ok" else 503)
        assert site.get("/health").json == {"status": "ok"}


class Counting(labs_models.One):
    """One engine that arrives late; holders counts its leases."""

    holders, given, pause_s = 0, 0, 0.0

    def __call__(self, name):
        time.sleep(self.pause_s)
        self.holders, self.given = self.holders + 1, self.given + 1
        return super().__call__(name)

    def release(self, name):
        self.holders -= 1


def test_the_time_that_a_model_loads_counts_but_is_not_a_setting(fake, monkeypatch):
    monkeypatch.setattr(labs_turns, "WORTH_COUNTING_S", 0.1)
    models = Counting(fake, "tiny")
    models.pause_s = 0.2
    site = Site(fake, kit.configured(generation=labs.Generation(timeout_s=60)), models)
    assert site.post("/explain", {"prompt": "hi"}).json["settings"]["timeout_s"]["value"] == 60
    assert site.post("/generate", {"prompt": "hi"}).status_code == 200
    assert 0 < fake.generation.timeout_s <= 59.8
    metrics = site.get("/metrics").text
    for name in ("time_to_first_token", "e2e_request_latency"):
        (seconds,) = re.findall(rf"^labs_{name}_seconds_sum{{.*}} (.*)$", metrics, re.MULTILINE)
        assert float(seconds) > 0.2


@pytest.mark.parametrize("path", [*kit.ANSWERED, "/explain", "/choose"])
def test_a_lease_is_released_whatever_becomes_of_the_request(path, fake, monkeypatch):
    models, full = Counting(fake, "tiny"), mock.Mock(side_effect=labs_engine.Busy("full"))
    site = Site(fake, kit.configured(), models)
    assert site.post(path, BODIES[path]).status_code == 200
    fake.refusal = labs_engine.Busy("full")
    assert site.post(path, BODIES[path]).status_code == (200 if path == "/explain" else 503)
    monkeypatch.setattr(labs, "build_inputs", full)  # fails before the engine is called
    assert site.post(path, BODIES[path]).status_code == 503
    assert (models.holders, models.given) == (0, 3)


# ---------------------------------------------------------------- real clients of a real server


LONG = {"prompt": "hi", "max_new_tokens": 4000, **A}  # takes minutes with a pause in each step
SHORT = {"prompt": "hi", "max_new_tokens": 2, **A}
SDK: dict[str, Any] = {"model": "tiny", "temperature": 0, "logit_bias": {"97": 100}}


def test_openais_client_chats_completes_and_streams(live):
    sdk = openai.OpenAI(api_key="none", base_url=f"{live.url}/v1", max_retries=0)
    answer = sdk.chat.completions.create(messages=HELLO, max_tokens=3, logprobs=True, **SDK)
    (choice,) = answer.choices
    assert (choice.message.content, choice.finish_reason) == ("aaa", "length")
    assert [each.token for each in choice.logprobs.content] == ["a"] * 3
    answer = sdk.completions.create(prompt=["hi", "ho"], max_tokens=3, stop="aa", **SDK)
    assert [(choice.text, choice.finish_reason) for choice in answer.choices] == [("", "stop")] * 2
    assert [model.id for model in sdk.models.list()] == ["tiny"]
    options = {"stream": True, "stream_options": {"include_usage": True}, "n": 2, "max_tokens": 3}
    *chunks, last = sdk.chat.completions.create(messages=HELLO, **options, **SDK)
    texts = ["", ""]
    for choice in (choice for chunk in chunks for choice in chunk.choices):
        texts[choice.index] += choice.delta.content or ""
    assert (texts, last.usage.completion_tokens) == (["aaa", "aaa"], 6)
    chunks = sdk.completions.create(prompt="hi", max_tokens=3, stream=True, **SDK)
    assert "".join(chunk.choices[0].text for chunk in chunks) == "aaa"
    sdk.close()


def test_openais_client_raises_its_own_errors(fake):
    site = Site(fake, kit.configured(*kit.KEYS, requests_per_minute=5))
    with pytest.raises(openai.AuthenticationError):
        site.sdk().models.list()
    sdk = site.sdk(key="s3cret")
    for kind, code, sent in (
        (openai.BadRequestError, "unsupported", {"functions": [{"name": "f"}]}),
        (openai.BadRequestError, "context_length_exceeded", {"messages": LONG_TURN}),
        (openai.NotFoundError, "model_not_found", {"model": "other"}),
    ):
        with pytest.raises(kind) as caught:
            sdk.chat.completions.create(**{"messages": HELLO, **SDK, **sent})
        assert caught.value.code == code
    fake.error = labs.GenerationError("broken")
    with pytest.raises(openai.APIError, match="Internal server error"):
        list(sdk.completions.create(model="tiny", prompt="a", stream=True))
    fake.refusal = labs_engine.Busy("full")
    with pytest.raises(openai.InternalServerError, match="full"):
        sdk.completions.create(model="tiny", prompt="a")
    with pytest.raises(openai.RateLimitError):
        sdk.models.list()


def test_headers_come_before_the_first_token_and_then_one_event_at_a_time(live, brake):
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


def test_a_client_that_disconnects_frees_its_row_or_place(live, brake):
    brake.pause_s = 0.02
    running = [live.connect(kit.request(path, LONG)) for path in ("/generate/stream", "/generate")]
    until(lambda: live.doing() == (ROWS, 0))
    waiting = [live.connect(kit.request(path, LONG)) for path in ("/generate", "/generate/stream")]
    until(lambda: live.doing() == (ROWS, kit.WAITING))
    for connection in waiting:
        connection.close()
    until(lambda: live.doing() == (ROWS, 0))
    for left, connection in enumerate(running, 1):
        connection.close()
        until(lambda left=left: live.doing() == (ROWS - left, 0))


def test_a_full_server_refuses_and_still_answers_health_checks(live, brake):
    brake.pause_s = 0.02
    busy = [live.connect(kit.request("/generate", LONG)) for _ in range(ROWS + kit.WAITING)]
    until(lambda: live.doing() == (ROWS, kit.WAITING))
    refused = httpx.post(f"{live.url}/generate", json={"prompt": "hi"}, timeout=WAIT_S)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "overloaded")
    assert int(refused.headers["retry-after"]) >= 1
    for path in ("/health", "/readyz"):
        assert httpx.get(live.url + path, timeout=WAIT_S).json() == {"status": "ok"}
    for connection in busy:
        connection.close()


def test_http_1_0_chunked_bodies_and_pipelines_work(live):
    head, _, data = live.raw(kit.request("/generate", SHORT, version="1.0")).partition(b"\r\n\r\n")
    assert (b" 200 OK" in head, json.loads(data)["text"]) == (True, "aa")
    data = live.raw(kit.request("/generate/stream", SHORT, version="1.0"))
    head, _, data = data.partition(b"\r\n\r\n")
    assert b"chunked" not in head.lower()
    assert [kind for kind, _ in kit.events_of(data)] == ["message", "message", "done"]
    last = kit.request("/generate", SHORT, "Connection: close")
    answer = live.raw(kit.request("/generate", SHORT) * 2 + last)
    assert answer.count(b"HTTP/1.1 200 OK") == answer.count(b'"text":"aa"') == 3
    body = json.dumps(SHORT).encode()
    pieces = iter((body[:7], body[7:]))
    answer = httpx.post(f"{live.url}/generate", content=pieces, headers=kit.JSON, timeout=WAIT_S)
    assert answer.json()["text"] == "aa"


def test_only_clients_older_than_the_host_header_may_leave_it_out(live):
    for path, version, hosts, status in (
        ("/health", "1.1", (), b"421"),
        ("/health", "1.0", ("evil.com",), b"421"),
        ("/health", "1.0", ("",), b"421"),
        ("/health", "1.1", ("localhost", "evil.com"), b"421"),
        ("http://evil.com/health", "1.1", ("evil.com",), b"421"),
        ("/health", "1.0", (), b"200"),
    ):
        lines = [f"GET {path} HTTP/{version}", "Connection: close", *(f"Host: {h}" for h in hosts)]
        assert live.raw("\r\n".join([*lines, "", ""]).encode()).split()[1] == status


def test_a_client_that_does_not_read_delays_no_other(fake):
    fake.pieces = ["x" * 100_000] * 300  # more than the kernel and waitress buffer
    live = kit.Live(fake, kit.configured(port=0, max_waiting=0))
    try:
        idle = [live.connect(kit.request("/generate/stream", {"prompt": "hi"})) for _ in range(3)]
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


def test_metrics_count_requests_and_tokens(live):
    site = Site(live.engine, live.config)
    before = live.engine.status().steps
    for path in ("/generate", "/generate/stream"):
        body = {"prompt": "hi", "use_chat_template": False, "max_new_tokens": 4, **A}
        assert site.post(path, body).status_code == 200
    assert site.post(COMPLETIONS, {"prompt": [97], "n": 2, "stop": "a", **A}).status_code == 200
    error_of(site.post("/generate", {"prompt": "hi", "max_new_tokens": 5000}), 400)
    text = site.get("/metrics").text
    found = dict(re.findall(r'^labs_(\w+){(?:finished_reason="\w+",)?model.*} (.+)$', text, re.M))
    for reason in ("length", "stop"):
        labels = f'finished_reason="{reason}",model_name="tiny"'
        assert f"labs_request_success_total{{{labels}}} 2.0" in text
    assert (
        found.items()
        >= {
            "prompt_tokens_total": "8.0",  # <bos>hi twice, a twice
            "generation_tokens_total": "10.0",
            "e2e_request_latency_seconds_count": "4.0",
            "time_to_first_token_seconds_count": "2.0",
            "inter_token_latency_seconds_count": "6.0",
            "batch_rows": str(float(ROWS)),
        }.items()
    )
    assert float(found["steps_total"]) > before


# ---------------------------------------------------------------- the OpenAPI document


@pytest.fixture(scope="module")
def described(tmp_path_factory):
    """Return the schema of an app whose model has a tiny context, so that answers are short."""
    config = kit.llama()
    config.max_position_embeddings = 64
    model = kit.load(kit.save_model(tmp_path_factory.mktemp("small") / "m", config))
    engine = labs_engine.Engine(model)
    served = kit.configured(generation=labs.Generation(max_new_tokens=4))
    app = labs_api.create_app(served, labs_models.One(engine, "tiny"))
    yield schemathesis.openapi.from_wsgi("/openapi.json", app)
    engine.close()


CHECKS = [
    schemathesis.checks.not_a_server_error,
    openapi_checks.status_code_conformance,
    openapi_checks.content_type_conformance,
    openapi_checks.response_schema_conformance,
]
GETS = ("/health", "/readyz", "/v1/models", "/v1/models/{name}", "/metrics", "/status.json")
MESSAGES = ("/v1/messages", "/v1/messages/count_tokens")
POSTS = (*BODIES, *MESSAGES, *labs_vectors.ENDPOINTS)
OPERATIONS = [*(("GET", path) for path in GETS), *(("POST", path) for path in POSTS)]


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
@pytest.mark.parametrize("examples", [5, pytest.param(50, marks=pytest.mark.long)])
def test_the_server_does_what_its_openapi_document_says(described, method, path, examples):
    @hypothesis_settings(max_examples=examples, derandomize=True, deadline=None, database=None)
    @given(case=described[path][method].as_strategy())
    def ask(case):
        case.call_and_validate(checks=CHECKS)

    ask()


def test_all_operations_are_tried(described):
    found = {(each.ok().method.upper(), each.ok().path) for each in described.get_all_operations()}
    assert found == {*OPERATIONS, ("GET", "/livez")}
