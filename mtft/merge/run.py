"""The merge section of a recipe, run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mtft.recipe.schema import Recipe

from .api import merge
from .errors import MergeError
from .factors import Adapter
from .report import MergeReport


def merge_from_recipe(
    recipe: Recipe, adapters: Sequence[str | Path | Adapter] | None = None, out: str | Path | None = None
) -> MergeReport:
    """Merge as `recipe.merge` says. adapters, out: win over the section's (`mtft run` passes the trained singles).

    Raises MergeError if neither names any adapters.
    """
    section = recipe.merge
    if section is None:
        raise MergeError("the recipe has no section `merge`", where="merge", do="add one: merge: {method: linear}")
    chosen = adapters if adapters is not None else section.adapters
    if not chosen:
        raise MergeError("no adapters to merge", where="merge.adapters", do="list their folders, or use `mtft run`")
    return merge(
        list(chosen),
        out or section.out or Path(recipe.output.dir) / "merge" / "adapter",
        method=section.method,
        options=dict(section.options),
        weights=section.weights,
        scale=section.scale,
        average=section.average,
        rank=section.rank,
        energy=section.energy,
        min_energy=section.min_energy,
        saved=section.saved,
        dtype=None if section.dtype == "auto" else section.dtype,
        vllm=section.vllm,
        per_module=[
            (rule.modules, rule.model_dump(exclude={"modules"}, exclude_none=True)) for rule in section.per_module
        ],
        allow_base_mismatch=section.allow_base_mismatch,
        workers=section.workers,
        seed=recipe.seed,
        overwrite=section.overwrite,
        diagnostics=True,
    )
