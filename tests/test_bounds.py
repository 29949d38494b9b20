# SPDX-License-Identifier: Apache-2.0
"""Tests of what one request may ask for: a wrong one fails alone, and numbers stay finite."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import torch
from kit import SHORT, byte_tokenizer, load, save_model
from msgspec.structs import fields

import labs


def outcomes(model: labs.Model, prompts: Any, options: Any = None, **changes: Any) -> Any:
    """Return {index: the event that ends it}."""
    return dict(labs.stream_batch(model, prompts, options, **changes))


@pytest.mark.parametrize("wrong", [(97, 262), (-1, 97), (97, 0.5), ("a",), (), (65,) * 5000])
def test_a_prompt_beyond_embedding_or_context_is_refused_alone(wrong, tiny):
    prompts = [SHORT, labs.Inputs(wrong, ""), labs.Inputs((70, 71), "")]
    found = outcomes(tiny, prompts, max_new_tokens=3)
    assert isinstance(found[1].error, labs.InputError)
    assert [type(found[i]) for i in (0, 2)] == [labs.Done] * 2


def test_the_embedding_bounds_token_ids_not_tokenizer_or_configuration(tiny, monkeypatch):
    model = msgspec.structs.replace(tiny, tokenizer=byte_tokenizer())
    model.tokenizer.add_tokens(["<new>"])
    inputs = labs.build_inputs(model, prompt="so <new> it is")
    with pytest.raises(labs.InputError, match="token id 262, but the model has only 262"):
        labs.generate(model, inputs)
    monkeypatch.setattr(tiny.decoder.config, "vocab_size", 5000)
    with pytest.raises(labs.InputError, match="token id 300"):
        labs.inputs_from_ids(tiny, [300])


def test_a_chosen_token_that_the_embedding_lacks_ends_its_row_alone(folder):
    model = load(save_model(folder / "narrow"))
    narrow = torch.nn.Embedding(130, 64)
    narrow.weight.data[:] = model.model.get_input_embeddings().weight.data[:130]
    model.model.set_input_embeddings(narrow)
    wide, plain = ({token: 100.0} for token in (180, 90))
    options = [labs.Generation(max_new_tokens=n, logit_bias=b) for b, n in ((wide, 5), (plain, 5))]
    options.append(labs.Generation(max_new_tokens=1, logit_bias=wide))
    found = outcomes(model, [SHORT] * 3, options)
    assert "token 180, but its input embedding has only" in str(found[0].error)
    assert [type(found[i]) for i in (1, 2)] == [labs.Done] * 2


WRONG: list[dict[str, Any]] = [
    {"top_k": -2}, {"top_p": 1.5}, {"min_p": -0.1}, {"temperature": float("nan")},
    {"temperature": float("inf")}, {"repetition_penalty": 1e-39}, {"repetition_penalty": 0.0},
    {"logprobs": 300}, {"logit_bias": {-3: 1.0}}, {"logit_bias": {3: float("nan")}},
    {"logit_bias": {300: 1.0}}, {"frequency_penalty": 1e30}, {"timeout_s": 0.0}, {"seed": -4},
    {"max_new_tokens": 0}, {"stop": ("",)}, {"prompt_lookup_num_tokens": 99},
]  # fmt: skip


def test_options_made_by_code_are_checked_and_fail_alone(tiny):
    options = [labs.Generation(**{"max_new_tokens": 2} | each) for each in ({}, *WRONG, {})]
    found = outcomes(tiny, [SHORT] * len(options), options)
    for index, wrong in enumerate(WRONG, 1):
        assert isinstance(found[index], labs.Failed), wrong
        assert next(iter(wrong)) in str(found[index].error)
        with pytest.raises(labs.LabsError, match=next(iter(wrong))):
            labs.open_request(tiny, 0, SHORT, options[index])
    assert all(isinstance(found[i], labs.Done) for i in (0, len(WRONG) + 1))


NUMBERS = [field.name for field in fields(labs.Generation) if "float" in str(field.type)]
BORDERS = (5e-324, 1e-300, 1e-45, 1.2e-38, 3e-31, 1e-30, 1e-9, 0.01, 1.0, 1 - 1e-16, 2.0, 99.9, 100)


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_is_refused_or_gives_finite_logits(name, tiny):
    warm = {} if name == "temperature" else {"temperature": 0.9}
    given = [{name: {5: value} if name == "logit_bias" else value} for value in BORDERS]
    options = [labs.Generation(max_new_tokens=4, seed=5, **warm | each) for each in given]
    for index, end in outcomes(tiny, [SHORT] * len(options), options).items():
        text = f"{type(end.error).__name__} {end.error}" if isinstance(end, labs.Failed) else ""
        assert text == "" or text.startswith(f"ConfigError {name}"), given[index]


def test_a_temperature_near_zero_takes_the_likeliest_tokens(tiny):
    cold = [5e-324, 1e-38, 2e-38, 1e-37, 9e-31, 1e-30, 1e-24, 1e-12]
    options = {"max_new_tokens": 9}
    expected = labs.generate(tiny, SHORT, temperature=0, **options).text
    texts = {labs.generate(tiny, SHORT, temperature=each, **options).text for each in cold}
    assert texts == {expected}
