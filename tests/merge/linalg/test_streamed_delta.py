"""The streamed engine: exact order statistics, reproducible masks, a range finder whose energy is true."""

import numpy as np
import pytest

from mtft.adapters.lora_factors import LoraFactors
from mtft.merge.linalg import streamed_delta
from mtft.merge.linalg.streamed_delta import BernoulliMask, DeltaStream, compress, order_statistics
from mtft.merge.methods import METHODS, make_method
from tests.merge import golden as g


def stream_of(rng, m=300, n=200, K=3, r=4, dtype=np.float64):
    factors = [LoraFactors(rng.normal(size=(r, n)), rng.normal(size=(m, r)), 0.5) for _ in range(K)]
    return DeltaStream.of_factors(factors, np.dtype(dtype)), factors


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_order_statistics_are_exact(dtype):
    rng = np.random.default_rng(0)
    channels = [
        rng.normal(size=5000),
        np.round(rng.normal(size=3000), 1),  # many ties, and zeros of both signs
        -np.exp(20 * rng.normal(size=2000)),
        np.zeros(7),
    ]
    channels = [x.astype(dtype) for x in channels]
    places = [[0, 17, 2500, 4999], [0, 1500, 2999], [0, 1, 1999], [3]]
    blocks = [[x[i::3] for x in channels] for i in range(3)]
    expected = [[float(np.sort(x)[place]) for place in wanted] for x, wanted in zip(channels, places)]
    assert order_statistics(lambda: blocks, places) == expected


def test_masks_golden():
    mask = BernoulliMask(0, "", "", 37, key=12345)
    whole = mask.uniform(0, 100)
    assert (whole < 0.5)[0, :8].astype(int).tolist() == [0, 0, 0, 1, 1, 0, 0, 1]
    assert (whole < 0.5).mean() == pytest.approx(0.504324324, abs=1e-9)
    for start in range(0, 100, 7):
        np.testing.assert_array_equal(mask.uniform(start, min(7, 100 - start)), whole[start : start + 7])


def test_masks_hang_on_seed_name_and_module_only():
    state = np.random.get_state()[1].copy()
    draws = {
        key: BernoulliMask(*key, 16).uniform(0, 4).tobytes()
        for key in [(0, "a", "q"), (1, "a", "q"), (0, "b", "q"), (0, "a", "k")]
    }
    assert len(set(draws.values())) == 4
    assert BernoulliMask(0, "a", "q", 16).uniform(0, 4).tobytes() == draws[0, "a", "q"]
    np.testing.assert_array_equal(np.random.get_state()[1], state)


def test_blocks_are_bit_equal_between_passes_and_cover_all_rows(monkeypatch):
    monkeypatch.setattr(streamed_delta, "BLOCK_BYTES", 1)  # 16 rows
    stream, factors = stream_of(np.random.default_rng(0), m=100)
    first, second = ([block.copy() for _, blocks in stream for block in blocks] for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(first, second))
    assert [len(blocks[0]) for _, blocks in stream] == [16] * 6 + [4]
    np.testing.assert_allclose(np.vstack([blocks[1] for _, blocks in stream]), g.delta(factors[1]), atol=1e-12)


def test_block_rows_follow_the_budget():
    lefts, rights = [np.zeros((4096, 1))] * 8, [np.zeros((1, 4096))] * 8
    assert DeltaStream(lefts, rights).rows == 16
    assert DeltaStream([np.zeros((4096, 1))] * 4, [np.zeros((1, 512))] * 4).rows == 256


@pytest.mark.parametrize("name", ["ties", "dare", "della", "breadcrumbs", "sce", "pcb", "consensus"])
def test_streaming_changes_nothing(name, monkeypatch):
    """Small blocks, as a large matrix would have, give the bits of one block."""
    _, factors = stream_of(np.random.default_rng(1), m=70, n=50)
    parts = g.parts([1.0, 0.5, -0.3], factors)
    whole = g.full(METHODS[name]().merge(parts))
    monkeypatch.setattr(streamed_delta, "BLOCK_BYTES", 1)
    monkeypatch.setattr(streamed_delta, "HELD_BYTES", 0)  # and nothing held between passes
    np.testing.assert_allclose(g.full(METHODS[name]().merge(parts)), whole, atol=1e-12)


def test_range_finder_is_near_the_best_and_its_energy_is_true(monkeypatch):
    """Spec's figures for Gaussian factors: error / best = 1.007 at three passes."""
    monkeypatch.setattr(streamed_delta, "BLOCK_BYTES", 1 << 18)
    monkeypatch.setattr(streamed_delta, "HELD_BYTES", 0)
    _, factors = stream_of(np.random.default_rng(0), m=336, n=256, K=4, r=16)
    factors = [LoraFactors(0.02 * f.A_RN, 0.02 * f.B_MR, 1.0) for f in factors]
    parts = g.parts(np.ones(4), factors, names="abcd", rank_cap=16)
    merged = METHODS["ties"]().merge(parts)
    thin = g.full(merged)
    monkeypatch.setattr(streamed_delta, "EXACT_SIDE", 10**6)
    W = g.full(METHODS["ties"]().merge(parts))
    assert merged.total == pytest.approx(np.sum(W**2), rel=1e-10)
    U, S, Vt = np.linalg.svd(thin, full_matrices=False)
    best = np.sqrt(np.sum(np.linalg.svd(W, compute_uv=False)[16:] ** 2))
    error = np.linalg.norm(W - (U[:, :16] * S[:16]) @ Vt[:16])
    assert 1 <= error / best < 1.02
    assert np.sum(S[:16] ** 2) / merged.total <= np.sum(np.linalg.svd(W, compute_uv=False)[:16] ** 2) / merged.total


def test_low_rank_results_are_found_exactly():
    stream, factors = stream_of(np.random.default_rng(0))
    merged = compress(stream, lambda start, blocks: np.sum(blocks, axis=0), 12)
    np.testing.assert_allclose(g.full(merged), sum(g.delta(f) for f in factors), atol=1e-10)


def test_dare_keeps_the_mean():
    """Over 200 seeds: mean = the delta; variance of an entry = x^2 (1 - d)/d."""
    method = make_method("dare", {"density": 0.4})
    one = g.factors()[0]
    draws = np.stack([g.full(method.merge(g.parts([1.0], [one], names=["a"], seed=seed))) for seed in range(200)])
    D = g.delta(one)
    spread = np.abs(D) * np.sqrt(0.6 / 0.4)
    assert np.abs((draws.mean(axis=0) - D) / spread * np.sqrt(200)).max() < 4.5
    assert np.mean(draws.var(axis=0) / spread**2) == pytest.approx(1, abs=0.05)


def test_dare_l1_keeps_the_norm_and_seeds_are_its_own():
    method = make_method("dare", {"rescale": "l1"})
    one = g.factors()[0]
    X = g.full(method.merge(g.parts([1.0], [one], names=["a"])))
    assert np.abs(X).sum() == pytest.approx(np.abs(g.delta(one)).sum())
    np.testing.assert_array_equal(X, g.full(method.merge(g.parts([1.0], [one], names=["a"]))))
    assert not np.array_equal(X, g.full(method.merge(g.parts([1.0], [one], names=["a"], seed=1))))


def test_della_probabilities():
    method = METHODS["della"]()
    p = method.probabilities(np.array([[3.0, -1.0, 2.0, 0.0, -4.0]]))
    np.testing.assert_allclose(p, [[0.575, 0.425, 0.5, 0.35, 0.65]])
    np.testing.assert_allclose(method.probabilities(np.ones((2, 1))), 0.5)
    draws = np.stack([g.full(make_method("della", {"then": "linear"}).merge(g.parts(seed=s))) for s in range(200)])
    D = sum(g.delta(f) for f in g.factors())
    assert np.linalg.norm(draws.mean(axis=0) - D) < 0.15 * np.linalg.norm(D)
