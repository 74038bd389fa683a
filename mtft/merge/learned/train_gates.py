"""Train gates (gates.py) by entropy or by labels, and fold them into one plain adapter."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtft.adapters.lora_factors import LoraAdapter, LoraFactors, read_adapters
from mtft.common.errors import MergeError
from mtft.losses.token_nll import supervised_logits
from mtft.merge.engine.merge import merge_adapters
from mtft.merge.engine.report import MergeReport
from mtft.merge.learned.gates import GATE_KINDS, Gates
from mtft.merge.linalg.core_space import MergedCore, to_core
from mtft.merge.methods.base import MergeMethod, ModuleInputs

FEW = 16
IGNORE = -100


@dataclass(frozen=True)
class GateBatch:
    """inputs: keyword arguments of the model. labels_BT: aligned with the logits, IGNORE outside of responses.

    role: `target`; `control` and `negate` are for atlas (keep this ability; unlearn this one).
    """

    inputs: Mapping[str, object]
    labels_BT: Tensor
    task: str = ""
    role: str = "target"

    @cached_property
    def at_P(self) -> Tensor:
        """Positions of the labels in the rows, one row after the other: found once, as a GPU is waited for."""
        return (self.labels_BT != IGNORE).flatten().nonzero()[:, 0]


@dataclass
class GateResult:
    """gates: the trained module (hooks removed). history: objective per step. warnings: to be read before use."""

    gates: Gates
    history: list[float]
    warnings: list[str] = field(default_factory=list)


def train_gates(
    model: nn.Module,
    adapters: Sequence[str | Path | LoraAdapter],
    batches: Sequence[GateBatch],
    kind: str,
    *,
    steps: int | None = None,
    learning_rate: float | None = None,
    l1: float = 0.0,
    l2: float = 0.0,
    seed: int = 0,
    logits: Callable[[nn.Module, GateBatch], Tensor] | None = None,
) -> GateResult:
    """Train the gates of `kind` (KINDS) on `batches`, taken in turn; the model is left as it was.

    logits(model, batch) -> [B, T, V], or [P, V] at the labels alone, which is the default where the model's forward
    can leave the others out. l1, l2: penalties on the gates (atlas).
    Entropy can collapse onto one answer: training stops below half of the experts' own mean entropy, and says so.
    """
    opened = read_adapters(adapters)
    if not batches:
        raise MergeError("no batches", where="batches", do="give a few examples of each task")
    forward = logits or _logits_at_labels
    gates = Gates(model, opened, kind, seed=seed)  # checks the kind
    warnings = _warn_few_examples(batches)
    frozen = [(p, p.requires_grad) for p in model.parameters()]
    was_training = model.training
    try:
        model.eval()
        for parameter, _ in frozen:
            parameter.requires_grad_(False)
        floor = 0.5 * _expert_entropy(model, opened, batches, forward, gates) if gates.settings.entropy else None
        rule = torch.optim.SGD if kind == "self_positioning" else torch.optim.Adam
        optimizer = rule(gates.parameters(), lr=learning_rate or gates.settings.learning_rate)
        count = steps if steps is not None else gates.settings.steps
        left = (lambda step: 1 - step / max(count, 1)) if gates.settings.decay else (lambda _: 1.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, left)
        history: list[Tensor] = []  # read at the end: a GPU is waited for in a step only where it may be the last
        for step in range(count):
            batch = batches[step % len(batches)]
            gates.train()
            gates.next_step()
            optimizer.zero_grad()
            loss = objective(forward(model, batch), batch, gates.settings.entropy)
            for value in gates.values.values():
                loss = loss + l1 * value.abs().sum() + l2 * value.square().sum()
            if floor is not None and loss.item() < floor:
                warnings.append(f"entropy fell below half of the experts' own at step {step}: stopped")
                break
            loss.backward()
            optimizer.step()
            schedule.step()
            history.append(loss.detach())
            if gates.settings.clamp:
                with torch.no_grad():
                    for value in gates.values.values():
                        value.clamp_(0, 1)
    finally:
        gates.remove()
        gates.eval()
        model.train(was_training)
        for parameter, needed in frozen:
            parameter.requires_grad_(needed)
    return GateResult(gates, torch.stack(history).tolist() if history else [], warnings)


def _logits_at_labels(model: nn.Module, batch: GateBatch) -> Tensor:
    return supervised_logits(model, batch.inputs, batch.at_P)


def objective(logits: Tensor, batch: GateBatch, entropy: bool) -> Tensor:
    """Mean entropy, or mean loss, over the response positions; `negate` turns its sign. logits: of all, or of these."""
    picked_PV = logits if logits.dim() == 2 else logits.flatten(0, 1)[batch.at_P]
    if entropy:
        log_p = F.log_softmax(picked_PV.float() if picked_PV.dtype != torch.float64 else picked_PV, dim=-1)
        return -(log_p.exp() * log_p).sum(dim=-1).mean()
    loss = F.cross_entropy(picked_PV, batch.labels_BT.flatten()[batch.at_P])
    return -loss if batch.role == "negate" else loss


def _warn_few_examples(batches: Sequence[GateBatch]) -> list[str]:
    counts: Counter[str] = Counter()
    for batch in batches:
        counts[batch.task] += len(batch.labels_BT)
    if few := [repr(task) for task in sorted(counts) if counts[task] < FEW]:
        return [f"fewer than {FEW} examples for {', '.join(few)}: the gates may fit them by chance"]
    return []


def _expert_entropy(model, adapters, batches, forward, gates: Gates) -> float:
    """Mean entropy of each expert alone on the batches of its own task (of all batches, if none bears its name)."""
    gates.remove()
    entropies = []
    for adapter in adapters:
        alone = Gates(model, [adapter], "cat_gates")  # starts at 1/K = 1: the adapter as it is
        own_batches = [batch for batch in batches if batch.task == adapter.name] or list(batches)
        with torch.no_grad():
            entropies += [objective(forward(model, batch), batch, True).item() for batch in own_batches]
        alone.remove()
    gates.attach(model)
    return float(np.mean(entropies))


@dataclass(frozen=True)
class GatedSum(MergeMethod):
    """sum_k diag(g_k) D_k (scalars and vectors [m]) or sum_k s_k B_k diag(g_k) A_k (ranks), exactly."""

    gates: Mapping[str, np.ndarray]  # module -> [K] or [K, m] or [K, r]
    names: tuple[str, ...]
    kind: str
    space = "factors"
    label = "gated"

    def __post_init__(self, where: str) -> None:
        """Made by fold_gates, not from a recipe: nothing to check."""

    def describe(self) -> dict[str, object]:
        small = {name: value.tolist() for name, value in self.gates.items() if value.ndim == 1}
        return {"kind": self.kind, "adapters": list(self.names), "gates": small}

    def merge(self, parts: ModuleInputs, seen: object = None) -> MergedCore:
        changed = []
        for name, f in zip(parts.names, parts.factors):
            g = self.gates[parts.module][self.names.index(name)]
            if GATE_KINDS[self.kind].layout == "rank":
                changed.append(LoraFactors(g[: f.rank, None] * f.A_RN, f.B_MR, f.scale))
            else:
                changed.append(LoraFactors(f.A_RN, np.reshape(g, (-1, 1)) * f.B_MR, f.scale))
        core = to_core(changed, parts.weights_K, parts.dtype)
        return MergedCore(core.sum(), core.rows, core.cols)


def fold_gates(adapters: Sequence[str | Path | LoraAdapter], gates: Gates, out: str | Path, **options) -> MergeReport:
    """Write the gated sum as one adapter; options: of merge(), as rank or overwrite.

    MergeError if an adapter has a lora_bias: gated biases are not folded.
    """
    opened = read_adapters(adapters)
    if any(layout.has_bias for adapter in opened for layout in adapter.modules.values()):
        raise MergeError(
            "gates are not folded into lora_bias", where="adapters", do="train the experts without lora_bias"
        )
    gates.eval()
    with torch.no_grad():
        values = {name: gates.of(name).double().cpu().numpy() for name in gates.modules_by_name}
    return merge_adapters(opened, out, GatedSum(values, gates.names, gates.kind), **options)
