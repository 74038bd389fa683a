"""One thread owns the models and decodes for many clients: new prompts join the running batch between two tokens.

Clients hand in jobs and get events back. A job that is cancelled leaves at the next token. The rows of a batch don't
see each other: padding is never attended to, and a row's noise depends on its own seed and position only.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from mtft.fuse.alpha.spec import FusionError, FusionOutput
from mtft.fuse.decoding import gumbel_sampling
from mtft.fuse.decoding.model_state import CachedModels
from mtft.fuse.decoding.prompts import left_pad
from mtft.fuse.decoding.score_text import fused_positions
from mtft.fuse.fusion_core import FusionCore
from mtft.fuse.server.incremental_detokenizer import IncrementalDetokenizer
from mtft.fuse.server.jobs import GenerationJob, ServerBusy, ServerStopping, StreamEvent, TokenScore, token_score

SQUEEZE = 0.75  # share of the caches in use below which padding is dropped


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

    def __init__(
        self, fused: FusionCore, *, rows: int = 8, queue: int = 64, wait: float = 60.0, window: float = 0.005
    ) -> None:
        self.fused, self.rows, self.queue, self.wait, self.window = fused, rows, queue, wait, window
        self.metrics = EngineMetrics()
        self._waiting: deque[GenerationJob] = deque()
        self._tasks: deque[tuple[GenerationJob, Future[list[TokenScore]]]] = deque()
        self._changed = threading.Condition()
        self._draining = self._closing = False
        self._running: list[tuple[GenerationJob, IncrementalDetokenizer]] = []
        self._models: CachedModels | None = None
        self._logits: tuple[Tensor, list[Tensor], Tensor] | None = None
        self._thread = threading.Thread(target=self._run, name="fuse-engine", daemon=True)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def idle(self) -> bool:
        return not (self._waiting or self._running or self._tasks)

    @property
    def draining(self) -> bool:
        return self._draining

    def start(self) -> None:
        self._thread.start()

    def drain(self) -> None:
        """Take nothing new from now on. Safe in a signal handler."""
        self._draining = True

    def stop(self) -> None:
        """Finish what runs and waits, then end the thread."""
        with self._changed:
            self._draining = self._closing = True
            self._changed.notify()
        self._thread.join()

    def submit(self, jobs: Sequence[GenerationJob]) -> None:
        """All of them or none. Raises ServerBusy if they don't fit into the queue,
        ServerStopping if the server is about to end.
        """
        with self._changed:
            if self._draining:
                raise ServerStopping
            if len(self._waiting) + len(jobs) > self.queue:
                self.metrics.refused += len(jobs)
                raise ServerBusy
            self._waiting.extend(jobs)
            self.metrics.requests += len(jobs)
            self._changed.notify()

    def score_prompt(self, job: GenerationJob) -> list[TokenScore]:
        """Scores of a prompt's own tokens under what the job asked for, on the engine's thread; waits for it."""
        task: Future[list[TokenScore]] = Future()
        with self._changed:
            self._tasks.append((job, task))
            self._changed.notify()
        return task.result()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._waiting and not self._running and not self._tasks:
                    if self._closing:
                        return
                    self._changed.wait()
            while self._tasks:
                job, task = self._tasks.popleft()
                try:
                    task.set_result(self._score_prompt(job))
                except (FusionError, RuntimeError) as error:
                    task.set_exception(error)
            if not self._waiting and not self._running:
                continue
            if not self._running:
                time.sleep(self.window)  # prompts that come together are read together
            try:
                self._read_prompts(self._take_jobs())
                if self._running:
                    self._step()
            except (FusionError, RuntimeError) as error:
                # the caches may be half written: everyone in the batch hears of it, the next batch starts afresh
                message = error.what if isinstance(error, FusionError) else str(error).splitlines()[0]
                for job, _ in self._running:
                    job.on_event(StreamEvent(error=message, status=500))
                self._running, self._models, self._logits = [], None, None

    def _take_jobs(self) -> list[GenerationJob]:
        """Jobs that may join now. Those that waited too long hear so."""
        taken: list[GenerationJob] = []
        if self._models is not None and not self._models.movable:
            return taken  # a cache that forgets (sliding window) takes no new rows: wait for the batch to end
        with self._changed:
            while self._waiting and len(self._running) + len(taken) < self.rows:
                job = self._waiting.popleft()
                if job.cancelled:
                    continue
                if time.monotonic() - job.since > self.wait:
                    job.on_event(StreamEvent(error="the server is busy: the request waited too long", status=503))
                    continue
                taken.append(job)
        return taken

    @torch.no_grad()
    def _read_prompts(self, jobs: list[GenerationJob]) -> None:
        """Read the prompts and put them beside the rows that run."""
        if not jobs:
            return
        new = [(job, IncrementalDetokenizer(self.fused.tokenizer, job.stops)) for job in jobs]
        self._running += new
        self.metrics.prompt_tokens += sum(len(job.ids) for job in jobs)
        ids_BL, mask_BL = left_pad([job.ids for job in jobs], 0, self.fused.device)
        for job, spec in zip(jobs, self.fused.route_prompts([job.spec for job in jobs], ids_BL, mask_BL), strict=True):
            job.spec = spec
        models = self.fused.cached_models()
        strong, experts, base = models.read(ids_BL, mask_BL, 1)
        logits = strong[:, -1], [expert[:, -1] for expert in experts], base[:, -1]
        if self._models is None or self._logits is None:
            self._models, self._logits = models, logits
            return
        self._models.append_rows(models)
        experts_cat = [torch.cat(pair) for pair in zip(self._logits[1], logits[1], strict=True)]
        self._logits = torch.cat([self._logits[0], logits[0]]), experts_cat, torch.cat([self._logits[2], logits[2]])

    @torch.no_grad()
    def _score_prompt(self, job: GenerationJob) -> list[TokenScore]:
        """The first token has no prefix, so it has no score."""
        ids_1L = torch.tensor([job.ids], device=self.fused.device)
        scores = [TokenScore(job.ids[0], None)]
        if isinstance(job.source, int):
            logits_LM = self.fused.cached_models().read_weak(ids_1L, keep=0)[0][job.source][0]
            rows = (self._full_logprobs(logits_V) for logits_V in logits_LM[:-1])
        else:
            spec = replace(job.spec, alpha_rule="fixed", alpha=0.0) if job.source == "strong" else job.spec
            predict_1L = torch.ones_like(ids_1L, dtype=torch.bool)
            predict_1L[:, -1] = False
            steps = fused_positions(self.fused, ids_1L, None, predict_1L, None, None, [spec])
            rows = (logp_V for _, _, step in steps for logp_V in step.logprobs_NV)
        return scores + [token_score(logp_V, token, job.top) for logp_V, token in zip(rows, job.ids[1:])]

    @torch.no_grad()
    def _step(self) -> None:
        """One token for every row."""
        models, logits = self._models, self._logits
        if models is None or logits is None:
            raise RuntimeError("a step without a batch")
        strong_BV, experts, base_BM = logits
        fused = self.fused.fuse(strong_BV, experts, base_BM, [job.spec for job, _ in self._running])
        self._update_metrics(fused)
        tokens = []
        for row, (job, detokenizer) in enumerate(self._running):
            logp_V = self._requested_logprobs(job, fused.logprobs_NV[row], strong_BV[row], experts, row)
            token = self._next_token(job, logp_V, len(detokenizer.tokens))
            tokens.append(token)
            if job.trace is not None:
                here = torch.tensor([row], device=strong_BV.device)
                one = type(fused)(**{k: v[here] for k, v in vars(fused).items() if k != "evaluations"}, evaluations=0)
                wide = [self.fused.to_strong_vocabulary(x[here]) for x in (*experts, base_BM)]
                job.trace.step([0], one, torch.tensor([token]), strong_BV[here], wide[:-1], wide[-1])
            self._report(job, detokenizer, token_score(logp_V, token, job.top))
        keep = [row for row, (job, _) in enumerate(self._running) if not job.cancelled]
        self._running = [self._running[row] for row in keep]
        if not keep:
            self._models = self._logits = None
            return
        if len(keep) < len(tokens):
            models.select(torch.tensor(keep))
        if models.movable:
            for cached in models.all:
                if cached.has_gaps and float(cached.mask_BC.sum()) < SQUEEZE * cached.mask_BC.numel():
                    cached.drop_gaps()
        next_B1 = torch.tensor([[tokens[row]] for row in keep], device=self.fused.device)
        strong, experts, base = models.read(next_B1)
        self._logits = strong[:, -1], [expert[:, -1] for expert in experts], base[:, -1]

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
        job.on_event(StreamEvent(text, (score,), reason))

    def _requested_logprobs(
        self, job: GenerationJob, fused_V: Tensor, strong_V: Tensor, experts: list[Tensor], row: int
    ) -> Tensor:
        """The log-probabilities that this job asked for."""
        if job.source == "fused":
            return fused_V
        logits_V = strong_V if job.source == "strong" else experts[int(job.source)][row]
        return self._full_logprobs(logits_V)

    def _full_logprobs(self, logits_V: Tensor) -> Tensor:
        """Log-probabilities over all ids of the strong vocabulary."""
        logp_V = torch.log_softmax(logits_V.float(), -1)
        return torch.nn.functional.pad(logp_V, (0, self.fused.vocab_size - len(logp_V)), value=-torch.inf)

    def _next_token(self, job: GenerationJob, logp_V: Tensor, position: int) -> int:
        """As generate does: temperature, top-k, top-p, then the row's own draw."""
        if job.temperature == 0:
            return int(logp_V.argmax())
        scores_1V: Any = logp_V[None]
        ids: Any = None  # these three look at the scores only
        if job.temperature != 1:
            scores_1V = TemperatureLogitsWarper(float(job.temperature))(ids, scores_1V)
        if job.top_k:
            scores_1V = TopKLogitsWarper(job.top_k)(ids, scores_1V)
        if job.top_p < 1:
            scores_1V = TopPLogitsWarper(job.top_p)(ids, scores_1V)
        noise_1V = gumbel_sampling.gumbel(
            [gumbel_sampling.key(job.seed, job.sample, position)], len(logp_V), logp_V.device
        )
        return int(gumbel_sampling.sample(scores_1V, noise_1V))

    def _update_metrics(self, fused: FusionOutput) -> None:
        self.metrics.steps += 1
        self.metrics.tokens += len(self._running)
        self.metrics.alpha += float(fused.alpha_NT.sum())
        self.metrics.clipped += int(fused.clipped_N.sum())
