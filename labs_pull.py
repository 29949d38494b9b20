# SPDX-License-Identifier: Apache-2.0
"""Download a model from the hub into the hub's cache: what labs would load of it, and no more.

    done = labs_pull.pull(config, "your-org/your-model")  # or "your-org/your-model:file.gguf"

The next download keeps the files that are whole. Needs labs.py, labs_cache.py, labs_hub.py,
labs_apart.py, labs_progress.py; huggingface_hub.
"""

from __future__ import annotations

import contextlib
import difflib
import fnmatch
import glob
import os
import shutil
import time
from pathlib import Path
from typing import Any, NamedTuple

import labs
import labs_apart
import labs_hub
import labs_progress
from labs_cache import SourceError

STALE_S = 60  # without a write
ANSWER_S = 10  # seconds that the hub may take to list the files of a repository
FOREIGN = ("onnx/", "openvino/", "original/", "coreml/", "flax/")  # folders for other libraries
TEXTS = (".json", ".jinja", ".model", ".txt", ".tiktoken")  # configuration and tokenizer
TEXT_BYTES = 2**27  # of the longest tokenizer; longer files are data
# Weights as transformers finds them; the first pattern that a repository has decides.
WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors", "adapter_model.safetensors")
PICKLES = ("pytorch_model.bin", "pytorch_model-*-of-*.bin")

Sizes = dict[str, int]  # bytes of files, by their names


class Pulled(NamedTuple):
    """What is here now. place: a folder, or a GGUF file. flags: those of labs-gen that use it."""

    place: str
    bytes: int
    flags: str


def pull(config: labs.Config, name: str) -> Pulled:
    """Download a hub id, ID:FILE.gguf, or the model of a [models.NAME] table.

    Raises ModelError when the hub, the repository or the disk does not allow it.
    """
    labs.require("labs_bar", "huggingface_hub")
    spec = config.models[name].model if name in config.models else config.model
    source = spec.model_name if name in config.models else name
    repository, _, file = source.rpartition(":") if source.endswith(".gguf") else (source, "", "")
    if source.startswith(("package:", ".", "/", "~")) or Path(source).exists() or not repository:
        raise labs.ModelError(f"{name}: is not on the hub; give ORG/MODEL or ORG/MODEL:FILE.gguf")
    if spec.local_files_only:
        raise labs.ModelError(f"{name}: local_files_only is set, so nothing is downloaded")
    try:
        files = listed(repository, spec)
        chosen = [_one(files, file)] if file else of_model(repository, files, spec)
        _sweep(repository)
        _check_disk(repository, {each: files[each] for each in chosen}, spec)
        place = labs_apart.run(_download, repository, chosen, spec)  # Ctrl-C does not wait for it
    except SourceError as error:
        raise labs.ModelError(f"{name}: {error}") from error
    finally:
        labs_progress.bar_class().close_all()
    flag = "--adapter" if "adapter_config.json" in chosen else "--model"
    revision = f" --revision {spec.revision}" if spec.revision else ""
    total = sum(files[each] for each in chosen)
    flags = f"{flag} {name if name in config.models else source + revision}"
    return Pulled(os.path.join(place, file) if file else place, total, flags)


def listed(repository: str, spec: labs.ModelSpec) -> Sizes:
    """Return the files of a repository. Raises SourceError when the hub does not list them."""
    import huggingface_hub
    from huggingface_hub import errors

    ask = huggingface_hub.HfApi(token=spec.token).model_info
    try:
        info = ask(repository, revision=spec.revision, files_metadata=True, timeout=ANSWER_S)
    except (errors.HfHubHTTPError, errors.OfflineModeIsEnabled, ValueError) as error:
        raise SourceError(labs_hub.reason(error)) from error
    except Exception as error:  # connection errors depend on the hub's HTTP library
        raise SourceError("the hub cannot be reached; a folder can be used without it") from error
    names = {each.rfilename: each.size or 0 for each in info.siblings or ()}
    return {name: size for name, size in names.items() if ".." not in name and name[:1] != "/"}


def of_model(repository: str, files: Sizes, spec: labs.ModelSpec) -> list[str]:
    """Return the files that labs would load. Raises SourceError without weights that it reads."""
    own = {name: size for name, size in files.items() if not name.startswith(FOREIGN)}
    texts = [n for n, size in own.items() if n.endswith(TEXTS) and size <= TEXT_BYTES]
    if spec.trust_remote_code:
        texts += [name for name in own if name.endswith(".py")]
    forms = WEIGHTS if spec.use_safetensors else (*WEIGHTS, *PICKLES)
    found = (fnmatch.filter((n for n in own if "/" not in n), form) for form in forms)
    if weights := next(filter(None, found), []):
        inner = [n for n in own if "/" in n and n.endswith("/model.safetensors")]
        return [*texts, *weights, *(inner if spec.kind != "text" else [])]
    if gguf := sorted(name for name in own if name.endswith(".gguf")):
        raise SourceError(f"holds GGUF files; name one of them: {repository}:{gguf[0]}")
    if any(name.endswith((".bin", ".pt", ".pth")) for name in own):
        raise SourceError(labs_hub.REASONS["no file named model.safetensors"])
    raise SourceError("holds no weights that labs reads, as model.safetensors")


def _one(files: Sizes, file: str) -> str:
    if file not in files:
        known = [name for name in files if name.endswith(".gguf")]
        close = difflib.get_close_matches(file, known, n=1, cutoff=0.3)
        raise SourceError("there is no such file" + "".join(f"; did you mean {n}?" for n in close))
    return file


def _check_disk(repository: str, files: Sizes, spec: labs.ModelSpec) -> None:
    """Raise SourceError when the files that are not here yet do not fit on the disk."""
    import huggingface_hub

    where, known = {"revision": spec.revision}, huggingface_hub.try_to_load_from_cache
    sizes = (
        size for n, size in files.items() if not isinstance(known(repository, n, **where), str)
    )
    place, needed = Path(huggingface_hub.constants.HF_HUB_CACHE), sum(sizes)
    existing = next(each for each in (place, *place.parents) if each.is_dir())
    if (free := shutil.disk_usage(existing).free) < needed:
        text = f"needs {needed / 1e9:.1f} GB more and the disk has {free / 1e9:.1f} GB free"
        raise SourceError(f"{text}; HF_HOME sets another place for the hub's cache")


def _download(repository: str, files: list[str], spec: labs.ModelSpec) -> str:
    """Download files of a repository and return their folder."""
    import huggingface_hub

    options: Any = {"revision": spec.revision, "token": spec.token}
    options["tqdm_class"] = labs_progress.bar_class()
    try:
        exact = [glob.escape(name) for name in files]
        return str(huggingface_hub.snapshot_download(repository, allow_patterns=exact, **options))
    except Exception as error:  # connection errors depend on the hub's HTTP library
        why = f"{labs_hub.reason(error)}; what is whole is kept for the next try"
        raise SourceError(why) from error


def _sweep(repository: str) -> None:
    """Delete the parts of files that ended processes left; the hub does not continue them."""
    import filelock
    from huggingface_hub import constants

    cache, name = Path(constants.HF_HUB_CACHE), f"models--{repository.replace('/', '--')}"
    for part in (cache / name / "blobs").glob("*.incomplete"):
        lock = cache / ".locks" / name / f"{part.name.partition('.')[0]}.lock"
        with contextlib.suppress(OSError, filelock.Timeout):  # another process downloads it
            if time.time() - part.stat().st_mtime > STALE_S:
                with filelock.FileLock(lock, 0):
                    part.unlink()
