"""Scores and prompts are made in parts: what a text of twice the length takes more is far from one [L, V] buffer.

Counted: a dispatch mode sees every storage come and go (mtft.training.memory.activation_peak), on one thread.
"""

import copy

import pytest
import torch

from mtft.experimental.rerank import ExpertScorer
from mtft.fuse.alpha.spec import FusionSpec
from mtft.fuse.decoding.prompts import Prompt
from mtft.fuse.decoding.small_scores import score_small_models
from mtft.fuse.fused_model import FusedCausalLM
from mtft.fuse.server.batch_engine import BatchEngine
from mtft.fuse.server.jobs import GenerationJob
from mtft.models.hidden_states import last_token_states
from mtft.training.memory.activation_peak import LiveBytes
from tests.fuse import tiny

WIDTH = 2048  # ids: logits outweigh all else
SHORT, LONG = 32, 96


@pytest.fixture(scope="module")
def fused(tmp_path_factory):
    folder = tmp_path_factory.mktemp("peak")
    base = tiny.base(folder / "base", vocab_size=WIDTH)
    small = tiny.weak(base, [tiny.adapter(folder / name, base, seed) for seed, name in enumerate("ab")], torch.float32)
    strong = tiny.model(7, dtype=torch.float32, vocab_size=WIDTH)
    fused = FusedCausalLM(strong, small, None, FusionSpec(), vocab_size=WIDTH)
    fused.max_logit_bytes = 12 * 4 * WIDTH * 4  # four positions
    return fused


def ids_of(length):
    return torch.arange(length)[None] % 61 + 3


def engine_score(source):
    def score(fused, length):
        job = GenerationJob(ids_of(length)[0].tolist(), 0, fused.spec, print, source=source)
        return BatchEngine(fused)._score_prompt(job)

    return score


def small_scores(fused, length):
    ids = ids_of(length)[0].tolist()
    return score_small_models(fused, [Prompt(ids[:2])], [ids[2:]])


class Letters:
    """As many tokens as letters."""

    unk_token_id = eos_token_id = 0

    def encode(self, text, **_):
        return [ord(letter) % 61 + 3 for letter in text]


def expert_scorer(fused, length):
    fused = copy.copy(fused)
    fused.tokenizer = Letters()
    return ExpertScorer(fused).score([("ab", "c" * (length - 2))])


# name -> (what is done with a text, [L, V] fp32 buffers that are its answer)
PATHS = {
    "score": (lambda fused, length: fused.score(ids_of(length)), 0),
    "forward": (lambda fused, length: fused.forward(ids_of(length)), 1),
    "forward, last": (lambda fused, length: fused.forward(ids_of(length), logits_to_keep=1), 0),
    "prompt": (lambda fused, length: fused.cached_models().read(ids_of(length)), 0),
    "server, fused": (engine_score("fused"), 0),
    "server, strong": (engine_score("strong"), 0),
    "server, expert": (engine_score(1), 0),
    "small models": (small_scores, 0),
    "scorer of answers": (expert_scorer, 0),
    "router": (lambda fused, length: last_token_states(fused.strong, ids_of(length)), 0),
}


@pytest.mark.parametrize("name", PATHS)
def test_logits_of_a_text_are_never_there_at_once(fused, name):
    run, answer = PATHS[name]
    peaks = []
    for length in (SHORT, LONG):
        run(fused, length)  # buffers that are kept are there now
        known = [x for model in (fused.strong, fused.weak.model) for x in (*model.parameters(), *model.buffers())]
        with LiveBytes(known) as live:
            run(fused, length)
        peaks.append(live.peak)
    one_buffer = (LONG - SHORT) * WIDTH * 4
    assert peaks[1] - peaks[0] < (answer + 0.5) * one_buffer


def test_parts_change_nothing(fused, monkeypatch):
    ids = torch.cat([ids_of(30), ids_of(30).flip(1)])
    mask = torch.ones_like(ids)
    mask[1, :7] = 0  # the first part of this row is padding only
    parts = {kept: fused.forward(ids, mask, logits_to_keep=kept).logits for kept in (0, 9)}
    expert = engine_score(1)(fused, 30)
    monkeypatch.setattr(fused, "max_logit_bytes", 1 << 28)
    for kept, logits in parts.items():
        whole = fused.forward(ids, mask, logits_to_keep=kept).logits
        assert whole.shape[1] == (kept or 30)
        torch.testing.assert_close(logits[0], whole[0], atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(logits[1, -9:], whole[1, -9:], atol=2e-5, rtol=1e-5)
    for one, other in zip(expert, engine_score(1)(fused, 30), strict=True):
        assert one.id == other.id
        assert one.logprob == pytest.approx(other.logprob, abs=2e-5)


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """Many layers: one held twice is little, a whole cache held twice is much."""
    base = tiny.base(tmp_path_factory.mktemp("deep") / "base", layers=12)
    return tiny.fused(tiny.weak(base, [tiny.adapter(base.parent / "a", base, 1)]), strong=tiny.model(7, layers=12))


def join_rows(models, other):
    models.append_rows(other)
    assert all(layer.keys is None for cached in other.all for layer in cached.cache.layers)


def drop_gaps(models, other):
    for cached in models.all:
        cached.mask_last(torch.arange(60).expand(4, -1) < 2)
        cached.drop_gaps()


CHANGES = {
    "prompts join": join_rows,
    "rows leave": lambda models, other: models.select(torch.arange(3)),
    "gaps go": drop_gaps,
}


@pytest.mark.parametrize("short", [0, 128], ids=["with room", "copied"])
@pytest.mark.parametrize("change", CHANGES)
def test_one_layer_at_a_time_is_held_twice(deep, monkeypatch, change, short):
    monkeypatch.setattr("mtft.models.preallocated_cache.SHORT", short)
    known = [*deep.strong.parameters(), *deep.weak.model.parameters()]
    with torch.no_grad(), LiveBytes(known) as live:
        models, other = deep.cached_models(), deep.cached_models()
        for cached in (models, other):
            cached.read(ids_of(60).expand(4, -1))
        before = live.peak = live.now
        CHANGES[change](models, other)
    assert live.peak < 1.3 * before
