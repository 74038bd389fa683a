"""Speculation against direct decoding: the same tokens greedily and with a seed, the same distribution without."""

import itertools
import random
from collections import Counter

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList, MistralConfig, MistralForCausalLM

from mtft.fuse.alpha.spec import FusionError
from mtft.fuse.load_models import freeze
from mtft.fuse.speculative.acceptance import acceptance_probability, sample_tokens, verify_drafts
from mtft.fuse.speculative.draft_length import DraftLength
from tests.fuse import tiny
from tests.slow import slow

IDS, MASK = tiny.prompts((7, 4, 9, 5))
CALL = {"input_ids": IDS, "attention_mask": MASK, "max_new_tokens": 20, "pad_token_id": 0}
DRAFTS = [3, "auto", *slow(0, 1, 6)]


class Every(DraftLength):
    """All lengths in turn, plain steps too: every way from one to another."""

    def next(self):
        return (0, 3, 1, 0, 0, 2, 4)[self.rounds % 7]


@pytest.mark.parametrize("drafts", DRAFTS)
@pytest.mark.parametrize("rows", [[2], [0, 1, 2, 3]], ids=["one row", "batch"])
def test_greedy_is_token_identical(double, drafts, rows):
    call = CALL | {"input_ids": IDS[rows], "attention_mask": MASK[rows]}
    assert torch.equal(double.generate(**call, speculative=drafts), double.generate(**call))


@pytest.mark.parametrize("drafts", DRAFTS)
@pytest.mark.parametrize("rows", [[2], [0, 1, 2, 3]], ids=["one row", "batch"])
def test_seeded_sampling_is_token_identical(single, drafts, rows):
    call = CALL | {"input_ids": IDS[rows], "attention_mask": MASK[rows], "do_sample": True, "seed": 3, "top_k": 8}
    assert torch.equal(single.generate(**call, speculative=drafts), single.generate(**call))


@pytest.mark.slow
def test_greedy_is_token_identical_on_500_prompts_in_fp32(folders):
    fused = tiny.fused(tiny.weak(folders["base"], [folders["one"]], torch.float32))
    generator = torch.Generator().manual_seed(0)
    for part in range(20):
        lengths = torch.randint(2, 20, (25,), generator=generator).tolist()
        ids, mask = tiny.prompts(lengths, seed=part)
        call = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 24, "pad_token_id": 0}
        assert torch.equal(fused.generate(**call, speculative=1 + part % 4), fused.generate(**call))


@pytest.mark.parametrize("sample", [True, *slow(False)])
def test_changing_the_draft_length_on_the_way(double, monkeypatch, sample):
    monkeypatch.setattr("mtft.fuse.speculative.speculative.DraftLength", Every)
    call = CALL | {"max_new_tokens": 40, "do_sample": sample, "seed": 1, "alpha_rule": ["jeffreys", "fixed"] * 2}
    assert torch.equal(double.generate(**call, speculative="auto"), double.generate(**call))
    assert double.last_draft_length.rounds > 14


def test_a_good_drafter_is_accepted_and_saves_passes(folders, monkeypatch):
    """Strong = the expert's own base: jeffreys gives the expert, so that every draft stands."""
    small = tiny.weak(folders["base"], [folders["one"]])
    fused = tiny.fused(small, strong=tiny.model(1, width=16))
    call = CALL | {"eos_token_id": None}
    expected = fused.generate(**call)
    passes = []
    read = type(fused.cached_models().strong).read

    def counted(self, *arguments, **options):
        passes.append(self.model is fused.strong)
        return read(self, *arguments, **options)

    monkeypatch.setattr("mtft.fuse.decoding.model_state.CachedModel.read", counted)
    assert torch.equal(fused.generate(**call, speculative=4), expected)
    assert fused.last_draft_length.accepted == fused.last_draft_length.drafted
    assert sum(passes) == 1 + 4  # the prompt gives one token, then four rounds of five; the last stops at the limit


def test_ends_and_lengths_are_the_same(single):
    free = single.generate(**CALL, eos_token_id=None)[:, IDS.shape[1] :]
    ends = [int(free[0, 3]), int(free[1, 6])]
    for drafts in (1, 4):
        call = CALL | {"eos_token_id": ends}
        assert torch.equal(single.generate(**call, speculative=drafts), single.generate(**call))
        call = CALL | {"max_new_tokens": 5, "eos_token_id": None}
        assert torch.equal(single.generate(**call, speculative=drafts), single.generate(**call))


def test_criteria_see_what_they_see_in_direct_decoding(double):
    from tests.fuse.decoding.test_decode import StopAt

    class Watch(StopAt):
        def __init__(self):
            super().__init__([3, 9, 5, 12], IDS.shape[1])
            self.seen = []

        def __call__(self, input_ids, scores, **kwargs):
            self.seen.append(input_ids.tolist())
            return super().__call__(input_ids, scores)

    seen = []
    for drafts in (None, 3):
        watch = Watch()
        double.generate(**CALL, speculative=drafts, stopping_criteria=[watch], eos_token_id=None)
        seen.append(watch.seen)
    assert seen[0] == seen[1]


@pytest.mark.parametrize("sample", [True, *slow(False)])
def test_processors_are_applied(single, sample):
    """They shape drafts and judgement alike: penalties, minimal lengths and forbidden n-grams give the same text."""
    options = {"repetition_penalty": 1.7, "no_repeat_ngram_size": 2, "min_new_tokens": 6, "temperature": 0.7}
    call = CALL | options | {"do_sample": sample, "seed": 2, "top_p": 0.9}
    expected = single.generate(**call)
    assert not torch.equal(expected, single.generate(**CALL | {"do_sample": sample, "seed": 2}))
    assert torch.equal(single.generate(**call, speculative=3), expected)


def test_scores_and_trace_are_the_same(double):
    class Watch:
        def __init__(self):
            self.seen = {}

        def step(self, rows, fused, tokens, strong, experts, base):
            for at, row in enumerate(rows):
                record = (int(tokens[at]), fused.alpha_NT[at], strong[at], experts[1][at], base[at])
                self.seen.setdefault(row, []).append(record)

    watches = Watch(), Watch()
    wish = {"output_scores": True, "output_logits": True, "return_dict_in_generate": True}
    direct, fast = (
        double.generate(**CALL, **wish, speculative=drafts, trace=watch)
        for drafts, watch in zip((None, 3), watches, strict=True)
    )
    assert torch.equal(direct.sequences, fast.sequences)
    ended = torch.zeros(len(IDS), dtype=torch.bool)
    for step, (left, right) in enumerate(zip(direct.logits, fast.logits, strict=True)):
        torch.testing.assert_close(left[~ended], right[~ended], atol=1e-6, rtol=0)
        torch.testing.assert_close(direct.scores[step][~ended], fast.scores[step][~ended], atol=1e-6, rtol=0)
        ended |= direct.sequences[:, IDS.shape[1] + step] == 2
    assert watches[0].seen.keys() == watches[1].seen.keys()
    for row, records in watches[0].seen.items():
        assert len(records) == len(watches[1].seen[row])
        for left, right in zip(records, watches[1].seen[row], strict=True):
            assert left[0] == right[0]
            for a, b in zip(left[1:], right[1:], strict=True):
                torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_a_drafter_of_its_own(folders, tmp_path):
    tiny.model(5, width=16, dtype=torch.float32).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="whole model"):
        small = tiny.weak(folders["base"], [tmp_path, folders["one"]])
    fused = tiny.fused(small)
    for drafts in (2, "auto"):
        assert torch.equal(fused.generate(**CALL, speculative=drafts), fused.generate(**CALL))


def test_expert_prompt_of_its_own(single):
    other, mask = tiny.prompts((3, 5, 2, 6), seed=9)
    call = CALL | {"expert_input_ids": other, "expert_attention_mask": mask}
    assert torch.equal(single.generate(**call, speculative=3), single.generate(**call))


def test_unknown_processors_and_sliding_windows_fall_back(single, folders):
    class Unknown(LogitsProcessor):
        def __call__(self, input_ids, scores):
            return scores

    with pytest.warns(UserWarning, match="without speculation: a logits processor"):
        single.generate(**CALL, speculative=2, logits_processor=LogitsProcessorList([Unknown()]))
    config = MistralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        sliding_window=6,
    )
    torch.manual_seed(0)
    sliding = tiny.fused(
        tiny.weak(folders["base"], [folders["one"]]), strong=freeze(MistralForCausalLM(config).double())
    )
    expected = sliding.generate(**CALL)
    with pytest.warns(UserWarning, match="mistral can't be rolled back"):
        assert torch.equal(sliding.generate(**CALL, speculative=2), expected)


def test_refused(single):
    with pytest.raises(FusionError, match="speculative is 99"):
        single.generate(**CALL, speculative=99)


P = torch.tensor([0.3, 0.05, 0.25, 0.0, 0.3, 0.1], dtype=torch.float64)
Q = torch.tensor([0.1, 0.4, 0.2, 0.2, 0.05, 0.05], dtype=torch.float64)


@pytest.mark.parametrize("coupling", ["max", "gumbel"])
def test_emitted_tokens_follow_p(coupling):
    """Chi-square of what comes out of one judgement against p, V = 6, one id impossible under p and likely under q."""
    places = [(seed, 0, position) for seed in range(40) for position in range(500)]
    p, q = P.log().expand(len(places), -1), Q.log().expand(len(places), -1)
    drafts = sample_tokens("gumbel", q, places)
    accepted, tokens = verify_drafts(coupling, p, q, drafts, places)
    counts = torch.bincount(tokens, minlength=6).double()
    assert counts[3] == 0
    assert not accepted[drafts == 3].any()
    possible = P > 0
    expected = P[possible] * len(places)
    assert float(((counts[possible] - expected) ** 2 / expected).sum()) < 18.47  # 4 degrees of freedom, p = 1e-3
    seen, overlap = float(accepted.double().mean()), float(torch.minimum(P, Q).sum())
    bound = overlap if coupling == "max" else overlap / (2 - overlap)
    assert float(acceptance_probability(coupling, p[:1], q[:1])) == pytest.approx(bound)
    assert seen == pytest.approx(overlap, abs=0.015) if coupling == "max" else seen > bound - 0.01


def test_drafted_and_accepted_pairs_are_exact_jointly():
    """Two positions with max coupling: the pair follows p(x1) p(x2 | x1), also when a bonus token follows."""
    after = {x: torch.roll(P, x) for x in range(6)}
    counts = Counter()
    trials = 20000
    places = [(1, n, 0) for n in range(trials)]
    first = sample_tokens("gumbel", Q.log().expand(trials, -1), places)
    accepted, tokens = verify_drafts("max", P.log().expand(trials, -1), Q.log().expand(trials, -1), first, places)
    second_p = torch.stack([after[int(x)] for x in tokens]).log()
    bonus = sample_tokens("gumbel", second_p, [(1, n, 1) for n in range(trials)])
    for a, b in zip(tokens.tolist(), bonus.tolist(), strict=True):
        counts[a, b] += 1
    expected = {(a, b): float(P[a] * after[a][b]) * trials for a in range(6) for b in range(6)}
    chi_square = sum((counts[pair] - e) ** 2 / e for pair, e in expected.items() if e > 0)
    assert all(counts[pair] == 0 for pair, e in expected.items() if e == 0)
    assert chi_square < 51.2  # 24 degrees of freedom, p = 1e-3
    assert accepted.any()


def test_p_equal_to_q_accepts_everything():
    places = [(0, 0, position) for position in range(200)]
    logits = Q.log().expand(200, -1)
    for coupling in ("max", "gumbel"):
        assert verify_drafts(coupling, logits, logits, sample_tokens("gumbel", logits, places), places)[0].all()


def test_unseeded_sampling_by_max_coupling(single):
    """The distribution of the second token of a real model: direct and speculative, both against the model's own p."""
    ids = IDS[2:3]
    many = {"input_ids": ids.repeat(400, 1), "do_sample": True, "max_new_tokens": 2, "top_k": 4, "eos_token_id": None}
    many["pad_token_id"] = 0
    pairs = {}
    for drafts in (None, 2):
        torch.manual_seed(5)
        counts = Counter()
        for _ in range(5):
            for row in single.generate(**many, speculative=drafts)[:, ids.shape[1] :].tolist():
                counts[tuple(row)] += 1
        pairs[drafts] = counts
    total = 2000
    keys = {pair for counts in pairs.values() for pair, count in counts.items() if count >= 5}
    chi_square = sum((pairs[None][k] - pairs[2][k]) ** 2 / (pairs[None][k] + pairs[2][k]) for k in keys)
    assert sum(pairs[2].values()) == total
    assert chi_square < 37.7  # at most 15 degrees of freedom, p = 1e-3


def test_draft_length_takes_the_cheapest():
    length = DraftLength(maximum=4)
    for _ in range(20):
        length.record_times(0, plain=1.0)
    length.record_acceptance(100, 95)
    length.draft.append(0.1)
    assert length.next() == 4
    for _ in range(40):
        length.record_times(4, draft=0.1, verify=1.1)
        length.record_acceptance(4, 0)
    assert length.next() == 0
    slow = DraftLength(maximum=4)
    for _ in range(20):
        slow.record_times(0, plain=1.0)
    slow.record_acceptance(10, 9)
    slow.draft.append(0.9)  # a drafter as slow as the model itself
    assert slow.next() == 0


def test_draft_length_counts_what_rounds_give():
    """Drafts that stand all or not at all: six of seven looks are good ones, but a round gives 4 tokens, not 4.6."""
    believing, counting = DraftLength(), DraftLength()
    for length in (believing, counting):
        for _ in range(20):
            length.record_times(0, plain=0.8)
        length.record_acceptance(100, 85)
        for at in range(64):
            stand = 6 * (at % 2)
            length.record_acceptance(min(stand + 1, 6), stand)
            length.record_times(6, draft=0.35, verify=1.2, tokens=1 + stand if length is counting else None)
    assert believing.time_per_token(6) == pytest.approx(3.44 / 4.6, rel=0.05)
    assert counting.time_per_token(6) == pytest.approx(3.44 / 4, rel=0.05)
    assert believing.next() > 0
    assert counting.next() == 0


def test_draft_length_has_patience():
    length = DraftLength()
    length.record_acceptance(1, 1)
    length.record_times(0, plain=1.0)
    assert length.next() == 0  # too early to change


def test_draft_length_begins_with_what_an_earlier_call_learnt():
    """A good drafter: the first call starts plainly, the second drafts at once; a bad one is left alone at once."""
    first, bad = DraftLength(), DraftLength()
    for length, beta in ((first, 0.95), (bad, 0.05)):
        for _ in range(4):
            length.record_times(0, plain=1.0)
        length.record_acceptance(100, 100 * beta)
        length.draft.append(0.1)
    again, still = DraftLength(), DraftLength()
    again.warm_start(first)
    still.warm_start(bad)
    assert DraftLength().next() == 0
    assert again.next() == 6
    assert still.next() == 0
    untaught = DraftLength()
    untaught.warm_start(DraftLength())
    assert (untaught.beta, untaught.next()) == (None, 0)


def test_a_second_auto_call_gives_the_same_tokens(single):
    expected = single.generate(**CALL)
    for _ in range(3):
        assert torch.equal(single.generate(**CALL, speculative="auto"), expected)
    assert single.draft_lengths[len(IDS)] is single.last_draft_length


def play(length, tokens, *, beta, draft, slope, overhead, seed):
    """Seconds that a text takes under `length`, in plain steps, on a machine where a pass over n + 1 positions costs
    (1 + slope n) passes, a draft step `draft`, and a round `overhead`; every hundredth time is twice as long."""
    noise = random.Random(seed)

    def seconds(x):
        return x * (0.9 + 0.2 * noise.random() + (noise.random() < 0.01))

    made = spent = 0
    while made < tokens:
        drafts = min(length.next_round(), tokens - made - 1)
        if drafts <= 0:
            taken = seconds(1)
            length.record_times(0, plain=taken)
            length.record_acceptance(1, noise.random() < beta)
            made, spent = made + 1, spent + taken
            continue
        stand = next((n for n in range(drafts) if noise.random() >= beta), drafts)
        step, verify = seconds(draft), seconds((1 - 0.2 * draft) * (1 + slope * drafts))
        taken = (drafts + (stand == drafts)) * step + verify + overhead
        length.record_acceptance(min(stand + 1, drafts), stand)
        length.record_times(drafts, draft=step, verify=verify, tokens=1 + stand, total=taken)
        made, spent = made + 1 + stand, spent + taken
    return spent


def mean_time(tokens, make=DraftLength, runs=12, **machine):
    times = [play(make(draft_share=machine["draft"]), tokens, seed=seed, **machine) for seed in range(runs)]
    return sum(times) / runs / tokens


@pytest.mark.parametrize("tokens, bound", [(24, 1.1), (64, 1.05), (256, 1.04)])
def test_auto_is_never_slower_than_off(tokens, bound):
    """Equal-sized models and small drafters, good and bad drafts, passes whose positions are free or cost."""
    for beta, draft, slope, overhead in itertools.product(
        (0.2, 0.5, 0.7, 0.9), (0.15, 0.45), (0.03, 0.2, 0.6), (0, 0.2)
    ):
        assert mean_time(tokens, beta=beta, draft=draft, slope=slope, overhead=overhead) < bound


def test_auto_still_takes_what_there_is_to_gain():
    machine = {"beta": 0.9, "draft": 0.15, "slope": 0.03, "overhead": 0.0}
    best = min(mean_time(256, lambda n=n, **_: DraftLength(n), **machine) for n in (2, 4, 6))
    assert mean_time(256, **machine) < best + 0.1
