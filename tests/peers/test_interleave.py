"""MixturePlan beside datasets.interleave_datasets (5.2): asked shares 0.4/0.3/0.2/0.1 of 5000/1500/400/50 rows.

The peer draws at random, so its shares are right in the mean only; it stops at the first set that ends, or repeats the
small one 25 times, or ignores the shares; and a resumed shuffle buffer does not go on where it was.
"""

import datasets
import numpy as np
import pytest

from data_mixers import MixError, Mixture, MixturePlan

SIZES = {"a": 5000, "b": 1500, "c": 400, "d": 50}
SHARES = Mixture(tuple(SIZES), np.array([0.4, 0.3, 0.2, 0.1]))
BATCH, STEPS = 64, 197


def interleaved(strategy):
    parts = [datasets.Dataset.from_dict({"task": [k] * n, "row": list(range(n))}) for k, n in enumerate(SIZES.values())]
    mixed = datasets.interleave_datasets(
        parts, probabilities=SHARES.shares.tolist(), seed=0, stopping_strategy=strategy
    )
    return np.array(mixed["task"]), np.array(mixed["row"])


def window_error(task):
    """Mean L1 distance between asked and realised shares over windows of one batch."""
    windows = task[: len(task) // BATCH * BATCH].reshape(-1, BATCH)
    realised = np.stack([(windows == k).mean(axis=1) for k in range(4)], axis=1)
    return np.abs(realised - SHARES.shares).sum(axis=1).mean()


def test_every_batch_is_the_mixture():
    plan = MixturePlan(SHARES, SIZES, steps=STEPS, batch=BATCH, seed=0)
    task, _, _ = plan.locate(np.arange(len(plan)))
    assert window_error(task) < 0.03
    np.testing.assert_allclose(np.bincount(task) / len(task), SHARES.shares, atol=1e-4)
    peer, _ = interleaved("all_exhausted")
    assert window_error(peer) > 5 * window_error(task)


def test_small_sets_are_not_repeated_unseen():
    task, row = interleaved("all_exhausted")
    assert np.bincount(row[task == 3]).max() > 20
    with pytest.raises(MixError, match="d: 1261 rows asked, 200 allowed"):
        MixturePlan(SHARES, SIZES, steps=STEPS, batch=BATCH, seed=0, max_epochs={"d": 4})
    plan = MixturePlan(SHARES, SIZES, steps=STEPS, batch=BATCH, seed=0, max_epochs={"d": 4}, on_cap="redistribute")
    assert plan.rows_K[3] == 200


def test_the_others_stop_early_or_ignore_the_shares():
    assert len(interleaved("first_exhausted")[0]) < 1000
    task, _ = interleaved("all_exhausted_without_replacement")
    assert np.abs(np.bincount(task) / len(task) - SHARES.shares).sum() > 0.5


def test_each_epoch_has_its_own_order():
    plan = MixturePlan(SHARES, SIZES, steps=STEPS, batch=BATCH, seed=0)
    task, epoch, row = plan.locate(np.arange(len(plan)))
    first, second = (row[(task == 3) & (epoch == e)].tolist() for e in (0, 1))
    assert sorted(first) == sorted(second) == list(range(50))
    assert first != second
    peer_task, peer_row = interleaved("all_exhausted")
    order = peer_row[peer_task == 3]
    assert order[:50].tolist() == order[50:100].tolist()  # the peer replays the same order


def test_resume_is_exact():
    plan, again = (MixturePlan(SHARES, SIZES, steps=STEPS, batch=BATCH, seed=0) for _ in range(2))
    assert np.array_equal(np.stack(again.step(150)), np.stack(plan.step(150)))
