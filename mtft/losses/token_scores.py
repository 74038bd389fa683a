"""For evaluation: loss and hit of every supervised token, with the logits of some positions at a time.

The body runs once, over the whole batch. What a family does between body and logits (scales them, caps them) is done by
its own forward, once for each part, with the states that the body gave.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mtft.data.batching.batch import Batch
from mtft.losses.token_nll import HeadAlone, bare_model, body_and_head, forward_inputs, row_nll, supervised_logits

MAX_LOGIT_BYTES = 256 << 20
BUFFERS = 4  # [n, V] in fp32 that are there at once: as the head made them, as the family changed them, softmax


@torch.no_grad()
def token_scores(
    model: nn.Module,
    batch: Batch,
    *,
    attention: str | None = None,
    isolated: bool | None = None,
    inputs: dict[str, Any] | None = None,
    max_logit_bytes: int = MAX_LOGIT_BYTES,
) -> tuple[Tensor, Tensor]:
    """(nll_BT fp32, hit_BT bool: the most likely token is the label); 0 and False elsewhere.

    No gradient. One forward, whatever the batch holds, so that ranks stay together. Not in parts: models that aren't
    transformers', and families whose body is not a module of its own.
    """
    inputs = forward_inputs(model, batch, attention, isolated) if inputs is None else inputs
    at_N, labels_N = batch.supervised_N, batch.labels_BT.flatten()[batch.supervised_N]
    nll_BT = torch.zeros(batch.labels_BT.shape, dtype=torch.float32, device=labels_N.device)
    hit_BT = torch.zeros_like(nll_BT, dtype=torch.bool)

    def score(logits_NV: Tensor, part: slice) -> None:
        nll_BT.view(-1)[at_N[part]] = row_nll(logits_NV, labels_N[part])
        hit_BT.view(-1)[at_N[part]] = logits_NV.argmax(dim=-1) == labels_N[part]

    _visit_logits(model, inputs, at_N, max_logit_bytes, score)
    return nll_BT, hit_BT


def _visit_logits(
    model: nn.Module, inputs: Mapping[str, Any], at_N: Tensor, max_bytes: int, visit: Callable[[Tensor, slice], None]
) -> None:
    """`visit(logits_NV, part)` for each part of the positions at_N (in the rows, one row after the other)."""

    def parts(width: int) -> list[slice]:
        rows = max(1, max_bytes // (4 * BUFFERS * width))
        return [slice(first, min(first + rows, len(at_N))) for first in range(0, len(at_N), rows)]

    bare: Any = bare_model(model)
    body, head = body_and_head(bare)
    if head is None or body is None:
        logits_NV = supervised_logits(model, inputs, at_N)
        for part in parts(logits_NV.shape[-1]):
            visit(logits_NV[part], part)
        return
    said: list[Any] = []

    def in_parts(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """In the head's own call, where its weights are gathered (FSDP, ZeRO-3). What is left for it is no position."""
        states_ND = said[0]["last_hidden_state"].flatten(0, 1)[at_N]
        for part in parts(bare.config.get_text_config().vocab_size):
            given = type(said[0])(**said[0] | {"last_hidden_state": states_ND[None, part]})
            visit(HeadAlone(bare, body, module, given).logits(inputs)[0], part)
        hidden_BTD, *more = args
        return hidden_BTD.flatten(0, 1)[:0], *more

    hooks = [
        body.register_forward_hook(lambda module, args, output: said.append(output)),
        head.register_forward_pre_hook(in_parts),
    ]
    try:
        model(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
