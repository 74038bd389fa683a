"""Append-only, torn tails, later wins, nulls never fitted; trials from two CSV files."""

import json
import math

import numpy as np
import pytest

from data_mixers import MixError, Mixture
from data_mixers.sweep.ledger import TrialLedger
from data_mixers.sweep.trial import Trial, done_records, failed_record


def trial(share, seed=0, **options):
    return Trial(Mixture.of({"sql": share, "sum": 1 - share}), seed=seed, **{"config": "c", "scale": 6e8, **options})


def write(path, *shares, points=((1.0, 1.5),)):
    ledger = TrialLedger(path)
    for share in shares:
        ledger.append(done_records(trial(share), [(p, {"sql/loss": s}) for p, s in points], 1.0))
    return ledger


def test_a_line_is_what_the_format_says(tmp_path):
    write(tmp_path / "l.jsonl", 0.4)
    line = json.loads((tmp_path / "l.jsonl").read_text())
    expected = {"v", "trial", "status", "mixture", "progress", "scores", "goal", "model", "scale", "steps", "tokens"}
    assert expected | {"seed", "sizes", "cost", "config", "error", "time"} <= set(line)
    assert line["mixture"] == {"sql": 0.4, "sum": 0.6}
    assert line["scores"] == {"sql/loss": 1.5}


def test_a_torn_tail_is_ignored_then_cut(tmp_path):
    path = tmp_path / "l.jsonl"
    write(path, 0.1, 0.2)
    whole = path.read_bytes()
    path.write_bytes(whole + whole[: len(whole) // 3])
    with pytest.warns(UserWarning, match="torn"):
        ledger = TrialLedger(path)
    assert len(ledger.records) == 2
    ledger.append(done_records(trial(0.3), [(1.0, {"sql/loss": 2.0})], 1.0))
    assert [r.mixture["sql"] for r in TrialLedger(path).records] == [0.1, 0.2, 0.3]


def test_a_torn_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "l.jsonl"
    write(path, 0.1, 0.2)
    lines = path.read_text().splitlines()
    path.write_text(f"{lines[0]}\n{lines[1][:40]}\n{lines[1]}\n")
    with pytest.raises(MixError, match=r"l\.jsonl:2"):
        TrialLedger(path)


def test_half_a_trial_is_not_done(tmp_path):
    path = tmp_path / "l.jsonl"
    write(path, 0.1, points=((0.5, 2.0), (1.0, 1.0)))
    path.write_text(path.read_text().splitlines()[0] + "\n")
    ledger = TrialLedger(path)
    assert ledger.done == set()
    assert ledger.records == []


def test_the_later_line_wins_and_failures_end_when_done(tmp_path):
    ledger = TrialLedger(tmp_path / "l.jsonl")
    ledger.append([failed_record(trial(0.1), "Boom", 1.0)])
    assert set(ledger.failed) == {trial(0.1).id}
    for value in (1.0, 2.0):
        ledger.append(done_records(trial(0.1), [(1.0, {"sql/loss": value})], 1.0))
    assert ledger.failed == {}
    assert ledger.to_arrays("sql/loss").y.tolist() == [2.0]


def test_a_null_is_counted_and_serves_the_other_scores(tmp_path):
    ledger = TrialLedger(tmp_path / "l.jsonl")
    ledger.append(done_records(trial(0.1), [(1.0, {"sql/loss": math.nan, "sum/loss": 1.0})], 1.0))
    ledger.append(done_records(trial(0.2), [(1.0, {"sql/loss": 3.0})], 1.0))
    ledger = TrialLedger(ledger.path)
    assert ledger.nulls("sql/loss") == 1
    assert ledger.to_arrays("sql/loss").y.tolist() == [3.0]
    assert ledger.to_arrays("sum/loss").y.tolist() == [1.0]
    with pytest.raises(MixError, match="scores: sql/loss, sum/loss"):
        ledger.to_arrays("loss")


def test_repeats_share_a_group_and_mixed_configs_are_refused(tmp_path):
    ledger = TrialLedger(tmp_path / "l.jsonl")
    for t in (trial(0.1), trial(0.1, seed=1), trial(0.7)):
        ledger.append(done_records(t, [(1.0, {"sql/loss": 1.0})], 1.0))
    groups = ledger.to_arrays("sql/loss").groups
    assert groups[0] == groups[1] != groups[2]
    ledger.append(done_records(trial(0.2, config="other"), [(1.0, {"sql/loss": 1.0})], 1.0))
    with pytest.raises(MixError, match="2 different recipes"):
        ledger.to_arrays("sql/loss")
    assert len(ledger.to_arrays("sql/loss", mixed_config=True).y) == 4


def csv_files(tmp_path, mixtures, scores):
    (tmp_path / "x.csv").write_text(mixtures)
    (tmp_path / "y.csv").write_text(scores)
    return TrialLedger.from_csv(tmp_path / "x.csv", tmp_path / "y.csv", "index", goal="max")


def test_from_csv_joins_on_the_index(tmp_path):
    ledger = csv_files(tmp_path, "index,a,b\n1,0.2,0.8\n2,0.5,0.5\n", "index,f1,em\n2,7,8\n1.0,5,\n")
    arrays = ledger.to_arrays("f1")
    np.testing.assert_array_equal(arrays.X, [[0.2, 0.8], [0.5, 0.5]])
    assert arrays.y.tolist() == [5, 7]
    assert ledger.to_arrays("em").y.tolist() == [8]
    assert ledger.goal("f1") == "max"


@pytest.mark.parametrize(
    ("mixtures", "scores", "says"),
    [
        ("index,a,b\n1,0.2,0.8\n1,0.5,0.5\n", "index,f1\n1,5\n", "lines 2 and 3"),
        ("index,a,b\n1,0.2,0.8\n", "index,f1\n2,5\n", "not in"),
        ("index,a,b\n1,0.2,x\n", "index,f1\n1,5\n", "column b"),
        ("index,a,b\n1,0.2,0.9\n", "index,f1\n1,5\n", "add up to 1.1"),
        ("index,a,b\n1,-0.2,1.2\n", "index,f1\n1,5\n", "negative"),
        ("id,a,b\n1,0.2,0.8\n", "index,f1\n1,5\n", "no column 'index'"),
        ("index,a,b\n1,0.2\n", "index,f1\n1,5\n", "2 cells under 3 columns"),
    ],
)
def test_bad_csv_is_refused_by_place(tmp_path, mixtures, scores, says):
    with pytest.raises(MixError) as error:
        csv_files(tmp_path, mixtures, scores)
    assert says in str(error.value)
