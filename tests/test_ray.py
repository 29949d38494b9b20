"""Tests of labs_ray.py: true clusters on this machine, replicas that are killed, processes that
share a model."""

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

import httpx
import kit
import msgspec
import psutil
import pytest
from kit import CHAT, A, end_of, labs_gen, program

import labs
import labs_jsonl
import labs_ray
import labs_vendor

WAIT_S = 120
KEY = "one-key-that-is-long-enough"
BOUNDED = "another-key-for-the-test-of-the-quota"
PER_MINUTE = 600
HEADERS = {"Authorization": f"Bearer {KEY}"}
TWO = labs_ray.Cluster(replicas=2)


def until(condition: Any, wait_s: float = WAIT_S) -> Any:
    end = time.monotonic() + wait_s
    while not (found := condition()):
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.1)
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


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a tiny model whose answers may be long."""
    config = kit.llama()
    config.max_position_embeddings = 200_000
    return kit.save_model(tmp_path_factory.mktemp("ray") / "model", config)


@pytest.fixture(scope="module")
def model(folder: Path) -> labs.Model:
    return kit.load(folder)


def test_a_cluster_that_is_not_there_is_told_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(lines(3))
    with pytest.raises(labs.LabsError, match="cannot reach Ray at auto"):
        answered(tmp_path, f"{tmp_path}/a.jsonl", tmp_path / "out", "auto")


# ---------------------------------------------------------------- online


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Any]:
    """Run labs-api with two replicas; it has to end well on a SIGTERM that Ray gets as well."""
    settings = {
        "MODEL": str(folder),
        "TORCH_DTYPE": "fp32",
        "API_KEYS": f"{KEY},{BOUNDED}",
        "SERVER_REQUESTS_PER_MINUTE": str(PER_MINUTE),
        "SERVER_DRAIN_S": "5",
    }
    with program(
        "--ray", "--replicas", "2", "--num-cpus", "0.5", "--sticky", **settings
    ) as process:
        first = process.stderr.readline()
        url = re.search(rb"http://[^ ]+", first)
        assert url, first
        assert b"ready, replicas: 2" in process.stderr.readline()
        with httpx.Client(base_url=url[0].decode(), headers=HEADERS, timeout=WAIT_S) as client:
            yield client
        os.killpg(process.pid, signal.SIGTERM)
        code, said = end_of(process)
    assert code == 0, said
    assert not processes("ServeReplica")


def metric(client: httpx.Client, name: str) -> dict[str, float]:
    """Return the values of a metric by replica, summed over its other labels."""
    found: dict[str, float] = collections.Counter()
    for line in client.get("/metrics").text.splitlines():
        if line.startswith(name):
            found[re.findall(r'replica="(\w+)"', line)[0]] += float(line.rpartition(" ")[2])
    return found


def text_of(stream: str) -> str:
    data = [line[6:] for line in stream.splitlines() if line.startswith("data: {")]
    chunks = [json.loads(each) for each in data]
    return "".join(choice["delta"].get("content", "") for c in chunks for choice in c["choices"])


@pytest.mark.parametrize("more", [{"temperature": 0}, {"temperature": 1, "seed": 7}])
def test_a_stream_through_serve_has_the_text_of_a_single_process(
    server: httpx.Client, model: labs.Model, more: dict[str, Any]
) -> None:
    inputs = labs.build_inputs(model, messages=[{"role": "user", "content": "hi"}])
    alone = labs.generate(model, inputs, max_new_tokens=40, **more).text
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 40, **more}
    streamed = server.post(CHAT, json={**body, "stream": True}).text
    assert streamed.endswith("data: [DONE]\n\n")
    whole = server.post(CHAT, json=body).json()["choices"][0]["message"]["content"]
    assert [text_of(streamed), whole] == [alone] * 2


def test_events_come_while_the_answer_is_being_made(server: httpx.Client) -> None:
    body = {"prompt": "hi", "max_new_tokens": 1500, **A}
    began = time.monotonic()
    with server.stream("POST", "/generate/stream", json=body) as response:
        times = [time.monotonic() - began for line in response.iter_lines() if line]
    assert len(times) > 1500
    assert times[10] < times[-1] / 2


def test_the_other_endpoints_are_the_same(server: httpx.Client) -> None:
    assert server.get("/v1/models").json()["data"][0]["loaded"] is True
    assert server.get("/readyz").json() == {"status": "ok"}
    assert "<title>labs</title>" in server.get("/").text
    told = server.post("/explain", json={"prompt": "hi"}).json()
    assert told["how"] == "joins"
    wrong = server.post("/generate", json={"prompt": "hi", "top_q": 1})
    assert (wrong.status_code, "top_q" in wrong.text) == (400, True)


def test_keys_hold_and_a_quota_is_that_of_all_replicas(server: httpx.Client) -> None:
    assert httpx.get(server.base_url.join("/v1/models")).status_code == 401
    headers, began = {"Authorization": f"Bearer {BOUNDED}"}, time.monotonic()
    with ThreadPoolExecutor(8) as pool:
        asked = [
            pool.submit(server.get, "/v1/models", headers=headers) for _ in range(PER_MINUTE + 400)
        ]
        codes = collections.Counter(each.result().status_code for each in asked)
    refilled = PER_MINUTE / 60 * (time.monotonic() - began)
    assert {*codes} == {200, 429}
    assert PER_MINUTE <= codes[200] <= PER_MINUTE + refilled + 1


def test_a_session_stays_with_its_replica_and_metrics_tell_them_apart(server: httpx.Client) -> None:
    before = metric(server, "labs_request_success_total")
    body = {"prompt": "hi", "max_new_tokens": 3, **A}
    for session in range(12):
        server.post("/generate", json=body, headers={"X-Session-Id": str(session)})
    both = metric(server, "labs_request_success_total")
    assert len(both) == 2
    for _ in range(6):
        server.post("/generate", json=body, headers={"X-Session-Id": "mine"})
    after = metric(server, "labs_request_success_total")
    assert sum(both.values()) - sum(before.values()) == 12
    assert sorted(after[name] - both[name] for name in after) == [0, 6]


def running(server: httpx.Client) -> float:
    return sum(metric(server, "labs_num_requests_running").values())


def test_who_hangs_up_leaves_no_row_behind(server: httpx.Client) -> None:
    body = {"prompt": "hi", "max_new_tokens": 150_000, **A}
    for _ in range(3):
        with server.stream("POST", "/generate/stream", json=body) as response:
            events = response.iter_lines()
            until(lambda events=events: next(events).startswith("data: a"))
            until(lambda: running(server) == 1)
        until(lambda: running(server) == 0)


def test_no_request_is_lost_without_an_error_when_a_replica_dies(server: httpx.Client) -> None:
    """The last test of the server: one of its two replicas begins anew."""

    def stream(number: int) -> tuple[int, str]:
        body = {"prompt": f"story {number}", "max_new_tokens": 3000, **A}
        answer = server.post("/generate/stream", json=body)
        if answer.status_code != 200:  # its replica died before the first byte
            return answer.status_code, answer.text
        ends = re.findall(r"^event: (\w+)\ndata: (.*)\n\n\Z", answer.text, re.MULTILINE)
        return 200, ends[0][0] + ends[0][1] * (ends[0][0] == "error")

    def whole(number: int) -> tuple[int, str]:
        answer = server.post("/generate", json={"prompt": f"tale {number}", **A, **SLOW})
        return answer.status_code, answer.text

    SLOW = {"max_new_tokens": 3000}
    with ThreadPoolExecutor(32) as pool:
        asked = [pool.submit(stream if n % 2 else whole, n) for n in range(16)]
        until(lambda: min(metric(server, "labs_num_requests_running").values()) >= 2)
        processes("ServeReplica:labs:replicas")[0].kill()
        found = [each.result(WAIT_S) for each in asked]
        later = [pool.submit(stream if n % 2 else whole, n) for n in range(8)]
        answered = [each.result(WAIT_S) for each in later]
    lost = [(code, text) for code, text in found if "replica_lost" in text]
    assert {code for code, _ in lost} == {200, 503}
    assert len(lost) < len(found)
    for code, text in [*answered, *({*found} - {*lost})]:
        assert code == 200
        assert text == "done" or json.loads(text)["finish_reason"] == "length"
    until(lambda: len(processes("ServeReplica:labs:replicas")) == 2)


def test_serve_run_builds_it_from_words() -> None:
    assert labs_ray.cluster_of({"replicas": "2", "num_gpus": "0.5"}) == labs_ray.Cluster(
        replicas=2, num_gpus=0.5
    )
    assert labs_ray.app({"replicas": "2", "num_gpus": "0"})
    with pytest.raises(labs.ConfigError, match="num_gpus"):
        labs_ray.app({})
    with pytest.raises(labs.ConfigError, match="replica_count"):
        labs_ray.app({"replica_count": 2})
    with pytest.raises(labs.ConfigError, match="replicas"):
        labs_ray.app({"replicas": 0})
    with pytest.raises(labs.ConfigError, match="max_replicas = 1 is less than replicas = 2"):
        labs_ray.app({"replicas": 2, "max_replicas": "1"})


def test_a_copy_in_a_package_names_its_own_modules_and_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "thing").mkdir()
    (tmp_path / "thing" / "__init__.py").touch()
    labs_vendor.vendor(str(tmp_path / "thing"), ["ray"])
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv(labs_ray.MIDDLEWARES, "")  # what is set below is undone too
    monkeypatch.delenv(labs_ray.MIDDLEWARES)
    copy = importlib.import_module("thing.labs_ray")
    monkeypatch.setattr(copy.ray, "init", unreachable)
    with pytest.raises(copy.labs.LabsError, match="cannot reach Ray"), copy.connected("auto"):
        pass
    assert os.environ[copy.MIDDLEWARES] == "thing.labs_ray.middlewares"
    for name in ("labs", "thing.labs", "labs_settings", "thing.labs_settings"):
        assert labs_ray.last_line(f"a frame\n{name}.ModelError: no file") == "no file"


def unreachable(*_: Any, **options: Any) -> None:
    raise RuntimeError("nobody is there")


# ---------------------------------------------------------------- offline


@pytest.fixture(scope="module")
def nodes() -> Iterator[str]:
    """Run a cluster of two nodes; return its address."""
    from ray.cluster_utils import Cluster

    cluster = Cluster()
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=1, object_store_memory=100 * 2**20)
        yield cluster.address
    finally:
        cluster.shutdown()


def lines(count: int, first: int = 0) -> str:
    rows = ({"id": f"n{n}", "prompt": str(n), "max_new_tokens": 2} for n in range(first, count))
    return "".join(json.dumps(row) + "\n" for row in rows)


def answers(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(row) for each in folder.glob("*.jsonl") for row in each.open()]


def answered(
    folder: Path, source: str, target: Path, address: str, **options: Any
) -> labs_jsonl.Tally:
    config = labs.load_config(env={}, overrides={"model_name": str(folder), "torch_dtype": "fp32"})
    tally = labs_jsonl.Tally()
    files = labs_ray.Files(source, str(target), **options)
    labs_ray.answer_files(config, files, address, TWO, tally)
    return tally


def test_every_line_is_answered_once_though_a_process_is_killed(
    folder: Path, tmp_path: Path, nodes: str
) -> None:
    (tmp_path / "in" / "more").mkdir(parents=True)
    (tmp_path / "in" / "a.jsonl").write_text(lines(1200))
    (tmp_path / "in" / "more" / "b.jsonl").write_text(lines(2000, 1200))
    target, source = tmp_path / "out", f"{tmp_path}/in/**/*.jsonl"

    def kill() -> None:
        until(lambda: any(target.glob("*.jsonl")))
        processes("MapWorker")[0].kill()

    killer = threading.Thread(target=kill)
    killer.start()
    answered(folder, source, target, nodes, lines=50)
    killer.join()
    found = answers(target)
    assert sorted(row["id"] for row in found) == sorted(f"n{n}" for n in range(2000))
    assert not [row for row in found if "error" in row]
    assert not [*target.glob(".*")], "a file was not put in its place"
    (tmp_path / "in" / "c.jsonl").write_text('{"prompt": "hi", "max_new_tokens": 2}\nbroken\n')
    again = answered(folder, source, target, f"{nodes}", lines=1000)
    assert (again.done, again.failed, again.skipped) == (1, 1, 2000)
    ids = {row["id"]: "error" in row for row in answers(target)}
    assert len(ids) == 2002
    assert (ids["c.jsonl:1"], ids["line c.jsonl:2"]) == (False, True)


def test_the_command_answers_a_folder_and_goes_on(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_text(lines(30))
    words = ["--model", str(folder), "--torch-dtype", "fp32", "--ray", "--input", "in"]
    done = labs_gen(*words, "--output", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout == b""
    assert b"[30 answered, 0 failed; 60 tokens in " in done.stderr
    assert b"Traceback" not in done.stderr
    assert sorted(row["id"] for row in answers(tmp_path / "out")) == sorted(
        f"n{n}" for n in range(30)
    )


def test_lines_are_those_that_a_single_process_reads(folder: Path, tmp_path: Path) -> None:
    source, target = tmp_path / "a.jsonl", tmp_path / "out"
    first = b'\xef\xbb\xbf{"id": "a",\r "prompt": "hi", "max_new_tokens": 2}\n'
    source.write_bytes(first + b'{"prompt": "hi",\r"max_new_tokens": 2}\n{"prompt": "hi"')
    config = labs.load_config(env={}, overrides={"model_name": str(folder), "torch_dtype": "fp32"})
    chunks = [*labs_ray._chunks(str(source), 2)]
    assert [(chunk.first, chunk.count) for chunk in chunks] == [(1, 2), (3, 1)]
    target.mkdir()
    answer = labs_ray.Answers(config, str(target), None)
    done = [answer(msgspec.structs.asdict(chunk)) for chunk in chunks]
    assert [(row["done"], row["failed"]) for row in done] == [(2, 0), (0, 1)]
    assert {row["id"] for row in answers(target)} == {"a", "a.jsonl:2", "line a.jsonl:3"}


def test_a_model_that_cannot_be_loaded_is_told_in_one_sentence(tmp_path: Path, nodes: str) -> None:
    (tmp_path / "a.jsonl").write_text(lines(3))
    with pytest.raises(labs.ModelError, match=r"config\.json"):
        answered(tmp_path, f"{tmp_path}/a.jsonl", tmp_path / "out", nodes)


def test_what_is_no_answer_in_the_folder_is_told_before_anything_runs(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(lines(3))
    with pytest.raises(labs.InputError, match="no answer of labs-gen"):
        answered(tmp_path, f"{tmp_path}/a.jsonl", tmp_path, "nowhere")


def test_what_is_answered_stays_when_a_file_grows_or_another_has_its_name(
    folder: Path, tmp_path: Path
) -> None:
    target = tmp_path / "out"
    target.mkdir()
    config = labs.load_config(env={}, overrides={"model_name": str(folder), "torch_dtype": "fp32"})
    for place, text in (("a", lines(2)), ("a", lines(4)), ("b", lines(7, 4))):
        (tmp_path / place).mkdir(exist_ok=True)
        (tmp_path / place / "in.jsonl").write_text(text)
        answer = labs_ray.Answers(config, str(target), None)
        for chunk in [*labs_ray._chunks(f"{tmp_path}/{place}/in.jsonl", 50)] * 2:  # tried twice
            answer(msgspec.structs.asdict(chunk))
    assert sorted(row["id"] for row in answers(target)) == [f"n{n}" for n in range(7)]


def test_files_without_lines_are_answered_by_none(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("")
    tally = answered(tmp_path, f"{tmp_path}/*.jsonl", tmp_path / "out", "nowhere")
    assert (tally.done, tally.failed, answers(tmp_path / "out")) == (0, 0, [])


@pytest.mark.parametrize("source", ["nothing.jsonl", "*.jsonl", "-"])
def test_files_that_are_not_there_are_told(tmp_path: Path, source: str) -> None:
    where = source if source == "-" else f"{tmp_path}/{source}"
    with pytest.raises(labs.InputError):
        answered(tmp_path, where, tmp_path / "out", "nowhere")
