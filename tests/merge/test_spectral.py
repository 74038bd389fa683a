"""Methods in core space: golden values, and the same formulas written down once more on full matrices."""

import numpy as np
import pytest

from mtft.adapters.lora_factors import LoraFactors, read_adapter
from mtft.common.errors import MergeError
from mtft.merge.engine.merge import merge_adapters
from mtft.merge.linalg.core_space import CholeskyBasis, ChunkedBasis, HouseholderBasis, orthonormal_basis, to_core
from mtft.merge.methods import METHODS, make_method
from mtft.merge.methods.lines import layer_factor, layer_of
from mtft.merge.methods.regmean import regmean_factors
from tests.merge import golden as g

GOLDEN = [
    ("tsv", {}, 3.107096239, 0.406298498),
    ("iso_c", {}, 2.595045126, 0.545778538),
    ("wudi", {"ridge": 0.0}, 6.676751975, 0.226044041),
    ("wudi", {}, 3.617104326, 0.321050504),
    ("svc", {}, 3.114240176, 0.818697570),
    ("svc", {"alpha": 1.0}, 1.354355831, 0.412168351),
    ("ctm", {"rank": 2}, 2.807452119, 0.301650742),
    ("knots_ties", {"density": 1.0}, 1.709870332, 0.264867086),
    ("knots_ties", {"density": 0.5}, 2.659386975, 0.320976096),
    ("knots_ties", {"density": 0.5, "pre_scale": False}, 2.831434898, 0.334642643),
]


@pytest.mark.parametrize(("name", "options", "norm", "entry"), GOLDEN)
def test_golden(name, options, norm, entry):
    X = g.full(make_method(name, options).merge(g.parts()))
    assert g.near(np.linalg.norm(X), norm)
    assert g.near(X[7, 4], entry)


def cut_svd(X, tolerance=1e-10):
    U, S, Vt = np.linalg.svd(X, full_matrices=False)
    r = int((tolerance * S[0] < S).sum())
    return U[:, :r], S[:r], Vt[:r]


def polar(X):
    U, _, Vt = cut_svd(X)
    return U @ Vt


def full_iso_c(D):
    U, S, Vt = cut_svd(sum(D))
    return S.mean() * U @ Vt


def full_iso_cts(D):
    U, S, Vt = cut_svd(sum(D))
    t = round((len(S) - int(0.8 * len(S))) / len(D))
    c = len(S) - len(D) * t
    outside = np.eye(len(U)) - U[:, :c] @ U[:, :c].T
    own = [cut_svd(outside @ X) for X in D]
    strength = np.concatenate([S[:c], *(s[:t] for _, s, _ in own)]).mean()
    left, right = (
        np.hstack([U[:, :c], *(u[:, :t] for u, _, _ in own)]),
        np.hstack([Vt[:c].T, *(v[:t].T for _, _, v in own)]),
    )
    return strength * polar(left) @ polar(right).T


def full_wudi(D):
    G = sum(X.T @ X / np.sum(X**2) for X in D)
    C = sum(X @ X.T @ X / np.sum(X**2) for X in D)
    q = 0.1 * len(D) / np.linalg.matrix_rank(G)
    return (C + q * sum(D)) @ np.linalg.inv(G + q * np.eye(len(G)))


def full_svc(D):
    U, S, Vt = cut_svd(sum(D))
    for i in range(len(S)):
        u = U[:, i]
        S[i] *= len(D) / sum(max(0.1, (u @ sum(D)) @ (u @ X) / np.sum((u @ X) ** 2)) for X in D)
    return U @ np.diag(S) @ Vt


@pytest.mark.parametrize("oracle", [full_iso_c, full_iso_cts, full_wudi, full_svc])
@pytest.mark.parametrize("case", ["golden", "random"])
def test_core_equals_full_space(oracle, case):
    factors = g.factors()
    if case == "random":
        rng = np.random.default_rng(0)
        factors = [LoraFactors(rng.normal(size=(6, 80)), rng.normal(size=(96, 6)), 1.0) for _ in range(4)]
    X = g.full(
        METHODS[oracle.__name__[5:]]().merge(g.parts([1.0] * len(factors), factors, names="abcd"[: len(factors)]))
    )
    expected = oracle([g.delta(f) for f in factors])
    assert np.linalg.norm(X - expected) <= 1e-10 * np.linalg.norm(expected)


def test_wudi_without_ridge_has_no_interference():
    from mtft.merge.engine.interference import interference

    rng = np.random.default_rng(0)
    factors = [LoraFactors(rng.normal(size=(6, 80)), rng.normal(size=(96, 6)), 1.0) for _ in range(4)]
    core = to_core(factors, np.ones(4))
    assert interference(core, make_method("wudi", {"ridge": 0.0}).rule(core)).max() < 1e-12


def test_orthogonal_tasks_give_the_sum():
    eye = np.eye(10)
    tasks = [LoraFactors(eye[2 * k : 2 * k + 2], np.eye(12)[:, 2 * k : 2 * k + 2] * [3, 1], 1.0) for k in range(3)]
    for name in ("tsv", "wudi"):
        X = g.full(METHODS[name]().merge(g.parts(of=tasks)))
        np.testing.assert_allclose(X, sum(g.delta(f) for f in tasks), atol=1e-12)


def test_small_and_large_inputs_cut_the_same_triples():
    """The authors' KnOTS cuts singular values at an absolute 1e-5: LoRA deltas of 1e-5 would vanish."""
    small = [LoraFactors(f.A_RN, f.B_MR, 1e-7 * f.scale) for f in g.factors()]
    X = g.full(make_method("knots_ties", {"density": 0.5}).merge(g.parts(of=small)))
    assert g.near(1e7 * np.linalg.norm(X), 2.659386975, 1e-8)


def test_more_rank_than_the_matrix_has():
    """R > min(m, n): the cores shrink."""
    rng = np.random.default_rng(0)
    factors = [LoraFactors(rng.normal(size=(6, 5)), rng.normal(size=(7, 6)), 1.0) for _ in range(3)]
    core = to_core(factors, np.ones(3))
    assert core.cores[0].shape == (7, 5)
    X = g.full(METHODS["linear"]().merge(g.parts(of=factors)))
    np.testing.assert_allclose(X, sum(g.delta(f) for f in factors), atol=1e-12)


@pytest.mark.parametrize("shape", [(40, 6), (6, 40), (6, 6)])
def test_householder_is_an_orthonormal_factorisation(shape):
    X = np.random.default_rng(0).normal(size=shape)
    X[:, 1] = X[:, 0]  # rank deficient
    basis = HouseholderBasis(X)
    Q = basis.apply(np.eye(basis.dim))
    np.testing.assert_allclose(Q.T @ Q, np.eye(basis.dim), atol=1e-12)
    np.testing.assert_allclose(Q @ basis.R, X, atol=1e-12)


def test_float32_stacks_go_by_their_gram_matrix_unless_they_are_close_to_deficient():
    rng = np.random.default_rng(0)
    X = rng.normal(size=(400, 24)).astype(np.float32)
    basis = orthonormal_basis(X)
    assert isinstance(basis, CholeskyBasis)
    Q = basis.apply(np.eye(24, dtype=np.float32))
    np.testing.assert_allclose(Q.T @ Q, np.eye(24), atol=5e-6)
    np.testing.assert_allclose(Q @ basis.R, X, atol=5e-6)
    near, duplicate, zero = X.copy(), X.copy(), X.copy()
    near[:, 1] = X[:, 0] + 1e-6 * X[:, 1]
    duplicate[:, 1] = X[:, 0]
    zero[:, 1] = 0
    for bad in (near, duplicate, zero):
        basis = orthonormal_basis(bad)
        assert isinstance(basis, HouseholderBasis)
        Q = basis.apply(np.eye(24, dtype=np.float32))
        np.testing.assert_allclose(Q.T @ Q, np.eye(24), atol=5e-6)
    assert isinstance(orthonormal_basis(X.astype(np.float64)), HouseholderBasis)


def test_spectra_of_the_adapters_through_their_factors():
    core = g.core(g.W)
    for k, M in enumerate(core.cores):
        U, S, Vt = core.spectrum(k)
        np.testing.assert_allclose((U * S) @ Vt, M, atol=1e-13)
        np.testing.assert_allclose(S, np.linalg.svd(M, compute_uv=False)[: len(S)], rtol=1e-12)
        np.testing.assert_allclose(U.T @ U, np.eye(len(S)), atol=1e-12)


def test_tall_stacks_are_factored_in_chunks():
    X = np.random.default_rng(0).normal(size=(40000, 5))
    basis = orthonormal_basis(X)
    assert isinstance(basis, ChunkedBasis)
    np.testing.assert_allclose(basis.apply(basis.R), X, atol=1e-10)
    Q = basis.apply(np.eye(5))
    np.testing.assert_allclose(Q.T @ Q, np.eye(5), atol=1e-12)


def test_lines_by_hand():
    assert [layer_factor(layer, 4, 0.25, 0.75) for layer in range(4)] == [0.25, 0.5, 0.75, 1]
    assert layer_factor(None, 4, 0.25, 0.75) == layer_factor(0, 1, 0.25, 0.75) == 0.25
    assert layer_of("model.layers.12.self_attn.q_proj") == 12
    assert layer_of("transformer.h.3.attn.c_attn") == 3
    assert layer_of("lm_head") is None


@pytest.mark.parametrize("norm", ["frobenius", "l1"])
def test_lines_on_files(tmp_path, norm):
    one, two, three = g.factors()
    names = [f"layers.{i}.q" for i in range(3)] + ["lm_head"]
    paths = [g.write(tmp_path / n, dict.fromkeys(names, f)) for n, f in zip(g.NAMES, (one, two, three))]
    total = sum(g.delta(f) for f in (one, two, three))
    merge_adapters(paths, tmp_path / "linear", method="lines")
    out = read_adapter(tmp_path / "linear")
    for name, factor in zip(names, (1 / 3, 2 / 3, 1, 1 / 3)):
        np.testing.assert_allclose(g.delta(out.factors(name)), factor * total, atol=1e-6)
    merge_adapters(paths, tmp_path / "tsv", method="lines", options={"of": "tsv", "norm": norm, "beta": 0.0})
    tsv = g.full(METHODS["tsv"]().merge(g.parts()))
    size = np.linalg.norm if norm == "frobenius" else lambda x: np.abs(x).sum()
    got = g.delta(read_adapter(tmp_path / "tsv").factors("lm_head"))
    np.testing.assert_allclose(got, size(total) / size(tsv) / 3 * tsv, atol=1e-6)


def test_delta_norm_weights_add_up_to_one():
    core = g.core()
    norms = np.array([1.180903979, 2.834143230, 0.476597297])
    np.testing.assert_allclose(METHODS["delta_norm"]().weights(core), norms / norms.sum(), atol=1e-9)
    np.testing.assert_allclose(make_method("delta_norm", {"power": 0.0}).weights(core), np.full(3, 1 / 3))


def grams():
    bits = np.random.Philox(key=11)
    return [X.T @ X / 40 for X in (g.draw(bits, 40, g.N) for _ in range(3))]


def test_regmean_golden():
    changed = regmean_factors(g.factors(), grams(), 0.6, 0.0)
    X = sum(g.delta(f) for f in changed)
    assert g.near(np.linalg.norm(X), 1.104290252)
    assert g.near(X[7, 4], 0.180139019)


def test_regmean_of_whole_weights_is_the_base_plus_that_of_the_deltas():
    """The base weight cancels, so the base model is not needed."""
    W0 = np.random.default_rng(0).normal(size=(g.M, g.N))
    G = grams()
    whole = sum((W0 + g.delta(f)) @ H for f, H in zip(g.factors(), G)) @ np.linalg.inv(sum(G))
    ours = sum(g.delta(f) for f in regmean_factors(g.factors(), G, 1.0, 0.0))
    np.testing.assert_allclose(W0 + ours, whole, atol=1e-10)


def test_regmean_from_files(tmp_path):
    from safetensors.numpy import save_file

    paths = g.write_golden(tmp_path / "in")
    for name, G in zip(g.NAMES, grams()):
        save_file({"layers.0.q": G}, tmp_path / f"{name}.safetensors")
    options = {"grams": str(tmp_path), "rho": 0.6, "ridge": 0.0}
    report = merge_adapters(paths, tmp_path / "out", method="regmean", options=options)
    assert g.near(report.modules["layers.0.q"]["norm"], 1.104290252, 1e-6)
    for mistake, text in (({}, "Gram"), ({"grams": str(tmp_path / "in")}, "no Gram matrices")):
        with pytest.raises(MergeError, match=text):
            merge_adapters(paths, tmp_path / "out2", method="regmean", options=mistake)


def test_mistakes_in_options():
    for name, options in (
        ("svc", {"alpha": 0.0}),
        ("svc", {"of": "ties"}),
        ("ctm", {"rank": 0}),
        ("wudi", {"ridge": -1.0}),
        ("lines", {"norm": "l3"}),
        ("lines", {"alpha": "x"}),
        ("iso_cts", {"common": 1.5}),
        ("delta_norm", {"power": -1.0}),
        ("regmean", {"rho": 2.0}),
        ("knots_ties", {"density": 0.0}),
    ):
        with pytest.raises(MergeError) as caught:
            make_method(name, options)
        assert caught.value.do
