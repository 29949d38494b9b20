# SPDX-License-Identifier: Apache-2.0
"""Both commands as click has them: their help, which subcommand is meant, errors as exit codes.

    labs_commands.Commands(run)()                 # labs-gen; run(subcommand, flags)
    labs_commands.make_command(labs_flags.SUBCOMMANDS["serve"], run, "labs-api")()

Needs labs.py, labs_arguments.py, labs_flags.py, labs_hints.py, labs_past.py, labs_terminal.py;
click.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
from collections.abc import Callable, Iterator
from types import NoneType
from typing import Any, Literal, get_args, get_origin

import click
from click.shell_completion import CompletionItem, get_completion_class

import labs
import labs_arguments
import labs_flags
import labs_hints
import labs_past
import labs_terminal

Run = Callable[[labs_flags.Subcommand, labs_flags.Values], None]
DEFAULT = "prompt"  # the subcommand of a line that names none
CONTEXT = {"max_content_width": 80, "help_option_names": ["-h", "--help"]}
VERSION = ("--version", "-h", "--help")
EXAMPLES = """\
  labs-gen "What is the capital of France?"
  echo "Name three rivers." | labs-gen --system "Be brief."
  labs-gen chat --model your-org/your-model
  labs-gen batch prompts.jsonl answers.jsonl
"""
COMMON = (  # flags of `prompt` that most people use
    ("--system TEXT", "A system message that comes before the prompt."),
    ("--model NAME", "A folder, a .gguf file or a name on the hub."),
    ("--temperature NUMBER", "0 always takes the most likely token."),
    ("--max-new-tokens NUMBER", "How long the answer may be."),
    ("--schema FILE", "A JSON schema that the answer has to match."),
    ("--json", "Write a JSON object: text, usage, settings."),
    ("--version", "Show the version and exit."),
)
MORE = """\
labs-gen COMMAND --help shows the flags of a command, labs-gen settings all
settings; these may also be in labs.toml, .env or the environment (LABS_NAME).
Exit codes: 0 done, 1 failed (LABS_DEBUG=1 shows the traceback), 2 wrong usage
or no prompt, 130 Ctrl-C.
"""


def make_option(names: list[str], kind: Any, help: str) -> click.Option:
    """Make the option for a value of this type. Its value is None or () if it is not given."""
    inner = [part for part in get_args(kind) if part is not NoneType]
    origin = get_origin(kind)
    if origin is Literal:
        return click.Option(names, type=click.Choice(inner), help=help)
    if origin is tuple and inner[0] is not labs.RouterRule:
        each = labs_arguments.Number(int) if int in get_args(inner[0]) else None
        return click.Option(names, multiple=True, type=each, help=help + " Can be repeated.")
    if origin in (dict, tuple):
        return click.Option(names, type=json.loads, metavar="JSON", help=help)
    if inner:  # Annotated[T, ...] or T | None
        return make_option(names, inner[0], help)
    if isinstance(kind, str):
        return click.Option(names, is_flag=False, flag_value=kind, metavar="[ADDRESS]", help=help)
    if kind is bool and len(names) > 1:
        names[-1] += "/--no-" + names[-1][2:]
    number = labs_arguments.Number(kind) if kind in (int, float) else kind
    return click.Option(names, type=number, is_flag=kind is bool, default=None, help=help)


def option_of(setting: labs.Setting) -> click.Option:
    """Make the option of a setting. labs.py checks its bounds."""
    names = [setting.key, *labs_flags.flags_of(setting)]
    default = "true" if setting.default is True else setting.default
    text = setting.description + (f" [default: {default}]" if default else "")
    return make_option(names, setting.type, text)


class WrongUsage(click.UsageError):
    """Wrong usage as all other errors are shown: its sentence, and the command that helps."""

    def show(self, file: Any = None) -> None:
        click.echo(f"Error: {self.message}", file=file or sys.stderr)


class Spoken(click.Command):
    """A command whose own words are checked as those of its subcommands are."""

    def make_context(
        self,
        info_name: str | None,
        args: list[str],
        parent: click.Context | None = None,
        **extra: Any,
    ) -> click.Context:
        words = [*args]
        try:
            return super().make_context(info_name, args, parent, **extra)
        except KeyboardInterrupt:
            raise click.exceptions.Exit(130) from None
        except click.UsageError as exc:
            if parent is not None or extra.get("resilient_parsing"):
                raise
            raise wrong(exc, words) from exc


class Command(Spoken):
    """One command: its own flags, then those of the settings that it reads."""

    def __init__(self, row: labs_flags.Subcommand, run: Run, name: str = "") -> None:
        own = [make_option([flag], kind, help) for flag, kind, help in labs_flags.options_of(row)]
        self._groups: dict[str, list[click.Option]] = {"Flags": own}
        for setting in labs_flags.settings_of(row):
            title = labs_flags.title_of(setting) if row.name == "serve" else ""
            self._groups.setdefault(heading(title), []).append(option_of(setting))
        arguments = [argument_of(*each) for each in row.arguments]
        options = [option for group in self._groups.values() for option in group]
        super().__init__(
            name or row.name,
            context_settings=CONTEXT,
            options_metavar="[FLAGS]",
            callback=lambda **flags: run(row, flags),
            params=[*arguments, *options],
            help=f"{row.summary}\n\n{row.more}",
            short_help=row.summary,
        )

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write each group under its title."""
        grouped = [option for group in self._groups.values() for option in group]
        other = [o for o in self.get_params(ctx) if isinstance(o, click.Option)]
        own = [*self._groups["Flags"], *(each for each in other if each not in grouped)]
        for title, group in {**self._groups, "Flags": own}.items():
            with formatter.section(title):
                formatter.write_dl([row for o in group if (row := o.get_help_record(ctx))])

    def invoke(self, ctx: click.Context) -> None:
        """Run the command. Errors become exit codes."""
        with exit_codes(ctx) if ctx.parent is None else contextlib.nullcontext():
            super().invoke(ctx)


class Commands(Spoken, click.Group):
    """labs-gen: a line that names no subcommand has the flags of `prompt`."""

    def __init__(self, run: Run) -> None:
        super().__init__("labs-gen", context_settings=CONTEXT)
        self._run, self._made = run, dict[str, Command]()
        with_version(self)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of the subcommands in the order of the table."""
        return [*labs_flags.SUBCOMMANDS]

    def get_command(self, ctx: click.Context, name: str) -> Command | None:
        """Make a subcommand when it is needed: all together take a while."""
        if name in labs_flags.SUBCOMMANDS and name not in self._made:
            self._made[name] = Command(labs_flags.SUBCOMMANDS[name], self._run)
            if name == DEFAULT:
                self._made[name].params += labs_past.hidden(make_option)
        return self._made.get(name)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the subcommand. Errors become exit codes."""
        with exit_codes(ctx):
            return super().invoke(ctx)

    def format_help(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write one screen: examples, the subcommands, a few flags, and where the others are."""
        formatter.write("Usage: labs-gen [FLAGS] [PROMPT]\n       labs-gen COMMAND [FLAGS] ...\n\n")
        formatter.write(f"Examples:\n{EXAMPLES}\n")
        rows = [(shown(row), row.summary) for row in labs_flags.ROWS]
        for title, lines in (("Commands", rows), ("Flags", COMMON)):
            formatter.write(f"{title}:\n")
            formatter.write("".join(f"  {name:24} {text}\n" for name, text in lines) + "\n")
        formatter.write(MORE)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Complete the first word: a subcommand, or a flag of the one that may be left out."""
        found = super().shell_complete(ctx, incomplete)
        if incomplete.startswith("-"):
            prompt = self._prompt(ctx)
            with click.Context(prompt, parent=ctx, resilient_parsing=True) as inner:
                found += prompt.shell_complete(inner, incomplete)
        return list({item.value: item for item in found}.values())

    def _prompt(self, ctx: click.Context) -> Command:
        found = self.get_command(ctx, DEFAULT)
        assert found is not None
        return found

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put the name of the subcommand first."""
        ctx.obj = [*args]
        return super().parse_args(ctx, self._named(ctx, args))

    def _named(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args[:1] == ["help"]:
            if args[1:] and args[1] not in labs_flags.SUBCOMMANDS:
                meant = labs_hints.like(args[1:])
                hint = f"; did you mean {meant}?" if meant else ""
                raise click.UsageError(f"there is no command {args[1]!r}{hint}")
            return [*args[1:2], "--help"]
        if not args and ctx.resilient_parsing:  # the first word is being completed
            return args
        if args and args[0] in (*labs_flags.SUBCOMMANDS, *VERSION):
            return args
        first = first_word(args)
        if args[first : first + 1] and args[first] in labs_flags.SUBCOMMANDS:
            return [args[first], *args[:first], *args[first + 1 :]]
        return [DEFAULT, *args]


def flags_with_value() -> set[str]:
    """Return all flags, of any subcommand, after which a value comes."""
    own = {each for row in labs_flags.ROWS for each in row.options} | {*labs_past.OPTIONS}
    found = [make_option([flag], kind, help) for flag, kind, help in own | {*labs_flags.CONFIG}]
    found += map(option_of, labs.settings())
    return {name for option in found if not option.is_flag for name in option.opts}


def with_version(command: click.Command) -> click.Command:
    """Give a program the flag --version."""
    return click.version_option(labs.__version__, message="%(prog)s %(version)s")(command)


def first_word(args: list[str]) -> int:
    """Return the place of the first word that is no flag and no value of one."""
    place, with_value = 0, flags_with_value() if args and args[0].startswith("-") else ()
    while place < len(args) and args[place].startswith("-") and args[place] not in ("-", "--"):
        place += 2 if args[place] in with_value else 1
    return place


def argument_of(name: str, shown: str, kind: Any) -> click.Argument:
    """Make an argument that help shows so. [X] may be left out; a tuple takes many of its type."""
    many, needed = isinstance(kind, tuple), not shown.startswith("[")
    each = kind[0] if many else kind
    return click.Argument(
        [name], type=each, nargs=-1 if many else 1, required=needed, metavar=shown
    )


def heading(title: str) -> str:
    """Return the title under which help lists the settings of a section."""
    if title:
        return f"Settings: {title.replace('_', ' ')}"
    return "Settings, which may also be in labs.toml or the environment"


def shown(row: labs_flags.Subcommand) -> str:
    """Return a subcommand with its arguments."""
    return " ".join([row.name, *(each[1] for each in row.arguments)])


@contextlib.contextmanager
def exit_codes(ctx: click.Context) -> Iterator[None]:
    """Turn errors into exit codes, which the help of labs-gen lists."""
    try:
        yield
    except KeyboardInterrupt:
        click.echo(err=True)
        ctx.exit(130)
    except click.UsageError as exc:
        raise wrong(exc, ctx.obj or []) from exc
    except (click.ClickException, click.exceptions.Exit):
        raise
    except Exception as exc:
        if os.environ.get("LABS_DEBUG") == "1":
            raise
        text = labs_terminal.shown(with_hint(exc, sentence(exc), ctx.obj or []), sys.stderr)
        raise click.ClickException(text) from exc
    finally:
        settle_output()


def wrong(exc: click.UsageError, words: list[str]) -> WrongUsage:
    """Return wrong usage in our words. words: those of the command line."""
    return WrongUsage(with_hint(exc, labs_hints.spoken(exc), words), exc.ctx)


def with_hint(exc: Exception, text: str, words: list[str]) -> str:
    """Return the sentence of an error and, where a command helps, a line that names it.

    It may hold words of files and servers, of which a terminal gets no control characters.
    """
    lines = filter(None, (text, labs_hints.after(exc, text, words)))
    return labs_terminal.shown("\n".join(lines), sys.stderr)


def sentence(exc: Exception) -> str:
    """Describe an error in one sentence. An unexpected error keeps the name of its type."""
    if isinstance(exc, labs.LabsError):
        return str(exc)
    if isinstance(exc, OSError) and (exc.filename or exc.errno == errno.ENOSPC):
        return f"{exc.filename or 'standard output, or a file'}: {exc.strerror}"
    return f"{type(exc).__name__}: {exc} (LABS_DEBUG=1 shows the traceback)"


def settle_output() -> None:
    """Flush standard output. If that fails, discard the rest: Python would report it at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def complete(config: labs.Config, flags: labs_flags.Values) -> None:
    """Write the script that completes labs-gen in a shell."""
    kind = get_completion_class(flags["shell"])
    assert kind is not None
    nothing = click.Command("labs-gen")
    click.echo(kind(nothing, {}, "labs-gen", "_LABS_GEN_COMPLETE").source())
