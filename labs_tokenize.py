# SPDX-License-Identifier: Apache-2.0
"""Tokens of texts and conversations over HTTP, in the shapes of vLLM and llama.cpp.

    POST /tokenize        {"prompt": "…"} {"messages": […]} {"content": "…"}  -> {"tokens": […], …}
    POST /detokenize      {"tokens": […]}                    -> {"prompt": "…", "content": "…"}
    POST /apply-template  {"messages": […]}                  -> {"prompt": "…"}

The tokenizer answers alone: nothing is computed by the model, and one whose tokenizer has been read
once is not loaded again. A conversation has the ids that it has as a request. Needs labs_openai.py,
labs_request.py, labs_service.py and labs_tokens.py with what those need; falcon.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Annotated, Any

import falcon
from msgspec import Meta, Struct
from msgspec.structs import replace

import labs
import labs_dialogue
import labs_models
import labs_openai
import labs_openapi
import labs_protocol
import labs_request
import labs_service
import labs_tokens
from labs_request import Refusal

Messages = Annotated[tuple[labs_openai.ChatMessage, ...], Meta(min_length=1)]


class ChatFields(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The fields of /v1/chat/completions that concern the prompt, beside its messages."""

    model: str | None = None
    tools: tuple[labs_dialogue.Tool, ...] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: labs_openai.Effort | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None


class TemplateRequest(ChatFields, frozen=True, kw_only=True):
    """A conversation to render."""

    messages: Messages


class TokenizeRequest(ChatFields, frozen=True, kw_only=True):
    """Exactly one of prompt (as at vLLM), content (as at llama.cpp) and messages.

    add_special_tokens, add_special: whether to add those that begin a text, by default true for a
    prompt and false for content. parse_special: whether control tokens in the text are read as
    such. return_token_strs: add the tokens' names in the vocabulary. with_pieces: return the text
    of each token, or its bytes if they are not text.
    """

    messages: Messages | None = None
    prompt: str | None = None
    content: str | None = None
    add_special_tokens: bool | None = None
    add_special: bool | None = None
    parse_special: bool | None = None
    return_token_strs: bool | None = None
    with_pieces: bool | None = None


class Piece(Struct, frozen=True):
    """A token with its text, or its bytes if these are not text."""

    id: int
    piece: str | tuple[int, ...]


class TokenizeAnswer(Struct, frozen=True, kw_only=True):
    """max_model_len: the model's context length in tokens, null if it is unknown."""

    count: int
    max_model_len: int | None
    tokens: tuple[int | Piece, ...]
    token_strs: tuple[str, ...] | None = None


class DetokenizeRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    tokens: tuple[labs.TokenId, ...]
    model: str | None = None


class DetokenizeAnswer(Struct, frozen=True, kw_only=True):
    """The same text by vLLM's name and by llama.cpp's; special tokens are shown."""

    prompt: str
    content: str


class TemplateAnswer(Struct, frozen=True, kw_only=True):
    prompt: str


ONLY_MESSAGES = tuple(name for name in ChatFields.__struct_fields__ if name != "model")


# ---------------------------------------------------------------- tokenizers


def encode(model: labs.Model, text: str, *, special: bool, parse: bool) -> tuple[int, ...]:
    """Return the tokens of a text. special: add those that begin one. parse: see TokenizeRequest.

    Raises InputError if the tokenizer refuses the text.
    """
    words = {"add_special_tokens": special, **({} if parse else {"split_special_tokens": True})}
    try:
        with model.lock:
            return tuple(model.tokenizer(text, **words)["input_ids"])
    except BaseException as error:
        panics = type(error).__name__ == "PanicException"  # of Rust, and not an Exception
        if not (panics or isinstance(error, Exception)):
            raise
        text = f"the model's tokenizer refuses this: {labs.reason(error)}"
        raise labs.InputError(text) from error


def decode(model: labs.Model, tokens: Sequence[int]) -> str:
    """Return the text of tokens, special ones too. Raises InputError for one that has no text."""
    names_of(model, tokens)
    with model.lock:
        return str(model.tokenizer.decode([*tokens]))


def names_of(model: labs.Model, tokens: Sequence[int]) -> tuple[str, ...]:
    """Return the names of tokens in the vocabulary. Raises InputError for a token without one."""
    with model.lock:
        names = model.tokenizer.convert_ids_to_tokens([*tokens])
    for place, name in enumerate(names):
        if name is None:
            text = f"tokens[{place}] = {tokens[place]}: the tokenizer has no such token"
            raise labs.InputError(text)
    return tuple(map(str, names))


def pieces_of(model: labs.Model, tokens: Sequence[int]) -> tuple[Piece, ...]:
    """Return each token with what it adds to a text; a special token with its name."""
    spelling, known = labs_tokens.Spelling(model), {}
    for token, name in zip(tokens, names_of(model, tokens), strict=True):
        if token not in known:
            data = spelling.bytes_of(token) or name.encode(errors="replace")
            try:
                known[token] = Piece(token, data.decode())
            except UnicodeDecodeError:
                known[token] = Piece(token, tuple(data))
    return tuple(known[token] for token in tokens)


# ---------------------------------------------------------------- requests


def chat_of(body: TemplateRequest | TokenizeRequest) -> labs_request.Request:
    """Return a conversation as the request that /v1/chat/completions makes of it."""
    names = ("messages", "model", *ONLY_MESSAGES)
    given = {name: each for name in names if (each := getattr(body, name)) is not None}
    chat = labs_openai.ChatRequest(**given)
    return replace(labs_openai.CHAT.request_of(chat, given), documents=False)


def text_of(body: TokenizeRequest) -> str | None:
    """Return the text to tokenise, None for messages. Raises Refusal for what does not fit."""
    sources = {name: getattr(body, name) for name in ("prompt", "content", "messages")}
    given = [name for name, each in sources.items() if each is not None]
    if len(given) != 1:
        raise Refusal("give exactly one of prompt, messages and content", "invalid_value", "prompt")
    if None not in (body.add_special, body.add_special_tokens):
        text = "add_special and add_special_tokens mean the same; give one of them"
        raise Refusal(text, "invalid_value", "add_special")
    if body.messages is not None:
        for name in ("add_special_tokens", "add_special"):
            if getattr(body, name):
                text = f"{name}: a chat template adds the special tokens of messages itself"
                raise Refusal(text, "unsupported", name)
        if body.parse_special is not None:
            text = "parse_special: control tokens in messages always stay text; leave it out"
            raise Refusal(text, "unsupported", "parse_special")
        return None
    for name in ONLY_MESSAGES:
        if getattr(body, name) is not None:
            text = f"{name}: only messages have it, by the model's chat template"
            raise Refusal(text, "invalid_value", name)
    return body.prompt if body.content is None else body.content


# ---------------------------------------------------------------- resources


class Tokens(labs_service.Resource):
    """POST /tokenize, /detokenize and /apply-template."""

    def on_post(self, req: falcon.Request, resp: falcon.Response) -> None:
        body, _ = self.service.read(req, TokenizeRequest)
        text = text_of(body)
        if text is None:
            model, inputs = self._built(req, body)
            tokens = inputs.input_ids
        else:
            model, tokens = self._encoded(req, body, text)
        answer = TokenizeAnswer(
            count=len(tokens),
            max_model_len=model.context_length,
            tokens=pieces_of(model, tokens) if body.with_pieces else tokens,
            token_strs=names_of(model, tokens) if body.return_token_strs else None,
        )
        resp.data = labs_protocol.dumps(answer)

    def on_post_back(self, req: falcon.Request, resp: falcon.Response) -> None:
        body, _ = self.service.read(req, DetokenizeRequest)
        if len(body.tokens) > (most := self.service.config.server.max_prompt_bytes):
            text = f"there are {len(body.tokens)} tokens; this server allows {most}"
            raise Refusal(text, "prompt_too_large", "tokens")
        request = labs_request.Request(prompts=(), model=body.model, documents=False)
        _, model = self._reader(req, self.service.check(request))
        text = decode(model, body.tokens)
        resp.data = labs_protocol.dumps(DetokenizeAnswer(prompt=text, content=text))

    def on_post_template(self, req: falcon.Request, resp: falcon.Response) -> None:
        body, _ = self.service.read(req, TemplateRequest)
        _, inputs = self._built(req, body)
        resp.data = labs_protocol.dumps(TemplateAnswer(prompt=inputs.prompt))

    def _built(
        self, req: falcon.Request, body: TemplateRequest | TokenizeRequest
    ) -> tuple[labs.Model, labs.Inputs]:
        """Return the reader and inputs of a conversation, as a request would have them."""
        request = self.service.check(chat_of(body))
        name, model = self._reader(req, request)
        with labs_request.in_words_of(request):
            config = self.service.context.configs[name]
            return model, labs_request.build(config, model, request.prompts[0])

    def _encoded(
        self, req: falcon.Request, body: TokenizeRequest, text: str
    ) -> tuple[labs.Model, tuple[int, ...]]:
        prompts = (labs_request.Prompt(prompt=text, use_chat_template=False),) if text else ()
        request = labs_request.Request(prompts=prompts, model=body.model, documents=False)
        request = self.service.check(request)
        _, model = self._reader(req, request)
        given = body.add_special_tokens if body.add_special is None else body.add_special
        special = body.content is None if given is None else given
        read = "".join(each.prompt or "" for each in request.prompts)  # a filter may have masked it
        return model, encode(model, read, special=special, parse=body.parse_special is not False)

    def _reader(self, req: falcon.Request, request: labs_request.Request) -> tuple[str, labs.Model]:
        """Return the name of the model, and the model without weights.

        It waits for the model only if its tokenizer was never read.
        """
        service = self.service
        try:
            name = service.name_of(request)
            return name, service.models.reader(name)
        except labs_models.Loading:
            lease = service.leased(req, request)
            try:
                return lease.name, replace(lease.engine.model, decoder=None)
            finally:
                service.models.release(lease.name)


def routes(service: labs_service.Service) -> tuple[labs_openapi.Route, ...]:
    """Return the rows of the route table."""
    tokens, post = Tokens(service), functools.partial(labs_openapi.Route, "post")
    joined, rendered = (DetokenizeAnswer, DetokenizeRequest), (TemplateAnswer, TemplateRequest)
    return (
        post("/tokenize", tokens, "Tokenize a text or chat", TokenizeAnswer, TokenizeRequest),
        post("/detokenize", tokens, "Join tokens", *joined, "back"),
        post("/apply-template", tokens, "Render a chat", *rendered, "template"),
    )
