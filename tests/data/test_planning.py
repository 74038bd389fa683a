"""From what a recipe asks to the plan that is played: rules, bounds, schedules, caps, styles, units (R1, R2)."""

import json
from itertools import pairwise

import numpy as np
import pytest

from data_mixers.common.errors import MixError
from data_mixers.mixture.bounds import Infeasible
from data_mixers.mixture.mixture import Mixture
from mtft.data.planning import make_plan, requested_mixture, task_sizes
from mtft.data.summary.render_console import summary_text
from mtft.data.summary.summarize import summarize_data
from mtft.recipe.schema.recipe import Recipe
from tests.data.toy_examples import TEMPLATES, tokenizer, write_jsonl


class Lengths:
    def __init__(self, task, lengths):
        self.task, self.lengths = task, np.asarray(lengths)


STORES = [Lengths("big", [10] * 800), Lengths("mid", [30] * 150), Lengths("small", [20] * 50)]


def recipe(**mixture):
    train = {"steps": 100, "batch_tokens": 1000} | mixture.pop("train", {})
    return Recipe.model_validate(
        {
            "name": "toy",
            "model": {"path": "nowhere"},
            "tasks": [{"name": store.task, "data": "x"} for store in STORES],
            "mixture": mixture,
            "train": train,
            "output": {"dir": "out"},
        }
    )


def asked(**mixture):
    wanted = recipe(**mixture)
    return requested_mixture(wanted, task_sizes(wanted, STORES)).shares.round(4).tolist()


@pytest.mark.parametrize(
    ("mixture", "shares"),
    [
        ({}, [0.8, 0.15, 0.05]),
        ({"unit": "tokens"}, [0.5926, 0.3333, 0.0741]),
        ({"shares": "uniform"}, [1 / 3, 1 / 3, 1 / 3]),
        ({"shares": {"temperature": 0.5}}, [0.5942, 0.2573, 0.1485]),
        ({"shares": {"temperature": 2}}, [0.9624, 0.0338, 0.0038]),
        ({"shares": {"temperature": -1}}, [0.0448, 0.2388, 0.7164]),
        ({"shares": {"big": 0.2, "mid": 0.8, "small": 0}}, [0.2, 0.8, 0]),
        # rules keep to floors, caps and groups; the others keep their proportions (KL)
        ({"floors": {"small": 0.2}}, [0.6737, 0.1263, 0.2]),
        ({"caps": {"big": 0.5}}, [0.5, 0.375, 0.125]),
        ({"groups": {"few": {"tasks": ["mid", "small"], "floor": 0.5}}}, [0.5, 0.375, 0.125]),
        ({"groups": {"few": {"tasks": ["mid", "small"], "cap": 0.1}}}, [0.9, 0.075, 0.025]),
        ({"shares": "uniform", "caps": {"mid": 0.1}, "floors": {"small": 0.6}}, [0.3, 0.1, 0.6]),
        # what is written out is played as it stands
        ({"shares": {"big": 0.2, "mid": 0.8, "small": 0}, "caps": {"mid": 0.5}}, [0.2, 0.8, 0]),
        ({"shares": {"schedule": [{"at": 0, "shares": "uniform"}, {"at": 1, "shares": "natural"}]}},
         [0.5667, 0.2417, 0.1917]),
        # a jump: a quarter of the run uniform, then only mid
        ({"shares": {"schedule": [{"at": 0.25, "shares": "uniform"},
                                  {"at": 0.25, "shares": {"big": 0, "mid": 1, "small": 0}}]}},
         [0.0833, 0.8333, 0.0833]),
    ],
)  # fmt: skip
def test_shares(mixture, shares):
    assert asked(**mixture) == pytest.approx(shares, abs=1e-4)
    plan = make_plan(recipe(**mixture), STORES)
    realised = [row["realised"] for row in plan.table()]
    assert realised == pytest.approx(shares, abs=0.002)  # and that is what is played, within a row or two


def test_bounds_that_no_mixture_keeps():
    with pytest.raises(Infeasible, match=r"floors add up to 1\.2"):
        asked(floors={"big": 0.6, "mid": 0.6})
    groups = {"few": {"tasks": ["mid", "small"], "floor": 0.8}, "most": {"tasks": ["big", "mid"], "floor": 0.9}}
    with pytest.raises(Infeasible, match="group few") as caught:
        asked(groups=groups, caps={"mid": 0.5})
    assert caught.value.where == "mixture.floors, caps, groups"


def test_a_file_is_a_mixture(tmp_path):
    Mixture.of({"small": 0.5, "big": 0.3, "mid": 0.2}).to_yaml(tmp_path / "m.yaml")
    assert asked(shares={"file": str(tmp_path / "m.yaml")}) == [0.3, 0.2, 0.5]
    stops = [{"at": 0, "shares": {"file": str(tmp_path / "m.yaml")}}]
    assert asked(shares={"schedule": stops}) == [0.3, 0.2, 0.5]


def test_caps_fill_like_water():
    """UniMax (Chung et al. 2023, arXiv 2304.09151): uniform until a task is used up, the others share the rest."""
    plan = make_plan(recipe(shares="uniform", max_epochs=1, on_cap="redistribute", train={"steps": 12}), STORES)
    assert plan.batch == 50
    assert [row["rows"] for row in plan.table()] == [400, 150, 50]
    with pytest.raises(MixError, match="small: 200 rows asked, 50 allowed"):
        make_plan(recipe(shares="uniform", max_epochs=1, train={"steps": 12}), STORES)
    uneven = recipe(shares={"temperature": 0.3}, max_epochs=3, on_cap="redistribute", train={"steps": 20})
    rows = {row["task"]: row["rows"] for row in make_plan(uneven, STORES).table()}
    assert rows["small"] == 150  # at its cap; the others keep their proportion
    assert rows["big"] / rows["mid"] == pytest.approx((800 / 150) ** 0.3, rel=0.01)


@pytest.mark.parametrize("unit", ["examples", "tokens"])
@pytest.mark.parametrize("style", ["mixed", "unmixed", "alternating"])
@pytest.mark.parametrize("scheduled", [False, True])
def test_every_way_of_asking_is_played_in_full(unit, style, scheduled):
    ramp = {"schedule": [{"at": 0, "shares": {"big": 0.9, "mid": 0.05, "small": 0.05}}, {"at": 1, "shares": "uniform"}]}
    mixture = {"shares": ramp if scheduled else "uniform", "unit": unit, "max_epochs": 30, "on_cap": "redistribute"}
    plan = make_plan(recipe(**mixture, train={"batch_style": style, "steps": 60}), STORES)
    task, epoch, row = plan.locate(np.arange(len(plan)))
    assert len({*zip(task.tolist(), epoch.tolist(), row.tolist())}) == len(plan)
    again = make_plan(recipe(**mixture, train={"batch_style": style, "steps": 60}), STORES)
    assert plan.fingerprint == again.fingerprint
    asked_K = [entry["asked"] for entry in plan.table()]
    realised_K = [entry["realised"] for entry in plan.table()]
    assert realised_K == pytest.approx(asked_K, abs=0.02)  # 60 steps: one step of one task is 0.017
    if style == "alternating":
        assert all(len({*task[slice(*plan.step_range(s))].tolist()}) == 1 for s in range(60))


def test_check_shows_how_the_shares_move(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"prompt": "the quick fox", "response": "the lazy dog"}] * 60)
    write_jsonl(tmp_path / "b.jsonl", [{"prompt": "brown", "response": "forest"}] * 20)
    stops = [{"at": 0, "shares": {"a": 1, "b": 0}}, {"at": 1, "shares": {"a": 0, "b": 1}}]
    wanted = Recipe.model_validate(
        {
            "name": "toy",
            "model": {"path": "nowhere"},
            "tasks": [{"name": name, "data": str(tmp_path / f"{name}.jsonl")} for name in "ab"],
            "mixture": {"shares": {"schedule": stops}},
            "train": {"steps": 50, "batch_tokens": 512, "max_length": 128, "batch_style": "alternating"},
            "output": {"dir": str(tmp_path / "run")},
        }
    )
    found = summarize_data(wanted, tokenizer(TEMPLATES["chatml"]), cache_dir=tmp_path)
    assert [span["steps"] for span in found.spans] == [[0, 10], [10, 20], [20, 30], [30, 40], [40, 50]]
    assert [span["asked"]["b"] for span in found.spans] == pytest.approx([0.1, 0.3, 0.5, 0.7, 0.9])
    assert all(abs(span["asked"]["b"] - span["realised"]["b"]) <= 0.1 for span in found.spans)
    assert all(a["realised"]["b"] < b["realised"]["b"] for a, b in pairwise(found.spans))
    assert json.loads(json.dumps(found.as_dict()))["batch_style"] == "alternating"
    text = summary_text(found)
    assert "steps 1 to 10" in text
    assert "one task a step" in text
    assert not any("absent" in warning for warning in found.warnings)  # what is asked for needs no warning


def test_written_shares_outside_the_bounds_are_a_warning(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"prompt": "the quick fox", "response": "the lazy dog"}] * 60)
    wanted = Recipe.model_validate(
        {
            "name": "toy",
            "model": {"path": "nowhere"},
            "tasks": [{"name": name, "data": str(tmp_path / "a.jsonl")} for name in "ab"],
            "mixture": {"shares": {"a": 0.9, "b": 0.1}, "caps": {"a": 0.5}},
            "train": {"steps": 5, "batch_tokens": 512, "max_length": 128},
            "output": {"dir": str(tmp_path / "run")},
        }
    )
    found = summarize_data(wanted, tokenizer(TEMPLATES["chatml"]), cache_dir=tmp_path)
    assert any("a has 0.9, its cap is 0.5" in warning for warning in found.warnings)
