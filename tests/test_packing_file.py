# SPDX-License-Identifier: Apache-2.0
"""labs_packing_file: packed weights on disk; what is read has the same bits."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from kit import SHORT, conversions, load, save_gguf
from safetensors.torch import load_file, save_file

import labs
import labs_cache
import labs_packing
import labs_packing_file


@pytest.fixture
def make(tmp_path, monkeypatch) -> Callable[..., labs.ModelSpec]:
    """Return a function that writes a GGUF file and returns the spec of its packed model."""
    monkeypatch.setattr(labs_packing, "has_quantised_kernels", lambda: True)

    def made(kind: str = "Q4_1", method: str = "gguf") -> labs.ModelSpec:
        name = str(save_gguf(tmp_path / f"{kind}.gguf", kind=kind))
        wanted: Any = labs.Quantization(quant_method=method)  # type: ignore[arg-type]
        return labs.ModelSpec(
            model_name=name,
            torch_dtype="fp32",
            cache_dir=str(tmp_path / "cache"),
            quantization=wanted,
        )

    return made


def logits(spec: labs.ModelSpec) -> torch.Tensor:
    model = labs.load_model(spec, cached=False).model
    with torch.no_grad():
        return torch.as_tensor(model(torch.tensor([SHORT.input_ids])).logits)


def files(spec: labs.ModelSpec) -> list[Path]:
    return [file for each in conversions(spec) for file in each.glob(".packed-*")]


@pytest.fixture
def count(monkeypatch) -> list[str]:
    """Return the names of the layers that are packed from now on."""
    names, inner = list[str](), labs_packing.as_one
    noted: Any = lambda name, *rest: names.append(name) or inner(name, *rest)  # type: ignore[func-returns-value]  # noqa: E731
    monkeypatch.setattr(labs_packing, "as_one", noted)
    return names


CASES = [("Q4_1", "gguf", "uint8"), ("Q8_0", "gguf", "int8"), ("Q8_0", "int4", "uint8")]


@pytest.mark.parametrize(("kind", "method", "form"), [*CASES, ("F32", "int8", "int8")])
def test_a_second_load_packs_nothing_and_has_the_same_bits(kind, method, form, make, count):
    spec = make(kind, method)
    expected = logits(spec)
    assert "model.layers.0.self_attn.q_proj+k_proj+v_proj" in count
    count.clear()
    model = labs.load_model(spec, cached=False)
    assert count == []
    assert torch.equal(logits(spec), expected)
    fused = model.model.model.layers[0].mlp.down_proj.fused
    assert str(fused.packed.tensors[0].dtype) == f"torch.{form}"
    (file,) = files(spec)
    assert len(load_file(file)) == 2 * 5  # numbers and scales of five products


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_file_is_mapped_and_not_copied(make):
    spec = make()
    logits(spec)
    model = labs.load_model(spec, cached=False)
    place = model.model.model.layers[0].mlp.down_proj.fused.packed.tensors[0].data_ptr()
    lines = Path("/proc/self/maps").read_text().splitlines()
    spans = [line.split()[0].split("-") for line in lines if str(files(spec)[0]) in line]
    assert any(int(first, 16) <= place < int(end, 16) for first, end in spans)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def with_others(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    def changed(file: Path) -> None:
        save_file({name: change(each) for name, each in load_file(file).items()}, file)

    return changed


FAULTS = {
    "cut off": cut,
    "empty": lambda file: file.write_bytes(b""),
    "foreign": lambda file: file.write_bytes(b"no weights " * 100),
    "shorter": with_others(lambda each: each[:-1].clone()),
    "flat": with_others(lambda each: each.flatten()),
    "of another type": with_others(lambda each: each.float()),
    "nothing inside": lambda file: save_file({}, file),
    "one is missing": lambda file: save_file(dict([*load_file(file).items()][1:]), file),
    "gone": lambda file: file.unlink(),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_file_is_made_again(fault, make, count, caplog):
    caplog.set_level(logging.INFO)
    expected, (file,) = logits(spec := make()), files(spec)
    FAULTS[fault](file)
    count.clear()
    assert torch.equal(logits(spec), expected)
    assert len(count) == (1 if fault == "one is missing" else 5)
    count.clear()
    assert torch.equal(logits(spec), expected)
    assert (count, files(spec)) == ([], [file])
    assert not [line for line in caplog.messages if ".packed" in line]


def test_a_folder_that_takes_no_file_costs_a_line_for_developers(make, monkeypatch, caplog):
    expected, (file,) = logits(spec := make()), files(spec)
    file.unlink()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    caplog.set_level(logging.DEBUG, "labs")
    assert torch.equal(logits(spec), expected)
    assert files(spec) == []
    assert ["No space left" in line for line in caplog.messages if "written" in line] == [True]
    monkeypatch.undo()
    monkeypatch.setattr(labs_packing, "has_quantised_kernels", lambda: True)
    file.mkdir()
    assert torch.equal(logits(spec), expected)
    assert files(spec) == [file]


def test_two_loads_at_once_leave_one_whole_file(make, count):
    spec, weights, opened = make(), [torch.randn(40, 64)], labs_packing_file.opened
    model = labs.load_model(spec, cached=False).model
    files(spec)[0].unlink()
    with opened(model, "gguf", spec) as one, opened(model, "gguf", spec) as two:
        made = [each("name", labs_packing.int8_weight, weights) for each in (one, two)]
    assert len(files(spec)) == 1
    count.clear()
    with opened(model, "gguf", spec) as three:
        found = three("name", labs_packing.int8_weight, weights)
    assert count == []
    assert all(torch.equal(found.unpack(), each.unpack()) for each in made)


def test_other_code_versions_processors_and_weights_have_files_of_their_own(
    make, monkeypatch, count
):
    logits(spec := make())
    (folder,) = conversions(spec)
    changes: list[Callable[[], object]] = [
        lambda: monkeypatch.setattr(torch, "__version__", f"{torch.__version__}.1"),
        lambda: monkeypatch.setattr(transformers, "__version__", f"{transformers.__version__}.1"),
        lambda: monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "other"),
        lambda: monkeypatch.setattr(labs_packing_file.platform, "machine", lambda: "other"),
        lambda: monkeypatch.setattr(labs_packing_file, "CODE", "pass"),
        lambda: os.utime(folder / "model.safetensors", ns=(1, 1)),
    ]
    for number, change in enumerate(changes, 2):
        known = {*files(spec)}
        change()
        count.clear()
        logits(spec)
        assert len(count) == 5
        assert len({*files(spec)} - known) == 1
        assert len(files(spec)) == min(number, labs_packing_file.MOST_FILES)


def test_a_copied_cache_has_the_same_key_and_code_that_cannot_be_read_no_store(
    make, monkeypatch, count
):
    logits(spec := make())
    (folder,) = conversions(spec)
    os.utime(folder / "complete.json", ns=(1, 1))  # as labs_cache writes it anew after a copy
    count.clear()
    logits(spec)
    assert count == []

    def unreadable(module: object) -> str:
        raise TypeError(f"{module} is a built-in module")

    monkeypatch.setattr(labs_packing_file.inspect, "getsource", unreadable)
    monkeypatch.setattr(labs_packing_file, "CODE", labs_packing_file._source())
    logits(spec)
    assert len(count) == 5


def test_what_a_killed_load_left_goes_with_a_later_one(make):
    logits(spec := make())
    (file,) = files(spec)
    for name, age in (("old", 4000), ("young", 1000)):
        left = file.with_name(f"{file.name}.{name}")
        left.write_bytes(b"a part")
        os.utime(left, (time.time() - age,) * 2)
    logits(spec)
    assert {each.name for each in files(spec)} == {file.name, f"{file.name}.young"}


def test_only_packed_weights_of_a_conversion_as_it_is_are_stored(make, tiny_folder, monkeypatch):
    spec = make()
    for method in ("none", "fp16", "auto"):
        logits(labs.evolve(spec, quantization=labs.Quantization(quant_method=method)))
    monkeypatch.setattr(labs_packing, "has_quantised_kernels", lambda: False)
    logits(spec)  # in 16 or 32 bits
    assert files(spec) == []
    before = sorted(tiny_folder.iterdir())
    for cache in (spec.cache_dir, str(tiny_folder.parent)):  # beneath it are not only conversions
        wanted = labs.Quantization(quant_method="int8")
        load(tiny_folder, quantization=wanted, cache_dir=cache)
    assert sorted(tiny_folder.iterdir()) == before


def test_weights_with_an_adapter_are_neither_stored_nor_read(make, count):
    spec = make("F32", "int8")
    model, folder = labs.load_model(spec, cached=False).model, conversions(spec)[0]
    assert len(files(spec)) == 1
    count.clear()
    adapted = labs.evolve(spec, adapter="some/adapter")
    with labs_packing_file.opened(model, "int8", adapted) as found:
        assert found is labs_packing.as_one
    files(spec)[0].unlink()
    labs_cache.remove(folder)
    with labs_packing_file.opened(model, "int8", spec) as found:  # a folder that is gone
        assert found is labs_packing.as_one


def test_a_load_that_fails_stores_nothing(make, monkeypatch):
    spec = make()
    monkeypatch.setattr(labs_packing, "give_back", lambda weights: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        logits(spec)
    assert files(spec) == []
