"""One thread owns the models and decodes for many clients: new prompts join the running batch between two tokens.

Clients hand in jobs and get events back. A job that is cancelled leaves at the next token. The rows of a batch don't
see each other: padding is never attended to, and a row's noise depends on its own seed and position only.

A batch that fails ends for everyone in it; then the engine asks the models for one token. If they can't give it (no
memory, say), it takes nothing more, says so (`fault`), and tries again every few seconds. A device that fails does not
come back within a process, nor does the engine's thread: then it is `lost`, and the server ends (graceful_shutdown.py).
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from mtft.common.out_of_memory import is_device_error
from mtft.fuse.alpha.spec import FusionError
from mtft.fuse.decoding.model_state import CachedModels, ModelLogits
from mtft.fuse.decoding.prompts import Prompt, left_pad, pad_small_prompts
from mtft.fuse.decoding.score_text import fused_positions
from mtft.fuse.decoding.small_scores import small_positions
from mtft.fuse.fusion_core import FusionCore
from mtft.fuse.server.incremental_detokenizer import IncrementalDetokenizer
from mtft.fuse.server.jobs import (
    EngineFailed,
    GenerationJob,
    ServerBusy,
    ServerStopping,
    StreamEvent,
    TokenScore,
    token_score,
)
from mtft.fuse.server.next_tokens import choose_tokens, read_scores, served_logprobs
from mtft.fuse.server.prefill import PART, Prefill, cut_prompts

WINDOW = 0.005  # seconds in which prompts come together
RETRY = 5.0  # seconds between two looks whether failed models work again


@dataclass
class EngineMetrics:
    """Counters since the start."""

    requests: int = 0
    refused: int = 0
    prompt_tokens: int = 0
    tokens: int = 0
    steps: int = 0
    alpha: float = 0.0
    clipped: int = 0


class BatchEngine:
    """Decodes jobs on one thread. rows: largest batch; queue: jobs that may wait; wait: seconds before giving up."""

    def __init__(self, fused: FusionCore, *, rows: int = 8, queue: int = 64, wait: float = 60.0) -> None:
        self.fused, self.rows, self.queue, self.wait = fused, rows, queue, wait
        self.metrics = EngineMetrics()
        self.waiting: deque[GenerationJob] = deque()
        self.scoring: deque[GenerationJob] = deque()  # their prompts are to be scored
        self._changed = threading.Condition()
        self.draining = self._closing = self._busy = False
        self.fault: str | None = None  # why it can't serve
        self.lost = False  # it never will again in this process
        self.running: list[tuple[GenerationJob, IncrementalDetokenizer]] = []
        self._batch: tuple[CachedModels, ModelLogits] | None = None  # of the running rows; logits at the last token
        self._prefill: Prefill | None = None  # prompts that are about to join
        self._thread = threading.Thread(target=self._run, name="fuse-engine", daemon=True)

    @property
    def idle(self) -> bool:
        return not (self.waiting or self._taken or self.scoring or self._busy)

    @property
    def _taken(self) -> list[GenerationJob]:
        """Jobs whose prompts are read, or being read."""
        return [*(job for job, _ in self.running), *(self._prefill.jobs if self._prefill is not None else ())]

    def start(self) -> None:
        self._thread.start()

    def drain(self) -> None:
        """Take nothing new from now on. Safe in a signal handler."""
        self.draining = True

    def stop(self) -> None:
        """Finish what runs and waits, then end the thread."""
        with self._changed:
            self.draining = self._closing = True
            self._changed.notify()
        self._thread.join()

    def submit(self, jobs: Sequence[GenerationJob], *, score: bool = False) -> None:
        """All of them or none. score: their prompts are scored, and nothing is generated.

        Raises ServerBusy if they don't fit into the queue, ServerStopping if the server is about to end, EngineFailed
        if it can't serve.
        """
        with self._changed:
            if self.draining:
                raise ServerStopping
            if self.fault is not None:
                raise EngineFailed(self.fault)
            if len(self.waiting) + len(self.scoring) + len(jobs) > self.queue:
                self.metrics.refused += len(jobs)
                raise ServerBusy
            (self.scoring if score else self.waiting).extend(jobs)
            self.metrics.requests += len(jobs)
            self._changed.notify()

    def score_too(self, jobs: Sequence[GenerationJob]) -> None:
        """Score the prompts of jobs that were taken before and have ended: also when the queue is full or drains."""
        with self._changed:
            if self._closing:
                raise ServerStopping
            if self.fault is not None:
                raise EngineFailed(self.fault)
            self.scoring.extend(jobs)
            self._changed.notify()

    def cancel(self, jobs: Sequence[GenerationJob]) -> None:
        """Their client has gone: who waits gives its place back at once, who runs leaves at the next token."""
        with self._changed:
            for job in jobs:
                job.cancelled = True
            self.waiting = deque(job for job in self.waiting if not job.cancelled)
            self.scoring = deque(job for job in self.scoring if not job.cancelled)

    def _run(self) -> None:
        reason = "its thread has ended"
        try:
            while self._wait():
                if self.fault is not None:
                    self._probe()
                    continue
                self._score_next()
                if self.waiting or self._taken:
                    self._decode()
        except BaseException as error:
            reason = _reason(error)
            raise
        finally:
            self._busy = False
            if not self._closing:
                self._fail(reason, lost=True)

    def _wait(self) -> bool:
        """Until there is something to do. False: there never will be."""
        with self._changed:
            self._busy = False
            while not (self.waiting or self._taken or self.scoring):
                if self._closing:
                    return False
                if not self._changed.wait(None if self.fault is None else RETRY) and self.fault is not None:
                    break
            self._busy = True
            return True

    def _decode(self) -> None:
        """One token for all that run, after a part of the prompts that can join."""
        if not self._taken:
            time.sleep(WINDOW)  # prompts that come together are read together
        joining = self._take_jobs()
        try:
            self._begin(joining)
            self._read_prompts()
            if self.running:
                self._step()
        except Exception as error:  # noqa: BLE001  whatever it was, its clients hear of it, and the thread lives on
            # the caches may be half written: everyone in the batch hears of it, the next batch starts afresh
            event = StreamEvent(error=_reason(error), status=500)
            ended = {id(job): job for job in (*self._taken, *joining)}
            self.running, self._batch, self._prefill = [], None, None
            for job in ended.values():
                job.tell(event)
            if not isinstance(error, FusionError):
                self._probe()

    def _score_next(self) -> None:
        """One prompt: who runs waits for no more than that."""
        with self._changed:
            job = self.scoring.popleft() if self.scoring else None
        if job is None:
            return
        try:
            job.tell(StreamEvent(prompt=tuple(self._score_prompt(job))))
        except Exception as error:  # noqa: BLE001  as in _decode
            job.tell(StreamEvent(error=_reason(error), status=500))
            if not isinstance(error, FusionError):
                self._probe()

    @torch.no_grad()
    def _probe(self) -> None:
        """Can the models still give a token?"""
        try:
            if self.fused.device.type == "cuda":
                torch.cuda.empty_cache()
            ids_BL, mask_BL = left_pad([[min(self.fused.end_ids, default=0)]], 0, self.fused.device)
            specs = self.fused.route_prompts([self.fused.spec], ids_BL, mask_BL)
            self.fused.fuse(*self.fused.cached_models().read(ids_BL, mask_BL).last(), specs)
            self.fault = None
        except Exception as error:  # noqa: BLE001  every failure is one
            self._fail(_reason(error), lost=is_device_error(error))

    def _fail(self, reason: str, *, lost: bool) -> None:
        """Nothing can be served: nobody is let in, and then whoever is here hears of it."""
        with self._changed:
            if self.fault is None:
                logging.getLogger(__name__).error("the engine can't serve: %s", reason)
            self.fault, self.lost = reason, self.lost or lost
            jobs = [*self.waiting, *self.scoring, *self._taken]
            self.waiting.clear()
            self.scoring.clear()
            self.running, self._batch, self._prefill = [], None, None
        for job in jobs:
            job.tell(StreamEvent(error=f"the engine failed: {reason}", status=503))

    def _take_jobs(self) -> list[GenerationJob]:
        """Jobs that may join now. Those that waited too long hear so."""
        with self._changed:
            oldest = time.monotonic() - self.wait
            late = [job for job in self.waiting if job.since < oldest]
            self.waiting = deque(job for job in self.waiting if job.since >= oldest)
            joining: list[GenerationJob] = []
            # a cache that forgets (sliding window) takes no new rows: wait for the batch to end
            if self._prefill is None and (self._batch is None or self._batch[0].movable):
                while self.waiting and len(self.running) + len(joining) < self.rows:
                    joining.append(self.waiting.popleft())
        for job in late:
            job.tell(StreamEvent(error="the server is busy: the request waited too long", status=503))
        return joining

    @torch.no_grad()
    def _begin(self, jobs: list[GenerationJob]) -> None:
        """Prompts that are to join, in parts if somebody runs meanwhile."""
        if not jobs:
            return
        self.metrics.prompt_tokens += sum(len(job.ids) for job in jobs)
        ids_BL, mask_BL = left_pad([job.ids for job in jobs], 0, self.fused.device)
        small = pad_small_prompts(self.fused, [Prompt(job.ids, job.small_ids) for job in jobs], self.fused.device)
        specs = self.fused.route_prompts([job.spec for job in jobs], *(small or (ids_BL, mask_BL)))
        for job, spec in zip(jobs, specs, strict=True):
            job.spec = spec
        # small models with another tokenizer read the whole text at once
        in_parts = self.running and self.fused.token_map is None
        width = max(1, PART // len(jobs)) if in_parts else self.fused.context
        self._prefill = Prefill(jobs, self.fused.cached_models(), cut_prompts((ids_BL, mask_BL), small, width))

    @torch.no_grad()
    def _read_prompts(self) -> None:
        """A part of the prompts; after the last, they are put beside the rows that run."""
        prefill = self._prefill
        if prefill is not None and all(job.cancelled for job in prefill.jobs):
            prefill = self._prefill = None
        if prefill is None or (logits := prefill.read()) is None:
            return
        models = prefill.models
        if self._batch is not None:
            running, running_logits = self._batch
            running.append_rows(models)
            running.squeeze()
            models, logits = running, running_logits.map(lambda *both: torch.cat(both), logits)
        self._batch, self._prefill = (models, logits), None
        self.running += [(job, IncrementalDetokenizer(self.fused.tokenizer, job.stops)) for job in prefill.jobs]

    @torch.no_grad()
    def _score_prompt(self, job: GenerationJob) -> list[TokenScore]:
        """The first token has no prefix, so it has no score."""
        ids_1L = torch.tensor([job.ids], device=self.fused.device)
        scores = [TokenScore(job.ids[0], None)]
        if isinstance(job.source, int):
            rows = map(self.fused.full_logprobs, small_positions(self.fused, ids_1L[:, :-1], job.source))
        else:
            spec = replace(job.spec, alpha_rule="fixed", alpha=0.0) if job.source == "strong" else job.spec
            predict_1L = torch.ones_like(ids_1L, dtype=torch.bool)
            predict_1L[:, -1] = False
            steps = fused_positions(self.fused, ids_1L, None, predict_1L, specs=[spec])
            rows = (logp_V for _, _, step, _ in steps for logp_V in step.logprobs_NV)
        return scores + [token_score(logp_V, token, job.top) for logp_V, token in zip(rows, job.ids[1:])]

    @torch.no_grad()
    def _step(self) -> None:
        """One token for every row."""
        if self._batch is None:
            raise RuntimeError("a step without a batch")
        models, logits = self._batch
        jobs = [job for job, _ in self.running]
        fused = self.fused.fuse(*logits, [job.spec for job in jobs])
        logp_NV = served_logprobs(self.fused, jobs, fused, logits)
        tokens_N = choose_tokens(logp_NV, jobs, [len(detokenizer.tokens) for _, detokenizer in self.running])
        scores, alpha, clipped = read_scores(logp_NV, tokens_N, jobs, fused)
        self.metrics.steps += 1
        self.metrics.tokens += len(jobs)
        self.metrics.alpha += alpha
        self.metrics.clipped += clipped
        for row, ((job, detokenizer), score) in enumerate(zip(self.running, scores, strict=True)):
            if job.trace is not None:
                row_1 = torch.tensor([row])
                wide = self.fused.to_strong_vocabulary(logits.select(row_1))
                job.trace.step([0], fused.select(row_1), torch.tensor([score.id]), *wide)
            self._report(job, detokenizer, score)
        keep = [row for row, job in enumerate(jobs) if not job.cancelled]
        self.running = [self.running[row] for row in keep]
        if not keep:
            self._batch = None
            return
        if len(keep) < len(jobs):
            keep_N = torch.tensor(keep, device=tokens_N.device)
            models.select(keep_N)
            models.squeeze()
            tokens_N = tokens_N[keep_N]
        self._batch = models, models.read(tokens_N[:, None]).last()

    def _report(self, job: GenerationJob, detokenizer: IncrementalDetokenizer, score: TokenScore) -> None:
        """The client hears of the token; a job that has ended is marked as cancelled, so that its row leaves."""
        if job.cancelled:
            return
        ended = score.id in self.fused.end_ids
        text = detokenizer.rest() if ended else detokenizer.add(score.id)
        count = len(detokenizer.tokens) + ended
        reason = "stop" if ended or detokenizer.finished else "length" if count >= job.max_tokens else None
        if reason is not None:
            text += detokenizer.rest()
            job.cancelled = True
        job.tell(StreamEvent(text, (score,), reason))


def _reason(error: BaseException) -> str:
    """In one line."""
    if isinstance(error, FusionError):
        return error.what
    line = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {line}" if line else type(error).__name__
