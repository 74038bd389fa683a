"""The Ray backend of run_sweep: one task per trial, at most `workers` at the same time. Ray is imported here only."""

from __future__ import annotations

import os
import time
from collections import deque

from data_mixers.common.errors import optional_package
from data_mixers.sweep.process_pool import attempt
from data_mixers.sweep.trial import Finish, RunTrial, Trial, TrialOutcome


def run_on_ray(todo: list[Trial], run_trial: RunTrial, finish: Finish, workers: int, timeout: float | None) -> None:
    """As run_in_processes. Joins the cluster of RAY_ADDRESS (or one that is initialised), else starts a local one."""
    ray = optional_package("ray", "Ray", where="sweep.backend: ray", install="'mtft[ray]'")
    if not todo:
        return
    ours = not ray.is_initialized()
    if ours:
        address = os.environ.get("RAY_ADDRESS")
        local = {} if address else {"num_cpus": workers, "include_dashboard": False}
        ray.init(address=address, log_to_driver=False, configure_logging=False, **local)
    # max_calls=0: a worker process goes on to its next trial; retries are counted by the driver, not by Ray.
    remote = ray.remote(num_cpus=1, max_retries=0)(attempt)
    queue, running = deque(todo), {}
    try:
        while queue or running:
            while queue and len(running) < workers:
                trial = queue.popleft()
                running[remote.remote(run_trial, trial)] = (trial, time.monotonic())
            ready, _ = ray.wait(list(running), num_returns=1, timeout=0.2 if timeout is not None else None)
            late = [ref for ref, (_, at) in running.items() if timeout is not None and time.monotonic() - at > timeout]
            for ref in [*ready, *(ref for ref in late if ref not in ready)]:
                trial, at = running.pop(ref)
                seconds = time.monotonic() - at
                if ref in ready:
                    try:
                        [outcome] = ray.get([ref])
                    except ray.exceptions.RayError as error:
                        outcome = TrialOutcome(None, f"{type(error).__name__}: {str(error)[-500:]}", seconds)
                else:
                    ray.cancel(ref, force=True)
                    outcome = TrialOutcome(None, f"TimeoutError: longer than {timeout:g} s", seconds)
                if finish(trial, outcome):
                    queue.append(trial)
    finally:
        if ours:
            ray.shutdown()
