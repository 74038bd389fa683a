"""What held-out scores decide while a run goes on: which weights were best, when to stop, which task has had enough.

watch          mean or worst of the tasks' held-out losses (auxiliary tasks don't count), one task's, or the same of a
               metric (watched_score.py): better by `min_delta` at least
patience       evaluations in a row without a better watch, after which the run ends
task_patience  the same for each task's own loss, after which the task is dropped: its weight in the loss is 0 from the
               next step on (early drop: mSFT, arXiv 2603.21606, without its return to the task's best weights)

Coefficients add up to 1 in every normalisation, so the share of a dropped task goes to the others, in proportion to
theirs. Its rows stay in the plan: no other row's place moves, and a run that was broken goes on exactly. Dropping the
last task that counts ends the run.

The state is three numbers a task; it stands in the checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor


@dataclass
class EvalRecord:
    """The best loss so far, the step it is from, and how many evaluations in a row were not better."""

    best: float = math.inf
    step: int = -1
    since: int = 0

    def see(self, step: int, loss: float, min_delta: float) -> bool:
        """True if it is better. NaN is not."""
        if loss < self.best - min_delta or (math.isinf(self.best) and not math.isnan(loss)):
            self.best, self.step, self.since = loss, step, 0
            return True
        self.since += 1
        return False


@dataclass
class EarlyStopping:
    """Follows the evaluations of a run. tasks: in the order of the weights; auxiliary: those that don't count."""

    tasks: Sequence[str]
    watch: str = "mean"
    patience: int | None = None
    task_patience: int | None = None
    min_delta: float = 0.0
    auxiliary: Sequence[str] = ()
    run: EvalRecord = field(default_factory=EvalRecord)
    of_task: dict[str, EvalRecord] = field(default_factory=dict)
    dropped: dict[str, int] = field(default_factory=dict)  # task -> step after which it does not count
    ended: str | None = None
    last: int = -1

    def observe(self, step: int, losses: Mapping[str, float], watched: float | None = None) -> list[str]:
        """One evaluation: held-out loss of each task that has one. Returns what happened, in words.

        watched: the number that `watch` names, lower is better (None: of the losses).
        """
        if step <= self.last or not losses:  # the same evaluation once more
            return []
        self.last = step
        said = []
        self.run.see(step, self.watched(losses) if watched is None else watched, self.min_delta)
        for task, loss in losses.items():
            record = self.of_task.setdefault(task, EvalRecord())
            record.see(step, loss, self.min_delta)
            if self.task_patience is not None and record.since >= self.task_patience and task not in self.dropped:
                self.dropped[task] = step
                best = f"its best held-out loss was {record.best:.4g} at step {record.step}"
                said.append(f"step {step}: {task} is dropped, {best}")
        if self.patience is not None and self.run.since >= self.patience:
            what = self.watch if "/" in self.watch else f"{self.watch} held-out loss"
            self.ended = f"no better {what} since step {self.run.step}"
        elif all(task in self.dropped for task in self.tasks if task not in self.auxiliary):
            self.ended = "every task is dropped"
        if self.ended:
            said.append(f"step {step}: the run ends, {self.ended}")
        return said

    def watched(self, losses: Mapping[str, float]) -> float:
        """The number that `watch` names; NaN if no task that counts has a loss."""
        if self.watch not in ("mean", "worst"):
            return losses[self.watch]
        counted = [loss for task, loss in losses.items() if task not in self.auxiliary]
        if not counted:
            return math.nan
        return sum(counted) / len(counted) if self.watch == "mean" else max(counted)

    def better(self, step: int) -> bool:
        """True if the evaluation of this step is the best so far."""
        return self.run.step == step

    def weigh(self, w_K: Tensor) -> Tensor:
        """The balancer's weights, 0 for dropped tasks; as they are if nothing would be left."""
        if not self.dropped:
            return w_K
        kept_K = w_K.new_tensor([float(task not in self.dropped) for task in self.tasks])
        return w_K * kept_K if bool((w_K * kept_K > 0).any()) else w_K

    def state_dict(self) -> dict[str, Any]:
        state = asdict(self)
        return {name: state[name] for name in ("run", "of_task", "dropped", "ended", "last")}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.run = EvalRecord(**state["run"])
        self.of_task = {task: EvalRecord(**record) for task, record in state["of_task"].items()}
        self.dropped, self.ended, self.last = dict(state["dropped"]), state["ended"], state["last"]
