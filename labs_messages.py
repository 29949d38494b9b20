# SPDX-License-Identifier: Apache-2.0
"""Translate Anthropic's requests into labs'; labs_message_events.py makes the answers.

    body, given = labs_protocol.read(data, MESSAGES.body, MESSAGES.fields)
    request = MESSAGES.request_of(body, given)                      # a labs_request.Request
    MESSAGES.answer(body, model, completions, id="1", model=config.model_id)

Needs labs.py, labs_dialogue.py, labs_message_blocks.py, labs_message_events.py, labs_protocol.py
and labs_request.py.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Mapping, Sequence
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
        if turns[-1].role == "assistant":
            where = f"messages[{len(body.messages) - 1}]"
            text = f"{where}: the last message is the assistant's; continuing it is not implemented"
            raise Refusal(f"{text}, end with a user's message", "unsupported", where)
        tools = labs_message_blocks.tools_of(body, turns)
        prompt = labs_request.Prompt(
            messages=tuple(labs_message_blocks.messages_of(turns)),
            tools=tools,
            effort=_effort(body),
            usual_effort="high",
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


# ---------------------------------------------------------------- models


QUERY = ("limit", "after_id", "before_id", "lifecycle", "lifecycle[]", "beta")  # as clients send


class ModelInfo(Struct, frozen=True, kw_only=True, tag_field="type", tag="model"):
    id: str
    display_name: str
    created_at: str
    lifecycle: Literal["active"] = "active"
    max_input_tokens: int | None = None


class ModelPage(Struct, frozen=True, kw_only=True):
    data: tuple[ModelInfo, ...]
    has_more: bool
    first_id: str | None
    last_id: str | None


def model_of(name: str, created: int, context_length: int | None) -> ModelInfo:
    """Return a model in Anthropic's format. created: in seconds since 1970."""
    when = datetime.datetime.fromtimestamp(created, datetime.UTC)
    return ModelInfo(
        id=name,
        display_name=name,
        created_at=when.strftime("%Y-%m-%dT%H:%M:%SZ"),
        max_input_tokens=context_length,
    )


def page_of(models: Sequence[ModelInfo], query: Mapping[str, Any]) -> ModelPage:
    """Return a page of models, all of which are active. Raises Refusal for an unknown query."""
    if unknown := next((name for name in query if name not in QUERY), None):
        raise Refusal(f"the query has {unknown!r:.80}; use {', '.join(QUERY)}", "invalid_value")
    given = query.get("lifecycle[]", query.get("lifecycle", "active"))
    models = models if "active" in ([given] if isinstance(given, str) else given) else ()
    limit = query.get("limit", "20")
    if not (isinstance(limit, str) and re.fullmatch("[1-9][0-9]{0,2}|1000", limit)):
        raise Refusal(f"limit = {limit!r:.80}: use 1 to 1000", "invalid_value", "limit")
    after, before = (_place(models, query, name) for name in ("after_id", "before_id"))
    last = len(models) if before is None else before
    first = 0 if after is None else after + 1
    first = first if before is None else max(first, last - int(limit))
    found = tuple(models[first : min(last, first + int(limit))])
    return ModelPage(
        data=found,
        has_more=first + len(found) < last if before is None else first > 0,
        first_id=found[0].id if found else None,
        last_id=found[-1].id if found else None,
    )


def _place(models: Sequence[ModelInfo], query: Mapping[str, Any], name: str) -> int | None:
    names, given = [model.id for model in models], query.get(name)
    if given is not None and given not in names:
        raise Refusal(f"{name} = {given!r:.80}: no model has it", "invalid_value", name)
    return None if given is None else names.index(given)
