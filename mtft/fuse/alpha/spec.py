"""What fusion is asked to do (`FusionSpec`), what it did (`FusionOutput`), and its error (`FusionError`)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from data_mixers.common.suggest import closest_match
from mtft.common.errors import UserError

RULES = ("fixed", "forward", "jeffreys", "paper", "paper_grid")
WEIGHTS = ("active", "onehot", "uniform", "user", "router")
TOKENS = ("strict", "prefix", "map")
ALPHA_LIMIT = 10.0  # no published use goes past 2; beyond 10 a typing error is likelier than an intent


class FusionError(UserError):
    """A request that fusion cannot serve, or input that makes no sense: exit code 2."""


def choose(value: str, known: Iterable[str], key: str) -> str:
    """`value` if it is known, else a FusionError that names the nearest known one."""
    known = tuple(known)
    if value not in known:
        near = closest_match(value, known)
        hint = f"did you mean {near!r}? " if near else ""
        raise FusionError(f"{key} is {value!r}", do=f"{hint}choose one of {', '.join(known)}")
    return value


@dataclass(frozen=True)
class FusionSpec:
    """How far each token is moved from the strong model P towards the experts (formulas in fused_logits.py).

    alpha_rule    how alpha is found at every position: fixed, forward, jeffreys, paper, paper_grid
    alpha         the constant of `fixed`: one number for all experts (shared out by `weights`), or one per expert
    alpha_max     upper end of the search of the other rules
    d_max         nats; log Q_t - log Q is clamped to +-d_max
    rtol          relative tolerance of the root, |f(alpha) - target| <= rtol * target
    weights       how several experts share the step: active, onehot, uniform, user, router
    user_weights  one weight per expert for `user`; >= 0, adding up to 1
    plausibility  drop tokens with P(v) < plausibility * max P after fusion; 0 = off (contrastive decoding, 2210.15097)
    tokens        how much the tokenizers must agree (vocabulary_match.py)
    """

    alpha_rule: str = "jeffreys"
    alpha: float | tuple[float, ...] = 1.0
    alpha_max: float = 2.0
    d_max: float = 30.0
    rtol: float = 1e-4
    weights: str = "active"
    user_weights: tuple[float, ...] | None = None
    plausibility: float = 0.0
    tokens: str = "strict"

    def __post_init__(self) -> None:
        choose(self.alpha_rule, RULES, "alpha_rule")
        choose(self.weights, WEIGHTS, "weights")
        choose(self.tokens, TOKENS, "tokens")
        for alpha in self.alpha if isinstance(self.alpha, tuple) else (self.alpha,):
            _within("alpha", alpha, 0.0, ALPHA_LIMIT)
        _within("alpha_max", self.alpha_max, 1e-3, ALPHA_LIMIT)
        _within("d_max", self.d_max, 1e-3, 80.0)  # expm1(80) is the last round number that fp32 holds
        _within("rtol", self.rtol, 1e-14, 0.1)
        _within("plausibility", self.plausibility, 0.0, 1.0)
        if self.weights == "user":
            if self.user_weights is None:
                raise FusionError("weights is 'user' without user_weights", do="give one weight per expert")
            check_weights(self.user_weights)

    def check_experts(self, experts: int) -> None:
        """Raise if a vector in this spec does not have one entry per expert."""
        for key, value in (("alpha", self.alpha), ("user_weights", self.user_weights)):
            if isinstance(value, tuple) and len(value) != experts:
                raise FusionError(f"{key} has {len(value)} entries for {experts} experts", do="give one per expert")


def check_weights(weights: tuple[float, ...]) -> None:
    """Weights of experts: finite, >= 0, sum 1 within 1e-6."""
    if any(not math.isfinite(w) or w < 0 for w in weights):
        raise FusionError(f"expert weights {list(weights)} hold a negative or non-finite number", do="use numbers >= 0")
    if abs(math.fsum(weights) - 1) > 1e-6:
        raise FusionError(
            f"expert weights {list(weights)} add up to {math.fsum(weights):g}", do="make them add up to 1"
        )


def is_number(value: object) -> bool:
    """A finite number that a float can hold: JSON may write an integer of 400 digits."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _within(key: str, value: float, low: float, high: float) -> None:
    if not is_number(value):
        shown = "too large" if isinstance(value, int) and not isinstance(value, bool) else repr(value)
        raise FusionError(f"{key} is {shown}: not a finite number", do=f"use a number from {low:g} to {high:g}")
    if not low <= value <= high:
        raise FusionError(f"{key} is {value:g}", do=f"use a number from {low:g} to {high:g}")


@dataclass(frozen=True)
class FusionOutput:
    """The fused distribution of N positions, and how it came about. T experts, V ids.

    logprobs_NV         log P~, in the dtype of the solve (fp32 or fp64)
    alpha_NT            effective step along each expert's direction: lam * w_t * alpha_t
    scale_N             lam, 1 for one expert and for `fixed`
    kl_forward_N        g = KL(P~ || P);  kl_reverse_N  h = KL(P || P~)
    target_NT           c = KL(Q_t || Q);  target_reverse_NT  c' = KL(Q || Q_t)
    clipped_N           the step stopped at alpha_max (or the cap of lam) below its target
    flat_N              no expert moves anything here: P~ = P
    clamped_N           ids whose log-ratio was clamped to +-d_max, over all experts
    evaluations         passes over V that the solve took
    """

    logprobs_NV: Tensor
    alpha_NT: Tensor
    scale_N: Tensor
    kl_forward_N: Tensor
    kl_reverse_N: Tensor
    target_NT: Tensor
    target_reverse_NT: Tensor
    clipped_N: Tensor
    flat_N: Tensor
    clamped_N: Tensor
    evaluations: int

    def select(self, rows_N: Tensor) -> FusionOutput:
        """Some of the positions, as copies."""
        tensors = {name: x_N[rows_N.to(x_N.device)] for name, x_N in vars(self).items() if name != "evaluations"}
        return FusionOutput(**tensors, evaluations=self.evaluations)
