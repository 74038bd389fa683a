"""A token store that is not what was written is named and built anew; nobody trains on it."""

import json
import multiprocessing
import os
import shutil
import warnings
from pathlib import Path

import pytest

from mtft.common.errors import UserError
from mtft.common.own_files import FORMAT
from mtft.data.store import store_files
from mtft.data.store.store_files import META, VERIFIED, DamagedStoreError
from mtft.data.store.token_store import TokenStore, open_store
from mtft.recipe.schema.task import TaskSection
from tests.data.toy_examples import TEMPLATES, tokenizer, write_jsonl

ROWS = [{"id": f"row {i // 2}", "prompt": f"what is {i}?", "response": f"it is {i}"} for i in range(60)]
FILES = ("ids.bin", "supervised.bin", "offsets.bin", "learnt.bin", "lines.bin", "names.bin", "name_lengths.bin")


@pytest.fixture
def where(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ROWS)
    return tmp_path


def open_(where):
    task = TaskSection(name="sums", data=str(where / "a.jsonl"))
    return open_store(task, "train", tokenizer(TEMPLATES["chatml"]), max_length=512, cache_dir=where / "cache")


def picture(store):
    return [[part.tolist() for part in store.example(i)] for i in range(len(store))], list(store.ids), store.stats


def cut(path):
    path.write_bytes(path.read_bytes()[:-8])


def lengthen(path):
    path.write_bytes(path.read_bytes() + b"\0" * 8)


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def swap_for_folder(path):
    path.unlink()
    path.mkdir()


DAMAGE = {
    "cut": cut,
    "longer": lengthen,
    "a flipped bit": flip,
    "empty": lambda path: path.write_bytes(b""),
    "gone": Path.unlink,
    "a folder": swap_for_folder,
}
META_DAMAGE = {
    "a list": lambda path: path.write_text("[]"),
    "null": lambda path: path.write_text("null"),
    "deep": lambda path: path.write_text("[" * 100_000),
    "bytes": lambda path: path.write_bytes(b'{"a": "\xff"}'),
    "another dtype": lambda path: path.write_text(path.read_text().replace("uint16", "int32")),
    "other stats": lambda path: path.write_text(path.read_text().replace('"rows": 60', '"rows": 6')),
}
CASES = [(name, kind) for name in (*FILES, META) for kind in DAMAGE] + [(META, kind) for kind in META_DAMAGE]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_damage_is_named_and_the_store_built_anew(where, name, kind):
    whole = picture(first := open_(where))
    (DAMAGE | META_DAMAGE)[kind](first.path / name)
    with pytest.raises(DamagedStoreError):
        TokenStore(first.path, "sums")
    with pytest.warns(UserWarning, match="the token store of task sums is damaged: .*; it is built anew") as told:
        again = open_(where)
    assert name in str(told[0].message)
    assert picture(again) == whole
    assert [path.name for path in (where / "cache" / "stores").iterdir()] == [again.path.name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_(where)


def test_a_file_in_its_place(where):
    store = open_(where)
    whole = picture(store)
    shutil.rmtree(store.path)
    store.path.write_text("mine")
    with pytest.warns(UserWarning, match="built anew"):
        assert picture(open_(where)) == whole


def test_a_newer_store_is_left_alone(where):
    store = open_(where)
    (store.path / META).write_text(json.dumps({"format": FORMAT + 1}))
    with pytest.raises(UserError, match="newer version"):
        open_(where)
    assert (store.path / "ids.bin").is_file()


def test_checksums_are_read_once_a_change(where, monkeypatch):
    read = []
    real = store_files._crc32
    monkeypatch.setattr(store_files, "_crc32", lambda path: read.append(path.name) or real(path))
    monkeypatch.setattr(store_files, "_seen", {})
    store = open_(where)
    open_(where)
    assert read == []  # the builder's own are known
    os.utime(store.path / "ids.bin", ns=(1, 1))
    store_files._seen.clear()
    open_(where)
    assert read == ["ids.bin"]
    store_files._seen.clear()  # as in the next process
    open_(where)
    assert read == ["ids.bin"]
    (store.path / VERIFIED).write_text("{")
    store_files._seen.clear()
    open_(where)
    assert sorted(read[1:]) == sorted(FILES)


def test_a_cache_that_cannot_be_written_is_verified_once_a_process(where, monkeypatch):
    store = open_(where)
    (store.path / VERIFIED).unlink()

    def refuse(*_):
        raise OSError(30, "Read-only file system")

    read = []
    real = store_files._crc32
    monkeypatch.setattr(store_files, "_crc32", lambda path: read.append(path.name) or real(path))
    monkeypatch.setattr(store_files, "write_text", refuse)
    monkeypatch.setattr(store_files, "_seen", {})
    for _ in range(2):
        assert len(open_(where)) == len(ROWS)
    assert len(read) == len(FILES)


def _open_in_child(where, queue):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        queue.put((len(open_(where)), sum("built anew" in str(one.message) for one in told)))


def test_of_several_at_once_one_builds_it_anew(where):
    flip(open_(where).path / "ids.bin")
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    children = [context.Process(target=_open_in_child, args=(where, queue)) for _ in range(4)]
    for child in children:
        child.start()
    found = [queue.get(timeout=60) for _ in children]
    for child in children:
        child.join(60)
    assert [count for count, _ in found] == [len(ROWS)] * 4
    assert sum(said for _, said in found) == 1


def test_the_lock_of_a_builder_that_was_killed_goes(where):
    store = open_(where)
    lock = store.path.with_name(f".{store.path.name}.lock")
    lock.touch()
    open_(where)
    assert not lock.exists()
