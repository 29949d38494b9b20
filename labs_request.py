# SPDX-License-Identifier: Apache-2.0
"""Check requests and prepare them for the model, alike for the shell, files and HTTP.

    context = labs_request.open_context(config)  # the filters and the documents' encoder
    request = labs_request.check(context, request)  # raises LabsError, without a model
    prepared = labs_request.prepare(context, config, model, request)
    for ready in prepared.answers():  # one row of the batch each
        take = ready.shown(context.filters)
        options = {"processors": ready.processors()}
        for event in labs.stream_generate(model, ready.inputs, ready.generation, **options):
            for part in take(event): ...

`check` needs no model, so a request that it refuses loads none. `prepare` needs the tokenizer: it
renders the chat template, adds passages of documents, counts tokens and compiles the grammar.
Needs labs.py, labs_dialogue.py, labs_ready.py, and the files of the features of a request.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

from msgspec import Struct
from msgspec.structs import asdict, replace

import labs
import labs_dialogue
import labs_ready

if TYPE_CHECKING:
    import labs_guard
    import labs_rag

Tell = Callable[[str, str], Any]
ONLY_CHATS = "only a chat has it, by the model's chat template"


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


class GenerateRequest(labs.Generation, frozen=True, kw_only=True):
    """A prompt or messages, and generation settings. Unset fields take the configured values."""

    model: str | None = None
    prompt: str | None = None
    response_format: ResponseFormat | None = None
    documents: bool | None = None
    messages: tuple[labs.Message, ...] | None = None
    use_chat_template: bool | None = None
    add_generation_prompt: bool | None = None
    template_options: dict[str, Any] | None = None
    tools: tuple[labs_dialogue.Tool, ...] | None = None
    tool_choice: str | None = None
    parallel_tool_calls: bool | None = None


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
    tool_choice: none, auto, required or the name of a tool. words: how errors begin that name a
    field otherwise than the client does, and its own words.
    """

    prompts: tuple[Prompt, ...]
    options: dict[str, Any] = {}
    n: int = 1
    model: str | None = None
    response_format: ResponseFormat | None = None
    documents: bool | None = None
    within_context: bool = False
    choices: tuple[str, ...] | None = None
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
    rest = {name: getattr(body, name) for name in ("model", "response_format", "documents")}
    named = {name: getattr(body, name) for name in ("tool_choice", "parallel_tool_calls")}
    rest |= {name: value for name, value in named.items() if value is not None}
    return Request(prompts=(prompt_of(body),), options=options, **rest)


def prompt_of(body: Any) -> Prompt:
    """Return the prompt, messages and Chat fields of a struct as a Prompt."""
    names = ("prompt", "messages", *labs.Chat.__struct_fields__)
    tools = getattr(body, "tools", None) or ()
    return Prompt(tools=tools, **{name: getattr(body, name) for name in names})


class Context(Struct, frozen=True, eq=False):
    """The settings, filters and encoder that all requests share.

    configs: settings of the models that a request may name. filters: None if [guard] sets none.
    encoder: the embedding model of documents; None if they are searched by words only.
    """

    config: labs.Config
    configs: dict[str, labs.Config]
    filters: labs_guard.Filters | None = None
    encoder: labs_rag.Encoder | None = None


def open_context(config: labs.Config, *, tell: Tell | None = None) -> Context:
    """Compile the filters and find the encoder. Raises LabsError when a setting cannot work.

    tell: called with (name of the filter, "input" or "output") each time a filter acts.
    """
    filters = encoder = None
    if config.guard != labs.Guard():
        labs.require("labs_guard", "labs_screen")
        import labs_guard

        filters = labs_guard.load(config.guard, config.model)
        filters = filters if tell is None else replace(filters, tell=tell)
    if config.documents.database is not None:
        labs.require("labs_rag")
        import labs_rag

        encoder = labs_rag.encoder_of(config)
    return Context(config, config.by_name(), filters, encoder)


# ---------------------------------------------------------------- without a model


def check_documents(context: Context) -> None:
    """Check that passages can be found. Raises LabsError without a database or an encoder."""
    if context.config.documents.database is not None:
        import labs_rag

        labs_rag.check(context.config, context.encoder)


def check(context: Context, request: Request) -> Request:
    """Return the request with masked prompts. Raises LabsError for faults that need no model."""
    prompts = tuple(_check_prompt(context, prompt) for prompt in request.prompts)
    config = context.config
    if request.model is not None and not (request.model == "auto" and config.router.rules):
        if request.model not in context.configs:
            text = f"unknown model {request.model!r}; known models: {', '.join(context.configs)}"
            raise Refusal(text, "model_not_found", "model", 404)
        config = context.configs[request.model]
    generation = labs.evolve(config.generation, **request.options)
    config.documents.apply(request.documents)
    if context.filters is not None:
        context.filters.filters(generation)  # raises for log-probabilities
    return replace(request, prompts=prompts)


def _check_prompt(context: Context, prompt: Prompt) -> Prompt:
    if prompt.ids is not None:
        return prompt
    messages = labs.check_prompt(prompt.prompt, prompt.messages)
    tools = labs_dialogue.check_tools(prompt.tools)
    prompt = replace(prompt, messages=messages and tuple(messages), tools=tools)
    if context.filters is None:
        return prompt
    import labs_screen

    checked: Prompt = labs_screen.check_prompt(context.filters, prompt)
    return checked


# ---------------------------------------------------------------- with the model


class Prepared(Struct, frozen=True, eq=False):
    """A request that is ready to run. sources: of its passages; None if documents are not used."""

    model: labs.Model
    request: Request
    generation: labs.Generation
    inputs: tuple[labs.Inputs, ...]
    plans: tuple[Any, ...]  # of labs_tools or None, one for each of the inputs
    sources: tuple[labs.Source, ...] | None = None
    choice: Any = None  # labs_choose.Options, if the request has choices

    def answers(self) -> Iterator[labs_ready.Ready]:
        """Yield each answer, `n` of them for each prompt."""
        for place, choice in itertools.product(range(len(self.inputs)), range(self.request.n)):
            yield self.ready(place, choice)

    def ready(self, place: int, choice: int) -> labs_ready.Ready:
        """Return an answer of one prompt with its own seed and, with within_context, length."""
        inputs, plan = self.inputs[place], self.plans[place]
        generation = labs_ready.seeded_choice(self.generation, choice)
        limit = self.model.context_length
        left = 2**20 if limit is None else limit - len(inputs.input_ids)
        changes: dict[str, Any] = dict.fromkeys(("reasoning", "thinking_budget"))
        if plan is not None:
            changes["skip_special_tokens"] = plan.generation.skip_special_tokens
        if self.request.within_context and left < generation.max_new_tokens:
            changes["max_new_tokens"] = max(1, left)
        generation, schema = replace(generation, **changes), schema_of(self.request.response_format)
        return labs_ready.Ready(self.model, inputs, generation, schema, plan)


def prepare(context: Context, config: labs.Config, model: labs.Model, request: Request) -> Prepared:
    """Build the inputs of a checked request. config: settings of the model that answers.

    Raises InputError when the template, the context, a filter or the grammar refuses the request.
    """
    try:
        return _made(context, config, model, request)
    except labs.InputError as error:
        text = str(error)
        if (ours := next((each for each in request.words if text.startswith(each)), None)) is None:
            raise
        word = request.words[ours]
        raise Refusal(word + text.removeprefix(ours), "invalid_value", word.split()[0]) from error


def _made(context: Context, config: labs.Config, model: labs.Model, request: Request) -> Prepared:
    generation = labs.evolve(config.generation, **request.options)
    grounds = config.documents.apply(request.documents)
    built = [_build(context, config, model, each, grounds) for each in request.prompts]
    inputs, passages = zip(*built, strict=True)
    sources = tuple(itertools.chain(*passages)) if grounds else None
    if request.choices is not None:
        labs.require("labs_typed")
        import labs_typed

        choice = labs_typed.read_options(model, inputs[0], request.choices)
        generation = choice.generation(generation.timeout_s)
        return Prepared(model, request, generation, inputs, (None,), sources, choice)
    found = Prepared(model, request, generation, inputs, (), sources)
    prompts = enumerate(filled(each, config) for each in request.prompts)
    return replace(found, plans=tuple(_plan(found, *each) for each in prompts))


def _plan(prepared: Prepared, place: int, prompt: Prompt) -> Any:
    """Return the plan of the answers to one prompt, None if their text is left as it is."""
    model, request, inputs = prepared.model, prepared.request, prepared.inputs[place]
    asks: dict[str, Any] = {"tools": prompt.tools or None}
    asks |= {name: request.options.get(name) for name in ("reasoning", "thinking_budget")}
    asks["tool_choice"] = None if request.tool_choice in ("auto", "none") else request.tool_choice
    given = {"reasoning_effort": prompt.effort, **(prompt.template_options or {})}
    wanted = labs_ready.Wanted(
        tools=prompt.tools,
        tool_choice=request.tool_choice,
        parallel_tool_calls=request.parallel_tool_calls,
        schema=schema_of(request.response_format),
        thinks=labs_dialogue.thinks(given),
        named=tuple(name for name, value in asks.items() if value is not None),
    )
    if _is_chat(model, prompt):
        return labs_ready.plan(model, inputs, prepared.generation, wanted)
    for name in wanted.named:
        raise labs.InputError(f"{name}: {ONLY_CHATS}")
    return labs_ready.raw(model, wanted)


def _is_chat(model: labs.Model, prompt: Prompt) -> bool:
    """Return whether a prompt with the fields of Chat filled in goes through a chat template."""
    template = getattr(model.tokenizer, "chat_template", None)
    return bool(prompt.ids is None and prompt.use_chat_template and template)


def build(config: labs.Chat, model: labs.Model, prompt: Prompt) -> labs.Inputs:
    """Build the inputs of one prompt. Fields of Chat that it leaves unset come from `config`."""
    if prompt.ids is not None:
        return labs.inputs_from_ids(model, prompt.ids)
    named = next((name for name in ("tools", "template_options") if getattr(prompt, name)), None)
    prompt = filled(prompt, config)
    if named and not _is_chat(model, prompt):
        raise labs.InputError(f"{named}: {ONLY_CHATS}")
    given = {name: value for name, value in asdict(prompt).items() if value is not None}
    usual = given.pop("usual_effort")
    if (effort := given.pop("effort", None)) is not None:
        labs.require("labs_forms")
        import labs_forms

        calls = bool(prompt.tools)
        meant = labs_forms.effort_options(model, effort, calls=calls, usual=usual)
        given["template_options"] = {**(prompt.template_options or {}), **meant}
    return labs.build_inputs(model, **given)


def filled(prompt: Prompt, chat: labs.Chat) -> Prompt:
    """Return the prompt with the fields of Chat that it leaves unset taken from `chat`."""
    names = [name for name in labs.Chat.__struct_fields__ if getattr(prompt, name) is None]
    return replace(prompt, **{name: getattr(chat, name) for name in names})


def _build(
    context: Context, config: labs.Config, model: labs.Model, prompt: Prompt, grounds: bool
) -> tuple[labs.Inputs, tuple[labs.Source, ...]]:
    sources: tuple[labs.Source, ...] = ()
    if grounds and prompt.ids is None:
        labs.require("labs_rag")
        import labs_rag

        prompt = filled(prompt, config)
        messages, sources = labs_rag.with_passages(config.documents, context.encoder, model, prompt)
        prompt = replace(prompt, prompt=None, messages=messages) if sources else prompt
    try:
        inputs = build(config, model, prompt)
        if (limit := model.context_length) is not None and len(inputs.input_ids) >= limit:
            raise labs.too_long(limit, len(inputs.input_ids))
    except labs.PromptTooLong as error:
        error.param = "prompt" if prompt.messages is None else "messages"
        raise
    if context.filters is not None:
        context.filters.check_inputs(inputs, ids=prompt.ids is not None)
    return inputs, sources


def schema_of(wanted: ResponseFormat | None) -> dict[str, Any] | None:
    """Return the schema of a response_format, or None if it is text."""
    if wanted is None or wanted.type == "text":
        return None
    return {"type": "object"} if wanted.json_schema is None else wanted.json_schema.schema
