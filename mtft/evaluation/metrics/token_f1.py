"""f1: how much of the words of answer and reference is the same, as in SQuAD."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mtft.evaluation.metrics.base import Answer, Metric
from mtft.evaluation.metrics.text_matches import column

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


@dataclass(frozen=True)
class TokenF1(Metric):
    """Mean over rows of F1 = 2 P R / (P + R) of the words, counted with their repetitions.

    Rajpurkar et al. 2016 (SQuAD), with the normalisation of its script: lower case, no ASCII punctuation, no articles
    (a, an, the), words between spaces. Where one side has no word, 1 if the other has none either, else 0 (SQuAD 2.0).
    """

    NAME = "f1"
    AGGREGATE = "share"

    def statistics(self, answers: Sequence[Answer]) -> NDArray[np.float64]:
        return column([_f1(squad_words(answer.text), squad_words(answer.reference)) for answer in answers])


def squad_words(text: str) -> list[str]:
    """The words of a text as SQuAD's script compares them."""
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def _f1(ours: list[str], theirs: list[str]) -> float:
    if not ours or not theirs:
        return float(ours == theirs)
    both = (Counter(ours) & Counter(theirs)).total()
    return 2 * both / (len(ours) + len(theirs))
