"""`mtft run`, every stage, on models of some thousand parameters: what it leaves, and that it skips what stands."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mtft.common.errors import UserError
from mtft.pipeline import run_recipe
from mtft.recipe.schema.recipe import Recipe

STAGES = ["base", "single", "joint uniform", "joint predicted", "merged", "strong base", "fused", "strong tuned"]

pytestmark = pytest.mark.slow

LOAD_WITH_PEFT = """
import sys
from peft import PeftModel
from transformers import AutoModelForCausalLM
assert not any(name.split(".")[0] == "mtft" for name in sys.modules)
for folder in sys.argv[2:]:
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(sys.argv[1]), folder)
"""


@pytest.fixture(scope="module")
def finished(whole_recipe):
    recipe = Recipe.model_validate(whole_recipe)
    page = run_recipe(recipe)
    return recipe, page, Path(recipe.output.dir)


def test_results_hold_every_stage_task_and_metric(finished):
    recipe, _, root = finished
    results = json.loads((root / "results.json").read_text())
    assert list(results) == STAGES
    for stage in results.values():
        assert list(stage) == list(recipe.task_names)
        assert all({"loss", "token_accuracy", "exact_match"} <= set(row) for row in stage.values())


def test_page_names_every_stage(finished):
    _, page, _ = finished
    html = page.read_text()
    for title in ("Results", "Mixture", "Training", "Trials and surrogates", "Merge", "Fusion", "Environment"):
        assert title in html


def test_adapters_load_without_mtft(finished, tmp_path):
    recipe, _, root = finished
    script = tmp_path / "load.py"
    script.write_text(LOAD_WITH_PEFT)
    folders = [root / "train" / "joint" / "adapter", root / "merge" / "adapter"]
    subprocess.run([sys.executable, str(script), recipe.model.path, *map(str, folders)], check=True, cwd=tmp_path)


def test_second_call_runs_nothing_again(finished):
    recipe, page, root = finished
    watched = [*root.glob("train/*/metrics.jsonl"), root / "mix/ledger.jsonl", root / "merge/adapter/merge.json"]
    watched += [root / "fuse/fusion.json", *root.glob("*/scores/*.jsonl")]
    before = {path: path.stat().st_mtime_ns for path in watched}
    results = (root / "results.json").read_text()
    assert run_recipe(recipe) == page
    assert {path: path.stat().st_mtime_ns for path in watched} == before
    assert (root / "results.json").read_text() == results


def test_a_changed_recipe_is_refused_and_fresh_keeps_the_old_run(finished):
    recipe, _, root = finished
    longer = recipe.model_copy(update={"merge": recipe.merge.model_copy(update={"scale": 0.5})})
    with pytest.raises(UserError, match=r"merge\.scale was 1\.0, is 0\.5"):
        run_recipe(longer)
    joint = (root / "train/joint/metrics.jsonl").stat().st_mtime_ns
    run_recipe(longer, fresh=True)
    assert (root / "merge.old-1" / "adapter").is_dir()
    assert (root / "train/joint/metrics.jsonl").stat().st_mtime_ns == joint
