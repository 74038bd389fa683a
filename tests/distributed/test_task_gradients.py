"""Runs on two ranks measure what one process measures, under every engine, and follow the same steps from it."""

import json

import pytest
import torch
from safetensors.torch import load_file

from mtft.recipe.load import dump_recipe
from mtft.recipe.schema.recipe import Recipe
from mtft.training.run_training import train

pytestmark = pytest.mark.slow

LAGGED = {"balancer": {"name": "lagged", "aggregator": "mgda", "gram_every": 2}, "gradients": {"every": 2}}
DIRECT = {"gradients": {"aggregator": "mgda", "every": 1}}
PLAIN = {}
# Plain descent: AdamW would magnify the rounding of sums in another order.
SGD = {"optimizer": "sgd", "learning_rate": 0.5, "warmup": 0, "steps": 6, "batch_tokens": 150}
FLAT = {"gradients": {"flat": {"name": "f_mtl", "rho": 0.3}, "every": 1}}
RUNS = {"lagged": LAGGED, "direct": DIRECT, "flat": FLAT, "plain": PLAIN}
ENGINES = {"ddp": tuple(RUNS), "fsdp2": ("lagged",), "zero2": ("lagged",), "zero3": ("lagged",)}


@pytest.fixture(scope="module")
def recipes(recipe):
    """Several micro-batches a step, steps of one row, tasks missing on ranks."""
    settings = {
        "train": {**recipe["train"], **SGD, "micro_batch_tokens": 64, "eval_on_start": False},
        "lora": {"r": 4, "alpha": 8, "init": "orthogonal"},
    }

    def write(folder, names):
        made = {}
        for name in names:
            changes = {**settings, "loss": RUNS[name], "output": {"dir": str(folder / name)}}
            made[name] = Recipe.model_validate({**recipe, **changes})
            (folder / f"{name}.yaml").write_text(dump_recipe(made[name]))
        return made

    return write


@pytest.fixture(scope="module")
def alone(recipes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    for whole in recipes(folder, RUNS).values():
        train(whole, quiet=True, prove=False)
    return folder


def lines(folder, name):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


@pytest.fixture(scope="module")
def launched(recipes, launch_in_turn, tmp_path_factory):
    folder = tmp_path_factory.mktemp("launched")
    for engine, names in ENGINES.items():
        (folder / engine).mkdir()
        recipes(folder / engine, names)
    launch_in_turn(ENGINES, folder)
    return folder


@pytest.mark.parametrize("engine", ENGINES)
def test_equals_one_process(alone, launched, engine):
    folder = launched / engine
    for name in ENGINES[engine]:
        expected, found = lines(alone / name, "metrics.jsonl"), lines(folder / name, "metrics.jsonl")
        assert [line["loss"] for line in found] == pytest.approx([line["loss"] for line in expected], rel=1e-5)
        for left, right in zip(expected, found, strict=True):
            assert (
                ("gradients" in left)
                == ("gradients" in right)
                == (name in ("direct", "flat") or (name == "lagged" and left["step"] % 2 == 0))
            )
            for task, values in left["tasks"].items():
                assert right["tasks"][task]["weight"] == pytest.approx(values["weight"], rel=1e-3)
            for key, values in left.get("gradients", {}).get("norm", {}).items():
                other = right["gradients"]["norm"][key]
                assert other == (None if values is None else pytest.approx(values, rel=1e-3))
            for row, other in zip(*(line.get("gradients", {}).get("gram", []) for line in (left, right)), strict=True):
                for value, found_ in zip(row, other, strict=True):
                    assert found_ == (None if value is None else pytest.approx(value, rel=1e-3, abs=1e-6))
        adapter = load_file(alone / name / "adapter" / "adapter_model.safetensors")
        saved = load_file(folder / name / "adapter" / "adapter_model.safetensors")
        scale = max(float(value.abs().max()) for value in adapter.values())
        assert max(float((saved[key] - value).abs().max()) for key, value in adapter.items()) <= 1e-4 * scale
        if name != "plain":
            left, right = (json.loads((where / name / "affinity.json").read_text()) for where in (alone, folder))
            assert left["measured_together"] == right["measured_together"]
            both = [torch.tensor(content["cosine"], dtype=torch.float64) for content in (left, right)]
            torch.testing.assert_close(*both, rtol=1e-3, atol=1e-4, equal_nan=True)


def test_runs_that_are_compared_differ(alone):
    """Or the test above would show nothing."""
    last = {name: lines(alone / name, "metrics.jsonl")[-1]["loss"] for name in RUNS}
    assert len(set(last.values())) == 4
    weights = [list(line["tasks"].values()) for line in lines(alone / "lagged", "metrics.jsonl")]
    assert weights[5][0]["weight"] != weights[0][0]["weight"]
