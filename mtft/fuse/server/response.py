"""One request on its way through the server: its jobs, their events as they come, and the answer in OpenAI's shapes."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from mtft.fuse.decoding.token_trace import TokenTrace
from mtft.fuse.server.batch_engine import BatchEngine
from mtft.fuse.server.jobs import GenerationJob, StreamEvent, TokenScore
from mtft.fuse.server.openai_protocol import CompletionRequest, RequestError, chat_logprobs, completion_logprobs

if TYPE_CHECKING:
    from fastapi import Request

    from mtft.fuse.fusion_core import FusionCore

GONE = 0.25  # seconds between two looks whether a client is still there


class ResponseStream:
    """One request on its way: its jobs, and their events as they come."""

    def __init__(self, fused: FusionCore, engine: BatchEngine, wish: CompletionRequest) -> None:
        self.fused, self.engine, self.wish = fused, engine, wish
        self.events: asyncio.Queue[tuple[int, StreamEvent]] = asyncio.Queue()
        self.jobs: list[GenerationJob] = []

    def start(self) -> None:
        wish, loop = self.wish, asyncio.get_running_loop()
        seed = secrets.randbits(63) if wish.seed is None else wish.seed
        for i, ids in enumerate(wish.prompts):
            for sample in range(wish.n):
                index = i * wish.n + sample

                def tell(event: StreamEvent, index: int = index) -> None:
                    loop.call_soon_threadsafe(self.events.put_nowait, (index, event))

                self.jobs.append(
                    GenerationJob(
                        ids,
                        wish.max_tokens,
                        wish.spec,
                        tell,
                        temperature=wish.temperature,
                        top_p=wish.top_p,
                        top_k=wish.top_k,
                        seed=seed,
                        sample=sample,
                        stops=wish.stops,
                        top=wish.top,
                        source=wish.source,
                        trace=TokenTrace([0], self.fused.tokenizer) if wish.trace else None,
                    )
                )
        if wish.max_tokens:
            self.engine.submit(self.jobs)

    def cancel(self) -> None:
        for job in self.jobs:
            job.cancelled = True

    async def next(self) -> tuple[int, StreamEvent]:
        index, event = await self.events.get()
        if event.error is not None:
            self.cancel()
            raise RequestError(event.error, status=event.status)
        return index, event

    async def whole(self, request: Request) -> dict[str, Any]:
        """The answer in one piece; a client that leaves frees its rows."""
        texts, reasons = [""] * len(self.jobs), ["length"] * len(self.jobs)
        scores: list[list[TokenScore]] = [[] for _ in self.jobs]
        left = len(self.jobs) if self.wish.max_tokens else 0
        while left:
            try:
                index, event = await asyncio.wait_for(self.next(), GONE)
            except TimeoutError:
                if await request.is_disconnected():
                    self.cancel()
                    raise RequestError("the client has left", status=499) from None
                continue
            texts[index] += event.text
            scores[index] += event.tokens
            if event.finish_reason is not None:
                reasons[index] = event.finish_reason
                left -= 1
        choices = []
        for index in range(len(self.jobs)):
            echoed = await asyncio.to_thread(self._echo, index // self.wish.n) if self.wish.echo else []
            choices.append(self._choice(index, texts[index], scores[index], reasons[index], echoed))
        head = self._head("chat.completion" if self.wish.chat else "text_completion")
        return head | {"choices": choices, "usage": self._usage(sum(map(len, scores)))}

    async def stream(self, first: tuple[int, StreamEvent]) -> AsyncIterator[str]:
        """Server-sent events: chunks, the usage if asked for, [DONE]."""
        wish, made = self.wish, 0
        kind = "chat.completion.chunk" if wish.chat else "text_completion"
        try:
            if wish.chat:
                for index in range(len(self.jobs)):
                    role = {"index": index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
                    yield _sse(self._head(kind) | {"choices": [role]})
            left, news = len(self.jobs), first
            while True:
                index, event = news
                made += len(event.tokens)
                left -= event.finish_reason is not None
                yield _sse(self._head(kind) | {"choices": [self._chunk(index, event)]})
                if not left:
                    break
                try:
                    news = await self.next()
                except RequestError as error:  # the status is out already: the error goes into the stream
                    yield _sse(error.body())
                    return
            if wish.usage:
                yield _sse(self._head(kind) | {"choices": [], "usage": self._usage(made)})
            yield "data: [DONE]\n\n"
        finally:
            self.cancel()

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.wish.id, "object": kind, "created": self.wish.created, "model": self.wish.model}

    def _usage(self, made: int) -> dict[str, int]:
        prompt = sum(map(len, self.wish.prompts))
        return {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made}

    def _choice(
        self, index: int, text: str, scores: list[TokenScore], reason: str, echoed: list[TokenScore]
    ) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": index, "finish_reason": reason, "logprobs": None}
        if self.wish.chat:
            choice["message"] = {"role": "assistant", "content": text, "refusal": None}
            choice["logprobs"] = chat_logprobs(self.fused, scores) if self.wish.logprobs else None
        else:
            prompt = self.wish.texts[index // self.wish.n] if self.wish.echo else ""
            choice["text"] = prompt + text
            if self.wish.logprobs:
                choice["logprobs"] = completion_logprobs(self.fused, echoed + scores)
        trace = self.jobs[index].trace
        return choice if trace is None else choice | {"trace": trace.tokens[0]}

    def _chunk(self, index: int, event: StreamEvent) -> dict[str, Any]:
        chunk: dict[str, Any] = {"index": index, "finish_reason": event.finish_reason, "logprobs": None}
        scores = list(event.tokens)
        if self.wish.chat:
            chunk["delta"] = {"content": event.text} if event.text else {}
            chunk["logprobs"] = chat_logprobs(self.fused, scores) if self.wish.logprobs else None
        else:
            chunk["text"] = event.text
            chunk["logprobs"] = completion_logprobs(self.fused, scores) if self.wish.logprobs else None
        trace = self.jobs[index].trace
        if trace is not None and event.finish_reason is not None:
            chunk["trace"] = trace.tokens[0]
        return chunk

    def _echo(self, prompt: int) -> list[TokenScore]:
        """Scores of the prompt's own tokens; the first has no prefix, so it has none."""
        return self.engine.score_prompt(self.jobs[prompt * self.wish.n]) if self.wish.logprobs else []


def _sse(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"
