"""One request on its way through the server: its jobs, their events as they come, and the answer in OpenAI's shapes."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
import uuid
from collections.abc import AsyncIterator
from itertools import product
from typing import TYPE_CHECKING, Any

from mtft.fuse.decoding.token_trace import TokenTrace
from mtft.fuse.server.batch_engine import BatchEngine
from mtft.fuse.server.jobs import GenerationJob, ServerStopping, StreamEvent, TokenScore
from mtft.fuse.server.logprobs import LogprobShapes, TextOffset
from mtft.fuse.server.openai_protocol import CompletionRequest, RequestError

if TYPE_CHECKING:
    from fastapi import Request

    from mtft.fuse.fusion_core import FusionCore

GONE = 0.25  # seconds between two looks whether a client is still there


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
        if request.max_tokens:
            self.engine.submit(self.jobs)
        elif self.engine.draining:
            raise ServerStopping

    def cancel(self) -> None:
        self.engine.cancel(self.jobs)

    async def next(self, client: Request | None = None) -> tuple[int, StreamEvent]:
        """The next event. client: is looked after while it waits; if it has gone, its places are free at once."""
        while True:
            try:
                index, event = await asyncio.wait_for(self.events.get(), None if client is None else GONE)
            except TimeoutError:
                if client is not None and await client.is_disconnected():
                    self.cancel()
                    raise RequestError("the client has left", status=499) from None
                continue
            if event.error is not None:
                self.cancel()
                raise RequestError(event.error, status=event.status)
            return index, event

    async def complete(self, request: Request) -> dict[str, Any]:
        """The answer in one piece; a client that leaves frees its rows."""
        texts, reasons = [""] * len(self.jobs), ["length"] * len(self.jobs)
        scores: list[list[TokenScore]] = [[] for _ in self.jobs]
        unfinished = len(self.jobs) if self.request.max_tokens else 0
        while unfinished:
            index, event = await self.next(request)
            texts[index] += event.text
            scores[index] += event.tokens
            if event.finish_reason is not None:
                reasons[index] = event.finish_reason
                unfinished -= 1
        choices = []
        for index in range(len(self.jobs)):
            echoed: list[TokenScore] = []
            if self.request.echo:
                texts[index] = self.request.texts[index // self.request.body.n] + texts[index]
                if self.request.logprobs:  # the first token has no prefix, so it has no score
                    echoed = await asyncio.to_thread(self.engine.score_prompt, self.jobs[index])
            content = {"message": {"role": "assistant", "content": texts[index], "refusal": None}}
            choices.append(self._choice(index, texts[index], content, echoed + scores[index], reasons[index]))
        return self._head("") | {"choices": choices, "usage": self._usage(sum(map(len, scores)))}

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


def _sse(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"
