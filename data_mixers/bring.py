"""Bring your own trials: CSV files in, a mixture out (`mtft mix fit` and `mtft mix propose` without a recipe).

Trials of one scale are fitted as they are. Is the mixture meant for runs of another scale (a larger model, a longer
run), say so: with a few large runs the small-scale predictions are mapped to theirs (scale.py), without any a law is
taken for each target whose small trials it ranks.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .bounds import Bounds
from .errors import MixError
from .fit import Fits
from .ledger import TrialLedger
from .mixture import Mixture, check_names, uniform
from .propose import Objective, Proposal, propose
from .scale import ScaledFits, calibrate

FEW = 8  # trials; below it intervals and weights rest on next to nothing


def read_mixture(path: str | Path, names: Sequence[str]) -> Mixture:
    """A mixture of the tasks `names` from a CSV, YAML or JSON file."""
    suffix = Path(path).suffix.lower()
    return Mixture.from_csv(path, names) if suffix in (".csv", ".tsv", ".txt") else Mixture.from_yaml(path, names)


def parse_limits(entries: Sequence[str], option: str) -> dict[str, float]:
    """{"sql": 0.05} of ["sql=0.05"]; MixError names the entry."""
    limits: dict[str, float] = {}
    for entry in entries:
        name, equals, text = entry.rpartition("=")
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not equals or not name or not 0 <= value <= 1:
            raise MixError(f"{option} {entry}", where="command line", do=f"{option} NAME=SHARE with 0 <= SHARE <= 1")
        if name in limits:
            raise MixError(f"{option} {name} twice", where="command line", do="give each task one limit")
        limits[name] = value
    return limits


def large_runs(
    fits: Fits, mixtures_csv: str | Path, scores_csv: str | Path, *, index: str | None = None, goal: str = "min"
) -> ScaledFits:
    """The fits, mapped to the scale of the runs in two CSV files (same tasks; every target of the fits)."""
    ledger = TrialLedger.from_csv(mixtures_csv, scores_csv, index, goal)
    check_names(ledger.names, fits.names, where=str(mixtures_csv))
    missing = [target for target in fits.targets if target not in ledger.targets]
    if missing:
        raise MixError(f"no column {', '.join(missing)}", where=str(scores_csv), do="the large runs need every target")
    columns = [ledger.to_arrays(target) for target in fits.targets]
    if len({len(column.y) for column in columns}) > 1:
        raise MixError("blank scores among the large runs", where=str(scores_csv), do="leave such runs out")
    order = [ledger.names.index(name) for name in fits.names]
    return calibrate(fits, columns[0].X[:, order], np.stack([column.y for column in columns]))


@dataclass(frozen=True)
class Limits:
    """What `mtft mix propose` takes beside the trials: shares by task name, and epoch caps."""

    caps: Mapping[str, float]
    floors: Mapping[str, float]
    max_epochs: float | None = None
    sizes: Mapping[str, float] | None = None
    total: float | None = None

    def bounds(self, names: tuple[str, ...]) -> Bounds:
        """Bounds over the tasks of the trials; MixError names an unknown task or what is missing for epoch caps."""
        for option, limits in (("--cap", self.caps), ("--floor", self.floors)):
            unknown = [name for name in limits if name not in names]
            if unknown:
                check_names([*names, *unknown], names, where=f"command line, {option}")
        if self.max_epochs is not None and (self.sizes is None or self.total is None):
            raise MixError("--max-epochs needs --sizes and --total", where="command line", do="give both")
        return Bounds(
            floors=self.floors,
            caps=self.caps,
            max_epochs={} if self.max_epochs is None else self.max_epochs,
            sizes=self.sizes,
            total=self.total,
            names=names,
        )


def propose_from(
    fits: Fits,
    *,
    objective: Objective = "mean",
    limits: Limits,
    prior: str | Path | None = None,
    current: str | Path | None = None,
    kl: float = 0.05,
    min_gain: float = 0.0,
    level: float = 0.9,
    seed: int = 0,
) -> Proposal:
    """The proposal for fitted trials. prior: file of shares (default: uniform); current: file of shares, what the
    proposal has to beat (default: the prior)."""
    start = uniform(fits.names) if prior is None else read_mixture(prior, fits.names)
    playing = start if current is None else read_mixture(current, fits.names)
    bounds = limits.bounds(fits.names)
    return propose(
        fits, objective, bounds, prior=start, current=playing, kl=kl, level=level, min_gain=min_gain, seed=seed
    )


def read_sizes(path: str | Path, names: Sequence[str]) -> dict[str, float]:
    """{task: rows (or tokens)} from a CSV or YAML file."""
    from .tables import read_shares_csv, read_shares_yaml

    reader = read_shares_csv if Path(path).suffix.lower() in (".csv", ".tsv", ".txt") else read_shares_yaml
    pairs = reader(path)
    check_names([name for name, _ in pairs], names, where=str(path))
    return dict(pairs)


def say_few(fits: Fits) -> None:
    """A warning where the trials are too few for what is said about them."""
    n, K = min(len(fitted.arrays.y) for fitted in fits.targets.values()), len(fits.names)
    if n < FEW:
        warnings.warn(
            f"{n} trials of {K} tasks: intervals rest on very little; a useful fit needs about {3 * (K + 1)}",
            stacklevel=2,
        )
