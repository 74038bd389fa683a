"""A checkpoint is whole or not there, and every kind of state comes back bit for bit."""

import errno
import json
import os
import random
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

from mtft.common.errors import UserError
from mtft.common.state_tree import random_state, restore_random_state
from mtft.training.checkpoint.checkpoint_files import (
    atomic_checkpoint_dir,
    checkpoint_folder,
    latest_checkpoint,
    load_tree,
    prune_checkpoints,
    save_tree,
)


def write(run_dir, step, value=1.0):
    target = checkpoint_folder(run_dir, step)
    with atomic_checkpoint_dir(target) as folder:
        save_tree(folder, {"step": step, "moments": torch.full((4,), value)})
    return target


def test_optimizer_state_comes_back_bit_for_bit(tmp_path):
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
    for _ in range(3):
        model(torch.randn(5, 3)).square().sum().backward()
        optimizer.step()
        scheduler.step()
    before = {
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "odd": (1, 0.1 + 0.2, None, {2: "b"}),
    }
    save_tree(tmp_path, before)
    after = load_tree(tmp_path)
    assert after["odd"] == before["odd"]
    assert after["scheduler"] == before["scheduler"]
    assert after["optimizer"]["param_groups"] == before["optimizer"]["param_groups"]
    for index, moments in before["optimizer"]["state"].items():
        assert all(torch.equal(after["optimizer"]["state"][index][name], value) for name, value in moments.items())


def test_what_cannot_be_kept_is_named(tmp_path):
    with pytest.raises(TypeError, match=r"state\.balancer\.history"):
        save_tree(tmp_path, {"balancer": {"history": {1, 2}}})


def test_random_state_of_every_generator(tmp_path):
    random.gauss(0, 1), np.random.standard_normal(3), torch.randn(2)
    save_tree(tmp_path, random_state())

    def draw():
        return random.gauss(0, 1), np.random.standard_normal(3).tolist(), torch.randn(2).tolist()

    expected = draw()
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    restore_random_state(load_tree(tmp_path))
    assert draw() == expected


@pytest.mark.parametrize("damage", ["cut", "flip", "missing", "manifest"])
def test_torn_checkpoint_is_skipped_with_a_message(tmp_path, damage):
    good, torn = write(tmp_path, 5), write(tmp_path, 10)
    victim = torn / "state.safetensors"
    if damage == "cut":
        victim.write_bytes(victim.read_bytes()[:-3])
    elif damage == "flip":
        victim.write_bytes(victim.read_bytes()[:-1] + b"\x01")
    elif damage == "missing":
        victim.unlink()
    else:
        (torn / "manifest.json").write_text("{")
    said = []
    assert latest_checkpoint(tmp_path, say=said.append) == good
    assert len(said) == 1
    assert said[0].startswith("checkpoint-10 is skipped: ")


def test_newest_is_by_number_not_by_name(tmp_path):
    write(tmp_path, 9), write(tmp_path, 100)
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-100"


def test_nothing_there(tmp_path):
    assert latest_checkpoint(tmp_path) is None
    assert latest_checkpoint(tmp_path / "missing") is None


def test_keep(tmp_path):
    for step in (5, 10, 15, 100):
        write(tmp_path, step)
    prune_checkpoints(tmp_path, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-100", "checkpoint-15"]


def test_an_error_leaves_nothing_behind(tmp_path):
    write(tmp_path, 5)
    with pytest.raises(RuntimeError), atomic_checkpoint_dir(checkpoint_folder(tmp_path, 10)):
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-5"]


def test_full_disk_is_one_clear_error_and_keeps_the_old(tmp_path):
    write(tmp_path, 5)
    with pytest.raises(UserError, match="disk is full"), atomic_checkpoint_dir(checkpoint_folder(tmp_path, 10)):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-5"


def test_killed_inside_the_write(tmp_path):
    """A process that is killed (-9) after some files are written leaves the older checkpoint as the newest."""
    write(tmp_path, 5, value=2.0)
    code = (
        "import os, signal, sys; from pathlib import Path\n"
        "from mtft.training.checkpoint.checkpoint_files import atomic_checkpoint_dir\n"
        "with atomic_checkpoint_dir(Path(sys.argv[1]) / 'checkpoint-10') as folder:\n"
        "    (folder / 'state.json').write_text('{}')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], env={**os.environ, "PYTHONPATH": os.getcwd()})
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / "checkpoint-10.part").is_dir()
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-5"
    assert not (tmp_path / "checkpoint-10.part").exists()
    assert load_tree(tmp_path / "checkpoint-5")["moments"].tolist() == [2.0] * 4


def test_manifest_lists_every_file(tmp_path):
    folder = write(tmp_path, 1)
    assert sorted(json.loads((folder / "manifest.json").read_text())) == ["state.json", "state.safetensors"]
