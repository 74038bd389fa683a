"""A sweep whose objective is a generated score: broken off and continued it is as if it had never been."""

import json

import pytest

from data_mixers.sweep.ledger import TrialLedger
from mtft.common.errors import UserError
from mtft.pipeline.stages import mix
from mtft.recipe.schema.recipe import Recipe


@pytest.fixture
def sweeping(whole_recipe, tmp_path):
    def make(folder, **sweep):
        asking = {"metrics": ["loss", "f1"], "generate": {"max_new_tokens": 4}}
        tasks = [{**task, **asking} for task in whole_recipe["tasks"]]
        given = {"trials": 4, "steps": 2, "eval_limit": 4, "objective": {"copy/f1": 2, "twice": 1}, **sweep}
        return Recipe.model_validate(
            {**whole_recipe, "tasks": tasks, "sweep": given, "output": {"dir": str(tmp_path / folder)}}
        )

    return make


class Broken(Exception):
    pass


@pytest.mark.slow
def test_broken_off_and_continued(sweeping):
    whole, broken = sweeping("whole"), sweeping("broken")
    mix.mix_sweep(whole)

    done = []

    def stop(trial, outcome):
        done.append(trial.id)
        if len(done) == 2:
            raise Broken

    with pytest.raises(Broken):
        mix.mix_sweep(broken, on_done=stop)
    assert len(TrialLedger(mix.mix_dir(broken) / mix.LEDGER).records) == 2
    assert mix.mix_sweep(broken).exit_code == 0
    scores = [
        {record.trial: record.scores for record in TrialLedger(mix.mix_dir(recipe) / mix.LEDGER).records}
        for recipe in (whole, broken)
    ]
    assert scores[0] == scores[1]
    assert len(scores[0]) == 4
    first = next(iter(scores[0].values()))
    assert {"copy/f1", "copy/loss", "twice/loss"} <= first.keys()
    assert "twice/f1" not in first  # only what the objective names is generated
    line = json.loads((mix.mix_dir(whole) / mix.LEDGER).read_text().splitlines()[0])
    assert line["goal"] == {"copy/f1": "max", "twice/loss": "min"}
    assert mix.mix_propose(whole).verdict == "too few trials to say"


def test_what_is_fitted_and_which_way_is_better(sweeping):
    from mtft.pipeline.stages.sweep_targets import fitted_targets, sweep_goals, sweep_objective

    recipe = sweeping("run")
    assert sweep_objective(recipe) == {"copy/f1": 2, "twice/loss": 1}
    assert sweep_goals(recipe) == {"copy/f1": "max", "twice/loss": "min"}
    fitted = fitted_targets(recipe)
    assert list(fitted) == ["copy/f1", "twice/loss", "copy/loss", "shout/loss"]
    assert fitted["copy/f1"].bounds == (0.0, 1.0)
    worst = sweeping("run", objective="worst/f1")
    assert sweep_objective(worst) == "worst"
    assert list(fitted_targets(worst)) == ["copy/f1", "twice/f1", "shout/f1"]


@pytest.mark.slow
def test_other_scores_are_other_trials(sweeping):
    """Trials that were not asked for a score say nothing of it."""
    losses, answers = sweeping("run", objective="mean", trials=2), sweeping("run", trials=2)
    mix.mix_sweep(losses)
    with pytest.raises(UserError, match="copy/f1"):
        mix.mix_propose(answers)
    ran = mix.mix_sweep(answers)
    assert len(ran.done) == 2
    # the ledger holds both; each recipe goes by its own
    assert [len(mix.own_trials(recipe).records) for recipe in (losses, answers)] == [2, 2]
    assert mix.mix_propose(answers).verdict == "too few trials to say"


def test_metrics_beside_the_objective_make_no_other_trials(sweeping):
    """A metric that is only reported costs no sweep; how the objective's answers are made does."""
    from mtft.data.store.token_store import open_stores
    from mtft.models.loading import load_tokenizer

    recipe = sweeping("run")
    stores = open_stores(recipe, load_tokenizer(recipe.model), "train")

    def config(**changed):
        tasks = (recipe.tasks[0].model_copy(update=changed), *recipe.tasks[1:])
        return mix.trial_config(recipe.model_copy(update={"tasks": tasks}), stores)

    before = config()
    assert config(metrics=("loss", "f1", "rouge_l")) == before
    shorter = recipe.tasks[0].generate.model_copy(update={"max_new_tokens": 3})
    assert config(generate=shorter) != before
