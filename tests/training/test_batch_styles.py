"""Steps of one task, micro-batches of one task and a mixture that changes, through whole training runs."""

import json
import signal

import pytest

from mtft.training.run_training import train
from tests.training.conftest import lines
from tests.training.test_run_training import kill_at_step, picture, recipe_in, run

RAMP = {
    "schedule": [
        {"at": 0, "shares": {"copy": 0.8, "twice": 0.2, "shout": 0}},
        {"at": 1, "shares": {"copy": 0.1, "twice": 0.1, "shout": 0.8}},
    ]
}


@pytest.fixture(scope="module")
def few_rows(recipe):
    return {**recipe, "tasks": [{**task, "limit": 10} for task in recipe["tasks"]]}


@pytest.mark.slow
@pytest.mark.parametrize("style", ["unmixed", "alternating"])
def test_a_killed_run_goes_on_in_the_schedule(few_rows, tmp_path, style):
    """R13 for a curriculum: the right place of the right epoch, in the right mixture, bit for bit."""
    changes = {"mixture": {"shares": RAMP}, "train": {"batch_style": style}}
    whole = recipe_in(few_rows, tmp_path / "whole", **changes)
    train(whole, quiet=True, prove=False)
    broken = recipe_in(few_rows, tmp_path / "broken", **changes)
    for step in (2, 6):
        assert run(broken, kill_at_step(step)) == -signal.SIGKILL
    assert run(broken) == 0
    assert picture(tmp_path / "broken") == picture(tmp_path / "whole")

    plan = json.loads((tmp_path / "whole" / "plan.json").read_text())
    assert plan["style"] == style
    shout = [span["asked"]["shout"] for span in plan["spans"]]
    assert shout == sorted(shout)
    metrics = lines(tmp_path / "whole")
    present = [[name for name, task in line["tasks"].items() if task["examples"]] for line in metrics]
    if style == "alternating":
        assert {len(names) for names in present} == {1}
    else:
        assert max(len(names) for names in present) == 3


def test_unmixed_steps_have_the_gradient_of_mixed_ones(few_rows, tmp_path):
    """The denominators are those of the whole step, so how its micro-batches are cut changes rounding only."""
    found = {}
    for style in ("mixed", "unmixed"):
        changes = {"train": {"batch_style": style, "steps": 3}, "lora": {"r": 4, "alpha": 8, "dropout": 0.0}}
        train(recipe_in(few_rows, tmp_path / style, **changes), quiet=True, prove=False)
        found[style] = [line["loss"] for line in lines(tmp_path / style)]
    assert found["unmixed"] == pytest.approx(found["mixed"], rel=1e-5)
