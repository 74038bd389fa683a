"""`mtft fuse serve`: an OpenAI-compatible server for a fused model (FastAPI and uvicorn, extra `serve`).

    /health  /metrics  /v1/models  /v1/completions  /v1/chat/completions

Models: the fusion under the recipe's name, `strong`, and every expert alone. It listens on the loopback interface
unless there is a bearer token; there is no CORS, and prompts are never logged. One thread decodes (batch_engine.py).
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import json
import os
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse

from mtft.fuse.alpha.spec import FusionError
from mtft.fuse.from_recipe import load_fusion
from mtft.fuse.fusion_core import FusionCore
from mtft.fuse.server.batch_engine import BatchEngine
from mtft.fuse.server.jobs import ServerBusy, ServerStopping
from mtft.fuse.server.openai_protocol import RequestError, ServerLimits, read_completion_request
from mtft.fuse.server.response import ResponseStream
from mtft.recipe.schema.recipe import Recipe


def make_app(fused: FusionCore, name: str, *, token: str | None = None, limits: ServerLimits | None = None) -> FastAPI:
    """The server's application. `name`: of the fusion among /v1/models. token: the bearer token, None = open."""
    limits = limits or ServerLimits()
    engine = BatchEngine(fused, rows=limits.rows, queue=limits.queue, wait=limits.wait_seconds)
    models: dict[str, str | int] = {name: "fused", "strong": "strong"}
    if fused.token_map is None:  # else the experts speak other tokens than the server
        models |= {f"expert:{Path(expert).name}-{t}": t for t, expert in enumerate(fused.weak.names)}

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        await asyncio.to_thread(engine.stop)

    shutting_down = RequestError("the server is shutting down", status=503, code="shutting_down")
    app = FastAPI(title="mtft", lifespan=lifespan, openapi_url=None, docs_url=None, redoc_url=None)
    app.state.engine = engine
    started = int(time.time())

    @app.exception_handler(RequestError)
    async def on_request_error(request: Request, error: RequestError) -> JSONResponse:
        headers = {"Retry-After": "1"} if error.status in (429, 503) else None
        return JSONResponse(error.body(), status_code=error.status, headers=headers)

    def check_token(request: Request) -> None:
        if token is None:
            return
        authorization = request.headers.get("authorization", "")
        if not hmac.compare_digest(authorization.encode(), f"Bearer {token}".encode()):
            raise RequestError("the bearer token is missing or wrong", status=401, code="invalid_api_key")

    @app.get("/health")
    async def health() -> dict[str, str]:
        if engine.draining:
            raise shutting_down
        return {"status": "ok"}

    @app.get("/metrics")
    async def metrics(request: Request) -> PlainTextResponse:
        check_token(request)
        now = vars(engine.metrics) | {"waiting": len(engine.waiting), "running": len(engine.running)}
        return PlainTextResponse("".join(f"mtft_fuse_{key} {value}\n" for key, value in now.items()))

    @app.get("/v1/models")
    async def list_models(request: Request) -> dict[str, Any]:
        check_token(request)
        rows = [{"id": key, "object": "model", "created": started, "owned_by": "mtft"} for key in models]
        return {"object": "list", "data": rows}

    @app.post("/v1/completions")
    @app.post("/v1/chat/completions")
    async def answer(request: Request) -> Any:
        check_token(request)
        body = await read_json(request, limits.body_bytes)
        chat = request.url.path.endswith("/chat/completions")
        checked = read_completion_request(body, fused, models, limits, chat=chat)
        response = ResponseStream(fused, engine, checked)
        try:
            response.start()
        except ServerBusy:
            raise RequestError("the server is busy: its queue is full", status=429, code="queue_full") from None
        except ServerStopping:
            raise shutting_down from None
        if checked.body.stream:
            first = await response.next(request)  # so that a failure still has its status
            return StreamingResponse(response.stream(first), media_type="text/event-stream")
        return JSONResponse(await response.complete(request))

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


def bind(host: str, port: int) -> socket.socket:
    """The address, taken before any weight is loaded. FusionError if it can't be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        raise FusionError(
            f"{host}:{port} can't be listened on: {error.strerror or error}", do="give another --port"
        ) from error
    return bound


def serve(
    recipe: Recipe,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key_env: str | None = None,
    limits: ServerLimits | None = None,
    announce: Callable[[str], None] | None = None,
) -> None:
    """Serve a recipe's fusion until SIGTERM or SIGINT; what runs then is finished first (graceful_shutdown.py).

    announce: is told the address as soon as requests are answered.
    """
    from uvicorn import Config

    from mtft.fuse.server.graceful_shutdown import DrainingServer

    token = os.environ.get(api_key_env) if api_key_env else None
    if api_key_env and not token:
        raise FusionError(f"the environment variable {api_key_env} is empty", do=f"export {api_key_env}=...")
    check_binding(host, token)
    with bind(host, port) as bound:
        app = make_app(load_fusion(recipe), recipe.name, token=token, limits=limits)
        # what still runs when the engine is done are answers on the wire
        config = Config(app, log_level="warning", timeout_graceful_shutdown=10)
        server = DrainingServer(config, app.state.engine)
        if announce is not None:
            announce(f"serving {recipe.name} on http://{host}:{bound.getsockname()[1]}; SIGTERM or Ctrl-C ends it")
        server.run(sockets=[bound])
