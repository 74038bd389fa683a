"""What fusion did at every generated token: light statistics per row, and the full token trace.

Both are given to `generate(trace=...)`; several go together through `Observers`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mtft.fuse.alpha.spec import FusionOutput

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from mtft.fuse.decoding.generate_request import Observer

TOP = 5


class Observers:
    """Several observers as one."""

    def __init__(self, *observers: Observer) -> None:
        self.observers = observers

    def step(self, *position: Any) -> None:
        for observer in self.observers:
            observer.step(*position)


class RowStats:
    """Per row: tokens generated, mean of the summed alpha, share of tokens where the step was clipped."""

    def __init__(self, rows: int) -> None:
        self.tokens, self._alpha, self._clipped = [0] * rows, [0.0] * rows, [0] * rows

    def step(self, rows: list[int], fused: FusionOutput, *_: Any) -> None:
        for row, alpha, clipped in zip(rows, fused.alpha_NT.sum(-1).tolist(), fused.clipped_N.tolist(), strict=True):
            self.tokens[row] += 1
            self._alpha[row] += alpha
            self._clipped[row] += clipped

    def summary(self, row: int) -> dict[str, float | None]:
        sums, tokens = {"alpha_mean": self._alpha[row], "clipped_share": self._clipped[row]}, self.tokens[row]
        return {name: value / tokens if tokens else None for name, value in sums.items()}


class TokenTrace:
    """One dict per generated token of the chosen rows, in `self.tokens[row]`.

    position, token, text; logprob {fused, strong, base, experts}; alpha per expert, lam; c and c_reverse per expert,
    g and h reached; clipped, flat, clamped; tv = total variation between P~ and P; top: the TOP tokens of each model.
    """

    def __init__(self, rows: Iterable[int], tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        self.tokens: dict[int, list[dict[str, Any]]] = {row: [] for row in rows}
        self.tokenizer = tokenizer

    def step(
        self,
        rows: list[int],
        fused: FusionOutput,
        tokens_N: Tensor,
        strong_NV: Tensor,
        experts: list[Tensor],
        base_NM: Tensor,
    ) -> None:
        for at, row in enumerate(rows):
            if row in self.tokens:
                logps = [torch.log_softmax(x[at].float(), -1) for x in (strong_NV, base_NM, *experts)]
                self.tokens[row].append(self._record(len(self.tokens[row]), int(tokens_N[at]), at, fused, logps))

    def _record(self, position: int, token: int, at: int, fused: FusionOutput, logps: list[Tensor]) -> dict[str, Any]:
        """logps: of the strong model, the base and the experts."""
        fused_V, strong_V = fused.logprobs_NV[at], logps[0]

        def each_model(value: Callable[[Tensor], Any]) -> dict[str, Any]:
            of_fused, strong, base, *experts = map(value, (fused_V, *logps))
            return {"fused": of_fused, "strong": strong, "base": base, "experts": experts}

        return {
            "position": position,
            "token": token,
            "text": self._text(token),
            "logprob": each_model(lambda logp_V: _at(logp_V, token)),
            "alpha": fused.alpha_NT[at].tolist(),
            "lam": float(fused.scale_N[at]),
            "c": fused.target_NT[at].tolist(),
            "c_reverse": fused.target_reverse_NT[at].tolist(),
            "g": float(fused.kl_forward_N[at]),
            "h": float(fused.kl_reverse_N[at]),
            "clipped": bool(fused.clipped_N[at]),
            "flat": bool(fused.flat_N[at]),
            "clamped": int(fused.clamped_N[at]),
            "tv": float((fused_V.exp() - strong_V.to(fused_V).exp()).abs().sum() / 2),
            "top": each_model(self._top),
        }

    def _top(self, logp_V: Tensor) -> list[dict[str, Any]]:
        return [{"token": i, "text": self._text(i), "logprob": value} for i, value in top_tokens(logp_V, TOP)]

    def _text(self, token: int) -> str | None:
        return None if self.tokenizer is None else str(self.tokenizer.decode([token]))


def top_tokens(logp_V: Tensor, count: int) -> list[tuple[int, float]]:
    """(id, log-probability) of the most likely tokens, without impossible ones."""
    values, ids = logp_V.topk(min(count, len(logp_V)))
    return [(i, value) for i, value in zip(ids.tolist(), values.tolist(), strict=True) if value > -math.inf]


def _at(logp_V: Tensor, token: int) -> float | None:
    """None where the model can't say the token: an id that it lacks, or probability zero (JSON has no infinity)."""
    value = float(logp_V[token]) if token < len(logp_V) else -math.inf
    return value if value > -math.inf else None
