# SPDX-License-Identifier: Apache-2.0
"""Anthropic's answers, whole and as the events of a stream.

    reply = labs_message_events.Replies()
    reply.answer(body, model, completions, id="1", model=config.model_id)  # a whole answer
    reply.stream(body)                                                     # the same as events

labs_messages.py joins these to its requests. Needs labs.py, labs_message_blocks.py, labs_parts.py
and labs_protocol.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import msgspec
from msgspec import UNSET, Struct, UnsetType
from msgspec.structs import replace

import labs
import labs_message_blocks
import labs_parts
import labs_protocol

Found = labs.Completion | labs_parts.Answer
STOP_REASONS = {"stop": "end_turn", "tool_calls": "tool_use", "content_filter": "refusal"}


class OutputTokensDetails(Struct, frozen=True):
    thinking_tokens: int = 0


class MessagesUsage(Struct, frozen=True):
    """Tokens. input_tokens: of the prompt, without those that cache_read_input_tokens counts."""

    input_tokens: int
    output_tokens: int = 0
    cache_creation_input_tokens: int = 0
    cache_read_input_tokens: int = 0
    output_tokens_details: OutputTokensDetails = OutputTokensDetails()


class TextBlock(Struct, frozen=True, tag_field="type", tag="text"):
    text: str
    citations: None = None


class ThinkingBlock(Struct, frozen=True, tag_field="type", tag="thinking"):
    thinking: str
    signature: str


class ToolUseBlock(Struct, frozen=True, tag_field="type", tag="tool_use"):
    """A call. input: a JSON object, as the model wrote it."""

    id: str
    name: str
    input: msgspec.Raw


Block = TextBlock | ThinkingBlock | ToolUseBlock


class MessagesAnswer(Struct, frozen=True, kw_only=True, tag_field="type", tag="message"):
    """An answer. documents: an extension of labs, the passages in the prompt."""

    id: str
    role: Literal["assistant"] = "assistant"
    model: str
    content: tuple[Block, ...] = ()
    stop_reason: str | None = None
    stop_sequence: str | None = None
    usage: MessagesUsage
    documents: tuple[labs_protocol.Source, ...] | UnsetType = UNSET


class InputTokens(Struct, frozen=True):
    """The answer of /v1/messages/count_tokens."""

    input_tokens: int


# ---------------------------------------------------------------- errors


class ErrorDetails(Struct, frozen=True):
    """Why a request for a thread is refused; clients then send it again without one."""

    error_code: Literal["thread_unsupported_request"] = "thread_unsupported_request"
    unsupported: tuple[str, ...] = ()


class MessagesErrorDetail(Struct, frozen=True):
    type: str
    message: str
    details: ErrorDetails | UnsetType = UNSET


class MessagesError(Struct, frozen=True, tag_field="type", tag="error"):
    error: MessagesErrorDetail
    request_id: str | None = None


KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def error_of(status: int, message: str, code: str, param: str | None = None) -> MessagesError:
    """Return an error in Anthropic's format and, where clients know its words, in Anthropic's."""
    kind = KINDS.get(status, "api_error" if status >= 500 else "invalid_request_error")
    if code == "context_length_exceeded" and len(found := re.findall(r"\d+", message)) > 1:
        message = f"prompt is too long: {found[1]} tokens > {found[0]} maximum"
    if code == "prompt_too_large":
        message = f"prompt is too long: {message}"
    details = ErrorDetails() if param == "thread" else UNSET
    return MessagesError(MessagesErrorDetail(kind, message, details))


# ---------------------------------------------------------------- whole answers


class Replies(labs_protocol.Endpoint):
    """The answers to a request for a message."""

    def answer(
        self, body: Any, loaded: labs.Model, found: Sequence[Found], **names: Any
    ) -> MessagesAnswer:
        (each,) = found
        return MessagesAnswer(
            id=f"msg_{names['id']}",
            model=names["model"],
            content=tuple(_blocks(each, body.shows_thinking)),
            **_ending(each),
            usage=usage_of(each.usage),
            documents=names.get("documents", UNSET),
        )

    def stream(self, body: Any) -> Events:
        return Events(body.shows_thinking)

    def error_of(self, status: int, message: str, code: str, param: str | None = None) -> Any:
        return error_of(status, message, code, param)


def _blocks(found: Found, shown: bool) -> Iterator[Block]:
    if reasoning := getattr(found, "reasoning", ""):
        signature = labs_message_blocks.Signature(reasoning)
        yield ThinkingBlock(reasoning if shown else "", signature.text(shown))
    if found.text:
        yield TextBlock(found.text)
    for call in getattr(found, "tool_calls", ()):
        arguments = msgspec.Raw(call.function.arguments.encode())
        yield ToolUseBlock(call.id, call.function.name, arguments)


def _ending(found: Found | labs.Done) -> dict[str, Any]:
    """Return why an answer ended; one that took too long or was cancelled has max_tokens."""
    stopped = found.finish_reason == "stop" and found.matched_stop is not None
    reason = "stop_sequence" if stopped else STOP_REASONS.get(found.finish_reason, "max_tokens")
    return {"stop_reason": reason, "stop_sequence": found.matched_stop if stopped else None}


def usage_of(usage: labs.Usage) -> MessagesUsage:
    """Return token counts as Anthropic counts them."""
    return MessagesUsage(
        input_tokens=usage.prompt_tokens - usage.cached_tokens,
        output_tokens=usage.completion_tokens,
        cache_read_input_tokens=usage.cached_tokens,
        output_tokens_details=OutputTokensDetails(usage.reasoning_tokens),
    )


# ---------------------------------------------------------------- events


class Delta(Struct, frozen=True, kw_only=True):
    """What an event appends to a block, or says of the whole message at its end."""

    type: str | UnsetType = UNSET
    text: str | UnsetType = UNSET
    thinking: str | UnsetType = UNSET
    signature: str | UnsetType = UNSET
    partial_json: str | UnsetType = UNSET
    stop_reason: str | UnsetType = UNSET
    stop_sequence: str | UnsetType | None = UNSET


class Event(Struct, frozen=True, kw_only=True):
    type: str
    index: int | UnsetType = UNSET
    message: MessagesAnswer | UnsetType = UNSET
    content_block: Block | UnsetType = UNSET
    delta: Delta | UnsetType = UNSET
    usage: MessagesUsage | UnsetType = UNSET


def _event(type: str, **fields: Any) -> bytes:
    return labs_protocol.event(Event(type=type, **fields), type)


class Events(labs_protocol.Stream):
    """The events of a stream. shown: thinking is told, not only signed."""

    ping = labs_protocol.event({"type": "ping"}, "ping")

    def __init__(self, shown: bool) -> None:
        self._shown = shown
        self._id: str | None = None
        self._index, self._open = -1, ""  # the last block and, while it is open, its type
        self._thinking = labs_message_blocks.Signature()

    def begin(self, opened: labs_protocol.Opened) -> Iterator[bytes]:
        self._id = opened.id
        message = MessagesAnswer(
            id=f"msg_{opened.id}",
            model=opened.model,
            usage=MessagesUsage(opened.prompt_tokens),  # how many are cached is not known yet
            documents=opened.documents,
        )
        yield _event("message_start", message=message)

    def take(self, choice: int, part: Any) -> Iterator[bytes]:
        if isinstance(part, labs.Delta):
            if part.text:
                yield from self._within(TextBlock(""))
                yield self._delta("text_delta", text=part.text)
        elif isinstance(part, labs_parts.Reasoning):
            yield from self._within(ThinkingBlock("", ""))
            self._thinking.add(part.text)
            if self._shown:
                yield self._delta("thinking_delta", thinking=part.text)
        elif isinstance(part, labs_parts.CallStarted):
            yield from self._start(ToolUseBlock(part.id, part.name, msgspec.Raw(b"{}")))
        elif isinstance(part, labs_parts.Arguments):
            yield self._delta("input_json_delta", partial_json=part.text)
        else:
            yield from self._stop()

    def end(self, dones: Sequence[labs.Done]) -> Iterator[bytes]:
        (done,) = dones
        delta = Delta(**_ending(done))
        yield _event("message_delta", delta=delta, usage=usage_of(done.usage))
        yield _event("message_stop")

    def failed(self, status: int, message: str, code: str, param: str | None) -> bytes:
        found = error_of(status, message, code, param)
        return labs_protocol.event(replace(found, request_id=self._id), "error")

    def _within(self, block: Block) -> Iterator[bytes]:
        """Begin a block unless one of its type is open."""
        if self._open != block.__struct_config__.tag:
            yield from self._start(block)

    def _start(self, block: Block) -> Iterator[bytes]:
        yield from self._stop()
        self._index, self._open = self._index + 1, str(block.__struct_config__.tag)
        yield _event("content_block_start", index=self._index, content_block=block)
        if self._index == 0:
            yield self.ping

    def _stop(self) -> Iterator[bytes]:
        """End the block that is open, with its signature if it is thinking."""
        if self._open == "thinking":
            signature, self._thinking = self._thinking, labs_message_blocks.Signature()
            yield self._delta("signature_delta", signature=signature.text(self._shown))
        if self._open:
            self._open = ""
            yield _event("content_block_stop", index=self._index)

    def _delta(self, type: str, **fields: str) -> bytes:
        delta = Delta(type=type, **fields)
        return _event("content_block_delta", index=self._index, delta=delta)
