"""TIES and its kin: golden values, the hand case with its three meanings, and the peers' own functions."""

import numpy as np
import pytest

from mtft.adapters.lora_factors import LoraFactors, read_adapter
from mtft.common.errors import MergeError
from mtft.merge.engine.merge import merge_adapters
from mtft.merge.methods import METHODS, make_method
from tests.merge import golden as g

ONES = (1.0, 1.0, 1.0)
GOLDEN = [
    ("ties", {"density": 0.5}, ONES, 2.516260426, 0.184736156),
    ("ties", {"density": 0.5, "value": "sum"}, ONES, 3.304428031, 0.554208468),
    ("ties", {"density": 0.5, "variant": "peft"}, g.W, 0.823703207, 0.070200572),
    ("ties", {"density": 0.5, "variant": "mergekit"}, g.W, 2.517853806, 0.210601716),
    ("breadcrumbs", {"density": 0.8, "gamma": 0.1}, ONES, 2.515286551, 0.301825544),
    ("breadcrumbs", {"density": 0.5, "gamma": 0.05}, ONES, 2.742581611, 0.301825544),
    ("pcb", {}, ONES, 1.739889663, 0.212066709),
    ("sce", {}, ONES, 2.659835066, 0.237961548),
    ("sce", {"density": 0.5}, ONES, 2.525311350, 0.0),
    ("consensus", {"lam": 0.4}, ONES, 2.139100393, 0.554208468),
]


@pytest.mark.parametrize(("name", "options", "weights", "norm", "entry"), GOLDEN)
def test_golden(name, options, weights, norm, entry):
    X = g.full(make_method(name, options).merge(g.parts(weights)))
    assert g.near(np.linalg.norm(X), norm)
    assert g.near(X[7, 4], entry)


@pytest.mark.parametrize(
    ("variant", "weights", "expected"),
    [
        ("paper", (1, 1), [3, -2.5, 0.45, 2.25]),
        ("mergekit", (1, 1), [3, -2.5, 0.45, 2.25]),
        ("peft", (1, 1), [3, -2.5, 0.45, 2.25]),
        ("peft", (0.5, 0.5), [1.5, -1.25, 0.225, 1.125]),
        ("mergekit", (0.5, 0.5), [3, -2.5, 0.45, 2.25]),
        ("peft", (0.2, 0.8), [0.6, -1.7, 0.21, 1.2]),
        ("mergekit", (0.2, 0.8), [-1.5, -3.4, 0.42, 2.4]),
    ],
)
def test_the_three_meanings_of_ties_by_hand(variant, weights, expected):
    T = [np.array([[3, -1, 0.5, 2.0]]), np.array([[-1.5, -4, 0.4, 2.5]])]
    method = make_method("ties", {"density": 1.0, "variant": variant})
    np.testing.assert_allclose(method.merge_arrays(T, np.array(weights, float))[0], expected)


def test_exact_cancellation_goes_with_the_majority():
    T = [np.array([[1.0, -2, -3, 5]]), np.array([[-1.0, -1, -1, -5]])]
    one = np.ones(2)
    paper = make_method("ties", {"density": 1.0}).merge_arrays(T, one)
    np.testing.assert_allclose(paper, [[-1, -1.5, -2, -5]])
    for variant in ("mergekit", "peft"):
        other = make_method("ties", {"density": 1.0, "variant": variant}).merge_arrays(T, one)
        np.testing.assert_allclose(other, [[1, -1.5, -2, 5]])


def test_trim_counts_as_the_peers_do():
    """int(0.29 * 100) is 28; entries equal to the threshold are all kept."""
    x = np.arange(1.0, 101)[None]
    assert np.count_nonzero(make_method("ties", {"density": 0.29}).merge_arrays([x], np.ones(1))) == 28
    assert np.count_nonzero(make_method("ties", {"density": 0.29}).merge_arrays([np.ones((1, 100))], np.ones(1))) == 100
    with pytest.raises(MergeError, match="keeps none"):
        make_method("ties", {"density": 0.001}).merge_arrays([x], np.ones(1))


def test_consensus_mask_counts():
    D = [g.delta(f) for f in g.factors()]
    masks = [np.abs(x) > 0.4 * np.abs(sum(D) - x) for x in D]
    assert [int(mask.sum()) for mask in masks] == [51, 111, 22]
    X = g.full(make_method("consensus", {"tall": "two"}).merge(g.parts()))
    np.testing.assert_allclose(X, masks[1] * sum(D))


def test_sce_weights_survive_small_deltas():
    """mergekit falls back to uniform weights below an absolute 1e-6; the golden shares hold at 1e-5 of the size."""
    D = [g.delta(f) for f in g.factors()]
    energy = np.array([np.mean(x**2) for x in D])
    np.testing.assert_allclose(energy / energy.sum(), [0.14445, 0.83202, 0.02353], atol=1e-5)
    small = make_method("sce").merge_arrays([1e-5 * x for x in D], np.ones(3))
    assert g.near(1e5 * np.linalg.norm(small), 2.659835066)


def test_global_scope_trims_over_all_modules(tmp_path):
    one, two, _ = g.factors()
    quiet = LoraFactors(two.A_RN, 0.01 * two.B_MR, two.scale)
    path = g.write(tmp_path / "a", {"q": one, "k": quiet})
    options = {"density": 0.5, "scope": "global"}
    merge_adapters([path], tmp_path / "global", "ties", options, rank=10, min_energy=0)
    merge_adapters([path], tmp_path / "module", "ties", {"density": 0.5}, rank=10, min_energy=0)

    def count(folder):
        out = read_adapter(folder)
        return [int(np.sum(np.abs(g.delta(out.factors(name))) > 1e-6)) for name in "qk"]

    assert count(tmp_path / "module") == [60, 60]
    assert sum(count(tmp_path / "global")) == 120
    assert count(tmp_path / "global")[1] < 15


def pcb_by_hand(flat, ratio):
    """The authors' merge on flat vectors of the whole model, [K, N] (Du et al. 2024, section 3)."""

    def clamped(x, low, high):
        order = np.sort(x)
        return np.clip(x, order[low], order[high])

    def minmax(x):
        return (x - x.min()) / (x.max() - x.min())

    N = flat.shape[1]
    a = np.stack([clamped(np.abs(x), int(1e-4 * N), int((1 - 1e-4) * N - 1)) for x in flat])
    b = np.stack([np.exp(len(flat) * minmax(s) ** 2) for s in a]) * np.tanh(flat * flat.sum(axis=0))
    c = np.stack([minmax(np.maximum(x, np.sort(x)[int((1 - ratio) * N)])) for x in b])
    return (np.sign(flat) * a * c).sum(axis=0) / np.maximum(c.sum(axis=0), 1e-12)


def test_pcb_over_the_whole_model_is_the_authors_rule():
    """Two modules, one of them quieter: global order statistics leave it less; per module both keep the same share."""
    one, two, three = g.factors()
    modules = {
        "q": [one, two, three],
        "k": [LoraFactors(f.A_RN, 0.3 * f.B_MR, f.scale) for f in (two, three, one)],
    }
    parts = [g.parts(g.W, of=factors, module=name) for name, factors in modules.items()]
    flat = np.stack([np.concatenate([w * g.delta(p.factors[k]).ravel() for p in parts]) for k, w in enumerate(g.W)])
    expected = pcb_by_hand(flat, 0.2).reshape(2, g.M, g.N)
    method = make_method("pcb", {"ratio": 0.2, "scope": "global"})
    seen = method.survey(lambda: iter(parts))
    found = [g.full(method.merge(p, seen)) for p in parts]
    np.testing.assert_allclose(found, expected, atol=1e-12)
    alone = [g.full(make_method("pcb", {"ratio": 0.2}).merge(p)) for p in parts]
    assert np.count_nonzero(alone[1]) > np.count_nonzero(found[1])


def test_truncation_of_a_full_rank_result_is_reported(tmp_path):
    rng = np.random.default_rng(0)
    paths = [
        g.write(tmp_path / n, {"q": LoraFactors(rng.normal(size=(2, 40)), rng.normal(size=(50, 2)), 1.0)}) for n in "ab"
    ]
    report = merge_adapters(paths, tmp_path / "out", "ties", rank=8, min_energy=0.1)
    assert 0.3 < report.energy < 0.95
    with pytest.raises(MergeError, match="keeps only"):
        merge_adapters(paths, tmp_path / "out2", "ties", rank=1, min_energy=0.9)


def test_robustmerge(tmp_path):
    """By hand on rank 2, everything kept: A = 2 sum A_k, B = sum of the two B_k, as all c are 1."""
    one = g.factors()[0]
    other = LoraFactors(one.A_RN[::-1] + 1, one.B_MR - 1, 2.0)
    X = g.full(make_method("robustmerge", {"density": 1.0}).merge(g.parts([1.0, 1.0], [one, other], names="ab")))
    np.testing.assert_allclose(X, (one.B_MR + 2 * other.B_MR) @ (2 * (one.A_RN + other.A_RN)), atol=1e-12)
    with pytest.raises(MergeError, match="equal ranks"):
        METHODS["robustmerge"]().merge(g.parts())


@pytest.mark.parametrize("shape", [(40, 30), (64, 64)])
def test_equal_to_mergekit_and_peft(shape):
    """Their functions on the same matrices; no two entries are equal in size."""
    import torch
    from mergekit import sparsify
    from mergekit.merge_methods import generalized_task_arithmetic as arithmetic
    from mergekit.merge_methods import sce
    from peft.utils.merge_utils import ties as peft_ties

    rng = np.random.default_rng(0)
    D = [(s * rng.normal(size=shape)).astype(np.float32) for s in (1.0, 0.5, 2.0)]
    weights = np.array([0.5, 0.3, 0.9])
    tensors = [torch.tensor(x) for x in D]
    w = torch.tensor(weights, dtype=torch.float32)

    ours = make_method("ties", {"density": 0.3, "variant": "peft"}).merge_arrays(D, weights)
    np.testing.assert_allclose(ours, peft_ties(tensors, w, 0.3).numpy(), rtol=1e-6, atol=1e-7)

    trimmed = torch.stack([sparsify.magnitude(x, 0.3) for x in tensors]) * w[:, None, None]
    mask = arithmetic.get_mask(trimmed)
    divisor = (w[:, None, None] * mask).sum(0)
    divisor[divisor == 0] = 1
    ours = make_method("ties", {"density": 0.3, "variant": "mergekit"}).merge_arrays(D, weights)
    np.testing.assert_allclose(ours, ((trimmed * mask).sum(0) / divisor).numpy(), rtol=1e-6, atol=1e-7)

    for gamma in (0.0, 0.05):  # gamma 0 cleared everything in some of their revisions
        theirs = sum(sparsify.magnitude_outliers(x, 0.4, gamma=gamma) * c for x, c in zip(tensors, w))
        ours = make_method("breadcrumbs", {"density": 0.4, "gamma": gamma}).merge_arrays(D, weights)
        np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-6, atol=1e-7)

    for density in (1.0, 0.5):
        tv = torch.stack(tensors)
        tv = tv * sce.sce_mask(tv, density)[None] if density < 1 else tv
        erase = arithmetic.get_mask(tv, method="sum")
        shares = sce.sce_weight(tv)[:, None, None] * erase
        theirs = (tv * shares).sum(0) / shares.sum(0).clamp(min=1e-6)
        ours = make_method("sce", {"density": density}).merge_arrays(D, np.ones(3))
        np.testing.assert_allclose(ours, theirs.numpy(), rtol=2e-6, atol=1e-6)

    uniform = sce.sce_weight(1e-5 * torch.stack(tensors))
    assert torch.allclose(uniform, torch.full((3,), 1 / 3))  # the defect that ours does not share


@pytest.mark.parametrize("name", ["dare", "della"])
def test_equal_to_mergekit_and_peft_on_the_same_draws(name, monkeypatch):
    """Random drops where the definitions agree: the peers' torch.bernoulli is fed from our masks."""
    import torch
    from mergekit import sparsify
    from peft.utils.merge_utils import dare_linear, dare_ties

    from mtft.merge.linalg.streamed_delta import BernoulliMask

    rng = np.random.default_rng(0)
    D = [(s * rng.normal(size=(40, 30))).astype(np.float32) for s in (1.0, 0.5, 2.0)]
    weights = np.array([0.5, 0.3, 0.9])
    tensors, w = [torch.tensor(x) for x in D], torch.tensor(weights, dtype=torch.float32)
    labels = {"names": g.NAMES, "module": "m", "seed": 5}

    def feed():
        uniforms = iter([torch.tensor(BernoulliMask(5, name, "m", 30).uniform(0, 40)) for name in g.NAMES])
        monkeypatch.setattr(torch, "bernoulli", lambda p: (next(uniforms) < p).to(p.dtype))

    feed()
    l1 = sparsify.RescaleNorm.l1
    if name == "dare":
        theirs = sum(c * sparsify.bernoulli(x, 0.4, l1) for x, c in zip(tensors, w))
        ours = make_method("dare", {"density": 0.4, "rescale": "l1"}).merge_arrays(D, weights, **labels)
    else:
        theirs = sum(c * sparsify.della_magprune(x, 0.4, 0.2, l1) for x, c in zip(tensors, w))
        options = {"density": 0.4, "epsilon": 0.2, "rescale": "l1", "then": "linear"}
        ours = make_method("della", options).merge_arrays(D, weights, **labels)
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=2e-5, atol=1e-6)
    if name == "dare":
        for theirs, options in ((dare_linear, {}), (dare_ties, {"then": "ties", "variant": "peft"})):
            feed()
            ours = make_method("dare", {"density": 0.4, **options}).merge_arrays(D, weights, **labels)
            np.testing.assert_allclose(ours, theirs(tensors, w, 0.4).numpy(), rtol=2e-5, atol=1e-6)
