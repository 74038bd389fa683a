"""Tasks of lm-evaluation-harness as targets: loaded once, scored on a model that is in memory.

Their datasets are read when the tasks are loaded, which is tried before anything is trained. Every rank scores all of
a task: the harness knows nothing of ranks, and sharded weights are gathered as often on each of them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any

from torch import nn

from data_mixers.common.suggest import did_you_mean
from mtft.common.aggregates import Aggregate
from mtft.common.errors import UserError
from mtft.common.state_tree import random_state, restore_random_state
from mtft.recipe.schema.evaluation import LmEvalSection
from mtft.recipe.targets import LM_EVAL

WHERE = "eval.lm_eval.tasks"
BOOTSTRAP = 1000  # draws for the standard errors of metrics that have no formula
_SHARES = ("acc", "acc_norm", "exact_match", "em", "f1")  # in [0, 1], whatever the task


@dataclass(frozen=True)
class LmEvalTasks:
    """The tasks of a recipe, with their datasets."""

    section: LmEvalSection
    manager: Any
    directions: Mapping[str, Mapping[str, bool]]  # task -> metric -> whether higher is better

    @classmethod
    def load(cls, section: LmEvalSection) -> LmEvalTasks:
        """Raises UserError for a task that is not there, or whose dataset can't be read.

        Kept for the process: a sweep asks for them with every trial, and lm-eval lists its tasks for seconds.
        """
        return _loaded(section.model_dump_json())

    def aggregate(self, target: str) -> Aggregate:
        """What is known of a score, "lm_eval/TASK/METRIC". UserError for a metric that the task does not have.

        A group's metrics are those of its tasks.
        """
        _, task, metric = target.split("/", 2)
        name = metric.partition(",")[0]  # "exact_match,strict-match": a filter of the task
        of = self.directions.get(task) or {key: up for each in self.directions.values() for key, up in each.items()}
        if name not in of:
            what = f"lm-eval's {task} has no metric {name!r}{did_you_mean(name, of)}"
            raise UserError(what, where=f"sweep.objective.{target}", do=f"one of {', '.join(of)}")
        bounds = (0.0, 1.0) if name in _SHARES else (None, None)
        return Aggregate(target, 1, lambda stats_NS: float(stats_NS[:, 0].mean()), of[name], bounds)

    def scores(
        self, model: nn.Module, tokenizer: Any, *, batch_size: int = 8, limit: int | None = None
    ) -> dict[str, dict[str, float]]:
        """{task: {metric: score, "metric_stderr": its standard error}}; model: in evaluation mode.

        limit: documents of each task, in place of the section's. Random states stay as they were.
        """
        before = random_state()
        try:
            with _quiet():
                return self._scores(model, tokenizer, batch_size, limit or self.section.limit)
        finally:
            restore_random_state(before)

    def _scores(self, model: nn.Module, tokenizer: Any, batch_size: int, limit: int | None) -> dict[str, Any]:
        import lm_eval
        from lm_eval.models.huggingface import HFLM

        evaluate: Any = lm_eval.simple_evaluate  # decorators hide the types of both
        harness: Any = HFLM
        found: Any = evaluate(
            model=harness(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size),
            tasks=list(self.section.tasks),
            task_manager=self.manager,
            limit=limit,
            num_fewshot=self.section.num_fewshot,
            apply_chat_template=self.section.apply_chat_template,
            bootstrap_iters=BOOTSTRAP,
            log_samples=False,
        )
        return {task: _numbers(row) for task, row in found["results"].items()}


@cache
def _loaded(section_json: str) -> LmEvalTasks:
    section = LmEvalSection.model_validate_json(section_json)
    if find_spec("lm_eval") is None:
        raise UserError("lm-eval is not installed", where="eval.lm_eval", do='pip install "mtft[eval]"')
    with _quiet():
        from lm_eval.tasks import TaskManager

        manager = _manager(TaskManager, section)
        directions: dict[str, Mapping[str, bool]] = {}
        for name in section.tasks:
            if name not in manager.all_tasks:
                # of its thousands of tasks those that begin alike, or the hint would not get to them
                near = [known for known in manager.all_tasks if known[:2] == name[:2]]
                what = f"lm-eval has no task {name!r}{did_you_mean(name, near)}"
                do = "`lm-eval ls tasks` lists its own; those of yours need eval.lm_eval.include_path"
                raise UserError(what, where=WHERE, do=do)
            try:
                loaded = manager.load([name])
            except Exception as error:
                raise UserError(
                    f"lm-eval can't load {name}: {str(error).partition(chr(10))[0] or type(error).__name__}",
                    where=WHERE,
                    do="check the task's files and that its dataset is at hand (offline: in the local cache)",
                ) from error
            directions |= {key: task.higher_is_better() for key, task in loaded["tasks"].items()}
    return LmEvalTasks(section, manager, directions)


def flat_scores(scores: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """{"lm_eval/TASK/METRIC": score}, as a sweep's ledger has them."""
    return {
        f"{LM_EVAL}/{task}/{metric}": value
        for task, row in scores.items()
        for metric, value in row.items()
        if "_stderr" not in metric
    }


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """{"acc": .., "acc_stderr": ..} of {"acc,none": .., "acc_stderr,none": .., "alias": ..}."""
    return {
        key.removesuffix(",none"): float(value)
        for key, value in row.items()
        if "," in key and isinstance(value, int | float)
    }


def _manager(kind: Any, section: LmEvalSection) -> Any:
    """Of the user's own tasks alone where these are all: listing lm-eval's takes seconds."""
    if section.include_path is not None:
        own = kind(include_path=section.include_path, include_defaults=False)
        if all(name in own.all_tasks for name in section.tasks):
            return own
    return kind(include_path=section.include_path)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the harness' own log of every task and default."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
