"""One trial of a mixture sweep: a short ordinary run in memory, scored on the held-out rows. Nothing is written.

A sweep makes dozens of them in one process, so what does not depend on the mixture (tokenizer, token stores, base
weights) is read once a process and kept; each trial trains a copy.
"""

from __future__ import annotations

import copy
import gc
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from data_mixers.sweep.early_termination import StopRule
from data_mixers.sweep.trial import Trial
from mtft.common.errors import UserError
from mtft.data.planning import make_plan
from mtft.evaluation.lm_eval_tasks import flat_scores
from mtft.models.loading import load_base
from mtft.recipe.load import fingerprint
from mtft.recipe.schema.recipe import Recipe
from mtft.training.build_model import load_for_training
from mtft.training.run_files.metrics_log import MetricsLog
from mtft.training.trainer import MultiTaskTrainer, build_trainer
from mtft.training.training_arguments import training_arguments
from mtft.training.training_inputs import TrainingInputs, read_training_inputs

_kept: tuple[str, TrainingInputs, Any] | None = None  # key of a recipe, and what its trials share


def run_trial(
    trial: Trial,
    recipe: Recipe,
    eval_limit: int | None = None,
    threads: int | None = None,
    checks: Sequence[float] = (),
    stop: StopRule | None = None,
    targets: Sequence[str] = (),
) -> list[tuple[float, dict[str, float]]]:
    """Trains `recipe` with the trial's mixture and seed; returns [(1.0, scores)], with the scores at `checks` (shares
    of the run) before it. The run ends at a check where `stop` calls it hopeless: its last share is then below 1.

    scores: {"task/loss": nats per supervised token, "task/token_accuracy": ..., "task/exact_match": ...} on the
    held-out rows of every task that has some (the first `eval_limit` of them), and the metrics in `targets`
    ("task/metric") that need answers. A trial that diverges gives NaN, which a sweep records as such. Picklable
    together with the recipe: for worker processes. threads: of torch on the CPU (None: its default).
    """
    if threads is not None:
        torch.set_num_threads(threads)
    inputs, base = _keep(recipe, eval_limit)  # with the recipe's seed: what is drawn by row is the same in all trials
    recipe = recipe.model_copy(update={"seed": trial.seed, "output": recipe.output.model_copy(update={"trackers": ()})})
    plan = make_plan(recipe, inputs.stores, trial.mixture)
    with tempfile.TemporaryDirectory(prefix="mtft-trial-") as scratch:
        args = training_arguments(recipe, Path(scratch), steps=plan.steps, evaluates=False, saves=False)
        model = load_for_training(recipe, base=copy.deepcopy(base))
        log = MetricsLog(None, steps=plan.steps, quiet=True)
        trainer = build_trainer(recipe, inputs, plan, model, args, log=log, targets=targets)
        course = _EvaluateAtChecks(trainer, plan.steps, checks, stop)
        trainer.add_callback(course)
        try:
            trainer.train()
        except UserError:
            if trainer.bad_steps["non-finite"] < recipe.train.max_bad_steps:
                raise
            names = [f"{store.task}/loss" for store in inputs.held_out if store is not None]
            return [(1.0, dict.fromkeys((*names, *targets), float("nan")))]
        if not course.hopeless:
            trainer.evaluate()
            course.points.append((1.0, _scores(trainer)))
    return course.points


def _scores(trainer: MultiTaskTrainer) -> dict[str, float]:
    """{"task/metric": score} of the evaluation at the present step."""
    evaluation = trainer.evaluations[trainer.state.global_step]
    summaries = {task: scores.summary() for task, scores in evaluation.items()}
    harness = flat_scores(trainer.lm_eval_scores())
    sizes = ("examples", "tokens")
    own = {f"{task}/{key}": x for task, summary in summaries.items() for key, x in summary.items() if key not in sizes}
    return own | harness


class _EvaluateAtChecks(TrainerCallback):
    """The scores on the way through a trial (`points`), and whether it was given up (`hopeless`)."""

    def __init__(self, trainer: MultiTaskTrainer, steps: int, checks: Sequence[float], stop: StopRule | None) -> None:
        self.points: list[tuple[float, dict[str, float]]] = []
        self.hopeless = False
        # Several shares may fall on one step of a short run; the last step is scored anyway.
        self._at = {max(1, round(share * steps)): share for share in sorted(checks) if round(share * steps) < steps}
        self._trainer, self._stop = trainer, stop

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        share = self._at.get(state.global_step)
        if share is None:
            return
        self._trainer.evaluate()
        scores = _scores(self._trainer)
        self.points.append((share, scores))
        if self._stop is not None and self._stop.hopeless(share, scores):
            self.hopeless = control.should_training_stop = True


def _keep(recipe: Recipe, eval_limit: int | None) -> tuple[TrainingInputs, Any]:
    """What the trials of this recipe share, inputs and base; kept until a trial of another recipe comes."""
    global _kept
    key = f"{fingerprint(recipe, without=('mixture', 'output', 'name'))} {eval_limit}"
    if _kept is None or _kept[0] != key:
        inputs = read_training_inputs(recipe, eval_limit=eval_limit)
        _kept = key, inputs, load_base(recipe.model, full=recipe.lora is None)
        # Trainer collects garbage at every start: 0.3 s among a million objects of libraries that stay anyway.
        gc.collect()
        gc.freeze()
    return _kept[1:]
