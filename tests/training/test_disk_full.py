"""A disk that fills up while a checkpoint is written: a small tmpfs, mounted for the test where that is allowed."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mtft.common.errors import UserError
from mtft.recipe.load import dump_recipe
from mtft.recipe.schema.recipe import Recipe
from mtft.training.checkpoint.checkpoint_files import atomic_checkpoint_dir, checkpoint_folder, latest_checkpoint
from mtft.training.run_training import train

ROOT = Path(__file__).parents[2]


@pytest.fixture
def small_disk(tmp_path):
    """(folder on a tmpfs of 256 KiB, function that makes it larger)."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    if mount is None or os.geteuid() != 0:
        pytest.skip("mounting a tmpfs needs root")

    def mounted(options):
        return subprocess.run([mount, "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, text=True)

    done = mounted("size=256k")
    if done.returncode != 0:
        pytest.skip(f"a tmpfs can't be mounted here: {done.stderr.strip()}")
    try:
        yield folder, lambda: mounted("remount,size=16m")
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)  # an error's trace may hold a file open


def with_python(folder, values):
    (folder / "state.json").write_bytes(values.numpy().tobytes())


def with_safetensors(folder, values):
    save_file({"values": values}, folder / "weights.safetensors")


def with_torch(folder, values):
    torch.save({"values": values}, folder / "states.pt")


@pytest.mark.parametrize("write", [with_python, with_safetensors, with_torch])
def test_whatever_writes_it_is_one_clear_error(small_disk, write):
    """Three libraries write into checkpoints (torch: DeepSpeed's files), and each fails in its own way."""
    run_dir, _ = small_disk
    with atomic_checkpoint_dir(checkpoint_folder(run_dir, 1)) as folder:
        with_python(folder, torch.zeros(2))

    def checkpoint():
        with atomic_checkpoint_dir(checkpoint_folder(run_dir, 2)) as folder:
            write(folder, torch.zeros(2**17))

    with pytest.raises(UserError, match="the disk is full: checkpoint-2") as caught:
        checkpoint()
    assert caught.value.where == str(run_dir)
    assert latest_checkpoint(run_dir) == run_dir / "checkpoint-1"
    assert [path.name for path in run_dir.iterdir()] == ["checkpoint-1"]


@pytest.mark.slow
def test_run_ends_in_one_block_and_goes_on_when_there_is_space(recipe, small_disk, warm_python, tmp_path):
    disk, enlarge = small_disk

    def asked(run_dir):
        output = {"dir": str(run_dir), "save_every": 1, "keep": 20}
        return Recipe.model_validate({**recipe, "train": {**recipe["train"], "eval_every": 100}, "output": output})

    (tmp_path / "r.yaml").write_text(dump_recipe(asked(disk / "run")))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    command = [warm_python, "-m", "mtft", "train", str(tmp_path / "r.yaml")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2, done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    assert done.stderr.count("error: the disk is full") == 1
    assert "run the same command" in done.stderr
    good = latest_checkpoint(disk / "run")
    assert good is not None
    assert int(good.name.removeprefix("checkpoint-")) < 8
    assert not list((disk / "run").glob("*.part"))

    assert enlarge().returncode == 0
    train(asked(disk / "run"), quiet=True, prove=False)
    train(asked(tmp_path / "whole"), quiet=True, prove=False)
    name = "adapter/adapter_model.safetensors"
    left, right = load_file(tmp_path / "whole" / name), load_file(disk / "run" / name)
    assert all(torch.equal(right[key], value) for key, value in left.items())
