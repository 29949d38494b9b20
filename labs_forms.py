# SPDX-License-Identifier: Apache-2.0
"""How model families write calls and reasoning, as response templates and for a grammar.

    form = labs_forms.form_of(model)  # by its own response_template, or by family; tried

A family is recognised by what the chat template writes for a call: the first whose response
template reads that call back. Needs labs.py, labs_dialogue.py and labs_split.py.
"""

# ruff: noqa: RUF001 (DeepSeek's markers are fullwidth)

from __future__ import annotations

import contextlib
import importlib
import itertools
import json
import weakref
from typing import Any

import regex
from msgspec import Struct
from msgspec.structs import replace

import labs
import labs_dialogue
from labs_split import Form, Splitter, Writing


class Family(Struct, frozen=True, kw_only=True):
    """calls: the field `tool_calls` of a response_template. skips: patterns that are not text.

    again: the pattern of a call after another, where calls begin only the answer.
    """

    name: str
    writing: Writing
    calls: dict[str, Any]
    skips: tuple[str, ...] = ()
    again: str | None = None


def _field(open_pattern: str, function: Any = "{content}", **more: Any) -> dict[str, Any]:
    """Return a field `tool_calls` of a response_template, whose content is JSON by default."""
    transform = {"type": "function", "function": function}
    options = {"repeats": True, "content": "json", "transform": transform}
    return {"open_pattern": open_pattern, **options, **more}


LISTED = {"name": "{name}", "arguments": "{arguments}"}
NAMED = {"name": "{name}", "arguments": "{content}"}
XML = {
    "tag_pattern": r"<parameter=(?P<key>[^>\n]+)>\n?(?P<value>.*?)\n?</parameter>"
    r"(?=\s*(?:<parameter=|</function>|\Z))"
}
GEMMA = {"unquoted_keys": True, "string_delims": [['<|"|>', '<|"|>']]}
HARMONY = (
    r"(?:<\|start\|>assistant)?(?: to=functions\.(?P<name>[\w.-]{1,64})<\|channel\|>commentary"
    r"|<\|channel\|>commentary to=functions\.(?P<name>[\w.-]{1,64}))[^<]{0,64}"
    r"(?:<\|constrain\|>[^<]{0,64})?<\|message\|>"
)
OBJECT: dict[str, Any] = {"begin": '{"name": "', "between": '", "arguments": ', "end": "}"}
FAMILIES = (
    Family(  # Hermes, Qwen 2, 2.5 and 3, Granite 4
        name="hermes",
        writing=Writing(
            trigger="<tool_call>",
            begin='<tool_call>\n{"name": "',
            between='", "arguments": ',
            end="}\n</tool_call>",
            separator="\n",
        ),
        calls=_field("<tool_call>", close="</tool_call>"),
    ),
    Family(  # Qwen 3.5, Qwen 3 Coder
        name="qwen_xml",
        writing=Writing(
            trigger="<tool_call>",
            begin="<tool_call>\n<function=",
            between=">\n",
            end="</function>\n</tool_call>",
            separator="\n",
            arguments="xml",
        ),
        calls=_field(
            r"<tool_call>\s{0,8}<function=(?P<name>[^>\n]{1,64})>",
            NAMED,
            close_pattern=r"</function>\s*</tool_call>",
            content="xml-inline",
            content_args=XML,
        ),
    ),
    Family(  # with templates that render calls; the model's own renders none
        name="granite3",
        writing=Writing(
            trigger="<|tool_call|>", head="<|tool_call|>[", separator=", ", tail="]", **OBJECT
        ),
        calls=_field(r"<\|tool_call\|>", LISTED, transform_each=True),
    ),
    Family(  # Mistral before 2025
        name="mistral",
        writing=Writing(
            trigger="[TOOL_CALLS]", head="[TOOL_CALLS][", separator=", ", tail="]", **OBJECT
        ),
        calls=_field(r"\[TOOL_CALLS\]", LISTED, transform_each=True),
    ),
    Family(
        name="mistral_args",
        writing=Writing(trigger="[TOOL_CALLS]", begin="[TOOL_CALLS]", between="[ARGS]"),
        calls=_field(
            r"\[TOOL_CALLS\](?P<name>[\w.-]{1,64})(?:\[CALL_ID\][\w-]{0,64})?\[ARGS\]", NAMED
        ),
    ),
    Family(  # with templates that render tools; the model's own renders none
        name="deepseek31",
        writing=Writing(
            trigger="<｜tool▁calls▁begin｜>",
            head="<｜tool▁calls▁begin｜>",
            begin="<｜tool▁call▁begin｜>",
            between="<｜tool▁sep｜>",
            end="<｜tool▁call▁end｜>",
            tail="<｜tool▁calls▁end｜>",
        ),
        calls=_field(
            "<｜tool▁call▁begin｜>(?P<name>[\\w.-]{1,64})<｜tool▁sep｜>",
            NAMED,
            close="<｜tool▁call▁end｜>",
        ),
        skips=("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
    ),
    Family(
        name="gemma4",
        writing=Writing(
            trigger="<|tool_call>",
            begin="<|tool_call>call:",
            between="",
            end="<tool_call|>",
            arguments="gemma",
        ),
        calls=_field(
            r"<\|tool_call>call:(?P<name>[\w.-]{1,64})(?=\{)",
            NAMED,
            close="<tool_call|>",
            content_args=GEMMA,
        ),
    ),
    Family(
        name="gpt_oss",
        writing=Writing(
            trigger="<|channel|>commentary to=",
            begin="<|channel|>commentary to=functions.",
            between=" <|constrain|>json<|message|>",
            parallel=False,
            before="<|channel|>final<|message|>",
        ),
        calls=_field(HARMONY, NAMED),
        skips=(
            r"<\|start\|>assistant",
            r"<\|channel\|>(?:final|commentary)(?: <\|constrain\|>\w+)?<\|message\|>",
        ),
    ),
    Family(  # Llama 3.1 and later
        name="llama3",
        writing=Writing(
            trigger='{"name": "',
            begin='{"name": "',
            between='", "parameters": ',
            end="}",
            separator="; ",
            anchored=True,
        ),
        again=r"\s{0,8};\s{0,8}(?:<\|python_tag\|>)?"
        r'(?=\{\s{0,8}(?:"type": ?"function", ?)?"name"\s{0,8}:)',
        calls=_field(
            r'\A\s{0,8}(?:<\|python_tag\|>)?(?=\{\s{0,8}(?:"type": ?"function", ?)?"name"\s{0,8}:)',
            {"name": "{content.name}", "arguments": "{content.parameters}"},
        ),
    ),
)
# Where a chat template contains the first text, the model thinks between the other two.
REASONING = (
    ("</think>", "<think>", "</think>"),
    ("[/THINK]", "[THINK]", "[/THINK]"),
    ("<|channel>", "<|channel>thought\n", "<channel|>"),
    ("<|channel|>analysis", "<|channel|>analysis<|message|>", "<|end|>"),
)


# ---------------------------------------------------------------- the model's form


_FORMS: weakref.WeakKeyDictionary[Any, dict[tuple[str, bool], Form | str]]
_FORMS = weakref.WeakKeyDictionary()


def form_of(model: labs.Model, *, calls: bool = True) -> Form:
    """Return how a model writes. calls: whether it has to write calls.

    Raises InputError when its chat template shows no calls, or shows them in an unknown way.
    """
    tokenizer, template = model.tokenizer, _template_of(model, calls)
    with model.lock:
        found = _FORMS.setdefault(tokenizer, {})
        if (template, calls) not in found:
            found[template, calls] = _form_of(tokenizer, template, calls)
        form = found[template, calls]
    if isinstance(form, str):
        raise labs.InputError(f"tools: {model.spec.model_name} {form}")
    return form


def _template_of(model: labs.Model, calls: bool) -> str:
    """Return the chat template, "" if there is none or if none of several is the default."""
    tools = [TRIED] if calls else None
    with model.lock, contextlib.suppress(ValueError):
        if getattr(model.tokenizer, "chat_template", None):
            return str(model.tokenizer.get_chat_template(tools=tools))
    return ""


TRIED_ARGUMENTS = {"city": 'Zürich "west"', "days": 3}
TRIED: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "zebra_forecast",
        "description": "",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        },
    },
}


def _form_of(tokenizer: Any, template: str, calls: bool) -> Form | str:
    """Return the form of a tokenizer's answers, or why it has none that can be read."""
    if not calls:
        return _form(tokenizer, template, None, {})
    if not template or "tools" not in labs_dialogue.variables_of(tokenizer, template):
        return "has a chat template that renders no tools"
    written = _written(tokenizer, template)
    if "zebra_forecast" not in written:
        return "has a chat template that renders no calls of tools"
    own = getattr(tokenizer, "response_template", None) or {}
    fits = [each for each in FAMILIES if _reads_back(tokenizer, template, each, {}, written)]
    fits = [replace(fit, writing=_as_written(fit.writing, written)) for fit in fits]
    if own and _reads_back(tokenizer, template, fits[0] if fits else None, own, written):
        return _form(tokenizer, template, fits[0] if fits else None, own)
    if not fits:
        return "writes calls in a form that labs does not know"
    return _form(tokenizer, template, fits[0], {})


def _reads_back(
    tokenizer: Any, template: str, family: Family | None, own: dict[str, Any], written: str
) -> bool:
    """Return whether a call that the chat template writes is read as that call, also in pieces."""
    form = _form(tokenizer, template, family, own)
    if form.calls is None:
        return False
    arguments = json.dumps(TRIED_ARGUMENTS, ensure_ascii=False)
    for pieces in ([written], list(written)):
        splitter = Splitter(form, names={"zebra_forecast"}, tools=[TRIED])
        found = [*itertools.chain(*map(splitter.feed, pieces)), *splitter.end(whole=True)]
        calls = [(each.name, json.loads(each.text)) for each in found if each.kind == "call"]
        if calls != [("zebra_forecast", json.loads(arguments))]:
            return False
    return True


def _written(tokenizer: Any, template: str) -> str:
    """Return what a chat template writes for an answer that is one call, "" if it fails."""
    function = {"name": "zebra_forecast", "arguments": TRIED_ARGUMENTS}
    calls = [{"id": "abcdef123", "type": "function", "function": function}]
    user = {"role": "user", "content": "zebra user"}
    options: dict[str, Any] = {"tools": [TRIED], "chat_template": template, "tokenize": False}
    try:
        turns = [user, {"role": "assistant", "content": "", "tool_calls": calls}]
        whole = tokenizer.apply_chat_template(turns, **options)
        asked = tokenizer.apply_chat_template([user], **options, add_generation_prompt=True)
    except Exception:  # templates raise anything
        return ""
    at = len(asked) if whole.startswith(asked) else whole.rfind("zebra user") + len("zebra user")
    return str(whole[at:])


def _form(tokenizer: Any, template: str, family: Family | None, own: dict[str, Any]) -> Form:
    fields = {**({"tool_calls": family.calls} if family else {}), **own.get("fields", {})}
    reasoning = next((each[1:] for each in REASONING if each[0] in template), None)
    if (given := own.get("fields", {}).get("reasoning_content")) and isinstance(
        given.get("open"), str
    ):
        reasoning = (given["open"], given["close"])
    loaded = _load(fields)
    calls, ends = loaded.fields.get("tool_calls"), dict[str, Any]()
    if calls is not None and calls.content == "json":  # its end is found by JSON, not by a marker
        ends = {
            k: v for k, v in fields["tool_calls"].items() if k not in ("close", "close_pattern")
        }
    tokens = sorted(_special_tokens(tokenizer), key=len, reverse=True)
    said = "".join([repr(fields).replace("\\", ""), *(reasoning or ())])
    markers = [token for token in tokens if token in said]
    others = "|".join(regex.escape(token) for token in tokens if token not in (reasoning or ()))
    skips = [*(family.skips if family else ()), *([others] if others and markers else [])]
    return Form(
        template=_load(fields | {"tool_calls": ends}) if ends else loaded,
        calls=calls,
        writing=family.writing if family else None,
        reasoning=(reasoning[0], reasoning[1]) if reasoning else None,
        skips=tuple(regex.compile(each, regex.DOTALL) for each in skips),
        special=bool(markers),
        again=regex.compile(family.again) if family and family.again and not own else None,
        after_reasoning="<|start|>assistant" if reasoning and reasoning[1] == "<|end|>" else "",
    )


def _load(fields: dict[str, Any]) -> Any:
    module = importlib.import_module("transformers.utils.chat_parsing.response_templates")
    return module.load_response_template({"start_anchor": "\0", "fields": fields or {"text": {}}})


def _as_written(writing: Writing, written: str) -> Writing:
    """Return a writing with the white space that the chat template has before a name."""
    name = written.find(TRIED["function"]["name"])
    first = written[max(written.find(writing.trigger), 0) : name]
    if "".join(first.split()) != "".join((writing.head + writing.begin).split()):
        return writing
    if writing.head:
        return replace(writing, head=first.removesuffix(writing.begin))
    return replace(writing, begin=first)


def _special_tokens(tokenizer: Any) -> set[str]:
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    return {*tokenizer.all_special_tokens, *(str(each) for each in added if each.special)} - {""}


def effort_options(
    model: labs.Model, effort: str, *, calls: bool = False, usual: str = "medium"
) -> dict[str, Any]:
    """Return the template options that a reasoning_effort stands for.

    Raises InputError for one that the chat template cannot show. usual: one that it need not show,
    the protocol's default.
    """
    template = _template_of(model, calls)
    with model.lock:
        names = labs_dialogue.variables_of(model.tokenizer, template)
    knows_none = regex.search(r"""['"]none['"]""", template) is not None
    if "reasoning_effort" in names and (effort != "none" or knows_none):
        return {"reasoning_effort": effort}
    switch = next((name for name in labs_dialogue.SWITCHES if name in names), None)
    if effort == "none" and switch:
        return {switch: False}
    if effort == usual or (effort == "none" and form_of(model, calls=False).reasoning is None):
        return {}
    raise labs.InputError(f"reasoning_effort = {effort:.80}: the chat template does not read it")
