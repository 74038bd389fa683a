"""Steps towards flat minima in a run: the gradients against plain runs at moved weights, and what is left behind."""

import json

import pytest
import torch

from mtft.common.errors import UserError
from mtft.data.batching.batch import IGNORE
from mtft.experimental.sharpness_aware import rows_of
from mtft.recipe.schema.loss import FlatMinimaSection, GradientSection
from mtft.training.step.task_gradients import TaskGradientStep
from tests.losses.builders import Sample, lay_out
from tests.slow import slow
from tests.training.step.test_task_gradients import LORA, Gradients, lines, trainer_for, weights

NO_CLIP = {"max_grad_norm": 0}


def alone(recipe, k):
    """The tasks with weight 1 for the k-th and 0 for the others: a run with the gradient of its loss alone."""
    return [{**task, "weight": float(i == k)} for i, task in enumerate(recipe["tasks"])]


def first_gradient(recipe, folder, change=None, **more):
    """Gradient of the first step, at weights moved by `change`."""
    seen = Gradients()
    trainer = trainer_for(recipe, folder, steps=1, callback=seen, train=NO_CLIP, **more)
    for name, parameter in trainer.model.named_parameters():
        if change is not None and name in change:
            parameter.data += change[name]
    trainer.train()
    return seen.steps[0]


def length(gradient):
    return torch.stack([value.double().norm() for value in gradient.values()]).norm()


@pytest.mark.parametrize("dropout", [pytest.param(0.0, marks=pytest.mark.slow), 0.1])
@pytest.mark.parametrize(
    "split", [{}, pytest.param({"packing": False, "micro_batch_tokens": 64}, marks=pytest.mark.slow)]
)
def test_f_mtl_is_the_mean_of_gradients_at_moved_weights(recipe, tmp_path, dropout, split):
    """Without an aggregator A is p, and the direction is sum_k p_k grad L_k(theta + rho g_k / |g_k|).

    Dropout draws by place in the batch, so the pass at moved weights must see the whole batch and the same numbers.
    """
    more = {"lora": {**LORA, "dropout": dropout}, "train": {**NO_CLIP, **split}}
    total = None
    for k in range(3):
        seen = []
        for moved in (False, True):
            found, change = Gradients(), seen[0] if moved else None
            trainer = trainer_for(
                recipe, tmp_path / f"{k}{moved}", steps=1, callback=found, tasks=alone(recipe, k), **more
            )
            for name, parameter in trainer.model.named_parameters():
                if change is not None and name in change:
                    parameter.data += 0.5 * change[name] / length(change)
            trainer.train()
            seen.append(found.steps[0])
        there = {name: value / 3 for name, value in seen[1].items()}
        total = there if total is None else {name: total[name] + there[name] for name in total}
    found = Gradients()
    loss = {"gradients": {"flat": {"name": "f_mtl", "rho": 0.5}}}
    trainer = trainer_for(recipe, tmp_path / "flat", steps=1, callback=found, loss=loss, **more)
    trainer.train()
    plain = first_gradient(recipe, tmp_path / "plain", lora={**LORA, "dropout": dropout})
    for name, expected in total.items():
        assert float((found.steps[0][name] - expected).norm()) <= 1e-4 * float(expected.norm())
    assert length({name: total[name] - plain[name] for name in total}) > 0.05 * length(plain)  # it does matter


@pytest.mark.parametrize("flat", [{"name": "samo", "rho": 1e-7}, *slow({"name": "f_mtl", "rho": 1e-7})])
def test_small_steps_are_the_aggregators(recipe, tmp_path, flat):
    plain, found = Gradients(), Gradients()
    upgrad = {"aggregator": "upgrad"}
    trainer_for(recipe, tmp_path / "a", steps=2, callback=plain, loss={"gradients": upgrad}, train=NO_CLIP).train()
    loss = {"gradients": {**upgrad, "flat": flat}}
    trainer_for(recipe, tmp_path / "b", steps=2, callback=found, loss=loss, train=NO_CLIP).train()
    for expected, direction in zip(plain.steps, found.steps, strict=True):
        distance = length({name: direction[name] - expected[name] for name in expected})
        assert distance <= 1e-3 * length(expected)
    assert lines(tmp_path / "b")[0]["gradients"]["alpha"].keys() == {"copy", "twice", "shout"}


class Watch(Gradients):
    """Also the weights as the optimizer is about to see them, and the random numbers that come next."""

    def __init__(self):
        super().__init__()
        self.weights, self.random = [], []

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        super().on_pre_optimizer_step(args, state, control, **kwargs)
        self.weights.append({name: p.detach().clone() for name, p in kwargs["model"].named_parameters()})
        self.random.append(torch.get_rng_state())


@pytest.mark.parametrize("name", ["f_mtl", "samo"])
def test_restore_bit_equal(recipe, tmp_path, name):
    """Weights are back before the optimizer steps, and dropout goes on as if nothing had been."""
    plain, found = Watch(), Watch()
    more = {"lora": {**LORA, "dropout": 0.1}, "steps": 1}
    trainer_for(recipe, tmp_path / "plain", callback=plain, **more).train()
    trainer_for(recipe, tmp_path / "f", callback=found, loss={"gradients": {"flat": {"name": name}}}, **more).train()
    assert all(torch.equal(plain.weights[0][key], found.weights[0][key]) for key in plain.weights[0])
    assert torch.equal(plain.random[0], found.random[0])
    assert not all(torch.equal(plain.steps[0][key], found.steps[0][key]) for key in plain.steps[0])


@pytest.mark.parametrize("name", ["samo", *slow("f_mtl")])
def test_two_runs_give_the_same_bits(recipe, tmp_path, name):
    ends = []
    for run in "ab":
        loss = {"gradients": {"aggregator": "mgda", "flat": {"name": name}}}
        trainer = trainer_for(recipe, tmp_path / run, steps=3, loss=loss, train={"gradient_checkpointing": run == "b"})
        trainer.train()
        ends.append(weights(trainer))
    for key in ends[0]:
        torch.testing.assert_close(ends[0][key], ends[1][key], rtol=1e-4, atol=1e-5)


def test_affinity_goes_along(recipe, tmp_path):
    loss = {"gradients": {"every": 2, "flat": {"name": "f_mtl"}}}
    trainer_for(recipe, tmp_path, steps=4, loss=loss).train()
    assert json.loads((tmp_path / "affinity.json").read_text())["measures"] == 2


def test_rows_without_the_task_are_left_out():
    rows = [[Sample(0, (1, 2, 3), 2), Sample(1, (4, 5), 1)], [Sample(0, (6, 7), 1)], [Sample(1, (8, 9, 9), 0)]]
    batch = lay_out(rows)
    part = rows_of(batch, 1)
    assert torch.equal(part.input_ids_BT, batch.input_ids_BT[:1])  # the last row has no supervised token
    assert torch.equal(part.labels_BT, batch.labels_BT[:1])
    assert rows_of(batch, 2) is None
    whole = lay_out(rows[:1])
    assert rows_of(whole, 0) is whole
    assert int((part.labels_BT != IGNORE).sum()) == 3


def test_sharded_weights_are_refused():
    section = GradientSection(flat=FlatMinimaSection(name="f_mtl"))
    with pytest.raises(UserError, match="this engine has cut it up") as caught:
        TaskGradientStep(torch.nn.Linear(2, 2), ("a", "b"), section, whole=False)
    assert caught.value.where == "loss.gradients.flat"
