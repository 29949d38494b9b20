# SPDX-License-Identifier: Apache-2.0
"""Copies of labs: what they hold, how they differ, and that they work in every surroundings."""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
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
from packaging.requirements import Requirement

import labs
import labs_jsonl
import labs_request
import labs_vendor

ORIGINALS = sorted(path.name for path in ROOT.glob("labs*.py"))
ROOMS = [name[5:-3] for name in ORIGINALS if name != "labs.py"]
PACKAGES = Path(sysconfig.get_paths()["purelib"])
CORE = ["labs.py", "labs_decode.py", "labs_loop.py", "labs_settings.py"]
TYPED = [*CORE, "labs_schema.py", "labs_typed.py"]
API = ["api", "engine", "gate", "meters", "models", "openai", "pages", "patterns", "request"]
API = [*CORE, *(f"labs_{room}.py" for room in (*API, "tokens", "turns"))]
MODELS = [*CORE, *(f"labs_{room}.py" for room in ("engine", "models", "patterns", "turns"))]
ANSWER = """
config = labs.load_config(env={"LABS_MODEL": MODEL, "LABS_TORCH_DTYPE": "fp32"})
model = labs.load_model(config)
inputs = labs.build_inputs(model, prompt="Hi")
done = labs.generate(model, inputs, max_new_tokens=3, logit_bias={65: 100})
print(done.text)
"""


def names(place: Any = "copy") -> list[str]:
    return sorted(path.name for path in Path(place).iterdir())


def contents(place: Any = "copy") -> dict[str, tuple[bytes, int]]:
    files = [path for path in Path(place).rglob("*") if path.is_file()]
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def package(place: str, *rooms: str) -> Path:
    """Copy labs into a new package."""
    Path(place).mkdir(parents=True)
    Path(place, "__init__.py").touch()
    labs_vendor.vendor(place, rooms)
    return Path(place)


def python(*arguments: Any, path: Any, packages: Path = PACKAGES, **options: Any) -> Any:
    """Run Python with the modules in `path` and these packages: labs is not among them.

    -S, because labs is installed by a .pth file here.
    """
    environment = {**ONE_THREAD, "PYTHONPATH": f"{path}{os.pathsep}{packages}"}
    words = [sys.executable, "-S", *map(str, arguments)]
    options = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True} | options
    return subprocess.run(words, env=environment, timeout=300, check=False, **options)


def answer(imports: str, model: Path, **options: Any) -> Any:
    code = f"{imports}\nMODEL = {str(model)!r}\n{ANSWER}\nimport sys\n{WHENCE}"
    return python("-c", code, **options)


WHENCE = """
print(*sorted(f"{each} {getattr(sys.modules[each], '__file__', '')}"
              for each in sys.modules if each.rpartition(".")[2].startswith("labs")), sep="\\n")
"""


# ---------------------------------------------------------------- what is copied


@pytest.mark.parametrize(
    ("rooms", "copied"),
    [
        ([], CORE),
        (["typed"], [*CORE, "labs_schema.py", "labs_typed.py"]),
        (["cli"], [*CORE, "labs_cli.py", "labs_request.py"]),
        (["jsonl"], [*CORE, "labs_jsonl.py", "labs_request.py"]),
        (["decode"], CORE),
        (["models"], MODELS),
        (["api"], API),
        (["api", "cli", "guard"], [*API, "labs_cli.py", "labs_guard.py"]),
    ],
)
def test_a_room_comes_with_what_it_imports_and_no_more(rooms, copied):
    assert labs_vendor.vendor("copy", rooms) == len(copied)
    assert names() == sorted(copied)


@pytest.mark.parametrize("room", ["tpyed", "labs_typed", "typed.py", "", "labs"])
def test_a_room_that_there_is_not_is_refused_with_those_that_there_are(room):
    with pytest.raises(labs.LabsError, match=f"unknown room '{re.escape(room)}'; .* api, .*typed"):
        labs_vendor.vendor("copy", ["cli", room])
    assert not Path("copy").exists()


def parts(path: Path) -> tuple[str, str]:
    """Return the header of a copy and what follows it."""
    lines = path.read_bytes().decode().splitlines(keepends=True)
    assert all(line.startswith("# ") and len(line) <= 101 for line in lines[:5])
    return "".join(lines[:5]), "".join(lines[5:])


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.parametrize("place", ["copy", "a b/c d", "ä'\"/labs"])
def test_a_flat_copy_is_the_original_below_its_header(place):
    labs_vendor.vendor(place, ROOMS)
    for name in ORIGINALS:
        header, body = parts(Path(place, name))
        assert body.encode() == (ROOT / name).read_bytes()
        assert f"# {name} of labs {labs.__version__}, copied by `labs-gen --vendor" in header
        assert f"original: {digest(body)}\n" in header
        assert f"below: {digest(body)}\n" in header
        assert "SPDX-License-Identifier: Apache-2.0" in body


def test_a_copy_in_a_package_differs_in_its_imports_alone():
    place = package("pkg", *ROOMS)
    for name in ORIGINALS:
        original = (ROOT / name).read_text(encoding="utf-8")
        header, body = parts(place / name)
        assert "imports made relative" in header
        assert f"original: {digest(original)}\n" in header
        assert f"below: {digest(body)}\n" in header
        documentation = ast.get_docstring(ast.parse(original))
        assert ast.get_docstring(ast.parse(header + body)) == documentation
        pairs = zip(original.splitlines(), body.splitlines(), strict=True)
        for old, new in ((old, new) for old, new in pairs if old != new):
            assert re.fullmatch(r" *(import labs\w*( +#.*)?|from labs\w* import .*)", old)
            assert new.strip() in (f"from . {old.strip()}", old.strip().replace("from ", "from ."))
        assert not {name for name in kit.imports(absolute(body)) if name.startswith("labs")}


def absolute(text: str) -> list[ast.AST]:
    return [node for node in ast.walk(ast.parse(text)) if getattr(node, "level", 0) == 0]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("import labs", "from . import labs"),
        ("import labs_engine as e", "from . import labs_engine as e"),
        ("import labs, os", "from . import labs; import os"),
        ("import os as o, labs as l", "import os as o; from . import labs as l"),
        ("from labs_decode import Row as R, Batch", "from .labs_decode import Row as R, Batch"),
        ("from labs import (\n  a,  # b\n)", "from .labs import (\n  a,  # b\n)"),
        ("'ä'; import labs; import labs as x", "'ä'; from . import labs; from . import labs as x"),
        ("def f():\n    'import labs'\n    import labs  # import labs\n",) * 2,
        ("if 1: import labs", "if 1: from . import labs"),
        ("from labs_decode import *  # noqa", "from .labs_decode import *  # noqa"),
        (
            "from labs import (  # noqa\n    a as b,\n)",
            "from .labs import (  # noqa\n    a as b,\n)",
        ),
        ("import labs.x", "import labs.x"),
        ("import labsx, labs_other", "import labsx, labs_other"),
        ("from os import labs", "from os import labs"),
        ("from .labs_x import labs", "from .labs_x import labs"),
        ("x = '''\nimport labs\n'''\n# import labs", "x = '''\nimport labs\n'''\n# import labs"),
        ("import labs\r\nx = 'a\x0cb'\r\n", "from . import labs\r\nx = 'a\x0cb'\r\n"),
    ],
)
def test_imports_of_labs_are_made_relative_and_nothing_else(old, new):
    if old == new and "    import labs " in old:
        new = old.replace("    import labs ", "    from . import labs ")
    assert labs_vendor.relative(old, {"labs", "labs_decode", "labs_engine"}) == new


# ---------------------------------------------------------------- how copies differ


@pytest.fixture
def newer(monkeypatch) -> None:
    """Let this labs be a newer one, with another labs_typed.py and one room more that it needs."""
    os.mkdir("newer")
    for name in ORIGINALS:
        shutil.copy(ROOT / name, "newer")
    text = Path("newer/labs_typed.py").read_text()
    Path("newer/labs_typed.py").write_text(text + "\nimport labs_more\n")
    Path("newer/labs_more.py").write_text("import labs\n")
    monkeypatch.setattr(labs_vendor, "__file__", os.path.abspath("newer/labs_vendor.py"))
    monkeypatch.setattr(labs, "__version__", "0.2.0")


def edit(name: str, place: str = "copy") -> None:
    path = Path(place, name)
    path.write_text(path.read_text().replace("True", "1 == 1", 1))


def test_a_new_copy_is_the_same():
    labs_vendor.vendor("copy", ["typed"])
    assert labs_vendor.check("copy") == dict.fromkeys(
        [*CORE, "labs_schema.py", "labs_typed.py"], "same"
    )


@pytest.mark.parametrize("name", CORE)
def test_line_ends_of_another_system_make_no_difference(name):
    labs_vendor.vendor("copy")
    path = Path("copy", name)
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert labs_vendor.check("copy") == dict.fromkeys(CORE, "same")


def spoil(what: str) -> None:
    path = Path("copy/labs_typed.py")
    if what == "missing":
        os.remove("copy/labs_decode.py")
    elif what == "edited":
        edit("labs_typed.py")
    elif what == "bare":
        shutil.copy(ROOT / "labs_typed.py", path)
    elif what == "binary":
        path.write_bytes(b"\xff\xfe")
    elif what == "empty":
        path.write_text("")
    elif what == "torn":
        path.write_text(path.read_text()[:300])


@pytest.mark.parametrize(
    ("what", "name", "state"),
    [
        ("missing", "labs_decode.py", "missing"),
        ("edited", "labs_typed.py", "edited by hand"),
        ("bare", "labs_typed.py", "not written by labs-gen --vendor"),
        ("binary", "labs_typed.py", "not written by labs-gen --vendor"),
        ("empty", "labs_typed.py", "not written by labs-gen --vendor"),
        ("torn", "labs_typed.py", "not written by labs-gen --vendor"),
    ],
)
def test_each_way_to_differ_is_told_and_nothing_is_written(what, name, state):
    labs_vendor.vendor("copy", ["typed"])
    spoil(what)
    before = contents(".")
    done = invoke("--vendor", "copy", "--check")
    expected = dict.fromkeys(sorted(TYPED), "same") | {name: state}
    assert done.stdout == "".join(f"{each}: {told}\n" for each, told in expected.items())
    assert done.exit_code == 1
    assert contents(".") == before


def test_a_newer_labs_is_told_with_both_versions_and_what_it_needs_besides(request):
    labs_vendor.vendor("copy", ["typed"])
    request.getfixturevalue("newer")
    states = labs_vendor.check("copy")
    assert states.pop("labs_more.py") == "missing"
    assert set(states.values()) == {"outdated (copied from labs 0.1.0; labs 0.2.0 differs)"}


def test_a_folder_that_is_not_there_lacks_everything_and_is_not_made():
    done = invoke("--vendor", "copy", "--check")
    assert (done.stdout, done.exit_code) == ("".join(f"{name}: missing\n" for name in CORE), 1)
    assert not Path("copy").exists()


def test_the_same_again_writes_nothing():
    done = invoke("--vendor", "copy", "--rooms", "typed, guard")
    assert (done.stderr, done.exit_code) == ("[8 files written]\n", 0)
    before = contents()
    done = invoke("--vendor", "copy", "--rooms", "typed")
    assert (done.stderr, done.exit_code) == ("[0 files written]\n", 0)
    assert contents() == before
    assert invoke("--vendor", "copy", "--check").exit_code == 0


def test_a_newer_labs_brings_the_copies_up_to_date(request):
    labs_vendor.vendor("copy", ["typed"])
    request.getfixturevalue("newer")
    assert labs_vendor.vendor("copy") == 7
    assert set(labs_vendor.check("copy").values()) == {"same"}
    assert "import labs_more" in Path("copy/labs_typed.py").read_text()
    assert names() == sorted([*TYPED, "labs_more.py"])


def test_a_folder_that_became_a_package_is_brought_up_to_date():
    labs_vendor.vendor("copy")
    Path("copy/__init__.py").touch()
    assert all(state.startswith("outdated") for state in labs_vendor.check("copy").values())
    labs_vendor.vendor("copy")
    assert "from . import labs_decode" in Path("copy/labs.py").read_text()
    assert set(labs_vendor.check("copy").values()) == {"same"}


@pytest.mark.parametrize(
    ("what", "why"),
    [("edited", "edited by hand"), ("bare", "not written by labs-gen --vendor")],
)
def test_what_would_be_lost_is_refused_by_name_before_anything_is_written(what, why, request):
    labs_vendor.vendor("copy", ["typed"])
    spoil(what)
    request.getfixturevalue("newer")
    before = contents(".")
    done = invoke("--vendor", "copy", "--rooms", "guard")
    told = f"Error: copy: labs_typed.py ({why}) would be lost: move that away first\n"
    assert (done.stderr, done.exit_code) == (told, 1)
    assert contents(".") == before
    os.rename("copy/labs_typed.py", "mine.py")
    assert invoke("--vendor", "copy", "--rooms", "typed").exit_code == 0
    assert set(labs_vendor.check("copy").values()) == {"same"}


def test_files_of_other_names_are_left_alone():
    os.mkdir("copy")
    Path("copy/labs_of_mine.py").write_text("mine")
    Path("copy/app.py").write_text("mine")
    labs_vendor.vendor("copy")
    assert names() == sorted(["app.py", *CORE, "labs_of_mine.py"])
    assert Path("copy/labs_of_mine.py").read_text() == "mine"


def test_the_folder_of_labs_itself_is_never_written_to():
    shutil.copytree(ROOT, "repository", ignore=lambda _, found: {*found} - {*ORIGINALS})
    before = contents("repository")
    with pytest.raises(labs.LabsError, match=r"labs\.py \(not written by"):
        labs_vendor.vendor("repository")
    assert contents("repository") == before


def test_a_disk_that_fills_up_leaves_the_old_copies_whole(request, monkeypatch):
    labs_vendor.vendor("copy", ["typed"])
    request.getfixturevalue("newer")
    before, write_text = contents(), Path.write_text

    def full(path: Path, *arguments: Any, **options: Any) -> None:
        write_text(path, *arguments, **options)
        if path.name == "labs_more.py":
            raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_text", full)
    done = invoke("--vendor", "copy")
    assert done.exit_code == 1
    assert "No space left on device" in done.stderr
    assert contents() == before


@pytest.mark.parametrize("place", ["file", "file/inside"])
def test_a_place_that_is_no_folder_is_refused_in_one_sentence(place):
    Path("file").write_text("mine")
    done = invoke("--vendor", place)
    assert re.fullmatch(r"Error: file\S*: .+\n", done.stderr)
    assert done.exit_code == 1


def test_a_copy_is_no_source_of_copies():
    labs_vendor.vendor("copy", ["cli", "vendor"])
    done = python("copy/labs_cli.py", "--vendor", "other", path="copy")
    assert done.stderr == "Error: this labs is itself a copy: run the labs-gen that made it\n"
    assert not Path("other").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["--rooms", "api"],
        ["--check"],
        ["--vendor", "copy", "--check", "--rooms", "api"],
        ["--vendor", "copy", "--prompt", "Hi"],
        ["--vendor", "copy", "--input", "x"],
        ["--vendor", "copy", "--output", "x"],
        ["--vendor", "copy", "--show-config"],
        ["--vendor", "copy", "--temperature", "0"],
        ["--vendor", "copy", "--model", "x"],
        ["--vendor", "copy", "--docs", "x"],
    ],
)
def test_flags_that_would_have_no_effect_are_refused(arguments):
    assert invoke(*arguments).exit_code == 2
    assert not Path("copy").exists()


def test_copying_needs_no_valid_configuration():
    Path("labs.toml").write_text("[nonsense]\n")
    assert invoke("--vendor", "copy").exit_code == 0


# ---------------------------------------------------------------- copies at work


@pytest.fixture(scope="session")
def three_packages(tmp_path_factory) -> Path:
    """Return a folder with torch, transformers, msgspec and what those require, and no more."""
    found, waiting = {}, ["torch", "transformers", "msgspec"]
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name not in found:
            found[name] = importlib.metadata.distribution(name)
            required = [Requirement(text) for text in found[name].requires or []]
            bare = [r for r in required if r.marker is None or r.marker.evaluate({"extra": ""})]
            waiting += [each.name for each in bare]
    place = tmp_path_factory.mktemp("packages")
    files = [file for each in found.values() for file in each.files or []]
    for top in {file.parts[0] for file in files} - {"..", "__pycache__"}:
        os.symlink(PACKAGES / top, place / top)
    return place


def test_the_core_needs_torch_transformers_and_msgspec_and_nothing_else(
    three_packages, tiny_folder, folder
):
    labs_vendor.vendor("copy")
    blocked = ("accelerate", "cachetools", "dotenv", "falcon", "gguf", "llguidance", "waitress")
    code = "from importlib.util import find_spec\n"
    code += f"print([name for name in {(*blocked, 'labs_cli')} if find_spec(name)])\nimport labs"
    done = answer(code, tiny_folder, path=folder / "copy", packages=three_packages)
    told = ["[]", "AAA", f"labs {folder}/copy/labs.py"]
    told += [f"labs_{name} {folder}/copy/labs_{name}.py" for name in ("decode", "loop", "settings")]
    assert done.stdout.splitlines() == told, done.stderr


@pytest.mark.parametrize("place", ["app/inner", "labs_copied"])
def test_a_package_of_copies_works_from_within(place, tiny_folder, folder):
    at, name = package(place, "api", "cli").absolute(), place.replace("/", ".")
    done = answer(f"from {name} import labs", tiny_folder, path=folder)
    found = done.stdout.splitlines()
    assert found[0] == "AAA", done.stderr
    assert f"{name}.labs_decode {at}/labs_decode.py" in found
    assert all(line.startswith((f"{name}.labs", "labs_copied ")) for line in found[1:])


def test_the_commands_run_from_a_package(folder, tiny_folder):
    package("pkg", "serve", "cli")
    serve = ("-c", "from pkg import labs_cli; labs_cli.main_api()")
    for words, name in ((("-m", "pkg.labs_cli"), "labs-gen"), (serve, "labs-api")):
        done = python(*words, "--version", path=folder)
        assert done.stdout == f"{name} {labs.__version__}\n", done.stderr
    words = ["--model", tiny_folder, "--prompt", "Hi", "--max-new-tokens", "3"]
    done = python("-m", "pkg.labs_cli", *words, "--logit-bias", '{"65": 100}', path=folder)
    assert done.stdout == "AAA\n", done.stderr


def test_an_app_of_a_package_answers(tiny_folder, folder):
    package("pkg", "api")
    asked = {"prompt": "Hi", "max_new_tokens": 3, "logit_bias": {"65": 100}}
    code = f"""
import falcon.testing
from pkg import labs, labs_api, labs_engine, labs_models
config = labs.load_config(env={{"LABS_MODEL": {str(tiny_folder)!r}}})
engine = labs_engine.Engine(labs.load_model(config))
models = labs_models.One(engine, config.model_id)
client = falcon.testing.TestClient(labs_api.create_app(config, models))
headers = {{"Host": "localhost"}}
print(client.simulate_post("/generate", json={asked}, headers=headers).json["text"])
format = {{"type": "json_object"}}
asked = {{"messages": [{{"role": "user", "content": "Hi"}}], "response_format": format}}
print(client.simulate_post("/v1/chat/completions", json=asked, headers=headers).text)
engine.close()
"""
    done = python("-c", code, path=folder)
    text, refused = done.stdout.splitlines()
    assert text == "AAA", done.stderr
    assert json.loads(refused)["error"]["message"] == lacking("typed")


def test_copies_in_a_zip_file_run(tiny_folder, folder):
    labs_vendor.vendor("copy", ["cli"])
    zipapp.create_archive("copy", "labs-gen.pyz", main="labs_cli:main")
    shutil.rmtree("copy")
    done = python("labs-gen.pyz", "--show-config", "--temperature", "0.5", path="")
    assert "temperature = 0.5" in done.stdout, done.stderr
    words = ["--model", tiny_folder, "--prompt", "Hi", "--max-new-tokens", "3"]
    done = python("labs-gen.pyz", *words, "--logit-bias", '{"65": 100}', path="")
    assert done.stdout == "AAA\n", done.stderr


# ---------------------------------------------------------------- what was not copied


def lacking(room: str) -> str:
    copy = f"copy it with labs-gen --vendor DEST --rooms {room}"
    return f"labs_{room}.py is not beside labs.py: {copy}"


@pytest.mark.parametrize(
    ("arguments", "room"),
    [
        (["--input", "prompts.jsonl"], "jsonl"),
        (["--index", "docs", "--docs", "docs.db"], "rag"),
        (["--vendor", "other"], "vendor"),
    ],
)
@pytest.mark.parametrize("flat", [True, False])
def test_labs_gen_names_the_file_that_was_not_copied(arguments, room, flat, folder):
    if flat:
        labs_vendor.vendor("pkg", ["cli"])
        done = python("pkg/labs_cli.py", *arguments, path="pkg")
    else:
        package("pkg", "cli")
        done = python("-m", "pkg.labs_cli", *arguments, path=folder)
    assert (done.stderr, done.returncode) == (f"Error: {lacking(room)}\n", 1)


@pytest.mark.parametrize(
    ("arguments", "room"),
    [
        (["--input", "prompts.jsonl"], "jsonl"),
        (["--replay", "answers.jsonl"], "jsonl"),
        (["--prompt", "Hi", "--docs", "docs.db"], "rag"),
        (["--prompt", "Hi", "--schema", "schema.json"], "typed"),
        (["--prompt", "Hi", "--choose", "a", "--choose", "b"], "typed"),
        (["--prompt", "Hi", "--config", "guard.toml"], "guard"),
        (["--prompt", "Hi", "--config", "guard.toml", "--json"], "guard"),
    ],
)
def test_what_a_flag_or_setting_needs_is_named(arguments, room, fake_labs, missing, monkeypatch):
    monkeypatch.setattr(labs, "load_model", lambda config: pytest.fail("loaded"))
    missing(f"labs_{room}")
    for name in ("prompts.jsonl", "answers.jsonl"):
        Path(name).touch()
    Path("schema.json").write_text('{"type": "object"}')
    Path("guard.toml").write_text("[guard]\ndeny = ['x']\n")
    done = invoke(*arguments)
    assert (done.stderr, done.exit_code) == (f"Error: {lacking(room)}\n", 1)


def test_labs_api_names_the_server_that_was_not_copied():
    labs_vendor.vendor("copy", ["cli"])
    done = python("-c", "import labs_cli; labs_cli.main_api()", path="copy")
    assert (done.stderr, done.returncode) == (f"Error: {lacking('serve')}\n", 1)


def test_labs_alone_names_the_file_that_was_not_copied(folder, tiny_folder):
    labs_vendor.vendor("copy")
    os.remove("copy/labs_decode.py")
    done = answer("import labs", tiny_folder, path=folder / "copy")
    assert done.stderr.splitlines()[-1] == f"labs_settings.ConfigError: {lacking('decode')}"


CHAT = {"messages": [{"role": "user", "content": "Hi"}], "response_format": {"type": "json_object"}}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", CHAT),
        ("/v1/chat/completions", {**CHAT, "stream": True}),
        ("/generate", {"prompt": "Hi", "response_format": {"type": "json_object"}}),
        ("/choose", {"prompt": "Hi", "options": ["a", "b"]}),
    ],
)
def test_a_request_for_a_room_that_was_not_copied_is_refused_by_name(path, body, site, missing):
    missing("labs_typed")
    error = kit.error_of(site.post(path, body), 400)
    assert error["message"] == lacking("typed")
    kit.error_of(site.post("/generate", {"prompt": "Hi", "x": 1}), 400)
    assert site.post("/generate", {"prompt": "Hi"}).status_code == 200


def test_an_app_with_filters_that_were_not_copied_is_not_made(fake, missing):
    missing("labs_guard")
    config = labs.Config(model_id="tiny", guard=labs.Guard(deny=("x",)))
    with pytest.raises(labs.ConfigError, match=re.escape(lacking("guard"))):
        kit.Site(fake, config)


@pytest.mark.parametrize(
    ("room", "line"),
    [
        ("typed", {"id": "a", "prompt": "Hi", "response_format": {"type": "json_object"}}),
        (
            "openai",
            {
                "custom_id": "a",
                "method": "POST",
                "url": "/v1/completions",
                "body": {"prompt": "Hi", "max_tokens": 1},
            },
        ),
    ],
)
def test_a_line_for_a_room_that_was_not_copied_fails_alone(room, line, tiny, missing):
    missing(f"labs_{room}")
    plain = {"id": "b", "prompt": "Hi", "max_new_tokens": 1}
    lines = enumerate((json.dumps(each).encode() for each in (line, plain)), 1)
    tally = labs_jsonl.Tally()
    context = labs_request.open_context(labs.Config(model_id="tiny"))
    ordered = labs_jsonl.Batching(ordered=True)
    found = map(json.loads, labs_jsonl.answer_lines(tiny, context, lines, tally, ordered))
    failed, answered = found
    assert failed == {"id": "a", "error": {"type": "invalid_request", "message": lacking(room)}}
    assert answered["usage"]["completion_tokens"] == 1


@pytest.mark.parametrize("name", ["cachetools", "waitress", "tqdm"])
def test_a_package_that_is_missing_is_named_with_how_to_install_it(name, missing):
    missing(name)
    with pytest.raises(labs.ModelError, match=f"pip install {name}"):
        labs.require(name)
