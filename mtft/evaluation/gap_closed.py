"""How much of the way from the untuned strong model to the tuned one fusion has gone.

    gap   = (fused - strong) / (tuned - strong)        1 = as good as tuning the strong model itself, 0 = no gain
    ratio = fused / tuned                              what Dynamic Logits Fusion reports (Fan et al., 2406.15480)

Both, always: the ratio is flattered by a strong model that is good already (its 0.73 can be a gap of 0.28). The same
formula serves losses (lower is better) and accuracies. Intervals are paired bootstrap percentiles over the examples
that all three models have scored.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mtft.common.bootstrap import percentile_interval, resampled_rows, same_order
from mtft.evaluation.task_scores import TaskScores

TINY = 1e-9  # |tuned - strong| below this: there is no gap to close
UNSURE = 0.025  # share of draws in which tuning does not help: beyond it the interval of the gap has no end


@dataclass(frozen=True)
class Gap:
    """Gap and ratio of one task and metric; None where they make no sense, and then `reason` says why.

    Intervals are (lower, upper). A `reason` beside a gap is a warning: the number is there, its interval is not.
    """

    task: str
    metric: str
    strong: float
    fused: float
    tuned: float | None
    gap: float | None
    gap_interval: tuple[float, float] | None
    ratio: float | None
    ratio_interval: tuple[float, float] | None
    reason: str | None = None


def gap_and_ratio(strong: float, fused: float, tuned: float) -> tuple[float | None, float | None]:
    """Point values from three scores; None where a denominator is (nearly) zero."""
    gap = None if abs(tuned - strong) < TINY else (fused - strong) / (tuned - strong)
    return gap, None if abs(tuned) < TINY else fused / tuned


def gap_closed(
    strong: TaskScores,
    fused: TaskScores,
    tuned: TaskScores | None,
    *,
    metric: str = "loss",
    level: float = 0.95,
    draws: int = 1000,
    seed: int = 0,
) -> Gap:
    """Gap and ratio of one task with intervals. `tuned` = None: there is no tuned strong model to compare with.

    Raises ValueError when the models have not scored the same examples.
    """
    start, end = strong.score(metric), fused.score(metric)
    if tuned is None:
        reason = "no tuned strong model was scored"
        return Gap(strong.task, metric, start, end, None, None, None, None, None, reason)
    goal = tuned.score(metric)
    gap, ratio = gap_and_ratio(start, end, goal)
    same = [_in_order(scores, strong.ids) for scores in (strong, fused, tuned)]
    rows_DN = next(resampled_rows(len(strong.ids), draws, seed, at_once=draws))
    start_D, end_D, goal_D = (of.aggregate(metric).resampled(of.statistics(metric), rows_DN) for of in same)
    ratio_interval = (
        None if ratio is None or np.any(np.abs(goal_D) < TINY) else percentile_interval(end_D / goal_D, level)
    )
    gap_interval, reason = None, None
    if gap is None:
        reason = f"tuning the strong model changed nothing: {start:.6g} -> {goal:.6g}"
    else:
        no_gain = np.mean((goal_D - start_D) * np.sign(goal - start) <= TINY)
        if no_gain > UNSURE:
            reason = f"in {no_gain:.0%} of the resamples tuning does not help: too few examples for an interval"
        else:
            moved_D = goal_D - start_D
            kept_D = np.abs(moved_D) > TINY
            gap_interval = percentile_interval((end_D - start_D)[kept_D] / moved_D[kept_D], level)
    return Gap(strong.task, metric, start, end, goal, gap, gap_interval, ratio, ratio_interval, reason)


def _in_order(scores: TaskScores, ids: tuple[str, ...]) -> TaskScores:
    """The scores in the order of `ids`."""
    order = same_order(ids, scores.ids)
    if order is None:
        raise ValueError(f"{scores.task!r}: the models were not scored on the same examples (ids differ or repeat)")
    return scores.taken(order)
