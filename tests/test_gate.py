# SPDX-License-Identifier: Apache-2.0
"""Tests of labs_gate.py: hosts, keys, origins, paths, quotas, sizes, and the log of requests."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import sys
from types import SimpleNamespace

import kit
import pytest
from kit import BODIES, CHAT, COMPLETIONS, KEYS, PUBLIC, WAIT_S, Site, configured, error_of, until
from msgspec.structs import replace

import labs
import labs_engine
import labs_gate

RIGHT = "Bearer s3cret"
ACCENT = "Bearer " + "clé".encode().decode("latin-1")


# ---------------------------------------------------------------- keys


WRONG_KEYS = [None, "", "Bearer", "Bearer ", "Bearer wrong", "Bearer s3cret2", "Bearer \xe9"]
WRONG_KEYS += ["Bearer s3cret, s3cret", "Basic s3cret", "s3cret"]


@pytest.mark.parametrize("authorization", WRONG_KEYS)
def test_a_wrong_key_is_refused(fake, authorization):
    site = Site(fake, configured(*KEYS))
    headers = {} if authorization is None else {"Authorization": authorization}
    response = site.post("/generate", {"prompt": "a"}, **headers)
    assert error_of(response, 401)["type"] == "authentication_error"
    assert response.headers["www-authenticate"] == "Bearer"
    assert not fake.asked


def test_a_right_key_is_accepted_and_separates_owners(fake):
    site = Site(fake, configured(*KEYS))
    for right in (RIGHT, "bearer s3cret", ACCENT, RIGHT):
        assert site.post("/generate", {"prompt": "a"}, Authorization=right).status_code == 200
    first, second, accent, last = (owner for _, _, owner in fake.asked)
    assert first == second == last != accent
    response = Site(fake, configured("s3cret")).post("/generate", {}, Authorization=ACCENT)
    assert response.status_code == 401


def test_only_public_paths_need_no_key(fake):
    site = Site(fake, configured(*KEYS))
    paths = site.get("/openapi.json").json["paths"]
    assert [site.get(path).status_code for path in PUBLIC] == [200] * len(PUBLIC)
    closed = [(way, path) for path, ways in paths.items() if path not in PUBLIC for way in ways]
    assert len(closed) == 20
    for method, path in closed:
        answer = site.ask(method.upper(), path.replace("{name}", "tiny"))
        assert (answer.status_code, "x-api-key" in answer.json["error"]["message"]) == (401, True)
    for path in ("/generate", "/metrics", CHAT):
        response = site.ask("OPTIONS", path)
        assert (response.status_code, response.content) == (200, b"")
        assert "allow" in response.headers
    assert site.get("/metrics", Authorization=RIGHT).status_code == 200
    assert Site(fake, configured(*KEYS, public_metrics=True)).get("/metrics").status_code == 200


SPELLINGS = "//generate /%67enerate /generate/ /health/../generate /./generate /generate%2f"
SPELLINGS += " /health%2f..%2fgenerate /generate;/health /GENERATE"


@pytest.mark.parametrize("path", SPELLINGS.split())
def test_no_spelling_of_a_path_avoids_the_key(fake, path):
    response = Site(fake, configured(*KEYS)).post(path, {"prompt": "a"})
    assert response.status_code in (401, 404)
    assert not fake.asked


# ---------------------------------------------------------------- sizes of one request


TURNS = [{"role": "user", "content": text} for text in ("ab", "c")]
OVER_LIMITS = [
    (CHAT, {"messages": TURNS[1:], "n": 5}, "n", "has 5 choices per prompt"),
    (COMPLETIONS, {"prompt": [*"abcd"]}, "prompt", "has 4 prompts; this server allows 3"),
    (COMPLETIONS, {"prompt": "hi h"}, None, "the prompt has 4 bytes; this server allows 3"),
    (COMPLETIONS, {"prompt": ["a", "üü"]}, None, "has 4 bytes"),
    ("/generate", {"prompt": "üü"}, None, "has 4 bytes"),
    (CHAT, {"messages": TURNS}, None, "has 4 bytes"),  # and one between them
]


@pytest.mark.parametrize(("path", "body", "param", "words"), OVER_LIMITS)
def test_a_request_over_a_limit_is_refused_before_its_text_is_searched(
    fake, path, body, param, words
):
    limits = configured(max_choices=4, max_prompts=3, max_prompt_bytes=3)
    site = Site(fake, replace(limits, guard=labs.Guard(deny=("hi",))))
    error = error_of(site.post(path, body), 400)
    code = "invalid_value" if param else "prompt_too_large"
    assert (error["code"], error["param"], words in error["message"]) == (code, param, True)
    fake.doing = {"max_waiting": 99}
    assert site.post(COMPLETIONS, {"prompt": ["abc"] * 3, "n": 4}).status_code == 200


@pytest.mark.parametrize("prompts", [["a", "b", "c"], ["a", "b"]])
def test_more_answers_than_ever_have_room_are_refused_without_a_time_to_retry(fake, prompts):
    fake.doing = {"max_rows": 1, "max_waiting": 1}
    site, body = Site(fake, configured()), {"prompt": prompts, "n": 4 - len(prompts)}
    response = site.post(COMPLETIONS, body)
    error = kit.refused(response, 400, param=("n" if body["n"] > 1 else "prompt"))
    assert {"max_batch_rows", "max_waiting"} <= {*re.findall(r"\w+", error["message"])}
    assert "retry-after" not in response.headers
    fake.doing = {"max_rows": 2, "max_waiting": 2}
    assert site.post(COMPLETIONS, body).status_code == 200


# ---------------------------------------------------------------- hosts, origins and paths


KNOWN_HOSTS = "localhost|LocalHost:8000|127.0.0.1:8000|[::1]:8000|[::1]|localhost.|LOCALHOST.:8000"
UNKNOWN_HOSTS = "evil.com|evil.com:8000||localhost.evil.com|evil.com, localhost|localhost/health?"
UNKNOWN_HOSTS += "|localhost:8000@evil.com|user@localhost|labs.example.org|localhost..|evil.com.|."


@pytest.mark.parametrize("path", ["/health", "/", "/v1/models"])
def test_only_known_hosts_are_served(site, path):
    for host in KNOWN_HOSTS.split("|"):
        assert site.get(path, Host=host).status_code == 200, host
    for host in UNKNOWN_HOSTS.split("|"):
        assert error_of(site.get(path, Host=host), 421)["code"] == "wrong_host", host


def test_more_hosts_may_be_allowed(fake):
    some, every = (Site(fake, configured(allowed_hosts=(h,))) for h in ("Labs.Example.org", "*"))
    for host in ("labs.example.org:443", "localhost", "labs.example.org."):
        assert some.get("/health", Host=host).status_code == 200
    assert some.get("/health", Host="evil.com").status_code == 421
    assert every.get("/health", Host="evil.com").status_code == 200


ORIGIN, EVIL = "https://app.example", "https://evil.com"
ALLOWED = "access-control-allow-origin"


def test_no_other_origin_may_read_by_default(site):
    for method in ("OPTIONS", "GET"):
        response = site.ask(method, "/v1/models", Origin=ORIGIN)
        assert not [name for name in response.headers if name.startswith("access-control")]


@pytest.mark.parametrize(("origin", "allowed"), [(ORIGIN, True), (EVIL, False)])
def test_only_allowed_origins_may_read(fake, origin, allowed):
    site = Site(fake, configured(*KEYS, allow_origins=(ORIGIN,)))
    for headers in ({}, {"Authorization": RIGHT}):
        response = site.get("/v1/models", Origin=origin, **headers)
        assert (response.headers.get(ALLOWED) == origin) == allowed
    wanted = {"Access_Control_Request_Method": "POST"}
    wanted |= {"Access_Control_Request_Headers": "authorization, content-type"}
    response = site.ask("OPTIONS", CHAT, Origin=origin, **wanted)
    assert response.status_code == 200
    assert (ALLOWED in response.headers) == allowed
    assert ("authorization" in response.headers.get("access-control-allow-headers", "")) == allowed


@pytest.mark.parametrize("path", ["/health", "/v1/models", "/nothing"])
def test_caches_keep_responses_to_several_origins_apart(fake, path):
    site = Site(fake, configured(*KEYS, allow_origins=(ORIGIN, "https://b.example")))
    for origin in ({"Origin": ORIGIN}, {"Origin": EVIL}, {}):
        headers = site.get(path, **origin).headers
        shown = "X-Request-Id, request-id, Retry-After" if ORIGIN in origin.values() else None
        assert (headers["vary"], headers.get("access-control-expose-headers")) == ("Origin", shown)
    headers = Site(fake, configured(allow_origins=("*",))).get("/health", Origin=ORIGIN).headers
    assert (headers[ALLOWED], "vary" in headers) == ("*", False)


@pytest.mark.parametrize("path", [*PUBLIC, "/v1/models", "/v1/models/tiny", "/metrics"])
def test_head_answers_as_get_does_without_a_body(site, path):
    got, found = site.get(path), site.ask("HEAD", path)
    assert found.status_code == got.status_code == 200
    assert found.content == b""
    assert found.headers["content-type"] == got.headers["content-type"]
    if path != "/metrics":
        assert found.headers["content-length"] == str(len(got.content))


def test_head_needs_the_same_key_and_path(fake):
    site = Site(fake, configured(*KEYS))
    assert site.ask("HEAD", "/v1/models").status_code == 401
    assert site.ask("HEAD", "/nothing").status_code == 404
    assert site.ask("HEAD", "/generate", Authorization=RIGHT).status_code == 405


def test_a_slash_at_the_end_changes_nothing_but_the_address_of_a_page(site):
    for path in ("/health/", "/v1/models/", "/v1/models/tiny/", "/metrics//"):
        assert site.get(path).status_code == 200
    for path, body in BODIES.items():
        assert site.post(f"{path}/", body).status_code == 200
    response = site.get("/docs/")
    assert (response.status_code, response.headers["location"]) == (301, "/docs")


MEANT = {"/chat/completions": CHAT, "/completions/": CHAT, "/models": "/v1/models"}
MEANT |= {"/v1/v1/chat/completions": CHAT, "/api/generate": "/generate"}
MEANT |= {"/embeddings": "/v1/embeddings", "/v1/audio/speech": None}


@pytest.mark.parametrize(("path", "meant"), MEANT.items())
def test_an_unknown_path_is_answered_with_the_one_that_was_meant(site, path, meant):
    for response in (site.post(path, {}), site.get(path), site.ask("PUT", path)):
        error = kit.refused(response, 404, type="not_found_error", code="not_found")
        hint = f"did you mean {meant}?" if meant else "GET /openapi.json shows all paths"
        assert error["message"] == f"unknown path {path.rstrip('/')!r}; {hint}"


# ---------------------------------------------------------------- the log


HARMLESS = {"a.B_c-9": True, "x" * 64: True, "x" * 65: False, "": False, "a b": False}
HARMLESS |= dict.fromkeys(("a\r\nSet-Cookie: x", "a\n", "é", 'a"b'), False)


@pytest.mark.parametrize(("given_id", "taken"), HARMLESS.items())
def test_a_request_id_is_used_if_it_is_harmless(site, given_id, taken):
    found = site.get("/health", X_Request_Id=given_id).headers["x-request-id"]
    assert (found == given_id) == taken
    assert re.fullmatch(r"[A-Za-z0-9._-]{1,64}", found)


def test_no_path_adds_a_header_or_breaks_a_log_line(site, caplog):
    caplog.set_level(logging.INFO, "labs.api")
    for path in ("/%0d%0aX-Evil:1", "/v1/models/a%0d%0aX-Evil:1%00%1b%5b"):
        response = site.get(path)
        assert response.status_code == 404
        assert "x-evil" not in response.headers
    assert len(kit.log_lines(caplog)) == 2
    assert not any("\n" in record.getMessage() for record in caplog.records)


def test_each_request_but_health_checks_is_one_line_of_json_without_secrets(fake, caplog):
    caplog.set_level(logging.INFO)
    site = Site(fake, configured(*KEYS))
    for path in ("/health", "/livez", "/readyz"):
        site.get(path)
    paths = [*BODIES, CHAT, "/generate"]
    for path in paths:
        sent = json.dumps({**BODIES[path], "stream": True} if "/v1" in path else BODIES[path])
        body = sent.replace("hi", "a private matter").encode()
        assert site.post(path, body, Authorization=RIGHT).status_code == 200
    site.post("/generate", {"prompt": "a private matter"}, Authorization="Bearer gue55ed")
    site.post("/generate", {"prompt": 5, "private": 5}, Authorization=RIGHT)
    lines = kit.log_lines(caplog)
    assert [line["status"] for line in lines] == [200] * len(paths) + [401, 400]
    assert [line["path"] for line in lines] == [*paths, "/generate", "/generate"]
    assert lines[0]["completion_tokens"] == 2
    assert [(line["finish_reason"], line["model"]) for line in lines[:2]] == [("stop", "tiny")] * 2
    digest = hashlib.sha256(b"s3cret").hexdigest()
    assert lines[0]["key"] == digest[: len(lines[0]["key"])] != digest
    for secret in ("private", "s3cret", "gue55ed", "Hello"):
        assert secret not in caplog.text


@pytest.fixture
def unread(monkeypatch):
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


def test_a_line_that_finds_no_room_in_the_log_is_dropped_and_counted(unread, site, monkeypatch):
    log, reader = unread
    log.write("held by its thread\n")
    until(lambda: log._texts.empty())
    for number in range(5):
        print(number, file=log, end="")
    monkeypatch.setattr(sys, "stderr", log)
    assert "labs_log_lines_dropped_total 2.0" in site.get("/metrics").text
    written = b""
    while b"012" not in written:
        written += os.read(reader, 65536)
    assert written.lstrip(b".") == b"held by its thread\n012"
    log.wait(WAIT_S)
    assert log._texts.unfinished_tasks == 0


def test_a_log_that_cannot_be_written_or_has_no_file_blocks_nobody():
    with open("/dev/full", "wb") as full:
        log = labs_gate.Unhurried(full.fileno())
        handler = logging.StreamHandler(log)
        for each in ("one", "two"):
            handler.emit(logging.makeLogRecord({"msg": each}))
        log.wait(WAIT_S)
        assert (log.dropped, log.isatty()) == (2, False)
    log = labs_gate.Unhurried(None)
    print("to whom?", file=log)
    log.wait(WAIT_S)
    assert (log.dropped, log._texts.unfinished_tasks) == (0, 0)


# ---------------------------------------------------------------- quotas and exposure


def test_each_key_has_its_own_quota_of_requests_and_tokens(fake):
    body = {"prompt": "hi", "max_new_tokens": 60}
    for server in ({"requests_per_minute": 1}, {"tokens_per_minute": 100}):
        site = Site(fake, configured("one", "two", **server))
        first, second = (site.post("/generate", body, Authorization="Bearer one") for _ in "ab")
        assert first.status_code == 200
        assert error_of(second, 429)["code"] == "rate_limit_exceeded"
        assert 1 <= int(second.headers["retry-after"]) <= 60
        assert site.post("/generate", body, Authorization="Bearer two").status_code == 200
        assert site.get("/health").status_code == 200
    assert len(fake.asked) == 4


@pytest.mark.parametrize("path", [*kit.ANSWERED, "/choose"])
def test_a_request_that_the_engine_refuses_costs_no_tokens(fake, path):
    fake.refusal = labs_engine.Busy("full")
    generation = labs.Generation(max_new_tokens=50)
    site = Site(fake, configured(generation=generation, tokens_per_minute=100))
    assert [site.post(path, BODIES[path]).status_code for _ in range(10)] == [503] * 10


def test_a_refusal_by_a_quota_names_its_bound_and_the_time_to_retry(fake):
    site = Site(fake, configured(requests_per_minute=3, tokens_per_minute=100))
    answers = [site.post("/generate", {"prompt": "hi", "max_new_tokens": n}) for n in (99, 60, 60)]
    answers.append(site.get("/v1/models"))
    for place, code, words in (
        (0, 400, r"this request may use \d+ tokens; the quota is 100 a minute"),
        (2, 429, r"this .* use \d+ tokens, more .* 100 a minute; retry in \d+ s"),
        (3, 429, r"this API key may send 3 .* a minute; retry in (19|20) s"),
    ):
        assert re.fullmatch(words, error_of(answers[place], code)["message"])


def test_a_quota_refills(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(labs_gate, "time", SimpleNamespace(monotonic=lambda: now[0]))
    quota = labs_gate.Quota(60)
    assert [quota.take("a", 60), quota.take("a", 30), quota.take("b", 30)] == [0, 30, 0]
    now[0] = 29.0
    assert quota.take("a", 30) == pytest.approx(1)
    now[0] = 1000.0
    assert [quota.take("a", 60), quota.take("a", 1)] == [0, 1]
    quota.take("a", -1)
    assert quota.take("a", 1) == 0


LOCAL = ("127.0.0.1", "127.9.9.9", "localhost", "::1")


def test_other_machines_are_served_only_with_a_key():
    for host in ("0.0.0.0", "::", "192.0.2.7", "a.org", ""):
        with pytest.raises(labs.ConfigError, match="key"):
            labs_gate.check_exposure(configured(host=host))
    for host in LOCAL:
        labs_gate.check_exposure(configured(host=host))
    labs_gate.check_exposure(configured("k", host="0.0.0.0"))
    labs_gate.check_exposure(configured(host="0.0.0.0", insecure=True))
