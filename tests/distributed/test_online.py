"""A mixture that changes online: two ranks decide and play what one process does."""

import json

import pytest

from mtft.recipe.load import dump_recipe
from mtft.recipe.schema.recipe import Recipe
from mtft.training.run_training import train

pytestmark = pytest.mark.slow
ONLINE = {
    "bandit": {"name": "bandit", "every": 2, "scale": 0.5},
    "group_dro": {"name": "group_dro", "every": 2, "reference": {"copy": 1.0, "twice": 4.0, "shout": 4.0}, "eta": 0.3},
    "linear_law": {"name": "linear_law", "every": 5, "probe_steps": 1, "eta": 4.0},
}


def test_two_ranks_decide_what_one_decides(recipe, launch, tmp_path):
    """The same changes in all methods and with one task a step; the checkpoints hold the same plan."""
    cases = {name: (online, "mixed") for name, online in ONLINE.items()}
    cases["alternating"] = (ONLINE["bandit"], "alternating")

    def whole(case, ranks, steps=12):
        online, style = cases[case]
        settings = {**recipe["train"], "steps": steps, "learning_rate": 1e-3, "micro_batch_tokens": 64}
        return Recipe.model_validate(
            {
                **recipe,
                "mixture": {"shares": "uniform", "online": online, "caps": {"shout": 0.5}, "max_epochs": 30},
                "lora": {"r": 4, "alpha": 8, "dropout": 0.0},
                "train": {**settings, "batch_style": style},
                "output": {"dir": str(tmp_path / f"{case}-{ranks}"), "save_every": 4, "keep": 5},
            }
        )

    (tmp_path / "recipes").mkdir()
    for case in cases:
        train(whole(case, 1), quiet=True, prove=False)
        (tmp_path / "recipes" / f"{case}.yaml").write_text(dump_recipe(whole(case, 2)))
    program = __file__.replace("test_online.py", "options.py")
    launch("ddp.yaml", "--num_processes", "2", program, tmp_path / "recipes")
    for case in cases:
        one, two = (
            [json.loads(line) for line in (tmp_path / f"{case}-{ranks}" / "metrics.jsonl").read_text().splitlines()]
            for ranks in (1, 2)
        )
        assert len(one) == len(two) == 12
        changes = [[line["mixture"] for line in found if "mixture" in line] for found in (one, two)]
        assert len(changes[0]) == len(changes[1]) >= 2
        for a, b in zip(*changes):
            assert a["from"] == b["from"]
            assert b["shares"] == pytest.approx(a["shares"], abs=2e-4)  # the last digit, where it falls on an edge
        for a, b in zip(one, two):
            assert b["loss"] == pytest.approx(a["loss"], abs=1e-5)
            for task in a["tasks"]:
                assert a["tasks"][task]["examples"] == b["tasks"][task]["examples"]
        plans = [json.loads((tmp_path / f"{case}-{ranks}" / "plan.json").read_text()) for ranks in (1, 2)]
        for task, row in plans[0]["tasks"].items():
            assert row["rows"] == plans[1]["tasks"][task]["rows"]
        states = [
            json.loads((tmp_path / f"{case}-{ranks}" / "checkpoint-8" / "state.json").read_text()) for ranks in (1, 2)
        ]
        starts = [[change[2] for change in state["online"]["chain"]["changes"]] for state in states]
        assert starts[0] == starts[1]
