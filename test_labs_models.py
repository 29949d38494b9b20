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
import signal
import threading
import time
import tomllib
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import falcon.testing
import httpx
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from msgspec.structs import replace

import labs
import labs_api
import labs_cli
import labs_decode
import labs_engine
import labs_models
import test_labs
from test_labs import is_one_sentence, python, save_model, write
from test_labs_api import (
    COMPLETIONS,
    HELLO,
    ROWS,
    A,
    Live,
    Site,
    end_of,
    error_of,
    events_of,
    log_lines,
    program,
    request,
    serving,
    until,
)
from test_labs_decode import tiny
from test_labs_engine import NEW, WAIT_S, Gate, alone, asked, model_of, prompt, quiet, read

folder, one_thread, tiny_folder = test_labs.folder, test_labs.one_thread, test_labs.tiny_folder
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
    monkeypatch.setattr(labs, "weight_bytes", lambda spec: 1)
    monkeypatch.setattr(labs, "context_length", lambda spec: None)
    monkeypatch.setattr(labs_models, "PATIENCE_S", 600.0)
    yield loader
    loader.door.set()


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
def waits(monkeypatch: pytest.MonkeyPatch) -> threading.Semaphore:
    """Count who begins to wait for a model."""
    waits, wait = threading.Semaphore(0), labs_models.Models._wait

    def count(models: labs_models.Models, timeout_s: float) -> None:
        waits.release()
        wait(models, timeout_s)

    monkeypatch.setattr(labs_models.Models, "_wait", count)
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


def come(models: labs_models.Models, name: str) -> labs_engine.Engine:
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
    return [name for name, slot in models._slots.items() if slot.leaving]


def held_answer(models: labs_models.Models, gate: Gate) -> labs_engine.Answer:
    """Let llama begin an answer and hold it there."""
    gate.let(3)
    answer = ask(models, "llama")
    gate.until(4)
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
        assert waits.acquire(timeout=WAIT_S)
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
        with pytest.raises(labs.ModelError, match="^llama could not be loaded; the log tells why$"):
            ask_of_client("llama")
    errors = [record for record in caplog.records if record.name == "labs.models"]
    assert [record.levelname for record in errors] == ["ERROR"]
    assert str(failure) in caplog.text


def test_a_failed_load_is_tried_again_only_after_a_while(begin, loader, monkeypatch):
    models = use(begin("llama", "qwen2", max_loaded_models=3), "llama")
    loader.failures["qwen2"] = labs.ModelError("the disk is away")
    with pytest.raises(labs.ModelError, match="the log tells why"):
        come(models, "qwen2")
    for _ in range(3):
        with pytest.raises(labs.ModelError, match="the log tells why"):
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


@pytest.mark.parametrize("failing", ["load", "engine"])
def test_memory_that_runs_out_during_a_load_is_given_back(failing, begin, loader, monkeypatch):
    monkeypatch.setattr(labs_models.log, "disabled", True)  # pytest keeps what is logged
    models, made, held = use(begin("llama", "qwen2"), "llama"), [], []

    def half(*_: Any, **__: Any) -> Any:
        decoder = labs_decode.prepare(tiny("qwen2"))
        made.append(weakref.ref(decoder.model))
        if failing == "load":
            raise torch.OutOfMemoryError(OOM)
        return replace(model_of("qwen2"), decoder=decoder)

    def no_engine(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError(OOM)

    def free_memory() -> None:
        gc.collect()
        held.extend(each() is not None for each in made)

    monkeypatch.setattr(labs, "load_model", half)
    monkeypatch.setattr(labs, "free_memory", free_memory)
    if failing == "engine":
        monkeypatch.setattr(labs_engine, "Engine", no_engine)
    with pytest.raises(labs.ModelError, match="the log tells why"):
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
    assert said == [f"labs-api: {name} was let go" for name in KINDS]


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
    monkeypatch.setattr(labs_models, "PATIENCE_S", 0.0)
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
    monkeypatch.setattr(labs_models, "PATIENCE_S", 0.0)
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
    monkeypatch.setattr(labs_models, "PATIENCE_S", 0.0)
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
    monkeypatch.setattr(labs_models, "PATIENCE_S", 0.1)
    want(models, "qwen2")
    until(lambda: "qwen2" in models.loaded())
    use(models, "llama")
    assert loader.loads == ["llama", "qwen2", "llama"]


def test_two_models_asked_by_many_in_turn_where_one_has_room_answer_all(
    begin, loader, monkeypatch
):
    askers, rounds = 24, 3
    names = ("llama", "qwen2")
    expected = {(name, n): alone(name, n) for name in names for n in range(askers)}
    assert len({*expected.values()}) == len(expected), "a text tells whose it is"
    monkeypatch.setattr(labs_models, "PATIENCE_S", 0.2)
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
    config = test_labs.llama()
    config.num_hidden_layers, config.max_position_embeddings = 1, 512
    return save_model(tmp_path_factory.mktemp("other") / "model", config)


@pytest.fixture
def places(tiny_folder: Path, other_folder: Path) -> Iterator[Callable[..., labs_models.Models]]:
    """Begin to load true models by their folders, the tiny one first."""
    with contextlib.ExitStack() as stack:

        def start(*more: labs.ModelSpec, **server: Any) -> labs_models.Models:
            first, second = spec_of(tiny_folder), spec_of(other_folder)
            shared = labs.Server(**server)
            configs = {
                name: labs.Config(model=spec, model_id=name, server=shared)
                for name, spec in zip(("tiny", "other", "third"), (first, second, *more))
            }
            models = labs_models.Models(replace(configs["tiny"], models=configs))
            stack.callback(stop, models)
            return models

        yield start


def spec_of(folder: Path, method: Any = None) -> labs.ModelSpec:
    quantization = labs.Quantization(quant_method=method)
    return labs.ModelSpec(model_name=str(folder), torch_dtype="fp32", quantization=quantization)


def answered(models: labs_models.Models, name: str) -> weakref.ref[Any]:
    """Let a model answer; return a reference to it that does not hold it."""
    assert read(ask(models, name))[1].usage.completion_tokens > 0
    engine = models.loaded()[name]
    assert quiet(engine)
    return weakref.ref(engine.model.model)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_weights_of_a_model_are_known_before_it_is_loaded(dtype, tiny_folder):
    spec = replace(spec_of(tiny_folder), torch_dtype=dtype)
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=dtype_of(dtype))
    size = sum(parameter.nbytes for parameter in model.parameters())
    assert labs.weight_bytes(spec) == size
    assert labs.load_model(spec, cached=False).decoder.weight_bytes == size


def dtype_of(name: str) -> torch.dtype:
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[name]


def test_fewer_bits_take_less_memory_known_before_loading_too(tiny_folder):
    sizes = [labs.weight_bytes(spec_of(tiny_folder, method)) for method in (None, "int8", "int4")]
    assert sizes[0] > sizes[1] > sizes[2] > 0


def test_the_weights_of_what_is_no_model_are_refused_as_loading_it_is(tmp_path):
    with pytest.raises(labs.ModelError, match="holds no config.json"):
        labs.weight_bytes(spec_of(tmp_path))


def test_a_model_that_does_not_fit_beside_another_lets_it_go(places, tiny_folder, other_folder):
    sizes = [labs.weight_bytes(spec_of(folder)) for folder in (tiny_folder, other_folder)]
    models = places(model_memory_bytes=sum(sizes) - 1)
    for name in ("tiny", "other", "tiny"):
        answered(models, name)
        assert [*models.loaded()] == [name]


def test_models_that_fit_stay_side_by_side(places, tiny_folder, other_folder):
    sizes = [labs.weight_bytes(spec_of(folder)) for folder in (tiny_folder, other_folder)]
    third = replace(spec_of(other_folder), cuda_graphs=False)
    models = places(third, model_memory_bytes=sum(sizes))
    answered(models, "tiny")
    answered(models, "other")
    assert [*models.loaded()] == ["tiny", "other"]
    answered(models, "tiny")
    answered(models, "third")
    assert [*models.loaded()] == ["tiny", "third"]


def test_a_model_larger_than_the_limit_is_refused_and_lets_nobody_go(
    places, tiny_folder, other_folder, caplog
):
    limit = labs.weight_bytes(spec_of(tiny_folder))
    large = replace(spec_of(tiny_folder), torch_dtype="fp32", cuda_graphs=False)
    small = spec_of(other_folder)
    config = {
        "small": labs.Config(model=small, model_id="small"),
        "large": labs.Config(model=large, model_id="large"),
    }
    server = labs.Server(model_memory_bytes=limit - 1, max_loaded_models=1)
    models = labs_models.Models(replace(config["small"], server=server, models=config))
    weights = answered(models, "small")
    with pytest.raises(labs.ModelError, match="the log tells why"):
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
    with pytest.raises(labs.ModelError, match="the log tells why"):
        come(models, "third")
    assert models.loaded()["tiny"].model.model is weights()


def test_where_no_limit_is_set_models_take_what_is_free(begin, loader, monkeypatch):
    free = {"llama": 9.0, "qwen2": 10.0}
    monkeypatch.setattr(labs, "weight_bytes", lambda spec: 9)
    monkeypatch.setattr(labs, "system_memory", lambda spec: free[spec.model_name])
    models = use(begin(*KINDS[:2]), "llama", "qwen2")
    assert [*models.loaded()] == ["llama", "qwen2"]
    free["qwen2"] = 9.0
    loader.loads.clear()
    models = use(begin(*KINDS[:2]), "llama", "qwen2")
    assert [*models.loaded()] == ["qwen2"]
    use(models, "llama")  # a tenth is for the rows
    assert [*models.loaded()] == ["llama"]


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
import os, sys, time, psutil, weakref
import torch
import labs, labs_models
torch.set_num_threads(1)
models = labs_models.Models(labs.load_config("big.toml", env={}))
rss = psutil.Process().memory_info

def answer(name):
    while True:
        try:
            engine = models(name)
        except labs_models.Loading as loading:
            loading.wait(0.05)
            continue
        break
    inputs = labs.build_inputs(engine.model, prompt="hello")
    answer = engine.submit(inputs, labs.Generation(max_new_tokens=4, temperature=0))
    models.release(name)
    *_, done = answer
    assert isinstance(done, labs.Done), done
    model = engine.model
    return weakref.ref(model.model), sum(p.nbytes for p in model.model.parameters()), model.decoder

first, _, decoder = answer("first")
weights = decoder.weight_bytes
del decoder
alone = rss().rss
second, _, decoder = answer("second")
del decoder
both = rss().rss
models("second")  # held: never idle
end = time.monotonic() + 60
while first() is not None or rss().rss > both - 0.7 * weights:
    assert time.monotonic() < end, (first() is None, alone, both, rss().rss, weights)
    time.sleep(0.05)
after_going = rss().rss
answer("first")
print(weights, both - alone, both - after_going, rss().rss - both)
models.close()
"""


def test_the_memory_of_a_model_that_was_let_go_is_free(tmp_path):
    config = transformers.LlamaConfig(
        vocab_size=262, hidden_size=1024, intermediate_size=4096, num_hidden_layers=2,
        num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=512,
    )  # fmt: skip
    tables = "[server]\nkeep_alive_s = 0.5\n"
    for name in ("first", "second"):
        save_model(tmp_path / name, config)
        tables += f'[models.{name}]\nmodel_name = "{tmp_path / name}"\ntorch_dtype = "fp32"\n'
        tables += f'cache_dir = "{tmp_path / "cache"}"\n'
    write("big.toml", 'default_model = "first"\n' + tables)
    done = python(FREED, tmp_path)
    assert done.returncode == 0, done.stderr
    weights, grown, fallen, again = map(int, done.stdout.split())
    assert 100e6 < weights < 200e6
    assert grown > 0.7 * weights, "the second model takes memory too"
    assert fallen >= 0.7 * weights
    assert again < 0.5 * weights, "what was freed is taken again, not more"


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


def test_without_a_time_to_go_idle_models_stay(begin):
    models = use(begin("llama", "qwen2"), "llama", "qwen2")
    for slot in models._slots.values():
        slot.used -= 10**9
    models.release("qwen2") if models("qwen2") else None
    use(models, "qwen2")
    assert [*models.loaded()] == ["llama", "qwen2"]


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

    monkeypatch.setattr(labs, "context_length", context_length)
    models = use(begin("llama", "qwen2"), "llama", "qwen2")
    assert models.context_length("qwen2") == 512
