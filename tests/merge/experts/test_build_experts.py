"""Twin and Arrow exports: at full rank nothing is lost, routers find their own, prototypes are golden."""

import json

import numpy as np
import pytest

from mtft.adapters.lora_factors import LoraFactors, read_adapter
from mtft.adapters.mlp_router import MlpRouter, load_router
from mtft.adapters.routers import ArrowRouter, CentroidRouter
from mtft.common.errors import MergeError, UserError
from mtft.merge.engine.merge import merge_adapters
from mtft.merge.experts.arrow_prototypes import arrow_router
from mtft.merge.experts.build_experts import build_twin, export_arrow
from mtft.merge.methods import make_method
from mtft.merge.methods.doge import _directions
from tests.merge import golden as g


@pytest.fixture
def paths(tmp_path):
    one, two, three = g.factors()
    bias = LoraFactors(one.A_RN, one.B_MR, one.scale, np.arange(12.0))
    return [
        g.write(tmp_path / "in" / "one", {"layers.0.q": one, "layers.0.k": bias}, lora_bias=True),
        g.write(tmp_path / "in" / "two", {"layers.0.q": two}),
        g.write(tmp_path / "in" / "three", {"layers.0.q": three, "layers.0.k": three}),
    ]


def parts_of(folder, module):
    found = read_adapter(folder).factors(module)
    return g.delta(found), 0 if found.bias_M is None else found.scale * found.bias_M


@pytest.mark.parametrize("shared", ["linear", "tsv", "ties"])
def test_shared_plus_expert_is_the_adapter_at_full_rank(tmp_path, paths, shared):
    """Also where the shared merge is cut to rank 8 of a full-rank result: the residual knows what is on disk."""
    report = build_twin(paths, tmp_path / "out", shared, expert_rank=10, rank=8)
    for path in paths:
        source = read_adapter(path)
        for module in ("layers.0.q", "layers.0.k"):
            S, s = parts_of(tmp_path / "out" / "shared", module)
            E, e = parts_of(tmp_path / "out" / f"expert_{path.name}", module)
            own = source.factors(module)
            np.testing.assert_allclose(S + E, 0 if own is None else g.delta(own), atol=2e-6)
            expected = 0 if own is None or own.bias_M is None else own.scale * own.bias_M
            np.testing.assert_allclose(s + e, expected, atol=1e-5)
    assert all(share == pytest.approx(1) for share in report.settings["expert_energy"].values())


def test_experts_are_the_best_of_their_rank(tmp_path, paths):
    build_twin(paths, tmp_path / "out", expert_rank=1)
    S, _ = parts_of(tmp_path / "out" / "shared", "layers.0.q")
    E, _ = parts_of(tmp_path / "out" / "expert_two", "layers.0.q")
    left = np.linalg.svd(g.delta(g.factors()[1]) - S, compute_uv=False)
    assert np.linalg.norm(g.delta(g.factors()[1]) - S - E) == pytest.approx(np.linalg.norm(left[1:]), rel=1e-5)
    facts = json.loads((tmp_path / "out" / "twin.json").read_text())
    assert 0 < facts["expert_energy"]["two"] < 1


def test_with_shared_gives_one_plain_adapter_per_request(tmp_path, paths):
    build_twin(paths, tmp_path / "out", expert_rank=4, with_shared=True)
    D, _ = parts_of(tmp_path / "out" / "expert_three", "layers.0.q")
    S, _ = parts_of(tmp_path / "out" / "shared", "layers.0.q")
    U, s, Vt = np.linalg.svd(g.delta(g.factors()[2]) - S)
    np.testing.assert_allclose(D, S + (U[:, :4] * s[:4]) @ Vt[:4], atol=2e-6)
    with pytest.raises(UserError, match="something already"):
        build_twin(paths, tmp_path / "out")
    build_twin(paths, tmp_path / "out", overwrite=True)


@pytest.mark.parametrize("kind", [CentroidRouter, MlpRouter])
def test_router_finds_its_own(tmp_path, paths, kind):
    rng = np.random.default_rng(0)
    centres = dict(zip(g.NAMES, 2 * rng.normal(size=(3, 16))))
    scale = np.logspace(-2, 2, 16)
    states = {name: scale * (c + rng.normal(size=(50, 16))) for name, c in centres.items()}
    router = kind.fit(states)
    for k, c in enumerate(centres.values()):
        p = router.probabilities(scale * (c + rng.normal(size=(50, 16))))
        np.testing.assert_allclose(p.sum(axis=1), 1)
        assert (p.argmax(axis=1) == k).mean() > 0.95
    build_twin(paths, tmp_path / "out", router=router)
    again = load_router(tmp_path / "out" / "router.safetensors")
    assert type(again) is kind
    np.testing.assert_array_equal(again.probabilities(states["one"]), router.probabilities(states["one"]))
    with pytest.raises(MergeError, match="other experts"):
        build_twin(paths, tmp_path / "out2", router=kind.fit({"x": states["one"]}))
    with pytest.raises(MergeError, match="states must be"):
        kind.fit({"x": states["one"][0]})


def test_arrow_golden(tmp_path):
    paths = g.write_golden(tmp_path)
    found = arrow_router(paths)
    v = found.prototypes["layers.0.q"]
    np.testing.assert_allclose(v[0, :3], [-0.424936095, -0.059362503, 0.072302040], atol=1e-6)
    for k, f in enumerate(g.factors()):
        top = np.linalg.svd(g.delta(f))[2][0]
        assert abs(v[k] @ top) == pytest.approx(1)
        assert v[k][np.abs(v[k]).argmax()] > 0
    found.save(tmp_path / "router.safetensors")
    again = ArrowRouter.load(tmp_path / "router.safetensors")
    assert again.names == g.NAMES
    np.testing.assert_array_equal(again.prototypes["layers.0.q"], v)


def test_arrow_routes_and_subtracts_exact_deltas(tmp_path):
    paths = g.write_golden(tmp_path)
    common = arrow_router(paths[:2], general=[paths[2]])
    one, two, three = (g.delta(f) for f in g.factors())
    for k, D in enumerate((one, two)):
        top = np.linalg.svd(D - three)[2][0]
        assert abs(common.prototypes["layers.0.q"][k] @ top) == pytest.approx(1)
    p = arrow_router(paths).probabilities("layers.0.q", np.eye(10), top=2)
    assert (np.count_nonzero(p, axis=1) == 2).all()
    np.testing.assert_allclose(p.sum(axis=1), 1)


def test_files_that_are_no_router_are_named(tmp_path):
    from safetensors.numpy import save_file

    (tmp_path / "x.safetensors").write_bytes(b"no")
    save_file({"a": np.zeros(2)}, tmp_path / "y.safetensors", {"kind": "magic"})
    for name, text in (("x", "no router"), ("y", "kind 'magic'")):
        with pytest.raises(MergeError, match=text):
            load_router(tmp_path / f"{name}.safetensors")


def test_an_mlp_learns_what_no_centroid_can():
    """Two tasks with one mean: XOR of signs."""
    rng = np.random.default_rng(0)

    def draw(same):
        x = rng.normal(size=(200, 2))
        return x[(x[:, 0] * x[:, 1] > 0) == same]

    states = {"same": draw(True), "other": draw(False)}
    for kind, low, high in ((MlpRouter, 0.9, 1.0), (CentroidRouter, 0.3, 0.7)):
        router = kind.fit(states)
        right = [(router.probabilities(draw(same)).argmax(axis=1) == k).mean() for k, same in enumerate((True, False))]
        assert low <= np.mean(right) <= high


def test_arrow_folder_is_loras_of_one_rank_and_a_router(tmp_path):
    paths = g.write_golden(tmp_path / "in")
    export_arrow(paths, tmp_path / "out", top=2)
    for path, f in zip(paths, g.factors(), strict=True):
        expert = read_adapter(tmp_path / "out" / f"expert_{path.name}")
        assert expert.settings.r == expert.settings.alpha == 8
        np.testing.assert_allclose(g.delta(expert.factors("layers.0.q")), g.delta(f), atol=1e-6)
    assert isinstance(load_router(tmp_path / "out" / "router.safetensors"), ArrowRouter)
    assert json.loads((tmp_path / "out" / "arrow.json").read_text())["top"] == 2
    with pytest.raises(MergeError, match="top is 4"):
        export_arrow(paths, tmp_path / "out2", top=4)


def test_names_that_are_no_folders_are_refused(tmp_path):
    source = g.write(tmp_path / "a", {"q": g.factors()[0]})
    with pytest.raises(MergeError, match="can't name a folder"):
        build_twin([read_adapter(source, name="../x")], tmp_path / "out")
    assert not (tmp_path / "x").exists()


def test_doge_lessens_conflict_and_leaves_the_protected_directions():
    core = g.core()
    lam = 0.07 / np.array([np.linalg.norm(M) for M in core.cores])
    method = make_method("doge", {"shared": 0.5, "learning_rate": 0.001})
    _, losses = method.descend(core, lam)
    assert losses[-1] < 0.9 * losses[0]
    P = method.protected(core)
    np.testing.assert_allclose(P.T @ P, np.eye(3), atol=1e-12)
    plain = make_method("doge", {"shared": 0.0, "learning_rate": 0.001})
    _, losses_free = plain.descend(core, lam)
    assert losses_free[-1] < losses[-1]


def test_doge_without_steps_is_a_masked_sum():
    D = [g.delta(f) for f in g.factors()]
    expected = 0
    for X in D:
        keep = np.abs(X) >= np.sort(np.abs(X), axis=None)[-36]
        expected = expected + 0.07 / np.linalg.norm(X) * np.where(keep, X, 0)
    got = g.full(make_method("doge", {"steps": 0, "scope": "module"}).merge(g.parts()))
    np.testing.assert_allclose(got, expected, atol=1e-12)
    whole, parts = make_method("doge", {"steps": 0}), g.parts()
    np.testing.assert_allclose(g.full(whole.merge(parts, whole.survey(lambda: iter([parts])))), got, atol=1e-12)
    moved = g.full(make_method("doge", {"scope": "module"}).merge(g.parts()))
    assert not np.allclose(moved, got)


def test_doge_gradient_is_that_of_the_loss():
    """One plain step of size h lowers the loss by h ||gradient||^2: checked by differences on the full matrices."""
    core = g.core()
    lam = 0.07 / np.array([np.linalg.norm(M) for M in core.cores])
    D = [g.delta(f) for f in g.factors()]

    def loss(X):
        total = sum(c * (x + X) for c, x in zip(lam, D))
        return sum(np.sum(np.sum(x * (x - total), axis=1) ** 2) for x in D)

    # Adam's first step is -learning_rate * sign(gradient): compare signs with a numerical gradient in Y.
    Y, losses = make_method("doge", {"shared": 0.0, "steps": 1}).descend(core, lam)
    assert losses[0] == pytest.approx(loss(np.zeros((12, 10))))
    Qt = core.cols.apply(_directions(core)).T
    for i, j in ((0, 0), (3, 2), (7, 4)):
        step = np.zeros_like(Y)
        step[i, j] = 1e-5
        slope = (loss(step @ Qt) - loss(-step @ Qt)) / 2e-5
        assert np.sign(Y[i, j]) == -np.sign(slope)


def test_doge_merges_files(tmp_path):
    assert merge_adapters(g.write_golden(tmp_path), tmp_path / "out", "doge", min_energy=0).rank >= 8
