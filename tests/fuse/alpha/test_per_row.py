"""Rows with specs of their own, fused together, equal each row by itself."""

import pytest
import torch

from mtft.fuse.alpha import per_row
from mtft.fuse.alpha.fused_logits import fuse_logits
from mtft.fuse.alpha.per_row import fuse_rows
from mtft.fuse.alpha.spec import FusionSpec

PLAIN = FusionSpec()
OWN = [FusionSpec(weights="user", user_weights=weights) for weights in ((0.3, 0.7), (1.0, 0.0), (0.5, 0.5), (0.3, 0.7))]


def logits(rows, seed=0):
    generator = torch.Generator().manual_seed(seed)
    strong, base, *noise = (torch.randn(rows, 50, generator=generator, dtype=torch.float64) for _ in range(4))
    return 2 * strong, [base + n for n in noise], base


@pytest.mark.parametrize(
    ("specs", "solves"),
    [
        (OWN, 1),
        ([PLAIN] * 4, 1),
        ([OWN[0], PLAIN, OWN[1], PLAIN], 2),
        ([FusionSpec(alpha_rule="fixed", alpha=1.5), OWN[2], PLAIN, FusionSpec(alpha_rule="forward")], 4),
        ([FusionSpec(alpha_rule="paper", weights="user", user_weights=(0.1, 0.9)), *OWN[1:]], 2),
    ],
)
def test_together_is_each_alone(monkeypatch, specs, solves):
    strong, experts, base = logits(4)
    calls = []
    monkeypatch.setattr(per_row, "fuse_logits", lambda *args, **kw: calls.append(1) or fuse_logits(*args, **kw))
    together = fuse_rows(strong, experts, base, specs)
    assert len(calls) == solves
    for row, spec in enumerate(specs):
        one = slice(row, row + 1)
        alone = fuse_logits(strong[one], [expert[one] for expert in experts], base[one], spec)
        for name in ("logprobs_NV", "alpha_NT", "scale_N", "kl_forward_N", "clipped_N"):
            assert torch.allclose(getattr(together, name)[one].double(), getattr(alone, name).double(), atol=1e-12)
