"""What a request may hold: every field of the schema with null, with every JSON type, with half a surrogate pair."""

import json
import threading
import time

import pytest
from fastapi.testclient import TestClient

from mtft.fuse.fused_model import FusedCausalLM
from mtft.fuse.server.app import make_app
from mtft.fuse.server.batch_engine import BatchEngine
from mtft.fuse.server.jobs import GenerationJob
from mtft.fuse.server.logprobs import LogprobShapes, TextOffset
from mtft.fuse.server.openai_protocol import UNSUPPORTED, ChatBody, CompletionBody, ServerLimits
from tests.fuse import tiny

BODIES = {
    "completions": {"prompt": "the quick", "max_tokens": 2, "temperature": 0},
    "chat/completions": {"messages": [{"role": "user", "content": "fox"}], "max_tokens": 2, "temperature": 0},
}
FIELDS = [
    (path, field)
    for path, schema in (("completions", CompletionBody), ("chat/completions", ChatBody))
    for field in (*schema.model_fields, *UNSUPPORTED)
]
JSON_TYPES = [
    True,
    False,
    0,
    1,
    -1,
    1.0,
    2.5,
    10**30,
    "",
    "x",
    "\ud83d",
    [],
    ["x"],
    [0],
    [[]],
    {},
    {"a": 1},
    [None],
    1e400,
]


@pytest.fixture(scope="module")
def fused(tmp_path_factory):
    places = tiny.folders_with_text(tmp_path_factory.mktemp("requests"))
    return FusedCausalLM.load(places["strong"], places["small"], [places["expert"]], dtype="fp32", device="cpu")


@pytest.fixture(scope="module")
def client(fused):
    with TestClient(make_app(fused, "fusion"), raise_server_exceptions=False) as client:
        yield client


@pytest.fixture
def post(client):
    def send(body, path="completions"):
        return client.post(f"/v1/{path}", content=json.dumps(body), headers={"content-type": "application/json"})

    return send


@pytest.mark.parametrize("path, field", FIELDS)
def test_null_is_the_same_as_absent(post, path, field):
    """Also for prompt and messages themselves: both are missing then."""
    body = BODIES[path]
    absent, null = post({k: v for k, v in body.items() if k != field}, path), post(body | {field: None}, path)
    assert null.status_code == absent.status_code
    texts = [answer.json().get("choices") or answer.json()["error"] for answer in (absent, null)]
    if field != "temperature":  # without it the answers are samples
        assert texts[0] == texts[1]


def test_null_inside_of_a_field(post):
    assert post(BODIES["completions"] | {"stream": True, "stream_options": {"include_usage": None}}).status_code == 200


@pytest.mark.parametrize("path, field", FIELDS)
def test_any_json_in_any_field_is_answered_or_refused(post, path, field):
    for value in JSON_TYPES:
        answer = post(BODIES[path] | {field: value}, path)
        assert answer.status_code in (200, 400, 404), (value, answer.text)
        if answer.status_code != 200:
            assert answer.json()["error"]["message"]


@pytest.mark.parametrize("path, field", FIELDS)
def test_half_a_surrogate_is_400_in_any_field(post, path, field):
    for value in ("\ud83d", ["\ud83d"], {"a": ["\ud83d"]}, {"\ud83d": 1}):
        answer = post(BODIES[path] | {field: value}, path)
        assert answer.status_code == 400
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_a_surrogate_written_as_bytes(client):
    raw = b'{"prompt": "a\xed\xa0\xbd", "max_tokens": 1}'
    assert client.post("/v1/completions", content=raw).status_code == 400


@pytest.mark.parametrize("value", [1, True, 2.5, [], ["fusion"], {}, {"id": "fusion"}])
def test_a_model_that_is_no_name(post, value):
    answer = post(BODIES["completions"] | {"model": value})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "model")


@pytest.mark.parametrize("name", ["presence_penalty", "frequency_penalty"])
@pytest.mark.parametrize("value, status", [(0, 200), (0.0, 200), (1, 400), (1.0, 400), (True, 400), (False, 400)])
def test_penalties(post, name, value, status):
    assert post(BODIES["completions"] | {name: value}).status_code == status


@pytest.mark.parametrize("name, neutral", [(name, value) for name, values in UNSUPPORTED.items() for value in values])
def test_what_asks_for_nothing_passes(post, name, neutral):
    assert post(BODIES["completions"] | {name: neutral}).status_code == 200


def test_bytes_are_the_tokens_own(fused):
    """Of an emoji each of four tokens holds one byte; a decoder shows U+FFFD for each."""
    shapes, text = LogprobShapes(fused.tokenizer), "a😀 é"
    ids = fused.tokenizer.encode(text, add_special_tokens=False)
    from mtft.fuse.server.jobs import TokenScore

    found = shapes.chat([TokenScore(i, -1.0, ((i, -1.0),)) for i in ids])["content"]
    assert bytes(byte for entry in found for byte in entry["bytes"]) == text.encode()
    assert all(entry["top_logprobs"][0]["bytes"] == entry["bytes"] for entry in found)


def test_text_offset_counts_characters(post, fused):
    text = "a😀é fox\u65e5b"
    data = [text.encode()[at : at + 1] for at in range(len(text.encode()))]
    offset = TextOffset()
    starts = [offset.advance(byte) for byte in data]
    assert starts == [len(text.encode()[:at].decode("utf-8", "ignore")) for at in range(len(data))]
    wish = {"prompt": text, "max_tokens": 1, "logprobs": 0, "echo": True, "temperature": 0}
    found = post(wish).json()["choices"][0]
    ids = fused.tokenizer.encode(text)
    for at, begin in enumerate(found["logprobs"]["text_offset"][: len(ids)]):
        before = fused.tokenizer.decode(ids[:at]).rstrip("\ufffd")
        assert begin == len(before)
    assert found["text"].startswith(text)


def test_offsets_go_on_from_chunk_to_chunk(post):
    wish = {"prompt": "the quick", "max_tokens": 8, "logprobs": 0, "temperature": 0}
    whole = post(wish).json()["choices"][0]["logprobs"]["text_offset"]
    lines = post(wish | {"stream": True}).text.split("\n\n")
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line and "[DONE]" not in line]
    assert [at for chunk in chunks for at in chunk["choices"][0]["logprobs"]["text_offset"]] == whole


def test_who_hangs_up_in_the_queue_frees_its_place(fused):
    """The engine stands still: nothing is taken from the queue, and yet the place is free at once."""
    engine = BatchEngine(fused, queue=2)
    jobs = [GenerationJob([5, 6], 3, fused.spec, lambda event: None) for _ in range(2)]
    engine.submit(jobs)
    engine.cancel(jobs[:1])
    assert list(engine.waiting) == jobs[1:]
    engine.submit([GenerationJob([5, 6], 3, fused.spec, lambda event: None)])


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_while_it_waits(fused, stream):
    """Over a real connection, with a batch that never takes it."""
    import socket

    import httpx
    import uvicorn

    app = make_app(fused, "fusion", limits=ServerLimits(rows=1))
    engine = app.state.engine
    engine._take_jobs = lambda: time.sleep(0.01) or []
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        wish = {"prompt": "a", "max_tokens": 9, "stream": stream}
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=wish, timeout=0.3)
        until = time.monotonic() + 3
        while engine.waiting and time.monotonic() < until:
            time.sleep(0.02)
        assert not engine.waiting
    finally:
        engine.cancel(list(engine.waiting))
        server.should_exit = True
        thread.join()


def test_echo_alone_is_not_served_while_draining(fused):
    app = make_app(fused, "fusion")
    wish = {"prompt": "the quick", "max_tokens": 0, "echo": True, "logprobs": 1}
    with TestClient(app) as client:
        assert client.post("/v1/completions", json=wish).status_code == 200
        app.state.engine.drain()
        refused = client.post("/v1/completions", json=wish)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
