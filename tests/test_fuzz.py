# SPDX-License-Identifier: Apache-2.0
"""What strangers send against native code: schemas, chat templates and SQLite's full-text search.

Cases are made from seeds and run in processes of their own, since what goes wrong ends a process:
`python test_labs_fuzz.py KIND SEED` shows one. `pytest -m long test_labs_fuzz.py` runs the many.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import os
import random
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import kit
import pytest

import labs_schema

FEW = int(os.environ.get("LABS_FUZZ", "2000"))
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
ATOMS += ["(?x) a #", "(?:)", "(?P<n>a)", "()"]
ATOMS += [*(f"\\{each}" for each in (*"dwsSWbBnAz1", "x41", "u0041", "k<x>"))]
ATOMS += ["\\p{L}", "\\p{Lu}", "\\P{N}", "\\p{Greek}", "\\p{nope}"]
TIMES = ["", "", "", "*", "+", "?", "*?", "+?", "??", "{0}", "{3}", "{0,}", "{2,1}", "{4294967296}"]
TIMES += ["{9}{99}", "{1,100}", "{100}", "{1000}", "{0,1000}", "{10000}", "{99999}", "**"]
FORMATS = ["date", "time", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "uri"]
FORMATS += ["uuid", "regex", "json-pointer", "idn-email", "nope", "", "unknown\0"]
TYPES = ["string", "integer", "number", "boolean", "null", "array", "object", "any", ""]
POINTERS = ["#", "#/", "#/$defs/a", "#/$defs/b", "#/$defs/c", "#/$defs/a~1b", "#/%24defs/a", "//"]
POINTERS += ["#/-1", "#/$defs/no", "#/properties/a", "#/allOf/0", "#/anyOf/1", "#a", "http://x/", "file:///x"]
NUMERIC = ["minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "minLength"]
NUMERIC += ["maxLength", "minItems", "maxItems", "minProperties", "maxProperties", "minContains"]
INNER = ["items", "additionalProperties", "additionalItems", "unevaluatedProperties", "contains"]
INNER += ["not", "if", "then", "else", "propertyNames", "unevaluatedItems", "contentSchema"]
LISTS = ["anyOf", "oneOf", "allOf", "prefixItems", "items"]
MAPS = ["properties", "patternProperties", "$defs", "definitions", "dependentSchemas"]
ODD = ["uniqueItems", "contentEncoding", "x-guidance", "$id", "$anchor", "$dynamicRef", "nullable"]
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
    if kind < 2:
        return chance.choice(NUMBERS)
    if kind < 4:
        return chance.choice(TEXTS)
    if kind == 4:
        return chance.choice([None, True, False, [], {}])
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
        lambda: (
            chance.choice([*NUMERIC, *INNER, *LISTS, *MAPS, "required", "enum"]),
            value(chance),
        ),
    ]
    return chance.choice(choices)()


def schema(chance: random.Random, depth: int = 0) -> Any:
    """Make a schema that is likely to be wrong, or too much, in one of many ways."""
    if depth > 5 or chance.random() < 0.06:
        return chance.choice([True, False, {}, None, [], {"type": "null"}, {"$ref": "#"}])
    found = dict(keyword(chance, depth) for _ in range(chance.choice([1, 1, 2, 3, 5])))
    return large(chance, found) if not depth and chance.random() < 0.1 else found


def large(chance: random.Random, inner: dict[str, Any]) -> dict[str, Any]:
    """Make much of a schema: deep, wide, or a long way of references."""
    size = chance.choice([20, 60, 120, 350, 900, 3000])
    names = [f"d{number}" for number in range(size)]
    wraps: list[Callable[[Any], Any]] = [
        lambda s: {"anyOf": [s, {"type": "null"}]},
        lambda s: {"allOf": [s]},
        lambda s: {"type": "array", "items": s},
        lambda s: {"type": "object", "properties": {"a": s}},
        lambda s: {"not": s},
    ]
    wrap = chance.choice(wraps)
    if (kind := chance.randrange(41) // 8) == 0:
        return functools.reduce(lambda found, _: wrap(found), range(size), inner)
    if kind == 1:
        defs = {a: wrap({"$ref": f"#/$defs/{b}"}) for a, b in itertools.pairwise(names)}
        return {"$ref": "#/$defs/d0", "$defs": {**defs, names[-1]: inner}}
    if kind == 2:
        twice = {a: {"allOf": [{"$ref": f"#/$defs/{b}"}] * 2} for a, b in itertools.pairwise(names)}
        return {"$ref": "#/$defs/d0", "$defs": {**twice, names[-1]: inner}}
    if kind == 3:
        due = chance.choice([[], names, names[::2]])
        return {"type": "object", "properties": dict.fromkeys(names, inner), "required": due}
    if kind == 4:
        return {chance.choice(["anyOf", "allOf", "oneOf", "enum", "prefixItems"]): [inner] * size}
    primes = [p for p in range(2, size) if all(p % d for d in range(2, p))][: chance.randint(1, 8)]
    return {"allOf": [{"type": "integer", "multipleOf": p} for p in primes]}


def try_schemas(seeds: Iterator[int], survived: bool) -> Iterator[str]:
    """Yield what becomes of each schema: too much by measure, wrong for the compiler, or fit.

    survived: those which a trial outlived, whose compiling has to be outlived here as well.
    """
    import resource

    library = importlib.import_module("llguidance")
    for seed in seeds:
        if not survived:
            used = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
            most = int(used) + 1 + labs_schema.TRIAL_CPU_S
            resource.setrlimit(resource.RLIMIT_CPU, (most, resource.RLIM_INFINITY))
        try:
            text = labs_schema.check(schema(random.Random(seed)))
        except labs_schema.SchemaError:
            yield "measured"
            continue
        wrong = labs_schema.steps(library, text, seed if survived else 0)
        yield ("panic" if "Panic" in wrong else "wrong") if wrong else "fit"


# ---------------------------------------------------------------- templates and searches

# fmt: off
MARKS = ["<bos>", "<eos>", "<end>", "<|user|>", "<|assistant|>", "{{ 1/0 }}", "{% raise %}", "{#"]
WORDS = ["whale", "WHALE", "or", "AND", "NOT", "NEAR(", "NEAR/3", "words:", "heading :", *"^*-+()'"]
WORDS += ['"', ";", '""', "--", "DROP TABLE chunks", "rowid", "{heading}", "İ", "ß", "x" * 999]
# fmt: on
TEMPLATES = [
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<end>{% endfor %}",
    "{% for m in messages %}{{ m['content'] | trim | upper }}{{ loop.index0 }}{% endfor %}x",
    "{% if messages[0].role == 'system' %}{{ raise_exception(messages[0].content) }}{% endif %}x",
    "{% for m in messages %}{{ m.content.split('<end>')[-1] | tojson }}{{ m.name }}{% endfor %}",
    "{{ messages[1].content[:9] + messages | length }}",
]


def text(chance: random.Random) -> str:
    some = chance.choices(
        [*TEXTS, *MARKS, *WORDS, chr(chance.randrange(sys.maxunicode))], k=chance.randint(0, 9)
    )
    return chance.choice(["", " "]).join(some) * chance.choice([1, 1, 1, 1, 1, 2, 30])


def told_of(work: Callable[[], Any]) -> str:
    """Return "fit", "refused" for an error of labs' own, or the name of another error."""
    import labs

    try:
        work()
    except labs.LabsError:
        return "refused"
    except Exception as error:
        return f"raised-{type(error).__name__}"
    return "fit"


def try_chats(seeds: Iterator[int]) -> Iterator[str]:
    import labs

    spec, lock = labs.ModelSpec(model_name="x"), threading.Lock()
    known = [kit.byte_tokenizer(template) for template in TEMPLATES]
    models: Any = [SimpleNamespace(tokenizer=each, lock=lock, spec=spec) for each in known]
    for seed in seeds:
        chance = random.Random(seed)
        roles = [*["user", "assistant", "system"] * 9, "tool", "", "\0", None]
        messages: Any = [
            {"role": chance.choice(roles), "content": text(chance)}
            for _ in range(chance.randint(0, 4))
        ]
        if chance.random() < 0.1:
            messages.append(value(chance))
        model = chance.choice(models)
        given = {"prompt": text(chance)} if chance.random() < 0.2 else {"messages": messages}
        yield told_of(lambda m=model, g=given: labs.build_inputs(m, **g))  # type: ignore[misc]


def try_searches(seeds: Iterator[int]) -> Iterator[str]:
    import labs_rag

    with tempfile.TemporaryDirectory() as folder:
        for number in range(20):
            words = " ".join(text(random.Random(number)) for _ in range(9))
            Path(folder, f"{number}.md").write_text(f"# {words[:40]}\n{words}", "utf-8", "replace")
        database = str(Path(folder, "words.db"))
        labs_rag.index([folder], database)
        for seed in seeds:
            query = text(random.Random(seed))
            yield told_of(lambda q=query: labs_rag.search(database, q))  # type: ignore[misc]


# ---------------------------------------------------------------- processes


def main(kind: str, *seeds: str) -> None:
    """Work at these seeds, or those of stdin; say each before and what became of it after."""
    numbers = [int(seed) for seed in (seeds or sys.stdin.read().split())]

    def saying() -> Iterator[int]:
        for number in numbers:
            print(number, end=" ", flush=True)
            yield number

    def work() -> None:
        for verdict in WORK[kind](saying()):
            print(verdict, flush=True)

    threading.stack_size(labs_schema.TRIAL_STACK if kind == "trial" else 2**23)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


WORK: dict[str, Callable[[Iterator[int]], Iterator[str]]] = {
    "trial": functools.partial(try_schemas, survived=False),
    "schema": functools.partial(try_schemas, survived=True),
    "chat": try_chats,
    "search": try_searches,
}


def verdicts(kind: str, seeds: list[int]) -> dict[int, str]:
    """Return what became of each seed, in processes that may die: "died" is a verdict too."""
    found: dict[int, str] = {}
    while seeds:
        command = [sys.executable, __file__, kind]
        numbers = " ".join(map(str, seeds))
        done = subprocess.run(command, input=numbers, stdout=-1, text=True, check=False)
        said = [line.split() for line in done.stdout.splitlines()]
        found |= {int(seed): (rest or [f"died {done.returncode}"])[0] for seed, *rest in said}
        found |= {int(seed): f"died {done.returncode}" for seed, *rest in said if not rest}
        if seeds[0] not in found:
            raise RuntimeError(f"no work at {kind} was done: {done.returncode}")
        seeds = [seed for seed in seeds if seed not in found]
    return found


def schemas_hold(count: int) -> Counter[str]:
    tried = verdicts("trial", [*range(FIRST, FIRST + count)])
    fit = [seed for seed, verdict in tried.items() if verdict in ("fit", "wrong")]
    served = verdicts("schema", fit)
    bad = {seed: verdict for seed, verdict in served.items() if verdict not in ("fit", "wrong")}
    assert not bad
    return Counter(tried.values())


def all_told(kind: str, count: int) -> None:
    found = Counter(verdicts(kind, [*range(FIRST, FIRST + count)]).values())
    assert {*found} == {"fit", "refused"} if kind == "chat" else {*found} <= {"fit", "refused"}


def test_what_a_trial_outlives_the_server_outlives():
    found = schemas_hold(FEW)
    assert min(found[kind] for kind in ("measured", "wrong", "fit")) > FEW // 20


@pytest.mark.parametrize("kind", ["chat", "search"])
def test_whatever_is_said_or_searched_is_answered_or_refused(kind):
    all_told(kind, FEW)


@pytest.mark.long
def test_what_many_trials_outlive_the_server_outlives():
    schemas_hold(MANY)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["chat", "search"])
def test_whatever_is_said_or_searched_many_times_is_answered_or_refused(kind):
    all_told(kind, MANY // 10)


if __name__ == "__main__":
    main(*sys.argv[1:])
