"""Retention: shares by hand, undefined gaps, controls, intervals that hold; diagnostics' golden values and gauge."""

import json
from dataclasses import replace

import numpy as np
import pytest

from mtft.adapters.lora_factors import LoraFactors
from mtft.common.aggregates import AGGREGATES
from mtft.evaluation.task_scores import MetricRows, TaskScores
from mtft.merge.engine.interference import cosines, diagnose, interference
from mtft.merge.engine.merge import merge_adapters
from mtft.merge.methods import METHODS
from mtft.merge.search.retention import retention
from tests.merge import golden as g


def scores(task, loss, accuracy, examples=200, noise=0.0, seed=0):
    """Ten tokens an example; every example at `loss` nats a token (plus its own noise) and `accuracy` of its tokens."""
    rng = np.random.default_rng(seed)
    nll = 10 * loss + noise * rng.normal(size=examples)
    correct = np.full(examples, round(10 * accuracy))
    return TaskScores(task, tuple(map(str, range(examples))), nll, np.full(examples, 10), correct)


def test_shares_by_hand():
    found = retention({"a": scores("a", 3, 0.2)}, {"a": scores("a", 1, 0.8)}, {"a": scores("a", 1.5, 0.5)})
    assert found.tasks["a"]["loss"]["retained"]["value"] == pytest.approx(0.75)
    assert found.tasks["a"]["accuracy"]["retained"]["value"] == pytest.approx(0.5)
    assert found.tasks["a"]["accuracy"]["ratio"] == pytest.approx(0.625)
    assert found.summary["loss"]["min"] == pytest.approx(0.75)


def test_no_clipping():
    found = retention({"a": scores("a", 3, 0.2)}, {"a": scores("a", 1, 0.8)}, {"a": scores("a", 4, 0.9)})
    assert found.tasks["a"]["loss"]["retained"]["value"] == pytest.approx(-0.5)
    assert found.tasks["a"]["accuracy"]["retained"]["value"] == pytest.approx(7 / 6)


def test_an_expert_that_did_not_learn_is_listed_and_not_averaged():
    base = {"a": scores("a", 3, 0.2), "b": scores("b", 3, 0.2, noise=5)}
    single = {"a": scores("a", 1, 0.8), "b": scores("b", 2.99, 0.2, noise=5, seed=1)}
    merged = {"a": scores("a", 2, 0.5), "b": scores("b", 2, 0.2)}
    found = retention(base, single, merged)
    assert found.tasks["b"]["loss"]["retained"]["why"].startswith("undefined")
    assert found.summary["loss"]["undefined"] == ["b"]
    assert found.summary["loss"]["mean"]["value"] == pytest.approx(0.5)


def test_interval_is_paired():
    """Examples differ by far more than the models do, but alike for all: the interval stays narrow."""
    base, single, merged = (scores("a", x, 0.5, noise=8) for x in (3, 1, 2))
    share = retention({"a": base}, {"a": single}, {"a": merged}).tasks["a"]["loss"]["retained"]
    assert share["lower"] == pytest.approx(0.5)
    assert share["upper"] == pytest.approx(0.5)
    loose = retention({"a": base}, {"a": single}, {"a": scores("a", 2, 0.5, noise=8, seed=1)})
    share = loose.tasks["a"]["loss"]["retained"]
    assert share["lower"] < share["value"] < share["upper"]


def test_interval_covers():
    """In 60 worlds with a true share of .6, about 95% of the intervals hold it."""
    hits = 0
    for world in range(60):
        rng = np.random.default_rng(world)
        difficulty = 10 * rng.normal(size=120)
        parts = [
            TaskScores(
                "a",
                tuple(map(str, range(120))),
                10 * x + difficulty + rng.normal(size=120) * 4,
                np.full(120, 10),
                np.zeros(120),
            )
            for x in (3.0, 1.0, 1.8)
        ]
        share = retention(*({"a": p} for p in parts), draws=300).tasks["a"]["loss"]["retained"]
        hits += share["lower"] <= 0.6 <= share["upper"]
    assert hits >= 52


def test_rows_are_matched_by_id_and_must_be_the_same():
    base, single, merged = scores("a", 3, 0.2, noise=5), scores("a", 1, 0.8), scores("a", 2, 0.5, noise=5)
    turned = TaskScores("a", merged.ids[::-1], merged.nll_N[::-1], merged.tokens_N, merged.correct_N)
    expected = retention({"a": base}, {"a": single}, {"a": merged}).as_dict(method="linear", rank=8)
    assert retention({"a": base}, {"a": single}, {"a": turned}).as_dict(method="linear", rank=8) == expected
    with pytest.raises(ValueError, match="same examples"):
        retention({"a": base}, {"a": single}, {"a": scores("a", 2, 0.5, examples=10)})


def test_control_and_others():
    base = {"a": scores("a", 3, 0.2), "c": scores("c", 2, 0.2)}
    single, merged = {"a": scores("a", 1, 0.8)}, {"a": scores("a", 2, 0.5), "c": scores("c", 2.5, 0.2)}
    found = retention(base, single, merged, others={"joint": {"a": scores("a", 1.2, 0.7)}})
    assert found.control["c"]["difference"] == pytest.approx(0.5)
    assert found.others["joint"]["a"]["loss"]["retained"]["value"] == pytest.approx(0.9)
    json.dumps(found.as_dict(method="tsv", rank=16, energy=0.99), allow_nan=False)


def test_diagnostics_golden():
    core = g.core()
    cos = cosines(core)
    np.testing.assert_allclose([cos[0, 1], cos[0, 2], cos[1, 2]], [0.160813419, 0.009373517, -0.064337367], atol=1e-9)
    np.testing.assert_allclose(interference(core, core.sum()), [1.611574387, 0.327110149, 2.105364428], atol=1e-9)


def test_diagnose_files(tmp_path):
    paths = g.write_golden(tmp_path)
    merge_adapters(paths, tmp_path / "out", rank="lossless")
    found = diagnose(paths, tmp_path / "out")
    np.testing.assert_allclose(found["interference"], [1.611574387, 0.327110149, 2.105364428], atol=1e-6)
    np.testing.assert_allclose(found["norms"], [1.180903979, 2.834143230, 0.476597297], atol=1e-6)
    assert found["overlap_right"][0][0] == pytest.approx(1)
    json.dumps(found, allow_nan=False)


def test_overlap_of_equal_and_of_orthogonal_adapters(tmp_path):
    eye = np.eye(10)
    a, b = (LoraFactors(eye[s], np.eye(12)[:, s], 1.0) for s in (slice(0, 2), slice(2, 4)))
    paths = [g.write(tmp_path / str(i), {"q": f}) for i, f in enumerate((a, a, b))]
    merge_adapters(paths, tmp_path / "out", weights=[0.5, 0.5, 1])
    found = diagnose(paths, tmp_path / "out")
    np.testing.assert_allclose(found["overlap_left"], [[1, 1, 0], [1, 1, 0], [0, 0, 1]], atol=1e-6)
    np.testing.assert_allclose(found["interference"], [0, 0, 0], atol=1e-6)


def test_merge_delta_is_what_merge_writes(tmp_path):
    paths = g.write_golden(tmp_path)
    B, A, energy = g.merge_delta(paths, "layers.0.q", "tsv", scale=0.5)
    X = 0.5 * g.full(METHODS["tsv"]().merge(g.parts()))
    np.testing.assert_allclose(B @ A, X, atol=1e-6)
    assert energy == pytest.approx(1)


def test_metrics_of_answers_are_kept_too():
    """A metric where lower is better turns its sign; one that only some tasks have counts for these."""

    def answered(value, error):
        rows = {
            "f1": MetricRows("share", np.full((200, 1), value)),
            "off": MetricRows("error", np.full((200, 1), error)),
        }
        return replace(scores("a", 3 - value, 0.5), answered=rows)

    base, single, merged = answered(0.2, 8), answered(0.8, 2), answered(0.5, 3.5)
    others = [{"a": of, "b": scores("b", loss, 0.5)} for of, loss in ((base, 3), (single, 1), (merged, 2))]
    found = retention(*others)
    assert found.tasks["a"]["f1"]["retained"]["value"] == pytest.approx(0.5)
    assert found.tasks["a"]["off"]["retained"]["value"] == pytest.approx(0.75)
    assert "f1" not in found.tasks["b"]
    assert found.summary["f1"]["mean"]["value"] == pytest.approx(0.5)
    assert found.summary["loss"]["worst"] is not None


def test_weighted_rows_score_as_drawn_rows_do():
    rng = np.random.default_rng(0)
    rows_DN = rng.integers(0, 12, size=(5, 12))
    count_DN = np.stack([np.bincount(rows_N, minlength=12) for rows_N in rows_DN]).astype(float)
    for aggregate in AGGREGATES.values():
        stats_NS = rng.integers(1, 5, size=(12, aggregate.width)).astype(float)
        drawn_D = aggregate.resampled(stats_NS, np.sort(rows_DN, axis=1))
        np.testing.assert_allclose(aggregate.weighted(stats_NS, count_DN), drawn_D, rtol=1e-12)
