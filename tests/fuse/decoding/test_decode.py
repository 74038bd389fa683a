"""The loop behind generate: against three plain models, rows against batches, processors, stops, seeds."""

import pytest
import torch
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    TextIteratorStreamer,
)
from transformers.generation.streamers import BaseStreamer

from mtft.fuse.alpha.spec import FusionError, FusionSpec
from mtft.fuse.decoding import decode as decoding
from tests.fuse import tiny

IDS, MASK = tiny.prompts()
CALL = {"input_ids": IDS, "attention_mask": MASK, "max_new_tokens": 12, "pad_token_id": 0}


def plain_greedy(fused, ids, steps, alpha=1.0):
    """Proxy-tuning with three whole forwards per token, no cache."""
    small = fused.weak
    for _ in range(steps):
        strong = fused.strong(ids).logits[:, -1, : tiny.VOCABULARY]
        small.layout.set((0, -1), len(ids))
        expert, base = small.model(ids.repeat(2, 1)).logits[:, -1, : tiny.VOCABULARY].chunk(2)
        ids = torch.cat([ids, (strong + alpha * (expert - base)).argmax(-1, keepdim=True)], -1)
    return ids


@torch.no_grad()
def test_fixed_alpha_is_proxy_tuning(single):
    ids = IDS[2:]  # the full-length row
    out = single.generate(input_ids=ids, max_new_tokens=10, alpha=1.0, eos_token_id=None, pad_token_id=0)
    assert torch.equal(out, plain_greedy(single, ids, 10))


def test_alpha_zero_is_the_strong_model_alone(single):
    out = single.generate(**CALL, alpha=0.0, output_logits=True, return_dict_in_generate=True)
    cut = {"suppress_tokens": [61, 62, 63]}
    alone = single.strong.generate(**CALL, **cut, output_logits=True, return_dict_in_generate=True)
    assert torch.equal(out.sequences, alone.sequences)
    expected = alone.logits[0][:, : tiny.VOCABULARY].double().log_softmax(-1)
    torch.testing.assert_close(out.logits[0], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("rule", ["jeffreys", "fixed", "paper"])
def test_batch_equals_rows_alone(double, rule):
    together = double.generate(**CALL, alpha_rule=rule)
    for row in range(len(IDS)):
        ids = IDS[row][MASK[row].bool()][None]
        alone = double.generate(input_ids=ids, max_new_tokens=12, pad_token_id=0, alpha_rule=rule)[0, ids.shape[1] :]
        assert torch.equal(together[row, IDS.shape[1] :][: len(alone)], alone)


def test_cached_equals_uncached(single):
    """The log-probabilities of decoding equal those of one whole forward."""
    out = single.generate(**CALL, output_logits=True, return_dict_in_generate=True, eos_token_id=None)
    mask = torch.cat([MASK, torch.ones(len(MASK), 12, dtype=torch.long)], -1)
    whole = single.forward(out.sequences, mask).logits
    for step, logits in enumerate(out.logits):
        torch.testing.assert_close(logits, whole[:, IDS.shape[1] - 1 + step], atol=1e-9, rtol=0)


def test_generate_is_custom_generate(single):
    assert torch.equal(single.generate(**CALL), single.strong.generate(custom_generate=single.decode, **CALL))


def test_misspelt_argument(single):
    with pytest.raises(ValueError, match="alpa"):
        single.generate(**CALL, alpa=0.5)


def test_sampling_is_per_row_and_reproducible(double):
    options = {"do_sample": True, "top_k": 20, "temperature": 1.3, "seed": [5, 6, 7]}
    together = double.generate(**CALL, **options)
    assert torch.equal(together, double.generate(**CALL, **options))
    for row in range(3):
        ids = IDS[row][MASK[row].bool()][None]
        alone = double.generate(input_ids=ids, max_new_tokens=12, pad_token_id=0, **(options | {"seed": 5 + row}))
        assert torch.equal(together[row, IDS.shape[1] :][: alone.shape[1] - ids.shape[1]], alone[0, ids.shape[1] :])
    assert not torch.equal(together, double.generate(**CALL, **(options | {"seed": [8, 9, 10]})))


def test_torch_seed_decides_without_a_seed(single):
    def draw():
        torch.manual_seed(3)
        return single.generate(**CALL, do_sample=True)

    assert torch.equal(draw(), draw())


def test_several_samples_of_one_prompt(single):
    ids = IDS[2:]
    out = single.generate(input_ids=ids, do_sample=True, num_return_sequences=4, max_new_tokens=8, seed=3, top_k=0)
    assert len({tuple(row) for row in out.tolist()}) > 1
    again = single.generate(input_ids=ids, do_sample=True, num_return_sequences=2, max_new_tokens=8, seed=3, top_k=0)
    width = min(out.shape[1], again.shape[1])
    assert torch.equal(out[:2, :width], again[:, :width])  # sample i does not depend on how many were asked for


class StopAt(StoppingCriteria):
    """Row b stops after lengths[b] tokens; counts per row by index, as lm-eval's criterion does."""

    def __init__(self, lengths, prompt):
        self.lengths, self.prompt = torch.tensor(lengths), prompt

    def __call__(self, input_ids, scores, **kwargs):
        assert len(input_ids) == len(self.lengths), "a criterion with state per row needs all rows"
        return torch.tensor(input_ids.shape[1] - self.prompt) >= self.lengths


@pytest.mark.parametrize("sample", [False, True])
def test_compaction_changes_nothing(double, monkeypatch, sample):
    ids, mask = tiny.prompts((5, 8, 3, 6, 8), seed=4)
    stop = StopAt([2, 9, 4, 3, 9], ids.shape[1])
    options = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 12, "pad_token_id": 0, "eos_token_id": None}
    options |= {"stopping_criteria": [stop], "do_sample": sample, "seed": 1, "repetition_penalty": 1.3}
    sizes = []
    read = type(double.cached_models().strong).read
    monkeypatch.setattr(
        "mtft.fuse.decoding.model_state.CachedModel.read",
        lambda self, ids, *rest, **more: sizes.append(len(ids)) or read(self, ids, *rest, **more),
    )
    compact = double.generate(**options)
    assert min(sizes) == 2
    monkeypatch.setattr(decoding, "COMPACT", 0.0)
    sizes.clear()
    assert torch.equal(compact, double.generate(**options))
    assert min(sizes) == 5
    assert (compact[0, ids.shape[1] + 2 :] == 0).all()


class Ban(LogitsProcessor):
    """Unknown to the decoder, so it may have state."""

    def __call__(self, input_ids, scores):
        assert len(input_ids) == len(scores) == 3
        return scores.index_fill(1, torch.tensor([int(scores[0].argmax())]), -torch.inf)


def test_processors_see_fused_scores_and_never_change_alpha(single):
    """temperature, repetition penalty and an unknown processor: alpha of the first token stays what it was."""
    seen = []

    class Watch:
        def step(self, rows, fused, tokens, strong, experts, base):
            seen.append(fused.alpha_NT.clone())

    first = single.generate(**CALL, trace=Watch(), output_logits=True, return_dict_in_generate=True)
    plain, seen[:] = seen[0], []
    ban = LogitsProcessorList([Ban()])
    options = {"temperature": 0.3, "do_sample": True, "repetition_penalty": 1.5, "seed": 1, "logits_processor": ban}
    second = single.generate(**CALL, trace=Watch(), output_logits=True, return_dict_in_generate=True, **options)
    assert torch.equal(seen[0], plain)
    torch.testing.assert_close(first.logits[0], second.logits[0])
    assert int(second.sequences[0, IDS.shape[1]]) != int(first.logits[0][0].argmax())


def test_end_tokens_are_a_set_per_row(single):
    free = single.generate(**CALL, eos_token_id=None)[:, IDS.shape[1] :]
    ends = [int(free[0, 3]), int(free[1, 5])]
    out = single.generate(**CALL, eos_token_id=ends)[:, IDS.shape[1] :]
    for row in range(3):
        stop = next((i for i, token in enumerate(free[row].tolist()) if token in ends), 11)
        assert torch.equal(out[row, : stop + 1], free[row, : stop + 1])
        assert (out[row, stop + 1 :] == 0).all()


def test_streamer(single):
    class Collect(BaseStreamer):
        def __init__(self):
            self.chunks, self.ended = [], False

        def put(self, value):
            self.chunks.append(value)

        def end(self):
            self.ended = True

    streamer = Collect()
    out = single.generate(input_ids=IDS[2:], max_new_tokens=5, streamer=streamer, eos_token_id=None, pad_token_id=0)
    assert streamer.ended
    assert torch.equal(torch.cat([streamer.chunks[0][0], *streamer.chunks[1:]]), out[0])
    assert issubclass(TextIteratorStreamer, BaseStreamer)


def test_alpha_rule_and_weights_per_row(double):
    per_row = double.generate(
        **CALL,
        alpha_rule=["jeffreys", "fixed", "forward"],
        alpha=[1.0, 0.0, 1.0],
        expert_weights=[[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]],
    )
    for row, (rule, alpha, weights) in enumerate(
        [("jeffreys", 1.0, [1.0, 0.0]), ("fixed", 0.0, [0.5, 0.5]), ("forward", 1.0, [0.0, 1.0])]
    ):
        alone = double.generate(**CALL, alpha_rule=rule, alpha=alpha, expert_weights=weights)
        width = min(alone.shape[1], per_row.shape[1])
        assert torch.equal(per_row[row, :width], alone[row, :width])


def test_expert_prompt_of_its_own(single):
    """Another prompt for the small models, the same continuation: equal prompts give the same, others don't."""
    same = single.generate(**CALL, expert_input_ids=IDS, expert_attention_mask=MASK)
    assert torch.equal(same, single.generate(**CALL))
    other, mask = tiny.prompts((3, 5, 2), seed=9)
    out = single.generate(
        **CALL,
        expert_input_ids=other,
        expert_attention_mask=mask,
        output_logits=True,
        return_dict_in_generate=True,
        alpha=1.0,
    )
    strong = single.strong(IDS[2:]).logits[0, -1, : tiny.VOCABULARY]
    single.weak.layout.set((0, -1), 1)
    expert, base = single.weak.model(other[2:, -2:].repeat(2, 1)).logits[:, -1, : tiny.VOCABULARY]
    torch.testing.assert_close(out.logits[0][2], (strong + expert - base).log_softmax(-1), atol=1e-9, rtol=0)


def filled_cache():
    cache = DynamicCache()
    cache.update(torch.zeros(3, 2, 4, 8), torch.zeros(3, 2, 4, 8), 0)
    return cache


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_beams": 2}, "num_beams"),
        ({"cache_implementation": "static"}, "static cache"),
        ({"cache": filled_cache()}, "filled cache"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions"),
        ({"alpha": 11.0}, "alpha is 11"),
        ({"alpha_rule": "jeffrey"}, "did you mean 'jeffreys'"),
        ({"expert_weights": [1.0]}, "1 entries for 2 experts"),
        ({"expert_weights": [0.4, 0.4]}, "add up to 0.8"),
        ({"alpha": [1.0, 1.0]}, "2 entries for 3 rows"),
        ({"seed": [1, 2]}, "seed has 2 entries"),
    ],
)
def test_refused(double, options, message):
    with pytest.raises(FusionError, match=message):
        double.generate(**CALL, **options)


def test_prompts_that_make_no_sense(single):
    with pytest.raises(FusionError, match="padded on the right"):
        single.generate(input_ids=IDS.flip(1), attention_mask=MASK.flip(1), max_new_tokens=2, pad_token_id=0)
    with pytest.raises(FusionError, match="200 tokens, the smaller context holds 128"):
        single.generate(input_ids=torch.full((1, 200), 5), max_new_tokens=2)
    with pytest.raises(FusionError, match="outside of 0"):
        single.generate(input_ids=torch.tensor([[3, 62]]), max_new_tokens=2)  # a padding row of the embedding
    with pytest.raises(FusionError, match="another model"):
        single.weak.model.generate(input_ids=IDS[2:], custom_generate=single.decode, max_new_tokens=2)


def test_looks_like_a_model(single):
    assert single.config.vocab_size == single.vocab_size == tiny.VOCABULARY
    assert single.strong.config.vocab_size == 64
    assert single.eval() is single
    assert isinstance(single.generation_config, GenerationConfig)
    assert single.dtype == torch.float64
    right = torch.cat([IDS[2:], torch.zeros(1, 4, dtype=torch.long)], -1)  # as lm-eval calls it: right-padded, no mask
    torch.testing.assert_close(single(right).logits[:, :9], single(IDS[2:]).logits)
    torch.testing.assert_close(single(IDS[2:], logits_to_keep=1).logits[:, 0], single(IDS[2:]).logits[:, -1])


def test_spec_of_the_model_is_the_default(folders):
    small = tiny.weak(folders["base"], [folders["one"]])
    fixed = tiny.fused(small, FusionSpec(alpha_rule="fixed", alpha=0.5))
    assert torch.equal(fixed.generate(**CALL), tiny.fused(small).generate(**CALL, alpha=0.5))
