# SPDX-License-Identifier: Apache-2.0
"""Shared by the tests: tiny random models, fakes of model and engine, servers, processes."""

from __future__ import annotations

import ast
import contextlib
import functools
import gc
import hashlib
import itertools
import json
import math
import os
import queue
import random
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import falcon.testing
import httpx
import msgspec
import numpy
import openai
import pytest
import torch
import transformers
from click.testing import CliRunner
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers import models as tokenizer_models
from transformers import AutoConfig, AutoModelForCausalLM
from waitress import wasyncore

import labs
import labs_api
import labs_calls
import labs_cli
import labs_commands
import labs_decode
import labs_decode as decode
import labs_engine
import labs_fast as fast
import labs_forward
import labs_jsonl
import labs_layers
import labs_loop as loop
import labs_models
import labs_replay
import labs_request
import labs_serve
import labs_shared
import labs_steady

ROOT = Path(__file__).parent.parent
WAIT_S = 60  # the longest that a test waits for an event that should come at once
labs_load_config = labs.load_config


# ---------------------------------------------------------------- models

SPECIAL = ("<bos>", "<eos>", "<end>", "<|system|>", "<|user|>", "<|assistant|>")
BOS, EOS, END, _, USER, ASSISTANT = range(256, 262)
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
) + TEMPLATE
LETTERS = (*range(33, 127), *range(161, 173), *range(174, 256))
OTHERS = [byte for byte in range(256) if byte not in LETTERS]
ALPHABET = [chr(b) if b in LETTERS else chr(256 + OTHERS.index(b)) for b in range(256)]
SHORT = labs.Inputs(input_ids=(104, 101, 121), prompt="hey")


def byte_tokenizer(template: str | None = TEMPLATE) -> Any:
    """Make a tokenizer with one token a byte, which puts <bos> before all that it encodes."""
    vocabulary = {token: i for i, token in enumerate((*ALPHABET, *SPECIAL))}
    inner = Tokenizer(tokenizer_models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", BOS)]
    )
    names = {"bos_token": "<bos>", "eos_token": "<eos>"}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, additional_special_tokens=list(SPECIAL[2:]), **names
    )
    tokenizer.chat_template = template
    return tokenizer


def sizes_of(text: str) -> dict[str, Any]:
    return {name: int(number) for name, _, number in (s.partition("=") for s in text.split())}


def llama(**options: Any) -> Any:
    return transformers.LlamaConfig(
        **SIZES, intermediate_size=128, num_key_value_heads=2, **LAYERS_OF_TWO, **options
    )


SIZES: dict[str, Any] = {
    **{"vocab_size": 262, "hidden_size": 64, "initializer_range": 0.3},
    **{"tie_word_embeddings": False, "bos_token_id": BOS, "eos_token_id": EOS},
}
LAYERS_OF_TWO = sizes_of("num_hidden_layers=2 num_attention_heads=4 max_position_embeddings=4096")


def save_model(
    folder: Path, config: Any = None, *, template: str | None = TEMPLATE, **recommended: Any
) -> Path:
    """Save a tiny model with random weights, and what its generation_config.json recommends."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = transformers.AutoModelForCausalLM.from_config(config or llama())
    for key, value in recommended.items():
        setattr(model.generation_config, key, value)
    model.save_pretrained(folder)
    byte_tokenizer(template).save_pretrained(folder)
    return folder


def tokenizer_of_pairs() -> Any:
    """Make a tokenizer of bytes with <eos> after each text, which also encodes pairs of texts."""
    tokenizer = byte_tokenizer(None)
    tokenizer.pad_token = "<eos>"
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>",
        pair="<bos> $A <eos> $B:1 <eos>:1",
        special_tokens=[("<bos>", BOS), ("<eos>", EOS)],
    )
    return tokenizer


def save_encoder(place: Path, kind: Any = transformers.BertModel, **options: Any) -> Path:
    """Save a tiny BERT for vectors, or of a kind for scores; it reads 128 tokens."""
    sizes = sizes_of("vocab_size=262 hidden_size=32 num_hidden_layers=2 intermediate_size=32")
    sizes |= sizes_of("num_attention_heads=2 max_position_embeddings=128")
    torch.manual_seed(7)
    config = transformers.BertConfig(**sizes, initializer_range=0.5, **options)
    kind(config).save_pretrained(place)
    tokenizer_of_pairs().save_pretrained(place)
    names = ["input_ids", "token_type_ids", "attention_mask"]
    return changed(place, "tokenizer_config.json", model_input_names=names)


def changed(place: Path, name: str = "config.json", **words: Any) -> Path:
    """Change words of a JSON file in a folder; return the folder."""
    found = json.loads((place / name).read_text()) | words
    (place / name).write_text(json.dumps(found))
    return place


def load(folder: Path | str, **options: Any) -> labs.Model:
    return labs.load_model(
        labs.ModelSpec(model_name=str(folder), **{"torch_dtype": "fp32"} | options)
    )


def save_gguf(path: Path, seed: int = 0, kind: str = "F32") -> Path:
    """Write a tiny llama with random weights as GGUF; its products have the bits of this type."""
    import gguf

    tokens, width = [*ALPHABET, "th", "<s>", "</s>"], 32
    writer = gguf.GGUFWriter(str(path), "llama")
    for name, number in sizes_of(
        "context_length=256 embedding_length=32 block_count=1 feed_forward_length=64 head_count=4 "
        "head_count_kv=2 rope_dimension_count=8 vocab_size=259 bos_token_id=257 eos_token_id=258"
    ).items():
        getattr(writer, f"add_{name}")(number)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 257 + [3, 3])
    writer.add_token_merges(["t h"])
    shapes = dict.fromkeys(("token_embd", "output"), (len(tokens), width))
    shapes |= dict.fromkeys(("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"), (width,))
    shapes |= dict.fromkeys(("blk.0.attn_q", "blk.0.attn_output"), (width, width))
    shapes |= dict.fromkeys(("blk.0.attn_k", "blk.0.attn_v"), (16, width))
    shapes |= dict.fromkeys(("blk.0.ffn_gate", "blk.0.ffn_up"), (64, width))
    shapes["blk.0.ffn_down"] = (width, 64)
    numbers = numpy.random.default_rng(seed)
    for name, shape in shapes.items():
        values = numbers.normal(0, 0.3, shape).astype(numpy.float32)
        type_ = gguf.GGMLQuantizationType[kind if len(shape) == 2 else "F32"]
        values = gguf.quants.quantize(values, type_)
        writer.add_tensor(f"{name}.weight", values, raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


Hook = Callable[[dict[str, Any], Any], Any]


@contextlib.contextmanager
def hooked(model: labs.Model, hook: Hook) -> Iterator[list[int]]:
    """Call `hook` with each forward call's keywords and output; yield the calls' query lengths."""
    calls: list[int] = []

    def after(module: Any, args: Any, words: dict[str, Any], output: Any) -> Any:
        calls.append(words["input_ids"].shape[1])
        hook(words, output)
        return output

    handle = model.model.register_forward_hook(after, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


def counted(model: labs.Model) -> Any:
    return hooked(model, lambda words, output: None)


def saying(model: labs.Model, ids: list[int], inputs: labs.Inputs = SHORT) -> Any:
    """Let the model answer `inputs` with these ids."""
    script = {len(inputs.input_ids) - 1 + place: token for place, token in enumerate(ids)}

    def hook(words: dict[str, Any], output: Any) -> None:
        for row, position in enumerate(words["position_ids"][:, -1].tolist()):
            output.logits[row] = -10.0
            output.logits[row, -1, script.get(position, EOS)] = 10.0

    return hooked(model, hook)


def raising(error: BaseException) -> Hook:
    def hook(words: dict[str, Any], output: Any) -> None:
        raise error

    return hook


def encoded(text: str) -> list[int]:
    return list(text.encode())


def fold(events: Iterator[tuple[int, labs.Event]]) -> dict[int, tuple[str, Any]]:
    """Return {index: (text, the event that ended it)}."""
    texts: dict[int, str] = {}
    ends: dict[int, Any] = {}
    for index, event in events:
        assert index not in ends, "an event after the end"
        texts.setdefault(index, "")
        if isinstance(event, labs.Delta):
            texts[index] += event.text
        else:
            ends[index] = event
    return {index: (texts[index], ends[index]) for index in texts}


def tokens_of(completion: labs.Completion) -> list[int]:
    return [item.token for item in completion.logprobs]


def is_one_sentence(error: BaseException) -> bool:
    text = str(error)
    return 10 < len(text) < 400 and "\n" not in text and "Traceback" not in text


def python(code: str, folder: Path, path: Path = ROOT, **streams: Any) -> Any:
    """Run Python code in another process and return what it did."""
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "timeout": 120} | streams
    environment = {k: v for k, v in os.environ.items() if not k.startswith("LABS_")}
    environment["PYTHONPATH"] = str(path)
    return subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, text=True, **streams
    )


def write(name: str, text: str) -> None:
    Path(name).write_text(text, encoding="utf-8")


def conversions(spec: labs.ModelSpec) -> list[Path]:
    return sorted(path for path in Path(str(spec.cache_dir)).iterdir() if path.is_dir())


def answer(spec: labs.ModelSpec) -> str:
    labs.load_model.cache_clear()
    return labs.generate(labs.load_model(spec), SHORT, max_new_tokens=8, temperature=0).text


def with_template(model: labs.Model, template: str | None) -> labs.Model:
    return msgspec.structs.replace(model, tokenizer=byte_tokenizer(template))


def imports(nodes: Any) -> set[str]:
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(str(node.module).split(".")[0])
    return names


def tree(name: str) -> ast.Module:
    return ast.parse((ROOT / name).read_text(encoding="utf-8"))


# ---------------------------------------------------------------- decode

NEW_TOKENS = 20
BASE: dict[str, Any] = {
    **{"tie_word_embeddings": False, "initializer_range": 0.3, "vocab_size": 211},
    **sizes_of("hidden_size=64 num_hidden_layers=4 num_attention_heads=4 num_key_value_heads=2"),
    **sizes_of("intermediate_size=96 max_position_embeddings=512 bos_token_id=1 eos_token_id=2"),
    "pad_token_id": 0,
}
SLIDING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2}
GROUPS: dict[str, dict[str, Any]] = {
    "sliding": SLIDING,
    "linear": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "conv": {"layer_types": ["conv", "full_attention"] * 2},
    "second": {"attn_layer_indices": [1, 3]},
    "plain": {"use_mamba_kernels": False},
}
# How each type runs, and the sizes of a tiny one. Those of DULL repeat themselves: how they run is
# tested, their tokens say nothing.
TYPES = """
joins llama,qwen2,stablelm,granite,smollm3,olmo
joins qwen3,glm4 head_dim=16
joins qwen3_moe num_experts=4 num_experts_per_tok=2 moe_intermediate_size=32 head_dim=16
joins mistral,phi3 sliding_window=8
joins mixtral num_local_experts=4
joins exaone4,cohere2 sliding
joins gemma2 head_dim=16 query_pre_attn_scalar=16 sliding_window=8
joins gemma3_text head_dim=16 query_pre_attn_scalar=16 sliding
joins gpt_oss head_dim=16 num_local_experts=4 num_experts_per_tok=2 sliding
joins llama4_text head_dim=16 attention_chunk_size=8 num_local_experts=2 intermediate_size_mlp=96
joins gpt2 n_embd=64 n_layer=4 n_head=4 n_positions=512
joins opt ffn_dim=96 word_embed_proj_dim=64
joins deepseek_v3 n_routed_experts=4 num_experts_per_tok=2 n_group=1 topk_group=1 v_head_dim=16 \
    moe_intermediate_size=32 q_lora_rank=16 kv_lora_rank=16 qk_rope_head_dim=8 \
    qk_nope_head_dim=16 first_k_dense_replace=1 num_key_value_heads=4
joins mamba2 state_size=8 head_dim=16 num_heads=8 n_groups=2 expand=2 conv_kernel=4 chunk_size=8
joins lfm2 block_ff_dim=96 conv
joins falcon_h1 mamba_d_ssm=64 mamba_n_heads=4 mamba_d_head=16 mamba_n_groups=1 mamba_d_state=8 \
    mamba_chunk_size=8
joins bamba mamba_n_heads=8 mamba_d_head=16 mamba_n_groups=1 mamba_d_state=8 mamba_chunk_size=8 \
    second
whole mamba state_size=8 expand=2 conv_kernel=4
whole falcon_mamba state_size=8
whole jamba mamba_d_state=8 num_experts=2 attn_layer_period=2 attn_layer_offset=1 \
    expert_layer_period=2 plain
OWN gptj n_embd=64 n_layer=4 n_head=4 n_positions=512 rotary_dim=8
alone rwkv attention_hidden_size=64
alone minimax num_local_experts=2 head_dim=16 linear
"""
DULL_TYPES = """
alone bloom n_head=4 n_layer=4
alone mpt d_model=64 n_heads=4 n_layers=4
joins gpt_neox
joins starcoder2 sliding_window=8
"""


def by_type(text: str) -> dict[str, tuple[str, dict[str, Any]]]:
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    for how, kinds, *words in (line.split() for line in text.strip().splitlines()):
        sizes = sizes_of(" ".join(word for word in words if "=" in word))
        for word in words:
            sizes |= GROUPS.get(word, {})
        found |= dict.fromkeys(kinds.split(","), (how, sizes))
    return found


# Before 5.24 gptj took no attention but its own.
OWN = "alone" if transformers.__version__ < "5.24" else "joins"
ARCHITECTURES, DULL = by_type(TYPES.replace("OWN", OWN)), by_type(DULL_TYPES)
CHANCE = random.Random(0)

PROMPTS = [[CHANCE.randrange(3, 200) for _ in range(n)] for n in (1, 2, 5, 11, 23, 41, 7, 3)]


def prepare(
    model: Any, *, batch_invariant: bool = True, method: str = "none", cuda_graphs: bool = True
) -> decode.Decoder:
    """Return the decoder that labs.load_model makes where all rooms are there."""
    decoder = labs_calls.speed_up(decode.prepare(model, batch_invariant=batch_invariant))
    options = {"batch_invariant": batch_invariant, "cuda_graphs": cuda_graphs}
    decoder = fast.speed_up(decoder, method, **options)
    weights = labs_layers.weights_of(decoder)
    if isinstance(weights, str):
        return labs_steady.steady_modules(decoder)
    return labs_shared.speed_up(labs_forward.with_forward(decoder, weights))


def random_model(kind: str, **extra: Any) -> Any:
    torch.manual_seed(0)
    options = {**BASE, **{**ARCHITECTURES, **DULL}[kind][1], **extra}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **options)).float().eval()
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, None
    return model


def by_transformers(model: Any, prompt: list[int], new: int = NEW_TOKENS) -> list[int]:
    ids = torch.tensor([prompt], device=model.device)
    with torch.inference_mode():
        mask = torch.ones_like(ids)
        out = model.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False)
    return out[0, len(prompt) :].tolist()


def row_of(prompt: list[int], key: Any = 0, **sampling: Any) -> decode.Row:
    options = {"max_new_tokens": NEW_TOKENS, "sampling": decode.Sampling(**sampling)}
    return decode.Row(id=key, ids=list(prompt), **options)


def newcomer(
    decoder: decode.Decoder, prompt: list[int], key: Any = 0, **sampling: Any
) -> decode.Batch:
    batch = decode.new_batch(decoder, row_of(prompt, key, **sampling))
    while batch.pending:
        batch = decode.prefill(decoder, batch)
    return loop.step(decoder, batch)[0]


# ---------------------------------------------------------------- engine

NEW = 8


@functools.cache
def model_of(kind: str) -> labs.Model:
    """Make a tiny model whose answers end at max_new_tokens only."""
    return model_around(prepare(random_model(kind, vocab_size=262)), kind)


def model_around(decoder: labs_decode.Decoder, name: str, context_length: int = 512) -> labs.Model:
    given: dict[str, Any] = {"decoder": decoder, "device": decoder.device.type, "dtype": "fp32"}
    given |= {"tokenizer": byte_tokenizer(), "spec": labs.ModelSpec(model_name=name)}
    given |= {"context_length": context_length, "eos_token_ids": frozenset()}
    return labs.Model(**given, generation_defaults={}, load_s=0.0, lock=threading.Lock())


def prompt(number: int, length: int = 6) -> labs.Inputs:
    chance = random.Random(number)
    ids = tuple(chance.randrange(33, 127) for _ in range(length))
    return labs.Inputs(ids, bytes(ids).decode())


def options(**changes: Any) -> labs.Generation:
    return labs.Generation(**{"max_new_tokens": NEW} | changes)


@functools.cache
def alone(kind: str, number: int, length: int = 6, new: int = NEW, seed: int | None = None) -> str:
    """Return the text that labs.generate gives, greedy or by this seed."""
    return labs.generate(model_of(kind), prompt(number, length), asked(seed, new)).text


def asked(seed: int | None = None, new: int = NEW) -> labs.Generation:
    return options(max_new_tokens=new, seed=seed, temperature=0.0 if seed is None else 1.0)


class Clock:
    """A clock that a test sets."""

    def __init__(self, now: float = 0.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


class Gate:
    """The forward calls of an engine: the ids of each, and a hand on the door.

    before: is called with a call's words before it, after: with its words and output.
    """

    def __init__(self, model: labs.Model) -> None:
        self.calls: list[list[list[int]]] = []
        self.allowed: float = math.inf
        self.before: Callable[[Any], Any] = lambda words: None
        self.after: Callable[[Any, Any], Any] = lambda words, output: None
        self.turn = threading.Condition()
        self.handles = [
            model.model.register_forward_pre_hook(self._enter, with_kwargs=True),
            model.model.register_forward_hook(self._leave, with_kwargs=True),
        ]

    def _enter(self, module: Any, args: Any, words: dict[str, Any]) -> None:
        if threading.current_thread().name != "labs-engine":
            return  # a text that a test computes alone
        with self.turn:
            self.calls.append(words["input_ids"].tolist())
            self.turn.notify_all()
            assert self.turn.wait_for(lambda: len(self.calls) <= self.allowed, WAIT_S)
        self.before(words)

    def _leave(self, module: Any, args: Any, words: dict[str, Any], output: Any) -> None:
        if threading.current_thread().name == "labs-engine":
            self.after(words, output)

    def let(self, count: float) -> None:
        """Let `count` more calls through: the next one is held at its beginning."""
        with self.turn:
            self.allowed = len(self.calls) + count - (len(self.calls) > self.allowed)
            self.turn.notify_all()

    def until(self, count: int) -> None:
        """Wait until this number of calls has begun."""
        with self.turn:
            assert self.turn.wait_for(lambda: len(self.calls) >= count, WAIT_S)

    def has_seen(self, inputs: labs.Inputs) -> bool:
        ids, length = list(inputs.input_ids), len(inputs.input_ids)
        rows = [row for call in self.calls for row in call]
        return any(row[i : i + length] == ids for row in rows for i in range(len(row)))

    @property
    def steps(self) -> list[int]:
        """How many rows each step had; a lone row of llama has copies beside it."""
        steps = [[token for (token,) in call] for call in self.calls if len(call[0]) == 1]
        copies = labs_decode.LONE_ROW_COPIES
        return [1 if len(row) == copies == row.count(row[0]) else len(row) for row in steps]


def inner(engine: labs_engine.AnyEngine) -> labs_engine.Engine:
    return engine.engine if isinstance(engine, labs_engine.Cached) else engine


def leftovers(engine: labs_engine.AnyEngine) -> dict[str, Any]:
    held = {name: getattr(inner(engine), name) for name in ("_jobs", "_waiting")}
    if isinstance(engine, labs_engine.Cached):
        held |= {"_tickets": engine._tickets, "_shared": engine._shared}
    if inner(engine)._thread.is_alive():
        loop = inner(engine)._loop
        held |= {"rows": loop.rows, "prefilling": loop.prefilling}
    return {name: table for name, table in held.items() if table}


def read(answer: labs_engine.Answer, wait_s: float = WAIT_S) -> tuple[str, Any]:
    """Return an answer's text and the event that ended it."""
    text = ""
    while True:
        event = answer.get(wait_s)
        assert event is not None, "nothing comes any more"
        if not isinstance(event, labs.Delta):
            return text, event
        text += event.text


def held(
    engine: labs_engine.AnyEngine, gate: Gate, calls: int, wanted: labs.Generation | None = None
) -> labs_engine.Answer:
    """Ask, and return when the answer has had `calls` calls and the next one is held."""
    gate.let(calls)
    answer = engine.submit(prompt(0), wanted or options())
    gate.until(calls + 1)
    return answer


def quiet(engine: labs_engine.AnyEngine) -> bool:
    """Wait until nothing is under way."""
    deadline = time.monotonic() + WAIT_S
    while (status := engine.status()).running or status.waiting or leftovers(engine):
        assert time.monotonic() < deadline, (status, leftovers(engine))
        time.sleep(0.002)
    return True


# ---------------------------------------------------------------- api

A = {"logit_bias": {"97": 100}, "temperature": 0}  # lets any model say "aaa..."
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
RESPONSES = "/v1/responses"
HELLO = [{"role": "user", "content": "hi"}]
BODIES: dict[str, dict[str, Any]] = {
    "/generate": {"prompt": "hi"},
    "/generate/stream": {"prompt": "hi"},
    "/explain": {"prompt": "hi"},
    "/choose": {"prompt": "hi", "options": ["a", "b"]},
    CHAT: {"messages": HELLO},
    COMPLETIONS: {"prompt": "hi"},
    RESPONSES: {"input": "hi"},
    "/tokenize": {"prompt": "hi"},
    "/detokenize": {"tokens": [104, 105]},
    "/apply-template": {"messages": HELLO},
}
TOKENS = ("/tokenize", "/detokenize", "/apply-template")
ANSWERED = [path for path in BODIES if path not in ("/explain", "/choose", *TOKENS)]
KEYS = ("s3cret", "clé")
PUBLIC = ("/health", "/livez", "/readyz", "/openapi.json", "/docs", "/")


class FakeEngine:
    """Stands for an engine: remembers what it was asked and answers at once with set pieces."""

    def __init__(self, model: labs.Model) -> None:
        self.model = model
        self.pieces: list[str | labs.Delta] = ["Hello", " there"]
        self.reason: Any = "stop"
        self.refusal: BaseException | None = None  # raised by submit
        self.error: labs.LabsError | None = None  # ends the answer
        self.asked: list[tuple[labs.Inputs, labs.Generation, str]] = []
        self.left: list[int] = []
        self.tickets = itertools.count(1)
        self.doing: dict[str, Any] = {}  # of its status

    def submit(
        self,
        inputs: Any,
        generation: Any,
        *,
        owner: str = "",
        processors: Any = (),
        events: Any = None,
    ) -> labs_engine.Answer:
        if self.refusal is not None:
            raise self.refusal
        ticket, events = next(self.tickets), queue.SimpleQueue() if events is None else events
        for piece in self.pieces:
            events.put((ticket, labs.Delta(piece) if isinstance(piece, str) else piece))
        usage = labs.Usage(len(inputs.input_ids), len(self.pieces), cached_tokens=5)
        done = labs.Done(self.reason, usage, labs.Timings(0.0, 0.1, 0.2, 5.0), seed=generation.seed)
        events.put((ticket, labs.Failed(self.error) if self.error else done))
        self.asked.append((inputs, generation, owner))
        return labs_engine.Answer(ticket, events, self.left.append)

    def open(self, inputs: labs.Inputs, generation: labs.Generation, *rest: Any) -> Any:
        return labs.open_request(self.model, next(self.tickets), inputs, generation)

    def take_in(self, stream: Any, events: Any, work: Any) -> labs_engine.Answer:
        if self.refusal is not None:
            raise self.refusal
        deltas = [event for event in work(stream.row, None) if event is not None]
        for delta in deltas:
            events.put((stream.row.id, delta))
        self.asked.append((stream.inputs, stream.generation, stream.row.owner))
        done = labs.Done("stop", labs.Usage(1, 0), labs.Timings(0.0, 0.0, 0.0, 0.0))
        events.put((stream.row.id, done))
        return labs_engine.Answer(stream.row.id, events, self.left.append)

    def status(self) -> labs_engine.Status:
        numbers = dict.fromkeys(("running", "waiting", "steps", "halvings", "failures"), 0)
        numbers |= {"max_rows": 4, "max_waiting": 4, "response_cache_hits": 0}
        state = {"cache_usage": 0.0, "idle_s": 0.0, "alive": True, "closing": False}
        return labs_engine.Status(**numbers | state | self.doing)

    @property
    def generation(self) -> labs.Generation:
        return self.asked[-1][1]


def configured(*keys: str, generation: Any = None, **server: Any) -> labs.Config:
    return labs.Config(
        model_id="tiny",
        generation=generation or labs.Generation(),
        server=labs.Server(**server),
        api_keys=tuple(hashlib.sha256(key.encode()).hexdigest() for key in keys),
    )


class Site:
    """An app and a client of it, without sockets."""

    def __init__(self, engine: Any, config: labs.Config, models: Any = None) -> None:
        self.engine, self.config = engine, config
        models = labs_models.One(engine, config.model_id) if models is None else models
        self.app = labs_api.create_app(config, models)
        self.client = falcon.testing.TestClient(self.app)

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> Any:
        """Ask; a body that is not bytes is sent as JSON. Header names: _ stands for -."""
        names = {"Host": "localhost"} if body is None else {"Host": "localhost", **JSON}
        names |= {name.replace("_", "-"): value for name, value in headers.items()}
        sent = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        return self.client.simulate_request(method, path, body=sent, headers=names)

    def get(self, path: str, **headers: str) -> Any:
        return self.ask("GET", path, **headers)

    def post(self, path: str, body: Any, **headers: str) -> Any:
        return self.ask("POST", path, body, **headers)

    def sdk(self, key: str = "none", **options: Any) -> openai.OpenAI:
        client = httpx.Client(transport=httpx.WSGITransport(app=self.app))
        base = "http://localhost/v1"
        return openai.OpenAI(
            api_key=key, base_url=base, http_client=client, **{"max_retries": 0, **options}
        )


JSON = {"Content-Type": "application/json"}


def error_of(response: Any, status: int) -> dict[str, Any]:
    """Return the error of an answer, which has the one shape of all errors."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    (error,) = response.json.values()
    assert list(response.json) == ["error"]
    assert list(error) == ["message", "type", "param", "code"]
    assert is_one_sentence(Exception("x" * 10 + error["message"]))
    return error


def events_of(data: bytes) -> list[tuple[str, str]]:
    """Return (event, data) of server-sent events, as the HTML standard reads them."""
    found, kind, lines = [], "message", []
    for line in re.split(r"\r\n|\r|\n", data.decode()):
        name, _, value = line.partition(":")
        if not line and lines:
            found.append((kind, "\n".join(lines)))
        if not line:
            kind, lines = "message", []
        elif name == "data":
            lines.append(value.removeprefix(" "))
        elif name == "event":
            kind = value.removeprefix(" ")
    return found


def chunks_of(response: Any) -> list[dict[str, Any]]:
    """Return the chunks of OpenAI's stream, which ends in [DONE]."""
    *chunks, (_, last) = events_of(response.content)
    assert last == "[DONE]"
    return [json.loads(data) for _, data in chunks]


def log_lines(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    records = [record for record in caplog.records if record.name == "labs.api"]
    return [json.loads(record.getMessage()) for record in records if record.levelname == "INFO"]


def until(condition: Callable[[], Any]) -> Any:
    """Wait for a condition, long enough for any machine."""
    end = time.monotonic() + WAIT_S
    while not (value := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)
    return value


ROWS, WAITING = 2, 2


class Brake:
    """Hooks a model's forward calls: all pass after `pause_s`, or one for each `let` if held."""

    def __init__(self) -> None:
        self.pause_s, self.held, self._let = 0.0, False, threading.Semaphore(0)

    def __call__(self, words: Any, output: Any) -> None:
        time.sleep(self.pause_s)
        while self.held and not self._let.acquire(timeout=0.01):
            pass

    def let(self, calls: int) -> None:
        self._let.release(calls)


class Live(Site):
    """An app behind waitress on a free port, in a thread."""

    def __init__(self, engine: Any, config: labs.Config, models: Any = None) -> None:
        free = msgspec.structs.replace(config.server, port=0)
        config = msgspec.structs.replace(config, server=free)
        super().__init__(engine, config, models)
        self.server = labs_serve.make_server(self.app, config)
        self.port = self.server.effective_port
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self.server.run, daemon=True)
        self._thread.start()

    def close(self) -> None:
        with contextlib.suppress(OSError):  # it may be closed before the trigger is written to
            self.server.trigger.pull_trigger(lambda: wasyncore.close_all(self.server._map))
        self._thread.join(WAIT_S)
        self.server.task_dispatcher.shutdown(timeout=1)

    def connect(self, sent: bytes = b"") -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=WAIT_S)
        connection.sendall(sent)
        return connection

    def raw(self, sent: bytes) -> bytes:
        """Send bytes and return all that comes until the server hangs up."""
        with self.connect(sent) as connection:
            return b"".join(iter(lambda: connection.recv(65_536), b""))

    def doing(self) -> tuple[int, int]:
        status = self.engine.status()
        return status.running, status.waiting


def request(path: str, body: Any, *headers: str, version: str = "1.1") -> bytes:
    data = json.dumps(body).encode()
    lines = [f"POST {path} HTTP/{version}", "Host: localhost", "Content-Type: application/json"]
    lines += [f"Content-Length: {len(data)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + data


# ---------------------------------------------------------------- cli

# Threads that wait for a busy processor slow a small model down a hundredfold.
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}
USAGE = labs.Usage(prompt_tokens=3, completion_tokens=4)
TIMINGS = labs.Timings(load_s=1.0, prefill_s=0.25, decode_s=0.5, tokens_per_s=8.0)


class FakeLabs:
    """Stands for labs: remembers what it was asked and answers with set pieces."""

    def __init__(self) -> None:
        self.pieces = ["Hello", " there"]
        self.finish_reason = "stop"
        self.requests: list[dict[str, Any]] = []
        self.overrides: dict[str, Any] = {}
        self.closed = 0
        self.error: BaseException | None = None

    def load_config(self, path: Any = None, *, env: Any = None, overrides: Any = None) -> Any:
        self.overrides = overrides
        return labs_load_config(path, env={}, overrides=overrides)

    def build_inputs(self, model: Any, **request: Any) -> Any:
        if request.get("messages"):
            request["messages"] = [msgspec.to_builtins(item) for item in request["messages"]]
        self.requests.append(request)
        return labs.Inputs(input_ids=(1, 2, 3), prompt="templated")

    def stream_generate(self, model: Any, inputs: Any, generation: Any, *, processors: Any) -> Any:
        try:
            for piece in self.pieces:
                yield labs.Delta(text=piece)
            if self.error:
                error, self.error = self.error, None
                raise error
            yield labs.Done(finish_reason=self.finish_reason, usage=USAGE, timings=TIMINGS)
        finally:
            self.closed += 1


NOTHING = dict.fromkeys(labs.Model.__struct_fields__, None)
MODEL = labs.Model(**NOTHING | {"load_s": 1.0, "generation_defaults": {}})  # type: ignore[arg-type]


def gen() -> Any:
    return labs_commands.Commands(labs_cli.run)


def invoke(*arguments: str, input: str | bytes | None = None) -> Any:
    with unfrozen():
        return CliRunner().invoke(gen(), arguments, input=input)


def unfrozen() -> Any:
    """Keep a command from freezing its objects, which it does because its process ends with it."""
    return mock.patch.object(gc, "freeze")


def labs_gen(*arguments: str, **options: Any) -> subprocess.CompletedProcess[bytes]:
    """Run labs-gen as a program, greedily and with few tokens by default."""
    words = [sys.executable, ROOT / "labs_cli.py", "--temperature", "0", *arguments]
    options = {"stdin": subprocess.DEVNULL, "env": ONE_THREAD, **options}
    if "input" in options:
        del options["stdin"]
    return subprocess.run(words, capture_output=True, timeout=300, check=False, **options)


def start(*arguments: str, **options: Any) -> subprocess.Popen[bytes]:
    words = [sys.executable, ROOT / "labs_cli.py", "--temperature", "0", *arguments]
    return subprocess.Popen(words, env=ONE_THREAD, **{"preexec_fn": heed_sigint} | options)


def heed_sigint() -> None:
    """Undo what a shell does to its background jobs, of which the tests may be one."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def read_until(descriptor: int, text: str, seen: str = "") -> str:
    """Read from a descriptor until `text` comes or two minutes have gone."""
    until = time.monotonic() + 120
    while text not in seen:
        ready, _, _ = select.select([descriptor], [], [], max(0, until - time.monotonic()))
        data = os.read(descriptor, 4096) if ready else b""
        assert data, f"{text!r} did not come; seen: {seen!r}"
        seen += data.decode(errors="replace")
    return seen


# ---------------------------------------------------------------- serve

API = "import labs_cli; labs_cli.main_api()"


@contextlib.contextmanager
def program(*arguments: str, code: Any = (), **settings: str) -> Iterator[Any]:
    """Run labs-api, or other code, with LABS_ variables; end it if a test has not."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("LABS_")}
    environment |= {"OMP_NUM_THREADS": "1", "LABS_SERVER_PORT": "0"}
    environment |= {f"LABS_{name}": value for name, value in settings.items()}
    command = [sys.executable, *(code or ["-c", API]), *arguments]
    environment |= {"PYTHONPATH": str(ROOT)}
    options: dict[str, Any] = {"env": environment, "cwd": os.sep, "start_new_session": True}
    with subprocess.Popen(command, stderr=-1, stdout=-1, **options) as process:
        try:
            yield process
        finally:
            process.kill()


def serving(process: Any) -> str:
    """Wait until the program reports that it is ready, and return its address."""
    url = re.search(rb"http://[^ ]+", process.stderr.readline())
    assert url
    assert b"ready" in process.stderr.readline()
    return url[0].decode()


def end_of(process: Any) -> tuple[int, str]:
    """Return the exit code and what was written, in which nothing is a traceback."""
    out, err = process.communicate(timeout=WAIT_S)
    assert b"Traceback" not in err + out, err.decode()
    return process.returncode, (out + err).decode()


# ---------------------------------------------------------------- files of prompts

SHORT_LINES = labs.Config(model_id="tiny", generation=labs.Generation(max_new_tokens=6))


def numbered(rows: Iterable[Any]) -> Iterator[tuple[int, bytes]]:
    """Number lines from 1; an object becomes a line, bytes stay as they are."""
    return ((n, row if isinstance(row, bytes) else line(row)) for n, row in enumerate(rows, 1))


def line(row: Any) -> bytes:
    return json.dumps(row).encode() + b"\n"


def answers(
    model: labs.Model,
    lines: Iterable[Any],
    config: labs.Config = SHORT_LINES,
    tally: Any = None,
    **batching: Any,
) -> list[dict[str, Any]]:
    """Answer lines without files."""
    context, tally = labs_request.open_context(config), tally or labs_jsonl.Tally()
    how = labs_jsonl.Batching(**batching)
    return [*map(whole, labs_jsonl.answer_lines(model, context, numbered(lines), tally, how))]


def whole(data: bytes) -> dict[str, Any]:
    """Return the object in data that has to be exactly one line."""
    assert (data[-1:], data.count(b"\n")) == (b"\n", 1)
    found = json.loads(data)
    assert isinstance(found, dict)
    return found


def replayed(
    model: labs.Model, rows: Iterable[Any], config: labs.Config = SHORT_LINES, **options: Any
) -> list[labs_replay.Verdict]:
    context = labs_request.open_context(config)
    return list(labs_replay.replay(model, context, numbered(rows), **options))


def openai_line(name: Any, url: str = CHAT, method: str = "POST", **body: Any) -> dict[str, Any]:
    body = {"messages": HELLO, **body} if url == CHAT else body
    return {"custom_id": name, "method": method, "url": url, "body": body}


# ---------------------------------------------------------------- refusals


def refused(response: Any, status: int, **wanted: Any) -> dict[str, Any]:
    """Return the error of an answer that has this status and these fields."""
    error = error_of(response, status)
    assert error.items() >= wanted.items(), error
    return error
