# SPDX-License-Identifier: Apache-2.0
"""How likely each of some answers is, computed in parts between which others may run.

    options = labs_choose.Options(model, inputs, ["yes", "no"])
    stream = engine.open(inputs, options.generation(), owner, ())
    engine.take_in(stream, events, options.parts)
    options.shares                                      # [0.97, 0.03], once the answer is done

The prompt is computed once, chunk by chunk. Where short prompts may share a call, options lie one
behind the other after it, each of which sees the prompt and itself; else they come one by one.
Needs labs.py, labs_decode.py and labs_forward.py.
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

OPTION_TOKENS = 8192  # of all options together, where the context is not longer
LOGITS = 2**24  # numbers of one part, 64 MB in float32
LINES = 16  # of logits that are float32 at once
Found = list[tuple[int, float]]  # what is added to the log-probability of an option


class Piece(NamedTuple):
    """Tokens of an option, from `start` to before `end`; the prompt's last one is at -1."""

    option: int
    start: int
    end: int


class Options:
    """Answers to choose among, read for one prompt; `parts` computes how likely each is.

    tokens: of the prompt and all of them; columns: what they need behind the prompt; shares: the
    probabilities in their order, once all parts are done. Raises InputError for fewer than two
    options, equal or empty ones, too many tokens; PromptTooLong.
    """

    def __init__(self, model: labs.Model, inputs: labs.Inputs, options: Sequence[str]) -> None:
        if len(options) < 2 or len({*options}) < len(options) or not all(options):
            raise labs.InputError("options: give two or more different texts")
        with model.lock:
            encode = functools.partial(model.tokenizer, add_special_tokens=False)
            self.ids = [list(encode(option)["input_ids"]) for option in options]
        prompt, limit = len(inputs.input_ids), model.context_length
        vocabulary = min(model.decoder.config.vocab_size, model.decoder.embedded)
        if beyond := [token for ids in self.ids for token in ids if token >= vocabulary]:
            text = f"options name token {beyond[0]}: the vocabulary has {vocabulary}"
            raise labs.InputError(text)
        longest, together = max(map(len, self.ids)), sum(map(len, self.ids))
        if limit is not None and prompt + longest > limit:
            raise labs.too_long(limit, prompt, longest)
        if together > (most := max(limit or 0, OPTION_TOKENS)):
            text = f"options: they have {together} tokens together, at most {most}"
            raise labs.InputError(f"{text}; give fewer or shorter ones")
        self.model, self.tokens, self.shares = model, prompt + together, list[float]()
        decoder, lengths = model.decoder, [*map(len, self.ids)]
        size = min(together, decoder.chunk, LOGITS // decoder.config.vocab_size)
        size = max(1, size if limit is None else min(size, limit - prompt))
        self._parts = [*pieces(lengths, size, together=decoder.prefill_packed is not None)]
        self.columns = max(longest, size)

    def generation(self, timeout_s: float | None = None) -> labs.Generation:
        """Return what gives a row the room that this needs."""
        return labs.Generation(max_new_tokens=self.columns, timeout_s=timeout_s)

    def parts(self, row: labs_decode.Row, prefixes: Any) -> Iterator[None]:
        """Compute the shares; pause after each part, which takes as long as a prefill call or less.

        row: of the prompt, with room for `columns` more. It is computed once, or begins with what
        prefixes, a labs_decode.PrefixStore or None, hold of it.
        """
        import torch

        joins = self.model.decoder.mode == "joins"
        totals = [0.0] * len(self.ids)
        for found in self._behind(row, prefixes) if joins else self._whole(row):
            for option, logprob in found:
                totals[option] += logprob
            yield
        if max(totals) == -math.inf:
            raise labs.GenerationError("the model holds none of the options for possible")
        self.shares += torch.tensor(totals, dtype=torch.float64).softmax(-1).tolist()

    def _behind(self, row: labs_decode.Row, prefixes: Any) -> Iterator[Found]:
        """Yield what each part adds: those of the prompt nothing, those behind its columns some."""
        labs.require("labs_forward")
        import labs_decode
        import labs_forward

        decoder = self.model.decoder
        prefixes = prefixes if decoder.can_reuse_prefix else None
        row.exact_prefix = True  # the shares do not depend on what was kept
        batch = labs_decode.new_batch(decoder, row)
        if prefixes is not None:
            prefixes.load(decoder, batch)
        while batch.pending:
            batch = labs_decode.prefill(decoder, batch)
            yield []
        if prefixes is not None:
            prefixes.store(decoder, batch, 0)
        before = [Piece(option, -1, 0) for option in range(len(self.ids))]
        assert batch.logits is not None  # nothing of the prompt is pending
        yield self._found(batch.logits.expand(len(before), -1), before)
        for part in self._parts:
            if not (decoder.can_reuse_prefix or part[0].start):
                mine = replace(batch, cache=copy.deepcopy(batch.cache))  # states are never cut
            elif decoder.can_reuse_prefix:
                mine = batch
            texts = [self.ids[piece.option][piece.start : piece.end] for piece in part]
            logits = labs_forward.forward_behind(decoder, mine, texts, part[0].start)
            yield self._found(logits, part)

    def _whole(self, row: labs_decode.Row) -> Iterator[Found]:
        """Yield the same, an option a part, where the model's prompt cannot be gone on from."""
        import torch

        decoder = self.model.decoder
        for option, ids in enumerate(self.ids):
            words = {"use_cache": False, "logits_to_keep": len(ids) + 1}
            known = {name: value for name, value in words.items() if name in decoder.forward_words}
            with torch.inference_mode():
                given = torch.tensor([[*row.ids, *ids]], device=decoder.device)
                logits = decoder.model(input_ids=given, return_dict=True, **known).logits[0]
            yield self._found(logits[-len(ids) - 1 :], [Piece(option, -1, len(ids))])

    def _found(self, logits: labs_decode.Tensor, pieces: list[Piece]) -> Found:
        """Return log-probabilities by option: of what follows each place of the pieces."""
        options, following = [], list[int | None]()
        for option, start, end in pieces:
            ids = self.ids[option]
            after = [*ids[start + 1 : end + 1], *([None] if end == len(ids) else [])]
            options += [option] * len(after)
            following += after
        ends = list(self.model.eos_token_ids)
        return [*zip(options, _log_probabilities(logits, following, ends), strict=True)]


def pieces(lengths: list[int], size: int, *, together: bool) -> Iterator[list[Piece]]:
    """Yield parts of at most `size` tokens: several options, where they may, or a piece of one."""
    part, room = list[Piece](), size
    for option, length in enumerate(lengths):
        if part and (length > room or not together):
            yield part
            part, room = [], size
        *begun, last = range(0, max(length, 1), size)
        yield from ([Piece(option, start, start + size)] for start in begun)
        part += [Piece(option, last, length)] if length else []
        room = 0 if begun else room - length  # the end of a long one goes alone
    if part:
        yield part


def _log_probabilities(
    logits: labs_decode.Tensor, following: list[int | None], ends: list[int]
) -> list[float]:
    """Return how likely each token is after its line of logits [T, V]; None is any of `ends`."""
    import torch

    with torch.inference_mode():
        lines = torch.split(logits, LINES)  # float32 of all of them would be much memory
        totals = torch.cat([few.float().logsumexp(-1) for few in lines])
        if not totals.isfinite().all():
            raise labs.GenerationError("the model gave logits that are not finite")
        tokens = torch.tensor([token or 0 for token in following], device=logits.device)
        chosen = logits.gather(-1, tokens[:, None])[:, 0].float()
        last = torch.tensor([token is None for token in following], device=logits.device)
        chosen[last] = logits[last][:, ends].float().logsumexp(-1) if ends else totals[last]
        return list((chosen - totals).tolist())
