# SPDX-License-Identifier: Apache-2.0
"""labs_probe: how models run, tried at load; and the forms that chat templates read.

python tests/test_probe.py CACHE llama bert    # prints how these types run, a line of JSON each
LABS_MODELS=1 pytest -m long tests/test_probe.py -k every    # writes docs/models.md
"""

from __future__ import annotations

import dataclasses
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
from decoding import raising
from kit import by_transformers
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import labs
import labs_calls
import labs_decode as decode
import labs_loop as loop
import labs_probe as probe
import labs_template

ROOT = Path(__file__).parent.parent
TABLE = ROOT / "docs" / "models.md"
NEW = 8
CHANCE = random.Random(0)
PROMPTS = [[CHANCE.randrange(3, 200) for _ in range(n)] for n in (2, 5, 23, 11)]

# Sizes of a tiny model, by the names that configurations give them.
SMALL: dict[Any, str] = {
    211: "vocab_size vocab_size_per_layer_input decoder_vocab_size unpadded_vocab_size",
    64: "hidden_size d_model n_embd dim emb_dim embedding_dim embedding_size word_embed_proj_dim"
    " input_embedding_size output_embedding_size lru_width attention_hidden_size mamba_d_ssm"
    " ple_embed_dim",
    4: "num_hidden_layers n_layer n_layers num_layers decoder_layers num_blocks num_decoder_layers"
    " encoder_layers num_encoder_layers num_attention_heads n_head n_heads num_heads"
    " decoder_attention_heads encoder_attention_heads num_decoder_attention_heads attention_heads"
    " linear_num_value_heads linear_num_heads swa_num_attention_heads index_n_heads num_experts"
    " num_local_experts n_routed_experts moe_num_experts",
    2: "num_encoder_attention_heads linear_num_key_heads num_experts_per_tok moe_topk moe_k"
    " first_k_dense_replace num_key_value_heads num_kv_heads num_query_groups"
    " swa_num_key_value_heads num_global_key_value_heads eos_token_id",
    96: "intermediate_size ffn_dim d_ff decoder_ffn_dim encoder_ffn_dim ffn_hidden_size"
    " block_ff_dim dim_ff dff d_inner feed_forward_size dense_intermediate_size"
    " intermediate_size_mlp shared_intermediate_size",
    16: "head_dim d_kv dim_head d_head attention_head_size v_head_dim linear_head_dim"
    " linear_key_head_dim linear_value_head_dim swa_head_dim query_pre_attn_scalar kv_channels"
    " mamba_d_head mamba_head_dim q_lora_rank kv_lora_rank qk_nope_head_dim"
    " hidden_size_per_layer_input index_head_dim global_head_dim hc_lowrank",
    24: "qk_head_dim",
    8: "qk_rope_head_dim rotary_dim sliding_window sliding_window_size attention_window_size"
    " attention_chunk_size state_size ssm_state_size mamba_d_state mamba_chunk_size chunk_size"
    " mamba_n_heads mamba_num_heads window_size local_attention",
    32: "moe_intermediate_size shared_expert_intermediate_size shared_experts_intermediate_size"
    " expert_ffn_hidden_size moe_shared_expert_intermediate_size",
    1: "n_group topk_group mamba_n_groups n_groups mamba_ngroups n_shared_experts bos_token_id",
    512: "max_position_embeddings n_positions max_seq_len max_target_positions context_length",
    0.3: "initializer_range init_std",
    0: "pad_token_id",
}
SIZES = {name: value for value, names in SMALL.items() for name in names.split()}
SIZES |= {"tie_word_embeddings": False, "use_mamba_kernels": False}
LATENT = {"num_key_value_heads": 4}  # as many as there are heads
LINEAR = {"layer_types": ["linear_attention", "full_attention"] * 2}
SLIDING = {"layer_types": ["sliding_attention", "full_attention"] * 2}
ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
ZAMBA = {"layers_block_type": ["mamba", "hybrid"] * 2, "attention_hidden_size": 128, **LATENT}
MORE: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32"), LATENT),
    **dict.fromkeys(("glm4_moe_lite", "glm_moe_dsa", "minicpm3", "sarvam_mla", "youtu"), LATENT),
    "longcat_flash": {**LATENT, "head_dim": 8},
    "bailing_hybrid": {**LATENT, **LINEAR},
    "kimi_linear": {**LATENT, **LINEAR},
    "granitemoehybrid": LINEAR,
    "bamba": {"attn_layer_indices": [1, 3]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "zamba": {**ZAMBA, "attention_head_dim": 32},
    "zamba2": ZAMBA,
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


def tiny_of(kind: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind](**{**sizes(kind), **changes})
    with torch.device("meta"):
        large = AutoModelForCausalLM.from_config(config)
    if sum(each.numel() for each in large.parameters()) > 2e7:
        raise MemoryError("has parts that no size here makes small")
    model = AutoModelForCausalLM.from_config(config).float().eval()
    for each in model.parameters():
        if each.ndim > 1 and each.std() < 0.1:  # otherwise they repeat one token
            torch.nn.init.normal_(each, std=0.2)
    options = model.generation_config
    options.pad_token_id, options.eos_token_id, options.forced_eos_token_id = 0, None, None
    return model


def probed(model: Any, cache: Any) -> decode.Decoder:
    return probe.tried(labs_calls.speed_up(decode.prepare(model)), str(cache))


def in_a_batch(decoder: decode.Decoder) -> list[list[int]]:
    """Return the tokens of rows that join and leave: three at once, of which the first is short."""
    options = {"max_new_tokens": NEW, "sampling": decode.Sampling()}
    rows = [decode.Row(id=i, ids=list(ids), **options) for i, ids in enumerate(PROMPTS)]
    answers: list[list[int]] = [[] for _ in rows]
    for index, choice in loop.run(decoder, iter(rows), 3, loop.Loop()):
        assert isinstance(choice, loop.Choice)
        answers[index].append(choice.token)
        rows[index].over = len(answers[index]) == (NEW if index else 4)
    return answers


def how(kind: str, cache: str) -> dict[str, str]:
    """Return how a type runs and why; how is "wrong" if its tokens are not transformers'."""
    try:
        model = tiny_of(kind)
    except Exception as error:
        return {"how": "not built", "why": f"{type(error).__name__}: {error}".partition("\n")[0]}
    try:
        decoder = probed(model, cache)
    except ValueError as error:
        return {"how": "refused", "why": str(error)}
    decode.CHUNK = 7
    expected = [by_transformers(model, prompt, NEW) for prompt in PROMPTS]
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
def test_every_causal_type_runs_as_generate_or_alone_or_is_refused(tmp_path: Path) -> None:
    path = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    command = [sys.executable, __file__, str(tmp_path), *sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    found = {line.pop("kind"): line for line in lines}
    text = as_table(found)
    if os.environ.get("LABS_MODELS"):
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


@pytest.mark.real
@pytest.mark.skipif(not HAS_AMX, reason="the processor has no AMX for bf16")
def test_with_amx_texts_are_the_same_beside_forty_others() -> None:
    own = ("ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")  # of conftest.py
    environment = {name: value for name, value in os.environ.items() if name not in own}
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run([sys.executable, "-c", FORTY], env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()[-2000:]


if __name__ == "__main__":
    main(sys.argv[2:], sys.argv[1])
