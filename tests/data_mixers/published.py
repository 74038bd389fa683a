"""The published trial tables, where they are present: ../shared/data beside the repository, or MTFT_SHARED_DATA."""

import csv
import os
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(os.environ.get("MTFT_SHARED_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data")
PILE = (
    "0.113285273 0.079608651 0.003913491 0.185375901 0.051081359 0.015962925 0.101750772 0.003707518 0.066529351 "
    "0.001750772 0.027085479 0.236869207 0.01184346 0.007929969 0.008032956 0.038825953 0.046446962"
)
PRIOR = np.array([float(share) for share in PILE.split()])


def path(name):
    """Path of a published table; the test is skipped where it is absent."""
    if not (ROOT / name).exists():
        pytest.skip(f"published table {name} is not here (../shared/data or MTFT_SHARED_DATA)")
    return ROOT / name


def columns(name):
    """{column: float64 [n]} of a CSV (cells that are no numbers become NaN)."""
    with open(path(name), newline="") as file:
        rows = list(csv.reader(file))

    def number(cell):
        try:
            return float(cell)
        except ValueError:
            return np.nan

    return {name: np.array([number(row[i]) for row in rows[1:]]) for i, name in enumerate(rows[0])}


def matrix(name, drop=("index",)):
    """Columns side by side [n, C]."""
    return np.stack([column for key, column in columns(name).items() if key not in drop], axis=1)


def regmix(scale, target="pile_cc"):
    """(X, y) of RegMix's tables: scale train, 1m, 60m or 1B."""
    if scale == "train":
        return matrix("regmix/train_mixture_1m.csv"), columns("regmix/train_loss_1m.csv")[target]
    if scale == "1B":
        return matrix("regmix/test_mixture_1B_first32.csv"), columns("regmix/test_loss_1B_first32.csv")[target]
    first128 = f"regmix/test_loss_{scale}_first128.csv"
    y = columns(f"regmix/test_loss_pile_cc_{scale}.csv")[target] if target == "pile_cc" else columns(first128)[target]
    return matrix(f"regmix/test_mixture_{scale}.csv")[: len(y)], y


def subset(s, n):
    """The s-th random subset of n of the 512 trials, as in all our figures."""
    return np.random.RandomState(100 + s).permutation(512)[:n]
