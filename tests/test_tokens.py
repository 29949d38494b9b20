# SPDX-License-Identifier: Apache-2.0
"""Tests of labs_tokens.py: bytes, names and places of tokens, against the text that they make."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import kit
import pytest
import transformers
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers import models as tokenizer_models

import labs
import labs_openai
import labs_tokens

EMOJI = "😀 héllo 漢字 \U0001f469\u200d\U0001f680!"
SPECIAL = ["<s>", "</s>", "<|turn|>"]


def byte_level():
    """Make a byte-level tokenizer with some merged tokens, as GPT-2's and those after it."""
    tokenizer = kit.byte_tokenizer()
    tokenizer.add_tokens([AddedToken("<tag>", special=False), AddedToken("né w", special=False)])
    return tokenizer


def sentencepiece():
    """Make a tokenizer that falls back to bytes, as Llama 2's: it drops a text's first space."""
    words = ["\u2581", "\u2581a", "a", "b", "\u2581the", "é", "漢", "\u2581\u2581"]
    names = ["<unk>", *SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    vocabulary = {name: i for i, name in enumerate(names)}
    options = {"merges": [], "unk_token": "<unk>", "byte_fallback": True}
    inner = Tokenizer(tokenizer_models.BPE(vocab=vocabulary, **options))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    inner.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, additional_special_tokens=SPECIAL[2:], **names
    )


KINDS = {"byte level": byte_level(), "sentencepiece": sentencepiece()}


def model_of(tokenizer):
    lock, ends = threading.RLock(), frozenset({tokenizer.eos_token_id})
    return SimpleNamespace(tokenizer=tokenizer, lock=lock, eos_token_ids=ends)


def text_of(tokenizer, ids):
    """Return the text that an answer of these tokens has, piece by piece as it is made."""
    text = labs.PartialText()
    pieces = [labs.decode_next(tokenizer, text, token) for token in ids]
    return "".join(pieces) + labs.decode_next(tokenizer, text, None, last=True)


def sequences(kind):
    size = len(KINDS[kind])
    text = st.text(alphabet=EMOJI + "ab the<tag>", max_size=6)
    whole = text.map(lambda t: list(KINDS[kind](t, add_special_tokens=False)["input_ids"]))
    return st.one_of(whole, st.lists(st.integers(0, size - 1), max_size=12))


@pytest.mark.parametrize("kind", KINDS)
def test_the_bytes_of_tokens_are_those_of_their_text(kind):
    tokenizer = KINDS[kind]

    @hypothesis_settings(max_examples=100, deadline=None, derandomize=True, database=None)
    @given(ids=sequences(kind))
    def check(ids):
        places = labs_tokens.Places(model_of(tokenizer))
        found = [places.take(token) for token in ids]
        data, text = b"".join(part for _, part in found), text_of(tokenizer, ids)
        try:
            whole = data.decode()
        except UnicodeDecodeError:  # where a broken character ends is a matter of taste
            return
        assert whole == text
        assert [place for place, _ in found] == sorted(place for place, _ in found)
        for place, part in found:
            if part and (char := part[:1].decode(errors="ignore")):
                assert text[place] == char

    check()


def test_only_the_first_of_several_spaces_is_dropped():
    space = KINDS["sentencepiece"].convert_tokens_to_ids("\u2581")
    places = labs_tokens.Places(model_of(KINDS["sentencepiece"]))
    assert [places.take(space) for _ in range(3)] == [(0, b""), (0, b" "), (1, b" ")]
    assert text_of(KINDS["sentencepiece"], [space] * 3) == "  "


@pytest.mark.parametrize("kind", KINDS)
def test_names_are_unique_among_all_tokens(kind):
    spelling = labs_tokens.Spelling(model_of(KINDS[kind]))
    names: dict[str, int] = {}
    for token in range(len(KINDS[kind])):
        names[spelling.name_of(token, names)] = token
    assert sorted(names.values()) == [*range(len(KINDS[kind]))]


def test_special_tokens_have_no_bytes_and_keep_their_names():
    for tokenizer in KINDS.values():
        spelling = labs_tokens.Spelling(model_of(tokenizer))
        for token in tokenizer.all_special_ids:
            name = str(tokenizer.convert_ids_to_tokens(token))
            assert (spelling.bytes_of(token), spelling.name_of(token)) == (b"", name)


@pytest.mark.parametrize(("text", "last"), [("é😀a", "a"), ("é!", "!")])
def test_tokens_inside_a_character_have_bytes_for_names_and_its_place(text, last):
    tokenizer = KINDS["byte level"]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    top = tuple((token, -1.0) for token in ids)
    part = labs.Delta(text, tuple(labs.TokenLogprob(token, -1.0, top) for token in ids))
    names = [f"bytes:\\x{byte:02x}" for byte in text.encode()[:-1]] + [last]
    found = labs_openai.COMPLETIONS.choice(labs_tokens.Places(model_of(tokenizer)), 0, part)
    assert found.logprobs["tokens"] == names
    assert [[*each] for each in found.logprobs["top_logprobs"]] == [names] * len(ids)
    places = [place for place, char in enumerate(text) for _ in char.encode()]
    assert found.logprobs["text_offset"] == places
    found = labs_openai.CHAT.choice(labs_tokens.Places(model_of(tokenizer)), 0, part)
    entries = found.logprobs["content"]
    assert [entry["bytes"] for entry in entries] == [[byte] for byte in text.encode()]
    assert [entry["token"] for entry in entries] == names
    assert [each["token"] for each in entries[0]["top_logprobs"]] == names
