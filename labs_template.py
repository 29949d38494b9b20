# SPDX-License-Identifier: Apache-2.0
"""What a chat template reads: the content of a message as text, or as a list of parts.

    messages = labs_template.as_read(tokenizer, messages)

Needs no other file of labs.
"""

from __future__ import annotations

import contextlib
import itertools
import re
import weakref
from typing import Any, Literal

Form = Literal["text", "parts"]
# By (template, role); weak, because a tokenizer goes with its model.
_FOUND: weakref.WeakKeyDictionary[Any, dict[tuple[str, str], Form | None]]
_FOUND = weakref.WeakKeyDictionary()
MARK = "zebra"  # a word that no template says itself
TALKS = {
    "user": (("user",), ("system", "user"), ("user", "assistant", "user")),
    "system": (("system", "user"), ("system", "user", "assistant", "user")),
    "assistant": (("user", "assistant", "user"), ("user", "assistant")),
}


def as_read(tokenizer: Any, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return messages whose content is text or, where the chat template reads only those, parts.

    Raises ValueError where the template leaves out what a role says in either form.
    """
    template = tokenizer.get_chat_template()
    forms = {each["role"]: content_form(tokenizer, template, each["role"]) for each in messages}
    if left_out := [role for role, form in forms.items() if form is None]:
        raise ValueError(f"it leaves out what a message of the {left_out[0]} says")
    return [{**each, "content": _said(each["content"], forms[each["role"]])} for each in messages]


def _said(text: str, form: str | None) -> Any:
    return [{"type": "text", "text": text}] if form == "parts" else text


def content_form(tokenizer: Any, template: str, role: str) -> Form | None:
    """Return in which form a chat template reads what a role says, None where it says it in none.

    "text" also where it renders nothing that is tried: the messages themselves will tell.
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
        said = [_said("yes", others)] * at + [_said(MARK, form)]
        said += [_said("yes", others)] * (len(talk) - len(said))
        turns = [{"role": r, "content": content} for r, content in zip(talk, said, strict=True)]
        with contextlib.suppress(Exception):  # templates raise anything
            text = tokenizer.apply_chat_template(turns, chat_template=template, tokenize=False)
            rendered = True
            if MARK in text.lower() and not re.search(rf"text[\"']: *[\"']{MARK}", text):
                return form
    return None if rendered else "text"
