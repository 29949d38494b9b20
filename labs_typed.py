# SPDX-License-Identifier: Apache-2.0
"""Answers of a given type, and choices among given answers.

    city = labs_typed.generate_as(model, inputs, City)              # a msgspec struct, or any type
    labs_typed.choose(model, inputs, ["yes", "no"])                 # {"yes": 0.97, "no": 0.03}
    only = labs_typed.Constraint(model, schema)                     # JSON schema, as a dict
    labs.generate(model, inputs, processors=[only])                 # one Constraint for each answer

The grammar is llguidance's (pip install llguidance): before each token it tells which ones may
follow, and the row chooses among those. A schema that it cannot express is refused, and the error
names the keyword. Schemas are a stranger's and its code is native, so each is measured first
and compiled in a process of its own before it is compiled here. Needs labs.py, labs_schema.py; for
choices labs_choose.py.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import subprocess
import threading
import weakref
from collections.abc import Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

import labs
import labs_schema

if TYPE_CHECKING:
    import labs_choose

T = TypeVar("T")
GRAMMAR_BYTES = 2**24  # what one may hold within labs_schema.LIMITS
KEPT_BYTES = 2**28  # of grammars, for each tokenizer
MAX_TRIED = 4096  # schemas that are known to compile
SPACING = 64  # tokens that a grammar made anew has to last for
_TOKENIZERS: weakref.WeakKeyDictionary[Any, _Grammars] = weakref.WeakKeyDictionary()
_LOCK = threading.Lock()


class IncompleteOutput(labs.GenerationError):
    """The answer ended before it was complete; `completion` is what there is of it."""

    def __init__(self, completion: labs.Completion) -> None:
        reason = completion.finish_reason
        super().__init__(f"the answer is not whole ({reason}); allow more tokens or time")
        self.completion = completion


def generate_as(
    model: labs.Model,
    inputs: labs.Inputs,
    kind: type[T],
    generation: labs.Generation | None = None,
    **changes: Any,
) -> T:
    """Return an answer as a value of `kind`: whatever msgspec makes a JSON schema of and decodes.

    Raises IncompleteOutput where the answer was cut, InputError for a type that has no schema or
    whose schema cannot be expressed.
    """
    try:
        schema = _bounded(msgspec.json.schema(kind))
    except TypeError as error:
        raise labs.InputError(f"{kind}: {error}") from error
    only = Constraint(model, schema)
    completion = labs.generate(model, inputs, generation, processors=[only], **changes)
    if completion.finish_reason != "stop" or completion.matched_stop is not None:
        raise IncompleteOutput(completion)
    try:
        return msgspec.json.decode(completion.text, type=kind)
    except msgspec.DecodeError as error:  # more than a schema can say: 31 February
        raise labs.GenerationError(f"the answer is no {kind}: {error}") from error


def _bounded(schema: Any) -> Any:
    """Forbid fields that the type of an object does not name, and bound its integers.

    Decoding would drop such fields, and a small model may write digits without end.
    """
    if isinstance(schema, list):
        return [_bounded(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    bounds: dict[str, Any] = {}
    if isinstance(schema.get("properties"), dict):
        bounds["additionalProperties"] = False
    if schema.get("type") == "integer":
        bounds |= {} if "exclusiveMinimum" in schema else {"minimum": -labs_schema.LARGEST_INTEGER}
        bounds |= {} if "exclusiveMaximum" in schema else {"maximum": labs_schema.LARGEST_INTEGER}
    return {**bounds, **{key: _bounded(value) for key, value in schema.items()}}


class Constraint:
    """Keeps one answer to JSON of a schema; a processor as in labs_decode.Sampling.

    Raises InputError, which names what cannot be expressed, where it is, or what it is too much of.
    """

    def __init__(self, model: labs.Model, schema: dict[str, Any]) -> None:
        try:
            self._schema = labs_schema.check(schema)
        except labs_schema.SchemaError as error:
            raise labs.InputError(f"schema: {error}") from error
        with _LOCK:  # making one takes most of a second, once for a tokenizer
            if (grammars := _TOKENIZERS.get(model.tokenizer)) is None:
                grammars = _TOKENIZERS[model.tokenizer] = _Grammars(model)
        self._grammars = grammars
        self._matcher = grammars.matcher(self._schema)
        self._made_at = -SPACING
        self._start: int | None = None
        self._read: list[int] = []

    def __call__(self, ids: list[int], logits: Any) -> Any:
        """Return logits [V] with -inf for each token that may not follow `ids`.

        ids: of the prompt in the first call, then of the prompt and the answer. A later call may
        have fewer: guessed tokens can be wrong. Raises InputError where the schema asks too much.
        """
        self._start = len(ids) if self._start is None else self._start
        answer = ids[self._start :]
        allowed = self._allowed(answer, len(logits))
        if self._matcher.is_error() and len(answer) >= self._made_at + SPACING:
            # Answers share what a grammar's lexer has learnt, which fills up: it begins again.
            self._matcher, self._read = self._grammars.anew(self._schema), []
            self._made_at = len(answer)
            allowed = self._allowed(answer, len(logits))
        if self._matcher.is_error():
            told = labs_schema.told(self._matcher)
            raise labs.InputError(f"schema: the answer cannot be kept to it: {told}")
        if not allowed.any():
            raise labs.InputError("schema: this model has no token that the answer goes on with")
        return logits.masked_fill(~allowed.to(logits.device), float("-inf"))

    def _allowed(self, answer: list[int], size: int) -> Any:
        """Return which tokens may follow the answer, [size]; the matcher tells of errors."""
        import torch

        pairs = zip(self._read, answer, strict=False)
        common = next((i for i, (old, new) in enumerate(pairs) if old != new), None)
        common = min(len(self._read), len(answer)) if common is None else common
        if common < len(self._read):
            self._matcher.rollback(len(self._read) - common)
        self._matcher.consume_tokens(answer[common:])
        self._read = answer
        return self._grammars.allowed(self._matcher, torch.zeros(size, dtype=torch.bool))


class _Grammars:
    """Matchers for one tokenizer. A schema is compiled once, and only who asks for it waits."""

    def __init__(self, model: labs.Model) -> None:
        if importlib.util.find_spec("llguidance") is None:
            raise labs.InputError("answers of a type need llguidance: pip install llguidance")
        labs.require("cachetools")
        import cachetools

        self._library: Any = importlib.import_module("llguidance")
        hf: Any = importlib.import_module("llguidance.hf")
        self._vocabulary = model.decoder.config.vocab_size
        count = max(self._vocabulary, len(model.tokenizer))  # some tokenizers know more
        try:
            self._tokenizer = hf.from_tokenizer(model.tokenizer, n_vocab=count)
        except ValueError as error:
            raise labs.InputError(f"this tokenizer keeps to no schema: {error}") from error
        self._ends = list(model.eos_token_ids)
        self._lock = threading.Lock()
        self._made: Any = cachetools.LRUCache(KEPT_BYTES, getsizeof=_bytes_of)
        self._tried: Any = cachetools.LRUCache(MAX_TRIED)

    def matcher(self, schema: str) -> Any:
        """Return a matcher at its beginning. Raises InputError."""
        key = hashlib.sha256(schema.encode()).digest()
        with self._lock:
            made = self._made.get(key)
            if mine := made is None:
                made = self._made[key] = Future()
        if mine:
            self._make(key, schema, made)
        if isinstance(found := made.result(), str):
            raise labs.InputError(f"schema: {found}")
        return found.deep_copy()

    def anew(self, schema: str) -> Any:
        """Return a matcher as matcher does, which shares nothing with those of before."""
        with self._lock:
            self._made.pop(hashlib.sha256(schema.encode()).digest(), None)
        return self.matcher(schema)

    def allowed(self, matcher: Any, tokens: Any) -> Any:
        """Return tokens [V], all false before, with those that may follow set."""
        import torch

        bits = torch.frombuffer(bytearray(matcher.compute_bitmask()), dtype=torch.uint8)
        found = (bits[:, None] >> torch.arange(8, dtype=torch.uint8) & 1).bool().view(-1)
        size = min(len(tokens), len(found))
        tokens[:size] = found[:size]
        tokens[[end for end in self._ends if end < len(tokens)]] = matcher.is_accepting()
        return tokens

    def _make(self, key: bytes, schema: str, made: Future[Any]) -> None:
        """Compile a schema for all who wait for it; what is wrong with it is remembered too."""
        try:
            made.set_result(self._compiled(key, schema))
        except BaseException as error:
            made.set_exception(error)
        with self._lock:
            if self._made.get(key) is made:
                del self._made[key]
                if made.exception() is None:
                    self._made[key] = made  # counted by what it holds now

    def _compiled(self, key: bytes, schema: str) -> Any:
        import torch

        if key not in self._tried:
            try:
                wrong = labs_schema.trial(schema)
            except (OSError, subprocess.SubprocessError) as error:
                raise labs.GenerationError(f"the schema could not be tried out: {error}") from error
            if wrong:
                return wrong
        found = labs_schema.compiled(self._library, self._tokenizer, schema)
        if isinstance(found, str):
            return found
        first = self.allowed(found, torch.zeros(self._vocabulary, dtype=torch.bool))
        if found.is_error() or not first.any():
            return labs_schema.told(found) or "no JSON is as it asks, in this model's tokens"
        with self._lock:
            self._tried[key] = True
        return found


def _bytes_of(made: Future[Any]) -> int:
    refused = made.done() and isinstance(made.result(), str)
    return len(made.result()) if refused else GRAMMAR_BYTES


def read_options(
    model: labs.Model, inputs: labs.Inputs, options: Sequence[str]
) -> labs_choose.Options:
    """Return answers to choose among as the model reads them, for an engine."""
    labs.require("labs_choose")
    import labs_choose

    return labs_choose.Options(model, inputs, options)


def choose(model: labs.Model, inputs: labs.Inputs, options: Sequence[str]) -> dict[str, float]:
    """Return the probability of each option as the whole answer, with an end after it.

    They are scaled so that all sum to 1. Raises what labs_choose.Options refuses.
    """
    asked = read_options(model, inputs, options)
    row = labs.open_request(model, 0, inputs, asked.generation()).row
    for _ in asked.parts(row, model.prefixes):
        pass
    return dict(zip(options, asked.shares, strict=True))
