# SPDX-License-Identifier: Apache-2.0
"""Tests of `chat_template`: a chat template of one's own, in a file."""

from __future__ import annotations

import contextlib

import pytest
from kit import TEMPLATE, invoke, is_one_sentence, load, until, write

import labs
import labs_models

OWN = TEMPLATE.replace("<|assistant|>", "<|assistant|>Well: ")
TALK = [{"role": "user", "content": "Hi!"}]


def test_a_template_of_ones_own_takes_the_place_of_the_models(tiny_folder, folder, fresh):
    write("own.jinja", OWN)
    model = load(tiny_folder, chat_template="own.jinja")
    assert labs.build_inputs(model, messages=TALK).prompt.endswith("<|assistant|>Well: ")
    assert labs.build_inputs(model, prompt="Hi!").prompt.endswith("<|assistant|>Well: ")
    other = load(tiny_folder)
    assert labs.build_inputs(other, messages=TALK).prompt.endswith("<|assistant|>")
    prints = [
        labs.generate(each, labs.build_inputs(each, messages=TALK), max_new_tokens=1).fingerprint
        for each in (model, other)
    ]
    assert len({each and each.prompt_sha256 for each in prints}) == 2


def test_a_template_of_parts_and_options_is_read_as_one_of_a_model(tiny_folder, folder, fresh):
    parts = "{% for m in messages %}<|{{ m.role }}|>{{ m.content[0].text }}{% endfor %}{{ zip }}"
    write("parts.jinja", parts)
    model = load(tiny_folder, chat_template="parts.jinja")
    inputs = labs.build_inputs(model, messages=TALK, template_options={"zip": "zap"})
    assert inputs.prompt.endswith("<|user|>Hi!zap")
    with pytest.raises(labs.InputError, match="it reads zip"):
        labs.build_inputs(model, messages=TALK, template_options={"zap": "zip"})


# fmt: off
WRONG: list[tuple[bytes, str]] = [
    (b"{% for m in messages %}\n{{ m.content }\n{% endfor %}", "line 2 is not valid jinja"),
    (b"{% wonder %}", "line 1 is not valid jinja: Encountered unknown tag 'wonder'"),
    (b"Hello.", "leaves out the content of user messages"),
    (b"", "leaves out the content of user messages"),
    (b"\xff\xfe{", "cannot be read: 'utf-8' codec"),
    (TEMPLATE.encode() + b" " * 2**20, "has more than 1048576 bytes"),
]
# fmt: on


@pytest.mark.parametrize(("data", "named"), WRONG)
def test_a_file_that_is_no_template_is_refused_when_the_model_is_loaded(
    data, named, tiny_folder, folder, fresh
):
    (folder / "own.jinja").write_bytes(data)
    with pytest.raises(labs.ConfigError, match=named) as caught:
        load(tiny_folder, chat_template="own.jinja")
    assert is_one_sentence(caught.value)
    assert str(caught.value).startswith("chat_template = own.jinja: ")


@pytest.mark.parametrize(("name", "named"), [("none.jinja", "No such file"), (".", "directory")])
def test_a_template_that_is_not_there_is_refused(name, named, tiny_folder, folder, fresh):
    with pytest.raises(labs.ConfigError, match=f"chat_template = {name}: cannot be .*{named}"):
        load(tiny_folder, chat_template=name)


def test_a_template_can_neither_read_files_nor_reach_python(tiny_folder, folder, fresh):
    write("own.jinja", "{{ ''.__class__.__mro__ }}{{ messages[0].content }}")
    with pytest.raises(labs.InputError, match="unsafe"):
        labs.build_inputs(load(tiny_folder, chat_template="own.jinja"), messages=TALK)
    write("two.jinja", "{% include '/etc/hostname' %}{{ messages[0].content }}")
    with pytest.raises(labs.InputError, match="no loader"):
        labs.build_inputs(load(tiny_folder, chat_template="two.jinja"), messages=TALK)


def test_each_model_of_a_server_has_the_template_of_its_own_table(tiny_folder, folder, fresh):
    write("own.jinja", OWN)
    write(
        "labs.toml",
        f"[generation]\nmodel_name = '{tiny_folder}'\ntorch_dtype = 'fp32'\n"
        f"[models.own]\nmodel_name = '{tiny_folder}'\nchat_template = 'own.jinja'\n",
    )
    config = labs.load_config(env={})
    models, ends = labs_models.Models(config), dict[str, str]()
    try:
        for number, name in enumerate((config.model_id, "own"), 1):
            with contextlib.suppress(labs_models.Loading):
                models(name)  # the first one by its long name
            until(lambda number=number: len(models.loaded()) == number or None)
            prompt = labs.build_inputs(models.reader(name), messages=TALK).prompt
            ends[name] = prompt.rpartition("<|assistant|>")[2]
    finally:
        models.close()
    assert ends == {config.model_id: "", "own": "Well: "}


def test_a_client_cannot_choose_a_template(site):
    for path, body in (
        ("/generate", {"prompt": "a"}),
        ("/v1/chat/completions", {"messages": TALK}),
    ):
        response = site.post(path, {**body, "chat_template": "{{ messages }}"})
        assert response.status_code in (400, 422)
        assert "chat_template" in response.text


def test_the_shell_says_which_template_it_uses(tiny_folder, folder):
    write("own.jinja", OWN)
    model = ("--model", str(tiny_folder), "--chat-template", "own.jinja")
    shown = invoke("explain", *model, "--prompt", "Hi!")
    assert shown.exit_code == 0
    assert "Well: " in shown.stdout
    assert 'chat_template = "own.jinja"  # --chat-template' in shown.stdout
