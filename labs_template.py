# SPDX-License-Identifier: Apache-2.0
"""Give messages to a chat template in the form that it reads: content as text, or as parts.

    messages = labs_template.as_read(tokenizer, messages)
    labs_template.use(tokenizer, "mine.jinja")  # a chat template of one's own

Needs labs_settings.py.
"""

from __future__ import annotations

import contextlib
import itertools
import re
import weakref
from pathlib import Path
from typing import Any, Literal

from labs_settings import ConfigError

Form = Literal["text", "parts"]
# {tokenizer: {(template, role): form}}; weak, so that a tokenizer is freed with its model.
_FOUND: weakref.WeakKeyDictionary[Any, dict[tuple[str, str], Form | None]]
_FOUND = weakref.WeakKeyDictionary()
MOST_BYTES = 2**20  # the longest in use have 20,000
MARK = "zebra"  # a word that no template contains
TALKS = {
    "user": (("user",), ("system", "user"), ("user", "assistant", "user")),
    "system": (("system", "user"), ("system", "user", "assistant", "user")),
    "assistant": (("user", "assistant", "user"), ("user", "assistant")),
}


def use(tokenizer: Any, file: str) -> None:
    """Give a tokenizer the chat template in a file, in place of all its own.

    Raises ConfigError for a file that is no UTF-8 text, too long, not jinja or reads no user.
    """
    from jinja2 import TemplateSyntaxError

    wrong = None
    try:
        with Path(file).expanduser().open("rb") as stream:
            text = tokenizer.chat_template = stream.read(MOST_BYTES + 1).decode("utf-8-sig")
        wrong = f"has more than {MOST_BYTES} bytes" if len(text.encode()) > MOST_BYTES else None
        tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
        if wrong is None and content_form(tokenizer, text, "user") is None:
            wrong = "it leaves out the content of user messages"
    except (OSError, UnicodeDecodeError) as error:
        wrong = f"cannot be read: {getattr(error, 'strerror', None) or error}"
    except TemplateSyntaxError as error:
        wrong = f"line {error.lineno} is not valid jinja: {error.message}"
    except Exception:  # it may want other messages; if not, the real ones show it
        pass
    if wrong:
        raise ConfigError(f"chat_template = {file}: {wrong}")


def as_read(tokenizer: Any, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return messages with the content as text or, if the chat template reads only those, parts.

    Raises ValueError when the template leaves out the content of a role in both forms.
    """
    template = tokenizer.get_chat_template()
    roles = {each["role"] for each in messages} & TALKS.keys()  # results of tools are texts
    forms = {role: content_form(tokenizer, template, role) for role in roles}
    if left_out := [role for role, form in forms.items() if form is None]:
        raise ValueError(f"it leaves out the content of {left_out[0]} messages")
    return [{**m, "content": _content(m["content"], forms.get(m["role"]))} for m in messages]


def _content(text: str, form: str | None) -> Any:
    return [{"type": "text", "text": text}] if form == "parts" else text


def content_form(tokenizer: Any, template: str, role: str) -> Form | None:
    """Return the form of content that a chat template reads for a role, or None if it reads none.

    It is "text" also if the template fails at every trial; then the real messages show the error.
    """
    found = _FOUND.setdefault(tokenizer, {})
    if (template, role) not in found:
        found[template, role] = _form_of(tokenizer, template, role)
    return found[template, role]


def _form_of(tokenizer: Any, template: str, role: str) -> Form | None:
    forms: tuple[Form, ...] = ("text", "parts")
    rendered = False
    for form, others, talk in itertools.product(forms, forms, TALKS[role]):
        at = len(talk) - 1 - talk[::-1].index(role)  # the last of that role
        contents = [_content("yes", others)] * at + [_content(MARK, form)]
        contents += [_content("yes", others)] * (len(talk) - len(contents))
        turns = [{"role": r, "content": c} for r, c in zip(talk, contents, strict=True)]
        with contextlib.suppress(Exception):  # templates raise anything
            text = tokenizer.apply_chat_template(turns, chat_template=template, tokenize=False)
            rendered = True
            if MARK in text.lower() and not re.search(rf"text[\"']: *[\"']{MARK}", text):
                return form
    return None if rendered else "text"
