# SPDX-License-Identifier: Apache-2.0
"""One request, whatever way it comes: the shell, lines of a file and HTTP answer it alike."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import falcon.testing
import pytest
from kit import invoke
from msgspec import Struct

import labs
import labs_api
import labs_engine
import labs_jsonl
import labs_models
import labs_rag
import labs_request

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
RIVERS = "# Rivers\n\n## Seine\n\nThe Seine runs through Paris."
ONLY_A = {"logit_bias": {"97": 100}, "temperature": 0}  # lets any model say "aaa..."
COLOUR = {"enum": ["red", "green"]}


class Outcome(Struct, frozen=True):
    """What came of a request. sources: path#heading of each passage."""

    texts: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()
    error: str | None = None


class World:
    """The tiny model behind each way, with the settings of ./labs.toml."""

    def __init__(self, model: labs.Model) -> None:
        self.model = model
        self.config = labs.load_config(env={}, overrides={"model_name": "tiny"})
        self.engine = labs_engine.Engine(model)
        app = labs_api.create_app(self.config, labs_models.One(self.engine, "tiny"))
        self.client = falcon.testing.TestClient(app)

    def post(self, path: str, body: dict[str, Any]) -> Any:
        return self.client.simulate_post(path, json=body, headers={"Host": "localhost"}).json

    def line(self, row: dict[str, Any]) -> Any:
        context, tally = labs_request.open_context(self.config), labs_jsonl.Tally()
        lines = [(1, json.dumps(row).encode())]
        (found,) = labs_jsonl.answer_lines(self.model, context, lines, tally)
        return json.loads(found)


Asked = dict[str, Any]  # in labs' own words
Way = Callable[[World, Asked], Outcome]


# ---------------------------------------------------------------- the ways


def flags_of(asked: Asked) -> list[str]:
    words: list[str] = []
    for name, value in asked.items():
        flag = name.replace("_", "-")
        if name == "messages":
            words += ["--messages-json", json.dumps(value)]
        elif name == "response_format":
            schema = value.get("json_schema", {"schema": {"type": "object"}})["schema"]
            Path("schema.json").write_text(json.dumps(schema), encoding="utf-8")
            words += ["--schema", "schema.json"]
        elif isinstance(value, bool):
            words += [f"--{flag}" if value else f"--no-{flag}"]
        elif isinstance(value, list):
            words += [word for each in value for word in (f"--{flag}", each)]
        else:
            words += [f"--{flag}", json.dumps(value) if isinstance(value, dict) else str(value)]
    return words


def by_shell(world: World, asked: Asked) -> Outcome:
    done = invoke("--model", "tiny", *flags_of(asked))
    if done.exit_code:
        assert done.stdout == ""
        return Outcome(error=done.stderr.rpartition("Error: ")[2].removesuffix("\n"))
    sources = re.findall(r"^\[\d+\] (.*)$", done.stderr, re.MULTILINE)
    return Outcome((done.stdout.removesuffix("\n"),), tuple(sources))


def by_json_of_the_shell(world: World, asked: Asked) -> Outcome:
    done = invoke("--model", "tiny", "--json", *flags_of(asked))
    if done.exit_code:
        return Outcome(error=done.stderr.rpartition("Error: ")[2].removesuffix("\n"))
    return outcome_of(json.loads(done.stdout))


def by_line(world: World, asked: Asked) -> Outcome:
    return outcome_of(world.line(asked))


def by_http(world: World, asked: Asked) -> Outcome:
    return outcome_of(world.post("/generate", asked))


def by_chat_line(world: World, asked: Asked) -> Outcome:
    line = {"custom_id": "a", "method": "POST", "url": CHAT, "body": chat_of(asked)}
    return outcome_of(world.line(line)["response"]["body"])


def by_chat(world: World, asked: Asked) -> Outcome:
    return outcome_of(world.post(CHAT, chat_of(asked)))


def by_completions_line(world: World, asked: Asked) -> Outcome:
    line = {"custom_id": "a", "method": "POST", "url": COMPLETIONS, "body": raw_of(asked)}
    return outcome_of(world.line(line)["response"]["body"])


def by_completions(world: World, asked: Asked) -> Outcome:
    return outcome_of(world.post(COMPLETIONS, raw_of(asked)))


def chat_of(asked: Asked) -> Asked:
    """Say the same in OpenAI's words: a prompt is one message of the user's."""
    body = {**asked, "max_tokens": asked["max_new_tokens"]}
    if "prompt" in body:
        body["messages"] = [{"role": "user", "content": body.pop("prompt")}]
    if "logprobs" in body:
        body["logprobs"], body["top_logprobs"] = True, body["logprobs"]
    del body["max_new_tokens"]
    return body


def raw_of(asked: Asked) -> Asked:
    """Say the same in OpenAI's words, where a prompt is never put into a template."""
    assert asked["use_chat_template"] is False
    body = {**asked, "max_tokens": asked["max_new_tokens"]}
    del body["max_new_tokens"], body["use_chat_template"]
    return body


def outcome_of(answer: dict[str, Any]) -> Outcome:
    if "error" in answer:
        return Outcome(error=answer["error"]["message"])
    texts = [answer["text"]] if "text" in answer else []
    for choice in answer.get("choices", ()):
        texts.append(choice["text"] if "text" in choice else choice["message"]["content"])
    sources = [f"{each['path']}#{each['heading']}" for each in answer.get("documents", ())]
    return Outcome(tuple(texts), tuple(sources))


OWN = (by_shell, by_json_of_the_shell, by_line, by_http)
CHATS = (by_chat_line, by_chat)
RAW = (by_completions_line, by_completions)


# ---------------------------------------------------------------- the features


class Feature(Struct, frozen=True, kw_only=True):
    """What is asked, and what has to come of it, in regular expressions of a whole text each.

    same_as: asks for the same without settings. toml: labs.toml.
    """

    asked: Asked
    texts: tuple[str, ...] = ()
    error: str | None = None
    same_as: Asked | None = None
    sources: tuple[str, ...] = ()
    toml: str = ""
    ways: tuple[Way, ...] = (*OWN, *CHATS)


def typed(schema: Any) -> Asked:
    return {"type": "json_schema", "json_schema": {"schema": schema}}


MAIL, HIDDEN = {"prompt": "write to a@b.co"}, {"prompt": "write to [email]"}
TALK = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "to a@b.co"}]
HIDDEN_TALK = [TALK[0], {"role": "user", "content": "to [email]"}]
ANY, JSON = r"(?s).+", r"(?s)\{.*"
FEATURES = {
    "a prompt": Feature(asked={"prompt": "hi"}, texts=(ANY,)),
    "messages": Feature(asked={"messages": TALK}, texts=(ANY,)),
    "a masked prompt": Feature(
        asked=MAIL, same_as=HIDDEN, texts=(ANY,), toml='[guard]\nmask = ["email"]\nside = "input"'
    ),
    "masked messages": Feature(
        asked={"messages": TALK},
        same_as={"messages": HIDDEN_TALK},
        texts=(ANY,),
        toml='[guard]\nmask = ["email"]\nside = "input"',
    ),
    "a denied prompt": Feature(
        asked={"prompt": "a bad one"}, error=r".*deny\[0\].*", toml='[guard]\ndeny = ["bad"]'
    ),
    "a denied raw prompt": Feature(
        asked={"prompt": "a bad one", "use_chat_template": False},
        error=r".*deny\[0\].*",
        toml='[guard]\ndeny = ["bad"]',
        ways=(*OWN, *RAW),
    ),
    "a denied answer": Feature(
        asked={"prompt": "hi", **ONLY_A}, texts=("",), toml='[guard]\ndeny = ["aaaa"]'
    ),
    "a masked answer": Feature(
        asked={"prompt": "hi", "response_format": typed({"const": "a@b.co"}), "max_new_tokens": 30},
        texts=(r'"\[email\]"',),
        toml='[guard]\nmask = ["email"]',
    ),
    "too many tokens for the filters": Feature(
        asked={"prompt": "hi"}, error=".*max_prompt_tokens.*", toml="[guard]\nmax_prompt_tokens = 2"
    ),
    "logprobs that would tell": Feature(
        asked={"prompt": "hi", "logprobs": 1},
        error="logprobs: .*",
        toml='[guard]\ndeny = ["bad"]',
    ),
    "documents": Feature(
        asked={"prompt": "Which river runs through Paris?"},
        texts=(ANY,),
        sources=("docs/a.md#Rivers > Seine",),
        toml='[documents]\ndatabase = "docs.db"',
    ),
    "documents without a template": Feature(
        asked={"prompt": "hi", "use_chat_template": False},
        error="documents: .*",
        toml='[documents]\ndatabase = "docs.db"',
        ways=OWN,
    ),
    "no documents": Feature(
        asked={"prompt": "hi"},
        same_as={"prompt": "hi"},
        texts=(ANY,),
        toml='[documents]\ndatabase = "docs.db"\ndefault = false',
    ),
    "a schema": Feature(
        asked={"prompt": "hi", "response_format": typed(COLOUR)}, texts=('"(red|green)"',)
    ),
    "an object": Feature(
        asked={"prompt": "hi", "response_format": {"type": "json_object"}}, texts=(JSON,)
    ),
    "a schema that cannot be": Feature(
        asked={"prompt": "hi", "response_format": typed({"not": {}})}, error=".*not.*"
    ),
    "no template": Feature(
        asked={"prompt": "hi", "use_chat_template": False}, texts=(ANY,), ways=(*OWN, *RAW)
    ),
    "no beginning of an answer": Feature(
        asked={"prompt": "hi", "add_generation_prompt": False}, texts=(ANY,), ways=OWN
    ),
    "configured toggles": Feature(
        asked={"prompt": "hi"},
        same_as={"prompt": "hi", "add_generation_prompt": False},
        texts=(ANY,),
        toml="[generation]\nadd_generation_prompt = false",
    ),
    "a seed": Feature(asked={"prompt": "hi", "seed": 3, "temperature": 1.5}, texts=(ANY,)),
    "a configured seed": Feature(
        asked={"prompt": "hi", "temperature": 1.5},
        same_as={"prompt": "hi", "temperature": 1.5, "seed": 3},
        texts=(ANY,),
        toml="[generation]\nseed = 3",
    ),
    "choices": Feature(
        asked={"prompt": "hi", "seed": 3, "temperature": 1.5, "n": 2}, texts=(ANY, ANY), ways=CHATS
    ),
    "raw choices": Feature(
        asked={"prompt": "hi", "seed": 3, "n": 2, "temperature": 1.5, "use_chat_template": False},
        texts=(ANY, ANY),
        ways=RAW,
    ),
    "a stop text": Feature(asked={"prompt": "hi", **ONLY_A, "stop": ["aaa"]}, texts=("",)),
    "a later stop text": Feature(
        asked={"prompt": "hi", **ONLY_A, "stop": ["b", "aaa"], "max_new_tokens": 2}, texts=("aa",)
    ),
    "an unknown option": Feature(
        asked={"prompt": "hi", "max_tokenz": 3}, error=".*max[_-]tokenz.*", ways=(*OWN, *CHATS)
    ),
    "an option out of bounds": Feature(
        asked={"prompt": "hi", "top_p": 2.0}, error=".*top_p.*", ways=(*OWN, *CHATS)
    ),
    "options that contradict each other": Feature(
        asked={"prompt": "hi", "do_sample": True, "temperature": 0}, error=".*do_sample.*", ways=OWN
    ),
    "a prompt too long": Feature(asked={"prompt": "x" * 5000}, error=".*5004 tokens.*"),
    "an answer too long": Feature(
        asked={"prompt": "hi", "max_new_tokens": 5000}, error=".*max_new_tokens is 5000.*", ways=OWN
    ),
}
# Where each way's reader has words of its own for what it does not know.
OWN_WORDS = ("an unknown option", "an option out of bounds", "options that contradict each other")


@pytest.fixture
def open_world(tiny: labs.Model, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., World]]:
    """Return a function that writes ./labs.toml and opens the ways to the model."""
    monkeypatch.setattr(labs, "load_model", lambda config: tiny)
    for name in [name for name in os.environ if name.startswith("LABS_")]:
        monkeypatch.delenv(name)
    worlds: list[World] = []

    def opened(toml: str = "") -> World:
        Path("labs.toml").write_text(toml, encoding="utf-8")
        worlds.append(World(tiny))
        return worlds[-1]

    yield opened
    for world in worlds:
        world.engine.close()


def asked_of(asked: Asked) -> Asked:
    return {"max_new_tokens": 8, **asked}


@pytest.mark.parametrize("name", FEATURES)
def test_a_request_is_the_same_whatever_way_it_comes(
    name: str, open_world: Callable[..., World]
) -> None:
    feature = FEATURES[name]
    Path("docs").mkdir()
    Path("docs/a.md").write_text(RIVERS, encoding="utf-8")
    labs_rag.index(["docs"], "docs.db")
    world = open_world(feature.toml)
    found = {way.__name__: way(world, asked_of(feature.asked)) for way in feature.ways}
    for way, outcome in found.items():
        assert re.fullmatch(feature.error or "None", str(outcome.error)), (way, outcome)
        assert len(outcome.texts) == len(feature.texts), (way, outcome)
        for pattern, text in zip(feature.texts, outcome.texts, strict=True):
            assert re.fullmatch(pattern, text), (way, outcome)
        assert outcome.sources == feature.sources, (way, outcome)
    if name not in OWN_WORDS:
        assert len({*found.values()}) == 1, found
    if feature.same_as is not None:
        plain = by_http(open_world(), asked_of(feature.same_as))
        assert {outcome.texts for outcome in found.values()} == {plain.texts}


def test_choices_of_a_seed_are_answers_of_the_seeds_after_it(
    open_world: Callable[..., World],
) -> None:
    world = open_world()
    asked = asked_of({"prompt": "hi", "seed": 3, "temperature": 1.5})
    one_each = [by_line(world, {**asked, "seed": seed}).texts[0] for seed in (3, 4)]
    assert [*by_chat(world, {**asked, "n": 2}).texts] == one_each
    assert one_each[0] != one_each[1]
