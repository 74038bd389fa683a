"""`mtft mix relevance RECIPE`: gradients measured on the tiny model, task by task, and what they say of a target."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from mtft.__main__ import main
from mtft.common.errors import UserError
from mtft.data.store.token_store import open_stores
from mtft.gradients.capture import task_gradients
from mtft.losses.token_nll import token_nll
from mtft.models.loading import load_base, load_tokenizer, pad_id
from mtft.models.lora import add_lora
from mtft.pipeline.stages import relevance
from mtft.recipe.schema.recipe import Recipe


@pytest.fixture(scope="module")
def recipe(whole_recipe, tmp_path_factory):
    """The three tiny tasks, and a fourth with the same rows as `copy` in another order."""
    home = tmp_path_factory.mktemp("relevance")
    copy = whole_recipe["tasks"][0]
    rows = Path(copy["data"]).read_text().splitlines()
    (home / "again.jsonl").write_text("\n".join(rows[::-1]) + "\n")
    content = {key: value for key, value in whole_recipe.items() if key not in ("merge", "fuse", "sweep", "mixture")}
    content["tasks"] = [*whole_recipe["tasks"], {"name": "again", "data": str(home / "again.jsonl")}]
    content["output"] = {"dir": str(home / "run")}
    (home / "recipe.yaml").write_text(yaml.safe_dump(content))
    return Recipe.model_validate(content), home / "recipe.yaml"


def test_the_rows_that_are_the_targets_own_matter_most(recipe):
    found, *_ = relevance.task_relevance(recipe[0], ["copy"], examples=60)
    assert found.sources == tuple(name for name in recipe[0].task_names if name != "copy")
    assert found.held_out
    assert found.found is not None
    best = found.sources[int(np.argmax(found.found.shares))]
    assert best == "again"
    assert found.sources[int(np.argmax(found.cosine))] == "again"
    assert np.all(found.found.nu >= 0)
    without, *_ = relevance.task_relevance(recipe[0], ["again"], examples=60)
    assert not without.held_out
    assert without.cosine[without.sources.index("copy")] == pytest.approx(1, abs=0.01)  # the same rows


def test_the_gradient_is_autograds(recipe):
    content, tokenizer = recipe[0], load_tokenizer(recipe[0].model)
    store = open_stores(content, tokenizer, "train")[0]
    model = add_lora(load_base(content.model), content.lora, seed=content.seed)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in name)
    rows = relevance._SomeRows(store, 5, seed=3)
    assert len(rows.lengths) == 5
    found = relevance._gradient(content, model, rows, pad_id(tokenizer))
    total, tokens = torch.zeros(()), 0
    from mtft.data.batching.batches import collate

    model.eval()
    for i in range(5):
        batch = collate([[(rows.example(i), 0)]], pad_id(tokenizer))
        nll = token_nll(model, batch, path="gather")
        total, tokens = total + nll.sum(), tokens + int((batch.labels_BT != -100).sum())
    (total / tokens).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-7)


def test_one_gradient_of_the_adapter_is_held_at_a_time(recipe, monkeypatch):
    """However many tasks: taps for a single task, and each let go before the next is measured."""
    kinds, alive = [], []
    real = task_gradients.TaskGradients.__init__

    def noted(self, model, num_tasks, **options):
        kinds.append(num_tasks)
        alive.append(sum(bool(taps._blocks._blocks) for taps in seen))
        seen.append(self)
        real(self, model, num_tasks, **options)

    seen: list = []
    monkeypatch.setattr(task_gradients.TaskGradients, "__init__", noted)
    relevance.task_relevance(recipe[0], ["copy"], examples=4)
    assert set(kinds) == {1}
    assert len(kinds) == len(recipe[0].tasks) + 1
    assert alive == [0] * len(kinds)


def test_the_command(recipe, capsys):
    assert main(["mix", "relevance", str(recipe[1]), "--target", "copy", "--target", "twice", "--rows", "300",
                 "--examples", "20"]) == 0  # fmt: skip
    out, err = capsys.readouterr()
    assert "target copy (held-out rows)" in out
    assert "target twice (held-out rows)" in out
    assert "again" in out
    assert "gradient of 20 rows" in err


def test_on_an_adapter_and_mistakes(recipe, tmp_path, capsys):
    content, path = recipe
    model = add_lora(load_base(content.model), content.lora, seed=9)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B" in name:
                parameter.normal_(std=0.05, generator=torch.Generator().manual_seed(1))
    model.save_pretrained(tmp_path / "adapter")
    fresh, *_ = relevance.task_relevance(content, ["copy"], examples=8)
    tuned, *_ = relevance.task_relevance(content, ["copy"], adapter=tmp_path / "adapter", examples=8)
    assert not np.allclose(fresh.cosine, tuned.cosine)
    with pytest.raises(UserError, match="no task of the recipe is called 'coyp'"):
        relevance.task_relevance(content, ["coyp"])
    assert main(["mix", "relevance", str(path), "--sketches", "w.csv"]) == 2
    assert "either a recipe, or --sketches" in capsys.readouterr().err
    assert main(["mix", "relevance"]) == 2
    assert main(["mix", "relevance", str(path), "--method", "l2"]) == 2
    assert "leave --method out" in capsys.readouterr().err
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["r"] == 4
