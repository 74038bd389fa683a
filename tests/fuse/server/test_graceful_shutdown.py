"""SIGTERM to the real command: the running stream ends whole, new requests get 503, the exit status is 0."""

import json
import re
import signal
import subprocess
import time

import httpx
import pytest

from tests.fuse import tiny


def recipe(folder, port=None):
    places = tiny.folders_with_text(folder)
    path = folder / "recipe.yaml"
    path.write_text(
        f"name: tiny\nmodel: {{path: '{places['small']}', dtype: fp32}}\n"
        "tasks: [{name: a, data: rows.jsonl}]\ntrain: {steps: 1}\n"
        f"output: {{dir: '{folder / 'run'}'}}\n"
        f"fuse: {{strong: {{path: '{places['strong']}', dtype: fp32}}, adapters: ['{places['expert']}']}}\n"
    )
    return path


@pytest.mark.slow
def test_sigterm_drains(tmp_path, warm_python):
    command = [warm_python, "-m", "mtft", "fuse", "serve", str(recipe(tmp_path)), "--port", "0"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        lines = iter(server.stderr.readline, "")
        url = next(found[0] for found in (re.search(r"http://[\d.]+:\d+", line) for line in lines if "serving" in line))
        for _ in range(200):
            try:
                if httpx.get(f"{url}/health").status_code == 200:
                    break
            except httpx.ConnectError:
                time.sleep(0.05)
        body = {"prompt": "the", "max_tokens": 100, "stream": True, "temperature": 1.0, "seed": 5, "n": 2}
        statuses = []
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            server.send_signal(signal.SIGTERM)
            rest = []
            for line in lines:
                rest.append(line)
                if len(rest) == 40:
                    statuses.append(httpx.post(f"{url}/v1/completions", json={"prompt": "a"}, timeout=60).status_code)
        chunks = [json.loads(line.removeprefix("data: ")) for line in rest if line.startswith("data: {")]
        reasons = [choice["finish_reason"] for chunk in chunks for choice in chunk["choices"]]
        assert [line for line in rest if line][-1] == "data: [DONE]"
        assert sum(reason is not None for reason in reasons) == 2
        assert statuses == [503]
        assert server.wait(60) == 0
    finally:
        server.kill()
        server.stderr.close()


SLOW_SERVER = """
import sys, time
from mtft.__main__ import main
from mtft.fuse.server.batch_engine import BatchEngine
step = BatchEngine._step
BatchEngine._step = lambda self: (time.sleep(0.5), step(self))
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_it_at_once(tmp_path, warm_python, first):
    """Its answer would take a minute."""
    command = [warm_python, "-c", SLOW_SERVER, "fuse", "serve", str(recipe(tmp_path)), "--port", "0"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        lines = iter(server.stderr.readline, "")
        url = next(found[0] for found in (re.search(r"http://[\d.]+:\d+", line) for line in lines if "serving" in line))
        body = {"prompt": "the", "max_tokens": 100, "stream": True}
        transport = httpx.HTTPTransport(retries=20)  # it says where it serves a moment before it does
        with (
            httpx.Client(transport=transport, timeout=60) as client,
            client.stream("POST", f"{url}/v1/completions", json=body) as answer,
        ):
            next(answer.iter_lines())
            server.send_signal(first)
            while httpx.get(f"{url}/health", timeout=60).status_code != 503:
                time.sleep(0.05)
            assert server.poll() is None
            server.send_signal(signal.SIGINT)
            assert server.wait(10) == 128 + signal.SIGINT
    finally:
        server.kill()
        server.stderr.close()


def test_two_that_bound_one_port_before_either_listened(tmp_path, monkeypatch):
    """The second one says so when its models are there, before it serves."""
    from mtft.__main__ import main
    from mtft.fuse.server import app

    taken = []
    real = app.bind

    def bind(host, port):
        first, bound = real(host, port), None
        bound = real(host, first.getsockname()[1])
        first.listen()
        taken.append(first)
        return bound

    monkeypatch.setattr(app, "bind", bind)
    said = []
    monkeypatch.setattr("mtft.__main__._say", said.append)
    try:
        assert main(["fuse", "serve", str(recipe(tmp_path)), "--port", "0"]) == 2
    finally:
        taken[0].close()
    assert "can't be listened on: Address already in use" in said[0]


@pytest.mark.parametrize("options", [["--port", "65536"], ["--port", "-1"], ["--host", "no-such-host.invalid"]])
def test_addresses_that_can_not_be_had(tmp_path, options):
    from mtft.__main__ import main

    assert main(["fuse", "serve", str(recipe(tmp_path)), *options]) == 2


def test_a_port_in_use_is_said_before_anything_is_loaded():
    from mtft.fuse.alpha.spec import FusionError
    from mtft.fuse.server.app import bind

    with bind("127.0.0.1", 0) as taken:
        taken.listen()
        with pytest.raises(FusionError, match="can't be listened on") as refused:
            bind("127.0.0.1", taken.getsockname()[1])
        assert refused.value.do == "give another --port"
    for host in ("no-such-host.invalid", "x" * 300, "a..b"):
        with pytest.raises(FusionError, match="can't be listened on") as refused:
            bind(host, 8000)
        assert refused.value.do == "give another --host"
