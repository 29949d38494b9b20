# SPDX-License-Identifier: Apache-2.0
"""Describe the routes of an API as an OpenAPI document, and that document as a page.

    document = labs_openapi.openapi(table, Error, "1.0", secured=False)     # table: of Route

Needs msgspec, no other file of labs.
"""

from __future__ import annotations

import html
import json
from typing import Any, Literal

import msgspec
from msgspec import Struct


class Route(Struct, frozen=True):
    """A row of the route table, from which Falcon's routes and /openapi.json are made.

    answer: a struct or a content type. streams: the response may also be server-sent events.
    unready: the same response may have the status 503. error: a struct, if it is not the usual one.
    """

    method: Literal["get", "post"]
    path: str
    resource: Any
    summary: str
    answer: Any
    body: Any = None
    suffix: str | None = None
    streams: bool = False
    unready: bool = False
    error: Any = None


def openapi(
    table: tuple[Route, ...], error: type[Struct], version: str, *, secured: bool
) -> dict[str, Any]:
    """Return the OpenAPI 3.1 document of the routes, made from the structs.

    error: the usual struct of an error response. secured: routes need an API key unless public.
    """
    kinds = [route.body for route in table if route.body] + [error]
    kinds += [route.answer for route in table if isinstance(route.answer, type)]
    kinds += [route.error for route in table if route.error]
    reference = "#/components/schemas/{name}"
    _, schemas = msgspec.json.schema_components(dict.fromkeys(kinds), ref_template=reference)
    paths: dict[str, Any] = {}
    for route in table:
        path = route.path.replace(":path", "")
        paths.setdefault(path, {})[route.method] = _operation(route, route.error or error)
    scheme = {"bearer": {"type": "http", "scheme": "bearer"}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "labs", "version": version},
        "paths": paths,
        "components": {"schemas": schemas, "securitySchemes": scheme},
        "security": [{"bearer": []}] if secured else [],
    }


def with_defaults(document: dict[str, Any], name: str, values: dict[str, Any]) -> dict[str, Any]:
    """Return the document with these defaults, such as configured ones, in the schema `name`."""
    known = document["components"]["schemas"][name]
    properties = {
        key: {**each, "default": values[key]} if key in values else each
        for key, each in known["properties"].items()
    }
    schemas = document["components"]["schemas"] | {name: {**known, "properties": properties}}
    return {**document, "components": {**document["components"], "schemas": schemas}}


def _operation(route: Route, error: type[Struct]) -> dict[str, Any]:
    def content(kind: Any) -> dict[str, Any]:
        if isinstance(kind, str):
            return {kind: {}}
        schema = {"$ref": f"#/components/schemas/{kind.__name__}"}
        return {"application/json": {"schema": schema}}

    answer = content(route.answer)
    if route.streams:
        answer |= content("text/event-stream")
    refused = {"description": "Refused", "content": content(error)}
    found: dict[str, Any] = {
        "summary": route.summary,
        "responses": {"200": {"description": "Done", "content": answer}, "default": refused},
    }
    if route.unready:
        found["responses"]["503"] = {"description": "Not ready", "content": content(route.answer)}
    if route.body is not None:
        found["requestBody"] = {"required": True, "content": content(route.body)}
    if "{" in route.path:
        string = {"type": "string", "minLength": 1}
        found["parameters"] = [{"name": "name", "in": "path", "required": True, "schema": string}]
    if route.resource.public:
        found["security"] = []
    return found


def docs(document: dict[str, Any]) -> str:
    """Return the OpenAPI document as one HTML page."""
    routes = [
        f"<dt>{method.upper()} {html.escape(path)}</dt><dd>{html.escape(operation['summary'])}</dd>"
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
    ]
    schemas = html.escape(json.dumps(document["components"]["schemas"], indent=2))
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>labs API</title>'
        "<style>:root{color-scheme:light dark}body{font:16px/1.5 system-ui;max-width:50rem;"
        "margin:2rem auto;padding:0 1rem}dt{font-weight:600}</style><h1>labs API</h1>"
        f'<p><a href="openapi.json">openapi.json</a></p><dl>{"".join(routes)}</dl>'
        f"<h2>Schemas</h2><pre>{schemas}</pre>"
    )
