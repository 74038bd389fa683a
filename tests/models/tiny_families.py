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
# What else a family may ask for: experts, latent attention, and windows shorter than the examples (one over the row
# instead of the example would show).
MORE = {
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **{"num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1, "n_shared_experts": 1},
    **{"first_k_dense_replace": 1, "decoder_sparse_step": 1},
    **{"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16},
    **{"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "rotary_dim": 4},
    **{"sliding_window": 5, "use_sliding_window": True, "max_window_layers": 1},
}
EXPERTS = {
    "axk1", "cohere2_moe", "deepseek_v2", "deepseek_v3", "dots1", "ernie4_5_moe", "exaone_moe", "flex_olmo", "glm4_moe",
    "glm4_moe_lite", "granitemoe", "granitemoeshared", "hunyuan_v1_moe", "hy_v3", "jetmoe", "laguna", "mellum",
    "minimax_m2", "mixtral", "olmoe", "phimoe", "qwen2_moe", "qwen3_moe", "solar_open",
}  # fmt: skip
EXTRA = {
    "falcon_h1": {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1},
    "smollm3": {"no_rope_layers": [1, 0]},
}


def settings(family):
    """Of a family's config: those of its own among SIZE and MORE."""
    config = AutoConfig.for_model(family)
    known = {*config.to_dict(), *config.attribute_map}
    chosen = SIZE | {key: value for key, value in MORE.items() if key in known}
    if {"layer_types", "sliding_window"} <= known:
        chosen["layer_types"] = ["sliding_attention", "full_attention"]
    if "kv_lora_rank" in known:  # latent attention: heads of keys as many as of queries, and of sizes of their own
        chosen["num_key_value_heads"] = SIZE["num_attention_heads"]
        del chosen["head_dim"]
    return chosen | EXTRA.get(family, {})


def tiny(family, attention="sdpa"):
    register()
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **settings(family))
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
