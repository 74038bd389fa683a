"""Are there enough trials to say anything of a mixture nobody tried? The one place that decides.

    needed(K) = 3 (K + 1)        Olmix (arXiv 2602.12237): enough for a log-linear law, which has K + 1 numbers

Below it a fit still runs, but its cross-validation rests on folds of a trial or two: gains of 0.000 with intervals of
no width came out of that. So no prediction, no interval and no gain is shown then, in any command; nor for a target of
which the surrogates say nothing but the mean of the trials (TargetFit.unsaid asks both questions).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from data_mixers.sweep.trial import TrialRecord

TOO_FEW = "too few trials to say"


def needed_trials(tasks: int) -> int:
    """Trials that a fit over so many tasks needs."""
    return 3 * (tasks + 1)


def too_few_trials(trials: int, tasks: int) -> str | None:
    """Why nothing is predicted from so many trials; None: there are enough."""
    needed = needed_trials(tasks)
    if trials >= needed:
        return None
    return f"{trials} trials of {tasks} tasks: {TOO_FEW} anything of other mixtures (a fit needs about {needed})"


def trials_with(records: Iterable[TrialRecord], target: str) -> int:
    """Trials that have a score of the target, checkpoints of one trial counted once."""
    return len({record.trial for record in records if record.scores.get(target) is not None})
