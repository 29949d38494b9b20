# SPDX-License-Identifier: Apache-2.0
"""What a model can do, tried at load: every causal type of transformers, tiny and random.

python test_labs_probe.py CACHE llama bert    # how these run, a line of JSON each
LABS_MODELS=1 pytest -m slow test_labs_probe.py -k every    # writes docs/models.md
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import labs
import labs_decode as decode
import labs_forward as forward_room
import labs_loop as loop
import labs_probe as probe
import labs_template

ROOT = Path(__file__).parent.parent
TABLE = ROOT / "docs" / "models.md"
NEW = 8
CHANCE = random.Random(0)
PROMPTS = [[CHANCE.randrange(3, 200) for _ in range(n)] for n in (2, 5, 23, 11)]

# Sizes of a tiny model, by the names that configurations give them.
SMALL: dict[tuple[str, ...], Any] = {
    ("vocab_size", "vocab_size_per_layer_input", "decoder_vocab_size", "unpadded_vocab_size"): 211,
    ("hidden_size", "d_model", "n_embd", "dim", "emb_dim", "embedding_dim", "embedding_size"): 64,
    ("word_embed_proj_dim", "input_embedding_size", "output_embedding_size", "lru_width"): 64,
    ("attention_hidden_size", "mamba_d_ssm", "ple_embed_dim"): 64,
    ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_blocks"): 4,
    ("num_decoder_layers", "encoder_layers", "num_encoder_layers"): 4,
    ("num_encoder_attention_heads", "linear_num_key_heads", "num_experts_per_tok"): 2,
    ("moe_topk", "moe_k", "first_k_dense_replace"): 2,
    ("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"): 4,
    ("encoder_attention_heads", "num_decoder_attention_heads", "attention_heads"): 4,
    ("linear_num_value_heads", "linear_num_heads", "swa_num_attention_heads", "index_n_heads"): 4,
    ("num_key_value_heads", "num_kv_heads", "num_query_groups", "swa_num_key_value_heads"): 2,
    ("num_global_key_value_heads",): 2,
    ("intermediate_size", "ffn_dim", "d_ff", "decoder_ffn_dim", "encoder_ffn_dim"): 96,
    ("ffn_hidden_size", "block_ff_dim", "dim_ff", "dff", "d_inner", "feed_forward_size"): 96,
    ("dense_intermediate_size", "intermediate_size_mlp", "shared_intermediate_size"): 96,
    ("head_dim", "d_kv", "dim_head", "d_head", "attention_head_size", "v_head_dim"): 16,
    ("linear_head_dim", "linear_key_head_dim", "linear_value_head_dim", "swa_head_dim"): 16,
    ("query_pre_attn_scalar", "kv_channels", "mamba_d_head", "mamba_head_dim"): 16,
    ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "hidden_size_per_layer_input"): 16,
    ("index_head_dim", "global_head_dim", "hc_lowrank"): 16,
    ("qk_head_dim",): 24,
    ("qk_rope_head_dim", "rotary_dim", "sliding_window", "sliding_window_size"): 8,
    ("attention_window_size", "attention_chunk_size", "state_size", "ssm_state_size"): 8,
    ("mamba_d_state", "mamba_chunk_size", "chunk_size", "mamba_n_heads"): 8,
    ("mamba_num_heads", "window_size", "local_attention"): 8,
    ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"): 4,
    ("moe_intermediate_size", "shared_expert_intermediate_size"): 32,
    ("shared_experts_intermediate_size", "expert_ffn_hidden_size"): 32,
    ("moe_shared_expert_intermediate_size",): 32,
    ("n_group", "topk_group", "mamba_n_groups", "n_groups", "mamba_ngroups"): 1,
    ("n_shared_experts",): 1,
    ("max_position_embeddings", "n_positions", "max_seq_len", "max_target_positions"): 512,
    ("context_length",): 512,
    ("initializer_range", "init_std"): 0.3,
    ("pad_token_id",): 0,
    ("bos_token_id",): 1,
    ("eos_token_id",): 2,
    ("tie_word_embeddings", "use_mamba_kernels"): False,
}
SIZES = {name: value for names, value in SMALL.items() for name in names}
LATENT = {"num_key_value_heads": 4}  # as many as there are heads
LINEAR = {"layer_types": ["linear_attention", "full_attention"] * 2}
SLIDING = {"layer_types": ["sliding_attention", "full_attention"] * 2}
ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
MORE: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32"), LATENT),
    **dict.fromkeys(("glm4_moe_lite", "glm_moe_dsa", "minicpm3", "sarvam_mla", "youtu"), LATENT),
    "longcat_flash": {**LATENT, "head_dim": 8},
    "bailing_hybrid": {**LATENT, **LINEAR},
    "kimi_linear": {**LATENT, **LINEAR},
    "granitemoehybrid": LINEAR,
    "bamba": {"attn_layer_indices": [1, 3]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "zamba": {
        "layers_block_type": ["mamba", "hybrid"] * 2,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "num_key_value_heads": 4,
    },
    "zamba2": {
        "layers_block_type": ["mamba", "hybrid"] * 2,
        "attention_hidden_size": 128,
        "num_key_value_heads": 4,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"head_dim": 16, "num_heads": 8, "conv_kernel": 4},
    "falcon_h1": {"mamba_n_heads": 4},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
    "dory": {"n_input_layers": 1, "n_recurrent_layers": 2, "n_output_layers": 1, **SLIDING},
    "gemma3n_text": {"num_kv_shared_layers": 1, **SLIDING},
    "blt": {"encoder_hash_byte_group_vocab": 50},
    "xlstm": {"qk_dim_factor": 1.0},
    "reformer": {"is_decoder": True, "axial_pos_embds": False, "attn_layers": ["local", "lsh"] * 2},
    "cohere_compass_text": {
        **SLIDING,
        "rope_parameters": {"sliding_attention": ROPE, "full_attention": ROPE},
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10_000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 32, "hidden_size": 64, "moe_top_k": 2},
    },
    "xmod": {"default_language": "en_XX"},
    "roc_bert": {"pronunciation_vocab_size": 211, "shape_vocab_size": 211},
}


def sizes(kind: str) -> dict[str, Any]:
    made = CONFIG_MAPPING[kind]
    found = {name: value for name, value in SIZES.items() if name in made.__dataclass_fields__}
    for name, part in made.sub_configs.items():
        if (inner := getattr(part, "model_type", "")) in CONFIG_MAPPING:
            found[name] = {"model_type": inner, **sizes(inner)}
    return {**found, **MORE.get(kind, {})}


def tiny(kind: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind](**{**sizes(kind), **changes})
    with torch.device("meta"):
        large = AutoModelForCausalLM.from_config(config)
    if sum(each.numel() for each in large.parameters()) > 2e7:
        raise MemoryError("has parts that no size here makes small")
    model = AutoModelForCausalLM.from_config(config).float().eval()
    for each in model.parameters():
        if each.ndim > 1 and each.std() < 0.1:  # else they say one token again and again
            torch.nn.init.normal_(each, std=0.2)
    options = model.generation_config
    options.pad_token_id, options.eos_token_id, options.forced_eos_token_id = 0, None, None
    return model


def prepare(model: Any, cache: Any) -> decode.Decoder:
    return probe.tried(forward_room.speed_up(decode.prepare(model)), str(cache))


def by_transformers(model: Any, prompt: list[int]) -> list[int]:
    ids = torch.tensor([prompt])
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": NEW, "do_sample": False}
    return list(model.generate(ids, **options)[0, len(prompt) :].tolist())


def in_a_batch(decoder: decode.Decoder) -> list[list[int]]:
    """Return the tokens of rows that join and leave: three at once, the first one a short one."""
    options = {"max_new_tokens": NEW, "sampling": decode.Sampling()}
    rows = [decode.Row(id=i, ids=list(ids), **options) for i, ids in enumerate(PROMPTS)]
    answers: list[list[int]] = [[] for _ in rows]
    for index, choice in loop.run(decoder, iter(rows), 3, loop.Loop()):
        assert isinstance(choice, loop.Choice)
        answers[index].append(choice.token)
        rows[index].over = len(answers[index]) == (NEW if index else 4)
    return answers


def how(kind: str, cache: str) -> dict[str, str]:
    """Return how a type runs and why; how is "wrong" where its tokens are not transformers'."""
    try:
        model = tiny(kind)
    except Exception as error:
        return {"how": "not built", "why": f"{type(error).__name__}: {error}".partition("\n")[0]}
    try:
        decoder = prepare(model, cache)
    except ValueError as error:
        return {"how": "refused", "why": str(error)}
    decode.CHUNK = 7
    expected = [by_transformers(model, prompt) for prompt in PROMPTS]
    expected[0] = expected[0][:4]
    right = in_a_batch(decoder) == expected
    return {"how": decoder.mode if right else "wrong", "why": decoder.reason}


def main(kinds: list[str], cache: str) -> None:
    """Print how each type runs; each in a process of its own, which may hang or crash."""
    torch.set_num_threads(1)
    for kind in kinds:
        reading, writing = os.pipe()
        if (child := os.fork()) == 0:
            signal.alarm(120)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            try:
                found = how(kind, cache)
            except Exception as error:
                found = {"how": "wrong", "why": f"{type(error).__name__}: {error}"[:200]}
            os.write(writing, json.dumps(found).encode())
            os._exit(0)
        os.close(writing)
        with os.fdopen(reading, "rb") as file:
            found = json.loads(file.read() or b'{"how": "wrong", "why": "hangs or crashes"}')
        os.waitpid(child, 0)
        print(json.dumps({"kind": kind, **found}), flush=True)


def sweep(kinds: list[str], cache: Path) -> dict[str, dict[str, str]]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, __file__, str(cache), *kinds]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {line.pop("kind"): line for line in lines}


# ---------------------------------------------------------------- types of models

SAMPLE = {
    "llama": "joins",
    "gpt2": "joins",
    "gemma3_text": "joins",  # windows
    "deepseek_v3": "joins",  # latent keys
    "gpt_oss": "joins",  # sinks
    "mamba2": "joins",  # states
    "doge": "joins",  # these two name the mask that they hand to the attention
    "afmoe": "joins",
    "jamba": "whole",
    "zamba": "whole",  # nothing but trying tells
    "dory": "alone",
    "inkling_text": "alone",
    "git": "alone",
    "xlstm": "alone",
    "rwkv": "alone",
    "bert": "refused",
    "xlm-roberta": "refused",
    "megatron-bert": "refused",
    "blt": "refused",
}


@pytest.mark.parametrize("kind", SAMPLE)
def test_a_type_runs_as_the_table_tells_with_transformers_tokens(
    kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(decode, "CHUNK", 256)  # set back what `how` sets
    found = how(kind, str(tmp_path))
    assert found["how"] == SAMPLE[kind], found["why"]
    assert f"| {kind} | {found['how']} |" in TABLE.read_text(encoding="utf-8")


@pytest.mark.long
def test_every_causal_type_runs_as_generate_or_alone_or_is_refused(tmp_path: Path) -> None:
    found = sweep(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES), tmp_path)
    text = as_table(found)
    if os.environ.get("LABS_MODELS"):
        TABLE.parent.mkdir(exist_ok=True)
        TABLE.write_text(text, encoding="utf-8")
    assert not [kind for kind, each in found.items() if each["how"] == "wrong"]
    assert sum(each["how"] in ("joins", "whole", "alone") for each in found.values()) >= 100
    columns = [line.split(" | ")[:2] for line in TABLE.read_text(encoding="utf-8").splitlines()]
    assert [line.split(" | ")[:2] for line in text.splitlines()] == columns


def as_table(found: dict[str, dict[str, str]]) -> str:
    counts = Counter(each["how"] for each in found.values())
    numbers = ", ".join(f"{how}: {count}" for how, count in counts.most_common())
    lines = [
        f"| {kind} | {each['how']} | {each['why'].replace('|', '/').strip()} |"
        for kind, each in sorted(found.items())
    ]
    head = [f"# Which types of models run, and how\n\n{' '.join(MEANING)}\n\n{numbers}.\n"]
    return "\n".join([*head, "| type | how | why |", "|---|---|---|", *lines]) + "\n"


MEANING = (
    "A tiny random model of each type that transformers' AutoModelForCausalLM knows, in float32,",
    "against its own `generate`: four prompts, joining and leaving. joins: rows share each step.",
    "whole: they do, but a prompt is written in one call. alone: one row at a time, by the steps",
    "of `generate`. refused: by name, when it is loaded. not built: no tiny configuration could",
    "be made of it; how it runs is found out when it is loaded.",
)


@pytest.mark.parametrize("kind", ["bert", "roberta", "electra"])
def test_a_model_that_fills_gaps_is_refused_by_name_unless_it_is_a_decoder(
    kind: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=f"^{kind} attends in both directions"):
        prepare(tiny(kind), tmp_path)
    decoder = prepare(tiny(kind, is_decoder=True), tmp_path)
    assert decoder.mode in ("joins", "alone")


def test_a_model_whose_rows_see_each_other_runs_alone(tmp_path: Path) -> None:
    model = tiny("llama")
    model.lm_head.register_forward_hook(lambda _, __, logits: logits + logits.mean(0))
    decoder = prepare(model, tmp_path)
    assert decoder.mode == "alone"
    assert "tried at load" in decoder.reason
    assert not decoder.packable
    assert model.config._attn_implementation == "sdpa"


def test_a_model_that_fails_on_two_rows_runs_alone_and_the_reason_names_the_error(
    tmp_path: Path,
) -> None:
    model = tiny("qwen2")

    def refuse(_: Any, args: tuple[torch.Tensor, ...]) -> None:
        if len(args[0]) > 1:
            raise IndexError("one row, please")

    model.lm_head.register_forward_pre_hook(refuse)
    decoder = prepare(model, tmp_path)
    assert (decoder.mode, "one row, please" in decoder.reason) == ("alone", True)


def test_a_model_that_fails_even_alone_is_refused_with_its_error(tmp_path: Path) -> None:
    model = tiny("llama")
    model.lm_head.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyError("pixels")))
    with pytest.raises(ValueError, match=r"llama cannot generate from token ids alone.*pixels"):
        prepare(model, tmp_path)


def test_prompts_that_get_other_logits_in_one_call_go_one_at_a_time(tmp_path: Path) -> None:
    decoder = forward_room.speed_up(decode.prepare(tiny("llama")))
    packed = forward_room.prefill_packed

    def shuffled(decoder: decode.Decoder, newcomers: Any) -> Any:
        return [*reversed(packed(decoder, newcomers))]

    wrong = decode.replace(decoder, prefill_packed=shuffled)
    assert probe.tried(wrong, str(tmp_path / "a")).prefill_packed is None
    assert probe.tried(decoder, str(tmp_path / "b")).prefill_packed is packed


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "gpt_oss", "qwen3_moe", "bamba", "jamba"])
def test_16_bits_are_told_from_a_fault(kind: str, tmp_path: Path) -> None:
    model = tiny(kind).bfloat16()
    by_name = decode.prepare(model)
    assert probe.tried(by_name, str(tmp_path)).mode == by_name.mode


# ---------------------------------------------------------------- what is remembered


def test_what_was_found_is_not_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepare(tiny("zamba"), tmp_path)
    monkeypatch.setattr(probe, "_find", None)
    second = prepare(tiny("zamba"), tmp_path)
    assert (second.mode, second.reason) == (first.mode, first.reason) == ("whole", first.reason)
    with pytest.raises(TypeError):  # another configuration is another model
        prepare(tiny("zamba", num_attention_heads=2), tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"mode": "joins"}', '"../../x"', "\x00"])
def test_a_torn_memory_is_written_anew(text: str, tmp_path: Path) -> None:
    found = prepare(tiny("llama"), tmp_path)
    [file] = tmp_path.glob(".tried-*")
    whole = file.read_text(encoding="utf-8")
    file.write_text(text, encoding="utf-8")
    assert prepare(tiny("llama"), tmp_path).reason == found.reason
    assert file.read_text(encoding="utf-8") == whole


def test_a_folder_that_cannot_be_written_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert prepare(tiny("llama"), tmp_path / "file").mode == "joins"


def test_from_weights_that_are_no_numbers_nothing_is_learnt(tmp_path: Path) -> None:
    model = tiny("llama")
    model.lm_head.weight.data[:] = torch.nan
    assert prepare(model, tmp_path).mode == "joins"
    assert not [*tmp_path.iterdir()]


def test_where_memory_runs_out_while_trying_nothing_is_learnt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode, "join", lambda *_: (_ for _ in ()).throw(MemoryError))
    assert prepare(tiny("llama"), tmp_path).mode == "joins"
    assert not [*tmp_path.iterdir()]


def test_a_model_that_is_refused_is_a_model_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "tried", lambda *_: (_ for _ in ()).throw(ValueError("it looks")))
    with pytest.raises(labs.ModelError, match="it looks"):
        labs.load_model(labs.load_config(env={}), cached=False)


# ---------------------------------------------------------------- bits of products


class Border(torch.nn.Linear):
    """A linear layer whose products of more rows than `border` have other bits."""

    border = 32

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        product = x @ self.weight.T
        rows = x.numel() // x.shape[-1]
        return product + (1e-3 if rows > self.border else 0)


def bordered(border: int) -> decode.Decoder:
    decoder = decode.prepare(tiny("llama").bfloat16())
    assert decoder.invariant
    layer = decoder.model.model.layers[1].mlp
    made = Border(layer.up_proj.in_features, layer.up_proj.out_features, bias=False)
    made.border, made.weight.data = border, torch.ones_like(made.weight).bfloat16()
    layer.up_proj = made
    return decoder


def test_products_that_change_beyond_a_border_bound_the_rows_of_a_call() -> None:
    decoder = forward_room.steadied(bordered(40))
    assert (decoder.invariant, decoder.steady) == (True, 32)


@pytest.mark.parametrize("border", [2, 3, 16])
def test_a_decoder_whose_products_change_with_few_rows_is_not_invariant(border: int) -> None:
    decoder = forward_room.steadied(bordered(border))
    assert (decoder.invariant, decoder.duplicates_lone_row, decoder.steady) == (False, False, 0)


def test_a_step_of_more_rows_than_keep_their_bits_goes_in_calls_of_fewer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    decoder = decode.replace(decode.prepare(tiny("llama")), steady=4)
    calls: list[int] = []
    call = decode.call_model
    monkeypatch.setattr(
        decode, "call_model", lambda d, ids, *r: (calls.append(len(ids)), call(d, ids, *r))[1]
    )
    batch = None
    for index in range(9):
        row = decode.Row(id=index, ids=[5 + index, 7], max_new_tokens=4, sampling=decode.Sampling())
        new = loop.step(decoder, decode.prefill(decoder, decode.new_batch(decoder, row)))[0]
        batch = decode.join(batch, new) if batch else new
    assert batch is not None
    calls.clear()
    logits = decode.forward(decoder, batch)
    assert calls == [3, 3, 3]
    whole = decode.forward(decode.replace(decoder, steady=0), batch)
    torch.testing.assert_close(logits, whole, atol=1e-4, rtol=1e-3)


def test_prompts_share_a_call_up_to_the_rows_that_keep_their_bits() -> None:
    decoder = forward_room.speed_up(decode.prepare(tiny("llama")))
    options = {"max_new_tokens": 4, "sampling": decode.Sampling()}
    rows = [decode.Row(id=i, ids=[9] * 12, **options) for i in range(5)]
    entered = [decode.new_batch(decoder, row) for row in rows]
    assert len(loop.prompts_for_one_call(decoder, entered)) == 5
    assert len(loop.prompts_for_one_call(decode.replace(decoder, steady=32), entered)) == 2


def test_guesses_stay_within_the_rows_that_keep_their_bits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    decoder = decode.replace(decode.prepare(tiny("llama")), steady=4)
    row = decode.Row(
        id=0,
        ids=[5, 6, 7, 8, 9, 10] * 3,
        max_new_tokens=30,
        sampling=decode.Sampling(),
        lookahead=9,
    )
    batch = decode.prefill(decoder, decode.new_batch(decoder, row))
    batch = loop.step(decoder, batch)[0]
    row.ids[-1] = 5
    sizes: list[int] = []
    slots = decode.forward_slots
    monkeypatch.setattr(
        decode,
        "forward_slots",
        lambda d, b, ids, *r: (sizes.append(len(ids)), slots(d, b, ids, *r))[1],
    )
    forward_room.step_speculative(decoder, batch)
    assert sizes == [4]


HAS_AMX = "amx_bf16" in (Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else "")
COMPANY = """
import torch, labs
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


@pytest.mark.skipif(not HAS_AMX, reason="the processor has no AMX for bf16")
def test_with_amx_texts_are_the_same_in_the_company_of_forty() -> None:
    own = ("ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")  # of conftest.py
    environment = {name: value for name, value in os.environ.items() if name not in own}
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run([sys.executable, "-c", COMPANY], env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()[-2000:]


# ---------------------------------------------------------------- chat templates

LOOP = (
    "{% for m in messages %}<{{ m.role }}>"
    "{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}"
)
BODY = "{{ m.role }}: {% if m.content is string %}{{ m.content }}{% else %}?{% endif %}\n"
TEMPLATES = {
    "loops over parts": ("parts", LOOP),
    "first part": ("parts", "{% for m in messages %}{{ m.content[0].text }};{% endfor %}"),
    "by type": (
        "parts",
        "{% for m in messages %}{% for p in m['content'] %}{% if p['type'] == 'text' %}"
        "{{ p['text'] }}{% endif %}{% endfor %}{% endfor %}",
    ),
    "plain": ("text", "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"),
    "both": ("text", "{% for m in messages %}" + BODY + "{% endfor %}"),
    "needs a system": (
        "parts",
        "{% if messages[0].role != 'system' %}{{ raise_exception('system first') }}{% endif %}"
        + LOOP,
    ),
    "last only": ("text", "{{ messages[-1].content }}!"),
    "raises": ("text", "{{ raise_exception('not today') }}"),
    "drops": (None, "{% for m in messages %}<{{ m.role }}>{% endfor %}"),
}


@pytest.fixture
def model() -> Any:
    model = labs.load_model(labs.load_config(env={}))
    before = model.tokenizer.chat_template
    yield model
    model.tokenizer.chat_template = before


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_form_in_which_a_template_reads_the_user_is_found(name: str, model: Any) -> None:
    form, template = TEMPLATES[name]
    assert labs_template.content_form(model.tokenizer, template, "user") == form


@pytest.mark.parametrize("name", ["loops over parts", "first part", "by type", "plain", "both"])
def test_the_users_words_reach_the_prompt_whatever_a_template_reads(name: str, model: Any) -> None:
    model.tokenizer.chat_template = TEMPLATES[name][1]
    talk = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Any news?"}]
    assert "Any news?" in labs.build_inputs(model, prompt="Any news?").prompt
    prompt = labs.build_inputs(model, messages=talk).prompt
    assert "Be kind." in prompt
    assert "Any news?" in prompt


def test_a_template_that_leaves_out_the_users_words_is_refused_by_name(model: Any) -> None:
    model.tokenizer.chat_template = TEMPLATES["drops"][1]
    with pytest.raises(labs.InputError, match="leaves out what a message of the user says"):
        labs.build_inputs(model, prompt="Any news?")
    with contextlib.suppress(labs.InputError):
        labs.build_inputs(model, prompt="Any news?", use_chat_template=False)


def test_a_template_that_reads_one_role_as_text_and_another_as_parts_gets_both(model: Any) -> None:
    model.tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ m.content + '|' }}"
        "{% else %}{{ m.content[0]['text'] }}{% endif %}{% endfor %}"
    )
    talk = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Any news?"}]
    assert labs.build_inputs(model, messages=talk).prompt == "Be kind.|Any news?"


# ---------------------------------------------------------------- attention by name


@pytest.mark.parametrize("function", [decode.attention, decode.attention_invariant])
@pytest.mark.parametrize("queries", [1, 3])
def test_attention_takes_the_mask_by_position_and_by_name(function: Any, queries: int) -> None:
    q, k, v = (torch.randn(2, 4, n, 16) for n in (queries, 5, 5))
    mask = torch.zeros(2, 1, queries, 5).masked_fill(torch.rand(2, 1, queries, 5) < 0.3, -9.0)
    module = torch.nn.Module()
    by_place = function(module, q, k, v, mask, scaling=0.2, dropout=0.0)[0]
    by_name = function(
        module, query=q, key=k, value=v, attention_mask=mask, scaling=0.2, dropout=0.0
    )[0]
    assert torch.equal(by_place, by_name)


if __name__ == "__main__":
    main(sys.argv[2:], sys.argv[1])


@pytest.mark.parametrize("wanted", [{"load_in_8bit": True}, {"load_in_4bit": True}], ids=str)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_model_whose_products_a_call_rounds_joins_as_before(dtype: str, wanted: Any) -> None:
    pytest.importorskip("bitsandbytes", reason="quantisation is an extra")
    spec = labs.ModelSpec(torch_dtype=dtype, quantization=labs.Quantization(**wanted))
    assert labs.load_model(spec, cached=False).decoder.mode == "joins"
