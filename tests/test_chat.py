# SPDX-License-Identifier: Apache-2.0
"""Tests of the chat: its commands on faked functions of labs, its keys on a real terminal."""

from __future__ import annotations

import io
import json
import os
import re
import select
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import kit
import pytest
from kit import ONE_THREAD, ROOT, heed_sigint, invoke, read_until

import labs
import labs_chat_commands
import labs_chat_input
import labs_chat_settings
import labs_chat_turns
import labs_clipboard
import labs_dialogue
import labs_parts
import labs_shell
import labs_terminal
from labs_talk import Host, Talk

SAID = "Hello there"  # by the fake
TALK = '[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]'
pytestmark = pytest.mark.usefixtures("no_variables")


def contents(request: dict[str, Any]) -> list[str]:
    return [message["content"] for message in request["messages"]]


# ---------------------------------------------------------------- what is sent


@pytest.mark.parametrize(
    ("words", "input", "requests"),
    [
        ([], "one\ntwo\n", [["one"], ["one", SAID, "two"]]),
        (["--system", "S", "--messages-json", TALK], "c\n", [["S", "a", "b", "c"]]),
        ([], '"""one\n/exit\n\ntwo"""\n', [["one\n/exit\n\ntwo"]]),
        ([], '"""/exit"""\n', [["/exit"]]),
        ([], '\n  \n""""""\n', []),
        (["--system", "S"], "/system T\none\n/system\ntwo\n", [["T", "one"], ["one", SAID, "two"]]),
        (["--system", "S"], "one\n/reset\ntwo\n", [["S", "one"], ["S", "two"]]),
        ([], "/exit\none\n", []),
        ([], " /wat\n", [["/wat"]]),
        ([], "/help\n", []),
        ([], "one\n/undo\ntwo\n", [["one"], ["two"]]),
        ([], "one\ntwo\n/undo\n/undo\nthree\n", [["one"], ["one", SAID, "two"], ["three"]]),
        ([], "one\n/retry\ntwo\n", [["one"], ["one"], ["one", SAID, "two"]]),
    ],
)
def test_a_chat_sends_the_conversation_and_obeys_commands(fake_labs, words, input, requests):
    result = invoke("chat", *words, "--temperature", "1", input=input)
    assert (result.exit_code, result.stdout) == (0, f"{SAID}\n" * len(requests))
    assert [contents(request) for request in fake_labs.requests] == requests
    assert (result.stderr == "") == (input != "/help\n")  # a pipe gets answers and nothing else


def test_the_help_names_each_command_in_80_columns(fake_labs):
    text = invoke("chat", input="/help\n").stderr
    assert [name for name in labs_chat_commands.COMMANDS if f"  {name} " not in text] == []
    assert max(map(len, text.splitlines())) < 80


WRONG = {
    "/wat": "unknown command /wat; /help lists all. To send it, type a space before it",
    "/sytem Hi": "did you mean /system?",
    "/quit": "did you mean /exit?",
    "/reset all": "/reset takes nothing after it, but 'all' was given",
    "/save": "/save needs FILE",
    "/save no/such/folder.json": "no/such/folder.json: No such file or directory",
    "/load no.json": "no.json: No such file or directory",
    "/load .": "this is not a file",
    "/load wrong.json": "wrong.json: ",
    "/load empty.json": "the list of messages is empty",
    "/tools wrong.json": "expected a list of tools",
    "/tools twice.json": "two are named add",
    "/save wrong.json": "it holds no conversation",
    "/undo": "there is no message yet",
    "/retry": "there is no message yet",
    "/edit": "there is no message yet",
    "/copy": "there is no answer yet",
    "/stats": "no answer has been finished yet",
    "/settings temperature": "'temperature' has no =",
    "/settings temprature=1": "unknown setting 'temprature'; did you mean temperature?",
    "/settings temperature=warm": "temperature = 'warm'",
    "/settings temperature=-1": "temperature = '-1': Expected `float` >= 0.0",
    "/settings stop=END": "a JSON list",
    "/settings do_sample=true temperature=0": "contradicts temperature = 0",
    "/settings model_name=x": "unknown setting 'model_name'",
    '"""never closed': 'the message has no """ at its end',
}


@pytest.mark.parametrize("line", WRONG)
def test_a_command_that_cannot_work_is_one_sentence_and_changes_nothing(fake_labs, line):
    add = {"type": "function", "function": {"name": "add"}}
    files = {"wrong.json": "{}", "empty.json": "[]", "twice.json": json.dumps([add, add])}
    for name, text in files.items():
        Path(name).write_text(text)
    result = invoke("chat", input=f"{line}\n" + ("" if '"""' in line else "one\n"))
    assert re.fullmatch(r"Error: [^\n]*\n", result.stderr)
    assert WRONG[line] in result.stderr
    assert result.exit_code == 1  # as nobody at a terminal saw it
    assert [contents(request) for request in fake_labs.requests] == [["one"]] * ('"""' not in line)
    assert {path.name: path.read_text() for path in Path().iterdir()} == files


def test_save_writes_messages_that_load_and_messages_file_read(fake_labs, tmp_path):
    invoke("chat", input="one\n/save my talk.json\n/save my talk.json\n")
    invoke("--messages-file", "my talk.json")
    said = [(each["role"], each["content"]) for each in fake_labs.requests[1]["messages"]]
    assert said == [("user", "one"), ("assistant", SAID)]
    assert [path.name for path in tmp_path.iterdir()] == ["my talk.json"]
    invoke("chat", input=f"zero\n/load {tmp_path}/my talk.json\ntwo\n")
    assert contents(fake_labs.requests[-1]) == ["one", SAID, "two"]
    Path("asked.json").write_text('[{"role": "user", "content": "why"}]')
    invoke("chat", "--temperature", "1", input="/load asked.json\n/retry\nso\n")
    assert [*map(contents, fake_labs.requests[-2:])] == [["why"], ["why", SAID, "so"]]


@pytest.fixture
def narrow(fake_labs, monkeypatch):
    """Return a fake whose context holds 20 characters of messages and which says "answer"."""
    inner = fake_labs.stream_generate
    fake_labs.pieces = ["answer"]

    def stream(*arguments: Any, **words: Any) -> Any:
        if len("".join(contents(fake_labs.requests[-1]))) > 20:
            raise labs.PromptTooLong("the context holds 20; shorten the prompt")
        return inner(*arguments, **words)

    monkeypatch.setattr(labs, "stream_generate", stream)
    return fake_labs


def test_a_chat_too_long_for_the_context_leaves_out_its_oldest_turns(narrow):
    done = invoke("chat", "--system", "Sys", input="one\ntwo\nthree\nfour\n/save t.json\n")
    counts = re.findall(r"the oldest (\d+) messages are left out", done.stderr)
    assert (done.stdout, counts) == ("answer\n" * 4, ["2", "2"])  # once each time
    last = contents(narrow.requests[-1])
    assert last == ["Sys", "three", "answer", "four"]
    saved = [each["content"] for each in json.loads(Path("t.json").read_text())]
    assert saved == [*last, "answer"]


def test_a_question_too_long_for_any_context_is_refused_and_forgets_nothing(narrow):
    done = invoke("chat", "--system", "Sys", input=f"one\n{'long ' * 9}\ntwo\n")
    assert "Error: the context holds 20" in done.stderr
    assert "/settings max_new_tokens=N" in done.stderr
    assert "left out" not in done.stderr
    assert contents(narrow.requests[-1]) == ["Sys", "one", "answer", "two"]


def test_a_shortened_conversation_has_each_system_message_and_whole_turns():
    roles = ["system", "user", "assistant", "assistant", "system", "user", "assistant", "user"]
    talk = [labs.Message(role=role, content=str(n)) for n, role in enumerate(roles)]  # type: ignore
    for left in ("04567", "047"):
        talk = labs_chat_turns.without_oldest(talk) or []
        assert [each.content for each in talk] == [*left]
    assert labs_chat_turns.without_oldest(talk) is None


def test_ctrl_c_in_a_chat_keeps_the_text_so_far_and_an_error_forgets_its_turn(fake_labs):
    fake_labs.error = KeyboardInterrupt()
    result = invoke("chat", "--stream", input="one\ntwo\n")
    assert result.exit_code == 0
    assert contents(fake_labs.requests[1]) == ["one", SAID, "two"]
    fake_labs.pieces, fake_labs.error = [], labs.PromptTooLong("too long")
    assert "Error: too long" in invoke("chat", input="one\ntwo\n").stderr
    assert contents(fake_labs.requests[3]) == ["two"]


@pytest.mark.parametrize("kind", [labs.GenerationError, ZeroDivisionError])
def test_a_message_whose_answer_failed_is_there_to_be_sent_again(fake_labs, kind):
    fake_labs.pieces, fake_labs.error = [], kind("broken")
    result = invoke("chat", "--temperature", "1", input="one\n/system S\n/retry\n/undo\n/retry\n")
    assert [contents(request) for request in fake_labs.requests] == [["one"], ["S", "one"]]
    assert result.stderr.startswith("Error: ")
    assert "broken" in result.stderr
    assert result.stderr.endswith("Error: there is no message yet\n")  # the fake says nothing


def test_an_answer_stays_when_it_is_tried_again_in_vain(fake_labs, monkeypatch):
    talk, host = said("one", "1"), Host(answer=lambda *_: iter([]), load=lambda name: None)  # type: ignore
    again = labs_chat_commands.run("/retry", talk, host)
    keyboard = labs_chat_input.Keyboard(labs_chat_input.History(None), lambda *_: [])
    after = labs_chat_turns.take_turn(again, again.say or "", host, keyboard)
    assert after.messages == talk.messages
    assert after.unanswered == ("one", ())


# ---------------------------------------------------------------- commands


def said(*texts: str, **fields: Any) -> Talk:
    """Return a conversation of questions and answers in turn."""
    roles: Any = ("user", "assistant") * len(texts)
    turns = zip(roles, texts, strict=False)
    messages = tuple(labs.Message(role=role, content=text) for role, text in turns)
    return Talk(config=labs.Config(), model=kit.MODEL, messages=messages, **fields)


def host_of(**ways: Any) -> Host:
    return Host(**{"answer": lambda *_: iter([]), "load": pytest.fail, **ways})


def test_settings_hold_for_the_next_answers_and_are_shown_when_they_differ(fake_labs, monkeypatch):
    used = []
    inner = fake_labs.stream_generate

    def noted(model: Any, inputs: Any, generation: Any, **words: Any) -> Any:
        used.append((generation.temperature, generation.stop, generation.seed))
        return inner(model, inputs, generation, **words)

    monkeypatch.setattr(labs, "stream_generate", noted)
    lines = ['/settings temperature=0.5 stop=["a", "b"] seed=7', "/settings", "one", "/retry"]
    lines += ["/retry", "two", "/settings temperature= stop=", "/settings", "three"]
    result = invoke("chat", "--temperature", "0.25", input="\n".join(lines))
    assert used == [
        *((0.5, ("a", "b"), seed) for seed in (7, 8, 9, 7)),
        (0.25, (), 7),
    ]
    here = [
        "temperature = 0.5  # /settings",
        "seed = 7  # /settings",
        'stop = ["a","b"]  # /settings',
    ]
    shown = result.stderr.splitlines()
    assert {*shown[:3]} == {*here}
    assert {*shown[3:]} == {"temperature = 0.25  # --temperature", "seed = 7  # /settings"}


def test_what_a_model_recommends_is_shown_with_the_settings():
    model = labs.Model(**{**kit.NOTHING, "load_s": 0.0, "generation_defaults": {"top_p": 0.9}})
    talk = Talk(config=labs.Config(), model=model)
    found = labs_chat_commands.run("/settings", talk, host_of())
    assert found == talk
    lines = labs_chat_settings.described_settings(talk)
    assert lines == ["top_p = 0.9  # the model's generation_config.json"]


def test_a_greedy_answer_says_that_it_will_be_the_same_again(fake_labs):
    result = invoke("chat", "--temperature", "0", input="one\n/retry\n")
    assert "nothing is sampled" in result.stderr
    assert len(fake_labs.requests) == 2


def test_another_model_goes_on_with_the_conversation_and_a_failed_load_changes_nothing(fake_labs):
    Path("labs.toml").write_text(
        'default_model = "a"\n[models.a]\nmodel_name = "a/a"\ntemperature = 0.1\n'
        '[models.b]\nmodel_name = "b/b"\n[models.vectors]\nmodel_name = "c"\nkind = "embedding"\n'
    )
    loaded = []

    def load(config: Any) -> labs.Model:
        loaded.append(config.model.model_name)
        if config.model.model_name in ("bb", "gone"):
            raise labs.ModelError("it is not there")
        return kit.MODEL

    load.cache_clear = lambda: loaded.append("cleared")  # type: ignore[attr-defined]
    labs.load_model = load  # type: ignore[assignment]  # fake_labs puts it back
    lines = [
        "one",
        "/model",
        "/model b",
        "two",
        "/model bb",
        "/model vectors",
        "/settings",
        "/model b",
    ]
    result = invoke("chat", input="\n".join([*lines, "/model other/one", "three"]))
    assert loaded == ["a/a", "b/b", "cleared", "bb", "other/one", "cleared"]
    assert contents(fake_labs.requests[-1]) == ["one", SAID, "two", SAID, "three"]
    assert result.stderr.splitlines() == [
        "* a",
        "  b",
        "Error: it is not there; did you mean b? (b still answers)",
        f"Error: model: vectors is of the kind embedding, which generates no text; {ELSEWHERE}"
        " (b still answers)",
        "[each setting has its default]",
    ]


ELSEWHERE = "POST /v1/embeddings answers for it"


def test_ctrl_c_while_a_model_loads_keeps_the_old_one(capsys):
    def load(name: str) -> Any:
        raise KeyboardInterrupt

    talk = said("one", "1")
    assert labs_chat_commands.run("/model b", talk, host_of(load=load)) == talk
    assert "still answers" in capsys.readouterr().err


def test_stats_show_speed_and_context(fake_labs):
    text = invoke("chat", input="one\n/stats\n").stderr
    for part in (
        "4 tokens, 8 tokens/s",
        "after 0.25 s",
        "3 tokens, 0 of them from",
        "7 of a context",
    ):
        assert part in text


ADD = labs_dialogue.Tool(function=labs_dialogue.Function(name="add"))
CALLS = [
    labs_parts.CallStarted(0, "c1", "add"),
    labs_parts.Arguments(0, '{"a": 1}'),
    labs_parts.CallStarted(1, "c2", "add"),
    labs_parts.Arguments(1, "{}"),
]
DONE = labs.Done(finish_reason="stop", usage=kit.USAGE, timings=kit.TIMINGS)


@pytest.mark.parametrize("results", [["3", "4"], ["3", ""], []])
@pytest.mark.parametrize("text", ["", "Let me see."])
def test_a_call_is_answered_by_the_person_or_left_out(results, text, monkeypatch):
    asked = []

    def answer(talk: Talk, messages: list[labs.Message]) -> Any:
        asked.append([*messages])
        first = [labs.Delta(text)] * bool(text)
        yield from [*first, *CALLS, DONE] if len(asked) == 1 else [labs.Delta("7"), DONE]

    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(results)))
    keyboard = labs_chat_input.Keyboard(labs_chat_input.History(None), lambda *_: [])
    after = labs_chat_turns.take_turn(said(), "sum?", host_of(answer=answer), keyboard)
    if results == ["3", "4"]:
        roles = [message.role for message in after.messages]
        assert roles == ["user", "assistant", "tool", "tool", "assistant"]
        assert [each.tool_call_id for each in after.messages[2:4]] == ["c1", "c2"]
        assert labs.check_prompt(None, after.messages)
    elif text:
        assert [message.content for message in after.messages] == ["sum?", text]
        assert after.messages[-1].tool_calls is None
    else:
        assert (after.messages, after.unanswered) == ((), ("sum?", ()))


def test_calls_of_an_answer_that_was_stopped_are_not_kept():
    found = labs_chat_turns.message_of([labs.Delta("so"), *CALLS])
    assert found == labs.Message(role="assistant", content="so")
    assert labs_chat_turns.message_of([labs_parts.Reasoning("hm")]) is None


def test_tools_come_from_a_file_and_go_again(fake_labs):
    Path("t.json").write_text('[{"type": "function", "function": {"name": "add"}}]')
    result = invoke("chat", input="/tools\n/tools t.json\n/tools off\n/tools\n")
    assert result.stderr.splitlines() == [
        "[there are no tools]",
        "[tools: add; /tools off takes them away]",
        "[there are no tools]",
    ]


def test_tools_of_a_flag_can_be_called_in_a_chat(fake_labs):
    Path("t.json").write_text('[{"type": "function", "function": {"name": "add"}}]')
    assert "[tools: add;" in invoke("chat", "--tools", "t.json", input="/tools\n").stderr


def test_completion_knows_commands_models_settings_and_files(tmp_path):
    host = host_of(models=("big", "base"))
    for name in ("notes.json", "nothing", ".hidden"):
        (tmp_path / name).touch()
    (tmp_path / "nested").mkdir()
    for before, word, found in [
        ("", "/s", ["/system ", "/settings ", "/stats", "/save "]),
        ("", "s", []),
        ("tell me /", "/s", []),
        ("/model ", "b", ["big", "base"]),
        ("/settings seed=1 ", "temp", ["temperature="]),
        ("/load ", "no", ["notes.json", "nothing"]),
        ("/load ", "./ne", ["./nested/"]),
        ("/load ", "nested/", []),
        ("/load ", "absent/", []),
        ("/undo ", "", []),
    ]:
        assert labs_chat_commands.completions(before, word, host) == found, (before, word)


# ---------------------------------------------------------------- the clipboard


def program(folder: Path, name: str, code: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{code}\n")
    path.chmod(0o755)


def test_the_answer_is_copied_by_the_first_program_that_works(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    for name in ("WAYLAND_DISPLAY", "SSH_CONNECTION", "SSH_TTY", "WSL_DISTRO_NAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DISPLAY", ":0")
    program(tmp_path, "xclip", "exit 3")
    program(tmp_path, "xsel", f"cat > {tmp_path}/copied")
    talk = said("one", "Grüße\n", "two")
    labs_chat_commands.run("/copy", talk, host_of())
    assert (tmp_path / "copied").read_text() == "Grüße\n"
    assert capsys.readouterr().err == "[copied by xsel]\n"
    program(tmp_path, "xsel", "exit 4")
    with pytest.raises(labs.LabsError, match="xclip: exit code 3; xsel: exit code 4"):
        labs_clipboard.copy("x")
    monkeypatch.setenv("SSH_TTY", "/dev/pts/0")
    with pytest.raises(labs.LabsError, match="there is no clipboard here"):
        labs_clipboard.copy("x")


# ---------------------------------------------------------------- text for a terminal


class Screen(io.StringIO):
    """A terminal."""

    def isatty(self) -> bool:
        return True


ATTACKS = {
    "\x1b]0;title\x07": "␛]0;title␇",
    "\x1b]52;c;QQ==\x07": "␛]52;c;QQ==␇",
    "\x1b[2J\x1b[H": "␛[2J␛[H",
    "\x1b]8;;http://evil\x1b\\good\x1b]8;;\x1b\\": "␛]8;;http://evil␛\\good␛]8;;␛\\",
    "\x9b2J\x9d0;x\x9c": "<U+009B>2J<U+009D>0;x<U+009C>",
    "safe\rfake\b\x7f\x00": "safe␍fake␈␡␀",
    "a\u202eb\u2066c": "a<U+202E>b<U+2066>c",
    "Grüße 漢字 🌍\tx\r\ny\u200fz": "Grüße 漢字 🌍\tx\ny\u200fz",
}


def test_a_terminal_gets_no_control_characters_and_all_else_gets_each():
    for text, seen in ATTACKS.items():
        assert labs_terminal.shown(text, Screen()) == seen
        assert labs_terminal.shown(text, open(os.devnull)) == text  # noqa: SIM115
    everything = "".join(map(chr, range(0x300)))
    assert not re.search(
        r"[^\t\n -~\xa0-\u02ff]", labs_terminal.safe(everything).translate(PICTURES)
    )


def test_answers_on_a_terminal_are_safe_in_a_chat_and_without(monkeypatch):
    parts = [labs.Delta("\x1b]0;x\x07\n"), labs.Delta("```\n"), labs.Delta("\x9b"), DONE]
    parts = [labs_parts.Reasoning("\x1b[2J"), *parts[:-1], *CALLS[:2], DONE]
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    line = "─" * 79
    for framed, end in ((False, "```\n<U+009B>\n"), (True, f"{line}\n<U+009B>\n{line}\n")):
        out, err = Screen(), Screen()
        monkeypatch.setattr("sys.stdout", out)
        monkeypatch.setattr("sys.stderr", err)
        paper = labs_shell.Paper(True, framed)
        for part in parts:
            paper(part)
        assert out.getvalue().startswith(f"␛]0;x␇\n{end}")
        call = out.getvalue().removeprefix(f"␛]0;x␇\n{end}")
        if framed:
            assert call == f'── call: add {line[13:]}\n{{\n  "a": 1\n}}\n{line}\n'
        else:
            assert json.loads(call)["function"]["name"] == "add"
        assert err.getvalue() == "\x1b[2m␛[2J\x1b[0m\n"


PICTURES = {0x2400 + code: " " for code in (*range(0x20), 0x21)}


def test_colours_are_for_terminals_that_want_them(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert labs_terminal.with_colours(Screen())
    assert not labs_terminal.with_colours(open(os.devnull))  # noqa: SIM115
    for name, value in (("NO_COLOR", "1"), ("TERM", "dumb")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert not labs_terminal.with_colours(Screen())


MARKDOWN = """\
Hi `x`
```python title
a = "`"
  ```inner
~~~
````
~~~
b
```
~~~
  ```rust
fn"""


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_fences_become_lines_however_the_text_is_cut(size):
    frames = labs_terminal.Frames()
    pieces = [MARKDOWN[at : at + size] for at in range(0, len(MARKDOWN), size)]
    lines = ("".join(map(frames.feed, pieces)) + frames.end()).split("\n")
    line = "─" * 79
    assert lines == [
        "Hi `x`",
        f"── python {line[10:]}",
        'a = "`"',
        "  ```inner",
        "~~~",
        *(line, line, "b", "```", line),
        f"── rust {line[8:]}",
        *("fn", line),
    ]
    assert frames.end() == ""


def test_text_is_shown_as_it_comes_and_only_a_possible_fence_waits():
    frames = labs_terminal.Frames()
    assert [frames.feed(each) for each in ("A", "b `", "``\n", "`", "`a", "\n", "``", "x``")] == [
        *("A", "b `", "``\n", "", "``a", "\n", "", "``x``")
    ]
    assert frames.end() == ""
    assert frames.feed("``` " + "x" * 300) != ""


# ---------------------------------------------------------------- history


def test_history_keeps_each_message_once_for_its_owner(tmp_path):
    path = tmp_path / "state" / "labs" / "chat_history"
    history = labs_chat_input.History(path)
    assert history.read() == []
    texts = ["one", "one", " secret", "two\nlines", "", "\udcff", "nu\0ll", "x" * 20_000, "Grüße"]
    kept = [history.add(text) for text in texts]
    assert kept == [True, False, False, True, False, False, False, True, True]
    assert labs_chat_input.History(path).read() == ["one", "two\nlines", "Grüße"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    path.chmod(0o644)
    history.add("three")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_two_chats_lose_nothing_and_the_file_stays_small(tmp_path, monkeypatch):
    monkeypatch.setattr(labs_chat_input, "BYTES", 4000)
    path = tmp_path / "history"

    def talk(name: str) -> None:
        history = labs_chat_input.History(path)
        for number in range(200):
            assert history.add(f"{name} {number}")

    threads = [threading.Thread(target=talk, args=(name,)) for name in ("a", "b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = labs_chat_input.History(path).read()
    assert 300 <= len(found) <= 400
    for name in ("a", "b"):  # none is missing among the newest, and each has its order
        numbers = [int(text.split()[1]) for text in found if text.startswith(name)]
        assert numbers == [*range(200 - len(numbers), 200)]
    assert path.stat().st_size <= 8100
    monkeypatch.setattr(labs_chat_input, "LINES", 10)
    assert labs_chat_input.History(path).read() == found[-10:]


def unusable(path: Path, kind: str) -> None:
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "other":
        path.write_text("my notes\n" * 9)
    elif kind == "below a file":
        path.parent.touch()
    elif kind == "locked":
        path.touch()


@pytest.mark.parametrize("kind", ["folder", "pipe", "other", "below a file", "locked"])
def test_a_history_that_cannot_be_used_is_reported_once(kind, tmp_path, capsys, monkeypatch):
    import fcntl

    monkeypatch.setattr(labs_chat_input, "WAIT_S", 0.05)
    path = tmp_path / ("file/history" if kind == "below a file" else "history")
    unusable(path, kind)
    with open(path) if kind == "locked" else open(os.devnull) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        history = labs_chat_input.History(path)
        assert history.read() == []
        assert history.add("one")  # it can be recalled in this chat
        assert history.add("two")
    told = capsys.readouterr().err
    assert re.fullmatch(r"\[messages are not kept for later chats: .*/history: .+\]\n", told)
    assert kind != "other" or path.read_text() == "my notes\n" * 9


def test_broken_lines_of_a_history_are_left_out(tmp_path, capsys):
    path = tmp_path / "history"
    path.write_bytes(b'"one"\n{"no": 1}\n"cut\n"\xff"\n"a\\u0000b"\n\n"two"\n"half')
    assert labs_chat_input.History(path).read() == ["one", "two"]
    assert capsys.readouterr().err == ""


def test_the_place_of_the_history(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, value, place in [
        ("XDG_STATE_HOME", "/state", "/state/labs/chat_history"),
        ("XDG_STATE_HOME", "relative", f"{tmp_path}/.local/state/labs/chat_history"),
        ("LABS_CHAT_HISTORY", "~/mine", f"{tmp_path}/mine"),
        ("LABS_CHAT_HISTORY", "off", "None"),
    ]:
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert str(labs_chat_input.history_file()) == place


def test_the_variable_of_the_history_is_none_of_labs_toml_or_env(caplog):
    labs.load_config(env={"LABS_CHAT_HISTORY": "off"})
    assert caplog.text == ""
    Path(".env").write_text("LABS_CHAT_HISTORY=off\n")  # which would have no effect
    with pytest.raises(labs.ConfigError, match="unknown setting LABS_CHAT_HISTORY"):
        labs.load_config(env={})


# ---------------------------------------------------------------- on a terminal

CHAT = """
import functools, time, labs, labs_chat_turns, labs_chat_commands, labs_chat_input, labs_talk
def answer(talk, messages):
    said = [each.content for each in messages]
    print("GOT", repr(said), flush=True)
    while said[-1] == "endless":
        yield labs.Delta("so")
        time.sleep(0.001)
    yield labs.Delta("so")
def load(name):
    print("LOADING", flush=True)
    time.sleep(60)
def samples(talk):
    return True
host = labs_talk.Host(answer=answer, load=load, models=("base", "big"), samples=samples)
complete = functools.partial(labs_chat_commands.completions, host=host)
history = labs_chat_input.History(labs_chat_input.history_file())
keyboard = labs_chat_input.Keyboard(history, complete)
labs_chat_turns.chat(labs_talk.Talk(config=labs.Config(), model=None), host, keyboard)
print("BYE", flush=True)
"""
READY = "\x1b[?2004h"  # readline asks the terminal to mark what is pasted, at each prompt


class Terminal:
    """A program on a terminal, and the other end of the terminal."""

    def __init__(self, process: Any, place: int) -> None:
        self.process, self.place = process, place

    def until(self, text: str, seen: str = "") -> str:
        return read_until(self.place, text, seen)

    def type(self, keys: bytes, until: str = READY, after: str = "") -> str:
        """Type keys. Return what is seen then, up to a text that comes after another."""
        if keys in (b"\x03", b"\x04"):  # which may be lost before readline waits for keys
            time.sleep(0.2)
        os.write(self.place, keys)
        seen = self.until(after).partition(after)[2] if after else ""
        return self.until(until, seen)

    def end(self) -> int:
        """Wait for the end, reading on: a program that writes to a full terminal waits."""
        until = time.monotonic() + kit.WAIT_S
        while self.process.poll() is None and time.monotonic() < until:
            if select.select([self.place], [], [], 0.05)[0]:
                try:
                    os.read(self.place, 4096)
                except OSError:  # the program has closed its end
                    time.sleep(0.01)
        return int(self.process.wait(timeout=1))


@pytest.fixture
def terminal(tmp_path):
    """Return what runs Python code on a terminal."""
    pty = pytest.importorskip("pty")
    started = []

    def run(code: str, *words: str, **settings: str) -> Terminal:
        ours, child = pty.openpty()
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), child)

        def begin() -> None:  # so that its Ctrl-C reaches it, and not pytest
            heed_sigint()
            os.login_tty(child)

        env = {**ONE_THREAD, "TERM": "xterm", "PYTHONPATH": str(ROOT), "HOME": str(tmp_path)}
        env |= {"INPUTRC": os.devnull, **settings}
        for name in (
            "XDG_STATE_HOME",
            "VISUAL",
            "EDITOR",
            "DISPLAY",
            "WAYLAND_DISPLAY",
            "NO_COLOR",
        ):
            env = env if name in settings else {k: v for k, v in env.items() if k != name}
        command = [sys.executable, "-c", code, *words]
        process = subprocess.Popen(command, env=env, preexec_fn=begin, **pipes)
        os.close(child)
        started.append(Terminal(process, ours))
        return started[-1]

    yield run
    for each in started:
        each.process.kill()
        each.process.wait()
        os.close(each.place)


def end_with_ctrl_c_and_ctrl_d(there: Terminal) -> None:
    """Check that Ctrl-C stops an answer, and that Ctrl-D ends the line of the prompt."""
    there.type(b"endless\r", "'endless']")
    there.type(b"\x03", "> ", after="[stopped]")
    seen = there.type(b"\x04", "BYE")
    assert re.search(r"^[^\n>]*\n\r?BYE", re.sub(r"\x1b\[\?2004.|\r", "", seen))


def test_with_readline_lines_that_are_pasted_are_one_message(terminal):
    there = terminal(CHAT)
    there.until(READY)
    for keys, message in (
        (b"\x1b[200~one\r/exit\r\rthree\r\x1b[201~ and more\r", r"one\n/exit\n\nthree\n and more"),
        (b"\x1b[200~/etc/a is a file.\rIs it?\x1b[201~\r", r"/etc/a is a file.\nIs it?"),
        (b"\x1b[A\r", r"/etc/a is a file.\nIs it?"),  # the one before, from the history
    ):
        assert f"'{message}']" in there.type(keys, after="GOT")
    end_with_ctrl_c_and_ctrl_d(there)


def test_without_readline_a_text_says_how_to_paste(terminal):
    there = terminal(f"import sys; sys.modules['readline'] = None\n{CHAT}")
    assert '"""' in there.until("> ")
    there.type(b"one\n", "> ", after="GOT")
    assert "set VISUAL or EDITOR" in there.type(b"/edit\n", "> ", after="Error")
    assert r"'one\ntwo']" in there.type(b'"""one\ntwo"""\n', "> ", after="GOT")
    end_with_ctrl_c_and_ctrl_d(there)


def test_a_terminal_that_knows_no_escapes_gets_none(terminal):
    there = terminal(CHAT, TERM="dumb")
    seen = there.until("> ")
    assert '"""' in seen  # how to type several lines
    seen += there.type(b"one\r", "> ", after="GOT")
    seen += there.type(b"\x04", "BYE")
    assert "\x1b" not in seen
    assert re.search(r"> \r*\n\r?BYE", seen)


def test_messages_are_found_again_in_the_next_chat_unless_a_space_is_before_them(
    terminal, tmp_path
):
    first = terminal(CHAT)
    first.until(READY)
    for text in ("first question", " a secret", "/system S", '"""two\nlines"""'):
        first.type(text.replace("\n", "\r").encode() + b"\r", after="GOT" * ("/" not in text))
    first.type(b"\x04", "BYE")
    second = terminal(CHAT)
    second.until(READY)
    assert r"['two\nlines']" in second.type(b"\x1b[A\r", after="GOT")
    assert "'first question']" in second.type(b"\x12irst\r", after="GOT")  # Ctrl-R
    path = tmp_path / ".local" / "state" / "labs" / "chat_history"
    kept = [json.loads(line) for line in path.read_text().splitlines()]
    assert kept == ["first question", "/system S", "two\nlines", "first question"]
    third = terminal(CHAT, LABS_CHAT_HISTORY="off")
    third.until(READY)
    third.type(b"third\r", after="GOT")
    assert len(path.read_text().splitlines()) == 4


def test_tab_completes_commands_and_names(terminal):
    there = terminal(CHAT)
    there.until(READY)
    there.type(b"/und\t\r", until="there is no message yet")
    there.type(b"/settings temp\t0.5\r", until="temperature = 0.5")
    assert "LOADING" in there.type(b"/mo\tbi\t\r", "LOADING")
    there.type(b"\x03", after="still answers")  # Ctrl-C while a model loads
    there.type(b"still here\r", "'still here']")


def test_ctrl_c_drops_what_is_typed_and_ends_a_chat_when_typed_twice(terminal):
    there = terminal(CHAT)
    there.until(READY)
    there.type(b"typed", "typed")
    assert "Ctrl-C again" not in there.type(b"\x03")
    assert "Ctrl-C again" in there.type(b"\x03")
    assert "'on']" in there.type(b"on\r", after="GOT")  # which begins the count anew
    assert "Ctrl-C again" in there.type(b"\x03")
    there.type(b"\x03", "BYE")
    assert there.end() == 0


def test_a_message_is_edited_at_the_prompt_or_in_an_editor(terminal, tmp_path):
    there = terminal(CHAT)
    there.until(READY)
    there.type(b"one\r", after="GOT")
    there.type(b"/edit\r", "> one")
    assert "['one more']" in there.type(b" more\r", after="GOT")
    there.type(b"/edit\r", "> one more")
    there.type(b"\x03")  # leaves the turn as it was
    assert "['one more', 'so', 'x']" in there.type(b"x\r", after="GOT")
    script = tmp_path / "editor"
    program(tmp_path, "editor", 'sed -i "s/one/two/" "$2"; printf "\\nlines" >> "$2"')
    there = terminal(CHAT, EDITOR=f"{script} --wait")
    there.until(READY)
    there.type(b"one\r", after="GOT")
    assert r"['two\n\nlines']" in there.type(b"/edit\r", after="GOT")
    script.write_text("#!/bin/sh\nexit 1\n")
    assert "Editing failed" in there.type(b"/edit\r", "name the editor")


def test_closing_the_terminal_ends_the_chat(terminal):
    for message in (b"", b"endless\r"):
        there = terminal(CHAT)
        there.until(READY)
        if message:
            there.type(message, "'endless']")
        os.close(there.place)
        there.place = os.open(os.devnull, os.O_RDWR)
        assert there.process.wait(timeout=kit.WAIT_S) in (-signal.SIGHUP, 0, 1)


GEN = "import sys; sys.argv[0] = 'labs-gen'; import labs_cli; labs_cli.main()"


@pytest.mark.real
def test_a_chat_with_a_model_on_a_terminal(terminal, tiny_folder):
    words = ("chat", "--model", str(tiny_folder), "--logit-bias", '{"27": 100}')  # Escape
    there = terminal(GEN, *words, "--max-new-tokens", "3", "--temperature", "0")
    assert "/help lists the commands, Ctrl-D ends the chat." in there.until(READY)
    seen = there.type(b"hello\r")
    assert "␛␛␛" in seen
    assert "[the answer was cut; /settings max_new_tokens= sets the limit]" in seen
    assert "3 tokens" in there.type(b"/stats\r")
    os.write(there.place, b"/settings max_new_tokens=4000\rhello\r")
    there.until("␛␛␛␛")
    there.type(b"\x03", after="[stopped]")
    assert re.search(r"]52;c;G\w+=*\x07", there.type(b"/copy\r", after="\x1b"))  # not the picture
    assert "OSC 52" in there.type(b"/copy\r")
    there.type(b"\x04", "\n")
    assert there.end() == 0


@pytest.mark.real
def test_the_transcript_of_the_page_is_what_a_person_sees(terminal):
    """LABS_README=1 writes it anew."""
    page = ROOT / "docs" / "chat.md"
    text = page.read_text(encoding="utf-8")
    block = re.search(r"```console\n\$ labs-gen (.*)\n((?:.*\n)*?)```", text)
    assert block
    there = terminal(GEN, *block[1].split(), "--no-history", **kept_cache())
    seen = there.until(READY)
    for line in re.findall(r"^> (.*)$", block[2], re.MULTILINE):
        time.sleep(0.2)
        seen += there.type(line.encode() + b"\r", READY if line != "/exit" else "/exit\r\n")
    shown = re.sub(r"\x1b\[\?2004.|\r", "", seen)
    shown = shown[shown.index("smollm2") :]  # after the progress of loading
    if os.environ.get("LABS_README") == "1":
        page.write_text(text.replace(block[2], shown), encoding="utf-8")
    else:
        assert shown == block[2]


def kept_cache() -> dict[str, str]:
    """Return where converted models are, which a changed HOME would hide."""
    place = os.environ.get("LABS_CACHE_DIR") or str(Path.home() / ".cache" / "labs")
    return {"LABS_CACHE_DIR": place}
