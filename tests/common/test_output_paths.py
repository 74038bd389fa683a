"""An output that can't be written is refused before the work; nothing but a file of the user's choice is replaced."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from mtft.common.errors import UserError
from mtft.common.output_paths import check_output_file, check_output_folder


def refused(check, path: Path, **options) -> str:
    with pytest.raises(UserError) as caught:
        check(path, **options)
    assert caught.value.where
    assert caught.value.do
    return caught.value.what


def test_a_new_file_is_allowed_and_leaves_nothing(tmp_path: Path):
    check_output_file(tmp_path / "deep" / "er" / "out.jsonl")
    check_output_folder(tmp_path / "deep" / "er")
    assert not list(tmp_path.iterdir())


def test_a_file_is_replaced_on_request_alone(tmp_path: Path):
    out = tmp_path / "out.csv"
    out.write_text("mine")
    assert "there already" in refused(check_output_file, out)
    check_output_file(out, overwrite=True)
    assert out.read_text() == "mine"


def test_what_is_no_file_is_never_replaced(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with socket.socket(socket.AF_UNIX) as bound:
        here = Path.cwd()
        os.chdir(tmp_path)  # the path of a socket has 108 bytes
        bound.bind("sock")
        os.chdir(here)
        for name, kind in (("pipe", "a named pipe"), ("link", "a link"), ("sock", "a socket"), (".", "a folder")):
            assert kind in refused(check_output_file, tmp_path / name, overwrite=True)
    assert "a device" in refused(check_output_file, Path("/dev/null"), overwrite=True)


def test_an_input_is_no_output(tmp_path: Path):
    given = tmp_path / "m.csv"
    given.write_text("a")
    os.link(given, tmp_path / "other-name.csv")
    for path in (given, tmp_path / "other-name.csv", tmp_path / "x" / ".." / "m.csv"):
        (tmp_path / "x").mkdir(exist_ok=True)
        assert "is an input" in refused(check_output_file, path, inputs=[None, given], overwrite=True)
    assert "holds, an input" in refused(check_output_folder, tmp_path, inputs=[given])


@pytest.mark.parametrize("check", [check_output_file, check_output_folder])
def test_places_that_are_none(tmp_path: Path, check):
    assert "nothing can be written" in refused(check, Path("/proc/out"))
    assert "too long" in refused(check, tmp_path / ("n" * 250))
    assert "zero byte" in refused(check, tmp_path / "a\0b")
    assert "not UTF-8" in refused(check, tmp_path / os.fsdecode(b"\xff"))
    (tmp_path / "file").write_text("")
    assert "file is no folder" in refused(check, tmp_path / "file" / "deep" / "out")


def test_a_file_is_no_folder(tmp_path: Path):
    (tmp_path / "file").write_text("")
    assert "file is no folder" in refused(check_output_folder, tmp_path / "file")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_named(tmp_path: Path):
    (tmp_path / "closed").mkdir(mode=0o555)
    assert "Permission denied" in refused(check_output_file, tmp_path / "closed" / "out")
