# SPDX-License-Identifier: Apache-2.0
"""Translate requests of OpenAI's Responses API into labs'.

    body, given = labs_protocol.read(data, RESPONSES.body, RESPONSES.fields)
    request = RESPONSES.request_of(body, given)  # a labs_request.Request
    RESPONSES.answer(body, model, completions, id="1", model=config.model_id)

Nothing is stored: each request holds its whole conversation. Needs labs.py, labs_dialogue.py,
labs_protocol.py, labs_request.py, labs_response_input.py (the conversation),
labs_response_tools.py and labs_response_items.py (the answers).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from msgspec import Meta, Raw, Struct

import labs
import labs_protocol
import labs_request
import labs_response_input
import labs_response_items
import labs_response_tools
from labs_request import Refusal
from labs_response_input import Read

# ---------------------------------------------------------------- formats


class PlainFormat(Read, frozen=True, tag_field="type", tag="text"):
    pass


class JsonObjectFormat(Read, frozen=True, tag_field="type", tag="json_object"):
    pass


class JsonSchemaFormat(Read, frozen=True, kw_only=True, tag_field="type", tag="json_schema"):
    """A JSON schema. Only `schema` has an effect; it is always enforced."""

    schema: dict[str, Any]
    name: str | None = None
    description: str | None = None
    strict: bool | None = None


class TextConfig(Read, frozen=True):
    """The format of the answer. verbosity takes only its neutral value."""

    format: PlainFormat | JsonObjectFormat | JsonSchemaFormat | None = None
    verbosity: Any = None


class ReasoningConfig(Read, frozen=True):
    """How to reason. Summaries are never made; the last two fields take only neutral values."""

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    summary: Literal["auto", "concise", "detailed", "none"] | None = None
    generate_summary: Literal["auto", "concise", "detailed"] | None = None
    context: Any = None
    mode: Any = None


class ResponseStreamOptions(Read, frozen=True):
    """include_obfuscation never changes the text."""

    include_obfuscation: bool | None = None


# ---------------------------------------------------------------- requests


LOGPROBS, SEALED = "message.output_text.logprobs", "reasoning.encrypted_content"
Include = Literal[
    "message.output_text.logprobs",
    "reasoning.encrypted_content",
    "code_interpreter_call.outputs",  # these are of items that no answer here has
    "computer_call_output.output.image_url",
    "file_search_call.results",
    "message.input_image.image_url",
    "web_search_call.action.sources",
    "web_search_call.results",
]


class ResponsesRequest(Read, frozen=True, kw_only=True):
    """https://platform.openai.com/docs/api-reference/responses/create"""

    input: str | tuple[Raw, ...]
    model: str | None = None
    instructions: str | None = None
    tools: tuple[Raw, ...] | None = None
    tool_choice: labs_response_tools.Choice | None = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    reasoning: ReasoningConfig | None = None
    include: tuple[Include, ...] | None = None
    max_output_tokens: Annotated[int, Meta(ge=1, le=2**20)] | None = None
    temperature: labs.Temperature | None = None
    top_p: labs.Probability | None = None
    top_logprobs: labs.TopLogprobs | None = None
    frequency_penalty: labs.Penalty | None = None
    presence_penalty: labs.Penalty | None = None
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    metadata: dict[str, Any] | None = None  # this and the next four are repeated in the response
    max_tool_calls: Annotated[int, Meta(ge=1)] | None = None  # of hosted tools, which are refused
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    user: str | None = None
    top_k: labs.Count | None = None  # the fields from here on are labs' own, as in chats
    min_p: labs.Probability | None = None
    repetition_penalty: labs.RepetitionPenalty | None = None
    logit_bias: dict[labs.TokenId, labs.Bias] | None = None
    stop: labs.Stop | Annotated[tuple[labs.Stop, ...], Meta(max_length=16)] | None = None
    seed: labs.Seed | None = None
    skip_special_tokens: bool | None = None
    documents: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    thinking_budget: labs.Count | None = None


class ResponseHints(Struct, frozen=True):
    """Fields that are accepted but have no effect, see labs_protocol.Fields."""

    cache_prompt: bool | None = None
    client_metadata: dict[str, Any] | None = None
    priority: int | None = None
    prompt_cache_options: dict[str, Any] | None = None
    prompt_cache_retention: str | None = None
    request_id: str | None = None
    service_tier: str | None = None
    store: bool | None = None


WORDS = {  # see labs_request.Request
    "template_options": "chat_template_kwargs",
    "reasoning_effort": "reasoning.effort",
    "response_format": "text.format",
    "schema": "text.format.schema",
    "logprobs": "include",
}
STORED = "input with all earlier items, as this server stores nothing"
FIELDS = labs_protocol.Fields(
    hints=ResponseHints,
    neutral={
        **dict.fromkeys(("previous_response_id", "conversation", "prompt"), ()),
        **dict.fromkeys(("access_programs", "background_options", "image", "moderation"), ()),
        "background": (False,),
        "context_management": ([],),
        "truncation": ("disabled",),
    },
    replaced={
        **dict.fromkeys(("previous_response_id", "conversation"), STORED),
        "background": "stream = true, as this server stores nothing",
        "prompt": "instructions and input, as this server stores no templates",
    },
    minus_one={**dict.fromkeys(("max_output_tokens", "seed"), b"null"), "top_k": b"0"},
)


# ---------------------------------------------------------------- the endpoint


class Responses(labs_protocol.Endpoint):
    body = ResponsesRequest
    fields = FIELDS

    def request_of(self, body: ResponsesRequest, given: dict[str, Any]) -> labs_request.Request:
        choice, tools = body.tool_choice or "auto", labs_response_tools.tools_of(body)
        messages = labs_response_input.messages_of(body.instructions, body.input)
        prompt = labs_request.Prompt(
            messages=messages,
            tools=tuple(labs_response_tools.shown_to_model(tools, choice)),
            template_options=body.chat_template_kwargs or None,
            effort=body.reasoning.effort if body.reasoning else None,
        )
        return labs_request.Request(
            prompts=(prompt,),
            options=options_of(body, given),
            model=body.model,
            response_format=format_of(body),
            documents=body.documents,
            within_context=True,
            tool_choice=labs_response_tools.choice_of(choice),
            parallel_tool_calls=body.parallel_tool_calls is not False,
            words=WORDS,
        )

    def answer(
        self, body: ResponsesRequest, loaded: labs.Model, found: Sequence[Any], **names: Any
    ) -> labs_response_items.ResponseObject:
        names = {"created": int(time.time()), **names}
        opened = labs_protocol.Opened(loaded=loaded, **names)
        return self.stream(body).whole(opened, found[0])

    def stream(self, body: ResponsesRequest) -> labs_response_items.Events:
        sealed = SEALED in (body.include or ())
        return labs_response_items.Events(
            _shown(body), labs_response_input.seal if sealed else None
        )

    def error_of(self, status: int, message: str, code: str, param: str | None = None) -> Any:
        param = labs_response_input.param_of(message, param)
        return labs_protocol.error_of(status, message, code, param)

    def failure(self, status: int, message: str, code: str, param: str | None) -> bytes:
        return labs_response_items.Events({}).failed(status, message, code, param)


def format_of(body: ResponsesRequest) -> labs_request.ResponseFormat | None:
    """Return the format of the answer. Raises Refusal for a verbosity that is not neutral."""
    if body.text is None:
        return None
    labs_protocol.check_neutral("text.verbosity", body.text.verbosity, ("medium",))
    if not isinstance(body.text.format, JsonSchemaFormat):
        plain = not isinstance(body.text.format, JsonObjectFormat)
        return None if plain else labs_request.ResponseFormat(type="json_object")
    schema = labs_request.JsonSchema(schema=body.text.format.schema)
    return labs_request.ResponseFormat(type="json_schema", json_schema=schema)


def options_of(body: ResponsesRequest, given: dict[str, Any]) -> dict[str, Any]:
    """Return the generation settings that the body sets; null sets none."""
    if body.stream_options is not None and not body.stream:
        raise Refusal("stream_options needs stream = true", "invalid_value", "stream_options")
    if body.reasoning is not None:
        neutral = {"context": ("auto",), "mode": ("standard",)}
        labs_response_input.check_neutral(body.reasoning, neutral, "reasoning")
    names = {*labs.Generation.__struct_fields__} - {"stop", "logprobs", "reasoning"}
    found = {k: v for k in names & given.keys() if (v := getattr(body, k)) is not None}
    if body.max_output_tokens is not None:
        found["max_new_tokens"] = body.max_output_tokens
    if body.stop is not None:
        found["stop"] = (body.stop,) if isinstance(body.stop, str) else body.stop
    if LOGPROBS in (body.include or ()):
        found["logprobs"] = body.top_logprobs or 0
    elif body.top_logprobs:
        text = f'top_logprobs needs include = ["{LOGPROBS}"]'
        raise Refusal(text, "invalid_value", "top_logprobs")
    return found


def _shown(body: ResponsesRequest) -> dict[str, Any]:
    """Return the fields of a response that repeat its request."""
    names = ("instructions", "max_output_tokens", "max_tool_calls", "prompt_cache_key")
    plain = (body.text and body.text.format) or PlainFormat()
    return {
        **{name: getattr(body, name) for name in (*names, "safety_identifier", "user")},
        "metadata": body.metadata or {},
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "reasoning": {"effort": body.reasoning and body.reasoning.effort, "summary": None},
        "text": {"format": plain, "verbosity": "medium"},
        "tool_choice": body.tool_choice or "auto",
        "tools": tuple(
            {n: getattr(tool, n) for n in labs_response_tools.TOOL}
            for tool in labs_response_tools.tools_of(body)
        ),
        "top_logprobs": body.top_logprobs or 0,
    }


RESPONSES = Responses()
ENDPOINTS: dict[str, labs_protocol.Endpoint] = {"/v1/responses": RESPONSES}
