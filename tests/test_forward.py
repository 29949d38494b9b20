# SPDX-License-Identifier: Apache-2.0
"""labs_forward: the dense families as functions, with the logits of transformers' modules."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import kit
import pytest
import torch
import transformers
from decoding import raising, run_at_random
from kit import PROMPTS, SLIDING, by_transformers, prepare, random_model
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import labs
import labs_attention
import labs_calls
import labs_compare
import labs_decode as decode
import labs_explain
import labs_forward
import labs_kernels
import labs_layers
import labs_steady

# {model_type: settings in which its tiny model differs from that of kit.ARCHITECTURES}
VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True, "head_dim": 24},
    "mistral": {"sliding_window": None, "head_dim": 80},
    "ministral": {"head_dim": 16, "sliding_window": 8},
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
    "qwen3": {"attention_bias": True, "head_dim": 128},
    "smollm3": {"no_rope_layers": [1, 0, 1, 0]},
    "granite": {
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.4,
        "attention_multiplier": 0.2,
        "logits_scaling": 5.0,
    },
    "phi3": {"partial_rotary_factor": 0.5, "sliding_window": None},
    "starcoder2": {"use_bias": True, "sliding_window": 8},
    "seed_oss": {"head_dim": 16},
    "arcee": {},
    "olmo2": {},
    "olmo3": SLIDING,
    "exaone4": {"sliding_window": None, "layer_types": ["full_attention"] * 4},
    "gemma": {"head_dim": 16},
    "gemma2": {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    "gemma3_text": {"head_dim": 24},
    "glm": {"head_dim": 16, "partial_rotary_factor": 0.25},
    "glm4": {"head_dim": 32, "attention_bias": True},
}
TYPES = [*VARIANTS]


def tiny(kind: str, **extra: Any) -> Any:
    """Make a tiny model whose norms are not all ones, as those of a new model are."""
    kit.ARCHITECTURES.setdefault(kind, ("joins", {}))
    model = random_model(kind, **extra)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, 0 if kind.startswith("gemma") else 1, 0.2)
    return model


@torch.inference_mode()
def differences(own: decode.Decoder) -> list[float]:
    """Return how far the logits of labs' forward are from transformers', in several calls."""
    assert own.forward is not None, own.why_forward
    theirs, texts = dataclasses.replace(own, forward=None), labs_compare.Own.of(own.model).texts
    kinds = (labs_compare.together, labs_compare.packed, labs_compare.guesses)
    pairs = [
        pair for call in kinds for pair in zip(call(own, texts), call(theirs, texts), strict=True)
    ]
    return [labs_compare.off(found, expected) for (*_, found), (*_, expected) in pairs]


def test_the_table_names_each_family_that_is_tested() -> None:
    assert {*labs_layers.FAMILIES} == {*TYPES}


@pytest.mark.parametrize("changed", [False, True])
@pytest.mark.parametrize("kind", TYPES)
def test_a_family_has_the_logits_of_transformers_alone_together_and_packed(kind, changed) -> None:
    model = tiny(kind, **(VARIANTS[kind] if changed or kind in NEW else {}))
    assert max(differences(prepare(model))) < 2e-5


NEW = {*TYPES} - {*kit.ARCHITECTURES, *kit.DULL}


@pytest.mark.parametrize("kind", TYPES)
def test_rows_that_come_and_go_have_the_tokens_of_generate(kind) -> None:
    model = tiny(kind, **VARIANTS[kind])
    expected = [by_transformers(model, prompt) for prompt in PROMPTS]
    found = run_at_random(prepare(model), PROMPTS, seed=1)
    assert found == [line[: len(got)] for line, got in zip(expected, found, strict=True)]


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(), (2, 1), (16, 1), (32, 2)])  # heads, groups
@pytest.mark.parametrize(
    ("kind", "dim"), [*(("llama", n) for n in (16, 40, 64, 80, 128)), ("gemma2", 24)]
)
def test_rows_keep_their_bits_in_any_company_with_heads_of_any_size_and_long_rows(
    kind, dim, shape, dtype, own
) -> None:
    heads = dict(zip(("num_attention_heads", "num_key_value_heads"), shape, strict=False))
    model = random_model(kind, head_dim=dim, max_position_embeddings=2048, **heads).to(dtype)
    decoder = prepare(model)
    decoder = decoder if own else dataclasses.replace(decoder, forward=None)
    assert decoder.invariant or not {torch.float32, dtype} <= {*labs_kernels.packed_types()}
    prompts = [(PROMPTS[5] * 30)[:length] for length in (3, 700, 80, 300, 1100)]
    alone = [logits_of(decoder, [prompt])[0] for prompt in prompts]
    for found, expected in zip(logits_of(decoder, prompts), alone, strict=True):
        assert not decoder.invariant or torch.equal(found, expected)


def logits_of(decoder: decode.Decoder, prompts: list[list[int]]) -> torch.Tensor:
    """Return the logits [B, V] of the third step of prompts that run in one batch."""
    batch = None
    for key, prompt in enumerate(prompts):
        new = kit.newcomer(decoder, prompt, key)
        batch = decode.join(batch, new) if batch else new
    assert batch
    for _ in range(2):
        logits = decode.forward(decoder, batch)
        for row in batch.rows:
            row.take(5)
    return logits


# ---------------------------------------------------------------- norms of the residual stream


@pytest.mark.parametrize("size", [1e-4, 1.0, 1e3])
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("n", [576, 960])  # 24 squared, and a number without an exact root
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_residual_stream_has_the_rms_norm_alone_and_beside_other_lines(
    dtype, n, offset, size
) -> None:
    torch.manual_seed(0)
    norm = LlamaRMSNorm(n, eps=1e-5)
    torch.nn.init.normal_(norm.to(dtype).weight, 1 - offset, 0.2)
    x = (torch.randn(33, n) * size).to(dtype)
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt()
    exact *= norm.weight.double() + offset
    own = labs_layers._residual_norm_of(dtype, [norm], offset)
    stream = torch.nn.functional.pad(x.float(), (0, 1), value=math.sqrt(n * 1e-5))
    with torch.inference_mode():
        found = own(stream)
        off = (found.double() - exact).abs() / exact.abs().clamp_min(1e-30)
        assert found.dtype == dtype
        assert off.max() < (4 if dtype == torch.float32 else 0.51) * torch.finfo(dtype).eps
        assert ((found.double() / exact).mean() - 1).abs() < 3e-4
        for i in (0, 1, 16, 32):
            assert torch.equal(own(stream[i : i + 1])[0], found[i])


@pytest.mark.parametrize("kind", TYPES)
def test_a_family_with_rms_norms_before_all_layers_has_their_floor_in_the_stream(kind) -> None:
    model = tiny(kind, **VARIANTS[kind])
    weights = labs_layers.weights_of(decode.prepare(model))
    assert not isinstance(weights, str)
    floor = math.sqrt(model.config.hidden_size * model.config.rms_norm_eps) if kind in RMS else None
    assert weights.floor == (pytest.approx(floor) if floor else None)


# The others have LayerNorm, or norms after attention and MLPs only.
RMS = {*TYPES} - {"starcoder2", "olmo2", "olmo3", "exaone4"}


def test_norms_with_different_terms_take_no_common_floor() -> None:
    model = tiny("llama")
    model.model.layers[1].input_layernorm.variance_epsilon *= 2
    own = prepare(model)
    assert own.forward.args[0].floor is None
    assert max(differences(own)) < 2e-5


# ---------------------------------------------------------------- whose forward runs


def test_other_models_and_devices_keep_the_forward_of_transformers() -> None:
    for kind, why in (("gpt2", "no forward of its own for gpt2"), ("mamba2", "mamba2")):
        assert why in labs_forward.speed_up(decode.prepare(random_model(kind))).why_forward
    model = random_model("llama")
    model.model.layers[1].to("meta")
    assert "several devices" in labs_forward.speed_up(decode.prepare(model)).why_forward
    model = random_model("llama")
    model.model.layers[0].register_forward_hook(lambda *args: None)
    assert "hooks" in labs_forward.speed_up(decode.prepare(model)).why_forward
    model = random_model("llama")
    del model.model.layers[2].mlp.up_proj
    assert "its modules are not" in labs_forward.speed_up(decode.prepare(model)).why_forward


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        ("granite", "logits_scaling", 0),
        ("qwen3", "layer_types", ["full_attention"]),
        ("llama", "layer_types", 7),
    ],
)
def test_a_configuration_with_odd_values_keeps_the_forward_of_transformers(
    kind, name, value
) -> None:
    decoder = decode.prepare(random_model(kind))
    decoder.model.config.__dict__[name] = value
    assert "its modules are not" in str(labs_layers.weights_of(decoder))


def test_an_interrupted_write_of_the_comparison_is_no_result(tmp_path, monkeypatch) -> None:
    decoder = labs_calls.speed_up(decode.prepare(random_model("llama")))
    labs_forward.speed_up(decoder, str(tmp_path))
    (file,) = tmp_path.iterdir()
    mlp = labs_forward.mlp
    monkeypatch.setattr(labs_forward, "mlp", lambda *given: 1.1 * mlp(*given))
    for text in ("", '"', "7"):
        file.write_text(text)
        assert labs_forward.speed_up(decoder, str(tmp_path)).forward is None


def test_the_comparison_is_made_anew_if_a_file_of_the_forward_has_changed(
    tmp_path, monkeypatch
) -> None:
    rooms = labs_forward, labs_layers, labs_attention, labs_steady
    files = {room.__file__ for room in rooms}
    assert files == {*labs_forward.SOURCES}
    decoder = labs_calls.speed_up(decode.prepare(random_model("llama")))
    sources = [*labs_forward.SOURCES]
    (cache := tmp_path / "cache").mkdir()
    for number in range(len(sources) + 1):
        monkeypatch.setattr(labs_forward, "SOURCES", tuple(sources))
        labs_forward.speed_up(decoder, str(cache))
        assert len([*cache.iterdir()]) == number + 1
        if number < len(sources):
            changed = tmp_path / f"{number}.py"
            changed.write_text(f"{Path(sources[number]).read_text('utf-8')}#", encoding="utf-8")
            sources[number] = str(changed)


def test_hooks_on_the_model_still_see_each_call() -> None:
    model = kit.model_of("llama")
    assert model.decoder.forward is not None
    with kit.counted(model) as calls:
        labs.generate(model, kit.SHORT, max_new_tokens=3, temperature=0)
    assert len(calls) == 3


def test_a_forward_with_other_logits_is_noticed_once_and_does_not_run(
    tmp_path, monkeypatch
) -> None:
    model, mlp = random_model("llama"), labs_forward.mlp
    decoder = labs_calls.speed_up(decode.prepare(model))
    monkeypatch.setattr(labs_forward, "mlp", lambda layer, x: mlp(layer, x) * 1.1)
    found = labs_forward.speed_up(decoder, str(tmp_path))
    assert (found.forward, "rows have other logits" in found.why_forward) == (None, True)
    monkeypatch.undo()
    assert labs_forward.speed_up(decoder, str(tmp_path)).forward is None  # the result is kept
    assert labs_forward.speed_up(decoder, str(tmp_path / "new")).forward is not None
    (tmp_path / "file").write_text("in the way of a folder")
    assert labs_forward.speed_up(decoder, str(tmp_path / "file")).forward is not None


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
def test_a_comparison_without_memory_or_numbers_is_not_kept(error, tmp_path, monkeypatch) -> None:
    decoder = decode.prepare(random_model("llama"))
    with monkeypatch.context() as patch:
        patch.setattr(labs_compare, "together", raising(error))
        assert "memory" in labs_forward.speed_up(decoder, str(tmp_path)).why_forward
    torch.nn.init.constant_(decoder.model.model.norm.weight, float("nan"))
    assert "not numbers" in labs_forward.speed_up(decoder, str(tmp_path)).why_forward
    assert not [*tmp_path.iterdir()]


def test_explain_says_whose_forward_runs_and_why(tmp_path) -> None:
    for config, who in ((kit.llama(), "labs: its logits"), (GPT2, "transformers: labs has no")):
        model = kit.load(kit.save_model(tmp_path / who[:4], config), torch_dtype="auto")
        plan = labs_explain.explain(model, kit.SHORT, labs.Generation())
        assert plan.forward.startswith(who)
        assert json.dumps(plan.forward)
        shown = plan.settings["torch_dtype"]  # of which "auto" says nothing
        assert (shown.value, model.spec.torch_dtype) == (model.dtype, "auto")


GPT2 = transformers.GPT2Config(
    vocab_size=262, n_embd=64, n_layer=2, n_head=4, bos_token_id=256, eos_token_id=257
)


@pytest.mark.parametrize("method", ["int8", "int4"])
def test_quantised_layers_run_through_the_same_functions(method) -> None:
    assert max(differences(prepare(random_model("llama"), method=method))) < 1e-4


def test_a_norm_computes_in_float32_while_another_model_is_loaded() -> None:
    norm = LlamaRMSNorm(64)
    own = labs_layers._residual_norm_of(torch.bfloat16, [norm], 0.0)
    x = torch.randn(7, 65)
    expected = own(x)
    labs_layers._roots.cache_clear()
    torch.set_default_dtype(torch.bfloat16)  # as transformers does meanwhile, for all threads
    try:
        assert torch.equal(own(x), expected)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(own(x), expected)


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [100, 192])
@pytest.mark.parametrize("name", ["gelu", "quick_gelu", "gelu_pytorch_tanh", "relu"])
@pytest.mark.parametrize("kind", ["llama", "starcoder2", "gpt_neox"])
def test_rows_keep_their_bits_in_any_company_with_any_activation(
    kind, name, width, dtype, own, monkeypatch
) -> None:
    if not own:
        monkeypatch.setattr(labs_layers, "FAMILIES", {})
    model = random_model(kind, intermediate_size=width, hidden_act=name).to(dtype)
    decoder = prepare(model)
    assert (decoder.forward is not None) == (own and kind in TYPES)
    prompts = [PROMPTS[5][:length] for length in (3, 9, 5, 4, 7, 8, 6)]
    alone = [logits_of(decoder, [prompt])[0] for prompt in prompts]
    together = torch.stack(alone)
    assert not decoder.invariant or torch.equal(logits_of(decoder, prompts), together)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("width", [100, 1411, 1536, 2816, 40_000])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize(
    "name", ["silu", "gelu", "quick_gelu", "gelu_pytorch_tanh", "mish", "tanh"]
)
def test_other_rows_change_no_bits_of_an_activation_with_any_number_of_threads(
    count, width, name, gated
) -> None:
    function = labs_layers._function_of(ACT2FN[name])
    x = torch.randn(31, 2 * width)[:, :width] if gated else torch.randn(31, width)
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        together = labs_steady.steady(function, x)
        alone = [labs_steady.steady(function, row[None])[0] for row in x]
    finally:
        torch.set_num_threads(before)
    assert torch.equal(together, torch.stack(alone))
    assert torch.allclose(together, function(x), atol=1e-5)  # exact gelu has two kernels
