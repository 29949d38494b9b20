# SPDX-License-Identifier: Apache-2.0
"""Filters on what goes in and what comes out, as the section [guard] of the settings says.

    rules = labs_guard.load(config.guard, config.model)
    request = rules.check_request({"prompt": "Hi!"})  # with masks in it, or raises Filtered
    inputs = rules.check_inputs(labs.build_inputs(model, **request))
    events = labs.stream_generate(model, inputs, config.generation)
    for event in labs_guard.Filter(rules, inputs, config.generation).all(events): ...

A rule is a pure function: text -> Verdict or None. An answer is held back while a rule may yet find
something in it: what is shown depends on no cut into pieces. Needs labs.py.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

from msgspec import Struct
from msgspec.structs import asdict, replace

import labs

SENTENCE_END = re.compile(r"(?<=[.!?…])\s|[\n。！？]")  # noqa: RUF001


class Filtered(labs.InputError):
    """A rule of [guard] refuses what goes in; who asked is told which."""

    code = "content_filtered"

    def __init__(self, rule: str, why: str = "it refuses this text") -> None:
        super().__init__(f"the prompt is filtered by [guard] {rule}: {why}")
        self.rule = rule


class Verdict(Struct, frozen=True):
    """What a rule finds in a text. mask: what stands for it; None: the text is refused."""

    rule: str
    start: int
    end: int
    mask: str | None = None


class Rule(Struct, frozen=True, eq=False):
    """Returns the first verdict from `start` on, or None.

    bound: so many characters decide on a match. past: matches what of the last ones can begin none.
    size: how much of a match counts. names: of what is found, in lower case; else it is `name`.
    """

    name: str
    pattern: re.Pattern[str]
    bound: int
    past: Any = re.compile("")
    size: Callable[[str], int] = lambda found: len(found) or 1
    mask: str | None = None
    names: dict[str, str] = {}

    def __call__(self, text: str, start: int = 0) -> Verdict | None:
        while found := self.pattern.search(text, start):
            start = found.start()
            if size := self.size(found[0]):
                name = self.names.get(found[0].lower(), self.name)
                return Verdict(name, start, start + size, self.mask)
            start += 1
        return None

    def settled(self, text: str) -> int:
        """Return where the end of a text begins, of which more text may make something else."""
        return int(self.past.match(text, max(0, len(text) - self.bound)).end())


def _card(found: str) -> int:
    """Return the length of the most groups of digits that end in a card's check digit, or 0."""
    for end in reversed([group.end() for group in re.finditer(r"\d+", found)]):
        digits = [int(each) for each in found[:end] if each.isdecimal()]
        doubled = [2 * each - 9 * (each > 4) for each in digits[-2::-2]]
        if len(digits) > 12 and (sum(doubled) + sum(digits[-1::-2])) % 10 == 0:
            return end
    return 0


EMAIL = re.compile(r"[\w.%+-]{1,64}+@(?:[\w-]{1,63}\.){1,8}[^\W\d_][\w-]{1,62}")
PHONE = re.compile(  # not right after a digit and a mark, as parts of dates and versions are
    r"(?<!\w)(?<!\d[./-])(?:\+\d(?:[ ./()-]{0,2}\d){6,14}"  # +49 30 1234567
    r"|\(?(?=0(?:[ /()-]{0,2}\d){8})(?!\d\d?[/-]\d\d?[/-]\d\d)"  # (030) 123-4567, but no date
    r"0\d{1,4}\)?(?:[ /-]{0,2}\d{2,9}+){1,4}"
    r"|(?:1[ .-])?(?:\(\d{3}\) ?|\d{3}[ .-])\d{3}[ .-]\d{4})(?![./-]?\d)"  # 555-123-4567
)
CARD = re.compile(r"(?<!\d)(?<!\d\.)[2-6](?:[ -]?\d){12,18}(?!\d)")
PII = {
    "email": Rule("email", EMAIL, 640, re.compile(r"(?s)(?:.*[^\w.%+@-])?")),
    "phone": Rule("phone", PHONE, 64, re.compile(r"(?s)(?:.*[^\d ./()+-])?[^\d(+]*")),
    "card": Rule("card", CARD, 38, re.compile(r"(?s)(?:.*[^\d -])?[^2-6]*"), _card),
}


class Rules(Struct, frozen=True, eq=False):
    """What is in force. judge: the classifier. tell: is called with each (rule, side) that acts."""

    guard: labs.Guard
    rules: list[Rule]
    judge: Callable[..., Verdict | None] = lambda text, start=0: None
    tell: Callable[[str, str], Any] = lambda rule, side: None

    def check_text(self, text: str) -> str:
        """Return a text that goes in, with masks in it. Raises Filtered."""
        if self.guard.side == "output":
            return text
        shown, _, refused = self.apply("input", text, 0, len(text))
        if refused is None and (found := self.judge(text)):
            self.tell(refused := found.rule, "input")
        if refused is not None:
            raise Filtered(refused)
        return shown

    def check_request(self, request: dict[str, Any]) -> dict[str, Any]:
        """Return keywords of labs.build_inputs, their texts checked."""
        found = dict(request)
        if prompt := found.get("prompt"):
            found["prompt"] = self.check_text(prompt)
        if messages := found.get("messages"):
            plain = labs._messages(messages)
            found["messages"] = [replace(m, content=self.check_text(m.content)) for m in plain]
        return found

    def check_inputs(self, inputs: labs.Inputs, *, ids: bool = False) -> labs.Inputs:
        """Refuse too many tokens and, where `ids` were all that came, their text."""
        tokens, most = len(inputs.input_ids), self.guard.max_prompt_tokens
        if most is not None and tokens > most:
            self.tell("max_prompt_tokens", "input")
            raise Filtered("max_prompt_tokens", f"it has {tokens} tokens; at most {most}")
        if ids and self.check_text(inputs.prompt) != inputs.prompt:
            raise Filtered("mask", "token ids cannot be masked")
        return inputs

    def filters(self, generation: labs.Generation) -> bool:
        """Tell whether answers are filtered. Raises InputError if logprobs would tell the rest."""
        on = self.guard.side != "input" and bool(self.rules or self.guard.classifier)
        if on and generation.logprobs is not None:
            raise labs.InputError("logprobs: they would tell what [guard] filters from an answer")
        return on

    def shown(self, completion: labs.Completion) -> labs.Completion:
        """Return a whole answer as it may be shown."""
        whole = asdict(completion)
        delta = labs.Delta(whole.pop("text"), whole.pop("logprobs"))
        take = Filter(self, labs.Inputs((), ""), labs.Generation())
        *deltas, done = [*take(delta), *take(labs.Done(**whole))]
        found = labs.fold(cast("Any", deltas), cast("labs.Done", done))
        return replace(found, usage=completion.usage, timings=completion.timings)

    def apply(self, side: str, text: str, start: int, end: int) -> tuple[str, int, str | None]:
        """Return what text[start:end] becomes, up to where that goes, and what rule refuses it."""
        found, parts = [rule(text, start) for rule in self.rules], list[str]()
        while ahead := [each for each in found if each and each.start < end]:
            first = min(ahead, key=lambda each: each.start)
            self.tell(first.rule, side)
            parts += [text[start : first.start], first.mask or ""]
            if first.mask is None:
                return "".join(parts), first.start, first.rule
            start, pairs = first.end, zip(self.rules, found, strict=True)
            found = [rule(text, start) if old and old.start < start else old for rule, old in pairs]
        return "".join([*parts, text[start:end]]), max(start, end), None


@functools.lru_cache(8)
def load(guard: labs.Guard, spec: labs.ModelSpec = labs.ModelSpec()) -> Rules:  # noqa: B008
    """Compile the rules and load the classifier, once for all calls. spec: how the hub is asked."""
    rules = [PII[kind] for kind in guard.deny_pii]
    if guard.deny:
        names = {text.lower(): f"deny[{number}]" for number, text in enumerate(guard.deny)}
        rules.append(Rule("deny", _either(guard.deny), max(map(len, guard.deny)) - 1, names=names))
    for number, text in enumerate(guard.deny_patterns):
        rules.append(Rule(f"deny_patterns[{number}]", re.compile(text), guard.hold_back_chars))
    rules += [replace(PII[kind], mask=f"[{kind}]") for kind in guard.mask]
    return Rules(guard, rules, _judge(guard, spec)) if guard.classifier else Rules(guard, rules)


def _either(texts: Iterable[str]) -> re.Pattern[str]:
    """Find any of the texts; those with one beginning are tried together, which is much faster."""
    found = []
    for first, group in itertools.groupby(sorted(texts), key=lambda text: text[0]):
        rest = "|".join(re.escape(text[1:]) for text in group)
        found.append(f"{re.escape(first)}(?:{rest})")
    return re.compile("|".join(found), re.IGNORECASE)


def _judge(guard: labs.Guard, spec: labs.ModelSpec) -> Callable[..., Verdict | None]:
    """Return a rule that judges what comes after `start`, with some of what is before it.

    It reads so few characters at once that they are no more tokens than it can read, as a rule.
    """
    from transformers import pipeline

    options: dict[str, Any] = {"token": spec.token, "local_files_only": spec.local_files_only}
    options |= {"device": "cpu", "trust_remote_code": False}
    options["model_kwargs"] = {"use_safetensors": spec.use_safetensors}
    try:
        pipe: Any = pipeline("text-classification", guard.classifier, **options)
    except Exception as error:  # Rust code below raises bare Exceptions
        why = f"{error or type(error).__name__}".splitlines()[0]
        raise labs.ModelError(f"guard_classifier = {guard.classifier}: {why}") from error
    config, labels = pipe.model.config, {*guard.classifier_labels}
    if unknown := labels - {*config.id2label.values()}:
        known = f"the model has {', '.join(config.id2label.values())}"
        raise labs.ConfigError(f"guard_classifier_labels = {min(unknown)}: {known}")
    places = getattr(config, "max_position_embeddings", 514) - 2  # RoBERTa does not use two
    most = min(512, places, pipe.tokenizer.model_max_length)
    width, lock = most - 8, threading.Lock()  # characters of a part; threads share no tokenizer
    pipe = functools.partial(pipe, top_k=None, truncation=True, max_length=most)

    def judge(text: str, start: int = 0) -> Verdict | None:
        half, first = width // 2, max(0, start - width // 2)
        with lock:
            for at in range(first, max(first + 1, len(text) - half), half):
                for each in pipe(text[at : at + width]):
                    if each["label"] in labels and each["score"] >= guard.classifier_threshold:
                        return Verdict(f"classifier[{each['label']}]", start, len(text))
        return None

    return judge


class Filter:
    """Takes the events of one answer and returns those that may be shown; `over` once it is cut."""

    def __init__(self, rules: Rules, inputs: labs.Inputs, generation: labs.Generation) -> None:
        self.over, self._rules, self._on = False, rules, rules.filters(generation)
        self._text, self._changed, self._shown, self._tokens = "", False, 0, 0
        self._judged = 0 if rules.guard.classifier else sys.maxsize  # up to there, in characters
        self._prompt, self._began, self._first = len(inputs.input_ids), time.perf_counter(), 0.0

    def all(self, events: Any) -> Iterator[labs.Event]:
        """Yield what may be shown of all events, and close them at the end."""
        with contextlib.closing(events):
            for event in events:
                yield from self(event)
                if self.over:
                    return

    def __call__(self, event: labs.Event) -> list[labs.Event]:
        if not self._on or self.over or isinstance(event, labs.Failed):
            return [] if self.over else [event]
        done = isinstance(event, labs.Done)
        if isinstance(event, labs.Delta):
            self._text, self._tokens = self._text + event.text, self._tokens + 1
            self._first = self._first or time.perf_counter()
        rejected = self._reject(done)
        settled = [rule.settled(self._text) for rule in self._rules.rules]
        end = len(self._text) if done or rejected else min(settled, default=len(self._text))
        start, end = self._shown, min(end, self._judged)
        shown, self._shown, refused = self._rules.apply("output", self._text, start, end)
        self._changed |= shown != self._text[start : self._shown]
        self.over = bool(refused or rejected)
        if rejected and not refused:
            self._rules.tell(rejected, "output")
        last: list[labs.Event] = [self._end(event)] if done or self.over else []
        return [labs.Delta(shown), *last] if shown else last

    def _reject(self, whole: bool) -> str | None:
        """Judge each whole sentence; what the text ends with then is what is rejected."""
        ends = [found.end() for found in SENTENCE_END.finditer(self._text, self._judged)]
        for end in [*ends, *[len(self._text)] * whole]:
            if end > self._judged and (found := self._rules.judge(self._text[:end], self._judged)):
                self._text = self._text[:end]
                return found.rule
            self._judged = end
        return None

    def _end(self, event: labs.Event) -> labs.Done:
        """Return the end: of a cut answer with a token for each piece, as no end tells how many."""
        if isinstance(event, labs.Done):
            if not self.over:
                return replace(event, fingerprint=None) if self._changed else event
            changes = {"matched_stop": None, "fingerprint": None}
            return replace(event, finish_reason="content_filter", **changes)
        first, rest = self._first - self._began, time.perf_counter() - self._first
        timings = labs.Timings(0.0, first, rest, (self._tokens - 1) / max(rest, 1e-9))
        return labs.Done("content_filter", labs.Usage(self._prompt, self._tokens), timings)
