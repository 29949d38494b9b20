# SPDX-License-Identifier: Apache-2.0
"""labs_files: whole files or none."""

from __future__ import annotations

import threading
from collections.abc import Iterator
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
    assert [each.name for each in tmp_path.iterdir()] == ["kept.json"]
    assert path.read_text() == "before"


def test_a_target_that_cannot_be_written_is_named_in_the_error(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "folder", tmp_path / "none" / "file"):
        with pytest.raises(OSError, match=path.name) as raised:
            labs_files.write_whole(path, [b"text"])
        assert raised.value.filename == str(path)
    assert [each.name for each in tmp_path.iterdir()] == ["folder"]


def test_a_reader_never_sees_a_part(tmp_path: Path) -> None:
    path, seen, over = tmp_path / "file", set[bytes](), threading.Event()
    texts = [bytes([n]) * 300_000 for n in (65, 66)]
    labs_files.write_whole(path, texts[:1])

    def read() -> None:
        while not over.is_set():
            seen.add(path.read_bytes())

    reader: Any = threading.Thread(target=read)
    reader.start()
    for count in range(60):
        labs_files.write_whole(
            path, (texts[count % 2][i : i + 1000] for i in range(0, 300_000, 1000))
        )
    over.set()
    reader.join()
    assert seen == {*texts}
