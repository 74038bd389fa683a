"""Muon for matrices and AdamW for everything else, as one optimizer. Both are torch's.

    Muon (Jordan et al. 2024; torch.optim.Muon):  W -= lr * c * orthogonalise(momentum of the gradient)

c = 0.2 sqrt(max(rows, columns)) gives the update the size that AdamW's has (Liu et al. 2025, arXiv 2502.16982), so
that one learning rate serves both and AdamW's settings carry over.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class MuonAdamW(torch.optim.Optimizer):
    """`matrices` go to Muon, `others` to AdamW. The groups are those of the two, so that schedules reach both."""

    def __init__(
        self,
        matrices: Sequence[Tensor],
        others: Sequence[Tensor],
        *,
        lr: float,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        momentum: float = 0.95,
    ) -> None:
        super().__init__([*matrices, *others], {"lr": lr})
        muon = torch.optim.Muon(
            matrices, lr=lr, weight_decay=weight_decay, momentum=momentum, adjust_lr_fn="match_rms_adamw"
        )
        self.parts: list[torch.optim.Optimizer] = [muon]
        if others:
            self.parts.append(torch.optim.AdamW(others, lr=lr, betas=betas, weight_decay=weight_decay))
        self._share_groups()

    def _share_groups(self) -> None:
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None if closure is None else closure()
        for part in self.parts:
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """In the form of any optimizer: one `state` and one list of groups, parameters numbered throughout."""
        state: dict[int, Any] = {}
        groups: list[dict[str, Any]] = []
        for first, part in self._numbered():
            own = part.state_dict()
            state |= {first + index: moments for index, moments in own["state"].items()}
            groups += [{**group, "params": [first + i for i in group["params"]]} for group in own["param_groups"]]
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        groups = list(state_dict["param_groups"])
        for first, part in self._numbered():
            mine, groups = groups[: len(part.param_groups)], groups[len(part.param_groups) :]
            numbers = [number for group in mine for number in group["params"]]
            state = state_dict["state"]
            part.load_state_dict(
                {
                    "state": {number - first: state[number] for number in numbers if number in state},
                    "param_groups": [{**group, "params": [i - first for i in group["params"]]} for group in mine],
                }
            )
        self._share_groups()  # loading replaces the groups

    def _numbered(self) -> list[tuple[int, torch.optim.Optimizer]]:
        """Each part, with the number of its first parameter."""
        first, parts = 0, []
        for part in self.parts:
            parts.append((first, part))
            first += sum(len(group["params"]) for group in part.param_groups)
        return parts
