"""run_sweep: make trials, in worker processes or on a Ray cluster, and write each result to the ledger once.

Contract: `run_trial(trial) -> [(progress, {target: score}), ...]` is a picklable function that knows nothing of the
ledger; only this driver writes. Done trials are skipped by id, so the same call after kill -9 goes on where it was. A
trial that crashes, is killed or takes too long leaves a `failed` line and the sweep goes on; failed trials are tried
again by the next call. A run that diverged (non-finite score) is a result, not a failure.
The order is shuffled by seed, so that an interrupted sweep is still a fair sample of the design.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from filelock import FileLock, Timeout

from data_mixers.common.errors import MixError
from data_mixers.mixture.mixture import Mixture
from data_mixers.sweep.early_termination import EarlyTermination, StopRule, learn_stop_rule
from data_mixers.sweep.ledger import TrialLedger
from data_mixers.sweep.process_pool import attempt, run_in_processes
from data_mixers.sweep.ray_backend import run_on_ray
from data_mixers.sweep.trial import Finish, RunTrial, Trial, TrialOutcome, done_records, failed_record

SEEDS = 2**32  # numpy's and torch's generators take smaller ones


@dataclass
class SweepResult:
    """What a sweep did: ids of trials. `exit_code` is 1 where any failed."""

    done: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    stopped: list[str] = field(default_factory=list)  # of those done: given up as hopeless
    seconds: float = 0.0

    @property
    def exit_code(self) -> int:
        return 1 if self.failed else 0

    def text(self) -> str:
        """A line of counts, and one line for each cause of failures."""
        lines = [
            f"{len(self.done)} trials run{f' ({len(self.stopped)} given up early)' if self.stopped else ''}, "
            f"{len(self.skipped)} were there already, {len(self.failed)} failed ({self.seconds:.0f} s)"
        ]
        causes: dict[str, list[str]] = {}
        for trial, error in self.failed.items():
            causes.setdefault(first_line(error), []).append(trial)
        for cause, trials in causes.items():
            more = f", ... ({len(trials)} trials)" if len(trials) > 3 else ""
            lines.append(f"  {', '.join(trials[:3])}{more}  {cause}")
        return "\n".join(lines)


def first_line(error: str | None) -> str:
    """What went wrong with a trial, without its trace."""
    return error.strip().splitlines()[0] if error and error.strip() else ""


def make_trials(names: Sequence[str], shares: Any, *, seed: int = 0, **common: Any) -> list[Trial]:
    """Trials from the rows of a design [n, K]. Equal rows get different seeds: repeats, which measure noise."""
    rows = np.asarray(shares, dtype=np.float64)
    seen: dict[bytes, int] = {}
    trials = []
    for row in rows:
        repeat = seen[row.tobytes()] = seen.get(row.tobytes(), -1) + 1
        trials.append(Trial(Mixture(tuple(names), row / row.sum()), seed=(seed + repeat) % SEEDS, **common))
    return trials


def run_sweep(
    trials: Sequence[Trial],
    run_trial: RunTrial,
    ledger: TrialLedger,
    *,
    workers: int = 1,
    backend: Literal["process", "ray", "inline"] = "process",
    retries: int = 1,
    timeout: float | None = None,
    seed: int = 0,
    on_done: Callable[[Trial, TrialOutcome], None] | None = None,
    stopping: EarlyTermination | None = None,
    cpus: int = 1,
    gpus: float | None = None,
) -> SweepResult:
    """Run what the ledger does not have yet.

    workers: trials at the same time, one process (or Ray task) each; a worker process is kept for its next trial.
    backend: "process" (spawned), "ray" (extra `ray`; joins RAY_ADDRESS or starts a local one), "inline" (in this
    process: no timeout, and a crash takes the driver with it).
    retries: further attempts within this call. timeout: seconds for one attempt. on_done: called after each trial, for
    progress bars. stopping: give up hopeless trials (early_termination.py): the first `reference` trials of the order
    run to the end, the others get what those say as `run_trial(trial, stop=StopRule)` and may return early, with a last
    progress below 1. cpus, gpus: what Ray holds for each trial; gpus None: one, where the cluster has any.
    """
    if backend not in BACKENDS:
        raise MixError(f"sweep backend {backend!r}", where="sweep.backend", do="process, ray or inline")
    if workers < 1 or retries < 0:
        raise MixError(f"workers {workers}, retries {retries}", do="workers >= 1, retries >= 0")
    unique = {trial.id: trial for trial in trials}
    started = time.monotonic()
    with _only_driver(ledger.path):
        ledger._read()
        done = ledger.done
        result = SweepResult(skipped=[trial_id for trial_id in unique if trial_id in done])
        order = list(unique.values())
        random.Random(seed).shuffle(order)  # all of them, so that a restart has the same order
        todo = [trial for trial in order if trial.id not in done]
        attempts = dict.fromkeys(unique, 0)

        def finish(trial: Trial, outcome: TrialOutcome) -> bool:
            """Write the outcome; True: try again."""
            attempts[trial.id] += 1
            if outcome.points is None and attempts[trial.id] <= retries:
                return True
            if outcome.points is None:
                ledger.append([failed_record(trial, outcome.error or "", outcome.seconds)])
                result.failed[trial.id] = outcome.error or ""
            else:
                ledger.append(done_records(trial, outcome.points, outcome.seconds))
                result.done.append(trial.id)
                if outcome.points[-1][0] < 1 - 1e-9:
                    result.stopped.append(trial.id)
            if on_done is not None:
                on_done(trial, outcome)
            return False

        run = partial(run_on_ray, cpus=cpus, gpus=gpus) if backend == "ray" else BACKENDS[backend]
        if stopping is None:
            run(todo, run_trial, finish, workers, timeout)
        else:
            first = {trial.id for trial in order[: stopping.reference]}
            run([trial for trial in todo if trial.id in first], run_trial, finish, workers, timeout)
            later = [trial for trial in todo if trial.id not in first]
            run(later, partial(run_trial, stop=_rule(ledger, order, first)), finish, workers, timeout)
    result.seconds = time.monotonic() - started
    return result


def _rule(ledger: TrialLedger, order: Sequence[Trial], first: set[str]) -> StopRule | None:
    """What the reference trials in the ledger say; the goals are those of the first trial."""
    points: dict[str, list[tuple[float, Mapping[str, float | None]]]] = {}
    for record in ledger.records:
        if record.trial in first:
            points.setdefault(record.trial, []).append((record.progress, record.scores))
    return learn_stop_rule([points[trial.id] for trial in order if trial.id in points], order[0].goal)


def _run_inline(todo: list[Trial], run_trial: RunTrial, finish: Finish, workers: int, timeout: float | None) -> None:
    if timeout is not None or workers > 1:
        raise MixError("the inline backend has one worker and no timeout", where="sweep.backend", do="backend: process")
    for trial in todo:
        while finish(trial, attempt(run_trial, trial)):
            pass


BACKENDS = {"process": run_in_processes, "ray": run_on_ray, "inline": _run_inline}


@contextmanager
def _only_driver(path: Path | None) -> Iterator[None]:
    """One driver per ledger: a second one is refused instead of running the same trials again."""
    if path is None:
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(path.with_name(path.name + ".lock"), timeout=0):
            yield
    except Timeout as error:
        raise MixError("another sweep is writing this ledger", where=str(path), do="wait for it, or stop it") from error
