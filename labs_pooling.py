# SPDX-License-Identifier: Apache-2.0
"""The states of an embedding model become one vector per text.

    vectors = labs_pooling.vectors(loaded, rows, dimensions, stop)      # [texts, dimensions]
    pooled = labs_pooling.pool(recipe, states, mask, skips)             # [texts, width]

Needs labs.py, labs_padded.py and labs_recipe.py; torch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from msgspec import Struct

import labs
import labs_padded
from labs_recipe import Files, Recipe

Stop = Callable[[], Any]


class Loaded(Struct, frozen=True, eq=False):
    """A loaded embedding model. layers: what follows the pooling, as functions of vectors."""

    model: Any
    reader: labs_padded.Reader
    recipe: Recipe
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
        stated = getattr(config, "matryoshka_dimensions", None)
        trained = [*stated] if isinstance(stated, list | tuple) else []
        trained = [each for each in trained if type(each) is int and 1 <= each <= width]
        usual = min(self.recipe.dimensions or width, width)
        known = {*trained, width, usual}
        if asked is None:
            return usual
        free = getattr(config, "is_matryoshka", False) is True and len(known) == 1
        if asked in known or (free and 1 <= asked <= width):
            return asked
        choice = ", ".join(map(str, sorted(known))) if not free else f"1 to {width}"
        text = f"dimensions: the vectors of this model can have {choice}, not {asked}"
        raise labs.InputError(text)


def vectors(loaded: Loaded, rows: Sequence[labs_padded.Row], dimensions: int, stop: Stop) -> Any:
    """Return the vectors [rows, dimensions] of tokens in float32 on the CPU.

    stop: called before each forward call; its error ends the work.
    """
    import torch

    device = loaded.model.device
    found = torch.empty(len(rows), dimensions)
    for places in labs_padded.batches([len(row.ids) for row in rows], labs_padded.most_on(device)):
        stop()
        with torch.inference_mode():
            whole = _of_call(loaded, [rows[place] for place in places])
            cut = whole[:, :dimensions]
            shorter = loaded.recipe.normalizes and cut.shape != whole.shape
            found[places] = (torch.nn.functional.normalize(cut, dim=-1) if shorter else cut).cpu()
    if not found.isfinite().all():
        raise labs.GenerationError("the model gave no finite vector; try torch_dtype = fp32")
    return found


def _of_call(loaded: Loaded, rows: Sequence[labs_padded.Row]) -> Any:
    """Return the uncut vectors [rows, width] of one forward call."""
    import torch

    device, pad = loaded.model.device, loaded.reader.tokenizer.pad_token_id or 0
    words = labs_padded.padded(rows, device, pad)
    states = loaded.model(**words).last_hidden_state
    skips = torch.tensor([row.skip for row in rows], device=device)
    found = pool(loaded.recipe, states, words["attention_mask"], skips)
    for layer in loaded.layers:
        found = layer(found)
    return found


def layers(recipe: Recipe, files: Files, device: Any, *, pickles: bool) -> list[Any]:
    """Load the steps after the pooling as functions of vectors [texts, width] in float32.

    pickles: whether a layer without safetensors may be read from pytorch_model.bin.
    """
    import torch

    found = list[Any]()
    for step in recipe.steps:
        if step.kind == "normalize":
            found.append(functools.partial(torch.nn.functional.normalize, dim=-1))
            continue
        weights = _weights(files, step.folder, pickles)
        try:
            rows, columns = weights["linear.weight"].shape
            linear = torch.nn.Linear(columns, rows, bias=step.bias)
            linear.load_state_dict({k.removeprefix("linear."): v for k, v in weights.items()})
        except (KeyError, ValueError, RuntimeError, AttributeError) as error:
            text = f"{step.folder} does not hold the weights of a dense layer"
            raise labs.ModelError(f"{files.source}: {text}") from error
        linear = linear.float().requires_grad_(False).to(device)
        found += [linear, getattr(torch.nn, step.activation)()]
    return found


def _weights(files: Files, folder: str, pickles: bool) -> dict[str, Any]:
    if path := files.path(f"{folder}/model.safetensors"):
        from safetensors.torch import load_file

        loaded: dict[str, Any] = load_file(path)
        return loaded
    if pickles and (path := files.path(f"{folder}/pytorch_model.bin")):
        import torch

        read: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        return read
    hint = "" if pickles else "; use_safetensors = false reads pickles"
    raise labs.ModelError(f"{files.source}: {folder} has no model.safetensors{hint}")


def pool(recipe: Recipe, states: Any, mask: Any, skips: Any) -> Any:
    """Return one vector per text [texts, width * modes] from states [texts, tokens, width].

    mask [texts, tokens]: 1 for a token, 0 for the padding after the last one. skips [texts]: tokens
    of the prompt at the beginning of each text, which are left out if the recipe says so.
    """
    import torch

    states = states.float()
    rows = torch.arange(len(states), device=states.device)
    places = torch.arange(states.shape[1], device=states.device)
    kept = mask if recipe.include_prompt else mask * (places >= skips.unsqueeze(1))
    weights = kept.unsqueeze(-1).to(states.dtype)  # [texts, tokens, 1]
    ranks = weights * (places + 1).view(1, -1, 1)
    ways: dict[str, Callable[[], Any]] = {
        "cls": lambda: states[rows, kept.argmax(1)],
        "max": lambda: states.masked_fill(weights == 0, -torch.inf).amax(1),
        "mean": lambda: (states * weights).sum(1) / weights.sum(1).clamp(min=1e-9),
        "mean_sqrt_len_tokens": lambda: (
            (states * weights).sum(1) / weights.sum(1).clamp(min=1e-9).sqrt()
        ),
        "weightedmean": lambda: (states * ranks).sum(1) / ranks.sum(1).clamp(min=1e-9),
        "lasttoken": lambda: states[rows, mask.sum(1) - 1],
    }
    return torch.cat([ways[mode]() for mode in recipe.modes], dim=-1)
