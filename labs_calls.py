# SPDX-License-Identifier: Apache-2.0
"""Other forward calls: packed prompts, several texts after one prompt, guessed tokens, split steps.

    decoder = labs_calls.speed_up(labs_decode.prepare(model))

Needs labs_alone.py, labs_decode.py, labs_loop.py, labs_states.py and labs_waiting.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import DynamicCache, cache_utils
from transformers.cache_utils import CacheLayerMixin
from transformers.masking_utils import causal_mask_function

import labs_alone
import labs_decode
import labs_loop
import labs_states
import labs_waiting
from labs_decode import Batch, CacheLayer, Decoder, Pair, Row, Slots, Tensor

NGRAMS = (3, 2)  # a guess needs as many equal tokens before it


def speed_up(decoder: Decoder) -> Decoder:
    """Add guesses, splitting, growth and rows that run alone; packed prompts for plain caches."""
    parts: Any = {"step_alone": step_speculative, "halves": split_after_oom, "grow": grow}
    waiting = labs_waiting.Waiting() if decoder.can_reuse_prefix else None  # states can't be moved
    decoder = replace(decoder, stepwise=labs_alone.stepwise, waiting=waiting, **parts)
    if decoder.mode != "joins":
        return decoder
    layers = DynamicCache(config=decoder.config).layers
    plain = bool(layers) and all(type(layer) is cache_utils.DynamicLayer for layer in layers)
    words = {"position_ids", "logits_to_keep"} <= decoder.forward_parameters
    return replace(decoder, prefill_packed=prefill_packed) if plain and words else decoder


class PackedPrompts(cache_utils.Cache):
    """A cache for one call that writes several newcomers' prompts, packed into one row."""

    def __init__(
        self, newcomers: Sequence[Slots], lengths: list[int], device: torch.device
    ) -> None:
        layers = zip(*(slots.layers for slots in newcomers), strict=True)
        super().__init__(layers=[PackedPromptsLayer(group, lengths) for group in layers])
        self.places = places_of(lengths, 0, device)

    def get_query_offset(self, layer_idx: int = 0) -> Tensor | int:  # type: ignore[override]
        return self.places


class Branches(cache_utils.Cache):
    """A cache for several texts that each continue the same row, packed into one row."""

    def __init__(self, slots: Slots, places: Tensor) -> None:
        super().__init__(layers=slots.layers)
        self.places = places

    def get_query_offset(self, layer_idx: int = 0) -> Tensor | int:  # type: ignore[override]
        return self.places


def places_of(lengths: list[int], first: int, device: torch.device) -> Tensor:
    """Return each token's number of its text and its position from `first` on, as [2, T].

    Its attribute `mask` makes the mask in labs_decode.attention_mask.
    """
    texts = [torch.full((n,), i, device=device) for i, n in enumerate(lengths)]
    positions = [torch.arange(first, first + n, device=device) for n in lengths]
    places = torch.stack([torch.cat(texts), torch.cat(positions)])
    places.mask = packed_mask  # type: ignore[attr-defined]
    return places


def packed_mask(places: Tensor, before: int, **options: Any) -> Tensor:
    """Return a mask [1, 1, T, before + T]: each text attends to itself and the columns before.

    Its attribute `lengths`, set if the pattern is causal, shows `attention` where to split it.
    """
    prompts, positions = places
    none = torch.zeros((1, 1, 1, 1), dtype=torch.long, device=prompts.device)
    columns = torch.cat([torch.arange(before, device=prompts.device), positions])
    shared = torch.nn.functional.pad(prompts, (before, 0), value=-1)
    queries, columns = positions.view(1, 1, -1, 1), columns.view(1, 1, 1, -1)
    seen = options["mask_function"](none, none, queries, columns)
    own = (prompts[:, None] == shared) | (shared < 0)
    mask = labs_decode.additive(seen & own, options["dtype"])
    if options["mask_function"] is causal_mask_function and not before:
        mask.lengths = prompts.bincount().tolist()  # type: ignore[attr-defined]
    return mask


class PackedPromptsLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """One layer of packed prompts: each newcomer's slot gets its part, attention gets all."""

    is_sliding = False

    def __init__(self, layers: Sequence[CacheLayer], lengths: list[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.layers, self.lengths = layers, lengths

    def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> Pair:
        parts = (torch.split(states, self.lengths, 2) for states in (key_states, value_states))
        read = [layer.update(*part) for layer, *part in zip(self.layers, *parts, strict=True)]
        keys, values = (torch.cat(each, 2) for each in zip(*read, strict=True))
        return keys, values

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: each newcomer's layer initialises itself."""

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return -1


@torch.inference_mode()
def prefill_packed(decoder: Decoder, newcomers: Sequence[Batch]) -> list[Batch]:
    """Write whole prompts, chosen by labs_loop.prompts_for_one_call, in one forward call."""
    rows = [newcomer.rows[0] for newcomer in newcomers]
    lengths = [row.prompt_length for row in rows]
    for newcomer, length in zip(newcomers, lengths, strict=True):
        at = newcomer.cache.cursor
        at.write_from, at.read_to, at.positions, at.speculative = 0, length, None, False
    ids = torch.tensor([[i for row in rows for i in row.ids]], device=decoder.device)
    cache = PackedPrompts([newcomer.cache for newcomer in newcomers], lengths, ids.device)
    ends = torch.tensor(lengths, device=ids.device).cumsum(0) - 1
    logits = labs_decode.call_model(decoder, ids, cache.places[1:], cache, ends)[0].float()
    if len(logits) != len(rows):  # some models accept logits_to_keep and ignore it
        logits = logits[ends]
    for row in rows:
        row.written = row.prompt_length
    return [replace(each, logits=logits[i : i + 1]) for i, each in enumerate(newcomers)]


@torch.inference_mode()
def forward_behind(
    decoder: Decoder, batch: Batch, texts: Sequence[Sequence[int]], start: int = 0
) -> Tensor:
    """Return logits [T, V] after each token of texts that continue the batch's only row.

    Each text attends to the row and itself; the next call overwrites it. start: with a single text,
    how many of its tokens are written already, for models that cannot pack texts.
    """
    at, first, lengths = batch.cache.cursor, batch.rows[0].written + start, [*map(len, texts)]
    at.write_from, at.read_to = first, first + sum(lengths)
    at.positions, at.speculative = None, False
    ids = torch.tensor([[token for text in texts for token in text]], device=decoder.device)
    places = places_of(lengths, first, ids.device)
    cache = batch.cache if len(texts) == 1 else Branches(batch.cache, places)
    return labs_decode.call_model(decoder, ids, places[1:], cache, len(places[0]))[0]


# ---------------------------------------------------------------- guesses


@torch.inference_mode()
def step_speculative(decoder: Decoder, batch: Batch) -> tuple[Batch, list[labs_loop.Choice]]:
    """Step one row, but take several tokens in one call if the next ones can be guessed.

    The choices are those of single steps: each guess is a separate row that reads the same slot.
    """
    ready = batch.logits is None and decoder.can_reuse_prefix
    return step_guessed(decoder, batch, prompt_lookup(batch.rows[0]) if ready else [])


@torch.inference_mode()
def step_guessed(
    decoder: Decoder, batch: Batch, guess: Sequence[int]
) -> tuple[Batch, list[labs_loop.Choice]]:
    """Step one row and check guesses of its next tokens in the same call; [] for none."""
    [row], choices = batch.rows, list[labs_loop.Choice]()
    guess = guess[: decoder.steady - 1] if decoder.steady else guess
    if not guess:
        return labs_loop.step(decoder, batch)
    ids = torch.tensor([[row.ids[-1]], *([token] for token in guess)], device=decoder.device)
    places = [row.written + i for i in range(len(ids))]
    if decoder.grow:
        grow(batch, len(ids))
    logits = labs_decode.forward_slots(decoder, batch, ids, places)
    for line, token in zip(logits, (*guess, None), strict=True):
        choices += labs_loop.choose(line[None], batch.rows)
        row.take(choices[-1].token)
        if choices[-1].token != token:
            break
    return batch, choices


def prompt_lookup(row: Row) -> list[int]:
    """Return the tokens that followed the latest earlier occurrence of the last tokens."""
    most = min(row.lookahead, row.columns - len(row.ids) - 1)
    for size in NGRAMS if most > 0 else ():
        tail = row.ids[-size:]
        for start in range(len(row.ids) - size - 1, -1, -1):
            if row.ids[start : start + size] == tail:
                return row.ids[start + size : start + size + most]
    return []


# ---------------------------------------------------------------- out of memory


def split_after_oom(decoder: Decoder, batch: Batch) -> list[Batch]:
    """Split a batch whose step ran out of memory so that a call needs half; [] if it has one row.

    Slots stay in place, and more calls read them. If they could not grow, rows that need no more
    columns keep them, and each other row gets its own. A failed step leaves recurrent states
    incomplete, so these rows are computed again from their ids, into two batches.
    """
    size, at = batch.at_once or len(batch.rows), batch.cache.cursor
    long = {row.id: i for i, row in enumerate(batch.rows) if row.written >= at.columns}
    if size == 1 and not (long and at.rows > 1):
        return []
    half = (size + 1) // 2
    if not any(isinstance(layer, labs_states.StateLayer) for layer in batch.cache.layers):
        if not long:
            return [replace(batch, at_once=half)]
        alone = [apart(decoder, batch, index) for index in long.values()]
        rest = labs_decode.keep(batch, [row.id for row in batch.rows if row.id not in long])
        return [*alone, *([] if rest is None else [rest])]
    batch.cache.layers.clear()
    return [_rewrite(decoder, r) for r in (batch.rows[:half], batch.rows[half:]) if r]


def apart(decoder: Decoder, batch: Batch, index: int) -> Batch:
    """Copy a row into slots of its own, which have columns for more tokens."""
    alone = labs_decode.new_batch(decoder, row := batch.rows[index])
    for mine, all_rows in zip(*(b.cache.stateful_layers for b in (alone, batch)), strict=True):
        mine.lazy_initialization(all_rows.keys, all_rows.values)
        for to, states in zip(mine.buffers, all_rows.read(index, 0, row.written), strict=True):
            to[0, :, : row.written] = states
    row.shared = 0
    return alone


def grow(batch: Batch, tokens: int = 1) -> None:
    """Have columns for the next tokens of all rows."""
    cache, needed = batch.cache, max(row.written for row in batch.rows) + tokens
    if needed > cache.cursor.columns and batch.stepwise is None:
        columns = labs_waiting.wider(batch, tokens)
        cache.resize(len(batch.rows), cache.cursor.rows, columns)


def _rewrite(decoder: Decoder, rows: Sequence[Row]) -> Batch:
    batches: list[Batch] = []
    for row in rows:
        row.written = 0
        newcomer = labs_decode.new_batch(decoder, row)
        while newcomer.pending:
            newcomer = labs_decode.prefill(decoder, newcomer)
        newcomer = replace(newcomer, logits=None)  # its next token was chosen already
        batches = [labs_decode.join(batches[0], newcomer) if batches else newcomer]
    return batches[0]
