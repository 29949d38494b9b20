# SPDX-License-Identifier: Apache-2.0
"""Vectors of texts, made by an embedding model as its own files say.

    encoder = labs_embed.Encoder(labs.ModelSpec(model_name="package:NAME/FOLDER"))
    vectors = encoder.encode(["How is it installed?"])  # [texts, width]

The model is loaded at the first text. On a CPU it computes in float32 unless torch_dtype says
otherwise, elsewhere in the dtype of its files. Needs labs.py, labs_apart.py, labs_padded.py,
labs_pooling.py and labs_recipe.py; torch and transformers.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence
from typing import Any

import labs
import labs_apart
import labs_padded
import labs_pooling
import labs_recipe
from labs_padded import Row as Row


class Encoder:
    """An embedding model, which threads may share."""

    def __init__(self, spec: labs.ModelSpec) -> None:
        self.spec, self._lock = spec, threading.Lock()

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights; 0 before the first use."""
        if "_loaded" not in vars(self):
            return 0
        modules = [self._loaded.model, *self._loaded.layers]
        weights = [each.parameters() for each in modules if hasattr(each, "parameters")]
        return sum(int(weight.nbytes) for each in weights for weight in each)

    @functools.cached_property
    def _files(self) -> tuple[labs_recipe.Files, dict[str, Any], Any, labs_recipe.Recipe]:
        source, options, device = labs_padded.place_of(self.spec)
        files = labs_recipe.Files(source, options)
        return files, options, device, labs_recipe.read(files)

    @property
    def recipe(self) -> labs_recipe.Recipe:
        """What the model's files ask, read without its weights. Raises ModelError."""
        with self._lock:
            return self._files[3]

    @functools.cached_property
    def _loaded(self) -> labs_pooling.Loaded:
        """The loaded model; the caller holds the lock."""
        pickles = not self.spec.use_safetensors
        with labs.loading():
            files, options, device, recipe = self._files
            _check_kind(files, options)
            tokenizer = labs.pretrained("AutoTokenizer", files.source, options)
            options |= labs_padded.weights_of(self.spec)
            model = labs.pretrained("AutoModel", files.source, options).eval().to(device)
            layers = labs_pooling.layers(recipe, files, device, pickles=pickles)
            limit = labs_padded.limit_of(model, tokenizer, recipe.max_tokens)
            reader = labs_padded.Reader(tokenizer, limit, lower=recipe.lower)
            return labs_pooling.Loaded(model, reader, recipe, layers)

    def load(self) -> labs_pooling.Loaded:
        """Load the model unless it is loaded. Raises ModelError."""
        with self._lock:
            return self._loaded

    def tokens(
        self, texts: Sequence[str], *, prompt_name: str | None = None, cut: int | None = None
    ) -> list[Row]:
        """Return the tokens of texts behind a prompt of the model, by default its default prompt.

        cut: as in labs_padded.Reader. Raises InputError for a text without tokens or with too many.
        """
        loaded = self.load()
        prompt = loaded.recipe.prompt(prompt_name)
        rows = loaded.reader.read([prompt + text for text in texts], None, cut)
        for place, row in enumerate(rows):
            labs_padded.check_length(f"input[{place}]", len(row.ids), loaded.reader.limit)
        if not prompt or loaded.recipe.include_prompt:
            return rows
        (alone,) = loaded.reader.read([prompt])
        ends = alone.ids[-1] in loaded.reader.tokenizer.all_special_ids
        return [row._replace(skip=len(alone.ids) - ends) for row in rows]

    def given(self, ids: Sequence[Sequence[int]], *, cut: int | None = None) -> list[Row]:
        """Return token ids as the tokens of texts; nothing is added to them. cut: as in `tokens`.

        Raises InputError for an unknown token, and for none or too many of them.
        """
        loaded = self.load()
        most, limit = loaded.model.get_input_embeddings().num_embeddings, loaded.reader.limit
        for place, row in enumerate(ids):
            if wrong := [each for each in row if not 0 <= each < most]:
                text = f"{wrong[0]} is not a token id of this model, 0 to {most - 1}"
                raise labs.InputError(f"input[{place}]: {text}")
            labs_padded.check_length(f"input[{place}]", len(row[:cut]), limit)
        return [Row(row[:cut]) for row in ids]

    def vectors(
        self,
        rows: Sequence[Row],
        *,
        dimensions: int | None = None,
        stop: labs_pooling.Stop = lambda: None,
    ) -> Any:
        """Return the vectors [rows, width] of tokens in float32 on the CPU.

        dimensions: as in `encode`. stop: called before each forward call; its error ends the work.
        """
        loaded = self.load()
        wanted = loaded.dimensions(dimensions)
        return labs_apart.run(labs_pooling.vectors, loaded, rows, wanted, stop)

    def encode(
        self,
        texts: Sequence[str],
        *,
        prompt_name: str | None = None,
        dimensions: int | None = None,
        truncate: bool = False,
    ) -> Any:
        """Return the vectors [texts, width] of texts, in float32 on the CPU.

        prompt_name: a prompt of the model, such as "query"; by default its default prompt.
        dimensions: cut the vectors, if the model was trained for it. truncate: cut texts that are
        too long. Raises InputError for what the model cannot do.
        """
        if isinstance(texts, str):  # whose letters would be texts
            raise labs.InputError("encode reads several texts: put a single one into a list")
        cut = self.load().reader.limit if truncate else None
        rows = self.tokens(texts, prompt_name=prompt_name, cut=cut)
        return self.vectors(rows, dimensions=dimensions)


def _check_kind(files: labs_recipe.Files, options: dict[str, Any]) -> None:
    """Raise ModelError for a classifier, unless sentence-transformers has files for its vectors."""
    config = labs.pretrained("AutoConfig", files.source, options)
    found = next((n for n in config.architectures or () if n.endswith("Classification")), None)
    if found is not None and files.path("modules.json") is None:
        text = f"config.json names {found}, whose states are no vectors of texts"
        raise labs.ModelError(f'{files.source}: {text}; kind = "rerank" is for cross-encoders')
