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
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from mtft.data.readers.json_stream import unique_keys
from mtft.fuse.alpha.spec import FusionError
from mtft.fuse.from_recipe import load_fusion
from mtft.fuse.fusion_core import FusionCore
from mtft.fuse.server.batch_engine import BatchEngine
from mtft.fuse.server.jobs import EngineFailed, ServerBusy, ServerStopping
from mtft.fuse.server.openai_protocol import RequestError, ServerLimits, read_completion_request
from mtft.fuse.server.response import ResponseStream, ServerSentEvents
from mtft.recipe.schema.recipe import Recipe

BODY_SECONDS = 60.0  # that a client may take to send its request


def make_app(fused: FusionCore, name: str, *, token: str | None = None, limits: ServerLimits | None = None) -> FastAPI:
    """The server's application. `name`: of the fusion among /v1/models. token: the bearer token, None = open."""
    limits = limits or ServerLimits()
    engine = BatchEngine(fused, rows=limits.rows, queue=limits.queue, wait=limits.wait_seconds)
    reader = ThreadPoolExecutor(1, "fuse-reader")  # a megabyte of messages takes seconds: streams don't wait for it
    models: dict[str, str | int] = {name: "fused", "strong": "strong"}
    if fused.token_map is None:  # else the experts speak other tokens than the server
        models |= {f"expert:{Path(expert).name}-{t}": t for t, expert in enumerate(fused.weak.names)}

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        reader.shutdown(wait=False, cancel_futures=True)
        await asyncio.to_thread(engine.stop)

    shutting_down = RequestError("the server is shutting down", status=503, code="shutting_down")
    app = FastAPI(title="mtft", lifespan=lifespan, openapi_url=None, docs_url=None, redoc_url=None)
    app.state.engine = engine
    answer_in_json(app)
    started = int(time.time())

    def check_token(request: Request) -> None:
        if token is None:
            return
        authorization = request.headers.get("authorization", "")
        if not hmac.compare_digest(authorization.encode(), f"Bearer {token}".encode()):
            raise RequestError("the bearer token is missing or wrong", status=401, code="invalid_api_key")

    def check_serving() -> None:
        """Nothing is served while it drains, or while the engine can't."""
        if engine.draining:
            raise shutting_down
        if engine.fault is not None:
            raise RequestError(f"the engine failed: {engine.fault}", status=503, code="engine_failed")

    @app.get("/health")
    async def health() -> dict[str, str]:
        check_serving()
        return {"status": "ok"}

    @app.get("/metrics")
    async def metrics(request: Request) -> PlainTextResponse:
        check_token(request)
        waiting = len(engine.waiting) + len(engine.scoring)
        now = vars(engine.metrics) | {"waiting": waiting, "running": len(engine.running)}
        return PlainTextResponse("".join(f"mtft_fuse_{key} {value}\n" for key, value in now.items()))

    @app.get("/v1/models")
    async def list_models(request: Request) -> dict[str, Any]:
        check_token(request)
        check_serving()
        rows = [{"id": key, "object": "model", "created": started, "owned_by": "mtft"} for key in models]
        return {"object": "list", "data": rows}

    @app.post("/v1/completions")
    @app.post("/v1/chat/completions")
    async def answer(request: Request) -> Any:
        check_token(request)
        check_serving()
        body = await read_json(request, limits.body_bytes)
        chat = request.url.path.endswith("/chat/completions")
        read = partial(read_completion_request, body, fused, models, limits, chat=chat)
        checked = await asyncio.get_running_loop().run_in_executor(reader, read)
        response = ResponseStream(fused, engine, checked)
        try:
            response.start()
        except ServerBusy:
            raise RequestError("the server is busy: its queue is full", status=429, code="queue_full") from None
        except (EngineFailed, ServerStopping):
            check_serving()
            raise
        async with response.watched(request):
            if not checked.body.stream:
                return JSONResponse(await response.complete())
            first = await response.next()  # so that a failure still has its status
        return ServerSentEvents(response, first)

    return app


def answer_in_json(app: FastAPI) -> None:
    """Every failure has OpenAI's form, also that of a path that is not there and that of a bug."""

    @app.exception_handler(RequestError)
    async def on_request_error(request: Request, error: RequestError) -> JSONResponse:
        headers = {"Retry-After": "1"} if error.status in (429, 503) else None
        return JSONResponse(error.body(), status_code=error.status, headers=headers)

    @app.exception_handler(HTTPException)
    async def on_http_error(request: Request, error: HTTPException) -> JSONResponse:
        body = RequestError(f"{request.method} {request.url.path}: {error.detail}", status=error.status_code).body()
        return JSONResponse(body, status_code=error.status_code, headers=error.headers)

    @app.exception_handler(ClientDisconnect)
    async def on_disconnect(request: Request, error: ClientDisconnect) -> JSONResponse:
        return JSONResponse(RequestError("the client has left", status=499).body(), status_code=499)

    @app.exception_handler(Exception)
    async def on_bug(request: Request, error: Exception) -> JSONResponse:
        body = RequestError(f"the server failed: {type(error).__name__}", status=500, code="server_error").body()
        return JSONResponse(body, status_code=500)


async def read_json(request: Request, limit: int, seconds: float = BODY_SECONDS) -> Any:
    """The body, counted while it is read: a length that the client claims is not believed, nor that it ends."""
    kind = request.headers.get("content-type")
    # a web page may send anything else to a server on this machine without asking
    if kind is not None and kind.partition(";")[0].strip().lower() != "application/json":
        raise RequestError(
            f"the content type is {kind}: send application/json", status=415, code="unsupported_content_type"
        )
    too_large = RequestError(f"the body is larger than {limit} bytes", status=413, code="body_too_large")
    claimed = request.headers.get("content-length", "")
    if claimed.isdecimal() and int(claimed[:19]) > limit:
        raise too_large
    data = bytearray()
    try:
        async with asyncio.timeout(seconds):
            async for part in request.stream():
                data += part
                if len(data) > limit:
                    raise too_large
    except TimeoutError:
        raise RequestError(f"the body took longer than {seconds:g} seconds", status=408, code="timeout") from None
    try:
        return json.loads(data.decode("utf-8-sig"), object_pairs_hook=unique_keys)
    except UnicodeDecodeError as error:
        what = f"invalid UTF-8 at byte {error.start + 1}"
    except RecursionError:
        what = "nested too deeply"
    except ValueError as error:  # json's own, a key twice, an integer of 5000 digits
        what = str(error).partition(" for integer string conversion")[0]
    raise RequestError(f"the body is no JSON: {what}", code="invalid_json")


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
    except (OSError, OverflowError, UnicodeError) as error:
        raise _taken(host, port, error) from error
    return bound


def _taken(host: str, port: int, error: Exception) -> FusionError:
    what = getattr(error, "strerror", None) or error
    key = "host" if isinstance(error, socket.gaierror | UnicodeError) else "port"
    return FusionError(f"{host}:{port} can't be listened on: {what}", do=f"give another --{key}")


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

    RuntimeError when its device or its engine fails for good.

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
        config = Config(app, log_level="warning", timeout_graceful_shutdown=10, http="h11", ws="none")
        server = DrainingServer(config, app.state.engine)
        try:
            bound.listen(config.backlog)  # two may have bound a port, until one listens
        except OSError as error:
            raise _taken(host, port, error) from error
        if announce is not None:
            announce(f"serving {recipe.name} on http://{host}:{bound.getsockname()[1]}; SIGTERM or Ctrl-C ends it")
        server.run(sockets=[bound])
        if app.state.engine.lost:
            raise RuntimeError(f"the engine can't work again in this process: {app.state.engine.fault}")
