"""What task gradients cost: all K from one backward, beside a plain step, K backwards, and torchjd, in the same run.

    python scripts/bench_gradients.py                       about three minutes on one CPU core
    python scripts/bench_gradients.py --figure docs/figures/task-gradients.svg

Model: Llama, 4 layers, width 256, LoRA of rank 8 on all linear layers; a step: 16 rows of 128 tokens, half of them
supervised, each row of one task (and, once, four examples of different tasks packed in each row).

plain        forward and backward of the weighted loss
ours         the same with the taps on, the Gram matrix, and the step's gradient made anew as J^T alpha
ours, Gram   the same with the taps on and the Gram matrix only (what affinity and lagged surgery measure)
K backwards  one forward, one backward a task through the kept graph, and the Gram matrix
autojac      torchjd's Jacobian of the K losses (K backwards under vmap), and the Gram matrix
autogram     torchjd's engine for the Gram matrix alone (batch_dim=0): of the 16 rows' losses, summed by tasks; it wants
             rows of one example, and gives no gradients
lagged       20 steps of which one is measured, over 20 plain steps

CPU seconds of one thread (other processes disturb them less than the clock); the sides alternate, and each figure is
the median of the paired ratios. Memory is the highest resident size above the loaded model, one process a side.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mtft.data.batching.batch import IGNORE, Batch
from mtft.data.batching.batches import collate
from mtft.data.tokenize.encode import Example
from mtft.gradients.capture.task_gradients import TaskGradients
from mtft.gradients.gramian import gram
from mtft.losses.task_reduction import coefficients, step_counts, task_coefficients
from mtft.losses.token_nll import token_nll

WIDTH, LAYERS, MLP, VOCABULARY, RANK = 256, 4, 688, 8192, 8  # --smoke makes them small
ROWS, LENGTH = 16, 128


def make_model():
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=MLP,
        num_hidden_layers=LAYERS,
        num_attention_heads=WIDTH // 64,
        num_key_value_heads=WIDTH // 64,
        tie_word_embeddings=True,
        use_cache=False,
    )
    lora = LoraConfig(task_type="CAUSAL_LM", r=RANK, target_modules="all-linear", init_lora_weights=False)
    return get_peft_model(LlamaForCausalLM(config), lora).train()


def make_batch(K: int, examples_a_row: int = 1) -> Batch:
    rng, length = np.random.default_rng(0), LENGTH // examples_a_row

    def example(task: int) -> tuple[Example, int]:
        ids = rng.integers(3, VOCABULARY, length).astype(np.int32)
        return Example(ids, np.arange(length) >= length // 2), task

    tasks = iter(i % K for i in range(ROWS * examples_a_row))
    return collate([[example(next(tasks)) for _ in range(examples_a_row)] for _ in range(ROWS)], 0)


class Step:
    """One step in each of the ways. `last`: the Gram matrix that the way found, of the losses of the tasks."""

    def __init__(self, K: int, examples_a_row: int = 1) -> None:
        self.K, self.model, self.batch = K, make_model(), make_batch(K, examples_a_row)
        self.parameters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.counts, self.w_K = step_counts([self.batch], K), torch.ones(K, dtype=torch.float64)
        self.coef_K = task_coefficients(self.counts, self.w_K, "task_token")
        self.taps = TaskGradients(self.model, K, isolated=True)
        self.lean = TaskGradients(self.model, K, isolated=True, gram_only=True)
        self.last: Tensor | None = None

    def loss(self) -> Tensor:
        return (coefficients(self.batch, self.counts, self.w_K, "task_token") * token_nll(self.model, self.batch)).sum()

    def losses(self) -> Tensor:
        """[K], through a graph that several backwards may go through."""
        nll_BT = token_nll(self.model, self.batch, many_backwards=True)
        total_K = torch.zeros(self.K).index_add(0, self.batch.task_ids_BT.clamp(min=0).flatten(), nll_BT.flatten())
        return total_K / self.counts.tokens_K

    def clear(self) -> None:
        self.model.zero_grad(set_to_none=True)

    def plain(self) -> None:
        self.loss().backward()
        self.clear()

    def captured(self, taps: TaskGradients) -> None:
        with taps:
            taps.begin(self.batch.task_ids_BT, self.batch.labels_BT != IGNORE, last=True)
            taps.watch(self.loss()).backward()
        self.last = taps.gram(self.coef_K)

    def ours(self) -> None:
        self.captured(self.taps)
        for name, block in self.taps.jacobian(self.coef_K).items():
            self.parameters[name].grad = torch.einsum("k,kij->ij", self.coef_K.to(block), block)
        self.clear()

    def ours_gram(self) -> None:
        self.captured(self.lean)
        self.clear()

    def k_backwards(self) -> None:
        loss_K, given = self.losses(), list(self.parameters.values())
        rows = [torch.autograd.grad(loss, given, retain_graph=k + 1 < self.K) for k, loss in enumerate(loss_K)]
        self.last = gram({name: torch.stack(parts) for name, parts in zip(self.parameters, zip(*rows), strict=True)})

    def autojac(self) -> None:
        from torchjd.autojac import backward

        backward(self.losses(), inputs=list(self.parameters.values()))
        jac: Any = {name: p.jac for name, p in self.parameters.items()}
        self.last = gram(jac)
        for p in self.parameters.values():
            del p.jac  # pyright: ignore[reportAttributeAccessIssue]


def autogram(step: Step) -> Callable[[], None]:
    """torchjd's engine. Its hooks stay on a model, so it gets one of its own."""
    from torchjd.autogram import Engine

    own = Step(step.K)
    engine = Engine(own.model, batch_dim=0)
    task_B = own.batch.task_ids_BT[:, 0].long()
    rows_KB = torch.nn.functional.one_hot(task_B, step.K).T.double()

    def run() -> None:
        loss_B = token_nll(own.model, own.batch, many_backwards=True).sum(1) / own.counts.tokens_K[task_B]
        step.last = rows_KB @ engine.compute_gramian(loss_B).double() @ rows_KB.T

    return run


def seconds_of(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def alternate(sides: dict[str, Callable[[], object]], rounds: int) -> dict[str, np.ndarray]:
    """CPU seconds of each side, one after the other within every round. Run each side once before, to warm up."""
    found = [[seconds_of(run) for run in sides.values()] for _ in range(rounds)]
    return {name: np.array(column) for name, column in zip(sides, zip(*found, strict=True), strict=True)}


def over(seconds: dict[str, np.ndarray], side: str, base: str) -> float:
    return float(np.median(seconds[side] / seconds[base]))


def sides_of(step: Step) -> dict[str, Callable[[], None]]:
    return {
        "plain": step.plain,
        "ours": step.ours,
        "ours, Gram": step.ours_gram,
        "K backwards": step.k_backwards,
        "autojac": step.autojac,
        "autogram": autogram(step),
    }


def compare(K: int, rounds: int) -> dict[str, float]:
    """Ratios to a plain step; the Gram matrices must agree, or the figures mean nothing."""
    step = Step(K)
    sides, expected = sides_of(step), None
    for name, run in sides.items():
        step.last = None
        run()
        if step.last is not None:
            expected = step.last if expected is None else expected
            off = float((step.last - expected).abs().max() / expected.abs().max())
            if off > 1e-4:
                raise SystemExit(f"{name}: the Gram matrix is off by {off:.1e}")
    seconds = alternate(sides, rounds)
    out = {name: over(seconds, name, "plain") for name in sides}
    out["ours / K backwards"] = over(seconds, "ours", "K backwards")
    out["plain, ms"] = 1e3 * float(np.median(seconds["plain"]))
    return out


def packed(K: int, rounds: int) -> float:
    """Ours over plain where each row holds four examples of different tasks."""
    step = Step(K, examples_a_row=4)
    step.plain()
    step.ours()
    return over(alternate({"plain": step.plain, "ours": step.ours}, rounds), "ours", "plain")


def lagged(K: int, rounds: int, every: int = 20) -> float:
    """All steps of both sides, taken turn by turn."""
    step = Step(K)
    step.plain()
    step.ours_gram()
    turns = [t % every == every // 2 for t in range(every * rounds)]
    pairs = [(seconds_of(step.plain), seconds_of(step.ours_gram if due else step.plain)) for due in turns]
    plain, measured = np.array(pairs).sum(axis=0)
    return float(measured / plain)


def memory_kib(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(f"{field}:")))


def peak_of(side: str, K: int) -> float:
    """MiB that a step adds to what the process holds with the model loaded (Linux)."""
    step = Step(K)
    run = {"plain": step.plain, "ours": step.ours, "K backwards": step.k_backwards}[side]
    small = Step(2)
    small.batch = small.batch.map(lambda x: x[:2, :8])
    small.plain()  # libraries are loaded now
    before = memory_kib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is held now
    run()
    return (memory_kib("VmHWM") - before) / 1024


def memory(K: int, *more: str, repeats: int = 3) -> dict[str, float]:
    """Medians over `repeats` processes each: a kernel that reclaims pages meanwhile makes single figures too small."""
    out = {}
    for side in ("plain", "ours", "K backwards"):
        command = [sys.executable, __file__, "--peak-of", side, str(K), *more]
        runs = [subprocess.run(command, check=True, capture_output=True, text=True).stdout for _ in range(repeats)]
        out[side] = float(np.median([float(found) for found in runs]))
    out["K x P"] = K * sum(p.numel() for p in Step(K).parameters.values()) * 4 / 2**20
    return out


def draw(curves: dict[int, dict[str, float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    styles = {"K backwards": "s-", "autojac": "^-", "autogram": "d-", "ours": "o-"}
    labels = {"ours": "MTFT: J and the step", "autojac": "torchjd autojac", "autogram": "torchjd autogram (no J)"}
    figure, axes = plt.subplots(figsize=(6.4, 3.8))
    for side, style in styles.items():
        wide = 2.4 if side == "ours" else 1.2
        axes.plot(
            list(curves), [curve[side] for curve in curves.values()], style, label=labels.get(side, side), lw=wide
        )
    axes.axhline(1, color="grey", ls=":", lw=1)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(list(curves), [str(K) for K in curves])
    axes.set_yticks([1, 2, 4, 8, 16], ["1", "2", "4", "8", "16"])
    axes.set_xlabel("tasks K")
    axes.set_ylabel("time of a plain step")
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path)


def verdict(name: str, value: float, bar: float) -> dict[str, Any]:
    met = "PASS" if value <= bar else "MISS"
    print(f"{met}  {name}: {value:.3f} (bar {bar:g})", flush=True)
    return {"value": round(value, 4), "bar": bar, "met": met}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, nargs="+", default=[2, 4, 8, 16], help="values of K")
    parser.add_argument("--rounds", type=int, default=3, help="measured rounds of each comparison")
    parser.add_argument("--figure", type=Path, help="draw the curve over K here")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes: whether it runs; the figures mean nothing")
    parser.add_argument("--peak-of", nargs=2, help=argparse.SUPPRESS)
    asked = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if asked.smoke:
        global WIDTH, LAYERS, MLP, VOCABULARY
        WIDTH, LAYERS, MLP, VOCABULARY = 64, 1, 96, 97
    if asked.peak_of:
        print(peak_of(asked.peak_of[0], int(asked.peak_of[1])))
        return
    print(f"torch {torch.__version__}, load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores; times of a plain step")
    curves = {}
    for K in asked.tasks:
        curves[K] = compare(K, asked.rounds)
        shown = "  ".join(f"{name} {value:.2f}" for name, value in curves[K].items())
        print(f"K = {K}: {shown}", flush=True)
    held = memory(8, *["--smoke"] * asked.smoke, repeats=1 if asked.smoke else 3)
    print("peak memory at K = 8, MiB: " + "  ".join(f"{name} {value:.1f}" for name, value in held.items()))
    at_8 = curves.get(8) or compare(8, asked.rounds)
    bars = {
        "ours over a plain step, K = 8": verdict("ours over a plain step, K = 8", at_8["ours"], 1.5),
        "ours over K backwards, K = 8": verdict("ours over K backwards, K = 8", at_8["ours / K backwards"], 0.35),
        "packed": verdict("ours over a plain step, K = 8, four tasks in a row", packed(8, asked.rounds), 1.5),
        "lagged": verdict("20 steps, one of them measured, K = 8", lagged(8, 2), 1.03),
        "memory": verdict(
            "(peak - K x P) over a plain step's peak", (held["ours"] - held["K x P"]) / held["plain"], 1.3
        ),
    }
    if asked.figure:
        draw(curves, asked.figure)
    if asked.json:
        out = {"torch": torch.__version__, "ratios": curves, "memory_mib": held, "bars": bars}
        asked.json.write_text(json.dumps(out, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
