"""A run that is killed, stopped or repeated ends as the unbroken one, bit for bit. Each run is a forked process."""

import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from mtft.common.errors import UserError
from mtft.recipe.schema.recipe import Recipe
from mtft.training.run_training import train
from tests.slow import slow
from tests.training.conftest import lines


def recipe_in(recipe, folder, **changes):
    changes = {"train": {**recipe["train"], **changes.pop("train", {})}, **changes}
    return Recipe.model_validate({**recipe, **changes, "output": {"dir": str(folder), "save_every": 3, "keep": 2}})


def run(recipe, prepare=lambda: None):
    """Exit code of a forked process that trains the recipe; `prepare` runs in it first (to plant a kill)."""

    def work():
        prepare()
        try:
            train(recipe, quiet=True, prove=False)
        except SystemExit as stop:
            os._exit(stop.code)
        os._exit(0)

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join(120)
    if process.is_alive():
        process.kill()
        pytest.fail("the run hangs")
    return process.exitcode


def kill_at_step(step, number=signal.SIGKILL, send=os.kill):
    def plant():
        from mtft.training.trainer import MultiTaskTrainer

        whole = MultiTaskTrainer.training_step

        def deadly(self, *args, **kwargs):
            if self.state.global_step + 1 == step:
                send(os.getpid(), number)
            return whole(self, *args, **kwargs)

        MultiTaskTrainer.training_step = deadly

    return plant


def kill_at_sync(count):
    """Dies at the count-th fsync: somewhere inside the writing of a checkpoint."""

    def plant():
        whole, seen = os.fsync, []

        def deadly(handle):
            seen.append(handle)
            if len(seen) == count:
                os.kill(os.getpid(), signal.SIGKILL)
            return whole(handle)

        os.fsync = deadly

    return plant


def picture(folder):
    """Everything of a run that must not depend on how often it was broken."""
    folder = Path(folder)
    weights = load_file(folder / "adapter" / "adapter_model.safetensors")
    metrics = lines(folder)
    for line in metrics:
        del line["seconds"], line["tokens_per_second"]
    return {
        "weights": {name: value.tolist() for name, value in weights.items()},
        "metrics": metrics,
        "eval": (folder / "eval.jsonl").read_text(),
        "scores": {path.name: path.read_text() for path in sorted((folder / "scores").iterdir())},
    }


@pytest.fixture(scope="module")
def few_rows(recipe):
    """Several epochs in 8 steps, so that the right place of the right epoch is resumed; and a balancer with state."""
    balancer = {"name": "coba", "warmup": 2, "window": 4, "valid_every": 1}
    return {
        **recipe,
        "tasks": [{**task, "limit": 10} for task in recipe["tasks"]],
        "loss": {"balancer": balancer},
    }


@pytest.fixture(scope="module")
def unbroken(few_rows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    train(recipe_in(few_rows, folder), quiet=True, prove=False)
    return picture(folder)


@pytest.mark.slow
def test_kills_leave_no_trace(few_rows, unbroken, tmp_path):
    """Killed in a step, inside each part of a checkpoint's writing, then in the first step after going on."""
    recipe = recipe_in(few_rows, tmp_path / "broken")
    for plant in (kill_at_step(2), kill_at_step(5), kill_at_step(4), kill_at_sync(2), kill_at_sync(5), kill_at_step(8)):
        assert run(recipe, plant) == -signal.SIGKILL
    assert run(recipe) == 0
    assert picture(tmp_path / "broken") == unbroken
    assert not list((tmp_path / "broken").glob("*.part"))


@pytest.mark.slow
def test_killed_after_the_last_step(few_rows, unbroken, tmp_path):
    """The checkpoint of the last step stands, the result does not: only the end is done again."""

    def plant():
        from mtft.training import finalize

        finalize.write_card = lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL)

    recipe = recipe_in(few_rows, tmp_path / "late")
    assert run(recipe, plant) == -signal.SIGKILL
    assert (tmp_path / "late" / "checkpoint-8").is_dir()
    assert run(recipe) == 0
    assert picture(tmp_path / "late") == unbroken


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 0), *slow((signal.SIGINT, 130), (signal.SIGHUP, 0))])
def test_signal_finishes_the_step_and_saves(few_rows, unbroken, tmp_path, number, code):
    recipe = recipe_in(few_rows, tmp_path / "stopped")
    assert run(recipe, kill_at_step(5, number)) == code
    assert (tmp_path / "stopped" / "checkpoint-5").is_dir()
    assert not (tmp_path / "stopped" / "result.json").exists()
    assert run(recipe) == 0
    assert picture(tmp_path / "stopped") == unbroken


def with_loader_settings(plant=lambda: None):
    """What transformers' loader would be asked for on a machine with a GPU; then `plant`."""

    def prepare():
        from mtft.training import training_arguments as module

        TrainingArguments = module.TrainingArguments
        module.TrainingArguments = lambda **settings: TrainingArguments(**{**settings, "dataloader_num_workers": 2})
        plant()

    return prepare


def test_signal_to_the_whole_group_saves(few_rows, unbroken, tmp_path):
    """As schedulers and launchers send it: whatever process builds batches gets it too."""

    def to_group(process, number):
        """From another process: torch's loader workers forgive a signal of their parent."""
        assert process == os.getpgid(0) == os.getpid()
        send = "import os, sys; os.killpg(int(sys.argv[1]), int(sys.argv[2]))"
        subprocess.run([sys.executable, "-c", send, str(process), str(int(number))], start_new_session=True, check=True)

    def plant():
        os.setsid()
        kill_at_step(5, signal.SIGTERM, to_group)()

    recipe = recipe_in(few_rows, tmp_path / "stopped")
    assert run(recipe, with_loader_settings(plant)) == 0
    assert (tmp_path / "stopped" / "checkpoint-5").is_dir()
    assert run(recipe, with_loader_settings()) == 0
    assert picture(tmp_path / "stopped") == unbroken


@pytest.mark.slow
def test_long_steps_hold_no_files_open(few_rows, tmp_path):
    """100 micro-batches a step, 60 more open files than at the start: as a limit of 1024 and a larger step."""

    def plant():
        here = len(os.listdir("/proc/self/fd"))
        resource.setrlimit(resource.RLIMIT_NOFILE, (here + 60, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))

    settings = {"steps": 3, "batch_tokens": 6000, "micro_batch_tokens": 64, "max_length": 64}
    recipe = recipe_in(
        few_rows, tmp_path / "long", train=settings, tasks=[{**t, "limit": 60} for t in few_rows["tasks"]]
    )
    assert run(recipe, with_loader_settings(plant)) == 0
    assert len(lines(tmp_path / "long")) == 3


def test_torn_checkpoint_is_passed_over(few_rows, unbroken, tmp_path):
    recipe = recipe_in(few_rows, tmp_path / "torn")
    assert run(recipe, kill_at_step(8)) == -signal.SIGKILL
    weights = tmp_path / "torn" / "checkpoint-6" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    assert run(recipe) == 0
    assert picture(tmp_path / "torn") == unbroken


def test_another_recipe_in_the_folder_is_refused_by_key(few_rows, tmp_path):
    recipe = recipe_in(few_rows, tmp_path / "run")
    assert run(recipe, kill_at_step(4)) == -signal.SIGKILL
    other = recipe_in(few_rows, tmp_path / "run", train={"learning_rate": 0.1}, seed=3)
    with pytest.raises(UserError) as caught:
        train(other, quiet=True)
    assert "train.learning_rate was 0.005, is 0.1" in caught.value.what
    assert "seed was 17, is 3" in caught.value.what
    assert "--fresh" in caught.value.do


def test_what_does_not_touch_the_weights_may_change(few_rows, unbroken, tmp_path):
    recipe = recipe_in(few_rows, tmp_path / "run")
    assert run(recipe, kill_at_step(5)) == -signal.SIGKILL
    assert run(recipe_in(few_rows, tmp_path / "run", name="other", train={"eval_every": 7})) == 0
    found = picture(tmp_path / "run")
    assert found["weights"] == unbroken["weights"]
    assert found["metrics"] == unbroken["metrics"]


def test_changed_data_are_refused(few_rows, tmp_path):
    rows = tmp_path / "copy.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"copy {i}", "response": str(i)}) + "\n" for i in range(10)))
    tasks = [{**few_rows["tasks"][0], "data": str(rows)}, *few_rows["tasks"][1:]]
    recipe = recipe_in(few_rows, tmp_path / "run", tasks=tasks)
    assert run(recipe, kill_at_step(5)) == -signal.SIGKILL
    rows.write_text(rows.read_text().replace('"response": "3"', '"response": "4"'))
    with pytest.raises(UserError, match="another data of copy"):
        train(recipe, quiet=True)


def test_finished_run_returns_at_once_and_fresh_keeps_the_old_beside(few_rows, tmp_path):
    recipe = recipe_in(few_rows, tmp_path / "run")
    first = train(recipe, quiet=True, prove=False)
    gone = recipe.model_copy(update={"tasks": recipe.tasks})
    again = train(gone, quiet=True)
    assert again.scores.keys() == first.scores.keys() == {"copy", "twice", "shout"}
    assert again.seconds == first.seconds
    assert (again.adapter_dir, again.steps) == (tmp_path / "run" / "adapter", 8)
    mark = tmp_path / "run" / "mark"
    mark.touch()
    train(recipe, quiet=True, fresh=True, prove=False)
    assert not mark.exists()
    assert (tmp_path / "run.old-1" / "mark").exists()


def test_run_directory(few_rows, tmp_path):
    recipe = recipe_in(few_rows, tmp_path / "run", train={"eval_every": 4})
    result = train(recipe, quiet=True, prove=False)
    from mtft.recipe.load import load_recipe

    folder = tmp_path / "run"
    assert load_recipe(folder / "recipe.yaml") == recipe
    evals = lines(folder, "eval.jsonl")
    assert [line["step"] for line in evals] == [0, 4, 8]
    assert evals[-1]["tasks"] == {task: scores.summary() for task, scores in result.scores.items()}
    assert evals[-1]["tasks"]["copy"]["loss"] < evals[0]["tasks"]["copy"]["loss"]
    plan = json.loads((folder / "plan.json").read_text())
    assert plan["tasks"]["copy"]["asked"] == 0.5
    assert {"versions", "seed", "fingerprints"} <= json.loads((folder / "env.json").read_text()).keys()
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-6", "checkpoint-8"]
    assert not list(folder.glob("*.part"))
