# SPDX-License-Identifier: Apache-2.0
"""Tests of labs_cache.py: what is kept on disk, where disks, users and processes come between."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kit
import pytest
from kit import answer, conversions

import labs
import labs_cache


def zero(path: Path, start: int, count: int) -> None:
    with path.open("r+b") as file:
        file.seek(start)
        file.write(bytes(count))


@pytest.fixture
def made(packed: labs.ModelSpec) -> tuple[labs.ModelSpec, Path, str]:
    """Convert a model; return its spec, the folder of the conversion, and its answer."""
    text = answer(packed)
    return packed, conversions(packed)[0], text


@pytest.mark.parametrize(
    ("name", "share"),
    [("model.safetensors", 0.25), ("model.safetensors", 1), ("tokenizer.json", 1)],
)
def test_a_conversion_with_zeros_in_it_is_made_again(made: Any, name: str, share: float) -> None:
    spec, place, text = made
    size = (place / name).stat().st_size
    before = (place / name).read_bytes()
    zero(place / name, size - int(size * share), int(size * share))
    assert answer(spec) == text
    assert (place / name).read_bytes() == before


def test_zeros_with_the_old_time_of_change_are_seen_too(made: Any) -> None:
    spec, place, text = made
    weights = place / "model.safetensors"
    before, held = weights.read_bytes(), weights.stat()
    zero(weights, held.st_size // 2, held.st_size // 3)
    os.utime(weights, ns=(held.st_atime_ns, held.st_mtime_ns))
    assert answer(spec) == text
    assert weights.read_bytes() == before


@pytest.mark.parametrize("text", ["\0" * 300, "{}", "[3]", '{"config.json": 818}'])
def test_a_conversion_whose_list_of_files_is_spoilt_is_made_again(made: Any, text: str) -> None:
    spec, place, expected = made
    (place / "complete.json").write_text(text)
    assert answer(spec) == expected
    assert {*json.loads((place / "complete.json").read_text())} >= {"config.json"}


def test_files_that_were_touched_are_read_once_and_kept(
    made: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, place, text = made
    read, digest_of = list[str](), labs_cache._digest_of_file
    monkeypatch.setattr(
        labs_cache, "_digest_of_file", lambda path: read.append(path.name) or digest_of(path)
    )
    monkeypatch.setattr(labs_cache, "_convert", lambda *_: pytest.fail("converted again"))
    os.utime(place / "model.safetensors", ns=(1, 1))
    assert [answer(spec), answer(spec)] == [text, text]
    assert read == ["model.safetensors"]


def test_a_conversion_is_on_the_disk_before_it_has_its_name(
    packed: labs.ModelSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
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


@pytest.mark.parametrize(("umask", "file", "place"), [(0o022, 0o644, 0o755), (0o027, 0o640, 0o750)])
def test_others_may_read_a_conversion_as_far_as_the_umask_lets_them(
    packed: labs.ModelSpec, umask: int, file: int, place: int
) -> None:
    before = os.umask(umask)
    try:
        answer(packed)
    finally:
        os.umask(before)
    found = conversions(packed)[0]
    modes = {stat.S_IMODE(each.stat().st_mode) for each in found.iterdir()}
    assert (stat.S_IMODE(found.stat().st_mode), modes) == (place, {file})
    kept = Path(str(packed.cache_dir)).glob(".digest-*")
    assert {stat.S_IMODE(each.stat().st_mode) for each in kept} == {file}


HELD = """
import pathlib, sys, labs_cache
with labs_cache._locked(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(folder: Path) -> Iterator[Any]:
    """Hold a conversion of another model under way, in another process."""
    (scratch := folder / "cache" / ".converting-other-0123-bf16").mkdir(parents=True)
    (scratch / "half").write_text("half of it")
    command = [sys.executable, "-c", HELD, str(scratch)]
    environment = {**os.environ, "PYTHONPATH": str(kit.ROOT)}
    with subprocess.Popen(command, stdin=-1, stdout=-1, env=environment) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        yield process, scratch
        process.kill()


def test_what_another_process_is_converting_is_left_alone_until_it_ends(
    packed: labs.ModelSpec, holder: Any
) -> None:
    process, scratch = holder
    answer(packed)
    assert (scratch / "half").is_file()
    process.kill()
    process.wait()
    answer(labs.evolve(packed, torch_dtype="bf16"))
    assert not scratch.exists()


def test_the_number_of_a_process_says_nothing_of_who_converts(
    packed: labs.ModelSpec, holder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dead(*_: Any) -> None:
        raise ProcessLookupError  # as in another container

    monkeypatch.setattr(os, "kill", dead)
    answer(packed)
    assert (holder[1] / "half").is_file()


@pytest.mark.parametrize(
    "spoilt",
    [b"", b"../../" + b"x" * 58, b"g" * 64, b"\xff" * 64, b"A" * 64, b"0" * 63, b"0" * 63 + b"\n"],
)
def test_a_digest_that_is_none_is_made_again(folder: Path, spoilt: bytes) -> None:
    (file := folder / "model.bin").write_bytes(b"weights")
    right = labs_cache.digest(file, str(folder / "cache"))
    (memory,) = (folder / "cache").glob(".digest-*")
    memory.write_bytes(spoilt)
    assert labs_cache.digest(file, str(folder / "cache")) == right
    assert memory.read_text() == right
