"""Each part of a run's end is made to fail: no training is lost, the command says how to go on, and it does."""

import ast
import errno
import inspect
import json
import os
import shutil
import subprocess
import sys

import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

from mtft.cli.main import app
from mtft.common.errors import UserError
from mtft.recipe.load import dump_recipe
from mtft.recipe.schema.recipe import Recipe
from mtft.training import finalize
from mtft.training.export import proof, rehearsal
from mtft.training.export.export_run import export_run
from mtft.training.run_training import train
from tests.training.conftest import lines

STEPS = 4


def fails(*_, **__):
    raise RuntimeError("planted")


def unproved(recipe, *, quiet):
    return train(recipe, quiet=quiet, prove=False)


def out_of_memory(*_, **__):
    raise MemoryError


def full_disk(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Process:
    """In the place of subprocess.Popen: a fresh process that ends as it is told."""

    def __init__(self, code):
        self.code = code

    def __call__(self, command, **options):
        return subprocess.Popen([sys.executable, "-c", self.code], **options)


def plant_process(monkeypatch, process):
    others = {"PIPE": subprocess.PIPE, "TimeoutExpired": subprocess.TimeoutExpired}
    spied = type("subprocess", (), {"Popen": staticmethod(process), **others})
    monkeypatch.setattr(proof, "subprocess", spied)


KILLED = Process("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
TORCH_OUT_OF_MEMORY = Process("raise MemoryError('CUDA out of memory')")
NO_ROOM = Process('print(\'{"no_memory": 3221225472, "largest": 4.0}\')')
OTHER_LOGITS = Process('print(\'{"difference": 3.0, "largest": 4.0}\')')


@pytest.fixture(scope="module")
def ended(recipe, tmp_path_factory):
    """(recipe as a dict, folder of a finished run, copy of it as it was just before its end)."""
    folder = tmp_path_factory.mktemp("ended")
    asked = {**recipe, "train": {**recipe["train"], "steps": STEPS}, "output": {"dir": str(folder / "run")}}
    asking = {"metrics": ["loss", "f1"], "generate": {"max_new_tokens": 2}}
    asked["tasks"] = [{**task, **asking} for task in recipe["tasks"]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finalize, "load_best_weights", fails)
        with pytest.raises(UserError):
            train(Recipe.model_validate(asked), quiet=True, prove=False)
    shutil.copytree(folder / "run", folder / "before")
    train(Recipe.model_validate(asked), quiet=True, prove=False)
    return asked, folder / "run", folder / "before"


@pytest.fixture
def run(ended, tmp_path):
    """(recipe, folder) of a run that has only its end to do."""
    asked, _, before = ended
    folder = shutil.copytree(before, tmp_path / "run")
    return Recipe.model_validate({**asked, "output": {"dir": str(folder)}}), folder


def weights(folder):
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def same(one, other):
    return one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)


PARTS = {
    "load_best_weights": (fails, out_of_memory),
    "whole_weights": (fails,),
    "export_model": (fails, out_of_memory, full_disk),
    "save_answers": (full_disk,),
    "write_card": (fails, full_disk),
    "write_plan": (full_disk,),
    "write_own": (full_disk,),
    "finite": (fails,),
}
PROOF_PARTS = {"probe_logits": (fails, out_of_memory), "write_probe": (full_disk,), "ReloadResult": (fails,)}
HARMLESS = {"held_out_identity", "is_main_process", "barrier", "from_first_rank", "part_of_the_end", "Proof", "Path"}


def test_all_parts_are_made_to_fail():
    """What finalize_run calls of our own code, found in its source: a new part needs a fault."""
    tree = ast.parse(inspect.getsource(finalize))
    bodies = [node for node in tree.body if getattr(node, "name", "") in ("finalize_run", "Proof")]
    called = {
        node.func.id
        for body in bodies
        for node in ast.walk(body)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    ours = {
        alias.name
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("mtft")
        for alias in node.names
    }
    assert called & ours - HARMLESS - {"world_size"} == {*PARTS, *PROOF_PARTS}


def faults(parts, fast):
    """A parameter for each fault; all but those of the parts in `fast` are slow tests."""
    return [
        pytest.param(part, fault, marks=() if part in fast and fault is fails else pytest.mark.slow)
        for part, planted in parts.items()
        for fault in planted
    ]


@pytest.mark.parametrize(("part", "fault"), faults(PARTS, ("export_model", "save_answers", "write_card")))
def test_a_part_that_fails_loses_nothing(ended, run, monkeypatch, part, fault):
    recipe, folder = run
    logged = lines(folder)
    monkeypatch.setattr(finalize, part, fault)
    with pytest.raises(UserError) as caught:
        train(recipe, quiet=True, prove=False)
    text = str(caught.value)
    assert "trained" in text
    assert f"mtft export {folder}" in text
    assert f"checkpoint-{STEPS}" in text
    assert (folder / f"checkpoint-{STEPS}").is_dir()
    assert not (folder / "result.json").exists()
    if part in ("write_card", "write_plan", "write_own", "finite"):
        assert same(weights(folder), weights(ended[1]))  # the adapter and the scores stand
        assert {path.stem for path in (folder / "scores").iterdir()} == set(recipe.task_names)
    monkeypatch.undo()
    monkeypatch.setattr(
        "mtft.training.export.export_run.train", lambda recipe, quiet: train(recipe, quiet=quiet, prove=False)
    )
    result = export_run(folder, quiet=True)
    assert result.steps == STEPS
    assert same(weights(folder), weights(ended[1]))
    assert lines(folder) == logged  # no step was trained again


@pytest.mark.slow
def test_scores_that_fail_lose_nothing(ended, run, monkeypatch):
    from mtft.training.trainer import MultiTaskTrainer

    recipe, folder = run
    monkeypatch.setattr(MultiTaskTrainer, "evaluate", out_of_memory)
    with pytest.raises(UserError, match="held-out scores failed: MemoryError"):
        train(recipe, quiet=True, prove=False)
    assert same(weights(folder), weights(ended[1]))


FRESH_PROCESS = {
    KILLED: "SIGKILL: the machine had no memory left",
    TORCH_OUT_OF_MEMORY: "can't be loaded in a fresh process: MemoryError: CUDA out of",
    OTHER_LOGITS: "differ from the trained model's by 0.75",
}


@pytest.mark.parametrize(
    ("part", "fault"), [*faults(PROOF_PARTS, ()), *(pytest.param("Popen", process) for process in FRESH_PROCESS)]
)
def test_a_proof_that_fails_leaves_a_finished_run_that_is_marked(ended, run, monkeypatch, part, fault):
    recipe, folder = run
    if part == "Popen":
        plant_process(monkeypatch, fault)
    else:
        monkeypatch.setattr(finalize, part, fault)
    result = train(recipe, quiet=True)
    monkeypatch.undo()
    written = json.loads((folder / "result.json").read_text())
    assert written["state"] == "trained, not proved"
    assert written["proof"] is None
    assert result.not_proved == written["not_proved"]
    planted = {fails: "planted", out_of_memory: "MemoryError", full_disk: "No space"} | FRESH_PROCESS
    assert planted[fault] in written["not_proved"]
    assert written["tasks"].keys() == set(recipe.task_names)
    assert same(weights(folder), weights(ended[1]))
    assert "Trained, not proved: " in (folder / "adapter" / "README.md").read_text()


def test_no_room_for_a_second_copy_is_a_note_and_export_tries_again(ended, run, monkeypatch, capsys):
    recipe, folder = run
    plant_process(monkeypatch, NO_ROOM)
    result = train(recipe)
    assert result.not_proved is None
    told = capsys.readouterr().err
    assert "not proved: there was no memory for a second copy of the base (3.0 GiB on a GPU or the CPU)" in told
    assert f"`mtft export {folder}`" in told
    assert json.loads((folder / "result.json").read_text())["state"] == "trained"
    assert "Trained, not proved: there was no memory" in (folder / "adapter" / "README.md").read_text()
    with pytest.raises(UserError, match="no memory for a second copy"):
        export_run(folder, quiet=True)


def test_other_ranks_hear_of_a_proof_that_takes_long(run, monkeypatch, tmp_path):
    """They would give up a barrier after minutes; so they are told again and again that it goes on."""
    recipe, _ = run
    told, heard = [], tmp_path / "heard"

    def tell(mine):
        told.append(mine)
        if len(told) == 3:
            heard.touch()
        return mine

    monkeypatch.setattr(finalize, "PATIENCE", 0.05)
    monkeypatch.setattr(finalize, "from_first_rank", tell)
    waits = f"import os, time\nwhile not os.path.exists({str(heard)!r}): time.sleep(0.05)\n"
    plant_process(monkeypatch, Process(waits + NO_ROOM.code))
    train(recipe, quiet=True)
    assert told[:3] == [True] * 3
    assert told[-1] is False


def test_ranks_that_hold_whole_weights_wait_for_no_other(monkeypatch, tmp_path):
    """Out of memory when the trained model is asked: an error only where the weights are gathered from all ranks."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(finalize, "probe_logits", out_of_memory)
    proof = finalize.Proof(tmp_path, "cpu")
    proof.ask(None)
    assert proof.trouble == "MemoryError"
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(MemoryError):
        proof.ask(None)


@pytest.mark.slow
def test_the_command_says_so_and_export_proves_it(ended, run, monkeypatch):
    """`mtft train` ends with an error, again too; `mtft export` makes the proof alone, once."""
    recipe, folder = run
    plant_process(monkeypatch, KILLED)
    file = folder.parent / "recipe.yaml"
    file.write_text(dump_recipe(recipe))
    for _ in range(2):
        outcome = CliRunner().invoke(app, ["train", str(file)])
        assert isinstance(outcome.exception, UserError)
        assert "trained, not proved" in outcome.exception.what
        assert outcome.exception.do.endswith(f"mtft export {folder}")
    monkeypatch.undo()
    monkeypatch.setattr("mtft.training.export.export_run.train", fails)  # nothing is trained, loaded or scored
    assert CliRunner().invoke(app, ["export", str(folder)]).exit_code == 0
    written = json.loads((folder / "result.json").read_text())
    assert written["state"] == "trained and proved"
    assert written["proof"] <= 1e-5
    assert written["not_proved"] is None
    card = (folder / "adapter" / "README.md").read_text()
    assert "Reloaded in a fresh process" in card
    assert "not proved" not in card
    assert not (folder / "proof").exists()
    before = (folder / "result.json").stat().st_mtime_ns
    assert CliRunner().invoke(app, ["export", str(folder)]).exit_code == 0
    assert (folder / "result.json").stat().st_mtime_ns == before


def test_export_of_what_is_no_run_or_not_at_its_end(run, tmp_path):
    with pytest.raises(UserError, match=r"no recipe\.yaml"):
        export_run(tmp_path / "nothing")
    _, folder = run
    shutil.rmtree(folder / f"checkpoint-{STEPS}")
    with pytest.raises(UserError, match="has not come to its end") as caught:
        export_run(folder)
    assert "mtft train" in caught.value.do


REHEARSED = dict.fromkeys(("write_weights", "reload_own", "write_probe", "probe_settings", "write_card"), (fails,))


@pytest.mark.parametrize(("part", "fault"), faults(REHEARSED, ("write_weights", "write_card")))
def test_what_would_fail_at_the_end_fails_before_the_first_step(ended, tmp_path, monkeypatch, part, fault):
    asked, *_ = ended
    recipe = Recipe.model_validate({**asked, "output": {"dir": str(tmp_path / "run")}})
    monkeypatch.setattr(rehearsal, part, fault)
    with pytest.raises(UserError, match="at its end can't be written"):
        train(recipe, quiet=True)
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert left == {"recipe.yaml", "env.json", "plan.json"}  # no step was taken, and nothing lies about


@pytest.mark.slow
def test_a_rehearsal_changes_nothing(ended, tmp_path, monkeypatch):
    """The same weights to the bit as a run without it: no random number is used up."""
    asked, finished, _ = ended
    monkeypatch.setattr(rehearsal, "_rehearse", lambda *_: None)
    recipe = Recipe.model_validate({**asked, "output": {"dir": str(tmp_path / "run")}})
    train(recipe, quiet=True, prove=False)
    assert same(weights(tmp_path / "run"), weights(finished))


def test_an_adapter_that_nobody_could_load_is_found_before_the_first_step(ended, tmp_path, monkeypatch):
    """Names in the file that are not the model's: what a library would do that renames on saving."""
    from peft import PeftModel
    from safetensors.torch import save_file

    save = PeftModel.save_pretrained

    def renamed(self, folder, **options):
        save(self, folder, **options)
        file = folder / "adapter_model.safetensors"
        save_file({name.replace("layers", "blocks"): value for name, value in load_file(file).items()}, file)

    monkeypatch.setattr(PeftModel, "save_pretrained", renamed)
    asked, *_ = ended
    recipe = Recipe.model_validate({**asked, "output": {"dir": str(tmp_path / "run")}})
    with pytest.raises(UserError, match=r"layers\.0"):
        train(recipe, quiet=True)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
