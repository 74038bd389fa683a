"""The next token of every row of a running batch, and its score: the host waits for the device once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from mtft.fuse.alpha.spec import FusionOutput
from mtft.fuse.decoding import gumbel_sampling
from mtft.fuse.decoding.model_state import ModelLogits
from mtft.fuse.fusion_core import FusionCore
from mtft.fuse.server.jobs import GenerationJob, TokenScore


def served_logprobs(
    models: FusionCore, jobs: Sequence[GenerationJob], fused: FusionOutput, logits: ModelLogits
) -> Tensor:
    """Log-probabilities [N, V] of what each row asked for: the fusion, or a model alone."""
    if all(job.source == "fused" for job in jobs):
        return fused.logprobs_NV
    rows = []
    for row, job in enumerate(jobs):
        if job.source == "fused":
            rows.append(fused.logprobs_NV[row])
        else:
            alone = logits.strong if job.source == "strong" else logits.experts[int(job.source)]
            rows.append(models.full_logprobs(alone[row]).to(fused.logprobs_NV))
    return torch.stack(rows)


def choose_tokens(logp_NV: Tensor, jobs: Sequence[GenerationJob], positions: Sequence[int]) -> Tensor:
    """An id for each row [N], on the device: the best one, or the row's own draw. position: tokens made before."""
    best_N = logp_NV.argmax(-1)
    drawing = [row for row, job in enumerate(jobs) if not gumbel_sampling.is_greedy(job.temperature)]
    if not drawing:
        return best_N
    scores_DV = torch.cat([_warp(logp_NV[row : row + 1], jobs[row]) for row in drawing])
    keys = [gumbel_sampling.key(jobs[row].seed, jobs[row].sample, positions[row]) for row in drawing]
    drawn = dict(zip(drawing, gumbel_sampling.sample(scores_DV, keys), strict=True))
    return torch.stack([drawn.get(row, best) for row, best in enumerate(best_N)])


def _warp(scores_1V: Any, job: GenerationJob) -> Tensor:
    """As generate does: temperature, top-k, top-p."""
    ids: Any = None  # these three look at the scores only
    if job.temperature != 1:
        scores_1V = TemperatureLogitsWarper(float(job.temperature))(ids, scores_1V)
    if job.top_k:
        scores_1V = TopKLogitsWarper(job.top_k)(ids, scores_1V)
    if job.top_p < 1:
        scores_1V = TopPLogitsWarper(job.top_p)(ids, scores_1V)
    return scores_1V


def read_scores(
    logp_NV: Tensor, tokens_N: Tensor, jobs: Sequence[GenerationJob], fused: FusionOutput
) -> tuple[list[TokenScore], float, int]:
    """The rows' tokens with their scores, the sum of all alphas, and how many rows were clipped: in one copy."""
    count = min(max((job.top for job in jobs), default=0), logp_NV.shape[1])
    values_NK, ids_NK = logp_NV.topk(count)
    columns = [
        tokens_N[:, None],  # ids are whole numbers below 2^53: exact in float64
        logp_NV.gather(-1, tokens_N[:, None]),
        fused.alpha_NT.sum(-1, keepdim=True),
        fused.clipped_N[:, None],
        ids_NK,
        values_NK,
    ]
    scores, alpha, clipped = [], 0.0, 0
    for job, (token, logp, own, at_end, *best) in zip(
        jobs, torch.cat([column.double() for column in columns], -1).tolist(), strict=True
    ):
        pairs = zip(best[: job.top], best[count : count + job.top], strict=True)
        top = tuple((int(i), value) for i, value in pairs if value > -math.inf)
        scores.append(TokenScore(int(token), logp, top))
        alpha, clipped = alpha + own, clipped + int(at_end)
    return scores, alpha, clipped
