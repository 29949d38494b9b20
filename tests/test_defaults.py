# SPDX-License-Identifier: Apache-2.0
"""Tests of labs_defaults.py: a recommendation of a model's files takes effect, or is named."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest
import torch
import transformers
from kit import END, EOS, USER, by_transformers, fold, load, save_model

import labs
import labs_defaults
import labs_explain

IDS = tuple(b"what a prompt holds, holds")
INPUTS = labs.Inputs(IDS, "")
TABLES = (
    *(labs_defaults.SETTINGS, labs_defaults.RULES, labs_defaults.WARPERS, labs_defaults.NEUTRAL),
    *({*labs_defaults.LENGTHS}, {*labs_defaults.NOT_DONE}),
)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("plain") / "model")


@pytest.fixture
def recommend(plain, tmp_path):
    """Return a function that loads the model with other words in its generation_config.json."""

    def loaded(*, spec: dict[str, Any] | None = None, **words: Any) -> labs.Model:
        tmp_path.joinpath("model").mkdir(exist_ok=True)
        for path in plain.iterdir():
            tmp_path.joinpath("model", path.name).write_bytes(path.read_bytes())
        file = tmp_path / "model/generation_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | words))
        given = {"model_name": str(tmp_path / "model"), "torch_dtype": "fp32"} | (spec or {})
        return labs.load_model(labs.ModelSpec(**given), cached=False)

    return loaded


def greedy(model: labs.Model, ids: tuple[int, ...] = IDS, new: int = 20) -> list[int]:
    options: Any = {"max_new_tokens": new, "logprobs": 0, "do_sample": False}
    return [each.token for each in labs.generate(model, labs.Inputs(ids, ""), **options).logprobs]


def row_of(model: labs.Model, **options: Any) -> Any:
    return labs.open_request(model, 0, INPUTS, labs.Generation(**options)).row


def explained(model: labs.Model) -> dict[str, str]:
    return labs_explain.explain(model, INPUTS, labs.Generation()).generation_config


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [each.getMessage() for each in caplog.records if each.name == "labs"]


def test_each_field_of_a_generation_config_is_in_one_table_and_each_rule_has_an_example():
    known = [name for name in vars(transformers.GenerationConfig()) if not name.startswith("_")]
    assert sorted(name for table in TABLES for name in table) == sorted(known)
    assert labs_defaults.RULES | {"watermarking_config"} <= RULES


def rules_for(tokens: list[int]) -> dict[str, dict[str, Any]]:
    """Return rules that change an answer of these tokens."""
    first, second, third, fourth, *_ = tokens
    penalty, encoder = {"repetition_penalty": 1.7}, {"encoder_repetition_penalty": 2.5}
    biases = [[[i], 7.0 - i % 5] for i in range(33, 99)]
    pulls = {"sequence_bias": [[[IDS[0]], 30.0], [[99], 29.0]]}
    several = {"suppress_tokens": [first], "no_repeat_ngram_size": 2, "min_new_tokens": 12}
    several |= {"sequence_bias": [[[77], 5.0]], "renormalize_logits": True, **penalty}
    return {
        "suppress_tokens": {"suppress_tokens": [first, third]},
        "begin_suppress_tokens": {"begin_suppress_tokens": [first]},
        "bad_words_ids": {"bad_words_ids": [[first, second], [fourth]]},
        "no_repeat_ngram_size": {"no_repeat_ngram_size": 1},
        "min_new_tokens": {"min_new_tokens": 9, "eos_token_id": [second]},
        "min_length": {"min_length": len(IDS) + 6, "eos_token_id": third},
        "sequence_bias": {"sequence_bias": [[[first], -8.5], [[90, 91], 4.0]]},
        "sequence_bias before a penalty": {"sequence_bias": biases, **penalty},
        "forced_eos_token_id": {"forced_eos_token_id": 256},
        "forced_bos_token_id": {"forced_bos_token_id": 67},
        "exponential_decay_length_penalty": {"exponential_decay_length_penalty": [4, 1.3]},
        "encoder_repetition_penalty": {**encoder, "repetition_penalty": 1.2},
        "encoder_no_repeat_ngram_size": {"encoder_no_repeat_ngram_size": 1, **pulls},
        "remove_invalid_values": {"remove_invalid_values": True},
        "watermarking_config": {"watermarking_config": {"bias": 5.5, "greenlist_ratio": 0.4}},
        "several": several,
    }


RULES = {*rules_for([1, 2, 3, 4])}


@pytest.mark.parametrize("name", sorted(RULES))
def test_a_rule_of_the_model_gives_the_tokens_that_transformers_gives(name, plain, recommend):
    before = greedy(load(plain))
    model = recommend(**rules_for(before)[name])
    prompt = (65,) if name == "forced_bos_token_id" else IDS
    found = greedy(model, prompt)
    assert found == by_transformers(model.model, [*prompt])
    unchanged = {"remove_invalid_values"}  # of logits that are all valid
    assert (found == (greedy(load(plain), prompt))) == (name in unchanged)


def test_each_row_of_a_batch_has_its_own_rules(plain, recommend):
    model = recommend(begin_suppress_tokens=[greedy(load(plain))[0]], min_new_tokens=4)
    prompts = [labs.Inputs(ids, "") for ids in (IDS, IDS[:3], IDS[2:9], (66,))]
    found = fold(labs.stream_batch(model, prompts, max_new_tokens=9))
    expected = [by_transformers(model.model, [*each.input_ids], 9) for each in prompts]
    expected = [model.tokenizer.decode(ids, skip_special_tokens=True) for ids in expected]
    assert [found[i][0] for i in range(4)] == expected


WARPERS = {
    "typical_p": {"typical_p": 0.3},
    "epsilon_cutoff": {"epsilon_cutoff": 0.02},
    "eta_cutoff": {"eta_cutoff": 0.03},
    "top_h": {"top_h": 0.4},
    "typical_p after the others": {"typical_p": 0.6, "top_k": 30, "top_p": 0.9, "min_p": 0.01},
}


@pytest.mark.parametrize("name", sorted(WARPERS))
def test_a_warper_of_the_model_keeps_the_tokens_that_transformers_keeps(name, recommend):
    words = {"do_sample": True, "temperature": 1.4, **WARPERS[name]}
    model = recommend(**words)
    row = row_of(model, seed=1)
    logits = torch.randn(262, generator=torch.Generator().manual_seed(4)) * 2
    kept = row.sampling.processors[0](row.ids, logits)
    config = transformers.GenerationConfig(**words)
    theirs = model.model._get_logits_processor(config, device="cpu")
    assert torch.equal(kept, theirs(torch.tensor([row.ids]), logits[None])[0])
    assert 0 < kept.isfinite().sum() < 262
    assert (row.sampling.temperature, row.sampling.top_k, row.sampling.top_p) == (1.0, 0, 1.0)
    used = labs.generate(model, INPUTS, max_new_tokens=2, seed=1).fingerprint
    assert used is not None
    assert used.generation.temperature == 1.4


def test_a_grammar_of_the_request_wins_over_a_rule_that_forbids_all_its_tokens(recommend):
    model = recommend(suppress_tokens=[70])

    def only_70(ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        allowed = torch.full_like(logits, -torch.inf)
        allowed[70] = logits[70]
        return allowed

    found = labs.generate(model, INPUTS, max_new_tokens=3, processors=[only_70], logprobs=0)
    assert 70 not in greedy(model)
    assert [each.token for each in found.logprobs] == [70] * 3


ODD: dict[str, Any] = {
    **{"temperature": "warm", "top_p": 1.5, "min_p": [0.1], "repetition_penalty": 0.0},
    **{"suppress_tokens": "some", "sequence_bias": [[[4000], 1.0]], "forced_eos_token_id": 4000},
    **{"guidance_scale": 1.5, "token_healing": True, "dola_layers": "high", "penalty_alpha": 0.4},
}


def test_fields_without_effect_are_named_at_load_and_in_the_explanation(plain, recommend, caplog):
    with caplog.at_level(logging.WARNING, "labs"):
        model = recommend(**ODD)
    told = explained(model)
    for name in ODD:
        assert sum(f" {name} = " in each for each in warnings_of(caplog)) == 1, name
        assert "is not used" in told[name]
    assert greedy(model) == greedy(load(plain))


QUIET: dict[str, Any] = {
    **{"max_length": 900, "max_new_tokens": 3, "max_time": 2.0, "num_beams": 1},
    **{"guidance_scale": 1.0, "token_healing": False, "use_cache": True, "typical_p": 1.0},
    **{"epsilon_cutoff": 0.0, "no_repeat_ngram_size": 0, "min_length": 0},
    **{"encoder_repetition_penalty": 1.0, "remove_invalid_values": False, "an_unknown_word": 4},
}


def test_neutral_values_and_lengths_make_no_rule_and_no_warning(recommend, caplog):
    with caplog.at_level(logging.WARNING, "labs"):
        model = recommend(**QUIET)
    assert (warnings_of(caplog), model.defaults.rules) == ([], {})
    assert row_of(model).sampling.processors == ()
    assert explained(model)["max_new_tokens"] == "3 is not used: max_new_tokens of labs decides"
    assert len(greedy(model)) == 20


def test_beams_are_refused_with_a_remedy_that_works(recommend):
    with pytest.raises(labs.ModelError, match=r"3 beams.*use_generation_config = false"):
        recommend(num_beams=3)
    model = recommend(num_beams=3, suppress_tokens=[1], spec={"use_generation_config": False})
    assert len(greedy(model)) == 20
    assert (model.defaults.rules, model.generation_defaults) == ({}, {})


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ({"do_sample": True, "temperature": 0.0}, {"do_sample": True, "temperature": 0.0}),
        ({"top_k": -1, "do_sample": True}, {"top_k": 0, "do_sample": True}),
        ({"top_k": 12.0}, {"top_k": 12}),
        ({"temperature": "0.25", "top_p": "0.75"}, {"temperature": 0.25, "top_p": 0.75}),
        ({"top_k": 7.5, "temperature": -1.0, "stop_strings": "zz"}, {"stop": ("zz",)}),
        ({"stop_strings": ["zz", "y"]}, {"stop": ("zz", "y")}),
    ],
)
def test_recommendations_are_read_with_the_bounds_of_settings(words, expected, recommend):
    model = recommend(**words)
    assert model.generation_defaults == expected
    warm = bool(expected.get("do_sample")) and expected.get("temperature") != 0
    assert (row_of(model, seed=3).sampling.temperature > 0) == warm
    assert len(list(labs.stream_generate(model, INPUTS, max_new_tokens=3))) > 0


def test_stop_strings_of_the_model_and_of_the_request_both_end_an_answer(plain, recommend):
    text = labs.generate(load(plain), INPUTS, max_new_tokens=20).text
    model = recommend(stop_strings=[text[5:7]])
    found = labs.generate(model, INPUTS, max_new_tokens=20, stop=("never",))
    assert (found.text, found.matched_stop) == (text[: text.index(text[5:7])], text[5:7])
    assert found.fingerprint is not None
    assert found.fingerprint.generation.stop == ("never", text[5:7])
    sooner = labs.generate(model, INPUTS, max_new_tokens=20, stop=(text[1],))
    assert sooner.matched_stop == text[1]


@pytest.mark.parametrize(
    ("tokens", "stop", "text", "matched"),
    [
        ([*b"AB", END, *b"CD"], ("<end>",), "AB", "<end>"),
        ([*b"AB", END, *b"CD"], ("xx", "<end>C"), "AB", "<end>C"),
        ([*b"AB", END, *b"CD"], ("<end>x",), "ABCD", None),
        ([*b"AB", END, *b"CD"], ("B<end>",), "A", "B<end>"),
        ([*b"AB", END, USER, *b"CD"], ("<end><|user|>",), "AB", "<end><|user|>"),
        ([*b"AB", END, USER, *b"CD"], ("<|user|>C",), "AB", "<|user|>C"),
        ([*b"AB", END, *b"CD"], ("BC",), "A", "BC"),
        ([*b"A<end>B"], ("<end>",), "A", "<end>"),
        ([*b"AB", EOS], ("<eos>",), "AB", "<eos>"),
        ([*b"AB", EOS], ("<end>",), "AB", None),
    ],
)
def test_a_stop_string_finds_special_tokens(tokens, stop, text, matched, plain):
    def force(ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        forced = torch.full_like(logits, -torch.inf)
        forced[tokens[len(ids) - len(IDS)]] = 0
        return forced

    options = labs.Generation(max_new_tokens=len(tokens), stop=stop)
    done = labs.generate(load(plain), INPUTS, options, processors=[force])
    assert (done.text, done.matched_stop) == (text, matched)
    assert done.finish_reason == ("length" if matched is None and EOS not in tokens else "stop")
    assert done.fingerprint is not None
    assert done.fingerprint.generation.stop == stop


def test_without_the_file_settings_have_an_effect_and_the_other_fields_are_named(
    recommend, caplog, monkeypatch
):
    there = labs._is_there
    monkeypatch.setattr(labs, "_is_there", lambda name: name != "labs_defaults" and there(name))
    with caplog.at_level(logging.WARNING, "labs"):
        model = recommend(top_k=-1, temperature="0.5", top_p=3, suppress_tokens=[4], num_beams=2)
    assert model.generation_defaults == {"top_k": 0, "temperature": 0.5}
    (said,) = warnings_of(caplog)
    assert all(name in said for name in ("suppress_tokens", "num_beams", "top_p"))
    assert model.defaults is None
    assert len(greedy(model)) == 20
