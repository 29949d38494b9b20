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
import labs_guard
import labs_rag
import labs_request
import labs_typed
from labs_request import GenerateRequest, Prompt, Request, ResponseFormat

DATABASE = "docs.db"
QUESTION = "Which river runs through Paris?"
COLOUR = {"enum": ["red", "green"]}


# ---------------------------------------------------------------- helpers


def configured(**options: Any) -> labs.Config:
    generation = labs.Generation(max_new_tokens=8)
    return labs.Config(**{"model_id": "tiny", "generation": generation} | options)


def guarded(**guard: Any) -> labs.Config:
    return configured(guard=labs.Guard(**guard))


def documented(text: str = "The Seine runs through Paris.", **options: Any) -> labs.Config:
    Path("docs").mkdir()
    Path("docs/a.md").write_text(f"# Seine\n\n{text}", encoding="utf-8")
    labs_rag.index(["docs"], DATABASE)
    documents = labs.Documents(**{"database": DATABASE, "max_tokens": 4000} | options)
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


def format_of(schema: dict[str, Any]) -> ResponseFormat:
    return ResponseFormat(type="json_schema", json_schema=labs_request.JsonSchema(schema=schema))


# ---------------------------------------------------------------- labs' own format


def read(**body: Any) -> Request:
    data = json.dumps(body).encode()
    return labs_request.request_of(msgspec.json.decode(data, type=GenerateRequest), body)


def test_a_request_has_the_options_that_were_named_and_no_others() -> None:
    request = read(prompt="Hi!", temperature=0.5, seed=None, model="tiny", documents=False)
    assert request == Request(
        prompts=(Prompt(prompt="Hi!"),),
        options={"temperature": 0.5, "seed": None},
        model="tiny",
        documents=False,
    )


def test_a_request_may_have_messages_toggles_and_a_format() -> None:
    body = {
        "messages": [{"role": "user", "content": "Hi!"}],
        "use_chat_template": False,
        "add_generation_prompt": True,
        "response_format": {"type": "json_object"},
    }
    assert read(**body) == Request(
        prompts=(
            Prompt(messages=(user("Hi!"),), use_chat_template=False, add_generation_prompt=True),
        ),
        response_format=ResponseFormat(type="json_object"),
    )


@pytest.mark.parametrize(
    "wanted",
    [
        {"type": "json_schema"},
        {"type": "json_object", "json_schema": {"schema": {}}},
        {"type": "xml"},
        {"type": "json_schema", "json_schema": {"schema": {}, "strictly": True}},
    ],
)
def test_a_format_that_is_none_is_refused(wanted: Any) -> None:
    with pytest.raises(msgspec.ValidationError):
        read(prompt="Hi!", response_format=wanted)


def test_all_that_somebody_wrote_is_the_text_of_a_prompt() -> None:
    assert Prompt(prompt="a").text == "a"
    assert Prompt(messages=(user("a"), user("b"))).text == "a\nb"
    assert Prompt(ids=(1, 2)).text == ""


# ---------------------------------------------------------------- refused without a model


def test_what_nothing_refuses_passes_unchanged() -> None:
    request = changed(n=3, options={"temperature": 0.5}, model="tiny")
    assert checked(configured(), request) == request


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ({"prompt": "a", "messages": (user("a"),)}, "prompt or messages"),
        ({"use_chat_template": True}, "prompt or messages"),
        ({"prompt": ""}, "the prompt is empty"),
        ({"messages": ()}, "messages is empty"),
        ({"messages": ({"role": "user"},)}, r"messages\[0\]"),
        ({"messages": ({"role": "user", "content": "a"}, {"role": "x", "y": 1})}, r"messages\[1\]"),
        ({"prompt": "a\ud800"}, "the prompt holds a lone surrogate at character 1"),
        ({"messages": (user("\ud800"),)}, r"messages\[0\] holds a lone surrogate"),
    ],
)
@pytest.mark.parametrize("guard", [labs.Guard(), labs.Guard(mask=("email",))])
def test_a_malformed_prompt_is_refused_by_name(prompt: Any, words: str, guard: labs.Guard) -> None:
    with pytest.raises(labs.InputError, match=words):
        checked(configured(guard=guard), asking(**prompt))


def test_messages_may_come_as_dicts_from_any_iterable() -> None:
    for messages in ([{"role": "user", "content": "a"}], iter([user("a")]), (user("a"),)):
        (prompt,) = checked(configured(), asking(messages=messages)).prompts
        assert prompt == Prompt(messages=(user("a"),))


@pytest.mark.parametrize("name", ["other", "auto", ""])
def test_an_unknown_model_is_refused_with_those_that_are_there(name: str) -> None:
    config = configured(models={"large": configured(model_id="large")})
    error = refusal(config, changed(model=name))
    assert isinstance(error, labs_request.Refusal)
    assert (error.status, error.code, error.param) == (404, "model_not_found", "model")
    assert str(error) == f"unknown model {name!r}; known models: tiny, large"


def test_the_router_answers_for_auto_where_it_has_rules() -> None:
    rule = labs.RouterRule(model="tiny", pattern="code")
    config = configured(router=labs.Router(rules=(rule,)))
    assert checked(config, changed(model="auto")).model == "auto"
    assert isinstance(refusal(config, changed(model="other")), labs_request.Refusal)


def test_the_settings_of_the_named_model_are_those_that_count() -> None:
    logprobs = labs.Generation(logprobs=1)
    guard = labs.Guard(deny=("bad",))
    large = configured(model_id="large", generation=logprobs)
    config = configured(guard=guard, models={"large": large})
    assert checked(config, asking())
    assert str(refusal(config, changed(model="large"))).startswith("logprobs: ")
    assert checked(config, changed(model="large", options={"logprobs": None}))


@pytest.mark.parametrize(
    ("options", "word"), [({"temperature": -1.0}, "temperature"), ({"warmth": 1}, "warmth")]
)
def test_an_option_that_is_wrong_is_refused_by_name(options: Any, word: str) -> None:
    assert word in str(refusal(configured(), changed(options=options)))


def test_documents_without_a_database_are_refused() -> None:
    assert "documents" in str(refusal(configured(), changed(documents=True)))
    assert checked(configured(), changed(documents=False))


def test_log_probabilities_are_refused_where_answers_are_filtered() -> None:
    request = changed(options={"logprobs": 0})
    assert str(refusal(guarded(mask=("card",)), request)).startswith("logprobs: ")
    assert checked(guarded(mask=("card",), side="input"), request) == request


def test_a_filtered_prompt_is_refused_before_its_model_is_looked_for() -> None:
    error = refusal(guarded(deny=("bad",)), changed(asking(prompt="so bad"), model="other"))
    assert isinstance(error, labs_guard.Filtered)
    assert (error.rule, error.code) == ("deny[0]", "content_filtered")


def test_masks_are_put_into_every_prompt_and_nothing_else_changes() -> None:
    prompts = (
        Prompt(prompt="to a@b.co", use_chat_template=False),
        Prompt(messages=(user("to a@b.co"), labs.Message(role="assistant", content="c@d.co"))),
        Prompt(ids=(97,), add_generation_prompt=True),
    )
    request = changed(prompts=prompts, n=2, options={"seed": 1})
    found = checked(guarded(mask=("email",)), request)
    assert found.prompts == (
        Prompt(prompt="to [email]", use_chat_template=False),
        Prompt(messages=(user("to [email]"), labs.Message(role="assistant", content="[email]"))),
        prompts[2],
    )
    assert changed(found, prompts=prompts) == request


# ---------------------------------------------------------------- the context


def test_without_filters_and_documents_a_context_has_none() -> None:
    config = configured(models={"large": configured(model_id="large")})
    context = labs_request.open_context(config)
    assert [*context.configs] == ["tiny", "large"]
    assert (context.filters, context.encoder) == (None, None)


def test_filters_tell_whoever_opens_the_context() -> None:
    acted: list[tuple[str, str]] = []
    context = labs_request.open_context(
        guarded(mask=("email",), deny=("bad",)), tell=lambda *each: acted.append(each)
    )
    labs_request.check(context, asking(prompt="to a@b.co"))
    assert acted == [("email", "input")]
    done = labs.Done("stop", labs.Usage(1, 1), labs.Timings(0.0, 0.1, 0.2, 5.0))
    labs_request.shown(context, labs.fold([labs.Delta("so bad")], done))
    assert acted[1:] == [("deny[0]", "output")]


def test_a_context_names_an_encoder_and_loads_nothing() -> None:
    documents = labs.Documents(database=DATABASE, embedding_model="package:absent/model")
    context = labs_request.open_context(configured(documents=documents))
    assert context.encoder is not None
    assert (context.encoder.spec.model_name, context.encoder.nbytes) == ("package:absent/model", 0)


def test_a_classifier_that_is_not_there_is_told_when_the_context_is_opened() -> None:
    with pytest.raises(labs.ModelError, match="guard_classifier"):
        labs_request.open_context(guarded(classifier="./no", classifier_labels=("toxic",)))


# ---------------------------------------------------------------- with the model


def test_masks_reach_the_inputs(tiny: labs.Model) -> None:
    for prompt in ({"prompt": "to a@b.co"}, {"messages": [{"role": "user", "content": "a@b.co"}]}):
        (inputs,) = prepared(guarded(mask=("email",)), tiny, asking(**prompt)).inputs
        assert "[email]" in inputs.prompt
        assert "a@b.co" not in inputs.prompt


@pytest.mark.parametrize("configured_as", [True, False])
@pytest.mark.parametrize("asked", [None, True, False])
def test_a_chat_toggle_is_as_asked_for_or_else_as_configured(
    tiny: labs.Model, configured_as: bool, asked: bool | None
) -> None:
    config = configured(use_chat_template=configured_as)
    (inputs,) = prepared(config, tiny, asking(prompt="Hi!", use_chat_template=asked)).inputs
    wanted = configured_as if asked is None else asked
    assert inputs == labs.build_inputs(tiny, prompt="Hi!", use_chat_template=wanted)
    config = configured(add_generation_prompt=configured_as)
    request = asking(messages=(user("Hi!"),), add_generation_prompt=asked)
    (inputs,) = prepared(config, tiny, request).inputs
    assert inputs == labs.build_inputs(tiny, messages=[user("Hi!")], add_generation_prompt=wanted)


def test_only_what_a_prompt_leaves_open_is_filled_in() -> None:
    chat = labs.Chat(use_chat_template=False, add_generation_prompt=False)
    prompt = Prompt(prompt="a", use_chat_template=True)
    assert labs_request.filled(prompt, chat) == Prompt(
        prompt="a", use_chat_template=True, add_generation_prompt=False
    )


def test_a_prompt_of_ids_is_taken_as_it_is(tiny: labs.Model) -> None:
    assert prepared(configured(), tiny, asking(ids=(97, 98))).inputs == (
        labs.Inputs((97, 98), "ab"),
    )
    with pytest.raises(labs.InputError, match="names token 999"):
        prepared(configured(), tiny, asking(ids=(999,)))


def test_the_text_of_ids_is_filtered_and_not_masked(tiny: labs.Model) -> None:
    config = guarded(mask=("email",), deny=("bad",))
    for text, rule in (("bad", "deny[0]"), ("a@b.co", "mask")):
        with pytest.raises(labs_guard.Filtered) as caught:
            prepared(config, tiny, asking(ids=tuple(text.encode())))
        assert caught.value.rule == rule
    assert prepared(config, tiny, asking(ids=tuple(b"good"))).inputs[0].prompt == "good"


def test_tokens_are_counted_with_the_template(tiny: labs.Model) -> None:
    tokens = len(labs.build_inputs(tiny, prompt="Hi!").input_ids)
    assert prepared(guarded(max_prompt_tokens=tokens), tiny, asking()).inputs
    with pytest.raises(labs_guard.Filtered, match=f"has {tokens} tokens; at most {tokens - 1}"):
        prepared(guarded(max_prompt_tokens=tokens - 1), tiny, asking())


def test_each_prompt_is_answered_so_many_times_with_seeds_of_their_own(tiny: labs.Model) -> None:
    prompts = (Prompt(prompt="a"), Prompt(prompt="b"))
    request = Request(prompts=prompts, n=2, options={"seed": 7, "temperature": 1.0})
    found = [*prepared(configured(), tiny, request).answers()]
    a, b = (labs.build_inputs(tiny, prompt=text) for text in "ab")
    assert [inputs for inputs, _ in found] == [a, a, b, b]
    assert [generation.seed for _, generation in found] == [7, 8, 7, 8]
    assert {generation.max_new_tokens for _, generation in found} == {8}


def test_a_choice_without_a_seed_stays_without_and_seeds_stay_in_their_range() -> None:
    generation = labs.Generation()
    assert labs_request.seeded_choice(generation, 3) is generation
    last = labs.Generation(seed=2**63 - 1)
    assert [labs_request.seeded_choice(last, n).seed for n in range(2)] == [2**63 - 1, 0]


# ---------------------------------------------------------------- documents


@pytest.mark.parametrize("prompt", [{"prompt": QUESTION}, {"messages": (user(QUESTION),)}])
def test_passages_are_put_into_the_prompt_and_told_as_sources(
    tiny: labs.Model, prompt: Any
) -> None:
    found = prepared(documented(), tiny, asking(**prompt))
    assert found.sources == (labs.Source(1, "docs/a.md", "Seine"),)
    assert "> The Seine runs through Paris." in found.inputs[0].prompt
    assert QUESTION in found.inputs[0].prompt


def test_sources_are_none_without_documents_and_empty_without_a_passage(tiny: labs.Model) -> None:
    config = documented(default=False)
    request = asking(prompt=QUESTION)
    assert prepared(config, tiny, request).sources is None
    assert prepared(config, tiny, changed(request, documents=True)).sources
    assert prepared(config, tiny, changed(request, documents=False)).sources is None
    found = prepared(config, tiny, changed(asking(prompt="How are you?"), documents=True))
    assert found.sources == ()
    assert found.inputs == (labs.build_inputs(tiny, prompt="How are you?"),)


def test_the_sources_of_all_prompts_are_told(tiny: labs.Model) -> None:
    request = changed(prompts=(Prompt(prompt=QUESTION), Prompt(prompt="Where is Paris?")))
    assert len(prepared(documented(), tiny, request).sources or ()) == 2


def test_no_passages_come_to_ids(tiny: labs.Model) -> None:
    found = prepared(documented(), tiny, asking(ids=tuple(QUESTION.encode())))
    assert (found.sources, found.inputs[0].prompt) == ((), QUESTION)


def test_passages_need_a_template(tiny: labs.Model) -> None:
    request = asking(prompt=QUESTION, use_chat_template=False)
    config = documented()
    with pytest.raises(labs.InputError, match=r"^documents: passages need"):
        prepared(config, tiny, request)
    assert prepared(config, tiny, changed(request, documents=False)).sources is None


def test_passages_are_not_filtered_but_counted(tiny: labs.Model) -> None:
    config = documented("Write to a@b.co in Paris.")
    guard = labs.Guard(mask=("email",))
    found = prepared(msgspec.structs.replace(config, guard=guard), tiny, asking(prompt=QUESTION))
    assert "> Write to a@b.co in Paris." in found.inputs[0].prompt
    few = msgspec.structs.replace(config, guard=labs.Guard(max_prompt_tokens=60))
    with pytest.raises(labs_guard.Filtered, match="max_prompt_tokens"):
        prepared(few, tiny, asking(prompt=QUESTION))


# ---------------------------------------------------------------- formats of answers


def test_each_answer_gets_a_constraint_of_its_own(tiny: labs.Model) -> None:
    found = prepared(configured(), tiny, changed(response_format=format_of(COLOUR), n=2))
    first, second = (found.constraints() for _ in found.answers())
    assert first[0] is not second[0]
    for only, (inputs, generation) in zip((first, second), found.answers(), strict=True):
        answer = labs.generate(tiny, inputs, generation, processors=only)
        assert json.loads(answer.text) in ("red", "green")


@pytest.mark.parametrize("wanted", [None, ResponseFormat(type="text")])
def test_text_needs_no_constraint(tiny: labs.Model, wanted: ResponseFormat | None) -> None:
    assert prepared(configured(), tiny, changed(response_format=wanted)).constraints() == ()


def test_an_object_is_kept_to(tiny: labs.Model) -> None:
    (only,) = labs_request.constraints(tiny, ResponseFormat(type="json_object"))
    assert isinstance(only, labs_typed.Constraint)
    inputs = labs.build_inputs(tiny, prompt="Hi!")
    answer = labs.generate(tiny, inputs, labs.Generation(max_new_tokens=8), processors=[only])
    assert answer.text.startswith("{")


def test_a_schema_that_cannot_be_expressed_is_refused_when_it_is_prepared(
    tiny: labs.Model,
) -> None:
    with pytest.raises(labs.InputError, match="not"):
        prepared(configured(), tiny, changed(response_format=format_of({"not": {}})))


# ---------------------------------------------------------------- what is shown, and explained


def test_without_filters_all_is_shown(tiny: labs.Model) -> None:
    context = labs_request.open_context(configured())
    show = labs_request.shown_events(context, labs.Inputs((1,), "a"), labs.Generation(logprobs=1))
    event = labs.Delta("bad")
    assert show(event) == [event]
    completion = labs.generate(tiny, labs.build_inputs(tiny, prompt="a"), max_new_tokens=2)
    assert labs_request.shown(context, completion) is completion


def test_an_answer_is_shown_up_to_what_a_filter_refuses(tiny: labs.Model) -> None:
    config = guarded(deny=("bad",))
    context = labs_request.open_context(config)
    show = labs_request.shown_events(context, labs.Inputs((1,), "a"), config.generation)
    found = [each for text in ("so ", "bad", "more") for each in show(labs.Delta(text))]
    *deltas, done = found
    assert "".join(each.text for each in deltas if isinstance(each, labs.Delta)) == "so "
    assert isinstance(done, labs.Done)
    assert done.finish_reason == "content_filter"
    with pytest.raises(labs.InputError, match=r"^logprobs: "):
        labs_request.shown_events(context, labs.Inputs((), ""), labs.Generation(logprobs=0))
    inputs, bias = labs.build_inputs(tiny, prompt="a"), {98: 100.0}
    context = labs_request.open_context(guarded(deny=("bb",)))
    completion = labs.generate(tiny, inputs, max_new_tokens=3, temperature=0, logit_bias=bias)
    assert completion.text == "bbb"
    found_whole = labs_request.shown(context, completion)
    assert (found_whole.text, found_whole.finish_reason) == ("", "content_filter")


def test_an_explanation_tells_where_settings_come_from(tiny: labs.Model) -> None:
    request = changed(options={"temperature": 0.5})
    found = prepared(configured(), tiny, request)
    told = labs_request.explain(
        tiny, found.inputs[0], found.generation, dict.fromkeys(request.options, "request")
    )
    assert told.prompt == found.inputs[0].prompt
    assert told.prompt_tokens == len(found.inputs[0].input_ids)
    assert told.settings["temperature"] == labs_request.SettingValue(0.5, "request")
    assert told.settings["max_new_tokens"] == labs_request.SettingValue(8, "default")


def test_importing_it_imports_no_room_that_a_request_may_not_need(folder: Path) -> None:
    rooms = "{'torch', 'labs_guard', 'labs_rag', 'labs_embed', 'labs_typed', 'labs_decode'}"
    code = f"import sys, labs_request; print({rooms} & {{*sys.modules}})"
    assert kit.python(code, folder).stdout == "set()\n"
