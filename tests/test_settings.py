# SPDX-License-Identifier: Apache-2.0
"""Tests of labs_settings.py: layers, files, secrets, model tables, bounds and wrong settings."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import tomllib
from pathlib import Path
from typing import Any

import msgspec
import pytest
from kit import ROOT, SHORT, counted, is_one_sentence, write
from msgspec.structs import fields

import labs
import labs_explain

TOML, ENV = "labs.toml", "environment"
LAYERS = (TOML, ".env", ENV, "overrides")
SETTINGS = {setting.key: setting for setting in labs.settings()}
HOLDERS = ("model", "generation", "server", "response_cache")


def layered(layers: dict[str, dict[str, Any]], tables: str = "") -> labs.Config:
    """Load the configuration of these layers; `tables` is the end of labs.toml."""
    lines = {section: [f"[{section}]"] for section in ("generation", "quantization")}
    for key, value in layers.get(TOML, {}).items():
        line = f"{SETTINGS[key].field} = {json.dumps(value, ensure_ascii=False)}"
        lines.setdefault(SETTINGS[key].section, [f"[{SETTINGS[key].section}]"]).append(line)
    write(TOML, "\n".join([*itertools.chain(*lines.values()), tables]))
    given = {name: {k: as_text(v) for k, v in layers.get(name, {}).items()} for name in LAYERS}
    write(".env", "".join(f"{SETTINGS[k].environment}='{v}'\n" for k, v in given[".env"].items()))
    environment = {SETTINGS[k].environment: text for k, text in given[ENV].items()}
    return labs.load_config(env=environment, overrides=layers.get("overrides", {}))


def as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def value_of(config: labs.Config, key: str) -> Any:
    holders = (config.model, config.generation, config, config.model.quantization)
    return next(getattr(holder, key) for holder in holders if hasattr(holder, key))


def line_of(key: str, config: labs.Config) -> str:
    lines = labs_explain.dump_effective_config(config).splitlines()
    return next(line for line in lines if line.removeprefix("# ").startswith(key))


def refused(fragments: Any, env: dict[str, str] | None = None, **places: Any) -> None:
    """Require that the settings are refused in one sentence that has all of these parts."""
    with pytest.raises(labs.ConfigError) as caught:
        labs.load_config(env=env or {}, **places)
    assert [part for part in fragments if part not in str(caught.value)] == []
    assert is_one_sentence(caught.value)


# ---------------------------------------------------------------- layers


@pytest.mark.parametrize(("low", "high"), list(itertools.combinations(LAYERS, 2)))
def test_a_higher_layer_wins_and_leaves_other_keys_of_a_lower_one_alone(low, high):
    below = {"temperature": 0.25, "stop": ["é😀\n"], "use_chat_template": False, "top_k": 7}
    above = {"temperature": 0.75, "load_in_4bit": True, "use_chat_template": True, "seed": 2}
    config = layered({low: {**below, "server_port": 2}, high: {**above, "server_host": "::1"}})
    found, server = config.generation, config.server
    assert (found.temperature, found.stop, found.top_k, found.seed) == (0.75, ("é😀\n",), 7, 2)
    assert (config.use_chat_template, config.model.quantization.load_in_4bit) == (True, True)
    assert (server.port, server.host) == (2, "::1")
    names = ("labs.toml", "LABS_TEMPERATURE in .env", "LABS_TEMPERATURE", "--temperature")
    source = dict(zip(LAYERS, names, strict=True))[high]
    assert line_of("temperature", config) == f"temperature = 0.75  # {source}"


def test_the_effective_configuration_has_every_setting_and_can_be_read_back():
    assert line_of("max_new_tokens", labs.Config()) == "max_new_tokens = 256  # default"
    later = "default; labs-gen explain shows what it becomes"
    assert line_of("quant_method", labs.Config()) == f'quant_method = "auto"  # {later}'
    assert all(line_of(setting.field, labs.Config()) for setting in SETTINGS.values())
    given = {"temperature": 0.5, "stop": ("a\nb", '"'), "load_in_4bit": True, "top_k": 3}
    given |= {"logit_bias": {5: -1.5, 7: 2}, "server_port": 80, "response_cache_ttl_s": 3}
    config = labs.load_config(env={}, overrides={**given, "server_allowed_hosts": ("a", "b")})
    write("again.toml", labs_explain.dump_effective_config(config))
    again = labs.load_config("again.toml", env={})
    assert [getattr(again, part) == getattr(config, part) for part in HOLDERS] == [True] * 4


@pytest.mark.parametrize(
    ("dotenv", "env", "keys", "token"),
    [
        ("LABS_API_KEYS=one, two", {}, ("one", "two"), None),
        ("HF_TOKEN=hf_x", {"LABS_API_KEYS": "one, "}, ("one",), "hf_x"),
        ("LABS_API_KEYS=a\nHF_TOKEN=hf_x", {"LABS_API_KEYS": "", "HF_TOKEN": ""}, ("a",), "hf_x"),
        ("LABS_API_KEYS=a\nHF_TOKEN=x", {"LABS_API_KEYS": "b,c", "HF_TOKEN": "y"}, ("b", "c"), "y"),
        ("", {"LABS_API_KEYS": "z", "LABS_SERVER_API_KEYS_FILE": "k"}, ("z", "one", "two"), None),
        ("LABS_TOP_K\nLABS_API_KEYS\nHF_TOKEN\n", {}, (), None),
    ],
)
def test_secrets_come_from_environment_and_dotenv_and_are_never_shown(dotenv, env, keys, token):
    write(".env", dotenv)
    write("k", "# for the team\none\n\n two \n")
    config = labs.load_config(env=env)
    assert config.api_keys == tuple(hashlib.sha256(key.encode()).hexdigest() for key in keys)
    assert config.model.token == token
    dumped = labs_explain.dump_effective_config(config)
    assert (f"# API keys: {len(keys)}" in dumped) == bool(keys)
    assert ('# HF_TOKEN = "********"' in dumped.splitlines()) == bool(token)
    assert token is None or "hf_x" not in dumped + repr(config) + repr(config.model)


VARIABLES = [
    ("LABS_MODEL", "some/model", "model_name", "some/model"),
    *(("LABS_DO_SAMPLE", text, "do_sample", True) for text in ("true", "1")),
    *(("LABS_DO_SAMPLE", text, "do_sample", False) for text in ("false", "0")),
    *[("LABS_TOP_K", "40", "top_k", 40), ("LABS_TEMPERATURE", "1", "temperature", 1.0)],
    ("LABS_STOP", '["a", "b"]', "stop", ("a", "b")),
    ("LABS_LOGIT_BIAS", '{"5": -100}', "logit_bias", {5: -100.0}),
    ("LABS_DEVICE_MAP", '{"": "cpu"}', "device_map", '{"": "cpu"}'),
    ("LABS_MAX_NEW_TOKENS", "", "max_new_tokens", 9),
]


@pytest.mark.parametrize(("name", "text", "key", "value"), VARIABLES)
def test_a_variable_is_read_as_its_setting_is_typed_and_empty_is_unset(name, text, key, value):
    write(TOML, "[generation]\nmax_new_tokens = 9\n")
    write(".env", "LABS_MAX_NEW_TOKENS=\nLABS_DEBUG=1\n")
    assert value_of(labs.load_config(env={name: text, "LABS_DEBUG": "1"}), key) == value


# ---------------------------------------------------------------- wrong settings

SMALL = '[models.small]\nmodel_name = "m"\n'
WRONG = [
    # layer, its text, what the message must name
    (TOML, "[generation]\ntemprature = 1", ["labs.toml", "temprature", "temperature?"]),
    (TOML, "[generation]\ntemperature = 101", ["labs.toml", "temperature = 101", "100"]),
    (TOML, "[generation]\ntemperature = nan", ["labs.toml", "temperature = nan"]),
    (TOML, "[generation]\ntimeout_s = inf", ["labs.toml", "timeout_s = inf"]),
    (TOML, "[generation]\nlogit_bias = {5 = nan}", ["labs.toml", "logit_bias"]),
    (TOML, "[generation]\ndo_sample = 1", ["labs.toml", "do_sample = 1", "bool"]),
    (TOML, "[generation]\nmax_new_tokens = true", ["labs.toml", "max_new_tokens = True"]),
    (TOML, '[generation]\ntoken = "hf_secret"', ["unknown key 'token'"]),
    (TOML, "[quantization]\ntemperature = 1", ["labs.toml", "'temperature'", "[quantization]"]),
    (TOML, "[quantization]\nload_in_4bit = true\nload_in_8bit = true", ["labs.toml", "load_in_8"]),
    (
        TOML,
        '[quantization]\nload_in_4bit = true\nquant_method = "int8"',
        ["quant_method exclude each other"],
    ),
    (TOML, "[generation]\ndo_sample = true\ntemperature = 0", ["labs.toml", "contradicts"]),
    (TOML, "[generatoin]\ntop_k = 1", ["labs.toml", "[generatoin]", "generation?"]),
    (TOML, "[server]\nprt = 1", ["key 'prt' in [server]; did you mean port"]),
    (TOML, "model = 'a'", ["labs.toml", "model_name belongs in [generation]"]),
    (TOML, "[models.a]\nserver_port = 1", ["[models.a]", "port belongs in [server]"]),
    (TOML, "generation = 1", ["labs.toml", "generation", "section"]),
    (TOML, '[generation]\nmodel_name = "auto"', ["model_name = auto", "[router]"]),
    (ENV, "LABS_MODEL=auto", ["model_name = auto", "[router]"]),
    (TOML, "[models]\nsmall = 1", ["labs.toml", "[models.small]", "section"]),
    (TOML, SMALL + "top_q = 1", ["[models.small]", "top_q", "top_p?"]),
    (TOML, SMALL + "top_p = 2", ["[models.small]", "top_p = 2", "1"]),
    (TOML, "[models.small]\ntop_k = 1", ["[models.small]", "model_name is missing"]),
    (TOML, "[models.auto]\nmodel_name = 'm'", ["[models.auto]", "[router]"]),
    (TOML, SMALL + "quantization = 4", ["[models.small]", "quantization"]),
    (TOML, SMALL + "quantization = {load_in_4bits = true}", ["[models.small]", "load_in_4bit?"]),
    (TOML, "default_model = 'big'\n" + SMALL, ["default_model = big", "no [models] table"]),
    (TOML, "[[router.rules]]\nmodel = 'big'\npattern = 'x'", ["router_rules[0]", "'big'"]),
    (TOML, "[generation\n", ["labs.toml", "line 1"]),
    (".env", "LABS_TEMPERATUR=1", [".env", "LABS_TEMPERATUR", "LABS_TEMPERATURE?"]),
    (".env", "LABS_ZEBRA=1", [".env", "LABS_ZEBRA"]),
    (".env", "LABS_TOP_K=many", [".env", "LABS_TOP_K", "many", "int"]),
    (ENV, "LABS_TEMPERATUR=1", ["environment", "LABS_TEMPERATUR", "LABS_TEMPERATURE?"]),
    (ENV, "LABS_TOP_K=-1", ["LABS_TOP_K", "-1", "0"]),
    (ENV, "LABS_STOP=[", ["LABS_STOP", "["]),
    (ENV, "LABS_SEED=9223372036854775808", ["LABS_SEED", "9223372036854775808"]),
    (ENV, "LABS_API_KEYS= ,", ["LABS_API_KEYS holds no key"]),
    ("overrides", "temprature=1", ["temprature", "temperature?"]),
    ("overrides", "temperature=101", ["--temperature", "101", "100"]),
    (ENV, "LABS_SERVER_API_KEYS_FILE=absent", ["server_api_keys_file = absent"]),
    (ENV, "LABS_SERVER_API_KEYS_FILE=.env", ["server_api_keys_file = .env"]),  # which has none
]


@pytest.mark.parametrize(("layer", "text", "fragments"), WRONG, ids=[w[1] for w in WRONG])
def test_a_wrong_setting_is_refused_with_place_key_and_bound(layer, text, fragments):
    name, _, value = text.partition("=")
    write(".env", "# no key\n")
    if layer in (TOML, ".env"):
        write(layer, text + "\n")
    overrides = {name: float(value)} if layer == "overrides" else {}
    refused(fragments, {name: value} if layer == ENV else {}, overrides=overrides)


def test_a_contradiction_of_two_places_names_both_and_no_third():
    write(TOML, "[quantization]\nload_in_4bit = true\n")
    env = {"LABS_LOAD_IN_8BIT": "true", "LABS_BNB_4BIT_QUANT_TYPE": "fp4"}
    with pytest.raises(labs.ConfigError, match=r"(?=.*labs\.toml)(?=.*LABS_LOAD_IN_8BIT)") as told:
        labs.load_config(env=env)
    assert "BNB" not in str(told.value)


WORDS = {"boolean": "true or false", "integer": "a whole number", "number": "a number"}
WORDS |= {"array": "a JSON list in [ ]", "object": "a JSON table", "string": "a text"}
each_setting = pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)


@each_setting
def test_a_setting_of_the_wrong_type_is_refused_with_what_to_write(setting):
    schema = msgspec.json.schema(setting.type)
    parts = [schema, *schema.get("anyOf", ())]
    hints = [WORDS[part["type"]] for part in parts if part.get("type") in WORDS]
    hints += [f"one of {choice}" for part in parts for choice in part.get("enum", ())]

    def check(**places: Any) -> None:
        with pytest.raises(labs.ConfigError) as caught:
            labs.load_config(**{"env": {}, **places})
        assert is_one_sentence(caught.value)
        assert any(f"; write {hint}" in str(caught.value) for hint in hints), caught.value

    if hints != ["a text"]:  # every variable is a text
        check(env={setting.environment: "zebra"})
        check(overrides={setting.key: "zebra"})
    write(TOML, f"[{setting.section}]\n{setting.field} = 1979-05-27\n")
    check()


@each_setting
def test_a_setting_outside_its_section_is_refused_with_the_name_of_its_section(setting):
    for section in {"", "[response_cache]", "[router]"} - {f"[{setting.section}]"}:
        write(TOML, f"{section}\n{setting.key} = 1\n")
        with pytest.raises(labs.ConfigError) as caught:
            labs.load_config(env={})
        place = f"{setting.field} belongs in [{setting.section}]"
        assert place in str(caught.value) or "did you mean" in str(caught.value)


def test_a_byte_order_mark_is_not_a_part_of_a_file():
    env = {"LABS_SERVER_API_KEYS_FILE": "keys"}
    for name, text in {TOML: "[generation]\ntop_k = 7", ".env": "LABS_SEED=7", "keys": "1"}.items():
        Path(name).write_text(text + "\n", encoding="utf-8-sig")
    config = labs.load_config(env=env)
    assert (config.generation.top_k, config.generation.seed) == (7, 7)
    assert config.api_keys == (hashlib.sha256(b"1").hexdigest(),)


def test_a_file_that_cannot_be_read_is_refused_by_name(folder):
    refused(["missing.toml: cannot be read: No such file"], path="missing.toml")
    refused(["cannot be read: Is a directory"], path=folder)
    for name in (".env", TOML):
        Path(name).write_bytes(b"# caf\xe9\nLABS_TOP_K=1\n")
        refused([name])
        Path(name).unlink()


def test_names_that_labs_does_not_use_are_warned_of_once(caplog):
    write(".env", "DATABASE=secret1\nPASSWORD=secret2\nLABS_TOP_K=1\nHF_TOKEN=secret3\n")
    assert labs.load_config(env={"LABS_ZEBRA": "1"}).generation.top_k == 1
    dotenv, environment = [r.getMessage() for r in caplog.records if r.name == "labs"]
    assert all(part in dotenv for part in (".env", "DATABASE, PASSWORD"))
    assert not any(part in dotenv for part in ("secret", "LABS_TOP_K", "HF_TOKEN"))
    assert "LABS_ZEBRA" in environment


LOWERED = {
    **{"server_host": '"0.0.0.0"', "server_insecure": "true", "server_allowed_hosts": '["*"]'},
    **{"server_allow_origins": '["https://a.example"]', "server_public_metrics": "true"},
    **{"server_api_keys_file": '"keys"', "use_safetensors": "false", "trust_remote_code": "true"},
}


@pytest.mark.parametrize("place", [TOML, ".env", "my.toml", ENV])
@pytest.mark.parametrize("key", LOWERED)
def test_a_guard_lowered_by_a_file_that_nobody_named_is_warned_of(key, place, caplog):
    write("keys", "one\n")
    setting, text = SETTINGS[key], LOWERED[key]
    if place == ".env":
        write(".env", f"{setting.environment}={text}\n")
    elif place != ENV:
        write(place, f"[{setting.section}]\n{setting.field} = {text}\n")
    env = {setting.environment: text.strip('"')} if place == ENV else {}
    labs.load_config("my.toml" if place == "my.toml" else None, env=env)
    warnings = [r.getMessage() for r in caplog.records if key in r.getMessage()]
    assert len(warnings) == (place in (TOML, ".env"))
    assert all(place in warning and "guard" in warning for warning in warnings)


def test_each_model_table_that_lowers_a_guard_is_warned_of_and_nothing_else_is(caplog):
    same = "host = 'localhost'\nport = 1\ninsecure = false\nallow_origins = []"
    write(TOML, f"[server]\n{same}\n[generation]\nuse_safetensors = true\ntrust_remote_code = true")
    assert not labs.load_config(env={"LABS_TRUST_REMOTE_CODE": "0"}).model.trust_remote_code
    assert caplog.records == []
    lines = 'model_name = "m"\nuse_safetensors = false\ntrust_remote_code = true\n'
    write(TOML, "".join(f"[models.{n}]\n{lines}" for n in "ab"))
    config = labs.load_config(env={})
    assert (config.model.trust_remote_code, config.models["b"].model.trust_remote_code) == (0, 1)
    assert len([r for r in caplog.records if "use_safetensors" in r.getMessage()]) == 2


# ---------------------------------------------------------------- tables of models


def test_a_flag_for_one_model_does_not_reach_the_tables_of_others():
    write(TOML, SMALL + '[models.big]\nmodel_name = "n"\nadapter = "its own"\n')
    for model, kind, adapter in (("small", "text", "new"), ("x", "embedding", None)):
        given = {"model_name": model, "kind": kind, "adapter": adapter, "top_k": 5}
        given = {name: value for name, value in given.items() if value is not None}
        config = labs.load_config(env={}, overrides=given)
        found = {name: each.model for name, each in config.by_name().items()}
        assert (found[model].kind, found[model].adapter) == (kind, adapter)
        assert (found["big"].kind, found["big"].adapter) == ("text", "its own")
        assert config.models["big"].generation.top_k == 5


MODELS = """
[generation]
model_name = "NAME"
temperature = 0.5
top_k = 9
[quantization]
bnb_4bit_quant_type = "fp4"
[models.small]
model_name = "org/small"
temperature = 0.25
use_chat_template = false
[models.packed]
model_name = "org/packed"
quantization = {load_in_8bit = true}
"""


@pytest.mark.parametrize("layer", LAYERS)
def test_a_model_table_is_chosen_by_its_name_in_any_layer(layer):
    write(TOML, MODELS.replace("NAME", "small" if layer == TOML else "usual"))
    write(".env", "LABS_MODEL=small\n" if layer == ".env" else "")
    env = {"LABS_MODEL": "small"} if layer == ENV else {}
    overrides = {"model_name": "small"} if layer == "overrides" else {}
    config = labs.load_config(env=env, overrides=overrides)
    assert (config.model.model_name, config.generation.temperature) == ("org/small", 0.25)


def test_a_model_table_replaces_the_sections_that_it_has_but_not_the_environment():
    write(TOML, MODELS)
    small, packed = (labs.load_config(env={"LABS_MODEL": name}) for name in ("small", "packed"))
    env = {"LABS_MODEL": "small", "LABS_TEMPERATURE": "0.75"}
    assert labs.load_config(env=env).generation.temperature == 0.75
    assert (small.generation.top_k, small.use_chat_template) == (None, False)
    assert small.model.quantization.bnb_4bit_quant_type == "fp4"
    assert packed.model.quantization == labs.Quantization(load_in_8bit=True)
    assert line_of("temperature", small).endswith("labs.toml [models.small]")
    assert 'model_name = "org/small"' in line_of("model_name", small)


# ---------------------------------------------------------------- bounds and structs

# fmt: off
BOUNDS = [  # key, the least and the most that are accepted, a step beyond
    ("max_new_tokens", 1, 2**20, 1), ("temperature", 0, 100, 0.01), ("top_p", 0, 1, 0.01),
    ("top_k", 0, 1_000_000, 1), ("min_p", 0, 1, 0.01), ("repetition_penalty", 0.01, 100, 0.01),
    ("frequency_penalty", -2, 2, 0.01), ("presence_penalty", -2, 2, 0.01), ("logprobs", 0, 20, 1),
    ("prompt_lookup_num_tokens", 1, 32, 1), ("seed", 0, 2**63 - 1, 1),
    ("timeout_s", 0.01, 86_400, 0.01), ("server_port", 0, 65_535, 1),
    ("server_max_batch_rows", 1, 4096, 1), ("server_prefix_cache_bytes", 0, 2**50, 1),
    ("server_max_waiting", 0, 100_000, 1), ("server_max_body_bytes", 1024, 2**30, 1),
    ("server_max_prompt_bytes", 1, 2**30, 1), ("server_max_choices", 1, 128, 1),
    ("server_max_connections", 16, 100_000, 1), ("server_requests_per_minute", 1, 10**12, 1),
    ("server_tokens_per_minute", 1, 10**12, 1), ("server_max_loaded_models", 1, 100, 1),
    ("server_model_memory_bytes", 1, 2**50, 1), ("response_cache_max_entries", 0, 10**6, 1),
    ("documents_passages", 1, 50, 1), ("documents_max_tokens", 1, 2**20, 1),
    ("guard_classifier_threshold", 0, 1, 0.01), ("guard_hold_back_chars", 1, 65_536, 1),
]
# fmt: on


@pytest.mark.parametrize(("key", "least", "most", "step"), BOUNDS, ids=[each[0] for each in BOUNDS])
def test_a_number_is_accepted_up_to_its_bounds_and_refused_beyond(key, least, most, step):
    for value in (least, most):
        assert labs.load_config(env={}, overrides={key: value}).sources[key]
    for value in (least - step, most + step):
        refused([key], overrides={key: value})


STRUCTS = [each for each in vars(labs).values() if isinstance(each, type)]
STRUCTS = [each for each in STRUCTS if issubclass(each, labs.Strict) and fields(each)]


@pytest.mark.parametrize("kind", STRUCTS, ids=[kind.__name__ for kind in STRUCTS])
def test_a_struct_that_users_fill_in_is_frozen_and_refuses_unknown_fields(kind):
    assert kind.__struct_config__.frozen
    assert kind.__struct_config__.forbid_unknown_fields
    with pytest.raises(TypeError, match="positional"):
        kind("x")


@pytest.mark.parametrize("default", [True, False])
def test_documents_are_used_as_requested_or_as_configured(default):
    documents = labs.Documents(database="a.db", default=default)
    assert [documents.apply(asked) for asked in (None, True, False)] == [default, True, False]
    without = labs.Documents(default=default)
    assert [without.apply(asked) for asked in (None, False)] == [False, False]
    with pytest.raises(labs.InputError, match="no database of documents is configured"):
        without.apply(True)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("stop", bad) for bad in ([""], ["x" * 1025], ["x"] * 17)),
        *(("logit_bias", {key: 0}) for key in (-1, 2**31 + 1)),
        *(("logit_bias", {5: bias}) for bias in (-100.01, 100.01, float("nan"))),
        *[("temprature", 1), ("model_name", "x"), ("temperature", float("nan"))],
        *[("temperature", 0), ("max_new_tokens", 1.5)],  # a 0 contradicts do_sample
    ],
)
def test_evolve_refuses_what_a_file_may_not_say_either(key, value):
    assert labs.evolve(labs.Generation(), stop=["x" * 1024] * 16, logit_bias={0: -100, 2**31: 100})
    with pytest.raises(labs.ConfigError, match=key):
        labs.evolve(labs.Generation(do_sample=True), **{key: value})


def test_an_explanation_shows_each_setting_its_source_and_the_memory_without_computing(tiny):
    advice = {"do_sample": True, "top_k": 7, "temperature": 0.7}
    model = msgspec.structs.replace(tiny, generation_defaults=advice)
    explain, value = labs_explain.explain, labs_explain.SettingValue
    here = {"max_new_tokens": "x.toml", "do_sample": "x.toml"}
    with counted(tiny) as calls:
        told = explain(model, SHORT, labs.Generation(max_new_tokens=5), here)
        greedy = explain(model, SHORT, labs.Generation(do_sample=False), here)
        with pytest.raises(labs.PromptTooLong):
            explain(tiny, SHORT, labs.Generation(max_new_tokens=10**5))
    assert calls == []
    assert (told.prompt, told.prompt_tokens, told.how) == ("hey", 3, tiny.decoder.mode)
    assert told.context_left == tiny.context_length - 3
    assert told.cache_bytes == 8 * tiny.decoder.column_bytes > 0
    found = [told.settings[key] for key in ("max_new_tokens", "top_k", "top_p", "seed")]
    expected = [(5, "x.toml"), (7, "model"), (1.0, "default"), (None, "drawn")]
    assert found == [value(*each) for each in expected]
    assert greedy.settings["do_sample"] == value(False, "x.toml")
    assert greedy.settings["temperature"] == value(0.0, "do_sample")
    known = {key for key, s in SETTINGS.items() if s.section in ("generation", "quantization")}
    assert known - {*told.settings} == {*labs.Chat.__struct_fields__}


# ---------------------------------------------------------------- labs.toml


def test_labs_toml_and_env_example_name_every_setting_and_change_none():
    config = labs.load_config(ROOT / "labs.toml", env={})
    assert msgspec.structs.replace(config, sources={}) == labs.Config()
    example = (ROOT / ".env.example").read_text(encoding="utf-8")
    text = (ROOT / "labs.toml").read_text(encoding="utf-8")
    sections = dict(part.split("]\n", 1) for part in text.split("\n[") if "]\n" in part)
    for setting in labs.settings():
        assert re.search(rf"^# ?{setting.environment}=", example, re.MULTILINE), setting.environment
        lines = [line.removeprefix("# ") for line in sections[setting.section].splitlines()]
        line = next(line for line in lines if line.startswith(f"{setting.field} = "))
        if setting.default not in (None, (), {}):
            assert tomllib.loads(line) == {setting.field: setting.default}
