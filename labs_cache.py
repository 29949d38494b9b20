# SPDX-License-Identifier: Apache-2.0
"""What is kept on disk so that a model need not be read twice: converted GGUF files, digests.

    folder = labs_cache.converted(Path("model.gguf"), None, "bf16")
    labs_cache.digest(folder)                                          # "9f86d0..."

Plain values in, SourceError in one sentence out. Needs no other file of labs; for GGUF files
transformers, gguf and accelerate.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import importlib.util
import io
import json
import logging
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

log = logging.getLogger("labs")
TORCH_NAMES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
DIGESTED = (".safetensors", ".bin", ".json", ".jinja", ".model", ".txt", ".py")  # of a folder


class SourceError(ValueError):
    """The name leads to no model; the message is one sentence for the person who gave it."""


def converted(gguf: Path, cache: str | None, dtype: str, convert: bool = True) -> Path:
    """Return the folder that a GGUF file is converted into; make it where there is none yet.

    cache: the folder of conversions, ~/.cache/labs by default. dtype: bf16, fp16 or fp32. convert:
    else raise SourceError.
    """
    folder = _conversion(gguf, cache_folder(cache), dtype)
    if not _is_complete(folder):
        if not convert:
            raise SourceError(f"{gguf.name}: is not converted yet")
        _convert_into(folder, gguf, dtype)
    return folder


def cache_folder(cache: str | None) -> Path:
    """Return the folder of the cache, ~/.cache/labs by default."""
    return Path(cache or "~/.cache/labs").expanduser()


# ---------------------------------------------------------------- GGUF files, converted once


def _convert_into(folder: Path, gguf: Path, dtype: str) -> None:
    """Make a folder that holds a GGUF file as safetensors, whole or not at all.

    transformers takes 18 s to read the default model as GGUF, and 0.3 s as safetensors.
    """
    cache = folder.parent
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise SourceError(f"the package {package} is missing: pip install {package}")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        _delete_abandoned(cache)
        prefix = f".converting-{os.getpid()}-"
        with tempfile.TemporaryDirectory(dir=cache, prefix=prefix) as scratch:
            _convert(gguf, Path(scratch), dtype)
            if folder.exists() and not _is_complete(folder):
                shutil.rmtree(folder)
            with contextlib.suppress(OSError):  # another process may have been first
                os.replace(scratch, folder)
                os.mkdir(scratch)  # for TemporaryDirectory to remove
    except OSError as error:
        raise SourceError(f"{gguf.name}: cannot be converted in {cache}") from error


def _conversion(gguf: Path, cache: Path, dtype: str) -> Path:
    return cache / f"{gguf.stem}-{digest(gguf, str(cache))[:16]}-{dtype}"


def _delete_abandoned(cache: Path) -> None:
    """Delete the temporary folders of conversions whose process has died."""
    for scratch in cache.glob(".converting-*-*") if os.name == "posix" else ():
        try:
            os.kill(int(scratch.name.split("-")[1]), 0)  # asks only whether it lives
        except (ProcessLookupError, ValueError):
            shutil.rmtree(scratch, ignore_errors=True)
        except PermissionError:
            continue


def _is_complete(folder: Path) -> bool:
    """Compare the files with the sizes written down last in the conversion."""
    try:
        sizes = json.loads((folder / "complete.json").read_text())
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


def _convert(gguf: Path, folder: Path, dtype: str) -> None:
    gguf_package: Any = importlib.import_module("gguf")
    log.info("converting %s once into %s", gguf.name, folder.parent)
    # transformers reads the file three times; once takes seconds, for each of 49,000 tokens.
    reader = gguf_package.GGUFReader
    gguf_package.GGUFReader = functools.cache(reader)
    try:
        tensors = gguf_package.GGUFReader(str(gguf)).tensors
        weights = sum(int(tensor.n_elements) for tensor in tensors)
        _check_disk(folder.parent, weights * (4 if dtype == "fp32" else 2))
        tokenizer, model = _read_gguf(gguf, dtype)
    except SourceError:
        raise
    except (ValueError, KeyError, IndexError) as error:
        raise SourceError(f"{gguf}: is no GGUF file that can be read") from error
    finally:
        gguf_package.GGUFReader = reader
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    (folder / "complete.json").write_text(json.dumps(sizes))


def _read_gguf(gguf: Path, dtype: str) -> tuple[Any, Any]:
    import transformers

    source, where = str(gguf.parent), {"gguf_file": gguf.name}
    quantization = transformers.GgufConfig(dequantize=True)
    options = {**where, "dtype": TORCH_NAMES[dtype], "quantization_config": quantization}
    shown = sys.stderr and sys.stderr.isatty()  # its bar knows no switch
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, **where)
        with contextlib.nullcontext() if shown else contextlib.redirect_stderr(io.StringIO()):
            return tokenizer, transformers.AutoModelForCausalLM.from_pretrained(source, **options)
    except Exception as error:  # Rust code below raises bare Exceptions
        raise SourceError(str(gguf)) from error


def _check_disk(cache: Path, needed: int) -> None:
    if (free := shutil.disk_usage(cache).free) < needed * 1.05:
        sizes = f"needs {needed / 1e9:.1f} GB and the disk has {free / 1e9:.1f} GB free"
        raise SourceError(f"{cache}: the converted model {sizes}; set cache_dir to another disk")


# ---------------------------------------------------------------- digests


def digest(place: Path, cache: str | None = None) -> str:
    """Return the sha256 of a file, or of a list of a folder's files with theirs.

    It is remembered in the cache folder by the files' names, sizes and times of change.
    """
    inside = [] if place.is_file() else sorted(place.iterdir())
    files = [place] if place.is_file() else [path for path in inside if path.suffix in DIGESTED]
    states = [(str(path.resolve()), (s := path.stat()).st_size, s.st_mtime_ns) for path in files]
    key = hashlib.sha256(json.dumps(states).encode()).hexdigest()
    memory = cache_folder(cache) / f".digest-{key[:16]}"
    with contextlib.suppress(OSError):
        if len(text := memory.read_text()) == 64:
            return text
    digests = [_digest_of_file(path) for path in files]
    lines = "".join(f"{d}  {path.name}\n" for d, path in zip(digests, files, strict=True))
    found = digests[0] if place.is_file() else hashlib.sha256(lines.encode()).hexdigest()
    with contextlib.suppress(OSError):
        memory.parent.mkdir(parents=True, exist_ok=True)
        memory.write_text(found)
    return found


def _digest_of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
