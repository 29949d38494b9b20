# SPDX-License-Identifier: Apache-2.0
"""Typed answers and choices: random types and schemas against the default model and tiny ones."""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal

import jsonschema
import msgspec
import pytest
import torch
from msgspec import Meta

import labs
import labs_engine
import labs_jsonl
import labs_request
import labs_typed
import test_labs
import test_labs_api

folder, one_thread = test_labs.folder, test_labs.one_thread
tiny_folder, tiny = test_labs.tiny_folder, test_labs.tiny
Site, configured, error_of = test_labs_api.Site, test_labs_api.configured, test_labs_api.error_of
SCHEMAS = int(os.environ.get("LABS_SCHEMAS", "40"))
COLOUR = {"enum": ["red", "green"]}
FORMAT = {"type": "json_schema", "json_schema": {"schema": COLOUR}}


class Street(msgspec.Struct):
    name: Annotated[str, Meta(max_length=8)]
    number: Annotated[int, Meta(ge=1, le=99)]


class House(msgspec.Struct, forbid_unknown_fields=True):
    street: Street
    kind: Literal["flat", "villa"]
    rooms: Annotated[list[Annotated[int, Meta(ge=1, le=9)]], Meta(max_length=3)]
    sold: bool | None = None


# ---------------------------------------------------------------- helpers


@pytest.fixture(scope="module")
def real() -> labs.Model:
    return labs.load_model(labs.load_config(env={}))


def ask(model: labs.Model, text: str = "Describe it as JSON.") -> labs.Inputs:
    return labs.build_inputs(model, prompt=text)


def random_schema(chance: random.Random, depth: int = 0) -> dict[str, Any]:
    """Make a schema as people write them; what is unbounded by nature has a bound."""
    kinds = ["string", "integer", "boolean", "enum", "const", "null", "pattern", "number"]
    kinds += ["object", "object", "array", "anyOf", "ref"] if depth < 2 else []
    kind = chance.choice(kinds) if depth else "object"
    count = chance.randint(1, 3) if depth < 2 else 1
    inner = [random_schema(chance, depth + 1) if depth < 2 else {} for _ in range(count)]
    names = ["name", "age", "city", "tags", "größe", "a b", "x"]
    if kind == "object":
        properties = dict(zip(chance.sample(names, len(inner)), inner, strict=True))
        required = [name for name in properties if chance.random() < 0.8]
        return {
            "type": "object",
            "properties": properties,
            "required": required,
            "additionalProperties": False,
        }
    low = chance.randint(-50, 50)
    return {
        "string": {"type": "string", "maxLength": chance.randint(1, 30)},
        "integer": {"type": "integer", "minimum": low, "maximum": low + chance.randint(0, 99)},
        "number": {"type": "number", "enum": [0.5, 1.25, -3]},
        "boolean": {"type": "boolean"},
        "null": {"type": "null"},
        "enum": {"enum": chance.sample(["red", "green", 1, None, True, "ü", '"'], 3)},
        "const": {"const": chance.choice(["yes", 42, {"a": [1]}])},
        "pattern": {"type": "string", "pattern": "^[a-z]{2,5}-[0-9]+x?$", "maxLength": 12},
        "array": {"type": "array", "items": inner[0], "maxItems": chance.randint(0, 3)},
        "anyOf": {"anyOf": inner},
        "ref": {"allOf": [inner[0]]},
    }[kind]


def answers(
    model: labs.Model, schemas: list[dict[str, Any]], **options: Any
) -> Iterator[tuple[int, labs.Completion]]:
    """Answer one prompt under each schema, all in one batch."""
    generation = labs.evolve(labs.Generation(max_new_tokens=512), **options)
    inputs, pieces = ask(model), dict[int, list[labs.Delta]]()
    streams = (
        labs.open_request(model, i, inputs, generation, (labs_typed.Constraint(model, schema),))
        for i, schema in enumerate(schemas)
    )
    for index, event in labs.run(model, streams, 32):
        if isinstance(event, labs.Failed):
            raise event.error
        if isinstance(event, labs.Delta):
            pieces.setdefault(index, []).append(event)
        else:
            yield index, labs.fold(pieces.pop(index, []), event)


# ---------------------------------------------------------------- types


@pytest.mark.parametrize("options", [{"temperature": 0}, {"temperature": 1.5, "seed": 3}])
def test_an_answer_is_a_value_of_the_type_that_was_asked_for(tiny, options):
    for seed in range(4):
        found = labs_typed.generate_as(tiny, ask(tiny), House, max_new_tokens=300, **options)
        assert isinstance(found, House)
        assert isinstance(found.street, Street)
        assert found.kind in ("flat", "villa")
        assert 1 <= found.street.number <= 99
        options = {**options, "seed": seed}


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (Literal["red", "green"], {"red", "green"}),
        (Annotated[int, Meta(ge=3, le=5)], {3, 4, 5}),
        (Annotated[int, Meta(gt=3, lt=5)], {4}),
        (bool, {True, False}),
        (None, {None}),
    ],
)
def test_a_type_need_not_be_a_struct(tiny, kind, values):
    assert labs_typed.generate_as(tiny, ask(tiny), kind, temperature=0) in values


def test_an_integer_ends_though_the_model_goes_on_with_digits(tiny):
    digit = tiny.tokenizer("1", add_special_tokens=False)["input_ids"][0]
    found = labs_typed.generate_as(tiny, ask(tiny), int, logit_bias={digit: 100.0}, temperature=0)
    assert found == int("1" * 16)


@pytest.mark.parametrize("options", [{"max_new_tokens": 2}, {"stop": ('"',)}])
def test_an_answer_that_is_not_whole_is_an_error_that_keeps_it(tiny, options):
    with pytest.raises(labs_typed.IncompleteOutput) as caught:
        labs_typed.generate_as(tiny, ask(tiny), House, **options)
    assert House.__name__ not in caught.value.completion.text
    assert caught.value.completion.usage.completion_tokens >= 1


@pytest.mark.parametrize(
    ("kind", "named"),
    [(bytes, "contentEncoding"), (set[int], "uniqueItems"), (complex, "complex")],
)
def test_a_type_that_cannot_be_expressed_is_refused_by_name(tiny, kind, named):
    with pytest.raises(labs.InputError, match=named):
        labs_typed.generate_as(tiny, ask(tiny), kind)


@pytest.mark.parametrize(
    ("schema", "named"),
    [
        ({"not": {"type": "string"}}, "not"),
        ({"type": "strin"}, "strin"),
        ({"type": "string", "format": "nope"}, "nope"),
        ({"if": {}, "then": {}}, "if"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"$ref": "http://127.0.0.1:1/schema"}, "127.0.0.1"),
        ({"type": "object", "properties": {"a": {"contentEncoding": "x"}}}, "contentEncoding"),
    ],
)
def test_a_schema_that_cannot_be_expressed_is_refused_by_name(tiny, schema, named):
    with pytest.raises(labs.InputError, match=named):
        labs_typed.Constraint(tiny, schema)


def test_a_property_may_be_called_as_a_keyword_is(tiny):
    schema = {"properties": {"contentEncoding": {"type": "null"}}, "required": ["contentEncoding"]}
    labs_typed.Constraint(tiny, {"type": "object", "additionalProperties": False, **schema})


def test_a_date_that_no_calendar_has_is_no_value(tiny, monkeypatch):
    done = labs.generate(tiny, ask(tiny), max_new_tokens=1)
    answer = msgspec.structs.replace(done, text='"2026-02-31"', finish_reason="stop")
    monkeypatch.setattr(labs, "generate", lambda *_, **__: answer)
    with pytest.raises(labs.GenerationError, match="date"):
        labs_typed.generate_as(tiny, ask(tiny), date)


def test_without_llguidance_nothing_is_unconstrained(tiny, monkeypatch):
    monkeypatch.setattr(labs_typed, "_TOKENIZERS", {})
    find = labs_typed.importlib.util.find_spec
    missing = lambda name: None if name == "llguidance" else find(name)  # noqa: E731
    monkeypatch.setattr(labs_typed.importlib.util, "find_spec", missing)
    with pytest.raises(labs.InputError, match="pip install llguidance"):
        labs_typed.generate_as(tiny, ask(tiny), House)


# ---------------------------------------------------------------- constraints in a batch


def test_random_schemas_hold_in_one_batch(real):
    """Also LABS_SCHEMAS=1000 for the figure: whole answers are valid, and nearly all are whole."""
    chance = random.Random(5)
    schemas = [random_schema(chance) for _ in range(SCHEMAS)]
    whole = 0
    for index, answer in answers(real, schemas, temperature=0):
        if answer.finish_reason == "stop":
            jsonschema.validate(json.loads(answer.text), schemas[index])
            whole += 1
    assert whole >= 0.95 * SCHEMAS


def test_rows_with_and_without_a_schema_share_a_batch_and_keep_their_texts(tiny):
    inputs, options = ask(tiny), labs.Generation(max_new_tokens=40, temperature=1.0, seed=3)
    kinds = [None, COLOUR, None, {"type": "integer"}]

    def streams(numbers: list[int]) -> Iterator[labs.InFlight]:
        for number in numbers:
            only = () if kinds[number] is None else (labs_typed.Constraint(tiny, kinds[number]),)
            yield labs.open_request(tiny, number, inputs, options, only)

    def texts(numbers: list[int]) -> dict[int, str]:
        found = dict.fromkeys(numbers, "")
        for number, event in labs.run(tiny, streams(numbers), 4):
            found[number] += getattr(event, "text", "")
        return found

    together = texts([0, 1, 2, 3])
    assert together == {number: texts([number])[number] for number in range(4)}
    assert json.loads(together[1]) in ("red", "green")


def test_guessed_tokens_are_taken_back(tiny):
    inputs = ask(tiny, 'Repeat: {"a":[1,1,1,1,1,1,1,1]} {"a":[1,1,1,1]}')
    schema = {"type": "object", "properties": {"a": {"type": "array", "items": {"const": 1}}}}
    schema |= {"required": ["a"], "additionalProperties": False}
    texts = set()
    for guessed in (None, 1, 4, 8):
        only = [labs_typed.Constraint(tiny, schema)]
        options = {"max_new_tokens": 30, "prompt_lookup_num_tokens": guessed, "temperature": 0}
        texts.add(labs.generate(tiny, inputs, processors=only, **options).text)
    assert len(texts) == 1


def test_a_constraint_follows_what_is_taken_back(tiny):
    only, logits = labs_typed.Constraint(tiny, COLOUR), torch.zeros(262)
    prompt = [5, 6, 7]
    encode = lambda text: tiny.tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731

    def allowed(text: str) -> set[int]:
        return {*torch.isfinite(only([*prompt, *encode(text)], logits)).nonzero()[:, 0].tolist()}

    assert allowed("") == {*encode('"')}
    r, g = allowed('"') & {*encode("r")}, allowed('"') & {*encode("g")}
    assert r
    assert g
    assert allowed('"gr') >= {*encode("e")}
    assert allowed('"') >= {*encode("r"), *encode("g")}
    assert allowed('"red"') == {*tiny.eos_token_ids}
    assert allowed('"re') >= {*encode("d")}


def test_what_is_forbidden_stays_so_whatever_the_bias(tiny):
    only, bias = [labs_typed.Constraint(tiny, COLOUR)], {97: 100.0}
    text = labs.generate(tiny, ask(tiny), processors=only, logit_bias=bias, temperature=0).text
    assert json.loads(text) in ("red", "green")


def test_grammars_are_made_once_and_no_more_than_so_many_are_kept(tiny, monkeypatch):
    monkeypatch.setattr(labs_typed, "MAX_GRAMMARS", 3)
    monkeypatch.setattr(labs_typed, "_TOKENIZERS", labs_typed.weakref.WeakKeyDictionary())
    for number in (*range(6), 5, 5):
        labs_typed.Constraint(tiny, {"const": number})
    make = labs_typed._TOKENIZERS[tiny.tokenizer]
    info = make.cache_info()
    assert (info.misses, info.hits, info.currsize) == (6, 2, 3)


# ---------------------------------------------------------------- choices


def logprobs(model: labs.Model, ids: list[int]) -> list[float]:
    """Return the log-probability of each of ids[1:] after those before it."""
    with torch.inference_mode():
        logits = model.model(input_ids=torch.tensor([ids])).logits[0, :-1]
    found = logits.float().log_softmax(-1).gather(-1, torch.tensor(ids[1:])[:, None])
    return list(found[:, 0].tolist())


def exact(model: labs.Model, inputs: labs.Inputs, options: list[str]) -> dict[str, float]:
    """Compute the choice option by option, with the end as a token of its own."""
    totals = []
    for option in options:
        ids = model.tokenizer(option, add_special_tokens=False)["input_ids"]
        ends = [
            sum(logprobs(model, [*inputs.input_ids, *ids, end])[len(inputs.input_ids) - 1 :])
            for end in model.eos_token_ids
        ]
        totals.append(torch.tensor(ends).logsumexp(-1))
    shares = torch.stack(totals).softmax(-1).tolist()
    return dict(zip(options, shares, strict=True))


@pytest.mark.parametrize(
    "options", [["yes", "no"], ["a", "ab", "abc"], ["x", "a much longer option", "b"]]
)
def test_a_choice_is_the_exact_probability_of_each_option(tiny, options):
    found = labs_typed.choose(tiny, ask(tiny), options)
    assert found == pytest.approx(exact(tiny, ask(tiny), options), abs=1e-4)
    assert sum(found.values()) == pytest.approx(1)


def test_the_default_model_chooses_as_it_knows(real):
    question = labs.build_inputs(real, prompt="What is the capital of France? One word.")
    found = labs_typed.choose(real, question, ["Paris", "Berlin", "Madrid"])
    assert max(found, key=lambda option: found[option]) == "Paris"


@pytest.mark.parametrize("options", [[], ["one"], ["a", "a"], ["a", ""]])
def test_a_choice_needs_two_different_texts(tiny, options):
    with pytest.raises(labs.InputError, match="two or more different"):
        labs_typed.choose(tiny, ask(tiny), options)


def test_a_choice_beyond_the_context_is_refused(tiny):
    with pytest.raises(labs.PromptTooLong, match="context holds"):
        labs_typed.choose(tiny, ask(tiny), ["a", "b" * 5000])


# ---------------------------------------------------------------- over HTTP


@pytest.fixture
def site(tiny) -> Iterator[Any]:
    engine = labs_engine.Engine(tiny)
    yield Site(engine, configured(generation=labs.Generation(temperature=0)))
    engine.close()


def test_a_chat_answers_in_the_format_that_was_asked_for(site):
    body = {"messages": [{"role": "user", "content": "hi"}], "response_format": FORMAT}
    for choice in site.post("/v1/chat/completions", {**body, "n": 2}).json["choices"]:
        assert json.loads(choice["message"]["content"]) in ("red", "green")
    stream = site.post("/v1/chat/completions", {**body, "stream": True}).text
    chunks = [json.loads(line[6:]) for line in stream.splitlines() if line.startswith("data: {")]
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert json.loads(text) in ("red", "green")


def test_generate_answers_in_the_format_that_was_asked_for(site):
    body = {"prompt": "hi", "response_format": FORMAT}
    assert json.loads(site.post("/generate", body).json["text"]) in ("red", "green")
    objects = {"prompt": "hi", "response_format": {"type": "json_object"}, "max_new_tokens": 40}
    assert site.post("/generate", objects).json["text"].startswith("{")
    plain = {"prompt": "hi", "response_format": {"type": "text"}, "max_new_tokens": 4}
    assert (
        site.post("/generate", plain).json["text"]
        == (site.post("/generate", {"prompt": "hi", "max_new_tokens": 4}).json["text"])
    )


@pytest.mark.parametrize(
    ("wanted", "named"),
    [
        ({"type": "json_schema", "json_schema": {"schema": {"not": {}}}}, "not"),
        ({"type": "json_schema"}, "json_schema"),
        ({"type": "json_object", "json_schema": {"schema": {}}}, "json_schema"),
        ({"type": "xml"}, "xml"),
        ({"type": "json_schema", "json_schema": {"schema": {}, "strictly": True}}, "strictly"),
    ],
)
@pytest.mark.parametrize("path", ["/generate", "/v1/chat/completions", "/explain"])
def test_a_format_that_cannot_be_kept_is_refused(site, path, wanted, named):
    prompt = {"messages": [{"role": "user", "content": "hi"}]}
    error = error_of(site.post(path, {**prompt, "response_format": wanted}), 400)
    assert named in error["message"]


def test_the_answer_of_a_choice_names_its_model_and_sums_to_one(site, tiny):
    body = {"prompt": "hi", "options": ["yes", "no", "perhaps"]}
    answer = site.post("/choose", body).json
    assert answer["model"] == "tiny"
    expected = labs_typed.choose(tiny, labs.build_inputs(tiny, prompt="hi"), body["options"])
    assert answer["options"] == pytest.approx(expected)
    assert math.isclose(sum(answer["options"].values()), 1, rel_tol=1e-6)


@pytest.mark.parametrize(
    "changes", [{"options": ["one"]}, {"options": ["a", "a"]}, {"max_new_tokens": 3}]
)
def test_a_choice_that_makes_no_sense_is_refused(site, changes):
    error_of(site.post("/choose", {"prompt": "hi", "options": ["a", "b"], **changes}), 400)


# ---------------------------------------------------------------- files and the shell


def test_lines_of_a_file_have_formats_of_their_own_and_are_replayed(tiny):
    chat = {"messages": [{"role": "user", "content": "hi"}], "response_format": FORMAT}
    lines = [
        {"id": "typed", "prompt": "hi", "response_format": FORMAT},
        {"id": "free", "prompt": "hi", "max_new_tokens": 4},
        {"custom_id": "o", "method": "POST", "url": "/v1/chat/completions", "body": chat},
        {"id": "bad", "prompt": "hi", "response_format": {"type": "json_schema"}},
        {
            "id": "not",
            "prompt": "hi",
            "response_format": {"type": "json_schema", "json_schema": {"schema": {"not": {}}}},
        },
    ]
    data = [(n, json.dumps(line).encode()) for n, line in enumerate(lines, 1)]
    config = labs.Config(generation=labs.Generation(temperature=1.0, max_new_tokens=40))
    context, ordered = labs_request.open_context(config), labs_jsonl.Batching(ordered=True)
    rows = [*labs_jsonl.answer_lines(tiny, context, data, labs_jsonl.Tally(), ordered)]
    found = [json.loads(row) for row in rows]
    assert json.loads(found[0]["text"]) in ("red", "green")
    message = found[2]["response"]["body"]["choices"][0]["message"]["content"]
    assert json.loads(message) in ("red", "green")
    assert "json_schema" in found[3]["error"]["message"]
    assert "not" in found[4]["error"]["message"]
    verdicts = [v.verdict for v in labs_jsonl.replay(tiny, context, enumerate(rows[:3], 1))]
    assert verdicts == ["same"] * 3


def gen(*arguments: str, **files: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(test_labs.ROOT / "labs_cli.py"), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, capture_output=True, text=True, env=environment, stdin=-3, timeout=120, check=False
    )


def test_the_shell_keeps_an_answer_to_a_schema_and_chooses(folder, tiny_folder):
    Path("schema.json").write_text(json.dumps(COLOUR))
    Path("wrong.json").write_text("{")
    model = ("--model", str(tiny_folder), "--prompt", "hi")
    done = gen(*model, "--schema", "schema.json")
    assert json.loads(done.stdout) in ("red", "green")
    answer = json.loads(gen(*model, "--schema", "schema.json", "--json").stdout)
    assert answer["request"]["response_format"]["json_schema"]["schema"] == COLOUR
    chosen = gen(*model, "--choose", "yes", "--choose", "no").stdout.splitlines()
    shares = [float(line.split()[0]) for line in chosen]
    assert {line.split()[1] for line in chosen} == {"yes", "no"}
    assert shares == sorted(shares, reverse=True)
    assert "wrong.json" in gen(*model, "--schema", "wrong.json").stderr


RIVALS = [*itertools.combinations(["--schema=x", "--choose=a", "--chat"], 2)]


@pytest.mark.parametrize("rival", RIVALS)
def test_flags_that_contradict_each_other_are_refused(rival):
    if rival == ("--schema=x", "--chat"):
        rival = ("--schema=x", "--explain")
    done = gen(*rival, *([] if "--chat" in rival else ["--prompt", "hi"]))
    assert (done.returncode, "exclude each other" in done.stderr) == (2, True)
