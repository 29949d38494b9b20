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
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal

import jsonschema
import kit
import msgspec
import pytest
import torch
from kit import Site, configured, error_of
from msgspec import Meta

import labs
import labs_cli
import labs_engine
import labs_jsonl
import labs_request
import labs_schema
import labs_typed

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


@pytest.fixture
def trials(monkeypatch) -> list[str]:
    """Forget all grammars, and list the schemas that are tried out from now on."""
    monkeypatch.setattr(labs_typed, "_TOKENIZERS", labs_typed.weakref.WeakKeyDictionary())
    seen: list[str] = []
    real = labs_schema.trial
    monkeypatch.setattr(labs_schema, "trial", lambda text: [seen.append(text), real(text)][1])
    return seen


def test_a_schema_is_tried_once_and_so_is_one_that_is_refused(tiny, trials):
    for number in (1, 2, 2, 1):
        labs_typed.Constraint(tiny, {"const": number})
        with pytest.raises(labs.InputError, match="Unimplemented"):
            labs_typed.Constraint(tiny, {"not": {"const": number}})
    assert len(trials) == 4


def test_grammars_are_kept_by_the_bytes_that_they_may_hold(tiny, trials, monkeypatch):
    monkeypatch.setattr(labs_typed, "KEPT_BYTES", 3 * labs_typed.GRAMMAR_BYTES)
    made, compiled = [], labs_schema.compiled
    monkeypatch.setattr(
        labs_schema, "compiled", lambda *given: [made.append(given[-1]), compiled(*given)][1]
    )
    for number in (*range(6), 5, 4, 3):
        labs_typed.Constraint(tiny, {"const": number})
    assert len(made) == 6
    labs_typed.Constraint(tiny, {"const": 0})
    assert (len(made), len(trials)) == (7, 6)  # compiled again, not tried again


def test_who_asks_for_another_schema_does_not_wait_for_one_that_compiles(tiny, monkeypatch):
    monkeypatch.setattr(labs_typed, "_TOKENIZERS", labs_typed.weakref.WeakKeyDictionary())
    begun, go, tried = threading.Event(), threading.Event(), []

    def trial(text: str) -> str:
        tried.append(text)
        if "slow" in text:
            begun.set()
            assert go.wait(60)
        return ""

    monkeypatch.setattr(labs_schema, "trial", trial)
    with ThreadPoolExecutor(4) as pool:
        slow = [pool.submit(labs_typed.Constraint, tiny, {"const": "slow"}) for _ in range(3)]
        assert begun.wait(60)
        labs_typed.Constraint(tiny, {"const": "fast"})
        assert not any(each.done() for each in slow)
        go.set()
        assert all(isinstance(each.result(60), labs_typed.Constraint) for each in slow)
    assert tried == ['{"const": "slow"}', '{"const": "fast"}']


def test_a_trial_that_could_not_begin_is_no_verdict(tiny, trials, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(labs.GenerationError, match="trial could not run"):
        labs_typed.Constraint(tiny, {"const": "later"})
    monkeypatch.undo()
    labs_typed.Constraint(tiny, {"const": "later"})


# Each token of such an answer is a new state of the grammar's lexer.
STATES = {"type": "string", "pattern": "^[a-z]*q[a-z]{40}$"}
SAMPLED = labs.Generation(max_new_tokens=120, temperature=1.0, logit_bias={113: 2.0})


def test_a_grammar_that_many_answers_have_filled_begins_again(tiny, trials, monkeypatch):
    monkeypatch.setitem(labs_schema.LIMITS, "max_lexer_states", 400)  # enough for an answer
    made, compiled = [], labs_schema.compiled
    monkeypatch.setattr(
        labs_schema, "compiled", lambda *given: [made.append(given[-1]), compiled(*given)][1]
    )
    texts: list[list[str]] = [[], []]
    for seed in range(6):
        for found in texts:
            only = [labs_typed.Constraint(tiny, STATES)]
            options = labs.evolve(SAMPLED, seed=seed)
            found.append(labs.generate(tiny, ask(tiny), options, processors=only).text)
    assert texts[0] == texts[1]
    assert 1 < len(made) < 6


def test_a_row_whose_grammar_asks_too_much_later_ends_alone(tiny, trials, monkeypatch):
    monkeypatch.setitem(labs_schema.LIMITS, "max_lexer_states", 60)
    streams = (
        labs.open_request(tiny, i, ask(tiny), SAMPLED, (labs_typed.Constraint(tiny, schema),))
        for i, schema in enumerate([COLOUR, STATES, COLOUR])
    )
    ends = dict(labs.run(tiny, streams, 3))  # the last event of each
    assert [type(ends[i]) for i in range(3)] == [labs.Done, labs.Failed, labs.Done]
    assert "the grammar failed during the answer" in str(ends[1].error)


def test_a_tokenizer_may_know_more_tokens_than_the_model(tmp_path):
    config = kit.llama()
    config.vocab_size = 259
    model = kit.load(kit.save_model(tmp_path / "less", config, template=None))
    assert len(model.tokenizer) > model.decoder.config.vocab_size
    inputs = labs.build_inputs(model, prompt="hi")
    assert labs_typed.generate_as(model, inputs, Literal["red", "green"]) in ("red", "green")


def test_a_model_without_a_token_to_begin_with_is_refused(tmp_path):
    config = kit.llama()
    config.vocab_size, config.eos_token_id, config.bos_token_id = 100, 5, 6
    model = kit.load(kit.save_model(tmp_path / "less", config, eos_token_id=[5]))
    with pytest.raises(labs.InputError, match="no JSON"):
        labs_typed.Constraint(model, {"type": "object"})  # { is the token 123 here


# ---------------------------------------------------------------- schemas that are too much


def nested(depth: int, wrap: Any, inner: Any) -> Any:
    for _ in range(depth):
        inner = wrap(inner)
    return inner


def chain(length: int, wrap: Any = lambda reference: reference) -> dict[str, Any]:
    defs = {f"d{i}": wrap({"$ref": f"#/$defs/d{i + 1}"}) for i in range(length)}
    return {"$ref": "#/$defs/d0", "$defs": {**defs, f"d{length}": {"type": "null"}}}


TOO_MUCH = [
    (nested(51, lambda each: {"anyOf": [each]}, {}), "levels of nesting; at most 100"),
    (nested(9000, lambda each: {"items": each}, {}), "levels of nesting; at most 100"),
    ({"const": nested(2000, lambda each: [each], 1)}, "#/const/0/0"),
    ({"properties": {"a": {"const": 2**53}}}, "#/properties/a/const is beyond"),
    ({"enum": [1, -(2**64)]}, "#/enum/1 is beyond"),
    ({"maximum": math.inf}, "#/maximum is beyond"),
    ({"minimum": math.nan}, "#/minimum is beyond"),
    ({"const": 1e17}, "#/const is beyond"),
    (chain(600), "different references; at most 500"),
    (chain(40), "references in a row"),
    ({"$defs": {"a/b": {"$ref": "#/%24defs/a~1b"}}}, "reference to itself"),
    ({"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}, "reference to itself"),
    ({"items": {"required": [f"n{i}" for i in range(2000)]}}, "#/items/required has 2000 entries"),
    ({"properties": {f"n{i}": {} for i in range(401)}}, "401 optional entries; at most 400"),
    ({"pattern": "((ab{9}){99}c){99}"}, "#/pattern has .* at most 10000"),
    ({"pattern": "a{101}{100}"}, "at most 10000"),
    ({"patternProperties": {"^.{10001}$": {}}}, "at most 10000"),
    ({"pattern": "a" * 2001}, "2001 characters; at most 2000"),
    ({"const": "a" * 200_001}, "characters up to here; at most 200000"),
    ({"enum": [{"a" * 999: 1}] * 300}, "characters up to here; at most 200000"),
    ({"anyOf": [{"enum": [*range(4000)]}] * 6}, "values up to here; at most 20000"),
    ({"properties": {"x": {"minItems": 501}}}, "#/properties/x/minItems is 501; at most 500"),
    ({"maxLength": 2**31}, "at most 2147483647"),
    ({"x-guidance": {"lenient": True}}, "#/x-guidance cannot be used"),
    ({"const": {1, 2}}, "#/const is of the type set"),
    ({"properties": {1: {}}}, "a name that is not a string"),
]


@pytest.mark.parametrize(("schema", "named"), TOO_MUCH)
def test_what_a_schema_has_too_much_of_is_told_with_its_place_and_bound(schema, named):
    with pytest.raises(labs_schema.SchemaError, match=named) as caught:
        labs_schema.check(schema)
    assert len(str(caught.value)) < 300


BOUNDS = [
    *((name, most, [*map(str, range(most))]) for name, most in labs_schema.MOST_ENTRIES.items()),
    *((name, most, "a" * most) for name, most in labs_schema.MOST_CHARACTERS.items()),
    *((name, most, most) for name, most in labs_schema.LARGEST.items()),
]


@pytest.mark.parametrize(("name", "most", "value"), BOUNDS)
def test_what_is_at_a_bound_is_let_in_and_one_more_is_not(name, most, value):
    more = value + (1 if isinstance(value, int) else type(value)("a"))
    if name == "properties":
        value, more = ({"properties": {key: {} for key in each}} for each in (value, more))
        value, more = ({**each, "required": [*each["properties"]]} for each in (value, more))
        more["required"].pop()
    else:
        value, more = {name: value}, {name: more}
    labs_schema.check(value)
    with pytest.raises(labs_schema.SchemaError, match=f"at most {most}"):
        labs_schema.check(more)


@pytest.mark.parametrize(
    "schema",
    [
        {"const": {"pattern": "(x{1000}){1000}", "minItems": 10**6, "$ref": "#/const"}},
        {"enum": [{"x-guidance": 1, "required": ["a"] * 5000}]},
        {"properties": {"pattern": {}, "minItems": {}, "$ref": {}, "x-guidance": {}}},
        {"$defs": {"maxLength": {"type": "string"}}},
        {"required": 5, "properties": [], "enum": "x", "pattern": 5, "$ref": 5, "items": None},
        {"$ref": "#/$defs/no", "anyOf": [{"$ref": "http://x/y"}, {"$ref": ""}, {"$ref": "#/-1"}]},
        {"$defs": {"a": {"items": {"$ref": "#/$defs/a"}}}, "$ref": "#/$defs/a"},
        {"pattern": "^[{9999}(a{9999})]\\{99999}$"},
    ],
)
def test_what_only_looks_like_too_much_is_let_in(schema):
    assert json.loads(labs_schema.check(schema)) == schema


DEADLY = [
    {"const": -(2**63)},
    chain(450, lambda each: {"type": "array", "items": each}),
    {"allOf": [{"type": "integer", "multipleOf": number} for number in (89, 97, 101, 103)]},
]


@pytest.mark.parametrize("schema", DEADLY)
def test_a_schema_that_ends_its_compiler_is_refused_by_who_lives_on(schema):
    assert "too large to compile within 2 s of CPU time" in labs_schema.trial(json.dumps(schema))


NOTHING = [
    {"enum": []},
    {"type": "integer", "minimum": 9, "maximum": 8},
    {"type": "string", "pattern": "^ab$", "maxLength": 1},
    {"anyOf": [{"$ref": "#"}]},
    {"allOf": [{"type": "null"}, {"type": "string"}]},
    {"type": "object", "properties": {"a": False}, "required": ["a"]},
]


@pytest.mark.parametrize("schema", NOTHING)
def test_a_schema_that_nothing_satisfies_is_refused(tiny, schema):
    with pytest.raises(labs.InputError, match=r"nsatisfiable|no JSON"):
        labs_typed.Constraint(tiny, schema)


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
    with pytest.raises(labs.PromptTooLong, match="maximum context length is"):
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


@pytest.mark.parametrize("schema", [DEADLY[1], *NOTHING[:4], TOO_MUCH[0][0]])
@pytest.mark.parametrize("path", ["/generate", "/generate/stream", "/v1/chat/completions"])
def test_a_schema_that_is_too_much_or_too_little_is_a_400(site, path, schema):
    wanted = {"type": "json_schema", "json_schema": {"schema": schema}}
    body = {"messages": [{"role": "user", "content": "hi"}], "response_format": wanted}
    assert error_of(site.post(path, body), 400)["message"].startswith("schema: ")


def test_a_body_or_a_schema_of_any_depth_is_a_400(site):
    for depth in (60, 400, 900, 40_000):
        text = json.dumps({"prompt": "hi", "response_format": FORMAT})
        deep = '{"not":' * depth + "{}" + "}" * depth
        error_of(site.post("/generate", text.replace(json.dumps(COLOUR), deep).encode()), 400)


def test_an_answer_that_its_grammar_ends_is_a_400_or_an_event(site, trials, monkeypatch):
    monkeypatch.setitem(labs_schema.LIMITS, "max_lexer_states", 60)
    wanted = {"type": "json_schema", "json_schema": {"schema": STATES}}
    options = {"max_new_tokens": 120, "temperature": 1.0, "logit_bias": {"113": 2.0}}
    body = {"prompt": "hi", "response_format": wanted, **options}
    assert (
        "the grammar failed during the answer"
        in error_of(site.post("/generate", body), 400)["message"]
    )
    stream = site.post("/generate/stream", body)
    assert stream.status_code == 200
    assert "event: error" in stream.text
    assert "the grammar failed during the answer" in stream.text


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
        {
            "id": "deadly",
            "prompt": "hi",
            "response_format": {"type": "json_schema", "json_schema": {"schema": DEADLY[1]}},
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
    assert "compile" in found[5]["error"]["message"]
    verdicts = [v.verdict for v in labs_jsonl.replay(tiny, context, enumerate(rows[:3], 1))]
    assert verdicts == ["same"] * 3


def gen(*arguments: str, **files: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(kit.ROOT / "labs_cli.py"), *arguments]
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
    Path("deadly.json").write_text(json.dumps(DEADLY[1]))
    done = gen(*model, "--schema", "deadly.json")
    assert (done.returncode, "Traceback" in done.stderr) == (1, False)
    assert "too large to compile" in done.stderr


def test_a_file_with_a_schema_or_messages_of_any_depth_is_refused_by_name(folder):
    Path("deep.json").write_text('{"not":' * 50_000 + "{}" + "}" * 50_000)
    Path("list.json").write_text("[" * 50_000 + "]" * 50_000)
    with pytest.raises(labs.InputError, match=r"deep\.json"):
        labs_cli.read_schema("deep.json")
    flags = {"messages_file": "list.json", "messages_json": None, "system": None}
    with pytest.raises(labs.InputError, match=r"list\.json"):
        labs_cli.read_messages(flags)


RIVALS = [*itertools.combinations(["--schema=x", "--choose=a", "--chat"], 2)]


@pytest.mark.parametrize("rival", RIVALS)
def test_flags_that_contradict_each_other_are_refused(rival):
    if rival == ("--schema=x", "--chat"):
        rival = ("--schema=x", "--explain")
    done = gen(*rival, *([] if "--chat" in rival else ["--prompt", "hi"]))
    assert (done.returncode, "exclude each other" in done.stderr) == (2, True)
