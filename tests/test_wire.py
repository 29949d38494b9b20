# SPDX-License-Identifier: Apache-2.0
"""Tests of labs_wire.py: true sockets, half closed, closed, idle and with what is no request."""

from __future__ import annotations

import http.client
import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest
from kit import A, Brake, Live, configured, events_of, request, until

import labs
import labs_engine
import labs_wire

ORIGIN = "https://app.example"
BODY = {"prompt": "hi", "max_new_tokens": 4, **A}


@pytest.fixture(scope="module")
def served(tiny: labs.Model) -> Iterator[Live]:
    server = {"port": 0, "max_batch_rows": 2, "max_waiting": 2, "connection_idle_s": 40.0}
    config = configured(allow_origins=(ORIGIN,), **server)
    live = Live(labs_engine.Engine(tiny, config.server), config)
    yield live
    live.close()
    live.engine.close()


def half_closed(live: Live, sent: bytes) -> Any:
    """Send bytes, then say that there is no more to come."""
    connection = live.connect(sent)
    connection.shutdown(socket.SHUT_WR)
    return connection


def parsed(connection: Any) -> tuple[int, bytes]:
    with http.client.HTTPResponse(connection) as response:
        response.begin()
        return response.status, response.read()


def rest_of(connection: Any) -> bytes:
    return b"".join(iter(lambda: connection.recv(65_536), b""))


@pytest.mark.parametrize("version", ["1.0", "1.1"])
@pytest.mark.parametrize("path", ["/health", "/v1/models", "/nothing"])
def test_who_sends_no_more_gets_what_is_there(live: Live, version: str, path: str) -> None:
    sent = f"GET {path} HTTP/{version}\r\nHost: localhost\r\n\r\n".encode()
    status, body = parsed(half_closed(live, sent))
    assert status == (404 if path == "/nothing" else 200)
    assert json.loads(body)


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_who_sends_no_more_gets_a_slow_answer_whole(live: Live, brake: Brake, version: str) -> None:
    brake.pause_s = labs_wire.PROBE_S
    data = rest_of(half_closed(live, request("/generate", BODY, version=version)))
    head, _, body = data.partition(b"\r\n\r\n")
    assert head.startswith(f"HTTP/{version} 200 OK\r\n".encode())
    assert data.count(b"HTTP/") == 1
    assert json.loads(body)["text"] == "aaaa"


def test_who_sends_no_more_gets_a_stream_to_its_end(live: Live, brake: Brake) -> None:
    brake.pause_s = 0.1
    _, body = parsed(half_closed(live, request("/generate/stream", BODY)))
    assert [kind for kind, _ in events_of(body)] == ["message"] * 4 + ["done"]


def test_all_requests_before_the_end_are_answered(live: Live) -> None:
    data = rest_of(half_closed(live, request("/generate", BODY) * 3))
    assert data.count(b"HTTP/1.1 200 OK") == data.count(b'"text":"aaaa"') == 3


def test_half_a_request_and_its_end_ask_for_nothing(live: Live) -> None:
    assert rest_of(half_closed(live, request("/generate", BODY)[:-3])) == b""
    assert rest_of(half_closed(live, b"")) == b""
    until(lambda: len(live.server.active_channels) == 0)


@pytest.mark.parametrize("version", ["1.0", "1.1"])
@pytest.mark.parametrize("path", ["/generate", "/generate/stream"])
def test_who_has_sent_all_and_leaves_later_frees_the_row(
    live: Live, brake: Brake, path: str, version: str
) -> None:
    brake.pause_s = 0.02
    sent = request(path, {**BODY, "max_new_tokens": 4000}, version=version)
    connection = half_closed(live, sent)
    until(lambda: live.doing() == (1, 0))
    steps = live.engine.status().steps
    until(lambda: live.engine.status().steps > steps + 20)  # probes have been sent and heard
    assert live.doing() == (1, 0)
    connection.close()
    until(lambda: live.doing() == (0, 0))


def test_a_stream_that_waits_for_a_row_tells_who_has_left(live: Live, brake: Brake) -> None:
    brake.pause_s = 0.02
    long = {**BODY, "max_new_tokens": 4000}
    busy = [live.connect(request("/generate", long)) for _ in range(2)]
    until(lambda: live.doing() == (2, 0))
    waiting = half_closed(live, request("/generate/stream", long))
    until(lambda: live.doing() == (2, 1))
    waiting.close()
    until(lambda: live.doing() == (2, 0))
    for connection in busy:
        connection.close()


def only_of(live: Live) -> Any:
    """Return the one open connection, once those of other tests are closed."""
    found = [*live.server.active_channels.values()]
    return found[0] if len(found) == 1 else None


REFUSED = [
    (b"nonsense\r\n\r\n", 400, "bad_request"),
    (b"GET /health HTTP/1.1\r\nHost localhost\r\n", 400, "bad_request"),
    (b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: -4\r\n", 400, "bad_request"),
    (b"GET /health HTTP/1.1\r\nX: " + b"a" * 40_000 + b"\r\n", 431, "head_too_large"),
    (b"POST /generate HTTP/1.1\r\nTransfer-Encoding: gzip\r\n", 501, "not_implemented"),
    (b"POST /generate HTTP/1.1\r\nContent-Length: 600000000\r\n", 413, "body_too_large"),
]


@pytest.mark.parametrize(("head", "status", "code"), REFUSED)
def test_what_the_server_itself_refuses_is_told_as_all_else_is(
    live: Live, head: bytes, status: int, code: str
) -> None:
    head = head.removesuffix(b"\r\n") if head.startswith(b"nonsense") else head
    with live.connect(head + f"Origin: {ORIGIN}\r\n\r\n".encode()) as connection:
        response = http.client.HTTPResponse(connection)
        response.begin()
        body = json.loads(response.read())
    assert (response.status, body["error"]["code"]) == (status, code)
    assert [*body["error"]] == ["message", "type", "param", "code"]
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    if status not in (400, 431):  # a head that is none has no headers to go by
        assert response.headers["access-control-allow-origin"] == ORIGIN


@pytest.mark.parametrize("size", [6_000_000, 40_000_000])
def test_a_client_that_sends_too_much_can_send_it_all_and_read_why(live: Live, size: int) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", live.port, timeout=60)
    connection.request("POST", "/generate", b"x" * size, {"Content-Type": "application/json"})
    response = connection.getresponse()
    error = json.loads(response.read())["error"]
    assert (response.status, error["code"]) == (413, "body_too_large")
    assert str(live.config.server.max_body_bytes) in error["message"]
    connection.close()


def test_who_never_ends_what_was_refused_is_cut(live: Live) -> None:
    with live.connect(b"POST / HTTP/1.1\r\nContent-Length: 600000000\r\n\r\n") as connection:
        assert b" 413 " in rest_of(connection)
        channel = until(lambda: only_of(live))
        live.server.maintenance(time.time() + labs_wire.SENDING_S - 1)
        assert not channel.will_close
        live.server.maintenance(time.time() + labs_wire.SENDING_S + 1)
        assert channel.will_close


def test_an_idle_connection_is_kept_as_long_as_is_set(live: Live) -> None:
    with live.connect(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n") as connection:
        assert connection.recv(65_536)
        channel = until(lambda: only_of(live))
        until(lambda: not channel.requests)
        live.server.maintenance(time.time() + 35)
        assert not channel.will_close
        live.server.maintenance(time.time() + 45)
        assert channel.will_close


def test_idle_connections_outlive_those_of_the_usual_proxies() -> None:
    assert labs.Server().connection_idle_s > 60
