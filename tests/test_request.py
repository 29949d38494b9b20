# SPDX-License-Identifier: Apache-2.0
"""Tests of labs_request.py: what is refused without a model, and what is prepared with one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import kit
import msgspec
import pytest

import labs
import labs_asked
import labs_guard
import labs_rag
import labs_ready
import labs_request
from labs_request import GenerateRequest, Prompt, Request, ResponseFormat

QUESTION = "Which river runs through Paris?"


def configured(**options: Any) -> labs.Config:
    generation = labs.Generation(max_new_tokens=8)
    return labs.Config(**{"model_id": "tiny", "generation": generation} | options)


def guarded(models: Any = None, **guard: Any) -> labs.Config:
    return configured(guard=labs.Guard(**guard), models=models or {})


def documented(text: str = "The Seine runs through Paris.", **options: Any) -> labs.Config:
    Path("docs").mkdir()
    Path("docs/a.md").write_text(f"# Seine\n\n{text}", encoding="utf-8")
    labs_rag.index(["docs"], "docs.db")
    documents = labs.Documents(**{"database": "docs.db", "max_tokens": 4000} | options)
    return configured(documents=documents)


def asking(**prompt: Any) -> Request:
    """Return a request with one prompt, `Hi!` if nothing else is given."""
    return Request(prompts=(Prompt(**prompt or {"prompt": "Hi!"}),))


def changed(request: Request | None = None, **changes: Any) -> Request:
    return msgspec.structs.replace(request or asking(), **changes)


def checked(config: labs.Config, request: Request, **options: Any) -> Request:
    return labs_request.check(labs_request.open_context(config, **options), request)


def prepared(config: labs.Config, model: labs.Model, request: Request) -> labs_request.Prepared:
    context = labs_request.open_context(config)
    return labs_request.prepare(context, config, model, labs_request.check(context, request))


def refusal(config: labs.Config, request: Request, **options: Any) -> Any:
    """Return the error with which a request is refused without a model."""
    with pytest.raises(labs.LabsError) as caught:
        checked(config, request, **options)
    assert kit.is_one_sentence(caught.value)
    return caught.value


def user(text: str) -> labs.Message:
    return labs.Message(role="user", content=text)


def read(**body: Any) -> Request:
    data = json.dumps(body).encode()
    return labs_request.request_of(msgspec.json.decode(data, type=GenerateRequest), body)


def test_a_request_has_the_options_that_were_named_and_no_others():
    request = read(prompt="Hi!", temperature=0.5, seed=None, model="tiny", documents=False)
    options = {"temperature": 0.5, "seed": None}
    assert request == changed(options=options, model="tiny", documents=False)
    toggles = {"use_chat_template": False, "add_generation_prompt": True}
    messages = [{"role": "user", "content": "Hi!"}]
    request = read(messages=messages, response_format={"type": "json_object"}, **toggles)
    expected = asking(messages=(user("Hi!"),), **toggles)
    assert request == changed(expected, response_format=ResponseFormat(type="json_object"))


SCHEMA = {"json_schema": {"schema": {}}}
FORMATS = [{"type": "json_schema"}, {"type": "xml"}]
FORMATS += [{"type": kind, **SCHEMA} for kind in ("text", "json_object")]
FORMATS += [{"type": "json_schema", "json_schema": {"schema": {}, "strictly": True}}]


@pytest.mark.parametrize("wanted", FORMATS)
def test_an_unknown_response_format_is_refused(wanted):
    with pytest.raises(msgspec.ValidationError):
        read(prompt="Hi!", response_format=wanted)


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ({"prompt": "a", "messages": (user("a"),)}, "exactly one of prompt and messages"),
        ({"use_chat_template": True}, "exactly one of prompt and messages"),
        ({"messages": ({"role": "user", "content": "a"}, {"role": "x", "y": 1})}, r"messages\[1\]"),
        ({"messages": (user("\ud800"),)}, r"messages\[0\] holds a lone surrogate"),
    ],
)
def test_a_malformed_prompt_is_refused_by_name(prompt, words):
    with pytest.raises(labs.InputError, match=words):
        checked(configured(), asking(**prompt))


def test_messages_may_come_as_dicts_from_any_iterable():
    for messages in ([{"role": "user", "content": "a"}], iter([user("a")]), (user("a"),)):
        (prompt,) = checked(configured(), asking(messages=messages)).prompts
        assert prompt == Prompt(messages=(user("a"),))


def test_an_unknown_model_is_refused_with_the_known_ones_after_the_prompt_is_filtered():
    config = guarded(deny=("bad",), models={"large": configured(model_id="large")})
    for name in ("other", "auto", ""):
        error = refusal(config, changed(model=name))
        assert isinstance(error, labs_request.Refusal)
        assert (error.status, error.code, error.param) == (404, "model_not_found", "model")
        assert str(error) == f"unknown model {name!r}; known models: tiny, large"
    error = refusal(config, changed(asking(prompt="so bad"), model="other"))
    assert (error.rule, error.code) == ("deny[0]", "content_filtered")
    rule = labs.RouterRule(model="tiny", pattern="code")
    routing = configured(router=labs.Router(rules=(rule,)))
    assert checked(routing, changed(model="auto")).model == "auto"


def test_a_request_is_checked_with_the_settings_of_the_model_that_it_names():
    large = configured(model_id="large", generation=labs.Generation(logprobs=1))
    config = configured(guard=labs.Guard(deny=("bad",)), models={"large": large})
    assert checked(config, asking())
    assert str(refusal(config, changed(model="large"))).startswith("logprobs: ")
    assert checked(config, changed(model="large", options={"logprobs": None}))


def test_answers_that_are_filtered_have_no_logprobs():
    request = changed(options={"logprobs": 0})
    assert str(refusal(guarded(mask=("card",)), request)).startswith("logprobs: ")
    assert checked(guarded(mask=("card",), side="input"), request) == request


def test_masks_are_put_into_every_prompt_and_nothing_else_changes():
    prompts = (
        Prompt(prompt="to a@b.co", use_chat_template=False),
        Prompt(messages=(user("to a@b.co"), labs.Message(role="assistant", content="c@d.co"))),
        Prompt(ids=(97,), add_generation_prompt=True),
    )
    request = changed(prompts=prompts, n=2, options={"seed": 1}, model="tiny")
    found = checked(guarded(mask=("email",)), request)
    assert found.prompts == (
        Prompt(prompt="to [email]", use_chat_template=False),
        Prompt(messages=(user("to [email]"), labs.Message(role="assistant", content="[email]"))),
        prompts[2],
    )
    assert changed(found, prompts=prompts) == request


@pytest.mark.parametrize("toggle", ["use_chat_template", "add_generation_prompt"])
@pytest.mark.parametrize("configured_as", [True, False])
@pytest.mark.parametrize("asked", [None, True, False])
def test_a_field_of_chat_is_as_requested_or_else_as_configured(tiny, toggle, configured_as, asked):
    text = {"prompt": "Hi!"} if toggle == "use_chat_template" else {"messages": (user("Hi!"),)}
    config = configured(**{toggle: configured_as})
    (inputs,) = prepared(config, tiny, asking(**text, **{toggle: asked})).inputs
    wanted = configured_as if asked is None else asked
    assert inputs == labs.build_inputs(tiny, **text, **{toggle: wanted})


def test_a_prompt_of_ids_is_taken_as_it_is_and_its_text_is_filtered(tiny):
    (inputs,) = prepared(configured(), tiny, asking(ids=(97, 98))).inputs
    assert inputs == labs.Inputs((97, 98), "ab")
    with pytest.raises(labs.InputError, match="token id 999"):
        prepared(configured(), tiny, asking(ids=(999,)))
    config = guarded(mask=("email",), deny=("bad",))
    for text, rule in (("bad", "deny[0]"), ("a@b.co", "mask")):
        with pytest.raises(labs_guard.Filtered) as caught:
            prepared(config, tiny, asking(ids=tuple(text.encode())))
        assert caught.value.rule == rule
    assert prepared(config, tiny, asking(ids=tuple(b"good"))).inputs[0].prompt == "good"


def test_each_prompt_has_n_answers_whose_seeds_differ_and_stay_in_their_range(tiny):
    prompts = (Prompt(prompt="a"), Prompt(prompt="b"))
    request = Request(prompts=prompts, n=2, options={"seed": 7, "temperature": 1.0})
    found = [*prepared(configured(), tiny, request).answers()]
    a, b = (labs.build_inputs(tiny, prompt=text) for text in "ab")
    assert [each.inputs for each in found] == [a, a, b, b]
    assert [each.generation.seed for each in found] == [7, 8, 7, 8]
    assert {each.generation.max_new_tokens for each in found} == {8}
    generation, last = labs.Generation(), labs.Generation(seed=2**63 - 1)
    assert labs_ready.seeded_choice(generation, 3) is generation
    assert [labs_ready.seeded_choice(last, n).seed for n in range(2)] == [2**63 - 1, 0]


def test_each_answer_gets_a_new_constraint(tiny):
    schema = labs_request.JsonSchema(schema={"enum": ["red", "green"]})
    wanted = ResponseFormat(type="json_schema", json_schema=schema)
    found = prepared(configured(), tiny, changed(response_format=wanted, n=2))
    first, second = (ready.processors() for ready in found.answers())
    assert first[0] is not second[0]
    for only, ready in zip((first, second), found.answers(), strict=True):
        answer = labs.generate(tiny, ready.inputs, ready.generation, processors=only)
        assert json.loads(answer.text) in ("red", "green")
    assert labs_request.schema_of(ResponseFormat(type="text")) is None
    assert labs_ready.constraints(tiny, None) == ()


def test_passages_are_put_into_each_prompt_but_ids_and_named_as_sources(tiny):
    texts = (QUESTION, "Where is Paris?")
    prompts = (Prompt(prompt=texts[0]), Prompt(messages=(user(texts[1]),)))
    request = changed(prompts=(*prompts, Prompt(ids=tuple(b"Paris"))))
    found = prepared(documented(), tiny, request)
    assert found.sources == (labs_asked.Source(1, "docs/a.md", "Seine"),) * 2
    for inputs, text in zip(found.inputs, texts, strict=False):
        assert "> The Seine runs through Paris." in inputs.prompt
        assert text in inputs.prompt
    assert found.inputs[2].prompt == "Paris"


def test_passages_are_not_filtered_but_counted(tiny):
    config = documented("Write to a@b.co in Paris.")
    guard = labs.Guard(mask=("email",))
    found = prepared(msgspec.structs.replace(config, guard=guard), tiny, asking(prompt=QUESTION))
    assert "> Write to a@b.co in Paris." in found.inputs[0].prompt
    few = msgspec.structs.replace(config, guard=labs.Guard(max_prompt_tokens=60))
    with pytest.raises(labs_guard.Filtered, match="max_prompt_tokens"):
        prepared(few, tiny, asking(prompt=QUESTION))
