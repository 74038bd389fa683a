"""The trials of a search for merge weights: evaluated once each, scored, and written down at once."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mtft.common.errors import MergeError
from mtft.common.own_files import read_own_lines
from mtft.merge.search.retention import RetentionScores

Evaluate = Callable[[Sequence[float]], Mapping[str, "float | RetentionScores"]]
"""weights [K] -> {task: loss}, or {task: per-example scores}, which alone can say how sure a difference is."""


@dataclass(frozen=True)
class SearchTrial:
    weights: tuple[float, ...]
    losses: dict[str, float]
    objective: float


@dataclass
class SearchLedger:
    """All trials: evaluated once, written down at once.

    path: a JSONL file, one line a trial; what it holds already is not evaluated again. worst, prefer: of the
    objective. penalty: added to it, times mean |w|. auxiliary: tasks that are not in it, unless `prefer` names them.
    """

    names: list[str]
    evaluate: Evaluate
    base: Mapping[str, float] | None
    single: Mapping[str, float] | None
    worst: float
    penalty: float
    prefer: Mapping[str, float] | None
    path: Path | None
    auxiliary: Sequence[str] = ()

    def __post_init__(self) -> None:
        self._known: dict[tuple[float, ...], dict[str, float]] = {}
        self.trials: list[SearchTrial] = []
        if self.path and self.path.exists():
            self._read(self.path)

    def trial(self, weights: Sequence[float]) -> SearchTrial:
        key = tuple(float(w) for w in weights)
        if key not in self._known:
            losses = {task: loss_of(value) for task, value in self.evaluate(key).items()}
            if not losses or not all(map(math.isfinite, losses.values())):
                raise MergeError(f"losses at weights {list(key)} are {losses}", where="search", do="check the data")
            self._known[key] = losses
            self._write(key, losses)
        losses = self._known[key]
        made = SearchTrial(key, losses, self.objective(losses) + self.penalty * float(np.mean(np.abs(key))))
        if made not in self.trials:
            self.trials.append(made)
        return made

    def best(self, *, common: bool = False) -> SearchTrial:
        """The trial of the lowest objective; common: of those with one weight for all."""
        return min((t for t in self.trials if not common or len(set(t.weights)) == 1), key=lambda t: t.objective)

    def objective(self, losses: Mapping[str, float]) -> float:
        shares = self._shares(losses)
        if self.prefer:
            shares = {task: share for task, share in shares.items() if self.prefer.get(task, 0) > 0}
            if not shares:
                known = ", ".join(losses)
                raise MergeError("no preferred task can be compared", where="prefer", do=f"name tasks of {known}")
        elif self.auxiliary:
            shares = {task: share for task, share in shares.items() if task not in self.auxiliary}
            if not shares:
                do = "give a task that is not auxiliary eval_data and an expert that learns, or name tasks in prefer"
                raise MergeError("no task that counts can be compared", where="search", do=do)
        values = list(shares.values())
        weights = [self.prefer[task] for task in shares] if self.prefer else None
        return float(np.average(values, weights=weights) + self.worst * np.max(values))

    def _shares(self, losses: Mapping[str, float]) -> dict[str, float]:
        if self.base is None or self.single is None:
            return dict(losses)
        gaps = {task: self.base[task] - self.single[task] for task in losses if task in self.single}
        learnt = [task for task, gap in gaps.items() if gap > 0]
        if not learnt:
            do = "train the experts longer, or search without base and single"
            raise MergeError("no expert is better than the base", where="search", do=do)
        return {task: (losses[task] - self.single[task]) / gaps[task] for task in learnt}

    def _write(self, key: tuple[float, ...], losses: Mapping[str, float]) -> None:
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"adapters": self.names, "weights": key, "losses": losses}) + "\n")

    def _read(self, path: Path) -> None:
        do = "delete it: the trials are made again"
        read = read_own_lines(path, {"adapters": list, "weights": list, "losses": dict}, do=do)
        if read.torn:  # a killed run left half a line: don't write on it
            with path.open("ab") as file:
                file.write(b"\n")
        problems = list(read.problems)
        for number, row in zip(read.numbers, read.rows, strict=True):
            if row["adapters"] != self.names:
                where = f"{path}, line {number}"
                raise MergeError("the ledger belongs to other adapters", where=where, do="choose another file")
            numbers = [*row["weights"], *row["losses"].values()]
            if not all(isinstance(value, int | float) and math.isfinite(value) for value in numbers):
                problems.append(f"line {number}: a weight or a loss is no number")
                continue
            self._known[tuple(map(float, row["weights"]))] = {t: float(loss) for t, loss in row["losses"].items()}
        if problems:
            more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
            what = f"{path}: trials that can't be read are made again: {'; '.join(problems[:3])}{more}"
            warnings.warn(what, stacklevel=3)


def loss_of(value) -> float:
    """A loss, or the loss of per-example scores."""
    if isinstance(value, int | float | np.floating):
        return float(value)
    return float(value.nll_N.sum() / value.tokens_N.sum())
