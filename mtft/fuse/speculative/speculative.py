"""Speculative decoding of the fused model: the expert drafts, the other models judge all drafts in one pass.

One round with gamma drafts:
    the drafting expert reads the pending token and its own drafts, one by one            x_1 ... x_gamma from q
    the strong model, the base and the other experts read pending, x_1 ... x_gamma at once
    alpha is solved at all positions at once (it depends on the prefix only), p_i = processed fused distribution
    acceptance.py says how many drafts stand; then comes one token more: the correction, or, if all stood, one from
    p_(gamma+1), for which the expert reads x_gamma as well

The output is distributed as (with a seed or greedily: identical to) that of direct decoding. Rows of a batch advance at
their own pace: rejected tokens stay in the caches as holes that are never attended to, until they are squeezed out.
Leviathan et al., 2211.17192; Speculative Ensemble, 2502.01662.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers.generation import GenerateDecoderOnlyOutput

from mtft.fuse.alpha.spec import FusionError, FusionOutput
from mtft.fuse.decoding.decode import COMPACT, apply_logits_processors, decode_step_by_step, select_rows
from mtft.fuse.decoding.generate_request import GenerateRequest
from mtft.fuse.decoding.mapped_state import MappedModels
from mtft.fuse.decoding.model_state import CachedModel, CachedModels
from mtft.fuse.speculative.acceptance import NoiseKey, acceptance_probability, sample_tokens, verify_drafts
from mtft.fuse.speculative.draft_length import DraftLength
from mtft.fuse.speculative.lockstep import Lockstep, ReleasedToken

if TYPE_CHECKING:
    from mtft.fuse.fusion_core import FusionCore

HOLES = 0.25  # share of dead columns at which the caches are squeezed
MAX_DRAFTS = 16


def speculation_refusal(models: CachedModels, request: GenerateRequest) -> str | None:
    """Why this request can't be speculated, or None."""
    if not request.compact:
        return "a logits processor may keep state from call to call"
    if isinstance(models, MappedModels):
        return "drafts would be tokens of another tokenizer"
    for cached in models.all:
        if not cached.cache.is_croppable or any(cached.cache.is_sliding) or any(cached.cache.is_linear):
            return f"the cache of {cached.model.config.model_type} can't be rolled back"
    return None


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
    gamma = DraftLength(None if drafts == "auto" else int(drafts), draft_share=small / (2 * small + large))
    fused.last_draft_length, rows = gamma, len(request.ids_BL)
    if drafts == "auto":
        if rows in fused.draft_lengths:
            gamma.warm_start(fused.draft_lengths[rows])
        fused.draft_lengths[rows] = gamma
    return speculate(fused, request, gamma)


@torch.no_grad()
def speculate(fused: FusionCore, request: GenerateRequest, gamma: DraftLength) -> Tensor | GenerateDecoderOnlyOutput:
    """As decode.direct, in fewer passes of the strong model."""
    return _Speculation(fused, request, gamma).run()


class _Speculation:
    def __init__(self, fused: FusionCore, request: GenerateRequest, gamma: DraftLength) -> None:
        self.fused, self.request, self.gamma = fused, request, gamma
        self.lockstep = Lockstep(request, fused.vocab_size)
        self.active = list(range(len(request.ids_BL)))  # rows in the caches
        self.models = fused.cached_models()
        self.drafter: CachedModel | None = None  # split off while gamma > 0
        self.expert = 0  # which expert drafts: the one that moves the first token furthest
        sample = request.config.do_sample
        self.coupling = "greedy" if not sample else "gumbel" if request.seeded else "max"
        self.draft_coupling = "gumbel" if sample else "greedy"
        self.keep_scores = self.lockstep.collector.scores is not None or self.lockstep.collector.logits is not None
        self._all_groups = self.models.weak.groups

    def run(self) -> Tensor | GenerateDecoderOnlyOutput:
        request = self.request
        logits = self.models.read(request.ids_BL, request.mask_BL, 1, request.small_ids_BL, request.small_mask_BL)
        step = self._plain_step(*logits)
        self.expert = int(step.alpha_NT.mean(0).argmax())
        while not self.lockstep.done:
            self._compact()
            gamma = self._limit_drafts(self.gamma.next())
            start = time.perf_counter()
            if gamma == 0 and self.gamma.fixed is None:
                self._join_drafter()
                self._plain_step(*self.models.read(self._pending_tokens()[:, None]))
                self.gamma.record_times(0, plain=time.perf_counter() - start)
            else:
                self._split_drafter()
                self._round(gamma)
        if request.streamer is not None:
            request.streamer.end()
        return self.lockstep.collector.output(self.lockstep.tokens_BL)

    def _plain_step(self, strong: Tensor, experts: list[Tensor], base: Tensor) -> FusionOutput:
        """One token per row from logits [A, 1, *], and a look at how drafts would have fared."""
        strong_AV, experts_TAM, base_AM = strong[:, -1], [expert[:, -1] for expert in experts], base[:, -1]
        step = self._fuse(strong_AV, experts_TAM, base_AM, self.active)
        scores_AV = self._process(self.active, [[] for _ in self.active], step.logprobs_NV)
        noise_keys = self._noise_keys(0)
        tokens_A = sample_tokens(self.draft_coupling, scores_AV, noise_keys)
        live = [at for at, row in enumerate(self.active) if not self.lockstep.over[row]]
        if self.gamma.fixed is None:
            q_AV = self._process(
                self.active, [[] for _ in self.active], self._expand_vocabulary(experts_TAM[self.expert])
            )
            self.gamma.record_acceptance(
                len(live), float(acceptance_probability(self.coupling, scores_AV, q_AV)[live].sum())
            )
        for at, token in zip(live, tokens_A[live].tolist(), strict=True):
            self._emit(at, token, step, scores_AV, at, (strong_AV, experts_TAM, base_AM))
        self.lockstep.release()
        return step

    def _round(self, gamma: int) -> None:
        """Draft, judge, emit, and put the caches right."""
        start = time.perf_counter()
        count, pending_A = len(self.active), self._pending_tokens()
        live = sum(not self.lockstep.over[row] for row in self.active)
        drafts, raw, q = [], [], []  # per position: [A], [A, M], [A, V]
        block = [pending_A]
        for i in range(gamma):
            raw.append(self._draft_logits(block[-1]))
            prefix = [[int(x[at]) for x in drafts] for at in range(count)]
            q.append(self._process(self.active, prefix, self._expand_vocabulary(raw[-1])))
            drafts.append(sample_tokens(self.draft_coupling, q[-1], self._noise_keys(i)))
            block.append(drafts[-1])
        drafted_AG = torch.stack(drafts, -1).tolist() if drafts else [[] for _ in self.active]
        middle = time.perf_counter()
        strong_ALV, experts, base_ALM = self._verifier_logits(torch.stack(block, -1))
        accepted_counts = [0] * count
        if gamma:
            logits = (
                strong_ALV[:, :-1].flatten(0, 1),
                self._insert_drafter([x[:, :-1].flatten(0, 1) for x in experts], torch.stack(raw, 1).flatten(0, 1)),
                base_ALM[:, :-1].flatten(0, 1),
            )
            rows = [row for row in self.active for _ in range(gamma)]
            step = self._fuse(*logits, rows)
            prefixes = [drafted_AG[at][:i] for at in range(count) for i in range(gamma)]
            p_NV = self._process(rows, prefixes, step.logprobs_NV)
            noise_keys = [
                place for pair in zip(*(self._noise_keys(i) for i in range(gamma)), strict=True) for place in pair
            ]
            q_NV, x_N = torch.stack(q, 1).flatten(0, 1), torch.stack(drafts, 1).flatten()
            accepted_N, token_N = verify_drafts(self.coupling, p_NV, q_NV, x_N, noise_keys)
            accepted, tokens = accepted_N.view(count, gamma).tolist(), token_N.view(count, gamma).tolist()
            tests = 0
            for at, row in enumerate(self.active):
                if self.lockstep.over[row]:
                    continue
                accepted_counts[at] = next((i for i in range(gamma) if not accepted[at][i]), gamma)
                tests += min(accepted_counts[at] + 1, gamma)
                for i in range(min(accepted_counts[at] + 1, gamma)):
                    if not self._emit(at, tokens[at][i], step, p_NV, at * gamma + i, logits):
                        break
            self.gamma.record_acceptance(tests, sum(accepted_counts))
            self.gamma.drafted += tests
            self.gamma.accepted += sum(accepted_counts)
        all_accepted = [
            at for at, row in enumerate(self.active) if accepted_counts[at] == gamma and not self.lockstep.over[row]
        ]
        extra = 0.0
        if all_accepted:
            before = time.perf_counter()
            last = self._draft_logits(block[-1])
            extra = time.perf_counter() - before
            drafter = self._insert_drafter([x[all_accepted, -1] for x in experts], last[all_accepted])
            logits = strong_ALV[all_accepted, -1], drafter, base_ALM[all_accepted, -1]
            rows = [self.active[at] for at in all_accepted]
            step = self._fuse(*logits, rows)
            scores_NV = self._process(rows, [[] for _ in all_accepted], step.logprobs_NV)
            noise_keys = [self._noise_key(row) for row in rows]
            chosen = sample_tokens(self.draft_coupling, scores_NV, noise_keys).tolist()
            for n, (at, token) in enumerate(zip(all_accepted, chosen, strict=True)):
                self._emit(at, token, step, scores_NV, n, logits)
        self._roll_back(gamma, accepted_counts, gamma + 1 if all_accepted else gamma)
        if gamma:
            verify = time.perf_counter() - middle - extra
            self.gamma.record_times(
                gamma, draft=(middle - start) / gamma, verify=verify, tokens=1 + sum(accepted_counts) / live
            )
        self.lockstep.release()

    # --- models -----------------------------------------------------------------------------------------------------

    def _draft_logits(self, ids_A: Tensor) -> Tensor:
        if self.drafter is None:
            raise RuntimeError("no drafter has been split off")
        return self.drafter.read(ids_A[:, None])[0][:, -1].to(ids_A.device)

    def _verifier_logits(self, ids_AL: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
        """Logits at all L positions of the strong model, the experts that do not draft, and the base."""
        strong_ALV = self.models.strong.read(ids_AL, keep=0)[0]
        weak_GALM = self.models.weak.read(ids_AL, keep=0).to(strong_ALV.device)
        experts: list[Tensor] = []
        for index, (own, group) in enumerate(self.models.order):
            if index == self.expert:
                continue
            if own < 0:
                experts.append(weak_GALM[self.models.weak.groups.index(self._all_groups[group])])
            else:
                experts.append(self.models.own[own].read(ids_AL, keep=0)[0].to(strong_ALV.device))
        return strong_ALV, experts, weak_GALM[-1]

    def _insert_drafter(self, others: list[Tensor], drafted: Tensor) -> list[Tensor]:
        return [*others[: self.expert], drafted, *others[self.expert :]]

    def _split_drafter(self) -> None:
        if self.drafter is None:
            own, group = self.models.order[self.expert]
            self.drafter = self.models.own[own] if own >= 0 else self.models.weak.split(self._all_groups[group])

    def _join_drafter(self) -> None:
        if self.drafter is not None:
            own, group = self.models.order[self.expert]
            if own < 0:
                self.models.weak.join(self.drafter, group)
            self.drafter = None

    def _caches(self) -> list[CachedModel]:
        drafter = [] if self.drafter is None or self.drafter in self.models.own else [self.drafter]
        return [*self.models.all, *drafter]

    def _roll_back(self, gamma: int, accepted_counts: list[int], drafter_read: int) -> None:
        """Roll back what was read beyond the standing drafts, row by row. Pending itself stays."""
        device = self.request.ids_BL.device
        keep = [
            0 if self.lockstep.over[row] else stand + 1 for row, stand in zip(self.active, accepted_counts, strict=True)
        ]
        keep_A1 = torch.tensor(keep, device=device)[:, None]
        for cached in self._caches():
            length = drafter_read if cached is self.drafter else gamma + 1
            surplus = length - int(keep_A1.max())
            cached.crop(max(0, surplus))
            rejected_AL = torch.arange(length - max(0, surplus), device=device) >= keep_A1
            if rejected_AL.shape[1] and bool(rejected_AL.any()):
                cached.mask_last(rejected_AL)
            if cached.has_gaps and float(cached.mask_BC.sum()) < (1 - HOLES) * cached.mask_BC.numel():
                cached.drop_gaps()

    def _compact(self) -> None:
        open_ = [at for at, row in enumerate(self.active) if not self.lockstep.over[row]]
        if open_ and len(open_) <= COMPACT * len(self.active):
            keep = torch.tensor(open_)
            for cached in self._caches():
                cached.select(keep)
            self.active = [self.active[at] for at in open_]

    # --- tokens -----------------------------------------------------------------------------------------------------

    def _limit_drafts(self, gamma: int) -> int:
        """No draft goes beyond the length limit of all rows or the context of any model."""
        rows = [row for row in self.active if not self.lockstep.over[row]]
        room = max((self.lockstep.room(row) for row in rows), default=1)
        longest = max(int(cached.mask_BC.sum(-1).max()) for cached in self._caches())
        return int(max(0, min(gamma, room - 1, self.fused.context - longest - 1)))

    def _pending_tokens(self) -> Tensor:
        """The last token of every active row, which no model has read yet."""
        made = self.lockstep.made
        return torch.tensor([made[row][-1] for row in self.active], device=self.request.ids_BL.device)

    def _noise_key(self, row: int, ahead: int = 0) -> NoiseKey:
        return (*self.request.seeds[row], len(self.lockstep.made[row]) + ahead)

    def _noise_keys(self, ahead: int) -> list[NoiseKey]:
        return [self._noise_key(row, ahead) for row in self.active]

    def _expand_vocabulary(self, logits_AM: Tensor) -> Tensor:
        """Expert logits over all V ids; it gives the ids that it lacks no chance."""
        missing = self.fused.vocab_size - logits_AM.shape[1]
        dtype = torch.promote_types(logits_AM.dtype, torch.float32)
        return torch.nn.functional.pad(logits_AM.to(dtype), (0, missing), value=-torch.inf)

    def _fuse(self, strong_NV: Tensor, experts: list[Tensor], base_NM: Tensor, rows: list[int]) -> FusionOutput:
        return self.fused.fuse(strong_NV, experts, base_NM, [self.request.specs[row] for row in rows])

    def _process(self, rows: list[int], ahead: list[list[int]], scores_NV: Tensor) -> Tensor:
        """Logits processors, shown what they would see in direct decoding: rows of equal length together."""
        if not len(self.request.processors):
            return scores_NV
        prefixes = [self.lockstep.made[row] + more for row, more in zip(rows, ahead, strict=True)]
        groups: dict[int, list[int]] = {}
        for n, prefix in enumerate(prefixes):
            groups.setdefault(len(prefix), []).append(n)
        out_NV, device = torch.empty_like(scores_NV), self.request.ids_BL.device
        for length, members in groups.items():
            made = torch.tensor([prefixes[n] for n in members], dtype=torch.long, device=device)
            here = [rows[n] for n in members]
            ids = torch.cat([self.request.ids_BL[here], made.view(len(members), length)], -1)
            out_NV[members] = apply_logits_processors(self.request, here, ids, scores_NV[members].clone()).to(out_NV)
        return out_NV

    def _emit(
        self,
        at: int,
        token: int,
        step: FusionOutput,
        scores_NV: Tensor,
        n: int,
        logits: tuple[Tensor, list[Tensor], Tensor],
    ) -> bool:
        """Hand on one token of the active row number `at`, which stands at row n of the solve."""
        scores = (scores_NV[n].clone(), step.logprobs_NV[n].clone()) if self.keep_scores else (None, None)
        notify: Callable[[int], None] | None = None
        observer = self.request.observer
        if observer is not None:
            one = select_rows(step, torch.tensor([n]))
            parts = logits[0][n : n + 1], [x[n : n + 1] for x in logits[1]], logits[2][n : n + 1]

            def report(row: int) -> None:
                observer.step([row], one, torch.tensor([token]), *parts)

            notify = report

        return self.lockstep.add(self.active[at], ReleasedToken(token, *scores, notify))
