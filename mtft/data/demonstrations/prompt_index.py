"""BM25 over the prompts of demonstrations.

    score(q, d) = sum over the words t of q, each once   idf_t f_td / (f_td + k1 (1 - b + b |d| / mean |d|))
    idf_t       = ln(1 + (N - n_t + 0.5) / (n_t + 0.5))

f_td: how often t stands in d; n_t: documents with t, of N; k1 = 1.5, b = 0.75. Robertson & Zaragoza, "The Probabilistic
Relevance Framework: BM25 and Beyond" (2009), in Lucene's form, whose idf is never negative; summed by bm25s (Lu, arXiv
2407.03618), which keeps the addends as a sparse matrix. Words are runs of letters and digits, in lower case; Chinese
and Japanese characters stand for themselves, since nothing divides their words.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import numpy as np

from mtft.common.errors import UserError

K1, B = 1.5, 0.75
FIRST = 64  # of a ranking that are sorted at once; more are seldom asked for
_SCRIPT = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
_WORD = re.compile(f"[{_SCRIPT}]|[^\\W{_SCRIPT}]+")


def words(text: str) -> list[str]:
    """What two texts may have in common."""
    return _WORD.findall(text.lower())


class PromptIndex:
    """Ranks texts by their likeness to another. Raises UserError without the package bm25s. where: the recipe's key."""

    def __init__(self, texts: Sequence[str], where: str) -> None:
        try:
            import bm25s
        except ImportError:
            do = "pip install 'mtft[retrieve]', or retrieve: random"
            raise UserError("the package bm25s is not installed", where=where, do=do) from None
        documents = [words(text) for text in texts]
        self._known = {word for document in documents for word in document}
        self._bm25 = bm25s.BM25(k1=K1, b=B, method="lucene")
        if self._known:
            self._bm25.index(documents, show_progress=False)

    def ranked(self, text: str) -> Iterator[int]:
        """Numbers of the texts that have a word in common with this one, the nearest first; of equals the earlier."""
        asked = [word for word in dict.fromkeys(words(text)) if word in self._known]
        if not asked:
            return
        score_N = np.asarray(self._bm25.get_scores(asked))
        given = 0
        for least in (FIRST, len(score_N)):
            best = _largest(score_N, least)
            yield from best[given:].tolist()
            given = len(best)


def _largest(score_N: np.ndarray, least: int) -> np.ndarray:
    """Indices of the largest positive scores in order, at least so many (if there are), with all equals of the last."""
    found = np.flatnonzero(score_N > 0)
    if least < len(found):
        border = np.partition(score_N[found], len(found) - least)[len(found) - least]
        found = found[score_N[found] >= border]
    return found[np.lexsort((found, -score_N[found]))]
