# SPDX-License-Identifier: Apache-2.0
"""Apply what a model's own files recommend: generation_config.json and special tokens.

    settings, defaults = labs_defaults.read(model, tokenizer, eos_token_ids, values)
    sampling = defaults.apply(sampling, prompt_ids, max_new_tokens)

Each field of transformers' GenerationConfig is in one of the tables below. transformers' own
processors compute the rules, for one row and in transformers' order, so that greedy tokens are
those of `model.generate`. Needs labs_settings.py, labs_decode.py, torch and transformers.
"""

from __future__ import annotations

import logging
import sys
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import transformers

import labs_settings
from labs_decode import PretrainedModel, Processor, Sampling, Tensor, Tokenizer, upload

log = logging.getLogger("labs")

# fmt: off
# Fields that are settings of labs too, with the same bounds.
SETTINGS = {
    "do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "stop_strings",
}
# Processors before repetition_penalty, all processors, and those that apply to sampling only.
EARLY = {"sequence_bias", "encoder_repetition_penalty"}
RULES = EARLY | {
    "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids", "min_length",
    "min_new_tokens", "forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values",
    "suppress_tokens", "begin_suppress_tokens", "exponential_decay_length_penalty",
}
WARPERS = {"top_h", "typical_p", "epsilon_cutoff", "eta_cutoff", "watermarking_config"}
# Fields that change no text: speed, outputs, what is read elsewhere, details of NOT_DONE's methods.
NEUTRAL = {
    "use_cache", "cache_implementation", "cache_config", "max_cache_len", "prefill_chunk_size",
    "compile_config", "disable_compile", "continuous_batching_config", "low_memory", "use_mtp",
    "prompt_lookup_num_tokens", "max_matching_ngram_size", "speculation_type", "is_assistant",
    "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold",
    "assistant_early_exit", "assistant_lookbehind", "target_lookbehind",
    "assistant_ensemble_weight", "early_stopping", "length_penalty", "num_beam_groups",
    "diversity_penalty", "output_attentions", "output_hidden_states", "output_scores",
    "output_logits", "return_dict_in_generate", "pad_token_id", "bos_token_id", "eos_token_id",
    "decoder_start_token_id", "renormalize_logits", "transformers_version",
}
# fmt: on
# labs' own settings decide on length and number of answers: reported, but without a warning.
LENGTHS = {
    **dict.fromkeys(("max_length", "max_new_tokens"), "max_new_tokens of labs decides"),
    **{"max_time": "timeout_s of labs decides", "num_return_sequences": "a request says how many"},
}
NOT_DONE = {
    "num_beams": "labs has no beam search",
    "guidance_scale": "labs does not compute a second, unconditional answer",
    "token_healing": "labs does not change the end of a prompt",
    **dict.fromkeys(("penalty_alpha", "dola_layers"), "labs does not contrast answers"),
    **dict.fromkeys(("constraints", "force_words_ids"), "labs has no constrained beams"),
}


@dataclass(frozen=True, slots=True, eq=False)
class Defaults:
    """The recommendations of a model's files that are not settings.

    rules: fields that apply to each row, by transformers' names. ignored: {other field: reason}.
    special_tokens: {id: text} of tokens that no answer shows, the longest first.
    """

    model: PretrainedModel
    eos_token_ids: frozenset[int]
    rules: Mapping[str, Any]
    ignored: Mapping[str, str]
    special_tokens: Mapping[int, str]

    def changed(self, ends: frozenset[int], **rules: Any) -> Defaults:
        """Return the same for a row with these ends and rules of its own."""
        return replace(self, eos_token_ids=ends, rules={**self.rules, **rules})

    def apply(self, sampling: Sampling, prompt: list[int], max_new_tokens: int) -> Sampling:
        """Return the sampling of one row: its own options together with the model's rules."""
        if not self.rules:
            return sampling
        first = {name: value for name, value in self.rules.items() if name in RULES}
        last = {name: value for name, value in self.rules.items() if name in WARPERS}
        taken: dict[str, Any] = {}
        if EARLY & first.keys():
            first["repetition_penalty"] = sampling.repetition_penalty
            taken["repetition_penalty"] = 1.0
        if last and sampling.temperature:
            options = {name: getattr(sampling, name) for name in ("temperature", "top_k", "top_p")}
            last |= {**options, "min_p": sampling.min_p or None, "do_sample": True}
            taken |= {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
        early, late = (self._processors(each, prompt, max_new_tokens) for each in (first, last))
        return replace(sampling, processors=(_RowRules(early, sampling.processors, late),), **taken)

    def _processors(self, values: Mapping[str, Any], prompt: list[int], new: int) -> Any:
        device, config = self.model.device, transformers.GenerationConfig()  # type: ignore[no-untyped-call]
        for name, value in values.items():
            setattr(config, name, value)
        config.max_length = len(prompt) + new
        eos = torch.tensor(sorted(self.eos_token_ids), device=device)
        config._eos_token_tensor = eos if len(eos) else None
        ids = torch.tensor([prompt], device=device)
        options = {"input_ids_seq_length": len(prompt), "encoder_input_ids": ids, "device": device}
        return self.model._get_logits_processor(config, **options)

    def described(self) -> dict[str, str]:
        """Return {field: its value, or the reason why it has no effect}."""
        return {name: repr(value)[:200] for name, value in self.rules.items()} | {**self.ignored}

    def mark(self, stops: tuple[str, ...]) -> tuple[dict[str, str], dict[int, str]]:
        """Make special tokens in stop strings findable: an unused character replaces each.

        Returns ({text to search for: its stop string}, {token id: its character}).
        """
        coded, marks = {stop: stop for stop in stops}, dict[int, str]()
        for token, text in self.special_tokens.items() if stops else ():
            if any(text in stop for stop in stops):
                marks[token] = chr(sys.maxunicode - len(marks))
                coded = {each.replace(text, marks[token]): stop for each, stop in coded.items()}
        return {stop: stop for stop in stops} | coded, marks


@dataclass(frozen=True, slots=True)
class _RowRules:
    """Apply the model's rules, then the request's processors, then warpers, as transformers does.

    If no token satisfies rules and processors (a grammar), the rules are skipped.
    """

    first: Any
    asked: tuple[Processor, ...]
    last: Any

    def __call__(self, ids: list[int], logits: Tensor) -> Tensor:
        known = upload([ids], logits.device)
        for scores in (self.first(known, logits[None].clone())[0], logits):
            for processor in self.asked:
                scores = processor(ids, scores)
            if not self.asked or scores.isfinite().any():
                break
        return cast("Tensor", self.last(known, scores[None])[0])


def read(
    model: PretrainedModel, tokenizer: Tokenizer, eos: frozenset[int], values: dict[str, Any]
) -> tuple[dict[str, object], Defaults]:
    """Return (settings, Defaults) for the values of a GenerationConfig.

    Raises ModelError when it asks for beam search, without which the whole text would differ.
    """
    plain = {name: value for name, value in values.items() if name in SETTINGS}
    if texts := plain.pop("stop_strings", None):
        plain["stop"] = [texts] if isinstance(texts, str) else texts
    settings, ignored = labs_settings.recommended(plain)
    rules, known = dict[str, Any](), vars(transformers.GenerationConfig())  # type: ignore[no-untyped-call]
    for name in values.keys() & known.keys() - SETTINGS - NEUTRAL:
        value = values[name]
        if name in RULES | WARPERS:
            works, why = _try(Defaults(model, eos, {name: value}, {}, {}))
            rules |= {name: value} if works else {}
        else:
            asks = value is True or (value and value != 1)
            why = (LENGTHS | NOT_DONE).get(name, "labs does not know it") if asks else ""
        ignored |= {name: f"{repr(value)[:60]} is not used: {why}"} if why else {}
    if "num_beams" in ignored:
        text = f"the model recommends {values['num_beams']} beams, and labs has no beam search"
        remedy = "set use_generation_config = false to ignore all that it recommends"
        raise labs_settings.ModelError(f"{model.name_or_path}: {text}: {remedy}")
    for name in sorted(ignored.keys() - LENGTHS.keys()):
        log.warning("%s: generation_config.json: %s = %s", model.name_or_path, name, ignored[name])
    seen = weakref.proxy(model)  # a holder of Defaults must not keep the weights in memory
    return settings, Defaults(seen, eos, rules, ignored, _special_tokens(tokenizer, eos))


def _special_tokens(tokenizer: Tokenizer, eos: frozenset[int]) -> dict[int, str]:
    added = getattr(tokenizer, "added_tokens_decoder", {})
    ids = {*eos, *tokenizer.all_special_ids, *(i for i in added if added[i].special)}
    texts = {i: str(added[i] if i in added else tokenizer.decode([i])) for i in ids}
    return {i: texts[i] for i in sorted(ids, key=lambda i: -len(texts[i])) if texts[i]}


def _try(rules: Defaults) -> tuple[bool, str]:
    """Return (whether a rule has an effect, its error), from the first steps of a row."""
    width, device = rules.model.config.get_text_config().vocab_size, rules.model.device
    try:
        row: Any = rules.apply(Sampling(temperature=1.0), [0], 2).processors[0]
        for length in (1, 2, 3):
            row([0] * length, torch.zeros(width, device=device))
    except Exception as error:  # transformers fails in many ways at wrong values
        return False, (str(error).strip() or type(error).__name__).splitlines()[0]
    return bool(row.first or row.last), ""
