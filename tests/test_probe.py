# SPDX-License-Identifier: Apache-2.0
"""labs_probe: how models run, tried at load; and the forms that chat templates read."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from decoding import raising

import labs
import labs_calls
import labs_compare
import labs_decode as decode
import labs_probe as probe
import labs_template
from bench import models
from bench.models import TABLE, how, probed, tiny_of

ROOT = Path(__file__).parent.parent


# ---------------------------------------------------------------- types of models

# Of "joins": windows, latent keys, sinks, states, and two that name the mask of the attention.
JOINS = ("gpt2", "gemma3_text", "deepseek_v3", "gpt_oss", "mamba2", "doge", "afmoe")
SAMPLE = {**dict.fromkeys(JOINS, "joins"), "zamba": "whole", "bert": "refused", "blt": "refused"}
SAMPLE |= dict.fromkeys(("dory", "git", "xlstm", "rwkv"), "alone")


@pytest.mark.parametrize("kind", SAMPLE)
def test_a_type_runs_as_the_table_says_with_transformers_tokens(
    kind: str, monkeypatch: Any, tmp_path: Path
) -> None:
    monkeypatch.setattr(decode, "CHUNK", 256)  # undoes the change of `how`
    found = how(kind, str(tmp_path))
    assert found["how"] == SAMPLE[kind], found["why"]
    assert f"| {kind} | {found['how']} |" in TABLE.read_text(encoding="utf-8")


@pytest.mark.long
def test_every_causal_type_runs_as_generate_or_alone_or_is_refused() -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "bench", "--models", *models.KINDS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    found = {line.pop("kind"): line for line in lines}
    assert not [kind for kind, each in found.items() if each["how"] == "wrong"]
    assert sum(each["how"] in ("joins", "whole", "alone") for each in found.values()) >= 100
    columns = [line.split(" | ")[:2] for line in TABLE.read_text(encoding="utf-8").splitlines()]
    assert [line.split(" | ")[:2] for line in models.as_table(found).splitlines()] == columns


def test_a_masked_language_model_is_refused_by_name_unless_it_is_a_decoder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^roberta attends in both directions, as masked"):
        probed(tiny_of("roberta"), tmp_path)
    assert probed(tiny_of("roberta", is_decoder=True), tmp_path).mode in ("joins", "alone")


def mixes_rows(_: Any, args: Any, logits: torch.Tensor) -> torch.Tensor:
    return logits + logits.mean(0)


def test_a_model_whose_rows_change_each_other_runs_alone(tmp_path: Path) -> None:
    model = tiny_of("llama")
    model.lm_head.register_forward_hook(mixes_rows)
    decoder = probed(model, tmp_path)
    assert (decoder.mode, decoder.packable) == ("alone", False)
    assert "tried at load: rows have other logits than alone" in decoder.reason
    assert model.config._attn_implementation == "sdpa"


def test_a_model_that_fails_on_two_rows_runs_alone_and_the_reason_names_the_error(
    tmp_path: Path,
) -> None:
    def refuse(_: Any, args: tuple[torch.Tensor, ...]) -> None:
        if len(args[0]) > 1:
            raise IndexError("one row, please")

    model = tiny_of("qwen2")
    model.lm_head.register_forward_pre_hook(refuse)
    decoder = probed(model, tmp_path)
    assert (decoder.mode, "one row, please" in decoder.reason) == ("alone", True)


def test_a_model_that_fails_even_alone_is_refused_with_its_error(tmp_path: Path) -> None:
    model = tiny_of("llama")
    model.lm_head.register_forward_pre_hook(raising(KeyError("pixels")))
    with pytest.raises(ValueError, match=r"llama cannot generate from token ids alone.*pixels"):
        probed(model, tmp_path)


def test_prompts_that_get_other_logits_in_one_call_go_one_at_a_time(tmp_path: Path) -> None:
    decoder = labs_calls.speed_up(decode.prepare(tiny_of("llama")))
    packed = labs_calls.prefill_packed

    def shuffled(decoder: decode.Decoder, newcomers: Any) -> Any:
        return [*reversed(packed(decoder, newcomers))]

    wrong = dataclasses.replace(decoder, prefill_packed=shuffled)
    assert probe.tried(wrong, str(tmp_path / "a")).prefill_packed is None
    assert probe.tried(decoder, str(tmp_path / "b")).prefill_packed is packed


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "qwen3_moe", "bamba"])
def test_the_rounding_of_16_bits_is_not_taken_for_a_fault(kind: str, tmp_path: Path) -> None:
    by_name = decode.prepare(tiny_of(kind).bfloat16())
    assert probe.tried(by_name, str(tmp_path)).mode == by_name.mode


@pytest.mark.real
@pytest.mark.parametrize("wanted", [{"load_in_8bit": True}, {"load_in_4bit": True}], ids=str)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_model_whose_products_are_rounded_by_other_rows_joins(dtype: str, wanted: Any) -> None:
    pytest.importorskip("bitsandbytes", reason="quantisation is an extra")
    spec = labs.ModelSpec(torch_dtype=dtype, quantization=labs.Quantization(**wanted))
    assert labs.load_model(spec, cached=False).decoder.mode == "joins"


# ---------------------------------------------------------------- results that are stored


def test_a_stored_result_is_not_tried_again(tmp_path: Path, monkeypatch: Any) -> None:
    first = probed(tiny_of("zamba"), tmp_path)
    monkeypatch.setattr(probe, "_find", None)
    second = probed(tiny_of("zamba"), tmp_path)
    assert (second.mode, second.reason) == (first.mode, first.reason) == ("whole", first.reason)
    with pytest.raises(TypeError):  # another configuration is another model
        probed(tiny_of("zamba", num_attention_heads=2), tmp_path)


def test_a_damaged_result_is_written_anew(tmp_path: Path) -> None:
    decoder = decode.prepare(tiny_of("llama"))
    assert probe.tried(decoder, str(tmp_path)).mode == "joins"
    [file] = tmp_path.glob(".tried-*")
    whole = file.read_text(encoding="utf-8")
    for text in ("", "{", "[]", '{"mode": "joins"}', '"../../x"', "\x00"):
        file.write_text(text, encoding="utf-8")
        assert probe.tried(decoder, str(tmp_path)).reason == decoder.reason
        assert file.read_text(encoding="utf-8") == whole


def test_a_folder_that_cannot_be_written_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert probed(tiny_of("llama"), tmp_path / "file").mode == "joins"


@pytest.mark.parametrize("fault", ["weights that are not numbers", "out of memory"])
def test_a_try_that_shows_nothing_is_not_stored(
    fault: str, tmp_path: Path, monkeypatch: Any
) -> None:
    model = tiny_of("llama")
    if fault == "out of memory":
        monkeypatch.setattr(decode, "join", raising(MemoryError()))
    else:
        model.lm_head.weight.data[:] = torch.nan
    assert probed(model, tmp_path).mode == "joins"
    assert not [*tmp_path.iterdir()]


def test_a_model_that_is_refused_is_a_model_error(tiny_folder: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(probe, "tried", raising(ValueError("it attends")))
    with pytest.raises(labs.ModelError, match="it attends"):
        labs.load_model(labs.ModelSpec(model_name=str(tiny_folder)), cached=False)


# ---------------------------------------------------------------- chat templates

LOOP = (
    "{% for m in messages %}<{{ m.role }}>"
    "{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}"
)
BODY = "{{ m.role }}: {% if m.content is string %}{{ m.content }}{% else %}?{% endif %}\n"
BY_TYPE = "{% if p['type'] == 'text' %}{{ p['text'] }}{% endif %}{% endfor %}{% endfor %}"
NEEDS_SYSTEM = "{% if messages[0].role != 'system' %}{{ raise_exception('system') }}{% endif %}"
TEMPLATES = {
    "loops over parts": ("parts", LOOP),
    "first part": ("parts", "{% for m in messages %}{{ m.content[0].text }};{% endfor %}"),
    "by type": ("parts", "{% for m in messages %}{% for p in m['content'] %}" + BY_TYPE),
    "plain": ("text", "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"),
    "both": ("text", "{% for m in messages %}" + BODY + "{% endfor %}"),
    "needs a system": ("parts", NEEDS_SYSTEM + LOOP),
    "last only": ("text", "{{ messages[-1].content }}!"),
    "raises": ("text", "{{ raise_exception('not today') }}"),
    "drops": (None, "{% for m in messages %}<{{ m.role }}>{% endfor %}"),
}
TALK = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Any news?"}]


@pytest.fixture
def talker(tiny: labs.Model, monkeypatch: Any) -> labs.Model:
    """The shared model, whose template is put back after the test."""
    monkeypatch.setattr(tiny.tokenizer, "chat_template", tiny.tokenizer.chat_template)
    return tiny


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_form_in_which_a_template_reads_the_user_is_found(name: str, talker: Any) -> None:
    form, template = TEMPLATES[name]
    assert labs_template.content_form(talker.tokenizer, template, "user") == form


@pytest.mark.parametrize("name", ["loops over parts", "first part", "by type", "plain", "both"])
def test_the_users_words_reach_the_prompt_in_any_form(name: str, talker: Any) -> None:
    talker.tokenizer.chat_template = TEMPLATES[name][1]
    assert "Any news?" in labs.build_inputs(talker, prompt="Any news?").prompt
    prompt = labs.build_inputs(talker, messages=TALK).prompt
    assert prompt.index("Be kind.") < prompt.index("Any news?")


def test_a_template_that_leaves_out_the_users_words_is_refused_by_name(talker: Any) -> None:
    talker.tokenizer.chat_template = TEMPLATES["drops"][1]
    with pytest.raises(labs.InputError, match=r"leaves out.*user"):
        labs.build_inputs(talker, prompt="Any news?")
    raw = labs.build_inputs(talker, prompt="Any news?", use_chat_template=False)
    assert raw.prompt.endswith("Any news?")


def test_a_template_may_read_one_role_as_text_and_another_as_parts(talker: Any) -> None:
    talker.tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ m.content + '|' }}"
        "{% else %}{{ m.content[0]['text'] }}{% endif %}{% endfor %}"
    )
    assert labs.build_inputs(talker, messages=TALK).prompt == "Be kind.|Any news?"


# ---------------------------------------------------------------- matrix units

HAS_AMX = "amx_bf16" in (Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else "")
FORTY = """
import labs
model = labs.load_model(labs.load_config(env={}))
assert model.decoder.invariant and model.decoder.steady == 32, model.decoder.steady
words = [f"Tell me {n} facts about the number {n * n}." for n in range(40)]
inputs = [labs.build_inputs(model, prompt=text) for text in words]
options = labs.Generation(max_new_tokens=6)
texts = [""] * len(inputs)
for index, event in labs.stream_batch(model, inputs, options, batch_rows=40):
    if isinstance(event, labs.Delta):
        texts[index] += event.text
assert texts[::5] == [labs.generate(model, each, options).text for each in inputs[::5]]
"""


COUNTS = """
import torch, labs_fast, labs_packing, labs_products
for threads in (1, 2, 3):
    torch.set_num_threads(threads)
    for columns, lines in ((576, 960), (1536, 576), (1024, 128), (512, 64), (4864, 896)):
        linear = torch.nn.Linear(columns, lines, bias=False).bfloat16()
        x = labs_products._cancelling(linear.weight.detach()[torch.randint(0, lines, (32,))])
        fused = labs_fast.FusedWeight([linear], labs_packing.onednn_weight)
        [plan] = labs_products._steady([fused], labs_products.SIZES)
        assert all(plan), plan
        with torch.inference_mode():
            for first, counts in ((32, range(33)), (40, range(33, 300, 7))):
                product = fused.product(x.repeat(2, 1)[:first])[:32]
                for n in counts:
                    lines = x.repeat(10, 1)[:n]
                    same = torch.equal(fused.product(lines), product.repeat(10, 1)[:n])
                    assert same, (threads, columns, n)
"""


@pytest.mark.real
@pytest.mark.skipif(not HAS_AMX, reason="the processor has no AMX for bf16")
@pytest.mark.parametrize("code", [FORTY, COUNTS], ids=["texts", "products"])
def test_with_amx_texts_and_products_are_the_same_beside_others(code: str) -> None:
    own = ("ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")  # of conftest.py
    environment = {name: value for name, value in os.environ.items() if name not in own}
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()[-2000:]


@pytest.mark.parametrize(("offs", "right"), [((0.2, 0, 0), True), ((0.2, 0.2, 0), False)])
def test_single_logits_of_several_rows_are_judged_together(offs, right) -> None:
    logits = torch.tensor([[1.0, -1.0, 1.0, -1.0]])
    own = labs_compare.Own([[1]] * 3, [logits] * 3, labs_compare.OFF_IN_16_BITS, "")
    found = ((i, 0, logits * (1 + share)) for i, share in enumerate(offs))
    assert (own.wrong(found) == "") == right
