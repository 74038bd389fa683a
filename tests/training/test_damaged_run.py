"""Every file of a run folder, damaged in every way: the command goes on with what is right, or says file and remedy."""

import shutil
from pathlib import Path

import pytest

from mtft.common.errors import UserError
from mtft.recipe.schema.recipe import Recipe
from mtft.training.checkpoint.checkpoint import check_identity
from mtft.training.checkpoint.checkpoint_files import latest_checkpoint
from mtft.training.export.export_run import export_run
from mtft.training.run_training import read_result, train
from tests.common.damage import NOT_FILES, UNREADABLE, damage
from tests.training.conftest import lines


@pytest.fixture(scope="module")
def finished(recipe, tmp_path_factory):
    """(recipe's values, folder of a finished run)."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    values = {**recipe, "train": {**recipe["train"], "steps": 4, "eval_every": 2}}
    values["output"] = {"dir": str(folder), "save_every": 2, "export": "best"}
    train(Recipe.model_validate(values), quiet=True, prove=False)
    return values, folder


@pytest.fixture
def copy(finished, tmp_path):
    values, folder = finished
    shutil.copytree(folder, tmp_path / "run")
    return Recipe.model_validate({**values, "output": {**values["output"], "dir": str(tmp_path / "run")}})


def refused(path, call):
    """The error names the file, and how to go on."""
    with pytest.raises(UserError) as caught:
        call()
    assert path.name in f"{caught.value.where} {caught.value.what}"
    assert caught.value.do
    return caught.value


@pytest.mark.parametrize("kind", UNREADABLE)
@pytest.mark.parametrize("name", ["result.json", "scores/copy.jsonl", "recipe.yaml"])
def test_a_finished_run(copy, name, kind):
    path = Path(copy.output.dir) / name
    damage(path, kind)
    if name != "recipe.yaml":
        refused(path, lambda: read_result(Path(copy.output.dir)))
    refused(path, lambda: train(copy, quiet=True))
    if name != "scores/copy.jsonl":  # which the end of the run, done again, writes anew
        refused(path, lambda: export_run(Path(copy.output.dir)))


@pytest.mark.parametrize("kind", UNREADABLE)
@pytest.mark.parametrize("name", ["env.json", "metrics.jsonl", "eval.jsonl"])
def test_a_run_that_goes_on(copy, name, kind):
    """Lines of a history that can't be read are said and done without; everything else is named before training."""
    folder = Path(copy.output.dir)
    (folder / "result.json").unlink()
    damage(folder / name, kind)
    if name.endswith(".jsonl") and kind not in NOT_FILES:
        from mtft.training.run_files.metrics_log import MetricsLog

        said, log = [], MetricsLog(folder, steps=4)
        log.say, log.eval_every, log.eval_on_start = said.append, 2, True
        log.start(2)
        assert any(name in line and "no line" in line for line in said)
        assert lines(folder, name) == []
        return
    refused(folder / name, lambda: train(copy, quiet=True))


@pytest.mark.parametrize("kind", UNREADABLE)
def test_an_export_without_a_plan(copy, kind):
    folder = Path(copy.output.dir)
    (folder / "result.json").unlink()
    damage(folder / "plan.json", kind)
    refused(folder / "plan.json", lambda: export_run(folder))


@pytest.mark.parametrize("kind", UNREADABLE)
@pytest.mark.parametrize("name", ["state.json", "manifest.json", "weights.safetensors", "trainer_state.json"])
def test_a_checkpoint_is_passed_over(copy, name, kind):
    folder = Path(copy.output.dir)
    damage(folder / "checkpoint-4" / name, kind)
    said = []
    assert latest_checkpoint(folder, say=said.append) == folder / "checkpoint-2"
    assert name in said[0]
    if name == "state.json":
        refused(folder / "checkpoint-4" / name, lambda: check_identity(folder / "checkpoint-4", {}))


def test_a_plan_that_is_a_folder_is_named_before_training(copy):
    folder = Path(copy.output.dir)
    (folder / "result.json").unlink()
    damage(folder / "plan.json", "a folder")
    refused(folder / "plan.json", lambda: train(copy, quiet=True))


@pytest.mark.parametrize("name", ["best.json", "weights.safetensors", "copy.jsonl"])
def test_best_weights_that_are_damaged_are_not_exported(copy, name):
    """The weights of the best evaluation, where it isn't the last one."""
    from types import SimpleNamespace

    from mtft.training.callbacks.best_weights import load_best_weights

    folder = Path(copy.output.dir)
    path = folder / "best" / name
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    best = int("".join(filter(str.isdigit, (folder / "best" / "best.json").read_text().split('"step":')[1][:3])))
    run = SimpleNamespace(
        state=SimpleNamespace(global_step=best + 1),
        optimizer=None,
        evaluations={best + 1: {}},
        stopping=SimpleNamespace(run=SimpleNamespace(step=best)),
        run_dir=folder,
    )
    refused(path, lambda: load_best_weights(run, "best"))
