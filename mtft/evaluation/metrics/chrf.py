"""chrf: n-grams of characters of the whole corpus, for every script."""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from mtft.common.aggregates import AGGREGATES, Aggregate
from mtft.common.corpus_scores import CHRF_ORDER
from mtft.evaluation.metrics.base import Answer, Metric


@dataclass(frozen=True)
class ChrF(Metric):
    """Corpus chrF in [0, 100] (Popović 2015; chrF++: 2017), equal to sacrebleu's corpus_chrf with its defaults: n-grams
    of up to 6 characters without the spaces, recall twice as important (mtft.common.corpus_scores.chrf_of_sums).

    word_order  also n-grams of up to so many words; 2: chrF++
    """

    NAME = "chrf"
    AGGREGATE = "chrf"

    word_order: Annotated[int, Field(ge=0, le=2)] = 0

    @property
    def aggregate(self) -> Aggregate:
        return AGGREGATES[f"chrf_{self.word_order}" if self.word_order else "chrf"]

    def statistics(self, answers: Sequence[Answer]) -> NDArray[np.float64]:
        out = np.zeros((len(answers), self.aggregate.width))
        for row_S, answer in zip(out, answers, strict=True):
            pairs = zip(self._ngrams(answer.text), self._ngrams(answer.reference), strict=True)
            row_S[:] = [number for ours, theirs in pairs for number in _shared(ours, theirs)]
        return out

    def _ngrams(self, text: str) -> Iterator[Counter[str]]:
        signs = "".join(text.split())
        for order in range(1, CHRF_ORDER + 1):
            yield Counter(signs[start : start + order] for start in range(len(signs) - order + 1))
        words = _words(text) if self.word_order else []
        for order in range(1, self.word_order + 1):
            yield Counter(" ".join(words[start : start + order]) for start in range(len(words) - order + 1))


def _shared(ours: Counter[str], theirs: Counter[str]) -> tuple[int, int, int]:
    """N-grams of the answer (0 if the reference has none: the answer's length is not judged then), of the reference, of
    both.
    """
    return ours.total() if theirs else 0, theirs.total(), (ours & theirs).total()


def _words(text: str) -> list[str]:
    """Words, from which a punctuation mark at the end, or else at the beginning, is split off."""
    words: list[str] = []
    for word in text.split():
        if len(word) > 1 and word[-1] in string.punctuation:
            words += [word[:-1], word[-1]]
        elif len(word) > 1 and word[0] in string.punctuation:
            words += [word[0], word[1:]]
        else:
            words.append(word)
    return words
