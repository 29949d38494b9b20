# SPDX-License-Identifier: Apache-2.0
"""The answers of OpenAI's Responses API: items, the response that holds them, and their events.

    events = labs_response_items.Events(shown)     # a labs_protocol.Stream; fields of the request
    for data in events.begin(opened): ...          # then events.take(choice, part), events.end()
    events.whole(opened, found)                    # the same response, of a whole answer

Items are reasoning, messages and calls, as the model wrote them. labs_responses.py joins these to
its requests. Needs labs.py, labs_loop.py, labs_parts.py, labs_protocol.py, labs_replies.py and
labs_tokens.py.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, cast

from msgspec import UNSET, Struct, UnsetType
from msgspec.structs import replace

import labs
import labs_parts
import labs_protocol
import labs_replies
import labs_tokens

Status = Literal["in_progress", "completed", "incomplete"]


# ---------------------------------------------------------------- items


class OutputText(Struct, frozen=True, tag_field="type", tag="output_text"):
    text: str
    annotations: tuple[dict[str, Any], ...] = ()
    logprobs: tuple[dict[str, Any], ...] = ()


class ReasoningText(Struct, frozen=True, tag_field="type", tag="reasoning_text"):
    text: str


class OutputMessage(Struct, frozen=True, kw_only=True, tag_field="type", tag="message"):
    id: str
    status: Status = "in_progress"
    role: Literal["assistant"] = "assistant"
    content: tuple[OutputText, ...] = ()


class ReasoningItem(Struct, frozen=True, kw_only=True, tag_field="type", tag="reasoning"):
    """What the model thought. encrypted_content: the same, see labs_response_input.seal."""

    id: str
    status: Status = "in_progress"
    summary: tuple[dict[str, Any], ...] = ()
    content: tuple[ReasoningText, ...] = ()
    encrypted_content: str | UnsetType = UNSET


class FunctionCallItem(Struct, frozen=True, kw_only=True, tag_field="type", tag="function_call"):
    id: str
    status: Status = "in_progress"
    call_id: str
    name: str
    arguments: str = ""


Item = OutputMessage | ReasoningItem | FunctionCallItem


# ---------------------------------------------------------------- the response


class InputTokensDetails(Struct, frozen=True):
    cached_tokens: int = 0
    cache_write_tokens: int = 0


class ResponseUsage(Struct, frozen=True):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: labs_replies.CompletionTokensDetails
    total_tokens: int
    response_cached: bool = False


class IncompleteDetails(Struct, frozen=True):
    reason: Literal["max_output_tokens", "content_filter"]


class ResponseError(Struct, frozen=True):
    code: str
    message: str


class ResponseObject(Struct, frozen=True, kw_only=True):
    """A response. temperature, top_p and penalties: as used. It is never stored."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    completed_at: int | None = None
    status: Literal["in_progress", "completed", "incomplete", "failed"] = "in_progress"
    error: ResponseError | None = None
    incomplete_details: IncompleteDetails | None = None
    model: str
    output: tuple[Item, ...] = ()
    usage: ResponseUsage | None = None
    temperature: float
    top_p: float
    frequency_penalty: float
    presence_penalty: float
    previous_response_id: None = None
    truncation: Literal["disabled"] = "disabled"
    background: Literal[False] = False
    store: Literal[False] = False
    service_tier: Literal["default"] = "default"
    instructions: str | None  # from here on as in the request
    max_output_tokens: int | None
    max_tool_calls: int | None
    metadata: dict[str, Any]
    parallel_tool_calls: bool
    prompt_cache_key: str | None
    reasoning: dict[str, Any]
    safety_identifier: str | None
    text: dict[str, Any]
    tool_choice: Any
    tools: tuple[Any, ...]
    top_logprobs: int
    user: str | None
    documents: tuple[labs_protocol.Source, ...] | UnsetType = UNSET


def _begun(shown: dict[str, Any], opened: labs_protocol.Opened) -> ResponseObject:
    """Return the response before its first item."""
    import labs_loop  # it needs torch, which takes a second to import

    used = labs_loop.sampling_of(opened.generation, opened.loaded.generation_defaults, 0, ())
    names = ("temperature", "top_p", "frequency_penalty", "presence_penalty")
    return ResponseObject(
        id=f"resp_{opened.id}",
        created_at=opened.created,
        model=opened.model,
        documents=opened.documents,
        **{name: getattr(used, name) for name in names},
        **shown,
    )


def _ended(begun: ResponseObject, output: Sequence[Item], done: labs.Done) -> ResponseObject:
    usage = ResponseUsage(
        input_tokens=done.usage.prompt_tokens,
        input_tokens_details=InputTokensDetails(done.usage.cached_tokens),
        output_tokens=done.usage.completion_tokens,
        output_tokens_details=labs_replies.CompletionTokensDetails(done.usage.reasoning_tokens),
        total_tokens=done.usage.prompt_tokens + done.usage.completion_tokens,
        response_cached=done.usage.response_cached,
    )
    found = replace(begun, output=tuple(output), usage=usage)
    if done.finish_reason in ("stop", "tool_calls"):
        return replace(found, status="completed", completed_at=int(time.time()))
    filtered = done.finish_reason == "content_filter"
    details = IncompleteDetails("content_filter" if filtered else "max_output_tokens")
    return replace(found, status="incomplete", incomplete_details=details)


# ---------------------------------------------------------------- events


class ResponseEvent(Struct, frozen=True, kw_only=True):
    """A response, an item, a part or a piece of one; a piece is whole in an event named done."""

    type: str
    sequence_number: int
    response: ResponseObject | UnsetType = UNSET
    output_index: int | UnsetType = UNSET
    item: Item | UnsetType = UNSET
    item_id: str | UnsetType = UNSET
    content_index: int | UnsetType = UNSET
    part: OutputText | ReasoningText | UnsetType = UNSET
    delta: str | UnsetType = UNSET
    text: str | UnsetType = UNSET
    arguments: str | UnsetType = UNSET
    logprobs: Sequence[dict[str, Any]] | UnsetType = UNSET


# The beginnings of an item's id, and of the names of the events of its pieces.
NAMES: dict[Any, tuple[str, str]] = {
    OutputMessage: ("msg", "response.output_text"),
    ReasoningItem: ("rs", "response.reasoning_text"),
    FunctionCallItem: ("fc", "response.function_call_arguments"),
}


class Events(labs_protocol.Stream):
    """The events of a response. shown: as it repeats its request. seal: makes encrypted_content.

    An item is open from its first piece until another item begins or the answer ends.
    """

    def __init__(self, shown: dict[str, Any], seal: Callable[[str], str] | None = None) -> None:
        self._shown, self._seal = shown, seal
        self._numbers = itertools.count()
        self._response: ResponseObject | None = None
        self._output: list[Item] = []  # closed items
        self._item: Any = None  # the open one, without its pieces
        self._pieces, self._logprobs = list[str](), list[dict[str, Any]]()

    def begin(self, opened: labs_protocol.Opened) -> Iterator[bytes]:
        self._response, self._id = _begun(self._shown, opened), opened.id
        self._places = labs_tokens.Places(opened.loaded)
        yield self._told(self._response, "response.created")
        yield self._told(self._response, "response.in_progress")

    def take(self, choice: int, part: Any) -> Iterator[bytes]:
        if isinstance(part, labs_parts.CallStarted):
            yield from self._open(FunctionCallItem, call_id=part.id, name=part.name)
        elif isinstance(part, labs_parts.Arguments):
            yield from self._piece(FunctionCallItem, part.text)
        elif isinstance(part, labs_parts.Reasoning) and part.text:
            yield from self._piece(ReasoningItem, part.text)
        elif isinstance(part, labs.Delta) and (part.text or part.logprobs):
            yield from self._piece(OutputMessage, part.text, part.logprobs)

    def end(self, dones: Sequence[labs.Done]) -> Iterator[bytes]:
        if self._item is None and not self._output:  # an empty answer is an empty message
            yield from self._open(OutputMessage)
        whole = dones[0].finish_reason in ("stop", "tool_calls")
        yield from self._close("completed" if whole else "incomplete")
        if self._response is not None:
            self._response = _ended(self._response, self._output, dones[0])
            yield self._told(self._response, f"response.{self._response.status}")

    def whole(self, opened: labs_protocol.Opened, found: labs_replies.Found) -> ResponseObject:
        """Return the response that the stream of a whole answer ends with."""
        *parts, done = labs_parts.unfold(found)
        work = [self.begin(opened), *(self.take(0, part) for part in parts)]
        [*itertools.chain(*work, self.end([cast("labs.Done", done)]))]
        return cast("ResponseObject", self._response)

    def failed(self, status: int, message: str, code: str, param: str | None) -> bytes:
        if self._response is None:
            param = "input" if param == "messages" else param
            error = {"code": code, "message": message, "param": param}
            return labs_protocol.event({"type": "error", "sequence_number": 0, **error}, "error")
        closing = [*self._close("incomplete")]
        reason = ResponseError("server_error" if status >= 500 else code, message)
        output: tuple[Item, ...] = tuple(self._output)
        found = replace(self._response, status="failed", error=reason, output=output)
        return b"".join([*closing, self._told(found, "response.failed")])

    # ------------------------------------------------------------ items

    def _open(self, kind: type[Item], **fields: str) -> Iterator[bytes]:
        yield from self._close()
        item: Any = kind
        self._item = item(id=f"{NAMES[kind][0]}_{self._id}_{len(self._output)}", **fields)
        yield self._event("response.output_item.added", item=self._item)
        if kind is not FunctionCallItem:
            part = self._content("")
            yield self._event("response.content_part.added", **self._place(), part=part)

    def _piece(self, kind: type[Item], text: str, logprobs: Any = ()) -> Iterator[bytes]:
        if not isinstance(self._item, kind):
            yield from self._open(kind)
        self._pieces.append(text)
        shown = labs_replies.logprobs_of(self._places, logprobs) if logprobs else []
        self._logprobs += shown
        yield self._event(self._named("delta"), **self._place(shown), delta=text)

    def _close(self, status: Status = "completed") -> Iterator[bytes]:
        """Yield the end of the open item, if there is one. A call is always whole."""
        if (item := self._item) is None:
            return
        text, place = "".join(self._pieces), self._place(self._logprobs)
        if isinstance(item, FunctionCallItem):
            yield self._event(self._named("done"), **place, arguments=text)
            changes: dict[str, Any] = {"arguments": text, "status": "completed"}
        else:
            part = self._content(text)
            yield self._event(self._named("done"), **place, text=text)
            yield self._event("response.content_part.done", **self._place(), part=part)
            changes = {"content": (part,), "status": status}
            if self._seal is not None and isinstance(item, ReasoningItem):
                changes["encrypted_content"] = self._seal(text)
        closed = replace(item, **changes)
        yield self._event("response.output_item.done", item=closed)
        self._output.append(closed)
        self._item, self._pieces, self._logprobs = None, [], []

    def _content(self, text: str) -> OutputText | ReasoningText:
        if isinstance(self._item, ReasoningItem):
            return ReasoningText(text)
        return OutputText(text, logprobs=tuple(self._logprobs))

    # ------------------------------------------------------------ single events

    def _told(self, response: ResponseObject, name: str) -> bytes:
        found = ResponseEvent(type=name, sequence_number=next(self._numbers), response=response)
        return labs_protocol.event(found, name)

    def _event(self, name: str, **fields: Any) -> bytes:
        at, number = len(self._output), next(self._numbers)
        event = ResponseEvent(type=name, sequence_number=number, output_index=at, **fields)
        return labs_protocol.event(event, name)

    def _named(self, end: str) -> str:
        return f"{NAMES[type(self._item)][1]}.{end}"

    def _place(self, logprobs: Sequence[dict[str, Any]] | None = None) -> dict[str, Any]:
        """Return where in the open item a piece is, with its log-probabilities if it is of text."""
        kind, place = type(self._item), {"item_id": self._item.id}
        if kind is not FunctionCallItem:
            place["content_index"] = 0
        if kind is OutputMessage and logprobs is not None:
            place["logprobs"] = logprobs
        return place
