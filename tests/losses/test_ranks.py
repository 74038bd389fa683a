"""Two gloo processes: the collectives of the objective give what one process has for the whole step."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from mtft.losses.sample_weights import SampleWeights
from mtft.losses.task_reduction import count, reduce_sums, step_counts, task_sums
from tests.losses.test_task_reduction import GOLDEN, golden_batch

WHOLE = [*GOLDEN, (0, [0.3]), (2, [1.0, 0.2])]
PARTS = (WHOLE[:5], WHOLE[5:])  # the second rank lacks task 1


def one_rank(rank: int, store: str, out: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    batch, nll_BT = golden_batch(PARTS[rank])
    nothing, _ = golden_batch([(3, [])])
    weights_BT = (batch.labels_BT >= 0) * (0.1 + rank + torch.arange(6))
    own = replace(batch, token_weights_BT=weights_BT, row_weights_BT=None if rank else 0.7 * (batch.task_ids_BT >= 0))
    result = {
        "weighted": torch.stack(step_counts([own, nothing], 4)),
        "own": torch.stack(count(own, 4)),
        "counts": torch.stack(step_counts([batch, nothing], 4)),
        "sums": torch.stack(reduce_sums([task_sums(nll_BT, batch, 4)], 4)),
        "none": torch.stack(step_counts([], 4)),
        **{rule: SampleWeights(rule).factors(1000, nll_BT, batch, 4)[:, 1] for rule in ("linupper", "extremes")},
    }
    torch.save(result, f"{out}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_are_one(tmp_path):
    mp.spawn(one_rank, args=(str(tmp_path / "store"), str(tmp_path)), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    batch, nll_BT = golden_batch(WHOLE)
    for rank in ranks:
        torch.testing.assert_close(rank["weighted"], ranks[0]["own"] + ranks[1]["own"], rtol=1e-14, atol=0)
        assert torch.equal(rank["counts"], torch.stack(count(batch, 4)))
        torch.testing.assert_close(rank["sums"], torch.stack(task_sums(nll_BT, batch, 4)))
        assert not rank["none"].any()
    for rule in ("linupper", "extremes"):
        u_M = SampleWeights(rule).factors(1000, nll_BT, batch, 4)[:, 1]
        torch.testing.assert_close(torch.cat([rank[rule] for rank in ranks]), u_M)
