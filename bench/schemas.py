# SPDX-License-Identifier: Apache-2.0
"""JSONSchemaBench: which schemas of a sample are accepted, and whether answers are valid."""

from __future__ import annotations

import functools
import json
import random
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jsonschema
import llguidance
import llguidance.hf

import labs
import labs_keywords
import labs_schema
import labs_typed
from bench import parts

# The parts of JSONSchemaBench (arXiv 2501.10868, table 1) and the number of their schemas.
SIZES = {
    "Github_trivial": 444,
    "Github_easy": 1943,
    "Github_medium": 1976,
    "Github_hard": 1240,
    "Github_ultra": 164,
    "Glaiveai2K": 1707,
    "JsonSchemaStore": 492,
    "Kubernetes": 1064,
    "Snowplow": 403,
    "WashingtonPost": 125,
}
EACH = 50  # schemas of each part
NEW = 256
ANSWERED = 4  # the model answers one schema of so many
ROWS = 16


class Case(NamedTuple):
    """A schema of the benchmark and texts that follow it or do not. fault: "" if it is accepted."""

    part: str
    schema: dict[str, Any]
    tests: list[tuple[bool, Any]]
    fault: str
    seconds: tuple[float, float]  # of the trial, of compiling it once more


def schemas(folder: str, answers: str = "") -> None:
    """Report on the sample in a folder of MaskBench's files; with "answers" the model answers."""
    model = labs.load_model(labs.load_config(env={}, overrides={}))
    print(f"{parts.machine()}, {model.spec.model_name}")
    labs_typed.Constraint(model, {"const": 1})  # reads the tokenizer
    cases = [case for part in SIZES for case in tried(model, Path(folder), part)]
    accepted = [case for case in cases if not case.fault]
    print(f"accepted: {len(accepted)} of {len(cases)}, {weighted(cases):.1%} of all by size")
    for part in SIZES:
        print(f"  {part:16} {sum(case.part == part for case in accepted):3} of {EACH}")
    for place, name in enumerate(("tried in a process", "compiled")):
        print(f"{name:20} {parts.spread([case.seconds[place] for case in accepted])}")
    for reason, count in Counter(reason_of(case.fault) for case in cases).most_common(13):
        print(f"  {count:3} {reason or 'accepted'}")
    followed(model, accepted)
    if answers:
        answered(model, accepted[::ANSWERED])


def tried(model: labs.Model, folder: Path, part: str) -> Iterator[Case]:
    """Yield the sample of a part, always the same schemas."""
    names = sorted(folder.glob(f"{part}---*.json"))
    for path in random.Random(0).sample(names, EACH):
        found = json.loads(path.read_bytes())
        tests = [(test["valid"], test["data"]) for test in found.get("tests", ())]
        yield Case(part, found["schema"], tests, *compiled(model, found["schema"]))


def compiled(model: labs.Model, schema: dict[str, Any]) -> tuple[str, tuple[float, float]]:
    """Return why a schema is refused, "" if it is not, and the seconds of each way to compile it.

    These are that of the process which tries it first, and that in this process.
    """
    try:
        labs_typed.Constraint(model, schema)
    except labs.InputError as error:
        return str(error), (0.0, 0.0)
    text, times = labs_keywords.checked(schema), [time.perf_counter()]
    labs_schema.trial(text)
    times.append(time.perf_counter())
    labs_schema.compiled(llguidance, tokenizer_of(model), text)
    times.append(time.perf_counter())
    return "", (times[1] - times[0], times[2] - times[1])


@functools.cache
def tokenizer_of(model: labs.Model) -> Any:
    return llguidance.hf.from_tokenizer(model.tokenizer)


def weighted(cases: list[Case]) -> float:
    """Return the accepted share if each part counts by its size."""
    shares = Counter(case.part for case in cases if not case.fault)
    return sum(SIZES[part] * shares[part] / EACH for part in SIZES) / sum(SIZES.values())


def reason_of(fault: str) -> str:
    """Return a fault without what only its schema has."""
    words = fault.removeprefix("schema: ").split()
    kept = [word for word in words if not word.startswith(("#/", '"'))]
    return " ".join(kept[:8])


# ---------------------------------------------------------------- texts that are known


def followed(model: labs.Model, cases: list[Case]) -> None:
    """Print how many of the benchmark's texts are told apart: followed if valid, else refused."""
    found = Counter[tuple[bool, bool]]()
    for case in cases:
        for valid, data in case.tests:
            text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
            found[valid, follows(model, case.schema, text)] += 1
    for valid, name in ((True, "valid texts that are followed"), (False, "others that are not")):
        right, wrong = found[valid, valid], found[valid, not valid]
        print(f"{name}: {right} of {right + wrong}")


def follows(model: labs.Model, schema: dict[str, Any], text: str) -> bool:
    """Return whether a text is a whole answer under a schema."""
    tokenizer, checked = tokenizer_of(model), labs_keywords.checked(schema)
    matcher = labs_schema.compiled(llguidance, tokenizer, checked)
    ids = tokenizer.tokenize_str(text)
    return bool(
        matcher.validate_tokens(ids) == len(ids)
        and matcher.consume_tokens(ids)
        and matcher.is_accepting()
    )


# ---------------------------------------------------------------- answers of the model


def answered(model: labs.Model, cases: list[Case]) -> None:
    """Print how many answers end, and how many of these are valid."""
    inputs = labs.build_inputs(model, prompt="Write an example as JSON.")
    options = labs.Generation(max_new_tokens=NEW, temperature=1.0, seed=0)
    rows = (
        labs.open_request(model, i, inputs, options, (labs_typed.Constraint(model, case.schema),))
        for i, case in enumerate(cases)
    )
    others, whole, valid = Counter[str](), 0, 0
    pieces: dict[int, list[str]] = {}
    for number, event in labs.run(model, rows, ROWS):
        if isinstance(event, labs.Delta):
            pieces.setdefault(number, []).append(event.text)
        elif isinstance(event, labs.Done) and event.finish_reason == "stop":
            whole += 1
            valid += is_valid(cases[number].schema, "".join(pieces.get(number, ())))
        else:
            others[getattr(event, "finish_reason", "failed")] += 1
    ended = f"{whole} of {len(cases)} ended within {NEW} tokens"
    print(f"answers: {ended}, {valid} of these are valid; others: {dict(others)}")


def is_valid(schema: dict[str, Any], text: str) -> bool:
    kind = jsonschema.validators.validator_for(schema, jsonschema.Draft202012Validator)
    checker = kind(schema, format_checker=kind.FORMAT_CHECKER)
    if (error := next(checker.iter_errors(json.loads(text)), None)) is None:
        return True
    print(f"not valid: {error.message:.100} in {text:.200}")
    return False
