# SPDX-License-Identifier: Apache-2.0
"""Shared by the tests of decoding: tiny models with transformers' own tokens, rows that join."""

from __future__ import annotations

import dataclasses
import functools
import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from kit import NEW_TOKENS, PROMPTS, by_transformers, newcomer, prepare, random_model, row_of

import labs_decode as decode
import labs_loop as loop

FOUR = [PROMPTS[i] for i in (0, 2, 3, 4)]  # of 1, 5, 11 and 23 tokens
NO_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


@functools.cache
def reference(kind: str) -> tuple[decode.Decoder, list[list[int]]]:
    """Return a tiny model's decoder, and the tokens that transformers' generate gives FOUR."""
    model = random_model(kind)
    expected = [by_transformers(model, prompt) for prompt in FOUR]
    return prepare(model), expected


def rows_of(lengths: dict[int, int]) -> list[decode.Row]:
    """Return rows with ids and prompts by number: {number: max_new_tokens}."""
    found = []
    for number, new in lengths.items():
        chance = random.Random(number)
        row = row_of([chance.randrange(3, 200) for _ in range(5 + number)], number)
        row.max_new_tokens, row.sampling = new, dataclasses.replace(row.sampling, logprobs=1)
        found.append(row)
    return found


def joined(decoder: decode.Decoder, keys: Iterable[int]) -> decode.Batch:
    """Return a batch of FOUR's prompts with these numbers, which are also the rows' ids."""
    first, *rest = (newcomer(decoder, FOUR[key], key) for key in keys)
    return functools.reduce(decode.join, rest, first)


def tokens_of(row: decode.Row) -> list[int]:
    return row.ids[row.prompt_length :]


def answers_of(decoder: decode.Decoder, batches: Sequence[decode.Batch]) -> dict[Any, list[int]]:
    """Step each batch until all of its rows have their tokens; return these by row id."""
    found: dict[Any, list[int]] = {}
    for each in batches:
        batch: decode.Batch | None = each
        while batch:
            done = [row for row in batch.rows if sum(row.generated.values()) == NEW_TOKENS]
            found |= {row.id: tokens_of(row) for row in done}
            batch = decode.keep(batch, [row.id for row in batch.rows if row.id not in found])
            batch = loop.step(decoder, batch)[0] if batch else None
    return found


def run_at_random(
    decoder: decode.Decoder,
    prompts: Sequence[list[int]],
    seed: int,
    most: int = 8,
    see: Callable[[decode.Batch], object] = lambda batch: None,
    leave: float = 0.02,
) -> list[list[int]]:
    """Return the tokens of rows that join and leave at random; `see` gets each step's batch."""
    chance, waiting = random.Random(seed), list(range(len(prompts)))
    batch: decode.Batch | None = None
    found: dict[Any, list[int]] = {}
    while waiting or batch:
        if waiting and (batch is None or (len(batch.rows) < most and chance.random() < 0.5)):
            key = waiting.pop(0)
            new = newcomer(decoder, prompts[key], key)
            batch = decode.join(batch, new) if batch else new
        elif batch:
            batch, _ = loop.step(decoder, batch)
            see(batch)
            over = [r for r in batch.rows if len(r.ids) == r.columns or chance.random() < leave]
            found |= {row.id: tokens_of(row) for row in over}
            batch = decode.keep(batch, [row.id for row in batch.rows if row.id not in found])
    assert sum(map(len, found.values())) > 0.3 * NEW_TOKENS * len(prompts)
    return [found[key] for key in range(len(prompts))]


def begin_alike(found: list[list[int]], expected: list[list[int]]) -> bool:
    """Return whether rows have the first of the tokens expected of FOUR, again and again."""
    wanted = [expected[i % len(expected)][: len(tokens)] for i, tokens in enumerate(found)]
    return found == wanted


def raising(error: BaseException) -> Any:
    """Return a function that raises this, whatever it is given."""

    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


def failing_at(call: int, monkeypatch: Any, owner: Any, name: str) -> None:
    """Let one call of a function run out of memory; the calls before and after it work."""
    original, calls = getattr(owner, name), iter(range(10**6))

    def once(*args: Any) -> Any:
        return (raising(NO_MEMORY) if next(calls) == call else original)(*args)

    monkeypatch.setattr(owner, name, once)
