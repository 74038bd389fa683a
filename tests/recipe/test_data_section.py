"""`data` says how rows are tokenised, which changes nothing that comes out: neither a run's identity nor its basis."""

from __future__ import annotations

from pathlib import Path

import pytest

from mtft.common.errors import UserError
from mtft.recipe.load import fingerprint
from mtft.training.run_files.run_dir import check_same_recipe, training_keys


def test_a_misspelt_key_is_named(folder):
    assert folder.error("data={backnd: ray}").do == "did you mean backend?"
    assert "one of processes, ray" in str(folder.error("data.backend=rey"))
    assert folder.error("data=rows.jsonl").do.startswith("files of rows stand with their task")
    assert "data.workers" in str(folder.error("data.workers=0"))


def test_a_run_goes_on_with_another_backend(folder):
    plain, other = folder.load(), folder.load("data.backend=ray", "data.workers=3")
    assert other.data != plain.data
    assert fingerprint(other) == fingerprint(plain)
    assert training_keys(other) == training_keys(plain)
    before = plain.model_dump(mode="json")
    check_same_recipe(before, other, Path("result.json"))
    del before["data"]  # as versions before the section wrote it
    check_same_recipe(before, other, Path("result.json"))
    with pytest.raises(UserError, match=r"train\.steps"):
        check_same_recipe(before, folder.load("train.steps=7"), Path("result.json"))
