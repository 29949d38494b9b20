# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities of prompts: equal to transformers' own for all types, in bounded parts."""

from __future__ import annotations

import math
import queue
from typing import Any

import kit
import pytest
import torch
from kit import Gate, model_of, options, prompt, quiet, read

import labs
import labs_decode
import labs_engine
import labs_score

TEXT = "Which of them is it? " * 4
NAMES = [*kit.ARCHITECTURES, *kit.DULL]


def ask(text: str = TEXT) -> labs.Inputs:
    return labs.Inputs(tuple(text.encode()), text)


@torch.inference_mode()
def exact(model: Any, ids: tuple[int, ...]) -> torch.Tensor:
    """Return log-probabilities [T - 1, V] by one forward call of transformers alone."""
    lines: torch.Tensor = model(input_ids=torch.tensor([ids])).logits[0, :-1].float()
    return lines.log_softmax(-1)


# ---------------------------------------------------------------- values


@pytest.mark.parametrize("kind", NAMES)
def test_the_log_probabilities_of_a_prompt_are_those_of_transformers(kind, monkeypatch):
    monkeypatch.setattr(labs_decode, "CHUNK", 32)
    ids = ask().input_ids
    lines = exact(kit.random_model(kind, vocab_size=262), ids)
    expected = lines.gather(-1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
    likeliest = lines.topk(3)
    for logits in (2**24, 9 * 262):
        monkeypatch.setattr(labs_score, "LOGITS", logits)
        first, *rest = labs_score.prompt_logprobs(model_of(kind), ask(), top=3)
        assert (first.token, math.isnan(first.logprob), first.top) == (ids[0], True, ())
        assert [each.token for each in rest] == [*ids[1:]]
        assert [each.logprob for each in rest] == pytest.approx(expected, abs=1e-3)
        for each, values in zip(rest, likeliest.values.tolist(), strict=True):
            assert [logprob for _, logprob in each.top] == pytest.approx(values, abs=1e-3)


def test_an_alternative_that_is_the_token_itself_has_exactly_its_log_probability():
    found = labs_score.prompt_logprobs(model_of("llama"), ask(), top=20)[1:]
    shared = [
        (each.logprob, dict(each.top)[each.token]) for each in found if each.token in dict(each.top)
    ]
    assert shared
    assert all(own == listed for own, listed in shared)


@pytest.mark.parametrize("text", ["a", "ab"])
def test_a_prompt_of_one_or_two_tokens_has_as_many_log_probabilities(text):
    found = labs_score.prompt_logprobs(model_of("llama"), ask(text))
    assert [each.token for each in found] == [*text.encode()]
    assert math.isnan(found[0].logprob)


@pytest.mark.parametrize("length", [33, 34, 64, 65])
def test_a_prompt_that_ends_with_a_chunk_or_just_after_it_is_complete(length, monkeypatch):
    monkeypatch.setattr(labs_decode, "CHUNK", 32)
    inputs = ask("x" * length)
    lines = exact(kit.random_model("llama", vocab_size=262), inputs.input_ids)
    found = labs_score.prompt_logprobs(model_of("llama"), inputs)[1:]
    assert [each.logprob for each in found] == pytest.approx(lines[:, ord("x")].tolist(), abs=1e-3)


def test_each_token_is_computed_once_and_no_part_has_more_logits_than_the_bound(monkeypatch):
    monkeypatch.setattr(labs_score, "LOGITS", 20 * 262)
    seen: list[tuple[int, int]] = []

    def look(words: Any, output: Any) -> None:
        seen.append((words["input_ids"].numel(), output.logits.numel()))

    with kit.hooked(model_of("llama"), look):
        labs_score.prompt_logprobs(model_of("llama"), ask())
    tokens, logits = zip(*seen, strict=True)
    assert sum(tokens) == len(ask().input_ids) - 1
    assert max(logits) <= 20 * 262


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize("top", [-1, 21])
def test_more_alternatives_than_an_answer_may_have_are_refused(top):
    with pytest.raises(labs.InputError, match=f"top = {top}: must be between 0 and 20"):
        labs_score.prompt_logprobs(model_of("llama"), ask(), top)


def test_tokens_that_the_model_does_not_have_and_prompts_beyond_its_context_are_refused():
    model = model_of("llama")
    with pytest.raises(labs.InputError, match="token id 262"):
        labs_score.prompt_logprobs(model, labs.Inputs((5, 262), ""))
    with pytest.raises(labs.InputError, match="no tokens"):
        labs_score.prompt_logprobs(model, labs.Inputs((), ""))
    with pytest.raises(labs.PromptTooLong):
        labs_score.prompt_logprobs(model, ask("x" * 512))
    fewer = labs_score.Scores(model, ask("a"), 0)
    assert fewer.found == []


@pytest.mark.parametrize("kind", ["llama", "mamba", "rwkv"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_an_error(kind, value):
    spoiled = kit.hooked(model_of(kind), lambda words, output: output.logits.fill_(value))
    with spoiled, pytest.raises(labs.GenerationError, match="not finite"):
        labs_score.prompt_logprobs(model_of(kind), ask())


# ---------------------------------------------------------------- in an engine


def echo(number: int, *, only: bool = False, top: int = 2) -> tuple[labs.Inputs, labs_score.Echo]:
    inputs = prompt(number, 40)
    scores = labs_score.Scores(model_of("llama"), inputs, top)
    return inputs, labs_score.Echo(inputs.prompt, scores, only=only)


def submit(engine: Any, inputs: labs.Inputs, work: Any, **changes: Any) -> labs_engine.Answer:
    stream = engine.open(inputs, options(temperature=0.0, **changes), "", ())
    answer: labs_engine.Answer = engine.take_in(stream, queue.SimpleQueue(), work)
    return answer


@pytest.fixture
def engine():
    engine = labs_engine.Engine(model_of("llama"), labs.Server(max_batch_rows=8))
    yield engine
    engine.close()
    assert kit.leftovers(engine) == {}


def test_prompts_among_others_have_the_log_probabilities_and_answers_they_have_alone(
    engine, monkeypatch
):
    monkeypatch.setattr(labs_decode, "CHUNK", 16)
    pairs = [echo(number) for number in range(6)]
    answers = [submit(engine, inputs, each.work) for inputs, each in pairs]
    others = [engine.submit(prompt(number), options(temperature=0.0)) for number in range(6)]
    for number, ((inputs, _), answer) in enumerate(zip(pairs, answers, strict=True)):
        first, *rest = answer
        assert first.text == inputs.prompt
        alone = labs_score.prompt_logprobs(model_of("llama"), inputs, 2)
        assert first.logprobs[1:] == alone[1:]
        assert "".join(getattr(each, "text", "") for each in rest) == kit.alone("llama", number, 40)
        assert rest[-1].usage.prompt_tokens == 40
        assert rest[-1].usage.completion_tokens == kit.NEW
    for number, other in enumerate(others):
        assert read(other)[0] == kit.alone("llama", number)


def test_a_prompt_without_an_answer_takes_no_step(engine):
    inputs, only = echo(1, only=True)
    before = engine.status().steps
    first, done = submit(engine, inputs, only.work)
    assert len(first.logprobs) == 40
    assert (done.finish_reason, done.usage.completion_tokens) == ("length", 0)
    assert engine.status().steps == before


def test_several_answers_to_one_prompt_share_its_log_probabilities(engine):
    inputs, shared = echo(1)
    with kit.counted(model_of("llama")) as calls:
        answers = [submit(engine, inputs, shared.work) for _ in range(3)]
        firsts = [[*answer] for answer in answers]
    firsts = [events[0] for events in firsts]
    assert [each.logprobs[1:] for each in firsts] == [firsts[0].logprobs[1:]] * 3
    assert calls.count(39) == 1


def test_a_prompt_whose_client_leaves_is_not_computed_to_its_end_and_frees_its_place(
    engine, monkeypatch
):
    monkeypatch.setattr(labs_decode, "CHUNK", 4)
    gate = Gate(model_of("llama"))
    try:
        gate.let(2)
        inputs, each = echo(1)
        answer = submit(engine, inputs, each.work)
        gate.until(3)
        answer.close()
        gate.let(math.inf)
        assert quiet(engine)
        assert len(gate.calls) <= 4
        again = [*submit(engine, inputs, each.work)]
        assert again[0].logprobs[1:] == labs_score.prompt_logprobs(model_of("llama"), inputs, 2)[1:]
    finally:
        gate.let(math.inf)
        for handle in gate.handles:
            handle.remove()


@pytest.mark.parametrize("only", [False, True])
def test_a_prompt_that_takes_longer_than_its_timeout_ends_in_timeout(only, engine):
    inputs, each = echo(1, only=only)

    def slow(row: Any, prefixes: Any) -> Any:
        for _ in iter(lambda: row.late, True):
            yield
        yield from each.work(row, prefixes)

    *_, done = submit(engine, inputs, slow, timeout_s=0.05)
    assert done.finish_reason == "timeout"


def test_an_engine_that_is_full_of_prompts_refuses_another(monkeypatch):
    engine = labs_engine.Engine(model_of("llama"), labs.Server(max_batch_rows=1, max_waiting=1))
    gate = Gate(model_of("llama"))
    try:
        gate.let(0)
        pairs = [echo(number) for number in range(3)]
        kept = [submit(engine, inputs, each.work) for inputs, each in pairs[:2]]
        with pytest.raises(labs_engine.Busy):
            submit(engine, pairs[2][0], pairs[2][1].work)
        gate.let(math.inf)
        assert [[*each][-1].finish_reason for each in kept] == ["length"] * 2
    finally:
        gate.let(math.inf)
        for handle in gate.handles:
            handle.remove()
        engine.close()
