"""The end of a run: export, proof in a fresh process (while the scores are taken), held-out scores, card, result."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from data_mixers.plan.mixture_plan import MixturePlan
from data_mixers.plan.replanned import ReplannedPlan
from mtft.common.atomic_io import finite, write_json
from mtft.distributed.collectives import barrier
from mtft.distributed.launch import is_main_process
from mtft.distributed.sharding import whole_weights
from mtft.recipe.schema.recipe import Recipe
from mtft.training.callbacks.best_weights import load_best_weights
from mtft.training.export.export import ReloadResult, export_model, probe_logits, write_card
from mtft.training.run_files.run_dir import RESULT, SCORES, write_plan
from mtft.training.trainer import MultiTaskTrainer
from mtft.training.trainer_parts import TrainingInputs


def finalize_run(
    recipe: Recipe,
    inputs: TrainingInputs,
    plan: MixturePlan | ReplannedPlan,
    trainer: MultiTaskTrainer,
    *,
    begin: float,
    prove: bool,
) -> None:
    """Export, proof, final scores, card; result.json comes last. A collective call."""
    run_dir, steps = Path(recipe.output.dir), trainer.state.global_step
    chosen = load_best_weights(trainer, recipe.output.export)
    model: Any = trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=False)
    state = whole_weights(trainer.accelerator, model, fsdp=trainer.is_fsdp_enabled, keep=trainer.args.should_save)
    logits = probe_logits(model, trainer.args.device) if prove else None
    with ExitStack() as cleanup:
        proof = None
        if is_main_process():
            export_dir = export_model(model, run_dir, tokenizer=inputs.tokenizer, state=state)
            if logits is not None:
                proof = cleanup.enter_context(ReloadResult(model, logits, export_dir, recipe, trainer.args.device))
        if inputs.evaluates and steps not in trainer.evaluations:
            trainer.evaluate()
        scores = trainer.evaluations.get(steps, {})
        if is_main_process():
            for task, task_scores in scores.items():
                task_scores.save(run_dir / SCORES / f"{task}.jsonl")
            equal = None if proof is None else proof.result()
            unquantised = None if proof is None else proof.unquantised
            write_card(export_dir, recipe, plan, scores, proof=equal, unquantised=unquantised, step=chosen)
            seconds = time.perf_counter() - begin
            summaries = {task: task_scores.summary() for task, task_scores in scores.items()}
            content = {"steps": steps, "seconds": seconds, "export": export_dir.name, "proof": equal}
            content |= {"tasks": summaries, "skipped_steps": trainer.bad_steps, "exported_step": chosen}
            content |= {"ended": trainer.stopping.ended, "dropped_tasks": trainer.stopping.dropped}
            if recipe.model.quantise != "none":
                content["unquantised_base"] = unquantised
            write_plan(run_dir, recipe, plan)  # a mixture that changed online: what came of it
            write_json(run_dir / RESULT, finite(content))
    barrier()
