"""The process backend of run_sweep: a few spawned workers, each given one trial after the other.

A worker that dies (killed, out of memory, segfault) or runs out of time costs one attempt of its trial and is replaced.
Workers end with their driver, however it ends: each watches its parent.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import threading
import time
import traceback
from collections import deque
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnContext
from multiprocessing.reduction import ForkingPickler

from data_mixers.common.errors import MixError
from data_mixers.common.spawn_context import spawn_context
from data_mixers.sweep.trial import Finish, RunTrial, Trial, TrialOutcome


def attempt(run_trial: RunTrial, trial: Trial) -> TrialOutcome:
    """Run a trial once; an exception becomes an error text (type, message, last lines of the trace)."""
    started = time.monotonic()
    try:
        points = [(float(progress), {k: float(v) for k, v in scores.items()}) for progress, scores in run_trial(trial)]
        if not points or len(dict(points)) < len(points):
            raise ValueError(
                f"run_trial returned {len(points)} points; at least one, each with its own progress, is needed"
            )
    except Exception as error:  # noqa: BLE001 - whatever a training run raises is this trial's failure, not the sweep's
        last = "".join(traceback.format_exception(error)[-4:])[-2000:]
        return TrialOutcome(None, f"{type(error).__name__}: {error}\n{last}", time.monotonic() - started)
    return TrialOutcome(points, None, time.monotonic() - started)


def _work(connection: Connection, run_trial: RunTrial) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    while True:
        try:
            trial = connection.recv()
        except EOFError:
            return
        if trial is None:
            return
        connection.send(attempt(run_trial, trial))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


class _Worker:
    def __init__(self, context: SpawnContext, run_trial: RunTrial) -> None:
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, run_trial), daemon=True)
        self.process.start()
        theirs.close()
        self.trial: Trial | None = None
        self.started = 0.0

    def give(self, trial: Trial) -> None:
        self.trial, self.started = trial, time.monotonic()
        self.connection.send(trial)

    def stop(self) -> int | None:
        self.connection.close()
        if self.trial is not None:
            self.process.kill()
        self.process.join()
        return self.process.exitcode


def run_in_processes(
    todo: list[Trial], run_trial: RunTrial, finish: Finish, workers: int, timeout: float | None
) -> None:
    """Run the trials; `finish(trial, outcome)` returns True to have a trial tried again."""
    if not todo:
        return
    try:
        ForkingPickler.dumps(run_trial)  # as a worker's start does it, but before any worker is started
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise MixError(
            f"run_trial cannot be sent to a worker process: {error}",
            do="make it a function of a module (or functools.partial of one), or use backend='inline'",
        ) from error
    context = spawn_context(run_trial)
    queue, pool = deque(todo), [_Worker(context, run_trial) for _ in range(min(workers, len(todo)))]

    def settle(worker: _Worker, outcome: TrialOutcome) -> None:
        trial, worker.trial = worker.trial, None
        if trial is not None and finish(trial, outcome):
            queue.append(trial)

    try:
        while queue or any(worker.trial is not None for worker in pool):
            for position, worker in enumerate(pool):
                if worker.trial is None and queue:
                    if not worker.process.is_alive():  # killed while idle: nothing is lost
                        worker.stop()
                        pool[position] = worker = _Worker(context, run_trial)
                    worker.give(queue.popleft())
            busy = [worker for worker in pool if worker.trial is not None]
            left = None
            if timeout is not None:
                left = max(0.0, min(w.started + timeout for w in busy) - time.monotonic()) + 0.01
            wait([w.connection for w in busy], left)
            for position, worker in enumerate(pool):
                if worker.trial is None:
                    continue
                seconds = time.monotonic() - worker.started
                if worker.connection.poll():
                    try:
                        settle(worker, worker.connection.recv())
                        continue
                    except (EOFError, ConnectionError):
                        code = worker.stop()
                        how = f"killed by signal {-code}" if code and code < 0 else f"exit code {code}"
                        error = f"WorkerDied: {how}"
                elif timeout is not None and seconds > timeout:
                    error = f"TimeoutError: longer than {timeout:g} s"
                    worker.stop()
                else:
                    continue
                settle(worker, TrialOutcome(None, f"{error} after {seconds:.1f} s in trial {worker.trial.id}", seconds))
                pool[position] = _Worker(context, run_trial)
    finally:
        for worker in pool:
            worker.stop()
