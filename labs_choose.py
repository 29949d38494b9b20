# SPDX-License-Identifier: Apache-2.0
"""Probabilities of given answers, computed in parts between which other requests may run.

    options = labs_choose.Options(model, inputs, ["yes", "no"])
    stream = engine.open(inputs, options.generation(), owner, ())
    engine.take_in(stream, events, options.parts)
    options.shares                                      # [0.97, 0.03], once all parts are done

The prompt is computed once, in chunks. If the model can compute packed prompts, several options
follow the prompt in one call, and each attends to the prompt and to itself; otherwise each option
takes a call. Needs labs.py, labs_decode.py and labs_calls.py.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import labs

if TYPE_CHECKING:
    import labs_decode

OPTION_TOKENS = 8192  # of all options together, unless the model's context is longer
LOGITS = 2**24  # logits in one part: 64 MB in float32
LINES = 16  # rows of logits that are converted to float32 at once
Found = list[tuple[int, float]]  # (option, a log-probability to add to its total)


class Piece(NamedTuple):
    """Tokens `start` to `end` of an option, `end` excluded; -1 is the prompt's last token."""

    option: int
    start: int
    end: int


class Options:
    """Answers to choose among, tokenised for one prompt; `parts` computes their probabilities.

    tokens: of the prompt and all options. columns: KV cache columns needed after the prompt.
    shares: probabilities in the options' order, once all parts are done. Raises InputError for
    fewer than two, equal or empty options or too many tokens, PromptTooLong beyond the context.
    """

    def __init__(self, model: labs.Model, inputs: labs.Inputs, options: Sequence[str]) -> None:
        several = not isinstance(options, str)  # whose letters would be options
        if not several or len({*options}) < max(2, len(options)) or not all(options):
            raise labs.InputError("options: give two or more different, non-empty texts")
        with model.lock:
            encode = functools.partial(model.tokenizer, add_special_tokens=False)
            self.ids = [list(encode(option)["input_ids"]) for option in options]
        prompt, limit = len(inputs.input_ids), model.context_length
        vocabulary = min(model.decoder.config.vocab_size, model.decoder.embedded)
        if beyond := [token for ids in self.ids for token in ids if token >= vocabulary]:
            text = f"options: token {beyond[0]} is outside the model's vocabulary of {vocabulary}"
            raise labs.InputError(text)
        longest, together = max(map(len, self.ids)), sum(map(len, self.ids))
        if limit is not None and prompt + longest > limit:
            raise labs.too_long(limit, prompt, longest)
        if together > (most := max(limit or 0, OPTION_TOKENS)):
            text = f"options: they have {together} tokens together, at most {most} are allowed"
            raise labs.InputError(f"{text}; give fewer or shorter options")
        self.model, self.tokens, self.shares = model, prompt + together, list[float]()
        decoder, lengths = model.decoder, [*map(len, self.ids)]
        size = min(together, decoder.chunk, LOGITS // decoder.config.vocab_size)
        size = max(1, size if limit is None else min(size, limit - prompt))
        self._parts = [*pieces(lengths, size, together=decoder.prefill_packed is not None)]
        self.columns = max(longest, size)

    def generation(self, timeout_s: float | None = None) -> labs.Generation:
        """Return a Generation that reserves the columns which a row of this choice needs."""
        return labs.Generation(max_new_tokens=self.columns, timeout_s=timeout_s)

    def parts(self, row: labs_decode.Row, prefixes: Any) -> Iterator[None]:
        """Compute the shares; pause after each part, which takes no longer than a prefill call.

        row: the prompt's, with room for `columns` more. prefixes: a labs_decode.PrefixStore or
        None; the prompt starts from its longest stored prefix.
        """
        import torch

        joins = self.model.decoder.mode == "joins"
        totals = [0.0] * len(self.ids)
        for found in self._behind(row, prefixes) if joins else self._whole(row):
            for option, logprob in found:
                totals[option] += logprob
            yield
        if max(totals) == -math.inf:
            raise labs.GenerationError("the model gives each of the options the probability 0")
        self.shares += torch.tensor(totals, dtype=torch.float64).softmax(-1).tolist()

    def _behind(self, row: labs_decode.Row, prefixes: Any) -> Iterator[Found]:
        """Yield the log-probabilities of each part; a part of the prompt has none."""
        labs.require("labs_calls")
        import labs_calls
        import labs_decode

        decoder = self.model.decoder
        prefixes = prefixes if decoder.can_reuse_prefix else None
        row.exact_prefix = True  # a stored prefix must not change the shares
        batch = labs_decode.new_batch(replace(decoder, grow=None), row)
        if prefixes is not None:
            prefixes.load(decoder, batch)
        while batch.pending:
            batch = labs_decode.prefill(decoder, batch)
            yield []
        if prefixes is not None:
            prefixes.store(decoder, batch, 0)
        before = [Piece(option, -1, 0) for option in range(len(self.ids))]
        assert batch.logits is not None  # the whole prompt is computed
        yield self._found(batch.logits.expand(len(before), -1), before)
        for part in self._parts:
            if not (decoder.can_reuse_prefix or part[0].start):
                mine = replace(batch, cache=copy.deepcopy(batch.cache))  # states cannot be cut
            elif decoder.can_reuse_prefix:
                mine = batch
            texts = [self.ids[piece.option][piece.start : piece.end] for piece in part]
            logits = labs_calls.forward_behind(decoder, mine, texts, part[0].start)
            yield self._found(logits, part)

    def _whole(self, row: labs_decode.Row) -> Iterator[Found]:
        """Yield the same, one option a part, for models that cannot continue a cached prompt."""
        import torch

        decoder = self.model.decoder
        for option, ids in enumerate(self.ids):
            words = {"use_cache": False, "logits_to_keep": len(ids) + 1}
            known = {
                name: value for name, value in words.items() if name in decoder.forward_parameters
            }
            with torch.inference_mode():
                given = torch.tensor([[*row.ids, *ids]], device=decoder.device)
                logits = decoder.model(input_ids=given, return_dict=True, **known).logits[0]
            yield self._found(logits[-len(ids) - 1 :], [Piece(option, -1, len(ids))])

    def _found(self, logits: labs_decode.Tensor, pieces: list[Piece]) -> Found:
        """Return (option, log-probability) of each token that follows a position in the pieces."""
        options, following = [], list[int | None]()
        for option, start, end in pieces:
            ids = self.ids[option]
            after = [*ids[start + 1 : end + 1], *([None] if end == len(ids) else [])]
            options += [option] * len(after)
            following += after
        ends = list(self.model.eos_token_ids)
        return [*zip(options, _log_probabilities(logits, following, ends), strict=True)]


def pieces(lengths: list[int], size: int, *, together: bool) -> Iterator[list[Piece]]:
    """Yield parts of at most `size` tokens: several options if `together`, or a piece of one."""
    part, room = list[Piece](), size
    for option, length in enumerate(lengths):
        if part and (length > room or not together):
            yield part
            part, room = [], size
        *begun, last = range(0, max(length, 1), size)
        yield from ([Piece(option, start, start + size)] for start in begun)
        part += [Piece(option, last, length)] if length else []
        room = 0 if begun else room - length  # the last piece of a long option shares no part
    if part:
        yield part


def _log_probabilities(
    logits: labs_decode.Tensor, following: list[int | None], ends: list[int]
) -> list[float]:
    """Return the log-probability of each token under its row of logits [T, V].

    A token that is None stands for any of `ends`. Raises GenerationError for logits not finite.
    """
    import torch

    with torch.inference_mode():
        lines = torch.split(logits, LINES)  # all rows in float32 at once would need much memory
        totals = torch.cat([few.float().logsumexp(-1) for few in lines])
        if not totals.isfinite().all():
            raise labs.GenerationError("the model returned logits that are not finite")
        tokens = torch.tensor([token or 0 for token in following], device=logits.device)
        chosen = logits.gather(-1, tokens[:, None])[:, 0].float()
        last = torch.tensor([token is None for token in following], device=logits.device)
        chosen[last] = logits[last][:, ends].float().logsumexp(-1) if ends else totals[last]
        return list((chosen - totals).tolist())
