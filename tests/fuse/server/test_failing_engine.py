"""An engine whose models fail: its clients hear of it, /health says so, and it comes back when they work again."""

import socket
import threading
import time
from types import SimpleNamespace

import httpx
import pytest
import torch
import uvicorn
from fastapi.testclient import TestClient

from mtft.fuse.fused_model import FusedCausalLM
from mtft.fuse.server import app as app_module
from mtft.fuse.server import batch_engine, graceful_shutdown
from mtft.fuse.server.app import make_app
from mtft.fuse.server.batch_engine import BatchEngine
from mtft.fuse.server.jobs import EngineFailed, GenerationJob
from mtft.fuse.server.openai_protocol import ServerLimits
from tests.fuse import tiny

WISH = {"prompt": "the quick", "max_tokens": 3, "temperature": 0}
ECHO = WISH | {"max_tokens": 0, "echo": True, "logprobs": 1}


@pytest.fixture(scope="module")
def fused(tmp_path_factory):
    places = tiny.folders_with_text(tmp_path_factory.mktemp("failing"))
    return FusedCausalLM.load(places["strong"], places["small"], [places["expert"]], dtype="fp32", device="cpu")


@pytest.fixture
def client(fused):
    with TestClient(make_app(fused, "fusion"), raise_server_exceptions=False) as client:
        yield client


def until(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.01)


FAULTS = [MemoryError(), torch.OutOfMemoryError("out of memory"), RuntimeError(""), TypeError("x"), OSError("lost")]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: type(fault).__name__)
def test_health_fails_while_the_models_do(client, fused, monkeypatch, fault):
    def broken():
        raise fault

    monkeypatch.setattr(batch_engine, "RETRY", 0.02)
    assert client.get("/health").status_code == 200
    with monkeypatch.context() as patch:
        patch.setattr(fused, "cached_models", broken)
        found = client.post("/v1/completions", json=WISH)
        assert found.status_code in (500, 503)
        assert found.json()["error"]["type"] == "server_error"
        until(lambda: client.get("/health").status_code == 503)
        assert client.get("/health").json()["error"]["code"] == "engine_failed"
        for body in (WISH, WISH | {"stream": True}, ECHO):
            refused = client.post("/v1/completions", json=body)
            assert (refused.status_code, refused.headers["Retry-After"]) == (503, "1")
        assert client.get("/v1/models").status_code == 503
    until(lambda: client.get("/health").status_code == 200)
    assert client.post("/v1/completions", json=WISH).status_code == 200


LOST = [
    torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("CUDA error: device-side assert triggered"),
]


@pytest.mark.parametrize("fault", LOST, ids=lambda fault: type(fault).__name__)
def test_a_server_whose_device_failed_ends_with_a_failure(fused, monkeypatch, fault):
    """Every later call fails too: another process has to be started, which a supervisor does for an exit code."""
    monkeypatch.setattr(app_module, "load_fusion", lambda _: fused)
    address, ended, servers = [], [], []

    class Known(graceful_shutdown.DrainingServer):
        def __init__(self, *args):
            super().__init__(*args)
            servers.append(self)

    def run():
        try:
            app_module.serve(SimpleNamespace(name="fusion"), port=0, announce=address.append)
        except RuntimeError as error:
            ended.append(str(error))

    monkeypatch.setattr(graceful_shutdown, "DrainingServer", Known)
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        until(lambda: address)
        url = address[0].partition(" on ")[2].partition(";")[0]
        until(lambda: httpx.get(f"{url}/health").status_code == 200)
        monkeypatch.setattr(fused, "cached_models", lambda: (_ for _ in ()).throw(fault))
        assert httpx.post(f"{url}/v1/completions", json=WISH, timeout=20).status_code in (500, 503)
        until(lambda: not thread.is_alive())
    finally:  # or a server that does not end would keep the tests from ending
        for server in servers:
            server.should_exit = server.force_exit = True
        thread.join(20)
    assert "can't work again in this process" in ended[0]


def test_no_memory_is_no_lost_device(client, fused, monkeypatch):
    monkeypatch.setattr(batch_engine, "RETRY", 0.02)
    engine = client.app.state.engine
    with monkeypatch.context() as patch:
        error = torch.AcceleratorError("CUDA error: out of memory")
        patch.setattr(fused, "cached_models", lambda: (_ for _ in ()).throw(error))
        client.post("/v1/completions", json=WISH)
        until(lambda: engine.fault is not None)
    until(lambda: engine.fault is None)
    assert not engine.lost


@pytest.mark.parametrize("body", [WISH, WISH | {"stream": True}, ECHO])
def test_one_batch_that_fails_is_no_failing_engine(client, monkeypatch, body):
    """Too large for the memory, say: what comes after it is served."""
    engine = client.app.state.engine
    name = "_score_prompt" if body is ECHO else "_step"
    with monkeypatch.context() as patch:
        patch.setattr(engine, name, lambda *_: (_ for _ in ()).throw(MemoryError()))
        found = client.post("/v1/completions", json=body)
        assert (found.status_code, found.json()["error"]["message"]) == (500, "MemoryError")
    assert client.get("/health").status_code == 200
    assert client.post("/v1/completions", json=body).status_code == 200


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_engine_whose_thread_died_says_so(client, monkeypatch):
    engine = client.app.state.engine
    monkeypatch.setattr(engine, "_take_jobs", lambda: (_ for _ in ()).throw(SystemExit))
    found = client.post("/v1/completions", json=WISH)
    assert found.status_code == 503
    assert client.get("/health").status_code == 503
    assert client.post("/v1/completions", json=WISH).status_code == 503
    assert engine.idle  # a server that shuts down has nothing to wait for
    assert engine.lost


def test_models_of_every_kind_can_be_asked_whether_they_work(tmp_path, double, folders):
    """Other vocabularies and sliding windows; routed experts."""
    import numpy as np

    from mtft.adapters.routers import CentroidRouter
    from mtft.fuse.alpha.spec import FusionSpec
    from mtft.fuse.expert_routing import PromptRouter
    from tests.fuse import pairs

    places = pairs.folders(tmp_path)
    spec = FusionSpec(tokens="map")
    paths = places["strong"], places["small"], [places["expert"]]
    states = np.random.default_rng(0).normal(size=(2, 6, 16))
    CentroidRouter.fit({"one": states[0], "odd": states[1]}).save(tmp_path / "r.safetensors")
    router = PromptRouter(tmp_path / "r.safetensors", [folders["one"], folders["odd"]])
    for fused in (
        FusedCausalLM.load(*paths, spec, dtype="fp32", device="cpu"),
        tiny.fused(double.weak, FusionSpec(weights="router"), router=router),
    ):
        engine = BatchEngine(fused)
        engine.fault = "it was broken"
        engine._probe()
        assert engine.fault is None


def test_who_waits_hears_of_a_failure(fused, monkeypatch):
    events = [[] for _ in range(3)]
    engine = BatchEngine(fused, rows=1)
    jobs = [GenerationJob([5, 6], 3, fused.spec, heard.append) for heard in events]
    monkeypatch.setattr(fused, "cached_models", lambda: (_ for _ in ()).throw(RuntimeError("device lost")))
    engine.submit(jobs[:2])
    engine.submit(jobs[2:], score=True)
    engine.start()
    until(lambda: all(events))
    assert [heard[-1].status for heard in events] == [503, 503, 500]
    assert engine.idle
    with pytest.raises(EngineFailed, match="device lost"):
        engine.submit(jobs)
    engine.stop()


def test_who_waits_too_long_hears_it_although_no_row_is_free(fused, monkeypatch):
    engine, heard = BatchEngine(fused, rows=1, wait=0.05), []
    monkeypatch.setattr(engine, "_report", lambda *_: time.sleep(0.02))  # it never ends
    running = GenerationJob([5, 6], 100, fused.spec, lambda event: None)
    engine.start()
    engine.submit([running])
    until(lambda: engine.running)
    engine.submit([GenerationJob([5, 6], 3, fused.spec, heard.append)])
    until(lambda: heard)
    assert heard[0].status == 503
    engine.cancel([running])
    engine.stop()


def test_scoring_counts_as_waiting_and_as_work(fused):
    """The queue bounds it, and a server that drains finishes it."""
    from mtft.fuse.server.jobs import ServerBusy

    engine, heard = BatchEngine(fused, queue=2), []
    engine.submit([GenerationJob([5, 6], 0, fused.spec, heard.append) for _ in range(2)], score=True)
    assert not engine.idle
    with pytest.raises(ServerBusy):
        engine.submit([GenerationJob([5, 6], 0, fused.spec, heard.append)], score=True)
    engine.start()
    engine.stop()
    assert [len(event.prompt) for event in heard] == [2, 2]


@pytest.fixture
def slow(fused, monkeypatch):
    """A real server with one row, whose answers take for ever: (address, engine)."""
    app = make_app(fused, "fusion", limits=ServerLimits(rows=1))
    engine = app.state.engine
    step = engine._step

    def slow_step():
        for job, detokenizer in engine.running:
            job.max_tokens, detokenizer.tokens[:] = 100, []
        time.sleep(0.01)
        step()

    monkeypatch.setattr(fused.generation_config, "eos_token_id", None)
    engine._step = slow_step
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", http="h11", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
        thread.start()
        until(lambda: server.started)
        yield f"http://127.0.0.1:{bound.getsockname()[1]}/v1/completions", engine
        engine.cancel([*engine.waiting, *(job for job, _ in engine.running)])
        server.should_exit = True
        thread.join()


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_while_its_answer_is_made(slow, stream):
    """Its tokens come faster than any look whether it is still there."""
    url, engine = slow
    body = {"prompt": "a", "max_tokens": 100, "stream": stream}
    if stream:
        with httpx.stream("POST", url, json=body, timeout=20) as answer:
            next(answer.iter_lines())
    else:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(url, json=body, timeout=0.4)
    until(lambda: not engine.running, 5)


def test_a_client_that_leaves_while_its_prompt_is_to_be_scored(slow, monkeypatch):
    url, engine = slow
    go_on = threading.Event()
    monkeypatch.setattr(engine, "_score_next", lambda: go_on.wait(0.01))
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(url, json=ECHO, timeout=0.3)
    until(lambda: not engine.scoring, 5)


def test_a_stream_that_never_begins_gives_its_rows_back(fused):
    """The client has gone between the first token and the first byte."""
    import asyncio

    from mtft.fuse.server.jobs import StreamEvent
    from mtft.fuse.server.openai_protocol import read_completion_request
    from mtft.fuse.server.response import ResponseStream, ServerSentEvents

    engine = BatchEngine(fused)
    request = read_completion_request(WISH | {"stream": True}, fused, {"fusion": "fused"}, ServerLimits(), chat=False)

    async def leave(message):
        raise OSError("gone")

    async def ask():
        answer = ResponseStream(fused, engine, request)
        answer.start()
        await ServerSentEvents(answer, (0, StreamEvent("a")))({"type": "http"}, asyncio.Event().wait, leave)

    with pytest.raises(BaseException):  # noqa: B017  what Starlette makes of it
        asyncio.run(ask())
    assert not engine.waiting
