"""A strong model with a sliding window and a small one with another tokenizer: templates and ends of turn differ."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import AddedToken
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, PreTrainedTokenizerFast

from mtft.fuse.load_models import freeze
from tests.fuse import tiny
from tests.fuse.tokenizers.test_vocabulary_match import train

STRONG_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
SMALL_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nbe a fox<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def strong_tokenizer() -> PreTrainedTokenizerFast:
    """Its turns' tokens are special, but in none of transformers' roles, as Gemma's are."""
    text = tiny.tokenizer()
    text.add_tokens([AddedToken(token, special=True) for token in ("<start_of_turn>", "<end_of_turn>")])
    text.chat_template = STRONG_TEMPLATE
    return text


def small_tokenizer() -> PreTrainedTokenizerFast:
    text = train(size=304, text=["def lazy(fox): return quick(fox)", "over under over the dog"] * 3)
    text.add_tokens([AddedToken(token, special=True) for token in ("<|im_start|>", "<|im_end|>")])
    text.chat_template = SMALL_TEMPLATE
    return text


def sliding_model(seed: int = 7, dtype: torch.dtype = torch.float64) -> Gemma3ForCausalLM:
    """A window of 8 positions in two of three layers: shorter than any prompt here."""
    torch.manual_seed(seed)
    config = Gemma3TextConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=8,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
        max_position_embeddings=256,
        initializer_range=0.3,
        attn_implementation="sdpa",
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return freeze(Gemma3ForCausalLM(config).to(dtype))


def folders(root: Path) -> dict[str, Path]:
    """Both models with their tokenizers, and an adapter, on disk."""
    strong, small = root / "strong", root / "small"
    sliding_model(dtype=torch.float32).save_pretrained(strong)
    strong_tokenizer().save_pretrained(strong)
    tiny.base(small, vocab_size=320, context=256)
    small_tokenizer().save_pretrained(small)
    return {"strong": strong, "small": small, "expert": tiny.adapter(root / "expert", small, 11)}
