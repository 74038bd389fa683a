"""The tilted family P_a(v) ~ P(v) exp(a d(v)) of N rows: its log-normaliser, mean and variance at any a.

    A(a) = log sum P e^{a d}      m(a) = A'(a) = E_{P_a}[d]      s2(a) = A''(a) = Var_{P_a}[d]

Only differences of d matter, so d is centred first: E_P[d] = 0. Then with k = p expm1(a d)

    Z = 1 + sum k      A = log Z      m = sum k d / Z      s2 = (sum p d^2 + sum k d^2) / Z - m^2

The first-order term, which is zero, never enters a sum: that keeps fp32 good where the shift is tiny, and plain
logsumexp loses all digits. Rows where e^{a d} could overflow are evaluated in fp64 in the log domain, as is all fp64.
"""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from mtft.fuse.alpha.buffers import FusionBuffers

HOT = 40.0  # a * d above this: e^{a d} * p leaves what fp32 resolves
FLAT = 1e-12  # Var_P[d] at or below this: the direction is constant where P lives


class TiltMoments(NamedTuple):
    """At one a per row, float64: log-normaliser A and mean m of d under P_a."""

    A_N: Tensor
    m_N: Tensor


class ExponentialTilt:
    """N rows of (P, d), ready to be evaluated at steps a in [0, a_max].

    Takes ownership of d_NV and centres it in place. logp_NV and p_NV [N, V] are read only. reach: a bound of a d, once
    centred, that the caller knows: rows are not looked at one by one if no e^{a d} can overflow.
    """

    def __init__(
        self,
        logp_NV: Tensor,
        p_NV: Tensor,
        d_NV: Tensor,
        a_max_N: Tensor,
        reach: float = float("inf"),
        buffers: FusionBuffers | None = None,
    ) -> None:
        self.logp_NV, self.p_NV, self.d_NV = logp_NV, p_NV, d_NV
        s = self._scratch_NV = (buffers or FusionBuffers()).like("scratch", d_NV)
        d_NV -= torch.mul(p_NV, d_NV, out=s).sum(-1, keepdim=True)
        self.variance_N = torch.mul(p_NV, d_NV, out=s).mul_(d_NV).sum(-1).double()
        self.third_N = s.mul_(d_NV).sum(-1).double()  # E_P[d^3] = A'''(0)
        self._last: tuple[Tensor, Tensor] = self.variance_N, self.variance_N  # Z (or A) and m of the last call
        self._hot: tuple[Tensor, ExponentialTilt] | None = None
        if d_NV.dtype != torch.float64 and not reach <= HOT:
            hot = (a_max_N * d_NV.amax(-1) > HOT).nonzero().squeeze(-1)
            if len(hot):
                logp = torch.log_softmax(logp_NV[hot].double(), -1)
                self._hot = hot, ExponentialTilt(logp, logp.exp(), d_NV[hot].double(), a_max_N[hot])
                self.variance_N[hot], self.third_N[hot] = self._hot[1].variance_N, self._hot[1].third_N

    @cached_property
    def flat_N(self) -> Tensor:
        return self.variance_N <= FLAT

    def take(self, rows: Tensor) -> ExponentialTilt:
        """The same family for some of the rows (copies)."""
        part = object.__new__(ExponentialTilt)
        part.logp_NV, part.p_NV, part.d_NV = self.logp_NV, self.p_NV[rows], self.d_NV[rows]
        part.variance_N, part.third_N = self.variance_N[rows], self.third_N[rows]
        part._scratch_NV, part._hot = torch.empty_like(part.p_NV), None
        if part.d_NV.dtype == torch.float64:
            part.logp_NV = self.logp_NV[rows]
        if self._hot is not None:
            place_N = torch.full((len(self.p_NV),), -1, device=rows.device)
            place_N[self._hot[0]] = torch.arange(len(self._hot[0]), device=rows.device)
            here = (place_N[rows] >= 0).nonzero().squeeze(-1)
            if len(here):
                part._hot = here, self._hot[1].take(place_N[rows][here])
        return part

    def __call__(self, a_N: Tensor) -> TiltMoments:
        """Moments at a_N [N] (float64). One streaming pass over V."""
        if self.d_NV.dtype == torch.float64:
            return self._log_domain(a_N)
        s, d = self._scratch_NV, self.d_NV
        torch.mul(d, a_N.to(d.dtype)[:, None], out=s)
        z_N = 1 + s.expm1_().mul_(self.p_NV).sum(-1).double()
        m_N = s.mul_(d).sum(-1).double() / z_N
        A_N = z_N.log()
        self._last = z_N, m_N
        if self._hot is not None:
            hot, tilt = self._hot
            A_N[hot], m_N[hot] = tilt(a_N[hot])
        return TiltMoments(A_N, m_N)

    def spread(self) -> Tensor:
        """s2_N = Var[d] at the step of the last call; what it left in the scratch is used up."""
        z_N, m_N = self._last
        s, d = self._scratch_NV, self.d_NV
        if d.dtype == torch.float64:
            return s.mul_((d - m_N[:, None]).square_()).sum(-1)
        s2_N = ((self.variance_N + s.mul_(d).sum(-1).double()) / z_N - m_N.square()).clamp_(min=0)
        if self._hot is not None:
            s2_N[self._hot[0]] = self._hot[1].spread()
        return s2_N

    def _log_domain(self, a_N: Tensor) -> TiltMoments:
        s, d = self._scratch_NV, self.d_NV
        torch.mul(d, a_N[:, None], out=s)
        s += self.logp_NV
        A_N = torch.logsumexp(s, -1)
        s.sub_(A_N[:, None]).exp_()
        m_N = torch.linalg.vecdot(s, d)
        self._last = A_N, m_N
        return TiltMoments(A_N, m_N)

    def logprobs(self, a_N: Tensor, A_N: Tensor, out: Tensor) -> Tensor:
        """log P_a [N, V], given A at the same a. Ids with P(v) = 0 stay at -inf."""
        dtype = self.d_NV.dtype
        torch.addcmul(self.logp_NV, self.d_NV, a_N.to(dtype)[:, None], out=out)
        return out.sub_(A_N.to(dtype)[:, None])
