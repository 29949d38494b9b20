# SPDX-License-Identifier: Apache-2.0
"""Tests of labs_adapter.py: LoRA adapters merged into the weights of a model."""

from __future__ import annotations

import itertools
import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from kit import SHORT, is_one_sentence, llama, load, save_model
from safetensors.torch import load_file, save_file

import labs
import labs_adapter
import labs_sources

SETTINGS, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ONE: dict[str, Any] = {"target_modules": ["q_proj"]}
KINDS: dict[str, Callable[[], Any]] = {
    "lora": lambda: peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
    "all": lambda: peft.LoraConfig(r=4, use_rslora=True, target_modules="all-linear"),
    "dora": lambda: peft.LoraConfig(r=4, use_dora=True, **ONE),
    "saved": lambda: peft.LoraConfig(r=4, modules_to_save=["lm_head"], **ONE),
    "loha": lambda: peft.LoHaConfig(r=4, **ONE),
    "lokr": lambda: peft.LoKrConfig(r=4, **ONE),
    "ia3": lambda: peft.IA3Config(feedforward_modules=[], **ONE),
    "vera": lambda: peft.VeraConfig(r=4, **ONE),
    "oft": lambda: peft.OFTConfig(r=0, oft_block_size=8, **ONE),
}


def model_in(base: Path, dtype: torch.dtype = torch.float32) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(base, dtype=dtype)


def make(base: Path, folder: Path, settings: Any, seed: int = 1) -> Path:
    """Save an adapter as after training, with random numbers."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        adapted = peft.get_peft_model(model_in(base), settings)
        for each in adapted.parameters():
            if each.requires_grad:
                each.data += torch.randn_like(each) * 0.1
    adapted.save_pretrained(folder, save_embedding_layers=False)
    return folder


@pytest.fixture(scope="module")
def lora(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tiny_folder, tmp_path_factory.mktemp("lora") / "adapter", KINDS["lora"]())


def changed(
    adapter: Path,
    to: Path,
    weights: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    **settings: Any,
) -> Path:
    """Copy an adapter with other settings or weights."""
    shutil.copytree(adapter, to)
    stated = json.loads((to / SETTINGS).read_text("utf-8"))
    (to / SETTINGS).write_text(json.dumps({**stated, **settings}), "utf-8")
    if weights is not None:
        save_file(weights(load_file(to / WEIGHTS)), to / WEIGHTS)
    return to


def weights_of(model: Any) -> dict[str, Any]:
    """Return the weights of a model by their names, unpacked."""
    return {
        f"{name}.{leaf}": getattr(module, leaf)
        for name, module in model.named_modules()
        for leaf in ("weight", "bias")
        if getattr(module, leaf, None) is not None
    }


LONG = [
    pytest.param(kind, dtype, marks=pytest.mark.long)
    for kind in ("all", "loha", "lokr", "vera", "oft", "saved", "dora", "ia3")
    for dtype in ("fp32", "bf16")
]


@pytest.mark.parametrize(
    ("kind", "dtype"), [("lora", "fp32"), ("lora", "bf16"), ("dora", "fp32"), *LONG]
)
def test_merged_weights_are_those_of_pefts_merge(kind, dtype, tiny_folder, folder, fresh):
    adapter = make(tiny_folder, folder / "adapter", KINDS[kind]())
    base = model_in(tiny_folder, getattr(torch, labs.TORCH_DTYPES[dtype]))
    wanted = weights_of(peft.PeftModel.from_pretrained(base, str(adapter)).merge_and_unload())
    found = weights_of(load(tiny_folder, adapter=str(adapter), torch_dtype=dtype).model)
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []
    own = weights_of(load(tiny_folder, torch_dtype=dtype).model)
    assert [name for name in wanted if not torch.equal(own[name], wanted[name])] != []


def test_two_adapters_are_two_models_as_large_as_their_base(tiny, tiny_folder, lora, folder, fresh):
    other = make(tiny_folder, folder / "other", KINDS["lora"](), seed=2)
    one, two = (load(tiny_folder, adapter=str(each)) for each in (lora, other))
    assert one.decoder.weight_bytes == two.decoder.weight_bytes == tiny.decoder.weight_bytes
    assert one.decoder.why_forward == tiny.decoder.why_forward
    logits = [each.model(torch.tensor([SHORT.input_ids])).logits for each in (tiny, one, two)]
    assert not any(torch.allclose(a, b) for a, b in itertools.pairwise(logits))
    base, first, second = (each.fingerprint for each in (tiny, one, two))
    assert base is not None
    assert first is not None
    assert second is not None
    assert first.revision != second.revision
    assert first.revision.startswith(f"{base.revision} + adapter sha256:")
    assert ("peft" in first.versions, "peft" in base.versions) == (True, False)


def test_an_adapter_in_16_bits_is_not_rounded_to_the_bits_of_a_gguf_file(packed, folder, fresh):
    base = labs.load_model(packed)
    source = labs.locate(packed, "fp32")[0]
    adapter = make(Path(source), folder / "adapter", KINDS["lora"]())
    spec = labs.evolve(
        packed, adapter=str(adapter), quantization=labs.Quantization(quant_method="gguf")
    )
    model = labs.load_model(spec)
    assert model.decoder.quant_method != "gguf"
    wanted = peft.PeftModel.from_pretrained(model_in(Path(source)), str(adapter)).merge_and_unload()
    ids = torch.tensor([[104, 101, 121]])
    torch.testing.assert_close(model.model(ids).logits, wanted(ids).logits, atol=0.02, rtol=0)
    assert not torch.allclose(model.model(ids).logits, base.model(ids).logits, atol=0.02)


def renamed(tensors: dict[str, Any], old: str, new: str) -> dict[str, Any]:
    more = {key.replace(old, new): each.clone() for key, each in tensors.items() if old in key}
    return {**tensors, **more}


# fmt: off
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "more layers": ({"weights": lambda t: renamed(t, "layers.1.", "layers.7.")}, "no layer .*7"),
    "fewer layers": ({"weights": lambda t: {k: v for k, v in t.items() if "layers.1." not in k}},
                     "its weights lack .*layers.1"),
    "not finite": ({"weights": lambda t: {k: v / 0 for k, v in t.items()}}, "not finite"),
    "rank": ({"r": 8}, "other sizes"),
    "no such layer": ({"target_modules": ["nope"]}, "nope.*not found"),
    "kind": ({"peft_type": "PREFIX_TUNING"}, "peft_type is PREFIX_TUNING; labs merges LORA"),
    "no kind": ({"peft_type": ["LORA"]}, "peft_type is .'LORA'."),
    "type": ({"r": "x"}, "adapter_config.json is malformed"),
    "layers twice": ({"layer_replication": [[0, 2], [0, 2]]}, "layer_replication, which cannot"),
    "its own module": ({"megatron_config": {"a": 1}, "megatron_core": "os"}, "megatron_config"),
    "pattern": ({"target_modules": "(("}, "unterminated subpattern"),
}
# fmt: on


@pytest.mark.parametrize("name", WRONG)
def test_an_adapter_that_does_not_fit_is_refused_in_one_sentence(
    name, tiny_folder, lora, folder, fresh
):
    options, named = WRONG[name]
    adapter = changed(lora, folder / "adapter", **options)
    with pytest.raises(labs.ModelError, match=named) as caught:
        load(tiny_folder, adapter=str(adapter))
    assert is_one_sentence(caught.value)
    assert str(caught.value).startswith(f"adapter = {adapter}: ")


def without(name: str) -> Callable[[Path], Any]:
    return lambda place: (place / name).unlink()


def written(data: bytes) -> Callable[[Path], Any]:
    return lambda place: (place / SETTINGS).write_bytes(data)


def cut(place: Path) -> None:
    (place / WEIGHTS).write_bytes((place / WEIGHTS).read_bytes()[:-50])


def pickled(place: Path) -> None:
    torch.save(load_file(place / WEIGHTS), place / "adapter_model.bin")
    (place / WEIGHTS).unlink()


DAMAGE: list[tuple[Callable[[Path], Any], str]] = [
    (without(SETTINGS), "contains no adapter_config.json"),
    (without(WEIGHTS), "contains no adapter_model.safetensors"),
    (written(b"{"), "is not JSON"),
    (written(b"[" * 100_000), "."),
    (written(b"[]"), "peft_type is None"),
    (written(b" " * (2**20 + 1)), "more than 1048576 bytes"),
    (cut, "is cut off"),
    (pickled, "use_safetensors = false reads it"),
    (shutil.rmtree, "there is no such folder"),
]


@pytest.mark.parametrize(("damage", "named"), DAMAGE)
def test_files_of_an_adapter_are_looked_at_before_any_weights_are_read(
    damage, named, tiny_folder, lora, folder, fresh, monkeypatch
):
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", None)
    adapter = changed(lora, folder / "adapter")
    damage(adapter)
    with pytest.raises(labs.ModelError, match=named) as caught:
        load(tiny_folder, adapter=str(adapter))
    assert is_one_sentence(caught.value)


def test_a_pickled_adapter_is_read_where_pickles_are_allowed(tiny_folder, lora, folder, fresh):
    pickled(adapter := changed(lora, folder / "adapter"))
    one = load(tiny_folder, adapter=str(adapter), use_safetensors=False).model
    two = load(tiny_folder, adapter=str(lora)).model
    ids = torch.tensor([SHORT.input_ids])
    torch.testing.assert_close(one(ids).logits, two(ids).logits)


def test_without_peft_an_adapter_is_refused_by_name(tiny_folder, lora, missing, fresh):
    missing("peft")
    with pytest.raises(labs.ModelError, match="pip install peft"):
        load(tiny_folder, adapter=str(lora))


@pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
def test_weights_that_stay_quantised_take_no_adapter(bits, tiny_folder, lora, fresh, monkeypatch):
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", None)
    with pytest.raises(labs.ModelError, match="stay quantised"):
        load(tiny_folder, adapter=str(lora), quantization=labs.Quantization(**{bits: True}))


@pytest.mark.parametrize("targets", [["lm_head"], ["embed_tokens"]])
def test_a_product_on_tied_embeddings_is_refused_because_peft_merges_it_twice(
    targets, folder, fresh
):
    config = llama()
    config.tie_word_embeddings = True
    base = save_model(folder / "tied", config)
    adapter = make(base, folder / "adapter", peft.LoraConfig(r=4, target_modules=targets))
    with pytest.raises(labs.ModelError, match="also uses as its output layer"):
        load(base, adapter=str(adapter))
    fine = make(base, folder / "fine", KINDS["lora"]())
    assert load(base, adapter=str(fine)).fingerprint


def test_an_adapter_of_another_base_is_told(tiny_folder, lora, folder, fresh, caplog):
    other = changed(lora, folder / "other", base_model_name_or_path="some/Llama-9")
    load(tiny_folder, adapter=str(other))
    assert "was made for Llama-9" in caplog.text
    caplog.clear()
    load(tiny_folder, adapter=str(lora))
    assert caplog.text == ""


def test_no_name_in_an_adapter_leads_to_the_hub(tiny_folder, lora, folder, fresh, monkeypatch):
    asked = list[Any]()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **_: asked.append(args) or [])
    other = changed(lora, folder / "other", base_model_name_or_path="some/Llama-9")
    load(tiny_folder, adapter=str(other))
    assert asked == []


def test_an_adapter_beside_a_model_has_no_effect_unless_it_is_named(
    tiny, tiny_folder, lora, folder, fresh, caplog
):
    both = Path(shutil.copytree(tiny_folder, folder / "both"))
    for name in (SETTINGS, WEIGHTS):
        shutil.copy(lora / name, both)
    ids = torch.tensor([SHORT.input_ids])
    torch.testing.assert_close(load(both).model(ids).logits, tiny.model(ids).logits)
    assert f"only with adapter = {both}" in caplog.text
    named = load(both, adapter=str(both)).model(ids).logits
    torch.testing.assert_close(named, load(tiny_folder, adapter=str(lora)).model(ids).logits)


def test_an_adapter_of_the_hub_is_that_of_the_named_revision(
    tiny_folder, lora, folder, fresh, monkeypatch
):
    snapshot, asked = changed(lora, folder / "snapshots" / "abc123"), list[Any]()

    def download(repository: str, file: str, **options: Any) -> str:
        asked.append((repository, options["revision"], options["local_files_only"]))
        return str(snapshot / file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr(labs_sources, "_hub_answers", lambda *args: True)
    spec = labs.ModelSpec(model_name=str(tiny_folder), torch_dtype="fp32", adapter="me/mine@v1")
    model = labs.load_model(spec)
    assert model.fingerprint
    assert model.fingerprint.revision.endswith(" + adapter abc123")
    assert {each[:2] for each in asked} == {("me/mine", "v1")}
    assert [offline for *_, offline in asked].count(False) == 2  # each file is asked for once
    assert labs_adapter.place(spec) == snapshot


@pytest.mark.parametrize("name", ["some/adapter", "a b c"])
def test_an_adapter_that_is_nowhere_is_refused(name, tiny_folder, fresh):
    with pytest.raises(labs.ModelError, match=f"adapter = {name}: ") as caught:
        load(tiny_folder, adapter=name, local_files_only=True)
    assert is_one_sentence(caught.value)


def test_clients_do_not_see_where_an_adapter_and_a_template_are(site):
    settings = site.post("/explain", {"prompt": "hi"}).json["settings"]
    assert not {"adapter", "chat_template", "model_name"} & settings.keys()
