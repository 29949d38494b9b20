# SPDX-License-Identifier: Apache-2.0
"""The engine with real threads and tiny random models; forward calls are counted and held."""

from __future__ import annotations

import contextlib
import functools
import gc
import itertools
import math
import queue
import random
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import cachetools
import kit
import msgspec
import pytest
import torch
from kit import NEW, WAIT_S, Gate, alone, asked, held, inner, model_of, options, prompt, quiet, read

import labs
import labs_calls
import labs_choose
import labs_decode
import labs_engine
import labs_loop
import labs_states
import labs_turns
import labs_typed

CACHE = labs.ResponseCache(max_entries=4)
OOM = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
Start = Callable[..., tuple[labs_engine.AnyEngine, Gate]]


# ---------------------------------------------------------------- helpers


@pytest.fixture
def start() -> Iterator[Start]:
    """Start engines behind gates; at the end all of their tables have to be empty."""
    with contextlib.ExitStack() as stack:

        def begin(
            kind: str = "llama", cache: labs.ResponseCache | None = None, **server: Any
        ) -> tuple[labs_engine.AnyEngine, Gate]:
            gate = Gate(model_of(kind))
            engine: labs_engine.AnyEngine
            engine = labs_engine.Engine(model_of(kind), labs.Server(**server))
            engine = engine if cache is None else labs_engine.Cached(engine, cache)
            stack.callback(end, engine, gate)
            return engine, gate

        yield begin


def end(engine: labs_engine.AnyEngine, gate: Gate) -> None:
    gate.let(math.inf)
    engine.close()
    for handle in gate.handles:
        handle.remove()
    assert not inner(engine)._thread.is_alive()
    assert kit.leftovers(engine) == {}


Answers = list[labs_engine.Answer]


def submit(
    engine: labs_engine.AnyEngine, gate: Gate, count: int, wanted: Any = None, **more: Any
) -> Answers:
    """Submit requests whose first forward call is held."""
    gate.let(0)
    return [engine.submit(prompt(n), wanted or options(), **more) for n in range(count)]


def texts(answers: Answers) -> list[str]:
    return [read(answer)[0] for answer in answers]


def reasons(answers: Answers) -> list[str]:
    return [read(answer)[1].finish_reason for answer in answers]


def age(engine: labs_engine.AnyEngine) -> None:
    """Move the deadlines of all requests into the past."""
    for job in list(inner(engine)._jobs.values()):
        job.stream.row.deadline -= 10_000


def once(gate: Gate, error: BaseException) -> None:
    """Let the next forward call fail."""

    def fail(words: Any) -> None:
        gate.before = lambda words: None
        raise error

    gate.before = fail


@pytest.mark.parametrize(
    ("kind", "seed"), [("llama", None), ("llama", 7), ("mamba2", 7), ("bamba", None), ("rwkv", 7)]
)
def test_requests_share_steps_and_give_the_texts_they_give_alone(kind, seed, start):
    expected = [alone(kind, n, seed=seed) for n in range(6)]
    engine, gate = start(kind)
    answers = submit(engine, gate, 6, asked(seed))
    gate.let(math.inf)
    assert texts(answers) == expected
    if kind != "rwkv":
        assert max(gate.steps) == 6
        assert engine.status().steps <= 6 + 2 * NEW


def test_a_full_engine_refuses_at_once_and_has_room_again_after_an_end(start):
    engine, gate = start(max_batch_rows=2, max_waiting=1)
    answers = submit(engine, gate, 3)
    with pytest.raises(labs_engine.Busy, match="3 requests"):
        engine.submit(prompt(9), options())
    gate.let(math.inf)
    assert reasons(answers) == ["length"] * 3
    assert max(gate.steps) == 2
    *deltas, done = [*engine.submit(prompt(3), asked())]
    assert labs.fold(deltas, done).text == alone("llama", 3)


# ---------------------------------------------------------------- cancellation and deadlines


def close(engine: labs_engine.AnyEngine, answers: Answers) -> None:
    answers.pop().close()


def forget(engine: labs_engine.AnyEngine, answers: Answers) -> None:
    answers.pop()
    gc.collect()


def be_late(engine: labs_engine.AnyEngine, answers: Answers) -> None:
    age(engine)


@pytest.mark.parametrize(("kind", "leave"), [("llama", close), ("rwkv", forget)])
def test_a_request_cancelled_while_waiting_is_never_computed(kind, leave, start):
    engine, gate = start(kind, max_batch_rows=1)
    first = held(engine, gate, 0)
    leave(engine, [engine.submit(prompt(1), options())])
    gate.let(math.inf)
    assert read(first)[0] == alone(kind, 0)
    assert quiet(engine)
    assert not gate.has_seen(prompt(1))


@pytest.mark.parametrize(
    ("kind", "leave"), [("llama", close), ("mamba2", forget), ("llama", be_late)]
)
def test_a_request_cancelled_in_its_prefill_ends_before_the_next_chunk(
    kind, leave, start, monkeypatch
):
    monkeypatch.setattr(labs_decode, "CHUNK", 16)
    engine, gate = start(kind)
    gate.let(1)
    answers = [engine.submit(prompt(0, 200), options(timeout_s=500))]
    gate.until(2)
    leave(engine, answers)
    gate.let(math.inf)
    assert quiet(engine)
    assert len(gate.calls) == 2
    for text, done in map(read, answers):
        assert (text, done.finish_reason) == ("", "timeout")


@pytest.mark.parametrize(("kind", "leave"), [("llama", forget), ("mamba2", close)])
def test_a_request_cancelled_while_decoding_frees_its_row_before_the_next_step(kind, leave, start):
    engine, gate = start(kind)
    answers = submit(engine, gate, 3)
    gate.let(6)
    gate.until(7)
    assert gate.steps[-1] == 3
    leave(engine, answers)
    gate.let(1)
    gate.until(8)
    assert gate.steps[-1] == 2
    assert engine.status().running == 2
    gate.let(math.inf)
    assert texts(answers) == [alone(kind, n) for n in range(2)]


@pytest.mark.parametrize("kind", ["llama", "rwkv"])
def test_a_late_request_ends_with_its_text_so_far_or_without_waiting_for_a_row(kind, start):
    engine, gate = start(kind, max_batch_rows=1)
    first = held(engine, gate, 2, options(timeout_s=500))
    late = engine.submit(prompt(1), options(timeout_s=500))
    age(engine)
    gate.let(1)
    ends = [read(answer) for answer in (late, first)]
    assert {done.finish_reason for _, done in ends} == {"timeout"}
    assert (ends[0][0], ends[0][1].usage.completion_tokens) == ("", 0)
    assert alone(kind, 0).startswith(ends[1][0].rstrip("\ufffd"))
    assert len(gate.calls) == 3


# ---------------------------------------------------------------- faults


@pytest.mark.parametrize("kind", ["llama", "mamba2", "rwkv"])
def test_an_exception_in_the_model_ends_running_requests_only(kind, start, monkeypatch):
    monkeypatch.setattr(labs_engine.log, "exception", lambda text: None)  # pytest keeps its frames
    engine, gate = start(kind, max_batch_rows=2, prefix_cache_bytes=77)
    answers = submit(engine, gate, 3)
    gate.let(4)
    gate.until(5)
    slots = [weakref.ref(batch.cache) for batch in engine._loop.batches]
    engine._loop.steps, engine._loop.oom_splits = 10**6, 7
    once(gate, RuntimeError("a shape is wrong"))
    gate.let(math.inf)
    running = answers[: engine.max_rows]
    assert all(isinstance(read(answer)[1], labs.Failed) for answer in running)
    assert texts(answers[engine.max_rows :]) == [alone(kind, n) for n in range(len(running), 3)]
    assert read(engine.submit(prompt(5), asked()))[0] == alone(kind, 5)
    status = engine.status()
    assert (status.failures, status.alive, status.halvings) == (1, True, 7)
    assert status.steps > 10**6  # counted on
    assert kind != "llama" or engine._loop.prefixes.max_bytes == 77
    kit.until(lambda: not any(cache() for cache in slots))


@pytest.mark.parametrize("fault", ["not finite", "grammar", "out of memory"])
def test_a_fault_of_one_row_ends_that_row_only(fault, start):
    engine, gate = start()

    def broken(ids: list[int], logits: Any) -> Any:
        if len(ids) > 9:
            raise KeyError("grammar")
        return logits

    def spoil(words: Any, output: Any) -> None:
        if fault == "not finite" and words["input_ids"].shape == (3, 1) and len(gate.calls) > 5:
            output.logits[1] = math.nan

    def full(words: Any) -> None:
        if words["input_ids"].shape[1] > 50:
            raise OOM

    gate.before, gate.after, length = full, spoil, 100 if fault == "out of memory" else 6
    processors = [(), (broken,) if fault == "grammar" else (), ()]
    gate.let(0)
    prompts = (prompt(0), prompt(1, length), prompt(2))
    answers = [
        engine.submit(p, asked(), processors=each)
        for p, each in zip(prompts, processors, strict=True)
    ]
    gate.let(math.inf)
    found = [read(answer) for answer in answers]
    assert fault in str(found[1][1].error)
    assert alone("llama", 1, length).startswith(found[1][0])
    assert [found[n][0] for n in (0, 2)] == [alone("llama", n) for n in (0, 2)]
    assert read(engine.submit(prompt(3), asked()))[0] == alone("llama", 3)


# ---------------------------------------------------------------- memory


@contextlib.contextmanager
def little_memory(model: labs.Model, rows: int) -> Iterator[list[int]]:
    """Let the third layer run out of memory in steps of more than `rows`; yield those."""
    layers = next(m for m in model.model.modules() if isinstance(m, torch.nn.ModuleList))
    failed: list[int] = []

    def check(module: Any, args: Any) -> None:
        live, length = args[0].shape[:2]
        if length == 1 and live > rows:
            failed.append(live)
            raise OOM

    handle = layers[2].register_forward_pre_hook(check)
    try:
        yield failed
    finally:
        handle.remove()


@pytest.mark.parametrize(("kind", "rows"), [("llama", 2), ("mamba2", 3), ("bamba", 1)])
def test_a_batch_too_large_for_memory_is_split_and_loses_no_text(kind, rows, start):
    expected = [alone(kind, n) for n in range(4)]  # a lone row of llama is computed four times
    engine, gate = start(kind)
    with little_memory(engine.model, rows) as failed:
        answers = submit(engine, gate, 4, asked())
        gate.let(math.inf)
        assert texts(answers) == expected
        assert engine.status().halvings == len(failed) > 0
        assert engine.status().failures == 0
    with little_memory(engine.model, 0):
        text, end = read(engine.submit(prompt(5), options()))
    assert ("out of memory" in str(end.error), alone(kind, 5).startswith(text)) == (True, True)


@pytest.mark.parametrize(
    ("kind", "layer", "method"),
    [
        ("llama", labs_decode.SlotLayer, "resize"),
        ("llama", labs_decode.SlotLayer, "write"),
        ("mamba2", labs_states.StateLayer, "resize"),
    ],
)
def test_memory_that_runs_out_while_a_row_joins_loses_no_request(
    kind, layer, method, start, monkeypatch
):
    expected, calls = [alone(kind, n) for n in range(3)], itertools.count()
    original = getattr(layer, method)

    def in_one_call(*args: Any) -> Any:
        if next(calls) == 5:  # the second layer for the third row, when the first is done
            raise OOM
        return original(*args)

    monkeypatch.setattr(layer, method, in_one_call)
    engine, gate = start(kind)
    answers = submit(engine, gate, 3, asked())
    gate.let(math.inf)
    assert texts(answers) == expected
    assert next(calls) > 5


# ---------------------------------------------------------------- works


def work(engine: Any, parts: Any, inputs: Any = None, **more: Any) -> labs_engine.Answer:
    """Submit a computation that gives no text."""
    stream = engine.open(inputs or prompt(9), options(**more), "", ())
    return engine.take_in(stream, queue.SimpleQueue(), parts)


@pytest.mark.parametrize(
    ("kind", "cache"), [("llama", CACHE), ("mamba2", CACHE), ("bamba", None), ("rwkv", None)]
)
def test_a_choice_runs_between_steps_and_changes_no_text(kind, cache, start):
    words, prompts = ["a", "bc", "d" * 9, "efg"], [prompt(n, 40) for n in range(3)]
    engine, gate = start(kind, cache)
    gate.let(math.inf)
    expected = [labs_typed.choose(model_of(kind), each, words) for each in prompts]
    answers = [engine.submit(prompt(n), options()) for n in range(3)]
    choices = [labs_choose.Options(model_of(kind), each, words) for each in prompts]
    works = [
        work(engine, choice.parts, each, max_new_tokens=choice.columns)
        for choice, each in zip(choices, prompts, strict=True)
    ]
    assert reasons(works) == ["stop"] * 3
    assert [[*each.shares] for each in choices] == [[*each.values()] for each in expected]
    assert texts(answers) == [alone(kind, n) for n in range(3)]


def test_rows_are_stepped_between_the_parts_of_a_work(start):
    engine, gate = start()
    steps: list[int] = []

    def parts(row: Any, prefixes: Any) -> Iterator[None]:
        for _ in range(4):
            steps.append(len(gate.calls))
            time.sleep(0.02)
            yield

    answer = engine.submit(prompt(0), options(max_new_tokens=400))
    gate.until(3)
    assert reasons([work(engine, parts)]) == ["stop"]
    assert all(later > earlier for earlier, later in itertools.pairwise(steps))
    answer.close()


def test_a_work_that_was_closed_or_is_late_does_no_further_part(start):
    engine, _ = start()
    went, go, done = threading.Event(), threading.Event(), []

    def parts(row: Any, prefixes: Any) -> Iterator[None]:
        done.append("begun")
        went.set()
        assert go.wait(WAIT_S)
        yield
        done.append("went on")

    answers = [work(engine, parts)]
    assert went.wait(WAIT_S)
    answers += [work(engine, parts), work(engine, parts, timeout_s=0.001)]
    for answer in answers[:2]:
        answer.close()
    time.sleep(0.01)  # the third is late now
    go.set()
    assert reasons(answers[2:]) == ["timeout"]
    assert quiet(engine)
    assert done == ["begun"]


@pytest.mark.parametrize(
    ("error", "kind"), [(labs.InputError("no"), labs.InputError), (OOM, labs.GenerationError)]
)
def test_a_work_that_fails_is_reported_and_harms_no_row(error, kind, start):
    def parts(row: Any, prefixes: Any) -> Iterator[None]:
        yield
        raise error

    engine, _ = start()
    answer = engine.submit(prompt(0), asked())
    event = read(work(engine, parts))[1]
    assert isinstance(event, labs.Failed)
    assert isinstance(event.error, kind)
    assert read(answer)[0] == alone("llama", 0)
    assert engine.status().failures == 0


# ---------------------------------------------------------------- owners


def test_a_full_engine_has_a_place_for_an_owner_below_its_share(start):
    engine, gate = start(max_batch_rows=1, max_waiting=4)
    answers = submit(engine, gate, 5, owner="a")
    gate.until(1)
    for owner, count in (("b", 2), ("a", 0), ("b", 0), ("c", 1)):
        answers += [engine.submit(prompt(n), options(), owner=owner) for n in range(count)]
        with pytest.raises(labs_engine.Busy):
            engine.submit(prompt(0), options(), owner=owner)
    gate.let(math.inf)
    assert reasons(answers) == ["length"] * 8


def job_of(owner: str) -> labs_turns.Job:
    stream = labs.open_request(model_of("llama"), 0, prompt(0), options())
    stream.row.owner = owner
    return labs_turns.Job(stream, print)


def test_the_next_job_is_of_the_owner_with_the_fewest_running_then_of_the_longest_waiting():
    waiting, jobs = labs_turns.Waiting(9), list[labs_turns.Job]()
    for step in ("aaab abaa", "b b", "abcc ccba", "de de", "ed de"):
        owners, order = step.split()
        for owner in owners:
            jobs.append(job_of(owner))
            waiting.add(jobs[-1])
        begun = [waiting.begin(jobs, works=False) for _ in owners]
        assert "".join(job.owner for job in begun if job) == order


@pytest.mark.parametrize(("places", "keys"), [(1, 9), (7, 3), (5, 40)])
def test_no_more_jobs_wait_than_places_and_the_shares_of_latecomers(places, keys):
    waiting = labs_turns.Waiting(places)
    for owner in map(str, range(keys)):
        while len(waiting) < places or waiting.has_place(owner):
            waiting.add(job_of(owner))
    assert len(waiting) <= places + labs_turns.places_beyond(places, keys)


@pytest.fixture
def dies(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], Any]:
    monkeypatch.setattr(threading, "excepthook", lambda args: None)

    def leave(words: Any) -> None:
        raise SystemExit

    return leave


@pytest.mark.parametrize("cache", [None, CACHE])
def test_a_dead_thread_fails_all_answers_and_is_reported(cache, dies, start):
    engine, gate = start(cache=cache, max_batch_rows=1)
    gate.let(2)
    numbers = range(3) if cache is None else [0] * 3  # these share one computation
    answers = [engine.submit(prompt(n), asked()) for n in numbers]
    gate.until(3)
    gate.before = dies
    gate.let(math.inf)
    assert all(isinstance(read(answer)[1], labs.Failed) for answer in answers)
    inner(engine)._thread.join(WAIT_S)
    status = engine.status()
    assert (status.alive, status.running, status.waiting) == (False, 0, 0)
    with pytest.raises(labs_engine.Busy, match="stopped"):
        engine.submit(prompt(0), asked())


def test_a_request_that_arrives_while_the_thread_dies_does_not_hang(dies, start, monkeypatch):
    engine, gate = start()
    late, fail = list[Any](), engine._fail

    def then_ask(*args: Any) -> None:
        fail(*args)
        with contextlib.suppress(labs_engine.Busy):
            late.append(engine.submit(prompt(1), options()))

    monkeypatch.setattr(engine, "_fail", then_ask)
    gate.before = dies
    read(engine.submit(prompt(0), options()))
    engine._thread.join(WAIT_S)
    assert all(isinstance(read(answer, wait_s=1)[1], labs.Failed) for answer in late)


# ---------------------------------------------------------------- closing


def test_closing_lets_answers_end_until_the_deadline_and_may_be_repeated(start):
    engine, _ = start(max_batch_rows=1)
    answers = [engine.submit(prompt(n), asked()) for n in range(3)]
    assert [engine.close(WAIT_S), engine.close()] == [True, True]
    assert texts(answers) == [alone("llama", n) for n in range(3)]


def test_closing_cancels_late_rows_and_works_and_refuses_new_ones(start):
    engine, gate = start(max_batch_rows=1)

    def parts(row: Any, prefixes: Any) -> Iterator[None]:
        while True:
            yield

    gate.let(2)
    answers = [work(engine, parts), *(engine.submit(prompt(n), options()) for n in range(3))]
    gate.until(3)
    with ThreadPoolExecutor() as pool:
        closing = pool.submit(engine.close)
        kit.until(lambda: engine.status().closing)
        for ask in (lambda: work(engine, parts), lambda: engine.submit(prompt(1), options())):
            with pytest.raises(labs_engine.Busy, match="shutting down"):
                ask()
        gate.let(math.inf)
        assert not closing.result(WAIT_S)
    _, begun, *_ = ends = [read(answer)[1] for answer in answers]
    assert begun.finish_reason == "cancelled"
    assert begun.usage.completion_tokens
    refused = [end for end in ends if end is not begun]  # nothing of theirs was computed
    assert ["shutting down" in str(end.error) for end in refused] == [True] * 3
    assert {type(end.error) for end in refused} == {labs_engine.Busy}
    assert not engine._thread.is_alive()


# ---------------------------------------------------------------- reused prefixes

TURNS = (prompt(7, 30), labs.Inputs((*prompt(7, 30).input_ids, *prompt(8, 9).input_ids), ""))


@pytest.fixture
def chunks_of_eight(monkeypatch):
    monkeypatch.setattr(labs_decode, "CHUNK", 8)


def cached(engine: labs_engine.AnyEngine, turn: labs.Inputs, owner: str = "", **more: Any) -> int:
    done: labs.Done = read(engine.submit(turn, asked(**more), owner=owner))[1]
    return done.usage.cached_tokens


@pytest.mark.parametrize("seed", [None, 5])
def test_a_second_turn_computes_only_its_new_tokens(seed, start, chunks_of_eight):
    expected = [labs.generate(model_of("llama"), turn, asked(seed)).text for turn in TURNS]
    engine, gate = start()
    found = [read(engine.submit(turn, asked(seed))) for turn in TURNS]
    assert [text for text, _ in found] == expected
    assert [done.usage.cached_tokens for _, done in found] == [0, 24]
    computed = [len(row) for call in gate.calls for row in call if len(row) > 1]
    assert computed == [8, 8, 8, 6, 8, 7]


def test_prefixes_are_reused_by_their_owner_only_and_may_be_off(start, chunks_of_eight):
    engine, _ = start()
    found = [cached(engine, TURNS[0], owner) for owner in ("one", "two", "one", "two", "")]
    assert found == [0, 0, 24, 24, 0]
    engine, _ = start(prefix_cache_bytes=0)
    assert [cached(engine, turn) for turn in TURNS] == [0, 0]


def test_requests_that_arrive_together_wait_for_the_prefix_of_the_first(start, chunks_of_eight):
    engine, gate = start()
    gate.let(0)
    answers = [engine.submit(TURNS[n // 3], asked()) for n in range(4)]
    gate.let(math.inf)
    assert [read(answer)[1].usage.cached_tokens for answer in answers] == [0, 24, 24, 24]


def test_decoded_columns_serve_requests_whose_bits_need_not_match(chunks_of_eight):
    decoder = kit.prepare(kit.random_model("llama", vocab_size=262), batch_invariant=False)
    model = msgspec.structs.replace(model_of("llama"), decoder=decoder)
    with contextlib.closing(labs_engine.Cached(labs_engine.Engine(model), CACHE)) as engine:
        whole = len(TURNS[0].input_ids) + NEW - 1  # the last token of an answer is not written

        def stored() -> list[Any]:
            kept = engine.engine._loop.prefixes.kept
            return [each.ids for each in kept if len(each.ids) == whole]

        read(engine.submit(TURNS[0], options(temperature=1.0)))
        turn = labs.Inputs((*kit.until(stored)[0], 50, 51), "")
        chunks = (len(turn.input_ids) - 1) // 8 * 8  # the columns that the last one prefilled
        wanted = ({"temperature": 1.0}, {"temperature": 1.0, "seed": 1}, {"temperature": 0.0})
        ends = [read(engine.submit(turn, options(**each)))[1] for each in wanted]
        assert [end.usage.cached_tokens for end in ends] == [whole, 24, chunks]


@pytest.mark.parametrize("why", ["a row has no room", "memory runs out"])
def test_prefixes_are_evicted_when_a_row_or_memory_needs_room(
    why, start, chunks_of_eight, monkeypatch
):
    engine, gate = start()
    cached(engine, TURNS[0])
    kept, free = engine._loop.prefixes.kept, labs_loop.has_room
    assert kept
    if why == "memory runs out":
        once(gate, OOM)
        read(engine.submit(prompt(1), asked()))
    else:
        answer = held(engine, gate, 4, options(max_new_tokens=40))
        monkeypatch.setattr(labs_loop, "has_room", lambda *a: not kept and free(*a))
        second = engine.submit(prompt(1), asked())
        gate.let(math.inf)
        assert read(second)[0] == alone("llama", 1)
        read(answer)
    assert cached(engine, TURNS[1]) == 0


# ---------------------------------------------------------------- prompt lookup

GUESSING = options(temperature=0.0, prompt_lookup_num_tokens=4, max_new_tokens=40)


@pytest.fixture
def right(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let each guess be right; return the tokens."""
    wanted = labs.evolve(GUESSING, prompt_lookup_num_tokens=None, logprobs=0)
    found = labs.generate(model_of("llama"), prompt(0), wanted).logprobs
    tokens = [each.token for each in found]
    guess = lambda row: tokens[len(row.ids) - 6 : len(row.ids) - 2]  # noqa: E731
    monkeypatch.setattr(labs_calls, "prompt_lookup", guess)
    return tokens


def test_right_guesses_save_steps_of_a_lone_row_and_change_nothing(start, right):
    plain = labs.generate(model_of("llama"), prompt(0), GUESSING, prompt_lookup_num_tokens=None)
    engine, gate = start()
    gate.let(0)
    answers = [engine.submit(prompt(0), GUESSING) for _ in range(2)]
    gate.let(math.inf)
    assert texts(answers) == [plain.text] * 2
    assert {*gate.steps} == {2}
    gate.calls.clear()
    text, done = read(engine.submit(prompt(0), GUESSING))
    assert (text, done.finish_reason) == (plain.text, plain.finish_reason)
    assert done.usage.completion_tokens == 40
    assert len(gate.calls) <= 1 + 40 / 5 + 1


def test_guesses_after_the_end_of_a_text_are_dropped(right):
    model = model_of("llama")
    end = next(i for i in range(7, 40) if right[i] not in right[:i])
    ending = msgspec.structs.replace(model, eos_token_ids=frozenset({right[end]}))
    found = labs.generate(ending, prompt(0), GUESSING)
    assert (found.finish_reason, found.usage.completion_tokens) == ("stop", end + 1)
    text = labs.generate(model, prompt(0), GUESSING).text
    stopped = labs.generate(model, prompt(0), GUESSING, stop=(text[12:15],))
    assert (stopped.text, stopped.matched_stop) == (text[: text.index(text[12:15])], text[12:15])


@pytest.mark.parametrize("kind", ["mamba2", "bamba", "rwkv"])
def test_guesses_are_refused_for_models_that_cannot_take_them_back(kind, start):
    engine, gate = start(kind)
    with pytest.raises(labs.InputError, match=f"prompt_lookup_num_tokens: {kind}"):
        engine.submit(prompt(0), GUESSING)
    assert gate.calls == []


# ---------------------------------------------------------------- the cache of answers

SAMPLED = options(temperature=1.0)


MAY_DIFFER = [
    (None, {}, {}),
    (CACHE, {"owner": "one"}, {"owner": "two"}),
    (CACHE, *[{"generation": SAMPLED}] * 2),
    (CACHE, *[{"processors": (lambda ids, logits: logits,)}] * 2),
    (CACHE, {"generation": asked(new=NEW - 1)}, {"generation": asked(new=NEW + 1)}),
]


@pytest.mark.parametrize(("cache", "first", "second"), MAY_DIFFER)
def test_a_request_that_may_differ_is_computed_again(cache, first, second, start):
    engine, gate = start(cache=cache)
    for more in (first, second):
        _, done = read(engine.submit(prompt(0), **{"generation": asked()} | more))
        assert not done.usage.response_cached
    assert len(gate.calls) == 2 * NEW


@pytest.mark.parametrize(("kind", "seed"), [("llama", None), ("llama", 3), ("rwkv", 3)])
def test_the_same_request_is_answered_without_a_forward_call(kind, seed, start):
    engine, gate = start(kind, CACHE)
    wanted = labs.evolve(asked(seed), logprobs=2)
    first, second = ([*engine.submit(prompt(0), wanted)] for _ in range(2))
    assert len(gate.calls) == NEW
    assert second[:-1] == first[:-1]
    assert labs.fold(second[:-1], second[-1]).text == alone(kind, 0, seed=seed)
    assert [end.usage.response_cached for end in (first[-1], second[-1])] == [False, True]
    assert engine.status().response_cache_hits == 1


def test_cached_answers_expire_and_are_bounded_in_number(start, monkeypatch):
    now = [0]

    class Timed(cachetools.TTLCache):
        def __init__(self, *limits: Any) -> None:
            super().__init__(*limits, timer=lambda: now[0])

    monkeypatch.setattr(cachetools, "TTLCache", Timed)
    engine, gate = start(cache=labs.ResponseCache(max_entries=2, ttl_s=100))
    each = [(0, 0, 1), (99, 0, 1), (101, 0, 2), (101, 1, 3), (101, 2, 4), (101, 2, 4), (101, 0, 5)]
    for now[0], number, computed in each:
        read(engine.submit(prompt(number), asked()))
        assert len(gate.calls) == computed * NEW
    assert len(engine._response_cache) == 2


@pytest.mark.parametrize("leader_closes", [False, True])
def test_identical_running_requests_are_computed_once(leader_closes, start):
    engine, gate = start(cache=CACHE)
    leader = held(engine, gate, 6, asked())
    follower = engine.submit(prompt(0), asked())
    if leader_closes:
        leader.close()
    gate.let(math.inf)
    *deltas, done = follower
    assert labs.fold(deltas, done).text == alone("llama", 0)
    if not leader_closes:
        *first, end = leader
        assert first == deltas
        assert (end.usage.response_cached, done.usage.response_cached) == (False, True)
    assert len(gate.calls) == NEW


def test_a_computation_that_all_its_listeners_left_is_cancelled_and_not_kept(start):
    engine, gate = start(cache=CACHE)
    answers = [held(engine, gate, 3, asked()), engine.submit(prompt(0), asked())]
    for answer in answers:
        answer.close()
    gate.let(math.inf)
    assert quiet(engine)
    assert (len(gate.calls), len(engine._response_cache)) == (4, 0)
    assert not read(engine.submit(prompt(0), asked()))[1].usage.response_cached


@pytest.mark.parametrize("fault", ["late", "failed"])
def test_an_answer_that_is_late_or_failed_is_not_kept_nor_a_deadline_shared(fault, start):
    engine, gate = start(cache=CACHE)
    wanted = labs.evolve(asked(), timeout_s=500)
    answer = held(engine, gate, 3, wanted)
    if fault == "late":
        age(engine)
    else:
        gate.after = lambda words, output: output.logits.fill_(math.nan)
    gate.let(1)
    end = read(answer)[1]
    assert isinstance(end, labs.Failed) or end.finish_reason == "timeout"
    gate.after = lambda words, output: None
    answers = [engine.submit(prompt(0), wanted) for _ in range(2)]
    gate.let(math.inf)
    for text, done in map(read, answers):
        assert (text, done.usage.response_cached) == (alone("llama", 0), False)
    assert read(engine.submit(prompt(0), wanted))[1].usage.response_cached


def test_there_is_room_again_at_once_when_all_listeners_of_a_computation_left(start):
    engine, gate = start(cache=CACHE, max_batch_rows=1, max_waiting=1)
    first = held(engine, gate, 0, asked())
    answers = [engine.submit(prompt(1), asked()) for _ in range(3)]
    with pytest.raises(labs_engine.Busy, match="2 requests"):
        engine.submit(prompt(2), asked())
    for answer in answers:
        answer.close()
    answers = [engine.submit(prompt(1), asked()) for _ in range(2)]
    gate.let(math.inf)
    assert texts([first, *answers]) == [alone("llama", n) for n in (0, 1, 1)]
    assert engine.status().response_cache_hits == 3


def test_a_cached_answer_is_given_by_a_full_engine_and_after_its_end(start):
    engine, gate = start(cache=CACHE, max_batch_rows=1, max_waiting=0)
    read(engine.submit(prompt(1), asked()))
    first = held(engine, gate, 1, asked())
    assert read(engine.submit(prompt(1), asked()))[0] == alone("llama", 1)
    gate.let(math.inf)
    read(first)
    engine.close()
    assert read(engine.submit(prompt(1), asked()))[0] == alone("llama", 1)


def ask_at_random(engine: labs_engine.AnyEngine, number: int) -> int:
    """Behave as one of many clients; return how many texts were read to their end."""
    chance, whole = random.Random(number), 0
    for _ in range(3):
        which, seed = chance.randrange(6), chance.choice([None, 7])
        kind, wanted = chance.choice(["read", "read", "close", "forget", "late"]), asked(seed)
        if kind == "late":
            wanted = labs.evolve(wanted, timeout_s=chance.choice([0.001, 0.02, 0.1]))
        try:
            answer = engine.submit(prompt(which), wanted, owner=str(number % 3))
        except labs_engine.Busy:
            continue
        if kind in ("close", "forget"):
            for _ in range(chance.randrange(4)):
                answer.get(WAIT_S)
            if kind == "close":
                answer.close()
            continue
        text, done = read(answer)
        expected = alone("llama", which, seed=seed)
        assert text == expected or done.finish_reason == "timeout"
        assert expected.startswith(text.rstrip("\ufffd"))
        whole += done.finish_reason != "timeout"
    return whole


@pytest.mark.parametrize("cache", [labs.ResponseCache(), CACHE])
def test_many_threads_get_their_own_texts_and_leave_nothing_behind(cache, start):
    for which, seed in itertools.product(range(6), (None, 7)):
        alone("llama", which, seed=seed)
    engine, _ = start(cache=cache, max_batch_rows=4, max_waiting=24)
    with ThreadPoolExecutor(40) as pool:
        counts = [*pool.map(functools.partial(ask_at_random, engine), range(40))]
    assert sum(counts) > 0
    assert quiet(engine)
    status = engine.status()
    assert (status.alive, status.failures, status.halvings) == (True, 0, 0)


def test_an_idle_engine_ends_its_thread_and_the_next_request_starts_another(start, monkeypatch):
    monkeypatch.setattr(labs_engine, "REST_S", 0.05)
    engine, gate = start()
    gate.let(math.inf)
    first, texts = inner(engine)._thread, set()
    for _ in range(3):
        texts.add(read(engine.submit(prompt(1), options()))[0])
        kit.until(lambda: not inner(engine)._thread.is_alive())
        assert engine.status().alive
    assert texts == {alone("llama", 1)}
    assert inner(engine)._thread is not first


LEFT_OPEN = """
import sys, threading, labs, labs_engine
model = labs.load_model(labs.ModelSpec(model_name=sys.argv[1]))
engine = labs_engine.Engine(model)
inputs = labs.Inputs(tuple(range(5, 25)), "")
answers = [engine.submit(inputs, labs.Generation(max_new_tokens=400)) for _ in range(4)]
next(answers[0])
print("left open")
"""


def test_a_script_that_leaves_its_engine_open_ends_in_peace(tiny_folder):
    command = [sys.executable, "-c", LEFT_OPEN, str(tiny_folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S, cwd=kit.ROOT)
    assert (done.returncode, done.stdout, done.stderr) == (0, "left open\n", "")
