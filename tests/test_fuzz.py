# SPDX-License-Identifier: Apache-2.0
"""Untrusted input against native code: schemas, grammars, chat templates and SQLite's search.

Cases are made from seeds. Schemas and grammars run in separate processes, because a fault ends a
process: `python tests/test_fuzz.py trial SCHEMA SEED` shows one, as does GRAMMAR.
`pytest -m long tests/test_fuzz.py` runs the many.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import json
import os
import random
import re
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import labs
import labs_keywords
import labs_schema
import labs_structured

FEW = int(os.environ.get("LABS_FUZZ", "250"))
MANY = int(os.environ.get("LABS_FUZZ_LONG", "200000"))
FIRST = int(os.environ.get("LABS_FUZZ_SEED", "0"))

# ---------------------------------------------------------------- schemas

# fmt: off
NUMBERS = [0, -0.0, 1, -1, 2, 3, 7, 10, 0.1, 0.5, 1e-9, 1e308, -1e308, 5e-324, 1e16, 2**31, 2**32]
NUMBERS += [2**31 - 1, 2**53 - 1, -(2**53) + 1, 2**53, -(2**63), 2**63, 2**64, -(2**64), 10**400]
NUMBERS += [float("nan"), float("inf"), 97, 499, 501, 997, 1000, 9999, 10_000, 99_999, 12345.678]
TEXTS = ["", "a", "é", "\0", "\ud800", "\udfff\ud800", '"', "\\", "\n", "😀", "a" * 300, "~0"]
TEXTS += ["~1/", "#", "$ref", "\u202e", "\uffff", "{", "]", "null", "a\x7f", "İ", "ﬁ", "%25"]
ATOMS = ["a", "b", ".", "x", "é", "😀", " ", *"^$|{}[]()\\\0", "[]", "[^]", "[a-z]", "[^a-z]"]
ATOMS += ["[\\w-]", "[z-a]", "[[:alpha:]]", "(?=a)", "(?!a)", "(?<=a)", "(?<!b)", "(?i)a"]
ATOMS += ["(?x) a #", "(?:)", "(?P<n>a)", "()", "\\p{L}", "\\p{Lu}", "\\P{N}", "\\p{Greek}"]
ATOMS += ["\\p{nope}", *(f"\\{each}" for each in (*"dwsSWbBnAz1", "x41", "u0041", "k<x>"))]
TIMES = ["", "", "", "*", "+", "?", "*?", "+?", "??", "{0}", "{3}", "{0,}", "{2,1}", "{4294967296}"]
TIMES += ["{9}{99}", "{1,100}", "{100}", "{1000}", "{0,1000}", "{10000}", "{99999}", "**"]
FORMATS = ["date", "time", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "uri"]
FORMATS += ["uuid", "regex", "json-pointer", "idn-email", "nope", "", "unknown\0"]
TYPES = ["string", "integer", "number", "boolean", "null", "array", "object", "any", ""]
POINTERS = ["#", "#/", "#/$defs/a", "#/$defs/b", "#/$defs/c", "#/$defs/a~1b", "#/%24defs/a", "//"]
POINTERS += ["#/-1", "#/$defs/no", "#/properties/a", "#/allOf/0", "#/anyOf/1", "#a", "http://x/"]
NUMERIC = ["minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "minLength"]
NUMERIC += ["maxLength", "minItems", "maxItems", "minProperties", "maxProperties", "minContains"]
INNER = ["items", "additionalProperties", "additionalItems", "unevaluatedProperties", "contains"]
INNER += ["not", "if", "then", "else", "propertyNames", "unevaluatedItems", "contentSchema"]
LISTS = ["anyOf", "oneOf", "allOf", "prefixItems", "items"]
MAPS = ["properties", "patternProperties", "$defs", "definitions", "dependentSchemas"]
ODD = ["uniqueItems", "contentEncoding", "x-guidance", "$id", "$anchor", "$dynamicRef", "nullable"]
MARKS = ["<bos>", "<eos>", "<end>", "<|user|>", "<|assistant|>", "{{ 1/0 }}", "{% raise %}", "{#"]
WORDS = ["whale", "WHALE", "or", "AND", "NOT", "NEAR(", "NEAR/3", "words:", "heading :", *"^*-+()'"]
WORDS += ['"', ";", '""', "--", "DROP TABLE chunks", "rowid", "{heading}", "İ", "ß", "x" * 999]
# fmt: on


def pattern(chance: random.Random, depth: int = 0) -> str:
    pieces = []
    for _ in range(chance.randint(0, 4)):
        inner = depth < 3 and chance.random() < 0.3
        atom = f"({pattern(chance, depth + 1)})" if inner else chance.choice(ATOMS)
        pieces.append(atom + chance.choice(TIMES if chance.random() < 0.5 else TIMES[:6]))
    text = chance.choice(["", "|"]).join(pieces)
    text = text * chance.choice([1, 1, 1, 1, 20, 400]) if chance.random() < 0.05 else text
    return f"^{text}$" if not depth and chance.random() < 0.5 else text


def value(chance: random.Random, depth: int = 0) -> Any:
    kind = chance.randrange(8 if depth < 3 else 5)
    if kind < 5:
        return chance.choice([NUMBERS, NUMBERS, TEXTS, TEXTS, [None, True, False, [], {}]][kind])
    if kind < 7:
        return [value(chance, depth + 1) for _ in range(chance.choice([0, 1, 2, 3, 40]))]
    return {chance.choice(TEXTS): value(chance, depth + 1) for _ in range(chance.randint(0, 3))}


def keyword(chance: random.Random, depth: int) -> tuple[str, Any]:
    inner = functools.partial(schema, chance, depth + 1)
    some = chance.choice([0, 1, 2, 2, 3, 5])
    names = [chance.choice(["a", "b", "c", "d", "pattern", *TEXTS]) for _ in range(some)]
    keys = names if chance.random() < 0.7 else [pattern(chance) for _ in names]
    choices: list[Callable[[], tuple[str, Any]]] = [
        lambda: ("type", chance.choice([*TYPES, [*chance.choices(TYPES, k=2)], 5])),
        lambda: (chance.choice(NUMERIC), chance.choice(NUMBERS)),
        lambda: (chance.choice(NUMERIC), chance.randint(0, 40)),
        lambda: ("pattern", pattern(chance)),
        lambda: ("format", chance.choice(FORMATS)),
        lambda: ("const", value(chance)),
        lambda: ("enum", [value(chance) for _ in range(some)]),
        lambda: ("required", [*names, *(["a"] if chance.random() < 0.5 else [])]),
        lambda: ("$ref", chance.choice(POINTERS)),
        lambda: (chance.choice(INNER), inner()),
        lambda: (chance.choice(LISTS), [inner() for _ in range(some)]),
        lambda: (chance.choice(MAPS), {name: inner() for name in keys}),
        lambda: (chance.choice(MAPS), {name: inner() for name in ("a", "b", "c")}),
        lambda: (chance.choice(ODD), value(chance)),
        lambda: (chance.choice([*NUMERIC, *INNER, *LISTS, *MAPS, "required"]), value(chance)),
    ]
    return chance.choice(choices)()


def schema(chance: random.Random, depth: int = 0) -> Any:
    """Make a schema that is likely to be wrong or too large in one of many ways."""
    if depth > 5 or chance.random() < 0.06:
        return chance.choice([True, False, {}, None, [], {"type": "null"}, {"$ref": "#"}])
    found = dict(keyword(chance, depth) for _ in range(chance.choice([1, 1, 2, 3, 5])))
    return large(chance, found) if not depth and chance.random() < 0.1 else found


def large(chance: random.Random, inner: dict[str, Any]) -> dict[str, Any]:
    """Make a schema large: deep, wide, or with a long chain of references."""
    size = chance.choice([20, 60, 120, 350, 900, 3000])
    names = [f"d{number}" for number in range(size)]
    wraps: list[Callable[[Any], Any]] = [
        *(lambda s: {"anyOf": [s, {"type": "null"}]}, lambda s: {"allOf": [s]}),
        *(lambda s: {"type": "array", "items": s}, lambda s: {"not": s}),
        lambda s: {"type": "object", "properties": {"a": s}},
    ]
    wrap = chance.choice(wraps)
    if (kind := chance.randrange(41) // 8) == 0:
        return functools.reduce(lambda found, _: wrap(found), range(size), inner)
    if kind < 3:  # each definition refers to the next one, once or twice
        twice = wrap if kind == 1 else lambda s: {"allOf": [s] * 2}
        defs = {a: twice({"$ref": f"#/$defs/{b}"}) for a, b in itertools.pairwise(names)}
        return {"$ref": "#/$defs/d0", "$defs": {**defs, names[-1]: inner}}
    if kind == 3:
        needed = chance.choice([[], names, names[::2]])
        return {"type": "object", "properties": dict.fromkeys(names, inner), "required": needed}
    if kind == 4:
        return {chance.choice(["anyOf", "allOf", "oneOf", "enum", "prefixItems"]): [inner] * size}
    primes = [p for p in range(2, size) if all(p % d for d in range(2, p))][: chance.randint(1, 8)]
    return {"allOf": [{"type": "integer", "multipleOf": p} for p in primes]}


# ---------------------------------------------------------------- patterns, choices, grammars

# fmt: off
NAMES = ["start", "start", "a", "a", "b", "c", "?b", "_c", "A", "A", "B", "_C", "A-B", "INT", "d"]
MARKED = ['"', "'", "/", "<", ">", "<end>", "<[256]>", "<[*]>", "@a", "::", "::=", "=", "%", "é"]
MARKED += ["%lark {", "%json", "%regex {}", "%llguidance {}", "%declare A", "->", "~", "&", "|"]
MARKED += ["\n", "\r", "#", "// <end>", "{", "}", "{2,1}", "{99999}", "{0}", "[lazy]", "[stop=a]"]
MARKED += ["~0..3", "%if", "\\", "start: ", "%ignore", "%json {}"]
COMMON = ["INT", "(INT, WS)", "NOPE", "NUMBER -> A", "ESCAPED_STRING", "WS", "_EXP", "C_COMMENT"]
# fmt: on


def mild(chance: random.Random) -> str:
    """Return a pattern that is seldom refused before it is compiled."""
    found = pattern(chance)
    if chance.random() < 0.8:
        found = re.sub(r"[\^$/\0]|\\[bBAzk1](<x>)?|\(\?[=!<][^)]*\)|\(\?x\) a #", "", found) or "a"
        found = re.sub(r"([*+?}])\+", r"\1", found).rstrip("\\") or "b"
    return found


def symbol(chance: random.Random, depth: int) -> str:
    kind = chance.randrange(14 if depth < 4 else 9)
    if kind < 3:
        return chance.choice(NAMES[:9])
    if kind < 5:
        return f'"{chance.choice([*"ab1+({ ", "<end>", "é", "é😀", "x" * 40, ""])}"'
    if kind < 7:
        return f"/{mild(chance).replace('/', '')}/{chance.choice([*[''] * 9, 'i', 's', 'x'])}"
    if kind < 8:
        return chance.choice(MARKED) if chance.random() < 0.2 else '"a".."z"'
    if kind < 9:
        return f"%json {json.dumps(schema(chance, 4))}"
    first, last = chance.choice(["()", "()", "[]"])
    return f"{first}{expansion(chance, depth + 1)}{last}"


def expansion(chance: random.Random, depth: int = 0) -> str:
    joined = [" ", " ", " ", " | ", "\n | ", " & ", " & ~"]
    found = symbol(chance, depth)
    for _ in range(chance.choice([0, 0, 1, 1, 2, 3])):
        found += chance.choice(TIMES[:6] if chance.random() < 0.9 else TIMES)
        found += chance.choice(joined[:5] if chance.random() < 0.95 else joined)
        found += symbol(chance, depth)
    return found


def lark(chance: random.Random) -> str:
    """Make a grammar that is likely to be wrong, too large or of no text in one of many ways."""
    names = {"start", *(NAMES[2:10] if chance.random() < 0.7 else chance.choices(NAMES, k=2))}
    lines = [f"{name}: {expansion(chance)}" for name in sorted(names)]
    lines += [f"%ignore {symbol(chance, 4)}"] * (chance.random() < 0.2)
    lines += [f"%import common.{chance.choice(COMMON)}"] * (chance.random() < 0.2)
    lines += [f"{chance.choice(NAMES)}{chance.choice(MARKED)}"] * (chance.random() < 0.1)
    found = "\n".join(chance.sample(lines, len(lines)))
    if chance.random() < 0.1:  # a piece of it somewhere else
        at, to = sorted(chance.choices(range(len(found) + 1), k=2))
        found = found[:at] + chance.choice(MARKED) + found[to:] + found[at:to]
    return found


def grammar(chance: random.Random) -> labs_structured.Grammar:
    """Return a random pattern, choice or grammar. Raises InputError for what is refused."""
    if (kind := chance.randrange(6)) < 2:
        return labs_structured.regex(mild(chance))
    if kind == 2:
        texts = chance.sample([*TEXTS, *MARKS, *ATOMS], chance.choice([1, 2, 9, 50]))
        return labs_structured.choice([each for each in texts if chance.random() < 0.1 or each])
    return labs_structured.grammar(lark(chance))


# ---------------------------------------------------------------- processes


def text_of(kind: str, seed: int) -> str:
    """Return a random case as it is compiled, a schema or a grammar."""
    chance = random.Random(seed)
    return labs_keywords.checked(schema(chance)) if kind == "schema" else grammar(chance).text


def try_case(kind: str, seed: int, survived: bool) -> str:
    """Return "measured" (refused without compiling it), "wrong", "panic" or "fit".

    survived: the case survived a trial, so it is compiled without the limit of CPU time.
    """
    import resource

    library = importlib.import_module("llguidance")
    if not survived:
        most = int(sum(resource.getrusage(resource.RUSAGE_SELF)[:2])) + 1 + labs_schema.TRIAL_CPU_S
        resource.setrlimit(resource.RLIMIT_CPU, (most, resource.RLIM_INFINITY))
    try:
        text = text_of(kind, seed)
    except (labs_schema.SchemaError, labs.InputError):
        return "measured"
    fault = labs_schema.steps(library, text, seed if survived else 0)
    return ("panic" if "Panic" in fault else "wrong") if fault else "fit"


def main(stage: str, kind: str, *seeds: str) -> None:
    """Try these seeds or those on stdin; print each before its trial and its verdict after it."""

    def work() -> None:
        for seed in map(int, seeds or sys.stdin.read().split()):
            print(seed, end=" ", flush=True)
            print(try_case(kind, seed, stage == "survived"), flush=True)

    threading.stack_size(labs_schema.TRIAL_STACK if stage == "trial" else 2**23)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


def verdicts(stage: str, kind: str, seeds: list[int]) -> dict[int, str]:
    """Return the verdict of each seed from processes that may die: "died" is a verdict too."""
    found: dict[int, str] = {}
    command = [sys.executable, __file__, stage, kind]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    while seeds:
        numbers = " ".join(map(str, seeds))
        done = subprocess.run(command, input=numbers, stdout=-1, text=True, env=environment)
        lines = [line.split() for line in done.stdout.splitlines()]
        found |= {int(seed): (rest or [f"died {done.returncode}"])[0] for seed, *rest in lines}
        if seeds[0] not in found:
            raise RuntimeError(f"no work at {stage} was done: {done.returncode}")
        seeds = [seed for seed in seeds if seed not in found]
    return found


def some(many: int) -> Any:
    """Run a test with a few seeds, and on demand with many."""
    seeds = [range(FIRST, FIRST + FEW), range(FIRST, FIRST + many)]
    long = pytest.param(seeds[1], marks=pytest.mark.long, id="many")
    return pytest.mark.parametrize("seeds", [pytest.param(seeds[0], id="few"), long])


@some(MANY)
@pytest.mark.parametrize("kind", ["schema", "grammar"])
def test_a_server_survives_each_case_that_a_trial_survives(kind: str, seeds: range) -> None:
    tried = verdicts("trial", kind, [*seeds])
    fit = [seed for seed, verdict in tried.items() if verdict in ("fit", "wrong")]
    served = verdicts("survived", kind, fit)
    assert {*served.values()} <= {"fit", "wrong"}, served
    kinds = Counter(tried.values())
    assert min(kinds[kind] for kind in ("measured", "wrong", "fit")) > len(seeds) // 20


# ---------------------------------------------------------------- templates and searches


TEMPLATES = [
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<end>{% endfor %}",
    "{% for m in messages %}{{ m['content'] | trim | upper }}{{ loop.index0 }}{% endfor %}x",
    "{% if messages[0].role == 'system' %}{{ raise_exception(messages[0].content) }}{% endif %}x",
    "{% for m in messages %}{{ m.content.split('<end>')[-1] | tojson }}{{ m.name }}{% endfor %}",
    "{{ messages[1].content[:9] + messages | length }}",
]


def text(chance: random.Random) -> str:
    known = [*TEXTS, *MARKS, *WORDS, chr(chance.randrange(sys.maxunicode))]
    some = chance.choices(known, k=chance.randint(0, 9))
    return chance.choice(["", " "]).join(some) * chance.choice([1, 1, 1, 1, 1, 2, 30])


def is_answered(work: Callable[..., Any], *given: Any, **words: Any) -> bool:
    """Return whether the work succeeds rather than raises an error of labs."""
    try:
        work(*given, **words)
    except labs.LabsError:
        return False
    return True


@some(MANY // 10)
def test_each_chat_is_answered_or_refused(seeds: range) -> None:
    import kit  # which imports torch; the processes for schemas do without it

    words: dict[str, Any] = {"spec": labs.ModelSpec(model_name="x"), "lock": threading.Lock()}
    models: Any = [SimpleNamespace(tokenizer=kit.byte_tokenizer(t), **words) for t in TEMPLATES]
    roles = [*["user", "assistant", "system"] * 9, "tool", "", "\0", None]
    found = set()
    for chance in map(random.Random, seeds):
        messages: Any = [
            {"role": chance.choice(roles), "content": text(chance)}
            for _ in range(chance.randint(0, 4))
        ]
        messages += [value(chance)] if chance.random() < 0.1 else []
        given = {"prompt": text(chance)} if chance.random() < 0.2 else {"messages": messages}
        found.add(is_answered(labs.build_inputs, chance.choice(models), **given))
    assert found == {True, False}


@some(MANY // 10)
def test_each_search_is_answered_or_refused(seeds: range, folder: Path) -> None:
    import labs_rag

    for number in range(20):
        words = " ".join(text(random.Random(number)) for _ in range(9))
        (folder / f"{number}.md").write_text(f"# {words[:40]}\n{words}", "utf-8", "replace")
    labs_rag.index([str(folder)], "words.db")
    for chance in map(random.Random, seeds):
        assert is_answered(labs_rag.search, "words.db", text(chance))


# ---------------------------------------------------------------- bodies of requests


CHAT = ["messages", "tools", "chat_template_kwargs", "reasoning_effort", "model"]
CHAT += ["add_generation_prompt", "continue_final_message", "nope"]
FIELDS = {
    "/tokenize": ["prompt", "content", *CHAT, "add_special_tokens", "add_special"],
    "/detokenize": ["tokens", "tokens", "tokens", "model", "nope"],
    "/apply-template": ["messages", "messages", *CHAT],
    "/v1/completions": ["prompt", "prompt", "echo", "max_tokens", "logprobs", "n", "stream"],
}
FIELDS["/tokenize"] += ["parse_special", "with_pieces", "return_token_strs"]
FIELDS["/v1/completions"] += ["stop", "seed", "min_tokens", "logit_bias", "skip_special_tokens"]
ASKED: list[Any] = [{"role": "user", "content": "é<end>"}]
LIKELY: dict[str, list[Any]] = {
    "prompt": ["a", "é<end>", [97, 98], ["a", "b"], [[97], [98]]],
    "max_tokens": [0, 0, 1, None, -1],
    "logprobs": [0, 1, 20, 21, None],
    "n": [1, 2, None],
    "messages": [ASKED, [{"role": "user", "content": [{"type": "text", "text": "é"}]}], []],
    "tokens": [[97, 98], [300], [], [2**31]],
    "content": ["a", "é<end>", ""],
    "model": ["tiny", "auto", None],
    "chat_template_kwargs": [{"flag": 1}, {}, {"messages": []}],
    "tools": [[{"type": "function", "function": {"name": "f"}}], []],
}


def body(chance: random.Random, path: str) -> bytes:
    """Make a body that is likely to be right but for a field, or not JSON at all."""
    names = [*chance.choices(FIELDS[path], k=chance.randint(0, 4)), FIELDS[path][0]]
    likely = {name: chance.choice(LIKELY.get(name, [True, False, None])) for name in names}
    found = {k: value(chance) if chance.random() < 0.15 else v for k, v in likely.items()}
    sent = json.dumps(found).encode()
    return sent[: chance.randrange(len(sent))] if chance.random() < 0.03 else sent


@pytest.mark.parametrize("path", FIELDS)
@some(MANY // 20)
def test_each_body_is_answered_or_refused(path: str, seeds: range, tiny: labs.Model) -> None:
    import kit

    statuses = Counter[int]()
    template = "{{ flag }}{{ tools }}" + kit.TEMPLATE
    fake = kit.FakeEngine(kit.with_template(tiny, template))
    site = kit.Site(fake, kit.configured())
    for chance in map(random.Random, seeds):
        sent = body(chance, path)
        statuses[site.post(path, sent).status_code] += 1
    assert {*statuses} <= {200, 400, 404}
    assert min(statuses[200], statuses[400]) > len(seeds) // 20


if __name__ == "__main__":
    main(*sys.argv[1:])
