"""What a metric is given, and what it gives back: S numbers a row, which an aggregate makes a score of.

A metric is a frozen dataclass whose fields are its options; a recipe names it in `tasks.*.metrics` by its NAME, or as
{name: NAME, option: value}. It declares in NEEDS what it costs:

    forward     nothing more than the forward pass over the held-out rows that gives the loss
    generation  an answer to each row's prompt (tasks.*.generate)
    labels      the likelihood of every label of the task after each row's prompt
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from mtft.common.aggregates import AGGREGATES, Aggregate
from mtft.common.errors import UserError
from mtft.recipe.method_options import check_options

Needs = Literal["forward", "generation", "labels"]


@dataclass(frozen=True)
class Answer:
    """One held-out row with what a model answered to it.

    id         of the row
    prompt     text that the model continued, special tokens included
    reference  words that should stand there: the last learnt turn of the row, without a thought, its end token and what
               else the chat template writes around them
    texts      what the model wrote, in the same way; several where a metric asks for `samples`
    row        the columns of the row as it stands in its file; empty unless a metric says NEEDS_ROW
    where      file:line of the row
    """

    id: str
    prompt: str
    reference: str
    texts: tuple[str, ...]
    row: Mapping[str, Any]
    where: str

    @property
    def text(self) -> str:
        """The first answer: the only one of metrics that don't ask for several."""
        return self.texts[0]


@dataclass(frozen=True)
class Metric:
    """Base of all metrics."""

    NAME: ClassVar[str]
    AGGREGATE: ClassVar[str]
    NEEDS: ClassVar[Needs] = "generation"
    NEEDS_ROW: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_options(self, f"metrics.{self.NAME}")

    @property
    def aggregate(self) -> Aggregate:
        """What makes a score of the rows' numbers."""
        return AGGREGATES[self.AGGREGATE]

    @property
    def samples(self) -> int:
        """Answers to each prompt."""
        return 1

    @property
    def digest(self) -> str | None:
        """SHA-256 (hex) of code of the user's own that the metric runs."""
        return None

    def describe(self) -> str | None:
        """What `mtft check` says of code of the user's own that the metric runs."""
        return None

    def statistics(self, answers: Sequence[Answer]) -> NDArray[np.float64]:
        """float64 [N, S], S = aggregate.width. Raises UserError for references that it can't be measured on."""
        raise NotImplementedError


def need_package(module: str, metric: str) -> None:
    """UserError if a package of the extra `eval` that a metric computes with is not installed."""
    if find_spec(module) is None:
        what = f"the metric {metric} needs the package {module.replace('_', '-')}"
        raise UserError(what, where=f"metrics.{metric}", do='pip install "mtft[eval]"')
