# SPDX-License-Identifier: Apache-2.0
"""Typed answers: types and schemas against models, bounds of schemas, and each way to ask."""

from __future__ import annotations

import functools
import json
import math
import os
import random
import sys
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jsonschema
import kit
import msgspec
import pytest
import torch
from kit import error_of, invoke
from msgspec import Meta

import labs
import labs_cli
import labs_engine
import labs_schema
import labs_typed

SCHEMAS = int(os.environ.get("LABS_SCHEMAS", "40"))
COLOUR = {"enum": ["red", "green"]}


class Street(msgspec.Struct):
    name: Annotated[str, Meta(max_length=8)]
    number: Annotated[int, Meta(ge=1, le=99)]


class House(msgspec.Struct, forbid_unknown_fields=True):
    street: Street
    kind: Literal["flat", "villa"]
    rooms: Annotated[list[Annotated[int, Meta(ge=1, le=9)]], Meta(max_length=3)]
    sold: bool | None = None


def ask(model: labs.Model, text: str = "Describe it as JSON.") -> labs.Inputs:
    return labs.build_inputs(model, prompt=text)


def generate(model: labs.Model, kind: Any, **options: Any) -> Any:
    return labs_typed.generate_as(model, ask(model), kind, **options)


def random_schema(chance: random.Random, depth: int = 0) -> dict[str, Any]:
    """Make a schema as people write them, with bounds, so that each answer ends."""
    low = chance.randint(-50, 50)
    leaves: list[dict[str, Any]] = [
        {"type": "string", "maxLength": chance.randint(1, 30)},
        {"type": "integer", "minimum": low, "maximum": low + chance.randint(0, 99)},
        {"type": "number", "enum": [0.5, 1.25, -3]},
        {"type": chance.choice(["boolean", "null"])},
        {"enum": chance.sample(["red", "green", 1, None, True, "ü", '"'], 3)},
        {"const": chance.choice(["yes", 42, {"a": [1]}])},
        {"type": "string", "pattern": "^[a-z]{2,5}-[0-9]+x?$", "maxLength": 12},
    ]
    if depth == 2 or (depth and chance.random() < 0.6):
        return chance.choice(leaves)
    inner = [random_schema(chance, depth + 1) for _ in range(chance.randint(1, 3))]
    names = chance.sample(["name", "age", "city", "tags", "größe", "a b", "x"], len(inner))
    required = [name for name in names if chance.random() < 0.8]
    whole = {"type": "object", "required": required, "additionalProperties": False}
    whole["properties"] = dict(zip(names, inner, strict=True))
    array = {"type": "array", "items": inner[0], "maxItems": chance.randint(0, 3)}
    return chance.choice([whole, array, {"anyOf": inner}, {"allOf": inner[:1]}]) if depth else whole


def ends_of(model: labs.Model, schemas: list[Any], options: labs.Generation) -> dict[int, Any]:
    """Answer one prompt under each schema in one batch: {index: (text, last event)}."""
    only = [() if each is None else (labs_typed.Constraint(model, each),) for each in schemas]
    inputs = ask(model)
    rows = (labs.open_request(model, i, inputs, options, each) for i, each in enumerate(only))
    return kit.fold(labs.run(model, rows, 32))


# ---------------------------------------------------------------- types


@pytest.mark.parametrize("options", [{"temperature": 0}, {"temperature": 1.5, "seed": 3}])
def test_an_answer_is_a_value_of_the_requested_type(tiny, options):
    found = generate(tiny, House, max_new_tokens=300, **options)
    assert (type(found), type(found.street)) == (House, Street)
    assert found.kind in ("flat", "villa")
    assert 1 <= found.street.number <= 99


ONES = int("1" * 16)  # the longest integer of a model that continues with the digit 1
KINDS = [(Annotated[int, Meta(ge=3, le=5)], {3, 4, 5}), (Annotated[int, Meta(gt=3, lt=5)], {4})]
KINDS += [(Literal["red", "green"], {"red", "green"}), (None, {None}), (int, {ONES})]


@pytest.mark.parametrize(("kind", "values"), KINDS)
def test_a_type_need_not_be_a_struct(tiny, kind, values):
    options = {"logit_bias": {ord("1"): 100.0}, "temperature": 0}
    assert generate(tiny, kind, **options) in values


@pytest.mark.parametrize("options", [{"max_new_tokens": 2}, {"stop": ('"',)}])
def test_an_incomplete_answer_is_an_error_that_holds_it(tiny, options):
    with pytest.raises(labs_typed.IncompleteOutput) as caught:
        generate(tiny, House, **options)
    assert caught.value.completion.usage.completion_tokens >= 1


def test_a_date_that_does_not_exist_is_an_error(tiny, monkeypatch):
    done = labs.generate(tiny, ask(tiny), max_new_tokens=1)
    answer = msgspec.structs.replace(done, text='"2026-02-31"', finish_reason="stop")
    monkeypatch.setattr(labs, "generate", lambda *_, **__: answer)
    with pytest.raises(labs.GenerationError, match="date"):
        generate(tiny, date)


REFUSED: list[tuple[Any, str]] = [
    ({"not": {"pattern": "a"}}, "not"),
    ({"type": "strin"}, "strin"),
    ({"type": "string", "format": "nope"}, "nope"),
    ({"if": {"minimum": 1}, "then": {}}, "if"),
    ({"type": "array", "uniqueItems": True}, "uniqueItems"),
    ({"$ref": "http://127.0.0.1:1/schema"}, "127.0.0.1"),
    ({"type": "object", "properties": {"a": {"contentEncoding": "x"}}}, "contentEncoding"),
    (bytes, "contentEncoding"),
    (complex, "complex"),
]
NOTHING = [
    {"enum": []},
    {"type": "integer", "minimum": 9, "maximum": 8},
    {"type": "string", "pattern": "^ab$", "maxLength": 1},
    {"anyOf": [{"$ref": "#"}]},
    {"allOf": [{"type": "null"}, {"type": "string"}]},
    {"type": "object", "properties": {"a": False}, "required": ["a"]},
]
REFUSED += [(each, "nsatisfiable|no answer") for each in NOTHING]


@pytest.mark.parametrize(("schema", "named"), REFUSED)
def test_a_schema_or_type_that_cannot_be_followed_is_refused_by_name(tiny, schema, named):
    use = labs_typed.Constraint if isinstance(schema, dict) else generate
    with pytest.raises(labs.InputError, match=named):
        use(tiny, schema)


def test_without_llguidance_a_type_is_refused_with_the_install_command(tiny, missing, monkeypatch):
    monkeypatch.setattr(labs_typed, "_TOKENIZERS", {})
    missing("llguidance")
    with pytest.raises(labs.InputError, match="pip install llguidance"):
        generate(tiny, House)


# ---------------------------------------------------------------- constraints in a batch


@pytest.mark.parametrize("name", ["tiny", pytest.param("default", marks=pytest.mark.real)])
def test_random_schemas_hold_in_one_batch(name, request):
    """With LABS_SCHEMAS=1000 for the figure: ended answers are valid, and nearly all end."""
    chance = random.Random(5)
    schemas = [random_schema(chance) for _ in range(SCHEMAS if name == "default" else 16)]
    options = labs.Generation(max_new_tokens=512, temperature=0)
    ended = 0
    for index, (text, end) in ends_of(request.getfixturevalue(name), schemas, options).items():
        if end.finish_reason == "stop":
            jsonschema.validate(json.loads(text), schemas[index])
            ended += 1
    assert ended >= 0.9 * len(schemas)


def test_rows_with_and_without_a_schema_share_a_batch_and_keep_their_texts(tiny):
    options = labs.Generation(max_new_tokens=20, temperature=1.0, seed=3)
    schemas = [None, COLOUR, {"type": "integer"}]
    together = ends_of(tiny, schemas, options)
    for number, schema in enumerate(schemas):
        assert ends_of(tiny, [schema], options)[0][0] == together[number][0]
    assert json.loads(together[1][0]) in ("red", "green")


@pytest.mark.parametrize("guessed", [1, 8])
def test_rejected_guesses_do_not_change_a_constrained_answer(tiny, guessed):
    inputs = ask(tiny, 'Repeat: {"a":[1,1,1,1,1,1,1,1]} {"a":[1,1,1,1]}')
    schema = {"type": "object", "properties": {"a": {"type": "array", "items": {"const": 1}}}}
    schema |= {"required": ["a"], "additionalProperties": False}

    def answer(tokens: int | None) -> str:
        only = [labs_typed.Constraint(tiny, schema)]
        options = {"max_new_tokens": 30, "prompt_lookup_num_tokens": tokens, "temperature": 0}
        return labs.generate(tiny, inputs, processors=only, **options).text

    assert answer(guessed) == answer(None)


def test_a_constraint_follows_tokens_that_are_taken_back(tiny):
    only, logits = labs_typed.Constraint(tiny, COLOUR), torch.zeros(262)
    encode = lambda text: tiny.tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    steps = [("", '"'), ('"', "rg"), ('"gr', "e"), ('"', "rg"), ('"re', "d"), ('"gree', "n")]
    ends = [(text, {*encode(following)}) for text, following in steps]
    for text, following in [*ends, ('"red"', {*tiny.eos_token_ids})]:
        allowed = torch.isfinite(only([5, 6, 7, *encode(text)], logits))
        assert {*allowed.nonzero()[:, 0].tolist()} == following


# ---------------------------------------------------------------- compiling


class Compiler(NamedTuple):
    """The schemas that are tried, and those that are compiled in this process, from now on."""

    tried: list[str]
    compiled: list[str]


@pytest.fixture
def compiler(monkeypatch) -> Compiler:
    monkeypatch.setattr(labs_typed, "_TOKENIZERS", weakref.WeakKeyDictionary())
    seen, trial, compiled = Compiler([], []), labs_schema.trial, labs_schema.compiled
    count = lambda found, schema: found.append(schema) or schema  # noqa: E731
    monkeypatch.setattr(labs_schema, "trial", lambda text: trial(count(seen.tried, text)))
    monkeypatch.setattr(
        labs_schema, "compiled", lambda *given: compiled(*given[:2], count(seen.compiled, given[2]))
    )
    return seen


def test_a_schema_is_tried_once_and_so_is_a_refused_one(tiny, compiler):
    for number in (1, 2, 2, 1):
        labs_typed.Constraint(tiny, {"const": number})
        with pytest.raises(labs.InputError, match="Unimplemented"):
            labs_typed.Constraint(tiny, {"not": {"const": number}})
    assert len(compiler.tried) == 4


def test_the_cache_of_grammars_is_bounded_in_bytes(tiny, compiler, monkeypatch):
    monkeypatch.setattr(labs_typed, "KEPT_BYTES", 2 * labs_typed.GRAMMAR_BYTES)
    for number in (*range(3), 2, 1):
        labs_typed.Constraint(tiny, {"const": number})
    assert len(compiler.compiled) == 3
    labs_typed.Constraint(tiny, {"const": 0})  # compiled again, not tried again
    assert (len(compiler.compiled), len(compiler.tried)) == (4, 3)


def test_only_requests_for_a_schema_wait_while_it_compiles(tiny, compiler, monkeypatch):
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


def test_a_trial_that_could_not_run_is_not_remembered(tiny, compiler, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(sys, "executable", "/nowhere/python")
        with pytest.raises(labs.GenerationError, match="trial could not run"):
            labs_typed.Constraint(tiny, {"const": "later"})
    labs_typed.Constraint(tiny, {"const": "later"})


# Each token of such an answer is a new state of the grammar's lexer.
STATES = {"type": "string", "pattern": "^[a-z]*q[a-z]{40}$"}
SAMPLED = labs.Generation(max_new_tokens=120, temperature=1.0, logit_bias={113: 2.0})


def test_a_grammar_that_many_answers_have_filled_begins_again(tiny, compiler, monkeypatch):
    monkeypatch.setitem(labs_schema.LIMITS, "max_lexer_states", 250)  # enough for an answer
    texts: list[list[str]] = [[], []]
    for seed in range(3):
        for found in texts:
            only, options = [labs_typed.Constraint(tiny, STATES)], labs.evolve(SAMPLED, seed=seed)
            found.append(labs.generate(tiny, ask(tiny), options, processors=only).text)
    assert texts[0] == texts[1]
    assert 1 < len(compiler.compiled) < 6


def test_a_row_whose_grammar_fails_later_ends_alone(tiny, compiler, monkeypatch):
    monkeypatch.setitem(labs_schema.LIMITS, "max_lexer_states", 60)
    ends = ends_of(tiny, [COLOUR, STATES, COLOUR], labs.evolve(SAMPLED, seed=1))
    assert [type(ends[i][1]) for i in range(3)] == [labs.Done, labs.Failed, labs.Done]
    assert "the grammar failed during the answer" in str(ends[1][1].error)


def test_a_tokenizer_may_know_more_tokens_than_the_model(tmp_path):
    config = kit.llama()
    config.vocab_size = 259
    model = kit.load(kit.save_model(tmp_path / "less", config, template=None))
    assert len(model.tokenizer) > model.decoder.config.vocab_size
    assert generate(model, Literal["red", "green"]) in ("red", "green")


def test_a_model_without_a_token_for_the_first_character_is_refused(tmp_path):
    config = kit.llama()
    config.vocab_size, config.eos_token_id, config.bos_token_id = 100, 5, 6
    model = kit.load(kit.save_model(tmp_path / "less", config, eos_token_id=[5]))
    with pytest.raises(labs.InputError, match="no answer"):
        labs_typed.Constraint(model, {"type": "object"})  # { is the token 123 here


# ---------------------------------------------------------------- bounds of schemas


def nested(depth: int, wrap: Any, inner: Any) -> Any:
    return functools.reduce(lambda found, _: wrap(found), range(depth), inner)


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
    ({"properties": {f"n{i}": {} for i in range(401)}}, "401 optional entries; at most 400"),
    ({"pattern": "((ab{9}){99}c){99}"}, "#/pattern has .* at most 10000"),
    ({"patternProperties": {"^.{10001}$": {}}}, "at most 10000"),
    ({"const": "a" * 200_001}, "characters up to here; at most 200000"),
    ({"enum": [{"a" * 999: 1}] * 300}, "characters up to here; at most 200000"),
    ({"anyOf": [{"enum": [*range(4000)]}] * 6}, "values up to here; at most 20000"),
    ({"properties": {"x": {"minItems": 501}}}, "#/properties/x/minItems is 501; at most 500"),
    ({"x-guidance": {"lenient": True}}, "#/x-guidance cannot be used"),
    ({"const": {1, 2}}, "#/const is of the type set"),
    ({"properties": {1: {}}}, "a name that is not a string"),
]


@pytest.mark.parametrize(("schema", "named"), TOO_MUCH)
def test_an_exceeded_bound_is_named_with_its_place(schema, named):
    with pytest.raises(labs_schema.SchemaError, match=named) as caught:
        labs_schema.check(schema)
    assert len(str(caught.value)) < 300


BOUNDS = [
    *((name, most, [*map(str, range(most))]) for name, most in labs_schema.MOST_ENTRIES.items()),
    *((name, most, "a" * most) for name, most in labs_schema.MOST_CHARACTERS.items()),
    *((name, most, most) for name, most in labs_schema.LARGEST.items()),
]


@pytest.mark.parametrize(("name", "most", "value"), BOUNDS)
def test_a_value_at_a_bound_is_accepted_and_one_more_is_not(name, most, value):
    more = value + (1 if isinstance(value, int) else type(value)("a"))
    if name == "properties":
        value, more = ({key: {} for key in each} for each in (value, more))
    labs_schema.check({name: value, "required": [*map(str, range(1000))]})
    with pytest.raises(labs_schema.SchemaError, match=f"at most {most}"):
        labs_schema.check({"required": [*map(str, range(1000))], name: more})


@pytest.mark.parametrize(
    "schema",
    [
        {"const": {"pattern": "(x{1000}){1000}", "minItems": 10**6, "$ref": "#/const"}},
        {"enum": [{"x-guidance": 1, "required": ["a"] * 5000}]},
        {"properties": {"pattern": {}, "minItems": {}, "$ref": {}, "x-guidance": {}}},
        {"required": 5, "properties": [], "enum": "x", "pattern": 5, "$ref": 5, "items": None},
        {"$ref": "#/$defs/no", "anyOf": [{"$ref": "http://x/y"}, {"$ref": ""}, {"$ref": "#/-1"}]},
        {"$defs": {"a": {"items": {"$ref": "#/$defs/a"}}}, "$ref": "#/$defs/a"},
        {"pattern": "^[{9999}(a{9999})]\\{99999}$"},
    ],
)
def test_a_schema_that_only_seems_to_exceed_a_bound_is_accepted(schema):
    assert json.loads(labs_schema.check(schema)) == schema


DEADLY = [
    {"const": -(2**63)},
    chain(450, lambda each: {"type": "array", "items": each}),
    {"allOf": [{"type": "integer", "multipleOf": number} for number in (89, 97, 101, 103)]},
]


@pytest.mark.parametrize("schema", DEADLY)
def test_a_schema_that_kills_its_compiler_is_refused_by_the_parent(schema):
    found = labs_schema.trial(json.dumps(schema))
    assert "too large to compile within 2 s of CPU time" in found
    assert "(SIG" in found


# ---------------------------------------------------------------- HTTP, files and the shell


@pytest.fixture
def site(tiny) -> Iterator[Any]:
    engine = labs_engine.Engine(tiny)
    yield kit.Site(engine, kit.configured(generation=labs.Generation(temperature=0)))
    engine.close()


def wanted(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"schema": schema}}


CHAT = {"messages": kit.HELLO, "response_format": wanted(COLOUR)}
CHAT_LINE = kit.openai_line("o", **CHAT)
NOT_FOLLOWED = [wanted(schema) for schema in (DEADLY[1], NOTHING[0], TOO_MUCH[0][0])]
NOT_FOLLOWED += [{"type": "json_schema", "json_schema": {"schema": {}, "strictly": True}}]


def test_the_stream_of_a_chat_follows_the_schema(site):
    chunks = kit.chunks_of(site.post(kit.CHAT, {**CHAT, "stream": True}))
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert json.loads(text) in ("red", "green")


@pytest.mark.parametrize("form", NOT_FOLLOWED)
@pytest.mark.parametrize("path", ["/generate/stream", "/v1/chat/completions", "/explain"])
def test_a_format_that_cannot_be_followed_is_a_400(site, path, form):
    message = error_of(site.post(path, {**CHAT, "response_format": form}), 400)["message"]
    assert "strictly" in message or message.startswith("schema: ")


@pytest.mark.parametrize("depth", [60, 900, 40_000])
def test_a_schema_of_any_depth_is_a_400_and_refused_in_a_file(site, depth):
    Path("deep.json").write_text(deep := '{"contains":' * depth + "{}" + "}" * depth)
    body = json.dumps({"prompt": "hi", "response_format": wanted(COLOUR)})
    error_of(site.post("/generate", body.replace(json.dumps(COLOUR), deep).encode()), 400)
    if depth == 40_000:
        with pytest.raises(labs.InputError, match=r"deep\.json"):
            labs_cli.read_schema("deep.json")


def test_an_answer_whose_grammar_fails_is_a_400_or_an_error_event(site, compiler, monkeypatch):
    monkeypatch.setitem(labs_schema.LIMITS, "max_lexer_states", 60)
    options = {"max_new_tokens": 120, "temperature": 1.0, "logit_bias": {"113": 2.0}}
    body, failed = {"prompt": "hi", "response_format": wanted(STATES), **options}, "grammar failed"
    assert failed in error_of(site.post("/generate", body), 400)["message"]
    events = kit.events_of(site.post("/generate/stream", body).content)
    assert [kind for kind, data in events if failed in data] == ["error"]


def test_each_line_of_a_file_has_its_format_and_can_be_replayed(tiny):
    forms = (wanted(COLOUR), None, {"type": "json_schema"}, wanted(DEADLY[1]))
    lines = [{"id": str(n), "prompt": "hi", "response_format": f} for n, f in enumerate(forms)]
    config = labs.Config(generation=labs.Generation(temperature=1.0, max_new_tokens=40))
    *rows, unnamed, deadly = kit.answers(tiny, [CHAT_LINE, *lines], config, ordered=True)
    message = rows[0]["response"]["body"]["choices"][0]["message"]["content"]
    assert {json.loads(message), json.loads(rows[1]["text"])} <= {"red", "green"}
    assert "json_schema" in unnamed["error"]["message"]
    assert "too large to compile" in deadly["error"]["message"]
    assert [each.verdict for each in kit.replayed(tiny, rows, config)] == ["same"] * 3


def test_the_shell_repeats_a_schema_names_a_wrong_file_and_prints_choices(tiny_folder):
    for name, text in {"colour": json.dumps(COLOUR), "wrong": "{"}.items():
        Path(f"{name}.json").write_text(text)
    model = ("--model", str(tiny_folder), "--torch-dtype", "fp32", "--prompt", "hi")
    answer = json.loads(invoke(*model, "--schema", "colour.json", "--json").stdout)
    assert answer["request"]["response_format"]["json_schema"]["schema"] == COLOUR
    done = invoke(*model, "--schema", "wrong.json")
    assert (done.exit_code, "wrong.json" in done.stderr) == (1, True)
    lines = invoke(*model, "--choose", "yes", "--choose", "no").stdout.splitlines()
    (first, one), (second, other) = (line.split() for line in lines)
    assert {one, other} == {"yes", "no"}
    assert float(first) >= float(second)
