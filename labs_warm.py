# SPDX-License-Identifier: Apache-2.0
"""Prefixes of prompts that are computed ahead and kept on disk: labs-gen warm.

    aheads = labs_warm.of_lines(context, "requests.jsonl")     # or one Ahead of a system message
    for each in labs_warm.forms(context.config):
        for line in labs_warm.Warmer(context, each, owners).lines(aheads): ...

What is computed is what labs_prefix_files.py keeps of such a request: its whole chunks. Of a
conversation that ends before a question, that is what it has in common with any question after it.
Needs labs_prefix_files.py, labs_request.py, labs_shell.py, labs_progress.py with what these need;
labs_jsonl.py for lines.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

import msgspec
from msgspec.structs import replace

import labs
import labs_decode
import labs_prefix_files
import labs_progress
import labs_request
import labs_shell

QUESTIONS = ("1", "2")  # which begin differently, so a prompt has nothing of them in common
AT_ONCE = 8  # chunks that are written together
WRITE_S = 60.0  # the time for writing these


class Ahead(msgspec.Struct, frozen=True):
    """A prompt to come. name: as reports call it. error: why it cannot be used, if it cannot."""

    name: str
    request: labs_request.Request = labs_request.Request(prompts=())
    error: labs.LabsError | None = None


class Beginning(msgspec.Struct, frozen=True):
    """What later prompts begin with. ids: its tokens, and one that may come after them."""

    ids: tuple[int, ...]
    tokens: int


def check(config: labs.Config, names: Iterable[str]) -> tuple[str, ...]:
    """Return the owners of prefixes: those with these names, by default whoever may ask.

    names: of API keys, as the log of labs-api has them. The owner "" is labs-gen chat, and anybody
    at a server without keys. Raises ConfigError where nothing is kept, InputError for a name.
    """
    if not config.server.prefix_disk_bytes:
        text = "prefix_disk_bytes = 0: nothing is kept on disk; set in [server] how many bytes may"
        raise labs.ConfigError(f"{text} be, for labs-gen warm and for whoever reads them")
    known = [digest[:12] for digest in config.api_keys]
    if unknown := [name for name in names if name not in known]:
        there = f"there are {', '.join(known)}" if known else "none is configured"
        raise labs.InputError(f"no API key has the name {unknown[0]!r} in the log: {there}")
    return tuple(names) or ("", *known)


def of_text(config: labs.Config, name: str, text: str) -> labs_request.Prompt:
    """Return the prompt of a system message. Raises InputError if it is empty or too large."""
    most, size = config.server.max_prompt_bytes, len(text.encode(errors="replace"))
    if not text.strip():
        raise labs.InputError(f"{name}: the file is empty")
    if size > most:
        raise labs.InputError(f"{name}: has {size} bytes, server_max_prompt_bytes is {most}")
    return labs_request.Prompt(messages=(labs.Message(role="system", content=text),))


def of_lines(context: labs_request.Context, file: str) -> list[Ahead]:
    """Read the requests of a file as labs-gen batch reads it. Raises InputError if it has none."""
    labs.require("labs_jsonl")
    import labs_jsonl

    found, most = [], context.config.server.max_prompt_bytes
    with labs_jsonl.opened(file, context.config.server.max_body_bytes) as lines:
        for number, data in ((n, each) for n, each in enumerate(lines, 1) if each.strip()):
            task = labs_jsonl.read_task(context.config, data, number)
            error, prompts = task.error, task.request.prompts
            if error is None and not prompts:
                error = labs.InputError("it asks for vectors or scores, which have no prefix")
            if error is None and any(prompt.size > most for prompt in prompts):
                text = f"the prompt has over server_max_prompt_bytes = {most} bytes"
                error = labs.InputError(text)
            found.append(Ahead(f"{file}: {task.id}", task.request, error))
    if not found:
        raise labs.InputError(f"{file}: the file is empty")
    return found


def forms(config: labs.Config) -> list[labs.Config]:
    """Return how a server loads the model, then how labs-gen chat does if that may differ."""
    alone = labs_shell.for_one_stream(config)
    return [config, *([alone] if config.model.model_name.endswith(".gguf") else [])]


class Warmer:
    """Computes and keeps prefixes for one loaded form of a model.

    mark: what its prefixes are known by. failed: whether a prompt could not be used or kept.
    """

    def __init__(self, context: labs_request.Context, config: labs.Config, owners: Iterable[str]):
        self.context, self.owners, self.failed = context, tuple(owners), False
        self.model = labs.load_model(replace(config.model, draft_model=None))  # it makes no step
        if why := labs_prefix_files.unusable(self.model):
            raise labs.ModelError(f"{config.model_id}: prefixes cannot be kept: {why}")
        server = replace(config.server, prefix_cache_bytes=0)  # they are needed on disk only
        store = labs_prefix_files.opened(self.model, server)
        assert isinstance(store, labs_prefix_files.PrefixFiles)
        self.store, self.mark = store, labs_prefix_files.identity(self.model)
        self._kept: list[tuple[Beginning, int]] = []

    def lines(self, aheads: Iterable[Ahead]) -> Iterator[str]:
        """Keep what these prompts begin with; yield a line about each, then about lost ones."""
        for ahead in aheads:
            try:
                if ahead.error is not None:
                    raise ahead.error
                for each in beginnings(self.context, self.model, ahead.request):
                    yield f"{ahead.name}: {self._keep(each)}"
            except labs.LabsError as error:
                self.failed = True
                yield f"{ahead.name}: {error}"
        lost = sum(count > self._count(each) for each, count in self._kept)
        if lost:
            self.failed, most = True, self.store.folder.max_bytes
            yield f"{lost} of these were deleted for later ones: prefix_disk_bytes = {most}"

    def _keep(self, each: Beginning) -> str:
        """Keep a beginning for all owners, and say how much of it is kept."""
        chunk, before = self.model.decoder.chunk, self._count(each)
        whole = (len(each.ids) - 1) // chunk * chunk
        if before < whole:
            self._compute(each.ids[: whole + 1])
        count = self._count(each)
        self._kept.append((each, count))
        text = f"{count:,} of {each.tokens:,} tokens are kept"
        if before:
            text += f", {before:,} of them from before"
        if count < whole:
            self.failed = True
            return f"{text}: the disk took no more, within prefix_disk_bytes"
        return text if whole else f"{text}: only whole chunks of {chunk:,} are"

    def _count(self, each: Beginning) -> int:
        """Return how many tokens of a beginning are kept for every owner."""
        decoder = self.model.decoder
        return min(self.store.kept(decoder, owner, each.ids) for owner in self.owners)

    def _compute(self, ids: tuple[int, ...]) -> None:
        """Compute the whole chunks of a prompt that no owner has, and keep all for each owner."""
        decoder, inputs = self.model.decoder, labs.inputs_from_ids(self.model, ids)
        row = labs.open_request(self.model, 0, inputs, labs.Generation(max_new_tokens=1)).row
        first = max(self.owners, key=lambda owner: self.store.kept(decoder, owner, ids))
        batch, last = labs_decode.new_batch(decoder, row), len(ids) - 1
        with labs_progress.counting("Computing", "tokens", last) as advance:
            while (written := row.written) < last:
                row.owner = first
                self.store.load(decoder, batch)
                if row.written == written:
                    batch = labs_decode.prefill(decoder, batch)
                advance(row.written - written)
                if row.written % (AT_ONCE * decoder.chunk) == 0 or row.written == last:
                    for owner in self.owners:
                        row.owner = owner
                        self.store.store(decoder, batch, 0)
                        self.store.flush(WRITE_S)


def beginnings(
    context: labs_request.Context, model: labs.Model, request: labs_request.Request
) -> Iterator[Beginning]:
    """Yield what the prompts of later requests begin with. Raises InputError as for an answer.

    It is the whole prompt, unless that ends before a question: with a system message or an answer.
    """
    request = labs_request.check(context, request)
    for prompt in request.prompts:
        turns = prompt.messages or ()
        filled = labs_request.filled(prompt, context.config)
        open_ended = turns and turns[-1].role not in ("user", "tool")
        prompts = [prompt]
        if open_ended and not (filled.continue_final_message and turns[-1].role == "assistant"):
            asked = [labs.Message(role="user", content=text) for text in QUESTIONS]
            prompts = [replace(prompt, messages=(*turns, each)) for each in asked]
        each = replace(request, prompts=tuple(prompts))
        made = labs_request.prepare(context, context.config, model, each).inputs
        found = [inputs.input_ids for inputs in made]
        pairs = zip(found[0], found[-1], strict=False)
        tokens = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        yield Beginning(found[0][: tokens + 1], tokens)
