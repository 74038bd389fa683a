"""Experts on a model at inference, each request or token with its own mixture (twin, Arrow).

    y += s_S B_S A_S x + sum_k p_k s_k B_k A_k x

With a `CentroidRouter` or `MlpRouter`, p is one vector per row of the batch, from the base model's last-token state of
the prompt. With an `ArrowRouter`, p is one vector per token and module. For servers that route themselves the folders
that `mtft merge` writes are plain LoRAs; this wrapper is for transformers' `generate`:

    routed = load_routed(model, "runs/x/merge/adapter")
    tokens = routed.generate(**tokenizer(prompts, return_tensors="pt", padding=True), max_new_tokens=64)
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mtft.adapters.lora_factors import LoraAdapter, read_adapter, read_adapters
from mtft.adapters.mlp_router import MlpRouter, load_router
from mtft.adapters.routers import ArrowRouter, CentroidRouter
from mtft.common.errors import MergeError
from mtft.common.own_files import Types, read_own
from mtft.merge.linalg.module_factors import ModuleFactors, module_factors
from mtft.models.adapters import check_fits
from mtft.models.hidden_states import last_token_states

FACTS = ("twin.json", "arrow.json")
ROUTER = "router.safetensors"


class RoutedModel:
    """A transformers model with routed adapters, on until `remove()`. Its weights are not touched.

    experts: adapters in the router's order of names. shared: an adapter that is always on. top, temperature: of Arrow.
    """

    def __init__(
        self,
        model: Any,
        experts: Sequence[str | Path | LoraAdapter],
        router: CentroidRouter | MlpRouter | ArrowRouter,
        *,
        shared: str | Path | LoraAdapter | None = None,
        top: int | None = None,
        temperature: float = 1.0,
    ) -> None:
        opened = read_adapters(experts)
        if len(opened) != len(router.names):
            raise MergeError(
                f"{len(opened)} experts for a router of {len(router.names)}", where="experts", do="give all, in order"
            )
        always = read_adapters([shared]) if shared is not None else []
        for adapter in (*opened, *always):
            check_fits(adapter, model)
        self.model, self.router, self.top, self.temperature = model, router, top, temperature
        self.probabilities_BK: Tensor | None = None  # of the current request
        self._on = True
        self._prototypes: dict[str, Tensor] = {}  # Arrow's, where their modules are
        names = sorted({name for adapter in (*opened, *always) for name in adapter.modules})
        loaded = {name: module_factors(model, name, (*opened, *always)) for name in names}
        self._handles = [
            module.register_forward_hook(self._hook(name, factors[: len(opened)], factors[len(opened) :]))
            for name, (module, factors) in loaded.items()
        ]

    def remove(self) -> None:
        """Take the experts off the model."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @torch.no_grad()
    def generate(self, **inputs) -> Tensor:
        """model.generate with the experts routed for these prompts: input_ids, attention_mask, generate's options."""
        prompt = {key: inputs[key] for key in ("input_ids", "attention_mask") if key in inputs}
        self.route(**prompt)
        return self.model.generate(**inputs)

    @torch.no_grad()
    def route(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor | None:
        """Set and return p [B, K] for these prompts; None with Arrow, which decides token by token."""
        if isinstance(self.router, ArrowRouter):
            return None
        states = self.states(input_ids, attention_mask).double().cpu().numpy()
        self.probabilities_BK = torch.tensor(self.router.probabilities(states), device=input_ids.device)
        return self.probabilities_BK

    @torch.no_grad()
    def states(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Last-token states [B, d] of the base model alone: what a router is fitted on."""
        self._on = False
        try:
            return last_token_states(self.model, input_ids, attention_mask)
        finally:
            self._on = True

    def _hook(self, name: str, routed: list[ModuleFactors | None], fixed: list[ModuleFactors | None]):
        def add(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if not self._on:
                return output
            x = inputs[0]
            for factors in fixed:
                if factors is not None:
                    output = output + _apply(factors, x)
            p = self._weights(name, x)
            for k, factors in enumerate(routed):
                if factors is not None:
                    output = output + p[..., k, None] * _apply(factors, x)
            return output

        return add

    def _weights(self, name: str, x: Tensor) -> Tensor:
        """p for the positions of x: [B, 1, K] or [B, T, K]."""
        if isinstance(self.router, ArrowRouter):
            return self._arrow(name, x)
        p = self.probabilities_BK
        if p is None or x.shape[0] % len(p):
            raise MergeError(
                f"the batch of {x.shape[0]} rows has not been routed", where=name, do="call route() with the prompts"
            )
        p = p.repeat_interleave(x.shape[0] // len(p), dim=0)  # beams of one prompt lie side by side
        return p.to(x.dtype).reshape(len(p), *([1] * (x.dim() - 2)), -1)

    def _arrow(self, name: str, x: Tensor) -> Tensor:
        """ArrowRouter.probabilities on the device of x: by numpy each module would wait for a GPU at each token."""
        assert isinstance(self.router, ArrowRouter)
        if name not in self._prototypes:
            self._prototypes[name] = torch.from_numpy(self.router.prototypes[name].T.copy()).to(x.device)
        scores = (x.double() @ self._prototypes[name].double()).abs()
        if self.top is not None and self.top < len(self.router.names):
            least = scores.topk(self.top, dim=-1).values[..., -1:]
            scores = scores.masked_fill(scores < least, -torch.inf)
        return torch.softmax(scores / self.temperature, dim=-1).to(x.dtype)


def load_routed(model: Any, folder: str | Path) -> RoutedModel:
    """Put the experts of a folder that `twin` or `export_arrow` wrote onto `model`, with their router.

    MergeError if there is no router: then the folder is for a server that routes by itself.
    """
    folder = Path(folder)
    facts_file = next((folder / name for name in FACTS if os.path.lexists(folder / name)), None)
    if facts_file is None:
        do = "give the folder that `mtft merge` wrote with merge.experts"
        raise MergeError("neither twin.json nor arrow.json is there", where=str(folder), do=do)
    needs: dict[str, Types] = {"experts": dict}
    needs |= {"with_shared": bool} if facts_file.name == "twin.json" else {"temperature": float}
    facts = read_own(facts_file, needs, do="merge again: mtft merge RECIPE --overwrite")
    if not (folder / ROUTER).is_file():
        raise MergeError(f"no {ROUTER}", where=str(folder), do="merge with a recipe that names held-out rows")
    router = load_router(folder / ROUTER)
    missing = [name for name in router.names if not isinstance(facts["experts"].get(name), str)]
    if missing:
        do = "merge again: mtft merge RECIPE --overwrite"
        raise MergeError(f"damaged: no folder of the router's expert {missing[0]}", where=str(facts_file), do=do)
    experts = [read_adapter(folder / facts["experts"][name], name) for name in router.names]
    shared = None if facts_file.name == "arrow.json" or facts["with_shared"] else folder / "shared"
    return RoutedModel(
        model, experts, router, shared=shared, top=facts.get("top"), temperature=facts.get("temperature", 1.0)
    )


def _apply(factors: ModuleFactors, x: Tensor) -> Tensor:
    A, B, bias = factors
    y = (x.to(A.dtype) @ A.T) @ B.T
    return y if bias is None else y + bias
