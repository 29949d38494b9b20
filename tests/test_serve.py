# SPDX-License-Identifier: Apache-2.0
"""Tests of labs_serve.py and of labs-api as a program."""

from __future__ import annotations

import contextlib
import fcntl
import json
import re
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import kit
import pytest
from kit import API, WAIT_S, A, end_of, events_of, program, serving, until

import labs_serve


@pytest.fixture(scope="module")
def long_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a tiny model whose context lets an answer take minutes."""
    config = kit.llama()
    config.max_position_embeddings = 200_000
    return kit.save_model(tmp_path_factory.mktemp("long") / "model", config)


def read_stream(
    url: str, process: Any, tokens: int, signals: int = 1, number: int = signal.SIGTERM
) -> bytes:
    """Ask for a stream, signal the server once its text comes, and read what there is."""
    body = {"prompt": "hi", "max_new_tokens": tokens, **A}
    found = b""
    with (
        contextlib.suppress(httpx.RemoteProtocolError, httpx.ReadError),
        httpx.stream("POST", f"{url}/generate/stream", json=body, timeout=WAIT_S) as response,
    ):
        for data in response.iter_raw():
            if signals and b"data: a" in data:
                process.send_signal(number)
                signals -= 1
                until(lambda: not accepts(url))
            found += data
    return found


def accepts(url: str) -> bool:
    address = httpx.URL(url)
    try:
        socket.create_connection((address.host, address.port or 0), timeout=WAIT_S).close()
    except OSError:
        return False
    return True


@pytest.fixture(scope="module")
def programs(long_folder: Path) -> Iterator[dict[str, Any]]:
    """Start programs by their drain_s, all at once: most of the time is imports."""
    with contextlib.ExitStack() as stack:
        hangup = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup would be inherited
        stack.callback(signal.signal, signal.SIGHUP, hangup)
        started = {
            drain_s: program(MODEL=str(long_folder), SERVER_DRAIN_S=drain_s)
            for drain_s in ("30", "0.2", "600", "601", "31")
        }
        yield {drain_s: stack.enter_context(each) for drain_s, each in started.items()}


def test_sigterm_lets_a_stream_end(programs: dict[str, Any]) -> None:
    url = serving(process := programs["30"])
    assert httpx.get(f"{url}/readyz").json() == {"status": "ok"}
    events = events_of(read_stream(url, process, tokens=600))
    assert (len(events), events[-1][0]) == (601, "done")
    code, said = end_of(process)
    assert code == 0
    assert json.loads(said.splitlines()[-1])["completion_tokens"] == 600


def test_the_deadline_ends_a_stream(programs: dict[str, Any]) -> None:
    url = serving(process := programs["0.2"])
    kind, data = events_of(read_stream(url, process, tokens=150_000))[-1]
    assert (kind, json.loads(data)["finish_reason"]) == ("done", "cancelled")
    code, said = end_of(process)
    assert code == 0, said


def test_a_second_sigterm_ends_without_waiting(programs: dict[str, Any]) -> None:
    url = serving(process := programs["600"])
    assert read_stream(url, process, tokens=150_000, signals=2).count(b"data: a") < 150_000
    code, said = end_of(process)
    assert code == 0, said
    assert "finish_reason" not in said  # nothing was waited for


def test_a_second_ctrl_c_ends_without_waiting(programs: dict[str, Any]) -> None:
    url = serving(process := programs["601"])
    assert b"done" not in read_stream(url, process, 150_000, signals=2, number=signal.SIGINT)
    code, said = end_of(process)
    assert (code, "finish_reason" in said) == (0, False), said


def test_a_terminal_that_is_closed_lets_a_stream_end(programs: dict[str, Any]) -> None:
    url = serving(process := programs["31"])
    events = events_of(read_stream(url, process, tokens=300, number=signal.SIGHUP))
    assert (len(events), events[-1][0]) == (301, "done")
    assert end_of(process)[0] == 0


def test_a_server_that_is_told_to_outlive_its_terminal_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    taken = dict[int, Any]()
    monkeypatch.setattr(signal, "getsignal", lambda _: signal.SIG_IGN)
    monkeypatch.setattr(signal, "signal", taken.__setitem__)
    labs_serve.on_signals(print)
    assert taken == {signal.SIGTERM: print, signal.SIGINT: print}


def test_sigterm_ends_a_server_whose_model_never_comes(tiny_folder: Path) -> None:
    slow = """if 1:
        import time, labs, labs_cli
        labs.load_model = lambda *_, **__: time.sleep(3600)
        labs_cli.main_api()
        """
    with program(MODEL=str(tiny_folder), code=["-c", slow]) as process:
        assert b"loading" in process.stderr.readline()
        process.send_signal(signal.SIGTERM)
        code, said = end_of(process)
    assert code == 0, said


def test_a_log_that_nobody_reads_holds_up_no_request(tiny_folder: Path) -> None:
    with program(MODEL=str(tiny_folder), SERVER_DRAIN_S="1") as process:
        fcntl.fcntl(process.stderr, fcntl.F_SETPIPE_SZ, 4096)
        with httpx.Client(base_url=serving(process), timeout=WAIT_S) as client:
            for number in range(80):  # of 120 bytes and more
                assert client.get(f"/nowhere/{number}").status_code == 404
            body = {"prompt": "hi", "max_new_tokens": 2, **A}
            assert client.post("/generate", json=body).status_code == 200
            assert "labs_log_lines_dropped_total 0.0" in client.get("/metrics").text
        process.send_signal(signal.SIGTERM)
        assert process.wait(WAIT_S) == 0


@pytest.mark.parametrize("where", ["<&- >&- 2>&-", "2>/dev/full", ">/dev/full 2>&-"])
def test_a_server_needs_no_standard_streams(tiny_folder: Path, where: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    shell = f'exec "{sys.executable}" -c "{API}" {where}'
    code = ["-c", f"import os; os.execvp('sh', ['sh', '-c', {shell!r}])"]
    with program(MODEL=str(tiny_folder), SERVER_PORT=port, code=code) as process:
        while process.poll() is None and not answers(f"http://127.0.0.1:{port}/readyz"):
            time.sleep(0.05)
        url = f"http://127.0.0.1:{port}/generate"
        body = {"prompt": "hi", "max_new_tokens": 2, **A}
        assert [httpx.post(url, json=body).status_code for _ in range(3)] == [200] * 3
        process.send_signal(signal.SIGTERM)
        assert process.wait(WAIT_S) == 0


def answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=WAIT_S).status_code == 200
    except httpx.TransportError:
        return False


def test_sigterm_ends_the_server_though_its_thread_is_slow(tiny_folder: Path) -> None:
    slow = """if 1:
        import time, labs_cli, labs_serve
        make = labs_serve.make_server
        def make_server(*arguments):
            server = make(*arguments)
            leave = server.del_channel
            server.del_channel = lambda: (leave(), time.sleep(2))
            return server
        labs_serve.make_server = make_server
        labs_cli.main_api()
        """
    with program(MODEL=str(tiny_folder), code=["-c", slow]) as process:
        url = serving(process)
        assert httpx.post(f"{url}/generate", json={"prompt": "hi", **A}).status_code == 200
        process.send_signal(signal.SIGTERM)
        code, _ = end_of(process)
    assert code == 0


def test_a_taken_port_is_told_in_one_sentence(tiny_folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        with program(MODEL=str(tiny_folder), SERVER_PORT=port) as process:
            code, said = end_of(process)
    assert (code, said) == (
        1, f"Error: cannot listen on 127.0.0.1:{port}: Address already in use\n"
    )  # fmt: skip


def test_a_model_that_cannot_be_loaded_is_told_in_one_sentence(tmp_path: Path) -> None:
    with program(MODEL=str(tmp_path)) as process:
        code, said = end_of(process)
    first, *errors = said.splitlines()
    assert code == 1
    assert first.startswith("labs-api: http://127.0.0.1:")
    assert len(errors) == 1
    assert errors[0].startswith(f"labs-api: cannot load {tmp_path}: ")


def test_other_machines_are_refused_without_a_key() -> None:
    with program("--host", "0.0.0.0") as process:
        code, said = end_of(process)
    assert code == 1
    assert re.fullmatch(r"Error: .*LABS_API_KEYS.*\n", said)


def test_help_tells_of_the_server_and_no_flag_takes_a_key() -> None:
    with program("--help") as process:
        code, said = end_of(process)
    assert code == 0
    assert "--port" in said
    flags = re.findall(r"--[a-z-]+", said)
    assert not [flag for flag in flags if "key" in flag and flag != "--api-keys-file"]


def test_a_host_with_several_addresses_is_listened_to_on_one(monkeypatch):
    both = [(2, 1, 6, "", ("127.0.0.1", 0)), (10, 1, 6, "", ("::1", 0, 0, 0))]
    monkeypatch.setattr(labs_serve.socket, "getaddrinfo", lambda *_, **__: both)
    assert labs_serve._address("localhost") == "127.0.0.1"
