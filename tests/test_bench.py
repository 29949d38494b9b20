# SPDX-License-Identifier: Apache-2.0
"""Tests of bench/: its parts by name, its prompts and its ratios. Nothing is measured here."""

from __future__ import annotations

import sys

import kit
import pytest

from bench import __main__ as bench
from bench import parts


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
