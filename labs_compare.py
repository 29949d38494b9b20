# SPDX-License-Identifier: Apache-2.0
"""The logits of rows in a batch, compared with those that transformers' own forward gives.

    own = labs_compare.Own.of(decoder.model)
    print(own.wrong(labs_compare.together(decoder, own.texts)) or "rows run together as alone")

This file needs labs_decode.py.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import random
import statistics
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

import labs_decode
from labs_decode import Batch, Decoder, Row, Sampling, Tensor

PROMPTS = (11, 4, 7)  # tokens of the rows; the first is written in two chunks and leaves first
SAME = 9  # tokens that the first and the fourth text have in common
MORE = 8  # tokens of each text after its prompt
OFF = 0.01  # share of the logits' spread, in float32; measured: right below 2e-5, wrong above 0.05
OFF_IN_16_BITS = 0.15  # for a row's median; single tokens of mixtures of experts reach 0.3

Logits = Iterator[tuple[int, int, Tensor]]  # index of a text, position in it, logits after it


@dataclass(frozen=True, slots=True)
class Own:
    """Three texts with the logits [T, V] of transformers' own forward without a cache.

    A fourth text is the first one with another second half. most: the largest accepted difference.
    fault: why there are no logits.
    """

    texts: list[list[int]]
    logits: list[Tensor]
    most: float
    fault: str

    @classmethod
    def of(cls, model: Any) -> Own:
        config, chance = model.config.get_text_config(), random.Random(0)
        named = {**vars(model.config), **vars(config)}.items()
        special = {value for name, value in named if "_token" in name and isinstance(value, int)}
        plain = [each for each in range(min(config.vocab_size, 2**15)) if each not in special]
        texts = [chance.choices(plain, k=length + MORE) for length in PROMPTS]
        texts.append(texts[0][:SAME] + chance.choices(plain, k=len(texts[0]) - SAME))
        try:
            logits, fault = [_plain_logits(model, text) for text in texts], ""
        except Exception as error:  # a model's code may raise anything
            if labs_decode.out_of_memory(error):
                raise
            logits, fault = [], f"its forward fails on token ids alone ({_line(error)})"
        most = OFF if model.dtype == torch.float32 else OFF_IN_16_BITS
        # Other rows of a call change the rounding of 8-bit products: only failures count.
        most = math.inf if hasattr(model.config, "quantization_config") else most
        return cls(texts, logits, most, fault)

    @property
    def looks_both_ways(self) -> bool:
        """Whether later tokens change the logits of earlier ones."""
        offs = [off(self.logits[3][i], self.logits[0][i]) for i in range(SAME) if self.logits]
        return bool(offs) and statistics.median(offs) > self.most / 3

    def wrong(self, found: Logits) -> str:
        """Return what is wrong with the logits found, as a phrase, or "" if nothing is."""
        offs = defaultdict[int, list[float]](list)
        try:
            for text, place, logits in found:
                offs[text].append(off(logits, self.logits[text][place]))
        except Exception as error:  # a model's code may raise anything
            if labs_decode.out_of_memory(error):
                raise
            return f"rows of different length fail ({_line(error)})"
        rows = [*offs.values()]
        if min(map(len, rows)) == 1:  # single logits in 16 bits are off by chance: take all rows
            rows = [[each for row in rows for each in row]]
        worst = max(map(statistics.median, rows))
        return "" if worst <= self.most else f"rows have other logits than alone ({worst:.0%} off)"


def _plain_logits(model: Any, text: list[int]) -> Tensor:
    words = {"input_ids": torch.tensor([text], device=model.get_input_embeddings().weight.device)}
    known = inspect.signature(model.forward).parameters
    flags = {name: False for name in ("use_cache",) if name in known}
    return model(**words, **flags, return_dict=True).logits[0].float()  # type: ignore[no-any-return]


def off(found: Tensor, expected: Tensor) -> float:
    """Return the difference of logits as a share of the spread of the expected ones."""
    found, expected = found.flatten().float(), expected.flatten().to(found.device)
    at = expected.isfinite()  # some models mask the tokens that pad their vocabulary
    spread = (expected[at] - expected[at].mean()).norm().clamp_min(torch.finfo(torch.float32).tiny)
    off = float((found[at] - expected[at]).norm() / spread)
    return off if off == off else math.inf


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"[:160]


def _newcomer(decoder: Decoder, texts: list[list[int]], index: int) -> Batch:
    row = Row(
        id=index,
        ids=texts[index][: PROMPTS[index]],
        max_new_tokens=2 * MORE,
        sampling=Sampling(),
    )
    return labs_decode.new_batch(decoder, row)


def _prefilled(decoder: Decoder, texts: list[list[int]], index: int) -> Batch:
    """Write a prompt; write the first one in two chunks, as if its second half came later."""
    batch = _newcomer(decoder, texts, index)
    row, rest = batch.rows[0], list[int]()
    if index == 0 and decoder.mode == "joins":
        row.ids, rest = row.ids[:5], row.ids[5:]
        row.prompt_length = len(row.ids)
        batch = labs_decode.prefill(decoder, batch)
        row.ids, row.prompt_length = row.ids + rest, PROMPTS[0]
    while batch.pending:
        batch = labs_decode.prefill(decoder, batch)
    return batch


def _stepped(decoder: Decoder, batch: Batch, texts: list[list[int]]) -> Logits:
    logits = labs_decode.forward(decoder, batch) if batch.logits is None else batch.logits
    for row, line in zip(batch.rows, logits, strict=True):
        yield row.id, len(row.ids) - 1, line
        row.take(texts[row.id][len(row.ids)], batch.logits is None)


def together(decoder: Decoder, texts: list[list[int]]) -> Logits:
    """Yield the logits of three rows that join one after the other until the first one leaves."""
    batch: Batch | None = None
    for index in range(len(PROMPTS)):
        newcomer = _prefilled(decoder, texts, index)
        yield from _stepped(decoder, newcomer, texts)
        newcomer = replace(newcomer, logits=None)
        batch = labs_decode.join(batch, newcomer) if batch else newcomer
        yield from _stepped(decoder, batch, texts)
    for _ in range(2):
        batch = labs_decode.keep(batch, [1, 2]) if batch else None
        yield from _stepped(decoder, batch, texts) if batch else ()


def guesses(decoder: Decoder, texts: list[list[int]]) -> Logits:
    """Yield the logits of three tokens of one row, computed as rows that read the same slot."""
    batch, row = (found := _prefilled(decoder, texts, 1)), found.rows[0]
    ids = torch.tensor(texts[1][row.written : row.written + 3], device=decoder.device)
    places = [row.written + i for i in range(len(ids))]
    logits = labs_decode.forward_slots(decoder, batch, ids[:, None], places)
    yield from zip([1] * len(ids), places, logits, strict=True)


def packed(decoder: Decoder, texts: list[list[int]]) -> Logits:
    """Yield the logits of three prompts that are written in one call."""
    newcomers = [_newcomer(decoder, texts, index) for index in range(len(PROMPTS))]
    together = decoder.prefill_packed(decoder, newcomers) if decoder.prefill_packed else []
    for index, batch in enumerate(together):
        if batch.logits is not None:
            yield index, PROMPTS[index] - 1, batch.logits


def wrong_alone(decoder: Decoder, own: Own) -> str:
    """Return how a model that runs alone differs from its own `generate`, as a phrase, or ""."""
    prompt = torch.tensor([own.texts[0][: PROMPTS[0]]], device=decoder.device)
    options = {"attention_mask": torch.ones_like(prompt), "do_sample": False, "num_beams": 1}
    options |= {"max_new_tokens": 3, "output_logits": True, "return_dict_in_generate": True}
    try:
        batch, found = _newcomer(decoder, own.texts, 0), list[Tensor]()
        for _ in range(3):
            found.append(labs_decode.forward(decoder, batch))
            batch.rows[0].take(int(found[-1].argmax()))
    except Exception as error:  # a model's code may raise anything
        if labs_decode.out_of_memory(error):
            raise
        return f"cannot generate from token ids alone ({_line(error)})"
    with contextlib.suppress(Exception):  # labs runs some models that generate does not
        expected = decoder.model.generate(prompt, **options).logits
        if any(off(*pair) > own.most for pair in zip(found[:1], expected[:1], strict=True)):
            return "gives other logits in labs than in transformers' generate"
    return ""
