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
Needs labs.py, labs_asked.py, labs_dialogue.py, labs_ready.py, and the files of what is asked.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec import Struct
from msgspec.structs import asdict, replace

import labs
import labs_dialogue
import labs_names
import labs_ready
from labs_asked import GenerateRequest as GenerateRequest
from labs_asked import JsonSchema as JsonSchema
from labs_asked import Prompt as Prompt
from labs_asked import Refusal as Refusal
from labs_asked import Request as Request
from labs_asked import ResponseFormat as ResponseFormat
from labs_asked import Source as Source
from labs_asked import StructuredOutputs as StructuredOutputs
from labs_asked import prompt_of as prompt_of
from labs_asked import request_of as request_of
from labs_asked import schema_of as schema_of

if TYPE_CHECKING:
    import labs_guard
    import labs_rag

Tell = Callable[[str, str], Any]
ONLY_CHATS = "only a chat has it, by the model's chat template"


class Context(Struct, frozen=True, eq=False):
    """The settings, filters and encoder that all requests share.

    configs: settings of the models that a request may name. filters: None if [guard] sets none.
    encoder: the embedding model of documents; None if they are searched by words only.
    """

    config: labs.Config
    configs: dict[str, labs.Config]
    filters: labs_guard.Filters | None = None
    encoder: labs_rag.Encoder | None = None


def with_weights(config: labs.Config, /, **quantization: Any) -> labs.Config:
    """Return a configuration with fields of `quantization`, unless it has some on weights itself.

    Raises ConfigError for a field or value that there is not.
    """
    spec, said = config.model, config.model.quantization
    if spec.torch_dtype != "auto" or said != labs.Quantization(kv_dtype=said.kv_dtype):
        return config
    spec = replace(spec, quantization=labs.evolve(said, **quantization))
    return replace(config, model=spec)


def open_context(config: labs.Config, *, tell: Tell | None = None) -> Context:
    """Compile the filters and find the encoder. Raises LabsError when a setting cannot work.

    tell: called with (name of the filter, "input" or "output") each time a filter acts.
    """
    config, filters, encoder = labs_names.named(config), None, None
    if config.guard != labs.Guard():
        labs.require("labs_guard", "labs_screen")
        import labs_guard

        filters = labs_guard.load(config.guard, config.model)
        filters = filters if tell is None else replace(filters, tell=tell)
    for rule in config.router.rules:
        named = config.by_name().get(rule.model, config)  # load_config refuses unknown names
        if (kind := named.model.kind) != "text":
            raise labs.ConfigError(f"router.rules: {rule.model} is of the kind {kind}, not text")
    if config.documents != labs.Documents():
        labs.require("labs_rag")
        import labs_rag

        encoder = labs_rag.encoder_of(config)
    return Context(config, config.by_name(), filters, encoder)


# ---------------------------------------------------------------- without a model


ELSEWHERE = {"embedding": "POST /v1/embeddings", "rerank": "POST /v1/rerank"}


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
        if (name := labs_names.find(request.model, context.configs)) is None:
            text = labs_names.unknown(request.model, context.configs)
            text += f" known models: {', '.join(context.configs)}"
            raise Refusal(text, "model_not_found", "model", 404)
        config, request = context.configs[name], replace(request, model=name)
    if (kind := config.model.kind) != "text":
        text = f"model: {config.model_id} is of the kind {kind}, which generates no text"
        raise Refusal(f"{text}; {ELSEWHERE[kind]} answers for it", "invalid_value", "model")
    with in_words_of(request):
        generation = labs.evolve(config.generation, **request.options)
    config.documents.apply(request.documents)
    held(request)
    if context.filters is not None and context.filters.filters(generation) and request.echo:
        raise labs.InputError("echo: not available while [guard] filters answers")
    return replace(request, prompts=prompts)


def held(request: Request) -> Any:
    """Return what the text of an answer has to follow: a JSON schema, a grammar, or None.

    Raises InputError for a pattern, choice or grammar that labs_structured refuses.
    """
    wanted, schema = request.structured_outputs, schema_of(request.response_format)
    if wanted is None:
        return schema
    if schema is not None:
        raise labs.InputError("structured_outputs: response_format is given too; give one of them")
    if wanted.json is not None:
        return _schema(wanted.json)
    labs.require("labs_structured")
    import labs_structured

    if wanted.regex is not None:
        return labs_structured.regex(wanted.regex)
    if wanted.choice is not None:
        return labs_structured.choice(wanted.choice)
    if wanted.grammar is not None:
        return labs_structured.grammar(wanted.grammar)
    return {"type": "object"}


def _schema(schema: dict[str, Any] | str) -> dict[str, Any]:
    """Return a schema that may be given as text."""
    if isinstance(schema, dict):
        return schema
    try:
        return msgspec.json.decode(schema, type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise labs.InputError(f"structured_outputs: json is not a JSON schema: {error}") from error


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
    sources: tuple[Source, ...] | None = None
    choice: Any = None  # labs_choose.Options, if the request has choices
    echoes: tuple[Any, ...] = ()  # of labs_score, one for each of the inputs if it asks for them
    schema: Any = None  # what `held` returns

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
            if left < (least := generation.min_new_tokens or 0):
                text = f"min_new_tokens = {least}: the prompt leaves {left} tokens of the context"
                with in_words_of(self.request):
                    raise labs.InputError(text)
            changes["max_new_tokens"] = max(1, left)
        generation = replace(generation, **changes)
        echo = self.echoes[place] if self.echoes else None
        return labs_ready.Ready(self.model, inputs, generation, self.schema, plan, echo)


def prepare(context: Context, config: labs.Config, model: labs.Model, request: Request) -> Prepared:
    """Build the inputs of a checked request. config: settings of the model that answers.

    Raises InputError when the template, the context, a filter or the grammar refuses the request.
    """
    with in_words_of(request):
        return _made(context, config, model, request)


@contextlib.contextmanager
def in_words_of(request: Request) -> Iterator[None]:
    """Let errors name fields as the request does."""
    try:
        yield
    except (labs.InputError, labs.ConfigError) as error:
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
    found = Prepared(model, request, generation, inputs, (), sources, schema=held(request))
    found = replace(found, echoes=_echoes(found)) if request.echo else found
    prompts = [filled(each, config) for each in request.prompts]
    if found.schema is not None and any(each.continue_final_message for each in prompts):
        text = (
            "continue_final_message: a schema or grammar holds whole answers, not the rest of one"
        )
        raise labs.InputError(text)
    found = replace(found, plans=tuple(_plan(found, *each) for each in enumerate(prompts)))
    if generation.ignore_eos and any(found.ready(i, 0).held for i in range(len(inputs))):
        raise labs.InputError("ignore_eos: a schema, grammar or tools decide where the answer ends")
    return found


def _echoes(prepared: Prepared) -> tuple[Any, ...]:
    """Return what begins the answers to each prompt. Raises InputError for an unknown token."""
    labs.require("labs_score")
    import labs_score

    model, request, generation = prepared.model, prepared.request, prepared.generation
    shown = {"skip_special_tokens": generation.skip_special_tokens}
    found = []
    for prompt, inputs in zip(request.prompts, prepared.inputs, strict=True):
        text, scores = prompt.prompt, None
        if text is None:
            with model.lock:
                text = str(model.tokenizer.decode([*inputs.input_ids], **shown))
        if generation.logprobs is not None:
            scores = labs_score.Scores(model, inputs, generation.logprobs)
        found.append(labs_score.Echo(text, scores, only=request.only_echo))
    return tuple(found)


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
        schema=prepared.schema,
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
) -> tuple[labs.Inputs, tuple[Source, ...]]:
    sources: tuple[Source, ...] = ()
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
