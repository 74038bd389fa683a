"""F-MTL and SAMO on quadratics (golden), on nothing, in the limit, and what they leave behind: the same bits."""

from __future__ import annotations

import pytest
import torch

from mtft.experimental.flat_minima import f_mtl, perturbed_weights, samo
from mtft.gradients.aggregators import make_aggregator
from mtft.gradients.gramian import combine

H = torch.tensor([[[1, 0], [0, 4]], [[2, 1], [1, 2]]], dtype=torch.float64)
CENTRE = torch.tensor([[1, 0], [-1, 1]], dtype=torch.float64)
BOTH = torch.tensor([True, True])


def fp64(*values):
    return torch.tensor(values, dtype=torch.float64)


class Quadratics:
    """L_k = 1/2 (theta - c_k)^T H_k (theta - c_k), theta in one or two tensors."""

    def __init__(self, theta=(0.5, -0.5), split=False):
        whole = fp64(*theta)
        self.parameters = {"a": whole[:1].clone(), "b": whole[1:].clone()} if split else {"theta": whole}
        self.calls = 0

    def theta(self):
        return torch.cat(list(self.parameters.values()))

    def gradient(self, k):
        self.calls += 1
        flat = H[k] @ (self.theta() - CENTRE[k])
        sizes = [len(p) for p in self.parameters.values()]
        return dict(zip(self.parameters, flat.split(sizes), strict=True))

    def losses(self):
        off = self.theta() - CENTRE
        return torch.einsum("ki,kij,kj->k", off, H, off) / 2

    def jacobian(self):
        rows = [self.gradient(k) for k in range(2)]
        return {name: torch.stack([row[name] for row in rows]) for name in self.parameters}


def mean(G):
    return make_aggregator("dualproj", {"epsilon": 1e-12}).weights(torch.eye(len(G)).double() + 0 * G)


def flat(direction):
    return torch.cat(list(direction.values()))


@pytest.mark.parametrize("split", [False, True])
def test_f_mtl_golden(split):
    q = Quadratics(split=split)
    direction, G = f_mtl(q.parameters, q.jacobian(), q.gradient, mean, BOTH, rho=0.1)
    torch.testing.assert_close(flat(direction), fp64(0.523229, -1.979384), rtol=0, atol=1e-6)
    torch.testing.assert_close(G, fp64([4.25, 2.25], [2.25, 4.5]))
    mgda = make_aggregator("mgda").weights
    direction, _ = f_mtl(q.parameters, q.jacobian(), q.gradient, mgda, BOTH, rho=0.1)
    torch.testing.assert_close(flat(direction), fp64(0.511887, -1.835417), rtol=0, atol=1e-6)


def test_f_mtl_adaptive():
    """eps_k = rho theta^2 g_k / | |theta| g_k |; here |theta| = 1/2 everywhere: half as long."""
    q = Quadratics()
    adaptive, _ = f_mtl(q.parameters, q.jacobian(), q.gradient, mean, BOTH, rho=0.1, adaptive=True)
    plain, _ = f_mtl(q.parameters, q.jacobian(), q.gradient, mean, BOTH, rho=0.05)
    torch.testing.assert_close(flat(adaptive), flat(plain))


def test_samo_golden():
    q, seen = Quadratics(), []

    def gradient(k):
        seen.append(q.gradient(k)["theta"])
        return {"theta": seen[-1]}

    options = {"p_K": fp64(1, 1), "noise": lambda: iter([fp64(1, -1)]), "rho": 0.1, "beta": 0.5}
    direction, G = samo(q.parameters, q.jacobian(), gradient, q.losses, mean, BOTH, **options)
    torch.testing.assert_close(
        torch.stack(seen), fp64([-0.449287, -2.344748], [1.515238, -1.621661]), rtol=0, atol=1e-6
    )
    torch.testing.assert_close(direction["theta"], torch.stack(seen).mean(dim=0))
    torch.testing.assert_close(G, fp64([4.25, 2.25], [2.25, 4.5]))


def test_samo_norms_are_per_tensor():
    """m_k of each tensor mixes its own g0 and its own z: two tensors of one number each."""
    q, seen = Quadratics(split=True), []

    def gradient(k):
        seen.append(q.theta().clone())
        return q.gradient(k)

    options = {"p_K": fp64(1, 1), "noise": lambda: iter([fp64(1.0), fp64(-1.0)]), "rho": 0.1, "beta": 0.25}
    samo(q.parameters, q.jacobian(), gradient, q.losses, mean, BOTH, **options)
    g0 = fp64(0.5, -1.75)
    m = 0.75 * g0 + 0.25 * g0.abs() * fp64(1, -1)  # both slopes are positive along z = (1, -1)
    torch.testing.assert_close(seen[0] - fp64(0.5, -0.5), 0.1 * m / m.norm())


def test_small_rho_is_the_aggregator():
    q, mgda = Quadratics(), make_aggregator("mgda").weights
    J = q.jacobian()
    plain = combine(J, mgda(J["theta"] @ J["theta"].T))
    direction, _ = f_mtl(q.parameters, J, q.gradient, mgda, BOTH, rho=1e-9)
    torch.testing.assert_close(direction["theta"], plain["theta"], rtol=0, atol=1e-7)
    options = {"p_K": fp64(1, 1), "noise": lambda: iter([fp64(1, -1)]), "rho": 1e-9}
    direction, _ = samo(q.parameters, J, q.gradient, q.losses, mgda, BOTH, **options)
    torch.testing.assert_close(direction["theta"], plain["theta"], rtol=0, atol=1e-7)


def test_restore_bit_equal():
    """Where x + e - e is not x, and after an error in the middle."""
    theta = torch.tensor([1e-8, 1.0, 3e7, -0.1])
    kept, change = theta.clone(), {"theta": torch.tensor([1.0, 1e-7, 0.3, 7.7])}
    assert not torch.equal(theta + change["theta"] - change["theta"], theta)
    with perturbed_weights({"theta": theta}, change):
        assert torch.equal(theta, kept + change["theta"])
    assert torch.equal(theta, kept)
    with pytest.raises(RuntimeError, match="on the way"), perturbed_weights({"theta": theta}, change):
        raise RuntimeError("on the way")
    assert torch.equal(theta, kept)


def test_absent_task_and_zero_gradient():
    q = Quadratics()
    J = {"theta": torch.stack([q.gradient(0)["theta"], torch.full((2,), torch.nan, dtype=torch.float64)])}
    q.calls = 0
    one = torch.tensor([True, False])
    direction, G = f_mtl(q.parameters, J, q.gradient, make_aggregator("upgrad").weights, one, rho=0.1)
    assert q.calls == 1
    assert G[1].isnan().all()
    assert direction["theta"].isfinite().all()
    # At the minimum of both: no gradient, no perturbation, no direction.
    H0, still = {"theta": torch.zeros(2, 2, dtype=torch.float64)}, {"theta": fp64(1, 0)}
    direction, _ = f_mtl(still, H0, lambda k: {"theta": H[0] @ (still["theta"] - fp64(1, 0))}, mean, BOTH)
    assert torch.equal(direction["theta"], fp64(0, 0))
