"""A mixture that is changed while it is played keeps what a plan promises: epochs, world sizes, resume, caps."""

import json

import numpy as np
import pytest

from data_mixers import MixError, Mixture, MixturePlan
from data_mixers.chain import PlanChain
from data_mixers.online import OnlineBandit
from data_mixers.schedule import MixtureSchedule

SIZES = {"a": 37, "b": 11, "c": 5}
OPTIONS = {"steps": 30, "batch": 8, "seed": 4}
EVEN = Mixture.of({"a": 0.5, "b": 0.3, "c": 0.2})
LATE = Mixture.of({"c": 0.1, "a": 0.1, "b": 0.8})  # in another order on purpose


def rows_of(chain, steps):
    return np.concatenate([np.stack(chain.step(s)) for s in steps], axis=1)


def changed(*changes, mixture=EVEN, **options):
    chain = PlanChain(mixture, SIZES, **{**OPTIONS, **options})
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


def test_a_schedule_can_follow():
    ramp = MixtureSchedule(((0.0, EVEN), (1.0, LATE)))
    chain = changed((10, ramp))
    assert np.diff([chain.counts(s)[1] for s in (10, 15, 25, 30)]).tolist() == pytest.approx([15, 44, 29], abs=1)
    again, _ = PlanChain.resume(json.loads(json.dumps(chain.state(12))), SIZES, **OPTIONS)
    assert np.array_equal(rows_of(chain, range(30)), rows_of(again, range(30)))


def test_by_tokens():
    lengths = {name: np.arange(1, size + 1) for name, size in SIZES.items()}
    chain = changed((12, LATE), unit="tokens", lengths=lengths, batch=60)
    task, epoch, row = rows_of(chain, range(30))
    assert len({*zip(task.tolist(), epoch.tolist(), row.tolist(), strict=True)}) == len(task)
    with pytest.raises(ValueError, match="by tokens"):
        chain.changes[0][1].owed(3)


def test_resume_with_a_bandit_that_goes_on():
    def run(chain, bandit, start, stop):
        out = []
        for s in range(start, stop):
            if s and s % 10 == 0 and all(first != s for first, _ in chain.changes):
                chain.replan(s, Mixture(EVEN.names, bandit.shares))
            rows = np.stack(chain.step(s))
            out.append(rows)
            bandit = bandit.update({int(t): 2.0 + t for t in np.unique(rows[0])})
        return out, bandit

    whole, _ = run(changed(), OnlineBandit.start(3), 0, 30)
    chain = changed()
    first, bandit = run(chain, OnlineBandit.start(3), 0, 17)
    state = json.loads(json.dumps(chain.state(17)))
    again, step = PlanChain.resume(state, SIZES, **OPTIONS)
    rest, _ = run(again, bandit, step, 30)
    assert all(np.array_equal(a, b) for a, b in zip(whole, first + rest, strict=True))
    with pytest.raises(MixError, match="another plan"):
        PlanChain.resume(state, SIZES, **{**OPTIONS, "seed": 5})


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
