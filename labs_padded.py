# SPDX-License-Identifier: Apache-2.0
"""Texts as tokens in padded calls of a model that reads them whole, for vectors and for scores.

    reader = labs_padded.Reader(tokenizer, limit=512)
    rows = reader.read(["How is it installed?"])            # may raise InputError
    for places in labs_padded.batches([len(row.ids) for row in rows], most=4096):
        words = labs_padded.padded([rows[place] for place in places], device)

Rows are padded at their end, so the places of their tokens do not depend on their company.
Needs labs.py; torch.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import labs

UNBOUNDED = 2**15  # tokens of a text for a model that states no limit
CPU_TOKENS, GPU_TOKENS = 2048, 2**16  # of a call, with padding: more of them are not faster


class Row(NamedTuple):
    """The tokens of one text or pair. types: which text of the pair each is of; () if unused.

    skip: tokens at the beginning that are a prompt's.
    """

    ids: Sequence[int]
    types: Sequence[int] = ()
    skip: int = 0


class Reader:
    """A tokenizer that threads may share. limit: tokens of a row, with the special ones."""

    def __init__(self, tokenizer: Any, limit: int, *, lower: bool = False) -> None:
        self.tokenizer, self.limit, self._lock = tokenizer, limit, threading.Lock()
        if lower:
            _lower(tokenizer)

    def read(
        self, texts: Sequence[str], seconds: Sequence[str] | None = None, cut: int | None = None
    ) -> list[Row]:
        """Return the tokens of texts, or of pairs of them with `seconds`.

        cut: drop the end of what has more tokens, of a pair first that of the longer text; None:
        leave it whole. Raises InputError for a text that cannot be encoded.
        """
        if not texts:
            return []
        options: dict[str, Any] = {"return_attention_mask": False, "verbose": False}
        options |= {} if cut is None else {"truncation": True, "max_length": cut}
        found = self._encoded([*texts], None if seconds is None else [*seconds], options)
        ids, types = found["input_ids"], found.get("token_type_ids")
        return [Row(row, types[place] if types else ()) for place, row in enumerate(ids)]

    def shortened(self, texts: Sequence[str], tokens: int) -> list[str]:
        """Return texts without what follows their first tokens. Raises InputError."""
        if not getattr(self.tokenizer, "is_fast", False):
            raise labs.InputError("max_tokens_per_doc: this model's tokenizer has no places")
        options: dict[str, Any] = {"add_special_tokens": False, "return_offsets_mapping": True}
        options |= {"truncation": True, "max_length": tokens}
        found = self._encoded([*texts], None, options)
        ends = (places[-1][1] if places else 0 for places in found["offset_mapping"])
        return [text[:end] for text, end in zip(texts, ends, strict=True)]

    def _encoded(self, texts: list[str], seconds: list[str] | None, options: Any) -> Any:
        try:
            with self._lock:  # truncation is a state of the tokenizer
                return self.tokenizer(texts, seconds, **options)
        except (UnicodeError, TypeError) as error:  # lone surrogates
            raise labs.InputError("the text is not valid Unicode") from error


def most_on(device: Any) -> int:
    """Return how many tokens one call may have on a device of torch."""
    return CPU_TOKENS if device.type == "cpu" else GPU_TOKENS


def check_length(name: str, tokens: int, limit: int) -> None:
    """Raise InputError unless a text, which `name` names, has a token and at most `limit`."""
    if not tokens:
        raise labs.InputError(f"{name}: the text has no tokens")
    if tokens > limit:
        error = labs.PromptTooLong(
            f"This model's maximum context length is {limit} tokens. However, {name} has {tokens} "
            "tokens: shorten it, or let it be cut (truncate_prompt_tokens = -1)"
        )
        error.param = name
        raise error


def _lower(tokenizer: Any) -> None:
    """Let a tokenizer write its texts in lower case first. Raises ModelError if it cannot."""
    import tokenizers

    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is None:
        raise labs.ModelError("do_lower_case: this model's tokenizer cannot be told to")
    steps = [tokenizers.normalizers.Lowercase()]
    steps += [] if backend.normalizer is None else [backend.normalizer]
    backend.normalizer = tokenizers.normalizers.Sequence(steps)


def limit_of(model: Any, tokenizer: Any, stated: int | None = None) -> int:
    """Return how many tokens a model reads at most. stated: by other files than its own."""
    import torch

    config = model.config.get_text_config()
    limits = [getattr(config, "max_position_embeddings", None), tokenizer.model_max_length]
    found = [stated] if stated else [each for each in limits if each and 0 < each < 10**9]
    for name, module in model.named_modules():  # RoBERTa's table also has rows for the padding
        if name.endswith("position_embeddings") and isinstance(module, torch.nn.Embedding):
            skipped = 0 if module.padding_idx is None else module.padding_idx + 1
            found.append(module.num_embeddings - skipped)
    return int(min(found, default=UNBOUNDED))


def batches(lengths: Sequence[int], most: int) -> Iterator[list[int]]:
    """Yield the places of rows that share a call, the longest first.

    lengths: in tokens. most: tokens of a call, padding included; a longer row has its own call.
    """
    group: list[int] = []
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        if group and (len(group) + 1) * lengths[group[0]] > most:
            yield group
            group = []
        group.append(place)
    if group:
        yield group


def padded(rows: Sequence[Row], device: Any, padding: int = 0) -> dict[str, Any]:
    """Return the arguments of one call, each [rows, tokens of the longest row].

    padding: the token id of padding, which no row attends to.
    """
    import torch

    length = max(len(row.ids) for row in rows)
    found = {"input_ids": torch.full((len(rows), length), padding)}
    found["attention_mask"] = torch.zeros_like(found["input_ids"])
    if rows[0].types:
        found["token_type_ids"] = torch.zeros_like(found["input_ids"])
    for place, row in enumerate(rows):
        size = len(row.ids)
        found["input_ids"][place, :size] = torch.tensor(row.ids)
        found["attention_mask"][place, :size] = 1
        if row.types:
            found["token_type_ids"][place, :size] = torch.tensor(row.types)
    return {name: each.to(device) for name, each in found.items()}


# ---------------------------------------------------------------- models that are read so


def weights_of(spec: labs.ModelSpec) -> dict[str, Any]:
    """Return the options of from_pretrained that are about weights.

    auto means float32 on a CPU, where the vectors are then those of the model's authors, and the
    dtype of the model's files elsewhere.
    """
    _, device, dtype = labs.device_of(spec)
    found = labs.TORCH_DTYPES[dtype]
    if spec.torch_dtype == "auto":
        found = "float32" if device == "cpu" else "auto"
    return {"dtype": found, "use_safetensors": spec.use_safetensors or None}


def place_of(spec: labs.ModelSpec) -> tuple[str, dict[str, Any], Any]:
    """Return (source for from_pretrained, its options, the device). Raises ModelError."""
    name, wanted, kind = spec.model_name, spec.device_map, labs.device_of(spec)[1]
    if name.endswith(".gguf"):
        raise labs.ModelError(f"{name}: GGUF files of this kind of model are not read")
    if wanted.startswith("{"):
        raise labs.ModelError(f"{name}: device_map can name one device for this kind of model")
    asked = spec.quantization
    quantised = asked.load_in_4bit or asked.load_in_8bit
    found = {name: getattr(spec, name) for name in ("adapter", "chat_template", "draft_model")}
    found |= {"quantization": quantised or asked.quant_method not in ("auto", "none")}
    found |= {"kv_dtype": asked.kv_dtype != "auto"}
    for word in (word for word, value in found.items() if value):
        hint = '; in its table, set quantization = { quant_method = "none" }'
        hint = hint if word in ("quantization", "kv_dtype") else ""
        raise labs.ModelError(f"{name}: {word} is for models of the kind text only{hint}")
    source, options, _ = labs.locate(spec, "fp32")
    return source, options, wanted if wanted.startswith(f"{kind}:") else kind
