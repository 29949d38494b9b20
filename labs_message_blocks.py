# SPDX-License-Identifier: Apache-2.0
"""Read the blocks and tools of Anthropic's requests, and check the signatures of thinking.

    turns = labs_message_blocks.turns_of(body)        # of labs_messages.CountRequest
    tools = labs_message_blocks.tools_of(body, turns)
    messages = [*labs_message_blocks.messages_of(turns)]

The blocks of consecutive messages of an assistant become one labs.Message; results become messages
of the role tool. Needs labs.py, labs_dialogue.py, labs_protocol.py and labs_request.py.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct

import labs
import labs_dialogue
import labs_protocol
from labs_request import Refusal

S = TypeVar("S", bound=Struct)
CacheControl = dict[str, Any] | None
BILLING = "x-anthropic-billing-header:"  # how a system block begins that is not for the model
FAILED = "error: "  # before the text of a result with is_error
LOADED = "The tool {} can be called now."
LABEL = b"labs thinking 1\0"  # before the text whose checksum a signature is
VERSION = "labs1"


# ---------------------------------------------------------------- blocks and tools


class BlockParam(labs.Strict, frozen=True, kw_only=True, tag_field="type"):
    """A block of a message, a result or `system`. cache_control never changes the text."""

    cache_control: CacheControl = None


class TextBlockParam(BlockParam, frozen=True, tag="text"):
    """A text. citations never changes it."""

    text: str
    citations: Any = None


class ThinkingBlockParam(BlockParam, frozen=True, tag="thinking"):
    thinking: str
    signature: str


class ToolUseBlockParam(BlockParam, frozen=True, tag="tool_use"):
    id: str
    name: str
    input: dict[str, Any]
    caller: dict[str, Any] | None = None
    toolset_name: str | None = None


class ToolResultBlockParam(BlockParam, frozen=True, tag="tool_result"):
    tool_use_id: str
    content: str | tuple[dict[str, Any], ...] | None = None
    is_error: bool | None = None
    toolset_name: str | None = None


class ToolReferenceBlockParam(BlockParam, frozen=True, tag="tool_reference"):
    """In a result: the tool may be called from now on, though its loading was deferred."""

    tool_name: str


class ToolName(BlockParam, frozen=True, tag="tool_reference"):
    name: str


class ToolAdditionBlockParam(BlockParam, frozen=True, tag="tool_addition"):
    tool: ToolName


class ToolRemovalBlockParam(BlockParam, frozen=True, tag="tool_removal"):
    tool: ToolName


class ToolParam(labs.Strict, frozen=True, kw_only=True):
    """A tool. eager_input_streaming never changes the text."""

    name: Annotated[str, Meta(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
    input_schema: dict[str, Any]
    description: str | None = None
    strict: bool | None = None
    type: Literal["custom"] | None = None
    defer_loading: bool | None = None
    cache_control: CacheControl = None
    eager_input_streaming: bool | None = None
    input_examples: tuple[Any, ...] | None = None
    allowed_callers: tuple[str, ...] | None = None


# The blocks that may stand in the messages of each role, in a result, and in `system`.
BLOCKS: dict[str, dict[str, type[Any]]] = {
    "user": {"text": TextBlockParam, "tool_result": ToolResultBlockParam},
    "assistant": {
        "text": TextBlockParam,
        "thinking": ThinkingBlockParam,
        "tool_use": ToolUseBlockParam,
    },
    "system": {
        "text": TextBlockParam,
        "tool_addition": ToolAdditionBlockParam,
        "tool_removal": ToolRemovalBlockParam,
    },
    "result": {"text": TextBlockParam, "tool_reference": ToolReferenceBlockParam},
}
WHY = {  # what to say of blocks that are known but cannot be read
    # words that clients know, and go on without the picture or document
    "image": "Could not process image, as the model reads only text",
    "document": "the model does not support PDFs and other documents, only text",
    "search_result": "the model reads only text; give the result as text",
    "redacted_thinking": "labs did not write it and cannot read it; leave it out",
}
NEUTRAL_INSIDE: dict[str, tuple[Any, ...]] = {  # fields of blocks, tools and thinking
    "caller": ({"type": "direct"},),
    "toolset_name": (),
    "input_examples": ((),),
    "allowed_callers": ((), ("direct",)),
    "block_binding": ({},),
    "task_budget": (),
}


# ---------------------------------------------------------------- signatures of thinking


class Signature:
    """The checksum of thinking that grows, by which it is known when it comes back."""

    def __init__(self, thinking: str = "") -> None:
        self._pieces, self._digest = list[str](), hashlib.sha256(LABEL)
        self.add(thinking)

    def add(self, thinking: str) -> None:
        self._pieces.append(thinking)
        self._digest.update(thinking.encode())

    def text(self, shown: bool) -> str:
        """Return the signature. shown: false if it has to hold the thinking too."""
        held = b"" if shown else "".join(self._pieces).encode()
        parts = [base64.b64encode(each).decode() for each in (self._digest.digest(), held)]
        return ".".join([VERSION, *filter(None, parts)])


def thinking_of(block: ThinkingBlockParam, where: str) -> str:
    """Return what a block that comes back says. Raises Refusal if it is not as it was sent."""
    thinking = block.thinking
    try:
        thinking = thinking or base64.b64decode(block.signature.split(".")[2]).decode()
    except (ValueError, IndexError):
        thinking = ""
    if block.signature not in map(Signature(thinking).text, (True, False)):
        text = f"{where}: this thinking was not written by labs, or was changed"
        raise Refusal(f"{text}; send the block as it came or leave it out", "invalid_value", where)
    return thinking


# ---------------------------------------------------------------- reading


def read(value: Any, kind: type[S], where: str) -> S:
    """Return a part of the body as a struct. Raises Refusal, which names the place."""
    try:
        found = msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        what, _, place = str(error).partition(" - at `$")
        place = f"{where}{place.removesuffix('`')}"
        raise Refusal(f"{place}: {what}", "invalid_value", place) from error
    check_inside(found, where)
    return found


def check_inside(value: Struct, where: str) -> None:
    """Raise Refusal for a field that is not implemented, unless its value changes nothing."""
    for name in NEUTRAL_INSIDE.keys() & {*value.__struct_fields__}:
        neutral = NEUTRAL_INSIDE[name]
        labs_protocol.check_neutral(f"{where}.{name}", getattr(value, name), neutral)


def _blocks(
    content: str | Sequence[dict[str, Any]] | None, kind: str, where: str
) -> Iterator[tuple[str, Any]]:
    """Yield the blocks of a message, result or `system`, each with its place."""
    if isinstance(content, str):
        yield where, TextBlockParam(text=content)
        return
    for index, block in enumerate(content or ()):
        place, named, known = f"{where}[{index}]", block.get("type"), BLOCKS[kind]
        if not isinstance(named, str) or named not in known:
            why = WHY.get(str(named), f"use {' or '.join(known)}")
            text = f"{place}: a block of the type {named!r:.80} is not supported here: {why}"
            raise Refusal(text, "unsupported", place)
        found = read(block, known[named], place)
        if isinstance(found, ToolResultBlockParam):
            inside = tuple(_blocks(found.content, "result", f"{place}.content"))
            found = msgspec.structs.replace(found, content=inside)
        yield place, found


class Turn(Struct, frozen=True):
    """The blocks of consecutive messages of one role, which are one turn."""

    role: Literal["user", "assistant", "system"]
    blocks: tuple[tuple[str, Any], ...]

    def of(self, *kinds: type[Any]) -> list[tuple[str, Any]]:
        return [each for each in self.blocks if isinstance(each[1], kinds)]

    @property
    def text(self) -> str:
        """The text; an assistant's blocks are pieces of one text, others are paragraphs."""
        between = "" if self.role == "assistant" else "\n\n"
        return between.join(block.text for _, block in self.of(TextBlockParam))


def turns_of(body: Any) -> list[Turn]:
    """Return the turns of a conversation, `system` first."""
    system = [each for each in _blocks(body.system, "system", "system") if _is_shown(each[1])]
    turns = [Turn("system", tuple(system))] if system else []
    users = [index for index, each in enumerate(body.messages) if each.role == "user"]
    shown = [
        (index, each)
        for index, each in enumerate(body.messages)
        if each.clear_at != "next_user_message" or index > max(users, default=-1)
    ]
    for role, group in itertools.groupby(shown, lambda each: each[1].role):
        blocks = list[tuple[str, Any]]()
        for index, message in group:
            where = f"messages[{index}]"
            config = f"{where}.output_config"
            labs_protocol.check_neutral(config, message.output_config, ({},))
            blocks += _blocks(message.content, role, f"{where}.content")
        turns.append(Turn(role, tuple(blocks)))
    return turns


def _is_shown(block: Any) -> bool:
    """Return whether a block of `system` is for the model; an empty text is no instruction."""
    text = block.text if isinstance(block, TextBlockParam) else None
    return text is None or not (text == "" or text.startswith(BILLING))


def tools_of(body: Any, turns: Sequence[Turn]) -> tuple[labs_dialogue.Tool, ...]:
    """Return the tools that may be called. Deferred ones have to be loaded by a block.

    They are the last, so that the beginning of the prompt stays the same.
    """
    found = dict[str, labs_dialogue.Tool]()
    loaded = _loaded(turns)
    for index, tool in enumerate(body.tools or ()):
        where, kind = f"tools[{index}]", tool.get("type")
        if kind not in (None, "custom"):
            why = "give it a name, a description and an input_schema, and the type custom"
            text = f"{where}: a tool of the type {kind!r:.80} is not supported; {why}"
            raise Refusal(text, "unsupported", where)
        given = read(tool, ToolParam, where)
        if given.name in found:
            text = f"{where}: an earlier tool is named {given.name} too"
            raise Refusal(text, "invalid_value", where)
        function = labs_dialogue.Function(
            name=given.name,
            description=given.description or "",
            parameters=given.input_schema,
            strict=given.strict,
        )
        if loaded.get(given.name, not given.defer_loading):
            found[given.name] = labs_dialogue.Tool(function=function)
    loaded_later = {tool["name"] for tool in body.tools or () if tool.get("defer_loading")}
    return tuple(sorted(found.values(), key=lambda each: each.function.name in loaded_later))


def _loaded(turns: Sequence[Turn]) -> dict[str, bool]:
    """Return the names of tools that blocks load (true) or remove (false)."""
    found = dict[str, bool]()
    for _, block in (each for turn in turns for each in turn.blocks):
        if isinstance(block, ToolResultBlockParam):
            inside: Any = block.content
            names = (b.tool_name for _, b in inside if isinstance(b, ToolReferenceBlockParam))
            found |= dict.fromkeys(names, True)
        elif isinstance(block, ToolAdditionBlockParam | ToolRemovalBlockParam):
            found[block.tool.name] = isinstance(block, ToolAdditionBlockParam)
    return found


# ---------------------------------------------------------------- messages


def messages_of(turns: Sequence[Turn]) -> Iterator[labs.Message]:
    """Yield the messages of a conversation. Raises Refusal for a result without its call."""
    calls = list[str]()  # the ids of the last turn that has calls
    for turn in turns:
        if turn.role == "assistant":
            message = _assistant(turn)
            calls = [call.id for call in message.tool_calls or ()] or calls
            yield message
            continue
        results = turn.of(ToolResultBlockParam)
        yield from _results(results, calls)
        if turn.of(TextBlockParam) or not (results or turn.role == "system"):
            yield labs.Message(role=turn.role, content=turn.text)


def _assistant(turn: Turn) -> labs.Message:
    thinking = (thinking_of(block, where) for where, block in turn.of(ThinkingBlockParam))
    calls = (
        labs.ToolCall(id=block.id, function=_function(where, block))
        for where, block in turn.of(ToolUseBlockParam)
    )
    return labs.Message(
        role="assistant",
        content=turn.text,
        reasoning_content="".join(thinking) or None,
        tool_calls=tuple(calls) or None,
    )


def _function(where: str, block: ToolUseBlockParam) -> labs.FunctionCall:
    try:
        arguments = json.dumps(block.input, ensure_ascii=False)
    except RecursionError as error:
        raise Refusal(f"{where}.input is nested too deeply", "invalid_value", where) from error
    return labs.FunctionCall(name=block.name, arguments=arguments)


def _results(blocks: list[tuple[str, Any]], calls: list[str]) -> Iterator[labs.Message]:
    """Yield results in the order of their calls."""
    places = {call: place for place, call in enumerate(calls)}
    for where, block in blocks:
        if block.tool_use_id not in places:
            text = f"{where}.tool_use_id = {block.tool_use_id!r:.80}: no tool_use of the last "
            text += "assistant's message has it"
            raise Refusal(text, "invalid_value", f"{where}.tool_use_id")
    for _, block in sorted(blocks, key=lambda each: places[each[1].tool_use_id]):
        texts = (
            each.text if isinstance(each, TextBlockParam) else LOADED.format(each.tool_name)
            for _, each in block.content
        )
        text = "\n\n".join(texts)
        yield labs.Message(
            role="tool",
            content=FAILED + text if block.is_error else text,
            tool_call_id=block.tool_use_id,
        )
