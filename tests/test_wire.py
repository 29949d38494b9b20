# SPDX-License-Identifier: Apache-2.0
"""Connections under waitress: half-closed, closed, idle, slow, and with invalid requests."""

from __future__ import annotations

import http.client
import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import kit
import pytest
from kit import A, Live, configured, events_of, request, until

import labs
import labs_engine
import labs_wire

ORIGIN = "https://app.example"
BODY = {"prompt": "hi", "max_new_tokens": 4, **A}
LONG = {**BODY, "max_new_tokens": 4000}


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
def test_a_half_closed_client_gets_every_response(live, brake, version):
    for path, expected in (("/health", 200), ("/v1/models", 200), ("/nothing", 404)):
        sent = f"GET {path} HTTP/{version}\r\nHost: localhost\r\n\r\n".encode()
        status, body = parsed(half_closed(live, sent))
        assert (status, bool(json.loads(body))) == (expected, True)
    brake.pause_s = labs_wire.PROBE_S  # slow enough for early bytes of the status line
    data = rest_of(half_closed(live, request("/generate", BODY, version=version)))
    head, _, body = data.partition(b"\r\n\r\n")
    assert head.startswith(f"HTTP/{version} 200 OK\r\n".encode())
    assert data.count(b"HTTP/") == 1
    assert json.loads(body)["text"] == "aaaa"


def test_a_half_closed_client_gets_a_stream_to_its_end(live, brake):
    brake.pause_s = 0.1
    _, body = parsed(half_closed(live, request("/generate/stream", BODY)))
    assert [kind for kind, _ in events_of(body)] == ["message"] * 4 + ["done"]


def test_only_whole_requests_before_the_end_are_answered(live):
    data = rest_of(half_closed(live, request("/generate", BODY) * 3))
    assert data.count(b"HTTP/1.1 200 OK") == data.count(b'"text":"aaaa"') == 3
    for sent in (request("/generate", BODY)[:-3], b""):
        assert rest_of(half_closed(live, sent)) == b""
    until(lambda: len(live.server.active_channels) == 0)


@pytest.mark.parametrize(
    ("path", "version"),
    [("/generate", "1.0"), ("/generate", "1.1"), ("/generate/stream", "1.1")],
)
def test_a_half_closed_client_that_leaves_later_frees_its_row(live, brake, path, version):
    brake.pause_s = 0.02
    connection = half_closed(live, request(path, LONG, version=version))
    until(lambda: live.doing() == (1, 0))
    steps = live.engine.status().steps
    until(lambda: live.engine.status().steps > steps + 20)  # early bytes have been sent
    assert live.doing() == (1, 0)
    connection.close()
    until(lambda: live.doing() == (0, 0))


def test_a_half_closed_stream_that_waits_for_a_row_frees_its_place(live, brake):
    brake.pause_s = 0.02
    busy = [live.connect(request("/generate", LONG)) for _ in range(2)]
    until(lambda: live.doing() == (2, 0))
    waiting = half_closed(live, request("/generate/stream", LONG))
    until(lambda: live.doing() == (2, 1))
    waiting.close()
    until(lambda: live.doing() == (2, 0))
    for connection in busy:
        connection.close()


GENERATE = b"POST /generate HTTP/1.1\r\n"
REFUSED = [
    (b"nonsense\r\n", 400, "bad_request"),
    (b"GET /health HTTP/1.1\r\nHost localhost\r\n", 400, "bad_request"),
    (GENERATE + b"Host: localhost\r\nContent-Length: -4\r\n", 400, "bad_request"),
    (b"GET /health HTTP/1.1\r\nX: " + b"a" * 40_000 + b"\r\n", 431, "head_too_large"),
    (GENERATE + b"Transfer-Encoding: gzip\r\n", 501, "not_implemented"),
    (GENERATE + b"Content-Length: 600000000\r\n", 413, "body_too_large"),
]


@pytest.mark.parametrize(("head", "status", "code"), REFUSED)
def test_an_invalid_request_gets_the_apps_error_format(live, head, status, code):
    with live.connect(head + f"Origin: {ORIGIN}\r\n\r\n".encode()) as connection:
        response = http.client.HTTPResponse(connection)
        response.begin()
        error = json.loads(response.read())["error"]
    assert (response.status, error["code"]) == (status, code)
    assert [*error] == ["message", "type", "param", "code"]
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    assert "server" not in response.headers
    if status not in (400, 431):  # these heads have no readable headers
        assert response.headers["access-control-allow-origin"] == ORIGIN


def test_a_client_that_sends_too_much_can_send_it_all_and_read_the_error(live):
    connection = http.client.HTTPConnection("127.0.0.1", live.port, timeout=60)
    connection.request("POST", "/generate", b"x" * 40_000_000, kit.JSON)
    response = connection.getresponse()
    error = json.loads(response.read())["error"]
    assert (response.status, error["code"]) == (413, "body_too_large")
    assert str(live.config.server.max_body_bytes) in error["message"]
    connection.close()


def lasts(live: Live, seconds: float, more: float) -> bool:
    """Return whether the one open connection is kept for `seconds` and cut after `more`."""
    channels = live.server.active_channels
    until(lambda: [bool(each.requests) for each in [*channels.values()]] == [False])
    (channel,) = channels.values()
    live.server.maintenance(time.time() + seconds)
    kept = not channel.will_close
    live.server.maintenance(time.time() + more)
    return kept and channel.will_close


def test_a_refused_body_that_never_ends_is_cut(live):
    with live.connect(b"POST / HTTP/1.1\r\nContent-Length: 600000000\r\n\r\n") as connection:
        assert b" 413 " in rest_of(connection)
        assert lasts(live, labs_wire.SENDING_S - 1, labs_wire.SENDING_S + 1)


def test_an_idle_connection_is_kept_as_long_as_its_setting_says(live):
    assert labs.Server().connection_idle_s > 60  # longer than the usual proxies keep theirs
    with live.connect(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n") as connection:
        assert connection.recv(65_536)
        assert lasts(live, 35, 45)
