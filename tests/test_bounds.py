# SPDX-License-Identifier: Apache-2.0
"""What one request may ask for: nothing that ends the rows of others, nor changes into NaN."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from kit import SHORT, byte_tokenizer, load, save_model, with_template
from msgspec.structs import fields
from tokenizers import Tokenizer, decoders
from tokenizers import models as tokenizer_models

import labs


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> labs.Model:
    return load(save_model(tmp_path_factory.mktemp("tiny") / "model"))


# ---------------------------------------------------------------- what one row may ask for


@pytest.mark.parametrize("wrong", [(97, 262), (-1, 97), (97, 0.5), ("a",), ()])
def test_a_prompt_that_the_embedding_does_not_hold_is_refused_and_the_others_go_on(wrong, tiny):
    prompts = [SHORT, labs.Inputs(wrong, ""), labs.Inputs((70, 71), "")]
    found = dict(labs.stream_batch(tiny, prompts, max_new_tokens=3))
    assert isinstance(found[1], labs.Failed)
    assert isinstance(found[1].error, labs.InputError)
    assert all(isinstance(found[i], labs.Done) for i in (0, 2))


def test_a_token_of_the_tokenizer_that_the_embedding_lacks_is_refused_by_its_id(tiny):
    model = msgspec.structs.replace(tiny, tokenizer=byte_tokenizer())
    model.tokenizer.add_tokens(["<new>"])
    inputs = labs.build_inputs(model, prompt="so <new> it is")
    with pytest.raises(labs.InputError, match="token id 262, but the model has only 262"):
        labs.generate(model, inputs)


def test_the_bound_is_what_the_embedding_holds_not_what_the_configuration_says(tiny, monkeypatch):
    monkeypatch.setattr(tiny.decoder.config, "vocab_size", 5000)
    with pytest.raises(labs.InputError, match="token id 300"):
        labs.inputs_from_ids(tiny, [300])


def test_a_chosen_token_that_cannot_be_read_again_ends_its_own_row(tmp_path: Path):
    model = load(save_model(tmp_path / "narrow"))
    narrow = torch.nn.Embedding(130, 64)
    narrow.weight.data[:] = model.model.get_input_embeddings().weight.data[:130]
    model.model.set_input_embeddings(narrow)
    wide, plain = ({token: 100.0} for token in (180, 90))
    options = [labs.Generation(max_new_tokens=n, logit_bias=b) for b, n in ((wide, 5), (plain, 5))]
    options.append(labs.Generation(max_new_tokens=1, logit_bias=wide))
    found = dict(labs.stream_batch(model, [SHORT] * 3, options))
    assert "token 180, but its input embedding has only" in str(found[0].error)
    assert [type(found[i]) for i in (1, 2)] == [labs.Done] * 2


WRONG: list[dict[str, Any]] = [
    *({"top_k": -2}, {"top_p": 1.5}, {"min_p": -0.1}, {"temperature": float("nan")}),
    *({"temperature": float("inf")}, {"repetition_penalty": 1e-39}, {"repetition_penalty": 0.0}),
    *({"logprobs": 300}, {"logit_bias": {-3: 1.0}}, {"logit_bias": {3: float("nan")}}),
    *({"logit_bias": {300: 1.0}}, {"frequency_penalty": 1e30}, {"timeout_s": 0.0}),
    *({"seed": -4}, {"max_new_tokens": 0}, {"stop": ("",)}, {"prompt_lookup_num_tokens": 99}),
]


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_options_made_by_code_are_checked_and_harm_no_other_row(wrong, tiny):
    options = [labs.Generation(**{"max_new_tokens": 2} | each) for each in ({}, wrong, {})]
    found = dict(labs.stream_batch(tiny, [SHORT] * 3, options))
    assert isinstance(found[1], labs.Failed)
    assert next(iter(wrong)) in str(found[1].error)
    assert all(isinstance(found[i], labs.Done) for i in (0, 2))


NUMBERS = [field.name for field in fields(labs.Generation) if "float" in str(field.type)]
BORDERS = (5e-324, 1e-300, 1e-45, 1.2e-38, 3e-31, 1e-30, 1e-9, 0.01, 1.0, 1 - 1e-16, 2.0, 99.9, 100)


@pytest.mark.parametrize("value", BORDERS)
@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_is_refused_or_gives_finite_logits(name, value, tiny):
    given = {5: value} if name == "logit_bias" else value
    warm = {} if name == "temperature" else {"temperature": 0.9}
    told = ""
    try:
        labs.generate(tiny, SHORT, max_new_tokens=6, seed=5, **warm, **{name: given})
    except labs.LabsError as error:
        told = f"{type(error).__name__} {error}"
    assert told == "" or told.startswith(f"ConfigError {name}")


@pytest.mark.parametrize("temperature", [5e-324, 1e-38, 2e-38, 1e-37, 9e-31, 1e-30, 1e-24, 1e-12])
def test_a_temperature_near_zero_takes_the_likeliest_tokens(temperature, tiny):
    expected = labs.generate(tiny, SHORT, max_new_tokens=9, temperature=0).text
    assert labs.generate(tiny, SHORT, max_new_tokens=9, temperature=temperature).text == expected


# ---------------------------------------------------------------- templates and tokenizers


@pytest.mark.parametrize(
    ("template", "told"),
    [
        (
            "{% for m in messages %}{{ m.content }}{{ 3 % (loop.length - 1) }}{% endfor %}",
            "ZeroDivision",
        ),
        ("{{ messages[0]['content'] + 4 }}", "TypeError"),
        ("{% for i in range(10 ** 8) %}x{% endfor %}", "OverflowError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ messages[3].content }}", "has no element 3"),
        ("{{ raise_exception('not today') }}", "refuses this: not today"),
        ({"one": "x", "two": "y"}, "refuses this: This model has multiple chat templates"),
    ],
)
def test_whatever_a_template_raises_is_a_refusal_by_name(template, told, tiny):
    model = with_template(tiny, template)
    with pytest.raises(labs.InputError, match=told):
        labs.build_inputs(model, prompt="hello")
    assert not model.lock.locked()


class PanicException(BaseException):
    """As what tokenizers raises where Rust panics."""


@pytest.mark.parametrize("error", [PanicException("odd text"), OverflowError("odd"), TypeError()])
def test_whatever_a_tokenizer_raises_is_a_refusal_by_name(error, tiny):
    def tokenizer(text: str) -> Any:
        raise error

    model = msgspec.structs.replace(tiny, tokenizer=tokenizer)
    with pytest.raises(labs.InputError, match=f"the model.s tokenizer .* {type(error).__name__}"):
        labs.build_inputs(model, prompt="odd", use_chat_template=False)


def test_an_interruption_while_a_prompt_is_read_is_no_refusal(tiny):
    def tokenizer(text: str) -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        labs.build_inputs(msgspec.structs.replace(tiny, tokenizer=tokenizer), prompt="a")
    assert not tiny.lock.locked()


# ---------------------------------------------------------------- text, token by token

BYTES = [f"<0x{i:02X}>" for i in range(256)]
SPACES = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]


def words_tokenizer(words: list[str], decoder: Any, special: list[str]) -> Any:
    """Make a tokenizer of these words that decodes as real ones of its kind do."""
    vocabulary = {word: i for i, word in enumerate(words)}
    inner = Tokenizer(tokenizer_models.WordLevel(vocabulary, unk_token=words[0]))
    inner.decoder = decoder
    named = {"unk_token": words[0], "additional_special_tokens": special}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **named)


MARKED = ["<unk>", "<s>", "▁", "▁one", "▁two", "ly", ".", "▁▁"]
TOKENIZERS = {
    "metaspace": words_tokenizer(MARKED, decoders.Metaspace(), ["<s>"]),
    "byte fallback": words_tokenizer(
        MARKED + BYTES, decoders.Sequence([*SPACES, decoders.Strip(" ", 1, 0)]), ["<s>"]
    ),
    "word pieces": words_tokenizer(
        ["[UNK]", "[SEP]", "one", "##ly", "two", ".", ",", "'", "s"],
        decoders.WordPiece(),
        ["[SEP]"],
    ),
}
LETTERS = st.sampled_from(["é", "€", "😀", "A", "\n", "日"])


@st.composite
def token_ids(draw: Any, kind: str) -> list[int]:
    """Draw ids of words, of special tokens, of none, and of whole characters in bytes."""
    tokenizer, found = TOKENIZERS[kind], list[int]()
    first = len(MARKED) if kind == "byte fallback" else None
    size = len(tokenizer)
    words = [i for i in range(size) if first is None or not first <= i < first + 256]
    for letter in draw(st.lists(st.one_of(st.sampled_from([*words, size + 3]), LETTERS))):
        if isinstance(letter, int):
            found.append(letter)
            continue
        for byte in letter.encode() if first is not None else ():
            found += [len(MARKED) + byte, *([1] * draw(REPEATS))]
    return found


REPEATS = st.sampled_from([0, 0, 0, 1, 3])


@pytest.mark.parametrize("kind", ["metaspace", "byte fallback", "word pieces"])
def test_pieces_of_any_tokens_are_the_text_of_all_of_them(kind):
    tokenizer = TOKENIZERS[kind]

    @given(token_ids(kind))
    @hypothesis_settings(max_examples=150, deadline=None)
    def pieces_are_the_text(ids: list[int]) -> None:
        text, last = labs.PartialText(), len(ids) - 1
        pieces = [labs.decode_next(tokenizer, text, t, last=i == last) for i, t in enumerate(ids)]
        assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True)

    pieces_are_the_text()


@pytest.mark.parametrize("between", [[0], [1], [1, 0, 1, 1], [9999], [1] * 40])
def test_a_space_is_kept_behind_tokens_that_are_not_shown(between):
    text = labs.PartialText()
    ids = [3, *between, 4]
    found = "".join(labs.decode_next(TOKENIZERS["metaspace"], text, each) for each in ids)
    assert found == "one two"


def test_the_window_stays_short_whatever_comes():
    text = labs.PartialText()
    for token in [1] * 200 + [3, 4, 1, 5] * 100:
        labs.decode_next(TOKENIZERS["byte fallback"], text, token)
        assert len(text.ids) - text.prefix < 8
