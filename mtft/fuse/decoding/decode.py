"""The decoding loop: alpha -> fused log-probabilities -> logits processors -> one token per row.

It stands behind `transformers`' generate, which prepares processors, stopping criteria and masks. Finished rows emit
padding and, when at most 3/4 of the rows are left, leave the caches; stopping criteria always see all rows, because
some keep state per row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.generation import logits_process as hf

from mtft.fuse.alpha.spec import FusionOutput
from mtft.fuse.decoding import gumbel_sampling
from mtft.fuse.decoding.generate_request import GenerateRequest

if TYPE_CHECKING:
    from mtft.fuse.fusion_core import FusionCore

COMPACT = 0.75  # of the rows: at or below, finished rows leave the batch


@torch.no_grad()
def decode_step_by_step(fused: FusionCore, request: GenerateRequest) -> Tensor | GenerateDecoderOnlyOutput:
    """One token per pass of all models."""
    tokens_BL, device = request.ids_BL, request.ids_BL.device
    rows = len(tokens_BL)
    finished_B = torch.zeros(rows, dtype=torch.bool, device=device)
    active_A = torch.arange(rows, device=device)  # rows in the caches
    models = fused.cached_models()
    logits = models.read(tokens_BL, request.mask_BL, 1, request.small_ids_BL, request.small_mask_BL)
    collector = ScoreCollector(request, fused.vocab_size)
    position = 0
    while True:
        strong_AV, experts, base_AM = logits[0][:, -1], [expert[:, -1] for expert in logits[1]], logits[2][:, -1]
        active = active_A.tolist()
        step = fused.fuse(strong_AV, experts, base_AM, [request.specs[row] for row in active])
        scores_AV = step.logprobs_NV.to(device)
        if request.processors:  # some write into the scores they are given
            scores_AV = apply_logits_processors(request, active, tokens_BL[active_A], scores_AV.clone())
        next_A = next_tokens(request, scores_AV, active, [position] * len(active))
        next_B = torch.full((rows,), request.pad, dtype=torch.long, device=device)
        next_B[active_A] = torch.where(finished_B[active_A], request.pad, next_A)
        if request.observer is not None:
            live = (~finished_B[active_A]).nonzero().squeeze(-1)
            live_output = select_rows(step, live) if len(live) < len(active) else step
            live_rows = live.to(strong_AV.device)
            request.observer.step(
                active_A[live].tolist(),
                live_output,
                next_A[live],
                strong_AV[live_rows],
                [fused.to_strong_vocabulary(expert[live_rows]) for expert in experts],
                fused.to_strong_vocabulary(base_AM[live_rows]),
            )
        collector.add(active_A, scores_AV, step.logprobs_NV)
        tokens_BL = torch.cat([tokens_BL, next_B[:, None]], -1)
        if request.streamer is not None:
            request.streamer.put(next_B.cpu())
        finished_B = finished_B | request.criteria(tokens_BL, collector.scores)
        position += 1
        if bool(finished_B.all()):
            break
        open_A = (~finished_B[active_A]).nonzero().squeeze(-1)
        if request.compact and len(open_A) <= COMPACT * len(active_A):
            models.select(open_A)
            active_A = active_A[open_A]
        # a finished row that stays reads padding that is never attended to: its positions must not grow
        idle_A = finished_B[active_A]
        mask_A1 = (~idle_A).long()[:, None] if bool(idle_A.any()) else None
        logits = models.read(next_B[active_A][:, None], mask_A1)
    if request.streamer is not None:
        request.streamer.end()
    return collector.output(tokens_BL)


def apply_logits_processors(request: GenerateRequest, rows: list[int], ids_NL: Tensor, scores_NV: Tensor) -> Tensor:
    """The logits processors on some of the rows. They may write into scores_NV."""
    if len(rows) == len(request.ids_BL) and rows == sorted(set(rows)):
        return request.processors(ids_NL, scores_NV)
    some: Any = LogitsProcessorList(_for_rows(processor, rows) for processor in request.processors)
    return some(ids_NL, scores_NV)


def _for_rows(processor: hf.LogitsProcessor, rows: list[int]) -> hf.LogitsProcessor:
    """The one stateless processor that knows all rows: it skips each row's padding."""
    if isinstance(processor, hf.RepetitionPenaltyLogitsProcessor) and isinstance(
        processor.prompt_ignore_length, Tensor
    ):
        return hf.RepetitionPenaltyLogitsProcessor(processor.penalty, processor.prompt_ignore_length[rows])
    return processor


def next_tokens(request: GenerateRequest, scores_NV: Tensor, rows: Sequence[int], positions: Sequence[int]) -> Tensor:
    """The next token of each row: argmax, or the Gumbel draw of its (seed, sample, position)."""
    if not request.config.do_sample:
        return scores_NV.argmax(-1)
    keys = [gumbel_sampling.key(*request.seeds[row], at) for row, at in zip(rows, positions, strict=True)]
    return gumbel_sampling.sample(scores_NV, gumbel_sampling.gumbel(keys, scores_NV.shape[-1], scores_NV.device))


def select_rows(fused: FusionOutput, rows: Tensor) -> FusionOutput:
    """Some rows of a Fused."""
    part = {name: value[rows.to(value.device)] for name, value in vars(fused).items() if name != "evaluations"}
    return FusionOutput(**part, evaluations=fused.evaluations)


class ScoreCollector:
    """scores (after processors) and logits (before) of all rows, if generate was asked to return them."""

    def __init__(self, request: GenerateRequest, width: int) -> None:
        config = request.config
        self.request, self.width = request, width
        return_dict = bool(config.return_dict_in_generate)
        self.scores: Any = () if return_dict and config.output_scores else None
        self.logits: Any = () if return_dict and config.output_logits else None

    def add(self, rows_A: Tensor, scores_AV: Tensor, logprobs_AV: Tensor) -> None:
        if self.scores is not None:
            self.scores += (self._full(rows_A, scores_AV),)
        if self.logits is not None:
            self.logits += (self._full(rows_A, logprobs_AV),)

    def _full(self, rows_A: Tensor, values_AV: Tensor) -> Tensor:
        """All rows, as a copy; those that have left hold a certain padding token."""
        if len(rows_A) == len(self.request.ids_BL):
            return values_AV.clone()
        full_BV = values_AV.new_full((len(self.request.ids_BL), self.width), -torch.inf)
        full_BV[:, self.request.pad] = 0
        full_BV[rows_A] = values_AV.to(full_BV)
        return full_BV

    def output(self, tokens_BL: Any) -> Tensor | GenerateDecoderOnlyOutput:
        if not self.request.config.return_dict_in_generate:
            return tokens_BL
        return GenerateDecoderOnlyOutput(sequences=tokens_BL, scores=self.scores, logits=self.logits)
