"""Answers in batches against greedy decoding without a cache, in families whose caches are of other kinds."""

import numpy as np
import pytest
import torch
import transformers

from mtft.evaluation.generation import generate_answers
from tests.evaluation.test_generation import END, PAD, VOCABULARY, one_by_one, options

SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "pad_token_id": PAD, "eos_token_id": END}
COMMON = {
    **SIZES, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
LINEAR = {"head_dim": 8, "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8,
          "linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"]}  # fmt: skip
FAMILIES = {
    "Mistral": {**COMMON, "sliding_window": 8},
    "Gemma3": {**COMMON, "head_dim": 8, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "Qwen3_5": {**COMMON, **LINEAR},
    "Lfm2": {**COMMON, "layer_types": ["conv", "full_attention"]},
    "Mamba": {**SIZES, "state_size": 8},
    "Rwkv": {**SIZES, "attention_hidden_size": 32, "context_length": 64},
}
TEXT = ("Gemma3", "Qwen3_5")  # their plain configuration is that of the model with pictures


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_in_batches_are_those_one_by_one(family):
    torch.manual_seed(3)
    config = getattr(transformers, f"{family}TextConfig" if family in TEXT else f"{family}Config")(**FAMILIES[family])
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)  # sharp logits: rounding decides nothing
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, VOCABULARY, size=n, dtype=np.int32) for n in (5, 17, 1, 30, 17, 8)]
    expected = [[one_by_one(model, prompt)] for prompt in prompts]
    assert len({tuple(answer) for (answer,) in expected}) > 3
    assert generate_answers(model, prompts, options(tokens_at_once=10_000), None) == expected
