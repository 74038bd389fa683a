"""`tokens: map` against the same computed from text alone at every step, and against `strict` on equal tokenizers."""

import pytest
import torch

from mtft.fuse.alpha.fused_logits import fuse_logits
from mtft.fuse.alpha.spec import FusionError, FusionSpec
from mtft.fuse.decoding.prompts import left_pad
from mtft.fuse.fused_model import FusedCausalLM
from mtft.fuse.tokenizers.token_map import TokenMap, token_bytes, token_strings
from mtft.fuse.tokenizers.vocabulary_match import match_vocabularies
from tests.fuse import tiny
from tests.fuse.tokenizers.test_vocabulary_match import train

TEXTS = ["the quick brown", "fox", "jumps over the lazy café ünder"]


@pytest.fixture(scope="module")
def other():
    """The small model's tokenizer: other merges, other ids."""
    return train(size=310, text=["def lazy(fox): return quick(fox)", "over under over the dog"] * 3)


@pytest.fixture(scope="module")
def strong():
    return tiny.tokenizer()


@pytest.fixture(scope="module")
def bridged(tmp_path_factory, strong, other):
    root = tmp_path_factory.mktemp("bridge")
    base = tiny.base(root / "base", vocab_size=320)
    small = tiny.weak(base, [tiny.adapter(root / "one", base, 11), tiny.adapter(root / "two", base, 12)])
    token_map = TokenMap(strong, other)
    large = tiny.model(7, vocab_size=320)
    sizes = {"vocab_size": len(token_strings(strong)), "shared": token_map.width}
    return FusedCausalLM(large, small, strong, FusionSpec(), **sizes, token_map=token_map)


def by_hand(fused, ids):
    """The fused distribution after `ids`, from text alone: no cache, no batch."""
    token_map = fused.token_map
    small_ids, whole = token_map.encode(ids)
    experts, base = [], None
    fused.weak.layout.set((0, 1, -1), 1)
    with torch.no_grad():
        rows = fused.weak.model(torch.tensor([small_ids]).repeat(3, 1)).logits[:, -1, : fused.shared]
        strong = fused.strong(torch.tensor([ids])).logits[:, -1, : fused.vocab_size]
    experts, base = rows[:2, None], rows[2:]
    if not whole:
        experts = base[None].expand(2, -1, -1)
    return fuse_logits(strong, experts, base, fused.spec, token_map=token_map).logprobs_NV[0]


def test_surfaces_of_byte_level_and_sentencepiece():
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    pieces = ["<unk>", "▁the", "a", "<0x41>", "é"]
    raw = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], unk_token="<unk>"))
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    other = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>")
    assert token_bytes(other) == [None, b" the", b"a", b"A", "é".encode()]
    ours = tiny.tokenizer()
    found = token_bytes(ours)
    assert all(found[ours.convert_tokens_to_ids(token)] is None for token in ("<pad>", "<s>", "</s>"))
    for text in ("the quick", " brown", "é"):
        ids = ours.encode(text, add_special_tokens=False)
        assert b"".join(found[i] for i in ids) == text.encode()
    ids = TokenMap(ours, other).small_id_V
    assert int(ids[ours.convert_tokens_to_ids("a")]) == 2
    assert int(ids[ours.convert_tokens_to_ids("A")]) == 3


def test_map_is_by_text_and_by_role(strong, other):
    small_id_V = TokenMap(strong, other).small_id_V.tolist()
    ours, theirs = token_bytes(strong), token_bytes(other)
    for index, small in enumerate(small_id_V):
        if ours[index] is not None:
            assert small == (theirs.index(ours[index]) if ours[index] in theirs else -1)
    assert [small_id_V[i] for i in (strong.bos_token_id, strong.eos_token_id)] == [1, 2]


def test_half_a_character_is_not_read(strong, other):
    token_map, ids = TokenMap(strong, other), strong.encode("café")
    assert token_map.encode(ids) == (other.encode("café"), True)
    assert token_map.encode(ids[:-1]) == (other.encode("caf"), False)


def test_equal_tokenizers_give_what_strict_gives(tmp_path):
    places = tiny.folders_with_text(tmp_path)
    strict = FusedCausalLM.load(places["strong"], places["small"], [places["expert"]], dtype="fp64", device="cpu")
    token_map = TokenMap(strict.tokenizer, strict.tokenizer)
    sizes = {"vocab_size": strict.vocab_size, "shared": strict.shared}
    mapped = FusedCausalLM(strict.strong, strict.weak, strict.tokenizer, FusionSpec(), **sizes, token_map=token_map)
    # only what is the tokenizer's own way to write its text: other ids are read differently, as they should be
    ids = torch.tensor([strict.tokenizer.encode("the quick brown fox jumps over 123")])
    torch.testing.assert_close(mapped.forward(ids).logits[:, -1], strict.forward(ids).logits[:, -1], atol=1e-8, rtol=0)


@pytest.mark.parametrize("rows", [[0], [0, 1, 2]], ids=["one row", "batch"])
def test_generation_is_what_the_texts_give_step_by_step(bridged, rows):
    prompts = [bridged.tokenizer.encode(TEXTS[row]) for row in rows]
    ids, mask = left_pad(prompts, 0)
    call = {"max_new_tokens": 14, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    out = bridged.generate(input_ids=ids, attention_mask=mask, **call)[:, ids.shape[1] :]
    for row, prompt in enumerate(prompts):
        text = list(prompt)
        for token in out[row].tolist():
            expected = by_hand(bridged, text)
            assert token == int(expected.argmax())
            text.append(token)


def test_ended_rows_leave_and_the_others_go_on(bridged):
    prompts = [bridged.tokenizer.encode(text) for text in TEXTS]
    ids, mask = left_pad(prompts, 0)
    call = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    free = bridged.generate(input_ids=ids, attention_mask=mask, eos_token_id=None, **call)[:, ids.shape[1] :]
    end = int(free[0, 3])
    out = bridged.generate(input_ids=ids, attention_mask=mask, eos_token_id=[end], **call)[:, ids.shape[1] :]
    for row in range(3):
        stop = free[row].tolist().index(end) + 1 if end in free[row] else 12
        assert out[row, :stop].tolist() == free[row, :stop].tolist()


def test_scores_are_those_of_the_texts(bridged):
    ids = torch.tensor([bridged.tokenizer.encode(TEXTS[2])])
    score = bridged.score(ids)
    for at in range(1, ids.shape[1]):
        expected = by_hand(bridged, ids[0, :at].tolist())[ids[0, at]]
        torch.testing.assert_close(score.logprob_BL[0, at], expected.double(), atol=1e-6, rtol=0)


def test_a_prompt_of_the_small_models_own(bridged, other):
    prompt = bridged.tokenizer.encode("fox")
    own = other.encode("def lazy")
    call = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    out = bridged.generate(
        input_ids=torch.tensor([prompt]),
        expert_input_ids=torch.tensor([own]),
        expert_attention_mask=torch.ones(1, len(own), dtype=torch.long),
        **call,
    )
    plain = bridged.generate(input_ids=torch.tensor([prompt]), **call)
    same = bridged.generate(
        input_ids=torch.tensor([prompt]), expert_input_ids=torch.tensor([bridged.token_map.encode(prompt)[0]]), **call
    )
    assert torch.equal(same, plain)
    assert out.shape == plain.shape


def test_no_speculation_and_what_else_is_refused(bridged):
    from mtft.experimental.rerank import ExpertScorer

    ids = torch.tensor([bridged.tokenizer.encode("the")])
    call = {"input_ids": ids, "max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    with pytest.warns(UserWarning, match="another tokenizer"):
        out = bridged.generate(**call, speculative=2)
    assert torch.equal(out, bridged.generate(**call))
    with pytest.raises(FusionError, match="another tokenizer"):
        ExpertScorer(bridged)


def test_agree_gives_a_bridge_or_says_what_is_missing(strong, other):
    v, m, token_map = match_vocabularies(strong, other, "map")
    assert (v, m) == (len(strong), len(other))
    assert token_map == TokenMap(strong, other)
    with pytest.raises(FusionError, match="level that accepts: map") as refused:
        match_vocabularies(strong, other, "prefix")
    assert refused.value.do == "set tokens: map"


def test_a_trace_names_tokens_of_the_strong_model(bridged):
    from mtft.fuse.decoding.token_trace import TokenTrace

    ids = torch.tensor([bridged.tokenizer.encode("the")])
    trace = TokenTrace([0], bridged.tokenizer)
    bridged.generate(input_ids=ids, max_new_tokens=3, do_sample=False, pad_token_id=0, trace=trace)
    for record in trace.tokens[0]:
        mapped = int(bridged.token_map.small_id_V[record["token"]])
        assert (record["logprob"]["base"] is None) == (mapped < 0)
        assert all(int(bridged.token_map.small_id_V[top["token"]]) >= 0 for top in record["top"]["base"])


def with_bos(tokenizer):
    """The same, with a bos before every text."""
    from tokenizers import processors

    bos = tokenizer.bos_token, tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=[bos[0], "$A"], special_tokens=[bos]
    )
    return tokenizer


def test_each_tokenizer_begins_a_text_in_its_own_way():
    """A small bos that its tokenizer puts before no text isn't read there, though the strong tokenizer puts its own."""
    strong, small = with_bos(tiny.tokenizer()), train(size=310, text=["over under over the dog"] * 3)
    ids = strong.encode("the fox")
    assert ids[0] == strong.bos_token_id
    bare = small.encode("the fox")
    assert TokenMap(strong, small).encode(ids) == (bare, True)
    assert TokenMap(strong, small).encode(ids[:1]) == ([small.bos_token_id], True)  # an empty text has to begin somehow
    small.bos_token = None
    assert TokenMap(strong, small).encode(ids) == (bare, True)  # nor as the text of its name
    small.bos_token = "<s>"
    assert TokenMap(strong, with_bos(small)).encode(ids) == ([small.bos_token_id, *bare], True)
