# SPDX-License-Identifier: Apache-2.0
"""Clients with tools, as they come, against labs-api with a tiny Qwen 3 (parrot.py).

    PARROT="PYTHON tests/clients/parrot.py" /tmp/clients/bin/python -m pytest -q tests/clients

PYTHON is one that has labs. A question says what the model answers at each turn, see parrot.py.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import agents
import anthropic
import instructor
import litellm
import openai
import pydantic_ai
import pytest
from autogen_agentchat.agents import AssistantAgent
from autogen_ext.models.openai import OpenAIChatCompletionClient
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, Field
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

KEY = "any"
ADD = 'add({"a": 2, "b": 3})'
TRIP = 'Trip({"city": "Rome", "days": 3})'


class Trip(BaseModel):
    """A trip to a city."""

    city: Literal["Paris", "Rome"]
    days: int = Field(ge=1, le=9)


SUMS: list[tuple[int, int]] = []


def add(a: int, b: int) -> int:
    """Add two numbers.

    Args:
        a: The first.
        b: The second.
    """
    SUMS.append((a, b))
    return a + b


class Site(BaseModel):
    url: str
    model: str

    @property
    def openai(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url, api_key=KEY, timeout=120)

    @property
    def anthropic(self) -> anthropic.Anthropic:
        return anthropic.Anthropic(base_url=self.url.removesuffix("/v1"), api_key=KEY, timeout=120)

    @property
    def langchain(self) -> ChatOpenAI:
        return ChatOpenAI(base_url=self.url, api_key=KEY, model=self.model, timeout=120)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Start the parrot as a program, with its model in a folder of its own."""
    if "PARROT" not in os.environ or shutil.which("npm") is None:
        pytest.skip("needs npm, and PARROT, the command that starts the server")
    folder = tmp_path_factory.mktemp("parrot")
    command = [*shlex.split(os.environ["PARROT"]), str(folder), "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            lines = iter(process.stderr.readline, "")
            url = next(found[0] for line in lines if (found := re.search(r"http://[\d.:]+", line)))
            assert any("ready" in line for line in lines)
            yield Site(url=f"{url}/v1", model=str(folder / "tiny-qwen3"))
        finally:
            process.terminate()
            process.stderr.read()


# ---------------------------------------------------------------- one function for each client


def pydantic_ai_agent(site: Site, **options: Any) -> pydantic_ai.Agent[None, Any]:
    provider = OpenAIProvider(base_url=site.url, api_key=KEY)
    return pydantic_ai.Agent(OpenAIChatModel(site.model, provider=provider), **options)


def typed_by_pydantic_ai(site: Site) -> Any:
    question = TRIP.replace("Trip", "final_result")
    return pydantic_ai_agent(site, output_type=Trip).run_sync(question).output


def typed_by_pydantic_ai_after_a_tool(site: Site) -> Any:
    agent = pydantic_ai_agent(site, output_type=Trip, tools=[add])
    return agent.run_sync(f"{ADD} > {TRIP.replace('Trip', 'final_result')}").output


def typed_by_pydantic_ai_in_a_stream(site: Site) -> Any:
    async def ask() -> Any:
        agent = pydantic_ai_agent(site, output_type=Trip)
        async with agent.run_stream(TRIP.replace("Trip", "final_result")) as run:
            return await run.get_output()

    return asyncio.run(ask())


def typed_by_instructor(site: Site) -> Any:
    client = instructor.from_openai(site.openai)
    messages: Any = [{"role": "user", "content": TRIP}]
    return client.chat.completions.create(
        model=site.model, messages=messages, response_model=Trip, max_retries=0
    )


def typed_by_langchain(site: Site) -> Any:
    return site.langchain.with_structured_output(Trip, method="function_calling").invoke(TRIP)


def typed_by_openais_parse(site: Site) -> Any:
    completion = site.openai.chat.completions.parse(
        model=site.model,
        messages=[{"role": "user", "content": TRIP}],
        tools=[openai.pydantic_function_tool(Trip)],
    )
    (call,) = completion.choices[0].message.tool_calls or ()
    return call.function.parsed_arguments


def typed_by_litellm(site: Site) -> Any:
    answer = litellm.completion(
        model=f"openai/{site.model}",
        api_base=site.url,
        api_key=KEY,
        messages=[{"role": "user", "content": TRIP}],
        tools=[openai.pydantic_function_tool(Trip)],
        tool_choice="required",
    )
    (call,) = answer.choices[0].message.tool_calls
    return Trip.model_validate_json(call.function.arguments)


TYPED = [
    typed_by_pydantic_ai,
    typed_by_pydantic_ai_after_a_tool,
    typed_by_pydantic_ai_in_a_stream,
    typed_by_instructor,
    typed_by_langchain,
    typed_by_openais_parse,
    typed_by_litellm,
]


@pytest.mark.parametrize("client", TYPED, ids=lambda each: each.__name__)
def test_a_client_gets_its_type_by_a_call(client: Callable[[Site], Any], site: Site) -> None:
    assert client(site).model_dump() == {"city": "Rome", "days": 3}


# ---------------------------------------------------------------- call, result, answer


def summed_by_pydantic_ai(site: Site, question: str) -> str:
    return str(pydantic_ai_agent(site, tools=[add]).run_sync(question).output)


def summed_by_openai_agents(site: Site, question: str) -> str:
    agents.set_tracing_disabled(True)
    client = openai.AsyncOpenAI(base_url=site.url, api_key=KEY, timeout=120)
    model = agents.OpenAIChatCompletionsModel(model=site.model, openai_client=client)
    agent = agents.Agent(name="adder", model=model, tools=[agents.function_tool(add)])
    return str(agents.Runner.run_sync(agent, question).final_output)


def summed_by_openai_agents_in_a_stream(site: Site, question: str) -> str:
    async def ask() -> str:
        client = openai.AsyncOpenAI(base_url=site.url, api_key=KEY, timeout=120)
        model = agents.OpenAIChatCompletionsModel(model=site.model, openai_client=client)
        agent = agents.Agent(name="adder", model=model, tools=[agents.function_tool(add)])
        run = agents.Runner.run_streamed(agent, question)
        async for _ in run.stream_events():
            pass
        return str(run.final_output)

    return asyncio.run(ask())


def summed_by_autogen(site: Site, question: str) -> str:
    info: Any = {"vision": False, "function_calling": True, "json_output": False}
    info |= {"family": "unknown", "structured_output": False, "multiple_system_messages": True}

    async def ask() -> str:
        client = OpenAIChatCompletionClient(
            model=site.model, base_url=site.url, api_key=KEY, model_info=info
        )
        agent = AssistantAgent("adder", model_client=client, tools=[add], reflect_on_tool_use=True)
        done = await agent.run(task=question)
        await client.close()
        return str(done.messages[-1].content)  # type: ignore[union-attr]

    return asyncio.run(ask())


def summed_by_langchain(site: Site, question: str) -> str:
    chat, messages = site.langchain.bind_tools([add]), [("user", question)]
    while (answer := chat.invoke(messages)).tool_calls:
        results = [
            {"role": "tool", "tool_call_id": each["id"], "content": str(add(**each["args"]))}
            for each in answer.tool_calls
        ]
        messages += [answer, *results]  # type: ignore[list-item]
    return str(answer.content)


def summed_by_litellm(site: Site, question: str) -> str:
    tool = {"name": "add", "parameters": {"type": "object", "properties": {}}}
    messages: list[Any] = [{"role": "user", "content": question}]
    while True:
        chunks = litellm.completion(
            model=f"openai/{site.model}",
            api_base=site.url,
            api_key=KEY,
            messages=messages,
            tools=[{"type": "function", "function": tool}],
            stream=True,
        )
        message = litellm.stream_chunk_builder([*chunks]).choices[0].message
        messages.append(message.model_dump())
        if not message.tool_calls:
            return str(message.content)
        for call in message.tool_calls:
            found = str(add(**json.loads(call.function.arguments)))
            messages.append({"role": "tool", "tool_call_id": call.id, "content": found})


SUMMED = [
    summed_by_pydantic_ai,
    summed_by_openai_agents,
    summed_by_openai_agents_in_a_stream,
    summed_by_autogen,
    summed_by_langchain,
    summed_by_litellm,
]


@pytest.mark.parametrize("question", [f"{ADD} > It is 5.", f"{ADD} {ADD} > It is 5."])
@pytest.mark.parametrize("client", SUMMED, ids=lambda each: each.__name__)
def test_a_client_calls_a_function_and_goes_on_with_its_result(
    client: Callable[[Site, str], str], question: str, site: Site
) -> None:
    SUMS.clear()
    assert client(site, question) == "It is 5."
    assert len(SUMS) == question.count("add")
    assert set(SUMS) == {(2, 3)}


def test_llm_calls_a_function_at_the_shell(site: Site, tmp_path: Path) -> None:
    entry = f"- model_id: labs\n  model_name: {json.dumps(site.model)}\n  api_base: {site.url}\n"
    entry += "  supports_tools: true\n"
    Path(tmp_path, "extra-openai-models.yaml").write_text(entry, encoding="utf-8")
    source = textwrap.dedent("""
        def add(a: int, b: int) -> int:
            "Add two numbers."
            return a + b
    """)
    environment = {**os.environ, "LLM_USER_PATH": str(tmp_path), "OPENAI_API_KEY": KEY}
    for options in ((), ("--no-stream",)):
        command = [sys.executable, "-m", "llm", "-m", "labs", "--functions", source, "--td"]
        done = subprocess.run(
            [*command, *options, f"{ADD} > It is 5."],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        assert "It is 5." in done.stdout
        assert "Tool call: add({'a': 2, 'b': 3})" in done.stderr


# ---------------------------------------------------------------- held, not scripted


def free_instructor(site: Site) -> Any:
    return instructor.from_openai(site.openai).chat.completions.create(
        model=site.model,
        messages=[{"role": "user", "content": "free"}],
        response_model=Trip,
        max_retries=0,
        extra_body={"thinking_budget": 8},
    )


def test_a_model_that_would_say_anything_answers_with_the_type(site: Site) -> None:
    assert isinstance(free_instructor(site), Trip)


@pytest.mark.parametrize("stream", [False, True])
def test_openais_client_sees_reasoning_and_calls_the_same_streamed_or_not(
    stream: bool, site: Site
) -> None:
    asked: Any = {
        "model": site.model,
        "messages": [{"role": "user", "content": f"{ADD} > x"}],
        "tools": [{"type": "function", "function": {"name": "add"}}],
    }
    if stream:
        with site.openai.chat.completions.stream(**asked) as events:
            completion = events.get_final_completion()
    else:
        completion = site.openai.chat.completions.create(**asked)
    (choice,) = completion.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    assert choice.message.reasoning_content == "A script."  # type: ignore[attr-defined]
    (call,) = choice.message.tool_calls or ()
    assert (call.function.name, json.loads(call.function.arguments)) == ("add", {"a": 2, "b": 3})


# ---------------------------------------------------------------- Anthropic's protocol

ADDS: Any = {
    "name": "add",
    "description": "Add two numbers.",
    "input_schema": {"type": "object", "properties": {"a": {"type": "integer"}}},
}


def asked_by_anthropic(site: Site, messages: list[Any], stream: bool) -> anthropic.types.Message:
    body: Any = {"model": site.model, "max_tokens": 500, "messages": messages, "tools": [ADDS]}
    if not stream:
        return site.anthropic.messages.create(**body)
    with site.anthropic.messages.stream(**body) as events:
        return events.get_final_message()


@pytest.mark.parametrize("stream", [False, True])
def test_anthropics_client_calls_a_function_and_goes_on_with_its_result(
    stream: bool, site: Site
) -> None:
    messages: list[Any] = [{"role": "user", "content": f"{ADD} {ADD} > It is 5."}]
    first = asked_by_anthropic(site, messages, stream)
    assert [block.type for block in first.content] == ["thinking", "tool_use", "tool_use"]
    assert first.stop_reason == "tool_use"
    results = [
        {"type": "tool_result", "tool_use_id": block.id, "content": "5"}
        for block in first.content
        if block.type == "tool_use" and block.input == {"a": 2, "b": 3}
    ]
    assert len(results) == 2
    messages += [{"role": "assistant", "content": first.content}]
    messages += [{"role": "user", "content": results}]
    count = site.anthropic.messages.count_tokens(model=site.model, messages=messages, tools=[ADDS])
    second = asked_by_anthropic(site, messages, stream)
    *_, text = second.content
    assert (text.type, getattr(text, "text", ""), second.stop_reason) == (
        *("text", "It is 5."),
        "end_turn",
    )
    cached = second.usage.cache_read_input_tokens or 0
    assert second.usage.input_tokens + cached == count.input_tokens


def test_anthropics_client_runs_functions_by_itself(site: Site) -> None:
    SUMS.clear()
    runner = site.anthropic.beta.messages.tool_runner(
        model=site.model,
        max_tokens=500,
        messages=[{"role": "user", "content": f"{ADD} > It is 5."}],
        tools=[anthropic.beta_tool(add)],
    )
    *_, text = runner.until_done().content
    assert (getattr(text, "text", ""), SUMS) == ("It is 5.", [(2, 3)])


def test_anthropics_client_lists_the_models_and_knows_errors(site: Site) -> None:
    assert [model.id for model in site.anthropic.models.list()] == [Path(site.model).name]
    with pytest.raises(anthropic.NotFoundError, match="unknown model"):
        site.anthropic.messages.create(
            model="claude-haiku", max_tokens=5, messages=[{"role": "user", "content": "a"}]
        )


@pytest.mark.parametrize("stream", [False, True])
def test_litellm_speaks_anthropics_protocol(stream: bool, site: Site) -> None:
    tool = {"name": "add", "parameters": {"type": "object", "properties": {}}}
    messages: list[Any] = [{"role": "user", "content": f"{ADD} > It is 5."}]
    for reason in ("tool_calls", "stop"):
        answer = litellm.completion(
            model=f"anthropic/{site.model}",
            api_base=site.url.removesuffix("/v1"),
            api_key=KEY,
            messages=messages,
            tools=[{"type": "function", "function": tool}],
            stream=stream,
        )
        answer = litellm.stream_chunk_builder([*answer]) if stream else answer
        (choice,) = answer.choices
        assert choice.finish_reason == reason
        messages.append(choice.message.model_dump())
        for call in choice.message.tool_calls or ():
            messages.append({"role": "tool", "tool_call_id": call.id, "content": "5"})
    assert choice.message.content == "It is 5."
