# SPDX-License-Identifier: Apache-2.0
"""What the protocols of the server have in common: bodies, errors and streams of events.

    endpoint = labs_openai.CHAT                 # an Endpoint
    body, given = labs_protocol.read(data, endpoint.body, endpoint.fields)  # or raises Refusal
    request = endpoint.request_of(body, given)  # a labs_request.Request
    endpoint.answer(body, model, completions, id="1", model=config.model_id)

    stream = endpoint.stream(body)              # the same as server-sent events
    for data in stream.begin(opened): ...       # then stream.take(choice, part), stream.end(dones)

Each protocol is a rendering of labs_request's requests and of labs_parts' parts. Nothing here does
input or output: labs_api.py answers HTTP requests so, and labs_jsonl.py lines of batch files. Needs
labs.py, labs_request.py and labs_tokens.py.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import msgspec
from msgspec import UNSET, Struct, UnsetType

import labs
import labs_request
import labs_tokens
from labs_request import Refusal
from labs_request import Source as Source

S = TypeVar("S", bound=Struct)
LINE_ENDS = (  # raw in UTF-8, and as JSON escapes them
    (b"\xe2\x80\xa8", b"\\u2028"),
    (b"\xe2\x80\xa9", b"\\u2029"),
    (b"\xc2\x85", b"\\u0085"),
)


def dumps(value: Any) -> bytes:
    """Encode as JSON in one line; U+2028, U+2029 and U+0085, which some read as line ends, too."""
    data = msgspec.json.encode(value)
    for raw, escaped in LINE_ENDS:
        data = data.replace(raw, escaped)
    return data


def event(value: Any, name: str = "") -> bytes:
    """Return a server-sent event. name: of the event; without one it has only data."""
    head = f"event: {name}\n".encode() if name else b""
    return head + b"data: " + dumps(value) + b"\n\n"


# ---------------------------------------------------------------- errors


class ErrorDetail(Struct, frozen=True):
    message: str
    type: str
    param: str | None
    code: str


class Error(Struct, frozen=True):
    error: ErrorDetail


def error_of(status: int, message: str, code: str, param: str | None = None) -> Error:
    """Return an error in OpenAI's format; its type follows from the HTTP status."""
    kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = "server_error" if status >= 500 else kinds.get(status, "invalid_request_error")
    return Error(ErrorDetail(message, kind, param, code))


def code_and_param(error: labs.LabsError) -> tuple[str, str | None]:
    """Return OpenAI's `code` and `param` for an error that the request caused."""
    if code := getattr(error, "code", None):  # a Refusal or labs_guard.Filtered
        return code, getattr(error, "param", None)
    if isinstance(error, labs.PromptTooLong):
        return "context_length_exceeded", error.param
    return "invalid_value", param_of(str(error))


def param_of(message: str) -> str | None:
    """Return the field that an error message of msgspec or labs names, or None."""
    first = r"^(\w+(?:\[\d+\])?)(?: = |:| names)|^the (prompt) has"
    found = re.search(rf"- at `\$\.(.+?)`|field `(.+?)`|{first}", message)
    return next((part for part in found.groups() if part), None) if found else None


# ---------------------------------------------------------------- bodies


class Fields(Struct, frozen=True, kw_only=True):
    """What a protocol does with the fields that its body's struct does not have.

    hints: a struct of those that cannot change the text; every value of its type is accepted and
    ignored. neutral: those that could, with the values, beside null, that change nothing; others
    are refused. replaced: what to use instead of a refused one. minus_one: what -1 stands for.
    """

    hints: type[Struct]
    neutral: Mapping[str, tuple[Any, ...]] = {}
    replaced: Mapping[str, str] = {}
    minus_one: Mapping[str, bytes] = {}


def read(data: bytes, kind: type[S], fields: Fields | None = None) -> tuple[S, dict[str, Any]]:
    """Return a body as `kind`, and its fields as a dict. Raises Refusal for an invalid body."""
    data = data.removeprefix(codecs.BOM_UTF8)
    try:
        if fields is not None:
            data = _known(data, fields)
        body = msgspec.json.decode(data, type=kind)
        given: dict[str, Any] = msgspec.json.decode(data)
    except msgspec.ValidationError as error:
        raise Refusal(str(error), "invalid_value", param_of(str(error))) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        reason = labs_tokens.json_fault(data, error)
        raise Refusal(f"the body is not valid JSON: {reason}", "invalid_json") from error
    return body, given


def _known(data: bytes, fields: Fields) -> bytes:
    """Return a body without hints and neutral fields. Raises Refusal for other values of these."""
    raw = msgspec.json.decode(data, type=dict[str, msgspec.Raw])
    msgspec.json.decode(data, type=fields.hints)
    names = raw.keys() & fields.neutral.keys()
    found = {name: msgspec.json.decode(raw[name]) for name in names}
    n = msgspec.json.decode(raw.get("n", b"null"))
    neutral = {**fields.neutral, **({} if n is None else {"best_of": (1, n)})}
    for name, value in found.items():
        check_neutral(name, value, neutral[name], fields.replaced.get(name))
    minus = {
        name: msgspec.Raw(value)
        for name, value in fields.minus_one.items()
        if bytes(raw.get(name, b"")) == b"-1"
    }
    rest = {k: v for k, v in raw.items() if k not in {*names, *fields.hints.__struct_fields__}}
    return msgspec.json.encode(rest | minus)


def check_neutral(
    name: str, value: Any, neutral: tuple[Any, ...], instead: str | None = None
) -> None:
    """Raise Refusal unless a value is null or neutral. instead: the field to use."""
    known = [(type(each), each) for each in (None, *neutral)]  # the types keep 0 and False apart
    if (type(value), value) not in known:
        rest = f"use {instead}" if instead else "leave it out"
        raise Refusal(f"{name} is not implemented; {rest}", "unsupported", name)


# ---------------------------------------------------------------- endpoints


class Opened(Struct, frozen=True, kw_only=True):
    """A request whose answers are being computed. loaded: the model, without its weights.

    id, created (seconds since 1970), model: the names that the answers show. prompt_tokens: of all
    prompts. documents: the passages in the prompts, or UNSET without documents. generation: the
    settings, without the model's recommendations.
    """

    id: str
    created: int
    model: str
    loaded: labs.Model
    prompt_tokens: int = 0
    documents: tuple[labs_request.Source, ...] | UnsetType = UNSET
    generation: labs.Generation = labs.Generation()


class Stream:
    """Turn the parts of one request's answers into server-sent events."""

    ping = b": ping\n\n"  # sent while nothing comes

    def begin(self, opened: Opened) -> Iterator[bytes]:
        """Yield the events before the first part."""
        yield from ()

    def take(self, choice: int, part: Any) -> Iterator[bytes]:
        """Yield the events of a part of the answer with this number."""
        raise NotImplementedError

    def end(self, dones: Sequence[labs.Done]) -> Iterator[bytes]:
        """Yield the events after the last part. dones: the last part of each answer."""
        yield from ()

    def failed(self, status: int, message: str, code: str, param: str | None) -> bytes:
        """Return the last events of a stream that failed, perhaps before it began."""
        return Endpoint().failure(status, message, code, param)


class Endpoint:
    """The requests and answers of one path of a protocol. body: the struct of its requests."""

    body: type[Any]
    fields: Fields
    id_header = "X-Request-Id"  # in which clients look for the id of their request

    def request_of(self, body: Any, given: dict[str, Any]) -> labs_request.Request:
        """Return a body as labs' request. given: the fields that the body sets, as of `read`."""
        raise NotImplementedError

    def answer(self, body: Any, loaded: labs.Model, found: Sequence[Any], **names: Any) -> Any:
        """Return whole answers as a struct.

        names: id, model and generation, and created and documents, as in Opened.
        """
        raise NotImplementedError

    def stream(self, body: Any) -> Stream:
        raise NotImplementedError

    def error_of(self, status: int, message: str, code: str, param: str | None = None) -> Any:
        """Return an error in the protocol's format."""
        return error_of(status, message, code, param)

    def failure(self, status: int, message: str, code: str, param: str | None) -> bytes:
        """Return an error as the last event of a stream."""
        return event(self.error_of(status, message, code, param), "error")
