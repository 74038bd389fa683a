"""Log-probabilities of given text under the fused model, in chunks of positions with bounded memory.

alpha at a position is the one that generation would use there: it comes from the teacher-forced prefix.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from mtft.fuse.alpha.spec import FusionError, FusionOutput, FusionSpec
from mtft.fuse.decoding.mapped_state import MappedModels
from mtft.fuse.decoding.model_state import PaddedIds
from mtft.fuse.decoding.prompts import left_pad

if TYPE_CHECKING:
    from mtft.data.batching.batch import Batch
    from mtft.fuse.fusion_core import FusionCore


@dataclass(frozen=True)
class TextScore:
    """Per position of the input, 0 where it was not scored (the first token has no prefix, so it never is).

    logprob_BL  log P~(token | prefix)         greedy_BL   the token is the argmax
    alpha_BL    sum of the experts' alphas     clipped_BL  the step stopped at alpha_max
    kl_BL       KL(P~ || P), nats              strong_BL   log P(token | prefix): the strong model alone
    """

    logprob_BL: Tensor
    greedy_BL: Tensor
    alpha_BL: Tensor
    clipped_BL: Tensor
    kl_BL: Tensor
    strong_BL: Tensor


@dataclass
class AlphaStats:
    """What fusion did over many positions."""

    alpha: list[Tensor] = field(default_factory=list)
    clipped: int = 0
    flat: int = 0
    clamped: int = 0
    kl: float = 0.0
    tv: float = 0.0

    def add(self, fused: FusionOutput, logp_NV: Tensor) -> None:
        """Take in positions; logp_NV is log P."""
        self.alpha.append(fused.alpha_NT.sum(-1).cpu())
        self.clipped += int(fused.clipped_N.sum())
        self.flat += int(fused.flat_N.sum())
        self.clamped += int(fused.clamped_N.sum())
        self.kl += float(fused.kl_forward_N.sum())
        self.tv += float((fused.logprobs_NV.exp() - logp_NV.exp()).abs().sum()) / 2

    def summary(self) -> dict[str, float | int | dict[str, float]]:
        """positions, alpha quantiles and mean, shares clipped and flat, clamped ids, mean KL(P~||P) and TV(P~,P)."""
        alpha_N = torch.cat(self.alpha) if self.alpha else torch.zeros(0)
        count = len(alpha_N)
        if count == 0:
            return {"positions": 0}
        levels = (0.05, 0.25, 0.5, 0.75, 0.95)
        ordered_N = alpha_N.sort().values
        return {
            "positions": count,
            "alpha_mean": float(alpha_N.mean()),
            "alpha_quantiles": {f"{q:g}": float(ordered_N[round(q * (count - 1))]) for q in levels},
            "clipped_share": self.clipped / count,
            "flat_share": self.flat / count,
            "clamped_ids": self.clamped,
            "kl_mean": self.kl / count,
            "tv_mean": self.tv / count,
        }


@torch.no_grad()
def score(
    fused: FusionCore,
    ids_BL: Tensor,
    mask_BL: Tensor | None = None,
    score_mask_BL: Tensor | None = None,
    *,
    chunk: int | None = None,
    stats: AlphaStats | None = None,
    specs: Sequence[FusionSpec] | None = None,
    small_prompt: PaddedIds | None = None,
) -> TextScore:
    """Score the tokens at score_mask_BL (default: all that have a prefix). Padding may be on either side.

    chunk: positions read at once; default: as many as max_logit_bytes allows. The result does not depend on it.
    specs: one per row, in place of the model's. small_prompt: left-padded; what the small models read in place of each
    row's tokens before the first scored one; then ids_BL is left-padded too.
    """
    mask = torch.ones_like(ids_BL) if mask_BL is None else mask_BL
    scored_BL = mask.bool() if score_mask_BL is None else score_mask_BL.bool() & mask.bool()
    # the token at t is predicted from t - 1, which must be a token of the same row
    predict_BL = torch.zeros_like(scored_BL)
    predict_BL[:, :-1] = scored_BL[:, 1:] & mask.bool()[:, :-1]
    options: dict[str, Any] = {"chunk": chunk, "stats": stats, "specs": specs, "small_prompt": small_prompt}
    predicted = _score_targets(fused, ids_BL, mask_BL, ids_BL.roll(-1, 1), predict_BL, **options)
    return TextScore(*(value_BL.roll(1, 1) for value_BL in vars(predicted).values()))


@torch.no_grad()
def fused_scores(
    fused: FusionCore, batch: Batch, *, spec: FusionSpec | None = None, stats: AlphaStats | None = None
) -> tuple[Tensor, Tensor]:
    """(nll_BT fp32, hit_BT bool) of one *unpacked* batch, 0 where not supervised: what the evaluator asks of a model.

    hit: the label is the argmax. Raises FusionError for a packed batch.
    """
    if batch.packed:
        raise FusionError("the fused model reads one example per row", do="set packing: false for this evaluation")
    labels_BT = batch.labels_BT
    mask_BT, predict_BT = (batch.segment_ids_BT >= 0).long(), labels_BT >= 0
    specs = None if spec is None else [spec] * len(labels_BT)
    scores = _score_targets(fused, batch.input_ids_BT, mask_BT, labels_BT, predict_BT, stats=stats, specs=specs)
    return torch.where(predict_BT, -scores.logprob_BL, 0).float(), scores.greedy_BL


def _score_targets(
    fused: FusionCore, ids_BL: Tensor, mask_BL: Tensor | None, target_BL: Tensor, predict_BL: Tensor, **options: Any
) -> TextScore:
    """The scores of target_BL, each at the position that it is predicted from."""
    logprob_BL, alpha_BL, kl_BL, strong_BL = (
        torch.zeros(ids_BL.shape, dtype=torch.float64, device=ids_BL.device) for _ in range(4)
    )
    greedy_BL, clipped_BL = torch.zeros_like(predict_BL), torch.zeros_like(predict_BL)
    for row_N, column_N, step, strong_NV in fused_positions(fused, ids_BL, mask_BL, predict_BL, **options):
        at, target_N = (row_N, column_N), target_BL[row_N, column_N].to(step.logprobs_NV.device)
        logprob_BL[at] = step.logprobs_NV.gather(-1, target_N[:, None])[:, 0].to(logprob_BL)
        greedy_BL[at] = (step.logprobs_NV.argmax(-1) == target_N).to(greedy_BL.device)
        alpha_BL[at] = step.alpha_NT.sum(-1).to(alpha_BL)
        clipped_BL[at] = step.clipped_N.to(clipped_BL)
        kl_BL[at] = step.kl_forward_N.to(kl_BL)
        strong_BL[at] = token_logprobs(strong_NV, target_N).to(strong_BL)
    return TextScore(logprob_BL, greedy_BL, alpha_BL, clipped_BL, kl_BL, strong_BL)


def token_logprobs(logits_NV: Tensor, target_N: Tensor) -> Tensor:
    """log softmax of the logits at one id each, without a second [N, V] tensor."""
    logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    return logits_NV.gather(-1, target_N[:, None])[:, 0] - logits_NV.logsumexp(-1)


def fused_positions(
    fused: FusionCore,
    ids_BL: Tensor,
    mask_BL: Tensor | None,
    predict_BL: Tensor,
    *,
    chunk: int | None = None,
    stats: AlphaStats | None = None,
    specs: Sequence[FusionSpec] | None = None,
    small_prompt: PaddedIds | None = None,
) -> Iterator[tuple[Tensor, Tensor, FusionOutput, Tensor]]:
    """(row, column, Fused, strong logits) of all positions to predict from, chunk by chunk; no other one is fused."""
    columns = predict_BL.any(0).nonzero().squeeze(-1)
    if len(columns) == 0:
        return
    first, last, rows = int(columns[0]), int(columns[-1]), len(ids_BL)
    # the last token is judged, never read
    longest = last + 1 if mask_BL is None else int(mask_BL[:, : last + 1].sum(-1).max())
    if longest > fused.context:
        raise FusionError(f"{longest} tokens, the smaller context holds {fused.context}", do="shorten the text")
    # the prompt: up to the first position that is judged
    prompt_BL = torch.arange(predict_BL.shape[1], device=predict_BL.device) <= predict_BL.long().argmax(1, keepdim=True)
    prompt_BL = prompt_BL if mask_BL is None else prompt_BL & mask_BL.bool()
    specs = fused.route_prompts(specs or [fused.spec] * rows, *(small_prompt or (ids_BL, prompt_BL)))
    element_size = 8 if fused.dtype == torch.float64 else 4
    if chunk is None:
        chunk = max(1, fused.positions_at_once(element_size) // rows)
    models = fused.cached_models()
    small_text = None  # what the small models read, if it is other ids
    if small_prompt is not None and isinstance(models, MappedModels):
        models.begin(small_prompt, prompt_BL.sum(-1).tolist())
    elif small_prompt is not None:
        small_text = _with_small_prompt(ids_BL, mask_BL, prompt_BL, small_prompt)
    offset = 0 if small_text is None else small_text[0].shape[1] - ids_BL.shape[1]
    if first > 0:  # the context: its logits are never made
        models.read(*_columns((ids_BL, mask_BL), 0, first), 1, _columns(small_text, 0, first + offset))
    elif small_text is not None and offset:
        models.read_weak(*_columns(small_text, 0, offset))
    for start in range(first, last + 1, chunk):
        stop = min(start + chunk, last + 1)
        small_columns = _columns(small_text, start + offset, stop + offset)
        logits = models.read(*_columns((ids_BL, mask_BL), start, stop), 0, small_columns)
        row_N, column_N = predict_BL[:, start:stop].nonzero(as_tuple=True)
        if len(row_N):
            at = row_N.to(fused.device), column_N.to(fused.device)
            logits = logits.map(lambda x_BLV, at=at: x_BLV[at])
            step = fused.fuse(*logits, [specs[row] for row in row_N.tolist()])
            if stats is not None:
                stats.add(step, torch.log_softmax(logits.strong.float(), -1))
            yield row_N, column_N + start, step, logits.strong


@overload
def _columns(text: PaddedIds, start: int, stop: int) -> PaddedIds: ...
@overload
def _columns(text: PaddedIds | None, start: int, stop: int) -> PaddedIds | None: ...
def _columns(text: PaddedIds | None, start: int, stop: int) -> PaddedIds | None:
    if text is None:
        return None
    ids_BL, mask_BL = text
    return ids_BL[:, start:stop], None if mask_BL is None else mask_BL[:, start:stop]


def _with_small_prompt(ids_BL: Tensor, mask_BL: Tensor | None, prompt_BL: Tensor, small_prompt: PaddedIds) -> PaddedIds:
    """The small models' prompts and what follows the strong one's, left-padded to at least the strong one's width."""
    width, (own_BL, own_mask_BL) = ids_BL.shape[1], small_prompt
    real_BL = torch.ones_like(prompt_BL) if mask_BL is None else mask_BL.bool()
    if not bool(real_BL[:, -1].all()):
        raise FusionError("prompts of the small models' own need text that is padded on the left")
    own_real_BL = torch.ones_like(own_BL) if own_mask_BL is None else own_mask_BL
    rows = [
        own[own_real.bool()].tolist() + ids[real & ~prompt].tolist()
        for own, own_real, ids, real, prompt in zip(own_BL, own_real_BL, ids_BL, real_BL, prompt_BL, strict=True)
    ]
    small_BL, small_mask_BL = left_pad(rows, 0, ids_BL.device)
    more = max(0, width - small_BL.shape[1])
    return F.pad(small_BL, (more, 0)), F.pad(small_mask_BL, (more, 0))
