# SPDX-License-Identifier: Apache-2.0
"""How each type of model runs: a tiny random one of it, against transformers' own generate."""

from __future__ import annotations

import json
import os
import random
import signal
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import labs_calls
import labs_decode as decode
import labs_loop as loop
import labs_probe

TABLE = Path(__file__).parent.parent / "docs" / "models.md"
KINDS = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
NEW = 8
CHANCE = random.Random(0)
PROMPTS = [[CHANCE.randrange(3, 200) for _ in range(n)] for n in (2, 5, 23, 11)]

# Sizes of a tiny model, by the names that configurations give them.
SMALL: dict[Any, str] = {
    211: "vocab_size vocab_size_per_layer_input decoder_vocab_size unpadded_vocab_size",
    64: "hidden_size d_model n_embd dim emb_dim embedding_dim embedding_size word_embed_proj_dim "
    "input_embedding_size output_embedding_size lru_width attention_hidden_size mamba_d_ssm "
    "ple_embed_dim",
    4: "num_hidden_layers n_layer n_layers num_layers decoder_layers num_blocks "
    "num_decoder_layers encoder_layers num_encoder_layers num_attention_heads n_head n_heads "
    "num_heads decoder_attention_heads encoder_attention_heads num_decoder_attention_heads "
    "attention_heads linear_num_value_heads linear_num_heads swa_num_attention_heads "
    "index_n_heads num_experts num_local_experts n_routed_experts moe_num_experts",
    2: "num_encoder_attention_heads linear_num_key_heads num_experts_per_tok moe_topk moe_k "
    "first_k_dense_replace num_key_value_heads num_kv_heads num_query_groups "
    "swa_num_key_value_heads num_global_key_value_heads eos_token_id",
    96: "intermediate_size ffn_dim d_ff decoder_ffn_dim encoder_ffn_dim ffn_hidden_size "
    "block_ff_dim dim_ff dff d_inner feed_forward_size dense_intermediate_size "
    "intermediate_size_mlp shared_intermediate_size",
    16: "head_dim d_kv dim_head d_head attention_head_size v_head_dim linear_head_dim "
    "linear_key_head_dim linear_value_head_dim swa_head_dim query_pre_attn_scalar kv_channels "
    "mamba_d_head mamba_head_dim q_lora_rank kv_lora_rank qk_nope_head_dim "
    "hidden_size_per_layer_input index_head_dim global_head_dim hc_lowrank",
    8: "qk_rope_head_dim rotary_dim sliding_window sliding_window_size attention_window_size "
    "attention_chunk_size state_size ssm_state_size mamba_d_state mamba_chunk_size chunk_size "
    "mamba_n_heads mamba_num_heads window_size local_attention",
    32: "moe_intermediate_size shared_expert_intermediate_size shared_experts_intermediate_size "
    "expert_ffn_hidden_size moe_shared_expert_intermediate_size",
    1: "n_group topk_group mamba_n_groups n_groups mamba_ngroups n_shared_experts bos_token_id",
    512: "max_position_embeddings n_positions max_seq_len max_target_positions context_length",
}
SIZES = {name: value for value, names in SMALL.items() for name in names.split()}
SIZES |= {"qk_head_dim": 24, "pad_token_id": 0, "initializer_range": 0.3, "init_std": 0.3}
SIZES |= {"tie_word_embeddings": False, "use_mamba_kernels": False}
LATENT = {"num_key_value_heads": 4}  # as many as there are heads
LINEAR = {"layer_types": ["linear_attention", "full_attention"] * 2}
SLIDING = {"layer_types": ["sliding_attention", "full_attention"] * 2}
ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
ATTN = {"kv_n_heads": 2, "rope_theta": 10_000.0, "clip_qkv": 8.0}
FFN = {"ffn_hidden_size": 32, "hidden_size": 64, "moe_top_k": 2}
ZAMBA = {"layers_block_type": ["mamba", "hybrid"] * 2, "attention_hidden_size": 128, **LATENT}
MORE: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32"), LATENT),
    **dict.fromkeys(("glm4_moe_lite", "glm_moe_dsa", "minicpm3", "sarvam_mla", "youtu"), LATENT),
    "longcat_flash": {**LATENT, "head_dim": 8},
    **dict.fromkeys(("bailing_hybrid", "kimi_linear"), LATENT | LINEAR),
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
        "rope_parameters": dict.fromkeys(SLIDING["layer_types"], ROPE),
    },
    "dbrx": {"attn_config": ATTN, "ffn_config": FFN},
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
    return labs_probe.tried(labs_calls.speed_up(decode.prepare(model)), str(cache))


def in_a_batch(decoder: decode.Decoder) -> list[list[int]]:
    """Return the tokens of rows that join and leave: three at once, of which the first is short."""
    options = {"max_new_tokens": NEW, "sampling": decode.Sampling()}
    rows = [decode.Row(id=i, ids=list(ids), **options) for i, ids in enumerate(PROMPTS)]
    answers: list[list[int]] = [[] for _ in rows]
    for index, choice in loop.run(decoder, iter(rows), 3, loop.Loop()):
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
    given = {"max_new_tokens": NEW, "do_sample": False}
    wholes = [model.generate(torch.tensor([ids]), **given)[0].tolist() for ids in PROMPTS]
    first, *others = (whole[len(ids) :] for whole, ids in zip(wholes, PROMPTS, strict=True))
    right = in_a_batch(decoder) == [first[:4], *others]
    return {"how": decoder.mode if right else "wrong", "why": decoder.reason}


def apart(kind: str, cache: str) -> dict[str, str]:
    """Return how a type runs, found out in a process of its own, which may hang or crash."""
    with ProcessPoolExecutor(1, get_context("fork"), signal.alarm, (120,)) as pool:
        try:
            return pool.submit(how, kind, cache).result()
        except Exception as error:
            return {"how": "wrong", "why": f"{type(error).__name__}: {error}"[:200]}


def as_table(found: dict[str, dict[str, str]]) -> str:
    """Return the page for these types; its title and what its words mean stay as they are."""
    lines = [*TABLE.read_text(encoding="utf-8").splitlines()[:4]]
    counts = Counter(each["how"] for each in found.values()).most_common()
    lines += [", ".join(f"{how}: {count}" for how, count in counts) + ".", ""]
    lines += ["| type | how | why |", "|---|---|---|"]
    for kind, each in found.items():
        lines.append(f"| {kind} | {each['how']} | {each['why'].replace('|', '/').strip()} |")
    return "\n".join([*lines, ""])


def models(*kinds: str) -> None:
    """Print how these types run, a line of JSON each; or write docs/models.md with all types."""
    torch.set_num_threads(1)
    found = {}
    for kind in kinds or KINDS:
        found[kind] = apart(kind, os.devnull)
        print(json.dumps({"kind": kind, **found[kind]}), flush=True)
    if not kinds:
        TABLE.write_text(as_table(found), encoding="utf-8")
