# SPDX-License-Identifier: Apache-2.0
"""labs_files: whole files or none."""

from __future__ import annotations

import os
import re
import stat
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy
import pytest

import labs_files


def test_parts_of_several_kinds_become_one_file(tmp_path: Path) -> None:
    numbers = numpy.arange(4, dtype=numpy.uint8)
    labs_files.write_whole(tmp_path / "a", [b"ab", memoryview(b"cd"), bytearray(b"e"), numbers])
    assert (tmp_path / "a").read_bytes() == b"abcde\0\1\2\3"
    labs_files.write_whole(tmp_path / "a", [])
    assert [(each.name, each.read_bytes()) for each in tmp_path.iterdir()] == [("a", b"")]


def broken(error: BaseException) -> Iterator[bytes]:
    yield b"a part"
    raise error


def names(folder: Path) -> list[str]:
    return [each.name for each in folder.iterdir()]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_the_file_as_it_was_and_nothing_beside_it(
    tmp_path: Path, error: BaseException
) -> None:
    path = tmp_path / "kept.json"
    path.write_text("before")
    with pytest.raises(type(error)) as raised:
        labs_files.write_whole(path, broken(error))
    if isinstance(raised.value, OSError):
        assert raised.value.filename == str(path)
        assert str(raised.value) == f"[Errno 28] No space left on device: '{path}'"
    assert names(tmp_path) == ["kept.json"]
    assert path.read_text() == "before"


@pytest.mark.parametrize(
    "error",
    [OSError("a disk went away"), FileNotFoundError(2, "No such file", "source")],
)
def test_an_error_that_is_not_about_the_file_stays_as_it_is(tmp_path: Path, error: OSError) -> None:
    with pytest.raises(OSError, match=error.args[-1]) as raised:
        labs_files.write_whole(tmp_path / "file", broken(error))
    assert raised.value is error
    assert names(tmp_path) == []


def test_a_part_that_has_no_bytes_leaves_no_file(tmp_path: Path) -> None:
    odd: list[Any] = [b"a part", "text"]
    with pytest.raises(TypeError):
        labs_files.write_whole(tmp_path / "file", odd)
    assert names(tmp_path) == []


def test_a_target_that_cannot_be_written_is_named_in_the_error_as_it_was_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    for file in ("folder", "folder/", "none/file", "./none/file", "file/", Path("folder")):
        with pytest.raises(OSError, match=str(file)) as raised:
            labs_files.write_whole(file, [b"text"])
        assert raised.value.filename == str(file)
    assert (names(tmp_path), names(Path("folder"))) == (["folder"], [])


@pytest.mark.parametrize("name", ["n" * 255, "\N{GRINNING FACE}" * 63], ids=["n", "face"])
def test_a_name_may_be_as_long_as_the_disk_allows(tmp_path: Path, name: str) -> None:
    labs_files.write_whole(tmp_path / name, [b"text"])
    assert names(tmp_path) == [name]


def test_while_a_file_is_written_its_part_is_named_like_it_and_the_old_one_is_read(
    tmp_path: Path,
) -> None:
    file, beside = tmp_path / ".packed-0", list[list[str]]()
    file.write_text("before")

    def parts() -> Iterator[bytes]:
        yield b"a part"
        beside.append(sorted(re.sub("[0-9a-f]{32}", "HEX", each) for each in names(tmp_path)))
        assert file.read_text() == "before"

    labs_files.write_whole(file, parts())
    assert (beside, file.read_text()) == ([[".packed-0", ".packed-0.HEX"]], "a part")


def test_others_may_read_a_file_as_the_umask_allows(tmp_path: Path) -> None:
    for mask, mode in ((0o022, 0o644), (0o077, 0o600)):
        before = os.umask(mask)
        try:
            labs_files.write_whole(tmp_path / "file", [b"text"])
        finally:
            os.umask(before)
        assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == mode


def test_a_file_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed, fsync, replace = list[int](), os.fsync, os.replace

    def note(descriptor: int) -> None:
        flushed.append(os.fstat(descriptor).st_size)
        fsync(descriptor)

    def name(old: Any, new: Any) -> None:
        assert flushed == [4]
        replace(old, new)

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(os, "replace", name)
    labs_files.write_whole(tmp_path / "file", [b"te", b"xt"])
    assert (tmp_path / "file").read_bytes() == b"text"


def test_a_reader_never_sees_a_part(tmp_path: Path) -> None:
    path, over = tmp_path / "file", threading.Event()
    texts = [bytes([n]) * 300_000 for n in (65, 66)]
    labs_files.write_whole(path, texts[:1])

    def read() -> set[bytes]:
        seen = set[bytes]()
        while not over.is_set():
            seen.add(path.read_bytes())
        return seen

    with ThreadPoolExecutor(1) as pool:
        reader = pool.submit(read)
        try:
            for count in range(60):
                text = memoryview(texts[count % 2])
                labs_files.write_whole(path, (text[i : i + 1000] for i in range(0, 300_000, 1000)))
        finally:
            over.set()
    assert reader.result() == {*texts}
