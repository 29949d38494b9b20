# SPDX-License-Identifier: Apache-2.0
"""Tests of labs_cache.py: converted GGUF files and digests, with failing disks and processes."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import shutil
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import transformers
from kit import ROOT, SHORT, answer, conversions, is_one_sentence, load, python, save_gguf, write

import labs
import labs_bar
import labs_cache
import labs_hub
import labs_progress


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Convert a GGUF file; return the folder of both and the model's answer."""
    place = tmp_path_factory.mktemp("converted")
    path, cache = save_gguf(place / "tiny.gguf"), str(place / "cache")
    return place, answer(labs.ModelSpec(model_name=str(path), torch_dtype="fp32", cache_dir=cache))


@pytest.fixture
def made(template: tuple[Path, str], packed: labs.ModelSpec) -> tuple[labs.ModelSpec, Path, str]:
    """Return a model's spec, the folder of its conversion, and its answer."""
    shutil.copytree(template[0] / "cache", Path(str(packed.cache_dir)))
    assert answer(packed) == template[1]
    (place,) = conversions(packed)
    return packed, place, template[1]


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the names of the files whose digests are computed."""
    names, hash_file = list[str](), labs_cache._digest_of_file
    noted = lambda path: names.append(path.name) or hash_file(path)  # noqa: E731
    monkeypatch.setattr(labs_cache, "_digest_of_file", noted)
    return names


# ---------------------------------------------------------------- one conversion, whole


def test_a_gguf_file_is_converted_once_for_each_dtype_and_content(packed):
    saving = {"autospec": True, "side_effect": transformers.PreTrainedModel.save_pretrained}
    with mock.patch.object(transformers.PreTrainedModel, "save_pretrained", **saving) as save:
        first = answer(packed)
        assert (answer(packed), save.call_count) == (first, 1)
        answer(labs.evolve(packed, torch_dtype="bf16"))
        assert save.call_count == len(conversions(packed)) == 2
    save_gguf(Path(packed.model_name), seed=1)
    assert answer(packed) != first


def zeros(path: Path, share: float) -> None:
    """Write zeros into a file and leave its times as they were."""
    held, data = path.stat(), path.read_bytes()
    count = int(len(data) * share)
    path.write_bytes(data[: len(data) - count] + bytes(count))
    os.utime(path, ns=(held.st_atime_ns, held.st_mtime_ns))


SPOILT = [  # a file and its new contents: None is no file, a number the share that becomes zeros
    ("model.safetensors", 0.25),
    ("tokenizer.json", 1.0),
    ("model.safetensors", "half"),
    ("config.json", None),
    *(("complete.json", text) for text in ("\0" * 300, "{}", "[3]", '{"config.json": 818}')),
]


@pytest.mark.parametrize(("name", "contents"), SPOILT)
def test_a_conversion_that_is_spoilt_is_made_again(name, contents, made):
    spec, place, text = made
    before = {path.name: path.read_bytes() for path in place.iterdir()}
    if isinstance(contents, float):
        zeros(place / name, contents)
    else:
        (place / name).unlink()
    if isinstance(contents, str):
        (place / name).write_text(contents)
    assert answer(spec) == text
    after = {path.name: path.read_bytes() for path in place.iterdir()}
    assert {*json.loads(after.pop("complete.json"))} >= {"config.json"}
    assert after.items() <= before.items()
    assert len(after) == len(before) - 1


def test_files_that_were_touched_are_read_once_and_kept(made, hashed, monkeypatch):
    spec, place, text = made
    monkeypatch.setattr(labs_cache, "_convert", lambda *_: pytest.fail("converted again"))
    os.utime(place / "model.safetensors", ns=(1, 1))
    assert [answer(spec), answer(spec)] == [text, text]
    assert hashed == ["model.safetensors"]


def test_a_conversion_is_on_the_disk_before_it_has_its_name(packed, monkeypatch):
    flushed, named, fsync, replace = set[int](), list[set[int]](), os.fsync, os.replace

    def note(descriptor: int) -> None:
        flushed.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def name(old: Any, new: Any) -> None:
        if Path(old).is_dir():
            named.append({each.stat().st_ino for each in (Path(old), *Path(old).iterdir())})
            assert named[-1] <= flushed
        replace(old, new)

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(os, "replace", name)
    answer(packed)
    assert len(named) == 1
    assert Path(str(packed.cache_dir)).stat().st_ino in flushed


def test_other_users_may_read_a_conversion_as_the_umask_allows(packed):
    before = os.umask(0o027)
    try:
        answer(packed)
    finally:
        os.umask(before)
    (place,) = conversions(packed)
    inside = [*place.iterdir(), *Path(str(packed.cache_dir)).glob(".digest-*")]
    assert stat.S_IMODE(place.stat().st_mode) == 0o750
    assert {stat.S_IMODE(each.stat().st_mode) for each in inside} == {0o640}


@pytest.mark.parametrize(("terminal", "asked"), [(False, True), (True, False), (True, True)])
def test_a_conversion_shows_its_progress_on_a_terminal_if_asked(
    terminal, asked, packed, monkeypatch
):
    screen = io.StringIO()
    monkeypatch.setattr(screen, "isatty", lambda: terminal, raising=False)
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(labs_progress, "_asked", [])
    monkeypatch.setattr(labs_hub, "_asked", [])
    monkeypatch.setattr(labs_bar, "DELAY_S", 0.0)
    if asked:
        labs_progress.show()
    answer(packed)
    assert ("Converting the GGUF file" in screen.getvalue()) == (terminal and asked)
    assert bool(screen.getvalue()) == (terminal and asked)


# ---------------------------------------------------------------- failures


def test_a_conversion_that_cannot_be_written_is_refused_and_leaves_nothing(
    packed, folder, monkeypatch
):
    def refused(named: str, **changes: Any) -> None:
        with pytest.raises(labs.ModelError, match=named) as caught:
            labs.load_model(labs.evolve(packed, **changes))
        assert is_one_sentence(caught.value)

    full = OSError(errno.ENOSPC, "No space left on device")
    with mock.patch.object(transformers.PreTrainedModel, "save_pretrained", side_effect=full):
        refused("disk is full")
    usage = shutil._ntuple_diskusage(10**9, 10**9, 1000)
    with mock.patch.object(shutil, "disk_usage", return_value=usage):
        refused(r"GB.*cache_dir")
    assert conversions(packed) == []
    write("file", "")
    refused("file", cache_dir=str(folder / "file" / "cache"))


KILLED = """
import labs_cache, os, pathlib, transformers
def half(model, folder, **options):
    pathlib.Path(folder, "model.safetensors").write_bytes(b"half")
    os.kill(os.getpid(), 9)
transformers.PreTrainedModel.save_pretrained = half
labs_cache.converted(pathlib.Path({name!r}), {cache!r}, "fp32")
"""


def test_a_conversion_that_was_killed_is_made_again_and_leaves_nothing_behind(packed, folder):
    code = KILLED.format(name=packed.model_name, cache=packed.cache_dir)
    assert python(code, folder, timeout=300).returncode == -9
    assert answer(packed)
    assert [path.name[:5] for path in conversions(packed)] == ["tiny-"]


def test_threads_that_convert_at_once_both_answer_and_leave_nothing_patched(packed):
    import gguf

    places = [(transformers.PreTrainedModel, "tie_weights"), (gguf, "GGUFReader")]
    before, together = [getattr(*place) for place in places], threading.Barrier(2)

    def ask(batch_invariant: bool) -> str:
        spec = labs.evolve(packed, batch_invariant=batch_invariant)
        together.wait()
        return labs.generate(labs.load_model(spec), SHORT, max_new_tokens=8, temperature=0).text

    with ThreadPoolExecutor(2) as threads:
        first, second = threads.map(ask, [True, False])
    assert first == second
    assert len(conversions(packed)) == 1
    assert [getattr(*place) for place in places] == before


HELD = """
import pathlib, sys, labs_cache
with labs_cache._locked(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def held(scratch: Path) -> Iterator[Any]:
    """Hold the lock of a conversion in another process."""
    scratch.mkdir(parents=True)
    (scratch / "half").write_text("half of it")
    command = [sys.executable, "-c", HELD, str(scratch)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdin=-1, stdout=-1, env=environment) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        yield process
        process.kill()


def test_another_models_conversion_in_another_process_is_left_alone_until_it_ends(packed, folder):
    scratch = folder / "cache" / ".converting-other-0123-bf16"
    with held(scratch) as process:
        # The number of its process means nothing here, as in another container.
        with mock.patch.object(os, "kill", side_effect=ProcessLookupError):
            answer(packed)
        assert (scratch / "half").is_file()
        process.kill()
        process.wait()
        answer(labs.evolve(packed, torch_dtype="bf16"))
    assert not scratch.exists()


def test_the_same_conversion_in_another_process_is_waited_for(packed, folder):
    place = labs_cache._conversion(Path(packed.model_name), folder / "cache", "fp32")
    scratch = folder / "cache" / f".converting-{place.name}"
    with ThreadPoolExecutor(1) as threads, held(scratch) as process:
        waits = threads.submit(answer, packed)
        with pytest.raises(TimeoutError):
            waits.result(2)
        assert not place.exists()
        process.kill()
        assert waits.result()
    assert place.is_dir()


# ---------------------------------------------------------------- digests


MALFORMED = [b"", b"../../" + b"x" * 58, b"g" * 64, b"\xff" * 64, b"A" * 64, b"0" * 63]


@pytest.mark.parametrize("spoilt", [*MALFORMED, b"0" * 63 + b"\n"])
def test_a_remembered_digest_that_is_malformed_is_computed_again(folder, spoilt):
    (file := folder / "model.bin").write_bytes(b"weights")
    right = labs_cache.digest(file, str(folder / "cache"))
    (memory,) = (folder / "cache").glob(".digest-*")
    memory.write_bytes(spoilt)
    assert labs_cache.digest(file, str(folder / "cache")) == right
    assert memory.read_text() == right


def revision(model: labs.Model) -> str:
    assert model.fingerprint is not None
    return model.fingerprint.revision


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_the_revision_of_a_folder_depends_on_its_contents(name, folder, tiny_folder):
    place, moved, cache = folder / "model", folder / "moved", str(folder / "cache")
    shutil.copytree(tiny_folder, place)
    shutil.copytree(tiny_folder, moved)
    (moved / "README.md").write_text("hello")
    before = labs_cache.digest(place, cache)
    assert labs_cache.digest(moved, cache) == before
    data = (place / name).read_bytes()
    (place / name).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert labs_cache.digest(place, cache) != before


def test_a_folder_is_hashed_once(folder, tiny_folder, fresh, hashed):
    cache = str(folder / "cache")
    model = load(tiny_folder, cache_dir=cache)
    assert revision(model) == f"sha256:{labs_cache.digest(tiny_folder, cache)}"
    assert len(hashed) == len({*hashed}) > 2


def test_the_revision_of_a_gguf_file_is_its_sha256_and_of_a_hub_model_its_commit(made):
    digest = hashlib.sha256(Path(made[0].model_name).read_bytes()).hexdigest()
    assert revision(labs.load_model(made[0])) == f"sha256:{digest}"
    model = SimpleNamespace(config=SimpleNamespace(_commit_hash="c0ffee"), dtype=torch.float32)
    given = {"device": torch.device("cpu"), "invariant": True, "quant_method": "none"}
    decoder: Any = SimpleNamespace(model=model, **given)
    spec = labs.ModelSpec(model_name="org/name", device_map="cpu")
    found = labs._fingerprint_of(decoder, spec, "fp32", None)
    assert found is not None
    assert found.revision == "c0ffee"
