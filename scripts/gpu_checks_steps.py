"""Single steps on a device: splits, packing, task gradients, every method. Checks of scripts/check_gpu.py."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, get_args

from gpu_checks import (
    TASKS,
    Bench,
    Check,
    Line,
    Lines,
    at_least,
    at_most,
    distance,
    holds,
    info,
    reason,
    skip,
    step_lines,
)
from gpu_checks_train import package


def trainer_of(recipe: Any) -> Any:
    from mtft import MultiTaskTrainer

    return MultiTaskTrainer.from_recipe(recipe)


def watch_gradients(trainer: Any) -> dict[str, Any]:
    """Filled with the gradients of the trained weights, as the first step's optimizer sees them."""
    from transformers.trainer_callback import TrainerCallback

    found: dict[str, Any] = {}

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
            if not found:
                found.update(
                    (name, parameter.grad.detach().clone())
                    for name, parameter in trainer.model.named_parameters()
                    if parameter.grad is not None
                )

    trainer.add_callback(Watch())
    return found


def splits(bench: Bench) -> Lines:
    """The gradient of one step in one micro-batch, and in four or more."""
    size = bench.sizes
    for name, changes in (("full", {"lora": None}), ("LoRA", {})):
        gradients, counts = [], []
        for parts in (1, 4):
            train = {"steps": 1, "batch_tokens": 4 * size.batch_tokens, "optimizer": "sgd", "max_grad_norm": 0}
            train["micro_batch_tokens"] = (8 if parts == 1 else 1) * size.batch_tokens
            trainer = trainer_of(bench.recipe(f"split-{parts}", train=train, **changes))
            counts.append(len(trainer.steps[0]))
            found = watch_gradients(trainer)
            trainer.train()
            gradients.append(found)
        if counts[0] != 1 or counts[1] < 4:
            yield holds(f"{name}, fp32: one micro-batch against four", False, f"they were {counts}")
            continue
        what = f"{name}, fp32: gradient of 1 against {counts[1]} micro-batches"
        yield at_most(what, distance(*gradients), 1e-5)


def attentions() -> tuple[str, ...]:
    """What a recipe may name, but for auto."""
    from mtft.recipe.schema.model import ModelSection

    return tuple(name for name in get_args(ModelSection.model_fields["attention"].annotation) if name != "auto")


def why_not(name: str, bench: Bench) -> str | None:
    """Why an attention kernel can't be tried here."""
    if name == "flash_attention_2" and package("flash-attn") is None:
        return "flash-attn is not installed"
    if name.startswith("flash") and not bench.on_gpu:
        return "needs a GPU"
    if name == "flex_attention" and not bench.on_gpu:
        return "is compiled, for GPUs"
    return None


def packing(bench: Bench) -> Lines:
    """Another text in place of a packed neighbour changes no other example's losses, with any kernel."""
    for name in ("auto", *attentions()):
        if (why := why_not(name, bench)) is not None:
            yield skip(f"packing, {name}", why)
            continue
        for dtype in ("fp32", "bf16") if bench.on_gpu else ("fp32",):
            if dtype == "fp32" and name.startswith("flash"):
                yield skip(f"packing, {name}, fp32", "the kernel has no fp32")
                continue
            what = f"packing, {name}, {dtype}: leak by that of an open row"
            yield bench.guarded(what, partial(isolation, name, dtype, bench, what))


def isolation(name: str, dtype: str, bench: Bench, what: str) -> Line:
    """What leaks through, by what leaks where the model is given the row as one text."""
    import torch

    model = {"attention": name, "dtype": dtype, "path": str(bench.model(std=0.2))}
    trainer = trainer_of(bench.recipe("packing", model=model))
    network, used = trainer.model.eval(), trainer.model.config._attn_implementation
    what = what.replace(name, f"{name} ({used})") if name != used else what
    batch = next((b for b in trainer.steps[0] if int(b.segment_ids_BT[0].max()) > 0), None)
    if batch is None:
        return skip(what, "mtft does not pack rows for it")
    first_BT = torch.zeros_like(batch.segment_ids_BT, dtype=torch.bool)
    first_BT[0] = batch.segment_ids_BT[0] == 0
    other_BT = torch.where(first_BT, 3 + (batch.input_ids_BT + 101) % 250, batch.input_ids_BT)
    changed = replace(batch, input_ids_BT=other_BT)
    rest_BT = (batch.labels_BT != -100) & ~first_BT
    with torch.no_grad(), torch.autocast(bench.device, dtype=torch.bfloat16, enabled=dtype == "bf16"):
        nll = [trainer.objective.nll(network, b.to(bench.device)).float().cpu() for b in (batch, changed)]
        row = [b.input_ids_BT[:1].to(bench.device) for b in (batch, changed)]
        open_row = [network(input_ids=ids, use_cache=False).logits.float().cpu() for ids in row]
    leak = float((nll[0] - nll[1])[rest_BT].abs().max())
    after_T = ~first_BT[0] & (batch.segment_ids_BT[0] >= 0)
    opened = float((open_row[0] - open_row[1])[0, after_T].abs().max())
    seen = float((nll[0] - nll[1])[first_BT].abs().max())
    if not (opened > 0 and seen > 0):
        return holds(what, False, "the changed text changed nothing at all: nothing was shown")
    return at_most(what, leak / opened, 1e-3 if dtype == "bf16" else 1e-5)


def task_gradients(bench: Bench) -> Lines:
    """The gradients of three tasks out of one backward, against one backward for each task."""
    import torch

    from mtft import TaskGradients
    from mtft.losses.token_nll import is_isolated

    recipe = bench.recipe("task-gradients", train={"batch_tokens": 2 * bench.sizes.batch_tokens})
    trainer = trainer_of(recipe)
    model = trainer.model.train()
    with torch.no_grad():  # B is 0 at the start, and A's gradients with it
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    batch = max(trainer.steps[0], key=lambda b: len(b.task_ids_BT.unique())).to(bench.device)
    learnt_BT = batch.labels_BT != -100
    K = len(TASKS)
    tokens = [((batch.task_ids_BT == k) & learnt_BT) for k in range(K)]
    present = [k for k in range(K) if bool(tokens[k].any())]

    def losses() -> list[Any]:
        nll_BT = trainer.objective.nll(model, batch)
        return [nll_BT[tokens[k]].mean() for k in present]

    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    alone: dict[str, list[Any]] = {name: [] for name in parameters}
    for index in range(len(present)):
        found = torch.autograd.grad(losses()[index], list(parameters.values()), retain_graph=False)
        for name, gradient in zip(parameters, found, strict=True):
            alone[name].append(gradient)
    coef_K = torch.zeros(K, dtype=torch.float64)
    coef_K[present] = 1 / len(present)
    taps = TaskGradients(model, K, isolated=is_isolated(model))
    with taps:
        taps.begin(batch.task_ids_BT, learnt_BT)
        taps.watch(sum(losses()) / len(present)).backward()
    together = taps.jacobian(coef_K)
    expected = {name: torch.stack(values) for name, values in alone.items()}
    got = {name: together[name][present] for name in expected}
    note = f"{len(present)} tasks, {len(expected)} weights"
    yield at_least("tasks in the batch", len(present), 2)
    yield at_most("task gradients of one backward against one each, fp32", distance(expected, got), 1e-5, note)
    model.zero_grad(set_to_none=True)


def methods(bench: Bench) -> Lines:
    """Every balancer and aggregator, flat minima, NEFTune, MeZO: finite losses, and weights that move."""
    from mtft.gradients.aggregators import AGGREGATORS
    from mtft.losses.balancers import BALANCERS
    from mtft.recipe.schema.loss import FlatMinimaSection

    flat = get_args(FlatMinimaSection.model_fields["name"].annotation)
    groups: dict[str, dict[str, dict[str, Any]]] = {
        "balancers": {name: {"loss": {"balancer": balancer(name)}} for name in BALANCERS},
        "aggregators": {name: {"loss": {"gradients": {"aggregator": name}}} for name in AGGREGATORS},
        "flat minima": {name: {"loss": {"gradients": {"flat": {"name": name}}}} for name in flat},
        "NEFTune and MeZO": {
            "neftune": {"train": {"neftune": 5.0}},
            "mezo": {"train": {"mezo": 1e-3, "optimizer": "sgd", "max_grad_norm": 0}},
        },
    }
    for group, members in groups.items():
        failed = {}
        for name, changes in members.items():
            try:
                if trouble := two_steps(bench, name, changes):
                    failed[name] = trouble
            except Exception as error:
                if not bench.sound():
                    raise
                failed[name] = reason(error)
                bench.free()
        told = "; ".join(f"{name}: {why}" for name, why in failed.items()) or ", ".join(members)
        yield at_most(f"{group}: failures of {len(members)}", len(failed), 0, told)


def balancer(name: str) -> dict[str, Any]:
    """Its section, so that it acts at once."""
    from mtft.losses.balancers import BALANCERS
    from mtft.recipe.method_options import options_of

    by_task = {task: 1.0 + index for index, task in enumerate(TASKS)}
    given = {
        "fixed": {"values": by_task},
        "visatb": {"given": by_task, "received": by_task, "alone": by_task},
        "coba": {"warmup": 2},
    }
    at_once = {option: 1 for option in ("gram_every", "valid_every", "every") if option in options_of(BALANCERS[name])}
    return {"name": name, **at_once, **given.get(name, {})}


def two_steps(bench: Bench, name: str, changes: Mapping[str, Any]) -> str:
    """What is wrong after two steps; empty: nothing."""
    import torch

    train = {"steps": 2, **changes.get("train", {})}
    trainer = trainer_of(bench.recipe(name, **{**changes, "train": train}))
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    after = dict(trainer.model.named_parameters())
    losses = [line["loss"] for line in step_lines(trainer.run_log.run_dir)]
    if len(losses) != 2 or not all(isinstance(loss, float) and math.isfinite(loss) for loss in losses):
        return f"losses {losses}"
    if not all(bool(torch.isfinite(after[n]).all()) for n in before):
        return "weights that are not finite"
    if all(torch.equal(after[n], start) for n, start in before.items()):
        return "no weight moved"
    return ""


@contextmanager
def as_fp16(trainer: Any, bench: Bench, scale: float) -> Iterator[None]:
    """A first loss scale that overflows. Without a GPU accelerate makes no scaler: torch's own for CPUs."""
    import torch

    accelerator = trainer.accelerator
    if not bench.on_gpu:
        accelerator.state._mixed_precision = "fp16"
        accelerator.native_amp = True
    accelerator.scaler = torch.amp.GradScaler(bench.device, init_scale=scale, backoff_factor=2.0**-30)
    try:
        yield
    finally:
        if not bench.on_gpu:
            accelerator.state._mixed_precision = "no"


def fp16(bench: Bench) -> Lines:
    """A first step that overflows, and steps without a supervised token, as they stand in real runs."""
    tasks = [{**task, "weight": 0.0 if task["name"] == "copy" else 1.0} for task in bench.tasks()]
    changes: dict[str, Any] = {
        "tasks": tasks,
        "mixture": {"shares": {"copy": 0.5, "twice": 0.25, "shout": 0.25}},
        "train": {"steps": 12, "batch_tokens": 16, "micro_batch_tokens": bench.sizes.max_length},  # an example a step
        "model": {"dtype": "fp16" if bench.on_gpu else "fp32"},
    }
    trainer = trainer_of(bench.recipe("fp16", **changes))
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    with as_fp16(trainer, bench, 2.0**40):
        trainer.train()
    skipped = [line.get("skipped") for line in step_lines(trainer.run_log.run_dir)]
    yield at_least("fp16: empty steps that the run has passed", skipped.count("empty"), 1)
    yield at_most("fp16: |overflowed steps - 1|", abs(skipped.count("non-finite") - 1), 0, f"steps: {skipped}")
    moved = distance(before, {n: p for n, p in trainer.model.named_parameters() if n in before})
    finite = all(math.isfinite(float(p.detach().abs().max())) for p in trainer.model.parameters())
    yield holds("fp16: weights moved and are finite", moved > 0 and finite, f"by {moved:.1e}")
    if not bench.on_gpu:
        yield info("fp16: autocast and GradScaler of the CPU", "GPUs have their own; mtft train refuses fp16 here")


STEPS = (
    Check("split", "one against four micro-batches: gradients", splits, (5, 5)),
    Check("packing", "packing: a changed neighbour changes nothing", packing, (5, 20)),
    Check("gradients", "task gradients against one backward a task", task_gradients, (3, 3)),
    Check("methods", "every balancer and aggregator, F-MTL, SAMO, NEFTune, MeZO", methods, (25, 15)),
    Check("fp16", "fp16: overflow and an empty step", fp16, (4, 5)),
)
