"""`mtft fuse serve`: an OpenAI-compatible server for a fused model (FastAPI and uvicorn, extra `serve`).

    /health  /metrics  /v1/models  /v1/completions  /v1/chat/completions

Models: the fusion under the recipe's name, `strong`, and every expert alone. It listens on the loopback interface
unless there is a bearer token; there is no CORS, and prompts are never logged. One thread decodes (engine.py).
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import json
import os
import secrets
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse

from mtft.recipe.schema import Recipe

from .engine import Busy, Engine, Event, Job, TokenScore
from .model import FusedCausalLM
from .protocol import Limits, RequestError, Wish, chat_logprobs, completion_logprobs, read_wish
from .recipe import open_fusion
from .spec import FusionError
from .trace import TokenTrace

GONE = 0.25  # seconds between two looks whether a client is still there


def make_app(fused: FusedCausalLM, name: str, *, token: str | None = None, limits: Limits | None = None) -> FastAPI:
    """The server's application. `name`: of the fusion among /v1/models. token: the bearer token, None = open."""
    limits = limits or Limits()
    engine = Engine(fused, queue=limits.queue, wait=limits.wait_seconds)
    models: dict[str, str | int] = {name: "fused", "strong": "strong"}
    models |= {f"expert:{Path(expert).name}-{t}": t for t, expert in enumerate(fused.weak.names)}

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        await asyncio.to_thread(engine.stop)

    app = FastAPI(title="mtft", lifespan=lifespan, openapi_url=None, docs_url=None, redoc_url=None)
    started = int(time.time())

    @app.exception_handler(RequestError)
    async def refused(request: Request, error: RequestError) -> JSONResponse:
        headers = {"Retry-After": "1"} if error.status in (429, 503) else None
        return JSONResponse(error.body(), status_code=error.status, headers=headers)

    def admit(request: Request) -> None:
        if token is None:
            return
        given = request.headers.get("authorization", "")
        if not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
            raise RequestError("the bearer token is missing or wrong", status=401, code="invalid_api_key")

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/metrics")
    async def metrics(request: Request) -> PlainTextResponse:
        admit(request)
        now = vars(engine.metrics) | {"waiting": engine.waiting, "running": engine.running}
        return PlainTextResponse("".join(f"mtft_fuse_{key} {value}\n" for key, value in now.items()))

    @app.get("/v1/models")
    async def list_models(request: Request) -> dict[str, Any]:
        admit(request)
        rows = [{"id": key, "object": "model", "created": started, "owned_by": "mtft"} for key in models]
        return {"object": "list", "data": rows}

    @app.post("/v1/completions")
    async def completions(request: Request) -> Any:
        return await answer(request, chat=False)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Any:
        return await answer(request, chat=True)

    async def answer(request: Request, *, chat: bool) -> Any:
        admit(request)
        wish = read_wish(await read_json(request, limits.body_bytes), fused, models, limits, chat=chat)
        wish.created, wish.id = int(time.time()), f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
        call = Call(fused, engine, wish)
        try:
            call.start()
        except Busy:
            raise RequestError("the server is busy: its queue is full", status=429, code="queue_full") from None
        if wish.stream:
            first = await call.next()  # so that a failure still has its status
            return StreamingResponse(call.stream(first), media_type="text/event-stream")
        return JSONResponse(await call.whole(request))

    return app


async def read_json(request: Request, limit: int) -> Any:
    """The body, counted while it is read: a length that the client claims is not believed."""
    data = bytearray()
    async for part in request.stream():
        data += part
        if len(data) > limit:
            raise RequestError(f"the body is larger than {limit} bytes", status=413, code="body_too_large")
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the body is no JSON: {error}", code="invalid_json") from error


class Call:
    """One request on its way: its jobs, and their events as they come."""

    def __init__(self, fused: FusedCausalLM, engine: Engine, wish: Wish) -> None:
        self.fused, self.engine, self.wish = fused, engine, wish
        self.events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self.jobs: list[Job] = []

    def start(self) -> None:
        wish, loop = self.wish, asyncio.get_running_loop()
        seed = secrets.randbits(63) if wish.seed is None else wish.seed
        for i, ids in enumerate(wish.prompts):
            for sample in range(wish.n):
                index = i * wish.n + sample

                def tell(event: Event, index: int = index) -> None:
                    loop.call_soon_threadsafe(self.events.put_nowait, (index, event))

                self.jobs.append(
                    Job(
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

    async def next(self) -> tuple[int, Event]:
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

    async def stream(self, first: tuple[int, Event]) -> AsyncIterator[str]:
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

    def _chunk(self, index: int, event: Event) -> dict[str, Any]:
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


def check_binding(host: str, token: str | None) -> None:
    """Anything but the loopback interface needs a token."""
    try:
        local = ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = host == "localhost"
    if not local and not token:
        raise FusionError(
            f"host {host} can be reached from outside, and no token protects it",
            do="put a token into an environment variable and name it with --api-key-env, or use --host 127.0.0.1",
        )


def serve(
    recipe: Recipe,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key_env: str | None = None,
    adapters: Sequence[str | Path] | None = None,
    limits: Limits | None = None,
) -> None:
    """Serve a recipe's fusion until SIGTERM or SIGINT; what runs then is finished first."""
    import uvicorn

    token = os.environ.get(api_key_env) if api_key_env else None
    if api_key_env and not token:
        raise FusionError(f"the environment variable {api_key_env} is empty", do=f"export {api_key_env}=...")
    check_binding(host, token)
    app = make_app(open_fusion(recipe, adapters), recipe.name, token=token, limits=limits)
    uvicorn.run(app, host=host, port=port, log_level="warning", timeout_graceful_shutdown=120)
