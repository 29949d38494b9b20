# SPDX-License-Identifier: Apache-2.0
"""Answer one prompt at the shell: what is written where.

    session = labs_shell.Session(context, asked, model, True, False, 0.0)
    for part in labs_shell.answer(session, labs_request.check(context, asked)): ...

The answer goes to standard output and everything else to standard error. Needs labs_request.py and
labs_explain.py with what those need, labs_flags.py, click.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Generator, Iterator
from typing import Any, NamedTuple

import click
import msgspec

import labs
import labs_explain
import labs_flags
import labs_ready
import labs_request
import labs_terminal

Messages = list[labs.Message]
tell = labs_terminal.tell


class Session(NamedTuple):
    """What the answers of one run share. asked: the request of the flags, before filters.

    chat: whether they are answers of a chat, on a terminal with frames around code and calls.
    """

    context: labs_request.Context
    asked: labs_request.Request
    model: labs.Model
    stream: bool
    verbose: bool
    imports_s: float
    chat: bool = False


def for_one_stream(config: labs.Config) -> labs.Config:
    """Let a GGUF file keep its 4 or 8 bits, with which a single stream is faster."""
    return labs_request.with_weights(config, quant_method="gguf")


def write(text: str) -> None:
    """Write a piece of the answer and flush it. Raises ClickException when that fails.

    A terminal gets no control characters; a pipe or file gets the text as it is.
    """
    try:
        sys.stdout.write(labs_terminal.shown(text, sys.stdout))
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has closed the pipe, which is not a failure
        raise click.exceptions.Exit(0) from None
    except OSError as exc:
        raise click.ClickException(f"standard output: {exc.strerror}") from exc


def prepare(session: Session, request: labs_request.Request) -> labs_request.Prepared:
    """Build the inputs of a checked request."""
    context = session.context
    return labs_request.prepare(context, context.config, session.model, request)


def tell_sources(prepared: labs_request.Prepared) -> None:
    """Report which passages of documents are in a prompt."""
    for source in prepared.sources or ():
        tell(f"[{source.n}] {source.path}" + (f"#{source.heading}" if source.heading else ""))


def parts_of(session: Session, prepared: labs_request.Prepared) -> Generator[Any]:
    """Yield the parts of one answer after the filters have changed them."""
    (ready,) = prepared.answers()
    take, only = ready.shown(session.context.filters), ready.processors()
    inputs, generation = ready.inputs, ready.generation
    events: Any = labs.stream_generate(session.model, inputs, generation, processors=only)
    tell_sources(prepared)  # now the prompt fits: a chat that is too long tries again with less
    with contextlib.closing(events):
        for part in itertools.chain.from_iterable(map(take, events)):
            yield part
            if isinstance(part, labs.Done):  # a filter may end the answer before the model does
                return


class Paper:
    """Writes the parts of one answer: its text, then each call as a line of JSON.

    stream: whether text is written as it comes. framed: whether code and calls get frames.
    Reasoning goes to standard error.
    """

    def __init__(self, stream: bool, framed: bool = False) -> None:
        self._stream, self._thinks = stream, False
        self._frames = labs_terminal.Frames() if framed else None
        self._texts, self._calls = list[str](), list[str]()
        self._begun: Any = None

    def __call__(self, part: Any) -> None:
        kind = kind_of(part)
        if self._thinks and kind != "reasoning":
            tell()
        self._thinks = kind == "reasoning"
        if kind == "reasoning":
            tell(part.text, nl=False, dim=True)
        elif kind == "delta":
            self._texts.append(part.text)
            write(self._shown(part.text) if self._stream else "")
        elif kind == "call":
            self._begun = part
        elif kind == "arguments":
            self._calls.append(self._call(part.text))
        elif kind == "done":
            text = "" if self._stream else self._shown("".join(self._texts))
            end = "\n" if self._texts or not self._calls else ""
            write("".join([text, self.rest(), end, *self._calls]))

    def rest(self) -> str:
        """Return what is to be written after the last piece of text."""
        return "" if self._frames is None else self._frames.end()

    def _shown(self, text: str) -> str:
        return text if self._frames is None else self._frames.feed(text)

    def _call(self, arguments: str) -> str:
        begun = self._begun
        if self._frames is not None:
            return labs_terminal.card(begun.name, arguments) + "\n"
        function = labs.FunctionCall(name=begun.name, arguments=arguments)
        call = labs.ToolCall(id=begun.id, function=function)
        return msgspec.json.encode(call).decode() + "\n"


def kind_of(part: Any) -> str:
    """Return the tag of a part; labs_parts.py, which has some of them, may be absent."""
    return str(part.__struct_config__.tag)


def answer(session: Session, request: labs_request.Request) -> Iterator[Any]:
    """Write the answer, streamed or in one piece, and yield its parts."""
    prepared = prepare(session, request)
    paper = Paper(session.stream, framed=session.chat and sys.stdout.isatty())
    with contextlib.closing(parts_of(session, prepared)) as parts:
        try:
            for part in parts:
                yield part
                paper(part)
                if isinstance(part, labs.Done):
                    report(session, part)
        finally:
            if rest := paper.rest():  # of an answer that was stopped
                write(rest)


def answer_json(session: Session, request: labs_request.Request) -> None:
    """Write one JSON object: the completion, its request and all settings."""
    config, prepared = session.context.config, prepare(session, request)
    (ready,) = prepared.answers()
    inputs, generation, only = ready.inputs, ready.generation, ready.processors()
    tell_sources(prepared)
    events = labs.stream_generate(session.model, inputs, generation, processors=only)
    completion = ready.whole(session.context.filters, [*events])
    found = labs_ready.fields_of(completion)
    (prompt,) = session.asked.prompts
    repeated: labs_flags.Values = {"prompt": prompt.prompt, "messages": prompt.messages}
    if prompt.tools:
        repeated |= {"tools": prompt.tools, "tool_choice": request.tool_choice}
    repeated = {name: value for name, value in repeated.items() if value is not None}
    chat = {name: getattr(config, name) for name in labs.Chat.__struct_fields__}
    repeated |= {name: value for name, value in chat.items() if value != {}}
    repeated["response_format"] = request.response_format
    if request.structured_outputs is not None:
        repeated["structured_outputs"] = request.structured_outputs
    settings = {s.key: labs_explain.value_of(config, s) for s in labs_flags.SETTINGS}
    result = {"model": config.model_id, **found, "request": repeated, "settings": settings}
    if prepared.sources is not None:
        repeated["documents"], result["documents"] = True, prepared.sources
    write(msgspec.json.encode(result).decode() + "\n")
    report(session, completion)


def choose(
    session: Session, request: labs_request.Request, options: tuple[str, ...], as_json: bool
) -> None:
    """Write the probability of each option, the most likely one first."""
    import labs_typed

    prepared = prepare(session, request)
    tell_sources(prepared)
    (inputs,) = prepared.inputs
    found = labs_typed.choose(session.model, inputs, options)
    ranked = dict(sorted(found.items(), key=lambda each: -each[1]))
    lines = [f"{chance:.4f} {option}" for option, chance in ranked.items()]
    write(msgspec.json.encode(ranked).decode() + "\n" if as_json else "\n".join([*lines, ""]))


def explain(session: Session, request: labs_request.Request) -> None:
    """Write the prompt as the model reads it, and how the request would run."""
    config, prepared = session.context.config, prepare(session, request)
    tell_sources(prepared)
    (ready,), generation = prepared.answers(), prepared.generation
    plan = labs_explain.explain(session.model, ready.inputs, generation, config.sources)
    write(labs_explain.described(msgspec.structs.replace(plan, model=config.model_id)))


def report(session: Session, done: Any) -> None:
    """Report whether a limit cut the answer and, with --verbose, how long each part took."""
    limit = {"length": "max_new_tokens", "timeout": "timeout_s"}.get(done.finish_reason)
    if limit and (session.verbose or sys.stderr.isatty()):
        way = f"/settings {limit}=" if session.chat else f"--{limit.replace('_', '-')}"
        tell(f"[the answer was cut; {way} sets the limit]")
    if done.finish_reason == "content_filter":
        tell("[a rule of [guard] cut the answer]")
    if session.verbose:
        counts, times = map(msgspec.structs.asdict, (done.usage, done.timings))
        figures = {**counts, "imports_s": session.imports_s, **times}
        del figures["response_cached"], figures["queue_s"]  # only a server sets these
        tell(f"[{', '.join(f'{name} {value:.4g}' for name, value in figures.items())}]")
