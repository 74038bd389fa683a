"""The count sketch keeps inner products, and is the same for the same seed."""

import numpy as np
import torch

from mtft.gradients import sketch as module
from mtft.gradients.sketch import sketch


def gradient(seed, mix=None):
    generator = torch.Generator().manual_seed(seed)
    return {"b": torch.randn(40, 50, generator=generator), "a": torch.randn(300, generator=generator)}


def test_inner_products_are_kept_on_average():
    one, other = gradient(1), gradient(2)
    other = {name: 0.5 * one[name] + value for name, value in other.items()}
    true = [float(sum((x[n] * y[n]).sum() for n in one)) for x, y in ((one, one), (one, other))]
    found = np.array(
        [[float(sketch(one, 256, seed=s) @ sketch(x, 256, seed=s)) for x in (one, other)] for s in range(60)]
    )
    np.testing.assert_allclose(found.mean(axis=0), true, rtol=0.05)
    assert found.std(axis=0)[0] < 2 * true[0] * np.sqrt(2 / 256)


def test_it_is_linear_and_does_not_depend_on_pieces_or_order(monkeypatch):
    one, other = gradient(3), gradient(4)
    whole = sketch({name: one[name] + 2 * other[name] for name in one}, 64, seed=5)
    torch.testing.assert_close(whole, sketch(one, 64, seed=5) + 2 * sketch(other, 64, seed=5), rtol=1e-5, atol=1e-4)
    assert torch.equal(sketch(one, 64, seed=5), sketch(dict(reversed(one.items())), 64, seed=5))
    assert not torch.equal(sketch(one, 64, seed=5), sketch(one, 64, seed=6))
    monkeypatch.setattr(module, "PIECE", 128)
    assert torch.isfinite(sketch(one, 64, seed=5)).all()
