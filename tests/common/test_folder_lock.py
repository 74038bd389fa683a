"""One writer a folder: within a process, between processes, after a kill."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from mtft.common.errors import UserError
from mtft.common.folder_lock import FolderBusyError, refuse_busy_below, sole_writer


def _hold(folder: Path, told) -> None:
    with sole_writer(folder):
        told.send("ready")
        told.poll(60)


class Holder:
    """A process that writes a folder until it is told to leave, or killed."""

    def __init__(self, folder: Path) -> None:
        context = multiprocessing.get_context("fork")
        self._pipe, theirs = context.Pipe()
        self.process = context.Process(target=_hold, args=(folder, theirs))
        self.process.start()
        assert self._pipe.recv() == "ready"

    def leave(self) -> None:
        with suppress(BrokenPipeError):
            self._pipe.send("leave")
        self.process.join(30)


@pytest.fixture
def holder(tmp_path: Path):
    """The writer of tmp_path/run."""
    held = Holder(tmp_path / "run")
    yield held
    held.leave()


def test_the_second_writer_is_told_who_the_first_is(tmp_path: Path, holder):
    who = rf"another run writes this folder \(process {holder.process.pid} on .*, since 20"
    with pytest.raises(FolderBusyError, match=who), sole_writer(tmp_path / "run"):
        pass
    holder.leave()
    with sole_writer(tmp_path / "run"):
        pass
    assert not list(tmp_path.iterdir()), "the lock goes with its holder"


def test_a_link_to_the_folder_is_the_folder(tmp_path: Path, holder):
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "run")
    with pytest.raises(FolderBusyError), sole_writer(tmp_path / "link"):
        pass


def test_a_killed_writer_leaves_no_lock(tmp_path: Path, holder):
    os.kill(holder.process.pid, signal.SIGKILL)
    holder.process.join(30)
    with sole_writer(tmp_path / "run"):
        about = json.loads((tmp_path / ".run.lock").read_text())
        assert about["process"] == os.getpid()


def test_who_waits_gets_it_when_the_first_leaves(tmp_path: Path, holder):
    threading.Timer(0.3, holder.leave).start()
    with sole_writer(tmp_path / "run", wait=30):
        pass


def test_the_same_thread_may_take_it_again_and_another_may_not(tmp_path: Path):
    refused: list[UserError] = []

    def other() -> None:
        try:
            with sole_writer(tmp_path / "run"):
                pass
        except UserError as error:
            refused.append(error)

    with sole_writer(tmp_path / "run"):
        with sole_writer(tmp_path / "run"):
            pass
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert "another thread" in str(refused[0])
    assert not list(tmp_path.iterdir())


def test_a_folder_that_moves_away_stays_locked_under_its_old_name(tmp_path: Path, holder):
    (tmp_path / "run").mkdir()
    (tmp_path / "run").rename(tmp_path / "run.old-1")
    with pytest.raises(FolderBusyError), sole_writer(tmp_path / "run"):
        pass


@pytest.mark.parametrize("name", ["n" * 250, "wörd \U0001f600", "a b"])
def test_any_name_can_be_locked(tmp_path: Path, name: str):
    with sole_writer(tmp_path / name):
        assert len(list(tmp_path.iterdir())) == 1
    assert not list(tmp_path.iterdir())


def test_a_writer_below_is_seen(tmp_path: Path):
    (tmp_path / "outer").mkdir()
    held = Holder(tmp_path / "outer" / "inner")
    try:
        with sole_writer(tmp_path / "outer"), pytest.raises(FolderBusyError, match=f"process {held.process.pid} on"):
            refuse_busy_below(tmp_path / "outer")
    finally:
        held.leave()
    with sole_writer(tmp_path / "outer" / "inner"):
        refuse_busy_below(tmp_path / "outer")  # our own


def test_another_threads_refusal_leaves_the_lock_where_it_is(tmp_path: Path):
    """A POSIX lock is lost when its process closes any descriptor of the file."""
    refused: list[UserError] = []

    def other() -> None:
        with suppress(FolderBusyError), sole_writer(tmp_path / "run"):
            refused.append(UserError("not refused"))

    def from_elsewhere() -> None:
        try:
            with sole_writer(tmp_path / "run"):
                os._exit(1)
        except FolderBusyError:
            os._exit(0)

    with sole_writer(tmp_path / "run"):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        process = multiprocessing.get_context("fork").Process(target=from_elsewhere)
        process.start()
        process.join(30)
    assert process.exitcode == 0
    assert not refused


def test_a_file_of_somebody_else_is_no_lock(tmp_path: Path):
    (tmp_path / ".run.lock").write_text("mine")
    with pytest.raises(UserError, match="somebody else"), sole_writer(tmp_path / "run"):
        pass
    assert (tmp_path / ".run.lock").read_text() == "mine"


def test_a_place_that_is_no_place_is_the_users_to_mend():
    with pytest.raises(UserError, match="nothing can be written there"), sole_writer("/proc/run"):
        pass


def _race(folder: Path, seed: int, until: float) -> None:
    draw = random.Random(seed)
    counter = folder.parent / "counter"
    while time.monotonic() < until:
        try:
            with sole_writer(folder):
                before = int(counter.read_text())
                time.sleep(draw.uniform(0, 0.001))
                counter.write_text(str(before + 1))
                with open(folder.parent / f"done-{seed}", "a") as file:
                    file.write("x")
        except FolderBusyError:
            time.sleep(draw.uniform(0, 0.002))


def test_writers_at_random_distances_never_overlap(tmp_path: Path):
    """Four processes take and leave the lock some hundred times: a count without any other guard stays right."""
    (tmp_path / "counter").write_text("0")
    context = multiprocessing.get_context("fork")
    until = time.monotonic() + 1.5
    processes = [context.Process(target=_race, args=(tmp_path / "run", seed, until)) for seed in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    done = sum(path.stat().st_size for path in tmp_path.glob("done-*"))
    assert int((tmp_path / "counter").read_text()) == done > 100
    assert not list(tmp_path.glob(".*.lock"))
