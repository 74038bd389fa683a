"""Bytes that are alive at once in a training step, found by playing the step on tensors without data.

Every operation of forward, loss and backward really runs, on fake tensors (shapes, types and lifetimes, no memory): a
dispatch mode sees each new storage come, and a weak reference sees it go. What is counted is what an allocator would
have to hold at the highest point: saved activations, masks, logits, gradients as they come, and temporaries.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mtft.losses.chunked_nll import Head, chunked_nll
from mtft.losses.token_nll import row_nll_in_place


@dataclass(frozen=True)
class ActivationPeak:
    """Bytes beyond weights and optimizer: `kept` after the body's forward, `logits` of the loss, `peak` of all."""

    kept: int
    logits: int
    peak: int


class LiveBytes(TorchDispatchMode):
    """Counts the storages that are made inside the block: bytes alive `now`, and at the `peak`.

    known  tensors that were there before: operations that give a view of them make nothing
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known = {tensor.untyped_storage()._cdata: tensor for tensor in known}  # kept, so that no key comes twice
        self._alive: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, torch.Tensor):
                self._see(value)
        return out

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive or key in self._known:
            return

        def gone(_: Any) -> None:
            self._alive.pop(key)
            self.now -= size

        self._alive[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


class EnginePlay(Protocol):
    """Hooks on a model that allocate and free what an engine would; the gradients of the step are its own."""

    def begin(self) -> None:
        """Before the forward pass."""

    def finish(self) -> None:
        """After the backward pass."""


def activation_peak(
    model: nn.Module,
    *,
    rows: int,
    width: int,
    supervised: int,
    packed: bool,
    autocast: torch.dtype | None = None,
    checkpointing: bool = False,
    accumulates: bool = False,
    plain_loss: bool = False,
    forward_only: bool = False,
    engine: Callable[[Any], EnginePlay] | None = None,
    chunk: int | None = None,
) -> ActivationPeak | None:
    """Plays forward and backward of a micro-batch of [rows, width] tokens, of which `supervised` have a label.

    model        on the meta device (it is changed); with its adapter, whose parameters are those that need gradients
    packed       the attention mask of packed rows is built: [rows, 1, width, width]
    autocast     precision of the forward where it is not that of the weights
    accumulates  gradients of an earlier micro-batch are there already (they count)
    plain_loss   label smoothing or z-loss, whose softmax is not computed in place
    forward_only  no backward pass (MeZO)
    engine       of the model: what else is held, gathered weights and the like, which is in the peak then
    chunk        rows whose logits are there at a time (mtft.losses.chunked_nll); None: all
    None for models whose code looks at values on the way (some rotary positions, some routers): there are none.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        _take_off_meta(model)
        body: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        model.train()
        if checkpointing:
            body.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        ids_BT = torch.zeros(rows, width, dtype=torch.long)
        labels_N = place_N = torch.zeros(supervised, dtype=torch.long)
        inputs: dict[str, Any] = {"input_ids": ids_BT, "use_cache": False}
        try:
            played = None if engine is None else engine(body)
            with torch.set_grad_enabled(not forward_only), LiveBytes([*model.parameters(), *model.buffers()]) as live:
                if played is not None:
                    played.begin()
                for parameter in model.parameters() if accumulates and played is None else ():
                    if parameter.requires_grad:
                        parameter.grad = torch.zeros_like(parameter)
                if packed:  # ready-made: transformers would look at the positions' values to make it
                    inputs["attention_mask"] = torch.ones(rows, 1, width, width, dtype=torch.bool)
                with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
                    hidden_BTD = body.base_model(**inputs).last_hidden_state
                    activations = live.now
                    head = body.get_output_embeddings()
                    hidden_ND = hidden_BTD.flatten(0, 1)[place_N]
                    if chunk is not None:
                        nll_N = chunked_nll(hidden_ND, Head(head.weight, head.bias), labels_N, rows=chunk)
                        logits_NV = None
                    else:
                        logits_NV = head(hidden_ND).float()
                del hidden_BTD, hidden_ND, inputs
                if logits_NV is not None:
                    if plain_loss or forward_only:
                        nll_N = F.cross_entropy(logits_NV, labels_N, reduction="none")
                    else:
                        nll_N = row_nll_in_place(logits_NV, labels_N)
                del logits_NV
                logits = live.now - activations
                if not forward_only:
                    nll_N.sum().backward()
                    if played is not None:
                        played.finish()
        except (RuntimeError, NotImplementedError, TypeError, AttributeError):  # data-dependent code, or without shapes
            return None
        return ActivationPeak(activations, max(0, logits), live.peak)


def _take_off_meta(model: nn.Module) -> None:
    """Meta parameters and buffers become fake CPU ones, so that the kernels are those of a real device. In place."""
    made: dict[int, Any] = {}  # tied parameters stay tied
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and id(tensor) not in made:
                    empty = torch.empty(tensor.shape, dtype=tensor.dtype)
                    made[id(tensor)] = (
                        nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
                    )
                tensors[name] = None if tensor is None else made[id(tensor)]
