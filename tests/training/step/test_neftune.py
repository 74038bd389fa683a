"""NEFTune: the size of the noise is the paper's, and no split, packing, evaluation or break of a run changes it."""

import math
import signal

import numpy as np
import pytest
import torch

from mtft.data.batching.batches import collate
from mtft.data.tokenize.encode import Example
from mtft.training.step.neftune import Neftune
from tests.slow import slow
from tests.training.test_run_training import kill_at_step, picture, recipe_in, run
from tests.training.test_trainer import first_gradients, lines, trainer_for


def batch_of(examples, width):
    """One row of these examples (lists of ids), padded to `width`."""
    made = [Example(np.array(ids, np.int32), np.ones(len(ids), bool)) for ids in examples]
    batch = collate([[(example, 0) for example in made]], 0)
    assert batch.input_ids_BT.shape[1] <= width
    return batch


class Holder(torch.nn.Module):
    """A model with nothing but embeddings."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(10, 32)

    def get_input_embeddings(self):
        return self.table


@pytest.fixture
def noise():
    noise = Neftune(Holder(), 5.0, 1)
    noise.step = 1
    return noise


def test_size_and_spread(noise):
    drawn = noise.draw(batch_of([[1] * 400], 400), 32)[0]
    bound = 5.0 / math.sqrt(400 * 32)
    assert float(drawn.abs().max()) <= bound
    assert float(drawn.mean()) == pytest.approx(0, abs=bound / 50)
    assert float(drawn.var()) == pytest.approx(bound**2 / 3, rel=0.05)  # uniform


def test_an_example_draws_the_same_wherever_it_stands(noise):
    """Its own length counts, not the row's; its step and its tokens, not its place."""
    alone = noise.draw(batch_of([[4, 5, 6]], 3), 32)[0]
    packed = noise.draw(batch_of([[7, 8], [4, 5, 6], [9]], 6), 32)[0]
    assert torch.equal(packed[2:5], alone)
    assert not torch.equal(packed[:1], packed[5:])
    noise.step = 2
    assert not torch.equal(noise.draw(batch_of([[4, 5, 6]], 3), 32)[0], alone)


def test_only_in_training_and_only_inside():
    ids = torch.tensor([[1, 2, 3]])
    model = Holder()
    noise = Neftune(model, 5.0, 1)
    batch = batch_of([[1, 2, 3]], 3)
    plain = model.table(ids)
    with noise.on(batch):
        assert not torch.equal(model.table(ids), plain)
        model.eval()
        assert torch.equal(model.table(ids), plain)
    model.train()
    assert torch.equal(model.table(ids), plain)


@pytest.mark.parametrize("size, packing", [(100, False), *slow((2048, True), (2048, False))])
def test_the_split_of_a_step_does_not_matter(recipe, tmp_path, size, packing):
    asked = {"neftune": 5.0, "learning_rate": 1e-9}
    reference = first_gradients(recipe, tmp_path, micro_batch_tokens=64, packing=False, **asked)
    without = first_gradients(recipe, tmp_path, micro_batch_tokens=64, packing=False)
    found = first_gradients(recipe, tmp_path, micro_batch_tokens=size, packing=packing, **asked)
    scale = max(float(value.abs().max()) for value in reference.values())
    for name, value in reference.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6 * scale)
    assert any(float((value - without[name]).abs().max()) > 1e-3 * scale for name, value in reference.items())


def test_held_out_losses_have_no_noise(recipe, tmp_path):
    losses = []
    for name, scale in (("plain", 0.0), ("noisy", 50.0)):
        trainer, *_ = trainer_for(recipe, tmp_path / name, train={**recipe["train"], "neftune": scale})
        trainer.evaluate()
        losses.append({task: scores.summary()["loss"] for task, scores in trainer.evaluations[0].items()})
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_a_broken_run_draws_the_same(recipe, tmp_path):
    whole = recipe_in(recipe, tmp_path / "run", train={"neftune": 5.0})
    assert run(whole) == 0
    broken = recipe_in(recipe, tmp_path / "broken", train={"neftune": 5.0})
    assert run(broken, kill_at_step(5)) == -signal.SIGKILL
    assert run(broken) == 0
    assert picture(tmp_path / "broken") == picture(tmp_path / "run")
    assert len(lines(tmp_path / "run")) == 8
