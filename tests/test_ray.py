# SPDX-License-Identifier: Apache-2.0
"""labs on Ray: one true cluster on this machine, whose replicas and workers are killed."""

from __future__ import annotations

import collections
import importlib
import json
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import filelock
import httpx
import kit
import msgspec
import psutil
import pytest
from kit import CHAT, HELLO, A, end_of, invoke, program

import labs
import labs_jsonl
import labs_ray
import labs_vendor

WAIT_S = 120
KEY = "one-key-that-is-long-enough"
BOUNDED = "another-key-for-the-test-of-the-quota"
PER_MINUTE = 400
TWO = labs_ray.Cluster(replicas=2, num_cpus=0.25)


def until(condition: Any) -> Any:
    end = time.monotonic() + WAIT_S
    while not (found := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.2)
    return found


def processes(name: str) -> list[psutil.Process]:
    """Return the living workers of Ray that run a class."""
    found = []
    for each in psutil.process_iter():
        try:
            title = " ".join(each.cmdline())
        except psutil.Error:
            continue
        found += [each] if title.startswith("ray::") and name in title else []
    return found


@pytest.fixture(autouse=True, scope="module")
def one_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the workers of pytest-xdist from starting Ray at the same time."""
    with filelock.FileLock(tmp_path_factory.getbasetemp().parent / "ray.lock"):
        yield


@pytest.fixture(scope="module")
def long_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a tiny model whose answers may be long."""
    config = kit.llama()
    config.max_position_embeddings = 200_000
    return kit.save_model(tmp_path_factory.mktemp("ray") / "model", config)


@pytest.fixture(scope="module")
def server(long_folder: Path) -> Iterator[httpx.Client]:
    """Run labs-api with two replicas; yield a client.

    It has to end well on a SIGTERM that Ray's processes get as well.
    """
    settings = {"MODEL": str(long_folder), "TORCH_DTYPE": "fp32", "API_KEYS": f"{KEY},{BOUNDED}"}
    settings |= {"SERVER_REQUESTS_PER_MINUTE": str(PER_MINUTE), "SERVER_DRAIN_S": "5"}
    flags = ("--ray", "--replicas", "2", "--num-cpus", "0.5", "--sticky")
    with program(*flags, **settings) as process:
        first = process.stderr.readline()
        url = re.search(rb"http://[^ ]+", first)
        assert url, first
        assert b"ready, replicas: 2" in process.stderr.readline()
        headers = {"Authorization": f"Bearer {KEY}"}
        with httpx.Client(base_url=url[0].decode(), headers=headers, timeout=WAIT_S) as client:
            yield client
        os.killpg(process.pid, signal.SIGTERM)
        code, output = end_of(process)
    assert code == 0, output
    assert not processes("ServeReplica")


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Run a cluster of two nodes; yield its address."""
    from ray.cluster_utils import Cluster

    cluster = Cluster()
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=1, object_store_memory=100 * 2**20)
        yield cluster.address
    finally:
        cluster.shutdown()


# ---------------------------------------------------------------- online


def metric(client: httpx.Client, name: str) -> dict[str, float]:
    """Return the values of a metric by replica, summed over its other labels."""
    found: dict[str, float] = collections.Counter()
    for line in client.get("/metrics").text.splitlines():
        if line.startswith(name):
            found[re.findall(r'replica="(\w+)"', line)[0]] += float(line.rpartition(" ")[2])
    return found


@pytest.mark.ray
def test_answers_through_serve_have_the_text_of_a_single_process(server, long_folder):
    model = kit.load(long_folder)
    inputs = labs.build_inputs(model, messages=HELLO)
    for more in ({"temperature": 0}, {"temperature": 1, "seed": 7}):
        alone = labs.generate(model, inputs, max_new_tokens=40, **more).text
        body = {"messages": HELLO, "max_tokens": 40, **more}
        stream = server.post(CHAT, json={**body, "stream": True}).text
        *events, (_, last) = kit.events_of(stream.encode())
        assert last == "[DONE]"
        choices = [choice for _, data in events for choice in json.loads(data)["choices"]]
        whole = server.post(CHAT, json=body).json()["choices"][0]["message"]["content"]
        assert "".join(each["delta"].get("content", "") for each in choices) == whole == alone


@pytest.mark.ray
def test_the_other_endpoints_and_keys_are_the_same(server):
    assert httpx.get(server.base_url.join("/v1/models")).status_code == 401
    assert server.get("/v1/models").json()["data"][0]["loaded"] is True
    assert server.get("/readyz").json() == {"status": "ok"}
    assert "<title>labs</title>" in server.get("/").text
    assert server.post("/explain", json={"prompt": "hi"}).json()["how"] == "joins"
    wrong = server.post("/generate", json={"prompt": "hi", "top_q": 1})
    assert (wrong.status_code, "top_q" in wrong.text) == (400, True)


@pytest.mark.ray
def test_a_quota_is_that_of_all_replicas(server):
    headers, began = {"Authorization": f"Bearer {BOUNDED}"}, time.monotonic()
    with ThreadPoolExecutor(8) as pool:
        count = PER_MINUTE + 200
        answers = [pool.submit(server.get, "/v1/models", headers=headers) for _ in range(count)]
        codes = collections.Counter(each.result().status_code for each in answers)
    refilled = PER_MINUTE / 60 * (time.monotonic() - began)
    assert {*codes} <= {200, 429}
    assert PER_MINUTE <= codes[200] <= PER_MINUTE + refilled + 1


@pytest.mark.ray
def test_a_session_stays_with_its_replica_and_metrics_name_the_replicas(server):
    def ask(session: str) -> None:
        body = {"prompt": "hi", "max_new_tokens": 3, **A}
        server.post("/generate", json=body, headers={"X-Session-Id": session})

    before = metric(server, "labs_request_success_total")
    for session in range(12):
        ask(str(session))
    both = metric(server, "labs_request_success_total")
    for _ in range(6):
        ask("mine")
    after = metric(server, "labs_request_success_total")
    assert len(both) == 2
    assert sum(both.values()) - sum(before.values()) == 12
    assert sorted(after[name] - both[name] for name in after) == [0, 6]


@pytest.mark.ray
def test_a_client_that_hangs_up_leaves_no_row_behind(server):
    def running() -> float:
        return sum(metric(server, "labs_num_requests_running").values())

    body = {"prompt": "hi", "max_new_tokens": 150_000, **A}
    for _ in range(2):
        with server.stream("POST", "/generate/stream", json=body) as response:
            events = response.iter_lines()
            until(lambda events=events: next(events).startswith("data: a"))
            until(lambda: running() == 1)
        until(lambda: running() == 0)


@pytest.mark.ray
def test_no_request_is_lost_without_an_error_when_a_replica_dies(server):
    """The last test of the server: one of its two replicas starts again."""

    def ask(number: int) -> tuple[int, str]:
        body = {"prompt": f"story {number}", "max_new_tokens": 3000, **A}
        streams = number % 3 == 0  # requests go to the replicas in turn: each gets both kinds
        answer = server.post("/generate/stream" if streams else "/generate", json=body)
        if answer.status_code != 200 or not streams:
            return answer.status_code, answer.text
        ((kind, data),) = re.findall(r"^event: (\w+)\ndata: (.*)\n\n\Z", answer.text, re.MULTILINE)
        return 200, kind + data * (kind == "error")

    with ThreadPoolExecutor(16) as pool:
        pending = [pool.submit(ask, n) for n in range(16)]
        names = "labs_num_requests_running", "labs_num_requests_waiting"
        until(lambda: sum(sum(metric(server, name).values()) for name in names) == 16)
        processes("ServeReplica:labs:replicas")[0].kill()
        found = [each.result(WAIT_S) for each in pending]
        later = [*pool.map(ask, range(8))]
    lost = [(code, text) for code, text in found if "replica_lost" in text]
    assert {code for code, _ in lost} == {200, 503}
    assert len(lost) < len(found)
    for code, text in [*later, *({*found} - {*lost})]:
        assert code == 200
        assert text == "done" or json.loads(text)["finish_reason"] == "length"
    until(lambda: len(processes("ServeReplica:labs:replicas")) == 2)


def test_serve_run_builds_the_app_from_words():
    two = labs_ray.Cluster(replicas=2, num_gpus=0.5)
    assert labs_ray.cluster_of({"replicas": "2", "num_gpus": "0.5"}) == two
    assert labs_ray.app({"replicas": "2", "num_gpus": "0"})
    fewer, told = {"replicas": 2, "max_replicas": "1"}, "max_replicas = 1 is less than replicas = 2"
    wrong: Any = [({}, "num_gpus"), ({"replica_count": 2}, "replica_count"), (fewer, told)]
    for words, text in (*wrong, ({"replicas": 0}, "replicas")):
        with pytest.raises(labs.ConfigError, match=text):
            labs_ray.app(words)


def test_a_copy_in_a_package_names_its_own_modules_and_errors(tmp_path, monkeypatch):
    (tmp_path / "thing").mkdir()
    (tmp_path / "thing" / "__init__.py").touch()
    labs_vendor.vendor(str(tmp_path / "thing"), ["ray"])
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv(labs_ray.MIDDLEWARES, "")  # what is set below is undone too
    monkeypatch.delenv(labs_ray.MIDDLEWARES)
    copy = importlib.import_module("thing.labs_ray")

    def unreachable(*_: Any, **options: Any) -> None:
        raise RuntimeError("nobody is there")

    monkeypatch.setattr(copy.ray, "init", unreachable)
    for room in (copy, labs_ray):
        text = "^cannot reach Ray at auto: nobody is there$"
        with pytest.raises(room.labs.LabsError, match=text), room.connected("auto"):
            pass
    assert os.environ[copy.MIDDLEWARES] == "thing.labs_ray.middlewares"
    for name in ("labs", "thing.labs", "labs_settings", "thing.labs_settings"):
        assert labs_ray.last_line(f"a frame\n{name}.ModelError: no file") == "no file"


# ---------------------------------------------------------------- offline


def lines(count: int, first: int = 0, new: int = 2) -> str:
    rows = ({"id": f"n{n}", "prompt": str(n), "max_new_tokens": new} for n in range(first, count))
    return "".join(json.dumps(row) + "\n" for row in rows)


def answers(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(row) for each in folder.glob("*.jsonl") for row in each.open()]


def config_of(folder: Path) -> labs.Config:
    return labs.load_config(env={}, overrides={"model_name": str(folder), "torch_dtype": "fp32"})


def answered(
    folder: Path, source: str, target: Path, address: str, **options: Any
) -> labs_jsonl.Tally:
    tally = labs_jsonl.Tally()
    files = labs_ray.Files(source, str(target), **options)
    labs_ray.answer_files(config_of(folder), files, address, TWO, tally)
    return tally


@pytest.mark.ray
def test_every_line_is_answered_once_though_a_process_is_killed(tiny_folder, tmp_path, address):
    (tmp_path / "in" / "more").mkdir(parents=True)
    (tmp_path / "in" / "a.jsonl").write_text(lines(400, new=16))
    (tmp_path / "in" / "more" / "b.jsonl").write_text(lines(600, 400, new=16))
    target, source, killed = tmp_path / "out", f"{tmp_path}/in/**/*.jsonl", list[int]()

    def kill() -> None:
        until(lambda: any(target.glob("*.jsonl")))
        worker = processes("MapWorker")[0]
        worker.kill()
        killed.append(worker.pid)

    killer = threading.Thread(target=kill)
    killer.start()
    answered(tiny_folder, source, target, address, lines=20)
    killer.join()
    assert killed
    found = answers(target)
    assert sorted(row["id"] for row in found) == sorted(f"n{n}" for n in range(600))
    assert not [row for row in found if "error" in row]
    assert not [*target.glob(".*")], "a file was not put in its place"
    (tmp_path / "in" / "c.jsonl").write_text('{"prompt": "hi", "max_new_tokens": 2}\nbroken\n')
    words = ["--model", str(tiny_folder), "--torch-dtype", "fp32", "--ray", address]
    done = invoke("batch", source, str(target), *words)
    assert (done.exit_code, done.stdout) == (1, ""), done.stderr
    assert re.search(r"\[1 answered, 600 before, 1 failed; 2 tokens in ", done.stderr), done.stderr
    assert "Traceback" not in done.stderr
    ids = {row["id"]: "error" in row for row in answers(target)}
    assert len(ids) == 602
    assert (ids["c.jsonl:1"], ids["line c.jsonl:2"]) == (False, True)


@pytest.mark.ray
def test_a_model_that_cannot_be_loaded_is_reported_in_one_sentence(tmp_path, address):
    (tmp_path / "a.jsonl").write_text(lines(3))
    with pytest.raises(labs.ModelError, match=r"config\.json"):
        answered(tmp_path, f"{tmp_path}/a.jsonl", tmp_path / "out", address)


def test_lines_are_those_that_a_single_process_reads(tiny_folder, tmp_path):
    source, target = tmp_path / "a.jsonl", tmp_path / "out"
    first = b'\xef\xbb\xbf{"id": "a",\r "prompt": "hi", "max_new_tokens": 2}\n'
    source.write_bytes(first + b'{"prompt": "hi",\r"max_new_tokens": 2}\n{"prompt": "hi"')
    chunks = [*labs_ray._chunks(str(source), 2)]
    assert [(chunk.first, chunk.count) for chunk in chunks] == [(1, 2), (3, 1)]
    target.mkdir()
    answer = labs_ray.Answers(config_of(tiny_folder), str(target), None)
    done = [answer(msgspec.structs.asdict(chunk)) for chunk in chunks]
    assert [(row["done"], row["failed"]) for row in done] == [(2, 0), (0, 1)]
    assert {row["id"] for row in answers(target)} == {"a", "a.jsonl:2", "line a.jsonl:3"}


def test_answers_stay_when_a_file_grows_or_another_has_its_name(tiny_folder, tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    for place, text in (("a", lines(2)), ("a", lines(4)), ("b", lines(7, 4))):
        (tmp_path / place).mkdir(exist_ok=True)
        (tmp_path / place / "in.jsonl").write_text(text)
        answer = labs_ray.Answers(config_of(tiny_folder), str(target), None)
        for chunk in [*labs_ray._chunks(f"{tmp_path}/{place}/in.jsonl", 50)] * 2:  # tried twice
            answer(msgspec.structs.asdict(chunk))
    assert sorted(row["id"] for row in answers(target)) == [f"n{n}" for n in range(7)]


def test_other_files_in_the_output_folder_and_missing_input_are_refused_before_ray_starts(tmp_path):
    for source in ("-", f"{tmp_path}/nothing.jsonl", f"{tmp_path}/*.jsonl"):
        with pytest.raises(labs.InputError):
            answered(tmp_path, source, tmp_path / "out", "nowhere")
    (tmp_path / "a.jsonl").write_text("")
    tally = answered(tmp_path, f"{tmp_path}/*.jsonl", tmp_path / "out", "nowhere")
    assert (tally.done, tally.failed, answers(tmp_path / "out")) == (0, 0, [])
    (tmp_path / "a.jsonl").write_text(lines(3))
    with pytest.raises(labs.InputError, match="not an answer of labs-gen"):
        answered(tmp_path, f"{tmp_path}/a.jsonl", tmp_path, "nowhere")
