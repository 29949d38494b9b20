# SPDX-License-Identifier: Apache-2.0
"""Clients that ask for vectors and for the order of documents, as they come (encoders.py).

    PARROT="PYTHON tests/clients/parrot.py" /tmp/clients/bin/python -m pytest -q tests/clients

PYTHON is one that has labs.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import litellm
import openai
import pytest
from langchain_openai import OpenAIEmbeddings

KEY = "any"
TEXTS = ["hi", "a longer text"]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Start the server as a program and return the address of its OpenAI endpoints."""
    here = Path(__file__).parent
    parrot = os.environ.get("PARROT", f"{sys.executable} {here / 'parrot.py'}")
    command = shlex.split(parrot.replace("parrot.py", "encoders.py"))
    command += [str(tmp_path_factory.mktemp("encoders")), "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            lines = iter(process.stderr.readline, "")
            found = next(filter(None, (re.search(r"http://\S+", line) for line in lines)))
            assert any("ready" in line for line in lines)
            yield f"{found[0]}/v1"
        finally:
            process.terminate()
            process.stderr.read()


def close(one: list[float], other: list[float]) -> bool:
    return one == pytest.approx(other, abs=1e-5)


@pytest.fixture(scope="module")
def vectors(url: str) -> list[list[float]]:
    with openai.OpenAI(base_url=url, api_key=KEY) as client:
        asked = {"model": "bert", "input": TEXTS}
        found = client.embeddings.create(encoding_format="float", **asked)
        return [each.embedding for each in found.data]


def test_openais_client_reads_base64_which_it_asks_for_by_default(url, vectors) -> None:
    with openai.OpenAI(base_url=url, api_key=KEY) as client:
        found = client.embeddings.create(model="bert", input=TEXTS)
        assert all(map(close, [each.embedding for each in found.data], vectors))
        assert found.usage.prompt_tokens == 4 + 15
        with pytest.raises(openai.BadRequestError, match="maximum context length is 128"):
            client.embeddings.create(model="bert", input="x" * 300)


def test_langchain_embeds_documents_and_queries(url, vectors) -> None:
    model = OpenAIEmbeddings(
        base_url=url, api_key=KEY, model="bert", check_embedding_ctx_length=False
    )
    assert all(map(close, model.embed_documents(TEXTS), vectors))
    assert close(model.embed_query(TEXTS[0]), vectors[0])
    many = [f"text {number}" for number in range(1500)]  # it sends 1,000 at once
    assert len(model.embed_documents(many)) == 1500


@pytest.mark.parametrize("provider", ["openai", "hosted_vllm"])
def test_litellm_embeds(url, vectors, provider) -> None:
    asked = {"api_base": url, "api_key": KEY, "input": TEXTS}
    found = litellm.embedding(model=f"{provider}/bert", **asked)
    assert all(map(close, [each["embedding"] for each in found.data], vectors))


@pytest.mark.parametrize("provider", ["hosted_vllm", "jina_ai", "cohere"])
def test_litellm_ranks(url, provider) -> None:
    path = {"hosted_vllm": "/v1", "jina_ai": "/v1/rerank", "cohere": "/v2/rerank"}[provider]
    asked = {"query": "which", "documents": ["one", "two", "a third"], "top_n": 2}
    base = url.removesuffix("/v1") + path
    found = litellm.rerank(model=f"{provider}/cross", api_base=base, api_key=KEY, **asked)
    assert len(found.results) == 2
    first, second = (each["relevance_score"] for each in found.results)
    assert first >= second
    assert {each["index"] for each in found.results} <= {0, 1, 2}
