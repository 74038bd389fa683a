"""Gradients of all K tasks from one backward pass.

For a linear layer y = x W^T the gradient of W is a sum over tokens, and it splits by their tasks:

    grad W = sum_t delta_t x_t^T = sum_k J_k,    J_k = sum of delta_t x_t^T over the tokens of task k

delta_t (the gradient of y_t) depends on the loss of its own example alone as long as attention does not cross
examples, so J_k is exactly the gradient of task k's part of the loss. The J_k of a layer cost what its plain weight
gradient costs, which with LoRA is little; K backward passes, the usual way, cost K times the whole.

    taps = TaskGradients(model, K, isolated=True)
    with taps:
        for batch in batches:
            taps.begin(batch.task_ids_BT, batch.labels_BT != -100)
            taps.watch(loss).backward()
    J, G = taps.jacobian(coef_K), taps.gram(coef_K)

A tap is an identity on the layer's output that keeps x by save_for_backward and contracts in the backward. It holds
nothing that the layer doesn't hold anyway, draws no random numbers, and leaves values and gradients bit-equal. It sees
activations only, so accumulation, dropout, activation checkpointing, autocast, and engines that shard the weights
make no difference. Losses may be weighted by anything that is detached (coefficients, sample weights).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.hooks import RemovableHandle

from mtft.common.errors import UserError
from mtft.gradients.capture.accumulators import GradientAccumulators
from mtft.gradients.capture.coverage import GradientCoverage, gradient_coverage, in_words
from mtft.gradients.capture.self_check import SelfCheck
from mtft.gradients.capture.token_order import TokenOrder, order_by_task
from mtft.gradients.gramian import ranks_of


class TaskGradients:
    """Captures the K task gradients of the trained linear layers of `model` while it is entered.

    isolated   attention is proven not to cross the examples of a row
    (mtft.data.batching.packed_attention.packing_refusal is None).
               Otherwise a row that holds two tasks is refused
    dtype      of the K x P captured numbers: float32, or bfloat16 for half the memory
    partial    capture what can be captured; the rest stands in `left_out`. Otherwise a UserError lists it with reasons
    fused_head the loss multiplies with the head's weight itself (loss.path: fused, chunked): it can't be captured
    gram_only  only `gram` will be asked for: blocks are dropped as soon as they are contracted. In one process that is
               during the last micro-batch's backward (`begin(..., last=True)`), so K x P never stands there whole,
               as long as a step is one micro-batch; else after it
    """

    def __init__(
        self,
        model: nn.Module,
        num_tasks: int,
        *,
        isolated: bool,
        dtype: torch.dtype = torch.float32,
        partial: bool = False,
        fused_head: bool = False,
        gram_only: bool = False,
    ) -> None:
        coverage = gradient_coverage(model, fused_head=fused_head)
        if (coverage.left_out and not partial) or not coverage.linears:
            raise _refuse(coverage)
        self.num_tasks, self.isolated, self.gram_only = num_tasks, isolated, gram_only
        self.left_out = coverage.left_out
        self.covered: tuple[str, ...] = tuple(coverage.linears)
        self._linears = coverage.linears
        self._blocks = GradientAccumulators(coverage.linears, num_tasks, dtype)
        self._hooks: list[RemovableHandle] = []
        self._uses: dict[str, int] = {}  # contributions of a layer in one backward, as learned from whole ones
        self._checks: SelfCheck | None = None
        self._forget()

    def __enter__(self) -> TaskGradients:
        if self._hooks:
            raise ValueError("these taps are open already")
        self._forget()
        for name, modules in self._linears.items():
            for module in modules:
                self._hooks.append(module.register_forward_pre_hook(_cast))
                self._hooks.append(module.register_forward_hook(partial(self._tap, name)))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._learn_uses()
        self._orders = {}

    def begin(self, task_ids_BT: Tensor, supervised_BT: Tensor | None = None, *, last: bool = False) -> None:
        """Before the forward of a micro-batch: the task of every token, -1 = padding.

        supervised_BT: positions that the head sees, where it is asked for these alone (mtft.losses.token_nll) and is
        trained. Both are looked at here, so on the CPU (Batch.host) nobody waits for a GPU. last: no micro-batch of
        this step comes after this one (for gram_only).
        """
        self._learn_uses()
        if not self.isolated:
            _one_task_a_row(task_ids_BT)
        device = self._blocks.device
        orders = [order_by_task(task_ids_BT, self.num_tasks, device)]
        if supervised_BT is not None:
            orders.append(order_by_task(task_ids_BT[supervised_BT], self.num_tasks, device))
        self._orders = {order.rows: order for order in reversed(orders)}
        self._sides = list(task_ids_BT.shape)
        one_process = ranks_of() == 1
        self._drops = self.gram_only and last and one_process and self._checks is None and bool(self._uses)

    def watch(self, loss: Tensor) -> Tensor:
        """Returns `loss`, and will know what the engine multiplies it by on the way (gradient scaler, accumulation)."""

        def note(gradient: Tensor) -> None:
            self._factor = gradient.detach()

        if loss.requires_grad:
            loss.register_hook(note)
        return loss

    def self_check(self) -> SelfCheck:
        """Call before entering, once: compares what is captured with the layers' own weight gradients."""
        self._checks = SelfCheck(self._linears)
        return self._checks

    @property
    def factor(self) -> float:
        """What the engine multiplied the watched losses by; 1 without a watched backward."""
        return 1.0 if self._factor is None else float(self._factor)

    def jacobian(self, coef_K: Tensor, group: dist.ProcessGroup | None = None) -> dict[str, Tensor]:
        """{parameter: [K, *shape]}: gradient of each task's own loss L_k, over all micro-batches and ranks.

        coef_K: the coefficients of the backward's loss, sum_k coef_k L_k
        (mtft.losses.task_reduction.task_coefficients). As
        everywhere, the loss was multiplied by the number of ranks of `group`, whose gradients an engine averages; that
        and what the engine multiplied is divided out. A task of coefficient 0 gets zeros. A collective call; the same
        on all ranks. The blocks are handed over, so it can be called once a step.
        """
        if self.gram_only:
            raise ValueError("the gradients themselves are not kept with gram_only")
        self._blocks.sum(group)
        out, scale_K = {}, self._inverse(coef_K, group)
        for name in self.covered:
            out[name] = self._blocks.take(name)
            out[name] *= scale_K.to(out[name])[:, None, None]
        return out

    def gram(self, coef_K: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
        """float64 [K, K] on the CPU: inner products of the gradients that `jacobian` gives; NaN for absent tasks.

        A collective call; identical on all ranks. Comes before `jacobian`, or use `gram(J)`.
        """
        total_KK = self._blocks.drain(group) if self.gram_only else self._blocks.gram(group)
        if ranks_of(group) > 1:  # equal already, but for the last bit of a sum on unequal machines
            on_device_KK = total_KK.to(self._blocks.device)
            dist.broadcast(on_device_KK, group=group, group_src=0)
            total_KK = on_device_KK.cpu()
        scale_K = self._inverse(coef_K, group)
        absent_K = scale_K == 0
        out_KK = total_KK * scale_K[:, None] * scale_K[None, :]
        return out_KK.masked_fill(absent_K[:, None] | absent_K[None, :], torch.nan)

    # ---- while it runs

    def _tap(self, name: str, module: nn.Linear, args: tuple[Any, ...], out: Tensor) -> Tensor | None:
        if not (torch.is_grad_enabled() and out.requires_grad):
            return None
        if not self._orders:
            raise ValueError("TaskGradients.begin() comes before the forward of a micro-batch")
        x = args[0].detach()
        order = self._orders.get(x.numel() // x.shape[-1])
        sides = [side for side in x.shape[:-1] if side != 1]
        if order is None or (len(sides) > 1 and sides != self._sides):  # [T, B] would be tokens in another order
            raise UserError(
                f"{name}: its layer sees rows of shape {list(x.shape[:-1])}, the micro-batch has {self._sides} tokens: "
                "their tasks are not known",
                do="take the layer out of lora.targets",
            )
        if self._checks is not None:
            self._checks.attach(name, module)
        return _Tap.apply(out, x, partial(self._add, name, order))

    def _add(self, name: str, order: TokenOrder, delta: Tensor, x: Tensor) -> None:
        self._blocks.add(name, order, delta, x)
        self._calls[name] = self._calls.get(name, 0) + 1
        if self._drops and self._calls[name] == self._uses.get(name):
            self._blocks.drop(name)

    # ---- afterwards

    def check(self) -> bool:
        """Ends a self-check, before `gram` and `jacobian`: UserError if any gradient does not add up.

        True: it does. False: none was begun, or the step was not finite, which tells nothing.
        """
        checks, self._checks = self._checks, None
        return checks is not None and checks.compare({name: self._blocks.get(name) for name in self.covered})

    def _forget(self) -> None:
        self._blocks.clear()
        self._orders: dict[int, TokenOrder] = {}  # by the number of rows
        self._sides: list[int] = []  # [B, T]
        self._calls: dict[str, int] = {}
        self._factor: Tensor | None = None
        self._drops = False

    def _learn_uses(self) -> None:
        for name, calls in self._calls.items():
            self._uses[name] = max(calls, self._uses.get(name, 0))
        self._calls = {}

    def _inverse(self, coef_K: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        coef_K = coef_K.detach().double().cpu()
        if coef_K.shape != (self.num_tasks,):
            raise ValueError(f"coefficients have shape {tuple(coef_K.shape)}, but there are {self.num_tasks} tasks")
        return torch.where(coef_K > 0, 1 / (coef_K * self.factor * ranks_of(group)), 0.0)


class _Tap(torch.autograd.Function):
    """Identity on a layer's output; calls `add(gradient of the output, the layer's input)` in the backward."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, x: Tensor, add: Any) -> Tensor:
        # Not a closure over x: saved tensors are what checkpointing and offloading can take away.
        ctx.save_for_backward(x)
        ctx.add = add
        return out.view_as(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, delta: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        ctx.add(delta, x)
        return delta, None, None


def _cast(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Autocast's own cast, made where the tap sees it: layer and tap then share one tensor."""
    x, *rest = args
    kind = x.device.type
    if not torch.is_autocast_enabled(kind) or x.dtype == torch.float64:
        return None
    return x.to(torch.get_autocast_dtype(kind)), *rest


def _one_task_a_row(task_ids_BT: Tensor) -> None:
    real_BT = task_ids_BT >= 0
    high_B = torch.where(real_BT, task_ids_BT, -1).amax(dim=1)
    if bool((real_BT & (task_ids_BT != high_B[:, None])).any()):
        raise UserError(
            "a row holds several tasks, and it is not proven that this model's attention keeps examples apart: "
            "the gradients of single tasks would be wrong",
            do="set train.packing: false",
        )


def _refuse(coverage: GradientCoverage) -> UserError:
    lines = "".join(f"\n  {line}" for line in in_words(coverage.left_out))
    adapted = {name.partition(".lora_")[0].rpartition(".")[2] for name in coverage.linears if ".lora_" in name}
    targets = f": lora: {{targets: [{', '.join(sorted(adapted))}]}}" if adapted else ""
    return UserError(
        f"the gradients of single tasks can't be captured for all trained parameters{lines}",
        where="lora.targets" if any(".lora_" in name for name in coverage.left_out) else None,
        do=f"train LoRA on linear layers only{targets}"
        + (", or set loss.gradients.partial: true" if coverage.linears else ""),
    )
