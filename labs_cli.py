"""The commands labs-gen, which generates text, and labs-api, which serves a model over HTTP.

labs-gen writes the answer to standard output and everything else to standard error. labs_flags.py
says which subcommands and flags there are.

SPDX-License-Identifier: Apache-2.0. To copy it: labs-gen vendor FOLDER --rooms cli
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import io
import itertools
import logging
import os
import shlex
import sys
import time
import warnings
from collections.abc import Iterator
from typing import Any

import click
import msgspec

import labs
import labs_commands
import labs_dialogue
import labs_explain
import labs_flags
import labs_hints
import labs_past
import labs_progress
import labs_request
import labs_shell
import labs_together

tell = labs_shell.tell


def read_text(name: str) -> str:
    """Return the text of a file, or of standard input for `-`, without its last line end.

    Raises InputError when the bytes are not UTF-8.
    """
    if name == "-" and sys.stdin.isatty():
        tell("Reading text from the terminal; press Ctrl-D at its end.")
    with contextlib.nullcontext(sys.stdin.buffer) if name == "-" else open(name, "rb") as file:
        data = file.read()
    try:
        return data.decode("utf-8-sig").removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as exc:
        where = f"position {exc.start} of {'standard input' if name == '-' else name}"
        raise labs.InputError(f"byte {data[exc.start]:#04x} at {where} is not UTF-8") from exc


def json_fault(text: str, error: Exception) -> str:
    """Describe what is wrong with JSON text, in plain words if labs_tokens.py is present."""
    with contextlib.suppress(labs.ConfigError):
        labs.require("labs_tokens")
        import labs_tokens

        return labs_tokens.json_fault(text.encode(errors="surrogatepass"), error)
    return str(error)


def read_messages(flags: labs_flags.Values) -> labs_shell.Messages:
    """Return the messages that the flags give, --system first. --prompt is not one of them."""
    text, where = flags["messages_json"], "--messages-json"
    if flags["messages_file"] is not None:
        text, where = read_text(flags["messages_file"]), flags["messages_file"]
    try:
        messages = msgspec.json.decode("[]" if text is None else text, type=labs_shell.Messages)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as exc:
        reason = json_fault(text or "", exc)
        raise labs.InputError(f"{where}: {reason}; expected a list of {{role, content}}") from exc
    if flags["system"] is None:
        return messages
    if any(message.role == "system" for message in messages):
        raise click.UsageError("--system is given, but the messages have a system message too")
    return [labs.Message(role="system", content=flags["system"]), *messages]


def read_prompt(flags: labs_flags.Values) -> labs_request.Prompt:
    """Return the prompt or the messages of the flags."""
    messages, prompt = read_messages(flags), flags["prompt"]
    if flags["messages_json"] is not None or flags["messages_file"] is not None:
        if not messages:
            raise click.UsageError("no prompt: the list of messages is empty")
        return labs_request.Prompt(messages=tuple(messages))
    if prompt is None and sys.stdin.isatty():
        raise click.UsageError("no prompt: give a prompt in quotes, messages or a pipe")
    if prompt in (None, "-"):
        prompt = read_text("-")
    if not prompt.strip():
        raise click.UsageError("no prompt: the text is empty")
    if not messages:
        return labs_request.Prompt(prompt=prompt)
    return labs_request.Prompt(messages=(*messages, labs.Message(role="user", content=prompt)))


def read_schema(name: str | None) -> labs_request.ResponseFormat | None:
    """Return the response format for a file with a JSON schema, or None without a file."""
    if name is None:
        return None
    wanted = labs_request.JsonSchema(
        schema=read_json(name, dict[str, Any], "a JSON schema, an object")
    )
    return labs_request.ResponseFormat(type="json_schema", json_schema=wanted)


def read_structured(flags: labs_flags.Values) -> labs_request.StructuredOutputs | None:
    """Return what --regex, --one-of or --grammar ask for, None without any of them."""
    grammar = None if flags.get("grammar") is None else read_text(flags["grammar"])
    found: dict[str, Any] = {"regex": flags.get("regex"), "grammar": grammar}
    found["choice"] = flags.get("one_of") or None
    if set(found.values()) == {None}:
        return None
    return labs_request.StructuredOutputs(**found)


def read_json(name: str, kind: Any, expected: str) -> Any:
    """Return the contents of a JSON file. Raises InputError, which says what was expected."""
    text = read_text(name)
    try:
        return msgspec.json.decode(text, type=kind)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as exc:
        reason = json_fault(text, exc)
        raise labs.InputError(f"{name}: {reason}; expected {expected}") from exc


def answer_file(config: labs.Config, flags: labs_flags.Values) -> None:
    """Answer the lines of a file. Exit with code 1 if a line failed, now or in an earlier run."""
    labs.require("labs_jsonl")
    import labs_jsonl

    tally, address = labs_jsonl.Tally(), flags["ray"]
    source, target, rows = flags["input"], flags["output"] or "-", flags["batch_rows"]
    try:
        if address is None:
            context = labs_request.open_context(config)
            batching = labs_jsonl.Batching(rows=rows, ordered=bool(flags["ordered"]))

            def answer(lines: labs_jsonl.Lines) -> Iterator[bytes]:
                model = load_model(config) if config.model.kind == "text" else None
                begin()
                return labs_jsonl.answer_lines(model, context, lines, tally, batching)

            longest = config.server.max_body_bytes
            with reported(flags.get("report"), (source, target), tally) as begin:
                labs_jsonl.answer_file(answer, source, target, tally, longest)
        else:
            labs.require("labs_ray", "ray", "a2wsgi")
            import labs_ray

            cluster = labs_ray.cluster_of(take_ray(flags)[1])
            files = labs_ray.Files(source, target, rows)
            labs_ray.answer_files(config, files, address, cluster, tally)
    except BrokenPipeError:  # the reader has closed the pipe, which is not a failure
        raise click.exceptions.Exit(0) from None
    finally:
        if tally.done or tally.failed or tally.skipped:
            tell(f"[{tally}]")
    if tally.failed or tally.errors:
        raise click.exceptions.Exit(1)


@contextlib.contextmanager
def reported(report: str | None, files: tuple[str, str], tally: Any) -> Iterator[Any]:
    """Write the file of --report at the end, if there is one. Yield what starts its clock."""
    if report is None:
        yield lambda: None
        return
    labs.require("labs_report")
    import labs_report

    with labs_report.written(report, files) as findings:
        tally.watch = findings.add
        yield findings.begin


def replay(config: labs.Config, flags: labs_flags.Values) -> None:
    """Report how each answer of a file compares. Exit with code 1 if a comparable one differs."""
    labs.require("labs_jsonl", "labs_replay")
    import labs_jsonl
    import labs_replay

    counts = dict.fromkeys(("same", "differs", "not comparable"), 0)
    with labs_jsonl.opened(flags["replay"]) as file:
        first = list(itertools.islice(file, 1))
        config = labs_replay.with_their_weights(config, b"".join(first))
        context = labs_request.open_context(config)
        model, lines = load_model(config), enumerate(itertools.chain(first, file), 1)
        verdicts = labs_replay.replay(model, context, lines, flags["batch_rows"])
        shown = not sys.stdout.isatty()  # else each verdict is a line there
        for found in labs_progress.over(verdicts, "Comparing", "answers") if shown else verdicts:
            counts[found.verdict] += 1
            at = f" at token {found.token}" if found.token else ""
            why = f" ({found.why})" if found.why else ""
            labs_shell.write(f"{found.id}: {found.verdict}{at}{why}\n")
    tell(f"[{', '.join(f'{count} {verdict}' for verdict, count in counts.items())}]")
    if not any(counts.values()):
        raise labs.InputError(f"{flags['replay']}: holds no answers")
    if counts["differs"]:
        raise click.exceptions.Exit(1)


def index(config: labs.Config, flags: labs_flags.Values) -> None:
    """Update the database of documents and report what was done."""
    labs.require("labs_rag")
    import labs_rag

    if config.documents.database is None:
        raise click.UsageError("an index needs --docs DATABASE")
    absent = [each for each in flags["index"] if not os.path.exists(each)]
    if absent and not os.path.exists(config.documents.database):  # else the files may be in it
        raise labs.InputError(f"{absent[0]}: there is no such file or folder")
    encoder = labs_rag.encoder_of(config)
    done = labs_rag.index(flags["index"], config.documents.database, encoder=encoder)
    for each in done.unusable:
        tell(f"passed over: {each}")
    counts = f"{done.written} files written, {done.unchanged} unchanged, {done.removed} removed"
    tell(f"[{counts}; {done.chunks} new chunks]")


def warm(config: labs.Config, flags: labs_flags.Values) -> None:
    """Compute ahead what later prompts begin with. Exit with code 1 if one is not kept."""
    labs.require("labs_warm", "labs_prefix_files")
    import labs_warm

    name, context = flags["file"], labs_request.open_context(config)
    config, owners = context.config, labs_warm.check(config, flags["key"])
    if name.endswith(".jsonl"):
        if flags["tools"] is not None:
            raise click.UsageError("--tools goes with a text: each line of a file has its own")
        aheads = labs_warm.of_lines(context, name)
    else:
        if name != "-" and os.path.getsize(name) > 4 * config.server.max_prompt_bytes:
            raise labs.InputError(f"{name}: is too large for server_max_prompt_bytes")
        prompt = labs_warm.of_text(config, name, read_text(name))
        asked = labs_request.check(context, request_of(flags, prompt))
        aheads = [labs_warm.Ahead(name, asked)]
    known, failed = set[bytes](), False
    for form in labs_warm.forms(config):
        warmer = labs_warm.Warmer(context, form, owners)
        for line in () if warmer.mark in known else warmer.lines(aheads):
            labs_shell.write(f"{line}\n")
        known.add(warmer.mark)
        failed |= warmer.failed
        del warmer
        labs.load_model.cache_clear()  # type: ignore[attr-defined]
    if failed:
        raise click.exceptions.Exit(1)


def take_ray(flags: labs_flags.Values) -> tuple[str | None, labs_flags.Values]:
    """Remove Ray's flags from `flags`. Return the cluster's address, if any, and the others."""
    taken = {name: flags.pop(name) for name in labs_flags.RAY_KEYS if name in flags}
    return taken.pop("ray", None), taken


def vendor(config: labs.Config, flags: labs_flags.Values) -> None:
    """Copy labs into a folder, or report which copies differ; exit with code 1 if one does."""
    labs.require("labs_vendor")
    import labs_vendor

    folder, rooms = flags["vendor"], flags["rooms"] or ""
    if flags["check"]:
        found = labs_vendor.check(folder)
        labs_shell.write("".join(f"{name}: {state}\n" for name, state in found.items()))
        raise click.exceptions.Exit(int({*found.values()} != {"same"}))
    count = labs_vendor.vendor(folder, [room.strip() for room in rooms.split(",") if rooms])
    tell(f"[{count} files written]")


def show_config(config: labs.Config, flags: labs_flags.Values) -> None:
    """Write each setting and where its value comes from."""
    labs_shell.write(labs_explain.dump_effective_config(config).rstrip("\n") + "\n")


def run(row: labs_flags.Subcommand, flags: labs_flags.Values) -> None:
    """Run a subcommand of labs-gen with the flags that were given to it."""
    flags = with_text(flags)
    if row.name == "prompt":
        row, flags = labs_past.renamed(flags)
    labs_together.check_flags(row, flags)
    config = labs.Config()
    if row.loads:
        overrides = labs_flags.overrides_of(flags)
        config = labs.load_config(flags.get("config"), overrides=overrides)
    function_of(row.run)(config, flags)


def with_text(flags: labs_flags.Values) -> labs_flags.Values:
    """Make the words of the line the prompt. Raises UsageError for more than one."""
    words = flags.get("text", ())
    rest = {name: value for name, value in flags.items() if name != "text"}
    if len(words) > 1:
        whole = shlex.join(["--"] * words[0].startswith("-") + [" ".join(words)])
        raise click.UsageError(f"a prompt of several words needs quotes: labs-gen {whole}")
    if words and rest["prompt"] is not None:
        raise click.UsageError("--prompt and a prompt without it exclude each other; give one")
    if words and (meant := labs_hints.like(words)) and sys.stderr.isatty():
        tell(f"[answered as a prompt; for the command: labs-gen {meant}]")
    return {**rest, "prompt": words[0]} if words else rest


def function_of(name: str) -> Any:
    """Return the function that a row of labs_flags names as "room:function"."""
    room, _, function = name.partition(":")
    if room == "labs_cli":  # which may be __main__
        return globals()[function]
    labs.require(room)
    package = __spec__.parent if __spec__ is not None else ""  # of copies inside a package
    return getattr(importlib.import_module(f"{package}.{room}".lstrip(".")), function)


def request_of(flags: labs_flags.Values, prompt: labs_request.Prompt) -> labs_request.Request:
    """Return the request of these flags. Raises ConfigError for a file of labs that it needs."""
    schema, held = read_schema(flags.get("schema")), read_structured(flags)
    if flags.get("tools") is not None:
        labs.require("labs_tools")
        tools = read_json(flags["tools"], tuple[labs_dialogue.Tool, ...], "a list of tools")
        prompt = msgspec.structs.replace(prompt, tools=tools)
    if flags.get("choose") or schema is not None or held is not None:
        labs.require("labs_typed")
    choice = flags.get("tool_choice") or "auto"
    return labs_request.Request(
        prompts=(prompt,), response_format=schema, structured_outputs=held, tool_choice=choice
    )


def open_session(
    context: labs_request.Context, asked: labs_request.Request, flags: labs_flags.Values
) -> labs_shell.Session:
    """Load the model for one stream."""
    model, imports_s = load_for_one_stream(context.config)
    verbose = bool(flags.get("verbose"))
    return labs_shell.Session(context, asked, model, streams(flags), verbose, imports_s)


def streams(flags: labs_flags.Values) -> bool:
    """Return whether text is written while it is generated."""
    return sys.stdout.isatty() if flags.get("stream") is None else bool(flags["stream"])


def answer_prompt(config: labs.Config, flags: labs_flags.Values) -> None:
    """Answer one prompt. A request that cannot work is refused before the model loads."""
    asked, context = request_of(flags, read_prompt(flags)), labs_request.open_context(config)
    request = labs_request.check(context, asked)
    session = open_session(context, asked, flags)
    if flags["choose"]:
        labs_shell.choose(session, request, flags["choose"], flags["json"])
    elif flags["json"]:
        labs_shell.answer_json(session, request)
    else:
        for _ in labs_shell.answer(session, request):
            pass


def explain(config: labs.Config, flags: labs_flags.Values) -> None:
    """Show how one prompt would be answered."""
    asked, context = request_of(flags, read_prompt(flags)), labs_request.open_context(config)
    request = labs_request.check(context, asked)
    labs_shell.explain(open_session(context, asked, flags), request)


def chat(config: labs.Config, flags: labs_flags.Values) -> None:
    """Talk with the model. What cannot work in any turn is refused before the model loads."""
    labs.require("labs_chat")
    import labs_chat

    messages, context = read_messages(flags), labs_request.open_context(config)
    asked = request_of(flags, labs_request.Prompt(messages=tuple(messages)))
    labs_request.check(context, msgspec.structs.replace(asked, prompts=()))
    ways = labs_chat.Ways(
        load_for_chat,
        read_json,
        streams(flags),
        bool(flags.get("verbose")),
        keep=not flags.get("no_history"),
    )
    labs_chat.chat(context, asked, ways)


def load_for_one_stream(config: labs.Config) -> tuple[labs.Model, float]:
    """Load a model for one stream. Return it and the seconds that imports took."""
    began = time.perf_counter()
    model = load_model(labs_shell.for_one_stream(config))
    imports_s = time.perf_counter() - began - model.load_s
    return msgspec.structs.replace(model, prefixes=labs.new_prefixes()), imports_s


def load_for_chat(config: labs.Config) -> tuple[labs.Model, float]:
    """Load a model for a chat, whose prompts may begin with columns on disk."""
    import labs_turns

    model, imports_s = load_for_one_stream(config)
    prefixes = labs_turns.prefixes_of(model, config.server)
    return msgspec.structs.replace(model, prefixes=prefixes), imports_s


def load_model(config: labs.Config) -> labs.Model:
    """Load the model without garbage collection: its objects live as long as the process."""
    gc.disable()
    try:
        return labs.load_model(config)
    finally:
        gc.freeze()
        gc.enable()


def silence_libraries() -> None:
    """Hide the warnings of libraries, which are meant for developers."""
    warnings.simplefilter("ignore")
    for name in ("TRANSFORMERS_VERBOSITY", "HF_HUB_VERBOSITY"):  # read at import
        os.environ.setdefault(name, "error")
    for name in ("accelerate", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)


def start(command: click.Command) -> None:
    """Run a command as a program. Input and output are UTF-8 whatever the locale says."""
    # A socket would take the number of a standard descriptor that is closed.
    opened = [_open_if_closed(descriptor) for descriptor in range(3)]
    sys.stdin = sys.stdin or open(0)  # noqa: SIM115
    if opened[1] and command.name != "labs-api" and sys.argv[1:2] != ["serve"]:  # over HTTP
        sys.exit("Error: standard output is closed")
    sys.stdout, sys.stderr = sys.stdout or open(1, "w"), sys.stderr or open(2, "w")  # noqa: SIM115
    if not os.environ.get("LABS_DEBUG"):
        silence_libraries()
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="surrogateescape")
    labs_progress.show()
    arguments = [os.fsencode(text).decode("utf-8", "surrogateescape") for text in sys.argv[1:]]
    try:
        command(arguments, prog_name=command.name)
    except OSError as error:  # click could not write its own text, such as that of --help
        labs_commands.settle_output()
        sys.exit(f"Error: standard output: {error.strerror}")


def _open_if_closed(descriptor: int) -> bool:
    """Open the null device as a standard descriptor that is closed; return whether it was."""
    try:
        os.fstat(descriptor)
    except OSError:
        return os.open(os.devnull, os.O_RDWR) == descriptor  # the lowest free number
    return False


def main() -> None:
    """Run labs-gen."""
    ending_at_once(labs_commands.Commands(run))


# How torch's threads wait (see labs_apart.py), and that weights of 2 MB and more lie in huge pages
# (Linux), which saves up to a tenth of a step. torch reads both when it is imported.
TORCH = {"GOMP_SPINCOUNT": "10000", "THP_MEM_ALLOC_ENABLE": "1"}


def ending_at_once(command: click.Command) -> None:
    """Run a program and exit without freeing memory, which takes a fifth of the time."""
    for name, value in TORCH.items():
        os.environ.setdefault(name, value)
    try:
        start(command)
    except SystemExit as end:
        if not isinstance(end.code, int):
            raise
        for stream in filter(None, (sys.stdout, sys.stderr)):
            stream.flush()
        os._exit(end.code)


# ---------------------------------------------------------------- labs-api


def serve(config: labs.Config, flags: labs_flags.Values) -> None:
    """Serve a model over HTTP: REST, SSE and the endpoints of OpenAI and Anthropic."""
    address, cluster = take_ray(flags)
    if address is None:
        labs.require("labs_serve")
        import labs_serve

        labs_serve.serve(config)
        return
    labs.require("labs_ray", "ray", "a2wsgi")
    import labs_ray

    labs_request.check_documents(labs_request.Context(config, {}))  # each replica checks the rest
    labs_ray.serve_replicas(config, address, labs_ray.cluster_of(cluster))


def make_api() -> click.Command:
    """Make labs-api, which is labs-gen serve."""
    command = labs_commands.Command(labs_flags.SUBCOMMANDS["serve"], run, "labs-api")
    return labs_commands.with_version(command)


def main_api() -> None:
    """Run labs-api as a program."""
    ending_at_once(make_api())


if __name__ == "__main__":
    main()
