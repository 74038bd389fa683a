"""What the multi-task objective costs, each figure against a peer in the same run.

    python scripts/bench_losses.py                          everything (below three minutes), bars last
    python scripts/bench_losses.py --only mftcoder --steps 50 --seconds 120 --json out.json

bookkeeping  counts, coefficients and task sums as a share of a plain token-mean step, at 5 and 30 million parameters
balancers    each balancer's own time and its extra forwards as a share of a step; CoBa as a real loop beside it
paths        time of a step and peak memory of each loss path beside full fp32 logits (vocabulary 32k, half supervised)
head         output head and loss at a vocabulary of 151,936 (frozen head, width 896, 2,048 supervised tokens): time and
             peak memory of the chunked path beside the gathered logits
mftcoder     a whole step (forward, backward, AdamW) beside a loss written as MFTCoder's: full fp32 logits, loop over
             tasks; the same padded batch, half of its positions supervised, vocabulary 16k

Steps of the two sides alternate, so a busy machine slows both; reported are medians, and the 10 and 90 % quantiles of
the paired ratios. Each part runs in a process of its own. It matters for `mftcoder`: where malloc keeps what was freed
(MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=8589934592), the large fp32 logits cost no page faults, and the factor on a
CPU falls from about 1.75 to 1.37. The last lines say PASS or MISS for each bar.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mtft.data.batching.batch import IGNORE, Batch
from mtft.data.batching.packed_attention import model_inputs
from mtft.losses.balancers import BALANCERS, BalancerContext, Observation
from mtft.losses.chunked_nll import Head, chunked_nll
from mtft.losses.task_reduction import coefficients, reduce_sums, step_counts, task_losses, task_sums
from mtft.losses.token_nll import row_nll_in_place, token_nll

TASKS = 5
SIZES = {  # name: (width, layers, mlp width, vocabulary), tied embeddings
    "5M": (192, 6, 512, 8192),
    "30M": (512, 6, 1408, 16384),
    "head": (192, 4, 512, 16384),
    "wide": (192, 4, 512, 32768),
}


def make_model(size: str):
    from transformers import LlamaConfig, LlamaForCausalLM

    width, layers, mlp, vocabulary = SIZES[size]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        tie_word_embeddings=True,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def make_batch(rows: int, width: int, vocabulary: int, seed: int = 0) -> Batch:
    """Padded rows of one example each, 60 to 100 % of the width long; half of all positions are supervised."""
    generator = torch.Generator().manual_seed(seed)
    ids_BT = torch.randint(1, vocabulary, (rows, width), generator=generator)
    length_B = torch.randint(int(0.6 * width), width + 1, (rows,), generator=generator)
    place_T = torch.arange(width)
    real_BT = place_T < length_B[:, None]
    task_B = torch.arange(rows) % TASKS
    last_B1 = length_B[:, None] - 1  # no token to predict from it
    answer_BT = (place_T < last_B1) & (place_T >= last_B1 - width // 2)
    labels_BT = torch.where(answer_BT, ids_BT.roll(-1, dims=1), IGNORE)
    segment_BT = torch.where(real_BT, 0, -1).int()
    task_BT = torch.where(real_BT, task_B[:, None], -1).int()
    return Batch(torch.where(real_BT, ids_BT, 0), place_T.expand(rows, width), segment_BT, task_BT, labels_BT)


def full_logits_nll(model, batch: Batch) -> Tensor:
    """What most trainers do: logits of every position, in fp32."""
    logits_BTV = model(**model_inputs(batch, "sdpa")).logits.float()
    flat = F.cross_entropy(
        logits_BTV.view(-1, logits_BTV.shape[-1]), batch.labels_BT.view(-1), ignore_index=IGNORE, reduction="none"
    )
    return flat.view(batch.labels_BT.shape)


def task_loop_loss(nll_BT: Tensor, batch: Batch) -> Tensor:
    """A loss as MFTCoder has it (case3): mean over tasks of the task's token mean, one task after the other."""
    task_B = batch.task_ids_BT[:, 0]
    supervised_BT = batch.labels_BT != IGNORE
    means = [nll_BT[task_B == k].sum() / supervised_BT[task_B == k].sum() for k in task_B.unique()]
    return torch.stack(means).mean()


def optimizer_step(model, optimizer, loss: Tensor) -> None:
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
clock, seconds_each = "wall", 16.0  # set once by main


def timed(run: Callable[[], object]) -> float:
    start = CLOCKS[clock]()
    run()
    return CLOCKS[clock]() - start


def alternate(sides: dict[str, Callable[[], object]], steps: int) -> dict[str, np.ndarray]:
    """Seconds of each side, one after the other within every round, after one round to warm up.

    At the most `steps` rounds; fewer, but at least 3, when `seconds_each` is over.
    """
    for run in sides.values():
        run()
    rows, end = [], time.monotonic() + seconds_each
    while len(rows) < steps and (len(rows) < 3 or time.monotonic() < end):
        rows.append([timed(run) for run in sides.values()])
    return dict(zip(sides, np.array(rows).T, strict=True))


def ratio(above: np.ndarray, below: np.ndarray) -> dict[str, float]:
    low, middle, high = np.quantile(above / below, [0.1, 0.5, 0.9])
    return {"median": round(float(middle), 4), "q10": round(float(low), 4), "q90": round(float(high), 4)}


def bookkeeping(steps: int) -> dict:
    """The functions of reduce.py alone, over a step of one micro-batch with a plain token mean."""
    out = {}
    for size in ("5M", "30M"):
        model, w_K = make_model(size), torch.ones(TASKS, dtype=torch.float64)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        batch = make_batch(8, 256, model.config.vocab_size)
        tokens, nll_BT = int((batch.labels_BT != IGNORE).sum()), token_nll(model, batch).detach()

        def plain(model=model, optimizer=optimizer, batch=batch, tokens=tokens):
            optimizer_step(model, optimizer, token_nll(model, batch).sum() / tokens)

        def books(batch=batch, w_K=w_K, nll_BT=nll_BT):
            counts = step_counts([batch], TASKS)
            (coefficients(batch, counts, w_K, "task_token") * nll_BT).sum()
            task_losses(reduce_sums([task_sums(nll_BT, batch, TASKS)], TASKS), counts, "task_token")

        seconds = alternate({"plain": plain, "books": books}, steps)
        out[size] = {
            "parameters": sum(p.numel() for p in model.parameters()),
            "plain_step_ms": round(1e3 * float(np.median(seconds["plain"])), 2),
            "share_of_step": ratio(seconds["books"], seconds["plain"]),
        }
    return out


def balancers(steps: int) -> dict:
    """Cost of a step = own time + extra forwards it asks for, over a plain step of one micro-batch (the worst case)."""
    model = make_model("5M")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    batch = make_batch(8, 256, model.config.vocab_size)
    counts = step_counts([batch], TASKS)

    def train(w_K=None):
        w_K = torch.ones(TASKS) if w_K is None else w_K
        c_BT = coefficients(batch, counts, w_K, "task_token")
        optimizer_step(model, optimizer, (c_BT * token_nll(model, batch)).sum())

    @torch.no_grad()
    def forward():
        token_nll(model, batch)

    seconds = alternate({"step": train, "forward": forward}, steps)
    step, pass_ = float(np.median(seconds["step"])), float(np.median(seconds["forward"]))
    out = {"step_ms": round(1e3 * step, 2), "forward_ms": round(1e3 * pass_, 2)}
    names, loss_K = tuple("abcde"), torch.linspace(1, 2, TASKS, dtype=torch.float64)
    given = {"fixed": ("values",), "visatb": ("given", "received", "alone")}
    variants = {"famo, second forward": ("famo", {"after": "exact"}), "gls, exact": ("gls", {"step_loss": "exact"})}
    for label, (name, options) in ({name: (name, {}) for name in BALANCERS} | variants).items():
        options = {**options, **{key: dict.fromkeys(names, 1.0) for key in given.get(name, ())}}
        sizes_K = torch.full((TASKS,), 100)
        balancer = BALANCERS[name](BalancerContext(names, examples_K=sizes_K, tokens_K=sizes_K), **options)
        needs = balancer.needs
        balancer.update(Observation(0, loss_K * torch.nan, valid_loss_K=loss_K))
        start, repeats = time.perf_counter(), 400
        for t in range(1, repeats + 1):
            balancer.weights(t, loss_K if needs.step_loss else None)
            seen = Observation(
                t,
                loss_K,
                loss_K / t**0.1 if needs.valid_every and t % needs.valid_every == 0 else None,
                torch.eye(TASKS, dtype=torch.float64) if needs.gram_every and t % needs.gram_every == 0 else None,
                loss_K if needs.after_step else None,
                torch.exp(-loss_K) if needs.token_probs else None,
            )
            balancer.update(seen)
        own = (time.perf_counter() - start) / repeats
        forwards = (1 / needs.valid_every if needs.valid_every else 0) + needs.after_step + needs.step_loss
        out[label] = {
            "own_us": round(1e6 * own, 1),
            "extra_forwards": round(forwards, 3),
            "percent_of_step": round(100 * (own + forwards * pass_) / step, 2),
            **({"plus": f"task gradients every {needs.gram_every} steps"} if needs.gram_every else {}),
        }
    out["coba, real loop"] = coba_loop(train, forward, steps)
    return out


def coba_loop(train: Callable, forward: Callable, steps: int) -> dict[str, float]:
    """Ten steps with CoBa's validation forward and weights beside ten plain steps."""
    balancer = BALANCERS["coba"](BalancerContext(tuple("abcde")), warmup=2, window=200)
    loss_K, now = torch.linspace(1, 2, TASKS, dtype=torch.float64), itertools.count(1)
    balancer.update(Observation(0, loss_K * torch.nan, valid_loss_K=loss_K))

    def ten_with() -> None:
        for _ in range(10):
            t = next(now)
            train(balancer.weights(t))
            due = t % balancer.valid_every == 0
            if due:
                forward()
            balancer.update(Observation(t, loss_K, loss_K / t**0.1 if due else None))

    def ten_plain() -> None:
        for _ in range(10):
            train()

    seconds = alternate({"with": ten_with, "plain": ten_plain}, max(3, steps // 5))
    return ratio(seconds["with"], seconds["plain"])


def path_loss(path: str, model, batch: Batch) -> Tensor:
    return full_logits_nll(model, batch) if path == "full" else token_nll(model, batch, path=path)


def paths(steps: int) -> dict:
    """Time in this process; memory in one process a path, because a peak can't be taken back."""
    model, names = make_model("wide"), ["full", "gather"]
    batch = make_batch(8, 256, model.config.vocab_size)
    seconds = alternate(
        {name: lambda name=name: path_loss(name, model, batch).sum().backward() for name in names}, steps
    )
    out: dict = {name: {"seconds": round(float(np.median(seconds[name])), 4)} for name in names}
    for name in names:
        command = [sys.executable, __file__, "--peak-of", name]
        out[name]["peak_mib"] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    out["gather / full"] = {
        "time": ratio(seconds["gather"], seconds["full"]),
        "memory": round(out["gather"]["peak_mib"] / out["full"]["peak_mib"], 3),
    }
    return out


HEAD = (2048, 896, 151_936)  # supervised tokens, width, vocabulary (Qwen2.5-0.5B's)


def head_step(path: str, supervised: int = HEAD[0]) -> Callable[[], None]:
    """Forward and backward of head and loss alone."""
    _, width, vocabulary = HEAD
    draw = torch.Generator().manual_seed(0)
    hidden_ND = torch.randn(supervised, width, generator=draw, requires_grad=True)
    weight_VD = torch.randn(vocabulary, width, generator=draw) / width**0.5
    labels_N = torch.randint(0, vocabulary, (supervised,), generator=draw)
    factor_N = torch.rand(supervised, generator=draw)

    def step() -> None:
        if path == "chunked":
            nll_N = chunked_nll(hidden_ND, Head(weight_VD), labels_N)
        else:
            nll_N = row_nll_in_place(F.linear(hidden_ND, weight_VD), labels_N)
        (nll_N * factor_N).sum().backward()
        hidden_ND.grad = None

    return step


def head(steps: int) -> dict:
    names = ("gather", "chunked")
    seconds = alternate({name: head_step(name, HEAD[0] // 4) for name in names}, max(3, steps // 8))
    out: dict = {name: {"seconds": round(float(np.median(seconds[name])), 4)} for name in names}
    for name in names:
        command = [sys.executable, __file__, "--peak-of", f"head {name}"]
        out[name]["peak_mib"] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    out["chunked / gather"] = {"time": ratio(seconds["chunked"], seconds["gather"])}
    out["peak / fp32 logits"] = round(out["chunked"]["peak_mib"] / (HEAD[0] * HEAD[2] * 4 / 2**20), 3)
    return out


def peak_of(path: str) -> float:
    """MiB that forward and backward of one step add to what the process holds with the model loaded."""
    if path.startswith("head "):
        head_step(path.removeprefix("head "), 8)()  # libraries are loaded now
        step = head_step(path.removeprefix("head "))
        Path("/proc/self/clear_refs").write_text("5")
        before = memory_kib("VmRSS")
        step()
        return (memory_kib("VmHWM") - before) / 1024
    model = make_model("wide")
    batch = make_batch(8, 256, model.config.vocab_size)
    path_loss("gather", model, make_batch(1, 8, model.config.vocab_size)).sum().backward()  # libraries are loaded now
    model.zero_grad()
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts again from what is held now
    before = memory_kib("VmRSS")
    path_loss(path, model, batch).sum().backward()
    return (memory_kib("VmHWM") - before) / 1024


def memory_kib(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(f"{field}:")))


def mftcoder(steps: int) -> dict:
    model, w_K = make_model("head"), torch.ones(TASKS, dtype=torch.float64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    batch = make_batch(8, 256, model.config.vocab_size)

    def ours_loss() -> Tensor:
        counts = step_counts([batch], TASKS)
        nll_BT = token_nll(model, batch)
        task_losses(reduce_sums([task_sums(nll_BT, batch, TASKS)], TASKS), counts, "task_token")
        return (coefficients(batch, counts, w_K, "task_token") * nll_BT).sum()

    def theirs_loss() -> Tensor:
        return task_loop_loss(full_logits_nll(model, batch), batch)

    difference = abs(ours_loss().item() - theirs_loss().item())
    seconds = alternate(
        {
            "theirs": lambda: optimizer_step(model, optimizer, theirs_loss()),
            "ours": lambda: optimizer_step(model, optimizer, ours_loss()),
        },
        steps,
    )
    return {
        "loss_difference": difference,
        "supervised_share": round(float((batch.labels_BT != IGNORE).float().mean()), 3),
        "ours_ms": round(1e3 * float(np.median(seconds["ours"])), 1),
        "theirs_ms": round(1e3 * float(np.median(seconds["theirs"])), 1),
        "times_faster": ratio(seconds["theirs"], seconds["ours"]),
    }


PARTS = {"bookkeeping": bookkeeping, "balancers": balancers, "paths": paths, "head": head, "mftcoder": mftcoder}

# (what, part, where in its figures, bar, whether larger is better)
BARS: tuple[tuple[str, str, tuple[str, ...], float, bool], ...] = (
    ("bookkeeping, share of a step at 5 M parameters", "bookkeeping", ("5M", "share_of_step", "median"), 0.02, False),
    ("bookkeeping, share of a step at 30 M parameters", "bookkeeping", ("30M", "share_of_step", "median"), 0.01, False),
    ("CoBa with valid_every 10, times a plain step", "balancers", ("coba, real loop", "median"), 1.15, False),
    ("gather path, time of full fp32 logits", "paths", ("gather / full", "time", "median"), 0.9, False),
    ("gather path, memory of full fp32 logits", "paths", ("gather / full", "memory"), 0.6, False),
    ("chunked path at V = 152k, time of gather", "head", ("chunked / gather", "time", "median"), 1.1, False),
    ("chunked path at V = 152k, peak by whole fp32 logits", "head", ("peak / fp32 logits",), 0.125, False),
    ("whole step, times faster than an MFTCoder-style loss", "mftcoder", ("times_faster", "median"), 1.7, True),
)


def judge(figures: dict) -> list[str]:
    """A line for each bar whose part was measured."""
    lines = []
    for what, part, path, bar, least in BARS:
        if part in figures:
            value = figures[part]
            for key in path:
                value = value[key]
            good = value >= bar if least else value <= bar
            lines.append(
                f"{'PASS' if good else 'MISS'}  {what:55s} {value:.4g} (bar: {'>=' if least else '<='} {bar:g})"
            )
    return lines


def in_a_process(part: str, asked: argparse.Namespace) -> dict:
    """A part as in a training run: in a process of its own, whose heap holds nothing of earlier parts."""
    with tempfile.TemporaryDirectory() as folder:
        figures = Path(folder) / "figures.json"
        command = [sys.executable, __file__, "--only", part, "--json", str(figures)]
        command += ["--steps", str(asked.steps), "--seconds", str(asked.seconds), "--clock", asked.clock]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return json.loads(figures.read_text(encoding="utf-8"))[part]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PARTS, action="append", help="a part; may be repeated (default: all)")
    parser.add_argument("--steps", type=int, default=20, help="measured rounds of each comparison, at the most")
    parser.add_argument("--seconds", type=float, default=16, help="of each of the six comparisons, at the most")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: processor time, for a busy machine")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--peak-of", choices=("full", "gather", "head gather", "head chunked"), help=argparse.SUPPRESS)
    asked = parser.parse_args(arguments)
    if asked.peak_of:
        print(peak_of(asked.peak_of))
        return
    global clock, seconds_each
    clock, seconds_each = asked.clock, asked.seconds
    figures = {"clock": clock, "threads": torch.get_num_threads(), "torch": torch.__version__}
    for name in asked.only or PARTS:
        alone = asked.only is not None and len(asked.only) == 1
        figures[name] = PARTS[name](asked.steps) if alone else in_a_process(name, asked)
        print(json.dumps({name: figures[name]}, indent=1), flush=True)
    print("\n".join(judge(figures)))
    if asked.json:
        asked.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
