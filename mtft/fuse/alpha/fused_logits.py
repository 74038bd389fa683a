"""Fuse the next-token distributions of a strong model P, a small base Q and its experts Q_1 ... Q_T.

    d_t = log Q_t - log Q        P_a(v) ~ P(v) exp(a d_t(v))
    g(a) = KL(P_a || P)          h(a) = KL(P || P_a)          c_t = KL(Q_t || Q)          c'_t = KL(Q || Q_t)

| alpha_rule | a | source |
|---|---|---|
| fixed | a constant | EFT, Mitchell et al. 2310.12962; proxy-tuning, Liu et al. 2401.08565 |
| forward | root of g(a) = c | one half of the paper's objective |
| jeffreys | root of g(a) + h(a) = c + c' | ours: one root, both directions |
| paper | global argmin of (g - c)^2 + (h - c')^2, a <= alpha_max | Dynamic Logits Fusion, Fan et al. 2406.15480 |
| paper_grid | the same on 0, 0.1, ... alpha_max | the paper's own search, kept for reproduction |

Several experts: the paper's sum over t of its objective equals T ((g - mean c)^2 + (h - mean c')^2) + const, two
equations for T unknowns. Here each expert gets its own alpha_t, reaching g_t; with weights w >= 0 adding up to 1 the
joint direction is theta = sum w_t alpha_t d_t, and lam solves KL(P_{lam theta} || P) = sum w_t g_t on [0, 1/max w]:
no expert goes past its own step. Effective step of expert t: lam w_t alpha_t.

Raw logits go in: temperature, top-p and other processors act on the result, and never see or change alpha.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mtft.fuse.alpha.buffers import FusionBuffers
from mtft.fuse.alpha.exponential_tilt import ExponentialTilt
from mtft.fuse.alpha.root_solver import TiltStep, solve_paper, solve_paper_grid, solve_root
from mtft.fuse.alpha.spec import FusionError, FusionOutput, FusionSpec, check_weights
from mtft.fuse.tokenizers.token_map import TokenMap


class _Shift(NamedTuple):
    """One expert against the base: d, c, c', how many ids were clamped, and a bound of |d| over all rows."""

    d_NV: Tensor
    c_N: Tensor
    reverse_c_N: Tensor
    clamped_N: Tensor
    far: float


@torch.no_grad()
def fuse_logits(
    strong_NV: Tensor,
    experts_TNV: Tensor | Sequence[Tensor],
    base_NV: Tensor,
    spec: FusionSpec,
    weights_NT: Tensor | None = None,
    alpha_NT: Tensor | None = None,
    buffers: FusionBuffers | None = None,
    token_map: TokenMap | None = None,
) -> FusionOutput:
    """Fuse N positions; pure, and the only place with the maths.

    strong_NV [N, V], experts_TNV [T, N, M] (or a sequence of T tensors [N, M]), base_NV [N, M]: raw logits, already cut
    to real vocabularies. M < V: the small models know the first M ids; the others are not shifted.
    weights_NT: per row, for weights = user | router. alpha_NT: per row, for alpha_rule = fixed.
    token_map: the small models have another tokenizer (token_map.py), and M is the number of its ids.
    buffers: memory of an earlier call to use again; then logprobs_NV is part of it, and the next call writes over it.
    fp16 and bf16 are lifted to fp32; fp64 stays fp64 (the reference). Raises FusionError for NaN, naming model and row.
    """
    _check_shapes(strong_NV, experts_TNV, base_NV, bridged=token_map is not None)
    experts, rows, vocabulary = len(experts_TNV), len(strong_NV), strong_NV.shape[1]
    spec.check_experts(experts)
    dtype = torch.float64 if strong_NV.dtype == torch.float64 else torch.float32
    device = strong_NV.device

    buffers = FusionBuffers() if buffers is None else buffers
    strong, base = _normalise(strong_NV.to(dtype), buffers, "strong"), _normalise(base_NV.to(dtype), buffers, "base")
    lse, shifts = {"the strong model": strong.lse_N1, "the small base": base.lse_N1}, []
    for t, expert_NV in enumerate(experts_TNV):  # one by one: of their [N, V] buffers only d stays
        expert = _normalise(expert_NV.to(dtype), buffers, "expert")
        d_NM = torch.sub(expert.logits_NV, base.logits_NV, out=buffers.like(f"shift {t}", expert.p_NV))
        d_NM -= expert.lse_N1 - base.lse_N1
        lse[f"expert {t}"] = expert.lse_N1
        shift = _shift(expert, base, d_NM, _reach(d_NM, lse), spec.d_max, buffers)
        shifts.append(shift._replace(d_NV=_to_strong_vocabulary(shift.d_NV, vocabulary, token_map)))
    p_NV = strong.p_NV
    logp_NV = torch.sub(strong.logits_NV, strong.lse_N1, out=buffers.like("log strong", p_NV))
    c_NT = torch.stack([shift.c_N for shift in shifts], -1)

    ones_N = torch.ones(rows, dtype=torch.float64, device=device)
    w_NT = ones_N[:, None] if experts == 1 else _weights(spec, c_NT, weights_NT)
    if spec.alpha_rule == "fixed":
        alpha_NT = _fixed_alpha(spec, w_NT, alpha_NT)
        theta_NV = _combine(shifts, alpha_NT, buffers)
        tilt = ExponentialTilt(logp_NV, p_NV, theta_NV, ones_N, buffers=buffers)
        at = tilt(ones_N)
        step = TiltStep(ones_N, at.A_N, at.m_N, torch.zeros_like(ones_N, dtype=torch.bool), 1)
        effective_NT, flat_N = alpha_NT, tilt.flat_N
    elif experts == 1:
        tilt, step = _own_step(logp_NV, p_NV, shifts[0], spec, buffers)
        effective_NT, flat_N = step.a_N[:, None], tilt.flat_N | (shifts[0].c_N <= 0)
    else:
        steps = [_own_step(logp_NV, p_NV, shift, spec, buffers)[1] for shift in shifts]
        own_NT = torch.stack([own.a_N for own in steps], -1) * w_NT
        reached_N = (torch.stack([own.kl_forward_N for own in steps], -1) * w_NT).sum(-1)
        lam_max_N = 1 / w_NT.amax(-1)
        tilt = ExponentialTilt(logp_NV, p_NV, _combine(shifts, own_NT, buffers), lam_max_N, buffers=buffers)
        step = solve_root(tilt, "forward", reached_N, lam_max_N, spec.rtol)
        step.evaluations += sum(own.evaluations for own in steps)
        clipped_NT = torch.stack([own.clipped_N for own in steps], -1)
        step.clipped_N = step.clipped_N | (clipped_NT & (w_NT > 0)).any(-1)
        effective_NT, flat_N = step.a_N[:, None] * own_NT, tilt.flat_N | (reached_N <= 0)

    logprobs_NV = tilt.logprobs(step.a_N, step.A_N, buffers.like("fused", p_NV))
    if spec.plausibility > 0:
        logprobs_NV = _plausible(logprobs_NV, logp_NV, spec.plausibility)
    return FusionOutput(
        logprobs_NV=logprobs_NV,
        alpha_NT=effective_NT,
        scale_N=step.a_N if experts > 1 and spec.alpha_rule != "fixed" else ones_N,
        kl_forward_N=step.kl_forward_N,
        kl_reverse_N=step.kl_reverse_N,
        target_NT=c_NT,
        target_reverse_NT=torch.stack([shift.reverse_c_N for shift in shifts], -1),
        clipped_N=step.clipped_N,
        flat_N=flat_N,
        clamped_N=torch.stack([shift.clamped_N for shift in shifts]).sum(0),
        evaluations=step.evaluations,
    )


def _own_step(
    logp_NV: Tensor, p_NV: Tensor, shift: _Shift, spec: FusionSpec, buffers: FusionBuffers
) -> tuple[ExponentialTilt, TiltStep]:
    """The step of one expert alone under the chosen rule."""
    a_max_N = torch.full_like(shift.c_N, spec.alpha_max)
    reach = 2 * shift.far * spec.alpha_max  # of a d once d is centred: its mean is no larger than its bound
    tilt = ExponentialTilt(logp_NV, p_NV, shift.d_NV, a_max_N, reach, buffers)
    if spec.alpha_rule == "paper":
        return tilt, solve_paper(tilt, shift.c_N, shift.reverse_c_N, a_max_N, spec.rtol)
    if spec.alpha_rule == "paper_grid":
        return tilt, solve_paper_grid(tilt, shift.c_N, shift.reverse_c_N, a_max_N)
    target_N = shift.c_N if spec.alpha_rule == "forward" else shift.c_N + shift.reverse_c_N
    return tilt, solve_root(tilt, spec.alpha_rule, target_N, a_max_N, spec.rtol)


class _Model(NamedTuple):
    """Logits, their logsumexp and probabilities: one exponential serves both."""

    logits_NV: Tensor
    lse_N1: Tensor
    p_NV: Tensor


def _normalise(logits_NV: Tensor, buffers: FusionBuffers, name: str) -> _Model:
    """torch's softmax reads a row once; its largest entry is 1 / sum exp(logits - top), which gives the logsumexp."""
    p_NV = torch.softmax(logits_NV, -1, out=buffers.like(name, logits_NV))
    return _Model(logits_NV, logits_NV.amax(-1, keepdim=True) - p_NV.amax(-1, keepdim=True).log(), p_NV)


def _reach(d_NM: Tensor, lse: dict[str, Tensor]) -> float:
    """Largest |d|; the host waits for the device once, for this and for whether the models' logits are usable.

    A NaN or +inf anywhere in a row, or nothing but -inf, shows in the row's logsumexp [N, 1]: FusionError.
    """
    far = torch.maximum(d_NM.amax(), d_NM.amin().neg())  # aminmax is ten times slower than both
    far, total = torch.stack([far, torch.cat(list(lse.values())).sum()]).tolist()
    if not math.isfinite(total):  # one NaN or infinity is enough to spoil the sum
        _name_not_finite(lse)
    return far


def _name_not_finite(lse: dict[str, Tensor]) -> None:
    for name, lse_N1 in lse.items():
        bad = (~lse_N1[:, 0].isfinite()).nonzero()
        if len(bad):
            raise FusionError(
                f"the logits of {name} hold NaN, +inf or only -inf in row {int(bad[0])} of {len(lse_N1)}",
                do="check this model alone on the same prompt; fp16 overflow is the usual cause (use bf16 or fp32)",
            )


def _shift(expert: _Model, base: _Model, d_NM: Tensor, far: float, d_max: float, buffers: FusionBuffers) -> _Shift:
    """d = log Q_E - log Q, at most `far` from 0, is clamped; c = sum Q_E (d + expm1(-d)) and c' = sum Q (expm1(d) - d).

    Without clamps these equal the KL divergences; they are never negative, and an error in the normalisers enters
    squared only, so no digits cancel when expert and base nearly agree. Then, too, Q_E = Q (1 + k) with k = expm1(d),
    so that c = sum Q k d - c': one exponential gives both.
    """
    if far <= d_max:  # False for NaN
        clamped_N = torch.zeros(len(d_NM), dtype=torch.long, device=d_NM.device)
        k_NM = torch.expm1(d_NM, out=expert.p_NV)  # which nobody needs any more
        scratch_NM = buffers.like("scratch", d_NM)
        reverse_c_N = torch.sub(k_NM, d_NM, out=scratch_NM).mul_(base.p_NV).sum(-1).double()
        c_N = k_NM.mul_(base.p_NV).mul_(d_NM).sum(-1).double() - reverse_c_N
    else:
        far, clamped_N = d_max, (d_NM.abs() > d_max).sum(-1)
        d_NM = torch.nan_to_num_(d_NM, nan=0.0, posinf=d_max, neginf=-d_max).clamp_(-d_max, d_max)
        c_N = torch.neg(d_NM).expm1_().add_(d_NM).mul_(expert.p_NV).sum(-1).double()
        reverse_c_N = torch.expm1(d_NM).sub_(d_NM).mul_(base.p_NV).sum(-1).double()
    return _Shift(d_NM, c_N.clamp_(min=0), reverse_c_N.clamp_(min=0), clamped_N, far)


def _to_strong_vocabulary(d_NM: Tensor, vocabulary: int, token_map: TokenMap | None) -> Tensor:
    """What the small models do not know is not shifted."""
    if token_map is not None:
        return token_map.spread(d_NM, 0.0)
    missing = vocabulary - d_NM.shape[1]
    return torch.nn.functional.pad(d_NM, (0, missing)) if missing else d_NM


def _combine(shifts: list[_Shift], factor_NT: Tensor, buffers: FusionBuffers) -> Tensor:
    """sum_t factor_t d_t [N, V], in a buffer of its own."""
    first_NV = shifts[0].d_NV
    factor_NT = factor_NT.to(first_NV.dtype)
    theta_NV = torch.mul(first_NV, factor_NT[:, 0:1], out=buffers.like("joint shift", first_NV))
    for t, shift in enumerate(shifts[1:], start=1):
        theta_NV.addcmul_(shift.d_NV, factor_NT[:, t : t + 1])
    return theta_NV


def _weights(spec: FusionSpec, c_NT: Tensor, weights_NT: Tensor | None) -> Tensor:
    """Weights [N, T], float64, each row adding up to 1."""
    experts = c_NT.shape[1]
    if spec.weights == "active":
        total_N1 = c_NT.sum(-1, keepdim=True)
        return torch.where(total_N1 > 0, c_NT / total_N1.clamp(min=1e-300), 1 / experts)
    if spec.weights == "onehot":
        return torch.nn.functional.one_hot(c_NT.argmax(-1), experts).double()  # argmax: the first of equals
    if spec.weights == "uniform":
        return torch.full_like(c_NT, 1 / experts)
    if weights_NT is None:
        if spec.user_weights is None:
            raise FusionError(f"weights is {spec.weights!r}, but no weights came with the rows", do="pass weights_NT")
        return torch.tensor(spec.user_weights, dtype=torch.float64, device=c_NT.device).expand_as(c_NT)
    if weights_NT.shape != c_NT.shape:
        raise FusionError(f"weights have shape {list(weights_NT.shape)}, the rows and experts {list(c_NT.shape)}")
    for row in weights_NT.tolist():
        check_weights(tuple(row))
    return weights_NT.to(c_NT)


def _fixed_alpha(spec: FusionSpec, w_NT: Tensor, alpha_NT: Tensor | None) -> Tensor:
    """alpha_NT as given; a vector as given; a single number is the whole step, shared out by the weights."""
    if alpha_NT is not None:
        if alpha_NT.shape != w_NT.shape:
            raise FusionError(f"alpha has shape {list(alpha_NT.shape)}, the rows and experts {list(w_NT.shape)}")
        return alpha_NT.to(w_NT)
    if isinstance(spec.alpha, tuple):
        return torch.tensor(spec.alpha, dtype=w_NT.dtype, device=w_NT.device).expand_as(w_NT)
    return spec.alpha * w_NT


def _plausible(logprobs_NV: Tensor, logp_NV: Tensor, epsilon: float) -> Tensor:
    """Drop ids with P(v) < epsilon * max P and renormalise."""
    floor_N1 = logp_NV.amax(-1, keepdim=True) + torch.log(torch.tensor(epsilon, dtype=logp_NV.dtype))
    return torch.log_softmax(logprobs_NV.masked_fill(logp_NV < floor_N1, -torch.inf), -1)


def _check_shapes(strong_NV: Tensor, experts_TNV: Tensor | Sequence[Tensor], base_NV: Tensor, *, bridged: bool) -> None:
    if len(experts_TNV) == 0:
        raise FusionError("no expert", do="give at least one adapter")
    shapes = [tuple(expert.shape) for expert in experts_TNV]
    if strong_NV.dim() != 2 or any(shape != tuple(base_NV.shape) for shape in shapes):
        raise FusionError(f"logits: strong {list(strong_NV.shape)}, base {list(base_NV.shape)}, experts {shapes}")
    if len(base_NV) != len(strong_NV) or (base_NV.shape[1] > strong_NV.shape[1] and not bridged):
        raise FusionError(
            f"logits: strong {list(strong_NV.shape)}, small models {list(base_NV.shape)}",
            do="cut all models to the ids they share",
        )
