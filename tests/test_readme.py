# SPDX-License-Identifier: Apache-2.0
"""README.md holds: blocks tagged `run` are run, in order, and must show what they then say.

The text that the default model generates is compared too, letter by letter, on machines like the
one where it was recorded; elsewhere those tests are skipped. After a change that is meant to change
outputs or settings, write them anew and read the diff:

    LABS_README=1 uv run pytest test_labs_readme.py
"""

from __future__ import annotations

import contextlib
import gc
import io
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from click.testing import CliRunner

import labs
import labs_cli

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
REWRITE = os.environ.get("LABS_README") == "1"
BIN = Path(sys.executable).parent
HOST = "localhost:8000"  # what the README asks; the test's server has a free port

RECORDED = "bf16 on AVX512"  # where else text is generated it may differ

# What differs from run to run, each by what the README shows in its place.
VARIES = (
    (r"http://127\.0\.0\.1:\d+", "http://127.0.0.1:8000"),
    (r"ready after [\d.]+ s", "ready after … s"),
    (r"in [\d.]+ s, [\d.]+ tokens/s", "in … s, … tokens/s"),
    (r'("(?:load|prefill|decode|tokens_per|queue)_s":)[^,}]+', r"\1…"),
    (r'("fingerprint":)\{.*?"prompt_sha256":"\w+"\}', r"\1{…}"),
    (r'("id":)"[^"]+"', r'\1"…"'),
    (r"(finish_reason='\w+'), .*\)", r"\1, …)"),  # Done with all that it tells
    (r"(0\.\d{3})\d{5,}", r"\1…"),
)

# Blocks that are not run, by their first lines.
UNTAGGED = {
    'pip install uv && uv run labs-gen --prompt "Hello! Who are you?"': "network; .ci/run",
    "python3 -m venv .venv && . .venv/bin/activate": "network",
    "[[tool.mypy.overrides]]": "test_labs_examples.py checks with it",
    "labs-gen --messages-file chat.json --temperature 0.7 --seed 1 --json": "answers are long",
    'default_model = "small"': "names models that are not there",
    "[guard]": "names a classifier that is not there",
    "location / {": "nginx",
    "[Service]": "changes the system",
    "pip install 'labs-gen[ray]'": "needs a cluster",
}


class Block(NamedTuple):
    """language: of the fence; runs: whether tagged; output: of the `text` block below, if any."""

    language: str
    runs: bool
    text: str
    output: str | None


FENCE = re.compile(
    r"^```(\w+)( run)?\n(.*?)^```$(?:\n\n^```text\n(.*?)^```$)?", re.MULTILINE | re.DOTALL
)


def blocks() -> list[Block]:
    found = FENCE.finditer(README.read_text(encoding="utf-8"))
    return [Block(each[1], bool(each[2]), each[3], each[4]) for each in found]


TAGGED = [block for block in blocks() if block.runs]


def replace(old: str, new: str) -> None:
    text = README.read_text(encoding="utf-8")
    assert text.count(old) == 1, old
    README.write_text(text.replace(old, new), encoding="utf-8")


def as_shown(output: str) -> str:
    for pattern, shown in VARIES:
        output = re.sub(pattern, shown, output)
    return output if output.endswith("\n") or not output else f"{output}\n"


# Running


class Place:
    """A folder in which the blocks run, a module of their names, and a server once it is asked."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.module = types.ModuleType("readme")
        self.server: subprocess.Popen[str] | None = None
        self.greeting = self.address = ""
        self.outputs: list[Any] = []  # of the blocks that ran

    def output(self, index: int) -> Any:
        """Run what has not been run up to there: a block may use what earlier ones left."""
        for block in TAGGED[len(self.outputs) : index + 1]:
            run = self.run_python if block.language == "python" else self.run_console
            self.outputs.append(run(block.text))
        return self.outputs[index]

    def run_python(self, code: str) -> str:
        with contextlib.redirect_stdout(io.StringIO()) as told:
            exec(compile(self.local(code), "README.md", "exec"), vars(self.module))
        return as_shown(told.getvalue())

    def run_console(self, text: str) -> str:
        """Return the commands of a transcript, with what they say now."""
        shown = ""
        for command in commands(text):
            shown += f"$ {command}\n{as_shown(self.shell(command))}"
        return shown

    def shell(self, command: str) -> str:
        if command == "labs-api":
            self.local(HOST)
            return self.greeting
        if found := re.fullmatch(r"(?:([^|]*) \| )?labs-gen (-[^|]*)", command, re.DOTALL):
            said = self.bash(found[1]) if found[1] else None
            return self.labs_gen(shlex.split(found[2], comments=True), said)
        return self.bash(self.local(command))

    def labs_gen(self, arguments: list[str], said: str | None) -> str:
        """Run it in this process, where the model is loaded already."""
        gen = labs_cli.make_command("labs-gen", labs_cli.run, labs_cli.OPTIONS, labs_cli.EPILOG)
        try:
            return CliRunner().invoke(gen, arguments, input=said).output
        finally:
            gc.unfreeze()

    def bash(self, command: str) -> str:
        environment = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
        told: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        return subprocess.run(
            ["bash", "-c", command], cwd=self.folder, env=environment, text=True, timeout=60, **told
        ).stdout

    def local(self, text: str) -> str:
        """Return it with the address of the server, which is started for the first who asks."""
        if HOST in text and self.server is None:
            self.server = subprocess.Popen(
                [BIN / "labs-api", "--port", "0"],
                cwd=self.folder,
                stderr=subprocess.PIPE,
                text=True,
            )
            for line in self.server.stderr or ():
                self.greeting += line
                if "ready after" in line:
                    break
            self.address = re.search(r"//(\S+)", self.greeting)[1]  # type: ignore[index]
        return text.replace(HOST, self.address)

    def close(self) -> None:
        if self.server:
            self.server.terminate()
            self.server.communicate(timeout=60)


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
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    made = Place(tmp_path_factory.mktemp("readme"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(made.folder)
        patch.setitem(sys.modules, "readme", made.module)
        patch.setenv("NO_PROXY", "localhost,127.0.0.1")
        for name in [name for name in os.environ if name.startswith("LABS_")]:
            if name != "LABS_CACHE_DIR":
                patch.delenv(name)
        model = labs.load_model(labs.load_config())
        here = f"{model.dtype} on {model.fingerprint.hardware.partition(',')[0]}"
        if here != RECORDED and not REWRITE:
            pytest.skip(f"the outputs were recorded in {RECORDED}, this is {here}")
        yield made
        made.close()


@pytest.mark.parametrize("index", range(len(TAGGED)))
def test_a_tagged_block_says_what_the_readme_shows(index: int, place: Place) -> None:
    block, output = TAGGED[index], place.output(index)
    if "curl" in block.text and not shutil.which("curl"):
        pytest.skip("curl is not installed")
    before = f"```{block.language} run\n{block.text}```"
    after, shown = f"```console run\n{output}```", block.text
    if block.language == "python":
        shown = block.output or ""
        after = f"{before}\n\n```text\n{output}```"
        before = f"{before}\n\n```text\n{shown}```" if block.output is not None else before
    if REWRITE and output != shown:
        replace(before, after)
    else:
        assert output == shown


# What stands in the README


def table() -> str:
    """Write every setting, with its default and its meaning, three in a row."""
    rows = ["| setting = default | | |", "|---|---|---|"]
    for section, found in itertools.groupby(labs.settings(), lambda each: each.section):
        rows.append(f"| **[{section}]** | | |")
        cells = [cell(setting) for setting in found]
        rows += [f"| {' | '.join(cells[at : at + 3])} |" for at in range(0, len(cells), 3)]
    return "\n".join(rows)


def cell(setting: labs.Setting) -> str:
    default = "" if setting.default in (None, ()) else f" = {json.dumps(setting.default)}"
    return f"`{setting.field}{default}`<br>{setting.description}"


def test_the_table_of_settings_is_that_of_the_structs() -> None:
    text = README.read_text(encoding="utf-8")
    (shown,) = re.findall(r"<!-- settings.* -->\n(.*)\n?<!-- end of settings -->", text, re.DOTALL)
    if REWRITE and shown.strip() != table():
        start = text.index("<!-- end of settings -->") - len(shown)
        replace(f"{text[start - 4 : start]}{shown}<!-- end", f"-->\n{table()}\n<!-- end")
    else:
        assert shown.strip() == table()


def test_each_block_is_run_or_has_a_reason_not_to() -> None:
    lines = [block.text.partition("\n")[0] for block in blocks() if not block.runs]
    told = {line for line in lines if any(line.startswith(known) for known in UNTAGGED)}
    assert set(lines) == told
    assert len(told) == len(UNTAGGED)


def test_the_budgets_of_contributing_are_those_of_the_tests() -> None:
    tests = (ROOT / "test_labs.py").read_text(encoding="utf-8")
    rooms = re.search(r"^ROOMS = \{(.*?)^\}", tests, re.MULTILINE | re.DOTALL)
    told = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    shown = dict(re.findall(r"^\| `(\w+\.py)` .* \| (\d+) \|$", told, re.M))
    assert shown == dict(re.findall(r'"(\w+\.py)": \(\s*(\d+)', rooms[1] if rooms else ""))


def test_the_readme_can_be_read_in_one_go() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 600


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_lead_somewhere(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    headings = re.findall(r"^#+ (.*)", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.M)
    anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    for target in re.findall(r'\]\(([^)\s]+)\)|src="([^"]+)"', text):
        path, _, anchor = "".join(target).partition("#")
        if not path.startswith("http"):
            assert (ROOT / path).exists(), target
            assert not anchor or path or anchor in anchors, target
