"""The decoding loop: alpha -> fused log-probabilities -> logits processors -> one token per row.

It stands behind `transformers`' generate, which prepares processors, stopping criteria and masks. Finished rows emit
padding and, when at most 3/4 of the rows are left, leave the caches; stopping criteria always see all rows, because
some keep state per row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.generation import logits_process as hf

from mtft.fuse.decoding import gumbel_sampling
from mtft.fuse.decoding.generate_request import GenerateRequest

if TYPE_CHECKING:
    from mtft.fuse.fusion_core import FusionCore

COMPACT = 0.75  # of the rows: at or below, finished rows leave the batch


@torch.no_grad()
def decode_step_by_step(fused: FusionCore, request: GenerateRequest) -> Tensor | GenerateDecoderOnlyOutput:
    """One token per pass of all models."""
    rows, device = len(request.ids_BL), request.ids_BL.device
    output = GeneratedColumns(request, fused.vocab_size)
    active, active_A = list(range(rows)), torch.arange(rows, device=device)  # rows in the caches
    models = fused.cached_models()
    logits = models.read(request.ids_BL, request.mask_BL, 1, request.small_prompt).last()
    position = 0
    while True:
        step = fused.fuse(*logits, [request.specs[row] for row in active])
        scores_AV = step.logprobs_NV.to(device)
        if request.processors:  # some write into the scores they are given
            scores_AV = apply_logits_processors(request, active, output.tokens_BL[active_A], scores_AV.clone())
        if request.sample:
            keys = [gumbel_sampling.key(*request.seeds[row], position=position) for row in active]
            next_A = gumbel_sampling.sample(scores_AV, keys)
        else:
            next_A = scores_AV.argmax(-1)
        finished_A = output.finished_B[active_A]
        next_B = torch.full((rows,), request.pad, dtype=torch.long, device=device)
        next_B[active_A] = torch.where(finished_A, request.pad, next_A)
        if request.observer is not None:
            live_A = (~finished_A).nonzero().squeeze(-1)
            live_logits = fused.to_strong_vocabulary(logits.select(live_A))
            request.observer.step(active_A[live_A].tolist(), step.select(live_A), next_A[live_A], *live_logits)
        output.append(next_B, (active_A, scores_AV, step.logprobs_NV))
        finished = output.finished_B.tolist()  # the one thing that the host waits for here
        if all(finished):
            return output.result()
        live = [at for at, row in enumerate(active) if not finished[row]]
        if request.compact and len(live) <= COMPACT * len(active):
            keep = torch.tensor(live, device=device)
            models.select(keep)
            active, active_A = [active[at] for at in live], active_A[keep]
        # a finished row that stays reads padding that is never attended to: its positions must not grow
        mask_A1 = (~output.finished_B[active_A]).long()[:, None] if any(finished[row] for row in active) else None
        logits = models.read(next_B[active_A][:, None], mask_A1).last()
        position += 1


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


class GeneratedColumns:
    """What generate returns, as it grows: tokens, and if it was asked for them scores (after processors) and logits."""

    def __init__(self, request: GenerateRequest, vocabulary: int) -> None:
        self.request, self.vocabulary = request, vocabulary
        self.tokens_BL = request.ids_BL
        self.finished_B = torch.zeros(len(request.ids_BL), dtype=torch.bool, device=request.ids_BL.device)
        return_dict = bool(request.config.return_dict_in_generate)
        self.scores: Any = () if return_dict and request.config.output_scores else None
        self.logits: Any = () if return_dict and request.config.output_logits else None

    @property
    def keeps_scores(self) -> bool:
        return self.scores is not None or self.logits is not None

    def append(self, next_B: Tensor, scored: tuple[Tensor, Tensor, Tensor] | None) -> None:
        """One column, shown to the streamer and the criteria. scored: some rows, their scores and log-probabilities."""
        if scored is not None:
            rows_A, scores_AV, logprobs_AV = scored
            if self.scores is not None:
                self.scores += (self._all_rows(rows_A, scores_AV),)
            if self.logits is not None:
                self.logits += (self._all_rows(rows_A, logprobs_AV),)
        self.tokens_BL = torch.cat([self.tokens_BL, next_B[:, None]], -1)
        if self.request.streamer is not None:
            self.request.streamer.put(next_B.cpu())
        self.finished_B = self.finished_B | self.request.criteria(self.tokens_BL, self.scores)

    def _all_rows(self, rows_A: Tensor, values_AV: Tensor) -> Tensor:
        """All rows, as a copy; those that have left hold a certain padding token."""
        if len(rows_A) == len(self.tokens_BL):
            return values_AV.clone()
        full_BV = values_AV.new_full((len(self.tokens_BL), self.vocabulary), -torch.inf)
        full_BV[:, self.request.pad] = 0
        full_BV[rows_A] = values_AV.to(full_BV)
        return full_BV

    def result(self) -> Tensor | GenerateDecoderOnlyOutput:
        if self.request.streamer is not None:
            self.request.streamer.end()
        if not self.request.config.return_dict_in_generate:
            return self.tokens_BL
        sequences: Any = self.tokens_BL
        return GenerateDecoderOnlyOutput(sequences=sequences, scores=self.scores, logits=self.logits)
