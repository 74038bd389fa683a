"""Metrics of the forward pass that gives the loss: no answer is generated. mtft/evaluation/task_scores.py has their
statistics.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mtft.evaluation.metrics.base import Metric, Needs


@dataclass(frozen=True)
class ForwardMetric(Metric):
    """One that has no statistics of answers."""

    NEEDS: ClassVar[Needs] = "forward"


@dataclass(frozen=True)
class HeldoutLoss(ForwardMetric):
    """Mean negative log-likelihood of the supervised tokens, nats per token."""

    NAME = "loss"
    AGGREGATE = "token_loss"


@dataclass(frozen=True)
class TokenAccuracy(ForwardMetric):
    """Share of the supervised tokens that are the model's most likely ones, each after the true ones before it."""

    NAME = "token_accuracy"
    AGGREGATE = "token_share"


@dataclass(frozen=True)
class ExactMatch(ForwardMetric):
    """Share of the rows that greedy decoding would reproduce, token by token, up to the end of the turn; proved from
    the forward pass (mtft/evaluation/task_scores.py). `text_match` compares what was generated, with normalisation.
    """

    NAME = "exact_match"
    AGGREGATE = "share"
