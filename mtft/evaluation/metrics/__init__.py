"""Metrics of what a model answers: one method a file, one dict of names, one way to make them from a recipe."""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import Any

from mtft.common.errors import UserError
from mtft.evaluation.metrics.base import Answer, Metric, Needs
from mtft.evaluation.metrics.bleu import Bleu
from mtft.evaluation.metrics.chrf import ChrF
from mtft.evaluation.metrics.forward import ExactMatch, HeldoutLoss, TokenAccuracy
from mtft.evaluation.metrics.json_answers import JsonMatch, JsonValid
from mtft.evaluation.metrics.labels import LabelAccuracy, LabelMacroF1, LabelMetric
from mtft.evaluation.metrics.numeric import MeanAbsoluteError, NumericMatch, SpearmanCorrelation
from mtft.evaluation.metrics.pass_at_k import PassAtK
from mtft.evaluation.metrics.python_metric import PythonMetric
from mtft.evaluation.metrics.rouge import Rouge1, Rouge2, RougeL
from mtft.evaluation.metrics.text_matches import Contains, RegexMatch, TextMatch
from mtft.evaluation.metrics.token_f1 import TokenF1
from mtft.evaluation.metrics.tool_call_match import ToolCallMatch
from mtft.recipe.method_options import check_option_names, find_method, options_of
from mtft.recipe.schema.metric import NamedMetricSection, PythonMetricSection, metric_key
from mtft.recipe.schema.task import TaskSection

METRICS: dict[str, type[Metric]] = {
    kind.NAME: kind
    for kind in (
        HeldoutLoss,
        TokenAccuracy,
        ExactMatch,
        TextMatch,
        Contains,
        RegexMatch,
        NumericMatch,
        TokenF1,
        RougeL,
        Rouge1,
        Rouge2,
        ChrF,
        Bleu,
        JsonValid,
        JsonMatch,
        ToolCallMatch,
        LabelAccuracy,
        LabelMacroF1,
        MeanAbsoluteError,
        SpearmanCorrelation,
        PassAtK,
    )
}


def make_metrics(task: TaskSection) -> dict[str, Metric]:
    """The metrics of a task by their keys in results, in the recipe's order.

    Raises UserError for an unknown name or option, an option out of its range, a package or program that is missing.
    """
    metrics: dict[str, Metric] = {}
    for item in task.metrics:
        try:
            metrics[str(metric_key(item))] = _make(item)
        except UserError as error:
            where = error.where or "metrics"
            where = (
                f"tasks.{task.name}.{where}" if where.startswith("metrics") else f"{where} (tasks.{task.name}.metrics)"
            )
            raise UserError(error.what, where=where, do=error.do) from None
    return metrics


def _make(item: str | NamedMetricSection | PythonMetricSection) -> Metric:
    if isinstance(item, PythonMetricSection):
        return PythonMetric(item.python, item.higher_is_better, item.timeout, item.folder)
    name = item if isinstance(item, str) else item.name
    options: dict[str, Any] = {} if isinstance(item, str) else dict(item.model_extra or {})
    kind = find_method(METRICS, name, "metric", "metrics")
    where = f"metrics.{name}"
    if kind is ExactMatch and (asked := options.keys() & set(options_of(TextMatch))):
        what = f"exact_match has no option {min(asked)!r}: it compares tokens"
        raise UserError(what, where=f"{where}.{min(asked)}", do="text_match compares generated texts and has it")
    check_option_names(f"metric {name}", options_of(kind), options, where)
    for field in fields(kind):
        if field.default is MISSING and field.name not in options:
            what = f"metric {name} needs the option {field.name}"
            raise UserError(what, where=where, do=f"write {{name: {name}, {field.name}: ...}} (docs/tasks.md)")
    return kind(**options)


__all__ = ["METRICS", "Answer", "LabelMetric", "Metric", "Needs", "make_metrics"]
