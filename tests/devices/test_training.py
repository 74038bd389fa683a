"""Every kind of training step on the simulated device: no CPU tensor meets a tensor of the device, the run is that of
the CPU, and the host waits no more often than it must.
"""

import contextlib
from itertools import pairwise
from unittest import mock

import pytest
import torch

from mtft.data.batching.prefetch import PrefetchedSteps
from mtft.data.planning import make_plan
from mtft.losses.task_reduction import group_sums
from mtft.recipe.schema.recipe import Recipe
from mtft.training.build_model import load_for_training
from mtft.training.run_files.metrics_log import MetricsLog
from mtft.training.step.objective import Objective
from mtft.training.trainer import build_trainer
from mtft.training.training_arguments import training_arguments
from mtft.training.training_inputs import read_training_inputs
from tests.devices.simulated_device import DeviceMixture, Simulation, simulated_device, to_cpu, to_device
from tests.devices.training_kinds import IN_THE_FAST_SUITE, KINDS
from tests.slow import slow
from tests.training.conftest import lines

MOST_WAITS = 2  # of a micro-batch
MICRO_BATCHES = 3  # of a step of the recipe
STEPS = 2


class PinnedSteps(PrefetchedSteps):
    """Batches in pinned memory, as on a GPU; pinned in this thread, which the simulation sees."""

    def __getitem__(self, s):
        return [batch.pin_memory() for batch in super().__getitem__(s)]


def run(recipe, folder, change, *, steps=STEPS, on_device, **train):
    """(losses of the steps, trained weights, the simulation) of a short run."""
    settings = {**recipe["train"], "steps": steps, "warmup": 0, **change.get("train", {}), **train}
    whole = Recipe.model_validate({**recipe, **change, "train": settings})
    inputs = read_training_inputs(whole)
    plan = make_plan(whole, inputs.stores)
    folder.mkdir()
    args = training_arguments(whole, folder, steps=plan.steps, evaluates=False, saves=False)
    seen = Simulation()
    with seen if on_device else contextlib.nullcontext():
        model = load_for_training(whole)
        if on_device:
            vars(args)["_setup_devices"] = args.distributed_state.device = simulated_device()
            to_device(model)
        starts = []  # (step, waits so far) at each forward pass
        model.get_input_embeddings().register_forward_pre_hook(
            lambda *_: starts.append((trainer.state.global_step, len(seen.waits)))
        )
        trainer = build_trainer(whole, inputs, plan, model, args, log=MetricsLog(folder, steps=plan.steps, quiet=True))
        steps_of = PinnedSteps if on_device else PrefetchedSteps
        with mock.patch("mtft.training.trainer.PrefetchedSteps", steps_of):
            trainer.train()
    return lines(folder), seen, starts


def figures(logged):
    """What a run did, apart from its clock: losses, task weights and gradient norms of every step."""
    return [
        [line["loss"], line["grad_norm"], *(task[key] for task in line["tasks"].values() for key in ("loss", "weight"))]
        for line in logged
    ]


@pytest.mark.parametrize(
    "kind", [*IN_THE_FAST_SUITE, *slow(*(kind for kind in KINDS if kind not in IN_THE_FAST_SUITE))]
)
def test_a_run_on_the_device_is_the_run_on_the_cpu(recipe, tmp_path, kind):
    expected, *_ = run(recipe, tmp_path / "cpu", KINDS[kind], on_device=False)
    found, seen, starts = run(recipe, tmp_path / "device", KINDS[kind], on_device=True)
    assert len(expected) == STEPS
    # mezo: a difference of two losses of fp32 over 2e-3
    for one, other in zip(figures(found), figures(expected), strict=True):
        assert one == pytest.approx(other, rel=5e-2 if kind == "mezo" else 1e-4, nan_ok=True)
    # Each place has one addend there: the label of a row. Backwards of torch's own operations have no place in mtft.
    unordered = {str(x) for x in seen.unordered if not x.where.startswith("elsewhere")}
    assert all("token_nll.py" in where for where in unordered), unordered
    assert too_many_waits(starts) <= 0, seen.told()


def too_many_waits(starts):
    """How many micro-batches wait too often, from one forward to the next; a pass over the step ends with one more."""
    waits = [after - before for (step, before), (same, after) in pairwise(starts) if step == same]
    ends_of_passes = len(starts) // MICRO_BATCHES - STEPS
    return sum(number > MOST_WAITS for number in waits) - ends_of_passes


def plant(monkeypatch, into_the_loss):
    plain = Objective.loss
    monkeypatch.setattr(Objective, "loss", lambda *given: into_the_loss(plain(*given)))


def test_a_cpu_tensor_planted_in_a_step_is_refused(recipe, tmp_path, monkeypatch):
    plant(monkeypatch, lambda loss: (loss * torch.ones(1)).sum())
    with pytest.raises(DeviceMixture, match="CPU tensor"):
        run(recipe, tmp_path / "device", {}, on_device=True)


def test_an_item_planted_in_a_step_is_counted(recipe, tmp_path, monkeypatch):
    plant(monkeypatch, lambda loss: loss * (loss.item() > 0) + 0 * loss.item())
    *_, seen, starts = run(recipe, tmp_path / "device", {}, on_device=True)
    assert too_many_waits(starts) == STEPS * (MICRO_BATCHES - 1)
    assert "test_training.py" in seen.told()


def test_sums_of_groups_are_those_of_the_cpu_and_an_infinity_stays_in_its_group():
    group_N, x_N = torch.tensor([2, 0, 2, 0, 3]), torch.tensor([1.0, 2.0, 4.0, torch.inf, torch.nan]).double()
    expected = group_sums(group_N, x_N, 5)
    with Simulation() as seen:
        found = group_sums(group_N.to(simulated_device()), x_N.to(simulated_device()), 5)
    torch.testing.assert_close(to_cpu(found), expected, equal_nan=True)
    assert expected.tolist()[2] == 5.0
    assert seen.unordered == []
