# SPDX-License-Identifier: Apache-2.0
"""Filter prompts and answers by the rules in the section [guard] of the settings.

    filters = labs_guard.load(config.guard, config.model)
    inputs = labs.build_inputs(model, prompt=filters.check_text("Hi!"))  # or raises Filtered
    events = labs.stream_generate(model, inputs, config.generation)
    for event in labs_guard.Filter(filters, inputs, config.generation).all(events): ...

A stream holds back the end of its text while later text could turn it into a match. Needs labs.py
and labs_patterns.py.
"""

from __future__ import annotations

import contextlib
import itertools
import re
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

import labs
import labs_apart
import labs_patterns

SENTENCE_END = re.compile(r"(?<=[.!?…])\s|[\n。！？]")  # noqa: RUF001


class Filtered(labs.InputError):
    """A rule of [guard] refuses a prompt; the message names the rule but not the text."""

    def __init__(self, rule: str, why: str = "the rule matches its text") -> None:
        super().__init__(f"the prompt is refused by [guard] {rule}: {why}")
        self.rule, self.code = rule, "content_filtered"


class Verdict(Struct, frozen=True):
    """A rule's match in a text. mask: the text that replaces it, or None to refuse the text."""

    rule: str
    start: int
    end: int
    mask: str | None = None


class Pattern(Struct, frozen=True, eq=False):
    """A rule that searches a text and returns the first verdict from `start` on, or None."""

    name: str
    regex: re.Pattern[str] | labs_patterns.Bounded
    lookbehind: int  # a match is decided within this many characters
    safe_prefix: Any = re.compile("")  # matches the part of these in which no match can begin
    accepted_length: Callable[[str], int] = lambda found: len(found) or 1  # 0: not a match
    mask: str | None = None
    names: dict[str, str] = {}  # rule names by matched text in lower case; the default is `name`

    def __call__(self, text: str, start: int = 0) -> Verdict | None:
        while found := self.regex.search(text, start):
            start = found.start() + 1
            if length := self.accepted_length(found[0]):
                rule = self.names.get(found[0].lower(), self.name)
                return Verdict(rule, found.start(), found.start() + length, self.mask)
        return None

    def final_up_to(self, text: str) -> int:
        """Return how many characters of a text cannot become part of a match by later text."""
        return int(self.safe_prefix.match(text, max(0, len(text) - self.lookbehind)).end())


CARD_FREE = re.compile(r"(?s)(?:.*[^\d -])?[^2-6]*")
PII = {
    "email": Pattern("email", labs_patterns.EMAIL, 640, re.compile(r"(?s)(?:.*[^\w.%+@-])?")),
    "phone": Pattern(
        "phone", labs_patterns.PHONE, 64, re.compile(r"(?s)(?:.*[^\d ./()+-])?[^\d(+]*")
    ),
    "card": Pattern("card", labs_patterns.CARD, 38, CARD_FREE, labs_patterns.card_length),
}


class Filters(Struct, frozen=True, eq=False):
    """The loaded rules of [guard]. tell: called with (rule, "input" or "output") when one acts."""

    guard: labs.Guard
    patterns: list[Pattern]
    classify: Callable[..., Verdict | None] = lambda text, start=0: None
    nbytes: int = 0  # size of the classifier's weights
    tell: Callable[[str, str], Any] = lambda rule, side: None

    def check_text(self, text: str) -> str:
        """Return a prompt's text with masks. Raises Filtered when a rule refuses the text."""
        if self.guard.side == "output":
            return text
        shown, _, refused = self.apply("input", text, 0, len(text))
        if refused is None and (found := self.classify(text)):
            self.tell(refused := found.rule, "input")
        if refused is not None:
            raise Filtered(refused)
        return shown

    def check_inputs(self, inputs: labs.Inputs, *, ids: bool = False) -> labs.Inputs:
        """Raise Filtered for too many tokens or, when `ids` were sent, for their text."""
        if (tokens := len(inputs.input_ids)) > (most := self.guard.max_prompt_tokens or 2**62):
            self.tell("max_prompt_tokens", "input")
            raise Filtered("max_prompt_tokens", f"it has {tokens} tokens; the limit is {most}")
        if ids and self.check_text(inputs.prompt) != inputs.prompt:
            raise Filtered("mask", "token ids cannot be masked; send a text")
        return inputs

    def filters(self, generation: labs.Generation) -> bool:
        """Return whether answers are filtered. Raises InputError if so and logprobs are on."""
        on = self.guard.side != "input" and bool(self.patterns or self.guard.classifier)
        if on and generation.logprobs is not None:
            raise labs.InputError("logprobs: not available while [guard] filters answers")
        return on

    def apply(self, side: str, text: str, start: int, end: int) -> tuple[str, int, str | None]:
        """Return text[start:end] with masks, the position that it reaches, and a refusing rule.

        The rule is None if no rule refuses; a rule whose search takes too long refuses the text.
        """
        try:
            return self._apply(side, text, start, end)
        except labs_patterns.TooSlow as error:
            self.tell(error.name, side)
            return "", start, error.name

    def _apply(self, side: str, text: str, start: int, end: int) -> tuple[str, int, str | None]:
        found, parts = [each(text, start) for each in self.patterns], list[str]()
        while ahead := [each for each in found if each and each.start < end]:
            first = min(ahead, key=lambda each: each.start)
            self.tell(first.rule, side)
            parts += [text[start : first.start], first.mask or ""]
            if first.mask is None:
                return "".join(parts), first.start, first.rule
            start, pairs = first.end, zip(self.patterns, found, strict=True)
            found = [each(text, start) if old and old.start < start else old for each, old in pairs]
        return "".join([*parts, text[start:end]]), max(start, end), None


def load(guard: labs.Guard, spec: labs.ModelSpec = labs.ModelSpec()) -> Filters:  # noqa: B008
    """Compile the patterns and load the classifier. spec: the options of downloads."""
    found = [PII[kind] for kind in guard.deny_pii]
    if deny := guard.deny:
        names = {text.lower(): f"deny[{number}]" for number, text in enumerate(deny)}
        groups = itertools.groupby(sorted(deny), key=lambda text: text[0])  # searches much faster
        parts = (f"{re.escape(a)}(?:{'|'.join(re.escape(t[1:]) for t in b)})" for a, b in groups)
        regex = re.compile("|".join(parts), re.IGNORECASE)
        found.append(Pattern("deny", regex, max(map(len, deny)) - 1, names=names))
    for number, text in enumerate(guard.deny_patterns):
        operators = labs_patterns.Bounded(name := f"deny_patterns[{number}]", text)
        found.append(Pattern(name, operators, guard.hold_back_chars))
    found += [replace(PII[kind], mask=f"[{kind}]") for kind in guard.mask]
    return Filters(guard, found, *_classifier(guard, spec) if guard.classifier else ())


def _classifier(guard: labs.Guard, spec: labs.ModelSpec) -> tuple[Any, int]:
    """Return a function that classifies a text from `start` on, and its weights' size in bytes."""
    from transformers import pipeline

    options = {"token": spec.token, "local_files_only": spec.local_files_only}
    options |= {"use_safetensors": True, "trust_remote_code": False}  # whatever the model allows
    name, kinds = str(guard.classifier), ("AutoModelForSequenceClassification", "AutoTokenizer")
    try:
        with labs.loading():
            model, tokenizer = (labs.pretrained(kind, name, options) for kind in kinds)
    except labs.ModelError as error:
        raise labs.ModelError(f"guard_classifier = {error}") from error
    labels, known = {*guard.classifier_labels}, model.config.id2label.values()
    if unknown := labels - {*known}:
        why = f"the model has {', '.join(known)}"
        raise labs.ConfigError(f"guard_classifier_labels = {min(unknown)}: {why}")
    places = getattr(model.config, "max_position_embeddings", 514) - 2  # RoBERTa does not use two
    most = min(512, places, tokenizer.model_max_length)
    limits: dict[str, Any] = {"top_k": None, "truncation": True, "max_length": most}
    pipe = pipeline("text-classification", model, tokenizer=tokenizer, device="cpu")
    width, lock = most - 8, threading.Lock()  # characters of a part, which has fewer tokens

    def classify(text: str, start: int = 0) -> Verdict | None:
        half, first = width // 2, max(0, start - width // 2)
        with lock:
            for at in range(first, max(first + 1, len(text) - half), half):
                for each in labs_apart.run(pipe, text[at : at + width], **limits):
                    if each["label"] in labels and each["score"] >= guard.classifier_threshold:
                        return Verdict(f"classifier[{each['label']}]", start, len(text))
        return None

    return classify, sum(weight.nbytes for weight in model.parameters())


class Filter:
    """Filter an answer's events; each call returns the events to show. over: a rule ended it.

    changed: whether a rule changed its text.
    """

    def __init__(self, filters: Filters, inputs: labs.Inputs, generation: labs.Generation) -> None:
        self.over, self._filters, self._on = False, filters, filters.filters(generation)
        self._text, self.changed, self._shown, self._tokens = "", False, 0, 0
        self._judged = 0 if filters.guard.classifier else 2**62  # characters classified so far
        self._prompt, self._began, self._first = len(inputs.input_ids), time.perf_counter(), 0.0

    def all(self, events: Any) -> Iterator[labs.Event]:
        """Yield the events to show for all `events`, and close these at the end."""
        with contextlib.closing(events):
            while not self.over and (event := next(events, None)):
                yield from self(event)

    def __call__(self, event: labs.Event, *, final: bool = False) -> list[labs.Event]:
        """Return the events to show. final: no more text comes, but the answer goes on."""
        if not self._on or self.over or isinstance(event, labs.Failed):
            return [] if self.over else [event]
        done = isinstance(event, labs.Done)
        if isinstance(event, labs.Delta):
            self._text, self._tokens = self._text + event.text, self._tokens + bool(event.text)
            self._first = self._first or time.perf_counter()
        rejected, start = self._reject(done or final), self._shown
        ends = [each.final_up_to(self._text) for each in self._filters.patterns]
        end = min(len(self._text), self._judged, *([] if done or final or rejected else ends))
        shown, self._shown, refused = self._filters.apply("output", self._text, start, end)
        self.over = bool(refused or rejected)
        self.changed |= self.over or shown != self._text[start : self._shown]
        if rejected and not refused:
            self._filters.tell(rejected, "output")
        last: list[labs.Event] = [self._end(event)] if done or self.over else []
        return [labs.Delta(shown), *last] if shown else last

    def _reject(self, whole: bool) -> str | None:
        """Classify each whole sentence; cut the text after a rejected one and return its rule."""
        ends = [found.end() for found in SENTENCE_END.finditer(self._text, self._judged)]
        for end in [*ends, len(self._text)] if whole else ends:
            text, start = self._text[:end], self._judged
            if end > start and (found := self._filters.classify(text, start)):
                self._text = text
                return found.rule
            self._judged = end
        return None

    def cut(self, event: labs.Event) -> labs.Done:
        """Return the last event of an answer that a rule ends here.

        It counts one token a piece: its row has no Done yet.
        """
        if isinstance(event, labs.Done):
            cut = {"finish_reason": "content_filter", "matched_stop": None}
            return replace(event, fingerprint=None, **cut)
        first = self._first or time.perf_counter()
        rest = time.perf_counter() - first
        speed = max(self._tokens - 1, 0) / max(rest, 1e-9)
        timings = labs.Timings(0.0, first - self._began, rest, speed)
        return labs.Done("content_filter", labs.Usage(self._prompt, self._tokens), timings)

    def _end(self, event: Any) -> labs.Done:
        if self.over:
            return self.cut(event)
        done: labs.Done = replace(event, fingerprint=None) if self.changed else event
        return done
