# SPDX-License-Identifier: Apache-2.0
"""labs_loop: which rows run when, and which tokens are chosen, against transformers' functions."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from decoding import FOUR, answers_of, failing_at, joined, raising, reference
from kit import newcomer, prepare, random_model, row_of
from transformers.generation import logits_process

import labs
import labs_decode as decode
import labs_loop as loop
import labs_memory
import labs_states

# ---------------------------------------------------------------- which rows run when


@pytest.mark.parametrize("kind", ["gemma3_text", "mamba2", "gptj"])
def test_prompts_whose_cache_is_more_than_keys_and_values_go_one_at_a_time(kind: str) -> None:
    decoder = prepare(random_model(kind))
    waiting = [decode.new_batch(decoder, row_of(prompt)) for prompt in FOUR[1:]]
    shares = kind == "gptj" and decoder.mode == "joins"
    assert len(loop.prompts_for_one_call(decoder, waiting)) == (3 if shares else 1)


@pytest.mark.parametrize(
    ("lengths", "steady", "count"),
    [
        ([100, 100, 100], 0, 2),  # a chunk has 256 tokens
        ([100, 1, 100], 0, 1),  # a prompt of one token shares no call
        ([1, 100], 0, 1),
        ([300, 5], 0, 1),
        ([256], 0, 1),
        ([255, 2], 0, 1),
        ([254, 2], 0, 2),
        ([12] * 5, 0, 5),
        ([12] * 5, 32, 2),  # no more rows than keep their bits
        ([40] * 5, 32, 1),
        ([40] * 7, -32, 6),  # longer ones keep theirs beside each other
        ([33, 200, 40], -32, 2),
        ([33, 32, 40], -32, 1),
        ([12, 12, 40], -32, 2),
        ([300, 40], -32, 1),
    ],
)
def test_prompts_share_a_call_up_to_one_chunk(lengths: Any, steady: int, count: int) -> None:
    flags = {"steady": abs(steady), "steady_prompts": steady < 0}
    decoder = dataclasses.replace(reference("llama")[0], **flags)
    waiting = [decode.new_batch(decoder, row_of([5] * length)) for length in lengths]
    assert len(loop.prompts_for_one_call(decoder, waiting)) == count


def test_a_long_row_gets_a_batch_of_its_own_if_its_padding_outweighs_the_weights() -> None:
    decoder, _ = reference("llama")
    long, short = newcomer(decoder, [5] * 300, "long"), newcomer(decoder, [5] * 10, "short")
    for columns, sizes in ((250, [1, 1]), (5000, [2])):
        weights = columns * long.cache.bytes_per_column
        batches = loop.join_best(dataclasses.replace(decoder, weight_bytes=weights), [short], long)
        assert [len(batch.rows) for batch in batches] == sizes


@pytest.mark.parametrize("method", ["resize", "write"])
@pytest.mark.parametrize("kind", ["llama", "mamba2", "bamba"])
def test_a_newcomer_that_memory_does_not_hold_beside_others_stays_in_its_own_batch(
    kind: str, method: str, monkeypatch: Any
) -> None:
    decoder, expected = reference(kind)
    batch, new = joined(decoder, [0, 1]), newcomer(decoder, FOUR[2], 2)
    layer = decode.SlotLayer if kind == "llama" else labs_states.StateLayer
    failing_at(1, monkeypatch, layer, method)
    batches = loop.join_best(decoder, [batch], new)
    assert [[row.id for row in each.rows] for each in batches] == [[0, 1], [2]]
    batches = [loop.step(decoder, each)[0] for each in batches]  # before `keep` cuts the states
    assert answers_of(decoder, batches) == dict(enumerate(expected[:3]))


def test_another_error_than_memory_is_no_reason_for_a_batch_of_its_own(monkeypatch: Any) -> None:
    decoder, _ = reference("llama")
    batch, new = joined(decoder, [0, 1]), newcomer(decoder, FOUR[2], 2)
    monkeypatch.setattr(decode, "join", raising(RuntimeError("broken")))
    with pytest.raises(RuntimeError, match="broken"):
        loop.join_best(decoder, [batch], new)


def test_with_cuda_graphs_a_new_batch_begins_in_the_slots_that_they_give() -> None:
    class Graphs:
        def begin(self, batch: decode.Batch) -> decode.Batch:
            return dataclasses.replace(batch, at_once=7)

    decoder: Any = dataclasses.replace(reference("llama")[0], graphs=Graphs())
    (batch,) = loop.join_best(decoder, [], newcomer(reference("llama")[0], FOUR[1]))
    assert batch.at_once == 7


def free(monkeypatch: Any, size: float) -> None:
    monkeypatch.setattr(decode, "available_bytes", lambda device: int(size))


@pytest.mark.parametrize(("live", "columns"), [(1, 64), (2, 64 + 2 * 64)])
def test_room_for_a_newcomer_includes_the_rows_that_double_for_it(
    live: int, columns: int, monkeypatch: Any
) -> None:
    decoder = dataclasses.replace(reference("llama")[0], waiting=None)
    kept = decode.keep(joined(decoder, [0, 1]), range(live))
    assert kept is not None
    new = decode.new_batch(decoder, row_of(FOUR[1]))
    needed = columns * kept.cache.bytes_per_column / decode.MEMORY_SHARE
    for size, fits in ((needed, False), (needed + 4, True)):
        free(monkeypatch, size)
        assert loop.has_room(decoder, [kept], [new]) is fits


def test_room_is_for_all_of_several_newcomers_and_always_for_a_first_one(monkeypatch: Any) -> None:
    decoder, _ = reference("llama")
    new = [decode.new_batch(decoder, row_of(prompt)) for prompt in FOUR]
    slots = sum(each.cache.cursor.columns for each in new) * decoder.column_bytes
    for size, fits in ((slots, False), (8 * slots, True)):
        free(monkeypatch, size)
        assert loop.has_room(decoder, [], new) is fits
    free(monkeypatch, 0)
    assert loop.has_room(decoder, [], new[:1])


def test_the_usage_of_the_cache_is_the_share_of_all_slots_that_holds_tokens(
    monkeypatch: Any,
) -> None:
    decoder, _ = reference("llama")
    batch = joined(decoder, [0, 1])  # 6 tokens in two slots of 64 columns
    free(monkeypatch, 72 * batch.cache.bytes_per_column / decode.MEMORY_SHARE)
    assert labs_memory.cache_usage([batch]) == pytest.approx(6 / (2 * 64 + 72))
    assert labs_memory.cache_usage([decode.new_batch(decoder, row_of(FOUR[1]))]) == 0


def test_as_many_rows_are_run_as_memory_holds_and_one_at_least(monkeypatch: Any) -> None:
    assert loop.rows_in_memory(reference("rwkv")[0]) == 1
    assert loop.rows_in_memory(reference("mamba2")[0]) == loop.MOST_ROWS
    waits, _ = reference("llama")
    decoder = dataclasses.replace(waits, waiting=None)
    row = loop.TYPICAL_COLUMNS * decoder.column_bytes / decode.MEMORY_SHARE
    for size, rows in ((0, 1), (5 * row, 5), (5.9 * row, 5), (1e15, loop.MOST_ROWS)):
        free(monkeypatch, size)
        assert loop.rows_in_memory(decoder) == rows
    free(monkeypatch, 5 * row)
    assert loop.rows_in_memory(waits) == 10  # they begin with fewer columns


# ---------------------------------------------------------------- the highest logits


@pytest.mark.parametrize("size", [1, 64, 100, 640])
def test_the_highest_logit_is_the_first_of_those_that_are_equal(size: int) -> None:
    torch.manual_seed(0)
    scores = torch.randint(0, 5, (2, 40, size)).float().transpose(0, 1)[:, -1]
    highest, best = loop.highest_of(scores)
    assert [*zip(highest.tolist(), best.tolist(), strict=True)] == [
        (max(line), line.index(max(line))) for line in scores.tolist()
    ]


@pytest.mark.parametrize("size", [100, 640])
def test_no_number_is_higher_than_one_that_is_none_and_hidden_rows_have_a_token(size: int) -> None:
    scores = torch.zeros(4, size)
    scores[0, 70], scores[0, 5] = math.nan, math.inf
    scores[1, [64, 99]] = math.nan
    scores[2] = -math.inf
    highest, best = loop.highest_of(scores)
    assert best.tolist() == [70, 64, 0, 0]
    assert highest[:2].isnan().all()
    assert highest[2:].tolist() == [-math.inf, 0]


# ---------------------------------------------------------------- the kept set


def test_a_model_that_recommends_temperature_0_is_greedy_even_if_it_recommends_sampling() -> None:
    for temperature, used in ((0.0, 0.0), (0.5, 0.5), (loop.COLDEST, loop.COLDEST)):
        recommended = {"do_sample": True, "temperature": temperature}
        assert loop.sampling_of(labs.Generation(), recommended, 0, ()).temperature == used


def rows_of(options: list[dict[str, Any]], prompt: list[int] | None = None) -> list[decode.Row]:
    return [
        decode.Row(
            id=i, ids=list(prompt or [1]), max_new_tokens=4, sampling=decode.Sampling(**each)
        )
        for i, each in enumerate(options)
    ]


def seeded(count: int, **option: Any) -> list[decode.Row]:
    return rows_of([{"temperature": 1.0, "seed": seed, **option} for seed in range(count)])


def drawn(logits: torch.Tensor, rows: list[decode.Row]) -> list[int]:
    """Choose from the same logits [1, V] for all rows."""
    return [choice.token for choice in loop.choose(logits.expand(len(rows), -1), rows)]


def warped(logits: torch.Tensor, option: decode.Sampling) -> set[int]:
    """Return the tokens of logits [1, V] that transformers' warpers keep."""
    ids: Any = None
    logits = logits_process.TemperatureLogitsWarper(float(option.temperature))(ids, logits)
    if option.top_k:
        logits = logits_process.TopKLogitsWarper(option.top_k)(ids, logits)
    if option.top_p < 1:
        logits = logits_process.TopPLogitsWarper(option.top_p)(ids, logits)
    if option.min_p:
        logits = logits_process.MinPLogitsWarper(option.min_p)(ids, logits)
    return {*logits[0].isfinite().nonzero()[:, 0].tolist()}


@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])
def test_the_kept_sets_of_rows_are_those_of_transformers_warpers(temperature: float) -> None:
    torch.manual_seed(3)
    table = itertools.product([0, 1, 5, 64, 500], [1.0, 0.9, 0.5, 0.01], [0.0, 0.05])
    options = [
        decode.Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
        for top_k, top_p, min_p in table
    ]
    logits = torch.randn(len(options), 1500) * 3
    top = (logits / temperature).sort(descending=True)
    kept = loop.kept_candidates(top.values, top.values.logsumexp(-1, keepdim=True), options)
    for row, option in enumerate(options):
        assert {*top.indices[row][kept[row]].tolist()} == warped(logits[row : row + 1], option)


@pytest.mark.parametrize(
    ("option", "count"),
    [({"top_p": 0.5}, 2), ({"min_p": 1.0}, 4), ({"top_k": 1}, 4), ({"top_p": 0.0}, 1)],
)
def test_of_equal_tokens_as_many_are_kept_as_by_transformers(option: Any, count: int) -> None:
    top = torch.zeros(1, 4)
    total = top.logsumexp(-1, keepdim=True)
    kept = loop.kept_candidates(top, total, [decode.Sampling(temperature=1.0, **option)])
    assert int(kept.sum()) == count


def test_top_p_is_a_share_of_the_tokens_that_top_k_keeps_if_these_are_all_candidates() -> None:
    torch.manual_seed(3)
    logits, size = torch.randn(1, 3000), loop.CANDIDATES[0]
    top, total = logits.topk(size), logits.logsumexp(-1, keepdim=True)
    option = decode.Sampling(temperature=1.0, top_k=size, top_p=0.5)
    kept = loop.kept_candidates(top.values, total, [option])
    assert int(kept.sum()) == len(warped(logits, option)) < size


# ---------------------------------------------------------------- draws


@pytest.mark.parametrize(
    "option",
    [
        {"temperature": 1.0},
        {"temperature": 1.0, "top_k": 8},
        {"temperature": 0.7, "top_p": 0.9},
        {"temperature": 1.5, "min_p": 0.05},
        {"temperature": 3.0, "top_p": 0.98},
    ],
)
def test_draws_have_the_distribution_of_the_kept_set(option: dict[str, Any]) -> None:
    torch.manual_seed(0)
    logits = torch.randn(1, 3000) * 2  # wider than CANDIDATES, so that the lump is used too
    draws, found, s = 3000, Counter[int](), decode.Sampling(**option)
    rows = seeded(draws, **option)
    for start in range(0, draws, 500):
        found.update(drawn(logits, rows[start : start + 500]))
    top = (logits / s.temperature).sort(descending=True)
    kept = loop.kept_candidates(top.values, top.values.logsumexp(-1, keepdim=True), [s])[0]
    shares = top.values[0].masked_fill(~kept, -torch.inf).double().softmax(-1) * draws
    expected = dict(zip(top.indices[0].tolist(), shares.tolist(), strict=True))
    assert all(expected[token] > 0 for token in found)
    common = [token for token, share in expected.items() if share >= 8]
    rest = draws - sum(expected[token] for token in common)
    chi2 = sum((found[token] - expected[token]) ** 2 / expected[token] for token in common)
    if rest >= 8:
        chi2 += (draws - sum(found[token] for token in common) - rest) ** 2 / rest
    freedom = max(len(common) - 1, 1)
    assert chi2 < freedom + 5 * math.sqrt(2 * freedom) + 5


@pytest.mark.parametrize("top_k", [100, 129, 200, 1000, 2000])
@pytest.mark.parametrize("top_p", [0.6, 0.95])
def test_no_draw_leaves_the_set_that_transformers_warpers_keep(top_k: int, top_p: float) -> None:
    logits = -1.1 * torch.arange(1, 4097).log()[None]  # a share of it lies far out
    kept = warped(logits, decode.Sampling(temperature=1.0, top_k=top_k, top_p=top_p))
    tokens = {*drawn(logits, seeded(400, top_k=top_k, top_p=top_p))}
    assert tokens <= kept
    assert len(tokens) > 0.5 * min(len(kept), 100)


FEW, MANY = loop.CANDIDATES


@pytest.mark.parametrize(
    ("likely", "width", "option", "sizes"),
    [
        (10, 3000, {"top_p": 0.9}, [FEW]),
        (10, 3000, {"top_k": 5, "top_p": 0.9}, [FEW]),
        (10, 3000, {}, [FEW]),
        (3000, 3000, {}, [FEW]),  # all other tokens are one lump
        (300, 3000, {"top_p": 0.9}, [FEW, MANY]),
        (3000, 3000, {"top_p": 0.9}, [FEW, MANY, 3000]),
        (3000, 3000, {"top_k": FEW}, [FEW]),
        (3000, 3000, {"top_k": FEW, "top_p": 0.5}, [FEW]),
        (10, 3000, {"top_k": 300, "top_p": 0.5}, [FEW, MANY]),
        (10, 3000, {"top_k": 300, "min_p": 0.5}, [FEW]),
        (FEW - 1, 3000, {"min_p": 0.5}, [FEW]),
        (FEW, 3000, {"min_p": 0.5}, [FEW, MANY]),
        (10, 100, {"top_k": 500, "top_p": 0.5}, [100]),
        (500, 500, {"top_p": 0.9}, [FEW, 500]),
    ],
)
def test_a_draw_looks_at_no_more_candidates_than_it_must(
    likely: int, width: int, option: dict[str, Any], sizes: list[int], monkeypatch: Any
) -> None:
    logits, real = torch.zeros(2, width), torch.Tensor.topk
    logits[:, :likely] = 20.0
    looked: list[tuple[int, int]] = []

    def topk(self: torch.Tensor, k: int, **options: Any) -> Any:
        looked.append((len(self), k))
        return real(self, k, **options)

    monkeypatch.setattr(torch.Tensor, "topk", topk)
    loop.choose(logits, rows_of([{"temperature": 1.0, **option}, {}]))
    assert looked == [(1, size) for size in sizes]


@pytest.mark.parametrize(
    "option",
    [
        {"top_p": 0.999},
        {"top_p": 0.5},
        {"min_p": 0.01},
        {"top_k": 700},
        {"top_k": 1500, "top_p": 0.99},
        {"top_k": 128},
        {"top_k": 20, "top_p": 0.9},
    ],
)
@pytest.mark.parametrize("spread", [0.01, 2.0])
def test_a_draw_from_few_candidates_gives_the_token_of_a_draw_from_all(
    spread: float, option: dict[str, Any]
) -> None:
    torch.manual_seed(2)
    scores, rows = (torch.randn(1, 3000) * spread).expand(60, -1), seeded(60, **option)
    few = loop.draw(scores, rows, range(60))
    assert few == loop.draw(scores, rows, range(60), ())
    assert len(set(few)) > 1


def test_rows_that_need_more_candidates_are_drawn_beside_rows_that_do_not() -> None:
    torch.manual_seed(2)
    scores = torch.randn(40, 3000) * torch.tensor([0.01, 5.0]).repeat(20)[:, None]
    options = [{}, {"top_p": 0.999}, {"top_k": 5}, {"min_p": 0.001}, {"top_p": 0.9, "top_k": 900}]
    rows = rows_of([{"temperature": 1.0, "seed": n, **options[n % 5]} for n in range(40)])
    places = list(range(39, -1, -2))
    cut = [n for n in places if n % 5]  # without any option the lump has noise of its own
    tokens = dict(zip(places, loop.draw(scores, rows, places), strict=True))
    assert [tokens[n] for n in cut] == loop.draw(scores, rows, cut, ())


def test_a_draw_depends_on_its_own_seed_and_step_and_not_on_other_rows() -> None:
    torch.manual_seed(1)
    logits, options = torch.randn(1, 2000), [{"temperature": 1.0, "seed": n} for n in range(60)]
    options += [{}, {"temperature": 2.0, "top_k": 40}, {"temperature": 3.0, "seed": 8}]
    options += [{"temperature": 1.0, "top_p": 0.99}, {"temperature": 1.0, "min_p": 0.2, "seed": 9}]
    together = drawn(logits, rows_of(options))
    assert together == [drawn(logits, rows_of([each]))[0] for each in options]
    candidates = {*logits[0].topk(loop.CANDIDATES[0]).indices.tolist()}
    assert {*together[:60]} & candidates
    assert {*together[:60]} - candidates


def test_tokens_beyond_the_candidates_are_drawn_by_their_shares() -> None:
    likely, size = 0.6, loop.CANDIDATES[0]
    line = torch.full((1, size + 300), math.log(1 - likely))
    line[:, :size], line[:, size::2] = 3.0, math.log(likely)
    beyond = [token - size for token in drawn(line, seeded(9000)) if token >= size]
    share = sum(place % 2 == 0 for place in beyond) / len(beyond)
    assert share == pytest.approx(likely, abs=3 * math.sqrt(0.24 / len(beyond)))
    inside = size * math.exp(3)
    assert len(beyond) == pytest.approx(9000 * 150 / (150 + inside), rel=0.25)


def finaliser(x: int, bits: int, rounds: Sequence[tuple[int, int]]) -> int:
    for shift, factor in rounds:
        x = (x ^ (x >> shift)) * factor % 2**bits
    return x


MURMUR3 = 32, ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1))
SPLITMIX64 = 64, ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1))


@pytest.mark.parametrize("seed", [0, 5, 2**63 - 1])
@pytest.mark.parametrize("step", [0, 1, 700])
def test_the_noise_is_a_published_hash_of_seed_step_and_token(seed: int, step: int) -> None:
    golden = 0x9E3779B97F4A7C15
    assert finaliser(1, *MURMUR3) == 0x514E28B7  # as its authors print it
    assert finaliser(golden, *SPLITMIX64) == 0xE220A8397B1DCDAF
    row, ids = rows_of([{"seed": seed}], [1, 2])[0], [0, 1, 777, 49_151]
    row.ids += [3] * step
    key = finaliser((seed * golden + (step + 1) * 0xD1342543DE82EF95) % 2**64, *SPLITMIX64)
    low, high = key % 2**32, key >> 32
    hashes = [finaliser((finaliser(i ^ low, *MURMUR3) + high) % 2**32, *MURMUR3) for i in ids]
    expected = [-math.log(-math.log((each + 0.5) / 2**32)) for each in hashes]
    assert loop.gumbel([row], torch.tensor([ids]))[0].tolist() == pytest.approx(expected, rel=1e-12)


def test_the_global_random_state_is_neither_read_nor_changed() -> None:
    logits, tokens = torch.linspace(0, 1, 2000)[None], []
    for seed in (7, 8):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        tokens.append(drawn(logits, rows_of([{"temperature": 1, "seed": 3}])))
        assert torch.equal(torch.get_rng_state(), before)
    assert tokens[0] == tokens[1]


# ---------------------------------------------------------------- penalties, biases, processors


def test_the_repetition_penalty_of_each_row_is_transformers_own() -> None:
    table = {0.5: [3, 4, 4, 9], 1.3: [7], 1.0: [5, 6], 2.0: [30, 8, 31, 9]}
    logits = torch.randn(len(table), 50)
    rows = [rows_of([{"repetition_penalty": each}], ids)[0] for each, ids in table.items()]
    scores = logits.clone()
    loop._penalise(scores, rows)
    for line, found, (penalty, ids) in zip(logits, scores, table.items(), strict=True):
        processor = logits_process.RepetitionPenaltyLogitsProcessor(penalty)
        assert torch.equal(found[None], processor(torch.tensor([ids]), line[None].clone()))


def test_prompt_tokens_without_logits_are_not_penalised() -> None:
    scores = torch.ones(1, 30)
    loop._penalise(scores, rows_of([{"repetition_penalty": 2.0}], [3, 99]))
    assert scores[0].nonzero()[:, 0].tolist() == [*range(30)]
    assert (scores != 1).nonzero()[:, 1].tolist() == [3]


def test_frequency_and_presence_penalties_follow_openais_formula_over_the_answer_only() -> None:
    table = [(0.5, 0.25), (1.0, 0.0), (0.0, 0.0), (0.0, -1.0)]
    rows = rows_of([{"frequency_penalty": f, "presence_penalty": p} for f, p in table], [3, 4])
    answers = [7, 7, 9], [8], [10], [5, 6, 5, 4]
    for row, answer in zip(rows, answers, strict=True):
        row.generated.update(answer)
    scores = torch.zeros(len(rows), 12)
    loop._penalise(scores, rows)
    for line, answer, (frequency, presence) in zip(scores, answers, table, strict=True):
        used = {token: -frequency * answer.count(token) - presence for token in answer}
        assert line.tolist() == [used.get(token, 0.0) for token in range(12)]


def louder(ids: list[int], line: torch.Tensor) -> torch.Tensor:
    return line * 2


ONE_BY_ONE: list[dict[str, Any]] = [
    {name: x} for name in ("frequency_penalty", "presence_penalty") for x in (-1.0, 0.5, 1.0)
]


@pytest.mark.parametrize(
    "option",
    [
        *ONE_BY_ONE,
        {"repetition_penalty": 2.0},
        {"logit_bias": ((4, 1.0),)},
        {"processors": (louder,)},
    ],
)
@pytest.mark.parametrize("others", [[], [{}]])
def test_choosing_leaves_the_models_logits_as_they_are(option: Any, others: list[Any]) -> None:
    rows = rows_of([option, option, *others], [3, 4])
    rows[0].generated.update([7, 7, 9])
    logits = torch.randn(len(rows), 30)
    before = logits.clone()
    assert not any(choice.error for choice in loop.choose(logits, rows))
    assert torch.equal(logits, before)


def test_a_logit_bias_is_added_and_can_force_and_forbid_a_token() -> None:
    scores = torch.full((1, 30), 2.0)
    loop._penalise(scores, rows_of([{"logit_bias": ((3, 1.0), (4, -1.5))}]))
    assert scores[0, 2:6].tolist() == [2.0, 3.0, 0.5, 2.0]
    logits = torch.zeros(2, 20)
    logits[:, 5] = 10
    rows = rows_of([{"logit_bias": ((8, 100.0),)}, {"logit_bias": ((5, -100.0), (2, 1.0))}])
    assert [choice.token for choice in loop.choose(logits, rows)] == [8, 2]


def test_a_bias_on_a_token_that_the_model_does_not_have_ends_its_row_only() -> None:
    rows = rows_of([{"logit_bias": ((30, 1.0),)}, {"logit_bias": ((3, 100.0),)}, {}], [3, 99])
    logits = torch.randn(3, 30)
    choices = loop.choose(logits, rows)
    assert str(choices[0].error) == "logit_bias names a token id that is not below 30"
    assert [choice.token for choice in choices[1:]] == [3, int(logits[2].argmax())]


def test_log_probabilities_are_the_models_own_with_the_likeliest_alternatives() -> None:
    logits = torch.randn(1, 40)
    choice = loop.choose(logits, rows_of([{"logprobs": 3, "logit_bias": ((1, 50.0),)}]))[0]
    expected = logits.log_softmax(-1)[0]
    assert choice.token == 1
    assert choice.logprob == pytest.approx(float(expected[1]))
    assert [i for i, _ in choice.top] == expected.topk(3).indices.tolist()
    assert [value for _, value in choice.top] == pytest.approx(expected.topk(3).values.tolist())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_end_their_row_only(bad: float, temperature: float) -> None:
    logits = torch.randn(3, 30)
    logits[1, 4] = bad
    choices = loop.choose(logits, rows_of([{}, {"temperature": temperature}, {}]))
    assert [choice.error is None for choice in choices] == [True, False, True]
    reason = "the model's logits are not finite; torch_dtype bf16 or fp32 may help"
    assert str(choices[1].error) == reason


def test_a_processor_that_raises_ends_its_row_only() -> None:
    rows = rows_of([{"processors": (raising(KeyError("grammar")),)}, {}])
    choices = loop.choose(torch.randn(2, 30), rows)
    assert isinstance(choices[0].error, KeyError)
    assert choices[1].error is None


def test_a_processor_gets_its_rows_ids_and_changes_its_own_row_only() -> None:
    seen: list[Any] = []

    def force(ids: list[int], line: torch.Tensor) -> torch.Tensor:
        seen.append((list(ids), line.shape))
        return torch.full_like(line, -torch.inf).index_fill(0, torch.tensor([11]), 0.0)

    logits = torch.randn(2, 30)
    rows = rows_of([{"processors": (force,), "temperature": 1.0}, {}], [3, 4, 5])
    choices = loop.choose(logits, rows)
    assert [choice.token for choice in choices] == [11, int(logits[1].argmax())]
    assert seen == [([3, 4, 5], (30,))]
