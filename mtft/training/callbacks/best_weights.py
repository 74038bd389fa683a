"""The best weights of a run, kept beside its checkpoints, and what else follows from an evaluation.

    <run>/best/   weights.safetensors (what is trained), one file of held-out scores a task, best.json (step, watch)

Written when an evaluation is better than all before it, whole or not at all. A run that was broken between the two
takes the evaluation again and writes the same.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.trainer_callback import TrainerCallback

from mtft.common.errors import UserError
from mtft.common.own_files import read_own, write_own
from mtft.distributed.collectives import barrier
from mtft.distributed.sharding import trainable
from mtft.evaluation.task_scores import TaskScores
from mtft.training.callbacks.early_stopping import EarlyStopping
from mtft.training.callbacks.watched_score import watched_score
from mtft.training.checkpoint.checkpoint_files import atomic_checkpoint_dir, checkpoint_defects
from mtft.training.optim.schedule_free import evaluation_weights, settle
from mtft.training.run_files.metrics_log import MetricsLog

BEST, WEIGHTS, RECORD = "best", "weights.safetensors", "best.json"


class EvaluatedRun(Protocol):
    """What is used of the trainer here."""

    model: nn.Module
    optimizer: Any
    args: Any
    state: Any
    stopping: EarlyStopping
    run_log: MetricsLog
    evaluations: dict[int, dict[str, TaskScores]]

    @property
    def run_dir(self) -> Path: ...

    def evaluate(self) -> dict[str, float]: ...


class BestWeights(TrainerCallback):
    """After each evaluation: keeps the best weights, drops tasks, ends the run, as `trainer.stopping` finds."""

    def __init__(self, trainer: EvaluatedRun, *, keep_best: bool) -> None:
        self.trainer, self.keep_best = trainer, keep_best

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        trainer, step = self.trainer, state.global_step
        stopping, evaluation = trainer.stopping, trainer.evaluations[step]
        if step <= stopping.last:
            return
        losses = {task: scores.score("loss") for task, scores in evaluation.items()}
        counted = [task for task in evaluation if task not in stopping.auxiliary]
        watched = watched_score(stopping.watch, evaluation, counted) if "/" in stopping.watch else None
        for line in stopping.observe(step, losses, watched):
            trainer.run_log.say(line)
        if self.keep_best and stopping.better(step):
            save_best(trainer, step, evaluation)
        if stopping.ended is not None:
            control.should_training_stop = True
            control.should_save = args.save_strategy != "no"


def save_best(trainer: EvaluatedRun, step: int, scores: dict[str, TaskScores]) -> None:
    """Writes <run>/best. A collective call."""
    writer = bool(trainer.args.should_save)
    with atomic_checkpoint_dir(trainer.run_dir / BEST, writer=writer, barrier=barrier) as folder:
        if not writer:
            return
        with evaluation_weights(trainer.optimizer):
            weights = {name: value.detach().cpu().clone() for name, value in trainable(trainer.model).items()}
        save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
        for task, task_scores in scores.items():
            task_scores.save(folder / f"{task}.jsonl")
        write_own(folder / RECORD, {"step": step, "watch": trainer.stopping.watch, "tasks": list(scores)})


def load_best_weights(trainer: EvaluatedRun, export: str) -> int:
    """After training: puts the weights into the model that the run hands over; returns the step they are from.

    export: last, or best by the evaluations. The scores of that step stand in `trainer.evaluations` under the last.
    """
    last = trainer.state.global_step
    settle(trainer.optimizer)
    if export == "last":
        return last
    if last not in trainer.evaluations:
        trainer.evaluate()
    best = trainer.stopping.run.step
    if best == last:
        return last
    folder = trainer.run_dir / BEST
    if not folder.is_dir():
        what = f"the weights of step {best}, which was the best, were not kept: output.export was another then"
        raise UserError(what, where=str(trainer.run_dir), do="set output.export: last, or start over with --fresh")
    do = "set output.export: last, or start over with --fresh"
    record = read_own(folder / RECORD, {"step": int, "tasks": list}, do=do)
    if record["step"] != best:
        what = f"the folder holds the weights of step {record['step']}, and step {best} was the best"
        raise UserError(what, where=str(folder), do=do)
    if (defect := checkpoint_defects(folder)) is not None:
        raise UserError(f"the best weights can't be used: {defect}", where=str(folder), do=do)
    saved, model = load_file(folder / WEIGHTS), trainable(trainer.model)
    with torch.no_grad():
        for name, value in saved.items():
            model[name].copy_(value)
    trainer.evaluations = {last: {task: TaskScores.load(folder / f"{task}.jsonl") for task in record["tasks"]}}
    return best
