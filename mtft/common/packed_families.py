"""Kinds of models whose packed examples are proven not to see each other: model_type of transformers' configs.

BY_POSITIONS  by positions that start again, with a mask that transformers makes of them (sdpa, eager)
BY_BORDERS    by borders too, without a mask (attention "segments"), with the losses and gradients of the masked path

A family is here when tests/data/batching/test_packed_attention.py and tests/models/test_segment_attention.py hold for a
tiny random model of it, with experts, latent attention and windows as the family has them. Candidates among the models
of the installed transformers: scripts/find_packable.py.
"""

from __future__ import annotations

# Measured to leak with transformers 5.24, and so not here: falcon_h1, gpt_oss, and linear attention, convolutions and
# state spaces, which carry their state over the borders (qwen3_next, qwen3_5_text, lfm2, jamba, mamba, ...).
BY_POSITIONS = frozenset({
    "apertus", "arcee", "aria_text", "axk1", "bitnet", "codegen", "cohere", "cohere2", "cohere2_moe", "cwm",
    "deepseek_v2", "deepseek_v3", "diffllama", "dots1", "ernie4_5", "ernie4_5_moe", "exaone4", "exaone_moe",
    "flex_olmo", "gemma", "gemma2", "gemma3_text", "glm", "glm4", "glm4_moe", "glm4_moe_lite", "gpt2", "gpt_bigcode",
    "gpt_neox", "gptj", "granite", "granitemoe", "granitemoeshared", "helium", "hunyuan_v1_dense", "hunyuan_v1_moe",
    "hy_v3", "hyperclovax", "jais2", "jetmoe", "laguna", "llama", "mellum", "minicpm3", "minimax_m2", "ministral",
    "ministral3", "mistral", "mixtral", "modernbert-decoder", "nanochat", "nemotron", "olmo", "olmo2", "olmo3",
    "olmoe", "persimmon", "phi", "phi3", "phimoe", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "seed_oss", "smollm3",
    "solar_open", "stablelm", "starcoder2", "youtu",
})  # fmt: skip
# Without gemma2 (caps its scores), nemotron and stablelm (an attention of their own, not by transformers' interface),
# phimoe and qwen2_moe (their window stands in the mask alone).
BY_BORDERS = BY_POSITIONS - {"gemma2", "nemotron", "phimoe", "qwen2_moe", "stablelm"}
