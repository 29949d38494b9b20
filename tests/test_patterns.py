# SPDX-License-Identifier: Apache-2.0
"""Tests of labs_patterns.py: operators' patterns against the texts of strangers, wherever used."""

from __future__ import annotations

import re
import threading
import time
from typing import Any

import kit
import msgspec
import pytest
from kit import BODIES, CHAT, FakeEngine, Site, error_of

import labs
import labs_guard
import labs_models
import labs_patterns

EVIL = [r"(x+x+)+y", r"(a+)+$", r"(?:a|aa)+$"]
LONG = "x" * 4000 + "7" * 4000 + "!" + "a" * 4000 + "!" + "b" * 4000


@pytest.fixture(autouse=True)
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labs_patterns, "LIMIT_S", 0.1)


@pytest.mark.parametrize("pattern", EVIL)
def test_a_pattern_that_goes_back_for_ever_is_stopped(pattern: str) -> None:
    began = time.thread_time()
    with pytest.raises(labs_patterns.TooSlow, match=r"rules\[7\]: searching .* takes over 0\.1"):
        labs_patterns.Bounded("rules[7]", pattern).search(LONG)
    assert time.thread_time() - began < 5


def test_other_threads_run_while_a_pattern_is_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labs_patterns, "LIMIT_S", 0.5)
    found: list[Any] = []

    def search() -> None:
        with pytest.raises(labs_patterns.TooSlow) as caught:
            labs_patterns.Bounded("slow", EVIL[0]).search(LONG)
        found.append(caught.value)

    (thread := threading.Thread(target=search)).start()
    turns = 0
    while not found:
        time.sleep(0.01)
        turns += 1
    thread.join()
    assert turns > 5  # a pattern that holds the interpreter lets nobody have two


def test_the_time_of_other_threads_is_not_a_searchs(monkeypatch: pytest.MonkeyPatch) -> None:
    tries = list[float]()

    class Impatient:
        def search(self, text: str, start: int, timeout: float) -> str:
            tries.append(timeout)
            if len(tries) < 4:
                raise TimeoutError
            return "found"

    pattern = labs_patterns.Bounded("busy", "a")
    monkeypatch.setattr(pattern, "_regex", Impatient())
    assert pattern.search("a") == "found"
    assert tries == [0.1, 0.2, 0.4, 0.8]


SAME = [
    (r"\bstraße\b", "Die Straße, die straße"),
    (r"(?i)ÉCOLE\w*", "une école, écoles"),
    (r"(?<!\d)\d{3}(?!\d)", "12 345 6789"),
    (r"(['\"])(\w+)\1", '\'a" "b"'),
    (r"(?P<one>.)(?P=one)$", "all"),
    (r"(?s)a.+?b", "a\n\nb b"),
    (r"(?x) a b  # c", "ab"),
    (r"^b", "ab"),
    (r"\d+", "٣٤"),
    (r"[^\W_]{2,}+c", "abc"),
    (r"x{,2}|[[a]", "xxx ["),
]


@pytest.mark.parametrize(("pattern", "text"), SAME)
@pytest.mark.parametrize("start", [0, 1])
@pytest.mark.filterwarnings("ignore:Possible nested set:FutureWarning")
def test_a_pattern_finds_what_pythons_finds(pattern: str, text: str, start: int) -> None:
    found, expected = (
        each.search(text, start)
        for each in (labs_patterns.Bounded("same", pattern), re.compile(pattern))
    )
    assert (found and found.span()) == (expected and expected.span())


def test_a_pattern_that_cannot_be_read_is_refused_by_name() -> None:
    with pytest.raises(labs.ConfigError, match=r"deny_patterns\[3\] = '\(': "):
        labs_patterns.Bounded("deny_patterns[3]", "(")


@pytest.mark.parametrize("pattern", EVIL)
def test_a_prompt_that_a_filter_cannot_search_in_time_is_refused(pattern: str) -> None:
    told = list[tuple[str, str]]()
    rules = labs_guard.load(labs.Guard(deny_patterns=("never", pattern), mask=("email",)))
    rules = msgspec.structs.replace(rules, tell=lambda *each: told.append(each))
    with pytest.raises(labs_guard.Filtered, match=re.escape("deny_patterns[1]")):
        rules.check_text(f"a@example.org {LONG}")
    assert told == [("deny_patterns[1]", "input")]
    assert rules.check_text("to a@example.org") == "to [email]"


@pytest.mark.parametrize("size", [500, 4000])
def test_an_answer_that_a_filter_cannot_search_in_time_is_cut(size: int) -> None:
    rules = labs_guard.load(labs.Guard(deny_patterns=(EVIL[0],), hold_back_chars=4096))
    text = f"It is well. {'-' * 100} {LONG[:4000]}"
    cut = labs_guard.Filter(rules, labs.Inputs((1,), "hi"), labs.Generation())
    pieces = (labs.Delta(text[at : at + size]) for at in range(0, len(text), size))
    events = [event for piece in pieces if not cut.over for event in cut(piece)]
    assert events[-1].finish_reason == "content_filter"
    seen = "".join(event.text for event in events[:-1])
    assert text.startswith(seen)
    assert len(seen) < 200


def routed(engine: Any, *patterns: str) -> Site:
    rules = tuple(labs.RouterRule(model="tiny", pattern=each) for each in patterns)
    config = kit.configured()
    return Site(engine, msgspec.structs.replace(config, router=labs.Router(rules=rules)))


@pytest.mark.parametrize("path", [path for path in BODIES if path != "/choose"])
def test_a_prompt_that_no_rule_can_be_searched_in_is_400(fake: FakeEngine, path: str) -> None:
    site = routed(fake, "never", EVIL[0])
    body: dict[str, Any] = {**BODIES[path], "model": "auto"}
    assert site.post(path, body).status_code == 200
    body |= chat(LONG[:3000]) if path == CHAT else {"prompt": LONG[:3000]}
    error = error_of(site.post(path, body), 400)
    assert error["code"] == "pattern_too_slow"
    assert error["message"].startswith("router_rules[1]: searching this text")
    assert site.get("/readyz").status_code == 200


def chat(text: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}]}


class Unchecked(msgspec.Struct):
    """A rule that Python's re was not asked about."""

    pattern: str


def test_a_rule_that_cannot_be_searched_is_told_at_the_start(fake: FakeEngine) -> None:
    rules: Any = (labs.RouterRule(model="m", pattern="a"), Unchecked("[z-a]"))
    config = msgspec.structs.replace(kit.configured(), router=labs.Router(rules=rules))
    with pytest.raises(labs.ConfigError, match=r"router_rules\[1\] = '\[z-a\]': "):
        Site(fake, config)


def test_a_route_goes_by_the_first_rule_whose_pattern_is_found() -> None:
    rules = (
        labs.RouterRule(model="a", pattern=r"\bsql\b", over_prompt_tokens=5),
        labs.RouterRule(model="b", pattern="(?i)SQL"),
        labs.RouterRule(model="c", over_prompt_tokens=9),
    )
    router = labs.Router(rules=rules)
    asked = [("sql", 6), ("sql", 5), ("mysql", 9), ("other", 10), ("other", 9)]
    found = [labs_models.route(router, text, lambda n=n: n) for text, n in asked]  # type: ignore[misc]
    assert found == ["a", "b", "b", "c", None]
