"""Which drafted tokens stand: exact acceptance rules of speculative decoding.

With p the target's distribution and q the draft's:

| coupling | draft x_i | accepted iff | else emit |
|---|---|---|---|
| greedy | argmax q_i | x_i = argmax p_i | argmax p_i |
| gumbel | argmax(log q_i + G_i) | x_i = argmax(log p_i + G_i) | that argmax |
| max | argmax(log q_i + G_i) | u q_i(x_i) < p_i(x_i) | a draw from max(p_i - q_i, 0) / sum |

`max` is Leviathan et al., 2211.17192 (acceptance 1 - TV, the best possible). `gumbel` is drafter-invariant (Daliri et
al., 2408.07978): its output is the one of direct sampling with the same noise, whatever was drafted. p and q are taken
after the logits processors; the noise G belongs to the position, not to the round.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mtft.fuse.decoding import gumbel_sampling

NoiseKey = tuple[int, int, int]  # (seed, sample, position) of a token


def sample_tokens(coupling: str, scores_NV: Tensor, noise_keys: list[NoiseKey]) -> Tensor:
    """A token per row from softmax(scores): of the draft, or of the target where nothing was drafted."""
    if coupling == "greedy":
        return scores_NV.argmax(-1)
    return gumbel_sampling.sample(scores_NV, [gumbel_sampling.key(*noise_key) for noise_key in noise_keys])


def verify_drafts(
    coupling: str, target_NV: Tensor, draft_NV: Tensor, drafts_N: Tensor, noise_keys: list[NoiseKey]
) -> tuple[Tensor, Tensor]:
    """(accepted bool [N], token [N]): the draft where accepted, else what is emitted in its place.

    target_NV, draft_NV: processed scores (unnormalised log-probabilities). Each row is judged by itself; the caller
    stops at a row's first rejection.
    """
    if coupling != "max":
        token_N = sample_tokens(coupling, target_NV, noise_keys)
        return token_N == drafts_N, token_N
    p_NV, q_NV = (torch.log_softmax(scores_NV.double(), -1).exp() for scores_NV in (target_NV, draft_NV))
    accept_keys = [gumbel_sampling.key(*noise_key, gumbel_sampling.ACCEPT) for noise_key in noise_keys]
    u_N = gumbel_sampling.uniform(accept_keys, 1, p_NV.device)[:, 0]
    index_N1 = drafts_N[:, None]
    # strict: where p(x) = 0 nothing is accepted, even for u = 0
    accepted_N = u_N * q_NV.gather(-1, index_N1)[:, 0] < p_NV.gather(-1, index_N1)[:, 0]
    residual_NV = (p_NV - q_NV).clamp(min=0)
    residual_NV = torch.where(residual_NV.sum(-1, keepdim=True) > 0, residual_NV, p_NV)  # all rounded away: then p = q
    residual_keys = [gumbel_sampling.key(*noise_key, gumbel_sampling.RESIDUAL) for noise_key in noise_keys]
    return accepted_N, torch.where(accepted_N, drafts_N, gumbel_sampling.sample(residual_NV.log(), residual_keys))


def acceptance_probability(coupling: str, target_NV: Tensor, draft_NV: Tensor) -> Tensor:
    """Probability that a draft would be accepted, [N], known without drafting: 1 - TV, or argmax equality."""
    if coupling == "greedy":
        return (target_NV.argmax(-1) == draft_NV.argmax(-1)).double()
    overlap_N = torch.minimum(torch.softmax(target_NV.double(), -1), torch.softmax(draft_NV.double(), -1)).sum(-1)
    return overlap_N if coupling == "max" else overlap_N / (2 - overlap_N)
