"""MultiTaskTrainer: transformers' Trainer with the exact multi-task objective. One item of its loader = one step.

    item      list[Batch]: this rank's micro-batches of an optimizer step (as many on every rank, empty where short)
    counts    supervised tokens and samples of each task over all micro-batches and ranks, before the first backward
    loss      sum_bt c_bt nll_bt, with c from the labels and the balancer's weights (mtft.losses.task_reduction)
    backward  per micro-batch; gradients are averaged over the R ranks once, after the last one, so c is multiplied by R

Trainer keeps what it is good at: device placement, DDP/FSDP/DeepSpeed through accelerate, optimizer and schedule by
name, clipping, callbacks and trackers. Ours are the step, per-task evaluation, and the checkpoint
(mtft.training.checkpoint.checkpoint_files),
which resumes bit for bit. Nothing here branches on what a single rank holds around a collective.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import TrainingArguments
from transformers.trainer_callback import PrinterCallback, TrainerCallback, TrainerControl
from transformers.trainer_utils import TrainOutput

from data_mixers.plan.mixture_plan import MixturePlan
from data_mixers.plan.replanned import ReplannedPlan
from mtft.common.device_copy import to_device
from mtft.common.state_tree import random_state
from mtft.data.batching.batch import Batch
from mtft.data.batching.batches import BatchSource
from mtft.data.batching.prefetch import AHEAD, PrefetchedSteps
from mtft.distributed.launch import check_ranks
from mtft.distributed.sharding import check_sharded
from mtft.distributed.stop_signal import StopSignal
from mtft.evaluation.heldout_loss import Told
from mtft.evaluation.task_scores import TaskScores
from mtft.experimental.mezo import mezo_step
from mtft.experimental.sharpness_aware import SharpnessAwareStep
from mtft.losses.balancers import Balancer, Observation
from mtft.losses.task_reduction import (
    TaskCounts,
    TaskSums,
    reduce_sums,
    step_counts,
    task_coefficients,
    task_losses,
    task_probs,
)
from mtft.recipe.schema.recipe import Recipe
from mtft.training.callbacks.early_stopping import EarlyStopping
from mtft.training.callbacks.non_finite_steps import NonFiniteSteps
from mtft.training.checkpoint.checkpoint import RunState
from mtft.training.online_mixture import OnlineMixture
from mtft.training.optim.schedule_free import begin_training
from mtft.training.run_files.metrics_log import MetricsLog, flat, step_line
from mtft.training.run_trainer import RunTrainer
from mtft.training.step.extra_losses import global_losses, heldout_losses, valid_losses
from mtft.training.step.objective import Objective, StepContext, forward_backward
from mtft.training.step.task_gradients import TaskGradientStep
from mtft.training.trainer_parts import trainer_parts
from mtft.training.training_arguments import use_one_gpu
from mtft.training.training_inputs import TrainingInputs


class MultiTaskTrainer(RunTrainer):
    """Trains `model` on `steps`, once through.

    tasks       names, in the order of the batches' task ids
    gradient_step  measures the gradients of single tasks, and steps along a mix of them; None: never
    score       (model, told) -> scores of each task on its held-out examples, over all ranks; None: no evaluation
    log         where metrics go (silent on all ranks but one)
    stopping    what held-out losses decide: tasks that are dropped (weight 0), the end of the run
    online      changes the mixture of the steps to come; None: never
    mezo        {epsilon, seed}: two forward passes in place of the backward pass (mtft.experimental.mezo)
    stop        SIGTERM/SIGINT seen by any rank ends the run after the step, with a checkpoint
    identity    what a checkpoint must agree on to be continued (fingerprints), kept with it
    """

    model: nn.Module
    model_wrapped: nn.Module  # what the engine made of it
    optimizer: Any
    lr_scheduler: Any

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        steps: BatchSource,
        tasks: Sequence[str],
        objective: Objective,
        balancer: Balancer,
        log: MetricsLog,
        gradient_step: TaskGradientStep | None = None,
        stopping: EarlyStopping | None = None,
        online: OnlineMixture | None = None,
        score: Callable[[nn.Module, Told | None], dict[str, TaskScores]] | None = None,
        stop: StopSignal | None = None,
        identity: dict[str, Any] | None = None,
        mezo: dict[str, Any] | None = None,
        max_bad_steps: int = 10,
        keep: int = 2,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        use_one_gpu(args, log.say)
        super().__init__(model, args, train_dataset=steps, eval_dataset=(), callbacks=callbacks)  # pyright: ignore
        self.remove_callback(PrinterCallback)
        self.add_callback(_StepCallback(self))
        check_ranks(self.accelerator)
        self.steps = steps
        self.tasks, self.objective, self.balancer = tuple(tasks), objective, balancer
        self.run_log, self.stop = log, stop or StopSignal()
        self.identity, self.keep = identity or {}, keep
        self.evaluations: dict[int, dict[str, TaskScores]] = {}
        self._bad = NonFiniteSteps(most=max_bad_steps)
        self._score = score
        self._line: dict[str, Any] = {}
        self._prefetched: PrefetchedSteps | None = None
        self._trouble: str | None = None
        self.gradient_step = gradient_step
        self.stopping = stopping or EarlyStopping(tasks)
        self.online, self.mezo = online, mezo
        if balancer.needs.gram_every != (None if gradient_step is None else gradient_step.gram_every):
            raise ValueError(
                f"balancer {balancer.NAME} needs the task gradients every {balancer.needs.gram_every} steps"
            )

    @property
    def bad_steps(self) -> dict[str, int]:
        """Steps that were skipped so far, by reason."""
        return self._bad.counts

    def context(self) -> StepContext:
        """What the parts of a step see of this run, as it is now: engines wrap the model when training begins."""
        return StepContext(
            self.model,
            self.model_wrapped,
            self.objective,
            self.accelerator,
            self.tasks,
            self.args.device,
            self.optimizer,
            self.args.seed,
            bool(self.is_deepspeed_enabled),
            self.run_log.micro_batch,
        )

    # ---- data

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        try:
            return super().train(*args, **kwargs)
        finally:
            if self._prefetched is not None:
                self._prefetched.close()

    def get_train_dataloader(self) -> DataLoader:
        """Steps 0, 1, ... of the source. Not prepared by accelerate: every rank already reads its own part."""
        # A mixture that changes online would come too late for what is built ahead.
        self._prefetched = PrefetchedSteps(self.steps, self.args.device, ahead=0 if self.online is not None else AHEAD)
        return DataLoader(
            self._prefetched,  # pyright: ignore[reportArgumentType]  (map-style by __getitem__ and __len__)
            batch_size=1,
            shuffle=False,
            collate_fn=itemgetter(0),
        )

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list, None]:
        """One optimizer step; it is counted by us."""
        self._clock = time.perf_counter()
        return [next(epoch_iterator)], None

    # ---- one optimizer step

    def training_step(self, model: nn.Module, inputs: list[Batch], num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of a step's micro-batches. Returns the loss of the whole step, equal on all ranks."""
        model.train()
        step, K, device = self.state.global_step + 1, len(self.tasks), self.args.device
        self._context = context = self.context()
        if self.objective.noise is not None:
            self.objective.noise.step = step
        held = sum(batch.input_ids_BT.numel() for batch in inputs)
        self.run_log.begin_step(step, len(inputs), held, first=not self._line)
        batches = inputs if device.type == "cpu" else [batch.to(device) for batch in inputs]
        counts = step_counts(batches, K, device=device)
        needs, normalise = self.balancer.needs, self.objective.normalise
        self._random = random_state() if needs.after_step else None
        step_loss_K = global_losses(context, model, batches) if needs.step_loss else None
        w_K = self.balancer.weights(step, step_loss_K)
        if self.stopping.dropped:
            w_K = self.stopping.weigh(w_K)
        share_K = task_coefficients(counts, w_K, normalise)
        empty = float(share_K.sum()) == 0  # on every rank: nothing in the whole step counts, and nothing is run
        parts = [] if empty else self._gradients(model, batches, counts, w_K, share_K, step)
        sums = reduce_sums(parts, K, device=device)
        loss_K = task_losses(sums, counts, normalise)
        loss = float(torch.where(share_K > 0, share_K * loss_K, 0.0).sum())
        self._trouble = "empty" if empty else None if np.isfinite(loss) else "non-finite"
        even_K = task_coefficients(counts, torch.ones_like(w_K), normalise)
        probs_K = task_probs(sums, counts) if needs.token_probs else None
        self._last = [] if empty else batches, loss_K, probs_K, even_K
        content, rate = self.steps.content(step - 1), self._get_learning_rate()
        self._line = step_line(step, self.tasks, content, rate, loss, loss_K, w_K, share_K, counts.tokens_K)
        mean = torch.tensor(loss)
        return mean if mean.device == device else to_device(mean, device)

    def _gradients(
        self, model: nn.Module, batches: list[Batch], counts: TaskCounts, w_K: Tensor, share_K: Tensor, step: int
    ) -> list[TaskSums]:
        """The gradient of the step, in .grad; the task sums of its micro-batches."""
        context, gradient_step = self._context, self.gradient_step
        if self.mezo is not None:
            return mezo_step(context, model, batches, counts, w_K, step, **self.mezo)
        if gradient_step is None:
            return forward_backward(context, model, batches, counts, w_K, step)
        used_K = gradient_step.weights(step, w_K, counts.token_weights_K > 0)
        flat = gradient_step.flat
        before = {} if flat is None else random_state()
        with gradient_step.watch(step, floored=used_K is not w_K) as taps:
            measured = None if taps is None else (gradient_step, taps)
            parts = forward_backward(context, model, batches, counts, used_K, step, measured)
        passes = None
        if flat is not None and taps is not None:
            passes = SharpnessAwareStep(context, flat, batches, counts, before, step, taps.factor)
        gradient_step.finish(step, task_coefficients(counts, used_K, self.objective.normalise), share_K, passes)
        return parts

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """Not in an empty step: nothing was run, and a gradient scaler (fp16) asserts that it has scaled something."""
        return 0.0 if self._trouble == "empty" else super()._clip_grad_norm(model)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> float | None:
        """The norm before clipping. A step that is empty or not finite ends here, so nothing moves.

        Called by Trainer between clipping and the optimizer step. An empty one is no step for accelerate; one that is
        not finite loses its gradients, and without them an optimizer leaves weights, moments and decay alone. The
        schedule goes on.
        """
        norm = 0.0 if self._trouble == "empty" else super()._get_grad_norm(model, grad_norm)
        norm = None if norm is None else float(norm)
        if self._trouble == "empty":
            self.accelerator.gradient_state._set_sync_gradients(False)
        elif self._trouble is None and norm is not None and not np.isfinite(norm):
            self._trouble = "non-finite"
        if self._trouble is not None and not self.is_deepspeed_enabled:  # which has seen to it in the backward pass
            model.zero_grad(set_to_none=True)
        self._line["grad_norm"] = norm
        return norm

    def finish_step(self, control: TrainerControl) -> None:
        """After the optimizer step: balancer, metrics, bad steps, signals. On every rank."""
        context = self._context
        skipped = self.accelerator.optimizer_step_was_skipped  # by a gradient scaler or DeepSpeed
        if skipped:  # Trainer holds the schedule back then; ours is a function of the step under every engine
            self.lr_scheduler.step()
        batches, loss_K, probs_K, even_K = self._last
        if self._trouble is None:
            step, needs, valid_K, gram_KK = self.state.global_step, self.balancer.needs, None, None
            if self.gradient_step is not None:
                gradients = self.gradient_step.record(step, loss_K, self._line["learning_rate"])
                if gradients is not None:
                    self._line["gradients"] = gradients
                gram_KK = self.gradient_step.gram_for_balancer(step)
            if needs.valid_every and step % needs.valid_every == 0 and self.objective.valid is not None:
                valid_K = valid_losses(context, self.objective.valid, step)
            after_K = global_losses(context, self.model_wrapped, batches, self._random) if needs.after_step else None
            self.balancer.update(Observation(step, loss_K, valid_K, gram_KK, after_K, probs_K, even_K))
            if figures := self.balancer.figures():
                self._line["balancer"] = figures
        else:
            self._line["skipped"] = self._trouble
        if self.online is not None:
            part_K = [values["share"] for values in self._line["tasks"].values()]
            told_K = None if self._trouble else loss_K
            self._line |= self.online.step(context, self.state.global_step, told_K, part_K, self.run_log.say)
        if self._trouble is None:
            self._bad.in_a_row = 0
        else:
            self._bad.count(self._trouble)
        seconds = time.perf_counter() - self._clock
        self._line |= {"seconds": seconds, "tokens_per_second": self._line["tokens"] / seconds}
        if self.args.device.type == "cuda":
            self._line["memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        self.run_log.step(self._line)
        if self.args.report_to:
            self.callback_handler.on_log(self.args, self.state, self.control, flat(self._line))
        too_late = self._trouble == "non-finite" and self.is_deepspeed_enabled and not skipped  # it was taken
        if too_late or self._bad.in_a_row >= self._bad.most:
            written = self.run_dir if self.args.should_save else None
            self._bad.give_up(self._line, self.steps.names(self.state.global_step - 1), written)
        if self.stop.agreed(self.args.device):
            control.should_training_stop = True
            control.should_save = self.args.save_strategy != "no"

    def observe_start(self) -> None:
        """Step 0 for balancers that watch validation: the loss of every held-out example, before training."""
        if self.balancer.needs.valid_every is None or self.state.global_step > 0:
            return
        if 0 not in self.evaluations:
            self.evaluate()
        valid_K = heldout_losses([self.evaluations[0][task] for task in self.tasks], self.objective.normalise)
        self.balancer.update(Observation(0, torch.full_like(valid_K, torch.nan), valid_K))

    def floating_point_ops(self, inputs: Any) -> int:
        return 0

    def run_state(self) -> RunState:
        scheduler, steps = self.lr_scheduler, self.gradient_step
        return RunState(self.context(), scheduler, self.balancer, steps, self.stopping, self.online, self.bad_steps)


def build_trainer(
    recipe: Recipe,
    inputs: TrainingInputs,
    plan: MixturePlan | ReplannedPlan,
    model: Any,
    args: TrainingArguments,
    *,
    log: MetricsLog,
    stop: StopSignal | None = None,
    targets: Collection[str] | None = None,
) -> MultiTaskTrainer:
    """The trainer of a recipe on `model`."""
    parts = trainer_parts(recipe, inputs, plan, model, args, log=log, stop=stop, targets=targets)
    return MultiTaskTrainer.from_parts(model, args, parts)


class _StepCallback(TrainerCallback):
    """Calls the trainer back after each optimizer step, and keeps the progress bar."""

    def __init__(self, trainer: MultiTaskTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        check_sharded(self.trainer.model)
        self.trainer.run_log.start(state.global_step)
        self.trainer.try_metrics()
        self.trainer.observe_start()
        begin_training(self.trainer.optimizer)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer.finish_step(control)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer.run_log.close()
