"""TIES and DARE on cores: in a common basis they are the rule itself; nothing dropped is the plain sum."""

import numpy as np
import pytest

from mtft.adapters.lora_factors import LoraFactors
from mtft.merge.methods import make_method
from tests.merge import golden as g


def test_on_one_common_basis_it_is_ties_of_the_coordinates():
    """D_k = P C_k Q^T with diagonal C_k: the stacks' singular vectors are P and Q, and the cores the C_k."""
    rng = np.random.default_rng(0)
    P, _ = np.linalg.qr(rng.normal(size=(g.M, 4)))
    Q, _ = np.linalg.qr(rng.normal(size=(g.N, 4)))
    C = np.array([[9.0, 4.0, -1.0, 0.3], [6.0, -3.0, -2.0, 0.1]])
    made = [LoraFactors((np.sqrt(np.abs(c)) * Q).T, P * (np.sign(c) * np.sqrt(np.abs(c))), 1.0) for c in C]
    # By hand, 3 of 16 entries kept: 9, 4, -1 and 6, -3, -2; elected +, +, -: means 7.5, 4, -1.5.
    X = g.full(make_method("core_ties", {"density": 0.2}).merge(g.parts([1, 1], made, names="ab")))
    np.testing.assert_allclose(X, P @ np.diag([7.5, 4.0, -1.5, 0.0]) @ Q.T, atol=1e-12)


@pytest.mark.parametrize("options", [{"density": 1.0}, {"density": 1.0, "then": "linear"}])
def test_dare_that_drops_nothing_is_the_sum(options):
    X = g.full(make_method("core_dare", options).merge(g.parts(g.W)))
    np.testing.assert_allclose(X, sum(w * g.delta(f) for w, f in zip(g.W, g.factors())), atol=1e-12)


def test_dare_keeps_the_mean():
    method = make_method("core_dare", {"density": 0.5})
    draws = np.stack([g.full(method.merge(g.parts(seed=seed))) for seed in range(400)])
    D = sum(g.delta(f) for f in g.factors())
    assert np.linalg.norm(draws.mean(axis=0) - D) < 0.12 * np.linalg.norm(D)
    assert np.linalg.norm(draws[0] - D) > 0.3 * np.linalg.norm(D)
