"""The file by which a folder is known as ours, damaged in every way: called damaged, never somebody else's."""

import pytest

from data_mixers.common.errors import MixError
from data_mixers.sweep.ledger import TrialLedger
from mtft.common.atomic_folder import CONTENTS, atomic_folder
from mtft.common.errors import UserError
from mtft.data.store.store_files import META, read_meta
from mtft.pipeline import run_stages
from mtft.pipeline.stages.stage_cache import DONE, STARTED, run_cached_stage
from mtft.recipe.schema.recipe import Recipe
from mtft.training.run_files.run_dir import refuse_foreign_folder
from tests.common.damage import NOT_FILES, UNREADABLE, damage


def recipe_in(folder):
    (folder.parent / "rows.jsonl").write_text('{"prompt": "a", "response": "b"}\n' * 4)
    task = {"name": "t", "data": str(folder.parent / "rows.jsonl"), "eval_data": str(folder.parent / "rows.jsonl")}
    values = {"name": "r", "model": {"path": "quickstart:weak"}, "tasks": [task], "train": {"steps": 2}}
    return Recipe.model_validate({**values, "output": {"dir": str(folder)}})


@pytest.fixture(autouse=True)
def no_stages(monkeypatch):
    """A folder that is not refused is not run either."""
    monkeypatch.setattr(run_stages, "_run_stages", lambda *arguments, **options: None)


def replace(folder):
    with atomic_folder(folder, overwrite=True) as made:
        (made / "new").touch()


# what the folder holds beside the marker, the marker, and what is done with the folder
MARKERS = {
    "run": (("recipe.yaml", "metrics.jsonl"), "env.json", refuse_foreign_folder),
    "pipeline": ((), "recipe.yaml", lambda folder: run_stages.run_recipe(recipe_in(folder))),
    "merge": (("adapter_config.json",), CONTENTS, replace),
    "stage": (("adapter",), DONE, lambda folder: run_cached_stage(folder, {}, lambda: None)),
    "stage, broken off": (("adapter",), STARTED, lambda folder: run_cached_stage(folder, {}, lambda: None)),
    "store": (("ids.bin",), META, read_meta),
    "sweep": (("fit.json",), "ledger.jsonl", lambda folder: TrialLedger(folder / "ledger.jsonl")),
}  # fmt: skip
EXCEPTIONS = {  # no damage: an empty ledger has no trials; texts and numbers are YAML, and no recipe
    ("sweep", "empty"): "no trials yet",
}


@pytest.mark.parametrize("kind", UNREADABLE)
@pytest.mark.parametrize("place", MARKERS)
def test_it_is_called_damaged(tmp_path, place, kind):
    if (place, kind) in EXCEPTIONS:
        pytest.skip(EXCEPTIONS[place, kind])
    others, marker, use = MARKERS[place]
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in others:
        (folder / name).touch()
    damage(folder / marker, kind)
    with pytest.raises((UserError, MixError)) as caught:
        use(folder)
    text = str(caught.value)
    assert marker in text
    assert any(word in text for word in ("damaged", "not a file", "not a ledger", "not a recipe")), text
    assert not any(word in text for word in ("is no run's", "did not write")), text
    assert caught.value.do
    assert sorted(path.name for path in folder.iterdir()) == sorted([*others, marker])
    assert (folder / marker).is_file() != (kind in NOT_FILES)
