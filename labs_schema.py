# SPDX-License-Identifier: Apache-2.0
"""Bounds on JSON schemas from untrusted clients, which llguidance, native code, compiles.

    text = labs_schema.check(schema)  # measures it; SchemaError names the place and the bound
    fault = labs_schema.trial(text)  # compiles it in a separate process, which may crash

`check` uses only Python. `trial` runs this source as a program, which needs llguidance. Other
modules are imported inside functions, because each new schema starts such a program.
"""

from __future__ import annotations

import importlib
import json
import random
import re
import sys
import threading
import types
import urllib.parse
from typing import Any

Place = tuple[Any, str] | None  # of a part of a schema: its parent's place and its name there
GRAMMAR = "%llguidance"  # how a grammar begins, unlike JSON
LARGEST_INTEGER = 2**53 - 1  # all readers of JSON agree on integers up to this (RFC 8259 §6)

# Bounds on a schema that protect llguidance's memory, time and stack.
MAX_DEPTH = 100  # nested objects and lists; llguidance reads 127 levels
MAX_VALUES = 20_000
MAX_CHARACTERS = 200_000  # of all names and texts together
MAX_OPTIONAL = 400  # properties of one object; each takes 5 of the parser's 2,000 items per row
MAX_REFERENCES = 500
MAX_HOPS = 32  # references in a row that lead only to another reference
MAX_WRITTEN_OUT = 10_000  # characters of a pattern whose repetitions are expanded: (ab){9} has 18
MOST_ENTRIES = {"enum": 5000, "properties": 1000, "required": 1000, "prefixItems": 1000}
MOST_CHARACTERS = {"pattern": 2000, "$ref": 1000}
LARGEST = {"minItems": 500, "minProperties": 500, "minLength": 100_000}
LARGEST |= dict.fromkeys(("maxItems", "maxProperties", "maxLength"), 2**31 - 1)
NAMED = dict.fromkeys(("properties", "patternProperties", "dependentSchemas"), "named")
ROLES = NAMED | dict.fromkeys(("$defs", "definitions"), "named")
ROLES |= dict.fromkeys(("const", "enum"), "data")
ROLES |= dict.fromkeys(("default", "examples", "example"), "note")  # no answer depends on it
FAR = {"maximum": 1, "exclusiveMaximum": 1, "minimum": -1, "exclusiveMinimum": -1}
REFUSED = {
    "contentEncoding": "llguidance ignores it",
    "x-guidance": "it changes the meaning of other keywords",
}
PIECE = re.compile(  # one character of a pattern; a bracketed class or an escape counts as one
    r"\\[pPxu]\{[^}]*+\}|\\.|\[\^?\]?(?:\\.|[^\]\\])*+\]|\{(\d+)(?:,(\d*))?\}|.", re.DOTALL
)

# llguidance's own limits for one grammar, then the limits of the process that tries it.
LIMITS = {"initial_lexer_fuel": 300_000, "max_lexer_states": 20_000, "max_grammar_size": 200_000}
TRIAL_CPU_S, TRIAL_WALL_S, TRIAL_BYTES, TRIAL_STEPS = 2, 60, 2**30, 24
TRIAL_STACK = 2**21  # bytes: a quarter of a thread's stack here, so that a trial overflows first
_TRIALS = threading.BoundedSemaphore(2)


class SchemaError(ValueError):
    """A schema exceeds a bound or is not JSON; the message names the place and the bound."""


def check(schema: Any) -> str:
    """Return a schema as JSON text. Raises SchemaError when it exceeds a bound.

    It does not recurse, so a schema nested a thousand levels deep cannot exhaust Python's stack.
    """
    values = characters = 0
    references: set[str] = set()
    waiting: list[tuple[Any, Place, int, str]] = [(schema, None, 1, "schema")]
    while waiting:
        value, place, depth, role = waiting.pop()
        inner = _inner(value, place, role)
        values += len(inner)
        characters += sum(len(name) for name in value) if isinstance(value, dict) else 0
        characters += len(value) if isinstance(value, str) else 0
        _bound(MAX_DEPTH, depth, place, "levels of nesting")
        _bound(MAX_VALUES, values, place, "values up to here")
        _bound(MAX_CHARACTERS, characters, place, "characters up to here")
        if isinstance(value, dict) and role == "schema":
            _check_keywords(value, place)
            references |= {value["$ref"]} if isinstance(value.get("$ref"), str) else set()
        waiting += [(each, (place, name), depth + 1, kind) for each, name, kind in inner]
    _bound(MAX_REFERENCES, len(references), None, "different references")
    _check_chains(schema, references)
    return json.dumps(schema)


def _inner(value: Any, place: Place, role: str) -> list[tuple[Any, str, str]]:
    """Return a part's values, each with name and role: schema, named (schemas), data or note."""
    if isinstance(value, dict):
        if not all(isinstance(name, str) for name in value):
            raise _refused(place, "has a name that is not a string")
        known = ROLES if role == "schema" else {}
        other = role if role in ("data", "note") else "schema"
        return [(each, name, known.get(name, other)) for name, each in value.items()]
    if isinstance(value, list | tuple):
        return [(each, str(number), role) for number, each in enumerate(value)]
    if isinstance(value, int | float) and not _is_in_reach(value, place, role):
        raise _refused(place, f"is beyond ±{LARGEST_INTEGER}")
    if value is not None and not isinstance(value, str | int | float):
        raise _refused(place, f"is of the type {type(value).__name__}, which is not JSON")
    return []


def _is_in_reach(value: float, place: Place, role: str) -> bool:
    """Return whether all readers agree on a number, or it bounds nothing that they could read."""
    if abs(value) <= LARGEST_INTEGER:  # nan is not
        return True
    far = FAR.get(place[1], 0) if place and role == "schema" else 0
    return abs(value) < float("inf") and (role == "note" or value * far > 0)


def _check_keywords(schema: dict[str, Any], place: Place) -> None:
    for name, value in schema.items():
        here = (place, name)
        if name in REFUSED:
            raise _refused(here, f"cannot be used here: {REFUSED[name]}")
        if isinstance(value, dict | list) and name in MOST_ENTRIES:
            _bound(MOST_ENTRIES[name], len(value), here, "entries")
        elif isinstance(value, str) and name in MOST_CHARACTERS:
            _bound(MOST_CHARACTERS[name], len(value), here, "characters")
        elif isinstance(value, int | float) and name in LARGEST and value > LARGEST[name]:
            raise _refused(here, f"is {value}; at most {LARGEST[name]}")
    properties, required = schema.get("properties"), schema.get("required")
    if isinstance(properties, dict):
        names = required if isinstance(required, list) else []
        needed = {name for name in names if isinstance(name, str)}
        _bound(MAX_OPTIONAL, len({*properties} - needed), (place, "properties"), "optional entries")
    named = schema.get("patternProperties")
    for pattern in (schema.get("pattern"), *(named if isinstance(named, dict) else ())):
        if isinstance(pattern, str):
            size = min(written_out(pattern), 10**9)
            _bound(MAX_WRITTEN_OUT, size, (place, "pattern"), "characters with repetitions")


def written_out(pattern: str) -> int:
    """Return the approximate length of a pattern with its repetitions expanded: (ab){9} has 18."""
    open_groups, last = [0], 0  # last: length of the piece that a repetition would repeat
    for found in PIECE.finditer(pattern):
        piece, (low, high) = found[0], found.groups()
        if low is not None:
            grown = last * max(int(low), int(high or 0), 1)
            open_groups[-1] += grown - last
            last = grown
        elif piece == "(":
            open_groups.append(0)
        elif piece == ")" and len(open_groups) > 1:
            last = max(open_groups.pop(), 1)
            open_groups[-1] += last
        elif piece not in "*+?|^$":
            last = 1
            open_groups[-1] += 1
    return sum(open_groups)


def _check_chains(schema: Any, references: set[str]) -> None:
    """Refuse a $ref that leads to itself, or through more than MAX_HOPS other references."""
    places = {each: target(each, schema) for each in references}
    found = {each: at.get("$ref") for each, at in places.items() if isinstance(at, dict)}
    following = {each: r if isinstance(r := found.get(each), str) else None for each in references}
    for first in references:
        reference, hops = following[first], 0
        while reference in following:
            hops += 1
            _bound(MAX_HOPS, hops, None, f"references in a row from {first[:80]!r}")
            if reference == first:
                raise _refused(None, f"has a reference to itself, {first[:80]!r}")
            reference = following[reference]


def target(reference: str, schema: Any) -> Any:
    """Return the part of a schema that a reference points to, None for no such place."""
    found = schema if reference == "#" or reference.startswith("#/") else None
    for part in reference.split("/")[1:]:
        name = urllib.parse.unquote(part).replace("~1", "/").replace("~0", "~")
        if isinstance(found, list) and name.isdecimal() and len(name) < 6:
            found = dict(enumerate(found)).get(int(name))
        else:
            found = found.get(name) if isinstance(found, dict) else None
    return found


def _bound(most: int, count: int, place: Place, what: str) -> None:
    if count > most:
        raise _refused(place, f"has {count} {what}; at most {most}")


def _refused(place: Place, what: str) -> SchemaError:
    names: list[str] = []
    while place is not None:
        place, name = place
        names.append(name if len(name) <= 40 else f"{name[:39]}…")
    path = "/".join(["#", *reversed(names)])
    return SchemaError(f"{path if len(path) <= 200 else f'{path[:199]}…'} {what}")


# ---------------------------------------------------------------- compiling it


def compiled(library: Any, tokenizer: Any, schema: str) -> Any:
    """Return llguidance's matcher at the start of an answer, or a text that names the fault.

    schema: a checked schema as JSON, or a grammar, which begins with GRAMMAR.
    """
    compact = {"whitespace_flexible": False}  # a small model may write whitespace endlessly
    try:
        if schema.startswith(GRAMMAR):
            grammar = library.LLMatcher.grammar_from_lark(schema)
        else:
            grammar = library.LLMatcher.grammar_from_json_schema(schema, overrides=compact)
    except ValueError as error:
        return _cut(str(error))
    limits = library.LLParserLimits(verbose_errors=False, **LIMITS)
    matcher = library.LLMatcher(tokenizer, grammar, log_level=0, limits=limits)
    faults = [matcher.get_error()] if matcher.is_error() else matcher.get_grammar_warnings()
    return _cut("; ".join(faults)) or matcher


def error_of(matcher: Any) -> str:
    """Return a matcher's error in one line, "" without one."""
    return _cut(matcher.get_error())


def _cut(text: str) -> str:
    line = " ".join(text.removesuffix("<non-verbose/>").split())
    if line.isidentifier():  # llguidance's code for a parser that cannot continue
        return f"no answer satisfies it ({line})"
    return line if len(line) <= 300 else f"{line[:299]}…"


def trial(schema: str) -> str:
    """Compile a schema in a separate process; return the fault found, "" for none.

    Raises OSError or subprocess.SubprocessError when the process could not run or did not end.
    """
    import importlib.util
    import inspect
    import signal
    import subprocess

    package = importlib.util.find_spec("llguidance")
    folder = next(iter(package.submodule_search_locations or ())) if package else ""
    source = inspect.getsource(sys.modules[__name__])  # in a zip archive it has no file
    command = [sys.executable, "-I", "-S", "-c", source, folder]
    with _TRIALS:
        done = subprocess.run(
            command, input=schema.encode(), capture_output=True, timeout=TRIAL_WALL_S, check=False
        )
    if done.returncode > 0:
        raise ChildProcessError(done.stderr.decode(errors="replace").strip()[-300:])
    if done.returncode == 0:
        return str(json.loads(done.stdout))
    bounds = f"{TRIAL_CPU_S} s of CPU time, {TRIAL_BYTES >> 20} MiB of memory"
    bounds += f" and {TRIAL_STACK >> 20} MiB of stack"
    ended = signal.Signals(-done.returncode).name
    return f"it is too large to compile within {bounds} ({ended}); simplify it"


class _Bytes:
    """A tokenizer of single bytes, with the attributes that llguidance reads."""

    eos_token_id, bos_token_id, special_token_ids = 256, None, (256,)
    tokens = (*(bytes([byte]) for byte in range(256)), b"<end>")
    is_tokenizer_wrapper = True

    def __call__(self, text: bytes | str) -> list[int]:
        return list(text if isinstance(text, bytes) else text.encode())


def _main(folder: str) -> None:
    """Try the schema on stdin, within bounds, and print the fault found as JSON."""
    found: list[str] = []
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (TRIAL_BYTES, TRIAL_BYTES))
        resource.setrlimit(resource.RLIMIT_CPU, (TRIAL_CPU_S, TRIAL_CPU_S + 1))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except (ImportError, AttributeError, OSError, ValueError):
        pass  # this system does not support such limits
    package: Any = types.ModuleType("llguidance")  # its real __init__ takes a tenth of a second
    package.__path__ = [folder]
    sys.modules["llguidance"] = package
    library, schema = importlib.import_module("llguidance._lib"), sys.stdin.read()
    threading.stack_size(TRIAL_STACK)
    thread = threading.Thread(target=lambda: found.append(steps(library, schema)))
    thread.start()
    thread.join()
    print(json.dumps(found[0]))


def steps(library: Any, schema: str, seed: int = 0) -> str:
    """Compile a schema and begin a random answer; return the fault found, "" for none."""
    tokenizer, chance = library.LLTokenizer(_Bytes()), random.Random(seed)
    if schema.startswith(GRAMMAR):  # a byte that no text has stands for special tokens
        schema = re.sub(r"<\[\d+\]>", "<[255]>", schema)
    try:
        matcher = compiled(library, tokenizer, schema)
        for _ in range(0 if isinstance(matcher, str) else TRIAL_STEPS):
            bits = int.from_bytes(matcher.compute_bitmask(), "little")
            allowed = [token for token in range(256) if bits >> token & 1]
            if matcher.is_error() or not allowed:
                break
            matcher.consume_token(chance.choice(allowed))
        return matcher if isinstance(matcher, str) else error_of(matcher)
    except BaseException as error:  # a Rust panic is not an Exception
        return _cut(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    _main(sys.argv[1])
