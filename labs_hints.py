# SPDX-License-Identifier: Apache-2.0
"""What to type next after an error at the shell, as a sentence.

    labs_hints.after(error, ["bacth", "in.jsonl"])  # -> "If bacth is meant to be a command: ..."

The errors of other files know nothing of the shell; TABLE says which command helps with which.
Needs labs.py, labs_flags.py, click.
"""

from __future__ import annotations

import difflib
import re
import shlex

import click

import labs
import labs_flags

# A kind of error, a pattern in its sentence, the command that helps, and how. {} is the setting
# that the pattern finds. A row counts only if its command is one of labs-gen.
TABLE = (
    (click.UsageError, r"no prompt", "--help", "has examples."),
    (click.UsageError, r"^--([\w-]+)(?:: | needs a value)", "settings {}", "shows what it may be."),
    (labs.ConfigError, r"unknown (?:setting|key) '?(\w+)", "settings {}", "shows similar names."),
    (labs.LabsError, r"(?:^|[ :])(?:--)?([\w.-]+) = ", "settings {}", "shows what it may be."),
    (
        labs.ConfigError,
        r"\.(?:toml|env): (?!cannot)",
        "doctor",
        "lists all that is wrong with the settings.",
    ),
    (labs.ModelError, r"cannot be converted in", "settings cache_dir", "tells how to move it."),
    (labs.ModelError, r"not on this machine|no such [^r]", "models", "lists those that are here."),
    (labs.LabsError, r"cannot listen on .* in use", "serve --port 0", "takes a free port."),
    (labs.PromptTooLong, r"", "explain", "shows how many tokens a prompt has."),
    (labs.LabsError, r"memory", "doctor", "shows how much memory there is."),
    (Exception, r"LABS_DEBUG", "doctor", "shows what a report of this error should hold."),
)


def after(error: Exception, sentence: str, words: list[str]) -> str:
    """Return a sentence with the command that helps, or "". words: those of the command line."""
    if isinstance(error, click.NoSuchOption) and (rows := owners(error.option_name)):
        return f"{error.option_name} is a flag of labs-gen {rows}."
    if isinstance(error, click.UsageError) and (meant := like(words[:1])):
        whole = shlex.join(["labs-gen", meant, *words[1:]])
        return f"If {words[0]} is meant to be a command: {whole}"
    if isinstance(error, click.NoSuchOption) and begins_a_prompt(error, words):
        return f"A prompt that begins with - stands after --: labs-gen -- {shlex.join(words)}"
    for kind, pattern, command, how in TABLE:
        found = re.search(pattern, sentence) if isinstance(error, kind) else None
        if not found or command.split()[0] not in (*labs_flags.SUBCOMMANDS, "--help"):
            continue
        name = setting_of(found[1], 0.6 if "similar" in how else 1.0) if "{}" in command else ""
        if name or "{}" not in command:
            return f"labs-gen {command.format(name)} {how}"
    if isinstance(error, click.UsageError) and error.ctx is not None and error.ctx.command.params:
        return f"{error.ctx.command_path} --help shows how it is used."
    return ""


def spoken(error: click.UsageError) -> str:
    """Return the sentence of wrong usage; click's own kinds in the words of labs."""
    if isinstance(error, click.NoSuchOption):
        close = difflib.get_close_matches(error.option_name, error.possibilities or (), 1)
        command = error.ctx.command_path if error.ctx else "labs-gen"
        meant = f"; did you mean {close[0]}?" if close else ""
        return f"{command} has no flag {error.option_name}{meant}"
    if isinstance(error, click.MissingParameter) and error.ctx and error.param:
        usage = error.ctx.command.collect_usage_pieces(error.ctx)[1:]
        return f"{name_of(error)} is missing: {' '.join([error.ctx.command_path, *usage])}"
    if isinstance(error, click.BadParameter) and error.param:
        return f"{name_of(error)}: {error.message.removesuffix('.')}"
    if isinstance(error, click.BadOptionUsage) and "requires an argument" in error.message:
        return f"{error.option_name} needs a value"
    extra = re.fullmatch(r"Got unexpected extra arguments? \((.*)\)", error.message, re.DOTALL)
    if extra and error.ctx:
        return f"{error.ctx.command_path} does not take {shlex.quote(extra[1])}"
    return error.format_message()


def name_of(error: click.BadParameter) -> str:
    """Return the flag or the argument that an error is about, as help shows it."""
    assert error.param is not None
    if isinstance(error.param, click.Option):
        return max(error.param.opts, key=len)
    return (error.param.metavar or "").strip("[].")


def begins_a_prompt(error: click.NoSuchOption, words: list[str]) -> bool:
    """Return whether an unknown flag may be the beginning of a prompt: -5 degrees, -hi."""
    return not error.possibilities and error.option_name[:2] != "--" and words[0][:1] == "-"


def owners(flag: str) -> str:
    """Return the subcommands that have this flag, in words."""
    *most, last = ["", *(row.name for row in labs_flags.ROWS if flag in labs_flags.all_flags(row))]
    return " and ".join(filter(None, (", ".join(most[1:]), last)))


def like(words: list[str]) -> str:
    """Return the subcommand, or --version, that is meant by a word that is none, or ""."""
    meant = {**{name: name for name in labs_flags.SUBCOMMANDS}, "version": "--version"}
    words = [word for word in words if not word.startswith("-")]
    found = [near for word in words for near in difflib.get_close_matches(word, meant, 1, 0.7)]
    return "" if not found or words[0] in labs_flags.SUBCOMMANDS else meant[found[0]]


def setting_of(name: str, like: float) -> str:
    """Return a word for labs-gen settings that finds this name, or "" where there is none.

    like: how much the names have to have in common, from 0 to 1.
    """
    name = name.rpartition(".")[2].lower().replace("-", "_").removeprefix("labs_")
    known = [part for each in labs.settings() for part in (each.key, each.field)]
    return next(iter(difflib.get_close_matches(name, known, 1, like)), "")
