# SPDX-License-Identifier: Apache-2.0
"""Patterns, choices and Lark grammars: what they mean, what is refused, and answers under them."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import kit
import msgspec
import pytest
import torch
import wire_forms

import labs
import labs_engine
import labs_schema
import labs_tools
import labs_typed
from labs_structured import Grammar, choice, grammar, regex

HOT = labs.Generation(max_new_tokens=60, temperature=1.5)
CALC = 'start: sum\nsum: sum "+" term | term\nterm: /[0-9]{1,2}/ | "(" sum ")"'
TOKENS = {*range(256, 262)}  # special tokens of the tiny model


def follows(model: labs.Model, held: Grammar, text: str) -> bool:
    """Return whether a text is a whole answer; no special token but the end may ever follow."""
    only, prompt = labs_typed.Constraint(model, held), [5, 6, 7]
    ids = kit.encoded(text)
    for count in range(len(ids) + 1):
        allowed = torch.isfinite(only([*prompt, *ids[:count]], torch.zeros(262)))
        assert not {*allowed.nonzero()[:, 0].tolist()} & (TOKENS - model.eos_token_ids)
        if count < len(ids) and not allowed[ids[count]]:
            return False
    return bool(allowed[[*model.eos_token_ids]].all())


def generate(model: labs.Model, held: Any, seed: int) -> labs.Completion:
    only, inputs = [labs_typed.Constraint(model, held)], labs.build_inputs(model, prompt="hi")
    return labs.generate(model, inputs, labs.evolve(HOT, seed=seed), processors=only)


# ---------------------------------------------------------------- what they mean

MEANT: list[tuple[Callable[[Any], Grammar], Any, list[str], list[str]]] = [
    (regex, "[0-9]{3}-x?", ["123-", "123-x"], ["123", "123-xx"]),
    (regex, "^a|b$", ["a", "b"], ["ab"]),
    (regex, r"(?i)\Aab\z", ["AB", "ab"], ["a"]),
    (regex, "[/]a/b", ["/a/b"], ["a/b"]),
    (regex, "a\nb", ["a\nb"], ["a b"]),
    (regex, "a\\\nb", ["a\nb"], ["ab"]),
    (regex, r"a\\/", ["a\\/"], ["a/"]),
    (regex, r"[\]/\\-]+", ["]/\\-"], ["a"]),
    (regex, r"(?P<n>a)(?:b|é😀)\.", ["ab.", "aé😀."], ["abx"]),
    (regex, "a*?b", ["b", "aab"], ["a"]),
    (regex, "<[|]?end[|]?>", ["<end>", "<|end|>"], ["end"]),
    (choice, ["a", "ab", "abc"], ["a", "ab", "abc"], ["abcd", "b", ""]),
    (choice, ['"\\', "\x7f", "\n", "é😀", "/x/i"], ['"\\', "\x7f", "\n", "é😀", "/x/i"], ["\\"]),
    (choice, ["<end>"], ["<end>"], ["end"]),
    (grammar, CALC, ["1", "1+(2+34)"], ["1+", "123", "()"]),
    (grammar, 'start: "a"\n  | b  // c\n# c\nb: "b" start?', ["a", "b", "bba"], ["ab"]),
    (grammar, "%import common (INT, WS)\n%ignore WS\nstart: INT /,/ INT", ["1 ,  2"], ["1 2"]),
    (grammar, "%import common.INT -> N\nstart: (\nN\n)", ["12"], ["x"]),
    (grammar, 'start: ["x"] (A | "b"i)~2..3 -> end\nA: /é/ & ~/x/', ["xéB", "bbb"], ["é"]),
    (grammar, 'start: "<end>" %json {"enum": [1, {"}": "\\n"}]}', ['<end>{"}":"\\n"}'], ["1"]),
    (lambda schema: schema, {"enum": ["<end>", "\n<eos>"]}, ['"<end>"', '"\\n<eos>"'], ["<end>"]),
    (grammar, 'head[lazy]: /.*;/s\n?start: head "x"{0,2}', ["a\n;x", ";"], [";;x", "x"]),
]


@pytest.mark.parametrize(("make", "given", "fits", "others"), MEANT)
def test_the_whole_answer_is_what_was_asked(tiny, make, given, fits, others):
    held = make(given)
    assert [text for text in [*fits, *others] if follows(tiny, held, text)] == fits


def random_pattern(chance: random.Random, depth: int = 0) -> str:
    """Return a pattern that means the same to Python, and of which each text ends soon."""
    atoms = ["a", "bc", "[0-9]", "[a-f]", "[^a-z]", "é", r"\.", "/", " ", '"', "(?:x|yz)"]
    pieces = [chance.choice(atoms) for _ in range(chance.randint(1, 4))]
    if depth < 2 and chance.random() < 0.5:
        inner = [random_pattern(chance, depth + 1) for _ in range(2)]
        pieces.append(f"({'|'.join(inner)})")
    return "".join(each + chance.choice(["", "", "?", "{2}", "{1,3}"]) for each in pieces)


def test_random_answers_match_their_pattern_or_choice(tiny):
    chance, ended = random.Random(3), 0
    for seed in range(6):
        pattern = random_pattern(chance)
        texts = [str(chance.random()) for _ in range(chance.randint(1, 9))]
        found, chosen = (generate(tiny, each, seed) for each in (regex(pattern), choice(texts)))
        if found.finish_reason == "stop":
            assert re.fullmatch(pattern, found.text), (pattern, found.text)
            ended += 1
        assert chosen.text in texts
    assert ended > 2


def test_random_answers_follow_their_grammar(tiny):
    bounded = 'start: (n "+"){0,3} n\nn: /[0-9]{1,3}/ | "(" /[0-9]/ "-" /[0-9]/ ")"'
    found = [generate(tiny, grammar(bounded), seed).text for seed in range(9)]
    number = r"([0-9]{1,3}|\([0-9]-[0-9]\))"
    assert all(re.fullmatch(rf"({number}\+){{0,3}}{number}", text) for text in found), found
    assert len({*found}) > 3


# ---------------------------------------------------------------- what is refused

REFUSED: list[tuple[Callable[[Any], Grammar], Any, str]] = [
    (regex, "", "regex: the pattern is empty"),
    (regex, "^$", "regex: the pattern is empty"),
    (regex, "a\\", "ends with a backslash"),
    (regex, "x(?=a)", r"'\(\?=a\)' looks ahead or behind, which is not supported"),
    (regex, "(?<!a)b", "looks ahead or behind"),
    (regex, r"(a)\1", "refers back to a group"),
    (regex, "(?P<n>a)(?P=n)", "refers back to a group"),
    (regex, r"\bab", "boundary of words"),
    (regex, "(^a)", "anchor inside"),
    (regex, "a$b", "anchor inside"),
    (regex, "a*+b", "possessive"),
    (regex, "a{2}+b", "possessive"),
    (regex, "(?>a)", "atomic group"),
    (regex, "(?#c)a", "comment"),
    (regex, "(?(1)a|b)", "condition"),
    (regex, "(?x)a b", "flag other than i and s"),
    (regex, "a(?-u:b)", "flag other than i and s"),
    (regex, "a" * 2001, "2001 characters; at most 2000"),
    (regex, "(" * 51 + "a" + ")" * 51, "51 groups inside each other; at most 50"),
    (regex, "((ab{9}){99}c){99}", "repetitions written out; at most 10000"),
    (regex, "\ud800", "half a character"),
    (regex, "a\0", "NUL"),
    (choice, [], "choice: give at least one text"),
    (choice, "yes", "put a single one into a list"),
    (choice, ["a", ""], r"choice\[1\] is empty"),
    (choice, ["a", "b", "a"], "choice: 'a' is given 2 times"),
    (choice, ["a", "\udc00"], r"choice\[1\]: it has half a character"),
    (choice, [str(number) for number in range(5001)], "5001 texts; at most 5000"),
    (choice, ["a" * 200_001], "200001 characters; at most 200000"),
    (grammar, "", "no rule that is named start"),
    (grammar, 'root ::= "a"', "line 1: '::=': this is no Lark"),
    (grammar, "start: 'a'", "line 1: .*double quotes"),
    (grammar, 'start: "a" x', "start needs 'x', which is not defined"),
    (grammar, 'start: "a" start', "no text that begins with start ever ends"),
    (grammar, 'start: ("a" (b | start))\nb: c\nc: b', "ever ends"),
    (grammar, 'start: ("a"', "not in pairs"),
    (grammar, 'start: "a")', "not in pairs"),
    (grammar, 'start: "a" )(', "closes nothing"),
    (grammar, 'start: "a"\n}\nevil: {', "closes nothing|not in pairs|beginning of a rule"),
    (grammar, '"a" start: b', "line 1: '\"a\"' is not the beginning"),
    (grammar, 'start "a"', "after start comes a colon, not '\"a\"'"),
    (grammar, "start", "after start comes a colon, not 'nothing'"),
    (grammar, "start: <|user|>", "line 1: '<|user|>': special tokens"),
    (grammar, 'start: "a"\nb: <[1-9]>', "line 2: .*special tokens"),
    (grammar, "start: @other", "other grammars"),
    (grammar, "start: a::0x0", "parameters"),
    (grammar, "start[max_tokens=3]: /a*/", "option of a rule"),
    (grammar, "start[capture]: /a*/", "after start comes a colon"),
    (grammar, '%llguidance {"allow_invalid_utf8": true}\nstart: "a"', "'%llguidance' is not"),
    (grammar, 'start: %lark { start: "a" }', "'%lark' is not supported"),
    (grammar, "start: %regex {}", "'%regex' is not supported"),
    (grammar, "%declare A\nstart: A", "'%declare' is not supported"),
    (grammar, "%import os.path\nstart: path", "line 1: %import takes"),
    (grammar, "%import common\nstart: INT", "line 1: %import takes"),
    (grammar, "start: A\nA: ~/a/", "~ comes only after &"),
    (grammar, "start: /a/x", "flags 'x'"),
    (grammar, "start: /(?!a)b/", "line 1: .*looks ahead"),
    (grammar, 'start: "a"{10001}', "10001 is not a number of repetitions from 0 to 10000"),
    (grammar, 'start: %json {"x-guidance": {}}', "line 1: %json: #/x-guidance"),
    (grammar, 'start: %json {"minItems": 501}', "minItems is 501; at most 500"),
    (grammar, "start: %json [1]", "not an object"),
    (grammar, 'start: %json {"a": ', "line 1: %json: Expecting value"),
    (grammar, f"start: %json {'[' * 100_000}", "line 1: %json: "),
    (grammar, f"start: {'(' * 51}{')' * 51}", "more than 50 groups"),
    (grammar, "".join(f'r{n}: "a"\n' for n in range(501)), "501 rules; at most 500"),
    (grammar, "start: " + '"a" ' * 10_001, "symbols; at most 10000"),
    (grammar, "a" * 200_001, "200001 characters; at most 200000"),
    (grammar, 'start: "\ud800"', "half a character"),
]


@pytest.mark.parametrize(("make", "given", "named"), REFUSED)
def test_what_is_not_supported_or_too_large_is_refused_by_name(make, given, named):
    with pytest.raises(labs.InputError, match=named) as caught:
        make(given)
    assert kit.is_one_sentence(caught.value)
    assert len(str(caught.value)) < 300


NOT_COMPILED = [
    (regex, r"[^\s\S]", "regex: no answer satisfies it"),
    (regex, "(a", "regex: unclosed group"),
    (regex, "a{,3}", "regex: repetition quantifier expects a valid decimal"),
    (regex, r"\p{nope}", "regex: Unicode property not found"),
    (grammar, 'start: "a"\nstart: "b"', 'grammar: duplicate rule: "start"'),
    (grammar, "start: A\nA: B\nB: A | /b/", "grammar: circular reference in token"),
    (grammar, "%import common.NOPE\nstart: NOPE", "grammar: Unknown common regex"),
    (grammar, 'start: %json {"not": {"minimum": 1}}', "grammar: .*Unimplemented keys"),
]


@pytest.mark.parametrize(("make", "given", "named"), NOT_COMPILED)
def test_what_the_compiler_refuses_is_one_sentence(tiny, make, given, named):
    with pytest.raises(labs.InputError, match=named) as caught:
        labs_typed.Constraint(tiny, make(given))
    assert "%llguidance" not in str(caught.value)


def test_a_grammar_that_kills_its_compiler_is_refused_by_the_parent():
    without = " & ".join(f"~/(.|\\n)*{letter}(.|\\n)*/" for letter in "abcdefghijklmnopqrst")
    deadly = grammar(f"start: A\nA: /(.|\\n)*/ & {without}")
    assert "too large to compile within 2 s of CPU time" in labs_schema.trial(deadly.text)


# ---------------------------------------------------------------- beside reasoning and tools


@pytest.fixture(scope="module")
def thinking(tmp_path_factory) -> labs.Model:
    """A model whose template shows reasoning and calls, as Qwen's."""
    tokenizer, config = wire_forms.tokenizer_of("hermes"), kit.llama()
    config.vocab_size = len(tokenizer)
    folder = tmp_path_factory.mktemp("thinking")
    kit.save_model(folder, config)
    return msgspec.structs.replace(kit.load(folder), tokenizer=tokenizer)


ASK = [{"role": "user", "content": "Which city?"}]
HELD = [choice(["Paris", "Rome"]), regex("(Paris|Rome)"), grammar('%ignore / /\nstart: "Paris"')]
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


@pytest.mark.parametrize("held", HELD, ids=lambda held: held.what)
@pytest.mark.parametrize("tools", [[], [TOOL]], ids=["", "with a tool"])
def test_the_text_after_the_reasoning_is_held_and_the_reasoning_is_free(thinking, held, tools):
    asked = labs_tools.Asked(schema=held, tools=tools)
    inputs = labs.build_inputs(thinking, messages=ASK, tools=asked.tools)
    plan = labs_tools.plan(thinking, inputs, HOT, asked)
    (only, *_), start = plan.processors(), [*inputs.input_ids]
    only(start, torch.zeros(len(thinking.tokenizer)))
    for text in ("Paris", "<think>\nRome or Oslo?\n</think>\n\nParis"):
        ids = thinking.tokenizer.encode(text, add_special_tokens=False)
        for count in range(len(ids) + 1):
            logits = only([*start, *ids[:count]], torch.zeros(len(thinking.tokenizer)))
            allowed = {*torch.isfinite(logits).nonzero()[:, 0].tolist()}
            assert count == len(ids) or ids[count] in allowed, (text, count)
        assert thinking.eos_token_ids <= allowed
    (first,) = thinking.tokenizer.encode("O", add_special_tokens=False)
    assert first not in {*torch.isfinite(only(start, logits)).nonzero()[:, 0].tolist()}


def test_a_fault_beside_tools_names_both(thinking):
    inputs = labs.build_inputs(thinking, messages=ASK, tools=[TOOL])
    asked = labs_tools.Asked(schema=regex("(a"), tools=[TOOL])
    with pytest.raises(labs.InputError, match="tools and regex: unclosed group"):
        labs_tools.plan(thinking, inputs, HOT, asked)


# ---------------------------------------------------------------- HTTP, files and the shell


@pytest.fixture
def site(tiny) -> Iterator[Any]:
    engine = labs_engine.Engine(tiny)
    yield kit.Site(engine, kit.configured(generation=HOT))
    engine.close()


def test_openais_client_sends_them_as_to_vllm(site):
    client, messages = site.sdk(), [{"role": "user", "content": "hi"}]
    asked: dict[str, Any] = {"model": "tiny", "extra_body": {"structured_outputs": {}}}
    asked["extra_body"]["structured_outputs"] = {"regex": "(ab){2,3}"}
    assert re.fullmatch(
        "(ab){2,3}", client.completions.create(prompt="hi", **asked).choices[0].text
    )
    asked["extra_body"]["structured_outputs"] = {"choice": ["yes", "no"]}
    found = client.chat.completions.create(messages=messages, n=3, **asked).choices
    assert {each.message.content for each in found} <= {"yes", "no"}
    chunks = client.chat.completions.create(messages=messages, stream=True, **asked)
    text = "".join(each.choices[0].delta.content or "" for each in chunks if each.choices)
    assert text in ("yes", "no")


WRONG = [
    ({"structured_outputs": {"regex": "(?=a)"}}, "regex", "looks ahead"),
    ({"structured_outputs": {"choice": ["a", "a"]}}, "choice", "2 times"),
    ({"structured_outputs": {"grammar": "start: <eos>"}}, "grammar", "special tokens"),
    ({"structured_outputs": {"json": "{"}}, "structured_outputs", "json is not a JSON schema"),
    ({"structured_outputs": {"json": "[" * 99_999}}, "structured_outputs", "json is not a JSON"),
    ({"structured_outputs": {"json": {"not": {"minimum": 1}}}}, "schema", "not"),
    ({"structured_outputs": {"structural_tag": "x"}}, "structural_tag", "structural_tag"),
    ({"structured_outputs": {"regex": 5}}, "structured_outputs.regex", "Expected `str | null`"),
    ({"structured_outputs": {"choice": "ab"}}, "structured_outputs.choice", "Expected `array"),
    ({"structured_outputs": {}}, "structured_outputs", "give exactly one of json, "),
    ({"guided_regex": "a"}, "guided_regex", "use structured_outputs"),
]


@pytest.mark.parametrize(("body", "param", "named"), WRONG)
@pytest.mark.parametrize("path", [kit.CHAT, kit.COMPLETIONS])
def test_a_wrong_one_is_a_400_that_names_it(site, path, body, param, named):
    asked = {"messages": kit.HELLO} if path == kit.CHAT else {"prompt": "hi"}
    error = kit.error_of(site.post(path, {**asked, **body, "stream": True}), 400)
    assert named in error["message"]
    assert error["param"] == param


def test_a_message_cannot_be_continued_under_a_grammar(site):
    messages = [*kit.HELLO, {"role": "assistant", "content": "ab"}]
    asked = {"messages": messages, "continue_final_message": True, "add_generation_prompt": False}
    for form in (
        {"structured_outputs": {"regex": "abc"}},
        {"response_format": {"type": "json_object"}},
    ):
        error = kit.error_of(site.post(kit.CHAT, {**asked, **form}), 400)
        assert error["param"] == "continue_final_message"


def test_lines_of_a_file_hold_them_and_are_replayed(tiny):
    held = [{"regex": "[ab]{3}"}, {"choice": ["x"]}, {"grammar": 'start: "a" | "b"'}]
    lines: list[Any] = [{"prompt": "hi", "structured_outputs": each} for each in held]
    lines.append(kit.openai_line("o", messages=kit.HELLO, structured_outputs={"regex": "z"}))
    rows = kit.answers(tiny, lines, labs.Config(generation=HOT), ordered=True)
    assert re.fullmatch("[ab]{3}", rows[0]["text"])
    assert rows[1]["text"] == "x"
    assert rows[2]["text"] in ("a", "b")
    assert rows[3]["response"]["body"]["choices"][0]["message"]["content"] == "z"
    config = labs.Config(generation=HOT)
    assert [each.verdict for each in kit.replayed(tiny, rows, config)] == ["same"] * 4


def test_the_shell_reads_a_grammar_from_a_file_and_lets_flags_exclude_each_other(tiny_folder):
    Path("a.lark").write_text('start: "a"{3}\n', encoding="utf-8")
    model = ("--model", str(tiny_folder), "--torch-dtype", "fp32", "--prompt", "hi")
    found = json.loads(kit.invoke(*model, "--grammar", "a.lark", "--json").stdout)
    assert found["text"] == "aaa"
    assert found["request"]["structured_outputs"]["grammar"] == 'start: "a"{3}'
    for flags in (("--regex", "a", "--one-of", "b"), ("--schema", "x", "--grammar", "a.lark")):
        done = kit.invoke(*model, *flags)
        assert (done.exit_code, "exclude each other" in done.stderr) == (2, True)
    done = kit.invoke(*model, "--grammar", "nope.lark")
    assert (done.exit_code, "nope.lark" in done.stderr) == (1, True)
