"""What is damaged in a file of ours is named, with file, line and key; what is newer is called so."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from mtft.common.errors import UserError
from mtft.common.own_files import FORMAT, read_own, read_own_lines, write_own
from tests.common.damage import DAMAGE, NEEDS, WHOLE


def test_what_is_written_is_read(tmp_path: Path):
    write_own(tmp_path / "result.json", WHOLE)
    assert read_own(tmp_path / "result.json", NEEDS, do="delete it") == {"format": FORMAT, **WHOLE}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named(tmp_path: Path, kind: str):
    content, place, problem = DAMAGE[kind]
    path = tmp_path / "result.json"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_own(path, NEEDS, do="delete it")
    assert f"damaged: {problem}" in caught.value.what or problem in caught.value.what
    assert caught.value.where == f"{path}{place}"
    assert caught.value.do == "delete it"


def test_a_newer_file_is_not_called_damaged(tmp_path: Path):
    (tmp_path / "result.json").write_text(json.dumps({"format": FORMAT + 1}))
    with pytest.raises(UserError, match="written by a newer version") as caught:
        read_own(tmp_path / "result.json", NEEDS, do="delete it")
    assert "damaged" not in str(caught.value)
    assert "pip install" in (caught.value.do or "")


def test_what_is_no_file_is_never_opened(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    for path, kind in (
        (tmp_path / "pipe", "a named pipe"),
        (tmp_path, "a folder"),
        (tmp_path / "gone", "no such file"),
    ):
        with pytest.raises(UserError, match=kind):
            read_own(path, do="delete it")
        with pytest.raises(UserError, match=kind):
            read_own_lines(path, do="delete it")


def test_lines_are_kept_and_problems_counted(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n\n[1]\n{"step": "2"}\n\xff\n{"step": 3}\n{"step": 4')
    read = read_own_lines(path, {"step": int}, do="delete it")
    assert [row["step"] for row in read.rows] == [1, 3]
    assert read.numbers == [1, 6]
    assert len(read.problems) == 3
    assert read.problems[0].startswith("line 3: it holds a list")
    assert read.torn
