"""GradNorm: weights so that the tasks' gradient norms follow their training rates.

    w = K softmax(v);  G_k = w_k |g_k|;  r_k = (L_k / L_k(0)) / mean(L / L(0))
    minimise over v   sum_k | G_k - stopgrad(mean(G) r_k^alpha) |

Chen et al., "GradNorm" (ICML 2018, arXiv 1711.02257). A task that lags (r_k > 1) is given a larger gradient. The paper
measures the last shared layer; here |g_k| is the norm over the adapter, from the diagonal of the Gram matrix that is
measured every `gram_every` steps. The softmax keeps weights positive, which the paper does by renormalising.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from mtft.losses.balancers.base import BalancerNeeds, Observation
from mtft.losses.balancers.uncertainty import LearnedBalancer


@dataclass(eq=False)
class GradNorm(LearnedBalancer):
    """`alpha`: how hard lagging tasks are pulled (0 = equal norms). L(0) is the first training loss seen of a task."""

    alpha: Annotated[float, Field(ge=0)] = 1.5
    gram_every: Annotated[int, Field(ge=1)] = 20
    NAME: ClassVar[str] = "gradnorm"
    STATE: ClassVar[tuple[str, ...]] = (*LearnedBalancer.STATE, "start_K")

    def declare(self) -> BalancerNeeds:
        return BalancerNeeds(gram_every=self.gram_every)

    def reset(self) -> None:
        super().reset()
        self.start_K = torch.full((self.K,), torch.nan, dtype=torch.float64)

    def balance(self, step: int, step_loss_K: Tensor | None) -> Tensor:
        return torch.softmax(self.value_K, dim=0)

    def observe(self, observation: Observation) -> None:
        self.start_K = torch.where(self.start_K.isnan(), observation.train_loss_K, self.start_K)
        if observation.gram_KK is None:
            return
        norm_K, rate_K = observation.gram_KK.diagonal().clamp(min=0).sqrt(), observation.train_loss_K / self.start_K
        _, gradient_K = gradnorm_gradient(self.value_K, norm_K, rate_K, self.alpha)
        self.descend(gradient_K)


def gradnorm_gradient(v_K: Tensor, norm_K: Tensor, rate_K: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """(value, d value / dv) of GradNorm's loss; a task with NaN is left out of every sum and gets NaN."""
    present_K = norm_K.isfinite() & rate_K.isfinite()
    gradient_K = torch.full_like(v_K, torch.nan)
    if not present_K.any():
        return v_K.new_zeros(()), gradient_K
    with torch.enable_grad():
        v_P = v_K[present_K].detach().requires_grad_()
        pulled_P = len(v_P) * torch.softmax(v_P, dim=0) * norm_K[present_K]
        rate_P = rate_K[present_K] / rate_K[present_K].mean()
        value = (pulled_P - (pulled_P.mean() * rate_P**alpha).detach()).abs().sum()
        gradient_K[present_K] = torch.autograd.grad(value, v_P)[0]
    return value.detach(), gradient_K
