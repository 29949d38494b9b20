# SPDX-License-Identifier: Apache-2.0
"""Describe single tokens: their bytes, a printable name, and where they begin in a text.

    spelling = labs_tokens.Spelling(model)
    spelling.bytes_of(token)  # b"\\xf0\\x9f" of a token that holds half a character
    spelling.name_of(token)  # "bytes:\\\\xf0\\\\x9f", as OpenAI writes it

Needs labs.py.
"""

from __future__ import annotations

import codecs
import functools
import json
import re
from collections.abc import Iterable
from typing import Any

import msgspec

import labs


class Spelling:
    """The bytes and names of a model's tokens. Special tokens, which text omits, have no bytes."""

    def __init__(self, model: labs.Model) -> None:
        self._model, tokenizer = model, model.tokenizer
        with model.lock:
            self._steps = _steps_of(tokenizer)
            added: dict[int, Any] = getattr(tokenizer, "added_tokens_decoder", {})
            silent: list[int] = [*tokenizer.all_special_ids, *model.eos_token_ids]
        silent += [i for i, token in added.items() if getattr(token, "special", False)]
        self._added = {i: str(token) for i, token in added.items()} | dict.fromkeys(silent, "")

    @property
    def drops_a_space(self) -> bool:
        """Whether decoding removes the space at the start of a text's first token."""
        return bool({"Strip", "Metaspace"} & self._steps)

    def bytes_of(self, token: int) -> bytes:
        """Return the bytes that a token adds to a text; they may end inside a character."""
        if token in self._added:
            return str(self._added[token]).encode(errors="replace")
        with self._model.lock:
            written = str(self._model.tokenizer.convert_ids_to_tokens(token))
            decoded = str(self._model.tokenizer.decode([token]))
        if "ByteLevel" in self._steps and all(char in BYTES for char in written):
            return bytes(BYTES[char] for char in written)
        if byte := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", written):
            return bytes.fromhex(byte[1])
        if "\u2581" in written:  # sentencepiece's space, which decoding a lone token would remove
            return written.replace("\u2581", " ").encode(errors="replace")
        return decoded.encode(errors="replace")

    def name_of(self, token: int, taken: Iterable[str] = ()) -> str:
        """Return a name that is not in `taken`: the token's text, else its bytes, else its id."""
        data = self.bytes_of(token)
        with self._model.lock:
            text = str(self._model.tokenizer.decode([token]))
        shown = data.decode(errors="replace") or text
        escaped = "bytes:" + "".join(f"\\x{byte:02x}" for byte in data or text.encode())
        names = (escaped if "\ufffd" in shown else shown, escaped, f"token_id:{token}")
        return next(name for name in names if name not in taken)


class Places:
    """Find where tokens of one answer begin. `take` must see all; text: what is shown so far."""

    def __init__(self, model: labs.Model) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._model, self._read, self._first, self.text = model, 0, True, ""

    @functools.cached_property
    def spelling(self) -> Spelling:
        return Spelling(self._model)

    def take(self, token: int) -> tuple[int, bytes]:
        """Return where the next token begins in the text, and the bytes that it adds."""
        place, data = self._read, self.spelling.bytes_of(token)
        if not data and self.text.startswith(name := self.spelling.name_of(token), place):
            data = name.encode()  # a special token that is shown
        first, self._first = self._first, self._first and not data
        if first and self.spelling.drops_a_space:
            data = data.removeprefix(b" ")
        self._read += len(self._decoder.decode(data))
        return place, data


def _steps_of(tokenizer: Any) -> set[str]:
    """Return the types of a fast tokenizer's decoders, or an empty set for a slow tokenizer."""
    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    if decoder is None:
        return set()
    found: dict[str, Any] = msgspec.json.decode(decoder.__getstate__())
    return {step["type"] for step in found.get("decoders", [found])}


def _bytes_of_letters() -> dict[str, int]:
    """Return the byte of each letter in a byte-level vocabulary (GPT-2's bytes_to_unicode)."""
    plain = {*range(33, 127), *range(161, 173), *range(174, 256)}
    rest = (byte for byte in range(256) if byte not in plain)
    return {chr(byte): byte for byte in plain} | {chr(256 + n): byte for n, byte in enumerate(rest)}


BYTES = _bytes_of_letters()


def json_fault(data: bytes, error: Exception) -> str:
    """Return why data is not valid JSON, if possible more precisely than msgspec's `error`."""
    try:  # Python's json module is slower, but reports the place
        json.dumps(json.loads(data.decode()), ensure_ascii=False).encode()
    except UnicodeEncodeError as wrong:
        half = ascii(wrong.object[wrong.start]).strip("'")
        return f"it contains a lone surrogate, which is half a character: {half}"
    except (ValueError, RecursionError) as wrong:
        precise = isinstance(wrong, UnicodeDecodeError) or "control character" in str(wrong)
        return str(wrong if precise else error)
    return str(error)
