# SPDX-License-Identifier: Apache-2.0
"""OpenAI's answers, whole and as the chunks of a stream.

    reply = labs_replies.ChatReplies()
    reply.answer(body, model, completions, id="1", model=config.model_id)  # a whole answer
    reply.wrap((reply.choice(places, index, part),), id="1", model="m")    # a chunk
    reply.stream(body)                                                     # all of them, in order

A chat is rendered from the parts of labs_parts, a completion from labs' events. labs_openai.py
joins these to its requests. Needs labs.py, labs_parts.py, labs_protocol.py and labs_tokens.py.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import msgspec
from msgspec import UNSET, Struct, UnsetType

import labs
import labs_parts
import labs_protocol
import labs_tokens

Found = labs.Completion | labs_parts.Answer


class PromptTokensDetails(Struct, frozen=True):
    cached_tokens: int = 0


class CompletionTokensDetails(Struct, frozen=True):
    reasoning_tokens: int = 0


class OpenAIUsage(Struct, frozen=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails = PromptTokensDetails()
    completion_tokens_details: CompletionTokensDetails = CompletionTokensDetails()
    response_cached: bool = False


class Called(Struct, frozen=True, omit_defaults=True):
    """The function of a call, or a piece of its arguments."""

    arguments: str
    name: str | UnsetType = UNSET


class Call(Struct, frozen=True, omit_defaults=True):
    """A call. Only a chunk has its index, and only the first chunk of a call its id and type."""

    function: Called
    index: int | UnsetType = UNSET
    id: str | UnsetType = UNSET
    type: Literal["function"] | UnsetType = UNSET


class MessagePart(Struct, frozen=True, omit_defaults=True):
    """A message of a response, or what a chunk appends to it."""

    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType | None = UNSET
    reasoning_content: str | UnsetType = UNSET
    tool_calls: tuple[Call, ...] | UnsetType = UNSET


class Choice(Struct, frozen=True):
    """One answer or a piece of it: a chat sets `message` or `delta`, a completion `text`."""

    index: int
    message: MessagePart | UnsetType = UNSET
    delta: MessagePart | UnsetType = UNSET
    text: str | UnsetType = UNSET
    logprobs: dict[str, Any] | None = None
    finish_reason: Literal["stop", "length", "content_filter", "tool_calls"] | None = None


class OpenAIAnswer(Struct, frozen=True):
    id: str
    object: Literal["chat.completion", "chat.completion.chunk", "text_completion"]
    created: int
    model: str
    choices: tuple[Choice, ...]
    usage: OpenAIUsage | UnsetType | None = UNSET
    system_fingerprint: str | None = None
    documents: tuple[labs_protocol.Source, ...] | UnsetType = UNSET


class Replies(labs_protocol.Endpoint):
    """The code that both kinds of answers share."""

    prefix: str
    kinds: tuple[Any, Any]  # `object` of a whole answer, and of a chunk

    def choice(self, places: labs_tokens.Places, index: int, part: Any) -> Choice:
        """Return a whole answer or a part of one as a choice. places: of this choice's tokens."""
        raise NotImplementedError

    def first(self, index: int, part: Any) -> Choice | None:
        """Return the choice of a stream's first chunk, or None if none is needed.

        part: the one that the second chunk will have.
        """
        return None

    def answer(
        self, body: Any, loaded: labs.Model, found: Sequence[Found], **names: Any
    ) -> OpenAIAnswer:
        """Return whole answers, `body.n` per prompt. names: as in `wrap`."""
        names.pop("generation", None)
        choices = tuple(
            self.choice(labs_tokens.Places(loaded), index, each) for index, each in enumerate(found)
        )
        usage = usage_of([each.usage for each in found], body.n or 1)
        names = {"system_fingerprint": system_fingerprint(loaded), **names}
        return self.wrap(choices, object=self.kinds[0], usage=usage, **names)

    def wrap(self, choices: tuple[Choice, ...], **names: Any) -> OpenAIAnswer:
        """Return choices as a chunk, or as a whole answer if `names` sets `object`.

        names: other fields of OpenAIAnswer, at least id and model, equal in all chunks.
        """
        names = {"object": self.kinds[1], "created": int(time.time()), **names}
        return OpenAIAnswer(choices=choices, **{**names, "id": f"{self.prefix}-{names['id']}"})

    def stream(self, body: Any) -> Chunks:
        options = body.stream_options
        return Chunks(self, body.n or 1, bool(options is not None and options.include_usage))


class Chunks(labs_protocol.Stream):
    """The chunks of a stream, one per part. n: answers per prompt. usage: a last chunk counts."""

    def __init__(self, replies: Replies, n: int, usage: bool) -> None:
        self._replies, self._n, self._usage = replies, n, usage
        self._places: dict[int, labs_tokens.Places] = {}  # by choice

    def begin(self, opened: labs_protocol.Opened) -> Iterator[bytes]:
        self._opened = opened
        self._names = {
            "usage": None if self._usage else UNSET,
            **{name: getattr(opened, name) for name in ("id", "created", "model")},
            "system_fingerprint": system_fingerprint(opened.loaded),
        }
        yield from ()

    def take(self, choice: int, part: Any) -> Iterator[bytes]:
        first = None if choice in self._places else self._replies.first(choice, part)
        if first is not None:
            documents = UNSET if self._places else self._opened.documents
            yield self._chunk(first, documents=documents)
        place = self._places.setdefault(choice, labs_tokens.Places(self._opened.loaded))
        yield self._chunk(self._replies.choice(place, choice, part))

    def end(self, dones: Sequence[labs.Done]) -> Iterator[bytes]:
        if self._usage:
            yield self._chunk(usage=usage_of([done.usage for done in dones], self._n))
        yield b"data: [DONE]\n\n"

    def _chunk(self, *choices: Choice, **more: Any) -> bytes:
        return labs_protocol.event(self._replies.wrap(choices, **{**self._names, **more}))


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
        completion_tokens_details=CompletionTokensDetails(
            sum(usage.reasoning_tokens for usage in usages)
        ),
        response_cached=all(usage.response_cached for usage in usages),
    )


def system_fingerprint(model: labs.Model) -> str | None:
    """Return a digest of everything, other than the request, that an answer depends on."""
    if model.fingerprint is None:
        return None
    return f"fp_{hashlib.sha256(msgspec.json.encode(model.fingerprint)).hexdigest()[:12]}"


def logprobs_of(
    places: labs_tokens.Places, found: Sequence[labs.TokenLogprob]
) -> list[dict[str, Any]]:
    """Return log-probabilities as OpenAI writes them. places: of the answer's tokens so far."""

    def entry(token: int, logprob: float, data: bytes) -> dict[str, Any]:
        name = places.spelling.name_of(token)
        return {"token": name, "logprob": logprob, "bytes": [*data]}

    return [
        {
            **entry(each.token, each.logprob, places.take(each.token)[1]),
            "top_logprobs": [
                entry(i, logprob, places.spelling.bytes_of(i)) for i, logprob in each.top
            ],
        }
        for each in found
    ]


def _reason(part: Any) -> Any:
    """Return OpenAI's finish reason, "length" for "timeout" and "cancelled", or None."""
    reason = getattr(part, "finish_reason", None)
    return "length" if reason in ("timeout", "cancelled") else reason


# ---------------------------------------------------------------- chats


class ChatReplies(Replies):
    prefix = "chatcmpl"
    kinds = ("chat.completion", "chat.completion.chunk")

    def first(self, index: int, part: Any) -> Choice:
        content = "" if isinstance(part, labs.Delta | labs.Done) else None
        return Choice(index=index, delta=MessagePart(role="assistant", content=content))

    def choice(self, places: labs_tokens.Places, index: int, part: Any) -> Choice:
        whole = isinstance(part, Found)
        message: dict[str, Any] = {"message": _message(part)} if whole else {"delta": _delta(part)}
        logprobs = self._logprobs(places, getattr(part, "logprobs", ()))
        return Choice(index=index, **message, logprobs=logprobs, finish_reason=_reason(part))

    def _logprobs(self, places: labs_tokens.Places, found: Any) -> dict[str, Any] | None:
        content = logprobs_of(places, found)
        return {"content": content, "refusal": None} if content else None


def _message(found: Found) -> MessagePart:
    """Return a whole answer as a message; one of reasoning or calls only has the content null."""
    reasoning, calls = getattr(found, "reasoning", ""), getattr(found, "tool_calls", ())
    return MessagePart(
        role="assistant",
        content=found.text if found.text or not (reasoning or calls) else None,
        reasoning_content=reasoning or UNSET,
        tool_calls=tuple(
            Call(id=each.id, type="function", function=Called(**_function(each))) for each in calls
        )
        or UNSET,
    )


def _function(call: labs.ToolCall) -> dict[str, str]:
    return {"name": call.function.name, "arguments": call.function.arguments}


def _delta(part: Any) -> MessagePart:
    """Return a part as what a chunk appends to the message."""
    if isinstance(part, labs_parts.Reasoning):
        return MessagePart(reasoning_content=part.text)
    if isinstance(part, labs_parts.CallStarted):
        function = Called(name=part.name, arguments="")
        call = Call(index=part.index, id=part.id, type="function", function=function)
        return MessagePart(tool_calls=(call,))
    if isinstance(part, labs_parts.Arguments):
        call = Call(index=part.index, function=Called(arguments=part.text))
        return MessagePart(tool_calls=(call,))
    return MessagePart(content=part.text) if isinstance(part, labs.Delta) else MessagePart()


# ---------------------------------------------------------------- completions


class TextReplies(Replies):
    prefix = "cmpl"
    kinds = ("text_completion", "text_completion")

    def choice(self, places: labs_tokens.Places, index: int, part: Any) -> Choice:
        logprobs, text = getattr(part, "logprobs", ()), getattr(part, "text", "")
        places.text += text
        found = self._logprobs(places, logprobs) if logprobs else None
        return Choice(index=index, text=text, logprobs=found, finish_reason=_reason(part))

    def _logprobs(self, places: labs_tokens.Places, found: Any) -> dict[str, Any]:
        tops: list[dict[str, float]] = []
        for each in found:
            tops.append({})
            chosen = [] if each.token in dict(each.top) else [(each.token, each.logprob)]
            for token, logprob in (*each.top, *chosen):  # as OpenAI does
                tops[-1][places.spelling.name_of(token, tops[-1])] = logprob
        known = [not math.isnan(each.logprob) for each in found]  # but a prompt's first token
        return {
            "tokens": [places.spelling.name_of(each.token) for each in found],
            "token_logprobs": [each.logprob if known[i] else None for i, each in enumerate(found)],
            "top_logprobs": [top if known[i] else None for i, top in enumerate(tops)],
            "text_offset": [places.take(each.token)[0] for each in found],
        }
