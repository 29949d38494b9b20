# SPDX-License-Identifier: Apache-2.0
"""Tests of bench/: its parts by name, its prompts and its ratios. Nothing is measured here."""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import kit
import pytest

import labs
from bench import __main__ as bench
from bench import gpu, parts, schemas


@pytest.mark.parametrize("name", bench.NAMES)
def test_every_part_says_what_it_measures(name: str):
    assert bench.PARTS[name].__name__ == name
    assert bench.PARTS[name].__doc__


def test_an_unknown_part_is_refused_by_name(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "argv", ["bench", "single", "speed"])
    with pytest.raises(SystemExit, match="no part speed; there are single, many"):
        bench.main()


def test_the_same_number_of_prompts_are_the_same_prompts():
    model = kit.model_of("llama")
    assert parts.prompts(model, 3) == parts.prompts(model, 3)
    assert parts.random_inputs([5, 9]) == parts.random_inputs([5, 9])


def test_a_report_has_the_median_ratio_and_its_interval(capsys: pytest.CaptureFixture[str]):
    parts.report("labs / other", [(10.0, 5.0)] * 9 + [(30.0, 5.0)])
    assert capsys.readouterr().out.split()[3:] == ["10.0", "5.0", "2.00", "[2.00,", "2.00]"]


def test_schemas_are_sampled_tried_followed_and_answered(tiny, folder, monkeypatch, capsys):
    tests = [{"valid": True, "data": "red"}, {"valid": False, "data": "blue"}]
    for part in ("easy", "hard"):
        for number in range(4):
            known = {"enum": ["red", number]} if part == "easy" or number else {"minItems": 501}
            name = f"{part}---{number}.json"
            (folder / name).write_text(json.dumps({"schema": known, "tests": tests}))
    monkeypatch.setattr(schemas, "SIZES", {"easy": 30, "hard": 10})
    monkeypatch.setattr(schemas, "EACH", 4)
    monkeypatch.setattr(labs, "load_model", lambda config: tiny)
    schemas.schemas(str(folder), "answers")
    lines = capsys.readouterr().out.splitlines()
    assert "accepted: 7 of 8, 93.8% of all by size" in lines
    assert "    1 is 501; at most 500" in lines
    assert lines[-3:-1] == [
        "valid texts that are followed: 7 of 7",
        "others that are not: 7 of 7",
    ]
    assert re.fullmatch(
        r"answers: 2 of 2 ended within 256 tokens, 2 of these are valid; .*", lines[-1]
    )


def test_the_report_of_a_gpu_counts_rows_whose_bits_do_not_depend_on_others(tmp_path, capsys):
    spec = labs.ModelSpec(torch_dtype="bf16", cache_dir=str(tmp_path))
    model = gpu.random_model("tiny", "cpu", spec)
    assert model.decoder.forward is not None  # what is measured is what load_model would run
    gpu.invariance(model, "tiny", 2, 1)
    assert capsys.readouterr().out.count("2 of 2 have the same bits") == 2
    gpu.first_token(model, "tiny", 20)
    assert re.search(r"ms, \d+\.\d\d x its products alone", capsys.readouterr().out)


def test_the_report_of_a_gpu_tells_bits_that_differ(monkeypatch, tmp_path, capsys):
    spec = labs.ModelSpec(torch_dtype="bf16", cache_dir=str(tmp_path))
    model = gpu.random_model("tiny", "cpu", spec)
    found = gpu.logprobs

    def first_is_wrong(events: Any, rows: int) -> list[list[float]]:
        together = found(events, rows)
        return [[0.5], *together[1:]] if rows == 2 else together

    monkeypatch.setattr(gpu, "logprobs", first_is_wrong)
    gpu.invariance(model, "tiny", 2, 1)
    assert capsys.readouterr().out.count("1 of 2 have the same bits") == 2
