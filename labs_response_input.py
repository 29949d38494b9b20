# SPDX-License-Identifier: Apache-2.0
"""The input of OpenAI's Responses API: its items become messages.

    messages = labs_response_input.messages_of(instructions, items)  # raises Refusal
    sealed = labs_response_input.seal(reasoning)                     # an encrypted_content

Items are JSON that is not yet read, so that each is refused by its place and kind. Needs labs.py,
labs_dialogue.py, labs_protocol.py and labs_request.py.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, Literal, TypeVar

import msgspec
from msgspec import Raw, Struct

import labs
import labs_dialogue
import labs_protocol
from labs_request import Refusal

T = TypeVar("T")
MARK, CHECKED = b"labs1", 8  # how sealed reasoning begins; bytes of its checksum


class Read(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of what a client writes here."""


# ---------------------------------------------------------------- items of the input


class InputText(Read, frozen=True, tag_field="type", tag="input_text"):
    """A text. prompt_cache_breakpoint never changes the answer."""

    text: str
    prompt_cache_breakpoint: dict[str, Any] | None = None


class OutputTextGiven(Read, frozen=True, tag_field="type", tag="output_text"):
    """A text of an earlier answer. The last two fields never change the answer."""

    text: str
    annotations: tuple[dict[str, Any], ...] | None = None
    logprobs: tuple[dict[str, Any], ...] | None = None


class RefusalGiven(Read, frozen=True, tag_field="type", tag="refusal"):
    refusal: str


class InputImage(Struct, frozen=True, tag_field="type", tag="input_image"):
    """Always refused, with what its fields may be."""


class InputFile(Struct, frozen=True, tag_field="type", tag="input_file"):
    """Always refused."""


class InputAudio(Struct, frozen=True, tag_field="type", tag="input_audio"):
    """Always refused."""


Part = InputText | OutputTextGiven | RefusalGiven | InputImage | InputFile | InputAudio
Content = str | tuple[Part, ...]


class Item(Read, frozen=True, kw_only=True):
    """What the kinds of items share. id and status never change the answer."""

    id: str | None = None
    status: Literal["in_progress", "completed", "incomplete"] | None = None


class MessageGiven(Item, frozen=True, kw_only=True):
    """A message. phase never changes the answer."""

    role: Literal["user", "assistant", "system", "developer"]
    content: Content
    type: Literal["message"] = "message"
    phase: str | None = None


class FunctionCallGiven(Item, frozen=True, kw_only=True):
    """A call of an earlier answer. The last three fields take only neutral values."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    namespace: Any = None
    caller: Any = None
    is_async: Any = msgspec.field(default=None, name="async")


class FunctionCallOutput(Item, frozen=True, kw_only=True):
    """The result of a call. name never changes the answer; the last two fields are as above."""

    type: Literal["function_call_output"]
    call_id: str
    output: Content
    name: str | None = None
    namespace: Any = None
    caller: Any = None


class SummaryText(Read, frozen=True, kw_only=True):
    type: Literal["summary_text"]
    text: str


class ReasoningTextGiven(Read, frozen=True, kw_only=True):
    type: Literal["reasoning_text"]
    text: str


class ReasoningGiven(Item, frozen=True, kw_only=True):
    """Earlier reasoning: content, without it encrypted_content, and without both the summary."""

    type: Literal["reasoning"]
    summary: tuple[SummaryText, ...] = ()
    content: tuple[ReasoningTextGiven, ...] | None = None
    encrypted_content: str | None = None


ITEMS: dict[str, type[Struct]] = {
    "message": MessageGiven,
    "function_call": FunctionCallGiven,
    "function_call_output": FunctionCallOutput,
    "reasoning": ReasoningGiven,
}
NEUTRAL_OF_ITEM: dict[str, tuple[Any, ...]] = {
    "namespace": (),
    "caller": ({"type": "direct"},),
    "is_async": (False,),
}


# ---------------------------------------------------------------- reading


def read_as(data: Raw, kind: type[T], where: str) -> T:
    """Return a part of a body as `kind`. where: its place. Raises Refusal, which names it."""
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.ValidationError as error:
        what, _, inner = str(error).partition(" - at `$")
        text = f"{what} - at `$.{where}{inner or '`'}"
        raise Refusal(text, "invalid_value", labs_protocol.param_of(text)) from error


def refuse(text: str, where: str) -> Refusal:
    return Refusal(f"{where}: {text}", "unsupported", where)


def check_neutral(found: Struct, neutral: dict[str, tuple[Any, ...]], where: str) -> None:
    """Raise Refusal when a field that the struct has is set to another value than a neutral one."""
    for name, values in neutral.items():
        if name in found.__struct_fields__:
            shown = f"{where}.{name.removeprefix('is_')}"
            labs_protocol.check_neutral(shown, getattr(found, name), values)


# ---------------------------------------------------------------- reasoning that comes back


def seal(text: str) -> str:
    """Return reasoning as encrypted_content. It is not secret: base64 of the text and a checksum.

    Nothing is stored, so it carries the reasoning of clients that give back nothing else of it.
    """
    data = text.encode(errors="replace")
    return base64.b64encode(MARK + hashlib.sha256(data).digest()[:CHECKED] + data).decode()


def unseal(sealed: str) -> str:
    """Return the reasoning in an encrypted_content. Raises ValueError unless `seal` made it."""
    text = base64.b64decode(sealed, validate=True)[len(MARK) + CHECKED :].decode()
    if seal(text) != sealed:
        raise ValueError("its checksum is wrong")
    return text


# ---------------------------------------------------------------- items become messages


def messages_of(instructions: str | None, items: str | Sequence[Raw]) -> tuple[labs.Message, ...]:
    """Return the conversation: the instructions as a system message, then the items.

    System and developer messages before the first other one are joined, because many chat templates
    take only one, and reasoning, texts and calls of one answer become one message.
    """
    talk = Talk()
    if instructions:
        talk.say("system", instructions)
    if not items:
        raise Refusal("input is empty", "invalid_value", "input")
    if isinstance(items, str):
        talk.say("user", items)
    else:
        for place, data in enumerate(items):
            talk.add(f"input[{place}]", data)
    return talk.ended()


class Talk:
    """A conversation that grows by items. An answer is open until an item of another side."""

    def __init__(self) -> None:
        self._system: list[str] = []  # of the messages at the beginning
        self._messages: list[labs.Message] = []
        self._texts: dict[str, list[str]] = {}  # of the open answer, by field
        self._calls: list[labs.ToolCall] = []
        self._called: set[str] = set()

    def ended(self) -> tuple[labs.Message, ...]:
        self._close()
        system = "\n\n".join(self._system)
        first = [labs.Message(role="system", content=system)] if self._system else []
        return (*first, *self._messages)

    def say(self, role: str, text: str) -> None:
        """Add a message that is not the model's."""
        self._close()
        if role == "system" and not self._messages:
            self._system.append(text)
        else:
            self._messages.append(labs.Message(role=role, content=text))  # type: ignore[arg-type]

    def add(self, where: str, data: Raw) -> None:
        """Add an item. Raises Refusal, which names its place."""
        item = read_as(data, _kind_of(where, data), where)
        check_neutral(item, NEUTRAL_OF_ITEM, where)
        if isinstance(item, MessageGiven):
            text, role = text_of(item.content, f"{where}.content"), item.role
            if role == "assistant":
                self._extend("content", text)
            else:
                self.say("user" if role == "user" else "system", text)
        elif isinstance(item, FunctionCallGiven):
            self._call(where, item)
        elif isinstance(item, FunctionCallOutput):
            self._result(where, item)
        elif isinstance(item, ReasoningGiven) and (thought := _thought(item, where)):
            self._extend("reasoning_content", thought)

    def _close(self) -> None:
        if self._texts or self._calls:
            texts = {name: "".join(parts) for name, parts in self._texts.items()}
            calls = tuple(self._calls) or None
            message = {"role": "assistant", "content": "", **texts, "tool_calls": calls}
            self._messages.append(labs.Message(**message))  # type: ignore[arg-type]
        self._texts, self._calls = {}, []

    def _extend(self, name: str, text: str) -> None:
        """Append text or reasoning to the open answer; to a text, only calls are appended."""
        if "content" in self._texts and not self._calls:
            self._close()
        if text or name not in self._texts:
            self._texts.setdefault(name, []).append(text)

    def _call(self, where: str, item: FunctionCallGiven) -> None:
        if labs_dialogue.arguments(item.arguments) is None:
            text = f"{where}.arguments is not a JSON object"
            raise Refusal(text, "invalid_value", f"{where}.arguments")
        function = labs.FunctionCall(name=item.name, arguments=item.arguments)
        self._calls.append(labs.ToolCall(id=item.call_id, function=function))
        self._called.add(item.call_id)

    def _result(self, where: str, item: FunctionCallOutput) -> None:
        if item.call_id not in self._called:
            text = f"{where}.call_id = {item.call_id!r:.80}: no earlier function_call has it"
            raise Refusal(text, "invalid_value", f"{where}.call_id")
        text = text_of(item.output, f"{where}.output")
        self._close()
        self._messages.append(labs.Message(role="tool", tool_call_id=item.call_id, content=text))


def _kind_of(where: str, data: Raw) -> type[Any]:
    """Return the struct of an item. Without a type it is a message."""
    found = read_as(data, dict[str, Raw], where)
    kind = msgspec.json.decode(found["type"]) if "type" in found else None
    if kind is None and "role" not in found and "id" in found:
        kind = "item_reference"
    if kind == "item_reference":
        raise refuse("an item_reference: this server stores nothing; send the item itself", where)
    if (known := ITEMS.get(kind or "message") if isinstance(kind, str | None) else None) is None:
        text = f"items of the type {kind!r:.80} are not supported, because this server runs no"
        raise refuse(f"{text} hosted tools; leave it out", where)
    return known


def param_of(message: str, param: str | None) -> str | None:
    """Return the field at fault: labs' messages are the input here, unless the client has some."""
    return "input" if param == "messages" and "unknown field" not in message else param


def text_of(content: Content, where: str) -> str:
    """Return the text of all parts. Raises Refusal for an image, a file or audio."""
    if isinstance(content, str):
        return content
    return "".join(_texts(content, where))


def _texts(parts: Sequence[Part], where: str) -> Iterator[str]:
    for place, part in enumerate(parts):
        if isinstance(part, InputImage | InputFile | InputAudio):
            kind = part.__struct_config__.tag
            text = f"{kind} is not supported, because the models of this server read only text"
            raise refuse(f"{text}; describe it in an input_text", f"{where}[{place}]")
        yield part.refusal if isinstance(part, RefusalGiven) else part.text


def _thought(item: ReasoningGiven, where: str) -> str:
    """Return earlier reasoning. Raises Refusal for an encrypted_content of another server."""
    sealed = ""
    try:
        sealed = unseal(item.encrypted_content) if item.encrypted_content else ""
    except ValueError as error:
        where = f"{where}.encrypted_content"
        text = f"{where} is damaged or of another server; leave this item out"
        raise Refusal(text, "invalid_value", where) from error
    shown = "".join(part.text for part in item.content or ())
    return shown or sealed or "\n".join(part.text for part in item.summary)
