# SPDX-License-Identifier: Apache-2.0
"""The stored vectors of documents that are nearest to a query.

    encoder = labs_nearest.Encoder(labs.ModelSpec(model_name="package:NAME/FOLDER"))
    vectors = encoder.documents(["Run pip."])      # with the model's prompt for documents
    keys = encoder.nearest("How is it installed?", 4, state, read)

labs_rag.py stores the vectors. Needs labs.py, labs_apart.py, labs_embed.py and labs_recipe.py;
torch.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import msgspec
from msgspec.structs import replace

import labs
import labs_apart
import labs_embed
import labs_recipe


def beside(config: labs.Config, name: str) -> labs.ModelSpec:
    """Return how an embedding model of this name is loaded beside a model for text.

    Neither its code nor pickles are trusted, whatever the settings of the other model are. Raises
    ConfigError for the name of a table, whose settings would have no effect.
    """
    if (table := config.models.get(name)) is not None:
        hint = f"give the model itself, {table.model.model_name}"
        raise labs.ConfigError(f"documents.embedding_model = {name} is a table: {hint}")
    unset: dict[str, Any] = dict.fromkeys(("revision", "adapter", "chat_template", "draft_model"))
    safe = {"trust_remote_code": False, "use_safetensors": True}
    rest = {"kind": "embedding", "quantization": labs.Quantization()}
    return replace(config.model, model_name=name, **unset, **safe, **rest)


class Encoder(labs_embed.Encoder):
    """An embedding model and the vectors of the last search; threads may share it."""

    def __init__(self, spec: labs.ModelSpec) -> None:
        super().__init__(spec)
        self._search = threading.Lock()
        self._searched: tuple[Any, list[int], Any] = (None, [], None)  # state, keys, vectors

    @property
    def nbytes(self) -> int:
        """Bytes of the weights and of the cached vectors; 0 before the first use."""
        vectors = self._searched[2]
        return self.weight_bytes + (0 if vectors is None else int(vectors.nbytes))

    def name_beside(self, stored: str | None) -> str:
        """Return the name under which vectors are stored; `stored`: the name of those there are.

        It names the model and, unless its files ask the usual, also what they ask.
        """
        name, usual = self.spec.model_name, labs_recipe.Recipe()
        if stored is not None and stored.partition(" #")[0] != name:
            return name  # another model's: no file of this one is read
        recipe = self.recipe
        prompts = {key: text for key, text in recipe.prompts.items() if text}
        asked = replace(recipe, max_tokens=None, prompts=prompts)
        digest = hashlib.sha256(msgspec.json.encode(asked)).hexdigest()[:8]
        return name if asked == usual else f"{name} #{digest}"

    def documents(self, texts: Sequence[str]) -> Any:
        """Return the vectors of documents with their prompt, if the model has one; see `encode`."""
        name = self.recipe.prompt_name(*labs_recipe.DOCUMENT_PROMPTS)
        return self.encode(texts, prompt_name=name, truncate=True)

    def nearest(
        self, text: str, k: int, state: Hashable, read: Callable[[], list[tuple[int, bytes]]]
    ) -> list[int]:
        """Return the keys of the k vectors most similar to a text, the most similar first.

        read: returns (key, vector as float16 bytes) pairs; called once for each new `state`.
        """
        import torch

        name = self.recipe.prompt_name("query")
        vector = self.encode([text], prompt_name=name, truncate=True)[0].half()
        with self._search:
            if self._searched[0] != state:
                rows = read()
                data = bytearray().join(row[1] for row in rows) or bytearray(2 * len(vector))
                matrix = torch.frombuffer(data, dtype=torch.float16).view(-1, len(vector))
                self._searched = state, [row[0] for row in rows], matrix
            _, keys, matrix = self._searched
        best = labs_apart.run(lambda: (matrix @ vector).topk(min(k, len(keys))).indices)
        return [keys[place] for place in best.tolist()]
