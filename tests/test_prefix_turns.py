# SPDX-License-Identifier: Apache-2.0
"""Ten turns with tools and thinking through each protocol, with a restart after five of them."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kit
import msgspec
import pytest
import wire_forms
from kit import Site
from test_tools_http import Scripted

import labs
import labs_engine

TURNS, SHARE = 10, 0.95
RULES = "You are a careful agent. " * 60
RUN = {"type": "object", "properties": {"cmd": {"type": "string"}}, "required": ["cmd"]}
ABOUT = {"name": "run", "description": "Runs a command and shows what it printed. " * 4}
# As Qwen 3's template does, that shows reasoning only after the last question of a person.
LAST = (
    "{% set at = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set at.last = loop.index0 %}{% endif %}{% endfor %}"
)
KEEPS, _, _ = wire_forms.FORMS["hermes"]
DROPS = LAST + KEEPS.replace(
    "{% if m.reasoning_content %}", "{% if m.reasoning_content and loop.index0 > at.last %}"
)


class Chat:
    """A conversation as clients of a protocol keep it: they give back all that they got."""

    path = "/v1/chat/completions"

    def __init__(self) -> None:
        self.turns: list[Any] = [{"role": "system", "content": RULES}]

    def body(self) -> dict[str, Any]:
        tools = [{"type": "function", "function": {**ABOUT, "parameters": RUN}}]
        return {"messages": self.turns, "tools": tools}

    def person(self, text: str) -> None:
        self.turns.append({"role": "user", "content": text})

    def take(self, answer: Any, result: str) -> int:
        """Add an answer and the results of its calls; return the tokens that were cached."""
        message = answer["choices"][0]["message"]
        message = {k: v for k, v in message.items() if v is not None}
        assert message["reasoning_content"]
        self.turns.append(message)
        for call in message.get("tool_calls", ()):
            self.turns.append({"role": "tool", "tool_call_id": call["id"], "content": result})
        return int(answer["usage"]["prompt_tokens_details"]["cached_tokens"])


class Responses(Chat):
    path = "/v1/responses"

    def body(self) -> dict[str, Any]:
        wanted = {"include": ["reasoning.encrypted_content"], "store": False}
        tools = [{"type": "function", **ABOUT, "parameters": RUN}]
        return {"input": self.turns, "tools": tools, "reasoning": {"summary": "auto"}, **wanted}

    def take(self, answer: Any, result: str) -> int:
        items = answer["output"]
        assert items[0]["type"] == "reasoning"
        for item in items:
            self.turns.append({k: v for k, v in item.items() if v is not None and k != "status"})
        for item in items:
            if item["type"] == "function_call":
                back = {"type": "function_call_output", "call_id": item["call_id"]}
                self.turns.append({**back, "output": result})
        return int(answer["usage"]["input_tokens_details"]["cached_tokens"])


class Messages(Chat):
    path = "/v1/messages"

    def __init__(self) -> None:
        self.turns = []

    def body(self) -> dict[str, Any]:
        tools = [{**ABOUT, "input_schema": RUN}]
        thinks = {"type": "enabled", "budget_tokens": 1024}
        rest = {"system": RULES, "max_tokens": 2048, "thinking": thinks}
        return {"messages": self.turns, "tools": tools, **rest}

    def take(self, answer: Any, result: str) -> int:
        blocks = answer["content"]
        assert blocks[0]["type"] == "thinking"
        self.turns.append({"role": "assistant", "content": blocks})
        calls = [each["id"] for each in blocks if each["type"] == "tool_use"]
        back = [{"type": "tool_result", "tool_use_id": call, "content": result} for call in calls]
        if back:
            self.turns.append({"role": "user", "content": back})
        return int(answer["usage"]["cache_read_input_tokens"])


@pytest.fixture(scope="module")
def folder_of_model(tmp_path_factory: Any) -> Path:
    config = kit.llama()
    config.vocab_size = len(wire_forms.tokenizer_of("hermes"))
    config.max_position_embeddings = 65_536
    return kit.save_model(tmp_path_factory.mktemp("turns") / "m", config)


@contextlib.contextmanager
def engine_of(folder: Path, template: str, asked: list[Any]) -> Iterator[Any]:
    """Start an engine as a new process has it, that notes the tokens of each prompt."""
    tokenizer = wire_forms.tokenizer_of("hermes")
    tokenizer.chat_template = template
    model = kit.load(folder, cache_dir="cache")
    model = msgspec.structs.replace(model, tokenizer=tokenizer)
    found = Scripted(labs_engine.Engine(model, labs.Server(prefix_disk_bytes=2**30)))
    submit = found.submit

    def noting(inputs: Any, *rest: Any, **more: Any) -> Any:
        asked.append(inputs.input_ids)
        return submit(inputs, *rest, **more)

    found.submit = noting
    yield found
    found.engine.close(5)


def said(turn: int) -> tuple[str, bool]:
    """Return what the model says in a turn, and whether it asks for a tool: each third not."""
    text = f"<think>\n{f'I think of step {turn}. ' * 3}\n</think>\n\nI look at {turn}."
    calls = bool((turn + 1) % 3)
    return text + "\n" + wire_forms.written("hermes", "run", {"cmd": f"ls {turn}"}) * calls, calls


def common(mine: tuple[int, ...], theirs: tuple[int, ...]) -> int:
    pairs = zip(mine, theirs, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


@pytest.mark.parametrize("template", [KEEPS, DROPS], ids=["keeps", "drops"])
@pytest.mark.parametrize("protocol", [Chat, Responses, Messages])
def test_ten_turns_with_thinking_reuse_what_they_have_in_common(
    protocol, template, folder_of_model
):
    talk, asked, found = protocol(), list[tuple[int, ...]](), list[tuple[int, ...]]()
    config = kit.configured(generation=labs.Generation(max_new_tokens=800, temperature=0))
    calls = False
    for turns in (range(TURNS // 2), range(TURNS // 2, TURNS)):
        with engine_of(folder_of_model, template, asked) as engine:
            site, chunk = Site(engine, config), engine.engine.model.decoder.chunk
            for turn in turns:
                if not calls:
                    talk.person(f"Please do step {turn}. " * 20)
                engine.text, calls = said(turn)
                answer = site.post(talk.path, {"model": "tiny", **talk.body()})
                assert answer.status_code == 200, answer.text
                cached = talk.take(answer.json, f"line {turn} " * 90)
                shared = max((common(asked[-1], each) for each in asked[:-1]), default=0)
                found.append((len(asked[-1]), shared, cached))
                assert cached >= SHARE * (shared // chunk * chunk), found
    print("\n", protocol.__name__, "prompt, in common, cached:", found)
    kept = [count for _, count, _ in found]
    assert sum(kept) > 0.8 * sum(length for length, *_ in found[:-1])
