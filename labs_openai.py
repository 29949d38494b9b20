# SPDX-License-Identifier: Apache-2.0
"""Translate OpenAI's requests into labs' and labs' completions into OpenAI's responses.

    body, given = labs_openai.read(data, CHAT.body)        # refuses unsupported fields by name
    request = CHAT.request_of(body, given)                 # a labs_request.Request
    CHAT.answer(model, completions, request.n, id="1", model=config.model_id)

`CHAT` and `COMPLETIONS` do no input or output: labs_api.py answers HTTP requests with them, and
labs_jsonl.py lines of batch files. Needs labs.py, labs_request.py and labs_tokens.py.
"""

from __future__ import annotations

import codecs
import hashlib
import re
import time
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

import labs
import labs_request
import labs_tokens
from labs_request import Refusal

S = TypeVar("S", bound=Struct)
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

    role: Literal["system", "developer", "user", "assistant"]
    content: str | tuple[TextPart | RefusalPart, ...] | None = None
    name: str | None = None
    refusal: str | None = None
    annotations: tuple[dict[str, Any], ...] | None = None
    audio: Any = None
    function_call: Any = None
    tool_calls: Any = None
    reasoning_content: Any = None
    provider_specific_fields: Any = None

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
    n: Annotated[int, Meta(ge=1, le=128)] | None = None
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


class CompletionRequest(OpenAIRequest, frozen=True, kw_only=True):
    """https://platform.openai.com/docs/api-reference/completions/create, without chat template"""

    prompt: str | Annotated[tuple[str | labs.TokenId | TokenIds, ...], Meta(min_length=1)]
    logprobs: labs.TopLogprobs | None = None


# Fields that are accepted but have no effect. Ignoring a hint cannot change the answer's text, so
# every value of its type is accepted.
class Hints(Struct, frozen=True):
    cache_prompt: bool | None = None
    metadata: dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    priority: int | None = None
    prompt_cache_key: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    prompt_cache_retention: str | None = None
    request_id: str | None = None
    safety_identifier: str | None = None
    service_tier: str | None = None
    store: bool | None = None
    user: str | None = None


# Ignoring one of these could change the text, so only null and the values that change nothing pass.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("audio", "moderation", "prediction", "web_search_options"), ()),
    **dict.fromkeys(("functions", "stop_token_ids", "tools"), ([],)),
    **dict.fromkeys(("function_call", "tool_choice"), ("none", "auto")),
    **dict.fromkeys(("add_generation_prompt", "skip_special_tokens"), (True,)),
    **dict.fromkeys(("continue_final_message", "echo", "ignore_eos", "use_beam_search"), (False,)),
    **dict.fromkeys(("length_penalty", "typical_p"), (1, 1.0)),
    "best_of": (1,),  # or n, because all n answers are returned
    "chat_template_kwargs": ({},),
    "include_stop_str_in_output": (False,),
    "min_tokens": (0,),
    "modalities": (["text"],),
    "reasoning_effort": ("none", "medium"),  # "medium" is OpenAI's default
    "suffix": ("",),
    "verbosity": ("medium",),
}
NEUTRAL_OF_MESSAGE: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("audio", "function_call"), ()),
    "provider_specific_fields": ({},),
    "reasoning_content": ("",),
    "tool_calls": ([],),
}
# Many clients send -1 for "no limit" or "not set"; these are the values that it stands for.
MINUS_ONE = {
    **dict.fromkeys(("max_completion_tokens", "max_tokens", "seed"), msgspec.Raw(b"null")),
    "top_k": msgspec.Raw(b"0"),
}


# ---------------------------------------------------------------- responses


class PromptTokensDetails(Struct, frozen=True):
    cached_tokens: int = 0


class OpenAIUsage(Struct, frozen=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails = PromptTokensDetails()
    response_cached: bool = False


class MessagePart(Struct, frozen=True, omit_defaults=True):
    """A message of a response, or the text that a chunk appends to it."""

    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET


class Choice(Struct, frozen=True):
    """One answer or a piece of it: a chat sets `message` or `delta`, a completion `text`."""

    index: int
    message: MessagePart | UnsetType = UNSET
    delta: MessagePart | UnsetType = UNSET
    text: str | UnsetType = UNSET
    logprobs: dict[str, Any] | None = None
    finish_reason: Literal["stop", "length", "content_filter"] | None = None


class OpenAIAnswer(Struct, frozen=True):
    id: str
    object: Literal["chat.completion", "chat.completion.chunk", "text_completion"]
    created: int
    model: str
    choices: tuple[Choice, ...]
    usage: OpenAIUsage | UnsetType | None = UNSET
    system_fingerprint: str | None = None
    documents: tuple[labs.Source, ...] | UnsetType = UNSET


class ErrorDetail(Struct, frozen=True):
    message: str
    type: str
    param: str | None
    code: str


class Error(Struct, frozen=True):
    error: ErrorDetail


# ---------------------------------------------------------------- errors


def error_of(status: int, message: str, code: str, param: str | None = None) -> Error:
    """Return an error in OpenAI's format; its type follows from the HTTP status."""
    kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = "server_error" if status >= 500 else kinds.get(status, "invalid_request_error")
    return Error(ErrorDetail(message, kind, param, code))


def code_and_param(error: labs.LabsError) -> tuple[str, str | None]:
    """Return OpenAI's `code` and `param` for an error that the request caused."""
    if code := getattr(error, "code", None):  # a Refusal or labs_guard.Filtered
        return code, getattr(error, "param", None)
    if isinstance(error, labs.PromptTooLong):
        return "context_length_exceeded", error.param
    return "invalid_value", param_of(str(error))


def param_of(message: str) -> str | None:
    """Return the field that an error message of msgspec or labs names, or None."""
    first = r"^(\w+(?:\[\d+\])?)(?: = |:| names)|^the (prompt) has"
    found = re.search(rf"- at `\$\.(.+?)`|field `(.+?)`|{first}", message)
    return next((part for part in found.groups() if part), None) if found else None


def read(data: bytes, kind: type[S]) -> tuple[S, dict[str, Any]]:
    """Return a body as `kind`, and its fields as a dict. Raises Refusal for an invalid body."""
    data = data.removeprefix(codecs.BOM_UTF8)
    try:
        if issubclass(kind, OpenAIRequest):
            data = _without_neutral(data)
        body = msgspec.json.decode(data, type=kind)
        given: dict[str, Any] = msgspec.json.decode(data)
    except msgspec.ValidationError as error:
        raise Refusal(str(error), "invalid_value", param_of(str(error))) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        reason = labs_tokens.json_fault(data, error)
        raise Refusal(f"the body is not valid JSON: {reason}", "invalid_json") from error
    return body, given


def _without_neutral(data: bytes) -> bytes:
    """Return a body without Hints and NEUTRAL fields. Raises Refusal for other values of these."""
    raw = msgspec.json.decode(data, type=dict[str, msgspec.Raw])
    msgspec.json.decode(data, type=Hints)
    names = raw.keys() & NEUTRAL.keys()
    found = {name: msgspec.json.decode(raw[name]) for name in names}
    n = msgspec.json.decode(raw.get("n", b"null"))
    neutral = NEUTRAL | ({} if n is None else {"best_of": (1, n)})
    for tools, choice in (("tools", "tool_choice"), ("functions", "function_call")):
        if found.get(choice) == "none":  # the model may not call any of the tools
            found.pop(tools, None)
    for name, value in found.items():
        _check_neutral(name, value, neutral[name])
    minus = {k: v for k, v in MINUS_ONE.items() if bytes(raw.get(k, b"")) == b"-1"}
    rest = {k: v for k, v in raw.items() if k not in {*names, *Hints.__struct_fields__}}
    return msgspec.json.encode(rest | minus)


def _check_neutral(name: str, value: Any, neutral: tuple[Any, ...]) -> None:
    known = [(type(each), each) for each in (None, *neutral)]  # the types keep 0 and False apart
    if (type(value), value) not in known:
        raise Refusal(f"{name} is not implemented; leave it out", "unsupported", name)


# ---------------------------------------------------------------- endpoints


class Endpoint:
    """The code that both endpoints share."""

    body: type[Any]
    prefix: str
    kinds: tuple[Any, Any]  # `object` of a whole answer, and of a chunk

    def request_of(self, body: Any, given: dict[str, Any]) -> labs_request.Request:
        """Return a body as labs' request. given: the fields that the body sets, as of `read`."""
        return labs_request.Request(
            prompts=self.prompts(body),
            options=self.options(body, given),
            n=body.n or 1,
            model=body.model,
            response_format=getattr(body, "response_format", None),
            documents=getattr(body, "documents", False),
            within_context=True,
        )

    def options(self, body: Any, given: dict[str, Any]) -> dict[str, Any]:
        """Return the generation settings that the body sets; null sets none."""
        names = {*labs.Generation.__struct_fields__} - {"stop", "logprobs"}
        found = {k: v for k in names & given.keys() if (v := getattr(body, k)) is not None}
        if body.max_tokens is not None:
            found["max_new_tokens"] = body.max_tokens
        if body.stop is not None:
            found["stop"] = (body.stop,) if isinstance(body.stop, str) else body.stop
        return found

    def prompts(self, body: Any) -> tuple[labs_request.Prompt, ...]:
        raise NotImplementedError

    def choice(self, places: labs_tokens.Places, index: int, part: Any) -> Choice:
        """Return a Completion, Delta or Done as a choice. places: of this choice's tokens."""
        raise NotImplementedError

    def first(self, index: int) -> Choice | None:
        """Return the choice of a stream's first chunk, or None if none is needed."""
        return None

    def answer(
        self, loaded: labs.Model, found: Sequence[labs.Completion], n: int, **names: Any
    ) -> OpenAIAnswer:
        """Return whole answers, `n` per prompt. names: as in `wrap`."""
        choices = tuple(
            self.choice(labs_tokens.Places(loaded), index, each) for index, each in enumerate(found)
        )
        usage = usage_of([each.usage for each in found], n)
        names = {"system_fingerprint": system_fingerprint(loaded), **names}
        return self.wrap(choices, object=self.kinds[0], usage=usage, **names)

    def wrap(self, choices: tuple[Choice, ...], **names: Any) -> OpenAIAnswer:
        """Return choices as a chunk, or as a whole answer if `names` sets `object`.

        names: other fields of OpenAIAnswer, at least id and model, equal in all chunks.
        """
        names = {"object": self.kinds[1], "created": int(time.time()), **names}
        return OpenAIAnswer(choices=choices, **{**names, "id": f"{self.prefix}-{names['id']}"})


def usage_of(usages: Sequence[labs.Usage], n: int) -> OpenAIUsage:
    """Add up token counts: each prompt once, as OpenAI does, and every generated token."""
    prompt = sum(usage.prompt_tokens for usage in usages) // n
    completion = sum(usage.completion_tokens for usage in usages)
    cached = sum(usage.cached_tokens for usage in usages) // n
    return OpenAIUsage(
        prompt_tokens=prompt,
        completion_tokens=completion,
        total_tokens=prompt + completion,
        prompt_tokens_details=PromptTokensDetails(cached),
        response_cached=all(usage.response_cached for usage in usages),
    )


def system_fingerprint(model: labs.Model) -> str | None:
    """Return a digest of everything, other than the request, that an answer depends on."""
    if model.fingerprint is None:
        return None
    return f"fp_{hashlib.sha256(msgspec.json.encode(model.fingerprint)).hexdigest()[:12]}"


def _reason(event: Any) -> Any:
    """Return OpenAI's finish reason, "length" for "timeout" and "cancelled", or None."""
    reason = getattr(event, "finish_reason", None)
    return "length" if reason in ("timeout", "cancelled") else reason


class Chat(Endpoint):
    body = ChatRequest
    prefix = "chatcmpl"
    kinds = ("chat.completion", "chat.completion.chunk")

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

    def prompts(self, body: ChatRequest) -> tuple[labs_request.Prompt, ...]:
        messages = (self._message(f"messages[{i}]", each) for i, each in enumerate(body.messages))
        return (labs_request.Prompt(messages=tuple(messages)),)

    def _message(self, where: str, message: ChatMessage) -> labs.Message:
        for name, neutral in NEUTRAL_OF_MESSAGE.items():
            _check_neutral(f"{where}.{name}", getattr(message, name), neutral)
        if message.content is None and message.role != "assistant":
            text = f"{where}.content is missing; only an assistant's message may be empty"
            raise Refusal(text, "invalid_value", f"{where}.content")
        role = "system" if message.role == "developer" else message.role
        return labs.Message(role=role, content=message.text, name=message.name)

    def first(self, index: int) -> Choice:
        return Choice(index=index, delta=MessagePart(role="assistant", content=""))

    def choice(self, places: labs_tokens.Places, index: int, part: Any) -> Choice:
        message: dict[str, Any] = {"delta": MessagePart()}
        if isinstance(part, labs.Completion):
            message = {"message": MessagePart(role="assistant", content=part.text)}
        elif isinstance(part, labs.Delta):
            message = {"delta": MessagePart(content=part.text)}
        logprobs = self._logprobs(places, getattr(part, "logprobs", ()))
        return Choice(index=index, **message, logprobs=logprobs, finish_reason=_reason(part))

    def _logprobs(self, places: labs_tokens.Places, found: Any) -> dict[str, Any] | None:
        def entry(token: int, logprob: float, data: bytes) -> dict[str, Any]:
            name = places.spelling.name_of(token)
            return {"token": name, "logprob": logprob, "bytes": [*data]}

        content = [
            {
                **entry(each.token, each.logprob, places.take(each.token)[1]),
                "top_logprobs": [
                    entry(i, logprob, places.spelling.bytes_of(i)) for i, logprob in each.top
                ],
            }
            for each in found
        ]
        return {"content": content, "refusal": None} if content else None


class Completions(Endpoint):
    body = CompletionRequest
    prefix = "cmpl"
    kinds = ("text_completion", "text_completion")

    def options(self, body: CompletionRequest, given: dict[str, Any]) -> dict[str, Any]:
        found = super().options(body, given)
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

    def choice(self, places: labs_tokens.Places, index: int, part: Any) -> Choice:
        logprobs, text = getattr(part, "logprobs", ()), getattr(part, "text", "")
        found = self._logprobs(places, logprobs) if logprobs else None
        return Choice(index=index, text=text, logprobs=found, finish_reason=_reason(part))

    def _logprobs(self, places: labs_tokens.Places, found: Any) -> dict[str, Any]:
        tops: list[dict[str, float]] = []
        for each in found:
            tops.append({})
            for token, logprob in each.top:
                tops[-1][places.spelling.name_of(token, tops[-1])] = logprob
        return {
            "tokens": [places.spelling.name_of(each.token) for each in found],
            "token_logprobs": [each.logprob for each in found],
            "top_logprobs": tops,
            "text_offset": [places.take(each.token)[0] for each in found],
        }


CHAT, COMPLETIONS = Chat(), Completions()
ENDPOINTS: dict[str, Endpoint] = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": COMPLETIONS,
}
