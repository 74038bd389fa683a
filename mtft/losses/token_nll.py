"""Per-token losses: negative log-likelihood of every supervised token, without logits for the others.

Paths, equal to rounding, each the other's oracle in tests/losses/test_token_nll.py:

gather  (reference) lets the model's own output head see the supervised positions only ([n, D] -> [n, V], by
        a hook on it), so that wrappers, sharded engines and logit scaling or capping stay as they are. [B, T, V] is
        never built, but for modules that aren't transformers'. Not by transformers' `logits_to_keep`: for a boolean
        mask there the host waits for the GPU, in the forward and in the backward.
chunked head and cross-entropy some rows at a time (mtft.losses.chunked_nll), so not even [n, V] is built: for a large
        vocabulary over a plain output head, whose weights the loss multiplies with itself.
fused   (for GPUs, needs trl) trl's fused head: projection and softmax in tiles, so not even [n, V] is built. The
        bare model must be prepared with `add_fused_head` before PEFT wraps it. Without Triton it is slower than gather.

Labels are aligned (the token to predict *from* a position), so nothing is shifted here.

Training takes the cross-entropy in the memory of the logits, one [n, V] buffer from the forward to the gradient, where
F.cross_entropy holds three (logits, log-probabilities, gradient):

    nll = log sum e + max - logit[label],   e = exp(logits - max)
    d nll / d logits = e / sum e - onehot(label)

About a quarter less time for head and loss together on a CPU, where fresh memory is dear (scripts/bench_losses.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, Literal, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from mtft.common.errors import UserError
from mtft.data.batching.batch import Batch
from mtft.data.batching.packed_attention import model_inputs, packing_refusal
from mtft.losses.chunked_nll import Head, chunked_nll

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Path = Literal["auto", "gather", "chunked", "fused"]
AUTO_VOCABULARY = 32_768  # from here on `auto` takes chunks, over a frozen head
# What made the logits, if nothing needs their values any more: these operations keep their inputs, not their result.
_RESULT_IS_FREE = frozenset(
    {
        "MmBackward0",
        "AddmmBackward0",
        "UnsafeViewBackward0",
        "MulBackward0",
        "DivBackward0",
        "ToCopyBackward0",
        "IndexBackward0",
    }
)


def resolve_path(path: str) -> Path:
    """The path as it was asked for. UserError for one that there is not, or not here."""
    if path not in ("auto", "gather", "chunked", "fused"):
        raise UserError(f"unknown loss path {path!r}", where="loss.path", do="use auto, gather, chunked or fused")
    if path == "fused" and not _has_fused_head():
        raise UserError(
            "the fused loss path needs trl 1.15 or newer",
            where="loss.path",
            do="pip install 'trl>=1.15', or set gather",
        )
    return path  # pyright: ignore[reportReturnType]


def _has_fused_head() -> bool:
    try:
        installed = version("trl")
    except PackageNotFoundError:
        return False
    major, minor, *_ = installed.split(".")
    return (int(major), int(minor)) >= (1, 15)


def add_fused_head(model: PreTrainedModel) -> None:
    """Give a bare transformers model trl's fused head; call it before PEFT wraps the model."""
    from trl.trainer.utils import add_fused_lm_head

    add_fused_lm_head(model)


def token_nll(
    model: nn.Module,
    batch: Batch,
    *,
    path: str = "auto",
    attention: str | None = None,
    isolated: bool | None = None,
    inputs: dict[str, Any] | None = None,
    chunk_rows: int | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    many_backwards: bool = False,
) -> Tensor:
    """fp32 [B, T]: loss (nats) of every supervised token, 0 elsewhere; connected to the graph even if there is none.

    path             `gather`, `chunked` or `fused` (see the module); `auto`: chunked for a large vocabulary over a
                     frozen plain head where gradients are wanted, else gather
    attention        the model's attention implementation; None reads it from the model's config
    isolated         `is_isolated(model, attention)`, for callers who ask it once and not at each forward
    inputs           keyword arguments of the model's forward; None =
    mtft.data.batching.packed_attention.model_inputs(batch, ...)
    chunk_rows       supervised tokens whose fp32 softmax exists at a time (recomputed in the backward); None = all.
                     Saves memory where the model computes in 16 bit
    label_smoothing  eps: (1 - eps) nll + eps * mean over the vocabulary of -log p
    z_loss           adds z * logsumexp(logits)^2, which keeps the normaliser near 1 (PaLM, arXiv 2204.02311: 1e-4)
    many_backwards   allow several backward passes through one forward (retain_graph), for a third buffer of logits
    """
    inputs = forward_inputs(model, batch, attention, isolated) if inputs is None else inputs
    if path == "fused":
        if label_smoothing or z_loss:
            raise UserError("the fused loss path has no label smoothing or z-loss", do="set loss.path=gather")
        return -model(**inputs, shift_labels=batch.labels_BT, fused_lm_head=True).log_probs.float()
    labels_N = batch.labels_BT.flatten()[batch.supervised_N]
    if takes_chunks(model, path):
        nll_N = _chunked(model, inputs, batch, labels_N, label_smoothing, z_loss, strict=path == "chunked")
        return _spread(nll_N, batch)
    logits_NV = supervised_logits(model, inputs, batch.supervised_N)
    rows = max(1, len(labels_N)) if chunk_rows is None else chunk_rows
    if rows >= len(labels_N) and torch.is_grad_enabled() and not (many_backwards or label_smoothing or z_loss):
        nll_N = row_nll_in_place(logits_NV, labels_N)
    elif rows >= len(labels_N):
        nll_N = row_nll(logits_NV, labels_N, label_smoothing, z_loss)
    else:
        parts = zip(logits_NV.split(rows), labels_N.split(rows), strict=True)
        options = (label_smoothing, z_loss)
        nll_N = torch.cat([checkpoint(row_nll, *part, *options, use_reentrant=False) for part in parts])
    return _spread(nll_N, batch)


def _spread(nll_N: Tensor, batch: Batch) -> Tensor:
    """[B, T] of the supervised positions' losses. No branch on "no label": zero rows still reach every parameter."""
    nll_BT = nll_N.new_zeros(batch.labels_BT.numel()).index_put((batch.supervised_N,), nll_N)
    return nll_BT.view_as(batch.labels_BT)


def takes_chunks(model: nn.Module, path: str) -> bool:
    """Whether the loss of a model goes through `chunked_nll`. UserError where that was asked for and can't be."""
    if path not in ("auto", "chunked"):
        return False
    bare: Any = bare_model(model)
    _, head = body_and_head(bare)
    if path == "auto":
        large = head is not None and bare.config.get_text_config().vocab_size >= AUTO_VOCABULARY
        return large and torch.is_grad_enabled() and is_plain_linear(head) and not head.weight.requires_grad
    if not is_plain_linear(head):
        raise _not_chunked("its output head is not a plain linear layer (an adapter, or quantised)")
    return True


def _not_chunked(why: str) -> UserError:
    do = "set loss.path: gather, or auto, which takes what the model has"
    return UserError(f"the model can't have the chunked loss: {why}", where="loss.path", do=do)


def _chunked(
    model: nn.Module,
    inputs: Mapping[str, Any],
    batch: Batch,
    labels_N: Tensor,
    label_smoothing: float,
    z_loss: float,
    *,
    strict: bool,
) -> Tensor:
    """fp32 [n]. In the head's own call, where its weights are gathered (FSDP, ZeRO-3), and out through the model's
    output, on which engines hang their hooks: the head answers with losses, divided by what the family multiplies by.
    """
    bare = bare_model(model)
    body, head = body_and_head(bare)
    said, whole = [], []

    def losses(hidden_BTD: Tensor) -> Tensor:
        hidden_ND = hidden_BTD.flatten(0, 1)[batch.supervised_N]
        factor = logit_factor(bare, body, head, said[0], inputs)  # pyright: ignore[reportArgumentType]
        if factor is None:
            if strict:
                raise _not_chunked("its family does more to logits than to multiply them (it caps them)")
            whole.append(True)
            return type(head).forward(head, hidden_ND)  # pyright: ignore
        of_head = Head(head.weight, head.bias, factor)  # pyright: ignore
        return (
            chunked_nll(hidden_ND, of_head, labels_N, label_smoothing=label_smoothing, z_loss=z_loss)[:, None] / factor
        )

    hook = body.register_forward_hook(lambda module, args, output: said.append(output))  # pyright: ignore
    head.forward = losses  # pyright: ignore
    try:
        out_NX = model(**inputs).logits
    finally:
        hook.remove()
        del head.forward  # pyright: ignore
    if whole:
        return row_nll(out_NX, labels_N, label_smoothing, z_loss)
    return out_NX[:, 0].float()


def row_nll(logits_NV: Tensor, labels_N: Tensor, label_smoothing: float = 0.0, z_loss: float = 0.0) -> Tensor:
    logits_NV = logits_NV.float()
    nll_N = F.cross_entropy(logits_NV, labels_N, reduction="none", label_smoothing=label_smoothing)
    return nll_N + z_loss * logits_NV.logsumexp(dim=-1).square() if z_loss else nll_N


def supervised_logits(model: nn.Module, inputs: Mapping[str, Any], at_N: Tensor) -> Tensor:
    """[n, V] in the model's precision. at_N: the positions in the rows, one row after the other."""
    _, head = body_and_head(bare_model(model))
    if head is None:
        return model(**inputs).logits.flatten(0, 1)[at_N]

    def pick(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden_BTD, *more = args
        return hidden_BTD.flatten(0, 1)[at_N], *more

    hook = head.register_forward_pre_hook(pick)
    try:
        logits = model(**inputs).logits
    finally:
        hook.remove()
    if logits.shape[:-1] != at_N.shape:
        raise ValueError(f"the model gave logits of shape {tuple(logits.shape)} for {len(at_N)} supervised positions")
    return logits


def is_isolated(model: nn.Module, attention: str | None = None) -> bool:
    """Whether attention is proven not to cross the examples of a row (mtft.data.batching.packed_attention)."""
    config: Any = bare_model(model).config
    return packing_refusal(config, attention or config._attn_implementation) is None


def forward_inputs(model: nn.Module, batch: Batch, attention: str | None, isolated: bool | None) -> dict[str, Any]:
    if attention is None:
        attention = bare_model(model).config._attn_implementation  # pyright: ignore
    packed_ok = is_isolated(model, attention) if isolated is None else isolated
    return model_inputs(batch, attention, packed_ok=packed_ok)  # pyright: ignore[reportArgumentType]


def row_nll_in_place(logits_NV: Tensor, labels_N: Tensor) -> Tensor:
    """fp32 [n]: -log softmax(logits)[label] of each row. Destroys `logits_NV` (a copy of it where autograd needs it).

    One backward only: a second one through the same graph is torch's error about an in-place operation.
    """
    logits_NV = logits_NV.float()
    if logits_NV.grad_fn is None or logits_NV.grad_fn.name() not in _RESULT_IS_FREE:
        logits_NV = logits_NV.clone()
    return _RowNLL.apply(logits_NV, labels_N)


class _RowNLL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, labels_N: Tensor) -> Tensor:
        highest_N1 = logits_NV.amax(dim=1, keepdim=True)
        label_logit_N1 = logits_NV.gather(1, labels_N[:, None])
        e_NV = logits_NV.sub_(highest_N1).exp_()
        sum_N1 = e_NV.sum(dim=1, keepdim=True)
        ctx.save_for_backward(e_NV, sum_N1, labels_N)
        return (sum_N1.log() + highest_N1 - label_logit_N1)[:, 0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        e_NV, sum_N1, labels_N = ctx.saved_tensors
        gradient_NV = e_NV.mul_(grad_N[:, None] / sum_N1)
        return gradient_NV.scatter_add_(1, labels_N[:, None], -grad_N[:, None]), None


# The output head, and what a family does to logits after it, without running the body again.


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
