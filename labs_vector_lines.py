# SPDX-License-Identifier: Apache-2.0
"""Lines of a file that ask for vectors or for the order of documents.

    task.work = labs_vector_lines.work_of(context, task.endpoint, task.body)    # reads its tokens
    for task in labs_vector_lines.with_vectors(tasks): ...                      # task.made

Tasks are those of labs_jsonl.py. Needs labs_kinds.py, labs_request.py and labs_vectors.py.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from typing import Any, Protocol, TypeVar, cast

import labs
import labs_kinds
import labs_request
import labs_vectors

SHARING = 64  # lines whose texts share forward calls


class Task(Protocol):
    """What a line is to this room. work: with the name of its model; made: its answer."""

    work: tuple[str, Any] | None
    made: Any

    def fail(self, error: labs.LabsError) -> None: ...


T = TypeVar("T", bound=Task)


def work_of(
    context: labs_request.Context, endpoint: labs_vectors.Endpoint, body: Any
) -> tuple[str, labs_vectors.Work]:
    """Return the name of the model that a request asks, and its work. Raises LabsError."""
    most = context.config.server.max_prompt_bytes
    kinds = labs_kinds.Kinds(context.config, context.encoder)
    name = kinds.name_of(body.model, endpoint.kind)
    asked = labs_vectors.checked(endpoint.asked(body), most, context.filters)
    return name, labs_vectors.read(endpoint, kinds.model_of(name), asked, context.filters)


def with_vectors(tasks: Iterator[T]) -> Iterator[T]:
    """Yield tasks; those for vectors or scores have their answers, made in shared calls."""
    waiting: list[T] = []
    for task in tasks:
        waiting.append(task)
        if task.work is None or len(waiting) == SHARING:  # no line for text waits for later ones
            yield from _answered(waiting)
            waiting = []
    yield from _answered(waiting)


def _answered(tasks: list[T]) -> list[T]:
    groups: dict[Any, list[T]] = {}
    for task in (task for task in tasks if task.work is not None):
        name, work = cast("Any", task.work)
        groups.setdefault((name, work.key), []).append(task)
    for group in groups.values():
        _compute(group)
    return tasks


def _compute(group: list[T]) -> None:
    """Make the answers of tasks that share a model and its calls, or store the error."""
    works = [(task, *task.work) for task in group if task.work is not None]
    try:
        found = labs_vectors.computed([work for _, _, work in works])
        for (task, name, work), each in zip(works, found, strict=True):
            task.made = work.shape(each, name, secrets.token_hex(12))
    except labs.LabsError as error:
        if len(group) == 1:
            group[0].fail(error)
            return
        for task in group:  # which of them is at fault
            _compute([task])
