"""Fusion at a vocabulary of 152 thousand against an fp64 reference, and its server. Checks of scripts/check_gpu.py."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gpu_checks import FUSE_VOCABULARY, WORDS, Bench, Check, Lines, at_most, byte_tokenizer, holds, info, write_adapters

TIE = 1e-3  # nats: ten times the bar of the log-probabilities
WAIT = 60.0  # seconds for an answer of the server


def llama(width: int, layers: int, seed: int, vocabulary: int, folder: Path) -> Path:
    """Logits as wide apart as those of a trained model: greedy tokens must not hang on rounding."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=max(2, width // 64),
        num_key_value_heads=max(1, width // 128),
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        initializer_range=0.3 * (32 / width) ** 0.5,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def fused_model(folder: Path, device: str, dtype: Any, vocabulary: int) -> Any:
    """Of the models in `folder`, without a tokenizer."""
    from mtft import FusedCausalLM, FusionSpec
    from mtft.fuse.load_models import load_model, load_weak_model

    experts = sorted((folder / "experts").iterdir())
    strong = load_model(folder / "strong", dtype=dtype, device=device)
    weak = load_weak_model(folder / "small", experts, dtype=dtype, device=device)
    return FusedCausalLM(strong, weak, None, FusionSpec(), vocab_size=vocabulary)


def left_padded(rows: int, vocabulary: int) -> tuple[Any, Any]:
    """Prompts of different lengths."""
    import torch

    draw = torch.Generator().manual_seed(0)
    lengths = [5 + (3 * row) % 8 for row in range(rows)]
    ids = torch.zeros(rows, max(lengths), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        ids[row, -length:] = torch.randint(3, vocabulary, (length,), generator=draw)
        mask[row, -length:] = 1
    return ids, mask


def fusion(bench: Bench) -> Lines:
    """One prompt alone, several, and speculative: log-probabilities and greedy tokens against fp64 on the CPU."""
    import torch

    size, vocabulary = bench.sizes, FUSE_VOCABULARY
    folder = bench.folder("fusion")
    llama(size.fuse_width, 2, 7, vocabulary, folder / "strong")
    llama(size.fuse_width // 2, 2, 1, vocabulary, folder / "small")
    write_adapters(folder / "small", folder / "experts")
    ids, mask = left_padded(size.rows, vocabulary)
    new = {"max_new_tokens": size.new_tokens, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}

    def answers(fused: Any, device: str, **options: Any) -> Any:
        call = {"input_ids": ids.to(device), "attention_mask": mask.to(device), **new, **options}
        return fused.generate(**call)[:, ids.shape[1] :].cpu()

    def logprobs(fused: Any, device: str, text: Any, whole: Any) -> Any:
        return fused(text.to(device), whole.to(device), logits_to_keep=size.new_tokens + 1).logits.cpu()

    reference = fused_model(folder, "cpu", torch.float64, vocabulary)
    expected = answers(reference, "cpu")
    text = torch.cat([ids, expected], dim=1)
    whole = torch.cat([mask, torch.ones_like(expected)], dim=1)
    truth = logprobs(reference, "cpu", text, whole)
    best, second = truth[:, :-1].topk(2, dim=-1).values.unbind(-1)
    sure = (best - second > TIE).cumprod(dim=1).bool()  # what comes after two that are as likely hangs on rounding
    del reference
    fused = fused_model(folder, bench.device, torch.float32, vocabulary)
    got = logprobs(fused, bench.device, text, whole).double()
    likely = truth > truth.amax(-1, keepdim=True) - 20  # beyond, e^-20: fp32 has no digits left of such a sum
    apart = float((got - truth)[likely].abs().max())
    yield at_most(f"V = {vocabulary}, batched, fp32: log-probabilities against fp64 on the CPU", apart, 1e-4)
    note = f"of {int(sure.sum())}; {int((~sure).sum())} come after two that are within {TIE} nats"
    for name, options in (("batched", {}), ("speculative", {"speculative": 3})):
        tokens = answers(fused, bench.device, **options)
        wrong = int((tokens != expected)[sure].sum())
        yield at_most(f"V = {vocabulary}, {name}: tokens that are not the reference's", wrong, 0, note)
    wrong, furthest = 0, 0.0
    for row in range(size.rows):
        real = int(mask[row].sum())
        one = ids[row : row + 1, -real:].to(bench.device)
        found = fused.generate(input_ids=one, attention_mask=torch.ones_like(one), **new)[0, real:].cpu()
        wrong += int((found != expected[row])[sure[row]].sum())
        alone = fused(text[row : row + 1, -real - size.new_tokens :].to(bench.device)).logits.cpu().double()
        last = truth[row]
        near = likely[row]
        furthest = max(furthest, float((alone[0, -len(last) :] - last)[near].abs().max()))
    yield at_most(f"V = {vocabulary}, alone, fp32: log-probabilities against fp64 on the CPU", furthest, 1e-4)
    yield at_most(f"V = {vocabulary}, alone: tokens that are not the reference's", wrong, 0, note)


# ---- the server


@contextmanager
def served(fused: Any) -> Iterator[tuple[str, Any]]:
    """(address, the app) of `fused`, in a thread of this process: its failures can be arranged."""
    from uvicorn import Config, Server

    from mtft.fuse.server.app import make_app
    from mtft.fuse.server.openai_protocol import ServerLimits

    app = make_app(fused, "fused", limits=ServerLimits())
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        server = Server(Config(app, log_level="critical", http="h11", ws="none"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
        thread.start()
        try:
            until = time.monotonic() + WAIT
            while not server.started and time.monotonic() < until:
                time.sleep(0.01)
            yield f"http://127.0.0.1:{bound.getsockname()[1]}", app
        finally:
            server.should_exit = True
            thread.join(WAIT)


def stream(http: Any, body: dict[str, Any], leave_after: int | None = None) -> tuple[str, bool]:
    """(text, whether it came to its end). leave_after: hang up after so many events."""
    text, whole = "", False
    with http.stream("POST", "/v1/completions", json=body | {"stream": True}) as answer:
        if answer.status_code != 200:
            raise RuntimeError(f"status {answer.status_code}: {answer.read()[:120]!r}")
        for number, line in enumerate(filter(None, answer.iter_lines())):
            if line == "data: [DONE]":
                whole = True
            else:
                text += json.loads(line.removeprefix("data: "))["choices"][0]["text"]
            if leave_after is not None and number + 1 >= leave_after:
                break
    return text, whole


def eventually(true: Callable[[], bool], seconds: float = WAIT) -> bool:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if true():
            return True
        time.sleep(0.02)
    return False


def server(bench: Bench) -> Lines:
    """Eight streams at once, a client that leaves, and no memory in the middle of an answer."""
    import httpx

    fused = with_text(bench)
    body = {"max_tokens": 3 * bench.sizes.new_tokens, "temperature": 0, "stop": []}
    with served(fused) as (url, app), httpx.Client(base_url=url, timeout=WAIT) as http:
        prompts = [f"copy: {word}" for word in WORDS[:8]]
        alone = [stream(http, body | {"prompt": prompt})[0] for prompt in prompts]
        with ThreadPoolExecutor(8) as clients:
            found = list(clients.map(lambda prompt: stream(http, body | {"prompt": prompt}), prompts))
        ended = sum(whole for _, whole in found)
        yield holds("server: 8 streams at once come to their end", ended == 8, f"{ended} of 8")
        same = sum(text == one for (text, _), one in zip(found, alone, strict=True))
        yield holds("server: they say what each says alone", same == 8, f"{same} of 8")
        engine = app.state.engine
        long = {"prompt": prompts[0], "max_tokens": 1500, "temperature": 0, "seed": 1}
        _, whole = stream(http, long, leave_after=3)
        left = not whole and eventually(lambda: engine.idle)
        tokens = engine.metrics.tokens
        yield holds("server: a client that leaves takes its row along", left, f"after {tokens} tokens in all")
        with out_of_memory(bench, fused):
            answer = http.post("/v1/completions", json=body | {"prompt": prompts[0] * 20})
        told = answer.status_code >= 500 and "error" in answer.json()
        yield holds("server: out of memory is told as an error", told, f"{answer.status_code}: {answer.text[:100]}")
        well = eventually(lambda: http.get("/health").status_code == 200)
        again = stream(http, body | {"prompt": prompts[0]})[0] if well else None
        yield holds("server: it answers as before after that", again == alone[0], "" if well else "it is not healthy")
        if not bench.on_gpu:
            yield info("server: out of memory", "arranged: a CPU would end the process")


def with_text(bench: Bench) -> Any:
    """Small models with a tokenizer, as `FusedCausalLM.load` gives them."""
    from mtft import FusedCausalLM

    folder = bench.folder("server")
    for name, seed in (("strong", 7), ("small", 1)):
        llama(bench.sizes.fuse_width, 2, seed, 320, folder / name)
        byte_tokenizer().save_pretrained(folder / name)
    experts = write_adapters(folder / "small", folder / "experts", count=1)
    return FusedCausalLM.load(folder / "strong", folder / "small", experts, dtype="fp32", device=bench.device)


@contextmanager
def out_of_memory(bench: Bench, fused: Any) -> Iterator[None]:
    """On a GPU nothing can be allocated any more; without one the solver says once that it could not."""
    import torch

    if bench.on_gpu:
        bench.free()
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(max(torch.cuda.memory_reserved() / total, 1e-9))
        held, size = [], 1 << 26
        while size >= 512:  # what is free in the blocks that are reserved
            try:
                held.append(torch.empty(size, dtype=torch.uint8, device=bench.device))
            except torch.OutOfMemoryError:
                size //= 2
        try:
            yield
        finally:
            held.clear()
            torch.cuda.set_per_process_memory_fraction(1.0)
        return
    before, failed = fused.fuse, []

    def fuse(*args: Any, **kwargs: Any) -> Any:
        if not failed:
            failed.append(True)
            raise torch.OutOfMemoryError("arranged: out of memory")
        return before(*args, **kwargs)

    fused.fuse = fuse
    try:
        yield
    finally:
        del fused.fuse


FUSE = (
    Check("fusion", "fusion at V = 152k: alone, batched, speculative", fusion, (12, 20)),
    Check("server", "the server: 8 streams, a client that leaves, no memory", server, (6, 8)),
)
