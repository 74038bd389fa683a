"""`tasks.*.metrics`: what is reported of a task's held-out rows. Each is a name, a section with options, or a function
of the user's own.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from mtft.recipe.schema.section import PYTHON_FUNCTION, RecipeSection, TaskName

MetricName = Literal[
    "loss",
    "token_accuracy",
    "exact_match",
    "text_match",
    "contains",
    "regex",
    "numeric",
    "f1",
    "rouge_l",
    "rouge_1",
    "rouge_2",
    "chrf",
    "bleu",
    "json_valid",
    "json_match",
    "tool_call_match",
    "label_accuracy",
    "label_macro_f1",
    "mae",
    "spearman",
    "pass_at_k",
]
"""Keys of mtft.evaluation.metrics.METRICS, which the recipe may not import: here so that errors name the line."""

RESULT_KEYS = ("examples", "tokens", "interval", "level", "against", "auxiliary")
"""What stands beside the metrics of a task in results, so that no metric may be called so."""


class NamedMetricSection(RecipeSection):
    """A metric with options (docs/tasks.md), which its own class checks."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: MetricName
    """See docs/tasks.md; the other keys are the metric's options."""
    key: TaskName | None = None
    """Its name in results, objectives and `train.watch`; null: `name`."""


class PythonMetricSection(RecipeSection):
    """A function of your own, (prompt, reference, answer, row) -> number, run in a process of its own."""

    python: Annotated[str, PYTHON_FUNCTION]
    """FILE.py:FUNCTION; the file lies in the recipe's folder or below it."""
    higher_is_better: bool = True
    """false: an error, 0 or more."""
    timeout: Annotated[float, Field(gt=0, le=86400)] = 60.0
    """Seconds that may pass until the file is loaded, and then for each row, before the process is killed."""
    key: TaskName | None = None
    """Its name in results, objectives and `train.watch`; null: the function's name."""
    folder: str | None = None
    """Absolute path of the folder that the file must lie in; resolved recipes have it. null: the recipe's."""


Metrics = Annotated[tuple[MetricName | NamedMetricSection | PythonMetricSection, ...], Field(strict=False)]


def metric_key(metric: Any) -> str | None:
    """A metric's name in results: of an item of a loaded recipe, or of one as it was written (None: not to be told)."""
    if isinstance(metric, RecipeSection):
        metric = metric.model_dump(include={"name", "python", "key"})
    if not isinstance(metric, dict):
        return metric if isinstance(metric, str) else None
    name = metric.get("key") or metric.get("name") or str(metric.get("python") or "").rpartition(":")[2]
    return name if isinstance(name, str) and name else None


def lower_is_better(metric: Any) -> bool:
    """Whether a smaller score of a metric (an item of a loaded recipe) is the better one."""
    if isinstance(metric, PythonMetricSection):
        return not metric.higher_is_better
    return (metric.name if isinstance(metric, NamedMetricSection) else metric) in ("loss", "mae")
