"""Golden value of the spec; 1,000 random problems: feasible to 1e-9, nearest by KKT, or the clash is named."""

import numpy as np
import pytest

from data_mixers import Bounds, Group, Infeasible, MixError, Mixture
from tests.slow import slow

NAMES = tuple("abcdefgh")


def test_golden():
    p = Mixture.of({"a": 0.5, "b": 0.3, "c": 0.2})
    np.testing.assert_allclose(Bounds(caps={"a": 0.4}).project(p), [0.4, 0.36, 0.24], atol=1e-12)
    np.testing.assert_allclose(Bounds(caps={"a": 0.4}).project(p, metric="l2"), [0.4, 0.35, 0.25], atol=1e-12)


def random_problem(rng, groups):
    K = int(rng.integers(2, 9))
    names = NAMES[:K]
    low = np.where(rng.random(K) < 0.3, rng.random(K) / K, 0)
    high = np.where(rng.random(K) < 0.5, np.minimum(1, low + rng.random(K) * 3 / K), 1)
    made = []
    if groups and K > 2:
        cut = int(rng.integers(1, K))
        a, b = sorted(rng.random(2))
        made.append(Group("g", names[:cut], a, b))
        if groups == "overlap":
            a, b = sorted(rng.random(2))
            made.append(Group("h", names[max(0, cut - 1) :], a, b))
    bounds = Bounds(dict(zip(names, low, strict=True)), dict(zip(names, high, strict=True)), tuple(made), names=names)
    return bounds, rng.dirichlet(np.full(K, 0.5))


@pytest.mark.parametrize(
    ("groups", "cases"),
    [(None, 60), ("disjoint", 36), ("overlap", 8), *slow((None, 600), ("disjoint", 360), ("overlap", 40))],
)
def test_random_problems_are_feasible_or_named(groups, cases):
    rng = np.random.default_rng(7)
    solved = 0
    for _ in range(cases):
        bounds, q = random_problem(rng, groups)
        for metric in ("kl", "l2"):
            clash = infeasible(bounds)
            if clash:
                assert any(name in clash for name in bounds.names)
                continue
            p = bounds.project(q, metric)
            solved += 1
            assert bounds.violations(p) == []
            again = bounds.project(p, metric)
            np.testing.assert_allclose(again, p, atol=2e-7)
            # no feasible point (here: mixtures of the projection with random feasible ones) is nearer to q
            other = bounds.project(rng.dirichlet(np.ones(len(p))), metric)
            for t in (1e-3, 0.1):
                moved = (1 - t) * p + t * other
                assert distance(moved, q, metric) >= distance(p, q, metric) - 1e-7
    assert solved > cases


def infeasible(bounds):
    try:
        bounds.check_feasible()
    except Infeasible as error:
        return str(error)
    return ""


def distance(p, q, metric):
    if metric == "l2":
        return float(((p - q) ** 2).sum())
    q = np.maximum(q, 1e-300)
    return float(np.sum(np.where(p > 0, p * np.log(np.maximum(p, 1e-300) / q), 0.0)))


def test_rows_at_once_equal_rows_one_by_one():
    rng = np.random.default_rng(0)
    bounds = Bounds(caps={"a": 0.3}, floors={"b": 0.2}, groups=(Group("g", ("c", "d"), 0.1, 0.25),), names=NAMES[:5])
    q = rng.dirichlet(np.ones(5), size=20)
    np.testing.assert_allclose(bounds.project(q), np.stack([bounds.project(row) for row in q]), atol=1e-12)


def test_zero_shares_grow_only_when_they_must():
    bounds = Bounds(caps={"a": 0.6, "b": 0.2}, names=("a", "b", "c", "d"))
    np.testing.assert_allclose(bounds.project([0.9, 0.1, 0.0, 0.0]), [0.6, 0.2, 0.1, 0.1], atol=1e-9)
    assert np.array_equal(Bounds(names=("a", "b", "c")).project([0.5, 0.5, 0.0]) == 0, [False, False, True])


def test_infeasible_names_what_clashes():
    sizes = {"sql": 100, "sum": 1000}
    with pytest.raises(Infeasible, match=r"caps add up to 0.8 < 1 \(sql 0.5, sum 0.3\)") as error:
        Bounds(caps={"sum": 0.3}, sizes=sizes, total=200, max_epochs=1).project([0.5, 0.5])
    assert "epoch caps bind for sql" in str(error.value)
    with pytest.raises(Infeasible, match="floor of sql"):
        Bounds(floors={"sql": 0.6}, caps={"sql": 0.5}, names=("sql", "sum")).interior()
    with pytest.raises(Infeasible, match=r"floors add up to 1\.2"):
        Bounds(floors={"sql": 0.6, "sum": 0.6}, names=("sql", "sum")).interior()
    with pytest.raises(Infeasible, match="group code"):
        Bounds(caps={"a": 0.1, "b": 0.1}, groups=(Group("code", ("a", "b"), 0.5, 1),), names=("a", "b", "c")).project(
            [0.2, 0.3, 0.5]
        )


def test_interior_is_inside():
    bounds = Bounds(
        caps={"a": 0.4}, floors={"b": 0.1}, groups=(Group("g", ("a", "c"), 0.2, 0.5),), names=("a", "b", "c")
    )
    p = bounds.interior()
    assert bounds.violations(p) == []
    assert p.min() > 0.05
    assert p[0] < 0.39


def test_epoch_caps():
    bounds = Bounds(max_epochs={"a": 2}, sizes={"a": 100, "b": 50, "c": 0}, total=1000)
    np.testing.assert_allclose(bounds.upper(), [0.2, 1, 0])
    with pytest.raises(MixError, match="sizes and total"):
        Bounds(max_epochs=4)
    with pytest.raises(MixError, match="no rows and a floor"):
        Bounds(floors={"a": 0.1}, sizes={"a": 0, "b": 5})
    with pytest.raises(MixError, match="did you mean 'sql'"):
        Bounds(caps={"sqk": 0.1}, names=("sql", "sum"))
