"""Batches that one thread builds ahead: the same ones, errors where they belong, no thread that outlives its use."""

import threading
import time

import pytest
import torch

from mtft.data.batching import prefetch
from mtft.data.batching.batch import Batch
from mtft.data.batching.prefetch import AHEAD, PrefetchedSteps
from tests.data.batching.test_batches import source_of

CPU = torch.device("cpu")


def threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("batches")]


class Watched:
    """A source that notes what was asked for, and by which thread; asking for step `bad` fails."""

    def __init__(self, steps, bad=None):
        self.steps, self.bad, self.asked = steps, bad, []

    def __len__(self):
        return self.steps

    def __getitem__(self, s):
        self.asked.append((s, threading.current_thread().name))
        if s == self.bad:
            raise OSError("the disk is gone")
        if not 0 <= s < self.steps:
            raise IndexError(s)
        return [s]


def until(condition):
    limit = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.001)


@pytest.mark.parametrize("first", [0, 3, 5])
def test_the_same_batches_from_any_step_on(first):
    source = source_of()
    steps = PrefetchedSteps(source_of(), CPU)
    assert len(steps) == len(source) == 6
    for s in range(first, 6):
        for found, expected in zip(steps[s], source[s], strict=True):
            pairs = [(getattr(found, name), value) for name, value in vars(expected).items()]
            assert all(one is other if other is None else torch.equal(one, other) for one, other in pairs)
    steps.close()


def test_two_steps_ahead_in_one_thread_and_no_further():
    source = Watched(20)
    steps = PrefetchedSteps(source, CPU)
    assert steps[7] == [7]
    until(lambda: len(source.asked) == 1 + AHEAD)
    time.sleep(0.05)
    assert [s for s, _ in source.asked] == [7, 8, 9]
    assert steps[8] == [8]
    until(lambda: len(source.asked) == 2 + AHEAD)
    steps.close()
    assert [s for s, _ in source.asked] == [7, 8, 9, 10]
    assert {name for _, name in source.asked} == {"batches_0"}


def test_nothing_ahead_where_the_plan_may_change():
    source = Watched(5)
    steps = PrefetchedSteps(source, CPU, ahead=0)
    assert [steps[s] for s in range(3)] == [[0], [1], [2]]
    steps.close()
    assert [s for s, _ in source.asked] == [0, 1, 2]


def test_the_end():
    source = Watched(3)
    steps = PrefetchedSteps(source, CPU)
    assert [steps[s] for s in range(3)] == [[0], [1], [2]]
    with pytest.raises(IndexError):
        steps[3]
    steps.close()


def test_an_error_is_raised_where_its_batch_is_asked_for():
    steps = PrefetchedSteps(Watched(9, bad=2), CPU)
    assert [steps[0], steps[1]] == [[0], [1]]  # although it has happened by now
    with pytest.raises(OSError, match="the disk is gone"):
        steps[2]
    steps.close()


def test_no_thread_after_the_end():
    before = threads()
    steps = PrefetchedSteps(Watched(9), CPU)
    assert threads() == before
    _ = steps[0]
    assert len(threads()) == len(before) + 1
    steps.close()
    assert threads() == before


def test_what_is_in_the_trained_step_is_known_without_its_plan():
    """The plan is asked by the thread alone."""
    source = source_of()
    expected = [source_of().content(s) for s in range(len(source))]
    steps, asked, step = PrefetchedSteps(source, CPU), [], source.plan.step
    source.plan.step = lambda s: asked.append(threading.current_thread().name) or step(s)
    for s, content in enumerate(expected):
        _ = steps[s]
        until(lambda at=s: len(asked) == min(at + 1 + AHEAD, len(source)))
        assert all((left == right).all() for left, right in zip(source.content(s), content, strict=True))
    steps.close()
    assert set(asked) == {"batches_0"}


def test_pinned_for_a_gpu_in_the_thread_on_the_device_of_its_rank(monkeypatch):
    chosen, pinned = [], []
    monkeypatch.setattr(prefetch.torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(Batch, "pin_memory", lambda batch: pinned.append(threading.current_thread().name) or batch)
    device = torch.device("cuda", 3)
    steps = PrefetchedSteps(source_of(), device)
    count = sum(len(steps[s]) for s in range(6))
    steps.close()
    assert chosen == [device]
    assert pinned == ["batches_0"] * count
