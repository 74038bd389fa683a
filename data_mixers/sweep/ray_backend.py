"""The Ray backend of run_sweep: one task per trial, at most `workers` at the same time. Ray is imported here only.

Ray shows a task the GPUs that it holds for it; one that asks for none sees them all. So a trial asks for one where the
cluster has GPUs, if nothing else was said.
"""

from __future__ import annotations

import time
import warnings
from collections import deque
from typing import Any

from data_mixers.common.errors import MixError, optional_package
from data_mixers.common.ray_session import ray_session
from data_mixers.sweep.process_pool import attempt
from data_mixers.sweep.trial import Finish, RunTrial, Trial, TrialOutcome


def run_on_ray(
    todo: list[Trial],
    run_trial: RunTrial,
    finish: Finish,
    workers: int,
    timeout: float | None,
    cpus: int = 1,
    gpus: float | None = None,
) -> None:
    """As run_in_processes. Joins the cluster of RAY_ADDRESS (or one that is initialised), else starts a local one.

    cpus, gpus: what Ray holds for each trial; gpus None: one, where the cluster has any.
    """
    ray = optional_package("ray", "Ray", where="sweep.backend: ray", install="'mtft[ray]'")
    if not todo:
        return
    queue, running = deque(todo), {}
    with ray_session(ray, workers * cpus, where="sweep.backend: ray") as grows:
        if gpus is None:
            gpus = min(1, ray.cluster_resources().get("GPU", 0))
        _check_room(ray, cpus, gpus, grows=grows)
        # max_calls=0: a worker process goes on to its next trial; retries are counted by the driver, not by Ray.
        remote = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=0)(attempt)
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


def _check_room(ray: Any, cpus: int, gpus: float, *, grows: bool) -> None:
    """A trial that no machine has room for, which Ray would wait with: said, or refused where no machine can join."""
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if any(node.get("CPU", 0) >= cpus and node.get("GPU", 0) >= gpus for node in alive):
        return
    what = f"no machine of the Ray cluster has {cpus} CPUs and {gpus:g} GPUs, which a trial asks for"
    if not grows:
        raise MixError(what, where="sweep.resources", do="ask for less, or set RAY_ADDRESS to a cluster that has them")
    warnings.warn(f"{what}: trials wait until one joins (sweep.resources)", stacklevel=3)
