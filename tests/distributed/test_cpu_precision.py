"""Every precision of a CPU runs under every engine that is there without a GPU."""

import pytest

from mtft.training.run_training import train
from tests.distributed.test_engines import lines, write_recipes

pytestmark = pytest.mark.slow


def test_bf16_under_deepspeed_without_a_gpu(recipe, launch, tmp_path):
    whole = {name: write_recipes(recipe, tmp_path / name, ["bf16"], steps=4)["bf16"] for name in ("one", "two")}
    launch("zero2.yaml", "tests/distributed/measured.py", tmp_path / "two" / "bf16.yaml")
    train(whole["one"], quiet=True, prove=False)
    expected, found = (lines(tmp_path / name / "bf16") for name in ("one", "two"))
    assert len(found) == 4
    assert [line["loss"] for line in found] == pytest.approx([line["loss"] for line in expected], rel=1e-2)
