"""A signal that comes twice, as launchers send it, still lets the run save; a second one after a while ends it.

Sent to the process group of a run on two ranks, as a scheduler does, it ends both with status 0, and loses nothing.
"""

import multiprocessing
import os
import signal
import subprocess
import sys

import pytest
import torch

from mtft.distributed import stop_signal
from mtft.distributed.stop_signal import StopSignal
from mtft.training.checkpoint.checkpoint_files import checkpoint_step, latest_checkpoint
from tests.distributed.conftest import ROOT
from tests.distributed.test_engines import lines, weights, write_recipes
from tests.distributed.test_launch import free_port, wait_for

CPU = torch.device("cpu")


@pytest.fixture(params=[signal.SIGTERM, signal.SIGINT, signal.SIGHUP], ids=lambda number: number.name)
def number(request):
    """A signal in its default state: a job in the background has some of them ignored."""
    usual = signal.default_int_handler if request.param == signal.SIGINT else signal.SIG_DFL
    before = signal.signal(request.param, usual)
    yield request.param
    signal.signal(request.param, before)


def exit_code_of(work):
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join(60)
    return process.exitcode


def test_twice_is_once(number):
    with StopSignal() as stop:
        signal.raise_signal(number)
        signal.raise_signal(number)
        assert stop.agreed(CPU)
        assert stop.seen == number


def test_the_first_counts():
    """In a process of its own, which may have begun with SIGINT ignored: a job in the background has."""

    def work() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with StopSignal() as stop:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGTERM)
            os._exit(stop.seen if stop.agreed(CPU) else 0)

    assert exit_code_of(work) == signal.SIGINT


def test_a_second_one_after_a_while_stops_at_once(number):
    """In a process of its own: two of the three end it."""

    def work() -> None:
        stop_signal.SAME = -1.0
        with StopSignal():
            signal.raise_signal(number)
            try:
                signal.raise_signal(number)
            except KeyboardInterrupt:
                os._exit(130)
        os._exit(1)

    assert exit_code_of(work) == (130 if number == signal.SIGINT else -number)


def test_a_signal_that_is_ignored_stays_ignored(number):
    signal.signal(number, signal.SIG_IGN)  # nohup does so
    with StopSignal() as stop:
        signal.raise_signal(number)
        assert not stop.agreed(CPU)


def test_handlers_come_back():
    before = signal.getsignal(signal.SIGTERM)
    with StopSignal():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


STEPS = 40


def ranks(recipe_file, python=sys.executable):
    """Two ranks of `mtft train`, in a process group of their own."""
    shared = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    shared |= {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    shared |= {"ACCELERATE_USE_CPU": "true"}
    command, started = [python, "-m", "mtft", "train", str(recipe_file)], []
    for rank in ("0", "1"):
        own = {**shared, "RANK": rank, "LOCAL_RANK": rank}
        group = started[0].pid if started else 0
        output = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(command, env=own, process_group=group, **output))
    return started


def ended(started):
    """What each rank said; both must have ended well."""
    said = [process.communicate(timeout=300)[1] for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    return said


@pytest.mark.slow
def test_a_signal_to_the_process_group_of_two_ranks(recipe, warm_python, tmp_path):
    """With dropout: the end is that of an unbroken run on two ranks, to the bit."""
    folders = [tmp_path / name for name in ("whole", "broken")]
    for folder in folders:
        write_recipes(recipe, folder, ["dropout"], steps=STEPS, eval_every=STEPS, batch_tokens=150)
    whole, broken = (folder / "dropout" for folder in folders)
    ended(ranks(f"{whole}.yaml", warm_python))
    started = ranks(f"{broken}.yaml")
    try:
        wait_for(broken / "checkpoint-3", started)
        os.killpg(started[0].pid, signal.SIGTERM)
        said, _ = ended(started)
    finally:
        for process in started:
            process.kill()
    step = checkpoint_step(latest_checkpoint(broken))
    assert f"stopped by SIGTERM after step {step}, which is saved" in said
    assert not (broken / "result.json").exists(), "too late to be stopped: the test needs more steps"
    assert len(lines(broken)) == step < STEPS
    ended(ranks(f"{broken}.yaml", warm_python))
    clock = ("seconds", "tokens_per_second")
    logged = [[{**line, **dict.fromkeys(clock)} for line in lines(run)] for run in (whole, broken)]
    assert logged[0] == logged[1]
    expected, found = weights(whole), weights(broken)
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
