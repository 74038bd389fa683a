"""Find the step a of every row: the root of a matching rule, or the minimum of the paper's objective.

With g = KL(P_a || P) = a m - A and h = KL(P || P_a) = A (d centred, see exponential_tilt.py) every rule matches
a non-decreasing f:

| rule     | f(a)  | f'(a)      |
|---|---|---|
| forward  | g     | a s2       |
| reverse  | h     | m          |
| jeffreys | g + h = a m | m + a s2 |

so there is at most one root. r(a) = sqrt(2 f(a)) is nearly linear in a, and its slope and bend at 0 are known:

    r = s a (1 + q a + ...),  s^2 = f''(0) = s2 (jeffreys 2 s2),  q = E_P[d^3] / s2 times 1/3 (forward), 1/6, 1/4

Newton runs on r from where this meets sqrt(2 target). Where r is not smooth (f can be a steep sigmoid, on which Newton
jumps to and fro for ever), a step that does not halve the miss is followed by a look at a_max, and then by bisection.
`paper` is the global minimum of J(a) = (g - c)^2 + (h - c')^2 (Fan et al., 2406.15480): J falls below both roots and
rises above both, so it is searched between them; `paper_grid` is the paper's own search on 0, 0.1, ... a_max.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mtft.fuse.alpha.exponential_tilt import ExponentialTilt, TiltMoments
from mtft.fuse.alpha.spec import FusionError

MAX_STEPS = 60  # each step halves the miss or the bracket, so this is never reached
BRACKET = 1e-7  # of a_max: no answer needs a finer a


@dataclass
class TiltStep:
    """The step of N rows (float64): a, A(a), m(a); whether it stopped at a_max below its target; passes over V."""

    a_N: Tensor
    A_N: Tensor
    m_N: Tensor
    clipped_N: Tensor
    evaluations: int

    def put(self, rows_N: Tensor | None, a_N: Tensor, moments: TiltMoments) -> None:
        """Take in an evaluation of rows_N (None: of all rows)."""
        if rows_N is None:
            self.a_N, self.A_N, self.m_N = a_N, moments.A_N, moments.m_N
            return
        self.a_N[rows_N], self.A_N[rows_N], self.m_N[rows_N] = a_N, moments.A_N, moments.m_N

    @property
    def kl_forward_N(self) -> Tensor:
        return (self.a_N * self.m_N - self.A_N).clamp(min=0)

    @property
    def kl_reverse_N(self) -> Tensor:
        return self.A_N.clamp(min=0)


def matching_function(rule: str, a_N: Tensor, moments: TiltMoments) -> Tensor:
    """f(a) of a matching rule."""
    if rule == "forward":
        return a_N * moments.m_N - moments.A_N
    if rule == "reverse":
        return moments.A_N
    return a_N * moments.m_N


def matching_slope(rule: str, a_N: Tensor, moments: TiltMoments, tilt: ExponentialTilt) -> Tensor:
    """f'(a) of a matching rule, right after the evaluation at a."""
    if rule == "forward":
        return a_N * tilt.spread()
    if rule == "reverse":
        return moments.m_N
    return torch.addcmul(moments.m_N, a_N, tilt.spread())


BEND = {"forward": 1 / 3, "reverse": 1 / 6, "jeffreys": 1 / 4}


def _start(rule: str, tilt: ExponentialTilt, rho_N: Tensor) -> Tensor:
    """Where s a (1 + q a) = rho; the bend is believed as far as it moves the step by -25 % to + 33 %."""
    linear_N = rho_N / ((2.0 if rule == "jeffreys" else 1.0) * tilt.variance_N).sqrt()
    bend_N = linear_N * tilt.third_N / tilt.variance_N
    return 2 * linear_N / (1 + bend_N.mul_(4 * BEND[rule]).add_(1).clamp_(0.25, 2.8).sqrt_())


def solve_root(tilt: ExponentialTilt, rule: str, target_N: Tensor, a_max_N: Tensor, rtol: float) -> TiltStep:
    """Smallest a in [0, a_max] with f(a) = target; a_max where f stays below; 0 where flat or target 0."""
    all_targets_N, all_a_max_N, flat_N = target_N, a_max_N, tilt.flat_N
    zero = torch.zeros_like(a_max_N)
    step = TiltStep(zero, zero, zero, torch.zeros_like(flat_N), 0)
    done_N = flat_N | (target_N <= 0)
    # off the CPU a look at `done` waits for the device; most roots need two to four passes
    every = 1 if a_max_N.device.type == "cpu" else 2
    if every == 1 and bool(done_N.all()):
        return step
    slack_N, tiny_N, rho_N = rtol * target_N, BRACKET * a_max_N, (2 * target_N).sqrt()
    a_N = torch.minimum(_start(rule, tilt, rho_N), a_max_N).where(~done_N, zero)
    low_N, high_N = zero, torch.full_like(a_N, torch.inf)  # inf: nothing above the target has been seen
    miss_N = high_N  # |r - rho| at the last evaluation
    rows_N = None  # of `step`, once some rows have been left behind
    for count in range(1, MAX_STEPS + 1):
        moments = tilt(a_N)
        step.evaluations += 1
        f_N = matching_function(rule, a_N, moments)
        over_N = f_N - target_N
        above_N = over_N > 0
        high_N, low_N = torch.where(above_N, a_N, high_N), torch.where(above_N, low_N, a_N)
        done_N = done_N | (over_N.abs() <= slack_N) | (low_N >= a_max_N) | (high_N - low_N < tiny_N)
        left = len(done_N) - int(done_N.sum()) if count % every == 0 else len(done_N)
        if left == 0:
            step.put(rows_N, a_N, moments)
            break
        slope_N = matching_slope(rule, a_N, moments, tilt)
        if left <= len(done_N) // 2:
            step.put(rows_N, a_N, moments)
            keep = (~done_N).nonzero().squeeze(-1)
            rows_N, tilt = keep if rows_N is None else rows_N[keep], tilt.take(keep)
            done_N, a_N, low_N, high_N = done_N[keep], a_N[keep], low_N[keep], high_N[keep]
            target_N, slack_N, rho_N, a_max_N = target_N[keep], slack_N[keep], rho_N[keep], a_max_N[keep]
            f_N, slope_N, miss_N, tiny_N = f_N[keep], slope_N[keep], miss_N[keep], tiny_N[keep]
        r_N = (2 * f_N.clamp_(min=0)).sqrt_()
        off_N = r_N - rho_N
        next_N = a_N - r_N.mul_(off_N).div_(slope_N)
        before_N, miss_N = miss_N, off_N.abs_()
        newton_N = (next_N > low_N) & (next_N < high_N) & (2 * miss_N <= before_N)  # False for NaN too
        next_N = torch.where(newton_N, next_N, (low_N + high_N) / 2)
        a_N = torch.where(done_N, a_N, torch.minimum(next_N, a_max_N))
    else:
        row = int((~done_N).nonzero()[0])
        raise FusionError(
            f"no alpha found for row {row if rows_N is None else int(rows_N[row])} in {MAX_STEPS} steps (rule {rule}, "
            f"target {float(target_N[row]):.6g}, bracket {float(low_N[row]):.6g} to {float(high_N[row]):.6g})",
            do="check the logits of this row; alpha_rule=fixed needs no search",
        )
    reached_N = matching_function(rule, step.a_N, TiltMoments(step.A_N, step.m_N))
    step.clipped_N = ~flat_N & (step.a_N >= all_a_max_N) & (reached_N < all_targets_N * (1 - rtol))
    return step


def solve_paper(
    tilt: ExponentialTilt, c_N: Tensor, reverse_c_N: Tensor, a_max_N: Tensor, rtol: float, points: int = 9
) -> TiltStep:
    """Global argmin of J over [0, a_max]: both roots, `points` between them, then Gauss-Newton in the best cell."""
    forward = solve_root(tilt, "forward", c_N, a_max_N, rtol)
    reverse = solve_root(tilt, "reverse", reverse_c_N, a_max_N, rtol)
    ends = torch.stack([forward.a_N, reverse.a_N])
    low_N, high_N = ends.amin(0), ends.amax(0)
    best = _Best(tilt, c_N, reverse_c_N)
    mesh = low_N + torch.linspace(0, 1, points, dtype=low_N.dtype, device=low_N.device)[:, None] * (high_N - low_N)
    cell_N = torch.zeros_like(low_N, dtype=torch.long)
    for i, a_N in enumerate(mesh):
        better_N, _ = best.try_(a_N)
        cell_N = torch.where(better_N, i, cell_N)
    left_N = mesh.gather(0, (cell_N - 1).clamp(min=0)[None])[0]
    right_N = mesh.gather(0, (cell_N + 1).clamp(max=points - 1)[None])[0]
    a_N = best.a_N
    for _ in range(MAX_STEPS):
        _, moments = best.try_(a_N)
        s2_N = tilt.spread()
        u_N, w_N = a_N * moments.m_N - moments.A_N - c_N, moments.A_N - reverse_c_N
        slope_N = u_N * a_N * s2_N + w_N * moments.m_N  # J'/2
        right_N, left_N = torch.where(slope_N > 0, a_N, right_N), torch.where(slope_N > 0, left_N, a_N)
        next_N = a_N - slope_N / ((a_N * s2_N).square() + moments.m_N.square())
        inside_N = (next_N > left_N) & (next_N < right_N)
        next_N = torch.where(inside_N, next_N, (left_N + right_N) / 2)
        moved_N = torch.minimum((next_N - a_N).abs(), right_N - left_N)
        if bool((moved_N <= BRACKET * 0.1 * a_max_N).all()):
            break
        a_N = next_N
    best.clipped_N = forward.clipped_N & reverse.clipped_N
    best.evaluations += forward.evaluations + reverse.evaluations
    return best


def solve_paper_grid(tilt: ExponentialTilt, c_N: Tensor, reverse_c_N: Tensor, a_max_N: Tensor) -> TiltStep:
    """The paper's search: argmin of J on 0, 0.1, ... a_max; ties to the smaller a."""
    best = _Best(tilt, c_N, reverse_c_N)
    count = int(float(a_max_N.max()) / 0.1 + 1e-6)
    for i in range(count + 1):
        best.try_(torch.full_like(a_max_N, i / 10))
    still_N = tilt.flat_N | (c_N <= 0)
    zero = torch.zeros_like(best.a_N)
    best.a_N, best.A_N, best.m_N = (torch.where(still_N, zero, x) for x in (best.a_N, best.A_N, best.m_N))
    # the grid cannot tell whether J would fall further: clipped when its last point won below both targets
    at_end_N = best.a_N >= count / 10 - 1e-9
    best.clipped_N = at_end_N & (best.a_N * best.m_N - best.A_N < c_N) & (reverse_c_N > best.A_N)
    return best


class _Best(TiltStep):
    """The best a seen so far under J, per row."""

    def __init__(self, tilt: ExponentialTilt, c_N: Tensor, reverse_c_N: Tensor) -> None:
        zero = torch.zeros_like(c_N)
        super().__init__(zero, zero, zero, torch.zeros_like(c_N, dtype=torch.bool), 0)
        self.tilt, self.c_N, self.reverse_c_N = tilt, c_N, reverse_c_N
        self.J_N = torch.full_like(c_N, torch.inf)

    def try_(self, a_N: Tensor) -> tuple[Tensor, TiltMoments]:
        """Evaluate J at a; keep a where it is strictly better, or equal and smaller."""
        moments = self.tilt(a_N)
        self.evaluations += 1
        J_N = (a_N * moments.m_N - moments.A_N - self.c_N).square() + (moments.A_N - self.reverse_c_N).square()
        better_N = (J_N < self.J_N) | ((J_N == self.J_N) & (a_N < self.a_N))
        pairs = (J_N, self.J_N), (a_N, self.a_N), (moments.A_N, self.A_N), (moments.m_N, self.m_N)
        self.J_N, self.a_N, self.A_N, self.m_N = (torch.where(better_N, new_N, old_N) for new_N, old_N in pairs)
        return better_N, moments
