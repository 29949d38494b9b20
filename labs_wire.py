# SPDX-License-Identifier: Apache-2.0
"""Watch waitress connections: detect clients that left, half-closed or send too slowly.

A client that left and one that only closed its sending side look alike: both send FIN. Only a write
shows the difference, because a client that left answers it with RST. A stream writes anyway. Other
responses start their status line early: its first bytes are always the same, sent one by one.

    server.channel_class = labs_wire.channel_class(refuse)

Needs waitress; no other file of labs.
"""

from __future__ import annotations

import contextlib
import select
import socket
import time
import weakref
from collections.abc import Callable
from typing import Any

from waitress.channel import ClientDisconnected, HTTPChannel
from waitress.task import ErrorTask, WSGITask

SENDING_S = 30.0  # seconds that a client may take to send one request
PROBE_S = 0.2  # seconds before the first early byte; each next one waits twice as long
Refuse = Callable[[Any], tuple[str, list[tuple[str, str]], bytes]]  # of a request


class Answer(WSGITask):  # type: ignore[misc]
    begun = 0  # bytes of the status line that were already sent

    def __init__(self, channel: Any, request: Any) -> None:
        super().__init__(channel, request)
        channel.answer = self

    def build_response_header(self) -> bytes:
        return bytes(super().build_response_header())[self.begun :]


class Channel(HTTPChannel):  # type: ignore[misc]
    """One connection. A half-closed client still gets its responses, until a write fails."""

    task_class = Answer
    answer: Any = None  # the latest Answer
    close_when_flushed: bool = False
    ended_s: float | None = None  # when the client sent FIN (time.monotonic)
    refused_s: float | None = None  # when its request was refused (time.time)

    def readable(self) -> bool:
        return self.ended_s is None and bool(super().readable())

    def handle_read(self) -> None:
        try:
            data = self.socket.recv(self.adj.recv_bytes)
        except BlockingIOError:
            return
        except OSError:
            self.handle_close()
            return
        if data:
            self.last_activity = time.time()
            if self.refused_s is None:
                self.received(data)
            return
        with self.requests_lock:
            self.ended_s = time.monotonic()
            self._close_after_answers()

    def handle_write(self) -> None:
        """Keep reading from a client that still sends a refused body, so it can read the error."""
        refused = self.refused_s is not None and self.ended_s is None
        if not (refused and self.close_when_flushed):
            super().handle_write()
            return
        self._flush_exception(self._flush_some)
        if self.connected and not self.total_outbufs_len:
            self.close_when_flushed = False
            with contextlib.suppress(OSError):
                self.socket.shutdown(socket.SHUT_WR)

    def service(self) -> None:
        super().service()
        with self.requests_lock:
            self._close_after_answers()
        self.server.pull_trigger()

    def _close_after_answers(self) -> None:
        if self.ended_s is not None and not self.requests:
            self.close_when_flushed = True

    def check_client_disconnected(self) -> bool | None:
        """Return whether the client left; None if it half-closed: then only a write shows it."""
        if not self.connected or self.ended_s is None:
            return not self.connected
        if self._is_reset():
            return True
        answer, waited_s = self.answer, time.monotonic() - self.ended_s
        start = f"HTTP/{answer.version} ".encode()[answer.begun : answer.begun + 1]
        if start and not answer.wrote_header and waited_s > PROBE_S * 2**answer.begun:
            answer.begun += 1
            with contextlib.suppress(ClientDisconnected):
                self.write_soon(start)
        return None

    def _is_reset(self) -> bool:
        """Poll the socket: waitress's loop does not watch a socket that is not readable()."""
        poll = select.poll()
        try:
            poll.register(self.socket, 0)
        except (TypeError, ValueError):  # closed meanwhile
            return True
        return any(flags & (select.POLLERR | select.POLLHUP) for _, flags in poll.poll(0))


def channel_class(refuse: Refuse) -> type[Channel]:
    """Return a channel class that answers invalid requests by `refuse`, not in plain text."""

    class Refused(ErrorTask):  # type: ignore[misc]
        def execute(self) -> None:
            self.channel.refused_s = time.time()
            self.status, headers, body = refuse(self.request)
            self.response_headers.extend(headers)
            self.set_close_on_finish()
            self.content_length = len(body)
            self.write(body)

        def build_response_header(self) -> bytes:
            last = self.channel.answer  # it may have failed before it wrote its header
            begun = 0 if last is None or last.wrote_header else last.begun
            return bytes(super().build_response_header())[begun:]

    return type("Channel", (Channel,), {"error_task_class": Refused})


def cut_slow_senders(server: Any) -> None:
    """Close connections that take more than SENDING_S to send one request or a refused body.

    waitress's own channel_timeout restarts with every byte.
    """
    begun: weakref.WeakKeyDictionary[Any, float] = weakref.WeakKeyDictionary()
    maintenance = server.maintenance

    def maintain(now: float) -> None:
        maintenance(now)
        for channel in list(server.active_channels.values()):
            channel.will_close |= now - (channel.refused_s or now) > SENDING_S
            part = channel.request
            if part is not None and not channel.requests:
                channel.will_close |= now - begun.setdefault(part, now) > SENDING_S

    server.maintenance = maintain
