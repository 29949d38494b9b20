# SPDX-License-Identifier: Apache-2.0
"""Tests of labs_tokens.py: bytes, names and places of tokens, against the text that they make."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

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


def byte_level() -> Any:
    """Make a byte-level tokenizer with some merged tokens, as GPT-2's and those after it."""
    tokenizer = kit.byte_tokenizer()
    tokenizer.add_tokens([AddedToken("<tag>", special=False), AddedToken("né w", special=False)])
    return tokenizer


def sentencepiece() -> Any:
    """Make a tokenizer that falls back to bytes, as Llama 2's: it drops a text's first space."""
    words = ["\u2581", "\u2581a", "a", "b", "\u2581the", "é", "漢", "\u2581\u2581"]
    names = ["<unk>", *SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    vocabulary = {name: i for i, name in enumerate(names)}
    inner = Tokenizer(
        tokenizer_models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True)
    )
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    inner.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=SPECIAL[2:],
    )


KINDS = {"byte level": byte_level(), "sentencepiece": sentencepiece()}


def model_of(tokenizer: Any) -> Any:
    lock, ends = threading.RLock(), frozenset({tokenizer.eos_token_id})
    return SimpleNamespace(tokenizer=tokenizer, lock=lock, eos_token_ids=ends)


def text_of(tokenizer: Any, ids: list[int]) -> str:
    """Return the text that an answer of these tokens has, piece by piece as it is made."""
    text = labs.PartialText()
    pieces = [labs.decode_next(tokenizer, text, token) for token in ids]
    return "".join(pieces) + labs.decode_next(tokenizer, text, None, last=True)


def sequences(kind: str) -> Any:
    size = len(KINDS[kind])
    text = st.text(alphabet=EMOJI + "ab the<tag>", max_size=6)
    whole = text.map(lambda t: list(KINDS[kind](t, add_special_tokens=False)["input_ids"]))
    return st.one_of(whole, st.lists(st.integers(0, size - 1), max_size=12))


@pytest.mark.parametrize("kind", KINDS)
def test_the_bytes_of_tokens_are_those_of_their_text(kind: str) -> None:
    tokenizer = KINDS[kind]

    @hypothesis_settings(max_examples=300, deadline=None, derandomize=True, database=None)
    @given(ids=sequences(kind))
    def check(ids: list[int]) -> None:
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


@pytest.mark.parametrize("kind", KINDS)
def test_names_are_unique_whatever_the_rivals_are(kind: str) -> None:
    spelling = labs_tokens.Spelling(model_of(KINDS[kind]))
    names: dict[str, int] = {}
    for token in range(len(KINDS[kind])):
        names[spelling.name_of(token, names)] = token
    assert sorted(names.values()) == [*range(len(KINDS[kind]))]


def test_tokens_inside_a_character_begin_where_it_does() -> None:
    tokenizer = KINDS["byte level"]
    ids = tokenizer("é😀a", add_special_tokens=False)["input_ids"]
    places = labs_tokens.Places(model_of(tokenizer))
    assert [places.take(token)[0] for token in ids] == [0, 0, 1, 1, 1, 1, 2]
    assert text_of(tokenizer, ids) == "é😀a"


def test_what_a_text_leaves_out_has_no_bytes_and_keeps_its_name() -> None:
    for tokenizer in KINDS.values():
        spelling = labs_tokens.Spelling(model_of(tokenizer))
        for token in tokenizer.all_special_ids:
            name = str(tokenizer.convert_ids_to_tokens(token))
            assert (spelling.bytes_of(token), spelling.name_of(token)) == (b"", name)


def test_completions_key_rivals_that_are_no_text_by_their_bytes() -> None:
    tokenizer = KINDS["byte level"]
    ids = tokenizer("😀", add_special_tokens=False)["input_ids"]
    top = tuple((token, -1.0) for token in (*ids, 97))
    part = labs.Delta("😀", tuple(labs.TokenLogprob(token, -1.0, top) for token in ids))
    places = labs_tokens.Places(model_of(tokenizer))
    found = labs_openai.COMPLETIONS.choice(places, 0, part).logprobs
    assert found is not None
    names = ["bytes:\\xf0", "bytes:\\x9f", "bytes:\\x98", "bytes:\\x80"]
    assert found["tokens"] == names
    assert [[*each] for each in found["top_logprobs"]] == [[*names, "a"]] * 4
    assert found["text_offset"] == [0] * 4


def test_a_chat_tells_the_bytes_of_a_character_in_several_tokens() -> None:
    tokenizer = KINDS["byte level"]
    ids = tokenizer("é!", add_special_tokens=False)["input_ids"]
    part = labs.Delta("é!", tuple(labs.TokenLogprob(token, -1.0, ((97, -2.0),)) for token in ids))
    choice = labs_openai.CHAT.choice(labs_tokens.Places(model_of(tokenizer)), 0, part)
    assert choice.logprobs is not None
    content = choice.logprobs["content"]
    assert [entry["bytes"] for entry in content] == [[0xC3], [0xA9], [33]]
    assert {entry["top_logprobs"][0]["token"] for entry in content} == {"a"}
