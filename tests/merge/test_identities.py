"""Core space against the same formulas on full matrices, for every method that lives there, on four sets of adapters.

The oracles below build D_k and nothing else of ours: no core, no factors. Bar: 1e-10 relative in float64.
"""

import numpy as np
import pytest

from mtft.adapters.lora_factors import LoraFactors, read_adapter
from mtft.merge.engine.merge import merge_adapters
from mtft.merge.methods import make_method
from mtft.merge.methods.regmean import regmean_factors
from tests.merge import golden as g
from tests.merge.test_spectral import cut_svd, full_iso_c, full_iso_cts, full_svc, full_wudi, polar


def gaussian(K=4, m=96, n=80, r=6, seed=0):
    rng = np.random.default_rng(seed)
    return [LoraFactors(rng.normal(size=(r, n)), rng.normal(size=(m, r)), 1.0) for _ in range(K)]


SETS = {
    "golden": g.factors,
    "gaussian": gaussian,
    "a duplicate": lambda: [*gaussian(3), gaussian(3)[0]],
    "more rank than the matrix has": lambda: gaussian(4, 14, 12, 6, seed=1),
}


def full_tsv(D):
    triples = [cut_svd(X) for X in D]
    S = np.concatenate([s for _, s, _ in triples])
    return polar(np.hstack([u for u, _, _ in triples])) @ np.diag(S) @ polar(np.hstack([v.T for _, _, v in triples])).T


def full_sum(D):
    return sum(D)


def full_delta_norm(D):
    norms = np.array([np.linalg.norm(X) for X in D])
    return sum(w * X for w, X in zip(norms / norms.sum(), D))


def ties(parts, density):
    """Trim, elect, mean: on a list of arrays."""
    kept = []
    for x in parts:
        least = np.sort(np.abs(x), axis=None)[-int(density * x.size)]
        kept.append(np.where(np.abs(x) >= least, x, 0))
    sign = np.sign(sum(kept))
    agree = [np.where(np.sign(x) == sign, x, 0) for x in kept]
    count = sum((x != 0).astype(int) for x in agree)
    return sum(agree) / np.maximum(count, 1)


def full_knots_ties(D):
    U, S, Vt = cut_svd(np.hstack(D), 1e-5)
    return U @ ties([np.diag(S) @ part for part in np.split(Vt, len(D), axis=1)], 0.5)


def full_core_ties(D):
    """The bases from the deltas alone: left singular vectors of the stacks [U_k sqrt(S_k)] and [V_k sqrt(S_k)]."""
    triples = [cut_svd(X) for X in D]

    def basis(stack):
        P = cut_svd(stack)[0]
        return P * np.sign(P[np.abs(P).argmax(axis=0), np.arange(P.shape[1])])

    P = basis(np.hstack([u * np.sqrt(s) for u, s, _ in triples]))
    Q = basis(np.hstack([v.T * np.sqrt(s) for _, s, v in triples]))
    return P @ ties([P.T @ X @ Q for X in D], 0.5) @ Q.T


def full_ctm(D):
    """Higher-order orthogonal iteration on the full matrices."""

    def leading(X):
        return np.linalg.svd(X, full_matrices=False)[0][:, :5]

    V = leading(np.hstack([X.T for X in D]))
    for _ in range(50):
        before = V
        U = leading(np.hstack([X @ V for X in D]))
        V = leading(np.hstack([X.T @ U for X in D]))
        if np.linalg.norm(V - before @ (before.T @ V)) < 1e-11:
            break
    return U @ (U.T @ sum(D) @ V) @ V.T


ORACLES = {
    "linear": (full_sum, {}),
    "tsv": (full_tsv, {}),
    "iso_c": (full_iso_c, {}),
    "iso_cts": (full_iso_cts, {}),
    "wudi": (full_wudi, {}),
    "svc": (full_svc, {}),
    "delta_norm": (full_delta_norm, {}),
    "knots_ties": (full_knots_ties, {"density": 0.5}),
    "core_ties": (full_core_ties, {"density": 0.5}),
    "ctm": (full_ctm, {"rank": 5}),
}


@pytest.mark.parametrize("case", SETS)
@pytest.mark.parametrize("name", ORACLES)
def test_core_equals_full_space(name, case):
    oracle, options = ORACLES[name]
    factors = SETS[case]()
    X = g.full(make_method(name, options).merge(g.parts([1.0] * len(factors), factors, names="abcd"[: len(factors)])))
    expected = oracle([g.delta(f) for f in factors])
    assert np.linalg.norm(X - expected) <= 1e-10 * np.linalg.norm(expected)


@pytest.mark.parametrize("case", SETS)
def test_svd_is_the_best_of_its_rank(case):
    factors = SETS[case]()
    core = g.core([1.0] * len(factors), factors)
    from mtft.merge.linalg.core_space import balanced_factors, svd

    spectrum = svd(core.sum())
    U, S, Vt = np.linalg.svd(sum(g.delta(f) for f in factors), full_matrices=False)
    k = min(5, len(spectrum.S))
    B, A = balanced_factors(spectrum.cut(k), core.rows, core.cols)
    np.testing.assert_allclose(spectrum.S[:k], S[:k], rtol=1e-10)
    best = (U[:, :k] * S[:k]) @ Vt[:k]
    assert np.linalg.norm(B @ A - best) <= 1e-10 * np.linalg.norm(best)
    np.testing.assert_allclose(np.linalg.norm(B, axis=0), np.linalg.norm(A, axis=1))  # split evenly


@pytest.mark.parametrize("case", SETS)
def test_regmean_in_factors_is_regmean_of_deltas(case):
    factors = SETS[case]()
    rng = np.random.default_rng(3)
    n = factors[0].A_RN.shape[1]
    grams = [(X := rng.normal(size=(3 * n, n))).T @ X / (3 * n) for _ in factors]
    shrunk = [0.9 * G + 0.1 * np.diag(np.diag(G)) for G in grams]
    expected = sum(g.delta(f) @ G for f, G in zip(factors, shrunk)) @ np.linalg.inv(sum(shrunk))
    X = sum(g.delta(f) for f in regmean_factors(factors, grams, 0.9, 0.0))
    assert np.linalg.norm(X - expected) <= 1e-10 * np.linalg.norm(expected)


def test_fp32_sum_is_fp64_to_1e_6():
    factors = gaussian()
    expected = sum(g.delta(f) for f in factors)
    X = g.full(make_method("linear").merge(g.parts(np.ones(4), factors, names="abcd", dtype=np.float32)))
    assert np.linalg.norm(X - expected) <= 1e-6 * np.linalg.norm(expected)


@pytest.mark.parametrize("name", ["linear", "tsv", "wudi", "iso_c", "svc"])
def test_gauge_and_permutation_in_fp32(name):
    """1e-6 in float32, on the golden adapters."""

    def merged(factors, names=g.NAMES):
        return g.full(make_method(name).merge(g.parts([1.0] * 3, factors, names=names, dtype=np.float32)))

    plain = merged(g.factors())
    rng = np.random.default_rng(0)
    turned = []
    for f in g.factors():
        Q, _ = np.linalg.qr(rng.normal(size=(f.rank, f.rank)))
        turned.append(LoraFactors(Q.T @ f.A_RN, f.B_MR @ Q, f.scale))
    for other in (merged(turned), merged(g.factors()[::-1], g.NAMES[::-1])):
        assert np.linalg.norm(other - plain) <= 1e-6 * np.linalg.norm(plain)


@pytest.mark.parametrize("config", ["plain", "rslora", "patterns", "bias"])
def test_single_adapter_at_weight_one_is_itself(tmp_path, config):
    """<= 1e-6 through the files, for each way in which a LoRA says its scale."""
    rng = np.random.default_rng(0)
    make = lambda r, bias: LoraFactors(rng.normal(size=(r, 9)), rng.normal(size=(7, r)), 1.0, bias)  # noqa: E731
    ranks = (4, 2) if config == "patterns" else (4, 4)
    bias = rng.normal(size=7) if config == "bias" else None
    modules = {f"layers.{i}.q": make(r, bias) for i, r in enumerate(ranks)}
    more = {
        "plain": {"lora_alpha": 7},
        "rslora": {"use_rslora": True, "lora_alpha": 7},
        "patterns": {"use_rslora": True, "alpha_pattern": {r"layers\.1\.q": 9}, "lora_alpha": 3},
        "bias": {"lora_bias": True, "lora_alpha": 3},
    }
    source = g.write(tmp_path / "in", modules, **more[config])
    merge_adapters([source], tmp_path / "out", rank="lossless")
    before, after = read_adapter(source), read_adapter(tmp_path / "out")
    for name in modules:
        a, b = before.factors(name), after.factors(name)
        assert np.linalg.norm(g.delta(b) - g.delta(a)) <= 1e-6 * np.linalg.norm(g.delta(a))
        if bias is not None:
            np.testing.assert_allclose(b.scale * b.bias_M, a.scale * a.bias_M, rtol=1e-6)


def test_orthoreg_golden():
    """The training penalty on 2 B_2 A_2 from the small products: ||D^T D - I||^2, and its off-diagonal part."""
    import torch

    from mtft.losses.orthogonality_penalty import orthogonality

    A, B = (torch.tensor(x) for x in (g.factors()[1].A_RN, g.factors()[1].B_MR))
    assert g.near(float(orthogonality(A, B, 2.0, "full")), 24.549895367)
    assert g.near(float(orthogonality(A, B, 2.0)), 22.871219510)
