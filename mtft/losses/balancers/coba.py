"""CoBa: balance the *convergence* of the tasks, as their validation losses show it.

    r_k(t)  = L_k(t) / L_k(0)
    a_k(t)  = OLS slope of r_k over the observations of the last N steps;  a_max(t) the same of max_k r_k
    RCS     = softmax_k( K a_k / sum_j |a_j| )                             a slower task gets more
    ACS     = softmax_k( -M a_k / sum_u |a_k(u)| )                         a diverging task gets less (M slopes a_k(u))
    DF      = n softmax_u( -tau n a_max(u) / sum_u |a_max(u)| )[last]      u = all n updates; falls on divergence
    w       = DF RCS + (1 - DF) ACS                                        from step W on, uniform before

Gong et al., "CoBa: Convergence Balancer for Multitask Finetuning of LLMs" (EMNLP 2024, arXiv 2410.06741).
A printed form of DF has no |.| in its denominator; that makes DF rise on divergence and divide by 0, so we use |.|.
Known weakness: DF falls on curves that merely converge ever more slowly.

Variant `mftcoder` gives the numbers of the authors' code (MFTCoder) where nothing is missing: DF may exceed 1,
w = softmax(K [...]) with a floor, and a shorter ACS window. Its faults are not copied: here absent observations keep
their place on the time axis, a loss of 0.0 is a loss, the history is in the checkpoint, and validation costs one
forward every `valid_every` steps (10) instead of one a step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from mtft.common.errors import UserError
from mtft.losses.balancers.base import Balancer, BalancerNeeds, Observation
from mtft.losses.balancers.ols_slope import slopes


@dataclass(eq=False)
class CoBa(Balancer):
    """In steps: `warmup` W before weights move, `window` N of the slopes, `valid_every`. `tau` sharpens DF."""

    variant: Literal["paper", "mftcoder"] = "paper"
    warmup: Annotated[int, Field(ge=2)] = 100
    window: Annotated[int, Field(ge=2)] = 200
    tau: Annotated[float, Field(gt=0)] = 5.0
    valid_every: Annotated[int, Field(ge=1)] = 10
    NAME: ClassVar[str] = "coba"
    STATE: ClassVar[tuple[str, ...]] = (
        "start_K", "steps_N", "ratio_NK", "updates_U", "slope_UK", "worst_slope_U", "factor", "current_K"
    )  # fmt: skip

    def declare(self) -> BalancerNeeds:
        return BalancerNeeds(valid_every=self.valid_every)

    def reset(self) -> None:
        if self.variant == "mftcoder" and self.window < self.warmup:
            raise UserError(
                f"the mftcoder variant needs window >= warmup, got {self.window} and {self.warmup}",
                where="loss.balancer.window",
                do="raise window, or use variant: paper",
            )
        self.start_K = torch.full((self.K,), torch.nan, dtype=torch.float64)
        self.steps_N = torch.zeros(0, dtype=torch.int64)
        self.ratio_NK = torch.zeros(0, self.K, dtype=torch.float64)
        self.updates_U = torch.zeros(0, dtype=torch.int64)
        self.slope_UK = torch.zeros(0, self.K, dtype=torch.float64)
        self.worst_slope_U = torch.zeros(0, dtype=torch.float64)
        self.factor = torch.ones((), dtype=torch.float64)  # DF, for logs
        self.current_K = torch.ones(self.K, dtype=torch.float64)

    def observe(self, observation: Observation) -> None:
        if observation.valid_loss_K is None:
            return
        if self.start_K.isnan().all():
            self._start(observation.valid_loss_K)
            return
        ratio_K = observation.valid_loss_K / self.start_K
        self.steps_N = torch.cat([self.steps_N, torch.tensor([observation.step])])
        self.ratio_NK = torch.cat([self.ratio_NK, ratio_K[None]])

    def balance(self, step: int, step_loss_K: Tensor | None) -> Tensor:
        """New weights from step `warmup` on, every `valid_every` steps, out of what was observed before `step`."""
        if step >= self.warmup and (len(self.updates_U) == 0 or step - int(self.updates_U[-1]) >= self.valid_every):
            self._renew(step)
        return self.current_K

    def _start(self, loss_K: Tensor) -> None:
        for task, loss in zip(self.run.tasks, loss_K.tolist(), strict=True):
            if not 0 < loss < float("inf"):
                raise UserError(
                    f"task {task} has validation loss {loss} before training: CoBa divides by it",
                    where=f"tasks.{task}.eval_data",
                    do="give the task held-out rows with a supervised response, or use a balancer without validation",
                )
        self.start_K = loss_K.clone()

    def _renew(self, step: int) -> None:
        recent_N = self.steps_N >= step - self.window
        self.steps_N, self.ratio_NK = self.steps_N[recent_N], self.ratio_NK[recent_N]
        slope_K = slopes(self.steps_N, self.ratio_NK)
        worst_N = self.ratio_NK.nan_to_num(nan=-torch.inf).amax(dim=1)  # -inf = nothing observed = missing
        self.updates_U = torch.cat([self.updates_U, torch.tensor([step])])
        self.slope_UK = torch.cat([self.slope_UK, slope_K[None]])
        self.worst_slope_U = torch.cat([self.worst_slope_U, slopes(self.steps_N, worst_N[:, None])])
        self.factor = self._divergence_factor()
        mixed_K = self.factor * self._relative(slope_K) + (1 - self.factor) * self._absolute(step, slope_K)
        self.current_K = mixed_K if self.variant == "paper" else self._sharpened(mixed_K)

    def _relative(self, slope_K: Tensor) -> Tensor:
        total = slope_K.abs().sum()
        return torch.softmax(self.K * slope_K / total if total > 0 else torch.zeros_like(slope_K), dim=0)

    def _absolute(self, step: int, slope_K: Tensor) -> Tensor:
        first = step - self.window + (1 if self.variant == "paper" else self.warmup)
        window_UK = self.slope_UK[self.updates_U >= first]
        total_K = window_UK.abs().sum(dim=0)
        score_K = torch.where(total_K > 0, -len(window_UK) * slope_K / total_K.clamp(min=1e-300), 0.0)
        return torch.softmax(score_K, dim=0)

    def _divergence_factor(self) -> Tensor:
        n, total = len(self.worst_slope_U), self.worst_slope_U.abs().sum()
        if total == 0:
            return torch.ones((), dtype=torch.float64)
        factor = n * torch.softmax(-self.tau * n * self.worst_slope_U / total, dim=0)[-1]
        return factor.clamp(max=1.0) if self.variant == "paper" else factor

    def _sharpened(self, mixed_K: Tensor) -> Tensor:
        w_K = torch.softmax(self.K * mixed_K, dim=0)
        floor = 1 / (10 * self.K)
        return 0.9 * w_K + floor if bool((w_K < floor).any()) else w_K
