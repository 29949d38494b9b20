# SPDX-License-Identifier: Apache-2.0
"""Clients with their default settings, against labs-api with its default model.

    uv venv /tmp/clients && uv pip install --python /tmp/clients -r tests/clients/requirements.txt
    SERVER_COMMAND=labs-api /tmp/clients/bin/python -m pytest -q tests/clients

SERVER_COMMAND is the command that starts the server; it need not be installed beside the clients.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import litellm
import openai
import pytest
from autogen_agentchat.agents import AssistantAgent
from autogen_ext.models.openai import OpenAIChatCompletionClient
from langchain_openai import ChatOpenAI, OpenAI

HERE = Path(__file__).parent
QUESTION = "What is the capital of France?"
KEY = "any"


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """Start labs-api as a program and return the address of its OpenAI endpoints."""
    command = [*shlex.split(os.environ.get("SERVER_COMMAND", "labs-api")), "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            found = re.search(r"http://\S+", process.stderr.readline())
            assert found
            assert "ready" in process.stderr.readline()
            yield f"{found[0]}/v1"
        finally:
            process.terminate()
            process.stderr.read()


@pytest.fixture(scope="module")
def model(url: str) -> str:
    with openai.OpenAI(base_url=url, api_key=KEY) as client:
        return next(iter(client.models.list())).id


def test_openais_client_chats_streamed_and_not(url: str, model: str) -> None:
    with openai.OpenAI(base_url=url, api_key=KEY) as client:
        messages: Any = [{"role": "user", "content": QUESTION}]
        whole = client.chat.completions.create(model=model, messages=messages)
        assert "Paris" in (whole.choices[0].message.content or "")
        messages += [whole.choices[0].message, {"role": "user", "content": "And of Italy?"}]
        chunks = client.chat.completions.create(model=model, messages=messages, stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks)


HALF_AN_EMOJI = 10813  # the token of the first two bytes of an emoji, in the default model


def test_openais_client_reads_the_bytes_of_half_an_emoji(url: str, model: str) -> None:
    # What the model says is given, as its own choice differs between kinds of processors.
    asked: Any = {"model": model, "temperature": 0, "max_tokens": 9}
    asked["logit_bias"] = {str(HALF_AN_EMOJI): 100}
    with openai.OpenAI(base_url=url, api_key=KEY) as client:
        legacy = client.completions.create(prompt="\U0001f600", logprobs=5, **asked)
        (choice,) = legacy.choices
        found = choice.logprobs
        assert found is not None
        tops = found.top_logprobs or []
        assert [len(top) for top in tops] == [
            5 + (token not in [*top][:5])
            for token, top in zip(found.tokens or [], tops, strict=True)
        ]
        offsets = found.text_offset or []
        assert offsets == sorted(offsets)
        assert offsets[-1] <= len(choice.text)
        assert found.tokens == ["bytes:\\xf0\\x9f"] * 9
        messages: Any = [{"role": "user", "content": "Hi"}]
        chat = client.chat.completions.create(
            messages=messages, logprobs=True, top_logprobs=3, **asked
        )
        content = chat.choices[0].logprobs.content  # type: ignore[union-attr]
        assert [each.bytes for each in content or []] == [[0xF0, 0x9F]] * 9
        assert {*(chat.choices[0].message.content or "")} == {"\ufffd"}


def test_litellm_chats_and_knows_a_prompt_that_is_too_long(url: str, model: str) -> None:
    asked = {"model": f"openai/{model}", "api_base": url, "api_key": KEY}
    messages = [{"role": "user", "content": QUESTION}]
    answer = litellm.completion(messages=messages, **asked)
    assert "Paris" in answer.choices[0].message.content
    messages += [answer.choices[0].message.model_dump(), messages[0]]
    assert litellm.completion(messages=messages, **asked).choices
    too_long = [{"role": "user", "content": "word " * 20_000}]
    with pytest.raises(litellm.ContextWindowExceededError):
        litellm.completion(messages=too_long, **asked)
    with pytest.raises(litellm.ContextWindowExceededError):
        list(litellm.completion(messages=too_long, stream=True, **asked))


def test_langchain_chats(url: str, model: str) -> None:
    chat = ChatOpenAI(base_url=url, api_key=KEY, model=model)
    assert "Paris" in str(chat.invoke(QUESTION).content)
    assert "".join(str(chunk.content) for chunk in chat.stream(QUESTION))
    assert len(chat.batch(["Hi!", "Ho!", "Ha!"])) == 3


def test_langchain_completes_thirty_prompts_at_once(url: str, model: str) -> None:
    complete = OpenAI(base_url=url, api_key=KEY, model=model, max_tokens=4, batch_size=30)
    found = complete.generate([f"{number} and {number} are" for number in range(30)])
    assert len(found.generations) == 30
    assert all(generation for (generation,) in found.generations)


def test_autogens_assistant_answers(url: str, model: str) -> None:
    info: Any = dict.fromkeys(("vision", "function_calling", "json_output"), False)
    info |= {"family": "unknown", "structured_output": False, "multiple_system_messages": True}

    async def ask() -> list[Any]:
        client = OpenAIChatCompletionClient(model=model, base_url=url, api_key=KEY, model_info=info)
        agent = AssistantAgent("assistant", model_client=client)
        found = [await agent.run(task=QUESTION), await agent.run(task="And of Italy?")]
        await client.close()
        return found

    first, second = asyncio.run(ask())
    assert "Paris" in first.messages[-1].content
    assert second.messages[-1].content


def test_llm_answers_at_the_shell(url: str, model: str, tmp_path: Path) -> None:
    entry = f"- model_id: labs\n  model_name: {json.dumps(model)}\n  api_base: {url}\n"
    Path(tmp_path, "extra-openai-models.yaml").write_text(entry, encoding="utf-8")
    environment = {**os.environ, "LLM_USER_PATH": str(tmp_path), "OPENAI_API_KEY": KEY}
    for options in ((), ("--no-stream",), ("-o", "max_tokens", "16", "-o", "temperature", "0")):
        command = [sys.executable, "-m", "llm", "-m", "labs", *options, QUESTION]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip()


BODIES = [
    pytest.param(body, id=f"{name}-{number}")
    for name in ("open_webui", "continue")
    for number, body in enumerate(json.loads((HERE / f"{name}.json").read_text(encoding="utf-8")))
]


@pytest.mark.parametrize("body", BODIES)
def test_requests_that_apps_send_are_answered(url: str, model: str, body: dict[str, Any]) -> None:
    sent = json.loads(json.dumps(body).replace('"MODEL"', json.dumps(model)))
    answer = httpx.post(f"{url}/chat/completions", json=sent, timeout=300)
    assert answer.status_code == 200, answer.text
    if sent["stream"]:
        assert answer.text.endswith("data: [DONE]\n\n")
        assert '"error"' not in answer.text
    else:
        assert answer.json()["choices"][0]["message"]["content"]
