"""Affinity: first-order transfer against the true step, golden clusters, means over pairs, resume, the file."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from mtft.common.errors import UserError
from mtft.gradients.affinity import Affinity, clusters, read_groups, silhouette

NAN = torch.nan
TASKS = ("a", "b", "c", "d")


def random_gram(seed, K=4, absent=()):
    J = torch.randn(K, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    G = J @ J.T
    for k in absent:
        G[k], G[:, k] = NAN, NAN
    return G


def losses(absent=(), K=4):
    return torch.tensor([NAN if k in absent else 1.0 + k for k in range(K)], dtype=torch.float64)


def measured(times=6, tasks=TASKS, **more):
    affinity = Affinity(tasks, **more)
    for step in range(1, times + 1):
        affinity.update(step, random_gram(step, len(tasks)), losses(K=len(tasks)), 0.1)
    return affinity


def test_first_order():
    """Z_ij -> 1 - L_j(theta - eta g_i) / L_j on quadratics as eta -> 0: the error falls with eta^2."""
    generator = torch.Generator().manual_seed(0)
    roots = torch.randn(3, 5, 5, generator=generator, dtype=torch.float64)
    H, centre = roots @ roots.transpose(1, 2) / 5, torch.randn(3, 5, generator=generator, dtype=torch.float64)
    theta = torch.randn(5, generator=generator, dtype=torch.float64)

    def loss(at):
        return torch.stack([(at - c) @ h @ (at - c) / 2 for h, c in zip(H, centre, strict=True)])

    g = torch.stack([h @ (theta - c) for h, c in zip(H, centre, strict=True)])
    errors = []
    for eta in (1e-3, 1e-4):
        affinity = Affinity(("a", "b", "c"))
        affinity.update(1, g @ g.T, loss(theta), eta)
        true = torch.stack([1 - loss(theta - eta * g[i]) / loss(theta) for i in range(3)])
        errors.append(float((affinity.transfer() - true).abs().max()))
        assert errors[-1] < 0.05 * float(true.abs().max())
    assert errors[1] == pytest.approx(errors[0] / 100, rel=0.05)


def test_clusters_golden():
    C = torch.tensor([[1, 0.9, -0.1, 0], [0.9, 1, 0, 0.1], [-0.1, 0, 1, 0.8], [0, 0.1, 0.8, 1]], dtype=torch.float64)
    for k in (2, None):
        found = clusters(C, k)
        assert found.groups == [[0, 1], [2, 3]]
        assert found.heights == pytest.approx([0.1, 0.2, 1.0])
        assert found.guessed == []
    assert clusters(C, 1).groups == [[0, 1, 2, 3]]
    assert clusters(C, 4).groups == [[0], [1], [2], [3]]
    order = [2, 0, 3, 1]
    assert clusters(C[order][:, order]).groups == [[0, 2], [1, 3]]


def test_tasks_without_structure_are_one_group():
    assert clusters(torch.eye(5) * 0.5 + 0.5).groups == [[0, 1, 2, 3, 4]]
    assert clusters(torch.eye(5)).groups == [[0, 1, 2, 3, 4]]
    assert clusters(torch.ones(2, 2)).groups == [[0, 1]]
    assert clusters(torch.ones(1, 1)).groups == [[0]]


def test_silhouette_equals_sklearn():
    from sklearn import metrics

    points = np.random.default_rng(0).normal(size=(9, 3))
    apart = np.linalg.norm(points[:, None] - points[None], axis=-1)
    labels = np.array([1, 1, 1, 2, 2, 2, 3, 3, 4])
    assert silhouette(apart, labels) == pytest.approx(metrics.silhouette_score(apart, labels, metric="precomputed"))


def test_means_run_over_measures_with_both():
    affinity = Affinity(TASKS, keep=0.9)
    first, second = random_gram(1), random_gram(2, absent=[3])
    affinity.update(10, first, losses(), 0.1)
    affinity.update(20, second, losses([3]), 0.1)
    assert float(affinity.gram_KK[0, 1]) == pytest.approx(float(first[0, 1] + second[0, 1]) / 2)
    assert affinity.gram_KK[0, 3] == first[0, 3]
    assert affinity.together_KK[3].tolist() == [1, 1, 1, 1]
    assert affinity.together_KK[0].tolist() == [2, 2, 2, 1]
    cosine = affinity.cosine()
    assert torch.equal(cosine.diagonal(), torch.ones(4, dtype=torch.float64))
    assert float(cosine.abs().max()) <= 1
    expected = (first[0, 1] < 0).double() + (second[0, 1] < 0).double()
    assert affinity.conflict_rate()[0, 1] == expected / 2
    assert affinity.conflict_rate()[0, 3] == float(first[0, 3] < 0)


def test_halves_that_disagree_are_no_conflict_of_a_task_with_itself():
    """Measured in halves, <g_a, g_b> of one task can be negative: it counts in the mean and not as a conflict."""
    affinity = Affinity(("a", "b"), split=True)
    for step, own in enumerate((9.0, -1.0)):
        affinity.update(step, torch.tensor([[own, -2.0], [-2.0, 4.0]]), torch.tensor([1.0, 1.0]), 0.1)
    assert affinity.conflict_rate().tolist() == [[0, 1], [1, 0]]
    assert float(affinity.cosine()[0, 1]) == pytest.approx(-0.5)
    assert affinity.to_json()["split"] is True


def test_a_plain_mean_first_then_old_measures_fade():
    affinity, values = Affinity(("a", "b"), keep=0.75), [8.0, 4.0, 0.0, 4.0, 2.0, 10.0]
    expected = [8.0, 6.0, 4.0, 4.0, 3.5, 5.125]  # keep 0, 1/2, 2/3, 3/4, 3/4, 3/4
    for step, (value, mean) in enumerate(zip(values, expected, strict=True)):
        affinity.update(step, torch.tensor([[9.0, value], [value, 9.0]]), torch.tensor([1.0, 1.0]), 0.1)
        assert float(affinity.gram_KK[0, 1]) == pytest.approx(mean)


def test_pairs_never_seen_together():
    affinity = Affinity(TASKS)
    for step in range(6):
        gone = [[3], [2]][step % 2]  # c and d take turns
        affinity.update(step, random_gram(step, absent=gone), losses(gone), 0.1)
    assert affinity.cosine()[2, 3].isnan()
    assert affinity.conflict_rate()[2, 3].isnan()
    assert affinity.transfer()[2, 3].isnan()
    assert affinity.clusters(2).guessed == [(2, 3)]
    assert affinity.to_json()["cosine"][2][3] is None


def test_zero_gradient_and_zero_loss():
    affinity = Affinity(("a", "b"))
    affinity.update(1, torch.tensor([[1.0, 0.0], [0.0, 0.0]]), torch.tensor([1.0, 0.0]), 0.1)
    assert affinity.cosine()[0].tolist()[0] == 1
    assert affinity.cosine()[0, 1].isnan()
    assert affinity.transfer()[0, 1].isnan()
    json.dumps(affinity.to_json(), allow_nan=False)


def test_too_few_measures():
    with pytest.raises(UserError, match="measured 4 times; groups need at least 5"):
        measured(4).clusters()
    assert "clusters" not in measured(4).to_json()
    assert "clusters" in measured(5).to_json()


def test_resume_is_bit_equal():
    whole, first, second = measured(8), measured(5), Affinity(TASKS)
    second.load_state_dict(first.state_dict())
    for step in range(6, 9):
        second.update(step, random_gram(step), losses(), 0.1)
    assert second.to_json() == whole.to_json()
    for name, value in whole.state_dict().items():
        assert name == "tasks" or torch.equal(value.nan_to_num(), second.state_dict()[name].nan_to_num()), name
    with pytest.raises(UserError, match="of tasks a, b, c, d"):
        Affinity(("a", "b")).load_state_dict(first.state_dict())


def test_file_and_its_groups(tmp_path):
    affinity = Affinity(TASKS)
    for step in range(6):
        noise = 1e-3 * torch.randn(4, 4, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        J = torch.tensor([[1, 0], [1, 0.1], [0, 1], [0.1, 1]], dtype=torch.float64)
        affinity.update(step, J @ J.T + noise @ noise.T, losses(), 0.1)
    path = affinity.save(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["affinity.json"]
    assert read_groups(path, TASKS) == {"group-1": ["a", "b"], "group-2": ["c", "d"]}
    assert read_groups(path, ("b", "c", "new")) == {"group-1": ["b"], "group-2": ["c"]}
    with pytest.raises(UserError, match="other tasks"):
        read_groups(path, ("x", "y"))
    with pytest.raises(UserError, match="no such file"):
        read_groups(tmp_path / "none.json", TASKS)
    (tmp_path / "affinity.json").write_text(json.dumps(measured(3).to_json()))
    with pytest.raises(UserError, match="only 3 measurements"):
        read_groups(path, TASKS)
