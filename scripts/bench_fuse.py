"""What fusion costs against strong alone, naive fusion and PEFT's adapter_names, bar by bar: PASS or MISS.

    python scripts/bench_fuse.py                        # T1 step, T2 solver, T3 four experts, T4 speculation, T5 memory
    python scripts/bench_fuse.py --full                 # more rounds and prompts, a long prompt, all ways: ten minutes
    python scripts/bench_fuse.py --only speculation --adapter DIR       # an adapter trained on quickstart:weak

T1, T3: models from a config with random weights (Llama 768 x 12, small 256 x 4, V = 32000, LoRA r = 16 on all linears),
fp32, prompt of 32 tokens; strong alone is transformers' generate, fused is what `FusedCausalLM.load` gives. T4: the
quickstart's pair with its joint adapter (of runs/quickstart, or trained here first, about a minute, and kept) on
held-out prompts, 48 tokens each. A time is that of one decoding step; the prefill is not counted. Rounds are
interleaved; x is the median over the rounds of time / strong alone, both of the same round. On a quiet machine
two threads run and wall time is judged, elsewhere one thread and CPU time: two that wait for each other on busy cores
measure the others' work. --out: all figures as JSON.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.generation.streamers import BaseStreamer

from mtft.data.store.token_store import open_stores
from mtft.fuse.alpha.buffers import FusionBuffers
from mtft.fuse.alpha.fused_logits import fuse_logits
from mtft.fuse.alpha.spec import FusionSpec
from mtft.fuse.decoding.multi_lora import BASE
from mtft.fuse.decoding.transposed_linear import transpose_lm_head
from mtft.fuse.fused_model import FusedCausalLM
from mtft.fuse.load_models import freeze, load_weak_model
from mtft.models.loading import expand_quickstart
from mtft.recipe.load import load_recipe

VOCABULARY, PROMPT, LONG = 32000, 32, 512
GRID = torch.arange(0, 2.01, 0.1)
PARTS = ("step", "solver", "experts", "speculation", "memory")
QUIET = 0.5  # load below which two threads run and wall time is judged
Steps = list[tuple[float, float]]  # (wall, CPU) seconds of each step
Rows = dict[str, dict[str, Any]]


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


def make_adapter(folder: Path, base: Path, seed: int, std: float = 0.02) -> Path:
    torch.manual_seed(seed)
    model = LlamaForCausalLM.from_pretrained(base)
    tuned = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=std)
    tuned.save_pretrained(folder)
    return folder


class Clock(BaseStreamer):
    """Wall and CPU time of every step: generate hands each new column to it."""

    def __init__(self) -> None:
        self.at: Steps = []

    def put(self, value: Tensor) -> None:
        self.at.append((time.perf_counter(), time.process_time()))

    def end(self) -> None:
        pass

    @property
    def steps(self) -> Steps:
        later = self.at[2:]  # [0] is the prompt, [1] holds the prefill
        return [(b[0] - a[0], b[1] - a[1]) for a, b in zip(self.at[1:], later, strict=False)]


def timed(work: Callable[[], Any]) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def generated(generate: Callable[..., Any], ids: Tensor, tokens: int, **options: Any) -> Steps:
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
def plain_loop(models: list[Any], ids: Tensor, tokens: int, choose: Callable[..., Tensor]) -> Steps:
    """The plain loop: every model with a cache of its own, one forward each per token. `choose`: logits -> scores."""
    caches = [DynamicCache(config=model.config) for model in models]
    times, block = [], ids

    def step() -> None:
        nonlocal block
        pairs = zip(models, caches, strict=True)
        logits = [m(block, cache=c, use_cache=True, logits_to_keep=1).logits[:, -1] for m, c in pairs]
        block = choose(*logits).argmax(-1, keepdim=True)

    for _ in range(tokens):
        times.append(timed(step))
    return times[1:]


@torch.no_grad()
def adapter_names(strong: Any, tuned: PeftModel, ids: Tensor, tokens: int) -> Steps:
    """Base and expert rows in one pass by PEFT, solved by us: what the rows engine saves shows alone."""
    caches = [DynamicCache(config=model.config) for model in (strong, tuned)]
    names = ["default"] * len(ids) + ["__base__"] * len(ids)
    times, block, buffers = [], ids, FusionBuffers()

    def step() -> None:
        nonlocal block
        large = strong(block, cache=caches[0], use_cache=True, logits_to_keep=1).logits[:, -1]
        rows = {"cache": caches[1], "use_cache": True, "logits_to_keep": 1, "adapter_names": names}
        expert, base = tuned(block.repeat(2, 1), **rows).logits[:, -1].chunk(2)
        fused = fuse_logits(large, expert[None], base, FusionSpec(), buffers=buffers)
        block = fused.logprobs_NV.argmax(-1, keepdim=True)

    for _ in range(tokens):
        times.append(timed(step))
    return times[1:]


def compare(ways: dict[str, Callable[[], Steps]], against: str, repeats: int) -> Rows:
    """Interleaved rounds; ms per step (median of all), and x, the median over rounds of a round's own ratio."""
    rounds: list[dict[str, list[float]]] = []
    for _ in range(repeats):
        steps = {name: way() for name, way in ways.items()}
        rounds.append({n: [statistics.median(part) for part in zip(*each, strict=True)] for n, each in steps.items()})
    rows: Rows = {}
    for name in ways:
        row = rows[name] = {}
        for at, kind in enumerate(("wall", "cpu")):
            row[f"{kind}_ms"] = 1e3 * statistics.median(each[name][at] for each in rounds)
            row[f"x_{kind}"] = statistics.median(each[name][at] / each[against][at] for each in rounds)
    return rows


def say(line: str) -> None:
    """At once: a run that is cut off has shown what it had."""
    print(line, flush=True)


class Judge:
    """Prints what is found, keeps it, and says which bars hold."""

    def __init__(self, quiet: bool) -> None:
        self.kind = "wall" if quiet else "cpu"
        self.found: dict[str, Any] = {}
        self.bars: dict[str, bool] = {}

    def show(self, title: str, rows: Rows) -> None:
        self.found[title] = rows
        say(f"\n{title}")
        for name, row in rows.items():
            say(f"  {name:28s} " + "  ".join(f"{k} {_show(v)}" for k, v in row.items()))

    def bar(self, name: str, value: float, limit: float, *, least: bool = False) -> None:
        """value <= limit, or with `least` value >= limit."""
        holds = value >= limit if least else value <= limit
        self.bars[f"{name}: {value:.3g} (bar {'>=' if least else '<='} {limit:.3g})"] = holds
        say(f"  {'PASS' if holds else 'MISS'}  {name}: {value:.3f}, bar {'>=' if least else '<='} {limit:.3f}")


def bench_step(places: dict[str, Any], args: argparse.Namespace, judge: Judge) -> None:
    strong = llama(768, 12, 1)
    ours = copy.deepcopy(strong, {id(p): p for p in strong.parameters()})  # the same weights
    transpose_lm_head(ours)  # as FusedCausalLM.load does
    one, four = (
        FusedCausalLM(ours, load_weak_model(places["base"], places["adapters"][:t], dtype="fp32", device="cpu"), None,
                      FusionSpec(), vocab_size=VOCABULARY)
        for t in (1, 4)
    )  # fmt: skip
    base = freeze(LlamaForCausalLM.from_pretrained(places["base"]))
    tuned = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(places["base"]), places["adapters"][0]).eval()
    x = f"x_{judge.kind}"
    for rows in (1, 8):
        ids = torch.randint(3, VOCABULARY, (rows, PROMPT), generator=torch.Generator().manual_seed(rows))
        alone = partial(generated, strong.generate, ids, args.tokens)
        if "step" in args.only:
            three = partial(plain_loop, [strong, tuned, base], ids, args.tokens)
            ways: dict[str, Callable[[], Steps]] = {
                "strong alone": alone,
                "strong alone, head as fused": partial(generated, ours.generate, ids, args.tokens),
                "fused": partial(generated, one.generate, ids, args.tokens),
                "naive: 3 forwards, 21 grid": partial(three, naive_grid),
                "PEFT adapter_names": partial(adapter_names, strong, tuned, ids, args.tokens),
            }
            if args.full:
                ways["naive: 3 forwards, alpha 1"] = partial(three, lambda s, e, b: s + e - b)
                ways["strong alone, bare loop"] = partial(plain_loop, [strong], ids, args.tokens, lambda s: s)
            found = compare(ways, "strong alone", args.repeats)
            judge.show(f"T1 step, B={rows}", found | {"cost per pass": passes(one, ids)})
            judge.bar(f"T1 fused / strong alone, B={rows}", found["fused"][x], 1.25 if rows == 1 else 1.22)
            rivals = min(found[name][x] for name in ("naive: 3 forwards, 21 grid", "PEFT adapter_names"))
            judge.bar(f"T1 fused / the faster rival, B={rows}", found["fused"][x] / rivals, 1.0)
            if args.full:
                long = torch.randint(3, VOCABULARY, (rows, LONG), generator=torch.Generator().manual_seed(rows))
                ways = {
                    n: partial(generated, m.generate, long, args.tokens)
                    for n, m in (("strong alone", strong), ("fused", one))
                }
                judge.show(f"step after a prompt of {LONG}, B={rows}", compare(ways, "strong alone", args.repeats))
        if "experts" in args.only and rows == 1:
            ways = {"strong alone": alone, "fused, 4 experts": partial(generated, four.generate, ids, args.tokens)}
            found = compare(ways, "strong alone", args.repeats)
            judge.show("T3 four experts, B=1", found)
            judge.bar("T3 four experts / strong alone", found["fused, 4 experts"][x], 1.5)


@torch.no_grad()
def passes(fused: FusedCausalLM, ids: Tensor) -> dict[str, float]:
    """CPU ms of each part of a step."""
    sides, last = fused.cached_models(), ids[:, -1:]
    logits = [x[:, -1] for x in flat(sides.read(ids))]
    specs = [fused.spec] * len(ids)
    parts = {
        "strong": lambda: sides.strong.read(last),
        "weak": lambda: sides.weak.read(last),
        "solve": lambda: fused.fuse(logits[0], logits[1:-1], logits[-1], specs),
    }
    return {f"{n}_cpu_ms": 1e3 * statistics.median(timed(part)[1] for _ in range(7)) for n, part in parts.items()}


def flat(logits: tuple[Tensor, list[Tensor], Tensor]) -> list[Tensor]:
    return [logits[0], *logits[1], logits[2]]


def bench_solver(args: argparse.Namespace, judge: Judge) -> None:
    for vocabulary in (32000, 128000):
        for rows in (1, 8):
            generator = torch.Generator().manual_seed(vocabulary + rows)
            strong, base, noise = (torch.randn(rows, vocabulary, generator=generator) for _ in range(3))
            strong, expert, buffers = 2 * strong, base + 0.8 * noise, FusionBuffers()

            def ours(rule: str, s: Tensor = strong, e: Tensor = expert, b: Tensor = base, w: Any = buffers) -> Any:
                return fuse_logits(s, e[None], b, FusionSpec(alpha_rule=rule), buffers=w)  # as FusedCausalLM does

            ways: dict[str, Callable[[], Steps]] = {
                "21 grid": lambda s=strong, e=expert, b=base: [timed(lambda: naive_grid(s, e, b)) for _ in range(5)]
            }
            for rule in ("jeffreys", "forward", "paper", "paper_grid") if args.full else ("jeffreys", "forward"):
                ways[rule] = lambda rule=rule, ours=ours: [timed(lambda: ours(rule)) for _ in range(5)]
            found = compare(ways, "21 grid", args.repeats)
            forward = ours("forward")
            miss = (forward.kl_forward_N - forward.target_NT[:, 0]).abs() / forward.target_NT[:, 0]
            found["forward"]["worst_relative_miss"] = worst = float(miss[~forward.clipped_N].max())
            found["jeffreys"]["evaluations"] = ours("jeffreys").evaluations
            judge.show(f"T2 solver, V={vocabulary}, B={rows}", found)
            for rule in ("jeffreys", "forward"):
                judge.bar(f"T2 {rule} / grid, V={vocabulary}, B={rows}", found[rule][f"x_{judge.kind}"], 1 / 3)
            judge.bar(f"T2 |g - c| / c, V={vocabulary}, B={rows}", worst, 1e-4)


def bench_memory(places: dict[str, Any], judge: Judge) -> None:
    """The weak side after a pass over all its rows: storages by address, and resident memory."""
    page, rows = os.sysconf("SC_PAGE_SIZE"), {}

    def resident() -> float:
        gc.collect()
        return int(Path("/proc/self/statm").read_text().split()[1]) * page / 2**20

    for count in (1, 2, 4, 8):
        before = resident()
        weak = load_weak_model(places["base"], places["adapters"][:count], dtype="fp32", device="cpu")
        weak.layout.set((*range(count), BASE), 1)
        with torch.no_grad():  # touches every weight: files are mapped, and pages that were never read don't count
            weak.model(torch.full((count + 1, 1), 5), logits_to_keep=1)
        tensors = [*weak.model.parameters(), *weak.model.buffers()]
        held = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
        factors = [b for n, b in weak.model.named_buffers() if n.endswith(("A_TNR", "B_TRM"))]
        rows[f"T={count}"] = {
            "base_MB": sum(p.numel() * p.element_size() for p in weak.model.parameters()) / 2**20,
            "adapters_MB": sum(b.numel() * b.element_size() for b in factors) / 2**20,
            "storages_MB": sum(held.values()) / 2**20,
            "resident_MB": resident() - before,
        }
        del weak, factors, tensors
    judge.show("T5 one copy of the base", rows)
    last = rows["T=8"]
    judge.bar(
        "T5 storages / (base + adapters), T=8", last["storages_MB"] / (last["base_MB"] + last["adapters_MB"]), 1.01
    )
    more = rows["T=8"]["resident_MB"] - rows["T=1"]["resident_MB"]
    judge.bar("T5 resident memory from T=1 to 8, MB", more, last["adapters_MB"] + 0.25 * last["base_MB"])


def quickstart_adapter() -> Path:
    """The joint adapter of runs/quickstart, or one that is trained here and kept."""
    root = Path(__file__).resolve().parents[1]
    finished = root / "runs" / "quickstart" / "train" / "joint" / "adapter"
    if (finished / "adapter_model.safetensors").is_file():
        return finished
    from mtft.pipeline.stages.derived_recipes import joint_recipe
    from mtft.training.run_training import train

    folder = root / "runs" / "bench-fuse"
    if not (folder / "result.json").is_file():
        say("training the quickstart's joint adapter, about a minute, kept in runs/bench-fuse")
    return train(joint_recipe(load_recipe(root / "recipes" / "quickstart.yaml"), None, folder)).adapter_dir


def held_out_prompts(tokenizer: Any, count: int) -> list[Tensor]:
    """Prompts of the quickstart's held-out rows, the tasks in turn."""
    recipe = load_recipe(Path(__file__).resolve().parents[1] / "recipes" / "quickstart.yaml")
    stores = [store for store in open_stores(recipe, tokenizer, "eval") if store is not None]
    rows = [store.example(row) for row in range(-(-count // len(stores))) for store in stores][:count]
    return [torch.tensor(ids[: int(supervised.argmax())].astype("int64"))[None] for ids, supervised in rows]


def bench_speculation(args: argparse.Namespace, judge: Judge) -> None:
    """On a trained pair, with long texts and with its own short ones, and with a drafter whose drafts are refused."""
    good = args.adapter or quickstart_adapter()
    with tempfile.TemporaryDirectory() as scratch:
        bad = make_adapter(Path(scratch) / "bad", Path(expand_quickstart("quickstart:weak")), 3, std=0.2)
        speculation("trained pair", good, args, judge)
        speculation("trained pair, own ends", good, args, judge, ends={})
        never = FusionSpec(alpha_rule="fixed", alpha=0.0)  # the drafts of an expert that has no say are bad ones
        speculation("bad drafter", bad, args, judge, spec=never)


def speculation(
    name: str,
    adapter: Path,
    args: argparse.Namespace,
    judge: Judge,
    *,
    ends: dict[str, Any] | None = None,
    spec: FusionSpec | None = None,
) -> None:
    """`ends` {}: answers stop where the model ends them (after about ten tokens), else all have 48."""
    fused = FusedCausalLM.load("quickstart:strong", "quickstart:weak", [adapter], spec, dtype="fp32")
    prompts = held_out_prompts(fused.tokenizer, args.limit)
    kinds: dict[str, Any] = {"plain": None, "auto": "auto"} | ({"gamma 2": 2, "gamma 4": 4} if args.full else {})
    steps: dict[str, list[list[float]]] = {kind: [] for kind in kinds}
    same, counts = dict.fromkeys(kinds, 0), {kind: [0, 0] for kind in kinds}
    costs: dict[str, Any] = {}
    for prompt in prompts:
        outputs = {}
        for kind, gamma in kinds.items():
            clock = Clock()
            call = {"max_new_tokens": 48, "do_sample": False, "pad_token_id": 0}
            call |= {"eos_token_id": None} if ends is None else ends
            outputs[kind] = fused.generate(
                input_ids=prompt, attention_mask=torch.ones_like(prompt), speculative=gamma, streamer=clock, **call
            )
            same[kind] += torch.equal(outputs[kind], outputs["plain"])
            if clock.steps:
                steps[kind].append([sum(part) / len(clock.steps) for part in zip(*clock.steps, strict=True)])
            last = fused.last_draft_length
            if gamma is not None and last is not None:
                counts[kind][0] += last.accepted
                counts[kind][1] += last.drafted
                costs |= {f"verify_{n}_ms": 1e3 * statistics.median(t) for n, t in sorted(last.verify.items())}
                costs |= {"draft_ms": 1e3 * statistics.median(last.draft)} if last.draft else {}
                costs |= {"plain_ms": 1e3 * statistics.median(last.plain)} if last.plain else {}
    at = ("wall", "cpu").index(judge.kind)
    table: Rows = {
        kind: {
            "ms_per_token": 1e3 * statistics.fmean(each[at] for each in steps[kind]),
            "speedup": statistics.median(p[at] / k[at] for p, k in zip(steps["plain"], steps[kind], strict=True)),
            "acceptance": counts[kind][0] / counts[kind][1] if counts[kind][1] else None,
            "identical": f"{same[kind]} of {len(prompts)}",
        }
        for kind in kinds
    }
    judge.show(f"T4 speculation, {name}", table | {"cost per pass (wall)": costs})
    if name == "trained pair":
        judge.bar("T4 acceptance, auto", table["auto"]["acceptance"] or 0.0, 0.7, least=True)
        judge.bar("T4 auto against plain, trained pair", table["auto"]["speedup"], 1.3, least=True)
    else:  # where drafting does not pay it must not cost either
        judge.bar(f"T4 auto against plain, {name}", table["auto"]["speedup"], 0.95, least=True)
    judge.bar(f"T4 identical texts, {name}", min(same.values()) / len(prompts), 1.0, least=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default=",".join(PARTS), help=f"some of {','.join(PARTS)}")
    parser.add_argument("--full", action="store_true", help="all ways, and more rounds, tokens and prompts")
    parser.add_argument("--tokens", type=int, help="of a step's measurement; 10, or 16 with --full")
    parser.add_argument("--repeats", type=int, help="interleaved rounds; 5, or 9 with --full")
    parser.add_argument("--threads", type=int, help="2 on a quiet machine, else 1")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--adapter", type=Path, help="trained on quickstart:weak")
    parser.add_argument("--limit", type=int, help="prompts of the speculation part; 12, or 24 with --full")
    args = parser.parse_args()
    for name, short, long in (("tokens", 10, 16), ("repeats", 5, 9), ("limit", 12, 24)):
        if getattr(args, name) is None:
            setattr(args, name, long if args.full else short)
    args.only = set(args.only.split(","))
    if unknown := args.only - set(PARTS):
        parser.error(f"unknown part {', '.join(sorted(unknown))}: choose from {', '.join(PARTS)}")
    load = os.getloadavg()[0]
    threads = args.threads or (2 if load < QUIET else 1)
    torch.set_num_threads(threads)
    warnings.filterwarnings("ignore", category=FutureWarning)
    judge = Judge(load < QUIET)
    state = "quiet: wall time is judged" if load < QUIET else "NOT QUIET: CPU time is judged"
    say(f"load {load:.2f}, {threads} thread{'s' * (threads > 1)}, {state}")
    if "speculation" in args.only and args.adapter is None:
        args.adapter = quickstart_adapter()  # training comes before any clock runs
    with tempfile.TemporaryDirectory() as scratch:
        places: dict[str, Any] = {"base": Path(scratch) / "base"}
        if args.only & {"step", "experts", "memory"}:
            llama(256, 4, 2).save_pretrained(places["base"])
            count = 8 if "memory" in args.only else 4
            places["adapters"] = [make_adapter(Path(scratch) / f"e{i}", places["base"], i) for i in range(count)]
        if "memory" in args.only:  # first: later parts leave free memory behind, which would hide what is taken
            bench_memory(places, judge)
        if args.only & {"step", "experts"}:
            bench_step(places, args, judge)
        if "solver" in args.only:
            bench_solver(args, judge)
        if "speculation" in args.only:
            bench_speculation(args, judge)
    say("")
    for name, holds in judge.bars.items():
        say(f"{'PASS' if holds else 'MISS'}  {name}")
    if args.out:
        head = {"load_before": load, "judged": judge.kind, "threads": threads, "bars": judge.bars}
        args.out.write_text(json.dumps(head | judge.found, indent=1) + "\n")


def _show(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
