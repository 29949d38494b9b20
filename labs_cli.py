"""The commands labs-gen, which generates text, and labs-api, which serves a model over HTTP.

labs-gen writes the answer to standard output and everything else to standard error. labs_flags.py
says which flags there are.

SPDX-License-Identifier: Apache-2.0. To copy it: labs-gen --vendor FOLDER --rooms cli
"""

from __future__ import annotations

import contextlib
import gc
import io
import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator
from typing import Any

import click
import msgspec

import labs
import labs_dialogue
import labs_explain
import labs_flags
import labs_request
import labs_shell

EPILOG = """\b
Examples:
  labs-gen --prompt "What is the capital of France?"
  echo "Name three rivers." | labs-gen --system "Be brief."
  labs-gen --prompt - --temperature 0 --json < question.txt
  labs-gen --messages-json '[{"role": "user", "content": "Hello!"}]'
  labs-gen --chat --system "You are a pirate." --seed 1
  labs-gen --model your-org/your-model --load-in-4bit --prompt "Hello!"
  labs-gen --prompt "Name a city." --schema city.json
  labs-gen --prompt "Is it Paris?" --choose yes --choose no
  labs-gen --prompt "Is it cold in Rome?" --tools tools.json
  labs-gen --input prompts.jsonl --output answers.jsonl
  labs-gen --input 's3://bucket/*.jsonl' --output answers --ray --replicas 4
  labs-gen --replay answers.jsonl
  labs-gen --index docs --docs docs.db
  labs-gen --docs docs.db --prompt "How is it installed?"
  labs-gen --temperature 0.2 --show-config
  labs-gen --vendor src/thing --rooms api,cli

\b
Settings (Model, Generation, ...) can also be given in labs.toml, or as
LABS_<NAME> in the environment or in .env (LABS_MODEL for --model).
Exit codes: 0 done, 1 failed (LABS_DEBUG=1 shows the traceback), 2 wrong usage
or no prompt, 130 Ctrl-C.
"""

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
    """Return the prompt or the messages of the flags. A chat may begin without messages."""
    messages, prompt = read_messages(flags), flags["prompt"]
    if flags["chat"] or flags["messages_json"] is not None or flags["messages_file"] is not None:
        if not messages and not flags["chat"]:
            raise click.UsageError("no prompt: the list of messages is empty")
        return labs_request.Prompt(messages=tuple(messages))
    if prompt is None and sys.stdin.isatty():
        raise click.UsageError("no prompt: give --prompt TEXT, messages, --chat or a pipe")
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
    grammar = None if flags["grammar"] is None else read_text(flags["grammar"])
    found = {"regex": flags["regex"], "choice": flags["one_of"] or None, "grammar": grammar}
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
    """Answer the lines of --input. Exit with code 1 if a line failed, now or in an earlier run."""
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
                return labs_jsonl.answer_lines(model, context, lines, tally, batching)

            longest = config.server.max_body_bytes
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


def replay(config: labs.Config, flags: labs_flags.Values) -> None:
    """Report how each line of --replay compares. Exit with code 1 if a comparable one differs."""
    labs.require("labs_jsonl", "labs_replay")
    import labs_jsonl
    import labs_replay

    counts = dict.fromkeys(("same", "differs", "not comparable"), 0)
    context = labs_request.open_context(config)
    with labs_jsonl.opened(flags["replay"]) as file:
        model, lines = load_model(config), enumerate(file, 1)
        for found in labs_replay.replay(model, context, lines, flags["batch_rows"]):
            counts[found.verdict] += 1
            at = f" at token {found.token}" if found.token else ""
            why = f" ({found.why})" if found.why else ""
            labs_shell.write(f"{found.id}: {found.verdict}{at}{why}\n")
    tell(f"[{', '.join(f'{count} {verdict}' for verdict, count in counts.items())}]")
    if counts["differs"]:
        raise click.exceptions.Exit(1)


def index(config: labs.Config, flags: labs_flags.Values) -> None:
    """Update the database of documents and report what was done."""
    labs.require("labs_rag")
    import labs_rag

    if config.documents.database is None:
        raise click.UsageError("--index needs --docs DATABASE")
    encoder = labs_rag.encoder_of(config)
    done = labs_rag.index(flags["index"], config.documents.database, encoder=encoder)
    for each in done.unusable:
        tell(f"passed over: {each}")
    counts = f"{done.written} files written, {done.unchanged} unchanged, {done.removed} removed"
    tell(f"[{counts}; {done.chunks} new chunks]")


def take_ray(flags: labs_flags.Values) -> tuple[str | None, labs_flags.Values]:
    """Remove Ray's flags from `flags`. Return the cluster's address, if any, and the others."""
    taken = {name: flags.pop(name) for name in labs_flags.RAY_KEYS if name in flags}
    return taken.pop("ray", None), taken


def vendor(folder: str, rooms: str, check: bool) -> None:
    """Copy labs into a folder, or report which copies differ; exit with code 1 if one does."""
    labs.require("labs_vendor")
    import labs_vendor

    if check:
        found = labs_vendor.check(folder)
        labs_shell.write("".join(f"{name}: {state}\n" for name, state in found.items()))
        raise click.exceptions.Exit(int({*found.values()} != {"same"}))
    count = labs_vendor.vendor(folder, [room.strip() for room in rooms.split(",") if rooms])
    tell(f"[{count} files written]")


def run(**flags: Any) -> None:
    """Generate text with a Hugging Face instruct model."""
    labs_flags.check_flags(flags)
    if flags["vendor"]:
        vendor(flags["vendor"], flags["rooms"] or "", flags["check"])
        return
    overrides = {key: flags[key] for key in labs_flags.KEYS if flags[key] not in (None, ())}
    config = labs.load_config(flags["config"], overrides=overrides)
    if flags["show_config"]:
        labs_shell.write(labs_explain.dump_effective_config(config).rstrip("\n") + "\n")
        return
    for name, mode in {"input": answer_file, "replay": replay, "index": index}.items():
        if flags[name]:
            mode(config, flags)
            return
    answer_prompt(config, flags)


def answer_prompt(config: labs.Config, flags: labs_flags.Values) -> None:
    """Answer one prompt or a chat. A request that cannot work is refused before the model loads."""
    prompt, schema = read_prompt(flags), read_schema(flags["schema"])
    held = read_structured(flags)
    if flags["tools"] is not None:
        tools = read_json(flags["tools"], tuple[labs_dialogue.Tool, ...], "a list of tools")
        prompt = msgspec.structs.replace(prompt, tools=tools)
    choice = flags["tool_choice"] or "auto"
    asked = labs_request.Request(
        prompts=(prompt,), response_format=schema, structured_outputs=held, tool_choice=choice
    )
    if flags["choose"] or schema is not None or held is not None:
        labs.require("labs_typed")
    if prompt.tools:
        labs.require("labs_tools")
    context = labs_request.open_context(config)
    first = msgspec.structs.replace(asked, prompts=()) if flags["chat"] else asked
    request = labs_request.check(context, first)
    stream = sys.stdout.isatty() if flags["stream"] is None else flags["stream"]
    began = time.perf_counter()
    model = load_model(for_one_stream(config))
    imports_s = time.perf_counter() - began - model.load_s
    model = msgspec.structs.replace(model, prefixes=labs.new_prefixes())
    session = labs_shell.Session(context, asked, model, stream, flags["verbose"], imports_s)
    if flags["choose"]:
        labs_shell.choose(session, request, flags["choose"], flags["json"])
    elif flags["chat"]:
        labs.require("labs_chat")
        import labs_chat

        labs_chat.chat(
            list(prompt.messages or ()), lambda said: labs_shell.take_turn(session, said)
        )
    elif flags["explain"]:
        labs_shell.explain(session, request)
    elif flags["json"]:
        labs_shell.answer_json(session, request)
    else:
        for _ in labs_shell.answer(session, request):
            pass


def for_one_stream(config: labs.Config) -> labs.Config:
    """Let a GGUF file keep its 4 or 8 bits, with which a single stream is faster."""
    spec, quantization = config.model, config.model.quantization
    if spec.torch_dtype != "auto" or quantization != labs.Quantization():
        return config
    quantization = msgspec.structs.replace(quantization, quant_method="gguf")
    spec = msgspec.structs.replace(spec, quantization=quantization)
    return msgspec.structs.replace(config, model=spec)


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


def start(name: str, callback: Any, options: labs_flags.Options, epilog: str) -> None:
    """Run a command as a program. Input and output are UTF-8 whatever the locale says."""
    # A socket would take the number of a standard descriptor that is closed.
    opened = [_open_if_closed(descriptor) for descriptor in range(3)]
    sys.stdin = sys.stdin or open(0)  # noqa: SIM115
    if opened[1] and name != "labs-api":  # which answers over HTTP
        sys.exit("Error: standard output is closed")
    sys.stdout, sys.stderr = sys.stdout or open(1, "w"), sys.stderr or open(2, "w")  # noqa: SIM115
    if not os.environ.get("LABS_DEBUG"):
        silence_libraries()
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="surrogateescape")
    arguments = [os.fsencode(text).decode("utf-8", "surrogateescape") for text in sys.argv[1:]]
    labs_flags.make_command(name, callback, options, epilog)(arguments, prog_name=name)


def _open_if_closed(descriptor: int) -> bool:
    """Open the null device as a standard descriptor that is closed; return whether it was."""
    try:
        os.fstat(descriptor)
    except OSError:
        return os.open(os.devnull, os.O_RDWR) == descriptor  # the lowest free number
    return False


def main() -> None:
    """Run labs-gen."""
    ending_at_once("labs-gen", run, labs_flags.OPTIONS, EPILOG)


def ending_at_once(name: str, callback: Any, options: labs_flags.Options, epilog: str) -> None:
    """Run a program and exit without freeing memory, which takes a fifth of the time."""
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")  # see labs_apart.py; before torch is imported
    try:
        start(name, callback, options, epilog)
    except SystemExit as end:
        if not isinstance(end.code, int):
            raise
        for stream in filter(None, (sys.stdout, sys.stderr)):
            stream.flush()
        os._exit(end.code)


# ---------------------------------------------------------------- labs-api

API_EPILOG = """\b
Examples:
  labs-api
  labs-api --port 8080 --model your-org/your-model --max-batch-rows 32
  LABS_API_KEYS=$(openssl rand -hex 24) labs-api --host 0.0.0.0
  labs-api --ray --replicas 2

\b
API keys are read from LABS_API_KEYS (separated by commas) or from the file
--api-keys-file, never from a flag. Settings can also be given in labs.toml,
.env or the environment (LABS_SERVER_PORT for --port). After SIGTERM the
server finishes running answers and exits.
"""


def serve_command(**flags: Any) -> None:
    """Serve a Hugging Face instruct model over HTTP: REST, SSE and OpenAI's endpoints."""
    labs_flags.check_needs(flags, labs_flags.RAY_NEEDS)
    address, cluster = take_ray(flags)
    overrides = {key: value for key, value in flags.items() if value not in (None, ())}
    path = overrides.pop("config", None)
    config = labs.load_config(path, overrides=overrides)
    if address is None:
        labs.require("labs_serve")
        import labs_serve

        labs_serve.serve(config)
        return
    labs.require("labs_ray", "ray", "a2wsgi")
    import labs_ray

    labs_request.check_documents(labs_request.Context(config, {}))  # each replica checks the rest
    labs_ray.serve_replicas(config, address, labs_ray.cluster_of(cluster))


def main_api() -> None:
    """Run labs-api as a program."""
    options: labs_flags.Options = (
        ("Server", "--config", str, "The file of settings [default: ./labs.toml]."),
    )
    options += (*labs_flags.RAY, *labs_flags.STICKY)
    ending_at_once("labs-api", serve_command, options, API_EPILOG)


if __name__ == "__main__":
    main()
