"""Task gradients in a training run: when they are measured, and what is done with them.

    measured  at every `gram_every`-th step for the balancer, every `loss.gradients.every`-th for the affinity of the
              tasks, and always with an aggregator
    direct    with `loss.gradients.aggregator` the gradient of each step becomes J^T alpha, before it is clipped;
              preference p = the tasks' parts of the loss, so that alpha = p is the plain gradient
    flat      with `loss.gradients.flat` it becomes a step towards a flat minimum, which takes more passes
              (mtft/experimental/sharpness_aware.py); the aggregator, or p without one, mixes its gradients

Steps that are not measured cost nothing: the taps are taken off. A measured step has the gradient it would have had, to
the bit, with one exception: a task that is present with weight 0 has no part in the loss, so nothing could be captured.
Where every rank holds whole gradients it is given a weight of 1e-3 for the backward, and the gradient is put together
again without it (to rounding); elsewhere the task counts as absent from the measurement.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mtft.common.errors import UserError
from mtft.data.batching.batch import IGNORE, Batch
from mtft.distributed.launch import engine
from mtft.experimental.flat_minima import Mix, Named
from mtft.gradients.affinity import Affinity
from mtft.gradients.aggregators import Aggregator, make_aggregator
from mtft.gradients.capture.coverage import in_words
from mtft.gradients.capture.split_halves import SplitHalves, joined
from mtft.gradients.capture.task_gradients import TaskGradients
from mtft.gradients.gramian import combine
from mtft.losses.token_nll import resolve_path
from mtft.recipe.schema.loss import GradientSection
from mtft.recipe.schema.recipe import Recipe

FLOOR = 1e-3  # of the mean weight
Passes = Callable[[Named, Mix, Tensor], tuple[Named, Tensor]]  # mtft.experimental.sharpness_aware.SharpnessAwareStep


class TaskGradientMetrics(NamedTuple):
    """What one step showed: G float64 [K, K], NaN = absent; alpha [K] in direct mode, NaN where d is not J^T alpha;
    with `split` also the diagonal of G without noise [K]."""

    gram_KK: Tensor
    alpha_K: Tensor | None
    halves_K: Tensor | None


class TaskGradientStep:
    """What `loss.gradients` and the balancer ask for. Without either it does nothing.

    model          the bare model (engines may wrap it later)
    gram_every     of the balancer's needs;  normalise  of the loss
    isolated       attention is proven not to cross the examples of a row
    whole          each rank holds whole weights and gradients before the optimizer step (one process, DDP)
    fused_head     loss.path is fused or chunked: the output head's weight is used outside of its layer
    run_dir        where affinity.json goes; None: nowhere (other ranks)
    """

    def __init__(
        self,
        model: nn.Module,
        tasks: Sequence[str],
        section: GradientSection | None = None,
        *,
        gram_every: int | None = None,
        normalise: str = "task_token",
        isolated: bool = False,
        whole: bool = True,
        fused_head: bool = False,
        seed: int = 0,
        run_dir: Path | None = None,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        section = section or GradientSection()
        self.tasks, self.model, self.whole, self.run_dir = tuple(tasks), model, whole, run_dir
        self.gram_every, self.every = gram_every, section.every
        self.aggregator: Aggregator | None = None
        if section.aggregator is not None:
            self.aggregator = make_aggregator(section.aggregator, section.options, seed=seed)
            if section.flat is not None:
                self.aggregator.check_from_gram("loss.gradients.flat mixes two sets of gradients a step")
        self.flat = section.flat
        self.direct = self.aggregator is not None or self.flat is not None  # writes the gradient of every step
        self.affinity = Affinity(tasks, split=section.split) if self.every is not None else None
        self.halves = SplitHalves(len(tasks), by_samples=normalise.endswith("sample")) if section.split else None
        self.measured: TaskGradientMetrics | None = None  # of the present step
        self.taps: TaskGradients | None = None
        self._checked = self._told = False
        self._say = say
        if self.direct and not whole:
            raise UserError(
                "an aggregator (or flat) writes each step's gradient, and this engine has cut it up before anyone can",
                where="loss.gradients.aggregator" if self.flat is None else "loss.gradients.flat",
                do="launch one process or recipes/accelerate/ddp.yaml, or use loss.balancer: {name: lagged}",
            )
        if self.direct or gram_every is not None or self.every is not None:
            self.taps = TaskGradients(
                model,
                len(tasks) * (1 if self.halves is None else 2),
                isolated=isolated,
                partial=section.partial,
                fused_head=fused_head,
            )
            for line in in_words(self.taps.left_out):
                say(f"task gradients leave out {line}")

    def due(self, step: int) -> bool:
        """Whether the task gradients of this step are measured."""
        return self.direct or _hits(step, self.gram_every) or _hits(step, self.every)

    def weights(self, step: int, w_K: Tensor, present_K: Tensor) -> Tensor:
        """Task weights for the backward pass; see the module about weights of 0. present_K: has tokens in the step."""
        nothing_K = present_K & (w_K <= 0)
        if not self.due(step) or not bool(nothing_K.any()) or not bool((present_K & (w_K > 0)).any()):
            return w_K
        if self.whole and self.taps is not None and not self.taps.left_out and self.halves is None:
            return torch.where(nothing_K, FLOOR * w_K[present_K].mean(), w_K)
        if not self._told:
            self._told = True
            self._say("task gradients: tasks of weight 0 are left out of the measurement")
        return w_K

    @contextlib.contextmanager
    def watch(self, step: int, *, floored: bool = False) -> Iterator[TaskGradients | None]:
        """Around the backwards of a step: the taps, or None in a step that is not measured."""
        self.measured = None
        if self.taps is None or not self.due(step):
            yield None
            return
        self.taps.gram_only = not self.direct and not floored
        if self.halves is not None:
            self.halves.start()
        if not self._checked:
            self.taps.self_check()
        with self.taps:
            yield self.taps

    def begin(self, batch: Batch, *, last: bool) -> None:
        """Before the forward of each micro-batch of a measured step."""
        if self.taps is not None:
            ids_BT = batch.host.task_ids_BT if self.halves is None else self.halves.deal(batch)
            self.taps.begin(ids_BT, batch.host.labels_BT != IGNORE, last=last)

    def finish(self, step: int, used_K: Tensor, asked_K: Tensor, passes: Passes | None = None) -> None:
        """After the last backward, before clipping. A collective call in measured steps.

        used_K   each task's part of the loss that was differentiated (mtft.losses.task_reduction.task_coefficients)
        asked_K  each task's part of the loss that is meant: `used_K`, but 0 where a weight of 0 was lifted
        passes   of a step towards a flat minimum (needed with `flat`)
        """
        if self.taps is None or not self.due(step):
            return
        if not self._checked:
            self._checked = self.taps.check()
        gram_KK, halves_K, finite = self._gram(used_K)
        alpha_K = None if self.taps.gram_only else asked_K
        if finite:  # else the step is skipped
            if self.flat is not None:
                if passes is None:
                    raise ValueError("a step towards a flat minimum needs its passes")
                alpha_K = self._mix(gram_KK, asked_K, step)
                self._write(passes(self.taps.jacobian(used_K), lambda G: self._mix(G, asked_K, step), asked_K)[0])
            elif self.aggregator is not None:
                direction, alpha_K = self.aggregator.direction(self.taps.jacobian(used_K), gram_KK, asked_K, step=step)
                self._write(direction)
            elif alpha_K is not None:
                self._write(combine(self.taps.jacobian(used_K), alpha_K))
        self.measured = TaskGradientMetrics(gram_KK, alpha_K if self.direct else None, halves_K)

    def _gram(self, used_K: Tensor) -> tuple[Tensor, Tensor | None, bool]:
        """(G, its diagonal of halves, whether the step's gradients are finite). Collective."""
        assert self.taps is not None
        if self.halves is None:
            gram_KK = self.taps.gram(used_K)
            return gram_KK, None, bool(gram_KK.diagonal()[used_K > 0].isfinite().all())
        part_H = self.halves.parts(next(self.model.parameters()).device)
        used_H = used_K.repeat_interleave(2) * part_H
        gram_HH = self.taps.gram(used_H)
        return *joined(gram_HH, part_H), bool(gram_HH.diagonal()[used_H > 0].isfinite().all())

    def _mix(self, gram_KK: Tensor, p_K: Tensor, step: int) -> Tensor:
        if self.aggregator is not None:
            return self.aggregator.weights(gram_KK, p_K, step=step)
        return torch.where(gram_KK.diagonal().isfinite(), p_K, 0.0)

    def _write(self, direction: dict[str, Tensor]) -> None:
        assert self.taps is not None
        factor = self.taps.factor
        for name, value in direction.items():
            parameter = self.model.get_parameter(name)
            if parameter.grad is None:
                parameter.grad = (factor * value).to(parameter.dtype)
            else:
                parameter.grad.copy_(factor * value)

    def record(self, step: int, loss_K: Tensor, learning_rate: float) -> dict[str, Any] | None:
        """After a step that was taken: the affinity of the tasks. What goes into the step's line of metrics."""
        if self.measured is None:
            return None
        gram_KK, alpha_K, halves_K = self.measured
        if self.affinity is not None and _hits(step, self.every):
            seen_KK = gram_KK if halves_K is None else gram_KK.diagonal_scatter(halves_K)
            self.affinity.update(step, seen_KK, loss_K, learning_rate)
            if self.run_dir is not None:
                self.affinity.save(self.run_dir)
        norm_K = gram_KK.diagonal().clamp(min=0).sqrt()
        line: dict[str, Any] = {"norm": dict(zip(self.tasks, norm_K.tolist(), strict=True)), "gram": gram_KK.tolist()}
        if halves_K is not None:
            line["halves"] = dict(zip(self.tasks, halves_K.tolist(), strict=True))
        if alpha_K is not None:
            line["alpha"] = dict(zip(self.tasks, alpha_K.tolist(), strict=True))
        return line

    def gram_for_balancer(self, step: int) -> Tensor | None:
        """G at the balancer's own steps, so that measuring for anything else does not change what it does."""
        return None if self.measured is None or not _hits(step, self.gram_every) else self.measured.gram_KK

    def state_dict(self) -> dict[str, Any]:
        """Of the aggregator and the affinity, for a checkpoint."""
        return {
            "aggregator": None if self.aggregator is None else self.aggregator.state_dict(),
            "affinity": None if self.affinity is None else self.affinity.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.aggregator is not None and state["aggregator"] is not None:
            self.aggregator.load_state_dict(state["aggregator"])
        if self.affinity is not None and state["affinity"] is not None:
            self.affinity.load_state_dict(state["affinity"])


def make_task_gradient_step(
    recipe: Recipe,
    model: nn.Module,
    *,
    gram_every: int | None,
    isolated: bool,
    run_dir: Path | None,
    say: Callable[[str], None],
) -> TaskGradientStep | None:
    """The task gradients that a recipe's loss asks for; None: none. UserError where they can't be had."""
    loss = recipe.loss
    if loss.gradients is None and gram_every is None:
        return None
    return TaskGradientStep(
        model,
        recipe.task_names,
        loss.gradients,
        gram_every=gram_every,
        normalise=loss.normalise,
        isolated=isolated,
        whole=engine() == "ddp",
        fused_head=resolve_path(loss.path) in ("fused", "chunked"),
        seed=recipe.seed,
        run_dir=run_dir,
        say=say,
    )


def _hits(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
