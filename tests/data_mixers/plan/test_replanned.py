"""A mixture that is changed while it is played keeps what a plan promises: epochs, world sizes, resume, caps."""

import json

import numpy as np
import pytest

from data_mixers import Bounds, Infeasible, MixError, Mixture, MixturePlan
from data_mixers.online.bandit import OnlineBandit
from data_mixers.plan.replanned import ReplannedPlan
from data_mixers.plan.schedule import MixtureSchedule
from tests.slow import slow

SIZES = {"a": 37, "b": 11, "c": 5}
OPTIONS = {"steps": 30, "batch": 8, "seed": 4}
EVEN = Mixture.of({"a": 0.5, "b": 0.3, "c": 0.2})
LATE = Mixture.of({"c": 0.1, "a": 0.1, "b": 0.8})  # in another order on purpose


def rows_of(chain, steps):
    return np.concatenate([np.stack(chain.step(s)) for s in steps], axis=1)


def changed(*changes, mixture=EVEN, **options):
    chain = ReplannedPlan(mixture, SIZES, **{**OPTIONS, **options})
    for at, shares in changes:
        chain.replan(at, shares)
    return chain


def test_without_a_change_it_is_the_plan():
    plan, chain = MixturePlan(EVEN, SIZES, **OPTIONS), changed()
    assert np.array_equal(rows_of(chain, range(30)), rows_of(plan, range(30)))


@pytest.mark.parametrize("style", ["mixed", "alternating"])
def test_epochs_run_on_over_a_change(style):
    chain = changed((11, LATE), (20, EVEN), style=style)
    task, epoch, row = rows_of(chain, range(30))
    assert len({*zip(task.tolist(), epoch.tolist(), row.tolist(), strict=True)}) == 240
    for k, size in enumerate(SIZES.values()):
        seen = epoch[task == k]
        assert np.array_equal(seen, np.arange(len(seen)) // size)
    assert np.mean(task[11 * 8 : 20 * 8] == 1) == pytest.approx(0.8, abs=0.02 if style == "mixed" else 0.15)
    assert np.array_equal(chain.counts(30), np.bincount(task))
    for world in (1, 3):
        parts = [np.stack(chain.step(15, rank, world)) for rank in range(world)]
        assert sum(part.shape[1] for part in parts) == 8


def test_rounding_does_not_add_up_over_many_changes():
    """One row a step and a change at every step: planning each part by itself would never play task b at all."""
    rare = Mixture.of({"a": 0.7, "b": 0.2, "c": 0.1})
    chain = changed(*[(at, rare) for at in range(1, 300)], mixture=rare, steps=300, batch=1)
    counts = np.stack([chain.counts(s) for s in range(301)])
    assert np.abs(counts - np.arange(301)[:, None] * rare.shares).max() < 2


@pytest.mark.parametrize("seed", [1, *slow(0, 2)])
def test_rounding_of_tokens_does_not_add_up_over_many_changes(seed):
    """A change at every step, and a task whose rows are longer than its share of three steps: every prefix stays within
    two rows of what was asked of it."""
    rng = np.random.default_rng(seed)
    lengths = {name: rng.integers(10, 60, size) for name, size in SIZES.items()}
    rare = Mixture.of({"a": 0.7, "b": 0.2, "c": 0.1})
    options = {"unit": "tokens", "lengths": lengths, "batch": 100, "steps": 60}
    chain, asked = changed(mixture=rare, **options), [rare]
    for at in range(1, 60):
        p = np.array([0.7, 0.2, 0.1]) if seed == 0 else rng.dirichlet([7, 2, 1])
        asked.append(Mixture(rare.names, p))
        chain.replan(at, asked[-1])
    gap = np.zeros(3)
    for s, mixture in enumerate(asked):
        task, _, row = chain.step(s)
        own = np.array([lengths[chain.names[k]][i] for k, i in zip(task, row)])
        gap += mixture.shares * own.sum() - np.bincount(task, weights=own, minlength=3)
        assert np.abs(gap).max() < 120
    assert np.bincount(np.concatenate([chain.step(s)[0] for s in range(60)]), minlength=3).min() > 3
    again = changed(mixture=rare, **options)
    again.restore(json.loads(json.dumps(chain.state(59))))
    assert np.array_equal(rows_of(again, range(60)), rows_of(chain, range(60)))


def test_a_schedule_can_follow():
    ramp = MixtureSchedule(((0.0, EVEN), (1.0, LATE)))
    chain = changed((10, ramp))
    assert np.diff([chain.counts(s)[1] for s in (10, 15, 25, 30)]).tolist() == pytest.approx([15, 44, 29], abs=1)
    again = changed()
    again.restore(json.loads(json.dumps(chain.state(12))))
    assert np.array_equal(rows_of(chain, range(30)), rows_of(again, range(30)))


def test_by_tokens():
    lengths = {name: np.arange(1, size + 1) for name, size in SIZES.items()}
    chain = changed((12, LATE), unit="tokens", lengths=lengths, batch=60)
    task, epoch, row = rows_of(chain, range(30))
    assert len({*zip(task.tolist(), epoch.tolist(), row.tolist(), strict=True)}) == len(task)
    with pytest.raises(ValueError, match="constant, mixed shares"):
        changed(unit="tokens", lengths=lengths, batch=60, style="alternating")._plan(0).owed(3)


def test_resume_with_a_bandit_that_goes_on():
    def run(chain, bandit, start, stop):
        out = []
        for s in range(start, stop):
            if s and s % 10 == 0 and all(change.first != s for change in chain.changes):
                chain.replan(s, Mixture(EVEN.names, bandit.shares))
            rows = np.stack(chain.step(s))
            out.append(rows)
            bandit = bandit.update({int(t): 2.0 + t for t in np.unique(rows[0])})
        return out, bandit

    whole, _ = run(changed(), OnlineBandit.start(3), 0, 30)
    chain = changed()
    first, bandit = run(chain, OnlineBandit.start(3), 0, 17)
    state = json.loads(json.dumps(chain.state(17)))
    again = changed()
    step = again.restore(state)
    rest, _ = run(again, bandit, step, 30)
    assert all(np.array_equal(a, b) for a, b in zip(whole, first + rest, strict=True))
    with pytest.raises(MixError, match="another plan"):
        changed(seed=5).restore(state)


def test_caps_count_over_the_whole_run():
    # b: 0.3 x 240 rows are 72 if the first mixture stays; it may have 6 x 11
    with pytest.raises(MixError, match="b: 72 rows asked, 66 allowed"):
        changed(max_epochs={"b": 6})
    # declared in advance, what is played counts, not what a mixture would play if it stayed: 3 of 30 steps
    brief = MixtureSchedule.segments([(0, LATE.over(EVEN.names)), (3, Mixture.of({"a": 0.9, "b": 0.0, "c": 0.1}))], 30)
    assert changed(mixture=brief, max_epochs={"b": 2}).counts(30)[1] in (19, 20)  # 19.2
    chain = changed((11, LATE), max_epochs={"b": 4, "c": 30}, on_cap="redistribute")
    assert chain.counts(30)[1] <= 44
    with pytest.raises(MixError, match="after step 11"):
        chain.replan(5, EVEN)


def test_what_it_amounts_to():
    """Asked on average over the steps, realised by counting; in tokens with unit tokens."""
    chain = changed((11, LATE), (20, EVEN))
    task = rows_of(chain, range(30))[0]
    table = {row["task"]: row for row in chain.table()}
    assert [row["rows"] for row in chain.table()] == np.bincount(task).tolist()
    assert table["b"]["asked"] == pytest.approx((11 * 0.3 + 9 * 0.8 + 10 * 0.3) / 30)
    assert table["b"]["realised"] == pytest.approx(np.mean(task == 1))
    assert chain.mixture["b"] == pytest.approx(table["b"]["asked"])
    plain = MixturePlan(EVEN, SIZES, **OPTIONS)
    assert changed().table() == plain.table()
    assert changed().mixture == plain.mixture
    assert chain.schedule is None
    lengths = {name: np.arange(1, size + 1) for name, size in SIZES.items()}
    chain = changed((12, LATE), unit="tokens", lengths=lengths, batch=60)
    task, _, row = rows_of(chain, range(30))
    tokens = [int((row[task == k] + 1).sum()) for k in range(3)]
    assert [entry["tokens"] for entry in chain.table()] == tokens
    assert chain.table()[1]["realised"] == pytest.approx(tokens[1] / sum(tokens))


def test_older_plans_are_made_again():
    """Only the last plans are kept; what was played before them is told all the same, and so is a restored chain."""
    shares = [Mixture(EVEN.names, np.array([0.7 - 0.02 * at, 0.2, 0.1 + 0.02 * at])) for at in range(1, 30)]
    chain = changed(*enumerate(shares, 1))
    assert len(chain._plans) <= 2
    rows = rows_of(chain, range(30))
    again = ReplannedPlan(EVEN, SIZES, **OPTIONS)
    assert again.restore(json.loads(json.dumps(chain.state(29)))) == 29
    assert again.fingerprint == chain.fingerprint
    assert np.array_equal(rows_of(again, range(30)), rows)
    again = changed((15, LATE), (16, EVEN))  # it has gone another way from the same beginning
    assert again.restore(chain.state(29)) == 29
    assert all(np.array_equal(one, two) for one, two in zip(again.step(2), chain.step(2)))
    assert np.array_equal(rows_of(again, range(30)), rows)
    assert len({*zip(*(part.tolist() for part in rows), strict=True)}) == 240


def test_a_chain_that_was_begun_otherwise_is_refused():
    state = changed((11, LATE)).state(12)
    for other in (
        ReplannedPlan(LATE.over(EVEN.names), SIZES, **OPTIONS),
        ReplannedPlan(EVEN, {**SIZES, "c": 6}, **OPTIONS),
    ):
        with pytest.raises(MixError, match="another plan"):
            other.restore(state)
        assert len(other.changes) == 1
    renamed = ReplannedPlan(Mixture.of({"a": 0.5, "b": 0.3, "d": 0.2}), [37, 11, 5], **OPTIONS)
    with pytest.raises(MixError, match="another plan"):
        renamed.restore(state)


@pytest.mark.parametrize("style", ["mixed", "alternating"])
@pytest.mark.parametrize("seed", range(20))
def test_shares_within_the_room_are_never_refused(style, seed):
    """Random changes at random steps, each as far towards one task as its epoch cap lets it; caps hold to the row."""
    rng = np.random.default_rng(seed)
    chain = changed(
        mixture=Mixture.of({"a": 0.5, "b": 0.15, "c": 0.35}), max_epochs={"a": 5, "b": 4, "c": 30}, style=style
    )
    limit = np.array([185, 44, 150])
    for at in np.sort(rng.choice(np.arange(1, 30), 8, replace=False)).tolist():
        bounds = Bounds(caps=dict(zip(chain.names, chain.room(at))), names=chain.names)
        try:
            shares = bounds.project(rng.dirichlet([0.3, 0.3, 0.3]) + 1e-9)
        except Infeasible:
            continue  # every row that is left is needed
        chain.replan(at, Mixture(chain.names, shares))  # would raise beyond a cap
    counts = np.bincount(rows_of(chain, range(30))[0], minlength=3)
    assert np.all(counts <= limit)
    assert len(chain.changes) > 4
    with pytest.raises(MixError, match="more epochs"):
        changed(max_epochs={"b": 7}).replan(5, Mixture.of({"a": 0.0, "b": 1.0, "c": 0.0}))


def test_room():
    assert changed().room(5).tolist() == [1, 1, 1]
    chain = changed(max_epochs={"b": 8})
    left = 88 - chain.counts(10)[1]
    assert chain.room(10)[[0, 2]].tolist() == [1, 1]
    assert chain.room(10)[1] == pytest.approx(left / 160, abs=1 / 160)
    lengths = {name: np.arange(1, size + 1) for name, size in SIZES.items()}
    by_tokens = {"unit": "tokens", "lengths": lengths, "batch": 60}
    assert changed(**by_tokens).room(3).tolist() == [1, 1, 1]
    with pytest.raises(ValueError, match="by tokens"):
        changed(**by_tokens, max_epochs={"a": 50}).room(3)
