# SPDX-License-Identifier: Apache-2.0
"""What this machine has and how labs runs on it, found in another process that may hang or crash.

    found = labs_machine.found(config, ["torch", "device", "speed"])
    found["torch"]  # a dict of facts, or Failed with a reason

A broken driver can block Python as a whole, so each part has a time limit, after which the process
is ended and another one goes on. Needs labs.py and labs_sizes.py; torch and transformers are tried.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import platform
import signal
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

import labs

FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "asimd", "bf16")
PROMPT = "Count from one to one thousand."
MEASURE_S = 1.0
MOST_TOKENS = 4096
PREPARED_TOKENS = 8  # before the measurement: first steps take longer


class Failed(Struct, frozen=True):
    """Why a part found nothing: one sentence."""

    why: str


# ---------------------------------------------------------------- without torch


def computer() -> dict[str, Any]:
    """Return the processor, its cores and instruction sets, and the system."""
    told: dict[str, str] = {}
    with contextlib.suppress(OSError):  # Linux; names differ between architectures
        for line in Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines():
            name, _, value = line.partition(":")
            told.setdefault(name.strip(), value.strip())
    has = {*f"{told.get('flags', '')} {told.get('Features', '')}".split()}
    return {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": told.get("model name") or platform.processor() or "unknown",
        "cores": usable_cores(),
        "all_cores": os.cpu_count(),
        "instructions": [flag for flag in FLAGS if flag in has],
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "nvidia_driver": Path("/proc/driver/nvidia/version").exists(),
    }


def usable_cores() -> float:
    """Return the cores that this process may use; a container may limit them to a part of one."""
    count = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1)
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        count = min(count, int(quota) / int(period))  # ValueError for "max"
    return count


# ---------------------------------------------------------------- parts, run in another process


def _torch(config: labs.Config) -> dict[str, Any]:
    import torch

    build = {"CUDA": torch.version.cuda, "ROCm": torch.version.hip}
    found = next((f"{kind} {number}" for kind, number in build.items() if number), "CPU only")
    threads = torch.get_num_threads()
    kernels = torch.backends.cpu.get_cpu_capability()
    return {
        "version": str(torch.__version__),
        "build": found,
        "threads": threads,
        "kernels": kernels,
    }


def _gpus(config: labs.Config) -> list[dict[str, Any]]:
    import torch

    found = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        major, minor = torch.cuda.get_device_capability(index)
        name = torch.cuda.get_device_name(index)
        facts = {"name": name, "capability": f"{major}.{minor}", "bytes": total, "free": free}
        found.append(facts)
    return found


def _bitsandbytes(config: labs.Config) -> str:
    """Return the version, if 4 bits work on the device in use."""
    import bitsandbytes
    import torch

    weight = torch.ones(64, 64, dtype=torch.float32, device=labs.device_of(config.model)[1])
    packed, state = bitsandbytes.functional.quantize_4bit(weight, quant_type="nf4")
    again = bitsandbytes.functional.dequantize_4bit(packed, state)
    if again.shape != weight.shape or float((again - weight).abs().max()) > 0.1:
        raise ValueError("its 4-bit numbers are wrong")
    return str(bitsandbytes.__version__)


def _device(config: labs.Config) -> dict[str, Any]:
    import labs_decode
    import labs_sizes

    _, device, dtype = labs.device_of(config.model)
    free = labs_sizes.system_memory(config.model)
    wanted = {name: getattr(config.model, name) for name in ("device_map", "torch_dtype")}
    told = {"device": device, "dtype": dtype, "wanted": wanted, "free_bytes": free}
    return {**told, "bf16": labs_decode.has_bf16(device)}


def _speed(config: labs.Config) -> dict[str, Any]:
    """Load the model from this machine as labs-gen does, and generate for a second."""
    import labs_explain
    import labs_shell

    spec = labs_shell.for_one_stream(config).model
    model = labs.load_model(replace(spec, local_files_only=True), cached=False)
    inputs = labs.build_inputs(model, prompt=PROMPT)
    room = (model.context_length or MOST_TOKENS) - len(inputs.input_ids) - 1
    plain = labs.Generation(temperature=0, ignore_eos=True, max_new_tokens=PREPARED_TOKENS)
    first = labs.generate(model, inputs, plain)
    most: dict[str, Any] = {"max_new_tokens": min(MOST_TOKENS, room)}
    most["timeout_s"] = MEASURE_S + first.timings.prefill_s
    done = labs.generate(model, inputs, plain, **most)
    plan = labs_explain.explain(model, inputs, plain)
    return {
        "tokens_per_s": round(done.timings.tokens_per_s, 1),
        "tokens": done.usage.completion_tokens,
        "load_s": round(model.load_s, 1),
        "weight_bytes": plan.weight_bytes,
        "weights": model.decoder.quant_method.replace("none", model.dtype),
        "runs": f"{plan.how} ({plan.why})",
        "forward": plan.forward,
        "batch_invariant": plan.batch_invariant,
        "rows": plan.rows,
        "context": model.context_length,
    }


PARTS = {  # each with the seconds that it may take
    "torch": (_torch, 60),
    "gpus": (_gpus, 30),
    "device": (_device, 60),
    "bitsandbytes": (_bitsandbytes, 60),
    "speed": (_speed, 180),
}


# ---------------------------------------------------------------- the other process


def found(config: labs.Config, parts: Iterable[str]) -> Iterator[tuple[str, Any]]:
    """Yield (part, what it found, or Failed) in order."""
    left = [*parts]
    while left:
        for part, value in _round(config, left):
            left.remove(part)
            yield part, value


def _round(config: labs.Config, parts: list[str]) -> Iterator[tuple[str, Any]]:
    """Yield what one process finds; a part that hangs or crashes is its last."""
    context = multiprocessing.get_context("spawn")
    mine, its = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(its, config, parts), daemon=True)
    process.start()
    its.close()
    try:
        for part in [*parts]:
            limit_s = PARTS[part][1]
            if not mine.poll(limit_s):
                yield part, Failed(f"gave no result in {limit_s} s")
                return
            try:
                value = mine.recv()
            except EOFError:
                process.join(5)
                yield part, Failed(f"ended its process: {_end_of(process.exitcode)}")
                return
            yield part, value
    finally:
        process.kill()
        process.join(5)


def _end_of(code: int | None) -> str:
    with contextlib.suppress(ValueError):
        return signal.Signals(-(code or 0)).name
    return f"exit code {code}"


def _work(connection: Any, config: labs.Config, parts: Iterable[str]) -> None:
    """Send what each part finds. What libraries write is thrown away."""
    for descriptor in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
    for part in parts:
        value: Any
        try:
            value = PARTS[part][0](config)
        except BaseException as error:  # libraries raise anything
            name = "" if isinstance(error, labs.LabsError) else f"{type(error).__name__}: "
            value = Failed(f"{name}{labs.reason(error)}")
        connection.send(value)
