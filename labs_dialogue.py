# SPDX-License-Identifier: Apache-2.0
"""Give tools, calls, results and earlier reasoning to a chat template in the form that it reads.

    labs_dialogue.check(messages)  # raises InputError for a result without its call
    plain, options = labs_dialogue.as_read(tokenizer, plain, tools, labs.Chat())

labs.build_inputs calls both. Texts of clients stay text: transformers' sanitize_control_tokens sees
to strings, and names in JSON objects, which it does not read, are checked here. Needs
labs_settings.py, labs_shown.py and labs_template.py.
"""

from __future__ import annotations

import json
import re
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

import labs_shown
import labs_template
from labs_settings import Chat, InputError, Message, Strict

MAX_TOOLS = 128  # as at OpenAI
MAX_TOOL_CHARACTERS = 2**18  # of all tools together, as JSON
# What the caller of a template decides, or transformers: no template option has these names.
RESERVED = {
    *("messages", "tools", "documents", "chat_template", "add_generation_prompt", "conversation"),
    *("continue_final_message", "tokenize", "padding", "truncation", "max_length", "return_dict"),
    *("return_tensors", "return_assistant_tokens_mask", "tokenizer_kwargs", "processor_kwargs"),
    *("sanitize_control_tokens", "raise_exception", "strftime_now", "range", "namespace"),
}
SWITCHES = ("enable_thinking", "thinking")  # what templates call the option that turns it off
FORM = '{"type": "function", "function": {"name": …, "parameters": …}}'
ORDINARY = re.compile(r"[\w .-]*")  # names that hold no control token


class Function(Strict, frozen=True, kw_only=True):
    """A function that a model may call. parameters: the JSON schema of its arguments."""

    name: Annotated[str, Meta(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
    description: str = ""
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict, frozen=True, kw_only=True):
    """A tool in OpenAI's form."""

    function: Function
    type: Literal["function"] = "function"

    @property
    def schema(self) -> dict[str, Any]:
        """Return the schema of the arguments; without one, the function has none."""
        return self.function.parameters or {"type": "object", "properties": {}}


class _Reads(Struct, frozen=True):
    """What a chat template reads and shows."""

    variables: frozenset[str]
    shows: labs_shown.Shows


_FOUND: weakref.WeakKeyDictionary[Any, dict[str, _Reads]] = weakref.WeakKeyDictionary()


# ---------------------------------------------------------------- without a model


def check_tools(tools: Iterable[Mapping[str, object] | Tool]) -> tuple[Tool, ...]:
    """Return tools as structs. Raises InputError when one is malformed, or all are too large."""
    found = list[Tool]()
    for index, tool in enumerate(tools):
        if index == MAX_TOOLS:
            raise InputError(f"tools: there are more than {MAX_TOOLS}")
        try:
            found.append(msgspec.convert(msgspec.to_builtins(tool), Tool))
        except (msgspec.ValidationError, TypeError, UnicodeError, RecursionError) as error:
            raise InputError(f"tools[{index}]: {error}; a tool is {FORM}") from error
    try:
        size = len(msgspec.json.encode(found))
    except (UnicodeEncodeError, RecursionError) as error:
        raise InputError(f"tools: cannot be written as JSON: {error}") from error
    if size > MAX_TOOL_CHARACTERS:
        raise InputError(f"tools: {size} characters of JSON; at most {MAX_TOOL_CHARACTERS}")
    names = [each.function.name for each in found]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise InputError(f"tools: two are named {twice}")
    return tuple(found)


def thinks(options: Mapping[str, Any]) -> bool:
    """Return whether template options leave it to the model to think."""
    off = any(options.get(name) is False for name in SWITCHES)
    return not off and options.get("reasoning_effort") != "none"


def check(messages: Sequence[Message]) -> None:
    """Raise InputError for a call, a result or reasoning that is out of place."""
    known = dict[str, str]()
    for index, message in enumerate(messages):
        where, role = f"messages[{index}]", message.role
        if role != "assistant" and (message.tool_calls or message.reasoning_content):
            raise InputError(f"{where}: tool_calls and reasoning belong to an assistant")
        if (message.tool_call_id is None) == (role == "tool"):
            raise InputError(f"{where}: tool_call_id belongs to the role tool, which requires it")
        if message.tool_calls:
            known = {call.id: call.function.name for call in message.tool_calls}
            for number, call in enumerate(message.tool_calls):
                _arguments(call.function.arguments, f"{where}.tool_calls[{number}]")
        if role == "tool" and message.tool_call_id not in known:
            text = f"{where}.tool_call_id = {message.tool_call_id!r:.80}"
            raise InputError(f"{text}: no call of the last answer with calls has it")


def arguments(text: str) -> dict[str, Any] | None:
    """Return the arguments of a call, {} without any; None if they are not a JSON object."""
    try:
        found = json.loads(text or "{}")
        json.dumps(found, ensure_ascii=False, allow_nan=False).encode()  # Python reads NaN, too
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _arguments(text: str, where: str) -> dict[str, Any]:
    if (found := arguments(text)) is None:
        raise InputError(f"{where}.function.arguments: is not a JSON object")
    return found


# ---------------------------------------------------------------- with a chat template


def as_read(
    tokenizer: Any,
    messages: list[dict[str, Any]],
    tools: Iterable[Mapping[str, object] | Tool],
    chat: Chat,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return messages, and options of apply_chat_template, as the tokenizer's template reads them.

    messages: checked, as plain dicts. Raises InputError for what it does not read.
    """
    checked, more, last = check_tools(tools), chat.template_options, messages[-1]
    if chat.continue_final_message and (last.get("tool_calls") or not last["content"].strip()):
        raise InputError("continue_final_message: the last message has no text to continue")
    if not (checked or more or any(_is_special(each) for each in messages)):
        return labs_template.as_read(tokenizer, messages), {}
    shown = [_shown(tool) for tool in checked]
    template = tokenizer.get_chat_template(tools=shown or None)
    reads = _reads(tokenizer, template)
    if checked and "tools" not in reads.variables:
        raise InputError("tools: the model's chat template renders none")
    if "tool_calls" not in template and any(each.get("tool_calls") for each in messages):
        raise InputError("messages: the model's chat template shows no tool_calls")
    for name in more:
        if name in RESERVED or name not in reads.variables or name.endswith("_token"):
            known = sorted(each for each in reads.variables - RESERVED if each[-6:] != "_token")
            text = f"template_options: the model's chat template does not read {name!r:.80}"
            raise InputError(f"{text}; it reads {', '.join(known) or 'none'}")
    plain = labs_shown.written([_plain(each) for each in messages], reads.shows)
    _check_names(tokenizer, [shown, dict(more), [each.get("tool_calls") for each in plain]])
    plain = labs_template.as_read(tokenizer, plain)
    return plain, {**more, **({"tools": shown} if shown else {})}


def _is_special(message: Mapping[str, Any]) -> bool:
    return message["role"] == "tool" or not message.keys() <= {"role", "content", "name"}


def _shown(tool: Tool) -> dict[str, Any]:
    """Return a tool as templates show it: strictness is the grammar's affair."""
    function = {"name": tool.function.name, "description": tool.function.description}
    return {"type": "function", "function": {**function, "parameters": tool.schema}}


def _plain(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message with arguments as objects."""
    if not (calls := message.get("tool_calls")):
        return {name: value for name, value in message.items() if name != "tool_calls"}
    functions = [{**call["function"], "arguments": _read(call["function"])} for call in calls]
    pairs = zip(calls, functions, strict=True)
    return {**message, "tool_calls": [{**call, "function": each} for call, each in pairs]}


def _read(function: dict[str, Any]) -> dict[str, Any]:
    return _arguments(function["arguments"], function["name"])


def _check_names(tokenizer: Any, value: Any) -> None:
    """Raise InputError for a name in a JSON object that holds a token of the tokenizer."""
    names = [name for name in _names(value) if not ORDINARY.fullmatch(name)]
    tokens = tokenizer.added_tokens_decoder.values() if names else ()
    texts = [text for token in tokens if not ORDINARY.fullmatch(text := str(token).strip())]
    if found := next((name for name in names if any(text in name for text in texts)), None):
        raise InputError(f"the name {found!r:.80} holds a control token of the model")


def _names(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        yield from (str(name) for name in value)
    if isinstance(value, dict | list | tuple):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _names(each)


def variables_of(tokenizer: Any, template: str) -> frozenset[str]:
    """Return the names of the variables that a chat template reads."""
    return _reads(tokenizer, template).variables


def _reads(tokenizer: Any, template: str) -> _Reads:
    found = _FOUND.setdefault(tokenizer, {})
    if template not in found:
        found[template] = _Reads(_variables(template), labs_shown.of(tokenizer, template))
    return found[template]


def _variables(template: str) -> frozenset[str]:
    import jinja2
    import jinja2.meta

    plain = re.sub(r"\{%-?\s*(?:end)?generation\s*-?%\}", "", template)  # transformers' own tag
    tree = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(plain)
    return frozenset(jinja2.meta.find_undeclared_variables(tree))
