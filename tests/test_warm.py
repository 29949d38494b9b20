# SPDX-License-Identifier: Apache-2.0
"""labs_warm: what is computed ahead is what later requests begin with."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import kit
import msgspec
import pytest
import wire_forms
from kit import invoke, labs_gen, program, serving

import labs
import labs_prefix_folder
import labs_request
import labs_warm

RULES = "Answer in one short sentence. " * 30  # 900 bytes, which are tokens of the tiny model
BYTES = 2**30
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def warm(folder: Path, *words: str, most: int = BYTES, code: int = 0) -> str:
    """Run labs-gen warm with a cache beside the working folder; return what it wrote."""
    options = ("--model", str(folder), "--cache-dir", "cache", "--prefix-disk-bytes", str(most))
    with kit.unfrozen():
        done = invoke("warm", *words, *options)
    assert done.exit_code == code, done.output
    return str(done.output)


def files() -> dict[str, int]:
    place = labs_prefix_folder.place("cache")
    return {path.name: path.stat().st_ino for path, _ in labs_prefix_folder.listed(place)}


@contextlib.contextmanager
def server(folder: Path, **settings: str) -> Iterator[Any]:
    """Run a server on this folder's cache; yield a function that asks it and returns the JSON."""
    variables = {"MODEL": str(folder), "CACHE_DIR": os.path.abspath("cache"), **settings}
    with program(SERVER_PREFIX_DISK_BYTES=str(BYTES), **variables) as process:
        address = serving(process)

        def ask(path: str, key: str = "none", **body: Any) -> Any:
            whole = {"model": "model", "temperature": 0, "max_tokens": 8, **body}
            head = {"Authorization": f"Bearer {key}", "anthropic-version": "2023-06-01"}
            answer = httpx.post(f"{address}{path}", json=whole, headers=head, timeout=60)
            assert answer.status_code == 200, answer.text
            return answer.json()

        yield ask
        process.terminate()
        process.communicate(timeout=kit.WAIT_S)


def asked(text: str, system: str = RULES) -> list[dict[str, str]]:
    return [{"role": "system", "content": system}, {"role": "user", "content": text}]


@pytest.mark.real
def test_the_first_request_of_a_new_server_begins_with_what_was_warmed(tiny_folder):
    with server(tiny_folder) as ask:
        cold = ask(kit.CHAT, messages=asked("Hi!"))
    labs_prefix_folder.clear(labs_prefix_folder.place("cache"))
    Path("rules.txt").write_text(f"{RULES}\n", encoding="utf-8")
    assert warm(tiny_folder, "rules.txt") == "rules.txt: 768 of 904 tokens are kept\n"
    written = files()
    with server(tiny_folder) as ask:
        found = ask(kit.CHAT, messages=asked("Hi!"))
        system, (question,) = RULES, asked("How are you?")[1:]
        again = ask("/v1/messages", system=system, messages=[question])
    assert cold["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert found["usage"]["prompt_tokens_details"]["cached_tokens"] == 768
    assert again["usage"]["cache_read_input_tokens"] == 768
    assert found["choices"] == cold["choices"]
    text = "rules.txt: 768 of 904 tokens are kept, 768 of them from before\n"
    assert warm(tiny_folder, "rules.txt") == text
    assert files().items() >= written.items()  # nothing was written again


@pytest.mark.real
def test_a_chat_begins_with_what_was_warmed_and_says_the_same(tiny_folder):
    Path("rules.txt").write_text(RULES, encoding="utf-8")
    Path("labs.toml").write_text(f"[server]\nprefix_disk_bytes = {BYTES}\n", encoding="utf-8")
    words = ("chat", "--model", str(tiny_folder), "--cache-dir", "cache", "--system", RULES)
    words += ("--verbose", "--max-new-tokens", "8", "--no-history")
    warm(tiny_folder, "rules.txt")
    found = labs_gen(*words, input=b"Hi!\n")
    assert b"cached_tokens 768" in found.stderr, found.stderr.decode()
    labs_prefix_folder.clear(labs_prefix_folder.place("cache"))
    cold = labs_gen(*words, input=b"Hi!\n")
    assert b"cached_tokens 768" not in cold.stderr
    assert found.stdout == cold.stdout


@pytest.mark.real
def test_each_api_key_finds_its_own_copy_and_a_name_chooses_one(tiny_folder, monkeypatch):
    monkeypatch.setenv("LABS_API_KEYS", "one,two")
    Path("rules.txt").write_text(RULES, encoding="utf-8")
    names = [hashlib.sha256(key.encode()).hexdigest()[:12] for key in ("one", "two")]
    text = warm(tiny_folder, "rules.txt", "--key", "three", code=1)
    assert f"has the name 'three' in the log: there are {names[0]}, {names[1]}" in text

    def cached() -> list[int]:
        with server(tiny_folder, API_KEYS="one,two") as ask:
            found = [ask(kit.CHAT, key, messages=asked(key)) for key in ("one", "two")]
        return [each["usage"]["prompt_tokens_details"]["cached_tokens"] for each in found]

    warm(tiny_folder, "rules.txt", "--key", names[1])
    assert len(files()) == 3
    assert cached() == [0, 768]
    labs_prefix_folder.clear(labs_prefix_folder.place("cache"))
    warm(tiny_folder, "rules.txt")
    assert len(files()) == 9  # of both keys, and for labs-gen chat
    assert cached() == [768, 768]
    monkeypatch.delenv("LABS_API_KEYS")
    text = warm(tiny_folder, "rules.txt", "--key", names[1], code=1)
    assert "in the log: none is configured" in text


def test_lines_are_requests_as_for_a_batch(tiny_folder):
    turns = [*asked("Why?"), {"role": "assistant", "content": "Because. " * 40}]
    question = {"role": "user", "content": "And then?"}
    rows: list[Any] = [
        {"id": "a", "messages": asked("Why?")},
        {"id": "b", "messages": turns},
        {"id": "c", "prompt": "Hi!"},
        kit.openai_line("d", messages=[*turns, question]),
        kit.openai_line("e", "/v1/completions", prompt=[RULES, "x" * 512]),
        {"id": "f", "messages": [*asked("Hi!"), {"role": "user"}, {"role": "odd"}]},
        kit.openai_line("g", "/v1/embeddings", input="Hi!"),
        {"id": "h", "prompt": "x" * 5000},
        {"id": "i", "prompt": "x", "temprature": 1},
    ]
    data = "".join(f"{json.dumps(row)}\n" for row in rows)
    Path("rows.jsonl").write_text(f"{data}\nHi!\n", encoding="utf-8")
    lines = warm(tiny_folder, "rows.jsonl", code=1).splitlines()
    assert [line.removeprefix("rows.jsonl: ") for line in lines[:6]] == [
        "a: 768 of 910 tokens are kept",
        "b: 1,024 of 1,272 tokens are kept, 768 of them from before",
        "c: 0 of 7 tokens are kept: only whole chunks of 256 are",
        "d: 1,280 of 1,283 tokens are kept, 1,024 of them from before",
        "e: 768 of 901 tokens are kept",
        "e: 512 of 513 tokens are kept",
    ]
    wrong = ("f: the line cannot be used", "g: it asks for vectors", "h: This model's maximum")
    wrong += ("i: the line cannot be used", "line 11: the line is not a JSON object")
    for line, begin in zip(lines[6:], wrong, strict=True):
        assert line.startswith(f"rows.jsonl: {begin}"), line
    with server(tiny_folder) as ask:
        found = ask(kit.CHAT, messages=[*turns, question])
        assert found["usage"]["prompt_tokens_details"]["cached_tokens"] == 1280


def beginning(model: labs.Model, **prompt: Any) -> labs_warm.Beginning:
    context = labs_request.open_context(labs.Config(model_id="tiny"))
    request = labs_request.Request(prompts=(labs_request.Prompt(**prompt),))
    (found,) = labs_warm.beginnings(context, model, request)
    return found


def test_a_beginning_is_what_a_prompt_has_in_common_with_any_that_goes_on(tiny):
    model = msgspec.structs.replace(tiny, tokenizer=wire_forms.tokenizer_of("hermes"))
    rules = labs.Message(role="system", content="Be brief.")
    hello = labs.Message(role="user", content="Hello")
    answer = labs.Message(role="assistant", content="Hi.")
    tool = labs_request.labs_dialogue.check_tools([TOOL])
    for turns in ((rules,), (rules, hello, answer), (rules, hello)):
        found = beginning(model, messages=turns, tools=tool)
        later = [labs.Message(role="user", content="Why?")] if turns[-1] is not hello else []
        whole = labs.build_inputs(model, messages=[*turns, *later], tools=tool).input_ids
        assert whole[: found.tokens] == found.ids[: found.tokens]
        assert model.tokenizer.decode(whole[found.tokens :]).startswith("Why?" if later else "")
        assert len(found.ids) - found.tokens == (1 if later else 0)
    (raw,) = {beginning(tiny, prompt="Hi!", use_chat_template=False).ids}
    assert raw == labs.build_inputs(tiny, prompt="Hi!", use_chat_template=False).input_ids


def test_tools_are_part_of_what_is_warmed(tmp_path):
    tokenizer, config = wire_forms.tokenizer_of("hermes"), kit.llama()
    config.vocab_size = len(tokenizer)
    model = kit.save_model(tmp_path / "m", config)
    tokenizer.save_pretrained(model)
    Path("rules.txt").write_text(RULES, encoding="utf-8")
    Path("tools.json").write_text(json.dumps([TOOL]), encoding="utf-8")
    warm(model, "rules.txt", "--tools", "tools.json")
    plain = warm(model, "rules.txt")
    assert "from before" not in plain
    rows = {"messages": asked("Hi!"), "tools": [TOOL]}
    Path("rows.jsonl").write_text(json.dumps(rows), encoding="utf-8")
    assert "768 of them from before" in warm(model, "rows.jsonl")
    text = warm(model, "rows.jsonl", "--tools", "tools.json", code=2)
    assert "--tools goes with a text" in text


@pytest.mark.parametrize(
    ("name", "data", "error"),
    [
        ("rules.txt", b"", "rules.txt: the file is empty"),
        ("rules.txt", b" \n\n", "rules.txt: the file is empty"),
        ("rows.jsonl", b"\n \n", "rows.jsonl: the file is empty"),
        ("rules.txt", b"a\xff", "byte 0xff at position 1 of rules.txt is not UTF-8"),
        ("rules.txt", b"a" * 1_000_001, "has 1000001 bytes, server_max_prompt_bytes is 1000000"),
        ("rules.txt", b"a" * 5_000_000, "rules.txt: is too large for server_max_prompt_bytes"),
        ("rules.txt", b"a" * 5000, "rules.txt: This model's maximum context length is 4096"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused(name, data, error, tiny_folder, monkeypatch):
    monkeypatch.setenv("LABS_SERVER_MAX_PROMPT_BYTES", "1000000")
    Path(name).write_bytes(data)
    assert error in warm(tiny_folder, name, code=1)
    assert files() == {}


def test_a_file_that_is_not_there_or_no_bytes_are_refused_before_the_model_loads(tiny_folder):
    assert "rules.txt: No such file" in warm(tiny_folder, "rules.txt", code=1)
    Path("rules.txt").write_text(RULES, encoding="utf-8")
    text = warm(Path("no-model"), "rules.txt", most=0, code=1)
    assert "prefix_disk_bytes = 0: nothing is kept on disk" in text
    assert "labs-gen settings prefix_disk_bytes shows what it may be" in text


def test_a_model_without_reusable_prefixes_is_refused(tmp_path):
    config = kit.random_model("mamba2", vocab_size=262).config
    model = kit.save_model(tmp_path / "m", config)
    Path("rules.txt").write_text(RULES, encoding="utf-8")
    text = warm(model, "rules.txt", code=1)
    assert "prefixes cannot be kept: the model has more than keys and values" in text


def test_what_the_bytes_or_the_disk_do_not_take_is_said(tiny_folder, monkeypatch, caplog):
    Path("rules.txt").write_text(RULES, encoding="utf-8")
    warm(tiny_folder, "rules.txt")
    one = labs_prefix_folder.listed(labs_prefix_folder.place("cache"))[0][1].st_size
    rows = [{"prompt": letter * 700} for letter in "abcd"]
    Path("rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), "utf-8")
    text = warm(tiny_folder, "rows.jsonl", most=5 * one, code=1)
    assert f"of these were deleted for later ones: prefix_disk_bytes = {5 * one}" in text
    with caplog.at_level(logging.WARNING, "labs.prefixes"):
        text = warm(tiny_folder, "rules.txt", most=one - 1, code=1)
    assert "0 of 904 tokens are kept: the disk took no more" in text


def test_only_what_is_missing_is_computed_and_after_ctrl_c_the_rest(tiny, monkeypatch, tmp_path):
    spec = labs.ModelSpec(model_name="tiny", cache_dir=str(tmp_path / "cache"))
    server = labs.Server(prefix_disk_bytes=BYTES)
    config = labs.Config(model_id="tiny", model=spec, server=server)
    model = msgspec.structs.replace(tiny, spec=spec)
    monkeypatch.setattr(labs, "load_model", lambda config: model)
    monkeypatch.setattr(labs_warm, "AT_ONCE", 2)
    context = labs_request.open_context(config)
    prompt = labs_request.Prompt(prompt="abc" * 400)
    ahead = labs_warm.Ahead("a", labs_request.Request(prompts=(prompt,)))

    def run() -> tuple[list[str], int]:
        calls: list[int] = []
        real = labs_warm.labs_decode.prefill

        def counted(decoder: Any, batch: Any) -> Any:
            if len(calls) == stop:
                raise KeyboardInterrupt
            calls.append(1)
            return real(decoder, batch)

        with monkeypatch.context() as patch:
            patch.setattr(labs_warm.labs_decode, "prefill", counted)
            try:
                lines = [*labs_warm.Warmer(context, config, ("",)).lines([ahead])]
            except KeyboardInterrupt:
                lines = []
        return lines, len(calls)

    stop = 3
    assert run() == ([], 3)
    stop = 100
    assert run() == (["a: 1,024 of 1,204 tokens are kept, 512 of them from before"], 2)
    assert run() == (["a: 1,024 of 1,204 tokens are kept, 1,024 of them from before"], 0)
