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
def test_a_half_closed_client_gets_every_response(live: Live, brake: Brake, version: str) -> None:
    for path in ("/health", "/v1/models", "/nothing"):
        sent = f"GET {path} HTTP/{version}\r\nHost: localhost\r\n\r\n".encode()
        status, body = parsed(half_closed(live, sent))
        assert status == (404 if path == "/nothing" else 200)
        assert json.loads(body)
    brake.pause_s = labs_wire.PROBE_S  # slow enough for early bytes of the status line
    data = rest_of(half_closed(live, request("/generate", BODY, version=version)))
    head, _, body = data.partition(b"\r\n\r\n")
    assert head.startswith(f"HTTP/{version} 200 OK\r\n".encode())
    assert data.count(b"HTTP/") == 1
    assert json.loads(body)["text"] == "aaaa"


def test_a_half_closed_client_gets_a_stream_to_its_end(live: Live, brake: Brake) -> None:
    brake.pause_s = 0.1
    _, body = parsed(half_closed(live, request("/generate/stream", BODY)))
    assert [kind for kind, _ in events_of(body)] == ["message"] * 4 + ["done"]


def test_only_whole_requests_before_the_end_are_answered(live: Live) -> None:
    data = rest_of(half_closed(live, request("/generate", BODY) * 3))
    assert data.count(b"HTTP/1.1 200 OK") == data.count(b'"text":"aaaa"') == 3
    for sent in (request("/generate", BODY)[:-3], b""):
        assert rest_of(half_closed(live, sent)) == b""
    until(lambda: len(live.server.active_channels) == 0)


@pytest.mark.parametrize(
    ("path", "version"),
    [("/generate", "1.0"), ("/generate", "1.1"), ("/generate/stream", "1.1")],
)
def test_a_half_closed_client_that_leaves_later_frees_its_row(
    live: Live, brake: Brake, path: str, version: str
) -> None:
    brake.pause_s = 0.02
    sent = request(path, {**BODY, "max_new_tokens": 4000}, version=version)
    connection = half_closed(live, sent)
    until(lambda: live.doing() == (1, 0))
    steps = live.engine.status().steps
    until(lambda: live.engine.status().steps > steps + 20)  # early bytes have been sent
    assert live.doing() == (1, 0)
    connection.close()
    until(lambda: live.doing() == (0, 0))


def test_a_half_closed_stream_that_waits_for_a_row_frees_its_place(
    live: Live, brake: Brake
) -> None:
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
def test_an_invalid_request_gets_the_apps_error_format(
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
    if status not in (400, 431):  # these heads have no readable headers
        assert response.headers["access-control-allow-origin"] == ORIGIN


def test_a_client_that_sends_too_much_can_send_it_all_and_read_the_error(live: Live) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", live.port, timeout=60)
    connection.request("POST", "/generate", b"x" * 40_000_000, kit.JSON)
    response = connection.getresponse()
    error = json.loads(response.read())["error"]
    assert (response.status, error["code"]) == (413, "body_too_large")
    assert str(live.config.server.max_body_bytes) in error["message"]
    connection.close()


def test_a_refused_body_that_never_ends_is_cut(live: Live) -> None:
    with live.connect(b"POST / HTTP/1.1\r\nContent-Length: 600000000\r\n\r\n") as connection:
        assert b" 413 " in rest_of(connection)
        channel = until(lambda: only_of(live))
        live.server.maintenance(time.time() + labs_wire.SENDING_S - 1)
        assert not channel.will_close
        live.server.maintenance(time.time() + labs_wire.SENDING_S + 1)
        assert channel.will_close


def test_an_idle_connection_is_kept_as_long_as_its_setting_says(live: Live) -> None:
    assert labs.Server().connection_idle_s > 60  # longer than the usual proxies keep theirs
    with live.connect(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n") as connection:
        assert connection.recv(65_536)
        channel = until(lambda: only_of(live))
        until(lambda: not channel.requests)
        live.server.maintenance(time.time() + 35)
        assert not channel.will_close
        live.server.maintenance(time.time() + 45)
        assert channel.will_close
