"""A base model of three tiny layers, for tests that need PEFT's side of the story."""

import pytest


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "vocab_size": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": False}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads))
    folder = tmp_path_factory.mktemp("base")
    model.save_pretrained(folder)
    return folder
