"""How costs grow: each curve is measured here, on one thread, and drawn beside a straight line.

    python scripts/bench_growth.py                            every curve (ten minutes): docs/growth.png and a table
    python scripts/bench_growth.py --only plan --largest 100000000
    python scripts/bench_growth.py --figure growth.png --json growth.json

step       a training step against the number of tasks, at the same tokens (small shape of scripts/bench_train.py)
balance    the same with FAMO, whose weights look at every task's loss
plan       making a plan and the content of its first step, against the rows of the datasets
play       every step of a plan in order, against the rows
tokenise   prompts and responses to a token store, against rows
layers     a merge by TIES of 4 adapters of rank 16, against layers
adapters   the same of 8 layers, against adapters
fit        surrogates of one target, against trials (a known function of 8 shares, with noise)
workers    a sweep of 16 trials of .5 CPU-seconds, against workers: its seconds by those of one worker

Figures are CPU-seconds (workers: seconds), the least of some runs. A slope is that of log cost by log size between the
last two sizes: 1 is a straight line. Above 1.15 a curve is named; docs/growth.md says why it is so.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(1, str(Path(__file__).resolve().parent))

import numpy as np
from quiet_libraries import quiet

STEEP = 1.15  # slope from which a curve counts as worse than a straight line
FIGURE = Path(__file__).resolve().parents[1] / "docs" / "growth.png"

Curve = dict[int, float]  # size: cost


def least(run: Callable[[], object], repeats: int = 3) -> float:
    """CPU seconds."""
    found = []
    for _ in range(repeats):
        before = time.process_time()
        run()
        found.append(time.process_time() - before)
    return min(found)


def step(balancer: str = "uniform") -> Curve:
    from dataclasses import replace

    import bench_train as bench

    shape = replace(bench.SMALL, vocabulary=4096)
    curve = {}
    for tasks in (4, 16, 64, 256):
        names = tuple(f"task{k}" for k in range(tasks))
        stores = bench.make_stores(shape, 2048, tasks=names)
        settings = {"batch_tokens": 8192, "micro_batch_tokens": 2048, "balancer": balancer}
        tokens, seconds = bench.run_mtft(shape, stores, 4, **settings).counted()
        curve[tasks] = seconds / tokens * 8192
    return curve


def balance() -> Curve:
    return step("famo")


def _plan(rows: int):
    from data_mixers.mixture.mixture import Mixture
    from data_mixers.plan.mixture_plan import MixturePlan

    shares = {"a": 0.4, "b": 0.3, "c": 0.2, "d": 0.1}
    sizes = [rows * 5 // 10, rows * 3 // 10, rows * 15 // 100, rows * 5 // 100]
    return MixturePlan(Mixture.of(shares), sizes, steps=max(1, rows // 64), batch=64, seed=1)


def plan(largest: int) -> Curve:
    sizes = [10**power for power in range(3, 9) if 10**power <= max(largest, 10**4)]
    return {rows: least(lambda rows=rows: _plan(rows).step(0)) for rows in sizes}


def play(largest: int) -> Curve:
    def played(rows: int) -> None:
        whole = _plan(rows)
        for s in range(whole.steps):
            whole.step(s)

    sizes = [10**power for power in range(3, 8) if 10**power <= max(largest, 10**4)]
    return {rows: least(lambda rows=rows: played(rows), repeats=1 if rows > 10**5 else 3) for rows in sizes}


def tokenise() -> Curve:
    from transformers import AutoTokenizer

    from mtft.data.store.token_store import open_store
    from mtft.quickstart import model_path
    from mtft.recipe.schema.task import TaskSection

    tokenizer, curve = AutoTokenizer.from_pretrained(model_path("weak")), {}
    draw = np.random.default_rng(0)
    words = [f"word{i}" for i in range(500)]
    for rows in (1000, 4000, 16_000, 64_000):
        with tempfile.TemporaryDirectory() as folder:
            data = Path(folder) / "rows.jsonl"
            with data.open("w") as file:
                for i in range(rows):
                    text = " ".join(draw.choice(words, 40))
                    file.write(json.dumps({"prompt": f"{i} {text}", "response": text[:80]}) + "\n")
            task = TaskSection(name="rows", data=str(data))
            before = time.process_time()
            open_store(task, "train", tokenizer, max_length=512, cache_dir=Path(folder) / "cache")
            curve[rows] = time.process_time() - before
    return curve


def _merges(cases: list[tuple[int, int, int]]) -> Curve:
    """cases: (size on the axis, layers, adapters)."""
    import bench_merge as bench

    curve, hidden, wide = {}, 256, 704
    with tempfile.TemporaryDirectory() as folder:
        for size, layers, adapters in cases:
            root = Path(folder) / f"{layers}-{adapters}"
            paths = bench.write_adapters(root, bench.shapes(hidden, wide, layers), adapters)
            job = {"adapters": [*map(str, paths)], "method": "ties", "precision": "auto"}
            job |= {"hidden": hidden, "wide": wide, "layers": layers}
            curve[size] = min(bench.measure("ours", job, Path(folder))["cpu_s"] for _ in range(2))
    return curve


def layers() -> Curve:
    return _merges([(count, count, 4) for count in (4, 8, 16, 32)])


def adapters() -> Curve:
    return _merges([(count, 8, count) for count in (2, 4, 8, 16)])


def fit() -> Curve:
    import bench_mixing as bench

    curve = {}
    for trials in (64, 128, 256, 512, 1024, 2048):
        draw = np.random.default_rng(0)
        P = draw.dirichlet(np.ones(8), trials)
        y = 2 + (P @ draw.random(8)) ** 2 + 0.5 * np.exp(-5 * P[:, 0]) + 0.01 * draw.standard_normal(trials)
        curve[trials] = least(lambda P=P, y=y, n=trials: bench.fits_of(P, {"loss": y}, np.arange(n)), repeats=1)
    return curve


def busy(trial: object, **_: object) -> dict[str, float]:
    """A trial: half a CPU-second of arithmetic."""
    end, total = time.process_time() + 0.5, 0
    while time.process_time() < end:
        total += sum(range(1000))
    return {"task/loss": float(total % 7)}


def workers() -> Curve:
    from data_mixers.mixture.mixture import Mixture
    from data_mixers.sweep.ledger import TrialLedger
    from data_mixers.sweep.runner import run_sweep
    from data_mixers.sweep.trial import Trial

    curve = {}
    for count in sorted({1, 2, os.cpu_count() or 1}):
        trials = [Trial(Mixture.of({"a": (i + 1) / 18, "b": 1 - (i + 1) / 18}), seed=i) for i in range(16)]
        with tempfile.TemporaryDirectory() as folder:
            before = time.perf_counter()
            run_sweep(trials, busy, TrialLedger(Path(folder) / "ledger.jsonl"), workers=count)
            curve[count] = time.perf_counter() - before
    return curve


AXES = {
    "step": "tasks", "balance": "tasks", "plan": "rows", "play": "rows", "tokenise": "rows", "layers": "layers",
    "adapters": "adapters", "fit": "trials", "workers": "workers",
}  # fmt: skip


def slope(curve: Curve) -> float:
    """Of log cost by log size, between the last two sizes."""
    (x0, y0), (x1, y1) = list(curve.items())[-2:]
    return float(np.log(max(y1, 1e-9) / max(y0, 1e-9)) / np.log(x1 / x0))


def table(curves: dict[str, Curve]) -> Iterator[str]:
    yield "| curve | sizes | CPU-seconds | slope |"
    yield "|---|---|---|---|"
    for name, curve in curves.items():
        costs = ", ".join(f"{cost:.3g}" for cost in curve.values())
        yield f"| {name} | {', '.join(f'{size:,}' for size in curve)} {AXES[name]} | {costs} | {slope(curve):.2f} |"


def draw(curves: dict[str, Curve], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = 3
    lines = -(-len(curves) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(3.4 * columns, 2.7 * lines), squeeze=False)
    for axis in axes.flat[len(curves) :]:
        axis.remove()
    for axis, (name, curve) in zip(axes.flat, curves.items(), strict=False):
        sizes, costs = np.array([*curve]), np.array([*curve.values()])
        straight = costs[-1] * (sizes / sizes[-1]) ** (-1 if name == "workers" else 1)
        axis.loglog(sizes, straight, "--", color="0.7", label="straight line")
        axis.loglog(sizes, costs, "o-", color="#2a6f97", label="measured")
        axis.set_title(name, fontsize=10)
        axis.set_xlabel(AXES[name], fontsize=8)
        axis.set_ylabel("seconds" if name == "workers" else "CPU-seconds", fontsize=8)
        axis.set_xticks(sizes, [f"{size:,}" if size < 100_000 else f"$10^{{{np.log10(size):.3g}}}$" for size in sizes])
        axis.minorticks_off()
        axis.set_yticks(
            [x for x in (0.001, 0.01, 0.1, 0.5, 1, 2, 5, 10, 20, 30) if costs.min() / 2 <= x <= costs.max() * 2]
        )
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.set_ylim(costs.min() / 2, costs.max() * 2)
        axis.tick_params(labelsize=7)
    axes.flat[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=90)


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--only", nargs="+", choices=[*AXES], help="these curves")
    options.add_argument("--largest", type=int, default=10**7, help="rows of the largest plan")
    options.add_argument("--figure", type=Path, help=f"default, with all curves: {FIGURE.name} in docs")
    options.add_argument("--json", type=Path)
    asked = options.parse_args()
    quiet()
    measures: dict[str, Callable[[], Curve]] = {
        "step": step, "balance": balance, "plan": lambda: plan(asked.largest), "play": lambda: play(asked.largest),
        "tokenise": tokenise, "layers": layers, "adapters": adapters, "fit": fit, "workers": workers,
    }  # fmt: skip
    curves: dict[str, Curve] = {}
    for name in asked.only or measures:
        print(f"{name} ...", file=sys.stderr, flush=True)
        with contextlib.redirect_stdout(sys.stderr):
            curves[name] = measures[name]()
    print("\n".join(table(curves)))
    for name, curve in curves.items():
        if slope(curve) > STEEP:
            print(f"steeper than a straight line: {name} ({slope(curve):.2f})")
    figure = asked.figure or (None if asked.only else FIGURE)
    if figure is not None:
        draw(curves, figure)
    if asked.json is not None:
        asked.json.write_text(json.dumps(curves, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
