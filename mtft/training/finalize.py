"""The end of a run: export, proof in a fresh process (while the scores are taken), held-out scores, card, result.

Training is never lost to what fails here. The last checkpoint stands before it begins. A proof that fails leaves a run
that is finished and marked: result.json says "trained, not proved", and `mtft export RUN` tries again. Anything else
that fails leaves what was written so far, and no result.json: the same command or `mtft export RUN` ends the run then.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from data_mixers.plan.mixture_plan import MixturePlan
from data_mixers.plan.replanned import ReplannedPlan
from mtft.common.atomic_io import finite
from mtft.common.errors import UserError
from mtft.common.own_files import write_own
from mtft.distributed.collectives import barrier, from_first_rank
from mtft.distributed.launch import LaunchConfig, is_main_process
from mtft.distributed.sharding import whole_weights
from mtft.evaluation.answers_file import save_answers
from mtft.recipe.schema.recipe import Recipe
from mtft.training.callbacks.best_weights import load_best_weights
from mtft.training.export.export import export_model, write_card
from mtft.training.export.proof import PROOF, NoRoom, ReloadResult, probe_logits, write_probe
from mtft.training.run_files.run_dir import ANSWERS, NOT_PROVED, PROVED, RESULT, SCORES, TRAINED, write_plan
from mtft.training.trainer import MultiTaskTrainer
from mtft.training.training_inputs import TrainingInputs, held_out_identity

PATIENCE = 60.0  # seconds after which the other ranks are told that the proof goes on; NCCL gives up after 600


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
    with part_of_the_end("choice of weights", run_dir, steps):
        chosen = load_best_weights(trainer, recipe.output.export)
    model: Any = trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=False)
    with ExitStack() as cleanup:
        proof = Proof(run_dir, trainer.args.device)
        with part_of_the_end("export", run_dir, steps):
            state = whole_weights(
                trainer.accelerator, model, fsdp=trainer.is_fsdp_enabled, keep=trainer.args.should_save
            )
            if prove:
                proof.ask(model)
            if is_main_process():
                export_dir = export_model(model, run_dir, tokenizer=inputs.tokenizer, state=state)
                proof.start(model, export_dir, recipe, cleanup)
        with part_of_the_end("held-out scores", run_dir, steps):
            if prove:
                trainer.run_log.say("the export is being proved in a fresh process, which loads the base once more")
            scores = trainer.final_scores() if inputs.evaluates else {}
            harness = trainer.lm_eval_scores()
            if is_main_process():
                for task, task_scores in scores.items():
                    task_scores.save(run_dir / SCORES / f"{task}.jsonl")
                    if task_scores.answers:
                        save_answers(task_scores, run_dir / ANSWERS / f"{task}.jsonl")
        while from_first_rank(proof.runs()):
            pass  # a large base on the CPU takes longer than ranks wait at a barrier
        if is_main_process():
            equal = proof.result()
            with part_of_the_end("report", run_dir, steps):
                told: dict[str, Any] = {"proof": equal, "unquantised": proof.unquantised, "not_proved": proof.trouble}
                told |= {"step": chosen, "harness": harness}
                write_card(export_dir, recipe, plan, scores, tokenizer=inputs.tokenizer, **told)
                seconds = time.perf_counter() - begin
                summaries = {task: task_scores.summary() for task, task_scores in scores.items()}
                content = {"steps": steps, "seconds": seconds, "export": export_dir.name, "state": proof.state}
                content |= {"proof": equal, "not_proved": proof.trouble}
                content |= {"tasks": summaries, "skipped_steps": trainer.bad_steps, "exported_step": chosen}
                content |= {"ended": trainer.stopping.ended, "dropped_tasks": trainer.stopping.dropped}
                if history := trainer.run_log.history(steps):
                    content["history"] = history
                    for line in history:
                        trainer.run_log.say(f"warning: {line}")
                scored = held_out_identity(inputs.held_out)
                content |= {"basis": trainer.basis, "fingerprints": {**(trainer.identity or {}), **scored}}
                if harness:
                    content["lm_eval"] = harness
                if code := trainer.scoring_code():
                    content["scoring_code"] = code
                if recipe.model.quantise != "none":
                    content["unquantised_base"] = proof.unquantised
                write_plan(run_dir, recipe, plan)  # a mixture that changed online: what came of it
                write_own(run_dir / RESULT, finite(content))
                if proof.skipped is not None:
                    trainer.run_log.say(
                        f"note: {proof.skipped}; where there is, `mtft export {run_dir}` makes the proof"
                    )
    barrier()


class Proof:
    """The proof of a run's export, which may fail in any part without harm: `trouble` says why there is none."""

    def __init__(self, run_dir: Path, device: torch.device | str) -> None:
        self.trouble: str | None = None
        self.unquantised: dict[str, float] | None = None
        self._probe, self._device = run_dir / PROOF, device
        self._logits: torch.Tensor | None = None
        self._running: ReloadResult | None = None
        self._equal: float | None = None
        self._no_room = False

    def ask(self, model: Any) -> None:
        """What the trained model says. A collective call where weights are sharded."""
        launch = LaunchConfig.from_environment()
        with self._harmless(together=launch.shards_weights and launch.ranks > 1):
            self._logits = probe_logits(model, torch.device(self._device))

    def start(self, model: Any, export_dir: Path, recipe: Recipe, cleanup: ExitStack) -> None:
        """Starts the fresh process, if the model was asked."""
        if self._logits is not None:
            with self._harmless():
                write_probe(model, self._logits, recipe, self._probe)
                self.go_on(export_dir, cleanup)

    def go_on(self, export_dir: Path, cleanup: ExitStack) -> None:
        self._running = cleanup.enter_context(ReloadResult(export_dir, self._probe, self._device))

    def runs(self) -> bool:
        """Whether the fresh process still runs after a while."""
        with self._harmless():
            return self._running is not None and self._running.runs(PATIENCE)
        return False

    def result(self) -> float | None:
        """Waits; None if there is no proof. What it compares with is kept if it failed."""
        if self._running is not None:
            with self._harmless():
                self._equal = self._running.result()
                self.unquantised = self._running.unquantised
                shutil.rmtree(self._probe, ignore_errors=True)
        return self._equal

    @property
    def state(self) -> str:
        """For result.json."""
        if self.trouble is not None:
            return TRAINED if self._no_room else NOT_PROVED
        return PROVED if self._equal is not None else TRAINED

    @property
    def skipped(self) -> str | None:
        """Why it was left out, where that is no error."""
        return f"not proved: {self.trouble}" if self._no_room else None

    @contextmanager
    def _harmless(self, *, together: bool = False) -> Iterator[None]:
        """Keeps an error as `trouble`; not where the other ranks would wait for this one (`together`)."""
        try:
            yield
        except Exception as error:
            if together:
                raise
            self.trouble, self._no_room = str(error).strip() or type(error).__name__, isinstance(error, NoRoom)


@contextmanager
def part_of_the_end(name: str, run_dir: Path, step: int) -> Iterator[None]:
    """An error that nobody foresaw says what stands, and how to go on. The others say it themselves."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        lines = str(error).strip().splitlines()
        raise UserError(
            f"the run is trained, and its {name} failed: {type(error).__name__}{': ' + lines[0] if lines else ''}",
            where=str(run_dir),
            do=f"the weights stand in checkpoint-{step}, with the metrics; when it is mended, `mtft export {run_dir}` "
            "(or the same command) does the end again and nothing is trained twice",
        ) from error
