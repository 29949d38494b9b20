# SPDX-License-Identifier: Apache-2.0
"""Answers of a given type, and choices among given answers.

    city = labs_typed.generate_as(model, inputs, City)              # a msgspec struct, or any type
    labs_typed.choose(model, inputs, ["yes", "no"])                 # {"yes": 0.97, "no": 0.03}
    only = labs_typed.Constraint(model, schema)                     # JSON schema, as a dict
    labs.generate(model, inputs, processors=[only])                 # one Constraint for each answer

The grammar is llguidance's (pip install llguidance): before each token it tells which ones may
follow, and the row chooses among those. A schema that it cannot express is refused, and the error
names the keyword. Needs labs.py.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import threading
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

import labs

if TYPE_CHECKING:
    import labs_decode

T = TypeVar("T")
MAX_GRAMMARS = 256  # remembered for each tokenizer
LARGEST_INTEGER = (
    2**53 - 1
)  # of integers without a bound: what all readers of JSON agree on (RFC 8259 §6)
_TOKENIZERS: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
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
        bounds |= {} if "exclusiveMinimum" in schema else {"minimum": -LARGEST_INTEGER}
        bounds |= {} if "exclusiveMaximum" in schema else {"maximum": LARGEST_INTEGER}
    return {**bounds, **{key: _bounded(value) for key, value in schema.items()}}


class Constraint:
    """Keeps one answer to JSON of a schema; a processor as in labs_decode.Sampling.

    Raises InputError, which names the keyword that cannot be expressed.
    """

    def __init__(self, model: labs.Model, schema: dict[str, Any]) -> None:
        self._matcher = _matcher(model, json.dumps(schema)).deep_copy()
        self._ends = list(model.eos_token_ids)
        self._start: int | None = None
        self._read: list[int] = []

    def __call__(self, ids: list[int], logits: Any) -> Any:
        """Return logits [V] with -inf for each token that may not follow `ids`.

        ids: of the prompt in the first call, then of the prompt and the answer. A later call may
        have fewer: guessed tokens can be wrong.
        """
        import torch

        self._start = len(ids) if self._start is None else self._start
        self._follow(ids[self._start :])
        bits = torch.frombuffer(bytearray(self._matcher.compute_bitmask()), dtype=torch.uint8)
        allowed = bits[:, None] >> torch.arange(8, dtype=torch.uint8) & 1
        allowed = allowed.bool().view(-1)[: len(logits)]
        allowed[self._ends] = self._matcher.is_accepting()
        return logits.masked_fill(~allowed.to(logits.device), float("-inf"))

    def _follow(self, answer: list[int]) -> None:
        pairs = zip(self._read, answer, strict=False)
        common = next((i for i, (old, new) in enumerate(pairs) if old != new), None)
        common = min(len(self._read), len(answer)) if common is None else common
        if common < len(self._read):
            self._matcher.rollback(len(self._read) - common)
        if not self._matcher.consume_tokens(answer[common:]):
            raise labs.GenerationError(f"the grammar lost track: {self._matcher.get_error()}")
        self._read = answer


def _matcher(model: labs.Model, schema: str) -> Any:
    """Return a matcher at its beginning, to be copied; made once for a tokenizer and schema."""
    with _LOCK:  # making one takes a third of a second for a tokenizer, then a millisecond
        if (make := _TOKENIZERS.get(model.tokenizer)) is None:
            make = _TOKENIZERS[model.tokenizer] = _maker(model)
        return make(schema)


def _maker(model: labs.Model) -> Any:
    if importlib.util.find_spec("llguidance") is None:
        raise labs.InputError("answers of a type need llguidance: pip install llguidance")
    llguidance: Any = importlib.import_module("llguidance")
    hf: Any = importlib.import_module("llguidance.hf")
    tokenizer = hf.from_tokenizer(model.tokenizer, n_vocab=model.decoder.config.vocab_size)
    compact = {"whitespace_flexible": False}  # a small model may write blanks without end

    @functools.lru_cache(MAX_GRAMMARS)
    def make(schema: str) -> Any:
        if '"contentEncoding": "' in schema:  # the keyword, which llguidance passes over
            raise labs.InputError('schema: Unimplemented keys: ["contentEncoding"]')
        grammar = llguidance.LLMatcher.grammar_from_json_schema(schema, overrides=compact)
        wrong, told = llguidance.LLMatcher.validate_grammar_with_warnings(grammar, tokenizer)
        if wrong or told:
            raise labs.InputError(f"schema: {'; '.join(told)}")
        return llguidance.LLMatcher(tokenizer, grammar)

    return make


def choose(model: labs.Model, inputs: labs.Inputs, options: Sequence[str]) -> dict[str, float]:
    """Return the probability of each option as the whole answer, in one forward call.

    That is the probability of its tokens and an end after them, scaled so that all sum to 1.
    Raises InputError for fewer than two options, equal or empty ones, PromptTooLong.
    """
    if len(options) < 2 or len({*options}) < len(options) or not all(options):
        raise labs.InputError("options: give two or more different texts")
    with model.lock:
        encode = functools.partial(model.tokenizer, add_special_tokens=False)
        ids = [list(encode(option)["input_ids"]) for option in options]
    longest, limit = len(inputs.input_ids) + max(map(len, ids)), model.context_length
    if limit is not None and longest > limit:
        raise labs.PromptTooLong(
            f"prompt and option have {longest} tokens: the context holds {limit}"
        )
    prompt, ends = list(inputs.input_ids), list(model.eos_token_ids)
    probabilities = option_probabilities(model.decoder, prompt, ids, ends)
    return dict(zip(options, probabilities, strict=True))


def option_probabilities(
    decoder: labs_decode.Decoder, prompt: list[int], options: list[list[int]], ends: list[int]
) -> list[float]:
    """Return the probability of each option, with one of `ends` after it, among all options.

    prompt, options and ends are token ids. One forward call: the rows are padded on the right,
    where nothing before can see.
    """
    import torch

    longest = max(map(len, options))
    rows = [[*prompt, *each, *[0] * (longest - len(each))] for each in options]
    words = {"use_cache": False, "logits_to_keep": longest + 1}
    known = {name: value for name, value in words.items() if name in decoder.forward_words}
    with torch.inference_mode():
        inputs = torch.tensor(rows, device=decoder.device)
        logits = decoder.model(input_ids=inputs, return_dict=True, **known).logits
        logprobs = logits[:, -longest - 1 :].float().log_softmax(-1)
        totals = [
            sum(row[place, token] for place, token in enumerate(each))
            + (row[len(each), ends].logsumexp(-1) if ends else 0.0)
            for row, each in zip(logprobs, options, strict=True)
        ]
        return list(torch.stack(totals).cpu().double().softmax(-1).tolist())
