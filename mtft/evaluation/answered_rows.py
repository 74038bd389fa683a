"""Metrics that need answers or labels, measured on a model: what is asked, what it answers, what that scores.

Ranks share out the asking; metrics (which may run a user's own code) are computed by the first rank alone, and all get
the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import nn

from mtft.common.errors import UserError
from mtft.data.readers.rows_at import rows_at
from mtft.distributed.collectives import from_first_rank
from mtft.distributed.launch import is_main_process
from mtft.evaluation.generation import GenerateOptions, Told, generate_answers
from mtft.evaluation.heldout_loss import BatchLayout, Score
from mtft.evaluation.label_likelihood import label_log_probs, label_tokens
from mtft.evaluation.metrics import make_metrics
from mtft.evaluation.metrics.base import Answer, Metric
from mtft.evaluation.metrics.labels import LabelMetric
from mtft.evaluation.prompts import HeldOutPrompt, answer_text, end_tokens, held_out_prompts
from mtft.evaluation.task_scores import MetricRows
from mtft.losses.token_nll import bare_model
from mtft.recipe.schema.recipe import Recipe
from mtft.recipe.schema.task import TaskSection

Answered = tuple[dict[str, MetricRows], list[Answer]]  # what the rows scored by metric, and the answers


@dataclass(frozen=True)
class AskedMetrics:
    """The metrics of every task that cost more than the forward pass; tasks without any are left out.

    tasks  {task: its section of the recipe};  metrics  {task: {key: metric}}
    """

    tokenizer: Any
    tasks: Mapping[str, TaskSection]
    metrics: Mapping[str, Mapping[str, Metric]]
    seed: int = 0

    def __bool__(self) -> bool:
        return bool(self.metrics)

    @classmethod
    def of(cls, recipe: Recipe, tokenizer: Any) -> AskedMetrics:
        """What a recipe asks for. Raises UserError for a metric that can't be used."""
        metrics: dict[str, dict[str, Metric]] = {}
        for task in recipe.tasks:
            own = {key: metric for key, metric in make_metrics(task).items() if metric.NEEDS != "forward"}
            if own and task.eval_data is not None:
                metrics[task.name] = own
        return cls(tokenizer, {task.name: task for task in recipe.tasks}, metrics, recipe.seed)

    def only(self, wanted: Collection[str]) -> AskedMetrics:
        """Those in `wanted`, as "task/metric"."""
        return self._chosen(lambda name: name in wanted)

    def without(self, unwanted: Collection[str]) -> AskedMetrics:
        """Those not in `unwanted`, as "task/metric"."""
        return self._chosen(lambda name: name not in unwanted)

    def _chosen(self, take: Callable[[str], bool]) -> AskedMetrics:
        chosen = {
            task: {key: metric for key, metric in of_task.items() if take(f"{task}/{key}")}
            for task, of_task in self.metrics.items()
        }
        return replace(self, metrics={task: of_task for task, of_task in chosen.items() if of_task})


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
    everything = held_out_prompts(store)
    prompts, tokenizer = everything[:rows], asked.tokenizer
    metrics, task = asked.metrics[store.task], asked.tasks[store.task]
    ends = end_tokens(everything, tokenizer, _model_ends(model))
    references = [answer_text(tokenizer, prompt.reference.tolist(), ends) for prompt in everything]
    generated = [metric for metric in metrics.values() if metric.NEEDS == "generation"]
    answers: list[Answer] = []
    if generated:
        options = GenerateOptions(
            task.generate.max_new_tokens, task.generate.temperature, task.generate.stop, ends,
            layout.pad_id, layout.micro_batch_tokens, asked.seed,
        )  # fmt: skip
        samples = max(metric.samples for metric in generated)
        made = generate_answers(
            model, [prompt.prompt for prompt in prompts], options, tokenizer, samples=samples, told=told
        )
        texts = [[answer_text(tokenizer, ids, ends, options.stop) for ids in of_row] for of_row in made]
        answers = _answers(store, task, prompts, references, texts, tokenizer, generated)
    labels: dict[str, tuple[np.ndarray, np.ndarray]] = {}  # asked for and chosen, by metric
    for key, metric in metrics.items():
        if isinstance(metric, LabelMetric):
            names = metric.names(references, [prompt.where for prompt in everything])
            tokens = label_tokens(names, everything, references, tokenizer, store.task)
            device = next(model.parameters()).device
            log_p_NL = label_log_probs(score, store.task, prompts, tokens, layout, device=device)
            asked_N = np.array([names.index(text) for text in references[: len(prompts)]])
            labels[key] = asked_N, metric.chosen(log_p_NL, names)
    stats = _on_first_rank(lambda: _statistics(metrics, answers, labels))
    return {key: MetricRows(metrics[key].aggregate.name, stats_NS) for key, stats_NS in stats.items()}, answers


def _statistics(
    metrics: Mapping[str, Metric], answers: Sequence[Answer], labels: Mapping[str, tuple[np.ndarray, np.ndarray]]
) -> dict[str, np.ndarray]:
    return {
        key: metric.label_statistics(*labels[key]) if isinstance(metric, LabelMetric) else metric.statistics(answers)
        for key, metric in metrics.items()
    }


def _on_first_rank(work: Callable[[], Any]) -> Any:
    """What the first rank finds, on every rank; its error too: the others would wait for ever."""
    outcome: Any = None
    if is_main_process():
        try:
            outcome = work()
        except UserError as error:
            outcome = error
    outcome = from_first_rank(outcome)
    if isinstance(outcome, UserError):
        raise outcome
    return outcome


def _answers(
    store: Any,
    task: TaskSection,
    prompts: Sequence[HeldOutPrompt],
    references: Sequence[str],
    texts: Sequence[Sequence[str]],
    tokenizer: Any,
    metrics: Sequence[Metric],
) -> list[Answer]:
    columns: dict[str, dict[str, Any]] = {}
    if any(metric.NEEDS_ROW for metric in metrics):
        columns = rows_at(task, "eval", [prompt.where for prompt in prompts])
    ids = store.ids
    _, firsts = np.unique(store.row_numbers, return_index=True)
    return [
        Answer(
            str(ids[int(firsts[prompt.row])]),
            tokenizer.decode(prompt.prompt.tolist(), skip_special_tokens=False),
            reference,
            tuple(of_row),
            columns.get(prompt.where, {}),
            prompt.where,
        )
        for prompt, reference, of_row in zip(prompts, references, texts)
    ]


def _model_ends(model: nn.Module) -> Any:
    config = getattr(bare_model(model), "generation_config", None)
    return None if config is None else config.eos_token_id
