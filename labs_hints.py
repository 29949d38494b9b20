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
    (click.UsageError, r"Invalid value for '--([\w-]+)'", "settings {}", "shows what it may be."),
    (labs.ConfigError, r"unknown (?:setting|key) '?(\w+)", "settings {}", "shows similar names."),
    (labs.LabsError, r"(?:^|[ :])(?:--)?([\w.-]+) = ", "settings {}", "shows what it may be."),
    (labs.ModelError, r"not on this machine|no such model", "models", "lists those that are here."),
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
    for kind, pattern, command, how in TABLE:
        found = re.search(pattern, sentence) if isinstance(error, kind) else None
        if not found or command.split()[0] not in (*labs_flags.SUBCOMMANDS, "--help"):
            continue
        name = setting_of(found[1], 0.6 if "similar" in how else 1.0) if "{}" in command else ""
        if name or "{}" not in command:
            return f"labs-gen {command.format(name)} {how}"
    return ""


def owners(flag: str) -> str:
    """Return the subcommands that have this flag, in words."""
    *most, last = ["", *(row.name for row in labs_flags.ROWS if flag in labs_flags.all_flags(row))]
    return " and ".join(filter(None, (", ".join(most[1:]), last)))


def like(words: list[str]) -> str:
    """Return the subcommand that is meant by a word that is none, or ""."""
    names = [*labs_flags.SUBCOMMANDS]
    found = [near for word in words for near in difflib.get_close_matches(word, names, 1, 0.7)]
    return "" if not found or words[0] in names else found[0]


def setting_of(name: str, like: float) -> str:
    """Return a word for labs-gen settings that finds this name, or "" where there is none.

    like: how much the names have to have in common, from 0 to 1.
    """
    name = name.rpartition(".")[2].lower().replace("-", "_").removeprefix("labs_")
    known = [part for each in labs.settings() for part in (each.key, each.field)]
    return next(iter(difflib.get_close_matches(name, known, 1, like)), "")
