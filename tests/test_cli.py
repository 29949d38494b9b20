# SPDX-License-Identifier: Apache-2.0
"""Tests of labs-gen: its logic on faked functions of labs, a few processes on a tiny model."""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import click
import pytest
from kit import ROOT, invoke, labs_gen, start

import labs
import labs_cli
import labs_commands
import labs_explain
import labs_flags
import labs_hints
import labs_past
import labs_terminal
import labs_together
import labs_vendor

HI = '[{"role": "user", "content": "Hi"}]'
pytestmark = pytest.mark.usefixtures("no_variables")


def contents(request: dict[str, Any]) -> list[str]:
    return [message["content"] for message in request["messages"]]


# ---------------------------------------------------------------- prompts and flags


@pytest.mark.parametrize(
    ("words", "input", "roles", "text"),
    [
        (["--prompt", "Hi"], None, None, "Hi"),
        ([], "from a pipe\n", None, "from a pipe"),
        (["--prompt", "-"], "two\nlines\r\n", None, "two\nlines"),
        ([], b"\xef\xbb\xbfHi", None, "Hi"),
        (["--prompt", "Hi", "--system", "S"], None, ["system", "user"], "Hi"),
        (["--messages-json", HI], None, ["user"], "Hi"),
        (["--messages-file", "m.json", "--system", "S"], None, ["system", "user"], "Grüße"),
        (["--messages-file", "-"], HI, ["user"], "Hi"),
    ],
)
def test_a_prompt_or_messages_come_from_flags_a_file_or_a_pipe(
    fake_labs, words, input, roles, text
):
    Path("m.json").write_text(HI.replace("Hi", "Grüße"), encoding="utf-8")
    assert invoke(*words, input=input).exit_code == 0
    (request,) = fake_labs.requests
    if roles is None:
        assert (request["prompt"], "messages" in request) == (text, False)
    else:
        assert [message["role"] for message in request["messages"]] == roles
        assert contents(request) == ["S", text][-len(roles) :]


OVERRIDES: dict[str, dict[str, Any]] = {
    "": {},
    "--temperature 0": {"temperature": 0.0},
    "--stop a --stop \n": {"stop": ("a", "\n")},
    "--load-in-4bit --no-do-sample": {"load_in_4bit": True, "do_sample": False},
    "--offline --model a/b": {"local_files_only": True, "model_name": "a/b"},
    '--logit-bias {"5":-1.5}': {"logit_bias": {"5": -1.5}},
}


@pytest.mark.parametrize(("arguments", "overrides"), OVERRIDES.items())
def test_only_flags_that_are_given_override_settings(fake_labs, arguments, overrides):
    result = invoke("--prompt", "Hi", *filter(None, arguments.split(" ")))
    assert (fake_labs.overrides, result.exit_code) == (overrides, 0), result.stderr


def test_show_config_needs_no_prompt_and_no_model(fake_labs):
    result = invoke("config", "--temperature", "0.25")
    assert (result.exit_code, fake_labs.requests) == (0, [])
    assert "temperature = 0.25  # --temperature" in result.stdout


def test_the_help_is_one_screen_with_examples_that_parse():
    text = invoke("--help").stdout
    assert text.isascii()
    assert max(map(len, text.splitlines())) <= 80
    assert len(text.splitlines()) <= 40
    assert invoke("-h").stdout == text == invoke("help").stdout
    for row in labs_flags.ROWS:
        assert re.search(rf"^  {re.escape(labs_commands.shown(row))} +{row.summary}$", text, re.M)
    examples = re.findall(r"labs-gen (.*)", labs_commands.EXAMPLES)
    assert len(examples) == 4
    for row in labs_flags.ROWS:
        examples += re.findall(r"^  .*?labs-gen (.*)", row.more, re.MULTILINE)
    assert len(examples) > 10
    for example in examples:
        name, *words = shlex.split(re.split(" [<>] ", example)[0])
        row = labs_flags.SUBCOMMANDS.get(name, labs_flags.SUBCOMMANDS["prompt"])
        labs_commands.Command(row, print).make_context(row.name, words)


@pytest.mark.parametrize("name", labs_flags.SUBCOMMANDS)
def test_each_subcommand_shows_its_own_flags_before_those_of_settings(name):
    text = invoke(name, "--help").stdout
    assert text == invoke("help", name).stdout == invoke(name, "-h").stdout
    assert text.isascii()
    assert max(map(len, text.splitlines())) <= 80
    titles = re.findall(r"^(\w.*):$", text, re.MULTILINE)
    assert titles[0] == "Flags"
    row = labs_flags.SUBCOMMANDS[name]
    assert len(titles) == (1 + bool(row.settings) if name != "serve" else 9)
    own, _, settings = text.partition("\nFlags:\n")[2].partition("\nSettings")
    for flag, *_ in labs_flags.options_of(row):
        assert flag.partition("/")[0] in own
    for setting in labs_flags.settings_of(row):
        flag = "--" + setting.key.removeprefix("server_").replace("_", "-")
        assert flag not in re.split(r"[ ,/]+", own)
        assert flag in settings


@pytest.mark.parametrize("word", ["--version"])
def test_the_version_is_that_of_labs(word):
    assert invoke(word).stdout == f"labs-gen {labs.__version__}\n"


# ---------------------------------------------------------------- wrong usage


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--no-such-flag"], "--no-such-flag"),
        (["--temperature", "warm"], "'warm'"),
        (["--logit-bias", "{x"], "--logit-bias"),
        (["--prompt", ""], "no prompt"),
        ([], "no prompt"),
        (["--messages-json", "[]"], "no prompt"),
        (["--system", "a", "--messages-json", HI.replace("user", "system")], "system message"),
        (["--prompt", "a", "--messages-json", "[]"], "exclude each other"),
        (["vendor", "x", "--no-do-sample"], "--no-do-sample"),
        (["chat", "--continue-final-message"], "--continue-final-message"),
        (["batch"], "IN is missing: labs-gen batch IN [OUT]"),
        (["batch", "in", "--batch-rows", "0"], "--batch-rows"),
        (["batch", "in", "--replicas", "2"], "--replicas needs --ray"),
        (["serve", "--sticky"], "--sticky needs --ray"),
        (["Hi", "--prompt", "Hi"], "exclude each other"),
        (["Hi", "there"], "needs quotes: labs-gen 'Hi there'"),
        (["Hi", "--tool-choice", "none"], "--tool-choice needs --tools"),
        (
            ["-5 degrees?"],
            "labs-gen prompt has no flag -5\nA prompt that begins with - stands after ",
        ),
        (["--", "-hi", "you"], "needs quotes: labs-gen -- '-hi you'"),
        (["Hi", "--temprature", "1"], "has no flag --temprature; did you mean --temperature?"),
        (["Hi", "--temperature", "warm"], "--temperature: 'warm' is no number\n"),
        (["Hi", "--top-k", "1.5"], "--top-k: '1.5' is no integer\n"),
        (["batch", "in", "--batch-rows", "0"], "--batch-rows: 0 is less than 1\n"),
        (["serve", "--ray", "--num-cpus", "nan"], "--num-cpus: nan is less than 0\n"),
        (["--temperature"], "--temperature needs a value\nlabs-gen settings temperature shows"),
        (["config", "x y"], "labs-gen config does not take 'x y'\n"),
        (["completion"], "SHELL is missing: labs-gen completion SHELL\nlabs-gen completion --help"),
        (["models", "lst"], "ACTION: 'lst' is not one of 'list', 'pull', 'rm'\n"),
    ],
)
def test_wrong_usage_is_exit_code_2(fake_labs, arguments, reason):
    result = invoke(*arguments, input=" \n")
    assert (result.exit_code, result.stdout, fake_labs.requests) == (2, "", [])
    assert reason in result.stderr.partition("Error: ")[2]
    assert result.stderr.startswith("Error: ")


HELD = "--schema --regex --one-of --grammar"
ALONE = {  # the flags of each subcommand that do not go with another; others go together
    "prompt": [
        "--prompt --messages-json --messages-file",
        HELD,
        "--json --stream",
        *(f"--choose {flag}" for flag in f"--tools --stream --verbose {HELD}".split()),
    ],
    "chat": ["--messages-json --messages-file", HELD],
    "batch": ["--ray --ordered", "--ray --report"],
    "explain": ["--prompt --messages-json --messages-file"],
    "vendor": ["--rooms --check"],
}
NEEDED = {"tool_choice": "tools", **dict.fromkeys(labs_flags.RAY_KEYS, "ray")}


@pytest.mark.parametrize("row", labs_flags.ROWS, ids=lambda row: row.name)
def test_of_two_flags_both_have_an_effect_or_they_are_refused(row):
    flags = {flag.partition("/")[0]: kind for flag, kind, _ in row.options}
    places = [kind for _, shown, kind in row.arguments if not shown.startswith("[")]
    command = labs_commands.Command(row, print)
    for pair in itertools.combinations(flags, 2):
        words = ["bash" if isinstance(kind, click.Choice) else "x" for kind in places]
        needed = [
            f"--{NEEDED[name]}" for flag in pair if (name := labs_flags.name_of(flag)) in NEEDED
        ]
        for flag in {*pair, *needed}:
            words += [flag] if flags[flag] is bool else [f"{flag}=1"]
        params = command.make_context(row.name, words).params
        alone = [each for each in ALONE.get(row.name, ()) if {*pair, *needed} & {*each.split()}]
        if any(len({*pair, *needed} & {*each.split()}) > 1 for each in alone):
            with pytest.raises(click.UsageError, match="exclude"):
                labs_together.check_flags(row, params)
        else:
            labs_together.check_flags(row, params)


# ---------------------------------------------------------------- which subcommand


@pytest.mark.parametrize(
    ("words", "prompt"),
    [
        (["Hi"], "Hi"),
        (["two words"], "two words"),
        (["prompt", "Hi"], "Hi"),
        (["--prompt", "chat"], "chat"),
        (["prompt", "chat"], "chat"),
        (["--", "chat"], "chat"),
        (["--seed", "1", "Hi"], "Hi"),
        (["Hi", "--seed", "1"], "Hi"),
        (["-"], "from a pipe"),
        (["--seed", "1", "-"], "from a pipe"),
        (["--system", "chat"], "from a pipe"),
        (["Chat"], "Chat"),
        (["bacth"], "bacth"),
    ],
)
def test_a_line_without_a_subcommand_is_a_prompt(fake_labs, words, prompt):
    assert invoke(*words, input="from a pipe\n").exit_code == 0
    (request,) = fake_labs.requests
    assert prompt in (request.get("prompt"), request.get("messages", [{}])[-1].get("content"))


def test_on_a_terminal_a_prompt_that_looks_like_a_subcommand_is_told(monkeypatch, capsys):
    note = "[answered as a prompt; for the command: labs-gen %s]\n"
    notes = {"bacth": note % "batch", "version": note % "--version", "a whole sentence": ""}
    for word, told in notes.items():
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
        flags = labs_cli.with_text({"text": (word,), "prompt": None})
        assert flags == {"prompt": word}
        assert capsys.readouterr().err == told


@pytest.mark.parametrize(
    "words",
    [
        ["chat", "--seed", "7"],
        ["--seed", "7", "chat"],
        ["--seed=7", "chat"],
        ["--stream", "--seed", "7", "chat", "--verbose"],
    ],
)
def test_flags_may_come_before_the_subcommand(fake_labs, words):
    assert invoke(*words, input="one\n").exit_code == 0
    assert fake_labs.overrides == {"seed": 7}
    assert contents(fake_labs.requests[0]) == ["one"]


def test_a_flag_of_any_subcommand_may_come_before_it(fake_labs):
    done = invoke("--port", "1", "--sticky", "serve")
    assert (done.exit_code, "--sticky needs --ray" in done.stderr) == (2, True)
    done = invoke("--docs", "chat", "index")
    assert "DIR is missing: labs-gen index DIR..." in done.stderr


def test_help_of_a_command_that_is_not_there_names_the_nearest():
    near = {"bacth": "batch", "version": "--version"}
    for word, hint in {
        "nonsense": "",
        **{k: f"; did you mean {v}?" for k, v in near.items()},
    }.items():
        done = invoke("help", word)
        assert (done.exit_code, done.stdout) == (2, "")
        assert done.stderr.endswith(f"Error: there is no command '{word}'{hint}\n")


def test_each_subcommand_names_a_function_that_exists():
    for row in labs_flags.ROWS:
        assert callable(labs_cli.function_of(row.run))


OLD = {  # an old line, the new one, and the line that says so
    ("--chat", "--seed", "1"): (["chat", "--seed", "1"], "--chat is now: labs-gen chat"),
    ("--show-config",): (["config"], "--show-config is now: labs-gen config"),
    ("--explain", "--prompt", "Hi"): (["explain", "Hi"], "--explain is now: labs-gen explain"),
    ("--input", "my in.jsonl", "--ordered"): (
        ["batch", "my in.jsonl", "--ordered"],
        "--input 'my in.jsonl' is now: labs-gen batch 'my in.jsonl'",
    ),
    ("--batch-rows", "2", "--output", "out", "--input", "in"): (
        ["batch", "in", "out", "--batch-rows", "2"],
        "--input in --output out is now: labs-gen batch in out",
    ),
    ("--replay", "out"): (["replay", "out"], "--replay out is now: labs-gen replay out"),
    ("--index", "a", "--index", "b", "--docs", "x"): (
        ["index", "a", "b", "--docs", "x"],
        "--index a --index b is now: labs-gen index a b",
    ),
    ("--vendor", "x", "--rooms", "cli"): (
        ["vendor", "x", "--rooms", "cli"],
        "--vendor x is now: labs-gen vendor x",
    ),
}


@pytest.mark.parametrize(("old", "new"), OLD.items())
def test_an_old_flag_runs_its_subcommand_and_names_it(fake_labs, monkeypatch, old, new):
    words, told = new
    called: list[Any] = []

    def noting(name: str) -> Any:
        return lambda config, flags: called.append((name, config, flags))

    monkeypatch.setattr(labs_cli, "function_of", noting)
    done, again = invoke(*old), invoke(*words)
    assert (done.exit_code, again.exit_code) == (0, 0)
    assert (done.stderr, again.stderr) == (f"labs-gen: {told}\n", "")
    (name, config, flags), (wanted, same, others) = called
    assert (name, config) == (wanted, same)
    assert {key: value for key, value in others.items() if value not in (None, (), False)} == {
        key: value for key, value in flags.items() if value not in (None, (), False)
    }


def test_old_flags_are_in_no_help():
    hidden = {f"--{name.replace('_', '-')}" for name in labs_past.MODES}
    for words in (["--help"], ["prompt", "--help"]):
        assert hidden & {*re.findall(r"--[\w-]+", invoke(*words).stdout)} == set()


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--output", "out", "--prompt", "Hi"], "--output needs --input"),
        (["--batch-rows", "2", "Hi"], "--batch-rows needs --input or --replay"),
        (["--report", "report.html", "Hi"], "--report needs --input"),
        (["--ordered", "Hi"], "--ordered needs --input"),
        (["--rooms", "cli", "Hi"], "--rooms needs --vendor"),
        (["--vendor", "x", "--no-do-sample"], "--vendor and --do-sample exclude each other"),
        (["--chat", "--continue-final-message"], "--chat and --continue-final-message exclude"),
        (["--chat", "--json"], "--chat and --json exclude each other"),
        (["--chat", "Hi"], "--chat and --prompt exclude each other"),
    ],
)
def test_old_flags_that_do_not_go_together_are_refused_as_ever(fake_labs, words, named):
    done = invoke(*words)
    assert (done.exit_code, done.stdout) == (2, "")
    assert named in done.stderr


# ---------------------------------------------------------------- what to type next


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        ([], "labs-gen --help has examples."),
        (["bacth", "a", "b"], "If bacth is meant to be a command: labs-gen batch a b"),
        (["bacth", "a b", "--ordered"], "labs-gen batch 'a b' --ordered"),
        (["chat", "--choose", "a"], "--choose is a flag of labs-gen prompt."),
        (["Hi", "--port", "1"], "--port is a flag of labs-gen serve."),
        (["chat", "--prompt", "x"], "--prompt is a flag of labs-gen prompt and explain."),
        (
            ["config", "--tools", "x"],
            "--tools is a flag of labs-gen prompt, chat, warm and explain.",
        ),
        (["Hi", "--temperature", "-3"], "labs-gen settings temperature shows what it may be."),
        (["Hi", "--temperature", "x"], "labs-gen settings temperature shows what it may be."),
        (["batch"], "labs-gen batch --help shows how it is used."),
        (
            ["Hi", "--config", "bad.toml"],
            "labs-gen doctor lists all that is wrong with the settings.",
        ),
        (["Hi", "--model", "x.gguf"], "labs-gen models lists those that are here."),
        (["Hi", "--config", "wrong.toml"], "labs-gen settings top_p shows similar names."),
        (["Hi", "--device-map", "my"], "labs-gen settings device_map shows what it may be."),
    ],
)
def test_an_error_names_the_command_that_helps(no_variables, folder, words, hint):
    Path("wrong.toml").write_text("[generation]\ntopp = 1\n", encoding="utf-8")
    Path("bad.toml").write_text("[sever]\nport = 1\n", encoding="utf-8")
    done = invoke(*words, input="")
    assert done.exit_code in (1, 2)
    assert done.stderr.splitlines()[-1].endswith(hint)
    assert done.stderr.splitlines()[-2].startswith("Error: ")


def test_a_cache_that_cannot_be_written_names_its_setting():
    error = labs.ModelError("a.gguf: cannot be converted in /x: Not a directory: /x")
    hint = labs_hints.after(error, str(error), [])
    assert hint == "labs-gen settings cache_dir tells how to move it."
    assert "LABS_CACHE_DIR" in invoke(*hint.split()[1:3]).stdout


def test_a_name_that_is_no_setting_gets_no_hint():
    for text in ("tool_choice = 'fly': no such tool", "messages[0]: role = 5", "x: y"):
        assert labs_hints.after(labs.InputError(text), text, []) == ""
    wrong = "server.port = 0: too low"
    assert "labs-gen settings port " in labs_hints.after(labs.ConfigError(wrong), wrong, [])


@pytest.mark.parametrize("words", [["batch", "\x07"], ["\x07", "b"], ["--vendor", "\x07"]])
def test_a_terminal_gets_no_control_characters_of_an_error(fake_labs, monkeypatch, words):
    monkeypatch.setattr(labs_vendor, "vendor", lambda *_: 0)
    assert "\x07" in invoke(*words).stderr
    monkeypatch.setattr(labs_terminal, "shown", lambda text, _: labs_terminal.safe(text))
    done = invoke(*words)
    assert "\x07" not in done.stderr
    assert "␇" in done.stderr


def test_no_hint_names_a_subcommand_that_is_not_there():
    for kind, _, command, _ in labs_hints.TABLE:
        for text in ("no such model", "cannot listen on x: in use", "out of memory", "LABS_DEBUG"):
            error = kind(text)
            hint = labs_hints.after(error, text, [])
            named = hint.split()[1:2]
            assert named in ([], ["--help"]) or named[0] in labs_flags.SUBCOMMANDS, command


# ---------------------------------------------------------------- settings and completion


def test_settings_shows_type_bounds_default_flag_and_variable():
    text = invoke("settings", "--", "max-new").stdout
    assert text == (
        "max_new_tokens in [generation]\n"
        "  Generate at most this many tokens.\n"
        "  type: integer, ≥ 1, ≤ 1,048,576; default: 256\n"
        "  flag: --max-new-tokens; environment: LABS_MAX_NEW_TOKENS\n"
    )
    whole = invoke("settings").stdout
    for each in labs.settings():
        assert f"{each.field} in [{each.section}]\n  {each.description}\n" in whole
    first = invoke("settings", "LABS_TEMP").stdout.splitlines()[0]
    assert first == "temperature in [generation]"
    assert not re.search(r"\b1 (?:characters|items)", whole)
    assert "(of labs-gen serve)" in invoke("settings", "server_port").stdout


def test_an_unknown_setting_is_refused_with_the_nearest_names():
    done = invoke("settings", "tempratur")
    assert (done.exit_code, done.stdout) == (2, "")
    assert "the nearest names: temperature" in done.stderr


COMPLETED = {
    "labs-gen ba": "batch",
    "labs-gen --tempe": "--temperature",
    "labs-gen --vers": "--version",
    "labs-gen batch in --ord": "--ordered",
    "labs-gen Hi --max-new": "--max-new-tokens",
    "labs-gen settings max_n": "max_new_tokens",
    "labs-gen completion b": "bash",
    "labs-gen help expl": "explain",
    "labs-gen chat --torch-dtype bflo": "bfloat16",
}
COMPLETE = """
compopt() { :; }
source completion
COMP_WORDS=($1); COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
_labs_gen_completion labs-gen
echo "${COMPREPLY[@]}"
"""


@pytest.mark.skipif(not shutil.which("bash"), reason="bash is not installed")
def test_bash_completes_subcommands_flags_and_values(folder):
    Path("completion").write_text(invoke("completion", "bash").stdout, encoding="utf-8")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    for line, wanted in COMPLETED.items():
        done = subprocess.run(
            ["bash", "-c", COMPLETE, "bash", line],
            capture_output=True,
            check=False,
            env={**os.environ, "PATH": path},
        )
        assert (done.stderr, done.stdout.decode()) == (b"", f"{wanted}\n")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_for_a_shell_is_written_and_help_says_where_it_goes(shell):
    assert "_LABS_GEN_COMPLETE" in invoke("completion", shell).stdout
    assert f"labs-gen completion {shell} > " in invoke("completion", "--help").stdout


# ---------------------------------------------------------------- answers


@pytest.mark.parametrize("flag", ["--verbose", "--stream", "--no-stream"])
def test_only_the_answer_as_the_model_wrote_it_is_on_standard_output(fake_labs, flag):
    fake_labs.pieces = ["Hello ", "\x1b[1mbold\x1b[0m"]
    assert invoke("--prompt", "Hi", flag).stdout == "Hello \x1b[1mbold\x1b[0m\n"


def test_json_is_one_object_with_the_answer_every_setting_and_no_secret(fake_labs, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    text = invoke("--prompt", "Hi", "--json", "--temperature", "0.5").stdout
    result = json.loads(text)
    assert (result["text"], result["finish_reason"]) == ("Hello there", "stop")
    assert result["usage"]["completion_tokens"] == 4
    assert result["timings"]["decode_s"] == 0.5
    assert result["settings"]["temperature"] == 0.5
    assert set(result["settings"]) == {setting.key for setting in labs_flags.SETTINGS}
    assert "hf_secret" not in text


def test_explain_shows_what_would_run_and_runs_nothing(fake_labs, monkeypatch):
    value = labs_explain.SettingValue
    used = {"top_k": value(7, "--top-k"), "stop": value(None, "default")}
    rest = ("joins", "as it can", "labs: as it is", True, False, 8, 2 * 10**6, 10**5, used)
    for left, room in ((97, "room for 97 more"), (None, "no limit")):
        found = labs_explain.Explanation("tiny", "templated", 3, left, *rest)
        monkeypatch.setattr(labs_explain, "explain", lambda *_, found=found: found)
        text = invoke("explain", "Hi").stdout
        assert text.startswith("templated\n---\nmodel: smollm2-135m-instruct\nprompt tokens: 3;")
        assert (
            f"{room}\nruns: joins (as it can); up to 8 rows at once\nforward of labs: as it is\n"
            in text
        )
        shared = "keys and values of prompts that begin alike: a copy for each row"
        memory = "memory: weights 2 MB, this request 0.1 MB"
        assert f"in the batch: yes\n{shared}\n{memory}\n" in text
        assert text.endswith("---\ntop_k = 7  # --top-k\nstop = unset  # default\n")
    assert fake_labs.closed == 0


def test_verbose_reports_times_and_the_limit_that_cut_the_answer(fake_labs):
    fake_labs.finish_reason = "length"
    assert invoke("--prompt", "Hi").stderr == ""
    stderr = invoke("--prompt", "Hi", "--verbose").stderr
    assert "[the answer was cut; --max-new-tokens sets the limit]" in stderr
    assert "completion_tokens 4" in stderr
    assert "load_s 1, prefill_s 0.25, decode_s 0.5, tokens_per_s 8]" in stderr


# ---------------------------------------------------------------- failures


@pytest.mark.parametrize("kind", [labs.GenerationError, ZeroDivisionError, OSError])  # of no pipe
def test_an_error_is_one_line_after_the_text_that_came_before_it(fake_labs, kind, monkeypatch):
    fake_labs.error = kind("oh")
    result = invoke("--prompt", "Hi", "--stream")
    assert (result.exit_code, result.stdout) == (1, "Hello there")
    more = f"{kind.__name__}: oh (LABS_DEBUG=1 shows the traceback)"
    expected = kind is labs.GenerationError
    assert result.stderr.startswith(f"Error: {'oh' if expected else more}\n")
    assert ("labs-gen doctor" in result.stderr) != expected
    fake_labs.error = kind("oh")
    monkeypatch.setenv("LABS_DEBUG", "1")
    assert isinstance(invoke("--prompt", "Hi").exception, kind)


def test_ctrl_c_is_exit_code_130_and_closes_the_generator(fake_labs):
    fake_labs.error = KeyboardInterrupt()
    result = invoke("--prompt", "Hi")
    assert (result.exit_code, fake_labs.closed) == (130, 1)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--prompt", "a bad one"], r"deny\[0\]"),
        (["--messages-json", HI.replace("Hi", "bad")], r"deny\[0\]"),
        (["--prompt", "Hi", "--logprobs", "1"], "logprobs"),
        (["chat", "--logprobs", "1"], "logprobs"),
        (["--prompt", "Hi", "--schema", "absent.json"], r"absent\.json: No such file"),
        (["--prompt", "Hi", "--schema", "list.json"], r"list\.json: .*expected a JSON schema"),
        (["--prompt", "\udcff"], "lone surrogate"),
        (["--prompt", "Hi", "--config", "absent.toml"], r"absent\.toml"),
        (["--messages-json", "{"], "--messages-json: .*expected a list"),
        (["--messages-json", HI.replace('"Hi"', "5")], "--messages-json: .*content"),
        (["--messages-json", HI.replace("user", "wizard")], "--messages-json: .*role"),
        (["--messages-file", "."], "Is a directory"),
        ([], "byte 0xff at position 2 of standard input is not UTF-8"),
    ],
)
def test_a_request_that_cannot_work_is_one_line_before_the_model_loads(
    arguments, reason, fake_labs, monkeypatch
):
    monkeypatch.setattr(labs, "load_model", lambda config: pytest.fail("loaded"))
    Path("labs.toml").write_text('[guard]\ndeny = ["bad"]\n')
    Path("list.json").write_text("[1]")
    result = invoke(*arguments, input=b"ab\xff")
    assert (result.exit_code, result.stdout) == (1, "")
    assert re.fullmatch(f"Error: .*{reason}.*\n", result.stderr)


# ---------------------------------------------------------------- processes

ENDLESS = ("--max-new-tokens", "4000", "--logit-bias", '{"97": 100}')  # says "aaa..."


@pytest.mark.real
@pytest.mark.parametrize("flags", [[], ["--load-in-8bit"], ["--load-in-4bit"]])
def test_the_default_model_answers_and_writes_nothing_else(flags):
    if flags:
        pytest.importorskip("bitsandbytes")
    question = ("--prompt", "What is the capital of France?")
    done = labs_gen(*question, *flags, "--max-new-tokens", "8")
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"Paris" in done.stdout or flags


@pytest.mark.parametrize("end", [0, 130])
def test_a_closed_pipe_and_sigint_end_an_answer_quietly(end, tiny_folder):
    words = ("--model", str(tiny_folder), "--prompt", "Hi", "--stream", *ENDLESS)
    pipe = subprocess.PIPE
    process: Any = start(*words, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe)
    assert process.stdout.read(1) == b"a"
    if end:
        process.send_signal(signal.SIGINT)
    else:
        process.stdout.close()
    assert process.stderr.read().strip() == b""
    assert process.wait(timeout=60) == end


def test_any_locale_is_utf8():
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    text = "Grüße 漢字 🌍"
    done = labs_gen("config", "--stop", text, env=environment)
    assert (done.returncode, done.stderr) == (0, b"")
    assert text in done.stdout.decode()


@pytest.mark.parametrize("given", ["config", "--help", "--version", "batch --help"])
@pytest.mark.parametrize("redirection", [">&-", ">/dev/full"])
def test_standard_output_that_is_closed_or_full_is_one_line(redirection, given):
    command = f'"{sys.executable}" "{ROOT / "labs_cli.py"}" {given} {redirection}'
    done = subprocess.run(command, shell=True, capture_output=True, check=False)
    assert done.returncode == 1
    assert re.fullmatch(rb"Error: standard output(:| is|, or a file:) .*\n", done.stderr)


# ---------------------------------------------------------------- what is shipped


def test_packages_extras_and_the_shipped_files_are_named_in_pyproject():
    table = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    extras = table["project"]["optional-dependencies"]
    assert extras["test"] == table["dependency-groups"]["dev"]
    assert set(extras["quantization"]) <= set(extras["test"])
    targets = table["tool"]["hatch"]["build"]["targets"]
    wheel, sdist = (set(targets[name]["only-include"]) for name in ("wheel", "sdist"))
    assert wheel == {path.name for path in ROOT.glob("labs*.py")}
    assert wheel | {path.name for path in ROOT.glob("test_*.py")} <= sdist
    assert all((ROOT / name).exists() for name in sdist)


def test_ci_runs_the_test_command_of_the_readme():
    command = "\n    pip install uv && uv run pytest -q\n"
    assert command in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert command.strip() in (ROOT / "README.md").read_text(encoding="utf-8")


def test_ctrl_c_while_modules_are_imported_is_quiet(tmp_path):
    (tmp_path / "labs_cli.py").write_text("raise KeyboardInterrupt")
    for name in ("gen", "api"):
        code = f"import sys; sys.path.append({str(ROOT)!r}); import labs_start; labs_start.{name}()"
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True)
        assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"")
