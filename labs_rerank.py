# SPDX-License-Identifier: Apache-2.0
"""Scores of documents for a query, made by a cross-encoder as its own files say.

    scorer = labs_rerank.Scorer(labs.ModelSpec(model_name="FOLDER"))
    scores = scorer.rank("How is it installed?", ["Run pip.", "Whales sing."])  # [documents]

The model is a sequence classifier with one label. dtype: as in labs_embed.py. Needs
labs.py, labs_apart.py, labs_padded.py and labs_recipe.py; torch and transformers.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any

from msgspec import Struct

import labs
import labs_apart
import labs_padded
import labs_recipe
from labs_padded import Row as Row

ACTIVATIONS = ("Identity", "Sigmoid")  # classes of torch.nn


class RankFile(Struct, frozen=True):
    """What config_sentence_transformers.json and modules.json say of a cross-encoder."""

    activation_fn: str | None = None
    prompts: dict[str, str | None] = {}
    default_prompt_name: str | None = None


class Loaded(Struct, frozen=True, eq=False):
    """A loaded cross-encoder. activation: from the label's logit to the score."""

    model: Any
    reader: labs_padded.Reader
    activation: Any


class Scorer:
    """A cross-encoder; threads may share it. It is loaded at the first use."""

    def __init__(self, spec: labs.ModelSpec) -> None:
        self.spec, self._lock = spec, threading.Lock()

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights; 0 before the first use."""
        loaded = vars(self).get("_loaded")
        weights = () if loaded is None else loaded.model.parameters()
        return sum(int(each.nbytes) for each in weights)

    @functools.cached_property
    def _loaded(self) -> Loaded:
        """The loaded model; the caller holds the lock."""
        with labs.loading():
            source, options, device = labs_padded.place_of(self.spec)
            files = labs_recipe.Files(source, options)
            stated = _check_files(files)
            config = labs.pretrained("AutoConfig", source, options)
            _check_config(source, config)
            activation = _activation(source, stated, config)
            body = labs_recipe.transformer_file(files, "sequence-classification")
            tokenizer = labs.pretrained("AutoTokenizer", source, options)
            options |= labs_padded.weights_of(self.spec)
            kind = "AutoModelForSequenceClassification"
            model = labs.pretrained(kind, source, options).eval().to(device)
            if model.config.pad_token_id is None:  # by it, decoders find the last token
                model.config.pad_token_id = _padding(tokenizer)
            limit = labs_padded.limit_of(model, tokenizer, body.max_seq_length)
            reader = labs_padded.Reader(tokenizer, limit, lower=body.do_lower_case)
            return Loaded(model, reader, activation)

    def load(self) -> Loaded:
        """Load the model unless it is loaded. Raises ModelError."""
        with self._lock:
            return self._loaded

    def tokens(self, query: str, documents: Sequence[str], *, cut: int | None = None) -> list[Row]:
        """Return the tokens of each pair of the query and a document.

        cut: as in labs_padded.Reader. Raises InputError for a pair with too many tokens.
        """
        reader = self.load().reader
        rows = reader.read([query] * len(documents), documents, cut)
        for place, row in enumerate(rows):
            labs_padded.check_length(f"documents[{place}]", len(row.ids), reader.limit)
        return rows

    def shortened(self, documents: Sequence[str], tokens: int) -> list[str]:
        """Return the documents without what follows their first tokens."""
        return self.load().reader.shortened(documents, tokens)

    def scores(self, rows: Sequence[Row], *, stop: Callable[[], Any] = lambda: None) -> Any:
        """Return the scores [rows] of tokens in float32 on the CPU.

        stop: called before each forward call; its error ends the work.
        """
        return labs_apart.run(_scores, self.load(), rows, stop)

    def rank(self, query: str, documents: Sequence[str], *, truncate: bool = False) -> Any:
        """Return the score of each document for the query [documents], in float32 on the CPU.

        truncate: cut the longer text of a pair that is too long, instead of raising InputError.
        """
        if isinstance(documents, str):  # whose letters would be documents
            raise labs.InputError("rank reads several documents: put a single one into a list")
        cut = self.load().reader.limit if truncate else None
        return self.scores(self.tokens(query, documents, cut=cut))


def _padding(tokenizer: Any) -> int:
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(each for each in ids if each is not None)


def _scores(loaded: Loaded, rows: Sequence[Row], stop: Callable[[], Any]) -> Any:
    import torch

    device, pad = loaded.model.device, loaded.model.config.pad_token_id
    found = torch.empty(len(rows))
    for places in labs_padded.batches([len(row.ids) for row in rows], labs_padded.most_on(device)):
        stop()
        with torch.inference_mode():
            words = labs_padded.padded([rows[place] for place in places], device, pad)
            logits = loaded.model(**words).logits[:, 0].float()
            found[places] = loaded.activation(logits).cpu()
    if not found.isfinite().all():
        raise labs.GenerationError("the model gave no finite score; try torch_dtype = fp32")
    return found


# ---------------------------------------------------------------- files


def _check_files(files: labs_recipe.Files) -> RankFile:
    """Read what sentence-transformers states. Raises ModelError for what labs cannot do."""
    stated = files.read("config_sentence_transformers.json", RankFile) or RankFile()
    if any(stated.prompts.values()) or stated.default_prompt_name:
        raise labs.ModelError(f"{files.source}: labs has no prompts for cross-encoders")
    path = files.path("modules.json")
    modules = files.decode("modules.json", path, tuple[labs_recipe.ModuleFile, ...]) if path else ()
    kinds = [labs_recipe.kind_of(files, each) for each in modules]
    if kinds not in ([], ["Transformer"]):
        text = f"modules.json lists {', '.join(kinds)}; labs runs cross-encoders of one Transformer"
        raise labs.ModelError(f"{files.source}: {text}")
    return stated


def _check_config(source: str, config: Any) -> None:
    """Raise ModelError unless the model is a sequence classifier with one label."""
    names = config.architectures or ()
    if not any(name.endswith("ForSequenceClassification") for name in names):
        found = ", ".join(names) or "nothing"
        text = f"config.json names {found}; a cross-encoder is a ForSequenceClassification"
        raise labs.ModelError(f"{source}: {text}")
    if config.num_labels != 1:
        text = f"it has {config.num_labels} labels; a cross-encoder that ranks has one"
        raise labs.ModelError(f"{source}: {text}")


def _activation(source: str, stated: RankFile, config: Any) -> Any:
    """Return what turns a logit into a score: a sigmoid unless the files name another one."""
    import torch

    ours = getattr(config, "sentence_transformers", None)
    named = ours.get("activation_fn") if isinstance(ours, dict) else None
    named = named or getattr(config, "sbert_ce_default_activation_function", None)
    path = stated.activation_fn or named or "torch.nn.Sigmoid"
    package, _, name = str(path).rpartition(".")
    if package.partition(".")[0] != "torch" or name not in ACTIVATIONS:
        text = f"its activation is {path!r:.80}; labs has {' and '.join(ACTIVATIONS)}"
        raise labs.ModelError(f"{source}: {text}")
    return getattr(torch.nn, name)()
