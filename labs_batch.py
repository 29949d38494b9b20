# SPDX-License-Identifier: Apache-2.0
"""Files of prompts in, files of answers out, one JSON object a line; and the same again, compared.

    {"id": "a", "prompt": "Name a river.", "max_new_tokens": 8}          any setting of a request
    {"custom_id": "b", "method": "POST", "url": "/v1/chat/completions", "body": {...}}   OpenAI's

`answer_file` is what labs-gen --input runs: the lines share one decode batch, each answer is
appended whole, and the same call goes on where another one ended. `answer_lines` does it without
files; `replay` runs lines of answers again. Needs labs.py, labs_decode.py and, for OpenAI's lines,
labs_openai.py; files also tqdm.
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
from typing import Any, Literal

import msgspec
from msgspec import UNSET, Struct, UnsetType, field

import labs

CUT = {"timeout", "cancelled"}  # ends that another run need not come to
WINDOW = 1024  # lines that are sorted by length together: rows of one length share a batch well


class Line(labs.GenerateRequest, frozen=True, kw_only=True):
    id: str | int | None = None


class OpenAILine(Struct, frozen=True, forbid_unknown_fields=True):
    """https://platform.openai.com/docs/guides/batch"""

    custom_id: str
    method: str
    url: str
    body: msgspec.Raw


class RepeatedLine(Struct, frozen=True, omit_defaults=True):
    """What the answer to a line of OpenAI's repeats, so that it can be run again."""

    url: str
    body: msgspec.Raw
    documents: bool | None = None


class Prompt(Struct, frozen=True, omit_defaults=True):
    """What a prompt is built from; an answer repeats it, so that it can be built again."""

    prompt: str | None = None
    messages: tuple[labs.Message, ...] | None = None
    ids: tuple[int, ...] | None = None
    response_format: labs.ResponseFormat | None = None
    use_chat_template: bool | None = None
    add_generation_prompt: bool | None = None
    documents: bool | None = None

    def build(self, model: labs.Model, config: labs.Config, sources: list[Any]) -> labs.Inputs:
        """Build the inputs; `sources` takes the passages of documents that are in them."""
        rules = _rules(config)
        if self.ids is not None:
            inputs = labs.inputs_of_ids(model, self.ids)
            return rules.check_inputs(inputs, ids=True) if rules else inputs
        filled = self.within(config)
        request = {name: getattr(filled, name) for name in labs.Chat.__struct_fields__}
        request |= {"prompt": self.prompt, "messages": self.messages}
        import labs_request

        if self.messages is not None:
            request["messages"] = tuple(labs.check_prompt(None, self.messages) or ())
        prompt = labs_request.Prompt(**request)
        prompt = rules.check_prompt(prompt) if rules else prompt
        request |= {"prompt": prompt.prompt, "messages": prompt.messages}
        if config.documents.apply(bool(self.documents)):
            labs.need("labs_rag")
            import labs_rag

            encoder = labs_rag.encoder_of(config)
            messages, found = labs_rag.with_passages(config.documents, encoder, model, prompt)
            sources.extend(found)
            request |= {"prompt": None, "messages": messages} if found else {}
        inputs = labs.build_inputs(model, **request)
        return rules.check_inputs(inputs) if rules else inputs

    def within(self, chat: labs.Chat) -> Prompt:
        """Return it with what it leaves open filled in."""
        names = [n for n in labs.Chat.__struct_fields__ if getattr(self, n) is None]
        return msgspec.structs.replace(self, **{name: getattr(chat, name) for name in names})


class Task(Struct, eq=False):
    """One line under way: what it asks for, then what was found, a completion for each row.

    order: among the tasks of a run. request: what the answer repeats. endpoint: OpenAI's that the
    line speaks to. seeds: how many rows have one of their own. missing: rows that have not ended.
    """

    id: str | int
    request: Any = None
    prompts: list[Prompt] = field(default_factory=list)
    generation: labs.Generation = labs.Generation()
    n: int = 1
    seeds: int = 1
    openai: bool = False
    endpoint: Any = None
    order: int = 0
    inputs: list[labs.Inputs] = field(default_factory=list)
    sources: list[labs.Source] = field(default_factory=list)
    pieces: dict[int, list[labs.Delta]] = field(default_factory=dict)
    found: dict[int, labs.Completion] = field(default_factory=dict)
    error: labs.LabsError | None = None
    missing: int = 1

    @property
    def length(self) -> int:
        return max((len(each.input_ids) for each in self.inputs), default=0)

    def fail(self, error: labs.LabsError) -> None:
        """Keep the first error, without the frames it went through."""
        self.error = self.error or error.with_traceback(None)

    def take(self, place: int, event: labs.Event) -> None:
        """Take in what one row tells."""
        if isinstance(event, labs.Delta):
            self.pieces.setdefault(place, []).append(event)
            return
        self.missing -= 1
        if isinstance(event, labs.Failed):
            self.fail(event.error)
        else:
            self.found[place] = labs.fold(self.pieces.pop(place, []), event)


# ---------------------------------------------------------------- lines in


def read_task(config: labs.Config, data: bytes, number: int | str) -> Task:
    """Read one line; a wrong one becomes a task with an error, one without id has its number.

    One whose id cannot be read has none that another line could have: its number may be taken.
    """
    task = Task(f"line {number}")
    try:
        given = msgspec.json.decode(data)
        if not isinstance(given, dict):
            raise labs.InputError("the line is no JSON object")
        openai = "custom_id" in given
        identity = given.get("custom_id" if openai else "id")
        if identity is None:
            task.id = number
        elif isinstance(identity, str | int) and not isinstance(identity, bool):
            task.id = identity
        if openai:
            _read_openai(config, data, task)
        else:
            _read_line(config, data, given, task)
        if rules := _rules(config):
            rules.filters(task.generation)  # refuses log-probabilities
    except labs.LabsError as error:
        task.fail(error)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        task.fail(labs.InputError(f"the line cannot be used: {error}"))
    return task


def _read_line(config: labs.Config, data: bytes, given: dict[str, Any], task: Task) -> None:
    line = msgspec.json.decode(data, type=Line)
    _check_model(config, line.model)
    names = {*labs.Generation.__struct_fields__} & given.keys()
    changes = {name: getattr(line, name) for name in names}
    task.generation = labs.evolve(config.generation, **changes)
    names = {*Prompt.__struct_fields__} - {"ids"}
    given = {name: getattr(line, name) for name in names}
    given["documents"] = config.documents.apply(line.documents) or None
    task.request = Prompt(**given).within(config)
    task.prompts = [task.request]


def _read_openai(config: labs.Config, data: bytes, task: Task) -> None:
    labs.need("labs_openai")
    import labs_openai

    task.openai = True
    line = msgspec.json.decode(data, type=OpenAILine)
    task.endpoint = labs_openai.ENDPOINTS.get(line.url)
    if task.endpoint is None or line.method != "POST":
        known = " and ".join(labs_openai.ENDPOINTS)
        raise labs.InputError(f"{line.method} {line.url}: only POST {known} can be answered")
    body, named = labs_openai.read(bytes(line.body), task.endpoint.request)
    _check_model(config, body.model)
    if body.stream or body.stream_options is not None:
        raise labs_openai.Refusal("an answer in a file is no stream", "unsupported", "stream")
    task.generation = labs.evolve(config.generation, **task.endpoint.options(body, named))
    documents = config.documents.apply(getattr(body, "documents", False)) or None
    task.request = RepeatedLine(line.url, line.body, documents)
    task.prompts = [each.within(config) for each in _prompts(task, body, documents)]
    _count_choices(task, body)
    if task.seeds > 1 and task.generation.seed is None:  # else only one could be replayed
        task.generation = labs.evolve(task.generation, seed=secrets.randbits(32))


def _count_choices(task: Task, body: Any) -> None:
    """Let all choices differ, but those of a seeded request only within a prompt, as HTTP's do."""
    task.n = body.n or 1
    task.seeds = task.n * (len(task.prompts) if body.seed is None else 1)


def _prompts(task: Task, body: Any, documents: bool | None = None) -> list[Prompt]:
    wanted = getattr(body, "response_format", None)
    more: dict[str, Any] = {"response_format": wanted, "documents": documents}
    return [Prompt(**each, **more) for each in task.endpoint.prompts(body)]


def _rules(config: labs.Config) -> Any:
    """Return the filters of [guard], or None where there are none."""
    if config.guard == labs.Guard():
        return None
    labs.need("labs_guard")
    import labs_guard

    return labs_guard.load(config.guard, config.model)


def _check_model(config: labs.Config, name: str | None) -> None:
    if name not in (None, config.model_id):
        raise labs.InputError(f"model = {name!r}: this run has {config.model_id} (--model)")


def _tasks(
    model: labs.Model, config: labs.Config, lines: Iterable[tuple[int | str, bytes]], tally: Tally
) -> Iterator[Task]:
    """Yield the tasks that are not answered yet, with their inputs."""
    order, seen = itertools.count(), set()
    for number, data in lines:
        if not data.strip():
            continue
        task = read_task(config, data, number)
        if _key(task.id) in seen:
            error = labs.InputError(f"line {number}: the id {task.id!r} was used before")
            task = Task(f"line {number}", error=error, openai=task.openai)
        seen.add(key := _key(task.id))
        if key in tally.answered:
            tally.answered.remove(key)
            tally.skipped += 1
            continue
        task.order = next(order)
        yield _with_inputs(model, config, task)


def _with_inputs(model: labs.Model, config: labs.Config, task: Task) -> Task:
    try:
        task.inputs = [prompt.build(model, config, task.sources) for prompt in task.prompts]
    except labs.LabsError as error:
        task.fail(error)
    task.missing = 1 if task.error else len(task.inputs) * task.n
    return task


def _key(identity: str | int) -> int:
    """Return 88 bits of the id's hash: a million of them take 80 MB, whatever ids are like."""
    digest = hashlib.blake2b(msgspec.json.encode(identity), digest_size=11).digest()
    return int.from_bytes(digest, "big")


# ---------------------------------------------------------------- the batch


def complete(
    model: labs.Model, tasks: Iterable[Task], rows: int | None = None, *, ordered: bool = False
) -> Iterator[Task]:
    """Decode all tasks in one batch; yield each when it is done, or in their order.

    tasks: with their inputs; read lazily. rows: at once, by default what memory allows.
    """
    under_way: dict[int, tuple[Task, int]] = {}
    held: dict[int, Task] = {}
    due = 0
    streams = _streams(model, tasks, under_way, held)
    for index, event in labs.run(model, streams, rows or labs.rows_in_memory(model)):
        task, place = under_way[index]
        task.take(place, event)
        if isinstance(event, labs.Delta):
            continue
        del under_way[index]
        if task.missing == 0:
            held[task.order if ordered else due] = task
        while due in held:
            yield held.pop(due)
            due += 1


def _streams(
    model: labs.Model,
    tasks: Iterable[Task],
    under_way: dict[int, tuple[Task, int]],
    held: dict[int, Task],
) -> Iterator[Any]:
    """Open the streams of all tasks; None asks the loop to come again later."""
    tasks, indexes = iter(tasks), itertools.count()
    while window := list(itertools.islice(tasks, WINDOW)):
        for task in sorted(window, key=lambda task: task.length):
            for place in range(task.missing):
                index = next(indexes)
                under_way[index] = task, place
                yield _stream(model, index, task, place)
        while len(held) > 4 * WINDOW:  # a long one is due, and those after it wait for it
            yield None


def _stream(model: labs.Model, index: int, task: Task, place: int) -> Any:
    if task.error is not None:
        return index, labs.Failed(task.error)
    options = labs.choice_of(task.generation, place % task.seeds)
    number = place // task.n
    try:
        processors = _processors(model, task.prompts[number])
        return labs.open_stream(model, index, task.inputs[number], options, processors)
    except labs.LabsError as error:
        return index, labs.Failed(error)


def _processors(model: labs.Model, prompt: Prompt) -> tuple[Any, ...]:
    if prompt.response_format is None:
        return ()
    import labs_request

    return labs_request.constraints(model, prompt.response_format)  # type: ignore[arg-type]


def answer_lines(
    model: labs.Model,
    config: labs.Config,
    lines: Iterable[tuple[int | str, bytes]],
    tally: Tally,
    *,
    batch_rows: int | None = None,
    ordered: bool = False,
) -> Iterator[bytes]:
    """Answer lines, given with their numbers; yield the lines of the answers.

    tally: knows what was answered before, and counts.
    """
    tasks, rules = _tasks(model, config, lines, tally), _rules(config)
    for task in complete(model, tasks, batch_rows, ordered=ordered):
        tally.count(task)
        found = [task.found[place] for place in sorted(task.found)]
        found = [rules.shown(each) for each in found] if rules else found
        if task.openai:
            answer = _render_openai(model, config, task, found)
        else:
            answer = _render(config, task, found)
        yield msgspec.json.encode(answer) + b"\n"


class Tally(Struct, eq=False):
    """What a run has done. answered: keys of the ids that were answered before it.

    errors: how many of those in error.
    """

    answered: set[int] = field(default_factory=set)
    errors: int = 0
    done: int = 0
    failed: int = 0
    skipped: int = 0
    tokens: int = 0
    began: float = field(default_factory=time.perf_counter)

    def learn(self, data: bytes, number: int, name: str) -> None:
        """Take in a line of an earlier run's answers, of the file called so."""
        if data.strip():
            past = read_past(data, f"{name}: line {number}")
            self.answered.add(_key(number if past.name is None else past.name))
            self.errors += past.failed

    def count(self, task: Task) -> None:
        self.done += task.error is None
        self.failed += task.error is not None
        self.tokens += sum(each.usage.completion_tokens for each in task.found.values())

    @property
    def rate(self) -> float:
        """Tokens per second so far."""
        return self.tokens / (time.perf_counter() - self.began)

    def __str__(self) -> str:
        before = f", {self.skipped} before" if self.skipped else ""
        before += f" ({self.errors} of them in error)" if self.errors else ""
        seconds = time.perf_counter() - self.began
        speed = f"{self.tokens} tokens in {seconds:.1f} s, {self.rate:.1f} tokens/s"
        return f"{self.done} answered{before}, {self.failed} failed; {speed}"


# ---------------------------------------------------------------- lines out


def _render(config: labs.Config, task: Task, found: list[labs.Completion]) -> dict[str, Any]:
    if task.error is not None:
        kind = "invalid_request" if _is_askers(task.error) else "failed"
        return {"id": task.id, "error": {"type": kind, "message": str(task.error)}}
    answer = msgspec.structs.asdict(found[0])
    answer |= {"documents": task.sources} if task.request.documents else {}
    return {"id": task.id, "model": config.model_id, **answer, "request": task.request}


def _is_askers(error: labs.LabsError) -> bool:
    """Tell whether who asked can mend it."""
    return isinstance(error, labs.InputError | labs.ConfigError)


def _render_openai(
    model: labs.Model, config: labs.Config, task: Task, found: list[labs.Completion]
) -> dict[str, Any]:
    import labs_openai

    name, status, rest = secrets.token_hex(12), 200, {}
    body: Any
    if task.error is None:
        names: dict[str, Any] = {"id": name, "model": config.model_id}
        names |= {"documents": tuple(task.sources)} if task.request.documents else {}
        body = task.endpoint.answer(model, found, task.n, **names)
        known = all(each.fingerprint for each in found)  # not of what the filters changed
        rest = {"fingerprint": found[0].fingerprint if known else None, "request": task.request}
        if cut := {each.finish_reason for each in found} & CUT:  # OpenAI has no word for it
            rest["finish_reason"] = min(cut)
    else:
        status = 400 if _is_askers(task.error) else 500
        kind = "invalid_request_error" if status == 400 else "server_error"
        code, param = "failed", None
        if status == 400:
            code, param = labs_openai.code_and_param(task.error)
        body = labs_openai.Error(labs_openai.ErrorDetail(str(task.error), kind, param, code))
    response = {"status_code": status, "request_id": name, "body": body}
    whole = {"id": f"batch_req_{name}", "custom_id": task.id, "response": response, "error": None}
    return {**whole, **rest}


# ---------------------------------------------------------------- files


class Past(Struct, frozen=True):
    """A line of answers. response: OpenAI's; error: ours, or OpenAI's null."""

    id: str | int | None = None
    custom_id: str | int | None = None
    text: str | UnsetType = UNSET
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

    @property
    def texts(self) -> list[str]:
        """Return the text of each choice; none of an error."""
        if self.response is UNSET:
            return [self.text] if isinstance(self.text, str) else []
        choices = (self.response or {}).get("body", {}).get("choices", ())
        found = [c["text"] if "text" in c else c["message"]["content"] for c in choices]
        return msgspec.convert(found, list[str])


def read_past(data: bytes, where: str) -> Past:
    """Read a line of answers. Raises InputError for any other line."""
    try:
        past = msgspec.json.decode(data, type=Past)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise labs.InputError(f"{where} is no answer of labs-gen: {error}") from None
    text = past.text if past.finish_reason else UNSET
    if all(part is UNSET for part in (text, past.response, past.error)):
        raise labs.InputError(f"{where} is no answer of labs-gen")
    return past


def answer_file(
    load: Callable[[], labs.Model],
    config: labs.Config,
    source: str,
    target: str,
    tally: Tally,
    **options: Any,
) -> None:
    """Answer the lines of a file and append to another; what is answered there is skipped.

    load: returns the model, once both files are open. source, target: - is standard input and
    output. options: as in answer_lines. Raises LabsError if a file cannot be used.
    """
    with opened(source) as lines, _appending(source, target, tally) as write:
        model = load()
        tally.began = time.perf_counter()
        with _progress(source, tally) as show:
            for data in answer_lines(model, config, enumerate(lines, 1), tally, **options):
                write(data)
                show()


@contextlib.contextmanager
def opened(name: str) -> Iterator[Iterator[bytes]]:
    """Open a file of lines, without a byte order mark; - is standard input."""
    with contextlib.nullcontext(sys.stdin.buffer) if name == "-" else open(name, "rb") as file:
        yield unmarked(file)


def unmarked(lines: Iterable[bytes]) -> Iterator[bytes]:
    """Yield the lines of a file without a byte order mark."""
    return (data if n else data.removeprefix(codecs.BOM_UTF8) for n, data in enumerate(lines))


@contextlib.contextmanager
def _appending(source: str, target: str, tally: Tally) -> Iterator[Callable[[bytes], None]]:
    """Hold the file of answers, whole lines in it, and what it has told to the tally."""
    if target == "-":
        yield _write_out
        return
    if os.path.exists(target) and source != "-" and os.path.samefile(source, target):
        raise labs.InputError(f"{target} cannot be both --input and --output")
    with open(target, "ab", buffering=0) as file:
        if os.path.isfile(target):  # a device or a pipe has no past, and no end of it to read to
            _lock(file.fileno(), target)
            _recover(target, tally)

        def write(data: bytes) -> None:
            try:
                while data:  # what a full disk took of a line is mended by the next run
                    data = data[file.write(data) :]
            except OSError as error:
                raise labs.LabsError(f"{target}: {error.strerror}") from error

        yield write


def _write_out(data: bytes) -> None:
    try:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
    except BrokenPipeError:  # the reader has enough, which is no failure
        raise
    except OSError as error:
        raise labs.LabsError(f"standard output: {error.strerror}") from error


def _lock(descriptor: int, name: str) -> None:
    with contextlib.suppress(ImportError):  # there is none on Windows
        import fcntl

        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise labs.LabsError(f"{name} is being written by another process") from None


def _recover(name: str, tally: Tally) -> None:
    """Read which ids are answered; cut off a last line that was not written whole."""
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
    """Tell whether it is the beginning of an answer's line, without its end."""
    if data.endswith(b"\n") or not b'{"id":'.startswith(data[:6]):
        return False
    try:
        msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return True
    return False


@contextlib.contextmanager
def _progress(source: str, tally: Tally) -> Iterator[Callable[[], None]]:
    """Show a bar where standard error is a terminal."""
    labs.need("tqdm")
    from tqdm import tqdm

    total = None
    if os.path.isfile(source) and sys.stderr.isatty():  # a pipe can be read only once
        with open(source, "rb") as file:
            total = sum(1 for line in file if line.strip())
    with tqdm(total=total, unit=" lines", disable=None, leave=False) as bar:

        def show() -> None:
            bar.set_postfix_str(f"{tally.rate:.0f} tokens/s", refresh=False)
            bar.update(tally.done + tally.failed + tally.skipped - bar.n)

        yield show


# ---------------------------------------------------------------- the same again


class Verdict(Struct, frozen=True):
    """How an answer compares with an earlier one. token: the first that differs, from 1."""

    id: str | int
    verdict: Literal["same", "differs", "not comparable"]
    token: int | None = None
    why: str | None = None


def replay(
    model: labs.Model,
    config: labs.Config,
    lines: Iterable[tuple[int, bytes]],
    *,
    batch_rows: int | None = None,
) -> Iterator[Verdict]:
    """Run lines of answers again, as their fingerprints say, and compare; in their order."""
    pasts: dict[int, Past] = {}
    filled = (pair for pair in lines if pair[1].strip())
    tasks = (
        _with_inputs(model, config, _again(pasts, order, number, data))
        for order, (number, data) in enumerate(filled)
    )
    for task in complete(model, tasks, batch_rows, ordered=True):
        yield _compare(model, pasts.pop(task.order), task)


def _again(pasts: dict[int, Past], order: int, number: int, data: bytes) -> Task:
    """Make the task that an answer was made by."""
    task = Task(number, order=order)
    pasts[order] = Past()
    try:
        pasts[order] = past = read_past(data, f"line {number}")
        task.id = number if past.name is None else past.name
        if not past.texts:
            raise labs.InputError("it was an error")
        if past.fingerprint is None or past.request is None:
            raise labs.InputError("the line does not hold its request and fingerprint")
        if past.finish_reason in CUT:
            raise labs.InputError(f"it was cut ({past.finish_reason})")
        options = past.fingerprint.generation
        # With log-probabilities come the tokens.
        task.generation = labs.evolve(options, timeout_s=None, logprobs=options.logprobs or 0)
        _ask_again(task, past.request)
        if len(past.texts) != len(task.prompts) * task.n:
            raise labs.InputError("the line is damaged: it lacks choices")
    except labs.LabsError as error:
        task.fail(error)
    except (msgspec.ValidationError, LookupError, TypeError, AttributeError) as error:
        task.fail(labs.InputError(f"the line is damaged: {error}"))
    return task


def _ask_again(task: Task, request: dict[str, Any]) -> None:
    if "url" not in request:
        task.prompts = [msgspec.convert(request, Prompt)]
        return
    labs.need("labs_openai")
    import labs_openai

    task.endpoint = labs_openai.ENDPOINTS[request["url"]]
    body, _ = labs_openai.read(msgspec.json.encode(request["body"]), task.endpoint.request)
    task.prompts = _prompts(task, body, request.get("documents"))
    _count_choices(task, body)


def _compare(model: labs.Model, past: Past, task: Task) -> Verdict:
    if task.error is not None:
        return Verdict(task.id, "not comparable", why=str(task.error))
    now = [task.found[place] for place in sorted(task.found)]
    pairs = zip(past.texts, now, strict=True)
    places = [at for old, new in pairs if (at := _differs_at(model, old, new)) is not None]
    if not places:
        return Verdict(task.id, "same")
    why = _changed(past.fingerprint, now[0].fingerprint)
    if not (why or model.decoder.invariant or model.dtype == "fp32"):
        why = f"in {model.dtype} this model's text depends on its company in the batch"
    return Verdict(task.id, "not comparable" if why else "differs", min(places), why or None)


def _differs_at(model: labs.Model, old: str, new: labs.Completion) -> int | None:
    """Return which token of the new text is the first that is not in the old one."""
    if old == new.text:
        return None
    pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(old, new.text, strict=False))
    common, length, text = len(list(pairs)), 0, labs.Text()
    for number, each in enumerate(new.logprobs, 1):
        length += len(labs.decode_next(model.tokenizer, text, each.token))
        if length > common or each.token in model.eos_token_ids:
            return number
    return len(new.logprobs) + 1


def _changed(old: labs.Fingerprint | None, new: labs.Fingerprint | None) -> str:
    """Tell what is not as it was: a model by its name, unless only the name is another."""
    before, after = _flat(old), _flat(new)
    names = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    dropped = "revision" if {"model", "revision"} <= {*names} else "model"
    names = [name for name in names if name != dropped]
    return ", ".join(f"{name} {before.get(name)} is now {after.get(name)}" for name in names)


def _flat(fingerprint: labs.Fingerprint | None) -> dict[str, Any]:
    found = msgspec.structs.asdict(fingerprint) if fingerprint else {}
    found |= found.pop("versions", {})
    return {**found, "generation": None}
