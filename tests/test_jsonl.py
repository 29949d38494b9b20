# SPDX-License-Identifier: Apache-2.0
"""Tests of labs_jsonl.py: lines, files that are continued, and replay."""

from __future__ import annotations

import dataclasses
import functools
import io
import itertools
import json
import os
import random
import re
import resource
import sys
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import kit
import msgspec
import openai.types
import pytest
from kit import CHAT, COMPLETIONS, answers, invoke, line, openai_line, replayed, whole

import labs
import labs_bar
import labs_jsonl
import labs_progress
import labs_protocol
import labs_replay
import labs_request

CONFIG = kit.SHORT_LINES
CONTEXT = labs_request.open_context(CONFIG)
HELLO = [{"role": "user", "content": "hello"}]
ONLY_A = kit.A  # lets any model say "aaa..."
NO_END: dict[str, Any] = {"logit_bias": {"258": -100}}
SAMPLED = {"temperature": 1.5}
MARK = b"\xef\xbb\xbf"
gen = functools.partial(invoke, "--model", "tiny", "--max-new-tokens", "6")
again = functools.partial(invoke, "replay", "--model", "tiny")


# ---------------------------------------------------------------- helpers


def written(name: str, rows: Iterable[Any]) -> str:
    Path(name).write_bytes(b"".join(data for _, data in kit.numbered(rows)))
    return name


def answer(model: labs.Model, row: Any, config: labs.Config = CONFIG) -> dict[str, Any]:
    (found,) = answers(model, [row], config)
    return found


def name_of(row: dict[str, Any]) -> Any:
    return row.get("custom_id", row["id"])


def rows_in(name: str) -> list[dict[str, Any]]:
    with open(name, "rb") as file:
        return [whole(data) for data in file]


def names_in(name: str) -> list[Any]:
    return [name_of(row) for row in rows_in(name)]


def by_name(rows: Iterable[dict[str, Any]]) -> dict[Any, dict[str, Any]]:
    """Return answers by id; each id has to be there once."""
    rows = list(rows)
    found = {name_of(row): row for row in rows}
    assert len(found) == len(rows)
    return found


def run(model: labs.Model, source: str, target: str) -> labs_jsonl.Tally:
    tally = labs_jsonl.Tally()
    answer = lambda lines: labs_jsonl.answer_lines(model, CONTEXT, lines, tally)  # noqa: E731
    labs_jsonl.answer_file(answer, source, target, tally)
    return tally


def counts(tally: labs_jsonl.Tally) -> tuple[int, int, int]:
    return tally.done, tally.failed, tally.skipped


def generated(model: labs.Model, inputs: labs.Inputs, options: Any) -> labs.Completion:
    return labs.generate(model, inputs, labs.evolve(CONFIG.generation, **options))


def text_of(choice: dict[str, Any]) -> str:
    return choice["text"] if "text" in choice else choice["message"]["content"]


def message_of(row: dict[str, Any]) -> str:
    error = row["error"] or row["response"]["body"]["error"]
    assert kit.is_one_sentence(Exception(error["message"]))
    return str(error["message"])


def prompts(count: int, **settings: Any) -> list[dict[str, Any]]:
    """Make lines of all lengths."""
    chance = random.Random(count)
    lengths = [chance.randrange(1, 40) for _ in range(count)]
    return [{"id": f"p{n}", "prompt": "x" * m + str(n), **settings} for n, m in enumerate(lengths)]


@pytest.fixture
def loaded(tiny, monkeypatch):
    """Let labs-gen, run in this process, have the tiny model."""
    monkeypatch.setattr(labs, "load_model", lambda config: tiny)
    for name in [name for name in os.environ if name.startswith("LABS_")]:
        monkeypatch.delenv(name)
    return tiny


# ---------------------------------------------------------------- plain lines


ROWS: list[dict[str, Any]] = [
    {"prompt": "one"},
    {"prompt": "two", "max_new_tokens": 3},
    {"prompt": "three", "seed": 5, "temperature": 1.5},
    {"prompt": "four", "seed": 5, "temperature": 1.5, "top_k": 3, "top_p": 0.9, "min_p": 0.01},
    {"prompt": "five", **ONLY_A, "stop": ["aaa"]},
    {"prompt": "six", "repetition_penalty": 1.3, "frequency_penalty": 1, "presence_penalty": 1},
    {"prompt": "seven", "logprobs": 2},
    {"prompt": "eight", "use_chat_template": False},
    {"prompt": "nine", "add_generation_prompt": False},
    {"messages": HELLO},
    {"messages": [{"role": "system", "content": "S"}, *HELLO], "max_new_tokens": 20},
    {"prompt": "Grüße 漢字 🌍 \u2028 \\ud800", "prompt_lookup_num_tokens": 4},
]


@pytest.mark.parametrize("rows", [None, 3])
def test_each_line_is_answered_as_generate_answers_it_alone(tiny, rows):
    lines = [{"id": n, **row} for n, row in enumerate(ROWS)]
    found = by_name(answers(tiny, lines, rows=rows))
    asked = {"prompt", "messages", *labs.Chat.__struct_fields__}
    for number, row in enumerate(ROWS):
        inputs = labs.build_inputs(tiny, **{k: v for k, v in row.items() if k in asked})
        expected = generated(tiny, inputs, {k: v for k, v in row.items() if k not in asked})
        same = ("text", "finish_reason", "seed", "matched_stop")
        assert all(found[number][name] == getattr(expected, name) for name in same), row
        tokens = [each["token"] for each in found[number]["logprobs"]]
        assert tokens == kit.tokens_of(expected)
        assert found[number]["usage"]["completion_tokens"] == expected.usage.completion_tokens
        assert found[number]["model"] == "tiny"


def test_an_id_stays_as_it_is_and_a_line_without_one_has_its_number(tiny):
    names: list[Any] = ["", "a b\nc", "é\u2028", "7", 7, -1, 2**63, 10**25]
    rows = [{"id": name, "prompt": "one", "max_new_tokens": 1} for name in (*names, None)]
    found = [name_of(row) for row in answers(tiny, [*rows, {"prompt": "2"}], ordered=True)]
    assert found == [*names, 9, 10]
    assert [type(name) for name in found] == [type(name) for name in [*names, 9, 10]]


PADDED = b'\r\n{"prompt": "one"}\r\n \t\r\n  {"prompt": "two"}  \r\n\r\n{"prompt": "3"}'
LINES: list[tuple[bytes, list[Any]]] = [(b"\n\n", []), (PADDED, [2, 4, 6])]
LINES += [(b'{"id": "a", "prompt": "one"}\r\n{"id": "b", "prompt": "two"}', ["a", "b"])]


@pytest.mark.parametrize(("data", "names"), [*LINES, (MARK + b'\n{"prompt": "one"}\n', [2])])
def test_blank_lines_are_skipped_but_counted(tiny, data, names):
    Path("in").write_bytes(data)
    assert counts(run(tiny, "in", "out")) == (len(names), 0, 0)
    assert sorted(names_in("out")) == names


def test_null_in_a_line_is_what_the_model_recommends_and_not_the_configured_value(tiny):
    config = labs.Config(model_id="tiny", generation=labs.Generation(seed=4, temperature=2.0))
    row = answer(tiny, {"prompt": "one", "temperature": None, "max_new_tokens": 3}, config)
    assert row["fingerprint"]["generation"]["temperature"] == 0


# ---------------------------------------------------------------- bad lines


BAD: list[tuple[Any, str]] = [
    (b"no JSON\n", 'not a JSON object, as {"prompt": "Hi"} is'),
    (b'{"prompt": no}\n', "JSON is malformed"),
    (b"[1, 2]\n", "not a JSON object"),
    (b'{"id": "torn", "prompt": "on\n', "cannot be used"),
    (b'{"a":' * 100_000 + b"\n", "cannot be used"),
    ({"prompt": "hi", "max_tokenz": 3}, "`max_tokenz`"),
    ({"prompt": "hi", "max_new_tokens": None}, "`$.max_new_tokens`"),
    ({"prompt": "hi", "logit_bias": {"999": 1}}, "token 999"),
    ({"prompt": "x" * 5000}, "5004 tokens"),
    ({"prompt": "hi", "model": "gpt-9"}, "'gpt-9'"),
    (openai_line("", functions=[{"name": "f"}]), "functions"),
    (openai_line("", stream=True), "stream"),
    (openai_line("", stream_options={"include_usage": True}), "stream"),
    (openai_line("", "/v1/audio", input="x"), "/v1/audio"),
    (openai_line("", "/v1/embeddings", input="x"), "no model of the kind embedding"),
    (openai_line("", method="GET"), "GET"),
    (openai_line("", n=129), "`$.n`"),
    (openai_line("", model="gpt-9"), "'gpt-9'"),
    (openai_line("", messages=[{**HELLO[0], "content": "x" * 5000}]), "maximum context length"),
    (openai_line("", COMPLETIONS, prompt=["one", ""]), "empty"),
    ({"custom_id": "", "url": CHAT, "body": {}}, "`method`"),
    ({**openai_line(""), "extra": 1}, "`extra`"),
    ({**openai_line(""), "body": 5}, "`object`"),
]


def good(number: int) -> dict[str, Any]:
    return {"id": f"good {number}", "prompt": f"one {number}", "max_new_tokens": 1 + number % 3}


@pytest.mark.parametrize("ordered", [True, False])
def test_a_bad_line_gets_an_error_row_in_its_format_and_stops_nothing(tiny, ordered):
    rows, names, tally = [], [], labs_jsonl.Tally()
    for number, (bad, _) in enumerate(BAD):
        name = f"line {2 * number + 2}" if isinstance(bad, bytes) else f"bad {number}"
        if isinstance(bad, dict):
            bad = {**bad, "custom_id" if "custom_id" in bad else "id": name}
        rows += [good(number), bad]
        names += [f"good {number}", name]
    found = answers(tiny, rows, ordered=ordered, rows=4, tally=tally)
    assert counts(tally) == (len(BAD), len(BAD), 0)
    order = [name_of(row) for row in found]
    assert order == names if ordered else sorted(order) == sorted(names)
    for (bad, text), name in zip(BAD, names[1::2], strict=True):
        row = by_name(found)[name]
        assert text in message_of(row), bad
        if "custom_id" not in row:
            assert row.keys() == {"id", "error"}
            assert row["error"]["type"] == "invalid_request"
            continue
        assert (row["response"]["status_code"], row["error"]) == (400, None)
        error = row["response"]["body"]["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        assert error["type"] == "invalid_request_error"
        assert text != "tools" or (error["param"], error["code"]) == ("tools", "unsupported")
    assert all("text" in row for row in found if "good" in name_of(row))


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"\\ud83d", r"a lone surrogate, which is half a character: \ud83d"),
        (b"\\udc00\\ud800", r"a lone surrogate, which is half a character: \udc00"),
        (b"ab\xfe", "can't decode byte 0xfe in position 13"),
        (b"a\x00", "Invalid control character at: line 1 column 13"),
    ],
)
def test_bytes_that_are_not_text_are_named_with_their_place(tiny, data, text):
    assert text in message_of(answer(tiny, b'{"prompt":"%s"}\n' % data))
    with pytest.raises(labs_request.Refusal, match=re.escape(text)):
        labs_protocol.read(b'{"prompt":"%s"}' % data, labs_request.GenerateRequest)


def small(**server: int) -> labs.Config:
    return msgspec.structs.replace(CONFIG, server=labs.Server(**server))  # type: ignore[arg-type]


def test_a_prompt_that_is_too_long_for_a_request_is_an_error_row(tiny):
    talk = [{"role": "user", "content": "a" * 51}] * 2
    rows = [{"prompt": "e" * 100}, {"prompt": "é" * 51}, {"messages": talk}]
    fits, *more = answers(tiny, rows, small(max_prompt_bytes=100), ordered=True)
    assert ["server_max_prompt_bytes = 100" in message_of(row) for row in more] == [True, True]
    assert "text" in fits


@pytest.mark.parametrize("end", [b"\n" + line({"id": "next", "prompt": "one"}), b"\n", b""])
def test_little_of_a_line_that_is_too_long_is_read(tiny, end, monkeypatch):
    class Narrow(io.BytesIO):
        most = 0

        def readline(self, size=-1, /):
            data = super().readline(size)
            self.most = max(self.most, len(data))
            return data

    file = Narrow(line({"id": "first", "prompt": "one"}) + line({"prompt": "a" * 10**6})[:-1] + end)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(file))
    with labs_jsonl.opened("-", 2000) as lines:
        found = by_name(answers(tiny, lines, small(max_body_bytes=2000)))
    assert {*found} - {"next"} == {"first", "line 2"}
    assert ("next" in found) == (len(end) > 1)
    assert "more than server_max_body_bytes = 2000 bytes" in message_of(found["line 2"])
    assert 2000 < file.most < 3000


def test_a_line_with_a_used_or_unreadable_id_is_named_by_its_number(tiny):
    rows = [{"id": name, "prompt": "one", "max_new_tokens": 1} for name in ("a", "a", 5, 6)]
    rows[2:2] = [openai_line("a"), b"{broken\n", {"id": [4], "prompt": "one"}]
    found = by_name(answers(tiny, rows))
    assert all("text" in found[name] for name in ("a", 5, 6))
    told = {2: "has the id 'a' too", 3: "has the id 'a' too", 4: "malformed", 5: "`$.id`"}
    assert all(text in message_of(found[f"line {n}"]) for n, text in told.items())


def test_an_error_of_the_computation_is_not_called_a_bad_request(tiny, monkeypatch):
    true = labs.open_request

    def opened(model: Any, index: int, inputs: labs.Inputs, options: Any, only: Any) -> Any:
        if "fail" in inputs.prompt:
            raise labs.GenerationError("out of memory: fewer tokens")
        return true(model, index, inputs, options, only)

    monkeypatch.setattr(labs, "open_request", opened)
    failing = {"prompt": ["a", "fail"], "max_tokens": 2}
    rows = [{"id": 1, "prompt": "fail"}, openai_line("b", COMPLETIONS, **failing), good(0)]
    found = by_name(answers(tiny, rows))
    assert found[1]["error"] == {"type": "failed", "message": "out of memory: fewer tokens"}
    assert found["b"]["response"]["status_code"] == 500
    assert found["b"]["response"]["body"]["error"]["type"] == "server_error"
    assert found["good 0"]["finish_reason"] == "length"


# ---------------------------------------------------------------- OpenAI's lines


def test_a_completions_line_has_n_choices_of_each_prompt(tiny):
    body = {"prompt": ["one", "two"], "n": 2, "max_tokens": 4, "seed": 9, **SAMPLED}
    row = answer(tiny, openai_line("a", COMPLETIONS, **body))
    assert (row["custom_id"], row["error"], row["response"]["status_code"]) == ("a", None, 200)
    assert row["id"] == f"batch_req_{row['response']['request_id']}"
    parsed = openai.types.Completion.model_validate(row["response"]["body"], strict=True)
    lines = [
        {"prompt": text, "use_chat_template": False, "max_new_tokens": 4, "seed": seed, **SAMPLED}
        for text, seed in itertools.product(["one", "two"], [9, 10])
    ]
    expected = [each["text"] for each in answers(tiny, lines, ordered=True)]
    assert [(choice.index, choice.text) for choice in parsed.choices] == [*enumerate(expected)]


def test_choices_without_a_seed_differ(tiny):
    wild = {"n": 4, "max_tokens": 12, "temperature": 20, **NO_END}
    more = openai_line("b", COMPLETIONS, prompt=["one", "one"], **{**wild, "n": 2})
    found = answers(tiny, [openai_line("a", **wild), openai_line("c", **wild), more], ordered=True)
    shown = [[text_of(c) for c in row["response"]["body"]["choices"]] for row in found]
    assert [len({*each}) for each in shown] == [4, 4, 4]
    assert shown[0] != shown[1]


# ---------------------------------------------------------------- files that are continued


def test_a_second_run_answers_only_the_lines_that_have_no_answer(tiny):
    rows = [*prompts(6), openai_line("chat"), {"prompt": "without id"}, b"broken\n", prompts(1)[0]]
    assert counts(run(tiny, written("in", rows[:4]), "out")) == (4, 0, 0)
    before = Path("out").read_bytes()
    assert counts(run(tiny, written("in", rows), "out")) == (4, 2, 4)
    after = Path("out").read_bytes()
    assert after.startswith(before)
    again = run(tiny, "in", "out")
    assert counts(again) == (0, 0, 10)
    assert "10 before (2 of them failed)" in str(again)
    assert Path("out").read_bytes() == after
    names = [*(f"p{n}" for n in range(6)), "chat", 8, "line 9", "line 10"]
    assert sorted(names_in("out"), key=str) == sorted(names, key=str)
    run(tiny, written("two", [{"id": "other", "prompt": "x"}]), "out")
    assert names_in("out")[10:] == ["other"]


def test_a_file_of_answers_that_was_cut_anywhere_is_repaired(tiny):
    rows = [*prompts(1, max_new_tokens=1), openai_line("c", max_tokens=1), b"broken\n"]
    run(tiny, written("in", rows), "whole")
    data = Path("whole").read_bytes()
    names = names_in("whole")
    ends = [at + 1 for at in range(len(data)) if data[at : at + 1] == b"\n"]
    near = {end + step for end in ends for step in range(-3, 9)} & {*range(len(data))}
    for cut in sorted(near | {*range(0, len(data), 307)}):
        Path("out").write_bytes(data[:cut])
        tally = run(tiny, "in", "out")
        kept = sum(end <= cut + 1 for end in ends)  # a line may lack its newline only
        assert counts(tally)[2] == kept, cut
        assert Path("out").read_bytes().startswith(data[: ends[kept - 1] if kept else 0])
        assert sorted(names_in("out"), key=str) == sorted(names, key=str), cut


FOREIGN = [
    b"a text without a newline",
    b'{"id":1,"name":"Ada"}',
    b'{"id": "a", "prompt": "one"}\n{"id": "b", "prompt": "two"}',
    b'{"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {}}\n',
    b'{\n  "id": 1\n}\n',
    b'{"id":1,"text":"of a data set"}\n',
    b"\xff\xfe{\0",
]


@pytest.mark.parametrize("data", FOREIGN)
def test_a_file_that_holds_other_lines_is_left_as_it_is(tiny, data):
    run(tiny, written("in", prompts(1)), "out")
    for before in (b"", Path("out").read_bytes()):
        Path("out").write_bytes(before + data)
        place = rf"out: line {2 if before else 1} is not an answer of labs-gen"
        with pytest.raises(labs.LabsError, match=place) as caught:
            run(tiny, "in", "out")
        assert kit.is_one_sentence(caught.value)
        assert Path("out").read_bytes() == before + data


UNUSABLE = {
    "batch missing out": "missing: No such file or directory",
    "replay missing": "missing: No such file or directory",
    "replay /dev/null": "/dev/null: holds no answers",
    "batch in no/out": "no/out: No such file or directory",
    "batch in folder": "folder: Is a directory",
    "batch in /dev/full": "/dev/full: No space left on device",
    "batch in locked": "locked is being written by another process",
    "batch in ./in": "./in cannot be both read and written",
    "batch in hard": "hard cannot be both read and written",
    "batch in soft": "soft cannot be both read and written",
}


@pytest.mark.parametrize(("words", "text"), UNUSABLE.items())
def test_a_file_that_cannot_be_used_is_one_sentence(loaded, words, text):
    data = Path(written("in", prompts(1))).read_bytes()
    os.link("in", "hard")
    os.symlink("in", "soft")
    os.mkdir("folder")
    with open("locked", "ab") as file:
        labs_jsonl._lock(file.fileno(), "locked")
        done = invoke(*words.split(), "--model", "tiny")
    assert (done.exit_code, done.stderr.splitlines()[-1]) == (1, f"Error: {text}")
    assert (Path("in").read_bytes(), Path("out").exists()) == (data, False)


def test_a_model_that_does_not_load_costs_no_answers(loaded, monkeypatch):
    def missing(config: labs.Config) -> labs.Model:
        raise labs.ModelError("nobody/nothing is not there")

    written("in", prompts(2))
    with monkeypatch.context() as patch:
        patch.setattr(labs, "load_model", missing)
        done = gen("batch", "in", "out")
    assert (done.exit_code, done.stderr) == (1, "Error: nobody/nothing is not there\n")
    assert Path("out").read_bytes() == b""
    assert gen("batch", "in", "out").exit_code == 0
    assert len(names_in("out")) == 2


def test_a_disk_that_fills_up_leaves_a_line_that_the_next_run_repairs(tiny):
    most, limits = 5000, resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, limits[1]))
    try:
        with pytest.raises(labs.LabsError, match="out: File too large"):
            run(tiny, written("in", prompts(8)), "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    data = Path("out").read_bytes()
    assert (len(data), data.endswith(b"\n")) == (most, False)
    run(tiny, "in", "out")
    assert sorted(names_in("out")) == [f"p{n}" for n in range(8)]


@pytest.mark.parametrize(("terminal", "asked"), [(True, True), (True, False), (False, True)])
def test_an_input_may_be_a_named_pipe_and_a_terminal_shows_a_bar(
    tiny, monkeypatch, terminal, asked
):
    stderr = io.StringIO()
    monkeypatch.setattr(stderr, "isatty", lambda: terminal)
    monkeypatch.setattr(labs_progress, "_asked", [True] * asked)
    monkeypatch.setattr(labs_bar, "DELAY_S", 0.0)
    monkeypatch.setattr(sys, "stderr", stderr)
    os.mkfifo("pipe")
    data = MARK + b"".join(map(line, prompts(3)))
    writer = threading.Thread(target=Path("pipe").write_bytes, args=(data,))
    writer.start()
    assert counts(run(tiny, "pipe", "out")) == (3, 0, 0)
    writer.join()
    run(tiny, written("in", [*prompts(4), b"\n"]), "out")
    assert ("/4 lines" in stderr.getvalue()) == (terminal and asked)
    assert bool(stderr.getvalue()) == (terminal and asked)


# ---------------------------------------------------------------- runs that are cut short


def long_lines(count: int) -> list[dict[str, Any]]:
    """Make lines whose answers end one after the other."""
    rows = prompts(count, **NO_END)
    return [{**row, "max_new_tokens": 5 + 7 * n % 20} for n, row in enumerate(rows)]


def test_a_kill_loses_and_doubles_nothing(tiny, tiny_folder):
    words = ["--model", str(tiny_folder), "--torch-dtype", "fp32", "--batch-rows", "4"]
    rows = long_lines(150)
    process = kit.start(*words, "batch", written("in", rows), "out", stderr=-3)
    kit.until(lambda: Path("out").exists() and Path("out").stat().st_size > 5000)
    process.kill()
    assert process.wait(kit.WAIT_S) == -9
    kept = Path("out").read_bytes()
    assert 3 < kept.count(b"\n") < 150
    run(tiny, "in", "out")
    assert Path("out").read_bytes().startswith(kept[: kept.rindex(b"\n") + 1])
    found = by_name(rows_in("out"))
    assert sorted(found) == sorted(row["id"] for row in rows)
    for row in rows[::30]:
        inputs = labs.build_inputs(tiny, prompt=row["prompt"])
        options = {"max_new_tokens": row["max_new_tokens"], "logit_bias": {258: -100}}
        assert found[row["id"]]["text"] == generated(tiny, inputs, options).text


def test_ctrl_c_keeps_the_answers_and_the_same_command_continues(loaded):
    def hook(words: Any, output: Any) -> None:
        if Path("out").stat().st_size:
            raise KeyboardInterrupt

    words = ("batch", written("in", long_lines(12)), "out", "--batch-rows", "4")
    with kit.hooked(loaded, hook):
        done = gen(*words)
    before = len(names_in("out"))
    assert (done.exit_code, 0 < before < 12) == (130, True)
    assert done.stderr.startswith(f"[{before} answered, 0 failed; ")
    assert f"[{12 - before} answered, {before} before, 0 failed" in gen(*words).stderr
    assert sorted(names_in("out")) == sorted(f"p{n}" for n in range(12))


FULL = "Error: standard output: No space left on device\n"


@pytest.mark.parametrize(("full", "told"), [(False, "[1 answered, 0 failed; "), (True, FULL)])
def test_a_closed_pipe_ends_a_file_quietly_and_a_full_disk_is_named(
    loaded, monkeypatch, capsys, full, told
):
    reading, writing = os.pipe()
    os.close(reading)
    written("in", [*prompts(3, max_new_tokens=2), b"broken\n"])
    file = open("/dev/full" if full else writing, "wb", buffering=0)  # noqa: SIM115
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(file, write_through=True))
    with kit.unfrozen(), pytest.raises(SystemExit) as end:
        kit.gen().main(["--model", "tiny", "batch", "in", "--ordered"])
    assert (end.value.code, told in capsys.readouterr().err) == (full, True)


@pytest.mark.parametrize("words", [["-"], []])
def test_the_command_reads_and_writes_pipes(loaded, words):
    data = MARK + b"".join(map(line, [*prompts(3), "no line"]))
    settings = ("--temperature", "1.5", "--seed", "3")
    done = gen("batch", "-", *words, "--ordered", *settings, input=data)
    found = [whole(each) for each in done.stdout_bytes.splitlines(keepends=True)]
    assert [row["id"] for row in found] == ["p0", "p1", "p2", "line 4"]
    assert done.stderr.startswith("[3 answered, 1 failed; ")
    assert done.exit_code == 1  # as a line failed
    inputs = labs.build_inputs(loaded, prompt=prompts(3)[0]["prompt"])
    assert found[0]["text"] == generated(loaded, inputs, {"seed": 3, "temperature": 1.5}).text


# ---------------------------------------------------------------- lazy


class Source:
    """Lines; counts those that were read."""

    def __init__(self, rows: Iterable[Any]) -> None:
        self.read, self.rows = 0, rows

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        for number, data in kit.numbered(self.rows):
            self.read = number
            yield number, data


def answering(model: labs.Model, source: Source, ordered: bool) -> Iterator[bytes]:
    batching = labs_jsonl.Batching(rows=3, ordered=ordered)
    return labs_jsonl.answer_lines(model, CONTEXT, source, labs_jsonl.Tally(), batching)


@pytest.mark.parametrize("ordered", [True, False])
def test_lines_are_read_as_they_are_needed(tiny, monkeypatch, ordered):
    monkeypatch.setattr(labs_jsonl, "WINDOW", 4)
    rows = ({"prompt": "x" * (n % 9 + 1), "max_new_tokens": 1 + n % 5} for n in range(2000))
    source = Source(rows)
    for number, _ in enumerate(itertools.islice(answering(tiny, source, ordered), 60), 1):
        assert source.read <= number + 3 + 2 * 4
    assert source.read > 60


def test_few_lines_are_read_while_a_long_answer_is_awaited(tiny, monkeypatch):
    monkeypatch.setattr(labs_jsonl, "WINDOW", 4)
    rows = [{"prompt": "long", "max_new_tokens": 60, **NO_END}]
    rows += [{"prompt": "x", "max_new_tokens": 2, **NO_END} for _ in range(80)]
    rows[50] = {"prompt": ""}  # a line that is done before it is begun
    source = Source(rows)
    found = answering(tiny, source, True)
    first = whole(next(found))
    assert (first["id"], first["usage"]["completion_tokens"]) == (1, 60)
    assert 4 * 4 < source.read <= 6 * 4
    assert [whole(data)["id"] for data in found] == [*range(2, 82)]


ONE = {"prompt": "x", "max_new_tokens": 1}


@pytest.mark.parametrize("rows", [[ONE] * 60, [b"broken\n"] * 40 + [ONE] + [b"broken\n"] * 40])
def test_lines_that_leave_no_row_when_a_chunk_is_full_hold_nothing_up(tiny, monkeypatch, rows):
    monkeypatch.setattr(labs_jsonl, "WINDOW", 2)
    assert len(answers(tiny, rows, rows=3, ordered=True)) == len(rows)


# ---------------------------------------------------------------- replay


def verdict(model: labs.Model, row: Any) -> labs_replay.Verdict:
    (found,) = replayed(model, [row])
    return found


SAME = labs_replay.Verdict("a", "same")
REPEATED = [
    {"id": "greedy", "prompt": "one"},
    {"id": "seeded", "prompt": "one", "seed": 2, **SAMPLED},
    {"id": "drawn", "prompt": "one", **SAMPLED, "top_k": 50},
    {"id": "stopped", "prompt": "one", **ONLY_A, "stop": ["aaa"]},
    {"id": "talk", "messages": HELLO, "add_generation_prompt": False},
    {"id": "raw", "prompt": "one", "use_chat_template": False, "logprobs": 3},
    {"prompt": "without id", "repetition_penalty": 1.3},
    openai_line("chat", n=2, max_tokens=8, **SAMPLED),
    openai_line("two", COMPLETIONS, prompt=["one", "two"], n=2, seed=3, **SAMPLED),
    openai_line("drawn two", COMPLETIONS, prompt=["one", "two"], n=2, max_tokens=8, **SAMPLED),
    openai_line("drawn one", COMPLETIONS, prompt=["one", "one"], max_tokens=8, **SAMPLED),
    openai_line("ids", COMPLETIONS, prompt=[[104, 101], [121]], max_tokens=8),
]
CHANGED: Any = {"seed": 77, "temperature": 3.0, "top_k": 20, "stop": ("a",)}
OTHER = labs.Config(model_id="other", generation=labs.Generation(max_new_tokens=4, **CHANGED))


@pytest.mark.parametrize(("first", "second"), [(CONFIG, CONFIG), (CONFIG, OTHER), (OTHER, CONFIG)])
def test_an_answer_is_replayed_the_same_whatever_the_settings_of_the_run(tiny, first, second):
    rows = answers(tiny, REPEATED, first, ordered=True)
    assert isinstance(rows[2]["seed"], int)
    assert rows[2]["fingerprint"]["generation"]["seed"] == rows[2]["seed"]
    found = replayed(tiny, [b"\n", *rows, b" \r\n"], second, batch_rows=3)
    assert found == [labs_replay.Verdict(name_of(row), "same") for row in rows]


def test_json_of_the_command_can_be_replayed(loaded):
    talk = ("--messages-json", json.dumps(HELLO), "--temperature", "1")
    words = [("--prompt", "one"), talk, ("--prompt", "x", "--no-use-chat-template", "--seed", "3")]
    data = b"".join(gen("--json", *each).stdout_bytes for each in words)
    done = again("-", input=MARK + data)
    assert done.stdout == "1: same\n2: same\n3: same\n"
    assert (done.exit_code, done.stderr) == (0, "[3 same, 0 differs, 0 not comparable]\n")


@pytest.mark.parametrize(
    ("text", "token"), [("baaaaa", 1), ("aabaaa", 3), ("aaaaab", 6), ("aa", 3), ("a" * 9, 7)]
)
def test_a_text_that_changed_differs_at_its_first_token_of_any_choice(tiny, text, token):
    row = answer(tiny, {"id": "a", "prompt": "one", **ONLY_A})
    assert row["text"] == "aaaaaa"
    differs = labs_replay.Verdict("a", "differs", token)
    assert verdict(tiny, {**row, "text": text}) == differs
    row = answer(tiny, openai_line("a", n=2, max_tokens=6, **ONLY_A))
    row["response"]["body"]["choices"][1]["message"]["content"] = text
    assert verdict(tiny, row) == differs


@pytest.mark.parametrize(
    ("now", "before", "token"),
    [("ab", "abc", 3), ("aé🌍", "aè🌍", 3), ("aé🌍", "aé🌊", 7)],  # an end; the last of its bytes
)
def test_the_token_that_differs_may_be_an_end_or_a_part_of_a_character(tiny, now, before, token):
    inputs = labs.build_inputs(tiny, prompt="one")
    with kit.saying(tiny, [*now.encode(), kit.END], inputs):
        row = answer(tiny, {"id": "a", "prompt": "one", "temperature": 0, "max_new_tokens": 9})
        assert (row["text"], row["finish_reason"]) == (now, "stop")
        assert verdict(tiny, row).verdict == "same"
        assert verdict(tiny, {**row, "text": before}).token == token


@pytest.mark.parametrize("method", ["gguf", "int8"])
def test_replay_takes_the_form_of_the_weights_from_the_answers(tiny, method):
    row = answer(tiny, {"id": "a", "prompt": "one", **ONLY_A})
    row["fingerprint"]["quantization"] = {"quant_method": method}
    line, plain = json.dumps(row).encode(), labs.load_config(env={})
    taken = labs_replay.with_their_weights(plain, line).model.quantization
    assert taken.quant_method == method
    for settings in ({"quant_method": "int4"}, {"torch_dtype": "fp32"}):
        own = labs.load_config(env={}, overrides=settings)
        assert labs_replay.with_their_weights(own, line) == own
    bare = {**row, "fingerprint": None}
    wrong = {**row, "fingerprint": {**row["fingerprint"], "quantization": {"quant_method": "x"}}}
    other = {**row, "fingerprint": {**row["fingerprint"], "quantization": {"nothing": 1}}}
    named = {**row, "fingerprint": {**row["fingerprint"], "quantization": {"config": 1}}}
    lines = [json.dumps(each).encode() for each in (bare, wrong, other, named)]
    for each in (b"", b"{", b"[]", *lines):
        assert labs_replay.with_their_weights(plain, each) == plain


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"revision": "old"}, "revision was old, is sha256:"),
        ({"versions": {"torch": "old"}}, "torch was old, is "),
        ({"versions": {"bitsandbytes": "old"}}, "bitsandbytes was old, is None"),
        ({"hardware": "old"}, "hardware was old, is "),
        ({"dtype": "old"}, "dtype was old, is fp32"),
        ({"prompt_sha256": "old"}, "prompt_sha256 was old, is "),
        ({"model": "org/other", "revision": "old"}, "model was org/other, is "),
        ({"model": "elsewhere"}, None),  # another name of the same model
        (None, "in bf16 this model's text depends on the other rows"),
    ],
)
def test_a_text_of_another_model_machine_or_batch_is_not_compared(tiny, changes, why):
    if changes is None:
        decoder = dataclasses.replace(tiny.decoder, invariant=False)
        tiny = msgspec.structs.replace(tiny, dtype="bf16", decoder=decoder)
    changes = changes or {}
    row = answer(tiny, {"id": "a", "prompt": "one", **ONLY_A})
    versions = row["fingerprint"]["versions"] | changes.get("versions", {})
    row["fingerprint"] |= {**changes, "versions": versions}
    assert verdict(tiny, row) == SAME
    found = verdict(tiny, {**row, "text": "aaab"})
    assert (found.verdict, found.token) == ("not comparable" if why else "differs", 4)
    assert found.why is why is None or str(found.why).startswith(str(why))


def without(row: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key != name}


def test_a_line_that_cannot_be_run_again_says_why_and_stops_nothing(tiny):
    asked = [{"id": "a", "prompt": "one"}, {"id": "bad", "prompt": ""}]
    asked += [openai_line("b", n=2, **SAMPLED), openai_line("refused", stream=True)]
    one, bad, two, refused = answers(tiny, asked, ordered=True)
    body = two["response"]["body"]

    def damaged(choices: Any) -> dict[str, Any]:
        return {**two, "response": {**two["response"], "body": {**body, "choices": choices}}}

    silent = [{**each, "message": {"content": None}} for each in body["choices"]]
    cases: list[tuple[Any, str]] = [
        (bad, "the old answer is an error"),
        (refused, "the old answer is an error"),
        ({**two, "response": None}, "the old answer is an error"),
        ({**one, "finish_reason": "timeout"}, "the old answer was cut (timeout)"),
        (without(one, "request"), "does not hold its request"),
        (without(one, "fingerprint"), "does not hold its request"),
        ({**one, "fingerprint": {"model": "x"}}, "not an answer of labs-gen"),
        ({**one, "request": {"prompt": 5}}, "damaged"),
        ({**two, "request": {**two["request"], "url": "/v1/audio"}}, "unknown url"),
        ({**two, "request": {"url": "/v1/embeddings"}}, "vectors and scores are not made again"),
        (damaged(body["choices"][:1]), "damaged"),
        (damaged(silent), "damaged"),
        ({**two, "response": {**two["response"], "body": "text"}}, "damaged"),
        ({**two, "response": 5}, "damaged"),
        ({"id": "a", "prompt": "one"}, "not an answer of labs-gen"),
        (b"broken\n", "not an answer of labs-gen"),
        (line(one)[:-50], "not an answer of labs-gen"),
    ]
    rows = [each for row, _ in cases for each in (row, one)]
    found = replayed(tiny, rows, batch_rows=4)
    for (row, text), got, same in zip(cases, found[::2], found[1::2], strict=True):
        assert (got.verdict, text in str(got.why), same) == ("not comparable", True, SAME), row
        assert kit.is_one_sentence(Exception(got.why))


@pytest.mark.parametrize("asked", [{"id": "a", "prompt": "one"}, openai_line("a")])
def test_an_answer_that_time_cut_is_not_compared_and_a_replay_has_time(tiny, asked):
    generation = labs.Generation(max_new_tokens=2000, timeout_s=0.05, logit_bias={258: -100})
    row = answer(tiny, asked, labs.Config(model_id="tiny", generation=generation))
    why = "the old answer was cut (timeout)"
    assert verdict(tiny, row) == labs_replay.Verdict("a", "not comparable", why=why)
    row = answer(tiny, asked)
    row["fingerprint"]["generation"]["timeout_s"] = 1e-6
    assert verdict(tiny, row) == SAME


def test_only_a_comparable_line_that_differs_is_exit_code_1(loaded):
    row = answer(loaded, {"id": "a", "prompt": "one", **ONLY_A})
    other = {**row, "id": "b", "text": "aaab", "fingerprint": {**row["fingerprint"], "dtype": "x"}}
    done = again(written("out", [row, other, b"broken\n"]))
    lines = done.stdout.splitlines()
    assert (done.exit_code, lines[0]) == (0, "a: same")
    assert lines[1] == "b: not comparable at token 4 (dtype was x, is fp32)"
    assert lines[2].startswith("3: not comparable (line 3 is not an answer of labs-gen")
    done = again(written("out", [row, other, {**row, "id": "c", "text": "ab"}]))
    assert (done.exit_code, done.stdout.splitlines()[2]) == (1, "c: differs at token 2")
    assert done.stderr == "[1 same, 1 differs, 1 not comparable]\n"
