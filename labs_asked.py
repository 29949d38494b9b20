# SPDX-License-Identifier: Apache-2.0
"""Requests in labs' own format, whether they came from the shell, a file or over HTTP.

    request = labs_asked.request_of(body, given)  # a Request, of a GenerateRequest as JSON has it

These are values: labs_request.py, which re-exports them, checks requests and prepares them for a
model. Needs labs.py and labs_dialogue.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

import labs
import labs_dialogue


def doc(text: str) -> Meta:
    return Meta(description=text)


class Source(Struct, frozen=True):
    """A passage that an answer may cite as [n]. path: relative to the database's folder."""

    n: int
    path: str
    heading: str


class JsonSchema(labs.Strict, frozen=True, kw_only=True):
    """A JSON schema in OpenAI's wrapper. Only `schema` has an effect; it is always enforced."""

    schema: dict[str, Any]
    name: str | None = None
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(labs.Strict, frozen=True, kw_only=True):
    """The format of an answer: any text, a JSON object, or JSON that matches a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    def __post_init__(self) -> None:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema belongs to the type json_schema and is required with it")


class StructuredOutputs(labs.Strict, frozen=True, kw_only=True):
    """What an answer has to follow, in vLLM's words: exactly one of these.

    json: a schema, or its text. regex and grammar: as labs_structured reads them.
    """

    json: dict[str, Any] | str | None = None
    json_object: bool | None = None
    regex: str | None = None
    choice: tuple[str, ...] | None = None
    grammar: str | None = None

    def __post_init__(self) -> None:
        names = self.__struct_fields__
        if sum(getattr(self, name) not in (None, False) for name in names) != 1:
            raise ValueError(f"give exactly one of {', '.join(names)}")


class GenerateRequest(labs.Generation, frozen=True, kw_only=True):
    """A prompt or messages, and generation settings. Unset fields take the configured values."""

    model: str | None = None
    prompt: str | None = None
    response_format: Annotated[ResponseFormat | None, doc("Answer in this format.")] = None
    structured_outputs: Annotated[StructuredOutputs | None, doc("Answer by one of these.")] = None
    documents: Annotated[bool | None, doc("Answer from the server's documents.")] = None
    messages: tuple[labs.Message, ...] | None = None
    use_chat_template: bool | None = None
    add_generation_prompt: bool | None = None
    template_options: Annotated[dict[str, Any] | None, doc("Give this to the template.")] = None
    continue_final_message: bool | None = None
    tools: Annotated[tuple[labs_dialogue.Tool, ...] | None, doc("Let these be called.")] = None
    tool_choice: str | None = None
    parallel_tool_calls: Annotated[bool | None, doc("Allow several calls in an answer.")] = None


class Prompt(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One prompt: exactly one of prompt, messages and ids (token ids).

    The fields of labs.Chat take the configured values where they are None. effort: OpenAI's
    reasoning_effort, which becomes template_options; a template need not read the usual one.
    """

    prompt: str | None = None
    messages: tuple[labs.Message, ...] | None = None
    ids: tuple[int, ...] | None = None
    use_chat_template: bool | None = None
    add_generation_prompt: bool | None = None
    template_options: dict[str, Any] | None = None
    continue_final_message: bool | None = None
    tools: tuple[labs_dialogue.Tool, ...] = ()
    effort: str | None = None
    usual_effort: str = "medium"  # at OpenAI; at Anthropic it is high

    @property
    def text(self) -> str:
        """Return the prompt, or the contents of the messages joined by line ends."""
        contents = [message.content or "" for message in self.messages or ()]
        return "\n".join([*([self.prompt] if self.prompt else []), *contents])

    @property
    def size(self) -> int:
        """Return the number of bytes of the text, and about those of calls, reasoning and tools."""
        turns = self.messages or ()
        rest: list[Any] = [self.tools, self.template_options]
        rest += [each for m in turns for each in (m.tool_calls, m.reasoning_content)]
        return sum(
            len(each.encode(errors="replace"))
            for each in (self.text, *map(str, filter(None, rest)))
        )


class Request(Struct, frozen=True, kw_only=True):
    """A request in labs' own format, whether it came from the shell, a file or over HTTP.

    options: the generation settings that it names. n: answers per prompt. documents: whether to add
    passages. None in model and documents: as configured. choices: answers to rate, see Options.
    within_context: lower max_new_tokens to the tokens that the prompt leaves in the context.
    echo: begin each answer with its prompt, and with the log-probabilities of its tokens if these
    are asked for. only_echo: no answer follows; max_new_tokens is then 1.
    tool_choice: none, auto, required or the name of a tool. words: how errors begin that name a
    field otherwise than the client does, and its own words.
    """

    prompts: tuple[Prompt, ...]
    options: dict[str, Any] = {}
    n: int = 1
    model: str | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    documents: bool | None = None
    within_context: bool = False
    choices: tuple[str, ...] | None = None
    echo: bool = False
    only_echo: bool = False
    tool_choice: str = "auto"
    parallel_tool_calls: bool = True
    words: dict[str, str] = {}


class Refusal(labs.InputError):
    """A request that is malformed, too large, unknown or unsupported. status: for HTTP."""

    def __init__(self, text: str, code: str, param: str | None = None, status: int = 400) -> None:
        super().__init__(text)
        self.code, self.param, self.status = code, param, status


def request_of(body: GenerateRequest, given: Mapping[str, Any]) -> Request:
    """Convert labs' own request format. `given`: the fields of the JSON that it was read from."""
    names = labs.Generation.__struct_fields__
    options = {name: getattr(body, name) for name in names if name in given}
    forms = ("response_format", "structured_outputs")
    rest = {name: getattr(body, name) for name in ("model", *forms, "documents")}
    named = {name: getattr(body, name) for name in ("tool_choice", "parallel_tool_calls")}
    rest |= {name: value for name, value in named.items() if value is not None}
    return Request(prompts=(prompt_of(body),), options=options, **rest)


def prompt_of(body: Any) -> Prompt:
    """Return the prompt, messages and Chat fields of a struct as a Prompt."""
    names = ("prompt", "messages", *labs.Chat.__struct_fields__)
    tools = getattr(body, "tools", None) or ()
    return Prompt(tools=tools, **{name: getattr(body, name) for name in names})


def schema_of(wanted: ResponseFormat | None) -> dict[str, Any] | None:
    """Return the schema of a response_format, or None if it is text."""
    if wanted is None or wanted.type == "text":
        return None
    return {"type": "object"} if wanted.json_schema is None else wanted.json_schema.schema
