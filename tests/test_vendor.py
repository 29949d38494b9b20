# SPDX-License-Identifier: Apache-2.0
"""Copies of labs: their contents, how they differ, and that they work in other projects."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipapp
from pathlib import Path
from typing import Any

import kit
import pytest
from kit import ONE_THREAD, ROOT, invoke

import labs
import labs_jsonl
import labs_request
import labs_vendor

ORIGINALS = sorted(path.name for path in ROOT.glob("labs*.py"))


def files(*rooms: str) -> list[str]:
    """Return the names of the core's files and of these rooms'."""
    core = ("labs.py", "labs_decode.py", "labs_loop.py", "labs_settings.py")
    return sorted([*core, *(f"labs_{room}.py" for room in rooms)])


CORE, TYPED = files(), files("schema", "keywords", "structured", "typed")
MODELS = ("checkpoints", "engine", "memory", "models", "names", "patterns", "sizes", "turns")
REQUEST = ("request", "asked", "ready", "dialogue", "shown", "template")
PARTS = ("parts", "split", "scan")
API = (*MODELS, *REQUEST, *PARTS, "api", "answers", "explain", "gate", "meters", "openai")
API += ("service", "tokenize", "vectors", "desk", "kinds", "embed", "padded", "pooling")
API += ("recipe", "rerank", "kept", "markup", "site", "history", "status")
API += (
    "openapi",
    "pages",
    "protocol",
    "replies",
    "response_input",
    "response_items",
    "responses",
    "tokens",
)
API += ("messages", "message_blocks", "message_events", "message_models", "response_tools")
CLI = ("cli", "commands", "arguments", "flags", "hints", "past", "together", "shell", "terminal")
CLI += ("hub", "progress")


def names(place: Any = "copy") -> list[str]:
    return sorted(path.name for path in Path(place).iterdir())


def contents(place: Any = "copy") -> dict[str, tuple[bytes, int]]:
    found = [path for path in Path(place).rglob("*") if path.is_file()]
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in found}


def package(place: str, *rooms: str) -> Path:
    """Copy labs into a new package."""
    Path(place).mkdir(parents=True)
    Path(place, "__init__.py").touch()
    labs_vendor.vendor(place, rooms)
    return Path(place).absolute()


def python(*arguments: Any, path: Any) -> Any:
    """Run Python with the modules in `path` and all packages but an installed labs (-S)."""
    packages = sysconfig.get_paths()["purelib"]
    environment = {**ONE_THREAD, "PYTHONPATH": f"{path}{os.pathsep}{packages}"}
    words, pipe = [sys.executable, "-S", *map(str, arguments)], subprocess.DEVNULL
    options: dict[str, Any] = {"capture_output": True, "text": True, "timeout": 300}
    return subprocess.run(words, env=environment, stdin=pipe, check=False, **options)


def lacking(room: str) -> str:
    copy = f"copy it with labs-gen vendor DEST --rooms {room}"
    return f"labs_{room}.py is not beside labs.py: {copy}"


COPIED = {
    "": CORE,
    "decode": CORE,
    "typed": TYPED,
    "cache": files("cache", "files"),
    "jsonl": files("jsonl", "names", "progress", "hub", *REQUEST),
}
COPIED |= {
    "models": files(*MODELS),
    "api cli guard": files(*API, *CLI, "guard", "apart"),
}


@pytest.mark.parametrize(("rooms", "copied"), COPIED.items())
def test_a_room_is_copied_with_its_imports_only(rooms, copied):
    assert labs_vendor.vendor("copy", rooms.split()) == len(copied)
    assert names() == copied
    assert labs_vendor.check("copy") == dict.fromkeys(copied, "same")


def test_an_unknown_room_is_refused_with_the_known_ones():
    for room in ("tpyed", "labs_typed", "typed.py", "", "labs"):
        with pytest.raises(labs.LabsError, match=f"unknown room {room!r}; .* api, .*typed"):
            labs_vendor.vendor("copy", ["cli", room])
    assert not Path("copy").exists()


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.parametrize(("place", "inside"), [("a b/ä'\"/labs", False), ("pkg", True)])
def test_a_copy_is_the_original_below_its_header_but_for_imports_in_a_package(place, inside):
    Path(place).mkdir(parents=True)
    if inside:
        Path(place, "__init__.py").touch()
    labs_vendor.vendor(place, [name[5:-3] for name in ORIGINALS if name != "labs.py"])
    for name in ORIGINALS:
        original = (ROOT / name).read_text(encoding="utf-8")
        lines = Path(place, name).read_bytes().decode().splitlines(keepends=True)
        header, body = "".join(lines[:5]), "".join(lines[5:])
        assert all(line.startswith("# ") and len(line) <= 101 for line in lines[:5])
        assert f"# {name} of labs {labs.__version__}, copied by `labs-gen vendor" in header
        assert f"original: {digest(original)}\n" in header
        assert f"below: {digest(body)}\n" in header
        assert ("imports made relative" in header) == inside
        pairs = [*zip(original.splitlines(), body.splitlines(), strict=True)]
        changed = [(old.strip(), new.strip()) for old, new in pairs if old != new]
        for old, new in changed:
            assert re.fullmatch(r"import labs\w*( +#.*)?|from labs\w* import .*", old)
            assert new in (f"from . {old}", old.replace("from ", "from ."))
        nodes = [node for node in ast.walk(ast.parse(body)) if not getattr(node, "level", 0)]
        left = {each for each in kit.imports(nodes) if each.startswith("labs")}
        assert not (left if inside else changed)


SAME = ["import labs.x", "import labsx, labs_other", "from os import labs", "import os"]
SAME += ["from .labs_x import labs", "x = '''\nimport labs\n'''\n# import labs"]
RELATIVE = {
    "import labs, os": "from . import labs; import os",
    "import os as o, labs as l": "import os as o; from . import labs as l",
    "from labs_decode import Row as R, Batch": "from .labs_decode import Row as R, Batch",
    "from labs import (  # a\n  a as b,\n)": "from .labs import (  # a\n  a as b,\n)",
    "'ä'; import labs; import labs as x": "'ä'; from . import labs; from . import labs as x",
    "if 1:\n  import labs  # import labs": "if 1:\n  from . import labs  # import labs",
    "from labs_decode import *  # noqa": "from .labs_decode import *  # noqa",
    "import labs\r\nx = 'a\x0cb'\r\n": "from . import labs\r\nx = 'a\x0cb'\r\n",
}


@pytest.mark.parametrize(("old", "new"), [*RELATIVE.items(), *((each, each) for each in SAME)])
def test_imports_of_labs_are_made_relative_and_nothing_else_changes(old, new):
    assert labs_vendor.relative(old, {"labs", "labs_decode", "labs_engine"}) == new


@pytest.fixture
def newer(monkeypatch):
    """Return a function that makes this labs newer: typed is changed and needs one more room."""

    def change() -> None:
        os.mkdir("newer")
        for name in ORIGINALS:
            shutil.copy(ROOT / name, "newer")
        text = Path("newer/labs_typed.py").read_text()
        Path("newer/labs_typed.py").write_text(text + "\nimport labs_more\n")
        Path("newer/labs_more.py").write_text("import labs\n")
        monkeypatch.setattr(labs_vendor, "__file__", os.path.abspath("newer/labs_vendor.py"))
        monkeypatch.setattr(labs, "__version__", "0.2.0")

    return change


FOREIGN = "not written by labs-gen vendor"
SPOILED: list[tuple[Any, str]] = [
    (lambda data: None, "missing"),
    (lambda data: data.replace(b"True", b"1 == 1", 1), "edited by hand"),
    (lambda data: (ROOT / "labs_decode.py").read_bytes(), FOREIGN),
    (lambda data: b"\xff\xfe", FOREIGN),
    (lambda data: b"", FOREIGN),
    (lambda data: data[:300], FOREIGN),
    (lambda data: data.replace(b"\n", b"\r\n"), "same"),  # line ends of another system
]


@pytest.mark.parametrize(("spoil", "state"), SPOILED)
def test_each_difference_is_reported_and_none_that_would_be_lost_is_overwritten(spoil, state):
    labs_vendor.vendor("copy", ["typed"])
    path = Path("copy/labs_decode.py")
    data = spoil(path.read_bytes())
    path.unlink() if data is None else path.write_bytes(data)
    before = contents(".")
    done = invoke("vendor", "copy", "--check")
    expected = dict.fromkeys(TYPED, "same") | {"labs_decode.py": state}
    assert done.stdout == "".join(f"{name}: {words}\n" for name, words in expected.items())
    assert contents(".") == before
    done = invoke("vendor", "copy", "--rooms", "guard")
    assert done.exit_code == (state not in ("missing", "same"))
    if done.exit_code:
        reason = f"labs_decode.py ({state}) would be lost: move that away first"
        assert done.stderr == f"Error: copy: {reason}\n"
        assert contents(".") == before


def test_copying_again_writes_nothing_and_reads_no_configuration():
    Path("labs.toml").write_text("[nonsense]\n")
    done = invoke("vendor", "copy", "--check")
    assert (done.stdout, done.exit_code) == ("".join(f"{name}: missing\n" for name in CORE), 1)
    assert not Path("copy").exists()
    done = invoke("vendor", "copy", "--rooms", "typed, guard")
    assert (done.stderr, done.exit_code) == ("[11 files written]\n", 0)
    before = contents()
    done = invoke("vendor", "copy", "--rooms", "typed")
    assert (done.stderr, done.exit_code) == ("[0 files written]\n", 0)
    assert contents() == before
    assert invoke("vendor", "copy", "--check").exit_code == 0


def test_a_newer_labs_updates_the_copies_and_leaves_other_files(newer):
    os.mkdir("copy")
    for name in ("labs_of_mine.py", "app.py"):
        Path("copy", name).write_text("mine")
    labs_vendor.vendor("copy", ["typed"])
    newer()
    states = labs_vendor.check("copy")
    assert states.pop("labs_more.py") == "missing"
    assert {*states.values()} == {"outdated (copied from labs 0.1.0; labs 0.2.0 differs)"}
    assert labs_vendor.vendor("copy") == 9
    assert {*labs_vendor.check("copy").values()} == {"same"}
    assert "import labs_more" in Path("copy/labs_typed.py").read_text()
    assert names() == sorted(["app.py", *TYPED, "labs_more.py", "labs_of_mine.py"])
    assert Path("copy/labs_of_mine.py").read_text() == "mine"
    Path("copy/__init__.py").touch()  # the folder becomes a package
    assert all(state.startswith("outdated") for state in labs_vendor.check("copy").values())
    labs_vendor.vendor("copy")
    assert "from . import labs_decode" in Path("copy/labs.py").read_text()


def test_the_folder_of_labs_is_never_written_to_and_a_copy_is_not_copied(monkeypatch):
    shutil.copytree(ROOT, "repository", ignore=lambda _, found: {*found} - {*ORIGINALS})
    before = contents("repository")
    with pytest.raises(labs.LabsError, match=r"labs\.py \(not written by"):
        labs_vendor.vendor("repository")
    assert contents("repository") == before
    labs_vendor.vendor("copy", ["cli", "vendor"])
    monkeypatch.setattr(labs_vendor, "__file__", os.path.abspath("copy/labs_vendor.py"))
    with pytest.raises(labs.LabsError, match="this labs is itself a copy"):
        labs_vendor.vendor("other")
    assert not Path("other").exists()


def test_a_full_disk_leaves_the_old_copies_whole(newer, monkeypatch):
    labs_vendor.vendor("copy", ["typed"])
    newer()
    before, write_text = contents(), Path.write_text

    def full(path: Path, *arguments: Any, **options: Any) -> None:
        write_text(path, *arguments, **options)
        if path.name == "labs_more.py":
            raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_text", full)
    done = invoke("vendor", "copy")
    assert (done.exit_code, "No space left on device" in done.stderr) == (1, True)
    assert contents() == before


def test_a_place_that_is_not_a_folder_is_refused_in_one_sentence():
    Path("file").write_text("mine")
    for place in ("file", "file/inside"):
        done = invoke("vendor", place)
        assert re.fullmatch(r"Error: file\S*: .+\n", done.stderr)
        assert done.exit_code == 1


INSIDE = """
import sys
import falcon.testing
from labs_copied.inner import labs, labs_api, labs_cli, labs_engine, labs_models
config = labs.load_config(env={"LABS_MODEL": PLACE})
engine = labs_engine.Engine(labs.load_model(config))
app = labs_api.create_app(config, labs_models.One(engine, config.model_id))
client, headers = falcon.testing.TestClient(app), {"Host": "localhost"}
asked = {"prompt": "Hi", "max_new_tokens": 3, "logit_bias": {"65": 100}}
print(client.simulate_post("/generate", json=asked, headers=headers).json["text"])
asked["response_format"] = {"type": "json_object"}
print(client.simulate_post("/generate", json=asked, headers=headers).text)
engine.close()
print(*(f"{name} {getattr(x, '__file__', '')}" for name, x in sys.modules.items()
        if name.rpartition(".")[2].startswith("labs")), sep=",")
bias = ["--max-new-tokens", "3", "--logit-bias", '{"65": 100}']
sys.argv = ["labs-gen", "--model", PLACE, "--prompt", "Hi", *bias]
labs_cli.main()
"""


@pytest.mark.build  # each starts labs a few times
def test_a_package_of_copies_serves_answers_and_names_the_room_it_lacks(tiny_folder, folder):
    at, code = package("labs_copied/inner", "api", "cli"), INSIDE
    done = python("-c", code.replace("PLACE", repr(str(tiny_folder))), path=folder)
    served, refused, origins, generated = done.stdout.splitlines() or [done.stderr]
    assert (served, generated) == ("AAA", "AAA")
    assert json.loads(refused)["error"]["message"] == lacking("typed")
    assert f"labs_copied.inner.labs_decode {at}/labs_decode.py" in origins.split(",")
    assert all(each.startswith("labs_copied") for each in origins.split(","))


@pytest.mark.build  # each starts labs a few times
def test_copies_in_a_zip_file_run(tiny_folder):
    labs_vendor.vendor("copy", ["cli"])
    zipapp.create_archive("copy", "labs-gen.pyz", main="labs_cli:main")
    words = ["--model", tiny_folder, "--prompt", "Hi", "--max-new-tokens", "3"]
    done = python("labs-gen.pyz", *words, "--logit-bias", '{"65": 100}', path="")
    assert done.stdout == "AAA\n", done.stderr


def test_the_commands_of_a_copy_name_the_room_that_was_not_copied(folder):
    package("pkg", "cli")
    labs_vendor.vendor("flat", ["cli"])
    serve = ("-c", "import labs_cli; labs_cli.main_api()")
    gen = ("-m", "pkg.labs_cli", "batch", "prompts.jsonl")
    for words, room, path in ((gen, "jsonl", folder), (serve, "serve", "flat")):
        done = python(*words, path=path)
        assert (done.stderr, done.returncode) == (f"Error: {lacking(room)}\n", 1)


NEEDED = {"batch prompts.jsonl": "jsonl", "replay prompts.jsonl": "jsonl"}
NEEDED |= {"index docs --docs x.db": "rag", "--prompt Hi --docs x.db": "rag"}
NEEDED |= {"--prompt Hi --schema schema.json": "typed", "vendor other": "vendor"}
NEEDED |= {"settings": "lookup", "chat": "chat", "serve": "serve"}
NEEDED |= {"--prompt Hi --choose a --choose b": "typed", "--prompt Hi --config guard.toml": "guard"}


@pytest.mark.parametrize(("words", "room"), NEEDED.items())
def test_the_room_a_flag_or_setting_needs_is_named(words, room, fake_labs, missing, monkeypatch):
    monkeypatch.setattr(labs, "load_model", lambda config: pytest.fail("loaded"))
    missing(f"labs_{room}")
    Path("prompts.jsonl").touch()
    Path("schema.json").write_text('{"type": "object"}')
    Path("guard.toml").write_text("[guard]\ndeny = ['x']\n")
    done = invoke(*words.split())
    assert (done.stderr, done.exit_code) == (f"Error: {lacking(room)}\n", 1)


FORM = {"response_format": {"type": "json_object"}}


BATCH = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "Hi"}}


@pytest.mark.parametrize(
    ("room", "line"), [("typed", {"id": "a", "prompt": "Hi", **FORM}), ("openai", BATCH)]
)
def test_a_line_for_a_room_that_was_not_copied_fails_alone(room, line, tiny, missing):
    missing(f"labs_{room}")
    plain = {"id": "b", "prompt": "Hi", "max_new_tokens": 1}
    lines = enumerate((json.dumps(each).encode() for each in (line, plain)), 1)
    context = labs_request.open_context(config := labs.Config(model_id="tiny"))
    if room == "typed":  # and so does a choice
        asked = (labs_request.Prompt(prompt="Hi"),)
        request = labs_request.Request(prompts=asked, choices=("a", "b"))
        with pytest.raises(labs.LabsError, match=re.escape(lacking(room))):
            labs_request.prepare(context, config, tiny, request)
    tally, ordered = labs_jsonl.Tally(), labs_jsonl.Batching(ordered=True)
    found = map(json.loads, labs_jsonl.answer_lines(tiny, context, lines, tally, ordered))
    failed, answered = found
    assert failed == {"id": "a", "error": {"type": "invalid_request", "message": lacking(room)}}
    assert answered["usage"]["completion_tokens"] == 1
