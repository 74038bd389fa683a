"""Two gloo ranks on the CPU train what one process trains: same losses, same gradient, same adapter."""

import json

import pytest
import torch
from safetensors.torch import load_file

from mtft.recipe.load import dump_recipe
from mtft.recipe.schema import Recipe
from mtft.train.run import train

pytestmark = pytest.mark.slow


def written(recipe, path, **changes):
    """A recipe file; the same as a Recipe."""
    whole = Recipe.model_validate({**recipe, **changes})
    path.write_text(dump_recipe(whole))
    return whole


def lines(folder, name):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def test_losses_and_adapter_of_a_whole_run(recipe, launch, tmp_path):
    """Through the command line. Three examples a step: tasks are missing on ranks, and some steps are one row only."""
    settings = {**recipe["train"], "steps": 12, "batch_tokens": 150, "micro_batch_tokens": 64, "eval_every": 6}
    changes = {"train": settings, "lora": {"r": 4, "alpha": 8}}
    one = written(recipe, tmp_path / "one.yaml", **changes, output={"dir": str(tmp_path / "one")})
    written(recipe, tmp_path / "two.yaml", **changes, output={"dir": str(tmp_path / "two"), "save_every": 5})
    out = launch("ddp.yaml", "-m", "mtft", "train", tmp_path / "two.yaml")
    assert "2 processes on cpu" in " ".join(out.split())
    result = train(one, quiet=True, prove=False)
    ours, theirs = lines(tmp_path / "one", "metrics.jsonl"), lines(tmp_path / "two", "metrics.jsonl")
    assert len(ours) == len(theirs) == 12
    for left, right in zip(ours, theirs, strict=True):
        assert right["loss"] == pytest.approx(left["loss"], rel=1e-6)
        assert right["grad_norm"] == pytest.approx(left["grad_norm"], rel=1e-4)
        for task, values in left["tasks"].items():
            same = ("weight", "share", "loss_share", "tokens", "examples")
            assert [right["tasks"][task][key] for key in same] == [values[key] for key in same]
            expected = None if values["loss"] is None else pytest.approx(values["loss"], rel=1e-6)
            assert right["tasks"][task]["loss"] == expected
    name = "adapter/adapter_model.safetensors"
    left, right = load_file(tmp_path / "one" / name), load_file(tmp_path / "two" / name)
    scale = max(float(value.abs().max()) for value in left.values())
    for key, value in left.items():
        torch.testing.assert_close(right[key], value, rtol=1e-5, atol=1e-5 * scale)
    for left, right in zip(lines(tmp_path / "one", "eval.jsonl"), lines(tmp_path / "two", "eval.jsonl"), strict=True):
        for task, values in left["tasks"].items():
            assert right["tasks"][task] == pytest.approx(values, rel=1e-5)
    assert result.steps == 12
    assert (tmp_path / "two" / "checkpoint-12").is_dir()
    states = json.loads((tmp_path / "two" / "checkpoint-12" / "state.json").read_text())["random"]
    assert len(states) == 2


def test_gradient_of_a_step_and_agreement_of_ranks(recipe, launch, tmp_path):
    """The same 8 examples on 1 rank and on 2, one task on one rank only; what else ranks must agree on: ranks.py."""
    settings = {**recipe["train"], "steps": 1, "batch_tokens": 430, "micro_batch_tokens": 64, "max_grad_norm": 0}
    mixture = {"shares": {"copy": 0.45, "twice": 0.45, "shout": 0.1}}
    output = {"dir": str(tmp_path / "run")}
    whole = written(recipe, tmp_path / "r.yaml", train=settings, lora=None, mixture=mixture, output=output)
    launch("ddp.yaml", "tests/distributed/ranks.py", tmp_path / "r.yaml", tmp_path)
    from tests.distributed.ranks import gradients

    expected, _ = gradients(whole, tmp_path / "here")
    found = load_file(tmp_path / "gradients.safetensors")
    scale = max(float(value.abs().max()) for value in expected.values())
    assert found.keys() == expected.keys()
    worst = max(float((found[key] - value).abs().max()) for key, value in expected.items())
    assert worst <= 1e-6 * scale
