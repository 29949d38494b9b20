# SPDX-License-Identifier: Apache-2.0
"""64 clients of one labs-api at once, for LABS_SOAK_S seconds, by default 60."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import psutil
import pytest
from kit import events_of, program, serving

import labs

CLIENTS, NEW = 64, 24
SECONDS = float(os.environ.get("LABS_SOAK_S", "60"))
pytestmark = pytest.mark.long


def body(client: int) -> dict[str, Any]:
    """Half the clients are greedy, half seeded; no two ask for the same."""
    words = ["fox", "river", "king", "cloud", "music", "bread", "winter", "copper"]
    prompt = f"Tell me about the {words[client % 8]} number {client} in my {words[client // 8]}."
    chance = {"temperature": 0.8, "seed": client, "top_p": 0.95} if client % 2 else {}
    return {"prompt": prompt, "max_new_tokens": NEW, **chance}


@pytest.fixture(scope="module")
def expected(default: labs.Model) -> list[str]:
    """The text of each client when it is alone, computed without any server."""
    texts = []
    for client in range(CLIENTS):
        options = body(client)
        inputs = labs.build_inputs(default, prompt=options.pop("prompt"))
        texts.append(labs.generate(default, inputs, **options).text)
    assert len(set(texts)) == CLIENTS  # so that a text shows whose it is
    return texts


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, psutil.Process]]:
    with program() as process:
        url = serving(process)
        threading.Thread(target=lambda: [None for _ in process.stderr], daemon=True).start()
        yield url, psutil.Process(process.pid)
        process.terminate()
        assert process.wait(60) == 0


def streamed(client: httpx.Client, url: str, number: int, leave: bool) -> str:
    """Return the text of a stream, or "" after hanging up at its first piece."""
    data = b""
    with client.stream("POST", f"{url}/generate/stream", json=body(number)) as response:
        assert response.status_code == 200, response.read()
        for part in response.iter_raw():
            data += part
            if leave and b"data: " in data:
                return ""
    *events, (kind, _) = events_of(data)
    assert (kind, {name for name, _ in events}) == ("done", {"message"})
    return "".join(text for _, text in events)


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
                        answer = client.post(f"{url}/generate", json=body(number))
                        text = answer.json()["text"]
                    else:
                        text = streamed(client, url, number, kind == "leave")
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
