# SPDX-License-Identifier: Apache-2.0
"""README.md and docs/*.md hold: blocks tagged `run` are run in order and print what they show.

Each page begins with fresh names; all share one loaded default model and one server. Pages
but the README and those of ON_ANY_MODEL need the mark `real`. What the default model generates was
recorded on the machines of RECORDED: elsewhere a block has to run, but its text may differ. After a
change of outputs or settings, write pages, settings.md, labs.toml's comments and the README's line
counts anew, and read the diff:

    LABS_README=1 uv run pytest -n 0 -m "" tests/test_readme.py
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from kit import WAIT_S, invoke, program

import labs
import labs_flags
import labs_lookup

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINKING = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
ON_ANY_MODEL = ("vendoring.md",)  # pages whose blocks do not load a model
REWRITE = os.environ.get("LABS_README") == "1"
BIN = Path(sys.executable).parent
HOST = "localhost:8000"  # in the pages; the server of the tests takes a free port
RECORDED = ("bf16 on AVX512", "fp32 on AVX2")  # the shown texts are those of both

# What differs from run to run, and what the pages show in its place.
VARIES = (
    (r"http://127\.0\.0\.1:\d+", "http://127.0.0.1:8000"),
    (r"ready after [\d.]+ s \(.*\)", "ready after … s (cpu, bf16, 64 rows)"),
    (r"in [\d.]+ s, [\d.]+ tokens/s", "in … s, … tokens/s"),
    (r'("(?:load|prefill|decode|tokens_per|queue)_s":)[^,}]+', r"\1…"),
    (r'("fingerprint":)\{.*?"prompt_sha256":"\w+"\}', r"\1{…}"),
    (r'("id":)"[^"]+"', r'\1"…"'),
    (r"(finish_reason='\w+'), .*\)", r"\1, …)"),  # the other fields of Done
    (r"(0\.\d)\d{3,}", r"\1…"),  # probabilities
    (r"(-[1-9])\.\d{4,}", r"\1…"),  # and their logarithms
    (r'("created":)\d+', r"\1…"),
    (r'("fp_)\w+"', r'\1…"'),
)

# Blocks that are not run, by their first lines, and why.
UNTAGGED = {
    'pip install uv && uv run labs-gen --prompt "Hello! Who are you?"': "network; .ci/run",
    "python3 -m venv .venv && . .venv/bin/activate": "network",
    "[[tool.mypy.overrides]]": "test_examples.py checks with it",
    "labs-gen chat ": "needs a terminal",
    "labs-gen models ": "network; tests/test_stock.py",
    "$ labs-gen chat ": "needs a terminal; test_chat.py types it",
    "# with a model that calls tools": "no package has one; test_tools.py",
    "curl -s localhost:8000/v1/chat/completions -H": "the same",
    'labs-gen "Name three rivers."': "answers are long",
    **dict.fromkeys(
        ("mkdir -p ~/.local/share/bash", "[Service]", "location / {"), "changes the system"
    ),
    **dict.fromkeys(('default_model = "small"', "[guard]"), "names models that are not there"),
    **dict.fromkeys(("[models.minilm]", "[models.poems]"), "names models that are not there"),
    "curl -s localhost:8000/v1/embeddings": "needs these models; test_vectors.py",
    "pip install 'labs-gen[ray]'": "needs a cluster",
    **dict.fromkeys(('model = "NAME"', '{"provider"'), "needs Codex or opencode"),
    "export ANTHROPIC_BASE_URL": "needs Claude Code",
    "lm_eval --model local-completions": "needs lm-evaluation-harness, of 600 MB",
    "# ~/.continue/config.yaml": "needs Continue",
    **dict.fromkeys(("docker build", "docker run", "docker compose"), "needs Docker"),
}


class Block(NamedTuple):
    """language: of the fence; runs: whether tagged; output: of the `text` block below, if any."""

    page: Path
    language: str
    runs: bool
    text: str
    output: str | None


FENCE = re.compile(
    r"^```(\w+)( run)?\n(.*?)^```$(?:\n\n^```text\n(.*?)^```$)?", re.MULTILINE | re.DOTALL
)


def blocks(page: Path) -> list[Block]:
    found = FENCE.finditer(page.read_text(encoding="utf-8"))
    return [Block(page, each[1], bool(each[2]), each[3], each[4]) for each in found]


def tagged(page: Path) -> list[Block]:
    return [block for block in blocks(page) if block.runs]


def marked(page: Path) -> Any:
    marks = () if page.name in ("README.md", *ON_ANY_MODEL) else pytest.mark.real
    return pytest.param(page, marks=marks, id=page.name)


def replace(page: Path, old: str, new: str) -> None:
    text = page.read_text(encoding="utf-8")
    assert text.count(old) == 1, old
    page.write_text(text.replace(old, new), encoding="utf-8")


def as_shown(output: str) -> str:
    for pattern, shown in VARIES:
        output = re.sub(pattern, shown, output)
    return output if output.endswith("\n") or not output else f"{output}\n"


# ---------------------------------------------------------------- running the blocks


class LabsApi:
    """labs-api as a program on a free port: what it says when it is ready, and its address."""

    def __init__(self, process: Any) -> None:
        self.greeting = "".join(process.stderr.readline().decode() for _ in range(2))
        self.address = self.greeting.partition("http://")[2].partition(" ")[0]


class Place:
    """The working directory, in which the blocks of one page run, and a module of their names."""

    def __init__(self, serving: Callable[[], LabsApi]) -> None:
        self.module = types.ModuleType("readme")
        self.serving = serving

    def output(self, block: Block) -> str:
        run = self.run_python if block.language == "python" else self.run_console
        return run(block.text)

    def run_python(self, code: str) -> str:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile(self.local(code), "README.md", "exec"), vars(self.module))
        return as_shown(printed.getvalue())

    def run_console(self, text: str) -> str:
        """Return the commands of a transcript, each followed by what it prints now."""
        return "".join(f"$ {each}\n{as_shown(self.shell(each))}" for each in commands(text))

    def shell(self, command: str) -> str:
        if command == "labs-api":
            return self.serving().greeting
        if found := re.fullmatch(r"(?:([^|]*) \| )?labs-gen( [^|]*)?", command, re.DOTALL):
            typed = self.bash(found[1]) if found[1] else None
            words = shlex.split(found[2] or "", comments=True)  # in this process, with its model
            return str(invoke(*words, input=typed).output)
        return self.bash(self.local(command))

    def bash(self, command: str) -> str:
        environment = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
        streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        words = ["bash", "-c", command]
        return subprocess.run(words, env=environment, text=True, timeout=60, **streams).stdout

    def local(self, text: str) -> str:
        """Return the text with the address of the server, which the first one to need it starts."""
        return text.replace(HOST, self.serving().address) if HOST in text else text


def commands(text: str) -> Iterator[str]:
    r"""Yield the commands of a transcript: after `$ `, on while lines end in \, or to a <<'END'."""
    lines = iter(text.splitlines())
    for line in lines:
        if not line.startswith("$ "):
            continue
        command = line[2:]
        while command.endswith("\\") or ("<<'END'" in command and not command.endswith("\nEND")):
            command += "\n" + next(lines)
        yield command


@pytest.fixture(scope="module")
def serving():
    """Return a function that returns the server, which the first block to need it starts."""
    kept = {"CACHE_DIR": os.environ["LABS_CACHE_DIR"]} if "LABS_CACHE_DIR" in os.environ else {}
    with contextlib.ExitStack() as stack:

        @functools.cache
        def started() -> LabsApi:
            process = stack.enter_context(program(**kept))
            stack.callback(process.wait, WAIT_S)
            stack.callback(process.terminate)
            return LabsApi(process)

        yield started


@pytest.fixture
def place(folder, serving, no_variables, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "localhost,127.0.0.1")
    made = Place(serving)
    monkeypatch.setitem(sys.modules, "readme", made.module)
    return made


def recorded_here() -> bool:
    model = labs.load_model(labs.load_config(env={}))
    return f"{model.dtype} on {model.fingerprint.hardware.partition(',')[0]}" in RECORDED


@pytest.mark.parametrize("page", [marked(page) for page in PAGES if tagged(page)])
def test_the_tagged_blocks_of_a_page_print_what_it_shows(page, place):
    if any("curl" in block.text for block in tagged(page)) and not shutil.which("curl"):
        pytest.skip("curl is not installed")
    unlike = False
    for block in tagged(page):
        output = place.output(block)
        before = f"```{block.language} run\n{block.text}```"
        after, shown = f"```console run\n{output}```", block.text
        if block.language == "python":
            shown = block.output or ""
            after = f"{before}\n\n```text\n{output}```"
            before = f"{before}\n\n```text\n{shown}```" if block.output is not None else before
        if REWRITE and output != shown:
            replace(page, before, after)
        elif output != shown and page.name not in ON_ANY_MODEL and not recorded_here():
            assert output.count("\n$ ") == shown.count("\n$ ")
            unlike = True
        else:
            assert output == shown
    if unlike:
        pytest.skip(f"the texts were recorded on {' and '.join(RECORDED)}; here they differ")


def test_each_block_is_run_or_has_a_reason_not_to():
    first = [
        block.text.partition("\n")[0] for page in PAGES for block in blocks(page) if not block.runs
    ]
    known = {line: [start for start in UNTAGGED if line.startswith(start)] for line in first}
    assert [line for line, starts in known.items() if not starts] == []
    assert {start for starts in known.values() for start in starts} == set(UNTAGGED)


# ---------------------------------------------------------------- settings.md and labs.toml


def settings_tables() -> str:
    """Return all settings in Markdown: a table for each section, a row for each setting."""
    lines: list[str] = []
    section = ""
    for each in labs.settings():
        if each.section != section:
            section = each.section
            lines += ["", f"## [{section}]", ""]
            lines += ["| key | variable | flag | type | default | bounds | what it does |"]
            lines += ["|---|---|---|---|---|---|---|"]
        kind, limits = labs_lookup.bounds(each.type)
        default = "" if each.default in (None, (), {}) else f"`{json.dumps(each.default)}`"
        names = "<br>".join(f"`{flag}`" for flag in labs_flags.flags_of(each))
        cells = (f"`{each.field}`", f"`{each.environment}`", names, kind, default, limits)
        lines.append(f"| {' | '.join((*cells, each.description))} |")
    return "\n".join(lines).strip()


def test_settings_md_shows_the_settings_of_the_structs():
    page = ROOT / "docs" / "settings.md"
    text = page.read_text(encoding="utf-8")
    (shown,) = re.findall(r"<!-- settings.* -->\n(.*)\n?<!-- end of settings -->", text, re.DOTALL)
    if REWRITE and shown.strip() != settings_tables():
        start = text.index("<!-- end of settings -->") - len(shown)
        whole = f"{text[:start]}{settings_tables()}\n{text[start + len(shown) :]}"
        page.write_text(whole, encoding="utf-8")
    else:
        assert shown.strip() == settings_tables()


def test_labs_toml_describes_each_setting_in_the_words_of_its_struct():
    file = ROOT / "labs.toml"
    section, comment, lines = "", list[str](), list[str]()
    described = {(each.section, each.field): each.description for each in labs.settings()}
    for line in file.read_text(encoding="utf-8").splitlines():
        if found := re.fullmatch(r"\[(\w+)\]", line):
            section = found[1]
        key = re.match(r"# (\w+) = ", line)
        if key and (section, key[1]) in described:
            text = described[(section, key[1])]
            comment = [f"# {part}" for part in textwrap.wrap(text, 98)]
        if line.startswith("# ") and not key:
            comment.append(line)
            continue
        lines += [*comment, line]
        comment = []
    expected = "\n".join([*lines, *comment]) + "\n"
    if REWRITE:
        file.write_text(expected, encoding="utf-8")
    assert file.read_text(encoding="utf-8") == expected


# ---------------------------------------------------------------- what stands in the pages


def test_the_budgets_of_contributing_are_those_of_the_tests():
    tests = (ROOT / "test_labs.py").read_text(encoding="utf-8")
    rooms = re.search(r"^ROOMS = \{(.*?)^\}", tests, re.MULTILINE | re.DOTALL)
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    shown = dict(re.findall(r"^\| `(\w+\.py)` .* \| (\d+) \|$", text, re.M))
    assert shown == dict(re.findall(r'"(\w+\.py)": \(\s*(\d+)', rooms[1] if rooms else ""))


def test_the_readme_is_one_short_page_and_links_to_every_other_which_are_short_too():
    written = {page.name: page.read_text(encoding="utf-8") for page in PAGES}
    text = written.pop("README.md")
    assert len(text.splitlines()) <= 150
    assert len(text.encode()) <= 10_240
    assert max(map(len, text.splitlines())) <= 400
    assert [name for name in written if f"(docs/{name}" not in text] == []
    del written["models.md"]  # a table with a row for each model type
    assert [name for name, text in written.items() if text.count("\n") > 200] == []


def test_the_readme_counts_the_lines_of_the_core_rounded_up_to_tens():
    page = ROOT / "README.md"
    rows = re.findall(
        r"^(\| .* \| \[(\w+\.py)\]\(\w+\.py\) \| )([\d,]+)( \|.*)$", page.read_text(), re.M
    )
    assert len(rows) == 4
    for start, name, shown, rest in rows:
        lines = len((ROOT / name).read_text(encoding="utf-8").splitlines())
        counted = f"{-(-lines // 10) * 10:,}"
        if REWRITE and counted != shown:
            replace(page, f"{start}{shown}{rest}", f"{start}{counted}{rest}")
        else:
            assert (name, shown) == (name, counted)


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.M)
    headings = [re.sub(r"[`*]|\]\(.*?\)", "", each) for each in re.findall(r"^#+ (.*)", text, re.M)]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", LINKING, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.M)
    for target in re.findall(r'\]\(([^)\s]+)\)|src="([^"]+)"', text):
        path, _, anchor = "".join(target).partition("#")
        if not path.startswith("http"):
            file = page.parent / path if path else page
            assert file.exists(), target
            assert not anchor or anchor in anchors(file), target


# ---------------------------------------------------------------- Docker


def test_the_image_runs_as_a_user_checks_readiness_and_holds_no_secret():
    text = (ROOT / "docs" / "Dockerfile").read_text(encoding="utf-8")
    assert re.search(r"^USER [1-9]\d*$", text, re.M)
    assert re.search(r"^HEALTHCHECK .*\\\n.*/readyz", text, re.M)
    assert not re.search(r"^(?:ARG|ENV|COPY).*(?:KEY|TOKEN|\.env\b)", text, re.M)
    copied = re.findall(r"^COPY (?!--from)(.*) \./$", text, re.M)
    sent = (ROOT / "docs" / "Dockerfile.dockerignore").read_text(encoding="utf-8")
    first, *names = [line for line in sent.splitlines() if not line.startswith("#")]
    assert first == "*"
    assert [" ".join(name.removeprefix("!") for name in names)] == copied


def test_the_compose_file_takes_keys_from_a_secret_and_bounds_what_it_starts():
    spec = yaml.safe_load((ROOT / "docs" / "compose.yaml").read_text(encoding="utf-8"))
    service = spec["services"]["labs-api"]
    assert service["environment"]["LABS_SERVER_API_KEYS_FILE"] == "/run/secrets/api_keys"
    assert service["secrets"] == list(spec["secrets"])
    assert service["read_only"]
    assert all(name in service for name in ("mem_limit", "cpus", "pids_limit"))
    assert "/readyz" in service["healthcheck"]["test"][-1]
    known = {setting.environment for setting in labs.settings()}
    assert set(service["environment"]) <= known
    volumes = [volume.partition(":")[0] for volume in service["volumes"]]
    assert volumes == list(spec["volumes"])
