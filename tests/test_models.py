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
import shutil
import signal
import threading
import time
import tomllib
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
import transformers
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from kit import (
    CHAT,
    COMPLETIONS,
    HELLO,
    NEW,
    ROWS,
    WAIT_S,
    A,
    Gate,
    Live,
    Site,
    alone,
    asked,
    end_of,
    error_of,
    events_of,
    is_one_sentence,
    log_lines,
    model_of,
    program,
    prompt,
    python,
    quiet,
    random_model,
    read,
    request,
    save_model,
    serving,
    until,
    write,
)
from msgspec.structs import replace
from prometheus_client import CollectorRegistry

import labs
import labs_api
import labs_cli
import labs_decode
import labs_engine
import labs_gate
import labs_models
import labs_request
import labs_serve
import labs_turns

KINDS = ("llama", "qwen2", "gpt2")
OOM = "CUDA out of memory. Tried to allocate 2.00 GiB"


# ---------------------------------------------------------------- helpers


class Loader:
    """Stands for labs.load_model: gives the tiny model of a kind, once its door is open.

    loads: of which models loads were begun; failures: what they raise, by name.
    """

    def __init__(self) -> None:
        self.loads: list[str] = []
        self.failures: dict[str, Exception] = {}
        self.door = threading.Event()
        self.door.set()

    def load(self, config: labs.Config, *, cached: bool) -> labs.Model:
        assert not cached, "a remembered model would never be free"
        name = config.model.model_name
        self.loads.append(name)
        assert self.door.wait(WAIT_S)
        if name in self.failures:
            raise self.failures[name]
        return self.made(name)

    def made(self, name: str) -> labs.Model:
        return model_of(name)


@pytest.fixture
def loader(monkeypatch: pytest.MonkeyPatch) -> Iterator[Loader]:
    """Load tiny models; nobody loses patience, unless a test says so."""
    loader = Loader()
    monkeypatch.setattr(labs, "load_model", loader.load)
    monkeypatch.setattr(labs_models, "weight_bytes", lambda spec: 1)
    monkeypatch.setattr(labs_models, "context_length", lambda spec: None)
    monkeypatch.setattr(labs_models, "EVICT_BUSY_AFTER_S", 600.0)
    yield loader
    loader.door.set()


@pytest.fixture(autouse=True, scope="module")
def little_garbage() -> Iterator[None]:
    """Let the libraries be: whenever a model goes, all that is there is looked through."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


Begin = Callable[..., labs_models.Models]


@pytest.fixture
def begin(loader: Loader) -> Iterator[Begin]:
    """Begin to load models; at the end all of their threads have to end."""
    with contextlib.ExitStack() as stack:

        def start(*names: str, **server: Any) -> labs_models.Models:
            models = labs_models.Models(config_of(*names, **server))
            stack.callback(stop, models, loader)
            return models

        yield start


@pytest.fixture
def gate(begin: Begin) -> Iterator[Gate]:
    """Hold the forward calls of llama; they pass again before the models are closed."""
    gate = Gate(model_of("llama"))
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


def stop(models: labs_models.Models, loader: Loader | None = None) -> None:
    """Close, and wait for the thread that loads."""
    engines = models.loaded().values()
    models.close()
    if loader is not None:
        loader.door.set()
    models._thread.join(WAIT_S)
    assert not models._thread.is_alive()
    assert not [each for each in (*engines, *models.loaded().values()) if each._thread.is_alive()]


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
    end = time.monotonic() + WAIT_S
    while True:
        try:
            return models(name)
        except labs_models.Loading as loading:
            assert time.monotonic() < end, f"{name} never comes"
            loading.wait(labs_models.POLL_S)


def ask(
    models: labs_models.Models, name: str, number: int = 0, wanted: labs.Generation | None = None
) -> labs_engine.Answer:
    engine = come(models, name)
    try:
        return engine.submit(prompt(number), wanted or asked())
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
        assert engine is None or quiet(engine)
    return models


def leaving(models: labs_models.Models) -> list[str]:
    """Return which models take no more requests."""
    return [name for name, entry in models._entries.items() if entry.draining]


def held_answer(models: labs_models.Models, gate: Gate) -> labs_engine.Answer:
    """Let llama begin an answer and hold it there."""
    before = len(gate.calls)
    gate.let(3)
    answer = ask(models, "llama")
    gate.until(before + 4)
    return answer


# ---------------------------------------------------------------- one model


def test_a_model_that_is_being_loaded_raises_loading_and_answers_then(begin, loader):
    loader.door.clear()
    models = begin("llama")
    with pytest.raises(labs_models.Loading, match="llama is being loaded"):
        models.check()
    want(models, "llama")
    assert not models.failed
    assert models.loaded() == {}
    loader.door.set()
    engine = models.wait()
    models.check()
    assert read(ask(models, "llama"))[0] == alone("llama", 0)
    assert models.loaded() == {"llama": engine}
    models.close()
    assert not engine._thread.is_alive()


def test_who_waits_for_a_model_is_woken_when_it_is_there(begin, loader, waits):
    loader.door.clear()
    models = begin("llama")
    with pytest.raises(labs_models.Loading) as caught:
        models("llama")
    with ThreadPoolExecutor() as pool:
        woken = pool.submit(caught.value.wait, 10 * WAIT_S)
        until(lambda: waits)
        loader.door.set()
        woken.result(WAIT_S)
    assert read(ask(models, "llama"))[0] == alone("llama", 0)


def test_nothing_is_loaded_before_the_start(loader):
    models = labs_models.Models(config_of("llama"), start=False)
    want(models, "llama")
    assert loader.loads == []
    models.start()
    use(models, "llama")
    stop(models)


def test_many_who_ask_for_a_model_at_once_load_it_once(begin, loader):
    models = begin("llama", "qwen2")
    with ThreadPoolExecutor(20) as pool:
        answers = [pool.submit(ask, models, "qwen2", n % 3) for n in range(20)]
        texts = [read(answer.result())[0] for answer in answers]
    assert texts == [alone("qwen2", n % 3) for n in range(20)]
    assert loader.loads == ["llama", "qwen2"]


FAILURES = [
    labs.ModelError("/srv/secret: there is no such model"),
    labs.ConfigError("torch_dtype = float16: /srv/secret refuses"),
    RuntimeError("unforeseen in /srv/secret"),
    torch.OutOfMemoryError(OOM),
]


@pytest.mark.parametrize("failure", FAILURES, ids=lambda error: type(error).__name__)
def test_why_a_load_failed_is_told_to_the_owner_and_the_log_only(failure, begin, loader, caplog):
    loader.failures["llama"] = failure
    models = begin("llama")
    for ask_of_owner in (models.wait, models.check):
        with pytest.raises(labs.LabsError, match=re.escape(str(failure))):
            ask_of_owner()
    assert models.failed
    for ask_of_client in (models, models.reader):
        with pytest.raises(labs.ModelError, match=r"^llama could not be loaded; the server's log has"):
            ask_of_client("llama")
    errors = [record for record in caplog.records if record.name == "labs.models"]
    assert [record.levelname for record in errors] == ["ERROR"]
    assert str(failure) in caplog.text


def test_a_failed_load_is_tried_again_only_after_a_while(begin, loader, monkeypatch):
    models = use(begin("llama", "qwen2", max_loaded_models=3), "llama")
    loader.failures["qwen2"] = labs.ModelError("the disk is away")
    with pytest.raises(labs.ModelError, match="the server's log has the reason"):
        come(models, "qwen2")
    for _ in range(3):
        with pytest.raises(labs.ModelError, match="the server's log has the reason"):
            models("qwen2")
    del loader.failures["qwen2"]
    assert loader.loads == ["llama", "qwen2"]
    monkeypatch.setattr(labs_models, "RETRY_S", 0.0)
    use(models, "qwen2")
    assert loader.loads == ["llama", "qwen2", "qwen2"]


def test_the_default_model_may_come_after_a_failure(begin, loader, monkeypatch):
    loader.failures["llama"] = labs.ModelError("the disk is away")
    models = begin("llama")
    with pytest.raises(labs.ModelError, match="the disk is away"):
        models.wait()
    del loader.failures["llama"]
    monkeypatch.setattr(labs_models, "RETRY_S", 0.0)
    use(models, "llama")
    models.check()
    assert not models.failed


def test_one_model_that_cannot_be_loaded_is_no_harm_to_another(begin, loader):
    loader.failures["qwen2"] = RuntimeError("broken")
    loader.door.clear()
    models = begin("llama", "qwen2", "gpt2")
    for name in ("qwen2", "gpt2"):
        want(models, name)
    loader.door.set()
    use(models, "gpt2", "llama")
    assert loader.loads == ["llama", "qwen2", "gpt2"]
    assert not models.failed


@pytest.mark.parametrize("failing", ["load", "reading", "engine"])
def test_memory_that_runs_out_during_a_load_is_given_back(failing, begin, loader, monkeypatch):
    monkeypatch.setattr(labs_models.log, "disabled", True)  # pytest keeps what is logged
    models, made, held = use(begin("llama", "qwen2"), "llama"), [], []

    def half(*_: Any, **__: Any) -> Any:
        decoder = labs_decode.prepare(random_model("qwen2"))
        made.append(weakref.ref(decoder.model))
        if failing == "load":
            raise torch.OutOfMemoryError(OOM)
        if failing == "reading":
            raise labs.ModelError(OOM) from torch.OutOfMemoryError(OOM)
        return replace(model_of("qwen2"), decoder=decoder)

    def no_engine(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError(OOM)

    def free_memory() -> None:
        gc.collect()
        held.extend(each() is not None for each in made)

    monkeypatch.setattr(labs, "load_model", half)
    monkeypatch.setattr(labs, "release_memory", free_memory)
    if failing == "engine":
        monkeypatch.setattr(labs_engine, "Engine", no_engine)
    with pytest.raises(labs.ModelError, match="the server's log has the reason"):
        come(models, "qwen2")
    assert held == [False]
    use(models, "llama")


# ---------------------------------------------------------------- more models than may be loaded


def test_the_model_used_longest_ago_is_let_go_for_another(begin, loader):
    models = use(begin(*KINDS, max_loaded_models=2), "llama", "qwen2", "llama", "gpt2")
    assert [*models.loaded()] == ["llama", "gpt2"]
    use(models, "qwen2")
    assert [*models.loaded()] == ["qwen2", "gpt2"]
    assert loader.loads == ["llama", "qwen2", "gpt2", "qwen2"]


def test_a_model_that_is_let_go_is_closed_and_takes_its_engines_thread_along(begin):
    models = begin("llama", "qwen2", max_loaded_models=1)
    engine = models.wait()
    use(models, "qwen2")
    assert [*models.loaded()] == ["qwen2"]
    until(lambda: not engine._thread.is_alive())


def test_a_model_that_is_let_go_is_not_let_go_twice(begin, caplog):
    caplog.set_level(logging.INFO)
    use(begin(*KINDS, max_loaded_models=1), *KINDS, "llama")
    said = [record.getMessage() for record in caplog.records if record.name == "labs.models"]
    assert said == [f"labs-api: unloaded {name}" for name in KINDS]


@pytest.mark.parametrize("busy", ["running", "waiting", "held"])
def test_a_busy_model_is_never_let_go_while_another_is_idle(busy, begin, gate):
    models = begin(*KINDS, max_loaded_models=2, max_batch_rows=1)
    answers = [] if busy == "held" else [held_answer(models, gate)]
    if busy == "waiting":
        answers.append(ask(models, "llama", 1))
        answers.pop(0).close()
        assert models.loaded()["llama"].status().waiting == 1
    engine = come(models, "llama") if busy == "held" else models.loaded()["llama"]
    use(models, "qwen2")
    use(models, "gpt2")
    use(models, "qwen2")
    assert models.loaded()["llama"] is engine
    gate.let(math.inf)
    number = 1 if busy == "waiting" else 0
    assert [read(answer)[0] for answer in answers] == [alone("llama", number)] * len(answers)


def test_a_request_for_another_model_waits_while_all_are_busy(begin, gate, loader):
    models = begin("llama", "qwen2", max_loaded_models=1)
    answer = held_answer(models, gate)
    want(models, "qwen2")
    more = ask(models, "llama", 1)  # they are taken in still
    gate.let(5)
    gate.until(9)
    assert loader.loads == ["llama"]
    gate.let(math.inf)
    assert [read(answer)[0], read(more)[0]] == [alone("llama", n) for n in (0, 1)]
    use(models, "qwen2")


def test_a_model_that_is_busy_for_too_long_ends_its_answers_and_goes(
    begin, gate, loader, monkeypatch
):
    models = begin("llama", "qwen2", max_loaded_models=1)
    engine, answer = models.wait(), held_answer(models, gate)
    monkeypatch.setattr(labs_models, "EVICT_BUSY_AFTER_S", 0.0)
    want(models, "qwen2")
    until(lambda: leaving(models) == ["llama"])
    assert loader.loads == ["llama"]
    with ThreadPoolExecutor() as pool:
        later = pool.submit(lambda: read(ask(models, "llama", 1)))
        gate.let(math.inf)
        text, done = read(answer)
        assert (text, done.finish_reason) == (alone("llama", 0), "length")
        assert later.result(WAIT_S)[0] == alone("llama", 1)
    assert loader.loads == ["llama", "qwen2", "llama"]
    assert models.loaded()["llama"] is not engine


def test_a_model_that_was_to_go_stays_if_another_becomes_idle(begin, gate, loader, monkeypatch):
    models = begin(*KINDS, max_loaded_models=2)
    answer = held_answer(models, gate)
    come(models, "qwen2")
    monkeypatch.setattr(labs_models, "EVICT_BUSY_AFTER_S", 0.0)
    want(models, "gpt2")
    until(lambda: leaving(models) == ["llama"])
    models.release("qwen2")
    use(models, "gpt2")
    more = ask(models, "llama", 1)
    gate.let(math.inf)
    assert [read(answer)[0], read(more)[0]] == [alone("llama", n) for n in (0, 1)]
    assert loader.loads == ["llama", "qwen2", "gpt2"]


@pytest.mark.parametrize("oldest", ["llama", "qwen2"])
def test_of_busy_models_the_one_asked_longest_ago_goes(oldest, begin, loader, monkeypatch):
    models = begin(*KINDS, max_loaded_models=2)
    newest = "llama" if oldest == "qwen2" else "qwen2"
    for name in ("llama", "qwen2", oldest, newest):
        come(models, name)
    monkeypatch.setattr(labs_models, "EVICT_BUSY_AFTER_S", 0.0)
    want(models, "gpt2")
    until(lambda: leaving(models))
    assert leaving(models) == [oldest]


def test_a_model_stays_until_who_waited_for_it_has_come(begin, loader):
    models = begin("llama", "qwen2", max_loaded_models=1)
    models.wait()
    loader.door.clear()
    want(models, "qwen2")
    until(lambda: loader.loads == ["llama", "qwen2"])
    want(models, "llama")
    loader.door.set()
    until(lambda: "qwen2" in models.loaded())
    time.sleep(0.5)  # who asked is slow to come back
    answer = models("qwen2").submit(prompt(0), asked())
    models.release("qwen2")
    assert read(answer)[0] == alone("qwen2", 0)
    use(models, "llama")


def test_a_model_that_nobody_comes_for_goes(begin, loader, monkeypatch):
    models = begin("llama", "qwen2", max_loaded_models=1)
    models.wait()
    monkeypatch.setattr(labs_models, "EVICT_BUSY_AFTER_S", 0.1)
    want(models, "qwen2")
    until(lambda: "qwen2" in models.loaded())
    use(models, "llama")
    assert loader.loads == ["llama", "qwen2", "llama"]


def test_two_models_asked_by_many_in_turn_where_one_has_room_answer_all(begin, loader, monkeypatch):
    askers, rounds = 24, 3
    names = ("llama", "qwen2")
    expected = {(name, n): alone(name, n) for name in names for n in range(askers)}
    assert len({*expected.values()}) == len(expected), "a text tells whose it is"
    monkeypatch.setattr(labs_models, "EVICT_BUSY_AFTER_S", 0.2)
    models = begin(*names, max_loaded_models=1)

    def ask_in_turn(number: int) -> list[bool]:
        turns = [names[(number + turn) % 2] for turn in range(rounds)]
        return [read(ask(models, name, number))[0] == expected[name, number] for name in turns]

    with ThreadPoolExecutor(askers) as pool:
        right = [*pool.map(ask_in_turn, range(askers))]
    assert right == [[True] * rounds] * askers
    assert len(loader.loads) <= askers * rounds, "a model was let go before it had answered"


# ---------------------------------------------------------------- memory


@pytest.fixture(scope="session")
def other_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a tiny model that is smaller than that of tiny_folder, with a context of its own."""
    config = kit.llama()
    config.num_hidden_layers, config.max_position_embeddings = 1, 512
    return save_model(tmp_path_factory.mktemp("other") / "model", config)


@pytest.fixture
def places(tiny_folder: Path, other_folder: Path) -> Iterator[Callable[..., labs_models.Models]]:
    """Begin to load true models by their folders, the tiny one first."""
    with contextlib.ExitStack() as stack:

        def start(*more: labs.ModelSpec, **server: Any) -> labs_models.Models:
            specs = [spec_of(tiny_folder), spec_of(other_folder), *more]
            shared = labs.Server(**server)
            configs = {
                name: labs.Config(model=spec, model_id=name, server=shared)
                for name, spec in zip(("tiny", "other", "third"), specs, strict=False)
            }
            models = labs_models.Models(replace(configs["tiny"], models=configs))
            stack.callback(stop, models)
            return models

        yield start


def tables(**places: Path) -> str:
    """Return a configuration of true models by their folders; the first is the default."""
    lines = [f'default_model = "{next(iter(places))}"']
    for name, place in places.items():
        lines += [f"[models.{name}]", f'model_name = "{place}"', 'torch_dtype = "fp32"']
    return "\n".join([*lines, ""])


def spec_of(folder: Path, method: Any = None) -> labs.ModelSpec:
    quantization = labs.Quantization(quant_method=method)
    return labs.ModelSpec(model_name=str(folder), torch_dtype="fp32", quantization=quantization)


def answered(models: labs_models.Models, name: str) -> weakref.ref[Any]:
    """Let a model answer; return a reference to it that does not hold it."""
    engine = come(models, name)
    try:
        answer = engine.submit(prompt(0), asked())
        assert read(answer)[1].usage.completion_tokens > 0
        assert quiet(engine)
        return weakref.ref(engine.model.model)
    finally:
        models.release(name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_weights_of_a_model_are_known_before_it_is_loaded(dtype, tiny_folder):
    spec = replace(spec_of(tiny_folder), torch_dtype=str(dtype).removeprefix("torch."))
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=dtype)
    size = sum(parameter.nbytes for parameter in model.parameters())
    assert labs_models.weight_bytes(spec) == size
    assert labs.load_model(spec, cached=False).decoder.weight_bytes == size


def test_fewer_bits_take_less_memory_known_before_loading_too(tiny_folder):
    sizes = [
        labs_models.weight_bytes(spec_of(tiny_folder, method)) for method in (None, "int8", "int4")
    ]
    assert sizes[0] > sizes[1] > sizes[2] > 0


def test_the_weights_of_what_is_no_model_are_refused_as_loading_it_is(tmp_path):
    with pytest.raises(labs.ModelError, match=r"holds no config\.json"):
        labs_models.weight_bytes(spec_of(tmp_path))


def test_a_model_that_does_not_fit_beside_another_lets_it_go(places, tiny_folder, other_folder):
    sizes = [labs_models.weight_bytes(spec_of(folder)) for folder in (tiny_folder, other_folder)]
    models = places(model_memory_bytes=sum(sizes) - 1)
    for name in ("tiny", "other", "tiny"):
        answered(models, name)
        assert [*models.loaded()] == [name]


def test_models_that_fit_stay_side_by_side(places, tiny_folder, other_folder):
    sizes = [labs_models.weight_bytes(spec_of(folder)) for folder in (tiny_folder, other_folder)]
    third = replace(spec_of(other_folder), cuda_graphs=False)
    models = places(third, model_memory_bytes=sum(sizes))
    answered(models, "tiny")
    answered(models, "other")
    assert [*models.loaded()] == ["tiny", "other"]
    answered(models, "tiny")
    answered(models, "third")
    assert [*models.loaded()] == ["tiny", "third"]


def test_a_model_larger_than_the_limit_is_refused_and_lets_nobody_go(
    tiny_folder, other_folder, caplog
):
    limit = labs_models.weight_bytes(spec_of(tiny_folder)) - 1
    config = {
        "small": labs.Config(model=spec_of(other_folder), model_id="small"),
        "large": labs.Config(model=spec_of(tiny_folder), model_id="large"),
    }
    server = labs.Server(model_memory_bytes=limit, max_loaded_models=1)
    models = labs_models.Models(replace(config["small"], server=server, models=config))
    weights = answered(models, "small")
    with pytest.raises(labs.ModelError, match="the server's log has the reason"):
        come(models, "large")
    assert models.loaded()["small"].model.model is weights()
    (said,) = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert "server.model_memory_bytes" in said
    assert str(tiny_folder) in said
    assert "\n" not in said
    stop(models)


def test_a_default_model_larger_than_the_limit_is_refused(places):
    with pytest.raises(labs.ModelError, match=r"needs about .* GB; server.model_memory_bytes is"):
        places(model_memory_bytes=1000).wait()


def test_a_model_that_is_not_there_lets_nobody_go(places, tmp_path):
    models = places(spec_of(tmp_path), max_loaded_models=1)
    weights = answered(models, "tiny")
    with pytest.raises(labs.ModelError, match="the server's log has the reason"):
        come(models, "third")
    assert models.loaded()["tiny"].model.model is weights()


def test_where_no_limit_is_set_models_take_what_is_free(begin, loader, monkeypatch):
    free = {"llama": 9.0, "qwen2": 10.0}
    monkeypatch.setattr(labs_models, "weight_bytes", lambda spec: 9)
    monkeypatch.setattr(labs_models, "system_memory", lambda spec: free[spec.model_name])
    models = use(begin(*KINDS[:2]), "llama", "qwen2")
    assert [*models.loaded()] == ["llama", "qwen2"]
    free["qwen2"] = 9.0
    loader.loads.clear()
    models = use(begin(*KINDS[:2]), "llama", "qwen2")
    assert [*models.loaded()] == ["qwen2"]
    use(models, "llama")  # a tenth is for the rows
    assert [*models.loaded()] == ["llama"]


def sizes_of(*folders: Path) -> list[int]:
    return [labs_models.weight_bytes(spec_of(folder)) for folder in folders]


def test_models_of_filters_and_documents_count_within_the_limit(places, tiny_folder, other_folder):
    taken, sizes = [0, 0], sizes_of(tiny_folder, other_folder)
    models = places(model_memory_bytes=sum(sizes) + 100)
    for index in range(2):
        models.account(lambda index=index: taken[index])
    use_both = [answered(models, name) for name in ("tiny", "other")]
    assert [*models.loaded()] == ["tiny", "other"]
    taken[:] = [50, 51]  # they are loaded when they are needed first
    third = labs_models.Entry("third", models._entries["other"].config)
    assert not models._has_room(third)
    models._unload(models._entries["other"])
    assert not models._has_room(models._entries["other"])
    taken[1] = 50
    assert models._has_room(models._entries["other"])
    assert use_both[0]() is not None


def test_a_model_that_fits_only_without_those_of_filters_is_refused_and_lets_nobody_go(
    places, tiny_folder, other_folder, caplog
):
    sizes = sizes_of(tiny_folder, other_folder)
    models = places(model_memory_bytes=max(sizes), max_loaded_models=1)
    answered(models, "tiny")
    models.account(lambda: sizes[0] - sizes[1] + 1)
    with pytest.raises(labs.ModelError, match="the server's log has the reason"):
        come(models, "other")
    assert [*models.loaded()] == ["tiny"]
    (said,) = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert re.search(r"needs about .* GB beside .* GB of other models; server.model_memory_b", said)


def test_answers_are_kept_where_a_model_is_configured_to_and_go_with_it(tiny_folder):
    cache = labs.ResponseCache(max_entries=4)
    config = labs.Config(model=spec_of(tiny_folder), model_id="tiny", response_cache=cache)
    server = labs.Server(keep_alive_s=0.1)
    models = labs_models.Models(replace(config, server=server))
    engine = come(models, "tiny")
    for _ in range(2):
        answer = engine.submit(prompt(0), asked())
        read(answer)
    assert engine.status().response_cache_hits == 1
    weights = weakref.ref(engine.model.model)
    del engine, answer
    models.release("tiny")
    until(lambda: weights() is None)
    stop(models)


def test_one_given_engine_has_the_interface_of_models():
    engine = labs_engine.Engine(model_of("llama"))
    for name, models in (("llama", labs_models.One(engine)), ("m", labs_models.One(engine, "m"))):
        models.check()
        models.account(lambda: 10**15)
        assert models(name) is engine
        models.release(name)
        assert models.reader(name) is model_of("llama")
        assert models.loaded() == {name: engine}
        assert (models.context_length(name), models.context_length("no")) == (512, None)
        assert read(models(name).submit(prompt(0), asked()))[0] == alone("llama", 0)
    models.close(WAIT_S)
    assert not engine.status().alive


@pytest.mark.parametrize("how", ["for another", "idle"])
def test_nothing_refers_to_a_model_that_was_let_go(how, places):
    limit = {"keep_alive_s": 0.1} if how == "idle" else {"max_loaded_models": 1}
    models = places(**limit)
    weights = answered(models, "tiny")
    if how == "for another":
        answered(models, "other")
    until(lambda: weights() is None)
    assert "tiny" not in models.loaded()


FREED = """
import gc, time, weakref
import psutil, torch
import labs, labs_models
torch.set_num_threads(1)
models = labs_models.Models(labs.load_config("big.toml", env={}))

def hold(name):
    while True:
        try:
            return models(name)
        except labs_models.Loading as loading:
            loading.wait(0.05)

def answered(name):
    engine = hold(name)
    inputs = labs.build_inputs(engine.model, prompt="hello")
    answer = engine.submit(inputs, labs.Generation(max_new_tokens=4, temperature=0))
    assert isinstance([*answer][-1], labs.Done)
    return weakref.ref(engine.model.model), engine.model.decoder.weight_bytes

def memory():
    info = psutil.Process().memory_info()
    return info.rss - info.shared  # the files of the weights are mapped, too

first, weights = answered("first")
labs.release_memory()
alone = memory()
answered("second")
labs.release_memory()
both = memory()
models.release("first")
end = time.monotonic() + 60
while first() is not None or (fallen := both - memory()) < 0.7 * weights:
    assert time.monotonic() < end, (first(), alone, both, weights)
    time.sleep(0.05)
answered("first")
labs.release_memory()
print(weights, both - alone, fallen, memory() - both)
models.close()
"""


def test_the_memory_of_a_model_that_was_let_go_is_free(tmp_path):
    config = transformers.LlamaConfig(
        vocab_size=262, hidden_size=1024, intermediate_size=4096, num_hidden_layers=2,
        num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=512,
    )  # fmt: skip
    first = save_model(tmp_path / "first", config)
    second = shutil.copytree(first, tmp_path / "second")
    limit = "[server]\nkeep_alive_s = 0.1\n"
    write("big.toml", tables(first=first, second=second) + limit)
    done = python(FREED, tmp_path)
    assert done.returncode == 0, done.stderr
    weights, grown, fallen, again = map(int, done.stdout.split())
    assert 100e6 < weights < 200e6
    assert grown >= 0.7 * weights
    assert fallen >= 0.7 * weights
    assert again <= 0.3 * weights, "more is taken than was given back"


# ---------------------------------------------------------------- idle models


def test_an_idle_model_goes_after_a_while_and_comes_back(begin, loader):
    models = use(begin("llama", keep_alive_s=0.05), "llama")
    until(lambda: models.loaded() == {})
    models.check()  # it was there, and will be if asked for
    assert not models.failed
    use(models, "llama")
    assert loader.loads == ["llama", "llama"]


@pytest.mark.parametrize("busy", ["running", "held"])
def test_a_model_that_is_busy_all_the_time_stays(busy, begin, gate, loader):
    models = begin("llama", "qwen2", keep_alive_s=0.05)
    answers = [held_answer(models, gate)] if busy == "running" else []
    engine = models.loaded()["llama"] if answers else come(models, "llama")
    for _ in range(2):
        use(models, "qwen2")
        until(lambda: [*models.loaded()] == ["llama"])
    gate.let(math.inf)
    assert models.loaded() == {"llama": engine}
    assert [read(answer)[0] for answer in answers] == [alone("llama", 0)] * len(answers)
    if busy == "held":
        models.release("llama")
    until(lambda: models.loaded() == {})
    assert loader.loads == ["llama", "qwen2", "qwen2"]


def test_the_time_to_go_begins_when_a_model_becomes_idle(begin, gate):
    models = begin("llama", "qwen2", keep_alive_s=3600.0)
    answer, entry = held_answer(models, gate), models._entries["llama"]
    entry.last_used -= 10_000
    until(lambda: time.monotonic() - entry.last_used < 3600)
    gate.let(math.inf)
    read(answer)
    use(models, "qwen2")
    assert [*models.loaded()] == ["llama", "qwen2"]


def test_without_a_time_to_go_idle_models_stay(begin):
    models = use(begin(*KINDS), "llama", "qwen2")
    for entry in models._entries.values():
        entry.last_used -= 10**9
    use(models, "gpt2")
    assert [*models.loaded()] == [*KINDS]


def test_who_waits_for_the_default_model_gets_it_though_another_is_wanted(begin, loader):
    loader.door.clear()
    models = begin("llama", "qwen2", max_loaded_models=1)
    with ThreadPoolExecutor() as pool:
        ready = pool.submit(models.wait)
        want(models, "qwen2")
        loader.door.set()
        assert ready.result(WAIT_S).model is model_of("llama")
        use(models, "qwen2")


# ---------------------------------------------------------------- the end


def test_answers_under_way_end_before_the_deadline(begin, gate):
    models = use(begin("llama", "qwen2"), "qwen2")
    answers = [held_answer(models, gate), ask(models, "qwen2", 1)]
    with ThreadPoolExecutor() as pool:
        closing = pool.submit(models.close, WAIT_S)
        for name in ("llama", "qwen2"):
            until(lambda name=name: closed_to(models, name))
        gate.let(math.inf)
        closing.result(WAIT_S)
    assert [read(answer)[0] for answer in answers] == [alone("llama", 0), alone("qwen2", 1)]


def closed_to(models: labs_models.Models, name: str) -> bool:
    try:
        models(name)
    except labs_engine.Busy as error:
        return str(error) == "the server is shutting down"
    models.release(name)
    return False


def test_the_deadline_cancels_what_is_under_way_in_every_model(begin, gate):
    models = use(begin("llama", "qwen2"), "qwen2")
    answer = held_answer(models, gate)
    with ThreadPoolExecutor() as pool:
        closing = pool.submit(models.close)
        until(lambda: closed_to(models, "llama"))
        until(lambda: models.loaded()["llama"].status().closing)
        gate.let(math.inf)
        closing.result(WAIT_S)
    assert read(answer)[1].finish_reason == "cancelled"
    assert not [each for each in models.loaded().values() if each._thread.is_alive()]


def test_closing_while_a_model_is_loaded_closes_its_engine(begin, loader):
    models = use(begin("llama", "qwen2"), "llama")
    loader.door.clear()
    want(models, "qwen2")
    until(lambda: "qwen2" in loader.loads)
    models.close()
    assert closed_to(models, "qwen2")
    loader.door.set()
    models._thread.join(WAIT_S)
    assert [each.status().alive for each in models.loaded().values()] == [False, False]


def test_closing_while_another_model_is_to_go_loads_nothing_more(begin, gate, loader):
    models = begin("llama", "qwen2", max_loaded_models=1)
    answer = held_answer(models, gate)
    want(models, "qwen2")
    with ThreadPoolExecutor() as pool:
        closing = pool.submit(models.close, WAIT_S)
        until(lambda: closed_to(models, "qwen2"))
        models._thread.join(WAIT_S)
        assert not models._thread.is_alive()
        gate.let(math.inf)
        closing.result(WAIT_S)
    assert loader.loads == ["llama"]
    assert read(answer)[0] == alone("llama", 0)


def test_a_closed_server_loads_nothing(loader):
    models = labs_models.Models(config_of("llama"), start=False)
    models.close()
    models.start()
    models._thread.join(WAIT_S)
    assert not models._thread.is_alive()
    assert closed_to(models, "llama")
    assert loader.loads == []


def test_what_cannot_be_learnt_of_other_models_stops_nothing(begin, loader, monkeypatch):
    def context_length(spec: Any) -> int:
        raise PermissionError(13, "Permission denied", "/srv/secret.gguf")

    monkeypatch.setattr(labs_models, "context_length", context_length)
    models = use(begin("llama", "qwen2"), "llama", "qwen2")
    assert models.context_length("qwen2") == 512


# ---------------------------------------------------------------- over HTTP


class Many(Site):
    """An app with several models and a client of it, without sockets."""

    def __init__(self, engine: labs_models.Models, config: labs.Config, _: Any = None) -> None:
        self.engine, self.config = engine, config
        self.app = labs_api.create_app(config, engine)
        self.client = falcon.testing.TestClient(self.app)

    def later(self, pool: ThreadPoolExecutor, path: str, body: Any) -> Any:
        return pool.submit(self.post, path, body)

    def card(self, name: str) -> dict[str, Any]:
        cards = self.get("/v1/models").json["data"]
        (card,) = [card for card in cards if card["id"] == name]
        assert self.get(f"/v1/models/{name}").json == card
        return card


class LiveMany(Live, Many):
    """The same behind waitress."""

    def stream(self, body: Any, path: str = "/generate/stream") -> Any:
        return httpx.stream("POST", self.url + path, json=body, timeout=WAIT_S)

    def status_of_stream(self, body: Any) -> int:
        """Ask for a stream, and hang up once its status has come."""
        with self.stream(body) as response:
            return response.status_code


@pytest.fixture
def many(loader: Loader) -> Iterator[Callable[..., Many]]:
    """Serve models of these kinds, or of a whole configuration."""
    with contextlib.ExitStack() as stack:

        def start(*names: Any, kind: Any = Many, **server: Any) -> Many:
            given = isinstance(names[0], labs.Config)
            config = names[0] if given else config_of(*names, **server)
            models = labs_models.Models(config)
            stack.callback(stop, models, loader)
            site = kind(models, config)
            if kind is LiveMany:
                stack.callback(site.close)
            return site

        yield start


@pytest.fixture
def live(many: Any, loader: Loader, waits: set[int]) -> Callable[..., LiveMany]:
    """Serve llama and, behind a closed door, qwen2: on a free port, with few places."""

    def start(**server: Any) -> LiveMany:
        few = {"port": 0, "max_batch_rows": ROWS, "max_waiting": 1}
        site = many("llama", "qwen2", kind=LiveMany, **few | server)
        use(site.engine, "llama")
        waits.clear()  # of the test's own thread
        loader.door.clear()
        return site

    return start


def said(kind: str, number: int = 0, **more: Any) -> dict[str, Any]:
    """Ask a model for the text that it gives alone."""
    ids = [*prompt(number).input_ids]
    return {"model": kind, "prompt": ids, "max_tokens": NEW, "temperature": 0, **more}


SHORT = {"max_new_tokens": 3, "prompt": "hi", **A}
ASKED = {
    "/generate": {**SHORT, "model": "qwen2"},
    "/generate/stream": {**SHORT, "model": "qwen2"},
    CHAT: {"model": "qwen2", "messages": HELLO, "max_tokens": 3, **A},
    COMPLETIONS: {"model": "qwen2", "prompt": "hi", "max_tokens": 3, **A},
}


@pytest.mark.parametrize("path", ASKED)
def test_a_request_for_a_model_that_is_being_loaded_waits_and_is_answered(
    path, many, loader, waits
):
    loader.door.clear()
    site = many("llama", "qwen2")
    with ThreadPoolExecutor() as pool:
        answer = site.later(pool, path, ASKED[path])
        until(lambda: waits)
        loader.door.set()
        response = answer.result(WAIT_S)
    assert response.status_code == 200
    assert "aaa" in response.text.replace("data: a\n\n", "a")
    assert '"model":"qwen2"' in response.text


def test_the_text_is_that_of_the_model_asked_for(many):
    site = many(*KINDS)
    texts = [site.post(COMPLETIONS, said(kind)).json["choices"][0]["text"] for kind in KINDS]
    assert texts == [alone(kind, 0) for kind in KINDS]
    assert len({*texts}) == len(KINDS)
    del (body := said("llama"))["model"]
    answer = site.post(COMPLETIONS, body).json
    assert (answer["model"], answer["choices"][0]["text"]) == ("llama", texts[0])


def test_a_stream_tells_that_its_model_is_being_loaded(live, loader, monkeypatch):
    monkeypatch.setattr(labs_api, "LOADING_S", 0.05)
    with live().stream(ASKED["/generate/stream"]) as response:
        assert response.status_code == 200
        lines = response.iter_lines()
        assert [next(lines), next(lines)] == [": ok", ""]
        for _ in range(2):
            assert re.fullmatch(r": loading the model for \d+ s", next(lines))
            assert next(lines) == ""
        loader.door.set()
        rest = [line for line in lines if not line.startswith(":")]
    assert events_of("\n".join(rest).encode())[:3] == [("message", "a")] * 3


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_openais_streams_wait_for_a_model_too(path, live, loader):
    site = live()
    with site.stream({**ASKED[path], "stream": True}, path) as response:
        assert response.status_code == 200
        lines = response.iter_lines()
        assert next(lines) == ": ok"
        loader.door.set()
        data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    assert data.pop() == "[DONE]"
    chunks = [json.loads(each) for each in data]
    assert {chunk["model"] for chunk in chunks} == {"qwen2"}
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"


def test_a_wrong_request_for_a_model_that_is_being_loaded_is_refused_then(live, loader, waits):
    site, wrong = live(), {**SHORT, "model": "qwen2", "logit_bias": {"9999": 1}}
    with ThreadPoolExecutor() as pool:
        whole = site.later(pool, "/generate", wrong)
        until(lambda: waits)
        loader.door.set()
        assert error_of(whole.result(WAIT_S), 400)["param"] == "logit_bias"
    assert error_of(site.post("/generate/stream", wrong), 400)["param"] == "logit_bias"


def test_a_wrong_stream_of_a_model_that_is_being_loaded_ends_with_an_error(live, loader):
    wrong = {**SHORT, "model": "qwen2", "logit_bias": {"9999": 1}}
    with live().stream(wrong) as response:
        assert response.status_code == 200
        lines = response.iter_lines()
        assert next(lines) == ": ok"
        loader.door.set()
        rest = "\n".join(lines)
    ((kind, data),) = events_of(rest.encode() + b"\n")
    error = json.loads(data)["error"]
    assert (kind, error["type"], error["param"]) == (
        "error", "invalid_request_error", "logit_bias"
    )  # fmt: skip


def test_a_model_that_fails_to_load_fails_who_waits_for_it(live, loader, waits):
    site = live()
    loader.failures["qwen2"] = labs.ModelError("/srv/secret: is gone")
    with ThreadPoolExecutor() as pool, site.stream(ASKED["/generate/stream"]) as response:
        lines = response.iter_lines()
        assert next(lines) == ": ok"
        until(lambda: waits)
        loader.door.set()
        rest = "\n".join(lines)
        whole = site.later(pool, "/generate", ASKED["/generate"]).result(WAIT_S)
    ((kind, data),) = events_of(rest.encode() + b"\n")
    assert (kind, json.loads(data)["error"]["type"]) == ("error", "server_error")
    assert error_of(whole, 503)["type"] == "server_error"
    assert "secret" not in rest + whole.text
    assert site.post(COMPLETIONS, said("llama")).status_code == 200
    assert site.get("/readyz").json == {"status": "ok"}


@pytest.mark.parametrize("path", ["/generate", "/generate/stream"])
def test_the_time_of_a_request_runs_while_its_model_is_loaded(path, many, loader):
    loader.door.clear()
    site = many("llama", "qwen2")
    response = site.post(path, {**ASKED[path], "timeout_s": 0.1})
    if path == "/generate":
        assert error_of(response, 503)["message"] == "qwen2 is being loaded"
        assert response.headers["retry-after"] == "1"
    else:
        assert response.status_code == 200
        kind, data = events_of(response.content)[-1]
        assert (kind, json.loads(data)["error"]["code"]) == ("error", "overloaded")
    loader.door.set()
    assert site.post("/generate", ASKED["/generate"]).json["text"] == "aaa"


def test_the_time_that_a_model_may_take_is_a_setting_of_it(loader, many):
    loader.door.clear()
    site = many(configured(TABLES + "timeout_s = 0.1\n"))
    error_of(site.post(COMPLETIONS, said("last")), 503)


def test_the_time_that_was_waited_is_no_more_left():
    wanted = labs.Generation(timeout_s=30.0)
    now = time.perf_counter()
    assert labs_turns.in_time_left(wanted, now) == wanted
    assert 0 < labs_turns.in_time_left(wanted, now - 20).timeout_s <= 10
    assert 0 < labs_turns.in_time_left(wanted, now - 40).timeout_s < 0.1
    without = labs.Generation()
    assert labs_turns.in_time_left(without, now - 40) == without


@pytest.mark.parametrize("path", ["/generate", "/generate/stream"])
def test_who_hangs_up_while_a_model_is_loaded_frees_the_place(path, live, waits):
    site = live()
    connection = site.connect(request(path, ASKED[path]))
    until(lambda: waits)
    assert site.status_of_stream(ASKED["/generate/stream"]) == 503
    connection.close()
    until(lambda: site.status_of_stream(ASKED["/generate/stream"]) == 200)


@pytest.mark.parametrize("path", ASKED)
def test_more_who_wait_for_a_model_than_there_are_places_are_refused(path, live, waits):
    site = live()
    with site.connect(request("/generate", ASKED["/generate"])):
        until(lambda: waits)
        refused = site.post(path, ASKED[path])
    error = error_of(refused, 503)
    assert (error["code"], error["message"]) == ("overloaded", "qwen2 is being loaded")
    assert int(refused.headers["retry-after"]) >= 1


def test_others_are_answered_while_a_model_is_loaded(live, loader, waits):
    site = live(max_waiting=8)
    sent = request("/generate", ASKED["/generate"], "Connection: close")
    waiting = [site.connect(sent) for _ in range(8)]
    until(lambda: len(waits) == len(waiting))
    text = httpx.post(site.url + COMPLETIONS, json=said("llama"), timeout=WAIT_S).json()
    assert text["choices"][0]["text"] == alone("llama", 0)
    for path in ("/health", "/readyz"):
        assert httpx.get(site.url + path, timeout=WAIT_S).json() == {"status": "ok"}
    for path in ("/v1/models", "/metrics", "/"):
        assert httpx.get(site.url + path, timeout=WAIT_S).status_code == 200
    assert loader.loads == ["llama", "qwen2"]
    loader.door.set()
    for connection in waiting:
        with connection:
            answer = b"".join(iter(functools.partial(connection.recv, 65_536), b""))
        assert b'"text":"aaa"' in answer


def test_a_server_full_of_those_who_wait_tells_that_it_lives(live, gate, loader, waits):
    places = 12
    site = live(max_waiting=places, max_loaded_models=1)
    loader.door.set()
    gate.let(0)
    with contextlib.ExitStack() as stack:
        for kind, count in (("llama", ROWS + places), ("qwen2", places)):
            sent = request("/generate", {**SHORT, "model": kind})
            for _ in range(count):
                stack.enter_context(site.connect(sent))
            status = site.engine.loaded()["llama"].status
            until(lambda status=status: status().running + status().waiting == ROWS + places)
        until(lambda: len(waits) == places)
        assert httpx.get(f"{site.url}/health", timeout=WAIT_S).json() == {"status": "ok"}
        gate.let(math.inf)


def test_many_requests_for_models_in_turn_are_all_answered_where_one_has_room(
    many, loader, monkeypatch
):
    monkeypatch.setattr(labs_models, "EVICT_BUSY_AFTER_S", 0.2)
    few = {"port": 0, "max_batch_rows": 4, "max_waiting": 24}
    site = many("llama", "qwen2", kind=LiveMany, max_loaded_models=1, **few)

    def ask_in_turn(number: int) -> list[str]:
        with httpx.Client(timeout=WAIT_S) as client:
            kinds = [KINDS[(number + turn) % 2] for turn in range(2)]
            bodies = [said(kind, number % 6) for kind in kinds]
            answers = [client.post(site.url + COMPLETIONS, json=body).json() for body in bodies]
            return [answer["choices"][0]["text"] for answer in answers]

    with ThreadPoolExecutor(20) as pool:
        found = [*pool.map(ask_in_turn, range(20))]
    kinds = [[KINDS[(number + turn) % 2] for turn in range(2)] for number in range(20)]
    assert found == [[alone(kind, n % 6) for kind in row] for n, row in enumerate(kinds)]


def test_a_slow_reader_holds_no_model(tiny_folder, other_folder):
    limit = "[server]\nmax_loaded_models = 1\n"
    config = configured(tables(tiny=tiny_folder, other=other_folder) + limit)
    quota, registry = labs_gate.Quota(None), CollectorRegistry()
    models = labs_models.Models(config)
    service = labs_api.Service(config, models, quota, registry)
    req = falcon.testing.create_req()
    req.context.owner, req.context.began = "", time.perf_counter()
    prompts = (labs_request.Prompt(prompt="hi"),)
    wanted = labs_request.Request(prompts=prompts, model="tiny", options=dict(A))
    request = labs_request.check(service.context, wanted)
    asked = service.submit(req, request, service.leased(req, request))
    weights = answered(models, "tiny")
    answered(models, "other")
    until(lambda: weights() is None)
    assert "".join(getattr(event, "text", "") for _, event in asked) == "a" * 256
    assert asked.record()["completion_tokens"] == 256
    stop(models)


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
        assert site.post("/explain", body).json["prompt"] == text
    assert site.post("/generate", {"prompt": "hi", **A}).json["model"] == "first"
    chat = {"messages": HELLO, "model": "second", **A}
    assert "may not use its template" in error_of(site.post(CHAT, chat), 400)["message"]
    assert site.post(CHAT, {**chat, "model": "first"}).json["model"] == "first"


@pytest.mark.parametrize("path", [*ASKED, "/explain"])
def test_an_unknown_model_is_not_found_and_those_served_are_named(path, many, loader):
    body = {**ASKED.get(path, SHORT), "model": "lama"}
    site = many(*KINDS)
    error = error_of(site.post(path, body), 404)
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert "'lama'" in error["message"]
    assert all(kind in error["message"] for kind in KINDS)
    site.engine.wait()
    assert loader.loads == ["llama"]


def test_the_models_are_listed_before_and_after_they_are_loaded(tiny_folder, other_folder):
    config = configured(tables(tiny=tiny_folder, other=other_folder))
    models = labs_models.Models(config, start=False)
    site = Many(models, config)
    assert [card["id"] for card in site.get("/v1/models").json["data"]] == ["tiny", "other"]
    assert [site.card(name)["loaded"] for name in ("tiny", "other")] == [False, False]
    models.start()
    until(lambda: site.card("tiny")["loaded"])
    until(lambda: site.card("other")["context_length"] == 512)
    assert site.card("tiny")["context_length"] == 4096
    assert not site.card("other")["loaded"]
    assert site.post("/generate", {**SHORT, "model": "other"}).json["text"] == "aaa"
    card = site.card("other")
    assert (card["loaded"], card["context_length"]) == (True, 512)
    assert error_of(site.get("/v1/models/none"), 404)["code"] == "model_not_found"
    stop(models)


def test_metrics_name_each_model_that_is_loaded(many):
    site = many(*KINDS)
    use(site.engine, "llama")
    site.post("/generate", {**SHORT, "model": "qwen2"})

    def found() -> dict[str, str]:
        lines = (line.rpartition(" ") for line in site.get("/metrics").text.splitlines())
        return {name: value for name, _, value in lines}

    figures = found()
    for kind in ("llama", "qwen2"):
        assert figures[f'labs_engine_alive{{model_name="{kind}"}}'] == "1.0"
        assert float(figures[f'labs_steps_total{{model_name="{kind}"}}']) > 0
    assert not [name for name in figures if "gpt2" in name]
    assert figures['labs_generation_tokens_total{model_name="qwen2"}'] == "3.0"
    assert 'labs_generation_tokens_total{model_name="llama"}' not in figures


def test_each_log_line_names_the_model_that_answered(many, caplog):
    caplog.set_level(logging.INFO, "labs.api")
    site = many("llama", "qwen2")
    for path in ("/generate", "/generate/stream"):
        for kind in ("llama", "qwen2"):
            site.post(path, {**SHORT, "model": kind})
    assert [line["model"] for line in log_lines(caplog)] == ["llama", "qwen2"] * 2


def test_readiness_goes_from_loading_to_ok_to_draining(many, loader, gate):
    loader.door.clear()
    site = many("llama", "qwen2", keep_alive_s=0.05)
    assert (site.get("/readyz").status_code, site.get("/readyz").json["status"]) == (503, "loading")
    assert site.get("/health").json == {"status": "ok"}
    loader.door.set()
    site.engine.wait()
    assert site.get("/readyz").json == {"status": "ok"}
    until(lambda: site.engine.loaded() == {})
    assert site.get("/readyz").json == {"status": "ok"}  # it comes when it is asked for
    answer = held_answer(site.engine, gate)
    with ThreadPoolExecutor() as pool:
        closing = pool.submit(site.engine.close, WAIT_S)
        until(lambda: site.get("/readyz").json == {"status": "draining"})
        assert site.get("/readyz").status_code == 503
        refused = site.post("/generate", ASKED["/generate"])
        assert error_of(refused, 503)["message"] == "the server is shutting down"
        gate.let(math.inf)
        closing.result(WAIT_S)
    assert read(answer)[0] == alone("llama", 0)


def test_a_default_model_that_cannot_be_loaded_leaves_others_to_answer(many, loader):
    loader.failures["llama"] = labs.ModelError("gone")
    site = many("llama", "qwen2")
    assert site.post("/generate", ASKED["/generate"]).json["text"] == "aaa"
    assert site.get("/readyz").json == {"status": "ok"}
    answer = site.post("/generate", SHORT)
    assert error_of(answer, 503)["code"] == "model_not_loaded"
    assert int(answer.headers["Retry-After"]) == labs_models.RETRY_S


def test_a_model_whose_files_have_gone_is_503_and_nothing_else_is_dead(many, loader):
    site = many("llama", "qwen2", keep_alive_s=0.2, max_loaded_models=2)
    assert site.post("/generate", SHORT).status_code == 200
    until(lambda: not site.engine.loaded())
    loader.failures["llama"] = OSError("/srv/secret is gone")
    error = error_of(site.post("/generate", SHORT), 503)
    assert error["message"] == "llama could not be loaded; the server's log has the reason"
    assert site.get("/readyz").json == {"status": "dead"}
    with kept(site.engine, "qwen2"):
        assert site.get("/readyz").json == {"status": "ok"}
        assert site.post("/generate", {**SHORT, "model": "qwen2"}).status_code == 200
        assert error_of(site.post("/generate", SHORT), 503)["code"] == "model_not_loaded"


@contextlib.contextmanager
def kept(models: labs_models.Models, name: str) -> Iterator[None]:
    """Hold a model for as long as this lasts."""
    come(models, name)
    yield
    models.release(name)


class Exits(BaseException):
    """What nobody catches by accident."""


@pytest.mark.parametrize("place", ["_expired", "_learn_context_lengths", "_make_room", "_settle"])
@pytest.mark.parametrize("error", [ZeroDivisionError("oh"), Exits("oh"), SystemExit(3)])
def test_an_exception_in_the_loading_thread_is_told_to_who_waits(
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
    answer = site.post("/generate", {**SHORT, "model": "qwen2"})
    assert answer.status_code in ((200, 503) if place == "_learn_context_lengths" else (503,))
    assert site.get("/readyz").json == {"status": "ok"}
    monkeypatch.setattr(labs_models, "RETRY_S", 0.0)
    assert site.post("/generate", {**SHORT, "model": "qwen2"}).status_code == 200


def test_a_default_model_that_an_exception_keeps_away_is_told_as_dead(many, loader, monkeypatch):
    monkeypatch.setattr(labs_models.Models, "_expired", lambda _: 1 / 0)
    site = many("llama")
    until(lambda: site.get("/readyz").json == {"status": "dead"})
    assert error_of(site.post("/generate", SHORT), 503)["code"] == "model_not_loaded"


def test_who_waits_is_told_when_the_server_shuts_down(live, loader, waits):
    site = live(max_waiting=2)
    with ThreadPoolExecutor() as pool, site.stream(ASKED["/generate/stream"]) as response:
        lines = response.iter_lines()
        assert next(lines) == ": ok"
        whole = site.later(pool, "/generate", ASKED["/generate"])
        until(lambda: len(waits) == 2)
        site.engine.close()
        assert error_of(whole.result(WAIT_S), 503)["message"] == "the server is shutting down"
        ((kind, data),) = events_of(("\n".join(lines) + "\n").encode())
    assert (kind, json.loads(data)["error"]["code"]) == ("error", "overloaded")


def test_another_model_is_explained_without_being_asked(many, loader, waits):
    loader.door.clear()
    site = many("llama", "qwen2")
    with ThreadPoolExecutor() as pool:
        told = site.later(pool, "/explain", {"prompt": "hi", "model": "qwen2"})
        until(lambda: waits)
        loader.door.set()
        explained = told.result(WAIT_S).json
    decoder = model_of("qwen2").decoder
    assert (explained["how"], explained["weight_bytes"]) == (decoder.mode, decoder.weight_bytes)
    assert site.engine.loaded()["qwen2"].status().steps == 0
    use(site.engine, "llama")


# ---------------------------------------------------------------- the router


ROUTED = (
    TABLES
    + r"""
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
)


def chat(*contents: str, **more: Any) -> dict[str, Any]:
    roles = ("user", "assistant", "user")
    turns = [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]
    return {"messages": turns, **more}


ROUTES = [
    ("/generate", {"prompt": "hi"}, "first"),
    ("/generate", {"prompt": "code " * 7}, "first"),  # 35, and four of the template
    ("/generate", {"prompt": "code " * 8}, "second"),
    ("/generate", {"prompt": "recoded " * 8}, "first"),
    ("/generate", {"prompt": "Code " * 40}, "second"),  # the first that fits, though long
    ("/generate", {"prompt": "x" * 76}, "first"),
    ("/generate", {"prompt": "x" * 77}, "last"),
    ("/generate", {"prompt": "x" * 79, "use_chat_template": False}, "first"),
    ("/generate", {"prompt": "x" * 80, "use_chat_template": False}, "last"),
    ("/generate", {"prompt": "sum: 1 2"}, "last"),
    ("/generate", {"prompt": "a sum: 1 2"}, "first"),
    ("/generate", chat("hi", "well", "x" * 70), "last"),
    (CHAT, chat("hi"), "first"),
    (CHAT, chat("sum: 1", "2", "more"), "last"),
    (CHAT, chat("hi", "fine", "sum: 1"), "first"),
    (CHAT, chat("hi", "fine", "x" * 70), "last"),
    (COMPLETIONS, {"prompt": "x" * 79}, "first"),
    (COMPLETIONS, {"prompt": "x" * 80}, "last"),
    (COMPLETIONS, {"prompt": [120] * 80}, "first"),
    (COMPLETIONS, {"prompt": [120] * 81}, "last"),
    (COMPLETIONS, {"prompt": ["hi", "x" * 80]}, "last"),
    (COMPLETIONS, {"prompt": [[120], [120] * 81]}, "last"),
    (COMPLETIONS, {"prompt": ["sum: 1", "hi"]}, "last"),
    (COMPLETIONS, {"prompt": ["x" * 30, "my code " * 6]}, "second"),
]


@pytest.fixture
def routed(many: Any) -> Many:
    """Serve by the rules of ROUTED, llama being the default."""
    return many(configured(ROUTED))


@pytest.mark.parametrize(("path", "body", "name"), ROUTES, ids=lambda value: str(value)[:40])
def test_the_first_rule_that_fits_says_who_answers(path, body, name, routed):
    limit = {"max_new_tokens" if path == "/generate" else "max_tokens": 2}
    answer = routed.post(path, {**body, **limit, **A, "model": "auto"})
    assert answer.status_code == 200, answer.text
    assert answer.json["model"] == name


@pytest.mark.parametrize("path", [path for path in ASKED if path != CHAT])
def test_who_names_a_model_or_none_is_not_routed(path, routed):
    body = {**ASKED[path], "prompt": "sum: 1", "model": "second"}
    assert '"model":"second"' in routed.post(path, body).text
    assert '"model":"last"' in routed.post(path, {**body, "model": "auto"}).text
    del body["model"]
    assert '"model":"first"' in routed.post(path, body).text


def test_a_routed_request_has_the_settings_of_its_model(routed):
    told = routed.post("/explain", {"prompt": "my code " * 6, "model": "auto"}).json
    assert told["prompt"] == "<bos>" + "my code " * 6
    assert told["settings"]["max_new_tokens"]["value"] == 5


@pytest.mark.parametrize("path", [*ASKED, "/explain"])
def test_without_rules_there_is_no_model_auto(path, many):
    error = error_of(many(*KINDS).post(path, {**ASKED.get(path, SHORT), "model": "auto"}), 404)
    assert error["code"] == "model_not_found"
    assert "'auto'" in error["message"]


@pytest.mark.parametrize("long", ["x" * 200, [120] * 200], ids=["text", "ids"])
def test_a_prompt_longer_than_the_default_model_holds_goes_to_one_that_holds_it(long, many, loader):
    loader.made = lambda name: replace(
        model_of(name), context_length=64 if name == "llama" else 512
    )
    body = {"prompt": long, "max_tokens": 2, **A}
    site = many(configured(ROUTED))
    assert error_of(site.post(COMPLETIONS, body), 400)["code"] == "context_length_exceeded"
    answer = site.post(COMPLETIONS, {**body, "model": "auto"})
    assert answer.status_code == 200, answer.text
    assert answer.json["model"] == "last"


def test_who_asks_for_auto_waits_for_the_default_model_which_counts(many, loader, waits):
    loader.door.clear()
    site = many(configured(ROUTED))
    with ThreadPoolExecutor() as pool:
        body = {"model": "auto", "prompt": [120] * 81, "max_tokens": 2, **A}
        answer = site.later(pool, COMPLETIONS, body)
        until(lambda: waits)
        loader.door.set()
        assert answer.result(WAIT_S).json["model"] == "last"
    assert loader.loads == ["llama", "gpt2"]


@pytest.mark.parametrize("path", ["/generate", "/generate/stream"])
def test_the_time_of_a_request_runs_while_the_router_waits(path, many, loader):
    loader.door.clear()
    site = many(configured(ROUTED))
    with ThreadPoolExecutor() as pool:
        asked = site.later(pool, path, {**SHORT, "model": "auto", "timeout_s": 0.1})
        try:
            response = asked.result(WAIT_S)
        finally:
            loader.door.set()
    if path == "/generate":
        assert error_of(response, 503)["message"] == "first is being loaded"
    else:
        assert events_of(response.content)[-1][0] == "error"


def test_a_rule_of_a_pattern_alone_waits_for_no_other_model(many, loader):
    rule = '[[router.rules]]\nmodel = "second"\npattern = "^sum:"\n'
    loader.failures["llama"] = labs.ModelError("gone")
    site = many(configured(ROUTED.replace("[[router.rules]]", rule + "[[router.rules]]", 1)))
    body = {"prompt": "sum: 1", "model": "auto", **A}
    assert site.post("/generate", body).json["model"] == "second"


def test_a_default_model_that_was_let_go_counts_without_being_loaded_again(many, loader):
    site = many(replace(configured(ROUTED), server=labs.Server(max_loaded_models=1)))
    site.engine.wait()
    assert site.post("/generate", {**SHORT, "model": "last"}).json["model"] == "last"
    assert [*site.engine.loaded()] == ["last"]
    for long in ("x" * 80, [120] * 81):
        body = {"prompt": long, "max_tokens": 2, "model": "auto", **A}
        assert site.post(COMPLETIONS, body).json["model"] == "last"
    assert loader.loads == ["llama", "gpt2"]


def test_a_prompt_that_cannot_be_counted_is_refused(routed):
    refused = routed.post("/generate", {"prompt": "", "model": "auto"})
    assert error_of(refused, 400)["message"] == "the prompt is empty"


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


@pytest.mark.parametrize(
    ("text", "fragments"),
    [
        (RULE.replace("small", "smal") + 'pattern = "a"', ["router_rules[0]", "'smal'", "small?"]),
        (
            f'{RULE}pattern = "a"\n{RULE.replace("small", "zebra")}pattern = "a"',
            ["router_rules[1]", "'zebra'"],
        ),
        (RULE + 'pattern = "("', ["labs.toml", "router_rules", "pattern = '('"]),
        (RULE, ["labs.toml", "router_rules", "needs over_prompt_tokens or pattern"]),
        (RULE + "over_prompt_tokens = -1", ["labs.toml", "router_rules", ">= 0"]),
        (RULE + 'patern = "a"', ["labs.toml", "router_rules", "patern"]),
        ('[[router.rules]]\npattern = "a"', ["labs.toml", "router_rules", "model"]),
        ("[router]\nrules = 5", ["labs.toml", "router_rules = 5", "array"]),
        ("[router]\nrule = []", ["labs.toml", "'rule'", "rules?"]),
        ('[models.auto]\nmodel_name = "a"', ["labs.toml", "[models.auto]", "router's"]),
        ("[models.third]\ntop_k = 1", ["labs.toml", "[models.third]", "model_name"]),
        (
            '[models.third]\nmodel_name = "a"\ntop_q = 1',
            ["labs.toml", "[models.third]", "top_q", "top_p?"],
        ),
        (
            '[models.third]\nmodel_name = "a"\ntemperature = 101',
            ["labs.toml [models.third]", "temperature = 101", "100"],
        ),
        (
            '[models.third]\nmodel_name = "a"\nquantization = {load_in_4bit = 1}',
            ["labs.toml [models.third]", "load_in_4bit = 1"],
        ),
    ],
)
def test_what_is_wrong_about_models_and_rules_is_told_in_one_sentence(text, fragments):
    with pytest.raises(labs.ConfigError) as caught:
        configured(NAMES + text)
    assert [part for part in fragments if part not in str(caught.value)] == []
    assert is_one_sentence(caught.value)


def program_config(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> labs.Config:
    """Return the configuration that labs-api would serve with these arguments."""
    found: list[labs.Config] = []
    monkeypatch.setattr(labs_serve, "serve", found.append)
    options = (("Server", "--config", str, ""),)
    command = labs_cli.make_command("labs-api", labs_cli.serve_command, options, "")
    command.main(list(arguments), prog_name="labs-api", standalone_mode=False)
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


def test_a_flag_takes_the_place_of_the_rules_of_the_file(monkeypatch):
    write("labs.toml", NAMES + RULE + 'pattern = "a"')
    assert len(program_config(monkeypatch).router.rules) == 1
    assert program_config(monkeypatch, "--router-rules", "[]").router.rules == ()


WRONG_RULES = [
    ('[{"model": "small", "pattern": "("}]', ["rules", "pattern = '('"]),
    ('[{"model": "small"}]', ["rules", "needs over_prompt_tokens or pattern"]),
    ('[{"model": "zebra", "pattern": "a"}]', ["rules[0]", "'zebra'"]),
    ('{"model": "small", "pattern": "a"}', ["rules", "array"]),
    ("nonsense", ["rules"]),
    ('[{"model"', ["rules"]),
]


@pytest.mark.parametrize(("text", "fragments"), WRONG_RULES)
@pytest.mark.parametrize("place", ["LABS_ROUTER_RULES", "--router-rules"])
def test_a_wrong_rule_is_named_wherever_it_comes_from(place, text, fragments, monkeypatch):
    write("labs.toml", NAMES)
    if place == "--router-rules":
        with pytest.raises(click.ClickException) as refused:
            program_config(monkeypatch, place, text)
        told = refused.value.format_message()
    else:
        with pytest.raises(labs.ConfigError) as caught:
            labs.load_config(env={place: text})
        told = str(caught.value)
    assert [part for part in ["router", *fragments] if part not in told.lower()] == []
    assert "\n" not in told


def test_a_rule_may_name_the_default_model_by_its_id():
    rule = '[[router.rules]]\nmodel = "org/usual"\npattern = "a"\n'
    config = configured('[generation]\nmodel_name = "org/usual"\n' + NAMES + rule)
    assert config.router.rules[0].model == config.model_id == "org/usual"


CHARACTERS = st.characters(exclude_categories=["Cs"], exclude_characters="\x7f")
TEXTS = st.text(CHARACTERS, max_size=9).map(re.escape)
PATTERNS = st.one_of(st.none(), TEXTS, st.sampled_from([r"\bcode\b", '"', "'''", "#"]))
COUNTS = st.one_of(st.none(), st.integers(0, 10**6))


@given(st.lists(st.tuples(PATTERNS, COUNTS).filter(any), max_size=4))
@hypothesis_settings(max_examples=100, deadline=None)
def test_the_effective_configuration_tells_the_rules_as_toml(found):
    rules = tuple(
        labs.RouterRule(model="org/small", pattern=pattern, over_prompt_tokens=count)
        for pattern, count in found
    )
    config = labs.Config(model_id="org/small", router=labs.Router(rules=rules))
    tables = tomllib.loads(labs_cli.dump_effective_config(config))
    assert tuple(labs.RouterRule(**rule) for rule in tables["router"]["rules"]) == rules


def test_the_effective_configuration_with_rules_can_be_read_back():
    config = configured('default_model = "small"\n' + NAMES, overrides={"router_rules": RULES})
    write("again.toml", labs_cli.dump_effective_config(config) + NAMES)
    assert labs.load_config("again.toml", env={}).router == config.router


def test_the_default_model_is_that_of_the_file():
    config = configured('default_model = "large"\n' + NAMES)
    assert (config.model_id, config.model.model_name) == ("large", "org/large")
    assert [*config.models] == ["small", "large"]
    assert config.models["large"].model == config.model


@pytest.mark.parametrize("place", ["environment", "overrides", "dotenv"])
@pytest.mark.parametrize(("name", "model"), [("small", "org/small"), ("other/m", "other/m")])
def test_a_model_that_is_asked_for_wins_over_the_default_one(name, model, place):
    write("labs.toml", 'default_model = "large"\n' + NAMES)
    write(".env", f"LABS_MODEL={name}" if place == "dotenv" else "")
    config = labs.load_config(
        env={"LABS_MODEL": name} if place == "environment" else {},
        overrides={"model_name": name} if place == "overrides" else {},
    )
    assert (config.model_id, config.model.model_name) == (name, model)
    found = {name: each.model.model_name for name, each in config.models.items()}
    assert found == {"small": "org/small", "large": "org/large"}


def test_the_flag_model_wins_over_the_default_one(monkeypatch):
    write("labs.toml", 'default_model = "large"\n' + NAMES)
    assert program_config(monkeypatch, "--model", "small").model_id == "small"


@pytest.mark.parametrize(
    ("text", "fragments"),
    [
        ('default_model = "smal"', ["labs.toml", "default_model = smal", "did you mean small?"]),
        ('default_model = "zebra"', ["labs.toml", "default_model = zebra", "no [models] table"]),
        ('default_model = "auto"', ["labs.toml", "default_model = auto"]),
        ("default_model = 5", ["labs.toml", "default_model"]),
        (
            'default_model = "small"\n[generation]\nmodel_name = "org/m"',
            ["labs.toml", "default_model", "model_name", "both"],
        ),
    ],
)
def test_a_wrong_default_model_is_told_in_one_sentence(text, fragments):
    with pytest.raises(labs.ConfigError) as caught:
        configured(text + "\n" + NAMES)
    assert [part for part in fragments if part not in str(caught.value)] == []
    assert is_one_sentence(caught.value)


def test_an_unknown_default_model_is_refused_though_another_is_asked_for():
    with pytest.raises(labs.ConfigError, match="default_model = zebra"):
        configured('default_model = "zebra"\n' + NAMES, overrides={"model_name": "small"})


def test_settings_of_the_environment_hold_for_every_model():
    write("labs.toml", NAMES + "[generation]\ntop_k = 7\n")
    config = labs.load_config(env={"LABS_MAX_NEW_TOKENS": "9", "LABS_SERVER_KEEP_ALIVE_S": "5"})
    every = (config, *config.models.values())
    assert [each.generation.max_new_tokens for each in every] == [9] * 3
    assert [each.server.keep_alive_s for each in every] == [5] * 3
    assert [each.generation.top_k for each in every] == [7, None, None]


# ---------------------------------------------------------------- labs-api as a program


def test_the_program_serves_several_models_and_routes(tiny_folder, other_folder, tmp_path):
    rule = '[[router.rules]]\nmodel = "other"\nover_prompt_tokens = 9\n'
    limit = "[server]\nmax_loaded_models = 1\n"
    write("labs.toml", tables(tiny=tiny_folder, other=other_folder) + limit + rule)
    with program("--config", str(tmp_path / "labs.toml")) as process:
        url = serving(process)
        with httpx.Client(timeout=WAIT_S) as client:
            for name in ("tiny", "other", "auto", "tiny"):
                body = {**SHORT, "model": name, "prompt": "ten words" if name == "auto" else "a"}
                answer = client.post(f"{url}/generate", json=body).json()
                told = (answer["text"], answer["model"])
                assert told == ("aaa", "other" if name == "auto" else name)
            cards = client.get(f"{url}/v1/models").json()["data"]
        process.send_signal(signal.SIGTERM)
        code, said = end_of(process)
    assert [(card["id"], card["loaded"]) for card in cards] == [("tiny", True), ("other", False)]
    assert code == 0
    assert said.count("labs-api: unloaded other") == 1


def test_the_program_ends_while_its_model_is_loaded(tiny_folder):
    with program(MODEL=str(tiny_folder)) as process:
        assert b"loading" in process.stderr.readline()
        process.send_signal(signal.SIGTERM)
        code, said = end_of(process)
    assert (code, said) == (0, "")


def test_the_program_refuses_a_wrong_table_that_nobody_chose(tmp_path):
    write("labs.toml", '[models.small]\nmodel_name = "a"\ntop_q = 1\n')
    with program("--config", str(tmp_path / "labs.toml")) as process:
        code, said = end_of(process)
    assert code == 1
    assert re.fullmatch(r"Error: .*\[models\.small\].*top_q.*\n", said)
