"""Trials that cost nothing, for the sweep tests: at module level, since worker processes must find them."""

import os
import signal
import time
from pathlib import Path

from data_mixers import Mixture
from data_mixers.sweep.trial import Trial


def toy_trials(n=6):
    return [
        Trial(Mixture.of({"a": (i + 1) / (n + 1), "b": 1 - (i + 1) / (n + 1)}), seed=i, config="c") for i in range(n)
    ]


def score(trial):
    """Deterministic in the trial, two checkpoints."""
    loss = (trial.mixture["a"] - 0.3) ** 2 + trial.seed * 1e-3
    return [(0.5, {"a/loss": loss + 1}), (1.0, {"a/loss": loss, "b/loss": 1 / (1 + loss)})]


def slow(trial):
    time.sleep(0.15)
    return score(trial)


def breaks_on_two(trial):
    if trial.seed == 2:
        raise RuntimeError("no memory left")
    return score(trial)


def dies_on_two(trial):
    if trial.seed == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return score(trial)


def hangs_on_two(trial):
    if trial.seed == 2:
        time.sleep(60)
    return score(trial)


def diverges_on_two(trial):
    return [(1.0, {"a/loss": float("nan")})] if trial.seed == 2 else score(trial)


def breaks_once(folder, trial):
    mark = Path(folder) / trial.id
    if not mark.exists():
        mark.touch()
        raise RuntimeError("first attempt")
    return score(trial)


def count_runs(folder, trial):
    """Leaves one file per started run."""
    (Path(folder) / f"{trial.id}-{time.time_ns()}").touch()
    return slow(trial)


def checked(trial, stop=None):
    """Scored at a third, two thirds and the end; ends early where the rule says so."""
    points = []
    for progress in (1 / 3, 2 / 3, 1.0):
        loss = (trial.mixture["a"] - 0.3) ** 2 + 1 - 0.5 * progress + 1e-3 * (trial.seed % 3)
        points.append((progress, {"a/loss": loss}))
        if stop is not None and stop.hopeless(*points[-1]):
            break
    return points


def checked_slow(folder, trial, stop=None):
    """`checked`, leaving one file per started run."""
    (Path(folder) / f"{trial.id}-{time.time_ns()}").touch()
    time.sleep(0.05)
    return checked(trial, stop)


def gpus_seen(trial):
    """Scores: how many GPUs this process is shown, and the first of them (-1: it is shown all that there are)."""
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    ids = [] if not seen else seen.split(",")
    return [(1.0, {"count": float(len(ids)) if seen is not None else -1.0, "first": float(ids[0]) if ids else -1.0})]
