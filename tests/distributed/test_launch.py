"""`mtft train` under each launcher is one program: killed on two machines, stopped under torchrun, it goes on."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress

import psutil
import pytest

from mtft.common.folder_lock import sole_writer
from mtft.training.checkpoint.checkpoint_files import checkpoint_step, latest_checkpoint
from mtft.training.run_training import train
from tests.distributed.conftest import ROOT
from tests.distributed.test_engines import distance, lines, weights, write_recipes

pytestmark = pytest.mark.slow

STEPS = 60


@pytest.fixture(scope="module")
def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(scope="module")
def runs(recipe, tmp_path_factory):
    """(folder, recipe) of the same run: of one process, finished, and of two."""
    found = []
    for name in ("alone", "together"):
        folder = tmp_path_factory.mktemp(name)
        settings = {"steps": STEPS, "eval_every": STEPS, "batch_tokens": 150}
        found.append((folder, write_recipes(recipe, folder, ["sgd"], **settings)["sgd"]))
    train(found[0][1], quiet=True, prove=False)
    return found


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def machine(rank, port, recipe_file, environment):
    """`accelerate launch` with multi-node.yaml, as one machine of two would run it; both are this one here."""
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--config_file", str(ROOT / "recipes" / "accelerate" / "multi-node.yaml")]
    command += ["--machine_rank", str(rank), "--main_process_ip", "127.0.0.1", "--main_process_port", str(port)]
    command += ["-m", "mtft", "train", str(recipe_file)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def send(launcher, number):
    """To a launcher and all that it has started (which it puts into sessions of their own)."""
    family = [psutil.Process(launcher.pid), *psutil.Process(launcher.pid).children(recursive=True)]
    for process in family:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(number)
    if number == signal.SIGKILL:
        psutil.wait_procs(family, timeout=60)


def wait_for(folder, processes):
    """Until the folder is there; the processes must live."""
    limit = time.monotonic() + 240
    while not folder.is_dir():
        assert time.monotonic() < limit, f"no {folder.name} after 4 minutes"
        assert all(process.poll() is None for process in processes), "a launcher ended early"
        time.sleep(0.02)


def test_killed_on_two_machines_stopped_under_torchrun_and_finished(runs, environment):
    (alone, _), (together, _) = runs
    run_dir, recipe_file, port = together / "sgd", together / "sgd.yaml", free_port()
    machines = [machine(rank, port, recipe_file, environment) for rank in (0, 1)]
    try:
        wait_for(run_dir / "checkpoint-3", machines)
    finally:
        for process in machines:
            send(process, signal.SIGKILL)
            process.wait()
    assert not (run_dir / "result.json").exists(), "too late to be killed: the test needs more steps"

    killed = latest_checkpoint(run_dir)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["--master_port", str(free_port()), "-m", "mtft", "train", str(recipe_file)]
    launcher = subprocess.Popen(command, env=environment, text=True, stderr=subprocess.PIPE)
    wait_for(run_dir / f"checkpoint-{checkpoint_step(killed) + 3}", [launcher])
    send(launcher, signal.SIGTERM)  # as a scheduler does: the launcher, which passes it on, and both processes
    _, said = launcher.communicate(timeout=120)
    assert "2 processes on cpu" in " ".join(said.split())
    assert f"goes on from {killed.name}" in said
    saved = re.search(r"stopped by SIGTERM after step (\d+), which is saved", said)
    assert saved, said[-3000:]
    assert latest_checkpoint(run_dir) == run_dir / f"checkpoint-{saved[1]}"
    assert not (run_dir / "result.json").exists()

    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    expected, found = lines(alone / "sgd"), lines(run_dir)
    assert [line["step"] for line in found] == list(range(1, STEPS + 1))
    assert [line["loss"] for line in found] == pytest.approx([line["loss"] for line in expected], rel=1e-6)
    assert distance(weights(alone / "sgd"), weights(run_dir)) <= 1e-6


def test_ranks_of_a_second_launch_are_all_told(recipe, warm_python, environment, tmp_path):
    """The first rank may not write: the others hear of it and end, instead of waiting for it."""
    write_recipes(recipe, tmp_path, ["sgd"], steps=4, eval_every=4, batch_tokens=150)
    command = [warm_python, "-m", "mtft", "train", str(tmp_path / "sgd.yaml")]
    shared = {
        **os.environ,
        **environment,
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    shared |= {"ACCELERATE_USE_CPU": "true"}
    with sole_writer(tmp_path / "sgd"):
        ranks = [
            subprocess.Popen(
                command, env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}, text=True, stderr=subprocess.PIPE
            )
            for rank in range(2)
        ]
        said = [rank.communicate(timeout=240)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2], said
    assert f"another run writes this folder (process {os.getpid()}" in said[0]
    assert not (tmp_path / "sgd").exists()
