"""Bring your own trials: CSV files in, a mixture out (`mtft mix fit` and `mtft mix propose` without a recipe).

Trials of one scale are fitted as they are. Is the mixture meant for runs of another scale (a larger model, a longer
run), say so: with a few large runs the small-scale predictions are mapped to theirs (scale_transfer.py), without any a
law is taken for each target whose small trials it ranks.
"""

from __future__ import annotations

import csv
import io
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from data_mixers.common.csv_tables import CsvTable, check_rows, read_shares_csv, read_shares_yaml, read_table
from data_mixers.common.errors import MixError
from data_mixers.fitting.logit_link import ScoreBounds
from data_mixers.fitting.scale_transfer import ScaledFits, calibrate, for_mixtures, for_other_scale
from data_mixers.fitting.surrogate_fits import SurrogateFits, fit_surrogates
from data_mixers.mixture.bounds import Bounds
from data_mixers.mixture.mixture import SUM_TOLERANCE, Mixture, check_known, check_names, uniform
from data_mixers.propose.proposal import Proposal, propose_mixture
from data_mixers.surrogates.base import shares
from data_mixers.sweep.ledger import TrialLedger
from data_mixers.sweep.trial import Goal


def read_mixture(path: str | Path, names: Sequence[str]) -> Mixture:
    """A mixture of the tasks `names` from a CSV, YAML or JSON file."""
    return (Mixture.from_csv if is_csv(path) else Mixture.from_yaml)(path, names)


def is_csv(path: str | Path) -> bool:
    return Path(path).suffix.lower() in (".csv", ".tsv", ".txt")


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


LARGEST_BOUND = 1e12


def parse_bounds(entries: Sequence[str], targets: Sequence[str]) -> dict[str, ScoreBounds]:
    """{target: (low, high)} of ["0,1"] (every target) or ["bleu=0,100"], which goes before. MixError names the entry.

    Both ends, since a score with one end has no link.
    """
    every: dict[str, ScoreBounds] = {}
    own: dict[str, ScoreBounds] = {}
    for entry in entries:
        name, equals, text = entry.rpartition("=")
        ends = text.split(",")
        try:
            low, high = map(float, ends)
        except ValueError:  # no number, or not two of them
            low = high = math.nan
        if not -LARGEST_BOUND <= low < high <= LARGEST_BOUND:
            what = f"--bounds {entry[:80]}: two numbers from {-LARGEST_BOUND:g} to {LARGEST_BOUND:g}, LOW below HIGH"
            do = "--bounds LOW,HIGH or --bounds TARGET=LOW,HIGH, as 0,1 or bleu=0,100"
            raise MixError(what, where="command line", do=do)
        if equals:
            check_known([name], targets, where="command line, --bounds", kind="target")
            own[name] = (low, high)
        else:
            every = dict.fromkeys(targets, (low, high))
    return every | own


def fit_csv(
    mixtures_csv: str | Path,
    scores_csv: str | Path,
    targets: Sequence[str] | Literal["all"] = "all",
    *,
    index: str | None = None,
    goal: Mapping[str, Goal] | Goal | None = "min",
    other_scale: bool = False,
    bounds: Sequence[str] = (),
    **options: Any,
) -> SurrogateFits:
    """fit_surrogates (`options`: its) on trials from two CSV files joined on `index` (see TrialLedger.from_csv).
    other_scale: the fits are to rank runs of another scale than the trials' (for_other_scale: a law instead of the
    stack, where it may be taken). bounds: of the scores, as `parse_bounds` reads them."""
    ledger = TrialLedger.from_csv(mixtures_csv, scores_csv, index, goal)
    if targets != "all":
        check_known(targets, ledger.targets, where=str(scores_csv), kind="target")
    limits = parse_bounds(bounds, ledger.targets if targets == "all" else targets)
    fits = fit_surrogates(ledger, targets, goal=goal, bounds=limits, **options)
    return for_other_scale(fits) if other_scale else fits


def mixtures_to_predict(path: str | Path, names: Sequence[str], *, index: str | None = None) -> CsvTable:
    """The mixtures of a CSV over the tasks `names` (in the file's order), each row checked."""
    table = read_table(path, index)
    check_names(table.columns, names, where=str(path))
    check_rows(table, SUM_TOLERANCE)
    return table


def predict_csv(
    fits: SurrogateFits | ScaledFits,
    mixtures_csv: str | Path,
    out_csv: str | Path,
    *,
    index: str | None = None,
    level: float = 0.9,
    scale: Literal["auto", "as_fitted"] = "as_fitted",
) -> int:
    """Predict the rows of a mixtures CSV; write `index, <target>, <target>_lower, <target>_upper`. Returns the rows.
    Cells of a target of which nothing can be said are empty, with a warning; MixError where it is every target.

    scale: "auto" looks at how the mixtures are drawn (for_mixtures); "as_fitted" takes the fits as they are,
    as do fits that are mapped to large runs.
    """
    if fits.unsaid is not None:
        raise MixError(fits.unsaid, where=str(out_csv), do="run more trials; no prediction was written")
    unsaid = {name: fitted.unsaid for name, fitted in fits.targets.items() if fitted.unsaid is not None}
    for name, why in unsaid.items():
        warnings.warn(f"{name}: {why}; its cells are empty", stacklevel=2)
    table = mixtures_to_predict(mixtures_csv, fits.names, index=index)
    rows = table.values[:, [table.columns.index(name) for name in fits.names]]
    rows = shares(rows, renormalize=False)
    if scale == "auto" and isinstance(fits, SurrogateFits):
        fits = for_mixtures(fits, rows, where=str(mixtures_csv))
    predictions = fits.predict(rows, level=level)
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow([table.index_name, *(name + end for name in fits.targets for end in ("", "_lower", "_upper"))])
    for position, key in enumerate(table.index):
        cells: list[Any] = [key]
        for name, prediction in predictions.items():
            cells += ["" if name in unsaid else repr(float(column[position])) for column in prediction]
        writer.writerow(cells)
    out = Path(out_csv)
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = out.with_name(f".{out.name}.{os.getpid()}.part")  # whole or not at all
    aside.write_bytes(text.getvalue().encode())
    aside.replace(out)
    return len(rows)


def large_runs(
    fits: SurrogateFits,
    mixtures_csv: str | Path,
    scores_csv: str | Path,
    *,
    index: str | None = None,
    goal: Goal = "min",
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
class ShareLimits:
    """What `mtft mix propose` takes beside the trials: shares by task name, and epoch caps."""

    caps: Mapping[str, float]
    floors: Mapping[str, float]
    max_epochs: float | None = None
    sizes: Mapping[str, float] | None = None
    total: float | None = None

    def bounds(self, names: tuple[str, ...]) -> Bounds:
        """Bounds over the tasks of the trials; MixError names an unknown task or what is missing for epoch caps."""
        check_known(self.caps, names, where="command line, --cap")
        check_known(self.floors, names, where="command line, --floor")
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
    fits: SurrogateFits,
    *,
    limits: ShareLimits,
    prior: str | Path | None = None,
    current: str | Path | None = None,
    **options: Any,
) -> Proposal:
    """propose_mixture (`options`: its) for fitted trials. prior: file of shares (default: uniform); current: file of
    shares, what the proposal has to beat (default: the prior)."""
    start = uniform(fits.names) if prior is None else read_mixture(prior, fits.names)
    playing = start if current is None else read_mixture(current, fits.names)
    return propose_mixture(fits, bounds=limits.bounds(fits.names), prior=start, current=playing, **options)


def read_sizes(path: str | Path, names: Sequence[str]) -> dict[str, float]:
    """{task: rows (or tokens)} from a CSV or YAML file."""
    pairs = (read_shares_csv if is_csv(path) else read_shares_yaml)(path)
    check_names([name for name, _ in pairs], names, where=str(path))
    return dict(pairs)


def warn_few_trials(fits: SurrogateFits) -> None:
    """A warning for each reason why nothing is predicted of some target."""
    for why in dict.fromkeys(fitted.too_few for fitted in fits.targets.values()):
        if why is not None:
            warnings.warn(f"{why}; no prediction and no interval is shown", stacklevel=2)
