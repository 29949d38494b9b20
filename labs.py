# SPDX-License-Identifier: Apache-2.0
"""labs: functional text generation for Hugging Face instruct models.

    import labs

    config = labs.load_config()
    model = labs.load_model(config)
    inputs = labs.build_inputs(model, prompt="Hello! Who are you?")
    print(labs.generate(model, inputs, config.generation).text)

The functions take and return frozen structs; only `load_config` and `load_model` read files.

    ids ──labs_decode──▶ logits ──labs_loop──▶ tokens ──labs──▶ text

labs.py, labs_settings.py, labs_loop.py and labs_decode.py are enough, with torch, transformers and
msgspec; docs/vendoring.md lists the optional files. A request that runs is a row of the batch.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import itertools
import logging
import os
import sys
import threading
import time
from collections.abc import Generator, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import msgspec
from msgspec import Struct
from msgspec.structs import asdict, replace

import labs_settings
from labs_settings import *

if TYPE_CHECKING:
    import labs_decode
    import labs_defaults
    import labs_loop
    from labs_decode import Processor, Tokenizer
__version__ = "0.1.0"
log = logging.getLogger("labs")


# ---------------------------------------------------------------- values


class Inputs(Struct, frozen=True):
    """A prompt as token ids, and as text with its control tokens."""

    input_ids: tuple[int, ...]
    prompt: str


class Fingerprint(Struct, frozen=True, kw_only=True):
    """What determines an answer, except processors and, without batch_invariant, other rows.

    revision: the hub's commit, or the sha256 of the file or folder. quantization: the values that
    are not defaults. generation: the options used. prompt_sha256: a hash of the ids as JSON.
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

    fingerprint: that of its answers, without generation and prompt. prefixes: KV caches of prompt
    prefixes, as in the turns of a chat, that all calls share; None unless set, see `new_prefixes`.
    generation_defaults: options that generation_config.json recommends; defaults: its other fields.
    """

    decoder: labs_decode.Decoder
    tokenizer: Tokenizer
    spec: ModelSpec
    device: str
    dtype: str
    context_length: int | None
    eos_token_ids: frozenset[int]
    generation_defaults: dict[str, object]
    load_s: float
    lock: threading.Lock
    fingerprint: Fingerprint | None = None
    prefixes: labs_decode.PrefixStore | None = None
    defaults: labs_defaults.Defaults | None = None

    @property
    def model(self) -> labs_decode.PretrainedModel:
        """The transformers model itself."""
        return self.decoder.model


class TokenLogprob(Struct, frozen=True):
    """A chosen token. `top`: the likeliest (id, log-probability) pairs at its position."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class Usage(Struct, frozen=True):
    """Counts of tokens. cached_tokens: prompt tokens whose keys and values were reused.

    response_cached: it answered an identical request before. reasoning_tokens: see labs_tools.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    response_cached: bool = False
    reasoning_tokens: int = 0


class Timings(Struct, frozen=True):
    """Seconds: queue_s waiting to start, prefill_s to the first token, decode_s for all others."""

    load_s: float
    prefill_s: float
    decode_s: float
    tokens_per_s: float
    queue_s: float = 0.0


FinishReason = Literal["stop", "length", "timeout", "cancelled", "content_filter", "tool_calls"]


class Delta(Struct, frozen=True, tag="delta", repr_omit_defaults=True):
    """A piece of text. `logprobs` belong to the tokens since the last piece."""

    text: str
    logprobs: tuple[TokenLogprob, ...] = ()


class Done(Struct, frozen=True, tag="done"):
    """The end of an answer. matched_stop: the stop string that ended it. seed: drawn or given."""

    finish_reason: FinishReason
    usage: Usage
    timings: Timings
    matched_stop: str | None = None
    seed: int | None = None
    fingerprint: Fingerprint | None = None


class Failed(Struct, frozen=True, tag="failed"):
    """A request failed; the others in its batch continue."""

    error: LabsError


Event = Delta | Done | Failed
Events = Iterator[tuple[int, Event]]  # (index of the prompt, event) of several answers


class Completion(Struct, frozen=True):
    """A whole answer, joined from its events."""

    text: str
    finish_reason: FinishReason
    usage: Usage
    timings: Timings
    matched_stop: str | None = None
    seed: int | None = None
    fingerprint: Fingerprint | None = None
    logprobs: tuple[TokenLogprob, ...] = ()


# ---------------------------------------------------------------- the functions


def load_config(
    path: str | os.PathLike[str] | None = None,
    *,
    env: Mapping[str, str] | None = None,
    overrides: Mapping[str, object] | None = None,
) -> Config:
    """Read the settings: overrides win over environment, then .env, then labs.toml, then defaults.

    path: a TOML file, by default ./labs.toml if it exists. env: by default os.environ. overrides:
    {key: value}, as {"temperature": 0}. Raises ConfigError when a setting is wrong.
    """
    file = Path(path) if path is not None else Path("labs.toml")
    tables = _read_toml(file, required=path is not None)
    dotenv, environment = _read_dotenv(Path(".env")), os.environ if env is None else env
    upper = {
        **labs_settings.read_variables(dotenv, ".env"),
        **labs_settings.read_variables(environment, "environment"),
        **{key: (value, f"--{key.replace('_', '-')}") for key, value in (overrides or {}).items()},
    }
    secrets = {**dotenv, **{name: text for name, text in environment.items() if text}}
    config = labs_settings.configure(tables, upper, str(file), secrets.get("HF_TOKEN") or None)
    labs_settings.warn_of_trust(config, str(file) if path is None else None)
    labs_settings.check_routes(config)
    keys, keys_file = secrets.get("LABS_API_KEYS", ""), config.server.api_keys_file
    if not keys and keys_file is None:
        return config
    require("labs_keys")
    import labs_keys

    return replace(config, api_keys=labs_keys.digests(keys, keys_file))


def resolve_dtype(name: str, *, device: str, has_bf16: bool) -> Literal["bf16", "fp16", "fp32"]:
    """Return the dtype for `name` ("auto" or a dtype) on a device type such as "cuda".

    Raises ModelError for bf16 on a CUDA device without it, and for an unknown name.
    """
    short = {long: brief for brief, long in TORCH_DTYPES.items()}.get(name, name)
    if short == "bf16" and device == "cuda" and not has_bf16:
        raise ModelError("torch_dtype = bf16: this GPU has no bfloat16; use fp16 or auto")
    if short in ("bf16", "fp16", "fp32"):
        return cast('Literal["bf16", "fp16", "fp32"]', short)
    if short != "auto":
        raise ModelError(f"torch_dtype = {name}: use auto, bf16, fp16 or fp32")
    if has_bf16 and device in ("cpu", "cuda"):
        return "bf16"
    return "fp32" if device == "cpu" else "fp16"


def load_model(config: Config | ModelSpec, *, cached: bool = True) -> Model:
    """Load a model; the two used last stay cached, and threads that ask for one load it once.

    `load_model.cache_clear()` frees them. With cached=False it is not kept: dropping the last
    reference frees it. Raises ModelError when the model cannot be loaded.
    """
    spec = config.model if isinstance(config, Config) else config
    if spec.kind != "text":
        raise ModelError(f"{spec.model_name} is of the kind {spec.kind}: it generates no text")
    load = _load if cached else _load.__wrapped__
    with loading():
        if not _is_there("labs_apart"):
            return load(spec)
        import labs_apart

        return labs_apart.run(load, spec)


def build_inputs(
    model: Model,
    *,
    prompt: str | None = None,
    messages: Iterable[Mapping[str, object] | Message] | None = None,
    tools: Iterable[Mapping[str, object]] = (),
    **options: object,
) -> Inputs:
    """Turn a prompt or messages into token ids. tools: functions as OpenAI describes them.

    options: the fields of Chat. With use_chat_template a prompt becomes one user message, if the
    model has a template. Raises InputError for input that is empty, malformed or refused by it.
    """
    turns, chat, tools = check_prompt(prompt, messages), evolve(Chat(), **options), tuple(tools)
    names = ("template_options", "continue_final_message")
    asked = {"messages": turns, "tools": tools, **{name: getattr(chat, name) for name in names}}
    if chat.use_chat_template and getattr(model.tokenizer, "chat_template", None):
        turns = turns or [Message(role="user", content=prompt or "")]
        ids = _template(model, turns, tools, chat)
    elif wanted := next((name for name, given in asked.items() if given), None):
        why = "has no chat template" if chat.use_chat_template else "needs use_chat_template"
        raise InputError(f"{model.spec.model_name} {why} for {wanted}: give a prompt instead")
    else:
        with _refusing(model, "tokenizer"):
            ids = list(model.tokenizer(prompt)["input_ids"])
    if not ids:
        raise InputError("the prompt has no tokens")
    return Inputs(tuple(ids), model.tokenizer.decode(ids))


@contextlib.contextmanager
def _refusing(model: Model, what: str) -> Iterator[None]:
    """Hold the tokenizer's lock; raise any error of it or its template as InputError."""
    try:
        with model.lock:
            yield
    except BaseException as error:
        panics = type(error).__name__ == "PanicException"  # of Rust, and not an Exception
        if isinstance(error, InputError) or not (panics or isinstance(error, Exception)):
            raise
        why, kind = str(error).strip().partition("\n")[0], type(error)
        if not (why and (kind is ValueError or kind.__module__.startswith("jinja2"))):
            why = f"{kind.__name__}: {why}".removesuffix(": ")
        raise InputError(f"the model's {what} refuses this: {why}") from error


def generate(
    model: Model,
    inputs: Inputs,
    generation: Generation | None = None,
    *,
    processors: Iterable[Processor] = (),
    **changes: object,
) -> Completion:
    """Generate a whole answer; the rest is as for `stream_generate`."""
    *deltas, done = stream_generate(model, inputs, generation, processors=processors, **changes)
    return fold(cast("list[Delta]", deltas), cast("Done", done))


def stream_generate(
    model: Model,
    inputs: Inputs,
    generation: Generation | None = None,
    *,
    processors: Iterable[Processor] = (),
    **changes: object,
) -> Iterator[Delta | Done]:
    """Generate an answer as events: Delta, ..., Done. Closing the iterator stops computing.

    processors: each takes (ids so far, float32 logits [vocabulary]) and returns logits. changes:
    options to replace. Raises PromptTooLong at the call, or GenerationError midway.
    """
    import labs_loop

    options = evolve(generation or Generation(), **changes)
    request = open_request(model, 0, inputs, options, tuple(processors))
    loop = labs_loop.Loop(prefixes=model.prefixes)
    return _events_of_one(run(model, iter([request]), 1, loop))


def stream_batch(
    model: Model,
    inputs: Iterable[Inputs],
    generation: Generation | Iterable[Generation] | None = None,
    *,
    batch_rows: int | None = None,
    **changes: object,
) -> Events:
    """Generate answers to many prompts as (index, event); when one ends, the next prompt starts.

    inputs: read lazily. generation: one for all or one each. batch_rows: prompts at once, by
    default what memory allows, up to 64. Answers end in Done or Failed; a raised error ends all.
    """
    if batch_rows is not None and batch_rows < 1:
        raise InputError(f"batch_rows = {batch_rows}: must be at least 1")
    evolve(generation if isinstance(generation, Generation) else Generation(), **changes)
    requests = _open_all(model, inputs, generation, changes)
    return run(model, requests, batch_rows or rows_in_memory(model))


# ---------------------------------------------------------------- settings from files


def _read_toml(path: Path, *, required: bool) -> dict[str, Any]:
    if not required and not path.exists():
        return {}
    import tomllib

    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text (byte {error.start})") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: is not valid TOML: {error}") from error
    labs_settings.check_sections(tables, str(path))
    return tables


def _read_dotenv(path: Path) -> dict[str, str]:
    if not path.is_file():
        return {}
    if importlib.util.find_spec("dotenv") is None:
        raise ConfigError(f"{path.resolve()} needs python-dotenv: pip install python-dotenv")
    from dotenv import dotenv_values

    try:
        values = dotenv_values(path, encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    foreign = [name for name in values if not name.startswith("LABS_") and name != "HF_TOKEN"]
    if foreign:
        log.warning("%s: labs does not use %s", path, ", ".join(foreign))
    return {name: value for name, value in values.items() if value}


# ---------------------------------------------------------------- loading


TORCH_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
_LOADING = threading.RLock()  # transformers' loading is not thread-safe


def _cache_clear() -> None:
    _load.cache_clear()
    release_memory()


load_model.cache_clear = _cache_clear  # type: ignore[attr-defined]


def release_memory() -> None:
    """Return freed memory to CUDA and, with glibc, to the system."""
    if (decode := sys.modules.get("labs_decode")) is not None:
        decode.release_memory()


@contextlib.contextmanager
def loading() -> Iterator[None]:
    """Let only one thread load with transformers."""
    require("torch", "transformers", "labs_decode", "labs_loop")
    with _LOADING, contextlib.ExitStack() as stack:
        if _is_there("labs_hub"):
            import labs_hub

            stack.enter_context(labs_hub.quiet())
        yield


def reason(error: BaseException) -> str:
    """Return a sentence for the error or its cause, by default its first line."""
    if _is_there("labs_hub"):
        import labs_hub

        return labs_hub.reason(error)
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def require(*names: str) -> None:
    """Raise an error that names the first of these packages or files of labs that is missing."""
    for name in (name for name in names if not _is_there(name)):
        if name.startswith("labs_"):
            copy = f"copy it with labs-gen vendor DEST --rooms {name.removeprefix('labs_')}"
            raise ConfigError(f"{name}.py is not beside labs.py: {copy}")
        wanted = "'ray[data,serve]'" if name == "ray" else name
        raise ModelError(f"the package {name} is missing: pip install {wanted}")


def _is_there(name: str) -> bool:
    package = __name__.removesuffix("labs") if name.startswith("labs_") else ""
    return importlib.util.find_spec(package + name) is not None  # as in package.labs


@functools.lru_cache(maxsize=2)
def _load(spec: ModelSpec) -> Model:
    import labs_decode
    import labs_loop

    began, (device_map, device, dtype) = time.perf_counter(), device_of(spec)  # after imports
    source, options, origin = locate(spec, dtype)
    config = pretrained("AutoConfig", source, options)
    weights = {**options, "config": config, "dtype": TORCH_DTYPES[dtype], "device_map": device_map}
    bits = spec.quantization.load_in_4bit or spec.quantization.load_in_8bit
    if bits or _is_there("labs_checkpoints"):
        require("labs_checkpoints", *(["bitsandbytes", "labs_fast"] if bits else []))
        import labs_checkpoints

        weights |= labs_checkpoints.options(spec, config, dtype)
    tokenizer = tokenizer_of(spec, source, options)
    decoder = _decoder_of(spec, _model_of(spec, source, weights))
    if spec.draft_model is not None:
        require("labs_draft")
        import labs_draft

        decoder = labs_draft.with_draft(decoder, tokenizer, spec, _load.__wrapped__)
    dtype = {f"torch.{v}": k for k, v in TORCH_DTYPES.items()}.get(str(decoder.model.dtype), dtype)
    eos = labs_loop.eos_token_ids_of(decoder.model, tokenizer)
    settings, defaults = _recommended(decoder.model, tokenizer, eos, spec.use_generation_config)
    return Model(
        decoder=decoder,
        tokenizer=tokenizer,
        spec=spec,
        device=device,
        dtype=dtype,
        context_length=labs_decode.context_length_of(config, tokenizer),
        eos_token_ids=eos,
        generation_defaults=settings,
        defaults=defaults,
        load_s=time.perf_counter() - began,
        lock=threading.Lock(),
        fingerprint=_fingerprint_of(decoder, spec, dtype, origin),
    )


def tokenizer_of(spec: ModelSpec, source: str, options: Mapping[str, object]) -> Tokenizer:
    """Return the tokenizer, with the chat template of `spec` if it names one."""
    tokenizer = pretrained("AutoTokenizer", source, options)
    if spec.chat_template is not None:
        require("labs_template")
        import labs_template

        labs_template.use(tokenizer, spec.chat_template)
    return tokenizer


def _model_of(
    spec: ModelSpec, source: str, options: dict[str, object]
) -> labs_decode.PretrainedModel:
    """Return transformers' model with all its weights; those of an adapter are merged into them."""
    options |= {"use_safetensors": spec.use_safetensors or None, "output_loading_info": True}
    model, info = pretrained("AutoModelForCausalLM", source, options)
    if missing := sorted(info["missing_keys"]):  # transformers fills these with random numbers
        raise ModelError(f"{model.name_or_path}: the weights lack {', '.join(missing[:3])}")
    if spec.adapter is None:
        return model
    require("peft", "labs_adapter")
    import labs_adapter

    return labs_adapter.merged(model, spec)


def _decoder_of(spec: ModelSpec, model: labs_decode.PretrainedModel) -> labs_decode.Decoder:
    import labs_decode

    packs = {(q := spec.quantization).quant_method, q.kv_dtype} - {"auto", "none", "gguf"}
    if packs or _is_there("labs_faster"):
        require("labs_faster")
        import labs_faster  # its files know more kinds of caches
    decoder = labs_decode.prepare(model.eval(), batch_invariant=spec.batch_invariant)
    if decoder.mode == "alone":
        require("labs_faster")
    return labs_faster.speed_up(decoder, spec) if _is_there("labs_faster") else decoder


def locate(
    spec: ModelSpec, dtype: str, *, convert: bool = True
) -> tuple[str, dict[str, Any], Path | None]:
    """Return (source for from_pretrained, its options, local path or None for the hub).

    convert: whether to convert a new GGUF file. Raises ModelError when the model is not found.
    """
    name, trust = spec.model_name, {"trust_remote_code": spec.trust_remote_code}
    if name.startswith("package:") or name.endswith(".gguf"):
        require("labs_sources")
    if not _is_there("labs_sources"):
        if (folder := Path(name).expanduser()).is_dir():
            return str(folder), trust, folder
        options = {"revision": spec.revision or "main", "token": spec.token}
        return name, {**trust, **options, "local_files_only": spec.local_files_only}, None
    import labs_cache
    import labs_sources

    hub = labs_sources.Hub(spec.revision, spec.token, spec.local_files_only)
    try:
        found = labs_sources.locate(name, hub, spec.cache_dir, dtype, convert)
    except labs_cache.SourceError as error:
        why = f": {reason(error.__cause__)}" if error.__cause__ else ""
        raise ModelError(f"{error}{why}") from error
    return found[0], {**trust, **found[1]}, found[2]


def pretrained(kind: str, source: str, options: Mapping[str, object]) -> Any:
    """Call from_pretrained of transformers' class `kind`. Raises ModelError when it fails."""
    import transformers

    if kind.startswith("AutoModel"):  # else peft would load the base that an adapter there names
        options = {**options, "adapter_kwargs": {"subfolder": "none", "local_files_only": True}}
    try:
        return getattr(transformers, kind).from_pretrained(source, **options)
    except Exception as error:  # its Rust code raises plain Exceptions, model code anything
        raise ModelError(f"{source}: {reason(error)}") from error


def _fingerprint_of(
    decoder: labs_decode.Decoder, spec: ModelSpec, dtype: str, origin: Path | None
) -> Fingerprint | None:
    if not _is_there("labs_fingerprint"):
        return None
    import labs_fingerprint

    found = labs_fingerprint.read(decoder, spec, origin)
    versions = {"labs": __version__, **found.pop("versions")}
    return Fingerprint(dtype=dtype, device=device_of(spec)[1], versions=versions, **found)


def device_of(spec: ModelSpec) -> tuple[str | dict[str, int | str] | None, str, str]:
    """Return (device_map for transformers, device type, dtype), by what torch finds here."""
    import torch

    import labs_decode

    device_map: str | dict[str, int | str] | None
    has_cuda, has_mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    wanted = spec.device_map
    if wanted.startswith("{"):
        device = "cuda" if has_cuda else "cpu"
        try:
            device_map = msgspec.json.decode(wanted, type=dict[str, int | str])
        except msgspec.DecodeError as error:
            raise ModelError(f"device_map = {wanted}: is not a JSON map to devices") from error
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
        require("accelerate")
    has_bf16 = labs_decode.has_bf16(wanted if wanted.startswith(f"{device}:") else device)
    return device_map, device, resolve_dtype(spec.torch_dtype, device=device, has_bf16=has_bf16)


def _recommended(
    model: labs_decode.PretrainedModel, tokenizer: Tokenizer, eos: frozenset[int], use: bool
) -> tuple[dict[str, object], labs_defaults.Defaults | None]:
    """Return (settings that generation_config.json recommends, its other fields)."""
    stated = vars(model.generation_config) if use else {}
    values = {name: value for name, value in stated.items() if value is not None and name[0] != "_"}
    if _is_there("labs_defaults"):
        import labs_defaults

        return labs_defaults.read(model, tokenizer, eos, values)
    names = ("do_sample", "temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    found, wrong = labs_settings.recommended({key: values[key] for key in names if key in values})
    if left := [key for key in values if key not in found and not key.endswith("token_id")]:
        log.warning("fields ignored: %s", dict.fromkeys(left, "needs labs_defaults.py") | wrong)
    return found, None


# ---------------------------------------------------------------- inputs


def inputs_from_ids(model: Model, ids: Iterable[int]) -> Inputs:
    """Make Inputs of token ids. Raises InputError for an unknown id, or for too many."""
    ids, limit = tuple(ids), model.context_length
    if limit is not None and len(ids) >= limit:
        raise too_long(limit, len(ids))
    if wrong := model.decoder.wrong_prompt(ids):
        raise InputError(wrong)
    with model.lock:
        return Inputs(ids, model.tokenizer.decode(ids))


def check_prompt(
    prompt: str | None, messages: Iterable[Mapping[str, object] | Message] | None
) -> list[Message] | None:
    """Return messages as structs, None for a prompt, without a model. Raises InputError."""
    if (prompt is None) == (messages is None):
        raise InputError("give exactly one of prompt and messages")
    if prompt is not None and not prompt:
        raise InputError("the prompt is empty")
    _check_text(prompt or "", "the prompt")
    if messages is None:
        return None
    if not (checked := [_check_message(i, message) for i, message in enumerate(messages)]):
        raise InputError("the list of messages is empty")
    named = ("tool_calls", "tool_call_id", "reasoning_content")
    if any(m.role == "tool" or any(getattr(m, n) for n in named) for m in checked):
        require("labs_dialogue")
        import labs_dialogue

        labs_dialogue.check(checked)
    return checked


def _check_message(index: int, message: Mapping[str, object] | Message) -> Message:
    plain = msgspec.to_builtins(message) if isinstance(message, Message) else message
    try:
        checked = msgspec.convert(plain, Message)
    except (msgspec.ValidationError, UnicodeEncodeError) as error:
        raise InputError(f"messages[{index}]: {error}") from error
    functions = [call.function for call in checked.tool_calls or ()]
    texts = [checked.content, checked.name, checked.reasoning_content, checked.tool_call_id]
    texts += [text for each in functions for text in (each.name, each.arguments)]
    _check_text("".join(filter(None, texts)), f"messages[{index}]")
    return checked


def _check_text(text: str, what: str) -> None:
    """Raise InputError for a lone surrogate, which UTF-8 and tokenizers cannot encode."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{what} holds a lone surrogate at character {error.start}") from error


def _template(
    model: Model, messages: list[Message], tools: tuple[Mapping[str, object], ...], chat: Chat
) -> list[int]:
    """Let the template make tokens: BOS comes once, and control tokens in messages stay text."""
    options: dict[str, Any] = {"continue_final_message": chat.continue_final_message}
    options["add_generation_prompt"] = not any(options.values()) and chat.add_generation_prompt
    options |= {"sanitize_control_tokens": True, "tokenize": True, "return_dict": True}
    plain, render = msgspec.to_builtins(messages), model.tokenizer.apply_chat_template
    if tools or chat.template_options or chat.continue_final_message:
        require("labs_dialogue")
    with _refusing(model, "chat template"):
        if _is_there("labs_dialogue"):
            import labs_dialogue

            plain, more = labs_dialogue.as_read(model.tokenizer, plain, tools, chat)
            options |= more
        return list(render(plain, **options)["input_ids"])


# ---------------------------------------------------------------- text


class PartialText(Struct):
    """The growing text of one row: its ids, and text that is held back."""

    ids: list[int] = msgspec.field(default_factory=list)
    prefix: int = 0  # ids before this are not needed any more
    read: int = 0  # ids before this are in the text
    held: str = ""  # may be the beginning of a stop string
    skip_special_tokens: bool = True


def decode_next(
    tokenizer: Tokenizer, text: PartialText, token: int | None, *, last: bool = False
) -> str:
    """Return the text that `token` completes, or "" while a character is unfinished.

    It is the difference of a short window decoded with and without the token (source: TGI).
    """
    text.ids += [] if token is None else [token]
    options = {"skip_special_tokens": text.skip_special_tokens}
    before = tokenizer.decode(text.ids[text.prefix : text.read], **options)
    after = tokenizer.decode(text.ids[text.prefix :], **options)
    broken = after.endswith("\ufffd")
    if token is not None and text.skip_special_tokens and (broken or after == before):
        alone = [tokenizer.decode([token], skip_special_tokens=skip) for skip in (False, True)]
        if alone[0] != alone[1] or tokenizer.convert_ids_to_tokens(token) is None:
            text.ids.pop()  # a special token has no text and is not context for the next one
            return decode_next(tokenizer, text, None, last=True) if last else ""
    # A character has at most four bytes: after four tokens U+FFFD is what the model wrote.
    if broken and len(text.ids) - text.read < 4 and not last:
        return ""
    text.prefix, text.read = text.read, len(text.ids)
    return cast("str", after[len(before) :])


def match_stop(text: PartialText, piece: str, stops: tuple[str, ...]) -> tuple[str, str | None]:
    """Return (the text that may be shown, the stop string that is complete now or None).

    The stop string that ends first wins, then the longest, however the text is split.
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


def fold(deltas: Iterable[Delta], done: Done) -> Completion:
    """Join the events of an answer into a Completion."""
    deltas = list(deltas)
    logprobs = tuple(each for delta in deltas for each in delta.logprobs)
    return Completion("".join(delta.text for delta in deltas), logprobs=logprobs, **asdict(done))


# ---------------------------------------------------------------- requests under way


class InFlight(Struct, eq=False):
    """A running request: its row in the batch, its text so far and its clock (perf_counter)."""

    row: labs_decode.Row
    inputs: Inputs
    generation: Generation
    began: float
    sampling: labs_decode.Sampling  # without the model's own rules, unlike row.sampling
    stops: dict[str, str]  # {text to search for: its stop string}
    marks: dict[int, str]  # {special token id: the character that stands for it}
    ends: frozenset[int]  # tokens that end the answer
    text: PartialText = msgspec.field(default_factory=PartialText)
    logprobs: list[TokenLogprob] = msgspec.field(default_factory=list)
    tokens: int = 0
    first: float = 0.0

    def __post_init__(self) -> None:
        self.text.skip_special_tokens = self.generation.skip_special_tokens


Opened = InFlight | tuple[int, Failed] | None  # None: no request is waiting


def open_request(
    model: Model,
    index: int,
    inputs: Inputs,
    generation: Generation,
    processors: tuple[Processor, ...] = (),
) -> InFlight:
    """Check a whole request before computing. index: the one that its events carry.

    Raises PromptTooLong, or another InputError when the model cannot do what it asks.
    """
    import labs_decode

    if wrong := model.decoder.wrong_prompt(inputs.input_ids):
        raise InputError(wrong)
    generation, ids = evolve(generation), list(inputs.input_ids)
    prompt, limit = len(ids), model.context_length
    if limit is not None and prompt + generation.max_new_tokens > limit:
        raise too_long(limit, prompt, generation.max_new_tokens)
    if generation.prompt_lookup_num_tokens and not model.decoder.can_reuse_prefix:
        kind = model.decoder.config.model_type
        raise InputError(f"prompt_lookup_num_tokens: {kind} models cannot discard tokens once read")
    began, sampling = time.perf_counter(), _sampling(model, generation, processors)
    own = cast("tuple[str, ...]", model.generation_defaults.get("stop", ()))
    stops, marks = {stop: stop for stop in (*generation.stop, *own)}, dict[int, str]()
    least, with_rules = generation.min_new_tokens, sampling
    own_rules = {} if least is None else {"min_new_tokens": least}
    ends = frozenset() if generation.ignore_eos else model.eos_token_ids
    ends |= {*generation.stop_token_ids}
    require(*(["labs_defaults"] if own_rules else []))
    if model.defaults is not None:
        rules = model.defaults.changed(ends, **own_rules)
        with_rules = rules.apply(sampling, ids, generation.max_new_tokens)
        if generation.skip_special_tokens:
            stops, marks = model.defaults.mark(tuple(stops))
    row = labs_decode.Row(index, ids, generation.max_new_tokens, with_rules)
    row.lookahead = generation.prompt_lookup_num_tokens or 0
    row.deadline = began + (generation.timeout_s or float("inf"))
    row.exact_prefix = model.decoder.invariant or generation.seed is not None
    return InFlight(row, inputs, generation, began, sampling, stops, marks, ends)


def _sampling(
    model: Model, options: Generation, processors: tuple[Processor, ...]
) -> labs_decode.Sampling:
    import secrets

    import labs_loop

    for name in ("reasoning", "thinking_budget"):
        if (value := getattr(options, name)) is not None:
            raise InputError(f"{name} = {value}: only labs_tools splits an answer; leave it out")
    vocabulary = model.decoder.config.vocab_size
    for name in ("logit_bias", "stop_token_ids"):
        if beyond := [token for token in getattr(options, name) if token >= vocabulary]:
            raise InputError(f"{name} names token {beyond[0]}: there are {vocabulary} tokens")
    seed = secrets.randbits(32) if options.seed is None else options.seed
    return labs_loop.sampling_of(options, model.generation_defaults, seed, processors)


def resolved(request: InFlight) -> Generation:
    """Return the options as used, enough to repeat the answer if no processors ran."""
    sampling, given = request.sampling, request.generation
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    used = {name: getattr(sampling, name) for name in names}
    seed = sampling.seed if sampling.temperature > 0 else given.seed
    stop = tuple(dict.fromkeys(request.stops.values()))
    return replace(given, do_sample=None, seed=seed, stop=stop, **used)


def new_prefixes(max_bytes: int | None = None) -> labs_decode.PrefixStore | None:
    """Return a store for the KV cache of prompt prefixes, or None without labs_prefixes.py."""
    if not _is_there("labs_prefixes"):
        return None
    import labs_prefixes

    return labs_prefixes.Prefixes(max_bytes)


def rows_in_memory(model: Model, most: int | None = None) -> int:
    """Return how many typical rows fit in free memory, up to `most` (by default 64)."""
    import labs_loop

    return labs_loop.rows_in_memory(model.decoder, most or labs_loop.MOST_ROWS)


def run(
    model: Model, requests: Iterator[Opened], limit: int, loop: labs_loop.Loop | None = None
) -> Events:
    """Decode all requests, at most `limit` at once, and yield their events.

    requests: read while there is room; a Failed among them is passed on. loop: a new one to watch.
    """
    import labs_loop

    loop = labs_loop.Loop(prefixes=model.prefixes or new_prefixes()) if loop is None else loop
    under_way: dict[int, InFlight] = {}

    def row_of(item: Opened) -> Any:
        if isinstance(item, tuple):
            return item[0], labs_loop.Ended("failed", item[1].error)
        if item is not None:
            under_way[item.row.id] = item
        return item and item.row

    try:
        for index, outcome in labs_loop.run(model.decoder, map(row_of, requests), limit, loop):
            request = under_way.get(index)
            yield from ((index, event) for event in _events(model, request, outcome))
            if isinstance(outcome, labs_loop.Ended) or (request and request.row.over):
                under_way.pop(index, None)
    except (RuntimeError, MemoryError) as error:
        if (clear := _with_remedy(error)) is error:
            raise
        raise clear from None  # the traceback of `error` would keep tensors


def _with_remedy(error: Exception) -> Exception:
    """Return the error with a remedy if it is about memory, else as it is."""
    import labs_decode

    if not labs_decode.out_of_memory(error):
        return error
    return GenerationError(f"out of memory: the request {reason(error)}, or fewer tokens")


def _events(
    model: Model, request: InFlight | None, outcome: labs_loop.Choice | labs_loop.Ended
) -> Iterator[Event]:
    """Yield the events of an answer that follow from one outcome of the loop."""
    import labs_loop

    if request is not None and isinstance(outcome, labs_loop.Choice):
        yield from _advance(model, request, outcome)
    elif request is not None and isinstance(outcome, labs_loop.Ended) and outcome.error is None:
        yield _finish(model, request, cast("FinishReason", outcome.reason))
    else:
        yield Failed(cast("LabsError", _with_remedy(cast("Exception", outcome.error))))


def _advance(model: Model, request: InFlight, choice: labs_loop.Choice) -> Iterator[Event]:
    """Add a token to a row's text; yield the text that may be shown and, at the end, Done."""
    if choice.error is not None:
        failed = GenerationError(f"the row of this request failed: {choice.error}")
        yield Failed(choice.error if isinstance(choice.error, InputError) else failed)
        return
    request.tokens += 1
    request.first = request.first or time.perf_counter()
    if choice.logprob is not None:
        request.logprobs.append(TokenLogprob(choice.token, choice.logprob, choice.top))
    why: FinishReason | None = "timeout" if request.row.late else None
    why = "length" if request.tokens >= request.generation.max_new_tokens else why
    why = "stop" if choice.token in request.ends else why
    token = None if choice.token in request.ends else choice.token
    mark = request.marks.get(choice.token, "")
    ends = why is not None or mark in request.stops
    piece = decode_next(model.tokenizer, request.text, token, last=ends) + mark
    stops = request.stops if request.tokens > (request.generation.min_new_tokens or 0) else ()
    shown, stop = match_stop(request.text, piece, tuple(stops))
    why = "stop" if stop else why
    if why:
        shown += request.text.held
    shown = shown.translate(dict.fromkeys(map(ord, request.marks.values())))  # no stand-ins
    if shown or (why and request.logprobs):
        logprobs, request.logprobs = tuple(request.logprobs), []
        yield Delta(shown, logprobs)
    if why:
        yield _finish(model, request, why, request.stops.get(stop or ""))


def _finish(model: Model, request: InFlight, why: FinishReason, stop: str | None = None) -> Done:
    request.row.over = True
    now, entered = time.perf_counter(), request.row.entered
    first = request.first or now
    rate = (request.tokens - 1) / (now - first) if request.tokens > 1 else 0.0
    usage = Usage(len(request.inputs.input_ids), request.tokens, request.row.cached)
    timings = Timings(model.load_s, first - entered, now - first, rate, entered - request.began)
    return Done(why, usage, timings, stop, resolved(request).seed, _fingerprint(model, request))


def _fingerprint(model: Model, request: InFlight) -> Fingerprint | None:
    if model.fingerprint is None:
        return None
    digest = hashlib.sha256(msgspec.json.encode(request.inputs.input_ids)).hexdigest()
    return replace(model.fingerprint, generation=resolved(request), prompt_sha256=digest)


def _events_of_one(events: Events) -> Iterator[Delta | Done]:
    with contextlib.closing(cast("Generator[tuple[int, Event]]", events)):
        for _, event in events:
            if isinstance(event, Failed):
                raise event.error
            yield event


def _open_all(
    model: Model, inputs: Iterable[Inputs], generation: object, changes: dict[str, object]
) -> Iterator[Opened]:
    one = generation is None or isinstance(generation, Generation)
    each: Any = itertools.repeat(generation) if one else generation
    pairs = zip(inputs, each, strict=False) if one else itertools.zip_longest(inputs, each)
    for index, (given, options) in enumerate(pairs):
        if given is None or (options is None and not one):
            raise InputError("generation: give one for all, or one for each of inputs")
        try:
            yield open_request(model, index, given, evolve(options or Generation(), **changes))
        except LabsError as error:
            yield index, Failed(error)
