# SPDX-License-Identifier: Apache-2.0
"""Tests of labs_draft.py: guesses of a small model change no bit, and are counted and refused."""

from __future__ import annotations

import math
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from kit import LAYERS_OF_TWO, SIZES, byte_tokenizer, llama, save_model
from transformers import LlamaConfig, Mamba2Config

import labs
import labs_calls
import labs_draft
import labs_explain
import labs_loop
import labs_meters
import labs_sizes

LONG = "A river runs through the town, and a road runs along the river. " * 9
WAYS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0, "seed": 3},
    {"temperature": 0.7, "top_p": 0.9, "seed": 5, "repetition_penalty": 1.3},
    {"temperature": 0.0, "frequency_penalty": 0.5, "logit_bias": {70: 3.0}},
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Save a model and drafts: its copy, which is always right, and another, which seldom is."""
    place = tmp_path_factory.mktemp("drafts")
    other = LlamaConfig(**SIZES, intermediate_size=64, num_key_value_heads=4, **LAYERS_OF_TWO)
    for name, config in (("large", llama()), ("copy", llama()), ("other", other)):
        save_model(place / name, config)
    return {name: str(place / name) for name in ("large", "copy", "other")}


def loaded(folders: dict[str, str], draft: str | None, **options: Any) -> labs.Model:
    name = folders.get(draft or "", draft)
    spec = labs.ModelSpec(model_name=folders["large"], draft_model=name, **options)
    return labs.load_model(spec, cached=False)


def answer(model: labs.Model, text: str = LONG, **options: Any) -> labs.Completion:
    inputs = labs.build_inputs(model, prompt=text)
    return labs.generate(model, inputs, **{"max_new_tokens": 60, "logprobs": 3} | options)


def counts(model: labs.Model) -> tuple[int, int]:
    return model.decoder.draft.proposed, model.decoder.draft.accepted


@pytest.mark.parametrize("options", WAYS)
def test_the_answer_is_the_same_bit_by_bit(folders: dict[str, str], options: dict[str, Any]):
    plain = answer(loaded(folders, None), **options)
    for draft in ("copy", "other"):
        model = loaded(folders, draft)
        for _ in range(2):
            found = answer(model, **options)
            assert (found.text, found.logprobs) == (plain.text, plain.logprobs)
            assert (found.finish_reason, found.usage) == (plain.finish_reason, plain.usage)
        assert counts(model)[0] > 0


def test_a_copy_guesses_all_tokens_and_another_model_soon_stops(folders: dict[str, str]):
    # In bf16 a copy may choose another token: it reads several at once, which rounds differently.
    right, wrong = (loaded(folders, each, torch_dtype="fp32") for each in ("copy", "other"))
    for options in WAYS[:3]:
        for model in (right, wrong):
            answer(model, **options)
    proposed, accepted = counts(right)
    assert proposed == accepted > 3 * 40
    proposed, accepted = counts(wrong)
    assert accepted < proposed < 3 * 15


def test_other_requests_come_and_go(folders: dict[str, str]):
    plain, model = loaded(folders, None), loaded(folders, "copy")
    texts = ["One.", "Two and more.", LONG]
    expected = [answer(plain, text, **WAYS[1]) for text in texts]
    inputs = [labs.build_inputs(model, prompt=text) for text in texts]
    each = [labs.Generation(max_new_tokens=n, logprobs=3, **WAYS[1]) for n in (60, 9, 60)]
    deltas: list[list[Any]] = [[], [], []]
    for index, event in labs.stream_batch(model, inputs, each, batch_rows=2):
        assert not isinstance(event, labs.Failed)
        deltas[index].append(event)
    found = [labs.fold(events[:-1], events[-1]) for events in deltas]
    for a, b, options in zip(found, expected, each, strict=True):
        assert a.logprobs == b.logprobs[: options.max_new_tokens]
    assert found[0].text == expected[0].text
    assert counts(model)[1] > 0


def test_a_request_that_is_given_up_leaves_nothing_for_the_next(folders: dict[str, str]):
    model, plain = loaded(folders, "copy"), loaded(folders, None)
    events = labs.stream_generate(model, labs.build_inputs(model, prompt=LONG), temperature=0)
    for _ in range(5):
        next(events)
    events.close()  # type: ignore[attr-defined]
    found, expected = (answer(each, "Next.", temperature=0) for each in (model, plain))
    assert (found.text, found.logprobs) == (expected.text, expected.logprobs)


def test_stop_strings_ends_and_processors_hold(folders: dict[str, str]):
    plain, model = loaded(folders, None), loaded(folders, "copy")
    text = answer(plain, temperature=0).text
    for options in ({"stop": (text[10:13],)}, {"max_new_tokens": 1}, {"max_new_tokens": 4}):
        found = [answer(each, temperature=0, **options) for each in (plain, model)]
        assert found[0].text == found[1].text
        assert found[0].usage == found[1].usage

    def no_vowels(ids: list[int], logits: Any) -> Any:
        return logits.index_fill(0, torch.tensor([64, 68, 72, 78, 84]), -torch.inf)

    inputs = labs.build_inputs(model, prompt=LONG)
    found = [
        labs.generate(m, inputs, max_new_tokens=40, temperature=0, processors=[no_vowels])
        for m in (plain, model)
    ]
    assert found[0].text == found[1].text


def test_earlier_text_has_the_first_say(folders: dict[str, str], monkeypatch: Any):
    model = loaded(folders, "copy")
    plain = answer(loaded(folders, None), temperature=0)
    asked: list[int] = []
    propose = labs_draft.propose
    monkeypatch.setattr(
        labs_draft, "propose", lambda *a: asked.append(len(a[1].ids)) or propose(*a)
    )
    monkeypatch.setattr(labs_draft.labs_calls, "prompt_lookup", lambda row: [1, 2, 3])
    assert answer(model, temperature=0, prompt_lookup_num_tokens=3).text == plain.text
    assert not asked


def test_a_draft_without_memory_or_with_a_shorter_context_gives_way(
    folders: dict[str, str], monkeypatch: Any
):
    plain, model = answer(loaded(folders, None), temperature=0), loaded(folders, "copy")
    model.decoder.draft.context_length = len(LONG) + 20
    assert answer(model, temperature=0).text == plain.text
    assert 0 < counts(model)[0] <= 20
    model.decoder.draft.context_length = None

    def full(*_: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(labs_draft.labs_calls, "forward_behind", full)
    before = counts(model)
    assert answer(model, temperature=0).text == plain.text
    assert counts(model) == before


def test_a_draft_that_cannot_help_is_refused_with_the_reason(folders: dict[str, str], tmp_path):
    with pytest.raises(labs.ModelError, match="is model_name itself; name a smaller model"):
        loaded(folders, "large")
    with pytest.raises(labs.ModelError, match="needs another device_map than a JSON map"):
        loaded(folders, "other", device_map='{"": "cpu"}')
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 262, "num_heads": 4}
    save_model(tmp_path / "mamba", Mamba2Config(**sizes, head_dim=32, n_groups=1, state_size=16))
    with pytest.raises(labs.ModelError, match=r"draft_model = .*mamba: it \(mamba2\) cannot disc"):
        loaded(folders, str(tmp_path / "mamba"))
    spec = labs.ModelSpec(model_name=str(tmp_path / "mamba"), draft_model=folders["large"])
    with pytest.raises(labs.ModelError, match=r"mamba \(mamba2\) cannot discard tokens once read"):
        labs.load_model(spec, cached=False)


def test_models_on_cuda_graphs_are_refused(folders: dict[str, str]):
    decoder = loaded(folders, None).decoder
    assert labs_draft.unable(decoder) is None
    graphs: Any = object()
    why = labs_draft.unable(labs_draft.replace(decoder, graphs=graphs))
    assert why is not None
    assert "set cuda_graphs = false" in why


def test_a_draft_of_another_tokenizer_is_refused_by_its_tokens(folders: dict[str, str], tmp_path):
    save_model(tmp_path / "foreign", llama())
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<more>"])
    tokenizer.save_pretrained(tmp_path / "foreign")
    wrong = "has another tokenizer: 1 tokens differ, for example '<more>'"
    with pytest.raises(labs.ModelError, match=wrong):
        loaded(folders, str(tmp_path / "foreign"))


def test_explain_metrics_and_sizes_know_the_draft(folders: dict[str, str]):
    model, plain = loaded(folders, "copy"), loaded(folders, None)
    inputs = labs.build_inputs(model, prompt="Hello!")
    asked = labs.Generation(prompt_lookup_num_tokens=3)
    plan = labs_explain.explain(model, inputs, asked)
    assert plan.guesses == "earlier text, then copy (draft_model); only while it runs alone"
    assert f"tokens guessed by: {plan.guesses}\n" in labs_explain.described(plan)
    assert plan.settings["draft_model"].value == folders["copy"]
    none = labs_explain.explain(plain, inputs, labs.Generation())
    assert "guessed" not in labs_explain.described(none)
    answer(model, temperature=0)
    engines = {"a": types.SimpleNamespace(model=model), "b": types.SimpleNamespace(model=plain)}
    found = [
        [(sample.name, sample.labels["model_name"], sample.value) for sample in family.samples]
        for family in labs_meters.draft_metrics(engines)
    ]
    names = [f"labs_spec_decode_num_{kind}_tokens_total" for kind in ("draft", "accepted")]
    assert found == [
        [(name, "a", count), (name, "b", 0)]
        for name, count in zip(names, counts(model), strict=True)
    ]
    with_draft, without = (labs_sizes.weight_bytes(each.spec) for each in (model, plain))
    assert with_draft == 2 * without
    assert plan.weight_bytes == 2 * none.weight_bytes


def test_the_name_of_a_table_means_its_model(tmp_path: Path):
    file = tmp_path / "labs.toml"
    text = '[models.small]\nmodel_name = "a/small"\n[models.large]\nmodel_name = "a/large"\n'
    file.write_text('default_model = "large"\n' + text + 'draft_model = "small"\n')
    config = labs.load_config(file, env={})
    assert config.model.draft_model == "a/small"
    assert config.models["large"].model.draft_model == "a/small"
    assert config.models["small"].model.draft_model is None
    config = labs.load_config(file, env={"LABS_DRAFT_MODEL": "a/tiny"})
    assert config.model.draft_model == "a/tiny"
    assert config.models["small"].model.draft_model is None


def test_a_draft_that_cannot_choose_a_token_gives_way(folders: dict[str, str], monkeypatch: Any):
    plain, model = answer(loaded(folders, None)), loaded(folders, "copy")
    forward = labs_calls.forward_behind
    monkeypatch.setattr(labs_calls, "forward_behind", lambda *given: forward(*given) * math.nan)
    found = answer(model)
    assert (found.text, found.logprobs) == (plain.text, plain.logprobs)
    assert counts(model) == (0, 0)


def test_slots_of_a_draft_are_freed_where_memory_is_short(folders: dict[str, str]):
    model = loaded(folders, "copy")
    inputs = labs.build_inputs(model, prompt=LONG)
    loop, texts = labs_loop.Loop(), []
    request = labs.open_request(model, 0, inputs, labs.Generation(max_new_tokens=60), ())
    for number, (_, event) in enumerate(labs.run(model, iter([request, None]), 1, loop)):
        texts.append(getattr(event, "text", ""))
        if number == 20:
            assert labs_loop.release(model.decoder, loop)
            before = counts(model)
            assert not labs_loop.release(model.decoder, loop)
    assert counts(model)[0] - before[0] <= labs_draft.MOST
    assert "".join(texts) == answer(loaded(folders, None)).text
