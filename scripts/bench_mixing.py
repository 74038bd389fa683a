"""How well mixtures are predicted: surrogate x number of trials, on published tables, beside RegMix's own procedure.

    python scripts/bench_mixing.py                          # about 2 CPU minutes: table, scale, speed
    python scripts/bench_mixing.py --full                   # every figure of docs/mixing.md, about 30 CPU minutes
    python scripts/bench_mixing.py --part admire --repeats 10
    python scripts/bench_mixing.py --part table --surrogates auto lightgbm --trials 64 128 --seeds 10 --targets pile_cc

Tables: ../shared/data beside the repository, or MTFT_SHARED_DATA. rho = Spearman x 100; R2 and MSE on the test rows;
cover = share of test rows inside the 90 % interval; sec = CPU seconds of fit + prediction with intervals, one target,
one thread; rho 1B = against the runs of 1B parameters, without any of them in the fit and without telling so. Subset s
of n trials: RandomState(100 + s).permutation(512)[:n] (512: all, one figure). AVG13 = the mean of the 13 losses.
Bars come last, each with PASS or MISS and by how much.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(variable, "1")

import numpy as np  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
DATA = Path(os.environ.get("MTFT_SHARED_DATA") or ROOT.parent / "shared" / "data")

from data_mixers.common.csv_tables import read_table  # noqa: E402
from data_mixers.fitting.scale_transfer import calibrate, fit_scale, for_mixtures, for_other_scale, small_scale_mean  # noqa: E402
from data_mixers.fitting.surrogate_fits import SurrogateFits, fit_surrogates  # noqa: E402
from data_mixers.mixture.mixture import Mixture  # noqa: E402
from data_mixers.propose.from_csv import fit_csv  # noqa: E402
from data_mixers.propose.proposal import propose_mixture  # noqa: E402
from data_mixers.surrogates.gaussian_process import GaussianProcess  # noqa: E402
from data_mixers.surrogates.lightgbm import LightGBM  # noqa: E402
from data_mixers.surrogates.registry import SURROGATES, candidates_of  # noqa: E402
from data_mixers.surrogates.ridge import Ridge  # noqa: E402
from data_mixers.surrogates.stack import Stack, spearman  # noqa: E402
from data_mixers.sweep.trial import TrialRecord  # noqa: E402
from scripts.regmix_notebook import regmix_optimum  # noqa: E402

SIX = ("pile_cc", "github", "ubuntu_irc", "pubmed_central", "wikipedia_en", "AVG13")
FAST = ("linear", "lightgbm", "ridge", "exp", "power", "bimix", "transfer")
BARS: list[tuple[str, float, str, float, float]] = []  # what, value, comparison, bar (and upper bar of "in")


def bar(what: str, value: float, comparison: str, limit: float, upper: float = np.nan) -> None:
    """Note a figure of the acceptance list: ">=", "<=", or "in" [limit, upper]."""
    BARS.append((what, float(value), comparison, limit, upper))


def print_bars() -> None:
    print("\n--- bars")
    for what, value, comparison, limit, upper in BARS:
        off = limit - value if comparison == ">=" else value - limit
        if comparison == "in":
            off = max(limit - value, value - upper)
        said = f"{limit:g} to {upper:g}" if comparison == "in" else f"{comparison} {limit:g}"
        verdict = "PASS" if off <= 0 else f"MISS by {off:.3g}"
        print(f"{what:<62}{value:9.3f}   bar {said:<14}{verdict}")


def table(name: str) -> dict[str, np.ndarray]:
    """Columns of a published table with a numeric index."""
    read = read_table(DATA / name)
    return dict(zip(read.columns, read.values.T, strict=True))


def shares(name: str) -> np.ndarray:
    return read_table(DATA / name).values


def losses(name: str) -> dict[str, np.ndarray]:
    columns = table(name)
    return {**columns, "AVG13": np.mean(list(columns.values()), axis=0)}


def model_of(surrogate: str, goal: str = "min") -> Stack:
    return Stack(candidates=candidates_of(surrogate, goal=goal))


def fits_of(X: np.ndarray, Y: dict[str, np.ndarray], rows: np.ndarray, surrogate: str = "auto") -> SurrogateFits:
    """Fits on some rows of a table, as from a ledger."""
    names = [f"t{k}" for k in range(X.shape[1])]
    records = [
        TrialRecord(
            trial=str(row),
            status="done",
            mixture=dict(zip(names, X[row].tolist(), strict=True)),
            scores={target: float(y[row]) for target, y in Y.items()},
        )
        for row in rows
    ]
    return fit_surrogates(records, surrogate=surrogate)


def subset(s: int, n: int) -> np.ndarray:
    return np.random.RandomState(100 + s).permutation(512)[:n]


def regmix_table(options: argparse.Namespace) -> None:
    """1M runs: fitted on n of 512, scored on the 256 (Pile-CC) or 128 test rows."""
    X, Y = shares("regmix/train_mixture_1m.csv"), losses("regmix/train_loss_1m.csv")
    new, truth = shares("regmix/test_mixture_1m.csv"), losses("regmix/test_loss_1m_first128.csv")
    truth["pile_cc"] = table("regmix/test_loss_pile_cc_1m.csv")["pile_cc"]
    large_X, large = shares("regmix/test_mixture_1B_first32.csv"), losses("regmix/test_loss_1B_first32.csv")
    print(
        f"{'surrogate':<10}{'trials':>7}{'seeds':>6}  {'target':<16}"
        f"{'rho':>7}{'sd':>6}{'R2':>8}{'MSE':>9}{'cover':>7}{'sec':>7}{'rho 1B':>8}"
    )
    found: dict[tuple[str, int, str], np.ndarray] = {}
    for surrogate, n, target, seeds in _cells(options):
        rows = []
        for s in range(seeds if n < 512 else 1):
            kept = subset(s, n)
            started = time.process_time()
            model = model_of(surrogate).fit(X[kept], Y[target][kept])
            y = truth[target]
            mean, lower, upper = model.predict(new[: len(y)])
            seconds = time.process_time() - started
            at_large = spearman(model.mean(large_X), large[target]) if target in large else np.nan
            mse = float(np.mean((mean - y) ** 2))
            cover = float(np.mean((lower <= y) & (y <= upper)))
            rows.append((spearman(mean, y), 1 - mse / y.var(), mse, cover, seconds, at_large))
        rho, r2_, mse, cover, seconds, at_large = found[surrogate, n, target] = np.mean(rows, axis=0)
        sd = np.std([row[0] for row in rows])
        print(
            f"{surrogate:<10}{n:>7}{len(rows):>6}  {target:<16}"
            f"{rho:7.2f}{sd:6.2f}{r2_:8.3f}{mse:9.5f}{cover:7.2f}{seconds:7.2f}{at_large:8.2f}",
            flush=True,
        )
    _table_bars(found, options)


def _cells(options: argparse.Namespace) -> list[tuple[str, int, str, int]]:
    """(surrogate, trials, target, seeds) of the table. By default auto has all six targets at 64 and 128 trials."""
    cells = []
    for surrogate in options.surrogates:
        for n in options.trials:
            for target in options.targets or ("pile_cc",):
                cells.append((surrogate, n, target, options.seeds if n < 256 else min(options.seeds, 5)))
    if options.targets is None and "auto" in options.surrogates:
        sizes = options.trials if options.full else [n for n in options.trials if n in (64, 128)]
        few = min(options.seeds, 5)
        cells += [("auto", n, target, few if n < 256 else min(few, 2)) for n in sizes for target in SIX[1:]]
    return cells


def _table_bars(found: dict[tuple[str, int, str], np.ndarray], options: argparse.Namespace) -> None:
    for n, limit in ((32, 95.0), (64, 98.0), (128, 99.0)):
        if ("auto", n, "pile_cc") in found:
            bar(f"auto, Pile-CC 1M, {n} trials: rho", found["auto", n, "pile_cc"][0], ">=", limit)
    for n, limit in ((64, 97.0), (128, 98.2), (512, 98.9)):
        six = [found["auto", n, target] for target in SIX if ("auto", n, target) in found]
        if len(six) == len(SIX):
            bar(f"auto, mean of six targets 1M, {n} trials: rho", np.mean(six, axis=0)[0], ">=", limit)
            bar(f"auto, six targets, {n} trials: 90 % intervals cover", np.mean(six, axis=0)[3], "in", 0.85, 0.95)


def scale(options: argparse.Namespace) -> None:
    """1B from 128 1M trials: Pile-CC without large runs, and the mean of the losses given m large runs."""
    X, Y = shares("regmix/train_mixture_1m.csv"), table("regmix/train_loss_1m.csv")
    large_X, large = shares("regmix/test_mixture_1B_first32.csv"), table("regmix/test_loss_1B_first32.csv")
    large_X = large_X / large_X.sum(axis=1, keepdims=True)
    big, average = np.stack(list(large.values())), np.mean(list(large.values()), axis=0)
    figures: dict[str, list[float]] = {}

    def note(what: str, value: float) -> None:
        figures.setdefault(what, []).append(value)

    for s in range(min(options.seeds, 5) if options.full else 2):
        fits = fits_of(X, {target: Y[target] for target in large}, subset(s, 128))
        other = for_mixtures(fits, large_X)  # what `mtft mix fit --predict` does where nobody says which scale
        for target, truth in large.items():
            note(f"{target} 1B, --same-scale", spearman(fits[target].model.mean(large_X), truth))
            note(f"{target} 1B, by default", spearman(other[target].model.mean(large_X), truth))
        note(
            "mean of losses at 1B, m = 0",
            spearman(small_scale_mean(for_other_scale(fits), large_X).mean(axis=0), average),
        )
        small, spread = (
            small_scale_mean(fits, large_X),
            np.array([f.model.mean(X).var() for f in fits.targets.values()]),
        )
        for m in (4, 8, 16):
            for draw in range(40):
                runs = np.random.default_rng([s, m, draw]).permutation(len(large_X))
                seen, rest = runs[:m], runs[m:]
                for method in ("plain", "shrunk", "residual"):
                    to_large = fit_scale(
                        tuple(large), large_X[seen], small[:, seen], big[:, seen], spread, method=method
                    )
                    guess = to_large.predict(large_X[rest], small[:, rest]).mean(axis=0)
                    note(f"mean of losses at 1B, m = {m}, {method}", spearman(guess, average[rest]))
                if draw < 5:
                    mapped = calibrate(fits, large_X[seen], big[:, seen]).predict(large_X[rest])
                    inside = [
                        np.mean((p.lower <= large[name][rest]) & (large[name][rest] <= p.upper))
                        for name, p in mapped.items()
                    ]
                    note(f"90 % intervals at 1B cover, m = {m}", float(np.mean(inside)))
    for name, values in figures.items():
        print(f"{name:<48}{np.mean(values):7.2f}  (sd {np.std(values):.2f}, {len(values)} draws)")
    bar("Pile-CC 1B from 128 1M trials: rho", np.mean(figures["pile_cc 1B, by default"]), ">=", 98.5)
    given = np.mean(figures["mean of losses at 1B, m = 8, residual"])
    bar("mean of losses at 1B, 128 1M trials and 8 large runs: rho", given, ">=", 83.0)


def damo(options: argparse.Namespace) -> None:
    """R2 over 50 mixtures x 4 checkpoints: grouped by mixture, and with DaMo's split (mixtures on both sides)."""
    from sklearn.model_selection import GroupKFold

    from data_mixers.surrogates.mlp import MLP

    columns = table_of_damo()
    mixture, tau = columns.pop("mixture_id").astype(int), (columns.pop("checkpoint") + 1) / 4
    P = np.stack([columns.pop(name) for name in list(columns) if name.startswith("dataset_")], axis=1)
    models: dict[str, Callable] = {
        "mlp (DaMo)": MLP,
        "ridge": Ridge,
        "gp quarter": lambda: GaussianProcess("quarter"),
        "auto": lambda: model_of("auto", "max"),
    }
    for name, make in models.items():
        if options.only_auto and name != "auto":
            continue
        grouped, without, leaky = [], [], []
        for seed in range(options.damo_seeds if name == "auto" else min(options.damo_seeds, 2)):
            folds = list(GroupKFold(10, shuffle=True, random_state=seed).split(P, groups=mixture))
            held = [_held_out(make, P, tau, y, mixture, folds) for y in columns.values()]
            grouped.append(np.mean([r2(y, guess) for y, guess in zip(columns.values(), held, strict=True)]))
            keep = mixture != 36
            without.append(np.mean([r2(y[keep], guess[keep]) for y, guess in zip(columns.values(), held, strict=True)]))
            split = [_leaky_split(mixture, seed)]
            held = [_held_out(make, P, tau, y, mixture, split)[split[0][1]] for y in columns.values()]
            leaky.append(np.mean([r2(y[split[0][1]], guess) for y, guess in zip(columns.values(), held, strict=True)]))
        print(
            f"{name:<12} grouped R2 {np.mean(grouped):.3f} (sd {np.std(grouped):.3f}: "
            f"{', '.join(f'{g:.3f}' for g in grouped)})   without mixture 36 {np.mean(without):.3f}   "
            f"leaky (rows split at random) {np.mean(leaky):.3f} (sd {np.std(leaky):.3f})",
            flush=True,
        )
    bar(f"auto, DaMo, grouped 10-fold, {len(grouped)} fold seeds: mean R2", np.mean(grouped), ">=", 0.58)


def table_of_damo() -> dict[str, np.ndarray]:
    with open(DATA / "damo/trials.csv", newline="") as file:
        rows = list(csv.reader(file))
    return {name: np.array([float(row[i]) for row in rows[1:]]) for i, name in enumerate(rows[0])}


def _leaky_split(mixture: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Checkpoints shuffled and cut at 90 %, as published."""
    order = np.random.RandomState(seed).permutation(len(mixture))
    cut = int(0.9 * len(order))
    return order[:cut], order[cut:]


def _held_out(make, P, tau, y, groups, folds) -> np.ndarray:
    """[n]: each row predicted by the model of the folds that lack it; NaN where no fold holds it."""
    held = np.full(len(y), np.nan)
    for train, test in folds:
        model = make().fit(P[train], y[train], groups=groups[train], progress=tau[train])
        held[test] = model.mean(P[test], tau[test])
    return held


def r2(y: np.ndarray, predicted: np.ndarray) -> float:
    return float(1 - np.sum((predicted - y) ** 2) / np.sum((y - y.mean()) ** 2))


def admire(options: argparse.Namespace) -> None:
    """5-fold CV of the average score over 19 instruction sets' mixtures (KFold, shuffled; one repeat per seed)."""
    from sklearn.model_selection import KFold

    with open(DATA / "admire/trials.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    ratios = [name for name in rows[0] if name.startswith("ratio_")]
    for size, limit in (("Qwen2.5-0.5B", 70.5), ("Qwen2.5-3B", 79.0)):
        these = [row for row in rows if row["model"] == size]
        X = np.array([[float(row[name]) for name in ratios] for row in these])
        X, y = X / X.sum(axis=1, keepdims=True), np.array([float(row["metric_avg_id+ood"]) for row in these])
        for name in ("auto",) if options.only_auto else ("ridge", "lightgbm", "auto"):
            figures = []
            for seed in range(options.repeats):
                mean, inside = np.empty(len(y)), np.empty(len(y))
                for train, test in KFold(5, shuffle=True, random_state=seed).split(X):
                    model = model_of(name, "max").fit(X[train], y[train])
                    mean[test], lower, upper = model.predict(X[test])
                    inside[test] = (lower <= y[test]) & (y[test] <= upper)
                figures.append((spearman(mean, y), r2(y, mean), inside.mean()))
            rho, fit_, cover = np.mean(figures, axis=0)
            sd = np.std([figure[0] for figure in figures])
            print(
                f"{size:<14}{name:<10} rho {rho:6.2f} (sd {sd:.2f} over repeats)  R2 {fit_:6.3f}  cover {cover:5.2f}  "
                f"({len(figures)} x 5 folds)",
                flush=True,
            )
        bar(f"auto, ADMIRE {size}, {options.repeats} x 5-fold: rho", rho, ">=", limit)
        bar(f"auto, ADMIRE {size}: 90 % intervals cover", cover, "in", 0.85, 0.95)


def speed(options: argparse.Namespace) -> None:
    """Fit + intervals + proposal at 128 trials against RegMix's notebook (fit on 512, 100,000 predictions), one after
    the other, three times; CPU seconds of one thread, the median."""
    files = DATA / "regmix/train_mixture_1m.csv", DATA / "regmix/train_loss_1m.csv"
    X, Y = shares("regmix/train_mixture_1m.csv"), table("regmix/train_loss_1m.csv")
    uniform = Mixture(read_table(files[0]).columns, np.full(17, 1 / 17))

    def ours(targets: list[str] | str) -> float:
        started = time.process_time()
        fits = fit_csv(*files, targets, limit=128)
        fits.predict(X[:256])
        propose_mixture(fits, prior=uniform)
        return time.process_time() - started

    def notebook() -> float:
        started = time.process_time()
        regmix_optimum(LightGBM().fit(X, Y["pile_cc"]), np.full(17, 1.0))
        return time.process_time() - started

    ours(["pile_cc"])  # imports
    pairs = [(ours(["pile_cc"]), notebook()) for _ in range(3)]
    one, theirs = np.median([pair[0] for pair in pairs]), np.median([pair[1] for pair in pairs])
    ratio, every = np.median([b / a for a, b in pairs]), ours("all")
    print(f"one target: ours {one:.2f} s, the notebook {theirs:.2f} s ({ratio:.1f} times); all 13: ours {every:.2f} s")
    bar("one target at 128 trials: CPU seconds", one, "<=", 2.0)
    bar("all 13 targets at 128 trials: CPU seconds", every, "<=", 20.0)
    bar("one target, the notebook's time / ours", ratio, ">=", 1.0)
    bar("13 targets, 13 notebooks' time / ours", 13 * theirs / every, ">=", 1.0)


PARTS = {"table": regmix_table, "scale": scale, "damo": damo, "admire": admire, "speed": speed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="every part, 10 seeds, 10 repeats, 5 fold seeds of DaMo")
    parser.add_argument("--part", nargs="+", choices=PARTS, help="default: table, scale, speed")
    parser.add_argument("--surrogates", nargs="+", default=[*FAST, "auto"], choices=["auto", *SURROGATES])
    parser.add_argument("--trials", nargs="+", type=int, default=[32, 64, 128, 256, 512])
    parser.add_argument("--targets", nargs="+", help="default: Pile-CC, and the six for auto")
    parser.add_argument("--seeds", type=int, help="random subsets of the trials (default 5, --full 10)")
    parser.add_argument("--repeats", type=int, help="of 5-fold CV in admire (default 2)")
    parser.add_argument("--damo-seeds", type=int, help="fold seeds of auto in damo, 100 fits each (default 1)")
    parser.add_argument("--only-auto", action="store_true", help="admire and damo without the other surrogates")
    options = parser.parse_args()
    options.seeds = options.seeds or (10 if options.full else 5)
    options.repeats = options.repeats or (10 if options.full else 2)
    options.damo_seeds = options.damo_seeds or (5 if options.full else 1)
    if not DATA.exists():
        parser.error(f"no tables at {DATA}: set MTFT_SHARED_DATA")
    warnings.simplefilter("ignore")
    started = time.process_time()
    for part in options.part or (list(PARTS) if options.full else ["table", "scale", "speed"]):
        print(f"\n--- {part}: {PARTS[part].__doc__}")
        PARTS[part](options)
    print_bars()
    print(f"\n{time.process_time() - started:.0f} CPU seconds, one thread")


if __name__ == "__main__":
    main()
