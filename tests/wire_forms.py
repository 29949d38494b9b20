# SPDX-License-Identifier: Apache-2.0
"""Chat templates of the tests' own, one for each family's form of calls, and their answers."""

# ruff: noqa: RUF001 (DeepSeek's markers are fullwidth)

from __future__ import annotations

import json
from typing import Any

import kit
import transformers

TOOLS = (
    "{% if tools %}<sys>{% for t in tools %}{{ t.function | tojson }}{% endfor %}<end>{% endif %}"
)
START = "{% for m in messages %}{% if m.role == 'assistant' %}"
ELSE = "<end>{% else %}<user>{{ m.content }}<end>{% endif %}{% endfor %}"
END = "{% if add_generation_prompt %}<bot>{% endif %}"
CALLS = "{% for c in m.tool_calls or [] %}{% set f = c.function %}"
THINK = "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}"


def _template(calls: str, start: str = "<bot>", before: str = "", end: str = END) -> str:
    return f"{TOOLS}{START}{start}{before}{{{{ m.content or '' }}}}{calls}{ELSE}{end}"


def _listed(head: str, name: str = "arguments") -> str:
    call = '{"name": "{{ f.name }}", "' + name + '": {{ f.arguments | tojson }}}'
    comma = "{% if not loop.last %}, {% endif %}"
    return "{% if m.tool_calls %}" + head + "[" + CALLS + call + comma + "{% endfor %}]{% endif %}"


HERMES = (
    CALLS + '<tool_call>\n{"name": "{{ f.name }}", "arguments": {{ f.arguments | tojson }}}'
    "\n</tool_call>{% if not loop.last %}\n{% endif %}{% endfor %}"
)
XML = (
    CALLS + "<tool_call>\n<function={{ f.name }}>\n{% for k, v in f.arguments.items() %}"
    "<parameter={{ k }}>\n{{ v if v is string else v | tojson }}\n</parameter>\n{% endfor %}"
    "</function>\n</tool_call>{% if not loop.last %}\n{% endif %}{% endfor %}"
)
GEMMA = (
    '{% macro show(v) %}{% if v is string %}<|"|>{{ v }}<|"|>{% elif v is mapping %}'
    "{ {%- for k, w in v.items() %}{{ k }}:{{ show(w) }}{% if not loop.last %},{% endif %}"
    "{% endfor -%} }{% elif v is sequence %}[{% for w in v %}{{ show(w) }}"
    "{% if not loop.last %},{% endif %}{% endfor %}]{% else %}{{ v | tojson }}{% endif %}"
    "{% endmacro %}"
)
GEMMA_CALLS = CALLS + "<|tool_call>call:{{ f.name }}{{ show(f.arguments) }}<tool_call|>{% endfor %}"
DEEPSEEK = (
    "{% if m.tool_calls %}<｜tool▁calls▁begin｜>" + CALLS + "<｜tool▁call▁begin｜>{{ f.name }}"
    "<｜tool▁sep｜>{{ f.arguments | tojson }}<｜tool▁call▁end｜>{% endfor %}"
    "<｜tool▁calls▁end｜>{% endif %}"
)
LLAMA = CALLS + '{"name": "{{ f.name }}", "parameters": {{ f.arguments | tojson }}}{% endfor %}'
MISTRAL_ARGS = CALLS + "[TOOL_CALLS]{{ f.name }}[ARGS]{{ f.arguments | tojson }}{% endfor %}"
HARMONY = TOOLS + (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% for c in m.tool_calls or [] %}"
    "{% set f = c.function %}{% if m.thinking %}<|start|>assistant<|channel|>analysis<|message|>"
    "{{ m.thinking }}<|end|>{% endif %}<|start|>assistant to=functions.{{ f.name }}<|channel|>"
    "commentary json<|message|>{{ f.arguments | tojson }}<|call|>{% endfor %}{% if m.content %}"
    "<|start|>assistant<|channel|>final<|message|>{{ m.content }}<|end|>{% endif %}{% else %}"
    "<|start|>user<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)

# {family: (template, special tokens, added tokens that are not special)}
FORMS: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "hermes": (
        _template(HERMES, before=THINK),
        (),
        ("<tool_call>", "</tool_call>", "<think>", "</think>"),
    ),
    "qwen_xml": (
        _template(XML, before=THINK, end=END.replace("<bot>", "<bot><think>\n")),
        (),
        ("<tool_call>", "</tool_call>", "<think>", "</think>"),
    ),
    "granite3": (_template(_listed("<|tool_call|>")), ("<|tool_call|>",), ()),
    "mistral": (_template(_listed("[TOOL_CALLS] ")), ("[TOOL_CALLS]",), ()),
    "mistral_args": (_template(MISTRAL_ARGS), ("[TOOL_CALLS]", "[ARGS]"), ()),
    "deepseek31": (
        _template(DEEPSEEK, before=THINK),
        (),
        (
            *("<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>"),
            *("<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>", "<think>", "</think>"),
        ),
    ),
    "gemma4": (
        GEMMA + _template(GEMMA_CALLS) + "{# <|channel>thought #}",
        ("<|tool_call>", "<tool_call|>", '<|"|>', "<|channel>", "<channel|>"),
        (),
    ),
    "gpt_oss": (
        HARMONY + "{# <|channel|>analysis #}",
        ("<|start|>", "<|channel|>", "<|message|>", "<|constrain|>", "<|call|>"),
        (),
    ),
    "llama3": (_template(LLAMA), ("<|python_tag|>",), ()),
}
TURNS = ("<sys>", "<user>", "<bot>", "<end>", "<eos>", "<|end|>")


def tokenizer_of(family: str) -> Any:
    """Return a tokenizer of bytes with the template and the markers of a family."""
    template, special, added = FORMS[family]
    tokenizer = kit.byte_tokenizer(template)
    tokenizer.add_special_tokens({"additional_special_tokens": [*TURNS, *special]})
    tokenizer.add_tokens([transformers.AddedToken(each, special=False) for each in added])
    return tokenizer


def written(family: str, name: str, arguments: dict[str, Any]) -> str:
    """Return how a model of this family writes a call."""
    text = json.dumps(arguments, ensure_ascii=False)
    both = {"hermes": "arguments", "llama3": "parameters"}
    if family in both:
        call = f'{{"name": "{name}", "{both[family]}": {text}}}'
        return f"<tool_call>\n{call}\n</tool_call>" if family == "hermes" else call
    if family in ("granite3", "mistral"):
        head = {"granite3": "<|tool_call|>", "mistral": "[TOOL_CALLS] "}[family]
        return f'{head}[{{"name": "{name}", "arguments": {text}}}]'
    if family == "qwen_xml":
        values = {k: v if isinstance(v, str) else json.dumps(v) for k, v in arguments.items()}
        inner = "".join(f"<parameter={k}>\n{v}\n</parameter>\n" for k, v in values.items())
        return f"<tool_call>\n<function={name}>\n{inner}</function>\n</tool_call>"
    if family == "gemma4":
        return f"<|tool_call>call:{name}{_gemma(arguments)}<tool_call|>"
    if family == "gpt_oss":
        head = f"<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>"
        return f"{head}{text}"
    if family == "mistral_args":
        return f"[TOOL_CALLS]{name}[ARGS]{text}"
    call = f"<｜tool▁call▁begin｜>{name}<｜tool▁sep｜>{text}<｜tool▁call▁end｜>"
    return f"<｜tool▁calls▁begin｜>{call}<｜tool▁calls▁end｜>"


def _gemma(value: Any) -> str:
    if isinstance(value, str):
        return f'<|"|>{value}<|"|>'
    if isinstance(value, dict):
        return "{" + ",".join(f"{k}:{_gemma(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_gemma, value)) + "]"
    return json.dumps(value)
