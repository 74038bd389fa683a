"""Metrics that need answers or labels, measured on a model: what is asked, what it answers, what that scores.

Ranks share out the asking; metrics (which may run a user's own code) are computed by the first rank alone, and all get
the same numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import nn

from mtft.distributed.collectives import on_first_rank
from mtft.evaluation.generation import GenerateOptions, generate_answers
from mtft.evaluation.heldout_loss import BatchLayout, Score, Told
from mtft.evaluation.label_likelihood import label_log_probs, label_tokens
from mtft.evaluation.metrics.base import Answer
from mtft.evaluation.metrics.labels import LabelMetric
from mtft.evaluation.questions import AskedMetrics, Questions
from mtft.evaluation.task_scores import MetricRows
from mtft.losses.token_nll import bare_model

Answered = tuple[dict[str, MetricRows], list[Answer]]  # what the rows scored by metric, and the answers


def ask(
    model: nn.Module,
    stores: Sequence[Any | None],
    asked: AskedMetrics,
    score: Score,
    layout: BatchLayout,
    *,
    rows: int | None = None,
    told: Told | None = None,
) -> dict[str, Answered]:
    """{task: (what its rows scored by metric, the answers)} for the tasks of `asked` that have a store.

    model: in evaluation mode. score: nll of a batch's tokens, as for the held-out loss. rows: only the first of each
    task: a trial whether the metrics work at all. A collective call.
    """
    return {
        store.task: _ask_task(model, store, asked, score, layout, rows=rows, told=told)
        for store in stores
        if store is not None and store.task in asked.metrics
    }


def _ask_task(
    model: nn.Module,
    store: Any,
    asked: AskedMetrics,
    score: Score,
    layout: BatchLayout,
    *,
    rows: int | None,
    told: Told | None,
) -> Answered:
    questions = Questions.of(store, asked, _model_ends(model))
    prompts, tokenizer, metrics = questions.prompts[:rows], asked.tokenizer, questions.metrics
    answers: list[Answer] = []
    if questions.generated:
        section = questions.task.generate
        options = GenerateOptions(
            section.max_new_tokens, section.temperature, section.stop, questions.ends,
            layout.pad_id, layout.micro_batch_tokens, asked.seed,
        )  # fmt: skip
        samples = max(metric.samples for metric in questions.generated.values())
        made = generate_answers(
            model, [prompt.prompt for prompt in prompts], options, tokenizer, samples=samples, told=told
        )
        answers = questions.answers([[questions.text(ids) for ids in of_row] for of_row in made])
    labels: dict[str, tuple[np.ndarray, np.ndarray]] = {}  # asked for and chosen, by metric
    for key, metric in metrics.items():
        if isinstance(metric, LabelMetric):
            names = questions.labels(metric)
            tokens = label_tokens(names, questions.prompts, questions.references, tokenizer, store.task)
            device = next(model.parameters()).device
            log_p_NL = label_log_probs(score, store.task, prompts, tokens, layout, device=device)
            asked_N = np.array([names.index(text) for text in questions.references[: len(prompts)]])
            labels[key] = asked_N, metric.chosen(log_p_NL, names)
    stats = on_first_rank(lambda: _statistics(questions, answers, labels))
    return {key: MetricRows(metrics[key].aggregate.name, stats_NS) for key, stats_NS in stats.items()}, answers


def _statistics(
    questions: Questions, answers: Sequence[Answer], labels: Mapping[str, tuple[np.ndarray, np.ndarray]]
) -> dict[str, np.ndarray]:
    """The numbers of the rows that were asked. References of the others are looked at all the same: a metric may refuse
    them, and some refuse a task as a whole.
    """
    out = {}
    for key, metric in questions.metrics.items():
        if isinstance(metric, LabelMetric):
            out[key] = metric.label_statistics(*labels[key])
        elif metric.describe() is None:
            out[key] = metric.statistics([*answers, *questions.ideal(len(answers))])[: len(answers)]
        else:  # the user's own code: only what it was asked for
            out[key] = metric.statistics(answers)
    return out


def _model_ends(model: nn.Module) -> Any:
    config = getattr(bare_model(model), "generation_config", None)
    return None if config is None else config.eos_token_id
