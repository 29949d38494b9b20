# SPDX-License-Identifier: Apache-2.0
"""Generate the answers in a file again and compare them.

    for verdict in labs_replay.replay(model, context, enumerate(lines, 1)): ...

labs-gen replay shows it. A request and its fingerprint are in each line of answers, which
labs_jsonl.py wrote. Needs labs.py, labs_jsonl.py and labs_request.py.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import msgspec
from msgspec import UNSET, Struct
from msgspec.structs import asdict, replace

import labs
import labs_jsonl
import labs_ready
import labs_request


class Verdict(Struct, frozen=True):
    """How a new answer compares with the old one. token: the first that differs, from 1."""

    id: str | int
    verdict: Literal["same", "differs", "not comparable"]
    token: int | None = None
    why: str | None = None


def replay(
    model: labs.Model,
    context: labs_request.Context,
    lines: labs_jsonl.Lines,
    batch_rows: int | None = None,
) -> Iterator[Verdict]:
    """Generate answers again with the settings of their fingerprints; yield verdicts in order."""
    answers: dict[int, labs_jsonl.OldAnswer] = {}

    def tasks() -> Iterator[labs_jsonl.Task]:
        filled = (pair for pair in lines if pair[1].strip())
        for order, (number, data) in enumerate(filled):
            answers[order], task = _task_of(number, data)
            task.order = order
            labs_jsonl.prepare(model, context, task)
            task.prepared = task.prepared and _with_tokens(task.prepared)
            yield task

    plain = replace(context, filters=None)  # an answer that they changed is not comparable
    how = labs_jsonl.Batching(rows=batch_rows, ordered=True)
    for task in labs_jsonl.complete(model, plain, tasks(), how):
        yield _compare(model, answers.pop(task.order), task)


def with_their_weights(config: labs.Config, answer: bytes) -> labs.Config:
    """Return a configuration whose weights have the form that made an answer, a line of a file.

    What the configuration itself says of weights stays.
    """
    with contextlib.suppress(labs.LabsError):  # a line that is no answer is reported later
        if old := labs_jsonl.read_answer(answer, "").fingerprint:
            return labs_request.with_weights(config, **old.quantization)
    return config


def _with_tokens(prepared: labs_request.Prepared) -> labs_request.Prepared:
    """Ask for log-probabilities, which come with token ids; none come beside calls or reasoning."""
    generation = replace(prepared.generation, logprobs=0)
    return replace(prepared, generation=generation)


def _task_of(number: int | str, data: bytes) -> tuple[labs_jsonl.OldAnswer, labs_jsonl.Task]:
    """Return the answer in a line and the task that it answers."""
    task, old = labs_jsonl.Task(number), labs_jsonl.OldAnswer()
    try:
        old = labs_jsonl.read_answer(data, f"line {number}")
        task.id = number if old.name is None else old.name
        said = _said(old)
        if (old.request or {}).get("url") in labs_jsonl.VECTORS:
            raise labs.InputError("vectors and scores are not made again")
        if not said:
            raise labs.InputError("the old answer is an error")
        if old.fingerprint is None or old.request is None:
            raise labs.InputError("the line does not hold its request and fingerprint")
        if old.finish_reason in labs_jsonl.UNFINISHED:
            raise labs.InputError(f"the old answer was cut ({old.finish_reason})")
        _restore_request(task, old.request, old.fingerprint.generation)
        if len(said) != len(task.request.prompts) * task.request.n:
            raise labs.InputError("the line is damaged: it lacks choices")
    except labs.LabsError as error:
        task.fail(error)
    except (msgspec.ValidationError, LookupError, TypeError, AttributeError) as error:
        task.fail(labs.InputError(f"the line is damaged: {error}"))
    return old, task


def _restore_request(
    task: labs_jsonl.Task, repeated: dict[str, Any], generation: labs.Generation
) -> None:
    """Set the request that an answer repeats, without its time limit and log-probabilities."""
    if "url" not in repeated:
        task.request = labs_request.request_of(msgspec.convert(repeated, labs_jsonl.Line), {})
    else:
        labs_jsonl.read_body(task, repeated["url"], msgspec.json.encode(repeated["body"]))
        task.seeds = labs_jsonl.count_seeds(task.request)
    options = {**asdict(generation), "timeout_s": None, "logprobs": None}
    documents = bool(repeated.get("documents"))
    task.request = replace(task.request, model=None, options=options, documents=documents)


class Said(Struct, frozen=True):
    """What an answer says. calls: names and arguments, without ids, which are drawn anew."""

    text: str
    reasoning: str = ""
    calls: tuple[tuple[str, Any], ...] = ()


def _said(old: labs_jsonl.OldAnswer) -> list[Said]:
    """Return what each choice of an old answer says. An error has none."""
    if old.response is UNSET:
        text = old.text
        return [_said_in(text, old.reasoning, old.tool_calls)] if isinstance(text, str) else []
    body, found = (old.response or {}).get("body", {}), list[Said]()
    if "output" in body:
        found.append(_said_by_items(body["output"]))
    for choice in body.get("choices", ()):
        message = choice if "text" in choice else choice["message"]
        content = message["text"] if "text" in message else message["content"]
        calls = msgspec.convert(message.get("tool_calls", ()), tuple[labs.ToolCall, ...])
        thoughts = message.get("reasoning_content", "")
        none = "" if calls or thoughts else None  # a content that is missing is damage
        found.append(_said_in(none if content is None else content, thoughts, calls))
    return msgspec.convert(msgspec.to_builtins(found), list[Said])


def _said_by_items(output: list[dict[str, Any]]) -> Said:
    """Return what the items of a response of /v1/responses say."""
    texts, calls = {"message": "", "reasoning": ""}, []
    for item in output:
        if item["type"] == "function_call":
            calls.append((item["name"], msgspec.json.decode(item["arguments"])))
        else:
            texts[item["type"]] += "".join(part["text"] for part in item["content"])
    return Said(texts["message"], texts["reasoning"], tuple(calls))


def _said_now(new: labs_ready.Found) -> Said:
    return _said_in(new.text, getattr(new, "reasoning", ""), getattr(new, "tool_calls", ()))


def _said_in(text: Any, reasoning: str, calls: Iterable[labs.ToolCall]) -> Said:
    pairs = ((each.function.name, msgspec.json.decode(each.function.arguments)) for each in calls)
    return Said(text, reasoning, tuple(pairs))


def _compare(model: labs.Model, old: labs_jsonl.OldAnswer, task: labs_jsonl.Task) -> Verdict:
    if task.error is not None:
        return Verdict(task.id, "not comparable", why=str(task.error))
    now = [task.found[place] for place in sorted(task.found)]
    pairs = [*zip(_said(old), now, strict=True)]
    if all(then == _said_now(new) for then, new in pairs):
        return Verdict(task.id, "same")
    places = [at for then, new in pairs if (at := _differs_at(model, then.text, new)) is not None]
    why = _difference(old.fingerprint, now[0].fingerprint)
    if not (why or model.decoder.invariant or model.dtype == "fp32"):
        why = f"in {model.dtype} this model's text depends on the other rows of the batch"
    return Verdict(
        task.id, "not comparable" if why else "differs", min(places, default=None), why or None
    )


def _differs_at(model: labs.Model, old: str, new: labs_ready.Found) -> int | None:
    """Return the number of the first new token that differs from the old text, or None.

    None too where the tokens are not known, which is so beside calls and reasoning.
    """
    if old == new.text or not new.logprobs:
        return None
    pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(old, new.text, strict=False))
    common, length, text = len(list(pairs)), 0, labs.PartialText()
    for number, each in enumerate(new.logprobs, 1):
        length += len(labs.decode_next(model.tokenizer, text, each.token))
        if length > common or each.token in model.eos_token_ids:
            return number
    return len(new.logprobs) + 1


def _difference(old: labs.Fingerprint | None, new: labs.Fingerprint | None) -> str:
    """Describe what changed. A new name of the model counts only with a new revision."""
    before, after = _flat(old), _flat(new)
    names = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    dropped = "revision" if {"model", "revision"} <= {*names} else "model"
    names = [name for name in names if name != dropped]
    return ", ".join(f"{name} was {before.get(name)}, is {after.get(name)}" for name in names)


def _flat(fingerprint: labs.Fingerprint | None) -> dict[str, Any]:
    found = asdict(fingerprint) if fingerprint else {}
    found |= found.pop("versions", {})
    return {**found, "generation": None}
