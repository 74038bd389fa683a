"""What a plan promises, for any sizes, shares, caps, styles, schedules and world sizes (hypothesis).

1  after every step each task is within one row of its exact share (a schedule: of its integral), and totals are
   within one row of what was asked
2  no row twice inside an epoch, and epochs in order
3  epoch caps are never passed
4  any world size sees the same rows in the same order
5  a plan that is made again goes on at any step as if it had never stopped
6  another order of the tasks changes nothing but their numbers
"""

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from data_mixers import MixError, Mixture, MixturePlan
from data_mixers.plan.schedule import MixtureSchedule

SIZES = st.floats(0, 7).map(lambda exponent: max(1, round(10**exponent)))  # 1 ... 10^7, small ones as often as large


@dataclass
class Case:
    mixture: Mixture | MixtureSchedule
    sizes: dict
    options: dict

    def plan(self):
        return MixturePlan(self.mixture, self.sizes, **self.options)


@st.composite
def mixtures(draw, names):
    weights = draw(st.lists(st.integers(0, 1000), min_size=len(names), max_size=len(names)).filter(any))
    return Mixture(tuple(names), np.array(weights) / sum(weights))


@st.composite
def cases(draw, caps=False):
    names = [f"task{k}" for k in range(draw(st.integers(1, 9)))]
    sizes = {name: draw(SIZES) for name in names}
    mixture = draw(mixtures(names))
    if draw(st.booleans()):
        stops = sorted(draw(st.lists(st.floats(0, 1), min_size=1, max_size=4)))
        mixture = MixtureSchedule(tuple((at, draw(mixtures(names))) for at in stops))
    options = {
        "steps": draw(st.integers(1, 60)),
        "batch": draw(st.integers(1, 48)),
        "seed": draw(st.integers(0, 2**40)),
        "style": draw(st.sampled_from(["mixed", "mixed", "alternating"])),
    }
    if caps:
        options["max_epochs"] = {name: draw(st.floats(0.3, 6)) for name in names if draw(st.booleans())}
        options["on_cap"] = draw(st.sampled_from(["error", "redistribute"]))
    return Case(mixture, sizes, options)


def asked_rows(case):
    """Rows [S + 1, K] that the asked shares give after each step."""
    steps, batch = case.options["steps"], case.options["batch"]
    if isinstance(case.mixture, MixtureSchedule):
        return batch * np.vstack([np.zeros(len(case.sizes)), np.cumsum(case.mixture.shares(steps), axis=0)])
    return batch * np.arange(steps + 1)[:, None] * case.mixture.shares


@settings(max_examples=150, deadline=None)
@given(cases())
def test_every_prefix_is_exact(case):
    plan = case.plan()
    steps, batch = plan.steps, plan.batch
    seat = batch if plan.style == "alternating" else 1  # what a task can get: rows, or whole steps
    counts = np.stack([plan.counts(s) for s in range(steps + 1)])
    assert np.all(np.diff(counts, axis=0) >= 0)
    assert np.all(counts.sum(axis=1) == batch * np.arange(steps + 1))
    error = np.abs(counts - asked_rows(case)) / seat
    if plan.schedule is None:
        own = np.arange(steps + 1)[:, None] * plan.rows_K / steps
        assert np.abs(counts - own).max() / seat < 1
        assert np.all(error < 1 + np.arange(steps + 1)[:, None] / steps + 1e-5)  # totals are rounded too
    else:
        assert error.max() < 1 + 1e-5
    assert error[-1].max() < 1 + 1e-5
    assert np.all(counts[-1][plan.mixture.shares == 0] == 0)
    if plan.style == "alternating":
        assert all(len(set(plan.step(s)[0].tolist())) == 1 for s in range(steps))


@settings(max_examples=150, deadline=None)
@given(cases(caps=True))
def test_no_row_twice_in_an_epoch_and_no_cap_passed(case):
    try:
        plan = case.plan()
    except MixError as refused:
        event(refused.what[:40])
        if case.options["on_cap"] == "error":  # refused for a reason: somebody asks for more than whole steps can give
            asked, caps = asked_rows(case)[-1], case.options["max_epochs"]
            spare = case.options["batch"] if case.options["style"] == "alternating" else 1
            allowed = [caps.get(name, np.inf) * size for name, size in case.sizes.items()]
            if not np.any(asked > np.array(allowed) - spare):
                raise
        return
    event("planned")
    task, epoch, row = plan.locate(np.arange(len(plan)))
    assert len({*zip(task.tolist(), epoch.tolist(), row.tolist())}) == len(plan)
    for k, (name, size) in enumerate(case.sizes.items()):
        seen = epoch[task == k]
        assert np.array_equal(seen, np.arange(len(seen)) // size)
        assert np.all(row[task == k] < size)
        assert len(seen) <= case.options["max_epochs"].get(name, np.inf) * size + 1e-6


@settings(max_examples=100, deadline=None)
@given(cases(), st.integers(1, 64), st.data())
def test_any_world_size_and_any_resumed_step(case, world, data):
    whole, again = case.plan(), case.plan()
    s = data.draw(st.integers(0, whole.steps - 1))
    for t in range(whole.steps):
        expected = np.stack(whole.step(t))
        if t == s:
            assert again.fingerprint == whole.fingerprint
            assert np.array_equal(np.stack(again.step(s)), expected)  # without any step before it
            dealt = np.full_like(expected, -1)
            for rank in range(world):
                dealt[:, rank::world] = np.stack(again.step(s, rank, world))
            assert np.array_equal(dealt, expected)


@settings(max_examples=100, deadline=None)
@given(cases(), st.randoms(use_true_random=False))
def test_the_order_of_the_tasks_means_nothing(case, random):
    names = list(case.sizes)
    turned = random.sample(names, len(names))
    stops = case.mixture.stops if isinstance(case.mixture, MixtureSchedule) else ((0.0, case.mixture),)
    other = MixtureSchedule(tuple((at, mixture.over(turned)) for at, mixture in stops))
    a = case.plan()
    b = MixturePlan(
        other if isinstance(case.mixture, MixtureSchedule) else other.stops[0][1],
        {name: case.sizes[name] for name in turned},
        **case.options,
    )
    (task_a, *rest_a), (task_b, *rest_b) = a.locate(np.arange(len(a))), b.locate(np.arange(len(b)))
    assert [names[k] for k in task_a] == [turned[k] for k in task_b]
    assert np.array_equal(rest_a, rest_b)


@st.composite
def token_cases(draw):
    names = [f"task{k}" for k in range(draw(st.integers(1, 6)))]
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    lengths = {name: rng.integers(1, draw(st.integers(2, 200)), draw(st.integers(1, 300))) for name in names}
    case = draw(cases())
    mixture = draw(mixtures(names))
    if draw(st.booleans()):
        mixture = MixtureSchedule(((0.1, mixture), (draw(st.floats(0.1, 1)), draw(mixtures(names)))))
    options = case.options | {"batch": draw(st.integers(200, 2000)), "unit": "tokens", "lengths": lengths}
    return Case(mixture, {name: len(length) for name, length in lengths.items()}, options)


@settings(max_examples=60, deadline=None)
@given(token_cases())
def test_by_tokens(case):
    plan = case.plan()
    lengths = list(case.options["lengths"].values())
    task, epoch, row = plan.locate(np.arange(len(plan)))
    assert len({*zip(task.tolist(), epoch.tolist(), row.tolist())}) == len(plan)
    own = np.array([lengths[t][r] for t, r in zip(task, row)])
    so_far = np.cumsum(own[:, None] * (task[:, None] == np.arange(len(lengths))), axis=0)
    total, batch = np.cumsum(own), case.options["batch"]
    share_SK = (
        case.mixture.shares(plan.steps)
        if isinstance(case.mixture, MixtureSchedule)
        else np.tile(case.mixture.shares, (plan.steps, 1))
    )
    grid = np.vstack([np.zeros(len(lengths)), np.cumsum(share_SK, axis=0)]) * batch
    for s in range(plan.steps):
        first, last = plan.step_range(s)
        assert first < last
        if plan.style == "alternating":
            assert len({*task[first:last].tolist()}) == 1
        assert np.array_equal(plan.counts(s), np.bincount(task[:first], minlength=len(lengths)))
    if plan.style == "alternating":
        at = np.array([plan.step_range(s)[1] - 1 for s in range(plan.steps)])
        longest = max(int(length.max()) for length in lengths)
        assert np.abs(so_far[at] - grid[1:]).max() < 2 * batch + longest
        return
    inside = total <= plan.steps * batch
    longest, at = np.array([length.max() for length in lengths]), np.arange(plan.steps + 1) * batch
    for k in range(len(lengths)):
        asked = np.interp(total[inside], at, grid[:, k])
        bound = longest[k] / 2 + share_SK[:, k].max() * longest.sum() / 2
        assert np.all(np.abs(so_far[inside, k] - asked) <= bound + 1e-6)


@pytest.mark.parametrize("style", ["mixed", "alternating"])
def test_ten_million_rows_are_planned_in_a_moment(style):
    """State: a few integers a task, whatever the rows (a list of the rows would be 80 MB)."""
    sizes = {"a": 5_000_000, "b": 3_000_000, "c": 1_500_000, "d": 500_000}
    mixture = Mixture.of({"a": 0.4, "b": 0.3, "c": 0.2, "d": 0.1})
    plan = MixturePlan(mixture, sizes, steps=156_250, batch=64, seed=0, style=style)
    plan.step(0)
    held = sum(value.nbytes for value in vars(plan).values() if isinstance(value, np.ndarray))
    held += sum(np.asarray(mark).nbytes for mark in plan._order._quota._marks)
    held += sum(array.nbytes for block in plan._blocks.values() for array in block)
    assert held < 4_000_000
