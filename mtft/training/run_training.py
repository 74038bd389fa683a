"""One training run, top to bottom: tokenizer -> token stores -> plan -> model -> trainer -> adapter -> held-out scores.

    mtft train RECIPE        or        accelerate launch --config_file recipes/accelerate/ddp.yaml -m mtft train RECIPE

The run directory says how far a run has come: the same recipe goes on from the last good checkpoint, a finished run
returns at once, another recipe is refused.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path

from mtft.common.errors import UserError
from mtft.common.output_paths import check_output_name
from mtft.distributed.launch import is_main_process
from mtft.evaluation.task_scores import TaskScores
from mtft.recipe.schema.recipe import Recipe
from mtft.training.run_files.run_dir import (
    NOT_PROVED,
    RESULT,
    SCORES,
    check_recipe,
    chosen_size,
    read_result_file,
    sole_run,
)


@dataclass(frozen=True)
class TrainResult:
    """What a run left behind. `adapter_dir`: the PEFT adapter, or the whole model after full fine-tuning."""

    out_dir: Path
    adapter_dir: Path
    steps: int
    seconds: float
    scores: dict[str, TaskScores]
    not_proved: str | None = None
    """Why the export is not proved to be what was trained, where that was asked for."""


def train(recipe: Recipe, *, fresh: bool = False, quiet: bool = False, prove: bool = True) -> TrainResult:
    """Trains what the recipe describes in recipe.output.dir, or goes on where that run stopped.

    fresh   start over; what is in the folder moves aside to <dir>.old-N
    quiet   nothing on stderr
    prove   reload the export in a fresh process and compare its logits (a few seconds); if that fails the run is
            finished all the same, and TrainResult.not_proved says why (`mtft export RUN` tries again)

    SIGTERM, SIGHUP or SIGINT: the step is finished, a checkpoint saved, and SystemExit(0 or 130) raised.
    Raises UserError for another run at work in the folder, another recipe in it, unusable data or model, a diverged
    run, a full disk.
    """
    check_output_name(Path(recipe.output.dir), "output.dir")
    if not fresh and (result := _finished(recipe, quiet=quiet)) is not None:
        return result
    with sole_run(recipe, fresh=fresh) as refused:
        # again: another one may have ended the run, or begun one of another recipe, just before the lock was ours
        if not fresh and (result := _finished(recipe, quiet=quiet)) is not None:
            return result
        return _train(recipe, fresh=fresh, quiet=quiet, prove=prove, refused=refused)


def _train(recipe: Recipe, *, fresh: bool, quiet: bool, prove: bool, refused: UserError | None) -> TrainResult:
    """`train` in a folder that is ours. refused: it is not, which the other ranks have to be told."""
    run_dir = Path(recipe.output.dir)
    begin = time.perf_counter()
    # Heavy imports stand here: a finished run is recognised without them.
    from mtft.models.bitsandbytes_aside import import_peft

    if recipe.model.quantise == "none":
        import_peft()
    from mtft.data.planning import make_plan
    from mtft.distributed.extensions import extension_notes
    from mtft.distributed.stop_signal import EXIT_CODES, StopSignal
    from mtft.models.cpu_precision import precision_warnings
    from mtft.models.loading import read_config
    from mtft.models.lora_targets import describe_adapter
    from mtft.training.build_model import load_for_training
    from mtft.training.callbacks.best_weights import BestWeights
    from mtft.training.checkpoint.checkpoint_files import checkpoint_step, ended_at
    from mtft.training.checkpoint.run_basis import run_basis
    from mtft.training.export.export import CHANGE_THE_BASE, save_initial
    from mtft.training.export.rehearsal import rehearse_export
    from mtft.training.finalize import finalize_run
    from mtft.training.memory.auto_micro_batch import with_auto_micro_batch
    from mtft.training.preflight import refuse_rows, refuse_settings
    from mtft.training.run_files.metrics_log import MetricsLog
    from mtft.training.trainer import build_trainer
    from mtft.training.trainer_parts import print_summary, start_run_dir
    from mtft.training.training_arguments import training_arguments
    from mtft.training.training_inputs import held_out_identity, read_training_inputs

    refuse_settings(recipe)
    inputs = read_training_inputs(recipe)
    refuse_rows(read_config(recipe.model), [*inputs.stores, *inputs.held_out])
    plan = make_plan(recipe, inputs.stores)
    log = MetricsLog(run_dir if is_main_process() else None, steps=plan.steps, quiet=quiet or not is_main_process())
    for store in inputs.stores:
        for line in store.warnings():
            log.say(f"warning: {line}")
    for line in precision_warnings({"model": recipe.model}):
        log.say(f"warning: {line}")
    for line in extension_notes():
        log.say(f"note: {line}")
    # joins the ranks
    args = training_arguments(recipe, run_dir, steps=plan.steps, evaluates=inputs.evaluates, saves=True)
    size = None if fresh else chosen_size(run_dir)
    basis = run_basis(recipe, inputs.tokenizer, held_out_identity(inputs.held_out))
    checkpoint = start_run_dir(
        recipe, run_dir, plan, inputs.identity(plan), log, basis=basis, fresh=fresh, refused=refused
    )
    args.eval_on_start = inputs.evaluates and recipe.train.eval_on_start and checkpoint is None
    with StopSignal() as stop:
        log.say(f"loading {recipe.model.path}")
        model = load_for_training(recipe)
        for note in () if recipe.lora is None else describe_adapter(model):
            log.say(f"note: {note}")
        if recipe.lora is not None and recipe.lora.init in CHANGE_THE_BASE and is_main_process():
            save_initial(model, run_dir)
        rehearse_export(model, recipe, plan, tokenizer=inputs.tokenizer)
        sized = recipe
        if recipe.train.micro_batch_tokens == "auto":
            sized = with_auto_micro_batch(recipe, model, inputs, before=size, say=log.say)
        trainer = build_trainer(sized, inputs, plan, model, args, log=log, stop=stop)
        trainer.basis = basis
        trainer.add_callback(BestWeights(trainer, keep_best=recipe.output.export == "best"))
        decides = recipe.train.patience or recipe.train.task_patience
        # a run that its held-out losses had ended when the checkpoint was written: only the end is missing
        if checkpoint is not None and decides and ended_at(checkpoint):
            trainer.steps.until = args.max_steps = checkpoint_step(checkpoint)
        print_summary(recipe, plan, model, args, trainer.online, checkpoint, say=log.say)
        try:
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        finally:
            log.close()
    ended = trainer.stopping.ended is not None
    if stop.seen is not None and trainer.state.global_step < plan.steps and not ended:
        step = trainer.state.global_step
        log.say(f"stopped by {stop.seen.name} after step {step}, which is saved; the same command continues")
        raise SystemExit(EXIT_CODES[stop.seen])
    finalize_run(recipe, inputs, plan, trainer, begin=begin, prove=prove)
    result = read_result(run_dir)
    if result is None:
        raise RuntimeError(f"{run_dir / RESULT} can't be seen by this process: is it on a shared disk?")
    return result


def _finished(recipe: Recipe, *, quiet: bool) -> TrainResult | None:
    """The result, if this run has ended. UserError if the folder holds a run of another recipe, or on other rows."""
    run_dir = Path(recipe.output.dir)
    check_recipe(run_dir, recipe)
    result = read_result(run_dir)
    if result is not None:
        if not result.adapter_dir.is_dir():
            raise UserError(
                f"the run is finished, and {result.adapter_dir.name}/ is gone from its folder",
                where=str(run_dir),
                do=f"mtft export {run_dir} makes it again from the last checkpoint, or --fresh trains again",
            )
        from mtft.training.finished_run import check_finished

        check_finished(recipe)
        if is_main_process() and not quiet:
            print(f"finished already: {run_dir}", file=sys.stderr)
    return result


def read_result(run_dir: Path) -> TrainResult | None:
    """The result of a finished run, from its folder; None if it isn't finished."""
    content = read_result_file(run_dir)
    if content is None:
        return None
    scores = {task: TaskScores.load(run_dir / SCORES / f"{task}.jsonl") for task in content["tasks"]}
    for task, about in content["tasks"].items():
        if isinstance(about, dict) and about.get("examples", len(scores[task].ids)) != len(scores[task].ids):
            raise UserError(
                f"damaged scores: {len(scores[task].ids)} examples, and {about['examples']} by {RESULT}",
                where=str(run_dir / SCORES / f"{task}.jsonl"),
                do=f"mtft export {run_dir} scores again, or --fresh trains again",
            )
    export = run_dir / content["export"]
    not_proved = content.get("not_proved") if content.get("state") == NOT_PROVED else None  # else left out: a note
    return TrainResult(run_dir, export, content["steps"], content["seconds"], scores, not_proved)
