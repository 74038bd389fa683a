"""Do balancers help on these tasks? Trains a recipe once per method and seed, and compares held-out losses in pairs.

    python scripts/compare_balancers.py recipes/code-tasks.yaml --out runs/compare
    python scripts/compare_balancers.py RECIPE --methods uniform random dwa famo --seeds 17 18 19 --set train.steps=200
    python scripts/compare_balancers.py recipes/conflict.yaml --methods uniform random coba upgrad "upgrad lagged" f_mtl

A method is a balancer, an aggregator of gradients at every step, "<aggregator> lagged", or f_mtl or samo.
The runs lie in OUT/<method>-<seed> and are not repeated when they stand; OUT/compare.json holds all figures. For each
method: the worst task's loss and the mean over tasks (both averaged over seeds), and the difference to uniform and to
random weights of the same seed with a 95 % t interval over seeds. "no" = the interval holds 0. If the recipe has
loss.gradients.every, also the pairs of tasks with their mean cosine and conflict rate in the runs of the first method.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from scipy import stats

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mtft.gradients import affinity
from mtft.gradients.aggregators import AGGREGATORS
from mtft.losses.balancers import BALANCERS
from mtft.recipe.load import load_recipe
from mtft.training.run_training import train

DEFAULT = ("uniform", "random", "dwa", "famo", "uw", "gls", "stch", "focal", "coba")
# A quick run has few steps: windows that fit into it. Others keep their defaults.
SHORT = {"dwa": {"window": 5}, "coba": {"warmup": 6, "window": 20, "valid_every": 2}}


def options_of(method: str) -> list[str]:
    """The overrides that make a recipe use a method."""
    name, _, how = method.partition(" ")
    if how == "lagged" and name in AGGREGATORS:
        return ["loss.balancer.name=lagged", f"loss.balancer.aggregator={name}", "loss.balancer.gram_every=4"]
    if name in AGGREGATORS and not how:
        return [f"loss.gradients.aggregator={name}"]
    if name in ("f_mtl", "samo") and not how:
        return [f"loss.gradients.flat.name={name}"]
    if name in BALANCERS and not how:
        more = [f"loss.balancer.{key}={value}" for key, value in SHORT.get(name, {}).items()]
        return [f"loss.balancer.name={name}", *more]
    raise SystemExit(f"unknown method {method!r}: a balancer, an aggregator, 'AGGREGATOR lagged', f_mtl or samo")


def folder_of(out: Path, method: str, seed: int) -> Path:
    return out / f"{method}-{seed}".replace(" ", "-")


def losses(recipe_file: str, method: str, seed: int, out: Path, overrides: list[str]) -> np.ndarray:
    """Held-out loss of each task after one run, in the recipe's order."""
    folder = folder_of(out, method, seed)
    fixed = [f"seed={seed}", f"output.dir={folder}"]
    recipe = load_recipe(recipe_file, [*overrides, *fixed, *options_of(method)])
    result = train(recipe, quiet=True, prove=False)
    return np.array([result.scores[task].summary()["loss"] for task in recipe.task_names])


def interval(difference: np.ndarray) -> dict[str, float | str]:
    """Mean difference over seeds with its 95 % t interval."""
    half = stats.t.ppf(0.975, len(difference) - 1) * stats.sem(difference) if len(difference) > 1 else np.inf
    low, high = difference.mean() - half, difference.mean() + half
    verdict = "better" if high < 0 else "worse" if low > 0 else "no"
    return {"difference": float(difference.mean()), "low": float(low), "high": float(high), "verdict": verdict}


def compare(found: dict[str, np.ndarray]) -> dict[str, dict]:
    """{method: [seeds, tasks]} -> figures of each method."""
    table = {}
    for name, loss_SK in found.items():
        line: dict = {"worst": float(loss_SK.max(axis=1).mean()), "mean": float(loss_SK.mean())}
        for baseline in ("uniform", "random"):
            if baseline in found and name != baseline:
                base_SK = found[baseline]
                line[f"worst against {baseline}"] = interval(loss_SK.max(axis=1) - base_SK.max(axis=1))
                line[f"mean against {baseline}"] = interval(loss_SK.mean(axis=1) - base_SK.mean(axis=1))
        table[name] = line
    return table


def show(table: dict[str, dict]) -> str:
    def cell(line: dict, key: str) -> str:
        if key not in line:
            return ""
        x = line[key]
        return f"{x['difference']:+.4f} [{x['low']:+.4f}, {x['high']:+.4f}] {x['verdict']}"

    keys = ("worst against uniform", "worst against random", "mean against uniform")
    lines = [f"| method | worst task | mean | {' | '.join(keys)} |", "|---" * (3 + len(keys)) + "|"]
    for name, line in table.items():
        lines.append(
            f"| {name} | {line['worst']:.4f} | {line['mean']:.4f} | {' | '.join(cell(line, key) for key in keys)} |"
        )
    return "\n".join(lines)


def pairs(folders: list[Path]) -> list[tuple[str, float, float]]:
    """(tasks, cosine, conflict rate) of each pair, means over the runs in `folders`; [] if they were not measured."""
    files = [folder / affinity.FILE for folder in folders]
    if not all(file.exists() for file in files):
        return []
    found = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    tasks = found[0]["tasks"]
    means = [np.array([run[key] for run in found], dtype=float).mean(axis=0) for key in ("cosine", "conflict_rate")]
    return [
        (f"{tasks[i]}, {tasks[j]}", float(means[0][i, j]), float(means[1][i, j]))
        for i in range(len(tasks))
        for j in range(i + 1, len(tasks))
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--methods", nargs="+", default=list(DEFAULT))
    parser.add_argument("--seeds", nargs="+", type=int, default=[17, 18, 19])
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="overrides of the recipe")
    parser.add_argument("--out", type=Path, default=Path("runs/compare"))
    asked = parser.parse_args()
    if len(asked.seeds) < 2:
        parser.error("give at least two seeds: without them there is no interval")
    found = {}
    for name in asked.methods:
        options_of(name)  # a misspelt one is said before anything is trained
    for name in asked.methods:
        found[name] = np.array([losses(asked.recipe, name, seed, asked.out, asked.set) for seed in asked.seeds])
        print(f"{name}: {np.round(found[name].mean(axis=0), 4).tolist()}", file=sys.stderr, flush=True)
    table = compare(found)
    together = pairs([folder_of(asked.out, asked.methods[0], seed) for seed in asked.seeds])
    figures = {
        "pairs": together,
        "seeds": asked.seeds,
        "losses": {name: x.tolist() for name, x in found.items()},
        "table": table,
    }
    (asked.out / "compare.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    print(show(table))
    for names, cosine, rate in together:
        print(f"{asked.methods[0]}: {names}: cosine {cosine:+.2f}, conflict rate {rate:.2f}")


if __name__ == "__main__":
    main()
