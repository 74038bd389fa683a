"""How much fusion costs, against strong alone, naive fusion and PEFT's adapter_names, in one process.

    python scripts/bench_fuse.py                                       # T1 step, T2 solver, T3 four experts, T5 memory
    python scripts/bench_fuse.py --only speculation --strong quickstart:strong --base quickstart:weak --adapter DIR \\
        --prompts rows.jsonl                                           # T4, on a trained pair

Models are made from a config with random weights (Llama 768 x 12, small 256 x 4, V = 32000, LoRA r = 16 on all
linears), fp32, prompt of 32 tokens. A time is the wall time of one decoding step, runs are interleaved, and
x = time / strong alone.
Results also go to --out as JSON, with the load of the machine: figures taken beside other work mean nothing.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.generation.streamers import BaseStreamer

from mtft.fuse.alpha import fuse_logits
from mtft.fuse.load import freeze, load_weak
from mtft.fuse.model import FusedCausalLM
from mtft.fuse.prompt import encode_prompt
from mtft.fuse.rows import BASE
from mtft.fuse.spec import FusionSpec

VOCABULARY, PROMPT = 32000, 32
GRID = torch.arange(0, 2.01, 0.1)
PARTS = ("step", "solver", "experts", "memory", "speculation")


def llama(width: int, layers: int, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=int(width * 2.75),
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        max_position_embeddings=2048,
    )
    return freeze(LlamaForCausalLM(config))


def make_adapter(folder: Path, base: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    model = LlamaForCausalLM.from_pretrained(base)
    tuned = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    tuned.save_pretrained(folder)
    return folder


class Clock(BaseStreamer):
    """Wall time of every step: generate hands each new column to it."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def put(self, value: Tensor) -> None:
        self.at.append(time.perf_counter())

    def end(self) -> None:
        pass

    @property
    def steps(self) -> list[float]:
        return [b - a for a, b in zip(self.at[2:], self.at[3:])]  # [0] is the prompt, [1] holds the prefill


def generated(generate: Callable[..., Any], ids: Tensor, tokens: int, **options: Any) -> list[float]:
    clock = Clock()
    call = {"max_new_tokens": tokens, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    generate(input_ids=ids, attention_mask=torch.ones_like(ids), streamer=clock, **call, **options)
    return clock.steps


def naive_grid(strong: Tensor, expert: Tensor, base: Tensor) -> Tensor:
    """Dynamic Logits Fusion as published, forward direction only: 21 softmaxes and KLs, the nearest wins."""
    logp = strong.log_softmax(-1)
    tuned, plain = expert.log_softmax(-1), base.log_softmax(-1)
    target = (tuned.exp() * (tuned - plain)).sum(-1)
    best = torch.full_like(target, torch.inf)
    answer = logp
    for a in GRID:
        fused = (logp + a * (tuned - plain)).log_softmax(-1)
        miss = ((fused.exp() * (fused - logp)).sum(-1) - target).abs()
        answer = torch.where((miss < best)[:, None], fused, answer)
        best = torch.minimum(best, miss)
    return answer


@torch.no_grad()
def three_models(models: list[Any], ids: Tensor, tokens: int, fuse: Callable[..., Tensor]) -> list[float]:
    """The plain loop: three models, three caches, one forward each per token."""
    caches = [DynamicCache(config=model.config) for model in models]
    times, block = [], ids
    for _ in range(tokens):
        start = time.perf_counter()
        pairs = zip(models, caches, strict=True)
        logits = [m(block, past_key_values=c, use_cache=True, logits_to_keep=1).logits[:, -1] for m, c in pairs]
        block = fuse(*logits).argmax(-1, keepdim=True)
        times.append(time.perf_counter() - start)
    return times[1:]


@torch.no_grad()
def adapter_names(strong: Any, tuned: PeftModel, ids: Tensor, tokens: int) -> list[float]:
    """Base and expert rows in one pass by PEFT, solved by us: what the rows engine saves shows alone."""
    caches = [DynamicCache(config=model.config) for model in (strong, tuned)]
    names = ["default"] * len(ids) + ["__base__"] * len(ids)
    times, block = [], ids
    for _ in range(tokens):
        start = time.perf_counter()
        large = strong(block, past_key_values=caches[0], use_cache=True, logits_to_keep=1).logits[:, -1]
        rows = {"past_key_values": caches[1], "use_cache": True, "logits_to_keep": 1, "adapter_names": names}
        expert, base = tuned(block.repeat(2, 1), **rows).logits[:, -1].chunk(2)
        block = fuse_logits(large, expert[None], base, FusionSpec()).logprobs_NV.argmax(-1, keepdim=True)
        times.append(time.perf_counter() - start)
    return times[1:]


def compare(ways: dict[str, Callable[[], list[float]]], against: str, repeats: int) -> dict[str, dict[str, float]]:
    """Interleaved repetitions; min and median of the steps in ms, and their ratio to `against`."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            times[name] += way()
    rows = {n: {"min_ms": 1e3 * min(t), "median_ms": 1e3 * statistics.median(t)} for n, t in times.items()}
    for row in rows.values():
        row["x_min"] = row["min_ms"] / rows[against]["min_ms"]
        row["x_median"] = row["median_ms"] / rows[against]["median_ms"]
    return rows


def bench_step(places: dict[str, Path], args: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    strong = llama(768, 12, 1)
    one, four = (
        FusedCausalLM(strong, load_weak(places["base"], places["adapters"][:t], dtype="fp32", device="cpu"), None,
                      FusionSpec(), vocab_size=VOCABULARY)
        for t in (1, 4)
    )  # fmt: skip
    base = freeze(LlamaForCausalLM.from_pretrained(places["base"]))
    tuned = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(places["base"]), places["adapters"][0]).eval()
    for rows in (1, 8):
        ids = torch.randint(3, VOCABULARY, (rows, PROMPT), generator=torch.Generator().manual_seed(rows))
        if "step" in args.only:
            naive = partial(three_models, [strong, tuned, base], ids, args.tokens)
            ways: dict[str, Callable[[], list[float]]] = {
                "strong alone": lambda ids=ids: generated(strong.generate, ids, args.tokens),
                "fused": lambda ids=ids: generated(one.generate, ids, args.tokens),
                "naive: 3 forwards, alpha 1": lambda naive=naive: naive(lambda s, e, b: s + e - b),
                "naive: 3 forwards, 21 grid": lambda naive=naive: naive(naive_grid),
                "PEFT adapter_names": lambda ids=ids: adapter_names(strong, tuned, ids, args.tokens),
            }  # fmt: skip
            yield f"T1 step, B={rows}", compare(ways, "strong alone", args.repeats)
        if "experts" in args.only and rows == 1:
            ways = {
                "strong alone": lambda ids=ids: generated(strong.generate, ids, args.tokens),
                "fused, 4 experts": lambda ids=ids: generated(four.generate, ids, args.tokens),
            }
            yield "T3 four experts, B=1", compare(ways, "strong alone", args.repeats)


def bench_solver(args: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    for vocabulary in (32000, 128000):
        for rows in (1, 8):
            generator = torch.Generator().manual_seed(vocabulary + rows)
            strong, base, noise = (torch.randn(rows, vocabulary, generator=generator) for _ in range(3))
            strong, expert = 2 * strong, base + 0.8 * noise

            def timed(work: Callable[[], Any], count: int = 5) -> list[float]:
                times = []
                for _ in range(count):
                    start = time.perf_counter()
                    work()
                    times.append(time.perf_counter() - start)
                return times

            def ours(rule: str, s: Tensor = strong, e: Tensor = expert, b: Tensor = base) -> Any:
                return fuse_logits(s, e[None], b, FusionSpec(alpha_rule=rule))

            ways = {"21 grid": lambda s=strong, e=expert, b=base: timed(lambda: naive_grid(s, e, b))}
            for rule in ("jeffreys", "forward", "paper", "paper_grid"):
                ways[rule] = lambda rule=rule, ours=ours: timed(lambda: ours(rule))
            found = compare(ways, "21 grid", args.repeats)
            forward = ours("forward")
            miss = (forward.kl_forward_N - forward.target_NT[:, 0]).abs() / forward.target_NT[:, 0]
            found["forward"]["worst_relative_miss"] = float(miss[~forward.clipped_N].max())
            found["jeffreys"]["evaluations"] = ours("jeffreys").evaluations
            yield f"T2 solver, V={vocabulary}, B={rows}", found


def bench_memory(places: dict[str, Path]) -> Iterator[tuple[str, Any]]:
    """Resident memory of the weak side after a pass over all its rows: one base, and the adapters."""
    page, rows = os.sysconf("SC_PAGE_SIZE"), {}

    def resident() -> float:
        gc.collect()
        return int(Path("/proc/self/statm").read_text().split()[1]) * page / 2**20

    for count in (1, 2, 4, 8):
        before = resident()
        weak = load_weak(places["base"], places["adapters"][:count], dtype="fp32", device="cpu")
        weak.layout.set((*range(count), BASE), 1)
        with torch.no_grad():  # touches every weight: files are mapped, and pages that were never read don't count
            weak.model(torch.full((count + 1, 1), 5), logits_to_keep=1)
        buffers = [b for n, b in weak.model.named_buffers() if n.endswith(("A_TNR", "B_TRM"))]
        rows[f"T={count}"] = {
            "base_MB": sum(p.numel() * p.element_size() for p in weak.model.parameters()) / 2**20,
            "adapters_MB": sum(b.numel() * b.element_size() for b in buffers) / 2**20,
            "resident_MB": resident() - before,
        }
        del weak, buffers
    yield "T5 one copy of the base", rows


def bench_speculation(args: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    """On a trained pair: tokens identical, time per token against plain fusion, acceptance, time of each pass."""
    fused = FusedCausalLM.load(args.strong, args.base, args.adapter, dtype="fp32")
    rows = [json.loads(line) for line in Path(args.prompts).read_text("utf-8").splitlines()[: args.limit]]
    prompts = [encode_prompt(fused.tokenizer, row.get("prompt"), row.get("messages")) for row in rows]
    call = {"max_new_tokens": args.tokens, "do_sample": False, "pad_token_id": 0}
    kinds: dict[str, Any] = {"plain": None, "gamma 2": 2, "gamma 4": 4, "auto": "auto"}
    spent, made = dict.fromkeys(kinds, 0.0), dict.fromkeys(kinds, 0)
    same, counts = dict.fromkeys(kinds, 0), {kind: [0, 0] for kind in kinds}
    passes: dict[str, float] = {}
    for prompt in prompts:
        ids = torch.tensor([prompt])
        outputs = {}
        for kind, gamma in kinds.items():
            start = time.perf_counter()
            outputs[kind] = fused.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), speculative=gamma, **call
            )
            spent[kind] += time.perf_counter() - start
            made[kind] += outputs[kind].shape[1] - len(prompt)
            same[kind] += torch.equal(outputs[kind], outputs["plain"])
            last = fused.last_gamma
            if gamma is not None and last is not None:
                counts[kind][0] += last.accepted
                counts[kind][1] += last.drafted
                if last.draft:
                    passes[f"{kind}: draft_ms"] = 1e3 * statistics.median(last.draft)
                for length, times in last.verify.items():
                    passes[f"{kind}: verify {length} positions_ms"] = 1e3 * statistics.median(times)
    table = {
        kind: {
            "ms_per_token": 1e3 * spent[kind] / made[kind],
            "speedup": (spent["plain"] / made["plain"]) / (spent[kind] / made[kind]),
            "acceptance": counts[kind][0] / counts[kind][1] if counts[kind][1] else None,
            "identical": f"{same[kind]} of {len(prompts)}",
        }
        for kind in kinds
    }
    yield "T4 speculation", table | {"passes of the last prompt": passes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="step,solver,experts,memory", help=f"some of {','.join(PARTS)}")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    for name in ("strong", "base"):
        parser.add_argument(f"--{name}", default=f"quickstart:{'strong' if name == 'strong' else 'weak'}")
    parser.add_argument("--adapter", action="append", help="of a trained pair; may be given several times")
    parser.add_argument("--prompts", help="JSONL with prompt or messages")
    parser.add_argument("--limit", type=int, default=32, help="prompts of the speculation part")
    args = parser.parse_args()
    args.only = set(args.only.split(","))
    if unknown := args.only - set(PARTS):
        parser.error(f"unknown part {', '.join(sorted(unknown))}: choose from {', '.join(PARTS)}")
    if "speculation" in args.only and not (args.adapter and args.prompts):
        parser.error("the speculation part needs a trained pair: --adapter DIR --prompts FILE")
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore", category=FutureWarning)
    load = os.getloadavg()[0]
    results: dict[str, Any] = {"load_before": load, "quiet": load < 0.5, "threads": args.threads}
    print(f"load {load:.2f}" + ("" if load < 0.5 else ": NOT QUIET, these figures mean little"))
    with tempfile.TemporaryDirectory() as scratch:
        places: dict[str, Any] = {"base": Path(scratch) / "base"}
        if args.only & {"step", "experts", "memory"}:
            llama(256, 4, 2).save_pretrained(places["base"])
            count = 8 if "memory" in args.only else 4
            places["adapters"] = [make_adapter(Path(scratch) / f"e{i}", places["base"], i) for i in range(count)]
        parts: list[Iterator[tuple[str, Any]]] = []
        parts += [bench_step(places, args)] if args.only & {"step", "experts"} else []
        parts += [bench_solver(args)] if "solver" in args.only else []
        parts += [bench_memory(places)] if "memory" in args.only else []
        parts += [bench_speculation(args)] if "speculation" in args.only else []
        for part in parts:
            for title, rows in part:
                results[title] = rows
                print(f"\n{title}")
                for name, row in rows.items():
                    print(f"  {name:28s} " + "  ".join(f"{k} {_show(v)}" for k, v in row.items()))
    if args.out:
        args.out.write_text(json.dumps(results, indent=1) + "\n")


def _show(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
