# SPDX-License-Identifier: Apache-2.0
"""Connections under waitress: who has left, who only sends no more, who is too slow.

A client that has left and one that has shut its sending side look alike: both send FIN. Only a
write tells them apart, as a client that has left answers it with RST. A stream writes anyway. For
other answers the status line begins early: all of them have the same first bytes, sent one by one.

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

SENDING_S = 30.0  # what a client may take to send one request
PROBE_S = (
    0.2  # an answer that comes by then begins with no probe; each next one waits twice as long
)
Refuse = Callable[[Any], tuple[str, list[tuple[str, str]], bytes]]  # of waitress's request


class Answer(WSGITask):  # type: ignore[misc]
    begun = 0  # bytes of the status line that are sent already

    def __init__(self, channel: Any, request: Any) -> None:
        super().__init__(channel, request)
        channel.answer = self

    def build_response_header(self) -> bytes:
        return bytes(super().build_response_header())[self.begun :]


class Channel(HTTPChannel):  # type: ignore[misc]
    """One connection; answers go on to a client that sends no more, until a write fails."""

    task_class = Answer
    answer: Any = None  # the latest
    close_when_flushed: bool = False
    ended_s: float | None = None  # when the client said that it sends no more, by time.monotonic
    refused_s: float | None = None  # when what it sent was refused, by time.time

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
        """Hear a client out that is still sending what was refused, or it may miss the answer."""
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
        """Tell whether the client has left; None: it sends no more, and a write will tell."""
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
        """Ask the socket itself: waitress's loop does not watch one that is not to be read."""
        poll = select.poll()
        try:
            poll.register(self.socket, 0)
        except (TypeError, ValueError):  # closed meanwhile
            return True
        return any(flags & (select.POLLERR | select.POLLHUP) for _, flags in poll.poll(0))


def channel_class(refuse: Refuse) -> type[Channel]:
    """Return a channel that answers what is no request with `refuse`, not with plain text."""

    class Refused(ErrorTask):  # type: ignore[misc]
        def execute(self) -> None:
            self.channel.refused_s = time.time()
            self.status, headers, body = refuse(self.request)
            self.response_headers.extend(headers)
            self.set_close_on_finish()
            self.content_length = len(body)
            self.write(body)

        def build_response_header(self) -> bytes:
            last = self.channel.answer  # which may have failed before it wrote
            begun = 0 if last is None or last.wrote_header else last.begun
            return bytes(super().build_response_header())[begun:]

    return type("Channel", (Channel,), {"error_task_class": Refused})


def cut_slow_senders(server: Any) -> None:
    """Close connections that take longer than SENDING_S to send one request, or what was refused.

    waitress's channel_timeout begins anew with every byte.
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
