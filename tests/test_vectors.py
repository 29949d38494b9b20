# SPDX-License-Identifier: Apache-2.0
"""Tests of labs_vectors and labs_desk: embeddings and rerank over HTTP and in files of lines."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import random
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import kit
import msgspec
import pytest
import torch
import transformers
from kit import error_of

import labs
import labs_desk
import labs_embed
import labs_engine
import labs_jsonl
import labs_models
import labs_padded
import labs_request
import labs_rerank
import labs_turns
import labs_vectors

EMBED, RERANK, CHAT = "/v1/embeddings", "/v1/rerank", "/v1/chat/completions"
FUZZ = int(os.environ.get("LABS_FUZZ", "250"))
FUZZ_LONG = int(os.environ.get("LABS_FUZZ_LONG", "10000"))
SECONDS = 60.0  # that nothing here may take


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> dict[str, Path]:
    place, cross = tmp_path_factory.mktemp("vectors"), transformers.BertForSequenceClassification
    found = {"text": tiny_folder, "embedding": kit.save_encoder(place / "bert")}
    kit.changed(found["embedding"], matryoshka_dimensions=[8])
    words = {"prompts": {"query": "ask: "}}
    (place / "bert/config_sentence_transformers.json").write_text(json.dumps(words))
    return {**found, "rerank": kit.save_encoder(place / "cross", cross, num_labels=1)}


def configured(
    folders: dict[str, Path], *keys: str, default: str = "tiny", **server: Any
) -> labs.Config:
    """Configure the models tiny, bert and cross."""
    base = kit.configured(*keys, **{"max_prompt_bytes": 2000, **server})
    names = {"tiny": "text", "bert": "embedding", "cross": "rerank"}
    configs = {}
    for name, kind in names.items():
        spec = labs.ModelSpec(model_name=str(folders[kind]), torch_dtype="fp32", kind=kind)
        configs[name] = msgspec.structs.replace(base, model=spec, model_id=name)
    return msgspec.structs.replace(configs[default], models=configs)


Begin = Callable[..., kit.Site]


@pytest.fixture
def begin(folders: dict[str, Path]) -> Iterator[Begin]:
    """Return a function that begins to serve; at the end all models are closed."""
    with contextlib.ExitStack() as stack:

        def start(*keys: str, kind: Any = kit.Site, config: Any = None, **options: Any) -> Any:
            config = configured(folders, *keys, **options) if config is None else config
            models = labs_models.Models(config)
            stack.callback(models.close)
            site = kind(models, config, models)
            if isinstance(site, kit.Live):
                stack.callback(site.close)
            return site

        yield start


@pytest.fixture(scope="module")
def shop(folders: dict[str, Path]) -> Iterator[kit.Site]:
    """Serve all three models, for tests that change nothing."""
    config = configured(folders)
    models = labs_models.Models(config)
    yield kit.Site(models, config, models)
    models.close()


@pytest.fixture(scope="module")
def encoder(folders: dict[str, Path]) -> labs_embed.Encoder:
    return labs_embed.Encoder(labs.ModelSpec(model_name=str(folders["embedding"])))


def floats(text: str) -> list[float]:
    data = base64.b64decode(text)
    return [*struct.unpack(f"<{len(data) // 4}f", data)]


def vectors_of(response: Any) -> torch.Tensor:
    assert response.status_code == 200, response.text
    return torch.tensor([each["embedding"] for each in response.json["data"]])


# ---------------------------------------------------------------- embeddings


def test_vectors_come_as_numbers_or_as_base64_of_the_same_floats(shop, encoder):
    texts = ["hi", "a longer one", ""]
    found = shop.post(EMBED, {"input": texts, "model": "bert"})
    expected = encoder.encode(texts)
    torch.testing.assert_close(vectors_of(found), expected, atol=1e-5, rtol=0)
    count = sum(len(text) + 2 for text in texts)
    assert found.json["usage"] == {"prompt_tokens": count, "total_tokens": count}
    assert (found.json["object"], found.json["model"]) == ("list", "bert")
    assert [each["index"] for each in found.json["data"]] == [0, 1, 2]
    packed = shop.post(EMBED, {"input": texts, "encoding_format": "base64", "user": "me"})
    again = [floats(each["embedding"]) for each in packed.json["data"]]
    assert torch.equal(torch.tensor(again), vectors_of(found))


def test_one_text_and_token_ids_in_both_forms_are_read(shop, encoder):
    ids = [kit.BOS, *kit.encoded("hi"), kit.EOS]
    expected = encoder.encode(["hi"])
    for given in ("hi", ids, [ids], ["hi"]):
        found = vectors_of(shop.post(EMBED, {"input": given, "dimensions": None}))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_a_prompt_dimensions_and_a_cut_take_effect(shop, encoder):
    asked = {"prompt_name": "query", "dimensions": 8}
    found = vectors_of(shop.post(EMBED, {"input": "hi", **asked}))
    expected = encoder.encode(["hi"], prompt_name="query", dimensions=8)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    for cut, text in ((-1, "x" * 126), (5, "xxx")):
        body = {"input": "x" * 300, "truncate_prompt_tokens": cut}
        found = vectors_of(shop.post(EMBED, body))
        torch.testing.assert_close(found, encoder.encode([text]), atol=1e-5, rtol=0)
    ids = shop.post(EMBED, {"input": [5] * 300, "truncate_prompt_tokens": 4})
    assert ids.json["usage"]["prompt_tokens"] == 4


WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({}, "input", "missing required field `input`"),
    ({"input": []}, "input", "the request has 0 texts; it can have 1 to 2048"),
    ({"input": [1, "a"]}, "input", "not a mixture"),
    ({"input": [[1], 1]}, "input", "not a mixture"),
    ({"input": [[1], []]}, "input[1]", "the text has no tokens"),
    ({"input": [262]}, "input[0]", "262 is not a token id of this model, 0 to 261"),
    ({"input": [["a"]]}, "input[0][0]", "Expected `int`"),
    ({"input": "x" * 300}, "input[0]", "maximum context length is 128 tokens"),
    ({"input": "x" * 2001}, "", "has 2001 bytes; this server allows 2000"),
    ({"input": ["x"] * 2049}, "input", "the request has 2049 texts; it can have 1 to 2048"),
    ({"input": [[1] * 128] * 2048 * 2}, "input", "4096 texts"),
    ({"input": "x", "dimensions": 9}, "dimensions", "can have 8, 32, not 9"),
    ({"input": "x", "dimensions": 0}, "dimensions", ">= 1"),
    ({"input": "x", "prompt_name": "z"}, "prompt_name", "no prompt 'z': query"),
    ({"input": [1], "prompt_name": "query"}, "prompt_name", "not before token ids"),
    ({"input": "x", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "no meaning"),
    ({"input": "x", "truncate_prompt_tokens": 129}, "truncate_prompt_tokens", "128 tokens at most"),
    ({"input": "x", "encoding_format": "int8"}, "encoding_format", "Invalid enum value"),
    ({"input": "x", "input_type": "query"}, "input_type", "use prompt_name"),
    ({"input": "x", "surprise": 1}, "surprise", "unknown field"),
    ({"input": "x", "model": "tiny"}, "model", "tiny is of the kind text; models of the kind"),
    ({"input": "x", "model": "cross"}, "model", "is of the kind rerank"),
]


@pytest.mark.parametrize(("body", "param", "words"), WRONG)
def test_a_request_for_vectors_that_cannot_be_answered_is_refused_by_name(shop, body, param, words):
    found = error_of(shop.post(EMBED, body), 400)
    assert words in found["message"]
    assert (found["param"] or "") == param


def test_an_unknown_model_is_not_found(shop):
    found = error_of(shop.post(EMBED, {"input": "x", "model": "no"}), 404)
    assert (found["code"], found["param"]) == ("model_not_found", "model")
    assert found["message"] == "unknown model 'no'; models of the kind embedding: bert"


def test_all_texts_of_a_request_have_a_bounded_number_of_tokens(shop, monkeypatch):
    monkeypatch.setattr(labs_vectors, "MOST_TOKENS", 9)
    found = error_of(shop.post(EMBED, {"input": ["xx", "xx", "xx"]}), 400)
    assert found["message"] == "input: the request has 12 tokens; it can have 9: send fewer texts"


# ---------------------------------------------------------------- rerank


DOCUMENTS = ["one", {"text": "two"}, "a third document"]


def test_documents_come_in_the_order_of_their_scores(shop, folders):
    scorer = labs_rerank.Scorer(labs.ModelSpec(model_name=str(folders["rerank"])))
    scores = scorer.rank("which", ["one", "two", "a third document"]).tolist()
    best = sorted(range(3), key=lambda place: -scores[place])
    for path in (RERANK, "/rerank", "/v2/rerank"):
        found = shop.post(path, {"query": "which", "documents": DOCUMENTS}).json
        assert [each["index"] for each in found["results"]] == best
        assert [each["relevance_score"] for each in found["results"]] == pytest.approx(
            [scores[place] for place in best], abs=1e-5
        )
    texts = {each["index"]: each["document"]["text"] for each in found["results"]}
    assert texts == {0: "one", 1: "two", 2: "a third document"}
    assert found["usage"]["prompt_tokens"] == 3 * (5 + 3) + 3 + 3 + 16
    body = {"query": "which", "documents": DOCUMENTS, "top_n": 1, "return_documents": False}
    first = shop.post(RERANK, {**body, "model": "cross", "rank_fields": ["text"]}).json["results"]
    assert [{*each} for each in first] == [{"index", "relevance_score"}]
    assert first[0]["index"] == best[0]


def test_long_documents_and_queries_are_cut_where_a_request_asks_for_it(shop):
    body = {"query": "q" * 50, "documents": ["x" * 200, "y"]}
    cut = {"max_tokens_per_doc": 3, "max_tokens_per_query": 2}
    same = shop.post(RERANK, {"query": "qq", "documents": ["xxx", "y"]}).json["results"]
    found = shop.post(RERANK, {**body, **cut}).json["results"]
    assert [each["relevance_score"] for each in found] == [e["relevance_score"] for e in same]
    assert {each["document"]["text"] for each in found} == {"x" * 200, "y"}
    whole = shop.post(RERANK, {**body, "truncate_prompt_tokens": -1}).json
    assert whole["usage"]["prompt_tokens"] == 128 + 54


WRONG_RANKS: list[tuple[dict[str, Any], str, str]] = [
    ({"documents": ["a"]}, "query", "missing required field `query`"),
    ({"query": "a", "documents": []}, "documents", "0 texts; it can have 1 to 2048"),
    ({"query": "a", "documents": [{"title": "x"}]}, "title", "unknown field `title`"),
    ({"query": "a", "documents": ["x" * 200]}, "documents[0]", "documents[0] has 204 tokens"),
    ({"query": "a", "documents": ["x" * 2001]}, "", "has 2001 bytes"),
    ({"query": "q" * 2001, "documents": ["x"]}, "", "has 2001 bytes"),
    ({"query": "a", "documents": ["a"], "top_n": -1}, "top_n", ">= 0"),
    ({"query": "a", "documents": ["a"], "max_chunks_per_doc": 1}, "max_chunks_per_doc", "use max_"),
    ({"query": "a", "documents": ["a"], "rank_fields": ["b"]}, "rank_fields", "not implemented"),
    ({"query": "a", "documents": ["a"], "model": "bert"}, "model", "is of the kind embedding"),
]


@pytest.mark.parametrize(("body", "param", "words"), WRONG_RANKS)
def test_a_request_to_rank_that_cannot_be_answered_is_refused_by_name(shop, body, param, words):
    found = error_of(shop.post(RERANK, body), 400)
    assert words in found["message"]
    assert (found["param"] or "") == param


def test_a_query_is_not_repeated_without_bound(shop, monkeypatch):
    monkeypatch.setattr(labs_vectors, "MOST_BYTES", 1000)
    found = error_of(shop.post(RERANK, {"query": "q" * 100, "documents": ["d"] * 10}), 400)
    assert "documents: the pairs of query and document have 1010 bytes" in found["message"]


# ---------------------------------------------------------------- models of several kinds


def test_the_list_of_models_names_their_kinds_and_anthropics_only_those_that_chat(shop):
    shop.post(EMBED, {"input": "x"})
    found = {each["id"]: each for each in shop.get("/v1/models").json["data"]}
    kinds = {name: each["kind"] for name, each in found.items()}
    assert kinds == {"tiny": "text", "bert": "embedding", "cross": "rerank"}
    assert (found["bert"]["loaded"], found["bert"]["context_length"]) == (True, 128)
    theirs = shop.get("/v1/models", anthropic_version="2023-06-01").json["data"]
    assert [each["id"] for each in theirs] == ["tiny"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, {"messages": [{"role": "user", "content": "x"}]}),
        (CHAT, {"messages": [{"role": "user", "content": "x"}], "stream": True}),
        ("/v1/completions", {"prompt": "x"}),
        ("/v1/responses", {"input": "x"}),
        ("/generate", {"prompt": "x"}),
        ("/explain", {"prompt": "x"}),
        ("/choose", {"prompt": "x", "options": ["a", "b"]}),
        ("/v1/messages", {"max_tokens": 1, "messages": [{"role": "user", "content": "x"}]}),
    ],
)
def test_a_model_that_generates_no_text_is_refused_by_its_kind(shop, path, body):
    for name, path_of in (("bert", EMBED), ("cross", RERANK)):
        found = shop.post(path, {**body, "model": name})
        assert found.status_code == 400
        text = found.json["error"]["message"]
        assert f"{name} is of the kind" in text
        assert text.endswith(f"POST {path_of} answers for it")


def test_a_server_of_an_embedding_model_alone_answers_and_is_ready(begin):
    site = begin(default="bert")
    assert shop_answer(site, "hi").shape == (1, 32)
    assert site.get("/readyz").json == {"status": "ok"}
    found = error_of(site.post(CHAT, {"messages": [{"role": "user", "content": "x"}]}), 400)
    assert "bert is of the kind embedding" in found["message"]


def shop_answer(site: kit.Site, *texts: str, **words: Any) -> torch.Tensor:
    return vectors_of(site.post(EMBED, {"input": texts, **words}))


def test_models_of_all_kinds_are_loaded_on_demand_and_unloaded_for_each_other(begin):
    site = begin(max_loaded_models=1)
    chat = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
    for _ in range(2):
        assert site.post(CHAT, chat).status_code == 200
        assert [*site.engine.loaded()] == ["tiny"]
        shop_answer(site, "hi")
        assert [*site.engine.loaded()] == ["bert"]
        assert site.post(RERANK, {"query": "a", "documents": ["b"]}).status_code == 200
        assert [*site.engine.loaded()] == ["cross"]


def test_a_model_that_needs_too_much_memory_is_not_loaded(begin):
    site = begin(model_memory_bytes=1000)
    found = error_of(site.post(EMBED, {"input": "x"}), 503)
    assert found["code"] == "model_not_loaded"


def test_a_router_cannot_choose_a_model_that_generates_no_text(folders):
    rule = labs.RouterRule(model="bert", over_prompt_tokens=1)
    config = msgspec.structs.replace(configured(folders), router=labs.Router(rules=(rule,)))
    with pytest.raises(labs.ConfigError, match="bert is of the kind embedding, not text"):
        labs_request.open_context(config)


def test_the_embedding_model_of_the_documents_answers_under_its_name(begin, folders, encoder):
    name = str(folders["embedding"])
    config = kit.configured()
    spec = labs.ModelSpec(model_name=str(folders["text"]), torch_dtype="fp32")
    documents = labs.Documents(embedding_model=name)
    site = begin(config=msgspec.structs.replace(config, model=spec, documents=documents))
    for words in ({}, {"model": name}):
        found = shop_answer(site, "hi", **words)
        torch.testing.assert_close(found, encoder.encode(["hi"]), atol=1e-5, rtol=0)
    found = site.get(f"/v1/models/{name}").json
    assert (found["kind"], found["loaded"], found["context_length"]) == ("embedding", True, 128)


def test_without_such_a_model_a_request_says_how_to_configure_one(site):
    found = error_of(site.post(EMBED, {"input": "x"}), 404)
    assert 'no model of the kind embedding; kind = "embedding" in [models.NAME]' in found["message"]


# ---------------------------------------------------------------- bounds, quotas, the log


def test_tokens_of_texts_count_towards_the_quota_and_requests_too(begin):
    site = begin("key", tokens_per_minute=20, requests_per_minute=100)
    key = {"Authorization": "Bearer key"}
    assert site.post(EMBED, {"input": "x" * 10}, **key).status_code == 200
    late = site.post(EMBED, {"input": "x" * 10}, **key)
    assert "12 tokens, more than is left of 20" in error_of(late, 429)["message"]
    assert int(late.headers["Retry-After"]) > 0
    much = error_of(site.post(EMBED, {"input": "x" * 30}, **key), 400)
    assert much["message"] == "this request may use 32 tokens; the quota is 20 a minute"
    error_of(site.post(EMBED, {"input": "x"}), 401)


def test_a_request_that_fails_costs_nothing(begin, monkeypatch):
    site = begin("key", tokens_per_minute=20)
    key = {"Authorization": "Bearer key"}
    with monkeypatch.context() as patched:
        patched.setattr(labs_embed.Encoder, "vectors", kit.raising(labs.GenerationError("broken")))
        error_of(site.post(EMBED, {"input": "x" * 10}, **key), 500)
    assert site.post(EMBED, {"input": "x" * 10}, **key).status_code == 200


def test_the_log_and_the_metrics_show_what_was_computed(begin, caplog):
    caplog.set_level("INFO", logger="labs.api")
    site = begin()
    site.post(EMBED, {"input": ["hi", "you"]})
    line = kit.log_lines(caplog)[-1]
    shown = {name: line[name] for name in ("model", "prompt_tokens", "texts", "status", "path")}
    assert shown == {
        "model": "bert", "prompt_tokens": 9, "texts": 2, "status": 200, "path": EMBED,
    }  # fmt: skip
    metrics = site.get("/metrics").text
    assert 'labs_prompt_tokens_total{model_name="bert"} 9.0' in metrics
    assert 'labs_request_success_total{finished_reason="stop",model_name="bert"} 1.0' in metrics
    assert 'labs_num_requests_running{model_name="bert"} 0.0' in metrics


def test_content_filters_read_texts_queries_documents_and_token_ids(begin, folders, encoder):
    guard = labs.Guard(deny=("whale",), mask=("email",), max_prompt_tokens=40)
    site = begin(config=msgspec.structs.replace(configured(folders), guard=guard))
    for path, body in (
        (EMBED, {"input": ["fine", "a Whale"]}),
        (EMBED, {"input": kit.encoded("a whale")}),
        (RERANK, {"query": "whale", "documents": ["a"]}),
        (RERANK, {"query": "a", "documents": ["whale"]}),
    ):
        found = error_of(site.post(path, body), 400)
        assert found["code"] == "content_filtered"
    found = error_of(site.post(EMBED, {"input": "x" * 50}), 400)
    assert "it has 52 tokens; the limit is 40" in found["message"]
    masked = encoder.encode(["write to [email]"])
    found = shop_answer(site, "write to a@example.org")
    torch.testing.assert_close(found, masked, atol=1e-5, rtol=0)


# ---------------------------------------------------------------- turns


def held(desk: labs_desk.Desk, stack: contextlib.ExitStack) -> None:
    """Hold the turn of a desk until the stack ends."""
    stack.enter_context(desk.turn())


def in_thread(stack: contextlib.ExitStack, work: Callable[[], Any]) -> list[Any]:
    """Run work in a thread, which the stack waits for; return where its result comes."""
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(work()))
    thread.start()
    stack.callback(thread.join, SECONDS)
    return found


def desk_of(site: kit.Site) -> labs_desk.Desk:
    shop_answer(site, "hi")
    desk: Any = site.engine.loaded()["bert"]
    return desk


def test_requests_wait_their_turn_and_more_than_max_waiting_are_refused(begin):
    site = begin(max_waiting=1)
    desk = desk_of(site)
    with contextlib.ExitStack() as stack:
        held(desk, inner := stack.enter_context(contextlib.ExitStack()))
        waiting = in_thread(stack, lambda: site.post(EMBED, {"input": "x"}))
        kit.until(lambda: desk.status().waiting == 1)
        full = site.post(EMBED, {"input": "x"})
        assert error_of(full, 503)["code"] == "overloaded"
        assert full.headers["Retry-After"] == "1"
        inner.close()
        assert kit.until(lambda: waiting)[0].status_code == 200
    assert not desk.busy


def test_text_is_generated_while_a_request_for_vectors_computes(begin):
    site = begin()
    desk = desk_of(site)
    with contextlib.ExitStack() as stack:
        held(desk, stack)
        chat = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 3}
        assert site.post(CHAT, chat).json["usage"]["completion_tokens"] > 0


def test_a_client_that_leaves_frees_its_place_and_its_turn(begin, monkeypatch):
    site = begin(kind=kit.Live, max_waiting=1)
    desk = desk_of(site)
    with contextlib.ExitStack() as stack:
        held(desk, inner := stack.enter_context(contextlib.ExitStack()))
        connection = site.connect(kit.request(EMBED, {"input": "x"}))
        kit.until(lambda: desk.status().waiting == 1)
        connection.close()
        kit.until(lambda: desk.status().waiting == 0)
        inner.close()
    monkeypatch.setattr(labs_padded, "CPU_TOKENS", 1)
    calls, first = threading.Event(), threading.Event()
    batches = labs_padded.padded

    def slow(*given: Any) -> Any:
        first.set()
        assert calls.wait(SECONDS)
        time.sleep(0.02)
        return batches(*given)

    monkeypatch.setattr(labs_padded, "padded", slow)
    connection = site.connect(kit.request(EMBED, {"input": ["x"] * 2000}))
    assert first.wait(SECONDS)
    connection.close()
    calls.set()
    kit.until(lambda: not desk.busy)  # long before 2,000 calls of 20 ms


def test_a_request_that_takes_longer_than_timeout_s_gives_its_turn_up(folders):
    encoder = labs_embed.Encoder(labs.ModelSpec(model_name=str(folders["embedding"])))
    desk = labs_desk.Desk(encoder, 4)
    with pytest.raises(labs_engine.Busy, match="within timeout_s = 0 s"), desk.turn(timeout_s=0):
        pass
    with desk.turn() as turn:
        turn.stop()
        with pytest.raises(labs_engine.Busy, match="timeout_s"), desk.turn(timeout_s=0.01):
            pass
    assert not desk.busy


def test_a_key_that_sends_much_delays_no_other_key_by_more_than_a_turn(folders):
    encoder = labs_embed.Encoder(labs.ModelSpec(model_name=str(folders["embedding"])))
    desk, order = labs_desk.Desk(encoder, 4), list[str]()

    def work(owner: str) -> None:
        with desk.turn(owner=owner):
            order.append(owner)

    with contextlib.ExitStack() as stack:
        with desk.turn(owner="much"):
            for count in range(2, 6):
                in_thread(stack, lambda: work("much"))
                kit.until(lambda count=count: desk.status().waiting == count - 1)
            with pytest.raises(labs_engine.Busy, match="4 requests wait"), desk.turn(owner="much"):
                pass
            in_thread(stack, lambda: work("one"))  # although all places are taken
            kit.until(lambda: desk.status().waiting == 5)
        kit.until(lambda: len(order) == 5)
    assert order[0] == "one"


def test_a_closed_desk_ends_its_work_and_takes_no_more(folders):
    encoder = labs_embed.Encoder(labs.ModelSpec(model_name=str(folders["embedding"])))
    desk = labs_desk.Desk(encoder, 4)
    with contextlib.ExitStack() as stack:

        def work() -> str:
            try:
                with desk.turn() as turn:
                    while True:
                        turn.stop()
                        time.sleep(0.001)
            except labs_engine.Busy as error:
                return str(error)

        ended = in_thread(stack, work)
        kit.until(lambda: desk.busy)
        desk.close()
        assert kit.until(lambda: ended) == ["the server is shutting down"]
        assert desk.status().closing
    with pytest.raises(labs_engine.Busy, match="shutting down"), desk.turn():
        pass


def test_a_client_that_has_left_before_its_turn_gets_none(folders):
    encoder = labs_embed.Encoder(labs.ModelSpec(model_name=str(folders["embedding"])))
    desk = labs_desk.Desk(encoder, 4)
    with pytest.raises(labs_turns.ClientGone), desk.turn(gone=lambda: True):
        pass
    assert not desk.busy


def test_many_threads_get_the_vectors_of_their_own_texts(begin, encoder):
    site = begin(max_waiting=32)
    texts = [f"text {number}" for number in range(24)]
    shop_answer(site, "load it")
    with contextlib.ExitStack() as stack:
        ask = [lambda text=text: shop_answer(site, text)[0] for text in texts]
        found = [in_thread(stack, each) for each in ask]
    expected = encoder.encode(texts)
    torch.testing.assert_close(
        torch.stack([each[0] for each in found]), expected, atol=1e-5, rtol=0
    )


# ---------------------------------------------------------------- files of lines


def line_of(name: str, url: str, **body: Any) -> dict[str, Any]:
    return {"custom_id": name, "method": "POST", "url": url, "body": body}


def answered(config: labs.Config, model: Any, *rows: Any) -> dict[Any, dict[str, Any]]:
    context, tally = labs_jsonl.open_context(config), labs_jsonl.Tally()
    lines = enumerate((json.dumps(row).encode() for row in rows), 1)
    found = [json.loads(data) for data in labs_jsonl.answer_lines(model, context, lines, tally)]
    return {each.get("custom_id", each["id"]): each for each in found}


def test_lines_of_a_file_get_the_answers_of_the_server(folders, tiny, shop):
    embed, rank = {"input": ["hi", "you"]}, {"query": "a", "documents": ["b", "c"]}
    text = {"id": "d", "prompt": "x", "max_new_tokens": 1}
    wrong = line_of("e", EMBED, input="x", model="tiny")
    rows = [line_of("a", EMBED, **embed), line_of("b", RERANK, **rank), text, wrong]
    found = answered(configured(folders), tiny, *rows)
    assert found["a"]["response"]["body"] == shop.post(EMBED, embed).json
    ours, theirs = found["b"]["response"]["body"], shop.post(RERANK, rank).json
    assert {**ours, "id": ""} == {**theirs, "id": ""}
    assert found["d"]["usage"]["completion_tokens"] == 1
    response = found["e"]["response"]
    assert response["status_code"] == 400
    assert response["body"] == shop.post(EMBED, wrong["body"]).json


def test_neighbouring_lines_share_calls_and_one_that_fails_fails_alone(folders, monkeypatch):
    texts = [f"text {number}" for number in range(70)]
    rows = [line_of(str(n), EMBED, input=text) for n, text in enumerate(texts)]
    rows.insert(5, line_of("few", EMBED, input=["hi", "you"], dimensions=8))
    rows.insert(9, line_of("bad", EMBED, input="x" * 300))
    calls, real = list[int](), labs_embed.Encoder.vectors

    def vectors(self: Any, given: Any, **options: Any) -> Any:
        calls.append(len(given))
        if len(given) > 1 and any(len(row.ids) == 3 for row in given):
            raise labs.GenerationError("broken")
        return real(self, given, **options)

    monkeypatch.setattr(labs_embed.Encoder, "vectors", vectors)
    config = configured(folders, default="bert")
    found = answered(config, None, *rows)
    assert sorted(calls) == [2, 8, 62]  # an error ends a group, and so do dimensions
    assert found["bad"]["response"]["status_code"] == 400
    data = found["few"]["response"]["body"]["data"]
    assert [len(each["embedding"]) for each in data] == [8, 8]
    calls.clear()
    broken = [line_of("a", EMBED, input="x"), line_of("b", EMBED, input="hello")]
    assert {
        each["response"]["status_code"] for each in answered(config, None, *broken).values()
    } == {200}
    assert calls == [2, 1, 1]


def test_a_run_whose_model_generates_no_text_answers_lines_for_vectors_only(folders):
    config = configured(folders, default="bert")
    rows = [{"id": "a", "prompt": "x"}, line_of("b", EMBED, input="hi", model="bert")]
    found = answered(config, None, *rows)
    assert "is of the kind embedding, not text" in found["a"]["error"]["message"]
    assert found["b"]["response"]["status_code"] == 200


# ---------------------------------------------------------------- untrusted bodies


VALUES: list[Any] = [None, True, False, 0, -1, 1, 2**63, -(2**70), 1e308, "", "x", "é" * 300, "\0"]
VALUES += [[], {}, [[]], [None], [1, [2]], ["a", "b"], [[5, 6], [7]], [2**62], ["x"] * 3, [{}]]
VALUES += [[[262]], [[-1]], [0.5], {"text": "x"}, [{"text": "x"}, "y"], [{"text": 1}], "base64"]
VALUES += ["float", "query", "bert", "cross", "tiny", "no\ud800", "\u2028", [[256] * 200], 8, 129]
FIELDS = ["input", "model", "encoding_format", "dimensions", "truncate_prompt_tokens", "user", "x"]
FIELDS += ["prompt_name", "query", "documents", "top_n", "return_documents", "max_tokens_per_doc"]
FIELDS += ["max_tokens_per_query", "truncation_side", "rank_fields", "input_type"]


def body_of(chance: random.Random) -> bytes:
    good = {"input": "hi"} if chance.random() < 0.5 else {"query": "q", "documents": ["a", "b"]}
    body: Any = {**good} if chance.random() < 0.8 else {}
    for _ in range(chance.randint(0, 3)):
        body[chance.choice(FIELDS)] = chance.choice(VALUES)
    body = chance.choice(VALUES) if chance.random() < 0.03 else body
    data = json.dumps(body).encode()
    if chance.random() < 0.1:
        place = chance.randrange(len(data) + 1)
        data = data[:place] + bytes([chance.randrange(256)]) + data[place + chance.randint(0, 2) :]
    return data


@pytest.mark.parametrize(
    "count", [FUZZ, pytest.param(FUZZ_LONG, marks=pytest.mark.long, id="many")]
)
@pytest.mark.parametrize("path", [EMBED, RERANK])
def test_every_body_is_answered_or_refused_by_name(shop, path, count):
    found = set()
    for seed in range(count):
        response = shop.post(path, body_of(random.Random(seed)))
        assert response.status_code in (200, 400, 404), (seed, response.text)
        assert "error" in response.json or response.status_code == 200
        found.add(response.status_code)
    assert found >= {200, 400}
