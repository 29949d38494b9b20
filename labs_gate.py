# SPDX-License-Identifier: Apache-2.0
"""Who may ask, how much, and what the log tells of it: hosts, origins, keys, quotas, limits.

A refusal is a `Problem`: a status, a sentence, a code. Each protocol writes it in its own words;
nothing here knows one. Needs labs_engine.py and labs_request.py; falcon.
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
import msgspec

import labs
import labs_engine
import labs_request

log = logging.getLogger("labs.api")
LOG_LINES = 4096  # that may wait for who reads standard error


def dumps(value: Any) -> bytes:
    """Encode as JSON in one line, also for those who take U+2028 and its like for line ends."""
    data = msgspec.json.encode(value)
    for raw, escaped in (
        (b"\xe2\x80\xa8", b"\\u2028"),
        (b"\xe2\x80\xa9", b"\\u2029"),
        (b"\xc2\x85", b"\\u0085"),
    ):
        data = data.replace(raw, escaped)
    return data


class Problem(Exception):
    """A refusal on its way out. param: the field at fault; retry_after_s: when to ask again."""

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


# ---------------------------------------------------------------- who may ask, and how much


class Quota:
    """A token bucket per owner: `per_minute` of something, all of it at once at most."""

    def __init__(self, per_minute: int | None) -> None:
        self.per_minute = per_minute
        self._levels: dict[str, tuple[float, float]] = {}  # owner: level, when
        self._lock = threading.Lock()

    def take(self, owner: str, cost: float) -> float:
        """Take `cost` and return 0, or take nothing and return after how many seconds it fits.

        A negative cost gives back.
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
    """What an owner may use in a minute; without keys all are one owner."""

    requests: Quota
    tokens: Quota


def quotas_of(config: labs.Config) -> Quotas:
    server = config.server
    return Quotas(Quota(server.requests_per_minute), Quota(server.tokens_per_minute))


def over_quota(text: str, wait_s: float) -> Problem:
    text = f"{text}; ask again in {math.ceil(wait_s)} s"
    return Problem(429, text, "rate_limit_exceeded", retry_after_s=wait_s)


def check_sizes(server: labs.Server, request: labs_request.Request) -> None:
    """Refuse a request that is larger than [server] allows."""
    for name, count, most in (
        ("n", request.n, server.max_choices),
        ("prompt", len(request.prompts), server.max_prompts),
    ):
        if count > most:
            what = {"n": "choices of a prompt are", "prompt": "prompts are"}[name]
            text = f"{count} {what} asked for; at most {most}"
            raise labs_request.Refusal(text, "invalid_value", name)
    texts = [("the prompt has", prompt.text) for prompt in request.prompts]
    for what, text in (*texts, ("the options have", "".join(request.choices or ()))):
        if (size := len(text.encode(errors="replace"))) > server.max_prompt_bytes:
            text = f"{what} {size} bytes; at most {server.max_prompt_bytes}"
            raise labs_request.Refusal(text, "prompt_too_large")


def check_room(status: labs_engine.Status, request: labs_request.Request) -> None:
    """Refuse a request whose answers never have room at once: to come again would not help."""
    answers, most = len(request.prompts) * request.n, status.max_rows + status.max_waiting
    if answers > most:
        text = (
            f"{answers} answers are asked for at once; there is room for {status.max_rows} "
            f"(max_batch_rows) and {status.max_waiting} that wait (max_waiting)"
        )
        name = "n" if request.n > 1 else "prompt"
        raise labs_request.Refusal(text, "invalid_value", name)


class Gate:
    """Middleware: hosts, request ids, keys; denies unless a resource says that it is public."""

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
        if req.method == "HEAD":  # the same as GET; what answers leaves the body out
            req.method, req.context.head = "GET", True
        host = re.sub(r":\d+$", "", req.get_header("Host") or "").lower().removesuffix(".")
        # No browser sends HTTP/1.0, so no page of another host can be behind it.
        old = "HTTP_HOST" not in req.env and req.env.get("SERVER_PROTOCOL") == "HTTP/1.0"
        if self._hosts is not None and host not in self._hosts and not old:
            text = f"the host {host!r} is not served: see server.allowed_hosts"
            raise Problem(421, text, "wrong_host")

    def process_resource(
        self, req: falcon.Request, resp: falcon.Response, resource: Any, params: dict[str, Any]
    ) -> None:
        if getattr(resource, "public", False) or req.method == "OPTIONS":
            return
        if self._digests:
            req.context.owner = self._owner(req.get_header("Authorization") or "")
        if wait := self._requests.take(req.context.owner, 1):
            most = self._requests.per_minute
            raise over_quota(f"too many requests: a key may make {most} a minute", wait)

    def _owner(self, authorization: str) -> str:
        scheme, _, key = authorization.partition(" ")
        digest = hashlib.sha256(key.strip().encode("latin-1", "replace")).hexdigest()
        # All are compared, so that the time tells nothing.
        matches = [known for known in self._digests if hmac.compare_digest(known, digest)]
        if scheme.lower() != "bearer" or not matches:
            raise Problem(401, "a valid API key is needed: Authorization: Bearer KEY", "no_key")
        return digest[:12]

    def process_response(
        self, req: falcon.Request, resp: falcon.Response, resource: Any, req_succeeded: bool
    ) -> None:
        if getattr(req.context, "head", False):
            req.method = "HEAD"
        if resp.stream is None and not getattr(resource, "quiet", False):
            log_request(req, falcon.http_status_to_code(resp.status))


class Cors(falcon.CORSMiddleware[Any, Any]):
    """Falcon's, for [server] allow_origins; caches keep answers to several origins apart."""

    def __init__(self, server: labs.Server) -> None:
        origins = "*" if "*" in server.allow_origins else server.allow_origins
        super().__init__(origins, expose_headers=("X-Request-Id", "Retry-After"))

    def process_response(
        self, req: falcon.Request, resp: falcon.Response, resource: object, req_succeeded: bool
    ) -> None:
        super().process_response(req, resp, resource, req_succeeded)
        if self.allow_origins != "*":
            resp.append_header("Vary", "Origin")


def middleware(config: labs.Config, requests: Quota) -> list[Any]:
    """Return what each request passes through. requests: of an owner."""
    server = config.server
    return [Gate(config, requests), *([Cors(server)] if server.allow_origins else [])]


def not_found(paths: Collection[str]) -> Callable[..., None]:
    """Return a sink that refuses all paths but these, and names them."""

    def refuse(req: falcon.Request, resp: falcon.Response, **_: Any) -> None:
        asked, known = req.path, ", ".join(paths)
        meant = next((path for path in paths if path.endswith(asked) or asked.endswith(path)), None)
        hint = f"; did you mean {meant}?" if meant and meant != "/" else ""
        raise Problem(404, f"there is no path {asked!r} here, only {known}{hint}", "not_found")

    return refuse


class Unhurried(io.TextIOBase):
    """What standard error becomes: a thread writes it, so nobody waits for who reads it or not.

    descriptor: None for nowhere. dropped: texts that found no room, or could not be written.
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
        """Let what was told be written, if that does not take too long."""
        end = time.monotonic() + timeout_s
        while self._texts.unfinished_tasks and time.monotonic() < end:
            time.sleep(0.005)

    def _write(self) -> None:
        while True:
            data = self._texts.get().encode("utf-8", "backslashreplace")
            try:
                while data and self._descriptor is not None:
                    data = data[os.write(self._descriptor, data) :]
            except OSError:  # a full disk, a pipe that was closed
                self.dropped += 1
            self._texts.task_done()


def log_request(req: falcon.Request, status: int) -> None:
    """Write one JSON line; prompts and keys are never in it."""
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


# ---------------------------------------------------------------- where it listens


def check_exposure(config: labs.Config) -> None:
    """Refuse to serve other machines without a key."""
    try:
        local = ipaddress.ip_address(config.server.host).is_loopback
    except ValueError:
        local = config.server.host == "localhost"
    if not (local or config.api_keys or config.server.insecure):
        raise labs.ConfigError(
            f"server_host = {config.server.host}: other machines could use this server without a "
            "key; set LABS_API_KEYS or server.api_keys_file, or allow it with --insecure"
        )


def cannot_listen(server: labs.Server, error: OSError) -> labs.LabsError:
    where = f"{server.host}:{server.port}"
    return labs.LabsError(f"cannot listen on {where}: {error.strerror or error}")


def url_of(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
