"""TSV: golden value, the full-space formula, and what duplicates must not do."""

import numpy as np

from mtft.adapters.lora_factors import LoraFactors
from mtft.merge.methods import METHODS
from tests.merge import golden as g


def test_golden():
    X = g.full(METHODS["tsv"]().merge(g.parts()))
    assert g.near(np.linalg.norm(X), 3.107096239)
    assert g.near(X[7, 4], 0.406298498)


def test_equals_full_space():
    triples = []
    for f in g.factors():
        U, S, Vt = np.linalg.svd(g.delta(f), full_matrices=False)
        triples.append((U[:, : f.rank], S[: f.rank], Vt[: f.rank]))

    def polar(X):
        U, _, Vt = np.linalg.svd(X, full_matrices=False)
        return U @ Vt

    U, V = polar(np.hstack([t[0] for t in triples])), polar(np.hstack([t[2].T for t in triples]))
    expected = U @ np.diag(np.concatenate([t[1] for t in triples])) @ V.T
    np.testing.assert_allclose(g.full(METHODS["tsv"]().merge(g.parts())), expected, atol=1e-12)


def test_orthogonal_tasks_give_the_sum():
    eye = np.eye(10)
    tasks = [LoraFactors(eye[2 * k : 2 * k + 2], np.eye(12)[:, 2 * k : 2 * k + 2] * [3, 1], 1.0) for k in range(3)]
    X = g.full(METHODS["tsv"]().merge(g.parts(of=tasks)))
    np.testing.assert_allclose(X, sum(g.delta(f) for f in tasks), atol=1e-12)
