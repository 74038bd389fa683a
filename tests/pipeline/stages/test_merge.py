"""`mtft merge RECIPE` where it looks at data: search, gates, experts, Gram matrices, on three tiny trained experts."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from mtft.adapters.lora_factors import read_adapter
from mtft.common.errors import UserError
from mtft.data.store.token_store import open_stores
from mtft.models.loading import load_tokenizer
from mtft.pipeline.stages import derived_recipes
from mtft.pipeline.stages.adapter_evaluator import AdapterEvaluator, select_examples, split_rows
from mtft.pipeline.stages.merge import merge_recipe, merge_stage
from mtft.recipe.schema.recipe import Recipe
from mtft.training.run_training import train

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trained(whole_recipe, tmp_path_factory):
    """(recipe without a merge section, {task: adapter folder}): 30 steps of each task alone."""
    root = tmp_path_factory.mktemp("experts")
    recipe = Recipe.model_validate(
        {**whole_recipe, "sweep": None, "fuse": None, "merge": None, "run": {"single_steps": 30}}
    )
    adapters = {}
    for task in recipe.task_names:
        alone = derived_recipes.single_task_recipe(recipe, task, 1 / 3, root / f"single-{task}")
        adapters[task] = train(alone, quiet=True, prove=False).adapter_dir
    return recipe, adapters


def with_merge(trained, folder, **section):
    recipe, adapters = trained
    section = {"method": "linear", "adapters": [str(path) for path in adapters.values()], **section}
    output = {"dir": str(folder)}
    return Recipe.model_validate({**recipe.model_dump(), "merge": section, "output": output})


def mean_loss(scores):
    return float(np.mean([found.summary()["loss"] for found in scores.values()]))


def test_rows_are_dealt_once():
    parts = split_rows(30, 64)
    assert [len(parts[name]) for name in ("choose", "check", "rest")] == [10, 10, 10]
    assert sorted(np.concatenate(list(parts.values()))) == list(range(30))
    assert [len(x) for x in split_rows(1000, 64).values()] == [64, 64, 872]


def test_scores_with_adapters_on_and_off(trained, tmp_path):
    """An adapter is put on and taken off: scores of the base are the same before and after, and those of evaluate()."""
    from mtft.evaluation.evaluate_recipe import evaluate

    recipe, adapters = trained
    adapted = AdapterEvaluator(recipe, 4)
    before = adapted.scores(None)
    on = adapted.scores(adapters["copy"])
    after = adapted.scores(None)
    theirs = evaluate(recipe, adapters["copy"])
    for task in recipe.task_names:
        np.testing.assert_array_equal(before[task].nll_N, after[task].nll_N)
        np.testing.assert_allclose(on[task].nll_N, theirs[task].nll_N, rtol=1e-5)
        rest = select_examples(theirs, adapted.ids("rest"))[task]
        np.testing.assert_allclose(adapted.scores(adapters["copy"], "rest")[task].nll_N, rest.nll_N, rtol=1e-5)


@pytest.mark.parametrize("by", ["cobyqa", "front"])
def test_search_finds_better_weights_and_resumes(trained, tmp_path, by):
    search = {"by": by, "budget": 14, "rows": 4}
    recipe = with_merge(trained, tmp_path / "run", search=search)
    found = merge_recipe(recipe)
    assert "merges tried" in found.text()
    ledger = next((tmp_path / "run" / "merge-trials").glob("*.jsonl"))
    rows = [json.loads(line) for line in ledger.read_text().splitlines()]
    uniform = next(row for row in rows if set(row["weights"]) == {1.0})
    facts = json.loads((tmp_path / "run" / "merge" / "front.json").read_text())
    assert np.mean(list(facts["chosen"]["losses"].values())) <= np.mean(list(uniform["losses"].values()))
    assert (tmp_path / "run" / "merge" / "front.png").read_bytes().startswith(b"\x89PNG")
    merged = json.loads((tmp_path / "run" / "merge" / "adapter" / "merge.json").read_text())
    assert [item["weight"] for item in merged["inputs"]] == facts["chosen"]["weights"]
    if by == "front":  # another preference: other weights from the same trials, and nothing is tried again
        prefer = {"copy": 1.0}
        again = with_merge(trained, tmp_path / "run", search={**search, "prefer": prefer}, overwrite=True)
        merge_recipe(again)
        assert len(ledger.read_text().splitlines()) == len(rows)
        liked = json.loads((tmp_path / "run" / "merge" / "front.json").read_text())["chosen"]
        assert liked["losses"]["copy"] <= facts["chosen"]["losses"]["copy"]


def test_gates_are_trained_and_folded(trained, tmp_path):
    recipe, adapters = trained
    asked = {"kind": "cat_gates", "rows": 4, "steps": 30, "learning_rate": 0.05}
    merged = merge_recipe(with_merge(trained, tmp_path / "run", gates=asked))
    assert "objective" in merged.text()
    adapted = AdapterEvaluator(recipe, 4)
    plain = merge_recipe(with_merge(trained, tmp_path / "plain", average=True))
    assert mean_loss(adapted.scores(merged.out, "choose")) < mean_loss(adapted.scores(plain.out, "choose"))


def test_unlearning_by_gates(trained, tmp_path):
    recipe, _ = trained
    asked = {"kind": "atlas", "rows": 4, "steps": 20, "learning_rate": 0.05, "negate": ["shout"]}
    out = merge_recipe(with_merge(trained, tmp_path / "run", gates=asked)).out
    adapted = AdapterEvaluator(recipe, 4)
    kept = merge_recipe(with_merge(trained, tmp_path / "kept", gates={**asked, "negate": []})).out
    losses = [{t: s.summary()["loss"] for t, s in adapted.scores(x, "choose").items()} for x in (out, kept)]
    assert losses[0]["shout"] > losses[1]["shout"] + 0.02
    assert losses[0]["copy"] < adapted.scores(None, "choose")["copy"].summary()["loss"]  # the controls still learn
    with pytest.raises(UserError, match="no task 'x'"):
        merge_recipe(with_merge(trained, tmp_path / "other", gates={**asked, "negate": ["x"]}))


@pytest.mark.parametrize("router", ["centroid", "mlp"])
def test_twin_at_full_rank_and_a_sure_router_is_each_expert(trained, tmp_path, router):
    """S + E_k = D_k, so with prompts routed right every task scores as its own expert does."""
    recipe, adapters = trained
    experts = {"kind": "twin", "rank": 16, "router": router, "rows": 4}
    out = merge_recipe(with_merge(trained, tmp_path / "run", experts=experts)).out
    adapted = AdapterEvaluator(recipe, 4)
    routed = adapted.routed_scores(out)
    assert adapted.scores(None)["copy"].nll_N.shape == routed["copy"].nll_N.shape  # the experts are off again
    for task in recipe.task_names:
        alone = adapted.scores(adapters[task], None, [task])[task].summary()["loss"]
        base = adapted.scores(None, None, [task])[task].summary()["loss"]
        share = (base - routed[task].summary()["loss"]) / (base - alone)
        assert share > (0.8 if router == "mlp" else 0.7)  # four prompts a centroid: right, and not sure


def test_arrow_folder_is_plain_loras_and_a_router(trained, tmp_path):
    recipe, adapters = trained
    found = merge_recipe(with_merge(trained, tmp_path / "run", experts={"kind": "arrow", "top": 2}))
    assert "prototypes" in found.text()
    for task, path in adapters.items():
        ours, theirs = read_adapter(found.out / f"expert_single-{task}"), read_adapter(path)
        a, b = (x.factors(next(iter(theirs.modules))) for x in (ours, theirs))
        np.testing.assert_allclose(a.scale * a.B_MR @ a.A_RN, b.scale * b.B_MR @ b.A_RN, atol=1e-6)
    scores = AdapterEvaluator(recipe, 4).routed_scores(found.out)
    assert mean_loss(scores) < mean_loss(AdapterEvaluator(recipe, 4).scores(None))


def test_regmean_measures_its_inputs(trained, tmp_path):
    """Each adapter's own inputs, by hand with hooks on the base plus the adapter; the folder is not kept."""
    recipe, adapters = trained
    found = merge_recipe(with_merge(trained, tmp_path / "run", method="regmean"))
    assert json.loads((found.out / "merge.json").read_text())["options"]["grams"] == "grams"
    assert found.report is not None
    assert found.report.energy > 0.9
    adapted = AdapterEvaluator(recipe, 64)
    from mtft.adapters.safetensors_io import TensorFile
    from mtft.pipeline.stages.merge_with_data import measure_grams

    (adapter,) = [read_adapter(adapters["copy"], "copy")]
    measure_grams([adapter], adapted, tmp_path / "grams")
    name = "model.layers.0.self_attn.q_proj"
    G = TensorFile(tmp_path / "grams" / "copy.safetensors").read(name)
    seen = []
    with adapted.adapter(adapter.path) as network, torch.no_grad():
        layer = network.base_model.model.get_submodule(name)
        handle = layer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        for batch in adapted.batches("copy", "choose"):
            network(**adapted.inputs(batch))
            seen[-1] = seen[-1][batch.segment_ids_BT >= 0].double()
        handle.remove()
    X = torch.cat(seen)
    np.testing.assert_allclose(G, (X.T @ X / len(X)).numpy(), rtol=1e-5, atol=1e-7)


def test_what_a_merge_keeps_is_reported_on_rows_it_has_not_seen(trained, tmp_path):
    recipe, adapters = trained
    whole = with_merge(trained, tmp_path / "run", search={"by": "grid", "rows": 3})
    adapted = AdapterEvaluator(recipe, 3)
    singles = {task: adapted.scores(path, None, [task])[task] for task, path in adapters.items()}
    arguments = {"fresh": False, "state": {}, "score": adapted.scores, "beside": {}}
    found = merge_stage(whole, whole.merge, adapters, adapted.scores(None), singles, **arguments)
    kept = json.loads((tmp_path / "run" / "merge" / "retention.json").read_text())
    assert kept["rows"]["copy"] == {"seen": 6, "reported": 6}
    assert np.shape(kept["overlap"]["right"]) == (3, 3)
    rest = select_examples(found, adapted.ids("rest"))["copy"].summary()["loss"]
    assert kept["tasks"]["copy"]["loss"]["merged"] == pytest.approx(rest, rel=1e-6)


def test_a_merge_may_look_at_training_rows_and_leave_all_others_unseen(trained, tmp_path):
    recipe, adapters = trained
    whole = with_merge(trained, tmp_path / "run", search={"by": "grid", "rows": 3}, rows_from="data")
    adapted = AdapterEvaluator(whole, 3)
    for task, store in zip(recipe.task_names, open_stores(recipe, load_tokenizer(recipe.model), "train"), strict=True):
        seen = {row for part in ("choose", "check") for row in adapted.ids(part)[task]}
        assert len(seen) == 6
        assert seen <= set(store.ids)
        assert not seen & set(adapted.scores(None)[task].ids)
        assert adapted.ids("rest")[task] == list(adapted.scores(None)[task].ids)
    singles = {task: adapted.scores(path, None, [task])[task] for task, path in adapters.items()}
    arguments = {"fresh": False, "state": {}, "score": adapted.scores, "beside": {}}
    merge_stage(whole, whole.merge, adapters, adapted.scores(None), singles, **arguments)
    kept = json.loads((tmp_path / "run" / "merge" / "retention.json").read_text())
    assert kept["rows"]["copy"] == {"seen": 0, "reported": 12}


def test_the_stage_scores_experts_behind_their_router(trained, tmp_path):
    """Arrow: nothing is merged and no row is looked at, so all rows are reported."""
    _, adapters = trained
    whole = with_merge(trained, tmp_path / "run", experts={"kind": "arrow"})
    adapted = AdapterEvaluator(whole, 2)
    singles = {task: adapted.scores(path, None, [task])[task] for task, path in adapters.items()}
    arguments = {"fresh": False, "state": {}, "score": adapted.scores, "beside": {}}
    found = merge_stage(whole, whole.merge, adapters, adapted.scores(None), singles, **arguments)
    folder = tmp_path / "run" / "merge"
    assert mean_loss(found) == pytest.approx(mean_loss(adapted.routed_scores(folder / "adapter")), rel=1e-6)
    kept = json.loads((folder / "retention.json").read_text())
    assert (kept["method"], kept["rank"], kept["rows"]) == ("arrow", None, {})


def test_whole_models(trained, tmp_path):
    """Two copies of the base, each with an expert merged in, are the sum of both deltas."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    recipe, adapters = trained
    folders = []
    for task in ("copy", "twice"):
        model = AutoModelForCausalLM.from_pretrained(recipe.model.path)
        PeftModel.from_pretrained(model, str(adapters[task])).merge_and_unload().save_pretrained(tmp_path / task)
        folders.append(str(tmp_path / task))
    whole = with_merge(trained, tmp_path / "run", base=recipe.model.path, adapters=folders, out=str(tmp_path / "out"))
    out = merge_recipe(whole).out
    merged = AutoModelForCausalLM.from_pretrained(out).state_dict()
    base = AutoModelForCausalLM.from_pretrained(recipe.model.path).state_dict()
    for name, weight in merged.items():
        module = name.removesuffix(".weight")
        expected = base[name].double()
        for task in ("copy", "twice"):
            if (f := read_adapter(adapters[task]).factors(module)) is not None:
                expected = expected + torch.tensor(f.scale * f.B_MR @ f.A_RN)
        torch.testing.assert_close(weight.double(), expected, atol=1e-6, rtol=1e-5)


def test_twin_of_whole_models(trained, tmp_path):
    """The shared model with expert_copy on it is the model that was merged."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    recipe, adapters = trained
    folders = []
    for task in ("copy", "twice"):
        model = AutoModelForCausalLM.from_pretrained(recipe.model.path)
        PeftModel.from_pretrained(model, str(adapters[task])).merge_and_unload().save_pretrained(tmp_path / task)
        folders.append(str(tmp_path / task))
    asked = {"base": recipe.model.path, "adapters": folders, "experts": {"kind": "twin", "rank": 8}, "scale": 0.5}
    found = merge_recipe(with_merge(trained, tmp_path / "run", out=str(tmp_path / "out"), **asked))
    assert "expert_copy" in found.text()
    ids = torch.arange(3, 40).reshape(1, -1)
    shared = AutoModelForCausalLM.from_pretrained(found.out / "shared")
    expert = PeftModel.from_pretrained(shared, str(found.out / "expert_copy")).eval()
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "copy").eval()
    with torch.no_grad():
        torch.testing.assert_close(expert(ids).logits, whole(ids).logits, atol=1e-4, rtol=1e-4)


def test_mistakes(trained, tmp_path):
    recipe, adapters = trained
    with pytest.raises(UserError, match="no task 'x'"):
        merge_recipe(with_merge(trained, tmp_path / "run", search={"prefer": {"x": 1}, "rows": 3}))
    strangers = {
        "experts": {"kind": "twin"},
        "adapters": [str(Path(adapters["copy"]).parent.parent / "single-copy" / "adapter")],
    }
    bare = with_merge(trained, tmp_path / "run", **strangers)
    renamed = [read_adapter(adapters["copy"], "foreign")]
    with pytest.raises(UserError, match="'foreign' is no task"):
        merge_recipe(bare, renamed)
    tasks = [{**task.model_dump(), "eval_data": None} for task in recipe.tasks]
    blind = Recipe.model_validate({**bare.model_dump(), "tasks": tasks})
    with pytest.raises(UserError, match="looks at held-out rows"):
        merge_recipe(blind)
