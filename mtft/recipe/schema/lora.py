"""`lora`: the adapter that is trained."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from mtft.recipe.schema.section import INPUT, Positive, Rank, RecipeSection, SomeTexts


class LoraSection(RecipeSection):
    r: Rank = 16
    """Rank."""
    alpha: Positive = 32
    """Scale: the update is alpha/r * B A (alpha/sqrt(r) with rslora)."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the input of A."""
    targets: Literal["all-linear"] | SomeTexts = "all-linear"
    """Modules that get an adapter: all linears but the head, or names as PEFT matches them."""
    rslora: bool = False
    """Scale by alpha/sqrt(r) (Kalajdzievski 2023)."""
    dora: bool = False
    """Weight-decomposed LoRA (Liu et al. 2024). Not mergeable by `mtft merge`."""
    init: Literal["default", "gaussian", "orthogonal", "pissa", "olora", "mica"] = "default"
    """How A and B start (PEFT's init_lora_weights). pissa and olora change the base weights; export converts them.
    mica trains A only. (PEFT's eva, corda, loftq and lora_ga want data or other weights first: not offered.)"""
    freeze_a: bool = False
    """Train B only. A stays as drawn from `seed`, so that all runs with one seed share it: their adapters then differ
    in B alone and merge exactly (LoRA-FA; half of the optimizer's state, and A's inputs need not be kept)."""
    start: Annotated[str | None, INPUT] = None
    """Folder of a LoRA adapter of this base to train on from, in place of a fresh one. Relative to the recipe."""
    plus: Annotated[float, Field(ge=1, le=10**4)] = 1.0
    """LoRA+: how many times as fast as A the Bs learn (the paper: 16, with about half the usual learning rate)."""
