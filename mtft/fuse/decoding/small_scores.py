"""What the small models themselves think of a text: log-probabilities in their own tokens, beside the fused ones.

With a token map the same text has other tokens there, and maybe another number of them, so only sums over a text can be
compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mtft.fuse.decoding.prompts import Prompt, left_pad
from mtft.fuse.decoding.score_text import token_logprobs
from mtft.fuse.tokenizers.token_map import common_prefix

if TYPE_CHECKING:
    from mtft.fuse.fusion_core import FusionCore


@dataclass(frozen=True)
class SmallScores:
    """Log-probability of each row's answer, -inf where it holds an id that the small models lack. tokens: theirs."""

    experts_TB: Tensor
    base_B: Tensor
    tokens: list[int]


@torch.no_grad()
def score_small_models(
    fused: FusionCore, prompts: Sequence[Prompt], answers: Sequence[Sequence[int]], *, chunk: int | None = None
) -> SmallScores:
    """Scores of the experts and the base alone. answers: in strong ids. chunk: columns that are read at once."""
    pairs = [_small_ids(fused, prompt, list(answer)) for prompt, answer in zip(prompts, answers, strict=True)]
    ids_BL, mask_BL = left_pad([before + answer for before, answer in pairs], 0, fused.device)
    width, rows = ids_BL.shape[1], len(pairs)
    scored_BL = torch.zeros_like(mask_BL, dtype=torch.bool)
    for row, (_, answer) in enumerate(pairs):
        scored_BL[row, width - len(answer) :] = True
    first = int(scored_BL.any(0).nonzero()[0])
    if chunk is None:
        chunk = max(1, fused.positions_at_once() // rows)
    models = fused.cached_models()
    if first > 1:  # the context; the last token of all is judged, never read
        models.read_weak(ids_BL[:, : first - 1], mask_BL[:, : first - 1])
    sums_TB = torch.zeros(fused.experts + 1, rows, dtype=torch.float64, device=fused.device)
    for start in range(first - 1, width - 1, chunk):
        stop = min(start + chunk, width - 1)
        experts, base_BLM = models.read_weak(ids_BL[:, start:stop], mask_BL[:, start:stop], 0)
        row_N, column_N = scored_BL[:, start + 1 : stop + 1].nonzero(as_tuple=True)
        target_N = ids_BL[row_N, start + 1 + column_N]
        for t, logits_BLM in enumerate((*experts, base_BLM)):
            sums_TB[t].index_add_(0, row_N, _known(logits_BLM[row_N, column_N], target_N).to(sums_TB))
    return SmallScores(sums_TB[:-1], sums_TB[-1], [len(answer) for _, answer in pairs])


@torch.no_grad()
def small_positions(fused: FusionCore, ids_1L: Tensor, expert: int) -> Iterator[Tensor]:
    """The logits [M] of one expert after each token of one text.

    As many positions as max_logit_bytes allows are read at once, so a long text may differ from one pass by rounding.
    """
    models, chunk = fused.cached_models(), fused.positions_at_once()
    for ids_1C in ids_1L.split(chunk, 1) if ids_1L.numel() else ():
        yield from models.read_weak(ids_1C, keep=0)[0][expert][0]


def _known(logits_NM: Tensor, target_N: Tensor) -> Tensor:
    lacking_N = target_N >= logits_NM.shape[-1]
    return token_logprobs(logits_NM, target_N.masked_fill(lacking_N, 0)).masked_fill(lacking_N, -torch.inf)


def _small_ids(fused: FusionCore, prompt: Prompt, answer: list[int]) -> tuple[list[int], list[int]]:
    """(prompt, answer) as the small models read them."""
    token_map = fused.token_map
    if token_map is None:
        return prompt.small_ids or prompt.ids, answer
    if prompt.small_ids is None:
        before, ids = (token_map.encode(text)[0] for text in (prompt.ids, prompt.ids + answer))
    else:
        head, tail = token_map.split_tail(prompt.small_ids)
        before, ids = prompt.small_ids, head + token_map.encode(answer, opening=False, before=tail)[0]
    same = max(1, min(common_prefix(before, ids), len(ids) - 1))  # the last token of a prompt may have grown
    return ids[:same], ids[same:]
