# SPDX-License-Identifier: Apache-2.0
"""Which models are on this machine, where, and how large; download and remove them.

    for each in labs_stock.kept(config): print(each.name, each.bytes)
    labs_stock.models(config, {"action": "pull", "name": "your-org/your-model"})  # labs-gen models

Only caches are changed: labs' own, and the hub's. Needs labs.py, labs_cache.py, labs_sources.py,
labs_prefix_folder.py, labs_mapped.py, labs_pull.py, labs_shell.py; huggingface_hub, click.
"""

from __future__ import annotations

import contextlib
import difflib
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import click
import msgspec
from msgspec import Struct
from msgspec.structs import replace

import labs
import labs_cache
import labs_mapped
import labs_names
import labs_prefix_folder
import labs_pull
import labs_shell
import labs_sources

READS = {  # the flags of each action
    "list": ("json", "cache_dir"),
    "rm": ("yes", "cache_dir"),
    "pull": ("revision", "local_files_only", "trust_remote_code", "use_safetensors", "kind"),
}
IN_CACHES = ("conversion", "prefixes", "hub")  # the kinds that can be deleted


class Kept(Struct, frozen=True, kw_only=True):
    """A model or adapter that is configured or kept in a cache, or the prefixes of prompts.

    kind: a configured one may also be in a cache, as another entry. bytes and changed (seconds
    since 1970) are None where it is not here. uses: processes that read it. files: of prefixes.
    """

    name: str
    kind: Literal["configured", "adapter", "conversion", "prefixes", "hub"]
    place: str
    bytes: int | None = None
    changed: float | None = None
    revisions: tuple[str, ...] = ()
    uses: tuple[int, ...] = ()
    files: int | None = None


def kept(config: labs.Config) -> list[Kept]:
    """Return what is configured, then what the caches hold. Nothing is downloaded or loaded."""
    stored = [*conversions(config), *prefixes(config), *repositories()]
    return [*configured(config, stored), *stored]


def configured(config: labs.Config, stored: Iterable[Kept]) -> Iterator[Kept]:
    """Yield the models and adapters of the configuration. stored: what the caches hold."""
    on_hub = {each.name: each for each in stored if each.kind == "hub"}
    for name, each in config.by_name().items():
        yield _configured(name, "configured", each.model.model_name, on_hub)
        if each.model.adapter is not None:
            title = f"{name} + {each.model.adapter}"
            yield _configured(title, "adapter", each.model.adapter, on_hub)


def is_absent(config: labs.Config) -> bool:
    """Return whether the model would be downloaded first."""
    first = next(configured(config, repositories()))
    return first.bytes is None and not first.place.startswith(("package:", ".", "/", "~"))


def _configured(name: str, kind: Any, source: str, on_hub: dict[str, Kept]) -> Kept:
    """Return where a configured model is found, without asking the hub."""
    if (repository := on_hub.get(source)) is not None:
        return replace(repository, name=name, kind=kind, place=source, uses=())
    path = Path(source).expanduser()
    with contextlib.suppress(labs_cache.SourceError):
        if source.startswith("package:"):
            path = labs_sources.package_file(source)
        elif source.endswith(".gguf"):
            path = labs_sources.gguf_file(source, labs_sources.Hub(offline=True))
    here = _size_and_time(path) if path.exists() else (None, None)
    return Kept(name=name, kind=kind, place=source, bytes=here[0], changed=here[1])


def _caches(config: labs.Config) -> list[Path]:
    """Return the cache folders of all configured models."""
    folders = (each.model.cache_dir for each in config.by_name().values())
    return [*dict.fromkeys(map(labs_cache.cache_folder, folders))]


def prefixes(config: labs.Config) -> Iterator[Kept]:
    """Yield the prefixes of prompts on disk, which each cache folder has in one folder."""
    for number, folder in enumerate(map(labs_prefix_folder.place, _caches(config))):
        if states := [state for _, state in labs_prefix_folder.listed(folder)]:
            yield Kept(
                name="prefixes" if not number else f"prefixes of {folder.parent}",
                kind="prefixes",
                place=str(folder),
                bytes=sum(state.st_size for state in states),
                changed=max(state.st_mtime for state in states),
                files=len(states),
            )


def conversions(config: labs.Config) -> Iterator[Kept]:
    """Yield the converted GGUF files in the caches of all configured models."""
    files = labs_mapped.files()
    for cache in _caches(config):
        for marker in sorted(cache.glob(f"*/{labs_cache.RECORD}")):
            folder = marker.parent
            if folder.name.startswith(".") or folder.is_symlink():
                continue
            size, changed = _size_and_time(folder)
            yield Kept(
                name=folder.name,
                kind="conversion",
                place=str(folder),
                bytes=size,
                changed=changed,
                uses=labs_mapped.users(files, folder),
            )


def repositories() -> Iterator[Kept]:
    """Yield the models in the hub's cache, with the branches or commits that are there."""
    import huggingface_hub

    files = labs_mapped.files()
    with contextlib.suppress(huggingface_hub.CacheNotFound):
        for repo in sorted(huggingface_hub.scan_cache_dir().repos, key=lambda each: each.repo_id):
            if repo.repo_type == "model":
                revisions = (sorted(each.refs) or [each.commit_hash] for each in repo.revisions)
                yield Kept(
                    name=repo.repo_id,
                    kind="hub",
                    place=str(repo.repo_path),
                    bytes=repo.size_on_disk,
                    changed=repo.last_modified,
                    revisions=tuple(name for names in revisions for name in names),
                    uses=labs_mapped.users(files, repo.repo_path),
                )


def _size_and_time(path: Path) -> tuple[int, float]:
    files = [path] if path.is_file() else [each for each in path.rglob("*") if each.is_file()]
    return sum(each.stat().st_size for each in files), path.stat().st_mtime


# ---------------------------------------------------------------- the command


def models(config: labs.Config, flags: dict[str, Any]) -> None:
    """List the models, or download or remove one. flags: action, name, and those of READS."""
    action, name = flags.get("action") or "list", flags.get("name")
    _check_flags(config, action, name, flags)
    config = labs_names.named(config)
    if (action == "list") != (name is None):
        example = f"labs-gen models {action} NAME" if name is None else "labs-gen models"
        raise click.UsageError(
            f"models {action} takes {'a' if name is None else 'no'} NAME: {example}"
        )
    if action == "list":
        found = kept(config)
        text = msgspec.json.encode(found).decode() + "\n" if flags.get("json") else table(found)
        labs_shell.write(text)
    elif action == "rm":
        remove(config, str(name), bool(flags.get("yes")))
    else:
        done = labs_pull.pull(config, str(name))
        labs_shell.write(f"{done.place}\n")
        labs_shell.tell(f'[{human(done.bytes)} here; labs-gen {done.flags} --prompt "Hello!"]')


def _check_flags(config: labs.Config, action: str, name: str | None, flags: dict[str, Any]) -> None:
    """Refuse a flag that would have no effect."""
    given = [key for row in READS.values() for key in row if flags.get(key) is not None]
    if unread := [key for key in dict.fromkeys(given) if key not in READS[action]]:
        raise click.UsageError(f"models {action} does not read --{unread[0].replace('_', '-')}")
    if name in config.models and flags.get("revision") is not None:
        raise click.UsageError(f"--revision goes with an id; set it in [models.{name}]")


def table(found: Iterable[Kept]) -> str:
    """Return lines with aligned columns: name, kind, size, date, and where it is or came from."""
    rows = [("NAME", "KIND", "SIZE", "CHANGED", "PLACE")]
    for each in found:
        date = time.strftime("%Y-%m-%d", time.localtime(each.changed)) if each.changed else "-"
        size = "not here" if each.bytes is None else human(each.bytes)
        place = each.place + (f" ({', '.join(each.revisions)})" if each.kind == "hub" else "")
        place += f" ({each.files} files)" if each.files else ""
        place += " (in use)" if each.uses else ""
        rows.append((each.name, each.kind, size, date, place))
    a, b, c, d = (max(len(row[column]) for row in rows) for column in range(4))
    return "".join(f"{n:{a}}  {k:{b}}  {s:>{c}}  {t:{d}}  {p}\n" for n, k, s, t, p in rows)


def human(count: float) -> str:
    """Return a number of bytes in a unit of powers of 1,000, as disks are sold."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 10 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def remove(config: labs.Config, name: str, certain: bool) -> None:
    """Delete a conversion or a repository from its cache, after a question unless `certain`."""
    found = kept(config)
    each = _meant(found, name)
    if each.uses:
        processes = ", ".join(map(str, each.uses))
        raise labs.ModelError(f"{each.name} is in use by process {processes}: end it first")
    labs_shell.tell(f"{each.place}: {human(each.bytes or 0)}")
    if not certain:
        if not sys.stdin.isatty():
            raise click.UsageError("nothing was deleted: give --yes where nobody can be asked")
        if not click.confirm("Delete this folder?", err=True):
            labs_shell.tell("[nothing was deleted]")
            return
    try:
        _delete(each)
    except (OSError, labs_cache.SourceError) as error:
        raise labs.ModelError(f"{name}: {labs.reason(error)}") from error
    labs_shell.tell(f"[{human(each.bytes or 0)} deleted]")


def _meant(found: list[Kept], name: str) -> Kept:
    """Return the cached model of this name, in any case, or the one whose name begins so."""
    cached = {each.name: each for each in found if each.kind in IN_CACHES}
    begun = [key for key in cached if key.casefold().startswith(f"{name.casefold()}")]
    same = [key for key in begun if len(key) == len(name)] or begun
    if len(same) == 1:
        return cached[same[0]]
    if same:
        raise labs.ModelError(f"{name} may be {' or '.join(same)}: give the whole name")
    for each in found:
        if each.name == name:
            text = f"{name} is configured, not in a cache: {each.place} is not deleted"
            raise labs.ModelError(text)
    starts = {key[: len(name)].casefold(): key for key in cached}
    close = difflib.get_close_matches(name.casefold(), starts, n=1)
    hint = f"did you mean {starts[close[0]]}?" if close else "labs-gen models lists them"
    raise labs.ModelError(f"no cache has a model {name}; {hint}")


def _delete(each: Kept) -> None:
    if each.kind != "hub":
        clear = labs_cache.remove if each.kind == "conversion" else labs_prefix_folder.clear
        clear(Path(each.place))
        return
    import filelock
    import huggingface_hub

    cache = huggingface_hub.scan_cache_dir()
    (repo,) = (repo for repo in cache.repos if str(repo.repo_path) == each.place)
    with contextlib.ExitStack() as held:
        for lock in (Path(each.place).parent / ".locks" / Path(each.place).name).glob("*.lock"):
            try:
                held.enter_context(filelock.FileLock(lock, 0))
            except filelock.Timeout:
                raise labs_cache.SourceError("another process is downloading it") from None
        cache.delete_revisions(*(one.commit_hash for one in repo.revisions)).execute()
    if Path(each.place).exists():
        raise labs_cache.SourceError(f"{each.place} could not be deleted")
