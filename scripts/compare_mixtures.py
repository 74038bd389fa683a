"""Is the predicted mixture better than simple ones? A tiny sweep per seed, then every mixture trained on that seed.

    python scripts/compare_mixtures.py recipes/code-tasks.yaml                      # about 8 CPU minutes
    python scripts/compare_mixtures.py recipes/code-tasks.yaml --trials 20 --run-steps 50 --seeds 5

For each seed: the trials of the recipe's sweep (its own order, adapters and rows by that seed), `auto` and RegMix's
procedure (LightGBM on the trials, mean of the 128 best of 100,000 draws) fitted on them, and one run of each mixture:
predicted, RegMix's, uniform, natural, temperature (exponent 0.5). Scored on the held-out rows (the quickstart's come
from other modules) by the mean of the tasks' losses. Differences to uniform are paired by seed; intervals are
Student's t at 90 % over seeds. Lower is better.
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

from data_mixers.fitting.surrogate_fits import fit_surrogates  # noqa: E402
from data_mixers.mixture.mixture import Mixture, natural, tempered, uniform  # noqa: E402
from data_mixers.propose.proposal import Proposal, propose_mixture  # noqa: E402
from data_mixers.surrogates.lightgbm import LightGBM  # noqa: E402
from data_mixers.sweep.ledger import TrialLedger  # noqa: E402
from data_mixers.sweep.runner import run_sweep  # noqa: E402
from data_mixers.sweep.trial import Trial  # noqa: E402
from mtft.data.planning import task_sizes  # noqa: E402
from mtft.pipeline.stages import derived_recipes  # noqa: E402
from mtft.pipeline.stages import mix as stage  # noqa: E402
from mtft.recipe.load import load_recipe  # noqa: E402
from mtft.training.sweep_trial import run_trial  # noqa: E402
from scripts.regmix_notebook import regmix_optimum  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--steps", type=int, help="of a trial; default: the recipe's sweep.steps")
    parser.add_argument("--run-steps", type=int, help="of the runs that are compared; default: as the trials")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/compare-mixtures"), help="ledgers; a second call goes on"
    )
    options = parser.parse_args()
    started = time.process_time()
    found: dict[str, list[float]] = {}
    shares: dict[str, list[np.ndarray]] = {}
    verdicts = []
    for seed in range(options.seeds):
        changes = [f"seed={seed}", f"sweep.trials={options.trials}", f"output.dir={options.out / f'seed-{seed}'}"]
        if options.steps:
            changes.append(f"sweep.steps={options.steps}")
        recipe = load_recipe(options.recipe, changes)
        mixtures, proposal = mixtures_of(recipe)
        verdicts.append(proposal.text)
        for name, score in run_all(recipe, mixtures, options.run_steps, seed).items():
            found.setdefault(name, []).append(score)
            shares.setdefault(name, []).append(mixtures[name].shares)
        print(f"seed {seed}: {time.process_time() - started:.0f} CPU seconds so far", file=sys.stderr, flush=True)
    print_table(recipe.task_names, found, shares)
    for seed, text in enumerate(verdicts):
        print(f"seed {seed}: {text}")
    print(f"{time.process_time() - started:.0f} CPU seconds")


def mixtures_of(recipe) -> tuple[dict[str, Mixture], Proposal]:
    """Sweep with the recipe's seed, and the mixtures to compare, all within the recipe's bounds."""
    stores = stage._stores(recipe)
    where, sizes = stage.space(recipe, stores), task_sizes(recipe, stores)
    ledger = TrialLedger(stage.mix_dir(recipe) / stage.LEDGER)

    def run(trial: Trial) -> list[tuple[float, dict[str, float]]]:
        return run_trial(
            trial,
            recipe=derived_recipes.proxy_recipe(recipe, recipe.sweep),
            eval_limit=recipe.sweep.eval_limit,
            threads=1,
        )

    run_sweep(stage.design(recipe, stores), run, ledger, backend="inline", seed=recipe.seed)
    fits = fit_surrogates(ledger, list(stage._goals(recipe)), seed=recipe.seed)
    proposal = propose_mixture(fits, "mean", where.bounds, prior=where.prior, current=where.current, kl=recipe.sweep.kl)
    arrays = [fitted.arrays for fitted in fits.targets.values()]
    mean = np.mean([column.y for column in arrays], axis=0)
    trees = LightGBM().fit(arrays[0].X, mean)
    regmix = where.bounds.project(regmix_optimum(trees, where.prior.shares))
    names = recipe.task_names
    return {
        "predicted (auto)": proposal.mixture,
        "RegMix": Mixture(names, regmix),
        "uniform": Mixture(names, where.bounds.project(uniform(names))),
        "natural": Mixture(names, where.bounds.project(natural(sizes))),
        "temperature 0.5": Mixture(names, where.bounds.project(tempered(sizes, 0.5))),
    }, proposal


def run_all(recipe, mixtures: dict[str, Mixture], steps: int | None, seed: int) -> dict[str, float]:
    """{mixture: mean of the tasks' held-out losses}, all held-out rows; runs already made are read back."""
    sweep = recipe.sweep if steps is None else derived_recipes.override_section(recipe.sweep, steps=steps)
    proxy = derived_recipes.proxy_recipe(recipe, sweep)
    path = Path(recipe.output.dir) / f"runs-{sweep.steps}.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    for name, mixture in mixtures.items():
        if name not in known:
            trial = Trial(mixture, seed=seed + 1000)  # not the seed of any trial that chose the mixture
            ((_, scores),) = run_trial(trial, proxy, None, threads=1)
            known[name] = float(np.mean([scores[f"{task}/loss"] for task in recipe.task_names]))
            path.write_text(json.dumps(known, indent=1))
    return {name: known[name] for name in mixtures}


def print_table(tasks, found: dict[str, list[float]], shares: dict[str, list[np.ndarray]]) -> None:
    base = np.array(found["uniform"])
    print(f"{'mixture':<18}{'loss':>8}{'minus uniform':>15}{'90 % interval':>22}   mean shares ({', '.join(tasks)})")
    for name, values in found.items():
        gap = np.array(values) - base
        half = 0.0 if len(gap) < 2 else student.ppf(0.95, len(gap) - 1) * gap.std(ddof=1) / np.sqrt(len(gap))
        interval = "" if name == "uniform" else f"{gap.mean() - half:+.4f} to {gap.mean() + half:+.4f}"
        average = " ".join(f"{share:.2f}" for share in np.mean(shares[name], axis=0))
        print(f"{name:<18}{np.mean(values):8.4f}{gap.mean():+15.4f}{interval:>22}   {average}")


if __name__ == "__main__":
    main()
