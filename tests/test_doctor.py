# SPDX-License-Identifier: Apache-2.0
"""labs_doctor, labs_machine and labs_faults: the report of labs-gen doctor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import doctor_parts
import pytest
import torch
from kit import invoke

import labs
import labs_doctor
import labs_faults
import labs_machine

FAULTY = """
default_model = "smal"
[generation]
temprature = 3
max_new_tokens = "many"
do_sample = true
temperature = 0
template_options = ["my private words"]
[server]
port = 99999
api_keys = "sk-very-secret-1234"
api_keys_file = ["sk-very-secret-1234"]
[guard]
classifier = "x"
deny_patterns = ["(my private words"]
[models.small]
model_name = 5
kind = "txt"
[models.far]
model_name = "https://somebody:hunter22@host/x"
torch_dtype = "bf17"
[routr]
x = 1
[[router.rules]]
model = "nope"
over_prompt_tokens = 5
"""
FAULTS = [
    "unknown setting LABS_TEMPRATURE in the .env; did you mean LABS_TEMPERATURE?",
    "LABS_TOP_P in .env = '2'",
    "LABS_TOP_K = 'x'",
    "[routr] is not a section",
    "default_model = smal; did you mean small?",
    "unknown key 'temprature' in [generation]",
    "unknown key 'api_keys' in [server]",
    "max_new_tokens = 'many'",
    "template_options = (not shown)",
    "server_port = 99999",
    "server_api_keys_file = (not shown)",
    "seed = -1",
    "deny_patterns[0] = (not shown)",
    "classifier and classifier_labels need each other",
    "do_sample = true contradicts temperature = 0",
    "[models.small]: model_name = 5",
    "[models.small]: kind = 'txt'",
    "[models.far]: torch_dtype = 'bf17'",
    "router_rules[0]: there is no model 'nope'",
]
SECRETS = ("sk-very", "private words", "hunter22", "hf_abcdefgh")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Work in an empty folder, without caches."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LABS_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path


# ---------------------------------------------------------------- the configuration


def test_every_fault_of_a_configuration_is_told_and_no_secret(folder, monkeypatch):
    Path("labs.toml").write_text(FAULTY)
    Path(".env").write_text("LABS_TEMPRATURE=1\nLABS_TOP_P=2\nOTHER=x\nHF_TOKEN=hf_abcdefgh\n")
    monkeypatch.setenv("LABS_TOP_K", "x")
    monkeypatch.setenv("LABS_ZZZ", "1")
    found = labs_faults.examined(None, {"seed": -1})
    assert len(found.faults) == len(FAULTS)
    for part in FAULTS:
        assert [fault for fault in found.faults if part in fault] != [], part
    told = repr((found.faults, found.notes, found.changed))
    assert not any(secret in told for secret in SECRETS)
    assert found.files == ("labs.toml", ".env")
    assert any("LABS_ZZZ" in note for note in found.notes)
    assert found.config.generation.temperature == 0


def test_a_configuration_in_order_has_no_faults_and_shows_what_was_changed(folder, monkeypatch):
    monkeypatch.setenv("LABS_API_KEYS", "abcdefghij")
    text = '[generation]\ntemperature = 0.5\nstop = ["my private words"]\ntop_k = 50\n'
    Path("mine.toml").write_text(text)
    found = labs_faults.examined("mine.toml", {"top_k": 20})
    assert (found.faults, found.files) == ((), ("mine.toml",))
    assert found.changed == {
        "temperature": "0.5 (mine.toml)",
        "top_k": "20 (--top-k)",
        "stop": "1 entries (mine.toml)",
        "cache_dir": f"{folder}/cache (LABS_CACHE_DIR)",
    }
    assert len(found.config.api_keys) == 1


@pytest.mark.parametrize(
    ("name", "data", "sentence"),
    [
        ("labs.toml", b"x = [", "labs.toml: cannot be read: "),
        ("labs.toml", b"\xff", "labs.toml: cannot be read: "),
        (".env", b"\xff=1", ".env: cannot be read: "),
        ("other.toml", b"", "labs.toml: cannot be read: No such file or directory"),
        ("labs.toml", b'[server]\napi_keys_file = "absent"', "server_api_keys_file = absent"),
    ],
)
def test_a_file_that_cannot_be_read_is_a_fault(name, data, sentence, folder):
    Path(name).write_bytes(data)
    path = "labs.toml" if name == "other.toml" else None
    (fault,) = labs_faults.examined(path, {}).faults
    assert sentence in fault


def test_of_a_file_of_other_things_not_all_faults_are_told(folder):
    lines = "".join(f"x{number} = 1\n" for number in range(200))
    Path("labs.toml").write_text(f"[generation]\n{lines}")
    assert len(labs_faults.examined(None, {}).faults) == labs_faults.MOST


def test_a_text_is_shown_without_secrets(monkeypatch):
    monkeypatch.setenv("MY_API_KEY", "abcdefghij")
    monkeypatch.setenv("HOME", "/home/somebody")
    text = "abcdefghij sk-0123456789 http://a:b@host/ /home/somebody/x \x1b[2J mine"
    assert labs_faults.clean(text, "mine") == "*** *** http://***@host/ ~/x  [2J ***"


# ---------------------------------------------------------------- the other process


def test_a_part_that_hangs_or_crashes_is_told_and_the_others_go_on(monkeypatch, capfd):
    monkeypatch.setattr(labs_machine, "PARTS", doctor_parts.PARTS)
    context = labs_machine.multiprocessing.get_context("spawn")

    class Forked:
        Pipe = staticmethod(context.Pipe)

        @staticmethod
        def Process(target: Any, **options: Any) -> Any:
            return context.Process(target=doctor_parts.work, **options)

    monkeypatch.setattr(labs_machine.multiprocessing, "get_context", lambda kind: Forked)
    found = dict(labs_machine.found(labs.Config(), ["hangs", "crashes", "fails", "exits", "fine"]))
    assert {part: getattr(value, "why", value) for part, value in found.items()} == {
        "hangs": "gave no result in 2 s",
        "crashes": "ended its process: SIGSEGV",
        "fails": "ImportError: libcudart.so.99: cannot open shared object file",
        "exits": "SystemExit: 3",
        "fine": labs.DEFAULT_MODEL,
    }
    assert capfd.readouterr() == ("", "")


def test_the_machine_is_told_without_torch():
    found = labs_machine.computer()
    assert 0 < found["cores"] <= found["all_cores"]
    assert found["processor"]
    assert found["system"].startswith(("Linux", "Darwin", "Windows"))


# ---------------------------------------------------------------- the report

CPU = {"device": "cpu", "dtype": "bf16", "bf16": True, "free_bytes": 2e9}
CPU["wanted"] = {"device_map": "auto", "torch_dtype": "auto"}
SPEED = {
    **{"tokens_per_s": 12.5, "tokens": 13, "load_s": 1.0, "weight_bytes": 1e8, "weights": "bf16"},
    **{"runs": "joins (rows)", "forward": "labs: as theirs", "batch_invariant": True, "rows": 64},
    "context": 100,
}
FOUND = {"torch": {"version": "2", "build": "CUDA 13", "threads": 2, "kernels": ""}, "gpus": []}
FOUND |= {"device": CPU, "speed": SPEED}


@pytest.fixture
def machine(folder, monkeypatch):
    """Make the other process find these facts."""
    facts: dict[str, Any] = dict(FOUND)
    monkeypatch.setattr(
        labs_machine,
        "found",
        lambda config, parts: iter([(p, facts[p]) for p in parts if p in facts]),
    )
    return facts


def test_a_report_on_a_machine_in_order_ends_with_0(machine):
    done = invoke("doctor")
    assert (done.exit_code, done.stderr) == (0, "")
    for line in (
        f"  labs {labs.__version__}\n",
        "  torch 2 (CUDA 13)\n",
        "  no GPU that torch can use\n",
        "  model: smollm2-135m-instruct\n",
        "  device cpu (device_map = auto; torch finds no GPU)\n",
        "  measured: 12.5 tokens/s; loaded in 1.0 s\n",
        "  read: no file\n",
        "wrong\n  nothing\n",
    ):
        assert line in done.stdout
    assert max(map(len, done.stdout.splitlines())) < 200


def test_a_report_as_json_has_the_same(machine):
    found = json.loads(invoke("doctor", "--json", "--no-measure").stdout)
    assert found["versions"]["Python"].startswith("3.")
    assert "speed" not in found["found"]
    assert found["wrong"] == []


def test_what_is_wrong_is_told_and_ends_with_1(machine):
    Path("labs.toml").write_text(FAULTY)
    machine["bitsandbytes"] = labs_machine.Failed("OSError: sk-very-secret-1234 \x1b[2J")
    Path("cache").write_text("a file")
    done = invoke("doctor", "--seed", "-1")
    assert done.exit_code == 2  # doctor has no flags of generation
    done = invoke("doctor", "--torch-dtype", "fp32")
    assert (done.exit_code, done.stderr) == (1, "")
    assert "  bitsandbytes: OSError: *** " in done.stdout
    assert "cannot be written to, so nothing is kept there" in done.stdout
    assert "torch_dtype = fp32 (--torch-dtype)" in done.stdout
    assert not any(secret in done.stdout for secret in (*SECRETS, "\x1b"))


def test_torch_that_does_not_load_is_a_line(machine):
    failed = labs_machine.Failed("ImportError: libtorch.so: cannot open shared object file")
    machine.update(dict.fromkeys(["torch", "gpus", "device", "speed"], failed))
    done = invoke("doctor")
    assert done.exit_code == 1
    assert "  torch: ImportError: libtorch.so" in done.stdout
    assert f"  torch {torch.__version__.partition('+')[0]}" in done.stdout


@pytest.mark.parametrize(
    ("facts", "advice"),
    [
        ({"computer": {"instructions": ["avx512f"]}}, "quant_method = int8 (or int4)"),
        ({"computer": {"nvidia_driver": True}}, "an NVIDIA driver is here, but torch finds no GPU"),
        ({"gpus": [{"name": "x"}]}, "device_map = auto"),
        ({"device": {**CPU, "dtype": "fp32"}}, "torch_dtype = auto"),
        ({"speed": {**SPEED, "forward": "transformers: a window"}}, "transformers: a window"),
        ({"computer": {"cores": 4.0}}, "OMP_NUM_THREADS: torch uses 2 of 4 cores"),
        ({"computer": {"load": 9.0}}, "other programs want 9.0 cores"),
    ],
)
def test_what_would_make_it_faster_names_the_setting_or_the_command(facts, advice):
    idle = {"nvidia_driver": False, "instructions": [], "cores": 2.0, "load": 0.0}
    computer = {**idle, **facts.pop("computer", {})}
    assert advice in "".join(labs_doctor._faster(labs.Config(), computer, {**FOUND, **facts}))
    assert [*labs_doctor._faster(labs.Config(), idle, FOUND)] == []


def test_a_model_that_would_be_downloaded_is_not_measured(folder, monkeypatch):
    asked = list[str]()
    monkeypatch.setattr(
        labs_machine, "found", lambda config, parts: iter(asked.extend(parts) or ())
    )
    done = invoke("doctor", "--model", "org/absent")
    assert "speed" not in asked
    assert "model: absent (not on this machine)" in done.stdout
    assert "not measured" in done.stdout
    assert done.exit_code == 0


@pytest.mark.real
def test_the_real_report_of_a_tiny_model(folder, tiny_folder, monkeypatch):
    monkeypatch.setattr(labs_doctor, "_extras", lambda: iter(()))
    done = invoke("doctor", "--model", str(tiny_folder), "--device-map", "cpu", "--json")
    found = json.loads(done.stdout)
    assert (done.exit_code, found["wrong"]) == (0, [])
    assert found["found"]["device"]["device"] == "cpu"
    assert found["found"]["speed"]["tokens"] > 1
    assert found["found"]["torch"]["version"] == torch.__version__
