# SPDX-License-Identifier: Apache-2.0
"""logits → tokens: decides which rows run when, and which token each row takes next.

    for row_id, outcome in labs_loop.run(decoder, rows, limit, labs_loop.Loop()):
        ...  # a Choice for each token, or Ended; the caller sets row.over to end a row

A row is a prompt and its answer; its keys and values lie in a slot, one column a token. It waits in
`rows`, is a newcomer while its prompt is prefilled, takes its first token and joins a batch. A step
is `labs_decode.forward`, then `choose`, which never runs the model.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

import labs_decode
from labs_decode import Batch, Decoder, PretrainedModel, Processor, Row, Sampling, Tensor, upload

COLDEST = 1e-30  # lower temperatures are greedy: dividing by them overflows float32
LOW_32 = 0xFFFFFFFF  # a mask of 32 bits
LARGEST = torch.finfo(torch.float32).max  # the largest logit / temperature
LANES = 64  # logits in each part in which `highest_of` looks for the highest
CANDIDATES = (128, 1024)  # a draw looks at the 128 likeliest tokens, then at 1,024, then at all
MOST_ROWS = 64  # the default limit of rows in a batch
TYPICAL_COLUMNS = 1024  # columns per row, assumed to estimate how many rows fit in memory
log = logging.getLogger("labs.loop")


# ---------------------------------------------------------------- the loop


@dataclass(frozen=True, slots=True)
class Choice:
    """The token chosen for a row, with log-probabilities if requested, or the row's error."""

    token: int = -1
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    error: Exception | None = None


@dataclass(frozen=True, slots=True)
class Ended:
    """The end of a row that the loop itself stops; a Choice with an error also ends its row."""

    reason: Literal["cancelled", "timeout", "failed"]
    error: Exception | None = None


Outcome = tuple[int, Choice | Ended]  # the id of a row, and the event
Outcomes = Iterator[Outcome]
Waiting = Iterator[Row | Outcome | None]  # rows to start, outcomes of refused ones, None: no row
Stepped = Generator[Outcome, None, list[Batch]]  # yields outcomes, returns the batches that remain


@dataclass(slots=True, eq=False)
class Loop:
    """The state of a running loop; other threads may read it.

    rows: the current rows, by id. batches: each is stepped in turn. prefilling: a batch for each
    newcomer. before_step: called before rows are admitted. last_step_at: time.perf_counter() after
    the last call. steps, oom_splits: steps completed, and steps that ran out of memory.
    one_prompt_per_call: set when a joint prefill runs out of memory, until no prompt waits.
    prefixes: stores the prefixes of prompts; None if nothing is stored.
    """

    rows: dict[int, Row] = field(default_factory=dict)
    batches: list[Batch] = field(default_factory=list)
    prefilling: list[Batch] = field(default_factory=list)
    before_step: Callable[[], object] = lambda: None
    last_step_at: float = field(default_factory=time.perf_counter)
    steps: int = 0
    oom_splits: int = 0
    one_prompt_per_call: bool = False
    prefixes: labs_decode.PrefixStore | None = None


def run(decoder: Decoder, rows: Waiting, limit: int, loop: Loop) -> Outcomes:
    """Decode all rows, at most `limit` at once; yield (row id, Choice or Ended) as they come.

    rows: read while there is room and little prefill is waiting. The loop ends when it yields None
    and there is no current row. loop: a Loop without rows.
    """
    limit = 1 if decoder.mode == "alone" else limit
    while True:
        yield from _admit(decoder, loop, rows, limit)
        if not loop.rows:
            return
        if decoder.waiting is not None:
            loop.batches = decoder.waiting.share(decoder, loop)
        loop.batches = yield from _step_all(decoder, loop)


def _step_all(decoder: Decoder, loop: Loop) -> Stepped:
    """Step all batches but those whose rows wait. Then no variable holds slots of ended ones."""
    stepped: list[Batch] = []
    for batch in loop.batches:
        stepped += [batch] if batch.rows[0].waits else (yield from _step(decoder, loop, batch))
    return stepped


def _admit(decoder: Decoder, loop: Loop, rows: Waiting, limit: int) -> Outcomes:
    """Prefill waiting prompts until about one chunk is done, so that running rows wait little."""
    budget = decoder.chunk
    while budget > 0 or not loop.rows:  # with no row left, look for more before the loop ends
        yield from _drop_cancelled(loop)
        yield from _take_in(decoder, loop, rows, limit)
        group = _next_prompts(decoder, loop)
        if not group:
            return
        budget -= sum(min(newcomer.pending, decoder.chunk) for newcomer in group)
        try:
            loop.prefilling[: len(group)] = _prefill(decoder, group)
        except (RuntimeError, MemoryError) as error:
            if not labs_decode.out_of_memory(error):
                raise
            yield from _fail_or_retry_alone(decoder, loop, group, error)
            continue
        loop.last_step_at = time.perf_counter()
        while loop.prefilling and not loop.prefilling[0].pending:
            yield from _begin(decoder, loop, loop.prefilling.pop(0))


def _begin(decoder: Decoder, loop: Loop, newcomer: Batch) -> Outcomes:
    """Choose the first token of a newcomer after its prefill, and put it into a batch."""
    _store_prefix(decoder, loop, newcomer, 0)
    join = decoder.join or (decoder.waiting.join if decoder.waiting else join_best)
    for batch in (yield from _step(decoder, loop, newcomer)):
        loop.batches = join(decoder, loop.batches, batch)


def _drop_cancelled(loop: Loop) -> Outcomes:
    """Drop rows that are cancelled, or whose deadline passed while they wait or are prefilled."""
    loop.before_step()
    rows = loop.rows.values()
    gone = {r.id: r for r in rows if r.cancelled or (r.late and (r.waits or not r.generated))}
    if not gone:
        return
    loop.prefilling = [each for each in loop.prefilling if each.rows[0].id not in gone]
    left = [(batch, [row.id for row in batch.rows if row.id not in gone]) for batch in loop.batches]
    kept = [labs_decode.keep(b, ids) if len(ids) < len(b.rows) else b for b, ids in left]
    loop.batches = [batch for batch in kept if batch is not None]
    for row in gone.values():
        del loop.rows[row.id]
        yield row.id, Ended("cancelled" if row.cancelled else "timeout")


def _take_in(decoder: Decoder, loop: Loop, rows: Waiting, limit: int) -> Outcomes:
    """Accept waiting rows while the limit allows and less than one chunk waits for prefill."""
    while len(loop.rows) < limit:
        ahead = sum(max(newcomer.pending, 1) for newcomer in loop.prefilling)
        row = next(rows, None) if ahead < decoder.chunk else None
        if row is None:
            return
        if not isinstance(row, Row):
            yield row
            continue
        row.entered = time.perf_counter()
        loop.rows[row.id] = row
        loop.prefilling.append(labs_decode.new_batch(decoder, row))


def _next_prompts(decoder: Decoder, loop: Loop) -> list[Batch]:
    """Return the newcomers to prefill in the next call; [] if there is no memory for them."""
    if loop.prefixes is not None and decoder.can_reuse_prefix:
        for newcomer in loop.prefilling:
            if not (newcomer.cache.buffers or has_room(decoder, loop.batches, [newcomer])):
                break  # a stored prefix takes a slot
            loop.prefixes.load(decoder, newcomer)
    group = prompts_for_one_call(decoder, loop.prefilling)
    group = group[:1] if loop.one_prompt_per_call else group
    while len(group) > 1 and not has_room(decoder, loop.batches, group):
        group.pop()
    if group and not has_room(decoder, loop.batches, group):
        freed = release(decoder, loop)
        return group if freed and has_room(decoder, loop.batches, group) else []
    loop.one_prompt_per_call &= bool(group)
    return group


def _prefill(decoder: Decoder, group: list[Batch]) -> list[Batch]:
    if len(group) > 1 and decoder.prefill_packed is not None:
        return decoder.prefill_packed(decoder, group)
    return [labs_decode.prefill(decoder, group[0])] if group[0].pending else group


def _fail_or_retry_alone(
    decoder: Decoder, loop: Loop, group: list[Batch], error: Exception
) -> Outcomes:
    """Fail a newcomer whose prefill ran out of memory; retry several newcomers one by one."""
    error.__traceback__ = None  # its frames keep tensors in memory
    if len(group) > 1:
        loop.one_prompt_per_call = True
    else:
        row = group.pop().rows[0]
        del loop.prefilling[0], loop.rows[row.id]
        yield row.id, Ended("failed", error)
    if not release(decoder, loop):
        labs_decode.release_memory()


def release(decoder: Decoder, loop: Loop) -> bool:
    """Free stored prefixes and slots kept for CUDA graphs or a draft; return whether any were."""
    held = [p for p in (loop.prefixes, decoder.graphs, decoder.draft) if p and p.release()]
    if held:  # else nothing changed since the last step, where this was tried
        labs_decode.release_memory()
    return bool(held)


def _store_prefix(decoder: Decoder, loop: Loop, batch: Batch, index: int) -> None:
    if loop.prefixes is not None and decoder.can_reuse_prefix:
        loop.prefixes.store(decoder, batch, index)


def _step(decoder: Decoder, loop: Loop, batch: Batch) -> Stepped:
    """Step a batch and yield its choices; return the batches that remain, without ended rows."""
    try:
        alone = decoder.step_alone if len(loop.rows) == 1 else None
        batch, choices = (alone or step)(decoder, batch)
    except (RuntimeError, MemoryError) as error:
        if not labs_decode.out_of_memory(error):
            raise
        return (yield from _split_or_fail(decoder, loop, batch, error))
    loop.last_step_at, loop.steps = time.perf_counter(), loop.steps + 1
    rows = batch.rows * len(choices) if alone else batch.rows  # correct guesses add choices
    for index, (row, choice) in enumerate(zip(rows, choices, strict=True)):
        if row.over:
            break  # only a lone row: its remaining guesses are not needed
        row.over = choice.error is not None
        yield row.id, choice
        if not row.over and choice.token >= decoder.embedded:
            row.over, has = True, f"its input embedding has only {decoder.embedded} tokens"
            wrong = IndexError(f"the model chose token {choice.token}, but {has}")
            yield row.id, Choice(error=wrong)
        if row.over:
            del loop.rows[row.id]
            if not decoder.invariant:  # else not: a step rounds differently from a prefill
                _store_prefix(decoder, loop, batch, index % len(batch.rows))
    kept = [row.id for row in batch.rows if not row.over]
    left = batch if len(kept) == len(batch.rows) else labs_decode.keep(batch, kept)
    return [] if left is None else [left]


def _split_or_fail(decoder: Decoder, loop: Loop, batch: Batch, error: Exception) -> Stepped:
    """Split a batch whose step ran out of memory; fail its rows if it cannot be split."""
    error.__traceback__ = None  # its frames keep tensors in memory
    loop.oom_splits += 1
    if not release(decoder, loop):
        labs_decode.release_memory()
    try:
        halves = decoder.halves(decoder, batch) if decoder.halves else []
    except (RuntimeError, MemoryError) as again:
        if not labs_decode.out_of_memory(again):
            raise
        halves = []
    what = "retrying in halves" if halves else "these rows fail"
    log.warning("out of memory in a step of %d rows; %s", len(batch.rows), what)
    for row in () if halves else batch.rows:
        del loop.rows[row.id]
        yield row.id, Ended("failed", error)
    return halves


# ---------------------------------------------------------------- steps


@torch.inference_mode()
def step(decoder: Decoder, batch: Batch) -> tuple[Batch, list[Choice]]:
    """Run the model on the last token of each row and choose the next token.

    A newcomer's first step chooses from the logits of its prompt. If a step fails, it may be
    repeated, unless the model has recurrent states.
    """
    if decoder.grow and batch.logits is None:
        decoder.grow(batch)
    logits = labs_decode.forward(decoder, batch) if batch.logits is None else batch.logits
    choices = choose(logits, batch.rows)
    for row, choice in zip(batch.rows, choices, strict=True):
        row.take(choice.token, written=int(batch.logits is None))
    return replace(batch, logits=None), choices


def join_best(decoder: Decoder, batches: Sequence[Batch], newcomer: Batch) -> list[Batch]:
    """Join the newcomer to the first batch that it does not slow down, else begin a new batch.

    A call reads each slot up to the length of the longest row. As long as this padding has fewer
    bytes than the weights, it is cheaper than a second call, which reads the weights again.
    """
    for index, batch in enumerate(batches):
        lengths = [len(row.ids) for row in (*batch.rows, *newcomer.rows)]
        padding = max(lengths) * len(lengths) - sum(lengths)
        if padding * newcomer.cache.bytes_per_column < decoder.weight_bytes:
            try:
                return [*batches[:index], labs_decode.join(batch, newcomer), *batches[index + 1 :]]
            except (RuntimeError, MemoryError) as error:
                if not labs_decode.out_of_memory(error):
                    raise
                for layer in batch.cache.stateful_layers:  # undo, then try the next batch
                    layer.cut(len(batch.rows))
    return [*batches, decoder.graphs.begin(newcomer) if decoder.graphs else newcomer]


# ---------------------------------------------------------------- memory


def prompts_for_one_call(decoder: Decoder, newcomers: Sequence[Batch]) -> list[Batch]:
    """Return the first newcomers whose whole prompts fit into one prefill call.

    A prompt of one token is prefilled alone, because a product of one line rounds differently. For
    the same reason, prompts longer than `decoder.steady` are only prefilled with such others.
    """
    together, most, fewest = list[Batch](), decoder.steady or decoder.chunk, 2
    if decoder.steady_prompts and newcomers and newcomers[0].pending > most:
        most, fewest = decoder.chunk, most + 1
    for newcomer in newcomers if decoder.prefill_packed else ():
        tokens = sum(each.pending for each in (*together, newcomer))
        if newcomer.rows[0].written or newcomer.pending < fewest or tokens > most:
            break
        together.append(newcomer)
    return together or list(newcomers[:1])


def has_room(decoder: Decoder, batches: Sequence[Batch], newcomers: Sequence[Batch]) -> bool:
    """Return whether the newcomers' slots fit in memory; without a batch, one is always tried."""
    if not batches and len(newcomers) == 1:
        return True
    own = [labs_decode.blocks(newcomer.rows[0].columns) for newcomer in newcomers]
    at = batches[0].cache.cursor if batches else labs_decode.Cursor(0, 0)
    rows, live = max(at.rows, 1), len(batches[0].rows) if batches else 0
    while rows < live + len(newcomers):
        rows *= 2  # a batch doubles its slots until all fit; newcomers have their own until then
    owed = [labs_decode.blocks(max(row.columns for row in b.rows)) for b in batches]  # if they grow
    grown = rows * max(at.columns, *owed[:1], *own) - at.rows * at.columns
    for batch, columns in zip(batches[1:], owed[1:], strict=True):
        grown += batch.cache.cursor.rows * max(columns - batch.cache.cursor.columns, 0)
    per_column = batches[0].cache.bytes_per_column if batches else decoder.column_bytes
    fits = (sum(own) + grown) * per_column < labs_decode.slot_budget(decoder.device)
    return fits or bool(decoder.waiting and decoder.waiting.has_room(decoder, batches, newcomers))


def rows_in_memory(decoder: Decoder, most: int = MOST_ROWS) -> int:
    """Return how many typical rows fit in free memory, 1 to `most`; begun ones if rows can wait."""
    if decoder.mode == "alone":
        return 1
    columns = 2 * labs_decode.FIRST_COLUMNS if decoder.waiting else TYPICAL_COLUMNS
    row = columns * decoder.column_bytes
    return max(1, min(labs_decode.slot_budget(decoder.device) // row if row else most, most))


# ---------------------------------------------------------------- choose


def eos_token_ids_of(model: PretrainedModel, tokenizer: labs_decode.Tokenizer) -> frozenset[int]:
    """Return the ids of the tokens that end an answer."""
    stated = getattr(model.generation_config, "eos_token_id", None)
    ids = stated if isinstance(stated, list) else [stated]
    return frozenset(i for i in (*ids, tokenizer.eos_token_id) if i is not None)


def sampling_of(
    options: Any, recommended: Mapping[str, object], seed: int, processors: tuple[Processor, ...]
) -> Sampling:
    """Fill unset options from the model's recommendation, else with values that have no effect.

    options: a labs_settings.Generation. recommended: fields of the model's generation_config.
    """

    def pick(name: str, neutral: float) -> Any:
        given = getattr(options, name)
        return recommended.get(name, neutral) if given is None else given

    implied = any((options.top_k, options.top_p, options.min_p))
    samples = options.do_sample  # unset: temperature decides, else `implied`, else the model
    if samples is None and options.temperature is not None:
        samples = options.temperature > 0
    elif samples is None:
        warm = recommended.get("temperature") != 0
        samples = implied or (warm and bool(recommended.get("do_sample")))
    neutral = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
    temperature = (pick("temperature", 1.0) or 1.0) if samples else 0.0  # 0 does not sample
    return Sampling(
        **{name: pick(name, value) for name, value in neutral.items()},
        temperature=temperature if temperature >= COLDEST else 0.0,
        frequency_penalty=options.frequency_penalty,
        presence_penalty=options.presence_penalty,
        logit_bias=tuple(options.logit_bias.items()),
        logprobs=options.logprobs,
        seed=seed,
        processors=processors,
    )


def choose(logits: Tensor, rows: Sequence[Row]) -> list[Choice]:
    """Choose one token per row from float32 logits [B rows, V tokens], by each row's own options.

    If a row's processor fails or its logits are not finite, only its Choice holds the error.
    """
    scores = logits.clone() if any(_changes_logits(row.sampling) for row in rows) else logits
    errors = _process(scores, rows)
    highest, best = highest_of(scores)  # a GPU gets its work before `draw` waits for a result
    drawn = [i for i, row in enumerate(rows) if row.sampling.temperature and i not in errors]
    tokens = dict(zip(drawn, draw(scores, rows, drawn), strict=True))
    tokens = dict(enumerate(best.tolist())) | tokens
    for index, value in enumerate(highest.tolist()):
        if not abs(value) <= LARGEST * (rows[index].sampling.temperature or 1):
            reason = "the model's logits are not finite; torch_dtype bf16 or fp32 may help"
            errors.setdefault(index, ArithmeticError(reason))
    return [
        Choice(error=errors[i]) if i in errors else _choice(logits[i], row, tokens[i])
        for i, row in enumerate(rows)
    ]


def highest_of(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Return the highest of scores [B, V] and its id, for each row the first one."""
    if not scores.is_cpu or scores.shape[-1] % LANES:
        return scores.max(-1)
    # A CPU finds a maximum ten times faster than its id.
    parts = scores.view(len(scores), -1, LANES)
    highest, part = parts.amax(-1).max(-1)
    within = parts[torch.arange(len(scores)), part].argmax(-1)
    return highest, part * LANES + within


def _changes_logits(s: Sampling) -> bool:
    penalised = s.repetition_penalty != 1 or s.frequency_penalty != 0 or s.presence_penalty != 0
    return penalised or bool(s.logit_bias) or bool(s.processors)


def _process(scores: Tensor, rows: Sequence[Row]) -> dict[int, Exception]:
    """Apply each row's options and processors to scores [B, V], in place; return errors by row."""
    errors: dict[int, Exception] = {}
    _penalise(scores, rows)
    for index, row in enumerate(rows):
        if row.bias is not None and len(row.bias[0]) < len(row.sampling.logit_bias):
            beyond = f"logit_bias names a token id that is not below {scores.shape[-1]}"
            errors[index] = IndexError(beyond)
        try:
            for processor in row.sampling.processors:
                scores[index] = processor(row.ids, scores[index])
        except Exception as error:  # a request's processor may raise anything: only its row ends
            errors[index] = error
    return errors


def _penalise(scores: Tensor, rows: Sequence[Row]) -> None:
    """Apply each row's penalties and biases to scores [B, V], in place.

    repetition_penalty covers prompt and answer (transformers' RepetitionPenaltyLogitsProcessor).
    frequency_penalty and presence_penalty cover the answer only (OpenAI's API reference).
    """
    options = [(i, row, row.sampling) for i, row in enumerate(rows)]
    valid = range(scores.shape[-1])  # a prompt may hold ids for which the model has no logits
    if seen := [
        ([token for token in row.seen if token in valid], i, s.repetition_penalty)
        for i, row, s in options
        if s.repetition_penalty != 1
    ]:
        ids, lines, penalties = _flatten(seen, scores)
        old = scores[lines, ids]
        scores[lines, ids] = torch.where(old < 0, old * penalties, old / penalties)
    if used := [
        (row.generated, i, s.frequency_penalty, s.presence_penalty)
        for i, row, s in options
        if (s.frequency_penalty or s.presence_penalty) and row.generated
    ]:
        ids, lines, frequency, presence = _flatten(used, scores)
        counts = [count for generated, *_ in used for count in generated.values()]
        scores[lines, ids] -= tensor_like(counts, scores) * frequency + presence
    for i, row in ((i, row) for i, row, s in options if s.logit_bias):
        scores[i].index_add_(0, *_bias(row, scores[i]))


def _bias(row: Row, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Return the ids and values of a row's logit_bias as tensors, which are uploaded only once."""
    if row.bias is None:
        biases = {token: bias for token, bias in row.sampling.logit_bias if token < len(scores)}
        ids = upload([*biases], scores.device, torch.long)
        row.bias = ids, tensor_like([*biases.values()], scores)
    return row.bias


def _flatten(
    table: Sequence[tuple[Collection[int], int, *tuple[float, ...]]], scores: Tensor
) -> list[Tensor]:
    """Flatten a table of (ids, row, numbers ...): all ids, and for each its row and numbers."""
    ids = [token for some, *_ in table for token in some]
    _, lines, *numbers = zip(*table, strict=True)
    lengths = upload([len(some) for some, *_ in table], scores.device)
    columns = [upload(lines, scores.device), *(tensor_like(each, scores) for each in numbers)]
    many = [each.repeat_interleave(lengths, output_size=len(ids)) for each in columns]
    return [upload(ids, scores.device), *many]


def tensor_like(values: Sequence[float], like: Tensor) -> Tensor:
    """Return values as a tensor with the type and device of another one."""
    return upload(values, like.device, like.dtype)


def _choice(logits: Tensor, row: Row, token: int) -> Choice:
    """Return the choice of a token, with the model's own log-probabilities if requested."""
    if row.sampling.logprobs is None:
        return Choice(token)
    logprobs = logits.log_softmax(-1)
    values, ids = logprobs.topk(min(row.sampling.logprobs, len(logprobs)))
    top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return Choice(token, float(logprobs[token]), top)


def draw(
    scores: Tensor, rows: Sequence[Row], places: Sequence[int], sizes: Sequence[int] = CANDIDATES
) -> list[int]:
    """Draw a token for each of rows[places] from scores [B, V]: add Gumbel noise, take the maximum.

    The noise is a hash of (seed, step, token id), the same in any batch and on any device but mps.
    Only the likeliest tokens, the candidates, are examined; a row that may keep others is redrawn
    from more. If no option drops tokens, the rest compete as one lump of their total weight, and a
    token of it is drawn only if the lump wins.
    """
    if not places:
        return []
    chosen, device = [rows[i] for i in places], scores.device
    options = [row.sampling for row in chosen]
    temperatures = tensor_like([s.temperature for s in options], scores)
    scaled = scores[upload(places, device)] / temperatures[:, None]
    size = min(*sizes[:1], scaled.shape[-1]) if sizes else scaled.shape[-1]
    top = scaled.topk(size)  # [N, K], descending
    kept = kept_candidates(top.values, scaled.logsumexp(-1, keepdim=True), options)
    noisy = (top.values + gumbel(chosen, top.indices)).masked_fill(~kept, -torch.inf)
    best = noisy.max(-1)
    tokens: list[int] = top.indices.gather(-1, best.indices[:, None])[:, 0].tolist()
    whole = size == scaled.shape[-1]
    open_ended = [] if whole else [n for n, last in enumerate(kept[:, -1].tolist()) if last]
    may_cut = {n for n in open_ended if (s := options[n]).top_p < 1 or s.min_p or s.top_k > size}
    # top_p is a share of all that top_k keeps: if not all are candidates, draw from more.
    deep = (n for n, s in enumerate(options) if s.top_k > size and s.top_p < 1)
    again = sorted(may_cut if whole else {*may_cut, *deep})
    redrawn = draw(scores, rows, [places[n] for n in again], sizes[1:])
    for n, token in zip(again, redrawn, strict=True):
        tokens[n] = token
    lumps = [n for n in open_ended if chosen[n].sampling.top_k == 0 and n not in again]
    if lumps:
        at = upload(lumps, device)
        rest = scaled[at].scatter(-1, top.indices[at], -torch.inf)
        won = _draw_lumps(rest, [chosen[n] for n in lumps], best.values[at])
        for place, token in won.items():
            tokens[lumps[place]] = token
    return tokens


def kept_candidates(top: Tensor, total: Tensor, options: Sequence[Sampling]) -> Tensor:
    """Return which candidates [N, K] the options keep, as a mask.

    top: logits over temperature, descending. total: their log-sum over the vocabulary [N, 1]. Keeps
    the sets of transformers' TopK-, TopP- and MinPLogitsWarper, in this order: ties of top_k are
    kept, and top_p is a share of the tokens that top_k keeps.
    """
    size = top.shape[-1]
    last = upload([min(s.top_k or size, size) - 1 for s in options], top.device)
    kept = top >= top.gather(-1, last[:, None])
    limited = upload([0 < s.top_k <= size for s in options], top.device)[:, None]
    below = top.masked_fill(~kept, -torch.inf).logsumexp(-1, keepdim=True)
    probabilities = (top - torch.where(limited, below, total)).exp()
    before = probabilities.cumsum(-1) - probabilities
    share = [s.top_p if s.top_p < 1 else math.inf for s in options]  # a rounded sum may exceed 1
    kept &= before < tensor_like(share, top)[:, None]
    floor = [math.log(s.min_p) if s.min_p > 0 else -math.inf for s in options]
    kept &= top >= top[:, :1] + tensor_like(floor, top)[:, None]
    kept[:, 0] = True
    return kept


def _draw_lumps(rest: Tensor, rows: Sequence[Row], best: Tensor) -> dict[int, int]:
    """Draw a token of rest [N, V] for each row where all of these together beat `best` [N]."""
    lump = torch.full((len(rows), 1), rest.shape[-1], device=rest.device)  # an unused token id
    wins = rest.logsumexp(-1) + gumbel(rows, lump)[:, 0] > best
    ids = torch.arange(rest.shape[-1], device=rest.device)[None]
    return {
        n: int((rest[n] + gumbel([rows[n]], ids)[0]).argmax())
        for n, won in enumerate(wins.tolist())
        if won
    }


def gumbel(rows: Sequence[Row], ids: Tensor) -> Tensor:
    """Return Gumbel noise for token ids [N, K], a function of (seed, step, id) only.

    It mixes the id with 64 bits of seed and step, twice, by the last step of the hash murmur3.
    """
    keys = [_key(row.sampling.seed, len(row.ids) - row.prompt_length) for row in rows]
    low, high = (
        upload([key >> at & LOW_32 for key in keys], ids.device)[:, None] for at in (0, 32)
    )
    hashed = _mix((_mix(ids ^ low) + high) & LOW_32)
    real = torch.float32 if ids.device.type == "mps" else torch.float64  # mps has no float64
    below = 1 - torch.finfo(real).eps / 2  # just under 1, where the noise is infinite
    return -torch.log(-torch.log(((hashed.to(real) + 0.5) / 2**32).clamp(max=below)))


def _mix(x: Tensor) -> Tensor:
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & LOW_32
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & LOW_32
    return x ^ (x >> 16)


def _key(seed: int, step: int) -> int:
    """Return splitmix64 of seed and step."""
    x = (seed * 0x9E3779B97F4A7C15 + (step + 1) * 0xD1342543DE82EF95) & 0xFFFFFFFFFFFFFFFF
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return x ^ (x >> 31)
