# SPDX-License-Identifier: Apache-2.0
"""The subcommands of labs-gen and the flags that each has.

    row = labs_flags.SUBCOMMANDS["batch"]
    overrides = labs_flags.overrides_of(flags)  # for labs.load_config

A new subcommand is one more row of ROWS. Flags of settings are made from labs.settings(), so their
defaults do not stand in this file. Needs labs.py, labs_arguments.py, click.
"""

from __future__ import annotations

from typing import Any

import click
import msgspec

import labs
import labs_arguments

FILE, Number = labs_arguments.FileName(), labs_arguments.Number
# Flags that are not settings of labs.py: flag, type and help. A string instead of a type is the
# value of the flag when it is given without a value.
Options = tuple[tuple[str, Any, str], ...]
Values = dict[str, Any]  # flags by name
CONFIG: Options = (("--config", FILE, "The file of settings [default: ./labs.toml]."),)
TALK: Options = (
    ("--messages-json", str, "A conversation: a JSON list of {role, content}."),
    ("--messages-file", FILE, "A file with the conversation; - is standard input."),
    ("--system", str, "A system message that comes before the prompt."),
)
TOOLS: Options = (
    ("--tools", FILE, "A file with a JSON list of tools that the model may call."),
    ("--tool-choice", str, "none, auto, required or the name of a tool [default: auto]."),
)
ASK: Options = (
    ("--prompt", str, "The prompt; - reads it from standard input, as a pipe does."),
    *TALK,
    *TOOLS,
)
SHOWN: Options = (
    ("--stream/--no-stream", bool, "Write text while it is generated [default: on a terminal]."),
    ("--verbose", bool, "Report tokens/s and how long each part took."),
)
HISTORY: Options = (("--no-history", bool, "Keep no messages for later chats."),)
HELD: Options = (
    ("--schema", FILE, "A file with a JSON schema that the answer has to match."),
    ("--regex", str, "A regular expression that the whole answer has to match."),
    ("--one-of", tuple[str, ...], "A text that the answer may be; the model says one."),
    ("--grammar", FILE, "A file with a Lark grammar that the answer has to follow."),
)
ROWS_AT_ONCE: Options = (
    ("--batch-rows", Number(int, 1), "Prompts at once [default: as many as fit in memory]."),
)
RAY: Options = (
    ("--ray", "local", "Run on this Ray cluster; auto finds one, no ADDRESS starts one."),
    ("--replicas", Number(int, 1), "Processes, each with its own model [default: 1]."),
    ("--max-replicas", Number(int, 1), "Start up to this many while requests wait."),
    ("--num-cpus", Number(float, 0), "CPU cores for each replica [default: 1]."),
    ("--num-gpus", Number(float, 0), "GPUs for each replica [default: 1 if there are any]."),
)
STICKY: Options = (("--sticky", bool, "Send all requests of one X-Session-Id to one replica."),)


def name_of(flag: str) -> str:
    """Return the name that the value of a flag has."""
    return flag.partition("/")[0].removeprefix("--").replace("-", "_")


RAY_KEYS = [name_of(flag) for flag, *_ in (*RAY, *STICKY)]
RAY_NEEDS = tuple(f"{key} ray" for key in RAY_KEYS if key != "ray")


class Subcommand(msgspec.Struct, frozen=True):
    """One command of labs-gen.

    run: "room:function", called as function(config, flags). arguments: (name, how help shows it,
    type); [X] may be left out, and a tuple takes many of its type. options: its own flags.
    settings: sections and keys whose flags it reads, with -KEY for one that it does not. rivals: of
    the flags in a row at most one may be given. needs: the first flag of a row needs one of the
    others. loads: whether the settings are loaded first; if not, `config` has the defaults.
    """

    name: str
    summary: str
    run: str
    arguments: tuple[tuple[str, str, Any], ...] = ()
    options: Options = ()
    settings: str = ""
    rivals: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    loads: bool = True
    more: str = ""  # of its help


ALL = "model generation quantization documents"
PROMPTS = "prompt messages_json messages_file"
TEXT = (("text", "[PROMPT]", (str,)),)  # words without quotes get an error of their own
HOLDING = " ".join(name_of(flag) for flag, *_ in HELD)
ROWS = (
    Subcommand(
        "prompt",
        "Answer one prompt. The word prompt may be left out.",
        "labs_cli:answer_prompt",
        TEXT,
        (
            *ASK,
            *SHOWN,
            *HELD,
            ("--choose", tuple[str, ...], "Show the probability of this answer among these."),
            ("--json", bool, "Write one JSON object: text, usage, timings, settings."),
        ),
        ALL,
        (
            *(PROMPTS, HOLDING, "json stream"),
            *(f"choose {name}" for name in ("tools stream verbose " + HOLDING).split()),
        ),
        ("tool_choice tools",),
        more="""\b
Examples:
  labs-gen "Name a city." --schema city.json
  labs-gen "Is it Paris?" --choose yes --choose no
  labs-gen "Is it cold in Rome?" --tools tools.json
  labs-gen "How is it installed?" --docs docs.db
  labs-gen --prompt - --temperature 0 --json < question.txt""",
    ),
    Subcommand(
        "chat",
        "Talk with the model; /help lists the commands.",
        "labs_cli:chat",
        options=(*TALK, *TOOLS, *SHOWN, *HELD, *HISTORY),
        settings=f"{ALL} -continue_final_message",
        rivals=("messages_json messages_file", HOLDING),
        needs=("tool_choice tools",),
    ),
    Subcommand(
        "batch",
        "Answer a file of prompts, one JSON object a line.",
        "labs_cli:answer_file",
        (("input", "IN", FILE), ("output", "[OUT]", FILE)),
        (
            *ROWS_AT_ONCE,
            ("--ordered", bool, "Write answers in the order of the prompts, not as they finish."),
            ("--report", FILE, "Write lengths, tokens/s and errors of this run as one HTML file."),
            *RAY,
        ),
        ALL,
        ("ray ordered", "ray report"),
        RAY_NEEDS,
        more="""Answers are appended to OUT; prompts that are answered there are skipped.
IN may be - for standard input. Without OUT, answers go to standard output.
A line of IN is as {"prompt": "Hi", "temperature": 0}.

\b
Examples:
  labs-gen batch prompts.jsonl answers.jsonl --temperature 0
  labs-gen batch 's3://bucket/*.jsonl' answers --ray --replicas 4""",
    ),
    Subcommand(
        "replay",
        "Generate a file of answers again; show which differ.",
        "labs_cli:replay",
        (("replay", "FILE", FILE),),
        ROWS_AT_ONCE,
        "model quantization documents use_chat_template add_generation_prompt template_options "
        "continue_final_message",
        more="A line of the file holds its own settings of generation.",
    ),
    Subcommand(
        "index",
        "Put folders or files into the database of --docs.",
        "labs_cli:index",
        (("index", "DIR...", (FILE,)),),
        settings="device_map torch_dtype local_files_only cache_dir documents_database "
        "documents_embedding_model",
    ),
    Subcommand(
        "warm",
        "Compute ahead what later prompts begin with.",
        "labs_cli:warm",
        (("file", "FILE", FILE),),
        (
            TOOLS[0],
            ("--key", tuple[str, ...], "For this API key, by its name in the log of the server."),
        ),
        "model quantization use_chat_template template_options server_prefix_disk_bytes",
        more="""FILE is a system message, or if its name ends in .jsonl a file of requests as for
labs-gen batch. What is computed is kept on disk, for labs-gen chat and for each API key.

\b
Examples:
  labs-gen warm rules.txt --prefix-disk-bytes 20000000000
  labs-gen warm conversations.jsonl""",
    ),
    Subcommand(
        "explain",
        "Show how a prompt would be answered; answer nothing.",
        "labs_cli:explain",
        TEXT,
        ASK,
        ALL,
        (PROMPTS,),
        ("tool_choice tools",),
    ),
    Subcommand(
        "config",
        "Show each setting and where its value comes from.",
        "labs_cli:show_config",
        settings=ALL,
    ),
    Subcommand(
        "settings",
        "Describe the settings whose name has this word.",
        "labs_lookup:describe",
        (("word", "[WORD]", labs_arguments.SettingName()),),
        loads=False,
    ),
    Subcommand(
        "models",
        "List the models on this machine; pull or rm one.",
        "labs_stock:models",
        (("action", "[ACTION]", click.Choice(["list", "pull", "rm"])), ("name", "[NAME]", str)),
        (("--json", bool, "List as JSON."), ("--yes", bool, "Remove without a question.")),
        "revision local_files_only cache_dir trust_remote_code use_safetensors kind",
        more="""\b
Examples:
  labs-gen models pull your-org/your-model
  labs-gen models pull your-org/your-model:file.gguf
  labs-gen models rm your-org/your-model""",
    ),
    Subcommand(
        "doctor",
        "Show what is installed, how it runs, what is wrong.",
        "labs_doctor:doctor",
        (),
        (("--json", bool, "Write JSON."), ("--no-measure", bool, "Do not measure tokens/s.")),
        "model quantization",
        loads=False,
        more="The report holds no secrets and no texts. The exit code is 1 if something is wrong.",
    ),
    Subcommand(
        "serve",
        "Serve a model over HTTP; labs-api is the same.",
        "labs_cli:serve",
        options=(*RAY, *STICKY),
        settings=" ".join({setting.section: "" for setting in labs.settings()} | {"model": ""}),
        needs=RAY_NEEDS,
        more="""\b
Examples:
  labs-api --port 8080 --model your-org/your-model --max-batch-rows 32
  LABS_API_KEYS=$(openssl rand -hex 24) labs-api --host 0.0.0.0
  labs-api --ray --replicas 2

API keys are read from LABS_API_KEYS (separated by commas) or from the file
--api-keys-file, never from a flag. After SIGTERM running answers are finished.""",
    ),
    Subcommand(
        "vendor",
        "Copy labs into your project, or update the copy.",
        "labs_cli:vendor",
        (("vendor", "DEST", FILE),),
        (
            ("--rooms", str, "Other files to copy, separated by commas: api,cli,typed."),
            ("--check", bool, "Report which files of the copy differ; write nothing."),
        ),
        rivals=("rooms check",),
        loads=False,
    ),
    Subcommand(
        "completion",
        "Print a script that completes words in your shell.",
        "labs_commands:complete",
        (("shell", "SHELL", click.Choice(["bash", "zsh", "fish"])),),
        loads=False,
        more="""\b
Put it where the shell reads it at its start:
  cd ~/.local/share/bash-completion/completions  # or where yours are
  labs-gen completion bash > labs-gen
  labs-gen completion zsh > "${fpath[1]}/_labs-gen"
  labs-gen completion fish > ~/.config/fish/completions/labs-gen.fish""",
    ),
)
SUBCOMMANDS = {row.name: row for row in ROWS}
SETTINGS = [each for each in labs.settings() if each.section in ALL.split()]
KEYS = [setting.key for setting in SETTINGS]
ALIASES = {"model_name": "--model", "local_files_only": "--offline"}
ALIASES["documents_database"] = "--docs"


def title_of(setting: labs.Setting) -> str:
    """Return the section of a setting; `model` for those of [generation] that load the model."""
    return "model" if setting.key in labs.ModelSpec.__struct_fields__ else setting.section


def settings_of(row: Subcommand) -> list[labs.Setting]:
    """Return the settings that a subcommand has flags for."""
    words = row.settings.split()
    found = [each for each in labs.settings() if {title_of(each), each.key} & {*words}]
    return [each for each in found if f"-{each.key}" not in words]


def options_of(row: Subcommand) -> Options:
    """Return the flags of a subcommand that are not settings."""
    return (*row.options, *(CONFIG if row.settings else ()))


def overrides_of(flags: Values) -> Values:
    """Return the settings among these flags that were given."""
    keys = (setting.key for setting in labs.settings())
    return {key: flags[key] for key in keys if flags.get(key) not in (None, ())}


def flags_of(setting: labs.Setting) -> list[str]:
    """Return the flags of a setting, the shortest one first."""
    own = "--" + setting.key.removeprefix("server_").replace("_", "-")
    return [*filter(None, [ALIASES.get(setting.key)]), own]


def all_flags(row: Subcommand) -> list[str]:
    """Return the flags of a subcommand, those of settings too."""
    own = [name for flag, *_ in options_of(row) for name in flag.split("/")]
    return [*own, *(flag for setting in settings_of(row) for flag in flags_of(setting))]
