"""Golden values, and the same numbers from TorchJD (0.18) and from what defines each method."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from scipy.optimize import LinearConstraint, minimize

from mtft.gradients.aggregators import AGGREGATORS, make_aggregator
from mtft.gradients.aggregators.sam_gs import similarity
from tests.properties.aggregators import jacobian
from tests.slow import slow

J2 = torch.tensor([[-4, 1, 1], [6, 1, 1]], dtype=torch.float64)
J3 = torch.tensor([[1, 2, 0], [-2, 1, 1], [0.5, -1, 2]], dtype=torch.float64)
# name: (alpha of J2, d of J2, alpha of J3), p = 1/K. Computed with TorchJD 0.18; MGDA exactly, by hand.
GOLDEN = {
    "upgrad": ([1.11092, 0.78943], [0.29290, 1.90035, 1.90035], [0.43330, 0.33333, 0.42854]),
    "dualproj": ([0.61092, 0.5], [0.55632, 1.11092, 1.11092], [1 / 3] * 3),
    "mgda": ([0.6, 0.4], [0, 1, 1], [0.391304, 0.231884, 0.376812]),
    "pcgrad": ([2.22222, 1.57895], [0.58480, 3.80117, 3.80117], [1.3, 1, 1.28571]),
    "imtl_g": ([0.59233, 0.40767], [0.07670, 1, 1], [0.38146, 0.24627, 0.37227]),
    "aligned_mtl": ([0.55907, 0.40826], [0.21328, 0.96733, 0.96733], [0.33680, 0.25891, 0.32957]),
    "cagrad": ([0.70412, 0.5], [0.18350, 1.20412, 1.20412], [0.56907, 0.33724, 0.54800]),
    "nash_mtl": ([0.59146, 0.40707], [0.07658, 0.99853, 0.99853], [0.53178, 0.40825, 0.51897]),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden(name):
    aggregator, (alpha2, d2, alpha3) = make_aggregator(name), GOLDEN[name]
    close = {"rtol": 0, "atol": 2e-5}
    found = aggregator.weights(J2 @ J2.T)
    torch.testing.assert_close(found, torch.tensor(alpha2, dtype=torch.float64), **close)
    torch.testing.assert_close(J2.T @ found, torch.tensor(d2, dtype=torch.float64), rtol=0, atol=6e-5)
    torch.testing.assert_close(aggregator.weights(J3 @ J3.T), torch.tensor(alpha3, dtype=torch.float64), **close)


def test_samgs_equalise():
    """Lengths 3, 1, .5: weights .5 1.5 3 (times p = 1/3). Psi, by hand: (6/10 + 3/9.25 + 1/1.25) / 3."""
    length = np.array([3, 1, 0.5])
    assert similarity(length) == pytest.approx((0.6 + 3 / 9.25 + 0.8) / 3)
    G = torch.diag(torch.tensor(length) ** 2)
    torch.testing.assert_close(3 * make_aggregator("sam_gs").weights(G), torch.tensor([0.5, 1.5, 3]).double())


# ---- TorchJD on the same Gram matrices. It drops what is shorter than 1e-4 of its units: matrices of length about 1.


def torchjd_weights(name: str, J: torch.Tensor) -> torch.Tensor:
    from torchjd import aggregation as jd

    G, K = J @ J.T, len(J)
    if name == "nash_mtl":
        return jd.NashMTL(K, max_norm=0, optim_niter=100).weighting(J)
    kinds = {
        "upgrad": lambda: jd.UPGradWeighting(),
        "dualproj": lambda: jd.DualProjWeighting(),
        "mgda": lambda: jd.MGDAWeighting(epsilon=1e-12, max_iters=20_000),
        "pcgrad": lambda: jd.PCGradWeighting(),
        "imtl_g": lambda: jd.IMTLGWeighting(),
        "aligned_mtl": lambda: jd.AlignedMTLWeighting(),
        "aligned_mtl, median": lambda: jd.AlignedMTLWeighting(scale_mode="median"),
        "aligned_mtl, rmse": lambda: jd.AlignedMTLWeighting(scale_mode="rmse"),
        "cagrad": lambda: jd.CAGradWeighting(c=0.5),
    }
    return kinds[name]()(G)


TOLERANCE = {"mgda": 2e-3, "nash_mtl": 2e-3, "cagrad": 1e-4}  # theirs: Frank-Wolfe; convex programs


@pytest.mark.parametrize(
    "name", ["upgrad", "dualproj", "imtl_g", "aligned_mtl", "aligned_mtl, median", "aligned_mtl, rmse", "cagrad",
             "nash_mtl", *slow("mgda")],
)  # fmt: skip
def test_equals_torchjd(name):
    method, _, scale = name.partition(", ")
    ours = make_aggregator(method, {"scale": scale} if scale else {})
    compared = 0
    for seed, (K, D, shift) in enumerate([(2, 5, -0.9), (3, 4, -0.5), (5, 20, -0.6), (7, 20, 0.5), (4, 9, -0.8)]):
        J = jacobian(K, D, 100 + seed, shift)
        J = J / J.norm(dim=1).max()
        theirs, alpha = torchjd_weights(name, J), ours.weights(J @ J.T)
        scale_of = theirs.abs().max()
        assert (alpha - theirs).abs().max() <= TOLERANCE.get(method, 1e-6) * scale_of, (seed, alpha, theirs)
        compared += int((alpha - alpha.mean()).abs().max() > 1e-3)
    assert compared >= 3  # not all of them trivial


def test_pcgrad_equals_torchjd_where_the_order_does_not_matter():
    for seed in range(5):
        J = jacobian(2, 5, seed, -0.9)
        ours, theirs = make_aggregator("pcgrad").weights(J @ J.T), torchjd_weights("pcgrad", J)
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    # For two tasks PCGrad is UPGrad with p = (1, 1).
    torch.testing.assert_close(
        make_aggregator("pcgrad").weights(J2 @ J2.T),
        2 * make_aggregator("upgrad").weights(J2 @ J2.T), rtol=0, atol=4e-4,
    )  # fmt: skip


# ---- the definitions themselves


def gram(seed: int, K: int = 6, D: int = 9, shift: float = -0.7) -> np.ndarray:
    J = jacobian(K, D, 200 + seed, shift)
    return (J @ J.T).numpy()


@pytest.mark.parametrize("seed", range(4))
def test_upgrad_is_k_bounded_quadratic_programs(seed):
    """By scipy's L-BFGS-B, which knows nothing of cones."""
    G = gram(seed)
    R, K = G / np.trace(G) + 1e-4 * np.eye(len(G)), len(G)
    total = np.zeros(K)
    for i in range(K):
        floor = np.eye(K)[i] / K
        done = minimize(
            lambda v: v @ R @ v, floor + 0.1, jac=lambda v: 2 * R @ v, method="L-BFGS-B",
            bounds=[(low, None) for low in floor], options={"ftol": 1e-16, "gtol": 1e-12, "maxiter": 10_000},
        )  # fmt: skip
        total += done.x
    found = make_aggregator("upgrad").weights(torch.from_numpy(G)).numpy()
    np.testing.assert_allclose(found, total, atol=5e-5 * total.max())


@pytest.mark.parametrize("seed", range(4))
def test_mgda_meets_its_optimality_conditions(seed):
    """a^T G a is least on the simplex: (G a)_k >= a^T G a for all k, equal where a_k > 0."""
    G = gram(seed, K=8, D=12)
    a = make_aggregator("mgda").weights(torch.from_numpy(G)).numpy()
    value, gain = a @ G @ a, G @ a
    assert a.min() >= 0
    assert a.sum() == pytest.approx(1)
    assert (gain >= value - 1e-9 * G.max()).all()
    assert np.abs((gain - value)[a > 1e-9]).max() <= 1e-9 * G.max()


@pytest.mark.parametrize("seed", range(4))
def test_cagrad_solves_its_dual(seed):
    """w = extra / sum(extra) is the argmin of w^T G p + c |g0| sqrt(w^T G w) (SLSQP finds nothing better), and
    |d - g0| = c |g0|."""
    G, c = gram(seed), 0.5
    K = len(G)
    p, extra = np.full(K, 1 / K), make_aggregator("cagrad", {"c": c}).weights(torch.from_numpy(G)).numpy() - 1 / K
    radius = c * np.sqrt(p @ G @ p)
    assert extra.min() >= -1e-12
    assert np.sqrt(extra @ G @ extra) == pytest.approx(radius, rel=1e-9)

    def value(w):
        return w @ G @ p + radius * np.sqrt(max(w @ G @ w, 0))

    w = extra / extra.sum()
    best = minimize(
        value, np.full(K, 1 / K), method="SLSQP", bounds=[(0, 1)] * K, options={"maxiter": 2000, "ftol": 1e-15},
        constraints=[LinearConstraint(np.ones(K), 1, 1)],
    )  # fmt: skip
    assert value(w) <= best.fun + 1e-7 * abs(best.fun)


@pytest.mark.parametrize("seed", range(4))
def test_nash_solves_its_equation(seed):
    """(G alpha)_k alpha_k = 1, and K p_k with a preference."""
    G = torch.from_numpy(gram(seed, D=20))
    alpha = make_aggregator("nash_mtl").weights(G)
    torch.testing.assert_close(G @ alpha * alpha, torch.ones(6, dtype=torch.float64), rtol=0, atol=1e-6)
    p = torch.tensor([1, 2, 3, 1, 1, 2], dtype=torch.float64)
    alpha = make_aggregator("nash_mtl").weights(G, p)
    torch.testing.assert_close(G @ alpha * alpha, 6 * p / p.sum(), rtol=0, atol=1e-6)


def test_imtl_g_projects_equally():
    G = torch.from_numpy(gram(1, D=20))
    share = G @ make_aggregator("imtl_g").weights(G) / G.diagonal().sqrt()
    torch.testing.assert_close(share, share.mean().expand(6))


def test_aligned_makes_gradients_orthogonal():
    """Per task: weights of p = e_k give the rows of the balanced Jacobian, orthogonal and of equal length."""
    J = jacobian(4, 9, 5, -0.5)
    value, vector = torch.linalg.eigh(J @ J.T)
    balanced = value[0].sqrt() * vector @ torch.diag(value**-0.5) @ vector.T @ J
    torch.testing.assert_close(balanced @ balanced.T, value[0] * torch.eye(4, dtype=torch.float64))
    torch.testing.assert_close(J.T @ make_aggregator("aligned_mtl").weights(J @ J.T), balanced.mean(dim=0))


@pytest.mark.parametrize("name", AGGREGATORS)
def test_fast_for_thirty_tasks(name):
    """Below 300 eigenvalue decompositions of the Gram matrix (Nash-MTL 1,500), with and without linear dependence.

    Measured: 60 (Nash-MTL 450) at the most.
    """

    def seconds(work):
        start = time.process_time()
        work()
        return time.process_time() - start

    aggregator = make_aggregator(name)
    for D in (200, 12):
        J = jacobian(30, D, 1, -0.5)
        G, taken, usual = J @ J.T, [], []
        for step in range(3):
            taken.append(seconds(lambda G=G, step=step: aggregator.weights(G, step=step)))
            usual.append(seconds(lambda G=G: [torch.linalg.eigh(G) for _ in range(100)]))
        assert min(taken) < (15 if name == "nash_mtl" else 3) * min(usual)
