"""What a run asks of transformers' Trainer besides its steps: how it is made, evaluation by task, our own checkpoints.

Checkpoints are those of mtft.training.checkpoint.checkpoint, which resume bit for bit.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import TrainOutput

from mtft.common.errors import UserError
from mtft.data.planning import batch_tokens_of, make_plan
from mtft.distributed.collectives import from_first_rank
from mtft.distributed.extensions import extension_notes
from mtft.distributed.launch import is_main_process
from mtft.evaluation.heldout_loss import Told
from mtft.evaluation.heldout_scorer import HeldOutScorer
from mtft.evaluation.task_scores import TaskScores
from mtft.models.loading import read_config
from mtft.models.segment_attention import use_segments
from mtft.recipe.schema.recipe import Recipe
from mtft.training.build_model import load_for_training
from mtft.training.callbacks.best_weights import BestWeights, load_best_weights
from mtft.training.callbacks.early_stopping import EarlyStopping
from mtft.training.checkpoint.checkpoint import (
    RunState,
    check_identity,
    load_random_state,
    load_state,
    load_weights,
    save,
)
from mtft.training.checkpoint.checkpoint_files import latest_checkpoint
from mtft.training.checkpoint.run_basis import run_basis
from mtft.training.determinism import deterministic_kernels
from mtft.training.from_datasets import Rows, recipe_of_datasets
from mtft.training.memory.auto_micro_batch import with_auto_micro_batch
from mtft.training.optim.schedule_free import evaluation_weights
from mtft.training.preflight import refuse_rows, refuse_settings
from mtft.training.run_files.metrics_log import MetricsLog, flat
from mtft.training.run_files.run_dir import check_recipe, read_result_file
from mtft.training.trainer_parts import TrainerParts, start_run_dir, trainer_parts
from mtft.training.training_arguments import training_arguments
from mtft.training.training_inputs import held_out_identity, read_training_inputs


class RunTrainer(Trainer):
    """Trainer calls these where it evaluates, writes a checkpoint or continues from one.

    evaluations  {step: {task: scores}}: the last one
    identity  what a checkpoint must agree on to be continued (fingerprints), kept with it
    basis     what the run is trained with (run_basis), kept and compared in the same way; None: not known
    keep      checkpoints that stay on disk
    deterministic  trains with deterministic kernels alone (mtft.training.determinism)
    """

    model: nn.Module
    identity: dict[str, Any]
    basis: dict[str, Any] | None = None
    keep: int
    keep_best: bool = False
    deterministic: bool = False
    optimizer: Any
    stopping: EarlyStopping
    run_log: MetricsLog
    evaluations: dict[int, dict[str, TaskScores]]
    _score: Callable[[nn.Module, Told | None], dict[str, TaskScores]] | None

    @classmethod
    def from_parts(cls, model: Any, args: TrainingArguments, parts: TrainerParts) -> Self:
        """A trainer of ready-made parts."""
        trainer = cls(model, args, **parts.options)
        trainer.optimizer_cls_and_kwargs = parts.optimizer  # pyright: ignore[reportAttributeAccessIssue]
        trainer.deterministic = parts.deterministic
        return trainer

    @classmethod
    def from_recipe(cls, recipe: Recipe, *, model: Any = None, tokenizer: Any = None) -> Self:
        """The trainer of a recipe, ready for `train()`; `train` also resumes, exports and scores.

        Args:
            recipe: as `load_recipe` gives it.
            model: a loaded model, with its adapter, in place of the one that the recipe names.
            tokenizer: in place of the model's own.

        Raises:
            UserError: for data or a model that can't be used.
        """
        return cls._from_recipe(recipe, model, tokenizer)

    @classmethod
    def from_datasets(
        cls,
        model: Any,
        datasets: Mapping[str, Rows],
        *,
        shares: str | Mapping[str, float] = "natural",
        tokenizer: Any = None,
        args: Any = None,
        eval_datasets: Mapping[str, Rows] | None = None,
        task_options: Mapping[str, Mapping[str, Any]] | None = None,
        **sections: Mapping[str, Any],
    ) -> Self:
        """A trainer of several data sets at once, from Python objects.

        Args:
            model: a path or hub name, or {"path": ..., "dtype": ..., "quantise": ...}, which gets a LoRA adapter; or a
                loaded model, of which what requires gradients is trained: an adapter (PeftModel), or the whole.
            datasets: {task: rows}; rows are a `datasets.Dataset` or dicts, in any format that a recipe's data may have.
            shares: part of each task in every step: {task: share} adding up to 1, "natural" or "uniform".
            tokenizer: in place of the model's own.
            args: a dict (output_dir, seed, max_steps, learning_rate, batch_tokens, max_length, ...: the keys of the
                recipe's `train`), or a TrainingArguments or SFTConfig: its settings are taken, or refused by name.
            eval_datasets: held-out rows of the tasks.
            task_options: further keys of tasks: {"sql": {"loss_on": "last", "row_weight": "score"}}.
            sections: further sections of the recipe: lora={"r": 8}, loss={"balancer": {"name": "famo"}}.

        Raises:
            UserError: for rows or settings that can't be used; it says which.
        """
        recipe, examples = recipe_of_datasets(
            model,
            datasets,
            shares=shares,
            tokenizer=tokenizer,
            args=args,
            eval_datasets=eval_datasets,
            task_options=task_options,
            sections=sections,
        )
        loaded = None if isinstance(model, str | Path | Mapping) else model
        return cls._from_recipe(recipe, loaded, tokenizer, examples)

    @classmethod
    def _from_recipe(cls, recipe: Recipe, model: Any, tokenizer: Any, examples: int | None = None) -> Self:
        """examples: of one step, in place of the recipe's train.batch_tokens."""
        inputs = read_training_inputs(recipe, tokenizer=tokenizer)
        if examples is not None:
            tokens = batch_tokens_of(recipe, inputs.stores, examples)
            recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"batch_tokens": tokens})})
        run_dir = Path(recipe.output.dir)
        check_recipe(run_dir, recipe)
        if read_result_file(run_dir) is not None:
            do = "give another output directory, or move the folder away"
            raise UserError("the folder holds a finished run", where=str(run_dir), do=do)
        refuse_settings(recipe, loaded=model is not None)
        config = read_config(recipe.model) if model is None else model.config
        refuse_rows(config, [*inputs.stores, *inputs.held_out])
        plan = make_plan(recipe, inputs.stores)
        log = MetricsLog(run_dir if is_main_process() else None, steps=plan.steps, quiet=not is_main_process())
        for store in inputs.stores:
            for line in store.warnings():
                log.say(f"warning: {line}")
        for line in extension_notes():
            log.say(f"note: {line}")
        saves = recipe.output.save_every is not None
        args = training_arguments(recipe, run_dir, steps=plan.steps, evaluates=inputs.evaluates, saves=saves)
        args.eval_on_start = inputs.evaluates and recipe.train.eval_on_start
        basis = run_basis(recipe, inputs.tokenizer, held_out_identity(inputs.held_out))
        start_run_dir(recipe, run_dir, plan, inputs.identity(plan), log, basis=basis, fresh=False)
        if model is None:
            model = load_for_training(recipe)
        elif recipe.model.attention == "auto":
            use_segments(model)
        sized = recipe
        if recipe.train.micro_batch_tokens == "auto":
            sized = with_auto_micro_batch(recipe, model, inputs, before=None, say=log.say)
        trainer = cls.from_parts(model, args, trainer_parts(sized, inputs, plan, model, args, log=log))
        trainer.processing_class = inputs.tokenizer  # saved with the model
        trainer.basis = basis
        trainer.keep_best = recipe.output.export == "best"
        trainer.add_callback(BestWeights(trainer, keep_best=trainer.keep_best))
        return trainer

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Trains to the end, from the start or from a checkpoint (True: the last whole one of the run's folder).

        With output.export: best the model has the weights of the best evaluation then.
        Raises UserError for a checkpoint of another run.
        """
        if resume_from_checkpoint is True:
            last = from_first_rank(latest_checkpoint(self.run_dir, tidy=False) if is_main_process() else None)
            if last is None:
                do = "train() starts from the beginning"
                raise UserError("there is no whole checkpoint to go on from", where=str(self.run_dir), do=do)
            resume_from_checkpoint = str(last)
        if resume_from_checkpoint:
            self.args.eval_on_start = False
            check_identity(Path(resume_from_checkpoint), self.identity, self.basis)
        with deterministic_kernels(self.deterministic):
            output = super().train(resume_from_checkpoint, *args, **kwargs)
        if self.keep_best:
            load_best_weights(self, "best")
        return output

    @property
    def run_dir(self) -> Path:
        return Path(str(self.args.output_dir))

    @abstractmethod
    def run_state(self) -> RunState:
        """What a checkpoint holds, as it is now."""

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Scores every task on its held-out examples; once a step. Returns flat metrics for callbacks and trackers."""
        step = self.state.global_step
        if self._score is None:
            raise ValueError("no held-out examples to evaluate on")
        if step not in self.evaluations:
            with evaluation_weights(self.optimizer):
                told = self.run_log.evaluating(step, len(self.stopping.tasks), first=not self.evaluations)
                self.evaluations = {step: self._score(self.model, told)}
            self.run_log.evaluation(step, _summaries(self.evaluations[step]))
        metrics = flat({"tasks": _summaries(self.evaluations[step])}, "eval_")
        if self.args.report_to:
            self.callback_handler.on_log(self.args, self.state, self.control, metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def try_metrics(self) -> None:
        """Before the first step: whatever the end measures, on one row of each task. Raises UserError."""
        if isinstance(self._score, HeldOutScorer):
            self._score.try_out(self.model)

    def lm_eval_scores(self) -> dict[str, dict[str, float]]:
        """The weights as they are by lm-eval's tasks; empty without any. A collective call."""
        if not isinstance(self._score, HeldOutScorer):
            return {}
        with evaluation_weights(self.optimizer):
            return self._score.lm_eval_scores(self.model)

    def scoring_code(self) -> dict[str, str]:
        """{"task/metric": SHA-256} of the user's own code among the metrics."""
        return self._score.asked.user_code() if isinstance(self._score, HeldOutScorer) else {}

    def final_scores(self) -> dict[str, TaskScores]:
        """The scores of the weights as they are, with what is measured at the end only."""
        step = self.state.global_step
        if self._score is not None and step not in self.evaluations:
            self.evaluate()
        scores = self.evaluations.get(step, {})
        if isinstance(self._score, HeldOutScorer):
            with evaluation_weights(self.optimizer):
                scores = self._score.completed(self.model, scores, self.run_log.answering(step))
        return scores

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's own summary goes to the trackers; it keeps no history in memory."""
        if self.args.report_to:
            self.callback_handler.on_log(self.args, self.state, self.control, logs)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        (Path(output_dir or self.run_dir) / TRAINING_ARGS_NAME).unlink(missing_ok=True)  # a pickle

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        writer = bool(self.args.should_save)
        state, basis = self.run_state(), self.basis
        save(state, self.run_dir, self.state, self.identity, basis, writer=writer, keep=self.keep)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_weights(self.model, Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            load_state(self.run_state(), Path(checkpoint))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            load_random_state(self.accelerator, Path(checkpoint), say=self.run_log.say)

    def _load_scaler(self, checkpoint: str | None) -> None:
        """With the optimizer's state."""


def _summaries(scores: dict[str, TaskScores]) -> dict[str, Any]:
    return {task: of_task.summary() for task, of_task in scores.items()}
