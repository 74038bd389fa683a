"""label_accuracy, label_macro_f1: which label of the task the model finds most likely. Nothing is generated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from data_mixers.common.suggest import did_you_mean
from mtft.common.errors import UserError
from mtft.common.listing import clipped, listed
from mtft.evaluation.metrics.base import Metric, Needs

Labels = NDArray[np.int64]


@dataclass(frozen=True)
class LabelMetric(Metric):
    """One of the most likely label: argmax over labels of log p(label, end of turn | prompt). L labels.

    labels     the texts that an answer may be; null: those that the references of the held-out rows are
    normalise  length: log p divided by the label's characters (acc_norm of lm-eval), for labels of different length
    """

    NEEDS: ClassVar[Needs] = "labels"

    labels: list[str] | None = None
    normalise: Literal["none", "length"] = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        where = f"metrics.{self.NAME}.labels"
        if self.labels is not None and len(self.labels) < 2:
            raise UserError("fewer than two labels: there is nothing to choose", where=where, do="name all labels")
        if self.labels is not None and len(set(self.labels)) < len(self.labels):
            twice = next(label for label in self.labels if self.labels.count(label) > 1)
            raise UserError(f"label {twice!r} stands twice", where=where, do="name each label once")
        if self.labels is not None and "" in self.labels:
            raise UserError("an empty text is no label", where=where, do="remove it")

    def names(self, references: Sequence[str], wheres: Sequence[str]) -> tuple[str, ...]:
        """The labels: the option's, or the distinct references in their alphabetical order.

        wheres: file:line of each row. Raises UserError for a reference that is no label, or if all are one.
        """
        for reference, where in zip(references, wheres, strict=True):
            if self.labels is not None and reference not in self.labels:
                what = f"{clipped(reference, 60)!r} is none of the labels{did_you_mean(reference, self.labels)}"
                raise UserError(what, where=where, do=f"mend the row, or {self.NAME}.labels: {listed(self.labels)}")
            if not reference:
                raise UserError(f"{self.NAME}: an empty reference is no label", where=where, do="mend the row")
        names = tuple(self.labels) if self.labels is not None else tuple(sorted(set(references)))
        if len(names) < 2:
            what = f"{self.NAME}: all held-out rows have one label, so there is nothing to choose"
            raise UserError(what, where=wheres[0] if wheres else None, do=f"name all of them in {self.NAME}.labels")
        return names

    def chosen(self, log_p_NL: NDArray[np.float64], names: Sequence[str]) -> Labels:
        """Number of the most likely label of each row [N]; of equal ones the first. log_p_NL: natural logarithms."""
        if self.normalise == "length":
            log_p_NL = log_p_NL / np.array([len(name) for name in names])
        return log_p_NL.argmax(axis=1)

    def label_statistics(self, reference_N: Labels, predicted_N: Labels) -> NDArray[np.float64]:
        """float64 [N, S] from the numbers of the labels asked for and chosen."""
        raise NotImplementedError


@dataclass(frozen=True)
class LabelAccuracy(LabelMetric):
    """Share of the rows whose most likely label, argmax of log p(label, end of turn | prompt), is the reference.

    labels     the texts that an answer may be; null: those that the references of the held-out rows are
    normalise  length: log p divided by the label's characters (acc_norm of lm-eval), for labels of different length
    """

    NAME = "label_accuracy"
    AGGREGATE = "share"

    def label_statistics(self, reference_N: Labels, predicted_N: Labels) -> NDArray[np.float64]:
        return (reference_N == predicted_N).astype(np.float64)[:, None]


@dataclass(frozen=True)
class LabelMacroF1(LabelMetric):
    """Mean over labels of F1 = 2 hits / (rows of the label + rows given the label), as scikit-learn's
    f1_score(average="macro"): labels count that some row has or is given.

    labels     the texts that an answer may be; null: those that the references of the held-out rows are
    normalise  length: log p divided by the label's characters (acc_norm of lm-eval), for labels of different length
    """

    NAME = "label_macro_f1"
    AGGREGATE = "macro_f1"

    def label_statistics(self, reference_N: Labels, predicted_N: Labels) -> NDArray[np.float64]:
        return np.stack([reference_N, predicted_N], axis=1).astype(np.float64)
