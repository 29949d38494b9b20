# SPDX-License-Identifier: Apache-2.0
"""Copies of labs in another project, which record the version they were copied from.

    labs-gen vendor DEST --rooms api,typed        labs.py, these rooms and what they need
    labs-gen vendor DEST --rooms faster,sources     the core with speed, package: and .gguf models
    labs-gen vendor DEST                          update the copies from a newer labs
    labs-gen vendor DEST --check                  show how each copy differs; write nothing

A copy begins with a comment that has the hashes of the original and of the copy. In a package (a
folder with an __init__.py) `import labs` becomes `from . import labs`. A file that this command
did not write, or that was edited later, is never overwritten. Needs the files of labs beside it.
"""

from __future__ import annotations

import ast
import hashlib
import itertools
import os
import re
import tempfile
from collections.abc import Collection, Iterable
from pathlib import Path

import labs

ALWAYS = ("labs", "labs_loop", "labs_decode")  # the core; labs.py imports these inside functions
FOREIGN, EDITED = "not written by labs-gen vendor", "edited by hand"
IMPORTS = (ast.Import, ast.ImportFrom)
HEADER = """\
# {name} of labs {version}, copied by `labs-gen vendor FOLDER`{changed}.
# Copyright 2026 the labs authors, Apache-2.0. Do not edit: an edited copy cannot be updated.
# `labs-gen vendor FOLDER --check` shows whether it was edited and whether it is up to date.
# sha256 of the original: {original}
# sha256 of the text below: {copy}
"""
READ = re.compile(r"# labs\S* of labs (?P<version>\S+), (?:.*\n){4}# .*: (?P<copy>\w{64})\n")


def vendor(folder: str, rooms: Collection[str] = ()) -> int:
    """Write the copies that are missing or outdated; return their number.

    Raises LabsError and writes nothing when a room is unknown or a foreign or edited file is there.
    """
    copies = _copies(Path(folder), rooms)
    states = {name: _state(Path(folder, name), text) for name, text in copies.items()}
    lost = [f"{name} ({state})" for name, state in states.items() if state in (FOREIGN, EDITED)]
    if lost:
        raise labs.LabsError(f"{folder}: {', '.join(lost)} would be lost: move that away first")
    new = [name for name, state in states.items() if state != "same"]
    os.makedirs(folder, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".labs-", dir=folder) as place:
        for name in new:
            Path(place, name).write_text(copies[name], encoding="utf-8", newline="\n")
        for name in new:
            os.replace(Path(place, name), Path(folder, name))
    return len(new)


def check(folder: str) -> dict[str, str]:
    """Return the state of each expected copy in words, by file name."""
    copies = _copies(Path(folder), ())
    return {name: _state(Path(folder, name), text) for name, text in copies.items()}


def _state(path: Path, text: str) -> str:
    if not path.exists():
        return "missing"
    there = path.read_text(encoding="utf-8", errors="replace")
    if there == text:
        return "same"
    if (header := READ.match(there)) is None:
        return FOREIGN
    if header["copy"] != _digest(there[header.end() :]):
        return EDITED
    return f"outdated (copied from labs {header['version']}; labs {labs.__version__} differs)"


def _copies(folder: Path, rooms: Collection[str]) -> dict[str, str]:
    """Return the texts of the copies: these rooms, those already there, and their imports."""
    texts = {path.stem: path.read_text("utf-8") for path in Path(__file__).parent.glob("labs*.py")}
    if READ.match(texts["labs_vendor"]):
        raise labs.LabsError("this labs is itself a copy: run the labs-gen that made it")
    known = sorted(name.removeprefix("labs_") for name in texts if name != "labs")
    if unknown := [room for room in rooms if room not in known]:
        raise labs.LabsError(f"unknown room {unknown[0]!r}; the rooms are {', '.join(known)}")
    there = [name for name in texts if (folder / f"{name}.py").exists()]
    wanted = _needed([*ALWAYS, *there, *(f"labs_{room}" for room in rooms)], texts)
    ours = texts if (folder / "__init__.py").exists() else {}
    return {f"{name}.py": _copy(f"{name}.py", texts[name], ours) for name in sorted(wanted)}


def _needed(names: Iterable[str], texts: dict[str, str]) -> set[str]:
    """Return these modules and the modules of labs that they import at their top level."""
    needed, waiting = set[str](), [*names]
    while waiting:
        needed.add(name := waiting.pop())
        imports = [each for each in ast.parse(texts[name]).body if isinstance(each, IMPORTS)]
        waiting += {*itertools.chain(*map(_modules, imports))} & texts.keys() - needed
    return needed


def _modules(node: ast.Import | ast.ImportFrom) -> list[str]:
    return [x.name for x in node.names] if isinstance(node, ast.Import) else [str(node.module)]


def _copy(name: str, text: str, ours: Collection[str]) -> str:
    body, changed = (relative(text, ours), ", imports made relative") if ours else (text, "")
    words = {"name": name, "version": labs.__version__, "changed": changed}
    return HEADER.format(**words, original=_digest(text), copy=_digest(body)) + body


def relative(text: str, ours: Collection[str]) -> str:
    """Return a module's text with its imports of `ours` made relative and nothing else changed."""
    data, edits = text.encode(), []
    starts = [0, *itertools.accumulate(map(len, data.splitlines(keepends=True)))]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, IMPORTS) and not {*ours}.isdisjoint(_modules(node)):
            begin = starts[node.lineno - 1] + node.col_offset
            end = starts[(node.end_lineno or 0) - 1] + (node.end_col_offset or 0)
            edits.append((begin, end, _relative(node, data[begin:end], ours)))
    for begin, end, new in sorted(edits, reverse=True):
        data = data[:begin] + new + data[end:]
    return data.decode()


def _relative(node: ast.Import | ast.ImportFrom, source: bytes, ours: Collection[str]) -> bytes:
    if isinstance(node, ast.ImportFrom):
        return source.replace(b"from ", b"from .", 1)
    starts = ["from . import" if each.name in ours else "import" for each in node.names]
    names = map(ast.unparse, node.names)
    return "; ".join(map(" ".join, zip(starts, names, strict=True))).encode()


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
