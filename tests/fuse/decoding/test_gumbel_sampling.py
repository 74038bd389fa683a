import torch

from mtft.fuse.decoding import gumbel_sampling


def test_splitmix64():
    """First outputs of SplitMix64 from state 1234567, as in the Rosetta Code entry on it."""
    state = 1234567
    expected = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    uniform = gumbel_sampling.uniform([state], 5)[0]
    torch.testing.assert_close(
        uniform, torch.tensor([((x >> 11) + 0.5) * 2.0**-53 for x in expected], dtype=torch.float64), atol=0, rtol=0
    )


def test_draws_follow_the_distribution():
    """Chi-square against p, 6 ids, one of them impossible."""
    p = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05, 0.0], dtype=torch.float64)
    keys = [gumbel_sampling.key(1, sample, position) for sample in range(100) for position in range(200)]
    drawn = gumbel_sampling.sample(p.log().expand(len(keys), -1), keys)
    counts = torch.bincount(drawn, minlength=6).double()
    assert counts[5] == 0
    expected = p[:5] * len(keys)
    chi_square = float(((counts[:5] - expected) ** 2 / expected).sum())
    assert chi_square < 18.47  # 4 degrees of freedom, p = 1e-3


def test_every_part_of_the_key_matters():
    keys = [
        gumbel_sampling.key(*parts)
        for parts in ((1, 2, 3), (2, 1, 3), (1, 3, 2), (1, 2, 3, gumbel_sampling.ACCEPT), (-1, 2, 3))
    ]
    assert len(set(keys)) == 5
    noise = gumbel_sampling.uniform(keys, 4000)
    correlation = torch.corrcoef(noise) - torch.eye(5, dtype=torch.float64)
    assert correlation.abs().max() < 0.07  # about 4.4 standard errors
    assert noise.min() > 0
    assert noise.max() < 1


def test_noise_of_a_row_does_not_depend_on_its_neighbours_or_the_width():
    alone = gumbel_sampling.gumbel([7], 10)
    assert torch.equal(gumbel_sampling.gumbel([5, 7, 9], 30)[1:2, :10], alone)
