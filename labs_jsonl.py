# SPDX-License-Identifier: Apache-2.0
"""Answer files of prompts, one JSON object per line.

    {"id": "a", "prompt": "Name a river.", "max_new_tokens": 8}          any field of a request
    {"custom_id": "b", "method": "POST", "url": "/v1/chat/completions", "body": {...}}   OpenAI's

`answer_file` runs labs-gen batch: the lines share one decode batch, each answer is appended as a
whole line, and the same call again continues where it stopped. `answer_lines` needs no files.
labs_replay.py generates the answers again. Needs labs.py, labs_request.py, labs_openai.py for
OpenAI's lines, and tqdm for files.
"""

from __future__ import annotations

import codecs
import contextlib
import hashlib
import itertools
import os
import secrets
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import msgspec
from msgspec import UNSET, Struct, UnsetType, field
from msgspec.structs import replace

import labs
import labs_names
import labs_progress
import labs_ready
import labs_request

open_context = labs_request.open_context  # called once per run
UNFINISHED = {"timeout", "cancelled"}  # the same request may end differently in another run
RESPONSES = "/v1/responses"  # the url of labs_responses.py
VECTORS = ("/v1/embeddings", "/v1/rerank")  # of labs_vectors.py
WINDOW = 1024  # lines that are sorted by length: rows of similar length share a batch well

Lines = Iterable[tuple[int | str, bytes]]  # (number, line); a line without an id has its number
Answer = Callable[[Lines], Iterable[bytes]]


class Line(labs_request.GenerateRequest, frozen=True, kw_only=True):
    id: str | int | None = None


class OpenAILine(Struct, frozen=True, forbid_unknown_fields=True):
    """https://platform.openai.com/docs/guides/batch"""

    custom_id: str
    method: str
    url: str
    body: msgspec.Raw


class Batching(Struct, frozen=True, kw_only=True):
    """How many rows run at once, and whether answers come in the order of the lines."""

    rows: int | None = None  # None: as many as memory allows
    ordered: bool = False


class Task(Struct, eq=False):
    """One line and the completions of its rows.

    order: its position in the run. line: its number in the file. repeated: the request as its
    answer repeats it. endpoint and body: of OpenAI's API. seeds: number of rows whose seeds
    differ. missing: rows that have not ended. work: of a request for vectors or scores, with the
    name of its model. made: the answer to it, which needs no row.
    """

    id: str | int
    request: labs_request.Request = labs_request.Request(prompts=())
    repeated: dict[str, Any] = field(default_factory=dict)
    seeds: int = 1
    openai: bool = False
    endpoint: Any = None
    body: Any = None
    order: int = 0
    line: int | str = 0
    prepared: labs_request.Prepared | None = None
    events: dict[int, list[labs.Event]] = field(default_factory=dict)
    found: dict[int, labs_ready.Found] = field(default_factory=dict)
    error: labs.LabsError | None = None
    missing: int = 1
    work: tuple[str, Any] | None = None
    made: Any = None

    @property
    def length(self) -> int:
        """Return the number of tokens of the longest prompt."""
        inputs = self.prepared.inputs if self.prepared else ()
        return max((len(each.input_ids) for each in inputs), default=0)

    def fail(self, error: labs.LabsError) -> None:
        """Store the first error, without its traceback."""
        self.error = self.error or error.with_traceback(None)

    def ready(self, place: int) -> labs_ready.Ready:
        """Return the answer of the row with this number."""
        if self.prepared is None:
            raise self.error or labs.InputError("the line was not prepared")
        return self.prepared.ready(place // self.prepared.request.n, place % self.seeds)

    def take(self, place: int, event: labs.Event, context: labs_request.Context) -> None:
        """Record an event of the row with this number, and its answer after the last one."""
        self.events.setdefault(place, []).append(event)
        if self.made is not None:
            self.missing -= 1
            return
        if isinstance(event, labs.Delta):
            return
        events, self.missing = self.events.pop(place), self.missing - 1
        try:
            if isinstance(event, labs.Failed):
                raise event.error
            self.found[place] = self.ready(place).whole(context.filters, events)
        except labs.LabsError as error:  # of the row, or of the prompt's log-probabilities
            self.fail(error)


# ---------------------------------------------------------------- lines in


def read_task(config: labs.Config, data: bytes, number: int | str) -> Task:
    """Read one line. If it cannot be used, the task has an error.

    Its id is its number N by default, "line N" if an id cannot be read: N may be another's id.
    """
    task, most = Task(f"line {number}"), config.server.max_body_bytes
    try:
        if len(data.rstrip(b"\r\n")) > most:
            raise labs.InputError(f"the line has more than server_max_body_bytes = {most} bytes")
        if not data.lstrip().startswith(b"{"):
            raise labs.InputError('the line is not a JSON object, as {"prompt": "Hi"} is')
        given = msgspec.json.decode(data)
        openai = "custom_id" in given
        identity = given.get("custom_id" if openai else "id")
        if identity is None or type(identity) in (str, int):  # bool is an int
            task.id = number if identity is None else identity
        _read_openai(config, data, task) if openai else _read_line(config, data, given, task)
    except labs.LabsError as error:
        task.fail(error)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        task.fail(labs.InputError(f"the line cannot be used: {_fault(data, error)}"))
    return task


def _fault(data: bytes, error: Exception) -> str:
    with contextlib.suppress(labs.ConfigError):  # labs_tokens.py is absent
        labs.require("labs_tokens")
        import labs_tokens

        return labs_tokens.json_fault(data, error)
    return str(error)


def _read_line(config: labs.Config, data: bytes, given: dict[str, Any], task: Task) -> None:
    line = msgspec.json.decode(data, type=Line)
    _check_model(config, line.model)
    task.request = labs_request.request_of(line, given)
    prompt = labs_request.filled(task.request.prompts[0], config)
    repeated = {
        "prompt": line.prompt,
        "messages": line.messages,
        "response_format": line.response_format,
        "structured_outputs": line.structured_outputs,
        "tools": line.tools or None,
        "tool_choice": line.tool_choice,
        "parallel_tool_calls": line.parallel_tool_calls,
        **{name: getattr(prompt, name) for name in labs.Chat.__struct_fields__},
        "documents": config.documents.apply(line.documents) or None,
    }
    task.repeated = {k: v for k, v in repeated.items() if v is not None and v != {}}


def _read_openai(config: labs.Config, data: bytes, task: Task) -> None:
    labs.require("labs_openai", "labs_protocol")
    task.openai = True
    line = msgspec.json.decode(data, type=OpenAILine)
    if line.method != "POST":
        raise labs.InputError(f"unknown request {line.method} {line.url}; use POST")
    read_body(task, line.url, bytes(line.body))
    if hasattr(task.endpoint, "asked"):  # for vectors or scores: `prepare` finds the model
        task.repeated = {"url": line.url, "body": line.body}
        return
    _check_model(config, task.body.model)
    if task.body.stream:
        raise labs_request.Refusal("a file cannot hold a stream", "unsupported", "stream")
    request = task.request
    documents = {"documents": True} if config.documents.apply(request.documents) else {}
    task.repeated = {"url": line.url, "body": line.body, **documents}
    task.seeds = count_seeds(request)
    if task.seeds > 1 and request.options.get("seed", config.generation.seed) is None:
        drawn = {"seed": secrets.randbits(32)}  # replay can repeat one seed, not one per choice
        task.request = replace(request, options=request.options | drawn)


def read_body(task: Task, url: str, data: bytes) -> None:
    """Set the request of a task from the body of an HTTP request. Raises InputError."""
    labs.require("labs_openai", "labs_protocol")
    import labs_openai
    import labs_protocol

    endpoint: labs_protocol.Endpoint | None = labs_openai.ENDPOINTS.get(url)
    if url == RESPONSES:
        labs.require("labs_responses")
        import labs_responses

        endpoint = labs_responses.RESPONSES
    if url in VECTORS:
        labs.require("labs_vectors")
        import labs_vectors

        endpoint = labs_vectors.ENDPOINTS[url]
    if endpoint is None:
        known = ", ".join((*labs_openai.ENDPOINTS, RESPONSES, *VECTORS))
        raise labs.InputError(f"unknown url {url!r:.80}; use one of {known}")
    task.endpoint = endpoint
    task.body, given = labs_protocol.read(data, endpoint.body, endpoint.fields)
    if url not in VECTORS:
        task.request = endpoint.request_of(task.body, given)


def count_seeds(request: labs_request.Request) -> int:
    """Return how many rows get different seeds: with a seed, only the choices of one prompt."""
    return request.n * (1 if "seed" in request.options else len(request.prompts))


def _check_model(config: labs.Config, name: str | None) -> None:
    own = {config.model_id: config}
    if name is not None and labs_names.find(name, own) is None:
        raise labs.InputError(f"unknown model {name!r}; this run uses {config.model_id} (--model)")


def _tasks(
    model: labs.Model | None, context: labs_request.Context, lines: Lines, tally: Tally
) -> Iterator[Task]:
    """Yield a prepared task for each line that has no answer yet."""
    order, seen = itertools.count(), set()
    for number, data in ((number, data) for number, data in lines if data.strip()):
        task = read_task(context.config, data, number)
        if _key(task.id) in seen:
            error = labs.InputError(f"line {number}: an earlier line has the id {task.id!r} too")
            task = Task(f"line {number}", error=error, openai=task.openai)
        seen.add(key := _key(task.id))
        if key in tally.answered:
            tally.answered.remove(key)
            tally.skipped += 1
            continue
        task.order, task.line = next(order), number
        prepare(model, context, task)
        yield task


def prepare(model: labs.Model | None, context: labs_request.Context, task: Task) -> None:
    """Check a task and build its inputs, or store the error."""
    if task.error is not None:
        return
    most = context.config.server.max_prompt_bytes
    try:
        if task.repeated.get("url") in VECTORS:
            labs.require("labs_vector_lines")
            import labs_vector_lines

            task.work = labs_vector_lines.work_of(context, task.endpoint, task.body)
            return
        if model is None:
            kind = context.config.model.kind
            raise labs.InputError(f"the model of this run is of the kind {kind}, not text")
        if any(prompt.size > most for prompt in task.request.prompts):
            raise labs.InputError(f"the prompt has over server_max_prompt_bytes = {most} bytes")
        request = labs_request.check(context, task.request)
        task.prepared = labs_request.prepare(context, context.config, model, request)
        task.missing = len(request.prompts) * request.n
    except labs.LabsError as error:
        task.fail(error)


def _key(identity: str | int) -> int:
    """Return 88 bits of the id's hash, so that a million ids of any length take 80 MB."""
    digest = hashlib.blake2b(msgspec.json.encode(identity), digest_size=11).digest()
    return int.from_bytes(digest, "big")


def complete(
    model: labs.Model, context: labs_request.Context, tasks: Iterable[Task], batching: Batching
) -> Iterator[Task]:
    """Decode prepared tasks, read lazily, in one batch; yield each when it is done, or in order."""
    under_way: dict[int, tuple[Task, int]] = {}
    held: dict[int, Task] = {}
    due = 0
    streams = _streams(model, tasks, under_way, held)
    for index, event in labs.run(model, streams, batching.rows or labs.rows_in_memory(model)):
        task, place = under_way[index]
        task.take(place, event, context)
        if isinstance(event, labs.Delta):
            continue
        del under_way[index]
        if task.missing == 0:
            held[task.order if batching.ordered else due] = task
        while due in held:
            yield held.pop(due)
            due += 1


def _streams(
    model: labs.Model, tasks: Iterable[Task], under_way: dict[int, Any], held: dict[int, Task]
) -> Iterator[Any]:
    """Yield an open request for each row, or None if the loop should ask again later."""
    tasks, indexes = iter(tasks), itertools.count()
    while window := list(itertools.islice(tasks, WINDOW)):
        for task in sorted(window, key=lambda task: task.length):
            for place in range(task.missing):
                index = next(indexes)
                under_way[index] = task, place
                yield _stream(model, index, task, place)
        while len(held) > 4 * WINDOW:  # they wait for the answer of an earlier line
            yield None


def _stream(model: labs.Model, index: int, task: Task, place: int) -> Any:
    try:
        if task.made is not None:
            raise labs.LabsError("no row is needed")
        if task.error is not None:
            raise task.error
        ready = task.ready(place)
        return labs.open_request(model, index, ready.inputs, ready.generation, ready.processors())
    except labs.LabsError as error:
        return index, labs.Failed(error)


def answer_lines(
    model: labs.Model | None,
    context: labs_request.Context,
    lines: Lines,
    tally: Tally,
    batching: Batching = Batching(),  # noqa: B008
) -> Iterator[bytes]:
    """Answer lines; yield lines of answers. tally: has the ids answered before, and counts.

    model: None where the configured one generates no text, so that lines can ask for vectors only.
    """
    tally.began = time.perf_counter()
    tasks = _tasks(model, context, lines, tally)
    with contextlib.suppress(labs.ConfigError):  # labs_vector_lines.py is absent
        labs.require("labs_vector_lines")
        import labs_vector_lines

        tasks = labs_vector_lines.with_vectors(tasks)
    for task in tasks if model is None else complete(model, context, tasks, batching):
        tally.count(task)
        found = [task.found[place] for place in sorted(task.found)]
        render = _render_openai if task.openai else _render
        yield msgspec.json.encode(render(model, context.config, task, found)) + b"\n"


class Tally(Struct, eq=False):
    """Counts of a run. answered: keys of the ids of earlier answers. errors: failed ones there.

    watch: is called with each task of this run that has ended.
    """

    answered: set[int] = field(default_factory=set)
    errors: int = 0
    done: int = 0
    failed: int = 0
    skipped: int = 0
    tokens: int = 0
    began: float = field(default_factory=time.perf_counter)
    watch: Callable[[Task], None] | None = None

    def learn(self, data: bytes, number: int, name: str) -> None:
        """Record a line of the answers of an earlier run. name: of the file, for errors."""
        if data.strip():
            old = read_answer(data, f"{name}: line {number}")
            self.answered.add(_key(number if old.name is None else old.name))
            self.errors += old.failed

    def count(self, task: Task) -> None:
        if self.watch is not None:
            self.watch(task)
        self.done += task.error is None
        self.failed += task.error is not None
        self.tokens += sum(each.usage.completion_tokens for each in task.found.values())

    @property
    def rate(self) -> float:
        """Return the tokens per second so far."""
        return self.tokens / (time.perf_counter() - self.began)

    def __str__(self) -> str:
        before = f", {self.skipped} before" if self.skipped else ""
        before += f" ({self.errors} of them failed)" if self.errors else ""
        seconds = time.perf_counter() - self.began
        speed = f"{self.tokens} tokens in {seconds:.1f} s, {self.rate:.1f} tokens/s"
        return f"{self.done} answered{before}, {self.failed} failed; {speed}"


def _render(
    model: labs.Model | None, config: labs.Config, task: Task, found: list[labs_ready.Found]
) -> dict[str, Any]:
    if task.error is not None:
        kind = "invalid_request" if _is_bad_request(task.error) else "failed"
        return {"id": task.id, "error": {"type": kind, "message": str(task.error)}}
    answer = {
        "id": task.id,
        "model": config.model_id,
        **labs_ready.fields_of(found[0]),
        **_documents(task),
    }
    return {**answer, "request": task.repeated}


def _documents(task: Task) -> dict[str, tuple[labs_request.Source, ...]]:
    """Return the field of the passages in the prompts; no field if documents are not used."""
    sources = task.prepared.sources if task.prepared else None
    return {} if sources is None else {"documents": sources}


def _is_bad_request(error: labs.LabsError) -> bool:
    """Return whether the request is wrong, rather than its computation."""
    return isinstance(error, labs.InputError | labs.ConfigError)


def _render_openai(
    model: labs.Model | None, config: labs.Config, task: Task, found: list[labs_ready.Found]
) -> dict[str, Any]:
    import labs_protocol

    name, rest, status = secrets.token_hex(12), dict[str, Any](), 200
    if task.error is None:
        names: dict[str, Any] = {"id": name, "model": config.model_id, **_documents(task)}
        if task.prepared is not None:
            names["generation"] = task.prepared.generation
        body = task.made or task.endpoint.answer(task.body, model, found, **names)
        known = found and all(each.fingerprint for each in found)  # a filtered answer has none
        rest = {"fingerprint": found[0].fingerprint if known else None, "request": task.repeated}
        if cut := {each.finish_reason for each in found} & UNFINISHED:  # missing in OpenAI's format
            rest["finish_reason"] = min(cut)
    else:
        wrong = _is_bad_request(task.error)
        status = 400 if wrong else 500
        code, param = labs_protocol.code_and_param(task.error) if wrong else ("failed", None)
        form = labs_protocol.Endpoint() if task.endpoint is None else task.endpoint
        body = form.error_of(status, str(task.error), code, param)
    response = {"status_code": status, "request_id": name, "body": body}
    whole = {"id": f"batch_req_{name}", "custom_id": task.id, "response": response, "error": None}
    return {**whole, **rest}


# ---------------------------------------------------------------- files


class OldAnswer(Struct, frozen=True):
    """A line of answers. response: in OpenAI's format. error: in labs' format, or OpenAI's null."""

    id: str | int | None = None
    custom_id: str | int | None = None
    text: str | UnsetType = UNSET
    reasoning: str = ""
    tool_calls: tuple[labs.ToolCall, ...] = ()
    finish_reason: str | None = None
    response: Any = UNSET
    error: Any = UNSET
    fingerprint: labs.Fingerprint | None = None
    request: dict[str, Any] | None = None

    @property
    def name(self) -> str | int | None:
        return self.id if self.custom_id is None else self.custom_id

    @property
    def failed(self) -> bool:
        status = self.response.get("status_code") if isinstance(self.response, dict) else 200
        return self.error not in (UNSET, None) or status != 200


def read_answer(data: bytes, where: str) -> OldAnswer:
    """Read a line of answers. Raises InputError when it is another kind of line."""
    try:
        old = msgspec.json.decode(data, type=OldAnswer)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise labs.InputError(f"{where} is not an answer of labs-gen: {error}") from None
    text = old.text if old.finish_reason else UNSET
    if all(part is UNSET for part in (text, old.response, old.error)):
        raise labs.InputError(f"{where} is not an answer of labs-gen")
    return old


def answer_file(
    answer: Answer, source: str, target: str, tally: Tally, longest: int | None = None
) -> None:
    """Answer the lines of `source` and append to `target`. Ids answered there are skipped.

    answer: like answer_lines, called when both files are open. source, target: - is standard input
    or output. longest: as in `opened`. Raises LabsError when a file cannot be used.
    """
    with opened(source, longest) as lines, _appending(source, target, tally) as write:
        answers = answer(enumerate(lines, 1))
        with _progress(source, target, tally) as show:
            for data in answers:
                write(data)
                show()


@contextlib.contextmanager
def opened(name: str, longest: int | None = None) -> Iterator[Iterator[bytes]]:
    """Open a file of lines, without a byte order mark; - is standard input.

    longest: limit of a line in bytes. Of a longer line, 16 bytes more than this are read.
    """
    with contextlib.nullcontext(sys.stdin.buffer) if name == "-" else open(name, "rb") as file:
        yield unmarked(file if longest is None else _bounded(file, longest + 16))


def _bounded(file: Any, longest: int) -> Iterator[bytes]:
    while data := file.readline(longest):
        yield data
        while len(data) == longest and not data.endswith(b"\n"):
            data = file.readline(longest)


def unmarked(lines: Iterable[bytes]) -> Iterator[bytes]:
    """Yield the lines of a file without a byte order mark."""
    return (data if n else data.removeprefix(codecs.BOM_UTF8) for n, data in enumerate(lines))


@contextlib.contextmanager
def _appending(source: str, target: str, tally: Tally) -> Iterator[Callable[[bytes], None]]:
    """Open and lock the file of answers, repair its last line and record its ids in `tally`."""
    if target == "-":
        yield _write_out
        return
    if os.path.exists(target) and source != "-" and os.path.samefile(source, target):
        raise labs.InputError(f"{target} cannot be both read and written")
    with open(target, "ab", buffering=0) as file:
        if os.path.isfile(target):  # a device or a pipe holds no earlier answers
            _lock(file.fileno(), target)
            _recover(target, tally)

        def write(data: bytes) -> None:
            try:
                while data:  # the next run repairs a line cut by a full disk
                    data = data[file.write(data) :]
            except OSError as error:
                raise labs.LabsError(f"{target}: {error.strerror}") from error

        yield write


def _write_out(data: bytes) -> None:
    try:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
    except OSError as error:
        if isinstance(error, BrokenPipeError):  # the reader has closed it: not a failure
            raise
        raise labs.LabsError(f"standard output: {error.strerror}") from error


def _lock(descriptor: int, name: str) -> None:
    with contextlib.suppress(ImportError):  # Windows has no fcntl
        import fcntl

        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise labs.LabsError(f"{name} is being written by another process") from None


def _recover(name: str, tally: Tally) -> None:
    """Record the ids that are answered. Remove a last line that was not written completely."""
    whole, data = 0, b"\n"
    with open(name, "r+b") as file:
        for number, data in enumerate(file, 1):
            if _is_torn(data):
                file.truncate(whole)
                return
            whole += len(data)
            tally.learn(data, number, name)
        file.write(b"" if data.endswith(b"\n") else b"\n")


def _is_torn(data: bytes) -> bool:
    """Return whether it is an incomplete line of answers."""
    if data.endswith(b"\n") or not b'{"id":'.startswith(data[:6]):
        return False
    with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        msgspec.json.decode(data)
        return False
    return True


@contextlib.contextmanager
def _progress(source: str, target: str, tally: Tally) -> Iterator[Callable[[], None]]:
    """Show a progress bar where a command has asked for bars, but not among answers."""
    if target == "-" and sys.stdout.isatty():
        yield lambda: None
        return
    total, shown = None, 0
    if os.path.isfile(source) and labs_progress.is_shown():  # a pipe can be read only once
        with open(source, "rb") as file:
            total = sum(1 for line in file if line.strip())
    with labs_progress.counting("Answering", "lines", total) as advance:

        def show() -> None:
            nonlocal shown
            now = tally.done + tally.failed + tally.skipped
            advance(now - shown, f"{tally.rate:.0f} tokens/s")
            shown = now

        yield show
