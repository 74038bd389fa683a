"""`mtft eval`: score a base model, or one with an adapter, on the held-out rows of a recipe."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mtft.common.errors import UserError
from mtft.common.run_folders import ADAPTER, export_of_run
from mtft.evaluation.regressions import compare_scores
from mtft.evaluation.task_scores import TaskScores
from mtft.recipe.schema.metric import metric_key
from mtft.recipe.schema.model import ModelSection
from mtft.recipe.schema.recipe import Recipe


def evaluate(
    recipe: Recipe,
    adapter: Path | None = None,
    model: ModelSection | None = None,
    *,
    tasks: Sequence[str] | None = None,
    stores: Sequence[Any | None] | None = None,
) -> dict[str, TaskScores]:
    """Scores per task of `model` (None: the recipe's), with the PEFT adapter in folder `adapter` if given.

    tasks   only these (None: every task with eval_data)
    stores  held-out stores that are open already (None: opened with the tokenizer of the model)
    Raises UserError when no task has held-out rows, or the adapter does not fit the model.
    """
    return evaluate_all(recipe, adapter, model, tasks=tasks, stores=stores, harness=False)[0]


def evaluate_all(
    recipe: Recipe,
    adapter: Path | None = None,
    model: ModelSection | None = None,
    *,
    tasks: Sequence[str] | None = None,
    stores: Sequence[Any | None] | None = None,
    harness: bool = True,
) -> tuple[dict[str, TaskScores], dict[str, dict[str, float]]]:
    """(what `evaluate` gives, scores by lm-eval's tasks where the recipe has some and `harness` is not False)."""
    import torch

    from mtft.data.batching.packed_attention import packing_refusal
    from mtft.data.store.token_store import open_stores
    from mtft.evaluation.evaluate_model import evaluate_model, harness_scores
    from mtft.evaluation.heldout_loss import BatchLayout
    from mtft.evaluation.lm_eval_tasks import LmEvalTasks
    from mtft.evaluation.questions import AskedMetrics, check_questions
    from mtft.models.adapters import load_adapter
    from mtft.models.loading import compute_dtype, load_base, load_tokenizer, pad_id

    section = model or recipe.model
    tokenizer = load_tokenizer(section)
    if stores is None:
        stores = open_stores(recipe, tokenizer, "eval")
    chosen = [store if store is not None and (tasks is None or store.task in tasks) else None for store in stores]
    tasks_of_harness = recipe.eval.lm_eval if harness else None
    if all(store is None for store in chosen) and tasks_of_harness is None:
        raise UserError(
            "no task has held-out rows to evaluate on", where="tasks: eval_data", do="give a task an eval_data file"
        )
    lm_eval = None if tasks_of_harness is None else LmEvalTasks.load(tasks_of_harness)
    asked = AskedMetrics.of(recipe, tokenizer)
    check_questions(chosen, asked)  # before the model is loaded: what can't be measured is refused
    network: Any = load_base(section)
    if adapter is not None:
        network = load_adapter(network, adapter)
    if torch.cuda.is_available() and section.quantise == "none":
        network = network.to(torch.device("cuda"))
    packing = recipe.train.packing and packing_refusal(network.config, network.config._attn_implementation) is None
    layout = BatchLayout(recipe.train.rows_at_once, recipe.train.max_length, pad_id(tokenizer), packing)
    dtype = compute_dtype(section)
    precision = None if dtype == torch.float32 else dtype
    scores = evaluate_model(network, chosen, layout, autocast=precision, asked=asked)
    if lm_eval is None:
        return scores, {}
    return scores, harness_scores(network, lm_eval, tokenizer, layout, autocast=precision)


def exported(recipe: Recipe, folder: Path) -> tuple[Path | None, ModelSection | None]:
    """(adapter, model) to give to `evaluate` for what a run handed over; after full fine-tuning it is a model."""
    export = export_of_run(folder)
    if export is None:
        raise UserError("the run is not finished: there is no adapter to score", where=str(folder),
                        do="let it finish (`mtft train` continues), or score the base model: --base")  # fmt: skip
    if (export / ADAPTER).is_file():
        return export, None
    return None, recipe.model.model_copy(update={"path": str(export)})


def as_json(
    scores: dict[str, TaskScores],
    recipe: Recipe,
    *,
    against: dict[str, TaskScores] | None = None,
    level: float = 0.95,
) -> dict[str, Any]:
    """What `mtft eval` prints: {task: {metric: value, "interval": {metric: [lower, upper]}, "examples", "tokens"}}.

    Only the metrics that the task asks for. The intervals are bootstrap over examples at `level`. With the scores of an
    older model in `against` each task has a key "against" (mtft.evaluation.regressions.compare_scores); one that is
    auxiliary has "auxiliary": True.
    """
    task_metrics = {task.name: [*map(metric_key, task.metrics)] for task in recipe.tasks}
    out: dict[str, Any] = {}
    for task, task_scores in scores.items():
        metrics = [metric for metric in task_scores.metrics if metric in task_metrics.get(task, task_scores.metrics)]
        summary, intervals = task_scores.summary(), task_scores.intervals(metrics, level=level)
        out[task] = {
            **{metric: summary[metric] if math.isfinite(summary[metric]) else None for metric in metrics},
            "interval": {metric: list(intervals[metric]) for metric in metrics},
            "level": level,
            "examples": summary["examples"],
            "tokens": summary["tokens"],
        }
        if task in recipe.auxiliary_tasks:
            out[task]["auxiliary"] = True
        if against is not None:
            out[task]["against"] = compare_scores(against[task], task_scores, metrics, level=level)
    return out
