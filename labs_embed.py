# SPDX-License-Identifier: Apache-2.0
"""Vectors of texts, made by an embedding model as its own files say.

    encoder = labs_embed.Encoder(labs.ModelSpec(model_name="package:NAME/FOLDER"))
    vectors = encoder.encode(["How is it installed?"])  # [texts, width]

The model is loaded at the first text. On a CPU it computes in float32 unless torch_dtype says
otherwise, elsewhere in the dtype of its files. Needs labs.py, labs_apart.py, labs_padded.py and
labs_pooling.py; torch and transformers.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any

from msgspec import Struct

import labs
import labs_apart
import labs_padded
import labs_pooling
from labs_padded import Row as Row

Stop = Callable[[], Any]
CPU_TOKENS, GPU_TOKENS = 2048, 2**16  # of a call, with padding: more is slower, or memory


class Loaded(Struct, frozen=True, eq=False):
    """A loaded embedding model. layers: what follows the pooling, as functions of vectors."""

    model: Any
    reader: labs_padded.Reader
    recipe: labs_pooling.Recipe
    layers: list[Any]

    @property
    def width(self) -> int:
        """The dimensions of the vectors before they are cut."""
        widths = [each.out_features for each in self.layers if hasattr(each, "out_features")]
        hidden = self.model.config.get_text_config().hidden_size * len(self.recipe.modes)
        return int(widths[-1] if widths else hidden)

    def dimensions(self, asked: int | None) -> int:
        """Return how many dimensions vectors get. Raises InputError for others than trained ones.

        A model's files state these as matryoshka_dimensions, is_matryoshka or truncate_dim.
        """
        width, config = self.width, self.model.config
        if asked is None:
            return min(self.recipe.dimensions or width, width)
        known = {width, *(getattr(config, "matryoshka_dimensions", None) or ())}
        known |= {self.recipe.dimensions} if self.recipe.dimensions else set()
        free = getattr(config, "is_matryoshka", False) and len(known) == 1
        if asked in known or (free and 1 <= asked <= width):
            return asked
        choice = ", ".join(map(str, sorted(known))) if not free else f"1 to {width}"
        text = f"dimensions: the vectors of this model can have {choice} dimensions, not {asked}"
        raise labs.InputError(text)


def dtype_of(spec: labs.ModelSpec) -> str:
    """Return the dtype of an embedding model or a cross-encoder for from_pretrained."""
    _, device, dtype = labs.device_of(spec)
    if spec.torch_dtype == "auto":
        return "float32" if device == "cpu" else "auto"
    return labs.TORCH_DTYPES[dtype]


def place_of(spec: labs.ModelSpec) -> tuple[str, dict[str, Any], Any]:
    """Return (source for from_pretrained, its options, the device). Raises ModelError."""
    if spec.model_name.endswith(".gguf"):
        raise labs.ModelError(f"{spec.model_name}: GGUF files of this kind of model are not read")
    if spec.quantization != labs.Quantization():
        raise labs.ModelError(f"{spec.model_name}: quantization is for models of kind text only")
    wanted = spec.device_map
    kind = labs.device_of(spec)[1]
    source, options, _ = labs.locate(spec, "fp32")
    return source, options, wanted if wanted.startswith(f"{kind}:") else kind


class Encoder:
    """An embedding model and the vectors of the last search; threads may share it."""

    def __init__(self, spec: labs.ModelSpec) -> None:
        self.spec, self._lock = spec, threading.Lock()
        self._searched: tuple[Any, list[int], Any] = (None, [], None)  # state, keys, vectors

    @property
    def nbytes(self) -> int:
        """Bytes of the weights and of the cached vectors; 0 before the first use."""
        vectors = self._searched[2]
        return self.weight_bytes + (0 if vectors is None else int(vectors.nbytes))

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights; 0 before the first use."""
        if "_loaded" not in vars(self):
            return 0
        modules = [self._loaded.model, *self._loaded.layers]
        weights = [each.parameters() for each in modules if hasattr(each, "parameters")]
        return sum(int(weight.nbytes) for each in weights for weight in each)

    @functools.cached_property
    def _files(self) -> tuple[str, dict[str, Any], Any, labs_pooling.Recipe]:
        source, options, device = place_of(self.spec)
        return source, options, device, labs_pooling.read(source, options)

    @property
    def recipe(self) -> labs_pooling.Recipe:
        """What the model's files ask, read without its weights. Raises ModelError."""
        with self._lock:
            return self._files[3]

    @functools.cached_property
    def _loaded(self) -> Loaded:
        """The loaded model; the caller holds the lock."""
        pickles = not self.spec.use_safetensors
        with labs.loading():
            source, options, device, recipe = self._files
            tokenizer = labs.pretrained("AutoTokenizer", source, options)
            weights = {"use_safetensors": None if pickles else True, "dtype": dtype_of(self.spec)}
            model = labs.pretrained("AutoModel", source, options | weights).eval().to(device)
            files = labs_pooling.Files(source, options)
            layers = labs_pooling.layers(recipe, files, device, pickles=pickles)
            limit = labs_padded.limit_of(model, tokenizer, recipe.max_tokens)
            reader = labs_padded.Reader(tokenizer, limit, lower=recipe.lower)
            return Loaded(model, reader, recipe, layers)

    def load(self) -> Loaded:
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

    def vectors(
        self, rows: Sequence[Row], *, dimensions: int | None = None, stop: Stop = lambda: None
    ) -> Any:
        """Return the vectors [rows, width] of tokens in float32 on the CPU.

        dimensions: as in `encode`. stop: called before each forward call; its error ends the work.
        """
        loaded = self.load()
        wanted = loaded.dimensions(dimensions)
        return labs_apart.run(_vectors, loaded, rows, wanted, stop)

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
        cut = self.load().reader.limit if truncate else None
        rows = self.tokens(texts, prompt_name=prompt_name, cut=cut)
        return self.vectors(rows, dimensions=dimensions)

    def nearest(
        self, text: str, k: int, state: Hashable, read: Callable[[], list[tuple[int, bytes]]]
    ) -> list[int]:
        """Return the keys of the k vectors most similar to a text, the most similar first.

        read: returns (key, vector as float16 bytes) pairs; called once for each new `state`.
        """
        import torch

        name = self.recipe.prompt_name("query")
        vector = self.encode([text], prompt_name=name, truncate=True)[0].half()
        with self._lock:
            if self._searched[0] != state:
                rows = read()
                data = bytearray().join(row[1] for row in rows) or bytearray(2 * len(vector))
                matrix = torch.frombuffer(data, dtype=torch.float16).view(-1, len(vector))
                self._searched = state, [row[0] for row in rows], matrix
            _, keys, matrix = self._searched
        best = labs_apart.run(lambda: (matrix @ vector).topk(min(k, len(keys))).indices)
        return [keys[place] for place in best.tolist()]


def _vectors(loaded: Loaded, rows: Sequence[Row], dimensions: int, stop: Stop) -> Any:
    import torch

    device, pad = loaded.model.device, loaded.reader.tokenizer.pad_token_id or 0
    most = CPU_TOKENS if device.type == "cpu" else GPU_TOKENS
    found = torch.empty(len(rows), dimensions)
    for places in labs_padded.batches([len(row.ids) for row in rows], most):
        stop()
        part = [rows[place] for place in places]
        with torch.inference_mode():
            words = labs_padded.padded(part, device, pad)
            states = loaded.model(**words).last_hidden_state
            skips = torch.tensor([row.skip for row in part], device=device)
            vectors = labs_pooling.pool(loaded.recipe, states, words["attention_mask"], skips)
            for layer in loaded.layers:
                vectors = layer(vectors)
            if dimensions < vectors.shape[1]:
                vectors = vectors[:, :dimensions]
                if loaded.recipe.normalizes:
                    vectors = torch.nn.functional.normalize(vectors, dim=-1)
            found[places] = vectors.cpu()
    if not found.isfinite().all():
        raise labs.GenerationError("the model gave no finite vector; try torch_dtype = fp32")
    return found
