"""A tiny random model of each family that may be packed, and examples for it. Every weight matters in what it says."""

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from mtft.data.tokenize.encode import Example
from mtft.models.segment_attention import register

VOCABULARY = 61
SIZE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# windows shorter than the examples: a window over the row instead of the example would show
SLIDING = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}
EXTRA = {
    **dict.fromkeys(("cohere2", "exaone4", "gemma2", "gemma3_text", "ministral", "olmo3"), SLIDING),
    "falcon_h1": {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "mistral": {"sliding_window": 5},
    "mixtral": {"sliding_window": 5, "num_local_experts": 4},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "phi3": {"sliding_window": 5},
    "qwen2": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "qwen3": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1},
    "smollm3": {"no_rope_layers": [1, 0]},
    "starcoder2": {"sliding_window": 5},
}


def tiny(family, attention="sdpa"):
    register()
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SIZE, **EXTRA.get(family, {}))
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32)
    with torch.no_grad():  # biases and norms start at 0 and 1: make every weight matter
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape))
    return model.eval()


def examples(lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [
        (Example(rng.integers(3, VOCABULARY, n).astype(np.int32), np.arange(n) > 0), k) for k, n in enumerate(lengths)
    ]
