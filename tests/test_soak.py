# SPDX-License-Identifier: Apache-2.0
"""64 clients of one labs-api at once, for LABS_SOAK_S seconds: 60 unless said."""

from __future__ import annotations

import faulthandler
import os
import random
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import psutil
import pytest

import labs

CLIENTS, NEW = 64, 24
SECONDS = float(os.environ.get("LABS_SOAK_S", "60"))
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def watch(request: pytest.FixtureRequest) -> Iterator[None]:
    """Show each thread's stack only where the run hangs: pytest would after a fixed time."""
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        terminal = os.fdopen(os.dup(2), "w")
    with terminal:
        faulthandler.dump_traceback_later(SECONDS + 600, file=terminal)
        yield
        faulthandler.cancel_dump_traceback_later()


def body(client: int) -> dict[str, Any]:
    """Half the clients are greedy, half seeded; no two ask for the same."""
    words = ["fox", "river", "king", "cloud", "music", "bread", "winter", "copper"]
    prompt = f"Tell me about the {words[client % 8]} number {client} in my {words[client // 8]}."
    chance = {"temperature": 0.8, "seed": client, "top_p": 0.95} if client % 2 else {}
    return {"prompt": prompt, "max_new_tokens": NEW, **chance}


@pytest.fixture(scope="module")
def expected() -> list[str]:
    """The text of each client when it is alone, computed without any server."""
    model = labs.load_model(labs.load_config(env={}))
    texts = []
    for client in range(CLIENTS):
        asked = body(client)
        inputs = labs.build_inputs(model, prompt=asked.pop("prompt"))
        texts.append(labs.generate(model, inputs, **asked).text)
    labs.load_model.cache_clear()
    assert len(set(texts)) == CLIENTS  # so that a text tells whose it is
    return texts


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, psutil.Process]]:
    process = subprocess.Popen(
        [sys.executable, "-c", "import labs_cli; labs_cli.main_api()", "--port", "0"],
        stderr=subprocess.PIPE,
        text=True,
    )
    lines = iter(process.stderr or ())
    url = next(found[0] for line in lines if (found := re.search(r"http://\S+", line)))
    next(line for line in lines if "ready" in line)
    threading.Thread(target=lambda: [None for _ in lines], daemon=True).start()
    yield url, psutil.Process(process.pid)
    process.terminate()
    assert process.wait(60) == 0


def streamed(client: httpx.Client, url: str, asked: dict[str, Any], leave: bool) -> str:
    """Return the text of a stream, or "" after hanging up at its first piece."""
    lines: list[str] = []
    with client.stream("POST", f"{url}/generate/stream", json=asked) as response:
        assert response.status_code == 200, response.read()
        for line in response.iter_lines():
            if line == "event: done":
                break
            assert not line.startswith("event:"), line
            lines.append(line)
            if leave and line.startswith("data: "):
                return ""
    events = "\n".join(lines).split("\n\n")
    data = ("\n".join(re.findall(r"^data: (.*)$", event, re.MULTILINE)) for event in events)
    return "".join(data)


def test_each_client_gets_its_own_text_for_as_long_as_it_asks(expected: Any, server: Any) -> None:
    url, process = server
    end = time.monotonic() + SECONDS
    wrong: list[str] = []
    answers = [0] * CLIENTS
    memory: list[int] = []

    def ask_on(number: int) -> None:
        draw = random.Random(number)
        with httpx.Client(timeout=120) as client:
            while time.monotonic() < end:
                kind = draw.choice(["whole", "stream", "leave"])
                try:
                    if kind == "whole":
                        text = client.post(f"{url}/generate", json=body(number)).json()["text"]
                    else:
                        text = streamed(client, url, body(number), kind == "leave")
                except Exception as error:
                    wrong.append(f"client {number}, {kind}: {error!r}")
                    return
                if kind != "leave" and text != expected[number]:
                    wrong.append(f"client {number}, {kind}: {text!r} is not {expected[number]!r}")
                answers[number] += 1

    threads = [threading.Thread(target=ask_on, args=(number,)) for number in range(CLIENTS)]
    for thread in threads:
        thread.start()
    while time.monotonic() < end:
        time.sleep(1)
        memory.append(process.memory_info().rss)
    for thread in threads:
        thread.join()
    settled, last = max(memory[: len(memory) // 4 or 1]), max(memory[-10:])
    print(f"{sum(answers)} answers; memory {settled / 1e6:.0f} MB, at the end {last / 1e6:.0f} MB")
    assert wrong == []
    assert min(answers) > 0
    assert last < 1.05 * settled
