"""`model`: which base model, at which precision."""

from __future__ import annotations

from typing import Annotated, Literal

from mtft.recipe.schema.section import INPUT, MODEL, RecipeSection


class ModelSection(RecipeSection):
    path: Annotated[str, MODEL]
    """Folder of a model, `quickstart:weak`, `quickstart:strong`, or a hub name."""
    revision: str = "main"
    """Branch, tag or commit of a hub model."""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Precision of the weights and of the forward pass. `auto`: bf16 on a GPU that has it, or on a CPU where a small
    matrix product, measured once, is clearly faster in it; else fp32."""
    quantise: Literal["none", "nf4", "int8"] = "none"
    """Load the base in 4 bit (QLoRA: NF4, double quantisation) or 8 bit through bitsandbytes."""
    attention: Literal["auto", "sdpa", "eager", "flex_attention", "flash_attention_2", "segments"] = "auto"
    """Attention implementation of transformers, or `segments`: each packed example by itself, without a mask over the
    row (docs/training.md). `auto`: segments on a CPU where it is proven for the kind of model, else transformers'
    choice."""
    chat_template: Annotated[str | None, INPUT] = None
    """File with a Jinja chat template to use in the place of the tokenizer's own. A model that has none gets a plain
    one: system text, `User: ...`, `Assistant: ...`, each answer ended by the EOS token. Every export holds the template
    that its run was trained with.
    """
    trust_remote_code: Literal[False] = False
    """Code that ships with a model is never run, so this can only be false."""
