"""Everything that is measured of one model: the forward pass over the held-out rows, then what has to be asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mtft.data.batching.batch import Batch
from mtft.evaluation.answered_rows import Answered, ask
from mtft.evaluation.evaluation_mode import evaluation_mode
from mtft.evaluation.heldout_loss import BatchLayout, Score, Told, score_tasks
from mtft.evaluation.lm_eval_tasks import LmEvalTasks
from mtft.evaluation.questions import AskedMetrics
from mtft.evaluation.task_scores import TaskScores


def evaluate_model(
    model: nn.Module,
    stores: Sequence[Any | None],
    layout: BatchLayout,
    *,
    attention: str | None = None,
    autocast: torch.dtype | None = None,
    told: Told | None = None,
    asked: AskedMetrics | None = None,
) -> dict[str, TaskScores]:
    """Scores of a transformers model (plain, or with an adapter) on each task's store; None = the task has none.

    autocast: run the forward pass in this precision (as training did). asked: metrics that need answers or labels.
    The model comes back in the mode it was in. A collective call.
    """
    score, precision = _passes(model, attention, autocast)
    with evaluation_mode(model):
        scores = score_tasks(score, stores, layout, device=next(model.parameters()).device, told=told)
        if not asked:
            return scores
        with precision():
            answered = ask(model, stores, asked, score, layout)
    return {task: of.answering(*answered[task]) if task in answered else of for task, of in scores.items()}


def answer_model(
    model: nn.Module,
    stores: Sequence[Any | None],
    layout: BatchLayout,
    asked: AskedMetrics,
    *,
    attention: str | None = None,
    autocast: torch.dtype | None = None,
    rows: int | None = None,
    told: Told | None = None,
) -> dict[str, Answered]:
    """Only what has to be asked (mtft.evaluation.answered_rows.ask). rows: the first of each task."""
    score, precision = _passes(model, attention, autocast)
    with evaluation_mode(model), precision():
        return ask(model, stores, asked, score, layout, rows=rows, told=told)


def harness_scores(
    model: nn.Module,
    tasks: LmEvalTasks,
    tokenizer: Any,
    layout: BatchLayout,
    *,
    autocast: torch.dtype | None = None,
    limit: int | None = None,
) -> dict[str, dict[str, float]]:
    """Scores by lm-eval's tasks, as many rows at once as fit a micro-batch. The model comes back in its mode."""
    _, precision = _passes(model, None, autocast)
    rows = max(1, layout.micro_batch_tokens // layout.max_length)
    with evaluation_mode(model), precision():
        return tasks.scores(model, tokenizer, batch_size=rows, limit=limit)


def _passes(
    model: nn.Module, attention: str | None, autocast: torch.dtype | None
) -> tuple[Score, Callable[[], torch.autocast]]:
    """(scores of a batch, the precision of a forward pass)."""
    from mtft.losses.token_nll import is_isolated
    from mtft.losses.token_scores import token_scores

    device, isolated = next(model.parameters()).device, is_isolated(model, attention)

    def precision() -> torch.autocast:
        return torch.autocast(device.type, dtype=autocast or torch.bfloat16, enabled=autocast is not None)

    def score(batch: Batch) -> tuple[Tensor, Tensor]:
        with precision():
            return token_scores(model, batch, attention=attention, isolated=isolated)

    return score, precision
