"""numeric, mae, spearman: the number that an answer names, against that of the reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from mtft.common.errors import UserError
from mtft.common.listing import clipped
from mtft.evaluation.metrics.base import Answer, Metric
from mtft.evaluation.metrics.number_reader import WrittenNumber, read_number
from mtft.evaluation.metrics.text_matches import column

Tolerance = Annotated[float, Field(ge=0)]


@dataclass(frozen=True)
class NumberMetric(Metric):
    """One that reads a number in every reference.

    take  the last number of a text, or the first (mtft/evaluation/metrics/number_reader.py)
    """

    take: Literal["last", "first"] = "last"

    def _asked(self, answer: Answer) -> WrittenNumber:
        number = read_number(answer.reference, self.take)
        if number is None:
            what = f"{self.NAME} needs a number in every reference, and {clipped(answer.reference, 60)!r} has none"
            raise UserError(what, where=answer.where, do="mend the row, or take another metric for this task")
        return number


@dataclass(frozen=True)
class NumericMatch(NumberMetric):
    """Share of the rows with |answer - reference| <= max(absolute_tolerance, relative_tolerance * |reference|), as
    math.isclose, but relative to the reference alone.

    take                the last number of a text, or the first (mtft/evaluation/metrics/number_reader.py)
    relative_tolerance  of the reference's size
    absolute_tolerance  0: a reference of 0 must be met exactly

    A percent sign on one side only may be meant or left out: 50% equals 50 and 0.5.
    """

    NAME = "numeric"
    AGGREGATE = "share"

    relative_tolerance: Tolerance = 1e-6
    absolute_tolerance: Tolerance = 0.0

    def statistics(self, answers: Sequence[Answer]) -> NDArray[np.float64]:
        return column([self._right(read_number(answer.text, self.take), self._asked(answer)) for answer in answers])

    def _right(self, given: WrittenNumber | None, asked: WrittenNumber) -> bool:
        if given is None:
            return False
        pairs = [(given.value, asked.value)]
        if given.percent and not asked.percent:
            pairs.append((given.value / 100, asked.value))
        if asked.percent and not given.percent:
            pairs.append((given.value, asked.value / 100))
        return any(
            abs(ours - theirs) <= max(self.absolute_tolerance, self.relative_tolerance * abs(theirs))
            for ours, theirs in pairs
        )


@dataclass(frozen=True)
class NumberPairs(NumberMetric):
    """Statistics (number of the answer, of the reference, 1); an answer without a number: (0, reference, 0)."""

    def statistics(self, answers: Sequence[Answer]) -> NDArray[np.float64]:
        out = np.zeros((len(answers), self.aggregate.width))
        for row_S, answer in zip(out, answers, strict=True):
            given, asked = read_number(answer.text, self.take), self._asked(answer)
            row_S[:] = [0, asked.value, 0] if given is None else [given.value, asked.value, 1]
        return out


@dataclass(frozen=True)
class MeanAbsoluteError(NumberPairs):
    """Mean of |answer - reference|, 0 or more, lower is better.

    take  the last number of a text, or the first (mtft/evaluation/metrics/number_reader.py)

    An answer without a number counts as the mean of the references, which is what one says who knows nothing of the
    row. Percent signs are not looked at.
    """

    NAME = "mae"
    AGGREGATE = "mae"


@dataclass(frozen=True)
class SpearmanCorrelation(NumberPairs):
    """Spearman's rank correlation of answers and references in [-1, 1] (Spearman 1904), ties with their mean rank.

    take  the last number of a text, or the first (mtft/evaluation/metrics/number_reader.py)

    An answer without a number counts as the mean of the references; where all answers are equal, the score is 0: they
    tell nothing of the order. Percent signs are not looked at.
    """

    NAME = "spearman"
    AGGREGATE = "spearman"
