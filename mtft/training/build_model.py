"""The model of a recipe, ready to train: base weights, fused head, adapter."""

from __future__ import annotations

from peft import PeftModel
from transformers import PreTrainedModel

from mtft.losses.token_nll import add_fused_head, resolve_path
from mtft.models.loading import load_base
from mtft.models.lora import add_lora, continue_lora
from mtft.recipe.schema.recipe import Recipe


def load_for_training(recipe: Recipe, base: PreTrainedModel | None = None) -> PreTrainedModel | PeftModel:
    """Base and adapter of a recipe (or the whole base for full fine-tuning). A given `base` is used up."""
    full = recipe.lora is None
    model = load_base(recipe.model, full=full) if base is None else base
    if resolve_path(recipe.loss.path) == "fused":
        add_fused_head(model)  # before PEFT wraps the model
    if recipe.lora is None:
        return model
    if recipe.lora.start is not None:
        return continue_lora(model, recipe.lora)
    return add_lora(model, recipe.lora, seed=recipe.seed)
