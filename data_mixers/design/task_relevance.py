"""Which source tasks matter for a target: A-MTRL by Lasso (Wang et al., ICML 2023, arXiv 2306.02556).

    nu1 = argmin |nu|_1  s.t.  W nu = w          W [D, M]: one column per source task (its head, or a sketch of its
    nu2 = argmin |nu|_2  s.t.  W nu = w          gradient or adapter); w [D]: the target's

With noise: min 1/2 |W nu - w|^2 + lambda |nu|_1, lambda by cross-validation over rows. Rows to draw from task m:
max(n_floor, N |nu_m| / |nu|_1) for nu1; in proportion to nu_m^2 for the earlier rule nu2. Using gradient sketches of a
language model as W is our use, not the paper's: advice beside the trials' answer, not a replacement.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import linprog

from data_mixers.common.errors import MixError, optional_package
from data_mixers.mixture.mixture import Floats


@dataclass(frozen=True)
class Relevance:
    """nu [M], shares [M] (how much of each source), and the relative residual |W nu - w| / |w|."""

    nu: Floats
    shares: Floats
    residual: float

    def rows(self, total: int, floor: int = 0) -> NDArray[np.int64]:
        """Rows to draw from each source [M]: max(floor, total * share); relevance 0 and floor 0 = none."""
        return np.maximum(floor, np.round(total * self.shares)).astype(np.int64)


def relevance(
    W: ArrayLike,
    target: ArrayLike,
    method: Literal["l1", "l2"] = "l1",
    *,
    noise: bool = False,
    positive: bool = False,
    seed: int = 0,
) -> Relevance:
    """Relevance of M source tasks (columns of W [D, M]) for a target w [D].

    method "l1": shares ~ |nu|; "l2": shares ~ nu^2. noise: Lasso, lambda by 5-fold CV over rows, instead of W nu = w
    (which must then have a solution: else MixError); positive: with weights >= 0, for sketches of gradients, whose rows
    can't be drawn negatively. A zero column has relevance 0.
    """
    W, w = np.asarray(W, dtype=np.float64), np.asarray(target, dtype=np.float64)
    if W.ndim != 2 or w.shape != (W.shape[0],) or not np.all(np.isfinite(W)) or not np.all(np.isfinite(w)):
        raise MixError(f"sources of shape {W.shape}, target of shape {w.shape}", do="finite W [D, M] and w [D]")
    if not np.any(w) or np.linalg.matrix_rank(W) == 0:
        raise MixError("the target or all sources are zero: there is nothing to compare")
    if noise:
        nu = _lasso(W, w, seed, positive)
    elif method == "l2":
        nu = np.linalg.pinv(W) @ w
    else:
        nu = _basis_pursuit(W, w)
    residual = float(np.linalg.norm(W @ nu - w) / np.linalg.norm(w))
    if not noise and residual > 1e-6:
        raise MixError(f"no combination of the sources gives the target (residual {residual:.2g})", do="use noise=True")
    size = nu**2 if method == "l2" and not noise else np.abs(nu)
    if size.sum() == 0:
        raise MixError("no source is relevant at the chosen penalty", do="more rows, or another sketch")
    return Relevance(nu, size / size.sum(), residual)


def _basis_pursuit(W: Floats, w: Floats) -> Floats:
    """min |nu|_1 s.t. W nu = w, as the LP over nu = a - b, a, b >= 0."""
    M = W.shape[1]
    solved = linprog(np.ones(2 * M), A_eq=np.hstack([W, -W]), b_eq=w, bounds=[(0, None)] * (2 * M))
    if solved.status == 2:
        raise MixError("no combination of the sources gives the target", do="use noise=True")
    if not solved.success:
        raise ArithmeticError(f"basis pursuit: {solved.message}")
    return solved.x[:M] - solved.x[M:]


def _lasso(W: Floats, w: Floats, seed: int, positive: bool) -> Floats:
    linear_model, selection = (
        optional_package(f"sklearn.{part}", "scikit-learn", where="relevance(noise=True)", install="scikit-learn")
        for part in ("linear_model", "model_selection")
    )
    folds = selection.KFold(min(5, len(w)), shuffle=True, random_state=seed)
    return linear_model.LassoCV(cv=folds, fit_intercept=False, max_iter=50_000, positive=positive).fit(W, w).coef_
