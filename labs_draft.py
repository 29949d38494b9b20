# SPDX-License-Identifier: Apache-2.0
"""Guess the next tokens of a lone row with a small model; the large one checks them in one call.

    decoder = labs_draft.with_draft(decoder, tokenizer, spec, load)  # load(spec of the draft)

The text stays the same (Leviathan and others, arXiv 2211.17192, with the draft's own choice in
place of its distribution): each guess is computed as a row of its own, and counts only if single
steps would have chosen it. The draft chooses with the row's options and random numbers, so guesses
of rows that sample are right more often. Needs labs_calls.py, labs_decode.py, labs_loop.py and
labs_settings.py.
"""

from __future__ import annotations

import functools
import itertools
import logging
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, cast

import msgspec
import torch

import labs_calls
import labs_decode
import labs_loop
from labs_decode import Batch, Decoder, Row
from labs_settings import ModelError, ModelSpec

MOST = 7  # guesses a call: on a CPU, products of eight rows take hardly longer than those of one
FIRST = 3  # guesses in a row's first call
PATIENCE = 3  # calls in a row whose guesses are all wrong, before the row rests
LONGEST_REST = 64  # steps without guesses
log = logging.getLogger("labs.draft")


@dataclass(slots=True, eq=False)
class Draft:
    """The draft model of a decoder, shared by its rows. proposed, accepted: tokens so far.

    context_length: the draft's, None if it does not say. most: guesses in one call. begun: what
    each row has of it.
    """

    name: str
    decoder: Decoder
    context_length: int | None = None
    most: int = MOST
    proposed: int = 0
    accepted: int = 0
    begun: Any = field(default_factory=weakref.WeakSet)

    @property
    def weight_bytes(self) -> int:
        return self.decoder.weight_bytes

    def release(self) -> bool:
        """Free the slots of all rows, which go on without guesses; return whether any had some."""
        held = [known for known in [*self.begun] if known.batch is not None]
        for known in held:
            known.batch = None
        return bool(held)


@dataclass(slots=True, eq=False, weakref_slot=True)
class Drafted:
    """A row as its draft model sees it.

    batch: its own slots; None after their memory ran out. sure: how many ids are those of the row.
    size: tokens to guess next. misses: calls since a guess was right. rest: steps to wait.
    """

    batch: Batch | None
    sure: int = 0
    size: int = FIRST
    misses: int = 0
    rest: int = 0


# ---------------------------------------------------------------- at load


def spec_of(spec: ModelSpec) -> ModelSpec:
    """Return what is loaded as the draft of `spec`. Raises ModelError if that cannot be.

    It has the target's device, dtype, quantisation and trust. Its rows need not be invariant.
    """
    name, own = spec.draft_model, {"revision": None, "chat_template": None, "adapter": None}
    if name == spec.model_name:
        raise ModelError(f"draft_model = {name}: is model_name itself; name a smaller model")
    if spec.device_map.startswith("{"):
        raise ModelError(f"draft_model = {name}: needs another device_map than a JSON map")
    return msgspec.structs.replace(
        spec, **own, model_name=name, draft_model=None, batch_invariant=False
    )


def with_draft(
    decoder: Decoder, tokenizer: Any, spec: ModelSpec, load: Callable[[ModelSpec], Any]
) -> Decoder:
    """Return a decoder whose lone rows are guessed by spec's draft model.

    load: returns a labs.Model. Raises ModelError if one of the models cannot do this, or if their
    tokenizers differ.
    """
    where, wanted = f"draft_model = {spec.draft_model}", spec_of(spec)
    if why := unable(decoder):
        raise ModelError(f"{where}: {spec.model_name} {why}")
    model = load(wanted)
    if why := unable(model.decoder) or _other_tokens(tokenizer, model.tokenizer):
        raise ModelError(f"{where}: it {why}")
    return guessing(decoder, Draft(str(spec.draft_model), model.decoder, model.context_length))


def guessing(decoder: Decoder, draft: Draft) -> Decoder:
    """Return a decoder whose lone rows are guessed by a draft that has the same tokens."""
    draft.most = min(draft.most, (decoder.steady or draft.most + 1) - 1)
    return replace(decoder, step_alone=functools.partial(step, draft), draft=draft)


def unable(decoder: Decoder) -> str | None:
    """Return why a model cannot take part, as the rest of a sentence."""
    if decoder.graphs is not None:
        return "runs as CUDA graphs, which checks of guesses do not use; set cuda_graphs = false"
    if decoder.mode == "joins" and decoder.can_reuse_prefix:
        return None
    return f"({decoder.config.model_type}) cannot discard tokens once read"


def _other_tokens(tokenizer: Any, draft: Any) -> str | None:
    """Return how the vocabulary of the draft differs, as the rest of a sentence."""
    differ = tokenizer.get_vocab().items() ^ draft.get_vocab().items()
    if not differ:
        return None
    names = sorted({token for token, _ in differ})
    return f"has another tokenizer: {len(names)} tokens differ, for example {names[0]!r}"


# ---------------------------------------------------------------- steps


@torch.inference_mode()
def step(draft: Draft, decoder: Decoder, batch: Batch) -> tuple[Batch, list[labs_loop.Choice]]:
    """Step one row as labs_calls.step_speculative does, with guesses of the draft.

    Earlier text has the first say, where the row asks for it (prompt_lookup_num_tokens).
    """
    if batch.logits is not None:
        return labs_loop.step(decoder, batch)
    [row] = batch.rows
    found = labs_calls.prompt_lookup(row)[: draft.most]
    guess = found or propose(draft, row)
    guess = [*itertools.takewhile(lambda token: token < decoder.embedded, guess)]
    batch, choices = labs_calls.step_guessed(decoder, batch, guess)
    if guess and not found:
        _learn(draft, row, len(guess), len(choices) - 1)
    return batch, choices


def propose(draft: Draft, row: Row) -> list[int]:
    """Return the draft's guesses of the row's next tokens; [] while it rests or reads a prompt."""
    row.drafted = row.drafted or _begun(draft, row)
    known = cast("Drafted", row.drafted)
    most = min(known.size, draft.most, row.columns - len(row.ids) - 1)
    if draft.context_length is not None:
        most = min(most, draft.context_length - len(row.ids))
    if known.rest or known.batch is None or most < 1:
        known.rest -= min(known.rest, 1)
        return []
    try:
        return _guess(draft, known, known.batch, row, most)
    except (RuntimeError, MemoryError) as error:
        if not labs_decode.out_of_memory(error):
            raise
        log.warning("out of memory in the draft model: a row goes on without guesses")
        known.batch = None
        return []


def _begun(draft: Draft, row: Row) -> Drafted:
    sampling = replace(row.sampling, logprobs=None, processors=())
    own = Row(row.id, [*row.ids], row.max_new_tokens, sampling)
    own.prompt_length = row.prompt_length  # random numbers are those of the same step
    draft.begun.add(known := Drafted(labs_decode.new_batch(draft.decoder, own)))
    return known


def _guess(draft: Draft, known: Drafted, batch: Batch, row: Row, count: int) -> list[int]:
    """Let the draft read what is new, a chunk of a prompt a step, and choose the next tokens."""
    decoder, [own] = draft.decoder, batch.rows
    if max(row.ids[known.sure :], default=0) >= decoder.embedded:
        known.batch = None  # it cannot read this token
        return []
    pairs = zip(own.ids[known.sure : own.written], row.ids[known.sure :], strict=False)
    right = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    own.written = min(own.written, known.sure + right)
    own.ids, own.seen, known.sure = [*row.ids], {*row.seen}, len(row.ids)
    own.generated = Counter(row.generated)
    unread = own.ids[own.written :]
    if decoder.grow:
        labs_calls.grow(batch, len(unread) + count)
    if batch.pending > labs_decode.CHUNK:
        known.batch = replace(labs_decode.prefill(decoder, batch), logits=None)
        return []
    logits = labs_calls.forward_behind(decoder, batch, [unread])[-1:].float()
    own.take(labs_loop.choose(logits, [own])[0].token, len(unread))
    while len(own.ids) < len(row.ids) + count and 0 <= own.ids[-1] < decoder.embedded:
        batch, _ = labs_loop.step(decoder, batch)
    known.batch = batch if own.ids[-1] >= 0 else None  # else its logits are not finite, or too few
    return [token for token in own.ids[known.sure :] if token >= 0]


def _learn(draft: Draft, row: Row, proposed: int, accepted: int) -> None:
    """Guess more tokens after right ones, fewer after wrong ones, and none while all are wrong."""
    draft.proposed, draft.accepted = draft.proposed + proposed, draft.accepted + accepted
    known = cast("Drafted", row.drafted)
    known.misses = 0 if accepted else known.misses + 1
    known.size = 2 * proposed if accepted == proposed else accepted + 1
    if known.misses >= PATIENCE:
        known.rest = min(2**known.misses, LONGEST_REST)
