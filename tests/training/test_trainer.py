"""The trainer against a loop that is written out by hand, and the promise that the split of a step does not matter."""

import itertools
import json
import threading

import pytest
import torch
from transformers.trainer_callback import TrainerCallback

from mtft.common.errors import UserError
from mtft.data.planning import make_plan
from mtft.recipe.schema.recipe import Recipe
from mtft.training.build_model import load_for_training
from mtft.training.run_files.metrics_log import MetricsLog
from mtft.training.trainer import build_trainer
from mtft.training.training_arguments import training_arguments
from mtft.training.training_inputs import read_training_inputs
from tests.slow import slow
from tests.training.conftest import lines

NORMALISATIONS = ("token", "sample", "task_token", "task_sample")


def trainer_for(recipe, tmp_path, **changes):
    recipe = Recipe.model_validate({**recipe, **changes})
    inputs = read_training_inputs(recipe)
    plan = make_plan(recipe, inputs.stores)
    args = training_arguments(recipe, tmp_path, steps=plan.steps, evaluates=False, saves=False)
    log = MetricsLog(tmp_path, steps=plan.steps, quiet=True)
    return build_trainer(recipe, inputs, plan, load_for_training(recipe), args, log=log), inputs, plan


class Gradients(TrainerCallback):
    """Keeps the gradients of the first step as the optimizer is about to see them."""

    found: dict[str, torch.Tensor]

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == 0:
            model = kwargs["model"]
            self.found = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def first_gradients(recipe, tmp_path, **train):
    """Gradients of one step (B = 0 at the start would hide those of A, so the adapter is full fine-tuning's)."""
    settings = {**recipe["train"], "max_grad_norm": 0, "steps": 1, **train}
    trainer, *_ = trainer_for(recipe, tmp_path, train=settings, lora=None)
    seen = Gradients()
    trainer.add_callback(seen)
    trainer.train()
    return seen.found


def by_hand(recipe, inputs, plan, weights, steps):
    """One example at a time, full logits, one backward of the whole objective; AdamW and a linear schedule by hand."""
    model = load_for_training(recipe).train()
    asked = recipe.train
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=asked.learning_rate, betas=(asked.beta1, asked.beta2), weight_decay=0)
    losses = []
    for step in range(steps):
        tokens, means = {}, {}
        task, _, row = plan.step(step)
        for k, i in zip(task.tolist(), row.tolist(), strict=True):
            example = inputs.stores[k].example(i)
            ids = torch.from_numpy(example.input_ids).long()[None]
            logp = model(input_ids=ids).logits[0].log_softmax(-1)
            nll = torch.stack([-logp[t - 1, ids[0, t]] for t in range(1, ids.shape[1]) if example.supervised[t]])
            tokens.setdefault(k, []).append(nll)
            means.setdefault(k, []).append(nll.mean())
        tokens = {k: torch.cat(parts) for k, parts in tokens.items()}
        means = {k: torch.stack(parts) for k, parts in means.items()}
        if recipe.loss.normalise == "token":
            loss = sum(weights[k] * x.sum() for k, x in tokens.items()) / sum(
                weights[k] * len(x) for k, x in tokens.items()
            )
        elif recipe.loss.normalise == "sample":
            loss = sum(weights[k] * x.sum() for k, x in means.items()) / sum(
                weights[k] * len(x) for k, x in means.items()
            )
        else:
            parts = tokens if recipe.loss.normalise == "task_token" else means
            loss = sum(weights[k] * x.mean() for k, x in parts.items()) / sum(weights[k] for k in parts)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, asked.max_grad_norm)
        warmup = asked.warmup
        factor = step / warmup if step < warmup else (asked.steps - step) / (asked.steps - warmup)
        for group in optimizer.param_groups:
            group["lr"] = asked.learning_rate * factor
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    return losses, {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("normalise", ["token", "task_sample", *slow("sample", "task_token")])
def test_equals_a_loop_by_hand(recipe, tmp_path, normalise):
    weights = (1.0, 2.0, 0.5)
    tasks = [{**task, "weight": weight} for task, weight in zip(recipe["tasks"], weights, strict=True)]
    changes = {
        "tasks": tasks,
        "lora": {"r": 4, "alpha": 8},
        "loss": {"normalise": normalise},
        "train": {**recipe["train"], "steps": 5},
    }
    trainer, inputs, plan = trainer_for(recipe, tmp_path, **changes)
    trainer.train()
    whole = Recipe.model_validate({**recipe, **changes})
    expected, parameters = by_hand(whole, inputs, plan, weights, steps=5)
    assert [line["loss"] for line in lines(tmp_path)] == pytest.approx(expected, rel=1e-6)
    for name, value in trainer.model.named_parameters():
        if value.requires_grad:
            torch.testing.assert_close(value.detach(), parameters[name], rtol=1e-4, atol=1e-6)


def test_split_of_the_step_does_not_change_its_gradient(recipe, tmp_path):
    """1 micro-batch of 8 examples, 8 of 1, something between; packed and unpacked (2 ranks: tests/distributed)."""
    splits = {
        "one packed row a micro-batch": {"micro_batch_tokens": 64, "packing": True},
        "all rows in one": {"micro_batch_tokens": 2048, "packing": True},
        "all examples in one, unpacked": {"micro_batch_tokens": 2048, "packing": False},
        "few unpacked": {"micro_batch_tokens": 100, "packing": False},
    }
    asked = {"batch_tokens": 400}
    reference = first_gradients(recipe, tmp_path, micro_batch_tokens=64, packing=False, **asked)
    scale = max(float(value.abs().max()) for value in reference.values())
    for name, split in splits.items():
        found = first_gradients(recipe, tmp_path, **split, **asked)
        worst = max(float((found[key] - value).abs().max()) for key, value in reference.items())
        assert worst <= 1e-6 * scale, f"{name}: {worst / scale:.1e}"


def test_metrics_of_a_step(recipe, tmp_path):
    trainer, inputs, plan = trainer_for(recipe, tmp_path)
    trainer.train()
    found = lines(tmp_path)
    assert [line["step"] for line in found] == list(range(1, plan.steps + 1))
    line = found[3]
    assert {"loss", "learning_rate", "grad_norm", "tokens", "supervised", "seconds", "tokens_per_second"} <= line.keys()
    tasks = line["tasks"]
    assert list(tasks) == ["copy", "twice", "shout"]
    task, _, row = plan.step(3)
    assert [tasks[name]["examples"] for name in tasks] == [int((task == k).sum()) for k in range(3)]
    assert line["tokens"] == sum(int(inputs.stores[k].lengths[i]) for k, i in zip(task, row, strict=True))
    # The last token of an example predicts nothing; the first is predicted by nothing.
    assert line["supervised"] == sum(int(inputs.stores[k].supervised[i]) for k, i in zip(task, row, strict=True))
    assert sum(values["share"] for values in tasks.values()) == pytest.approx(1)
    assert sum(values["loss_share"] * values["loss"] for values in tasks.values()) == pytest.approx(line["loss"])
    assert found[0]["learning_rate"] == 0  # warm-up over two steps
    assert found[2]["learning_rate"] == pytest.approx(5e-3)


def test_absent_task_is_null_and_takes_no_part(recipe, tmp_path):
    trainer, *_ = trainer_for(recipe, tmp_path, mixture={"shares": {"copy": 0.5, "twice": 0.5, "shout": 0.0}})
    trainer.train()
    for line in lines(tmp_path):
        assert line["tasks"]["shout"]["loss"] is None
        assert line["tasks"]["shout"]["loss_share"] == 0
        assert line["loss"] == pytest.approx((line["tasks"]["copy"]["loss"] + line["tasks"]["twice"]["loss"]) / 2)


class Poison(TrainerCallback):
    """Makes the adapter's gradient (`grad`) or its weights (`weights`) infinite before some steps."""

    def __init__(self, what, steps):
        self.what, self.steps = what, steps

    def on_step_begin(self, args, state, control, **kwargs):
        parameter = next(p for p in kwargs["model"].parameters() if p.requires_grad)
        if state.global_step + 1 in self.steps:
            if self.what == "weights":
                self.kept = parameter.detach().clone()
                parameter.data.fill_(float("nan"))
            else:
                self.hook = parameter.register_hook(lambda gradient: gradient * float("inf"))

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step in self.steps:
            if self.what == "weights":
                next(p for p in kwargs["model"].parameters() if p.requires_grad).data.copy_(self.kept)
            else:
                self.hook.remove()


@pytest.mark.parametrize("what", ["grad", *slow("weights")])
def test_step_that_is_not_finite_moves_nothing_but_the_schedule(recipe, tmp_path, what):
    trainer, *_ = trainer_for(recipe, tmp_path)
    before = {}

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            before[state.global_step + 1] = self.picture(kwargs)

        def on_optimizer_step(self, args, state, control, **kwargs):
            if state.global_step + 1 == 5:
                assert self.picture(kwargs) == before[5]

        @staticmethod
        def picture(kwargs):
            moments = kwargs["optimizer"].state_dict()["state"]
            return repr([(i, float(m["step"]), float(m["exp_avg"].sum())) for i, m in moments.items()])

    trainer.add_callback(Watch())
    trainer.add_callback(Poison(what, {5}))
    trainer.train()
    found = lines(tmp_path)
    assert trainer.bad_steps == {"non-finite": 1, "empty": 0}
    assert [line.get("skipped") for line in found] == [None] * 4 + ["non-finite"] + [None] * 3
    assert found[5]["learning_rate"] < found[4]["learning_rate"]
    assert all(bool(p.isfinite().all()) for p in trainer.model.parameters())


def test_stops_when_too_many_steps_in_a_row_are_not_finite(recipe, tmp_path):
    trainer, inputs, plan = trainer_for(recipe, tmp_path, train={**recipe["train"], "max_bad_steps": 2})
    trainer.add_callback(Poison("grad", {3, 5, 6}))
    with pytest.raises(UserError, match="2 steps in a row"):
        trainer.train()
    written = json.loads((tmp_path / "bad-step-6.json").read_text())
    task, _, row = plan.step(5)
    assert [(example["task"], example["id"]) for example in written["examples"]] == [
        (inputs.stores[k].task, inputs.stores[k].ids[int(i)]) for k, i in zip(task, row, strict=True)
    ]


def test_step_without_any_weight_is_skipped_and_named(recipe, tmp_path):
    """Only the task of weight 0 is sampled: nothing to learn from in any step."""
    tasks = [{**task, "weight": 0.0 if task["name"] == "copy" else 1.0} for task in recipe["tasks"]]
    mixture = {"shares": {"copy": 1.0, "twice": 0.0, "shout": 0.0}}
    settings = {**recipe["train"], "max_bad_steps": 3}
    trainer, *_ = trainer_for(recipe, tmp_path, tasks=tasks, mixture=mixture, train=settings)
    start = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    with pytest.raises(UserError, match="no supervised token") as caught:
        trainer.train()
    assert "copy" in caught.value.what
    assert trainer.bad_steps["empty"] == 3
    assert all(torch.equal(p, start[name]) for name, p in trainer.model.named_parameters())


class Breaks(TrainerCallback):
    def __init__(self, error):
        self.error = error

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 2:
            raise self.error


@pytest.mark.parametrize("where", ["batch", "step", "Ctrl-C"])
def test_an_error_comes_as_it_is_and_leaves_no_thread(recipe, tmp_path, where):
    trainer, *_ = trainer_for(recipe, tmp_path)
    before = set(threading.enumerate())
    error = KeyboardInterrupt() if where == "Ctrl-C" else OSError("the disk is gone")
    if where == "batch":
        store = trainer.steps.stores[0]
        example, served = store.example, itertools.count()

        def failing(i):
            if next(served) == 20:
                raise error
            return example(i)

        store.example = failing
    else:
        trainer.add_callback(Breaks(error))
    with pytest.raises(type(error)) as caught:
        trainer.train()
    assert caught.value is error
    assert set(threading.enumerate()) <= before


@pytest.fixture
def in_fp16(monkeypatch):
    """Makes a trainer do on the CPU what accelerate does for fp16 on GPUs alone: autocast and a gradient scaler."""

    def change(trainer, **options):
        monkeypatch.setattr(trainer.accelerator.state, "_mixed_precision", "fp16")
        trainer.accelerator.native_amp = True
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", **options)

    return change


def test_fp16_takes_overflows_and_empty_steps(recipe, tmp_path, in_fp16):
    """Steps of `copy` alone are empty, the first other one overflows: the schedule and the rest go on as in fp32."""
    tasks = [{**task, "weight": 0.0 if task["name"] == "copy" else 1.0} for task in recipe["tasks"]]
    mixture = {"shares": {"copy": 0.5, "twice": 0.25, "shout": 0.25}}
    settings = {**recipe["train"], "batch_tokens": 16, "steps": 12}  # one example a step
    for name, fp16 in (("fp32", False), ("fp16", True)):
        (tmp_path / name).mkdir()
        lora = {**recipe["lora"], "dropout": 0.0}
        trainer, *_ = trainer_for(recipe, tmp_path / name, tasks=tasks, mixture=mixture, train=settings, lora=lora)
        if fp16:  # a first scale that overflows once
            in_fp16(trainer, init_scale=2.0**40, backoff_factor=2.0**-30)
        trainer.train()
    expected, found = lines(tmp_path / "fp32"), lines(tmp_path / "fp16")
    empty = [line.get("skipped") for line in expected]
    assert 0 < empty.count("empty") < len(empty)
    assert empty[0] == "empty"
    first = empty.index(None)
    assert [line.get("skipped") for line in found] == [*empty[:first], "non-finite", *empty[first + 1 :]]
    assert [line["learning_rate"] for line in found] == [line["learning_rate"] for line in expected]
    assert trainer.accelerator.scaler.get_scale() == 2.0**10
    assert float(found[-1]["loss"]) < float(found[first]["loss"])


def test_own_balancer_weights_reach_the_loss(recipe, tmp_path):
    fixed = {"balancer": {"name": "fixed", "values": {"copy": 3.0, "twice": 1.0, "shout": 0.0}}}
    trainer, *_ = trainer_for(recipe, tmp_path, loss=fixed)
    trainer.train()
    line = lines(tmp_path)[0]
    assert [line["tasks"][task]["loss_share"] for task in ("copy", "twice", "shout")] == pytest.approx([0.75, 0.25, 0])


def test_unknown_optimizer_names_the_nearest(recipe, tmp_path):
    with pytest.raises(UserError, match="adamww") as caught:
        trainer_for(recipe, tmp_path, train={**recipe["train"], "optimizer": "adamww"})
    assert caught.value.do == "did you mean adamw?"


BALANCERS = (
    {"name": "coba", "warmup": 2, "window": 4, "valid_every": 2},
    *slow(
        {"name": "random"},
        {"name": "temperature", "temperature": 2.0},
        {"name": "focal"},
        {"name": "famo", "after": "exact"},
        {"name": "dwa", "window": 2},
        {"name": "gls", "step_loss": "exact"},
    ),
)


@pytest.mark.parametrize("balancer", BALANCERS, ids=lambda options: options["name"])
def test_weights_of_balancers_do_not_depend_on_the_split(recipe, tmp_path, balancer):
    """What each asks for (validation, probabilities, losses before or after the step) is measured for any split."""
    found = {}
    for name, tokens in (("one", 4096), ("several", 64)):
        settings = {**recipe["train"], "steps": 6, "micro_batch_tokens": tokens, "warmup": 0}
        trainer, *_ = trainer_for(recipe, tmp_path / name, loss={"balancer": balancer}, train=settings, lora={"r": 4})
        trainer.train()
        found[name] = [[values["weight"] for values in line["tasks"].values()] for line in lines(tmp_path / name)]
    for left, right in zip(found["one"], found["several"], strict=True):
        assert left == pytest.approx(right, rel=1e-4)
    if balancer["name"] != "temperature":
        assert found["one"][5] != found["one"][1]


def test_several_gpus_without_a_launcher_are_one_and_the_run_says_so(recipe, tmp_path, capsys):
    """Trainer would wrap the model in DataParallel."""
    recipe = Recipe.model_validate({**recipe, "train": {**recipe["train"], "steps": 1}})
    inputs = read_training_inputs(recipe)
    plan = make_plan(recipe, inputs.stores)
    args = training_arguments(recipe, tmp_path, steps=plan.steps, evaluates=False, saves=False)
    assert args.n_gpu == 0
    args._n_gpu = 4  # what transformers finds where four are visible
    log = MetricsLog(tmp_path, steps=plan.steps)
    trainer = build_trainer(recipe, inputs, plan, load_for_training(recipe), args, log=log)
    trainer.train()
    assert not any(isinstance(module, torch.nn.DataParallel) for module in trainer.model_wrapped.modules())
    assert "torchrun --nproc_per_node 4 -m mtft train" in capsys.readouterr().err
