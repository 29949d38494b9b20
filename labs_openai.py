# SPDX-License-Identifier: Apache-2.0
"""Translate OpenAI's requests into labs'; labs_replies.py makes the answers.

    body, given = labs_protocol.read(data, CHAT.body, CHAT.fields)  # refuses fields by name
    request = CHAT.request_of(body, given)                          # a labs_request.Request
    CHAT.answer(body, model, completions, id="1", model=config.model_id)

Needs labs.py, labs_dialogue.py, labs_protocol.py, labs_replies.py and labs_request.py.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct
from msgspec.structs import replace

import labs
import labs_dialogue
import labs_protocol
import labs_replies
import labs_request
from labs_request import Refusal

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh"]
TokenIds = tuple[labs.TokenId, ...]


# ---------------------------------------------------------------- requests


class TextPart(Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="text"):
    """A text part of a message. The last two fields never change the text, see Hints."""

    text: str
    prompt_cache_breakpoint: dict[str, Any] | None = None
    cache_control: dict[str, Any] | None = None


class RefusalPart(Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="refusal"):
    refusal: str


class ChatMessage(Struct, frozen=True, forbid_unknown_fields=True):
    """A message of the conversation. annotations never changes the text, see Hints."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | tuple[TextPart | RefusalPart, ...] | None = None
    name: str | None = None
    refusal: str | None = None
    annotations: tuple[dict[str, Any], ...] | None = None
    audio: Any = None
    function_call: Any = None
    provider_specific_fields: Any = None
    tool_calls: tuple[labs.ToolCall, ...] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None

    @property
    def text(self) -> str:
        """The text of all parts; an assistant's message may be empty or a refusal."""
        parts = (TextPart(self.content),) if isinstance(self.content, str) else self.content or ()
        texts = (part.text if isinstance(part, TextPart) else part.refusal for part in parts)
        return "".join(texts) + (self.refusal or "")


class StreamOptions(Struct, frozen=True, forbid_unknown_fields=True):
    """Options of a stream. include_obfuscation never changes the text, see Hints."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class Named(Struct, frozen=True, forbid_unknown_fields=True):
    name: str


class NamedTool(Struct, frozen=True, forbid_unknown_fields=True):
    """The tool that has to be called."""

    type: Literal["function"]
    function: Named


class OpenAIRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The fields that both endpoints accept."""

    model: str | None = None
    max_tokens: Annotated[int, Meta(ge=1, le=2**20)] | None = None
    temperature: labs.Temperature | None = None
    top_p: labs.Probability | None = None
    top_k: labs.Count | None = None
    min_p: labs.Probability | None = None
    repetition_penalty: labs.RepetitionPenalty | None = None
    frequency_penalty: labs.Penalty | None = None
    presence_penalty: labs.Penalty | None = None
    logit_bias: dict[labs.TokenId, labs.Bias] | None = None
    stop: labs.Stop | Annotated[tuple[labs.Stop, ...], Meta(max_length=16)] | None = None
    seed: labs.Seed | None = None
    skip_special_tokens: bool | None = None  # these four as in vLLM
    min_tokens: labs.Count | None = None
    ignore_eos: bool | None = None
    stop_token_ids: Annotated[tuple[labs.TokenId, ...], Meta(max_length=64)] | None = None
    n: Annotated[int, Meta(ge=1, le=128)] | None = None
    structured_outputs: labs_request.StructuredOutputs | None = None  # as in vLLM
    stream: bool | None = None
    stream_options: StreamOptions | None = None


class ChatRequest(OpenAIRequest, frozen=True, kw_only=True):
    """https://platform.openai.com/docs/api-reference/chat/create"""

    messages: Annotated[tuple[ChatMessage, ...], Meta(min_length=1)]
    documents: bool | None = None  # an extension of labs, as in labs_request.GenerateRequest
    max_completion_tokens: Annotated[int, Meta(ge=1, le=2**20)] | None = None
    logprobs: bool | None = None
    top_logprobs: labs.TopLogprobs | None = None
    response_format: labs_request.ResponseFormat | None = None
    tools: tuple[labs_dialogue.Tool, ...] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Effort | None = None
    chat_template_kwargs: dict[str, Any] | None = None  # as in vLLM; labs' template_options
    add_generation_prompt: bool | None = None  # these two as in vLLM
    continue_final_message: bool | None = None
    reasoning: labs.Thinking | None = None  # these two are labs' own, as in labs.Generation
    thinking_budget: labs.Count | None = None


class CompletionRequest(OpenAIRequest, frozen=True, kw_only=True):
    """https://platform.openai.com/docs/api-reference/completions/create, without chat template"""

    prompt: str | Annotated[tuple[str | labs.TokenId | TokenIds, ...], Meta(min_length=1)]
    max_tokens: Annotated[int, Meta(ge=0, le=2**20)] | None = None
    echo: bool | None = None  # with max_tokens = 0, only the prompt is returned
    logprobs: labs.TopLogprobs | None = None


class Hints(Struct, frozen=True):
    """Fields that are accepted but have no effect, see labs_protocol.Fields."""

    cache_prompt: bool | None = None
    metadata: dict[str, Any] | None = None
    priority: int | None = None
    prompt_cache_key: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    prompt_cache_retention: str | None = None
    request_id: str | None = None
    safety_identifier: str | None = None
    service_tier: str | None = None
    store: bool | None = None
    user: str | None = None


GUIDED = ("guided_json", "guided_regex", "guided_choice", "guided_grammar")  # vLLM's older names
NEUTRAL: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(GUIDED, ()),
    **dict.fromkeys(("audio", "moderation", "prediction", "web_search_options"), ()),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "use_beam_search": (False,),
    **dict.fromkeys(("length_penalty", "typical_p"), (1, 1.0)),
    "best_of": (1,),  # or n, because all n answers are returned
    "include_stop_str_in_output": (False,),
    "modalities": (["text"],),
    "suffix": ("",),
    "verbosity": ("medium",),
}
REPLACED = {"functions": "tools", "function_call": "tool_choice"}
REPLACED |= dict.fromkeys(GUIDED, "structured_outputs")
NEUTRAL_OF_MESSAGE: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("audio", "function_call"), ()),
    "provider_specific_fields": ({},),
}
# Many clients send -1 for "no limit" or "not set"; these are the values that it stands for.
MINUS_ONE = {
    **dict.fromkeys(("max_completion_tokens", "max_tokens", "seed"), b"null"),
    "top_k": b"0",
}
FIELDS = labs_protocol.Fields(hints=Hints, neutral=NEUTRAL, replaced=REPLACED, minus_one=MINUS_ONE)
ONLY_CHATS = {"add_generation_prompt": (True,), "continue_final_message": (False,)}
ONLY_TEXTS = {"echo": (False,)}


# ---------------------------------------------------------------- endpoints


class Endpoint(labs_replies.Replies):
    """The code that both endpoints share: requests here, and answers by labs_replies."""

    fields = FIELDS

    def request_of(self, body: Any, given: dict[str, Any]) -> labs_request.Request:
        return labs_request.Request(
            prompts=self.prompts(body),
            options=self.options(body, given),
            n=body.n or 1,
            model=body.model,
            response_format=getattr(body, "response_format", None),
            structured_outputs=body.structured_outputs,
            documents=getattr(body, "documents", False),
            within_context=True,
            words={"template_options": "chat_template_kwargs", "min_new_tokens": "min_tokens"},
        )

    def options(self, body: Any, given: dict[str, Any]) -> dict[str, Any]:
        """Return the generation settings that the body sets; null sets none."""
        if body.stream_options is not None and not body.stream:
            raise Refusal("stream_options needs stream = true", "invalid_value", "stream_options")
        names = {*labs.Generation.__struct_fields__} - {"stop", "logprobs"}
        found = {k: v for k in names & given.keys() if (v := getattr(body, k)) is not None}
        if body.max_tokens is not None:
            found["max_new_tokens"] = body.max_tokens
        if body.min_tokens is not None:
            found["min_new_tokens"] = body.min_tokens
        if body.stop is not None:
            found["stop"] = (body.stop,) if isinstance(body.stop, str) else body.stop
        return found

    def prompts(self, body: Any) -> tuple[labs_request.Prompt, ...]:
        raise NotImplementedError


class Chat(labs_replies.ChatReplies, Endpoint):
    body = ChatRequest
    fields = replace(FIELDS, neutral=NEUTRAL | ONLY_TEXTS)

    def options(self, body: ChatRequest, given: dict[str, Any]) -> dict[str, Any]:
        found = super().options(body, given)
        limits = {body.max_tokens, body.max_completion_tokens} - {None}
        if len(limits) > 1:
            text = "max_tokens and max_completion_tokens differ; give one of them"
            raise Refusal(text, "invalid_value", "max_tokens")
        if limits:
            found["max_new_tokens"] = limits.pop()
        if body.top_logprobs is not None and not body.logprobs:
            raise Refusal("top_logprobs needs logprobs = true", "invalid_value", "top_logprobs")
        if body.logprobs is not None:
            found["logprobs"] = (body.top_logprobs or 0) if body.logprobs else None
        return found

    def request_of(self, body: ChatRequest, given: dict[str, Any]) -> labs_request.Request:
        choice, request = body.tool_choice or "auto", super().request_of(body, given)
        if isinstance(choice, NamedTool) and choice.function.name in ("none", "auto", "required"):
            text = f"tool_choice: no tool that is named {choice.function.name} can be chosen"
            raise Refusal(text, "unsupported", "tool_choice")
        name = choice.function.name if isinstance(choice, NamedTool) else choice
        parallel = body.parallel_tool_calls is not False
        return replace(request, tool_choice=name, parallel_tool_calls=parallel)

    def prompts(self, body: ChatRequest) -> tuple[labs_request.Prompt, ...]:
        messages = (self._message(f"messages[{i}]", each) for i, each in enumerate(body.messages))
        if body.continue_final_message and body.add_generation_prompt:
            text = "continue_final_message and add_generation_prompt exclude each other"
            raise Refusal(text, "invalid_value", "continue_final_message")
        prompt = labs_request.Prompt(
            messages=tuple(messages),
            tools=body.tools or (),
            template_options=body.chat_template_kwargs or None,
            add_generation_prompt=body.add_generation_prompt,
            continue_final_message=body.continue_final_message,
            effort=body.reasoning_effort,
        )
        return (prompt,)

    def _message(self, where: str, message: ChatMessage) -> labs.Message:
        for name, neutral in NEUTRAL_OF_MESSAGE.items():
            labs_protocol.check_neutral(f"{where}.{name}", getattr(message, name), neutral)
        if message.content is None and message.role != "assistant":
            text = f"{where}.content is missing; only an assistant's message may be empty"
            raise Refusal(text, "invalid_value", f"{where}.content")
        role = "system" if message.role == "developer" else message.role
        return labs.Message(
            role=role,
            content=message.text,
            name=message.name,
            tool_calls=message.tool_calls,
            tool_call_id=message.tool_call_id,
            reasoning_content=message.reasoning_content or message.reasoning,
        )


class Completions(labs_replies.TextReplies, Endpoint):
    body = CompletionRequest
    fields = replace(FIELDS, neutral=NEUTRAL | ONLY_CHATS)

    def request_of(self, body: CompletionRequest, given: dict[str, Any]) -> labs_request.Request:
        request = super().request_of(body, given)
        return replace(request, echo=bool(body.echo), only_echo=body.max_tokens == 0)

    def options(self, body: CompletionRequest, given: dict[str, Any]) -> dict[str, Any]:
        found = super().options(body, given)
        if body.max_tokens == 0:
            if not body.echo or body.min_tokens:
                why = "needs echo = true" if not body.echo else "contradicts min_tokens"
                raise Refusal(f"max_tokens = 0 {why}", "invalid_value", "max_tokens")
            found |= {"max_new_tokens": 1, "min_new_tokens": 0}  # whatever is configured
        return found if body.logprobs is None else {**found, "logprobs": body.logprobs}

    def prompts(self, body: CompletionRequest) -> tuple[labs_request.Prompt, ...]:
        prompt: Any = body.prompt
        one = isinstance(prompt, str) or all(isinstance(each, int) for each in prompt)
        return tuple(self._prompt(each) for each in ([prompt] if one else prompt))

    def _prompt(self, prompt: Any) -> labs_request.Prompt:
        if isinstance(prompt, str):
            return labs_request.Prompt(prompt=prompt, use_chat_template=False)
        if not isinstance(prompt, tuple) or not prompt:
            text = "prompt must be a text, a list of texts, or non-empty lists of token ids"
            raise Refusal(text, "invalid_value", "prompt")
        return labs_request.Prompt(ids=prompt)


CHAT, COMPLETIONS = Chat(), Completions()
ENDPOINTS: dict[str, Endpoint] = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": COMPLETIONS,
}
