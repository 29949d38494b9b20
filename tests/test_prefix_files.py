# SPDX-License-Identifier: Apache-2.0
"""labs_prefix_files: conversations go on from files after a restart, whatever happens to these."""

from __future__ import annotations

import dataclasses
import errno
import functools
import logging
import os
import random
import signal
import stat
import threading
import time

import msgspec
import pytest
import safetensors.torch
import torch
from kit import model_around, options, prepare, prompt, random_model, read, row_of, unfrozen

import labs
import labs_cli
import labs_decode as decode
import labs_engine
import labs_prefix_files as files_room
import labs_prefix_folder as folder_room
import labs_prefixes

CHUNK = 8
PROMPT = [random.Random(1).randrange(3, 200) for _ in range(30)]
MARK = labs.Fingerprint(
    model="a",
    revision="sha256:1",
    dtype="fp32",
    device="cpu",
    hardware="AVX2",
    quantization={},
    batch_invariant=True,
    versions={"torch": "2"},
)


@pytest.fixture(autouse=True)
def chunk(monkeypatch):
    """Let a chunk have eight tokens, so that short prompts are worth storing."""
    monkeypatch.setattr(decode, "CHUNK", CHUNK)


@pytest.fixture(scope="module")
def decoder():
    return prepare(random_model("llama"))


def restarted(folder, most=2**30, mark=b"a", memory=2**30):
    """Return a store with an empty memory, as a new process has it."""
    kept = labs_prefixes.Prefixes(memory)
    return files_room.PrefixFiles(kept, folder_room.Folder(folder / "prefixes", most), mark)


def asked(decoder, store, ids=PROMPT, owner=""):
    """Return a prefilled newcomer that began with what is stored, and the tokens it had then."""
    batch = decode.new_batch(decoder, row_of(ids))
    row = batch.rows[0]
    row.owner, row.exact_prefix = owner, True
    store.load(decoder, batch)
    known = row.written
    assert row.cached == row.exact_columns == known
    while batch.pending:
        batch = decode.prefill(decoder, batch)
    assert row.cached == known
    store.store(decoder, batch, 0)
    store.flush()
    return batch, known


def paths(folder):
    found = (folder / "prefixes").glob("*.safetensors")
    return sorted(found, key=lambda path: path.stat().st_mtime_ns, reverse=True)


def same_bits(mine, theirs):
    columns = len(PROMPT)
    pairs = zip(mine.cache.buffers, theirs.cache.buffers, strict=True)
    same = all(torch.equal(a[:, :, :columns], b[:, :, :columns]) for a, b in pairs)
    return same and torch.equal(mine.logits, theirs.logits)


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "llama4_text", "deepseek_v3"])
def test_a_prompt_goes_on_from_files_with_the_bits_of_a_prefill(kind, tmp_path):
    decoder = prepare(random_model(kind))
    first, known = asked(decoder, restarted(tmp_path))
    assert (known, len(paths(tmp_path))) == (0, 3)
    second, known = asked(decoder, restarted(tmp_path))
    assert known == 24
    assert same_bits(first, second)
    longer, known = asked(decoder, restarted(tmp_path), [*PROMPT[:20], *range(3, 20)])
    assert known == 16  # the chunks in common
    alone, _ = asked(decoder, restarted(tmp_path / "else"), [*PROMPT[:20], *range(3, 20)])
    assert torch.equal(longer.logits, alone.logits)


def test_the_last_token_is_always_computed_and_less_than_a_chunk_is_not_stored(decoder, tmp_path):
    asked(decoder, restarted(tmp_path), PROMPT[:16])
    assert asked(decoder, restarted(tmp_path), PROMPT[:16])[1] == 8
    assert asked(decoder, restarted(tmp_path), PROMPT[:17])[1] == 16
    asked(decoder, restarted(tmp_path / "short"), PROMPT[:7])
    assert paths(tmp_path / "short") == []


def test_memory_and_files_complete_each_other(decoder, tmp_path):
    asked(decoder, restarted(tmp_path))
    store = restarted(tmp_path)
    asked(decoder, store, PROMPT[:12])  # memory has one chunk, files have three
    assert asked(decoder, store)[1] == 24
    assert asked(decoder, store)[1] == 24  # now from memory
    for path in paths(tmp_path):
        path.unlink()
    assert asked(decoder, store)[1] == 24
    assert asked(decoder, restarted(tmp_path, memory=0))[1] == 24  # written again in between


def test_neither_another_owner_nor_another_model_finds_a_prefix(decoder, tmp_path):
    asked(decoder, restarted(tmp_path), owner="key one")
    assert asked(decoder, restarted(tmp_path), owner="key two")[1] == 0
    assert asked(decoder, restarted(tmp_path), owner="")[1] == 0
    assert asked(decoder, restarted(tmp_path, mark=b"b"), owner="key one")[1] == 0
    assert asked(decoder, restarted(tmp_path), owner="key one")[1] == 24


def test_what_changes_the_bits_changes_the_identity(decoder):
    def of(own=decoder, **changes):
        changed = msgspec.structs.replace(MARK, **changes)
        model = msgspec.structs.replace(model_around(own, "tiny"), fingerprint=changed)
        return files_room.identity(model)

    others = [
        of(revision="sha256:2"),
        of(dtype="bf16"),
        of(hardware="AVX512"),
        of(versions={"torch": "3"}),
        of(quantization={"quant_method": "int8"}),
        of(dataclasses.replace(decoder, quant_method="int4")),
        of(dataclasses.replace(decoder, why_forward="another")),
    ]
    assert len({of(), *others}) == len(others) + 1
    assert of(model="another name of it") == of()


def test_between_two_reads_of_a_long_prefix_other_rows_have_their_step(
    decoder, tmp_path, monkeypatch
):
    first, _ = asked(decoder, restarted(tmp_path))
    now, read = [0.0], folder_room.Folder.read

    def slowly(folder, path):
        now[0] += 0.3
        return read(folder, path)

    monkeypatch.setattr(folder_room.Folder, "read", slowly)
    monkeypatch.setattr(files_room.time, "perf_counter", lambda: now[0])
    batches = [decode.new_batch(decoder, row_of(PROMPT)) for _ in range(2)]
    store, known = restarted(tmp_path), []
    store.load(decoder, batches[0])
    store.load(decoder, batches[1])  # at once, so no time is left for it
    known = [(batch.rows[0].written, batch.rows[0].cached) for batch in batches]
    assert known == [(16, 16), (0, 0)]
    decode.prefill(decoder, batches[1])
    now[0] += 10.0  # which come back as half a second
    for batch in batches:
        store.load(decoder, batch)
        known.append((batch.rows[0].written, batch.rows[0].cached))
    assert known[2:] == [(24, 24), (16, 8)]  # a chunk was computed in between
    for batch in batches:
        while batch.pending:
            batch = decode.prefill(decoder, batch)
        assert same_bits(first, batch)


# ---------------------------------------------------------------- damaged files


def spoiled(path, how):
    data = path.read_bytes()
    if how == "torn":
        path.write_bytes(data[: len(data) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "a bit":
        at = random.Random(len(data)).randrange(len(data))
        path.write_bytes(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])
    elif how == "the header":
        path.write_bytes(data.replace(b"F32", b"I32", 1))
    elif how == "foreign":
        path.write_bytes(os.urandom(4096))
    elif how == "a folder":
        path.unlink()
        path.mkdir()
    elif how == "gone":
        path.unlink()


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize(
    "how", ["torn", "empty", "a bit", "the header", "foreign", "a folder", "gone"]
)
def test_a_damaged_file_ends_the_prefix_and_is_written_again(how, place, decoder, tmp_path):
    first, _ = asked(decoder, restarted(tmp_path))
    spoiled(paths(tmp_path)[place], how)
    second, known = asked(decoder, restarted(tmp_path))
    assert known == CHUNK * place
    assert same_bits(first, second)
    if how != "a folder":  # which labs did not make, and does not delete
        assert asked(decoder, restarted(tmp_path))[1] == 24


def test_a_file_under_the_name_of_another_chunk_is_not_read(decoder, tmp_path):
    asked(decoder, restarted(tmp_path))
    first, second, _ = paths(tmp_path)
    name = second.name[: folder_room.NAME]
    second.unlink()
    first.rename(first.with_name(name + first.name[folder_room.NAME :]))
    # The contents are whole, so only whoever may write into the folder can do this: the folder is
    # its owner's. What is there no longer is computed.
    assert asked(decoder, restarted(tmp_path))[1] == 0


# ---------------------------------------------------------------- bounds


def test_files_and_folder_are_readable_by_their_owner_only(decoder, tmp_path):
    old = os.umask(0)
    try:
        asked(decoder, restarted(tmp_path))
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "prefixes").stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in paths(tmp_path)} == {0o600}


def test_the_prefix_used_longest_ago_goes_first_and_each_loses_its_end_first(decoder, tmp_path):
    asked(decoder, restarted(tmp_path))
    one = paths(tmp_path)[0].stat().st_size
    others = [[number, *PROMPT[1:]] for number in (201, 202)]
    store = restarted(tmp_path, most=8 * one)
    asked(decoder, store, others[0])
    assert len(paths(tmp_path)) == 6
    assert asked(decoder, restarted(tmp_path))[1] == 24  # used again
    asked(decoder, store, others[1])
    assert len(paths(tmp_path)) <= 8
    assert asked(decoder, restarted(tmp_path))[1] == 24
    assert asked(decoder, restarted(tmp_path), others[1])[1] == 24
    assert asked(decoder, restarted(tmp_path), others[0])[1] in (0, 8)
    small = restarted(tmp_path / "small", most=one - 1)
    asked(decoder, small)
    assert paths(tmp_path / "small") == []


def test_files_that_nobody_used_for_a_month_and_torn_ones_are_deleted(decoder, tmp_path):
    asked(decoder, restarted(tmp_path))
    long_ago = time.time() - folder_room.OLDEST_S - 60
    for path in paths(tmp_path):
        os.utime(path, (long_ago, long_ago))
    torn = [tmp_path / "prefixes" / f"{number:032x}.part" for number in range(2)]
    for path in torn:
        path.write_bytes(b"half")
    os.utime(torn[0], (long_ago, long_ago))
    asked(decoder, restarted(tmp_path), [201, *PROMPT[1:]])
    assert len(paths(tmp_path)) == 3
    assert [path.exists() for path in torn] == [False, True]
    assert asked(decoder, restarted(tmp_path))[1] == 0


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EIO])
def test_a_disk_that_refuses_costs_a_warning_and_no_answer(
    number, decoder, tmp_path, monkeypatch, caplog
):
    store, real = restarted(tmp_path), os.replace

    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(folder_room.os, "replace", refuse)
    with caplog.at_level(logging.WARNING, "labs.prefixes"):
        asked(decoder, store)
        asked(decoder, store, [201, *PROMPT[1:]])
    assert [each.getMessage() for each in caplog.records if "for a minute" in each.getMessage()]
    assert len(caplog.records) == 1
    assert [*(tmp_path / "prefixes").iterdir()] == []
    monkeypatch.setattr(folder_room.os, "replace", real)
    store.folder._rests_until = 0.0
    asked(decoder, store)
    assert len(paths(tmp_path)) == 3


def test_a_slow_disk_holds_back_no_prompt_and_its_queue_is_bounded(decoder, tmp_path, monkeypatch):
    store, gate, real = restarted(tmp_path), threading.Event(), os.replace

    def wait(*names):
        gate.wait(30)
        real(*names)

    monkeypatch.setattr(folder_room.os, "replace", wait)
    monkeypatch.setattr(store, "flush", lambda: None)
    one = sum(each.nbytes for each in asked(decoder, store)[0].cache.buffers)
    held = store.folder.pending_bytes
    assert 0 < held <= one
    monkeypatch.setattr(files_room.labs_memory, "keepable_bytes", lambda cache, kept: held)
    asked(decoder, store, [201, *PROMPT[1:]])
    assert store.folder.pending_bytes == held
    gate.set()
    store.folder.flush(30)
    assert store.folder.pending_bytes == 0
    assert len(paths(tmp_path)) == 3


def test_a_file_from_the_future_does_not_stay_for_ever(decoder, tmp_path):
    asked(decoder, restarted(tmp_path))
    one, next_year = paths(tmp_path)[0].stat().st_size, time.time() + 365 * 86_400
    for path in paths(tmp_path):  # before the clock was set back
        os.utime(path, (next_year, next_year))
    store = restarted(tmp_path, most=4 * one)
    asked(decoder, store, [201, *PROMPT[1:]])
    assert asked(decoder, restarted(tmp_path), [201, *PROMPT[1:]])[1] == 24
    assert asked(decoder, restarted(tmp_path))[1] == 0


def test_the_files_of_another_process_are_counted_after_a_minute(decoder, tmp_path, monkeypatch):
    asked(decoder, restarted(tmp_path))
    one = paths(tmp_path)[0].stat().st_size
    stores = [restarted(tmp_path, most=12 * one) for _ in range(2)]
    for number, each in enumerate((0, 1, 1, 0)):
        asked(decoder, stores[each], [201 + number, *PROMPT[1:]])
    assert len(paths(tmp_path)) == 15  # the first process has counted nine
    later = time.monotonic() + folder_room.LISTED_S
    monkeypatch.setattr(folder_room.time, "monotonic", lambda: later)
    asked(decoder, stores[0], [209, *PROMPT[1:]])
    assert len(paths(tmp_path)) <= 12


def test_a_folder_in_which_others_may_write_is_neither_read_nor_written(decoder, tmp_path, caplog):
    asked(decoder, restarted(tmp_path))
    (tmp_path / "prefixes").chmod(0o770)
    with caplog.at_level(logging.WARNING, "labs.prefixes"):
        assert asked(decoder, restarted(tmp_path))[1] == 0
    assert "other users may write into" in caplog.text
    (tmp_path / "prefixes").chmod(0o700)
    assert asked(decoder, restarted(tmp_path))[1] == 24
    me = os.geteuid()
    for name in ("stat", "lstat"):  # of the folder, of a file
        real = getattr(os, name)

        def foreign(*given, real=real, **words):
            found = list(real(*given, **words))
            found[stat.ST_UID] = me + 1
            return os.stat_result(found)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(folder_room.os, name, foreign)
            assert asked(decoder, restarted(tmp_path))[1] == 0


def test_a_link_in_place_of_a_file_is_not_followed_and_one_for_the_folder_is(decoder, tmp_path):
    asked(decoder, restarted(tmp_path))
    path = paths(tmp_path)[0]
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    assert asked(decoder, restarted(tmp_path))[1] == 0
    assert not paths(tmp_path)[0].is_symlink()
    assert (tmp_path / "elsewhere").exists()
    (tmp_path / "else").mkdir()
    (tmp_path / "else/prefixes").symlink_to(tmp_path / "prefixes")
    assert asked(decoder, restarted(tmp_path / "else"))[1] == 24


def test_an_unreadable_file_ends_the_prefix_and_stays(decoder, tmp_path, monkeypatch):
    asked(decoder, restarted(tmp_path))

    def refuse(*_):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folder_room, "_contents", refuse)
        assert asked(decoder, restarted(tmp_path))[1] == 0
    assert asked(decoder, restarted(tmp_path))[1] == 24


def test_whole_files_that_hold_no_tensors_end_the_prefix(decoder, tmp_path):
    asked(decoder, restarted(tmp_path))
    for data in (b"", b"{}", safetensors.torch.save({"1": torch.zeros(2, 8, 16)})):
        path = paths(tmp_path)[0]
        path.unlink()
        path.with_name(folder_room._title(path.name[: folder_room.NAME], data)).write_bytes(data)
        assert asked(decoder, restarted(tmp_path))[1] == 0


def test_a_disk_that_hangs_keeps_neither_a_request_nor_the_end(
    decoder, tmp_path, monkeypatch, caplog
):
    store, gate = restarted(tmp_path), threading.Event()
    monkeypatch.setattr(folder_room.os, "replace", lambda *_: gate.wait(60))
    monkeypatch.setattr(store, "flush", lambda: None)
    asked(decoder, store)
    assert store.folder.pending_bytes
    thread = store.folder._thread
    assert thread.daemon
    with caplog.at_level(logging.WARNING, "labs.prefixes"):
        store.folder.flush(0.01)
    assert "3 prefixes are not kept: the disk is too slow" in caplog.text
    assert store.folder.pending_bytes == 0
    store.folder.flush(60)  # nothing is left to wait for
    gate.set()
    thread.join(60)
    assert store.folder.pending_bytes == 0


# ---------------------------------------------------------------- several at once


def chunks(number, count=4):
    """Return names and tensors of some chunks."""
    chance = torch.Generator().manual_seed(number)
    return [
        (f"{number:036d}{place:04d}", [torch.rand(2, CHUNK, 4, generator=chance) for _ in range(4)])
        for place in range(count)
    ]


def test_threads_on_one_folder_read_only_what_was_written(tmp_path):
    most = 40 * 2**10  # a few of the files, so that each deletes what others read
    wrong, over = [], time.monotonic() + 1.5

    def work(number):
        folder, chance = folder_room.Folder(tmp_path, most), random.Random(number)
        while time.monotonic() < over:
            own = chunks(chance.randrange(8))
            for place, (name, chunk) in enumerate(own):
                make = functools.partial(files_room.packed, chunk)
                folder.write(name, time.time_ns() - place, 1, make)
            folder.flush(10)
            for (_, chunk), path in zip(own, folder.find(n for n, _ in own), strict=False):
                data = folder.read(path)
                if data and not all(map(torch.equal, files_room.unpacked(data), chunk)):
                    wrong.append(path)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 2 * most


def test_a_process_killed_while_it_writes_leaves_nothing_wrong(tmp_path):
    chance = random.Random(3)
    for number in range(20):
        child = os.fork()
        if child == 0:
            folder = folder_room.Folder(tmp_path, 2**30)
            while True:
                for place, (name, chunk) in enumerate(chunks(number)):
                    folder._write(name, time.time_ns() - place, files_room.packed(chunk))
        time.sleep(chance.random() / 50)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    folder, whole = folder_room.Folder(tmp_path, 2**30), 0
    for number in range(20):
        expected = chunks(number)
        for (_, chunk), path in zip(expected, folder.find(n for n, _ in expected), strict=False):
            assert all(map(torch.equal, files_room.unpacked(folder.read(path)), chunk))
            whole += 1
    assert whole


# ---------------------------------------------------------------- in an engine


def engine_of(folder, decoder, **server):
    model = model_around(decoder, "tiny")
    spec = labs.ModelSpec(model_name="tiny", cache_dir=str(folder))
    model = msgspec.structs.replace(model, fingerprint=MARK, spec=spec)
    return labs_engine.Engine(model, labs.Server(**{"prefix_disk_bytes": 2**30} | server))


def test_an_engine_goes_on_after_a_restart_and_waits_for_its_files(tmp_path):
    decoder = prepare(random_model("llama", vocab_size=262))
    texts, cached = [], []
    for _ in range(2):
        engine = engine_of(tmp_path, decoder)
        text, done = read(engine.submit(prompt(1, 50), options()))
        engine.close()
        texts.append(text)
        cached.append(done.usage.cached_tokens)
        assert len(paths(tmp_path)) == 6
    assert cached == [0, 48]
    assert texts[0] == texts[1]
    engine = engine_of(tmp_path, decoder, prefix_disk_bytes=0)
    assert read(engine.submit(prompt(1, 50), options()))[1].usage.cached_tokens == 0
    engine.close()


def test_without_a_known_revision_nothing_is_written(tmp_path, caplog):
    decoder = prepare(random_model("llama", vocab_size=262))
    model = msgspec.structs.replace(
        model_around(decoder, "tiny"),
        spec=labs.ModelSpec(model_name="tiny", cache_dir=str(tmp_path)),
    )
    states = model_around(prepare(random_model("mamba2")), "tiny")
    with caplog.at_level(logging.WARNING, "labs.prefixes"):
        for each in (model, states):
            store = files_room.opened(each, labs.Server(prefix_disk_bytes=2**20))
            assert isinstance(store, labs_prefixes.Prefixes)
    assert "the revision of the model is not known" in caplog.text
    assert "the model has more than keys and values" in caplog.text


def test_a_chat_keeps_prefixes_on_disk_where_that_is_set_and_a_single_prompt_does_not(
    tiny_folder, tmp_path
):
    spec = labs.ModelSpec(model_name=str(tiny_folder), cache_dir=str(tmp_path))
    config = labs.Config(model=spec)
    on_disk = msgspec.structs.replace(config, server=labs.Server(prefix_disk_bytes=2**20))
    loads = (labs_cli.load_for_chat, labs_cli.load_for_one_stream)
    with unfrozen():
        kinds = [type(load(each)[0].prefixes) for load in loads for each in (config, on_disk)]
    memory = labs_prefixes.Prefixes
    assert kinds == [memory, files_room.PrefixFiles, memory, memory]
