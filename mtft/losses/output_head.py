"""The output head of a causal model, and what its family does to logits after it, without running the body again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn


def bare_model(model: nn.Module) -> nn.Module:
    """The transformers model inside DDP, FSDP, DeepSpeed and PEFT."""
    from transformers import PreTrainedModel

    return next((module for module in model.modules() if isinstance(module, PreTrainedModel)), model)


def body_and_head(bare: nn.Module) -> tuple[nn.Module | None, nn.Module | None]:
    """What makes the states, and what makes logits of them; None for what is no module of its own."""
    from transformers import PreTrainedModel

    if not isinstance(bare, PreTrainedModel):
        return None, None
    body = bare.base_model
    if body is bare:  # as Llama4ForCausalLM has it
        body = next((child for child in bare.children() if isinstance(child, PreTrainedModel)), None)
    return body, bare.get_output_embeddings()


class HeadAlone:
    """What a model's forward takes for the model: a body that has said its states already, a head without its hooks.

    The hooks gather the head's weights, all ranks together, but ranks may differ in how often they ask.
    """

    def __init__(
        self,
        model: nn.Module,
        body: nn.Module,
        head: nn.Module,
        said: Any,
        answer: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """said: the body's output. answer: in place of the head's forward."""
        self._model, self._body, self._head, self._said = model, body, head, said
        self._answer = head.forward if answer is None else answer

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._model, name)
        if value is self._body:
            return lambda *_, **__: self._said
        return self._answer if value is self._head else value

    def logits(self, inputs: Mapping[str, Any]) -> Tensor:
        return type(self._model).forward(self, **inputs).logits  # pyright: ignore


def is_plain_linear(head: nn.Module | None) -> TypeGuard[nn.Linear]:
    """A linear layer with weights of its own: no adapter, no quantisation, no forward that somebody put there."""
    return (
        isinstance(head, nn.Linear)
        and type(head).forward is nn.Linear.forward
        and "forward" not in vars(head)
        and head.weight.is_floating_point()
    )


def logit_factor(
    bare: nn.Module, body: nn.Module, head: nn.Module, said: Any, inputs: Mapping[str, Any]
) -> float | None:
    """What the family multiplies the head's logits by; None: it does something else to them (caps them)."""
    probe = torch.tensor([[[0.0, 1.0, 2.0]]])
    out = HeadAlone(bare, body, head, said, lambda _: probe.clone()).logits(inputs).flatten().tolist()
    return out[1] if len(out) == 3 and out[0] == 0 and out[1] > 0 and out[2] == 2 * out[1] else None
