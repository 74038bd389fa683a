"""rouge_1, rouge_2, rouge_l: overlap of n-grams, and longest common subsequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from mtft.common.errors import UserError
from mtft.evaluation.metrics.base import Answer, Metric, need_package
from mtft.evaluation.metrics.text_matches import column


@dataclass(frozen=True)
class Rouge1(Metric):
    """Mean over rows of ROUGE's F = 2 P R / (P + R) (Lin 2004), by the package rouge-score.

    rouge_1, rouge_2: P and R of words, of pairs of words. rouge_l: of the longest common subsequence of words.

    use_stemmer  Porter's stems of English words longer than three letters

    Words are runs of a-z and 0-9 after lower-casing: letters of other scripts separate words and count for nothing. A
    task of whose references none has such a word is refused (chrf is for every script).
    """

    NAME = "rouge_1"
    AGGREGATE = "share"
    KIND: ClassVar[str] = "rouge1"

    use_stemmer: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        need_package("rouge_score", self.NAME)

    def statistics(self, answers: Sequence[Answer]) -> NDArray[np.float64]:
        from rouge_score.rouge_scorer import RougeScorer

        scorer = RougeScorer([self.KIND], use_stemmer=self.use_stemmer)
        if answers and not any(map(_has_words, answers)):
            what = f"{self.NAME} counts words of a-z and 0-9, and no reference has one"
            raise UserError(what, where=answers[0].where, do="take chrf, which is for every script")
        return column([scorer.score(answer.reference, answer.text)[self.KIND].fmeasure for answer in answers])


def _has_words(answer: Answer) -> bool:
    return any("a" <= sign <= "z" or "0" <= sign <= "9" for sign in answer.reference.lower())


@dataclass(frozen=True)
class Rouge2(Rouge1):
    __doc__ = Rouge1.__doc__
    NAME = "rouge_2"
    KIND = "rouge2"


@dataclass(frozen=True)
class RougeL(Rouge1):
    __doc__ = Rouge1.__doc__
    NAME = "rouge_l"
    KIND = "rougeL"
