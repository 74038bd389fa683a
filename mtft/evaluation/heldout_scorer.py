"""The held-out scores of a model in training: cheap ones at each evaluation, those that have to be asked at the end.

An answer costs a pass of the model for each of its tokens, so answers are generated at every evaluation only for what
decides something there (`train.watch`, a sweep's objective). Whether all of it works is tried before the first step, on
one row of each task.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mtft.evaluation.evaluate_model import answer_model, evaluate_model, harness_scores
from mtft.evaluation.heldout_loss import BatchLayout, Told
from mtft.evaluation.lm_eval_tasks import LmEvalTasks
from mtft.evaluation.questions import AskedMetrics
from mtft.evaluation.task_scores import TaskScores


@dataclass(frozen=True)
class HeldOutScorer:
    """stores: held-out rows of each task (None: it has none). asked: all that is measured at the end; watched: of
    these, what every evaluation needs. autocast: precision of the forward pass (None: that of the weights). lm_eval:
    tasks of the harness, at the end.
    """

    stores: Sequence[Any | None]
    layout: BatchLayout
    asked: AskedMetrics
    watched: AskedMetrics
    attention: str | None = None
    autocast: torch.dtype | None = None
    lm_eval: LmEvalTasks | None = None

    def __call__(self, model: nn.Module, told: Told | None = None) -> dict[str, TaskScores]:
        """What an evaluation measures. A collective call, as the others."""
        return evaluate_model(
            model, self.stores, self.layout, attention=self.attention, autocast=self.autocast, told=told,
            asked=self.watched,
        )  # fmt: skip

    def try_out(self, model: nn.Module) -> None:
        """Asks one row of each task for everything. Raises UserError for a metric that can't be measured."""
        if self.asked:
            self._ask(model, self.asked, rows=1)
        self.lm_eval_scores(model, limit=1)

    def lm_eval_scores(self, model: nn.Module, *, limit: int | None = None) -> dict[str, dict[str, float]]:
        """Scores by lm-eval's tasks (LmEvalTasks.scores); empty without any."""
        if self.lm_eval is None:
            return {}
        tokenizer, autocast = self.asked.tokenizer, self.autocast
        return harness_scores(model, self.lm_eval, tokenizer, self.layout, autocast=autocast, limit=limit)

    def completed(
        self, model: nn.Module, scores: dict[str, TaskScores], told: Told | None = None
    ) -> dict[str, TaskScores]:
        """The scores with what they miss of `asked`. model: the one that they are of."""
        missing = self.asked.without({f"{task}/{key}" for task, of in scores.items() for key in of.answered})
        if not missing:
            return scores
        answered = self._ask(model, missing, told=told)
        return {task: of.answering(*answered[task]) if task in answered else of for task, of in scores.items()}

    def _ask(self, model: nn.Module, asked: AskedMetrics, *, rows: int | None = None, told: Told | None = None) -> Any:
        return answer_model(
            model, self.stores, self.layout, asked, attention=self.attention, autocast=self.autocast, rows=rows,
            told=told,
        )  # fmt: skip
