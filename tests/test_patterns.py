# SPDX-License-Identifier: Apache-2.0
"""Tests of labs_patterns.py: operators' patterns on untrusted texts, in filters and in routes."""

from __future__ import annotations

import itertools
import re
import threading
from types import SimpleNamespace

import kit
import pytest
from kit import BODIES, CHAT, RESPONSES, Site, error_of
from msgspec.structs import replace

import labs
import labs_guard
import labs_models
import labs_patterns

EVIL = [r"(x+x+)+y", r"(a+)+$", r"(?:a|aa)+$"]
LONG = "x" * 4000 + "7" * 4000 + "!" + "a" * 4000 + "!" + "b" * 4000


@pytest.fixture(autouse=True)
def brief(monkeypatch):
    monkeypatch.setattr(labs_patterns, "LIMIT_S", 0.1)


def test_other_threads_run_while_a_pattern_is_searched(monkeypatch):
    monkeypatch.setattr(labs_patterns, "LIMIT_S", 0.5)
    over, turns = threading.Event(), 0

    def search():
        with pytest.raises(labs_patterns.TooSlow, match=r"rules\[7\]: searching .* over 0\.5"):
            labs_patterns.Bounded("rules[7]", EVIL[0]).search(LONG)
        over.set()

    (thread := threading.Thread(target=search)).start()
    while not over.wait(0.01):
        turns += 1
    thread.join()
    assert turns > 5  # a search that holds the interpreter lets other threads have two


def test_the_time_of_other_threads_does_not_count(monkeypatch):
    tries = []

    def search(text, start, timeout):
        tries.append(timeout)
        if len(tries) < 4:
            raise TimeoutError
        return "found"

    pattern = labs_patterns.Bounded("busy", "a")
    monkeypatch.setattr(pattern, "_regex", SimpleNamespace(search=search))
    assert pattern.search("a") == "found"
    assert tries == [0.1, 0.2, 0.4, 0.8]


SAME = {
    r"\bstraße\b": "Die Straße, die straße",
    r"(?i)ÉCOLE\w*": "une école, écoles",
    r"(?<!\d)\d{3}(?!\d)": "12 345 6789",
    r"(['\"])(\w+)\1": '\'a" "b"',
    r"(?P<one>.)(?P=one)$": "all",
    r"(?s)a.+?b": "a\n\nb b",
    **{r"(?x) a b  # c": "ab", r"^b": "ab", r"\d+": "٣٤", r"[^\W_]{2,}+c": "abc"},
    r"x{,2}|[[a]": "xxx [",
}


@pytest.mark.filterwarnings("ignore:Possible nested set:FutureWarning")
def test_a_pattern_matches_as_pythons_re_does():
    for (pattern, text), start in itertools.product(SAME.items(), (0, 1)):
        found = labs_patterns.Bounded("same", pattern).search(text, start)
        expected = re.compile(pattern).search(text, start)
        assert (found and found.span()) == (expected and expected.span()), pattern


@pytest.mark.parametrize("pattern", EVIL)
def test_a_prompt_that_takes_a_filter_too_long_is_refused(pattern):
    acted = []
    rules = labs_guard.load(labs.Guard(deny_patterns=("never", pattern), mask=("email",)))
    rules = replace(rules, tell=lambda *each: acted.append(each))
    with pytest.raises(labs_guard.Filtered, match=re.escape("deny_patterns[1]")):
        rules.check_text(f"a@example.org {LONG}")
    assert acted == [("deny_patterns[1]", "input")]
    assert rules.check_text("to a@example.org") == "to [email]"


@pytest.mark.parametrize("size", [500, 4000])
def test_an_answer_that_takes_a_filter_too_long_is_cut(size):
    rules = labs_guard.load(labs.Guard(deny_patterns=(EVIL[0],), hold_back_chars=4096))
    text = f"It is well. {'-' * 100} {LONG[:4000]}"
    cut = labs_guard.Filter(rules, labs.Inputs((1,), "hi"), labs.Generation())
    pieces = (labs.Delta(text[at : at + size]) for at in range(0, len(text), size))
    events = [event for piece in pieces if not cut.over for event in cut(piece)]
    assert events[-1].finish_reason == "content_filter"
    seen = "".join(event.text for event in events[:-1])
    assert text.startswith(seen)
    assert len(seen) < 200


NOT_ROUTED = {"/choose", "/detokenize"}  # one rates answers, the other has no text


def routed(engine, *rules):
    return Site(engine, replace(kit.configured(), router=labs.Router(rules=rules)))


@pytest.mark.parametrize("path", [path for path in BODIES if path not in NOT_ROUTED])
def test_a_prompt_that_takes_the_router_too_long_is_400(fake, path):
    site = routed(fake, *(labs.RouterRule(model="tiny", pattern=p) for p in ("never", EVIL[0])))
    body = {**BODIES[path], "model": "auto"}
    assert site.post(path, body).status_code == 200
    text = LONG[:3000]
    said = {"messages": [{"role": "user", "content": text}]}
    long = {CHAT: said, "/apply-template": said, RESPONSES: {"input": text}}
    body |= long.get(path, {"prompt": text})
    error = error_of(site.post(path, body), 400)
    assert error["code"] == "pattern_too_slow"
    assert error["message"].startswith("router_rules[1]: searching this text")
    assert site.get("/readyz").status_code == 200


def test_a_pattern_that_cannot_be_compiled_is_refused_by_name_at_the_start(fake):
    with pytest.raises(labs.ConfigError, match=r"deny_patterns\[3\] = '\(': "):
        labs_patterns.Bounded("deny_patterns[3]", "(")
    unchecked = SimpleNamespace(model="m", pattern="[z-a]")  # RouterRule checks with Python's re
    with pytest.raises(labs.ConfigError, match=r"router_rules\[1\] = '\[z-a\]': "):
        routed(fake, labs.RouterRule(model="m", pattern="a"), unchecked)


def test_the_first_rule_whose_pattern_and_length_match_chooses_the_model():
    rules = (
        labs.RouterRule(model="a", pattern=r"\bsql\b", over_prompt_tokens=5),
        labs.RouterRule(model="b", pattern="(?i)SQL"),
        labs.RouterRule(model="c", over_prompt_tokens=9),
    )
    router = labs.Router(rules=rules)
    texts = [("sql", 6), ("sql", 5), ("mysql", 9), ("other", 10), ("other", 9)]
    found = [labs_models.route(router, text, lambda n=n: n) for text, n in texts]
    assert found == ["a", "b", "b", "c", None]
