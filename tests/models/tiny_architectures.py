"""One model of a few thousand parameters for each architecture: transformers' own config class, made small."""

import torch

from tests.training.conftest import write_model

WORDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
BODY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    **WORDS,
}
EYES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}


def gemma3(size):
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = {**BODY, "vocab_size": size, "sliding_window": 16, "query_pre_attn_scalar": 8}
    config = Gemma3Config(text_config=text, vision_config=EYES, mm_tokens_per_image=4, **WORDS)
    return Gemma3ForConditionalGeneration(config)


def gemma4(size):
    from transformers import Gemma4Config, Gemma4ForConditionalGeneration

    text = {
        **BODY,
        "vocab_size": size,
        "sliding_window": 16,
        "num_hidden_layers": 2,
        "vocab_size_per_layer_input": size,
    }
    text |= {"hidden_size_per_layer_input": 4, "num_kv_shared_layers": 0, "global_head_dim": 8}
    text |= {"layer_types": ["sliding_attention", "full_attention"]}
    eyes = {**EYES, "head_dim": 8, "position_embedding_size": 16}
    config = Gemma4Config(text_config=text, vision_config=eyes, audio_config=None, **WORDS)
    return Gemma4ForConditionalGeneration(config)


def gpt_oss(size):
    from transformers import GptOssConfig, GptOssForCausalLM

    more = {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16}
    more |= {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
    return GptOssForCausalLM(GptOssConfig(vocab_size=size, **BODY, **more))


def qwen3_moe(size):
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    more = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(vocab_size=size, **BODY, **more))


def gpt2(size):
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=size, n_embd=32, n_layer=2, n_head=4, n_positions=512, **WORDS))


def phi3(size):
    from transformers import Phi3Config, Phi3ForCausalLM

    return Phi3ForCausalLM(Phi3Config(vocab_size=size, **BODY))


def deepseek_v3(size):
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    body = {key: value for key, value in BODY.items() if key != "head_dim"} | {"num_key_value_heads": 4}
    more = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "n_shared_experts": 1}
    more |= {"moe_intermediate_size": 16, "first_k_dense_replace": 1, "kv_lora_rank": 8, "q_lora_rank": 8}
    more |= {"qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8}
    return DeepseekV3ForCausalLM(DeepseekV3Config(vocab_size=size, **body, **more))


def llama4(size):
    """The whole checkpoint, as it is published: text and vision."""
    from transformers import Llama4Config, Llama4ForConditionalGeneration

    return Llama4ForConditionalGeneration(
        Llama4Config(text_config=_llama4_text(size), vision_config=_llama4_eyes(), **WORDS)
    )


def llama4_text(size):
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    return Llama4ForCausalLM(Llama4TextConfig(**_llama4_text(size)))


def _llama4_text(size):
    more = {"num_local_experts": 2, "num_experts_per_tok": 1, "intermediate_size_mlp": 48, "attention_chunk_size": 64}
    more |= {"interleave_moe_layer_step": 1}
    return {"vocab_size": size, **BODY, **more}


def _llama4_eyes():
    eyes = {key: value for key, value in EYES.items() if key != "num_key_value_heads"}
    more = {"projector_input_dim": 16, "projector_output_dim": 16, "vision_output_dim": 16, "pixel_shuffle_ratio": 0.5}
    return {**eyes, "intermediate_size": 64, **more}


ARCHITECTURES = {
    make.__name__: make for make in (gemma3, gemma4, gpt_oss, qwen3_moe, gpt2, phi3, deepseek_v3, llama4, llama4_text)
}


def write_architecture(folder, name, seed=0):
    """The model of that name and the byte-level tokenizer of tests/training, in a folder."""
    write_model(folder)  # for its tokenizer
    (folder / "model.safetensors").unlink()
    torch.manual_seed(seed)
    model = ARCHITECTURES[name](259)
    for parameter in model.parameters():  # so that no logit hangs on weights that start at zero
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    return folder
