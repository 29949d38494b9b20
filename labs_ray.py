# SPDX-License-Identifier: Apache-2.0
"""Run labs on Ray when one machine or one GPU is not enough.

    labs-api --ray --replicas 2                   Ray Serve: the HTTP API, one engine each
    serve run labs_ray:app num_gpus=1             the same, started by Ray's command
    labs-gen batch 's3://bucket/*.jsonl' s3://bucket/answers --ray      Ray Data

Ray schedules, restarts and scales. Needs the extra `ray`, labs_serve.py and labs_jsonl.py.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import logging
import os
import re
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from typing import Annotated, Any

import fsspec
import msgspec
from a2wsgi import WSGIMiddleware
from msgspec import Meta, Struct
from prometheus_client import CollectorRegistry, Metric
from starlette.middleware import Middleware

# Ray reads these on import. Under `uv run` it would copy the whole folder to each worker.
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
import ray
import ray.data
from ray import serve

import labs
import labs_api
import labs_gate
import labs_jsonl
import labs_models
import labs_serve
import labs_service
import labs_turns

log = logging.getLogger("labs.ray")
APP, REPLICAS = "labs", "replicas"  # names in Ray Serve
MIDDLEWARES = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"  # middleware of Ray's proxies
EXTRA_REQUESTS = 8  # beyond its rows that a replica accepts; Ray queues the rest
LOGGING = {"log_level": "WARNING", "enable_access_log": False}  # the app logs requests
ROUTER = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"


class Cluster(Struct, frozen=True, forbid_unknown_fields=True):
    """The number of replicas and the resources of each.

    max_replicas: Ray scales between `replicas` and this number by the number of waiting requests.
    num_gpus: by default 1 if the cluster has GPUs and device_map allows them, else 0.
    sticky: requests with the same X-Session-Id go to the same replica, to reuse their prefix.
    """

    replicas: Annotated[int, Meta(ge=1)] = 1
    max_replicas: Annotated[int, Meta(ge=1)] | None = None
    num_cpus: Annotated[float, Meta(ge=0)] = 1
    num_gpus: Annotated[float, Meta(ge=0)] | None = None
    sticky: bool = False

    def __post_init__(self) -> None:
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            text = f"max_replicas = {self.max_replicas} is less than replicas = {self.replicas}"
            raise ValueError(f"{text}: raise it or leave it out")

    def resources(self, config: labs.Config) -> dict[str, Any]:
        gpus = self.num_gpus
        if gpus is None:
            if not ray.is_initialized():  # `serve run` calls this first
                raise labs.ConfigError("num_gpus: give the number for each replica, 0 for none")
            wanted = config.model.device_map not in ("cpu", "mps")
            gpus = float(wanted and ray.cluster_resources().get("GPU", 0) >= 1)
        return {"num_cpus": self.num_cpus, "num_gpus": gpus}


def cluster_of(given: dict[str, Any]) -> Cluster:
    """Build a Cluster from flags or the arguments of `serve run`; None means the default."""
    named = {key: value for key, value in given.items() if value is not None}
    try:
        return msgspec.convert(named, Cluster, strict=False)
    except msgspec.ValidationError as error:
        raise labs.ConfigError(f"Ray: {error}") from error


@contextlib.contextmanager
def connected(address: str) -> Iterator[None]:
    """Connect to a Ray cluster: `local` starts one for the block, `auto` finds a running one."""
    os.environ.setdefault(MIDDLEWARES, f"{__name__}.middlewares")
    options: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
    for name in ("ray", "ray.data", "ray.serve"):  # problems are raised
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        options["log_to_driver"] = os.environ.get("LABS_DEBUG") == "1"
        with labs_serve.sigterm_withheld():  # Ray must not end before this process
            ray.init(address, logging_level=logging.CRITICAL, **options)
            signal.signal(signal.SIGTERM, signal.default_int_handler)  # Ray's prints a trace
    except (OSError, RuntimeError, ValueError) as error:
        raise labs.LabsError(f"cannot reach Ray at {address}: {error}") from error
    try:
        yield
    except ray.exceptions.RayError as error:  # its last line is the cause, after many frames
        raise labs.LabsError(f"Ray: {last_line(error)}") from error
    finally:
        ray.shutdown()


def last_line(text: Any) -> str:
    """Return the last line of a traceback, without the module name of an error of labs."""
    return re.sub(r"^(\w+\.)*labs\w*\.\w+: ", "", str(text).strip().rpartition("\n")[2])


# ---------------------------------------------------------------- online: Ray Serve


class Replica:
    """Run the Falcon app and its engines in a process that Ray Serve starts and monitors.

    quotas: deployments of labs_gate.Quota by field of labs_gate.Quotas, shared by all replicas.
    """

    def __init__(self, config: labs.Config, quotas: dict[str, Any]) -> None:
        logging.basicConfig(format="%(message)s", stream=sys.stderr, level=logging.INFO)
        logging.getLogger("ray").setLevel(logging.WARNING)
        context = serve.get_replica_context()
        self.name, self.registry = context.replica_id.unique_id, Registry(context.app_name)
        alone = labs_gate.quotas_of(config)
        shared = {name: SharedQuota(each, getattr(alone, name)) for name, each in quotas.items()}
        self.config, self.quotas = config, alone._replace(**shared)
        self.models = labs_models.Models(config)
        self.models.wait()

    def __serve_build_asgi_app__(self) -> Any:
        shared: Any = {"quotas": self.quotas, "registry": self.registry}
        app = labs_api.create_app(self.config, self.models, **shared)
        return Bridge(app, workers=labs_serve.threads_for(self.config))

    def check_health(self) -> None:
        """Raise RuntimeError when an engine is dead, so that Ray Serve replaces this replica."""
        if not all(engine.status().alive for engine in self.models.loaded().values()):
            raise RuntimeError("the engine's thread has ended")

    def metrics(self) -> tuple[str, list[Metric]]:
        """Return the name of this replica and its Prometheus metrics."""
        return self.name, list(CollectorRegistry.collect(self.registry))

    def __del__(self) -> None:
        self.models.close()  # no thread may run torch while the interpreter shuts down


class SharedQuota(labs_gate.Quota):
    """A labs_gate.Quota that is shared by all replicas."""

    def __init__(self, handle: Any, alone: labs_gate.Quota) -> None:
        super().__init__(alone.per_minute)
        self._handle = handle

    def take(self, owner: str, cost: float) -> float:
        return float(self._handle.take.remote(owner, cost).result())


class Registry(CollectorRegistry):
    """Collect the metrics of all replicas, labelled by replica, whichever one is scraped."""

    def __init__(self, app_name: str) -> None:
        super().__init__()
        self._app_name = app_name

    def collect(self) -> Iterator[Metric]:
        families: dict[str, Metric] = {}
        replicas = serve.get_deployment_handle(REPLICAS, self._app_name)
        for name, found in replicas.broadcast("metrics").results():
            for family in found:
                samples, family.samples = family.samples, []
                whole = families.setdefault(family.name, family).samples
                whole += (s._replace(labels={**s.labels, "replica": name}) for s in samples)
        yield from families.values()


class Bridge(WSGIMiddleware):  # type: ignore[misc]
    """a2wsgi's bridge that also reports a lost client to the app; else its thread would stay."""

    def __init__(self, app: Any, workers: int) -> None:
        def wsgi(environ: dict[str, Any], start_response: Any) -> Any:
            environ["waitress.client_disconnected"] = environ["asgi.scope"]["gone"]
            return app(environ, start_response)

        super().__init__(wsgi, workers, send_queue_size=0)  # a full one would block forever

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        gone = threading.Event()
        try:
            await super().__call__({**scope, "gone": gone.is_set}, receive, send)
        finally:  # Ray cancels this when the client hangs up
            gone.set()


class ClosesBrokenStreams:
    """Middleware of Ray's proxies: a response whose replica died still ends, with an error."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        began, stream, ended = False, False, scope["type"] != "http"

        async def watch(message: Any) -> None:
            nonlocal began, stream, ended
            if message["type"] == "http.response.start":
                kinds = (value for name, value in message["headers"] if name == b"content-type")
                began, stream = True, any(kind.startswith(b"text/event-stream") for kind in kinds)
            elif message["type"] == "http.response.body":
                ended = not message.get("more_body", False)
            await send(message)

        await self.app(scope, receive, watch)
        if not ended and (stream or not began):
            await end_with_error(send, began, scope["path"])


async def end_with_error(send: Any, began: bool, path: str) -> None:
    """Send an error response, or an error event if the stream has already begun."""
    text = "the replica that was answering has ended; send the request again"
    problem = labs_gate.Problem(503, text, "replica_lost")
    data = (labs_service.error_event if began else labs_service.error_of)(problem, path)
    if not began:
        headers = [(b"content-type", b"application/json"), (b"retry-after", b"1")]
        await send({"type": "http.response.start", "status": problem.status, "headers": headers})
    await send({"type": "http.response.body", "body": data})


def middlewares() -> list[Middleware]:
    return [Middleware(ClosesBrokenStreams)]


def deployment(config: labs.Config, cluster: Cluster) -> Any:
    """Return the Ray Serve application."""
    rows = config.server.max_batch_rows or labs_turns.ROWS
    options: dict[str, Any] = {
        "name": REPLICAS,
        "ray_actor_options": cluster.resources(config),
        "max_ongoing_requests": rows + EXTRA_REQUESTS,
        "max_queued_requests": config.server.max_waiting,
        "graceful_shutdown_timeout_s": config.server.drain_s,
        "logging_config": LOGGING,
        "max_constructor_retry_count": 1,  # retrying a failed load does not help
    }
    least, most = cluster.replicas, cluster.max_replicas
    scaling = {"min_replicas": least, "max_replicas": most, "target_ongoing_requests": rows}
    options |= {"num_replicas": least} if most is None else {"autoscaling_config": scaling}
    if cluster.sticky:
        options["request_router_config"] = {"request_router_class": ROUTER}
    return serve.deployment(serve.ingress()(Replica), **options).bind(config, quotas_of(config))


def quotas_of(config: labs.Config) -> dict[str, Any]:
    """Return a deployment for each configured quota: one process counts for all replicas."""
    quota = serve.deployment(labs_gate.Quota, ray_actor_options={"num_cpus": 0})
    limits = {name: each.per_minute for name, each in labs_gate.quotas_of(config)._asdict().items()}
    return {name: quota.options(name=name).bind(n) for name, n in limits.items() if n is not None}


def app(arguments: dict[str, Any]) -> Any:
    """Build the app for `serve run`. arguments: fields of Cluster, and `config`, a TOML file."""
    rest = {**arguments}
    return deployment(labs.load_config(rest.pop("config", None)), cluster_of(rest))


def serve_replicas(config: labs.Config, address: str, cluster: Cluster) -> None:
    """Serve until SIGTERM or Ctrl-C, then wait up to server.drain_s for open requests."""
    labs_gate.check_exposure(config)
    host, count = config.server.host, cluster.replicas
    with contextlib.suppress(KeyboardInterrupt), labs_serve.unhurried_log(), connected(address):
        labs_serve.interrupt_on_signals()
        port = _free_port(config.server)
        serve.start(http_options={"host": host, "port": port}, logging_config=LOGGING)
        labs_serve.tell_start(labs_gate.url_of(host, port), config)
        try:
            _run(config, cluster)
            log.info("labs-api: ready, replicas: %d; logs: /tmp/ray/session_latest/logs", count)
            threading.Event().wait()
        finally:
            labs_serve.end_unless_served(ray.get_runtime_context().gcs_address)
            serve.delete(APP)


def _free_port(server: labs.Server) -> int:
    """Return server.port, or a free port for 0. Raises LabsError if the port is taken."""
    family = socket.AF_INET6 if ":" in server.host else socket.AF_INET
    try:
        with socket.create_server((server.host, server.port), family=family) as free:
            return int(free.getsockname()[1])
    except OSError as error:
        raise labs_gate.cannot_listen(server, error) from error


def _run(config: labs.Config, cluster: Cluster) -> None:
    """Start the replicas and wait until they are ready. Raises LabsError if one fails."""
    try:
        serve.run(deployment(config, cluster), name=APP)
    except RuntimeError as error:
        found = serve.status().applications[APP].deployments
        reasons = [last_line(each.message) for each in found.values() if each.message]
        raise labs.LabsError(" ".join(reasons) or last_line(error)) from error


# ---------------------------------------------------------------- offline: Ray Data


class Files(Struct, frozen=True):
    """The input and output of a run; source and target are fsspec URLs."""

    source: str  # a path, a glob, or a folder with *.jsonl
    target: str  # a folder
    batch_rows: int | None = None  # rows per batch of a replica
    lines: int = labs_jsonl.WINDOW  # lines per task of a replica


class Chunk(Struct, frozen=True):
    """`count` lines of a file, starting with line `first` at byte `start`."""

    path: str
    name: str  # the path relative to the fixed part of the pattern
    first: int
    start: int
    count: int


def answer_files(
    config: labs.Config, files: Files, address: str, cluster: Cluster, tally: labs_jsonl.Tally
) -> None:
    """Answer the prompts of JSONL files into a folder; ids already answered there are skipped.

    A line without an id gets one from its file and number. When a replica dies, Ray runs its task
    again; calling this again continues an interrupted run. Raises InputError, ModelError.
    """
    if "-" in (files.source, files.target):
        raise labs.InputError("with Ray, the input must name files and the output a folder, not -")
    system, folder = fsspec.core.url_to_fs(files.target)
    target = system.unstrip_protocol(folder)  # a full URL: workers run elsewhere
    chunks = [msgspec.structs.asdict(each) for each in _chunks(files.source, files.lines)]
    _recover(target, tally)  # fails early if the folder holds other files
    tally.answered.clear()
    if not chunks:
        return
    least, most = cluster.replicas, cluster.max_replicas or cluster.replicas
    with connected(address):
        ray.data.DataContext.get_current().enable_progress_bars = sys.stderr.isatty()
        answers = ray.data.from_items(chunks, override_num_blocks=len(chunks)).map(
            Answers,
            compute=ray.data.ActorPoolStrategy(min_size=least, max_size=most),
            fn_constructor_args=(config, target, files.batch_rows),
            **cluster.resources(config),
        )
        for row in answers.iter_rows():
            if failure := row.pop("failure"):
                raise labs.ModelError(failure)
            for name, count in row.items():
                setattr(tally, name, getattr(tally, name) + count)


def _chunks(source: str, lines: int) -> Iterator[Chunk]:
    """Yield the lines of all files in chunks of at most `lines`, reading each file once."""
    files, pattern = fsspec.core.url_to_fs(source)
    pattern = f"{pattern.rstrip('/')}/*.jsonl" if files.isdir(pattern) else pattern
    found = [pattern] if files.exists(pattern) else sorted(files.glob(pattern))
    if not found:
        raise labs.InputError(f"{source}: there is no such file")
    root = re.split(r"[*?[]", pattern)[0].rpartition("/")[0]
    for path in found:
        first, start, name = 1, 0, path.removeprefix(root).lstrip("/")
        with files.open(path, "rb") as file:
            while some := list(itertools.islice(file, lines)):
                yield Chunk(files.unstrip_protocol(path), name, first, start, len(some))
                first, start = first + len(some), start + sum(map(len, some))


def _recover(target: str, tally: labs_jsonl.Tally) -> None:
    """Record the answers of a folder in the tally; create the folder if it is missing."""
    files, folder = fsspec.core.url_to_fs(target)
    files.makedirs(folder, exist_ok=True)
    for path in files.glob(f"{folder}/*.jsonl"):
        with files.open(path, "rb") as file:
            for number, data in enumerate(file, 1):
                tally.learn(data, number, path)


class Answers:
    """A worker process with a model; it answers chunks of lines, each into one file."""

    def __init__(self, config: labs.Config, target: str, batch_rows: int | None) -> None:
        self.batching = labs_jsonl.Batching(rows=batch_rows)
        self.files, self.folder = fsspec.core.url_to_fs(target)
        self.past, self.failure = labs_jsonl.Tally(), ""  # an exception here would make Ray retry
        _recover(target, self.past)
        try:
            self.context = labs_jsonl.open_context(config)
            self.model = labs.load_model(config)
        except labs.LabsError as error:
            self.failure = str(error)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        if self.failure:
            return {"failure": self.failure}
        chunk = msgspec.convert(row, Chunk)
        tally = labs_jsonl.Tally(answered={*self.past.answered})
        with fsspec.open(chunk.path, "rb") as file:
            file.seek(chunk.start)
            lines = list(itertools.islice(labs_jsonl.unmarked(file), chunk.count))
        numbered = ((f"{chunk.name}:{n}", line) for n, line in enumerate(lines, chunk.first))
        found = labs_jsonl.answer_lines(self.model, self.context, numbered, tally, self.batching)
        if data := b"".join(found):
            self._write(b"".join([f"{chunk.name}-{chunk.first}".encode(), *lines]), data)
        names = "done", "failed", "skipped", "tokens"
        return {"failure": "", **{name: getattr(tally, name) for name in names}}

    def _write(self, lines: bytes, data: bytes) -> None:
        """Write a file atomically, replacing that of an earlier try with the same lines."""
        name = hashlib.sha256(lines).hexdigest()[:16]
        self.files.pipe_file(f"{self.folder}/.{name}", data)
        self.files.mv(f"{self.folder}/.{name}", f"{self.folder}/{name}.jsonl")
