# SPDX-License-Identifier: Apache-2.0
"""Parts that ask servers over HTTP."""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import os
import random
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator

import common
import httpx
from common import PAIRS, WORDS, Served, api_command, compare, median_p95, serve_command, stories

import labs


@contextlib.contextmanager
def started(*commands: list[str], port: int = 8431) -> Iterator[list[Served]]:
    """Start a server for each command, at ports from `port` on; end them at the end."""
    found: list[Served] = []
    try:
        for number, command in enumerate(commands, port):
            found.append(Served(command, number, model_folder()))
        yield found
    finally:
        for server in found:
            server.process.terminate()


@functools.cache
def model_folder() -> str:
    spec = labs.load_config(env={}).model
    return str(labs.locate(spec, labs.device_of(spec)[2])[0])


def serving() -> None:
    """Clients over HTTP: labs-api against `transformers serve`, alone and together."""
    draw, short, folder = random.Random(3), stories(), model_folder()
    long = [f"Go on with this: {' '.join(draw.choices(WORDS, k=480))}" for _ in short]
    others = serve_command(folder), serve_command(folder, "--continuous-batching")
    with started(api_command(folder), *others) as (mine, plain, together):
        for name, texts, other in (
            ("1 client / transformers serve", short[:1], plain),
            ("16 clients / its continuous batching", short, together),
            ("16 clients x 512 tokens / its continuous batching", long, together),
        ):
            mine.first.clear(), other.first.clear()
            rates = (functools.partial(server.rate, texts) for server in (mine, other))
            compare(name, *rates)
            print(f"{'  time to first token, p95, s':58} {mine.p95():8.2f} {other.p95():8.2f}")


def overhead() -> None:
    """labs-api with more or fewer clients, and against stream_batch in process."""
    (model, _), texts = common.load(), stories()
    inputs = [labs.build_inputs(model, prompt=text) for text in texts]
    with started(api_command(model_folder()), port=8435) as (server,):
        rate_of = functools.partial(functools.partial, server.rate)
        compare("8 clients / 1 client, both labs", rate_of(texts[:8]), rate_of(texts[:1]))
        in_process = functools.partial(
            common.batch_rate, model, inputs, 16, max_new_tokens=common.NEW
        )
        compare("16 clients / stream_batch in process", rate_of(texts), in_process)


def ray() -> None:
    """Ray Serve beside labs-api alone; two full replicas beside one. Each has a core."""
    os.environ["OMP_NUM_THREADS"] = "1"
    texts, command = stories(32), [*api_command(model_folder()), "--max-batch-rows", "8"]
    with started([*command, "--ray"], port=8436) as (one,):
        with started(command, port=8437) as (alone,):
            pairs = [(one.rate(texts[:1]), alone.rate(texts[:1])) for _ in range(PAIRS)]
        common.report("1 stream, 1 replica / labs-api", pairs)
        lags = [1000 / serve - 1000 / plain for serve, plain in pairs]
        print(f"{'  what Serve adds to a token, ms':58} {statistics.median(lags):8.2f}")
        with started([*command, "--ray", "--replicas", "2"], port=8438) as (two,):
            rates = (functools.partial(server.rate, texts, server.whole) for server in (two, one))
            compare("32 answers, 8 rows a replica, 2 replicas / 1", *rates)


def hang_up(server: Served, path: str, wait_s: float, new: int = 400) -> None:
    """Send a request over a plain socket and close it after wait_s seconds."""
    body = f'{{"prompt": "Tell me a long story.", "max_new_tokens": {new}}}'.encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    port = int(server.url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        time.sleep(wait_s)


def unfinished(server: Served) -> int:
    """Return the number of requests that run or wait, from /metrics."""
    text = httpx.get(f"{server.url}/metrics").text
    names = ("labs_num_requests_running{", "labs_num_requests_waiting{")
    return sum(int(float(x.split()[-1])) for x in text.splitlines() if x.startswith(names))


def freed(server: Served, path: str) -> float:
    """Return the seconds from a client's hanging up until no request is left."""
    hang_up(server, path, 0.5)
    began = time.perf_counter()
    while unfinished(server):
        time.sleep(0.002)
    return time.perf_counter() - began


# In a process of its own: the clients' threads would make it wait.
PROBE = """
import http.client, sys, time
host = sys.argv[1].removeprefix("http://")
for _ in range(300):
    began = time.perf_counter()
    connection = http.client.HTTPConnection(host)
    connection.request("GET", "/health")
    assert connection.getresponse().read() == b'{"status":"ok"}'
    print(time.perf_counter() - began)
    time.sleep(0.02)
"""


def manners() -> None:
    """labs-api with clients that leave, and full."""
    command = [*api_command(model_folder()), "--max-waiting", "200"]
    with started(command, port=8434) as (server,):
        for path in ("/generate/stream", "/generate"):  # 0.5 s later: in the middle of decoding
            times = [freed(server, path) for _ in range(20)]
            median_p95(f"a client of {path} hangs up: row free after", times)
        for name, count in (("alone", 0), ("after 200 abandoned requests", 200)):
            median_p95(f"time to first token, {name}", after_abandoned(server, count))
        texts = [f"Tell me a long story about {topic}." for topic in WORDS * 12]
        with concurrent.futures.ThreadPoolExecutor(len(texts)) as pool:
            asked = [pool.submit(server.ask, text, 100) for text in texts]
            time.sleep(2)
            run = [sys.executable, "-c", PROBE, server.url]
            probes = subprocess.run(run, capture_output=True, check=True, text=True).stdout
            print(f"({sum(not each.done() for each in asked)} clients were still there at the end)")
    times = sorted(map(float, probes.split()))
    median_p95(f"/health beside {len(texts)} clients, {len(times)} probes", times)
    print(f"{'  p99':58} {times[int(0.99 * len(times))] * 1000:13.1f} ms")


def after_abandoned(server: Served, count: int) -> list[float]:
    """Return times to the first token, 20 times after `count` clients left at once after 1 s."""
    found: list[float] = []
    for _ in range(20):
        with concurrent.futures.ThreadPoolExecutor(200) as pool:
            list(pool.map(lambda _: hang_up(server, "/generate/stream", 1.0), range(count)))
        server.first.clear()
        server.ask("Hello!", 2)
        found += server.first
    return found
