"""Which modules forgot: the rise of a task's loss between two sets of weights, split over the modules.

    L_k(after) - L_k(before)  ~  sum_m F_km
    F_km = 1/2 < g_km(before) + g_km(after), theta_m(after) - theta_m(before) >

g_km is the gradient of task k's loss in the weights of module m. The trapezoid is exact for a loss that is quadratic
along the way, and its terms add up over modules, so each module's part of the forgetting can be read off. The modules
with the largest parts are tuned again on a small buffer, the others stay: k-FPF, the prioritised fine-tuning of Zhao
et al., "Does Continual Learning Equally Forget All Parameters?" (ICML 2023, arXiv 2304.04158), who rank modules by how
far they move during training; ours ranks by what the move did to the old tasks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

Named = Mapping[str, Tensor]


def module_of(parameter: str) -> str:
    """The adapted layer that a LoRA parameter belongs to: A and B of one layer are one module."""
    for mark in (".lora_A.", ".lora_B."):
        if mark in parameter:
            return parameter.split(mark)[0]
    return parameter.rpartition(".")[0]


def forgetting(before: Named, after: Named, change: Named) -> dict[str, Tensor]:
    """{module: F [K]}, float64: what each module's change did to each task's loss; > 0: the task lost by it.

    before, after  task gradients {parameter: [K, *shape]} at either end (mtft.gradients.capture.task_gradients)
    change         {parameter: weights after - weights before}
    """
    if not before.keys() == after.keys() == change.keys():
        unshared = sorted((before.keys() ^ after.keys()) | (before.keys() ^ change.keys()))
        raise ValueError(f"gradients and change are not of the same parameters: {', '.join(unshared[:3])}")
    parts: dict[str, Tensor] = {}
    for name, moved in change.items():
        mean_KD = (before[name].double() + after[name].double()).flatten(1) / 2
        part_K = (mean_KD @ moved.double().flatten()).cpu()
        module = module_of(name)
        parts[module] = parts[module] + part_K if module in parts else part_K
    return parts


def select_forgetful_modules(parts: Named, old: Sequence[int], share: float) -> list[str]:
    """The fewest modules that hold `share` of the old tasks' forgetting, worst first; [] if nothing was forgotten.

    A module's forgetting is the sum of its positive F over the old tasks: what it gave one task does not make up for
    what it took from another.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share must be in (0, 1], got {share}")
    lost = {module: float(part_K[list(old)].clamp(min=0).sum()) for module, part_K in parts.items()}
    total, held, chosen = sum(lost.values()), 0.0, []
    for module in sorted(lost, key=lambda name: -lost[name]):
        if total == 0 or held >= share * total - 1e-12 * total or lost[module] == 0:
            break
        chosen.append(module)
        held += lost[module]
    return chosen


def totals(parts: Named) -> Tensor:
    """Sum over the modules, [K]: the estimated change of each task's loss."""
    return torch.stack(list(parts.values())).sum(dim=0)
