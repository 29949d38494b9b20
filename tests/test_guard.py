# SPDX-License-Identifier: Apache-2.0
"""Tests of labs_guard.py: rules, what goes in, what comes out in any pieces, and who uses it."""

from __future__ import annotations

import functools
import gc
import itertools
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import falcon.testing
import kit
import msgspec
import openai
import pytest
import torch
import transformers
from click.testing import CliRunner
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from kit import ANSWERED, BODIES, CHAT, COMPLETIONS, A, FakeEngine, Site, error_of, until
from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers import models as tokenizer_models

import labs
import labs_api
import labs_cli
import labs_engine
import labs_guard
import labs_jsonl
import labs_request
from labs_request import Prompt

TOLD = labs.Done("length", labs.Usage(7, 9), labs.Timings(0.0, 0.1, 0.2, 5.0), "stop", 3)
CARD = "4111 1111 1111 1111"


# ---------------------------------------------------------------- helpers


def rules(**guard: Any) -> labs_guard.Filters:
    return labs_guard.load(labs.Guard(**guard))


def filtered(found: labs_guard.Filters) -> labs_guard.Filter:
    return labs_guard.Filter(found, labs.Inputs((1, 2), "hi"), labs.Generation())


def shown(found: labs_guard.Filters, pieces: Iterable[str]) -> tuple[str, str]:
    """Return what is shown of an answer in pieces, and how it ends."""
    take, text, end = filtered(found), "", ""
    events: list[labs.Event] = [*map(labs.Delta, pieces), TOLD]
    for event in events:
        for each in take(event):
            assert not end, "an event after the end"
            if isinstance(each, labs.Delta):
                assert each.text
                text += each.text
            else:
                assert isinstance(each, labs.Done)
                end = each.finish_reason
    return text, end


def cuts(text: str, parts: int) -> Iterator[list[str]]:
    """Yield each way to cut a text into so many parts, empty ones too."""
    for ends in itertools.combinations_with_replacement(range(len(text) + 1), parts - 1):
        bounds = [0, *ends, len(text)]
        yield [text[a:b] for a, b in itertools.pairwise(bounds)]


def refused_by(found: labs_guard.Filters, text: str) -> str:
    with pytest.raises(labs_guard.Filtered) as caught:
        found.check_text(text)
    assert kit.is_one_sentence(caught.value)
    return caught.value.rule


# ---------------------------------------------------------------- rules


SEARCH_LONG_TEXTS = """
import labs_guard
for filling in ("a", "0", "0 ", "a@", "a.", "a@a.", "+1", "(0", "1-", "4111 ", ". ", " "):
    for text in (filling * 10_000, "a@" + filling * 10_000 + "!"):
        list(labs_guard.SENTENCE_END.finditer(text))
        for rule in labs_guard.PII.values():
            rule(text), rule.final_up_to(text)
"""


def test_our_own_patterns_take_no_longer_than_in_proportion_to_a_text() -> None:
    command = [sys.executable, "-c", SEARCH_LONG_TEXTS]
    root = Path(labs_guard.__file__).parent
    subprocess.run(command, cwd=root, check=True, timeout=60)  # quadratic: many minutes


EMAILS = [
    "a@b.co",
    "first.last+tag@mail.example.co.uk",
    "o_k%x-1@ex-ample.museum",
    "jörg@münchen.de",
]
EMAILS += ["user@xn--mnchen-3ya.de", "x" * 64 + "@" + "y" * 63 + ".org"]
NO_EMAILS = [
    "a@b",
    "@home",
    "a@ b.co",
    "a @b.co",
    "3@5.6",
    "see foo@bar",
    "user@localhost",
    "a@.de",
]
PHONES = [
    "+49 30 1234567",
    "+4930123456",
    "+49 (0)30 123-4567",
    "+1 (555) 123-4567",
    "+1.555.123.4567",
]
PHONES += ["0171 2345678", "030/1234567", "01712345678", "020 7946 0958", "01 23 45 67 89"]
PHONES += ["0049 30 1234567", "555-123-4567", "(555) 123-4567", "1-800-555-1234", "555.123.4567"]
NO_PHONES = [
    "2024-01-31",
    "01/02/2024 10:30",
    "09-12-2024",
    "10:30:00",
    "192.168.1.100",
    "v1.2.3.4",
]
NO_PHONES += [
    "3.14159265358979",
    "0.123456789012",
    "1,234,567.89",
    "978-3-16-148410-0",
    "1700000000000",
]
NO_PHONES += [
    "0 1 2 3 4 5 6 7 8 9",
    "1990-2000",
    "12345678901",
    "00000000-0000-0000-0000-000000000000",
]
NO_PHONES += [
    "1+12345678",
    "id01712345678",
    "+123456",
    "2024-01-02 03-04-05",
    "10.0.0.1",
    "5551234567",
]
CARDS = [CARD, "4111111111111111", "5500-0000-0000-0004", "3782 822463 10005", "30569309025904"]
CARDS += ["6011000000000004", "2223000048400011", "6304000000000000000", "4222222222222"]
NO_CARDS = [
    "4111111111111112",
    "411111111111111",
    "1234567890123456",
    "0.4111111111111111",
    "9" * 16,
]
NO_CARDS += ["41111111111111111111", "978-3-16-148410-0", "4111 1111 1111 1112", "4111"]


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        *(("email", text) for text in EMAILS),
        *(("phone", text) for text in PHONES),
        *(("card", text) for text in CARDS),
    ],
)
@pytest.mark.parametrize("around", ["{}", "it is {}.", "({})", "{}, {}", "a\n{}\nb", "<{}>"])
def test_what_a_person_is_known_by_is_masked_whole(kind: Any, text: str, around: str) -> None:
    expected = around.replace("{}", f"[{kind}]")
    if kind == "phone" and around == "({})":  # the bracket may be the number's
        expected = expected.replace("(", "").replace(")", "")
        assert expected in rules(mask=(kind,)).check_text(around.format(text))
        return
    assert rules(mask=(kind,)).check_text(around.replace("{}", text)) == expected


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        *(("email", text) for text in NO_EMAILS),
        *(("phone", text) for text in NO_PHONES),
        *(("card", text) for text in NO_CARDS),
    ],
)
def test_what_only_looks_like_it_stays(kind: Any, text: str) -> None:
    for around in ("{}", "it is {}.", "({})", "a\n{}\nb"):
        assert rules(mask=(kind,)).check_text(around.format(text)) == around.format(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"{CARD} 123", "[card] 123"),
        (f"{CARD} 12/29", "[card] 12/29"),
        (f"7 {CARD}", "7 [card]"),
        (f"2345 {CARD}", "2345 [card]"),
        (f"17,{CARD},12/29", "17,[card],12/29"),
        ("4111111111111112 4111111111111111", "4111111111111112 [card]"),
        (f"{CARD}\n{CARD}", "[card]\n[card]"),
    ],
)
def test_digits_beside_a_card_number_do_not_hide_it(text: str, expected: str) -> None:
    assert rules(mask=("card",)).check_text(text) == expected


def has_check_digit(digits: str) -> bool:
    """Count, as ISO/IEC 7812 does, every second digit from the right twice."""
    total = 0
    for place, digit in enumerate(reversed(digits)):
        total += sum(map(int, str(int(digit) * (1 + place % 2))))
    return total % 10 == 0


@hypothesis_settings(max_examples=300, deadline=None, derandomize=True)
@given(digits=st.from_regex(r"\A[2-6][0-9]{12,18}\Z"), group=st.integers(1, 19))
def test_a_card_number_is_one_if_its_check_digit_says_so(digits: str, group: int) -> None:
    groups = [digits[at : at + group] for at in range(0, len(digits), group)]
    found = rules(mask=("card",)).check_text(" ".join(groups))
    if has_check_digit(digits):
        assert found == "[card]"
    elif len(groups) == 1:
        assert found == digits


def test_all_kinds_are_masked_in_one_text() -> None:
    text = f"Pay with {CARD}, call +49 30 1234567 or write to me@example.org."
    expected = "Pay with [card], call [phone] or write to [email]."
    assert rules(mask=("email", "phone", "card")).check_text(text) == expected


@pytest.mark.parametrize(
    ("guard", "text", "rule"),
    [
        ({"deny": ("ok", "bad word")}, "A BAD WORD.", "deny[1]"),
        ({"deny": ("bad",)}, "so embaddened", "deny[0]"),
        ({"deny": ("a.c",)}, "a.c", "deny[0]"),
        ({"deny": ("straße",)}, "STRAßE", "deny[0]"),
        ({"deny": ("敏感",)}, "这是敏感词", "deny[0]"),
        ({"deny_patterns": ("x", "(?i)\\bb(a)d\\b")}, "so BAD", "deny_patterns[1]"),
        ({"deny_patterns": ("(?=bad)",)}, "so bad", "deny_patterns[0]"),
        ({"deny_pii": ("email",)}, "me@example.org", "email"),
        ({"deny_pii": ("phone",)}, "call 0171 2345678", "phone"),
        ({"deny_pii": ("card",)}, CARD, "card"),
        ({"deny_pii": ("card",), "mask": ("email",)}, f"a@b.co {CARD}", "card"),
        ({"deny": ("b", "a")}, "ab", "deny[1]"),
    ],
)
def test_what_is_denied_is_refused_by_name(guard: Any, text: str, rule: str) -> None:
    assert refused_by(rules(**guard), text) == rule


@pytest.mark.parametrize(
    ("guard", "text"),
    [
        ({"deny": ("a.c",)}, "abc"),
        ({"deny": ("(",)}, ")"),
        ({"deny_patterns": ("bad\\b",)}, "badge"),
        ({"deny_patterns": ("Bad",)}, "bad"),
        ({"deny_pii": ("email", "phone", "card")}, "4111 at 10:30, a@b"),
        ({}, f"{CARD} me@example.org"),
    ],
)
def test_what_is_not_denied_stays_as_it_is(guard: Any, text: str) -> None:
    assert rules(**guard).check_text(text) == text


def test_a_rule_is_a_pure_function_of_a_text() -> None:
    (rule,) = rules(mask=("email",)).patterns
    text = "to a@b.co, c@d.org"
    assert rule(text) == labs_guard.Verdict("email", 3, 9, "[email]")
    assert rule(text, 9) == labs_guard.Verdict("email", 11, 18, "[email]")
    assert rule("to nobody") is None


@pytest.mark.parametrize(
    "text", ["a" * 200_000, "0" * 200_000, "+" * 200_000, "4 " * 100_000, "a@" * 99_999]
)
def test_no_text_takes_long(text: str) -> None:
    every = ("email", "phone", "card")
    seconds = min(timed(lambda: rules(mask=every).check_text(text)) for _ in range(2))
    assert seconds < 3


def timed(do: Callable[[], Any]) -> float:
    began = time.process_time()
    do()
    return time.process_time() - began


# ---------------------------------------------------------------- what goes in


def test_prompts_and_all_messages_are_checked() -> None:
    found = rules(mask=("email",))
    assert found.check_prompt(Prompt(prompt="a@b.co", use_chat_template=False)) == Prompt(
        prompt="[email]", use_chat_template=False
    )
    messages = (
        labs.Message(role="system", content="a@b.co"),
        labs.Message(role="user", content="hi"),
    )
    checked = found.check_prompt(Prompt(messages=messages)).messages
    assert [(each.role, each.content) for each in checked] == [
        ("system", "[email]"),
        ("user", "hi"),
    ]
    assert found.check_prompt(Prompt(ids=(1, 2))) == Prompt(ids=(1, 2))
    with pytest.raises(labs_guard.Filtered, match=r"deny\[0\]"):
        rules(deny=("hi",)).check_prompt(Prompt(messages=messages))


def test_too_many_tokens_are_refused_by_the_rules_name() -> None:
    inputs = labs.Inputs((1, 2, 3), "abc")
    assert rules(max_prompt_tokens=3).check_inputs(inputs) is inputs
    with pytest.raises(labs_guard.Filtered, match="it has 3 tokens; the limit is 2"):
        rules(max_prompt_tokens=2).check_inputs(inputs)


def test_token_ids_are_read_and_not_masked() -> None:
    inputs = labs.Inputs((1, 2, 3), "to a@b.co")
    assert rules(deny=("x",)).check_inputs(inputs, ids=True) is inputs
    assert rules(mask=("email",)).check_inputs(inputs) is inputs  # its text was checked before
    for guard in ({"mask": ("email",)}, {"deny_pii": ("email",)}):
        with pytest.raises(labs_guard.Filtered):
            rules(**guard).check_inputs(inputs, ids=True)


def test_a_side_that_is_not_filtered_is_left_alone() -> None:
    found = rules(deny=("bad",), mask=("email",), side="output")
    assert found.check_text("bad a@b.co") == "bad a@b.co"
    assert shown(found, ["so bad"]) == ("so ", "content_filter")
    found = rules(deny=("bad",), mask=("email",), side="input")
    assert refused_by(found, "bad") == "deny[0]"
    logprobs = (labs.TokenLogprob(1, -0.5),)
    take = labs_guard.Filter(found, labs.Inputs((1,), ""), labs.Generation(logprobs=0))
    events: list[labs.Event] = [labs.Delta("so bad", logprobs), TOLD]
    assert [each for event in events for each in take(event)] == events
    whole = labs.fold(events[:1], TOLD)  # type: ignore[arg-type]
    assert found.shown(whole) == whole


# ---------------------------------------------------------------- what comes out, in any pieces


LONG_WORD = "x" * 20
ANSWERS: dict[str, tuple[dict[str, Any], str, str, str]] = {
    "a literal": ({"deny": ("bad",)}, "so it is bad, yes", "so it is ", "content_filter"),
    "a literal in another case": ({"deny": ("bad",)}, "a bBaD", "a b", "content_filter"),
    "a literal at once": ({"deny": ("bad",)}, "bad", "", "content_filter"),
    "one that begins twice": ({"deny": ("aab",)}, "aaaab", "aa", "content_filter"),
    "the beginning of one": ({"deny": ("bad",)}, "so ba", "so ba", "length"),
    "two of different length": ({"deny": ("zebra", "br")}, "ze bra", "ze ", "content_filter"),
    "one in another": ({"deny": ("good day", "o")}, "a good day", "a ", "content_filter"),
    "a pattern": ({"deny_patterns": (r"\d{3,5}!",)}, "a 12 1234! b", "a 12 ", "content_filter"),
    "a whole word": ({"deny_patterns": (r"\bbad\b",)}, "badge, bad!", "badge, ", "content_filter"),
    "no whole word": ({"deny_patterns": (r"\bbad\b",)}, "badge is bade", "badge is bade", "length"),
    "what nothing follows": (
        {"deny_patterns": ("bad(?!ge)",)},
        "badge bad",
        "badge ",
        "content_filter",
    ),
    "a line's end": (
        {"deny_patterns": ("(?m)bad$",)},
        "bad one\nbad\n",
        "bad one\n",
        "content_filter",
    ),
    "what is before": (
        {"deny_patterns": ("(?<=so )bad",)},
        "bad so bad",
        "bad so ",
        "content_filter",
    ),
    "an e-mail": ({"mask": ("email",)}, "to a.b@c-d.co.uk.", "to [email].", "length"),
    "no e-mail": ({"mask": ("email",)}, "a@b and c@d", "a@b and c@d", "length"),
    "two e-mails": ({"mask": ("email",)}, "a@b.co,c@d.org", "[email],[email]", "length"),
    "a phone": ({"mask": ("phone",)}, "at +49 30 12345-67 or", "at [phone] or", "length"),
    "no phone": ({"mask": ("phone",)}, "on 2024-01-31 10:30", "on 2024-01-31 10:30", "length"),
    "a card": ({"mask": ("card",)}, f"is {CARD} 12/29", "is [card] 12/29", "length"),
    "a card of single digits": (
        {"mask": ("card",)},
        "6 3 0 4" + " 0" * 15 + ".",
        "[card].",
        "length",
    ),
    "no card": ({"mask": ("card",)}, "4111 1111 1111 1112", "4111 1111 1111 1112", "length"),
    "a denied e-mail": ({"deny_pii": ("email",)}, "to a@b.co.", "to ", "content_filter"),
    "a denied card": ({"deny_pii": ("card",)}, f"is {CARD}", "is ", "content_filter"),
    "both": (
        {"mask": ("email",), "deny": ("bad",), "deny_patterns": ("evi+l",)},
        "a@b.co is bad",
        "[email] is ",
        "content_filter",
    ),
    "a denied text in a masked one": (
        {"mask": ("email",), "deny": ("bad",)},
        "x bad@b.co so bad",
        "x ",
        "content_filter",
    ),
    "a denied text that begins in a masked one": (
        {"mask": ("email",), "deny": ("co is",)},
        "a@b.co is",
        "[email] is",
        "length",
    ),
    "nothing": ({"deny": ("bad",), "mask": ("card",)}, "", "", "length"),
}


@pytest.mark.parametrize("name", ANSWERS)
@pytest.mark.parametrize("parts", [1, 2, 3])
def test_an_answer_is_filtered_alike_in_any_pieces(name: str, parts: int) -> None:
    guard, text, expected, reason = ANSWERS[name]
    found = rules(hold_back_chars=5, **guard)
    for pieces in cuts(text, parts):
        assert shown(found, pieces) == (expected, reason), pieces
    assert shown(found, text) == (expected, reason)  # letter by letter


FRAGMENTS = [
    "bad",
    "ba",
    "BAD",
    "evil",
    "evi",
    " ",
    ".",
    "\n",
    "a@b.co",
    "me@",
    "@x.org",
    "é",
    "🌍",
]
FRAGMENTS += [
    CARD,
    "4111",
    "1111",
    "-",
    "+49 30 1234567",
    "0171 ",
    "2345678",
    "555-123-4567",
    "(0",
    ")",
]
TEXTS = st.lists(st.sampled_from(FRAGMENTS), max_size=12).map("".join)
EVERY = rules(
    deny=("bad idea", "worse"),
    deny_patterns=("evil+ ?bad",),
    mask=("email", "phone", "card"),
    hold_back_chars=16,
)


@hypothesis_settings(max_examples=400, deadline=None, derandomize=True)
@given(text=TEXTS, ends=st.lists(st.integers(0, 120), max_size=12))
def test_any_text_is_filtered_alike_in_any_pieces(text: str, ends: list[int]) -> None:
    bounds = [0, *sorted(min(end, len(text)) for end in ends), len(text)]
    pieces = [text[a:b] for a, b in itertools.pairwise(bounds)]
    assert shown(EVERY, pieces) == shown(EVERY, [text]) == shown(EVERY, text)


@hypothesis_settings(max_examples=200, deadline=None, derandomize=True)
@given(text=TEXTS)
def test_an_answer_is_masked_as_a_prompt_is(text: str) -> None:
    found = rules(mask=("email", "phone", "card"))
    assert shown(found, text) == (found.check_text(text), "length")


@hypothesis_settings(max_examples=300, deadline=None, derandomize=True)
@given(
    text=st.text(alphabet="abc", max_size=40), deny=st.sets(st.text("abc", min_size=1), min_size=1)
)
def test_nothing_of_the_first_denied_text_is_shown(text: str, deny: set[str]) -> None:
    places = [text.find(each) for each in deny if each in text]
    expected = (text[: min(places)], "content_filter") if places else (text, "length")
    assert shown(rules(deny=tuple(sorted(deny))), text) == expected


def test_what_no_rule_can_find_is_shown_at_once() -> None:
    take = filtered(rules(mask=("email", "phone", "card")))
    assert take(labs.Delta("Hello there")) == [labs.Delta("Hello ")]  # a word may become an e-mail
    assert take(labs.Delta(", it is")) == [labs.Delta("there, it ")]
    assert take(labs.Delta(" 7 ")) == [labs.Delta("is ")]  # and a digit a phone number
    assert take(labs.Delta("o'clock ")) == [labs.Delta("7 o'clock ")]
    take = filtered(rules(deny=("12345", "1")))
    assert take(labs.Delta("abcdefg")) == [labs.Delta("abc")]  # as long as the longest, but for one
    take = filtered(rules(deny_patterns=("z+",), hold_back_chars=3))
    assert take(labs.Delta("abcdefg")) == [labs.Delta("abcd")]


def test_a_match_that_is_longer_than_the_bound_may_begin_in_what_is_shown() -> None:
    found = rules(deny_patterns=("<.*>",), hold_back_chars=8)
    assert shown(found, "a <1234>") == ("a ", "content_filter")
    text, reason = shown(found, "a <123456789>")
    assert (text, reason) == ("a <123456789>", "length")


def test_a_cut_answer_says_what_is_known() -> None:
    take = filtered(rules(deny=("bad",)))
    assert take(labs.Delta("it is ")) == [labs.Delta("it i")]
    delta, done = take(labs.Delta("bad and"))
    assert delta == labs.Delta("s ")
    assert isinstance(done, labs.Done)
    assert (done.finish_reason, done.usage) == ("content_filter", labs.Usage(2, 2))
    assert done.timings.prefill_s > 0
    assert done.timings.decode_s > 0
    assert take.over
    assert (
        take(labs.Delta("more")) == take(TOLD) == take(labs.Failed(labs.GenerationError("x"))) == []
    )


FINGERPRINT = labs.Fingerprint(
    model="m",
    revision="r",
    dtype="fp32",
    device="cpu",
    hardware="x",
    quantization={},
    batch_invariant=True,
    versions={},
)


@pytest.mark.parametrize(
    ("text", "reason", "stop", "kept"),
    [
        ("fine", "length", "stop", True),
        ("a@b.co", "length", "stop", False),
        ("bad", "content_filter", None, False),
    ],
)
def test_only_an_unchanged_answer_keeps_its_fingerprint(
    text: str, reason: str, stop: str | None, kept: bool
) -> None:
    told = msgspec.structs.replace(TOLD, fingerprint=FINGERPRINT)
    take = filtered(rules(deny_patterns=("^bad$",), mask=("email",)))
    assert take(labs.Delta(text)) == []
    done = take(told)[-1]
    assert isinstance(done, labs.Done)
    assert (done.finish_reason, done.usage, done.matched_stop) == (reason, TOLD.usage, stop)
    assert (done.fingerprint == FINGERPRINT) is kept


def test_a_whole_answer_is_filtered_with_its_usage() -> None:
    whole = labs.fold([labs.Delta("it is bad")], TOLD)
    found = rules(deny=("bad",)).shown(whole)
    assert (found.text, found.finish_reason, found.usage) == (
        "it is ",
        "content_filter",
        TOLD.usage,
    )
    assert rules(deny=("x",)).shown(whole) == whole


def test_log_probabilities_are_refused_as_they_would_tell_the_rest() -> None:
    for guard in ({"deny": ("bad",)}, {"mask": ("card",)}):
        with pytest.raises(labs.InputError, match=r"^logprobs: "):
            labs_guard.Filter(rules(**guard), labs.Inputs((), ""), labs.Generation(logprobs=0))
    assert not rules(max_prompt_tokens=5).filters(labs.Generation(logprobs=0))
    take = filtered(rules(deny=("bad",)))
    deltas = take(labs.Delta("good text", (labs.TokenLogprob(1, -0.5),)))
    assert deltas == [labs.Delta("good te")]


def test_an_answer_that_is_cut_is_closed() -> None:
    closed, said = [], []

    def events() -> Iterator[labs.Event]:
        try:
            for text in ("so ", "bad ", "more"):
                said.append(text)
                yield labs.Delta(text)
            yield TOLD
        finally:
            closed.append(True)

    *deltas, done = filtered(rules(deny=("bad",))).all(events())
    assert [each.text for each in deltas if isinstance(each, labs.Delta)] == ["s", "o "]
    assert isinstance(done, labs.Done)
    assert (said, closed) == (["so ", "bad "], [True])
    taking = filtered(rules(deny=("bad",))).all(events())
    next(taking)
    taking.close()  # type: ignore[attr-defined]
    assert closed == [True, True]


def test_a_row_that_fails_is_told() -> None:
    failed = labs.Failed(labs.GenerationError("broken"))
    assert filtered(rules(deny=("bad",)))(failed) == [failed]


def test_each_rule_that_acts_is_told_with_its_side() -> None:
    acted: list[tuple[str, str]] = []
    found = rules(mask=("email",), deny=("bad",), max_prompt_tokens=1)
    found = msgspec.structs.replace(found, tell=lambda *each: acted.append(each))
    found.check_text("a@b.co c@d.co")
    assert acted == [("email", "input")] * 2
    refused_by(found, "bad a@b.co")
    with pytest.raises(labs_guard.Filtered):
        found.check_inputs(labs.Inputs((1, 2), ""))
    assert acted[2:] == [("deny[0]", "input"), ("max_prompt_tokens", "input")]
    assert shown(found, "a@b.co bad bad") == ("[email] ", "content_filter")
    assert acted[4:] == [("email", "output"), ("deny[0]", "output")]


# ---------------------------------------------------------------- a classifier


WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "bad", "awful"]


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Make a model whose label is `toxic` where a text has one of two words, else `fine`.

    It attends to all tokens alike, so that the last two of its four numbers tell their share.
    """
    place = tmp_path_factory.mktemp("classifier") / "model"
    config = transformers.BertConfig(
        vocab_size=len(WORDS),
        hidden_size=4,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=4,
        max_position_embeddings=64,
        id2label={0: "fine", 1: "toxic"},
        label2id={"fine": 0, "toxic": 1},
    )
    model: Any = transformers.BertForSequenceClassification(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            eye = torch.eye(4) if weight.shape == (4, 4) else torch.zeros_like(weight)
            weight.copy_(torch.ones_like(weight) if name.endswith("LayerNorm.weight") else eye)
        layer = model.bert.encoder.layer[0]
        for part in (
            layer.attention.self.query,
            layer.attention.self.key,
            layer.intermediate.dense,
        ):
            part.weight.zero_()
        model.bert.embeddings.word_embeddings.weight.copy_(
            torch.tensor([[1.0, -1.0, 0.0, 0.0]] * 5 + [[0.0, 0.0, 1.0, -1.0]] * 2)
        )
        model.classifier.weight[1, 2], model.classifier.bias[1] = 1000.0, -5.0
    model.save_pretrained(place)
    inner = Tokenizer(
        tokenizer_models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]")
    )
    inner.normalizer = normalizers.Lowercase()
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
    make: Any = transformers.PreTrainedTokenizerFast
    make(
        tokenizer_object=inner, **{f"{name}_token": token for name, token in names.items()}
    ).save_pretrained(place)
    return str(place)


@functools.cache
def judged(classifier: str, **guard: Any) -> labs_guard.Filters:
    return rules(classifier=classifier, classifier_labels=("toxic",), **guard)


@pytest.mark.parametrize(
    "text", ["bad", "That is AWFUL!", "good " * 200 + "bad", "bad" + " good" * 200]
)
def test_a_classifier_refuses_a_prompt_however_long(classifier: str, text: str) -> None:
    assert refused_by(judged(classifier), text) == "classifier[toxic]"
    verdict = judged(classifier).classify(text)
    assert verdict == labs_guard.Verdict("classifier[toxic]", 0, len(text))


@pytest.mark.parametrize("text", ["good", "", "badly put", "good " * 300])
def test_a_classifier_lets_other_prompts_in(classifier: str, text: str) -> None:
    assert judged(classifier).check_text(text) == text


def test_a_classifiers_threshold_and_labels_count(classifier: str) -> None:
    fine = rules(classifier=classifier, classifier_labels=("fine",), classifier_threshold=0.999)
    assert fine.check_text("good") == "good"  # it is sure to 0.993
    fine = rules(classifier=classifier, classifier_labels=("fine",), classifier_threshold=0.99)
    assert refused_by(fine, "good") == "classifier[fine]"


JUDGED = {
    "a sentence": ("It is good. It is bad. So it is.", "It is good. ", "content_filter"),
    "the first": ("It is bad. It is good.", "", "content_filter"),
    "the last, not ended": ("It is good! It is bad", "It is good! ", "content_filter"),
    "lines": ("good\n\nbad\n", "good\n\n", "content_filter"),
    "none": ("It is good. So\nit is", "It is good. So\nit is", "length"),
    "another script": ("好。bad。", "好。", "content_filter"),
    "one that a pattern cuts": ("So evil. Not bad.", "So ", "content_filter"),
    "a pattern in what is rejected": ("So good. So bad, evil.", "So good. ", "content_filter"),
    "a text that goes on after it": ("So good. Not bad. X.", "So good. ", "content_filter"),
    "a mask": ("To a@b.co. Not bad.", "To [email]. ", "content_filter"),
}


@pytest.mark.parametrize("name", JUDGED)
def test_an_answer_is_judged_by_the_sentence_in_any_pieces(classifier: str, name: str) -> None:
    text, expected, reason = JUDGED[name]
    guard = {"deny": ("od. not bad. x",), "deny_patterns": ("evil",), "mask": ("email",)}
    found = judged(classifier, hold_back_chars=6, **guard)
    for pieces in [*cuts(text, 2), [text], list(text)]:
        assert shown(found, pieces) == (expected, reason), pieces


@hypothesis_settings(max_examples=60, deadline=None, derandomize=True)
@given(
    parts=st.lists(
        st.sampled_from(["good", "bad", "evi", "l", ". ", "! ", "\n", " "]), max_size=12
    ),
    ends=st.lists(st.integers(0, 40), max_size=6),
)
def test_any_answer_is_judged_alike_in_any_pieces(
    classifier: str, parts: list[str], ends: list[int]
) -> None:
    found = judged(classifier, deny=("evil", "od bad", "od. bad. g"))
    text = "".join(parts)
    bounds = [0, *sorted(min(end, len(text)) for end in ends), len(text)]
    pieces = [text[a:b] for a, b in itertools.pairwise(bounds)]
    assert shown(found, pieces) == shown(found, [text]) == shown(found, text)


def test_a_sentence_is_shown_once_it_is_judged(classifier: str) -> None:
    take = filtered(judged(classifier))
    assert take(labs.Delta("It is good. It is")) == [labs.Delta("It is good. ")]
    assert take(labs.Delta(" fine.")) == []
    assert take(labs.Delta(" ")) == [labs.Delta("It is fine. ")]
    assert take(labs.Delta("bad.")) == []
    *nothing, done = take(TOLD)
    assert nothing == []
    assert isinstance(done, labs.Done)
    assert (done.finish_reason, done.usage) == ("content_filter", TOLD.usage)


def test_a_long_sentence_is_judged_whole(classifier: str) -> None:
    for text in ("bad" + " good" * 100 + ".", "good " * 100 + "bad."):
        assert shown(judged(classifier), ["Fine. ", text]) == ("Fine. ", "content_filter")


def test_a_classifier_is_held_by_its_filters_and_used_by_many(classifier: str) -> None:
    found = rules(classifier=classifier, classifier_labels=("toxic",))
    weights = transformers.BertForSequenceClassification.from_pretrained(classifier).parameters()
    assert found.nbytes == sum(4 * each.numel() for each in weights)
    assert rules(deny=("bad",)).nbytes == 0
    with ThreadPoolExecutor(4) as pool:
        told = list(pool.map(found.classify, ["so bad", "so good"] * 50))
    assert [each is not None for each in told] == [True, False] * 50


def test_what_the_model_is_trusted_with_a_classifier_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = list[dict[str, Any]]()

    def refuse(kind: str, name: str, options: dict[str, Any]) -> None:
        asked.append(options)
        raise labs.ModelError("none")

    monkeypatch.setattr(labs, "pretrained", refuse)
    spec = labs.ModelSpec(trust_remote_code=True, use_safetensors=False)
    with pytest.raises(labs.ModelError):
        labs_guard.load(labs.Guard(classifier="org/other", classifier_labels=("bad",)), spec)
    assert (asked[0]["trust_remote_code"], asked[0]["use_safetensors"]) == (False, True)


def test_a_classifier_that_cannot_be_used_is_an_error_in_one_sentence(classifier: str) -> None:
    options = {"classifier_labels": ("toxic",)}
    spec = labs.ModelSpec(local_files_only=True)
    for name in ("no/such-model", str(Path.cwd()), "../.."):
        with pytest.raises(labs.ModelError, match="guard_classifier = ") as caught:
            labs_guard.load(labs.Guard(classifier=name, **options), spec)  # type: ignore[arg-type]
        assert kit.is_one_sentence(caught.value)
    wrong = labs.Guard(classifier=classifier, classifier_labels=("rude", "toxic"))
    with pytest.raises(labs.ConfigError, match="= rude: the model has fine, toxic"):
        labs_guard.load(wrong)


# ---------------------------------------------------------------- over HTTP


def site_of(engine: Any, generation: Any = None, **guard: Any) -> Site:
    config = kit.configured(generation=generation)
    return Site(engine, msgspec.structs.replace(config, guard=labs.Guard(**guard)))


@pytest.fixture
def fake(tiny: labs.Model) -> FakeEngine:
    return FakeEngine(tiny)


def answers_of(response: Any, path: str) -> list[tuple[str, str]]:
    """Return (text, finish_reason) of each choice, streamed or not."""
    assert response.status_code == 200, response.text
    if path == "/generate/stream":
        *texts, (_, done) = kit.events_of(response.content)
        return [("".join(text for _, text in texts), json.loads(done)["finish_reason"])]
    if path == "/generate":
        return [(response.json["text"], response.json["finish_reason"])]
    streamed = response.headers["content-type"].startswith("text/event-stream")
    chunks = kit.chunks_of(response) if streamed else [response.json]
    found: dict[int, tuple[str, str]] = {}
    for choice in (choice for chunk in chunks for choice in chunk["choices"]):
        text, reason = found.get(choice["index"], ("", ""))
        said = choice.get("message") or choice.get("delta") or choice
        text += said.get("content") or said.get("text") or ""
        found[choice["index"]] = text, choice["finish_reason"] or reason
    return [found[index] for index in sorted(found)]


OFTEN: list[tuple[str, dict[str, Any]]] = [(CHAT, {"n": 3}), (COMPLETIONS, {"prompt": ["a", "b"]})]
WAYS: list[tuple[str, dict[str, Any]]] = [("/generate", {}), ("/generate/stream", {})]
WAYS += [(path, {**more, "stream": stream}) for path, more in OFTEN for stream in (False, True)]


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_that_is_refused_is_400_with_the_rules_name(
    fake: FakeEngine, path: str, stream: bool
) -> None:
    site = site_of(fake, deny=("other", "HI"))
    body = {**BODIES[path], **({"stream": True} if stream and path.startswith("/v1") else {})}
    error = error_of(site.post(path, body), 400)
    assert (error["code"], error["type"]) == ("content_filtered", "invalid_request_error")
    assert "deny[1]" in error["message"]
    assert error["param"] is None
    assert not fake.asked
    assert not any(word in error["message"].lower() for word in ("hi ", "other"))


@pytest.mark.parametrize("path", BODIES)
def test_too_long_a_prompt_is_400_with_the_rules_name(fake: FakeEngine, path: str) -> None:
    error = error_of(site_of(fake, max_prompt_tokens=2).post(path, BODIES[path]), 400)
    assert (error["code"], "max_prompt_tokens" in error["message"]) == ("content_filtered", True)
    assert site_of(fake, max_prompt_tokens=20).post(path, BODIES[path]).status_code == 200


@pytest.mark.parametrize("path", ANSWERED)
def test_what_is_masked_does_not_reach_the_model(fake: FakeEngine, path: str) -> None:
    body = json.loads(json.dumps(BODIES[path]).replace("hi", "to a@b.co"))
    answers_of(site_of(fake, mask=("email",)).post(path, body), path)
    assert "to [email]" in fake.asked[0][0].prompt
    assert "a@b.co" not in fake.asked[0][0].prompt


def test_a_prompt_of_token_ids_is_filtered_too(fake: FakeEngine) -> None:
    site = site_of(fake, deny=("hi",), mask=("email",))
    assert site.post(COMPLETIONS, {"prompt": [104]}).status_code == 200
    for text, rule in (("hi", "deny[0]"), ("a@b.co", "mask")):
        error = error_of(site.post(COMPLETIONS, {"prompt": list(text.encode())}), 400)
        assert rule in error["message"]


def test_a_prompt_of_too_many_bytes_is_not_looked_at(fake: FakeEngine) -> None:
    config = kit.configured(max_prompt_bytes=3)
    site = Site(fake, msgspec.structs.replace(config, guard=labs.Guard(deny=("hi",))))
    error = error_of(site.post("/generate", {"prompt": "hi hi"}), 400)
    assert error["code"] == "prompt_too_large"


@pytest.mark.parametrize(("path", "more"), WAYS)
def test_every_choice_is_cut_where_it_is_refused(fake: FakeEngine, path: str, more: Any) -> None:
    fake.pieces = ["so ", "it ", "is b", "ad an", "d more"]
    choices = {"/generate": 1, "/generate/stream": 1, CHAT: 3, COMPLETIONS: 2}[path]
    response = site_of(fake, deny=("bad",)).post(path, {**BODIES[path], **more})
    assert answers_of(response, path) == [("so it is ", "content_filter")] * choices
    assert {*fake.left} == {*range(1, choices + 1)}, "a row that is cut is let go"
    assert not {"bad", "more"} & {*re.findall(r"\w+", response.text)}


@pytest.mark.parametrize(("path", "more"), WAYS)
def test_every_choice_is_masked(fake: FakeEngine, path: str, more: Any) -> None:
    fake.pieces = ["to a", "@", "b.", "co", ", now"]
    response = site_of(fake, mask=("email",)).post(path, {**BODIES[path], **more})
    assert {*answers_of(response, path)} == {("to [email], now", "stop")}
    assert not fake.left or max(fake.left) == len(fake.asked)


@pytest.mark.parametrize(("path", "more"), WAYS)
def test_what_nothing_refuses_passes_whole(fake: FakeEngine, path: str, more: Any) -> None:
    fake.pieces = ["he", "llo\r\n th", "ere @ 4", "1"]
    site = site_of(fake, mask=("email", "card"), deny=("bad",), deny_patterns=("x+",))
    found = answers_of(site.post(path, {**BODIES[path], **more}), path)
    text = "hello\n there @ 41" if path == "/generate/stream" else "hello\r\n there @ 41"
    assert {*found} == {(text, "stop")}


def test_the_end_of_a_refused_answer_is_told_as_a_cut_is(fake: FakeEngine) -> None:
    site = site_of(fake, deny_patterns=("bad$",))
    fake.pieces = ["so ", "bad"]
    answer = site.post("/generate", {"prompt": "hi"}).json
    assert (answer["text"], answer["finish_reason"]) == ("so ", "content_filter")
    assert answer["usage"]["completion_tokens"] == 2
    usage = {"stream": True, "stream_options": {"include_usage": True}}
    *_, last = kit.chunks_of(site.post(CHAT, {**BODIES[CHAT], **usage}))
    assert last["usage"]["completion_tokens"] == 2


def test_an_answer_that_fails_after_it_was_cut_does_not_matter(fake: FakeEngine) -> None:
    fake.pieces, fake.error = ["bad"], labs.GenerationError("broken")
    answer = site_of(fake, deny=("bad",)).post("/generate", {"prompt": "hi"})
    assert answer.json["finish_reason"] == "content_filter"
    fake.pieces = ["good"]
    error_of(site_of(fake, deny=("bad",)).post("/generate", {"prompt": "hi"}), 500)


@pytest.mark.parametrize(("path", "field"), [("/generate", 2), (CHAT, True), (COMPLETIONS, 1)])
def test_a_client_that_asks_for_log_probabilities_is_refused(
    fake: FakeEngine, path: str, field: Any
) -> None:
    body = {**BODIES[path], "logprobs": field}
    error = error_of(site_of(fake, deny=("bad",)).post(path, body), 400)
    assert error["param"] == "logprobs"
    assert not fake.asked
    assert site_of(fake, deny=("bad",), side="input").post(path, body).status_code == 200


def test_a_client_can_learn_that_log_probabilities_would_be_refused(fake: FakeEngine) -> None:
    site = site_of(fake, deny=("bad",))
    assert site.post("/explain", {"prompt": "hello"}).status_code == 200
    assert (
        error_of(site.post("/explain", {"prompt": "a", "logprobs": 1}), 400)["param"] == "logprobs"
    )


def test_openais_client_sees_what_it_knows(fake: FakeEngine) -> None:
    site = site_of(fake, deny=("bad",))
    fake.pieces = ["so ", "bad"]
    with site.sdk() as sdk:
        answer = sdk.completions.create(model="tiny", prompt="a")
        assert (answer.choices[0].text, answer.choices[0].finish_reason) == (
            "so ",
            "content_filter",
        )
        with pytest.raises(openai.BadRequestError) as caught:
            sdk.completions.create(model="tiny", prompt="bad")
    assert caught.value.code == "content_filtered"


def test_metrics_count_what_each_rule_does(fake: FakeEngine) -> None:
    site = site_of(fake, deny=("bad", "worse"), mask=("email",), max_prompt_tokens=30)
    fake.pieces = ["a@b.co ", "worse"]
    site.post("/generate", {"prompt": "a@b.co c@d.co"})
    site.post(CHAT, {"messages": kit.HELLO, "n": 2})
    site.post("/generate", {"prompt": "bad"})
    site.post("/generate", {"prompt": "a" * 50})
    lines = (line.rpartition(" ") for line in site.get("/metrics").text.splitlines())
    found = {name: float(value) for name, _, value in lines if name.startswith("labs_guard_total{")}
    assert {tuple(re.findall(r'"(.+?)"', name)): value for name, value in found.items()} == {
        ("email", "input"): 2,
        ("email", "output"): 3,
        ("deny[1]", "output"): 3,
        ("deny[0]", "input"): 1,
        ("max_prompt_tokens", "input"): 1,
    }
    text = site.get("/metrics").text
    assert 'finished_reason="content_filter",model_name="tiny"} 3.0' in text


def test_a_prompt_is_refused_before_its_model_is_there() -> None:
    def loading(name: str) -> Any:
        raise labs_engine.Busy(f"{name} is being loaded")

    guard = labs.Guard(deny=("bad",))
    config = msgspec.structs.replace(kit.configured(), guard=guard)
    app = labs_api.create_app(config, kit.Later(loading))
    headers = {"Host": "localhost", **kit.JSON}
    client = falcon.testing.TestClient(app, headers=headers)
    for text, status in (("bad", 400), ("good", 503)):
        body = json.dumps({"prompt": text}).encode()
        assert client.simulate_post("/generate/stream", body=body).status_code == status


def test_a_classifier_judges_requests_and_answers(fake: FakeEngine, classifier: str) -> None:
    site = site_of(fake, classifier=classifier, classifier_labels=("toxic",))
    error = error_of(site.post(CHAT, {"messages": [{"role": "user", "content": "so bad"}]}), 400)
    assert "classifier[toxic]" in error["message"]
    fake.pieces = ["It is ", "good. It", " is bad. It", " is"]
    response = site.post(CHAT, {**BODIES[CHAT], "stream": True})
    assert answers_of(response, CHAT) == [("It is good. ", "content_filter")]
    with pytest.raises(labs.ModelError, match="guard_classifier"):
        site_of(fake, classifier="./nowhere", classifier_labels=("toxic",))


def test_a_held_back_stream_sends_comments(
    fake: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(labs_api, "PING_S", 0.0)
    fake.pieces = ["a", "b", "c"]
    site = site_of(fake, deny=("bad",), deny_patterns=("z",))
    response = site.post("/generate/stream", {"prompt": "hello"})
    assert response.content.count(b": ping") >= 3
    assert answers_of(response, "/generate/stream") == [("abc", "stop")]


# ---------------------------------------------------------------- with a true engine


@pytest.fixture(scope="module")
def engine(tiny: labs.Model) -> Iterator[labs_engine.Cached]:
    cache = labs.ResponseCache(max_entries=9)
    engine = labs_engine.Cached(labs_engine.Engine(tiny, labs.Server(max_batch_rows=4)), cache)
    yield engine
    engine.close()


@pytest.mark.parametrize(("path", "more"), WAYS)
def test_the_row_of_a_cut_answer_is_let_go(
    engine: labs_engine.Cached, path: str, more: Any
) -> None:
    name = "max_new_tokens" if path.startswith("/generate") else "max_tokens"
    body = {**BODIES[path], **more, name: 4000, **A}
    before = engine.status().steps
    site = site_of(engine, deny_patterns=("(?<=aaa)a",), hold_back_chars=1)
    assert {*answers_of(site.post(path, body), path)} == {("aaa", "content_filter")}
    until(lambda: engine.status().running == 0)
    assert engine.status().steps - before < 1000


def test_an_answer_from_the_cache_is_filtered_too(engine: labs_engine.Cached) -> None:
    body = {"prompt": "cached", "max_new_tokens": 5, **A}
    plain = site_of(engine).post("/generate", body).json
    assert (plain["text"], plain["usage"]["response_cached"]) == ("aaaaa", False)
    found = site_of(engine, deny_patterns=("a$",)).post("/generate", body).json
    assert (found["text"], found["finish_reason"]) == ("aaaa", "content_filter")
    assert found["usage"]["response_cached"] is True
    again = site_of(engine).post("/generate", body).json
    assert (again["text"], again["usage"]["response_cached"]) == ("aaaaa", True)


def test_in_python_a_cut_answer_stops_computing(tiny: labs.Model) -> None:
    found = rules(deny_patterns=("(?<=aaa)a",), hold_back_chars=1, mask=("card",))
    prompt = found.check_text(f"with {CARD}")
    inputs = found.check_inputs(labs.build_inputs(tiny, prompt=prompt))
    assert "with [card]" in inputs.prompt
    options = labs.Generation(max_new_tokens=4000, temperature=0, logit_bias={97: 100.0})
    with kit.counted(tiny) as calls:
        events = labs.stream_generate(tiny, inputs, options)
        *deltas, done = labs_guard.Filter(found, inputs, options).all(events)
    assert "".join(each.text for each in deltas if isinstance(each, labs.Delta)) == "aaa"
    assert isinstance(done, labs.Done)
    assert done.finish_reason == "content_filter"
    assert done.usage.prompt_tokens == len(inputs.input_ids)
    assert len(calls) < 20


# ---------------------------------------------------------------- at the shell and in files


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch) -> kit.FakeLabs:
    """Let labs-gen answer with set pieces, and with the settings of ./labs.toml."""
    found = kit.FakeLabs()
    for name in ("load_config", "build_inputs", "stream_generate", "generate"):
        monkeypatch.setattr(labs, name, getattr(found, name))
    monkeypatch.setattr(labs, "load_model", lambda config: kit.MODEL)
    monkeypatch.setattr(gc, "freeze", lambda: None)
    return found


def configure(**guard: Any) -> None:
    lines = [f"{key} = {json.dumps(value)}\n" for key, value in guard.items()]
    Path("labs.toml").write_text("[guard]\n" + "".join(lines), encoding="utf-8")


@pytest.mark.parametrize("flag", ["--stream", "--no-stream"])
def test_labs_gen_filters_what_it_writes(shell: kit.FakeLabs, flag: str) -> None:
    configure(deny=["bad"], mask=["email"])
    shell.pieces = ["to a@", "b.co, ", "so b", "ad", " more"]
    result = kit.invoke("--prompt", "Hi", flag)
    assert (result.exit_code, result.stdout) == (0, "to [email], so \n")
    assert result.stderr == "[a rule of [guard] cut the answer]\n"
    assert shell.closed == 1
    shell.pieces = ["fine"]
    result = kit.invoke("--prompt", "Hi", flag)
    assert (result.stdout, result.stderr) == ("fine\n", "")


@pytest.mark.parametrize("how", [[], ["--json"], ["--explain"], ["--stream"]])
def test_labs_gen_refuses_a_prompt_by_the_rules_name(shell: kit.FakeLabs, how: Any) -> None:
    configure(deny=["bad"])
    result = kit.invoke("--prompt", "a bad one", *how)
    assert (result.exit_code, result.stdout) == (1, "")
    assert re.fullmatch(r"Error: the prompt is refused by \[guard\] deny\[0\]: .+\n", result.stderr)
    assert not shell.requests


def test_labs_gen_masks_prompts_and_messages(shell: kit.FakeLabs) -> None:
    configure(mask=["email"])
    kit.invoke("--prompt", "to a@b.co")
    assert shell.requests[0]["prompt"] == "to [email]"
    kit.invoke("--prompt", "hi", "--system", "to a@b.co")
    assert shell.requests[1]["messages"][0]["content"] == "to [email]"


def test_labs_gen_counts_a_prompts_tokens(shell: kit.FakeLabs) -> None:
    configure(max_prompt_tokens=2)
    result = kit.invoke("--prompt", "hi")
    assert (result.exit_code, "max_prompt_tokens" in result.stderr) == (1, True)


def test_labs_gen_writes_filtered_json(shell: kit.FakeLabs) -> None:
    configure(deny=["bad"])
    shell.pieces = ["so ", "bad"]
    found = json.loads(kit.invoke("--prompt", "hi", "--json").stdout)
    assert (found["text"], found["finish_reason"]) == ("so ", "content_filter")
    assert found["usage"]["completion_tokens"] == kit.USAGE.completion_tokens
    result = kit.invoke("--prompt", "hi", "--json", "--logprobs", "1")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "Error: logprobs: " in result.stderr


def test_a_chat_goes_on_after_what_is_filtered(shell: kit.FakeLabs) -> None:
    configure(deny=["bad"])
    shell.pieces = ["so bad"]
    result = kit.invoke("--chat", input="bad\nhello\n/exit\n")
    assert result.exit_code == 0
    assert result.stdout == "so \n"
    assert "Error: the prompt is refused by [guard] deny[0]" in result.stderr
    assert [each["messages"][0]["content"] for each in shell.requests] == ["hello"]


LINES: list[dict[str, Any]] = [
    {"id": "refused", "prompt": "a bad one"},
    {"id": "cut", "prompt": "cut", "max_new_tokens": 6, **A},
    {"id": "logprobs", "prompt": "x", "logprobs": 1},
    {"id": "whole", "prompt": "whole", "max_new_tokens": 2, **A},
    {
        "custom_id": "openai",
        "method": "POST",
        "url": CHAT,
        "body": {"messages": [{"role": "user", "content": "x"}], "max_tokens": 6, "n": 2, **A},
    },
    {
        "custom_id": "openai refused",
        "method": "POST",
        "url": COMPLETIONS,
        "body": {"prompt": [*b"bad"], "max_tokens": 2},
    },
]


def answered(model: labs.Model, rows: list[Any], **guard: Any) -> dict[str, Any]:
    config = labs.Config(model_id="tiny", guard=labs.Guard(**guard))
    lines = enumerate((json.dumps(row).encode() for row in rows), 1)
    context = labs_request.open_context(config)
    data = labs_jsonl.answer_lines(model, context, lines, labs_jsonl.Tally())
    found = [json.loads(line) for line in data]
    return {row.get("custom_id", row["id"]): row for row in found}


def test_files_of_prompts_are_filtered(tiny: labs.Model) -> None:
    found = answered(tiny, LINES, deny=("bad", "aaaa"))
    assert "deny[0]" in found["refused"]["error"]["message"]
    assert found["refused"]["error"]["type"] == "invalid_request"
    assert (found["cut"]["text"], found["cut"]["finish_reason"]) == ("", "content_filter")
    assert found["cut"]["usage"]["completion_tokens"] == 6
    assert "logprobs" in found["logprobs"]["error"]["message"]
    assert (found["whole"]["text"], found["whole"]["finish_reason"]) == ("aa", "length")
    choices = found["openai"]["response"]["body"]["choices"]
    assert [(each["message"]["content"], each["finish_reason"]) for each in choices] == [
        ("", "content_filter")
    ] * 2
    refused = found["openai refused"]["response"]
    assert (refused["status_code"], refused["body"]["error"]["code"]) == (400, "content_filtered")


def test_what_is_masked_in_a_line_does_not_reach_the_model(tiny: labs.Model) -> None:
    rows = [{"id": "a", "prompt": "to a@b.co", "max_new_tokens": 2, **A}]
    masked = [{"id": "a", "prompt": "to [email]", "max_new_tokens": 2, **A}]
    found, plain = answered(tiny, rows, mask=("email",)), answered(tiny, masked, mask=("email",))
    assert found["a"]["fingerprint"] == plain["a"]["fingerprint"]
    assert found["a"]["request"]["prompt"] == "to a@b.co"  # the line as it was


def test_only_unchanged_answers_can_be_replayed(tiny: labs.Model) -> None:
    found = answered(tiny, LINES, deny=("bad", "aaaa"))
    lines = [json.dumps(found[name]).encode() for name in ("cut", "whole", "openai")]
    config = labs.Config(model_id="tiny", guard=labs.Guard(deny=("aaaa",)))
    context = labs_request.open_context(config)
    verdicts = [*labs_jsonl.replay(tiny, context, enumerate(lines, 1))]
    assert [each.verdict for each in verdicts] == ["not comparable", "same", "not comparable"]


# ---------------------------------------------------------------- settings


WRONG = [
    ('deny = [""]', ["labs.toml", "guard_deny", "length >= 1"]),
    ('deny = "bad"', ["labs.toml", "guard_deny = 'bad'", "array"]),
    ('deny_patterns = ["a", "("]', ["labs.toml", "deny_patterns[1] = '('", "position 0"]),
    ('deny_patterns = ["a*"]', ["labs.toml", "deny_patterns[0] = 'a*'", "every text"]),
    ('mask = ["name"]', ["labs.toml", "guard_mask", "'name'"]),
    ('mask = ["card"]\ndeny_pii = ["card"]', ["labs.toml", "mask and deny_pii", "card"]),
    ('classifier = "a/b"', ["labs.toml", "classifier_labels"]),
    ('classifier_labels = ["toxic"]', ["labs.toml", "classifier"]),
    ("classifier_threshold = 2", ["labs.toml", "guard_classifier_threshold = 2", "1"]),
    ('max_prompt_tokens = 5\nside = "output"', ["labs.toml", "max_prompt_tokens", "side"]),
    ('side = "both"', ["labs.toml", "guard_side = 'both'"]),
    ("hold_back_chars = 0", ["labs.toml", "guard_hold_back_chars = 0"]),
    ('denny = ["bad"]', ["labs.toml", "'denny'", "[guard]", "deny?"]),
]


@pytest.mark.parametrize(("text", "words"), WRONG, ids=lambda value: str(value)[:40])
def test_a_wrong_setting_is_refused_by_name(text: str, words: list[str]) -> None:
    Path("labs.toml").write_text(f"[guard]\n{text}\n", encoding="utf-8")
    with pytest.raises(labs.ConfigError) as caught:
        labs.load_config(env={})
    assert kit.is_one_sentence(caught.value)
    assert [word for word in words if word not in str(caught.value)] == []


@pytest.mark.parametrize(
    "changes",
    [
        {"max_prompt_tokens": 5, "side": "input"},
        {"max_prompt_tokens": 5},
        {"side": "output"},
        {"mask": ("card",), "deny_pii": ("email", "phone")},
        {"classifier": "a/b", "classifier_labels": ("toxic",)},
        {"deny_patterns": ("a", "b+")},
    ],
    ids=str,
)
def test_what_goes_together_is_taken(changes: dict[str, Any]) -> None:
    assert labs.evolve(labs.Guard(), **changes) == labs.Guard(**changes)


def test_the_section_is_set_in_each_layer() -> None:
    configure(deny=["bad"], mask=["email"], hold_back_chars=9)
    env = {"LABS_GUARD_MASK": '["card", "phone"]', "LABS_GUARD_SIDE": "input"}
    found = labs.load_config(env=env, overrides={"guard_deny_patterns": ("a+",)}).guard
    assert found == labs.Guard(
        deny=("bad",),
        mask=("card", "phone"),
        side="input",
        deny_patterns=("a+",),
        hold_back_chars=9,
    )
    told = labs_cli.dump_effective_config(labs.load_config(env=env))
    assert 'mask = ["card", "phone"]  # LABS_GUARD_MASK' in told


def test_labs_api_has_the_settings_as_flags() -> None:
    found: dict[str, Any] = {}
    command = labs_cli.make_command("labs-api", found.update, (), "")
    flags = ["--guard-deny", "a", "--guard-deny", "b", "--guard-max-prompt-tokens", "9"]
    result = CliRunner().invoke(command, [*flags, "--guard-mask", "card", "--guard-side", "input"])
    assert result.exit_code == 0, result.output
    given = {key: value for key, value in found.items() if value not in (None, ())}
    assert labs.load_config(env={}, overrides=given).guard == labs.Guard(
        deny=("a", "b"), max_prompt_tokens=9, mask=("card",), side="input"
    )
    assert "--guard-deny " in CliRunner().invoke(command, ["--help"]).stdout
