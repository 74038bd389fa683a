"""What DeepSpeed's ZeRO holds beside activations, played along with a step on tensors without data (activation_peak).

ZeRO-3, as DeepSpeed 0.19.8 does it from the second pass on, when it knows the order of the modules:

    gather     ahead, up to stage3_max_live_parameters, in groups of stage3_prefetch_bucket_size. The weights of a group
               are copied out of its buffer, which stays until the last of them is asked for.
    release    not in the forward pass, where the same weights come again within stage3_max_reuse_distance.
    linears    save their weight as it is held, and their input also where nothing of them is trained: autocast's copies
               of weights are gone after each.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mtft.distributed.launch import LaunchConfig


class BucketPlay:
    """DeepSpeed moves every gradient into its bucket as it comes."""

    def __init__(self, model: nn.Module) -> None:
        self._trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def begin(self) -> None:
        for parameter in self._trained:
            parameter.register_post_accumulate_grad_hook(_drop)

    def finish(self) -> None:
        pass


class GatherPlay(BucketPlay):
    """The same under ZeRO-3: gathered weights too. What is trained is held in fp32."""

    def __init__(self, model: Any, *, launch: LaunchConfig) -> None:
        super().__init__(model)
        owners = [part for part in model.modules() if any(True for _ in part.parameters(recurse=False))]
        inside = set(model.base_model.modules())
        numbers = sum(parameter.numel() for parameter in model.parameters())
        largest = max(sum(parameter.numel() for parameter in part.parameters(recurse=False)) for part in owners)
        width = sum(p.numel() * (4 if p.requires_grad else p.itemsize) for p in model.parameters()) / numbers
        held = min(numbers, max(largest, live_parameters(launch)))
        self._sizes = [round(width * held), round(width * min(numbers, launch.prefetch_bucket))]
        self._held: list[Tensor] = []
        if held == numbers:  # else there is always a group that comes
            last = [part for part in owners if part in inside][-1]
            last.register_forward_pre_hook(lambda *_: self._held.__delitem__(slice(1, None)))
        for part in model.modules():
            if isinstance(part, nn.Linear):
                part.forward = _forward_of(part)

    def begin(self) -> None:
        super().begin()
        self._held = [torch.empty(size, dtype=torch.uint8) for size in self._sizes]

    def finish(self) -> None:
        self._held.clear()


def live_parameters(launch: LaunchConfig) -> int:
    """Numbers that are gathered at once at the end of a forward pass, of a model that has more of them."""
    # The way to a weight's next use is there and back.
    return max(launch.live_parameters if launch.prefetch_bucket else 0, launch.reuse_distance // 2)


class _Linear(torch.autograd.Function):
    """deepspeed.runtime.zero.linear.LinearFunctionForZeroStage3."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
        out = x.matmul(weight.t())
        return out if bias is None else out.add_(bias)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,), (x, weight) = grads, ctx.saved_tensors
        with torch.autocast("cpu", dtype=ctx.dtype or torch.bfloat16, enabled=ctx.dtype is not None):
            to_x, to_weight, to_bias = ctx.needs_input_grad
            return (
                grad.matmul(weight) if to_x else None,
                grad.flatten(0, -2).t().matmul(x.flatten(0, -2)) if to_weight else None,
                grad.flatten(0, -2).sum(0) if to_bias else None,
            )


def _forward_of(linear: nn.Linear) -> Any:
    return lambda x: _Linear.apply(x, linear.weight, linear.bias)


def _drop(parameter: torch.Tensor) -> None:
    parameter.grad = None
