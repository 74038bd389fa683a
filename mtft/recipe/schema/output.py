"""`output`: the run directory, checkpoints and trackers."""

from __future__ import annotations

from typing import Annotated, Literal

from mtft.recipe.schema.section import OUTPUT, Count, RecipeSection, Texts


class OutputSection(RecipeSection):
    dir: Annotated[str, OUTPUT]
    """Run directory. Relative to the working directory, as for every other tool's output."""
    save_every: Count | None = None
    """Steps between checkpoints; null: only at the end and on a signal."""
    keep: Count = 2
    """Checkpoints that stay on disk."""
    export: Literal["last", "best"] = "last"
    """Weights that the run hands over: those after the last step, or those of the evaluation with the best
    train.watch."""
    trackers: Texts = ()
    """Trackers of transformers: tensorboard, trackio, wandb, mlflow, ... metrics.jsonl is always written."""
