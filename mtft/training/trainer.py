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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback, TrainerCallback, TrainerControl

from mtft.common.state_tree import random_state
from mtft.data.batching.batch import Batch
from mtft.distributed.launch import check_ranks
from mtft.distributed.stop_signal import StopSignal
from mtft.evaluation.task_scores import TaskScores
from mtft.experimental.mezo import mezo_step
from mtft.experimental.sharpness_aware import SharpnessAwareStep
from mtft.losses.balancers import Balancer, Observation
from mtft.losses.task_reduction import TaskSums, reduce_sums, step_counts, task_coefficients, task_losses, task_probs
from mtft.training.callbacks.early_stopping import EarlyStopping
from mtft.training.callbacks.step_end import NonFiniteSteps, StepEndCallback
from mtft.training.checkpoint import checkpoint
from mtft.training.online_mixture import OnlineMixture
from mtft.training.optim.schedule_free import evaluation_weights
from mtft.training.run_files.metrics_log import MetricsLog, flat, step_line
from mtft.training.step.extra_losses import global_losses, valid_losses
from mtft.training.step.forward_backward import forward_backward
from mtft.training.step.objective import Objective
from mtft.training.step.step_dataset import StepDataset
from mtft.training.step.task_gradients import TaskGradientStep


class MultiTaskTrainer(Trainer):
    """Trains `model` on `steps`, once through.

    tasks       names, in the order of the batches' task ids
    surgery     measures the gradients of single tasks, and steps along a mix of them; None: never
    score       model -> scores of each task on its held-out examples, over all ranks; None: no evaluation
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
        steps: StepDataset,
        tasks: Sequence[str],
        objective: Objective,
        balancer: Balancer,
        log: MetricsLog,
        surgery: TaskGradientStep | None = None,
        stopping: EarlyStopping | None = None,
        online: OnlineMixture | None = None,
        score: Callable[[nn.Module], dict[str, TaskScores]] | None = None,
        stop: StopSignal | None = None,
        identity: dict[str, Any] | None = None,
        mezo: dict[str, Any] | None = None,
        max_bad_steps: int = 10,
        keep: int = 2,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        super().__init__(model, args, train_dataset=steps, eval_dataset=(), callbacks=callbacks)  # pyright: ignore
        self.remove_callback(PrinterCallback)
        self.add_callback(StepEndCallback(self))
        check_ranks(self.accelerator)
        self.steps, self.run_dir = steps, Path(str(args.output_dir))
        self.tasks, self.objective, self.balancer = tuple(tasks), objective, balancer
        self.run_log, self.stop, self.identity = log, stop or StopSignal(), identity or {}
        self.keep = keep
        self.evaluations: dict[int, dict[str, TaskScores]] = {}
        self._bad = NonFiniteSteps(most=max_bad_steps)
        self._score = score
        self._line: dict[str, Any] = {}
        self._trouble: str | None = None
        self.surgery = surgery or TaskGradientStep(model, tasks)
        self.stopping = stopping or EarlyStopping(tasks)
        self.online, self.mezo = online, mezo
        if balancer.needs.gram_every != self.surgery.gram_every:
            raise ValueError(
                f"balancer {balancer.NAME} needs the task gradients every {balancer.needs.gram_every} steps"
            )

    @property
    def bad_steps(self) -> dict[str, int]:
        """Steps that were skipped so far, by reason."""
        return self._bad.counts

    # ---- data

    def get_train_dataloader(self) -> DataLoader:
        """Steps 0, 1, ... of the source. Not prepared by accelerate: every rank already reads its own part."""
        return DataLoader(
            self.steps,
            batch_size=1,
            shuffle=False,
            collate_fn=_only,
            # Workers fetch ahead, and a mixture that changes online would come too late.
            num_workers=0 if self.online is not None else self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
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
        batches = [batch.to(device) for batch in inputs]
        counts = step_counts(batches, K, device=device)
        needs, normalise = self.balancer.needs, self.objective.normalise
        self._random = random_state() if needs.after_step else None
        step_loss_K = global_losses(self, model, batches) if needs.step_loss else None
        w_K = self.stopping.weigh(self.balancer.weights(step, step_loss_K))
        share_K = task_coefficients(counts, w_K, normalise)
        parts: list[TaskSums] = []
        if float(share_K.sum()) > 0:  # on every rank; else nothing in the whole step counts, and nothing is run
            used_K = self.surgery.weights(step, w_K, counts.tokens_K > 0)
            before = random_state() if self.surgery.flat is not None else None
            with self.surgery.watch(step, floored=used_K is not w_K) as taps:
                if self.mezo is None:
                    parts = forward_backward(self, model, batches, counts, used_K, step, taps)
                else:
                    parts = mezo_step(self, model, batches, counts, used_K, step, **self.mezo)
            passes = None if before is None else SharpnessAwareStep(self, batches, counts, before, step)
            self.surgery.finish(step, task_coefficients(counts, used_K, normalise), share_K, passes)
        else:
            batches = []
        sums = reduce_sums(parts, K, device=device)
        loss_K = task_losses(sums, counts, normalise)
        loss = float(torch.where(share_K > 0, share_K * loss_K, 0.0).sum())
        self._trouble = "empty" if float(share_K.sum()) == 0 else None if np.isfinite(loss) else "non-finite"
        even_K = task_coefficients(counts, torch.ones_like(w_K), normalise)
        self._seen = batches, loss_K, task_probs(sums, counts) if needs.token_probs else None, even_K
        held, rate = self.steps.content(step - 1), self._get_learning_rate()
        self._line = step_line(step, self.tasks, held, rate, loss, loss_K, w_K, share_K, counts.tokens_K)
        return torch.tensor(loss, device=device)

    def token_losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """fp32 [B, T], in the precision of the run."""
        with self.compute_loss_context_manager():
            return self.objective.nll(model, batch)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> float | None:
        """The norm before clipping. A step that is empty or not finite loses its gradients here, so nothing moves.

        Called by Trainer between clipping and the optimizer step. Without gradients an optimizer leaves weights,
        moments and decay alone; the schedule goes on.
        """
        found = super()._get_grad_norm(model, grad_norm)
        norm = None if found is None else float(found)
        if self._trouble is None and norm is not None and not np.isfinite(norm):
            self._trouble = "non-finite"
        if self._trouble is not None and not self.is_deepspeed_enabled:  # whose engine has taken the step already
            model.zero_grad(set_to_none=True)
        self._line["grad_norm"] = norm
        return norm

    def finish_step(self, control: TrainerControl) -> None:
        """After the optimizer step: balancer, metrics, bad steps, signals. Called by `Flow` on every rank."""
        batches, loss_K, probs_K, even_K = self._seen
        if self._trouble is None:
            step, needs = self.state.global_step, self.balancer.needs
            gradients = self.surgery.record(step, loss_K, self._line["learning_rate"])
            if gradients is not None:
                self._line["gradients"] = gradients
            valid_K = valid_losses(self, step) if needs.valid_every and step % needs.valid_every == 0 else None
            gram_KK = self.surgery.gram_for_balancer(step)
            after_K = global_losses(self, self.model_wrapped, batches, self._random) if needs.after_step else None
            self.balancer.update(Observation(step, loss_K, valid_K, gram_KK, after_K, probs_K, even_K))
            if figures := self.balancer.figures():
                self._line["balancer"] = figures
        else:
            self._line["skipped"] = self._trouble
        if self.online is not None:
            parts = [values["share"] for values in self._line["tasks"].values()]
            self._line |= self.online.step(self, self.state.global_step, None if self._trouble else loss_K, parts)
        self._bad.note(self._trouble)
        seconds = time.perf_counter() - self._clock
        self._line |= {"seconds": seconds, "tokens_per_second": self._line["tokens"] / seconds}
        if self.args.device.type == "cuda":
            self._line["memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        self.run_log.step(self._line)
        if self.args.report_to:
            self.callback_handler.on_log(self.args, self.state, self.control, flat(self._line))
        too_late = self._trouble == "non-finite" and self.is_deepspeed_enabled  # the engine has taken the step
        if too_late or self._bad.in_a_row >= self._bad.most:
            written = self.run_dir if self.args.should_save else None
            self._bad.give_up(self._line, self.steps.names(self.state.global_step - 1), written)
        if self.stop.agreed(self.args.device):
            control.should_training_stop = True
            control.should_save = self.args.save_strategy != "no"

    # ---- evaluation

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Scores every task on its held-out examples; once a step. Returns flat metrics for callbacks and trackers."""
        step = self.state.global_step
        if self._score is None:
            raise ValueError("no held-out examples to evaluate on")
        if step not in self.evaluations:
            with evaluation_weights(self.optimizer):
                self.evaluations = {step: self._score(self.model)}
            found = {task: scores.summary() for task, scores in self.evaluations[step].items()}
            self.run_log.evaluation(step, found)
        metrics = flat({"tasks": {task: scores.summary() for task, scores in self.evaluations[step].items()}}, "eval_")
        if self.args.report_to:
            self.callback_handler.on_log(self.args, self.state, self.control, metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's own summary goes to the trackers; it keeps no history in memory."""
        if self.args.report_to:
            self.callback_handler.on_log(self.args, self.state, self.control, logs)

    def floating_point_ops(self, inputs: Any) -> int:
        return 0

    # ---- checkpoints (their content is in mtft.training.checkpoint.checkpoint)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        checkpoint.save(self)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        checkpoint.load_weights(self, Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint_: str | None) -> None:
        if checkpoint_ is not None:
            checkpoint.load_state(self, Path(checkpoint_))

    def _load_rng_state(self, checkpoint_: str | None) -> None:
        if checkpoint_ is not None:
            checkpoint.load_random_state(self, Path(checkpoint_))

    def _load_scaler(self, checkpoint_: str | None) -> None:
        """With the optimizer's state."""


def _only(items: list) -> Any:
    (item,) = items
    return item
