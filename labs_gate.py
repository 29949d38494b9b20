# SPDX-License-Identifier: Apache-2.0
"""Admit or refuse HTTP requests by host, origin, API key, quota and size, and log each of them.

A refusal is a `Problem` with a status, a message and a code; each endpoint renders it in its own
format. Needs labs_engine.py and labs_request.py; falcon.
"""

from __future__ import annotations

import hashlib
import hmac
import io
import ipaddress
import json
import logging
import math
import os
import queue
import re
import threading
import time
import uuid
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import falcon

import labs
import labs_engine
import labs_request

log = logging.getLogger("labs.api")
LOG_LINES = 4096  # lines that may wait until standard error accepts them


class Problem(Exception):
    """An HTTP error of any endpoint. param: the field at fault. retry_after_s: seconds to wait."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str,
        param: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param
        self.retry_after_s = retry_after_s


# ---------------------------------------------------------------- quotas, sizes and keys


class Quota:
    """A token bucket per owner: refills by `per_minute` a minute and never holds more than that."""

    def __init__(self, per_minute: int | None) -> None:
        self.per_minute = per_minute
        self._levels: dict[str, tuple[float, float]] = {}  # owner: level, when
        self._lock = threading.Lock()

    def take(self, owner: str, cost: float) -> float:
        """Take `cost` and return 0, or take nothing and return the seconds until it would fit.

        A negative cost refunds.
        """
        if self.per_minute is None:
            return 0.0
        with self._lock:
            now = time.monotonic()
            level, when = self._levels.get(owner, (self.per_minute, now))
            level = min(self.per_minute, level + (now - when) * self.per_minute / 60)
            wait = max(0.0, (cost - level) * 60 / self.per_minute)
            self._levels[owner] = (level if wait else level - cost, now)
            return wait


class Quotas(NamedTuple):
    """The two quotas of an owner, which is an API key; without keys all clients are one owner."""

    requests: Quota
    tokens: Quota


def quotas_of(config: labs.Config) -> Quotas:
    server = config.server
    return Quotas(Quota(server.requests_per_minute), Quota(server.tokens_per_minute))


def over_quota(text: str, wait_s: float) -> Problem:
    text = f"{text}; retry in {math.ceil(wait_s)} s"
    return Problem(429, text, "rate_limit_exceeded", retry_after_s=wait_s)


def check_sizes(server: labs.Server, request: labs_request.Request) -> None:
    """Raise Refusal when a request is larger than [server] allows."""
    for name, count, most in (
        ("n", request.n, server.max_choices),
        ("prompt", len(request.prompts), server.max_prompts),
    ):
        if count > most:
            what = {"n": "choices per prompt", "prompt": "prompts"}[name]
            text = f"the request has {count} {what}; this server allows {most}"
            raise labs_request.Refusal(text, "invalid_value", name)
    sizes = [("the prompt has", prompt.size) for prompt in request.prompts]
    options = "".join(request.choices or ()).encode(errors="replace")
    for what, size in (*sizes, ("the options have", len(options))):
        if size > server.max_prompt_bytes:
            text = f"{what} {size} bytes; this server allows {server.max_prompt_bytes}"
            raise labs_request.Refusal(text, "prompt_too_large")


def check_room(status: labs_engine.Status, request: labs_request.Request) -> None:
    """Raise Refusal when a request has more answers than the engine can ever hold at once."""
    answers, most = len(request.prompts) * request.n, status.max_rows + status.max_waiting
    if answers > most:
        text = (
            f"the request has {answers} answers; this server holds {status.max_rows} in its batch "
            f"(max_batch_rows) and {status.max_waiting} in its queue (max_waiting)"
        )
        name = "n" if request.n > 1 else "prompt"
        raise labs_request.Refusal(text, "invalid_value", name)


class Gate:
    """Check host, key and request quota; every resource needs a key unless it is `public`."""

    def __init__(self, config: labs.Config, quota: Quota) -> None:
        server = config.server
        hosts = {"localhost", "127.0.0.1", "[::1]", *server.allowed_hosts}
        hosts |= {server.host, f"[{server.host}]"}
        self._hosts = None if "*" in hosts else {host.lower() for host in hosts}
        self._digests = config.api_keys
        self._requests = quota

    def process_request(self, req: falcon.Request, resp: falcon.Response) -> None:
        given = req.get_header("X-Request-Id") or ""
        known = re.fullmatch(r"[A-Za-z0-9._-]{1,64}", given)
        req.context.id = given if known else uuid.uuid4().hex
        req.context.owner, req.context.record = "", None
        req.context.began, req.context.created = time.perf_counter(), int(time.time())
        resp.set_header("X-Request-Id", req.context.id)
        resp.set_header("X-Content-Type-Options", "nosniff")
        req.path = req.path.rstrip("/") or "/"
        if req.method == "HEAD":  # answered as GET; process_response drops the body
            req.method, req.context.head = "GET", True
        host = re.sub(r":\d+$", "", req.get_header("Host") or "").lower().removesuffix(".")
        # No browser sends HTTP/1.0, so a request without Host cannot come from a foreign page.
        old = "HTTP_HOST" not in req.env and req.env.get("SERVER_PROTOCOL") == "HTTP/1.0"
        if self._hosts is not None and host not in self._hosts and not old:
            text = f"the host {host!r} is not served; add it to server.allowed_hosts"
            raise Problem(421, text, "wrong_host")

    def process_resource(
        self, req: falcon.Request, resp: falcon.Response, resource: Any, params: dict[str, Any]
    ) -> None:
        if getattr(resource, "public", False) or req.method == "OPTIONS":
            return
        if self._digests:
            req.context.owner = self._owner(req)
        if wait := self._requests.take(req.context.owner, 1):
            most = self._requests.per_minute
            raise over_quota(f"this API key may send {most} requests a minute", wait)

    def _owner(self, req: falcon.Request) -> str:
        scheme, _, key = (req.get_header("Authorization") or "").partition(" ")
        given = [key] if scheme.lower() == "bearer" else []
        given += filter(None, [req.get_header("x-api-key")])  # as Anthropic's clients send it
        for key in given:
            digest = hashlib.sha256(key.strip().encode("latin-1", "replace")).hexdigest()
            # Every known key is compared, so that the time does not depend on which one matches.
            if [known for known in self._digests if hmac.compare_digest(known, digest)]:
                return digest[:12]
        text = "send a valid API key as Authorization: Bearer KEY, or as x-api-key: KEY"
        raise Problem(401, text, "no_key")

    def process_response(
        self, req: falcon.Request, resp: falcon.Response, resource: Any, req_succeeded: bool
    ) -> None:
        if getattr(req.context, "head", False):
            req.method = "HEAD"
        if resp.stream is None and not getattr(resource, "quiet", False):
            log_request(req, falcon.http_status_to_code(resp.status))


class Cors(falcon.CORSMiddleware[Any, Any]):
    """Falcon's CORS for [server] allow_origins. Vary: Origin keeps caches from mixing origins."""

    def __init__(self, server: labs.Server) -> None:
        origins = "*" if "*" in server.allow_origins else server.allow_origins
        super().__init__(origins, expose_headers=("X-Request-Id", "request-id", "Retry-After"))

    def process_response(
        self, req: falcon.Request, resp: falcon.Response, resource: object, req_succeeded: bool
    ) -> None:
        super().process_response(req, resp, resource, req_succeeded)
        if self.allow_origins != "*":
            resp.append_header("Vary", "Origin")


def middleware(config: labs.Config, requests: Quota) -> list[Any]:
    """Return the app's middleware. requests: the quota of requests per owner."""
    server = config.server
    return [Gate(config, requests), *([Cors(server)] if server.allow_origins else [])]


def not_found(paths: Collection[str]) -> Callable[..., None]:
    """Return a sink that answers 404, with the path that was probably meant."""

    def refuse(req: falcon.Request, resp: falcon.Response, **_: Any) -> None:
        path = req.path
        meant = next((each for each in paths if each.endswith(path) or path.endswith(each)), None)
        hint = f"; did you mean {meant}?" if meant and meant != "/" else ""
        text = f"unknown path {path!r:.200}{hint or '; GET /openapi.json shows all paths'}"
        raise Problem(404, text, "not_found")

    return refuse


class Unhurried(io.TextIOBase):
    """A standard error that a thread writes, so that no caller waits for a slow or stuck reader.

    descriptor: the file to write to, or None to discard. dropped: texts that were not written.
    """

    def __init__(self, descriptor: int | None) -> None:
        self.dropped, self._descriptor = 0, descriptor
        self._texts: queue.Queue[str] = queue.Queue(LOG_LINES)
        threading.Thread(target=self._write, name="labs-log", daemon=True).start()

    def write(self, text: str) -> int:
        try:
            if text:
                self._texts.put_nowait(text)
        except queue.Full:
            self.dropped += 1
        return len(text)

    def isatty(self) -> bool:
        return self._descriptor is not None and os.isatty(self._descriptor)

    def wait(self, timeout_s: float) -> None:
        """Wait until all texts are written, at most timeout_s."""
        end = time.monotonic() + timeout_s
        while self._texts.unfinished_tasks and time.monotonic() < end:
            time.sleep(0.005)

    def _write(self) -> None:
        while True:
            data = self._texts.get().encode("utf-8", "backslashreplace")
            try:
                while data and self._descriptor is not None:
                    data = data[os.write(self._descriptor, data) :]
            except OSError:  # for example a full disk or a closed pipe
                self.dropped += 1
            self._texts.task_done()


def log_request(req: falcon.Request, status: int) -> None:
    """Log a request as one line of JSON, without prompts and keys."""
    line = {
        "time": round(time.time(), 3),
        "id": req.context.id,
        "key": req.context.owner or None,
        "method": req.method,
        "path": req.path,
        "status": status,
        "seconds": round(time.perf_counter() - req.context.began, 4),
        **(req.context.record or {}),
    }
    log.info("%s", json.dumps(line))


# ---------------------------------------------------------------- addresses


def check_exposure(config: labs.Config) -> None:
    """Raise ConfigError when other machines could reach the server and it has no API key."""
    try:
        local = ipaddress.ip_address(config.server.host).is_loopback
    except ValueError:
        local = config.server.host == "localhost"
    if not (local or config.api_keys or config.server.insecure):
        raise labs.ConfigError(
            f"server_host = {config.server.host}: other machines could use this server without "
            "an API key; set LABS_API_KEYS or server.api_keys_file, or allow it with --insecure"
        )


def cannot_listen(server: labs.Server, error: OSError) -> labs.LabsError:
    where = f"{server.host}:{server.port}"
    return labs.LabsError(f"cannot listen on {where}: {error.strerror or error}")


def url_of(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
