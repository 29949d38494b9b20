# SPDX-License-Identifier: Apache-2.0
"""Prefixes on disk under real servers that are killed, that share a folder, whose disk is full."""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import random
import re
import signal
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import kit
import psutil
import pytest

import labs_prefix_folder

pytestmark = pytest.mark.real
KILLS = 20
# A server that is started again as often as it ends. Its parent has imported what it needs, so a
# start takes a second. Its disk is slow, so that many a file is being written when it is killed.
SUPERVISOR = """
import os, resource, time, torch, safetensors.torch, transformers.models.llama.modeling_llama
import labs_api, labs_cli, labs_prefix_files, labs_serve
torch.set_num_threads(1)
real = os.replace
def slow(*names):
    time.sleep(0.02)
    real(*names)
os.replace = slow
while True:
    child = os.fork()
    if child == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (MOST, MOST))
        labs_cli.main_api()
    os.waitpid(child, 0)
"""
FILE = 132_000  # about the bytes of one file of the tiny model in float32
RULES = "Answer in one short sentence. " * 20
PROMPTS = [f"{RULES if n % 2 else n}{f'{n} rivers, ' * 60}" for n in range(8)]


class Server:
    """A server with its supervisor. url: of the one that runs now."""

    def __init__(self, process: Any) -> None:
        self.process, self.url, self.log = process, "", b""

    def wait(self) -> None:
        """Wait until the next server is ready; the log of the one before comes first."""
        self.url = ""
        while line := self.process.stderr.readline():
            self.log += line
            found = re.search(rb"http://[^ ]+", line)
            self.url = found[0].decode() if found else self.url
            if self.url and b"ready" in line:
                return
        raise AssertionError(self.log.decode())

    def ask(self, prompt: str) -> tuple[str, int]:
        """Return the answer and the tokens that were cached. Raises TransportError if killed."""
        body = {"prompt": prompt, "max_new_tokens": 8, "temperature": 0}
        answer = httpx.post(f"{self.url}/generate", json=body, timeout=kit.WAIT_S)
        assert answer.status_code == 200, answer.text
        return answer.json()["text"], answer.json()["usage"]["cached_tokens"]

    def kill(self) -> None:
        (child,) = psutil.Process(self.process.pid).children()
        child.send_signal(signal.SIGKILL)


@contextlib.contextmanager
def server(folder: Path, limit: int = -1, **settings: str) -> Iterator[Server]:
    code = ["-c", SUPERVISOR.replace("MOST", str(limit))]
    cache = os.path.abspath("cache")
    settings = {"MODEL": str(folder), "CACHE_DIR": cache, "TORCH_DTYPE": "fp32"} | settings
    with kit.program(code=code, **settings) as process:
        found = Server(process)
        try:
            found.wait()
            yield found
        finally:
            os.killpg(process.pid, signal.SIGKILL)  # the server too; the session is its own


def kept() -> list[tuple[Path, os.stat_result]]:
    return labs_prefix_folder.listed(labs_prefix_folder.place("cache"))


@pytest.fixture(scope="module")
def expected(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The answers of a server that keeps no prefixes on disk."""
    place = tmp_path_factory.mktemp("plain")  # made before the folder of a test
    with contextlib.chdir(place), server(tiny_folder) as plain:
        found = {prompt: plain.ask(prompt)[0] for prompt in PROMPTS}
    assert len({*found.values()}) == len(PROMPTS)
    return found


def torn() -> set[Path]:
    return {path for path, _ in kept() if path.suffix == labs_prefix_folder.TORN}


def some(ask: Any, prompts: list[str]) -> list[tuple[str, str, int]]:
    """Ask together; return each prompt with its answer, without those that were cut off."""
    with concurrent.futures.ThreadPoolExecutor(len(prompts)) as pool:
        futures = [(prompt, pool.submit(ask, prompt)) for prompt in prompts]
    done = [(prompt, each) for prompt, each in futures if each.exception() is None]
    lost = [each.exception() for _, each in futures if each.exception() is not None]
    assert all(isinstance(error, httpx.TransportError) for error in lost), lost
    return [(prompt, *each.result()) for prompt, each in done]


def test_twenty_kills_of_two_servers_on_one_folder_leave_no_wrong_text(expected, tiny_folder):
    chance, most, counts, halves = random.Random(5), 10 * FILE, list[int](), set[Path]()
    settings = {"SERVER_PREFIX_DISK_BYTES": str(most)}
    with server(tiny_folder, **settings) as first, server(tiny_folder, **settings) as second:
        for number in range(KILLS):
            victim, other = (first, second) if number % 2 else (second, first)
            prompts, before, began = chance.sample(PROMPTS, 4), torn(), time.monotonic()
            with concurrent.futures.ThreadPoolExecutor(2) as pool:
                futures = [pool.submit(some, each.ask, prompts) for each in (victim, other)]
                while torn() <= before and time.monotonic() < began + 1:
                    time.sleep(0.002)  # until one of them writes
                time.sleep(chance.random() / 50)
                victim.kill()
            assert len(futures[1].result()) == len(prompts)  # of the one that was not killed
            victim.wait()
            found = [each for future in futures for each in future.result()]
            for prompt, text, count in [*found, *some(victim.ask, prompts[:1])]:
                assert text == expected[prompt], (number, prompt)
                counts.append(count)
            halves |= torn()
        size = sum(state.st_size for path, state in kept() if path not in halves)
        assert size <= 4 * most  # each counts the other's files once a minute
        assert b"Traceback" not in first.log + second.log
    print(f"{len(counts)} answers, {sum(counts)} tokens from files, {len(halves)} torn files")
    assert len(counts) >= 5 * KILLS
    assert sum(counts)
    assert halves
    assert {stat.S_IMODE(state.st_mode) for _, state in kept()} == {0o600}


def test_a_full_disk_costs_a_warning_and_no_answer(expected, tiny_folder):
    with server(tiny_folder, FILE // 2, SERVER_PREFIX_DISK_BYTES=str(2**30)) as full:
        for prompt in [*PROMPTS, *PROMPTS]:
            assert full.ask(prompt)[0] == expected[prompt]
        assert kept() == []
        full.kill()
        full.wait()  # which reads the log
        assert full.ask(PROMPTS[0]) == (expected[PROMPTS[0]], 0)
    assert full.log.count(b"prefixes are not kept on disk for a minute") == 1, full.log.decode()
    assert b"Traceback" not in full.log
