"""The folder of a run where an adapter is wanted: its adapter is proposed, or scored, and what is scored is said."""

import json

import pytest
import yaml

from mtft.__main__ import main
from mtft.common.run_folders import adapters_in
from mtft.recipe.schema.recipe import Recipe
from mtft.training.run_training import train


@pytest.fixture(scope="module")
def home(whole_recipe, tmp_path_factory):
    """<home>/recipe.yaml, its finished run in <home>/run, and the same without an adapter in <home>/whole."""
    home = tmp_path_factory.mktemp("runs")
    content = {key: value for key, value in whole_recipe.items() if key not in ("sweep", "fuse", "run")}
    content |= {"train": {**content["train"], "steps": 2, "eval_on_start": False}, "output": {"dir": str(home / "run")}}
    content["merge"] = {"method": "linear", "adapters": [str(home / "run"), str(home / "run" / "adapter")]}
    (home / "recipe.yaml").write_text(yaml.safe_dump(content))
    train(Recipe.model_validate(content), prove=False, quiet=True)
    full = {**content, "lora": None, "output": {"dir": str(home / "whole")}}
    full.pop("merge")
    train(Recipe.model_validate(full), prove=False, quiet=True)
    return home


def said(capsys, *arguments):
    code = main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.parametrize(
    "command",
    [
        ("merge", "RUN", "RUN/adapter", "--out", "HOME/merged"),
        ("merge", "--experts", "twin", "RUN", "RUN/adapter", "--out", "HOME/merged"),
        ("merge", "--experts", "arrow", "RUN", "RUN/adapter", "--out", "HOME/merged"),
        ("merge", "HOME/recipe.yaml"),
        ("eval", "HOME/recipe.yaml", "--adapter", "RUN"),
    ],
)
def test_the_adapter_of_a_run_is_proposed(home, capsys, command):
    places = {"RUN": str(home / "run"), "HOME": str(home)}
    for name, place in places.items():
        command = [word.replace(name, place) for word in command]
    code, _, err = said(capsys, *command)
    assert code == 2
    assert f"{home / 'run'} is the folder of a run, not of an adapter" in err
    assert f"give {home / 'run' / 'adapter'}" in err


def loss(out):
    return {task: scores["loss"] for task, scores in json.loads(out).items()}


def test_eval_scores_the_run_s_adapter_or_says_that_it_is_the_base(home, capsys):
    run = home / "run"
    _, out, err = said(capsys, "eval", home / "recipe.yaml", "--adapter", run / "adapter")
    tuned = loss(out)
    for recipe in (run, run / "recipe.yaml"):
        code, out, err = said(capsys, "eval", recipe)
        assert code == 0, err
        assert f"with {run / 'adapter'}" in err
        assert loss(out) == tuned
    _, out, err = said(capsys, "eval", home / "recipe.yaml")
    base = loss(out)
    assert base != tuned
    assert f"that is the base model; what the recipe's run made of it: --adapter {run / 'adapter'}" in err
    _, out, err = said(capsys, "eval", run, "--base")
    assert loss(out) == base
    assert "with" not in err
    assert said(capsys, "eval", run, "--base", "--adapter", run / "adapter")[0] == 2


def test_eval_scores_the_model_that_full_fine_tuning_left(home, capsys):
    code, out, err = said(capsys, "eval", home / "whole")
    assert code == 0, err
    assert f"scored: {home / 'whole'}" in err
    assert loss(out) != loss(said(capsys, "eval", home / "whole", "--base")[1])


def test_eval_against_a_run_is_against_what_it_handed_over(home, capsys, tmp_path):
    code, out, err = said(capsys, "eval", home / "recipe.yaml", "--against", home / "run")
    assert code == 0, err
    assert f"against: {home / 'run' / 'adapter'}" in err
    by_adapter = said(capsys, "eval", home / "recipe.yaml", "--against", home / "run" / "adapter")[1]
    assert json.loads(out) == json.loads(by_adapter)
    for task in json.loads(out).values():
        rates = task["against"]["right_or_wrong"]["exact_match"]
        assert set(rates) == {"flips", "negative_rate", "positive_rate", "churn"}
        assert sum(rates["flips"].values()) == task["examples"]
        lower, upper = rates["churn"]["interval"]
        assert 0 <= lower <= rates["churn"]["value"] <= upper <= 1
    code, out, err = said(capsys, "eval", home / "run", "--against", home / "whole")  # a model against an adapter
    assert code == 0, err
    assert f"against: {home / 'whole'}" in err
    (tmp_path / "recipe.yaml").write_text((home / "run" / "recipe.yaml").read_text())
    code, _, err = said(capsys, "eval", home / "recipe.yaml", "--against", tmp_path)
    assert code == 2
    assert "the run is not finished" in err


def test_a_run_that_is_not_finished_is_not_scored_as_its_base(home, capsys, tmp_path):
    (tmp_path / "recipe.yaml").write_text((home / "run" / "recipe.yaml").read_text())
    code, _, err = said(capsys, "eval", tmp_path)
    assert code == 2
    assert "the run is not finished" in err


def test_checkpoints_are_no_adapters(home):
    assert adapters_in(home / "run") == [home / "run" / "adapter"]
