# SPDX-License-Identifier: Apache-2.0
"""Run the WSGI app of labs-api under waitress: sockets, threads, signals, draining.

    labs_serve.serve(labs.load_config())                   # until SIGTERM or Ctrl-C
    labs_serve.make_server(app, config).run()              # any WSGI app, e.g. with labs mounted

Needs labs_api.py and its requirements, and labs_wire.py with waitress.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys
import threading
import time
import wsgiref.util
from collections.abc import Callable, Iterator
from typing import Any

import labs
import labs_api
import labs_gate
import labs_models
import labs_names
import labs_turns

HEAD_BYTES = 32_768
log = logging.getLogger("labs.serve")
LAST_WORDS_S = 1.0  # seconds that writing the last log lines may take


def threads_for(config: labs.Config) -> int:
    """Return how many threads the server needs; each open request occupies one."""
    return labs_turns.most_open(config) + labs_turns.most_beyond(config) + 8


def make_server(app: Any, config: labs.Config) -> Any:
    """Return a waitress server that listens already; `run` serves. Raises OSError for the port."""
    labs.require("waitress", "labs_wire")
    from waitress.server import create_server

    import labs_wire

    server = config.server
    waiting = create_server(
        app,
        host=_address(server.host),
        port=server.port,
        threads=threads_for(config),
        channel_request_lookahead=1,  # detects clients that hang up while their request runs
        asyncore_use_poll=True,  # select() fails above 1,024 descriptors
        connection_limit=server.max_connections,
        channel_timeout=server.connection_idle_s,
        cleanup_interval=5,
        max_request_body_size=server.max_body_bytes + 2**20,  # the app refuses first, in JSON
        max_request_header_size=HEAD_BYTES,
        outbuf_high_watermark=2**20,
        clear_untrusted_proxy_headers=True,
        ident=None,
    )
    waiting.adj.socket_options = _socket_options()
    waiting.channel_class = labs_wire.channel_class(_refuser(config))
    labs_wire.cut_slow_senders(waiting)
    return waiting


def _address(host: str) -> str:
    """Return one address of a host; with several, waitress would create several servers."""
    return str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])


def _socket_options() -> list[tuple[int, int, int]]:
    """Return options that detect vanished or stuck peers; waitress alone would wait forever."""
    wanted = (
        ("SOL_SOCKET", "SO_KEEPALIVE", 1),
        ("IPPROTO_TCP", "TCP_NODELAY", 1),
        ("IPPROTO_TCP", "TCP_KEEPIDLE", 15),
        ("IPPROTO_TCP", "TCP_KEEPINTVL", 5),
        ("IPPROTO_TCP", "TCP_KEEPCNT", 3),
        ("IPPROTO_TCP", "TCP_USER_TIMEOUT", 30_000),  # Linux only, in milliseconds
    )
    return [
        (getattr(socket, level), getattr(socket, name), value)
        for level, name, value in wanted
        if hasattr(socket, name)
    ]


def _refuser(config: labs.Config) -> Callable[[Any], Any]:
    """Return a function that answers the requests refused by waitress as the app would."""
    app = labs_api.refusing_app(config)

    def refuse(request: Any) -> tuple[str, list[tuple[str, str]], bytes]:
        status, reason = request.error.code, request.error.body
        code, text = {
            400: ("bad_request", f"the request is not valid HTTP/1.1: {reason}"),
            413: ("body_too_large", f"the body has more than {config.server.max_body_bytes} bytes"),
            431: ("head_too_large", f"the headers have more than {HEAD_BYTES} bytes"),
            501: ("not_implemented", reason),
        }.get(status, ("failed", "Internal server error; see the server's log."))
        environ: dict[str, Any] = {"labs.problem": labs_gate.Problem(status, text, code)}
        environ |= {"HTTP_ORIGIN": request.headers["ORIGIN"]} if "ORIGIN" in request.headers else {}
        environ |= {"REQUEST_METHOD": "POST", "PATH_INFO": getattr(request, "path", "/")}
        wsgiref.util.setup_testing_defaults(environ)
        begun: list[Any] = []
        start: Any = lambda *head: begun.extend(head)  # noqa: E731
        body = b"".join(app(environ, start))
        return begun[0], begun[1], body

    return refuse


def drain(server: Any, models: labs_models.Models, deadline_s: float) -> None:
    """Close the listening socket, let responses end until the deadline, then end `run`."""

    def stop_accepting() -> None:
        server.accepting = False
        server.del_channel()
        server.socket.close()

    try:
        server.trigger.pull_trigger(stop_accepting)
        models.close(deadline_s)
        end, channels = time.monotonic() + 2, server.active_channels
        while time.monotonic() < end and any(
            channel.requests or channel.total_outbufs_len for channel in [*channels.values()]
        ):
            time.sleep(0.02)
    finally:
        # waitress's loop ends without channels; an exception raised in a thunk it would swallow.
        server.trigger.pull_trigger(server._map.clear)


@contextlib.contextmanager
def unhurried_log() -> Iterator[None]:
    """Write standard error from a thread, so that a slow reader of the log delays no request."""
    before, descriptor = sys.stderr, None
    with contextlib.suppress(AttributeError, OSError, ValueError):  # closed, or not a file
        descriptor = before.fileno()
    sys.stderr = log = labs_gate.Unhurried(descriptor)
    logging.basicConfig(format="%(message)s", stream=log, level=logging.INFO)
    try:
        yield
    finally:
        log.wait(LAST_WORDS_S)
        sys.stderr = before


def serve(config: labs.Config) -> None:
    """Serve until SIGTERM or Ctrl-C, then wait up to server.drain_s seconds for open requests.

    A second signal ends the process at once. Raises LabsError when the port is taken.
    """
    labs_gate.check_exposure(config)
    with unhurried_log():
        logging.getLogger("waitress").setLevel(logging.ERROR)
        models = labs_models.Models(config, start=False)
        app = labs_api.create_app(config, models)
        try:
            server = make_server(app, config)
        except OSError as error:
            raise labs_gate.cannot_listen(config.server, error) from error
        try:
            _run(server, models, config)
        finally:
            models.close()  # no thread may run torch while the interpreter shuts down
    if models.failed:  # the reason is in the log
        sys.exit(1)


def _run(server: Any, models: labs_models.Models, config: labs.Config) -> None:
    arguments = (server, models, config.server.drain_s)
    stopping = threading.Thread(target=drain, args=arguments, daemon=True)

    def stop(*_: Any) -> None:
        if stopping.ident:  # the second signal
            end_at_once()
        stopping.start()

    def announce() -> None:
        if not _announce(models) and not stopping.ident:
            stopping.start()

    on_signals(stop)
    tell_start(labs_gate.url_of(server.effective_host, server.effective_port), config)
    models.start()
    threading.Thread(target=announce, daemon=True).start()
    server.run()


def tell_start(url: str, config: labs.Config) -> None:
    log.info("labs-api: %s (loading %s)", url, labs_names.named(config).model_id)


def on_signals(stop: Callable[..., Any]) -> None:
    """Call `stop` on SIGTERM, SIGINT and SIGHUP; under `nohup` SIGHUP stays ignored."""
    for name in ("SIGTERM", "SIGINT", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows lacks some
        if number is not None and (
            name != "SIGHUP" or signal.getsignal(number) is not signal.SIG_IGN
        ):
            signal.signal(number, stop)


def interrupt_on_signals() -> None:
    """Raise KeyboardInterrupt at the first signal and end the process at the second."""

    def stop(*_: Any) -> None:
        on_signals(lambda *_: end_at_once())
        raise KeyboardInterrupt

    on_signals(stop)


@contextlib.contextmanager
def sigterm_withheld() -> Iterator[None]:
    """Block SIGTERM in this thread and in the processes that it starts meanwhile."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_unless_served(address: str) -> None:
    """End the process at once if nothing accepts connections at HOST:PORT any more."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except OSError:
        end_at_once()


def end_at_once() -> None:
    """End the process without waiting for its threads."""
    if isinstance(sys.stderr, labs_gate.Unhurried):
        sys.stderr.wait(LAST_WORDS_S / 5)
    os._exit(0)


def _announce(models: labs_models.Models) -> bool:
    """Log when the default model is loaded; return False if it could not be loaded."""
    try:
        engine = models.wait()
    except labs.LabsError:
        return not models.failed  # True: the server is shutting down
    model = engine.model
    where = f"{model.device}, {model.dtype}, {engine.max_rows} rows"
    log.info("labs-api: ready after %.1f s (%s)", model.load_s, where)
    return True
