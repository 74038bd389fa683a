"""Two runs that are started in one folder at a random distance: one writes, the other is told so."""

import multiprocessing
import os
import random
import time

import pytest

from mtft.common.errors import UserError
from mtft.common.folder_lock import FolderBusyError
from mtft.training.run_training import train
from tests.training.conftest import lines
from tests.training.test_run_training import picture, recipe_in

REFUSED = 2


def start(recipe, fresh=False, prepare=lambda: None):
    """A forked process that trains the recipe; its exit code is that of the command."""

    def work():
        code = 0
        prepare()
        try:
            train(recipe, quiet=True, prove=False, fresh=fresh)
        except UserError as error:
            code = REFUSED if isinstance(error, FolderBusyError) else 3
        os._exit(code)

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    return process


def code_of(process):
    process.join(120)
    if process.is_alive():
        process.kill()
        pytest.fail("a run hangs")
    return process.exitcode


@pytest.mark.parametrize("fresh", [False, True])
def test_the_second_run_is_refused_while_the_first_is_at_work(recipe, tmp_path, fresh):
    def wait_in_step_three():
        from mtft.training.trainer import MultiTaskTrainer

        whole = MultiTaskTrainer.training_step

        def slow_step(self, *args, **kwargs):
            if self.state.global_step == 2:
                (tmp_path / "at work").touch()
                while not (tmp_path / "go on").exists():
                    time.sleep(0.01)
            return whole(self, *args, **kwargs)

        MultiTaskTrainer.training_step = slow_step

    one = recipe_in(recipe, tmp_path / "run")
    first = start(one, prepare=wait_in_step_three)
    until = time.monotonic() + 120
    while not (tmp_path / "at work").exists():
        assert time.monotonic() < until
        time.sleep(0.02)
    with pytest.raises(FolderBusyError, match=rf"another run writes this folder \(process {first.pid} on"):
        train(one, quiet=True, prove=False, fresh=fresh)
    (tmp_path / "go on").touch()
    assert code_of(first) == 0
    assert [line["step"] for line in lines(tmp_path / "run")] == list(range(1, 9))
    assert not list(tmp_path.glob("run.old*"))


@pytest.mark.slow
@pytest.mark.parametrize("pairs, fresh", [(5, False), (5, True)])
def test_two_runs_never_both_write(recipe, tmp_path, pairs, fresh):
    """The second one (with --fresh: moves the folder) is refused while the first is at work, and fine after its end."""
    draw = random.Random(pairs)
    begin = time.perf_counter()
    assert code_of(start(recipe_in(recipe, tmp_path / "unbroken"))) == 0
    length = time.perf_counter() - begin
    expected = picture(tmp_path / "unbroken")
    refused = 0
    for number in range(pairs):
        folder = tmp_path / f"run-{number}"
        one = recipe_in(recipe, folder)
        first = start(one)
        time.sleep(draw.uniform(0, length))
        second = start(one, fresh=fresh)
        codes = code_of(first), code_of(second)
        assert codes in ((0, 0), (0, REFUSED), (REFUSED, 0)), number
        refused += REFUSED in codes
        found = [path for path in tmp_path.glob(f"run-{number}*") if (path / "result.json").is_file()]
        for path in found:  # two with --fresh, when the second one began after the first one's end
            assert picture(path) == expected, number
            assert [line["step"] for line in lines(path)] == list(range(1, 9)), number
        assert len(found) == (2 if fresh and codes == (0, 0) else 1), number
    assert refused
    assert not list(tmp_path.glob(".*.lock"))
