"""A mixture that changes: values by hand, caps over the run, mistakes."""

import numpy as np
import pytest

from data_mixers import MixError, Mixture, MixturePlan
from data_mixers.plan.quota import VaryingQuota
from data_mixers.plan.schedule import MixtureSchedule

A, B = Mixture.of({"a": 1.0, "b": 0.0}), Mixture.of({"a": 0.0, "b": 1.0})
RAMP = MixtureSchedule(((0.0, A), (1.0, B)))
SIZES = {"a": 30, "b": 7}


def test_linear_between_stops_and_constant_outside():
    schedule = MixtureSchedule(((0.25, A), (0.75, B)))
    assert [schedule.at(x)["b"] for x in (0, 0.25, 0.5, 0.7, 1)] == pytest.approx([0, 0, 0.5, 0.9, 1])
    assert schedule.shares(4)[:, 1] == pytest.approx([0, 0.25, 0.75, 1])
    assert schedule.mean(4)["a"] == pytest.approx(0.5)


def test_two_stops_at_one_place_jump():
    assert MixtureSchedule.segments([(0, A), (3, B)], 10).shares(10)[:, 1].tolist() == [0] * 3 + [1] * 7


def test_golden_ramp():
    """Ten rows a step over five steps: b is asked for 1 3 5 7 9."""
    plan = MixturePlan(RAMP, SIZES, steps=5, batch=10, seed=0)
    rows = np.diff([plan.counts(s)[1] for s in range(6)])
    assert rows.tolist() == [1, 3, 5, 7, 9]


def test_no_step_rounds_alone():
    """A share of 0.25 of one row a step: every fourth step, not never (which rounding each step would give)."""
    quota = VaryingQuota(np.tile([0.75, 0.25], (400, 1)), 1)
    taken = np.flatnonzero(quota.rows(0, 400)[:, 1])
    assert len(taken) == 100
    assert np.all(np.diff(taken) <= 7)


def test_the_row_that_is_due_first_comes_first():
    """Ten slow tasks before four fast ones: were seats given in the order of the tasks, the slow ones would hold all
    three after step 1, and the fast ones, which are due in step 2, would be late.
    """
    share_SK = np.tile([0.1 / 3] * 10 + [0.5 / 3] * 4, (60, 1))
    counts = np.cumsum(VaryingQuota(share_SK, 3).rows(0, 60), axis=0)
    assert np.abs(counts - 3 * np.cumsum(share_SK, axis=0)).max() < 1


def test_epochs_go_on_and_have_their_own_order():
    plan = MixturePlan(RAMP, SIZES, steps=50, batch=4, seed=1)
    task, epoch, row = plan.locate(np.arange(len(plan)))
    orders = [tuple(row[(task == 1) & (epoch == e)].tolist()) for e in range(14)]
    assert all(sorted(order) == list(range(7)) for order in orders)
    assert len(set(orders)) == 14


def test_caps_count_over_the_whole_run():
    with pytest.raises(MixError, match="b: 100 rows asked, 14 allowed"):
        MixturePlan(RAMP, SIZES, steps=20, batch=10, seed=0, max_epochs={"b": 2})
    late = MixtureSchedule(((0.0, A), (0.99, B)))
    with pytest.raises(MixError, match=r"at progress 0\.99 only tasks at their epoch cap"):
        MixturePlan(late, SIZES, steps=200, batch=1, seed=0, max_epochs={"b": 2}, on_cap="redistribute")
    never_alone = MixtureSchedule(((0.0, A), (1.0, Mixture.of({"a": 0.3, "b": 0.7}))))
    plan = MixturePlan(never_alone, SIZES, steps=20, batch=10, seed=0, max_epochs={"b": 2}, on_cap="redistribute")
    assert plan.rows_K.tolist() == [186, 14]
    assert plan.counts(10)[1] < 7  # the shape stays: less at first, more at the end


def test_a_cap_that_is_met_exactly():
    """Rounding to units must not carry anybody over: 3 x 7 rows are asked, 3 epochs of 7 allowed."""
    third = Mixture.of({"a": 1 / 3, "b": 1 / 3, "c": 1 / 3})
    schedule = MixtureSchedule(((0.0, third), (1.0, third)))
    plan = MixturePlan(schedule, {"a": 7, "b": 7, "c": 7}, steps=7, batch=9, seed=0, max_epochs=3)
    assert plan.rows_K.tolist() == [21, 21, 21]


def test_the_fingerprint_knows_the_schedule():
    options = {"steps": 10, "batch": 4, "seed": 0}
    plans = [
        MixturePlan(mixture, SIZES, **options)
        for mixture in (RAMP, MixtureSchedule(((0.0, B), (1.0, A))), Mixture.of({"a": 0.5, "b": 0.5}))
    ]
    assert len({plan.fingerprint for plan in plans}) == 3
    assert MixturePlan(RAMP, SIZES, **options, style="alternating").fingerprint != plans[0].fingerprint


@pytest.mark.parametrize(
    ("stops", "what"),
    [
        ((), "without a stop"),
        (((0.5, A), (0.2, B)), "a stop at progress 0.2 behind one at 0.5"),
        (((0.0, A), (1.5, B)), "a stop at progress 1.5"),
        (((0.0, A), (1.0, Mixture.of({"a": 0.5, "c": 0.5}))), "unknown task 'c'"),
    ],
)
def test_mistakes(stops, what):
    with pytest.raises(MixError, match=what):
        MixtureSchedule(stops)
    with pytest.raises(MixError, match="start at step 0"):
        MixtureSchedule.segments([(2, A)], 10)
    with pytest.raises(MixError, match="in rising order"):
        MixtureSchedule.segments([(0, A), (12, B)], 10)
