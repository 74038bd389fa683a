"""Point estimates by hand, intervals against scipy's bootstrap (an independent implementation) and by coverage."""

import numpy as np
import pytest
from scipy import stats

from mtft.common.errors import UserError
from mtft.evaluation.task_scores import TaskScores, paired_bootstrap


def scores(nll, tokens, correct, task="sql", ids=None):
    ids = tuple(f"row-{i}" for i in range(len(nll))) if ids is None else tuple(ids)
    return TaskScores(task, ids, np.array(nll, float), np.array(tokens), np.array(correct))


def drawn(count, seed, shift=0.0):
    generator = np.random.default_rng(seed)
    tokens = generator.integers(1, 30, count)
    correct = generator.binomial(tokens, 0.8)
    return scores(tokens * (generator.gamma(2.0, 0.5, count) + shift), tokens, correct)


def test_summary_by_hand():
    found = scores([2.0, 1.0, 3.0], [4, 1, 5], [4, 0, 4]).summary()
    assert found == {"loss": 0.6, "token_accuracy": 0.8, "exact_match": 1 / 3, "examples": 3, "tokens": 10}


def test_example_without_supervised_tokens_is_not_exact():
    assert scores([0.0, 1.0], [0, 2], [0, 2]).exact_N.tolist() == [False, True]


def test_save_and_load_keep_every_bit(tmp_path):
    before = drawn(50, seed=3)
    before.save(tmp_path / "deep" / "sql.jsonl")
    after = TaskScores.load(tmp_path / "deep" / "sql.jsonl")
    assert after.ids == before.ids
    assert after.task == "sql"
    assert np.array_equal(after.nll_N, before.nll_N)
    assert np.array_equal(after.exact_N, before.exact_N)


def test_broken_line_is_named(tmp_path):
    path = tmp_path / "sql.jsonl"
    drawn(3, seed=0).save(path)
    path.write_text(path.read_text() + '{"task": "sql", "id": "x"\n')
    with pytest.raises(UserError) as caught:
        TaskScores.load(path)
    assert caught.value.where.endswith("line 4")


def test_interval_equals_scipy_bootstrap():
    given = drawn(200, seed=1)
    lower, upper = given.intervals(draws=20_000)["loss"]
    peer = stats.bootstrap(
        (given.nll_N, given.tokens_N),
        lambda nll, tokens, axis: nll.sum(axis) / tokens.sum(axis),
        paired=True,
        vectorized=True,
        n_resamples=20_000,
        method="percentile",
        random_state=5,
    ).confidence_interval
    width = peer.high - peer.low
    assert abs(lower - peer.low) < 0.05 * width
    assert abs(upper - peer.high) < 0.05 * width


def test_pairing_sees_a_difference_that_two_intervals_would_hide():
    base = drawn(300, seed=2)
    better = scores(base.nll_N - 0.02 * base.tokens_N, base.tokens_N, base.correct_N)
    assert base.intervals()["loss"][0] < better.intervals()["loss"][1]  # the two intervals overlap
    found = paired_bootstrap(better, base)
    assert found.upper < 0
    assert found.difference == pytest.approx(-0.02)


def test_no_difference_is_noise():
    verdicts = []
    for seed in range(40):
        base = drawn(100, seed)
        noise = np.random.default_rng(1000 + seed).normal(0, 1.0, 100)
        found = paired_bootstrap(scores(base.nll_N + noise, base.tokens_N, base.correct_N), base)
        verdicts.append(found.lower > 0 or found.upper < 0)
    assert sum(verdicts) <= 6  # 2 expected at a level of 95 %


def test_order_of_the_examples_does_not_matter():
    a, b = drawn(60, seed=4), drawn(60, seed=5)
    turn = np.random.default_rng(0).permutation(60)
    shuffled = TaskScores(b.task, tuple(b.ids[i] for i in turn), b.nll_N[turn], b.tokens_N[turn], b.correct_N[turn])
    assert paired_bootstrap(a, b, metric="exact_match") == paired_bootstrap(a, shuffled, metric="exact_match")


def test_other_examples_are_refused():
    with pytest.raises(ValueError, match="same examples"):
        paired_bootstrap(drawn(4, seed=0), scores([1.0], [1], [1]))
