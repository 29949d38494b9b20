# SPDX-License-Identifier: Apache-2.0
"""Tests of what users begin with: the files in examples/, and a typed program of their own."""

from __future__ import annotations

import contextlib
import csv
import os
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import kit
import pytest
from werkzeug.test import Client

import labs
import labs_engine

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
CAPITAL = "What is the capital of France?"
SAYS_A = {"LABS_LOGIT_BIAS": '{"65": 100}', "LABS_TEMPERATURE": "0", "LABS_MAX_NEW_TOKENS": "3"}


def example(name: str, *arguments: str, **settings: str) -> dict[str, Any]:
    """Return how to run an example: the words of its command and its surroundings."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("LABS_")}
    cache = {k: v for k, v in os.environ.items() if k == "LABS_CACHE_DIR"}
    environment = kept | cache | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | settings
    return {"args": [sys.executable, EXAMPLES / name, *arguments], "env": environment}


def run(name: str, *arguments: str, input: str = "", **settings: str) -> Any:
    command = example(name, *arguments, **settings)
    return subprocess.run(**command, input=input, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("path", sorted(EXAMPLES.iterdir()), ids=lambda path: path.name)
def test_an_example_has_thirty_lines_at_most_and_the_readme_links_to_it(path: Path) -> None:
    if path.is_file():
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 31
        assert f"(examples/{path.name})" in (ROOT / "README.md").read_text(encoding="utf-8")


# ---------------------------------------------------------------- chat_loop.py


def test_the_chat_remembers_passes_over_empty_lines_and_ends_with_its_input() -> None:
    done = run("chat_loop.py", input=f"{CAPITAL}\n\n  \nAnd of Germany?\n", LABS_TEMPERATURE="0")
    answers = ["The capital of France is Paris.\n", "", "", "The capital of Germany is Berlin.\n"]
    assert done.stdout == "".join(f"> {answer}" for answer in answers) + "> \n"
    assert (done.returncode, done.stderr) == (0, "")


def test_the_chat_on_a_terminal_streams_and_ends_at_ctrl_d(tiny_folder: Path) -> None:
    pty = pytest.importorskip("pty")
    terminal, child = pty.openpty()
    many = SAYS_A | {"LABS_MODEL": str(tiny_folder), "LABS_MAX_NEW_TOKENS": "3000"}
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), child)
    with subprocess.Popen(**example("chat_loop.py", **many), **streams) as process:
        os.close(child)
        kit.read_until(terminal, "> ")
        os.write(terminal, b"Hi\n")
        seen = kit.read_until(terminal, "AAA")
        assert seen.count("A") < 3000
        assert "Traceback" not in kit.read_until(terminal, "> ", seen)
        os.write(terminal, b"\x04")
        assert process.wait(timeout=60) == 0
    os.close(terminal)


# ---------------------------------------------------------------- csv_batch.py


def test_a_csv_file_gets_a_column_of_answers_and_a_row_that_fails_harms_no_other(
    folder: Path,
) -> None:
    lines = f'id,prompt\r\n1,{CAPITAL}\r\n2,\r\n\r\n3,"Count,\nplease."\r\n4,{"x" * 50_000}\r\n'
    (folder / "in.csv").write_text(lines, encoding="utf-8-sig", newline="")
    settings = {"LABS_TEMPERATURE": "0", "LABS_MAX_NEW_TOKENS": "20"}
    done = run("csv_batch.py", "in.csv", "out.csv", "prompt", **settings)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    with (folder / "out.csv").open(newline="", encoding="utf-8") as file:
        first, empty, cell, long = csv.DictReader(file)
    assert first == {"id": "1", "prompt": CAPITAL, "answer": "The capital of France is Paris."}
    assert empty == {"id": "2", "prompt": "", "answer": ""}
    assert (cell["id"], cell["prompt"]) == ("3", "Count,\nplease.")
    assert len(cell["answer"]) > 10
    assert long["answer"].startswith("error: ")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("id,question\n1,Hi\n", "in.csv has no column 'prompt': it has id, question\n"),
        ("", "in.csv has no column 'prompt': it has none\n"),
        ("prompt\nHello, who are you?\n", "in.csv has a row with more cells than columns: "),
    ],
)
def test_a_csv_file_that_does_not_fit_is_refused_before_the_model_is_loaded(
    text: str, told: str, folder: Path
) -> None:
    (folder / "in.csv").write_text(text, encoding="utf-8")
    done = run("csv_batch.py", "in.csv", "out.csv", "prompt", LABS_MODEL="nowhere/to-be-found")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(told)
    assert not (folder / "out.csv").exists()


def test_a_csv_example_without_its_three_words_tells_its_usage() -> None:
    assert run("csv_batch.py", "in.csv").stderr.endswith("csv_batch.py IN.csv OUT.csv COLUMN\n")


# ---------------------------------------------------------------- flask_mount.py


@pytest.fixture(scope="module")
def mounted(
    tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Any]]:
    """Run the example as a module that another server imports; return its names."""
    with contextlib.chdir(tmp_path_factory.mktemp("site")), pytest.MonkeyPatch.context() as patch:
        keeping = {"LABS_MODEL": str(tiny_folder), "LABS_RESPONSE_CACHE_MAX_ENTRIES": "8"}
        for name, value in (SAYS_A | keeping).items():
            patch.setenv(name, value)
        names = runpy.run_path(str(EXAMPLES / "flask_mount.py"))
    yield names
    names["engine"].close()


@pytest.fixture
def client(mounted: dict[str, Any]) -> Client:
    return Client(mounted["app"])


def test_flask_and_labs_answer_side_by_side_from_one_engine(
    client: Client, mounted: dict[str, Any]
) -> None:
    before = mounted["engine"].status().steps
    asked = client.get("/ask", query_string={"question": "Hi"})
    assert (asked.status_code, asked.mimetype, asked.text) == (200, "text/plain", "AAA")
    assert mounted["engine"].status().steps - before >= 2
    answer = client.post("/llm/generate", json={"prompt": "Hello"})
    assert answer.json["text"] == "AAA"
    assert mounted["engine"].status().steps - before >= 4


def test_the_prefix_holds_all_of_labs_and_nothing_else_does(client: Client) -> None:
    for path in ("/llm/", "/llm/docs", "/llm/openapi.json", "/llm/health", "/llm/v1/models"):
        assert client.get(path).status_code == 200, path
        assert client.get(path.removeprefix("/llm")).status_code == 404


def test_the_page_asked_for_without_its_slash_is_sent_to_where_its_addresses_hold(
    client: Client,
) -> None:
    assert client.get("/llm").headers["Location"] == "/llm/"
    assert "<title>labs</title>" in client.get("/llm", follow_redirects=True).text


def test_a_host_that_labs_does_not_serve_is_refused_under_the_prefix_only(client: Client) -> None:
    elsewhere = {"Host": "evil.example"}
    assert client.get("/llm/v1/models", headers=elsewhere).status_code == 421
    assert client.get("/ask?question=Hi", headers=elsewhere).status_code == 200


def test_wrong_questions_to_flask_are_client_errors(client: Client) -> None:
    assert client.get("/ask").status_code == 400
    empty = client.get("/ask?question=")
    assert (empty.status_code, empty.text) == (400, "the prompt is empty")


def test_what_the_engine_cannot_do_is_no_answer_of_flask(
    client: Client, mounted: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = [labs.Delta("A"), labs.Failed(labs.GenerationError("nan at layer 3"))]
    monkeypatch.setattr(mounted["engine"], "submit", lambda *_: iter(failed))
    assert client.get("/ask?question=Hi").status_code == 500
    monkeypatch.setattr(mounted["engine"], "submit", busy)
    full = client.get("/ask?question=Hi")
    assert (full.status_code, full.text, full.headers["Retry-After"]) == (503, "full", "1")


def busy(*_: Any) -> Any:
    raise labs_engine.Busy("full")


def test_flask_and_labs_keep_answers_as_they_are_set_to(
    client: Client, mounted: dict[str, Any]
) -> None:
    before = mounted["engine"].status().response_cache_hits
    assert [client.get("/ask?question=Twice").text for _ in range(2)] == ["AAA"] * 2
    assert mounted["engine"].status().response_cache_hits == before + 1


def test_the_flask_example_serves_streams_and_ends_at_ctrl_c(tiny_folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        host, port = free.getsockname()
    settings = SAYS_A | {"LABS_MODEL": str(tiny_folder), "LABS_SERVER_PORT": str(port)}
    command = example("flask_mount.py", **settings)
    heeding = {"preexec_fn": kit.heed_sigint, "stderr": subprocess.PIPE}
    with subprocess.Popen(**command, **heeding) as process:
        try:
            while process.poll() is None and not listens(host, port):
                time.sleep(0.1)
            asked = httpx.get(f"http://{host}:{port}/ask?question=Hi").text
            url = f"http://{host}:{port}/llm/generate/stream"
            stream = httpx.post(url, json={"prompt": "Hi"}).text
            process.send_signal(signal.SIGINT)
            assert process.communicate(timeout=60)[1] == b""
        finally:
            process.kill()
    assert (asked, process.returncode) == ("AAA", 0)
    assert "".join(re.findall("^data: (A+)$", stream, re.MULTILINE)) == "AAA"


def listens(host: str, port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex((host, port)) == 0


# ---------------------------------------------------------------- a typed program of a user


PROGRAM = """
from collections.abc import Iterator

import msgspec

import labs
import labs_engine
import labs_typed


class City(msgspec.Struct):
    name: str


def answer(config: labs.Config, question: str) -> str:
    model = labs.load_model(config)
    inputs = labs.build_inputs(model, messages=[{"role": "user", "content": question}])
    return labs.generate(model, inputs, config.generation, temperature=0.5).text


def pieces(model: labs.Model, inputs: labs.Inputs) -> Iterator[str]:
    for event in labs.stream_generate(model, inputs, labs.Generation(max_new_tokens=5)):
        yield event.text if isinstance(event, labs.Delta) else event.finish_reason


def city(model: labs.Model, inputs: labs.Inputs) -> City:
    return labs_typed.generate_as(model, inputs, City)


def share(model: labs.Model, inputs: labs.Inputs) -> list[labs.Event]:
    return list(labs_engine.Engine(model).submit(inputs, labs.Generation()))
"""
MISTAKES = """
import labs

model = labs.load_model(labs.load_config())
labs.generate(model, 3)
labs.Generation(max_new_tokens="many")
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the wheel into an environment of its own, beside the packages of this one."""
    if (uv := shutil.which("uv")) is None:
        pytest.skip("uv is not installed")
    place = tmp_path_factory.mktemp("installed")
    venv = place / "venv"
    subprocess.run([uv, "build", "--quiet", "--wheel", "--out-dir", place, ROOT], check=True)
    subprocess.run([uv, "venv", "--quiet", "--python", sys.executable, venv], check=True)
    install = [uv, "pip", "install", "--quiet", "--no-deps", "--python", venv]
    subprocess.run([*install, *place.glob("*.whl")], check=True)
    (packages,) = venv.glob("lib/*/site-packages")
    (packages / "these.pth").write_text(sysconfig.get_path("purelib"), encoding="utf-8")
    return venv


def mypy(code: str, installed: Path) -> list[str]:
    """Check a program as its author does, with what the README says to set; return the lines."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (setting,) = re.findall(r"```toml\n(\[\[tool.mypy.*?)```", readme, re.DOTALL)
    kit.write("pyproject.toml", setting)
    kit.write("program.py", code)
    options = ["--strict", "--python-executable", installed / "bin" / "python"]
    command = [sys.executable, "-m", "mypy", *options, "--cache-dir", installed / "cache"]
    done = subprocess.run([*command, "program.py"], capture_output=True, text=True)
    assert done.stderr == ""
    return done.stdout.splitlines()


def test_a_users_program_passes_mypy_strict(installed: Path) -> None:
    assert mypy(PROGRAM, installed) == ["Success: no issues found in 1 source file"]


def test_a_users_mistakes_are_found_by_mypy(installed: Path) -> None:
    generate, generation, _ = mypy(MISTAKES, installed)
    assert 'Argument 2 to "generate" has incompatible type "int"; expected "Inputs"' in generate
    assert 'Argument "max_new_tokens" to "Generation" has incompatible type "str"' in generation


def test_the_installed_modules_are_those_of_the_wheel(installed: Path) -> None:
    code = "import labs; print(labs.__file__, labs.__version__)"
    done = subprocess.run(
        [installed / "bin" / "python", "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith(str(installed))
    assert done.stdout.split()[1] == labs.__version__
