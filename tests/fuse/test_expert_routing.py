"""Weights from a router: those that the merge room's router gives, per prompt, whatever stands beside it."""

import json

import numpy as np
import pytest
import torch

from mtft.adapters.routers import CentroidRouter
from mtft.fuse.alpha.spec import FusionError, FusionSpec
from mtft.fuse.decoding.multi_lora import BASE
from mtft.fuse.expert_routing import PromptRouter
from mtft.fuse.fused_model import FusedCausalLM
from mtft.fuse.server.batch_engine import BatchEngine
from mtft.fuse.server.jobs import GenerationJob
from mtft.merge.experts.arrow_prototypes import arrow_router
from mtft.models.hidden_states import last_token_states
from tests.fuse import tiny

IDS, MASK = tiny.prompts()
CALL = {"input_ids": IDS, "attention_mask": MASK, "max_new_tokens": 8, "pad_token_id": 0, "eos_token_id": None}
ROUTED = FusionSpec(weights="router")


def state(small, ids):
    small.layout.set((BASE,), 1)
    with torch.no_grad():
        return last_token_states(small.model, ids[None]).double().numpy()


def alone(row):
    return IDS[row][MASK[row].bool()]


@pytest.fixture(scope="module")
def small(folders):
    return tiny.weak(folders["base"], [folders["one"], folders["odd"]])


@pytest.fixture(scope="module")
def file(small, tmp_path_factory):
    """A router whose names stand in another order than the experts: `odd` for what is like row 0, `one` for row 1."""
    noise = np.random.default_rng(0).normal(size=(6, 16)) * 0.01
    states = {"odd": state(small, alone(0)) + noise, "one": state(small, alone(1)) + noise}
    path = tmp_path_factory.mktemp("router") / "router.safetensors"
    CentroidRouter.fit(states, temperature=2e5).save(path)  # so mild that weights are neither 0 nor 1
    return path


@pytest.fixture(scope="module")
def routed(small, folders, file):
    return tiny.fused(small, ROUTED, router=PromptRouter(file, [folders["one"], folders["odd"]]))


@pytest.fixture(scope="module")
def weights(small, file):
    router = CentroidRouter.load(file)
    found = [router.probabilities(state(small, alone(row)))[0][::-1].tolist() for row in range(len(IDS))]
    assert all(0.01 < w < 0.99 for row in found for w in row)
    assert found[0][1] > 0.5
    assert found[1][0] > 0.5
    return found


@pytest.mark.parametrize("speculative", [None, 2])
def test_generate_is_generate_with_the_routers_weights(routed, double, weights, speculative):
    call = CALL | {"speculative": speculative}
    assert torch.equal(routed.generate(**call), double.generate(**call, expert_weights=weights))


def test_score_takes_the_prompt_alone(routed, double, weights):
    """Two tokens of each row are judged; the router sees what stands before them."""
    more = torch.cat([IDS, torch.full((3, 2), 9)], 1)
    mask = torch.cat([MASK, torch.ones(3, 2, dtype=torch.long)], 1)
    wanted = torch.zeros_like(mask)
    wanted[:, -2:] = 1
    mine = routed.score(more, mask, wanted)
    for row in range(3):
        there = FusionSpec(weights="user", user_weights=tuple(weights[row]))
        fixed = tiny.fused(double.weak, there)
        theirs = fixed.score(more[row : row + 1], mask[row : row + 1], wanted[row : row + 1])
        assert torch.allclose(mine.logprob_BL[row], theirs.logprob_BL[0], atol=1e-12)


def test_the_servers_engine_routes_each_job(routed, double, weights, monkeypatch):
    monkeypatch.setattr(routed, "tokenizer", tiny.tokenizer())
    answers = {row: [] for row in range(3)}
    engine = BatchEngine(routed)
    jobs = [
        GenerationJob(
            alone(row).tolist(), 8, routed.spec, lambda event, row=row: answers[row].append(event), temperature=0.0
        )
        for row in range(3)
    ]
    monkeypatch.setattr(routed.generation_config, "eos_token_id", None)
    engine.submit(jobs)
    engine.start()
    engine.stop()
    expected = double.generate(**CALL, expert_weights=weights)[:, IDS.shape[1] :]
    for row, events in answers.items():
        assert [score.id for event in events for score in event.tokens] == expected[row].tolist()


def test_a_sure_router_is_that_expert_alone(small, single, folders, file, tmp_path):
    sure = CentroidRouter.load(file)
    CentroidRouter(sure.names, sure.centroids_KD, sure.sigma_D, 1e-6).save(tmp_path / "sure.safetensors")
    router = PromptRouter(tmp_path / "sure.safetensors", [folders["one"], folders["odd"]])
    assert router.weights(small, alone(1)) == (1.0, 0.0)
    one = {"input_ids": IDS[1:2], "attention_mask": MASK[1:2], "max_new_tokens": 8, "pad_token_id": 0}
    assert torch.equal(tiny.fused(small, ROUTED, router=router).generate(**one), single.generate(**one))


def test_names_are_found_in_paths(file, tmp_path):
    for folders in (["a/expert_one", "b/odd"], ["runs/one/adapter", "runs/odd/adapter"]):
        assert PromptRouter(file, folders).order == [1, 0]
    with pytest.raises(FusionError, match="No part of its path"):
        PromptRouter(file, ["one", "two"])
    with pytest.raises(FusionError, match="the router knows odd, one"):
        PromptRouter(file, ["one", "one"])


def test_what_can_not_be_routed_is_refused(routed, small, folders, file, tmp_path):
    arrow_router([folders["one"], folders["two"]]).save(tmp_path / "arrow.safetensors")
    with pytest.raises(FusionError, match="an Arrow router"):
        PromptRouter(tmp_path / "arrow.safetensors", [folders["one"], folders["two"]])
    with pytest.raises(FusionError, match="where the prompt ends"):
        routed(IDS, MASK)
    with pytest.raises(FusionError, match="there is no router"):
        tiny.fused(small, ROUTED).generate(**CALL)
    with pytest.raises(FusionError, match="there is no router"):
        FusedCausalLM.load(folders["base"], folders["base"], [folders["one"]], ROUTED)
    (tmp_path / "router.safetensors").write_bytes(file.read_bytes())
    (tmp_path / "twin.json").write_text(json.dumps({"with_shared": False}))
    with pytest.raises(FusionError, match="residuals"):
        PromptRouter(tmp_path / "router.safetensors", [tmp_path / "expert_one", tmp_path / "expert_odd"])
