"""What a balancer is given, what it may ask for, and the state that all of them share.

A balancer turns losses into task weights b_K. The weights that the objective uses are w_k ~ p_k * b_k, p the user's
weights (`tasks: - weight:`), scaled to mean 1; only their ratio matters there. The order within step t = 1, 2, ...:

    w_K = balancer.weights(t, step_loss_K)     before the first backward; sees what was observed at steps < t
    ... forward, backward, optimizer step ...
    balancer.update(Observation(t, ...))       after it

Everything observed is already reduced over ranks, float64 on the CPU, the same on every rank, so the weights are too.
NaN = the task was absent. A balancer declares in `needs` what it costs; the trainer computes nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import InitVar, dataclass
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from data_mixers.common.suggest import did_you_mean
from mtft.common.errors import UserError
from mtft.recipe.method_options import check_options


class BalancerNeeds(NamedTuple):
    """What a balancer asks of the trainer besides the training losses, which are free.

    step_loss    the global losses of the current step before its first backward: free with one micro-batch,
                 else a pass without gradient over the micro-batches first (about a third more time)
    valid_every  validation losses every so many steps (one micro-batch), and of the whole validation set at step 0
    gram_every   the Gram matrix of the task gradients every so many steps
    after_step   the losses of the same batch after the optimizer step: one more forward
    token_probs  Observation.train_prob_K (task_reduction.task_probs): free
    """

    step_loss: bool = False
    valid_every: int | None = None
    gram_every: int | None = None
    after_step: bool = False
    token_probs: bool = False


class Observation(NamedTuple):
    """What is known after optimizer step `step`; step 0 = before training (validation losses only).

    train_loss_K  loss of the step's batch (mean over tokens or samples as the objective has it), before the step
    valid_loss_K  validation losses, if measured at this step
    gram_KK       inner products of the task gradients of this step, if measured
    after_loss_K  loss of the same batch after the step, if asked for
    train_prob_K  mean over samples of the mean token probability, if asked for
    share_K       each task's part of the loss at equal weights (task_reduction.task_coefficients), with gram_KK
    All float64 on the CPU, NaN = absent, the same on all ranks.
    """

    step: int
    train_loss_K: Tensor
    valid_loss_K: Tensor | None = None
    gram_KK: Tensor | None = None
    after_loss_K: Tensor | None = None
    train_prob_K: Tensor | None = None
    share_K: Tensor | None = None


class BalancerContext(NamedTuple):
    """What a balancer may know about the run. Only `tasks` is always there.

    user_K       the user's weight of each task (None = 1)
    normalise    the objective's normalisation
    examples_K   training examples of each task;  tokens_K  supervised tokens of each task; both by their weights
    """

    tasks: tuple[str, ...]
    user_K: Tensor | None = None
    seed: int = 0
    normalise: str = "task_token"
    examples_K: Tensor | None = None
    tokens_K: Tensor | None = None


@dataclass(eq=False)
class Balancer:
    """Base of all balancers.

    A subclass declares its options as dataclass fields (checked by their annotations), builds its state in `reset`,
    names the state's attributes (all tensors) in STATE, and gives weights of any positive scale in `balance`.
    """

    context: InitVar[BalancerContext]
    NAME: ClassVar[str]
    STATE: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self, context: BalancerContext) -> None:
        self.run = context
        self.K = len(context.tasks)
        user_K = torch.ones(self.K) if context.user_K is None else torch.as_tensor(context.user_K)
        self.user_K = _checked_weights("user weight", user_K.double(), context.tasks, where="tasks")
        check_options(self, "loss.balancer")
        self.ignored = torch.zeros((), dtype=torch.int64)  # observations with an infinite or negative-infinite number
        self.needs = self.declare()
        self.reset()

    def declare(self) -> BalancerNeeds:
        """What this balancer costs, from its options."""
        return BalancerNeeds()

    def reset(self) -> None:
        """Build the state, as it is before the first step."""

    def balance(self, step: int, step_loss_K: Tensor | None) -> Tensor:
        """b_K: float64, >= 0, any positive scale; even where a method does not say otherwise."""
        return torch.ones(self.K, dtype=torch.float64)

    def observe(self, observation: Observation) -> None:
        """Take in one step. Numbers are finite or NaN."""

    def figures(self) -> dict[str, float]:
        """What a log should tell of this balancer besides its weights."""
        return {}

    def weights(self, step: int, step_loss_K: Tensor | None = None) -> Tensor:
        """Task weights [K] of step `step`, float64, >= 0, mean 1. `step_loss_K`: its losses if `needs.step_loss`."""
        if self.needs.step_loss and step_loss_K is None:
            raise ValueError(f"balancer {self.NAME} needs the losses of the step before its first backward")
        w_K = self.user_K * self.balance(step, None if step_loss_K is None else step_loss_K.double().cpu())
        return _checked_weights("weight", w_K / w_K.mean(), self.run.tasks, where=f"balancer {self.NAME}, step {step}")

    def update(self, observation: Observation) -> None:
        """Take in what step `observation.step` brought. One that holds an infinity is ignored and counted."""
        tensors = [value for value in observation if isinstance(value, Tensor)]
        for value in tensors:
            if value.shape[0] != self.K:
                raise ValueError(f"balancer {self.NAME} has {self.K} tasks, observed {tuple(value.shape)}")
        if any(value.isinf().any() for value in tensors):
            self.ignored += 1
            return
        self.observe(observation)

    def state_dict(self) -> dict[str, Any]:
        """Name, task names and every tensor of the state. Values are Tensor, str or list[str]: no pickle needed."""
        state = {name: getattr(self, name).clone() for name in (*self.STATE, "ignored")}
        return {"balancer": self.NAME, "tasks": list(self.run.tasks), **state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`. Refuses the state of another balancer or of other tasks, by name."""
        if state["balancer"] != self.NAME:
            raise UserError(
                f"the checkpoint was written by balancer {state['balancer']}, the recipe asks for {self.NAME}",
                where="loss.balancer.name",
                do="go back to that balancer, or start over with --fresh",
            )
        if list(state["tasks"]) != list(self.run.tasks):
            raise UserError(
                f"the checkpoint is of tasks {', '.join(state['tasks'])}; the recipe has {', '.join(self.run.tasks)}",
                where="tasks",
                do="use the same tasks in the same order, or start over with --fresh",
            )
        if missing := [name for name in (*self.STATE, "ignored") if name not in state]:
            raise ValueError(f"balancer {self.NAME}: the state lacks {', '.join(missing)}")
        for name in (*self.STATE, "ignored"):
            setattr(self, name, state[name].clone())

    def per_task(self, option: str, values: Mapping[str, float], default: float | None = None) -> Tensor:
        """An option {task: number} as float64 [K]. Unknown tasks are an error; missing ones too, without `default`."""
        for name in values:
            if name not in self.run.tasks:
                raise UserError(
                    f"unknown task {name!r}{did_you_mean(name, self.run.tasks)}",
                    where=f"loss.balancer.{option}",
                    do=f"tasks of this recipe: {', '.join(self.run.tasks)}",
                )
        missing = [name for name in self.run.tasks if name not in values]
        if missing and default is None:
            raise UserError(
                f"no value for {', '.join(missing)}", where=f"loss.balancer.{option}", do="give each a number"
            )
        return torch.tensor([values.get(name, default) for name in self.run.tasks], dtype=torch.float64)


def _checked_weights(what: str, w_K: Tensor, tasks: tuple[str, ...], where: str) -> Tensor:
    if w_K.shape != (len(tasks),):
        raise ValueError(f"{what}s have shape {tuple(w_K.shape)}, but there are {len(tasks)} tasks")
    for task, w in zip(tasks, w_K.tolist(), strict=True):
        if not 0 <= w < float("inf"):
            raise UserError(f"{what} of task {task} is {w}: must be finite and >= 0", where=where)
    if not bool((w_K > 0).any()):
        raise UserError(f"every {what} is 0", where=where, do="give at least one task a positive weight")
    return w_K


def fill_missing_weights(w_K: Tensor) -> Tensor:
    """Weights with the mean of the known ones where unknown (NaN); ones if none is known."""
    known_K = w_K[w_K.isfinite()]
    return torch.where(w_K.isfinite(), w_K, known_K.mean() if len(known_K) else 1.0)


@dataclass(eq=False)
class LossWeightedBalancer(Balancer):
    """Base of the methods whose weights are a function of the current losses.

    step_loss  lagged: a running mean over earlier steps stands in for the step's losses; free, and the same for any
               split into micro-batches. exact: the losses of the step itself (Needs.step_loss)
    smoothing  share of the old mean that is kept at each step
    """

    step_loss: Literal["lagged", "exact"] = "lagged"
    smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.9
    STATE = ("mean_K",)

    def declare(self) -> BalancerNeeds:
        return BalancerNeeds(step_loss=self.step_loss == "exact")

    def reset(self) -> None:
        self.mean_K = torch.full((self.K,), torch.nan, dtype=torch.float64)

    def observe(self, observation: Observation) -> None:
        self.mean_K = update_moving_average(self.mean_K, observation.train_loss_K, self.smoothing)

    def losses(self, step_loss_K: Tensor | None) -> Tensor:
        """Losses to weigh by: the step's own if given, else the running mean; NaN = never seen."""
        return self.mean_K if step_loss_K is None else torch.where(step_loss_K.isnan(), self.mean_K, step_loss_K)


def update_moving_average(mean_K: Tensor, seen_K: Tensor, keep: float) -> Tensor:
    """keep * mean + (1 - keep) * seen; the first value starts the mean, NaN in `seen_K` leaves it."""
    moved_K = torch.where(mean_K.isnan(), seen_K, keep * mean_K + (1 - keep) * seen_K)
    return torch.where(seen_K.isnan(), mean_K, moved_K)
