"""TrialLedger: what has been tried. JSON lines, append-only; survives kill -9 at any moment.

One line per (trial, progress). All lines of a trial are appended under a file lock with one write and one fsync; each
says how many belong to the trial (`points`), so that a half-written trial is not taken for a whole one. A torn last
line that begins as ours do is ignored with a warning and cut off at the next append; any other, and a torn line in the
middle, is an error with its number.
Same (trial, progress) twice: the later one counts. A non-finite score is kept as null, counted, and never fitted.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from data_mixers.common.csv_tables import check_rows, join, read_table
from data_mixers.common.errors import MixError
from data_mixers.mixture.mixture import SUM_TOLERANCE, Floats
from data_mixers.sweep.trial import VERSION, Goal, TrialRecord, defect, finite

BEGIN = b'{"trial": '  # of every line


class Arrays(NamedTuple):
    """Trials as arrays: shares X [n, K], score y [n], group [n] (equal: same mixture), progress [n]."""

    X: Floats
    y: Floats
    groups: NDArray[np.int64]
    progress: Floats


class TrialLedger:
    """The ledger at `path` (created at the first append), or one in memory (`path` None)."""

    def __init__(self, path: str | Path | None = None, records: Iterable[TrialRecord] = ()) -> None:
        self.path = None if path is None else Path(path)
        self.source = "ledger"  # how errors call one in memory
        self._records = list(records)
        self._read()

    def _read(self) -> None:
        """Take in the file anew; nothing to do in memory, or before the first append."""
        if self.path is None or not os.path.lexists(self.path):
            return
        lines = self._content(self.path).split(b"\n")
        records = [self._parse(line, number) for number, line in enumerate(lines[:-1], 1) if line.strip()]
        if (torn := lines[-1].strip(b"\0"))[: len(BEGIN)] != BEGIN[: len(torn)]:  # it would be cut off
            where, do = f"{self.path}:{len(lines)}", "mend or delete the line, or move the file"
            raise MixError("the last line, without an end, is none of a trial ledger", where=where, do=do)
        if lines[-1]:
            warnings.warn(f"{self.path}: the last line is torn (a writer was killed); it is ignored", stacklevel=3)
        self._records = records

    @staticmethod
    def _content(path: Path) -> bytes:
        """The file's bytes. MixError for what is no plain file (it is never opened) or can't be read."""
        do = "give the file of a sweep's trials"
        if not path.is_file():
            raise MixError(f"{'a folder' if path.is_dir() else 'no plain file'}, not a ledger", where=str(path), do=do)
        try:
            return path.read_bytes()
        except OSError as error:
            raise MixError(f"can't be read: {error.strerror}", where=str(path), do=do) from error

    def _parse(self, line: bytes, number: int) -> TrialRecord:
        where = f"{self.path}:{number}"
        try:
            content = json.loads(line)
        except (ValueError, RecursionError) as error:
            problem = "nested too deeply" if isinstance(error, RecursionError) else f"not valid JSON ({error})"
        else:
            problem = defect(content)
            if problem is None and content["v"] > VERSION:
                newer = f"written by a newer version of mtft (v {content['v']}, this one reads {VERSION})"
                raise MixError(newer, where=where, do="pip install -U mtft")
        if problem is not None:
            raise MixError(f"damaged line of a trial ledger: {problem}", where=where, do="mend or delete the line")
        known = {item.name for item in fields(TrialRecord)}
        return TrialRecord(**{key: value for key, value in content.items() if key in known})

    def append(self, records: Sequence[TrialRecord]) -> None:
        """Add the lines of one trial: one write, one fsync, under a lock. Cuts a torn tail first."""
        if self.path is None:
            self._records += records
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.path.with_name(self.path.name + ".append.lock"))
        with lock, open(self.path, "a+b") as file:
            file.seek(0)
            data = file.read()
            file.truncate(data.rfind(b"\n") + 1)
            file.seek(0, os.SEEK_END)
            file.write("".join(record.line() + "\n" for record in records).encode())
            file.flush()
            os.fsync(file.fileno())
        self._read()

    @property
    def records(self) -> list[TrialRecord]:
        """Done lines of whole trials, the later of two for the same (trial, progress), in order of first appearance."""
        whole = self.done
        done = (record for record in self._records if record.status == "done" and record.trial in whole)
        return list({(record.trial, record.progress): record for record in done}.values())

    @property
    def done(self) -> set[str]:
        """Ids of trials with all their points."""
        points: dict[str, set[float]] = {}
        wanted: dict[str, int] = {}
        for record in self._records:
            if record.status == "done":
                points.setdefault(record.trial, set()).add(record.progress)
                wanted[record.trial] = record.points
        return {trial for trial, seen in points.items() if len(seen) >= wanted[trial]}

    @property
    def failed(self) -> dict[str, TrialRecord]:
        """Last failure of each trial that has not been finished since."""
        whole = self.done
        return {r.trial: r for r in self._records if r.status == "failed" and r.trial not in whole}

    @property
    def names(self) -> tuple[str, ...]:
        """Tasks, in the first record's order; a task that only later records know comes last."""
        return tuple(dict.fromkeys(name for record in self.records for name in record.mixture))

    @property
    def targets(self) -> tuple[str, ...]:
        """All scores that any trial has."""
        return tuple(dict.fromkeys(name for record in self.records for name in record.scores))

    def goal(self, target: str) -> Goal:
        """min or max; min where no record says (a name that ends in accuracy, match, f1 or score counts as max)."""
        for record in self.records:
            if target in record.goal:
                return "max" if record.goal[target] == "max" else "min"
        return "max" if target.lower().endswith(("accuracy", "match", "f1", "score")) else "min"

    def nulls(self, target: str) -> int:
        """Trials whose score is null (diverged runs)."""
        return sum(record.scores.get(target, 0.0) is None for record in self.records)

    def to_arrays(self, target: str, *, mixed_config: bool = False) -> Arrays:
        """The trials that have a finite `target`. Error: unknown target; several configs, unless allowed."""
        if target not in self.targets:
            raise MixError(
                f"no trial has a score {target!r}",
                where=str(self.path or self.source),
                do=f"scores: {', '.join(self.targets)}",
            )
        used = [record for record in self.records if record.scores.get(target) is not None]
        if not used:
            raise MixError(
                f"no trial has a finite {target!r}: all {self.nulls(target)} are empty, NaN or infinite",
                where=str(self.path or self.source),
                do="leave that target out, or run the trials again",
            )
        recipes = len({record.config for record in used})
        if recipes > 1 and not mixed_config:
            raise MixError(
                f"the trials come from {recipes} different recipes",
                where=str(self.path or self.source),
                do="start another ledger, or allow it (mixed_config=True)",
            )
        names = self.names
        X = np.array([[record.mixture.get(name, 0.0) for name in names] for record in used], dtype=np.float64)
        X = X.reshape(-1, len(names))
        return Arrays(
            X,
            np.array([float(score) for record in used if (score := record.scores[target]) is not None]),
            group_rows(X),
            np.array([float(record.progress) for record in used]),
        )

    def limited(self, n: int) -> TrialLedger:
        """The first n trials, in memory."""
        keep = set(list(dict.fromkeys(record.trial for record in self.records))[:n])
        limited = TrialLedger(None, [record for record in self.records if record.trial in keep])
        limited.source = str(self.path or self.source)
        return limited

    @classmethod
    def from_csv(
        cls,
        mixtures: str | Path,
        scores: str | Path,
        index: str | None = None,
        goal: Mapping[str, str] | Goal | None = None,
    ) -> TrialLedger:
        """Bring your own trials: two CSV files joined on `index`. Shares are kept as they stand in the file.

        A column `progress` in the scores is taken as such; a blank score is null. Errors say file, row and column.
        """
        left, right = read_table(mixtures, index), read_table(scores, index, blank=True)
        keys, X, Y = join(left, right)
        check_rows(left, SUM_TOLERANCE)
        targets = [name for name in right.columns if name != "progress"]
        if not targets:
            raise MixError("no score columns", where=str(scores))
        if isinstance(goal, str):
            goal = dict.fromkeys(targets, goal)
        records = []
        for key, shares, values in zip(keys, X, Y, strict=True):
            row = dict(zip(right.columns, values, strict=True))
            records.append(
                TrialRecord(
                    trial=key,
                    status="done",
                    mixture=dict(zip(left.columns, shares.tolist(), strict=True)),
                    progress=float(row.get("progress", 1.0)),
                    scores={name: finite(row[name]) for name in targets},
                    goal=dict(goal or {}),
                )
            )
        ledger = cls(None, records)
        ledger.source = str(scores)
        return ledger


def group_rows(X: Floats) -> NDArray[np.int64]:
    """Group number [n] of each row: equal rows (to 1e-9) share one."""
    _, groups = np.unique(np.round(X, 9), axis=0, return_inverse=True)
    return groups.reshape(-1).astype(np.int64)
