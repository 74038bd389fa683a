"""`sweep.design: damo`: whole examples of a trial's batch, inside the floors, beside the current mixture."""

import csv
import io

import numpy as np
import pytest

from mtft.__main__ import main
from mtft.pipeline.stages import mix
from mtft.recipe.load import dump_recipe
from mtft.recipe.schema.recipe import Recipe


def recipe_of(whole_recipe, home, **sweep):
    content = {**whole_recipe, "sweep": {**whole_recipe["sweep"], **sweep}, "output": {"dir": str(home / "run")}}
    return Recipe.model_validate(content)


def test_shares_are_whole_examples_of_a_batch(whole_recipe, tmp_path, capsys):
    recipe = recipe_of(whole_recipe, tmp_path, design="damo", repeats=1, batch_tokens=320)
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    assert main(["mix", "design", str(tmp_path / "recipe.yaml")]) == 0, capsys.readouterr().err
    table = list(csv.reader(io.StringIO(capsys.readouterr().out)))
    shares = np.array([[float(cell) for cell in row[1:]] for row in table[1:]])
    stores = mix._stores(recipe)
    batch = mix._trial_batch(recipe, stores, mix.current_mixture(recipe))
    assert batch == int(320 // np.average([store.lengths.mean() for store in stores], weights=[len(s) for s in stores]))
    assert len(shares) == 12
    assert np.all(shares[:2] == shares[0])  # the current mixture and its repeat
    drawn = shares[2:] * batch
    np.testing.assert_allclose(drawn, np.round(drawn), atol=1e-4 * batch)
    assert np.all(shares[:, 0] >= 0.1 - 1e-6)  # the floor of copy
    assert len(np.unique(shares[2:], axis=0)) == 10
    (tmp_path / "plain.yaml").write_text(dump_recipe(recipe_of(whole_recipe, tmp_path, repeats=1, batch_tokens=320)))
    assert main(["mix", "design", str(tmp_path / "plain.yaml"), "--design", "damo"]) == 0
    assert list(csv.reader(io.StringIO(capsys.readouterr().out))) == table


def test_a_batch_of_too_few_examples_is_told(whole_recipe, tmp_path, capsys):
    recipe = recipe_of(whole_recipe, tmp_path, design="damo", batch_tokens=64, trials=60)
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    assert main(["mix", "design", str(tmp_path / "recipe.yaml")]) == 2
    assert "59 mixtures asked" in (said := capsys.readouterr().err)
    assert "a larger batch" in said


@pytest.mark.parametrize("unit", ["examples", "tokens"])
def test_with_unit_tokens_the_papers_batch(whole_recipe, tmp_path, unit):
    content = {**whole_recipe, "mixture": {"unit": unit}}
    recipe = recipe_of(content, tmp_path, design="damo", trials=6)
    batch = mix._trial_batch(recipe, mix._stores(recipe), mix.current_mixture(recipe))
    assert (batch == 16) == (unit == "tokens")
