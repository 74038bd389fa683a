"""Random adapters of any shape: what is written is the best of its rank, and its energy is what it says."""

import tempfile
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mtft.adapters.lora_factors import LoraFactors, read_adapter
from mtft.merge.engine.merge import merge_adapters
from tests.merge import golden as g

SIZES = st.integers(1, 12)


@st.composite
def experts(draw):
    """One to four adapters of one or two modules, each with its own ranks, scales, and gaps."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    shapes = {name: (draw(SIZES), draw(SIZES)) for name in ("layers.0.q", "layers.1.q")[: draw(st.integers(1, 2))]}
    made = []
    for _ in range(draw(st.integers(1, 4))):
        names = [name for name in shapes if draw(st.booleans())] or list(shapes)[:1]
        modules = {}
        for name in names:
            (m, n), r = shapes[name], draw(st.integers(1, 5))
            size = 10.0 ** draw(st.integers(-4, 2))
            modules[name] = LoraFactors(
                rng.normal(size=(r, n)), size * rng.normal(size=(m, r)), draw(st.sampled_from([0.5, 2.0]))
            )
        made.append(modules)
    weights = [draw(st.sampled_from([1.0, 0.5, -1.0, 2.0])) for _ in made]
    return shapes, made, weights, draw(st.integers(1, 6)), draw(st.sampled_from(["fp64", "fp32"]))


def sum_of(made, weights, name, shape):
    """The weighted sum of the deltas as the files hold them, in float32 factors."""
    D = np.zeros(shape)
    for modules, weight in zip(made, weights):
        if name in modules:
            f = modules[name]
            stored = LoraFactors(
                f.A_RN.astype(np.float32).astype(float), f.B_MR.astype(np.float32).astype(float), f.scale
            )
            D += weight * g.delta(stored)
    return D


@settings(max_examples=60, deadline=None)
@given(experts())
def test_linear_is_the_best_of_its_rank(case):
    shapes, made, weights, rank, precision = case
    tolerance = 1e-9 if precision == "fp64" else 1e-4
    kept = total = largest = 0.0
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        paths = [g.write(root / str(k), modules) for k, modules in enumerate(made)]
        report = merge_adapters(
            paths, root / "out", weights=weights, rank=rank, min_energy=0, precision=precision, dtype="fp64"
        )
        out = read_adapter(root / "out")
        assert set(out.modules) == {name for modules in made for name in modules}
        for name in out.modules:
            D = sum_of(made, weights, name, shapes[name])
            S = np.linalg.svd(D, compute_uv=False)
            size = max(np.linalg.norm(g.delta(modules[name])) for modules in made if name in modules)
            lost = np.linalg.norm(g.delta(out.factors(name)) - D)
            assert abs(lost - np.linalg.norm(S[rank:])) <= tolerance * size
            kept, total, largest = kept + np.sum(S[:rank] ** 2), total + np.sum(S**2), max(largest, size)
    if total > (100 * tolerance * largest) ** 2:  # not a sum that cancels
        assert abs(report.energy - kept / total) <= 10 * tolerance


@settings(max_examples=30, deadline=None)
@given(experts())
def test_a_lossless_merge_of_a_merge_is_the_same(case):
    """Linear is associative: merging the merged adapter alone changes nothing."""
    _, made, weights, _, _ = case
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        paths = [g.write(root / str(k), modules) for k, modules in enumerate(made)]
        merge_adapters(paths, root / "once", "cat", weights=weights, dtype="fp64")
        merge_adapters([root / "once"], root / "twice", "cat", dtype="fp64")
        once, twice = read_adapter(root / "once"), read_adapter(root / "twice")
        for name in once.modules:
            a, b = g.delta(once.factors(name)), g.delta(twice.factors(name))
            np.testing.assert_allclose(b, a, rtol=0, atol=1e-9 * max(1e-300, np.abs(a).max()))
