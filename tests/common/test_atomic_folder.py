"""Folders that replace nothing but their own kind, whole at every moment."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from mtft.common import atomic_folder as module
from mtft.common.atomic_folder import CONTENTS, atomic_folder, restore_replaced
from mtft.common.errors import UserError
from mtft.common.exchange import exchange
from mtft.common.folder_lock import FolderBusyError

# the children that are killed touch files only: no thread of theirs holds a lock
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


def write(out: Path, text: str, **options) -> None:
    with atomic_folder(out, **{"overwrite": True, **options}) as scratch:
        (scratch / "sub").mkdir()
        (scratch / "sub" / "a.txt").write_text(text)
        (scratch / "README.md").write_text("ours")


def content(out: Path) -> str:
    return (out / "sub" / "a.txt").read_text()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(params=["swapped", "moved aside"])
def way(request, monkeypatch):
    """With renameat2, and as on a system that has none."""
    if request.param == "moved aside":
        monkeypatch.setattr(module, "exchange", lambda one, other: False)
    return request.param


def test_written_replaced_and_nothing_left(tmp_path, way):
    out = tmp_path / "out"
    for text in ("one", "two"):
        write(out, text)
        assert content(out) == text
    assert names(tmp_path) == ["out"]
    assert names(out) == [CONTENTS, "README.md", "sub"]


def test_a_signal_while_the_old_one_is_removed_leaves_nothing(tmp_path, monkeypatch, way):
    write(tmp_path / "out", "old")
    really, files = os.unlink, 0

    def interrupted(*arguments, **options) -> None:
        nonlocal files
        files += 1
        if files == 2:
            raise SystemExit(143)
        really(*arguments, **options)

    monkeypatch.setattr(os, "unlink", interrupted)
    with pytest.raises(SystemExit):
        write(tmp_path / "out", "new")
    assert files > 2
    assert content(tmp_path / "out") == "new"
    assert names(tmp_path) == ["out"]


def test_exchange(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").write_text("b")
    if exchange(tmp_path / "a", tmp_path / "b"):  # not on every system
        assert (tmp_path / "b").is_dir()
        assert (tmp_path / "a").read_text() == "b"
    assert not exchange(tmp_path / "a", tmp_path / "nothing")
    assert names(tmp_path) == ["a", "b"]


@pytest.mark.parametrize("moment", ["before", "between", "after"])
def test_killed_while_it_replaces(tmp_path, monkeypatch, way, moment):
    """The old folder or the new one stands there, at once or as soon as anybody looks."""
    out = tmp_path / "out"
    write(out, "old")
    child = os.fork()
    if child == 0:
        rename, swap = Path.rename, module.exchange

        def die(*_, **__):
            os._exit(9)

        def die_after(self, target):
            rename(self, target)
            os._exit(9)

        def die_when_swapped(one, other):
            if swap(one, other):
                os._exit(9)
            return False

        if moment == "before":
            monkeypatch.setattr(module, "_put_in_place", die)
        elif moment == "after":
            monkeypatch.setattr(module.shutil, "rmtree", die)
        else:
            monkeypatch.setattr(Path, "rename", die_after)
            monkeypatch.setattr(module, "exchange", die_when_swapped)
        write(out, "new")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    restore_replaced(out)
    assert content(out) == ("old" if moment == "before" or (moment, way) == ("between", "moved aside") else "new")
    write(out, "third")
    assert content(out) == "third"
    assert names(tmp_path) == ["out"]


def test_a_failed_rename_puts_the_old_one_back(tmp_path, monkeypatch):
    out = tmp_path / "out"
    write(out, "old")
    monkeypatch.setattr(module, "exchange", lambda one, other: False)
    rename = Path.rename

    def fail(self, target):
        if ".part-" in self.name:
            raise OSError(5, "broken disk")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="broken disk"):
        write(out, "new")
    assert content(out) == "old"
    assert names(tmp_path) == ["out"]


def test_what_a_reader_cannot_put_back_it_says_how_to(tmp_path, monkeypatch):
    out = tmp_path / "out"
    old = tmp_path / ".out.old-host-1-ab"
    old.mkdir()

    def refuse(self, target):
        raise PermissionError(13, "no")

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(UserError, match="broken-off") as caught:
        restore_replaced(out)
    assert f"mv {old} {out}" in str(caught.value)


def test_without_overwrite_the_old_one_is_put_back_and_stays(tmp_path):
    out = tmp_path / "out"
    write(out, "old")
    out.rename(tmp_path / ".out.old-elsewhere-1-ab")
    with pytest.raises(UserError, match="something already"):
        write(out, "new", overwrite=False)
    assert content(out) == "old"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda out: (out / "README.md").write_text("mine"), "'README.md' was changed"),
        (lambda out: (out / "sub" / "notes.txt").write_text("mine"), "'sub/notes.txt'"),
        (lambda out: (out / "link").symlink_to(out), "'link'"),
        (lambda out: (out / CONTENTS).unlink(), "did not write this folder"),
        (lambda out: (out / CONTENTS).write_text("[]"), "damaged"),
        (lambda out: (out / CONTENTS).write_text(json.dumps({"format": 99, "files": {}})), "newer version"),
    ],
)
def test_only_what_was_written_so_is_replaced(tmp_path, change, told):
    out = tmp_path / "out"
    write(out, "old")
    change(out)
    before = sorted(out.rglob("*"))
    with pytest.raises(UserError, match=told) as caught:
        write(out, "new")
    assert caught.value.do
    assert content(out) == "old"
    assert sorted(out.rglob("*")) == before
    assert names(tmp_path) == ["out"]


def test_a_folder_of_the_user_is_never_replaced(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    write(out, "into an empty one")
    shutil.rmtree(out)
    out.mkdir()
    (out / "README.md").write_text("my thesis")
    with pytest.raises(UserError, match=r"README\.md"):
        write(out, "new")
    assert (out / "README.md").read_text() == "my thesis"


def test_what_comes_while_it_is_written_is_kept(tmp_path):
    out = tmp_path / "out"

    def disturbed() -> None:
        with atomic_folder(out, overwrite=True):
            out.mkdir()
            (out / "thesis.txt").write_text("mine")

    with pytest.raises(UserError, match=r"thesis\.txt"):
        disturbed()
    assert names(out) == ["thesis.txt"]


def test_a_change_inside_a_large_file_is_seen(tmp_path):
    out, size = tmp_path / "out", 4 * module.SAMPLE
    with atomic_folder(out, overwrite=True) as scratch:
        (scratch / "weights").write_bytes(bytes(size))
    data = bytearray(size)
    data[size // 2] = 1
    (out / "weights").write_bytes(data)
    with pytest.raises(UserError, match="'weights' was changed"):
        write(out, "new")


def test_a_block_that_fails_leaves_nothing_not_even_folders_above(tmp_path):
    def fail() -> None:
        with atomic_folder(tmp_path / "a" / "b" / "out", overwrite=False) as scratch:
            (scratch / "x").write_text("x")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert names(tmp_path) == []
    (tmp_path / "a").mkdir()
    with pytest.raises(ZeroDivisionError):
        fail()
    assert names(tmp_path) == ["a"]


def test_places_that_are_refused(tmp_path):
    (tmp_path / "in" / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "in")
    (tmp_path / "file").write_text("x")
    for place, told in (
        ("in", "holds, an input"),
        (".", "holds, an input"),
        ("in/deep/out", "lies in an input"),
        ("link", "link"),
        ("link/out", "lies in an input"),
        ("file", "is no folder"),
        ("file/out", "is no folder"),
        ("x" * 250, "too long"),
        ("x" * 300, "too long"),
        ("y" * 300 + "/out", "too long"),
    ):
        with pytest.raises(UserError, match=told) as caught:
            write(tmp_path / place, "new", inputs=[tmp_path / "in"])
        assert caught.value.do, place
    assert names(tmp_path) == ["file", "in", "link"]
    write(tmp_path / ("z" * 200), "long enough")
    write(tmp_path / ("z" * 200), "twice")
    assert names(tmp_path) == ["file", "in", "link", "z" * 200]


def test_a_second_writer_is_refused_at_its_start(tmp_path):
    out, begun = tmp_path / "out", []
    (ready, told), (waits, go) = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        with atomic_folder(out, overwrite=True) as scratch:
            (scratch / "x").write_text("first")
            os.write(told, b"x")
            os.read(waits, 1)
        os._exit(0)
    os.read(ready, 1)
    with pytest.raises(FolderBusyError, match="another run"), atomic_folder(out, overwrite=True):
        begun.append(1)
    os.write(go, b"x")
    assert os.waitpid(child, 0)[1] == 0
    assert not begun
    assert (out / "x").read_text() == "first"
    assert names(tmp_path) == ["out"]


def test_a_link_to_itself_is_named(tmp_path):
    (tmp_path / "out").symlink_to("out")
    with pytest.raises(UserError, match="is a link"), atomic_folder(tmp_path / "out", overwrite=True):
        pass
