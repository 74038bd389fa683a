"""What a fused token asks of the host: waits do not grow with the rows, and the root solver makes no passes in vain."""

import pytest
import torch

from mtft.fuse.alpha.fused_logits import fuse_logits
from mtft.fuse.alpha.spec import FusionSpec
from mtft.fuse.server.batch_engine import BatchEngine
from mtft.fuse.server.jobs import GenerationJob
from tests.devices.simulated_device import DeviceTensor, Simulation, simulated_device
from tests.devices.test_fusion import folders, move
from tests.fuse import tiny

__all__ = ["folders"]

GREEDY = 4  # the reach of the expert, two looks at the root, which rows have ended
SAMPLED = GREEDY + 1  # the keys of the draws are copied to the device
PADDED = 2  # in each of the two models, transformers looks whether a mask hides anything


@pytest.fixture
def single(folders):
    return move(tiny.fused(tiny.weak(folders["base"], [folders["one"]], torch.float32)))


@pytest.mark.parametrize("rule", ["forward", "jeffreys"])
@pytest.mark.parametrize("scale", [0.1, 1.0, 5.0])
def test_a_root_on_a_device_takes_one_pass_more_at_most(rule, scale):
    generator = torch.Generator().manual_seed(3)
    strong, expert, base = (scale * torch.randn(1, 500, generator=generator) for _ in range(3))
    spec = FusionSpec(alpha_rule=rule)
    expected = fuse_logits(strong, [expert], base, spec)
    with Simulation():
        found = fuse_logits(DeviceTensor(strong), [DeviceTensor(expert)], DeviceTensor(base), spec)
    assert found.evaluations <= expected.evaluations + 1


def waits_a_token(fused, rows, **options):
    """How many more waits a longer answer has, per token."""
    ids = torch.arange(3, 3 + 4 * rows).view(rows, 4) % 50 + 3
    counts = []
    for tokens in (4, 10):
        with Simulation() as seen:
            fused.generate(
                input_ids=ids.to(simulated_device()), max_new_tokens=tokens, eos_token_id=2, pad_token_id=0, **options
            )
        counts.append(len(seen.waits))
        told = seen.told()
    return (counts[1] - counts[0]) / 6, told


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize(("options", "bound"), [({}, GREEDY), ({"do_sample": True, "seed": 3}, SAMPLED)])
def test_a_token_has_few_waits(single, rows, options, bound):
    waits, told = waits_a_token(single, rows, **options)
    assert waits <= bound, told


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_step_of_the_server_has_few_waits(single, rows, temperature):
    single.tokenizer, single.generation_config.eos_token_id = tiny.tokenizer(61), None
    engine = BatchEngine(single)
    jobs = [
        GenerationJob(
            list(range(3, 6 + row)), 9, single.spec, lambda _: None, temperature=temperature, top_p=0.9, seed=row, top=2
        )
        for row in range(rows)
    ]
    with Simulation() as seen:
        engine._begin(jobs)
        engine._read_prompts()
        seen.waits.clear()
        for _ in range(4):
            engine._step()
    assert len(engine.running) == rows
    bound = (SAMPLED if temperature else GREEDY) + (PADDED if rows > 1 else 0)
    assert len(seen.waits) / 4 <= bound, seen.told()
