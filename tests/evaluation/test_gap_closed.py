"""Dynamic Logits Fusion's own table (2406.15480) gives the point values."""

import numpy as np
import pytest

from mtft.evaluation.gap_closed import gap_and_ratio, gap_closed
from mtft.evaluation.task_scores import TaskScores


@pytest.mark.parametrize(
    "strong, fused, tuned, ratio, gap",
    [
        (29.93, 46.09, 47.79, 0.9644, 0.9048),
        (29.93, 34.86, 47.79, 0.7294, 0.2760),
        (37.93, 39.42, 45.68, 0.8630, 0.1923),
    ],
)
def test_the_papers_table(strong, fused, tuned, ratio, gap):
    assert gap_and_ratio(strong, fused, tuned) == (pytest.approx(gap, abs=5e-5), pytest.approx(ratio, abs=5e-5))


def scores(nll, correct=None, ids=None):
    count = len(nll)
    tokens = np.full(count, 4)
    correct = np.zeros(count, int) if correct is None else np.asarray(correct)
    return TaskScores("code", tuple(ids or map(str, range(count))), np.asarray(nll, float), tokens, correct)


@pytest.fixture
def models():
    """300 examples; fusion goes 60 % of the way on each, up to noise of its own."""
    generator = np.random.default_rng(0)
    hard = generator.gamma(4, 2, 300)
    gain = generator.gamma(4, 0.5, 300)
    return scores(hard), scores(hard - 0.6 * gain + 0.1 * generator.standard_normal(300)), scores(hard - gain)


def test_interval_holds_the_truth_and_pairing_makes_it_narrow(models):
    found = gap_closed(*models)
    low, high = found.gap_interval
    assert low < 0.6 < high
    assert high - low < 0.03  # unpaired, the examples' difficulty alone would give more than 0.3
    assert found.ratio_interval[0] < found.ratio < found.ratio_interval[1]
    assert found.reason is None
    assert gap_closed(*models) == found  # seeded


def test_order_of_the_examples_does_not_matter(models):
    strong, fused, tuned = models
    turned = TaskScores("code", fused.ids[::-1], fused.nll_N[::-1], fused.tokens_N[::-1], fused.correct_N[::-1])
    found, expected = gap_closed(strong, turned, tuned), gap_closed(strong, fused, tuned)
    assert found.gap == pytest.approx(expected.gap, rel=1e-12)
    assert found.gap_interval == pytest.approx(expected.gap_interval, rel=1e-12)


def test_accuracies():
    strong, fused, tuned = scores([1] * 4, [4, 0, 0, 0]), scores([1] * 4, [4, 4, 0, 0]), scores([1] * 4, [4, 4, 4, 0])
    assert gap_closed(strong, fused, tuned, metric="exact_match").gap == pytest.approx(0.5)
    assert gap_closed(strong, fused, tuned, metric="exact_match").ratio == pytest.approx(2 / 3)
    assert gap_closed(strong, fused, tuned, metric="token_accuracy").gap == pytest.approx(0.5)


def test_nothing_to_close(models):
    found = gap_closed(models[0], models[1], models[0])
    assert found.gap is None
    assert found.gap_interval is None
    assert "changed nothing" in found.reason
    assert found.ratio is not None


def test_no_tuned_model(models):
    found = gap_closed(models[0], models[1], None)
    assert (found.gap, found.ratio) == (None, None)
    assert "no tuned strong model" in found.reason


def test_too_few_examples_for_an_interval():
    strong, fused, tuned = scores([4.0, 5.0, 4.0]), scores([3.0, 5.0, 4.5]), scores([2.0, 5.5, 4.4])
    found = gap_closed(strong, fused, tuned)
    assert found.gap == pytest.approx((12.5 - 13) / (11.9 - 13))
    assert found.gap_interval is None
    assert "tuning does not help" in found.reason


def test_other_examples_are_an_error(models):
    other = scores([1.0, 2.0], ids=["a", "b"])
    with pytest.raises(ValueError, match="same examples"):
        gap_closed(models[0], other, models[2])
