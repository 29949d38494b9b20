# SPDX-License-Identifier: Apache-2.0
"""Answers that follow a regular expression, are one of some texts, or follow a Lark grammar.

    only = labs_typed.Constraint(model, labs_structured.regex(r"[0-9]{4}-[0-9]{2}"))
    only = labs_typed.Constraint(model, labs_structured.choice(["yes", "no"]))
    only = labs_typed.Constraint(model, labs_structured.grammar('start: "a" | "b" start'))
    labs.generate(model, inputs, processors=[only])  # one Constraint for each answer

The whole answer matches. Patterns, texts and grammars come from untrusted clients and llguidance is
native code, so each is read and bounded here, without a model, and written anew: what is compiled
holds no symbol that this file does not know, and none that stands for a special token. Needs
labs.py, labs_keywords.py and labs_schema.py.
"""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from msgspec import Struct

import labs
import labs_keywords
import labs_schema

# Where a text is forced, llguidance takes the tokens that the tokenizer has for it. For the text of
# a special token that is the token itself, which no text may hold, so nothing is forced here.
HEAD = '%llguidance {"no_forcing": true}\n'
MAX_CHOICES = labs_schema.MOST_ENTRIES["enum"]
MAX_CHARACTERS = labs_schema.MAX_CHARACTERS  # of all choices, or of a grammar
MAX_PATTERN = labs_schema.MOST_CHARACTERS["pattern"]
MAX_RULES = 500
MAX_SYMBOLS = 10_000
MAX_GROUPS = 50  # groups inside each other
MAX_REPEATS = 10_000  # in one repetition of a grammar: "a"{10000}

# What a pattern cannot hold. These are looked for outside of classes and escapes.
LOOKS = dict.fromkeys(("(?=", "(?!", "(?<=", "(?<!"), "looks ahead or behind")
MISSING = {
    **LOOKS,
    "(?P=": "refers back to a group",
    "(?>": "is an atomic group",
    "(?(": "is a condition",
    "(?#": "is a comment",
}
ESCAPES = {
    **dict.fromkeys(map(str, range(1, 10)), "refers back to a group"),
    "k": "refers back to a group",
    **dict.fromkeys("bB<>", "is a boundary of words"),
    "G": "is an anchor",
}
FLAGS = re.compile(r"\(\?(?!P?<)([a-zA-Z-]*)[:)]")
STARTS, ENDS = ("^", "\\A"), ("$", "\\z", "\\Z")

TOKEN = re.compile(  # as in llguidance's lexer; a kind that is refused has a name in REFUSED
    r"""(?P<skip>(?:\#|//)[^\n]*|[ \t]+)
      | (?P<line>(?:\r?\n)+[ \t]*)
      | (?P<statement>%[A-Za-z]*)
      | (?P<string>"(?:\\(?:["\\/bfnrt]|u[a-fA-F0-9]{4})|[^"\\\x00-\x1f\x7f])*"i?)
      | (?P<regex>/(?:\\.|[^/\\])+/[a-z]*)
      | (?P<special><[^<>\s]*>?)
      | (?P<reference>@[A-Za-z0-9_-]*)
      | (?P<rule>!?[_?]?[a-z][_a-z0-9-]*)
      | (?P<terminal>_?[A-Z][_A-Z0-9-]*)
      | (?P<number>[+-]?[0-9]+)
      | (?P<assigned>::=)
      | (?P<parameter>::)
      | (?P<option>=)
      | (?P<mark>->|\.\.|[:|()\[\]{},~&.*+?])""",
    re.VERBOSE,
)
REFUSED = {
    "special": "special tokens cannot be written",
    "reference": "other grammars cannot be named",
    "assigned": "this is no Lark; its rules are written with a colon, start: …",
    "parameter": "rules with parameters are not supported",
    "option": "an option of a rule is not supported; only [lazy] is",
}
NAMES, OPENS, CLOSES = ("rule", "terminal"), ("(", "[", "{"), (")", "]", "}")
TIMES = (["0"], [","])  # after { or ~: a repetition that may have none
IGNORED = "%ignore"  # stands for what texts may have between symbols
STATEMENTS = ("%ignore", "%import", "%json")
Needs = tuple[str, list[str]]  # a name, and the names that one of its alternatives needs


class Grammar(Struct, frozen=True):
    """A checked grammar for the text of an answer. what: the name of what was asked for."""

    text: str
    what: str

    @property
    def inner(self) -> str:
        """Return the grammar as a symbol of another one."""
        return f"%lark {{\n{self.text.removeprefix(HEAD)}}}"


def plain(fault: str) -> str:
    """Return what llguidance says is wrong with a grammar, without its place and its listing."""
    fault = re.sub(r"^(?:at )?\d+\(\d+\): | \d+ \| .*", "", fault)
    fault = re.sub(r"^invalid regex .* error: ", "", fault)
    return "a pattern is not valid" if fault.startswith("invalid regex") else fault


class Token(NamedTuple):
    kind: str
    text: str
    line: int


# ---------------------------------------------------------------- regular expressions


def regex(pattern: str) -> Grammar:
    """Return the grammar of all texts that match a pattern from their beginning to their end.

    Its syntax is that of Rust's regex crate. Raises InputError for what it cannot hold, a pattern
    that is empty or beyond the bounds.
    """
    return Grammar(f"{HEAD}start: {_literal('regex', _unanchored(pattern))}\n", "regex")


def _literal(what: str, pattern: str) -> str:
    """Return a pattern between slashes. Raises InputError for what llguidance cannot hold."""
    _check_text(what, pattern)
    if not pattern:
        raise labs.InputError(f"{what}: the pattern is empty, so it matches only an empty answer")
    _bound(what, MAX_PATTERN, len(pattern), "characters")
    written = min(labs_schema.written_out(pattern), 10**9)
    _bound(what, labs_schema.MAX_WRITTEN_OUT, written, "characters with repetitions written out")
    depth = 0
    for found in labs_schema.PIECE.finditer(pattern):
        _check_piece(what, found[0], pattern[found.start() :])
        depth += (found[0] == "(") - (found[0] == ")")
        _bound(what, MAX_GROUPS, depth, "groups inside each other")
    text = re.sub(r"\\.|/|\n", _slashed, pattern, flags=re.DOTALL)
    return f"/{text}/"


def _slashed(found: re.Match[str]) -> str:
    return {"/": "\\/", "\n": "\\n", "\\\n": "\\n"}.get(found[0], found[0])


def _check_piece(what: str, piece: str, rest: str) -> None:
    """Check a piece of a pattern. rest: the pattern from there on."""
    if piece == "\\":
        raise labs.InputError(f"{what}: the pattern ends with a backslash")
    reason = ESCAPES.get(piece[1]) if len(piece) == 2 and piece[0] == "\\" else None
    if piece == "(":
        reason = next((MISSING[each] for each in MISSING if rest.startswith(each)), None)
        flags = FLAGS.match(rest)
        if reason is None and flags and not {*flags[1]} <= {*"is-"}:
            reason = "has a flag other than i and s"
    if piece in STARTS or piece in ENDS:
        reason = "is an anchor inside of the pattern"
    if re.match(r"(?:[*+?]|\{\d+(?:,\d*)?\})\+", rest):
        reason = "is a possessive repetition"
    if reason is not None:
        shown = rest[:12]
        raise labs.InputError(f"{what}: {shown!r} {reason}, which is not supported")


def _unanchored(pattern: str) -> str:
    """Return a pattern without the anchors at the beginning and end of its alternatives.

    They change nothing, because the whole answer has to match.
    """
    flags = re.match(r"\(\?[is]+\)", pattern)
    lead = flags[0] if flags else ""
    pieces = [found[0] for found in labs_schema.PIECE.finditer(pattern.removeprefix(lead))]
    kept, depth = list[str](), 0
    for place, piece in enumerate(pieces):
        depth += (piece == "(") - (piece == ")")
        first = place == 0 or pieces[place - 1] == "|"
        last = place == len(pieces) - 1 or pieces[place + 1] == "|"
        if depth == 0 and ((first and piece in STARTS) or (last and piece in ENDS)):
            continue
        kept.append(piece)
    return lead + "".join(kept)


# ---------------------------------------------------------------- choices


def choice(options: Sequence[str]) -> Grammar:
    """Return the grammar of some texts, of which an answer is one.

    Raises InputError if there is none, one is empty or given twice, or they exceed the bounds.
    """
    if isinstance(options, str):  # whose letters would be texts
        raise labs.InputError("choice reads several texts: put a single one into a list")
    if not options:
        raise labs.InputError("choice: give at least one text")
    _bound("choice", MAX_CHOICES, len(options), "texts")
    _bound("choice", MAX_CHARACTERS, sum(map(len, options)), "characters")
    for place, option in enumerate(options):
        _check_text(f"choice[{place}]", option)
        if not option:
            raise labs.InputError(f"choice[{place}] is empty")
    (common, count), *_ = Counter(options).most_common(1)
    if count > 1:
        raise labs.InputError(f"choice: {common!r:.80} is given {count} times")
    texts = " | ".join(map(_quoted, options))
    return Grammar(f"{HEAD}start: CHOICE\nCHOICE: {texts}\n", "choice")


def _quoted(text: str) -> str:
    return json.dumps(text).replace("\x7f", "\\u007f")


# ---------------------------------------------------------------- grammars


def grammar(text: str) -> Grammar:
    """Return a client's Lark grammar, read and written anew. Its first rule is `start`.

    Raises InputError for what is not supported or exceeds a bound, a name that is not defined, and
    a grammar of which no text ever ends.
    """
    _check_text("grammar", text)
    _bound("grammar", MAX_CHARACTERS, len(text), "characters")
    tokens = [*_tokens(text)]
    _bound("grammar", MAX_SYMBOLS, len(tokens), "symbols")
    lines, needs = list[str](), list[Needs]()
    for statement in _statements(tokens):
        lines.append(" ".join(token.text for token in statement))
        needs += _needs(statement)
    _check_names(needs)
    return Grammar(HEAD + "".join(f"{line}\n" for line in lines), "grammar")


def _tokens(text: str) -> Iterator[Token]:
    """Yield the tokens of a grammar without comments and spaces; a %json has its schema."""
    place, line = 0, 1
    while place < len(text):
        found = TOKEN.match(text, place)
        if found is None:
            shown = text[place : place + 20]
            raise _wrong(line, f"{shown!r} cannot be read; texts stand in double quotes")
        kind, piece, place = str(found.lastgroup), found[0], found.end()
        if kind in REFUSED:
            raise _wrong(line, f"{piece!r:.40}: {REFUSED[kind]}")
        if piece == "%json":
            schema, place = _schema(text, place, line)
            yield Token("json", f"%json {schema}", line)
        elif kind != "skip":
            yield Token(kind, _written(kind, piece, line), line)
        line += text.count("\n", found.start(), place)


def _written(kind: str, piece: str, line: int) -> str:
    """Return a token as it is compiled. Raises InputError for what is not supported."""
    if kind == "statement" and piece not in STATEMENTS:
        known = ", ".join(STATEMENTS)
        raise _wrong(line, f"{piece!r:.40} is not supported; use {known}")
    if kind == "regex":
        pattern, _, flags = piece[1:].rpartition("/")
        if not {*flags} <= {*"is"}:
            raise _wrong(line, f"a pattern has the flags {flags!r:.40}; use i and s")
        return _literal(f"grammar: line {line}", pattern) + flags
    if kind == "number" and not (len(piece) < 7 and 0 <= int(piece) <= MAX_REPEATS):
        raise _wrong(line, f"{piece:.20} is not a number of repetitions from 0 to {MAX_REPEATS}")
    return "\n" if kind == "line" else piece


def _schema(text: str, place: int, line: int) -> tuple[str, int]:
    """Return the schema after a %json, checked and written anew, and where it ends."""
    space = re.compile(r"\s*").match(text, place)
    try:
        schema, end = json.JSONDecoder().raw_decode(text, space.end() if space else place)
        if not isinstance(schema, dict):
            raise _wrong(line, "a schema after %json is not an object")
        checked = json.loads(labs_keywords.checked(schema))
    except (ValueError, RecursionError) as error:  # SchemaError is a ValueError
        raise _wrong(line, f"%json: {error}") from error
    return json.dumps({**checked, "x-guidance": {"whitespace_flexible": False}}), end


def _statements(tokens: list[Token]) -> Iterator[list[Token]]:
    """Yield the tokens of each line. One that begins with | or is in a group continues."""
    found, depth, ended = list[Token](), 0, False
    for token in tokens:
        if token.kind == "line":
            ended = True
            continue
        if ended and found and depth == 0 and token.text != "|":
            yield found
            found = []
        depth += (token.text in OPENS) - (token.text in CLOSES)
        found.append(token)
        ended = False
    if depth != 0:
        raise labs.InputError("grammar: its parentheses and brackets are not in pairs")
    if found:
        yield found


def _needs(statement: list[Token]) -> list[Needs]:
    """Return what each alternative of a line needs. Raises InputError for what is no statement."""
    first, rest = statement[0], statement[1:]
    if first.text == "%ignore":
        return _alternatives(IGNORED, rest)
    if first.text == "%import":
        return [(name, []) for name in _imported(first.line, rest)]
    if first.kind not in NAMES:
        raise _wrong(first.line, f"{first.text!r:.40} is not the beginning of a rule; name: …")
    if [token.text for token in rest[:3]] == ["[", "lazy", "]"]:
        rest = rest[3:]
    if not rest or rest[0].text != ":":
        found = rest[0].text if rest else "nothing"
        raise _wrong(first.line, f"after {first.text:.40} comes a colon, not {found!r:.40}")
    return _alternatives(first.text.lstrip("!?"), rest[1:])


def _imported(line: int, rest: list[Token]) -> list[str]:
    """Return the names that an %import defines: common.X, common.X -> Y or common (X, Y)."""
    texts = [token.text for token in rest]
    names = [token.text for token in rest[2:] if token.kind == "terminal"]
    one, several = texts[:2] == ["common", "."], texts[:2] == ["common", "("]
    shape = [text for text in texts[2:] if text not in names]
    if (one and shape in ([], ["->"])) or (several and {*shape} <= {",", ")"}):
        return names[-1:] if one else names
    raise _wrong(line, "%import takes terminals of Lark's common grammar only: common.INT")


def _alternatives(name: str, tokens: list[Token]) -> list[Needs]:
    """Return what each alternative of a definition needs; a group has a name of its own."""
    found, stack, numbers = list[Needs](), [(name, list[str]())], itertools.count()
    for place, token in enumerate(tokens):
        head, body = stack[-1]
        if token.text == "|":
            found.append((head, body))
            stack[-1] = (head, [])
        elif token.text in ("(", "["):
            stack.append((f"{name}({next(numbers)}", []))
            if len(stack) > MAX_GROUPS:
                raise _wrong(token.line, f"has more than {MAX_GROUPS} groups inside each other")
        elif token.text in (")", "]"):
            if len(stack) == 1:
                raise _wrong(token.line, f"{token.text} closes nothing")
            found.append(stack.pop())
            if token.text == ")" and not _is_optional(tokens, place):
                stack[-1][1].append(head)
        elif token.text == "~" and not (_is_times(tokens, place) or tokens[place - 1].text == "&"):
            raise _wrong(token.line, "~ comes only after &, as in A & ~B")  # B in UTF-8, as A is
        elif token.kind in NAMES and not _is_optional(tokens, place):
            body.append(token.text)
    return [*found, *reversed(stack)]


def _is_times(tokens: list[Token], place: int) -> bool:
    """Return whether ~ stands for repetitions: "a"~2..3."""
    return tokens[place + 1 : place + 2] != [] and tokens[place + 1].kind == "number"


def _is_optional(tokens: list[Token], place: int) -> bool:
    """Return whether a text fits without this symbol, or it is a name that refers to no rule."""
    before = tokens[place - 1].text if place else ""
    after = [token.text for token in tokens[place + 1 : place + 3]]
    none = after[:1] in (["?"], ["*"]) or (after[:1] in (["{"], ["~"]) and after[1:] in TIMES)
    return none or before in ("->", "~")


def _check_names(needs: list[Needs]) -> None:
    """Refuse names that are not defined, and a start that never ends."""
    defined = {name for name, _ in needs}
    _bound("grammar", MAX_RULES, sum("(" not in name for name in defined), "rules")
    if "start" not in defined:
        raise labs.InputError("grammar: it has no rule that is named start")
    for name, body in needs:
        for each in body:
            if each not in defined:
                raise labs.InputError(
                    f"grammar: {name.partition('(')[0]:.40} needs {each!r:.40}, "
                    "which is not defined"
                )
    if "start" not in _ending(needs):
        raise labs.InputError("grammar: no text that begins with start ever ends")


def _ending(needs: list[Needs]) -> set[str]:
    """Return the names of which some text ends."""
    missing = [len({*body}) for _, body in needs]
    users = defaultdict[str, list[int]](list)
    for place, (_, body) in enumerate(needs):
        for each in {*body}:
            users[each].append(place)
    found = set[str]()
    waiting = [name for (name, _), count in zip(needs, missing, strict=True) if count == 0]
    while waiting:
        if (name := waiting.pop()) in found:
            continue
        found.add(name)
        for place in users[name]:
            missing[place] -= 1
            if missing[place] == 0:
                waiting.append(needs[place][0])
    return found


# ---------------------------------------------------------------- errors


def _wrong(line: int, what: str) -> labs.InputError:
    return labs.InputError(f"grammar: line {line}: {what}")


def _bound(what: str, most: int, count: int, unit: str) -> None:
    if count > most:
        raise labs.InputError(f"{what}: it has {count} {unit}; at most {most}")


def _check_text(what: str, text: str) -> None:
    """Refuse halves of characters, which UTF-8 cannot write, and the character NUL."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise labs.InputError(f"{what}: it has half a character, at {error.start}") from error
    if "\0" in text:
        raise labs.InputError(f"{what}: it has the character NUL, at {text.index(chr(0))}")
