# SPDX-License-Identifier: Apache-2.0
"""labs-api without its flags: the app under waitress; sockets, threads, signals, draining.

    labs_serve.serve(labs.load_config())                   # until SIGTERM or Ctrl-C
    labs_serve.make_server(app, config).run()              # any WSGI app, labs' own mounted in it

Needs labs_api.py with what that needs, and labs_wire.py with waitress.
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
import labs_turns

HEAD_BYTES = 32_768
log = logging.getLogger("labs.serve")
LAST_WORDS_S = 1.0  # what is told at the end may take so long to be written


def threads_for(config: labs.Config) -> int:
    """Return how many threads are enough, as each open request holds one."""
    return labs_turns.most_open(config) + labs_turns.most_beyond(config) + 8


def make_server(app: Any, config: labs.Config) -> Any:
    """Return waitress, listening."""
    labs.require("waitress", "labs_wire")
    from waitress.server import create_server

    import labs_wire

    server = config.server
    waiting = create_server(
        app,
        host=_address(server.host),
        port=server.port,
        threads=threads_for(config),
        channel_request_lookahead=1,  # sees who hangs up while its request runs
        asyncore_use_poll=True,  # select() dies at 1,024 descriptors
        connection_limit=server.max_connections,
        channel_timeout=server.connection_idle_s,
        cleanup_interval=5,
        max_request_body_size=server.max_body_bytes + 2**20,  # above ours, which answers in JSON
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
    """Return one address of a host: given several, waitress would make several servers."""
    return str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])


def _socket_options() -> list[tuple[int, int, int]]:
    """Notice peers that vanished or do not read; waitress would wait for them for ever."""
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
    """Return what answers the requests that waitress refuses, in the words of the app."""
    app = labs_api.refusing_app(config)

    def refuse(request: Any) -> tuple[str, list[tuple[str, str]], bytes]:
        status, text = request.error.code, request.error.body
        code, told = {
            400: ("bad_request", f"this is no request of HTTP/1.1: {text}"),
            413: ("body_too_large", f"the body has more than {config.server.max_body_bytes} bytes"),
            431: ("head_too_large", f"the headers have more than {HEAD_BYTES} bytes"),
            501: ("not_implemented", text),
        }.get(status, ("failed", "The server failed at this request; its log tells more."))
        environ: dict[str, Any] = {"labs.problem": labs_gate.Problem(status, told, code)}
        environ |= {"HTTP_ORIGIN": request.headers["ORIGIN"]} if "ORIGIN" in request.headers else {}
        environ |= {"REQUEST_METHOD": "POST", "PATH_INFO": getattr(request, "path", "/")}
        wsgiref.util.setup_testing_defaults(environ)
        begun: list[Any] = []
        start: Any = lambda *head: begun.extend(head)  # noqa: E731
        body = b"".join(app(environ, start))
        return begun[0], begun[1], body

    return refuse


def drain(server: Any, models: labs_models.Models, deadline_s: float) -> None:
    """Take no more connections, let answers end until the deadline, then let `run` return."""

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
        # Without channels waitress's loop ends; it would swallow an exception raised in a thunk.
        server.trigger.pull_trigger(server._map.clear)


@contextlib.contextmanager
def unhurried_log() -> Iterator[None]:
    """Let a thread write to standard error: no request waits for who reads it, or does not."""
    before, descriptor = sys.stderr, None
    with contextlib.suppress(AttributeError, OSError, ValueError):  # it may be closed, or a test's
        descriptor = before.fileno()
    sys.stderr = log = labs_gate.Unhurried(descriptor)
    logging.basicConfig(format="%(message)s", stream=log, level=logging.INFO)
    try:
        yield
    finally:
        log.wait(LAST_WORDS_S)
        sys.stderr = before


def serve(config: labs.Config) -> None:
    """Serve until SIGTERM or Ctrl-C; answers under way may end until server.drain_s is over.

    A second signal ends the process at once.
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
            models.close()  # no thread may be in torch while the interpreter ends
    if models.failed:  # the log has told why
        sys.exit(1)


def _run(server: Any, models: labs_models.Models, config: labs.Config) -> None:
    arguments = (server, models, config.server.drain_s)
    stopping = threading.Thread(target=drain, args=arguments, daemon=True)

    def stop(*_: Any) -> None:
        if stopping.ident:  # somebody does not want to wait
            end_at_once()
        stopping.start()

    def announce() -> None:
        if not _announce(models) and not stopping.ident:
            stopping.start()

    on_signals(stop)
    url = labs_gate.url_of(server.effective_host, server.effective_port)
    log.info("labs-api: %s (loading %s)", url, config.model_id)
    models.start()
    threading.Thread(target=announce, daemon=True).start()
    server.run()


def on_signals(stop: Callable[..., Any]) -> None:
    """Call `stop` where the process is asked to end; `nohup` lets it outlive its terminal."""
    for name in ("SIGTERM", "SIGINT", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows lacks some
        if number is not None and (
            name != "SIGHUP" or signal.getsignal(number) is not signal.SIG_IGN
        ):
            signal.signal(number, stop)


def interrupt_on_signals() -> None:
    """Let the first signal raise KeyboardInterrupt, as Ctrl-C does, and the second end it all."""

    def stop(*_: Any) -> None:
        on_signals(lambda *_: end_at_once())
        raise KeyboardInterrupt

    on_signals(stop)


@contextlib.contextmanager
def sigterm_withheld() -> Iterator[None]:
    """Keep SIGTERM from this thread, and from the processes that it begins meanwhile."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_unless_served(address: str) -> None:
    """End the process at once where nobody takes connections at HOST:PORT any more."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except OSError:
        end_at_once()


def end_at_once() -> None:
    """End the process whatever its threads are doing."""
    if isinstance(sys.stderr, labs_gate.Unhurried):
        sys.stderr.wait(LAST_WORDS_S / 5)
    os._exit(0)


def _announce(models: labs_models.Models) -> bool:
    """Tell when the configured model is there; return False if it could not be loaded."""
    try:
        engine = models.wait()
    except labs.LabsError:
        return not models.failed  # else it is shutting down
    model = engine.model
    where = f"{model.device}, {model.dtype}, {engine.max_rows} rows"
    log.info("labs-api: ready after %.1f s (%s)", model.load_s, where)
    return True
