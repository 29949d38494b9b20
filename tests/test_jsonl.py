# SPDX-License-Identifier: Apache-2.0
"""Tests of labs_jsonl.py: lines, files that go on where they ended, and the same again."""

from __future__ import annotations

import collections
import contextlib
import functools
import io
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import kit
import msgspec
import openai.types
import openai.types.chat
import pytest
from kit import ONE_THREAD, ROOT, invoke, labs_gen, start

import labs
import labs_jsonl
import labs_openai
import labs_request

WAIT_S = 60  # for what should take a second
CONFIG = labs.Config(model_id="tiny", generation=labs.Generation(max_new_tokens=6))
CONTEXT = labs_request.open_context(CONFIG)
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "hello"}]
ONLY_A = {"logit_bias": {"97": 100}, "temperature": 0}  # lets any model say "aaa..."
SAMPLED = {"temperature": 1.5}
MARK = b"\xef\xbb\xbf"


# ---------------------------------------------------------------- helpers


def line(row: Any) -> bytes:
    """Write an object as a line; bytes stay as they are."""
    return row if isinstance(row, bytes) else json.dumps(row).encode() + b"\n"


def written(name: str, rows: Iterable[Any]) -> str:
    Path(name).write_bytes(b"".join(map(line, rows)))
    return name


def answers(
    model: labs.Model, rows: Iterable[Any], config: labs.Config = CONFIG, **options: Any
) -> list[dict[str, Any]]:
    """Answer lines without files."""
    lines = ((number, line(row)) for number, row in enumerate(rows, 1))
    tally = options.pop("tally", None) or labs_jsonl.Tally()
    context = labs_request.open_context(config)
    found = labs_jsonl.answer_lines(model, context, lines, tally, batching(**options))
    return [whole(data) for data in found]


def batching(batch_rows: int | None = None, ordered: bool = False) -> labs_jsonl.Batching:
    return labs_jsonl.Batching(rows=batch_rows, ordered=ordered)


def answer(model: labs.Model, row: Any, config: labs.Config = CONFIG) -> dict[str, Any]:
    (found,) = answers(model, [row], config)
    return found


def whole(data: bytes) -> dict[str, Any]:
    """Return what a line holds; it has to be exactly one."""
    assert data.endswith(b"\n")
    assert data.count(b"\n") == 1
    found = json.loads(data)
    assert isinstance(found, dict)
    return found


def name_of(row: dict[str, Any]) -> Any:
    return row.get("custom_id", row["id"])


def names_in(name: str) -> list[Any]:
    """Return the ids of a file of answers, each line of which has to be whole."""
    with open(name, "rb") as file:
        return [name_of(whole(data)) for data in file]


def by_name(rows: Iterable[dict[str, Any]]) -> dict[Any, dict[str, Any]]:
    """Return answers by id; none may be there twice."""
    rows = list(rows)
    found = {name_of(row): row for row in rows}
    assert len(found) == len(rows)
    return found


def run(model: labs.Model, source: str, target: str, **options: Any) -> labs_jsonl.Tally:
    tally, context = labs_jsonl.Tally(), labs_request.open_context(CONFIG)

    def answer(lines: Any) -> Iterator[bytes]:
        return labs_jsonl.answer_lines(model, context, lines, tally, batching(**options))

    labs_jsonl.answer_file(answer, source, target, tally)
    return tally


def counts(tally: labs_jsonl.Tally) -> tuple[int, int, int]:
    return tally.done, tally.failed, tally.skipped


def openai_line(name: Any, url: str = CHAT, method: str = "POST", **body: Any) -> dict[str, Any]:
    body = {"messages": HELLO, **body} if url == CHAT else body
    return {"custom_id": name, "method": method, "url": url, "body": body}


def generated(model: labs.Model, inputs: labs.Inputs, **options: Any) -> labs.Completion:
    return labs.generate(model, inputs, labs.evolve(CONFIG.generation, **options))


def texts(row: dict[str, Any]) -> list[str]:
    """Return the texts of OpenAI's answer."""
    choices = row["response"]["body"]["choices"]
    return [each["text"] if "text" in each else each["message"]["content"] for each in choices]


def message_of(row: dict[str, Any]) -> str:
    error = row["error"] or row["response"]["body"]["error"]
    assert kit.is_one_sentence(Exception(error["message"]))
    return str(error["message"])


def prompts(count: int, **settings: Any) -> list[dict[str, Any]]:
    """Make lines of all lengths."""
    chance = random.Random(count)
    return [
        {"id": f"p{n}", "prompt": "x" * chance.randrange(1, 40) + str(n), **settings}
        for n in range(count)
    ]


@pytest.fixture
def served(tiny: labs.Model, monkeypatch: pytest.MonkeyPatch) -> labs.Model:
    """Let labs-gen, run in this process, have the tiny model."""
    monkeypatch.setattr(labs, "load_model", lambda config: tiny)
    for name in [name for name in os.environ if name.startswith("LABS_")]:
        monkeypatch.delenv(name)
    return tiny


gen = functools.partial(invoke, "--model", "tiny", "--max-new-tokens", "6")


def until(happened: Callable[[], Any]) -> None:
    end = time.monotonic() + WAIT_S
    while not happened():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.002)


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
    {"prompt": "Grüße 漢字 🌍 \u2028", "prompt_lookup_num_tokens": 4},
]


@pytest.mark.parametrize("rows", [None, 1, 3])
def test_each_line_is_answered_as_generate_answers_it_alone(
    tiny: labs.Model, rows: int | None
) -> None:
    lines = [{"id": n, **row} for n, row in enumerate(ROWS)]
    found = by_name(answers(tiny, lines, batch_rows=rows))
    asked = {"prompt", "messages", "use_chat_template", "add_generation_prompt"}
    for number, row in enumerate(ROWS):
        inputs = labs.build_inputs(tiny, **{k: v for k, v in row.items() if k in asked})
        expected = generated(tiny, inputs, **{k: v for k, v in row.items() if k not in asked})
        same = ("text", "finish_reason", "seed", "matched_stop")
        assert all(found[number][name] == getattr(expected, name) for name in same), row
        tokens = [each["token"] for each in found[number]["logprobs"]]
        assert tokens == kit.tokens_of(expected)
        assert found[number]["usage"]["completion_tokens"] == expected.usage.completion_tokens


def test_an_answer_tells_what_made_it(tiny: labs.Model) -> None:
    row = answer(tiny, {"id": "a", "prompt": "one", "seed": 3, "temperature": 1})
    assert {"id", "model", "text", "finish_reason", "usage", "timings", "seed"} < row.keys()
    assert (row["model"], row["seed"]) == ("tiny", 3)
    assert row["request"]["prompt"] == "one"
    assert row["request"]["use_chat_template"] is True
    assert msgspec.convert(row["fingerprint"], labs.Fingerprint).generation.seed == 3


def test_an_id_stays_as_it_is_and_a_line_without_one_has_its_number(tiny: labs.Model) -> None:
    names: list[Any] = ["", "a b\nc", "é\u2028", "7", 7, -1, 2**63, 10**25]
    rows = [{"id": name, "prompt": "one", "max_new_tokens": 1} for name in names]
    rows += [{"prompt": "two", "max_new_tokens": 1}, {"id": None, "prompt": "3"}]
    found = [name_of(row) for row in answers(tiny, rows, ordered=True)]
    assert found == [*names, 9, 10]
    assert [type(name) for name in found] == [type(name) for name in [*names, 9, 10]]


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_blank_lines_are_passed_over_and_counted(tiny: labs.Model, end: bytes) -> None:
    lines = [b"", b'{"prompt": "one"}', b" \t", b'  {"prompt": "two"}  ', b"", b'{"prompt": "3"}']
    found = answers(tiny, [each + end for each in lines], ordered=True)
    assert [name_of(row) for row in found] == [2, 4, 6]
    assert all("text" in row for row in found)


def test_a_last_line_needs_no_newline(tiny: labs.Model) -> None:
    Path("in").write_bytes(b'{"id": "a", "prompt": "one"}\r\n{"id": "b", "prompt": "two"}')
    assert counts(run(tiny, "in", "out")) == (2, 0, 0)
    assert sorted(names_in("out")) == ["a", "b"]


def test_what_a_line_leaves_open_is_as_configured(tiny: labs.Model) -> None:
    config = labs.Config(
        model_id="tiny",
        generation=labs.Generation(max_new_tokens=3, seed=4, temperature=2.0),
        use_chat_template=False,
    )
    row = answer(tiny, {"prompt": "one"}, config)
    inputs = labs.build_inputs(tiny, prompt="one", use_chat_template=False)
    assert row["text"] == labs.generate(tiny, inputs, config.generation).text
    assert row["seed"] == 4
    row = answer(tiny, {"prompt": "one", "temperature": None}, config)
    assert row["fingerprint"]["generation"]["temperature"] == 0  # null: as the model recommends


def test_no_lines_are_no_answers(tiny: labs.Model) -> None:
    Path("in").write_bytes(b"\n\n")
    assert counts(run(tiny, "in", "out")) == (0, 0, 0)
    assert Path("out").read_bytes() == b""


# ---------------------------------------------------------------- bad lines


BAD: list[tuple[Any, str]] = [
    (b"no JSON\n", "JSON is malformed"),
    (b"[1, 2]\n", "not a JSON object"),
    (b"null\n", "not a JSON object"),
    (b'"text"\n', "not a JSON object"),
    (b'{"id": "torn", "prompt": "on\n', "cannot be used"),
    (b"\xff\xfe\n", "cannot be used"),
    (b"[" * 100_000 + b"\n", "cannot be used"),
    ({"prompt": "hi", "max_tokenz": 3}, "`max_tokenz`"),
    ({"prompt": "hi", "temperature": -1}, "`$.temperature`"),
    ({"prompt": "hi", "max_new_tokens": "many"}, "`$.max_new_tokens`"),
    ({"prompt": "hi", "max_new_tokens": None}, "`$.max_new_tokens`"),
    ({"prompt": "hi", "do_sample": True, "temperature": 0}, "do_sample"),
    ({"prompt": "hi", "logit_bias": {"999": 1}}, "token 999"),
    ({"prompt": "hi", "messages": HELLO}, "not both"),
    ({}, "not neither"),
    ({"prompt": ""}, "empty"),
    ({"messages": []}, "empty"),
    ({"messages": [{"role": "king", "content": "x"}]}, "role"),
    ({"prompt": "x" * 5000}, "5004 tokens"),
    ({"prompt": "hi", "max_new_tokens": 5000}, "max_new_tokens is 5000"),
    ({"prompt": "hi", "model": "gpt-9"}, "'gpt-9'"),
    (b'{"id": "twice", "prompt": "\\ud800"}\n', "cannot be used"),
]


def good(number: int) -> dict[str, Any]:
    return {"id": f"good {number}", "prompt": f"one {number}", "max_new_tokens": 1 + number % 3}


def mixed() -> tuple[list[Any], list[Any]]:
    """Return bad lines between good ones, and the ids of all."""
    rows: list[Any] = []
    names: list[Any] = []
    for number, (bad, _) in enumerate(BAD):
        rows.append(good(number))
        names.append(f"good {number}")
        rows.append(bad if isinstance(bad, bytes) else {"id": f"bad {number}", **bad})
        names.append(f"line {len(rows)}" if isinstance(bad, bytes) else f"bad {number}")
    return rows, names


@pytest.mark.parametrize("ordered", [True, False])
def test_a_bad_line_gets_an_error_row_and_stops_nothing(tiny: labs.Model, ordered: bool) -> None:
    (rows, names), tally = mixed(), labs_jsonl.Tally()
    found = answers(tiny, rows, ordered=ordered, batch_rows=4, tally=tally)
    assert counts(tally) == (len(BAD), len(BAD), 0)
    assert len(by_name(found)) == len(names)
    order = [name_of(row) for row in found]
    assert order == names if ordered else sorted(order) == sorted(names)
    for number, (_, said) in enumerate(BAD):
        row = by_name(found)[names[2 * number + 1]]
        assert row.keys() == {"id", "error"}
        assert said in message_of(row)
        assert row["error"]["type"] == "invalid_request"
        assert "text" in by_name(found)[f"good {number}"]


NOT_TEXT = {
    b"\\ud83d": r"a lone surrogate, which is half a character: \ud83d",
    b"a\\udfffb": r"a lone surrogate, which is half a character: \udfff",
    b"\\udc00\\ud800": r"a lone surrogate, which is half a character: \udc00",
    b"\xed\xb0\x80": "can't decode byte 0xed in position 11",
    b"ab\xfe": "can't decode byte 0xfe in position 13",
    b"a\x00": "Invalid control character at: line 1 column 13",
    b"\x1b[1m": "Invalid control character at: line 1 column 12",
}


@pytest.mark.parametrize("data", NOT_TEXT)
def test_what_no_text_can_hold_is_named_with_its_place(tiny: labs.Model, data: bytes) -> None:
    row = answer(tiny, b'{"prompt":"%s"}\n' % data)
    assert NOT_TEXT[data] in message_of(row)
    with pytest.raises(labs_request.Refusal) as caught:
        labs_openai.read(b'{"prompt":"%s"}' % data, labs_request.GenerateRequest)
    assert NOT_TEXT[data] in str(caught.value)


def test_both_halves_of_a_character_and_an_escaped_backslash_are_text(tiny: labs.Model) -> None:
    rows = [
        b'{"prompt":"%s", "max_new_tokens": 1}\n' % data
        for data in (b"\\ud83d\\ude00", b"\\\\ud800")
    ]
    assert ["text" in row for row in answers(tiny, rows)] == [True, True]


def small(**server: int) -> labs.Config:
    return msgspec.structs.replace(CONFIG, server=labs.Server(**server))  # type: ignore[arg-type]


def test_a_prompt_that_is_too_long_for_a_request_is_an_error_row(tiny: labs.Model) -> None:
    rows = [{"id": "long", "prompt": "é" * 51}, {"id": "fits", "prompt": "e" * 100}]
    rows += [{"id": "talk", "messages": [{"role": "user", "content": "a" * 51}] * 2}]
    found = by_name(answers(tiny, rows, small(max_prompt_bytes=100)))
    assert "server_max_prompt_bytes = 100" in message_of(found["long"])
    assert "server_max_prompt_bytes = 100" in message_of(found["talk"])
    assert "max_prompt_bytes" not in str(found["fits"])


@pytest.mark.parametrize("end", [b"\n", b""])
def test_of_a_line_that_is_too_long_little_is_read(tiny: labs.Model, end: bytes) -> None:
    class Narrow(io.BytesIO):
        most = 0

        def readline(self, size: int | None = -1, /) -> bytes:
            data = super().readline(size)
            self.most = max(self.most, len(data))
            return data

    long, good = b'{"prompt": "%s"}' % (b"a" * 3_000_000), b'{"id": "good", "prompt": "one"}\n'
    sources = [Narrow(good + long + b"\n" + good.replace(b"good", b"next")), Narrow(long + end)]
    for file in sources:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.stdin", io.TextIOWrapper(file))
            with labs_jsonl.opened("-", 2000) as lines:
                found = answers(tiny, lines, small(max_body_bytes=2000))
        names = [name_of(row) for row in found]
        assert {*names} == ({"good", "line 2", "next"} if file is sources[0] else {"line 1"})
        bad = next(row for row in found if "error" in row)
        assert "more than server_max_body_bytes = 2000 bytes" in message_of(bad)
        assert 2000 < file.most < 3000


def test_an_id_that_was_used_before_is_an_error_of_its_line(tiny: labs.Model) -> None:
    rows = [{"id": "a", "prompt": "one"}, {"id": "a", "prompt": "two"}, openai_line("a")]
    first, *others = answers(tiny, [*rows, {"id": 1, "prompt": "x"}], ordered=True)
    assert (first["id"], first["request"]["prompt"]) == ("a", "one")
    assert [name_of(row) for row in others] == ["line 2", "line 3", 1]
    assert all("has the id 'a' too" in message_of(row) for row in others[:2])
    assert "line 2" in message_of(others[0])


def test_a_line_that_cannot_be_read_takes_no_other_lines_id(tiny: labs.Model) -> None:
    rows: list[Any] = [{"id": n, "prompt": "one", "max_new_tokens": 1} for n in range(6)]
    rows[2], rows[4] = b"{broken\n", {"id": [4], "prompt": "one"}
    found = by_name(answers(tiny, rows))
    assert all("text" in found[n] for n in (0, 1, 3, 5))
    assert "malformed" in message_of(found["line 3"])
    assert "`$.id`" in message_of(found["line 5"])


def test_what_goes_wrong_in_the_computing_is_not_called_a_bad_request(
    tiny: labs.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
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


def test_a_chat_line_is_answered_as_openai_would(tiny: labs.Model) -> None:
    body = {"model": "tiny", "max_completion_tokens": 5, "logprobs": True, "top_logprobs": 2}
    row = answer(tiny, openai_line("a", **body, user="me"))
    assert row["custom_id"] == "a"
    assert row["error"] is None
    assert row["response"]["status_code"] == 200
    assert row["id"].startswith("batch_req_")
    assert row["response"]["request_id"]
    parsed = openai.types.chat.ChatCompletion.model_validate(row["response"]["body"], strict=True)
    expected = generated(tiny, labs.build_inputs(tiny, messages=HELLO), max_new_tokens=5)
    (choice,) = parsed.choices
    assert (parsed.object, parsed.model) == ("chat.completion", "tiny")
    assert choice.message.content == expected.text
    assert choice.finish_reason == expected.finish_reason
    assert parsed.usage is not None
    assert parsed.usage.completion_tokens == expected.usage.completion_tokens
    assert parsed.usage.prompt_tokens == expected.usage.prompt_tokens
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    assert [len(each.top_logprobs) for each in choice.logprobs.content] == [2] * 5


@pytest.mark.parametrize(
    "prompt", ["one", ["one", "two"], [104, 101], [[104, 101], [121]], ["one", [104, 101]]]
)
@pytest.mark.parametrize("n", [None, 2])
def test_a_completions_line_has_n_choices_of_each_prompt(
    tiny: labs.Model, prompt: Any, n: int | None
) -> None:
    settings = {"max_tokens": 4, "seed": 9, "temperature": 1.5}
    body = {"prompt": prompt, **settings} | ({} if n is None else {"n": n})
    row = answer(tiny, openai_line("a", COMPLETIONS, **body))
    parsed = openai.types.Completion.model_validate(row["response"]["body"], strict=True)
    one = isinstance(prompt, str) or isinstance(prompt[0], int)
    expected = []
    for each in [prompt] if one else prompt:
        if isinstance(each, str):
            inputs = labs.build_inputs(tiny, prompt=each, use_chat_template=False)
        else:
            inputs = labs.inputs_from_ids(tiny, each)
        options = {"max_new_tokens": 4, "temperature": 1.5}
        expected += [generated(tiny, inputs, seed=9 + i, **options).text for i in range(n or 1)]
    assert [choice.text for choice in parsed.choices] == expected
    assert [choice.index for choice in parsed.choices] == list(range(len(expected)))
    assert parsed.object == "text_completion"


def test_choices_without_a_seed_differ(tiny: labs.Model) -> None:
    wild = {"max_tokens": 12, "temperature": 20, "logit_bias": {"258": -100}}
    rows = [
        openai_line("a", n=4, **wild),
        openai_line("b", COMPLETIONS, prompt=["one", "one"], n=2, **wild),
        openai_line("c", n=4, **wild),
    ]
    found = by_name(answers(tiny, rows))
    assert all(len(set(texts(row))) == 4 for row in found.values())
    assert texts(found["a"]) != texts(found["c"])


REFUSED: list[tuple[dict[str, Any], str]] = [
    (openai_line("", stream=True), "stream"),
    (openai_line("", stream_options={"include_usage": True}), "stream"),
    (openai_line("", "/v1/embeddings", input="x"), "/v1/embeddings"),
    (openai_line("", method="GET"), "GET"),
    (openai_line("", tools=[{"type": "function"}]), "tools is not implemented"),
    (openai_line("", response_format={"type": "xml"}), "response_format"),
    (openai_line("", n=0), "`$.n`"),
    (openai_line("", n=129), "`$.n`"),
    (openai_line("", best_off=2), "`best_off`"),
    (openai_line("", model="gpt-9"), "'gpt-9'"),
    (openai_line("", messages=[]), "`$.messages`"),
    (openai_line("", max_tokens=3, max_completion_tokens=4), "max_tokens"),
    (openai_line("", messages=[{**HELLO[0], "content": "x" * 5000}]), "maximum context length"),
    (openai_line("", COMPLETIONS, prompt=["one", ""]), "empty"),
    (openai_line("", COMPLETIONS, prompt=["one", "x" * 5000]), "5001 tokens"),
    (openai_line("", COMPLETIONS, prompt=["one", [300]]), "token 300"),
    (openai_line("", COMPLETIONS), "`prompt`"),
    ({"custom_id": "", "url": CHAT, "body": {}}, "`method`"),
    ({"custom_id": "", "method": "POST", "url": CHAT}, "`body`"),
    ({**openai_line(""), "extra": 1}, "`extra`"),
    ({**openai_line(""), "body": 5}, "`object`"),
]


def test_openais_lines_are_refused_one_by_one_in_its_format(tiny: labs.Model) -> None:
    rows = []
    for number, (row, _) in enumerate(REFUSED):
        rows += [{**row, "custom_id": f"bad {number}"}, openai_line(f"good {number}", max_tokens=1)]
    found = by_name(answers(tiny, rows, batch_rows=3))
    for number, (row, said) in enumerate(REFUSED):
        bad = found[f"bad {number}"]
        assert bad["response"]["status_code"] == 400, row
        assert bad["error"] is None
        assert said in message_of(bad), row
        error = bad["response"]["body"]["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        assert error["type"] == "invalid_request_error"
        assert found[f"good {number}"]["response"]["status_code"] == 200


def test_an_openai_line_may_use_what_its_prompt_leaves_of_the_context(tiny: labs.Model) -> None:
    most, left = tiny.context_length or 0, 3
    line = openai_line("a", COMPLETIONS, prompt=[97] * (most - left), max_tokens=5000)
    row = answer(tiny, line)["response"]
    assert row["status_code"] == 200
    assert row["body"]["usage"]["completion_tokens"] <= left
    assert row["body"]["usage"]["total_tokens"] <= most


def test_a_refused_field_is_named_as_openai_names_it(tiny: labs.Model) -> None:
    row = answer(tiny, openai_line("a", tools=[{"type": "function"}]))
    error = row["response"]["body"]["error"]
    assert (error["param"], error["code"]) == ("tools", "unsupported")


# ---------------------------------------------------------------- going on


def test_what_is_answered_is_not_answered_again(tiny: labs.Model) -> None:
    rows = [*prompts(6), openai_line("chat"), {"prompt": "without id"}, b"broken\n"]
    written("in", rows[:4])
    assert counts(run(tiny, "in", "out")) == (4, 0, 0)
    before = Path("out").read_bytes()
    written("in", rows)
    assert counts(run(tiny, "in", "out")) == (4, 1, 4)
    after = Path("out").read_bytes()
    assert after.startswith(before)
    assert counts(run(tiny, "in", "out")) == (0, 0, 9)
    assert Path("out").read_bytes() == after
    assert {*names_in("out")} == {*(f"p{n}" for n in range(6)), "chat", 8, "line 9"}


def test_errors_of_an_earlier_run_are_told(tiny: labs.Model) -> None:
    written("in", [*prompts(3), openai_line("bad", tools=[{}]), b"broken\n"])
    run(tiny, "in", "out")
    again = run(tiny, "in", "out")
    assert counts(again) == (0, 0, 5)
    assert "5 before (2 of them failed)" in str(again)


def test_ids_that_are_used_twice_are_told_of_once(tiny: labs.Model) -> None:
    written("in", [*prompts(3), *prompts(3)])
    assert counts(run(tiny, "in", "out")) == (3, 3, 0)
    assert counts(run(tiny, "in", "out")) == (0, 0, 6)
    assert len({*names_in("out")}) == len(names_in("out")) == 6


def test_answers_of_other_lines_stay(tiny: labs.Model) -> None:
    written("one", prompts(2))
    written("two", [{"id": "other", "prompt": "x"}])
    run(tiny, "one", "out")
    assert counts(run(tiny, "two", "out")) == (1, 0, 0)
    assert names_in("out") == [*names_in("out")[:2], "other"]


def test_a_file_of_answers_that_was_cut_anywhere_is_mended(tiny: labs.Model) -> None:
    rows = [*prompts(2, max_new_tokens=1), openai_line("c", max_tokens=1), b"broken\n"]
    run(tiny, written("in", rows), "whole")
    data = Path("whole").read_bytes()
    names = names_in("whole")
    ends = [at + 1 for at in range(len(data)) if data[at : at + 1] == b"\n"]
    near = {end + step for end in ends for step in range(-3, 9)} & {*range(len(data))}
    for cut in sorted(near | {*range(0, len(data), 101)}):
        Path("out").write_bytes(data[:cut])
        tally = run(tiny, "in", "out")
        kept = sum(end <= cut + 1 for end in ends)  # a line may lack its newline only
        assert counts(tally)[2] == kept, cut
        assert Path("out").read_bytes().startswith(data[: ends[kept - 1] if kept else 0])
        assert sorted(names_in("out"), key=str) == sorted(names, key=str), cut


def test_a_whole_answer_of_another_file_is_kept_without_its_newline(tiny: labs.Model) -> None:
    run(tiny, written("one", prompts(1)), "out")
    before = Path("out").read_bytes()
    Path("out").write_bytes(before.removesuffix(b"\n"))
    run(tiny, written("two", [{"id": "other", "prompt": "x"}]), "out")
    assert Path("out").read_bytes().startswith(before)
    assert names_in("out") == ["p0", "other"]


FOREIGN = [
    b"a text\n",
    b"a text without a newline",
    b'{"a": 1}',
    b'{"id": 1, "name": "Ada"}',
    b'{"id":1,"name":"Ada"}',
    b'{"id": "a", "prompt": "one"}\n{"id": "b", "prompt": "two"}',
    b'{"id":"a","prompt":"one"}',
    b'{"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {}}\n',
    b'[{"id": 1}]',
    b'{\n  "id": 1\n}\n',
    b'{"id":1,"text":"of a data set"}\n',
    b"\x89PNG\r\n\x1a\n\0\0",
    b"\xff\xfe{\0",
    b"\0" * 100,
]


@pytest.mark.parametrize("data", FOREIGN)
def test_a_file_that_holds_no_answers_is_left_as_it_is(tiny: labs.Model, data: bytes) -> None:
    written("in", prompts(1))
    Path("out").write_bytes(data)
    with pytest.raises(labs.LabsError, match="out: line 1 is not an answer of labs-gen") as caught:
        run(tiny, "in", "out")
    assert kit.is_one_sentence(caught.value)
    assert Path("out").read_bytes() == data


def test_foreign_lines_after_answers_are_found_before_anything_is_cut(tiny: labs.Model) -> None:
    run(tiny, written("in", prompts(2)), "out")
    data = Path("out").read_bytes() + b'{"id":"x","prompt":"y"}\n{"id":"to'
    Path("out").write_bytes(data)
    with pytest.raises(labs.LabsError, match="out: line 3"):
        run(tiny, "in", "out")
    assert Path("out").read_bytes() == data


def test_input_and_output_are_not_the_same_file(tiny: labs.Model) -> None:
    data = Path(written("in", prompts(1))).read_bytes()
    os.link("in", "hard")
    os.symlink("in", "soft")
    for target in ("in", "./in", "hard", "soft"):
        with pytest.raises(labs.LabsError, match="both --input and --output"):
            run(tiny, "in", target)
    assert Path("in").read_bytes() == data


def test_a_missing_input_makes_no_output(served: labs.Model) -> None:
    for words in (["--input", "missing", "--output", "out"], ["--replay", "missing"]):
        done = gen(*words)
        assert (done.exit_code, done.stderr) == (1, "Error: missing: No such file or directory\n")
    assert not Path("out").exists()


def test_an_output_that_cannot_be_written_is_one_sentence(served: labs.Model) -> None:
    os.mkdir("folder")
    for target, said in (("no/out", "No such file or directory"), ("folder", "Is a directory")):
        done = gen("--input", written("in", prompts(1)), "--output", target)
        assert (done.exit_code, done.stderr) == (1, f"Error: {target}: {said}\n")


def test_a_model_that_is_not_there_costs_no_answers(
    served: labs.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(config: labs.Config) -> labs.Model:
        raise labs.ModelError("nobody/nothing is not there")

    written("in", prompts(2))
    with monkeypatch.context() as patch:
        patch.setattr(labs, "load_model", missing)
        done = gen("--input", "in", "--output", "out")
    assert (done.exit_code, done.stderr) == (1, "Error: nobody/nothing is not there\n")
    assert Path("out").read_bytes() == b""
    assert gen("--input", "in", "--output", "out").exit_code == 0
    assert len(names_in("out")) == 2


def test_a_full_disk_is_one_sentence(served: labs.Model) -> None:
    done = gen("--input", written("in", prompts(2)), "--output", "/dev/full")
    assert done.exit_code == 1
    assert done.stderr.splitlines()[-1] == "Error: /dev/full: No space left on device"


def test_a_full_disk_behind_standard_output_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with open("/dev/full", "wb", buffering=0) as full:
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(full, write_through=True))
        with pytest.raises(labs.LabsError, match=r"^standard output: No space left on device$"):
            labs_jsonl._write_out(b"{}\n")


def test_a_device_takes_answers_of_two_processes(served: labs.Model) -> None:
    written("in", prompts(2))
    with open(os.devnull, "ab") as file:
        labs_jsonl._lock(file.fileno(), os.devnull)
        assert gen("--input", "in", "--output", os.devnull).exit_code == 0


def test_an_input_may_be_a_named_pipe(tiny: labs.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for name, stream in (("out", sys.stderr), ("shown", Terminal())):
        monkeypatch.setattr(sys, "stderr", stream)
        os.mkfifo(f"pipe of {name}")
        data = MARK + b"".join(map(line, prompts(3)))
        writer = threading.Thread(target=Path(f"pipe of {name}").write_bytes, args=(data,))
        writer.start()
        assert counts(run(tiny, f"pipe of {name}", name)) == (3, 0, 0)
        writer.join()


def test_a_bar_on_a_terminal_counts_what_was_there_before(
    tiny: labs.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    run(tiny, written("in", prompts(3)), "out")
    monkeypatch.setattr(sys, "stderr", Terminal())
    run(tiny, written("in", [*prompts(4), b"\n"]), "out")
    assert "/4 " in sys.stderr.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["in", "-"])
def test_a_byte_order_mark_is_not_part_of_the_first_line(served: labs.Model, name: str) -> None:
    data = MARK + b'{"id": "a", "prompt": "one"}\r\n{"id": "b", "prompt": "two"}\r\n'
    Path("in").write_bytes(data)
    done = gen("--input", name, "--output", "out", input=data)
    assert done.exit_code == 0
    assert sorted(names_in("out")) == ["a", "b"]


# ---------------------------------------------------------------- true processes


DRIVER = """
import json, os, resource, sys, labs, labs_jsonl, labs_request
model = labs.load_model(labs.ModelSpec(model_name=sys.argv[1], torch_dtype="fp32"))
context = labs_request.open_context(labs.Config(model_id="tiny"))
batching = labs_jsonl.Batching(rows=8)
print("ready", flush=True)
for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        source, target, most = json.loads(line)
        if most:
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
        try:
            tally = labs_jsonl.Tally()
            answer = lambda lines: labs_jsonl.answer_lines(model, context, lines, tally, batching)
            labs_jsonl.answer_file(answer, source, target, tally)
        except labs.LabsError as error:
            print(error, file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    print(pid, flush=True)
    print(os.waitpid(pid, 0)[1], flush=True)
"""


class Driver:
    """A process with a model that answers files, each in a child of it, without a start-up."""

    def __init__(self, model: Path) -> None:
        environment = {**ONE_THREAD, "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            [sys.executable, "-c", DRIVER, str(model)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self._read() == "ready"

    def _read(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def start(self, source: str, target: str, most: int = 0) -> int:
        """Begin to answer a file; return the pid. most: bytes that the files may have."""
        assert self.process.stdin is not None
        words = [os.path.abspath(source), os.path.abspath(target), most]
        self.process.stdin.write(json.dumps(words) + "\n")
        self.process.stdin.flush()
        return int(self._read())

    def wait(self) -> int:
        """Return the exit code of what was started, or minus the signal."""
        return os.waitstatus_to_exitcode(int(self._read()))


@pytest.fixture(scope="module")
def driver(tiny_folder: Path) -> Iterator[Driver]:
    driver = Driver(tiny_folder)
    yield driver
    driver.process.communicate()


def size(name: str) -> int:
    with contextlib.suppress(FileNotFoundError):
        return os.path.getsize(name)
    return 0


def long_lines(count: int) -> list[dict[str, Any]]:
    """Make lines whose answers end one after the other."""
    rows = prompts(count, logit_bias={"258": -100})
    return [{**row, "max_new_tokens": 10 + 7 * n % 40} for n, row in enumerate(rows)]


def test_ten_kills_lose_and_double_nothing(tiny: labs.Model, driver: Driver) -> None:
    rows, chance = long_lines(240), random.Random(1)
    written("in", rows)
    for _ in range(10):
        pid = driver.start("in", "out")
        more = size("out") + chance.randrange(1, 16_000)
        until(lambda more=more: size("out") >= more)
        time.sleep(chance.random() / 100)
        os.kill(pid, signal.SIGKILL)
        assert driver.wait() == -signal.SIGKILL
    kept = Path("out").read_bytes()
    assert 10 < kept.count(b"\n") < 240
    driver.start("in", "out")
    assert driver.wait() == 0
    assert Path("out").read_bytes().startswith(kept[: kept.rindex(b"\n") + 1])
    assert sorted(names_in("out")) == sorted(row["id"] for row in rows)
    found = by_name(map(whole, Path("out").read_bytes().splitlines(keepends=True)))
    for row in chance.sample(rows, 5):
        inputs = labs.build_inputs(tiny, prompt=row["prompt"])
        options = {"max_new_tokens": row["max_new_tokens"], "logit_bias": {258: -100}}
        assert found[row["id"]]["text"] == generated(tiny, inputs, **options).text


def test_a_file_is_written_by_one_process_at_a_time(served: labs.Model, driver: Driver) -> None:
    written("in", long_lines(100))
    pid = driver.start("in", "out")
    until(lambda: size("out"))
    os.kill(pid, signal.SIGSTOP)
    done = gen("--input", "in", "--output", "out")
    os.kill(pid, signal.SIGKILL)
    assert driver.wait() == -signal.SIGKILL
    assert done.exit_code == 1
    assert done.stderr == "Error: out is being written by another process\n"
    written("in", prompts(3))
    assert gen("--input", "in", "--output", "out").exit_code == 0
    assert len({*names_in("out")}) == len(names_in("out"))


def test_a_disk_that_fills_up_leaves_a_line_that_is_mended(
    tiny: labs.Model, driver: Driver
) -> None:
    written("in", prompts(8))
    driver.start("in", "out", most=5000)
    assert driver.wait() == 1
    assert size("out") == 5000
    assert not Path("out").read_bytes().endswith(b"\n")
    driver.start("in", "out")
    assert driver.wait() == 0
    assert sorted(names_in("out")) == sorted(f"p{n}" for n in range(8))


def test_ctrl_c_keeps_what_is_answered_and_the_same_command_goes_on(tiny_folder: Path) -> None:
    written("in", long_lines(90))
    words = ["--model", str(tiny_folder), "--input", "in", "--output", "out", "--batch-rows", "4"]
    process = start(*words, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE)
    until(lambda: size("out"))
    process.send_signal(signal.SIGINT)
    assert process.stderr is not None
    told = process.stderr.read().decode()
    assert process.wait(WAIT_S) == 130
    before = names_in("out")
    assert 0 < len(before) < 90
    assert " answered, 0 failed; " in told
    assert "Traceback" not in told
    done = labs_gen(*words)
    assert done.returncode == 0
    assert f"[{90 - len(before)} answered, {len(before)} before, 0 failed".encode() in done.stderr
    assert sorted(names_in("out")) == sorted(f"p{n}" for n in range(90))


def test_a_pipe_that_is_closed_ends_it_quietly(tiny_folder: Path) -> None:
    rows = [*prompts(300, max_new_tokens=2), b"broken\n"]
    with open(written("in", rows), "rb") as file:
        process = start(
            *("--model", str(tiny_folder), "--input", "-", "--output", "-", "--ordered"),
            stdin=file,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
    assert process.stdout is not None
    assert process.stderr is not None
    assert whole(process.stdout.readline())["id"] == "p0"
    process.stdout.close()
    assert "answered" in (told := process.stderr.read().decode())
    assert len(told.splitlines()) == 1
    assert process.wait(WAIT_S) == 0


def test_the_default_model_answers_a_file_and_the_same_again() -> None:
    rows = [
        {"id": "river", "prompt": "Name a river.", "max_new_tokens": 8},
        {"id": "seeded", "prompt": "Tell a joke.", "max_new_tokens": 8, "seed": 4, **SAMPLED},
        {"id": "drawn", "messages": HELLO, "max_new_tokens": 8, **SAMPLED},
        openai_line("chat", max_tokens=4, n=2, **SAMPLED),
        openai_line("raw", COMPLETIONS, prompt=["Once upon", "The sea"], max_tokens=4, **SAMPLED),
        {"id": "bad", "prompt": ""},
    ]
    done = labs_gen("--input", written("in", rows), "--output", "out")
    assert done.returncode == 1
    assert done.stdout == b""
    assert done.stderr.startswith(b"[5 answered, 1 failed; ")
    again = labs_gen("--replay", "out", "--batch-rows", "1")
    assert again.stderr == b"[5 same, 0 differs, 1 not comparable]\n"
    assert again.returncode == 0
    assert {*again.stdout.decode().splitlines()} == {
        *(f"{name}: same" for name in ("river", "seeded", "drawn", "chat", "raw")),
        "bad: not comparable (the old answer is an error)",
    }


# ---------------------------------------------------------------- the command


def test_the_command_reads_and_writes_pipes(served: labs.Model) -> None:
    data = b"".join(map(line, prompts(3)))
    for words in (["--output", "-"], []):
        done = gen("--input", "-", "--ordered", *words, input=data)
        assert done.exit_code == 0
        found = [whole(each) for each in done.stdout_bytes.splitlines(keepends=True)]
        assert [row["id"] for row in found] == ["p0", "p1", "p2"]
        assert done.stderr.startswith("[3 answered, 0 failed; ")


def test_a_line_that_failed_is_exit_code_1(served: labs.Model) -> None:
    written("in", [*prompts(2), b"broken\n"])
    done = gen("--input", "in", "--output", "out")
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr.startswith("[2 answered, 1 failed; ")
    assert len(names_in("out")) == 3


def test_settings_of_the_command_are_those_of_the_lines(served: labs.Model) -> None:
    done = gen("--input", "-", "--temperature", "1.5", "--seed", "3", input=b'{"prompt": "one"}')
    expected = generated(served, labs.build_inputs(served, prompt="one"), seed=3, temperature=1.5)
    assert whole(done.stdout_bytes)["text"] == expected.text


@pytest.mark.parametrize(
    "words",
    [
        ["--output", "out", "--prompt", "hi"],
        ["--ordered", "--prompt", "hi"],
        ["--batch-rows", "2", "--prompt", "hi"],
        ["--input", "in", "--batch-rows", "0"],
        *(
            [mode, "in", *other]
            for mode in ("--input", "--replay")
            for other in (
                ["--prompt", "hi"],
                ["--system", "hi"],
                ["--messages-json", "[]"],
                ["--messages-file", "x"],
                ["--chat"],
                ["--json"],
                ["--stream"],
                ["--explain"],
            )
        ),
        ["--input", "in", "--replay", "in"],
        ["--replay", "in", "--output", "out"],
        ["--replay", "in", "--ordered"],
    ],
)
def test_flags_that_do_not_go_together_are_exit_code_2(
    served: labs.Model, words: list[str]
) -> None:
    written("in", prompts(1))
    done = gen(*words)
    assert done.exit_code == 2
    assert "Error: " in done.stderr
    assert not Path("out").exists()


# ---------------------------------------------------------------- lazy


class Source:
    """Lines; counts those that were read."""

    def __init__(self, rows: Iterable[Any]) -> None:
        self.read, self.rows = 0, rows

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        for row in self.rows:
            self.read += 1
            yield self.read, line(row)


@pytest.mark.parametrize("ordered", [True, False])
def test_lines_are_read_as_they_are_needed(
    tiny: labs.Model, monkeypatch: pytest.MonkeyPatch, ordered: bool
) -> None:
    monkeypatch.setattr(labs_jsonl, "WINDOW", 4)
    rows = ({"prompt": "x" * (n % 9 + 1), "max_new_tokens": 1 + n % 5} for n in range(2000))
    source = Source(rows)
    found = labs_jsonl.answer_lines(tiny, CONTEXT, source, labs_jsonl.Tally(), batching(3, ordered))
    for number, _ in enumerate(itertools.islice(found, 60), 1):
        assert source.read <= number + 3 + 2 * 4
    assert source.read > 60


def test_lines_that_wait_for_a_long_one_are_few(
    tiny: labs.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(labs_jsonl, "WINDOW", 4)
    never_ends = {"logit_bias": {"258": -100}}
    rows = [{"prompt": "long", "max_new_tokens": 400, **never_ends}]
    rows += [{"prompt": "x", "max_new_tokens": 2, **never_ends} for _ in range(150)]
    rows[50] = {"prompt": ""}  # a line that is done before it is begun
    source = Source(rows)
    found = labs_jsonl.answer_lines(tiny, CONTEXT, source, labs_jsonl.Tally(), batching(3, True))
    first = whole(next(found))
    assert (first["id"], first["usage"]["completion_tokens"]) == (1, 400)
    assert 4 * 4 < source.read <= 6 * 4
    assert [whole(data)["id"] for data in found] == [*range(2, 152)]


@pytest.mark.parametrize("ordered", [True, False])
def test_lines_of_one_token_are_all_answered(tiny: labs.Model, ordered: bool) -> None:
    rows = [{"prompt": "x", "max_new_tokens": 1}] * 200  # no row is left when a chunk is full
    assert len(answers(tiny, rows, batch_rows=3, ordered=ordered)) == 200


def test_a_bad_line_that_is_due_last_holds_nothing_up(
    tiny: labs.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(labs_jsonl, "WINDOW", 2)
    rows = [b"broken\n"] * 40 + [good(0)] + [b"broken\n"] * 40
    assert len(answers(tiny, rows, ordered=True)) == 81


def test_keys_of_a_million_ids_take_little_memory(tiny: labs.Model) -> None:
    count, share = 125_000, 8
    with open("out", "wb") as file:
        for number in range(count):
            row = {"id": f"a rather long name of request number {number}", "error": None}
            file.write(msgspec.json.encode(row) + b"\n")
    tally = labs_jsonl.Tally()
    tracemalloc.start()
    try:
        labs_jsonl._recover("out", tally)
        memory, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(tally.answered) == count
    assert memory * share < 150e6


# ---------------------------------------------------------------- the same again


def replayed(
    model: labs.Model, rows: Iterable[Any], config: labs.Config = CONFIG, **options: Any
) -> list[labs_jsonl.Verdict]:
    lines = ((number, line(row)) for number, row in enumerate(rows, 1))
    return list(labs_jsonl.replay(model, labs_request.open_context(config), lines, **options))


def verdict(model: labs.Model, row: Any) -> labs_jsonl.Verdict:
    (found,) = replayed(model, [row])
    return found


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


def test_what_nothing_changed_is_the_same(tiny: labs.Model) -> None:
    rows = answers(tiny, REPEATED, ordered=True)
    drawn = rows[2]
    assert isinstance(drawn["seed"], int)
    assert drawn["fingerprint"]["generation"]["seed"] == drawn["seed"]
    found = replayed(tiny, rows, batch_rows=3)
    assert found == [labs_jsonl.Verdict(name_of(row), "same") for row in rows]


def test_other_settings_of_the_run_change_nothing(tiny: labs.Model) -> None:
    rows = answers(tiny, REPEATED, ordered=True)
    config = labs.Config(
        model_id="other",
        generation=labs.Generation(max_new_tokens=2, seed=77, temperature=3.0, stop=("a",)),
    )
    assert {each.verdict for each in replayed(tiny, rows, config)} == {"same"}


def test_settings_of_the_run_are_told_in_its_answers(tiny: labs.Model) -> None:
    config = labs.Config(
        model_id="tiny",
        generation=labs.Generation(max_new_tokens=4, temperature=3.0, top_k=20),
        use_chat_template=False,
    )
    rows = answers(tiny, [{"id": 1, "prompt": "one"}, {"id": 2, "prompt": "two"}], config)
    assert {each.verdict for each in replayed(tiny, rows)} == {"same"}


def test_json_of_the_command_can_be_replayed(served: labs.Model) -> None:
    messages = json.dumps(HELLO)
    data = b""
    for words in (["--prompt", "one"], ["--messages-json", messages, "--temperature", "1.5"]):
        data += gen("--json", *words).stdout_bytes
    data += gen("--json", "--prompt", "x", "--no-use-chat-template", "--seed", "3").stdout_bytes
    Path("answers").write_bytes(MARK + data)
    done = gen("--replay", "answers")
    assert done.stdout == "1: same\n2: same\n3: same\n"
    assert (done.exit_code, done.stderr) == (0, "[3 same, 0 differs, 0 not comparable]\n")


@pytest.mark.parametrize("token", [1, 3, 6])
def test_a_text_that_changed_differs_at_its_token(tiny: labs.Model, token: int) -> None:
    row = answer(tiny, {"id": "a", "prompt": "one", **ONLY_A})
    assert row["text"] == "aaaaaa"
    text = "a" * (token - 1) + "b" + "a" * (6 - token)
    assert verdict(tiny, {**row, "text": text}) == labs_jsonl.Verdict("a", "differs", token)


def test_a_text_that_was_longer_or_shorter_differs_where_it_ends(tiny: labs.Model) -> None:
    row = answer(tiny, {"id": "a", "prompt": "one", **ONLY_A})
    assert verdict(tiny, {**row, "text": "aa"}).token == 3
    assert verdict(tiny, {**row, "text": "a" * 9}).token == 7


def test_an_end_that_comes_earlier_is_the_token_that_differs(tiny: labs.Model) -> None:
    asked = {"id": "a", "prompt": "one", "temperature": 0}
    inputs = labs.build_inputs(tiny, prompt="one")
    with kit.saying(tiny, [97, 98, kit.END], inputs):
        row = answer(tiny, asked)
        assert (row["text"], row["finish_reason"]) == ("ab", "stop")
        assert verdict(tiny, row).verdict == "same"
        assert verdict(tiny, {**row, "text": "abc"}).token == 3


def test_a_character_of_many_tokens_differs_at_its_last(tiny: labs.Model) -> None:
    inputs = labs.build_inputs(tiny, prompt="one")
    with kit.saying(tiny, [*"aé🌍".encode(), kit.END], inputs):
        row = answer(tiny, {"id": "a", "prompt": "one", "temperature": 0, "max_new_tokens": 9})
        assert row["text"] == "aé🌍"
        assert verdict(tiny, {**row, "text": "aè🌍"}).token == 3
        assert verdict(tiny, {**row, "text": "aé🌊"}).token == 7


def test_the_first_token_that_differs_is_of_any_choice(tiny: labs.Model) -> None:
    row = answer(tiny, openai_line("a", n=2, max_tokens=6, **ONLY_A))
    choices = row["response"]["body"]["choices"]
    choices[0]["message"]["content"] = "aaaaba"
    choices[1]["message"]["content"] = "aabaaa"
    assert verdict(tiny, row) == labs_jsonl.Verdict("a", "differs", 3)


@pytest.mark.parametrize(
    ("path", "said"),
    [
        (("revision",), "revision was old, is sha256:"),
        (("versions", "torch"), "torch was old, is "),
        (("versions", "bitsandbytes"), "bitsandbytes was old, is None"),
        (("hardware",), "hardware was old, is "),
        (("dtype",), "dtype was old, is fp32"),
        (("prompt_sha256",), "prompt_sha256 was old, is "),
    ],
)
def test_a_text_of_other_surroundings_is_not_compared(
    tiny: labs.Model, path: tuple[str, ...], said: str
) -> None:
    row = answer(tiny, {"id": "a", "prompt": "one", **ONLY_A})
    *outer, last = path
    functools.reduce(lambda part, name: part[name], outer, row["fingerprint"])[last] = "old"
    assert verdict(tiny, row) == labs_jsonl.Verdict("a", "same")
    found = verdict(tiny, {**row, "text": "aaab"})
    assert (found.verdict, found.token) == ("not comparable", 4)
    assert said in str(found.why)


def test_another_name_of_the_same_model_is_compared(tiny: labs.Model) -> None:
    row = answer(tiny, {"id": "a", "prompt": "one", **ONLY_A})
    row["fingerprint"]["model"] = "elsewhere"
    assert verdict(tiny, {**row, "text": "b"}).verdict == "differs"


def test_another_model_is_told_by_its_name(tiny: labs.Model) -> None:
    row = answer(tiny, {"id": "a", "prompt": "one", **ONLY_A})
    row["fingerprint"] |= {"model": "org/other", "revision": "old"}
    found = verdict(tiny, {**row, "text": "b"})
    assert found.verdict == "not comparable"
    assert found.why == f"model was org/other, is {tiny.spec.model_name}"


def test_a_model_whose_text_depends_on_company_is_not_compared(tiny_folder: Path) -> None:
    model = kit.load(tiny_folder, torch_dtype="bf16", batch_invariant=False)
    row = answer(model, {"id": "a", "prompt": "one", **ONLY_A})
    assert verdict(model, row).verdict == "same"
    found = verdict(model, {**row, "text": "aab"})
    assert (found.verdict, found.token) == ("not comparable", 3)
    assert "bf16" in str(found.why)


def damaged(row: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Return OpenAI's answer with another body."""
    return {**row, "response": {**row["response"], **changes}}


def test_a_line_that_cannot_be_run_again_says_why_and_stops_nothing(tiny: labs.Model) -> None:
    asked = [
        {"id": "a", "prompt": "one"},
        {"id": "bad", "prompt": ""},
        openai_line("b", n=2, **SAMPLED),
        openai_line("refused", stream=True),
    ]
    one, bad, two, refused = answers(tiny, asked, ordered=True)
    body = two["response"]["body"]
    silent = [{**each, "message": {"content": None}} for each in body["choices"]]
    url = {**two["request"], "url": "/v1/embeddings"}
    cases: list[tuple[Any, str]] = [
        (bad, "the old answer is an error"),
        (refused, "the old answer is an error"),
        ({**one, "finish_reason": "timeout"}, "the old answer was cut (timeout)"),
        ({**one, "finish_reason": "cancelled"}, "the old answer was cut (cancelled)"),
        ({k: v for k, v in one.items() if k != "request"}, "does not hold its request"),
        ({k: v for k, v in one.items() if k != "fingerprint"}, "does not hold its request"),
        ({**one, "fingerprint": None}, "does not hold its request"),
        ({**one, "fingerprint": {"model": "x"}}, "not an answer of labs-gen"),
        ({**one, "request": {"prompt": 5}}, "damaged"),
        ({**one, "request": {}}, "not neither"),
        ({**two, "request": url}, "damaged"),
        ({**two, "request": {"url": CHAT}}, "damaged"),
        (damaged(two, body={**body, "choices": body["choices"][:1]}), "damaged"),
        (damaged(two, body={**body, "choices": silent}), "damaged"),
        (damaged(two, body={**body, "choices": [5]}), "damaged"),
        (damaged(two, body="text"), "damaged"),
        ({**two, "response": None}, "the old answer is an error"),
        ({**two, "response": 5}, "damaged"),
        ({"id": "a", "prompt": "one"}, "not an answer of labs-gen"),
        (b"broken\n", "not an answer of labs-gen"),
        (b"[1]\n", "not an answer of labs-gen"),
        (b"\xff\n", "not an answer of labs-gen"),
        (line(one)[:-50], "not an answer of labs-gen"),
    ]
    rows = [each for row, _ in cases for each in (row, one)]
    found = replayed(tiny, rows, batch_rows=4)
    for (row, said), got, same in zip(cases, found[::2], found[1::2], strict=True):
        assert got.verdict == "not comparable", row
        assert said in str(got.why), row
        assert kit.is_one_sentence(Exception(got.why))
        assert same == labs_jsonl.Verdict("a", "same")


def test_blank_lines_between_answers_are_passed_over(tiny: labs.Model) -> None:
    row = answer(tiny, {"id": "a", "prompt": "one"})
    assert replayed(tiny, [b"\n", row, b" \r\n"]) == [labs_jsonl.Verdict("a", "same")]


@pytest.mark.parametrize("asked", [{"id": "a", "prompt": "one"}, openai_line("a")])
def test_an_answer_that_time_cut_is_not_compared(tiny: labs.Model, asked: dict[str, Any]) -> None:
    generation = labs.Generation(max_new_tokens=2000, timeout_s=0.05, logit_bias={258: -100})
    row = answer(tiny, asked, labs.Config(model_id="tiny", generation=generation))
    assert json.dumps(row["fingerprint"]).count('"timeout_s": 0.05')
    assert verdict(tiny, row) == labs_jsonl.Verdict(
        "a", "not comparable", why="the old answer was cut (timeout)"
    )


def test_answers_that_had_time_enough_are_compared(tiny: labs.Model) -> None:
    generation = labs.Generation(max_new_tokens=4, timeout_s=1000)
    rows = answers(tiny, REPEATED, labs.Config(model_id="tiny", generation=generation))
    for row in rows:  # to run them again takes longer
        row["fingerprint"]["generation"]["timeout_s"] = 1e-6
    assert {each.verdict for each in replayed(tiny, rows)} == {"same"}


def test_only_a_comparable_line_that_differs_is_exit_code_1(served: labs.Model) -> None:
    row = answer(served, {"id": "a", "prompt": "one", **ONLY_A})
    other = {**row, "id": "b", "text": "aaab", "fingerprint": {**row["fingerprint"], "dtype": "x"}}
    written("out", [row, other, b"broken\n"])
    done = gen("--replay", "out")
    assert done.exit_code == 0
    lines = done.stdout.splitlines()
    assert lines[0] == "a: same"
    assert lines[1] == "b: not comparable at token 4 (dtype was x, is fp32)"
    assert lines[2].startswith("3: not comparable (line 3 is not an answer of labs-gen")
    written("out", [row, other, {**row, "id": "c", "text": "ab"}])
    done = gen("--replay", "-", input=Path("out").read_bytes())
    assert done.exit_code == 1
    assert done.stdout.splitlines()[2] == "c: differs at token 2"
    assert done.stderr == "[1 same, 1 differs, 1 not comparable]\n"


def test_answers_are_read_as_they_are_needed(
    tiny: labs.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(labs_jsonl, "WINDOW", 4)
    source = Source([answer(tiny, {"id": "a", "prompt": "one"})] * 500)
    found = labs_jsonl.replay(tiny, CONTEXT, source, batch_rows=3)
    verdicts = collections.Counter(each.verdict for each in itertools.islice(found, 20))
    assert verdicts == {"same": 20}
    assert source.read <= 20 + 3 + 2 * 4
