# SPDX-License-Identifier: Apache-2.0
"""OpenAI's words for what labs does: bodies in, answers out. Nothing here serves or computes.

    body, given = labs_openai.read(data, CHAT.body)        # refused by name what labs does not do
    request = CHAT.request_of(body, given)                 # a labs_request.Request
    CHAT.answer(model, completions, request.n, id="1", model=config.model_id)

Both endpoints are pure values, `CHAT` and `COMPLETIONS`; labs_api.py answers HTTP with them,
labs_jsonl.py the lines of a batch file. Needs labs.py and labs_request.py.
"""

from __future__ import annotations

import hashlib
import itertools
import re
import time
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

import labs
import labs_request
from labs_request import Refusal

S = TypeVar("S", bound=Struct)
Unsupported = Any  # known to OpenAI and not to labs: taken at its neutral value only, see NEUTRAL


# ---------------------------------------------------------------- what comes in


class TextPart(Struct, frozen=True, forbid_unknown_fields=True):
    type: Literal["text"]
    text: str


class ChatMessage(Struct, frozen=True, forbid_unknown_fields=True):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[tuple[TextPart, ...], Meta(min_length=1, max_length=256)]
    name: None = None
    refusal: None = None
    audio: None = None
    annotations: tuple[()] | None = None
    function_call: None = None
    tool_calls: None = None


class StreamOptions(Struct, frozen=True, forbid_unknown_fields=True):
    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class OpenAIRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What both of OpenAI's endpoints take."""

    model: str | None = None
    max_tokens: Annotated[int, Meta(ge=1, le=2**20)] | None = None
    temperature: labs.Temperature | None = None
    top_p: labs.Probability | None = None
    top_k: labs.Count | None = None
    min_p: labs.Probability | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=100)] | None = None
    frequency_penalty: labs.Penalty | None = None
    presence_penalty: labs.Penalty | None = None
    logit_bias: dict[labs.TokenId, labs.Bias] | None = None
    stop: labs.Stop | Annotated[tuple[labs.Stop, ...], Meta(max_length=16)] | None = None
    seed: labs.Seed | None = None
    n: Annotated[int, Meta(ge=1, le=128)] | None = None
    user: Annotated[str, Meta(max_length=512)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None


class ChatRequest(OpenAIRequest, frozen=True, kw_only=True):
    """https://platform.openai.com/docs/api-reference/chat/create"""

    messages: Annotated[tuple[ChatMessage, ...], Meta(min_length=1, max_length=256)]
    documents: bool | None = None  # ours, as in labs_request.GenerateRequest
    max_completion_tokens: Annotated[int, Meta(ge=1, le=2**20)] | None = None
    logprobs: bool | None = None
    top_logprobs: labs.TopLogprobs | None = None
    tools: Unsupported = None
    tool_choice: Unsupported = None
    parallel_tool_calls: Unsupported = None
    functions: Unsupported = None
    function_call: Unsupported = None
    response_format: labs_request.ResponseFormat | None = None
    modalities: Unsupported = None
    audio: Unsupported = None
    prediction: Unsupported = None
    reasoning_effort: Unsupported = None
    verbosity: Unsupported = None
    web_search_options: Unsupported = None
    service_tier: Unsupported = None
    store: Unsupported = None
    metadata: Unsupported = None
    safety_identifier: Unsupported = None
    prompt_cache_key: Unsupported = None


class CompletionRequest(OpenAIRequest, frozen=True, kw_only=True):
    """https://platform.openai.com/docs/api-reference/completions/create, always without template"""

    prompt: (
        str
        | Annotated[
            tuple[
                str | Annotated[int, Meta(ge=0)] | tuple[Annotated[int, Meta(ge=0)], ...],
                ...,
            ],
            Meta(min_length=1),
        ]
    )
    logprobs: labs.TopLogprobs | None = None
    echo: Unsupported = None
    suffix: Unsupported = None
    best_of: Unsupported = None


# Values that ask for nothing. null always does.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "metadata": ({},),
    "echo": (False,),
    "suffix": ("",),
    "best_of": (1,),
}
REFUSED = {
    name
    for kind in (ChatRequest, CompletionRequest)
    for name, note in kind.__annotations__.items()
    if note == "Unsupported"
}


# ---------------------------------------------------------------- what goes out


class PromptTokensDetails(Struct, frozen=True):
    cached_tokens: int = 0


class OpenAIUsage(Struct, frozen=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails = PromptTokensDetails()
    response_cached: bool = False


class MessagePart(Struct, frozen=True, omit_defaults=True):
    """A message, or what a chunk adds to one."""

    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET


class Choice(Struct, frozen=True):
    """One answer, or a piece of it: `message` or `delta` in a chat, else `text`."""

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
    """Return an error in OpenAI's words; the kind follows from the HTTP status."""
    kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = "server_error" if status >= 500 else kinds.get(status, "invalid_request_error")
    return Error(ErrorDetail(message, kind, param, code))


def code_and_param(error: labs.LabsError) -> tuple[str, str | None]:
    """Return OpenAI's words for what the one who asked can mend."""
    if code := getattr(error, "code", None):  # of a Refusal, or of labs_guard.Filtered
        return code, getattr(error, "param", None)
    if isinstance(error, labs.PromptTooLong):
        return "context_length_exceeded", None
    return "invalid_value", param_of(str(error))


def param_of(message: str) -> str | None:
    """Cut the field out of a message of msgspec or of labs."""
    found = re.search(r"- at `\$\.(.+?)`|field `(.+?)`|^(\w+(?:\[\d+\])?)(?: = |:| names)", message)
    return next((part for part in found.groups() if part), None) if found else None


def read(data: bytes, kind: type[S]) -> tuple[S, dict[str, Any]]:
    """Return a body as `kind`, and the fields that it names with their values.

    Raises Refusal, with the field where one is to blame.
    """
    try:
        body = msgspec.json.decode(data, type=kind)
        given: dict[str, Any] = msgspec.json.decode(data)
    except msgspec.ValidationError as error:
        raise Refusal(str(error), "invalid_value", param_of(str(error))) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Refusal(f"the body is no valid JSON: {error}", "invalid_json") from error
    for name in REFUSED & given.keys():
        neutral = [(type(value), value) for value in (None, *NEUTRAL.get(name, ()))]
        if (type(given[name]), given[name]) not in neutral:  # 0 is not False here
            raise Refusal(f"{name} is not implemented here", "unsupported", name)
    return body, given


# ---------------------------------------------------------------- from one to the other


class Endpoint:
    """What both endpoints have in common."""

    body: type[Any]
    prefix: str
    kinds: tuple[Any, Any]  # object of a whole answer and of a chunk

    def request_of(self, body: Any, given: dict[str, Any]) -> labs_request.Request:
        """Return what a body asks for; `given` holds the fields that it names."""
        return labs_request.Request(
            prompts=self.prompts(body),
            options=self.options(body, given),
            n=body.n or 1,
            model=body.model,
            response_format=getattr(body, "response_format", None),
            documents=getattr(body, "documents", False),
        )

    def options(self, body: Any, given: dict[str, Any]) -> dict[str, Any]:
        """Return the generation settings that the body names; null names none."""
        names = {*labs.Generation.__struct_fields__} - {"stop", "logprobs"}
        found = {name: getattr(body, name) for name in names & given.keys()}
        found = {name: value for name, value in found.items() if value is not None}
        if body.max_tokens is not None:
            found["max_new_tokens"] = body.max_tokens
        if body.stop is not None:
            found["stop"] = (body.stop,) if isinstance(body.stop, str) else body.stop
        return found

    def prompts(self, body: Any) -> tuple[labs_request.Prompt, ...]:
        raise NotImplementedError

    def choice(self, model: labs.Model, index: int, part: Any, offset: int = 0) -> Choice:
        """Return a choice of a whole answer or of an event; offset: characters before it."""
        raise NotImplementedError

    def first(self, index: int) -> Choice | None:
        """Return what a stream begins a choice with."""
        return None

    def answer(
        self, loaded: labs.Model, found: Sequence[labs.Completion], n: int, **names: Any
    ) -> OpenAIAnswer:
        """Return whole answers, `n` a prompt. names: as in `wrap`."""
        choices = tuple(self.choice(loaded, index, each) for index, each in enumerate(found))
        usage = usage_of([each.usage for each in found], n)
        names = {"system_fingerprint": system_fingerprint(loaded), **names}
        return self.wrap(choices, object=self.kinds[0], usage=usage, **names)

    def wrap(self, choices: tuple[Choice, ...], **names: Any) -> OpenAIAnswer:
        """Return choices as a chunk, unless `object` says otherwise.

        names: of the fields of OpenAIAnswer; id and model at least, which all chunks have alike.
        """
        names = {"object": self.kinds[1], "created": int(time.time()), **names}
        return OpenAIAnswer(choices=choices, **{**names, "id": f"{self.prefix}-{names['id']}"})


def usage_of(usages: Sequence[labs.Usage], n: int) -> OpenAIUsage:
    """Count each prompt once, as OpenAI does, and all that was generated."""
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
    """Return a name for all that an answer depends on, apart from the request."""
    if model.fingerprint is None:
        return None
    return f"fp_{hashlib.sha256(msgspec.json.encode(model.fingerprint)).hexdigest()[:12]}"


def _reason(event: Any) -> Any:
    """OpenAI knows no `timeout` and no `cancelled`: both cut an answer short."""
    reason = getattr(event, "finish_reason", None)
    return "length" if reason in ("timeout", "cancelled") else reason


def _token(model: labs.Model, token: int) -> str:
    with model.lock:
        return str(model.tokenizer.decode([token]))


class Chat(Endpoint):
    body = ChatRequest
    prefix = "chatcmpl"
    kinds = ("chat.completion", "chat.completion.chunk")

    def options(self, body: ChatRequest, given: dict[str, Any]) -> dict[str, Any]:
        found = super().options(body, given)
        limits = {body.max_tokens, body.max_completion_tokens} - {None}
        if len(limits) > 1:
            text = "max_tokens and max_completion_tokens differ: give one"
            raise Refusal(text, "invalid_value", "max_tokens")
        if limits:
            found["max_new_tokens"] = limits.pop()
        if body.top_logprobs is not None and not body.logprobs:
            raise Refusal("top_logprobs needs logprobs = true", "invalid_value", "top_logprobs")
        if body.logprobs is not None:
            found["logprobs"] = (body.top_logprobs or 0) if body.logprobs else None
        return found

    def prompts(self, body: ChatRequest) -> tuple[labs_request.Prompt, ...]:
        messages = tuple(
            labs.Message(
                role="system" if message.role == "developer" else message.role,
                content=message.content
                if isinstance(message.content, str)
                else "".join(part.text for part in message.content),
            )
            for message in body.messages
        )
        return (labs_request.Prompt(messages=messages),)

    def first(self, index: int) -> Choice:
        return Choice(index=index, delta=MessagePart(role="assistant", content=""))

    def choice(self, model: labs.Model, index: int, part: Any, offset: int = 0) -> Choice:
        message: dict[str, Any] = {"delta": MessagePart()}
        if isinstance(part, labs.Completion):
            message = {"message": MessagePart(role="assistant", content=part.text)}
        elif isinstance(part, labs.Delta):
            message = {"delta": MessagePart(content=part.text)}
        logprobs = self._logprobs(model, getattr(part, "logprobs", ()))
        return Choice(index=index, **message, logprobs=logprobs, finish_reason=_reason(part))

    def _logprobs(self, model: labs.Model, found: Any) -> dict[str, Any] | None:
        def entry(token: int, logprob: float) -> dict[str, Any]:
            text = _token(model, token)
            data = None if "\ufffd" in text else list(text.encode())
            return {"token": text, "logprob": logprob, "bytes": data}

        content = [
            {**entry(each.token, each.logprob), "top_logprobs": [entry(*top) for top in each.top]}
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
            raise Refusal("prompt: texts or lists of token ids", "invalid_value", "prompt")
        return labs_request.Prompt(ids=prompt)

    def choice(self, model: labs.Model, index: int, part: Any, offset: int = 0) -> Choice:
        logprobs, text = getattr(part, "logprobs", ()), getattr(part, "text", "")
        found = self._logprobs(model, logprobs, offset) if logprobs else None
        return Choice(index=index, text=text, logprobs=found, finish_reason=_reason(part))

    def _logprobs(self, model: labs.Model, found: Any, offset: int) -> dict[str, Any]:
        tokens = [_token(model, each.token) for each in found]
        offsets = itertools.accumulate(map(len, tokens), initial=offset)
        return {
            "tokens": tokens,
            "token_logprobs": [each.logprob for each in found],
            "top_logprobs": [
                {_token(model, token): logprob for token, logprob in each.top} for each in found
            ],
            "text_offset": list(offsets)[:-1],
        }


CHAT, COMPLETIONS = Chat(), Completions()
ENDPOINTS: dict[str, Endpoint] = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": COMPLETIONS,
}
