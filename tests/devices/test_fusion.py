"""Every way through fusion on the simulated device: no CPU tensor meets a tensor of the device, tokens and scores are
those of the CPU.
"""

import contextlib

import numpy as np
import pytest
import torch

from mtft.adapters.routers import CentroidRouter
from mtft.fuse.alpha.spec import FusionSpec
from mtft.fuse.batch import jsonl_commands
from mtft.fuse.decoding.token_trace import TokenTrace
from mtft.fuse.expert_routing import PromptRouter
from mtft.fuse.fused_model import FusedCausalLM
from tests.devices.fusion_paths import IDS, IN_THE_FAST_SUITE, MASK, NEW, PATHS, SPECS
from tests.devices.simulated_device import Simulation, simulated_device, to_cpu, to_device
from tests.fuse import pairs, tiny
from tests.fuse.batch.test_jsonl_commands import read, recipe_of, write
from tests.fuse.conftest import folders
from tests.slow import slow

__all__ = ["folders"]


def move(fused):
    for model in (fused.strong, fused.weak.model, *fused.weak.own):
        to_device(model)
    return fused


def same(make, path, ids=IDS, mask=MASK):
    """What `path` gives on the device is what it gives on the CPU; returns the simulation."""
    expected = path(make(), ids, mask)
    with Simulation() as seen:
        found = to_cpu(path(move(make()), ids.to(simulated_device()), mask.to(simulated_device())))
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
    found, expected = (list(x.values()) if isinstance(x, dict) else [x] for x in (found, expected))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    return seen


@pytest.fixture
def double(folders):
    return lambda spec=None: tiny.fused(tiny.weak(folders["base"], [folders["one"], folders["odd"]]), spec)


@pytest.mark.parametrize(
    "path", [*IN_THE_FAST_SUITE, *slow(*(path for path in PATHS if path not in IN_THE_FAST_SUITE))]
)
def test_a_path_gives_on_the_device_what_it_gives_on_the_cpu(double, path):
    same(double, PATHS[path])


@pytest.mark.parametrize("spec", slow(*SPECS))
def test_a_rule_gives_on_the_device_what_it_gives_on_the_cpu(double, spec):
    same(lambda: double(SPECS[spec]), PATHS["a batch"])


def test_a_trace_is_the_same(double):
    def traced(fused, ids, mask):
        trace = TokenTrace(range(len(ids)))
        fused.generate(input_ids=ids, attention_mask=mask, trace=trace, **NEW)
        return torch.tensor([[step["alpha"] for step in trace.tokens[row]] for row in range(len(ids))])

    same(double, traced)


@pytest.mark.parametrize("speculative", [2, *slow(None)])
def test_routed_prompts(folders, tmp_path, speculative):
    noise = np.random.default_rng(0).normal(size=(6, 16))
    CentroidRouter.fit({"odd": noise, "one": noise + 0.1}).save(tmp_path / "router.safetensors")

    def make():
        adapters = [folders["one"], folders["odd"]]
        router = PromptRouter(tmp_path / "router.safetensors", adapters)
        return tiny.fused(tiny.weak(folders["base"], adapters), FusionSpec(weights="router"), router=router)

    same(make, lambda fused, ids, mask: fused.generate(
        input_ids=ids, attention_mask=mask, speculative=speculative, **NEW
    ))  # fmt: skip


@pytest.mark.filterwarnings("ignore:tokens")
def test_two_tokenizers_and_jsonl_files(tmp_path):
    """tokens: map, by the commands that decode and score files."""
    places = pairs.folders(tmp_path / "pair")
    strong = {"path": str(places["strong"]), "dtype": "fp32"}
    recipe = recipe_of(places, tmp_path, strong=strong, tokens="map", temperature=0.0, max_new_tokens=5)
    rows = [{"prompt": "the quick brown fox"}, {"prompt": "lazy"}, {"prompt": "over 12? dogs"}]
    scored = [row | {"response": " jumps over"} for row in rows]
    made = {}
    for place in ("cpu", "device"):
        fused = FusedCausalLM.load(
            places["strong"], places["small"], [places["expert"]], FusionSpec(tokens="map"), dtype="fp64", device="cpu"
        )
        with contextlib.nullcontext() if place == "cpu" else Simulation():
            fused = fused if place == "cpu" else move(fused)
            out = tmp_path / f"{place}.jsonl", tmp_path / f"{place}.scores.jsonl"
            jsonl_commands.generate(recipe, write(tmp_path / "in.jsonl", rows), out[0], fused=fused)
            jsonl_commands.score(recipe, write(tmp_path / "scored.jsonl", scored), out[1], fused=fused)
        made[place] = [read(path) for path in out]
    (texts, scores), (expected_texts, expected_scores) = made["device"], made["cpu"]
    assert [row["text"] for row in texts] == [row["text"] for row in expected_texts]
    for one, other in zip(scores, expected_scores, strict=True):
        assert one["logprob"] == pytest.approx(other["logprob"], rel=1e-9)
