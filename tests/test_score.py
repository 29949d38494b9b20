# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities of prompts: equal to transformers' own for all types, in bounded parts."""

from __future__ import annotations

import itertools
import json
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
import labs_jsonl
import labs_replay
import labs_request
import labs_score

TEXT = "Which of them is it? " * 4
# A type of each kind of layers and of calls; the others only in the long run.
FEW = {"llama", "gemma2", "gpt_oss", "deepseek_v3", "mamba2", "falcon_h1"}
FEW |= {"mamba", "jamba", "rwkv", "minimax", "bloom"}
LONG = [pytest.mark.long]
NAMES = [
    kind if kind in FEW else pytest.param(kind, marks=LONG)
    for kind in (*kit.ARCHITECTURES, *kit.DULL)
]


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


@pytest.mark.parametrize("kind", ["mamba", "mamba2", "rwkv"])
def test_models_that_cannot_continue_a_prompt_score_it_and_answer_as_without(kind):
    model, inputs = model_of(kind), prompt(3, 20)
    engine = labs_engine.Engine(model)
    try:
        each = labs_score.Echo(inputs.prompt, labs_score.Scores(model, inputs, 0), only=False)
        first, *rest = submit(engine, inputs, each.work)
        assert first.logprobs[1:] == labs_score.prompt_logprobs(model, inputs)[1:]
        text = "".join(getattr(event, "text", "") for event in rest)
        assert text == kit.alone(kind, 3, 20)
    finally:
        engine.close()


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


# ---------------------------------------------------------------- over HTTP and in files


@pytest.fixture
def site(engine):
    return kit.Site(engine, kit.configured())


def complete(site: Any, **body: Any) -> Any:
    answer = site.post(kit.COMPLETIONS, {"prompt": "hey", "temperature": 0, **body})
    assert answer.status_code == 200, answer.text
    return answer.json


def encoded(text: str) -> labs.Inputs:
    return labs.build_inputs(model_of("llama"), prompt=text, use_chat_template=False)


def listed(text: str) -> list[float | None]:
    """Return log-probabilities of a text as they are in JSON."""
    found = labs_score.prompt_logprobs(model_of("llama"), encoded(text))
    return [None, *(each.logprob for each in found[1:])]


def test_an_echo_begins_with_the_log_probabilities_of_its_prompt_and_goes_on_as_without(site):
    plain = complete(site, max_tokens=3, logprobs=2)
    (choice,) = complete(site, max_tokens=3, logprobs=2, echo=True)["choices"]
    (answer,) = plain["choices"]
    assert choice["text"] == "hey" + answer["text"]
    found, rest = choice["logprobs"], answer["logprobs"]
    assert {len(each) for each in found.values()} == {4 + 3}
    assert found["tokens"] == ["<bos>", *"hey", *rest["tokens"]]
    assert found["token_logprobs"] == listed("hey") + rest["token_logprobs"]
    assert found["top_logprobs"][0] is None
    ranked = zip(found["tokens"][1:], found["top_logprobs"][1:], strict=True)
    for token, top in ranked:  # the chosen token is one of the two, or comes with them
        assert len(top) == (2 if token in [*top][:2] else 3)
        assert token in top
    assert found["top_logprobs"][4:] == rest["top_logprobs"]
    assert found["text_offset"] == [0, 0, 1, 2, *(3 + at for at in rest["text_offset"])]


def test_special_tokens_that_an_echo_shows_have_their_place_in_the_text(site):
    body = {"prompt": "<bos>ab<eos><end>c", "max_tokens": 2, "logprobs": 0, "echo": True}
    (choice,) = complete(site, **body)["choices"]
    sent = {**body, "temperature": 0, "stream": True}
    (first,) = kit.chunks_of(site.post(kit.COMPLETIONS, sent))[0]["choices"]
    for found in (choice["logprobs"], first["logprobs"]):
        assert found["tokens"][:7] == ["<bos>", "<bos>", "a", "b", "<eos>", "<end>", "c"]
        assert found["text_offset"][:7] == [0, 5, 5, 6, 7, 12, 17]
    (hidden,) = complete(site, **{**body, "prompt": [97, kit.END, 98]})["choices"]
    assert (hidden["text"][:2], hidden["logprobs"]["text_offset"][:3]) == ("ab", [0, 1, 1])


def test_tokens_that_are_configured_as_the_least_do_not_refuse_an_echo_or_a_choice(engine):
    site = kit.Site(engine, kit.configured(generation=labs.Generation(min_new_tokens=3)))
    assert complete(site, max_tokens=0, echo=True)["choices"][0]["text"] == "hey"
    choice = site.post("/choose", {"prompt": "hey", "options": ["a", "b"]})
    assert choice.status_code == 200, choice.text


def test_the_least_tokens_are_refused_by_the_name_that_the_client_uses(site):
    body = {"prompt": "a" * 506, "min_tokens": 30, "max_tokens": 40}
    error = kit.error_of(site.post(kit.COMPLETIONS, body), 400)
    told = "min_tokens = 30: the prompt leaves 5 tokens of the context"
    assert (error["param"], error["message"]) == ("min_tokens", told)


def test_an_echo_without_log_probabilities_computes_nothing_more(site):
    with kit.counted(model_of("llama")) as calls:
        plain = complete(site, max_tokens=3)
        before = len(calls)
        echoed = complete(site, max_tokens=3, echo=True)
        assert len(calls) == 2 * before
        alone = complete(site, max_tokens=0, echo=True)
        assert len(calls) == 2 * before
    assert echoed["choices"][0]["text"] == "hey" + plain["choices"][0]["text"]
    assert alone["choices"][0] == {
        "index": 0,
        "text": "hey",
        "logprobs": None,
        "finish_reason": "length",
    }
    assert (alone["usage"]["prompt_tokens"], alone["usage"]["completion_tokens"]) == (4, 0)


def test_each_of_several_prompts_and_choices_has_its_own_echo(site):
    body = {"prompt": ["ab", "c"], "n": 2, "max_tokens": 0, "echo": True, "logprobs": 0}
    choices = complete(site, **body)["choices"]
    assert [(each["index"], each["text"]) for each in choices] == [
        *enumerate(["ab", "ab", "c", "c"])
    ]
    for each in choices:
        assert each["logprobs"]["token_logprobs"] == listed(each["text"])
    ids = [encoded("ab").input_ids, encoded("c").input_ids]
    again = complete(site, **{**body, "prompt": ids})["choices"]
    assert again == choices


def test_the_echo_of_tokens_shows_special_ones_only_if_these_are_asked_for(site):
    body = {"prompt": [kit.BOS, 97, kit.END], "echo": True, "max_tokens": 0}
    assert complete(site, **body)["choices"][0]["text"] == "a"
    shown = complete(site, **body, skip_special_tokens=False)["choices"][0]["text"]
    assert shown == "<bos>a<end>"


def test_a_stream_begins_with_the_prompt_and_has_the_parts_of_the_whole_answer(site):
    body = {"prompt": ["hey", "you"], "max_tokens": 3, "logprobs": 1, "echo": True}
    whole = complete(site, **body)["choices"]
    sent = {**body, "temperature": 0, "stream": True}
    chunks = kit.chunks_of(site.post(kit.COMPLETIONS, sent))
    for index, choice in enumerate(whole):
        parts = [each for chunk in chunks for each in chunk["choices"] if each["index"] == index]
        assert parts[0]["text"] == body["prompt"][index]
        assert "".join(each["text"] for each in parts) == choice["text"]
        for name in choice["logprobs"]:
            pieces = [each["logprobs"][name] for each in parts if each["logprobs"]]
            assert [*itertools.chain(*pieces)] == choice["logprobs"][name]
        assert parts[-1]["finish_reason"] == choice["finish_reason"] == "length"


WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"max_tokens": 0}, "max_tokens = 0 needs echo = true", "max_tokens"),
    ({"max_tokens": 0, "echo": True, "min_tokens": 1}, "contradicts min_tokens", "max_tokens"),
    ({"max_tokens": -2, "echo": True}, "Expected `int` >= 0", "max_tokens"),
    ({"echo": 1}, "Expected `bool | null`", "echo"),
    ({"echo": True, "logprobs": 21}, "<= 20", "logprobs"),
    ({"echo": True, "prompt": "x" * 600}, "maximum context length is 512", "prompt"),
    ({"echo": True, "prompt": [300]}, "token id 300", "prompt"),
    ({"prompt_logprobs": 1}, "unknown field `prompt_logprobs`", "prompt_logprobs"),
]


@pytest.mark.parametrize(("body", "told", "param"), WRONG)
def test_an_echo_that_cannot_be_given_is_refused_by_the_name_of_its_field(body, told, param, site):
    error = kit.error_of(site.post(kit.COMPLETIONS, {"prompt": "hey", **body}), 400)
    assert told in error["message"]
    assert error["param"] == param


def test_openais_own_client_reads_an_echo(site):
    body = {"model": "tiny", "prompt": "hey", "echo": True, "logprobs": 1, "max_tokens": 0}
    (choice,) = site.sdk().completions.create(**body).choices
    assert (choice.text, choice.finish_reason) == ("hey", "length")
    assert choice.logprobs.token_logprobs == listed("hey")


def test_a_chat_has_no_echo(site):
    body = {"messages": kit.HELLO, "max_tokens": 1}
    assert site.post(kit.CHAT, {**body, "echo": False}).status_code == 200
    assert kit.error_of(site.post(kit.CHAT, {**body, "echo": True}), 400)["param"] == "echo"
    assert (
        kit.error_of(site.post(kit.CHAT, {**body, "max_tokens": 0}), 400)["param"] == "max_tokens"
    )


def test_the_tokens_of_an_echo_count_once_for_the_quota(engine):
    site = kit.Site(engine, kit.configured(tokens_per_minute=4))
    body = {"prompt": "hey", "echo": True, "logprobs": 0}
    told = kit.error_of(site.post(kit.COMPLETIONS, {**body, "max_tokens": 1}), 400)
    assert "may use 5 tokens" in told["message"]
    assert site.post(kit.COMPLETIONS, {**body, "max_tokens": 0}).status_code == 200
    assert site.post(kit.COMPLETIONS, {**body, "max_tokens": 0}).status_code == 429


@pytest.mark.parametrize("stream", [False, True])
def test_an_echo_that_is_not_computed_in_time_is_an_error_and_no_half_answer(
    stream, engine, monkeypatch
):
    def slow(self: Any, row: Any) -> Any:
        while not row.late:
            yield
        yield

    monkeypatch.setattr(labs_score.Scores, "parts", slow)
    site = kit.Site(engine, kit.configured(generation=labs.Generation(timeout_s=0.05)))
    body = {"prompt": "hey", "echo": True, "logprobs": 0, "max_tokens": 0, "stream": stream}
    answer = site.post(kit.COMPLETIONS, body)
    if stream:
        (event, data), *_ = kit.events_of(answer.content)[-1:]
        assert event == "error"
        assert "not computed in time: timeout" in json.loads(data)["error"]["message"]
    else:
        assert "not computed in time" in kit.error_of(answer, 503)["message"]


def test_stored_answers_are_not_used_for_an_echo_nor_an_echo_for_them():
    inner = labs_engine.Engine(model_of("llama"))
    engine = labs_engine.Cached(inner, labs.ResponseCache(max_entries=4))
    try:
        site = kit.Site(engine, kit.configured())
        texts = [
            complete(site, max_tokens=2, echo=echo)["choices"][0]["text"]
            for echo in (False, True, False, True)
        ]
        assert texts == [texts[0], "hey" + texts[0]] * 2
        assert engine.status().response_cache_hits == 1
    finally:
        engine.close()


def lines_of(model: labs.Model, *bodies: dict[str, Any]) -> list[Any]:
    """Answer OpenAI's lines; return the status and the choices, or the error, of each."""
    rows = [
        {"custom_id": str(n), "method": "POST", "url": kit.COMPLETIONS, "body": body}
        for n, body in enumerate(bodies)
    ]
    context = labs_request.open_context(kit.configured())
    how, tally = labs_jsonl.Batching(ordered=True), labs_jsonl.Tally()
    found = labs_jsonl.answer_lines(model, context, kit.numbered(rows), tally, how)
    return [json.loads(each) for each in found]


def test_a_line_has_the_echo_of_the_same_request_over_http_and_can_be_run_again(site):
    model = model_of("llama")
    bodies = [
        {"prompt": ["hey", "you"], "temperature": 0, "echo": True, "logprobs": 2, "max_tokens": n}
        for n in (0, 3)
    ]
    lines = lines_of(model, *bodies, {"prompt": "a", "temperature": 0, "max_tokens": 1})
    for line, body in zip(lines, bodies, strict=False):
        over_http = complete(site, **body)
        assert line["response"]["body"]["choices"] == over_http["choices"]
        assert line["response"]["body"]["usage"] == over_http["usage"]


def test_a_prompt_whose_log_probabilities_cannot_be_computed_fails_its_line_only(monkeypatch):
    parts = labs_score.Scores.parts

    def broken(self: Any, row: Any) -> Any:
        if self.inputs.prompt.endswith("bad"):
            raise labs.GenerationError("the model returned logits that are not finite")
        return parts(self, row)

    monkeypatch.setattr(labs_score.Scores, "parts", broken)
    body = {"echo": True, "logprobs": 0, "max_tokens": 0}
    bad, good = lines_of(model_of("llama"), {**body, "prompt": "bad"}, {**body, "prompt": "good"})
    assert bad["response"]["status_code"] == 500
    assert "not finite" in bad["response"]["body"]["error"]["message"]
    assert good["response"]["body"]["choices"][0]["text"] == "good"


def test_an_answer_with_an_echo_is_the_same_when_it_is_run_again(tiny):
    bodies = [
        {"prompt": "hey", "echo": True, "logprobs": 1, "max_tokens": n, "temperature": 0}
        for n in (0, 4)
    ]
    context = labs_request.open_context(kit.configured())
    lines = kit.numbered(lines_of(tiny, *bodies))
    verdicts = [*labs_replay.replay(tiny, context, lines)]
    assert [(each.verdict, each.why) for each in verdicts] == [("same", None)] * 2
