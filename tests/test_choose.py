# SPDX-License-Identifier: Apache-2.0
"""Choices: equal to a whole forward of each option for all types of models, in bounded parts."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import threading
from collections.abc import Callable, Iterator
from typing import Any

import kit
import pytest
import torch
from kit import Live, configured, error_of, request, until
from msgspec.structs import replace

import labs
import labs_choose
import labs_decode
import labs_engine
import labs_prefixes
import labs_typed

TEXTS = ["a", "bcd", "a much longer option than all of the others", "bce"]
ENDS = frozenset({7, 250})
PROMPT = "Which of them? " * 6
NAMES = [*kit.ARCHITECTURES, *kit.DULL]


@functools.cache
def model_of(kind: str) -> labs.Model:
    decoder = kit.prepare(kit.random_model(kind, vocab_size=262))
    return replace(kit.model_around(decoder, kind), eos_token_ids=ENDS)


def ask(text: str = PROMPT) -> labs.Inputs:
    return labs.Inputs(tuple(text.encode()), text)


@torch.inference_mode()
def exact(model: Any, prompt: tuple[int, ...], texts: list[str]) -> list[float]:
    """Compute each option in a separate forward call of transformers alone."""
    totals = []
    for text in texts:
        ids = [*prompt, *text.encode()]
        lines = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
        after = range(len(prompt), len(ids))
        end = lines[-1, sorted(ENDS)].logsumexp(-1)
        totals.append(sum(lines[at - 1, ids[at]] for at in after) + end)
    return torch.stack(totals).softmax(-1).tolist()


def passes(choice: labs_choose.Options, inputs: labs.Inputs, prefixes: Any = None) -> int:
    """Compute a choice; return the number of its parts."""
    row = labs.open_request(choice.model, 0, inputs, choice.generation()).row
    return sum(1 for _ in choice.parts(row, prefixes))


# ---------------------------------------------------------------- probabilities


@pytest.mark.parametrize("kind", NAMES)
def test_a_choice_has_the_probabilities_that_transformers_gives(kind, monkeypatch):
    monkeypatch.setattr(labs_decode, "CHUNK", 32)
    expected = exact(kit.random_model(kind, vocab_size=262), ask().input_ids, TEXTS)
    for logits in (2**24, 9 * 262):
        monkeypatch.setattr(labs_choose, "LOGITS", logits)
        found = labs_typed.choose(model_of(kind), ask(), TEXTS)
        assert [*found] == TEXTS
        assert [*found.values()] == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_a_choice_does_not_depend_on_stored_prefixes(monkeypatch):
    monkeypatch.setattr(labs_decode, "CHUNK", 16)
    store, made = labs_prefixes.Prefixes(2**30), model_of("llama")
    varying = dataclasses.replace(made.decoder, invariant=False)  # it stores all columns
    model = replace(made, decoder=varying)
    choices = [labs_choose.Options(model, ask(), TEXTS) for _ in range(3)]
    first = passes(choices[0], ask(), store)
    assert store.kept
    row = labs.open_request(model, 0, ask(), choices[1].generation()).row
    assert sum(1 for _ in choices[1].parts(row, store)) < first
    assert row.cached == len(PROMPT) // 16 * 16  # the columns of whole chunks
    passes(choices[2], ask())
    assert choices[0].shares == choices[1].shares == choices[2].shares


def test_each_token_is_computed_once_and_no_part_has_more_logits_than_the_bound(monkeypatch):
    monkeypatch.setattr(labs_choose, "LOGITS", 20 * 262)
    seen: list[tuple[int, int]] = []
    texts = ["x" * 100, "y" * 90, *(f"option {n}" for n in range(20))]

    def look(words: Any, output: Any) -> None:
        seen.append((words["input_ids"].numel(), output.logits.numel()))

    with kit.hooked(model_of("llama"), look):
        labs_typed.choose(model_of("llama"), ask(), texts)
    tokens, logits = zip(*seen, strict=True)
    assert sum(tokens) == len(ask().input_ids) + sum(map(len, texts))
    assert max(logits) <= 20 * 262


# ---------------------------------------------------------------- refusals


REFUSED = dict.fromkeys(("", "one", "a a", "a "), "two or more different")
REFUSED[f"a {'b' * 5000}"] = "maximum context length is"
REFUSED[" ".join(f"{n}{'x' * 151}" for n in range(4))] = "608 tokens together, at most 512"


@pytest.mark.parametrize(("words", "named"), REFUSED.items())
def test_options_that_cannot_be_computed_are_refused(words, named, monkeypatch):
    monkeypatch.setattr(labs_choose, "OPTION_TOKENS", 500)
    with pytest.raises(labs.InputError, match=named):
        labs_typed.choose(model_of("llama"), ask("hi"), words.split(" ") if words else [])


def test_an_option_with_a_token_beyond_the_embedding_is_refused_by_name():
    model = replace(model_of("llama"), tokenizer=lambda text, **_: {"input_ids": [5, 262]})
    with pytest.raises(labs.InputError, match="token 262"):
        labs_choose.Options(model, ask(), ["a", "b"])


@pytest.mark.parametrize("kind", ["llama", "mamba2", "rwkv"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_an_error(kind, value):
    spoiled = kit.hooked(model_of(kind), lambda words, output: output.logits.fill_(value))
    with spoiled, pytest.raises(labs.GenerationError, match="not finite"):
        labs_typed.choose(model_of(kind), ask(), ["a", "b"])


# ---------------------------------------------------------------- over HTTP


BODY = {"prompt": PROMPT, "options": TEXTS}


@pytest.fixture
def live() -> Iterator[Callable[..., Live]]:
    """Return a function that serves the model with these settings."""
    with contextlib.ExitStack() as stack:

        def start(*keys: str, **settings: Any) -> Live:
            config = configured(*keys, port=0, **settings)
            site = Live(labs_engine.Engine(model_of("llama"), config.server), config)
            stack.callback(site.close)
            stack.callback(site.engine.close)
            return site

        yield start


@pytest.fixture
def hold(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Keep each choice running until this is set."""
    event = threading.Event()
    parts = labs_choose.Options.parts

    def held(self: Any, row: Any, prefixes: Any) -> Iterator[None]:
        while not event.wait(0.005):
            yield
        yield from parts(self, row, prefixes)

    monkeypatch.setattr(labs_choose.Options, "parts", held)
    yield event
    event.set()


def post(site: Live, body: Any, *headers: str) -> Callable[[], tuple[int, Any]]:
    """Send /choose over a socket in a thread; return a function that waits for (status, body)."""
    found: list[bytes] = []
    sent = request("/choose", body, *headers, "Connection: close")
    thread = threading.Thread(target=lambda: found.append(site.raw(sent)), daemon=True)
    thread.start()

    def wait() -> tuple[int, Any]:
        thread.join(60)
        head, _, data = found[0].partition(b"\r\n\r\n")
        return int(head.split()[1]), json.loads(data)

    return wait


def test_a_choice_over_http_is_that_of_the_library_and_is_logged(live, caplog):
    caplog.set_level("INFO")
    answer = live().post("/choose", BODY).json
    inputs = labs.build_inputs(model_of("llama"), prompt=PROMPT)
    expected = labs_typed.choose(model_of("llama"), inputs, TEXTS)
    assert (answer["model"], answer["options"]) == ("tiny", pytest.approx(expected))
    line = kit.log_lines(caplog)[-1]
    assert (line["path"], line["status"], line["finish_reason"]) == ("/choose", 200, "stop")
    assert line["prompt_tokens"] == len(inputs.input_ids)


def test_options_are_bounded_in_bytes_before_they_are_tokenised(live):
    bounded, body = live(max_prompt_bytes=300), {"prompt": "hi", "options": ["é" * 90, "é" * 80]}
    told = error_of(bounded.post("/choose", body), 400)["message"]
    assert "340 bytes; this server allows 300" in told
    assert bounded.post("/choose", {**body, "options": ["é" * 90, "n"]}).status_code == 200


def test_a_choice_waits_its_turn_and_ends_when_its_client_leaves_or_the_server_drains(live, hold):
    site = live(max_batch_rows=1, max_waiting=1)
    connection = site.connect(request("/choose", BODY))
    until(lambda: site.doing() == (1, 0))
    connection.close()
    until(lambda: site.doing() == (0, 0))
    waiting = [post(site, BODY), post(site, BODY)]
    until(lambda: site.doing() == (1, 1))
    assert error_of(site.post("/choose", BODY), 503)["code"] == "overloaded"
    assert site.get("/health").status_code == 200
    assert not site.engine.close(0.05)
    assert [wait()[0] for wait in waiting] == [503, 503]


def test_a_choice_ends_at_the_timeout_of_the_request_or_the_settings(live, hold):
    site = live(generation=labs.Generation(timeout_s=0.05))
    error = error_of(site.post("/choose", BODY), 503)
    assert (error["code"], "timeout" in error["message"]) == ("overloaded", True)
    error_of(live().post("/choose", {**BODY, "timeout_s": 0.05}), 503)
    hold.set()
    assert site.post("/choose", {**BODY, "timeout_s": 60}).status_code == 200


def test_the_tokens_of_all_options_count_for_the_quota(live):
    cost = len(labs.build_inputs(model_of("llama"), prompt=PROMPT).input_ids)
    cost += sum(map(len, TEXTS))
    assert error_of(live(tokens_per_minute=cost - 1).post("/choose", BODY), 400)["code"] == "quota"
    enough = live(tokens_per_minute=cost + 5)
    assert enough.post("/choose", BODY).status_code == 200
    assert error_of(enough.post("/choose", BODY), 429)["code"] == "rate_limit_exceeded"


def test_a_key_that_fills_its_share_of_the_threads_leaves_the_others_theirs(live, monkeypatch):
    site = live("many", "one", max_batch_rows=1, max_waiting=2)
    leave, entered, build = threading.Event(), threading.Semaphore(0), labs.build_inputs

    def slow(model: Any, **words: Any) -> Any:
        if words["prompt"] == "slow":
            entered.release()
            assert leave.wait(60)
        return build(model, **words)

    monkeypatch.setattr(labs, "build_inputs", slow)
    body, key = {**BODY, "prompt": "slow"}, "Authorization: Bearer many"
    waiting = [post(site, body, key) for _ in range(3)]
    assert all(entered.acquire(timeout=60) for _ in range(3))
    status, refused = post(site, body, key)()
    assert (status, "3 open requests" in refused["error"]["message"]) == (503, True)
    assert post(site, BODY, "Authorization: Bearer one")()[0] == 200
    leave.set()
    assert [wait()[0] for wait in waiting] == [200] * 3
    words, streamed = {"max_new_tokens": 2}, {"stream": True, "max_tokens": 2}
    for path, more in (("/generate/stream", words), ("/v1/completions", streamed)):
        for prompt, status in (("hi", 200), (5, 400)) * 4:  # each closes what it opens
            answer = site.post(path, {"prompt": prompt} | more, Authorization="Bearer many")
            assert answer.status_code == status
