"""The recipe's merge section reaches merge() whole."""

import json

import numpy as np
import pytest

from mtft.adapters.lora_factors import read_adapter
from mtft.common.errors import MergeError
from mtft.merge.from_recipe import merge_from_recipe
from mtft.recipe.schema.recipe import Recipe
from tests.merge import golden as g


def recipe(tmp_path, **section):
    return Recipe.model_validate(
        {
            "name": "x",
            "model": {"path": "tiny"},
            "tasks": [{"name": "a", "data": "a.jsonl"}],
            "train": {"steps": 1},
            "output": {"dir": str(tmp_path / "run")},
            "merge": section or None,
        }
    )


def test_section_is_run(tmp_path):
    paths = [str(path) for path in g.write_golden(tmp_path / "in")]
    section = {
        "adapters": paths,
        "weights": [0.5, 0.3, 0.2],
        "rank": 2,
        "scale": 2.0,
        "average": True,
        "min_energy": 0.1,
    }
    report = merge_from_recipe(recipe(tmp_path, **section))
    assert report.out == tmp_path / "run" / "merge" / "adapter"
    assert report.energy == pytest.approx(0.829946902, abs=1e-7)
    facts = json.loads((report.out / "merge.json").read_text())
    assert facts["settings"]["seed"] == 17
    assert facts["diagnostics"]["names"] == ["one", "two", "three"]


def test_rules_for_modules(tmp_path):
    one, two, _ = g.factors()
    paths = [g.write(tmp_path / n, {"layers.0.q": f, "layers.1.q": f}) for n, f in (("a", one), ("b", two))]
    rule = {"modules": r"layers\.1", "weights": [0.0, 1.0]}
    section = {"adapters": [str(path) for path in paths], "per_module": [rule], "rank": "lossless"}
    out = read_adapter(merge_from_recipe(recipe(tmp_path, **section)).out)
    np.testing.assert_allclose(g.delta(out.factors("layers.0.q")), g.delta(one) + g.delta(two), atol=1e-6)
    np.testing.assert_allclose(g.delta(out.factors("layers.1.q")), g.delta(two), atol=1e-6)


def test_adapters_and_out_may_be_given(tmp_path):
    paths = g.write_golden(tmp_path / "in")
    assert merge_from_recipe(recipe(tmp_path, method="tsv"), paths[:2], tmp_path / "here").out == tmp_path / "here"


def test_nothing_to_merge(tmp_path):
    with pytest.raises(MergeError, match="no section"):
        merge_from_recipe(recipe(tmp_path))
    with pytest.raises(MergeError, match="no adapters"):
        merge_from_recipe(recipe(tmp_path, method="tsv"))
