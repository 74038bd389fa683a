"""A batch goes to the device without a wait, and what depends on its values is known there without one."""

from dataclasses import replace

import pytest
import torch

from mtft.data.batching.batch import IGNORE
from mtft.data.batching.packed_attention import model_inputs
from tests.devices.simulated_device import Simulation, simulated_device, to_cpu
from tests.losses.builders import lay_out, random_samples

DEVICE = simulated_device()


def packed_batch():
    one, two, three = random_samples([(0, 6, 3), (1, 4, 2), (0, 7, 1)], vocabulary=20)
    return lay_out([[one, two], [three]])


@pytest.mark.parametrize("pinned", [False, True])
def test_it_is_copied_without_a_wait_with_what_is_asked_of_it(pinned):
    batch = packed_batch()
    with Simulation() as seen:
        source = batch.pin_memory() if pinned else batch
        moved = source.to(DEVICE)
        packed, positions = moved.packed, moved.supervised_N
        flash = model_inputs(moved, "flash_attention_2")
        assert moved.host is source
        assert moved.to(DEVICE) is moved
        assert seen.waits == []
        assert {x.device for x in (moved.labels_BT, positions, flash["cu_seq_lens_q"])} == {DEVICE}
    assert packed == batch.packed
    assert torch.equal(to_cpu(positions), (batch.labels_BT != IGNORE).flatten().nonzero()[:, 0])
    expected = model_inputs(batch, "flash_attention_2")
    assert torch.equal(to_cpu(flash["cu_seq_lens_q"]), expected["cu_seq_lens_q"])
    assert flash["max_length_q"] == expected["max_length_q"]


def test_a_changed_batch_forgets_what_was_known_of_the_old_one():
    batch = packed_batch()
    assert len(batch.supervised_N) > 0
    assert len(replace(batch, labels_BT=torch.full_like(batch.labels_BT, IGNORE)).supervised_N) == 0
    with Simulation():
        moved = batch.to(DEVICE)
        changed = replace(moved, labels_BT=torch.full_like(moved.labels_BT, IGNORE))
        assert len(changed.supervised_N) == len(changed.host.supervised_N) == 0
        half = batch.map(lambda x: x[:1]).to(DEVICE)
        assert half.supervised_N.tolist() == batch.map(lambda x: x[:1]).supervised_N.tolist()
