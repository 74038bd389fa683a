"""One request on its way through the server: its jobs, their events as they come, and the answer in OpenAI's shapes."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING, Any

from fastapi.responses import StreamingResponse

from mtft.fuse.decoding.token_trace import TokenTrace
from mtft.fuse.server.batch_engine import BatchEngine
from mtft.fuse.server.jobs import EngineFailed, GenerationJob, ServerStopping, StreamEvent, TokenScore
from mtft.fuse.server.logprobs import LogprobShapes, TextOffset
from mtft.fuse.server.openai_protocol import CompletionRequest, RequestError

if TYPE_CHECKING:
    from fastapi import Request
    from starlette.types import Receive, Scope, Send

    from mtft.fuse.fusion_core import FusionCore


class ResponseStream:
    """One request on its way: its jobs, and their events as they come."""

    def __init__(self, fused: FusionCore, engine: BatchEngine, request: CompletionRequest) -> None:
        self.fused, self.engine, self.request = fused, engine, request
        self.events: asyncio.Queue[tuple[int, StreamEvent]] = asyncio.Queue()
        self.jobs: list[GenerationJob] = []
        self.logprobs = LogprobShapes(fused.tokenizer)
        self.offsets = [TextOffset() for _ in range(len(request.prompts) * request.body.n)]
        self.id = f"{'chatcmpl' if request.chat else 'cmpl'}-{uuid.uuid4().hex}"
        self.created = int(time.time())

    def start(self) -> None:
        """Hand in the jobs: n samples of every prompt."""
        request, body, loop = self.request, self.request.body, asyncio.get_running_loop()
        seed = secrets.randbits(63) if body.seed is None else body.seed
        for index, (prompt, sample) in enumerate(product(request.prompts, range(body.n))):

            def on_event(event: StreamEvent, index: int = index) -> None:
                loop.call_soon_threadsafe(self.events.put_nowait, (index, event))

            self.jobs.append(
                GenerationJob(
                    prompt.ids,
                    request.max_tokens,
                    request.spec,
                    on_event,
                    temperature=body.temperature,
                    top_p=body.top_p,
                    top_k=body.top_k,
                    seed=seed,
                    sample=sample,
                    stops=body.stop,
                    top=request.top,
                    source=request.source,
                    trace=TokenTrace([0], self.fused.tokenizer) if body.trace else None,
                    small_ids=prompt.small_ids,
                )
            )
        if request.max_tokens or request.logprobs:
            self.engine.submit(self.jobs, score=not request.max_tokens)
        elif self.engine.draining:
            raise ServerStopping

    def cancel(self) -> None:
        """Nobody waits for it any more: its places are free at once. May be called at any time, and twice."""
        self.engine.cancel(self.jobs)

    @asynccontextmanager
    async def watched(self, request: Request) -> AsyncIterator[None]:
        """A client that leaves meanwhile ends the block (499); whatever ends it early frees the places."""

        async def watch() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                continue
            self.cancel()
            self.events.put_nowait((0, StreamEvent(error="the client has left", status=499)))

        watcher = asyncio.create_task(watch())
        try:
            yield
        except BaseException:
            self.cancel()
            raise
        finally:
            watcher.cancel()

    async def next(self) -> tuple[int, StreamEvent]:
        """The next event. RequestError if it is a failure."""
        index, event = await self.events.get()
        if event.error is not None:
            self.cancel()
            raise RequestError(event.error, status=event.status, code="engine_failed" if event.status == 500 else None)
        return index, event

    async def complete(self) -> dict[str, Any]:
        """The answer in one piece."""
        texts, reasons = [""] * len(self.jobs), ["length"] * len(self.jobs)
        scores: list[list[TokenScore]] = [[] for _ in self.jobs]
        echoed: list[tuple[TokenScore, ...]] = [() for _ in self.jobs]
        scored = not self.request.max_tokens  # that is all that was asked of the engine then
        unfinished = 0 if scored and not self.request.logprobs else len(self.jobs)
        while unfinished:
            index, event = await self.next()
            if event.prompt is not None:
                echoed[index] = event.prompt
            texts[index] += event.text
            scores[index] += event.tokens
            if event.finish_reason is not None:
                reasons[index] = event.finish_reason
            unfinished -= event.finish_reason is not None or event.prompt is not None
            if not unfinished and not scored and self.request.echo and self.request.logprobs:
                scored, unfinished = True, len(self.jobs)
                self._score_too()
        choices = []
        for index in range(len(self.jobs)):
            if self.request.echo:
                texts[index] = self.request.texts[index // self.request.body.n] + texts[index]
            content = {"message": {"role": "assistant", "content": texts[index], "refusal": None}}
            shown = [*echoed[index], *scores[index]]  # the first token has no prefix, so it has no score
            choices.append(self._choice(index, texts[index], content, shown, reasons[index]))
        return self._head("") | {"choices": choices, "usage": self._usage(sum(map(len, scores)))}

    def _score_too(self) -> None:
        self.jobs = [replace(job, cancelled=False) for job in self.jobs]
        try:
            self.engine.score_too(self.jobs)
        except (EngineFailed, ServerStopping) as error:
            raise RequestError(f"the engine failed: {error}", status=503) from error

    async def stream(self, first: tuple[int, StreamEvent]) -> AsyncIterator[str]:
        """Server-sent events: chunks, the usage if asked for, [DONE]."""
        request, generated = self.request, 0
        try:
            if request.chat:
                for index in range(len(self.jobs)):
                    role = {"index": index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
                    yield _sse(self._head(".chunk") | {"choices": [role]})
            unfinished, item = len(self.jobs), first
            while True:
                index, event = item
                generated += len(event.tokens)
                unfinished -= event.finish_reason is not None
                delta = {"delta": {"content": event.text} if event.text else {}}
                choice = self._choice(index, event.text, delta, list(event.tokens), event.finish_reason)
                yield _sse(self._head(".chunk") | {"choices": [choice]})
                if not unfinished:
                    break
                try:
                    item = await self.next()
                except RequestError as error:  # the status is out already: the error goes into the stream
                    yield _sse(error.body())
                    return
            if request.body.stream_options is not None and request.body.stream_options.include_usage:
                yield _sse(self._head(".chunk") | {"choices": [], "usage": self._usage(generated)})
            yield "data: [DONE]\n\n"
        finally:
            self.cancel()

    def _head(self, part: str) -> dict[str, Any]:
        kind = f"chat.completion{part}" if self.request.chat else "text_completion"
        return {"id": self.id, "object": kind, "created": self.created, "model": self.request.model}

    def _usage(self, generated: int) -> dict[str, int]:
        prompt = sum(len(prompt.ids) for prompt in self.request.prompts)
        return {"prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated}

    def _choice(
        self, index: int, text: str, chat_content: dict[str, Any], scores: list[TokenScore], reason: str | None
    ) -> dict[str, Any]:
        """The answer number `index`, or a chunk of it; the trace comes with its end."""
        choice: dict[str, Any] = {"index": index, "finish_reason": reason, "logprobs": None}
        choice |= chat_content if self.request.chat else {"text": text}
        if self.request.logprobs and self.request.chat:
            choice["logprobs"] = self.logprobs.chat(scores)
        elif self.request.logprobs:
            choice["logprobs"] = self.logprobs.completion(scores, self.offsets[index])
        trace = self.jobs[index].trace
        return choice if trace is None or reason is None else choice | {"trace": trace.tokens[0]}


class ServerSentEvents(StreamingResponse):
    """The stream of an answer. Its places are free when it ends, also if it never began: nothing else ends it then."""

    def __init__(self, answer: ResponseStream, first: tuple[int, StreamEvent]) -> None:
        super().__init__(answer.stream(first), media_type="text/event-stream")
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answer.cancel()


def _sse(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"
