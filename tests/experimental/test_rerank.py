"""MBR by brute force, ties, and scorers that fail loudly."""

import itertools

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from mtft.experimental import rerank
from mtft.fuse.alpha.spec import FusionError
from mtft.fuse.from_recipe import load_fusion
from tests.fuse import tiny
from tests.fuse.batch.test_jsonl_commands import recipe_of


@pytest.fixture(scope="module")
def fused(tmp_path_factory):
    root = tmp_path_factory.mktemp("select")
    return load_fusion(recipe_of(tiny.folders_with_text(root), root))


def test_chrf_by_hand():
    """abcd against abce: n = 1: 3/4, n = 2: 2/3, n = 3: 1/2, n = 4: 0; precision = recall, so F is the same."""
    assert rerank.chrf("abcd", "abce") == pytest.approx((3 / 4 + 2 / 3 + 1 / 2 + 0) / 4)
    assert rerank.chrf("a b", "ab") == 1  # spaces don't count
    assert rerank.chrf("", "") == 1
    assert rerank.chrf("", "abc") == rerank.chrf("xyz", "abc") == 0
    # ab against abcd: precision 1, recall 2/4 and 1/3; n = 3, 4 have recall 0
    f = [5 * 1 * r / (4 * 1 + r) for r in (2 / 4, 1 / 3)]
    assert rerank.chrf("ab", "abcd") == pytest.approx((f[0] + f[1] + 0 + 0) / 4)


def test_mbr_is_the_brute_force_maximum():
    texts = ["the cat sat", "the cat sits", "a dog ran off", "the cat sat down", "zzz"]
    chosen, utility = rerank.minimum_bayes_risk(texts)
    table = {pair: rerank.chrf(texts[pair[0]], texts[pair[1]]) for pair in itertools.permutations(range(5), 2)}
    expected = [np.mean([table[i, j] for j in range(5) if j != i]) for i in range(5)]
    np.testing.assert_allclose(utility, expected)
    assert chosen == int(np.argmax(expected))
    assert utility[4] == 0


def test_ties_go_to_the_greedy_answer():
    assert rerank.minimum_bayes_risk(["b", "a", "a", "b"])[0] == 0
    assert rerank.minimum_bayes_risk(["only"])[0] == 0
    assert rerank.minimum_bayes_risk(["x", "a", "a"])[0] == 1


def test_hedged_samples(fused):
    ids = fused.tokenizer.encode("the quick")
    answers = rerank.hedged(fused, ids, answers=4, max_new_tokens=8, temperature=2.0, seed=3)
    assert len(answers) == 4
    greedy = fused.generate(input_ids=torch.tensor([ids]), max_new_tokens=8, do_sample=False)[0, len(ids) :].tolist()
    assert answers[0] == rerank._content(fused, greedy)
    assert answers == rerank.hedged(fused, ids, answers=4, max_new_tokens=8, temperature=2.0, seed=3)
    assert len({tuple(answer) for answer in answers}) > 1
    assert rerank.hedged(fused, ids, answers=1, max_new_tokens=8) == answers[:1]
    assert not any(token in fused.end_ids for answer in answers for token in answer)


def test_expert_scorer(fused):
    """Against the formula on whole forwards of the small models."""
    tokenizer, pairs = fused.tokenizer, [("the quick", " brown fox"), ("jumps", " over")]
    scores = rerank.ExpertScorer(fused).score(pairs)
    for (instruction, answer), score in zip(pairs, scores, strict=True):
        prompt = tokenizer.encode(instruction)
        ids = torch.tensor([prompt + tokenizer.encode(answer, add_special_tokens=False)])
        fused.weak.layout.set((0, -1), 1)
        with torch.no_grad():
            logits = fused.weak.model(ids.repeat(2, 1)).logits[:, :-1, : fused.vocab_size].log_softmax(-1)
        gain = (logits[0] - logits[1]).gather(-1, ids[0, 1:, None])[len(prompt) - 1 :]
        assert score == pytest.approx(float(gain.mean()), abs=1e-5)
    assert rerank.best(rerank.ExpertScorer(fused), "the quick", [" brown fox", ""])[1][1] == 0


def test_classifier_scorer(tmp_path):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=320, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=1
    )
    BertForSequenceClassification(config).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    scorer = rerank.ClassifierScorer(tmp_path, batch_size=2)
    texts = ["fox", "dog", "the lazy dog"]
    chosen, scores = rerank.best(scorer, "jumps", texts)
    alone = [rerank.best(scorer, "jumps", [text])[1][0] for text in texts]
    np.testing.assert_allclose(scores, alone, atol=1e-5)
    assert scores[chosen] == scores.max()


def test_scores_that_are_no_numbers():
    class Broken:
        def score(self, pairs):
            return np.array([1.0, np.nan])

    with pytest.raises(FusionError, match="nan"):
        rerank.best(Broken(), "x", ["a", "b"])
