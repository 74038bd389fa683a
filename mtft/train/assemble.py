"""From a recipe to a trainer that is ready to go: inputs, run directory, batches, objective, balancer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from data_mixers.chain import PlanChain
from mtft.data.batches import BatchSource
from mtft.data.isolation import packing_refusal
from mtft.data.store import open_stores
from mtft.data.vocabulary import check_vocabulary
from mtft.errors import UserError
from mtft.evaluate.loss import Layout, evaluate_model
from mtft.evaluate.scores import TaskScores
from mtft.losses.balancers import make_balancer
from mtft.losses.nll import resolve_path
from mtft.losses.reweight import SampleWeights
from mtft.losses.router import check_router_loss, router_warning
from mtft.losses.valid import ValidStream
from mtft.recipe.schema import Recipe
from mtft.train import folder
from mtft.train.averaged import TrainingPoint
from mtft.train.checkpoint import check_identity
from mtft.train.engines import trainable
from mtft.train.log import RunLog
from mtft.train.model import compute_dtype, load_tokenizer, pad_id
from mtft.train.noise import EmbeddingNoise, NoiseStep
from mtft.train.objective import Objective
from mtft.train.online import Online, in_words, make_decider
from mtft.train.optimizers import own_optimizer
from mtft.train.ranks import is_writer
from mtft.train.signals import StopSignal
from mtft.train.state import newest_checkpoint
from mtft.train.steps import Steps
from mtft.train.stopping import Stopping
from mtft.train.surgery import make_surgery
from mtft.train.trainer import MultiTaskTrainer

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from data_mixers.plan import MixturePlan


VALID_TOKENS = 16_384  # at the most, of one measurement for what watches held-out losses


@dataclass(frozen=True)
class Inputs:
    """What a run reads: tokenizer and token stores, one a task (held-out: None for a task without eval_data)."""

    tokenizer: Any
    stores: Sequence[Any]
    held_out: Sequence[Any | None]

    def identity(self, plan: MixturePlan | PlanChain) -> dict[str, str]:
        """What must be the same for a run to go on."""
        return {"plan": plan.fingerprint, **{f"data of {store.task}": store.fingerprint for store in self.stores}}


def read_inputs(recipe: Recipe, *, eval_limit: int | None = None) -> Inputs:
    """Tokenizer and token stores of a recipe; the stores are built by one process where they don't stand yet.

    eval_limit: only the first held-out rows of each task.
    """
    tokenizer = load_tokenizer(recipe.model)
    held_out = open_stores(recipe, tokenizer, "eval", limit=eval_limit)
    return Inputs(tokenizer, open_stores(recipe, tokenizer, "train"), held_out)


def start_folder(
    recipe: Recipe, run_dir: Path, plan: MixturePlan | PlanChain, identity: dict[str, str], log: RunLog, *, fresh: bool
) -> Path | None:
    """Readies the run directory; returns the checkpoint to go on from, the same on every rank. A collective call."""
    found: list[Any] = [None]
    if is_writer():
        try:
            if fresh:
                folder.move_aside(run_dir)
            found[0] = newest_checkpoint(run_dir, say=log.say)
            if found[0] is not None:
                check_identity(found[0], identity)
            folder.write_start(run_dir, recipe, plan, identity)
        except UserError as error:  # the other ranks must learn of it: they would wait for ever
            found[0] = error
    if dist.is_initialized():
        dist.broadcast_object_list(found, src=0)
    if isinstance(found[0], UserError):
        raise found[0]
    return found[0]


def build_trainer(
    recipe: Recipe,
    inputs: Inputs,
    plan: MixturePlan | PlanChain,
    model: Any,
    args: TrainingArguments,
    *,
    log: RunLog,
    stop: StopSignal | None = None,
) -> MultiTaskTrainer:
    """The trainer of a recipe on `model`; this rank's part of every step is decided here."""
    asked, dtype = recipe.train, compute_dtype(recipe.model)
    check_vocabulary([*inputs.stores, *inputs.held_out], inputs.tokenizer, model.config)
    check_router_loss(model.config)
    if (warning := router_warning(model.config, trainable(model))) is not None:
        log.say(f"warning: {warning}")
    attention = model.config._attn_implementation
    isolated = packing_refusal(model.config, attention) is None
    layout = Layout(
        asked.rows_at_once,
        asked.max_length,
        pad_id(inputs.tokenizer),
        packing=asked.packing and may_pack(model.config, attention, say=log.say),
    )
    source = BatchSource(
        inputs.stores,
        plan,
        micro_batch_tokens=layout.micro_batch_tokens,
        max_length=layout.max_length,
        packing=layout.packing,
        pad_id=layout.pad_id,
        unmixed=asked.batch_style == "unmixed",
        rank=args.process_index,
        world=args.world_size,
    )
    balancer = make_balancer(
        recipe.loss.balancer,
        recipe.task_names,
        [task.weight for task in recipe.tasks],
        recipe.seed,
        normalise=recipe.loss.normalise,
        examples=[store.num_examples for store in inputs.stores],
        tokens=[int(store.supervised.sum()) for store in inputs.stores],
    )

    def held_out_stream(tokens: int | None = None) -> ValidStream:
        return ValidStream(
            inputs.held_out,
            tasks=recipe.task_names,
            # Not of the micro-batch: what is measured must not depend on how a step is split.
            tokens=max(tokens or min(asked.batch_tokens, VALID_TOKENS), layout.max_length),
            max_length=layout.max_length,
            packing=layout.packing,
            pad_id=layout.pad_id,
            seed=recipe.seed,
            rank=args.process_index,
            world=args.world_size,
        )

    valid = None if balancer.needs.valid_every is None else held_out_stream()
    online = None
    if recipe.mixture.online is not None and isinstance(plan, PlanChain):
        measures = recipe.mixture.online.name == "linear_law"
        stream = held_out_stream(recipe.mixture.online.tokens) if measures else None
        online = Online(make_decider(recipe, plan), stream)
    surgery = make_surgery(
        recipe, model, gram_every=balancer.needs.gram_every, isolated=isolated, run_dir=log.run_dir, say=log.say
    )
    loss = recipe.loss
    path = resolve_path(loss.path)

    def score(network: nn.Module) -> dict[str, TaskScores]:
        autocast = None if dtype == torch.float32 else dtype
        return evaluate_model(network, inputs.held_out, layout, attention=attention, autocast=autocast)

    trainer = MultiTaskTrainer(
        model,
        args,
        steps=Steps(source, plan),
        tasks=recipe.task_names,
        objective=Objective(
            loss.normalise,
            path,
            attention,
            valid,
            sample_weights=SampleWeights(**loss.sample_weights.model_dump()) if loss.sample_weights else None,
            label_smoothing=loss.label_smoothing,
            z_loss=loss.z_loss,
            orthogonal=loss.orthogonal,
            noise=EmbeddingNoise(model, asked.neftune, recipe.seed) if asked.neftune else None,
        ),
        balancer=balancer,
        log=log,
        surgery=surgery,
        stopping=Stopping(recipe.task_names, asked.watch, asked.patience, asked.task_patience, asked.min_delta),
        online=online,
        score=score,
        mezo=None if asked.mezo is None else {"epsilon": asked.mezo, "seed": recipe.seed},
        stop=stop,
        identity=inputs.identity(plan),
        max_bad_steps=asked.max_bad_steps,
        keep=recipe.output.keep,
    )
    trainer.optimizer_cls_and_kwargs = own_optimizer(recipe, args)
    if trainer.objective.noise is not None:
        trainer.add_callback(NoiseStep(trainer.objective.noise))
    if asked.optimizer.startswith("schedule_free"):
        trainer.add_callback(TrainingPoint())
    return trainer


def may_pack(config: Any, attention: str, *, say: Callable[[str], None]) -> bool:
    """Whether several examples may share a row of this model; says why not."""
    refusal = packing_refusal(config, attention)
    if refusal is not None:
        say(f"packing is off: {refusal}")
    return refusal is None


def introduce(
    recipe: Recipe, plan: MixturePlan | PlanChain, trainer: MultiTaskTrainer, checkpoint: Path | None
) -> None:
    """Says what is derived from the recipe before the first step."""
    say = trainer.run_log.say
    trained = sum(parameter.numel() for parameter in trainable(trainer.model).values())
    total = sum(parameter.numel() for parameter in trainer.model.parameters())
    processes = trainer.accelerator.num_processes
    say(
        f"{recipe.name}: {plan.steps} steps of {plan.batch} {plan.unit}, {trained:,} of {total:,} parameters trained, "
        f"{processes} process{'es' if processes > 1 else ''} on {trainer.args.device.type}"
    )
    for row in plan.table():
        say(
            f"  {row['task']}: share {row['asked']:.3f} asked, {row['realised']:.3f} realised, "
            f"{row['rows']} of {row['size']} rows ({row['epochs']:.2f} epochs)"
        )
    if trainer.online is not None:
        say(in_words(recipe, trainer.online.decider))
    if checkpoint is not None:
        say(f"goes on from {checkpoint.name}")
