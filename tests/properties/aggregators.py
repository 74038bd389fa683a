"""What holds for every aggregator: assertions over Gram matrices of random gradients.

A `Make` builds a fresh aggregator. Directions are compared, not weights, where the gradients are linearly dependent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from mtft.gradients.aggregators import Aggregator

Make = Callable[[], Aggregator]
SHAPES = [(1, 3), (2, 3), (3, 5), (5, 40), (8, 8), (8, 4), (12, 300)]


def jacobian(K: int, D: int, seed: int, shift: float = 0.0) -> Tensor:
    """[K, D] float64 of unlike lengths; shift < 0: conflicts. D < K: linearly dependent."""
    generator = torch.Generator().manual_seed(seed)
    direction_KD = torch.randn(K, D, generator=generator, dtype=torch.float64)
    length_K1 = torch.exp(torch.randn(K, 1, generator=generator, dtype=torch.float64))
    return length_K1 * (direction_KD + shift * direction_KD.mean(dim=0))


def jacobians() -> Iterator[Tensor]:
    for seed, (K, D) in enumerate(SHAPES):
        for shift in (-0.5, 0.0, 1.5):
            yield jacobian(K, D, seed, shift)


def direction(make: Make, jacobian_KD: Tensor, p_K: Tensor | None = None) -> Tensor:
    return jacobian_KD.T @ make().weights(jacobian_KD @ jacobian_KD.T, p_K, step=3)


def close(a: Tensor, b: Tensor, scale: Tensor, tolerance: float = 1e-6) -> None:
    assert (a - b).norm() <= tolerance * scale, (a, b)


def assert_finite_float64_of_every_task(make: Make) -> None:
    for J in jacobians():
        alpha_K = make().weights(J @ J.T)
        assert alpha_K.shape == (len(J),)
        assert alpha_K.dtype == torch.float64
        assert alpha_K.isfinite().all()


def assert_single_task_keeps_its_direction(make: Make) -> None:
    J = jacobian(1, 5, 0)
    d = direction(make, J)
    assert torch.cosine_similarity(d, J[0], dim=0) > 1 - 1e-12


def assert_permutes_with_the_tasks(make: Make) -> None:
    for J in jacobians():
        order = torch.randperm(len(J), generator=torch.Generator().manual_seed(1))
        close(direction(make, J[order]), direction(make, J), J.norm(), 1e-5)


def assert_does_not_depend_on_a_rotation(make: Make) -> None:
    """By construction: only G is seen. Padding with zeros and rotating leave it as it is."""
    for J in jacobians():
        wide = torch.cat([J, torch.zeros(len(J), 2, dtype=J.dtype)], dim=1)
        generator = torch.Generator().manual_seed(2)
        turn, _ = torch.linalg.qr(torch.randn(wide.shape[1], wide.shape[1], generator=generator, dtype=J.dtype))
        close(direction(make, wide @ turn), direction(make, wide) @ turn, J.norm(), 1e-5)


def assert_equal_gradients_stay_what_they_are(make: Make) -> None:
    """Ties: the same gradient three times points where it points."""
    J = jacobian(1, 6, 4).repeat(3, 1)
    d = direction(make, J)
    assert d.isfinite().all()
    assert torch.cosine_similarity(d, J[0], dim=0) > 1 - 1e-9


def assert_zero_matrix_gives_no_nan(make: Make) -> None:
    alpha_K = make().weights(torch.zeros(4, 4, dtype=torch.float64))
    torch.testing.assert_close(alpha_K, torch.full((4,), 0.25, dtype=torch.float64))


def assert_zero_row_is_finite(make: Make) -> None:
    J = jacobian(4, 6, 5)
    J[2] = 0
    assert make().weights(J @ J.T).isfinite().all()


def assert_rank_one_is_finite(make: Make) -> None:
    """All gradients on one line, some against others."""
    line_K1 = torch.tensor([[1.0], [-2.0], [0.5], [3.0]], dtype=torch.float64)
    J = line_K1 * jacobian(1, 6, 6)
    alpha_K = make().weights(J @ J.T)
    assert alpha_K.isfinite().all()
    assert (J.T @ alpha_K).norm() <= 20 * J.norm()


def assert_any_scale_is_finite(make: Make) -> None:
    """Lengths of 1e-10 to 1e10, all together and one against the other."""
    for scale in (1e-10, 1e-5, 1e5, 1e10):
        J = jacobian(4, 6, 7, shift=-0.5)
        assert make().weights(scale**2 * (J @ J.T)).isfinite().all()
        J[1] *= scale
        assert make().weights(J @ J.T).isfinite().all()


def assert_common_scale_keeps_the_direction(make: Make) -> None:
    J = jacobian(5, 9, 8, shift=-0.4)
    plain, scaled = direction(make, J), direction(make, 1e-4 * J)
    assert torch.cosine_similarity(plain, scaled, dim=0) > 1 - 1e-7


def assert_absent_tasks_take_no_part(make: Make) -> None:
    """NaN row and column = absent: the others get what they would get alone."""
    J = jacobian(5, 9, 9, shift=-0.4)
    G = J @ J.T
    G[3], G[:, 3] = torch.nan, torch.nan
    here = [0, 1, 2, 4]
    alpha_K = make().weights(G, step=3)
    assert alpha_K[3] == 0
    torch.testing.assert_close(alpha_K[here], make().weights(J[here] @ J[here].T, step=3))
    assert torch.equal(make().weights(torch.full((3, 3), torch.nan)), torch.zeros(3, dtype=torch.float64))


def assert_task_without_preference_takes_no_part(make: Make) -> None:
    J = jacobian(4, 9, 10, shift=-0.4)
    alpha_K = make().weights(J @ J.T, torch.tensor([1.0, 0.0, 1.0, 1.0]), step=3)
    here = [0, 2, 3]
    assert alpha_K[1] == 0
    torch.testing.assert_close(alpha_K[here], make().weights(J[here] @ J[here].T, step=3))


def assert_only_the_ratio_of_preferences_counts(make: Make) -> None:
    J, p_K = jacobian(4, 9, 11, shift=-0.4), torch.tensor([1.0, 2.0, 0.5, 3.0], dtype=torch.float64)
    G = J @ J.T
    torch.testing.assert_close(make().weights(G, p_K, step=2), make().weights(G, 7 * p_K, step=2), rtol=1e-6, atol=1e-9)


def assert_same_inputs_same_bits(make: Make) -> None:
    """Two ranks with the same Gram matrix, or a resumed run, get the same weights."""
    J = jacobian(6, 9, 12, shift=-0.5)
    one, two = make(), make()
    two.weights(2 * J @ J.T, step=1)  # what was asked before does not matter
    two.load_state_dict(one.state_dict())
    assert torch.equal(one.weights(J @ J.T, step=8), two.weights(J @ J.T, step=8))
