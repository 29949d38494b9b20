# SPDX-License-Identifier: Apache-2.0
"""Serve the pages for browsers: the chat page, the OpenAPI document and the API reference.

No page loads anything from another server. Needs labs_openapi.py, labs_pages.py, falcon and
msgspec.
"""

from __future__ import annotations

import base64
import hashlib
import re
from typing import Any

import falcon
import msgspec

import labs_openapi
import labs_pages


class StaticPage:
    """A resource with constant content, for which no API key is needed."""

    public = True

    def __init__(self, data: bytes, content_type: str, policy: str = "default-src 'none'") -> None:
        self._data, self._type, self._policy = data, content_type, policy

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        path = req.env.get("PATH_INFO", "")  # links in a page are relative to its exact path
        if not path or path.rstrip("/") not in (path, ""):
            raise falcon.HTTPMovedPermanently(f"{req.root_path}{req.path}")
        resp.data, resp.content_type = self._data, self._type
        resp.set_header("Content-Security-Policy", self._policy)
        resp.set_header("Referrer-Policy", "no-referrer")


def policy_of(page: str) -> str:
    """Return a Content-Security-Policy that allows only the page's inline style and script."""
    sources = []
    for kind, inner in re.findall(r"<(style|script)>(.*?)</\1>", page, re.DOTALL):
        digest = base64.b64encode(hashlib.sha256(inner.encode()).digest()).decode()
        sources.append(f"{kind}-src 'sha256-{digest}'; ")
    rest = "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    return f"default-src 'none'; {''.join(sources)}connect-src 'self'; img-src data:; {rest}"


def pages(document: dict[str, Any]) -> dict[str, StaticPage]:
    """Return the pages by path. document: from `openapi`."""
    found = {"/openapi.json": StaticPage(msgspec.json.encode(document), "application/json")}
    for path, page in (("/docs", labs_openapi.docs(document)), ("/", labs_pages.PAGE)):
        found[path] = StaticPage(page.encode(), "text/html; charset=utf-8", policy_of(page))
    return found
