"""Tokenizers trained here on a few lines: equal, with extras, reordered, of another kind."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from mtft.fuse.alpha.spec import FusionError
from mtft.fuse.tokenizers.probe_text import probe_lines
from mtft.fuse.tokenizers.vocabulary_match import compare_vocabularies, match_vocabularies


def train(size=400, text=None, specials=("<pad>", "<s>", "</s>")):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(specials),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text or probe_lines(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def tokenizer():
    return train()


def test_probe_is_200_different_lines():
    assert len(probe_lines()) == len(set(probe_lines())) == 200


def test_equal(tokenizer):
    assert match_vocabularies(tokenizer, train()) == (400, 400, None)
    assert compare_vocabularies(tokenizer, train()).accepted_by == "strict"


@pytest.mark.parametrize("side", ["strong", "small"])
def test_extras_at_the_end_need_prefix(tokenizer, side):
    extended = train()
    extended.add_tokens(["<tool>", "<think>"])
    pair = (extended, tokenizer) if side == "strong" else (tokenizer, extended)
    with pytest.raises(FusionError, match="level that accepts: prefix") as refused:
        match_vocabularies(*pair)
    assert refused.value.do == "set tokens: prefix"
    assert match_vocabularies(*pair, "prefix") == match_vocabularies(*pair, "map") == (len(pair[0]), 400, None)


def test_another_tokenizer_is_refused_with_a_report(tokenizer):
    words = {word: index for index, word in enumerate(["<pad>", "<s>", "</s>", "a", "b", "0", "x"])}
    other = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<pad>")))
    with pytest.raises(FusionError) as refused:
        match_vocabularies(tokenizer, other, "map")
    text = str(refused.value)
    assert "level that accepts: none" in text
    assert "take a small model of the strong model's family" in text
    coverage = compare_vocabularies(tokenizer, other)
    assert 0 < coverage.mapped < coverage.strong
    assert 0 < coverage.covered < 1
    assert len(coverage.unmapped) == 20


def test_same_strings_in_another_order_are_another_tokenizer():
    """Names and sizes agree, ids do not: verified, never assumed."""
    one, two = train(specials=("<pad>", "<s>", "</s>")), train(specials=("<pad>", "</s>", "<s>"))
    coverage = compare_vocabularies(one, two)
    assert coverage.mapped == coverage.strong == coverage.small
    assert coverage.common == 1
    assert coverage.accepted_by == "map"


def test_different_end_token(tokenizer):
    other = train()
    other.eos_token = "<s>"
    with pytest.raises(FusionError, match=r"eos: '</s>' \(2\) \| '<s>' \(1\)"):
        match_vocabularies(tokenizer, other, "prefix")
