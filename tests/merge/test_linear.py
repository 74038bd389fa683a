"""Linear, cat, svd: golden values of the sum, and the identities that PEFT's own linear merge breaks."""

import numpy as np
import pytest

from mtft.adapters.lora_factors import read_adapter
from mtft.common.errors import MergeError
from mtft.merge.engine.merge import merge_adapters
from mtft.merge.methods import METHODS, make_method
from tests.merge import golden as g


def test_the_golden_adapters_are_the_golden_adapters():
    one, two, three = g.factors()
    np.testing.assert_allclose(one.A_RN[0, :3], [0.372073455, -0.204634618, -0.079902321], atol=6e-10)
    assert g.near(three.B_MR[11, 0], -0.442645478)
    for f, norm, entry in (
        (one, 1.180903979, 0.252382925),
        (two, 2.834143230, 0.240451455),
        (three, 0.476597297, 0.061374089),
    ):
        assert g.near(np.linalg.norm(g.delta(f)), norm)
        assert g.near(g.delta(f)[7, 4], entry)


@pytest.mark.parametrize(
    ("weights", "norm", "entry"), [(g.W, 1.110281375, 0.210601716), ((1, 1, 1), 3.250727384, 0.554208468)]
)
def test_golden(weights, norm, entry):
    X = g.full(METHODS["linear"]().merge(g.parts(weights)))
    assert g.near(np.linalg.norm(X), norm)
    assert g.near(X[7, 4], entry)


def test_energy_and_spectrum_at_rank_2(tmp_path):
    report = merge_adapters(g.write_golden(tmp_path), tmp_path / "out", weights=g.W, rank=2)
    assert g.near(report.energy, 0.829946902, 1e-7)  # factors went through float32
    B, A, energy = g.merge_delta([tmp_path / name for name in g.NAMES], "layers.0.q", weights=g.W, rank=2)
    np.testing.assert_allclose(np.linalg.svd(B @ A)[1][:2], [0.811691175, 0.603534181], atol=1e-7)
    assert g.near(energy, report.energy)


def test_average_scale_and_negation(tmp_path):
    paths = g.write_golden(tmp_path)
    D = sum(w * g.delta(f) for w, f in zip(g.W, g.factors(), strict=True))
    merge_adapters(paths, tmp_path / "mean", weights=[5, 3, 2], average=True, scale=-2.0, rank="lossless")
    out = read_adapter(tmp_path / "mean").factors("layers.0.q")
    np.testing.assert_allclose(g.delta(out), -2 * D, atol=1e-6)


def test_plus_and_minus_one_cancel(tmp_path):
    one = g.write(tmp_path / "one", {"q": g.factors()[0]})
    report = merge_adapters([one, one], tmp_path / "out", weights=[1, -1])
    assert not read_adapter(tmp_path / "out").factors("q").B_MR.any()
    assert any("zero in all modules" in text for text in report.warnings)
    assert any("same weights" in text for text in report.warnings)


def test_cat_is_lossless_and_auto_rounds_to_a_usual_rank(tmp_path):
    paths = g.write_golden(tmp_path)
    assert merge_adapters(paths, tmp_path / "cat", method="cat").rank == 6
    assert merge_adapters(paths, tmp_path / "auto", rank="auto").rank == 8


def test_ranks_and_modules_may_differ(tmp_path):
    one, two, three = g.factors()
    merge_adapters(
        [g.write(tmp_path / "a", {"q": one, "k": two}), g.write(tmp_path / "b", {"q": three})],
        tmp_path / "out",
        method="cat",
    )
    out = read_adapter(tmp_path / "out")
    np.testing.assert_allclose(g.delta(out.factors("q")), g.delta(one) + g.delta(three), atol=1e-6)
    np.testing.assert_allclose(g.delta(out.factors("k")), g.delta(two), atol=1e-6)


def test_options_take_their_types():
    """YAML's 2.0 is a whole number and 1 a float; 2.5 is no whole number."""
    method = make_method("ctm", {"rank": 2.0})
    assert isinstance(method.rank, int)
    assert isinstance(make_method("wudi", {"ridge": 1}).ridge, float)
    for name, options in (
        ("ctm", {"rank": 2.5}),
        ("wudi", {"ridge": True}),
        ("ties", {"variant": 1}),
        ("ties", {"dens": 1}),
    ):
        with pytest.raises(MergeError):
            make_method(name, options)
