"""The server through the official client and by hand: what comes back, what is refused, and who is let in."""

import json
import socket
import threading
import time

import httpx
import openai
import pytest
import torch
import uvicorn

from mtft.fuse.alpha.spec import FusionError
from mtft.fuse.fused_model import FusedCausalLM
from mtft.fuse.server import batch_engine
from mtft.fuse.server.app import check_binding, make_app
from mtft.fuse.server.batch_engine import BatchEngine
from mtft.fuse.server.jobs import GenerationJob, ServerBusy, ServerStopping
from mtft.fuse.server.openai_protocol import ServerLimits
from tests.fuse import tiny

TOKEN = "not-a-secret"
PROMPT = "the quick"


@pytest.fixture(scope="module")
def fused(tmp_path_factory):
    places = tiny.folders_with_text(tmp_path_factory.mktemp("serve"))
    return FusedCausalLM.load(places["strong"], places["small"], [places["expert"]], dtype="fp32", device="cpu")


@pytest.fixture(scope="module")
def url(fused):
    app = make_app(fused, "fusion", token=TOKEN, limits=ServerLimits(body_bytes=20_000))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    for _ in range(500):
        if server.started:
            break
        time.sleep(0.02)
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def client(url):
    return openai.OpenAI(base_url=f"{url}/v1", api_key=TOKEN, max_retries=0)


@pytest.fixture
def post(url):
    def send(body, path="completions", token=TOKEN, raw=None):
        data = json.dumps(body) if raw is None else raw
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        return httpx.post(f"{url}/v1/{path}", content=data, headers=headers, timeout=60)

    return send


def generated(fused, prompt, count, **options):
    ids = fused.tokenizer(prompt, return_tensors="pt").input_ids
    out = fused.generate(input_ids=ids, max_new_tokens=count, **options)[0, ids.shape[1] :]
    return fused.tokenizer.decode(out, skip_special_tokens=True)


def test_greedy_completion_is_generate(client, fused):
    found = client.completions.create(model="fusion", prompt=PROMPT, max_tokens=8, temperature=0)
    assert found.choices[0].text == generated(fused, PROMPT, 8, do_sample=False)
    assert found.usage.prompt_tokens == len(fused.tokenizer.encode(PROMPT))
    assert found.choices[0].finish_reason in ("stop", "length")


def test_sampling_is_generate_with_that_seed(client, fused):
    wish = {"model": "fusion", "prompt": PROMPT, "max_tokens": 8, "temperature": 0.8, "top_p": 0.9, "seed": 11}
    found = client.completions.create(**wish, n=2)
    options = {"do_sample": True, "temperature": 0.8, "top_p": 0.9, "top_k": 0, "seed": 11}
    assert found.choices[0].text == generated(fused, PROMPT, 8, **options)
    again = client.completions.create(**wish, n=2)
    assert [c.text for c in found.choices] == [c.text for c in again.choices]
    assert found.choices[0].text != found.choices[1].text


def test_chat_streams_what_it_answers(client):
    wish = {"model": "fusion", "messages": [{"role": "user", "content": "fox"}], "temperature": 0, "max_tokens": 10}
    whole = client.chat.completions.create(**wish)
    chunks = list(client.chat.completions.create(**wish, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == whole.choices[0].finish_reason
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_stream_ends_with_done(post):
    body = post({"prompt": PROMPT, "max_tokens": 3, "stream": True}).text
    assert body.endswith("data: [DONE]\n\n")
    assert all(part.startswith("data: ") for part in body.strip().split("\n\n"))


def test_stop_is_not_returned(client, fused):
    text = generated(fused, PROMPT, 12, do_sample=False)
    stop = text[3:5]
    wish = {"model": "fusion", "prompt": PROMPT, "max_tokens": 12, "temperature": 0, "stop": [stop]}
    found = client.completions.create(**wish).choices[0]
    assert found.text == text[: text.find(stop)]
    assert found.finish_reason == "stop"
    assert "".join(c.choices[0].text for c in client.completions.create(**wish, stream=True)) == found.text


def test_logprobs_are_those_of_the_fused_model(client, fused):
    ids = fused.tokenizer.encode("the quick brown fox")
    wish = {"model": "fusion", "prompt": ids, "max_tokens": 1, "logprobs": 1, "echo": True, "temperature": 0}
    found = client.completions.create(**wish).choices[0].logprobs  # as lm-eval's local-completions asks
    assert found.token_logprobs[0] is None
    assert found.top_logprobs[0] is None
    score = fused.score(torch.tensor([ids]))
    assert found.token_logprobs[1 : len(ids)] == pytest.approx(score.logprob_BL[0, 1:].tolist(), abs=1e-4)
    assert len(found.tokens) == len(ids) + 1
    for at, greedy in enumerate(score.greedy_BL[0].tolist()):
        if at:
            best = max(found.top_logprobs[at].values())
            assert (found.token_logprobs[at] == best) == greedy
            assert found.top_logprobs[at][found.tokens[at]] >= found.token_logprobs[at]


def test_chat_logprobs(client):
    found = client.chat.completions.create(
        model="fusion",
        messages=[{"role": "user", "content": "a"}],
        max_tokens=4,
        temperature=0,
        logprobs=True,
        top_logprobs=3,
    )
    for token in found.choices[0].logprobs.content:
        assert len(token.top_logprobs) == 3
        assert token.top_logprobs[0].logprob == token.logprob  # greedy: the same float


def test_alpha_per_request_and_models(client, fused):
    zero = client.completions.create(
        model="fusion", prompt=PROMPT, max_tokens=8, temperature=0, extra_body={"alpha": 0.0, "trace": True}
    )
    strong = client.completions.create(model="strong", prompt=PROMPT, max_tokens=8, temperature=0)
    assert zero.choices[0].text == strong.choices[0].text == generated(fused, PROMPT, 8, do_sample=False, alpha=0.0)
    assert all(step["alpha"] == [0.0] for step in zero.choices[0].trace)
    names = [model.id for model in client.models.list()]
    assert names == ["fusion", "strong", "expert:expert-0"]
    alone = client.completions.create(model=names[2], prompt=PROMPT, max_tokens=4, temperature=0).choices[0].text
    fused.weak.layout.set((0,), 1)
    out = fused.weak.model.generate(
        **fused.tokenizer(PROMPT, return_tensors="pt"),
        max_new_tokens=4,
        do_sample=False,
        suppress_tokens=list(range(300, 320)),
    )
    assert fused.tokenizer.decode(out[0], skip_special_tokens=True).removeprefix(PROMPT) == alone


def test_many_clients_at_once_get_what_they_get_alone(client):
    """They join and leave a running batch at different times."""
    wishes = [
        {"prompt": prompt, "max_tokens": tokens, "temperature": 0.7, "seed": seed}
        for seed, (prompt, tokens) in enumerate(
            [("the", 5), ("quick brown", 14), ("fox jumps over", 3), ("dog", 10)] * 5
        )
    ]
    expected = [client.completions.create(model="fusion", **wish).choices[0].text for wish in wishes]
    found = [None] * len(wishes)

    def ask(i):
        time.sleep(0.01 * (i % 7))
        found[i] = client.completions.create(model="fusion", **wishes[i]).choices[0].text

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(wishes))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == expected


@pytest.mark.parametrize(
    "body, status, message",
    [
        ({"prompt": "a", "alpha": 99}, 400, "alpha is 99"),
        ({"prompt": "a", "alpha_rule": "jeffrey"}, 400, "did you mean 'jeffreys'"),
        ({"prompt": "a", "model": "gpt"}, 404, "no model 'gpt'"),
        ({"prompt": "a", "temprature": 1}, 400, "did you mean temperature"),
        ({"prompt": "a", "temperature": 3}, 400, "temperature is 3"),
        ({"prompt": "a", "best_of": 4}, 400, "best_of is not supported"),
        ({"prompt": "a", "logit_bias": {"1": 5}}, 400, "logit_bias is not supported"),
        ({"prompt": "a", "n": 9}, 400, "n is 9"),
        ({"prompt": "a", "max_tokens": 500}, 400, "the context holds 128"),
        ({"prompt": "a", "stop": [""]}, 400, "stop must be"),
        ({"prompt": "a", "stop": ["x"] * 17}, 400, "at most 16"),
        ({"prompt": ""}, 400, "the prompt is empty"),
        ({"prompt": [999]}, 400, "outside of 0"),
        ({}, 400, "either prompt or messages"),
        ([], 400, "no JSON object"),
        ({"prompt": "a", "expert_weights": [0.5, 0.5]}, 400, "2 entries for 1 experts"),
        ({"prompt": "a", "stream_options": {"include_usage": True}}, 400, "with stream"),
        ({"prompt": "x" * 30_000}, 413, "larger than 20000 bytes"),
    ],
)
def test_refused_with_a_reason(post, body, status, message):
    answer = post(body)
    assert answer.status_code == status
    assert message in answer.json()["error"]["message"]
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_bad_json(post):
    assert post(None, raw='{"prompt": ').status_code == 400
    assert "no JSON" in post(None, raw="[" * 5000).json()["error"]["message"]


@pytest.mark.parametrize("token", [None, "wrong", TOKEN + "x"])
def test_only_with_the_token(post, url, token):
    assert post({"prompt": "a"}, token=token).status_code == 401
    assert httpx.get(f"{url}/v1/models").status_code == 401
    assert httpx.get(f"{url}/health").json() == {"status": "ok"}


def test_a_client_that_leaves_frees_its_row(url, post):
    def running():
        text = httpx.get(f"{url}/metrics", headers={"Authorization": f"Bearer {TOKEN}"}).text
        return int(dict(line.split() for line in text.splitlines())["mtft_fuse_running"])

    body = {"prompt": "a", "max_tokens": 120, "stream": True, "temperature": 1.0, "n": 8}
    headers = {"Authorization": f"Bearer {TOKEN}"}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, headers=headers, timeout=60) as answer:
        next(answer.iter_lines())
    for _ in range(100):
        if running() == 0:
            break
        time.sleep(0.02)
    assert running() == 0
    assert post({"prompt": "a", "max_tokens": 2}).status_code == 200


def test_queue_and_waiting_time(fused):
    events = []

    def job():
        return GenerationJob([5, 6], 3, fused.spec, events.append)

    engine = BatchEngine(fused, queue=2, wait=-1.0)
    engine.submit([job(), job()])
    with pytest.raises(ServerBusy):
        engine.submit([job()])
    assert engine.metrics.refused == 1
    engine.start()
    engine.stop()  # drains first
    assert [event.status for event in events] == [503, 503]
    with pytest.raises(ServerStopping):
        engine.submit([job()])


def test_stop_drains(fused):
    events = []
    engine = BatchEngine(fused)
    engine.start()
    engine.submit([GenerationJob([5, 6], 20, fused.spec, events.append)])
    engine.stop()
    assert events[-1].finish_reason in ("length", "stop")


def test_while_it_drains_the_server_finishes_and_refuses(fused):
    """The application alone; the signal and the exit status: test_graceful_shutdown.py."""
    from fastapi.testclient import TestClient

    app = make_app(fused, "fusion")
    with TestClient(app) as client:
        assert client.post("/v1/completions", json={"prompt": "a", "max_tokens": 2}).status_code == 200
        app.state.engine.drain()
        refused = client.post("/v1/completions", json={"prompt": "a", "max_tokens": 2})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
        assert refused.headers["Retry-After"]
        assert client.get("/health").status_code == 503
        for _ in range(100):  # the last event of an answer is out a moment before its row leaves
            if app.state.engine.idle:
                break
            time.sleep(0.02)
        assert app.state.engine.idle


def test_a_failing_batch_is_heard_and_the_next_one_works(fused, monkeypatch):
    events = []
    engine = BatchEngine(fused)
    monkeypatch.setattr(batch_engine, "choose_tokens", lambda *_: (_ for _ in ()).throw(FusionError("broken")))
    engine.start()
    engine.submit([GenerationJob([5, 6], 3, fused.spec, events.append)])
    while not events:
        time.sleep(0.01)
    assert (events[0].status, events[0].error) == (500, "broken")
    monkeypatch.undo()
    engine.submit([GenerationJob([5, 6], 3, fused.spec, events.append)])
    engine.stop()
    assert events[-1].finish_reason is not None


def test_the_outside_needs_a_token():
    check_binding("127.0.0.1", None)
    check_binding("localhost", None)
    check_binding("::1", None)
    check_binding("0.0.0.0", TOKEN)
    for host in ("0.0.0.0", "192.168.1.2", "example.org"):
        with pytest.raises(FusionError, match="no token protects it"):
            check_binding(host, None)
