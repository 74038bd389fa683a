"""Tiny random models and adapters: Llama shapes, V = 61 (64 logits), made in seconds, the same every time."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mtft.fuse.alpha.spec import FusionSpec
from mtft.fuse.fused_model import FusedCausalLM
from mtft.fuse.load_models import WeakModel, freeze, load_weak_model

VOCABULARY = 61  # the logits are 64 wide: padding must never matter
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def model(
    seed: int, width: int = 32, layers: int = 2, dtype: torch.dtype = torch.float64, **options
) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=options.pop("vocab_size", 64),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=options.pop("context", 128),
        initializer_range=0.3,
        attn_implementation="sdpa",
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        **options,
    )
    return freeze(LlamaForCausalLM(config).to(dtype))


def adapter(folder: Path, base: Path, seed: int, r: int = 4, std: float = 0.2, **options) -> Path:
    """A LoRA with random A and B on the model in `base`."""
    torch.manual_seed(seed)
    tuned = get_peft_model(
        LlamaForCausalLM.from_pretrained(base, dtype=torch.float32),
        LoraConfig(r=r, lora_alpha=8, target_modules=options.pop("target_modules", LINEARS), **options),
    )
    for name, parameter in tuned.named_parameters():
        if "lora_" in name and "magnitude" not in name:
            torch.nn.init.normal_(parameter, std=std)
    tuned.save_pretrained(folder)
    return folder


def base(folder: Path, **options) -> Path:
    model(1, width=16, dtype=torch.float32, **options).save_pretrained(folder)
    return folder


def weak(base: Path, adapters: list[Path], dtype: torch.dtype = torch.float64) -> WeakModel:
    return load_weak_model(base, adapters, dtype=dtype, device="cpu", attention="sdpa")


def fused(small: WeakModel, spec: FusionSpec | None = None, strong=None, **options) -> FusedCausalLM:
    dtype = small.model.dtype
    strong = model(7, dtype=dtype) if strong is None else strong
    return FusedCausalLM(strong, small, None, spec or FusionSpec(), vocab_size=VOCABULARY, **options)


def tokenizer(size: int = 300) -> PreTrainedTokenizerFast:
    """Byte-level BPE on a few lines: pad 0, bos 1, eos 2, as the tiny models have them."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    trained.train_from_iterator(["the quick brown fox jumps over the lazy dog 0123456789"] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=trained, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def folders_with_text(root: Path) -> dict[str, Path]:
    """Strong model, base, adapter and tokenizer on disk, fp32: what `load` and a recipe need."""
    text = tokenizer()
    strong, small = root / "strong", root / "small"
    model(7, dtype=torch.float32, vocab_size=320).save_pretrained(strong)
    base(small, vocab_size=320)
    for folder in (strong, small):
        text.save_pretrained(folder)
    return {"strong": strong, "small": small, "expert": adapter(root / "expert", small, 11)}


def prompts(lengths=(7, 4, 9), seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Left-padded ids and mask."""
    generator = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    ids = torch.zeros(len(lengths), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        ids[row, longest - length :] = torch.randint(3, VOCABULARY, (length,), generator=generator)
        mask[row, longest - length :] = 1
    return ids, mask
