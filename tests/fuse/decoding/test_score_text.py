"""Scores against one whole forward, chunk against chunk, and against what greedy decoding emits."""

import pytest
import torch

from mtft.data.batching.batch import IGNORE, PADDING, Batch
from mtft.fuse.alpha.spec import FusionError, FusionSpec
from mtft.fuse.decoding import score_text
from tests.fuse import tiny

IDS, MASK = tiny.prompts((9, 6, 12))


def right(ids, mask):
    """The same rows, padded on the right."""
    out, out_mask = torch.zeros_like(ids), torch.zeros_like(mask)
    for row, length in enumerate(mask.sum(-1).tolist()):
        out[row, :length], out_mask[row, :length] = ids[row, ids.shape[1] - length :], 1
    return out, out_mask


def test_greedy_text_scores_greedy_everywhere(double):
    out = double.generate(input_ids=IDS, attention_mask=MASK, max_new_tokens=10, eos_token_id=None, pad_token_id=0)
    mask = torch.cat([MASK, torch.ones(3, 10, dtype=torch.long)], -1)
    wanted = torch.zeros_like(mask)
    wanted[:, IDS.shape[1] :] = 1
    score = double.score(out, mask, wanted)
    assert score.greedy_BL[:, IDS.shape[1] :].all()
    assert not score.greedy_BL[:, : IDS.shape[1]].any()
    assert (score.logprob_BL[:, IDS.shape[1] :] < 0).all()


@pytest.mark.parametrize("side", ["left", "right"])
def test_equals_one_whole_forward(single, side):
    ids, mask = (IDS, MASK) if side == "left" else right(IDS, MASK)
    score = single.score(ids, mask)
    logits = single.forward(ids, mask).logits[:, :-1]
    expected = logits.gather(-1, ids[:, 1:, None])[..., 0]
    scored = (mask[:, 1:] * mask[:, :-1]).bool()
    torch.testing.assert_close(score.logprob_BL[:, 1:][scored], expected[scored], atol=1e-9, rtol=0)
    assert (score.logprob_BL[:, 1:][~scored] == 0).all()
    assert (score.logprob_BL[:, 0] == 0).all()
    assert torch.equal(score.greedy_BL[:, 1:][scored], (logits.argmax(-1) == ids[:, 1:])[scored])


def test_chunks_change_nothing(double):
    whole = double.score(IDS, MASK, chunk=64)
    for chunk in (1, 5):
        part = double.score(IDS, MASK, chunk=chunk)
        for name in ("logprob_BL", "alpha_BL", "kl_BL"):
            torch.testing.assert_close(getattr(part, name), getattr(whole, name), atol=1e-9, rtol=0)
        assert torch.equal(part.greedy_BL, whole.greedy_BL)


def test_alpha_is_the_one_that_generation_uses(single):
    seen = []

    class Watch:
        def step(self, rows, fused, tokens, strong, experts, base):
            seen.append(float(fused.alpha_NT))

    out = single.generate(input_ids=IDS[2:], max_new_tokens=8, trace=Watch(), eos_token_id=None, pad_token_id=0)
    score = single.score(out)
    torch.testing.assert_close(score.alpha_BL[0, -8:], torch.tensor(seen, dtype=torch.float64), atol=1e-7, rtol=0)


def test_memory_stays_under_the_bound(single, monkeypatch):
    """No call into a model makes more positions than the bound allows, and the sum does not change."""
    expected = single.score(IDS, MASK)
    sizes = []
    read = type(single.cached_models().strong).read

    def watched(self, ids, mask=None, keep=1):
        out = read(self, ids, mask, keep)
        sizes.append(out.shape[1] * out.shape[2])
        return out

    monkeypatch.setattr("mtft.fuse.decoding.model_state.CachedModel.read", watched)
    monkeypatch.setattr(single, "max_logit_bytes", 6 * 10 * 8 * tiny.VOCABULARY)  # 6 positions of 2T + 8 fp64 buffers
    score = single.score(IDS, MASK)
    assert max(sizes) == 6
    torch.testing.assert_close(score.logprob_BL, expected.logprob_BL, atol=1e-9, rtol=0)


def batch(ids, mask, supervised):
    labels = torch.full_like(ids, IGNORE)
    labels[:, :-1] = torch.where(supervised[:, 1:], ids[:, 1:], IGNORE)
    segment = torch.where(mask.bool(), 0, PADDING).int()
    return Batch(ids, (mask.cumsum(-1) - 1).clamp(min=0), segment, segment, labels)


def test_fused_scores_of_a_batch(double):
    ids, mask = right(IDS, MASK)
    supervised = mask.bool() & (torch.arange(12) >= 4)
    nll, hit = score_text.fused_scores(double, batch(ids, mask, supervised))
    score = double.score(ids, mask, supervised)
    torch.testing.assert_close(nll[:, :-1].double(), -score.logprob_BL[:, 1:], atol=1e-6, rtol=0)
    assert torch.equal(hit[:, :-1], score.greedy_BL[:, 1:])
    assert ((nll > 0) == (batch(ids, mask, supervised).labels_BT != IGNORE)).all()


def test_a_spec_of_its_own(double):
    ids, mask = right(IDS, MASK)
    one = batch(ids, mask, mask.bool())
    nll, _ = score_text.fused_scores(double, one, spec=FusionSpec(alpha_rule="fixed", alpha=0.0))
    logits = double.strong(ids).logits[..., : tiny.VOCABULARY].log_softmax(-1)
    expected = -logits[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    wanted = one.labels_BT[:, :-1] != IGNORE
    torch.testing.assert_close(nll[:, :-1][wanted].double(), expected[wanted], atol=1e-5, rtol=0)


def test_packed_batches_are_refused(double):
    ids, mask = right(IDS, MASK)
    packed = batch(ids, mask, mask.bool())
    packed.segment_ids_BT[0, 5:9] = 1
    with pytest.raises(FusionError, match="one example per row"):
        score_text.fused_scores(double, packed)


def test_nothing_to_score(single):
    score = single.score(IDS, MASK, torch.zeros_like(MASK))
    assert not score.logprob_BL.any()


def test_too_long(single):
    with pytest.raises(FusionError, match="129 tokens, the smaller context holds 128"):
        single.score(torch.full((1, 130), 5))
    assert single.score(torch.full((1, 129), 5)).logprob_BL[0, -1] < 0  # the last token is judged, never read


def test_stats(double):
    stats = score_text.AlphaStats()
    score_text.score(double, IDS, MASK, stats=stats)
    summary = stats.summary()
    assert summary["positions"] == int((MASK.sum(-1) - 1).sum())
    quantiles = list(summary["alpha_quantiles"].values())
    assert quantiles == sorted(quantiles)
    assert 0 <= summary["clipped_share"] <= 1
    assert 0 < summary["tv_mean"] < 1
    assert summary["kl_mean"] > 0
    assert score_text.AlphaStats().summary() == {"positions": 0}
