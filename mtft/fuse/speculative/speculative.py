"""Speculative decoding of the fused model: the expert drafts, the other models judge all drafts in one pass.

One round with gamma drafts:
    the drafting expert reads the pending token and its own drafts, one by one            x_1 ... x_gamma from q
    the strong model, the base and the other experts read pending, x_1 ... x_gamma at once
    alpha is solved at all positions at once (it depends on the prefix only), p_i = processed fused distribution
    accept.py says how many drafts stand; then comes one token more: the correction, or, if all stood, one from
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

from mtft.fuse.alpha.spec import Fused, FusionError
from mtft.fuse.decoding.decode import COMPACT, direct, process, select_fused
from mtft.fuse.decoding.generate_request import GenerateRequest
from mtft.fuse.decoding.mapped_state import MappedModels
from mtft.fuse.decoding.model_state import CachedModel, CachedModels
from mtft.fuse.speculative.acceptance import Place, chance, draw, settle
from mtft.fuse.speculative.draft_length import DraftLength
from mtft.fuse.speculative.lockstep import Lockstep, ReleasedToken

if TYPE_CHECKING:
    from mtft.fuse.fusion_core import FusionCore

HOLES = 0.25  # share of dead columns at which the caches are squeezed
MAX_DRAFTS = 16


def unfit(sides: CachedModels, request: GenerateRequest) -> str | None:
    """Why this request can't be speculated, or None."""
    if not request.compact:
        return "a logits processor may keep state from call to call"
    if isinstance(sides, MappedModels):
        return "drafts would be tokens of another tokenizer"
    for side in sides.all:
        if not side.cache.is_croppable or any(side.cache.is_sliding) or any(side.cache.is_linear):
            return f"the cache of {side.model.config.model_type} can't be rolled back"
    return None


def draft_and_judge(fused: FusionCore, request: GenerateRequest, wish: int | str) -> Tensor | GenerateDecoderOnlyOutput:
    """Speculate with `wish` drafts a round, or `auto`; decode directly, with a warning, where it can't be done."""
    if wish != "auto" and (not isinstance(wish, int) or not 0 <= wish <= MAX_DRAFTS):
        raise FusionError(f"speculative is {wish!r}", do=f"give auto, or a number of drafts from 0 to {MAX_DRAFTS}")
    reason = unfit(fused.sides(), request)
    if reason is not None:
        warnings.warn(f"decoding without speculation: {reason}", stacklevel=2)
        return direct(fused, request)
    small, large = (sum(p.numel() for p in model.parameters()) for model in (fused.weak.model, fused.strong))
    gamma = DraftLength(None if wish == "auto" else int(wish), draft_share=small / (2 * small + large))
    fused.last_gamma, rows = gamma, len(request.ids_BL)
    if wish == "auto":
        if rows in fused.gammas:
            gamma.learn(fused.gammas[rows])
        fused.gammas[rows] = gamma
    return speculate(fused, request, gamma)


@torch.no_grad()
def speculate(fused: FusionCore, request: GenerateRequest, gamma: DraftLength) -> Tensor | GenerateDecoderOnlyOutput:
    """As decode.direct, in fewer passes of the strong model."""
    return _Speculation(fused, request, gamma).run()


class _Speculation:
    def __init__(self, fused: FusionCore, request: GenerateRequest, gamma: DraftLength) -> None:
        self.fused, self.request, self.gamma = fused, request, gamma
        self.lock = Lockstep(request, fused.vocab_size)
        self.active = list(range(len(request.ids_BL)))  # rows in the caches
        self.sides = fused.sides()
        self.drafter: CachedModel | None = None  # split off while gamma > 0
        self.expert = 0  # which expert drafts: the one that moves the first token furthest
        sample = request.config.do_sample
        self.coupling = "greedy" if not sample else "gumbel" if request.seeded else "max"
        self.drawing = "gumbel" if sample else "greedy"
        self.keep_scores = self.lock.kept.scores is not None or self.lock.kept.logits is not None
        self._joined = self.sides.weak.groups

    def run(self) -> Tensor | GenerateDecoderOnlyOutput:
        request = self.request
        logits = self.sides.read(request.ids_BL, request.mask_BL, 1, request.small_ids_BL, request.small_mask_BL)
        step = self._plain(*logits)
        self.expert = int(step.alpha_NT.mean(0).argmax())
        while not self.lock.done:
            self._compact()
            gamma = self._fits(self.gamma.next())
            start = time.perf_counter()
            if gamma == 0 and self.gamma.fixed is None:
                self._join()
                self._plain(*self.sides.read(self._pending()[:, None]))
                self.gamma.took(0, plain=time.perf_counter() - start)
            else:
                self._split()
                self._round(gamma)
        if request.streamer is not None:
            request.streamer.end()
        return self.lock.kept.output(self.lock.tokens_BL)

    def _plain(self, strong: Tensor, experts: list[Tensor], base: Tensor) -> Fused:
        """One token per row from logits [A, 1, *], and a look at how drafts would have fared."""
        strong_AV, experts_TAM, base_AM = strong[:, -1], [expert[:, -1] for expert in experts], base[:, -1]
        step = self._fuse(strong_AV, experts_TAM, base_AM, self.active)
        scores_AV = self._process(self.active, [[] for _ in self.active], step.logprobs_NV)
        places = self._places(0)
        tokens_A = draw(self.drawing, scores_AV, places)
        live = [at for at, row in enumerate(self.active) if not self.lock.over[row]]
        if self.gamma.fixed is None:
            q_AV = self._process(self.active, [[] for _ in self.active], self._wide(experts_TAM[self.expert]))
            self.gamma.saw(len(live), float(chance(self.coupling, scores_AV, q_AV)[live].sum()))
        for at, token in zip(live, tokens_A[live].tolist(), strict=True):
            self._emit(at, token, step, scores_AV, at, (strong_AV, experts_TAM, base_AM))
        self.lock.release()
        return step

    def _round(self, gamma: int) -> None:
        """Draft, judge, emit, and put the caches right."""
        start = time.perf_counter()
        count, pending_A = len(self.active), self._pending()
        live = sum(not self.lock.over[row] for row in self.active)
        drafts, raw, q = [], [], []  # per position: [A], [A, M], [A, V]
        block = [pending_A]
        for i in range(gamma):
            raw.append(self._drafter_reads(block[-1]))
            prefix = [[int(x[at]) for x in drafts] for at in range(count)]
            q.append(self._process(self.active, prefix, self._wide(raw[-1])))
            drafts.append(draw(self.drawing, q[-1], self._places(i)))
            block.append(drafts[-1])
        drafted_AG = torch.stack(drafts, -1).tolist() if drafts else [[] for _ in self.active]
        middle = time.perf_counter()
        strong_ALV, experts, base_ALM = self._others_read(torch.stack(block, -1))
        standing = [0] * count
        if gamma:
            logits = (
                strong_ALV[:, :-1].flatten(0, 1),
                self._with_draft([x[:, :-1].flatten(0, 1) for x in experts], torch.stack(raw, 1).flatten(0, 1)),
                base_ALM[:, :-1].flatten(0, 1),
            )
            rows = [row for row in self.active for _ in range(gamma)]
            step = self._fuse(*logits, rows)
            prefixes = [drafted_AG[at][:i] for at in range(count) for i in range(gamma)]
            p_NV = self._process(rows, prefixes, step.logprobs_NV)
            places = [place for pair in zip(*(self._places(i) for i in range(gamma)), strict=True) for place in pair]
            q_NV, x_N = torch.stack(q, 1).flatten(0, 1), torch.stack(drafts, 1).flatten()
            accepted_N, token_N = settle(self.coupling, p_NV, q_NV, x_N, places)
            accepted, tokens = accepted_N.view(count, gamma).tolist(), token_N.view(count, gamma).tolist()
            tests = 0
            for at, row in enumerate(self.active):
                if self.lock.over[row]:
                    continue
                standing[at] = next((i for i in range(gamma) if not accepted[at][i]), gamma)
                tests += min(standing[at] + 1, gamma)
                for i in range(min(standing[at] + 1, gamma)):
                    if not self._emit(at, tokens[at][i], step, p_NV, at * gamma + i, logits):
                        break
            self.gamma.saw(tests, sum(standing))
            self.gamma.drafted += tests
            self.gamma.accepted += sum(standing)
        whole = [at for at, row in enumerate(self.active) if standing[at] == gamma and not self.lock.over[row]]
        extra = 0.0
        if whole:
            before = time.perf_counter()
            last = self._drafter_reads(block[-1])
            extra = time.perf_counter() - before
            drafter = self._with_draft([x[whole, -1] for x in experts], last[whole])
            logits = strong_ALV[whole, -1], drafter, base_ALM[whole, -1]
            rows = [self.active[at] for at in whole]
            step = self._fuse(*logits, rows)
            scores_NV = self._process(rows, [[] for _ in whole], step.logprobs_NV)
            places = [self._place(row) for row in rows]
            chosen = draw(self.drawing, scores_NV, places).tolist()
            for n, (at, token) in enumerate(zip(whole, chosen, strict=True)):
                self._emit(at, token, step, scores_NV, n, logits)
        self._forget(gamma, standing, gamma + 1 if whole else gamma)
        if gamma:
            verify = time.perf_counter() - middle - extra
            self.gamma.took(gamma, draft=(middle - start) / gamma, verify=verify, tokens=1 + sum(standing) / live)
        self.lock.release()

    # --- models -----------------------------------------------------------------------------------------------------

    def _drafter_reads(self, ids_A: Tensor) -> Tensor:
        if self.drafter is None:
            raise RuntimeError("no drafter has been split off")
        return self.drafter.read(ids_A[:, None])[0][:, -1].to(ids_A.device)

    def _others_read(self, ids_AL: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
        """Logits at all L positions of the strong model, the experts that do not draft, and the base."""
        strong_ALV = self.sides.strong.read(ids_AL, keep=0)[0]
        weak_GALM = self.sides.weak.read(ids_AL, keep=0).to(strong_ALV.device)
        experts: list[Tensor] = []
        for index, (own, group) in enumerate(self.sides.order):
            if index == self.expert:
                continue
            if own < 0:
                experts.append(weak_GALM[self.sides.weak.groups.index(self._joined[group])])
            else:
                experts.append(self.sides.own[own].read(ids_AL, keep=0)[0].to(strong_ALV.device))
        return strong_ALV, experts, weak_GALM[-1]

    def _with_draft(self, others: list[Tensor], drafted: Tensor) -> list[Tensor]:
        return [*others[: self.expert], drafted, *others[self.expert :]]

    def _split(self) -> None:
        if self.drafter is None:
            own, group = self.sides.order[self.expert]
            self.drafter = self.sides.own[own] if own >= 0 else self.sides.weak.split(self._joined[group])

    def _join(self) -> None:
        if self.drafter is not None:
            own, group = self.sides.order[self.expert]
            if own < 0:
                self.sides.weak.join(self.drafter, group)
            self.drafter = None

    def _caches(self) -> list[CachedModel]:
        drafter = [] if self.drafter is None or self.drafter in self.sides.own else [self.drafter]
        return [*self.sides.all, *drafter]

    def _forget(self, gamma: int, standing: list[int], drafter_read: int) -> None:
        """Roll back what was read beyond the standing drafts, row by row. Pending itself stays."""
        device = self.request.ids_BL.device
        keep = [0 if self.lock.over[row] else stand + 1 for row, stand in zip(self.active, standing, strict=True)]
        keep_A1 = torch.tensor(keep, device=device)[:, None]
        for side in self._caches():
            length = drafter_read if side is self.drafter else gamma + 1
            surplus = length - int(keep_A1.max())
            side.crop(max(0, surplus))
            rejected_AL = torch.arange(length - max(0, surplus), device=device) >= keep_A1
            if rejected_AL.shape[1] and bool(rejected_AL.any()):
                side.reject(rejected_AL)
            if side.holes and float(side.mask_BC.sum()) < (1 - HOLES) * side.mask_BC.numel():
                side.squeeze()

    def _compact(self) -> None:
        open_ = [at for at, row in enumerate(self.active) if not self.lock.over[row]]
        if open_ and len(open_) <= COMPACT * len(self.active):
            keep = torch.tensor(open_)
            for side in self._caches():
                side.select(keep)
            self.active = [self.active[at] for at in open_]

    # --- tokens -----------------------------------------------------------------------------------------------------

    def _fits(self, gamma: int) -> int:
        """No draft goes beyond the length limit of all rows or the context of any model."""
        rows = [row for row in self.active if not self.lock.over[row]]
        room = max((self.lock.room(row) for row in rows), default=1)
        longest = max(int(side.mask_BC.sum(-1).max()) for side in self._caches())
        return int(max(0, min(gamma, room - 1, self.fused.context - longest - 1)))

    def _pending(self) -> Tensor:
        """The last token of every active row, which no model has read yet."""
        made = self.lock.made
        return torch.tensor([made[row][-1] for row in self.active], device=self.request.ids_BL.device)

    def _place(self, row: int, ahead: int = 0) -> Place:
        return (*self.request.seeds[row], len(self.lock.made[row]) + ahead)

    def _places(self, ahead: int) -> list[Place]:
        return [self._place(row, ahead) for row in self.active]

    def _wide(self, logits_AM: Tensor) -> Tensor:
        """Expert logits over all V ids; it gives the ids that it lacks no chance."""
        missing = self.fused.vocab_size - logits_AM.shape[1]
        dtype = torch.promote_types(logits_AM.dtype, torch.float32)
        return torch.nn.functional.pad(logits_AM.to(dtype), (0, missing), value=-torch.inf)

    def _fuse(self, strong_NV: Tensor, experts: list[Tensor], base_NM: Tensor, rows: list[int]) -> Fused:
        return self.fused.fuse(strong_NV, experts, base_NM, [self.request.specs[row] for row in rows])

    def _process(self, rows: list[int], ahead: list[list[int]], scores_NV: Tensor) -> Tensor:
        """Logits processors, shown what they would see in direct decoding: rows of equal length together."""
        if not len(self.request.processors):
            return scores_NV
        prefixes = [self.lock.made[row] + more for row, more in zip(rows, ahead, strict=True)]
        groups: dict[int, list[int]] = {}
        for n, prefix in enumerate(prefixes):
            groups.setdefault(len(prefix), []).append(n)
        out_NV, device = torch.empty_like(scores_NV), self.request.ids_BL.device
        for length, members in groups.items():
            made = torch.tensor([prefixes[n] for n in members], dtype=torch.long, device=device)
            here = [rows[n] for n in members]
            ids = torch.cat([self.request.ids_BL[here], made.view(len(members), length)], -1)
            out_NV[members] = process(self.request, here, ids, scores_NV[members].clone()).to(out_NV)
        return out_NV

    def _emit(
        self, at: int, token: int, step: Fused, scores_NV: Tensor, n: int, logits: tuple[Tensor, list[Tensor], Tensor]
    ) -> bool:
        """Hand on one token of the active row number `at`, which stands at row n of the solve."""
        kept = (scores_NV[n].clone(), step.logprobs_NV[n].clone()) if self.keep_scores else (None, None)
        tell: Callable[[int], None] | None = None
        observer = self.request.observer
        if observer is not None:
            one = select_fused(step, torch.tensor([n]))
            parts = logits[0][n : n + 1], [x[n : n + 1] for x in logits[1]], logits[2][n : n + 1]

            def report(row: int) -> None:
                observer.step([row], one, torch.tensor([token]), *parts)

            tell = report

        return self.lock.add(self.active[at], ReleasedToken(token, *kept, tell))
