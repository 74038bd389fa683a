"""`--design cocktail`: every task alone, every pair, all; repeats with seeds of their own; and what the grid says."""

import csv
import io

import numpy as np
import pytest

from data_mixers.sweep.ledger import TrialLedger
from data_mixers.sweep.trial import done_records
from mtft.__main__ import main
from mtft.pipeline.stages import mix
from mtft.recipe.load import dump_recipe
from mtft.recipe.schema.recipe import Recipe


def test_the_grid_by_command_and_its_answers(whole_recipe, tmp_path, capsys):
    section = {**whole_recipe["sweep"], "repeats": 1, "design": "cocktail"}
    recipe = Recipe.model_validate({**whole_recipe, "sweep": section, "output": {"dir": str(tmp_path / "run")}})
    plain = recipe.model_copy(update={"sweep": recipe.sweep.model_copy(update={"design": "dirichlet"})})
    (tmp_path / "recipe.yaml").write_text(dump_recipe(plain))
    assert main(["mix", "design", str(tmp_path / "recipe.yaml"), "--design", "cocktail"]) == 0
    table = list(csv.reader(io.StringIO(capsys.readouterr().out)))
    shares = np.array([[float(cell) for cell in row[1:]] for row in table[1:]])
    assert len({row[0] for row in table[1:]}) == len(shares) == 14  # 7 mixtures of 3 tasks, each with two seeds
    assert sorted(np.count_nonzero(shares, axis=1).tolist()) == [1] * 6 + [2] * 6 + [3] * 2

    ledger = TrialLedger(mix.mix_dir(recipe) / mix.LEDGER)
    for trial in mix.design(recipe, mix._stores(recipe)):
        scores = {f"{task}/loss": 2.0 - trial.mixture["twice"] for task in recipe.task_names}
        ledger.append(done_records(trial, [(1.0, scores)], 1.0))
    row = mix.mix_synergy(recipe).splitlines()[1 + 1 + recipe.task_names.index("copy")].split()
    assert float(row[1]) == pytest.approx(1 / 3, abs=1e-3)  # with all others a third of the rows are of `twice`
