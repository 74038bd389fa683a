"""A trial is an ordinary short run: the same scores, nothing on disk, nothing left for the next one."""

import pickle
from functools import partial

import pytest

from data_mixers.mixture.mixture import Mixture
from data_mixers.sweep.early_termination import learn_stop_rule
from data_mixers.sweep.trial import Trial
from mtft.recipe.schema.recipe import Recipe
from mtft.training import sweep_trial
from mtft.training.run_training import train
from mtft.training.sweep_trial import run_trial


@pytest.fixture
def short(recipe):
    return Recipe.model_validate({**recipe, "train": {**recipe["train"], "steps": 3}})


def trial(copy, seed=17):
    return Trial(Mixture.of({"copy": copy, "twice": 0.3, "shout": 0.7 - copy}), seed=seed)


@pytest.mark.slow
def test_scores_of_an_ordinary_run_with_that_mixture(short, recipe, tmp_path):
    ((progress, scores),) = run_trial(trial(0.4), short)
    shares = {"shares": {"copy": 0.4, "twice": 0.3, "shout": 0.3}}
    whole = Recipe.model_validate(
        {
            **recipe,
            "train": {**recipe["train"], "steps": 3},
            "mixture": shares,
            "output": {"dir": str(tmp_path / "run")},
        }
    )
    result = train(whole, quiet=True, prove=False)
    expected = {f"{task}/loss": found.summary()["loss"] for task, found in result.scores.items()}
    assert progress == 1.0
    assert {key: value for key, value in scores.items() if key.endswith("/loss")} == pytest.approx(expected, rel=1e-6)


def test_trials_do_not_touch_each_other_or_the_disk(short):
    work = pickle.loads(pickle.dumps(partial(run_trial, recipe=short, eval_limit=4)))  # noqa: S301  (as a worker does)
    first = work(trial(0.1))
    second = work(trial(0.6))
    assert work(trial(0.1)) == first
    assert second != first
    assert work(trial(0.1, seed=3)) != first
    from pathlib import Path

    assert not Path(short.output.dir).exists()


def test_diverged_trial_is_a_result_with_nan(short):
    wild = short.train.model_copy(update={"learning_rate": 1e30, "max_bad_steps": 2, "max_grad_norm": 0.0, "steps": 8})
    ((_, scores),) = run_trial(trial(0.4), short.model_copy(update={"train": wild, "lora": None}))
    assert all(value != value for value in scores.values())


def test_checks_on_the_way_change_nothing_and_a_hopeless_trial_ends_there(short):
    longer = short.model_copy(update={"train": short.train.model_copy(update={"steps": 4})})
    ((_, plain),) = run_trial(trial(0.4), longer, eval_limit=4)
    points = run_trial(trial(0.4), longer, eval_limit=4, checks=(0.25, 0.5))
    assert [progress for progress, _ in points] == [0.25, 0.5, 1.0]
    assert points[-1][1] == plain
    assert points[0][1] != points[1][1]

    def course(loss_in_the_middle, loss_at_the_end):
        losses = ((0.5, loss_in_the_middle), (1.0, loss_at_the_end))
        return [(progress, {"copy/loss": loss}) for progress, loss in losses]

    rule = learn_stop_rule(
        [course(0.01 * i, 0.01 * i) for i in range(8)], {"copy/loss": "min"}
    )  # all far better than this trial
    stopped = run_trial(trial(0.4), longer, eval_limit=4, checks=(0.25, 0.5), stop=rule)
    assert [progress for progress, _ in stopped] == [0.25, 0.5]
    assert stopped == points[:2]


def test_what_is_drawn_by_row_is_the_same_in_every_trial(short, monkeypatch):
    """Trials have seeds of their own; which template or demonstrations a row has hangs on the recipe's."""
    seeds, read = [], sweep_trial.read_training_inputs
    monkeypatch.setattr(sweep_trial, "read_training_inputs", lambda r, **k: (seeds.append(r.seed), read(r, **k))[1])
    monkeypatch.setattr(sweep_trial, "_kept", None)
    for seed in (3, 4):
        run_trial(trial(0.4, seed=seed), short, eval_limit=2)
    assert seeds == [short.seed]
