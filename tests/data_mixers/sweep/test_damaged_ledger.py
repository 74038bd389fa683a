"""A line of a ledger that is not what was written is named with line and key; a newer one is not called damaged."""

import json
import os

import pytest

from data_mixers import MixError
from data_mixers.sweep.ledger import TrialLedger
from data_mixers.sweep.trial import VERSION

WHOLE = {"v": 1, "trial": "a", "status": "done", "mixture": {"sql": 1.0}, "scores": {"sql/loss": 1.5}, "points": 1}
BAD = {
    "[]": "it holds no object",
    "null": "it holds no object",
    "5": "it holds no object",
    "{": "not valid JSON",
    "[" * 100_000: "nested too deeply",
    '{"trial": "\xff"}': "key v is missing",
}
BAD_KEYS = {
    "v": ("1", "key v is no whole number"),
    "trial": (5, "key trial is no text"),
    "status": ("gone", "key status is 'gone'"),
    "mixture": ([1.0], "key mixture is no object of numbers"),
    "scores": ({"sql/loss": "1.5"}, "key scores is no object of numbers and nulls"),
    "progress": (None, "key progress is no number"),
    "points": (0, "key points is below 1"),
    "goal": ({"sql/loss": 1}, "key goal is no object of texts"),
    "sizes": ({"sql": "many"}, "key sizes is no object of numbers, or null"),
    "seed": (1.5, "key seed is no whole number"),
    "time": (5, "key time is no text"),
}


def refused(path, text):
    path.write_text(json.dumps(WHOLE) + "\n" + text + "\n")
    with pytest.raises(MixError) as caught:
        TrialLedger(path)
    assert caught.value.where == f"{path}:2"
    return caught.value


def test_a_whole_line_is_read(tmp_path):
    (tmp_path / "l.jsonl").write_text(json.dumps(WHOLE) + "\n")
    assert TrialLedger(tmp_path / "l.jsonl").to_arrays("sql/loss").y.tolist() == [1.5]


@pytest.mark.parametrize("text", BAD, ids=lambda text: text[:8])
def test_a_damaged_line_is_named(tmp_path, text):
    assert BAD[text] in refused(tmp_path / "l.jsonl", text).what


@pytest.mark.parametrize("key", BAD_KEYS)
def test_a_key_of_another_type_is_named(tmp_path, key):
    value, told = BAD_KEYS[key]
    assert told in refused(tmp_path / "l.jsonl", json.dumps({**WHOLE, key: value})).what


@pytest.mark.parametrize("key", ["trial", "status", "mixture", "v"])
def test_a_key_that_is_gone_is_named(tmp_path, key):
    rest = {name: value for name, value in WHOLE.items() if name != key}
    assert f"key {key} is missing" in refused(tmp_path / "l.jsonl", json.dumps(rest)).what


def test_bytes_that_are_no_text(tmp_path):
    path = tmp_path / "l.jsonl"
    path.write_bytes(b'{"trial": "\xff"}\n')
    with pytest.raises(MixError, match="not valid JSON"):
        TrialLedger(path)


def test_a_newer_line_is_not_called_damaged(tmp_path):
    error = refused(tmp_path / "l.jsonl", json.dumps({"v": VERSION + 1}))
    assert "newer version" in error.what
    assert "damaged" not in error.what
    assert "pip install" in error.do


def test_what_is_no_file_is_never_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, kind in ((tmp_path, "a folder"), (tmp_path / "pipe", "no plain file")):
        with pytest.raises(MixError, match=kind):
            TrialLedger(path)
