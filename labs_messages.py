# SPDX-License-Identifier: Apache-2.0
"""Translate Anthropic's requests into labs'; labs_message_events.py makes the answers.

    body, given = labs_protocol.read(data, MESSAGES.body, MESSAGES.fields)
    request = MESSAGES.request_of(body, given)                      # a labs_request.Request
    MESSAGES.answer(body, model, completions, id="1", model=config.model_id)

Needs labs.py, labs_dialogue.py, labs_message_blocks.py, labs_message_events.py, labs_protocol.py
and labs_request.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

import labs
import labs_dialogue
import labs_message_blocks
import labs_message_events
import labs_protocol
import labs_request
from labs_request import Refusal

Effort = Literal["low", "medium", "high", "xhigh", "max"]


# ---------------------------------------------------------------- bodies


class MessageParam(labs.Strict, frozen=True):
    """A message, a text or blocks. clear_at: a system message may end at the next user message."""

    role: Literal["user", "assistant", "system"]
    content: str | tuple[dict[str, Any], ...]
    clear_at: Literal["next_user_message", "never"] | None = None
    output_config: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.clear_at is not None and self.role != "system":
            raise ValueError("clear_at belongs to system messages")


class ToolChoice(labs.Strict, frozen=True):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(labs.Strict, frozen=True):
    """Whether the model thinks; adaptive leaves it to the model.

    display: omitted hides thinking; otherwise it is shown whole, as nothing summarizes it.
    """

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: labs.Count | None = None
    display: Literal["summarized", "omitted", "updates"] | None = None
    block_binding: dict[str, Any] | None = None


class JsonOutputFormat(labs.Strict, frozen=True):
    type: Literal["json_schema"]
    schema: dict[str, Any]


class OutputConfig(labs.Strict, frozen=True):
    effort: Effort | None = None
    format: JsonOutputFormat | None = None
    task_budget: dict[str, Any] | None = None


class CountRequest(labs.Strict, frozen=True, kw_only=True):
    """https://platform.claude.com/docs/en/api/messages-count-tokens"""

    messages: Annotated[tuple[MessageParam, ...], Meta(min_length=1)]
    model: str | None = None
    system: str | tuple[dict[str, Any], ...] | None = None
    tools: tuple[dict[str, Any], ...] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: JsonOutputFormat | None = None
    documents: bool | None = None  # an extension of labs, as in labs_request.GenerateRequest


class MessagesRequest(CountRequest, frozen=True, kw_only=True):
    """https://platform.claude.com/docs/en/api/messages"""

    max_tokens: Annotated[int, Meta(ge=1, le=2**20)]
    stop_sequences: Annotated[tuple[labs.Stop, ...], Meta(max_length=16)] | None = None
    stream: bool | None = None
    temperature: labs.Temperature | None = None
    top_p: labs.Probability | None = None
    top_k: labs.Count | None = None

    @property
    def shows_thinking(self) -> bool:
        return self.thinking is None or self.thinking.display != "omitted"


class Hints(Struct, frozen=True):
    """Fields that are accepted but have no effect, see labs_protocol.Fields."""

    billing_policy: Any = None
    cache_control: dict[str, Any] | None = None
    diagnostics: dict[str, Any] | None = None
    fallback_credit_token: Any = None
    inference_geo: str | None = None
    metadata: dict[str, Any] | None = None
    service_tier: str | None = None
    speed: str | None = None
    user_profile_id: str | None = None
    workspace_id: str | None = None


KEEPS_ALL = [
    {"edits": [{"type": "clear_thinking_20251015", "keep": keep}]}
    for keep in ("all", {"type": "all"})
]
NEUTRAL: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("compaction", "container", "thread"), ()),
    "context_management": ({}, {"edits": []}, *KEEPS_ALL),
    **dict.fromkeys(("fallbacks", "mcp_servers"), ([],)),
}
FIELDS = labs_protocol.Fields(hints=Hints, neutral=NEUTRAL)
WORDS = {  # see labs_request.Request
    "thinking_budget": "thinking.budget_tokens",
    "reasoning_effort = none": "thinking = disabled",
    "reasoning_effort": "output_config.effort",
    "response_format": "output_config.format",
    "schema": "output_config.format.schema",
    "continue_final_message": "messages",
    "parallel_tool_calls": "tool_choice.disable_parallel_tool_use",
}


# ---------------------------------------------------------------- endpoints


class Count(labs_message_events.Replies):
    """The requests of /v1/messages/count_tokens, and what both endpoints share."""

    body: type[Any] = CountRequest
    fields = FIELDS
    id_header = "request-id"

    def request_of(self, body: Any, given: dict[str, Any]) -> labs_request.Request:
        turns = labs_message_blocks.turns_of(body)
        tools = labs_message_blocks.tools_of(body, turns)
        prompt = labs_request.Prompt(
            messages=tuple(labs_message_blocks.messages_of(turns)),
            tools=tools,
            effort=_effort(body),
            usual_effort="high",
            continue_final_message=turns[-1].role == "assistant",
        )
        chosen = body.tool_choice or ToolChoice("auto")
        return labs_request.Request(
            prompts=(prompt,),
            options=self.options(body),
            model=body.model,
            response_format=_format(body),
            documents=body.documents,
            within_context=True,
            tool_choice=_choice(chosen, tools),
            parallel_tool_calls=not chosen.disable_parallel_tool_use,
            words=WORDS,
        )

    def options(self, body: Any) -> dict[str, Any]:
        """Return the generation settings that the body sets; null sets none."""
        thinking: Thinking = body.thinking or Thinking("adaptive")
        labs_message_blocks.check_inside(thinking, "thinking")
        if (thinking.type == "enabled") != (thinking.budget_tokens is not None):
            text = "thinking.budget_tokens belongs to the type enabled, which requires it"
            raise Refusal(text, "invalid_value", "thinking")
        return {} if thinking.type != "enabled" else {"thinking_budget": thinking.budget_tokens}


class Messages(Count):
    body = MessagesRequest

    def options(self, body: MessagesRequest) -> dict[str, Any]:
        given = {
            "max_new_tokens": body.max_tokens,
            "stop": body.stop_sequences,
            **{name: getattr(body, name) for name in ("temperature", "top_p", "top_k")},
        }
        named = {name: value for name, value in given.items() if value is not None}
        return {**super().options(body), **named}


def _effort(body: CountRequest) -> str | None:
    """Return the effort of the template, none where thinking is disabled."""
    if body.thinking is not None and body.thinking.type == "disabled":
        return "none"
    return body.output_config.effort if body.output_config else None


def _format(body: CountRequest) -> labs_request.ResponseFormat | None:
    config = body.output_config or OutputConfig()
    labs_message_blocks.check_inside(config, "output_config")
    if body.output_format is not None and config.format is not None:
        text = "output_format and output_config.format exclude each other; give one of them"
        raise Refusal(text, "invalid_value", "output_format")
    if (found := body.output_format or config.format) is None:
        return None
    schema = labs_request.JsonSchema(schema=found.schema)
    return labs_request.ResponseFormat(type="json_schema", json_schema=schema)


def _choice(chosen: ToolChoice, tools: Sequence[labs_dialogue.Tool]) -> str:
    """Return a tool_choice in labs' words."""
    names = [tool.function.name for tool in tools]
    if (chosen.type == "tool") != (chosen.name is not None):
        text = "tool_choice.name belongs to the type tool, which requires it"
        raise Refusal(text, "invalid_value", "tool_choice")
    if chosen.type == "any" and not names:
        raise Refusal("tool_choice = any: there are no tools", "invalid_value", "tool_choice")
    if chosen.name is None:
        return {"any": "required"}.get(chosen.type, chosen.type)
    if chosen.name not in names or chosen.name in ("none", "auto", "required"):
        known = ", ".join(names) or "there are no tools"
        text = f"tool_choice.name = {chosen.name!r:.80}: no such tool can be chosen: {known}"
        raise Refusal(text, "invalid_value", "tool_choice")
    return chosen.name


COUNT, MESSAGES = Count(), Messages()
PATH = "/v1/messages"
