"""bleu: n-grams of the whole corpus."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from mtft.evaluation.metrics.base import Answer, Metric, need_package


@dataclass(frozen=True)
class Bleu(Metric):
    """Corpus BLEU in [0, 100] (Papineni et al. 2002; Post 2018), equal to sacrebleu's corpus_bleu with its defaults
    (n up to 4, exponential smoothing, no effective order): mtft.common.corpus_scores.bleu_of_sums.

    tokenize  sacrebleu's: 13a (most scripts with spaces), intl, char, zh; none: split at spaces

    A corpus in which no answer has four tokens scores 0, also where it equals the references.
    """

    NAME = "bleu"
    AGGREGATE = "bleu"

    tokenize: Literal["13a", "intl", "char", "zh", "none"] = "13a"

    def __post_init__(self) -> None:
        super().__post_init__()
        need_package("sacrebleu", self.NAME)

    def statistics(self, answers: Sequence[Answer]) -> NDArray[np.float64]:
        from sacrebleu.metrics.bleu import BLEU

        # Effective order changes only the score of one sentence, which is not used; without it sacrebleu warns.
        scorer = BLEU(tokenize=self.tokenize, effective_order=True)
        out = np.zeros((len(answers), self.aggregate.width))
        for row_S, answer in zip(out, answers, strict=True):
            score = scorer.sentence_score(answer.text, [answer.reference])
            row_S[:] = [score.sys_len, score.ref_len, *score.counts, *score.totals]
        return out
