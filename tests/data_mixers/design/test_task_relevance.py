"""The paper's example by hand; a planted sparse target is found under noise."""

import numpy as np
import pytest

from data_mixers import MixError
from data_mixers.design.task_relevance import relevance

W = [[1, 0, 1], [0, 1, 1]]


def test_golden():
    l1, l2 = relevance(W, [1, 1]), relevance(W, [1, 1], "l2")
    np.testing.assert_allclose(l1.nu, [0, 0, 1], atol=1e-9)
    np.testing.assert_allclose(l1.shares, [0, 0, 1], atol=1e-9)
    np.testing.assert_allclose(l2.nu, [1 / 3, 1 / 3, 2 / 3], atol=1e-9)
    np.testing.assert_allclose(l2.shares, [1 / 6, 1 / 6, 2 / 3], atol=1e-9)
    assert l1.rows(100, floor=5).tolist() == [5, 5, 100]


def test_a_planted_target_is_found_under_noise():
    rng = np.random.default_rng(0)
    sources = rng.standard_normal((400, 8))
    sources[:, 7] = 0
    target = 2 * sources[:, 1] - sources[:, 4] + 0.1 * rng.standard_normal(400)
    found = relevance(sources, target, noise=True)
    assert set(np.argsort(-found.shares)[:2]) == {1, 4}
    assert found.shares[[1, 4]].sum() > 0.9
    assert found.shares[7] == 0


@pytest.mark.parametrize(
    ("sources", "target", "says"),
    [
        (W, [0, 0], "zero"),
        (np.zeros((2, 3)), [1, 1], "zero"),
        ([[1.0], [0.0]], [1, 1], "noise=True"),
        (W, [1, 1, 1], "shape"),
    ],
)
def test_refusals(sources, target, says):
    with pytest.raises(MixError) as error:
        relevance(sources, target)
    assert says in str(error.value)
