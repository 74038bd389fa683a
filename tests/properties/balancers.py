"""What holds for every balancer: assertions over a simulated run.

A `Make` builds a fresh balancer from a Context. Each task has a curve of its own, so that tasks can be permuted,
repeated or left out; the weights of the run are what the assertions compare.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Collection

import pytest
import torch
from torch import Tensor

from mtft.common.errors import UserError
from mtft.losses.balancers import Balancer, BalancerContext, Observation

Make = Callable[[BalancerContext], Balancer]
NAMES = ("code", "maths", "sql", "prose")
STEPS = 40


def context(names: Collection[str], **more) -> BalancerContext:
    sizes = torch.tensor([10 ** (1 + NAMES.index(name.split("-")[0])) for name in names])
    return BalancerContext(tuple(names), examples_K=sizes, tokens_K=7 * sizes, **more)


def curve(name: str, step: int, noise: float) -> float:
    """Loss of a task: an exponential of its own speed and floor, with noise that depends on (task, step) only."""
    k = NAMES.index(name.split("-")[0])  # "code-2" has the curve of "code"
    return (
        (0.5 + 0.3 * k)
        + (2 - 0.2 * k) * math.exp(-step / (5 + 10 * k))
        + noise * random.Random(100 * step + k).random()
    )


def task_gradient(name: str, step: int) -> Tensor:
    k = NAMES.index(name.split("-")[0])
    return (1 + k) * torch.randn(6, generator=torch.Generator().manual_seed(10 * step + k), dtype=torch.float64)


def observe(balancer: Balancer, step: int, absent: Collection[str] = ()) -> Observation:
    """Everything there is to see at a step (step 0: validation only). `absent` tasks have nothing."""
    names = balancer.run.tasks

    def losses(at: float, noise: float) -> Tensor:
        values = [math.nan if name in absent else curve(name, at, noise) for name in names]
        return torch.tensor(values, dtype=torch.float64)

    if step == 0:
        return Observation(0, torch.full((len(names),), math.nan, dtype=torch.float64), valid_loss_K=losses(0, 0))
    gradient_KD = torch.stack([task_gradient(name, step) for name in names])
    train_K, needs = losses(step, 0.05), balancer.needs
    gram_KK = gradient_KD @ gradient_KD.T
    gone_K = train_K.isnan()
    gram_KK[gone_K], gram_KK[:, gone_K] = math.nan, math.nan
    return Observation(
        step,
        train_K,
        valid_loss_K=losses(step, 0) if needs.valid_every and step % needs.valid_every == 0 else None,
        gram_KK=gram_KK if needs.gram_every and step % needs.gram_every == 0 else None,
        after_loss_K=losses(step + 0.5, 0.05) if needs.after_step else None,
        train_prob_K=torch.exp(-train_K) if needs.token_probs else None,
        share_K=torch.where(gone_K, 0.0, 1 / (~gone_K).sum().clamp(min=1)).double() if needs.gram_every else None,
    )


def run(balancer: Balancer, first: int = 1, last: int = STEPS, absent=lambda step: ()) -> Tensor:
    """Weights [steps, K] of steps first..last, observing each. A run that starts at step 1 begins with step 0."""
    if first == 1:
        balancer.update(observe(balancer, 0))
    weights = []
    for step in range(first, last + 1):
        seen = observe(balancer, step, absent(step))
        weights.append(balancer.weights(step, seen.train_loss_K if balancer.needs.step_loss else None))
        balancer.update(seen)
    return torch.stack(weights)


def assert_positive_with_mean_one(make: Make) -> None:
    weights_SK = run(make(context(NAMES)))
    assert weights_SK.dtype == torch.float64
    assert (weights_SK > 0).all()
    torch.testing.assert_close(weights_SK.mean(dim=1), torch.ones(STEPS, dtype=torch.float64))


def assert_moves(make: Make) -> None:
    """The simulated run is one in which the weights change: without this the other assertions would say little."""
    weights_SK = run(make(context(NAMES)))
    assert (weights_SK[-1] - weights_SK[0]).abs().max() > 1e-3


def assert_single_task_is_one(make: Make) -> None:
    assert torch.equal(run(make(context(NAMES[:1]))), torch.ones(STEPS, 1, dtype=torch.float64))


def assert_equal_tasks_stay_equal(make: Make) -> None:
    weights_SK = run(make(context(["code", "code-2", "code-3"])))
    torch.testing.assert_close(weights_SK, torch.ones_like(weights_SK), atol=1e-9, rtol=0)


def assert_permutes_with_the_tasks(make: Make) -> None:
    order = [2, 0, 3, 1]
    straight_SK, permuted_SK = run(make(context(NAMES))), run(make(context([NAMES[k] for k in order])))
    torch.testing.assert_close(permuted_SK, straight_SK[:, order], atol=1e-9, rtol=1e-9)


def assert_absent_tasks_are_no_trouble(make: Make) -> None:
    """A task that comes and goes, one that leaves, one that comes late, and a step without any."""

    def absent(step: int) -> Collection[str]:
        if step == 11:
            return NAMES
        gone = {"maths"} if step % 3 == 0 else set()
        return gone | ({"sql"} if step > 20 else set()) | ({"prose"} if step < 9 else set())

    weights_SK = run(make(context(NAMES)), absent=absent)
    assert weights_SK.isfinite().all()
    assert (weights_SK > 0).all()


def assert_all_absent_changes_nothing_but_the_clock(make: Make) -> None:
    """Steps that hold no task at all at the end leave the weights finite and the state loadable."""
    balancer = make(context(NAMES))
    weights_SK = run(balancer, absent=lambda step: NAMES if step > 30 else ())
    assert weights_SK.isfinite().all()
    make(context(NAMES)).load_state_dict(balancer.state_dict())


def assert_infinity_is_ignored_and_counted(make: Make) -> None:
    balancer = make(context(NAMES))
    run(balancer, last=STEPS - 1)
    before = balancer.state_dict()
    bad_K = torch.tensor([1.0, math.inf, 1.0, 1.0], dtype=torch.float64)
    balancer.update(observe(balancer, STEPS)._replace(train_loss_K=bad_K))
    after = balancer.state_dict()
    assert int(after.pop("ignored")) == int(before.pop("ignored")) + 1
    assert after.keys() == before.keys()
    for name, value in after.items():
        same = (
            torch.equal(value.nan_to_num(), before[name].nan_to_num())
            if isinstance(value, Tensor)
            else value == before[name]
        )
        assert same, name


def assert_resume_is_bit_equal(make: Make) -> None:
    """40 steps == 17 steps, save, load into a fresh one, 23 steps."""
    whole_SK, broken, resumed = run(make(context(NAMES))), make(context(NAMES)), make(context(NAMES))
    first_SK = run(broken, last=17)
    state = broken.state_dict()
    assert all(isinstance(value, Tensor | str | list) for value in state.values())  # nothing that would need pickle
    run(broken, first=18)  # what happens to the donor later must not reach the state
    resumed.load_state_dict(state)
    assert torch.equal(torch.cat([first_SK, run(resumed, first=18)]), whole_SK)


def assert_refuses_the_state_of_other_tasks(make: Make) -> None:
    state = make(context(NAMES)).state_dict()
    with pytest.raises(UserError, match="code, maths, sql, prose"):
        make(context(NAMES[:3])).load_state_dict(state)
    with pytest.raises(UserError, match="was written by balancer other"):
        make(context(NAMES)).load_state_dict({**state, "balancer": "other"})


def assert_user_weights_multiply(make: Make) -> None:
    user_K = torch.tensor([1.0, 2.0, 0.5, 3.0], dtype=torch.float64)
    plain_SK, weighted_SK = run(make(context(NAMES))), run(make(context(NAMES, user_K=user_K)))
    expected_SK = plain_SK * user_K
    torch.testing.assert_close(weighted_SK, expected_SK / expected_SK.mean(dim=1, keepdim=True))
