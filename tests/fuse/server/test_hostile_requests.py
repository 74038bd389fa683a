"""Bodies that mean harm: each gets a 4xx in OpenAI's form, soon, and the next request is answered as before."""

import asyncio
import contextlib
import json
import socket
import threading
import time
from types import SimpleNamespace

import httpx
import pytest
import uvicorn

from mtft.fuse.fused_model import FusedCausalLM
from mtft.fuse.server import app as app_module
from mtft.fuse.server.app import make_app, read_json
from mtft.fuse.server.graceful_shutdown import DrainingServer
from mtft.fuse.server.openai_protocol import RequestError
from tests.fuse import tiny

GOOD = {"prompt": "the quick", "max_tokens": 3, "temperature": 0}
FOX = {"role": "user", "content": "fox"}


@pytest.fixture(scope="module")
def fused(tmp_path_factory):
    places = tiny.folders_with_text(tmp_path_factory.mktemp("hostile"))
    return FusedCausalLM.load(places["strong"], places["small"], [places["expert"]], dtype="fp32", device="cpu")


@pytest.fixture(scope="module")
def server(fused):
    app = make_app(fused, "fusion")
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        config = uvicorn.Config(app, log_level="critical", http="h11", ws="none", timeout_graceful_shutdown=1)
        server = DrainingServer(config, app.state.engine, silence=0.6)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
        thread.start()
        while not server.started:
            time.sleep(0.01)
        server.port, server.url = bound.getsockname()[1], f"http://127.0.0.1:{bound.getsockname()[1]}/v1"
        yield server
        server.should_exit = True
        thread.join()


@pytest.fixture
def refused(server):
    """Sends a body; it must be refused, and a good request behind it be answered."""

    def send(body, path="completions", **headers):
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        found = httpx.post(f"{server.url}/{path}", content=raw, headers=headers, timeout=60)
        assert 400 <= found.status_code < 500, found.text
        assert set(found.json()["error"]) == {"message", "type", "param", "code"}
        assert len(found.text) < 2000
        answer = httpx.post(f"{server.url}/completions", json=GOOD, timeout=60)
        assert answer.json()["choices"][0]["text"] == server.expected
        return found.status_code, found.json()["error"]

    server.expected = httpx.post(f"{server.url}/completions", json=GOOD, timeout=60).json()["choices"][0]["text"]
    return send


LONG = "k" * 100_000
BODIES = {
    "brackets": (b"[" * 200_000, "nested too deeply"),
    "objects": (b'{"user":' * 100_000, "nested too deeply"),
    "deep prompt": (b'{"prompt": ' + b"[" * 900 + b"]" * 900 + b"}", "prompt is list"),
    "deep stop": (b'{"prompt": "a", "stop": ' + b"[" * 900 + b"]" * 900 + b"}", "stop must be"),
    "digits": (b'{"prompt": "a", "seed": ' + b"9" * 100_000 + b"}", "4300 digits"),
    "64 bits": (b'{"prompt": "a", "top_k": ' + b"9" * 400 + b"}", "more than 64 bits"),
    "exponent": (b'{"prompt": "a", "temperature": 1e999}', "not a finite number"),
    "NaN": (b'{"prompt": "a", "top_p": NaN}', "not a finite number"),
    "no UTF-8": (b'{"prompt": "\xff"}', "invalid UTF-8 at byte 13"),
    "UTF-16": ('{"prompt": "a"}'.encode("utf-16"), "invalid UTF-8 at byte 1"),
    "twice": (b'{"prompt": "a", "prompt": "b"}', "'prompt' stands twice"),
    "nothing": (b"", "no JSON"),
    "zero bytes": (b"\0" * 1000, "no JSON"),
    "a misspelt key": ({"prompt": "a", "max_token": 5}, "did you mean max_tokens?"),
    "an unknown key": ({"prompt": "a", "wish": 5}, "known are n, max_tokens, temperature"),
    "a long key": ({"prompt": "a", LONG: 5}, "unknown parameter kkk"),
    "many keys": ({"prompt": "a"} | {f"k{i}": i for i in range(50_000)}, "unknown parameter k0"),
    "a long model": ({"prompt": "a", "model": LONG}, "no model"),
    "a long alpha": ({"prompt": "a", "alpha": LONG}, "alpha is"),
    "alpha of lists": ({"prompt": "a", "alpha": [[[1]]]}, "alpha"),
    "a long rule": ({"prompt": "a", "alpha_rule": LONG}, "alpha_rule is"),
    "many stops": ({"prompt": "a", "stop": ["x"] * 50_000}, "at most 16"),
    "many prompts": ({"prompt": ["a"] * 100_000}, "more than the queue"),
    "many lists of ids": ({"prompt": [[1]] * 100_000}, "more than the queue"),
    "many ids": ({"prompt": [1] * 200_000}, "the prompt has 200000 tokens: the context holds 128"),
    "a full context": ({"prompt": [5] * 128, "stream": True}, "the prompt has 128 tokens: the context holds 128"),
    "prompts of kinds": ({"prompt": ["a", 5, {}]}, "prompt is int"),
}


@pytest.mark.parametrize("name", BODIES)
def test_bodies(refused, name):
    body, message = BODIES[name]
    status, error = refused(body)
    assert status == (404 if name == "a long model" else 400)
    assert message in error["message"]


@pytest.mark.parametrize(
    "messages",
    [
        [FOX, {"role": "assistant", "content": "x"}] * 5000,
        [FOX] * 10_000,
        [{"role": "user", "content": [{"type": "text", "text": "a"}] * 10_000}],
        [{"role": LONG, "content": LONG}],
        [{"role": "user", "content": json.loads("[" * 900 + "]" * 900)}],
        [[FOX]],
        ["fox"],
        "fox",
        {"0": FOX},
        [{"role": "user", "content": "a", "tool_calls": 5}],
        [{"role": "assistant", "content": None, "tool_calls": [{"function": {"arguments": "["}}]}],
    ],
)
def test_messages(refused, messages):
    assert refused({"messages": messages, "max_tokens": 5}, "chat/completions")[0] == 400


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; x=y", ""])
def test_other_content_types_are_refused(refused, kind):
    """A web page may send these to a server on this machine, without asking it."""
    status, error = refused(GOOD, **{"content-type": kind})
    assert (status, error["code"]) == (415, "unsupported_content_type")


def test_json_may_name_its_charset(server):
    headers = {"content-type": "Application/JSON; charset=utf-8"}
    assert httpx.post(f"{server.url}/completions", content=json.dumps(GOOD), headers=headers).status_code == 200


@pytest.mark.parametrize("path, method, status", [("nothing", "GET", 404), ("completions", "GET", 405)])
def test_paths_that_are_not_there(server, path, method, status):
    found = httpx.request(method, f"{server.url}/{path}")
    assert (found.status_code, found.json()["error"]["type"]) == (status, "invalid_request_error")


def talk(server, data, seconds=10):
    """What comes back until the server closes."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=seconds) as client:
        client.sendall(data)
        return b"".join(iter(lambda: client.recv(65536), b""))


def test_a_length_beyond_the_limit_is_refused_before_it_comes(server):
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999999999999\r\n\r\n{"
    assert b"413" in talk(server, head).partition(b"\r\n")[0]


def test_a_body_without_end_is_refused(server):
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as client:
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        chunk = b"10000\r\n" + b" " * 65536 + b"\r\n"
        found = b""
        for _ in range(200):
            try:
                client.sendall(chunk)
            except OSError:  # it has closed
                break
        with contextlib.suppress(OSError):
            found = client.recv(100)
    assert not found or b"413" in found
    assert httpx.post(f"{server.url}/completions", json=GOOD).status_code == 200


@pytest.mark.parametrize("data", [b"", b"GET /health HTTP/1.1\r\nHost: x\r\nX-Header: a"])
def test_a_client_that_never_says_what_it_wants_is_hung_up(server, data):
    """Slowloris: uvicorn alone waits for ever."""
    assert talk(server, data) == b""


def test_a_connection_that_is_used_is_kept(monkeypatch):
    """Its requests are short, and lie between two looks of the server; in all it is there for longer than silence."""
    server, now = DrainingServer(uvicorn.Config("x"), SimpleNamespace(idle=True), silence=10), [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    closed = []

    def connection(name):
        return SimpleNamespace(name=name, cycle=None, transport=SimpleNamespace(close=lambda: closed.append(name)))

    class Connection(SimpleNamespace):
        __hash__ = object.__hash__

    used, busy, silent = (Connection(**vars(connection(name))) for name in ("used", "busy", "silent"))
    busy.cycle = SimpleNamespace(response_complete=False)
    server.server_state.connections = {used, busy, silent}
    for _ in range(12):
        now[0] += 1
        used.cycle = SimpleNamespace(response_complete=True)  # of another request each time
        server._close_silent()
    assert set(closed) == {"silent"}


def test_a_body_that_never_comes_ends():
    class Silent:
        headers = {}

        async def stream(self):
            yield b"{"
            await asyncio.sleep(60)

    with pytest.raises(RequestError) as late:
        asyncio.run(read_json(Silent(), 100, seconds=0.05))
    assert late.value.status == 408


def test_a_long_request_holds_up_nobody(server, fused, monkeypatch):
    """It is read on a thread of its own; meanwhile the server says that it is well."""
    begun, go_on = threading.Event(), threading.Event()
    real = app_module.read_completion_request

    def slow(*arguments, **options):
        begun.set()
        go_on.wait(10)
        return real(*arguments, **options)

    monkeypatch.setattr(app_module, "read_completion_request", slow)
    answers = []
    asking = threading.Thread(target=lambda: answers.append(httpx.post(f"{server.url}/completions", json=GOOD)))
    asking.start()
    try:
        assert begun.wait(10)
        assert httpx.get(f"{server.url}/models", timeout=5).status_code == 200
    finally:
        go_on.set()
        asking.join()
    assert answers[0].status_code == 200


def test_a_bug_answers_in_openais_form(fused, monkeypatch):
    from fastapi.testclient import TestClient

    monkeypatch.setattr(app_module, "read_completion_request", lambda *_, **__: 1 / 0)
    with TestClient(make_app(fused, "fusion"), raise_server_exceptions=False) as client:
        found = client.post("/v1/completions", json=GOOD)
    assert (found.status_code, found.json()["error"]["type"]) == (500, "server_error")
