# SPDX-License-Identifier: Apache-2.0
"""Tests of text, token by token: decode_next and match_stop, for tokenizers of several kinds."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import transformers
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from kit import USER, byte_tokenizer, encoded
from tokenizers import Tokenizer, decoders
from tokenizers import models as tokenizer_models

import labs

BYTES = [f"<0x{i:02X}>" for i in range(256)]
SPACES = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
MARKED = ["<unk>", "<s>", "▁", "▁one", "▁two", "ly", ".", "▁▁"]
PIECES = ["[UNK]", "[SEP]", "one", "##ly", "two", ".", ",", "'", "s"]


def words_tokenizer(words: list[str], decoder: Any) -> Any:
    """Make a tokenizer that decodes these words, of which the second is a special token."""
    vocabulary = {word: i for i, word in enumerate(words)}
    inner = Tokenizer(tokenizer_models.WordLevel(vocabulary, unk_token=words[0]))
    inner.decoder = decoder
    named = {"unk_token": words[0], "additional_special_tokens": [words[1]]}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **named)


TOKENIZER = byte_tokenizer()
TOKENIZERS = {
    "metaspace": words_tokenizer(MARKED, decoders.Metaspace()),
    "byte fallback": words_tokenizer(
        MARKED + BYTES, decoders.Sequence([*SPACES, decoders.Strip(" ", 1, 0)])
    ),
    "word pieces": words_tokenizer(PIECES, decoders.WordPiece()),
}


def pieces_of(tokenizer: Any, ids: list[int]) -> list[str]:
    text, last = labs.PartialText(), len(ids) - 1
    return [labs.decode_next(tokenizer, text, t, last=i == last) for i, t in enumerate(ids)]


@given(st.text(min_size=1, max_size=20))
@hypothesis_settings(max_examples=40, deadline=None)
def test_text_decoded_token_by_token_is_the_whole_text_in_whole_characters(text):
    pieces = pieces_of(TOKENIZER, encoded(text))
    assert "".join(pieces) == text
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize(
    ("ids", "pieces"),
    [
        (encoded("é😀"), ["", "é", "", "", "", "😀"]),
        (encoded("a\ufffdbcdef")[-3:], ["d", "e", "f"]),
        ([*b"ab", USER, *b"cd"], ["a", "b", "", "c", "d"]),
        (encoded("😀")[:2], ["", "\ufffd"]),
        ([*encoded("😀")[:2], USER], ["", "", "\ufffd"]),
        ([0x80] * 5, ["", "", "", "\ufffd" * 4, "\ufffd"]),
    ],
)
def test_a_piece_is_empty_only_inside_a_character_or_for_a_special_token(ids, pieces):
    assert pieces_of(TOKENIZER, ids) == pieces


@pytest.mark.real
@pytest.mark.parametrize("text", ["Grüße, 日本語 😀!", "  two  spaces\n\ttab", "👩‍👩‍👧 family"])
def test_the_default_tokenizer_decodes_token_by_token_without_loss(text, default):
    pieces = pieces_of(default.tokenizer, default.tokenizer(text)["input_ids"])
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


@st.composite
def token_ids(draw: Any, kind: str) -> list[int]:
    """Draw ids of words, of special tokens, of no token, and of whole characters in bytes."""
    size, found = len(TOKENIZERS[kind]), list[int]()
    first = len(MARKED) if kind == "byte fallback" else size
    words = [i for i in range(size) if not first <= i < first + 256]
    letters = st.sampled_from(["é", "€", "😀", "A", "\n", "日"] if first < size else words)
    for each in draw(st.lists(st.one_of(st.sampled_from([*words, size + 3]), letters))):
        if isinstance(each, int):
            found.append(each)
            continue
        for byte in each.encode():
            found += [first + byte, *([1] * draw(st.sampled_from([0, 0, 0, 1, 3])))]
    return found


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_pieces_of_any_tokens_join_to_the_text_of_all_of_them(kind):
    tokenizer = TOKENIZERS[kind]

    @given(token_ids(kind))
    @hypothesis_settings(max_examples=40, deadline=None)
    def pieces_join(ids: list[int]) -> None:
        text = tokenizer.decode(ids, skip_special_tokens=True)
        assert "".join(pieces_of(tokenizer, ids)) == text

    pieces_join()


@pytest.mark.parametrize("between", [[], [0], [1], [1, 0, 1, 1], [9999], [1] * 40])
def test_a_space_is_kept_behind_tokens_that_are_not_shown(between):
    assert "".join(pieces_of(TOKENIZERS["metaspace"], [3, *between, 4])) == "one two"


def test_the_window_that_is_decoded_stays_short():
    text = labs.PartialText()
    for token in [1] * 200 + [3, 4, 1, 5] * 100:
        labs.decode_next(TOKENIZERS["byte fallback"], text, token)
        assert len(text.ids) - text.prefix < 8


# ---------------------------------------------------------------- stop strings


def first_stop(text: str, stops: tuple[str, ...]) -> tuple[str, str | None]:
    for end in range(1, len(text) + 1):
        if ended := [stop for stop in stops if text[:end].endswith(stop)]:
            stop = max(ended, key=len)
            return text[: end - len(stop)], stop
    return text, None


@given(
    st.text("ab😀", max_size=24),
    st.lists(st.text("ab😀", min_size=1, max_size=5), max_size=4).map(tuple),
    st.lists(st.integers(0, 24)),
)
@hypothesis_settings(max_examples=200, deadline=None)
def test_the_first_stop_string_ends_a_text_in_whatever_pieces_it_comes(text, stops, cuts):
    borders = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    state, shown, stop = labs.PartialText(), "", None
    for a, b in itertools.pairwise(borders):
        part, stop = labs.match_stop(state, text[a:b], stops)
        shown += part
        if stop is not None:
            break
        assert state.held == "" or any(
            each.startswith(state.held) and each != state.held for each in stops
        )
    assert (shown + state.held, stop) == first_stop(text, stops)
