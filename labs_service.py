# SPDX-License-Identifier: Apache-2.0
"""A request over HTTP: read, checked, its model leased, its answers collected or streamed.

    request = service.check(endpoint.request_of(*service.read(req, endpoint.body)))
    answers, found = service.collect(req, request)      # or service.stream(req, resp, request, …)

All resources share one Service: a request is read and checked, `lease` waits for its model,
`submit` hands it to the engine, and the engine's events become the response. An exception becomes a
Problem, and that the body of an error in the format of the path's protocol.

Needs labs_desk.py, labs_engine.py, labs_gate.py, labs_kinds.py, labs_messages.py, labs_meters.py,
labs_models.py, labs_openai.py, labs_request.py, labs_responses.py and labs_answers.py with what
those need; falcon, prometheus-client.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import math
import threading
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any, NamedTuple, TypeVar

import falcon
import msgspec
from msgspec import Struct
from prometheus_client import CollectorRegistry

import labs
import labs_desk
import labs_engine
import labs_gate
import labs_kinds
import labs_messages
import labs_meters
import labs_models
import labs_openai
import labs_patterns
import labs_protocol
import labs_ready
import labs_request
import labs_responses
import labs_turns
from labs_answers import Answers, Frames

log = logging.getLogger("labs.api")
POLL_S = 0.05  # a waiting request checks this often whether its client is still connected
LOADING_S = 1.0  # a stream whose model is loading sends a comment this often
OK = b": ok\n\n"  # a comment that sends the headers before the model has read the prompt
S = TypeVar("S", bound=Struct)


# ---------------------------------------------------------------- errors


def as_problem(error: BaseException, request_id: str) -> labs_gate.Problem:
    """Map an exception to a Problem; details that a client cannot act on are only logged."""
    if isinstance(error, labs_gate.Problem):
        return error
    if isinstance(error, labs_engine.Busy):
        return labs_gate.Problem(503, str(error), "overloaded", retry_after_s=1)
    if isinstance(error, labs_models.NotLoaded):
        wait_s = labs_models.RETRY_S
        return labs_gate.Problem(503, str(error), "model_not_loaded", retry_after_s=wait_s)
    if isinstance(error, labs.InputError | labs.ConfigError):  # a request can cause either
        status = getattr(error, "status", 400)
        return labs_gate.Problem(status, str(error), *labs_protocol.code_and_param(error))
    if isinstance(error, falcon.HTTPError):
        status, text = falcon.http_status_to_code(error.status), error.description or error.title
        if status == 405:
            text += f"; use {dict(error.headers or {}).get('Allow')}"
        return labs_gate.Problem(status, text, _code(error.title))
    log.error("request %s failed", request_id, exc_info=error)
    text = f"Internal server error; look for {request_id} in the server's log."
    return labs_gate.Problem(500, text, "failed")


def _code(title: str) -> str:
    return title.partition(" ")[2].lower().replace(" ", "_") or "refused"


def protocol_of(path: str, version: str | None = None) -> labs_protocol.Endpoint:
    """Return an endpoint of the protocol in whose format the errors of a path are.

    version: the header anthropic-version, by which Anthropic's clients are known.
    """
    models = path.startswith("/v1/models") and version is not None
    ours = path.startswith(labs_messages.PATH) or models
    others = labs_responses.ENDPOINTS.get(path, labs_openai.CHAT)
    return labs_messages.MESSAGES if ours else others


def error_of(
    problem: labs_gate.Problem, path: str, version: str | None = None, request_id: str | None = None
) -> bytes:
    """Return a problem as the body of a response. version: as for protocol_of."""
    found = protocol_of(path, version).error_of(*fields_of(problem))
    if "request_id" in found.__struct_fields__:
        found = msgspec.structs.replace(found, request_id=request_id)
    return labs_protocol.dumps(found)


def error_event(problem: labs_gate.Problem, path: str) -> bytes:
    """Return a problem as the last event of a stream that something else than it had begun."""
    return protocol_of(path).failure(*fields_of(problem))


def fields_of(problem: labs_gate.Problem) -> tuple[int, str, str, str | None]:
    """Return the status, message, code and param of a problem."""
    return problem.status, str(problem), problem.code, problem.param


def answer_error(req: falcon.Request, resp: falcon.Response, error: Exception, _: Any) -> None:
    """Answer with the error as JSON, in the format of the path's protocol."""
    if isinstance(error, labs_turns.ClientGone):
        resp.status = "499 Client Closed Request"
        return
    problem = as_problem(error, req.context.id)
    resp.status = falcon.code_to_http_status(problem.status)
    version, request_id = req.get_header("anthropic-version"), req.context.id
    resp.data = error_of(problem, req.path, version, request_id)
    resp.content_type = falcon.MEDIA_JSON
    resp.set_header(protocol_of(req.path, version).id_header, request_id)
    if isinstance(error, falcon.HTTPError):
        resp.set_headers(error.headers or {})
    if problem.retry_after_s is not None:
        resp.set_header("Retry-After", str(math.ceil(problem.retry_after_s)))
    if problem.status == 401:
        resp.set_header("WWW-Authenticate", "Bearer")


# ---------------------------------------------------------------- from a request to its answers


class Lease(NamedTuple):
    """An engine that stays loaded for one request until its name is released."""

    name: str
    engine: labs_engine.AnyEngine


class Service:
    """The state that all resources share: the context of requests, engines, quotas and meters."""

    def __init__(
        self,
        config: labs.Config,
        models: labs_models.Models | labs_models.One,
        quota: labs_gate.Quota,
        registry: CollectorRegistry,
    ) -> None:
        self.meters = labs_meters.Meters(registry)
        self.context = labs_request.open_context(config, tell=self.meters.acted)
        models = models.under(config.model_id, self.context.config.model_id)
        config = self.context.config  # with the short name of its model
        self.config, self.models = config, models
        labs_request.check_documents(self.context)
        labs_patterns.check(config.router)
        self.kinds = labs_kinds.Kinds(config, self.context.encoder)
        held = (self.context.filters, self.context.encoder)  # each may have loaded a model
        models.account(lambda: sum(getattr(each, "nbytes", 0) for each in held))
        self._tokens = quota
        self._waiting = threading.Semaphore(max(1, config.server.max_waiting))
        self.created = int(time.time())

    # ------------------------------------------------------------ before the model is loaded

    def gone(self, req: falcon.Request) -> Callable[[], bool | None]:
        """Return labs_wire's probe of the client. Raises ClientGone if the client has left."""
        gone: Callable[[], bool | None] = req.env.get("waitress.client_disconnected", lambda: False)
        if gone():
            raise labs_turns.ClientGone
        return gone

    def read(
        self, req: falcon.Request, kind: type[S], fields: labs_protocol.Fields | None = None
    ) -> tuple[S, dict[str, Any]]:
        """Return the body as `kind`, and the fields that the body sets with their values."""
        self.gone(req)
        if (req.content_type or "").partition(";")[0].strip().lower() != "application/json":
            raise labs_gate.Problem(415, "Content-Type must be application/json", "not_json")
        if (coding := req.get_header("Content-Encoding") or "identity").lower() != "identity":
            text = f"Content-Encoding: {coding} is not supported; send the body uncompressed"
            raise labs_gate.Problem(415, text, "unsupported_encoding", "Content-Encoding")
        if (req.content_length or 0) > (limit := self.config.server.max_body_bytes):
            raise labs_gate.Problem(413, f"the body has more than {limit} bytes", "body_too_large")
        return labs_protocol.read(req.bounded_stream.read(), kind, fields)

    def check(self, request: labs_request.Request) -> labs_request.Request:
        """Refuse every request that can be refused without a model."""
        labs_gate.check_sizes(self.config.server, request)
        return labs_request.check(self.context, request)

    # ------------------------------------------------------------ waiting for the model

    def lease(self, req: falcon.Request, request: labs_request.Request) -> Iterator[Lease | None]:
        """Yield None while the model of a checked request is being loaded, then its lease.

        A waiting request occupies a server thread, so a semaphore limits how many wait.
        """
        gone, waits, name = self.gone(req), False, None
        try:
            while True:
                try:
                    name = name or self.name_of(request)
                    found = Lease(name, self.models(name))
                    break
                except labs_models.Loading as loading:
                    waits = waits or self._waiting.acquire(blocking=False)
                    if not waits or self._is_late(req, request, name):
                        raise
                    loading.wait(POLL_S)
                if gone():
                    raise labs_turns.ClientGone
                yield None
        finally:
            if waits:
                self._waiting.release()
        yield found

    def leased(self, req: falcon.Request, request: labs_request.Request) -> Lease:
        """Wait for the model of a checked request."""
        return next(filter(None, self.lease(req, request)))

    def _is_late(self, req: falcon.Request, request: labs_request.Request, name: Any) -> bool:
        """Return whether the request's timeout_s has passed since the request arrived."""
        configured = self.context.configs[name or self.config.model_id].generation.timeout_s
        limit_s = request.options.get("timeout_s", configured)
        return limit_s is not None and time.perf_counter() > req.context.began + limit_s

    def name_of(self, request: labs_request.Request) -> str:
        """Return the model that the request names or, for "auto", that the router's rules choose.

        If a rule needs the prompt's length, the default model's tokenizer counts the tokens.
        """
        default = self.config.model_id
        if request.model != "auto" or not self.config.router.rules:
            return request.model or default

        @functools.cache
        def count() -> int:
            model = self.models.reader(default)
            lengths = (len(each.ids or self._read_by(model, each)) for each in request.prompts)
            return max(lengths, default=0)

        text = "\n".join(prompt.text for prompt in request.prompts)
        return labs_models.route(self.config.router, text, count) or default

    def _read_by(self, model: labs.Model, prompt: labs_request.Prompt) -> tuple[int, ...]:
        """Return the tokens of a prompt; a model that cannot show its tools reads the rest."""
        try:
            return labs_request.build(self.config, model, prompt).input_ids
        except labs.InputError:
            rest = {"tools": (), "template_options": None, "effort": None}
            prompt = msgspec.structs.replace(prompt, **rest)
            return labs_request.build(self.config, model, prompt).input_ids

    # ------------------------------------------------------------ with the model

    @contextlib.contextmanager
    def prepared(
        self, request: labs_request.Request, lease: Lease
    ) -> Iterator[labs_request.Prepared]:
        """Prepare a request for its leased model, and release the model at the end."""
        try:
            config = self.context.configs[lease.name]
            yield labs_request.prepare(self.context, config, lease.engine.model, request)
        finally:
            self.models.release(lease.name)

    @contextlib.contextmanager
    def charged(self, owner: str, n: int, prepared: labs_request.Prepared) -> Iterator[None]:
        """Charge the owner for n answers per prompt, see `charge`."""
        rows = [prepared.ready(place, 0) for place in range(len(prepared.inputs))]
        made = 0 if prepared.request.only_echo else 1
        cost = n * sum(len(r.inputs.input_ids) + made * r.generation.max_new_tokens for r in rows)
        with self.charge(owner, cost if prepared.choice is None else prepared.choice.tokens):
            yield

    @contextlib.contextmanager
    def charge(self, owner: str, cost: int) -> Iterator[None]:
        """Charge the owner for these tokens, or raise Problem; an error inside refunds."""
        if cost > (most := self._tokens.per_minute or cost):
            text = f"this request may use {cost} tokens; the quota is {most} a minute"
            raise labs_gate.Problem(400, text, "quota")
        if wait := self._tokens.take(owner, cost):
            text = f"this request may use {cost} tokens, more than is left of {most} a minute"
            raise labs_gate.over_quota(text, wait)
        try:
            yield
        except BaseException:
            self._tokens.take(owner, -cost)
            raise

    @contextlib.contextmanager
    def turn(self, req: falcon.Request, name: str) -> Iterator[labs_desk.Turn]:
        """Wait for a model of another kind than text, and for the request's turn with it."""
        gone, timeout_s, lease = self.gone(req), self.kinds.timeout_s(name), None
        desk: Any = self.kinds.own(name)
        try:
            if desk is None:
                lease = self.leased(req, labs_request.Request(prompts=(), model=name))
                desk = lease.engine
            if not isinstance(desk, labs_desk.Desk):
                raise labs_models.NotLoaded(f"{name} is not loaded here")
            with desk.turn(gone, timeout_s, req.context.owner) as turn:
                yield turn
        finally:
            if lease is not None:
                self.models.release(name)

    def submit(self, req: falcon.Request, request: labs_request.Request, lease: Lease) -> Answers:
        """Submit each prompt n times; the engine accepts all of them or none."""
        owner, began = req.context.owner, req.context.began
        with self.prepared(request, lease) as prepared:
            labs_gate.check_room(lease.engine.status(), request)
            generation = labs_turns.in_time_left(prepared.generation, began)
            prepared = msgspec.structs.replace(prepared, generation=generation)
            answers = Answers(lease.name, prepared, self.meters, began, self.gone(req))
            rest, filters = {"owner": owner, "events": answers.events}, self.context.filters
            try:
                with self.charged(owner, request.n, prepared):
                    for ready in prepared.answers():
                        answers.add(_begin(lease.engine, prepared, ready, rest), ready, filters)
            except BaseException:
                answers.close()
                raise
            return answers

    # ------------------------------------------------------------ answering

    def collect(
        self, req: falcon.Request, request: labs_request.Request
    ) -> tuple[Answers, list[labs_ready.Found]]:
        """Wait for a checked request's answers and return them whole, in the order of choices."""
        answers = self.submit(req, request, self.leased(req, request))
        try:
            return answers, answers.whole()
        finally:
            answers.close()
            req.context.record = answers.record()

    def stream(
        self,
        req: falcon.Request,
        resp: falcon.Response,
        request: labs_request.Request,
        events: labs_protocol.Stream,
    ) -> None:
        """Answer with server-sent events; an error after the first frame becomes an event."""
        frames = self._frames(req, request, events)
        first = next(frames)  # a refusal up to here still gets its own HTTP status

        def close() -> None:
            with contextlib.suppress(ValueError):  # at exit a thread may still run the generator
                frames.close()
            labs_gate.log_request(req, 200)
            req.context.leave()

        resp.content_type = "text/event-stream; charset=utf-8"
        resp.set_header("Cache-Control", "no-cache")
        resp.set_header("X-Accel-Buffering", "no")
        rest = _ending_in_error(frames, events, req.context.id)
        resp.stream = Frames(itertools.chain([first], rest), close)

    def _frames(
        self,
        req: falcon.Request,
        request: labs_request.Request,
        events: labs_protocol.Stream,
    ) -> Generator[bytes, None, None]:
        """Yield comments while the model is being loaded, then the frames of the answers.

        The first comment sends the headers, once the request is accepted or has to wait.
        """
        began, commented = time.perf_counter(), -math.inf
        for lease in self.lease(req, request):
            if lease is not None:
                answers = self.submit(req, request, lease)
            elif (now := time.perf_counter()) > commented + LOADING_S:
                waited = f": loading the model for {now - began:.0f} s\n\n"
                yield OK if commented < 0 else waited.encode()
                commented = now
        del lease  # a long answer must not keep a reference to the model
        try:
            if commented < 0:
                yield OK
            yield from _events(answers, events, req)
        finally:
            answers.close()
            req.context.record = answers.record()


def _begin(
    engine: labs_engine.AnyEngine,
    prepared: labs_request.Prepared,
    ready: labs_ready.Ready,
    rest: dict[str, Any],
) -> labs_engine.Answer:
    """Submit one answer, or what has to be computed for it first. rest: owner and events."""
    given, processors = (ready.inputs, ready.generation), ready.processors()
    work = ready.echo and ready.echo.work
    work = work if prepared.choice is None else prepared.choice.parts
    if work is None:
        return engine.submit(*given, processors=processors, **rest)
    stream = engine.open(*given, rest["owner"], processors)
    return engine.take_in(stream, rest["events"], work)


def _events(answers: Answers, events: labs_protocol.Stream, req: falcon.Request) -> Iterator[bytes]:
    yield from events.begin(answers.opened(req.context.id, req.context.created))
    for item in answers:
        yield from [events.ping] if item is None else events.take(*item)
    yield from events.end(answers.dones)


def _ending_in_error(
    frames: Iterator[bytes], events: labs_protocol.Stream, request_id: str
) -> Iterator[bytes]:
    try:
        yield from frames
    except labs_turns.ClientGone:
        return
    except Exception as error:
        yield events.failed(*fields_of(as_problem(error, request_id)))


# ---------------------------------------------------------------- resources


class Resource:
    public = False  # True: needs no API key
    quiet = False  # True: its requests are not logged

    def __init__(self, service: Service) -> None:
        self.service = service
