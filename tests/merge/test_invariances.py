"""What holds for every method that is exact on deltas: it sees D_k only, in any order, at any scale, padded or not."""

import numpy as np
import pytest

from mtft.adapters.lora_factors import LoraFactors
from mtft.merge.methods import METHODS, make_method
from tests.merge import golden as g

EXACT = {
    "linear": {},
    "tsv": {},
    "iso_c": {},
    "iso_cts": {},
    "knots_ties": {"density": 0.5},
    "knots_dare": {},
    "core_ties": {"density": 0.5},
    "core_dare": {},
    "wudi": {},
    "svc": {},
    "ctm": {"rank": 3},
    "delta_norm": {},
    "lines": {"alpha": 0.7},
}
DENSE = {
    "ties": {"density": 0.5},
    "dare": {},
    "della": {},
    "breadcrumbs": {},
    "sce": {"density": 0.5},
    "pcb": {},
    "consensus": {},
    "doge": {"steps": 20},
}
ALL = EXACT | DENSE
FULL = {"density": 1.0}
UNCHANGED = {
    "linear": {},
    "tsv": {},
    "wudi": {},
    "svc": {},
    "ctm": {"rank": 3},
    "delta_norm": {},
    "ties": FULL,
    "sce": FULL,
    "core_ties": FULL,
    "core_dare": FULL,
}
"""One adapter alone comes out as it went in."""
IDEMPOTENT = {
    "tsv": {},
    "wudi": {"ridge": 0.0},
    "svc": {},
    "delta_norm": {},
    "ties": FULL,
    "sce": FULL,
    "core_ties": FULL,
}
"""K equal adapters come out as one of them (wudi's ridge pulls towards their sum)."""


def result(name, factors, options=None, **labels):
    method = make_method(name, ALL[name] if options is None else options)
    parts = g.parts([1.0] * len(factors), factors, **{"names": g.NAMES[: len(factors)], **labels})
    return g.full(method.merge(parts, method.survey(lambda: iter([parts]))))


def close(a, b, tolerance=1e-10):
    assert np.abs(a - b).max() <= tolerance * max(1e-300, np.abs(b).max())


@pytest.mark.parametrize("name", ALL)
def test_gauge(name):
    """(B G, G^-1 A) is the same adapter."""
    rng = np.random.default_rng(0)
    turned = []
    for f in g.factors():
        G = rng.normal(size=(f.rank, f.rank)) + 3 * np.eye(f.rank)
        turned.append(LoraFactors(np.linalg.solve(G, f.A_RN), f.B_MR @ G, f.scale))
    close(result(name, turned), result(name, g.factors()))


@pytest.mark.parametrize("name", ALL)
def test_permutation(name):
    order = [2, 0, 1]
    names = [g.NAMES[k] for k in order]
    close(result(name, [g.factors()[k] for k in order], names=names), result(name, g.factors()))


@pytest.mark.parametrize("name", ALL)
def test_padding(name):
    """Zero rows and columns, and junk rows of A under zero columns of B, change nothing."""
    padded = []
    for f in g.factors():
        A = np.vstack([f.A_RN, np.zeros((1, g.N)), np.full((1, g.N), 7.0)])
        padded.append(LoraFactors(A, np.hstack([f.B_MR, np.zeros((g.M, 2))]), f.scale))
    close(result(name, padded), result(name, g.factors()))


@pytest.mark.parametrize("name", [name for name in ALL if name not in ("pcb", "doge")])
def test_scaling(name):
    for c in (1e-4, 1e4):
        scaled = [LoraFactors(f.A_RN, f.B_MR, c * f.scale) for f in g.factors()]
        close(result(name, scaled), c * result(name, g.factors()))


@pytest.mark.parametrize("name", UNCHANGED)
def test_one_adapter_is_itself(name):
    two = g.factors()[1]
    close(result(name, [two], UNCHANGED[name]), g.delta(two))


@pytest.mark.parametrize("name", IDEMPOTENT)
def test_equal_adapters_are_one(name):
    two = g.factors()[1]
    close(result(name, [two] * 3, IDEMPOTENT[name]), g.delta(two), 1e-8)


@pytest.mark.parametrize("name", EXACT)
def test_fp32_is_close_to_fp64(name):
    close(result(name, g.factors(), dtype=np.float32), result(name, g.factors()), 2e-5)


@pytest.mark.parametrize("name", EXACT)
def test_a_duplicate_changes_no_basis(name):
    """Rank-deficient stacks: core space still gives what a rotated copy of the problem gives."""
    Q, _ = np.linalg.qr(np.random.default_rng(1).normal(size=(g.M, g.M)))
    one, two, _ = g.factors()
    turned = [LoraFactors(f.A_RN, Q @ f.B_MR, f.scale) for f in (one, two, one)]
    close(result(name, turned), Q @ result(name, [one, two, one]), 1e-8)


@pytest.mark.parametrize("name", [name for name in ALL if name != "lines"])
def test_weight_zero_is_absence(name, tmp_path):
    modules = [{"q": f} for f in g.factors()]
    paths = [g.write(tmp_path / n, m) for n, m in zip(g.NAMES, modules)]
    method = {"method": name, "options": ALL[name]}
    B, A, _ = g.merge_delta(paths, "q", weights=[1, 0, 2], **method)
    D, C, _ = g.merge_delta([paths[0], paths[2]], "q", weights=[1, 2], **method)
    np.testing.assert_array_equal(B @ A, D @ C)


def test_every_method_is_covered():
    elsewhere = {"cat", "svd", "regmean", "robustmerge"}  # linear under other rank policies; have their own tests
    assert METHODS.keys() == ALL.keys() | elsewhere
