# SPDX-License-Identifier: Apache-2.0
"""Tests of labs_api.py: bodies and answers on a fake engine, true clients of a tiny true model."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import falcon.testing
import httpx
import msgspec
import openai
import pytest
import schemathesis
import schemathesis.checks
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from schemathesis.openapi import checks as openapi_checks
from waitress import wasyncore

import labs
import labs_api
import labs_engine
import test_labs

folder, one_thread = test_labs.folder, test_labs.one_thread
tiny_folder, tiny = test_labs.tiny_folder, test_labs.tiny
WAIT_S = 20  # what a test waits at most for what should come at once
A = {"logit_bias": {"97": 100}, "temperature": 0}  # lets any model say "aaa..."
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "hi"}]
BODIES: dict[str, dict[str, Any]] = {
    "/generate": {"prompt": "hi"},
    "/generate/stream": {"prompt": "hi"},
    CHAT: {"messages": HELLO},
    COMPLETIONS: {"prompt": "hi"},
}
PUBLIC = ("/health", "/livez", "/readyz", "/openapi.json", "/docs", "/")


# ---------------------------------------------------------------- helpers


class Fake:
    """Stands for an engine: remembers what it was asked and answers at once with set pieces."""

    def __init__(self, model: labs.Model) -> None:
        self.model = model
        self.pieces: list[str | labs.Delta] = ["Hello", " there"]
        self.reason: Any = "stop"
        self.refusal: BaseException | None = None  # raised by submit
        self.error: labs.LabsError | None = None  # ends the answer
        self.asked: list[tuple[labs.Inputs, labs.Generation, str]] = []
        self.left: list[int] = []
        self.doing: dict[str, Any] = {}  # of its status

    def submit(
        self,
        inputs: labs.Inputs,
        generation: labs.Generation,
        *,
        owner: str = "",
        processors: tuple[Any, ...] = (),
        events: Any = None,
    ) -> labs_engine.Answer:
        if self.refusal is not None:
            raise self.refusal
        self.asked.append((inputs, generation, owner))
        ticket, events = len(self.asked), queue.SimpleQueue() if events is None else events
        for piece in self.pieces:
            events.put((ticket, labs.Delta(piece) if isinstance(piece, str) else piece))
        usage = labs.Usage(len(inputs.input_ids), len(self.pieces))
        done = labs.Done(self.reason, usage, labs.Timings(0.0, 0.1, 0.2, 5.0), seed=generation.seed)
        events.put((ticket, labs.Failed(self.error) if self.error else done))
        return labs_engine.Answer(ticket, events, self.left.append)

    def status(self) -> labs_engine.Status:
        numbers = dict.fromkeys(("running", "waiting", "steps", "halvings", "failures"), 0)
        numbers |= {"max_rows": 2, "max_waiting": 2, "response_cache_hits": 0}
        state = {"cache_usage": 0.0, "idle_s": 0.0, "alive": True, "closing": False}
        return labs_engine.Status(**numbers | state | self.doing)

    @property
    def generation(self) -> labs.Generation:
        return self.asked[-1][1]


def configured(*keys: str, generation: Any = None, **server: Any) -> labs.Config:
    return labs.Config(
        model_id="tiny",
        generation=generation or labs.Generation(),
        server=labs.Server(**server),
        api_keys=tuple(hashlib.sha256(key.encode()).hexdigest() for key in keys),
    )


class Site:
    """An app and a client of it, without sockets."""

    def __init__(self, engine: Any, config: labs.Config) -> None:
        self.engine, self.config = engine, config
        self.app = labs_api.create_app(config, engine_for=lambda name: engine)
        self.client = falcon.testing.TestClient(self.app)

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> Any:
        """Ask; a body that is no bytes is sent as JSON. Header names: _ stands for -."""
        names = {"Host": "localhost"} if body is None else {"Host": "localhost", **JSON}
        names |= {name.replace("_", "-"): value for name, value in headers.items()}
        sent = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        return self.client.simulate_request(method, path, body=sent, headers=names)

    def get(self, path: str, **headers: str) -> Any:
        return self.ask("GET", path, **headers)

    def post(self, path: str, body: Any, **headers: str) -> Any:
        return self.ask("POST", path, body, **headers)

    def sdk(self, key: str = "none", **options: Any) -> openai.OpenAI:
        client = httpx.Client(transport=httpx.WSGITransport(app=self.app))
        base = "http://localhost/v1"
        return openai.OpenAI(
            api_key=key, base_url=base, http_client=client, **{"max_retries": 0, **options}
        )


JSON = {"Content-Type": "application/json"}


@pytest.fixture
def fake(tiny: labs.Model) -> Fake:
    return Fake(tiny)


@pytest.fixture
def site(fake: Fake) -> Site:
    return Site(fake, configured())


def error_of(response: Any, status: int) -> dict[str, Any]:
    """Return the error of an answer, which has the one shape of all errors."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    (error,) = response.json.values()
    assert list(response.json) == ["error"]
    assert list(error) == ["message", "type", "param", "code"]
    assert test_labs.is_one_sentence(Exception("x" * 10 + error["message"]))
    return error


def events_of(data: bytes) -> list[tuple[str, str]]:
    """Return (event, data) of server-sent events, as the HTML standard reads them."""
    found, kind, lines = [], "message", []
    for line in re.split(r"\r\n|\r|\n", data.decode()):
        name, _, value = line.partition(":")
        if not line and lines:
            found.append((kind, "\n".join(lines)))
        if not line:
            kind, lines = "message", []
        elif name == "data":
            lines.append(value.removeprefix(" "))
        elif name == "event":
            kind = value.removeprefix(" ")
    return found


def chunks_of(response: Any) -> list[dict[str, Any]]:
    """Return the chunks of OpenAI's stream, which ends in [DONE]."""
    *chunks, (_, last) = events_of(response.content)
    assert last == "[DONE]"
    return [json.loads(data) for _, data in chunks]


def log_lines(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    records = [record for record in caplog.records if record.name == "labs.api"]
    return [json.loads(record.getMessage()) for record in records if record.levelname == "INFO"]


def until(condition: Callable[[], Any]) -> Any:
    """Wait for a condition, long enough for any machine."""
    end = time.monotonic() + WAIT_S
    while not (value := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)
    return value


# ---------------------------------------------------------------- bodies


DEEP = b"[" * 100_000
BAD_JSON = {
    "empty": b"",
    "truncated": b'{"prompt": "a"',
    "trailing text": b'{"prompt": "a"} x',
    "single quotes": b"{'prompt': 'a'}",
    "invalid UTF-8": b'{"prompt": "\xff"}',
    "UTF-16": '{"prompt": "a"}'.encode("utf-16"),
    "a byte order mark": b'\xef\xbb\xbf{"prompt": "a"}',
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
    (CHAT, '"messages": [{"role": "user"}]', "messages[0]"),
    (CHAT, '"messages": [{"role": "user", "content": "a", "name": "x"}]', "messages[0].name"),
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


def test_a_body_over_the_limit_is_refused(fake: Fake) -> None:
    site = Site(fake, configured(max_body_bytes=1024))
    body = json.dumps({"prompt": "a"}).encode()
    assert site.post("/generate", body.ljust(1024)).status_code == 200
    assert error_of(site.post("/generate", body.ljust(1025)), 413)["code"] == "body_too_large"


@pytest.mark.parametrize("path", ["/generate", CHAT, COMPLETIONS])
def test_a_prompt_over_the_limit_is_refused(fake: Fake, path: str) -> None:
    body = json.dumps(BODIES[path]).replace("hi", "é" * 5)
    assert Site(fake, configured(max_prompt_bytes=10)).post(path, body.encode()).status_code == 200
    small = Site(fake, configured(max_prompt_bytes=9))
    assert error_of(small.post(path, body.encode()), 400)["code"] == "prompt_too_large"


@pytest.mark.parametrize("path", ["/nothing", "/generate/", "/v1", "/health/../generate"])
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


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize(("refusal", "status", "code"), REFUSALS, ids=["busy", "long", "input"])
def test_what_the_engine_refuses_is_told(
    site: Site, path: str, refusal: Any, status: int, code: str
) -> None:
    site.engine.refusal = refusal
    response = site.post(path, BODIES[path])
    error = error_of(response, status)
    assert (error["code"], error["message"]) == (code, str(refusal))
    assert ("retry-after" in response.headers) == (status == 503)


@pytest.mark.parametrize("path", BODIES)
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


def test_all_choices_are_let_go_when_one_cannot_be_taken(fake: Fake) -> None:
    submit, site = fake.submit, Site(fake, configured())

    def third_is_too_much(*inputs: Any, **options: Any) -> Any:
        fake.refusal = labs_engine.Busy("full") if len(fake.asked) == 2 else None
        return submit(*inputs, **options)

    fake.submit = third_is_too_much  # type: ignore[method-assign]
    error_of(site.post(CHAT, {"messages": HELLO, "n": 3}), 503)
    assert {1, 2} <= {*fake.left}


# ---------------------------------------------------------------- what is asked reaches the engine


ODD = {"best_of": 2, "suffix": "x", "echo": True, "store": True, "metadata": {"a": "b"}}


@pytest.mark.parametrize("name", sorted(labs_api.REFUSED))
def test_what_is_not_implemented_is_refused_by_name(site: Site, name: str) -> None:
    path = CHAT if name in labs_api.ChatRequest.__struct_fields__ else COMPLETIONS
    error = error_of(site.post(path, {**BODIES[path], name: ODD.get(name, ["odd"])}), 400)
    assert (error["code"], error["param"]) == ("unsupported", name)
    assert not site.engine.asked


@pytest.mark.parametrize("name", sorted(labs_api.REFUSED))
def test_a_value_that_asks_for_nothing_is_taken(site: Site, name: str) -> None:
    path = CHAT if name in labs_api.ChatRequest.__struct_fields__ else COMPLETIONS
    for value in (None, *labs_api.NEUTRAL.get(name, ())):
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
def test_null_leaves_openai_settings_as_configured(fake: Fake, path: str) -> None:
    generation = labs.Generation(max_new_tokens=5, temperature=0.5, stop=("x",), seed=3)
    site = Site(fake, configured(generation=generation))
    kind = {CHAT: labs_api.ChatRequest, COMPLETIONS: labs_api.CompletionRequest}[path]
    fields = {*kind.__struct_fields__} - BODIES[path].keys()
    assert site.post(path, {**BODIES[path], **dict.fromkeys(fields)}).status_code == 200
    assert fake.generation == generation


def test_what_is_unset_is_as_configured(fake: Fake) -> None:
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
    assert broken["bytes"] is None


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
    fake = Fake(tiny)
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


# ---------------------------------------------------------------- who may ask


KEYS = ("s3cret", "clé")
RIGHT = "Bearer s3cret"


@pytest.mark.parametrize(
    ("authorization", "status"),
    [
        (None, 401),
        ("", 401),
        ("Bearer", 401),
        ("Bearer ", 401),
        ("Bearer wrong", 401),
        ("Bearer s3cret2", 401),
        ("Bearer s3cret, s3cret", 401),
        ("Basic s3cret", 401),
        ("s3cret", 401),
        ("Bearer \xe9", 401),
        (RIGHT, 200),
        ("bearer s3cret", 200),
        ("Bearer " + "clé".encode().decode("latin-1"), 200),
    ],
)
def test_only_the_right_key_opens(fake: Fake, authorization: str | None, status: int) -> None:
    site = Site(fake, configured(*KEYS))
    headers = {} if authorization is None else {"Authorization": authorization}
    response = site.post("/generate", {"prompt": "a"}, **headers)
    assert response.status_code == status
    assert bool(fake.asked) == (status == 200)
    if status == 401:
        assert error_of(response, 401)["type"] == "authentication_error"
        assert response.headers["www-authenticate"] == "Bearer"


def test_a_key_with_accents_opens_its_own_door_only(fake: Fake) -> None:
    raw = "Bearer " + "clé".encode().decode("latin-1")
    assert (
        Site(fake, configured("s3cret")).post("/generate", {}, Authorization=raw).status_code == 401
    )


@pytest.mark.parametrize("path", PUBLIC)
def test_what_is_public_needs_no_key(fake: Fake, path: str) -> None:
    assert Site(fake, configured(*KEYS)).get(path).status_code == 200


def test_all_else_needs_a_key(fake: Fake) -> None:
    site = Site(fake, configured(*KEYS))
    paths = site.get("/openapi.json").json["paths"]
    closed = [
        (method, path) for path, found in paths.items() if path not in PUBLIC for method in found
    ]
    assert len(closed) == 7
    for method, path in closed:
        error_of(site.ask(method.upper(), path.replace("{name}", "tiny")), 401)


@pytest.mark.parametrize(("public", "status"), [(False, 401), (True, 200)])
def test_metrics_are_public_only_if_wanted(fake: Fake, public: bool, status: int) -> None:
    site = Site(fake, configured(*KEYS, public_metrics=public))
    assert site.get("/metrics").status_code == status
    assert site.get("/metrics", Authorization=RIGHT).status_code == 200


@pytest.mark.parametrize(
    "path",
    ["//generate", "/%67enerate", "/generate/", "/health/../generate", "/./generate",
     "/generate%2f", "/health%2f..%2fgenerate", "/generate;/health", "/GENERATE", "/generate?/health"],
)  # fmt: skip
def test_no_spelling_of_a_path_goes_round_the_key(fake: Fake, path: str) -> None:
    response = Site(fake, configured(*KEYS)).post(path, {"prompt": "a"})
    assert response.status_code in (401, 404)
    assert not fake.asked


@pytest.mark.parametrize("path", ["/generate", "/metrics", CHAT])
def test_options_ask_for_no_key_and_do_nothing(fake: Fake, path: str) -> None:
    response = Site(fake, configured(*KEYS)).ask("OPTIONS", path)
    assert response.status_code == 200
    assert "allow" in response.headers
    assert not response.content


HOSTS = [
    ("localhost", 200),
    ("LocalHost:8000", 200),
    ("127.0.0.1:8000", 200),
    ("[::1]:8000", 200),
    ("[::1]", 200),
    ("evil.com", 421),
    ("evil.com:8000", 421),
    ("", 421),
    ("localhost.evil.com", 421),
    ("evil.com, localhost", 421),
    ("localhost/health?", 421),
    ("localhost:8000@evil.com", 421),
    ("user@localhost", 421),
    ("labs.example.org", 421),
]


@pytest.mark.parametrize(("host", "status"), HOSTS)
@pytest.mark.parametrize("path", ["/health", "/", "/v1/models"])
def test_only_known_hosts_are_served(site: Site, path: str, host: str, status: int) -> None:
    response = site.get(path, Host=host)
    assert response.status_code == status
    if status == 421:
        assert error_of(response, 421)["code"] == "wrong_host"


@pytest.mark.parametrize(
    ("allowed", "host", "status"),
    [
        (("Labs.Example.org",), "labs.example.org:443", 200),
        (("Labs.Example.org",), "localhost", 200),
        (("Labs.Example.org",), "evil.com", 421),
        (("*",), "evil.com", 200),
    ],
)
def test_hosts_may_be_allowed(fake: Fake, allowed: Any, host: str, status: int) -> None:
    site = Site(fake, configured(allowed_hosts=allowed))
    assert site.get("/health", Host=host).status_code == status


ORIGIN = "https://app.example"


def test_no_other_origin_may_read_by_default(site: Site) -> None:
    for method in ("OPTIONS", "GET"):
        response = site.ask(method, "/v1/models", Origin=ORIGIN)
        assert not [name for name in response.headers if name.startswith("access-control")]


@pytest.mark.parametrize(("origin", "allowed"), [(ORIGIN, True), ("https://evil.com", False)])
def test_only_allowed_origins_may_read(fake: Fake, origin: str, allowed: bool) -> None:
    site = Site(fake, configured(*KEYS, allow_origins=(ORIGIN,)))
    for headers in ({}, {"Authorization": RIGHT}):
        response = site.get("/v1/models", Origin=origin, **headers)
        assert (response.headers.get("access-control-allow-origin") == origin) == allowed
    wanted = {"Access_Control_Request_Method": "POST"}
    wanted |= {"Access_Control_Request_Headers": "authorization, content-type"}
    response = site.ask("OPTIONS", CHAT, Origin=origin, **wanted)
    assert response.status_code == 200
    assert ("access-control-allow-origin" in response.headers) == allowed
    assert ("authorization" in response.headers.get("access-control-allow-headers", "")) == allowed


@pytest.mark.parametrize(
    ("given_id", "taken"),
    [("a.B_c-9", True), ("x" * 64, True), ("x" * 65, False), ("", False), ("a b", False),
     ("a\r\nSet-Cookie: x", False), ("a\n", False), ("é", False), ('a"b', False)],
)  # fmt: skip
def test_a_request_id_is_taken_if_it_is_harmless(site: Site, given_id: str, taken: bool) -> None:
    found = site.get("/health", X_Request_Id=given_id).headers["x-request-id"]
    assert (found == given_id) == taken
    assert re.fullmatch(r"[A-Za-z0-9._-]{1,64}", found)


def test_nothing_in_a_path_reaches_headers_or_breaks_a_log_line(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "labs.api")
    for path in ("/%0d%0aX-Evil:1", "/v1/models/a%0d%0aX-Evil:1%00%1b%5b"):
        response = site.get(path)
        assert response.status_code == 404
        assert "x-evil" not in response.headers
    assert len(log_lines(caplog)) == 2
    assert not any("\n" in record.getMessage() for record in caplog.records)


def test_each_request_is_one_line_of_json_without_secrets(
    fake: Fake, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    site = Site(fake, configured(*KEYS))
    paths = [*BODIES, CHAT, "/generate"]
    for path in paths:
        sent = json.dumps({**BODIES[path], "stream": True} if "/v1" in path else BODIES[path])
        body = sent.replace("hi", "a private matter").encode()
        assert site.post(path, body, Authorization=RIGHT).status_code == 200
    site.post("/generate", {"prompt": "a private matter"}, Authorization="Bearer gue55ed")
    site.post("/generate", {"prompt": 5, "private": 5}, Authorization=RIGHT)
    lines = log_lines(caplog)
    assert [line["status"] for line in lines] == [200] * len(paths) + [401, 400]
    assert [line["path"] for line in lines] == [*paths, "/generate", "/generate"]
    assert lines[0]["completion_tokens"] == 2
    assert lines[0]["finish_reason"] == lines[1]["finish_reason"] == "stop"
    digest = hashlib.sha256(b"s3cret").hexdigest()
    assert lines[0]["key"] == digest[: len(lines[0]["key"])] != digest
    for secret in ("private", "s3cret", "gue55ed", "Hello"):
        assert secret not in caplog.text


def test_signs_of_life_are_not_logged(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    for path in ("/health", "/livez", "/readyz"):
        site.get(path)
    assert not log_lines(caplog)


def test_requests_over_the_quota_of_a_key_are_refused(fake: Fake) -> None:
    site = Site(fake, configured("one", "two", requests_per_minute=2))
    answers = [site.get("/v1/models", Authorization="Bearer one") for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert error_of(answers[2], 429)["code"] == "rate_limit_exceeded"
    assert 1 <= int(answers[2].headers["retry-after"]) <= 30
    assert site.get("/v1/models", Authorization="Bearer two").status_code == 200
    assert site.get("/health").status_code == 200


def test_tokens_over_the_quota_of_a_key_are_refused(fake: Fake) -> None:
    site = Site(fake, configured("one", "two", tokens_per_minute=100))
    body = {"prompt": "hi", "max_new_tokens": 60}
    first, second = (site.post("/generate", body, Authorization="Bearer one") for _ in range(2))
    assert first.status_code == 200
    error_of(second, 429)
    assert 1 <= int(second.headers["retry-after"]) <= 60
    assert site.post("/generate", body, Authorization="Bearer two").status_code == 200
    assert len(fake.asked) == 2


def test_a_quota_refills() -> None:
    quota = labs_api.Quota(60_000)  # one a millisecond
    assert quota.take("a", 60_000) == 0
    assert 0 < quota.take("a", 60_000) <= 60
    time.sleep(0.05)
    assert quota.take("a", 30) == 0


def test_answers_are_shared_within_one_key_only(fake: Fake) -> None:
    site = Site(fake, configured("one", "two"))
    for key in ("one", "two", "one"):
        site.post("/generate", {"prompt": "a"}, Authorization=f"Bearer {key}")
    first, second, third = (owner for _, _, owner in fake.asked)
    assert first == third != second


@pytest.mark.parametrize(
    ("keys", "server", "allowed"),
    [
        ((), {"host": "127.0.0.1"}, True),
        ((), {"host": "127.9.9.9"}, True),
        ((), {"host": "localhost"}, True),
        ((), {"host": "::1"}, True),
        ((), {"host": "0.0.0.0"}, False),
        ((), {"host": "::"}, False),
        ((), {"host": "192.0.2.7"}, False),
        ((), {"host": "example.org"}, False),
        ((), {"host": ""}, False),
        (("k",), {"host": "0.0.0.0"}, True),
        ((), {"host": "0.0.0.0", "insecure": True}, True),
    ],
)
def test_other_machines_are_served_only_with_a_key(keys: Any, server: Any, allowed: bool) -> None:
    refused = contextlib.nullcontext() if allowed else pytest.raises(labs.ConfigError, match="key")
    with refused:
        labs_api.check_exposure(configured(*keys, **server))


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
