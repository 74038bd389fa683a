"""`fuse`: how small experts steer a large model at decoding."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from mtft.recipe.schema.model import ModelSection
from mtft.recipe.schema.section import INPUT, Numbers, RecipeSection, Texts


class FuseSection(RecipeSection):
    strong: ModelSection
    """The large model that is steered; its weights are never touched."""
    base: ModelSection | None = None
    """The small base of the adapters; null: the recipe's `model`."""
    adapters: Annotated[Texts | None, INPUT] = None
    """LoRA experts on the small base; null in `mtft run`: the joint adapter."""
    alpha_rule: Literal["fixed", "forward", "jeffreys", "paper", "paper_grid"] = "jeffreys"
    """How far each token is moved (docs/papers.md); fixed = proxy-tuning / EFT."""
    alpha: Annotated[float, Field(ge=0, le=10)] = 1.0
    """The constant of alpha_rule `fixed`."""
    alpha_max: Annotated[float, Field(gt=0, le=10)] = 2.0
    """Upper end of the search for the other rules."""
    max_new_tokens: Annotated[int, Field(gt=0, le=10**6)] = 64
    """Length limit of `mtft fuse generate`."""
    temperature: Annotated[float, Field(ge=0, le=100)] = 0.0
    """0 = greedy."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus sampling, after fusion."""
    batch_size: Annotated[int, Field(gt=0, le=10**5)] = 8
    """Prompts decoded together."""
    weights: Literal["active", "onehot", "uniform", "user", "router"] = "active"
    """How several experts share the step: by how much each has to say, the loudest alone, evenly, `user_weights`, or as
    `router` says for each prompt."""
    user_weights: Numbers | None = None
    """One weight per expert for weights: user; they add up to 1."""
    router: Annotated[str | None, INPUT] = None
    """File for weights: router; `mtft merge` with merge.experts.kind: twin writes one (router.safetensors)."""
    plausibility: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """After fusion drop tokens below this share of the strong model's best probability; 0 = off."""
    speculative: Literal["off", "auto"] | Annotated[int, Field(ge=0, le=16)] = "off"
    """Let the expert draft tokens that the strong model only judges: the same text in fewer passes. Drafts, or auto."""
    tokens: Literal["strict", "prefix", "map"] = "strict"
    """How much the tokenizers must agree. prefix: extra ids at the end are allowed, but not steered. map: the small
    model reads the text anew in its own tokens, and steers those that it has too (slower, without speculation)."""
