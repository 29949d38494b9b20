# SPDX-License-Identifier: Apache-2.0
"""The flags of both commands: which there are, which go together, and their click options.

    command = labs_flags.make_command("labs-gen", run, labs_flags.OPTIONS, epilog)
    labs_flags.check_flags(flags)  # raises UsageError for a flag that would have no effect

Flags of settings are made from labs.settings(), so their defaults do not stand in this file. Needs
labs.py and click.
"""

from __future__ import annotations

import json
import os
import sys
from types import NoneType
from typing import Any, Literal, get_args, get_origin

import click

import labs

Options = tuple[tuple[str, str, Any, str], ...]
# Flags that are not settings of labs.py: group, flag, type and help. A string instead of a type is
# the value of the flag when it is given without a value.
RAY: Options = (
    ("Ray", "--ray", "local", "Run on this Ray cluster; auto finds one, no ADDRESS starts one."),
    (
        "Ray",
        "--replicas",
        click.IntRange(1),
        "Number of processes, each with its own model [default: 1].",
    ),
    (
        "Ray",
        "--max-replicas",
        click.IntRange(1),
        "Let Ray start up to this many replicas while requests wait.",
    ),
    ("Ray", "--num-cpus", click.FloatRange(0), "CPU cores for each replica [default: 1]."),
    (
        "Ray",
        "--num-gpus",
        click.FloatRange(0),
        "GPUs for each replica [default: 1 if there are any].",
    ),
)
STICKY: Options = (
    ("Ray", "--sticky", bool, "Send all requests of one X-Session-Id to the same replica."),
)
RAY_KEYS = [flag[2:].replace("-", "_") for _, flag, *_ in (*RAY, *STICKY)]
RAY_NEEDS = tuple(f"{key} ray" for key in RAY_KEYS if key != "ray")  # as NEEDS
OPTIONS: Options = (
    ("Input", "--prompt", str, "The prompt; - reads it from standard input, as a pipe does."),
    ("Input", "--messages-json", str, "A conversation: a JSON list of {role, content}."),
    ("Input", "--messages-file", str, "A file with the conversation; - is standard input."),
    ("Input", "--system", str, "A system message that comes before the prompt."),
    ("Input", "--tools", str, "A file with a JSON list of tools that the model may call."),
    ("Input", "--tool-choice", str, "none, auto, required or the name of a tool [default: auto]."),
    ("Input", "--chat", bool, "Talk with the model; /help lists the commands."),
    (
        "Output",
        "--stream/--no-stream",
        bool,
        "Write text while it is generated [default: on a terminal].",
    ),
    ("Output", "--schema", str, "A file with a JSON schema that the answer has to match."),
    ("Output", "--regex", str, "A regular expression that the whole answer has to match."),
    ("Output", "--one-of", tuple[str, ...], "A text that the answer may be; the model says one."),
    ("Output", "--grammar", str, "A file with a Lark grammar that the answer has to follow."),
    (
        "Output",
        "--choose",
        tuple[str, ...],
        "Show the probability of this answer among all --choose answers; none is generated.",
    ),
    ("Output", "--json", bool, "Write one JSON object: text, usage, timings, settings."),
    ("Output", "--explain", bool, "Show how the prompt would be answered, without answering it."),
    ("Output", "--verbose", bool, "Report tokens/s and how long each part took."),
    ("Output", "--show-config", bool, "Show each setting and where its value comes from."),
    ("Batch", "--input", str, "A file of prompts, one JSON object per line; - is standard input."),
    ("Batch", "--output", str, "Append answers to this file; prompts answered there are skipped."),
    (
        "Batch",
        "--batch-rows",
        click.IntRange(1),
        "Prompts computed at once [default: as many as fit in memory].",
    ),
    ("Batch", "--ordered", bool, "Write answers in the order of the prompts, not as they finish."),
    ("Batch", "--replay", str, "Generate a file of answers again and report which differ."),
    (
        "Documents",
        "--index",
        tuple[str, ...],
        "Update the database of --docs with this folder or file.",
    ),
    ("Vendoring", "--vendor", str, "Copy labs into this folder, or update the copy there."),
    ("Vendoring", "--rooms", str, "Other files to copy, separated by commas: api,cli,typed."),
    ("Vendoring", "--check", bool, "Report which files of the copy differ; write nothing."),
    ("Output", "--config", str, "The file of settings [default: ./labs.toml]."),
    *RAY,
)
SECTIONS = ("generation", "quantization", "documents")
SETTINGS = [setting for setting in labs.settings() if setting.section in SECTIONS]
ALIASES = {"model_name": ["--model"], "local_files_only": ["--offline"]}
ALIASES["documents_database"] = ["--docs"]
KEYS = [setting.key for setting in SETTINGS]
TALK = ["prompt", "messages_json", "messages_file", "system", "config", *KEYS]
TOOLS = ["tools", "tool_choice"]
HELD = ["schema", "regex", "one_of", "grammar"]
NOT_IN_CHATS = ("prompt", "continue_final_message")
# Each mode and the flags that it reads; other flags would have no effect and are refused. The first
# mode that is given counts. Without a mode, labs-gen answers one prompt as text.
READS = {
    "vendor": ["rooms", "check"],
    "show_config": ["config", *KEYS],
    "input": ["output", "ordered", "batch_rows", *RAY_KEYS, "config", *KEYS],
    "replay": ["batch_rows", "config", *KEYS],
    "index": ["config", *KEYS],
    "explain": [*TALK, *TOOLS],
    "choose": [*TALK, "json"],
    "chat": [name for name in (*TALK, "stream", "verbose", *HELD) if name not in NOT_IN_CHATS],
    "json": [*TALK, *TOOLS, "verbose", *HELD],
}
# Flags that exclude each other: at most one of each row may be given.
RIVALS = ("prompt messages_json messages_file", "rooms check", "ray ordered", " ".join(HELD))
# The first flag of each row needs one of the flags after it.
NEEDS = (
    *("output input", "ordered input", "batch_rows input replay", "ray input", *RAY_NEEDS),
    *("rooms vendor", "check vendor", "tool_choice tools"),
)

Values = dict[str, Any]  # flags by name


def check_flags(flags: Values) -> None:
    """Refuse a flag that would have no effect, because of another flag or without another one."""
    given = [n for n, value in flags.items() if is_given(value) or (value is False and n in KEYS)]
    done = next((name for name in READS if name in given), None)
    unread = [name for name in given if done and name not in (done, *READS[done])]
    rivals = [[name for name in row.split() if name in given] for row in RIVALS]
    check_needs(flags, () if done else NEEDS)
    for names in [[done or "", *unread[:1]], *rivals]:
        if len(names) > 1:
            flags_given = " and ".join(f"--{name.replace('_', '-')}" for name in names)
            raise click.UsageError(f"{flags_given} exclude each other; give one of them")
    check_needs(flags, NEEDS)


def is_given(value: Any) -> bool:
    """Return whether a flag with this value was given."""
    return value not in (None, ()) and value is not False  # 0 counts as given, but 0 == False


def check_needs(flags: Values, rows: tuple[str, ...]) -> None:
    """Refuse the first flag of a row if it is given without one of the others in the row."""
    for row in rows:
        name, *modes = row.split()
        if is_given(flags.get(name)) and not any(flags[mode] for mode in modes):
            flag, needed = name.replace("_", "-"), " or ".join(f"--{mode}" for mode in modes)
            raise click.UsageError(f"--{flag} needs {needed}")


class Command(click.Command):
    """A command that groups its options and turns errors into exit codes."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options of each group under its title; `ctx.obj` maps titles to options."""
        grouped = [option for group in ctx.obj.values() for option in group]
        other = [option for option in self.get_params(ctx) if option not in grouped]
        for title, group in {**ctx.obj, "Other": other}.items():
            with formatter.section(title):
                formatter.write_dl([row for o in group if (row := o.get_help_record(ctx))])

    def invoke(self, ctx: click.Context) -> None:
        """Run the command. EPILOG lists the exit codes that errors become."""
        try:
            super().invoke(ctx)
        except KeyboardInterrupt:
            click.echo(err=True)
            ctx.exit(130)
        except (click.ClickException, click.exceptions.Exit):
            raise
        except Exception as exc:
            if os.environ.get("LABS_DEBUG") == "1":
                raise
            raise click.ClickException(sentence(exc)) from exc
        finally:
            settle_output()


def sentence(exc: Exception) -> str:
    """Describe an error in one sentence. An unexpected error keeps the name of its type."""
    if isinstance(exc, labs.LabsError):
        return str(exc)
    if isinstance(exc, OSError) and exc.filename:
        return f"{exc.filename}: {exc.strerror}"
    return f"{type(exc).__name__}: {exc} (LABS_DEBUG=1 shows the traceback)"


def settle_output() -> None:
    """Flush standard output. If that fails, discard the rest: Python would report it at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def make_option(names: list[str], kind: Any, help: str) -> click.Option:
    """Make the option for a value of this type. Its value is None or () if it is not given."""
    inner = [part for part in get_args(kind) if part is not NoneType]
    origin = get_origin(kind)
    if origin is Literal:
        return click.Option(names, type=click.Choice(inner), help=help)
    if origin is tuple and inner[0] is not labs.RouterRule:
        each = int if int in get_args(inner[0]) else None
        return click.Option(names, multiple=True, type=each, help=help + " Can be repeated.")
    if origin in (dict, tuple):
        return click.Option(names, type=json.loads, metavar="JSON", help=help)
    if inner:  # Annotated[T, ...] or T | None
        return make_option(names, inner[0], help)
    if isinstance(kind, str):
        return click.Option(names, is_flag=False, flag_value=kind, metavar="[ADDRESS]", help=help)
    if kind is bool and len(names) > 1:
        names[-1] += "/--no-" + names[-1][2:]
    return click.Option(names, type=kind, is_flag=kind is bool, default=None, help=help)


def make_command(name: str, callback: Any, options: Options, epilog: str) -> click.Command:
    """Assemble a command from `options` and the settings of labs.py, which also checks bounds.

    labs-gen has no flags for settings of the server.
    """
    groups: dict[str, list[click.Parameter]] = {}
    for title, flag, kind, help in options:
        groups.setdefault(title, []).append(make_option([flag], kind, help))
    for setting in SETTINGS if name == "labs-gen" else labs.settings():
        in_spec = setting.key in labs.ModelSpec.__struct_fields__
        title = "Model" if in_spec else setting.section.replace("_", " ").capitalize()
        flag = "--" + setting.key.removeprefix("server_").replace("_", "-")
        names = [setting.key, *ALIASES.get(setting.key, []), flag]
        text = setting.description + (f" [default: {setting.default}]" if setting.default else "")
        groups.setdefault(title, []).append(make_option(names, setting.type, text))
    context = {"obj": groups, "max_content_width": 80}
    command = Command(name, context_settings=context, callback=callback, epilog=epilog)
    command.help = callback.__doc__
    command.params = [option for row in groups.values() for option in row]
    return click.version_option(labs.__version__, message="%(prog)s %(version)s")(command)
