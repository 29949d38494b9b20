# SPDX-License-Identifier: Apache-2.0
"""Requests for vectors and for the order of documents, in the formats of OpenAI and of Jina.

    body, _ = labs_protocol.read(data, labs_vectors.EMBEDDINGS.body, labs_vectors.EMBEDDINGS.fields)
    asked = labs_vectors.checked(labs_vectors.EMBEDDINGS.asked(body), most, filters)
    work = labs_vectors.read(labs_vectors.EMBEDDINGS, encoder, asked, filters)  # its tokens
    answer = work.make("its name", "its id", stop)          # computes, and returns a struct

Nothing here does input or output: labs_api.py answers HTTP requests so, and labs_jsonl.py
lines of batch files. Needs labs.py, labs_asked.py and labs_protocol.py; torch.
"""

from __future__ import annotations

import base64
import itertools
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, cast

from msgspec import UNSET, Meta, Struct, UnsetType
from msgspec.structs import replace

import labs
import labs_protocol
from labs_asked import Refusal

MOST_TEXTS = 2048  # of a request, as at OpenAI
MOST_TOKENS = 300_000  # of a request, as at OpenAI
MOST_BYTES = 2**24  # of all pairs of a request: each repeats the query
Cut = Annotated[int, Meta(ge=-1, le=2**20)]
Size = Annotated[int, Meta(ge=1, le=2**20)]


# ---------------------------------------------------------------- requests


class Hints(Struct):
    """Fields that change no vector and no score."""

    user: str | None = None


class EmbeddingsRequest(labs.Strict, frozen=True, kw_only=True):
    """One or more texts, or their token ids, to be turned into vectors.

    truncate_prompt_tokens: cut texts to so many tokens; -1: to what the model reads. prompt_name:
    a prompt of the model, which is put before each text.
    """

    input: str | tuple[str | int | tuple[int, ...], ...]
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Size | None = None
    truncate_prompt_tokens: Cut | None = None
    prompt_name: str | None = None


class Document(labs.Strict, frozen=True):
    """A document of a request, or of an answer."""

    text: str


class RerankRequest(labs.Strict, frozen=True, kw_only=True):
    """A query and documents to be put in order. top_n: return only the first; 0: return all.

    truncate_prompt_tokens: as for embeddings, of a pair. max_tokens_per_doc, max_tokens_per_query:
    leave out what follows so many tokens.
    """

    query: str
    documents: tuple[str | Document, ...]
    model: str | None = None
    top_n: Annotated[int, Meta(ge=0, le=2**20)] | None = None
    return_documents: bool | None = None
    truncate_prompt_tokens: Cut | None = None
    max_tokens_per_doc: Size | None = None
    max_tokens_per_query: Size | None = None


class Asked(Struct, frozen=True, kw_only=True):
    """A checked request. texts and ids: one of them is empty; of a rerank, texts are documents."""

    body: Any
    texts: tuple[str, ...] = ()
    ids: tuple[tuple[int, ...], ...] = ()

    @property
    def shown(self) -> tuple[str, ...]:
        """The texts that filters read."""
        return (*([self.body.query] if isinstance(self.body, RerankRequest) else []), *self.texts)


# ---------------------------------------------------------------- answers


class Tokens(Struct, frozen=True):
    prompt_tokens: int
    total_tokens: int


class Embedding(Struct, frozen=True):
    """A vector, as numbers or as its float32 bytes (little-endian) in base64."""

    index: int
    embedding: tuple[float, ...] | str
    object: Literal["embedding"] = "embedding"


class EmbeddingsAnswer(Struct, frozen=True):
    data: tuple[Embedding, ...]
    model: str
    usage: Tokens
    object: Literal["list"] = "list"


class Ranked(Struct, frozen=True):
    """A document's score. index: its place in the request."""

    index: int
    relevance_score: float
    document: Document | UnsetType = UNSET


class RerankAnswer(Struct, frozen=True):
    id: str
    model: str
    results: tuple[Ranked, ...]
    usage: Tokens


class Work(Struct, frozen=True, eq=False):
    """A request whose tokens are read.

    compute: returns what the model makes of rows, one for each; called with (rows, a function that
    raises when the work has to end). shape: returns the answer; called with (what was computed,
    name of the model, id). key: works of one model with the same key can be computed together.
    """

    rows: Sequence[Any]
    compute: Callable[[Sequence[Any], Callable[[], Any]], Any]
    shape: Callable[[Any, str, str], Any]
    key: Any = None

    @property
    def tokens(self) -> int:
        return sum(len(row.ids) for row in self.rows)

    def make(self, name: str, identity: str, stop: Callable[[], Any]) -> Any:
        """Compute, and return the answer. The arguments are those of shape and compute."""
        return self.shape(self.compute(self.rows, stop), name, identity)


def computed(works: Sequence[Work]) -> list[Any]:
    """Compute works of one model and one key together; return what each of them asked for."""
    found = works[0].compute([row for work in works for row in work.rows], lambda: None)
    ends = [*itertools.accumulate(len(work.rows) for work in works)]
    return [found[end - len(work.rows) : end] for work, end in zip(works, ends, strict=True)]


# ---------------------------------------------------------------- endpoints


class Endpoint(labs_protocol.Endpoint):
    """The requests and answers of one path. kind: of the models that answer.

    summary: what it does, for OpenAPI. made: the struct of its answers.
    """

    kind: Literal["embedding", "rerank"]
    summary: str
    made: type[Struct]

    def asked(self, body: Any) -> Asked:
        """Return a body as a checked request. Raises Refusal for what no model can do."""
        raise NotImplementedError

    def work(self, model: Any, asked: Asked) -> Work:
        """Read the tokens of a request. model: an Encoder or a Scorer. Raises InputError."""
        raise NotImplementedError


class Embeddings(Endpoint):
    """OpenAI's: https://platform.openai.com/docs/api-reference/embeddings"""

    body, kind = EmbeddingsRequest, "embedding"
    summary, made = "Make vectors of texts", EmbeddingsAnswer
    fields = labs_protocol.Fields(
        hints=Hints,
        neutral={
            "truncation_side": ("right",),
            "add_special_tokens": (True,),
            "input_type": (),
        },
        replaced={"input_type": "prompt_name"},
    )

    def asked(self, body: EmbeddingsRequest) -> Asked:
        """Return a body as a checked request. Raises Refusal for what no model can do."""
        check_cut(body.truncate_prompt_tokens)
        given = body.input if isinstance(body.input, tuple) else (body.input,)
        kinds = {type(each) for each in given}
        if kinds == {int}:
            given, kinds = cast("Any", (given,)), {tuple}
        if len(kinds) > 1:
            text = "input: give one text, several, or token ids instead of texts, not a mixture"
            raise Refusal(text, "invalid_value", "input")
        check_count("input", len(given))
        if kinds == {str}:
            return Asked(body=body, texts=cast("tuple[str, ...]", given))
        if body.prompt_name is not None:
            text = "prompt_name: a prompt can be put before texts, not before token ids"
            raise Refusal(text, "invalid_value", "prompt_name")
        return Asked(body=body, ids=cast("tuple[tuple[int, ...], ...]", given))

    def work(self, model: Any, asked: Asked) -> Work:
        """Read the tokens of a request. model: a labs_embed.Encoder. Raises InputError."""
        body, loaded = asked.body, model.load()
        loaded.dimensions(body.dimensions)  # refuses before anything is computed
        cut = cut_of(body.truncate_prompt_tokens, loaded.reader.limit)
        if asked.ids:
            rows = model.given(asked.ids, cut=cut)
        else:
            rows = model.tokens(asked.texts, prompt_name=body.prompt_name, cut=cut)

        tokens = check_tokens("input", rows)

        def compute(rows: Sequence[Any], stop: Callable[[], Any]) -> Any:
            return model.vectors(rows, dimensions=body.dimensions, stop=stop)

        def shape(vectors: Any, name: str, identity: str) -> EmbeddingsAnswer:
            shown = _base64(vectors) if body.encoding_format == "base64" else vectors.tolist()
            data = tuple(Embedding(index, each) for index, each in enumerate(shown))
            return EmbeddingsAnswer(data, name, Tokens(tokens, tokens))

        return Work(rows, compute, shape, body.dimensions)


def _base64(vectors: Any) -> list[str]:
    return [base64.b64encode(row.astype("<f4").tobytes()).decode() for row in vectors.numpy()]


class Rerank(Endpoint):
    """Jina's, which Cohere's clients read too: https://api.jina.ai/redoc#tag/rerank"""

    body, kind = RerankRequest, "rerank"
    summary, made = "Put documents in order", RerankAnswer
    fields = labs_protocol.Fields(
        hints=Hints,
        neutral={
            "truncation_side": ("right",),
            "rank_fields": (["text"],),
            "max_chunks_per_doc": (),
        },
        replaced={"max_chunks_per_doc": "max_tokens_per_doc"},
    )

    def asked(self, body: RerankRequest) -> Asked:
        """Return a body as a checked request. Raises Refusal for what no model can do."""
        check_cut(body.truncate_prompt_tokens)
        check_count("documents", len(body.documents))
        texts = tuple(each if isinstance(each, str) else each.text for each in body.documents)
        size = sum(map(_bytes, texts)) + _bytes(body.query) * len(texts)
        if size > MOST_BYTES:
            text = f"the pairs of query and document have {size} bytes; at most {MOST_BYTES} are"
            raise Refusal(f"documents: {text} read", "invalid_value", "documents")
        return Asked(body=body, texts=texts)

    def work(self, model: Any, asked: Asked) -> Work:
        """Read the tokens of a request. model: a labs_rerank.Scorer. Raises InputError."""
        body, query, texts = asked.body, asked.body.query, asked.texts
        if body.max_tokens_per_query is not None:
            (query,) = model.shortened([query], body.max_tokens_per_query)
        if body.max_tokens_per_doc is not None:
            texts = model.shortened(texts, body.max_tokens_per_doc)
        cut = cut_of(body.truncate_prompt_tokens, model.load().reader.limit)
        rows = model.tokens(query, texts, cut=cut)
        tokens = check_tokens("documents", rows)

        def compute(rows: Sequence[Any], stop: Callable[[], Any]) -> Any:
            return model.scores(rows, stop=stop)

        def shape(found: Any, name: str, identity: str) -> RerankAnswer:
            scores = found.tolist()
            order = sorted(range(len(scores)), key=lambda place: -scores[place])
            shows = body.return_documents is not False
            results = tuple(
                Ranked(place, scores[place], Document(asked.texts[place]) if shows else UNSET)
                for place in order[: body.top_n or None]
            )
            return RerankAnswer(identity, name, results, Tokens(tokens, tokens))

        return Work(rows, compute, shape)


EMBEDDINGS, RERANK = Embeddings(), Rerank()
ENDPOINTS: dict[str, Endpoint] = {
    "/v1/embeddings": EMBEDDINGS,
    "/v1/rerank": RERANK,
    "/v2/rerank": RERANK,
    "/rerank": RERANK,
}


# ---------------------------------------------------------------- requests on their way


def checked(asked: Asked, most: int, filters: Any) -> Asked:
    """Return a request with masked texts. filters: of labs_guard, or None.

    most: bytes of a text. Raises Refusal for a larger one, and Filtered.
    """
    for size in (size for size in map(_bytes, asked.shown) if size > most):
        text = f"a text of the request has {size} bytes; this server allows {most}"
        raise Refusal(text, "prompt_too_large")
    if filters is None:
        return asked
    texts = tuple(filters.check_text(text) for text in asked.texts)
    if isinstance(asked.body, RerankRequest):
        query = filters.check_text(asked.body.query)
        return replace(asked, texts=texts, body=replace(asked.body, query=query))
    return replace(asked, texts=texts)


def read(endpoint: Endpoint, model: Any, asked: Asked, filters: Any) -> Work:
    """Read the tokens of a checked request. model: an Encoder or a Scorer. Raises InputError.

    filters: as for `checked`; they bound the tokens of a text, and read the text of token ids.
    """
    work = endpoint.work(model, asked)
    tokenizer = model.load().reader.tokenizer
    for row in () if filters is None else work.rows:
        text = tokenizer.decode(row.ids) if asked.ids else ""
        filters.check_inputs(labs.Inputs(tuple(row.ids), text), ids=bool(asked.ids))
    return work


# ---------------------------------------------------------------- bounds


def _bytes(text: str) -> int:
    return len(text.encode(errors="replace"))


def check_count(name: str, count: int) -> None:
    """Raise Refusal unless a request has a text, and not too many of them."""
    if not 1 <= count <= MOST_TEXTS:
        text = f"{name}: the request has {count} texts; it can have 1 to {MOST_TEXTS}"
        raise Refusal(text, "invalid_value", name)


def check_cut(asked: int | None) -> None:
    """Raise Refusal when a text would be cut to no token."""
    if asked == 0:
        text = "truncate_prompt_tokens: 0 tokens have no meaning; -1 is what the model reads"
        raise Refusal(text, "invalid_value", "truncate_prompt_tokens")


def cut_of(asked: int | None, limit: int) -> int | None:
    """Return to how many tokens a text is cut, or None. Raises Refusal beyond the model's limit."""
    if asked is not None and asked > limit:
        text = f"truncate_prompt_tokens: this model reads {limit} tokens at most, not {asked}"
        raise Refusal(text, "invalid_value", "truncate_prompt_tokens")
    return limit if asked == -1 else asked


def check_tokens(name: str, rows: Sequence[Any]) -> int:
    """Return the number of tokens of a request. Raises Refusal when it has too many."""
    tokens = sum(len(row.ids) for row in rows)
    if tokens > MOST_TOKENS:
        text = (
            f"{name}: the request has {tokens} tokens; it can have {MOST_TOKENS}: send fewer texts"
        )
        raise Refusal(text, "invalid_value", name)
    return tokens
