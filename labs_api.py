# SPDX-License-Identifier: Apache-2.0
"""labs over HTTP: REST and SSE, Falcon under waitress; concurrent requests share one batch.

    GET  /health /livez /readyz      alive; ready to answer
    POST /generate                   prompt or messages and any generation setting -> text
    POST /generate/stream            the same as server-sent events
    POST /explain                    how it would run, without running it
    POST /choose                     how likely each of some answers is
    GET  /v1/models                  OpenAI's endpoints
    POST /v1/chat/completions /v1/completions
    GET  /metrics /openapi.json /docs /

`create_app(config)` is a plain WSGI callable, to be mounted anywhere; `labs-api` serves it. A
parameter takes effect or is refused by name. Needs labs.py, labs_decode.py, labs_engine.py,
labs_models.py and labs_openai.py; as a program also labs_cli.py.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import hashlib
import hmac
import html
import ipaddress
import itertools
import json
import logging
import math
import queue
import re
import signal
import socket
import sys
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Generator, Iterator
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, cast

import falcon
import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

import labs
import labs_engine
import labs_models
import labs_openai

log = logging.getLogger("labs.api")
POLL_S = 0.05  # how often a request that waits looks whether its client is still there
PING_S = 15.0  # proxies close what is silent for longer
ROWS = 64  # labs_decode.MOST_ROWS, without torch: of an engine, where the settings do not tell
LOADING_S = 1.0  # how often a stream tells that its model is still being loaded
SENDING_S = 30.0  # what a client may take to send one request
EngineFor = Callable[[str], labs_engine.Engine]
S = TypeVar("S", bound=Struct)
R = TypeVar("R")
Waiting = Generator[None, None, R]  # yields while something is not there yet, then returns it


# ---------------------------------------------------------------- what comes in and goes out


class ChooseRequest(labs.Settings, frozen=True, kw_only=True):
    """A prompt or messages, and the answers to choose among."""

    options: Annotated[tuple[labs.Stop, ...], Meta(min_length=2, max_length=64)]
    model: str | None = None
    prompt: str | None = None
    messages: Annotated[tuple[labs.Message, ...], Meta(max_length=256)] | None = None
    use_chat_template: bool | None = None
    add_generation_prompt: bool | None = None


class GenerateAnswer(labs.Completion, frozen=True, kw_only=True):
    id: str
    model: str
    documents: tuple[labs.Source, ...] | UnsetType = UNSET


class ChooseAnswer(Struct, frozen=True, kw_only=True):
    """options: their probabilities, which sum to 1."""

    id: str
    model: str
    options: dict[str, float]


class ModelCard(Struct, frozen=True):
    id: str
    created: int
    context_length: int | None
    loaded: bool
    object: Literal["model"] = "model"
    owned_by: Literal["labs"] = "labs"


class ModelList(Struct, frozen=True):
    data: tuple[ModelCard, ...]
    object: Literal["list"] = "list"


class Health(Struct, frozen=True):
    status: Literal["ok", "loading", "draining", "dead", "stalled"]


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


# ---------------------------------------------------------------- errors


class Problem(Exception):
    """A refusal on its way out, in OpenAI's words."""

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

    @property
    def error(self) -> labs_openai.Error:
        kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error")
        kind = "server_error" if self.status >= 500 else kind
        detail = labs_openai.ErrorDetail(str(self), kind, self.param, self.code)
        return labs_openai.Error(detail)


def as_problem(error: BaseException, request_id: str) -> Problem:
    """Map an exception, once: what the client can mend is told, the rest is in the log."""
    if isinstance(error, Problem):
        return error
    if isinstance(error, labs_engine.Busy):
        return Problem(503, str(error), "overloaded", retry_after_s=1)
    if isinstance(error, labs.InputError | labs.ConfigError):  # what a request says, both
        return Problem(400, str(error), *labs_openai.code_and_param(error))
    if isinstance(error, falcon.HTTPError):
        return Problem(
            falcon.http_status_to_code(error.status),
            error.description or error.title,
            _code(error.title),
        )
    log.error("request %s failed", request_id, exc_info=error)
    return Problem(
        500, f"The server failed at this request; its log tells more of {request_id}.", "failed"
    )


def _code(title: str) -> str:
    return title.partition(" ")[2].lower().replace(" ", "_") or "refused"


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


def _over_quota(text: str, wait_s: float) -> Problem:
    text = f"{text}; ask again in {math.ceil(wait_s)} s"
    return Problem(429, text, "rate_limit_exceeded", retry_after_s=wait_s)


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
        host = re.sub(r":\d+$", "", req.get_header("Host") or "").lower()
        if self._hosts is not None and host not in self._hosts:
            raise Problem(
                421, f"the host {host!r} is not served: see server.allowed_hosts", "wrong_host"
            )

    def process_resource(
        self, req: falcon.Request, resp: falcon.Response, resource: Any, params: dict[str, Any]
    ) -> None:
        if getattr(resource, "public", False) or req.method == "OPTIONS":
            return
        if self._digests:
            req.context.owner = self._owner(req.get_header("Authorization") or "")
        if wait := self._requests.take(req.context.owner, 1):
            most = self._requests.per_minute
            raise _over_quota(f"too many requests: a key may make {most} a minute", wait)

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
        if resp.stream is None and not getattr(resource, "quiet", False):
            log_request(req, falcon.http_status_to_code(resp.status))


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


# ---------------------------------------------------------------- one request's answers


LABEL = ("model_name",)


class Meters:
    """What /metrics tells of requests, under vLLM's names with labs_ for vllm:."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        waits = (0.005, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120)
        gaps = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2, 5)

        def seconds(name: str, text: str, buckets: tuple[float, ...] = waits) -> Histogram:
            return Histogram(
                f"labs_{name}_seconds", text, LABEL, registry=registry, buckets=buckets
            )

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"labs_{name}", text, (*LABEL, *labels), registry=registry)

        self.first = seconds("time_to_first_token", "From the request to its first text")
        self.gap = seconds("inter_token_latency", "From one piece of text to the next", gaps)
        self.whole = seconds("e2e_request_latency", "From the request to its end")
        self.queued = seconds("request_queue_time", "From being taken in to a row of its own")
        self.prompt = counter("prompt_tokens", "Prompt tokens")
        self.cached = counter("prefix_cache_hits", "Prompt tokens not computed again")
        self.generated = counter("generation_tokens", "Generated tokens")
        self.success = counter("request_success", "Answers", "finished_reason")
        names, text = ("rule", "side"), "Times that a rule of [guard] masked or refused"
        self.guard = Counter("labs_guard", text, names, registry=registry)

    def acted(self, rule: str, side: str) -> None:
        self.guard.labels(rule, side).inc()

    def done(self, name: str, event: labs.Done, seconds: float) -> None:
        self.success.labels(name, event.finish_reason).inc()
        self.prompt.labels(name).inc(event.usage.prompt_tokens)
        self.cached.labels(name).inc(event.usage.cached_tokens)
        self.generated.labels(name).inc(event.usage.completion_tokens)
        self.queued.labels(name).observe(event.timings.queue_s)
        self.whole.labels(name).observe(seconds)


class Asked:
    """All answers to one HTTP request, in one queue; closing it lets their rows go.

    rules: the filters of [guard], if any; began: when the request came, by perf_counter.
    """

    def __init__(
        self, name: str, engine: labs_engine.Engine, meters: Meters, rules: Any, began: float
    ) -> None:
        self.name, self._meters, self._rules, self._began = name, meters, rules, began
        self.model = msgspec.structs.replace(engine.model, decoder=None)  # holds no weights
        self._events: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._answers: list[labs_engine.Answer] = []
        self._filters: dict[int, Callable[[labs.Event], list[labs.Event]]] = {}
        self.gone: Callable[[], bool] = lambda: False
        self.dones: list[labs.Done] = []
        self.documents: tuple[labs.Source, ...] | UnsetType = UNSET  # where they are used

    def submit(self, engine: labs_engine.Engine, *asked: Any, **options: Any) -> None:
        shown = _filter(self._rules, *asked)
        self._answers.append(engine.submit(*asked, events=self._events, **options))
        self._filters[self._answers[-1].ticket] = shown

    def __iter__(self) -> Iterator[tuple[int, labs.Delta | labs.Done] | None]:
        """Yield (choice, event), and None where a comment is due; raise what made it fail."""
        choices = {answer.ticket: index for index, answer in enumerate(self._answers)}
        last = dict.fromkeys(choices, 0.0)
        silent = time.perf_counter()
        while len(self.dones) < len(choices):
            ticket, events = self._next()
            if self.gone():
                raise ClientGone
            if not events and time.perf_counter() - silent > PING_S:
                silent = time.perf_counter()
                yield None
            for event in events:
                if isinstance(event, labs.Failed):
                    raise event.error
                silent = now = time.perf_counter()
                if isinstance(event, labs.Done):
                    self._end(choices[ticket], event)
                elif last[ticket]:
                    self._meters.gap.labels(self.name).observe(now - last[ticket])
                else:
                    self._meters.first.labels(self.name).observe(now - self._began)
                last[ticket] = now
                yield choices[ticket], event

    def _next(self) -> tuple[int, list[labs.Event]]:
        """Return a ticket and what may be shown of its answer by now; wait a moment for it."""
        try:
            ticket, event = self._events.get(timeout=POLL_S)
        except queue.Empty:
            return -1, []
        return ticket, self._filters[ticket](event)

    def _end(self, choice: int, done: labs.Done) -> None:
        self.dones.append(done)
        self._meters.done(self.name, done, time.perf_counter() - self._began)
        if done.finish_reason == "content_filter":  # its row may not have ended
            self._answers[choice].close()

    def record(self) -> dict[str, Any]:
        """Return what the log tells of the answers."""
        usages = [done.usage for done in self.dones]
        return {
            "model": self.name,
            "prompt_tokens": sum(usage.prompt_tokens for usage in usages),
            "cached_tokens": sum(usage.cached_tokens for usage in usages),
            "completion_tokens": sum(usage.completion_tokens for usage in usages),
            "finish_reason": ",".join(done.finish_reason for done in self.dones) or "cancelled",
            "queue_s": round(max((done.timings.queue_s for done in self.dones), default=0), 4),
            "prefill_s": round(max((done.timings.prefill_s for done in self.dones), default=0), 4),
        }

    def close(self) -> None:
        for answer in self._answers:
            answer.close()


def _rules(config: labs.Config, meters: Meters) -> Any:
    """Return the filters of [guard], or None where there are none."""
    if config.guard == labs.Guard():
        return None
    labs.need("labs_guard")
    import labs_guard

    rules = labs_guard.load(config.guard, config.model)
    return msgspec.structs.replace(rules, tell=meters.acted)


def _filter(
    rules: Any, inputs: labs.Inputs, generation: labs.Generation
) -> Callable[[labs.Event], list[labs.Event]]:
    if rules is None:
        return lambda event: [event]
    import labs_guard

    return labs_guard.Filter(rules, inputs, generation)


class ClientGone(Exception):
    """Nobody reads the answer any more."""


class Frames:
    """A stream of bytes that waitress closes; closing twice or never started is fine."""

    def __init__(self, frames: Iterator[bytes], close: Callable[[], None]) -> None:
        self._frames = frames
        self._finish = weakref.finalize(self, close)

    def __iter__(self) -> Frames:
        return self

    def __next__(self) -> bytes:
        return next(self._frames)

    def close(self) -> None:
        self._finish()


# ---------------------------------------------------------------- from a request to its answers


class Brought:
    """The engine of whoever mounts the app, with the face of labs_models.Models."""

    def __init__(self, engine_for: EngineFor, name: str) -> None:
        self._engine_for, self._name = engine_for, name

    def __call__(self, name: str) -> labs_engine.Engine:
        return self._engine_for(name)

    def release(self, name: str) -> None:
        """Do nothing: it stays."""

    def reader(self, name: str) -> labs.Model:
        return self._engine_for(name).model

    def check(self) -> None:
        """Raise if it is not there."""
        self._engine_for(self._name)

    def loaded(self) -> dict[str, labs_engine.Engine]:
        with contextlib.suppress(labs.LabsError):
            return {self._name: self._engine_for(self._name)}
        return {}

    def context_length(self, name: str) -> int | None:
        engines = self.loaded()
        return engines[name].model.context_length if name in engines else None


class Wanted(Struct, frozen=True):
    """What an HTTP request asks for. prompts: as in Service.build; n: answers to each.

    options: the settings that it names; began: when it came, by perf_counter; response_format:
    what its answers have to be; documents: whether they are used, unset as configured; sources:
    takes the passages that were.
    """

    req: Any
    model: str | None
    prompts: list[dict[str, Any]]
    options: dict[str, Any]
    began: float
    n: int = 1
    response_format: labs.ResponseFormat | None = None
    documents: bool | None = False
    sources: list[labs.Source] = []


class Service:
    """What the resources share: the configurations by name, the engines, quotas and meters."""

    def __init__(
        self,
        config: labs.Config,
        models: labs_models.Models | Brought,
        quota: Quota,
        registry: CollectorRegistry,
    ) -> None:
        self.config, self.models = config, models
        self.configs = config.by_name()
        self.meters = Meters(registry)
        self.rules = _rules(config, self.meters)
        self._tokens = quota
        self._waiting = threading.Semaphore(max(1, config.server.max_waiting))
        self.created = int(time.time())

    def _gone(self, req: falcon.Request) -> Callable[[], bool]:
        """Return waitress's probe; raise if the client left while its request waited for us."""
        gone: Callable[[], bool] = req.env.get("waitress.client_disconnected", lambda: False)
        if gone():
            raise ClientGone
        return gone

    def read(self, req: falcon.Request, kind: type[S]) -> tuple[S, dict[str, Any]]:
        """Return the body as `kind`, and the fields that it names with their values."""
        self._gone(req)
        if (req.content_type or "").partition(";")[0].strip().lower() != "application/json":
            raise Problem(415, "the body must be application/json", "not_json")
        if (req.content_length or 0) > (limit := self.config.server.max_body_bytes):
            raise Problem(413, f"the body has more than {limit} bytes", "body_too_large")
        return labs_openai.read(req.bounded_stream.read(), kind)

    def _admit(self, wanted: Wanted) -> Wanted:
        """Refuse too many bytes before anything looks at them, then what the filters refuse."""
        for request in wanted.prompts:
            size = len(_text_of(request).encode(errors="replace"))
            if size > (limit := self.config.server.max_prompt_bytes):
                text = f"the prompt has {size} bytes; at most {limit}"
                raise Problem(400, text, "prompt_too_large")
        if self.rules is None:
            return wanted
        import labs_request

        prompts = []
        for each in wanted.prompts:
            names = {*labs_request.Prompt.__struct_fields__} & each.keys()
            given = {name: each[name] for name in names}
            if given.get("messages") is not None:
                given["messages"] = tuple(labs.check_prompt(None, given["messages"]) or ())
            prompt = self.rules.check_prompt(labs_request.Prompt(**given))
            prompts.append({**each, **{name: getattr(prompt, name) for name in names}})
        return msgspec.structs.replace(wanted, prompts=prompts)

    def build(
        self, model: labs.Model, chat: labs.Chat, *, ids: tuple[int, ...] = (), **request: Any
    ) -> labs.Inputs:
        """Build the inputs of what was admitted."""
        if ids:
            return labs.inputs_of_ids(model, ids)
        toggles = {
            name: getattr(chat, name) if request.get(name) is None else request[name]
            for name in labs.Chat.__struct_fields__
        }
        return labs.build_inputs(model, **{**request, **toggles})

    def _wait_for(self, wanted: Wanted, get: Callable[[], R], limit_s: float | None) -> Waiting[R]:
        """Return what `get` does, yielding while it raises Loading; who waits holds a thread."""
        gone, waits = self._gone(wanted.req), False
        try:
            while True:
                try:
                    return get()
                except labs_models.Loading as loading:
                    waits = waits or self._waiting.acquire(blocking=False)
                    late = time.perf_counter() > wanted.began + (limit_s or math.inf)
                    if late or not waits:
                        raise
                    loading.wait(POLL_S)
                if gone():
                    raise ClientGone
                yield
        finally:
            if waits:
                self._waiting.release()

    def _name(self, wanted: Wanted) -> Waiting[str]:
        """Return the name of the model that answers; what the request says is only compared."""
        if wanted.model is None:
            return self.config.model_id
        if wanted.model == "auto" and self.config.router.rules:
            return (yield from self._route(wanted))
        if wanted.model not in self.configs:
            served = ", ".join(self.configs)
            text = f"there is no model {wanted.model!r} here, only {served}"
            raise Problem(404, text, "model_not_found", "model")
        return wanted.model

    def _route(self, wanted: Wanted) -> Waiting[str]:
        """Choose by the rules. The default model counts the tokens, where a rule asks for them."""
        config, text = self.config, "\n".join(map(_text_of, wanted.prompts))

        @functools.cache
        def count() -> int:
            model = self.models.reader(config.model_id)
            found = (
                each.get("ids") or self.build(model, config, **each).input_ids
                for each in wanted.prompts
            )
            return max(map(len, found))

        def choose() -> str:
            return labs.route(config.router, text, count) or config.model_id

        limit_s = wanted.options.get("timeout_s", config.generation.timeout_s)
        return (yield from self._wait_for(wanted, choose, limit_s))

    def use(self, wanted: Wanted, do: Callable[..., R]) -> Waiting[R]:
        """Return do(name, engine, inputs, generation), yielding while the model is loaded."""
        if len(wanted.prompts) * wanted.n > (most := self.config.server.max_choices):
            text = f"{len(wanted.prompts) * wanted.n} choices are asked for; at most {most}"
            raise Problem(400, text, "invalid_value", "n")
        wanted = self._admit(wanted)
        name = yield from self._name(wanted)
        config = self.configs[name]
        generation = labs.evolve(config.generation, **wanted.options)
        limit_s, grounds = generation.timeout_s, config.documents.apply(wanted.documents)
        engine = yield from self._wait_for(wanted, lambda: self.models(name), limit_s)
        try:
            prompts = wanted.prompts
            if grounds:
                prompts = [_grounded(config, engine.model, each, wanted) for each in prompts]
            inputs = [self.build(engine.model, config, **each) for each in prompts]
            if self.rules is not None:
                for each, request in zip(inputs, prompts, strict=True):
                    self.rules.check_inputs(each, ids="ids" in request)
            return do(name, engine, inputs, generation)
        finally:
            self.models.release(name)

    def ask(self, wanted: Wanted) -> Waiting[Asked]:
        """Submit each prompt n times; all are taken in or none."""

        def submit(name: str, engine: Any, inputs: list[labs.Inputs], generation: Any) -> Asked:
            owner = wanted.req.context.owner
            generation = _in_time_left(generation, wanted.began)
            asked = Asked(name, engine, self.meters, self.rules, wanted.began)
            asked.gone = self._gone(wanted.req)
            if self.configs[name].documents.apply(wanted.documents):
                asked.documents = tuple(wanted.sources)
            try:
                with self.paid(owner, wanted.n, inputs, generation):
                    for each, choice in itertools.product(inputs, range(wanted.n)):
                        options = labs.choice_of(generation, choice)
                        processors = constraints(engine.model, wanted)
                        asked.submit(engine, each, options, owner=owner, processors=processors)
            except BaseException:
                asked.close()
                raise
            return asked

        return self.use(wanted, submit)

    @contextlib.contextmanager
    def paid(
        self, owner: str, n: int, inputs: list[labs.Inputs], generation: labs.Generation
    ) -> Iterator[None]:
        """Take what n answers may use from the owner's quota, or refuse; an error gives it back."""
        cost = n * sum(len(each.input_ids) + generation.max_new_tokens for each in inputs)
        if cost > (most := self._tokens.per_minute or cost):
            text = f"{cost} tokens exceed the quota of {most} a minute; lower max_new_tokens or n"
            raise Problem(400, text, "quota")
        if wait := self._tokens.take(owner, cost):
            raise _over_quota(f"{cost} tokens exceed what is left of {most} a minute", wait)
        try:
            yield
        except BaseException:
            self._tokens.take(owner, -cost)
            raise

    def collect(self, req: falcon.Request, asked: Asked) -> list[labs.Completion]:
        """Return whole answers by choice."""
        pieces: dict[int, list[labs.Delta]] = {}
        dones: dict[int, labs.Done] = {}
        try:
            for choice, event in (item for item in asked if item is not None):
                if isinstance(event, labs.Delta):
                    pieces.setdefault(choice, []).append(event)
                else:
                    dones[choice] = event
        finally:
            asked.close()
            req.context.record = asked.record()
        return [labs.fold(pieces.get(choice, []), dones[choice]) for choice in sorted(dones)]

    def stream(
        self, resp: falcon.Response, wanted: Wanted, frames_of: Callable[[Asked], Iterator[bytes]]
    ) -> None:
        """Answer with server-sent events; what goes wrong from here on is one of them.

        A request whose model is there is taken in before the status is sent.
        """
        asking, found, req = self.ask(wanted), list[Asked](), wanted.req
        try:
            next(asking)
        except StopIteration as end:
            found.append(end.value)

        def frames() -> Iterator[bytes]:
            if not found:
                found.append((yield from _while_loading(asking)))
            yield from frames_of(found[0])

        def close() -> None:
            asking.close()
            for asked in found:
                asked.close()
                req.context.record = asked.record()
            log_request(req, 200)

        resp.content_type = "text/event-stream; charset=utf-8"
        resp.set_header("Cache-Control", "no-cache")
        resp.set_header("X-Accel-Buffering", "no")
        resp.stream = Frames(_ending_in_error(frames(), req.context.id), close)


def constraints(model: labs.Model, wanted: Wanted) -> tuple[Any, ...]:
    """Return what keeps one answer to the request's response_format."""
    if wanted.response_format is None:
        return ()
    import labs_request

    return labs_request.constraints(model, wanted.response_format)  # type: ignore[arg-type]


def _grounded(
    config: labs.Config, model: labs.Model, request: dict[str, Any], wanted: Wanted
) -> dict[str, Any]:
    labs.need("labs_rag")
    import labs_rag
    import labs_request

    names = {*labs_request.Prompt.__struct_fields__} & request.keys()
    prompt = labs_request.Prompt(**{name: request[name] for name in names})
    if prompt.ids is not None:
        return request
    if prompt.messages is not None:
        checked = tuple(labs.check_prompt(None, prompt.messages) or ())
        prompt = msgspec.structs.replace(prompt, messages=checked)
    prompt, encoder = labs_request.filled(prompt, config), labs_rag.encoder_of(config)
    messages, found = labs_rag.with_passages(config.documents, encoder, model, prompt)
    wanted.sources.extend(found)
    return {**request, "prompt": None, "messages": messages} if found else request


def _text_of(request: dict[str, Any]) -> str:
    texts = [message.content for message in request.get("messages") or ()]
    return "\n".join([*([request["prompt"]] if request.get("prompt") else []), *texts])


def _in_time_left(generation: labs.Generation, began: float) -> labs.Generation:
    """Let the time that a model took to load count, where it was long enough to matter."""
    waited = time.perf_counter() - began
    if generation.timeout_s is None or waited < LOADING_S:
        return generation
    return labs.evolve(generation, timeout_s=max(0.001, generation.timeout_s - waited))


def at_last(waiting: Waiting[R]) -> R:
    """Wait to the end and return what there is then."""
    while True:
        try:
            next(waiting)
        except StopIteration as end:
            return cast("R", end.value)


def _while_loading(asking: Waiting[Asked]) -> Generator[bytes, None, Asked]:
    told = began = time.perf_counter()
    while True:
        if (now := time.perf_counter()) - told > LOADING_S:
            told = now
            yield f": loading the model for {now - began:.0f} s\n\n".encode()
        try:
            next(asking)
        except StopIteration as end:
            return cast("Asked", end.value)


def _ending_in_error(frames: Iterator[bytes], request_id: str) -> Iterator[bytes]:
    yield b": ok\n\n"  # lets the headers go while the prompt is read
    try:
        yield from frames
    except ClientGone:
        return
    except Exception as error:
        yield error_event(as_problem(error, request_id))


def error_event(problem: Problem) -> bytes:
    """Return the last event of a stream that failed."""
    return b"event: error\ndata: " + dumps(problem.error) + b"\n\n"


# ---------------------------------------------------------------- resources


class Resource:
    public = False  # asks for no key
    quiet = False  # is not in the log

    def __init__(self, service: Service) -> None:
        self.service = service


class Alive(Resource):
    """GET /health and /livez: the process answers."""

    public = quiet = True

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        resp.data = dumps(Health("ok"))


class Ready(Resource):
    """GET /readyz: 200 if the model is loaded and, while work waits, is being stepped."""

    public = quiet = True
    stalled_s = 60.0  # longer than any single step or chunk

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        health = Health(self._state())
        resp.status = falcon.HTTP_200 if health.status == "ok" else falcon.HTTP_503
        resp.data = dumps(health)

    def _state(self) -> Any:
        try:
            self.service.models.check()
        except labs_engine.Busy:
            return "loading"
        except labs.LabsError:
            return "dead"
        found = [engine.status() for engine in self.service.models.loaded().values()]
        if any(status.closing for status in found):
            return "draining"
        if not all(status.alive for status in found):
            return "dead"
        return "stalled" if any(status.idle_s > self.stalled_s for status in found) else "ok"


class Generate(Resource):
    """POST /generate, /generate/stream and /explain."""

    def _read(self, req: falcon.Request) -> Wanted:
        body, given = self.service.read(req, labs.GenerateRequest)
        names = ("prompt", "messages", *labs.Chat.__struct_fields__)
        prompt = {name: getattr(body, name) for name in names}
        options = {k: getattr(body, k) for k in labs.Generation.__struct_fields__ if k in given}
        format = body.response_format
        began, documents = req.context.began, body.documents
        return Wanted(req, body.model, [prompt], options, began, 1, format, documents)

    def on_post(self, req: falcon.Request, resp: falcon.Response) -> None:
        asked = at_last(self.service.ask(self._read(req)))
        (completion,) = self.service.collect(req, asked)
        names = {"id": req.context.id, "model": asked.name, "documents": asked.documents}
        resp.data = dumps(GenerateAnswer(**names, **msgspec.structs.asdict(completion)))

    def on_post_explain(self, req: falcon.Request, resp: falcon.Response) -> None:
        wanted = self._read(req)

        def explain(name: str, engine: Any, inputs: list[labs.Inputs], generation: Any) -> Any:
            sources = dict.fromkeys(self.service.configs[name].sources, "server")
            sources |= dict.fromkeys(wanted.options, "request")
            constraints(engine.model, wanted)  # refuses what cannot be expressed
            _filter(self.service.rules, inputs[0], generation)  # and this what would tell too much
            return labs.explain(engine.model, inputs[0], generation, sources)

        resp.data = dumps(at_last(self.service.use(wanted, explain)))

    def on_post_stream(self, req: falcon.Request, resp: falcon.Response) -> None:
        self.service.stream(resp, self._read(req), functools.partial(self._frames, req))

    def _frames(self, req: falcon.Request, asked: Asked) -> Iterator[bytes]:
        """Text as `data:` lines, each line end a line feed; then `event: done` with JSON."""
        open_return = False  # a carriage return whose line feed may come with the next piece
        for item in asked:
            if item is None:
                yield b": ping\n\n"
            elif isinstance(item[1], labs.Delta):
                text = "\r" * open_return + item[1].text
                open_return = text.endswith("\r")
                yield _data_lines(text.removesuffix("\r"))
            else:
                yield _data_lines("\n" * open_return)
                answer = {"id": req.context.id, "model": asked.name}
                answer |= {} if asked.documents is UNSET else {"documents": asked.documents}
                data = dumps({**answer, **msgspec.structs.asdict(item[1])})
                yield b"event: done\ndata: " + data + b"\n\n"


def _data_lines(text: str) -> bytes:
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return "".join(f"data: {line}\n" for line in lines).encode() + b"\n" if text else b""


class Choose(Resource):
    """POST /choose: how likely each of some answers is."""

    def on_post(self, req: falcon.Request, resp: falcon.Response) -> None:
        body, _ = self.service.read(req, ChooseRequest)
        names = ("prompt", "messages", *labs.Chat.__struct_fields__)
        prompt = {name: getattr(body, name) for name in names}
        wanted = Wanted(req, body.model, [prompt], {"max_new_tokens": 1}, req.context.began)

        def choose(name: str, engine: Any, inputs: list[labs.Inputs], generation: Any) -> Any:
            labs.need("labs_typed")
            import labs_typed

            ask = functools.partial(labs_typed.choose, engine.model, inputs[0], body.options)
            with self.service.paid(req.context.owner, len(body.options), inputs, generation):
                options = engine.call(ask)
            return ChooseAnswer(id=req.context.id, model=name, options=options)

        resp.data = dumps(at_last(self.service.use(wanted, choose)))


class ModelsListed(Resource):
    """GET /v1/models and /v1/models/{name}."""

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        resp.data = dumps(ModelList(tuple(map(self._card, self.service.configs))))

    def on_get_one(self, req: falcon.Request, resp: falcon.Response, name: str) -> None:
        if name not in self.service.configs:
            raise Problem(404, f"there is no model {name!r} here", "model_not_found", "model")
        resp.data = dumps(self._card(name))

    def _card(self, name: str) -> ModelCard:
        return ModelCard(
            id=name,
            created=self.service.created,
            context_length=self.service.models.context_length(name),
            loaded=name in self.service.models.loaded(),
        )


class OpenAI(Resource):
    """POST /v1/chat/completions and /v1/completions."""

    def __init__(self, service: Service, endpoint: labs_openai.Endpoint) -> None:
        super().__init__(service)
        self.endpoint = endpoint

    def on_post(self, req: falcon.Request, resp: falcon.Response) -> None:
        body, given = self.service.read(req, self.endpoint.request)
        if body.stream_options is not None and not body.stream:
            text = "stream_options need stream = true"
            raise Problem(400, text, "invalid_value", "stream_options")
        n, options = body.n or 1, self.endpoint.options(body, given)
        prompts = self.endpoint.prompts(body)
        format = getattr(body, "response_format", None)
        documents = getattr(body, "documents", False)
        wanted = Wanted(req, body.model, prompts, options, req.context.began, n, format, documents)
        if body.stream:
            usage = body.stream_options is not None and body.stream_options.include_usage
            frames = functools.partial(self._frames, req, n if usage else 0)
            self.service.stream(resp, wanted, frames)
            return
        asked = at_last(self.service.ask(wanted))
        answers = self.service.collect(req, asked)
        names = {**self._names(req, asked), "documents": asked.documents}
        answer = self.endpoint.answer(asked.model, answers, n, **names)
        resp.data = dumps(answer)

    def _names(self, req: falcon.Request, asked: Asked) -> dict[str, Any]:
        return {"id": req.context.id, "created": req.context.created, "model": asked.name}

    def _frames(self, req: falcon.Request, usage_of: int, asked: Asked) -> Iterator[bytes]:
        """Yield a chunk an event. usage_of: choices a prompt, where usage is asked for, else 0."""
        nothing, names = None if usage_of else msgspec.UNSET, self._names(req, asked)

        def frame(*choices: labs_openai.Choice, usage: Any = nothing, **more: Any) -> bytes:
            chunk = self.endpoint.wrap(asked.model, choices, usage=usage, **names, **more)
            return b"data: " + dumps(chunk) + b"\n\n"

        lengths: dict[int, int] = {}  # of each choice so far, in characters
        for item in asked:
            if item is None:
                yield b": ping\n\n"
                continue
            index, event = item
            if index not in lengths and (first := self.endpoint.first(index)) is not None:
                yield frame(first, documents=UNSET if lengths else asked.documents)
            offset = lengths.setdefault(index, 0)
            yield frame(self.endpoint.choice(asked.model, index, event, offset))
            lengths[index] += len(getattr(event, "text", ""))
        if usage_of:
            usages = [done.usage for done in asked.dones]
            yield frame(usage=labs_openai.usage_of(usages, usage_of))
        yield b"data: [DONE]\n\n"


class Metrics(Resource):
    """GET /metrics, for Prometheus."""

    def __init__(self, service: Service) -> None:
        super().__init__(service)
        self.public = service.config.server.public_metrics
        service.meters.registry.register(self)

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        resp.content_type = "text/plain; version=0.0.4; charset=utf-8"
        resp.data = generate_latest(self.service.meters.registry)

    def collect(self) -> Iterator[Any]:
        """Yield what the engines tell of themselves at this moment."""
        engines = self.service.models.loaded()
        found = {name: engine.status() for name, engine in engines.items()}
        for kind, name, text, field in ENGINE_METRICS:
            family = kind(f"labs_{name}", text, labels=LABEL)
            for model, status in found.items():
                family.add_metric([model], float(getattr(status, field)))
            yield family
        memory = GaugeMetricFamily("labs_gpu_memory_bytes", "Memory of the GPU", labels=["kind"])
        for kind, size in labs.gpu_memory().items():
            memory.add_metric([kind], size)
        yield memory


ENGINE_METRICS: tuple[tuple[Any, str, str, str], ...] = (
    (GaugeMetricFamily, "num_requests_running", "Requests with a row", "running"),
    (GaugeMetricFamily, "num_requests_waiting", "Requests that wait for a row", "waiting"),
    (GaugeMetricFamily, "kv_cache_usage_perc", "Share of the slots in use, 0 to 1", "cache_usage"),
    (GaugeMetricFamily, "batch_rows", "Rows that may run at once", "max_rows"),
    (GaugeMetricFamily, "engine_alive", "Whether the engine's thread runs", "alive"),
    (CounterMetricFamily, "response_cache_hits", "Answers not made anew", "response_cache_hits"),
    (CounterMetricFamily, "steps", "Decode steps", "steps"),
    (CounterMetricFamily, "out_of_memory", "Steps halved as memory ran out", "halvings"),
    (CounterMetricFamily, "engine_failures", "Forward passes that failed", "failures"),
)


class Text(Resource):
    """A constant."""

    public = True

    def __init__(self, data: bytes, content_type: str, policy: str = "default-src 'none'") -> None:
        self._data, self._type, self._policy = data, content_type, policy

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        if not req.env.get("PATH_INFO"):  # mounted, and asked for without the slash at the end
            raise falcon.HTTPMovedPermanently(f"{req.root_path}/")  # addresses are relative
        resp.data, resp.content_type = self._data, self._type
        resp.set_header("Content-Security-Policy", self._policy)
        resp.set_header("Referrer-Policy", "no-referrer")


def policy_of(page: str) -> str:
    """Return a policy under which only the page's own style and script run."""
    sources = []
    for kind, inner in re.findall(r"<(style|script)>(.*?)</\1>", page, re.DOTALL):
        digest = base64.b64encode(hashlib.sha256(inner.encode()).digest()).decode()
        sources.append(f"{kind}-src 'sha256-{digest}'; ")
    rest = "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    return f"default-src 'none'; {''.join(sources)}connect-src 'self'; img-src data:; {rest}"


# ---------------------------------------------------------------- the routes, described once


class Route(Struct, frozen=True):
    """A line of the route table, for Falcon and for /openapi.json."""

    method: Literal["get", "post"]
    path: str
    resource: Any
    summary: str
    answer: Any  # a struct, or a content type
    body: Any = None
    suffix: str | None = None


def routes(service: Service) -> tuple[Route, ...]:
    alive, generate, models = Alive(service), Generate(service), ModelsListed(service)
    chat, completions = OpenAI(service, labs_openai.CHAT), OpenAI(service, labs_openai.COMPLETIONS)
    metrics, events = Metrics(service), "text/event-stream"
    made, asked = labs_openai.OpenAIAnswer, labs.GenerateRequest
    return (
        Route("get", "/health", alive, "The process answers", Health),
        Route("get", "/livez", alive, "The same", Health),
        Route("get", "/readyz", Ready(service), "The model is loaded and answers", Health),
        Route("post", "/generate", generate, "Generate text", GenerateAnswer, asked),
        Route("post", "/generate/stream", generate, "The same streamed", events, asked, "stream"),
        Route("post", "/explain", generate, "How it would run", labs.Explanation, asked, "explain"),
        Route("post", "/choose", Choose(service), "Choose", ChooseAnswer, ChooseRequest),
        Route("get", "/v1/models", models, "The models served", ModelList),
        Route("get", "/v1/models/{name:path}", models, "One of them", ModelCard, None, "one"),
        Route("post", "/v1/chat/completions", chat, "OpenAI's chat", made, chat.endpoint.request),
        Route(
            "post",
            "/v1/completions",
            completions,
            "OpenAI's legacy",
            made,
            completions.endpoint.request,
        ),
        Route("get", "/metrics", metrics, "Figures for Prometheus", "text/plain"),
    )


def openapi(service: Service, table: tuple[Route, ...]) -> dict[str, Any]:
    """Return the OpenAPI 3.1 document of the routes, made from the structs."""
    kinds = [route.body for route in table if route.body] + [labs_openai.Error]
    kinds += [route.answer for route in table if isinstance(route.answer, type)]
    reference = "#/components/schemas/{name}"
    _, schemas = msgspec.json.schema_components(dict.fromkeys(kinds), ref_template=reference)
    paths: dict[str, Any] = {}
    for route in table:
        path = route.path.replace(":path", "")
        paths.setdefault(path, {})[route.method] = _operation(route)
    scheme = {"bearer": {"type": "http", "scheme": "bearer"}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "labs", "version": labs.__version__},
        "paths": paths,
        "components": {"schemas": schemas, "securitySchemes": scheme},
        "security": [{"bearer": []}] if service.config.api_keys else [],
    }


def _operation(route: Route) -> dict[str, Any]:
    def content(kind: Any) -> dict[str, Any]:
        if isinstance(kind, str):
            return {kind: {}}
        schema = {"$ref": f"#/components/schemas/{kind.__name__}"}
        return {"application/json": {"schema": schema}}

    answer = content(route.answer)
    if route.answer is labs_openai.OpenAIAnswer:
        answer |= content("text/event-stream")
    refused = {"description": "Refused", "content": content(labs_openai.Error)}
    found: dict[str, Any] = {
        "summary": route.summary,
        "responses": {"200": {"description": "Done", "content": answer}, "default": refused},
    }
    if route.path == "/readyz":
        found["responses"]["503"] = {"description": "Not ready", "content": content(Health)}
    if route.body is not None:
        found["requestBody"] = {"required": True, "content": content(route.body)}
    if "{" in route.path:
        string = {"type": "string", "minLength": 1}
        found["parameters"] = [{"name": "name", "in": "path", "required": True, "schema": string}]
    if route.resource.public:
        found["security"] = []
    return found


def docs(document: dict[str, Any]) -> str:
    """Return the document as a page that asks for nothing else."""
    routes = [
        f"<dt>{method.upper()} {html.escape(path)}</dt><dd>{html.escape(operation['summary'])}</dd>"
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
    ]
    schemas = html.escape(json.dumps(document["components"]["schemas"], indent=2))
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>labs API</title>'
        "<style>:root{color-scheme:light dark}body{font:16px/1.5 system-ui;max-width:50rem;"
        "margin:2rem auto;padding:0 1rem}dt{font-weight:600}</style><h1>labs API</h1>"
        f'<p><a href="openapi.json">openapi.json</a></p><dl>{"".join(routes)}</dl>'
        f"<h2>Schemas</h2><pre>{schemas}</pre>"
    )


def create_app(
    config: labs.Config,
    *,
    engine_for: EngineFor | None = None,
    quotas: Quotas | None = None,
    registry: CollectorRegistry | None = None,
) -> falcon.App[Any, Any]:
    """Return the WSGI app. Without `engine_for` models are loaded in the background.

    engine_for: called with a configured name; returns an engine, or raises labs_engine.Busy.
    quotas, registry: by default this app's alone.
    """
    quotas = quotas or quotas_of(config)
    models: Any = engine_for
    if engine_for is None:
        models = labs_models.Models(config)
    elif not isinstance(engine_for, labs_models.Models):
        models = Brought(engine_for, config.model_id)
    service = Service(config, models, quotas.tokens, registry or CollectorRegistry())
    app = falcon.App(middleware=[Gate(config, quotas.requests)])
    if config.server.allow_origins:
        origins = config.server.allow_origins
        app.add_middleware(falcon.CORSMiddleware("*" if "*" in origins else origins))
    table = routes(service)
    for route in table:
        app.add_route(
            route.path, route.resource, **({"suffix": route.suffix} if route.suffix else {})
        )
    document = openapi(service, table)
    app.add_route("/openapi.json", Text(dumps(document), "application/json"))
    for path, page in (("/docs", docs(document)), ("/", PAGE)):
        app.add_route(path, Text(page.encode(), "text/html; charset=utf-8", policy_of(page)))
    app.add_error_handler(Exception, _tell)
    app.add_error_handler(falcon.HTTPError, _tell)  # else Falcon's own handler comes first
    return app


def _tell(req: falcon.Request, resp: falcon.Response, error: Exception, params: Any) -> None:
    """Answer with the error, in one shape everywhere."""
    if isinstance(error, ClientGone):
        resp.status = "499 Client Closed Request"
        return
    problem = as_problem(error, req.context.id)
    resp.status, resp.data = falcon.code_to_http_status(problem.status), dumps(problem.error)
    resp.content_type = falcon.MEDIA_JSON
    if isinstance(error, falcon.HTTPError):
        resp.set_headers(error.headers or {})
    if problem.retry_after_s is not None:
        resp.set_header("Retry-After", str(math.ceil(problem.retry_after_s)))
    if problem.status == 401:
        resp.set_header("WWW-Authenticate", "Bearer")


# ---------------------------------------------------------------- serving


def threads_for(config: labs.Config) -> int:
    """Return how many threads are enough, as each open request holds one."""
    server, models = config.server, len({config.model_id, *config.models})
    rows = (server.max_batch_rows or ROWS) + server.max_waiting
    waiting = server.max_waiting * (models > 1)  # for a model
    return min(server.max_loaded_models, models) * rows + waiting + 8


def make_server(app: Any, config: labs.Config) -> Any:
    """Return waitress, listening."""
    labs.need("waitress")
    from waitress.server import create_server

    server = config.server
    waiting = create_server(
        app,
        host=_address(server.host),
        port=server.port,
        threads=threads_for(config),
        channel_request_lookahead=1,  # sees who hangs up while its request runs
        asyncore_use_poll=True,  # select() dies at 1,024 descriptors
        connection_limit=server.max_connections,
        channel_timeout=30,
        cleanup_interval=5,
        max_request_body_size=server.max_body_bytes + 2**20,  # above ours, which answers in JSON
        max_request_header_size=32_768,
        outbuf_high_watermark=2**20,
        clear_untrusted_proxy_headers=True,
        ident=None,
    )
    waiting.adj.socket_options = _socket_options()
    _cut_slow_senders(waiting)
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


def _cut_slow_senders(server: Any) -> None:
    """Close connections that take longer than SENDING_S to send one request.

    waitress's channel_timeout begins anew with every byte.
    """
    begun: weakref.WeakKeyDictionary[Any, float] = weakref.WeakKeyDictionary()
    maintenance = server.maintenance

    def maintain(now: float) -> None:
        maintenance(now)
        for channel in list(server.active_channels.values()):
            part = channel.request
            if part is not None and not channel.requests:
                channel.will_close |= now - begun.setdefault(part, now) > SENDING_S

    server.maintenance = maintain


def drain(server: Any, models: labs_models.Models, deadline_s: float) -> None:
    """Take no more connections, let answers end until the deadline, then let `run` return."""

    def stop_accepting() -> None:
        server.accepting = False
        server.del_channel()
        server.socket.close()

    server.trigger.pull_trigger(stop_accepting)
    models.close(deadline_s)
    end = time.monotonic() + 2
    while time.monotonic() < end and any(
        channel.requests or channel.total_outbufs_len for channel in server.active_channels.values()
    ):
        time.sleep(0.02)
    # Without channels waitress's loop ends; it would swallow an exception raised in a thunk.
    server.trigger.pull_trigger(server._map.clear)


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


def serve(config: labs.Config) -> None:
    """Serve until SIGTERM or Ctrl-C; answers under way may end until server.drain_s is over."""
    check_exposure(config)
    logging.basicConfig(format="%(message)s", stream=sys.stderr, level=logging.INFO)
    logging.getLogger("waitress").setLevel(logging.ERROR)
    models = labs_models.Models(config, start=False)
    app = create_app(config, engine_for=models)
    try:
        server = make_server(app, config)
    except OSError as error:
        raise cannot_listen(config.server, error) from error
    arguments = (server, models, config.server.drain_s)
    stopping = threading.Thread(target=drain, args=arguments, daemon=True)

    def stop(*_: Any) -> None:
        if stopping.ident:  # somebody does not want to wait
            raise KeyboardInterrupt
        stopping.start()

    url = url_of(server.effective_host, server.effective_port)
    announcing = threading.Thread(target=_announce, args=(models, stop), daemon=True)
    try:
        with contextlib.suppress(KeyboardInterrupt):  # it may come before waitress takes it
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, stop)
            print(f"labs-api: {url} (loading {config.model_id})", file=sys.stderr)
            models.start()
            announcing.start()
            server.run()
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)  # what follows takes a moment only
        models.close()  # no thread may be in torch while the interpreter ends
    if models.failed:  # the log has told why
        sys.exit(1)


def _announce(models: labs_models.Models, stop: Callable[[], None]) -> None:
    try:
        engine = models.wait()
    except labs_engine.Busy:  # it is shutting down
        return
    except labs.LabsError:
        stop()
        return
    model = engine.model
    print(
        f"labs-api: ready after {model.load_s:.1f} s ({model.device}, {model.dtype}, "
        f"{engine.max_rows} rows)",
        file=sys.stderr,
    )


def run(**flags: Any) -> None:
    """Serve a Hugging Face instruct model over HTTP: REST, SSE and OpenAI's endpoints."""
    import labs_cli

    labs_cli.check_needs(flags, labs_cli.RAY_NEEDS)
    address, cluster = labs_cli.take_ray(flags)
    overrides = {key: value for key, value in flags.items() if value not in (None, ())}
    path = overrides.pop("config", None)
    config = labs.load_config(path, overrides=overrides)
    if config.documents.database is not None:
        labs.need("labs_rag")
        import labs_rag

        labs_rag.check(config, labs_rag.encoder_of(config))
    if address is None:
        serve(config)
        return
    labs.need("labs_ray", "ray", "a2wsgi")
    import labs_ray

    labs_ray.serve_replicas(config, address, labs_ray.cluster_of(cluster))


def main() -> None:
    """Run labs-api as a program."""
    try:
        labs.need("labs_cli")
    except labs.ConfigError as error:
        sys.exit(f"Error: {error}")
    import labs_cli

    options = (("Server", "--config", str, "The file of settings [default: ./labs.toml]."),)
    labs_cli.start("labs-api", run, (*options, *labs_cli.RAY, *labs_cli.STICKY), EPILOG)


EPILOG = """\b
Examples:
  labs-api
  labs-api --port 8080 --model your-org/your-model --max-batch-rows 32
  LABS_API_KEYS=$(openssl rand -hex 24) labs-api --host 0.0.0.0
  labs-api --ray --replicas 2

\b
Keys come from LABS_API_KEYS (commas between) or --api-keys-file FILE, never
from a flag. Settings can also stand in labs.toml, .env and the environment
(LABS_SERVER_PORT for --port). SIGTERM lets answers under way end.
"""


PAGE = r"""<!doctype html><html lang="en"><meta charset="utf-8"><title>labs</title>
<meta name="viewport" content="width=device-width"><link rel="icon" href="data:,"><style>
:root { color-scheme: light dark; background: light-dark(#faf9f6, #16181c) }
* { box-sizing: border-box; font: inherit } h1 { flex: 1; margin: 0; font-weight: 650 }
body { display: flex; flex-direction: column; height: 100dvh; margin: 0; font: 16px/1.6 system-ui }
body > :not(main), #log { width: min(100%, 46rem); margin: 0 auto auto; padding: .5rem 1rem }
main { flex: 1; overflow: auto; display: flex; flex-direction: column-reverse } /* keeps its end */
header, footer { display: flex; align-items: center; gap: .6rem } select { min-width: 0 }
form { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.6rem, 1fr)); gap: .6rem }
input, select, textarea, button { padding: 6px 11px; border: 1px solid #8886; border-radius: 9px }
input, textarea { width: 100%; max-height: 30dvh; resize: none; field-sizing: content }
article { margin: 1rem 0; white-space: pre-wrap; overflow-wrap: anywhere } button { flex: none }
.user { margin-left: 15%; padding: .5rem .9rem; border-radius: 1rem; background: #4f83e82b }
small { display: block; font-size: 14px; opacity: .8 } .error { color: light-dark(#b22, #f99) }
#send { background: #2b5fc7; color: #fff } .model:empty::after { content: "…" }
</style><header><h1>labs</h1><select id="model" aria-label="Model"></select>
<button id="fresh">New chat</button></header><details id="panel">
<summary>Settings <span id="notice" class="error" role="status"></span></summary>
<form id="settings"><label>System message<textarea name="system"></textarea></label>
<label>max_tokens<input type="number"></label><label>top_p<input type="number" step="any"></label>
<label>temperature<input type="number" step="any"></label><label>seed<input type="number"></label>
<label>API key<input name="key" type="password" autocomplete="off"></label></form></details>
<main><div id="log" role="log"></div></main><footer><textarea id="text" aria-label="Message"
autofocus></textarea><button id="send">Send</button></footer><script>
const [model, fresh, panel, notice, settings, log, text, send] = document.querySelectorAll("[id]");
const { key, system } = settings.elements; let turns = [], request;
const add = (parent, tag, className, textContent) =>  // as text, whatever it looks like
  parent.appendChild(Object.assign(document.createElement(tag), { className, textContent }));
async function call(path, options) {
  const headers = { Authorization: `Bearer ${key.value}`, "Content-Type": "application/json" };
  const response = await fetch(path, { ...options, headers });
  if (response.ok) return response;
  panel.open ||= response.status === 401;
  throw Error((await response.json().catch(() => 0)).error?.message ?? `HTTP ${response.status}`);
}
const list = () => call("v1/models").then((response) => response.json()).then(({ data }) => {
  model.replaceChildren(...data.map(({ id }) => new Option(id))); notice.textContent = "";
}).catch((error) => { notice.textContent = error.message; });
async function* events({ body }) {  // the data of each line, however the bytes are cut
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  for (let part, lines = [""]; !(part = await reader.read()).done;) {
    lines = (lines.pop() + part.value).split(/\r\n|\r|\n/);
    for (const line of lines.slice(0, -1)) if (line.startsWith("data:")) yield line.slice(5).trim();
  }
}
async function ask() {
  const content = text.value, chat = turns, started = performance.now();
  if (request || !content.trim()) return;
  chat.push({ role: "user", content });
  const sent = { stream: true, stream_options: { include_usage: true } };
  if (model.value) sent.model = model.value;  // else the names have not come yet
  sent.messages = system.value ? [{ role: "system", content: system.value }, ...chat] : chat;
  for (const { valueAsNumber: value, labels } of settings)
    if (isFinite(value)) sent[labels[0].textContent] = value;
  const question = add(log, "article", "user", content), answer = add(log, "article", "model", "");
  let problem = "the connection broke off", notes = [];
  request = new AbortController(); send.textContent = "Stop"; text.value = "";
  try {
    const options = { method: "POST", body: JSON.stringify(sent), signal: request.signal };
    for await (const data of events(await call("v1/chat/completions", options))) {
      if (data === "[DONE]") { problem = ""; break; }
      const { error, choices: [choice] = [], usage } = JSON.parse(data);
      if (error) throw Error(error.message);
      answer.append(choice?.delta.content ?? "");
      if (choice?.finish_reason === "length") notes.push("cut at max_tokens");
      const count = usage?.completion_tokens, seconds = (performance.now() - started) / 1000;
      if (usage) notes.push(`${count} tokens, ${(count / seconds).toFixed(1)} tokens/s`);
    }
  } catch (error) { problem = request.signal.aborted ? "stopped" : error.message; }
  if (answer.textContent || !problem) chat.push({ role: "assistant", content: answer.textContent });
  else { chat.pop(); question.remove(); text.value ||= content; }
  add(answer, "small", problem && "error", [...notes, problem].filter(Boolean).join(" · "));
  request = null; send.textContent = "Send";
}
text.onkeydown = (event) =>  // false keeps the line end out of the text
  event.key !== "Enter" || event.shiftKey || event.isComposing || !ask();
send.onclick = () => { if (request) request.abort(); else ask(); };
fresh.onclick = () => { request?.abort(); turns = []; log.replaceChildren(); text.focus(); };
key.onchange = () => { sessionStorage.setItem("key", key.value); list(); };
key.value = sessionStorage.getItem("key") ?? ""; list();
</script>
"""


if __name__ == "__main__":
    main()
