# SPDX-License-Identifier: Apache-2.0
"""The list of models as Anthropic's clients read it, in pages.

    models = [labs_message_models.model_of(name, created, 8192)]
    page = labs_message_models.page_of(models, {"limit": "5"})  # raises Refusal for another query

Needs labs_request.py.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from msgspec import Struct

from labs_request import Refusal

QUERY = ("limit", "after_id", "before_id", "lifecycle", "lifecycle[]", "beta")  # as clients send


class ModelInfo(Struct, frozen=True, kw_only=True, tag_field="type", tag="model"):
    id: str
    display_name: str
    created_at: str
    lifecycle: Literal["active"] = "active"
    max_input_tokens: int | None = None


class ModelPage(Struct, frozen=True, kw_only=True):
    data: tuple[ModelInfo, ...]
    has_more: bool
    first_id: str | None
    last_id: str | None


def model_of(name: str, created: int, context_length: int | None) -> ModelInfo:
    """Return a model in Anthropic's format. created: in seconds since 1970."""
    when = datetime.datetime.fromtimestamp(created, datetime.UTC)
    return ModelInfo(
        id=name,
        display_name=name,
        created_at=when.strftime("%Y-%m-%dT%H:%M:%SZ"),
        max_input_tokens=context_length,
    )


def page_of(models: Sequence[ModelInfo], query: Mapping[str, Any]) -> ModelPage:
    """Return a page of models, all of which are active. Raises Refusal for an unknown query."""
    if unknown := next((name for name in query if name not in QUERY), None):
        raise Refusal(f"the query has {unknown!r:.80}; use {', '.join(QUERY)}", "invalid_value")
    given = query.get("lifecycle[]", query.get("lifecycle", "active"))
    models = models if "active" in ([given] if isinstance(given, str) else given) else ()
    limit = query.get("limit", "20")
    if not (isinstance(limit, str) and re.fullmatch("[1-9][0-9]{0,2}|1000", limit)):
        raise Refusal(f"limit = {limit!r:.80}: use 1 to 1000", "invalid_value", "limit")
    after, before = (_place(models, query, name) for name in ("after_id", "before_id"))
    last = len(models) if before is None else before
    first = 0 if after is None else after + 1
    first = first if before is None else max(first, last - int(limit))
    found = tuple(models[first : min(last, first + int(limit))])
    return ModelPage(
        data=found,
        has_more=first + len(found) < last if before is None else first > 0,
        first_id=found[0].id if found else None,
        last_id=found[-1].id if found else None,
    )


def _place(models: Sequence[ModelInfo], query: Mapping[str, Any], name: str) -> int | None:
    names, given = [model.id for model in models], query.get(name)
    if given is not None and given not in names:
        raise Refusal(f"{name} = {given!r:.80}: no model has it", "invalid_value", name)
    return None if given is None else names.index(given)
