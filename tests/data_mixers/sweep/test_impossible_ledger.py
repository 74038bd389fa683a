"""Mixtures and scores that no sweep writes are named, and a cause that many trials share is told once."""

import json

import pytest

from data_mixers.common.errors import MixError
from data_mixers.sweep.ledger import TrialLedger
from data_mixers.sweep.runner import SweepResult

GOOD = {"trial": "a", "status": "done", "mixture": {"x": 0.5, "y": 0.5}, "scores": {"loss": 1.0}, "v": 1}


def ledger(path, *lines):
    path.write_text("".join(line + "\n" for line in lines))
    return TrialLedger(path)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"mixture": {"x": 3, "y": 3}}, "adds up to 6"),
        ({"mixture": {"x": -1, "y": 2}}, "key mixture is no object of numbers"),
        ({"mixture": {}}, "adds up to 0"),
        ({"mixture": {"x": float("nan"), "y": 1}}, "key mixture is no object of numbers"),
        ({"scores": {"loss": float("inf")}}, "key scores is no object of numbers and nulls"),
    ],
)
def test_a_line_that_cannot_be(tmp_path, change, told):
    with pytest.raises(MixError, match=told) as caught:
        ledger(tmp_path / "ledger.jsonl", json.dumps(GOOD), json.dumps(GOOD | change))
    assert caught.value.where.endswith("ledger.jsonl:2")


def test_rounded_shares_and_null_scores_are_read(tmp_path):
    line = json.dumps(GOOD | {"mixture": {"x": 0.333, "y": 0.666}, "scores": {"loss": None}})
    assert ledger(tmp_path / "ledger.jsonl", line).nulls("loss") == 1


def test_a_common_cause_is_told_once():
    failed = {f"t{number}": "OSError: no rows\n  File trace" for number in range(40)} | {
        "other": "ValueError: x",
        "e": "",
    }
    text = SweepResult(failed=failed).text()
    assert text.count("OSError: no rows") == 1
    assert "(40 trials)" in text
    assert "other  ValueError: x" in text
    assert len(text.splitlines()) == 4
