"""What a sweep must survive: exceptions, killed workers, time limits, a killed driver, a second driver."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from data_mixers import MixError
from data_mixers.sweep import ray_backend
from data_mixers.sweep.ledger import TrialLedger
from data_mixers.sweep.runner import make_trials, run_sweep
from tests.data_mixers import toy_trials as toys

DRIVER = """
import sys
from functools import partial
from data_mixers.sweep.ledger import TrialLedger
from data_mixers.sweep.runner import run_sweep
from tests.data_mixers import toy_trials as toys

if __name__ == "__main__":
    run = partial(toys.count_runs, sys.argv[2])
    run_sweep(toys.toy_trials(), run, TrialLedger(sys.argv[1]), workers=int(sys.argv[3]))
"""


def scores(ledger):
    return {(r.trial, r.progress): r.scores for r in ledger.records}


@pytest.fixture
def inline(tmp_path):
    ledger = TrialLedger(tmp_path / "inline.jsonl")
    run_sweep(toys.toy_trials(), toys.score, ledger, backend="inline")
    return scores(ledger)


def test_processes_give_what_inline_gives_and_skip_what_stands(tmp_path, inline):
    ledger = TrialLedger(tmp_path / "l.jsonl")
    first = run_sweep(toys.toy_trials(), toys.score, ledger, workers=2)
    assert len(first.done) == 6
    assert scores(TrialLedger(ledger.path)) == inline
    before = ledger.path.read_bytes()
    again = run_sweep(toys.toy_trials(), toys.score, ledger, workers=2)
    assert (len(again.done), len(again.skipped), again.exit_code) == (0, 6, 0)
    assert ledger.path.read_bytes() == before


@pytest.mark.parametrize(
    ("run", "timeout", "says"),
    [
        (toys.breaks_on_two, None, "RuntimeError: no memory left"),
        (toys.dies_on_two, None, "killed by signal 9"),
        # a worker's start counts too, and machines are busy
        pytest.param(toys.hangs_on_two, 5.0, "TimeoutError", marks=pytest.mark.slow),
    ],
)
def test_a_broken_trial_is_recorded_and_the_sweep_goes_on(tmp_path, run, timeout, says):
    ledger = TrialLedger(tmp_path / "l.jsonl")
    result = run_sweep(toys.toy_trials(), run, ledger, workers=2, retries=0, timeout=timeout)
    assert result.exit_code == 1
    assert len(result.done) == 5
    (failed,) = TrialLedger(ledger.path).failed.values()
    assert says in failed.error
    assert says in result.text()
    mended = run_sweep(toys.toy_trials(), toys.score, ledger)
    assert len(mended.done) == 1
    assert ledger.failed == {}


def test_one_retry_within_the_call(tmp_path):
    ledger = TrialLedger(tmp_path / "l.jsonl")
    marks = tmp_path / "marks"
    marks.mkdir()
    result = run_sweep(toys.toy_trials(), partial(toys.breaks_once, marks), ledger, backend="inline")
    assert (len(result.done), result.exit_code) == (6, 0)
    assert all(json.loads(line)["status"] == "done" for line in ledger.path.read_text().splitlines())


def test_a_diverged_run_is_a_result(tmp_path):
    ledger = TrialLedger(tmp_path / "l.jsonl")
    assert run_sweep(toys.toy_trials(), toys.diverges_on_two, ledger, backend="inline").exit_code == 0
    assert ledger.nulls("a/loss") == 1
    assert len(run_sweep(toys.toy_trials(), toys.diverges_on_two, ledger, backend="inline").skipped) == 6


def test_repeated_rows_become_repeats_with_other_seeds():
    trials = make_trials(("a", "b"), [[0.5, 0.5], [0.2, 0.8], [0.5, 0.5]], seed=7, config="x")
    assert [trial.seed for trial in trials] == [7, 7, 8]
    assert len({trial.id for trial in trials}) == 3


def test_what_cannot_be_sent_is_said(tmp_path):
    with pytest.raises(MixError, match="function of a module"):
        run_sweep(toys.toy_trials(), lambda trial: [], TrialLedger(tmp_path / "l.jsonl"))


def drive(ledger, folder, workers):
    root = Path(__file__).parents[3]
    script = folder.parent / "driver.py"
    script.write_text(DRIVER)
    environment = {**os.environ, "PYTHONPATH": str(root)}
    return subprocess.Popen([sys.executable, str(script), str(ledger), str(folder), str(workers)], env=environment)


@pytest.mark.slow
def test_kill_9_at_any_time_then_again(tmp_path, inline):
    runs = tmp_path / "runs"
    runs.mkdir()
    ledger = tmp_path / "l.jsonl"
    moments = random.Random(time.time_ns())
    for delay in (moments.uniform(0.3, 2.5) for _ in range(4)):
        driver = drive(ledger, runs, 2)
        time.sleep(delay)
        driver.send_signal(signal.SIGKILL)
        driver.wait()
    assert drive(ledger, runs, 2).wait() == 0
    assert scores(TrialLedger(ledger)) == inline
    lines = [json.loads(line) for line in ledger.read_text().splitlines()]
    assert len({(line["trial"], line["progress"]) for line in lines}) == len(lines) == 12


@pytest.mark.slow
def test_a_second_driver_is_refused_and_no_trial_runs_twice(tmp_path):
    runs = tmp_path / "runs"
    runs.mkdir()
    ledger = tmp_path / "l.jsonl"
    driver = drive(ledger, runs, 2)
    while not ledger.exists():
        time.sleep(0.05)
    with pytest.raises(MixError, match="another sweep"):
        run_sweep(toys.toy_trials(), toys.score, TrialLedger(ledger), backend="inline")
    assert driver.wait() == 0
    assert len(list(runs.iterdir())) == 6


@pytest.mark.slow
def test_ray_gives_what_inline_gives(tmp_path, inline, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[3]))
    ledger = TrialLedger(tmp_path / "l.jsonl")
    run_sweep(toys.toy_trials(), toys.score, ledger, workers=2, backend="ray")
    assert scores(ledger) == inline
    broken = TrialLedger(tmp_path / "b.jsonl")
    result = run_sweep(toys.toy_trials(), toys.dies_on_two, broken, workers=2, backend="ray", retries=0)
    assert (len(result.done), len(result.failed)) == (5, 1)


@pytest.fixture
def cluster_with_gpus(monkeypatch):
    """A Ray cluster of this machine that believes in two GPUs: what it shows a task is what it holds for it."""
    ray = pytest.importorskip("ray")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[3]))
    options = {"log_to_driver": False, "configure_logging": False, "include_dashboard": False}
    ray.init(num_cpus=2, num_gpus=2, **options)
    yield ray
    ray.shutdown()


@pytest.mark.slow
def test_a_trial_on_ray_sees_the_gpus_that_it_is_given(tmp_path, cluster_with_gpus):
    for asked, expected in (({}, 1), ({"gpus": 0.5}, 1), ({"gpus": 2}, 2)):
        ledger = TrialLedger(tmp_path / f"{expected}-{len(asked)}-{asked.get('gpus')}.jsonl")
        trials = toys.toy_trials()[:2]
        result = run_sweep(trials, toys.gpus_seen, ledger, workers=2, backend="ray", retries=0, **asked)
        assert not result.failed
        assert [record.scores["count"] for record in ledger.records] == [expected] * 2


@pytest.mark.slow
def test_a_local_ray_without_room_for_a_trial_is_refused(tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(MixError, match="no machine of the Ray cluster has 1 CPUs and 64 GPUs"):
        run_sweep(toys.toy_trials(), toys.score, TrialLedger(tmp_path / "l.jsonl"), backend="ray", gpus=64)


class RayOf:
    """What run_on_ray asks of ray, on a cluster with `gpus` GPUs: notes what each task holds, and runs it at once."""

    class exceptions:
        RayError = RuntimeError

    def __init__(self, gpus):
        self.gpus, self.held = gpus, []

    def is_initialized(self):
        return True

    def cluster_resources(self):
        return {"CPU": 8.0, "GPU": float(self.gpus)} if self.gpus else {"CPU": 8.0}

    def nodes(self):
        return [{"Alive": True, "Resources": self.cluster_resources()}]

    def remote(self, **options):
        def task(function):
            class Task:
                def remote(_, *arguments):
                    self.held.append((options["num_cpus"], options["num_gpus"]))
                    return partial(function, *arguments)

            return Task()

        return task

    def wait(self, references, num_returns, timeout):
        return references[:1], references[1:]

    def get(self, references):
        return [work() for work in references]


@pytest.mark.parametrize(
    "there, asked, held",
    [
        (2, {}, (1, 1)),
        (0, {}, (1, 0)),
        (2, {"gpus": 0.5}, (1, 0.5)),
        (2, {"gpus": 2, "cpus": 4}, (4, 2)),
        (2, {"gpus": 0}, (1, 0)),
    ],
)
def test_what_ray_holds_for_a_trial(tmp_path, inline, monkeypatch, there, asked, held):
    cluster = RayOf(there)
    monkeypatch.setattr(ray_backend, "optional_package", lambda *_, **__: cluster)
    ledger = TrialLedger(tmp_path / "l.jsonl")
    run_sweep(toys.toy_trials(), toys.score, ledger, workers=2, backend="ray", **asked)
    assert cluster.held == [held] * 6
    assert scores(ledger) == inline


def test_trials_that_ray_has_no_room_for_are_said(tmp_path, monkeypatch):
    monkeypatch.setattr(ray_backend, "optional_package", lambda *_, **__: RayOf(2))
    with pytest.warns(UserWarning, match="has 1 CPUs and 3 GPUs, which a trial asks for: trials wait"):
        run_sweep(toys.toy_trials(), toys.score, TrialLedger(tmp_path / "l.jsonl"), backend="ray", gpus=3)
