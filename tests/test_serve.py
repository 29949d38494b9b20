# SPDX-License-Identifier: Apache-2.0
"""labs-api under waitress: signals and standard streams as a program, the rest in this process."""

from __future__ import annotations

import contextlib
import fcntl
import json
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import kit
import pytest
from click.testing import CliRunner
from kit import API, WAIT_S, A, end_of, events_of, program, serving, until

import labs
import labs_cli
import labs_serve

BODY = {"prompt": "hi", "max_new_tokens": 2, **A}


@pytest.fixture(scope="module")
def long_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a tiny model whose context lets an answer take minutes."""
    config = kit.llama()
    config.max_position_embeddings = 200_000
    return kit.save_model(tmp_path_factory.mktemp("long") / "model", config)


def read_stream(url: str, tokens: int, stops: list[Callable[[], Any]]) -> bytes:
    """Ask for a stream, call `stops` one by one once its text comes, and read to its end."""
    body, found = BODY | {"max_new_tokens": tokens}, b""
    with (
        contextlib.suppress(httpx.RemoteProtocolError, httpx.ReadError),
        httpx.stream("POST", f"{url}/generate/stream", json=body, timeout=WAIT_S) as response,
    ):
        for data in response.iter_raw():
            if stops and b"data: a" in data:
                stops.pop(0)()
                until(lambda: not accepts(url))
            found += data
    return found


def accepts(url: str) -> bool:
    with contextlib.suppress(OSError):
        address = httpx.URL(url)
        socket.create_connection((address.host, address.port or 0), timeout=WAIT_S).close()
        return True
    return False


def is_ready(url: str) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(f"{url}/readyz", timeout=WAIT_S).status_code == 200
    return False


# ---------------------------------------------------------------- as a program


def test_sigterm_lets_a_stream_end_and_a_full_log_delays_no_request(long_folder):
    with program(MODEL=str(long_folder), SERVER_DRAIN_S="30") as process:
        fcntl.fcntl(process.stderr, fcntl.F_SETPIPE_SZ, 4096)
        url = serving(process)
        with httpx.Client(base_url=url, timeout=WAIT_S) as client:
            assert client.get("/readyz").json() == {"status": "ok"}
            for number in range(80):  # lines of 120 bytes and more
                assert client.get(f"/nowhere/{number}").status_code == 404
            assert client.post("/generate", json=BODY).status_code == 200
            assert "labs_log_lines_dropped_total 0.0" in client.get("/metrics").text
        events = events_of(read_stream(url, 600, [process.terminate]))
        assert (len(events), events[-1][0]) == (601, "done")
        code, output = end_of(process)
    assert code == 0
    assert json.loads(output.splitlines()[-1])["completion_tokens"] == 600


def test_a_second_signal_ends_the_program_at_once(long_folder):
    with program(MODEL=str(long_folder), SERVER_DRAIN_S="600") as process:
        stops = [process.terminate, lambda: process.send_signal(signal.SIGINT)]
        assert b"done" not in read_stream(serving(process), 150_000, stops)
        code, output = end_of(process)
    assert (code, "finish_reason" in output) == (0, False), output


def test_a_server_needs_no_standard_streams(tiny_folder):
    with contextlib.ExitStack() as stack:
        started = []
        for streams in ("<&- >&- 2>&-", ">/dev/full 2>/dev/full"):
            with socket.create_server(("127.0.0.1", 0)) as free:
                port = str(free.getsockname()[1])
            shell = f'exec "{sys.executable}" -c "{API}" {streams}'
            code = ["-c", f"import os; os.execvp('sh', ['sh', '-c', {shell!r}])"]
            process = program(MODEL=str(tiny_folder), SERVER_PORT=port, code=code)
            started.append((stack.enter_context(process), f"http://127.0.0.1:{port}"))
        for process, url in started:
            while process.poll() is None and not is_ready(url):  # minutes on a busy machine
                time.sleep(0.05)
            assert [httpx.post(f"{url}/generate", json=BODY).status_code for _ in "aa"] == [200] * 2
            process.send_signal(signal.SIGTERM)
            assert process.wait(WAIT_S) == 0


# ---------------------------------------------------------------- in this process


class Served:
    """labs_serve.serve in a thread. stop: what a signal would call."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, caplog: Any, **settings: Any) -> None:
        caplog.set_level("INFO")
        stops: list[Any] = []
        monkeypatch.setattr(labs_serve, "on_signals", stops.append)
        config = labs.load_config(env={}, overrides={"server_port": 0, **settings})
        self.code: Any = None
        self.thread = threading.Thread(target=self._serve, args=(config,), daemon=True)
        self.thread.start()
        self.messages = lambda: [record.getMessage() for record in caplog.records]
        self.stop = until(lambda: stops)[0]
        found = until(lambda: [line for line in self.messages() if "http://" in line])
        self.url = re.search("http://[^ ]+", found[0])[0]  # type: ignore[index]

    def _serve(self, config: labs.Config) -> None:
        self.code = 0
        try:
            labs_serve.serve(config)
        except SystemExit as error:
            self.code = error.code

    def end(self) -> Any:
        self.thread.join(WAIT_S)
        assert not self.thread.is_alive()
        return self.code


Start = Callable[..., Served]


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Start:
    return lambda **settings: Served(monkeypatch, caplog, **settings)


def test_the_deadline_ends_a_stream(serve, long_folder):
    served = serve(model_name=str(long_folder), server_drain_s=0.2)
    until(lambda: any("ready after" in line for line in served.messages()))
    kind, data = events_of(read_stream(served.url, 150_000, [served.stop]))[-1]
    assert (kind, json.loads(data)["finish_reason"]) == ("done", "cancelled")
    assert served.end() == 0


def test_a_server_whose_model_is_still_loading_ends(serve, tiny_folder, monkeypatch):
    loading, go = threading.Event(), threading.Event()
    monkeypatch.setattr(labs, "load_model", lambda *_, **__: (loading.set(), go.wait(WAIT_S)))
    served = serve(model_name=str(tiny_folder))
    assert loading.wait(WAIT_S)
    served.stop()
    assert served.end() == 0
    go.set()


def test_a_server_ends_though_its_thread_is_slow(serve, tiny_folder, monkeypatch):
    make = labs_serve.make_server

    def make_server(*arguments: Any) -> Any:
        server = make(*arguments)
        leave = server.del_channel
        server.del_channel = lambda: (leave(), time.sleep(0.5))
        return server

    monkeypatch.setattr(labs_serve, "make_server", make_server)
    served = serve(model_name=str(tiny_folder))
    until(lambda: is_ready(served.url))
    assert httpx.post(f"{served.url}/generate", json=BODY).status_code == 200
    served.stop()
    assert served.end() == 0


def test_a_model_that_cannot_be_loaded_ends_the_server_with_one_sentence(serve, tmp_path):
    served = serve(model_name=str(tmp_path))
    assert served.end() == 1
    errors = [line for line in served.messages() if "http://" not in line]
    assert len(errors) == 1
    assert errors[0].startswith(f"labs-api: cannot load {tmp_path}: ")


def test_signals_stop_the_server_but_nohup_outlives_its_terminal(monkeypatch):
    stops = {signal.SIGTERM, signal.SIGINT}
    for before, numbers in ((signal.SIG_DFL, stops | {signal.SIGHUP}), (signal.SIG_IGN, stops)):
        handlers = dict[int, Any]()
        monkeypatch.setattr(signal, "getsignal", lambda _, before=before: before)
        monkeypatch.setattr(signal, "signal", handlers.__setitem__)
        labs_serve.on_signals(print)
        assert handlers == dict.fromkeys(numbers, print)


def command(*arguments: str, **settings: str) -> Any:
    """Run labs-api in this process; it must not get as far as serving."""
    api = labs_cli.make_api()
    environment = {f"LABS_{name}": value for name, value in settings.items()}
    return CliRunner(env=environment).invoke(api, arguments)


def test_a_taken_port_open_hosts_and_wrong_tables_are_refused_in_one_sentence(folder, tiny_folder):
    kit.write("wrong.toml", '[models.small]\nmodel_name = "a"\ntop_q = 1\n')
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for flags, words in (
            (
                ("--port", port, "--model", tiny_folder),
                f"cannot listen on .*:{port}: A.* in use",
            ),
            (("--host", "0.0.0.0"), r".*LABS_API_KEYS.*"),
            (("--config", folder / "wrong.toml"), r".*\[models\.small\].*top_q.*"),
        ):
            found = command(*map(str, flags))
            assert found.exit_code == 1
            assert re.fullmatch(f"Error: {words}\n(labs-gen .*\n)?", found.stderr)


def test_the_help_shows_the_server_and_no_flag_takes_a_key():
    found = command("--help")
    assert found.exit_code == 0
    assert "--port" in found.output
    flags = re.findall(r"--[a-z-]+", found.output)
    assert not [flag for flag in flags if "key" in flag and flag != "--api-keys-file"]


def test_a_host_with_several_addresses_is_listened_to_on_one(monkeypatch):
    both = [(2, 1, 6, "", ("127.0.0.1", 0)), (10, 1, 6, "", ("::1", 0, 0, 0))]
    monkeypatch.setattr(labs_serve.socket, "getaddrinfo", lambda *_, **__: both)
    assert labs_serve._address("localhost") == "127.0.0.1"
