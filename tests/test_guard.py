# SPDX-License-Identifier: Apache-2.0
"""Tests of labs_guard.py: rules, filtered prompts, answers filtered in any pieces, and users."""

from __future__ import annotations

import functools
import itertools
import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import kit
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from kit import BODIES, CHAT, COMPLETIONS, A, Site, error_of
from msgspec.structs import replace
from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers import models as tokenizer_models

import labs
import labs_engine
import labs_guard
import labs_ready

DONE = labs.Done("length", labs.Usage(7, 9), labs.Timings(0.0, 0.1, 0.2, 5.0), "stop", 3)
CARD = "4111 1111 1111 1111"


# ---------------------------------------------------------------- helpers


def rules(**guard):
    return labs_guard.load(labs.Guard(**guard))


def filtered(found):
    return labs_guard.Filter(found, labs.Inputs((1, 2), "hi"), labs.Generation())


def shown(found, pieces):
    """Return the text that is shown of an answer in pieces, and its finish reason."""
    take, text, end = filtered(found), "", ""
    for event in [*map(labs.Delta, pieces), DONE]:
        for each in take(event):
            assert not end, "an event after the end"
            if isinstance(each, labs.Delta):
                assert each.text
                text += each.text
            else:
                end = each.finish_reason
    return text, end


def cuts(text, parts):
    """Yield each way to cut a text into this number of parts, which may be empty."""
    for ends in itertools.combinations_with_replacement(range(len(text) + 1), parts - 1):
        yield cut_at(text, ends)


def cut_at(text, ends):
    bounds = [0, *sorted(min(end, len(text)) for end in ends), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(bounds)]


def refused_by(found, text):
    with pytest.raises(labs_guard.Filtered) as caught:
        found.check_text(text)
    assert kit.is_one_sentence(caught.value)
    return caught.value.rule


# ---------------------------------------------------------------- rules


SEARCH_LONG_TEXTS = """
import labs, labs_guard
masks = labs_guard.load(labs.Guard(mask=("email", "phone", "card")))
for filling in ("a", "0", "0 ", "a@", "a.", "a@a.", "+1", "(0", "1-", "4111 ", ". ", " "):
    for text in (filling * 10_000, "a@" + filling * 10_000 + "!"):
        list(labs_guard.SENTENCE_END.finditer(text))
        masks.check_text(text)
        for rule in labs_guard.PII.values():
            rule.final_up_to(text)
"""


def test_searching_for_personal_data_takes_time_in_proportion_to_the_text():
    command = [sys.executable, "-c", SEARCH_LONG_TEXTS]
    subprocess.run(command, cwd=kit.ROOT, check=True, timeout=60)  # quadratic: many minutes


PERSONAL = {
    "email": "a@b.co|first.last+tag@mail.example.co.uk|o_k%x-1@ex-ample.museum|jörg@münchen.de"
    f"|user@xn--mnchen-3ya.de|{'x' * 64}@{'y' * 63}.org",
    "phone": "+49 30 1234567|+4930123456|+49 (0)30 123-4567|+1 (555) 123-4567|+1.555.123.4567"
    "|0171 2345678|030/1234567|01712345678|020 7946 0958|01 23 45 67 89|0049 30 1234567"
    "|555-123-4567|(555) 123-4567|1-800-555-1234|555.123.4567",
    "card": f"{CARD}|4111111111111111|5500-0000-0000-0004|3782 822463 10005|30569309025904"
    "|6011000000000004|2223000048400011|6304000000000000000|4222222222222",
}
SIMILAR = {
    "email": "a@b|@home|a@ b.co|a @b.co|3@5.6|see foo@bar|user@localhost|a@.de",
    "phone": "2024-01-31|01/02/2024 10:30|09-12-2024|10:30:00|192.168.1.100|v1.2.3.4"
    "|3.14159265358979|0.123456789012|1,234,567.89|978-3-16-148410-0|1700000000000"
    "|0 1 2 3 4 5 6 7 8 9|1990-2000|12345678901|00000000-0000-0000-0000-000000000000"
    "|1+12345678|id01712345678|+123456|2024-01-02 03-04-05|10.0.0.1|5551234567",
    "card": "4111111111111112|411111111111111|1234567890123456|0.4111111111111111|9999999999999999"
    "|41111111111111111111|978-3-16-148410-0|4111 1111 1111 1112|4111",
}


@pytest.mark.parametrize("kind", PERSONAL)
@pytest.mark.parametrize("around", ["{}", "it is {}.", "({})", "{}, {}", "a\n{}\nb", "<{}>"])
def test_personal_data_is_masked_whole_and_similar_text_stays(kind, around):
    for text in PERSONAL[kind].split("|"):
        found = rules(mask=(kind,)).check_text(around.replace("{}", text))
        if kind == "phone" and around == "({})":  # the brackets may belong to the number
            assert "[phone]" in found
        else:
            assert found == around.replace("{}", f"[{kind}]")
    for text in SIMILAR[kind].split("|") if "," not in around else ():
        whole = around.format(text)
        assert rules(mask=(kind,)).check_text(whole) == whole


@pytest.mark.parametrize(
    "expected",
    ["{} 123", "{} 12/29", "7 {}", "2345 {}", "17,{},12/29", "4111111111111112 {}", "{}\n{}",
     "Pay {}, [phone] or [email]."],
)  # fmt: skip
def test_text_around_personal_data_does_not_hide_it(expected):
    text = expected.replace("{}", CARD).replace("[phone]", "+49 30 1234567")
    found = rules(mask=PII).check_text(text.replace("[email]", "me@a.org"))
    assert found == expected.replace("{}", "[card]")


@hypothesis_settings(max_examples=60, deadline=None, derandomize=True)
@given(number=st.integers(10**10, 10**17 - 1), group=st.integers(1, 19))
def test_a_card_number_is_one_whose_check_digit_fits(number, group):
    start = "4" + str(number)
    for last in map(str, range(10)):
        digits = start + last
        groups = [digits[at : at + group] for at in range(0, len(digits), group)]
        found = rules(mask=("card",)).check_text(" ".join(groups))
        doubled = [str(int(n) * (1 + i % 2)) for i, n in enumerate(reversed(digits))]
        if sum(map(int, "".join(doubled))) % 10 == 0:  # the check of ISO/IEC 7812
            assert found == "[card]"
        elif len(groups) == 1:
            assert found == digits


@pytest.mark.parametrize(
    ("guard", "text", "rule"),
    [
        ({"deny": ("ok", "bad word")}, "A BAD WORD.", "deny[1]"),
        ({"deny": ("bad",)}, "so embaddened", "deny[0]"),
        ({"deny": ("a.c",)}, "a.c", "deny[0]"), ({"deny": ("a.c",)}, "abc", None),
        ({"deny": ("straße",)}, "STRAßE", "deny[0]"), ({"deny": ("(",)}, ")", None),
        ({"deny": ("敏感",)}, "这是敏感词", "deny[0]"), ({"deny": ("b", "a")}, "ab", "deny[1]"),
        ({"deny_patterns": ("x", "(?i)\\bb(a)d\\b")}, "so BAD", "deny_patterns[1]"),
        ({"deny_patterns": ("(?=bad)",)}, "so bad", "deny_patterns[0]"),
        ({"deny_patterns": ("bad\\b",)}, "badge", None), ({"deny_patterns": ("Bad",)}, "bad", None),
        *(({"deny_pii": (kind,)}, text.split("|")[0], kind) for kind, text in PERSONAL.items()),
        ({"deny_pii": ("card",), "mask": ("email",)}, f"a@b.co {CARD}", "card"),
        ({"deny_pii": ("email", "phone", "card")}, "4111 at 10:30, a@b", None),
        ({}, f"{CARD} me@example.org", None),
    ],
)  # fmt: skip
def test_denied_text_is_refused_by_the_rules_name_and_other_text_stays(guard, text, rule):
    if rule is None:
        assert rules(**guard).check_text(text) == text
    else:
        assert refused_by(rules(**guard), text) == rule


# ---------------------------------------------------------------- prompts


def test_too_many_tokens_and_personal_data_in_token_ids_are_refused():
    inputs = labs.Inputs((1, 2, 3), "to a@b.co")
    assert rules(max_prompt_tokens=3, deny=("x",)).check_inputs(inputs, ids=True) is inputs
    with pytest.raises(labs_guard.Filtered, match="it has 3 tokens; the limit is 2"):
        rules(max_prompt_tokens=2).check_inputs(inputs)
    for guard in ({"mask": ("email",)}, {"deny_pii": ("email",)}):
        with pytest.raises(labs_guard.Filtered):
            rules(**guard).check_inputs(inputs, ids=True)


def test_a_side_that_is_not_filtered_is_left_alone():
    found = rules(deny=("bad",), mask=("email",), side="output")
    assert found.check_text("bad a@b.co") == "bad a@b.co"
    assert shown(found, ["so bad"]) == ("so ", "content_filter")
    found = rules(deny=("bad",), mask=("email",), side="input")
    assert refused_by(found, "bad") == "deny[0]"
    take = labs_guard.Filter(found, labs.Inputs((1,), ""), labs.Generation(logprobs=0))
    events = [labs.Delta("so bad", (labs.TokenLogprob(1, -0.5),)), DONE]
    assert [each for event in events for each in take(event)] == events


# ---------------------------------------------------------------- answers, in any pieces


# A "✂" ends an answer that a rule cut.
ANSWERS = [
    ({"deny": ("bad",)}, "so it is bad, yes", "so it is ✂"),
    ({"deny": ("bad",)}, "a bBaD", "a b✂"),
    ({"deny": ("bad",)}, "bad", "✂"),
    ({"deny": ("aab",)}, "aaaab", "aa✂"),
    ({"deny": ("bad",)}, "so ba", "so ba"),
    ({"deny": ("zebra", "br")}, "ze bra", "ze ✂"),
    ({"deny": ("good day", "o")}, "a good day", "a ✂"),
    ({"deny_patterns": (r"\d{3,5}!",)}, "a 12 1234! b", "a 12 ✂"),
    ({"deny_patterns": (r"\bbad\b",)}, "badge, bad!", "badge, ✂"),
    ({"deny_patterns": (r"\bbad\b",)}, "badge is bade", "badge is bade"),
    ({"deny_patterns": ("bad(?!ge)",)}, "badge bad", "badge ✂"),
    ({"deny_patterns": ("(?m)bad$",)}, "bad one\nbad\n", "bad one\n✂"),
    ({"deny_patterns": ("(?<=so )bad",)}, "bad so bad", "bad so ✂"),
    ({"mask": ("email",)}, "to a.b@c-d.co.uk.", "to [email]."),
    ({"mask": ("email",)}, "a@b and c@d", "a@b and c@d"),
    ({"mask": ("email",)}, "a@b.co,c@d.org", "[email],[email]"),
    ({"mask": ("phone",)}, "at +49 30 12345-67 or", "at [phone] or"),
    ({"mask": ("phone",)}, "on 2024-01-31 10:30", "on 2024-01-31 10:30"),
    ({"mask": ("card",)}, f"is {CARD} 12/29", "is [card] 12/29"),
    ({"mask": ("card",)}, "6 3 0 4" + " 0" * 15 + ".", "[card]."),
    ({"mask": ("card",)}, "4111 1111 1111 1112", "4111 1111 1111 1112"),
    ({"deny_pii": ("email",)}, "to a@b.co.", "to ✂"),
    ({"deny_pii": ("card",)}, f"is {CARD}", "is ✂"),
    ({"mask": ("email",), "deny": ("bad",), "deny_patterns": ("evi+l",)}, "a@b.co is bad",
     "[email] is ✂"),
    ({"mask": ("email",), "deny": ("bad",)}, "x bad@b.co so bad", "x ✂"),
    ({"mask": ("email",), "deny": ("co is",)}, "a@b.co is", "[email] is"),
    ({"deny": ("bad",), "mask": ("card",)}, "", ""),
]  # fmt: skip


def result(expected):
    text = expected.removesuffix("✂")
    return text, "length" if text == expected else "content_filter"


@pytest.mark.parametrize(("guard", "text", "expected"), ANSWERS)
def test_an_answer_is_filtered_alike_in_any_pieces(guard, text, expected):
    found = rules(hold_back_chars=5, **guard)
    for pieces in [*cuts(text, 2), *(cuts(text, 3) if len(text) < 14 else ()), text]:
        assert shown(found, pieces) == result(expected), pieces


FRAGMENTS = "bad|ba|BAD|evil|evi| |.|\n|a@b.co|me@|@x.org|é|🌍|4111 1111 1111 1111|4111|1111|-"
FRAGMENTS += "|+49 30 1234567|0171 |2345678|555-123-4567|(0|)"
TEXTS = st.lists(st.sampled_from(FRAGMENTS.split("|")), max_size=12).map("".join)
PII = ("email", "phone", "card")
EVERY = {"deny": ("bad idea", "worse"), "deny_patterns": ("evil+ ?bad",), "mask": PII}


@hypothesis_settings(max_examples=100, deadline=None, derandomize=True)
@given(text=TEXTS, ends=st.lists(st.integers(0, 120), max_size=12))
def test_any_text_is_filtered_alike_in_any_pieces_and_masked_as_a_prompt_is(text, ends):
    found = rules(hold_back_chars=16, **EVERY)
    assert shown(found, cut_at(text, ends)) == shown(found, [text]) == shown(found, text)
    found = rules(mask=PII)
    assert shown(found, text) == (found.check_text(text), "length")


@hypothesis_settings(max_examples=60, deadline=None, derandomize=True)
@given(text=st.text("abc", max_size=40), deny=st.sets(st.text("abc", min_size=1), min_size=1))
def test_no_part_of_the_first_denied_text_is_shown(text, deny):
    places = [text.find(each) for each in deny if each in text]
    expected = (text[: min(places)], "content_filter") if places else (text, "length")
    assert shown(rules(deny=tuple(sorted(deny))), text) == expected


def test_text_that_no_rule_can_match_is_shown_at_once():
    take = filtered(rules(mask=PII))
    assert take(labs.Delta("Hello there")) == [labs.Delta("Hello ")]  # a word may become an e-mail
    assert take(labs.Delta(", it is")) == [labs.Delta("there, it ")]
    assert take(labs.Delta(" 7 ")) == [labs.Delta("is ")]  # and a digit a phone number
    assert take(labs.Delta("o'clock ")) == [labs.Delta("7 o'clock ")]
    take = filtered(rules(deny=("12345", "1")))
    assert take(labs.Delta("abcdefg")) == [labs.Delta("abc")]  # all but the longest text minus one
    take = filtered(rules(deny_patterns=("z+",), hold_back_chars=3))
    assert take(labs.Delta("abcdefg")) == [labs.Delta("abcd")]
    found = rules(deny_patterns=("<.*>",), hold_back_chars=8)
    assert shown(found, "a <1234>") == ("a ", "content_filter")
    assert shown(found, "a <123456789>") == ("a <123456789>", "length")  # too long to be held back


def test_a_cut_answer_ends_with_the_usage_so_far():
    take = filtered(rules(deny=("bad",)))
    assert take(labs.Delta("it is ")) == [labs.Delta("it i")]
    delta, done = take(labs.Delta("bad and"))
    assert delta == labs.Delta("s ")
    assert (done.finish_reason, done.usage) == ("content_filter", labs.Usage(2, 2))
    assert done.timings.prefill_s > 0
    assert done.timings.decode_s > 0
    assert take.over
    later = (labs.Delta("more"), DONE, labs.Failed(labs.GenerationError("x")))
    assert [take(event) for event in later] == [[], [], []]


FIELDS: dict[str, Any] = dict.fromkeys(("model", "revision", "dtype", "device", "hardware"), "x")
FINGERPRINT = labs.Fingerprint(**FIELDS, quantization={}, batch_invariant=True, versions={})


def test_only_an_unchanged_answer_keeps_its_fingerprint():
    for text, reason, stop, fingerprint in (
        ("fine", "length", "stop", FINGERPRINT),
        ("a@b.co", "length", "stop", None),
        ("bad", "content_filter", None, None),
    ):
        take = filtered(rules(deny_patterns=("^bad$",), mask=("email",)))
        assert take(labs.Delta(text)) == []
        done = take(replace(DONE, fingerprint=FINGERPRINT))[-1]
        assert (done.finish_reason, done.matched_stop) == (reason, stop)
        assert (done.usage, done.fingerprint) == (DONE.usage, fingerprint)


def test_a_whole_answer_is_filtered_with_its_usage_and_without_its_log_probabilities():
    events = [labs.Delta("it is bad", (labs.TokenLogprob(1, -0.5),)), DONE]
    nothing: Any = None
    ready = labs_ready.Ready(nothing, labs.Inputs((1,), ""), labs.Generation())
    found = ready.whole(rules(deny=("bad",)), events)
    assert (found.text, found.finish_reason, found.logprobs) == ("it is ", "content_filter", ())
    assert found.usage == DONE.usage
    with pytest.raises(labs.InputError, match=r"^logprobs: "):
        rules(mask=("card",)).filters(labs.Generation(logprobs=0))


def test_the_events_of_a_cut_or_abandoned_answer_are_closed():
    sent = []

    def events():
        try:
            for text in ("so ", "bad ", "more"):
                sent.append(text)
                yield labs.Delta(text)
        finally:
            sent.append("closed")

    *deltas, done = filtered(rules(deny=("bad",))).all(events())
    assert [each.text for each in deltas] == ["s", "o "]
    assert done.finish_reason == "content_filter"
    assert sent == ["so ", "bad ", "closed"]
    taking = filtered(rules(deny=("bad",))).all(events())
    next(taking)
    taking.close()
    assert sent[3:] == ["so ", "closed"]
    failed = labs.Failed(labs.GenerationError("broken"))
    assert filtered(rules(deny=("bad",)))(failed) == [failed]


# ---------------------------------------------------------------- a classifier


WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "bad", "awful"]


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """Make a model whose label is `toxic` where a text has one of two words, else `fine`.

    It attends to all tokens alike, so the last two of its four features show the words' share.
    """
    sizes = dict.fromkeys(("num_hidden_layers", "num_attention_heads"), 1)
    sizes |= {"hidden_size": 4, "intermediate_size": 4, "max_position_embeddings": 64}
    labels = {0: "fine", 1: "toxic"}
    config = transformers.BertConfig(vocab_size=len(WORDS), id2label=labels, **sizes)
    model = transformers.BertForSequenceClassification(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            eye = torch.eye(4) if weight.shape == (4, 4) else torch.zeros_like(weight)
            weight.copy_(torch.ones_like(weight) if name.endswith("LayerNorm.weight") else eye)
        layer = model.bert.encoder.layer[0]
        attention = layer.attention.self
        for part in (attention.query, attention.key, layer.intermediate.dense):
            part.weight.zero_()
        rows = [[1.0, -1.0, 0.0, 0.0]] * 5 + [[0.0, 0.0, 1.0, -1.0]] * 2
        model.bert.embeddings.word_embeddings.weight.copy_(torch.tensor(rows))
        model.classifier.weight[1, 2], model.classifier.bias[1] = 1000.0, -5.0
    place = str(tmp_path_factory.mktemp("classifier") / "model")
    model.save_pretrained(place)
    words = {word: i for i, word in enumerate(WORDS)}
    inner = Tokenizer(tokenizer_models.WordLevel(words, unk_token="[UNK]"))
    inner.normalizer, inner.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    ends = [("[CLS]", 2), ("[SEP]", 3)]
    inner.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=ends)
    names = {f"{word[1:-1].lower()}_token": word for word in WORDS[:5]}
    transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **names).save_pretrained(place)
    return place


@functools.cache
def judged(classifier, **guard):
    return rules(classifier=classifier, classifier_labels=("toxic",), **guard)


@pytest.mark.parametrize("text", ["That is AWFUL!", "good " * 200 + "bad", "bad" + " good" * 200])
def test_a_classifier_refuses_a_prompt_and_cuts_an_answer_of_any_length(classifier, text):
    found = judged(classifier)
    assert refused_by(found, text) == "classifier[toxic]"
    assert found.classify(text) == labs_guard.Verdict("classifier[toxic]", 0, len(text))
    assert shown(found, ["Fine. ", text + "."]) == ("Fine. ", "content_filter")


def test_a_classifiers_threshold_and_labels_count(classifier):
    for text in ("good", "", "badly put", "good " * 300):
        assert judged(classifier).check_text(text) == text
    options = {"classifier": classifier, "classifier_labels": ("fine",)}
    fine = rules(classifier_threshold=0.999, **options)
    assert fine.check_text("good") == "good"  # its score is 0.993
    assert refused_by(rules(classifier_threshold=0.99, **options), "good") == "classifier[fine]"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("It is good. It is bad. So it is.", "It is good. ✂"),
        ("It is bad. It is good.", "✂"),
        ("It is good! It is bad", "It is good! ✂"),
        ("good\n\nbad\n", "good\n\n✂"),
        ("It is good. So\nit is", "It is good. So\nit is"),
        ("好。bad。", "好。✂"),
        ("So evil. Not bad.", "So ✂"),
        ("So good. So bad, evil.", "So good. ✂"),
        ("So good. Not bad. X.", "So good. ✂"),
        ("To a@b.co. Not bad.", "To [email]. ✂"),
    ],
)
def test_an_answer_is_classified_by_the_sentence_in_any_pieces(classifier, text, expected):
    guard = {"deny": ("od. not bad. x",), "deny_patterns": ("evil",), "mask": ("email",)}
    found = judged(classifier, hold_back_chars=6, **guard)
    for pieces in [*itertools.islice(cuts(text, 2), 0, None, 3), [text], list(text)]:
        assert shown(found, pieces) == result(expected), pieces


PARTS = st.sampled_from(["good", "bad", "evi", "l", ". ", "! ", "\n", " "])


@hypothesis_settings(max_examples=20, deadline=None, derandomize=True)
@given(parts=st.lists(PARTS, max_size=12), ends=st.lists(st.integers(0, 40), max_size=6))
def test_any_answer_is_classified_alike_in_any_pieces(classifier, parts, ends):
    text = "".join(parts)
    found = judged(classifier, deny=("evil", "od bad", "od. bad. g"))
    assert shown(found, cut_at(text, ends)) == shown(found, [text]) == shown(found, text)


def test_a_sentence_is_shown_once_it_is_classified(classifier):
    take = filtered(judged(classifier))
    assert take(labs.Delta("It is good. It is")) == [labs.Delta("It is good. ")]
    assert take(labs.Delta(" fine.")) == []
    assert take(labs.Delta(" ")) == [labs.Delta("It is fine. ")]
    assert take(labs.Delta("bad.")) == []
    (done,) = take(DONE)
    assert (done.finish_reason, done.usage) == ("content_filter", DONE.usage)


def test_a_classifiers_size_is_known_and_threads_share_it(classifier):
    found = judged(classifier)
    weights = transformers.BertForSequenceClassification.from_pretrained(classifier).parameters()
    assert found.nbytes == sum(4 * each.numel() for each in weights)
    assert rules(deny=("bad",)).nbytes == 0
    with ThreadPoolExecutor(4) as pool:
        verdicts = list(pool.map(found.classify, ["so bad", "so good"] * 20))
    assert [each is not None for each in verdicts] == [True, False] * 20


def test_a_classifier_is_not_trusted_as_the_model_may_be(monkeypatch):
    asked = []

    def refuse(kind, name, options):
        asked.append(options)
        raise labs.ModelError("none")

    monkeypatch.setattr(labs, "pretrained", refuse)
    spec = labs.ModelSpec(trust_remote_code=True, use_safetensors=False)
    with pytest.raises(labs.ModelError):
        labs_guard.load(labs.Guard(classifier="org/other", classifier_labels=("bad",)), spec)
    assert (asked[0]["trust_remote_code"], asked[0]["use_safetensors"]) == (False, True)


def test_a_classifier_that_cannot_be_used_is_an_error_in_one_sentence(fake, classifier):
    spec = labs.ModelSpec(local_files_only=True)
    for name in ("no/such-model", str(Path.cwd()), "../.."):
        with pytest.raises(labs.ModelError, match="guard_classifier = ") as caught:
            labs_guard.load(labs.Guard(classifier=name, classifier_labels=("toxic",)), spec)
        assert kit.is_one_sentence(caught.value)
    with pytest.raises(labs.ConfigError, match="= rude: the model has fine, toxic"):
        site_of(fake, classifier=classifier, classifier_labels=("rude", "toxic"))


# ---------------------------------------------------------------- over HTTP


def site_of(engine, generation=None, **guard):
    config = kit.configured(generation=generation)
    return Site(engine, replace(config, guard=labs.Guard(**guard)))


def answers_of(response, path):
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
        part = choice.get("message") or choice.get("delta") or choice
        text += part.get("content") or part.get("text") or ""
        found[choice["index"]] = text, choice["finish_reason"] or reason
    return [found[index] for index in sorted(found)]


OFTEN: list[tuple[str, dict[str, Any]]] = [(CHAT, {"n": 3}), (COMPLETIONS, {"prompt": ["a", "b"]})]
WAYS: list[tuple[str, dict[str, Any]]] = [("/generate", {}), ("/generate/stream", {})]
WAYS += [(path, {**more, "stream": stream}) for path, more in OFTEN for stream in (False, True)]


@pytest.mark.parametrize("path", [path for path in BODIES if path != "/detokenize"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_refused_prompt_is_400_with_the_rules_name(fake, path, stream):
    body = {**BODIES[path], **({"stream": True} if stream and path.startswith("/v1") else {})}
    error = error_of(site_of(fake, deny=("other", "HI")).post(path, body), 400)
    assert (error["code"], error["type"]) == ("content_filtered", "invalid_request_error")
    assert ("deny[1]" in error["message"], error["param"]) == (True, None)
    assert not any(word in error["message"].lower() for word in ("hi ", "other"))
    assert not fake.asked


@pytest.mark.parametrize(("path", "more"), WAYS)
def test_every_choice_is_cut_masked_or_passed_whole(fake, path, more):
    site, body = site_of(fake, deny=("bad",), mask=("email", "card")), {**BODIES[path], **more}
    fake.pieces = ["so ", "it ", "is b", "ad an", "d more"]
    choices = {"/generate": 1, "/generate/stream": 1, CHAT: 3, COMPLETIONS: 2}[path]
    response = site.post(path, body)
    assert answers_of(response, path) == [("so it is ", "content_filter")] * choices
    assert {*fake.left} == {*range(1, choices + 1)}, "a row that is cut is cancelled"
    assert not {"bad", "more"} & {*re.findall(r"\w+", response.text)}
    fake.pieces = ["to a", "@", "b.", "co, he", "llo\r\n th", "ere @ 4", "1"]
    end = "\n" if path == "/generate/stream" else "\r\n"
    expected = (f"to [email], hello{end} there @ 41", "stop")
    assert {*answers_of(site.post(path, body), path)} == {expected}


def test_metrics_count_each_rules_acts(fake):
    site = site_of(fake, deny=("bad", "worse"), mask=("email",), max_prompt_tokens=30)
    fake.pieces = ["a@b.co ", "worse"]
    site.post("/generate", {"prompt": "a@b.co c@d.co"})
    site.post(CHAT, {"messages": kit.HELLO, "n": 2})
    site.post("/generate", {"prompt": "bad"})
    site.post("/generate", {"prompt": "a" * 50})
    text = site.get("/metrics").text
    found = re.findall(r'^labs_guard_total{rule="(.+?)",side="(.+?)"} (.+)$', text, re.MULTILINE)
    assert {f"{rule} {side} {float(count):.0f}" for rule, side, count in found} == {
        "email input 2", "email output 3", "deny[1] output 3", "deny[0] input 1",
        "max_prompt_tokens input 1",
    }  # fmt: skip
    assert 'finished_reason="content_filter",model_name="tiny"} 3.0' in text


def test_an_answer_from_the_cache_is_filtered_too(tiny):
    body = {"prompt": "cached", "max_new_tokens": 5, **A}
    cut, whole = ("aaaa", "content_filter", True), ("aaaaa", "length", True)
    engine = labs_engine.Cached(labs_engine.Engine(tiny), labs.ResponseCache(max_entries=9))
    for patterns, outcome in (((), (*whole[:2], False)), (("a$",), cut), ((), whole)):
        found = site_of(engine, deny_patterns=patterns).post("/generate", body).json
        cached = found["usage"]["response_cached"]
        assert (found["text"], found["finish_reason"], cached) == outcome
    engine.close()


# ---------------------------------------------------------------- in the shell and in files


def configure(**guard):
    lines = [f"{key} = {json.dumps(value)}\n" for key, value in guard.items()]
    Path("labs.toml").write_text("[guard]\n" + "".join(lines), encoding="utf-8")


@pytest.mark.parametrize("flag", ["--stream", "--no-stream"])
def test_labs_gen_filters_its_output_and_reports_a_cut(fake_labs, flag):
    configure(deny=["bad"], mask=["email"])
    fake_labs.pieces = ["to a@", "b.co, ", "so b", "ad", " more"]
    result = kit.invoke("--prompt", "Hi", flag)
    assert (result.exit_code, result.stdout) == (0, "to [email], so \n")
    assert result.stderr == "[a rule of [guard] cut the answer]\n"
    assert fake_labs.closed == 1


def test_a_chat_continues_after_a_filtered_message(fake_labs):
    configure(deny=["bad"])
    fake_labs.pieces = ["so bad"]
    result = kit.invoke("chat", input="bad\nhello\n/exit\n")
    assert (result.exit_code, result.stdout) == (1, "so \n")  # as one was refused
    assert "Error: the prompt is refused by [guard] deny[0]" in result.stderr
    assert [each["messages"][0]["content"] for each in fake_labs.requests] == ["hello"]


def test_only_unchanged_answers_in_files_are_replayed(tiny):
    config = labs.Config(model_id="tiny", guard=labs.Guard(deny=("bad", "aaaa")))
    asked = [{"id": "0", "prompt": "cut", "max_new_tokens": 6, **A}]
    asked += [{"id": "1", "prompt": "whole", "max_new_tokens": 2, **A}]
    asked += [kit.openai_line("2", max_tokens=6, n=2, **A)]
    asked += [kit.openai_line("3", COMPLETIONS, prompt=[*b"bad"])]
    *found, refused = kit.answers(tiny, asked, config, ordered=True)
    assert found[0]["usage"]["completion_tokens"] == 6
    choices = found[2]["response"]["body"]["choices"]
    ends = [each["finish_reason"] for each in (*found[:2], *choices)]
    assert ends == ["content_filter", "length", "content_filter", "content_filter"]
    assert refused["response"]["body"]["error"]["code"] == "content_filtered"
    verdicts = [each.verdict for each in kit.replayed(tiny, found, config)]
    assert verdicts == ["not comparable", "same", "not comparable"]


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('deny = [""]', "guard_deny|length >= 1"), ('deny = "bad"', "guard_deny = 'bad'|array"),
        ('deny_patterns = ["a", "("]', "deny_patterns[1] = '('|position 0"),
        ('deny_patterns = ["a*"]', "deny_patterns[0] = 'a*'|every text"),
        ('mask = ["name"]', "guard_mask|'name'"), ('side = "both"', "guard_side = 'both'"),
        ('mask = ["card"]\ndeny_pii = ["card"]', "mask and deny_pii|card"),
        ('classifier = "a/b"', "classifier_labels"), ('classifier_labels = ["a"]', "classifier"),
        ("classifier_threshold = 2", "guard_classifier_threshold = 2|1"),
        ('max_prompt_tokens = 5\nside = "output"', "max_prompt_tokens|side"),
        ("hold_back_chars = 0", "guard_hold_back_chars = 0"),
        ('denny = ["bad"]', "'denny'|[guard]|deny?"),
    ],
)  # fmt: skip
def test_a_wrong_setting_is_refused_by_name(text, words):
    Path("labs.toml").write_text(f"[guard]\n{text}\n", encoding="utf-8")
    with pytest.raises(labs.ConfigError) as caught:
        labs.load_config(env={})
    assert kit.is_one_sentence(caught.value)
    assert [
        word for word in ["labs.toml", *words.split("|")] if word not in str(caught.value)
    ] == []
