"""After a task was added: find the modules that forgot the old tasks, and tune only those again for a few short rounds.

    mtft refresh RECIPE --before runs/old/adapter --after runs/new/adapter --new sql --out runs/refreshed

Each round measures every task's gradients on a small buffer at both ends (mtft/gradients/forgetting.py), picks the
modules
with the most forgetting, and trains those for a few steps on the buffer of all tasks; the rest of the adapter stays
bit-equal. The adapters must be LoRA adapters of the same shape, the second one usually trained on from the first
(`lora.start`). One process. OUT holds `adapter/` and `refresh.json` (modules, forgetting, held-out losses).
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtft.adapters.lora_factors import WEIGHTS
from mtft.adapters.safetensors_io import read_header
from mtft.common.atomic_folder import atomic_folder
from mtft.common.atomic_io import finite
from mtft.common.errors import UserError
from mtft.common.own_files import write_own
from mtft.data.batching.batch import IGNORE
from mtft.data.batching.batches import eval_batches
from mtft.data.batching.packed_attention import packing_refusal
from mtft.data.planning import make_plan
from mtft.distributed.launch import world_size
from mtft.evaluation.evaluate_model import evaluate_model
from mtft.evaluation.evaluation_mode import evaluation_mode
from mtft.evaluation.heldout_loss import BatchLayout
from mtft.gradients.capture.task_gradients import TaskGradients
from mtft.gradients.forgetting import forgetting, module_of, select_forgetful_modules, totals
from mtft.losses.task_reduction import coefficients, step_counts, task_coefficients
from mtft.losses.token_nll import token_nll
from mtft.models.adapters import load_adapter, read_peft_config
from mtft.models.loading import load_base, pad_id
from mtft.models.model_files import broken_weights
from mtft.recipe.input_paths import input_paths
from mtft.recipe.schema.recipe import Recipe
from mtft.training.export.export import ADAPTER, export_model
from mtft.training.run_files.metrics_log import MetricsLog
from mtft.training.trainer import build_trainer
from mtft.training.training_arguments import training_arguments
from mtft.training.training_inputs import TrainingInputs, read_training_inputs

FILE = "refresh.json"
SCALES = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "use_dora")


@dataclass(frozen=True)
class Round:
    """One round: what it tuned, and what it saw before that on the buffer. lost: {task: estimated rise of its loss}."""

    modules: list[str]
    of: int
    lost: dict[str, float]


@dataclass(frozen=True)
class Refreshed:
    """adapter: folder of the new adapter;  losses: {"before" | "after" | "refreshed": {task: held-out loss}}."""

    adapter: Path
    rounds: list[Round]
    losses: dict[str, dict[str, float]]


def refresh(
    recipe: Recipe,
    before: Path,
    after: Path,
    out: Path,
    *,
    new: Sequence[str],
    rounds: int = 3,
    steps: int = 10,
    rows: int = 64,
    share: float = 0.5,
    overwrite: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> Refreshed:
    """k-FPF on two adapters. `new`: the task(s) that were added; all others of the recipe are old.

    rounds   measure and tune so often;  steps  optimizer steps of a round, with the recipe's batches and learning rate
    rows     training rows of each task in the buffer
    share    part of the old tasks' forgetting that the tuned modules hold together
    overwrite  replace the folder of an earlier refresh, if nothing in it was changed
    Raises UserError for adapters that don't fit, unknown tasks, several processes, or an output that holds anything.
    """
    inputs = [before, after, *input_paths(recipe)]
    buffered = _buffered(recipe, new, out, rows=rows, steps=steps)
    with atomic_folder(out, overwrite=overwrite, inputs=inputs) as folder:
        _check_adapters(before, after)
        rounds_done, losses = _refresh(buffered, before, after, folder, new=new, rounds=rounds, share=share, say=say)
    return Refreshed(out / ADAPTER, rounds_done, losses)


def _refresh(
    recipe: Recipe,
    before: Path,
    after: Path,
    folder: Path,
    *,
    new: Sequence[str],
    rounds: int,
    share: float,
    say: Callable[[str], None],
) -> tuple[list[Round], dict[str, dict[str, float]]]:
    old = [k for k, task in enumerate(recipe.task_names) if task not in new]
    inputs = read_training_inputs(recipe)
    model = load_adapter(load_base(recipe.model), before)
    layout = _layout(recipe, model, inputs, say)
    start, at_start = _adapter(model), _task_gradients(model, inputs, layout)
    losses = {"before": _held_out(model, inputs, layout)}
    model = load_adapter(load_base(recipe.model), after)
    losses["after"] = _held_out(model, inputs, layout)
    done: list[Round] = []
    for number in range(1, rounds + 1):
        here = _adapter(model)
        parts = forgetting(
            at_start, _task_gradients(model, inputs, layout), {name: here[name] - start[name] for name in here}
        )
        chosen = select_forgetful_modules(parts, old, share)
        lost = dict(zip(recipe.task_names, totals(parts).tolist(), strict=True))
        done.append(Round(chosen, len(parts), lost))
        told = ", ".join(f"{task} {value:+.3f}" for task, value in lost.items())
        say(f"round {number}: change of loss since before: {told}; tunes {len(chosen)} of {len(parts)} modules")
        if not chosen:
            break
        _tune(recipe, inputs, model, chosen, seed=recipe.seed + number)
    losses["refreshed"] = _held_out(model, inputs, layout)
    export_model(model, folder, tokenizer=inputs.tokenizer)
    content = {
        "before": str(before),
        "after": str(after),
        "new": list(new),
        "rounds": [vars(finished) for finished in done],
        "losses": losses,
    }
    write_own(folder / FILE, finite(content))
    return done, losses


def _buffered(recipe: Recipe, new: Sequence[str], out: Path, *, rows: int, steps: int) -> Recipe:
    """The recipe of the tuning: a few rows of each task, in equal shares, for a few steps, and plain losses."""
    unknown = [task for task in new if task not in recipe.task_names]
    if unknown or not new or len(set(new)) == len(recipe.tasks):
        raise UserError(
            f"no task of the recipe is called {unknown[0]!r}" if unknown else "there must be new tasks and old ones",
            where="--new",
            do=f"name the tasks that were added; the recipe has {', '.join(recipe.task_names)}",
        )
    if recipe.lora is None:
        raise UserError("refreshing works on LoRA adapters", where="lora", do="give the recipe a lora section")
    if world_size() > 1:
        raise UserError("refreshing runs in one process: it is short", do="start it without a launcher")
    tasks = tuple(
        task.model_copy(update={"limit": min(rows, task.limit or rows), "max_epochs": None}) for task in recipe.tasks
    )
    mixture = type(recipe.mixture)(shares="uniform")
    train = recipe.train.model_copy(update={"steps": steps, "epochs": None})
    loss = type(recipe.loss)(normalise=recipe.loss.normalise, path="gather")
    output = type(recipe.output)(dir=str(out))
    update = {"tasks": tasks, "mixture": mixture, "train": train, "loss": loss, "output": output}
    return recipe.model_copy(update=update)


def _layout(recipe: Recipe, model: Any, inputs: TrainingInputs, say: Callable[[str], None]) -> BatchLayout:
    section = recipe.train
    refusal = packing_refusal(model.config, model.config._attn_implementation)
    packing = section.packing and refusal is None
    if section.packing and refusal is not None:
        say(f"packing is off: {refusal}")
    return BatchLayout(section.rows_at_once, section.max_length, pad_id(inputs.tokenizer), packing=packing)


def _adapter(model: Any) -> dict[str, Tensor]:
    """A copy of the adapter's weights by name."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if ".lora_" in name}


def _check_adapters(before: Path, after: Path) -> None:
    """UserError if one of them is no whole LoRA adapter, or their weights can't be compared. Loads nothing."""
    configs = [read_peft_config(folder) for folder in (before, after)]
    where, do = f"{before}, {after}", "train the second one on from the first (lora.start)"
    if os.path.samefile(before, after):
        raise UserError("--before and --after are the same adapter", where=where, do=do)
    shapes = []
    for folder, config in zip((before, after), configs, strict=True):
        if config.peft_type != "LORA":
            kind = getattr(config.peft_type, "value", config.peft_type)
            raise UserError(f"a {kind} adapter, not a LoRA", where=str(folder), do=do)
        if (why := broken_weights(folder / WEIGHTS)) is not None:
            what = f"not a whole safetensors file ({why})"
            raise UserError(what, where=str(folder / WEIGHTS), do="copy or save the adapter again")
        shapes.append({name: entry.shape for name, entry in read_header(folder / WEIGHTS).items()})
    if shapes[0] != shapes[1]:
        raise UserError(
            "the two adapters have other modules or ranks, so their weights can't be compared", where=where, do=do
        )
    for key in SCALES:  # equal factors would be other deltas
        was, is_ = (getattr(config, key) for config in configs)
        if was != is_:
            raise UserError(f"the two adapters have other scales: {key} is {was!r} and {is_!r}", where=where, do=do)


def _only(model: Any, wanted: Callable[[str], bool]) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in name and wanted(name))


def _task_gradients(model: Any, inputs: TrainingInputs, layout: BatchLayout) -> dict[str, Tensor]:
    """{parameter: [K, *shape]}: gradient of each task's mean loss over its buffer, in evaluation mode."""
    K, device = len(inputs.stores), next(model.parameters()).device
    pieces = [
        piece.batch.to(device)
        for k, store in enumerate(inputs.stores)
        for piece in eval_batches(
            store, k, micro_batch_tokens=layout.micro_batch_tokens, max_length=layout.max_length,
            packing=layout.packing, pad_id=layout.pad_id,
        )
    ]  # fmt: skip
    counts, even_K = step_counts(pieces, K, device=device), torch.ones(K, dtype=torch.float64)
    _only(model, lambda name: True)
    with evaluation_mode(model), TaskGradients(model, K, isolated=True) as taps:  # a batch holds one task only
        for batch in pieces:
            taps.begin(batch.host.task_ids_BT, batch.host.labels_BT != IGNORE)
            c_BT = coefficients(batch, counts, even_K, "task_token")
            taps.watch((c_BT * token_nll(model, batch, path="gather")).sum()).backward()
    model.zero_grad(set_to_none=True)
    return taps.jacobian(task_coefficients(counts, even_K, "task_token"))


def _held_out(model: Any, inputs: TrainingInputs, layout: BatchLayout) -> dict[str, float]:
    return {
        task: task_scores.summary()["loss"]
        for task, task_scores in evaluate_model(model, inputs.held_out, layout).items()
    }


def _tune(recipe: Recipe, inputs: TrainingInputs, model: Any, modules: Sequence[str], *, seed: int) -> None:
    """One short run on the buffer in which only `modules` move."""
    chosen = set(modules)
    _only(model, lambda name: module_of(name) in chosen)
    recipe = recipe.model_copy(update={"seed": seed})
    plan = make_plan(recipe, inputs.stores)
    with tempfile.TemporaryDirectory(prefix="mtft-refresh-") as scratch:
        args = training_arguments(recipe, Path(scratch), steps=plan.steps, evaluates=False, saves=False)
        log = MetricsLog(None, steps=plan.steps, quiet=True)
        build_trainer(recipe, inputs, plan, model, args, log=log).train()
