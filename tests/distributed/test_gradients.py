"""Task gradients of one step on two ranks, under every engine, are those of one process."""

import os
import subprocess

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.conftest import ROOT
from tests.gradients.tiny import K, batches, captured, distance, k_backwards, lora

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def found(warm_python, tmp_path_factory):
    folder = tmp_path_factory.mktemp("found")
    command = [warm_python, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    command += [str(ROOT / "tests" / "distributed" / "taps.py"), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return load_file(folder / "found.safetensors")


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "zero1", "zero2", "zero3"])
def test_two_ranks_find_what_one_finds(found, engine):
    model, parts = lora(), whole()
    taps, coef_K, _ = captured(model, parts)
    G_KK = taps.gram(coef_K)
    torch.testing.assert_close(found[f"{engine} gram"], G_KK, rtol=1e-5, atol=1e-8, equal_nan=True)
    J = {name: found[f"{engine} {name}"] for name in taps.covered}
    assert distance(J, k_backwards(model, parts)) < 1e-5


def whole():
    """The step of both ranks in one process: the same examples, whose tokens are drawn rank by rank in taps.py."""
    from tests.distributed.taps import DEALT

    return [part for rank in DEALT for rows in rank for part in batches([rows])]


def test_sum_of_the_ranks_own_gram_matrices_would_be_wrong():
    """Why J is summed first: what the two ranks have in common is lost otherwise."""
    from tests.distributed.taps import DEALT

    model, parts = lora(), whole()
    expected = captured(model, parts)
    own = torch.zeros(K, K, dtype=torch.float64)
    for rank in DEALT:
        taps, *_ = captured(model, [part for rows in rank for part in batches([rows])])
        own += taps.gram(torch.ones(K)).nan_to_num()
    total = expected[0].gram(torch.ones(K)).nan_to_num()
    assert float((own - total).abs().max()) > 0.1 * float(total.abs().max())
