# SPDX-License-Identifier: Apache-2.0
"""labs_stock and labs_pull: models on this machine, their removal, their download from a hub."""

from __future__ import annotations

import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import filelock
import kit
import pytest
from kit import ROOT, invoke, save_model

import labs
import labs_cache
import labs_pull
import labs_stock

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(http.server.ThreadingHTTPServer):
    """A stand-in for the hub: one repository, made of a dict of files."""

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.files, self.asked, self.status, self.cut = files, list[str](), 200, 0
        self.headers: dict[str, str] = {}


class Answers(http.server.BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        hub, path = self.server, self.path.partition("?")[0]
        hub.asked.append(f"{self.command} {path} {self.headers.get('Range', '')}".strip())
        if hub.status != 200:
            self.say(b"{}", hub.status, hub.headers)
        elif path.startswith("/api/models/org/name/tree/"):
            rows = [
                {"type": "file", "path": n, "size": len(d), "oid": oid(n)}
                for n, d in hub.files.items()
            ]
            self.say(json.dumps(rows).encode())
        elif path.startswith("/api/models/org/name"):
            rows = [{"rfilename": name, "size": len(data)} for name, data in hub.files.items()]
            self.say(json.dumps({"id": "org/name", "sha": COMMIT, "siblings": rows}).encode())
        elif path.startswith("/org/name/resolve/"):
            name = path.split("/", 5)[5]
            if name not in hub.files:
                self.say(b"", 404, {"X-Error-Code": "EntryNotFound"})
                return
            begin = int(self.headers.get("Range", "bytes=0-")[6:].partition("-")[0])
            data = hub.files[name]
            more = {"ETag": f'"{oid(name)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
            if begin:
                more["Content-Range"] = f"bytes {begin}-{len(data) - 1}/{len(data)}"
            self.say(data[begin:], 206 if begin else 200, more)
        else:
            self.say(b"{}", 404, {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def say(self, data: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            cut = self.server.cut if len(data) > 50_000 else 0
            self.wfile.write(data[:cut] if cut else data)
            if cut:
                self.close_connection = True
                self.connection.close()

    def log_message(self, *_: Any) -> None: ...


def oid(name: str) -> str:
    return f"{abs(hash(name)):040x}"[:40]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, bytes]:
    """Return a repository with a model, and with what labs would not load."""
    place = save_model(tmp_path_factory.mktemp("repository"))
    found = {path.name: path.read_bytes() for path in place.iterdir()}
    others = ("pytorch_model.bin", "onnx/model.onnx", "code.py", "README.md", "consolidated.pth")
    return found | dict.fromkeys(others, b"other")


@pytest.fixture
def hub(files):
    server = Hub(dict(files))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def run(hub: Hub, folder: Path, *words: str) -> Any:
    """Run labs-gen with this hub and with caches in a folder."""
    url, home = f"http://127.0.0.1:{hub.server_address[1]}", str(folder)
    names = {"HF_ENDPOINT": url, "HF_HOME": f"{home}/hf", "LABS_CACHE_DIR": f"{home}/labs"}
    command = [sys.executable, str(ROOT / "labs_cli.py"), *words]
    options: dict[str, Any] = {"capture_output": True, "text": True, "timeout": 200}
    env = {**kit.ONE_THREAD, **names, "HF_HUB_DISABLE_XET": "1"}
    return subprocess.run(command, env=env, cwd=folder, check=False, **options)


# ---------------------------------------------------------------- downloads


def test_a_pull_takes_what_labs_loads_and_no_more(hub, files, tmp_path):
    done = run(hub, tmp_path, "models", "pull", "org/name")
    place = Path(done.stdout.strip())
    assert {path.name for path in place.iterdir()} == {
        *("config.json", "generation_config.json", "model.safetensors"),
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    }
    assert (place / "model.safetensors").read_bytes() == files["model.safetensors"]
    assert done.stderr.endswith('kB here; labs-gen --model org/name --prompt "Hello!"]\n')
    assert done.stderr.count("\n") == 1
    listed = run(hub, tmp_path, "models", "--json")
    (found,) = (each for each in json.loads(listed.stdout) if each["kind"] == "hub")
    assert (found["name"], found["revisions"]) == ("org/name", ["main"])
    assert found["bytes"] > len(files["model.safetensors"])
    done = run(hub, tmp_path, "models", "rm", "org/name", "--yes")
    assert not place.exists()
    assert done.stderr.endswith("deleted]\n")


def test_a_download_that_was_cut_is_told_and_whole_files_are_kept(hub, files, tmp_path):
    hub.cut = 60_000
    done = run(hub, tmp_path, "models", "pull", "org/name")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("Error: org/name: ")
    assert "what is whole is kept for the next try" in done.stderr
    assert done.stderr.count("\n") == 1
    blobs = tmp_path / "hf" / "hub" / "models--org--name" / "blobs"
    left, busy = blobs / "0123.5678.incomplete", blobs / "4567.5678.incomplete"
    for part in (left, busy):
        part.write_bytes(b"part")
        os.utime(part, (0, 0))
    hub.cut, hub.asked = 0, []
    locks = tmp_path / "hf" / "hub" / ".locks" / "models--org--name"
    with filelock.FileLock(locks / "4567.lock"):
        done = run(hub, tmp_path, "models", "pull", "org/name")
    assert Path(done.stdout.strip(), "model.safetensors").read_bytes() == files["model.safetensors"]
    assert [line for line in hub.asked if line.startswith("GET /org/") and "config" in line] == []
    assert (left.exists(), busy.exists()) == (False, True)


REFUSED = [
    (404, "RepoNotFound", "is neither a folder here nor a model on the hub"),
    (401, "", "is private or does not exist: check the name and HF_TOKEN"),
    (403, "GatedRepo", "is gated: accept its terms on the hub and set HF_TOKEN"),
    (404, "RevisionNotFound", "has no such revision on the hub"),
]


@pytest.mark.parametrize(("status", "code", "sentence"), REFUSED)
def test_what_the_hub_refuses_is_told_in_a_sentence(status, code, sentence, hub, tmp_path):
    hub.status, hub.headers = status, {"X-Error-Code": code} if code else {}
    done = run(hub, tmp_path, "models", "pull", "org/name")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"Error: org/name: {sentence}")
    assert done.stderr.count("\n") == 1


def test_a_hub_that_is_not_there_is_told_in_a_sentence(hub, tmp_path):
    hub.shutdown()
    hub.server_close()
    done = run(hub, tmp_path, "models", "pull", "org/name")
    assert done.stderr.startswith("Error: org/name: the hub cannot be reached; ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("names", "changes", "chosen"),
    [
        (["model.safetensors", "model.fp16.safetensors"], {}, ["model.safetensors"]),
        (
            ["model-1-of-2.safetensors", "model-2-of-2.safetensors", "consolidated.safetensors"],
            {},
            2,
        ),
        (["pytorch_model.bin"], {"use_safetensors": False}, ["pytorch_model.bin"]),
        (["pytorch_model.bin", "model.safetensors"], {"use_safetensors": False}, 1),
        (["adapter_model.safetensors"], {}, ["adapter_model.safetensors"]),
        (["2_Dense/model.safetensors", "model.safetensors"], {}, ["model.safetensors"]),
        (["2_Dense/model.safetensors", "model.safetensors"], {"kind": "embedding"}, 2),
        (
            ["code.py", "model.safetensors"],
            {"trust_remote_code": True},
            ["code.py", "model.safetensors"],
        ),
    ],
)
def test_the_files_of_a_model_are_those_that_labs_would_load(names, changes, chosen):
    files = {"config.json": 10, **dict.fromkeys(names, 10), "long.json": 2**30}
    found = labs_pull.of_model("a/b", files, labs.evolve(labs.ModelSpec(), **changes))
    weights = [name for name in found if name != "config.json"]
    assert (weights == chosen) if isinstance(chosen, list) else (len(weights) == chosen)
    assert "config.json" in found


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (["x.Q4_0.gguf"], "holds GGUF files; name one of them: a/b:x.Q4_0.gguf"),
        (["pytorch_model.bin"], "has no safetensors; use_safetensors = false reads pickles"),
        (["model.onnx"], "holds no weights that labs reads"),
    ],
)
def test_a_repository_without_weights_for_labs_says_what_helps(names, sentence):
    with pytest.raises(labs_cache.SourceError, match=sentence):
        labs_pull.of_model("a/b", dict.fromkeys(names, 1), labs.ModelSpec())


def test_a_gguf_file_is_pulled_by_its_name(hub, tmp_path):
    hub.files = {"m.Q4_0.gguf": b"GGUF" * 10, "config.json": b"{}"}
    done = run(hub, tmp_path, "models", "pull", "org/name:m.Q4_0.gguf")
    assert Path(done.stdout.strip()).read_bytes() == b"GGUF" * 10
    assert "--model org/name:m.Q4_0.gguf" in done.stderr
    done = run(hub, tmp_path, "models", "pull", "org/name:m.Q4_1.gguf")
    assert "there is no such file; did you mean m.Q4_0.gguf?" in done.stderr


# ---------------------------------------------------------------- what is here


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """Return a folder of conversions with one that is whole, and make it the cache."""
    monkeypatch.setenv("LABS_CACHE_DIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    folder = save_model(tmp_path / "Tiny.Q4_0-0123456789abcdef0123-bf16")
    (folder / "complete.json").write_text("{}")
    (tmp_path / ".converting-other").mkdir()
    return folder


def test_the_list_has_configured_models_and_conversions(cached):
    Path("labs.toml").write_text(f'[models.mine]\nmodel_name = "{cached}"\nadapter = "./absent"\n')
    lines = invoke("models").stdout.splitlines()
    assert [line.split()[0] for line in lines] == [
        "NAME",
        "smollm2-135m-instruct",
        "mine",
        "mine",
        cached.name,
    ]
    assert "not here" in lines[3]
    assert len({line.index("  ", 60) >= 0 for line in lines}) == 1
    found = json.loads(invoke("models", "--json").stdout)
    assert found[-1]["bytes"] == sum(path.stat().st_size for path in cached.iterdir())


def test_a_conversion_is_removed_only_after_yes(cached):
    done = invoke("models", "rm", "tiny")
    assert (done.exit_code, cached.exists()) == (2, True)
    assert "nothing was deleted: give --yes" in done.stderr
    done = invoke("models", "rm", "tiny", "--yes")
    assert (done.exit_code, cached.exists()) == (0, False)
    assert str(cached) in done.stderr
    assert [*cached.parent.glob("Tiny*")] == []


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("tinny", "no cache has a model tinny; did you mean Tiny.Q4_0-0123456789abcdef0123-bf16?"),
        ("smollm2-135m-instruct", "smollm2-135m-instruct is configured, not in a cache"),
        ("../x", "no cache has a model ../x"),
        ("\x1b[2Jx", "no cache has a model x"),  # click leaves such bytes out of a pipe
    ],
)
def test_what_no_cache_has_is_not_removed(name, sentence, cached):
    done = invoke("models", "rm", name, "--yes")
    assert done.exit_code == 1
    assert sentence in done.stderr
    assert cached.exists()


def test_a_conversion_in_use_or_being_made_is_not_removed(cached):
    code = f"import mmap, sys; f = open({str(cached / 'model.safetensors')!r}, 'rb')\n"
    code += "m = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ); print(flush=True); input()"
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as process:
        assert process.stdout
        process.stdout.readline()
        done = invoke("models", "rm", "tiny", "--yes")
        assert f"is in use by process {process.pid}: end it first" in done.stderr
        assert "(in use)" in invoke("models").stdout
        process.communicate(b"\n")
    with filelock.FileLock(cached.parent / f".converting-{cached.name}.lock"):
        done = invoke("models", "rm", "tiny", "--yes")
    assert "another process is converting it" in done.stderr
    assert cached.exists()


def test_a_link_in_the_cache_is_not_followed(cached, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    cached.rename(elsewhere / "model")
    cached.symlink_to(elsewhere / "model")
    assert invoke("models", "rm", "tiny", "--yes").exit_code == 1
    assert (elsewhere / "model" / "config.json").exists()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["list", "x"], "models list takes no NAME"),
        (["rm"], "models rm takes a NAME: labs-gen models rm NAME"),
        (["--revision", "x"], "models list does not read --revision"),
        (["rm", "x", "--json"], "models rm does not read --json"),
        (["pull", "x", "--yes"], "models pull does not read --yes"),
        (["pul", "x"], "'pul' is not one of 'list', 'pull', 'rm'"),
    ],
)
def test_a_word_or_flag_without_effect_is_refused(words, sentence):
    done = invoke("models", *words)
    assert done.exit_code == 2
    assert sentence in done.stderr


@pytest.mark.parametrize("name", ["package:x/y.gguf", "./folder", "~/x", "tests", "x.gguf"])
def test_a_model_that_is_not_on_the_hub_is_not_pulled(name):
    Path("tests").mkdir()
    with pytest.raises(labs.ModelError, match="is not on the hub; give ORG/MODEL"):
        labs_pull.pull(labs.Config(), name)


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (98e6, "98 MB"), (2e13, "20.0 TB")],
)
def test_sizes_are_in_units_of_people(count, text):
    assert labs_stock.human(count) == text


def test_prefixes_of_prompts_are_one_row_and_can_be_deleted(tmp_path):
    folder, name = tmp_path / "prefixes", f"{'a' * 40}-{'b' * 32}"
    folder.mkdir()
    (folder / f"{name}.safetensors").write_bytes(b"1" * 3000)
    (folder / f"{'c' * 32}.part").write_bytes(b"2" * 1000)
    (folder / "mine.txt").write_text("kept")
    found = kit.invoke("models", "--cache-dir", str(tmp_path)).stdout
    [row] = [line.split(maxsplit=5) for line in found.splitlines() if line.startswith("prefixes")]
    assert row[:4] == ["prefixes", "prefixes", "4.0", "kB"]
    assert row[5] == f"{folder} (2 files)"
    done = kit.invoke("models", "rm", "prefixes", "--yes", "--cache-dir", str(tmp_path))
    assert (done.exit_code, done.stderr) == (0, f"{folder}: 4.0 kB\n[4.0 kB deleted]\n")
    assert [path.name for path in folder.iterdir()] == ["mine.txt"]
    (folder / "mine.txt").unlink()
    (folder / f"{name}.safetensors").write_bytes(b"1")
    kit.invoke("models", "rm", "pref", "--yes", "--cache-dir", str(tmp_path))
    assert not folder.exists()
    done = kit.invoke("models", "rm", "prefixes", "--yes", "--cache-dir", str(tmp_path))
    assert done.exit_code == 1
