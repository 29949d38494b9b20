# SPDX-License-Identifier: Apache-2.0
"""Answer HTTP requests with labs, as a WSGI app; concurrent requests share one batch.

    GET  /health /livez /readyz      whether the process is alive, and the model ready
    POST /generate                   generate from a prompt or messages, with any setting
    POST /generate/stream            the same as server-sent events
    POST /explain                    what a request would run with, without running it
    POST /choose                     the probability of each of several given answers
    POST /tokenize /detokenize /apply-template           vLLM's and llama.cpp's
    GET  /v1/models                  OpenAI's endpoints
    POST /v1/chat/completions /v1/completions /v1/responses /v1/embeddings
    POST /v1/rerank /v2/rerank /rerank                   Jina's and Cohere's
    POST /v1/messages /v1/messages/count_tokens          Anthropic's
    GET  /metrics /status.json /status /openapi.json /docs /

`create_app(config, models)` returns a WSGI callable that any server can mount; labs_serve.py serves
it. A parameter takes effect or is refused by name. labs_service.py takes a request to its answers.

Needs labs_site.py and labs_service.py with what those need; falcon, prometheus-client.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from typing import Annotated, Any, Literal

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
import labs_names
import labs_openai
import labs_openapi
import labs_parts
import labs_protocol
import labs_ready
import labs_replies
import labs_request
import labs_response_items
import labs_responses
import labs_site
import labs_status
import labs_tokenize
import labs_turns
import labs_vectors
from labs_service import Resource, Service, answer_error

# Settings that hold paths of the server, which are hidden from clients.
PATHS = ("adapter", "cache_dir", "chat_template", "draft_model", "model_name")
# Settings of a choice, whatever is configured for texts.
ALONE = {"max_new_tokens": 1, "min_new_tokens": 0, "logprobs": None}


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
    continue_final_message: bool | None = None


class GenerateAnswer(labs.Completion, frozen=True, kw_only=True):
    id: str
    model: str
    documents: tuple[labs_request.Source, ...] | UnsetType = UNSET
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
    kind: Literal["text", "embedding", "rerank"] = "text"
    object: Literal["model"] = "model"
    owned_by: Literal["labs"] = "labs"


class ModelList(Struct, frozen=True):
    data: tuple[ModelCard, ...]
    object: Literal["list"] = "list"


class Health(Struct, frozen=True):
    status: Literal["ok", "loading", "draining", "dead", "stalled"]


# ---------------------------------------------------------------- resources


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
        plan = msgspec.structs.replace(found, model=lease.name, settings=shown)
        resp.data = labs_protocol.dumps(plan)

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
            options={**ALONE, **named},
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
        kinds = self.service.kinds.kinds()
        if req.get_header("anthropic-version") is None:
            resp.data = labs_protocol.dumps(ModelList(tuple(map(self._card, kinds))))
            return
        infos = [self._info(name) for name, kind in kinds.items() if kind == "text"]
        resp.data = labs_protocol.dumps(labs_message_models.page_of(infos, req.params))

    def on_get_one(self, req: falcon.Request, resp: falcon.Response, name: str) -> None:
        kinds = self.service.kinds
        if (found := kinds.find(name)) is None:
            text = labs_names.unknown(name, kinds.kinds())
            text += " GET /v1/models lists the models of this server"
            raise labs_gate.Problem(404, text, "model_not_found", "model")
        card = self._card if req.get_header("anthropic-version") is None else self._info
        resp.data = labs_protocol.dumps(card(found))

    def _info(self, name: str) -> labs_message_models.ModelInfo:
        length = self._card(name).context_length
        return labs_message_models.model_of(name, self.service.created, length)

    def _card(self, name: str) -> ModelCard:
        service, models = self.service, self.service.models
        own = service.kinds.own(name)
        return ModelCard(
            id=name,
            created=service.created,
            context_length=models.context_length(name) if own is None else own.context_length,
            loaded=name in models.loaded() if own is None else own.context_length is not None,
            kind=service.kinds.kinds()[name],
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


class Vectors(Resource):
    """POST /v1/embeddings and /v1/rerank: vectors of texts, and the order of documents."""

    def __init__(self, service: Service, endpoint: labs_vectors.Endpoint) -> None:
        super().__init__(service)
        self.endpoint = endpoint

    def on_post(self, req: falcon.Request, resp: falcon.Response) -> None:
        service, endpoint, filters = self.service, self.endpoint, self.service.context.filters
        body, _ = service.read(req, endpoint.body, endpoint.fields)
        most = service.config.server.max_prompt_bytes
        name = service.kinds.name_of(body.model, endpoint.kind)
        asked = labs_vectors.checked(endpoint.asked(body), most, filters)
        with service.turn(req, name) as turn:
            work = labs_vectors.read(endpoint, turn.model, asked, filters)
            with service.charge(req.context.owner, work.tokens):
                answer = work.make(name, req.context.id, turn.stop)
        seconds = time.perf_counter() - req.context.began
        timings = labs.Timings(0.0, seconds - turn.queue_s, 0.0, 0.0, turn.queue_s)
        done = labs.Done("stop", labs.Usage(work.tokens, 0), timings)
        service.meters.done(name, done, seconds)
        record = {"model": name, "prompt_tokens": work.tokens, "texts": len(work.rows)}
        req.context.record = {**record, "queue_s": round(turn.queue_s, 4)}
        resp.data = labs_protocol.dumps(answer)


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
        yield from labs_meters.engine_metrics({name: e.status() for name, e in engines.items()})
        yield from labs_meters.draft_metrics(engines)


# ---------------------------------------------------------------- the route table and the app


def routes(service: Service) -> tuple[labs_openapi.Route, ...]:
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
    get = functools.partial(labs_openapi.Route, "get")
    post = functools.partial(labs_openapi.Route, "post")
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
        *(
            post(path, Vectors(service, each), each.summary, each.made, each.body)
            for path, each in labs_vectors.ENDPOINTS.items()
        ),
        post("/v1/responses", responses, "Answer items", response, items, streams=True),
        *labs_tokenize.routes(service),
        *labs_status.routes(service),
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
    document = labs_openapi.openapi(table, error, labs.__version__, secured=secured)
    defaults = msgspec.to_builtins(config.generation, str_keys=True)
    document = labs_openapi.with_defaults(document, "GenerateRequest", defaults)
    pages = labs_site.pages(document) | labs_status.pages()
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
