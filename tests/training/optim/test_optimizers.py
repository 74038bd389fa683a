"""Optimizers and schedules by name: they train, they resume bit for bit, and a wrong name says what was meant."""

import itertools
import signal

import pytest
import torch
from safetensors.torch import load_file
from transformers.training_args import OptimizerNames

from mtft.common.errors import UserError
from mtft.recipe.schema.train import TrainSection
from mtft.training.optim import optimizers
from mtft.training.optim.lr_schedules import schedule_arguments
from mtft.training.optim.muon_adamw import MuonAdamW
from mtft.training.optim.optimizers import known_optimizers, optimizer_name, state_bytes
from mtft.training.optim.schedule_free import evaluation_weights
from tests.slow import slow
from tests.training.test_run_training import kill_at_step, recipe_in, run
from tests.training.test_trainer import trainer_for

NAMES = ("adamw", "lion", "adafactor", "ademamix", "adamw_8bit", "paged_adamw_8bit", "lion_8bit", "sgd")


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("name", ["adamw_8bit", "schedule_free", "muon", *slow(*sorted({*NAMES} - {"adamw_8bit"}))])
def test_trains(recipe, tmp_path, name):
    rate = {"lion": 1e-3, "lion_8bit": 1e-3, "sgd": 0.3}.get(name, 5e-3)
    settings = {**recipe["train"], "optimizer": name, "learning_rate": rate, "steps": 12, "warmup": 0}
    if name == "schedule_free":
        settings["schedule"] = "constant"
    changes = {"lora": None} if name == "muon" else {}
    trainer, *_ = trainer_for(recipe, tmp_path, train=settings, **changes)
    start = weights(trainer)
    trainer.evaluate()
    before = {task: scores.summary()["loss"] for task, scores in trainer.evaluations[0].items()}
    trainer.train()
    trainer.evaluate()
    after = {task: scores.summary()["loss"] for task, scores in trainer.evaluations[12].items()}
    assert all(after[task] < before[task] for task in before)
    assert any(not torch.equal(value, start[key]) for key, value in weights(trainer).items())


def test_unknown_names_and_missing_packages(monkeypatch):
    with pytest.raises(UserError, match="lomo is not supported"):
        optimizer_name("lomo")
    with pytest.raises(UserError, match="no library that we depend on has it"):
        optimizer_name("sophia")
    with pytest.raises(UserError) as caught:
        optimizer_name("muonn")
    assert caught.value.do == "did you mean muon?"
    monkeypatch.setattr(optimizers, "find_spec", lambda name: None)
    with pytest.raises(UserError) as caught:
        optimizer_name("schedule_free")
    assert caught.value.do == 'pip install "mtft[schedulefree]"'
    with pytest.raises(UserError) as caught:
        optimizer_name("adamw_8bit")
    assert caught.value.do == 'pip install "mtft[qlora]"'
    assert optimizer_name("adamw") == "adamw_torch"
    assert {"muon", "adamw_torch", "schedule_free_adamw", "lion_8bit"} <= set(known_optimizers())


def test_usual_names_are_those_of_transformers():
    """They are looked up without it: one that a release drops would be refused only by its Trainer."""
    assert {name.value for name in OptimizerNames} >= optimizers.USUAL
    assert set(known_optimizers()) >= optimizers.USUAL


def test_muon_is_torchs_on_matrices_and_adamw_elsewhere():
    """Beside the two optimizers run by hand on copies of the same parameters."""
    torch.manual_seed(0)
    shapes = [(6, 4), (4, 4), (5,)]
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    by_hand = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    both = MuonAdamW(ours[:2], ours[2:], lr=0.1, weight_decay=0.01)
    muon = torch.optim.Muon(by_hand[:2], lr=0.1, weight_decay=0.01, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(by_hand[2:], lr=0.1, weight_decay=0.01)
    for step in range(4):
        for left, right in zip(ours, by_hand, strict=True):
            left.grad = torch.randn(left.shape, generator=torch.Generator().manual_seed(step))
            right.grad = left.grad.clone()
        if step == 2:  # a checkpoint in the middle changes nothing
            state = both.state_dict()
            both = MuonAdamW(ours[:2], ours[2:], lr=0.1, weight_decay=0.01)
            both.load_state_dict(state)
        for group in itertools.chain(both.param_groups, muon.param_groups, adamw.param_groups):
            group["lr"] = 0.1 / (step + 1)  # what a schedule does
        both.step()
        muon.step()
        adamw.step()
        assert all(torch.equal(left, right) for left, right in zip(ours, by_hand, strict=True))


def test_lora_plus_is_adamw_with_two_rates(recipe, tmp_path):
    """One step by hand: B moves with `plus` times the rate of A."""
    settings = {**recipe["train"], "warmup": 0, "max_grad_norm": 0, "steps": 3}
    trainer, *_ = trainer_for(recipe, tmp_path, train=settings, lora={"r": 4, "alpha": 8, "plus": 16})
    seen = []

    from transformers.trainer_callback import TrainerCallback

    class Rates(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, optimizer=None, **_):
            seen.append([group["lr"] for group in optimizer.param_groups])

    trainer.add_callback(Rates())
    trainer.train()
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    slow, fast = trainer.optimizer.param_groups
    assert all("lora_A" in names[id(p)] for p in slow["params"])
    assert all("lora_B" in names[id(p)] for p in fast["params"])
    for step, (a, b) in enumerate(seen):
        assert a == pytest.approx(5e-3 * (3 - step) / 3)
        assert b == pytest.approx(16 * a)


def test_state_bytes():
    shapes = [(128, 64), (64,)]
    assert state_bytes("adamw", shapes) == 8 * (128 * 64 + 64)
    assert state_bytes("paged_adamw_8bit", shapes) == 2 * 128 * 64 + 8 * 64  # small tensors stay in 32 bit
    assert state_bytes("adamw_8bit", shapes[:1], embedding=True) == 8 * 128 * 64
    assert state_bytes("lion", shapes) == 4 * (128 * 64 + 64)
    assert state_bytes("adafactor", shapes) == 4 * (128 + 64 + 64)
    assert state_bytes("muon", shapes) == 4 * 128 * 64 + 8 * 64
    assert state_bytes("sgd", shapes) == 0


@pytest.mark.parametrize(
    "name", ["adamw", "adamw_8bit", *slow("lion", "adafactor", "ademamix", "lion_8bit", "sgd", "schedule_free")]
)
def test_state_bytes_are_those_of_the_real_state(recipe, tmp_path, name):
    settings = {**recipe["train"], "optimizer": name, "steps": 1, "schedule": "constant"}
    trainer, *_ = trainer_for(recipe, tmp_path, train=settings, lora={"r": 4})
    trainer.train()
    inner = trainer.optimizer.optimizer
    found = sum(
        value.numel() * value.itemsize
        for state in inner.state.values()
        for key, value in state.items()
        if isinstance(value, torch.Tensor) and value.dim() > 0 and not key.startswith(("qmap", "absmax"))
    )
    assert found == state_bytes(name, [tuple(p.shape) for p in trainer.model.parameters() if p.requires_grad])


def rates(train, steps):
    from transformers import get_scheduler

    given = schedule_arguments(TrainSection(steps=steps, **train), steps)
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=train.get("learning_rate", 2e-4))
    name, settings = given["lr_scheduler_type"], given["lr_scheduler_kwargs"]
    schedule = get_scheduler(name, optimizer, given["warmup_steps"], steps, settings)
    out = []
    for _ in range(steps + 1):
        out.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return out


def test_schedules_end_where_they_should():
    peak = {"learning_rate": 1.0, "warmup": 0.1}
    linear = rates(peak, 20)
    assert linear[2] == 1.0
    assert linear[0] == linear[20] == 0
    assert linear[11] == pytest.approx(0.5)
    assert rates({**peak, "min_lr": 0.1}, 20)[20] == pytest.approx(0.1)
    assert rates({**peak, "min_lr": 0.1}, 20)[11] == pytest.approx(0.55)
    assert rates({**peak, "schedule": "cosine", "min_lr": 0.1}, 20)[20] == pytest.approx(0.1)
    assert rates({**peak, "schedule": "cosine"}, 20)[20] == pytest.approx(0)
    wsd = rates({**peak, "schedule": "wsd", "decay": 0.25}, 20)
    assert wsd[2:16] == [1.0] * 14
    assert wsd[15:21] == pytest.approx([1, 0.8, 0.6, 0.4, 0.2, 0])


def test_warmup_is_given_in_steps():
    """transformers would hand a share as it is to schedule-free, which multiplies its first rate by the inverse."""
    assert schedule_arguments(TrainSection(steps=100, warmup=0.03), 100)["warmup_steps"] == 3
    assert schedule_arguments(TrainSection(steps=100, warmup=7), 100)["warmup_steps"] == 7


@pytest.mark.slow
@pytest.mark.parametrize("name", ["schedule_free", "muon", "adamw_8bit", "lion", "adafactor", "ademamix"])
def test_a_broken_run_ends_as_the_unbroken_one(recipe, tmp_path, name):
    """Also with evaluations on the way, which schedule-free must not see."""
    settings = {"optimizer": name, "schedule": "constant" if name == "schedule_free" else "wsd"}
    changes = {"lora": None} if name == "muon" else {"lora": {"r": 4, "dropout": 0.1}}

    def asked(folder, **more):
        return recipe_in(recipe, folder, train={**settings, **more}, **changes)

    assert run(asked(tmp_path / "run")) == 0
    assert run(asked(tmp_path / "broken", eval_every=2), kill_at_step(5)) == -signal.SIGKILL
    assert run(asked(tmp_path / "broken", eval_every=2)) == 0
    whole, broken = picture_of_weights(tmp_path / "run"), picture_of_weights(tmp_path / "broken")
    assert whole == broken


def picture_of_weights(folder):
    place = folder / "adapter" if (folder / "adapter").is_dir() else folder / "model"
    return {name: value.tolist() for path in place.glob("*.safetensors") for name, value in load_file(path).items()}


def test_what_is_evaluated_is_schedule_frees_average(recipe, tmp_path):
    """The weights that are scored are x, and training goes on at y as if nothing had been looked at."""
    settings = {**recipe["train"], "optimizer": "schedule_free", "schedule": "constant", "warmup": 2}
    trainer, *_ = trainer_for(recipe, tmp_path, train=settings, lora={"r": 4})
    trainer.train()
    y = weights(trainer)
    with evaluation_weights(trainer.optimizer):
        x = weights(trainer)
    assert all(torch.equal(value, y[name]) for name, value in weights(trainer).items())
    groups = trainer.optimizer.optimizer.param_groups
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    for group in groups:
        assert group["train_mode"]
        for parameter in group["params"]:
            name, z = names[id(parameter)], trainer.optimizer.optimizer.state[parameter]["z"]
            # y = (1 - beta) z + beta x
            expected = torch.lerp(z, x[name], group["betas"][0])
            torch.testing.assert_close(y[name], expected, rtol=1e-5, atol=1e-6)
