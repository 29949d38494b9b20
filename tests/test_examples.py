# SPDX-License-Identifier: Apache-2.0
"""The files in examples/, run with a tiny model, and the typed program of a user of the wheel."""

from __future__ import annotations

import asyncio
import contextlib
import csv
import json
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import threading
import types
from pathlib import Path
from typing import Any

import httpx
import kit
import pytest
from kit import ROOT
from waitress import wasyncore
from werkzeug.test import Client

import labs
import labs_engine
import labs_serve

EXAMPLES = ROOT / "examples"
SAYS_A = {"LABS_LOGIT_BIAS": '{"65": 100}', "LABS_TEMPERATURE": "0", "LABS_MAX_NEW_TOKENS": "3"}


@pytest.fixture
def settings(tiny_folder, monkeypatch):
    for name, value in (SAYS_A | {"LABS_MODEL": str(tiny_folder)}).items():
        monkeypatch.setenv(name, value)


def run(name: str, **globals: Any) -> dict[str, Any]:
    return runpy.run_path(str(EXAMPLES / name), globals, run_name="__main__")


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_an_example_has_at_most_31_lines_and_is_linked_from_a_page(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 31
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    assert any(f"examples/{path.name})" in page.read_text(encoding="utf-8") for page in pages)


def test_the_chat_streams_remembers_and_ends_at_ctrl_d(settings, capsys, monkeypatch):
    lines, writes = iter(["Hi", "", "  ", "And?"]), []
    inputs, build = [], labs.build_inputs

    def question(prompt: str) -> str:
        if (line := next(lines, None)) is None:
            raise EOFError  # Ctrl-D
        return line

    def spy(model: Any, **request: Any) -> Any:
        inputs.append([each["content"] for each in request["messages"]])
        return build(model, **request)

    monkeypatch.setattr(labs, "build_inputs", spy)
    run("chat_loop.py", input=question, print=lambda *words, **_: writes.append("".join(words)))
    assert inputs == [["Hi"], ["Hi", "AAA", "And?"]]
    assert writes == [*"AAA", "", *"AAA", "", ""]


@pytest.fixture
def batch(monkeypatch):
    """Return a function that runs the example on a CSV file and returns the rows it writes."""

    def run_on(text, *words):
        Path("in.csv").write_text(text, encoding="utf-8-sig", newline="")
        monkeypatch.setattr(sys, "argv", ["csv_batch.py", "in.csv", *words])
        run("csv_batch.py")
        with Path("out.csv").open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))

    return run_on


def test_a_csv_file_gets_a_column_of_answers_and_a_failed_row_harms_no_other(settings, batch):
    lines = f'id,prompt\r\n1,Hi\r\n2,\r\n\r\n3,"Count,\nplease."\r\n4,{"x" * 50_000}\r\n'
    *rows, long = batch(lines, "out.csv", "prompt")
    expected = [("1", "Hi", "AAA"), ("2", "", ""), ("3", "Count,\nplease.", "AAA")]
    assert [(*row.values(),) for row in rows] == expected
    assert [*long] == ["id", "prompt", "answer"]
    assert long["answer"].startswith("error: ")


@pytest.mark.parametrize(
    ("text", "words", "told"),
    [
        ("id,question\n1,Hi\n", "out.csv prompt", "has no column 'prompt': it has id, question"),
        ("", "out.csv prompt", "has no column 'prompt': it has none"),
        ("prompt\nHello, you?\n", "out.csv prompt", "has a row with more cells than columns: "),
        ("", "", "csv_batch.py IN.csv OUT.csv COLUMN"),
    ],
)
def test_a_csv_file_that_cannot_be_used_is_refused_before_the_model_is_loaded(
    text, words, told, batch, monkeypatch
):
    monkeypatch.setattr(labs, "load_model", lambda _: pytest.fail("loaded"))
    with pytest.raises(SystemExit, match=told):
        batch(text, *words.split())
    assert not Path("out.csv").exists()


class Web:
    """Stands for FastAPI, which is not installed with the tests: it keeps what is registered."""

    def __init__(self) -> None:
        self.found: dict[Any, Any] = {}

    def register(self, key: Any) -> Any:
        return lambda function: self.found.setdefault(key, function)

    get = exception_handler = register


@pytest.fixture
def fastapi_app(settings, monkeypatch):
    """Run the example as a module that a server imports; return what it registers."""
    whole = lambda *given, **words: given  # noqa: E731
    answers = {"JSONResponse": whole, "StreamingResponse": whole}
    modules = {"fastapi": {"FastAPI": Web, "Request": object}, "fastapi.responses": answers}
    for name, words in modules.items():
        monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(**words))
    monkeypatch.setenv("LABS_MAX_NEW_TOKENS", "300")
    names = runpy.run_path(str(EXAMPLES / "fastapi_app.py"))
    yield names["app"].found | names
    names["engine"].close()


def test_fastapi_streams_an_answer_and_turns_refusals_into_statuses(fastapi_app):
    async def work() -> list[str]:
        with pytest.raises(labs.InputError) as refused:
            await fastapi_app["/ask"]("")
        refuse = fastapi_app[labs.LabsError]
        assert await refuse(None, refused.value) == ({"error": "the prompt is empty"}, 400)
        assert (await refuse(None, labs_engine.Busy("full")))[1] == 503
        (frames,) = await fastapi_app["/ask"]("Hi")
        return [frame async for frame in frames]

    *deltas, done = asyncio.run(work())
    events = kit.events_of("".join(deltas).encode())
    assert {kind for kind, _ in events} == {"Delta"}
    assert "".join(json.loads(text) for _, text in events) == "A" * 300
    assert done == 'event: Done\ndata: ""\n\n'


def test_a_client_of_fastapi_that_leaves_frees_its_row(fastapi_app):
    async def work() -> None:
        (frames,) = await fastapi_app["/ask"]("Hi")
        await anext(frames)
        await frames.aclose()

    asyncio.run(work())
    assert kit.quiet(fastapi_app["engine"])
    assert fastapi_app["engine"].status().steps < 290


@pytest.fixture(scope="module")
def mounted(tiny_folder, tmp_path_factory):
    """Run the example as a module that another server imports; return its names."""
    with contextlib.chdir(tmp_path_factory.mktemp("site")), pytest.MonkeyPatch.context() as patch:
        cached = {"LABS_MODEL": str(tiny_folder), "LABS_RESPONSE_CACHE_MAX_ENTRIES": "8"}
        for name, value in (SAYS_A | cached).items():
            patch.setenv(name, value)
        names = runpy.run_path(str(EXAMPLES / "flask_mount.py"))
    yield names
    names["engine"].close()


@pytest.fixture
def client(mounted):
    return Client(mounted["app"])


def test_flask_and_labs_share_one_engine_and_its_cache(client, mounted):
    before = mounted["engine"].status()
    answer = client.get("/ask", query_string={"question": "Hi"})
    assert (answer.status_code, answer.mimetype, answer.text) == (200, "text/plain", "AAA")
    assert client.post("/llm/generate", json={"prompt": "Hello"}).json["text"] == "AAA"
    assert mounted["engine"].status().steps - before.steps >= 4
    assert client.get("/ask?question=Hi").text == "AAA"
    hits = mounted["engine"].status().response_cache_hits
    assert hits == before.response_cache_hits + 1


def test_all_of_labs_is_under_the_prefix_and_only_there(client):
    for path in ("/llm/", "/llm/docs", "/llm/openapi.json", "/llm/health", "/llm/v1/models"):
        assert client.get(path).status_code == 200, path
        assert client.get(path.removeprefix("/llm")).status_code == 404
    assert client.get("/llm").headers["Location"] == "/llm/"  # the page's addresses need it
    assert "<title>labs</title>" in client.get("/llm", follow_redirects=True).text
    elsewhere = {"Host": "evil.example"}
    assert client.get("/llm/v1/models", headers=elsewhere).status_code == 421
    assert client.get("/ask?question=Hi", headers=elsewhere).status_code == 200


def test_errors_of_a_question_or_the_engine_become_statuses_of_flask(client, mounted, monkeypatch):
    assert client.get("/ask").status_code == 400
    empty = client.get("/ask?question=")
    assert (empty.status_code, empty.text) == (400, "the prompt is empty")
    failed = [labs.Delta("A"), labs.Failed(labs.GenerationError("nan at layer 3"))]
    monkeypatch.setattr(mounted["engine"], "submit", lambda *_: iter(failed))
    assert client.get("/ask?question=Hi").status_code == 500

    def busy(*_: Any) -> Any:
        raise labs_engine.Busy("full")

    monkeypatch.setattr(mounted["engine"], "submit", busy)
    full = client.get("/ask?question=Hi")
    assert (full.status_code, full.text, full.headers["Retry-After"]) == (503, "full", "1")


def test_the_flask_example_serves_streams_and_closes_its_engine(settings, monkeypatch):
    made, make = [], labs_serve.make_server
    monkeypatch.setattr(
        labs_serve, "make_server", lambda *given: made.append(make(*given)) or made[0]
    )
    monkeypatch.setenv("LABS_SERVER_PORT", "0")
    names: dict[str, Any] = {}
    thread = threading.Thread(target=lambda: names.update(run("flask_mount.py")), daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{kit.until(lambda: made)[0].effective_port}"
    assert httpx.get(f"{url}/ask?question=Hi").text == "AAA"
    events = httpx.post(f"{url}/llm/generate/stream", json={"prompt": "Hi"}).content
    assert "".join(text for kind, text in kit.events_of(events) if kind == "message") == "AAA"
    with contextlib.suppress(OSError):
        made[0].trigger.pull_trigger(lambda: wasyncore.close_all(made[0]._map))
    thread.join(kit.WAIT_S)
    assert names["engine"].status().closing


PROGRAM = """
import msgspec

import labs
import labs_engine
import labs_typed

class City(msgspec.Struct):
    name: str

def pieces(config: labs.Config, question: str) -> tuple[str, City, list[labs.Event]]:
    model = labs.load_model(config)
    inputs = labs.build_inputs(model, messages=[{"role": "user", "content": question}])
    text = labs.generate(model, inputs, config.generation, temperature=0.5).text
    for event in labs.stream_generate(model, inputs, labs.Generation(max_new_tokens=5)):
        text += event.text if isinstance(event, labs.Delta) else event.finish_reason
    city = labs_typed.generate_as(model, inputs, City)
    return text, city, list(labs_engine.Engine(model).submit(inputs, labs.Generation()))
"""
MISTAKES = """
import labs

labs.generate(labs.load_model(labs.load_config()), 3)
labs.Generation(max_new_tokens="many")
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Install the wheel into a new environment that also sees the packages of this one."""
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
    """Check a program as its author does, with the settings of the docs; return the lines."""
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    (setting,) = re.findall(r"```toml\n(\[\[tool.mypy.*?)```", text, re.DOTALL)
    kit.write("pyproject.toml", setting)
    kit.write("program.py", code)
    options = ["--strict", "--python-executable", installed / "bin" / "python"]
    command = [sys.executable, "-m", "mypy", *options, "--cache-dir", installed / "cache"]
    done = subprocess.run([*command, "program.py"], capture_output=True, text=True)
    assert done.stderr == ""
    return done.stdout.splitlines()


@pytest.mark.build
def test_mypy_accepts_a_users_program_and_finds_its_mistakes(installed):
    assert mypy(PROGRAM, installed) == ["Success: no issues found in 1 source file"]
    generate, generation, _ = mypy(MISTAKES, installed)
    assert 'Argument 2 to "generate" has incompatible type "int"; expected "Inputs"' in generate
    assert 'Argument "max_new_tokens" to "Generation" has incompatible type "str"' in generation
    code = "import labs; print(labs.__file__, labs.__version__)"
    done = subprocess.run([installed / "bin/python", "-c", code], capture_output=True, text=True)
    assert done.stdout.startswith(str(installed))
    assert done.stdout.split()[1] == labs.__version__
