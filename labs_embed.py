# SPDX-License-Identifier: Apache-2.0
"""Vectors of texts, made by an embedding model.

    encoder = labs_embed.Encoder(labs.ModelSpec(model_name="package:NAME/FOLDER"))
    vectors = encoder.encode(["How is it installed?"])  # [texts, width], each of length 1

The model is loaded at the first text. Needs labs.py, torch and transformers.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Hashable
from typing import Any

import labs
import labs_apart


class Encoder:
    """An embedding model and the vectors of the last search; threads may share it."""

    def __init__(self, spec: labs.ModelSpec) -> None:
        self.spec, self._lock = spec, threading.Lock()
        self._searched: tuple[Any, list[int], Any] = (None, [], None)  # state, keys, vectors

    @property
    def nbytes(self) -> int:
        """Bytes of the weights and of the cached vectors; 0 before the first use."""
        vectors = self._searched[2]
        held = [] if vectors is None else [vectors]
        held += self._loaded[1].parameters() if "_loaded" in vars(self) else []
        return sum(int(each.nbytes) for each in held)

    @functools.cached_property
    def _loaded(self) -> tuple[Any, Any]:
        """The tokenizer and the model; the caller holds the lock."""
        spec = self.spec
        with labs.loading():
            _, device, dtype = labs.device_of(spec)
            source, options, _ = labs.locate(spec, dtype)
            tokenizer = labs.pretrained("AutoTokenizer", source, options)
            options |= {"use_safetensors": spec.use_safetensors or None}
            options |= {"dtype": labs.TORCH_DTYPES[dtype]}
            return tokenizer, labs.pretrained("AutoModel", source, options).eval().to(device)

    def encode(self, texts: list[str]) -> Any:
        """Return vectors [texts, width] of length 1: the mean of each text's last hidden states."""
        return labs_apart.run(self._encode, texts)

    def _encode(self, texts: list[str]) -> Any:
        import torch

        with self._lock:
            tokenizer, model = self._loaded
            limit = getattr(model.config, "max_position_embeddings", None) or 512
            cut = {"truncation": True, "max_length": min(tokenizer.model_max_length, limit)}
            words = tokenizer(texts, return_tensors="pt", padding=True, **cut).to(model.device)
        with torch.inference_mode():
            states = model(**words).last_hidden_state.float()
            total = (states * words["attention_mask"].unsqueeze(-1)).sum(1)
            return torch.nn.functional.normalize(total, dim=-1).cpu()

    def nearest(
        self, text: str, k: int, state: Hashable, read: Callable[[], list[tuple[int, bytes]]]
    ) -> list[int]:
        """Return the keys of the k vectors most similar to a text, the most similar first.

        read: returns (key, vector as float16 bytes) pairs; called once for each new `state`.
        """
        import torch

        vector = self.encode([text])[0].half()
        with self._lock:
            if self._searched[0] != state:
                rows = read()
                data = bytearray().join(row[1] for row in rows) or bytearray(2 * len(vector))
                matrix = torch.frombuffer(data, dtype=torch.float16).view(-1, len(vector))
                self._searched = state, [row[0] for row in rows], matrix
            _, keys, matrix = self._searched
        best = labs_apart.run(lambda: (matrix @ vector).topk(min(k, len(keys))).indices)
        return [keys[place] for place in best.tolist()]
