# SPDX-License-Identifier: Apache-2.0
"""The part `draft`: what a draft model can save and cost, by shapes with random weights."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import torch
import transformers

import labs
import labs_decode
import labs_draft
import labs_faster
import labs_loop
from bench.parts import random_inputs, rate, report

# hidden size, size of the MLP, layers, heads, heads of keys: those of SmolLM2
SHAPES = {
    "135M": (576, 1536, 30, 9, 3),
    "360M": (960, 2560, 32, 15, 5),
    "1.7B": (2048, 8192, 24, 32, 32),
}
CASES = (("135M", "135M"), ("360M", "135M"), ("1.7B", "135M"))
PROMPT, NEW, PAIRS = 200, 48, 5
GUESSES = 3  # for each of several rows


def decoder_of(shape: str, invariant: bool) -> labs_decode.Decoder:
    """Return a decoder of random weights in float32, with what makes a loaded model fast."""
    hidden, mlp, layers, heads, groups = SHAPES[shape]
    config = transformers.LlamaConfig(
        **{"hidden_size": hidden, "intermediate_size": mlp, "num_hidden_layers": layers},
        **{"num_attention_heads": heads, "num_key_value_heads": groups, "vocab_size": 49152},
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    spec = labs.ModelSpec(torch_dtype="fp32", batch_invariant=invariant)
    prepared = labs_decode.prepare(model.eval(), batch_invariant=invariant)
    return labs_faster.speed_up(prepared, spec)


def prefilled(decoder: labs_decode.Decoder, ids: list[int], number: int = 0) -> Any:
    row = labs_decode.Row(number, ids, 4 * NEW, labs_decode.Sampling())
    batch = labs_decode.new_batch(decoder, row)
    while batch.pending:
        batch = labs_decode.prefill(decoder, batch)
    return labs_loop.step(decoder, batch)[0]


def told(right: bool) -> Callable[..., Any]:
    """Return a `choose` whose tokens do not depend on logits: the draft's are right or wrong."""
    choose = labs_loop.choose

    def chosen(logits: Any, rows: Any) -> list[Any]:
        choose(logits, rows)  # for the time that it takes
        wrong = [not right and row.drafted is None for row in rows]
        places = [100 + len(row.ids) + 5000 * each for row, each in zip(rows, wrong, strict=True)]
        return [labs_loop.Choice(token) for token in places]

    return chosen


def answer(decoder: labs_decode.Decoder, step: Callable[..., Any], batch: Any) -> int:
    """Decode one row to its end; the draft reads the prompt in this time, the model did before."""
    tokens = 0
    while tokens < NEW:
        batch, choices = step(decoder, batch)
        tokens += len(choices)
    return tokens


def timed(decoder: labs_decode.Decoder, step: Callable[..., Any], ids: list[int]) -> float:
    return rate(partial(answer, decoder, step, prefilled(decoder, ids)))


def one_row(name: str, decoder: Any, small: Any, ids: list[int]) -> None:
    """A lone row with guesses that are all right or all wrong, against the same row without."""
    for right, words in ((True, "all right"), (False, "all wrong")):
        pairs = []
        with mock.patch.object(labs_loop, "choose", told(right)):
            for _ in range(PAIRS + 1):
                guessing = labs_draft.guessing(decoder, labs_draft.Draft("", small))
                assert guessing.step_alone is not None
                guessed = timed(decoder, guessing.step_alone, [*ids])
                pairs.append((guessed, timed(decoder, labs_loop.step, [*ids])))
        report(f"{name}, 1 row, guesses {words} / none", pairs[1:])


def rows_of(decoder: labs_decode.Decoder, rows: int) -> Any:
    """Return one batch of rows with prompts of their own."""
    batches: list[Any] = []
    for number, each in enumerate(random_inputs([PROMPT] * rows)):
        one = prefilled(decoder, list(each.input_ids), number)
        batches = [labs_decode.join(batches[0], one) if batches else one]
    return batches[0]


def four_rows(name: str, decoder: Any, small: Any) -> None:
    """A prototype: a call of 16 rows, which is 4 rows with 3 right guesses each, over 4 steps."""
    few, many, drafts = rows_of(decoder, 4), rows_of(decoder, 16), rows_of(small, 4)
    with torch.inference_mode():
        pairs = []
        for _ in range(PAIRS + 1):
            began = time.perf_counter()
            for _ in range(GUESSES):
                labs_decode.forward(small, drafts).argmax(-1).tolist()
            labs_loop.choose(labs_decode.forward(decoder, many), many.rows)
            middle = time.perf_counter()
            labs_loop.choose(labs_decode.forward(decoder, few), few.rows)
            seconds = middle - began, time.perf_counter() - middle
            pairs.append((16 / seconds[0], 4 / seconds[1]))
    report(f"{name}, 4 rows, 3 guesses each, all right / none", pairs[1:])


def draft() -> None:
    """Guesses of a draft model that are all right or all wrong, against none."""
    ids = list(random_inputs([PROMPT])[0].input_ids)
    for large, little in CASES:
        decoder, small = decoder_of(large, True), decoder_of(little, False)
        name = f"{large} with a draft of {little}"
        one_row(name, decoder, small, ids)
        four_rows(name, decoder, small)
