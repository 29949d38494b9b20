# SPDX-License-Identifier: Apache-2.0
"""Answer HTTP requests with labs, as a WSGI app; concurrent requests share one batch.

    GET  /health /livez /readyz      whether the process is alive, and the model ready
    POST /generate                   generate from a prompt or messages, with any setting
    POST /generate/stream            the same as server-sent events
    POST /explain                    what a request would run with, without running it
    POST /choose                     the probability of each of several given answers
    GET  /v1/models                  OpenAI's endpoints
    POST /v1/chat/completions /v1/completions /v1/responses
    POST /v1/messages /v1/messages/count_tokens          Anthropic's
    GET  /metrics /openapi.json /docs /

`create_app(config, models)` returns a WSGI callable that any server can mount; labs_serve.py serves
it. A parameter takes effect or is refused by name. A request is read and checked, `lease` waits for
its model, `submit` hands it to the engine, and the engine's events become the response.

Needs labs_engine.py, labs_gate.py, labs_messages.py, labs_meters.py, labs_models.py,
labs_openai.py, labs_pages.py, labs_request.py, labs_responses.py and labs_tokens.py with what
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
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

import falcon
import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType
from prometheus_client import CollectorRegistry, generate_latest

import labs
import labs_engine
import labs_explain
import labs_gate
import labs_message_events
import labs_message_models
import labs_messages
import labs_meters
import labs_models
import labs_openai
import labs_pages
import labs_parts
import labs_patterns
import labs_protocol
import labs_ready
import labs_replies
import labs_request
import labs_response_items
import labs_responses
import labs_turns
from labs_answers import Answers, Frames

log = logging.getLogger("labs.api")
POLL_S = 0.05  # a waiting request checks this often whether its client is still connected
LOADING_S = 1.0  # a stream whose model is loading sends a comment this often
PATHS = ("cache_dir", "model_name")  # settings that hold paths of the server, hidden from clients
OK = b": ok\n\n"  # a comment that sends the headers before the model has read the prompt
S = TypeVar("S", bound=Struct)


# ---------------------------------------------------------------- requests and responses


class ChooseRequest(labs.Strict, frozen=True, kw_only=True):
    """A prompt or messages, and the answers whose probabilities are compared."""

    options: Annotated[tuple[labs.Stop, ...], Meta(min_length=2, max_length=64)]
    timeout_s: labs.Seconds | None = None
    model: str | None = None
    prompt: str | None = None
    messages: tuple[labs.Message, ...] | None = None
    use_chat_template: bool | None = None
    add_generation_prompt: bool | None = None
    template_options: dict[str, Any] | None = None


class GenerateAnswer(labs.Completion, frozen=True, kw_only=True):
    id: str
    model: str
    documents: tuple[labs.Source, ...] | UnsetType = UNSET
    reasoning: str | UnsetType = UNSET
    tool_calls: tuple[labs.ToolCall, ...] | UnsetType = UNSET


class ChooseAnswer(Struct, frozen=True, kw_only=True):
    """The response of /choose. options: the probability of each; all of them sum to 1."""

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
        self.config, self.models = config, models
        self.meters = labs_meters.Meters(registry)
        self.context = labs_request.open_context(config, tell=self.meters.acted)
        labs_request.check_documents(self.context)
        labs_patterns.check(config.router)
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
                    name = name or self._name(request)
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

    def _name(self, request: labs_request.Request) -> str:
        """Return the model that the request names or, for "auto", that the router's rules choose.

        If a rule needs the prompt's length, the default model's tokenizer counts the tokens.
        """
        default = self.config.model_id
        if request.model != "auto" or not self.config.router.rules:
            return request.model or default

        @functools.cache
        def count() -> int:
            model = self.models.reader(default)
            return max(len(each.ids or self._read_by(model, each)) for each in request.prompts)

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
        """Charge the owner for n answers per prompt, or raise Problem; an error inside refunds."""
        rows = [prepared.ready(place, 0) for place in range(len(prepared.inputs))]
        cost = n * sum(len(r.inputs.input_ids) + r.generation.max_new_tokens for r in rows)
        cost = cost if prepared.choice is None else prepared.choice.tokens
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

    def submit(self, req: falcon.Request, request: labs_request.Request, lease: Lease) -> Answers:
        """Submit each prompt n times; the engine accepts all of them or none."""
        owner, began = req.context.owner, req.context.began
        with self.prepared(request, lease) as prepared:
            labs_gate.check_room(lease.engine.status(), request)
            generation = labs_turns.in_time_left(prepared.generation, began)
            prepared = msgspec.structs.replace(prepared, generation=generation)
            answers = Answers(lease.name, prepared, self.meters, began, self.gone(req))
            rest = {"owner": owner, "events": answers.events}
            try:
                with self.charged(owner, request.n, prepared):
                    for ready in prepared.answers():
                        given, filters = (ready.inputs, ready.generation), self.context.filters
                        rest["processors"] = ready.processors()
                        if prepared.choice is None:
                            answers.add(lease.engine.submit(*given, **rest), ready, filters)
                            continue
                        stream = lease.engine.open(*given, owner, ())
                        work = prepared.choice.parts
                        taken = lease.engine.take_in(stream, answers.events, work)
                        answers.add(taken, ready, filters)
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


class Alive(Resource):
    """GET /health and /livez: 200 as long as the process answers."""

    public = quiet = True

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        resp.data = labs_protocol.dumps(Health("ok"))


class Ready(Resource):
    """GET /readyz: 200 if the model is loaded and makes progress while requests wait, else 503."""

    public = quiet = True
    stalled_s = 60.0  # longer than any single decode step or prefill chunk

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        health = Health(self._state())
        resp.status = falcon.HTTP_200 if health.status == "ok" else falcon.HTTP_503
        resp.data = labs_protocol.dumps(health)

    def _state(self) -> Any:
        found = [engine.status() for engine in self.service.models.loaded().values()]
        try:
            self.service.models.check()
        except labs_engine.Busy:
            return "loading"
        except labs.LabsError:
            if not found:  # otherwise another model can answer
                return "dead"
        if any(status.closing for status in found):
            return "draining"
        if not all(status.alive for status in found):
            return "dead"
        return "stalled" if any(status.idle_s > self.stalled_s for status in found) else "ok"


class Generate(Resource):
    """POST /generate, /generate/stream and /explain."""

    def _read(self, req: falcon.Request) -> labs_request.Request:
        body, given = self.service.read(req, labs_request.GenerateRequest)
        return self.service.check(labs_request.request_of(body, given))

    def on_post(self, req: falcon.Request, resp: falcon.Response) -> None:
        answers, (completion,) = self.service.collect(req, self._read(req))
        names = {"id": req.context.id, "model": answers.name, "documents": answers.documents}
        resp.data = labs_protocol.dumps(GenerateAnswer(**names, **labs_ready.fields_of(completion)))

    def on_post_explain(self, req: falcon.Request, resp: falcon.Response) -> None:
        service, request = self.service, self._read(req)
        lease = service.leased(req, request)
        with service.prepared(request, lease) as prepared:
            ready = prepared.ready(0, 0)
            ready.shown(service.context.filters)  # may raise InputError
            sources = dict.fromkeys(service.context.configs[lease.name].sources, "server")
            sources |= dict.fromkeys(request.options, "request")
            found = labs_explain.explain(prepared.model, ready.inputs, prepared.generation, sources)
        shown = {name: each for name, each in found.settings.items() if name not in PATHS}
        resp.data = labs_protocol.dumps(msgspec.structs.replace(found, settings=shown))

    def on_post_stream(self, req: falcon.Request, resp: falcon.Response) -> None:
        self.service.stream(req, resp, self._read(req), GenerateStream())


class GenerateStream(labs_protocol.Stream):
    """Text as `data:` lines, with line ends as "\n"; at last `event: done` with JSON.

    Reasoning comes as `event: reasoning`, a call whole as `event: call` with JSON.
    """

    def begin(self, opened: labs_protocol.Opened) -> Iterator[bytes]:
        self._names: dict[str, Any] = {"id": opened.id, "model": opened.model}
        if opened.documents is not UNSET:
            self._names["documents"] = opened.documents
        self._rest = {labs.Delta: "", labs_parts.Reasoning: ""}  # a "\r" whose "\n" may come
        yield from ()

    def take(self, choice: int, part: Any) -> Iterator[bytes]:
        if isinstance(part, labs.Delta | labs_parts.Reasoning):
            text = self._rest[type(part)] + part.text
            self._rest[type(part)] = "\r" if text.endswith("\r") else ""
            yield _data_lines(type(part), text.removesuffix("\r"))
        elif isinstance(part, labs_parts.CallStarted):
            self._call = part
        elif isinstance(part, labs_parts.Arguments):
            function = labs.FunctionCall(name=self._call.name, arguments=part.text)
            yield labs_protocol.event(labs.ToolCall(id=self._call.id, function=function), "call")
        else:
            yield from (_data_lines(*each) for each in self._rest.items())
            yield labs_protocol.event({**self._names, **msgspec.structs.asdict(part)}, "done")


def _data_lines(kind: type[Any], text: str) -> bytes:
    """Return text or reasoning as one event, none if it is empty."""
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    event = "" if kind is labs.Delta else "event: reasoning\n"
    data = "".join(f"data: {line}\n" for line in lines)
    return f"{event}{data}\n".encode() if text else b""


class Choose(Resource):
    """POST /choose: the probability of each of several given answers."""

    def on_post(self, req: falcon.Request, resp: falcon.Response) -> None:
        body, given = self.service.read(req, ChooseRequest)
        named = {"timeout_s": body.timeout_s} if "timeout_s" in given else {}
        request = labs_request.Request(
            prompts=(labs_request.prompt_of(body),),
            options={"max_new_tokens": 1, "logprobs": None, **named},
            model=body.model,
            documents=False,
            choices=body.options,
        )
        answers, (made,) = self.service.collect(req, self.service.check(request))
        if made.finish_reason != "stop":
            raise labs_engine.Busy(f"the options were not compared in time: {made.finish_reason}")
        options = dict(zip(body.options, answers.shares or (), strict=True))
        answer = ChooseAnswer(id=req.context.id, model=answers.name, options=options)
        resp.data = labs_protocol.dumps(answer)


class ModelsListed(Resource):
    """GET /v1/models and /v1/models/{name}."""

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        names = self.service.context.configs
        if req.get_header("anthropic-version") is None:
            resp.data = labs_protocol.dumps(ModelList(tuple(map(self._card, names))))
            return
        page = labs_message_models.page_of([self._info(name) for name in names], req.params)
        resp.data = labs_protocol.dumps(page)

    def on_get_one(self, req: falcon.Request, resp: falcon.Response, name: str) -> None:
        if name not in self.service.context.configs:
            text = f"unknown model {name!r}; GET /v1/models lists the models of this server"
            raise labs_gate.Problem(404, text, "model_not_found", "model")
        card = self._card if req.get_header("anthropic-version") is None else self._info
        resp.data = labs_protocol.dumps(card(name))

    def _info(self, name: str) -> labs_message_models.ModelInfo:
        length = self.service.models.context_length(name)
        return labs_message_models.model_of(name, self.service.created, length)

    def _card(self, name: str) -> ModelCard:
        return ModelCard(
            id=name,
            created=self.service.created,
            context_length=self.service.models.context_length(name),
            loaded=name in self.service.models.loaded(),
        )


class Endpoint(Resource):
    """POST of an endpoint of another protocol than labs' own, for example OpenAI's."""

    def __init__(self, service: Service, endpoint: labs_protocol.Endpoint) -> None:
        super().__init__(service)
        self.endpoint = endpoint

    def _read(self, req: falcon.Request, resp: falcon.Response) -> tuple[Any, labs_request.Request]:
        endpoint = self.endpoint
        resp.set_header(endpoint.id_header, req.context.id)
        body, given = self.service.read(req, endpoint.body, endpoint.fields)
        return body, self.service.check(endpoint.request_of(body, given))

    def on_post(self, req: falcon.Request, resp: falcon.Response) -> None:
        endpoint, (body, request) = self.endpoint, self._read(req, resp)
        if body.stream:
            self.service.stream(req, resp, request, endpoint.stream(body))
            return
        answers, found = self.service.collect(req, request)
        names = {"id": req.context.id, "created": req.context.created, "model": answers.name}
        names |= {"documents": answers.documents, "generation": answers.generation}
        resp.data = labs_protocol.dumps(endpoint.answer(body, answers.model, found, **names))


class CountTokens(Endpoint):
    """POST /v1/messages/count_tokens: the tokens of a prompt, without running it."""

    def on_post(self, req: falcon.Request, resp: falcon.Response) -> None:
        _, request = self._read(req, resp)
        lease = self.service.leased(req, request)
        with self.service.prepared(request, lease) as prepared:
            count = sum(len(inputs.input_ids) for inputs in prepared.inputs)
        resp.data = labs_protocol.dumps(labs_message_events.InputTokens(count))


class NotStored(Resource):
    """/v1/responses/{id} and what is below it: refused by name, as no response is stored."""

    def on_get(self, req: falcon.Request, resp: falcon.Response, name: str) -> None:
        text = f"/v1/responses/{name:.80}: this server stores no responses, so none can be read, "
        text += "deleted, cancelled or compacted; send all earlier items as input"
        raise labs_gate.Problem(404, text, "not_stored", "response_id")

    on_delete = on_post = on_get


class Metrics(Resource):
    """GET /metrics: the server's metrics in Prometheus' text format."""

    def __init__(self, service: Service) -> None:
        super().__init__(service)
        self.public = service.config.server.public_metrics
        service.meters.registry.register(self)

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        resp.content_type = "text/plain; version=0.0.4; charset=utf-8"
        resp.data = generate_latest(self.service.meters.registry)

    def collect(self) -> Iterator[Any]:
        engines = self.service.models.loaded()
        return labs_meters.engine_metrics({name: each.status() for name, each in engines.items()})


# ---------------------------------------------------------------- the route table and the app


def routes(service: Service) -> tuple[labs_pages.Route, ...]:
    alive, generate, models = Alive(service), Generate(service), ModelsListed(service)
    ready, choose, metrics = Ready(service), Choose(service), Metrics(service)
    chat = Endpoint(service, labs_openai.CHAT)
    completions = Endpoint(service, labs_openai.COMPLETIONS)
    messages = Endpoint(service, labs_messages.MESSAGES)
    count, counted = CountTokens(service, labs_messages.COUNT), labs_message_events.InputTokens
    message, refused = labs_message_events.MessagesAnswer, labs_message_events.MessagesError
    responses = Endpoint(service, labs_responses.RESPONSES)
    response, items = labs_response_items.ResponseObject, labs_responses.RESPONSES.body
    events, plain, body = "text/event-stream", "text/plain", labs_request.GenerateRequest
    explanation, answer = labs_explain.Explanation, labs_replies.OpenAIAnswer
    chat_body, text_body = labs_openai.CHAT.body, labs_openai.COMPLETIONS.body
    message_body, count_body = labs_messages.MESSAGES.body, labs_messages.COUNT.body
    theirs: dict[str, Any] = {"error": refused}
    get = functools.partial(labs_pages.Route, "get")
    post = functools.partial(labs_pages.Route, "post")
    return (
        get("/health", alive, "Check that the process answers", Health),
        get("/livez", alive, "Check that the process answers", Health),
        get("/readyz", ready, "Check that the model can answer", Health, unready=True),
        post("/generate", generate, "Generate text", GenerateAnswer, body),
        post("/generate/stream", generate, "Stream generated text", events, body, "stream"),
        post("/explain", generate, "Show how it would run", explanation, body, "explain"),
        post("/choose", choose, "Compare given answers", ChooseAnswer, ChooseRequest),
        get("/v1/models", models, "List the models", ModelList),
        get("/v1/models/{name:path}", models, "Describe one model", ModelCard, None, "one"),
        post("/v1/chat/completions", chat, "Answer a chat", answer, chat_body, streams=True),
        post("/v1/completions", completions, "Continue text", answer, text_body, streams=True),
        post("/v1/messages", messages, "Answer", message, message_body, streams=True, **theirs),
        post("/v1/messages/count_tokens", count, "Count tokens", counted, count_body, **theirs),
        post("/v1/responses", responses, "Answer items", response, items, streams=True),
        get("/metrics", metrics, "Return metrics for Prometheus", plain),
    )


def create_app(
    config: labs.Config,
    models: labs_models.Models | labs_models.One,
    *,
    quotas: labs_gate.Quotas | None = None,
    registry: CollectorRegistry | None = None,
) -> falcon.App[Any, Any]:
    """Return the WSGI app. quotas, registry: by default new ones, not shared with another app.

    Raises LabsError when the configured filters or documents cannot be used.
    """
    quotas = quotas or labs_gate.quotas_of(config)
    service = Service(config, models, quotas.tokens, registry or CollectorRegistry())
    app = falcon.App(middleware=labs_gate.middleware(config, quotas.requests))
    app.add_middleware(labs_turns.Open(config))
    table = routes(service)
    for route in table:
        suffix = {"suffix": route.suffix} if route.suffix else {}
        app.add_route(route.path, route.resource, **suffix)
    app.add_route("/v1/responses/{name:path}", NotStored(service))
    secured, error = bool(config.api_keys), labs_protocol.Error
    document = labs_pages.openapi(table, error, labs.__version__, secured=secured)
    pages = labs_pages.pages(document)
    for path, page in pages.items():
        app.add_route(path, page)
    app.add_sink(labs_gate.not_found((*document["paths"], *pages)), "/")
    app.add_error_handler(Exception, answer_error)
    app.add_error_handler(falcon.HTTPError, answer_error)  # replaces Falcon's default handler
    return app


def refusing_app(config: labs.Config) -> falcon.App[Any, Any]:
    """Return an app that answers every request with the Problem in environ["labs.problem"]."""

    def refuse(req: falcon.Request, resp: falcon.Response, **_: Any) -> None:
        raise req.env["labs.problem"]

    app = falcon.App(middleware=labs_gate.middleware(config, labs_gate.Quota(None)))
    app.add_sink(refuse, "/")
    app.add_error_handler(Exception, answer_error)
    return app


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
