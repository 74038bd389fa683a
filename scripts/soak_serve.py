"""Many clients against `mtft fuse serve` for a while: errors, latencies, memory, and how it ends.

    python scripts/soak_serve.py                                # 200 clients, 10 minutes, the quickstart's models
    python scripts/soak_serve.py --clients 20 --minutes 0.5     # a quick look

The server is a process of its own. Clients mix completions and chats, streams and whole answers, stop strings,
logprobs, alphas; one in twenty leaves in the middle of its stream, one in twenty sends nonsense that must be refused.
Every fiftieth question of a client is asked twice with one seed and must be answered alike. At the end comes SIGTERM
with all clients still asking: what runs must finish, what comes must get 503, the exit status must be 0.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import httpx

PROMPTS = ["def add(a, b):", "import os\n", "class Node:\n    ", "for i in range(", "# Sort a list\n", "return x"]
NONSENSE = [({"alpha": 99}, 400), ({"temprature": 1}, 400), ({"model": "gpt"}, 404), ({"max_tokens": 10**6}, 400)]
GROWTH = 1.05  # resident memory at the end over that after the warm-up


@dataclass
class Tally:
    done: Counter[str] = field(default_factory=Counter)
    wrong: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    ending: bool = False


def make_recipe(folder: Path, adapter: Path | None) -> Path:
    """The quickstart's models; without a trained adapter one with random weights, which costs the same."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from mtft.quickstart import model_path

    if adapter is None:
        adapter = folder / "adapter"
        model = AutoModelForCausalLM.from_pretrained(model_path("weak"))
        tuned = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear"))
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.02)
        tuned.save_pretrained(folder / "adapter")
    recipe = folder / "soak.yaml"
    recipe.write_text(
        "name: soak\nmodel: {path: 'quickstart:weak', dtype: fp32}\n"
        "tasks: [{name: code, data: 'quickstart:code'}]\ntrain: {steps: 1}\n"
        f"output: {{dir: '{folder / 'run'}'}}\n"
        f"fuse: {{strong: {{path: 'quickstart:strong', dtype: fp32}}, adapters: ['{adapter.resolve()}']}}\n"
    )
    return recipe


def start(recipe: Path, args: argparse.Namespace) -> tuple[subprocess.Popen[str], str]:
    """The server and its address, once it answers."""
    limits = ["--rows", str(args.rows), "--queue", str(2 * args.clients), "--wait", "600"]
    command = [sys.executable, "-m", "mtft", "fuse", "serve", str(recipe), "--port", "0", *limits]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    for line in server.stderr:
        if found := re.search(r"serving .*(http://[\d.]+:\d+)", line):
            return server, found[1]
        print(line, end="", file=sys.stderr)
    raise SystemExit(f"the server did not start: exit status {server.wait()}")


def resident(process: int) -> float:
    """MiB."""
    text = Path(f"/proc/{process}/status").read_text()
    return int(re.findall(r"VmRSS:\s+(\d+)", text)[0]) / 1024


def wish(chance: random.Random) -> dict[str, object]:
    body: dict[str, object] = {"max_tokens": chance.randint(2, 16), "seed": chance.randrange(2**31)}
    body["temperature"] = chance.choice([0, 0.7, 1.0])
    if chance.random() < 0.2:
        body["stop"] = ["\n", "return"]
    if chance.random() < 0.2:
        body |= chance.choice([{"alpha": 0.5}, {"alpha_rule": "forward"}, {"model": "strong"}, {"top_p": 0.9}])
    return body


async def client(number: int, url: str, tally: Tally, until: float) -> None:
    chance = random.Random(number)
    await asyncio.sleep(chance.random() * 2)
    async with httpx.AsyncClient(base_url=url, timeout=600) as http:
        for count in range(1_000_000):
            if time.monotonic() > until and not tally.ending:
                await asyncio.sleep(0.05)
                continue
            try:
                if await ask(http, chance, tally, twice=count % 50 == 49):
                    return
            except httpx.HTTPError as error:
                if tally.ending and isinstance(error, httpx.ConnectError):
                    return  # the server has ended
                tally.wrong[f"{'at the end: ' if tally.ending else ''}{type(error).__name__}"] += 1
                if tally.ending:
                    return


async def ask(http: httpx.AsyncClient, chance: random.Random, tally: Tally, *, twice: bool) -> bool:
    """One question. True: the server is leaving."""
    kind, body, begun = chance.random(), wish(chance), time.monotonic()
    chat = chance.random() < 0.4
    path = "/v1/chat/completions" if chat else "/v1/completions"
    text = chance.choice(PROMPTS)
    body |= {"messages": [{"role": "user", "content": text}]} if chat else {"prompt": text}
    if kind < 0.05:
        extra, status = chance.choice(NONSENSE)
        answer = await http.post(path, json=body | extra)
        return count(tally, answer.status_code, status, answer.text, "refused")
    if kind < 0.5:
        leaves = kind < 0.1
        async with http.stream("POST", path, json=body | {"stream": True}) as answer:
            if answer.status_code != 200:
                return count(tally, answer.status_code, 200, (await answer.aread()).decode(), "")
            last, pieces = "", 0
            async for line in answer.aiter_lines():
                if not pieces:
                    tally.first.append(time.monotonic() - begun)
                last, pieces = line or last, pieces + 1
                if leaves and pieces > 2:
                    tally.done["left"] += 1
                    return False
        if last != "data: [DONE]":
            tally.wrong[f"stream ended with {last[:60]}"] += 1
        tally.done["stream"] += 1
    else:
        wanted = body | ({"logprobs": True} if chat else {"logprobs": 2}) if kind > 0.8 else body
        answers = [await http.post(path, json=wanted) for _ in range(1 + twice)]
        for answer in answers:
            if count(tally, answer.status_code, 200, answer.text, "whole"):
                return True
        if twice and answers[0].json()["choices"] != answers[1].json()["choices"]:
            tally.wrong["one seed, two answers"] += 1
    tally.seconds.append(time.monotonic() - begun)
    return False


def count(tally: Tally, status: int, wanted: int, text: str, kind: str) -> bool:
    """True: the server is leaving, which it may say at the end only."""
    if status == 503 and tally.ending and "shutting_down" in text:
        tally.done["503 at the end"] += 1
        return True
    if status == wanted:
        tally.done[kind] += 1
    else:
        tally.wrong[f"{status} for {wanted}: {text[:80]}"] += 1
    return False


async def soak(server: subprocess.Popen[str], url: str, args: argparse.Namespace) -> tuple[Tally, list[float]]:
    tally, begun = Tally(), time.monotonic()
    until = begun + 60 * args.minutes
    clients = [asyncio.create_task(client(n, url, tally, until)) for n in range(args.clients)]
    memory = []
    while time.monotonic() < until and server.poll() is None:
        await asyncio.sleep(min(5, 6 * args.minutes))
        memory.append(resident(server.pid))
        so_far = f"{sum(tally.done.values())} answers, {sum(tally.wrong.values())} wrong, {memory[-1]:.0f} MiB"
        print(f"{time.monotonic() - begun:5.0f} s  {so_far}", flush=True)
    tally.ending = True
    await asyncio.sleep(1)  # all are asking again
    server.send_signal(signal.SIGTERM)
    await asyncio.wait_for(asyncio.gather(*clients), 180)
    return tally, memory


def share(values: list[float], q: float) -> float:
    return sorted(values)[min(len(values) - 1, int(q * len(values)))] if values else float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--rows", type=int, default=16, help="answers that the server makes at the same time")
    parser.add_argument("--adapter", type=Path, help="trained on quickstart:weak (default: random weights)")
    parser.add_argument("--out", type=Path, help="JSON of the figures")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        server, url = start(make_recipe(Path(scratch), args.adapter), args)
        try:
            tally, memory = asyncio.run(soak(server, url, args))
            status = server.wait(60)
        finally:
            server.kill()
    warm = memory[max(1, len(memory) // 10) - 1 :]  # after a tenth of the time, and at least one look
    begin, end = (sum(part) / len(part) for part in (warm[: max(1, len(warm) // 6)], warm[-max(1, len(warm) // 6) :]))
    times = {f"p{100 * q:g}": share(tally.seconds, q) for q in (0.5, 0.95, 0.99)}
    first = {f"p{100 * q:g}": share(tally.first, q) for q in (0.5, 0.95, 0.99)}
    bars = {
        "no error": not tally.wrong,
        f"memory grew less than {GROWTH - 1:.0%}": end <= GROWTH * begin,
        "SIGTERM: new ones got 503": tally.done["503 at the end"] > 0,
        "SIGTERM: exit status 0": status == 0,
    }
    print(f"{args.clients} clients, {args.minutes:g} minutes: {dict(tally.done)}, wrong {dict(tally.wrong)}")
    print("seconds to an answer  " + "  ".join(f"{k} {v:.2f}" for k, v in times.items()))
    print("to a stream's start   " + "  ".join(f"{k} {v:.2f}" for k, v in first.items()))
    print(f"memory {begin:.0f} MiB after the warm-up, {end:.0f} MiB at the end ({end / begin - 1:+.1%}); exit {status}")
    for bar, holds in bars.items():
        print(f"{'PASS' if holds else 'MISS'}  {bar}")
    if args.out:
        figures = {"done": tally.done, "wrong": tally.wrong, "seconds": times, "first": first, "memory": memory}
        args.out.write_text(json.dumps(figures | {"exit": status}, indent=1) + "\n")
    sys.exit(not all(bars.values()))


if __name__ == "__main__":
    main()
