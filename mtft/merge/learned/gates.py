"""Learn the weights of adapters on a model by gradients: K adapters on, only their gates train.

    y += sum_k g_kl s_k B_k (A_k x)     by forward hooks on a model that the caller gives; its weights stay as they are

kind               gates                               trained on                              paper
adamerging_task    K, in [0, 1], from 0.3              entropy of the output, unlabelled       Yang, 2310.02575
adamerging_layer   K x layers, likewise                likewise
atlas              K x modules, free, from 0           labels (role `negate`: unlearnt)        Zhang, 2407.02880
self_positioning   scale * softmax(a)                  labelled loss, balanced probe set       2410.15035
cat_gates          K x layers, free, from 1/K          labelled loss, few examples             Prabhakar, 2410.13025
scalearn           a vector [m] per adapter, module    labelled loss, dropout on the gates     Frohmann, 2310.01217
concrete           every rank of the sum, per module   entropy, unlabelled                     Tang, 2312.06173

concrete is a minimal form of Concrete Task Arithmetic: the paper masks every weight; here a relaxed Bernoulli masks
each rank component of .3 sum_k D_k (task arithmetic's coefficient: the whole sum of several adapters overshoots) and is
divided by its mean. train_gates.py folds the gates into the factors afterwards: a plain adapter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mtft.adapters.lora_factors import LoraAdapter
from mtft.common.device_copy import to_device
from mtft.common.errors import MergeError
from mtft.merge.engine.merge_plan import check_together
from mtft.merge.linalg.module_factors import module_factors
from mtft.merge.methods.lines import layer_of
from mtft.models.adapters import check_fits
from mtft.recipe.method_options import find_method


class GateKind(NamedTuple):
    """How gates are laid out, started and trained."""

    layout: str  # task, layer, module, vector, rank
    start: float | None  # None = 1/K
    entropy: bool
    learning_rate: float
    steps: int
    clamp: bool = False
    decay: bool = False  # of the learning rate, linearly to zero: without it the last few batches decide


GATE_KINDS = {
    "adamerging_task": GateKind("task", 0.3, True, 1e-3, 500, clamp=True),
    "adamerging_layer": GateKind("layer", 0.3, True, 1e-3, 500, clamp=True),
    "atlas": GateKind("module", 0.0, False, 1e-2, 300),
    "self_positioning": GateKind("task", 0.0, False, 1e-2, 300),
    "cat_gates": GateKind("layer", None, False, 1e-2, 100),
    "scalearn": GateKind("vector", None, False, 1e-3, 300, decay=True),
    "concrete": GateKind("rank", 0.0, True, 1e-3, 2000),
}
"""Learning rates and steps are the papers' where they state them (adamerging, concrete), else ours."""

CONCRETE_TEMPERATURE = 0.5
CONCRETE_COEFFICIENT = 0.3
SCALEARN_DROPOUT = 0.3


class Gates(nn.Module):
    """Adapters hooked onto `model` with trainable gates. `remove()` takes the hooks off again.

    Raises MergeError if the model lacks one of the adapters' modules, or one is an embedding.
    """

    def __init__(self, model: nn.Module, adapters: Sequence[LoraAdapter], kind: str, *, seed: int = 0) -> None:
        super().__init__()
        self.settings = find_method(GATE_KINDS, kind, "gates", "kind", error=MergeError)
        check_together(adapters)
        for adapter in adapters:
            check_fits(adapter, model)
        self.kind, self.names = kind, tuple(adapter.name for adapter in adapters)
        self.modules_by_name = sorted({name for adapter in adapters for name in adapter.modules})
        self._factors = {
            name: [(k, f) for k, f in enumerate(module_factors(model, name, adapters)[1]) if f is not None]
            for name in self.modules_by_name
        }
        self._groups = {name: self._group(name) for name in self.modules_by_name}
        self._generator = torch.Generator().manual_seed(seed)
        self._dropped: dict[str, Tensor] = {}
        K, start = len(adapters), self.settings.start
        start = 1 / K if start is None else start
        self.values = nn.ParameterDict()
        for name in self.modules_by_name:
            group = self._groups[name]
            if group not in self.values:
                self.values[group] = nn.Parameter(torch.full(self._shape(name, K), start, dtype=torch.float64))
        if kind == "scalearn":
            for value in self.values.values():
                value.data += 0.001 * torch.randn(value.shape, generator=self._generator, dtype=torch.float64)
        if kind == "self_positioning":
            self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))
        first = next(f for factors in self._factors.values() for _, f in factors)
        self.to(first.A_RN.device)  # drawn on the CPU, the same on every device
        self._handles: list = []
        self.attach(model)

    def attach(self, model: nn.Module) -> None:
        """Put the hooks on (the constructor does)."""
        self.remove()
        self._handles = [model.get_submodule(name).register_forward_hook(self._hook(name)) for name in self._factors]

    def remove(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _group(self, name: str) -> str:
        if self.settings.layout == "task":
            return "all"
        if self.settings.layout == "layer":
            layer = layer_of(name)
            return "outside" if layer is None else f"layer{layer}"
        return name.replace(".", "/")  # parameter names hold no dots

    def _shape(self, name: str, K: int) -> tuple[int, ...]:
        if self.settings.layout == "vector":
            return K, self._factors[name][0][1].B_MR.shape[0]
        if self.settings.layout == "rank":
            return K, max(len(f.A_RN) for _, f in self._factors[name])
        return (K,)

    def of(self, name: str) -> Tensor:
        """The gates of a module: [K], [K, m] (scalearn) or [K, r] (concrete); a fresh draw while training."""
        value = self.values[self._groups[name]]
        if self.kind == "self_positioning":
            return self.scale * torch.softmax(value, dim=0)
        if self.kind == "concrete":
            return self._concrete(name, value)
        if self.kind == "scalearn" and self.training:
            return value * self._drawn(name, value, lambda u: (u >= SCALEARN_DROPOUT) / (1 - SCALEARN_DROPOUT))
        return value

    def _concrete(self, name: str, logits: Tensor) -> Tensor:
        """.3 times a relaxed Bernoulli over its mean; without noise (evaluation, folding) its probability."""
        if self.training:
            noise = self._drawn(name, logits, lambda u: torch.log(u.clamp(1e-9)) - torch.log1p(-u.clamp(max=1 - 1e-9)))
            mask = torch.sigmoid((logits + noise) / CONCRETE_TEMPERATURE)
        else:
            mask = torch.sigmoid(logits)
        exists = torch.zeros_like(mask)  # adapters of lower rank have no component there
        for k, f in self._factors[name]:
            exists[k, : len(f.A_RN)] = 1
        return CONCRETE_COEFFICIENT * mask / ((mask * exists).sum() / exists.sum()).clamp(min=1e-6)

    def _drawn(self, name: str, like: Tensor, make) -> Tensor:
        """One draw per training step and module, so that every use in a step sees the same."""
        if name not in self._dropped:
            drawn = make(torch.rand(like.shape, generator=self._generator, dtype=torch.float64))
            self._dropped[name] = to_device(drawn, like.device)
        return self._dropped[name]

    def next_step(self) -> None:
        """Draw anew."""
        self._dropped.clear()

    def _hook(self, name: str):
        def add(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            gates = self.of(name).to(output)
            for k, (A_RN, B_MR, bias_M) in self._factors[name]:
                g = gates[k]
                inner = inputs[0].to(A_RN.dtype) @ A_RN.T
                if self.settings.layout == "rank":
                    output = output + (inner * g[: inner.shape[-1]].to(inner.dtype)) @ B_MR.T
                    g = torch.ones_like(g[0])
                else:
                    output = output + g * (inner @ B_MR.T)
                if bias_M is not None:
                    output = output + g * bias_M
            return output

        return add
