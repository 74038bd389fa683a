"""Answers in batches against `generate` one by one, and what may not change them."""

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mtft.common.errors import UserError
from mtft.evaluation.evaluation_mode import evaluation_mode
from mtft.evaluation.generation import GenerateOptions, generate_answers

PAD, END, VOCABULARY = 0, 2, 40


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, pad_token_id=PAD, bos_token_id=1, eos_token_id=END,
    )  # fmt: skip
    network = LlamaForCausalLM(config)
    with torch.no_grad():  # sharp logits: rounding decides nothing
        network.lm_head.weight.mul_(20)
    return network.eval()


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(0)
    return [rng.integers(3, VOCABULARY, size=n, dtype=np.int32) for n in (5, 17, 1, 9, 30, 17, 2, 8)]


def options(**changed):
    given = {"max_new_tokens": 12, "temperature": 0.0, "stop": (), "end_ids": (END, 7), "pad_id": PAD}
    return GenerateOptions(**given | {"tokens_at_once": 200} | changed)


def one_by_one(model, prompt, tokens=12, ends=(END, 7)):
    """Greedy decoding written out, without a cache."""
    ids = prompt.tolist()
    for _ in range(tokens):
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        if ids[-1] in ends:
            break
    return ids[len(prompt) :]


@pytest.mark.parametrize("tokens_at_once", [1, 60, 10_000])
def test_greedy_answers_equal_a_loop_without_cache(model, prompts, tokens_at_once):
    found = generate_answers(model, prompts, options(tokens_at_once=tokens_at_once), None)
    assert found == [[one_by_one(model, prompt)] for prompt in prompts]
    assert len({len(answer) for (answer,) in found}) > 1  # some end before the limit


def test_penalties_of_the_model_play_no_part(model, prompts):
    before = generate_answers(model, prompts, options(), None)
    config = model.generation_config
    try:
        model.generation_config.repetition_penalty = 1e6
        model.generation_config.suppress_tokens = list(range(3, 30))
        assert generate_answers(model, prompts, options(), None) == before
        assert model.generation_config is config
        assert config.repetition_penalty == 1e6
    finally:
        config.repetition_penalty, config.suppress_tokens = 1.0, None


def test_draws_depend_on_seed_row_and_sample_alone(model, prompts):
    drawn = [
        generate_answers(model, prompts, options(temperature=1.5, tokens_at_once=size, seed=seed), None, samples=3)
        for size, seed in ((1, 0), (100, 0), (10_000, 0), (100, 1))
    ]
    assert drawn[0] == drawn[1] == drawn[2] != drawn[3]
    assert max(len({tuple(answer) for answer in answers}) for answers in drawn[0]) == 3


def test_draws_follow_the_softmax(model):
    prompt = np.array([5, 6, 9], dtype=np.int32)
    with torch.no_grad():
        logits_V = model(input_ids=torch.from_numpy(prompt).long()[None]).logits[0, -1]
    expected_V = torch.softmax(logits_V / 4.0, dim=-1).numpy()
    given = options(temperature=4.0, max_new_tokens=1, tokens_at_once=4000)
    (answers,) = generate_answers(model, [prompt], given, None, samples=4000)
    found_V = np.bincount([answer[0] for answer in answers], minlength=VOCABULARY) / 4000
    # chi-square with V - 1 degrees of freedom: beyond mean + 6 standard deviations for a wrong distribution
    chi = 4000 * float(((found_V - expected_V) ** 2 / np.maximum(expected_V, 1e-9)).sum())
    assert chi < VOCABULARY + 6 * (2 * VOCABULARY) ** 0.5


def test_an_answer_ends_at_the_models_window(model):
    long = np.full(60, 5, dtype=np.int32)
    (answer,) = generate_answers(model, [long], options(end_ids=()), None)[0]
    assert len(answer) == 4
    with pytest.raises(UserError, match="leaves no room"):
        generate_answers(model, [np.full(64, 5, dtype=np.int32)], options(), None)


def test_a_model_in_training_mode_comes_back_so(model, prompts):
    model.train()
    try:
        with evaluation_mode(model):
            generate_answers(model, prompts[:2], options(), None)
        assert model.training
    finally:
        model.eval()
