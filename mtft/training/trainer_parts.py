"""From a recipe to a trainer that is ready to go: run directory, batches, objective, balancer."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import TrainingArguments

from data_mixers.plan.mixture_plan import MixturePlan
from data_mixers.plan.replanned import ReplannedPlan
from mtft.common.errors import UserError
from mtft.data.batching.batches import BatchSource
from mtft.data.batching.packed_attention import packing_refusal
from mtft.data.tokenize.vocabulary_check import check_vocabulary
from mtft.distributed.collectives import from_first_rank
from mtft.distributed.launch import is_main_process
from mtft.distributed.sharding import elements, trainable
from mtft.distributed.stop_signal import StopSignal
from mtft.evaluation.heldout_loss import BatchLayout
from mtft.evaluation.heldout_scorer import HeldOutScorer
from mtft.evaluation.lm_eval_tasks import LmEvalTasks
from mtft.evaluation.questions import AskedMetrics, cut_questions
from mtft.losses.balancers import make_balancer
from mtft.losses.moe_router_loss import check_router_loss, router_warning
from mtft.losses.sample_weights import SampleWeights
from mtft.losses.token_nll import resolve_path
from mtft.losses.validation_stream import ValidationStream
from mtft.models.loading import compute_dtype, pad_id
from mtft.recipe.schema.recipe import Recipe
from mtft.recipe.targets import LM_EVAL
from mtft.training.callbacks.early_stopping import EarlyStopping
from mtft.training.callbacks.watched_score import watched_metrics
from mtft.training.checkpoint.checkpoint import check_identity
from mtft.training.checkpoint.checkpoint_files import latest_checkpoint
from mtft.training.export.rehearsal import clear_rehearsals
from mtft.training.online_mixture import OnlineMixture, describe_online_mixture, make_controller
from mtft.training.optim.optimizers import own_optimizer
from mtft.training.run_files.metrics_log import MetricsLog
from mtft.training.run_files.run_dir import eval_schedule, move_aside, write_start
from mtft.training.step.neftune import Neftune
from mtft.training.step.objective import Objective
from mtft.training.step.task_gradients import make_task_gradient_step
from mtft.training.training_inputs import TrainingInputs

VALID_TOKENS = 16_384  # at the most, of one measurement for what watches held-out losses


def start_run_dir(
    recipe: Recipe,
    run_dir: Path,
    plan: MixturePlan | ReplannedPlan,
    identity: dict[str, str],
    log: MetricsLog,
    *,
    basis: dict[str, Any],
    fresh: bool,
    refused: UserError | None = None,
) -> Path | None:
    """Readies the run directory; returns the checkpoint to go on from, the same on every rank. A collective call.

    identity, basis: what the checkpoint must agree with. refused: why the main process may not write there; raised on
    every rank.
    """
    schedule = eval_schedule(recipe)
    log.eval_every, log.eval_on_start = schedule["eval_every"], schedule["eval_on_start"]
    outcome: Path | UserError | None = refused  # the checkpoint, or the error, of the main process
    if is_main_process() and refused is None:
        try:
            if fresh:
                move_aside(run_dir)
            clear_rehearsals(run_dir)
            outcome = latest_checkpoint(run_dir, say=log.say)
            log.history(0)  # raises for files that can't be read
            if outcome is not None:
                check_identity(outcome, identity, basis, say=log.say)
            write_start(run_dir, recipe, plan, identity)
        except UserError as error:  # the other ranks must learn of it: they would wait for ever
            outcome = error
    outcome = from_first_rank(outcome)
    if isinstance(outcome, UserError):
        raise outcome
    return outcome


class TrainerParts(NamedTuple):
    """Keyword arguments of MultiTaskTrainer, and what its `optimizer_cls_and_kwargs` and `deterministic` become."""

    options: dict[str, Any]
    optimizer: tuple[Any, dict[str, Any]] | None
    deterministic: bool = False


def trainer_parts(
    recipe: Recipe,
    inputs: TrainingInputs,
    plan: MixturePlan | ReplannedPlan,
    model: Any,
    args: TrainingArguments,
    *,
    log: MetricsLog,
    stop: StopSignal | None = None,
    targets: Collection[str] | None = None,
) -> TrainerParts:
    """The parts of a recipe's trainer on `model`; this rank's part of every step is decided here.

    targets: "task/metric" of what each evaluation measures, and nothing is measured besides (None: as the recipe says).
    """
    section, dtype = recipe.train, compute_dtype(recipe.model)
    check_vocabulary([*inputs.stores, *inputs.held_out], inputs.tokenizer, model.config)
    check_router_loss(model.config)
    if (warning := router_warning(model.config, trainable(model))) is not None:
        log.say(f"warning: {warning}")
    attention = model.config._attn_implementation
    refusal = packing_refusal(model.config, attention)
    isolated = refusal is None
    if section.packing and refusal is not None:
        log.say(f"packing is off: {refusal}")
    packing = section.packing and isolated
    layout = BatchLayout(section.rows_at_once, section.max_length, pad_id(inputs.tokenizer), packing=packing)
    source = BatchSource(
        inputs.stores,
        plan,
        micro_batch_tokens=layout.micro_batch_tokens,
        max_length=layout.max_length,
        packing=layout.packing,
        pad_id=layout.pad_id,
        unmixed=section.batch_style == "unmixed",
        rank=args.process_index,
        world=args.world_size,
    )
    balancer = make_balancer(
        recipe.loss.balancer,
        recipe.task_names,
        [task.weight for task in recipe.tasks],
        recipe.seed,
        normalise=recipe.loss.normalise,
        examples=[store.stats["weights"][1] for store in inputs.stores],
        tokens=[store.stats["weights"][0] for store in inputs.stores],
    )

    def held_out_stream(tokens: int | None = None) -> ValidationStream:
        return ValidationStream(
            inputs.held_out,
            tasks=recipe.task_names,
            # Not of the micro-batch: what is measured must not depend on how a step is split.
            tokens=max(tokens or min(section.batch_tokens, VALID_TOKENS), layout.max_length),
            max_length=layout.max_length,
            packing=layout.packing,
            pad_id=layout.pad_id,
            seed=recipe.seed,
            rank=args.process_index,
            world=args.world_size,
        )

    valid = None if balancer.needs.valid_every is None else held_out_stream()
    online = None
    if recipe.mixture.online is not None and isinstance(plan, ReplannedPlan):
        measures = recipe.mixture.online.name == "linear_law"
        stream = held_out_stream(recipe.mixture.online.tokens) if measures else None
        online = OnlineMixture(make_controller(recipe, plan), stream)
    gradient_step = make_task_gradient_step(
        recipe, model, gram_every=balancer.needs.gram_every, isolated=isolated, run_dir=log.run_dir, say=log.say
    )
    loss = recipe.loss

    asked = AskedMetrics.of(recipe, inputs.tokenizer)
    asked = asked if targets is None else asked.only(targets)
    for line in cut_questions(inputs.held_out, asked):
        log.say(f"warning: {line}")
    score = HeldOutScorer(
        inputs.held_out,
        layout,
        asked,
        asked if targets is not None else asked.only(watched_metrics(recipe)),
        attention,
        None if dtype == torch.float32 else dtype,
        _lm_eval(recipe, targets),
    )
    objective = Objective(
        loss.normalise,
        resolve_path(loss.path),
        attention,
        isolated,
        valid,
        sample_weights=SampleWeights(**loss.sample_weights.model_dump()) if loss.sample_weights else None,
        label_smoothing=loss.label_smoothing,
        z_loss=loss.z_loss,
        orthogonal=loss.orthogonal,
        noise=Neftune(model, section.neftune, recipe.seed) if section.neftune else None,
    )
    options = {
        "steps": source,
        "tasks": recipe.task_names,
        "objective": objective,
        "balancer": balancer,
        "log": log,
        "gradient_step": gradient_step,
        "stopping": EarlyStopping(
            recipe.task_names,
            section.watch,
            section.patience,
            section.task_patience,
            section.min_delta,
            recipe.auxiliary_tasks,
        ),
        "online": online,
        "score": score,
        "mezo": None if section.mezo is None else {"epsilon": section.mezo, "seed": recipe.seed},
        "stop": stop,
        "identity": inputs.identity(plan),
        "max_bad_steps": section.max_bad_steps,
        "keep": recipe.output.keep,
    }
    return TrainerParts(options, own_optimizer(recipe, args), section.deterministic)


def _lm_eval(recipe: Recipe, targets: Collection[str] | None) -> LmEvalTasks | None:
    """lm-eval's tasks at the end of a run; in trials (targets not None) only where the objective names one."""
    section = recipe.eval.lm_eval
    wanted = targets is None or any(target.startswith(f"{LM_EVAL}/") for target in targets)
    return LmEvalTasks.load(section) if section is not None and wanted else None


SHOWN_TASKS = 20  # whose shares are said before the first step


def print_summary(
    recipe: Recipe,
    plan: MixturePlan | ReplannedPlan,
    model: nn.Module,
    args: TrainingArguments,
    online: OnlineMixture | None,
    checkpoint: Path | None,
    *,
    say: Callable[[str], None],
) -> None:
    """Says what is derived from the recipe before the first step."""
    trained = sum(map(elements, trainable(model).values()))
    total = sum(map(elements, model.parameters()))
    processes = args.world_size
    say(
        f"{recipe.name}: {plan.steps} steps of {plan.batch} {plan.unit}, {trained:,} of {total:,} parameters trained, "
        f"{processes} process{'es' if processes > 1 else ''} on {args.device.type}"
    )
    table = plan.table()
    for row in table[:SHOWN_TASKS]:
        say(
            f"  {row['task']}: share {row['asked']:.3f} asked, {row['realised']:.3f} realised, "
            f"{row['rows']} of {row['size']} rows ({row['epochs']:.2f} epochs)"
        )
    if (more := len(table) - SHOWN_TASKS) > 0:
        say(f"  and {more:,} more tasks (plan.json)")
    if online is not None:
        say(describe_online_mixture(recipe, online.controller))
    if checkpoint is not None:
        say(f"goes on from {checkpoint.name}")
