# SPDX-License-Identifier: Apache-2.0
"""The fixtures that tests share. Tests run on the CPU, where they are exact."""

import os
from pathlib import Path

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
# What a terminal or a CI system says of itself decides what is shown: tests say it themselves.
for _name in ("CI", "NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES", "EDITOR", "VISUAL", "PAGER"):
    os.environ.pop(_name, None)
os.environ["TERM"] = "xterm"
# With AMX, products of more than 32 rows in bf16 round otherwise, also a long prompt's: the exact
# texts that tests compare with are those of a CPU without it. Read once, at import.
CPU_INFO = Path("/proc/cpuinfo")
if CPU_INFO.exists() and "amx_bf16" in CPU_INFO.read_text(encoding="utf-8"):
    os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
    os.environ.setdefault("MKL_ENABLE_INSTRUCTIONS", "AVX512")

import contextlib
import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import kit
import pytest
import torch
import transformers

import labs
import labs_engine


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Compute in one thread: for models this small a second one only waits for the first.

    The libraries' millions of objects are frozen: each model that goes is followed by a collection.
    """
    gc.collect()
    gc.freeze()
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
    gc.unfreeze()


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in an empty folder, so that no labs.toml or .env is found by chance."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the LABS_ variables of this machine out, all but the place of the cache."""
    for name in {name for name in os.environ if name.startswith("LABS_")} - {"LABS_CACHE_DIR"}:
        monkeypatch.delenv(name)


@pytest.fixture
def fresh() -> Iterator[None]:
    """Begin and end with no model remembered."""
    labs.load_model.cache_clear()
    yield
    labs.load_model.cache_clear()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return kit.save_model(tmp_path_factory.mktemp("tiny") / "model", eos_token_id=[kit.END])


@pytest.fixture(scope="session")
def tiny(tiny_folder: Path) -> labs.Model:
    return kit.load(tiny_folder)


@pytest.fixture(scope="session")
def reference(tiny_folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)


@pytest.fixture(scope="session")
def default(tmp_path_factory: pytest.TempPathFactory) -> labs.Model:
    """Load the default model, as a user without any configuration does."""
    with contextlib.chdir(tmp_path_factory.mktemp("empty")):
        return labs.load_model(labs.load_config(env={}))


@pytest.fixture
def missing(monkeypatch) -> Callable[[str], None]:
    """Return a function that lets a package seem not to be installed."""
    import importlib.util

    inner = importlib.util.find_spec
    hidden: set[str] = set()
    found = lambda name, *args: None if name in hidden else inner(name, *args)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", found)
    return hidden.add


@pytest.fixture
def packed(folder, fresh) -> labs.ModelSpec:
    """Make a GGUF file and say where its conversion goes."""
    path = kit.save_gguf(folder / "tiny.gguf")
    return labs.ModelSpec(model_name=str(path), torch_dtype="fp32", cache_dir=str(folder / "cache"))


@pytest.fixture
def fake(tiny: labs.Model) -> kit.FakeEngine:
    return kit.FakeEngine(tiny)


@pytest.fixture
def site(fake: kit.FakeEngine) -> kit.Site:
    return kit.Site(fake, kit.configured())


@pytest.fixture(scope="module")
def served(tiny: labs.Model) -> Iterator[kit.Live]:
    server = {"port": 0, "max_batch_rows": kit.ROWS, "max_waiting": kit.WAITING}
    config = kit.configured(generation=labs.Generation(max_new_tokens=5), **server)
    live = kit.Live(labs_engine.Engine(tiny, config.server), config)
    yield live
    live.close()
    live.engine.close()


@pytest.fixture
def brake(tiny: labs.Model) -> Iterator[kit.Brake]:
    brake = kit.Brake()
    with kit.hooked(tiny, brake):
        yield brake
        brake.pause_s, brake.held = 0.0, False


@pytest.fixture
def live(served: kit.Live, brake: kit.Brake) -> Iterator[kit.Live]:
    """Serve; begin and end with nothing under way."""
    kit.until(lambda: served.doing() == (0, 0))
    yield served
    brake.pause_s, brake.held = 0.0, False
    kit.until(lambda: served.doing() == (0, 0))


@pytest.fixture
def fake_labs(monkeypatch: pytest.MonkeyPatch) -> kit.FakeLabs:
    fake_labs = kit.FakeLabs()
    for name in ("load_config", "build_inputs", "stream_generate"):
        monkeypatch.setattr(labs, name, getattr(fake_labs, name))
    monkeypatch.setattr(labs, "load_model", lambda config: kit.MODEL)
    return fake_labs
