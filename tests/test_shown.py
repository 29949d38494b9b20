# SPDX-License-Identifier: Apache-2.0
"""Conversations reach templates that show one call of a message, or take no text beside it."""

from __future__ import annotations

from typing import Any

import kit
import pytest
from test_tools import ADD, ASK, call, hermes, modelled, result, tools  # noqa: F401 (fixtures)
from wire_forms import FORMS

import labs

ONE = "{% set f = m.tool_calls[0].function %}CALL {{ f.name }} {{ f.arguments | tojson }}"
RAISES = "{% if m.tool_calls | length > 1 %}{{ raise_exception('one call') }}{% endif %}"
EITHER = "{% if m.content and m.thinking %}{{ raise_exception('not both') }}{% endif %}"
NINE = "{% if c.id | length != 9 %}{{ raise_exception('length 9') }}{% endif %}{{ c.id }}"
EACH = "{% for c in m.tool_calls %}" + NINE + "{{ c.function.arguments | tojson }}{% endfor %}"
TWO: dict[str, Any] = {
    "role": "assistant",
    "content": "Hm.",
    "tool_calls": [call("add", '{"n": 1}', "call_1"), call("add", '{"n": 2}', "call_2")],
}
RESULTS = [result("call_2", "second"), result("call_1", "first")]


def prompt(model: labs.Model, calls: str, *turns: dict[str, Any], first: str = "") -> str:
    """Return the prompt of a template that shows calls so."""
    template = (
        "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}{% for m in messages %}{% if "
        "m.tool_calls %}<bot>" + first + calls + "<end>{% else %}<user>" + "{{ m.role }} "
        "{{ m.tool_call_id }} {{ m.content }}<end>{% endif %}{% endfor %}"
    )
    model = kit.with_template(model, template)
    return labs.build_inputs(model, messages=[*ASK, *turns], tools=tools(ADD)).prompt


@pytest.mark.parametrize("first", ["", RAISES])
def test_a_message_with_two_calls_becomes_two_where_a_template_shows_one(first, hermes):  # noqa: F811
    text = "{{ m.content }}" + ONE
    shown = prompt(hermes, text, TWO, *RESULTS, {"role": "user", "content": "So?"}, first=first)
    words = ["Hm.", '{"n": 1}', "first", '{"n": 2}', "second", "So?"]
    assert [shown.count(word) for word in words] == [1] * 6
    assert sorted(words, key=shown.index) == words
    cut = prompt(hermes, text, TWO, RESULTS[0], first=first)  # a result is missing
    assert cut.index('{"n": 1}') < cut.index('{"n": 2}') < cut.index("second")


def test_calls_with_the_same_id_keep_their_results(hermes):  # noqa: F811
    turn = {**TWO, "tool_calls": [call("add", '{"n": 1}'), call("add", '{"n": 2}')]}
    shown = prompt(hermes, ONE, turn, result("a", "first"), result("a", "second"))
    words = ['{"n": 1}', "first", '{"n": 2}', "second"]
    assert sorted(words, key=shown.index) == words


def test_two_calls_are_refused_where_nothing_shows_the_second(hermes):  # noqa: F811
    only = "{% if loop.index < 3 %}" + ONE + "{% endif %}"
    with pytest.raises(labs.InputError, match=r"one has 2 tool_calls.*shows only the first"):
        prompt(hermes, only, TWO, *RESULTS)
    assert '{"n": 1}' in prompt(hermes, only, {**TWO, "tool_calls": TWO["tool_calls"][:1]})


def test_text_joins_the_reasoning_where_a_template_takes_one_of_them(hermes):  # noqa: F811
    turn = {**TWO, "reasoning_content": "Deep."}
    text = "{{ m.thinking }}{{ m.content }}" + ONE
    shown = prompt(hermes, text, turn, *RESULTS, first=EITHER)
    assert shown.count("Deep.\n\nHm.") == 1
    assert shown.count("Hm.") == 1


def test_ids_are_made_short_where_a_template_takes_only_those(hermes):  # noqa: F811
    shown = prompt(hermes, EACH, TWO, *RESULTS)
    assert "call_1" not in shown
    assert '{"n": 1}' in shown
    first, second = (shown.index(text) for text in (" first", " second"))
    assert shown.count(shown[first - 9 : first]) == 2  # the call's and the result's
    assert shown.count(shown[second - 9 : second]) == 2
    short = {**TWO, "tool_calls": [call("add", "{}", "abcdef123")]}
    assert prompt(hermes, EACH, short, result("abcdef123")).count("abcdef123") == 2


@pytest.mark.parametrize("family", FORMS)
def test_nothing_of_a_conversation_is_lost_in_any_family(family, modelled):  # noqa: F811
    turns = [*ASK, {**TWO, "reasoning_content": "Deep."}, *RESULTS]
    shown = labs.build_inputs(modelled(family), messages=turns, tools=tools(ADD)).prompt
    assert shown.index("first") < shown.index("second")
    assert "Hm." in shown
    ones = [shown.count(each) for each in ("n:1}", '"n": 1}', "<parameter=n>\n1\n")]
    twos = [shown.count(each) for each in ("n:2}", '"n": 2}', "<parameter=n>\n2\n")]
    assert (sum(ones), sum(twos)) == (1, 1)
