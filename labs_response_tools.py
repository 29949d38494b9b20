# SPDX-License-Identifier: Apache-2.0
"""Tools in requests of OpenAI's Responses API, and which of them may or must be called.

    tools = labs_response_tools.tools_of(body)  # raises Refusal for one that is not a function
    shown = [*labs_response_tools.shown_to_model(tools, body.tool_choice)]

Needs labs_dialogue.py, labs_request.py and labs_response_input.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Raw

import labs_dialogue
import labs_response_input
from labs_request import Refusal
from labs_response_input import Read


class FunctionTool(Read, frozen=True, kw_only=True):
    """A function. The last four fields take only values that change nothing."""

    type: Literal["function"]
    name: Annotated[str, Meta(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    defer_loading: Any = None
    allowed_callers: Any = None
    output_schema: Any = None
    is_async: Any = msgspec.field(default=None, name="async")


TOOL = ("type", "name", "description", "parameters", "strict")  # what a response repeats
NEUTRAL_OF_TOOL: dict[str, tuple[Any, ...]] = {
    "defer_loading": (False,),
    "allowed_callers": (["direct"],),
    "output_schema": (),
    "is_async": (False,),
}
IN_CODEX = "in Codex's config.toml, set"
HOSTED = {  # tools that are not functions, and how clients leave them out
    "web_search": f'{IN_CODEX} web_search = "disabled"',
    "namespace": f"{IN_CODEX} enabled = false below [agents]",
    "image_generation": f"{IN_CODEX} image_generation = false below [features]",
    "custom": "describe it as a function",
    "mcp": "let the client run the MCP server, and describe its tools as functions",
    "local_shell": "describe the shell as a function",
}


class NamedChoice(Read, frozen=True, kw_only=True):
    """The function that has to be called, or one of those that may be."""

    type: Literal["function"]
    name: str


class AllowedTools(Read, frozen=True, kw_only=True, tag_field="type", tag="allowed_tools"):
    """The functions that may be called. The others are not shown to the model."""

    mode: Literal["auto", "required"]
    tools: tuple[NamedChoice, ...]


class FunctionChoice(Read, frozen=True, kw_only=True, tag_field="type", tag="function"):
    name: str


Choice = Literal["none", "auto", "required"] | FunctionChoice | AllowedTools


def tools_of(body: Any) -> tuple[FunctionTool, ...]:
    """Return the tools. Raises Refusal for one that is not a function."""
    return tuple(_tool(f"tools[{place}]", data) for place, data in enumerate(body.tools or ()))


def _tool(where: str, data: Raw) -> FunctionTool:
    found = labs_response_input.read_as(data, dict[str, Raw], where)
    kind = msgspec.json.decode(found.get("type", b"null"))
    if isinstance(kind, str) and kind != "function":
        known = next((each for each in HOSTED if kind.startswith(each)), "")
        text = f"tools of the type {kind!r:.80} are not supported, only functions"
        text += f"; {HOSTED[known]}" if known else "; leave it out"
        raise labs_response_input.refuse(text, where)
    tool = labs_response_input.read_as(data, FunctionTool, where)
    labs_response_input.check_neutral(tool, NEUTRAL_OF_TOOL, where)
    return tool


def shown_to_model(tools: Sequence[FunctionTool], choice: Any) -> Iterator[labs_dialogue.Tool]:
    """Yield the tools that a model may see: with allowed_tools, only these."""
    allowed = {tool.name for tool in tools}
    if isinstance(choice, AllowedTools):
        wanted = {tool.name for tool in choice.tools}
        if unknown := sorted(wanted - allowed):
            raise Refusal(
                f"tool_choice: no tool is named {unknown[0]:.80}", "invalid_value", "tool_choice"
            )
        allowed = wanted
    for tool in (tool for tool in tools if tool.name in allowed):
        function = labs_dialogue.Function(
            name=tool.name,
            description=tool.description or "",
            parameters=tool.parameters,
            strict=tool.strict,
        )
        yield labs_dialogue.Tool(function=function)


def choice_of(choice: Any) -> str:
    if isinstance(choice, AllowedTools):
        return choice.mode if choice.tools else "none"
    if not isinstance(choice, FunctionChoice):
        return str(choice)
    if choice.name in ("none", "auto", "required"):
        text = f"tool_choice: no tool that is named {choice.name} can be chosen"
        raise Refusal(text, "unsupported", "tool_choice")
    return choice.name
