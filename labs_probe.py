# SPDX-License-Identifier: Apache-2.0
"""Try at load, on a few tokens, how a model can run; names and configurations do not say enough.

    decoder = labs_probe.tried(labs_decode.prepare(model))  # its rows join, or run alone

This file needs labs_decode.py and labs_cache.py.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import math
import random
import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

import labs_cache
import labs_decode
from labs_decode import Batch, Decoder, Mode, Row, Sampling, Tensor

PROMPTS = (11, 4, 7)  # tokens of the rows; the first is written in two chunks and leaves first
SAME = 9  # tokens that the first and the fourth text have in common
MORE = 8  # tokens of each text after its prompt
OFF = 0.01  # share of the logits' spread, in float32; measured: right below 2e-5, wrong above 0.05
OFF_IN_16_BITS = 0.15  # for a row's median; single tokens of mixtures of experts reach 0.3

Logits = Iterator[tuple[int, int, Tensor]]  # index of a text, position in it, logits after it
Found = dict[str, Any]  # mode and reason of a Decoder; cuts, packs: whether prefixes, packing work


@torch.inference_mode()
def tried(decoder: Decoder, cache: str | None = None) -> Decoder:
    """Return the decoder in its mode, or in the fastest slower one that has the model's own logits.

    cache: the folder where results are stored. Raises ValueError if the model attends in both
    directions, or fails even alone.
    """
    file = labs_cache.cache_folder(cache) / f".tried-{_key(decoder)}"
    found = _recall(file)
    try:
        if found is None and (found := _find(decoder)) is None:
            return decoder
    except (RuntimeError, MemoryError) as error:
        if not labs_decode.out_of_memory(error):
            raise
        return decoder
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(found), encoding="utf-8")
    return _as_found(decoder, found)


def _find(decoder: Decoder) -> Found | None:
    """Return the first mode that gives the model's logits; None if the logits are not numbers."""
    with _own_attention(decoder):
        own = Own.of(decoder.model)
    kind, why = decoder.config.model_type, own.fault
    if any(each.isnan().any() for each in own.logits):
        return None
    # Some models that attend to a whole prompt are made for it; those run alone, as in `generate`.
    fills_gaps = decoder.mode != "alone" or kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if own.looks_both_ways and fills_gaps:
        raise ValueError(f"{kind} attends in both directions, as masked language models do")
    modes: dict[Mode, tuple[Mode, ...]]
    modes = {"joins": ("joins", "whole"), "whole": ("whole",), "alone": ()}
    for mode in () if own.fault else modes[decoder.mode]:
        way, same = replace(decoder, mode=mode), mode == decoder.mode
        if wrong := own.wrong(_together(way, own.texts)):
            why = why or wrong
            continue
        cuts = same and way.can_reuse_prefix and not own.wrong(_guesses(way, own.texts))
        packs = same and way.prefill_packed is not None and not own.wrong(_packed(way, own.texts))
        reason = decoder.reason if same else f"tried at load: with its prompt in chunks, {why}"
        return {"mode": mode, "reason": reason, "cuts": cuts, "packs": packs}
    reason = decoder.reason if decoder.mode == "alone" else f"tried at load: {why}"
    with _own_attention(decoder):
        if fault := _wrong_alone(replace(decoder, mode="alone"), own):
            raise ValueError(f"{kind} {fault}")
    return {"mode": "alone", "reason": reason, "cuts": False, "packs": False}


def _as_found(decoder: Decoder, found: Found) -> Decoder:
    decoder = replace(
        decoder,
        mode=found["mode"],
        reason=found["reason"],
        can_reuse_prefix=decoder.can_reuse_prefix and found["cuts"],
        prefill_packed=decoder.prefill_packed if found["packs"] else None,
    )
    if decoder.mode != "alone":
        return decoder
    _choose_attention(decoder.came_with)
    return replace(decoder, packable=False, invariant=False, duplicates_lone_row=False)


@contextlib.contextmanager
def _own_attention(decoder: Decoder) -> Iterator[None]:
    """Give the model the attention that it came with inside a `with` block."""
    chosen = [(config, config._attn_implementation) for config, _ in decoder.came_with]
    _choose_attention(decoder.came_with)
    try:
        yield
    finally:
        _choose_attention(chosen)


def _choose_attention(names: Iterable[tuple[Any, str]]) -> None:
    for config, name in names:
        config._attn_implementation_internal = name  # transformers' setter would check the name


def _key(decoder: Decoder) -> str:
    """Return a digest of everything that the result depends on, which the weights are not."""
    model = decoder.model
    sources = [inspect.getsourcefile(each) for each in (type(model), Decoder, tried)]
    code = [Path(each).read_bytes().hex() for each in sources if each and Path(each).is_file()]
    versions = [str(torch.__version__), transformers.__version__, torch.__config__.show()]
    kind = [str(model.dtype), str(model.device), model.config.to_json_string()]
    kind += [str(decoder.invariant), str(decoder.prefill_packed is None)]
    return hashlib.sha256(json.dumps([*kind, *versions, *code]).encode()).hexdigest()[:32]


def _recall(file: Path) -> Found | None:
    kinds = {"mode": str, "reason": str, "cuts": bool, "packs": bool}
    with contextlib.suppress(OSError, ValueError, AttributeError):
        found: Found = json.loads(file.read_text(encoding="utf-8"))
        known = {name: type(value) for name, value in found.items()} == kinds
        return found if known and found["mode"] in ("joins", "whole", "alone") else None
    return None


# ---------------------------------------------------------------- what is tried


@dataclass(frozen=True, slots=True)
class Own:
    """Three texts with the logits [T, V] of transformers' own forward without a cache.

    A fourth text is the first one with another second half. most: the largest accepted difference.
    fault: why there are no logits.
    """

    texts: list[list[int]]
    logits: list[Tensor]
    most: float
    fault: str

    @classmethod
    def of(cls, model: Any) -> Own:
        config, chance = model.config.get_text_config(), random.Random(0)
        named = {**vars(model.config), **vars(config)}.items()
        special = {value for name, value in named if "_token" in name and isinstance(value, int)}
        plain = [each for each in range(min(config.vocab_size, 2**15)) if each not in special]
        texts = [chance.choices(plain, k=length + MORE) for length in PROMPTS]
        texts.append(texts[0][:SAME] + chance.choices(plain, k=len(texts[0]) - SAME))
        try:
            logits, fault = [_plain_logits(model, text) for text in texts], ""
        except Exception as error:  # a model's code may raise anything
            if labs_decode.out_of_memory(error):
                raise
            logits, fault = [], f"its forward fails on token ids alone ({_line(error)})"
        most = OFF if model.dtype == torch.float32 else OFF_IN_16_BITS
        # Other rows of a call change the rounding of 8-bit products: only failures count.
        most = math.inf if hasattr(model.config, "quantization_config") else most
        return cls(texts, logits, most, fault)

    @property
    def looks_both_ways(self) -> bool:
        """Whether later tokens change the logits of earlier ones."""
        offs = [_off(self.logits[3][i], self.logits[0][i]) for i in range(SAME) if self.logits]
        return bool(offs) and statistics.median(offs) > self.most / 3

    def wrong(self, found: Logits) -> str:
        """Return what is wrong with the logits found, as a phrase, or "" if nothing is."""
        offs = defaultdict[int, list[float]](list)
        try:
            for text, place, logits in found:
                offs[text].append(_off(logits, self.logits[text][place]))
        except Exception as error:  # a model's code may raise anything
            if labs_decode.out_of_memory(error):
                raise
            return f"rows of different length fail ({_line(error)})"
        worst = max(statistics.median(each) for each in offs.values())
        return "" if worst <= self.most else f"rows have other logits than alone ({worst:.0%} off)"


def _plain_logits(model: Any, text: list[int]) -> Tensor:
    words = {"input_ids": torch.tensor([text], device=model.get_input_embeddings().weight.device)}
    known = inspect.signature(model.forward).parameters
    flags = {name: False for name in ("use_cache",) if name in known}
    return model(**words, **flags, return_dict=True).logits[0].float()  # type: ignore[no-any-return]


def _off(found: Tensor, expected: Tensor) -> float:
    """Return the difference of logits as a share of the spread of the expected ones."""
    found, expected = found.flatten().float(), expected.flatten().to(found.device)
    at = expected.isfinite()  # some models mask the tokens that pad their vocabulary
    spread = (expected[at] - expected[at].mean()).norm().clamp_min(torch.finfo(torch.float32).tiny)
    off = float((found[at] - expected[at]).norm() / spread)
    return off if off == off else math.inf


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"[:160]


def _newcomer(decoder: Decoder, texts: list[list[int]], index: int) -> Batch:
    row = Row(
        id=index,
        ids=texts[index][: PROMPTS[index]],
        max_new_tokens=2 * MORE,
        sampling=Sampling(),
    )
    return labs_decode.new_batch(decoder, row)


def _prefilled(decoder: Decoder, texts: list[list[int]], index: int) -> Batch:
    """Write a prompt; write the first one in two chunks, as if its second half came later."""
    batch = _newcomer(decoder, texts, index)
    row, rest = batch.rows[0], list[int]()
    if index == 0 and decoder.mode == "joins":
        row.ids, rest = row.ids[:5], row.ids[5:]
        row.prompt_length = len(row.ids)
        batch = labs_decode.prefill(decoder, batch)
        row.ids, row.prompt_length = row.ids + rest, PROMPTS[0]
    while batch.pending:
        batch = labs_decode.prefill(decoder, batch)
    return batch


def _stepped(decoder: Decoder, batch: Batch, texts: list[list[int]]) -> Logits:
    logits = labs_decode.forward(decoder, batch) if batch.logits is None else batch.logits
    for row, line in zip(batch.rows, logits, strict=True):
        yield row.id, len(row.ids) - 1, line
        row.take(texts[row.id][len(row.ids)], batch.logits is None)


def _together(decoder: Decoder, texts: list[list[int]]) -> Logits:
    """Yield the logits of three rows that join one after the other until the first one leaves."""
    batch: Batch | None = None
    for index in range(len(PROMPTS)):
        newcomer = _prefilled(decoder, texts, index)
        yield from _stepped(decoder, newcomer, texts)
        newcomer = replace(newcomer, logits=None)
        batch = labs_decode.join(batch, newcomer) if batch else newcomer
        yield from _stepped(decoder, batch, texts)
    for _ in range(2):
        batch = labs_decode.keep(batch, [1, 2]) if batch else None
        yield from _stepped(decoder, batch, texts) if batch else ()


def _guesses(decoder: Decoder, texts: list[list[int]]) -> Logits:
    """Yield the logits of three tokens of one row, computed as rows that read the same slot."""
    batch, row = (found := _prefilled(decoder, texts, 1)), found.rows[0]
    ids = torch.tensor(texts[1][row.written : row.written + 3], device=decoder.device)
    places = [row.written + i for i in range(len(ids))]
    logits = labs_decode.forward_slots(decoder, batch, ids[:, None], places)
    yield from zip([1] * len(ids), places, logits, strict=True)


def _packed(decoder: Decoder, texts: list[list[int]]) -> Logits:
    """Yield the logits of three prompts that are written in one call."""
    newcomers = [_newcomer(decoder, texts, index) for index in range(len(PROMPTS))]
    together = decoder.prefill_packed(decoder, newcomers) if decoder.prefill_packed else []
    for index, batch in enumerate(together):
        if batch.logits is not None:
            yield index, PROMPTS[index] - 1, batch.logits


def _wrong_alone(decoder: Decoder, own: Own) -> str:
    """Return how a model that runs alone differs from its own `generate`, as a phrase, or ""."""
    prompt = torch.tensor([own.texts[0][: PROMPTS[0]]], device=decoder.device)
    options = {"attention_mask": torch.ones_like(prompt), "do_sample": False, "num_beams": 1}
    options |= {"max_new_tokens": 3, "output_logits": True, "return_dict_in_generate": True}
    try:
        batch, found = _newcomer(decoder, own.texts, 0), list[Tensor]()
        for _ in range(3):
            found.append(labs_decode.forward(decoder, batch))
            batch.rows[0].take(int(found[-1].argmax()))
    except Exception as error:  # a model's code may raise anything
        if labs_decode.out_of_memory(error):
            raise
        return f"cannot generate from token ids alone ({_line(error)})"
    with contextlib.suppress(Exception):  # labs runs some models that generate does not
        expected = decoder.model.generate(prompt, **options).logits
        if any(_off(*pair) > own.most for pair in zip(found[:1], expected[:1], strict=True)):
            return "gives other logits in labs than in transformers' generate"
    return ""
