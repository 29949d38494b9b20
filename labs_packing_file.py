# SPDX-License-Identifier: Apache-2.0
"""Packed weights on disk, beside a converted GGUF file: made once, and mapped by later loads.

    with labs_packing_file.opened(decoder.model, "gguf", spec) as make:
        decoder = labs_fast.speed_up(decoder, "gguf", make=make, ...)

The file is in the folder of the conversion, which is removed or replaced as a whole. This file
needs labs_cache.py, labs_decode.py, labs_files.py, labs_packing.py, labs_settings.py and
safetensors.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import logging
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import safetensors
import torch
import transformers

import labs_cache
import labs_files
import labs_packing
from labs_decode import Tensor
from labs_packing import Make, PackedWeight, Packing
from labs_settings import ModelSpec

METHODS = ("gguf", "int4", "int8")  # the others are quick, or have forms that only oneDNN reads
MOST_FILES = 4  # of a conversion: other methods, other versions, processors that share a folder
ABANDONED_S = 3600.0  # the age of a part of a file whose writer must have died
ALIGNED = 64  # bytes, as torch aligns its own memory
TYPES = {torch.uint8: "U8", torch.int8: "I8", torch.bfloat16: "BF16"}  # in a safetensors file
log = logging.getLogger("labs")


@contextlib.contextmanager
def opened(model: Any, method: str, spec: ModelSpec) -> Iterator[Make]:
    """Yield a Make that takes packed weights from the file; at the end, store those it lacked.

    method: a name in labs_packing.PACKINGS. Only the weights of a conversion in the cache folder
    are stored, and none into which an adapter is merged.
    """
    folder, file = Path(model.name_or_path), None
    is_ours = folder.resolve().parent == labs_cache.cache_folder(spec.cache_dir).resolve()
    if CODE and method in METHODS and spec.adapter is None and is_ours:
        with contextlib.suppress(OSError):  # no folder, or no right to read it
            file = _tidied(folder) / f".packed-{_key(folder, method, str(model.dtype))}"
    if file is None:
        yield labs_packing.as_one
        return
    found = _Found(_read(file))
    yield found.packed
    if found.is_new:
        _write(file, found.tensors)
        with contextlib.suppress(OSError):
            _tidied(folder)


class _Found:
    """Packed tensors by their names: those of a file, and those that it lacks."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors, self.is_new = tensors, False

    def packed(self, name: str, packing: Packing, weights: Sequence[Tensor]) -> PackedWeight:
        """Return what labs_packing.as_one would."""
        names = [f"{name}.{packing.__name__}.{part}" for part in ("numbers", "scales")]
        shape, dtype = (sum(map(len, weights)), weights[0].shape[1]), weights[0].dtype
        with contextlib.suppress(LookupError, ValueError):  # it lacks them, or they do not fit
            return _restored([self.tensors[each] for each in names], shape, dtype)
        made = labs_packing.as_one(name, packing, weights)
        if made.tensors:
            self.tensors |= zip(names, made.tensors, strict=True)
            self.is_new = True
        return made


def _restored(tensors: list[Tensor], shape: tuple[int, int], dtype: torch.dtype) -> PackedWeight:
    """Return the PackedWeight with these tensors. shape, dtype: of its weight [out, in].

    Raises ValueError for tensors that no such weight has: a kernel would read beyond their end.
    """
    rows, columns = shape
    # Some kernels load whole registers, and crash where an address is no multiple of ALIGNED.
    packed, scales = (each.clone() if each.data_ptr() % ALIGNED else each for each in tensors)
    padded, groups = rows + -rows % 16, columns // labs_packing.INT4_GROUP
    found = [(each.dtype, tuple(each.shape)) for each in tensors]
    if found == [(torch.int8, shape), (torch.bfloat16, (rows,))]:
        return labs_packing.int8_product(packed, scales, dtype)
    in_int4 = [(torch.uint8, (padded, columns // 2)), (torch.bfloat16, (groups, padded, 2))]
    if found != in_int4 or columns % labs_packing.INT4_GROUP:
        raise ValueError(f"{found} is not of a weight {shape}")
    return labs_packing.int4_product(packed, scales, rows, dtype)


def _tidied(folder: Path) -> Path:
    """Delete the oldest files of a conversion, and parts whose writers died. Raises OSError."""
    (folder / labs_cache.RECORD).stat()  # other folders are the user's
    found = sorted((each.stat().st_mtime, each) for each in folder.glob(".packed-*"))
    for index, (written, file) in enumerate(found, MOST_FILES - len(found)):
        if index < 0 or ("." in file.name[1:] and written < time.time() - ABANDONED_S):
            file.unlink(missing_ok=True)
    return folder


def _key(folder: Path, method: str, dtype: str) -> str:
    """Return a digest of everything that the bytes depend on. Raises OSError if that is unknown."""
    files = [
        each
        for each in sorted(folder.iterdir())
        if each.name[0] != "." and each.name != labs_cache.RECORD  # written anew after a copy
    ]
    states = [(each.name, (s := each.stat()).st_size, s.st_mtime_ns) for each in files]
    versions = [str(torch.__version__), transformers.__version__, CODE]
    kind = [method, dtype, platform.machine(), torch.backends.cpu.get_cpu_capability()]
    return hashlib.sha256(json.dumps([states, versions, kind]).encode()).hexdigest()[:32]


def _read(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a file, mapped; none unless it is a whole safetensors file."""
    try:
        with safetensors.safe_open(str(file), framework="pt") as tensors:
            return {name: tensors.get_tensor(name) for name in [*tensors.keys()]}
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        log.debug("%s: weights are packed anew: %s", file, error)
        return {}


def _write(file: Path, tensors: dict[str, Tensor]) -> None:
    try:
        labs_files.write_whole(file, _parts(tensors))
    except OSError as error:
        log.debug("%s cannot be written, so weights are packed at each load: %s", file, error)


def _parts(tensors: dict[str, Tensor]) -> Iterator[Any]:
    """Yield the bytes of a safetensors file; the library's own writer aligns nothing to ALIGNED."""
    order = sorted(tensors, key=lambda name: tensors[name].nbytes % ALIGNED)  # multiples come first
    header, end = {}, 0
    for name in order:
        start, end = end, end + (tensor := tensors[name]).nbytes
        kind = {"dtype": TYPES[tensor.dtype], "shape": [*tensor.shape]}
        header[name] = {**kind, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % ALIGNED)
    yield len(text).to_bytes(8, "little") + text
    yield from (tensors[name].view(torch.uint8).numpy() for name in order)


def _source() -> str | None:
    with contextlib.suppress(OSError, TypeError):  # no source to read, as in some bundles
        return "".join(map(inspect.getsource, (labs_packing, sys.modules[__name__])))
    return None


CODE = _source()  # read once: while a server runs, its files may become those of another version
