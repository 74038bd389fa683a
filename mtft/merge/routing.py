"""Experts on a model at inference, each request or token with its own mixture (twin, Arrow).

    y += s_S B_S A_S x + sum_k p_k s_k B_k A_k x

With a `Router`, p is one vector per row of the batch, from the base model's last-token state of the prompt. With an
`Arrow`, p is one vector per token and module. For servers that route themselves, `twin(..., with_shared=True)` and the
router's file are enough; this wrapper is for transformers' `generate`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .errors import MergeError
from .factors import Adapter, read_adapters
from .router import Arrow, Router


class RoutedModel:
    """A transformers model with routed adapters, on until `remove()`. Its weights are not touched.

    experts: adapters in the router's order of names. shared: an adapter that is always on. top, temperature: of Arrow.
    """

    def __init__(
        self,
        model: Any,
        experts: Sequence[str | Path | Adapter],
        router: Router | Arrow,
        *,
        shared: str | Path | Adapter | None = None,
        top: int | None = None,
        temperature: float = 1.0,
    ) -> None:
        opened = read_adapters(experts)
        if len(opened) != len(router.names):
            raise MergeError(
                f"{len(opened)} experts for a router of {len(router.names)}", where="experts", do="give all, in order"
            )
        always = read_adapters([shared]) if shared is not None else []
        self.model, self.router, self.top, self.temperature = model, router, top, temperature
        self.probabilities_BK: Tensor | None = None  # of the current request
        self._on = True
        self._handles = []
        for name in sorted({name for adapter in (*opened, *always) for name in adapter.modules}):
            try:
                module = model.get_submodule(name)
            except AttributeError:
                self.remove()
                raise MergeError(
                    f"the model has no module {name!r}", where=name, do="give the adapters' base"
                ) from None
            pairs = [_factors(adapter, name, module) for adapter in opened]
            fixed = [pair for pair in (_factors(adapter, name, module) for adapter in always) if pair is not None]
            self._handles.append(module.register_forward_hook(self._hook(name, pairs, fixed)))

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
        if isinstance(self.router, Arrow):
            return None
        states = self.states(input_ids, attention_mask).double().cpu().numpy()
        self.probabilities_BK = torch.tensor(self.router.probabilities(states), device=input_ids.device)
        return self.probabilities_BK

    @torch.no_grad()
    def states(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Last-token states [B, d] of the base model alone: what a Router is fitted on."""
        self._on = False
        try:
            out = self.model(
                input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=True, use_cache=False
            )
        finally:
            self._on = True
        hidden_BTD = out.hidden_states[-1]
        if attention_mask is None:
            return hidden_BTD[:, -1]
        positions = torch.arange(attention_mask.shape[1], device=attention_mask.device)
        last = (attention_mask * positions).argmax(dim=1)
        return hidden_BTD[torch.arange(len(last)), last]

    def _hook(self, name: str, pairs: list, fixed: list):
        def add(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if not self._on:
                return output
            x = inputs[0]
            for pair in fixed:
                output = output + _apply(pair, x)
            p = self._weights(name, x)
            for k, pair in enumerate(pairs):
                if pair is not None:
                    output = output + p[..., k, None] * _apply(pair, x)
            return output

        return add

    def _weights(self, name: str, x: Tensor) -> Tensor:
        """p for the positions of x: [B, 1, K] or [B, T, K]."""
        if isinstance(self.router, Arrow):
            flat = x.reshape(-1, x.shape[-1]).double().cpu().numpy()
            p = self.router.probabilities(name, flat, self.top, self.temperature)
            return torch.tensor(p, dtype=x.dtype, device=x.device).reshape(*x.shape[:-1], -1)
        p = self.probabilities_BK
        if p is None or x.shape[0] % len(p):
            raise MergeError(
                f"the batch of {x.shape[0]} rows has not been routed", where=name, do="call route() with the prompts"
            )
        p = p.repeat_interleave(x.shape[0] // len(p), dim=0)  # beams of one prompt lie side by side
        return p.to(x.dtype).reshape(len(p), *([1] * (x.dim() - 2)), -1)


def _factors(adapter: Adapter, name: str, module: nn.Module) -> tuple[Tensor, Tensor, Tensor | None] | None:
    found = adapter.factors(name)
    if found is None:
        return None
    if found.kind != "linear":
        raise MergeError("only linear modules are routed", where=name, do="leave embeddings out of target_modules")
    to = {"dtype": module.weight.dtype, "device": module.weight.device}
    bias = None if found.bias_M is None else torch.tensor(found.scale * found.bias_M, **to)
    return torch.tensor(found.A_RN, **to), torch.tensor(found.scale * found.B_MR, **to), bias


def _apply(pair: tuple[Tensor, Tensor, Tensor | None], x: Tensor) -> Tensor:
    A, B, bias = pair
    y = (x @ A.T) @ B.T
    return y if bias is None else y + bias
