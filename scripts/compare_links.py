"""Is a score with bounds better predicted through its logit? Trials left out say, with and without the link.

    python scripts/compare_links.py          # about 20 CPU minutes; --part damo, admire, regmix, simulated, loss

Every figure is of mixtures that the fit had not seen: grouped 5-fold (damo, admire) or other mixtures (regmix,
simulated). rho = Spearman x 100 and R2 of the score itself; cover = share inside the 90 % interval, width = its mean
width over the sd of the scores. "auto" takes in each fit whichever of the two its own cross-validation prefers.

damo       10 scores in [0, 100] of 50 mixtures, last checkpoint; and all four checkpoints
admire     10 benchmark scores and two averages in [0, 1]: 0.5B (256 trials) and 3B (128)
regmix     a score made of each of 13 losses: right or wrong on 200 rows with probability 1 / (1 + e^((loss - c) / sd)),
           c so that the mean score is 0.5, 0.9 or 0.98; and e^-loss, the likelihood of a token. Fitted on 64 trials
simulated  the same of a bowl in the roots of 5 shares, 48 trials, 50 rows
loss       which tells more of a score, its trials' scores or their losses? rho of what is predicted for new mixtures
           with the score without noise: scores of 50, 200 and 1,000 rows, and the loss; regmix's losses, ridge
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(variable, "1")

import numpy as np  # noqa: E402
from scipy.optimize import brentq  # noqa: E402
from scipy.special import expit  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
DATA = Path(os.environ.get("MTFT_SHARED_DATA") or ROOT.parent / "shared" / "data")

from data_mixers.fitting.surrogate_fits import fit_surrogates  # noqa: E402
from data_mixers.fitting.target_fit import TargetFit  # noqa: E402
from data_mixers.surrogates.base import grouped_folds  # noqa: E402
from data_mixers.surrogates.stack import spearman  # noqa: E402
from data_mixers.sweep.ledger import group_rows  # noqa: E402
from data_mixers.sweep.trial import TrialRecord  # noqa: E402

Case = tuple[str, list[tuple[np.ndarray, ...]]]  # what, its folds
LINKS = ("none", "logit")


def fit(
    X: np.ndarray, y: np.ndarray, tau: np.ndarray, high: float, link: str, seed: int, by: str = "auto"
) -> TargetFit:
    groups = group_rows(X)
    records = [
        TrialRecord(
            trial=str(group), status="done", mixture={f"t{k:02}": float(x) for k, x in enumerate(row)},
            scores={"score": float(score)}, progress=float(at), goal={"score": "max"},
        )
        for row, score, at, group in zip(X, y, tau, groups if np.ptp(tau) else range(len(y)), strict=True)
    ]  # fmt: skip
    progress = "all" if np.ptp(tau) else "last"
    bounds = {"score": (0.0, high)} if np.isfinite(high) else None
    fits = fit_surrogates(records, surrogate=by, seed=seed, progress=progress, bounds=bounds, link=link)
    return fits["score"]


def measured(folds: list[tuple[np.ndarray, ...]], high: float) -> dict[str, list[float]]:
    """{link: [rho, R2, cover, width]} over folds of (X, y, tau, X', y', tau')."""
    out: dict[str, list[list[np.ndarray]]] = {}
    for seed, (X, y, tau, X_test, y_test, tau_test) in enumerate(folds):
        found = {}
        for link in LINKS:
            fitted = fit(X, y, tau, high, link, seed)
            with_time = {"progress": tau_test} if np.ptp(tau) else {}
            shown = fitted.raw_prediction(fitted.model.predict(X_test, **with_time, level=0.9))
            found[link] = (fitted.r2, [y_test, *shown])
        found["auto"] = max((found[link] for link in LINKS), key=lambda pair: pair[0])
        for link, (_, columns) in found.items():
            out.setdefault(link, []).append(columns)
    figures = {}
    for link, parts in out.items():
        y, mean, lower, upper = (np.concatenate(column) for column in zip(*parts, strict=True))
        cover, width = np.mean((lower <= y) & (y <= upper)), np.mean(upper - lower) / y.std()
        figures[link] = [spearman(mean, y), float(1 - np.mean((y - mean) ** 2) / y.var()), float(cover), float(width)]
    return figures


def left_out(X: np.ndarray, y: np.ndarray, tau: np.ndarray, seed: int) -> list[tuple[np.ndarray, ...]]:
    every = np.arange(len(y))
    parts = []
    for held in grouped_folds(group_rows(X), 5, seed):
        rest = np.setdiff1d(every, held)
        parts.append((X[rest], y[rest], tau[rest], X[held], y[held], tau[held]))
    return parts


def read(name: str) -> tuple[list[str], list[list[str]]]:
    with open(DATA / name, newline="") as file:
        head, *rows = csv.reader(file)
    return head, rows


def damo(seeds: int) -> Iterator[tuple[str, float, list[list[tuple[np.ndarray, ...]]]]]:
    head, rows = read("damo/trials.csv")
    table = np.array(rows, dtype=float)
    X, tau = table[:, 2:14], (table[:, 1] + 1) / 4
    for what, keep in (("damo, last checkpoint", tau == 1), ("damo, all checkpoints", tau > 0)):
        yield (
            what,
            100.0,
            [
                left_out(
                    X[keep], table[keep, column], tau[keep] if what.endswith("points") else np.ones(keep.sum()), seed
                )
                for column in range(14, len(head))
                for seed in range(seeds)
            ],
        )


def admire(seeds: int) -> Iterator[tuple[str, float, list[list[tuple[np.ndarray, ...]]]]]:
    head, rows = read("admire/trials.csv")
    shares = [column for column, name in enumerate(head) if name.startswith("ratio")]
    scores = [column for column, name in enumerate(head) if name.startswith("metric")]
    for model in ("Qwen2.5-0.5B", "Qwen2.5-3B"):
        table = np.array([[row[c] for c in (*shares, *scores)] for row in rows if row[0] == model], dtype=float)
        X = table[:, : len(shares)] / table[:, : len(shares)].sum(axis=1, keepdims=True)
        yield (
            f"admire {model}",
            1.0,
            [
                left_out(X, table[:, len(shares) + j], np.ones(len(X)), seed)
                for j in range(len(scores))
                for seed in range(seeds)
            ],
        )


def right_or_wrong(loss: np.ndarray, centre: float, rows: int, rng: np.random.Generator) -> np.ndarray:
    """Scores [n] of rows that are right with probability sigmoid((c - loss) / sd), their mean `centre`."""
    turned = (loss.mean() - loss) / loss.std()
    shift = brentq(lambda c: float(expit(turned + c).mean()) - centre, -20, 20)
    return rng.binomial(rows, expit(turned + shift)) / rows


def regmix(seeds: int) -> Iterator[tuple[str, float, list[list[tuple[np.ndarray, ...]]]]]:
    mixtures = [np.array(read(f"regmix/{name}_mixture_1m.csv")[1], dtype=float)[:, 1:] for name in ("train", "test")]
    X, X_test = mixtures[0], mixtures[1][:128]
    head, rows = read("regmix/train_loss_1m.csv")
    head_test, rows_test = read("regmix/test_loss_1m_first128.csv")
    train, test = np.array(rows, dtype=float), np.array(rows_test, dtype=float)

    def cases(score: Callable[[np.ndarray, np.random.Generator], np.ndarray]) -> list[list[tuple[np.ndarray, ...]]]:
        out = []
        for name in (name for name in head_test if name not in ("index", "")):
            for seed in range(seeds):
                some = np.random.RandomState(100 + seed).permutation(len(X))[:64]
                both = np.r_[train[some, head.index(name)], test[:, head_test.index(name)]]
                y = score(both, np.random.default_rng(seed))
                out.append([(X[some], y[:64], np.ones(64), X_test, y[64:], np.ones(len(X_test)))])
        return out

    for centre in (0.5, 0.9, 0.98):
        yield (
            f"regmix, right or wrong, mean {centre}",
            1.0,
            cases(lambda loss, rng, c=centre: right_or_wrong(loss, c, 200, rng)),
        )
    yield "regmix, e^-loss", 1.0, cases(lambda loss, rng: np.exp(-loss))


def simulated(seeds: int) -> Iterator[tuple[str, float, list[list[tuple[np.ndarray, ...]]]]]:
    for centre in (0.5, 0.9, 0.98):
        cases = []
        for seed in range(10 * seeds):
            rng = np.random.default_rng(seed)
            X, best = rng.dirichlet(np.ones(5), 48 + 200), rng.dirichlet(np.ones(5))
            y = right_or_wrong(np.sum((np.sqrt(X) - np.sqrt(best)) ** 2, axis=1), centre, 50, rng)
            cases.append([(X[:48], y[:48], np.ones(48), X[48:], y[48:], np.ones(200))])
        yield f"simulated, mean {centre}", 1.0, cases


def loss_or_score(seeds: int) -> None:
    """Prints the part `loss`."""
    X, X_test = (np.array(read(f"regmix/{name}_mixture_1m.csv")[1], dtype=float)[:, 1:] for name in ("train", "test"))
    (head, rows), (head_test, rows_test) = read("regmix/train_loss_1m.csv"), read("regmix/test_loss_1m_first128.csv")
    train, test = np.array(rows, dtype=float), np.array(rows_test, dtype=float)
    print(f"{'mean score':<12}{'50 rows':>10}{'200':>10}{'1,000':>10}{'the loss':>10}")
    for centre in (0.5, 0.9, 0.98):
        each = []
        for name in (name for name in head_test if name not in ("index", "")):
            for seed in range(seeds):
                some, one = np.random.RandomState(100 + seed).permutation(len(X))[:64], np.ones(64)
                loss, true = (
                    train[some, head.index(name)],
                    -test[:, head_test.index(name)],
                )  # -loss: as the score
                rng, found = np.random.default_rng(seed), []
                for count in (50, 200, 1000):
                    fitted = fit(X[some], right_or_wrong(loss, centre, count, rng), one, 1.0, "auto", seed, "ridge")
                    found.append(spearman(fitted.model.mean(X_test[:128]), true))
                of_loss = fit(X[some], -loss, one, np.inf, "none", seed, "ridge")
                each.append([*found, spearman(of_loss.model.mean(X_test[:128]), true)])
        print(f"{centre:<12}" + "".join(f"{value:10.1f}" for value in np.mean(each, axis=0)), flush=True)


PARTS = {"damo": damo, "admire": admire, "regmix": regmix, "simulated": simulated}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=[*PARTS, "loss"], default=[*PARTS, "loss"])
    parser.add_argument("--seeds", type=int, default=2)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    started = time.process_time()
    if "loss" in options.part:
        loss_or_score(options.seeds)
    if options.part == ["loss"]:
        return
    print(f"{'':<38}" + "".join(f"{link:>32}" for link in (*LINKS, "auto")))
    for part in (part for part in options.part if part in PARTS):
        for what, high, cases in PARTS[part](options.seeds):
            each = [measured(folds, high) for folds in cases]
            cells = []
            for link in (*LINKS, "auto"):
                rho, r2, cover, width = np.mean([figures[link] for figures in each], axis=0)
                cells.append(f"{rho:.1f} / {r2:.3f} / {cover:.3f} / {width:.2f}")
            print(f"{what:<38}" + "".join(f"{cell:>32}" for cell in cells), flush=True)
    print(f"{time.process_time() - started:.0f} CPU seconds; each cell: rho / R2 / cover / width")


if __name__ == "__main__":
    main()
