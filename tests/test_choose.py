# SPDX-License-Identifier: Apache-2.0
"""Choices: equal to a whole forward of each option for all types of models, in bounded parts."""

from __future__ import annotations

import functools
import json
import math
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from kit import (
    ARCHITECTURES,
    DULL,
    Live,
    Site,
    configured,
    error_of,
    log_lines,
    model_around,
    prepare,
    random_model,
    request,
    until,
)
from msgspec.structs import replace

import labs
import labs_choose
import labs_decode
import labs_engine
import labs_prefixes
import labs_typed

TEXTS = ["a", "bcd", "a much longer option than all of the others", "yes", "bce", "no, not at all"]
ENDS = frozenset({7, 250})
PROMPT = "Which of them? " * 6


@functools.cache
def model_of(kind: str) -> labs.Model:
    return replace(
        model_around(prepare(random_model(kind, vocab_size=262)), kind), eos_token_ids=ENDS
    )


def ask(text: str = PROMPT) -> labs.Inputs:
    return labs.Inputs(tuple(text.encode()), text)


@torch.inference_mode()
def exact(model: Any, prompt: tuple[int, ...], texts: list[str]) -> list[float]:
    """Compute each option by a forward call of its own, by transformers alone."""
    totals = []
    for text in texts:
        ids = [*prompt, *text.encode()]
        lines = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
        after = range(len(prompt), len(ids))
        end = lines[-1, sorted(ENDS)].logsumexp(-1)
        totals.append(sum(lines[at - 1, ids[at]] for at in after) + end)
    return torch.stack(totals).softmax(-1).tolist()


def passes(choice: labs_choose.Options, inputs: labs.Inputs, prefixes: Any = None) -> int:
    """Compute a choice; return how many parts it had."""
    generation = labs.Generation(max_new_tokens=choice.columns)
    row = labs.open_request(choice.model, 0, inputs, generation).row
    return sum(1 for _ in choice.parts(row, prefixes))


# ---------------------------------------------------------------- what comes out


@pytest.mark.parametrize("kind", [*ARCHITECTURES, *DULL])
@pytest.mark.parametrize("size", [2**24, 9 * 262])
def test_a_choice_is_what_transformers_gives_for_each_option(kind, size, monkeypatch):
    monkeypatch.setattr(labs_choose, "LOGITS", size)
    monkeypatch.setattr(labs_decode, "CHUNK", 32)
    expected = exact(random_model(kind, vocab_size=262), ask().input_ids, TEXTS)
    found = labs_typed.choose(model_of(kind), ask(), TEXTS)
    assert [*found] == TEXTS
    assert [*found.values()] == pytest.approx(expected, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("lengths", [[1, 1, 1], [3, 0, 9, 2], [4, 4], [5, 17, 1, 1], [8, 9, 1]])
@pytest.mark.parametrize("together", [True, False])
def test_each_token_is_in_one_piece_and_no_part_is_larger_than_it_may(lengths, together):
    parts = [*labs_choose.pieces(lengths, 8, together=together)]
    tokens = [(p.option, at) for part in parts for p in part for at in range(p.start, p.end)]
    assert tokens == [(n, at) for n, length in enumerate(lengths) for at in range(length)]
    assert all(0 < sum(p.end - p.start for p in part) <= 8 for part in parts)
    assert all(len(part) == 1 for part in parts if part[0].start or not together)


def test_a_choice_does_not_depend_on_what_was_kept_of_prompts(monkeypatch):
    monkeypatch.setattr(labs_decode, "CHUNK", 16)
    model, store = model_of("llama"), labs_prefixes.Prefixes(2**30)
    choices = [labs_choose.Options(model, ask(), TEXTS) for _ in range(3)]
    first = passes(choices[0], ask(), store)
    assert store.kept
    assert passes(choices[1], ask(), store) < first
    passes(choices[2], ask())
    assert choices[0].shares == choices[1].shares == choices[2].shares


def test_the_prompt_is_computed_once_and_the_options_behind_it():
    model, seen = model_of("qwen2"), []

    def count(module: Any, args: Any, words: Any) -> None:
        seen.append(words["input_ids"].numel())

    handle = model.model.register_forward_pre_hook(count, with_kwargs=True)
    texts = [f"option {n}" for n in range(20)]
    labs_typed.choose(model, ask(), texts)
    handle.remove()
    assert sum(seen) == len(ask().input_ids) + sum(map(len, texts))


def test_no_part_has_more_logits_than_memory_is_meant_for(monkeypatch):
    monkeypatch.setattr(labs_choose, "LOGITS", 20 * 262)
    model, seen = model_of("llama"), []

    def listen(module: Any, args: Any, output: Any) -> None:
        seen.append(output.logits.numel())

    handle = model.model.register_forward_hook(listen)
    labs_typed.choose(model, ask(), ["x" * 100, "y" * 90, *TEXTS])
    handle.remove()
    assert max(seen) <= 20 * 262


# ---------------------------------------------------------------- what is refused


def test_options_of_many_tokens_together_are_refused_with_their_number(monkeypatch):
    monkeypatch.setattr(labs_choose, "OPTION_TOKENS", 500)
    model = model_of("llama")
    options = [f"{n} {'x' * 150}" for n in range(4)]
    with pytest.raises(labs.InputError, match="608 tokens together, at most 512"):
        labs_typed.choose(model, ask("hi"), options)
    assert len(labs_typed.choose(model, ask("hi"), options[:3])) == 3


def test_an_option_with_a_token_beyond_the_embedding_is_refused_by_name():
    model = replace(model_of("llama"), tokenizer=lambda text, **_: {"input_ids": [5, 262]})
    with pytest.raises(labs.InputError, match="token 262"):
        labs_choose.Options(model, ask(), ["a", "b"])


@pytest.mark.parametrize("kind", ["llama", "mamba2", "rwkv"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_no_numbers_are_an_error_and_no_choice(kind, value):
    model = model_of(kind)

    def spoil(module: Any, args: Any, output: Any) -> None:
        output.logits.fill_(value)

    handle = model.model.register_forward_hook(spoil)
    try:
        with pytest.raises(labs.GenerationError, match="not finite"):
            labs_typed.choose(model, ask(), ["a", "b"])
    finally:
        handle.remove()


# ---------------------------------------------------------------- over HTTP


BODY = {"prompt": PROMPT, "options": TEXTS}


@pytest.fixture
def live() -> Iterator[Callable[..., Live]]:
    opened: list[Live] = []

    def start(*keys: str, **server: Any) -> Live:
        config = configured(*keys, port=0, **server)
        opened.append(Live(labs_engine.Engine(model_of("llama"), config.server), config))
        return opened[-1]

    yield start
    for each in opened:
        each.engine.close()
        each.close()


@pytest.fixture
def hold(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Let choices go on and on until this is set."""
    event = threading.Event()
    parts = labs_choose.Options.parts

    def held(self: Any, row: Any, prefixes: Any) -> Iterator[None]:
        while not event.wait(0.005):
            yield
        yield from parts(self, row, prefixes)

    monkeypatch.setattr(labs_choose.Options, "parts", held)
    yield event
    event.set()


def post(site: Live, body: Any, *headers: str, path: str = "/choose") -> Any:
    """Ask over a socket, in a thread; return a function that waits for status and body."""
    found: list[bytes] = []
    sent = request(path, body, *headers, "Connection: close")
    thread = threading.Thread(target=lambda: found.append(site.raw(sent)), daemon=True)
    thread.start()

    def wait() -> tuple[int, Any]:
        thread.join(60)
        head, _, data = found[0].partition(b"\r\n\r\n")
        return int(head.split()[1]), json.loads(data)

    return wait


def test_a_choice_that_waits_is_counted_and_a_full_server_refuses_the_next(live, hold):
    site = live(max_batch_rows=1, max_waiting=1)
    waiting = [post(site, BODY), post(site, BODY)]
    until(lambda: site.doing() == (1, 1))
    assert b"labs_num_requests_waiting" in site.get("/metrics").content
    assert error_of(site.post("/choose", BODY), 503)["code"] == "overloaded"
    assert site.get("/health").status_code == 200
    hold.set()
    assert [wait()[0] for wait in waiting] == [200, 200]


def test_a_choice_whose_client_has_left_is_dropped(live, hold):
    site = live(max_batch_rows=1, max_waiting=2)
    for _ in range(2):
        connection = site.connect(request("/choose", BODY))
        until(lambda: site.doing()[0] == 1)
        connection.close()
        until(lambda: site.doing() == (0, 0))


def test_a_choice_obeys_its_time(live, hold):
    site = live()
    status, body = post(site, {**BODY, "timeout_s": 0.05})()
    assert (status, body["error"]["code"]) == (503, "overloaded")
    assert "timeout" in body["error"]["message"]
    until(lambda: site.doing() == (0, 0))


def test_a_choice_obeys_the_configured_time(hold):
    engine = labs_engine.Engine(model_of("llama"))
    site = Site(engine, configured(generation=labs.Generation(timeout_s=0.05)))
    error_of(site.post("/choose", BODY), 503)
    hold.set()
    assert site.post("/choose", {**BODY, "timeout_s": 60}).status_code == 200
    engine.close()


def test_a_server_that_drains_lets_choices_end_or_cancels_them(live, hold):
    site = live()
    waiting = [post(site, BODY) for _ in range(3)]
    until(lambda: sum(site.doing()) == 3)
    assert not site.engine.close(0.05)
    assert [wait()[0] for wait in waiting] == [503] * 3


def test_a_stream_goes_on_beside_a_choice(live, hold):
    site = live()
    waits = post(site, BODY)
    until(lambda: site.doing()[0] == 1)
    answer = site.post("/generate", {"prompt": "hi", "max_new_tokens": 20, "temperature": 0})
    assert answer.status_code == 200
    hold.set()
    assert sum(waits()[1]["options"].values()) == pytest.approx(1)


def test_the_tokens_of_all_options_count_for_the_quota(live):
    cost = len(labs.build_inputs(model_of("llama"), prompt=PROMPT).input_ids)
    cost += sum(map(len, TEXTS))
    assert error_of(live(tokens_per_minute=cost - 1).post("/choose", BODY), 400)["code"] == "quota"
    site = live(tokens_per_minute=cost + 5)
    assert site.post("/choose", BODY).status_code == 200
    assert error_of(site.post("/choose", BODY), 429)["code"] == "rate_limit_exceeded"


def test_a_refused_choice_costs_nothing(live, monkeypatch):
    site = live(tokens_per_minute=300)

    def full(*_: Any) -> Any:
        raise labs_engine.Busy("full")

    with monkeypatch.context() as patched:
        patched.setattr(site.engine, "take_in", full)
        for _ in range(5):
            error_of(site.post("/choose", BODY), 503)
    assert site.post("/choose", BODY).status_code == 200


def test_options_are_bounded_in_bytes_before_they_are_tokenised(live):
    site = live(max_prompt_bytes=300)
    body = {"prompt": "hi", "options": ["é" * 90, "é" * 80]}
    assert "340 bytes; at most 300" in error_of(site.post("/choose", body), 400)["message"]
    assert site.post("/choose", {**body, "options": ["é" * 90, "n"]}).status_code == 200


def test_a_choice_of_a_model_that_computes_no_numbers_fails(live):
    site = live()

    def spoil(module: Any, args: Any, output: Any) -> None:
        output.logits.fill_(math.nan)

    handle = site.engine.model.model.register_forward_hook(spoil)
    error_of(site.post("/choose", BODY), 500)
    handle.remove()
    assert site.post("/choose", BODY).status_code == 200


def test_the_log_tells_what_a_choice_was(live, caplog):
    caplog.set_level("INFO")
    site = live()
    site.post("/choose", BODY)
    line = log_lines(caplog)[-1]
    assert (line["path"], line["status"], line["finish_reason"]) == ("/choose", 200, "stop")
    assert line["prompt_tokens"] == len(
        labs.build_inputs(model_of("llama"), prompt=PROMPT).input_ids
    )


def test_a_key_with_one_request_is_answered_before_those_of_another_key(live):
    site = live("many", "one", max_batch_rows=1, max_waiting=8)
    order: list[str] = []

    def ask_as(key: str, new: int) -> threading.Thread:
        body = {"prompt": "hi", "max_new_tokens": new}

        def run() -> None:
            site.raw(
                request("/generate", body, f"Authorization: Bearer {key}", "Connection: close")
            )
            order.append(key)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        return thread

    threads = [ask_as("many", 60) for _ in range(9)]
    until(lambda: site.doing() == (1, 8))
    threads += [ask_as("one", 1)]
    for thread in threads:
        thread.join(60)
    assert order.index("one") <= 2


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
    refused = [post(site, body, key)() for _ in range(20)]
    assert {status for status, _ in refused} == {503}
    assert "3 requests open" in refused[0][1]["error"]["message"]
    assert post(site, BODY, "Authorization: Bearer one")()[0] == 200
    leave.set()
    assert [wait()[0] for wait in waiting] == [200] * 3
    assert post(site, BODY, key)()[0] == 200


@pytest.mark.parametrize("path", ["/generate/stream", "/v1/completions", "/explain"])
def test_what_a_key_has_open_is_closed_at_the_end_of_each_answer(live, path):
    site = live("many", max_batch_rows=1, max_waiting=1)
    body = {"prompt": "hi"} | ({"stream": True, "max_tokens": 2} if path[:3] == "/v1" else {})
    for _ in range(5):
        key = {"Authorization": "Bearer many"}
        assert site.post(path, body, **key).status_code == 200
        assert site.post(path, {"prompt": 5}, **key).status_code == 400
