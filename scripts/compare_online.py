"""Do shares that change while training beat shares that stay? Runs of a recipe, static and with each online method.

    python scripts/compare_online.py recipes/code-tasks.yaml                  # about 15 CPU minutes
    python scripts/compare_online.py recipes/code-tasks.yaml --steps 60 --seeds 2 --only uniform bandit

Every run starts from uniform shares (but `natural`), with the recipe's floors and epoch caps. group_dro's reference is
a static uniform run of another seed, as DoReMi's is. Scored on all held-out rows by the mean and the worst of the
tasks' losses; differences to uniform are paired by seed, intervals are Student's t at 90 % over seeds. Lower is better.
A second call goes on where the first was stopped.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
from scipy.stats import t as student

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from mtft.recipe.load import load_recipe  # noqa: E402
from mtft.training.run_training import train  # noqa: E402


def variants(every: int, reference: Path) -> dict[str, list[str]]:
    """What each run changes in the recipe."""
    online = {
        "bandit": f"{{name: bandit, every: {every}}}",
        "bandit, scale 1": f"{{name: bandit, every: {every}, scale: 1}}",
        "group_dro": f"{{name: group_dro, every: {every}, reference: {json.dumps(str(reference))}}}",
        "group_dro, eta 0.3": f"{{name: group_dro, every: {every}, eta: 0.3, reference: {json.dumps(str(reference))}}}",
        "linear_law": f"{{name: linear_law, every: {3 * every}, probe_steps: {max(1, 3 * every // 8)}}}",
        "linear_law, eta 4": f"{{name: linear_law, every: {3 * every}, probe_steps: {max(1, 3 * every // 8)}, eta: 4}}",
    }
    static = {"uniform": ["mixture.shares=uniform"], "natural": ["mixture.shares=natural"]}
    return static | {name: ["mixture.shares=uniform", f"mixture.online={value}"] for name, value in online.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--every", type=int, default=8, help="steps between decisions; linear_law: three times that")
    parser.add_argument("--only", nargs="*", help="these variants, and uniform")
    parser.add_argument("--mean-of", metavar="VARIANT", help="also a static run with the shares that it played in all")
    parser.add_argument("--out", type=Path, default=Path("runs/compare-online"))
    options = parser.parse_args()
    found: dict[str, list[dict]] = {}
    for seed in range(options.seeds):
        folder = options.out / f"seed-{seed}"
        reference = (folder / "reference").absolute()
        run(options, reference, 1000 + seed, ["mixture.shares=uniform"])
        for name, changes in variants(options.every, reference).items():
            if not options.only or name in ("uniform", *options.only):
                out = folder / name.replace(", ", "-").replace(" ", "")
                found.setdefault(name, []).append(run(options, out, seed, changes))
                print(f"seed {seed}, {name}: {found[name][-1]['mean']:.4f}", file=sys.stderr, flush=True)
                if name == options.mean_of:  # is it the change that pays, or the mixture it comes to?
                    shares = json.dumps(found[name][-1]["shares"])
                    played = run(options, out.with_name(f"{out.name}-mean"), seed, [f"mixture.shares={shares}"])
                    found.setdefault("its mean, static", []).append(played)
    print_table(found)


def run(options: argparse.Namespace, out: Path, seed: int, changes: list[str]) -> dict:
    """One run: its held-out losses, what it played, its CPU seconds (nan: it stood already)."""
    alone = ["sweep=null", "merge=null", "fuse=null", "output.save_every=null", "train.eval_on_start=false"]
    length = [f"train.steps={options.steps}", f"train.batch_tokens={options.batch_tokens}", f"seed={seed}"]
    length.append(f"output.dir={out}")
    started = time.process_time()
    stood = (out / "result.json").is_file()
    result = train(load_recipe(options.recipe, [*alone, *length, *changes]), quiet=True, prove=False)
    seconds = float("nan") if stood else time.process_time() - started
    losses = [scores.summary()["loss"] for scores in result.scores.values()]
    plan = json.loads((out / "plan.json").read_text(encoding="utf-8"))
    shares = {task: row["realised"] for task, row in plan["tasks"].items()}
    last = plan.get("changes", [{"shares": shares}])[-1]["shares"]
    return {"mean": float(np.mean(losses)), "worst": max(losses), "shares": shares, "last": last, "seconds": seconds}


def print_table(found: dict[str, list[dict]]) -> None:
    tasks = list(found["uniform"][0]["shares"])
    base = np.array([entry["mean"] for entry in found["uniform"]])
    print(f"{'mixture':<20}{'mean loss':>10}{'worst':>8}{'minus uniform':>15}{'90 % interval':>21}{'CPU s':>7}", end="")
    print(f"   shares played, and at the end ({', '.join(tasks)})")
    for name, entries in found.items():
        gap = np.array([entry["mean"] for entry in entries]) - base
        half = 0.0 if len(gap) < 2 else student.ppf(0.95, len(gap) - 1) * gap.std(ddof=1) / np.sqrt(len(gap))
        interval = "" if name == "uniform" else f"{gap.mean() - half:+.4f} to {gap.mean() + half:+.4f}"
        mean, worst = (np.mean([entry[key] for entry in entries]) for key in ("mean", "worst"))
        timed = [entry["seconds"] for entry in entries if np.isfinite(entry["seconds"])]
        seconds = f"{np.mean(timed):.0f}" if timed else "-"
        played, last = (
            " ".join(f"{np.mean([entry[key][task] for entry in entries]):.2f}" for task in tasks)
            for key in ("shares", "last")
        )
        print(f"{name:<20}{mean:10.4f}{worst:8.4f}{gap.mean():+15.4f}{interval:>21}{seconds:>7}   {played} | {last}")


if __name__ == "__main__":
    main()
