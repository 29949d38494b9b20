# SPDX-License-Identifier: Apache-2.0
"""What is installed, how labs runs here, what is wrong, and what would make it faster.

    report = labs_doctor.examine(None, {}, measure=True)
    print(labs_doctor.described(report))  # no secrets: to be pasted into a bug report

Needs labs_faults.py, labs_machine.py, labs_stock.py, labs_shell.py with what those need; click. A
library that is missing or broken is a line of the report.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click
import msgspec
from msgspec import Struct

import labs
import labs_cache
import labs_faults
import labs_flags
import labs_machine
import labs_names
import labs_progress
import labs_shell
import labs_stock

PACKAGES = ("transformers", "tokenizers", "huggingface-hub", "accelerate", "msgspec", "gguf")
NOT_EXTRAS = ("bench", "test")  # they are for those who change labs
COUNTED_S = 3.0  # seconds that the files of a cache are counted
SLOW_LOAD = 1.5  # of the cores, from which a measurement says little
QUANTISED = ("gguf", ".gguf", "int8", "int4")
GPU_BUILD = "install a build of PyTorch for it, as docs/install.md says"
Facts = dict[str, Any]


class Report(Struct, frozen=True, kw_only=True):
    """All that is found. wrong: what has to be mended. faster: settings and commands that help."""

    versions: dict[str, str]
    extras: dict[str, str]
    computer: Facts
    found: Facts  # what labs_machine.found tells, or why it does not
    caches: list[Facts]
    model: str
    files: tuple[str, ...]
    changed: dict[str, str]
    notes: tuple[str, ...]
    wrong: list[str]
    faster: list[str]


def doctor(config: labs.Config, flags: dict[str, Any]) -> None:
    """Write the report. Exit with code 1 if something is wrong. flags: json, no_measure, config.

    config is not used: the files are read here, so that each of their faults is told.
    """
    measure, overrides = not flags.get("no_measure"), labs_flags.overrides_of(flags)
    report = examine(flags.get("config"), overrides, measure=measure)
    text = msgspec.json.encode(report).decode() + "\n" if flags.get("json") else described(report)
    labs_shell.write(text)
    if report.wrong:
        raise click.exceptions.Exit(1)


def examine(path: str | None, overrides: Mapping[str, object], *, measure: bool) -> Report:
    """Return the report on this machine with this configuration; nothing is downloaded."""
    examined = labs_faults.examined(path, overrides)
    config, extras = labs_names.named(examined.config), dict(_extras())
    parts = ["torch", "gpus", "device"]
    parts += ["bitsandbytes"] if "missing" not in extras.get("bitsandbytes", "missing") else []
    absent = labs_stock.is_absent(config)
    parts += ["speed"] if measure and config.model.kind == "text" and not absent else []
    told = labs_progress.over(labs_machine.found(config, parts), "Examining", "parts", len(parts))
    found, caches = dict(told), [_cache(place) for place in _places(config)]
    if isinstance(bits := found.get("bitsandbytes"), labs_machine.Failed):
        extras["bitsandbytes"] = f"does not work: {bits.why}"
    computer = labs_machine.computer()
    report = Report(
        versions=_versions(found.get("torch")),
        extras=extras,
        computer=computer,
        found=found,
        caches=caches,
        model=config.model_id + (" (not on this machine)" if absent else ""),
        files=examined.files,
        changed=examined.changed,
        notes=examined.notes,
        wrong=[*examined.faults, *_wrong(found, caches)],
        faster=[*_faster(config, computer, found)],
    )
    return _cleaned(report, config.model.token)


def _cleaned(report: Report, token: str | None) -> Report:
    """Return a report of which every text may be shown to others."""

    def walk(value: Any) -> Any:
        if isinstance(value, str):
            return labs_faults.clean(value, token)
        if isinstance(value, dict):
            return {key: walk(each) for key, each in value.items()}
        return [walk(each) for each in value] if isinstance(value, list) else value

    return msgspec.convert(walk(msgspec.to_builtins(report)), Report)


# ---------------------------------------------------------------- what is installed


def _versions(torch: Any) -> dict[str, str]:
    versions = {"labs": labs.__version__, "Python": platform.python_version()}
    versions["torch"] = f"{torch['version']} ({torch['build']})" if isinstance(torch, dict) else ""
    versions["torch"] = versions["torch"] or _version("torch")
    return versions | {name: _version(name) for name in PACKAGES}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def _extras() -> Iterator[tuple[str, str]]:
    """Yield the packages of labs' extras with their versions, or how to install them."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        for line in importlib.metadata.requires("labs-gen") or ():
            told = re.match(r"([\w.-]+).*; *extra *== *['\"]([\w-]+)['\"]", line)
            if told and told[2] not in NOT_EXTRAS:
                version = _version(told[1])
                missing = f"missing: pip install 'labs-gen[{told[2]}]'"
                yield told[1], missing if version == "missing" else version


# ---------------------------------------------------------------- caches


def _places(config: labs.Config) -> list[Path]:
    """Return the folders that labs and the hub write to."""
    dirs = [labs_cache.cache_folder(each.model.cache_dir) for each in config.by_name().values()]
    with contextlib.suppress(ImportError):
        from huggingface_hub import constants

        dirs.append(Path(constants.HF_HUB_CACHE))
    return [*dict.fromkeys(dirs)]


def _cache(place: Path) -> Facts:
    """Return the size of a folder, as far as it was counted, and whether it can be written to."""
    size, whole, end = 0, True, time.monotonic() + COUNTED_S
    for folder, _, names in os.walk(place):
        if not (whole := time.monotonic() < end):
            break
        for name in names:
            with contextlib.suppress(OSError):
                size += os.lstat(os.path.join(folder, name)).st_size
    existing = next(each for each in (place, *place.parents) if each.exists())
    writable = existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)
    return {"place": str(place), "bytes": size, "counted": whole, "writable": writable}


# ---------------------------------------------------------------- what is wrong, what would help


def _wrong(found: Facts, caches: list[Facts]) -> Iterator[str]:
    for part, value in found.items():
        if isinstance(value, labs_machine.Failed):
            yield f"{part}: {value.why}"
    for cache in caches:
        if not cache["writable"]:
            yield f"{cache['place']}: cannot be written to, so nothing is kept there"


def _faster(config: labs.Config, computer: Facts, found: Facts) -> Iterator[str]:
    """Yield what would make answers faster: the setting or the command, and why."""
    device, speed, spec = found.get("device"), found.get("speed"), config.model
    on_cpu = isinstance(device, dict) and device["device"] == "cpu"
    if on_cpu and computer["nvidia_driver"] and not found.get("gpus"):
        yield f"an NVIDIA driver is here, but torch finds no GPU: {GPU_BUILD}"
    if on_cpu and found.get("gpus"):
        yield "device_map = auto: this machine has a GPU that is not used"
    if isinstance(device, dict) and device["bf16"] and device["dtype"] == "fp32":
        yield "torch_dtype = auto: takes bf16, which this device computes natively"
    weights = speed["weights"] if isinstance(speed, dict) else spec.model_name[-5:]
    if on_cpu and weights not in QUANTISED and "avx512f" in computer["instructions"]:
        yield "quant_method = int8 (or int4): faster for one to four streams, with another text"
    if not spec.cuda_graphs and isinstance(device, dict) and device["device"] == "cuda":
        yield "cuda_graphs = true: a step on one GPU waits less for Python"
    if isinstance(speed, dict) and speed["forward"].startswith("transformers"):
        yield f"the model runs through the forward of {speed['forward']}"
    if isinstance(torch := found.get("torch"), dict) and torch["threads"] < int(computer["cores"]):
        yield f"OMP_NUM_THREADS: torch uses {torch['threads']} of {computer['cores']:.0f} cores"
    if (computer["load"] or 0) > SLOW_LOAD * computer["cores"]:
        yield f"other programs want {computer['load']} cores; measurements say little meanwhile"


# ---------------------------------------------------------------- as text


def described(report: Report) -> str:
    """Return the report as lines of text, a heading before each part."""
    machine, sections = report.computer, dict[str, list[str]]()
    sections["versions"] = [f"{name} {version}" for name, version in report.versions.items()]
    sections["extras"] = [f"{name} {version}" for name, version in report.extras.items()]
    cores = f"{machine['cores']:g} of {machine['all_cores']} cores"
    instructions = " ".join(machine["instructions"]) or "no instructions that labs asks for"
    sections["machine"] = [machine["system"], f"{machine['processor']}, {cores}, {instructions}"]
    sections["machine"] += [*_gpu_lines(report.found.get("gpus"))]
    sections["runs"] = [*_run_lines(report)]
    sections["caches"] = [*map(_cache_line, report.caches)]
    changed = [f"{key} = {value}" for key, value in report.changed.items()]
    read = f"read: {', '.join(report.files) or 'no file'}"
    sections["configuration"] = [read, *changed, *report.notes]
    sections["faster"] = report.faster or ["nothing that labs knows of"]
    sections["wrong"] = report.wrong or ["nothing"]
    blocks = ([title, *(f"  {line}" for line in lines)] for title, lines in sections.items())
    return "\n".join([line for block in blocks if len(block) > 1 for line in block] + [""])


def _gpu_lines(gpus: Any) -> Iterator[str]:
    for gpu in gpus if isinstance(gpus, list) else ():
        memory = f"{labs_stock.human(gpu['free'])} of {labs_stock.human(gpu['bytes'])} free"
        yield f"{gpu['name']}, compute capability {gpu['capability']}, {memory}"
    if gpus == []:
        yield "no GPU that torch can use"


def _run_lines(report: Report) -> Iterator[str]:
    found = report.found
    yield f"model: {report.model}"
    if "dtype" in (device := found.get("device") or {}):
        wanted = device["wanted"]
        seen = "" if found.get("gpus") else "; torch finds no GPU"
        bf16 = "computes" if device["bf16"] else "has no"
        yield f"device {device['device']} (device_map = {wanted['device_map']}{seen})"
        yield f"dtype {device['dtype']} (torch_dtype = {wanted['torch_dtype']}; it {bf16} bf16)"
        yield f"free memory: {labs_stock.human(device['free_bytes'])}"
    if "tokens" in (speed := found.get("speed") or {}):
        yield f"weights: {speed['weights']}, {labs_stock.human(speed['weight_bytes'])}"
        yield f"rows: {speed['runs']}; up to {speed['rows']} at once"
        yield f"forward of {speed['forward']}"
        yield f"same text in any batch: {'yes' if speed['batch_invariant'] else 'not promised'}"
        yield f"measured: {speed['tokens_per_s']} tokens/s; loaded in {speed['load_s']} s"
    yield from [] if speed else ["not measured"]


def _cache_line(cache: Facts) -> str:
    size = labs_stock.human(cache["bytes"])
    more = "" if cache["counted"] else "at least "
    return f"{cache['place']}: {more}{size}" + ("" if cache["writable"] else ", cannot be written")
