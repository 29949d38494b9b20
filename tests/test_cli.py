"""Tests of labs-gen: logic on faked labs functions, a few true runs of the default model."""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from kit import MODEL, ONE_THREAD, FakeLabs, gen, heed_sigint, invoke, labs_gen, read_until, start

import labs
import labs_chat
import labs_cli
import labs_request

ROOT = Path(__file__).parent.parent
STORY = "Write a long story about a king and his two sons."


labs_load_config = labs.load_config


@pytest.fixture(autouse=True)
def bare_surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the settings of this machine out: no labs.toml, no .env, no LABS_ variables."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("LABS_")]:
        if name != "LABS_CACHE_DIR":
            monkeypatch.delenv(name)


# What is asked


def test_a_prompt_alone_is_passed_as_a_prompt(fake_labs: FakeLabs) -> None:
    assert invoke("--prompt", "Hi").exit_code == 0
    assert fake_labs.requests[0]["prompt"] == "Hi"


def test_a_pipe_is_the_prompt_when_there_is_no_flag(fake_labs: FakeLabs) -> None:
    invoke(input="from a pipe\n")
    assert fake_labs.requests[0]["prompt"] == "from a pipe"


def test_a_dash_reads_the_prompt_from_standard_input(fake_labs: FakeLabs) -> None:
    invoke("--prompt", "-", input="two\nlines\r\n")
    assert fake_labs.requests[0]["prompt"] == "two\nlines"


def test_a_byte_order_mark_is_not_part_of_the_prompt(fake_labs: FakeLabs) -> None:
    invoke(input=b"\xef\xbb\xbfHi")
    assert fake_labs.requests[0]["prompt"] == "Hi"


def test_a_system_message_comes_before_the_prompt(fake_labs: FakeLabs) -> None:
    invoke("--prompt", "Hi", "--system", "Be brief.")
    assert fake_labs.requests[0]["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
    ]


def test_messages_come_from_json(fake_labs: FakeLabs) -> None:
    invoke("--messages-json", '[{"role": "user", "content": "Hi"}]')
    assert fake_labs.requests[0]["messages"] == [{"role": "user", "content": "Hi"}]


def test_messages_come_from_a_file(fake_labs: FakeLabs, tmp_path: Path) -> None:
    (tmp_path / "m.json").write_text('[{"role": "user", "content": "Grüße"}]', encoding="utf-8")
    invoke("--messages-file", "m.json", "--system", "Be brief.")
    assert [message["content"] for message in fake_labs.requests[0]["messages"]] == [
        "Be brief.",
        "Grüße",
    ]


def test_messages_come_from_standard_input(fake_labs: FakeLabs) -> None:
    invoke("--messages-file", "-", input='[{"role": "user", "content": "Hi"}]')
    assert fake_labs.requests[0]["messages"] == [{"role": "user", "content": "Hi"}]


@pytest.mark.parametrize("given", [True, False])
def test_the_chat_toggles_of_the_configuration_reach_build_inputs(
    fake_labs: FakeLabs, given: bool
) -> None:
    no = "" if given else "no-"
    invoke("--prompt", "Hi", f"--{no}use-chat-template", f"--{no}add-generation-prompt")
    assert fake_labs.requests[0]["use_chat_template"] is given
    assert fake_labs.requests[0]["add_generation_prompt"] is given


# Flags and settings


def test_every_setting_is_a_flag() -> None:
    flags = {name for option in gen().params for name in option.opts}
    assert {"--" + setting.key.replace("_", "-") for setting in labs_cli.SETTINGS} <= flags


def test_only_given_flags_override(fake_labs: FakeLabs) -> None:
    invoke("--prompt", "Hi")
    assert fake_labs.overrides == {}


@pytest.mark.parametrize(
    ("arguments", "overrides"),
    [
        (["--temperature", "0"], {"temperature": 0.0}),
        (["--max-new-tokens", "7"], {"max_new_tokens": 7}),
        (["--stop", "a", "--stop", "\n"], {"stop": ("a", "\n")}),
        (["--load-in-4bit"], {"load_in_4bit": True}),
        (["--no-do-sample"], {"do_sample": False}),
        (["--do-sample"], {"do_sample": True}),
        (["--offline"], {"local_files_only": True}),
        (["--no-local-files-only"], {"local_files_only": False}),
        (["--model", "a/b"], {"model_name": "a/b"}),
        (["--logit-bias", '{"5": -1.5}'], {"logit_bias": {"5": -1.5}}),
    ],
)
def test_a_flag_becomes_an_override(
    fake_labs: FakeLabs, arguments: list[str], overrides: Any
) -> None:
    result = invoke("--prompt", "Hi", *arguments)
    assert (fake_labs.overrides, result.exit_code) == (overrides, 0), result.stderr


def test_show_config_needs_no_prompt_and_no_model(fake_labs: FakeLabs) -> None:
    result = invoke("--show-config", "--temperature", "0.25")
    assert (result.exit_code, fake_labs.requests) == (0, [])
    assert "temperature = 0.25" in result.stdout


def test_a_value_out_of_bounds_is_one_line_and_exit_code_1() -> None:
    result = invoke("--prompt", "Hi", "--temperature", "-3")
    assert (result.exit_code, result.stdout) == (1, "")
    assert re.fullmatch(r"Error: .*temperature.*\n", result.stderr)


def test_a_missing_config_file_is_one_line_and_exit_code_1() -> None:
    result = invoke("--prompt", "Hi", "--config", "absent.toml")
    assert (result.exit_code, result.stdout) == (1, "")
    assert re.fullmatch(r"Error: .*absent\.toml.*\n", result.stderr)


def test_help_fits_80_columns_of_ascii() -> None:
    text = invoke("--help").stdout
    assert text.isascii()
    assert max(map(len, text.splitlines())) <= 80


def test_help_has_every_option_under_a_title() -> None:
    text = invoke("--help").stdout
    titles = re.findall(r"^(\w+):$", text, re.MULTILINE)
    own = ["Input", "Output", "Batch", "Documents", "Vendoring", "Ray"]
    assert titles == [*own, "Model", "Generation", "Quantization", "Other"]
    for option in gen().params:
        assert option.opts[0] in text


def test_the_examples_in_the_help_parse() -> None:
    command = gen()
    examples = re.findall(r"labs-gen (--.*)", labs_cli.EPILOG)
    assert len(examples) >= 6
    for example in examples:
        words = re.findall(r"'[^']*'|\"[^\"]*\"|[^\s<]+", example.split(" <")[0])
        command.make_context("labs-gen", [word.strip("'\"") for word in words])


def test_the_version_is_that_of_labs() -> None:
    assert invoke("--version").stdout == f"labs-gen {labs.__version__}\n"


# Wrong usage


@pytest.mark.parametrize(
    "arguments",
    [
        ["--no-such-flag"],
        ["--temperature", "warm"],
        ["--logit-bias", "{x"],
        ["--prompt", ""],
        ["--messages-json", "[]"],
        ["--prompt", "a", "--messages-json", "[]"],
        ["--prompt", "a", "--messages-file", "f"],
        ["--messages-json", "[]", "--messages-file", "f"],
        ["--chat", "--prompt", "a"],
        ["--chat", "--json"],
        ["--json", "--stream", "--prompt", "a"],
        ["--system", "a", "--messages-json", '[{"role": "system", "content": "b"}]'],
        ["an argument"],
    ],
)
def test_wrong_usage_is_exit_code_2(fake_labs: FakeLabs, arguments: list[str]) -> None:
    result = invoke(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "Error: " in result.stderr


@pytest.mark.parametrize("text", ["", "\n", " \n"])
def test_an_empty_pipe_is_exit_code_2(fake_labs: FakeLabs, text: str) -> None:
    result = invoke(input=text)
    assert (result.exit_code, fake_labs.requests) == (2, [])
    assert "no prompt" in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["--messages-json", "{"],
        ["--messages-json", '{"role": "user"}'],
        ["--messages-json", '[{"role": "user", "content": 5}]'],
        ["--messages-json", '[{"role": "tool", "content": "a"}]'],
        ["--messages-file", "absent.json"],
        ["--messages-file", "."],
    ],
)
def test_messages_that_cannot_be_read_are_exit_code_1(
    fake_labs: FakeLabs, arguments: list[str]
) -> None:
    result = invoke(*arguments)
    assert (result.exit_code, result.stdout) == (1, "")
    assert re.fullmatch(r"Error: .+\n", result.stderr)


def test_bytes_that_are_not_utf8_are_named(fake_labs: FakeLabs) -> None:
    result = invoke(input=b"ab\xff")
    assert result.exit_code == 1
    assert "byte 0xff at position 2 of standard input" in result.stderr


# What is written


def test_the_answer_alone_is_on_standard_output(fake_labs: FakeLabs) -> None:
    result = invoke("--prompt", "Hi", "--verbose")
    assert result.stdout == "Hello there\n"


@pytest.mark.parametrize("flag", ["--stream", "--no-stream"])
def test_streamed_or_not_the_bytes_are_the_same(fake_labs: FakeLabs, flag: str) -> None:
    assert invoke("--prompt", "Hi", flag).stdout == "Hello there\n"


def test_a_stream_writes_what_came_before_an_error(fake_labs: FakeLabs) -> None:
    fake_labs.error = labs.GenerationError("the logits are not finite")
    result = invoke("--prompt", "Hi", "--stream")
    assert (result.exit_code, result.stdout) == (1, "Hello there")
    assert result.stderr == "Error: the logits are not finite\n"


def test_escape_sequences_of_the_model_are_not_removed(fake_labs: FakeLabs) -> None:
    fake_labs.pieces = ["\x1b[1mbold\x1b[0m"]
    assert invoke("--prompt", "Hi").stdout == "\x1b[1mbold\x1b[0m\n"


def test_json_is_one_object_with_text_usage_timings_and_settings(fake_labs: FakeLabs) -> None:
    result = json.loads(invoke("--prompt", "Hi", "--json", "--temperature", "0.5").stdout)
    assert result["text"] == "Hello there"
    assert result["finish_reason"] == "stop"
    assert result["usage"]["completion_tokens"] == 4
    assert result["timings"]["decode_s"] == 0.5
    assert result["settings"]["temperature"] == 0.5


def test_json_settings_hold_every_setting_and_no_secret(
    fake_labs: FakeLabs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    text = invoke("--prompt", "Hi", "--json").stdout
    assert set(json.loads(text)["settings"]) == {setting.key for setting in labs_cli.SETTINGS}
    assert "hf_secret" not in text


@pytest.mark.parametrize(("left", "told"), [(97, "room for 97 more"), (None, "no limit")])
def test_explain_tells_what_would_run_and_runs_nothing(
    left: int | None, told: str, fake_labs: FakeLabs, monkeypatch: pytest.MonkeyPatch
) -> None:
    value = labs_request.SettingValue
    used = {"top_k": value(7, "--top-k"), "stop": value(None, "default")}
    sizes = (8, 2 * 10**6, 10**5)
    rest = ("joins", "as it can", True, *sizes, used)
    found = labs_request.Explanation("templated", 3, left, *rest)
    monkeypatch.setattr(labs_request, "explain", lambda *_: found)
    fake_labs.error = AssertionError("generated")
    text = invoke("--prompt", "Hi", "--explain").stdout
    assert text.startswith("templated\n---\nprompt tokens: 3;")
    assert f"{told}\nruns: joins (as it can); up to 8 rows at once" in text
    assert (
        "same text whatever else is in the batch: yes\nmemory: weights 2 MB, this request 0.1 MB"
        in text
    )
    assert text.endswith("---\ntop_k = 7  # --top-k\nstop = unset  # default\n")
    assert fake_labs.closed == 0


@pytest.mark.parametrize("rival", ["--chat", "--json", "--stream", "--verbose"])
def test_explain_and_what_would_have_no_effect_beside_it_exclude_each_other(
    rival: str, fake_labs: FakeLabs
) -> None:
    prompt = [] if rival == "--chat" else ["--prompt", "Hi"]
    result = invoke(*prompt, "--explain", rival)
    assert result.exit_code == 2
    assert "exclude each other" in result.stderr


@pytest.mark.parametrize("mode", ["--input", "--replay", "--index"])
@pytest.mark.parametrize("rival", ["--verbose", "--show-config"])
def test_what_would_have_no_effect_on_files_is_refused(mode: str, rival: str) -> None:
    result = invoke(mode, "a.jsonl", rival)
    assert (result.exit_code, "exclude each other" in result.stderr) == (2, True)


FLAGS = {flag.partition("/")[0]: kind for _, flag, kind, _ in labs_cli.OPTIONS}
ASKED = "--prompt --system --config"
TOGETHER = {  # what is done, and what has an effect on it
    "--vendor": "--rooms --check",
    "--show-config": "--config",
    "--input": "--config --output --batch-rows --ordered --ray",
    "--replay": "--config --batch-rows",
    "--index": "--config",
    "--explain": ASKED + " --messages-json --messages-file",
    "--choose": ASKED + " --messages-json --messages-file --json",
    "--json": ASKED + " --messages-json --messages-file --choose --verbose --schema",
    "--chat": "--system --config --messages-json --messages-file --stream --verbose --schema",
}


@pytest.mark.parametrize("done", TOGETHER)
def test_of_two_flags_both_have_an_effect_or_they_are_refused(
    done: str, fake_labs: FakeLabs
) -> None:
    for other in FLAGS.keys() - {done}:
        words = []
        for flag in (done, other):
            words += [flag] if FLAGS[flag] is bool else [f"{flag}=1"]
        params = gen().make_context("labs-gen", words).params
        if other in TOGETHER[done].split():
            labs_cli.check_flags(params)
        else:
            with pytest.raises(click.UsageError, match=r"exclude|needs"):
                labs_cli.check_flags(params)


@pytest.mark.parametrize(
    "words",
    [
        ["--show-config", "--prompt", "x"],
        ["--show-config", "--chat"],
        ["--show-config", "--json"],
        ["--show-config", "--schema", "x"],
        ["--show-config", "--system", "x"],
        ["--vendor", "x", "--no-do-sample"],
    ],
)
def test_a_flag_that_would_be_dropped_is_refused(words: list[str]) -> None:
    result = invoke(*words)
    assert (result.exit_code, result.stdout) == (2, "")
    assert re.search("--[a-z-]+ and --[a-z-]+ exclude each other", result.stderr)


def test_verbose_and_choose_exclude_each_other() -> None:
    result = invoke("--prompt", "Hi", "--choose", "a", "--choose", "b", "--verbose")
    assert (result.exit_code, "exclude each other" in result.stderr) == (2, True)


def test_verbose_tells_where_the_time_went(fake_labs: FakeLabs) -> None:
    stderr = invoke("--prompt", "Hi", "--verbose").stderr
    assert "completion_tokens 4" in stderr
    assert "load_s 1, prefill_s 0.25, decode_s 0.5, tokens_per_s 8]" in stderr


def test_verbose_tells_which_limit_cut_the_answer(fake_labs: FakeLabs) -> None:
    fake_labs.finish_reason = "length"
    assert "--max-new-tokens" in invoke("--prompt", "Hi", "--verbose").stderr


def test_without_verbose_standard_error_is_silent(fake_labs: FakeLabs) -> None:
    fake_labs.finish_reason = "length"
    assert invoke("--prompt", "Hi").stderr == ""


# Failures


def test_an_error_nobody_foresaw_keeps_its_name(fake_labs: FakeLabs) -> None:
    fake_labs.error = ZeroDivisionError("oh")
    result = invoke("--prompt", "Hi")
    assert result.exit_code == 1
    assert result.stderr == "Error: ZeroDivisionError: oh (LABS_DEBUG=1 shows the traceback)\n"


def test_standard_output_is_blamed_for_its_own_errors_only(fake_labs: FakeLabs) -> None:
    fake_labs.error = OSError(5, "Input/output error")
    told = "Error: OSError: [Errno 5] Input/output error (LABS_DEBUG=1 shows the traceback)\n"
    assert invoke("--prompt", "Hi").stderr == told


def test_labs_debug_lets_the_traceback_through(
    fake_labs: FakeLabs, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_labs.error = labs.GenerationError("oh")
    monkeypatch.setenv("LABS_DEBUG", "1")
    result = invoke("--prompt", "Hi")
    assert isinstance(result.exception, labs.GenerationError)


def test_ctrl_c_is_exit_code_130_and_stops_the_computing(fake_labs: FakeLabs) -> None:
    fake_labs.error = KeyboardInterrupt()
    result = invoke("--prompt", "Hi")
    assert (result.exit_code, fake_labs.closed) == (130, 1)


# Before and while the model is loaded


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--prompt", "a bad one"], "deny[0]"),
        (["--messages-json", '[{"role": "user", "content": "bad"}]'], "deny[0]"),
        (["--prompt", "Hi", "--logprobs", "1"], "logprobs"),
        (["--chat", "--logprobs", "1"], "logprobs"),
        (["--prompt", "Hi", "--schema", "absent.json"], "absent.json"),
        (["--prompt", "\udcff"], "lone surrogate"),
    ],
)
def test_what_cannot_work_is_refused_before_the_model_is_loaded(
    arguments: list[str], told: str, fake_labs: FakeLabs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(labs, "load_model", lambda config: pytest.fail("loaded"))
    Path("labs.toml").write_text('[guard]\ndeny = ["bad"]\n')
    result = invoke(*arguments)
    assert (result.exit_code, result.stdout) == (1, "")
    assert told in result.stderr


def test_garbage_is_not_collected_while_the_model_is_loaded(
    fake_labs: FakeLabs, monkeypatch: pytest.MonkeyPatch
) -> None:
    collects: list[bool] = []

    def load(config: Any) -> Any:
        collects.append(gc.isenabled())
        return MODEL

    monkeypatch.setattr(labs, "load_model", load)
    assert invoke("--prompt", "Hi").exit_code == 0
    assert [*collects, gc.isenabled()] == [False, True]


# Chat


def test_a_chat_remembers_both_sides(fake_labs: FakeLabs) -> None:
    result = invoke("--chat", input="one\ntwo\n")
    assert result.stdout == "Hello there\nHello there\n"
    assert fake_labs.requests[1]["messages"] == [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "Hello there"},
        {"role": "user", "content": "two"},
    ]


def test_a_chat_begins_with_the_system_message_and_the_messages(fake_labs: FakeLabs) -> None:
    start = '[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]'
    invoke("--chat", "--system", "S", "--messages-json", start, input="c\n")
    assert [m["content"] for m in fake_labs.requests[0]["messages"]] == ["S", "a", "b", "c"]


def test_quotes_hold_a_message_of_many_lines(fake_labs: FakeLabs) -> None:
    invoke("--chat", input='"""one\n/exit\n\ntwo"""\nthree\n')
    contents = [request["messages"][-1]["content"] for request in fake_labs.requests]
    assert contents == ["one\n/exit\n\ntwo", "three"]


def test_an_empty_line_is_not_a_message(fake_labs: FakeLabs) -> None:
    invoke("--chat", input='\n  \n""""""\n')
    assert fake_labs.requests == []


def test_system_replaces_the_system_message(fake_labs: FakeLabs) -> None:
    invoke("--chat", "--system", "S", input="/system T\none\n/system\ntwo\n")
    roles = [[m["role"] for m in request["messages"]] for request in fake_labs.requests]
    assert fake_labs.requests[0]["messages"][0]["content"] == "T"
    assert roles == [["system", "user"], ["user", "assistant", "user"]]


def test_reset_forgets_all_but_the_system_message(fake_labs: FakeLabs) -> None:
    invoke("--chat", "--system", "S", input="one\n/reset\ntwo\n")
    assert [m["content"] for m in fake_labs.requests[1]["messages"]] == ["S", "two"]


def test_exit_ends_the_chat(fake_labs: FakeLabs) -> None:
    result = invoke("--chat", input="/exit\none\n")
    assert (result.exit_code, fake_labs.requests) == (0, [])


def test_save_writes_messages_that_messages_file_reads(fake_labs: FakeLabs, tmp_path: Path) -> None:
    invoke("--chat", input="one\n/save my talk.json\n")
    invoke("--messages-file", "my talk.json")
    assert [m["content"] for m in fake_labs.requests[1]["messages"]] == ["one", "Hello there"]
    assert [path.name for path in tmp_path.iterdir()] == ["my talk.json"]


def test_a_save_that_fails_does_not_end_the_chat(fake_labs: FakeLabs) -> None:
    result = invoke("--chat", input="/save no/such/folder.json\none\n")
    assert "no/such/folder.json" in result.stderr
    assert result.stdout == "Hello there\n"


def test_an_unknown_command_is_not_sent_to_the_model(fake_labs: FakeLabs) -> None:
    result = invoke("--chat", input="/wat\n")
    assert "/wat" in result.stderr
    assert fake_labs.requests == []


def test_help_in_the_chat_lists_every_command(fake_labs: FakeLabs) -> None:
    stderr = invoke("--chat", input="/help\n").stderr
    assert all(name in stderr for name in ("/system", "/reset", "/save", "/help", "/exit"))


class Narrow(FakeLabs):
    """A model whose context holds so many characters of messages."""

    room = 20

    def stream_generate(self, model: Any, inputs: Any, generation: Any, *, processors: Any) -> Any:
        found = self.requests[-1]["messages"]
        if sum(len(message["content"]) for message in found) > self.room:
            raise labs.PromptTooLong("the context holds 20; shorten the prompt")
        return super().stream_generate(model, inputs, generation, processors=processors)


@pytest.fixture
def narrow(fake_labs: FakeLabs, monkeypatch: pytest.MonkeyPatch) -> Narrow:
    found = Narrow()
    for name in ("build_inputs", "stream_generate"):
        monkeypatch.setattr(labs, name, getattr(found, name))
    return found


def test_a_chat_that_outgrows_the_context_leaves_out_its_oldest_turns(narrow: Narrow) -> None:
    narrow.pieces = ["answer"]
    done = invoke("--chat", "--system", "Sys", input="one\ntwo\nthree\nfour\n/save t.json\n")
    told = re.findall(r"oldest (\d+) messages are left out", done.stderr)
    assert (done.stdout, told) == ("answer\n" * 4, ["2", "2"])  # once each time
    last = [message["content"] for message in narrow.requests[-1]["messages"]]
    assert last == ["Sys", "three", "answer", "four"]
    saved = [each["content"] for each in json.loads(Path("t.json").read_text())]
    assert saved == [*last, "answer"]


def test_a_question_that_fits_no_context_is_refused_and_forgets_nothing(narrow: Narrow) -> None:
    narrow.pieces = ["answer"]
    done = invoke("--chat", "--system", "Sys", input=f"one\n{'long ' * 9}\ntwo\n")
    assert "Error: the context holds 20" in done.stderr
    assert "--max-new-tokens" in done.stderr
    assert "left out" not in done.stderr
    last = [message["content"] for message in narrow.requests[-1]["messages"]]
    assert last == ["Sys", "one", "answer", "two"]


def test_a_conversation_keeps_each_system_message_and_whole_turns() -> None:
    roles = ["system", "user", "assistant", "assistant", "system", "user", "assistant", "user"]
    talk = [labs.Message(role=role, content=str(n)) for n, role in enumerate(roles)]  # type: ignore
    shorter = labs_chat.without_oldest(talk)
    assert [each.content for each in shorter or ()] == ["0", "4", "5", "6", "7"]
    shorter = labs_chat.without_oldest(shorter or [])
    assert [each.content for each in shorter or ()] == ["0", "4", "7"]
    assert labs_chat.without_oldest(shorter or []) is None


def test_ctrl_c_stops_the_answer_and_keeps_what_was_said(fake_labs: FakeLabs) -> None:
    fake_labs.error = KeyboardInterrupt()
    result = invoke("--chat", "--stream", input="one\ntwo\n")
    assert result.exit_code == 0
    assert [m["content"] for m in fake_labs.requests[1]["messages"]] == [
        "one",
        "Hello there",
        "two",
    ]


def test_a_turn_that_fails_is_forgotten_and_the_chat_goes_on(fake_labs: FakeLabs) -> None:
    fake_labs.pieces, fake_labs.error = [], labs.PromptTooLong("too long")
    result = invoke("--chat", input="one\ntwo\n")
    assert "Error: too long" in result.stderr
    assert [m["content"] for m in fake_labs.requests[1]["messages"]] == ["two"]


# The program itself, on the default model


def test_the_default_model_answers_and_says_nothing_else() -> None:
    done = labs_gen("--prompt", "What is the capital of France?", "--max-new-tokens", "20")
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"Paris" in done.stdout


@pytest.mark.parametrize("flag", ["--load-in-8bit", "--load-in-4bit"])
def test_weights_in_fewer_bits_answer_and_say_nothing_else(flag: str) -> None:
    pytest.importorskip("bitsandbytes")
    done = labs_gen("--prompt", "Name a river.", flag, "--max-new-tokens", "3")
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.strip()


def test_a_pipe_into_json_gives_an_object_to_parse() -> None:
    done = labs_gen("--json", "--max-new-tokens", "4", input=b"Count to ten.\n")
    result = json.loads(done.stdout)
    assert result["usage"]["completion_tokens"] == 4
    assert result["finish_reason"] == "length"
    assert result["settings"]["max_new_tokens"] == 4


def test_streamed_and_whole_answers_are_the_same_bytes() -> None:
    arguments = ["--prompt", "Name three rivers.", "--max-new-tokens", "24"]
    assert labs_gen("--stream", *arguments).stdout == labs_gen(*arguments).stdout


def test_a_closed_pipe_ends_it_quietly() -> None:
    process = start(
        *("--prompt", STORY, "--stream", "--max-new-tokens", "4000"),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.read(1)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(timeout=60) == 0


def test_sigint_is_exit_code_130_and_no_traceback() -> None:
    process = start(
        *("--prompt", STORY, "--stream", "--max-new-tokens", "4000"),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    assert process.stderr.read().strip() == b""
    assert process.wait(timeout=60) == 130


@pytest.mark.parametrize("locale", ["C", "POSIX", "en_US.ISO-8859-1"])
def test_any_locale_is_utf8(locale: str) -> None:
    environment = {**os.environ, "LC_ALL": locale, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    text = "Grüße 漢字 🌍"
    done = labs_gen("--show-config", "--stop", text, env=environment)
    assert (done.returncode, done.stderr) == (0, b"")
    assert text in done.stdout.decode()


def test_standard_output_that_is_closed_or_full_is_one_line() -> None:
    command = f'"{sys.executable}" "{ROOT / "labs_cli.py"}" --show-config'
    for redirection in (">&-", ">/dev/full"):
        done = subprocess.run(
            f"{command} {redirection}", shell=True, capture_output=True, check=False
        )
        assert done.returncode == 1
        assert re.fullmatch(rb"Error: standard output(:| is) .*\n", done.stderr)


def test_a_chat_on_a_terminal_survives_ctrl_c() -> None:
    pty = pytest.importorskip("pty")
    terminal, child = pty.openpty()
    arguments = ["--chat", "--max-new-tokens", "4000"]
    # A session of its own with this terminal: its Ctrl-C reaches the child and not pytest.

    def begin() -> None:
        heed_sigint()
        os.login_tty(child)

    process = start(*arguments, stdin=child, stdout=child, stderr=child, preexec_fn=begin)
    os.close(child)
    try:
        read_until(terminal, "> ")
        os.write(terminal, STORY.encode() + b"\n")
        read_until(terminal, "king", read_until(terminal, "\n").split("\n")[1])
        os.write(terminal, b"\x03")
        read_until(terminal, "> ", read_until(terminal, "[stopped]").split("[stopped]")[1])
        os.write(terminal, b"What is the capital of France?\n")
        read_until(terminal, "Paris")
        os.write(terminal, b"\x03\n")
        end = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < end:
            with contextlib.suppress(OSError):  # it has just closed its side
                os.write(terminal, b"\x04")  # one that comes while the mode changes is lost
            time.sleep(0.5)
        assert process.wait(timeout=1) == 0
    finally:
        process.kill()
        os.close(terminal)


CHAT_WITHOUT_MODEL = """
import labs, labs_chat
def answer(messages):
    print("GOT", repr([each.content for each in messages]), flush=True)
    yield "so"
labs_chat.chat([], answer)
print("BYE", flush=True)
"""
BEFORE = "import sys; sys.modules['readline'] = None\n"


@pytest.fixture
def terminal() -> Iterator[Callable[[str], int]]:
    """Return what starts a program on a terminal of its own and returns the other end of it."""
    pty = pytest.importorskip("pty")
    started: list[tuple[subprocess.Popen[bytes], int]] = []

    def run(code: str) -> int:
        ours, child = pty.openpty()
        words = [sys.executable, "-c", code]
        env = {**ONE_THREAD, "TERM": "xterm"}
        begin = functools.partial(os.login_tty, child)
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), child)
        process = subprocess.Popen(words, cwd=ROOT, env=env, preexec_fn=begin, **pipes)
        os.close(child)
        started.append((process, ours))
        return ours  # type: ignore[no-any-return]

    yield run
    for process, ours in started:
        process.kill()
        process.wait()
        os.close(ours)


def test_lines_pasted_at_once_are_one_message(terminal: Callable[[str], int]) -> None:
    place = terminal(CHAT_WITHOUT_MODEL)
    read_until(place, "\x1b[?2004h")  # asks the terminal for marks around what is pasted
    os.write(place, b"\x1b[200~one\r/exit\r\rthree\r\x1b[201~ and more\r")
    seen = read_until(place, "\x1b[?2004h", read_until(place, "GOT"))
    assert r"['one\n/exit\n\nthree\n and more']" in seen
    os.write(place, b"\x1b[200~/etc/a is a file.\rIs it?\x1b[201~\r")
    seen = read_until(place, "\x1b[?2004h", read_until(place, "GOT"))
    assert r"'/etc/a is a file.\nIs it?']" in seen
    os.write(place, b"\x1b[A\r")  # the one before, from the history
    seen = read_until(place, "\x1b[?2004h", read_until(place, "GOT"))
    assert seen.count(r"'/etc/a is a file.\nIs it?'") == 2


@pytest.mark.parametrize("before", ["", BEFORE])
def test_ctrl_d_ends_the_line_of_the_prompt(before: str, terminal: Callable[[str], int]) -> None:
    place = terminal(before + CHAT_WITHOUT_MODEL)
    read_until(place, "> ")
    time.sleep(0.2)  # until the terminal's mode has changed: a Ctrl-D that comes before is lost
    os.write(place, b"\x04")
    seen = read_until(place, "BYE")
    assert re.search(r"^[^\n>]*\n\r?BYE", re.sub(r"\x1b\[\?2004.|\r", "", seen))


def test_without_readline_the_person_is_told_what_a_paste_is(
    terminal: Callable[[str], int],
) -> None:
    place = terminal(BEFORE + CHAT_WITHOUT_MODEL)
    assert '"""' in read_until(place, "> ")
    os.write(place, b'"""one\ntwo"""\n')
    assert r"['one\ntwo']" in read_until(place, "]", read_until(place, "GOT"))


def test_importing_labs_and_the_cli_imports_no_torch() -> None:
    code = (
        "import labs, labs_cli, sys\n"
        "labs_cli.make_command('labs-gen', labs_cli.run, labs_cli.OPTIONS, '')\n"
        "print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True)
    assert not {b"torch", b"transformers", b"numpy"} & set(done.stdout.split())


# What is shipped


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_the_extra_test_and_the_group_dev_list_the_same() -> None:
    table = project()
    assert table["project"]["optional-dependencies"]["test"] == table["dependency-groups"]["dev"]


def test_the_extra_quantization_is_what_the_tests_use() -> None:
    extras = project()["project"]["optional-dependencies"]
    assert set(extras["quantization"]) <= set(extras["test"])


def test_the_wheel_and_the_sdist_hold_every_module() -> None:
    targets = project()["tool"]["hatch"]["build"]["targets"]
    modules = {path.name for path in ROOT.glob("labs*.py")}
    assert set(targets["wheel"]["only-include"]) == modules
    tests = {path.name for path in ROOT.glob("test_*.py")}
    assert modules | tests <= set(targets["sdist"]["only-include"])
    assert all((ROOT / name).exists() for name in targets["sdist"]["only-include"])


def test_ci_runs_the_test_command_of_the_readme() -> None:
    command = "\n    pip install uv && uv run pytest -q\n"
    assert command in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert command.strip() in (ROOT / "README.md").read_text(encoding="utf-8")


def test_labs_toml_shows_every_setting_and_changes_none() -> None:
    shipped = labs.load_config(ROOT / "labs.toml", env={})
    bare = labs.load_config(env={})
    parts = ("model", "generation", "server", "response_cache", "router", "documents", "models")
    for part in (*parts, "guard"):
        assert getattr(shipped, part) == getattr(bare, part)
    text = (ROOT / "labs.toml").read_text(encoding="utf-8")
    for setting in labs.settings():
        assert re.search(rf"^#? ?{setting.field} = ", text, re.MULTILINE), setting.key


def test_env_example_names_every_variable_and_sets_none() -> None:
    text = (ROOT / ".env.example").read_text(encoding="utf-8")
    for setting in labs.settings():
        assert re.search(rf"^#? ?{setting.environment}=", text, re.MULTILINE), setting.environment
