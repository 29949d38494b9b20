# SPDX-License-Identifier: Apache-2.0
"""Clients of OpenAI's Responses API, as they come, against labs-api with a tiny Qwen 3 (parrot.py).

Run as test_tools.py is.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import agents
import litellm
import openai
import pytest
from test_tools import ADD, KEY, SUMS, TRIP, Site, Trip, add, site

__all__ = ["site"]  # the fixture
PARAMETERS = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
TOOL: Any = {"type": "function", "name": "add", "parameters": PARAMETERS, "strict": True}


def model_of_agents(site: Site) -> agents.OpenAIResponsesModel:
    """Return the default model of openai-agents, which speaks to /v1/responses."""
    agents.set_tracing_disabled(True)
    client = openai.AsyncOpenAI(base_url=site.url, api_key=KEY, timeout=120)
    return agents.OpenAIResponsesModel(model=site.model, openai_client=client)


def summed_by_openai(site: Site, question: str) -> str:
    turns: Any = [{"role": "user", "content": question}]
    while True:
        response = site.openai.responses.create(model=site.model, input=turns, tools=[TOOL])
        turns += response.output
        calls = [item for item in response.output if item.type == "function_call"]
        if not calls:
            return response.output_text
        turns += [result_of(call) for call in calls]


def summed_by_openai_in_a_stream(site: Site, question: str) -> str:
    turns: Any = [{"role": "user", "content": question}]
    asked: Any = {"model": site.model, "tools": [TOOL], "include": ["reasoning.encrypted_content"]}
    while True:
        with site.openai.responses.stream(input=turns, **asked) as stream:
            texts = [event.delta for event in stream if event.type == "response.output_text.delta"]
            response = stream.get_final_response()
        turns += response.output
        calls = [item for item in response.output if item.type == "function_call"]
        if not calls:
            assert "".join(texts) == response.output_text
            return response.output_text
        turns += [result_of(call) for call in calls]


def result_of(call: Any) -> dict[str, Any]:
    found = str(add(**json.loads(call.arguments)))
    return {"type": "function_call_output", "call_id": call.call_id, "output": found}


def summed_by_openai_agents(site: Site, question: str) -> str:
    tools: Any = [agents.function_tool(add)]
    agent = agents.Agent(name="adder", model=model_of_agents(site), tools=tools)
    return str(agents.Runner.run_sync(agent, question).final_output)


def summed_by_openai_agents_in_a_stream(site: Site, question: str) -> str:
    async def ask() -> str:
        tools: Any = [agents.function_tool(add)]
        agent = agents.Agent(name="adder", model=model_of_agents(site), tools=tools)
        run = agents.Runner.run_streamed(agent, question)
        async for _ in run.stream_events():
            pass
        return str(run.final_output)

    return asyncio.run(ask())


def summed_by_litellm(site: Site, question: str) -> str:
    turns: Any = [{"role": "user", "content": question}]
    asked: Any = {"model": f"openai/{site.model}", "api_base": site.url, "api_key": KEY}
    while True:
        response: Any = litellm.responses(input=turns, tools=[TOOL], **asked)
        turns += [item if isinstance(item, dict) else item.model_dump() for item in response.output]
        calls = [item for item in response.output if item.type == "function_call"]
        if not calls:
            return str(response.output_text)
        turns += [result_of(call) for call in calls]


SUMMED = [
    summed_by_openai,
    summed_by_openai_in_a_stream,
    summed_by_openai_agents,
    summed_by_openai_agents_in_a_stream,
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


def typed_by_openais_parse(site: Site) -> Any:
    tool = openai.pydantic_function_tool(Trip)
    response = site.openai.responses.parse(model=site.model, input=TRIP, tools=[tool])
    (call,) = [item for item in response.output if item.type == "function_call"]
    return call.parsed_arguments


def typed_by_openais_text_format(site: Site) -> Any:
    response = site.openai.responses.parse(
        model=site.model, input='{"city": "Rome", "days": 3}', text_format=Trip
    )
    return response.output_parsed


def typed_by_openai_agents(site: Site) -> Any:
    agent = agents.Agent(name="typed", model=model_of_agents(site), output_type=Trip)
    return agents.Runner.run_sync(agent, '{"city": "Rome", "days": 3}').final_output


TYPED = [typed_by_openais_parse, typed_by_openais_text_format, typed_by_openai_agents]


@pytest.mark.parametrize("client", TYPED, ids=lambda each: each.__name__)
def test_a_client_gets_its_type(client: Callable[[Site], Any], site: Site) -> None:
    assert client(site).model_dump() == {"city": "Rome", "days": 3}


def test_litellm_streams_a_response(site: Site) -> None:
    asked: Any = {"model": f"openai/{site.model}", "api_base": site.url, "api_key": KEY}
    events = [*litellm.responses(input="Hello there.", stream=True, **asked)]
    texts = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(texts) == "Hello there."
    assert events[-1].type == "response.completed"
