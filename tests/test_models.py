# SPDX-License-Identifier: Apache-2.0
"""Several models in one process, over HTTP too, and the router: tiny models behind a held door."""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import logging
import math
import re
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click
import falcon.testing
import httpx
import kit
import pytest
import torch
from kit import CHAT, COMPLETIONS, WAIT_S, A, Live, alone, error_of, model_of, read, until, write
from msgspec.structs import replace
from prometheus_client import CollectorRegistry

import labs
import labs_cli
import labs_decode
import labs_engine
import labs_explain
import labs_gate
import labs_models
import labs_request
import labs_serve
import labs_service
import labs_turns

KINDS = ("llama", "qwen2", "gpt2")
OOM = "CUDA out of memory. Tried to allocate 2.00 GiB"
REASON = "could not be loaded; the server's log has the reason"


# ---------------------------------------------------------------- helpers


class Loader:
    """Stands for labs.load_model: makes the tiny model of a kind, once its door is open.

    loads: of which models loads were begun; failures: what they raise, by name.
    """

    def __init__(self) -> None:
        self.loads: list[str] = []
        self.failures: dict[str, Exception] = {}
        self.door = threading.Event()
        self.door.set()
        self.made: Callable[[str], labs.Model] = model_of

    def load(self, config: labs.Config, *, cached: bool) -> labs.Model:
        assert not cached, "a remembered model would never be free"
        self.loads.append(name := config.model.model_name)
        assert self.door.wait(WAIT_S)
        if name in self.failures:
            raise self.failures[name]
        return self.made(name)


@pytest.fixture
def loader(monkeypatch: pytest.MonkeyPatch) -> Iterator[Loader]:
    """Load tiny models; busy models are never drained, unless a test says so."""
    loader = Loader()
    monkeypatch.setattr(labs, "load_model", loader.load)
    monkeypatch.setattr(labs_models, "weight_bytes", lambda spec: 1)
    monkeypatch.setattr(labs_models, "context_length", lambda spec: None)
    monkeypatch.setattr(labs_models, "EVICT_BUSY_AFTER_S", 600.0)
    yield loader
    loader.door.set()


Begin = Callable[..., Any]


@pytest.fixture
def run() -> Iterator[Begin]:
    """Begin to load models, behind an app if wanted; at the end all threads have to end."""
    with contextlib.ExitStack() as stack:

        def start(config: labs.Config, kind: Any = None) -> Any:
            models = labs_models.Models(config)
            stack.callback(stop, models)
            if kind is None:
                return models
            site = kind(models, config, models)
            if isinstance(site, Live):
                stack.callback(site.close)
            return site

        yield start


@pytest.fixture
def begin(loader: Loader, run: Begin) -> Begin:
    """Load the tiny models of these kinds."""
    return lambda *names, **server: run(config_of(*names, **server))


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that lets busy models be drained after this time."""
    return lambda after_s=0.0: monkeypatch.setattr(labs_models, "EVICT_BUSY_AFTER_S", after_s)


@pytest.fixture
def gate(begin: Begin) -> Iterator[kit.Gate]:
    """Hold the forward calls of llama; they pass again before the models are closed."""
    gate = kit.Gate(model_of("llama"))
    yield gate
    gate.let(math.inf)
    for handle in gate.handles:
        handle.remove()


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Remember which threads have waited for a model."""
    waits, wait = set[int](), labs_models.Models._wait

    def remember(models: labs_models.Models, timeout_s: float) -> None:
        waits.add(threading.get_ident())
        wait(models, timeout_s)

    monkeypatch.setattr(labs_models.Models, "_wait", remember)
    return waits


def stop(models: labs_models.Models) -> None:
    """Close, and wait for the thread that loads."""
    engines = [*models.loaded().values()]
    models.close()
    if loader := getattr(labs.load_model, "__self__", None):
        loader.door.set()
    models._thread.join(WAIT_S)
    assert not models._thread.is_alive()
    assert not [
        each for each in (*engines, *models.loaded().values()) if kit.inner(each)._thread.is_alive()
    ]


def config_of(*names: str, **server: Any) -> labs.Config:
    """Configure models of these kinds; the first is the default."""
    shared = labs.Server(**server)
    configs = {
        name: labs.Config(model=labs.ModelSpec(model_name=name), model_id=name, server=shared)
        for name in names
    }
    return replace(configs[names[0]], models=configs)


def configured(text: str, **changes: Any) -> labs.Config:
    write("labs.toml", text)
    return labs.load_config(env={}, **changes)


def come(models: labs_models.Models, name: str) -> labs_engine.AnyEngine:
    """Return an engine once it is there, as a request does; it is to be released."""

    def there() -> Any:
        with contextlib.suppress(labs_models.Loading):
            return models(name)

    return until(there)


def ask(models: labs_models.Models, name: str, number: int = 0) -> labs_engine.Answer:
    engine = come(models, name)
    try:
        return engine.submit(kit.prompt(number), kit.asked())
    finally:
        models.release(name)


def want(models: labs_models.Models, name: str) -> None:
    """Ask for a model that is not there, and go."""
    with pytest.raises(labs_models.Loading, match=f"{name} is being loaded"):
        models(name)


def use(models: labs_models.Models, *names: str) -> labs_models.Models:
    """Let each of them answer once; nothing is under way then."""
    for name in names:
        assert read(ask(models, name))[0] == alone(name, 0)
        engine = models.loaded().get(name)
        assert engine is None or kit.quiet(engine)
    return models


def held_answer(models: labs_models.Models, gate: kit.Gate) -> labs_engine.Answer:
    """Let llama begin an answer and hold it there."""
    before = len(gate.calls)
    gate.let(3)
    answer = ask(models, "llama")
    gate.until(before + 4)
    return answer


def drains(models: labs_models.Models, name: str) -> None:
    """Wait until one model, this one, takes no more requests."""
    entries = models._entries.items()
    assert until(lambda: [each for each, entry in entries if entry.draining]) == [name]


def errors_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [each.getMessage() for each in caplog.records if each.levelname == "ERROR"]


@pytest.mark.parametrize("failing", ["load", "reading", "engine"])
def test_memory_that_runs_out_during_a_load_is_given_back(failing, begin, loader, monkeypatch):
    monkeypatch.setattr(labs_models.log, "disabled", True)  # pytest keeps what is logged
    models, made, held = use(begin("llama", "qwen2"), "llama"), [], []

    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError(OOM)

    def half(name: str) -> Any:
        decoder = labs_decode.prepare(kit.random_model("qwen2"))
        made.append(weakref.ref(decoder.model))
        if failing == "engine":
            return replace(model_of("qwen2"), decoder=decoder)
        try:
            full()
        except torch.OutOfMemoryError as error:
            raise labs.ModelError(OOM) if failing == "load" else error from error

    def free_memory() -> None:
        gc.collect()
        held.extend(each() is not None for each in made)

    loader.made = half
    monkeypatch.setattr(labs, "release_memory", free_memory)
    if failing == "engine":
        monkeypatch.setattr(labs_engine, "Engine", full)
    with pytest.raises(labs.ModelError, match=REASON):
        come(models, "qwen2")
    assert held == [False]
    use(models, "llama")


# ---------------------------------------------------------------- more models than may be loaded


def test_the_least_recently_used_model_is_unloaded_once_for_another(begin, loader, caplog):
    caplog.set_level(logging.INFO)
    models = begin(*KINDS, max_loaded_models=2)
    engine = models.wait()
    use(models, "llama", "qwen2", "llama", "gpt2")
    assert [*models.loaded()] == ["llama", "gpt2"]
    use(models, "qwen2")
    assert [*models.loaded()] == ["qwen2", "gpt2"]
    assert loader.loads == ["llama", "qwen2", "gpt2", "qwen2"]
    logged = [record.getMessage() for record in caplog.records if record.name == "labs.models"]
    assert logged == ["labs-api: unloaded qwen2", "labs-api: unloaded llama"]
    until(lambda: not engine._thread.is_alive())


@pytest.mark.parametrize("busy", ["running", "waiting", "held"])
def test_a_busy_model_is_never_unloaded_while_another_is_idle(busy, begin, gate):
    models = begin(*KINDS, max_loaded_models=2, max_batch_rows=1)
    answers = [] if busy == "held" else [held_answer(models, gate)]
    if busy == "waiting":
        answers.append(ask(models, "llama", 1))
        answers.pop(0).close()
        assert models.loaded()["llama"].status().waiting == 1
    engine = come(models, "llama") if busy == "held" else models.loaded()["llama"]
    use(models, "qwen2", "gpt2", "qwen2")
    assert models.loaded()["llama"] is engine
    gate.let(math.inf)
    number = 1 if busy == "waiting" else 0
    assert [read(answer)[0] for answer in answers] == [alone("llama", number)] * len(answers)


def test_a_request_for_another_model_waits_while_all_are_busy(begin, gate, loader):
    models = begin("llama", "qwen2", max_loaded_models=1)
    answers = [held_answer(models, gate)]
    want(models, "qwen2")
    answers.append(ask(models, "llama", 1))  # the busy model still accepts requests
    gate.let(5)
    gate.until(9)
    assert loader.loads == ["llama"]
    gate.let(math.inf)
    assert [read(answer)[0] for answer in answers] == [alone("llama", n) for n in (0, 1)]
    use(models, "qwen2")


def test_a_model_busy_for_too_long_ends_its_answers_and_is_unloaded(begin, gate, loader, hasty):
    models = begin("llama", "qwen2", max_loaded_models=1)
    engine, answer = models.wait(), held_answer(models, gate)
    hasty()
    want(models, "qwen2")
    drains(models, "llama")
    assert loader.loads == ["llama"]
    with ThreadPoolExecutor() as pool:
        later = pool.submit(lambda: read(ask(models, "llama", 1)))
        gate.let(math.inf)
        text, done = read(answer)
        assert (text, done.finish_reason) == (alone("llama", 0), "length")
        assert later.result(WAIT_S)[0] == alone("llama", 1)
    assert loader.loads == ["llama", "qwen2", "llama"]
    assert models.loaded()["llama"] is not engine


def test_a_draining_model_stays_if_another_becomes_idle(begin, gate, loader, hasty):
    models = begin(*KINDS, max_loaded_models=2)
    answers = [held_answer(models, gate)]
    come(models, "qwen2")
    hasty()
    want(models, "gpt2")
    drains(models, "llama")
    models.release("qwen2")
    use(models, "gpt2")
    answers.append(ask(models, "llama", 1))
    gate.let(math.inf)
    assert [read(answer)[0] for answer in answers] == [alone("llama", n) for n in (0, 1)]
    assert loader.loads == ["llama", "qwen2", "gpt2"]


def test_clients_of_two_models_are_all_answered_though_one_has_room(begin, loader, hasty):
    clients, rounds, names = 6, 3, ("llama", "qwen2")
    assert len({alone(name, n) for name in names for n in range(clients)}) == 2 * clients
    hasty(0.1)
    models = begin(*names, max_loaded_models=1)

    def ask_in_turn(number: int) -> list[bool]:
        turns = [names[(number + turn) % 2] for turn in range(rounds)]
        return [read(ask(models, name, number))[0] == alone(name, number) for name in turns]

    with ThreadPoolExecutor(clients) as pool:
        assert [*pool.map(ask_in_turn, range(clients))] == [[True] * rounds] * clients
    assert len(loader.loads) <= clients * rounds, "a model was unloaded before it had answered"


# ---------------------------------------------------------------- memory


@pytest.fixture(scope="session")
def other_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a tiny model that is smaller than that of tiny_folder, with a context of its own."""
    config = kit.llama()
    config.num_hidden_layers, config.max_position_embeddings = 1, 512
    return kit.save_model(tmp_path_factory.mktemp("other") / "model", config)


@pytest.fixture
def places(tiny_folder: Path, other_folder: Path, run: Begin) -> Begin:
    """Load true models by their folders."""
    return lambda *more, **given: run(config_at(tiny_folder, other_folder, *more, **given))


def config_at(*folders: Path, default: str = "tiny", **server: Any) -> labs.Config:
    """Configure the models tiny, other and third, which lie in these folders."""
    rest = {"server": labs.Server(**server), "response_cache": labs.ResponseCache(max_entries=4)}
    names = zip(("tiny", "other", "third"), folders, strict=False)
    configs = {n: labs.Config(model=spec_of(path), model_id=n, **rest) for n, path in names}
    return replace(configs[default], models=configs)


def spec_of(folder: Path, method: Any = "none") -> labs.ModelSpec:
    quantization = labs.Quantization(quant_method=method)
    return labs.ModelSpec(model_name=str(folder), torch_dtype="fp32", quantization=quantization)


def answered(models: labs_models.Models, name: str) -> weakref.ref[Any]:
    """Let a model answer, once from its cache; return a reference to it that does not hold it."""
    engine = come(models, name)
    try:
        before = engine.status().response_cache_hits
        for _ in range(2):
            assert read(engine.submit(kit.prompt(0), kit.asked()))[1].usage.completion_tokens > 0
        assert kit.quiet(engine)
        assert engine.status().response_cache_hits > before
        return weakref.ref(engine.model.model)
    finally:
        models.release(name)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_bytes_of_weights_are_known_before_a_load(dtype, tiny_folder):
    spec = replace(spec_of(tiny_folder), torch_dtype=dtype)
    size = labs.load_model(spec, cached=False).decoder.weight_bytes
    assert size == labs_models.weight_bytes(spec) > 10_000


def test_fewer_bits_need_fewer_bytes(tiny_folder):
    sizes = [labs_models.weight_bytes(spec_of(tiny_folder, m)) for m in ("none", "int8", "int4")]
    assert sizes[0] > sizes[1] > sizes[2] > 0


def sizes_of(*folders: Path) -> list[int]:
    return [labs_models.weight_bytes(spec_of(folder)) for folder in folders]


@pytest.mark.parametrize(
    ("spare", "others", "fit"), [(0, 0, True), (-1, 0, False), (101, 101, True), (100, 101, False)]
)
def test_models_stay_side_by_side_where_the_limit_holds_them_and_those_of_filters(
    spare, others, fit, places, tiny_folder, other_folder
):
    models = places(model_memory_bytes=sum(sizes_of(tiny_folder, other_folder)) + spare)
    for part in (others // 2, others - others // 2):
        models.account(lambda part=part: part)
    for name in ("tiny", "other", "tiny"):
        answered(models, name)
        assert fit or [*models.loaded()] == [name]
    assert [*models.loaded()] == (["tiny", "other"] if fit else ["tiny"])


@pytest.mark.parametrize(
    ("loaded", "wanted", "spare", "text"),
    [
        ("other", "tiny", -1, r"needs about \S+ GB; server.model_memory_bytes"),
        ("tiny", "other", 0, r"needs about \S+ GB beside \S+ GB of other models"),
        ("tiny", "third", 10**9, r"config\.json is missing"),
    ],
)
def test_a_model_that_cannot_be_loaded_unloads_no_other(
    loaded, wanted, spare, text, places, tiny_folder, other_folder, tmp_path, caplog
):
    large, small = sizes_of(tiny_folder, other_folder)
    limits = {"model_memory_bytes": large + spare, "max_loaded_models": 1}
    models = places(tmp_path, default=loaded, **limits)
    weights = answered(models, loaded)
    models.account(lambda: (large - small + 1) * (wanted == "other"))
    with pytest.raises(labs.ModelError, match=REASON):
        come(models, wanted)
    assert models.loaded()[loaded].model.model is weights()
    (error,) = errors_in(caplog)
    assert re.search(text, error)
    assert kit.is_one_sentence(Exception(error))


def test_without_a_limit_models_take_nine_tenths_of_the_free_memory(begin, loader, monkeypatch):
    free = {"llama": 9.0, "qwen2": 10.0}
    monkeypatch.setattr(labs_models, "weight_bytes", lambda spec: 9)
    monkeypatch.setattr(labs_models, "system_memory", lambda spec: free[spec.model_name])
    models = use(begin("llama", "qwen2"), "llama", "qwen2")
    assert [*models.loaded()] == ["llama", "qwen2"]
    free["qwen2"] = 9.0
    assert [*use(begin("llama", "qwen2"), "llama", "qwen2").loaded()] == ["qwen2"]


def test_one_given_engine_has_the_interface_of_models():
    engine = labs_engine.Engine(model_of("llama"))
    assert labs_models.One(engine).loaded() == {"llama": engine}
    models = labs_models.One(engine, "m")
    models.account(lambda: 10**15)
    assert (models("m"), models.reader("m")) == (engine, model_of("llama"))
    assert read(ask(models, "m"))[0] == alone("llama", 0)
    assert [models.context_length(name) for name in ("m", "no")] == [512, None]
    models.close(WAIT_S)
    assert not engine.status().alive


@pytest.mark.parametrize("limit", [{"keep_alive_s": 0.1}, {"max_loaded_models": 1}])
def test_nothing_refers_to_a_model_that_was_unloaded(limit, places):
    models = places(**limit)
    weights = answered(models, "tiny")
    if "max_loaded_models" in limit:
        answered(models, "other")
    until(lambda: weights() is None)
    assert "tiny" not in models.loaded()


def test_a_busy_model_is_not_idle_and_stays_for_its_time_after_that(begin, gate, loader):
    models = begin("llama", "qwen2", "gpt2", keep_alive_s=0.5)
    answer, held = held_answer(models, gate), come(models, "gpt2")
    use(models, "qwen2")
    until(lambda: [*models.loaded()] == ["llama", "gpt2"])
    for entry in (models._entries["llama"], models._entries["gpt2"]):
        entry.last_used -= 10_000
        until(lambda entry=entry: time.monotonic() - entry.last_used < 10)
    gate.let(math.inf)
    assert read(answer)[0] == alone("llama", 0)
    assert models.loaded()["gpt2"] is held
    models.release("gpt2")
    until(lambda: models.loaded() == {})
    assert loader.loads == ["llama", "gpt2", "qwen2"]


# ---------------------------------------------------------------- the end


def refuses(models: labs_models.Models, name: str) -> bool:
    """Return whether requests are refused because the models are being closed."""
    try:
        models(name)
        models.release(name)
    except labs_engine.Busy as error:
        return str(error) == "the server is shutting down"
    return False


@pytest.mark.parametrize(("deadline_s", "reason"), [(WAIT_S, "length"), (0.0, "cancelled")])
def test_answers_end_before_the_deadline_or_are_cancelled(deadline_s, reason, begin, gate):
    models = use(begin("llama", "qwen2"), "qwen2")
    answers = [held_answer(models, gate), ask(models, "qwen2", 1)]
    with ThreadPoolExecutor() as pool:
        closing = pool.submit(models.close, deadline_s)
        until(lambda: refuses(models, "llama") and refuses(models, "qwen2"))
        until(lambda: models.loaded()["llama"].status().closing)
        gate.let(math.inf)
        closing.result(WAIT_S)
    text, done = read(answers[0])
    assert done.finish_reason == reason
    assert (text == alone("llama", 0)) == (reason == "length")
    assert read(answers[1])[1].finish_reason in (reason, "length")


def test_closing_while_a_model_is_loaded_closes_its_engine(begin, loader):
    models = use(begin("llama", "qwen2"), "llama")
    loader.door.clear()
    want(models, "qwen2")
    until(lambda: "qwen2" in loader.loads)
    models.close()
    assert refuses(models, "qwen2")
    loader.door.set()
    models._thread.join(WAIT_S)
    assert [each.status().alive for each in models.loaded().values()] == [False, False]


def test_closing_while_a_model_waits_for_room_loads_nothing_more(begin, gate, loader):
    models = begin("llama", "qwen2", max_loaded_models=1)
    answer = held_answer(models, gate)
    want(models, "qwen2")
    with ThreadPoolExecutor() as pool:
        closing = pool.submit(models.close, WAIT_S)
        models._thread.join(WAIT_S)
        assert not models._thread.is_alive()
        gate.let(math.inf)
        closing.result(WAIT_S)
    assert loader.loads == ["llama"]
    assert read(answer)[0] == alone("llama", 0)


# ---------------------------------------------------------------- over HTTP


def stream(site: Live, body: Any, path: str = "/generate/stream") -> Any:
    return httpx.stream("POST", site.url + path, json=body, timeout=WAIT_S)


@pytest.fixture
def many(loader: Loader, run: Begin) -> Begin:
    """Serve models of these kinds, or of a whole configuration, without sockets."""

    def start(*names: Any, **server: Any) -> kit.Site:
        given = isinstance(names[0], labs.Config)
        return run(names[0] if given else config_of(*names, **server), kit.Site)

    return start


@pytest.fixture
def live(loader: Loader, run: Begin, waits: set[int]) -> Begin:
    """Serve llama and, behind a closed door, qwen2: on a free port, with few places."""

    def start(**server: Any) -> Live:
        few = {"port": 0, "max_batch_rows": kit.ROWS, "max_waiting": 1} | server
        site = run(config_of("llama", "qwen2", **few), Live)
        use(site.engine, "llama")
        waits.clear()  # of the test's own thread
        loader.door.clear()
        return site

    return start


SHORT = {"max_new_tokens": 3, "prompt": "hi", **A}
ASKED = {
    "/generate": {**SHORT, "model": "qwen2"},
    "/generate/stream": {**SHORT, "model": "qwen2"},
    CHAT: {"model": "qwen2", "messages": kit.HELLO, "max_tokens": 3, **A},
    COMPLETIONS: {"model": "qwen2", "prompt": "hi", "max_tokens": 3, **A},
}
WRONG = {**SHORT, "model": "qwen2", "logit_bias": {"9999": 1}}


def body_of(kind: str) -> dict[str, Any]:
    """Ask a model for the text that it gives alone."""
    ids = [*kit.prompt(0).input_ids]
    return {"model": kind, "prompt": ids, "max_tokens": kit.NEW, "temperature": 0}


@pytest.fixture
def after_load(loader: Loader, waits: set[int]) -> Begin:
    """Return a function that sends a request while its model loads and returns the response."""

    def ask_early(site: Any, path: str, body: Any) -> Any:
        with ThreadPoolExecutor() as pool:
            answer = pool.submit(site.post, path, body)
            until(lambda: waits)
            loader.door.set()
            return answer.result(WAIT_S)

    return ask_early


def streamed(site: Live, loader: Loader, body: Any, path: str, comments: int) -> Any:
    """Return the events of a stream that waited for its model, after this many comments."""
    with stream(site, body, path) as response:
        assert response.status_code == 200
        lines = response.iter_lines()
        assert [next(lines), next(lines)] == [": ok", ""]
        for _ in range(comments):
            assert re.fullmatch(r": loading the model for \d+ s", next(lines))
            assert next(lines) == ""
        loader.door.set()
        rest = [line for line in lines if not line.startswith(":")]
    return kit.events_of("\n".join([*rest, ""]).encode())


@pytest.mark.parametrize("path", [*ASKED, "/explain"])
def test_a_request_for_a_loading_model_waits_and_is_answered(path, many, loader, after_load):
    loader.door.clear()
    site = many("llama", "qwen2")
    response = after_load(site, path, ASKED.get(path, {"prompt": "hi", "model": "qwen2"}))
    assert response.status_code == 200
    if path == "/explain":
        assert response.json["weight_bytes"] == model_of("qwen2").decoder.weight_bytes
        assert site.engine.loaded()["qwen2"].status().steps == 0
    else:
        assert "aaa" in response.text.replace("data: a\n\n", "a")
        assert '"model":"qwen2"' in response.text


def test_the_text_is_that_of_the_requested_model(many):
    site = many(*KINDS)
    answers = [site.post(COMPLETIONS, body_of(kind)).json for kind in KINDS]
    assert [each["choices"][0]["text"] for each in answers] == [alone(kind, 0) for kind in KINDS]
    del (body := body_of("llama"))["model"]
    assert site.post(COMPLETIONS, body).json["model"] == "llama"


def test_streams_report_that_their_model_is_loading_and_then_answer(live, loader, monkeypatch):
    monkeypatch.setattr(labs_service, "LOADING_S", 0.05)
    found = streamed(live(), loader, ASKED["/generate/stream"], "/generate/stream", 2)
    assert found[:3] == [("message", "a")] * 3
    site = live()
    monkeypatch.setattr(labs_service, "LOADING_S", WAIT_S)
    *chunks, (_, last) = streamed(site, loader, {**ASKED[CHAT], "stream": True}, CHAT, 0)
    assert last == "[DONE]"
    assert {json.loads(data)["model"] for _, data in chunks} == {"qwen2"}
    assert json.loads(chunks[-1][1])["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("body", "failures", "status", "kind", "param"),
    [
        (WRONG, {}, 400, "invalid_request_error", "logit_bias"),
        (
            ASKED["/generate"],
            {"qwen2": labs.ModelError("/secret")},
            503,
            "server_error",
            None,
        ),
    ],
)
def test_an_error_after_a_load_is_an_event_or_a_status(
    body, failures, status, kind, param, live, loader
):
    site, loader.failures = live(), failures
    ((name, data),) = streamed(site, loader, body, "/generate/stream", 0)
    error = json.loads(data)["error"]
    assert (name, error["type"], error["param"]) == ("error", kind, param)
    for path in ("/generate", "/generate/stream"):
        error = kit.refused(site.post(path, body), status, type=kind, param=param)
        assert "secret" not in data + str(error)
    assert site.post(COMPLETIONS, body_of("llama")).status_code == 200
    assert site.get("/readyz").json == {"status": "ok"}


@pytest.mark.parametrize("path", ["/generate", "/generate/stream"])
@pytest.mark.parametrize("model", ["qwen2", "auto", "last"])
def test_the_time_of_a_request_runs_while_its_model_is_loaded(path, model, many, loader):
    loader.door.clear()
    tables = {"auto": ROUTED, "last": TABLES + "timeout_s = 0.1\n"}
    site = many(configured(tables[model])) if model in tables else many("llama", "qwen2")
    timeout = {} if model == "last" else {"timeout_s": 0.1}
    response = site.post(path, {**SHORT, "model": model, **timeout})
    if path == "/generate":
        name = "first" if model == "auto" else model
        assert error_of(response, 503)["message"] == f"{name} is being loaded"
        assert response.headers["retry-after"] == "1"
    else:
        assert response.status_code == 200
        kind, data = kit.events_of(response.content)[-1]
        assert (kind, json.loads(data)["error"]["code"]) == ("error", "overloaded")
    loader.door.set()
    assert site.post("/generate", {**SHORT, "model": model, "timeout_s": 60}).json["text"] == "aaa"


def test_the_time_spent_waiting_is_subtracted_from_the_timeout():
    wanted, now = labs.Generation(timeout_s=30.0), time.perf_counter()
    left = [labs_turns.in_time_left(wanted, now - spent).timeout_s for spent in (0, 20, 40)]
    assert left[0] == 30 > 10 >= left[1] > 0.1 > left[2] > 0
    assert labs_turns.in_time_left(labs.Generation(), now - 40).timeout_s is None


@pytest.mark.parametrize("path", ["/generate", "/generate/stream"])
def test_a_client_that_waits_for_a_model_holds_a_place_until_it_hangs_up(path, live, waits):
    site = live()

    def status_of_stream() -> int:
        with stream(site, ASKED["/generate/stream"]) as response:
            return response.status_code

    connection = site.connect(kit.request(path, ASKED[path]))
    until(lambda: waits)
    for other in ASKED:
        refused = site.post(other, ASKED[other])
        kit.refused(refused, 503, code="overloaded", message="qwen2 is being loaded")
        assert int(refused.headers["retry-after"]) >= 1
    assert status_of_stream() == 503
    connection.close()
    until(lambda: status_of_stream() == 200)


def test_a_server_full_of_waiting_requests_answers_for_loaded_models(live, gate, loader, waits):
    site, places = live(max_waiting=8, max_loaded_models=2), 8
    with contextlib.ExitStack() as stack:

        def send(body: Any, count: int) -> list[Any]:
            sent = kit.request("/generate", body, "Connection: close")
            return [stack.enter_context(site.connect(sent)) for _ in range(count)]

        waiting = send(ASKED["/generate"], places)
        until(lambda: len(waits) == places)
        body = site.post(COMPLETIONS, body_of("llama")).json
        assert body["choices"][0]["text"] == alone("llama", 0)
        gate.let(0)
        waiting += send({**SHORT, "model": "llama"}, kit.ROWS + places)
        status = site.engine.loaded()["llama"].status
        until(lambda: (status().running + status().waiting) == kit.ROWS + places)
        for path in ("/health", "/readyz", "/v1/models", "/metrics", "/"):
            assert httpx.get(site.url + path, timeout=WAIT_S).status_code == 200
        assert loader.loads == ["llama", "qwen2"]
        gate.let(math.inf)
        loader.door.set()
        for connection in waiting:
            data = b"".join(iter(functools.partial(connection.recv, 65_536), b""))
            assert b'"text":"aaa"' in data


def test_a_slow_reader_holds_no_model(tiny_folder, other_folder, run):
    models = run(config := config_at(tiny_folder, other_folder, max_loaded_models=1))
    service = labs_service.Service(config, models, labs_gate.Quota(None), CollectorRegistry())
    req = falcon.testing.create_req()
    req.context.owner, req.context.began = "", time.perf_counter()
    prompts = (labs_request.Prompt(prompt="hi"),)
    options = {**A, "max_new_tokens": 60}
    asking = labs_request.Request(prompts=prompts, model="tiny", options=options)
    checked = labs_request.check(service.context, asking)
    answer = service.submit(req, checked, service.leased(req, checked))
    weights = answered(models, "tiny")
    answered(models, "other")
    until(lambda: weights() is None)
    assert "".join(getattr(event, "text", "") for _, event in answer) == "a" * 60
    assert answer.record()["completion_tokens"] == 60


TABLES = """
default_model = "first"
[models.first]
model_name = "llama"
max_new_tokens = 3
[models.second]
model_name = "qwen2"
max_new_tokens = 5
use_chat_template = false
[models.last]
model_name = "gpt2"
"""


def test_each_model_has_the_settings_of_its_table(many):
    site = many(configured(TABLES))
    template = "<bos><|user|>hi<end><|assistant|>"
    for name, new, text in (("first", 3, template), ("second", 5, "<bos>hi")):
        body = {"prompt": "hi", "model": name, **A}
        assert site.post("/generate", body).json["text"] == "a" * new
        explained = site.post("/explain", body).json
        found = explained["prompt"], explained["settings"]["max_new_tokens"]["value"]
        assert found == (text, new)
    assert site.post("/generate", {"prompt": "hi", **A}).json["model"] == "first"
    chat = {"messages": kit.HELLO, "model": "second"}
    assert "template" in error_of(site.post(CHAT, chat), 400)["message"]


@pytest.mark.parametrize("path", [*ASKED, "/explain"])
def test_an_unknown_model_is_not_found_and_the_served_ones_are_named(path, many, loader):
    site = many(*KINDS)
    for name in ("lama", "auto"):  # auto needs rules
        answer = site.post(path, {**ASKED.get(path, SHORT), "model": name})
        error = kit.refused(answer, 404, code="model_not_found", param="model")
        assert all(word in error["message"] for word in (f"'{name}'", *KINDS))
    site.engine.wait()
    assert loader.loads == ["llama"]


def test_models_are_listed_before_and_after_they_are_loaded(tiny_folder, other_folder):
    config = config_at(tiny_folder, other_folder)
    models = labs_models.Models(config, start=False)
    site = kit.Site(models, config, models)

    def cards() -> list[tuple[Any, ...]]:
        found = site.get("/v1/models").json["data"]
        return [(card["id"], card["loaded"], card["context_length"]) for card in found]

    def check_each() -> None:  # only while no model is being loaded
        for card in site.get("/v1/models").json["data"]:
            assert site.get(f"/v1/models/{card['id']}").json == card

    assert cards() == [("tiny", False, None), ("other", False, None)]
    check_each()
    models.start()
    until(lambda: cards() == [("tiny", True, 4096), ("other", False, 512)])
    check_each()
    assert site.post("/generate", {**SHORT, "model": "other"}).json["text"] == "aaa"
    assert cards()[1] == ("other", True, 512)
    assert error_of(site.get("/v1/models/none"), 404)["code"] == "model_not_found"
    stop(models)


def test_metrics_and_log_lines_name_the_model_that_answered(many, caplog):
    caplog.set_level(logging.INFO, "labs.api")
    site = many(*KINDS)
    use(site.engine, "llama")
    for path in ("/generate", "/generate/stream"):
        site.post(path, {**SHORT, "model": "qwen2"})
    lines = (line.rpartition(" ") for line in site.get("/metrics").text.splitlines())
    figures = {name: value for name, _, value in lines}
    for kind in ("llama", "qwen2"):
        assert figures[f'labs_engine_alive{{model_name="{kind}"}}'] == "1.0"
        assert float(figures[f'labs_steps_total{{model_name="{kind}"}}']) > 0
    assert not [name for name in figures if "gpt2" in name]
    tokens = [figures.get(f'labs_generation_tokens_total{{model_name="{kind}"}}') for kind in KINDS]
    assert tokens == [None, "6.0", None]
    site.post("/generate", {**SHORT, "model": "llama"})
    models = [line["model"] for line in kit.log_lines(caplog) if "model" in line]
    assert models == ["qwen2", "qwen2", "llama"]


def test_readiness_goes_from_loading_to_ok_to_draining(many, loader, gate):
    def readiness() -> tuple[int, str]:
        assert site.get("/health").json == {"status": "ok"}
        return (answer := site.get("/readyz")).status_code, answer.json["status"]

    loader.door.clear()
    site = many("llama", "qwen2", keep_alive_s=0.05)
    assert readiness() == (503, "loading")
    loader.door.set()
    site.engine.wait()
    assert readiness() == (200, "ok")
    until(lambda: site.engine.loaded() == {})
    assert readiness() == (200, "ok")  # it is loaded on demand
    answer = held_answer(site.engine, gate)
    with ThreadPoolExecutor() as pool:
        closing = pool.submit(site.engine.close, WAIT_S)
        until(lambda: readiness() == (503, "draining"))
        refused = site.post("/generate", ASKED["/generate"])
        assert error_of(refused, 503)["message"] == "the server is shutting down"
        gate.let(math.inf)
        closing.result(WAIT_S)
    assert read(answer)[0] == alone("llama", 0)


FAILURES = [labs.ModelError("/secret: no model"), OSError("/secret"), torch.OutOfMemoryError(OOM)]


@pytest.mark.parametrize("failure", FAILURES, ids=lambda error: type(error).__name__)
def test_a_failed_load_of_the_default_model_is_reported_retried_and_no_harm_to_others(
    failure, many, loader, caplog, monkeypatch
):
    loader.failures["llama"] = failure
    site = many("llama", "qwen2", max_loaded_models=2)
    for ask_of_owner in (site.engine.wait, site.engine.check):
        with pytest.raises(labs.LabsError, match=re.escape(str(failure))):
            ask_of_owner()
    assert site.get("/readyz").json == {"status": "dead"}
    assert site.post("/generate", ASKED["/generate"]).json["text"] == "aaa"
    assert site.get("/readyz").json == {"status": "ok"}
    for path in ("/generate", "/explain"):
        answer = site.post(path, {"prompt": "hi"})
        kit.refused(answer, 503, code="model_not_loaded", message=f"llama {REASON}")
        assert int(answer.headers["Retry-After"]) == labs_models.RETRY_S
    assert (len(errors_in(caplog)), str(failure) in caplog.text) == (1, True)
    assert loader.loads == ["llama", "qwen2"]
    del loader.failures["llama"]
    monkeypatch.setattr(labs_models, "RETRY_S", 0.0)
    assert site.post("/generate", SHORT).json["text"] == "aaa"
    site.engine.check()
    assert loader.loads == ["llama", "qwen2", "llama"]


@pytest.mark.parametrize(
    ("place", "error"), [("_make_room", SystemExit(3)), ("_settle", KeyboardInterrupt())]
)
def test_an_exception_in_the_loading_thread_fails_waiting_requests(
    place, error, many, loader, monkeypatch
):
    use((site := many("llama", "qwen2", max_loaded_models=2)).engine, "llama")
    honest, raised = getattr(labs_models.Models, place), list[str]()

    def once(*arguments: Any) -> Any:
        if not raised and site.engine._wanted:
            raised.append(place)
            raise error
        return honest(*arguments)

    monkeypatch.setattr(labs_models.Models, place, once)
    error_of(site.post("/generate", ASKED["/generate"]), 503)
    assert site.get("/readyz").json == {"status": "ok"}
    monkeypatch.setattr(labs_models, "RETRY_S", 0.0)
    assert site.post("/generate", ASKED["/generate"]).status_code == 200


def test_waiting_requests_fail_when_the_server_shuts_down(live, waits):
    site = live(max_waiting=2)
    with ThreadPoolExecutor() as pool, stream(site, ASKED["/generate/stream"]) as response:
        lines = response.iter_lines()
        assert next(lines) == ": ok"
        whole = pool.submit(site.post, "/generate", ASKED["/generate"])
        until(lambda: len(waits) == 2)
        site.engine.close()
        assert error_of(whole.result(WAIT_S), 503)["message"] == "the server is shutting down"
        ((kind, data),) = kit.events_of(("\n".join(lines) + "\n").encode())
    assert (kind, json.loads(data)["error"]["code"]) == ("error", "overloaded")


# ---------------------------------------------------------------- the router


ROUTED = rf"""{TABLES}
[[router.rules]]
model = "second"
pattern = '(?i)\bcode\b'
over_prompt_tokens = 40
[[router.rules]]
model = "last"
over_prompt_tokens = 80
[[router.rules]]
model = "last"
pattern = "^sum:"
"""


def chat(*contents: str) -> dict[str, Any]:
    turns = zip(("user", "assistant", "user"), contents, strict=False)
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


ROUTES = [
    ("/generate", {"prompt": "hi"}, "first"),
    ("/generate", {"prompt": "code " * 7}, "first"),  # 35, and four of the template
    ("/generate", {"prompt": "code " * 8}, "second"),
    ("/generate", {"prompt": "x" * 76}, "first"),
    ("/generate", {"prompt": "x" * 77}, "last"),
    ("/generate", {"prompt": "x" * 79, "use_chat_template": False}, "first"),
    ("/generate", {"prompt": "x" * 80, "use_chat_template": False}, "last"),
    ("/generate", chat("hi", "well", "x" * 70), "last"),
    (CHAT, chat("sum: 1", "2", "more"), "last"),
    (CHAT, chat("hi", "fine", "sum: 1"), "first"),
    (CHAT, chat("hi", "fine", "x" * 70), "last"),
    (COMPLETIONS, {"prompt": [120] * 80}, "first"),
    (COMPLETIONS, {"prompt": [[120], [120] * 81]}, "last"),
    (COMPLETIONS, {"prompt": ["sum: 1", "hi"]}, "last"),
    (COMPLETIONS, {"prompt": ["x" * 30, "my code " * 6]}, "second"),
]


def test_the_first_rule_that_holds_decides_which_model_answers(many):
    site, found = many(configured(ROUTED)), []
    for path, body, _ in ROUTES:
        rest = {"max_new_tokens" if path == "/generate" else "max_tokens": 2, **A}
        answer = site.post(path, {**body, **rest, "model": "auto"})
        assert answer.status_code == 200, answer.text
        found.append((path, body, answer.json["model"]))
    assert found == ROUTES
    answer = site.post("/generate", {"prompt": "", "model": "auto"})
    kit.refused(answer, 400, message="the prompt is empty")


@pytest.mark.parametrize("path", [path for path in ASKED if path != CHAT])
def test_a_request_that_names_a_model_or_none_is_not_routed(path, many):
    site, body = many(configured(ROUTED)), {**ASKED[path], "prompt": "sum: 1"}
    for model, name in (("second", "second"), ("auto", "last"), (None, "first")):
        named = {"model": model} if model else {}
        del (unnamed := {**body})["model"]
        assert f'"model":"{name}"' in site.post(path, unnamed | named).text


@pytest.mark.parametrize("long", ["x" * 200, [120] * 200], ids=["text", "ids"])
def test_a_prompt_longer_than_the_default_models_context_is_routed(long, many, loader):
    lengths = {"llama": 64}
    loader.made = lambda name: replace(model_of(name), context_length=lengths.get(name, 512))
    body = {"prompt": long, "max_tokens": 2, **A}
    site = many(configured(ROUTED))
    assert error_of(site.post(COMPLETIONS, body), 400)["code"] == "context_length_exceeded"
    assert site.post(COMPLETIONS, {**body, "model": "auto"}).json["model"] == "last"


def test_a_rule_of_a_pattern_alone_waits_for_no_other_model(many, loader):
    rule = '[[router.rules]]\nmodel = "second"\npattern = "^sum:"\n'
    loader.failures["llama"] = labs.ModelError("gone")
    site = many(configured(ROUTED.replace("[[router.rules]]", rule + "[[router.rules]]", 1)))
    body = {"prompt": "sum: 1", "model": "auto", **A}
    assert site.post("/generate", body).json["model"] == "second"


def test_an_unloaded_default_model_counts_tokens_without_being_loaded_again(many, loader):
    site = many(replace(configured(ROUTED), server=labs.Server(max_loaded_models=1)))
    site.engine.wait()
    assert site.post("/generate", {**SHORT, "model": "last"}).json["model"] == "last"
    assert [*site.engine.loaded()] == ["last"]
    for long in ("x" * 80, [120] * 81):
        body = {"prompt": long, "max_tokens": 2, "model": "auto", **A}
        assert site.post(COMPLETIONS, body).json["model"] == "last"
    assert loader.loads == ["llama", "gpt2"]


# ---------------------------------------------------------------- settings of several models


NAMES = """
[models.small]
model_name = "org/small"
[models.large]
model_name = "org/large"
"""
RULE = '[[router.rules]]\nmodel = "small"\n'
RULES: list[dict[str, Any]] = [
    {"model": "small", "pattern": "^\\d+ #\"'\\\\ é\n", "over_prompt_tokens": 3},
    {"model": "large", "over_prompt_tokens": 0},
    {"model": "small", "pattern": ""},
]


WRONG_TABLES = [  # the text of labs.toml, and what its refusal says
    (NAMES + RULE.replace("small", "smal") + 'pattern = "a"', "rules[0] 'smal' small?"),
    (f'{NAMES}{RULE}pattern = "a"\n[[router.rules]]\nmodel = "z"\npattern = "a"', "rules[1] 'z'"),
    (NAMES + RULE + 'pattern = "("', "router_rules pattern '('"),
    (NAMES + RULE, "router_rules needs over_prompt_tokens or pattern"),
    (NAMES + RULE + "over_prompt_tokens = -1", "router_rules >= 0"),
    (NAMES + RULE + 'patern = "a"', "router_rules patern"),
    (NAMES + '[[router.rules]]\npattern = "a"', "router_rules model"),
    (NAMES + "[router]\nrules = 5", "router_rules 5 array"),
    (NAMES + "[router]\nrule = []", "'rule' rules?"),
    (NAMES + '[models.auto]\nmodel_name = "a"', "[models.auto] belongs to [router]"),
    ('default_model = "smal"' + NAMES, "default_model smal small?"),
    ('default_model = "zebra"' + NAMES, "default_model zebra no [models] table"),
    ('default_model = "auto"' + NAMES, "default_model auto"),
    ("default_model = 5" + NAMES, "default_model"),
    ('default_model = "small"\n[generation]\nmodel_name = "m"' + NAMES, "default_model both"),
]


@pytest.mark.parametrize(("text", "words"), WRONG_TABLES)
def test_wrong_models_and_rules_are_refused_in_one_sentence(text, words):
    with pytest.raises(labs.ConfigError) as caught:
        configured(text)
    assert [word for word in words.split() if word not in str(caught.value)] == []
    assert kit.is_one_sentence(caught.value)


def program_config(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> labs.Config:
    """Return the configuration that labs-api would serve with these arguments."""
    found: list[labs.Config] = []
    monkeypatch.setattr(labs_serve, "serve", found.append)
    labs_cli.make_api().main(list(arguments), prog_name="labs-api", standalone_mode=False)
    return found[0]


@pytest.mark.parametrize("place", ["labs.toml", "LABS_ROUTER_RULES", "--router-rules"])
def test_rules_come_from_a_file_the_environment_or_a_flag(place, monkeypatch):
    text = json.dumps(RULES)
    inline = re.sub(r'"(\w+)":', r"\1 =", text)
    write("labs.toml", NAMES + (f"[router]\nrules = {inline}\n" if place == "labs.toml" else ""))
    if place == "--router-rules":
        config = program_config(monkeypatch, place, text)
    else:
        config = labs.load_config(env={place: text} if place.isupper() else {})
    assert config.router.rules == tuple(labs.RouterRule(**rule) for rule in RULES)
    assert config.sources["router_rules"] == place
    write("again.toml", labs_explain.dump_effective_config(config) + NAMES)
    assert labs.load_config("again.toml", env={}).router == config.router


WRONG_RULES = {'[{"model": "small", "pattern": "("}]': "pattern = '('", "nonsense": "router"}
WRONG_RULES |= {'[{"model": "zebra", "pattern": "a"}]': "rules[0]", '{"model": "a"}': "array"}


@pytest.mark.parametrize(("text", "words"), WRONG_RULES.items())
def test_a_wrong_rule_is_named_in_the_environment_and_in_a_flag(text, words, monkeypatch):
    write("labs.toml", NAMES)
    with pytest.raises(click.ClickException) as refused:
        program_config(monkeypatch, "--router-rules", text)
    with pytest.raises(labs.ConfigError) as caught:
        labs.load_config(env={"LABS_ROUTER_RULES": text})
    for error in (refused.value.format_message().partition("\nlabs-gen ")[0], str(caught.value)):
        assert (words in error.lower(), "\n" in error) == (True, False)


def test_a_flag_replaces_rules_which_may_name_the_default_model_by_its_id(monkeypatch):
    rule = '[[router.rules]]\nmodel = "org/usual"\npattern = "a"\n'
    config = configured('[generation]\nmodel_name = "org/usual"\n' + NAMES + rule)
    assert config.router.rules[0].model == config.model_id == "org/usual"
    assert len(program_config(monkeypatch).router.rules) == 1
    assert program_config(monkeypatch, "--router-rules", "[]").router.rules == ()


@pytest.mark.parametrize("place", ["environment", "overrides", "dotenv", "flag"])
@pytest.mark.parametrize(("name", "model"), [("small", "org/small"), ("other/m", "other/m")])
def test_a_requested_model_wins_over_the_default_one(name, model, place, monkeypatch):
    config = configured('default_model = "large"\n' + NAMES)
    assert (config.model_id, config.model.model_name) == ("large", "org/large")
    write(".env", f"LABS_MODEL={name}" if place == "dotenv" else "")
    if place == "flag":
        config = program_config(monkeypatch, "--model", name)
    else:
        env = {"LABS_MODEL": name} if place == "environment" else {}
        given = {"model_name": name} if place == "overrides" else {}
        config = labs.load_config(env=env, overrides=given)
    assert (config.model_id, config.model.model_name) == (name, model)
    found = {name: each.model.model_name for name, each in config.models.items()}
    assert found == {"small": "org/small", "large": "org/large"}
