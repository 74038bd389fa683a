"""Early stopping, dropped tasks and the best weights: the rule on numbers, then whole runs, broken ones included."""

import json
import signal
from contextlib import nullcontext

import pytest
import torch
from safetensors.torch import load_file

from mtft.common.errors import UserError
from mtft.recipe.load import dump_recipe
from mtft.training.callbacks.early_stopping import EarlyStopping
from mtft.training.run_files.run_dir import check_recipe
from mtft.training.run_training import train
from tests.training.conftest import lines
from tests.training.test_run_training import kill_at_step, picture, recipe_in, run

TASKS = ("a", "b")


def follow(stopping, curve):
    """Steps 10, 20, ... with these losses of a and b; what was said."""
    return [line for i, (a, b) in enumerate(curve) for line in stopping.observe(10 * (i + 1), {"a": a, "b": b})]


def test_patience_counts_evaluations_in_a_row():
    stopping = EarlyStopping(TASKS, patience=2)
    follow(stopping, [(1.0, 1.0), (0.8, 1.1), (0.9, 1.1), (0.7, 1.1)])
    assert stopping.ended is None
    assert (stopping.run.step, stopping.run.since) == (40, 0)
    follow(stopping, [(0.0, 0.0)] * 4)  # the same steps again: nothing is counted twice
    assert stopping.run.step == 40
    for step in (50, 60):
        stopping.observe(step, {"a": 2.0, "b": 2.0})
    assert stopping.ended == "no better mean held-out loss since step 40"


@pytest.mark.parametrize("watch, best", [("mean", 20), ("worst", 10), ("a", 30)])
def test_what_is_watched(watch, best):
    stopping = EarlyStopping(TASKS, watch=watch)
    follow(stopping, [(1.0, 1.0), (0.5, 1.1), (0.3, 1.4)])
    assert stopping.run.step == best
    assert stopping.better(best)


def test_min_delta_and_nan_are_no_progress():
    stopping = EarlyStopping(TASKS, patience=3, min_delta=0.1)
    follow(stopping, [(1.0, 1.0), (0.95, 0.95), (float("nan"), 0.1), (0.91, 0.91)])
    assert stopping.run.step == 10
    assert stopping.ended is not None


def test_a_task_is_dropped_and_its_share_goes_to_the_others():
    stopping = EarlyStopping(("a", "b", "c"), task_patience=2)
    w_K = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    assert stopping.weigh(w_K) is w_K
    for step, a in enumerate([1.0, 1.1, 1.2, 0.1]):
        stopping.observe(step, {"a": a, "b": 1 - step / 10, "c": 1 - step / 10})
    assert stopping.dropped == {"a": 2}
    assert stopping.weigh(w_K).tolist() == [0, 2, 3]
    assert stopping.weigh(torch.tensor([1.0, 0, 0])).tolist() == [1, 0, 0]  # nothing else counts: left alone
    twin = EarlyStopping(("a", "b", "c"), task_patience=2)
    twin.load_state_dict(json.loads(json.dumps(stopping.state_dict())))
    assert twin == stopping
    for step in (10, 11):
        stopping.observe(step, {"a": 1.0, "b": 2.0, "c": 2.0})
    assert stopping.ended == "every task is dropped"


def overfitting(few_rows, folder, **changes):
    """Learns so fast that the held-out loss of some task soon rises."""
    settings = {"steps": 16, "warmup": 0, "eval_every": 1, **changes.pop("train", {})}
    recipe = recipe_in(few_rows, folder, train=settings, **{"loss": {}, **changes})
    return recipe


@pytest.fixture(scope="module")
def few_rows(recipe):
    return {**recipe, "tasks": [{**task, "limit": 6} for task in recipe["tasks"]]}


@pytest.mark.slow
def test_a_run_ends_early_and_hands_over_the_best(few_rows, tmp_path):
    def with_best(folder):
        recipe = overfitting(few_rows, folder, train={"steps": 60, "patience": 2, "learning_rate": 0.5})
        return recipe.model_copy(update={"output": recipe.output.model_copy(update={"export": "best"})})

    result = train(with_best(tmp_path / "run"), quiet=True, prove=False)
    evals = lines(tmp_path / "run", "eval.jsonl")
    means = {line["step"]: sum(task["loss"] for task in line["tasks"].values()) / 3 for line in evals}
    best = min(means, key=means.get)
    content = json.loads((tmp_path / "run" / "result.json").read_text())
    assert content["exported_step"] == best
    assert f"The weights are those of step {best}." in (tmp_path / "run" / "adapter" / "README.md").read_text()
    assert content["steps"] == best + 2 < 60
    assert content["ended"].startswith("no better mean")
    found = sum(scores.summary()["loss"] for scores in result.scores.values()) / 3
    assert found == pytest.approx(means[best])
    kept = load_file(tmp_path / "run" / "best" / "weights.safetensors")
    exported = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert {name.replace(".default", ""): value.tolist() for name, value in kept.items()} == {
        name: value.tolist() for name, value in exported.items()
    }

    def die_at_the_end():
        import os

        from mtft.training import finalize

        finalize.write_card = lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL)

    again = with_best(tmp_path / "again")  # killed when only the end is missing: it does not train on
    assert run(again, die_at_the_end) == -signal.SIGKILL
    assert run(again) == 0
    assert picture(tmp_path / "again") == picture(tmp_path / "run")


@pytest.mark.slow
def test_an_auxiliary_task_does_not_choose_the_weights(few_rows, tmp_path):
    """Its held-out answers are none that are trained, so it gets worse while the others get better."""
    wrong = tmp_path / "wrong.jsonl"
    wrong.write_text(json.dumps({"prompt": "twice: a", "response": "% % % % % % % % % % %"}) + "\n")
    tasks = [dict(task) for task in few_rows["tasks"]]
    tasks[1] |= {"auxiliary": True, "eval_data": str(wrong)}
    settings = {"steps": 6, "eval_every": 2, "learning_rate": 0.05}
    recipe = overfitting({**few_rows, "tasks": tasks}, tmp_path / "run", train=settings)
    recipe = recipe.model_copy(update={"output": recipe.output.model_copy(update={"export": "best"})})
    train(recipe, quiet=True, prove=False)
    best = {}
    for names in (("copy", "shout"), ("copy", "twice", "shout")):
        evals = lines(tmp_path / "run", "eval.jsonl")
        sums = {line["step"]: sum(line["tasks"][name]["loss"] for name in names) for line in evals}
        best[len(names)] = min(sums, key=sums.get)
    assert best[2] != best[3], "else the test could not tell"
    content = json.loads((tmp_path / "run" / "result.json").read_text())
    assert content["exported_step"] == best[2]
    assert "| twice (auxiliary) |" in (tmp_path / "run" / "adapter" / "README.md").read_text()


@pytest.mark.slow
def test_a_dropped_task_stays_dropped_when_a_run_goes_on(few_rows, tmp_path):
    def recipe(folder):
        return overfitting(few_rows, folder, train={"task_patience": 1, "steps": 12, "learning_rate": 0.01})

    train(recipe(tmp_path / "run"), quiet=True, prove=False)
    content = json.loads((tmp_path / "run" / "result.json").read_text())
    assert content["dropped_tasks"]
    for task, step in content["dropped_tasks"].items():
        assert {line["tasks"][task]["weight"] for line in lines(tmp_path / "run") if line["step"] > step} <= {0.0}
    for line in lines(tmp_path / "run"):
        shares = [values["loss_share"] for values in line["tasks"].values()]
        assert sum(shares) == pytest.approx(1)
    middle = min(content["dropped_tasks"].values()) + 2
    assert run(recipe(tmp_path / "broken"), kill_at_step(middle)) == -signal.SIGKILL
    assert run(recipe(tmp_path / "broken")) == 0
    assert picture(tmp_path / "broken") == picture(tmp_path / "run")


def test_with_patience_the_evaluations_are_part_of_the_run(few_rows, tmp_path):
    """Without it they may be taken more or less often when a run goes on; with it they decide."""
    for patience, refused in ((None, False), (2, True)):
        before = overfitting(few_rows, tmp_path / str(refused), train={"patience": patience})
        now = overfitting(few_rows, tmp_path / str(refused), train={"patience": patience, "eval_every": 2})
        (tmp_path / str(refused)).mkdir()
        (tmp_path / str(refused) / "recipe.yaml").write_text(dump_recipe(before))
        with pytest.raises(UserError, match="eval_every was 1, is 2") if refused else nullcontext():
            check_recipe(tmp_path / str(refused), now)
