# SPDX-License-Identifier: Apache-2.0
"""What an embedding model's own files ask: how its states become one vector, and its prompts.

    recipe = labs_recipe.read(labs_recipe.Files(source, options))  # as for from_pretrained

The files are modules.json, the folders it names, sentence_bert_config.json and
config_sentence_transformers.json. A model without them gets the mean of its last hidden states, of
length 1. What they ask and labs cannot do is refused by name. Needs labs.py; transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct

import labs

Mode = Literal["cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"]
# The words of older files, in the order in which sentence-transformers joins their vectors.
FLAGS: dict[str, Mode] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
ACTIVATIONS = ("Identity", "Tanh", "ReLU", "GELU", "SiLU", "Sigmoid")  # classes of torch.nn
DOCUMENT_PROMPTS = ("document", "passage", "corpus")  # the first one that a model has
S = TypeVar("S", bound=Struct)


class Step(Struct, frozen=True):
    """What follows the pooling. folder: of a dense layer's weights, below the model's."""

    kind: Literal["dense", "normalize"] = "normalize"
    folder: str = ""
    activation: str = "Tanh"
    bias: bool = True


class Recipe(Struct, frozen=True, kw_only=True):
    """How texts become vectors. modes: their vectors are joined.

    include_prompt: whether a prompt's tokens are pooled too.
    max_tokens: of a text with its special tokens; None: as the tokenizer says. lower: write texts
    in lower case first. dimensions: to which vectors are cut by default.
    """

    modes: tuple[Mode, ...] = ("mean",)
    include_prompt: bool = True
    steps: tuple[Step, ...] = (Step(),)
    prompts: dict[str, str] = {}
    default_prompt_name: str | None = None
    max_tokens: int | None = None
    lower: bool = False
    dimensions: int | None = None

    @property
    def normalizes(self) -> bool:
        """Whether the vectors have length 1."""
        return bool(self.steps) and self.steps[-1].kind == "normalize"

    def prompt(self, name: str | None) -> str:
        """Return a prompt's text; without a name, that of the default prompt.

        Raises InputError for a name that the model does not have.
        """
        name = self.default_prompt_name if name is None else name
        if name is not None and name not in self.prompts:
            known = ", ".join(sorted(self.prompts)) or "it has none"
            raise labs.InputError(f"prompt_name: this model has no prompt {name!r:.80}: {known}")
        return "" if name is None else self.prompts[name]

    def prompt_name(self, *names: str) -> str | None:
        """Return the first of these names that the model has a prompt of, else None."""
        return next((name for name in names if name in self.prompts), None)


# ---------------------------------------------------------------- files


Width = Annotated[int, Meta(ge=1, le=2**20)]


class ModuleFile(Struct, frozen=True):
    """An entry of modules.json."""

    path: str
    type: str


class TransformerFile(Struct, frozen=True, forbid_unknown_fields=True):
    """sentence_bert_config.json."""

    max_seq_length: Width | None = None
    do_lower_case: bool = False
    transformer_task: str | None = None
    modality_config: dict[str, Any] = {}
    module_output_name: str | None = None
    unpad_inputs: bool | None = None  # only about speed
    processing_kwargs: Annotated[dict[str, Any], Meta(max_length=0)] = {}
    model_args: Annotated[dict[str, Any], Meta(max_length=0)] = {}
    tokenizer_args: Annotated[dict[str, Any], Meta(max_length=0)] = {}
    config_args: Annotated[dict[str, Any], Meta(max_length=0)] = {}
    model_kwargs: Annotated[dict[str, Any], Meta(max_length=0)] = {}
    processor_kwargs: Annotated[dict[str, Any], Meta(max_length=0)] = {}
    config_kwargs: Annotated[dict[str, Any], Meta(max_length=0)] = {}
    query_length: None = None
    document_length: None = None
    query_expansion: None = None


class PoolingFile(Struct, frozen=True, forbid_unknown_fields=True):
    """config.json of a folder of type Pooling."""

    word_embedding_dimension: Width | None = None
    embedding_dimension: Width | None = None
    pooling_mode: Mode | tuple[Mode, ...] | None = None
    include_prompt: bool = True
    pooling_mode_cls_token: bool = False
    pooling_mode_max_tokens: bool = False
    pooling_mode_mean_tokens: bool = False
    pooling_mode_mean_sqrt_len_tokens: bool = False
    pooling_mode_weightedmean_tokens: bool = False
    pooling_mode_lasttoken: bool = False


class DenseFile(Struct, frozen=True, forbid_unknown_fields=True):
    """config.json of a folder of type Dense."""

    in_features: Width
    out_features: Width
    bias: bool = True
    activation_function: str = "torch.nn.modules.activation.Tanh"
    module_input_name: Literal["sentence_embedding"] = "sentence_embedding"
    module_output_name: Literal["sentence_embedding"] | None = None
    use_residual: Literal[False] = False


class NormalizeFile(Struct, frozen=True, forbid_unknown_fields=True):
    """config.json of a folder of type Normalize."""

    module_input_name: Literal["sentence_embedding"] = "sentence_embedding"
    module_output_name: Literal["sentence_embedding"] | None = None


class ModelFile(Struct, frozen=True):
    """config_sentence_transformers.json; what it says beside this does not change vectors."""

    model_type: Literal["SentenceTransformer"] = "SentenceTransformer"
    prompts: dict[str, str | None] = {}
    default_prompt_name: str | None = None
    truncate_dim: Width | None = None


class Files:
    """The files of a model. source, options: as for from_pretrained, of a folder or a hub id."""

    def __init__(self, source: str, options: Mapping[str, Any]) -> None:
        self.source = source
        names = ("cache_dir", "revision", "token", "local_files_only")
        self._options = {name: options[name] for name in names if name in options}

    def path(self, name: str) -> str | None:
        """Return where a file lies on this machine, None if the model does not have it."""
        from transformers.utils.hub import cached_file

        try:
            found = cached_file(
                self.source, name, _raise_exceptions_for_missing_entries=False, **self._options
            )
        except Exception as error:
            raise labs.ModelError(f"{self.source}: {labs.reason(error)}") from error
        return None if found is None else str(found)

    def read(self, name: str, kind: type[S], *, required: bool = False) -> S | None:
        """Return a JSON file as `kind`, None if the model does not have it."""
        if (path := self.path(name)) is None:
            if required:
                raise labs.ModelError(f"{self.source}: {name} is missing, which modules.json names")
            return None
        found: S = self.decode(name, path, kind)
        return found

    def decode(self, name: str, path: str, kind: Any) -> Any:
        """Decode a JSON file. Raises ModelError for what labs cannot do."""
        try:
            with open(path, "rb") as file:
                return msgspec.json.decode(file.read(), type=kind)
        except (OSError, ValueError, RecursionError) as error:
            why = labs.reason(error)
            text = f"{self.source}: {name} asks for something that labs cannot do, or is damaged"
            raise labs.ModelError(f"{text}: {why}") from error


def read(files: Files) -> Recipe:
    """Return how a model makes vectors. Raises ModelError for what labs cannot do."""
    stated = files.read("config_sentence_transformers.json", ModelFile) or ModelFile()
    prompts = {name: text or "" for name, text in stated.prompts.items()}
    if (default := stated.default_prompt_name) is not None and default not in prompts:
        text = f"names the default prompt {default!r:.80}, which it does not have"
        raise labs.ModelError(f"{files.source}: config_sentence_transformers.json {text}")
    recipe = Recipe(prompts=prompts, default_prompt_name=default, dimensions=stated.truncate_dim)
    if (path := files.path("modules.json")) is None:
        return recipe
    modules = files.decode("modules.json", path, tuple[ModuleFile, ...])
    return _with_modules(files, recipe, modules)


OUTPUTS = {  # what a transformer is asked for: the output of its forward, and its name afterwards
    "feature-extraction": ("last_hidden_state", "token_embeddings"),
    "sequence-classification": ("logits", "scores"),
}


def transformer_file(files: Files, task: str) -> TransformerFile:
    """Return sentence_bert_config.json of a model for a task, a key of OUTPUTS.

    Raises ModelError unless texts go through the tokenizer and forward as they are.
    """
    body = files.read("sentence_bert_config.json", TransformerFile) or TransformerFile()
    output, name = OUTPUTS[task]
    config = body.modality_config or {"text": {"method": "forward", "method_output_name": output}}
    plain = [{"method": "forward", "method_output_name": each} for each in (output, [output])]
    named = (body.transformer_task in (None, task), body.module_output_name in (None, name))
    if config.get("text") not in plain or not all(named) or "message" in config:
        text = "sentence_bert_config.json asks for another use of the model than labs has"
        raise labs.ModelError(f"{files.source}: {text}")
    return body


def _with_modules(files: Files, recipe: Recipe, modules: tuple[ModuleFile, ...]) -> Recipe:
    kinds = [kind_of(files, module) for module in modules]
    if kinds[:2] != ["Transformer", "Pooling"] or not {*kinds[2:]} <= {"Dense", "Normalize"}:
        order = ", ".join(kinds) or "nothing"
        wanted = "a Transformer, a Pooling and then any Dense and Normalize"
        raise labs.ModelError(f"{files.source}: modules.json lists {order}; labs runs {wanted}")
    first, second, *rest = modules
    if first.path:
        text = f"modules.json puts the transformer into the folder {first.path!r:.80}"
        raise labs.ModelError(f"{files.source}: {text}; labs reads it beside modules.json only")
    body = transformer_file(files, "feature-extraction")
    pooling = files.read(_inside(second, "config.json"), PoolingFile, required=True)
    assert pooling is not None
    return msgspec.structs.replace(
        recipe,
        modes=_modes(files, pooling),
        include_prompt=pooling.include_prompt,
        steps=tuple(_step(files, each) for each in rest),
        max_tokens=body.max_seq_length,
        lower=body.do_lower_case,
    )


def kind_of(files: Files, module: ModuleFile) -> str:
    """Return the name of a module's class. Raises ModelError for code of the model's own."""
    package, _, name = module.type.rpartition(".")
    path = PurePosixPath(module.path)
    if path.is_absolute() or ".." in path.parts or "\\" in module.path:
        text = f"modules.json names the folder {module.path!r:.80}, which is outside the model's"
        raise labs.ModelError(f"{files.source}: {text}")
    if package.partition(".")[0] != "sentence_transformers":
        text = f"modules.json names {module.type!r:.80}, which is not of sentence_transformers"
        raise labs.ModelError(f"{files.source}: {text}; labs runs no code of such a model")
    return name


def _inside(module: ModuleFile, name: str) -> str:
    return str(PurePosixPath(module.path) / name)


def _modes(files: Files, pooling: PoolingFile) -> tuple[Mode, ...]:
    if pooling.pooling_mode is not None:
        stated = pooling.pooling_mode
        modes = (stated,) if isinstance(stated, str) else stated
    else:
        modes = tuple(mode for flag, mode in FLAGS.items() if getattr(pooling, flag)) or ("mean",)
    if not modes:
        raise labs.ModelError(f"{files.source}: its Pooling names no pooling_mode")
    return modes


def _step(files: Files, module: ModuleFile) -> Step:
    name = _inside(module, "config.json")
    if module.type.endswith(".Normalize"):
        files.read(name, NormalizeFile)  # refuses other inputs and outputs
        return Step()
    dense = files.read(name, DenseFile, required=True)
    assert dense is not None
    package, _, activation = dense.activation_function.rpartition(".")
    if package.partition(".")[0] != "torch" or activation not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        text = f"{name} names the activation {dense.activation_function!r:.80}; labs has {known}"
        raise labs.ModelError(f"{files.source}: {text}")
    return Step("dense", module.path, activation, dense.bias)
