"""The held-out stream: every task in it, the same examples for any number of ranks, another choice each time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from mtft.common.errors import UserError
from mtft.data.tokenize.encode import Example
from mtft.losses.task_reduction import step_counts
from mtft.losses.validation_stream import ValidationStream


@dataclass
class Rows:
    """A store whose row i is i + 1 times the token 1000 * task + i, supervised but for its first."""

    number: int
    lengths: np.ndarray

    @property
    def task(self) -> str:
        return f"task{self.number}"

    def example(self, i: int) -> Example:
        n = int(self.lengths[i])
        return Example(np.full(n, 1000 * self.number + i, dtype=np.int32), np.arange(n) > 0)


def stream(lengths, **options):
    stores = [Rows(k, np.asarray(x)) for k, x in enumerate(lengths)]
    options = {"tokens": 60, "max_length": 30, "packing": True, "pad_id": 0, "seed": 1} | options
    return ValidationStream(stores, tasks=[store.task for store in stores], **options)


THREE = [[5] * 20, [3, 4, 5, 6], [12] * 9]


def test_every_task_is_measured_within_the_budget():
    for step in (10, 20, 30):
        ours = stream(THREE)
        chosen = ours.choose(step)
        assert {task for task, _ in chosen} == {0, 1, 2}
        assert len(set(chosen)) == len(chosen)
        counts = step_counts(ours.batches(step), 3)
        tokens = sum(THREE[task][row] for task, row in chosen)
        assert 40 < tokens <= 60
        assert int(counts.tokens_K.sum()) == tokens - len(chosen)  # all but the first token of each


def test_the_choice_depends_on_seed_and_step_only():
    assert stream(THREE).choose(10) == stream(THREE).choose(10)
    assert stream(THREE).choose(10) != stream(THREE).choose(20)
    assert stream(THREE).choose(10) != stream(THREE, seed=2).choose(10)


@pytest.mark.parametrize("packing", [True, False])
def test_ranks_share_the_same_examples(packing):
    whole = step_counts(stream(THREE, packing=packing).batches(10), 3)
    parts = [stream(THREE, packing=packing, rank=rank, world=2).batches(10) for rank in (0, 1)]
    assert len(parts[0]) == len(parts[1])
    both = step_counts(parts[0] + parts[1], 3)
    assert both.tokens_K.tolist() == whole.tokens_K.tolist()
    assert both.samples_K.tolist() == whole.samples_K.tolist()


def test_more_tasks_than_fit_take_turns():
    ours = stream([[25] * 3] * 5)
    seen = [{task for task, _ in ours.choose(step)} for step in range(1, 30)]
    assert all(len(tasks) == 2 for tasks in seen)
    assert set().union(*seen) == {0, 1, 2, 3, 4}


def test_a_task_without_held_out_rows_is_refused():
    with pytest.raises(UserError, match="task1 has no held-out rows"):
        stream([[3], []])
