"""A changing mixture keeps what a plan promises: epochs without repeats, any world size, resume, caps over the run."""

import json

import numpy as np
import pytest

from data_mixers import MixError, Mixture, MixturePlan
from data_mixers.chain import PlanChain
from data_mixers.online import OnlineBandit

SIZES = {"a": 37, "b": 11, "c": 5}
OPTIONS = {"steps": 30, "batch": 8, "seed": 4}
EVEN = Mixture.of({"a": 0.5, "b": 0.3, "c": 0.2})
LATE = Mixture.of({"c": 0.1, "a": 0.1, "b": 0.8})


def rows_of(chain, steps):
    return np.concatenate([np.stack(chain.step(s)) for s in steps], axis=1)


def test_one_segment_is_the_plan():
    plan, chain = MixturePlan(EVEN, SIZES, **OPTIONS), PlanChain([(0, EVEN)], SIZES, **OPTIONS)
    assert np.array_equal(rows_of(chain, range(30)), rows_of(plan, range(30)))


def test_epochs_run_on_over_a_boundary():
    chain = PlanChain([(0, EVEN), (11, LATE), (20, EVEN)], SIZES, **OPTIONS)
    task, epoch, row = rows_of(chain, range(30))
    assert len({*zip(task.tolist(), epoch.tolist(), row.tolist(), strict=True)}) == 240
    for k, size in enumerate(SIZES.values()):
        seen = epoch[task == k]
        assert np.array_equal(seen, np.arange(len(seen)) // size)
    assert np.mean(task[11 * 8 : 20 * 8] == 1) == pytest.approx(0.8, abs=0.02)
    assert np.array_equal(chain.counts(30), np.bincount(task))
    for world in (1, 3):
        parts = [np.stack(chain.step(15, rank, world)) for rank in range(world)]
        assert sum(part.shape[1] for part in parts) == 8


def test_resume_with_a_bandit_that_goes_on():
    def run(chain, bandit, start, stop):
        out = []
        for s in range(start, stop):
            if s and s % 10 == 0 and all(first != s for first, _ in chain.segments):
                chain.replan(s, Mixture(EVEN.names, bandit.shares))
            rows = np.stack(chain.step(s))
            out.append(rows)
            bandit = bandit.update({int(t): 2.0 + t for t in np.unique(rows[0])})
        return out, bandit

    whole, _ = run(PlanChain([(0, EVEN)], SIZES, **OPTIONS), OnlineBandit.start(3), 0, 30)
    chain = PlanChain([(0, EVEN)], SIZES, **OPTIONS)
    first, bandit = run(chain, OnlineBandit.start(3), 0, 17)
    state = json.loads(json.dumps(chain.state(17)))
    again, step = PlanChain.resume(state, SIZES, **OPTIONS)
    rest, _ = run(again, bandit, step, 30)
    assert all(np.array_equal(a, b) for a, b in zip(whole, first + rest, strict=True))
    with pytest.raises(MixError, match="another plan"):
        PlanChain.resume(state, SIZES, **{**OPTIONS, "seed": 5})


def test_caps_count_over_the_whole_run():
    with pytest.raises(MixError, match="b: 72 rows asked, 44 allowed"):
        PlanChain([(0, EVEN), (11, LATE)], SIZES, **OPTIONS, max_epochs={"b": 4})
    chain = PlanChain([(0, EVEN), (11, LATE)], SIZES, **OPTIONS, max_epochs={"b": 4, "c": 30}, on_cap="redistribute")
    assert chain.counts(30)[1] <= 44
    with pytest.raises(MixError, match="after step 11"):
        chain.replan(5, EVEN)
