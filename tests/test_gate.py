# SPDX-License-Identifier: Apache-2.0
"""Tests of labs_gate.py: who may ask, how much, and what is told of it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import sys
import time
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from kit import (
    BODIES,
    CHAT,
    KEYS,
    PUBLIC,
    WAIT_S,
    FakeEngine,
    Site,
    configured,
    error_of,
    log_lines,
    until,
)

import labs
import labs_engine
import labs_gate
import labs_request

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
def test_only_the_right_key_opens(fake: FakeEngine, authorization: str | None, status: int) -> None:
    site = Site(fake, configured(*KEYS))
    headers = {} if authorization is None else {"Authorization": authorization}
    response = site.post("/generate", {"prompt": "a"}, **headers)
    assert response.status_code == status
    assert bool(fake.asked) == (status == 200)
    if status == 401:
        assert error_of(response, 401)["type"] == "authentication_error"
        assert response.headers["www-authenticate"] == "Bearer"


def test_a_key_with_accents_opens_its_own_door_only(fake: FakeEngine) -> None:
    raw = "Bearer " + "clé".encode().decode("latin-1")
    assert (
        Site(fake, configured("s3cret")).post("/generate", {}, Authorization=raw).status_code == 401
    )


@pytest.mark.parametrize("path", PUBLIC)
def test_what_is_public_needs_no_key(fake: FakeEngine, path: str) -> None:
    assert Site(fake, configured(*KEYS)).get(path).status_code == 200


def test_all_else_needs_a_key(fake: FakeEngine) -> None:
    site = Site(fake, configured(*KEYS))
    paths = site.get("/openapi.json").json["paths"]
    closed = [
        (method, path) for path, found in paths.items() if path not in PUBLIC for method in found
    ]
    assert len(closed) == 9
    for method, path in closed:
        error_of(site.ask(method.upper(), path.replace("{name}", "tiny")), 401)


@pytest.mark.parametrize(("public", "status"), [(False, 401), (True, 200)])
def test_metrics_are_public_only_if_wanted(fake: FakeEngine, public: bool, status: int) -> None:
    site = Site(fake, configured(*KEYS, public_metrics=public))
    assert site.get("/metrics").status_code == status
    assert site.get("/metrics", Authorization=RIGHT).status_code == 200


@pytest.mark.parametrize(
    "path",
    ["//generate", "/%67enerate", "/generate/", "/health/../generate", "/./generate",
     "/generate%2f", "/health%2f..%2fgenerate", "/generate;/health", "/GENERATE"],
)  # fmt: skip
def test_no_spelling_of_a_path_goes_round_the_key(fake: FakeEngine, path: str) -> None:
    response = Site(fake, configured(*KEYS)).post(path, {"prompt": "a"})
    assert response.status_code in (401, 404)
    assert not fake.asked


@pytest.mark.parametrize("path", ["/generate", "/metrics", CHAT])
def test_options_ask_for_no_key_and_do_nothing(fake: FakeEngine, path: str) -> None:
    response = Site(fake, configured(*KEYS)).ask("OPTIONS", path)
    assert response.status_code == 200
    assert "allow" in response.headers
    assert not response.content


# ---------------------------------------------------------------- how much one request may be


def asking(*prompts: Any, n: int = 1) -> labs_request.Request:
    found = [
        labs_request.Prompt(prompt=each) if isinstance(each, str) else each for each in prompts
    ]
    return labs_request.Request(prompts=tuple(found), n=n)


def said(*texts: str) -> labs_request.Prompt:
    return labs_request.Prompt(messages=tuple(labs.Message(role="user", content=t) for t in texts))


LIMITS = labs.Server(max_choices=4, max_prompts=3, max_prompt_bytes=3)


@pytest.mark.parametrize(
    ("request_", "code", "param", "words"),
    [
        (asking("a", n=5), "invalid_value", "n", "has 5 choices per prompt"),
        (asking(*"abcd"), "invalid_value", "prompt", "has 4 prompts; this server allows 3"),
        (asking("abcd"), "prompt_too_large", None, "the prompt has 4 bytes; this server"),
        (asking("a", "üü"), "prompt_too_large", None, "has 4 bytes"),
        (asking(said("ab", "c")), "prompt_too_large", None, "has 4 bytes"),
    ],
)
def test_a_request_over_the_limits_is_refused(
    request_: labs_request.Request, code: str, param: str | None, words: str
) -> None:
    with pytest.raises(labs_request.Refusal, match=words) as caught:
        labs_gate.check_sizes(LIMITS, request_)
    assert (caught.value.code, caught.value.param) == (code, param)


def test_as_much_as_the_limits_is_taken() -> None:
    labs_gate.check_sizes(LIMITS, asking("abc", "abc", "abc", n=4))


def test_too_large_a_prompt_is_not_looked_at(fake: FakeEngine) -> None:
    config = msgspec.structs.replace(configured(max_prompt_bytes=3), guard=labs.Guard(deny=("hi",)))
    site = Site(fake, config)
    assert error_of(site.post("/generate", {"prompt": "hi hi"}), 400)["code"] == "prompt_too_large"


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (CHAT, {**BODIES[CHAT], "n": 3}, "n"),
        ("/v1/completions", {"prompt": ["a", "b", "c"]}, "prompt"),
        ("/v1/completions", {"prompt": ["a", "b"], "n": 2}, "n"),
    ],
)
def test_more_answers_than_there_will_ever_be_room_for_are_no_matter_of_waiting(
    fake: FakeEngine, path: str, body: Any, param: str
) -> None:
    fake.doing = {"max_rows": 1, "max_waiting": 1}
    site = Site(fake, configured())
    response = site.post(path, body)
    error = error_of(response, 400)
    assert error["param"] == param
    assert {"max_batch_rows", "max_waiting"} <= {*re.findall(r"\w+", error["message"])}
    assert "retry-after" not in response.headers
    fake.doing = {"max_rows": 2, "max_waiting": 2}
    assert site.post(path, body).status_code == 200


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
    ("localhost.", 200),
    ("LOCALHOST.:8000", 200),
    ("localhost..", 421),
    ("evil.com.", 421),
    (".", 421),
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
        (("Labs.Example.org",), "labs.example.org.", 200),
        (("Labs.Example.org",), "evil.com", 421),
        (("*",), "evil.com", 200),
    ],
)
def test_hosts_may_be_allowed(fake: FakeEngine, allowed: Any, host: str, status: int) -> None:
    site = Site(fake, configured(allowed_hosts=allowed))
    assert site.get("/health", Host=host).status_code == status


ORIGIN = "https://app.example"


def test_no_other_origin_may_read_by_default(site: Site) -> None:
    for method in ("OPTIONS", "GET"):
        response = site.ask(method, "/v1/models", Origin=ORIGIN)
        assert not [name for name in response.headers if name.startswith("access-control")]


@pytest.mark.parametrize(("origin", "allowed"), [(ORIGIN, True), ("https://evil.com", False)])
def test_only_allowed_origins_may_read(fake: FakeEngine, origin: str, allowed: bool) -> None:
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


@pytest.mark.parametrize("origin", [ORIGIN, "https://evil.com", None])
@pytest.mark.parametrize("path", ["/health", "/v1/models", "/nothing"])
def test_answers_to_one_of_several_origins_are_kept_apart(
    fake: FakeEngine, path: str, origin: str | None
) -> None:
    site = Site(fake, configured(*KEYS, allow_origins=(ORIGIN, "https://b.example")))
    response = site.get(path, **({} if origin is None else {"Origin": origin}))
    assert response.headers["vary"] == "Origin"
    shown = response.headers.get("access-control-expose-headers")
    assert shown == ("X-Request-Id, Retry-After" if origin == ORIGIN else None)


def test_any_origin_needs_no_keeping_apart(fake: FakeEngine) -> None:
    site = Site(fake, configured(allow_origins=("*",)))
    assert "vary" not in site.get("/health", Origin=ORIGIN).headers


@pytest.mark.parametrize("path", [*PUBLIC, "/v1/models", "/v1/models/tiny", "/metrics"])
def test_head_answers_as_get_does_without_a_body(
    site: Site, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    got, found = site.get(path), site.ask("HEAD", path)
    assert found.status_code == got.status_code == 200
    assert found.content == b""
    assert found.headers["content-type"] == got.headers["content-type"]
    if path != "/metrics":
        assert found.headers["content-length"] == str(len(got.content))
    assert {line["method"] for line in log_lines(caplog)} <= {"GET", "HEAD"}
    assert [line["method"] for line in log_lines(caplog)][1:] in ([], ["HEAD"])


def test_head_asks_for_the_same_key_and_for_no_answer(fake: FakeEngine) -> None:
    site = Site(fake, configured(*KEYS))
    assert site.ask("HEAD", "/v1/models").status_code == 401
    assert site.ask("HEAD", "/nothing").status_code == 404
    assert site.ask("HEAD", "/generate", Authorization=RIGHT).status_code == 405


@pytest.mark.parametrize("path", ["/health/", "/v1/models/", "/v1/models/tiny/", "/metrics//"])
def test_a_slash_at_the_end_changes_no_path(site: Site, path: str) -> None:
    assert site.get(path).status_code == 200


@pytest.mark.parametrize("path", BODIES)
def test_a_slash_at_the_end_changes_no_endpoint(site: Site, path: str) -> None:
    assert site.post(f"{path}/", BODIES[path]).status_code == 200


def test_a_page_whose_addresses_are_relative_is_sent_for_without_the_slash(site: Site) -> None:
    response = site.get("/docs/")
    assert (response.status_code, response.headers["location"]) == (301, "/docs")


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        ("/chat/completions", "/v1/chat/completions"),
        ("/completions/", "/v1/chat/completions"),
        ("/models", "/v1/models"),
        ("/v1/v1/chat/completions", "/v1/chat/completions"),
        ("/api/generate", "/generate"),
        ("/v1/embeddings", None),
    ],
)
def test_a_path_that_is_not_there_is_told_which_are(
    site: Site, path: str, meant: str | None
) -> None:
    for response in (site.post(path, {}), site.get(path), site.ask("PUT", path)):
        error = error_of(response, 404)
        assert (error["type"], error["code"]) == ("not_found_error", "not_found")
        assert {*BODIES, *PUBLIC} <= {*re.findall(r"[^\s,;?]+", error["message"])}
        assert (f"did you mean {meant}?" in error["message"]) == (meant is not None)


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
    fake: FakeEngine, caplog: pytest.LogCaptureFixture
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
    assert lines[0]["model"] == lines[1]["model"] == "tiny"
    digest = hashlib.sha256(b"s3cret").hexdigest()
    assert lines[0]["key"] == digest[: len(lines[0]["key"])] != digest
    for secret in ("private", "s3cret", "gue55ed", "Hello"):
        assert secret not in caplog.text


def test_signs_of_life_are_not_logged(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    for path in ("/health", "/livez", "/readyz"):
        site.get(path)
    assert not log_lines(caplog)


def test_requests_over_the_quota_of_a_key_are_refused(fake: FakeEngine) -> None:
    site = Site(fake, configured("one", "two", requests_per_minute=2))
    answers = [site.get("/v1/models", Authorization="Bearer one") for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert error_of(answers[2], 429)["code"] == "rate_limit_exceeded"
    assert 1 <= int(answers[2].headers["retry-after"]) <= 30
    assert site.get("/v1/models", Authorization="Bearer two").status_code == 200
    assert site.get("/health").status_code == 200


def test_tokens_over_the_quota_of_a_key_are_refused(fake: FakeEngine) -> None:
    site = Site(fake, configured("one", "two", tokens_per_minute=100))
    body = {"prompt": "hi", "max_new_tokens": 60}
    first, second = (site.post("/generate", body, Authorization="Bearer one") for _ in range(2))
    assert first.status_code == 200
    error_of(second, 429)
    assert 1 <= int(second.headers["retry-after"]) <= 60
    assert site.post("/generate", body, Authorization="Bearer two").status_code == 200
    assert len(fake.asked) == 2


@pytest.mark.parametrize("path", [path for path in BODIES if path != "/explain"])
def test_what_the_engine_does_not_take_is_not_paid_for(fake: FakeEngine, path: str) -> None:
    fake.refusal = labs_engine.Busy("full")
    site = Site(
        fake, configured(generation=labs.Generation(max_new_tokens=50), tokens_per_minute=100)
    )
    assert [site.post(path, BODIES[path]).status_code for _ in range(40)] == [503] * 40


def test_a_quota_that_is_used_up_is_told_with_its_bound_and_what_to_do(fake: FakeEngine) -> None:
    site = Site(fake, configured(requests_per_minute=3, tokens_per_minute=100))
    answers = [site.post("/generate", {"prompt": "hi", "max_new_tokens": n}) for n in (99, 60, 60)]
    answers.append(site.get("/v1/models"))
    codes = ((0, 400), (2, 429), (3, 429))
    told = [error_of(answers[place], code)["message"] for place, code in codes]
    assert re.fullmatch(r"this request may use \d+ tokens; the quota is 100 a minute", told[0])
    assert re.fullmatch(r"this .* use \d+ tokens, more .* of 100 a minute; retry in \d+ s", told[1])
    assert re.fullmatch(r"this API key may send 3 .* a minute; retry in (19|20) s", told[2])


def test_a_quota_refills() -> None:
    quota = labs_gate.Quota(60_000)  # one a millisecond
    assert quota.take("a", 60_000) == 0
    assert 0 < quota.take("a", 60_000) <= 60
    time.sleep(0.05)
    assert quota.take("a", 30) == 0


def test_answers_are_shared_within_one_key_only(fake: FakeEngine) -> None:
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
        labs_gate.check_exposure(configured(*keys, **server))


@pytest.mark.parametrize("origins", [("*",), ("https://a.example",)])
def test_any_origin_or_some_may_be_allowed(fake, origins):
    server = labs.Server(allow_origins=origins)
    site = Site(fake, labs.Config(server=server))
    answer = site.get("/health", Origin="https://a.example")
    assert answer.headers["access-control-allow-origin"] in ("*", "https://a.example")


# ---------------------------------------------------------------- standard error


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[labs_gate.Unhurried, int]]:
    """Make a log of three lines whose pipe is full."""
    monkeypatch.setattr(labs_gate, "LOG_LINES", 3)
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while os.write(writer, b"." * 1024):
            pass
    os.set_blocking(writer, True)
    yield labs_gate.Unhurried(writer), reader
    os.close(reader)


def test_what_finds_no_room_in_the_log_is_dropped_and_counted(
    unread: Any, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, reader = unread
    log.write("held by its thread\n")
    until(lambda: log._texts.empty())
    for number in range(5):
        print(number, file=log, end="")
    monkeypatch.setattr(sys, "stderr", log)
    assert "labs_log_lines_dropped_total 2.0" in site.get("/metrics").text
    told = b""
    while b"012" not in told:
        told += os.read(reader, 65536)
    assert told.lstrip(b".") == b"held by its thread\n012"
    log.wait(WAIT_S)
    assert log._texts.unfinished_tasks == 0


def test_a_log_that_cannot_be_written_is_counted_and_goes_on() -> None:
    with open("/dev/full", "wb") as full:
        log = labs_gate.Unhurried(full.fileno())
        handler = logging.StreamHandler(log)
        for each in ("one", "two"):
            handler.emit(logging.makeLogRecord({"msg": each}))
        log.wait(WAIT_S)
        assert (log.dropped, log.isatty()) == (2, False)


def test_a_log_that_leads_nowhere_counts_nothing() -> None:
    log = labs_gate.Unhurried(None)
    print("to whom?", file=log)
    log.wait(WAIT_S)
    assert (log.dropped, log._texts.unfinished_tasks) == (0, 0)
