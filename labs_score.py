# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities of a prompt's own tokens, computed in parts between which others may run.

    found = labs_score.prompt_logprobs(model, inputs, top=5)   # one TokenLogprob a token
    sum(each.logprob for each in found[-3:])                    # of the last three tokens, in nats

They are those of transformers' forward of the whole prompt. Nothing comes before the first token,
so its logprob is nan, and it has no alternatives. On OpenAI's endpoint `echo` returns them:

    echo = labs_score.Echo(text, labs_score.Scores(model, inputs, top=5), only=False)
    stream = engine.open(inputs, generation, owner, ())
    engine.take_in(stream, events, echo.work)   # the prompt as a labs.Delta, then the answer

Needs labs.py, labs_decode.py, labs_calls.py and labs_turns.py.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from msgspec.structs import replace

import labs
import labs_turns

if TYPE_CHECKING:
    import labs_decode

LOGITS = 2**24  # logits in one part: 64 MB in float32
LINES = 16  # rows of logits that are converted to float32 at once
MOST_TOP = 20  # alternatives of a token, as labs.TopLogprobs has it
FIRST = math.nan  # the log-probability of a first token


def prompt_logprobs(
    model: labs.Model, inputs: labs.Inputs, top: int = 0
) -> tuple[labs.TokenLogprob, ...]:
    """Return the log-probability (natural) of each token of a prompt, given all before it.

    top: how many of the likeliest tokens to add at each position, 0 to 20. Raises InputError for
    tokens that the model does not have, PromptTooLong beyond its context, GenerationError for
    logits that are not finite.
    """
    if not 0 <= top <= MOST_TOP:
        raise labs.InputError(f"top = {top}: must be between 0 and {MOST_TOP}")
    row, scores = row_of(model, inputs), Scores(model, inputs, top)
    for _ in scores.parts(row):
        pass
    return tuple(scores.found)


def row_of(model: labs.Model, inputs: labs.Inputs) -> labs_decode.Row:
    """Return a row that reserves no more than the prompt needs. Raises InputError."""
    return labs.open_request(model, 0, inputs, labs.Generation(max_new_tokens=1)).row


class Scores:
    """The log-probabilities of one prompt; `parts` computes them.

    found: one for each token, once all parts are done. top: alternatives to add to each.
    """

    def __init__(self, model: labs.Model, inputs: labs.Inputs, top: int) -> None:
        vocabulary = model.decoder.config.vocab_size  # the embedding may have more rows
        if beyond := [token for token in inputs.input_ids if token >= vocabulary]:
            text = f"the prompt has token id {beyond[0]}, which the model gives no probability"
            raise labs.InputError(f"{text}: there are {vocabulary} tokens")
        self.model, self.inputs, self.top = model, inputs, top
        self.found = list[labs.TokenLogprob]()

    @property
    def done(self) -> bool:
        return len(self.found) == len(self.inputs.input_ids)

    def parts(self, row: labs_decode.Row) -> Iterator[None]:
        """Compute all; pause after each part, which takes no longer than a prefill call.

        row: the prompt's. It is left as if nothing had been computed.
        """
        ids = self.inputs.input_ids
        self.found = [labs.TokenLogprob(ids[0], FIRST)]
        joins = self.model.decoder.mode == "joins"
        for logits in self._behind(row) if joins else self._whole():
            first = len(self.found)
            following = ids[first : first + len(logits)]
            self.found += _found(logits[: len(following)], following, self.top)
            yield

    def _behind(self, row: labs_decode.Row) -> Iterator[labs_decode.Tensor]:
        """Yield the logits [T, V] after each token, a chunk at a time, written behind the others.

        No stored prefix is used, because the logits of its tokens are not stored.
        """
        labs.require("labs_calls")
        import labs_calls
        import labs_decode

        decoder, ids = self.model.decoder, self.inputs.input_ids
        batch = labs_decode.new_batch(dataclasses.replace(decoder, grow=None), row)
        size = max(1, min(decoder.chunk, LOGITS // decoder.config.vocab_size))
        for start in range(0, len(ids) - 1, size):
            text = ids[start : min(start + size, len(ids) - 1)]  # nothing follows the last token
            yield labs_calls.forward_behind(decoder, batch, [text], start)

    def _whole(self) -> Iterator[labs_decode.Tensor]:
        """Yield the same for models that cannot continue a cached prompt: each part reads it all.

        A model that cannot select its logits returns those of all tokens in a single part.
        """
        import torch

        decoder, last = self.model.decoder, len(self.inputs.input_ids) - 1
        known = decoder.forward_parameters
        size = max(1, LOGITS // decoder.config.vocab_size) if "logits_to_keep" in known else last
        given = torch.tensor([self.inputs.input_ids], device=decoder.device)
        for start in range(0, last, size or 1):
            places = torch.arange(start, min(start + size, last), device=given.device)
            words = {"use_cache": False, "logits_to_keep": places}
            words = {name: value for name, value in words.items() if name in known}
            with torch.inference_mode():
                yield decoder.model(input_ids=given, return_dict=True, **words).logits[0]


def _found(
    logits: labs_decode.Tensor, following: tuple[int, ...], top: int
) -> Iterator[labs.TokenLogprob]:
    """Yield each token with its log-probability under its row of logits [T, V].

    Raises GenerationError for logits that are not finite.
    """
    import torch

    with torch.inference_mode():
        for start in range(0, len(following), LINES):
            tokens = following[start : start + LINES]
            lines = logits[start : start + LINES].float().log_softmax(-1)
            places = torch.tensor(tokens, device=lines.device)
            chosen = lines.gather(-1, places[:, None])[:, 0].tolist()
            if any(map(math.isnan, chosen)):
                raise labs.GenerationError("the model returned logits that are not finite")
            values, ids = lines.topk(min(top, lines.shape[-1]))
            tops = zip(ids.tolist(), values.tolist(), strict=True)
            for token, logprob, pair in zip(tokens, chosen, tops, strict=True):
                yield labs.TokenLogprob(token, logprob, tuple(zip(*pair, strict=True)))


# ---------------------------------------------------------------- before an answer


class Echo:
    """A prompt that comes before its answer, as one labs.Delta.

    text: the prompt as it was asked. scores: of its tokens, None without log-probabilities; the
    answers to one prompt share them. only: no answer follows.
    """

    def __init__(self, text: str, scores: Scores | None, *, only: bool) -> None:
        self.text, self.scores, self.only = text, scores, only

    @property
    def delta(self) -> labs.Delta:
        """The prompt as an event, once the scores are done."""
        return labs.Delta(self.text, tuple(self.scores.found) if self.scores else ())

    def work(self, row: labs_decode.Row, prefixes: Any) -> labs_turns.Parts:
        """Compute the scores in an engine's thread, show the prompt, and let the answer begin."""
        if self.scores is not None and not self.scores.done:
            yield from self.scores.parts(row)
        yield self.delta
        return "length" if self.only else labs_turns.DECODE

    def expected(self, take: Callable[[labs.Event], Any]) -> Callable[[labs.Event], Any]:
        """Return `take`, for an answer's events; raise Busy if these end before the prompt came."""
        came = False

        def check(event: labs.Event) -> Any:
            nonlocal came
            if isinstance(event, labs.Done) and not came:
                text = f"the log-probabilities were not computed in time: {event.finish_reason}"
                raise labs_turns.Busy(text)
            came = True
            return take(event)

        return check

    def before(self, events: Sequence[labs.Event]) -> list[labs.Event]:
        """Return the prompt and the events of its answer, computed without an engine.

        Of an answer that is not asked for, only the end is kept: such a row has one token.
        """
        if isinstance(events[-1], labs.Failed):
            return [*events]
        if self.scores is not None and not self.scores.done:
            for _ in self.scores.parts(row_of(self.scores.model, self.scores.inputs)):
                pass
        if not (self.only and isinstance(events[-1], labs.Done)):
            return [self.delta, *events]
        usage = replace(events[-1].usage, completion_tokens=0)
        end = {"finish_reason": "length", "matched_stop": None, "usage": usage}
        return [self.delta, replace(events[-1], **end)]
