# SPDX-License-Identifier: Apache-2.0
"""Answers of a given type, and choices among given answers.

    city = labs_typed.generate_as(model, inputs, City)              # a msgspec struct, or any type
    labs_typed.choose(model, inputs, ["yes", "no"])                 # {"yes": 0.97, "no": 0.03}
    only = labs_typed.Constraint(model, schema)                     # JSON schema, as a dict
    only = labs_typed.Constraint(model, labs_structured.regex("[0-9]+"))  # or choice, or grammar
    labs.generate(model, inputs, processors=[only])                 # one Constraint for each answer

Before each token, llguidance (pip install llguidance) computes the tokens that the schema allows,
and the row samples among those. A schema that llguidance does not support is refused, and the
error names the keyword. Schemas come from untrusted clients and llguidance is native code, so each
schema is first measured, then compiled in a separate process, and only then compiled here. Needs
labs.py, labs_keywords.py, labs_schema.py and labs_structured.py; `choose` needs labs_choose.py.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import re
import subprocess
import threading
import weakref
from collections.abc import Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

import labs
import labs_keywords
import labs_schema
import labs_structured
from labs_structured import Grammar

if TYPE_CHECKING:
    import labs_choose

T = TypeVar("T")
GRAMMAR_BYTES = 2**24  # memory that one grammar may take within labs_schema.LIMITS
KEPT_BYTES = 2**28  # size of the cache of grammars, for each tokenizer
MAX_TRIED = 4096  # schemas remembered because their trial succeeded
SPACING = 64  # tokens of an answer before its grammar may be compiled again
_TOKENIZERS: weakref.WeakKeyDictionary[Any, _Grammars] = weakref.WeakKeyDictionary()
_LOCK = threading.Lock()


class IncompleteOutput(labs.GenerationError):
    """The answer ended before it was complete; `completion` holds the part that was generated."""

    def __init__(self, completion: labs.Completion) -> None:
        reason = completion.finish_reason
        super().__init__(f"the answer is incomplete ({reason}); allow more tokens or time")
        self.completion = completion


def generate_as(
    model: labs.Model,
    inputs: labs.Inputs,
    kind: type[T],
    generation: labs.Generation | None = None,
    **changes: Any,
) -> T:
    """Generate an answer and return it decoded as `kind`, a type that msgspec supports.

    Raises IncompleteOutput when the answer was cut short, InputError when the type has no JSON
    schema or llguidance does not support its schema.
    """
    try:
        schema = labs_keywords.bounded(msgspec.json.schema(kind))
    except TypeError as error:
        raise labs.InputError(f"{kind}: {error}") from error
    only = Constraint(model, schema)
    completion = labs.generate(model, inputs, generation, processors=[only], **changes)
    if completion.finish_reason != "stop" or completion.matched_stop is not None:
        raise IncompleteOutput(completion)
    try:
        return msgspec.json.decode(completion.text, type=kind)
    except msgspec.DecodeError as error:  # a schema cannot exclude 31 February
        raise labs.GenerationError(f"the answer is not a valid {kind}: {error}") from error


class Constraint:
    """Restricts one answer to JSON that matches a schema, or to the texts of a grammar.

    It is a processor as in labs_decode.Sampling. Raises InputError, which names the unsupported
    keyword or the exceeded bound, and its place.
    """

    def __init__(self, model: labs.Model, schema: dict[str, Any] | Grammar) -> None:
        self._what = schema.what if isinstance(schema, Grammar) else "schema"
        try:
            held = schema.text if isinstance(schema, Grammar) else labs_keywords.checked(schema)
        except labs_schema.SchemaError as error:
            raise labs.InputError(f"schema: {error}") from error
        self._schema = held
        self._grammars = _grammars_of(model)
        try:
            self._matcher = self._grammars.matcher(held, self._what)
        except labs.InputError as error:
            names = [] if isinstance(schema, Grammar) else labs_keywords.replaced(schema, held)
            if not names:
                raise
            reason = str(error).removeprefix("schema: ")
            raise labs.InputError(
                f"schema: {', '.join(names)} cannot be followed: {reason}"
            ) from error
        self._made_at = -SPACING
        self._start: int | None = None
        self._read: list[int] = []

    def __call__(self, ids: list[int], logits: Any) -> Any:
        """Return logits [V] with -inf for each token that may not follow `ids`.

        ids: the prompt's tokens in the first call, then the prompt's and the answer's. A later call
        may have fewer, because guessed tokens can be wrong. Raises InputError at a grammar's limit.
        """
        self._start = len(ids) if self._start is None else self._start
        answer = ids[self._start :]
        if answer and self._grammars.ends(answer[-1]):
            raise labs.InputError(f"{self._what}: the answer has ended; ignore_eos has no effect")
        allowed = self._allowed(answer, len(logits))
        if self._matcher.is_error() and len(answer) >= self._made_at + SPACING:
            # Answers share the states of a grammar's lexer, which are limited: start with none.
            self._matcher, self._read = self._grammars.anew(self._schema, self._what), []
            self._made_at = len(answer)
            allowed = self._allowed(answer, len(logits))
        if self._matcher.is_error():
            reason = labs_schema.error_of(self._matcher)
            raise labs.InputError(f"{self._what}: the grammar failed during the answer: {reason}")
        if not allowed.any():
            raise labs.InputError(f"{self._what}: no token of this model can continue the answer")
        import torch

        refused = torch.from_numpy(~allowed).to(logits.device)
        return logits.masked_fill(refused, float("-inf"))

    def _allowed(self, answer: list[int], size: int) -> Any:
        """Return a mask [size] of the tokens that may follow; the matcher holds any error."""
        pairs = zip(self._read, answer, strict=False)
        common = next((i for i, (old, new) in enumerate(pairs) if old != new), None)
        common = min(len(self._read), len(answer)) if common is None else common
        if common < len(self._read):
            self._matcher.rollback(len(self._read) - common)
        self._matcher.consume_tokens(answer[common:])
        self._read = answer
        return self._grammars.allowed(self._matcher, size)


def _grammars_of(model: labs.Model) -> _Grammars:
    with _LOCK:  # reading a tokenizer takes most of a second, so it happens once
        if (grammars := _TOKENIZERS.get(model.tokenizer)) is None:
            grammars = _TOKENIZERS[model.tokenizer] = _Grammars(model)
        return grammars


def symbols(model: labs.Model, text: str) -> list[str]:
    """Return a text as symbols of a grammar: special tokens by their ids, the rest in quotes."""
    return _grammars_of(model).symbols(model, text)


class _Grammars:
    """Matchers for one tokenizer; a schema is compiled once, and only its requests wait for it."""

    def __init__(self, model: labs.Model) -> None:
        if importlib.util.find_spec("llguidance") is None:
            raise labs.InputError("a schema needs llguidance: pip install llguidance")
        labs.require("cachetools")
        import cachetools

        self._library: Any = importlib.import_module("llguidance")
        hf: Any = importlib.import_module("llguidance.hf")
        self._vocabulary = model.decoder.config.vocab_size
        count = max(self._vocabulary, len(model.tokenizer))  # a tokenizer may have more tokens
        try:
            self._tokenizer = hf.from_tokenizer(model.tokenizer, n_vocab=count)
        except ValueError as error:
            raise labs.InputError(f"llguidance cannot use this tokenizer: {error}") from error
        self._ends = list(model.eos_token_ids)
        texts = self._special(model).keys()
        self._marks = {*texts, *(json.dumps(each)[1:-1] for each in texts)}
        self._lock = threading.Lock()
        self._made: Any = cachetools.LRUCache(KEPT_BYTES, getsizeof=_bytes_of)
        self._tried: Any = cachetools.LRUCache(MAX_TRIED)

    def ends(self, token: int) -> bool:
        return token in self._ends

    def matcher(self, schema: str, what: str) -> Any:
        """Return a matcher at the start of an answer. Raises InputError for a refused schema."""
        key = hashlib.sha256(schema.encode()).digest()
        with self._lock:
            made = self._made.get(key)
            if mine := made is None:
                made = self._made[key] = Future()
        if mine:
            self._make(key, schema, made)
        if isinstance(found := made.result(), str):
            raise labs.InputError(f"{what}: {labs_structured.plain(found)}")
        return found.deep_copy()

    def _special(self, model: labs.Model) -> dict[str, int]:
        added = {str(token): i for i, token in model.tokenizer.added_tokens_decoder.items()}
        return {each: i for each, i in added.items() if self._tokenizer.is_special_token(i)}

    def symbols(self, model: labs.Model, text: str) -> list[str]:
        special = self._special(model)
        found = [each for each in special if each in text]
        parts = re.split(f"({'|'.join(map(re.escape, sorted(found, key=len)[::-1]))})", text)
        parts = parts if found else [text]
        return [f"<[{special[p]}]>" if p in special else json.dumps(p) for p in parts if p]

    def anew(self, schema: str, what: str) -> Any:
        """Compile the schema again; return a matcher that shares no state with earlier ones."""
        with self._lock:
            self._made.pop(hashlib.sha256(schema.encode()).digest(), None)
        return self.matcher(schema, what)

    def allowed(self, matcher: Any, size: int) -> Any:
        """Return an array [size] of which tokens may follow.

        It is numpy's, which computes in one thread: torch's threads are the engine's.
        """
        import numpy

        packed = numpy.frombuffer(matcher.compute_bitmask(), dtype=numpy.uint8)
        found = numpy.unpackbits(packed, bitorder="little").view(bool)[:size]
        tokens = numpy.concatenate([found, numpy.zeros(size - len(found), dtype=bool)])
        tokens[[end for end in self._ends if end < size]] = matcher.is_accepting()
        return tokens

    def _make(self, key: bytes, schema: str, made: Future[Any]) -> None:
        """Compile a schema for all requests that wait for it; its refusal is remembered too."""
        try:
            made.set_result(self._compiled(key, schema))
        except BaseException as error:
            made.set_exception(error)
        with self._lock:
            if self._made.get(key) is made:
                del self._made[key]
                if made.exception() is None:
                    self._made[key] = made  # now that it is done, the cache reads its real size

    def _compiled(self, key: bytes, schema: str) -> Any:
        if key not in self._tried:
            try:
                wrong = labs_schema.trial(schema)
            except (OSError, subprocess.SubprocessError) as error:
                raise labs.GenerationError(f"the schema's trial could not run: {error}") from error
            if wrong:
                return wrong
        found = labs_schema.compiled(self._library, self._tokenizer, self._unforced(schema))
        if isinstance(found, str):
            return found
        first = self.allowed(found, self._vocabulary)
        if found.is_error() or not first.any():
            return labs_schema.error_of(found) or "this model's tokens can write no answer for it"
        with self._lock:
            self._tried[key] = True
        return found

    def _unforced(self, schema: str) -> str:
        """Return a grammar of the same answers which forces no text, if that of a token is in it.

        See labs_structured.HEAD.
        """
        if not any(each in schema for each in self._marks):
            return schema
        if schema.startswith(labs_schema.GRAMMAR):
            return labs_structured.HEAD + schema.partition("\n")[2]
        compact = {**json.loads(schema), "x-guidance": {"whitespace_flexible": False}}
        return f"{labs_structured.HEAD}start: %json {json.dumps(compact)}\n"


def _bytes_of(made: Future[Any]) -> int:
    refused = made.done() and isinstance(made.result(), str)
    return len(made.result()) if refused else GRAMMAR_BYTES


def read_options(
    model: labs.Model, inputs: labs.Inputs, options: Sequence[str]
) -> labs_choose.Options:
    """Return answers to choose among, tokenised for the model, ready for an engine."""
    labs.require("labs_choose")
    import labs_choose

    return labs_choose.Options(model, inputs, options)


def choose(model: labs.Model, inputs: labs.Inputs, options: Sequence[str]) -> dict[str, float]:
    """Return each option's probability of being the whole answer, its end included.

    The probabilities are scaled to sum to 1. Raises the errors of labs_choose.Options.
    """
    choice = read_options(model, inputs, options)
    row = labs.open_request(model, 0, inputs, choice.generation()).row
    for _ in choice.parts(row, model.prefixes):
        pass
    return dict(zip(options, choice.shares, strict=True))
