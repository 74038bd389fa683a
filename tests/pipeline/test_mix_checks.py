"""sweep.checks reaches the sweep and the trials."""

from types import SimpleNamespace

import pytest

from data_mixers.sweep.early_termination import EarlyTermination
from mtft.pipeline.stages import mix
from mtft.recipe.schema.recipe import Recipe


@pytest.mark.parametrize(("checks", "stopping"), [((0.5,), EarlyTermination(6)), ((), None)])
def test_checks_reach_the_sweep(whole_recipe, monkeypatch, tmp_path, checks, stopping):
    seen = {}

    def run_sweep(trials, run_trial, ledger, **options):
        seen.update(options, checks=run_trial.keywords["checks"])
        return SimpleNamespace()

    monkeypatch.setattr(mix, "run_sweep", run_sweep)
    sweep = {**whole_recipe["sweep"], "checks": list(checks), "full_trials": 6}
    mix.mix_sweep(Recipe.model_validate({**whole_recipe, "sweep": sweep, "output": {"dir": str(tmp_path)}}))
    assert seen["checks"] == checks
    assert seen["stopping"] == stopping
