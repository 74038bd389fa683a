"""Task gradients in a run: what is measured, that measuring changes nothing, and steps along a mix of them."""

import json
import math

import numpy as np
import pytest
import torch
from transformers.trainer_callback import TrainerCallback

from mtft.common.errors import UserError
from mtft.data.planning import make_plan
from mtft.gradients.aggregators import Aggregator
from mtft.gradients.gramian import gram
from mtft.recipe.compatibility import check_compatibility
from mtft.recipe.schema.loss import GradientSection
from mtft.recipe.schema.recipe import Recipe
from mtft.training.build_model import load_for_training
from mtft.training.run_files.metrics_log import MetricsLog
from mtft.training.run_training import train
from mtft.training.step.task_gradients import TaskGradientStep, make_task_gradient_step
from mtft.training.trainer import build_trainer
from mtft.training.training_arguments import training_arguments
from mtft.training.training_inputs import read_training_inputs
from tests.slow import slow
from tests.training import test_trainer
from tests.training.conftest import lines, write_model

TASKS = ("copy", "twice", "shout")
LORA = {"r": 4, "alpha": 8, "init": "orthogonal"}  # both factors have a gradient from the first step on


def trainer_for(recipe, tmp_path, *, steps=6, callback=None, **changes):
    settings = {**recipe["train"], "steps": steps, "warmup": 0, **changes.pop("train", {})}
    trainer, *_ = test_trainer.trainer_for(recipe, tmp_path, **{"lora": LORA, **changes, "train": settings})
    if callback is not None:
        trainer.add_callback(callback)
    return trainer


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


class Gradients(TrainerCallback):
    """The gradients of every step as the optimizer is about to see them."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        model = kwargs["model"]
        self.steps.append({name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad})


MEASURED = {"every": 2}
LAGGED = {"name": "gradnorm", "gram_every": 2, "learning_rate": 1e-30}  # asks for the Gram matrix, moves no weight


@pytest.mark.parametrize(
    "loss",
    [{"gradients": MEASURED}, *slow({"gradients": {**MEASURED, "split": True}}, {"balancer": LAGGED})],
    ids=["affinity", "halves", "balancer"],
)
def test_measuring_changes_no_bit_of_the_run(recipe, tmp_path, loss):
    lora = {**LORA, "dropout": 0.1}
    plain = trainer_for(recipe, tmp_path / "plain", lora=lora)
    plain.train()
    watched = trainer_for(recipe, tmp_path / "watched", lora=lora, loss=loss)
    watched.train()
    left, right = weights(plain), weights(watched)
    assert all(torch.equal(left[name], right[name]) for name in left)
    assert [line["loss"] for line in lines(tmp_path / "plain")] == [
        line["loss"] for line in lines(tmp_path / "watched")
    ]
    assert ["gradients" in line for line in lines(tmp_path / "watched")] == [False, True] * 3


def test_metrics_of_a_measured_step(recipe, tmp_path):
    """norm and gram against K backwards by autograd on the same step."""
    trainer = trainer_for(recipe, tmp_path, steps=1, loss={"gradients": {"every": 1}})
    batches = trainer.steps[0]
    J = {}
    parameters = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.model.train()
    for k in range(3):
        nll = [(trainer.objective.nll(trainer.model, batch), batch) for batch in batches]
        tokens = sum(int(((batch.task_ids_BT == k) & (batch.labels_BT >= 0)).sum()) for _, batch in nll)
        loss = sum(nll_BT[batch.task_ids_BT == k].sum() for nll_BT, batch in nll) / tokens
        for name, gradient in zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True):
            J.setdefault(name, []).append(gradient)
    expected = gram({name: torch.stack(rows) for name, rows in J.items()})
    trainer.train()
    (line,) = lines(tmp_path)
    assert set(line["gradients"]) == {"norm", "gram"}
    torch.testing.assert_close(torch.tensor(line["gradients"]["gram"]).double(), expected, rtol=1e-4, atol=1e-7)
    norms = [line["gradients"]["norm"][task] for task in TASKS]
    assert norms == pytest.approx(expected.diagonal().sqrt().tolist(), rel=1e-4)
    affinity = json.loads((tmp_path / "affinity.json").read_text())
    assert affinity["tasks"] == list(TASKS)
    assert affinity["measures"] == 1


@pytest.mark.slow
def test_halves_are_for_the_affinity_alone(recipe, tmp_path):
    found = {}
    for name, split in (("plain", False), ("halves", True)):
        asked = {"steps": 2, "train": {"micro_batch_tokens": 64}}  # several micro-batches
        trainer = trainer_for(recipe, tmp_path / name, loss={"gradients": {"every": 1, "split": split}}, **asked)
        trainer.train()
        found[name] = trainer.gradient_step.affinity.gram_KK.numpy()
    off = ~np.eye(3, dtype=bool)
    assert found["halves"][off] == pytest.approx(found["plain"][off], rel=1e-4, abs=1e-7)
    own = []
    for left, right in zip(lines(tmp_path / "plain"), lines(tmp_path / "halves"), strict=True):
        plain, halves = (np.array(line["gradients"]["gram"], dtype=float) for line in (left, right))
        assert halves == pytest.approx(plain, rel=1e-4, abs=1e-7)  # what balancers see
        own.append([right["gradients"]["halves"][task] for task in TASKS])
        assert not np.isclose(np.array(own[-1], dtype=float), plain.diagonal(), rtol=1e-3).any()
    seen = np.array(own, dtype=float)  # NaN: one example in the step
    assert np.isfinite(seen).sum() >= 4
    known = np.isfinite(seen).any(axis=0)
    assert found["halves"].diagonal()[known] == pytest.approx(np.nanmean(seen[:, known], axis=0), rel=1e-6)
    assert np.isnan(found["halves"].diagonal()[~known]).all()


@pytest.mark.parametrize(
    "split", [{"micro_batch_tokens": 64}, *slow({"packing": False}, {"gradient_checkpointing": True})]
)
def test_gram_does_not_depend_on_the_split(recipe, tmp_path, split):
    for name, train_ in (("whole", {"micro_batch_tokens": 2048}), ("split", split)):
        trainer_for(recipe, tmp_path / name, steps=2, loss={"gradients": {"every": 1}}, train=train_).train()
    for left, right in zip(lines(tmp_path / "whole"), lines(tmp_path / "split"), strict=True):
        for whole, other in zip(left["gradients"]["gram"], right["gradients"]["gram"], strict=True):
            assert other == pytest.approx(whole, rel=1e-4, abs=1e-7)


class Asked(Aggregator):
    """alpha = p: the plain gradient."""

    NAME = "asked"

    def solve(self, gram, p, step):
        return p


class Third(Aggregator):
    """The gradient of the last present task alone, twice as long."""

    NAME = "third"

    def solve(self, gram, p, step):
        return [0.0] * (len(p) - 1) + [2.0]


def directed(recipe, tmp_path, aggregator, **changes):
    seen = Gradients()
    loss = {**changes.pop("loss", {}), "gradients": {"aggregator": "upgrad"}}
    trainer = trainer_for(recipe, tmp_path, loss=loss, callback=seen, **changes)
    trainer.gradient_step.aggregator = aggregator
    return trainer, seen


@pytest.mark.parametrize("normalise", ["task_sample", *slow("token")])
def test_direct_with_the_preference_itself_is_the_plain_step(recipe, tmp_path, normalise):
    tasks = [{**task, "weight": weight} for task, weight in zip(recipe["tasks"], (1.0, 3.0, 0.5), strict=True)]
    changes = {"tasks": tasks, "train": {"max_grad_norm": 0}}
    seen = Gradients()
    plain = trainer_for(recipe, tmp_path / "plain", loss={"normalise": normalise}, callback=seen, steps=2, **changes)
    plain.train()
    trainer, found = directed(recipe, tmp_path / "direct", Asked(), loss={"normalise": normalise}, steps=2, **changes)
    trainer.train()
    for expected, direction in zip(seen.steps, found.steps, strict=True):
        for name, gradient in expected.items():
            assert float((direction[name] - gradient).norm()) <= 1e-5 * float(gradient.norm())


def test_direct_step_is_the_aggregators(recipe, tmp_path):
    """2 g of the last task = twice the gradient of a run with weights 0, 0, 1."""
    trainer, found = directed(recipe, tmp_path / "direct", Third(), steps=1, train={"max_grad_norm": 0})
    trainer.train()
    tasks = [{**task, "weight": float(k == 2)} for k, task in enumerate(recipe["tasks"])]
    seen = Gradients()
    trainer_for(recipe, tmp_path / "a", tasks=tasks, callback=seen, steps=1, train={"max_grad_norm": 0}).train()
    for name, gradient in seen.steps[0].items():
        assert float((found.steps[0][name] - 2 * gradient).norm()) <= 1e-5 * float(2 * gradient.norm())
    (line,) = lines(tmp_path / "direct")
    assert line["gradients"]["alpha"] == {"copy": 0.0, "twice": 0.0, "shout": 2.0}


def test_direct_step_is_clipped_after_it_is_made(recipe, tmp_path):
    trainer, found = directed(recipe, tmp_path, Third(), steps=1, train={"max_grad_norm": 1e-3})
    trainer.train()
    norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in found.steps[0].values()))
    assert norm == pytest.approx(1e-3, rel=1e-3)
    assert lines(tmp_path)[0]["grad_norm"] > 1e-2


@pytest.mark.slow
def test_task_of_weight_0_is_measured_and_does_not_move_the_step(recipe, tmp_path):
    tasks = [{**task, "weight": float(k != 1)} for k, task in enumerate(recipe["tasks"])]
    asked = {"tasks": tasks, "train": {"max_grad_norm": 0}, "steps": 2}
    plain, watched = Gradients(), Gradients()
    trainer_for(recipe, tmp_path / "plain", callback=plain, **asked).train()
    trainer_for(recipe, tmp_path / "m", callback=watched, loss={"gradients": {"every": 2}}, **asked).train()
    for name in plain.steps[0]:
        assert torch.equal(plain.steps[0][name], watched.steps[0][name])  # not measured
        expected = plain.steps[1][name]
        assert float((watched.steps[1][name] - expected).norm()) <= 1e-4 * float(expected.norm())
    left, right = lines(tmp_path / "plain"), lines(tmp_path / "m")
    assert right[1]["gradients"]["norm"]["twice"] > 0
    assert [line["tasks"] for line in left] == [line["tasks"] for line in right]


def test_task_of_weight_0_is_absent_where_gradients_are_cut(recipe, tmp_path):
    said = []
    model = load_for_training(Recipe.model_validate(recipe))
    surgery = TaskGradientStep(model, TASKS, GradientSection(every=1), isolated=True, whole=False, say=said.append)
    w_K = torch.tensor([1.0, 0.0, 1.0])
    for _ in range(2):
        assert surgery.weights(1, w_K, torch.ones(3, dtype=torch.bool)) is w_K
    assert len(said) == 1
    assert "weight 0" in said[0]


def test_absent_task(recipe, tmp_path):
    mixture = {"shares": {"copy": 0.5, "twice": 0.5, "shout": 0.0}}
    loss = {"gradients": {"every": 1, "aggregator": "upgrad"}}
    trainer_for(recipe, tmp_path, mixture=mixture, loss=loss, steps=3).train()
    for line in lines(tmp_path):
        assert line["gradients"]["norm"]["shout"] is None
        assert line["gradients"]["alpha"]["shout"] == 0.0
        assert line["gradients"]["norm"]["copy"] > 0


@pytest.mark.slow
def test_other_measurements_do_not_move_a_balancer(recipe, tmp_path):
    balancer = {"name": "gradnorm", "gram_every": 3}
    for name, loss in (("alone", {}), ("with", {"gradients": {"every": 1}})):
        trainer_for(recipe, tmp_path / name, loss={"balancer": balancer, **loss}).train()
    shown = [[line["tasks"] for line in lines(tmp_path / name)] for name in ("alone", "with")]
    assert shown[0] == shown[1]
    assert shown[0][5] != shown[0][0]


class Infinite(TrainerCallback):
    """Makes one weight's gradient infinite in one step."""

    def on_step_begin(self, args, state, control, **kwargs):
        parameter = next(p for n, p in kwargs["model"].named_parameters() if "lora_B" in n)
        if state.global_step + 1 == 2:
            self.kept = parameter.detach().clone()
            parameter.data.fill_(float("nan"))

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            next(p for n, p in kwargs["model"].named_parameters() if "lora_B" in n).data.copy_(self.kept)


def test_step_that_is_not_finite_is_skipped_in_direct_mode(recipe, tmp_path):
    loss = {"gradients": {"every": 1, "aggregator": "mgda"}}
    trainer = trainer_for(recipe, tmp_path, loss=loss, callback=Infinite())
    trainer.train()
    found = lines(tmp_path)
    assert [line.get("skipped") for line in found] == [None, "non-finite", None, None, None, None]
    assert ["gradients" in line for line in found] == [True, False, True, True, True, True]
    assert all(bool(p.isfinite().all()) for p in weights(trainer).values())


@pytest.mark.slow
@pytest.mark.parametrize(
    "loss",
    [
        {"gradients": {"every": 2, "aggregator": "pcgrad"}},
        {"gradients": {"every": 2, "aggregator": "sam_gs", "options": {"gamma": 0.3}}},  # with a momentum of each task
        {"balancer": {"name": "lagged", "gram_every": 2}},
    ],
)
def test_resume_is_bit_equal(recipe, tmp_path, loss):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = control.should_save = state.global_step == 5

    def run(name, stop):
        settings = {**recipe["train"], "steps": 8}
        folder = tmp_path / name
        whole = Recipe.model_validate(
            {**recipe, "loss": loss, "train": settings, "output": {"dir": str(folder), "save_every": 5}}
        )
        if stop:
            inputs = read_training_inputs(whole)
            plan = make_plan(whole, inputs.stores)
            args = training_arguments(whole, folder, steps=8, evaluates=False, saves=True)
            trainer = build_trainer(
                whole, inputs, plan, load_for_training(whole), args, log=MetricsLog(folder, steps=8, quiet=True)
            )
            trainer.add_callback(Stop())
            trainer.train()
            found = trainer.run_dir / "checkpoint-5"
            again = build_trainer(
                whole, inputs, plan, load_for_training(whole), args, log=MetricsLog(folder, steps=8, quiet=True)
            )
            again.train(resume_from_checkpoint=str(found))
            return weights(again)
        train(whole, quiet=True, prove=False)
        from safetensors.torch import load_file

        return load_file(folder / "checkpoint-8" / "weights.safetensors")

    whole, broken = run("whole", False), run("broken", True)
    assert all(torch.equal(whole[name], broken[name]) for name in broken)
    strip = [{key: value for key, value in line.items() if "second" not in key} for line in lines(tmp_path / "whole")]
    assert strip == [
        {key: value for key, value in line.items() if "second" not in key} for line in lines(tmp_path / "broken")
    ]
    if "gradients" in loss:
        assert (tmp_path / "whole" / "affinity.json").read_text() == (tmp_path / "broken" / "affinity.json").read_text()


# ---- refusals


def refused(recipe, **changes):
    whole = Recipe.model_validate({**recipe, **changes})
    with pytest.raises(UserError) as caught:
        make_task_gradient_step(
            whole, load_for_training(whole), gram_every=None, isolated=True, run_dir=None, say=print
        )
    return caught.value


def test_refusals(recipe, monkeypatch):
    assert "DoraLinearVariant" in refused(recipe, lora={"r": 4, "dora": True}, loss={"gradients": MEASURED}).what
    assert "Embedding" in refused(recipe, lora=None, loss={"gradients": MEASURED}).what
    penalty = {**recipe, "loss": {"gradients": MEASURED, "orthogonal": 0.1}}
    with pytest.raises(UserError, match="belongs to no task"):
        check_compatibility(Recipe.model_validate(penalty), stage="train")
    assert "upgrad" in refused(recipe, loss={"gradients": {"aggregator": "upgrade"}}).what
    momentum = {"aggregator": "sam_gs", "options": {"gamma": 0.7}, "flat": {"name": "f_mtl"}}
    assert "mixes two sets" in refused(recipe, loss={"gradients": momentum}).what
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert "lagged" in refused(recipe, loss={"gradients": {"aggregator": "upgrad"}}).do


MODULATED = {"aggregator": "sam_gs", "options": {"gamma": 0.5}}  # keeps a momentum of each task


@pytest.mark.parametrize(
    ("loss", "copies"),
    [({"gradients": MEASURED}, 1), ({"balancer": {"name": "lagged"}}, 1), ({"gradients": MODULATED}, 2)],
)
def test_memory_estimate_holds_k_gradients(recipe, loss, copies):
    from mtft.training.memory.estimate import estimate_memory

    plain, measured = (estimate_memory(Recipe.model_validate({**recipe, "loss": asked})) for asked in ({}, loss))
    assert measured.training - plain.training == copies * 4 * 3 * plain.trainable


def test_partial_says_what_is_left_out(recipe, tmp_path):
    said = []
    whole = Recipe.model_validate({**recipe, "lora": None, "loss": {"gradients": {"every": 1, "partial": True}}})
    make_task_gradient_step(
        whole, load_for_training(whole), gram_every=None, isolated=True, run_dir=None, say=said.append
    )
    assert len(said) == 2
    assert all("leave out" in line for line in said)
    assert "Embedding" in said[0]


@pytest.mark.parametrize("path", ["gather", *slow("fused")])
def test_partial_direct_leaves_the_rest_its_plain_gradient(recipe, tmp_path, path):
    seen, found = Gradients(), Gradients()
    asked = {"steps": 1, "lora": None, "train": {"max_grad_norm": 0}}
    if path == "fused":  # a head of its own, which that path multiplies with beside its layer
        asked["model"] = {**recipe["model"], "path": str(write_model(tmp_path / "untied", tied=False))}
    trainer_for(recipe, tmp_path / "plain", callback=seen, loss={"path": path}, **asked).train()
    loss = {"path": path, "gradients": {"aggregator": "upgrad", "partial": True}}
    trainer = trainer_for(recipe, tmp_path / "direct", callback=found, loss=loss, **asked)
    trainer.gradient_step.aggregator = Third()
    trainer.train()
    same = [name for name, gradient in seen.steps[0].items() if torch.equal(gradient, found.steps[0][name])]
    assert set(same) == set(trainer.gradient_step.taps.left_out)
    assert len(same) > 2
    assert ("lm_head.weight" in same) == (path == "fused")
