"""Speculative decoding of the fused model: the expert drafts, the other models judge all drafts in one pass.

One round with n drafts:
    the drafting expert reads the pending token and its own drafts, one by one            x_1 ... x_n from q
    the strong model, the base and the other experts read pending, x_1 ... x_n at once
    alpha is solved at all positions at once (it depends on the prefix only), p_i = processed fused distribution
    acceptance.py says how many drafts stand; then comes one token more: the correction, or, if all stood, one from
    p_(n+1), for which the expert reads x_n as well

The output is distributed as (with a seed or greedily: identical to) that of direct decoding. Rows of a batch advance at
their own pace: rejected tokens stay in the caches as holes that are never attended to, until they are squeezed out.
Leviathan et al., 2211.17192; Speculative Ensemble, 2502.01662.
"""

from __future__ import annotations

import time
import warnings
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from transformers.generation import GenerateDecoderOnlyOutput

from mtft.fuse.alpha.spec import FusionError, FusionOutput
from mtft.fuse.decoding.decode import COMPACT, apply_logits_processors, decode_step_by_step
from mtft.fuse.decoding.generate_request import GenerateRequest
from mtft.fuse.decoding.mapped_state import MappedModels
from mtft.fuse.decoding.model_state import CachedModels, ModelLogits
from mtft.fuse.speculative.acceptance import NoiseKey, acceptance_probability, sample_tokens, verify_drafts
from mtft.fuse.speculative.draft_length import DraftLength
from mtft.fuse.speculative.lockstep import Lockstep, WaitingToken

if TYPE_CHECKING:
    from mtft.fuse.fusion_core import FusionCore

MAX_DRAFTS = 16


def speculation_refusal(models: CachedModels, request: GenerateRequest) -> str | None:
    """Why this request can't be speculated, or None."""
    if not request.compact:
        return "a logits processor may keep state from call to call"
    if isinstance(models, MappedModels):
        return "drafts would be tokens of another tokenizer"
    for cached in models.all:
        if not cached.movable:
            return f"the cache of {cached.model.config.model_type} can't be rolled back"
    return None


@torch.no_grad()
def speculative_decode(
    fused: FusionCore, request: GenerateRequest, drafts: int | str
) -> Tensor | GenerateDecoderOnlyOutput:
    """Speculate with `drafts` drafts a round, or `auto`; decode directly, with a warning, where it can't be done."""
    if drafts != "auto" and (not isinstance(drafts, int) or not 0 <= drafts <= MAX_DRAFTS):
        raise FusionError(f"speculative is {drafts!r}", do=f"give auto, or a number of drafts from 0 to {MAX_DRAFTS}")
    reason = speculation_refusal(fused.cached_models(), request)
    if reason is not None:
        warnings.warn(f"decoding without speculation: {reason}", stacklevel=2)
        return decode_step_by_step(fused, request)
    small, large = (sum(p.numel() for p in model.parameters()) for model in (fused.weak.model, fused.strong))
    draft_length = DraftLength(None if drafts == "auto" else int(drafts), draft_share=small / (2 * small + large))
    fused.last_draft_length, rows = draft_length, len(request.ids_BL)
    if drafts == "auto":
        if rows in fused.draft_lengths:
            draft_length.warm_start(fused.draft_lengths[rows])
        fused.draft_lengths[rows] = draft_length
    return _Speculation(fused, request, draft_length).run()


class _Solved(NamedTuple):
    """N fused positions: what went in, what came out, and the scores after the logits processors."""

    logits: ModelLogits
    step: FusionOutput
    scores_NV: Tensor


class _Speculation:
    def __init__(self, fused: FusionCore, request: GenerateRequest, draft_length: DraftLength) -> None:
        self.fused, self.request, self.draft_length = fused, request, draft_length
        self.lockstep = Lockstep(request, fused.vocab_size)
        self.active = list(range(len(request.ids_BL)))  # rows in the caches
        self.models = fused.cached_models()
        self.expert = 0  # which expert drafts: the one that moves the first token furthest
        sample = request.sample
        self.coupling = "greedy" if not sample else "gumbel" if request.seeded else "max"
        self.draft_coupling = "gumbel" if sample else "greedy"

    def run(self) -> Tensor | GenerateDecoderOnlyOutput:
        request = self.request
        step = self._plain_step(self.models.read(request.ids_BL, request.mask_BL, 1, request.small_prompt))
        self.expert = int(step.alpha_NT.mean(0).argmax())
        while not self.lockstep.done:
            start = time.perf_counter()
            self._compact()
            drafts = self._limit_drafts(self.draft_length.next_round())
            if drafts == 0 and self.draft_length.fixed is None:
                self.models.join_drafter(self.expert)
                self._plain_step(self.models.read(self._pending_tokens()[:, None]))
                self.draft_length.record_times(0, plain=time.perf_counter() - start)
            else:
                self._round(drafts, start)
        return self.lockstep.output.result()

    def _plain_step(self, logits: ModelLogits) -> FusionOutput:
        """One token per row from logits [A, 1, *], and a look at how drafts would have fared."""
        solved = self._solve(logits.last(), self.active)
        tokens_A = sample_tokens(self.draft_coupling, solved.scores_NV, self._noise_keys(self.active))
        live = self._live()
        if self.draft_length.fixed is None:
            draft_AV = self._draft_scores(solved.logits.experts[self.expert], [[] for _ in self.active])
            chance_A = acceptance_probability(self.coupling, solved.scores_NV, draft_AV)
            self.draft_length.record_acceptance(len(live), float(chance_A[live].sum()))
        for at, token in zip(live, tokens_A[live].tolist(), strict=True):
            self._emit(at, token, solved, at)
        self.lockstep.release()
        return solved.step

    def _round(self, drafts: int, begun: float) -> None:
        """Draft, judge, emit, and put the caches right. begun: when this round did."""
        live, drafter = self._live(), self.models.split_drafter(self.expert)
        start = time.perf_counter()
        block, draft_logits, draft_scores = [self._pending_tokens()], [], []  # per position: [A], [A, M], [A, V]
        drafted: list[list[int]] = [[] for _ in self.active]
        for i in range(drafts):
            draft_logits.append(drafter.read(block[-1][:, None])[0][:, -1].to(block[-1].device))
            draft_scores.append(self._draft_scores(draft_logits[-1], drafted))
            block.append(sample_tokens(self.draft_coupling, draft_scores[-1], self._noise_keys(self.active, i)))
            for ids, token in zip(drafted, block[-1].tolist(), strict=True):
                ids.append(token)
        middle = time.perf_counter()
        logits = self.models.read(torch.stack(block, -1), keep=0)  # of all but the drafter
        accepted_counts = [0] * len(self.active)
        if drafts:
            rows = [row for row in self.active for _ in range(drafts)]
            before = logits.map(lambda x: x[:, :-1].flatten(0, 1))
            before = self._insert_drafter(before, torch.stack(draft_logits, 1).flatten(0, 1))
            solved = self._solve(before, rows, [ids[:i] for ids in drafted for i in range(drafts)])
            noise_keys = [self._noise_key(row, i) for row in self.active for i in range(drafts)]
            draft_NV, draft_N = torch.stack(draft_scores, 1).flatten(0, 1), torch.stack(block[1:], 1).flatten()
            accepted_N, token_N = verify_drafts(self.coupling, solved.scores_NV, draft_NV, draft_N, noise_keys)
            accepted, tokens = accepted_N.view(-1, drafts).tolist(), token_N.view(-1, drafts).tolist()
            tests = 0
            for at in live:
                accepted_counts[at] = next((i for i in range(drafts) if not accepted[at][i]), drafts)
                judged = min(accepted_counts[at] + 1, drafts)
                tests += judged
                for i in range(judged):
                    if not self._emit(at, tokens[at][i], solved, at * drafts + i):
                        break
            self.draft_length.record_acceptance(tests, sum(accepted_counts))
            self.draft_length.drafted += tests
            self.draft_length.accepted += sum(accepted_counts)
        all_accepted = [at for at in self._live() if accepted_counts[at] == drafts]
        extra = 0.0
        if all_accepted:
            before_extra = time.perf_counter()
            last = drafter.read(block[-1][:, None])[0][:, -1].to(block[-1].device)
            extra = time.perf_counter() - before_extra
            rows = [self.active[at] for at in all_accepted]
            after = self._insert_drafter(logits.map(lambda x: x[all_accepted, -1]), last[all_accepted])
            solved = self._solve(after, rows)
            chosen = sample_tokens(self.draft_coupling, solved.scores_NV, self._noise_keys(rows)).tolist()
            for n, (at, token) in enumerate(zip(all_accepted, chosen, strict=True)):
                self._emit(at, token, solved, n)
        verified = time.perf_counter() - middle - extra
        self._roll_back(drafts, accepted_counts, drafts + 1 if all_accepted else drafts)
        self.lockstep.release()
        if drafts:
            self.draft_length.record_times(
                drafts,
                draft=(middle - start) / drafts,
                verify=verified,
                tokens=1 + sum(accepted_counts) / len(live),
                total=time.perf_counter() - begun,
            )

    # --- models -----------------------------------------------------------------------------------------------------

    def _draft_scores(self, logits_AM: Tensor, prefixes: list[list[int]]) -> Tensor:
        """The drafter's scores over all V ids, as the logits processors leave them."""
        dtype = torch.promote_types(logits_AM.dtype, torch.float32)
        return self._process(self.active, prefixes, self.fused.pad_to_vocabulary(logits_AM.to(dtype)))

    def _insert_drafter(self, others: ModelLogits, drafted: Tensor) -> ModelLogits:
        return others._replace(experts=[*others.experts[: self.expert], drafted, *others.experts[self.expert :]])

    def _roll_back(self, drafts: int, accepted_counts: list[int], drafter_read: int) -> None:
        """Roll back what was read beyond the standing drafts, row by row. Pending itself stays."""
        device = self.request.ids_BL.device
        keep = [
            0 if self.lockstep.over[row] else count + 1 for row, count in zip(self.active, accepted_counts, strict=True)
        ]
        keep_A1 = torch.tensor(keep, device=device)[:, None]
        for cached in self.models.all:
            length = drafter_read if cached is self.models.drafter else drafts + 1
            surplus = max(0, length - max(keep))
            cached.crop(surplus)
            rejected_AL = torch.arange(length - surplus, device=device) >= keep_A1
            if bool(rejected_AL.any()):
                cached.mask_last(rejected_AL)
            cached.squeeze()

    def _compact(self) -> None:
        live = self._live()
        if live and len(live) <= COMPACT * len(self.active):
            for cached in self.models.all:
                cached.select(torch.tensor(live))
            self.active = [self.active[at] for at in live]

    # --- tokens -----------------------------------------------------------------------------------------------------

    def _live(self) -> list[int]:
        """Which of the active rows need more tokens."""
        return [at for at, row in enumerate(self.active) if not self.lockstep.over[row]]

    def _limit_drafts(self, drafts: int) -> int:
        """No draft goes beyond the length limit of all rows or the context of any model."""
        room = max((self.lockstep.room(self.active[at]) for at in self._live()), default=1)
        longest = max(int(cached.mask_BC.sum(-1).max()) for cached in self.models.all)
        return int(max(0, min(drafts, room - 1, self.fused.context - longest - 1)))

    def _pending_tokens(self) -> Tensor:
        """The last token of every active row, which no model has read yet."""
        made = self.lockstep.made
        return torch.tensor([made[row][-1] for row in self.active], device=self.request.ids_BL.device)

    def _noise_key(self, row: int, ahead: int = 0) -> NoiseKey:
        return (*self.request.seeds[row], len(self.lockstep.made[row]) + ahead)

    def _noise_keys(self, rows: list[int], ahead: int = 0) -> list[NoiseKey]:
        return [self._noise_key(row, ahead) for row in rows]

    def _solve(self, logits: ModelLogits, rows: list[int], prefixes: list[list[int]] | None = None) -> _Solved:
        """Fuse positions of these rows. prefixes: drafts before each position."""
        step = self.fused.fuse(*logits, [self.request.specs[row] for row in rows])
        return _Solved(logits, step, self._process(rows, prefixes or [[] for _ in rows], step.logprobs_NV))

    def _process(self, rows: list[int], prefixes: list[list[int]], scores_NV: Tensor) -> Tensor:
        """Logits processors, shown what they would see in direct decoding: rows of equal length together."""
        if not len(self.request.processors):
            return scores_NV
        made = [self.lockstep.made[row] + prefix for row, prefix in zip(rows, prefixes, strict=True)]
        out_NV, device = torch.empty_like(scores_NV), self.request.ids_BL.device
        for length in dict.fromkeys(map(len, made)):
            members = [n for n, ids in enumerate(made) if len(ids) == length]
            made_NL = torch.tensor([made[n] for n in members], dtype=torch.long, device=device)
            group = [rows[n] for n in members]
            ids_NL = torch.cat([self.request.ids_BL[group], made_NL.view(len(members), length)], -1)
            scores = apply_logits_processors(self.request, group, ids_NL, scores_NV[members].clone())
            out_NV[members] = scores.to(out_NV)
        return out_NV

    def _emit(self, at: int, token: int, solved: _Solved, n: int) -> bool:
        """Hand on one token of the active row number `at`, which stands at row n of the solve."""
        row, waiting = self.active[at], WaitingToken(token)
        if self.lockstep.output.keeps_scores:
            waiting.scores_V, waiting.logprobs_V = solved.scores_NV[n].clone(), solved.step.logprobs_NV[n].clone()
        if self.request.observer is not None:
            n_1 = torch.tensor([n])
            logits = solved.logits.map(lambda x: x[n : n + 1])
            waiting.notify = partial(
                self.request.observer.step, [row], solved.step.select(n_1), torch.tensor([token]), *logits
            )
        return self.lockstep.add(row, waiting)
