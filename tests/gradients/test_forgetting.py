"""Which modules forgot: exact on quadratics, ranked by what the old tasks lost."""

from __future__ import annotations

import pytest
import torch

from mtft.gradients.forgetting import forgetting, module_of, select_forgetful_modules, totals

A, B = "base.layers.0.q_proj.lora_A.default.weight", "base.layers.0.q_proj.lora_B.default.weight"
C = "base.layers.1.up_proj.lora_A.default.weight"


def fp64(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_module_of():
    assert module_of(A) == module_of(B) == "base.layers.0.q_proj"
    assert module_of("base.norm.weight") == "base.norm"


def test_adds_up_to_the_change_of_the_loss_on_quadratics():
    """L_k = 1/2 (theta - c_k)^T H_k (theta - c_k) over parameters in three tensors: exact, however far one goes."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    shapes = {A: (2, 3), B: (3, 2), C: (2, 2)}
    sizes = [6, 6, 4]
    H, centre = normal(2, 16, 16), normal(2, 16)
    H = H @ H.transpose(1, 2)
    start, end = normal(16), normal(16)

    def split(flat):
        parts = flat.split(sizes, dim=-1)
        return {name: part.reshape(*flat.shape[:-1], *shapes[name]) for name, part in zip(shapes, parts, strict=True)}

    def gradients(at):
        return split(torch.einsum("kij,kj->ki", H, at - centre))

    def loss(at):
        return torch.einsum("ki,kij,kj->k", at - centre, H, at - centre) / 2

    parts = forgetting(gradients(start), gradients(end), split(end - start))
    assert set(parts) == {"base.layers.0.q_proj", "base.layers.1.up_proj"}
    torch.testing.assert_close(totals(parts), loss(end) - loss(start))
    # A module that did not move did nothing.
    still = split(end - start) | {C: torch.zeros(2, 2, dtype=torch.float64)}
    assert torch.equal(
        forgetting(gradients(start), gradients(end), still)["base.layers.1.up_proj"], torch.zeros(2).double()
    )


def test_fewest_modules_that_hold_the_share():
    parts = {"a": fp64(1.0, 9.0), "b": fp64(5.0, 0.0), "c": fp64(-8.0, 0.0), "d": fp64(4.0, -9.0), "e": fp64(0.0, 0.0)}
    assert select_forgetful_modules(parts, [0], 0.5) == ["b"]
    assert select_forgetful_modules(parts, [0], 0.51) == ["b", "d"]
    assert select_forgetful_modules(parts, [0], 1.0) == [
        "b",
        "d",
        "a",
    ]  # c gained: that does not make up for the others
    assert select_forgetful_modules(parts, [0, 1], 0.5) == ["a"]
    assert select_forgetful_modules({"c": fp64(-8.0)}, [0], 0.5) == []
    with pytest.raises(ValueError, match="share"):
        select_forgetful_modules(parts, [0], 0.0)


def test_other_parameters_are_an_error():
    with pytest.raises(ValueError, match="not of the same parameters"):
        forgetting({A: torch.zeros(1, 2)}, {A: torch.zeros(1, 2)}, {B: torch.zeros(2)})
