# SPDX-License-Identifier: Apache-2.0
"""One request, whatever way it comes: the shell, lines of a file and HTTP answer it alike."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from kit import CHAT, COMPLETIONS, END, EOS, RESPONSES, Site, invoke
from kit import A as ONLY_A
from msgspec import Struct

import labs
import labs_engine
import labs_jsonl
import labs_rag
import labs_request

RIVERS = "# Rivers\n\n## Seine\n\nThe Seine runs through Paris."


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
        self.site = Site(self.engine, self.config)

    def post(self, path: str, body: dict[str, Any]) -> Any:
        return self.site.post(path, body).json

    def line(self, row: dict[str, Any]) -> Any:
        context, tally = labs_request.open_context(self.config), labs_jsonl.Tally()
        lines = [(1, json.dumps(row).encode())]
        (found,) = labs_jsonl.answer_lines(self.model, context, lines, tally)
        return json.loads(found)

    def openai_line(self, url: str, body: dict[str, Any]) -> Any:
        line = {"custom_id": "a", "method": "POST", "url": url, "body": body}
        return self.line(line)["response"]["body"]


Asked = dict[str, Any]  # a request in labs' own format
Way = Callable[[World, Asked], Outcome]


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
        elif name == "structured_outputs":
            Path("form.lark").write_text(value.get("grammar", ""), encoding="utf-8")
            words += ["--regex", value["regex"]] if "regex" in value else []
            words += [word for each in value.get("choice", ()) for word in ("--one-of", each)]
            words += ["--grammar", "form.lark"] if "grammar" in value else []
        elif name == "tools":
            Path("tools.json").write_text(json.dumps(value), encoding="utf-8")
            words += ["--tools", "tools.json"]
        elif isinstance(value, bool):
            words += [f"--{flag}" if value else f"--no-{flag}"]
        elif isinstance(value, list):
            words += [word for each in value for word in (f"--{flag}", str(each))]
        else:
            words += [f"--{flag}", json.dumps(value) if isinstance(value, dict) else str(value)]
    return words


def by_shell(world: World, asked: Asked, *more: str) -> Outcome:
    done = invoke("--model", "tiny", *more, *flags_of(asked))
    if done.exit_code:
        assert done.stdout == ""
        return Outcome(error=done.stderr.rpartition("Error: ")[2].partition("\n")[0])
    if more:
        return outcome_of(json.loads(done.stdout))
    sources = re.findall(r"^\[\d+\] (.*)$", done.stderr, re.MULTILINE)
    return Outcome((done.stdout.removesuffix("\n"),), tuple(sources))


def chat_of(asked: Asked) -> Asked:
    """Return the same in OpenAI's format: a prompt is one message of the user."""
    body = {**asked, "max_tokens": asked["max_new_tokens"]}
    if "prompt" in body:
        body["messages"] = [{"role": "user", "content": body.pop("prompt")}]
    if "logprobs" in body:
        body["logprobs"], body["top_logprobs"] = True, body["logprobs"]
    if "template_options" in body:
        body["chat_template_kwargs"] = body.pop("template_options")
    if "min_new_tokens" in body:
        body["min_tokens"] = body.pop("min_new_tokens")
    del body["max_new_tokens"]
    return body


def items_of(asked: Asked) -> Asked:
    """Return the same in the words of OpenAI's Responses API."""
    body = {**asked, "max_output_tokens": asked["max_new_tokens"]}
    body["input"] = body.pop("messages", None) or body.pop("prompt")
    if "logprobs" in body:
        body |= {"include": ["message.output_text.logprobs"], "top_logprobs": body.pop("logprobs")}
    if "template_options" in body:
        body["chat_template_kwargs"] = body.pop("template_options")
    if form := body.pop("response_format", None):
        body["text"] = {"format": {"type": form["type"], **form.get("json_schema", {})}}
    if "tools" in body:
        body["tools"] = [{"type": "function", **each["function"]} for each in body["tools"]]
    del body["max_new_tokens"]
    return body


def raw_of(asked: Asked) -> Asked:
    """Return the same in OpenAI's format, in which a prompt is never put into a template."""
    assert asked["use_chat_template"] is False
    body = {**asked, "max_tokens": asked["max_new_tokens"]}
    if "min_new_tokens" in body:
        body["min_tokens"] = body.pop("min_new_tokens")
    del body["max_new_tokens"], body["use_chat_template"]
    return body


def outcome_of(answer: dict[str, Any]) -> Outcome:
    if answer.get("error") is not None:
        return Outcome(error=answer["error"]["message"])
    texts = [text] if isinstance(text := answer.get("text"), str) else []
    for choice in answer.get("choices", ()):
        texts.append(choice["text"] if "text" in choice else choice["message"]["content"])
    for item in answer.get("output", ()):
        texts += [part["text"] for part in item["content"]]
    sources = [f"{each['path']}#{each['heading']}" for each in answer.get("documents", ())]
    return Outcome(tuple(texts), tuple(sources))


WAYS: dict[str, Way] = {
    "shell": by_shell,
    "shell as JSON": lambda world, asked: by_shell(world, asked, "--json"),
    "line": lambda world, asked: outcome_of(world.line(asked)),
    "HTTP": lambda world, asked: outcome_of(world.post("/generate", asked)),
    "chat line": lambda world, asked: outcome_of(world.openai_line(CHAT, chat_of(asked))),
    "chat": lambda world, asked: outcome_of(world.post(CHAT, chat_of(asked))),
    "items line": lambda world, asked: outcome_of(world.openai_line(RESPONSES, items_of(asked))),
    "items": lambda world, asked: outcome_of(world.post(RESPONSES, items_of(asked))),
    "raw line": lambda world, asked: outcome_of(world.openai_line(COMPLETIONS, raw_of(asked))),
    "raw": lambda world, asked: outcome_of(world.post(COMPLETIONS, raw_of(asked))),
}
OWN = ("shell", "shell as JSON", "line", "HTTP")
HOLDS = ("shell", "shell as JSON", "line", "HTTP", "chat line", "chat")
CHATS, ITEMS, RAW = ("chat line", "chat"), ("items line", "items"), ("raw line", "raw")


class Feature(Struct, frozen=True):
    """A request, and regular expressions for each whole text of the answer or for the error.

    toml: labs.toml. same_as: a request that has the same answer without settings.
    """

    asked: Asked
    texts: tuple[str, ...] = ()
    error: str | None = None
    toml: str = ""
    ways: tuple[str, ...] = (*OWN, *CHATS, *ITEMS)
    same_as: Asked | None = None
    sources: tuple[str, ...] = ()


def answered(asked: Asked, *texts: str, **rest: Any) -> Feature:
    asked = asked if "messages" in asked else {"prompt": "hi", **asked}
    return Feature(asked, texts or (r"(?s).+",), **rest)


def refused(asked: Asked, error: str, toml: str = "", **rest: Any) -> Feature:
    return Feature({"prompt": "hi", **asked}, error=error, toml=toml, **rest)


def typed(schema: Any) -> Asked:
    return {"response_format": {"type": "json_schema", "json_schema": {"schema": schema}}}


def held(**outputs: Any) -> Asked:
    return {"structured_outputs": outputs}


def talk(text: str) -> Asked:
    system = {"role": "system", "content": "Be brief."}
    return {"messages": [system, {"role": "user", "content": text}]}


MASK, DENY = '[guard]\nmask = ["email"]', '[guard]\ndeny = ["bad"]'
ASKED_ONLY = f'{MASK}\nside = "input"'
DOCS = '[documents]\ndatabase = "docs.db"'
PROMPT_ONLY = {"use_chat_template": False, "echo": True, "max_new_tokens": 0}
PLAIN, OPEN = {"use_chat_template": False}, {"add_generation_prompt": False}
NOT_OPEN = "[generation]\nadd_generation_prompt = false"
WILD, BAD, ADDRESS = {"temperature": 1.5}, {"prompt": "a bad one"}, {"const": "a@b.co"}
SEEDED, CONFIGURED_SEED = {"seed": 3, **WILD}, "[generation]\nseed = 3"
TOOLS = {"tools": [{"type": "function", "function": {"name": "f"}}]}
OPTIONS, DROPPED = {"template_options": {"zip": 1}}, '[generation]\nreasoning = "drop"'
A_ID = int(next(iter(ONLY_A["logit_bias"])))
ENDS = {"logit_bias": {str(END): 100}}  # lets any model end at once
THREE = {"logit_bias": {str(END): -100, str(EOS): -100}, "max_new_tokens": 3}
GOES_ON = {"messages": [*talk("hi")["messages"], {"role": "assistant", "content": "I"}]}
GOES_ON["continue_final_message"] = True
SEINE = ("docs/a.md#Rivers > Seine",)
FEATURES = {
    "a prompt": answered({}),
    "messages": answered(talk("to a@b.co")),
    "a masked prompt": answered(
        {"prompt": "a@b.co"}, toml=ASKED_ONLY, same_as={"prompt": "[email]"}
    ),
    "masked messages": answered(talk("a@b.co"), toml=ASKED_ONLY, same_as=talk("[email]")),
    "a denied prompt": refused(BAD, r".*deny\[0\].*", DENY),
    "a denied raw prompt": refused({**BAD, **PLAIN}, r".*deny\[0\].*", DENY, ways=(*OWN, *RAW)),
    "a denied answer": answered(ONLY_A, "", toml='[guard]\ndeny = ["aaaa"]'),
    "a masked answer": answered(
        {**typed(ADDRESS), "max_new_tokens": 30}, r'"\[email\]"', toml=MASK
    ),
    "too many tokens": refused({}, ".*max_prompt_tokens.*", "[guard]\nmax_prompt_tokens = 2"),
    "filtered logprobs": refused({"logprobs": 1}, "logprobs: .*", DENY),
    "documents": answered({"prompt": "Which river runs through Paris?"}, toml=DOCS, sources=SEINE),
    "documents without a template": refused(PLAIN, "documents: .*", DOCS, ways=OWN),
    "no documents": answered({}, toml=f"{DOCS}\ndefault = false", same_as={"prompt": "hi"}),
    "a schema": answered(typed({"enum": ["red", "green"]}), '"(red|green)"'),
    "an object": answered({"response_format": {"type": "json_object"}}, r"(?s)\{.*"),
    "a schema that is not supported": refused(typed({"not": {"minimum": 1}}), ".*not.*"),
    "a pattern": answered(held(regex="^(red|gr[ae]y)$"), "red|gr[ae]y", ways=HOLDS),
    "a choice": answered(held(choice=["red", "redder"]), "red|redder", ways=HOLDS),
    "a grammar": answered(held(grammar='start: "a"{2,4} "b"?'), "a{2,4}b?", ways=HOLDS),
    "a raw pattern": answered({**held(regex="[ab]{3}"), **PLAIN}, "[ab]{3}", ways=(*OWN, *RAW)),
    "a pattern that is not supported": refused(held(regex="(?=a)b"), "regex: .*", ways=HOLDS),
    "a pattern that is none": refused(held(regex="(a"), "regex: unclosed group", ways=HOLDS),
    "a choice of one text twice": refused(held(choice=["a", "a"]), "choice: .*", ways=HOLDS),
    "a grammar of control tokens": refused(
        held(grammar="start: <end>"), "grammar: line 1: .*special tokens.*", ways=HOLDS
    ),
    "a schema as an output": answered(held(json={"enum": ["red"]}), '"red"', ways=HOLDS[2:]),
    "a schema as text": answered(held(json='{"enum": ["red"]}'), '"red"', ways=HOLDS[2:]),
    "an object as an output": answered(held(json_object=True), r"(?s)\{.*", ways=HOLDS[2:]),
    "two outputs": refused(held(regex="a", choice=["a"]), ".*exactly one of.*", ways=HOLDS[2:]),
    "no output": refused(held(json_object=False), ".*exactly one of.*", ways=HOLDS[2:]),
    "an unknown output": refused(
        held(regex="a", whitespace_pattern=" "), ".*whitespace_pattern.*", ways=HOLDS[2:]
    ),
    "a pattern and a schema": refused(
        {**held(regex="a"), **typed({})}, "structured_outputs: response_format .*", ways=HOLDS[2:]
    ),
    "no template": answered(PLAIN, ways=(*OWN, *RAW)),
    "no beginning of an answer": answered(OPEN, ways=OWN),
    "configured toggles": answered({}, toml=NOT_OPEN, same_as={"prompt": "hi", **OPEN}),
    "a seed": answered(SEEDED),
    "a configured seed": answered(WILD, toml=CONFIGURED_SEED, same_as={"prompt": "hi", **SEEDED}),
    "choices": answered({**SEEDED, "n": 2}, "(?s).+", "(?s).+", ways=CHATS),
    "raw choices": answered({**SEEDED, **PLAIN, "n": 2}, "(?s).+", "(?s).+", ways=RAW),
    "an echo": answered({**ONLY_A, **PLAIN, "echo": True}, "hia{8}", ways=RAW),
    "an echo with logprobs": answered(
        {**ONLY_A, **PLAIN, "echo": True, "logprobs": 2}, "hia{8}", ways=RAW
    ),
    "an echo alone": answered({**PROMPT_ONLY, "logprobs": 2, "n": 2}, "hi", "hi", ways=RAW),
    "no tokens and no echo": refused(
        {**PROMPT_ONLY, "echo": False}, ".*max_tokens = 0 .*", ways=RAW
    ),
    "a filtered echo": refused({**PLAIN, "echo": True}, "echo: not available .*", DENY, ways=RAW),
    "a masked echo": answered(
        {**PROMPT_ONLY, "prompt": "a@b.co"}, r"\[email\]", toml=ASKED_ONLY, ways=RAW
    ),
    "a stop text": answered({**ONLY_A, "stop": ["aaa"]}, ""),
    "a later stop text": answered({**ONLY_A, "stop": ["b", "aaa"], "max_new_tokens": 2}, "aa"),
    "a token that ends": answered({**ONLY_A, "stop_token_ids": [A_ID]}, "", ways=(*OWN, *CHATS)),
    "a token that ends a raw answer": answered(
        {**ONLY_A, **PLAIN, "stop_token_ids": [3, A_ID]}, "", ways=(*OWN, *RAW)
    ),
    "an end that is ignored": answered({**ENDS, "ignore_eos": True}, "", ways=(*OWN, *CHATS)),
    "too early an end": answered(
        {**ENDS, "min_new_tokens": 3}, ways=(*OWN, *CHATS), same_as={"prompt": "hi", **THREE}
    ),
    "too early an end of a raw answer": answered(
        {**ENDS, **PLAIN, "min_new_tokens": 3},
        ways=(*OWN, *RAW),
        same_as={"prompt": "hi", **PLAIN, **THREE},
    ),
    "too early a stop text": answered(
        {**ONLY_A, "stop": ["aa"], "min_new_tokens": 3}, "aaa", ways=(*OWN, *CHATS)
    ),
    "an end that a schema decides": refused(
        {**typed({"enum": ["red"]}), "ignore_eos": True}, "ignore_eos: .*", ways=(*OWN, *CHATS)
    ),
    "a last message that goes on": answered({**GOES_ON, **ONLY_A}, "a{8}", ways=(*OWN, *CHATS)),
    "a schema of a rest": Feature(
        {**typed({}), **GOES_ON}, error="continue_final_message: .*", ways=(*OWN, *CHATS)
    ),
    "an empty message that goes on": Feature(
        {**talk(" "), "continue_final_message": True},
        error="continue_final_message: the last message has no text to continue",
        ways=(*OWN, *CHATS),
    ),
    "a longest that is too short": refused(
        {"min_new_tokens": 9}, ".*min_(new_)?tokens is greater.*", ways=(*OWN, *CHATS)
    ),
    "an unknown option": refused({"max_tokenz": 3}, ".*max[_-]tokenz.*"),
    "an option out of bounds": refused({"top_p": 2.0}, ".*top_p.*"),
    "a contradiction": refused({"do_sample": True, "temperature": 0}, ".*do_sample.*", ways=OWN),
    "a prompt too long": refused({"prompt": "x" * 5000}, ".*5004 tokens.*"),
    "tools of a model that shows none": refused(TOOLS, "tools: .*renders none"),
    "reasoning": answered({"reasoning": "drop"}, same_as={"prompt": "hi"}, ways=(*OWN, *CHATS)),
    "configured reasoning": answered({}, toml=DROPPED, same_as={"prompt": "hi"}),
    "a budget of a model that does not think": refused({"thinking_budget": 3}, ".*no reasoning.*"),
    "options that the template does not read": refused(OPTIONS, ".*does not read 'zip'.*"),
    "tools of a raw prompt": refused({**TOOLS, **PLAIN}, "tools: .*only a chat.*", ways=OWN),
    "an answer too long": refused({"max_new_tokens": 5000}, ".*max_new_tokens is 5000.*", ways=OWN),
}
# The reader of each way has its own sentence for these.
OWN_WORDS = ("an unknown option", "an option out of bounds", "a contradiction")
OWN_WORDS += (
    "a longest that is too short",
    "options that the template does not read",
    "a schema that is not supported",
)
OWN_WORDS += ("two outputs", "no output", "an unknown output")


@pytest.fixture
def open_world(tiny, no_variables, monkeypatch):
    """Return a function that writes ./labs.toml and opens the ways to the model."""
    monkeypatch.setattr(labs, "load_model", lambda config: tiny)
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
def test_a_request_is_the_same_whatever_way_it_comes(name, open_world):
    feature = FEATURES[name]
    Path("docs").mkdir()
    Path("docs/a.md").write_text(RIVERS, encoding="utf-8")
    labs_rag.index(["docs"], "docs.db")
    world = open_world(feature.toml)
    found = {way: WAYS[way](world, asked_of(feature.asked)) for way in feature.ways}
    for way, outcome in found.items():
        assert re.fullmatch(feature.error or "None", str(outcome.error)), (way, outcome)
        assert len(outcome.texts) == len(feature.texts), (way, outcome)
        for pattern, text in zip(feature.texts, outcome.texts, strict=True):
            assert re.fullmatch(pattern, text), (way, outcome)
        assert outcome.sources == feature.sources, (way, outcome)
    if name not in OWN_WORDS:
        assert len({*found.values()}) == 1, found
    if feature.same_as is not None:
        plain = WAYS["HTTP"](open_world(), asked_of(feature.same_as))
        assert {outcome.texts for outcome in found.values()} == {plain.texts}


def test_choices_of_a_seed_are_answers_of_the_seeds_after_it(open_world):
    world = open_world()
    asked = asked_of({"prompt": "hi", "seed": 3, "temperature": 1.5})
    one_each = [WAYS["line"](world, {**asked, "seed": seed}).texts[0] for seed in (3, 4)]
    assert [*WAYS["chat"](world, {**asked, "n": 2}).texts] == one_each
    assert one_each[0] != one_each[1]
