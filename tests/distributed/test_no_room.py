"""No memory for a second copy of the base at the end of a sharded run: a note, and every rank comes to its end."""

import json

import pytest

from mtft.recipe.load import dump_recipe
from tests.distributed.test_engines import write_recipes

pytestmark = pytest.mark.slow


def test_out_of_memory_in_the_proof_of_a_sharded_run_ends_no_rank(recipe, launch, tmp_path):
    """Whatever way an allocator says it. The launch fails with any of its ranks."""
    names = ("class", "text")
    for name in names:
        whole = write_recipes(recipe, tmp_path / name, ["adamw"], steps=2, eval_every=2)["adamw"]
        (tmp_path / f"{name}.yaml").write_text(dump_recipe(whole.model_copy(update={"name": name})))
    launch("fsdp2.yaml", "tests/distributed/no_room.py", *(tmp_path / f"{name}.yaml" for name in names))
    for name in names:
        result = json.loads((tmp_path / name / "adamw" / "result.json").read_text())
        assert "no memory for a second copy of the base" in result["not_proved"]
        assert result["state"] == "trained"
