"""`run`: what `mtft run` does beside the main line."""

from __future__ import annotations

from typing import Literal

from mtft.recipe.schema.section import RecipeSection, Steps


class RunSection(RecipeSection):
    """What `mtft run` does beside the main line mix -> train -> merge -> fuse -> report."""

    baseline: Literal["uniform", "natural", "none"] = "uniform"
    """Also train a joint adapter on this mixture, to compare with."""
    predicted: Literal["if_better", "always"] = "if_better"
    """Train on the predicted mixture only if the trials say that it is better than the current one, or always."""
    singles: bool = True
    """Also train one adapter per task (what the merge stage merges, and the yardstick of retention)."""
    tune_strong: bool = True
    """Also tune the strong model by LoRA on the same mixture: the yardstick of fusion's gap closed."""
    single_steps: Steps | None = None
    """Steps of a single-task run; null: the joint run's steps times the task's share, at least 10."""
