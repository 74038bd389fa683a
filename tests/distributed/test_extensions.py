"""DeepSpeed's builds: one that was killed is named instead of waited for, one that goes on is not, all are said."""

import os
import signal
import subprocess
import sys
import time

import pytest

from mtft.common.errors import UserError
from mtft.distributed.extensions import extension_notes, is_stale

HOLD = "import sys, time; from torch.utils.file_baton import FileBaton; FileBaton(sys.argv[1]).try_acquire(); "
HOLD += "print('held', flush=True); time.sleep(60)"


@pytest.fixture
def builder(tmp_path):
    """(lock, process) of somebody who holds torch's own lock."""
    lock = tmp_path / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir()
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(lock)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield lock, process
    process.kill()
    process.wait()


@pytest.fixture
def under_deepspeed(monkeypatch, tmp_path):
    for name, value in {"ACCELERATE_USE_DEEPSPEED": "true", "TORCH_EXTENSIONS_DIR": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)


def test_a_lock_is_stale_when_its_builder_was_killed(builder):
    lock, process = builder
    assert not is_stale(lock)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert lock.exists()
    assert is_stale(lock)
    lock.unlink()
    assert not is_stale(lock)


def test_another_machine_may_be_building(builder, monkeypatch):
    lock, process = builder
    process.kill()
    process.wait()
    for name, value in {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert not is_stale(lock)
    long_ago = time.time() - 7200
    os.utime(lock, (long_ago, long_ago))
    assert is_stale(lock)


def test_a_killed_build_ends_a_run_before_it_begins(builder, under_deepspeed):
    lock, process = builder
    assert len(extension_notes()) == 1  # somebody builds: the run will wait for him
    process.kill()
    process.wait()
    with pytest.raises(UserError, match="deepspeed_shm_comm was killed and has left its lock") as caught:
        extension_notes()
    assert caught.value.where == str(lock)
    assert "delete that file" in caught.value.do


def test_what_is_compiled_is_said_until_it_is_there(under_deepspeed, monkeypatch, tmp_path):
    (note,) = extension_notes()
    assert note == (
        f"DeepSpeed compiles its deepspeed_shm_comm first, once, into {tmp_path}/deepspeed_shm_comm: a minute or more"
    )
    (tmp_path / "deepspeed_shm_comm" / "deepspeed_shm_comm.so").touch()
    assert extension_notes() == []
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "cpu")
    assert ["cpu_adam" in note for note in extension_notes()] == [True]
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "false")
    assert extension_notes() == []


def test_a_launch_with_deepspeed_where_it_is_missing_is_refused(under_deepspeed, monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(UserError, match="DeepSpeed, which can't be imported") as caught:
        extension_notes()
    assert caught.value.do.startswith('pip install "mtft[deepspeed]"')
