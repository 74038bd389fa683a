"""How well mixtures are predicted: surrogate x number of trials, on published tables, beside RegMix's own procedure.

    python scripts/bench_mixing.py                          # RegMix: 6 targets, 32 ... 512 trials, 5 subsets
    python scripts/bench_mixing.py --part scale damo admire speed
    python scripts/bench_mixing.py --surrogates auto lightgbm --trials 64 128 --seeds 10 --targets pile_cc

Tables: ../shared/data beside the repository, or MTFT_SHARED_DATA. rho = Spearman x 100; R2 and MSE on the test rows;
cover = share of test rows inside the 90 % interval; sec = CPU seconds of fit + prediction with intervals, one target,
one thread. Subset s of n trials: RandomState(100 + s).permutation(512)[:n]. AVG13 = the mean of the 13 losses.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import warnings
from pathlib import Path

for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(variable, "1")

import numpy as np  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
DATA = Path(os.environ.get("MTFT_SHARED_DATA") or ROOT.parent / "shared" / "data")

from data_mixers.mixture import Mixture  # noqa: E402
from data_mixers.next_batch import expected_improvement, thompson  # noqa: E402
from data_mixers.scale import fit_scale  # noqa: E402
from data_mixers.surrogates import SURROGATES, GaussianProcess, LightGBM, Ridge, Stack, candidates_of  # noqa: E402
from data_mixers.surrogates.stack import spearman  # noqa: E402
from data_mixers.tables import read_table  # noqa: E402

SIX = ("pile_cc", "github", "ubuntu_irc", "pubmed_central", "wikipedia_en", "AVG13")


def table(name: str) -> dict[str, np.ndarray]:
    """Columns of a published table with a numeric index."""
    read = read_table(DATA / name)
    return dict(zip(read.columns, read.values.T, strict=True))


def shares(name: str) -> np.ndarray:
    return read_table(DATA / name).values


def losses(name: str) -> dict[str, np.ndarray]:
    columns = table(name)
    return {**columns, "AVG13": np.mean(list(columns.values()), axis=0)}


def model_of(surrogate: str, n: int, goal: str = "min") -> Stack:
    return Stack(candidates=candidates_of(surrogate, goal=goal, n=n))


def regmix(options: argparse.Namespace) -> None:
    X, Y = shares("regmix/train_mixture_1m.csv"), losses("regmix/train_loss_1m.csv")
    new, truth = shares("regmix/test_mixture_1m.csv"), losses("regmix/test_loss_1m_first128.csv")
    truth["pile_cc"] = table("regmix/test_loss_pile_cc_1m.csv")["pile_cc"]
    large_X, large = shares("regmix/test_mixture_1B_first32.csv"), table("regmix/test_loss_1B_first32.csv")
    print(
        f"{'surrogate':<10}{'trials':>7}  {'target':<16}"
        f"{'rho':>7}{'sd':>6}{'R2':>8}{'MSE':>9}{'cover':>7}{'sec':>7}{'rho 1B':>8}"
    )
    for surrogate in options.surrogates:
        for n in options.trials:
            mean_rho = []
            for target in options.targets:
                rows = []
                for s in range(options.seeds if n < 512 else 1):
                    kept = np.random.RandomState(100 + s).permutation(512)[:n]
                    started = time.process_time()
                    model = model_of(surrogate, n).fit(X[kept], Y[target][kept])
                    y = truth[target]
                    mean, lower, upper = model.predict(new[: len(y)])
                    seconds = time.process_time() - started
                    at_large = spearman(model.mean(large_X), large[target]) if target in large else np.nan
                    mse = float(np.mean((mean - y) ** 2))
                    cover = float(np.mean((lower <= y) & (y <= upper)))
                    rows.append((spearman(mean, y), 1 - mse / y.var(), mse, cover, seconds, at_large))
                rho, r2, mse, cover, seconds, at_large = np.mean(rows, axis=0)
                mean_rho.append(rho)
                sd = np.std([row[0] for row in rows])
                print(
                    f"{surrogate:<10}{n:>7}  {target:<16}"
                    f"{rho:7.2f}{sd:6.2f}{r2:8.3f}{mse:9.5f}{cover:7.2f}{seconds:7.2f}{at_large:8.2f}",
                    flush=True,
                )
            print(f"{surrogate:<10}{n:>7}  {'mean':<16}{np.mean(mean_rho):7.2f}", flush=True)


def scale(options: argparse.Namespace) -> None:
    """1B from 128 1M trials: Pile-CC without large runs, and the mean of the losses given m large runs."""
    X, Y = shares("regmix/train_mixture_1m.csv"), table("regmix/train_loss_1m.csv")
    large_X, large = shares("regmix/test_mixture_1B_first32.csv"), table("regmix/test_loss_1B_first32.csv")
    pool = shares("regmix/test_mixture_1m.csv")
    names = tuple(large)
    average = np.mean(list(large.values()), axis=0)
    figures: dict[str, list[float]] = {}
    for s in range(min(3, options.seeds)):
        kept = np.random.RandomState(100 + s).permutation(512)[:128]
        fitted = {target: model_of("auto", 128).fit(X[kept], Y[target][kept]) for target in names}
        stack = fitted["pile_cc"]
        figures.setdefault("pile_cc 1B, stack", []).append(spearman(stack.mean(large_X), large["pile_cc"]))
        laws = {score.name: score.rho for score in stack.scores if score.name in ("exp", "power")}
        law = stack.candidates[max(laws, key=laws.__getitem__)].clone().fit(X[kept], Y["pile_cc"][kept])
        figures.setdefault("pile_cc 1B, law by the rule", []).append(spearman(law.mean(large_X), large["pile_cc"]))
        small = np.stack([fitted[target].mean(large_X) for target in names])
        variance = np.stack([fitted[target].mean(pool) for target in names]).var(axis=1)
        big = np.stack([large[target] for target in names])
        figures.setdefault(f"mean of {len(names)} losses at 1B, m = 0", []).append(
            spearman(small.mean(axis=0), average)
        )
        for m in (4, 8, 16):
            for method in ("plain", "shrunk", "residual"):
                for draw in range(40):
                    runs = np.random.default_rng([s, m, draw]).permutation(len(large_X))
                    seen, rest = runs[:m], runs[m:]
                    found = fit_scale(names, large_X[seen], small[:, seen], big[:, seen], variance, method=method)
                    predicted = found.predict(large_X[rest], small[:, rest]).mean(axis=0)
                    figures.setdefault(f"mean of {len(names)} losses at 1B, m = {m}, {method}", []).append(
                        spearman(predicted, average[rest])
                    )
    for name, values in figures.items():
        print(f"{name:<48}{np.mean(values):7.2f}  (sd {np.std(values):.2f}, {len(values)} draws)")


def damo(options: argparse.Namespace) -> None:
    """R2 over 50 mixtures x 4 checkpoints: grouped by mixture, and with DaMo's split (mixtures on both sides)."""
    from sklearn.model_selection import GroupKFold

    from data_mixers.surrogates.mlp import MLP

    columns = table_of_damo()
    mixture, tau = columns.pop("mixture_id").astype(int), (columns.pop("checkpoint") + 1) / 4
    P = np.stack([columns.pop(name) for name in list(columns) if name.startswith("dataset_")], axis=1)
    models = {
        "mlp (DaMo)": MLP,
        "ridge": Ridge,
        "gp quarter": lambda: GaussianProcess("quarter"),
        "auto": lambda: model_of("auto", 180, "max"),
    }
    leaky = _leaky_split(mixture)
    for name, make in models.items():
        grouped, without = [], []
        for seed in range(options.seeds if name != "auto" else min(options.seeds, options.auto_seeds)):
            folds = list(GroupKFold(10, shuffle=True, random_state=seed).split(P, groups=mixture))
            scores = [_held_out(make, P, tau, y, mixture, folds) for y in columns.values()]
            grouped.append(np.mean([r2(y, held) for y, held in zip(columns.values(), scores, strict=True)]))
            keep = mixture != 36
            without.append(np.mean([r2(y[keep], held[keep]) for y, held in zip(columns.values(), scores, strict=True)]))
        train, test = leaky
        split = np.mean(
            [
                r2(
                    y[test],
                    make().fit(P[train], y[train], groups=mixture[train], progress=tau[train]).mean(P[test], tau[test]),
                )
                for y in columns.values()
            ]
        )
        print(
            f"{name:<12} grouped R2 {np.mean(grouped):.3f}   without mixture 36 {np.mean(without):.3f}   "
            f"rows split at random {split:.3f}",
            flush=True,
        )


def table_of_damo() -> dict[str, np.ndarray]:
    import csv

    with open(DATA / "damo/trials.csv", newline="") as file:
        rows = list(csv.reader(file))
    return {name: np.array([float(row[i]) for row in rows[1:]]) for i, name in enumerate(rows[0])}


def _leaky_split(mixture: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Checkpoints shuffled and cut at 90 %, as published."""
    order = np.random.RandomState(0).permutation(len(mixture))
    cut = int(0.9 * len(order))
    return order[:cut], order[cut:]


def _held_out(make, P, tau, y, groups, folds) -> np.ndarray:
    held = np.empty(len(y))
    for train, test in folds:
        model = make().fit(P[train], y[train], groups=groups[train], progress=tau[train])
        held[test] = model.mean(P[test], tau[test])
    return held


def r2(y: np.ndarray, predicted: np.ndarray) -> float:
    return float(1 - np.sum((predicted - y) ** 2) / np.sum((y - y.mean()) ** 2))


def admire(options: argparse.Namespace) -> None:
    """5-fold CV of the average score over 19 instruction sets' mixtures (KFold, shuffled; one repeat per seed)."""
    import csv

    from sklearn.model_selection import KFold

    with open(DATA / "admire/trials.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    ratios = [name for name in rows[0] if name.startswith("ratio_")]
    for size in sorted({row["model"] for row in rows}):
        these = [row for row in rows if row["model"] == size]
        X = np.array([[float(row[name]) for name in ratios] for row in these])
        X = X / X.sum(axis=1, keepdims=True)
        for target in ("metric_avg_id+ood", "metric_avg_id"):
            y = np.array([float(row[target]) for row in these])
            for name in ("ridge", "lightgbm", "auto"):
                figures = []
                for seed in range(options.seeds if name != "auto" else min(options.seeds, options.auto_seeds)):
                    mean, inside = np.empty(len(y)), np.empty(len(y))
                    for train, test in KFold(5, shuffle=True, random_state=seed).split(X):
                        model = model_of(name, len(train), "max").fit(X[train], y[train])
                        mean[test], lower, upper = model.predict(X[test])
                        inside[test] = (lower <= y[test]) & (y[test] <= upper)
                    figures.append((spearman(mean, y), r2(y, mean), inside.mean()))
                rho, fit, cover = np.mean(figures, axis=0)
                print(
                    f"{size:<14}{target:<20}{name:<10} rho {rho:6.2f}  R2 {fit:6.3f}  cover {cover:5.2f}  "
                    f"({len(figures)} x 5 folds)",
                    flush=True,
                )


def speed(options: argparse.Namespace) -> None:
    """Fit + intervals + proposal at 128 trials against RegMix's notebook: fit on 512, 100,000 predictions."""
    from data_mixers.fit import fit_csv
    from data_mixers.propose import propose, regmix_optimum

    files = DATA / "regmix/train_mixture_1m.csv", DATA / "regmix/train_loss_1m.csv"
    X, y = shares("regmix/train_mixture_1m.csv"), table("regmix/train_loss_1m.csv")["pile_cc"]
    uniform = Mixture(read_table(files[0]).columns, np.full(17, 1 / 17))
    for targets in (["pile_cc"], "all"):
        started = time.process_time()
        fits = fit_csv(*files, targets, limit=128)
        middle = time.process_time()
        proposal = propose(fits, prior=uniform)
        print(
            f"ours, {len(fits.targets)} target(s), 128 trials: fit {middle - started:.2f} s, "
            f"proposal {time.process_time() - middle:.2f} s ({proposal.verdict})"
        )
    started = time.process_time()
    regmix_optimum(LightGBM().fit(X, y), np.full(17, 1.0))
    print(f"RegMix's notebook, 1 target, 512 trials: {time.process_time() - started:.2f} s")


def search(options: argparse.Namespace) -> None:
    """Trials until one of the pool's best 1 % is found: 16 at random, then 8 at a time; the pool = RegMix's 512."""
    X, Y = shares("regmix/train_mixture_1m.csv"), losses("regmix/train_loss_1m.csv")
    for target in options.targets:
        y, found = Y[target], {"random": [], "thompson": [], "ei": []}
        best = set(np.argsort(y)[:5].tolist())
        regret = []
        for seed in range(20):
            rng = np.random.default_rng(seed)
            order = rng.permutation(512)
            found["random"].append(min(int(np.flatnonzero(order == index)[0]) + 1 for index in best))
            for method in ("thompson", "ei"):
                tried = order[:16].tolist()
                while not best & set(tried):
                    model = GaussianProcess("quarter", iterations=40).fit(X[tried], y[tried])
                    pool = np.setdiff1d(np.arange(512), tried)
                    mean, covariance = model.mean(X[pool]), model.covariance(X[pool])
                    if method == "ei":
                        chosen = expected_improvement(mean, covariance, 8, y[tried])
                    else:
                        chosen = thompson(mean, covariance, 8, rng)
                    tried += pool[list(dict.fromkeys(chosen))].tolist()
                hit = next(i for i, index in enumerate(tried) if index in best)
                found[method].append(16 if hit < 16 else 16 + 8 * ((hit - 16) // 8 + 1))
            model = GaussianProcess("quarter").fit(X[order[:64]], y[order[:64]])
            regret.append((y[int(np.argmin(model.mean(X)))] - y.min()) / y.std())
        line = "   ".join(
            f"{name} {np.median(values):.0f} (mean {np.mean(values):.0f})" for name, values in found.items()
        )
        print(f"{target:<16}{line}   regret of the top pick at 64 trials: {np.mean(regret):.2f} sd", flush=True)


PARTS = {"regmix": regmix, "scale": scale, "damo": damo, "admire": admire, "speed": speed, "search": search}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=["regmix"])
    parser.add_argument(
        "--surrogates",
        nargs="+",
        default=["linear", "lightgbm", "ridge", "exp", "gp", "auto"],
        choices=["auto", *SURROGATES],
    )
    parser.add_argument("--trials", nargs="+", type=int, default=[32, 64, 128, 256, 512])
    parser.add_argument("--targets", nargs="+", default=list(SIX))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument(
        "--auto-seeds", type=int, default=2, help="repeats of `auto` in damo and admire, which fit it hundreds of times"
    )
    options = parser.parse_args()
    if not DATA.exists():
        parser.error(f"no tables at {DATA}: set MTFT_SHARED_DATA")
    warnings.simplefilter("ignore")
    for part in options.part:
        print(f"--- {part}: {PARTS[part].__doc__ or 'test rows of the 1M models'}")
        PARTS[part](options)


if __name__ == "__main__":
    main()
