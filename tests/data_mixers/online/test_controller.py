"""Online methods in toy worlds where the right answer is known; bounds; and decisions that a restart can't change."""

import json

import numpy as np
import pytest

from data_mixers import Bounds, Group, Infeasible, Mixture, MixturePlan, uniform
from data_mixers.online.bandit import Bandit
from data_mixers.online.controller import MixtureController
from data_mixers.online.group_dro import GroupDRO
from data_mixers.online.linear_law import LinearLaw
from data_mixers.plan.replanned import ReplannedPlan

TASKS = ("a", "b", "c")
SIZES = {"a": 400, "b": 300, "c": 200}
STEPS, BATCH = 120, 16
EVEN = uniform(TASKS)


class World:
    """Losses fall as tasks are trained: level_i + gap_i exp(-sum_j speed_ij rows_j). Deterministic."""

    def __init__(self, level, gap, speed):
        self.level, self.gap, self.speed = np.array(level), np.array(gap), np.array(speed)
        self.rows = np.zeros(len(self.level))

    def losses(self):
        return self.level + self.gap * np.exp(-self.speed @ self.rows)

    def train(self, rows_K):
        seen = np.where(rows_K > 0, self.losses(), np.nan)
        self.rows = self.rows + rows_K
        return seen


def chain_of(mixture=EVEN, sizes=SIZES, steps=STEPS, **options):
    return ReplannedPlan(mixture, sizes, steps=steps, batch=BATCH, seed=1, **options)


def decider_of(method, *, bounds=None, warmup=0, **options):
    return MixtureController(chain_of(**options), bounds or Bounds(names=TASKS), method, warmup=warmup)


def one_step(decider, world, s):
    """Plays step index s; what was decided after it."""
    rows_K = np.bincount(decider.chain.step(s)[0], minlength=len(decider.playing))
    decider.observe(s + 1, world.train(rows_K), rows_K / rows_K.sum())
    valid = world.losses() if decider.measures(s + 1) is not None else None
    decision = decider.propose(s + 1, valid)
    decider.play(decision)
    return rows_K, decision


def play(decider, world, steps=STEPS, start=0):
    rows, decisions = zip(*[one_step(decider, world, s) for s in range(start, steps)])
    return np.array(rows), [decision for decision in decisions if decision is not None]


METHODS = {
    "bandit": lambda: Bandit(3, every=10, scale=1.0),
    "group_dro": lambda: GroupDRO([1 / 3] * 3, [0.1, 0.1, 0.1], every=10),
    "linear_law": lambda: LinearLaw([1 / 3] * 3, every=40, steps=STEPS, probe_steps=5, seed=3),
}
OWN = np.diag([0.01, 0.002, 0.004])  # every task learns from its own rows alone


def world():
    return World([0.1, 0.2, 0.3], [2.0, 3.0, 1.0], OWN)


# ---- each method where the answer is known


def test_the_bandit_leaves_what_is_learnt():
    """Task a is learnt from the start; b is learnt slowly."""
    decider = MixtureController(
        ReplannedPlan(uniform(("a", "b")), {"a": 99, "b": 99}, steps=STEPS, batch=BATCH, seed=0),
        Bounds(names=("a", "b")),
        Bandit(2, every=10, scale=1.0),
    )
    rows, decisions = play(decider, World([0.05, 0.05], [0.0, 3.0], np.diag([0.01, 5e-4])))
    assert decider.playing[1] > 0.9
    assert rows[-10:, 1].mean() > 0.9 * BATCH
    shares = [decision.shares[1] for decision in decisions]
    assert shares[0] > 0.5
    assert shares == sorted(shares)


def test_the_bandit_can_not_tell_equal_tasks_apart():
    decider = decider_of(Bandit(3, every=10, scale=1.0))
    _, decisions = play(decider, World([1.0] * 3, [1.0] * 3, np.full((3, 3), 1e-3)))
    np.testing.assert_allclose(decider.playing, 1 / 3, atol=0.01)
    assert all(np.abs(np.array(decision.shares) - 1 / 3).max() < 0.01 for decision in decisions)


@pytest.mark.parametrize("style, off", [("mixed", 0.001), ("alternating", 0.1)])
def test_how_often_a_task_is_drawn_is_no_reward(style, off):
    """Equal losses, uneven shares at the start: without the importance weight the rich would get richer."""
    uneven = Mixture.of({"a": 0.7, "b": 0.2, "c": 0.1})
    decider = decider_of(Bandit(3, every=60, scale=1.0), mixture=uneven, style=style)
    play(decider, World([1.0] * 3, [0.0] * 3, np.zeros((3, 3))))
    np.testing.assert_allclose(decider.playing, 1 / 3, atol=off)
    np.testing.assert_allclose(decider.method.bandit.rewards, 120, rtol=0.2)  # one of 1 a step, to each


def test_group_dro_raises_the_task_with_excess_loss():
    reference = [0.1, 0.2, 0.3]
    stuck = World([0.1, 0.2, 1.3], [0.0] * 3, OWN)  # c is 1 above its reference, the others are there
    decider = decider_of(GroupDRO([1 / 3] * 3, reference, every=10, eta=0.3))
    _, decisions = play(decider, stuck)
    shares = [decision.shares[2] for decision in decisions]
    assert shares == sorted(shares)
    n = len(range(10, STEPS, 10))
    assert decider.playing[2] == pytest.approx(np.exp(0.3 * n) / (np.exp(0.3 * n) + 2), abs=1e-3)
    high = World([2.0, 0.2, 0.3], [0.0] * 3, OWN)  # a high loss is no excess: that of a is at its reference
    decider = decider_of(GroupDRO([1 / 3] * 3, [2.0, 0.2, 0.3], every=10))
    assert play(decider, high)[1] == []


def test_group_dro_equalises_what_can_be_learnt():
    """Slow tasks get more, until the losses above the references are about the same."""
    slow = World([0.1, 0.1, 0.1], [2.0, 2.0, 2.0], np.diag([0.008, 0.002, 0.002]))
    even, driven = decider_of(GroupDRO([1 / 3] * 3, [0.1] * 3, every=500)), decider_of(METHODS["group_dro"]())
    spread = []
    for decider in (even, driven):
        found = World(slow.level, slow.gap, slow.speed)
        play(decider, found)
        spread.append(np.ptp(found.losses()))
    assert spread[1] < 0.5 * spread[0]


def test_the_linear_law_finds_the_task_that_helps_all():
    """b's rows lower every loss, the others' only their own, and less."""
    helps = World([0.0] * 3, [3.0] * 3, [[0.001, 0.003, 0], [0, 0.003, 0], [0, 0.003, 0.001]])
    decider = decider_of(LinearLaw([1 / 3] * 3, every=24, steps=STEPS, probe_steps=5, eta=4.0, seed=3))
    _, decisions = play(decider, helps)
    chosen = [np.array(decision.wanted) for decision in decisions if decision.first % 24 == 15]
    assert len(chosen) == 4
    assert all(np.argmax(shares) == 1 for shares in chosen)
    assert chosen[-1][1] > 0.7


def test_the_linear_law_solves_for_what_the_probes_held():
    """In a linear world the law is the world's own, whatever the order, the rounding and the caps of the probes."""
    A = np.array([[0.4, 0.0, 0.1], [0.1, 0.2, 0.0], [0.0, 0.1, 0.3]]) * 1e-3
    losses, at = np.array([3.0, 3.0, 3.0]), []
    method = LinearLaw([1 / 3] * 3, every=24, steps=STEPS, probe_steps=5, seed=3)
    decider = decider_of(method, bounds=Bounds(caps=dict.fromkeys(TASKS, 0.6), names=TASKS))
    for s in range(45):
        losses = losses - A @ np.bincount(decider.chain.step(s)[0], minlength=3)
        if decider.measures(s + 1) is not None:
            at.append(s + 1)
            decider.play(decider.propose(s + 1, losses))
    assert at == [24, 29, 34, 39]
    D = np.array([method.falls[j] for j in range(3)]).T
    H = np.array([method.held[j] for j in range(3)])
    np.testing.assert_allclose(method.law.law(D, H), 5 * BATCH * A, atol=1e-9)
    assert sorted(H.max(axis=1).round(2)) == pytest.approx([0.6] * 3, abs=0.02)
    pull = 5 * BATCH * A.sum(axis=0) / D.sum()
    np.testing.assert_allclose(decider.playing, np.exp(0.5 * pull) / np.exp(0.5 * pull).sum(), atol=1e-4)


def test_a_loss_that_was_not_measured_has_no_say():
    method = LinearLaw([1 / 3] * 3, every=24, steps=STEPS, probe_steps=5, seed=3)
    decider, losses = decider_of(method), np.array([3.0, 3.0, np.nan])
    for s in range(40):
        losses = losses - np.array([0.1, 0.0, 0.0]) * (np.bincount(decider.chain.step(s)[0], minlength=3)[0] / BATCH)
        decider.play(decider.propose(s + 1, losses if decider.measures(s + 1) is not None else None))
    assert decider.playing[0] > 0.35
    assert decider.playing[1] == pytest.approx(decider.playing[2])


# ---- when


@pytest.mark.parametrize("name", METHODS)
def test_without_a_decision_it_is_the_plan(name):
    method = {
        "bandit": Bandit(3, every=STEPS),
        "group_dro": GroupDRO([1 / 3] * 3, [0.0] * 3, every=STEPS),
        "linear_law": LinearLaw([1 / 3] * 3, every=STEPS, steps=STEPS),
    }[name]
    plan = MixturePlan(EVEN, SIZES, steps=STEPS, batch=BATCH, seed=1)
    decider = decider_of(method)
    assert play(decider, world())[1] == []
    for s in range(STEPS):
        assert all(np.array_equal(one, two) for one, two in zip(decider.chain.step(s), plan.step(s)))


@pytest.mark.parametrize("name", METHODS)
def test_decisions_are_played_from_the_next_step_on(name):
    """After step s (counted from 1) the step of index s is the first with other shares, and none before it moves."""
    decider, steps = decider_of(METHODS[name](), warmup=20), {}
    at = {
        "bandit": list(range(30, STEPS, 10)),  # what is seen begins after the warm-up
        "group_dro": list(range(30, STEPS, 10)),
        "linear_law": [40, 45, 50, 55, 80, 85, 90, 95],
    }[name]
    here, found = world(), []
    for s in range(STEPS):
        before = [decider.chain.step(i) for i in range(max(0, s - 3), s + 1)]
        _, decision = one_step(decider, here, s)
        steps[s] = decider.chain.step(s)
        assert all(
            np.array_equal(x, y) for one, i in zip(before, range(max(0, s - 3), s + 1)) for x, y in zip(one, steps[i])
        )
        if decision is not None:
            assert decision.first == s + 1
            assert decision.shares is not None
            found.append(s + 1)
    assert found == at
    assert [change.first for change in decider.chain.changes] == [0, *at]


def test_a_round_is_whole_or_not_begun():
    """A warm-up that ends inside a round's probes, and an end of the run before a round's end."""
    method = LinearLaw([1 / 3] * 3, every=24, steps=87, warmup=26)
    decider = decider_of(method, warmup=26, steps=87)
    _, decisions = play(decider, world(), steps=87)
    assert [decision.first for decision in decisions] == [48, 53, 58, 63]


@pytest.mark.parametrize("name", METHODS)
def test_a_restart_anywhere_changes_nothing(name):
    whole, here = decider_of(METHODS[name](), warmup=7), world()
    rows, states = [], []
    for s in range(STEPS):
        states.append((json.dumps(whole.state(s)), here.rows.copy()))
        rows.append(one_step(whole, here, s)[0])
    for start in (3, 9, 10, 11, 40, 42, 45, 46, 55, 60, 93, 119):  # before, at and after decisions, and between probes
        again, there = decider_of(METHODS[name](), warmup=7), world()
        state, there.rows = json.loads(states[start][0]), states[start][1]
        again.restore(state)
        assert np.array_equal(play(again, there, start=start)[0], rows[start:])
        assert again.chain.fingerprint == whole.chain.fingerprint
        assert again.state(STEPS) == whole.state(STEPS)


def test_a_step_that_is_not_told_is_not_seen():
    """Skipped steps, and nothing but skipped steps since the last decision."""
    for method in (Bandit(3, every=10), GroupDRO([1 / 3] * 3, [0.1] * 3, every=10)):
        decider = decider_of(method)
        assert decider.propose(10) is None
        for step in range(11, 16):  # for K ln K draws EXP3 does nothing but explore
            decider.observe(step, [np.nan, 5.0, np.nan], [0.0, 1.0, 0.0])
        decision = decider.propose(20)
        assert np.argmax(decision.wanted) == 1


def test_the_last_bits_of_a_loss_do_not_count():
    """Sums over another number of ranks are rounded otherwise."""
    plans = []
    for jitter in (0.0, 1e-9):
        decider, here = decider_of(METHODS["group_dro"]()), world()
        here.level = here.level + jitter
        play(decider, here)
        plans.append(decider.chain.fingerprint)
    assert plans[0] == plans[1]


# ---- bounds


@pytest.mark.parametrize(
    "name, style", [*((name, "mixed") for name in METHODS), ("bandit", "alternating"), ("group_dro", "alternating")]
)
def test_bounds_hold_at_every_step(name, style):
    bounds = Bounds(
        floors={"a": 0.2}, caps={"b": 0.45, "c": 0.3}, groups=(Group("bc", ("b", "c"), 0.0, 0.7),), names=TASKS
    )
    caps = {"a": 4.0, "b": 2.0, "c": 3.0}
    mixture = Mixture.of({"a": 0.5, "b": 0.25, "c": 0.25})
    decider = decider_of(METHODS[name](), bounds=bounds, mixture=mixture, max_epochs=caps, style=style)
    rows, decisions = play(decider, world())
    assert decisions
    for decision in decisions:
        if decision.shares is not None:
            assert bounds.violations(np.array(decision.shares)) == []
    assert np.all(rows.sum(axis=0) <= [1600, 600, 600])
    chain = decider.chain
    assert np.array_equal(rows.sum(axis=0), chain.counts(STEPS))
    if style == "mixed":  # and what is played is what was decided, to two rows in every stretch
        ends = [change.first for change in chain.changes[1:]] + [STEPS]
        for change, end in zip(chain.changes, ends):
            played = chain.counts(end) - chain.counts(change.first)
            assert np.abs(played - change.shares.shares * BATCH * (end - change.first)).max() < 2
    every = [tuple(part) for s in range(STEPS) for part in zip(*(x.tolist() for x in chain.step(s)))]
    assert len(set(every)) == STEPS * BATCH  # no row twice in one epoch


def test_a_task_without_a_share_stays_out():
    for name in ("bandit", "group_dro"):
        decider = decider_of(METHODS[name](), mixture=Mixture.of({"a": 0.5, "b": 0.5, "c": 0.0}))
        rows, decisions = play(decider, world())
        assert decisions
        assert rows[:, 2].sum() == 0
    law = LinearLaw([0.5, 0.5, 0.0], every=40, steps=STEPS, probe_steps=5)
    rows, decisions = play(decider_of(law, mixture=Mixture.of({"a": 0.5, "b": 0.5, "c": 0.0})), world())
    assert [decision.first for decision in decisions[:3]] == [40, 45, 50]
    assert rows[:, 2].sum() == 0


def test_a_floor_gives_way_to_an_epoch_cap_and_says_so():
    """c's rows are used up by the start of the run: 0.45 of 60 steps are 432 of its 500 rows."""
    mixture = Mixture.of({"a": 0.3, "b": 0.25, "c": 0.45})
    chain = chain_of(mixture, sizes={**SIZES, "c": 500}, steps=60, max_epochs={"c": 1})
    decider = MixtureController(
        chain, Bounds(floors={"c": 0.4}, names=TASKS), GroupDRO(mixture.shares, [0, 0, 9.0], every=10)
    )
    stuck = World([1.0, 1.0, 1.0], [0.0] * 3, OWN)
    _, decisions = play(decider, stuck, steps=60)
    assert decider.chain.counts(60)[2] <= 500
    assert all(decision.notes == () for decision in decisions)
    chain = chain_of(mixture, sizes={**SIZES, "c": 440}, steps=60, max_epochs={"c": 1})
    decider = MixtureController(
        chain, Bounds(floors={"c": 0.5}, names=TASKS), GroupDRO(mixture.shares, [0, 0, 9.0], every=10)
    )
    _, decisions = play(decider, stuck, steps=60)
    assert decider.chain.counts(60)[2] <= 440
    assert all("c gets 0.4" in decision.notes[0] for decision in decisions)
    assert "less than its floor of 0.5000: its max_epochs leave no more" in decisions[0].notes[0]


def test_shares_stay_where_nothing_is_left_to_choose():
    """Every row of the run is spoken for, and caps forbid more of the others."""
    mixture = Mixture.of({"a": 0.5, "b": 0.25, "c": 0.25})
    sizes = {"a": 480, "b": 240, "c": 240}
    chain = chain_of(mixture, sizes=sizes, steps=60, max_epochs=1)
    decider = MixtureController(chain, Bounds(names=TASKS), Bandit(3, every=10, scale=0.1))
    rows, decisions = play(decider, World([5.0, 1.0, 0.1], [0.0] * 3, OWN), steps=60)
    assert rows.sum(axis=0).tolist() == [480, 240, 240]
    assert len(chain.changes) == 1
    assert [decision.shares for decision in decisions] == [None] * 5
    assert all("the shares stay as they are: caps add up to" in decision.notes[-1] for decision in decisions)


def test_bounds_that_nothing_is_within_are_refused_at_the_start():
    with pytest.raises(Infeasible, match=r"caps add up to 0\.9"):
        decider_of(Bandit(3, every=10), bounds=Bounds(caps={"a": 0.3, "b": 0.3, "c": 0.3}, names=TASKS))
    with pytest.raises(ValueError, match="leave none of 15"):
        LinearLaw([1 / 3] * 3, every=15, steps=STEPS)
